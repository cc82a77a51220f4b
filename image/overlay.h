/* An overlay: blocks of a volume kept beside its disk. Two sparse files: PATH.data holds block b at byte
 * b * BLOCK_SIZE; PATH.map holds for each block one little-endian 32-bit word: 0 = the overlay lacks the block,
 * 1 = it is there but its checksum is not known, else CRC-32C of its BLOCK_SIZE bytes, with a CRC of 0 or 1 stored
 * as 2 (docs/format.md). The word is bit and checksum in one, so neither can be there without the other (I9). The
 * volume's last block may be short: it is padded with zeroes in the data file and for the checksum. A block of zeroes
 * need not be written into PATH.data where that is a hole.
 *
 * Replacing a block that is there (only active overlays and clones do) would, cut off halfway, leave new data under the
 * old checksum. So overlay_put_data first writes 1 as its word, durably (overlay_set_durable), then the data.
 *
 * In memory: which blocks are there (image/held.h). A block's bit is set after its data and its word are written. One
 * that is sealed gets no more bits one by one: what was put into it is published as a whole, by sealing it again.
 *
 * Concurrency: any number of readers and writers; the caller excludes two writers of one block, and a reader of a
 * block against a writer that replaces it (only active overlays and clones replace).
 */
#ifndef REPFS_IMAGE_OVERLAY_H
#define REPFS_IMAGE_OVERLAY_H

#include "core/err.h"
#include "core/range.h"
#include "image/filecache.h"
#include "image/held.h"
#include "image/storage.h"

struct overlay;

/* Makes new empty files (replaces leftovers of the same name). volume_size in bytes. Returns owned. */
int overlay_create(struct storage *s, const char *path, uint64_t volume_size, struct overlay **ret, struct err *e);
/* Opens existing files and loads the bitmap from the map's data extents (cost follows what was saved).
 * Missing or odd files: -ERR_CORRUPT, named. */
int overlay_open(struct storage *s, const char *path, uint64_t volume_size, struct overlay **ret, struct err *e);
void overlay_close(struct overlay *o); /* NULL is fine */
/* o has just been opened from the files of `from`, for a volume that is no smaller: it holds what `from` holds, and not
 * what a put that failed may have left a word of. */
void overlay_take_over(struct overlay *o, const struct overlay *from);
/* For a volume that has grown: what o lacks past its old end is absent. memory: zeroed, of overlay_grow_bytes, taken
 * over. Nobody else uses o meanwhile. */
size_t overlay_grow_bytes(uint64_t volume_size);
void overlay_grow(struct overlay *o, uint64_t volume_size, void *memory);
/* Removes the files of path; absent ones are fine. */
int overlay_unlink(struct storage *s, const char *path);

/* Whether replacing a block syncs its word first: true (the default) for `power`, false for `process`. Before use. */
void overlay_set_durable(struct overlay *o, bool durable);

static inline uint64_t overlay_blocks_in(uint64_t volume_size)
{
	return units_of(volume_size, BLOCK_SHIFT);
}
bool overlay_has(const struct overlay *o, uint64_t block); /* false past the end: the volume may have grown since */
uint64_t overlay_count(const struct overlay *o);	   /* blocks held */
/* Whether its files may show more blocks than it holds when they are opened again: a put of words, or their sync,
 * failed. */
bool overlay_unsure(const struct overlay *o);
const struct held *overlay_held(const struct overlay *o); /* borrowed */
/* It holds what `list` says, which it takes over: all that it held, and perhaps blocks that were put since, whose words
 * are written. The caller excludes all who look at what it holds; what that was is in *old, for held_free. */
void overlay_seal(struct overlay *o, struct held_list *list, struct held *old);
/* Gives its files to a cache, once; path is what it was opened by. The caller excludes all users of the overlay. No
 * I/O; for want of memory they stay as they are. */
void overlay_cache(struct overlay *o, struct filecache *c, struct storage *s, const char *path);

/* One block or part of one, [off, off + len) within block. Reads the whole block and checks its checksum:
 * a mismatch is -ERR_CORRUPT. PRE: overlay_has. */
int overlay_read(struct overlay *o, uint64_t block, uint32_t off, void *buf, uint32_t len);

/* Writing is in three phases so that a batch costs one sync a phase (the caller's order, docs/INVARIANTS.md I9):
 *   overlay_put_data for each block run;  [overlay_sync_data]
 *   overlay_put_map for each block run;   [overlay_sync_map]
 *   overlay_publish for each block run (PRE: not sealed).
 * Runs are n consecutive blocks; data is n * BLOCK_SIZE bytes (last block padded by the caller with zeroes).
 * words (n, host order) are filled by put_data and given to put_map. Blocks at or past the end: -ERR_RANGE. */
int overlay_put_data(struct overlay *o, uint64_t block, uint32_t n, const void *data, uint32_t *words);
int overlay_put_map(struct overlay *o, uint64_t block, uint32_t n, const uint32_t *words);
void overlay_publish(struct overlay *o, uint64_t block, uint32_t n);
/* After an overlay_put_map that failed: words that it may have left of blocks that are not there go again, durably with
 * the next overlay_sync_map. */
int overlay_take_back(struct overlay *o, uint64_t block, uint32_t n);
/* For an overlay that is a disk's own blocks (image/based.h): its data file, borrowed, to be read and written in place,
 * and the word that such blocks have in the map. */
#define OVERLAY_UNCHECKED 1U
struct disk *overlay_data(struct overlay *o);
/* Such a disk has words of its own too (above OVERLAY_UNCHECKED, in place of checksums). The word of a block that is
 * there; fn for each block that had one of them when the files were opened, first to last, an error of it ends that. */
int overlay_get_word(struct overlay *o, uint64_t block, uint32_t *ret);
int overlay_each_marked(struct overlay *o, int (*fn)(void *arg, uint64_t block, uint32_t word), void *arg);
void overlay_forget(struct overlay *o); /* its files' pages, as disk_forget */
int overlay_sync_data(struct overlay *o);
int overlay_sync_map(struct overlay *o);

/* Allocated bytes of both files on the store's filesystem. */
int overlay_allocated(struct overlay *o, uint64_t *ret);

void overlay_check(struct overlay *o); /* map file and bitmap agree; tests */

#endif
