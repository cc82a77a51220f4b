/* Which blocks an overlay holds (image/held.h). */
#include "image/held.h"

#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/err.h"
#include "core/range.h"

#define WORD_BLOCKS (UINT64_C(1) << WORD_SHIFT)

int held_init(struct held *h, uint64_t blocks)
{
	*h = (struct held){.memory = calloc(1, bitmap_bytes(blocks))};
	if (!h->memory)
		return -ERR_NOMEM;
	bitmap_init(&h->bits, blocks, h->memory);
	return 0;
}

void held_grow(struct held *h, uint64_t blocks, void *memory)
{
	if (h->list) {
		free(memory);
		return;
	}
	bitmap_grow(&h->bits, blocks, memory);
	free(h->memory);
	h->memory = memory;
}

void held_free(struct held *h)
{
	free(h->memory);
	free(h->list);
	*h = (struct held){0};
}

/* Index of the first word at or behind `word`. */
static uint64_t list_find(const struct held_list *l, uint64_t word)
{
	uint64_t low = 0, high = l->n;

	while (low < high) {
		uint64_t mid = low + (high - low) / 2;

		if (l->w[mid].word < word)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

bool held_test(const struct held *h, uint64_t block)
{
	uint64_t i;

	if (!h->list)
		return bitmap_test(&h->bits, block);
	i = list_find(h->list, block >> WORD_SHIFT);
	return i < h->list->n && h->list->w[i].word == block >> WORD_SHIFT &&
	       (h->list->w[i].mask >> block % WORD_BLOCKS & 1);
}

uint64_t held_count(const struct held *h)
{
	return h->list ? h->list->count : __atomic_load_n(&h->bits.count, __ATOMIC_RELAXED);
}

/* bitmap_next_* search to the map's end; a small range in a map of 2^34 bits must not cost that. bitmap_any stays in
 * its range, and when it says yes, the search ends there too. */
#define BITS_SEARCH_SMALL 4096U

uint64_t bits_next_set(const struct held *h, uint64_t from, uint64_t end)
{
	uint64_t i, mask;

	if (from >= end)
		return end;
	if (!h->list)
		return bitmap_any(&h->bits, from, end - from) ? min_u64(bitmap_next_set(&h->bits, from), end) : end;
	i = list_find(h->list, from >> WORD_SHIFT);
	if (i < h->list->n && h->list->w[i].word == from >> WORD_SHIFT) {
		mask = h->list->w[i].mask & UINT64_MAX << from % WORD_BLOCKS;
		if (mask)
			return min_u64((from & ~(WORD_BLOCKS - 1)) + (unsigned)__builtin_ctzll(mask), end);
		i++;
	}
	if (i == h->list->n)
		return end;
	return min_u64((h->list->w[i].word << WORD_SHIFT) + (unsigned)__builtin_ctzll(h->list->w[i].mask), end);
}

uint64_t bits_next_clear(const struct held *h, uint64_t from, uint64_t end)
{
	if (from >= end)
		return end;
	if (h->list) {
		for (uint64_t i = list_find(h->list, from >> WORD_SHIFT); from < end; i++) {
			uint64_t mask =
			    i < h->list->n && h->list->w[i].word == from >> WORD_SHIFT ? h->list->w[i].mask : 0;

			mask = ~mask & UINT64_MAX << from % WORD_BLOCKS;
			if (mask)
				return min_u64((from & ~(WORD_BLOCKS - 1)) + (unsigned)__builtin_ctzll(mask), end);
			from = (from & ~(WORD_BLOCKS - 1)) + WORD_BLOCKS;
		}
		return end;
	}
	if (end - from > BITS_SEARCH_SMALL)
		return min_u64(bitmap_next_clear(&h->bits, from), end);
	while (from < end && bitmap_test(&h->bits, from))
		from++;
	return from;
}

void held_or_into(const struct held *h, struct bitmap *dst)
{
	uint64_t block, end;

	if (!h->list) {
		bitmap_or(dst, &h->bits);
		return;
	}
	for (uint64_t i = 0; i < h->list->n; i++) {
		uint64_t first = h->list->w[i].word << WORD_SHIFT;

		for (block = bits_next_set(h, first, first + WORD_BLOCKS); block < first + WORD_BLOCKS;
		     block = bits_next_set(h, end, first + WORD_BLOCKS)) {
			end = bits_next_clear(h, block, first + WORD_BLOCKS);
			bitmap_set_range(dst, block, end - block);
		}
	}
}

/* ---- lists ---- */

static struct held_list *list_new(uint64_t n)
{
	struct held_list *l = malloc(sizeof(*l) + n * sizeof(l->w[0]));

	if (l)
		l->n = l->count = 0;
	return l;
}

static void list_append(struct held_list *l, uint64_t word, uint64_t mask)
{
	l->count += (uint64_t)__builtin_popcountll(mask);
	if (l->n && l->w[l->n - 1].word == word)
		l->w[l->n - 1].mask |= mask;
	else
		l->w[l->n++] = (struct held_word){mask, word};
}

/* Calls for each word of the run's blocks; NULL: counts them only. */
static uint64_t run_words(struct held_list *l, uint64_t at, uint64_t end, uint64_t *last)
{
	uint64_t n = 0;

	while (at < end) {
		uint64_t word = at >> WORD_SHIFT, stop = min_u64(end, (word + 1) << WORD_SHIFT);
		uint64_t mask = (stop - at == WORD_BLOCKS ? UINT64_MAX : (UINT64_C(1) << (stop - at)) - 1)
				<< at % WORD_BLOCKS;

		n += word != *last;
		*last = word;
		if (l)
			list_append(l, word, mask);
		at = stop;
	}
	return n;
}

int held_list_of(const struct held *h, struct held_list **ret)
{
	uint64_t n = 0, last = UINT64_MAX;
	struct held_list *l;

	if (h->list) {
		l = list_new(h->list->n);
		if (!l)
			return -ERR_NOMEM;
		memcpy(l, h->list, sizeof(*l) + h->list->n * sizeof(l->w[0]));
		*ret = l;
		return 0;
	}
	for (uint64_t at, end = 0; bitmap_next_run(&h->bits, end, &at, &end);)
		n += run_words(NULL, at, end, &last);
	l = list_new(n);
	if (!l)
		return -ERR_NOMEM;
	for (uint64_t at, end = 0; bitmap_next_run(&h->bits, end, &at, &end);)
		(void)run_words(l, at, end, &last);
	INVARIANT(l->n == n);
	*ret = l;
	return 0;
}

int held_list_union(const struct held_list *a, const struct held_list *b, struct held_list **ret)
{
	struct held_list *l = list_new(a->n + b->n), *fit;
	uint64_t i = 0, k = 0;

	if (!l)
		return -ERR_NOMEM;
	while (i < a->n || k < b->n) {
		uint64_t wa = i < a->n ? a->w[i].word : UINT64_MAX, wb = k < b->n ? b->w[k].word : UINT64_MAX;
		uint64_t mask = 0;

		if (wa <= wb)
			mask |= a->w[i++].mask;
		if (wb <= wa)
			mask |= b->w[k++].mask;
		list_append(l, min_u64(wa, wb), mask);
	}
	fit = realloc(l, sizeof(*l) + l->n * sizeof(l->w[0]));
	*ret = fit ? fit : l;
	return 0;
}

void held_seal(struct held *h, struct held_list *list, struct held *old)
{
	*old = *h;
	*h = (struct held){.list = list};
}
