/* A disk over a read-only base (image/based.h).
 *
 * A write goes over its blocks in runs of own ones and others. First the data of all runs: own ones in place, others
 * whole, their ends completed from the base. Then, if there were others, one sync of own.data (shared with whoever
 * else is at that point: the first to come syncs for all who wait) and their words and bits. A reader that looks at a
 * bit before it is set reads the base: the old content, as of a write in progress.
 *
 * What a write that was cut off left in own.data under no word means nothing: whoever makes the block own writes all of
 * it, or punches it.
 *
 * Locks: own_lock shared by all that use `own`, exclusive while it is replaced by one for a larger size; under it the
 * sync's mutex, never held across I/O.
 */
#include "image/based.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/thread.h"
#include "core/range.h"
#include "image/meta.h"
#include "image/overlay.h"
#include "image/volume_internal.h"

#define BASE_KIND "BASE"
#define BASE_VERSION 1
#define BASE_RECORD_MAX (SOURCE_FILES_MAX * (SOURCE_PATH_MAX + 64U) + SOURCE_PATH_MAX + 64U)
/* Neighbours of one kind joined into one extent, at most. */
#define JOINS_MAX 64U

struct record {
	uint64_t size; /* of the base's disk */
	char backing_dir[SOURCE_PATH_MAX];
	uint32_t n_files;
	struct source_file files[SOURCE_FILES_MAX]; /* [0].path: as it was named */
};

struct based {
	struct disk disk;
	struct storage *storage;
	char path[VOLUME_PATH_SIZE]; /* of `own` */
	bool durable;
	uint64_t size;
	struct source *base;
	char *named; /* the base's path as it was named */
	pthread_rwlock_t own_lock;
	struct overlay *own;
	struct {
		struct mutex lock;
		struct cond cond;
		uint64_t asked, done;
		bool running;
	} sync;
};

static const struct disk_ops based_ops;

static struct based *based_of(struct disk *d)
{
	return CONTAINER_OF(d, struct based, disk);
}

static void check_zero(int r)
{
	INVARIANT(r == 0);
}

static void own_shared(struct based *b)
{
	check_zero(pthread_rwlock_rdlock(&b->own_lock));
}

static void own_unlock(struct based *b)
{
	check_zero(pthread_rwlock_unlock(&b->own_lock));
}

/* ---- the record ---- */

static void file_path(const char *volume, const char *file, char out[VOLUME_PATH_SIZE])
{
	volume_path(volume, file, out);
}

static int format_code(const char *name)
{
	return strcmp(name, "raw") == 0 ? 0 : strcmp(name, "qcow") == 0 ? 1 : 2;
}

static const char *format_of_code(unsigned code)
{
	static const char *const names[] = {"raw", "qcow", "qcow2"};

	return code < ARRAY_LEN(names) ? names[code] : NULL;
}

static int record_encode(const struct record *r, uint8_t *buf)
{
	struct wbuf w = {.data = buf, .size = BASE_RECORD_MAX};

	wbuf_u64(&w, r->size);
	wbuf_str(&w, r->backing_dir);
	wbuf_u32(&w, r->n_files);
	for (uint32_t i = 0; i < r->n_files; i++) {
		const struct source_file *f = &r->files[i];

		wbuf_str(&w, f->path);
		wbuf_u8(&w, (uint8_t)format_code(f->format));
		wbuf_u64(&w, f->size);
		wbuf_u64(&w, f->mtime_ns);
		wbuf_u32(&w, f->crc);
	}
	return w.failed ? -ERR_LIMIT : (int)w.len;
}

static int record_decode(struct record *r, const uint8_t *buf, size_t len)
{
	struct rbuf in = {.data = buf, .size = len};

	memset(r, 0, sizeof(*r));
	r->size = rbuf_u64(&in);
	rbuf_str(&in, r->backing_dir, sizeof(r->backing_dir));
	r->n_files = rbuf_u32(&in);
	if (r->n_files == 0 || r->n_files > SOURCE_FILES_MAX)
		return -ERR_CORRUPT;
	for (uint32_t i = 0; i < r->n_files && !in.failed; i++) {
		struct source_file *f = &r->files[i];

		rbuf_str(&in, f->path, sizeof(f->path));
		f->format = format_of_code(rbuf_u8(&in));
		f->size = rbuf_u64(&in);
		f->mtime_ns = rbuf_u64(&in);
		f->crc = rbuf_u32(&in);
		if (!f->format || f->path[0] != '/')
			return -ERR_CORRUPT;
	}
	if (in.failed || in.pos != len || r->size == 0 || r->size % SECTOR_SIZE != 0 || r->size > VOLUME_SIZE_MAX)
		return -ERR_CORRUPT;
	return 0;
}

/* Returns owned. */
static int record_load(struct storage *s, const char *volume, struct record **ret, struct err *e)
{
	_cleanup_free_ struct record *r = malloc(sizeof(*r));
	_cleanup_free_ void *payload = NULL;
	char path[VOLUME_PATH_SIZE];
	uint32_t version;
	size_t len;
	int rc;

	if (!r)
		return err_set(e, ERR_NOMEM, "open volume %s: %s", volume, err_short(ERR_NOMEM));
	file_path(volume, "base", path);
	rc = meta_load(s, path, BASE_KIND, BASE_VERSION, &version, &payload, &len, e);
	if (rc < 0)
		return rc;
	if (version != BASE_VERSION || record_decode(r, payload, len) < 0)
		return err_set(
		    e, ERR_CORRUPT,
		    "open volume %s: %s.a and .b check out, but hold no record of a base image; put them back "
		    "from a backup",
		    volume, path);
	*ret = TAKE_PTR(r);
	return 0;
}

/* ---- the base ---- */

static int base_changed(const char *volume, const struct source_file *was, const struct source_file *is, struct err *e)
{
	if (was->size == is->size && was->crc == is->crc && format_code(was->format) == format_code(is->format))
		return err_set(
		    e, ERR_STATE,
		    "open volume %s: %.150s, of its base image, was changed since the volume was made: it has "
		    "another time of change. Put the file back as it was; if it surely holds the same, give it its "
		    "time back: touch -d @%" PRIu64 ".%09" PRIu64 " %.150s",
		    volume, is->path, was->mtime_ns / 1000000000, was->mtime_ns % 1000000000, is->path);
	return err_set(
	    e, ERR_STATE,
	    "open volume %s: %.200s, of its base image, is not what it was when the volume was made (%s); put "
	    "the file back as it was",
	    volume, is->path,
	    was->size != is->size ? "it has another size"
	    : was->crc != is->crc ? "its content differs"
				  : "it has another format");
}

/* Every file has to be what it was. Where a backing file lies may have changed, with the links that lead there. */
static int open_base(const char *volume, const struct record *r, struct source **ret, struct err *e)
{
	struct source *base;
	struct err why = {0};
	int rc =
	    source_open(r->files[0].path, r->files[0].format, r->backing_dir[0] ? r->backing_dir : NULL, &base, &why);

	if (rc == -ERR_NOMEM)
		return err_set(e, ERR_NOMEM, "open volume %s: %s", volume, err_short(ERR_NOMEM));
	if (rc < 0)
		return err_set(
		    e, ERR_STATE,
		    "open volume %s: its base image can't be used: %.300s; put the file back and start again", volume,
		    why.text);
	rc = 0;
	for (uint32_t i = 0; rc == 0 && i < r->n_files && i < base->n_files; i++) {
		const struct source_file *was = &r->files[i], *is = &base->files[i];

		if (was->size != is->size || was->mtime_ns != is->mtime_ns || was->crc != is->crc ||
		    format_code(was->format) != format_code(is->format))
			rc = base_changed(volume, was, is, e);
	}
	if (rc == 0 && (r->n_files != base->n_files || r->size != base->size))
		rc = err_set(
		    e, ERR_STATE,
		    "open volume %s: its base image %.200s is not what it was when the volume was made: it has other "
		    "backing files or another size; put it back as it was",
		    volume, r->files[0].path);
	if (rc < 0) {
		source_close(base);
		return rc;
	}
	*ret = base;
	return 0;
}

/* ---- making, opening ---- */

int based_create(struct storage *s, const char *volume, uint64_t size, const struct based_args *a, bool durable,
		 struct err *e)
{
	_cleanup_free_ struct record *r = calloc(1, sizeof(*r));
	_cleanup_free_ uint8_t *buf = malloc(BASE_RECORD_MAX);
	char path[VOLUME_PATH_SIZE], folder[VOLUME_PATH_SIZE];
	struct overlay *own;
	int rc, n;

	PRE(size >= a->source->size && a->path[0] == '/');
	if (!r || !buf)
		return err_set(e, ERR_NOMEM, "create volume %s: %s", volume, err_short(ERR_NOMEM));
	file_path(volume, "own", path);
	rc = overlay_create(s, path, size, &own, e);
	if (rc < 0)
		return rc;
	overlay_close(own);
	r->size = a->source->size;
	r->n_files = a->source->n_files;
	memcpy(r->files, a->source->files, sizeof(r->files));
	n = snprintf(r->files[0].path, sizeof(r->files[0].path), "%s", a->path);
	if (n >= 0 && n < (int)sizeof(r->files[0].path))
		n = snprintf(r->backing_dir, sizeof(r->backing_dir), "%s", a->backing_dir ? a->backing_dir : "");
	if (n < 0 || n >= (int)sizeof(r->backing_dir) || (n = record_encode(r, buf)) < 0)
		return err_set(e, ERR_LIMIT, "create volume %s: the paths of its base image are too long", volume);
	file_path(volume, "base", path);
	file_path(volume, "", folder);
	return meta_save(s, folder, path, BASE_KIND, BASE_VERSION, buf, (size_t)n, durable, e);
}

static void based_close(struct disk *d)
{
	struct based *b = based_of(d);

	overlay_close(b->own);
	source_close(b->base);
	free(b->named);
	check_zero(pthread_rwlock_destroy(&b->own_lock));
	mutex_destroy(&b->sync.lock);
	cond_destroy(&b->sync.cond);
	free(b);
}

static int open_parts(struct based *b, const char *volume, struct err *e)
{
	_cleanup_free_ struct record *r = NULL;
	int rc = record_load(b->storage, volume, &r, e);

	if (rc < 0)
		return rc;
	if (b->size < r->size)
		return err_set(
		    e, ERR_CORRUPT,
		    "open volume %s: it has %" PRIu64 " bytes and its base image %" PRIu64
		    ", which is more than it can have: the records of group and volume don't belong together",
		    volume, b->size, r->size);
	b->named = strdup(r->files[0].path);
	if (!b->named)
		return err_set(e, ERR_NOMEM, "open volume %s: %s", volume, err_short(ERR_NOMEM));
	rc = open_base(volume, r, &b->base, e);
	/* A word that is there may never have reached the medium: its process was killed before a sync. Its block is
	 * own from here on; whoever relies on that syncs both files, as for anything written. */
	return rc < 0 ? rc : overlay_open(b->storage, b->path, b->size, &b->own, e);
}

int based_open(struct storage *s, const char *volume, uint64_t size, bool durable, struct disk **ret, struct err *e)
{
	struct based *b = calloc(1, sizeof(*b));
	int rc;

	if (!b)
		return err_set(e, ERR_NOMEM, "open volume %s: %s", volume, err_short(ERR_NOMEM));
	b->disk.ops = &based_ops;
	b->storage = s;
	b->durable = durable;
	b->size = size;
	file_path(volume, "own", b->path);
	volume_rwlock_init(&b->own_lock);
	mutex_init(&b->sync.lock);
	cond_init(&b->sync.cond);
	rc = open_parts(b, volume, e);
	if (rc < 0) {
		based_close(&b->disk);
		return rc;
	}
	*ret = &b->disk;
	return 0;
}

bool based_is(const struct disk *d)
{
	return d->ops == &based_ops;
}

const char *based_path(struct disk *d, const char **ret_format)
{
	const struct based *b = based_of(d);

	PRE(based_is(d));
	*ret_format = b->base->format;
	return b->named;
}

int based_check(struct disk *d, struct err *e)
{
	return source_check(based_of(d)->base, e);
}

void based_own(struct disk *d, struct bitmap *ret)
{
	struct based *b = based_of(d);
	uint64_t at, end = 0;

	own_shared(b);
	while (bitmap_next_run(&overlay_held(b->own)->bits, end, &at, &end) && at < ret->nbits)
		bitmap_set_range(ret, at, min_u64(end, ret->nbits) - at);
	own_unlock(b);
}

int based_look(struct storage *s, const char *volume, char *path, const char **ret_format, struct err *e)
{
	_cleanup_free_ struct record *r = NULL;
	int rc = record_load(s, volume, &r, e);

	if (rc < 0)
		return rc;
	(void)snprintf(path, SOURCE_PATH_MAX, "%s", r->files[0].path);
	*ret_format = r->files[0].format;
	return 0;
}

int based_own_allocated(struct storage *s, const char *volume, uint64_t *ret)
{
	static const char *const files[] = {"own.data", "own.map"};
	uint64_t total = 0;
	int rc = 0;

	for (size_t i = 0; rc == 0 && i < ARRAY_LEN(files); i++) {
		char path[VOLUME_PATH_SIZE];
		uint64_t n = 0;
		struct disk *d;

		file_path(volume, files[i], path);
		rc = storage_open(s, path, STORAGE_RDONLY, &d);
		if (rc < 0)
			break;
		rc = disk_allocated(d, &n);
		disk_close(d);
		total += n;
	}
	if (rc == 0)
		*ret = total;
	return rc;
}

/* ---- reading ---- */

/* Whether the block at `at` is own, and where the run of its kind ends, both in bytes, `end` at most. */
static bool run_at(const struct based *b, uint64_t at, uint64_t end, uint64_t *ret_end)
{
	const struct held *held = overlay_held(b->own);
	uint64_t block = at >> BLOCK_SHIFT, blocks = min_u64(units_of(end, BLOCK_SHIFT), held->bits.nbits);
	bool own = overlay_has(b->own, block);
	uint64_t stop = own ? bits_next_clear(held, block, blocks) : bits_next_set(held, block, blocks);

	/* Past the volume's last block there is nothing. */
	*ret_end = stop >= blocks ? end : min_u64(stop << BLOCK_SHIFT, end);
	return own;
}

static int base_read(const struct based *b, uint64_t off, uint8_t *buf, size_t len)
{
	size_t there = off >= b->base->size ? 0 : (size_t)min_u64(len, b->base->size - off);

	memset(buf + there, 0, len - there);
	return there ? disk_read(b->base->disk, off, buf, there) : 0;
}

static int based_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	struct based *b = based_of(d);
	uint64_t at = off, end = off + len;
	int rc = 0;

	own_shared(b);
	while (rc == 0 && at < end) {
		uint8_t *p = (uint8_t *)buf + (at - off);
		uint64_t stop;

		if (run_at(b, at, end, &stop))
			rc = disk_read(overlay_data(b->own), at, p, (size_t)(stop - at));
		else
			rc = base_read(b, at, p, (size_t)(stop - at));
		at = stop;
	}
	own_unlock(b);
	return rc;
}

static int extent_one(const struct based *b, uint64_t off, uint64_t end, struct extent *ret)
{
	uint64_t stop;

	if (run_at(b, off, end, &stop))
		return disk_extent(overlay_data(b->own), off, stop, ret);
	if (off < b->base->size)
		return disk_extent(b->base->disk, off, min_u64(stop, b->base->size), ret);
	*ret = (struct extent){off, stop - off, false};
	return 0;
}

static int based_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	struct based *b = based_of(d);
	struct extent x = {0};
	int rc;

	PRE(off < end);
	own_shared(b);
	rc = extent_one(b, off, end, &x);
	for (unsigned i = 0; rc == 0 && i < JOINS_MAX && x.off + x.len < end; i++) {
		struct extent next;

		rc = extent_one(b, x.off + x.len, end, &next);
		if (rc < 0 || next.data != x.data)
			break;
		x.len += next.len;
	}
	own_unlock(b);
	/* A damaged cluster of the base is told where it is asked for. */
	if (rc == -ERR_CORRUPT && x.len)
		rc = 0;
	if (rc == 0)
		*ret = x;
	return rc;
}

/* ---- writing ---- */

/* own.data durable: one sync serves all who asked before it began. */
static int sync_data(struct based *b)
{
	uint64_t mine;
	int rc = 0;

	mutex_lock(&b->sync.lock);
	mine = ++b->sync.asked;
	while (rc == 0 && b->sync.done < mine) {
		uint64_t upto = b->sync.asked;

		if (b->sync.running) {
			cond_wait(&b->sync.cond, &b->sync.lock);
			continue;
		}
		b->sync.running = true;
		mutex_unlock(&b->sync.lock);
		/* After an error it fails for ever (image/storage.h): those who wait find out for themselves. */
		rc = overlay_sync_data(b->own);
		mutex_lock(&b->sync.lock);
		b->sync.running = false;
		if (rc == 0)
			b->sync.done = upto;
		cond_broadcast(&b->sync.cond);
	}
	mutex_unlock(&b->sync.lock);
	return rc;
}

/* A change of [off, off + len): to buf, or to zeroes if it is NULL. */
struct based_change {
	uint64_t off, len;
	const uint8_t *buf;
	bool punch;
};

/* Of a block that is not own: all of it, as the change leaves it. */
static int put_block(struct based *b, const struct based_change *c, uint64_t block)
{
	uint64_t off = block << BLOCK_SHIFT, lo = max_u64(off, c->off), hi = min_u64(off + BLOCK_SIZE, c->off + c->len);
	uint8_t whole[BLOCK_SIZE];
	int rc = base_read(b, off, whole, sizeof(whole));

	if (rc < 0)
		return rc;
	if (c->buf)
		memcpy(whole + (lo - off), c->buf + (lo - c->off), (size_t)(hi - lo));
	else
		memset(whole + (lo - off), 0, (size_t)(hi - lo));
	return disk_write(overlay_data(b->own), off, whole, sizeof(whole));
}

/* [off, end) of own.data, which no word stands for, becomes a hole: a write that was cut off may have left something.
 * Mostly it is one already, and then there is nothing to sync. */
static int clear_leftovers(struct based *b, uint64_t off, uint64_t end, bool *wrote)
{
	struct disk *data = overlay_data(b->own);

	while (off < end) {
		struct extent x;
		int rc = disk_extent(data, off, end, &x);

		*wrote = *wrote || (rc == 0 && x.data);
		if (rc == 0 && x.data)
			rc = disk_zero(data, x.off, x.len, true);
		if (rc < 0)
			return rc;
		off = x.off + x.len;
	}
	return 0;
}

/* The data of [at, stop), in blocks that are not own. *wrote is set if own.data changed. */
static int put_new(struct based *b, const struct based_change *c, uint64_t at, uint64_t stop, bool *wrote)
{
	uint64_t first = at >> BLOCK_SHIFT, last = (stop - 1) >> BLOCK_SHIFT;
	bool whole_end = (stop & (BLOCK_SIZE - 1)) == 0;
	int rc = 0;

	if ((at & (BLOCK_SIZE - 1)) || (first == last && !whole_end)) {
		rc = put_block(b, c, first);
		*wrote = true;
		at = (first + 1) << BLOCK_SHIFT;
	}
	if (rc == 0 && at < stop && !whole_end) {
		rc = put_block(b, c, last);
		*wrote = true;
		stop = last << BLOCK_SHIFT;
	}
	if (rc < 0 || at >= stop)
		return rc;
	if (!c->buf)
		return clear_leftovers(b, at, stop, wrote);
	*wrote = true;
	return disk_write(overlay_data(b->own), at, c->buf + (at - c->off), (size_t)(stop - at));
}

/* Whether the base reads as zeroes all over [off, end) by its extents. */
static int base_is_hole(const struct based *b, uint64_t off, uint64_t end, bool *ret)
{
	*ret = true;
	end = min_u64(end, b->base->size);
	while (off < end) {
		struct extent x;
		int rc = disk_extent(b->base->disk, off, end, &x);

		if (rc < 0)
			return rc;
		if (x.data) {
			*ret = false;
			return 0;
		}
		off = x.off + x.len;
	}
	return 0;
}

/* Whether the change leaves [at, stop), which is not own, as it is: zeroes over a hole. */
static int needs_nothing(const struct based *b, const struct based_change *c, uint64_t at, uint64_t stop, bool *ret)
{
	*ret = false;
	return c->buf ? 0 : base_is_hole(b, at, stop, ret);
}

static int change_own(struct based *b, const struct based_change *c, uint64_t at, uint64_t stop)
{
	struct disk *data = overlay_data(b->own);

	return c->buf ? disk_write(data, at, c->buf + (at - c->off), (size_t)(stop - at))
		      : disk_zero(data, at, stop - at, c->punch);
}

static int publish(struct based *b, uint64_t at, uint64_t stop)
{
	uint64_t first = at >> BLOCK_SHIFT, end = units_of(stop, BLOCK_SHIFT);

	while (first < end) {
		uint32_t words[256], n = (uint32_t)min_u64(end - first, ARRAY_LEN(words));
		int rc;

		for (uint32_t i = 0; i < n; i++)
			words[i] = OVERLAY_UNCHECKED;
		rc = overlay_put_map(b->own, first, n, words);
		if (rc < 0)
			return rc;
		overlay_publish(b->own, first, n);
		first += n;
	}
	return 0;
}

/* Nobody else makes a block of this range own meanwhile: the runs are the same in both rounds. */
static int change_locked(struct based *b, const struct based_change *c)
{
	uint64_t at, stop, end = c->off + c->len;
	bool any = false, nothing = false, wrote = false;
	int rc = 0;

	for (at = c->off; rc == 0 && at < end; at = stop) {
		if (run_at(b, at, end, &stop)) {
			rc = change_own(b, c, at, stop);
			continue;
		}
		rc = needs_nothing(b, c, at, stop, &nothing);
		if (rc == 0 && !nothing)
			rc = put_new(b, c, at, stop, &wrote);
		any = any || !nothing;
	}
	if (rc < 0 || !any)
		return rc;
	rc = b->durable && wrote ? sync_data(b) : 0;
	for (at = c->off; rc == 0 && at < end; at = stop) {
		if (run_at(b, at, end, &stop))
			continue;
		rc = needs_nothing(b, c, at, stop, &nothing);
		if (rc == 0 && !nothing)
			rc = publish(b, at, stop);
	}
	return rc;
}

static int change(struct based *b, const struct based_change *c)
{
	int rc;

	if (c->len == 0)
		return 0;
	own_shared(b);
	rc = c->off > b->size || c->len > b->size - c->off ? -ERR_RANGE : change_locked(b, c);
	own_unlock(b);
	return rc;
}

static int based_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	return change(based_of(d), &(struct based_change){.off = off, .len = len, .buf = buf});
}

static int based_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	return change(based_of(d), &(struct based_change){.off = off, .len = len, .punch = punch});
}

/* ---- the rest ---- */

static int based_sync(struct disk *d)
{
	struct based *b = based_of(d);
	int rc;

	own_shared(b);
	rc = overlay_sync_data(b->own);
	if (rc == 0)
		rc = overlay_sync_map(b->own);
	own_unlock(b);
	return rc;
}

/* The files are as long as what was written: a size is in memory, and in the group's record. Never below the base's. */
static int based_set_size(struct disk *d, uint64_t size)
{
	struct based *b = based_of(d);
	struct overlay *o;
	int rc;

	if (size < b->base->size)
		return -ERR_RANGE;
	check_zero(pthread_rwlock_wrlock(&b->own_lock));
	/* Unasked for, a failed write-back would go with the open file (I10). */
	rc = overlay_sync_data(b->own);
	if (rc == 0)
		rc = overlay_sync_map(b->own);
	if (rc == 0)
		rc = overlay_open(b->storage, b->path, size, &o, NULL);
	if (rc == 0) {
		if (size >= b->size)
			overlay_take_over(o, b->own);
		overlay_close(b->own);
		b->own = o;
		b->size = size;
	}
	own_unlock(b);
	return rc;
}

static int based_get_size(struct disk *d, uint64_t *ret)
{
	*ret = based_of(d)->size;
	return 0;
}

/* With the base's: a tool that is told 0 takes the file for one hole (tar does). */
static int based_allocated(struct disk *d, uint64_t *ret)
{
	struct based *b = based_of(d);
	uint64_t own = 0, base = 0;
	int rc;

	own_shared(b);
	rc = disk_allocated(overlay_data(b->own), &own);
	own_unlock(b);
	if (rc == 0)
		rc = disk_allocated(b->base->disk, &base);
	if (rc == 0)
		*ret = min_u64(own + base, round_up_u64(b->size, BLOCK_SIZE));
	return rc;
}

static const struct disk_ops based_ops = {
    .read = based_read,
    .write = based_write,
    .zero = based_zero,
    .extent = based_extent,
    .sync = based_sync,
    .set_size = based_set_size,
    .get_size = based_get_size,
    .allocated = based_allocated,
    .close = based_close,
};
