/* Which blocks overlays hold, as bitmaps and as lists (image/held.h), and the index of a chain (image/chainindex.h),
 * each against plain arrays. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "core/err.h"
#include "image/chainindex.h"

#define BLOCKS 1000U

static uint64_t random_state = 7;

static uint64_t draw(uint64_t below)
{
	random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (random_state >> 33) % below;
}

static uint64_t next_of(const bool *has, bool want, uint64_t from, uint64_t end)
{
	while (from < end && has[from] != want)
		from++;
	return from < end ? from : end;
}

/* Runs of any length, at any place; now and then everything. */
static void draw_blocks(bool *has, struct held *h)
{
	uint64_t runs = draw(12);
	if (runs == 11) {
		memset(has, 1, BLOCKS);
		bitmap_set_range(&h->bits, 0, BLOCKS);
	}
	for (uint64_t i = 0; i < runs; i++) {
		uint64_t at = draw(BLOCKS), n = 1 + draw(draw(3) ? 5 : 200);
		n = at + n > BLOCKS ? BLOCKS - at : n;
		memset(has + at, 1, n);
		bitmap_set_range(&h->bits, at, n);
	}
}

static void check_held(const struct held *h, const bool *has)
{
	uint64_t count = 0;
	for (uint64_t b = 0; b < BLOCKS; b++) {
		count += has[b];
		cr_assert_eq(held_test(h, b), has[b]);
	}
	cr_assert_eq(held_count(h), count);
	for (unsigned k = 0; k < 200; k++) {
		uint64_t from = draw(BLOCKS + 1), end = draw(4) ? from + draw(BLOCKS + 1 - from) : BLOCKS;
		cr_assert_eq(bits_next_set(h, from, end), next_of(has, true, from, end));
		cr_assert_eq(bits_next_clear(h, from, end), next_of(has, false, from, end));
	}
	cr_assert_eq(bits_next_set(h, 9, 5), 5);
	void *memory = calloc(1, bitmap_bytes(BLOCKS));
	struct bitmap all;
	bitmap_init(&all, BLOCKS, memory);
	bitmap_set(&all, 3);
	held_or_into(h, &all);
	for (uint64_t b = 0; b < BLOCKS; b++)
		cr_assert_eq(bitmap_test(&all, b), has[b] || b == 3);
	bitmap_check(&all);
	free(memory);
}

Test(held, a_list_says_what_its_bitmap_said)
{
	for (unsigned run = 0; run < 60; run++) {
		static bool has[2][BLOCKS];
		struct held h[2], old = {0};
		struct held_list *l[2], *u;
		memset(has, 0, sizeof(has));
		for (unsigned i = 0; i < 2; i++) {
			cr_assert_eq(held_init(&h[i], BLOCKS), 0);
			draw_blocks(has[i], &h[i]);
			check_held(&h[i], has[i]);
			cr_assert_eq(held_list_of(&h[i], &l[i]), 0);
			held_seal(&h[i], l[i], &old);
			cr_assert_not_null(old.memory);
			held_free(&old);
			check_held(&h[i], has[i]);
		}
		cr_assert_eq(held_list_union(l[0], l[1], &u), 0);
		held_seal(&h[0], u, &old);
		cr_assert_eq(old.list, l[0]);
		held_free(&old);
		for (unsigned b = 0; b < BLOCKS; b++)
			has[0][b] |= has[1][b];
		check_held(&h[0], has[0]);
		held_free(&h[0]);
		held_free(&h[1]);
	}
}

/* ---- the index ---- */

#define EPOCHS 24U

struct epoch {
	uint64_t id;
	bool has[BLOCKS];
	struct held h;
	struct held_list *list;
};

static void epoch_make(struct epoch *e, uint64_t id)
{
	struct held old;
	memset(e, 0, sizeof(*e));
	e->id = id;
	cr_assert_eq(held_init(&e->h, BLOCKS), 0);
	draw_blocks(e->has, &e->h);
	cr_assert_eq(held_list_of(&e->h, &e->list), 0);
	held_seal(&e->h, e->list, &old);
	held_free(&old);
}

static void check_index(struct chainindex *x, const struct epoch *e, unsigned n)
{
	for (unsigned k = 0; k < n; k++)
		for (unsigned i = 0; i < 60; i++) {
			static bool any[BLOCKS];
			uint64_t from = draw(BLOCKS), end = from + 1 + draw(BLOCKS - from), id = 0, stop = 0;
			unsigned who = k;
			for (unsigned b = 0; b < BLOCKS; b++) {
				any[b] = false;
				for (unsigned j = k; j < n; j++)
					any[b] |= e[j].has[b];
			}
			while (who < n && !e[who].has[from])
				who++;
			bool found = chainindex_find(x, e[k].id, from, end, &id, &stop);
			cr_assert_eq(found, who < n);
			cr_assert_gt(stop, from);
			cr_assert_leq(stop, end);
			if (found)
				cr_assert_eq(id, e[who].id);
			else
				cr_assert_eq(stop, next_of(any, true, from, end));
			for (uint64_t b = from; found && b < stop; b++) { /* the whole run is its */
				cr_assert(e[who].has[b]);
				for (unsigned j = k; j < who; j++)
					cr_assert_not(e[j].has[b]);
			}
			cr_assert_eq(chainindex_next_held(x, e[k].id, from, end), next_of(any, true, from, end));
			cr_assert_eq(chainindex_next_free(x, e[k].id, from, end), next_of(any, false, from, end));
		}
}

/* Epochs are closed, the oldest dropped, middle ones merged into the older: as a chain does it. */
Test(chainindex, answers_as_a_chain_does)
{
	static struct epoch e[EPOCHS];
	struct chainindex *x;
	unsigned n = 0;
	uint64_t id = 0;
	cr_assert_eq(chainindex_new(BLOCKS, &x), 0);
	for (unsigned step = 0; step < 400; step++) {
		unsigned what = (unsigned)draw(n < 4	     ? 1
					       : n == EPOCHS ? 1 + n % 2
							     : 4),
			 i = 1 + (unsigned)draw(n ? n : 1);
		if (what == 0 || what == 3) {
			if (n == EPOCHS)
				continue;
			epoch_make(&e[n], id += 1 + draw(3));
			cr_assert_eq(chainindex_add(x, e[n].id, e[n].list), 0);
			cr_assert_eq(chainindex_add(x, e[n].id, e[n].list), 0); /* again changes nothing */
			n++;
		} else { /* the oldest goes, or one of the middle */
			if (what == 1 || i >= n)
				i = 0;
			struct held_list *from = e[i].list, *both;
			if (i) {
				struct held old;
				cr_assert_eq(held_list_union(e[i - 1].list, from, &both), 0);
				held_seal(&e[i - 1].h, both, &old);
				held_free(&old);
				e[i - 1].list = both;
				cr_assert_eq(chainindex_add(x, e[i - 1].id, from), 0);
				for (unsigned b = 0; b < BLOCKS; b++)
					e[i - 1].has[b] |= e[i].has[b];
				check_index(x, e, n); /* the merged one is there still */
			}
			struct epoch gone = e[i];
			memmove(&e[i], &e[i + 1], (n - i - 1) * sizeof(e[0]));
			n--;
			check_index(x, e, n); /* it is not, its entries are */
			chainindex_remove(x, gone.id, from);
			held_free(&gone.h);
		}
		check_index(x, e, n);
	}
	while (n) {
		n--;
		chainindex_remove(x, e[n].id, e[n].list);
		held_free(&e[n].h);
	}
	cr_assert_eq(chainindex_entries(x), 0);
	chainindex_free(x);
}

Test(chainindex, a_large_sparse_volume_costs_what_is_in_it)
{
	uint64_t blocks = UINT64_C(1) << 34, id, stop;
	struct held h, old;
	struct held_list *l;
	struct chainindex *x;
	cr_assert_eq(chainindex_new(blocks, &x), 0);
	cr_assert_eq(held_init(&h, blocks), 0);
	bitmap_set(&h.bits, blocks - 1);
	cr_assert_eq(held_list_of(&h, &l), 0);
	held_seal(&h, l, &old);
	held_free(&old);
	cr_assert_eq(chainindex_add(x, 5, l), 0);
	cr_assert_not(chainindex_find(x, 1, 0, blocks, &id, &stop));
	cr_assert_eq(stop, blocks - 1);
	cr_assert(chainindex_find(x, 5, blocks - 1, blocks, &id, &stop));
	cr_assert_eq(id, 5);
	cr_assert_not(chainindex_find(x, 6, blocks - 1, blocks, &id, &stop));
	cr_assert_eq(bits_next_set(&h, 0, blocks), blocks - 1);
	cr_assert_eq(chainindex_next_free(x, 1, blocks - 2, blocks), blocks - 2);
	held_free(&h);
	chainindex_free(x);
}
