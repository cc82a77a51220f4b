/* The write-intent map in a file of sectors (image/intent.h, docs/format.md).
 *
 * Sector 0 is the header, each further one a page: 508 bytes of bits and a CRC-32C over the page's number and them.
 * A page that does not check out, whatever the cause (a torn write, the medium), reads as all set: more is resynced
 * than needed, never less. Pages are never left to holes, so a page lost by the filesystem does not check out either.
 *
 * All bits are kept in memory too, because a page is written whole. `lock` covers them and the order in which the
 * images of one page reach the file; it is held across that write to the page cache, and never across a sync. So a
 * later set's sync takes with it whatever a clear before it wrote, and a page never goes back to older bits.
 *
 * Whether a sync is needed: `written` counts writes of pages, `synced` how many of them a successful sync is known to
 * cover. A set of bits that are all set already writes nothing, and waits for the sync that covers the write which set
 * them. That holds only while every write has succeeded: after one that failed, what the file holds of its pages is not
 * known, and everything is written again. A sync that failed is never tried again (I10, storage_posix.c): bits that
 * were durable before it stay (a page's sector is the old one, the new one, or does not check out), no new one becomes.
 *
 * Durable before what: a bit that the file shows when it is opened may lie in the page cache only (the process died
 * before its sync) or be on the disk's side of a sync that failed. intent_begin writes the set bits' pages once more
 * and syncs them, before anybody relies on such a bit. So with the file's name: a process that died in intent_end,
 * behind its rename, has left a name that a cut takes back, to an older file without the bits that were set since.
 *
 * The fine map: behind the pages a sector with a checksum over the whole map and the masks that follow it. intent_end
 * writes a new file with it, syncs it and renames it over the old one. intent_begin overwrites that one sector,
 * durably, before the volume may be written to: from then on no cut can bring it back, whatever the sector then holds
 * (zeroes, or torn, it does not check out). A kill or a cut before that finds it again, and nothing has been written
 * meanwhile.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/thread.h"
#include "core/range.h"
#include "core/repl_meta.h"
#include "image/intent.h"

#define INTENT_MAGIC "repfsint"
#define INTENT_VERSION 2
#define INTENT_VERSION_MIN 1 /* no fine map */
#define FINE_MAGIC "repfsfin"
/* Regions of a unit: the bits of one mask. */
#define FINE_SHIFT (INTENT_SHIFT - REGION_SHIFT)
#define FINE_MASK_SIZE 2U
#define PAGE_SIZE_BYTES 512U
#define PAGE_BITS_BYTES 508U
#define PAGE_BITS (PAGE_BITS_BYTES * 8U)
/* Pages written at a time. */
#define PAGES_CHUNK 128U
/* "volumes/NAME/intent.tmp" */
#define INTENT_PATH_SIZE (NAME_SIZE + 24)

_Static_assert(1U << FINE_SHIFT == 8 * FINE_MASK_SIZE, "a unit's regions fill a mask");

struct intent {
	struct storage *storage;
	char name[NAME_SIZE];
	struct disk *disk;
	bool durable;
	uint32_t version; /* of the file */
	uint64_t nbits, nregions, npages;
	uint8_t *fine;		    /* the masks as loaded, until intent_begin; NULL: none that counts */
	pthread_rwlock_t sync_lock; /* shared: a sync; exclusive: the file is opened anew. Before `lock` */
	struct mutex lock;
	uint8_t *bits; /* npages * PAGE_BITS_BYTES */
	uint64_t written, synced;
	bool write_failed, ended;
	bool unnamed;	     /* the file may be lost, with its name; what a power cut leaves is an older one */
	uint64_t grown_size; /* prepared: the volume's, and the larger map */
	uint8_t *grown;
};

static void page_encode(const struct intent *t, uint64_t page, uint8_t out[static PAGE_SIZE_BYTES])
{
	uint8_t number[8];

	put_u64(number, page);
	memcpy(out, t->bits + page * PAGE_BITS_BYTES, PAGE_BITS_BYTES);
	put_u32(out + PAGE_BITS_BYTES, crc32c(crc32c(0, number, sizeof(number)), out, PAGE_BITS_BYTES));
}

static void page_decode(struct intent *t, uint64_t page, const uint8_t in[static PAGE_SIZE_BYTES])
{
	uint8_t *bits = t->bits + page * PAGE_BITS_BYTES;
	uint8_t number[8];

	put_u64(number, page);
	if (get_u32(in + PAGE_BITS_BYTES) == crc32c(crc32c(0, number, sizeof(number)), in, PAGE_BITS_BYTES))
		memcpy(bits, in, PAGE_BITS_BYTES);
	else
		memset(bits, 0xff, PAGE_BITS_BYTES);
}

static void header_encode(uint8_t h[static PAGE_SIZE_BYTES])
{
	memset(h, 0, PAGE_SIZE_BYTES);
	memcpy(h, INTENT_MAGIC, 8);
	put_u32(h + 8, INTENT_VERSION);
	put_u32(h + 12, INTENT_SHIFT);
	put_u32(h + PAGE_BITS_BYTES, crc32c(0, h, PAGE_BITS_BYTES));
}

static int header_decode(const uint8_t h[static PAGE_SIZE_BYTES], const char *path, struct err *e)
{
	static const char what_to_do[] = "put it back from a backup, or remove it: the next sync is a full one then";

	if (memcmp(h, INTENT_MAGIC, 8) != 0)
		return err_set(e, ERR_CORRUPT, "open %s: not a write-intent map; %s", path, what_to_do);
	if (get_u32(h + PAGE_BITS_BYTES) != crc32c(0, h, PAGE_BITS_BYTES))
		return err_set(e, ERR_CORRUPT, "open %s: the checksum of its header does not match; %s", path,
			       what_to_do);
	if (get_u32(h + 8) < INTENT_VERSION_MIN || get_u32(h + 8) > INTENT_VERSION || get_u32(h + 12) != INTENT_SHIFT)
		return err_set(e, ERR_VERSION,
			       "open %s: it is of version %" PRIu32 " with 2^%" PRIu32
			       " bytes a bit, this program knows version %d with 2^%u; use the program that wrote it",
			       path, get_u32(h + 8), get_u32(h + 12), INTENT_VERSION, INTENT_SHIFT);
	return 0;
}

/* ---- reading and writing pages ---- */

static uint64_t page_off(uint64_t page)
{
	return (page + 1) * PAGE_SIZE_BYTES;
}

static int write_pages(struct intent *t, uint64_t first, uint64_t end) REQUIRES(t->lock)
{
	uint8_t buf[PAGES_CHUNK * PAGE_SIZE_BYTES];

	while (first < end) {
		uint64_t n = min_u64(end - first, PAGES_CHUNK);
		int rc;

		for (uint64_t i = 0; i < n; i++)
			page_encode(t, first + i, buf + i * PAGE_SIZE_BYTES);
		rc = disk_write(t->disk, page_off(first), buf, (size_t)n * PAGE_SIZE_BYTES);
		if (rc < 0)
			return rc;
		first += n;
	}
	return 0;
}

/* Pages that the file lacks read as zeroes, which do not check out. */
static int read_pages(struct intent *t)
{
	uint8_t buf[PAGES_CHUNK * PAGE_SIZE_BYTES];

	for (uint64_t first = 0; first < t->npages; first += PAGES_CHUNK) {
		uint64_t n = min_u64(t->npages - first, PAGES_CHUNK);
		int rc = disk_read(t->disk, page_off(first), buf, (size_t)n * PAGE_SIZE_BYTES);

		if (rc < 0)
			return rc;
		for (uint64_t i = 0; i < n; i++)
			page_decode(t, first + i, buf + i * PAGE_SIZE_BYTES);
	}
	return 0;
}

/* ---- the fine map ---- */

static bool bit_is_set(const struct intent *t, uint64_t bit)
{
	return t->bits[bit / 8] >> (bit % 8) & 1;
}

/* The first set bit at or after `bit`, nbits at least if there is none. */
static uint64_t next_set(const struct intent *t, uint64_t bit)
{
	while (bit < t->nbits && !bit_is_set(t, bit))
		bit += bit % 8 == 0 && t->bits[bit / 8] == 0 ? 8 : 1;
	return bit;
}

static uint64_t count_set(const struct intent *t)
{
	uint64_t n = 0;

	for (uint64_t bit = next_set(t, 0); bit < t->nbits; bit = next_set(t, bit + 1))
		n++;
	return n;
}

static void fine_header_encode(const struct intent *t, uint8_t h[static PAGE_SIZE_BYTES], uint64_t n,
			       const uint8_t *masks)
{
	memset(h, 0, PAGE_SIZE_BYTES);
	memcpy(h, FINE_MAGIC, 8);
	put_u64(h + 8, n);
	put_u32(h + 16, crc32c(crc32c(0, t->bits, t->npages * PAGE_BITS_BYTES), masks, n * FINE_MASK_SIZE));
	put_u32(h + PAGE_BITS_BYTES, crc32c(0, h, PAGE_BITS_BYTES));
}

/* A mask for each set bit, in their order. */
static int write_fine(struct intent *t, const struct bitmap *dirty)
{
	uint64_t n = count_set(t), i = 0;
	uint8_t header[PAGE_SIZE_BYTES];
	uint8_t *masks = calloc(n + 1, FINE_MASK_SIZE);
	int rc;

	if (!masks)
		return -ERR_NOMEM;
	for (uint64_t bit = next_set(t, 0); bit < t->nbits; bit = next_set(t, bit + 1), i++) {
		uint64_t first = bit << FINE_SHIFT, end = min_u64((bit + 1) << FINE_SHIFT, t->nregions);
		unsigned mask = 0;

		for (uint64_t r = first; r < end; r++)
			mask |= (unsigned)bitmap_test(dirty, r) << (r - first);
		put_u16(masks + i * FINE_MASK_SIZE, (uint16_t)mask);
	}
	fine_header_encode(t, header, n, masks);
	rc = disk_write(t->disk, page_off(t->npages), header, sizeof(header));
	if (rc == 0 && n > 0)
		rc = disk_write(t->disk, page_off(t->npages + 1), masks, n * FINE_MASK_SIZE);
	free(masks);
	return rc;
}

/* One that does not check out is none. The checksum covers the bits too: a map with a page that was lost, or that was
 * written to since, has no fine one. */
static int read_fine(struct intent *t)
{
	uint8_t header[PAGE_SIZE_BYTES], want[PAGE_SIZE_BYTES];
	uint64_t n = count_set(t);
	uint8_t *masks;
	int rc = disk_read(t->disk, page_off(t->npages), header, sizeof(header));

	if (rc < 0 || memcmp(header, FINE_MAGIC, 8) != 0 || get_u64(header + 8) != n)
		return rc;
	masks = malloc((n + 1) * FINE_MASK_SIZE);
	if (!masks)
		return -ERR_NOMEM;
	rc = disk_read(t->disk, page_off(t->npages + 1), masks, n * FINE_MASK_SIZE);
	fine_header_encode(t, want, n, masks);
	if (rc == 0 && memcmp(header, want, sizeof(want)) == 0)
		t->fine = masks;
	else
		free(masks);
	return rc;
}

bool intent_load_fine(struct intent *t, struct bitmap *dirty)
{
	uint64_t i = 0;

	PRE(dirty->nbits == t->nregions);
	if (!t->fine)
		return false;
	for (uint64_t bit = next_set(t, 0); bit < t->nbits; bit = next_set(t, bit + 1), i++) {
		unsigned mask = get_u16(t->fine + i * FINE_MASK_SIZE);
		uint64_t first = bit << FINE_SHIFT, end = min_u64((bit + 1) << FINE_SHIFT, t->nregions);

		for (uint64_t r = first; r < end; r++)
			if (mask >> (r - first) & 1)
				bitmap_set(dirty, r);
	}
	return true;
}

/* ---- opening ---- */

static void intent_paths(const struct intent *t, char dir[static INTENT_PATH_SIZE], char path[static INTENT_PATH_SIZE])
{
	snprintf(dir, INTENT_PATH_SIZE, "volumes/%.*s", NAME_MAX_LEN, t->name);
	snprintf(path, INTENT_PATH_SIZE, "volumes/%.*s/intent", NAME_MAX_LEN, t->name);
}

static int write_fine(struct intent *t, const struct bitmap *dirty);

/* Writes the whole map, with `dirty` as its fine map unless NULL, into *ret, which appears under the map's name only
 * when whole. Nobody else uses t. With an error *ret is NULL, or it has the name all the same, not durably: the file
 * before has none any more, so what is written on has to go there, and is not durable before a new one is (unnamed). */
static int write_new(struct intent *t, const struct bitmap *dirty, struct disk **ret) NO_THREAD_ANALYSIS
{
	char dir[INTENT_PATH_SIZE], path[INTENT_PATH_SIZE], tmp[INTENT_PATH_SIZE + 4];
	uint8_t header[PAGE_SIZE_BYTES];
	struct disk *old = t->disk, *made;
	int rc;

	*ret = NULL;
	intent_paths(t, dir, path);
	snprintf(tmp, sizeof(tmp), "%s.tmp", path);
	/* A new file, not one truncated: a leftover may have a failed sync behind it. */
	rc = storage_unlink(t->storage, tmp);
	if (rc == 0 || rc == -ERR_NOENT)
		rc = storage_open(t->storage, tmp, STORAGE_CREATE | STORAGE_EXCL, &t->disk);
	if (rc < 0)
		return rc;
	header_encode(header);
	rc = disk_write(t->disk, 0, header, sizeof(header));
	if (rc == 0)
		rc = write_pages(t, 0, t->npages);
	if (rc == 0 && dirty)
		rc = write_fine(t, dirty);
	if (rc == 0 && t->durable)
		rc = disk_sync(t->disk);
	if (rc == 0)
		rc = storage_rename(t->storage, tmp, path);
	made = t->disk;
	t->disk = old;
	if (rc < 0) {
		(void)storage_unlink(t->storage, tmp);
		disk_close(made);
		return rc;
	}
	*ret = made;
	rc = t->durable ? storage_sync_dir(t->storage, dir) : 0;
	t->unnamed = rc < 0;
	return rc;
}

static int read_fine(struct intent *t);

static int intent_read(struct intent *t, const char *path, struct err *e)
{
	uint8_t header[PAGE_SIZE_BYTES];
	int rc = disk_read(t->disk, 0, header, sizeof(header));

	if (rc < 0)
		return err_set(e, -rc, "open %s: reading its header: %s", path, err_short(rc));
	rc = header_decode(header, path, e);
	if (rc < 0)
		return rc;
	t->version = get_u32(header + 8);
	rc = read_pages(t);
	if (rc == 0 && t->version > INTENT_VERSION_MIN)
		rc = read_fine(t);
	if (rc < 0)
		return err_set(e, -rc, "open %s: reading its bits: %s", path, err_short(rc));
	return 0;
}

static int intent_open_file(struct intent *t, bool new_set, struct err *e)
{
	char dir[INTENT_PATH_SIZE], path[INTENT_PATH_SIZE];
	int rc;

	intent_paths(t, dir, path);
	rc = storage_open(t->storage, path, 0, &t->disk);
	if (rc == 0)
		return intent_read(t, path, e);
	if (rc == -ERR_NOENT) {
		memset(t->bits, new_set ? 0xff : 0, t->npages * PAGE_BITS_BYTES);
		t->version = INTENT_VERSION;
		rc = write_new(t, NULL, &t->disk);
		if (rc < 0)
			return err_set(e, -rc, "make %s: %s", path, err_short(rc));
		return 0;
	}
	return err_set(e, -rc, "open %s: %s", path, err_short(rc));
}

int intent_open(struct storage *s, const char *volume_name, uint64_t size, unsigned flags, struct intent **ret,
		struct err *e)
{
	struct intent *t;
	int rc;

	PRE(size > 0 && size <= VOLUME_SIZE_MAX);
	PRE(name_valid(volume_name));
	t = calloc(1, sizeof(*t));
	if (!t)
		return err_set(e, ERR_NOMEM, "open the write-intent map of %s: out of memory", volume_name);
	mutex_init(&t->lock);
	(void)pthread_rwlock_init(&t->sync_lock, NULL);
	t->storage = s;
	snprintf(t->name, sizeof(t->name), "%s", volume_name);
	t->durable = (flags & INTENT_DURABLE) != 0;
	t->nbits = units_of(size, INTENT_SHIFT);
	t->nregions = units_of(size, REGION_SHIFT);
	t->npages = (t->nbits + PAGE_BITS - 1) / PAGE_BITS;
	t->bits = calloc(t->npages, PAGE_BITS_BYTES);
	if (t->bits)
		rc = intent_open_file(t, (flags & INTENT_NEW_SET) != 0, e);
	else
		rc = err_set(e, ERR_NOMEM, "open the write-intent map of %s: out of memory", volume_name);
	if (rc < 0) {
		intent_close(t);
		return rc;
	}
	*ret = t;
	return 0;
}

void intent_close(struct intent *t)
{
	if (!t)
		return;
	disk_close(t->disk);
	mutex_destroy(&t->lock);
	free(t->fine);
	free(t->grown);
	(void)pthread_rwlock_destroy(&t->sync_lock);
	free(t->bits);
	free(t);
}

/* ---- use ---- */

void intent_load(struct intent *t, struct bitmap *b)
{
	uint64_t bit = 0, first;

	PRE(b->nbits == t->nbits);
	bitmap_clear_all(b);
	mutex_lock(&t->lock);
	while ((first = next_set(t, bit)) < t->nbits) {
		for (bit = first; bit < t->nbits && bit_is_set(t, bit); bit++)
			;
		bitmap_set_range(b, first, bit - first);
	}
	mutex_unlock(&t->lock);
}

/* True: some bit changed. */
static bool change_bits(struct intent *t, uint64_t first, uint64_t n, bool set) REQUIRES(t->lock)
{
	bool changed = false;

	for (uint64_t bit = first; bit < first + n; bit++) {
		uint8_t mask = (uint8_t)(1U << (bit % 8));

		changed = changed || bit_is_set(t, bit) != set;
		if (set)
			t->bits[bit / 8] |= mask;
		else
			t->bits[bit / 8] &= (uint8_t)~mask;
	}
	return changed;
}

int intent_write(struct intent *t, uint64_t first, uint64_t n, bool set)
{
	int rc = 0;

	PRE(first <= t->nbits && n <= t->nbits - first);
	if (n == 0)
		return 0;
	mutex_lock(&t->lock);
	if (t->ended) {
		rc = -ERR_STATE;
	} else if (change_bits(t, first, n, set) || t->write_failed) {
		t->written++;
		rc = write_pages(t, first / PAGE_BITS, (first + n - 1) / PAGE_BITS + 1);
		t->write_failed = t->write_failed || rc < 0;
	}
	mutex_unlock(&t->lock);
	return rc;
}

/* Two at once may both sync what one would have been enough for; callers that care make one of many (sync_in_rounds).
 */
int intent_sync(struct intent *t)
{
	uint64_t covers;
	bool needed, unnamed;
	int rc;

	if (!t->durable)
		return 0;
	mutex_lock(&t->lock);
	covers = t->written;
	needed = t->synced < covers;
	unnamed = t->unnamed;
	mutex_unlock(&t->lock);
	if (unnamed)
		return intent_reopen(t);
	if (!needed)
		return 0;
	(void)pthread_rwlock_rdlock(&t->sync_lock);
	rc = disk_sync(t->disk);
	(void)pthread_rwlock_unlock(&t->sync_lock);
	mutex_lock(&t->lock);
	if (rc == 0)
		t->synced = max_u64(t->synced, covers);
	mutex_unlock(&t->lock);
	return rc;
}

int intent_reopen(struct intent *t)
{
	struct disk *made;

	(void)pthread_rwlock_wrlock(&t->sync_lock);
	mutex_lock(&t->lock);
	int rc = write_new(t, NULL, &made);
	if (made) {
		disk_close(t->disk);
		t->disk = made;
		t->version = INTENT_VERSION;
	}
	if (rc == 0)
		t->synced = t->written;
	mutex_unlock(&t->lock);
	(void)pthread_rwlock_unlock(&t->sync_lock);
	return rc;
}

/* ---- growing ---- */

static uint64_t pages_of(uint64_t nbits)
{
	return (nbits + PAGE_BITS - 1) / PAGE_BITS;
}

/* Bits behind the end are what a map that was made all set left there: they count from now on. */
static void clear_tail(struct intent *t) REQUIRES(t->lock)
{
	for (uint64_t bit = t->nbits; bit < t->npages * PAGE_BITS; bit++)
		t->bits[bit / 8] &= (uint8_t) ~(1U << (bit % 8));
}

/* The new pages lie where a clean end puts its fine map, which does not count by now: one that is cut off is found by
 * an open for the old size, which looks at the old pages only. */
int intent_grow_prepare(struct intent *t, uint64_t size)
{
	uint8_t page[PAGE_SIZE_BYTES], number[8];
	uint64_t npages = pages_of(units_of(size, INTENT_SHIFT));
	uint8_t *bits = calloc(npages, PAGE_BITS_BYTES);
	int rc;

	PRE(size <= VOLUME_SIZE_MAX && units_of(size, INTENT_SHIFT) >= t->nbits);
	if (!bits)
		return -ERR_NOMEM;
	mutex_lock(&t->lock);
	free(t->grown);
	t->grown = bits;
	t->grown_size = size;
	clear_tail(t);
	t->written++;
	rc = t->ended ? -ERR_STATE : write_pages(t, t->npages - 1, t->npages);
	t->write_failed = t->write_failed || rc < 0;
	for (uint64_t p = t->npages; rc == 0 && p < npages; p++) {
		memset(page, 0, sizeof(page));
		put_u64(number, p);
		put_u32(page + PAGE_BITS_BYTES, crc32c(crc32c(0, number, sizeof(number)), page, PAGE_BITS_BYTES));
		rc = disk_write(t->disk, page_off(p), page, sizeof(page));
	}
	mutex_unlock(&t->lock);
	return rc == 0 ? intent_sync(t) : rc;
}

void intent_grow(struct intent *t)
{
	mutex_lock(&t->lock);
	PRE(t->grown != NULL);
	memcpy(t->grown, t->bits, t->npages * PAGE_BITS_BYTES);
	free(t->bits);
	t->bits = t->grown;
	t->grown = NULL;
	t->nbits = units_of(t->grown_size, INTENT_SHIFT);
	t->nregions = units_of(t->grown_size, REGION_SHIFT);
	t->npages = pages_of(t->nbits);
	mutex_unlock(&t->lock);
}

/* ---- beginning and ending ---- */

/* Runs of pages that have set bits. */
static int rewrite_set_pages(struct intent *t) REQUIRES(t->lock)
{
	uint64_t page = 0;
	int rc = 0;

	while (rc == 0 && page < t->npages) {
		uint64_t bit = next_set(t, page * PAGE_BITS), first = bit / PAGE_BITS;

		if (bit >= t->nbits)
			break;
		for (page = first + 1; page < t->npages && next_set(t, page * PAGE_BITS) < (page + 1) * PAGE_BITS;
		     page++)
			;
		rc = write_pages(t, first, page);
	}
	return rc;
}

/* Not only where a fine map counts: one that does not check out now might, as far as anybody knows, after a cut. */
static int void_fine(struct intent *t)
{
	static const uint8_t none[PAGE_SIZE_BYTES];
	uint64_t size;
	int rc = disk_get_size(t->disk, &size);

	if (rc < 0 || size <= page_off(t->npages))
		return rc;
	return disk_write(t->disk, page_off(t->npages), none, sizeof(none));
}

int intent_begin(struct intent *t, struct err *e)
{
	char dir[INTENT_PATH_SIZE], path[INTENT_PATH_SIZE];
	struct disk *d = NULL;
	int rc;

	mutex_lock(&t->lock);
	free(t->fine);
	t->fine = NULL;
	if (t->version < INTENT_VERSION) {
		/* A program that knows no fine map must not go on with this file once it may have one. */
		rc = write_new(t, NULL, &d);
		if (d) {
			disk_close(t->disk);
			t->disk = d;
			t->version = INTENT_VERSION;
		}
	} else {
		rc = t->durable ? rewrite_set_pages(t) : 0;
		if (rc == 0)
			rc = void_fine(t);
	}
	mutex_unlock(&t->lock);
	intent_paths(t, dir, path);
	if (rc == 0 && t->durable)
		rc = disk_sync(t->disk);
	if (rc == 0 && t->durable)
		rc = storage_sync_dir(t->storage, dir);
	if (rc < 0)
		return err_set(e, -rc, "write volumes/%s/intent: %s; look at the disk under the store", t->name,
			       err_short(rc));
	return 0;
}

int intent_end(struct intent *t, const struct bitmap *dirty)
{
	const struct bitmap *b = dirty;
	struct disk *d;
	int rc;

	PRE(b->nbits == t->nregions);
	mutex_lock(&t->lock);
	t->ended = true;
	/* Regions of a union that was cut off may be dirty in memory only. */
	for (uint64_t r = bitmap_next_set(b, 0); r != BITMAP_NONE;) {
		uint64_t unit = r >> FINE_SHIFT, next = (unit + 1) << FINE_SHIFT;

		(void)change_bits(t, unit, 1, true);
		r = next < b->nbits ? bitmap_next_set(b, next) : BITMAP_NONE;
	}
	rc = write_new(t, dirty, &d);
	disk_close(d);
	mutex_unlock(&t->lock);
	return rc;
}
