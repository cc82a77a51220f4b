/* The seekable zstd format (docs/format.md): independent frames of one content size, the last one shorter, and behind
 * them a table of their sizes in a skippable frame. `zstd -d` reads it as any other .zst; with the table one frame can
 * be found and read without those before it.
 */
#ifndef REPFS_IMAGE_ZST_H
#define REPFS_IMAGE_ZST_H

#include "core/err.h"
#include "image/storage.h"

/* A frame's content when written: 1 MiB, and more for volumes of which that would be too many frames; a power of 2. */
#define ZST_FRAME_SIZE (UINT64_C(1) << 20)
#define ZST_FRAMES_WRITE_MAX (UINT64_C(1) << 20)
/* What is read: content of one frame, and how many there may be. A frame is in memory whole, the table too. */
#define ZST_FRAME_MAX (UINT64_C(128) << 20)
#define ZST_FRAMES_MAX (UINT64_C(1) << 22)
#define ZST_LEVEL 3

/* ---- writing ---- */

struct zst_writer;
/* To fd from its beginning, of `size` bytes of content in all. fd is borrowed. */
int zst_writer_new(int fd, uint64_t size, struct zst_writer **ret);
void zst_writer_free(struct zst_writer *w);
uint64_t zst_writer_unit(const struct zst_writer *w); /* content of a frame, in bytes */
uint64_t zst_writer_at(const struct zst_writer *w);   /* content so far */
/* The next frame: the unit, or what is left of the size. A failure leaves it to be put again. */
int zst_writer_put(struct zst_writer *w, const void *buf, size_t len);
int zst_writer_put_zeroes(struct zst_writer *w);
/* The table; all content has been put. May be repeated after a failure. */
int zst_writer_end(struct zst_writer *w);

/* ---- reading ---- */

/* Whether a file that begins with these bytes is meant to be zstd's. */
bool zst_magic(const uint8_t head[4]);
/* The content of a file as a disk that can only be read; thread-safe. Frames are checked against their checksums as
 * they are read, a frame that does not check out is -ERR_CORRUPT. Whole frames of zeroes are holes. `file` is taken
 * over, on failure too; name: for messages ("NAME: ..."). A file without a table is -ERR_NOTSUP. */
int disk_zst_open(struct disk *file, const char *name, struct disk **ret, struct err *e);

#endif
