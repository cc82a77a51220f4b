/* Which closed epoch of a chain has a block (image/chainindex.h).
 *
 * Cells hang in an array of pointers by word, which is as sparse in memory as the volume is written; a bitmap of the
 * words that ever had a cell lets a search skip what is between them.
 */
#include "image/chainindex.h"

#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/err.h"
#include "core/os/thread.h"
#include "core/range.h"

#define WORD_BLOCKS (UINT64_C(1) << WORD_SHIFT)
#define CELL_LOCKS 64U

struct entry {
	uint64_t id, mask;
};

struct cell {
	uint32_t n, cap;
	struct entry e[];
};

struct chainindex {
	uint64_t blocks, words;
	struct cell **cells; /* each under its lock */
	struct bitmap used;  /* words that have, or had, a cell */
	void *used_memory;
	uint64_t entries;
	struct mutex locks[CELL_LOCKS]; /* by word; a few neighbours share one */
};

static struct mutex *lock_of(struct chainindex *x, uint64_t word)
{
	return &x->locks[(word >> 2) % CELL_LOCKS];
}

int chainindex_new(uint64_t blocks, struct chainindex **ret)
{
	struct chainindex *x = calloc(1, sizeof(*x));

	if (!x)
		return -ERR_NOMEM;
	x->blocks = blocks;
	x->words = units_of(blocks, WORD_SHIFT);
	x->cells = calloc(x->words, sizeof(struct cell *));
	x->used_memory = calloc(1, bitmap_bytes(x->words));
	for (unsigned i = 0; i < CELL_LOCKS; i++)
		mutex_init(&x->locks[i]);
	if (!x->cells || !x->used_memory) {
		chainindex_free(x);
		return -ERR_NOMEM;
	}
	bitmap_init(&x->used, x->words, x->used_memory);
	*ret = x;
	return 0;
}

void chainindex_free(struct chainindex *x)
{
	if (!x)
		return;
	for (uint64_t at, end = 0; x->cells && x->used_memory && bitmap_next_run(&x->used, end, &at, &end);)
		for (uint64_t w = at; w < end; w++)
			free(x->cells[w]);
	for (unsigned i = 0; i < CELL_LOCKS; i++)
		mutex_destroy(&x->locks[i]);
	free(x->cells);
	free(x->used_memory);
	free(x);
}

/* Index of the first entry at or behind checkpoint k. */
static uint32_t cell_find(const struct cell *c, uint64_t k)
{
	uint32_t low = 0, high = c->n;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (c->e[mid].id < k)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

/* ---- changes ---- */

static int cell_add(struct chainindex *x, uint64_t word, uint64_t id, uint64_t mask)
{
	struct cell *c = x->cells[word];
	uint32_t i = c ? cell_find(c, id) : 0;

	if (c && i < c->n && c->e[i].id == id) {
		c->e[i].mask |= mask;
		return 0;
	}
	if (!c || c->n == c->cap) {
		uint32_t cap = c ? c->cap * 2 : 1;
		struct cell *p = realloc(c, sizeof(*p) + cap * sizeof(p->e[0]));

		if (!p)
			return -ERR_NOMEM;
		if (!c)
			p->n = 0;
		p->cap = cap;
		x->cells[word] = c = p;
		(void)bitmap_set(&x->used, word);
	}
	memmove(&c->e[i + 1], &c->e[i], (c->n - i) * sizeof(c->e[0]));
	c->e[i] = (struct entry){id, mask};
	c->n++;
	x->entries++;
	return 0;
}

int chainindex_add(struct chainindex *x, uint64_t id, const struct held_list *l)
{
	int rc = 0;

	for (uint64_t i = 0; rc == 0 && i < l->n; i++) {
		PRE(l->w[i].word < x->words);
		mutex_lock(lock_of(x, l->w[i].word));
		rc = cell_add(x, l->w[i].word, id, l->w[i].mask);
		mutex_unlock(lock_of(x, l->w[i].word));
	}
	return rc;
}

static void cell_remove(struct chainindex *x, uint64_t word, uint64_t id)
{
	struct cell *c = x->cells[word], *p;
	uint32_t i = c ? cell_find(c, id) : 0;

	if (!c || i == c->n || c->e[i].id != id)
		return;
	x->entries--;
	c->n--;
	memmove(&c->e[i], &c->e[i + 1], (c->n - i) * sizeof(c->e[0]));
	if (c->n == 0) { /* its bit in `used` stays: a search looks in vain, no more */
		free(c);
		x->cells[word] = NULL;
	} else if (c->n <= c->cap / 4) {
		p = realloc(c, sizeof(*c) + c->cap / 2 * sizeof(c->e[0]));
		if (p) {
			p->cap /= 2;
			x->cells[word] = p;
		}
	}
}

void chainindex_remove(struct chainindex *x, uint64_t id, const struct held_list *l)
{
	for (uint64_t i = 0; i < l->n; i++) {
		mutex_lock(lock_of(x, l->w[i].word));
		cell_remove(x, l->w[i].word, id);
		mutex_unlock(lock_of(x, l->w[i].word));
	}
}

/* ---- searches ---- */

static uint64_t above(uint64_t block)
{
	return UINT64_MAX << block % WORD_BLOCKS;
}

/* The first block of `mask` in a word, no further than `end`. */
static uint64_t first_of(uint64_t word, uint64_t mask, uint64_t end)
{
	return mask ? min_u64((word << WORD_SHIFT) + (unsigned)__builtin_ctzll(mask), end) : end;
}

/* All that entries at or behind k hold of a word. */
static uint64_t word_union(struct chainindex *x, uint64_t k, uint64_t word)
{
	uint64_t mask = 0;

	mutex_lock(lock_of(x, word));
	const struct cell *c = x->cells[word];
	for (uint32_t i = c ? cell_find(c, k) : 0; c && i < c->n && mask != UINT64_MAX; i++)
		mask |= c->e[i].mask;
	mutex_unlock(lock_of(x, word));
	return mask;
}

uint64_t chainindex_next_held(struct chainindex *x, uint64_t k, uint64_t from, uint64_t end)
{
	uint64_t word = from >> WORD_SHIFT, words = units_of(end, WORD_SHIFT);

	while (from < end && word < words && bitmap_any(&x->used, word, words - word)) {
		uint64_t used = bitmap_next_set(&x->used, word);
		uint64_t mask = word_union(x, k, used);

		if (used == from >> WORD_SHIFT)
			mask &= above(from);
		if (mask)
			return first_of(used, mask, end);
		word = used + 1;
	}
	return end;
}

uint64_t chainindex_next_free(struct chainindex *x, uint64_t k, uint64_t from, uint64_t end)
{
	while (from < end) {
		uint64_t word = from >> WORD_SHIFT;
		uint64_t mask = ~word_union(x, k, word) & above(from);

		if (mask)
			return first_of(word, mask, end);
		from = (word + 1) << WORD_SHIFT;
	}
	return end;
}

bool chainindex_find(struct chainindex *x, uint64_t k, uint64_t from, uint64_t end, uint64_t *ret_id, uint64_t *ret_end)
{
	uint64_t word = from >> WORD_SHIFT, bit = UINT64_C(1) << from % WORD_BLOCKS, before = 0;
	bool found = false;

	mutex_lock(lock_of(x, word));
	const struct cell *c = x->cells[word];
	for (uint32_t i = c ? cell_find(c, k) : 0; c && i < c->n && !found; i++) {
		uint64_t mask = c->e[i].mask & ~before;

		before |= mask;
		if (mask & bit) {
			found = true;
			*ret_id = c->e[i].id;
			*ret_end = min_u64(first_of(word, ~mask & above(from), (word + 1) << WORD_SHIFT), end);
		}
	}
	mutex_unlock(lock_of(x, word));
	if (found)
		return true;
	before &= above(from);
	*ret_end = before ? first_of(word, before, end) : chainindex_next_held(x, k, (word + 1) << WORD_SHIFT, end);
	return false;
}

uint64_t chainindex_entries(const struct chainindex *x)
{
	return x->entries;
}
