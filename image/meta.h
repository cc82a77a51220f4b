/* A checksummed, versioned record kept in two copies, PATH.a and PATH.b (docs/format.md).
 *
 * Invariant: at every instant at least one copy checks out and is the last or the last-but-one record saved; once
 * meta_save has returned 0, it is the last.
 * Save writes one copy whole (write, then sync when `durable`), then the other the same way; a copy being written
 * is never the only good one. So a torn write costs the record being saved, never an older one, and one copy lost
 * later to the medium costs nothing.
 *
 * A second copy that can't be written does not fail the save, whose record is durable by then, unless what it leaves
 * behind could pass for the newest (meta.c): the next save begins with that copy, and fails if it still can't be
 * written. When the first copy can't be written, meta_save puts the old record back over it as far as it can and fails.
 * A copy that can't be read is not taken for one that is torn: the record never goes back on an EIO.
 * The caller makes saves, loads and deletes of one path one at a time.
 */
#ifndef REPFS_IMAGE_META_H
#define REPFS_IMAGE_META_H

#include "core/err.h"
#include "image/storage.h"

#define META_PAYLOAD_MAX (1U << 20)

/* Saves payload under PATH.a/.b with the given kind (four characters, says what the record is) and format version.
 * Creating the files syncs `dir` (the folder of path) when durable; a file appears under its name only when whole
 * (PATH.tmp, renamed). A record of a newer version is not overwritten: -ERR_VERSION. */
int meta_save(struct storage *s, const char *dir, const char *path, const char kind[4], uint32_t version,
	      const void *payload, size_t len, bool durable, struct err *e);

/* Loads the newest copy that checks out; repairs the other one when it does not match (needs a writable store;
 * a repair that fails is not an error, but a newest copy that can't be made durable is). Returns the payload owned
 * (free). Absent in both: -ERR_NOENT. Neither checks out: -ERR_CORRUPT; a version above version_max: -ERR_VERSION; one
 * can't be read and the other may be older: the error of reading it. These name the file and what to do. */
int meta_load(struct storage *s, const char *path, const char kind[4], uint32_t version_max, uint32_t *ret_version,
	      void **ret_payload, size_t *ret_len, struct err *e);

/* Removes both copies, absent ones are fine: that there is none is durable then too. */
int meta_delete(struct storage *s, const char *dir, const char *path, const char kind[4], bool durable, struct err *e);

#endif
