/* The write-intent map in a file of sectors (image/intent.h, docs/format.md).
 *
 * Sector 0 is the header, each further one a page: 508 bytes of bits and a CRC-32C over the page's number and them.
 * A page that does not check out, whatever the cause (a torn write, the medium), reads as all set: more is resynced
 * than needed, never less. Pages are never left to holes, so a page lost by the filesystem does not check out either.
 *
 * All bits are kept in memory too, because a page is written whole. `lock` covers them and the order in which the
 * images of one page reach the file; it is held across that write to the page cache, and never across a sync.
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
#define INTENT_VERSION 1
#define PAGE_SIZE_BYTES 512U
#define PAGE_BITS_BYTES 508U
#define PAGE_BITS (PAGE_BITS_BYTES * 8U)
/* Pages written at a time. */
#define PAGES_CHUNK 128U
/* "volumes/NAME/intent.tmp" */
#define INTENT_PATH_SIZE (NAME_SIZE + 24)

struct intent {
	struct disk *disk;
	bool durable;
	uint64_t nbits, npages;
	struct mutex lock;
	uint8_t *bits; /* npages * PAGE_BITS_BYTES */
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
	static const char what_to_do[] = "remove it while the group is stopped, then the next sync must be a full one";

	if (memcmp(h, INTENT_MAGIC, 8) != 0)
		return err_set(e, ERR_CORRUPT, "open %s: not a write-intent map; %s", path, what_to_do);
	if (get_u32(h + PAGE_BITS_BYTES) != crc32c(0, h, PAGE_BITS_BYTES))
		return err_set(e, ERR_CORRUPT, "open %s: the checksum of its header does not match; %s", path,
			       what_to_do);
	if (get_u32(h + 8) != INTENT_VERSION || get_u32(h + 12) != INTENT_SHIFT)
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

/* ---- opening ---- */

/* A map appears under its name only when whole. */
static int intent_make(struct intent *t, struct storage *s, const char *dir, const char *path) NO_THREAD_ANALYSIS
{
	uint8_t header[PAGE_SIZE_BYTES];
	char tmp[INTENT_PATH_SIZE + 4];
	int rc;

	snprintf(tmp, sizeof(tmp), "%s.tmp", path);
	rc = storage_open(s, tmp, STORAGE_CREATE | STORAGE_TRUNC, &t->disk);
	if (rc < 0)
		return rc;
	header_encode(header);
	rc = disk_write(t->disk, 0, header, sizeof(header));
	if (rc == 0)
		rc = write_pages(t, 0, t->npages);
	if (rc == 0 && t->durable)
		rc = disk_sync(t->disk);
	if (rc == 0)
		rc = storage_rename(s, tmp, path);
	if (rc == 0 && t->durable)
		rc = storage_sync_dir(s, dir);
	if (rc < 0)
		(void)storage_unlink(s, tmp);
	return rc;
}

static int intent_read(struct intent *t, const char *path, struct err *e)
{
	uint8_t header[PAGE_SIZE_BYTES];
	int rc = disk_read(t->disk, 0, header, sizeof(header));

	if (rc < 0)
		return err_set(e, -rc, "open %s: reading its header: %s", path, err_short(rc));
	rc = header_decode(header, path, e);
	if (rc < 0)
		return rc;
	rc = read_pages(t);
	if (rc < 0)
		return err_set(e, -rc, "open %s: reading its bits: %s", path, err_short(rc));
	return 0;
}

static int intent_open_file(struct intent *t, struct storage *s, const char *volume_name, struct err *e)
{
	char dir[INTENT_PATH_SIZE], path[INTENT_PATH_SIZE];
	int rc;

	PRE(name_valid(volume_name));
	snprintf(dir, sizeof(dir), "volumes/%.*s", NAME_MAX_LEN, volume_name);
	snprintf(path, sizeof(path), "volumes/%.*s/intent", NAME_MAX_LEN, volume_name);
	rc = storage_open(s, path, 0, &t->disk);
	if (rc == 0)
		return intent_read(t, path, e);
	if (rc == -ERR_NOENT) {
		rc = intent_make(t, s, dir, path);
		if (rc < 0)
			return err_set(e, -rc, "make %s: %s", path, err_short(rc));
		return 0;
	}
	return err_set(e, -rc, "open %s: %s", path, err_short(rc));
}

int intent_open(struct storage *s, const char *volume_name, uint64_t size, bool durable, struct intent **ret,
		struct err *e)
{
	struct intent *t;
	int rc;

	PRE(size > 0 && size <= VOLUME_SIZE_MAX);
	t = calloc(1, sizeof(*t));
	if (!t)
		return err_set(e, ERR_NOMEM, "open the write-intent map of %s: out of memory", volume_name);
	mutex_init(&t->lock);
	t->durable = durable;
	t->nbits = units_of(size, INTENT_SHIFT);
	t->npages = (t->nbits + PAGE_BITS - 1) / PAGE_BITS;
	t->bits = calloc(t->npages, PAGE_BITS_BYTES);
	if (t->bits)
		rc = intent_open_file(t, s, volume_name, e);
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
	free(t->bits);
	free(t);
}

/* ---- use ---- */

static bool bit_is_set(const struct intent *t, uint64_t bit)
{
	return t->bits[bit / 8] >> (bit % 8) & 1;
}

void intent_load(struct intent *t, struct bitmap *b)
{
	uint64_t bit = 0, first;

	PRE(b->nbits == t->nbits);
	bitmap_clear_all(b);
	mutex_lock(&t->lock);
	while (bit < t->nbits) {
		if (!bit_is_set(t, bit)) {
			bit += bit % 8 == 0 && t->bits[bit / 8] == 0 ? 8 : 1;
			continue;
		}
		for (first = bit; bit < t->nbits && bit_is_set(t, bit); bit++)
			;
		bitmap_set_range(b, first, bit - first);
	}
	mutex_unlock(&t->lock);
}

int intent_write(struct intent *t, uint64_t first, uint64_t n, bool set)
{
	int rc;

	PRE(first <= t->nbits && n <= t->nbits - first);
	if (n == 0)
		return 0;
	mutex_lock(&t->lock);
	for (uint64_t bit = first; bit < first + n; bit++) {
		uint8_t mask = (uint8_t)(1U << (bit % 8));

		if (set)
			t->bits[bit / 8] |= mask;
		else
			t->bits[bit / 8] &= (uint8_t)~mask;
	}
	rc = write_pages(t, first / PAGE_BITS, (first + n - 1) / PAGE_BITS + 1);
	mutex_unlock(&t->lock);
	return rc;
}

int intent_sync(struct intent *t)
{
	return t->durable ? disk_sync(t->disk) : 0;
}
