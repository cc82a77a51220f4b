/* Two-level bitmap (core/bitmap.h).
 *
 * A bit's word and the word's summary bit are two separate atomics. Setting goes top down: summary bit first, then the
 * bit. Clearing goes bottom up: the bit, then, if its word became zero, the summary bit. So at every instant a
 * non-zero word has its summary bit, and a search that trusts a clear summary bit never misses a bit whose set has
 * returned. A summary bit over a zero word only makes a search look at that word in vain.
 *
 * Clearing a summary bit is where a concurrent set of the same word would lose: it may have seen the summary bit just
 * before it goes. Hence the caller's exclusion. Sets of other words under the same summary word are safe: all
 * updates there are atomic read-modify-writes.
 *
 * Bits at and above nbits are never set, so searches need no bound check within the last word.
 */
#include "core/bitmap.h"

#include "core/check.h"
#include "core/range.h"

#define WORD_BITS 64U
/* 64 TiB in sectors; keeps all sums far from overflow. */
#define BITMAP_BITS_MAX (UINT64_C(1) << 40)

static uint64_t words_for(uint64_t bits)
{
	return (bits + WORD_BITS - 1) / WORD_BITS;
}

static uint64_t load(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static unsigned lowest_bit(uint64_t word)
{
	return (unsigned)__builtin_ctzll(word);
}

static uint64_t popcount(uint64_t word)
{
	return (uint64_t)__builtin_popcountll(word);
}

static uint64_t bit_mask(uint64_t bit)
{
	return UINT64_C(1) << bit % WORD_BITS;
}

/* Bits of word `w` that lie in [first, end). */
static uint64_t range_mask(uint64_t w, uint64_t first, uint64_t end)
{
	uint64_t base = w * WORD_BITS;
	uint64_t mask = UINT64_MAX;

	if (first > base)
		mask &= UINT64_MAX << (first - base);
	if (end - base < WORD_BITS)
		mask &= UINT64_MAX >> (WORD_BITS - (end - base));
	return mask;
}

static void count_add(struct bitmap *b, uint64_t n)
{
	if (n != 0)
		(void)__atomic_fetch_add(&b->count, n, __ATOMIC_RELAXED);
}

static void count_sub(struct bitmap *b, uint64_t n)
{
	if (n != 0)
		(void)__atomic_fetch_sub(&b->count, n, __ATOMIC_RELAXED);
}

/* Sets the bits of `mask` in word w; returns those that were clear. */
static uint64_t word_set(struct bitmap *b, uint64_t w, uint64_t mask)
{
	/* Most writes of a guest hit bits that are set already: no locked instruction for those. */
	if ((load(&b->words[w]) & mask) == mask)
		return 0;
	uint64_t *summary = &b->summary[w / WORD_BITS];

	if ((load(summary) & bit_mask(w)) == 0)
		(void)__atomic_fetch_or(summary, bit_mask(w), __ATOMIC_ACQ_REL);
	return mask & ~__atomic_fetch_or(&b->words[w], mask, __ATOMIC_ACQ_REL);
}

/* Clears the bits of `mask` in word w; returns those that were set. */
static uint64_t word_clear(struct bitmap *b, uint64_t w, uint64_t mask)
{
	uint64_t old = __atomic_fetch_and(&b->words[w], ~mask, __ATOMIC_ACQ_REL);

	if (old != 0 && (old & ~mask) == 0)
		(void)__atomic_fetch_and(&b->summary[w / WORD_BITS], ~bit_mask(w), __ATOMIC_ACQ_REL);
	return old & mask;
}

/* The first word in [w, end) whose summary bit is set; `end` if there is none. */
static uint64_t next_word(const struct bitmap *b, uint64_t w, uint64_t end)
{
	if (w >= end)
		return end;
	uint64_t i = w / WORD_BITS;
	uint64_t last = (end - 1) / WORD_BITS;
	uint64_t found = load(&b->summary[i]) & UINT64_MAX << w % WORD_BITS;

	while (found == 0) {
		if (++i > last)
			return end;
		found = load(&b->summary[i]);
	}
	w = i * WORD_BITS + lowest_bit(found);
	return w < end ? w : end;
}

/* The first set bit in [from, end), end <= nbits; BITMAP_NONE if there is none. */
static uint64_t find_set(const struct bitmap *b, uint64_t from, uint64_t end)
{
	if (from >= end)
		return BITMAP_NONE;
	uint64_t w = from / WORD_BITS;
	uint64_t w_end = words_for(end);
	uint64_t found = load(&b->words[w]) & UINT64_MAX << from % WORD_BITS;

	while (found == 0) {
		w = next_word(b, w + 1, w_end);
		if (w == w_end)
			return BITMAP_NONE;
		found = load(&b->words[w]);
	}
	uint64_t bit = w * WORD_BITS + lowest_bit(found);

	return bit < end ? bit : BITMAP_NONE;
}

static void check_range(const struct bitmap *b, uint64_t first, uint64_t n)
{
	PRE(first <= b->nbits);
	PRE(n <= b->nbits - first);
}

size_t bitmap_bytes(uint64_t nbits)
{
	PRE(nbits <= BITMAP_BITS_MAX);
	uint64_t words = words_for(nbits);

	return (size_t)((words + words_for(words)) * sizeof(uint64_t));
}

void bitmap_init(struct bitmap *b, uint64_t nbits, void *zeroed)
{
	PRE(nbits <= BITMAP_BITS_MAX);
	PRE(nbits == 0 || zeroed != NULL);
	PRE((uintptr_t)zeroed % sizeof(uint64_t) == 0);
	b->nbits = nbits;
	b->count = 0;
	b->words = zeroed;
	b->summary = nbits == 0 ? NULL : b->words + words_for(nbits);
}

bool bitmap_test(const struct bitmap *b, uint64_t bit)
{
	PRE(bit < b->nbits);
	return (load(&b->words[bit / WORD_BITS]) & bit_mask(bit)) != 0;
}

bool bitmap_set(struct bitmap *b, uint64_t bit)
{
	PRE(bit < b->nbits);
	bool changed = word_set(b, bit / WORD_BITS, bit_mask(bit)) != 0;

	count_add(b, changed);
	return changed;
}

bool bitmap_clear(struct bitmap *b, uint64_t bit)
{
	PRE(bit < b->nbits);
	bool changed = word_clear(b, bit / WORD_BITS, bit_mask(bit)) != 0;

	count_sub(b, changed);
	return changed;
}

uint64_t bitmap_set_range(struct bitmap *b, uint64_t first, uint64_t n)
{
	check_range(b, first, n);
	uint64_t end = first + n;
	uint64_t changed = 0;

	if (n == 0)
		return 0;
	for (uint64_t w = first / WORD_BITS; w < words_for(end); w++)
		changed += popcount(word_set(b, w, range_mask(w, first, end)));
	count_add(b, changed);
	return changed;
}

uint64_t bitmap_clear_range(struct bitmap *b, uint64_t first, uint64_t n)
{
	check_range(b, first, n);
	uint64_t end = first + n;
	uint64_t w_end = words_for(end);
	uint64_t changed = 0;

	if (n == 0)
		return 0;
	for (uint64_t w = next_word(b, first / WORD_BITS, w_end); w < w_end; w = next_word(b, w + 1, w_end))
		changed += popcount(word_clear(b, w, range_mask(w, first, end)));
	count_sub(b, changed);
	return changed;
}

void bitmap_clear_all(struct bitmap *b)
{
	(void)bitmap_clear_range(b, 0, b->nbits);
}

bool bitmap_any(const struct bitmap *b, uint64_t first, uint64_t n)
{
	check_range(b, first, n);
	return find_set(b, first, first + n) != BITMAP_NONE;
}

uint64_t bitmap_next_set(const struct bitmap *b, uint64_t from)
{
	return find_set(b, from, b->nbits);
}

uint64_t bitmap_next_clear(const struct bitmap *b, uint64_t from)
{
	if (from >= b->nbits)
		return BITMAP_NONE;
	uint64_t w = from / WORD_BITS;
	uint64_t w_end = words_for(b->nbits);
	uint64_t found = ~load(&b->words[w]) & UINT64_MAX << from % WORD_BITS;

	while (found == 0) {
		if (++w == w_end)
			return BITMAP_NONE;
		found = ~load(&b->words[w]);
	}
	uint64_t bit = w * WORD_BITS + lowest_bit(found);

	return bit < b->nbits ? bit : BITMAP_NONE;
}

bool bitmap_next_run(const struct bitmap *b, uint64_t from, uint64_t *ret_first, uint64_t *ret_end)
{
	uint64_t first = bitmap_next_set(b, from);
	if (first == BITMAP_NONE)
		return false;
	*ret_first = first;
	*ret_end = min_u64(bitmap_next_clear(b, first), b->nbits); /* BITMAP_NONE is above any */
	return true;
}

void bitmap_or(struct bitmap *dst, const struct bitmap *src)
{
	PRE(dst->nbits == src->nbits);
	uint64_t w_end = words_for(src->nbits);
	uint64_t changed = 0;

	for (uint64_t w = next_word(src, 0, w_end); w < w_end; w = next_word(src, w + 1, w_end)) {
		uint64_t word = load(&src->words[w]);

		if (word != 0)
			changed += popcount(word_set(dst, w, word));
	}
	count_add(dst, changed);
}

void bitmap_copy(struct bitmap *dst, const struct bitmap *src)
{
	if (dst == src)
		return;
	bitmap_clear_all(dst);
	bitmap_or(dst, src);
}

void bitmap_swap(struct bitmap *a, struct bitmap *b)
{
	struct bitmap t = *a;

	*a = *b;
	*b = t;
}

void bitmap_grow(struct bitmap *b, uint64_t nbits, void *zeroed)
{
	struct bitmap larger;
	uint64_t first, end = 0;

	PRE(nbits >= b->nbits);
	bitmap_init(&larger, nbits, zeroed);
	while (end < b->nbits && bitmap_next_run(b, end, &first, &end))
		bitmap_set_range(&larger, first, end - first);
	*b = larger;
}

void bitmap_check(const struct bitmap *b)
{
	uint64_t w_end = words_for(b->nbits);
	uint64_t count = 0;

	for (uint64_t w = 0; w < w_end; w++) {
		uint64_t word = load(&b->words[w]);
		bool summary = (load(&b->summary[w / WORD_BITS]) & bit_mask(w)) != 0;

		INVARIANT(summary == (word != 0));
		INVARIANT((word & ~range_mask(w, 0, b->nbits)) == 0);
		count += popcount(word);
	}
	if (w_end % WORD_BITS != 0)
		INVARIANT((load(&b->summary[w_end / WORD_BITS]) & UINT64_MAX << w_end % WORD_BITS) == 0);
	INVARIANT(count == __atomic_load_n(&b->count, __ATOMIC_RELAXED));
}
