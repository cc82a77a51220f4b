/* An overlay on a data file and a map of checksums (image/overlay.h).
 *
 * Order of writing, for each block: data, then its word in the map, then its bit in memory; the caller puts syncs
 * between them where power may fail. So a word that is there always has its data (I9), and a bit always has its word.
 *
 * What lies in the data file under a word of 0 counts as nothing: a save that was cut off leaves bytes there. That is
 * why a block of zeroes may be left out only over a hole of the data file, which is asked of the file itself; over
 * anything else a hole is punched. The question costs one lseek a run of zero blocks, less than the write it saves.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "image/overlay.h"
#include "image/zero.h"

#define WORD_SIZE 4U
#define WORD_ABSENT 0U
#define WORD_UNCHECKED OVERLAY_UNCHECKED
#define WORD_CRC_MIN 2U
/* Words written or read at a time. */
#define WORDS_CHUNK 4096U

struct overlay {
	struct disk *data, *map;
	uint64_t blocks;
	uint32_t zero_word; /* of a block of zeroes */
	bool durable;
	bool unsure; /* a put of words failed: blocks that are not held may have one all the same */
	struct held held;
	bool cached;
	bool marked; /* a word above WORD_UNCHECKED was there when it was opened */
};

static const uint8_t zero_block[BLOCK_SIZE];

static uint32_t word_of(const void *block)
{
	uint32_t crc = crc32c(0, block, BLOCK_SIZE);

	return crc < WORD_CRC_MIN ? WORD_CRC_MIN : crc;
}

static bool run_fits(const struct overlay *o, uint64_t block, uint32_t n)
{
	return block < o->blocks && n <= o->blocks - block;
}

/* ---- making, opening ---- */

static int overlay_new(uint64_t volume_size, struct overlay **ret)
{
	struct overlay *o = calloc(1, sizeof(*o));

	PRE(volume_size > 0 && volume_size <= VOLUME_SIZE_MAX);
	if (!o)
		return -ERR_NOMEM;
	o->blocks = overlay_blocks_in(volume_size);
	o->zero_word = word_of(zero_block);
	o->durable = true;
	if (held_init(&o->held, o->blocks) < 0) {
		free(o);
		return -ERR_NOMEM;
	}
	*ret = o;
	return 0;
}

void overlay_close(struct overlay *o)
{
	if (!o)
		return;
	disk_close(o->data);
	disk_close(o->map);
	held_free(&o->held);
	free(o);
}

static int path_of(char out[static STORAGE_PATH_MAX + 1], const char *path, const char *suffix)
{
	int n = snprintf(out, STORAGE_PATH_MAX + 1, "%s.%s", path, suffix);

	return n < 0 || n > STORAGE_PATH_MAX ? -ERR_RANGE : 0;
}

static int open_file(struct storage *s, const char *path, const char *suffix, unsigned flags, struct disk **ret)
{
	char name[STORAGE_PATH_MAX + 1];
	int rc = path_of(name, path, suffix);

	return rc < 0 ? rc : storage_open(s, name, flags, ret);
}

int overlay_unlink(struct storage *s, const char *path)
{
	/* The map first: data without a map is nothing, a map without its data is an odd overlay. */
	static const char *const suffixes[] = {"map", "data"};
	char name[STORAGE_PATH_MAX + 1];

	for (size_t i = 0; i < ARRAY_LEN(suffixes); i++) {
		int rc = path_of(name, path, suffixes[i]);

		if (rc == 0)
			rc = storage_unlink(s, name);
		if (rc < 0 && rc != -ERR_NOENT)
			return rc;
	}
	return 0;
}

int overlay_create(struct storage *s, const char *path, uint64_t volume_size, struct overlay **ret, struct err *e)
{
	struct overlay *o;
	/* New files, not truncated ones: a leftover's blocks can't come back under this name after a power cut. */
	int rc = overlay_unlink(s, path);

	if (rc == 0)
		rc = overlay_new(volume_size, &o);
	if (rc < 0)
		return err_set(e, -rc, "make overlay %s: %s", path, err_short(rc));
	rc = open_file(s, path, "data", STORAGE_CREATE | STORAGE_EXCL, &o->data);
	if (rc == 0)
		rc = open_file(s, path, "map", STORAGE_CREATE | STORAGE_EXCL, &o->map);
	if (rc < 0) {
		overlay_close(o);
		(void)overlay_unlink(s, path);
		return err_set(e, -rc, "make overlay %s: %s; look at the filesystem under the store", path,
			       err_short(rc));
	}
	*ret = o;
	return 0;
}

typedef int map_fn(struct overlay *o, void *arg, uint64_t block, const uint8_t *words, uint32_t n);

/* Calls fn for each run of up to WORDS_CHUNK words in the map's data extents, first to last. */
static int map_walk(struct overlay *o, map_fn *fn, void *arg)
{
	uint64_t off = 0, end = o->blocks * WORD_SIZE;
	uint8_t *buf = malloc((size_t)WORDS_CHUNK * WORD_SIZE);
	int rc = 0;

	if (!buf)
		return -ERR_NOMEM;
	while (rc == 0 && off < end) {
		struct extent x;
		uint64_t len;

		rc = disk_extent(o->map, off, end, &x);
		if (rc < 0)
			break;
		/* An extent that ends inside a word leaves that word to the next. */
		len = round_down_u64(x.len, WORD_SIZE);
		if (!x.data && len > 0) {
			off += len;
			continue;
		}
		len = min_u64(max_u64(len, WORD_SIZE), (uint64_t)WORDS_CHUNK * WORD_SIZE);
		rc = disk_read(o->map, off, buf, (size_t)len);
		if (rc == 0)
			rc = fn(o, arg, off / WORD_SIZE, buf, (uint32_t)(len / WORD_SIZE));
		off += len;
	}
	free(buf);
	return rc;
}

static int load_words(struct overlay *o, void *arg, uint64_t block, const uint8_t *words, uint32_t n)
{
	uint32_t i = 0, first;

	(void)arg;
	for (uint32_t k = 0; k < n && !o->marked; k++)
		o->marked = get_u32(words + (size_t)k * WORD_SIZE) > WORD_UNCHECKED;
	while (i < n) {
		if (get_u32(words + (size_t)i * WORD_SIZE) == WORD_ABSENT) {
			i++;
			continue;
		}
		for (first = i; i < n && get_u32(words + (size_t)i * WORD_SIZE) != WORD_ABSENT; i++)
			;
		bitmap_set_range(&o->held.bits, block + first, i - first);
	}
	return 0;
}

/* Cuts off what a write that was killed left of a word at the end of the map: it counts as never written. */
static int check_sizes(struct overlay *o, const char *path, struct err *e)
{
	uint64_t data = 0, map = 0;
	int rc = disk_get_size(o->data, &data);

	if (rc == 0)
		rc = disk_get_size(o->map, &map);
	if (rc == 0 && map % WORD_SIZE != 0)
		rc = disk_set_size(o->map, round_down_u64(map, WORD_SIZE));
	if (rc < 0)
		return err_set(e, -rc, "open overlay %s: %s", path, err_short(rc));
	if (map > o->blocks * WORD_SIZE || data > o->blocks * BLOCK_SIZE)
		return err_set(e, ERR_CORRUPT,
			       "open overlay %s: %s.map (%" PRIu64 " bytes) or %s.data (%" PRIu64
			       " bytes) is larger than an overlay of %" PRIu64
			       " blocks can be; put both files back from a backup or drop this checkpoint",
			       path, path, map, path, data, o->blocks);
	return 0;
}

static int open_parts(struct overlay *o, struct storage *s, const char *path, struct err *e)
{
	static const char *const suffixes[] = {"data", "map"};
	struct disk **files[] = {&o->data, &o->map};
	int rc;

	for (size_t i = 0; i < ARRAY_LEN(suffixes); i++) {
		rc = open_file(s, path, suffixes[i], STORAGE_FRESH, files[i]);
		if (rc == -ERR_NOENT || rc == -ERR_NOTSUP)
			return err_set(
			    e, ERR_CORRUPT,
			    "open overlay %s: %s.%s is %s; put it back from a backup or drop this checkpoint", path,
			    path, suffixes[i], rc == -ERR_NOENT ? "missing" : "not a file");
		if (rc < 0)
			return err_set(e, -rc, "open overlay %s: %s.%s: %s", path, path, suffixes[i], err_short(rc));
	}
	rc = check_sizes(o, path, e);
	if (rc < 0)
		return rc;
	rc = map_walk(o, load_words, NULL);
	if (rc < 0)
		return err_set(e, -rc, "open overlay %s: reading %s.map: %s", path, path, err_short(rc));
	return 0;
}

int overlay_open(struct storage *s, const char *path, uint64_t volume_size, struct overlay **ret, struct err *e)
{
	struct overlay *o;
	int rc = overlay_new(volume_size, &o);

	if (rc < 0)
		return err_set(e, -rc, "open overlay %s: %s", path, err_short(rc));
	rc = open_parts(o, s, path, e);
	if (rc < 0) {
		overlay_close(o);
		return rc;
	}
	*ret = o;
	return 0;
}

void overlay_take_over(struct overlay *o, const struct overlay *from)
{
	PRE(o->blocks >= from->blocks);
	PRE(!o->held.list);
	bitmap_clear_all(&o->held.bits);
	for (uint64_t at = bits_next_set(&from->held, 0, from->blocks), end; at < from->blocks;
	     at = bits_next_set(&from->held, end, from->blocks)) {
		end = bits_next_clear(&from->held, at, from->blocks);
		bitmap_set_range(&o->held.bits, at, end - at);
	}
	o->unsure = from->unsure;
}

size_t overlay_grow_bytes(uint64_t volume_size)
{
	return bitmap_bytes(overlay_blocks_in(volume_size));
}

void overlay_grow(struct overlay *o, uint64_t volume_size, void *memory)
{
	PRE(overlay_blocks_in(volume_size) >= o->blocks);
	held_grow(&o->held, overlay_blocks_in(volume_size), memory);
	o->blocks = overlay_blocks_in(volume_size);
}

void overlay_set_durable(struct overlay *o, bool durable)
{
	o->durable = durable;
}

/* ---- what it holds ---- */

bool overlay_has(const struct overlay *o, uint64_t block)
{
	return block < o->blocks && held_test(&o->held, block);
}

uint64_t overlay_count(const struct overlay *o)
{
	return held_count(&o->held);
}

bool overlay_unsure(const struct overlay *o)
{
	return __atomic_load_n(&o->unsure, __ATOMIC_RELAXED);
}

const struct held *overlay_held(const struct overlay *o)
{
	return &o->held;
}

void overlay_seal(struct overlay *o, struct held_list *list, struct held *old)
{
	held_seal(&o->held, list, old);
}

void overlay_cache(struct overlay *o, struct filecache *c, struct storage *s, const char *path)
{
	char name[STORAGE_PATH_MAX + 1];

	if (o->cached)
		return;
	if (path_of(name, path, "data") == 0)
		(void)filecache_add(c, s, name, &o->data);
	if (path_of(name, path, "map") == 0)
		(void)filecache_add(c, s, name, &o->map);
	o->cached = true;
}

int overlay_allocated(struct overlay *o, uint64_t *ret)
{
	uint64_t data, map;
	int rc = disk_allocated(o->data, &data);

	if (rc == 0)
		rc = disk_allocated(o->map, &map);
	if (rc == 0)
		*ret = data + map;
	return rc;
}

int overlay_read(struct overlay *o, uint64_t block, uint32_t off, void *buf, uint32_t len)
{
	uint8_t whole[BLOCK_SIZE], stored[WORD_SIZE];
	uint32_t word;
	int rc;

	PRE(overlay_has(o, block));
	PRE(off <= BLOCK_SIZE && len <= BLOCK_SIZE - off);
	rc = disk_read(o->map, block * WORD_SIZE, stored, WORD_SIZE);
	if (rc == 0)
		rc = disk_read(o->data, block * BLOCK_SIZE, whole, BLOCK_SIZE);
	if (rc < 0)
		return rc;
	word = get_u32(stored);
	if (word == WORD_ABSENT || (word != WORD_UNCHECKED && word != word_of(whole)))
		return -ERR_CORRUPT;
	memcpy(buf, whole + off, len);
	return 0;
}

/* ---- writing ---- */

/* Writes words (NULL: `same` for all n) to the map. */
static int write_words(struct overlay *o, uint64_t block, uint32_t n, const uint32_t *words, uint32_t same)
{
	uint8_t buf[WORDS_CHUNK * WORD_SIZE];

	while (n > 0) {
		uint32_t part = n < WORDS_CHUNK ? n : WORDS_CHUNK;
		int rc;

		for (uint32_t i = 0; i < part; i++)
			put_u32(buf + (size_t)i * WORD_SIZE, words ? words[i] : same);
		rc = disk_write(o->map, block * WORD_SIZE, buf, (size_t)part * WORD_SIZE);
		if (rc < 0)
			return rc;
		block += part;
		n -= part;
		words = words ? words + part : NULL;
	}
	return 0;
}

/* Those of the run that are there lose their checksums before their data changes. Those that are not lose a word that
 * a failed overlay_put_map, or sync, may have left: it would not fit what is written now. */
static int mark_replaced(struct overlay *o, uint64_t block, uint32_t n)
{
	bool unsure = overlay_unsure(o), marked = false;
	uint64_t at = block, end = block + n;

	while (at < end && (unsure || bits_next_set(&o->held, at, end) < end)) {
		bool held = held_test(&o->held, at);
		uint64_t stop = held ? bits_next_clear(&o->held, at, end) : bits_next_set(&o->held, at, end);
		int rc = held || unsure
			     ? write_words(o, at, (uint32_t)(stop - at), NULL, held ? WORD_UNCHECKED : WORD_ABSENT)
			     : 0;

		if (rc < 0)
			return rc;
		marked = marked || held || unsure;
		at = stop;
	}
	return marked && o->durable ? overlay_sync_map(o) : 0;
}

/* [off, end) of the data file is to read as zeroes; holes do so already. */
static int put_zeroes(struct overlay *o, uint64_t off, uint64_t end)
{
	while (off < end) {
		struct extent x;
		int rc = disk_extent(o->data, off, end, &x);

		if (rc == 0 && x.data)
			rc = disk_zero(o->data, x.off, x.len, true);
		if (rc < 0)
			return rc;
		off = x.off + x.len;
	}
	return 0;
}

int overlay_put_data(struct overlay *o, uint64_t block, uint32_t n, const void *data, uint32_t *words)
{
	const uint8_t *p = data;
	uint32_t i = 0, first;
	int rc;

	if (!run_fits(o, block, n))
		return -ERR_RANGE;
	rc = mark_replaced(o, block, n);
	while (rc == 0 && i < n) {
		bool zero = zero_is(p + (size_t)i * BLOCK_SIZE, BLOCK_SIZE);

		first = i;
		do {
			words[i] = zero ? o->zero_word : word_of(p + (size_t)i * BLOCK_SIZE);
			i++;
		} while (i < n && zero_is(p + (size_t)i * BLOCK_SIZE, BLOCK_SIZE) == zero);
		if (zero)
			rc = put_zeroes(o, (block + first) * BLOCK_SIZE, (block + i) * BLOCK_SIZE);
		else
			rc = disk_write(o->data, (block + first) * BLOCK_SIZE, p + (size_t)first * BLOCK_SIZE,
					(size_t)(i - first) * BLOCK_SIZE);
	}
	return rc;
}

int overlay_put_map(struct overlay *o, uint64_t block, uint32_t n, const uint32_t *words)
{
	int rc = run_fits(o, block, n) ? write_words(o, block, n, words, WORD_ABSENT) : -ERR_RANGE;

	if (rc < 0)
		__atomic_store_n(&o->unsure, true, __ATOMIC_RELAXED);
	return rc;
}

int overlay_take_back(struct overlay *o, uint64_t block, uint32_t n)
{
	uint64_t end = block + n, stop;
	int rc = 0;

	PRE(run_fits(o, block, n));
	for (uint64_t at = bits_next_clear(&o->held, block, end); rc == 0 && at < end;
	     at = bits_next_clear(&o->held, stop, end)) {
		stop = bits_next_set(&o->held, at, end);
		rc = write_words(o, at, (uint32_t)(stop - at), NULL, WORD_ABSENT);
	}
	return rc;
}

void overlay_publish(struct overlay *o, uint64_t block, uint32_t n)
{
	PRE(run_fits(o, block, n));
	PRE(!o->held.list);
	bitmap_set_range(&o->held.bits, block, n);
}

struct disk *overlay_data(struct overlay *o)
{
	return o->data;
}

int overlay_get_word(struct overlay *o, uint64_t block, uint32_t *ret)
{
	uint8_t stored[WORD_SIZE];
	int rc;

	PRE(overlay_has(o, block));
	rc = disk_read(o->map, block * WORD_SIZE, stored, WORD_SIZE);
	if (rc == 0)
		*ret = get_u32(stored);
	return rc;
}

struct each_marked {
	int (*fn)(void *arg, uint64_t block, uint32_t word);
	void *arg;
};

static int each_marked_of(struct overlay *o, void *arg, uint64_t block, const uint8_t *words, uint32_t n)
{
	const struct each_marked *each = arg;
	int rc = 0;

	(void)o;
	for (uint32_t i = 0; rc == 0 && i < n; i++) {
		uint32_t word = get_u32(words + (size_t)i * WORD_SIZE);

		if (word > WORD_UNCHECKED)
			rc = each->fn(each->arg, block + i, word);
	}
	return rc;
}

int overlay_each_marked(struct overlay *o, int (*fn)(void *arg, uint64_t block, uint32_t word), void *arg)
{
	return o->marked ? map_walk(o, each_marked_of, &(struct each_marked){fn, arg}) : 0;
}

void overlay_forget(struct overlay *o)
{
	disk_forget(o->data, 0, 0);
	disk_forget(o->map, 0, 0);
}

int overlay_sync_data(struct overlay *o)
{
	return disk_sync(o->data);
}

/* What it has lost may be words that were taken back. */
int overlay_sync_map(struct overlay *o)
{
	int rc = disk_sync(o->map);

	if (rc < 0)
		__atomic_store_n(&o->unsure, true, __ATOMIC_RELAXED);
	return rc;
}

/* ---- check ---- */

static int check_words(struct overlay *o, void *arg, uint64_t block, const uint8_t *words, uint32_t n)
{
	uint64_t *there = arg;

	for (uint32_t i = 0; i < n; i++) {
		bool word = get_u32(words + (size_t)i * WORD_SIZE) != WORD_ABSENT;

		INVARIANT(word == held_test(&o->held, block + i));
		*there += word;
	}
	return 0;
}

void overlay_check(struct overlay *o)
{
	uint64_t there = 0;

	if (!o->held.list)
		bitmap_check(&o->held.bits);
	INVARIANT(map_walk(o, check_words, &there) == 0);
	INVARIANT(there == overlay_count(o));
}
