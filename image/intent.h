/* The durable write-intent map of a volume: one bit per INTENT_SIZE bytes, volumes/NAME/intent (docs/format.md).
 * A set bit: the unit may differ from the peer. Set durably before the first write to a clean unit, cleared lazily.
 * Losing a clear is harmless; losing a set is not.
 *
 * A clean end leaves a fine map with it: which regions (REGION_SIZE) of the set units are dirty. It says so of the
 * moment at which it was made, so it is read once, and void before anything may be written to the volume again.
 *
 *   intent_open → intent_load (intent_load_fine) → intent_begin → intent_write, intent_sync ... → [intent_end] →
 *   intent_close
 */
#ifndef REPFS_IMAGE_INTENT_H
#define REPFS_IMAGE_INTENT_H

#include "core/bitmap.h"
#include "core/err.h"
#include "image/storage.h"

struct intent;

enum intent_open_flags {
	INTENT_DURABLE = 1 << 0, /* `power`: syncs are done */
	INTENT_NEW_SET = 1 << 1, /* one that is missing is made with all bits set: what the peer has is not known */
};

/* Opens the map for a volume of `size` bytes, or makes it, all clear or all set, where there is none. A bad header is
 * -ERR_CORRUPT, named; a map whose checksum of the header is right but that is shorter than the size is completed with
 * set bits. Writes nothing into one that is there. Returns owned. */
int intent_open(struct storage *s, const char *volume_name, uint64_t size, unsigned flags, struct intent **ret,
		struct err *e);
void intent_close(struct intent *t);
/* Copies the map as loaded into b (units_of(size, INTENT_SHIFT) bits). */
void intent_load(struct intent *t, struct bitmap *b);
/* True: the last end was clean, and `dirty` (units_of(size, REGION_SHIFT) bits, clear) is what was dirty then. */
bool intent_load_fine(struct intent *t, struct bitmap *dirty);
/* Makes the bits as loaded durable and the fine map void. Before the first write to the volume. */
int intent_begin(struct intent *t, struct err *e);
/* Writes bits [first, first + n) as set or clear. intent_sync makes what was written before it durable (a no-op
 * unless INTENT_DURABLE, and where it is durable already). A sync that failed fails for good. Thread-safe. */
int intent_write(struct intent *t, uint64_t first, uint64_t n, bool set);
int intent_sync(struct intent *t);
/* For a volume that grows: makes the map's new part on the disk, durably, all clear; what the map is in memory stays.
 * Repeatable. Then intent_grow, in memory, which can't fail. Nothing is written meanwhile. */
int intent_grow_prepare(struct intent *t, uint64_t size);
void intent_grow(struct intent *t);
/* A clean end: keeps `dirty` as the fine map, durably. Nothing is under way, and nothing can be written after it
 * (-ERR_STATE). A failure costs the fine map at most. */
int intent_end(struct intent *t, const struct bitmap *dirty);
/* Writes the map to a new file in place of one whose sync failed (I10). */
int intent_reopen(struct intent *t);

#endif
