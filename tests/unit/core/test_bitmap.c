/* Bitmap against a plain array of bools, at sizes around the word and summary-word edges. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/bitmap.h"
#include "core/check.h"

#define POISON 0xa5

/* A bitmap whose memory is exactly as large as asked for, with poisoned bytes behind it. */
struct fixture {
	struct bitmap b;
	bool *model;
	uint8_t *memory;
	size_t bytes;
};

static uint64_t rnd_state = 88172645463325252U;

static uint64_t rnd(void)
{
	rnd_state ^= rnd_state << 13;
	rnd_state ^= rnd_state >> 7;
	rnd_state ^= rnd_state << 17;
	return rnd_state;
}

static void fixture_init(struct fixture *f, uint64_t nbits)
{
	f->bytes = bitmap_bytes(nbits);
	f->memory = malloc(f->bytes + 64);
	f->model = calloc(nbits + 1, sizeof(bool));
	cr_assert(f->memory != NULL && f->model != NULL);
	memset(f->memory, 0, f->bytes);
	memset(f->memory + f->bytes, POISON, 64);
	bitmap_init(&f->b, nbits, f->memory);
}

static void fixture_check(const struct fixture *f)
{
	uint64_t n = f->b.nbits;
	uint64_t count = 0;
	uint64_t next_set = BITMAP_NONE;
	uint64_t next_clear = BITMAP_NONE;

	bitmap_check(&f->b);
	for (size_t i = 0; i < 64; i++)
		cr_assert_eq(f->memory[f->bytes + i], POISON);
	cr_assert_eq(bitmap_next_set(&f->b, n), BITMAP_NONE);
	cr_assert_eq(bitmap_next_clear(&f->b, n), BITMAP_NONE);
	cr_assert_eq(bitmap_next_set(&f->b, UINT64_MAX), BITMAP_NONE);
	cr_assert_eq(bitmap_next_clear(&f->b, UINT64_MAX), BITMAP_NONE);
	for (uint64_t i = n; i-- > 0;) {
		*(f->model[i] ? &next_set : &next_clear) = i;
		count += f->model[i];
		cr_assert_eq(bitmap_test(&f->b, i), f->model[i]);
		cr_assert_eq(bitmap_next_set(&f->b, i), next_set);
		cr_assert_eq(bitmap_next_clear(&f->b, i), next_clear);
	}
	cr_assert_eq(f->b.count, count);
	uint64_t first = 0, end = 0, at = 0;
	for (; bitmap_next_run(&f->b, end, &first, &end); at = end) {
		cr_assert(first < end && end <= n);
		for (; at < first; at++)
			cr_assert_not(f->model[at]);
		for (; at < end; at++)
			cr_assert(f->model[at]);
		cr_assert(end == n || !f->model[end]);
	}
	for (; at < n; at++)
		cr_assert_not(f->model[at]);
}

static void fixture_free(struct fixture *f)
{
	free(f->memory);
	free(f->model);
}

static const uint64_t sizes[] = {0, 1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 4160, 8192, 8193, 12345};

Test(bitmap, each_bit_alone)
{
	for (size_t s = 0; s < ARRAY_LEN(sizes) - 3; s++) {
		struct fixture f;

		fixture_init(&f, sizes[s]);
		for (uint64_t i = 0; i < sizes[s]; i++) {
			cr_assert(bitmap_set(&f.b, i));
			cr_assert_not(bitmap_set(&f.b, i));
			cr_assert(bitmap_test(&f.b, i));
			cr_assert_eq(f.b.count, 1U);
			cr_assert_eq(bitmap_next_set(&f.b, 0), i);
			cr_assert_eq(bitmap_next_set(&f.b, i), i);
			cr_assert_eq(bitmap_next_set(&f.b, i + 1), BITMAP_NONE);
			cr_assert_eq(bitmap_next_clear(&f.b, i), i + 1 < sizes[s] ? i + 1 : BITMAP_NONE);
			cr_assert(bitmap_clear(&f.b, i));
			cr_assert_not(bitmap_clear(&f.b, i));
			cr_assert_eq(f.b.count, 0U);
			cr_assert_eq(bitmap_next_set(&f.b, 0), BITMAP_NONE);
		}
		fixture_check(&f);
		fixture_free(&f);
	}
}

static bool model_any(const struct fixture *f, uint64_t first, uint64_t n)
{
	for (uint64_t i = first; i < first + n; i++)
		if (f->model[i])
			return true;
	return false;
}

static uint64_t model_range(struct fixture *f, uint64_t first, uint64_t n, bool value)
{
	uint64_t changed = 0;

	for (uint64_t i = first; i < first + n; i++) {
		changed += f->model[i] != value;
		f->model[i] = value;
	}
	return changed;
}

Test(bitmap, random_operations, .timeout = 120)
{
	for (size_t s = 0; s < ARRAY_LEN(sizes); s++) {
		struct fixture f;
		uint64_t nbits = sizes[s];

		fixture_init(&f, nbits);
		for (int step = 0; step < 400; step++) {
			uint64_t first = rnd() % (nbits + 1);
			uint64_t n = rnd() % (nbits - first + 1);

			if (rnd() % 2 == 0)
				n %= 70; /* around a word */
			switch (rnd() % 5) {
			case 0:
				cr_assert_eq(bitmap_set_range(&f.b, first, n), model_range(&f, first, n, true));
				break;
			case 1:
				cr_assert_eq(bitmap_clear_range(&f.b, first, n), model_range(&f, first, n, false));
				break;
			case 2:
				if (first < nbits)
					cr_assert_eq(bitmap_set(&f.b, first), model_range(&f, first, 1, true) == 1);
				break;
			case 3:
				if (first < nbits)
					cr_assert_eq(bitmap_clear(&f.b, first), model_range(&f, first, 1, false) == 1);
				break;
			default:
				cr_assert_eq(bitmap_any(&f.b, first, n), model_any(&f, first, n));
			}
			if (step % 40 == 0)
				fixture_check(&f);
			else
				bitmap_check(&f.b);
		}
		fixture_check(&f);
		bitmap_clear_all(&f.b);
		(void)model_range(&f, 0, nbits, false);
		fixture_check(&f);
		/* All of it zero again: what clear_all skipped must not have been set. */
		for (size_t i = 0; i < f.bytes; i++)
			cr_assert_eq(f.memory[i], 0);
		fixture_free(&f);
	}
}

Test(bitmap, or_copy_swap, .timeout = 120)
{
	for (size_t s = 0; s < ARRAY_LEN(sizes); s++) {
		uint64_t nbits = sizes[s];
		struct fixture a;
		struct fixture b;

		fixture_init(&a, nbits);
		fixture_init(&b, nbits);
		for (uint64_t i = 0; i < nbits; i++) {
			if (rnd() % 3 == 0) {
				a.model[i] = true;
				(void)bitmap_set(&a.b, i);
			}
			if (i / 200 % 5 == 1) {
				b.model[i] = true;
				(void)bitmap_set(&b.b, i);
			}
		}
		bitmap_or(&a.b, &b.b);
		for (uint64_t i = 0; i < nbits; i++)
			a.model[i] |= b.model[i];
		fixture_check(&a);
		fixture_check(&b);
		bitmap_copy(&a.b, &a.b);
		fixture_check(&a);
		bitmap_copy(&a.b, &b.b);
		memcpy(a.model, b.model, nbits * sizeof(bool));
		fixture_check(&a);
		fixture_check(&b);

		(void)bitmap_clear_range(&a.b, 0, nbits);
		bitmap_swap(&a.b, &b.b);
		cr_assert_eq(a.b.words, (void *)b.memory);
		cr_assert_eq(b.b.count, 0U);
		bitmap_check(&a.b);
		for (uint64_t i = 0; i < nbits; i++)
			cr_assert_eq(bitmap_test(&a.b, i), b.model[i]);
		fixture_free(&a);
		fixture_free(&b);
	}
}

Test(bitmap, search_of_2_to_28_bits_is_quick)
{
	uint64_t nbits = UINT64_C(1) << 28;
	struct bitmap b;
	void *memory = calloc(1, bitmap_bytes(nbits));
	struct timespec start;
	struct timespec end;

	cr_assert(memory != NULL);
	bitmap_init(&b, nbits, memory);
	cr_assert(bitmap_set(&b, nbits - 1));
	(void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &start);
	for (int i = 0; i < 100; i++)
		cr_assert_eq(bitmap_next_set(&b, 0), nbits - 1);
	(void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
	double us = (double)(end.tv_sec - start.tv_sec) * 1e6 + (double)(end.tv_nsec - start.tv_nsec) / 1e3;
	/* About 20 us each; a walk over the words takes 2000. The bound is wide for sanitizers and busy machines. */
	cr_assert_lt(us / 100, 1000.0, "%f us", us / 100);
	free(memory);
}

#define SETTERS 4
#define SHARED_BITS 8192U

struct setter {
	struct bitmap *b;
	uint64_t first;
	uint64_t changed;
};

/* Strided: the threads meet in each word and each summary word. */
static void *set_every_fourth(void *arg)
{
	struct setter *s = arg;

	for (uint64_t i = s->first; i < SHARED_BITS; i += SETTERS)
		s->changed += bitmap_set(s->b, i);
	/* And again over all: the bits of the others may or may not be there yet. */
	for (uint64_t i = 0; i < SHARED_BITS; i++)
		s->changed += bitmap_set(s->b, i);
	return NULL;
}

Test(bitmap, concurrent_sets_lose_nothing)
{
	for (int round = 0; round < 50; round++) {
		struct fixture f;
		struct setter s[SETTERS];
		pthread_t thread[SETTERS];
		uint64_t changed = 0;

		fixture_init(&f, SHARED_BITS);
		for (unsigned i = 0; i < SETTERS; i++) {
			s[i] = (struct setter){.b = &f.b, .first = i};
			cr_assert_eq(pthread_create(&thread[i], NULL, set_every_fourth, &s[i]), 0);
		}
		for (unsigned i = 0; i < SETTERS; i++) {
			cr_assert_eq(pthread_join(thread[i], NULL), 0);
			changed += s[i].changed;
		}
		/* Each bit was new to exactly one of them. */
		cr_assert_eq(changed, SHARED_BITS);
		cr_assert_eq(f.b.count, SHARED_BITS);
		bitmap_check(&f.b);
		fixture_free(&f);
	}
}

Test(bitmap, bit_beyond_the_end_traps, .signal = SIGILL)
{
	uint64_t memory[4] = {0};
	struct bitmap b;

	bitmap_init(&b, 65, memory);
	(void)bitmap_set(&b, 65);
}

Test(bitmap, range_beyond_the_end_traps, .signal = SIGILL)
{
	uint64_t memory[4] = {0};
	struct bitmap b;

	bitmap_init(&b, 65, memory);
	(void)bitmap_set_range(&b, 1, UINT64_MAX);
}

Test(bitmap, check_finds_a_lost_summary_bit, .signal = SIGILL)
{
	uint64_t memory[4] = {0};
	struct bitmap b;

	bitmap_init(&b, 65, memory);
	(void)bitmap_set(&b, 64);
	b.summary[0] = 0;
	bitmap_check(&b);
}
