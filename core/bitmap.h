/* Two-level bitmap: one bit per unit, and a summary bit per 64-bit word, so that finding the next set bit in a
 * mostly empty map of 2^28 bits takes microseconds.
 *
 * Memory comes zeroed from the caller (calloc'ed, so untouched parts cost no RSS) and is borrowed.
 * set, set_range and test may run concurrently on any bits (atomic, release/acquire: what a thread wrote before
 * setting a bit is seen by a thread that sees the bit set). clear* and next_clear need the caller's exclusion
 * against set* on the same words. `count` is exact when no set/clear is under way.
 * Invariant: summary bit i is set if word i is not zero (it may be set for a zero word only during a clear).
 */
#ifndef REPFS_CORE_BITMAP_H
#define REPFS_CORE_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BITMAP_NONE UINT64_MAX

struct bitmap {
	uint64_t nbits;
	uint64_t count; /* set bits */
	uint64_t *words;
	uint64_t *summary;
};

/* Bytes of zeroed, 8-byte aligned memory for nbits. */
size_t bitmap_bytes(uint64_t nbits);
void bitmap_init(struct bitmap *b, uint64_t nbits, void *zeroed);

bool bitmap_test(const struct bitmap *b, uint64_t bit);
bool bitmap_set(struct bitmap *b, uint64_t bit);   /* true: it was clear */
bool bitmap_clear(struct bitmap *b, uint64_t bit); /* true: it was set */
/* [first, first + n); n may be 0. Return how many bits changed. */
uint64_t bitmap_set_range(struct bitmap *b, uint64_t first, uint64_t n);
uint64_t bitmap_clear_range(struct bitmap *b, uint64_t first, uint64_t n);
void bitmap_clear_all(struct bitmap *b); /* cost follows the set words, not nbits */
bool bitmap_any(const struct bitmap *b, uint64_t first, uint64_t n);

/* The first set (clear) bit at or after `from`, BITMAP_NONE when there is none. */
uint64_t bitmap_next_set(const struct bitmap *b, uint64_t from);
uint64_t bitmap_next_clear(const struct bitmap *b, uint64_t from);
/* The first run of set bits, [*ret_first, *ret_end), at or after `from`; false when there is none. */
bool bitmap_next_run(const struct bitmap *b, uint64_t from, uint64_t *ret_first, uint64_t *ret_end);

/* dst |= src; same nbits. Cost follows src's set words. */
void bitmap_or(struct bitmap *dst, const struct bitmap *src);
/* dst = src; same nbits. */
void bitmap_copy(struct bitmap *dst, const struct bitmap *src);
void bitmap_swap(struct bitmap *a, struct bitmap *b);

/* b goes on with nbits, no fewer than it had, in new zeroed memory of bitmap_bytes(nbits); what it had is the caller's
 * again. Needs the exclusion of set* too. */
void bitmap_grow(struct bitmap *b, uint64_t nbits, void *zeroed);

void bitmap_check(const struct bitmap *b); /* re-checks the invariant and count; O(nbits) */

#endif
