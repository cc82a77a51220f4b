/* The copy engine of backups and exports (image/backup.h).
 *
 * A raw target gets data at its own offsets: of a whole layer only what is not zero, so that it stays sparse; of a
 * selection every block of it, zeroes too, so that its data ranges are the list's. A .zst gets frame after frame, where
 * nothing is a frame of zeroes.
 *
 * Progress that counts is made after a unit was written: a step that failed is the same step again. What a unit's
 * blocks are is looked at anew each time; the source is an image that does not change.
 *
 * Where backup_write gives the ranges, they may be of any bytes: whole blocks go into `have`, what is left of a block
 * into `odd`, an array that is sorted and joined when it is full.
 */
#include "image/backup.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/io.h"
#include "core/os/thread.h"
#include "image/zero.h"
#include "image/zst.h"

/* Content of a raw target copied in a step, in bytes. */
#define RAW_UNIT (UINT64_C(1) << 20)
/* Stretches of holes, or frames of zeroes, passed over in a step. */
#define HOLES_MAX 64U
/* Pieces of blocks that backup_write was given and that are not joined to others: 16 MiB of memory. */
#define ODD_MAX (1U << 20)
#define ODD_MIN 64U

struct backup {
	struct backup_args args;
	struct newfile target, list;
	struct zst_writer *zst; /* NULL: raw */
	uint64_t unit;
	uint8_t *buf;
	bool selected;
	struct bitmap only;
	void *only_memory;
	uint64_t off;		 /* all before it is done, of this selection */
	uint64_t before, picked; /* blocks of earlier selections; of this one, done */
	uint64_t copied;
	struct bitmap have; /* blocks that the list will name */
	void *have_memory;
	struct range *odd;
	size_t n_odd, odd_cap;
};

enum backup_format backup_format_of(const char *path)
{
	size_t n = strlen(path);

	return n >= 4 && strcmp(path + n - 4, ".zst") == 0 ? BACKUP_ZST : BACKUP_RAW;
}

/* ---- opening, closing ---- */

static int no_memory(const struct backup_args *a, struct err *e)
{
	return err_set(e, ERR_NOMEM, "%s %s: out of memory", a->what, a->path);
}

static int open_list(struct backup *b, struct err *e)
{
	char *path = extentlist_path(b->args.path);
	uint64_t blocks = units_of(b->args.size, BLOCK_SHIFT);
	int rc;

	b->have_memory = calloc(1, bitmap_bytes(blocks));
	if (!path || !b->have_memory) {
		free(path);
		return no_memory(&b->args, e);
	}
	bitmap_init(&b->have, blocks, b->have_memory);
	rc = newfile_make(b->args.what, path, b->args.flags, &b->list, e);
	free(path);
	return rc;
}

static int open_target(struct backup *b, struct err *e)
{
	const struct backup_args *a = &b->args;
	int rc = newfile_make(a->what, a->path, a->flags, &b->target, e);

	if (rc == 0 && a->list)
		rc = open_list(b, e);
	if (rc < 0)
		return rc;
	if (a->format == BACKUP_ZST) {
		if (zst_writer_new(b->target.fd, a->size, &b->zst) < 0)
			return no_memory(a, e);
		b->unit = zst_writer_unit(b->zst);
	} else {
		b->unit = RAW_UNIT;
		if (ftruncate(b->target.fd, (off_t)a->size) < 0)
			return err_set(e, -err_from_errno(errno), "%s %s: making it %" PRIu64 " bytes large: %s",
				       a->what, a->path, a->size, strerror(errno));
	}
	b->buf = malloc(b->unit);
	return b->buf ? 0 : no_memory(a, e);
}

int backup_open(const struct backup_args *args, struct backup **ret, struct err *e)
{
	struct backup *b = calloc(1, sizeof(*b));
	int rc;

	if (!b)
		return no_memory(args, e);
	b->args = *args;
	b->args.path = NULL;
	b->target.fd = b->list.fd = -1;
	char *path = strdup(args->path);
	b->args.path = path;
	rc = path ? open_target(b, e) : no_memory(args, e);
	if (rc < 0) {
		backup_close(b);
		return rc;
	}
	*ret = b;
	return 0;
}

void backup_close(struct backup *b)
{
	if (!b)
		return;
	newfile_drop(&b->list);
	newfile_drop(&b->target);
	zst_writer_free(b->zst);
	free(b->buf);
	free(b->only_memory);
	free(b->have_memory);
	free(b->odd);
	free((char *)(uintptr_t)b->args.path);
	free(b);
}

void backup_select(struct backup *b, const struct bitmap *only, void *memory)
{
	PRE(only->nbits <= units_of(b->args.size, BLOCK_SHIFT) || only->count == 0);
	PRE(!b->zst || zst_writer_at(b->zst) == 0);
	b->before += b->picked;
	b->picked = 0;
	free(b->only_memory);
	b->only = *only;
	b->only_memory = memory;
	b->selected = true;
	b->off = 0;
}

/* ---- copying ---- */

static int read_layer(const struct backup *b, uint64_t off, uint64_t len, void *buf)
{
	struct volume *v = b->args.volume;

	switch (b->args.layer) {
	case LAYER_DISK:
		return volume_read_disk(v, off, len, buf);
	case LAYER_VIEW:
		return volume_read_view(v, b->args.ckpt, off, len, buf);
	case LAYER_IMAGE:
		return volume_read_ckpt(v, b->args.ckpt, off, len, buf);
	case LAYER_CLONE:
		return volume_read_clone(v, b->args.ckpt, off, len, buf);
	case LAYER_ACTIVE:
	case LAYER_UNDO:
		return volume_read_overlay(v, b->args.layer, b->args.ckpt, off, len, buf);
	}
	UNREACHABLE();
}

/* The stretch at off that is to be copied (data) or passed over, up to the image's end. */
static int next_stretch(const struct backup *b, uint64_t off, struct extent *ret)
{
	uint64_t size = b->args.size, first, end;
	int rc;

	if (!b->selected) {
		rc = volume_extent(b->args.volume, b->args.layer, b->args.ckpt, off, ret);
		if (rc == 0)
			ret->len = min_u64(ret->len, size - off);
		return rc;
	}
	if (!bitmap_next_run(&b->only, off >> BLOCK_SHIFT, &first, &end)) {
		*ret = (struct extent){off, size - off, false};
		return 0;
	}
	uint64_t from = max_u64(first << BLOCK_SHIFT, off);
	if (from > off)
		*ret = (struct extent){off, min_u64(from, size) - off, false};
	else
		*ret = (struct extent){off, min_u64(end << BLOCK_SHIFT, size) - off, true};
	return 0;
}

static void account(struct backup *b, uint64_t off, uint64_t len)
{
	uint64_t first = off >> BLOCK_SHIFT, n = units_of(off + len, BLOCK_SHIFT) - first;

	if (b->selected)
		b->picked += n;
	if (b->have_memory)
		(void)bitmap_set_range(&b->have, first, n);
}

/* An overlay's data ranges are its blocks (SPEC 4), and a selection's are the list's: zeroes there are data. */
static int write_data(const struct backup *b, uint64_t off, const uint8_t *buf, size_t len)
{
	bool keep_zeroes = b->selected || b->args.layer == LAYER_ACTIVE || b->args.layer == LAYER_UNDO;

	while (len > 0) {
		bool zero = false;
		size_t n = keep_zeroes ? len : zero_run(buf, len, BLOCK_SIZE, &zero);
		int rc = zero ? 0 : io_pwrite(b->target.fd, buf, n, off);

		if (rc < 0)
			return rc;
		off += n;
		buf += n;
		len -= n;
	}
	return 0;
}

static int step_raw(struct backup *b, struct backup_step *ret)
{
	struct extent x;
	int rc;

	for (unsigned i = 0; i < HOLES_MAX && b->off < b->args.size; i++) {
		ret->off = b->off;
		ret->side = BACKUP_SOURCE;
		rc = next_stretch(b, b->off, &x);
		if (rc == 0 && x.data) {
			x.len = min_u64(x.len, b->unit);
			rc = read_layer(b, b->off, x.len, b->buf);
		}
		if (rc < 0)
			return rc;
		if (x.data) {
			ret->side = BACKUP_TARGET;
			rc = write_data(b, b->off, b->buf, (size_t)x.len);
			if (rc < 0)
				return rc;
			account(b, b->off, x.len);
			b->copied += x.len;
			ret->bytes = x.len;
			b->off += x.len;
			break;
		}
		b->off += x.len;
	}
	return b->off < b->args.size;
}

/* The content of one frame into buf; *ret_any: whether any of it is to be copied. */
static int read_frame(struct backup *b, uint64_t off, uint64_t len, uint64_t *ret_any)
{
	uint64_t at = off, any = 0;

	while (at < off + len) {
		struct extent x;
		int rc = next_stretch(b, at, &x);

		if (rc < 0)
			return rc;
		x.len = min_u64(x.len, off + len - at);
		if (x.data) {
			rc = read_layer(b, at, x.len, b->buf + (at - off));
			if (rc < 0)
				return rc;
			any += x.len;
		} else {
			memset(b->buf + (at - off), 0, x.len);
		}
		at += x.len;
	}
	*ret_any = any;
	return 0;
}

/* What of the frame was selected counts, and is listed. */
static void account_frame(struct backup *b, uint64_t off, uint64_t len)
{
	uint64_t first, end, limit = units_of(off + len, BLOCK_SHIFT), at = off >> BLOCK_SHIFT;

	if (!b->selected) {
		account(b, off, len);
		return;
	}
	while (at < limit && bitmap_next_run(&b->only, at, &first, &end) && first < limit) {
		end = min_u64(end, limit);
		account(b, first << BLOCK_SHIFT, min_u64(end << BLOCK_SHIFT, b->args.size) - (first << BLOCK_SHIFT));
		at = end;
	}
}

static int step_zst(struct backup *b, struct backup_step *ret)
{
	uint64_t any = 0;
	int rc;

	for (unsigned i = 0; i < HOLES_MAX && any == 0 && b->off < b->args.size; i++) {
		uint64_t len = min_u64(b->unit, b->args.size - b->off);

		ret->off = b->off;
		ret->side = BACKUP_SOURCE;
		rc = read_frame(b, b->off, len, &any);
		if (rc < 0)
			return rc;
		ret->side = BACKUP_TARGET;
		rc = any && !zero_is(b->buf, len) ? zst_writer_put(b->zst, b->buf, (size_t)len)
						  : zst_writer_put_zeroes(b->zst);
		if (rc < 0)
			return rc;
		if (any)
			account_frame(b, b->off, len);
		b->copied += any;
		ret->bytes = any;
		b->off += len;
	}
	return b->off < b->args.size;
}

int backup_step(struct backup *b, struct backup_step *ret)
{
	*ret = (struct backup_step){.off = b->off};
	PRE(b->args.volume);
	return b->zst ? step_zst(b, ret) : step_raw(b, ret);
}

void backup_progress(const struct backup *b, uint64_t *ret_done, uint64_t *ret_total)
{
	if (!b->selected) {
		*ret_done = b->off;
		*ret_total = b->args.size;
		return;
	}
	*ret_done = (b->before + b->picked) << BLOCK_SHIFT;
	*ret_total = (b->before + b->only.count) << BLOCK_SHIFT;
}

uint64_t backup_copied(const struct backup *b)
{
	return b->copied;
}

/* ---- ranges as they are written ---- */

static int by_offset(const void *x, const void *y)
{
	uint64_t a = ((const struct range *)x)->off, b = ((const struct range *)y)->off;

	return a < b ? -1 : a > b;
}

/* Sorts and joins the odd ranges; those within a block that is there go. */
static void odd_compact(struct backup *b)
{
	size_t n = 0;

	if (b->n_odd == 0)
		return;
	qsort(b->odd, b->n_odd, sizeof(b->odd[0]), by_offset);
	for (size_t i = 0; i < b->n_odd; i++) {
		struct range r = b->odd[i];

		if (bitmap_test(&b->have, r.off >> BLOCK_SHIFT))
			continue; /* it lies in one block */
		if (n && r.off <= range_end(b->odd[n - 1]) &&
		    r.off >> BLOCK_SHIFT == b->odd[n - 1].off >> BLOCK_SHIFT) {
			b->odd[n - 1].len = max_u64(range_end(r), range_end(b->odd[n - 1])) - b->odd[n - 1].off;
			continue;
		}
		b->odd[n++] = r;
	}
	b->n_odd = n;
}

/* Room for two more. */
static int odd_reserve(struct backup *b)
{
	if (b->n_odd + 2 <= b->odd_cap)
		return 0;
	odd_compact(b);
	if (b->n_odd + 2 > b->odd_cap / 2) {
		size_t cap = b->odd_cap ? 2 * b->odd_cap : ODD_MIN;
		struct range *p = cap <= ODD_MAX ? realloc(b->odd, cap * sizeof(*p)) : NULL;

		if (p) {
			b->odd = p;
			b->odd_cap = cap;
		} else if (b->n_odd + 2 > b->odd_cap) {
			return cap <= ODD_MAX ? -ERR_NOMEM : -ERR_LIMIT;
		}
	}
	return 0;
}

static void list_range(struct backup *b, uint64_t off, uint64_t len)
{
	uint64_t end = off + len, first = units_of(off, BLOCK_SHIFT), last = end >> BLOCK_SHIFT;

	if (end == b->args.size)
		last = units_of(end, BLOCK_SHIFT); /* the image's last block may be short */
	if (first < last) {
		(void)bitmap_set_range(&b->have, first, last - first);
		if (off < first << BLOCK_SHIFT)
			b->odd[b->n_odd++] = (struct range){off, (first << BLOCK_SHIFT) - off};
		if (end > last << BLOCK_SHIFT)
			b->odd[b->n_odd++] = (struct range){last << BLOCK_SHIFT, end - (last << BLOCK_SHIFT)};
	} else if (off >> BLOCK_SHIFT == (end - 1) >> BLOCK_SHIFT) {
		b->odd[b->n_odd++] = (struct range){off, len};
	} else { /* the end of one block and the beginning of the next */
		uint64_t middle = first << BLOCK_SHIFT;

		b->odd[b->n_odd++] = (struct range){off, middle - off};
		b->odd[b->n_odd++] = (struct range){middle, end - middle};
	}
}

/* A hole reads as zeroes too, and costs nothing. */
static int zero_target(struct backup *b, uint64_t off, uint64_t len)
{
	int rc = 0;

	if (fallocate(b->target.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len) == 0)
		return 0;
	memset(b->buf, 0, (size_t)min_u64(len, b->unit));
	for (uint64_t at = 0; rc == 0 && at < len; at += b->unit)
		rc = io_pwrite(b->target.fd, b->buf, (size_t)min_u64(len - at, b->unit), off + at);
	return rc;
}

int backup_write(struct backup *b, uint64_t off, uint64_t len, const void *buf)
{
	int rc;

	PRE(!b->zst && b->have_memory && len > 0 && off + len <= b->args.size);
	rc = odd_reserve(b);
	if (rc < 0)
		return rc;
	rc = buf ? io_pwrite(b->target.fd, buf, len, off) : zero_target(b, off, len);
	if (rc < 0)
		return rc;
	list_range(b, off, len);
	b->copied += len;
	return 0;
}

/* ---- the end ---- */

/* The next extent of blocks and odd ranges at or after *at, joined where they touch. *odd: index of the next odd one.
 */
static bool next_listed(const struct backup *b, uint64_t *at, size_t *odd, struct range *ret)
{
	struct range r = {0};

	for (;;) {
		uint64_t first, end, from = r.len ? range_end(r) : *at;
		struct range x = {UINT64_MAX, 0};
		bool is_odd = *odd < b->n_odd;

		if (is_odd)
			x = b->odd[*odd];
		if (bitmap_next_run(&b->have, from >> BLOCK_SHIFT, &first, &end) && first << BLOCK_SHIFT < x.off) {
			x.off = first << BLOCK_SHIFT;
			x.len = min_u64(end << BLOCK_SHIFT, b->args.size) - x.off;
			is_odd = false;
		}
		if (x.len == 0 || (r.len && x.off > range_end(r)))
			break;
		*odd += is_odd;
		if (r.len)
			r.len = max_u64(range_end(r), range_end(x)) - r.off;
		else
			r = x;
		if (!is_odd && range_end(r) == b->args.size)
			break;
	}
	if (r.len == 0)
		return false;
	*at = range_end(r);
	*ret = r;
	return true;
}

static int put_list(struct backup *b, FILE *f, struct extentlist_head *h)
{
	struct range r;
	uint64_t at = 0;
	size_t odd = 0;
	int rc;

	h->size = b->args.size;
	(void)snprintf(h->target, sizeof(h->target), "%s", b->zst ? "zst" : "raw");
	h->count = h->bytes = 0;
	while (at < b->args.size && next_listed(b, &at, &odd, &r)) {
		h->count++;
		h->bytes += r.len;
	}
	rc = extentlist_put_head(f, h);
	at = 0;
	odd = 0;
	while (rc == 0 && at < b->args.size && next_listed(b, &at, &odd, &r))
		rc = extentlist_put(f, r.off, r.len);
	return rc;
}

static int finish_list(struct backup *b, struct extentlist_head *h, struct err *e)
{
	int fd = dup(b->list.fd), rc = 0;
	FILE *f = fd < 0 ? NULL : fdopen(fd, "w");

	if (!f) {
		if (fd >= 0)
			(void)close(fd);
		return no_memory(&b->args, e);
	}
	if (b->n_odd)
		odd_compact(b);
	rc = put_list(b, f, h);
	if (fflush(f) != 0 && rc == 0)
		rc = err_from_errno(errno);
	if (fclose(f) != 0 && rc == 0)
		rc = err_from_errno(errno);
	if (rc < 0)
		return err_set(e, -rc, "%s %s: writing its list of extents: %s", b->args.what, b->args.path,
			       err_short(rc));
	return newfile_commit(&b->list, e);
}

int backup_finish(struct backup *b, struct extentlist_head *about, struct err *e)
{
	int rc = b->zst ? zst_writer_end(b->zst) : 0;

	if (rc < 0)
		return err_set(e, -rc, "%s %s: writing its table of frames: %s", b->args.what, b->args.path,
			       err_short(rc));
	if (b->args.list) {
		PRE(about);
		rc = finish_list(b, about, e);
		if (rc < 0)
			return rc;
	}
	rc = newfile_commit(&b->target, e);
	if (rc < 0 && b->args.list) {
		char *path = extentlist_path(b->args.path);

		if (path)
			(void)unlink(path);
		free(path);
	}
	return rc;
}
