/* A disk over a read-only base (image/based.h).
 *
 * A write goes over its blocks in runs of own ones and others: own ones in place, others whole, their ends completed
 * from the base; then their words, then their bits. A reader that looks at a bit before it is set reads the base: the
 * old content, as of a write in progress. No sync is waited for (B3): a kill leaves data and words in the system's
 * cache, and what nobody flushed a power cut may take.
 *
 * A power cut may take any of data and words, and in `process` too a sync that failed does, so the word of a block
 * whose data no sync has covered yet is an *unsettled* one, which has a bit for each sector that may be zeroes. Before
 * the first write to a block own.data has durable zeroes there: it is a hole, or what a write that was cut off left is
 * punched and synced, and based_open syncs what an earlier process punched. So whatever the medium has of an unsettled
 * block afterwards, each sector is zeroes, bit clear: none of the writes to it got there. It is the base's. zeroes, bit
 * set: somebody wrote zeroes, or was about to: the bit comes before them (note_zeroes). else what one of the writes put
 * there. Each of these is what the sector held at the last flush, or was written since: a flush settles. settle() syncs
 * own.data, puts OVERLAY_UNCHECKED for all that were unsettled when it began, and syncs own.map. The settled word
 * reaches the medium after the data, whatever else is written meanwhile, and is the block's last one. After a kill
 * nothing is lost and the rule above changes nothing, so based_open needn't know which of the two it was.
 *
 * Blocks that a discard makes own need no data, and have the settled word at once.
 *
 * Locks: own_lock shared by all that use `own`, exclusive while it is replaced by one for a larger size; under it the
 * sync's mutex, never held across I/O, and unsettled.lock, held across reads and writes of a few words: those of a
 * block that is in a bitmap change under it only.
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
#include "image/zero.h"

#define BASE_KIND "BASE"
#define BASE_VERSION 2 /* 1: the same, and there are no unsettled words */
#define BASE_RECORD_MAX (SOURCE_FILES_MAX * (SOURCE_PATH_MAX + 64U) + SOURCE_PATH_MAX + 64U)
/* Neighbours of one kind joined into one extent, at most. */
#define JOINS_MAX 64U
/* The word of an unsettled block: this, and bit i for its sector i. */
#define UNSETTLED 0x100U
#define SECTORS_ALL ((1U << (BLOCK_SIZE / SECTOR_SIZE)) - 1)
/* A write that makes more blocks unsettled settles them: bounds what based_open has to look at. */
#define UNSETTLED_MAX (UINT64_C(1) << 17)
#define WORDS_MAX 256U

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
		int failed; /* for ever */
	} sync;
	struct {
		struct mutex lock;
		struct bitmap fresh, settling; /* settling: while settle() runs, or has failed */
		void *memory[2];
		uint64_t count; /* atomic: of both */
	} unsettled;
	bool unpunched; /* atomic: zeroes over a leftover could not be made durable */
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

/* Returns owned. ret_version may be NULL. */
static int record_load(struct storage *s, const char *volume, struct record **ret, uint32_t *ret_version, struct err *e)
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
	if (version == 0 || record_decode(r, payload, len) < 0)
		return err_set(
		    e, ERR_CORRUPT,
		    "open volume %s: %s.a and .b check out, but hold no record of a base image; put them back "
		    "from a backup",
		    volume, path);
	if (ret_version)
		*ret_version = version;
	*ret = TAKE_PTR(r);
	return 0;
}

static int record_save(struct storage *s, const char *volume, const struct record *r, bool durable, struct err *e)
{
	_cleanup_free_ uint8_t *buf = malloc(BASE_RECORD_MAX);
	char path[VOLUME_PATH_SIZE], folder[VOLUME_PATH_SIZE];
	int n;

	if (!buf)
		return err_set(e, ERR_NOMEM, "save the base image of volume %s: %s", volume, err_short(ERR_NOMEM));
	n = record_encode(r, buf);
	if (n < 0)
		return err_set(e, ERR_LIMIT, "create volume %s: the paths of its base image are too long", volume);
	file_path(volume, "base", path);
	file_path(volume, "", folder);
	return meta_save(s, folder, path, BASE_KIND, BASE_VERSION, buf, (size_t)n, durable, e);
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
	char path[VOLUME_PATH_SIZE];
	struct overlay *own;
	int rc, n;

	PRE(size >= a->source->size && a->path[0] == '/');
	if (!r)
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
	if (n < 0 || n >= (int)sizeof(r->backing_dir))
		return err_set(e, ERR_LIMIT, "create volume %s: the paths of its base image are too long", volume);
	return record_save(s, volume, r, durable, e);
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
	mutex_destroy(&b->unsettled.lock);
	free(b->unsettled.memory[0]);
	free(b->unsettled.memory[1]);
	free(b);
}

static int unsettled_room(struct based *b)
{
	uint64_t blocks = overlay_blocks_in(b->size);
	struct bitmap *maps[] = {&b->unsettled.fresh, &b->unsettled.settling};
	void *memory[2] = {calloc(1, bitmap_bytes(blocks)), calloc(1, bitmap_bytes(blocks))};

	if (!memory[0] || !memory[1]) {
		free(memory[0]);
		free(memory[1]);
		return -ERR_NOMEM;
	}
	for (unsigned i = 0; i < 2; i++) {
		free(b->unsettled.memory[i]);
		b->unsettled.memory[i] = memory[i];
		bitmap_init(maps[i], blocks, memory[i]);
	}
	return 0;
}

static int base_read(const struct based *b, uint64_t off, uint8_t *buf, size_t len);
static int settle(struct based *b);

/* An unsettled block as it was found: the sectors that no write reached get the base's content. */
static int complete_block(void *arg, uint64_t block, uint32_t word)
{
	struct based *b = arg;
	uint8_t buf[BLOCK_SIZE], from[BLOCK_SIZE];
	bool lost = false;
	int rc = 0;

	if (block >= overlay_blocks_in(b->size) || (word & ~SECTORS_ALL) != UNSETTLED)
		return -ERR_CORRUPT;
	if (word != (UNSETTLED | SECTORS_ALL))
		rc = disk_read(overlay_data(b->own), block << BLOCK_SHIFT, buf, sizeof(buf));
	for (uint32_t i = 0; rc == 0 && i < BLOCK_SIZE / SECTOR_SIZE; i++) {
		size_t at = (size_t)i * SECTOR_SIZE;

		if ((word >> i & 1) || !zero_is(buf + at, SECTOR_SIZE))
			continue;
		if (!lost)
			rc = base_read(b, block << BLOCK_SHIFT, from, sizeof(from));
		lost = true;
		if (rc == 0)
			memcpy(buf + at, from + at, SECTOR_SIZE);
	}
	if (rc == 0 && lost)
		rc = disk_write(overlay_data(b->own), block << BLOCK_SHIFT, buf, sizeof(buf));
	if (rc == 0 && bitmap_set(&b->unsettled.fresh, block))
		b->unsettled.count++; /* nobody else is there yet */
	return rc;
}

/* Cut off anywhere it is done again: until the settled words are there, what it writes is what it would write. */
static int open_own(struct based *b, const char *volume, struct err *e)
{
	int rc = overlay_open(b->storage, b->path, b->size, &b->own, e);

	/* A word that is there may never have reached the medium: its process was killed before a sync. Its block is
	 * own from here on; whoever relies on that syncs both files, as for anything written. */
	if (rc < 0)
		return rc;
	rc = overlay_each_marked(b->own, complete_block, b);
	if (rc == 0 && b->unsettled.fresh.count)
		rc = settle(b);
	else if (rc == 0)
		rc = overlay_sync_data(b->own);
	return rc < 0 ? err_set(e, -rc, "open volume %s: its own blocks (%s.data and .map), over its base image: %s",
				volume, b->path, err_short(rc))
		      : 0;
}

static int open_parts(struct based *b, const char *volume, struct err *e)
{
	_cleanup_free_ struct record *r = NULL;
	uint32_t version = 0;
	int rc = record_load(b->storage, volume, &r, &version, e);

	if (rc < 0)
		return rc;
	if (b->size < r->size)
		return err_set(
		    e, ERR_CORRUPT,
		    "open volume %s: it has %" PRIu64 " bytes and its base image %" PRIu64
		    ", which is more than it can have: the records of group and volume don't belong together",
		    volume, b->size, r->size);
	b->named = strdup(r->files[0].path);
	if (!b->named || unsettled_room(b) < 0)
		return err_set(e, ERR_NOMEM, "open volume %s: %s", volume, err_short(ERR_NOMEM));
	rc = open_base(volume, r, &b->base, e);
	/* Before there is an unsettled word: an older program would not know what that is. */
	if (rc == 0 && version < BASE_VERSION)
		rc = record_save(b->storage, volume, r, b->durable, e);
	return rc < 0 ? rc : open_own(b, volume, e);
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
	mutex_init(&b->unsettled.lock);
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
	int rc = record_load(s, volume, &r, NULL, e);

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

/* All that is unsettled now, or was found so, is settled afterwards. One at a time. */
static int settle(struct based *b)
{
	struct bitmap *settling = &b->unsettled.settling;
	uint64_t first, end = 0;
	int rc;

	mutex_lock(&b->unsettled.lock);
	INVARIANT(settling->count == 0);
	bitmap_swap(&b->unsettled.fresh, settling);
	mutex_unlock(&b->unsettled.lock);
	rc = overlay_sync_data(b->own);
	while (rc == 0 && settling->count && bitmap_next_run(settling, end, &first, &end)) {
		uint32_t words[WORDS_MAX], n = (uint32_t)min_u64(end - first, WORDS_MAX);

		for (uint32_t i = 0; i < n; i++)
			words[i] = OVERLAY_UNCHECKED;
		mutex_lock(&b->unsettled.lock);
		rc = overlay_put_map(b->own, first, n, words);
		if (rc == 0) {
			bitmap_clear_range(settling, first, n);
			(void)__atomic_sub_fetch(&b->unsettled.count, n, __ATOMIC_RELAXED);
		}
		mutex_unlock(&b->unsettled.lock);
		end = first + n;
	}
	return rc < 0 ? rc : overlay_sync_map(b->own);
}

/* All that was written is durable: one sync serves all who asked before it began. */
static int sync_all(struct based *b)
{
	uint64_t mine;
	int rc;

	mutex_lock(&b->sync.lock);
	mine = ++b->sync.asked;
	while (b->sync.failed == 0 && b->sync.done < mine) {
		uint64_t upto = b->sync.asked;

		if (b->sync.running) {
			cond_wait(&b->sync.cond, &b->sync.lock);
			continue;
		}
		b->sync.running = true;
		mutex_unlock(&b->sync.lock);
		rc = settle(b);
		mutex_lock(&b->sync.lock);
		b->sync.running = false;
		b->sync.failed = b->sync.failed ? b->sync.failed : rc;
		if (b->sync.failed == 0)
			b->sync.done = upto;
		cond_broadcast(&b->sync.cond);
	}
	rc = b->sync.done < mine ? b->sync.failed : 0;
	mutex_unlock(&b->sync.lock);
	return rc;
}

/* Nothing is promised of this disk any more. */
static void sync_never(struct based *b, int rc)
{
	mutex_lock(&b->sync.lock);
	b->sync.failed = b->sync.failed ? b->sync.failed : rc;
	cond_broadcast(&b->sync.cond);
	mutex_unlock(&b->sync.lock);
}

static bool sync_failed(struct based *b)
{
	bool failed;

	mutex_lock(&b->sync.lock);
	failed = b->sync.failed != 0;
	mutex_unlock(&b->sync.lock);
	return failed;
}

static uint32_t zero_sectors(const uint8_t block[BLOCK_SIZE])
{
	uint32_t mask = 0;

	for (uint32_t i = 0; i < BLOCK_SIZE / SECTOR_SIZE; i++)
		mask |= zero_is(block + (size_t)i * SECTOR_SIZE, SECTOR_SIZE) ? 1U << i : 0;
	return mask;
}

/* n blocks whose data is in own.data become own; settled: it is durable too, or they are a hole there. */
static int make_own(struct based *b, uint64_t first, uint64_t n, const uint8_t *data, bool settled)
{
	while (n > 0) {
		uint32_t words[WORDS_MAX], part = (uint32_t)min_u64(n, WORDS_MAX);
		int rc;

		for (uint32_t i = 0; i < part; i++)
			words[i] =
			    settled ? OVERLAY_UNCHECKED : UNSETTLED | zero_sectors(data + (size_t)i * BLOCK_SIZE);
		rc = overlay_put_map(b->own, first, part, words);
		if (rc < 0) {
			/* A word that was left would make its block own at the next open: until then it is the base's,
			 * and counts as that for flushes and for overlays above. */
			if (overlay_take_back(b->own, first, part) < 0)
				sync_never(b, rc);
			return rc;
		}
		if (!settled) {
			/* After the words: a settle() that knows of them comes behind them. */
			mutex_lock(&b->unsettled.lock);
			bitmap_set_range(&b->unsettled.fresh, first, part);
			(void)__atomic_add_fetch(&b->unsettled.count, part, __ATOMIC_RELAXED);
			mutex_unlock(&b->unsettled.lock);
		}
		overlay_publish(b->own, first, part);
		first += part;
		n -= part;
		data = data ? data + (size_t)part * BLOCK_SIZE : NULL;
	}
	return 0;
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
	rc = disk_write(overlay_data(b->own), off, whole, sizeof(whole));
	return rc < 0 ? rc : make_own(b, block, 1, whole, false);
}

/* Whole blocks [off, end) of own.data, which no word stands for, are zeroes, durably: a write that was cut
 * off may have left something. Mostly they are a hole, and there is nothing to do. */
static int clear_leftovers(struct based *b, uint64_t off, uint64_t end)
{
	struct disk *data = overlay_data(b->own);
	bool punched = false;
	int rc = 0;

	while (rc == 0 && off < end) {
		uint8_t buf[BLOCK_SIZE];
		struct extent x;

		rc = disk_extent(data, off, end, &x);
		if (rc == 0 && x.data) {
			x.len = min_u64(x.len, round_down_u64(x.off, BLOCK_SIZE) + BLOCK_SIZE - x.off);
			rc = disk_read(data, x.off, buf, (size_t)x.len);
			if (rc == 0 && !zero_is(buf, (size_t)x.len)) {
				rc = disk_zero(data, x.off, x.len, true);
				punched = true;
			}
		}
		off = rc < 0 ? end : x.off + x.len;
	}
	/* Once that has failed any hole may be one of the cache alone (I10). */
	if (rc == 0 && (punched || __atomic_load_n(&b->unpunched, __ATOMIC_RELAXED))) {
		rc = sync_all(b);
		if (rc < 0)
			__atomic_store_n(&b->unpunched, true, __ATOMIC_RELAXED);
	}
	return rc;
}

/* [at, stop) in blocks that are not own, which they become. */
static int put_new(struct based *b, const struct based_change *c, uint64_t at, uint64_t stop)
{
	uint64_t first = at >> BLOCK_SHIFT, last = (stop - 1) >> BLOCK_SHIFT;
	bool whole_end = (stop & (BLOCK_SIZE - 1)) == 0;
	int rc = clear_leftovers(b, first << BLOCK_SHIFT, (last + 1) << BLOCK_SHIFT);

	if (rc == 0 && ((at & (BLOCK_SIZE - 1)) || (first == last && !whole_end))) {
		rc = put_block(b, c, first);
		at = (first + 1) << BLOCK_SHIFT;
	}
	if (rc == 0 && at < stop && !whole_end) {
		rc = put_block(b, c, last);
		stop = last << BLOCK_SHIFT;
	}
	if (rc < 0 || at >= stop)
		return rc;
	if (!c->buf)
		return make_own(b, at >> BLOCK_SHIFT, (stop - at) >> BLOCK_SHIFT, NULL, true);
	rc = disk_write(overlay_data(b->own), at, c->buf + (at - c->off), (size_t)(stop - at));
	return rc < 0 ? rc : make_own(b, at >> BLOCK_SHIFT, (stop - at) >> BLOCK_SHIFT, c->buf + (at - c->off), false);
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

static bool is_unsettled(struct based *b, uint64_t first, uint64_t n)
{
	return bitmap_any(&b->unsettled.fresh, first, n) || bitmap_any(&b->unsettled.settling, first, n);
}

/* Of an own block: the change puts zeroes into these sectors of it. */
static int note_block(struct based *b, uint64_t block, uint32_t zeroes)
{
	uint32_t word;
	int rc = 0;

	mutex_lock(&b->unsettled.lock);
	if (is_unsettled(b, block, 1)) {
		rc = overlay_get_word(b->own, block, &word);
		/* It is settled all the same if a settle() failed right behind its word. */
		if (rc == 0 && word != OVERLAY_UNCHECKED && (word | zeroes) != word) {
			word |= zeroes;
			rc = overlay_put_map(b->own, block, 1, &word);
		}
	}
	mutex_unlock(&b->unsettled.lock);
	return rc;
}

/* Before [at, stop), which is own, changes: unsettled blocks get the bits of the sectors that are zeroes then. */
static int note_zeroes(struct based *b, const struct based_change *c, uint64_t at, uint64_t stop)
{
	uint64_t first = at >> BLOCK_SHIFT, end = units_of(stop, BLOCK_SHIFT);
	bool any;
	int rc = 0;

	if (__atomic_load_n(&b->unsettled.count, __ATOMIC_RELAXED) == 0)
		return 0;
	mutex_lock(&b->unsettled.lock);
	any = is_unsettled(b, first, end - first);
	mutex_unlock(&b->unsettled.lock);
	for (uint64_t block = first; any && rc == 0 && block < end; block++) {
		uint64_t off = block << BLOCK_SHIFT, lo = max_u64(off, at), hi = min_u64(off + BLOCK_SIZE, stop);
		uint8_t whole[BLOCK_SIZE];
		uint32_t zeroes;

		if (hi - lo < BLOCK_SIZE)
			rc = disk_read(overlay_data(b->own), off, whole, sizeof(whole));
		if (rc < 0)
			break;
		if (c->buf)
			memcpy(whole + (lo - off), c->buf + (lo - c->off), (size_t)(hi - lo));
		else
			memset(whole + (lo - off), 0, (size_t)(hi - lo));
		zeroes = zero_sectors(whole);
		if (zeroes)
			rc = note_block(b, block, zeroes);
	}
	return rc;
}

static int change_own(struct based *b, const struct based_change *c, uint64_t at, uint64_t stop)
{
	struct disk *data = overlay_data(b->own);
	int rc = note_zeroes(b, c, at, stop);

	if (rc < 0)
		return rc;
	return c->buf ? disk_write(data, at, c->buf + (at - c->off), (size_t)(stop - at))
		      : disk_zero(data, at, stop - at, c->punch);
}

/* Nobody else makes a block of this range own meanwhile, or writes to it. */
static int change_locked(struct based *b, const struct based_change *c)
{
	uint64_t at, stop, end = c->off + c->len;
	bool nothing = false;
	int rc = 0;

	for (at = c->off; rc == 0 && at < end; at = stop) {
		if (run_at(b, at, end, &stop)) {
			rc = change_own(b, c, at, stop);
			continue;
		}
		rc = needs_nothing(b, c, at, stop, &nothing);
		if (rc == 0 && !nothing)
			rc = put_new(b, c, at, stop);
	}
	if (rc == 0 && __atomic_load_n(&b->unsettled.count, __ATOMIC_RELAXED) > UNSETTLED_MAX && !sync_failed(b))
		rc = sync_all(b);
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
	rc = sync_all(b);
	own_unlock(b);
	return rc;
}

/* The files are as long as what was written: a size is in memory, and in the group's record. Never below the base's. */
static int based_set_size(struct disk *d, uint64_t size)
{
	struct based *b = based_of(d);
	struct overlay *o;
	uint64_t was = 0;
	int rc;

	if (size < b->base->size)
		return -ERR_RANGE;
	check_zero(pthread_rwlock_wrlock(&b->own_lock));
	/* Unasked for, a failed write-back would go with the open file (I10). */
	rc = sync_all(b);
	if (rc == 0)
		rc = overlay_open(b->storage, b->path, size, &o, NULL);
	if (rc == 0) {
		was = b->size;
		b->size = size;
		rc = unsettled_room(b); /* there is nothing in it now */
		if (rc < 0) {
			overlay_close(o);
			b->size = was;
		}
	}
	if (rc == 0) {
		if (size >= was)
			overlay_take_over(o, b->own);
		overlay_close(b->own);
		b->own = o;
		/* What a put that failed may have left a word of has become own. */
		if (size < was)
			rc = overlay_each_marked(b->own, complete_block, b);
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

/* Of what is in the store: the base is read as the system remembers it. */
static void based_forget(struct disk *d, uint64_t off, uint64_t len)
{
	struct based *b = based_of(d);

	own_shared(b);
	disk_forget(overlay_data(b->own), off, len);
	own_unlock(b);
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
    .forget = based_forget,
};
