/* The durable write-intent map of a volume: one bit per INTENT_SIZE bytes, volumes/NAME/intent (docs/format.md).
 * A set bit: the region may differ from the peer. Set durably before the first write to a clean region, cleared
 * lazily. Losing a clear is harmless; losing a set is not.
 */
#ifndef REPFS_IMAGE_INTENT_H
#define REPFS_IMAGE_INTENT_H

#include "core/bitmap.h"
#include "core/err.h"
#include "image/storage.h"

struct intent;

/* Opens or creates (all clear) the map for a volume of `size` bytes. A bad header is -ERR_CORRUPT, named; a map whose
 * checksum of the header is right but that is shorter than the size is completed with set bits. Returns owned. */
int intent_open(struct storage *s, const char *volume_name, uint64_t size, bool durable, struct intent **ret,
		struct err *e);
void intent_close(struct intent *t);
/* Copies the map as loaded into b (units_of(size, INTENT_SHIFT) bits). */
void intent_load(struct intent *t, struct bitmap *b);
/* Writes bits [first, first + n) as set or clear. intent_sync makes what was written before it durable (a no-op
 * unless durable). Thread-safe. */
int intent_write(struct intent *t, uint64_t first, uint64_t n, bool set);
int intent_sync(struct intent *t);

#endif
