/* The seekable zstd format, written and read with the zstd library; the table is ours.
 *
 *   frame 0 | frame 1 | ... | skippable frame: magic 0x184D2A5E, length, then for each frame u32 compressed size, u32
 *   content size; u32 number of frames, u8 descriptor (bit 7: entries have a u32 checksum behind; bits 2 to 6
 *   reserved, 0), u32 magic 0x8F92EAB1
 *
 * All little-endian. Frames carry their content size and zstd's own checksum (XXH64) of it, so the table needs none.
 *
 * Reading trusts nothing: the table's length has to fit its count, the sizes have to add up to where the table begins,
 * every content size has to be within ZST_FRAME_MAX, and a frame has to decompress to exactly that much. Memory follows
 * the largest frame and the table, both limited. The decompressed frame is kept: reads of a copy are sequential, and
 * each frame is decompressed once.
 *
 * A frame of zeroes is found by its content; as most of an image's zero frames are the same bytes, one that equals the
 * last zero frame is not decompressed again.
 */
#include "image/zst.h"

#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/io.h"
#include "core/os/thread.h"
#include "core/range.h"
#include "image/zero.h"

#define TABLE_MAGIC 0x184D2A5EU
#define FOOTER_MAGIC 0x8F92EAB1U
#define HEADER_SIZE 8U
#define FOOTER_SIZE 9U
#define ENTRY_SIZE 8U
#define DESCRIPTOR_CHECKSUM 0x80U
#define DESCRIPTOR_RESERVED 0x7CU
/* Of the table, read and written at a time. */
#define TABLE_PIECE (64U << 10)
/* A zero frame that is compared: zstd needs 4 bytes for each 128 KiB. */
#define ZERO_FRAME_MAX (16U << 10)

/* ---- writing ---- */

struct zst_writer {
	int fd;
	ZSTD_CCtx *ctx;
	uint64_t size, unit, at; /* content */
	uint64_t file_at;
	uint8_t *buf; /* a compressed frame */
	size_t cap;
	uint8_t *zero; /* the frame of `zero_len` zeroes, compressed; 0: not made yet */
	size_t zero_size;
	uint64_t zero_len;
	uint32_t *sizes; /* compressed */
	uint64_t n, n_cap;
};

int zst_writer_new(int fd, uint64_t size, struct zst_writer **ret)
{
	struct zst_writer *w = calloc(1, sizeof(*w));

	PRE(size > 0 && size <= VOLUME_SIZE_MAX);
	if (!w)
		return -ERR_NOMEM;
	w->fd = fd;
	w->size = size;
	w->unit = ZST_FRAME_SIZE;
	while ((size + w->unit - 1) / w->unit > ZST_FRAMES_WRITE_MAX)
		w->unit *= 2;
	INVARIANT(w->unit <= ZST_FRAME_MAX);
	w->cap = ZSTD_compressBound(w->unit);
	w->buf = malloc(w->cap);
	w->zero = malloc(ZERO_FRAME_MAX);
	w->n_cap = (size + w->unit - 1) / w->unit;
	w->sizes = calloc(w->n_cap, sizeof(*w->sizes));
	w->ctx = ZSTD_createCCtx();
	if (!w->buf || !w->zero || !w->sizes || !w->ctx ||
	    ZSTD_isError(ZSTD_CCtx_setParameter(w->ctx, ZSTD_c_checksumFlag, 1)) ||
	    ZSTD_isError(ZSTD_CCtx_setParameter(w->ctx, ZSTD_c_compressionLevel, ZST_LEVEL))) {
		zst_writer_free(w);
		return -ERR_NOMEM;
	}
	*ret = w;
	return 0;
}

void zst_writer_free(struct zst_writer *w)
{
	if (!w)
		return;
	(void)ZSTD_freeCCtx(w->ctx);
	free(w->sizes);
	free(w->zero);
	free(w->buf);
	free(w);
}

uint64_t zst_writer_unit(const struct zst_writer *w)
{
	return w->unit;
}

uint64_t zst_writer_at(const struct zst_writer *w)
{
	return w->at;
}

/* A frame counts once it is written whole. */
static int put_frame(struct zst_writer *w, const void *frame, size_t frame_size, uint64_t len)
{
	int rc = io_pwrite(w->fd, frame, frame_size, w->file_at);

	if (rc < 0)
		return rc;
	INVARIANT(w->n < w->n_cap && frame_size <= UINT32_MAX);
	w->sizes[w->n++] = (uint32_t)frame_size;
	w->file_at += frame_size;
	w->at += len;
	return 0;
}

int zst_writer_put(struct zst_writer *w, const void *buf, size_t len)
{
	size_t n;

	PRE(len > 0 && len == min_u64(w->unit, w->size - w->at));
	n = ZSTD_compress2(w->ctx, w->buf, w->cap, buf, len);
	if (ZSTD_isError(n)) /* its only cause with a buffer of the bound's size */
		return -ERR_NOMEM;
	return put_frame(w, w->buf, n, len);
}

int zst_writer_put_zeroes(struct zst_writer *w)
{
	uint64_t len = min_u64(w->unit, w->size - w->at);

	PRE(len > 0);
	if (w->zero_len != len) {
		uint8_t *zeroes = calloc(1, len);
		size_t n = zeroes ? ZSTD_compress2(w->ctx, w->buf, w->cap, zeroes, len) : 0;

		free(zeroes);
		if (n == 0 || ZSTD_isError(n))
			return -ERR_NOMEM;
		if (n > ZERO_FRAME_MAX)
			return put_frame(w, w->buf, n, len);
		memcpy(w->zero, w->buf, n);
		w->zero_size = n;
		w->zero_len = len;
	}
	return put_frame(w, w->zero, w->zero_size, len);
}

int zst_writer_end(struct zst_writer *w)
{
	uint8_t piece[TABLE_PIECE], *p = piece;
	uint64_t at = w->file_at;
	int rc = 0;

	PRE(w->at == w->size);
	put_u32(p, TABLE_MAGIC);
	put_u32(p + 4, (uint32_t)(w->n * ENTRY_SIZE + FOOTER_SIZE));
	p += HEADER_SIZE;
	for (uint64_t i = 0; rc == 0 && i < w->n; i++) {
		put_u32(p, w->sizes[i]);
		put_u32(p + 4, (uint32_t)min_u64(w->unit, w->size - i * w->unit));
		p += ENTRY_SIZE;
		if ((size_t)(p - piece) + ENTRY_SIZE + FOOTER_SIZE > sizeof(piece)) {
			rc = io_pwrite(w->fd, piece, (size_t)(p - piece), at);
			at += (uint64_t)(p - piece);
			p = piece;
		}
	}
	put_u32(p, (uint32_t)w->n);
	p[4] = 0;
	put_u32(p + 5, FOOTER_MAGIC);
	return rc < 0 ? rc : io_pwrite(w->fd, piece, (size_t)(p - piece) + FOOTER_SIZE, at);
}

/* ---- reading ---- */

struct frame {
	uint64_t content, file; /* where they begin */
};

struct zst_disk {
	struct disk disk;
	struct disk *file;
	uint64_t size;
	struct frame *frames; /* n + 1: the last one is the end */
	uint64_t n;
	struct mutex lock; /* what follows; held across I/O: one frame at a time */
	ZSTD_DCtx *ctx;
	uint8_t *in, *out; /* as large as the largest frame needs */
	uint64_t cached;   /* whose content is in `out`; n: none */
	uint64_t zero;	   /* one that is known to be zeroes; n: none */
	uint8_t *zero_frame;
	size_t zero_size;
};

static struct zst_disk *zst_disk(struct disk *d)
{
	return CONTAINER_OF(d, struct zst_disk, disk);
}

bool zst_magic(const uint8_t head[4])
{
	uint32_t m = get_u32(head);

	return m == 0xFD2FB528U || (m & 0xFFFFFFF0U) == 0x184D2A50U;
}

static uint64_t content_of(const struct zst_disk *z, uint64_t i)
{
	return z->frames[i + 1].content - z->frames[i].content;
}

static uint64_t file_of(const struct zst_disk *z, uint64_t i)
{
	return z->frames[i + 1].file - z->frames[i].file;
}

/* The frame that holds off < size. */
static uint64_t find_frame(const struct zst_disk *z, uint64_t off)
{
	uint64_t low = 0, high = z->n;

	while (high - low > 1) {
		uint64_t mid = low + (high - low) / 2;

		if (z->frames[mid].content <= off)
			low = mid;
		else
			high = mid;
	}
	return low;
}

/* Frame i's bytes into `in`. */
static int fetch(struct zst_disk *z, uint64_t i) REQUIRES(z->lock)
{
	return disk_read(z->file, z->frames[i].file, z->in, (size_t)file_of(z, i));
}

/* Frame i's content into `out`. */
static int load(struct zst_disk *z, uint64_t i) REQUIRES(z->lock)
{
	uint64_t len = content_of(z, i);
	int rc;
	size_t n;

	if (z->cached == i)
		return 0;
	rc = fetch(z, i);
	if (rc < 0)
		return rc;
	z->cached = z->n;
	unsigned long long said = ZSTD_getFrameContentSize(z->in, file_of(z, i));
	/* `out` is as large as the table says; a frame need not say it, and must not say otherwise. */
	if ((said != len && said != ZSTD_CONTENTSIZE_UNKNOWN) ||
	    ZSTD_findFrameCompressedSize(z->in, file_of(z, i)) != file_of(z, i))
		return -ERR_CORRUPT;
	n = ZSTD_decompressDCtx(z->ctx, z->out, len, z->in, file_of(z, i));
	if (ZSTD_isError(n) || n != len)
		return -ERR_CORRUPT;
	z->cached = i;
	return 0;
}

static int is_zero(struct zst_disk *z, uint64_t i, bool *ret) REQUIRES(z->lock)
{
	uint64_t len = content_of(z, i), size = file_of(z, i);
	int rc;

	if (z->zero < z->n && z->cached != i && z->zero_size == size && content_of(z, z->zero) == len) {
		rc = fetch(z, i);
		if (rc < 0)
			return rc;
		if (memcmp(z->in, z->zero_frame, size) == 0) {
			*ret = true;
			return 0;
		}
	}
	rc = load(z, i);
	if (rc < 0)
		return rc;
	*ret = zero_is(z->out, len);
	if (*ret && size <= ZERO_FRAME_MAX && z->zero != i && (rc = fetch(z, i)) == 0) {
		memcpy(z->zero_frame, z->in, size);
		z->zero_size = size;
		z->zero = i;
	}
	return rc;
}

static int zst_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	struct zst_disk *z = zst_disk(d);
	uint8_t *to = buf;
	int rc = 0;

	mutex_lock(&z->lock);
	while (rc == 0 && len > 0 && off < z->size) {
		uint64_t i = find_frame(z, off), skip = off - z->frames[i].content;
		size_t n = (size_t)min_u64(len, content_of(z, i) - skip);

		rc = load(z, i);
		if (rc == 0)
			memcpy(to, z->out + skip, n);
		to += n;
		off += n;
		len -= n;
	}
	mutex_unlock(&z->lock);
	if (rc == 0)
		memset(to, 0, len);
	return rc;
}

static int zst_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	struct zst_disk *z = zst_disk(d);
	bool zero = true;
	uint64_t i;
	int rc;

	if (off >= z->size) {
		*ret = (struct extent){off, end - off, false};
		return 0;
	}
	i = find_frame(z, off);
	mutex_lock(&z->lock);
	rc = is_zero(z, i, &zero);
	mutex_unlock(&z->lock);
	if (rc == 0)
		*ret = (struct extent){off, min_u64(end, z->frames[i + 1].content) - off, !zero};
	return rc;
}

static int zst_get_size(struct disk *d, uint64_t *ret)
{
	*ret = zst_disk(d)->size;
	return 0;
}

static int zst_allocated(struct disk *d, uint64_t *ret)
{
	return disk_allocated(zst_disk(d)->file, ret);
}

static int zst_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	(void)d;
	(void)off;
	(void)buf;
	(void)len;
	return -ERR_PERM;
}

static int zst_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	(void)d;
	(void)off;
	(void)len;
	(void)punch;
	return -ERR_PERM;
}

static int zst_set_size(struct disk *d, uint64_t size)
{
	(void)d;
	(void)size;
	return -ERR_PERM;
}

static int zst_sync(struct disk *d)
{
	(void)d;
	return 0;
}

static void zst_close(struct disk *d)
{
	struct zst_disk *z = zst_disk(d);

	(void)ZSTD_freeDCtx(z->ctx);
	free(z->zero_frame);
	free(z->out);
	free(z->in);
	free(z->frames);
	mutex_destroy(&z->lock);
	disk_close(z->file);
	free(z);
}

static const struct disk_ops zst_ops = {
    .read = zst_read,
    .write = zst_write,
    .zero = zst_zero,
    .extent = zst_extent,
    .sync = zst_sync,
    .set_size = zst_set_size,
    .get_size = zst_get_size,
    .allocated = zst_allocated,
    .close = zst_close,
};

/* The table of n entries of `entry` bytes each, from byte `at` of the file, into z->frames. */
static int read_table(struct zst_disk *z, uint64_t at, uint64_t n, unsigned entry, const char *name, struct err *e)
{
	uint8_t piece[TABLE_PIECE / 12 * 12];
	uint64_t content = 0, file = 0, largest = 0, largest_file = 0, per_piece = sizeof(piece) / entry;
	uint64_t table = at - HEADER_SIZE;

	z->frames = calloc(n + 1, sizeof(*z->frames));
	if (!z->frames)
		return err_set(e, ERR_NOMEM, "%s: out of memory for its table of %llu frames", name,
			       (unsigned long long)n);
	for (uint64_t i = 0; i < n; i++) {
		const uint8_t *p = piece + i % per_piece * entry;

		if (i % per_piece == 0) {
			int rc =
			    disk_read(z->file, at + i * entry, piece, (size_t)min_u64(sizeof(piece), (n - i) * entry));

			if (rc < 0)
				return err_set(e, -rc, "%s: reading its table of frames: %s", name, err_short(rc));
		}
		z->frames[i] = (struct frame){content, file};
		if (get_u32(p + 4) > ZST_FRAME_MAX || get_u32(p) > ZSTD_COMPRESSBOUND(ZST_FRAME_MAX))
			return err_set(e, ERR_LIMIT, "%s: a frame of it holds %u bytes, and %llu can be read at most",
				       name, get_u32(p + 4), (unsigned long long)ZST_FRAME_MAX);
		/* Nobody writes an empty frame; one that claims to be would take its content away unnoticed. */
		if (get_u32(p) == 0 || get_u32(p + 4) == 0)
			return err_set(e, ERR_CORRUPT, "%s: its table of frames has an empty one: the file was changed",
				       name);
		file += get_u32(p);
		content += get_u32(p + 4);
		largest = max_u64(largest, get_u32(p + 4));
		largest_file = max_u64(largest_file, get_u32(p));
	}
	z->frames[n] = (struct frame){content, file};
	if (file != table || content == 0)
		return err_set(e, ERR_CORRUPT,
			       "%s: its table of frames does not fit the file: it was cut off or changed; use another "
			       "copy",
			       name);
	z->n = z->cached = z->zero = n;
	z->size = content;
	z->in = malloc(largest_file ? largest_file : 1);
	z->out = malloc(largest ? largest : 1);
	z->zero_frame = malloc(ZERO_FRAME_MAX);
	z->ctx = ZSTD_createDCtx();
	if (!z->in || !z->out || !z->zero_frame || !z->ctx)
		return err_set(e, ERR_NOMEM, "%s: out of memory for a frame of %llu bytes", name,
			       (unsigned long long)largest);
	return 0;
}

static int find_table(struct zst_disk *z, const char *name, struct err *e)
{
	uint8_t foot[FOOTER_SIZE] = {0}, head[HEADER_SIZE];
	uint64_t file_size, n, body;
	int rc = disk_get_size(z->file, &file_size);

	if (rc == 0 && file_size >= FOOTER_SIZE + HEADER_SIZE)
		rc = disk_read(z->file, file_size - FOOTER_SIZE, foot, sizeof(foot));
	if (rc < 0)
		return err_set(e, -rc, "%s: reading it: %s", name, err_short(rc));
	if (get_u32(foot + 5) != FOOTER_MAGIC)
		return err_set(e, ERR_NOTSUP,
			       "%s: it is zstd's, but not seekable (no table of frames at its end), or it was cut off; "
			       "decompress it with zstd -d and take what comes out",
			       name);
	unsigned entry = foot[4] & DESCRIPTOR_CHECKSUM ? ENTRY_SIZE + 4 : ENTRY_SIZE;
	n = get_u32(foot);
	body = n * entry + FOOTER_SIZE;
	if (foot[4] & DESCRIPTOR_RESERVED)
		return err_set(e, ERR_NOTSUP, "%s: its table of frames is of a newer kind; decompress it with zstd -d",
			       name);
	if (n > ZST_FRAMES_MAX)
		return err_set(e, ERR_LIMIT, "%s: it has %llu frames, and %llu can be read at most", name,
			       (unsigned long long)n, (unsigned long long)ZST_FRAMES_MAX);
	if (body + HEADER_SIZE <= file_size) {
		rc = disk_read(z->file, file_size - body - HEADER_SIZE, head, sizeof(head));
		if (rc < 0)
			return err_set(e, -rc, "%s: reading it: %s", name, err_short(rc));
	}
	if (body + HEADER_SIZE > file_size || get_u32(head) != TABLE_MAGIC || get_u32(head + 4) != body)
		return err_set(e, ERR_CORRUPT,
			       "%s: its table of frames does not check out: the file was cut off or changed; use "
			       "another copy",
			       name);
	return read_table(z, file_size - body, n, entry, name, e);
}

int disk_zst_open(struct disk *file, const char *name, struct disk **ret, struct err *e)
{
	struct zst_disk *z = calloc(1, sizeof(*z));
	int rc;

	if (!z) {
		disk_close(file);
		return err_set(e, ERR_NOMEM, "%s: out of memory", name);
	}
	z->disk.ops = &zst_ops;
	z->file = file;
	mutex_init(&z->lock);
	rc = find_table(z, name, e);
	if (rc < 0) {
		zst_close(&z->disk);
		return rc;
	}
	*ret = &z->disk;
	return 0;
}
