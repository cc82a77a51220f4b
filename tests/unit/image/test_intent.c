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

	cr_assert_eq(intent_open(s, "v", bits << INTENT_SHIFT, true, &t, NULL), 0);
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
	put_u32(want + 8, 1);
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
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, true, &t, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, FILE_NAME), "%s", e.text);
	tmpdir_write(&dir, FILE_NAME, "X", 1, 0);
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, true, &t, &e), -ERR_CORRUPT);
	memcpy(header, "repfsint", 8);
	put_u32(header + 8, 2);
	put_u32(header + 12, 20);
	put_u32(header + 508, crc32c(0, header, 508));
	tmpdir_write(&dir, FILE_NAME, header, 512, 0);
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, true, &t, &e), -ERR_VERSION);
	cr_assert_not_null(strstr(e.text, "version 2"), "%s", e.text);
	cr_assert_eq(truncate(tmpdir_at(&dir, FILE_NAME), 0), 0);
	cr_assert_eq(intent_open(s, "v", 10 << INTENT_SHIFT, true, &t, &e), -ERR_CORRUPT);
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
			if (intent_open(&cs->storage, "v", bits << INTENT_SHIFT, true, &t, NULL) < 0) {
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
			cr_assert_eq(intent_open(&cs->storage, "v", bits << INTENT_SHIFT, true, &t, NULL), 0);
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
