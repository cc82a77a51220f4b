/* Changed-block bitmaps in files of sectors, one an epoch (image/changed.h).
 *
 * Sector 0 is the header; sector p + 1 is page p: 508 bytes of bits and a CRC-32C over the page's number and them. A
 * page that is a hole, or zeroes, has no bit; any other that does not check out counts as all set. A file whose header
 * is zeroes was cut off before anything could rely on it, and goes. A header that does not check out otherwise ends the
 * chain: that epoch is not known, so neither is `since` it or any older one.
 *
 * The newest epoch's pages are all in memory, its older writes' too. Older epochs are in memory until they are in their
 * files. Written is a page at a time, whole, with what is set by then: a mark sets its bit and then its page as
 * `dirty`, a flush clears `dirty` before it looks at the bits, so a mark that came between is written by the next one.
 *
 * Order of a flush (`power` syncs at each semicolon): header and pages of all that is dirty; the folder, if a file is
 * new; then the caller clears intent bits. Merging j into the older i: i's pages; then j's file goes. Cut off between,
 * j is there still, which says nothing wrong.
 *
 * flush_lock  one flush, drop or union at a time: the files. Held across I/O.
 * lock        the list of epochs and their memory; below flush_lock, never across I/O. Only a holder of flush_lock
 *             frees epochs, so one that it has looked up stays while it writes: changed_begin, which has not got it,
 * may empty the list, and leaves what was there to the next holder (doomed).
 *
 * Emptied, the list is not what the files say any more (stale): they go before anything else is written, and so before
 * any intent bit is cleared that was set since. As long as they can't be removed, durably, no flush succeeds: the next
 * start would read them, and what was marked since has its intent bit only.
 *
 * A file without one behind it would say too little, so the newest that goes is made one that does not check out, and
 * goes when the others are gone: cut off anywhere, an open drops what is left of them. What names an open finds, or
 * finds gone, the start makes durable before any bit is cleared (intent_begin).
 */
#include "image/changed.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/thread.h"
#include "core/range.h"
#include "core/repl_meta.h"
#include "core/retention.h"

#define CHANGED_MAGIC "repfschg"
#define CHANGED_VERSION 1
#define CHANGED_PREFIX "changed-"
#define FLAG_PINNED 1U
#define SECTOR 512U
#define PAGE_BYTES 508U
#define PAGE_BITS (PAGE_BYTES * 8U)
/* "volumes/NAME/changed-18446744073709551615" */
#define CHANGED_PATH_SIZE (NAME_SIZE + 48)

struct epoch {
	uint64_t number, time_ns;
	bool pinned, filed, headed; /* there is a file; its header is as this says */
	bool counts;		    /* something was marked in it */
	struct bitmap bits, dirty;  /* blocks; pages that the file lacks. Both have memory or neither has */
	void *bits_memory, *dirty_memory;
	struct epoch *next; /* doomed */
};

struct changed {
	struct storage *storage;
	char name[NAME_SIZE];
	bool power;
	struct mutex flush_lock, lock;
	uint64_t size, blocks, pages;
	struct epoch *epochs[CHANGED_EPOCHS_MAX]; /* ascending */
	uint32_t n;
	struct epoch *doomed; /* out of the list, not freed yet */
	bool stale;	      /* files may be there that no epoch of the list is of */
};

static void path_of(const struct changed *c, uint64_t number, char out[CHANGED_PATH_SIZE])
{
	int n = snprintf(out, CHANGED_PATH_SIZE, "volumes/%s/" CHANGED_PREFIX "%" PRIu64, c->name, number);

	PRE(n > 0 && n < (int)CHANGED_PATH_SIZE);
}

static void folder_of(const struct changed *c, char out[CHANGED_PATH_SIZE])
{
	(void)snprintf(out, CHANGED_PATH_SIZE, "volumes/%s", c->name);
}

/* ---- memory ---- */

static void epoch_unload(struct epoch *x)
{
	free(x->bits_memory);
	free(x->dirty_memory);
	x->bits_memory = x->dirty_memory = NULL;
}

static void epoch_free(struct epoch *x)
{
	if (!x)
		return;
	epoch_unload(x);
	free(x);
}

static bool epoch_load(const struct changed *c, struct epoch *x)
{
	x->bits_memory = calloc(1, bitmap_bytes(c->blocks));
	x->dirty_memory = calloc(1, bitmap_bytes(c->pages));
	if (!x->bits_memory || !x->dirty_memory) {
		epoch_unload(x);
		return false;
	}
	bitmap_init(&x->bits, c->blocks, x->bits_memory);
	bitmap_init(&x->dirty, c->pages, x->dirty_memory);
	return true;
}

static void set_size(struct changed *c, uint64_t size)
{
	c->size = size;
	c->blocks = units_of(size, BLOCK_SHIFT);
	c->pages = (c->blocks + PAGE_BITS - 1) / PAGE_BITS;
}

static void forget_locked(struct changed *c) REQUIRES(c->lock)
{
	for (uint32_t i = 0; i < c->n; i++) {
		c->epochs[i]->next = c->doomed;
		c->doomed = c->epochs[i];
	}
	c->stale = c->stale || c->n > 0;
	c->n = 0;
}

static void bury(struct changed *c) REQUIRES(c->flush_lock)
{
	mutex_lock(&c->lock);
	while (c->doomed) {
		struct epoch *x = c->doomed;

		c->doomed = x->next;
		epoch_free(x);
	}
	mutex_unlock(&c->lock);
}

/* Epoch i leaves the list. */
static void take_out_locked(struct changed *c, uint32_t i) REQUIRES(c->lock)
{
	epoch_free(c->epochs[i]);
	c->n--;
	memmove(&c->epochs[i], &c->epochs[i + 1], (c->n - i) * sizeof(c->epochs[0]));
}

/* ---- pages ---- */

/* The bits of page p, from and to a bitmap of blocks. */
static void page_get(const struct bitmap *b, uint64_t p, uint8_t bits[PAGE_BYTES])
{
	uint64_t first = p * PAGE_BITS, end = min_u64(first + PAGE_BITS, b->nbits), at = first, run, stop;

	memset(bits, 0, PAGE_BYTES);
	while (at < end && bitmap_next_run(b, at, &run, &stop) && run < end) {
		stop = min_u64(stop, end);
		for (uint64_t i = run - first; i < stop - first; i++)
			bits[i / 8] |= (uint8_t)(1U << i % 8);
		at = stop;
	}
}

static void page_put(struct bitmap *b, uint64_t p, const uint8_t bits[PAGE_BYTES])
{
	uint64_t first = p * PAGE_BITS, n = min_u64(PAGE_BITS, b->nbits - first);

	for (uint64_t i = 0; i < n; i++) {
		if (bits[i / 8] == 0) {
			i |= 7;
			continue;
		}
		if (bits[i / 8] >> i % 8 & 1)
			(void)bitmap_set(b, first + i);
	}
}

static uint32_t page_crc(uint64_t p, const uint8_t bits[PAGE_BYTES])
{
	uint8_t number[8];

	put_u64(number, p);
	return crc32c(crc32c(0, number, sizeof(number)), bits, PAGE_BYTES);
}

static int page_write(struct disk *d, uint64_t p, const uint8_t bits[PAGE_BYTES])
{
	uint8_t sector[SECTOR];

	memcpy(sector, bits, PAGE_BYTES);
	put_u32(sector + PAGE_BYTES, page_crc(p, bits));
	return disk_write(d, (p + 1) * SECTOR, sector, sizeof(sector));
}

/* What a file says of page p: its bits, or all of them where that can't be told. */
static int page_read(struct disk *d, uint64_t p, uint8_t bits[PAGE_BYTES])
{
	static const uint8_t none[SECTOR];
	uint8_t sector[SECTOR];
	int rc = disk_read(d, (p + 1) * SECTOR, sector, sizeof(sector));

	if (rc < 0)
		return rc;
	memcpy(bits, sector, PAGE_BYTES);
	if (memcmp(sector, none, sizeof(none)) != 0 && get_u32(sector + PAGE_BYTES) != page_crc(p, bits))
		memset(bits, 0xff, PAGE_BYTES);
	return 0;
}

/* Calls fn for each page of an epoch's file that is no hole. */
static int each_page(const struct changed *c, uint64_t number,
		     int (*fn)(void *arg, uint64_t p, const uint8_t bits[PAGE_BYTES]), void *arg)
{
	uint64_t end = (c->pages + 1) * SECTOR, at = SECTOR;
	char path[CHANGED_PATH_SIZE];
	uint8_t bits[PAGE_BYTES];
	struct disk *d;
	int rc;

	path_of(c, number, path);
	rc = storage_open(c->storage, path, STORAGE_RDONLY | STORAGE_FRESH, &d);
	if (rc < 0)
		return rc;
	while (rc == 0 && at < end) {
		struct extent x;

		rc = disk_extent(d, at, end, &x);
		if (rc == 0 && x.data)
			for (uint64_t p = at / SECTOR - 1; rc == 0 && p < c->pages && (p + 1) * SECTOR < x.off + x.len;
			     p++) {
				rc = page_read(d, p, bits);
				if (rc == 0)
					rc = fn(arg, p, bits);
			}
		at = rc == 0 ? round_down_u64(x.off + x.len + SECTOR - 1, SECTOR) : end;
	}
	disk_close(d);
	return rc;
}

/* ---- headers ---- */

static void header_make(const struct changed *c, const struct epoch *x, uint8_t h[SECTOR])
{
	memset(h, 0, SECTOR);
	memcpy(h, CHANGED_MAGIC, 8);
	put_u32(h + 8, CHANGED_VERSION);
	put_u32(h + 12, BLOCK_SHIFT);
	put_u64(h + 16, x->number);
	put_u64(h + 24, c->size);
	put_u64(h + 32, x->time_ns);
	put_u32(h + 40, x->pinned ? FLAG_PINNED : 0U);
	put_u32(h + 508, crc32c(0, h, 508));
}

enum header { HEADER_GOOD, HEADER_NONE, HEADER_BAD };

static int header_read(const struct changed *c, uint64_t number, enum header *ret, struct epoch *x)
{
	static const uint8_t none[SECTOR];
	char path[CHANGED_PATH_SIZE];
	uint8_t h[SECTOR];
	struct disk *d;
	int rc;

	path_of(c, number, path);
	rc = storage_open(c->storage, path, STORAGE_RDONLY | STORAGE_FRESH, &d);
	if (rc < 0)
		return rc;
	rc = disk_read(d, 0, h, sizeof(h));
	disk_close(d);
	if (rc < 0)
		return rc;
	*ret = HEADER_BAD;
	if (memcmp(h, none, sizeof(h)) == 0)
		*ret = HEADER_NONE;
	else if (memcmp(h, CHANGED_MAGIC, 8) == 0 && get_u32(h + 508) == crc32c(0, h, 508) &&
		 get_u32(h + 8) == CHANGED_VERSION && get_u32(h + 12) == BLOCK_SHIFT && get_u64(h + 16) == number &&
		 get_u64(h + 24) == c->size)
		*ret = HEADER_GOOD;
	*x = (struct epoch){.number = number,
			    .time_ns = get_u64(h + 32),
			    .pinned = (get_u32(h + 40) & FLAG_PINNED) != 0,
			    .filed = true,
			    .headed = true,
			    .counts = true};
	return 0;
}

/* ---- files that are there ---- */

struct found {
	uint64_t numbers[2 * CHANGED_EPOCHS_MAX];
	uint32_t n;
	bool more;
};

static int found_add(void *arg, const char *name)
{
	struct found *f = arg;
	char *end;

	if (strncmp(name, CHANGED_PREFIX, strlen(CHANGED_PREFIX)) != 0)
		return 0;
	uint64_t n = strtoull(name + strlen(CHANGED_PREFIX), &end, 10);
	if (*end || n == 0)
		return 0;
	if (f->n == ARRAY_LEN(f->numbers))
		f->more = true;
	else
		f->numbers[f->n++] = n;
	return 0;
}

static int by_number(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static int unlink_file(const struct changed *c, uint64_t number)
{
	char path[CHANGED_PATH_SIZE];
	int rc;

	path_of(c, number, path);
	rc = storage_unlink(c->storage, path);
	return rc == -ERR_NOENT ? 0 : rc;
}

static int sync_folder(const struct changed *c)
{
	char folder[CHANGED_PATH_SIZE];

	folder_of(c, folder);
	return c->power ? storage_sync_dir(c->storage, folder) : 0;
}

static int find_files(const struct changed *c, struct found *f)
{
	char folder[CHANGED_PATH_SIZE];
	int rc;

	folder_of(c, folder);
	f->n = 0;
	f->more = false;
	rc = storage_list(c->storage, folder, found_add, f);
	qsort(f->numbers, f->n, sizeof(f->numbers[0]), by_number);
	return rc;
}

/* The file checks out no more. */
static int void_file(const struct changed *c, uint64_t number)
{
	char path[CHANGED_PATH_SIZE];
	uint8_t none[SECTOR];
	struct disk *d;
	int rc;

	memset(none, 0xff, sizeof(none));
	path_of(c, number, path);
	rc = storage_open(c->storage, path, 0, &d);
	if (rc < 0)
		return rc;
	rc = disk_write(d, 0, none, sizeof(none));
	if (rc == 0)
		rc = disk_sync(d);
	disk_close(d);
	return rc;
}

/* All that was found, which is all there is up to the newest of it. One that can't be written to does not hold the
 * others: then they go one after the other, each for good, oldest first. */
static int unlink_found(const struct changed *c, const struct found *f, bool is_void)
{
	int rc = 0;

	/* A kill leaves the order in which they went. */
	is_void = is_void || !c->power || f->n < 2 || void_file(c, f->numbers[f->n - 1]) == 0;
	for (uint32_t i = 0; rc == 0 && i < f->n; i++) {
		if (!is_void || (i > 0 && i + 1 == f->n))
			rc = sync_folder(c);
		if (rc == 0)
			rc = unlink_file(c, f->numbers[i]);
	}
	return rc;
}

static int unlink_all(const struct changed *c)
{
	struct found *f = malloc(sizeof(*f));
	int rc = f ? 0 : -ERR_NOMEM;

	do {
		if (rc == 0)
			rc = find_files(c, f);
		if (rc == 0)
			rc = unlink_found(c, f, false);
	} while (rc == 0 && f->more);
	if (rc == 0) /* none is there: one that failed here before had removed them */
		rc = sync_folder(c);
	free(f);
	return rc;
}

static int drop_files(struct changed *c) REQUIRES(c->flush_lock)
{
	int rc = unlink_all(c);

	mutex_lock(&c->lock);
	c->stale = rc < 0;
	mutex_unlock(&c->lock);
	return rc;
}

int changed_drop(struct changed *c)
{
	bool any;
	int rc = 0;

	mutex_lock(&c->flush_lock);
	mutex_lock(&c->lock);
	forget_locked(c);
	any = c->stale;
	mutex_unlock(&c->lock);
	if (any)
		rc = drop_files(c);
	bury(c);
	mutex_unlock(&c->flush_lock);
	return rc;
}

/* ---- opening ---- */

static int load_page(void *arg, uint64_t p, const uint8_t bits[PAGE_BYTES])
{
	page_put(arg, p, bits);
	return 0;
}

/* From the newest to the oldest: one that is not known takes those before it along. */
static int load(struct changed *c, struct found *f)
{
	bool known = true;
	uint32_t n = 0;
	int rc = 0;

	for (uint32_t i = f->n; rc == 0 && known && i-- > 0;) {
		enum header h = HEADER_BAD;
		struct epoch x, *keep = NULL;

		rc = header_read(c, f->numbers[i], &h, &x);
		known = h == HEADER_NONE || (h == HEADER_GOOD && n < CHANGED_EPOCHS_MAX);
		if (rc == 0 && !known) {
			f->n = i + 1;
			rc = unlink_found(c, f, h == HEADER_BAD);
		} else if (rc == 0 && h == HEADER_NONE) {
			rc = unlink_file(c, f->numbers[i]);
		} else if (rc == 0) {
			keep = malloc(sizeof(*keep));
			if (!keep)
				return -ERR_NOMEM;
			*keep = x;
			c->epochs[n++] = keep;
			c->n = n;
		}
	}
	for (uint32_t i = 0; i < n / 2; i++) {
		struct epoch *x = c->epochs[i];

		c->epochs[i] = c->epochs[n - 1 - i];
		c->epochs[n - 1 - i] = x;
	}
	if (rc == 0 && n) {
		struct epoch *last = c->epochs[n - 1];

		rc = epoch_load(c, last) ? each_page(c, last->number, load_page, &last->bits) : -ERR_NOMEM;
		/* Pages that did not check out are all set now: whole in the file again with the next flush. */
		for (uint64_t p = 0; rc == 0 && p < c->pages; p++)
			if (bitmap_any(&last->bits, p * PAGE_BITS, min_u64(PAGE_BITS, c->blocks - p * PAGE_BITS)))
				(void)bitmap_set(&last->dirty, p);
	}
	return rc;
}

int changed_open(struct storage *s, const char *volume, uint64_t size, bool power, bool keep, struct changed **ret,
		 struct err *e)
{
	struct changed *c = calloc(1, sizeof(*c));
	struct found *f = malloc(sizeof(*f));
	int rc;

	if (!c || !f) {
		free(c);
		free(f);
		return err_set(e, ERR_NOMEM, "open volume %s: out of memory", volume);
	}
	c->storage = s;
	c->power = power;
	(void)snprintf(c->name, sizeof(c->name), "%s", volume);
	set_size(c, size);
	mutex_init(&c->flush_lock);
	mutex_init(&c->lock);
	rc = find_files(c, f);
	if (rc == 0 && keep && !f->more)
		rc = load(c, f);
	/* A bitmap that can't be read costs an incremental backup, never the volume. */
	if (rc < 0 || !keep || f->more) {
		bool any = f->n > 0 || rc < 0;

		for (uint32_t i = 0; i < c->n; i++)
			epoch_free(c->epochs[i]);
		c->n = 0;
		c->stale = any && unlink_all(c) < 0;
	}
	free(f);
	*ret = c;
	return 0;
}

void changed_close(struct changed *c)
{
	if (!c)
		return;
	mutex_lock(&c->flush_lock);
	bury(c);
	mutex_unlock(&c->flush_lock);
	for (uint32_t i = 0; i < c->n; i++)
		epoch_free(c->epochs[i]);
	mutex_destroy(&c->lock);
	mutex_destroy(&c->flush_lock);
	free(c);
}

/* ---- marking ---- */

void changed_begin(struct changed *c, uint64_t number, uint64_t time_ns, bool pinned, uint64_t size)
{
	struct epoch *x;

	mutex_lock(&c->lock);
	if (c->n && c->epochs[c->n - 1]->number >= number) /* heard of again */
		forget_locked(c);
	if (size != c->size) {
		forget_locked(c);
		set_size(c, size);
	}
	x = c->n == CHANGED_EPOCHS_MAX ? NULL : calloc(1, sizeof(*x));
	if (x)
		*x = (struct epoch){.number = number, .time_ns = time_ns, .pinned = pinned};
	if (x && epoch_load(c, x)) {
		c->epochs[c->n++] = x;
	} else {
		free(x);
		forget_locked(c);
	}
	mutex_unlock(&c->lock);
}

void changed_mark(struct changed *c, uint64_t off, uint64_t len)
{
	mutex_lock(&c->lock);
	if (c->n && len && off < c->size) {
		struct epoch *x = c->epochs[c->n - 1];
		uint64_t first = off >> BLOCK_SHIFT, end = units_of(min_u64(off + len, c->size), BLOCK_SHIFT);

		x->counts = true;
		if (bitmap_set_range(&x->bits, first, end - first))
			(void)bitmap_set_range(&x->dirty, first / PAGE_BITS,
					       (end - 1) / PAGE_BITS - first / PAGE_BITS + 1);
	}
	mutex_unlock(&c->lock);
}

/* ---- flushing ---- */

/* The next page of epoch x that its file lacks; false: none. */
static bool next_dirty(struct changed *c, struct epoch *x, uint64_t *p, uint8_t bits[PAGE_BYTES])
{
	bool there;

	mutex_lock(&c->lock);
	*p = x->bits_memory ? bitmap_next_set(&x->dirty, *p) : BITMAP_NONE;
	there = *p != BITMAP_NONE;
	if (there) {
		(void)bitmap_clear(&x->dirty, *p);
		page_get(&x->bits, *p, bits);
	}
	mutex_unlock(&c->lock);
	return there;
}

static int flush_epoch(struct changed *c, struct epoch *x, bool *made) REQUIRES(c->flush_lock)
{
	char path[CHANGED_PATH_SIZE];
	uint8_t bits[PAGE_BYTES], header[SECTOR];
	struct disk *d;
	uint64_t p = 0;
	bool any = next_dirty(c, x, &p, bits);
	int rc;

	if (x->headed && !any)
		return 0;
	path_of(c, x->number, path);
	rc = storage_open(c->storage, path, STORAGE_CREATE | (x->filed ? 0U : STORAGE_TRUNC), &d);
	if (rc < 0)
		return rc;
	*made = *made || !x->filed;
	if (!x->headed) {
		header_make(c, x, header);
		rc = disk_write(d, 0, header, sizeof(header));
	}
	while (rc == 0 && any) {
		rc = page_write(d, p, bits);
		p++;
		any = rc == 0 && next_dirty(c, x, &p, bits);
	}
	if (rc == 0 && c->power)
		rc = disk_sync(d);
	disk_close(d);
	if (rc == 0)
		x->filed = x->headed = true;
	return rc;
}

struct merge {
	struct disk *into;
};

static int merge_page(void *arg, uint64_t p, const uint8_t bits[PAGE_BYTES])
{
	struct merge *m = arg;
	uint8_t sum[PAGE_BYTES];
	int rc = page_read(m->into, p, sum);

	for (unsigned i = 0; i < PAGE_BYTES; i++)
		sum[i] |= bits[i];
	return rc < 0 ? rc : page_write(m->into, p, sum);
}

/* Epoch j's marks go into the older one beside it; both are in their files only. */
static int merge(struct changed *c, const struct epoch *older, const struct epoch *j) REQUIRES(c->flush_lock)
{
	char path[CHANGED_PATH_SIZE];
	struct merge m;
	int rc;

	path_of(c, older->number, path);
	rc = storage_open(c->storage, path, 0, &m.into);
	if (rc < 0)
		return rc;
	rc = each_page(c, j->number, merge_page, &m);
	if (rc == 0 && c->power)
		rc = disk_sync(m.into);
	disk_close(m.into);
	return rc;
}

/* The first of those before the newest that is kept by nothing; n: none. */
static uint32_t find_unkept(const struct changed *c, const struct settings *keep, uint32_t n)
{
	_cleanup_free_ struct repl_ckpt *k = calloc(n, sizeof(*k));
	_cleanup_free_ uint64_t *bytes = calloc(n, sizeof(*bytes));
	_cleanup_free_ bool *apart = calloc(n, sizeof(*apart));
	_cleanup_free_ uint8_t *rules = calloc(n, 1);

	if (!k || !bytes || !apart || !rules)
		return n;
	for (uint32_t i = 0; i < n; i++) {
		k[i] = (struct repl_ckpt){.number = c->epochs[i]->number, .time_ns = c->epochs[i]->time_ns};
		bytes[i] = c->epochs[i]->counts ? BLOCK_SIZE : 0;
		apart[i] = c->epochs[i]->pinned;
	}
	retention_rules(keep, k, n, apart, bytes, rules);
	for (uint32_t i = 0; i + 1 < n; i++)
		if (!apart[i] && rules[i] == 0)
			return i;
	/* Room for those to come, whatever is to be kept. */
	return n > CHANGED_EPOCHS_MAX - 64 ? 0 : n;
}

static int retain(struct changed *c, const struct settings *keep) REQUIRES(c->flush_lock)
{
	for (;;) {
		mutex_lock(&c->lock);
		uint32_t n = c->n, i = n ? find_unkept(c, keep, n) : 0;
		struct epoch *x = i < n ? c->epochs[i] : NULL, *older = x && i ? c->epochs[i - 1] : NULL;
		/* Those that are not in their files yet, whole, have their time at the next flush. */
		bool yet = c->stale || (x && x->bits_memory) || (older && older->bits_memory);
		mutex_unlock(&c->lock);
		if (!x || yet)
			return 0;
		int rc = older ? merge(c, older, x) : 0;
		if (rc == 0)
			rc = unlink_file(c, x->number);
		/* For good before the next one goes, whose marks only what is older than both has then: it would come
		 * back without them. */
		if (rc == 0)
			rc = sync_folder(c);
		if (rc < 0)
			return rc;
		mutex_lock(&c->lock);
		/* The list may have been emptied meanwhile, and have others in it. */
		if (i < c->n && c->epochs[i] == x)
			take_out_locked(c, i);
		mutex_unlock(&c->lock);
	}
}

static int flush_all(struct changed *c, const struct settings *keep) REQUIRES(c->flush_lock)
{
	bool made = false, stale;
	int rc = 0;

	mutex_lock(&c->lock);
	stale = c->stale;
	mutex_unlock(&c->lock);
	/* Files of epochs that were forgotten must not be taken for the new ones', nor read at the next start. */
	if (stale) {
		rc = drop_files(c);
		mutex_lock(&c->lock);
		for (uint32_t i = 0; i < c->n; i++)
			c->epochs[i]->filed = c->epochs[i]->headed = false;
		mutex_unlock(&c->lock);
	}
	for (uint32_t i = 0; rc == 0; i++) {
		mutex_lock(&c->lock);
		struct epoch *x = i < c->n && !c->stale ? c->epochs[i] : NULL;
		bool newest = i + 1 == c->n;
		mutex_unlock(&c->lock);
		if (!x)
			break;
		rc = flush_epoch(c, x, &made);
		mutex_lock(&c->lock);
		if (rc == 0 && !newest && i < c->n && c->epochs[i] == x && i + 1 < c->n)
			epoch_unload(x);
		mutex_unlock(&c->lock);
	}
	if (rc == 0 && made)
		rc = sync_folder(c);
	if (rc == 0 && keep)
		rc = retain(c, keep);
	return rc;
}

int changed_flush(struct changed *c, const struct settings *keep)
{
	int rc;

	mutex_lock(&c->flush_lock);
	rc = flush_all(c, keep);
	if (rc < 0) {
		mutex_lock(&c->lock);
		forget_locked(c);
		mutex_unlock(&c->lock);
		rc = drop_files(c);
	}
	bury(c);
	mutex_unlock(&c->flush_lock);
	return rc;
}

/* ---- asking ---- */

int changed_since(struct changed *c, uint64_t since, struct bitmap *into)
{
	int rc = 0;
	uint32_t i = 0;

	mutex_lock(&c->flush_lock);
	mutex_lock(&c->lock);
	while (i < c->n && c->epochs[i]->number != since)
		i++;
	if (i == c->n || into->nbits != c->blocks)
		rc = -ERR_NOENT;
	for (; rc == 0 && i < c->n; i++) {
		struct epoch *x = c->epochs[i];

		if (x->bits_memory) { /* whole: the file has nothing more */
			bitmap_or(into, &x->bits);
			continue;
		}
		uint64_t number = x->number;
		mutex_unlock(&c->lock);
		rc = each_page(c, number, load_page, into);
		mutex_lock(&c->lock);
		if (rc == 0 && (i >= c->n || c->epochs[i]->number != number))
			rc = -ERR_NOENT; /* dropped meanwhile */
	}
	mutex_unlock(&c->lock);
	bury(c);
	mutex_unlock(&c->flush_lock);
	return rc;
}

uint32_t changed_numbers(struct changed *c, uint64_t *numbers, uint32_t max)
{
	uint32_t n;

	mutex_lock(&c->lock);
	n = c->n < max ? c->n : max;
	for (uint32_t i = 0; i < n; i++)
		numbers[i] = c->epochs[i]->number;
	mutex_unlock(&c->lock);
	return n;
}

uint32_t changed_in_memory(struct changed *c)
{
	uint32_t n = 0;

	mutex_lock(&c->lock);
	for (uint32_t i = c->n; i-- > 0 && c->epochs[i]->bits_memory;)
		n++;
	mutex_unlock(&c->lock);
	return n;
}
