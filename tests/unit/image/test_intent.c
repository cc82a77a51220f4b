/* The write-intent map: set bits survive everything, and in doubt everything is set. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/bytes.h"
#include "core/range.h"
#include "image/intent.h"
#include "tests/unit/image/crashstore.h"
#include "tests/unit/image/tmpdir.h"

static struct tmpdir dir;
static struct storage *s;

static void setup(void)
{
	tmpdir_make(&dir);
	cr_assert_eq(storage_posix_open(dir.path, &s), 0);
	cr_assert_eq(storage_mkdir(s, "volumes"), 0);
	cr_assert_eq(storage_mkdir(s, "volumes/v"), 0);
}

static void teardown(void)
{
	storage_close(s);
	tmpdir_remove(&dir);
}

TestSuite(intent, .init = setup, .fini = teardown);

#define FILE_NAME "volumes/v/intent"
#define PAGE_BITS (508U * 8U)

static struct intent *open_map(uint64_t bits)
{
	struct intent *t;

	cr_assert_eq(intent_open(s, "v", bits << INTENT_SHIFT, INTENT_DURABLE, &t, NULL), 0);
	return t;
}

/* Owned: free b->words' memory through *mem. Poisoned beforehand, intent_load must say all bits. */
static struct bitmap loaded(struct intent *t, uint64_t bits, void **mem)
{
	struct bitmap b;

	*mem = calloc(1, bitmap_bytes(bits));
	bitmap_init(&b, bits, *mem);
	bitmap_set_range(&b, 0, bits / 2);
	intent_load(t, &b);
	bitmap_check(&b);
	return b;
}

static uint64_t count_bits(uint64_t bits)
{
	struct intent *t = open_map(bits);
	void *mem;
	uint64_t n = loaded(t, bits, &mem).count;

	free(mem);
	intent_close(t);
	return n;
}

Test(intent, a_new_map_is_clear_and_whole)
{
	cr_assert_eq(count_bits(10000), 0);
	cr_assert_eq(tmpdir_size(&dir, FILE_NAME), 512 * (1 + 3));
	cr_assert_not(tmpdir_has(&dir, FILE_NAME ".tmp"));
	intent_close(NULL);
}

Test(intent, bits_survive)
{
	const uint64_t bits = 3 * PAGE_BITS + 17;
	struct intent *t = open_map(bits);
	struct bitmap b;
	void *mem;

	cr_assert_eq(intent_write(t, 5, 1, true), 0);
	cr_assert_eq(intent_write(t, PAGE_BITS - 3, 7, true), 0); /* over two pages */
	cr_assert_eq(intent_write(t, bits - 1, 1, true), 0);
	cr_assert_eq(intent_write(t, 100, 50, true), 0);
	cr_assert_eq(intent_write(t, 110, 30, false), 0);
	cr_assert_eq(intent_write(t, 7, 0, true), 0);
	cr_assert_eq(intent_sync(t), 0);
	intent_close(t);
	t = open_map(bits);
	b = loaded(t, bits, &mem);
	cr_assert_eq(b.count, 1 + 7 + 1 + 20);
	cr_assert(bitmap_test(&b, 5) && bitmap_test(&b, bits - 1));
	for (uint64_t i = PAGE_BITS - 3; i < PAGE_BITS + 4; i++)
		cr_assert(bitmap_test(&b, i));
	cr_assert(bitmap_test(&b, 109) && !bitmap_test(&b, 110) && !bitmap_test(&b, 139) && bitmap_test(&b, 140));
	free(mem);
	intent_close(t);
}

Test(intent, the_file_is_that_of_the_format)
{
	uint8_t want[1024] = {0}, got[1024], number[8] = {0};
	struct intent *t = open_map(100);

	cr_assert_eq(intent_write(t, 9, 2, true), 0);
	intent_close(t);
	memcpy(want, "repfsint", 8);
	put_u32(want + 8, 2);
	put_u32(want + 12, 20);
	put_u32(want + 508, crc32c(0, want, 508));
	want[512 + 1] = 0x06;
	put_u32(want + 512 + 508, crc32c(crc32c(0, number, 8), want + 512, 508));
	cr_assert_eq(tmpdir_read(&dir, FILE_NAME, got, sizeof(got), 0), sizeof(got));
	cr_assert_arr_eq(got, want, sizeof(want));
}

Test(intent, a_bad_page_is_all_set)
{
	const uint64_t bits = 3 * PAGE_BITS;
	uint8_t zero[512] = {0}, page[512];

	cr_assert_eq(count_bits(bits), 0);
	tmpdir_write(&dir, FILE_NAME, "\x01", 1, 512 * 2 + 100);
	cr_assert_eq(count_bits(bits), PAGE_BITS);
	tmpdir_write(&dir, FILE_NAME, zero, 512, 512 * 2); /* as a hole reads */
	cr_assert_eq(count_bits(bits), PAGE_BITS);
	/* A page at the wrong place. */
	tmpdir_read(&dir, FILE_NAME, page, 512, 512);
	tmpdir_write(&dir, FILE_NAME, page, 512, 512 * 2);
	cr_assert_eq(count_bits(bits), PAGE_BITS);
}

Test(intent, a_short_map_is_completed_with_set_bits)
{
	struct intent *t;

	cr_assert_eq(count_bits(PAGE_BITS), 0);
	/* The volume grew: within the page its bits were clear, in a new page they are set. */
	cr_assert_eq(count_bits(2 * PAGE_BITS + 5), PAGE_BITS + 5);
	cr_assert_eq(truncate(tmpdir_at(&dir, FILE_NAME), 700), 0);
	cr_assert_eq(count_bits(PAGE_BITS), PAGE_BITS);
	t = open_map(PAGE_BITS);
	cr_assert_eq(intent_write(t, 0, PAGE_BITS, false), 0);
	intent_close(t);
	cr_assert_eq(count_bits(PAGE_BITS), 0);
}

Test(intent, bad_headers_are_refused_by_name)
{
	struct intent *t = (struct intent *)1;
	uint8_t header[512] = {0};
	struct err e = {0};

	cr_assert_eq(count_bits(10), 0);
	tmpdir_write(&dir, FILE_NAME, "\x07", 1, 300);
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, INTENT_DURABLE, &t, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, FILE_NAME), "%s", e.text);
	tmpdir_write(&dir, FILE_NAME, "X", 1, 0);
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, INTENT_DURABLE, &t, &e), -ERR_CORRUPT);
	memcpy(header, "repfsint", 8);
	put_u32(header + 8, 3);
	put_u32(header + 12, 20);
	put_u32(header + 508, crc32c(0, header, 508));
	tmpdir_write(&dir, FILE_NAME, header, 512, 0);
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, INTENT_DURABLE, &t, &e), -ERR_VERSION);
	cr_assert_not_null(strstr(e.text, "version 3"), "%s", e.text);
	cr_assert_eq(truncate(tmpdir_at(&dir, FILE_NAME), 0), 0);
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, INTENT_DURABLE, &t, &e), -ERR_CORRUPT);
	cr_assert_eq(t, (struct intent *)1);
}

struct setter {
	struct intent *t;
	pthread_barrier_t *start;
	uint64_t bit;
	int file, rc;
	unsigned lost;
};

static void *toggle_bit(void *arg)
{
	struct setter *w = arg;

	pthread_barrier_wait(w->start);
	for (unsigned i = 0; i < 20000 && w->rc == 0; i++) {
		bool set = i % 2 == 1;
		uint8_t byte = 0;

		w->rc = intent_write(w->t, w->bit, 1, set);
		if (w->rc == 0 && pread(w->file, &byte, 1, (off_t)(512 + w->bit / 8)) == 1)
			w->lost += (byte >> (w->bit % 8) & 1) != set;
	}
	return NULL;
}

/* Eight threads clear and set the bits of one byte, each its own: what each wrote last is in the file. */
Test(intent, concurrent_sets_lose_nothing)
{
	pthread_barrier_t start;
	struct setter w[8];
	pthread_t threads[8];
	struct intent *t = open_map(PAGE_BITS);
	struct bitmap b;
	void *mem;
	int file = open(tmpdir_at(&dir, FILE_NAME), O_RDONLY | O_CLOEXEC);

	cr_assert_geq(file, 0);
	pthread_barrier_init(&start, NULL, 8);
	for (unsigned i = 0; i < 8; i++) {
		w[i] = (struct setter){t, &start, 80 + i, file, 0, 0};
		cr_assert_eq(pthread_create(&threads[i], NULL, toggle_bit, &w[i]), 0);
	}
	for (unsigned i = 0; i < 8; i++)
		pthread_join(threads[i], NULL);
	for (unsigned i = 0; i < 8; i++) {
		cr_assert_eq(w[i].rc, 0);
		cr_assert_eq(w[i].lost, 0);
	}
	(void)close(file);
	pthread_barrier_destroy(&start);
	b = loaded(t, PAGE_BITS, &mem);
	cr_assert_eq(b.count, 8);
	free(mem);
	intent_close(t);
	cr_assert_eq(count_bits(PAGE_BITS), 8);
}

/* Bits set and synced are set after any power cut; a map being made is there whole or not at all. */
Test(intent, power_cuts)
{
	const uint64_t bits = 2 * PAGE_BITS + 100;

	for (uint64_t seed = 1; seed <= 600; seed++) {
		struct crashstore *cs = malloc(sizeof(*cs));
		bool *sure = calloc(bits, 1);

		cs_init(cs, seed);
		cs->tear_bytes = seed & 1;
		for (unsigned boot = 0; boot < 5; boot++) {
			struct intent *t = NULL;
			struct bitmap b;
			void *mem;

			cs->ops_left = (long)cs_random(cs, 30);
			if (intent_open(&cs->storage, "v", bits << INTENT_SHIFT, INTENT_DURABLE, &t, NULL) < 0) {
				cr_assert(cs->stopped, "seed %llu", (unsigned long long)seed);
				cs_power_cut(cs);
				continue;
			}
			while (!cs->stopped) {
				uint64_t n = 1 + cs_random(cs, 200), first = cs_random(cs, bits - n + 1);
				bool set = cs_random(cs, 3) != 0;

				/* A clear that is under way frees its bits of any promise. */
				if (!set)
					memset(sure + first, 0, n);
				if (intent_write(t, first, n, set) == 0 && intent_sync(t) == 0 && set)
					memset(sure + first, 1, n);
			}
			intent_close(t);
			cs_power_cut(cs);
			cr_assert_eq(intent_open(&cs->storage, "v", bits << INTENT_SHIFT, INTENT_DURABLE, &t, NULL), 0);
			b = loaded(t, bits, &mem);
			for (uint64_t i = 0; i < bits; i++)
				cr_assert(!sure[i] || bitmap_test(&b, i), "seed %llu: bit %llu is lost",
					  (unsigned long long)seed, (unsigned long long)i);
			free(mem);
			intent_close(t);
		}
		free(sure);
		cs_free(cs);
		free(cs);
	}
}

/* ---- what is durable, and the fine map ---- */

#define REGIONS_A_UNIT (1U << (INTENT_SHIFT - REGION_SHIFT))

static struct intent *open_on(struct storage *on, uint64_t bits, unsigned flags)
{
	struct intent *t;
	struct err e = {0};

	cr_assert_eq(intent_open(on, "v", bits << INTENT_SHIFT, flags, &t, &e), 0, "%s", e.text);
	return t;
}

/* The fine map as regions; all ones beforehand where there is none. */
static bool fine_of(struct intent *t, uint64_t bits, uint64_t *ret_count, uint64_t probe, bool *ret_probe)
{
	void *mem = calloc(1, bitmap_bytes(bits * REGIONS_A_UNIT));
	struct bitmap b;
	bool fine;

	bitmap_init(&b, bits * REGIONS_A_UNIT, mem);
	fine = intent_load_fine(t, &b);
	bitmap_check(&b);
	*ret_count = b.count;
	*ret_probe = bitmap_test(&b, probe);
	free(mem);
	return fine;
}

/* A clean end with region `dirty` dirty. */
static int end_with(struct intent *t, uint64_t bits, uint64_t dirty)
{
	void *mem = calloc(1, bitmap_bytes(bits * REGIONS_A_UNIT));
	struct bitmap b;
	int rc;

	bitmap_init(&b, bits * REGIONS_A_UNIT, mem);
	bitmap_set(&b, dirty);
	rc = intent_end(t, &b);
	free(mem);
	return rc;
}

Test(intent, a_missing_map_is_clear_or_set_as_asked)
{
	struct intent *t = open_on(s, 5000, INTENT_NEW_SET);
	void *mem;

	cr_assert_eq(loaded(t, 5000, &mem).count, 5000);
	free(mem);
	intent_close(t);
	cr_assert_eq(count_bits(5000), 5000); /* it stays */
}

Test(intent, a_clean_end_keeps_the_regions_and_is_read_once)
{
	const uint64_t bits = PAGE_BITS + 40;
	struct intent *t = open_on(s, bits, INTENT_DURABLE);
	uint64_t n;
	bool hit;

	cr_assert_not(fine_of(t, bits, &n, 0, &hit));
	cr_assert_eq(intent_begin(t, NULL), 0);
	cr_assert_eq(intent_write(t, 7, 1, true), 0);
	cr_assert_eq(intent_write(t, PAGE_BITS + 1, 5, true), 0);
	cr_assert_eq(end_with(t, bits, (PAGE_BITS + 3) * REGIONS_A_UNIT + 15), 0);
	cr_assert_eq(intent_write(t, 9, 1, true), -ERR_STATE, "nothing is written after the end");
	intent_close(t);

	for (int look = 0; look < 2; look++) { /* looking changes nothing */
		t = open_on(s, bits, look ? INTENT_DURABLE : 0);
		cr_assert(fine_of(t, bits, &n, (PAGE_BITS + 3) * REGIONS_A_UNIT + 15, &hit));
		cr_assert(hit && n == 1);
		if (look)
			cr_assert_eq(intent_begin(t, NULL), 0);
		intent_close(t);
	}
	t = open_on(s, bits, INTENT_DURABLE);
	cr_assert_not(fine_of(t, bits, &n, 0, &hit));
	intent_close(t);
	cr_assert_eq(count_bits(bits), 6);
	cr_assert_not(tmpdir_has(&dir, FILE_NAME ".tmp"));
}

/* A dirty region in a unit whose bit is not set (of a union that was cut off) sets it. */
Test(intent, a_fine_map_loses_no_region)
{
	struct intent *t = open_on(s, 100, INTENT_DURABLE);
	uint64_t n;
	bool hit;

	cr_assert_eq(intent_begin(t, NULL), 0);
	cr_assert_eq(end_with(t, 100, 42 * REGIONS_A_UNIT), 0);
	intent_close(t);
	t = open_on(s, 100, INTENT_DURABLE);
	cr_assert(fine_of(t, 100, &n, 42 * REGIONS_A_UNIT, &hit) && hit && n == 1);
	intent_close(t);
	cr_assert_eq(count_bits(100), 1);
}

/* One byte of it or of the map changed: there is none. */
Test(intent, a_fine_map_that_does_not_check_out_is_none)
{
	static const off_t at[] = {512 * 2 + 3, 512 * 2 + 9, 512 * 2 + 17, 512 * 2 + 510, 512 * 3, 512 + 100};

	for (size_t i = 0; i < sizeof(at) / sizeof(at[0]); i++) {
		struct intent *t;
		uint64_t n;
		uint8_t byte;
		bool hit;

		(void)unlink(tmpdir_at(&dir, FILE_NAME));
		t = open_on(s, 100, INTENT_DURABLE);
		cr_assert_eq(intent_begin(t, NULL), 0);
		cr_assert_eq(end_with(t, 100, 42 * REGIONS_A_UNIT), 0);
		intent_close(t);
		tmpdir_read(&dir, FILE_NAME, &byte, 1, at[i]);
		byte ^= 0x40;
		tmpdir_write(&dir, FILE_NAME, &byte, 1, at[i]);
		t = open_on(s, 100, INTENT_DURABLE);
		cr_assert_not(fine_of(t, 100, &n, 0, &hit), "byte %d", (int)at[i]);
		intent_close(t);
	}
}

Test(intent, a_map_of_version_1_is_taken_over)
{
	uint8_t header[512] = {0};
	struct intent *t;

	cr_assert_eq(count_bits(100), 0);
	t = open_on(s, 100, 0);
	cr_assert_eq(intent_write(t, 3, 2, true), 0);
	intent_close(t);
	memcpy(header, "repfsint", 8);
	put_u32(header + 8, 1);
	put_u32(header + 12, 20);
	put_u32(header + 508, crc32c(0, header, 508));
	tmpdir_write(&dir, FILE_NAME, header, 512, 0);
	cr_assert_eq(count_bits(100), 2);
	t = open_on(s, 100, INTENT_DURABLE);
	cr_assert_eq(intent_begin(t, NULL), 0);
	cr_assert_eq(intent_write(t, 50, 1, true), 0);
	intent_close(t);
	tmpdir_read(&dir, FILE_NAME, header, 512, 0);
	cr_assert_eq(get_u32(header + 8), 2);
	cr_assert_eq(count_bits(100), 3);
}

static struct crashstore *crashed(uint64_t seed)
{
	struct crashstore *cs = malloc(sizeof(*cs));

	cs_init(cs, seed);
	return cs;
}

static void crashed_free(struct crashstore *cs)
{
	cs_free(cs);
	free(cs);
}

static bool bit_on(struct crashstore *cs, uint64_t bits, uint64_t bit)
{
	struct intent *t = open_on(&cs->storage, bits, INTENT_DURABLE);
	void *mem;
	struct bitmap b = loaded(t, bits, &mem);
	bool set = bitmap_test(&b, bit);

	free(mem);
	intent_close(t);
	return set;
}

/* A bit that was written but not synced, or whose sync failed, is there after the process has died, and is relied on by
 * the next one: intent_begin makes it durable. */
Test(intent, a_bit_found_in_the_cache_is_made_durable)
{
	for (uint64_t seed = 1; seed <= 100; seed++) {
		struct crashstore *cs = crashed(seed);
		struct intent *t = open_on(&cs->storage, 100, INTENT_DURABLE);

		cr_assert_eq(intent_begin(t, NULL), 0);
		cr_assert_eq(intent_write(t, 42, 1, true), 0);
		if (seed % 2) {
			cs->sync_fails_in = 1;
			cr_assert_eq(intent_sync(t), -ERR_IO);
			cs->sync_fails_in = 0;
		}
		intent_close(t);
		cs_killed(cs);
		cr_assert(bit_on(cs, 100, 42));
		t = open_on(&cs->storage, 100, INTENT_DURABLE);
		cr_assert_eq(intent_begin(t, NULL), 0);
		intent_close(t);
		cs_power_cut(cs);
		cr_assert(bit_on(cs, 100, 42), "seed %llu", (unsigned long long)seed);
		crashed_free(cs);
	}
}

/* Many sets that ask for a sync get one each only where something was written since. */
Test(intent, a_set_that_is_durable_costs_no_sync)
{
	struct crashstore *cs = crashed(1);
	struct intent *t = open_on(&cs->storage, 100, INTENT_DURABLE);
	unsigned syncs, writes;

	cr_assert_eq(intent_begin(t, NULL), 0);
	cr_assert_eq(intent_write(t, 42, 3, true), 0);
	cr_assert_eq(intent_sync(t), 0);
	syncs = cs->syncs;
	writes = cs->writes;
	cr_assert_eq(intent_write(t, 43, 2, true), 0);
	cr_assert_eq(intent_sync(t), 0);
	cr_assert_eq(cs->syncs, syncs);
	cr_assert_eq(cs->writes, writes);
	cr_assert_eq(intent_write(t, 44, 2, true), 0);
	cr_assert_eq(intent_sync(t), 0);
	cr_assert_eq(cs->syncs, syncs + 1);
	/* A write that failed: nothing of it counts as being there. */
	cs->ops_left = 0;
	cr_assert_eq(intent_write(t, 60, 1, true), -ERR_IO);
	cs_killed(cs);
	cr_assert_eq(intent_write(t, 60, 1, true), 0);
	cr_assert_eq(intent_sync(t), 0);
	intent_close(t);
	cs_power_cut(cs);
	cr_assert(bit_on(cs, 100, 60) && bit_on(cs, 100, 43));
	crashed_free(cs);
}

Test(intent, a_sync_that_failed_is_said_and_keeps_the_fine_map_void)
{
	struct crashstore *cs = crashed(3);
	struct intent *t = open_on(&cs->storage, 100, INTENT_DURABLE);
	struct err e = {0};

	cr_assert_eq(intent_begin(t, NULL), 0);
	cr_assert_eq(end_with(t, 100, 16), 0);
	intent_close(t);
	t = open_on(&cs->storage, 100, INTENT_DURABLE);
	cs->sync_fails_in = 1;
	cr_assert_eq(intent_begin(t, &e), -ERR_IO, "the volume may not be written to");
	cr_assert_not_null(strstr(e.text, FILE_NAME), "%s", e.text);
	intent_close(t);
	crashed_free(cs);
}

static bool no_sync_dir;

static int failing_sync_dir(struct storage *st, const char *path)
{
	return no_sync_dir ? -ERR_IO : cs_ops.sync_dir(st, path);
}

/* A map that is written anew has its name, and the sync of that fails: what is set from then on is found after a kill,
 * and, once a sync of it has succeeded, after a power cut, whatever file that left. */
Test(intent, a_name_that_could_not_be_synced_costs_no_bit)
{
	struct storage_ops ops = cs_ops;

	ops.sync_dir = failing_sync_dir;
	for (uint64_t seed = 1; seed <= 40; seed++) {
		struct crashstore *cs = crashed(seed);
		cs->storage.ops = &ops;
		struct intent *t = open_on(&cs->storage, 100, INTENT_DURABLE);

		cr_assert_eq(intent_begin(t, NULL), 0);
		no_sync_dir = true;
		cr_assert_eq(intent_reopen(t), -ERR_IO);
		cr_assert_eq(intent_write(t, 60, 1, true), 0);
		cr_assert_eq(intent_sync(t), -ERR_IO, "in a file that a power cut may take");
		no_sync_dir = seed % 4 == 0;
		int rc = intent_sync(t);
		cr_assert_eq(rc, no_sync_dir ? -ERR_IO : 0);
		intent_close(t);
		if (rc == 0 && seed % 2)
			cs_power_cut(cs);
		else
			cs_killed(cs);
		no_sync_dir = false;
		cr_assert(bit_on(cs, 100, 60), "seed %lu", (unsigned long)seed);
		crashed_free(cs);
	}
}

/* Begin, write, end cleanly or not, cut off anywhere: a fine map that is found names every region that was dirty, and
 * one that was begun with is never found again. */
Test(intent, a_fine_map_is_never_stale)
{
	const uint64_t bits = 200;
	unsigned fine = 0;

	for (uint64_t seed = 1; seed <= 1500; seed++) {
		struct crashstore *cs = crashed(seed);
		void *mem = calloc(1, bitmap_bytes(bits * REGIONS_A_UNIT));
		struct bitmap
		    dirty; /* what may differ: durable bits hold, the exact regions of them are remembered here */

		bitmap_init(&dirty, bits * REGIONS_A_UNIT, mem);
		cs->tear_bytes = seed & 1;
		for (unsigned boot = 0; boot < 6; boot++) {
			struct intent *t = NULL;
			unsigned n;

			cs->ops_left = cs_random(cs, 2) ? -1 : (long)cs_random(cs, 24);
			if (intent_open(&cs->storage, "v", bits << INTENT_SHIFT, INTENT_DURABLE, &t, NULL) < 0)
				goto cut;
			if (t) {
				void *m2 = calloc(1, bitmap_bytes(bits * REGIONS_A_UNIT)), *m3;
				struct bitmap f, b = loaded(t, bits, &m3);

				bitmap_init(&f, bits * REGIONS_A_UNIT, m2);
				bool is_fine = intent_load_fine(t, &f);
				fine += is_fine;
				for (uint64_t r = bitmap_next_set(&dirty, 0); r != BITMAP_NONE;
				     r = bitmap_next_set(&dirty, r + 1)) {
					cr_assert(bitmap_test(&b, r / REGIONS_A_UNIT), "seed %llu: unit of %llu",
						  (unsigned long long)seed, (unsigned long long)r);
					cr_assert(!is_fine || bitmap_test(&f, r), "seed %llu: region %llu",
						  (unsigned long long)seed, (unsigned long long)r);
				}
				free(m2);
				free(m3);
			}
			if (intent_begin(t, NULL) < 0)
				goto cut;
			for (n = (unsigned)cs_random(cs, 6); n; n--) { /* guests' writes */
				uint64_t r = cs_random(cs, bits * REGIONS_A_UNIT);

				if (intent_write(t, r / REGIONS_A_UNIT, 1, true) < 0 || intent_sync(t) < 0)
					break;
				bitmap_set(&dirty, r);
			}
			if (!cs->stopped && cs_random(cs, 2))
				(void)intent_end(t, &dirty);
		cut:
			intent_close(t);
			if (cs_random(cs, 2))
				cs_power_cut(cs);
			else
				cs_killed(cs);
		}
		free(mem);
		crashed_free(cs);
	}
	cr_assert_gt(fine, 500, "%u", fine);
}
