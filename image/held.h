/* Which blocks an overlay holds, in memory: a bitmap while blocks are added (the live undo overlay, active, clones),
 * or, once its epoch is closed, a sorted list of 64-block words, which costs what the overlay holds and not what the
 * volume could. A host may keep a thousand of them.
 *
 * Bits may be set by several threads at once, beside readers. A list never changes; held_seal puts one (or another) in
 * place with nobody looking.
 */
#ifndef REPFS_IMAGE_HELD_H
#define REPFS_IMAGE_HELD_H

#include "core/bitmap.h"

#define WORD_SHIFT 6U /* blocks of a word */

/* A word of 64 blocks, of which any is held. */
struct held_word {
	uint64_t mask;
	uint64_t word; /* block >> WORD_SHIFT */
};

struct held_list {
	uint64_t count; /* blocks */
	uint64_t n;
	struct held_word w[]; /* ascending */
};

struct held {
	struct bitmap bits;
	void *memory;		/* of bits; NULL: sealed */
	struct held_list *list; /* owned */
};

int held_init(struct held *h, uint64_t blocks); /* empty. 0 or -ERR_NOMEM */
void held_free(struct held *h);			/* zeroed by calloc is fine */

/* For a volume that has grown: memory as of bitmap_bytes(blocks), zeroed, taken over. A list is what it was. */
void held_grow(struct held *h, uint64_t blocks, void *memory);

bool held_test(const struct held *h, uint64_t block);
uint64_t held_count(const struct held *h);
/* The first block in [from, end) that is held (not held); `end` if there is none. Bounded by the range. */
uint64_t bits_next_set(const struct held *h, uint64_t from, uint64_t end);
uint64_t bits_next_clear(const struct held *h, uint64_t from, uint64_t end);
/* dst |= h; dst is as large as the volume. */
void held_or_into(const struct held *h, struct bitmap *dst);

/* What h holds, as a list; the union of both lists. Returns owned; 0 or -ERR_NOMEM. */
int held_list_of(const struct held *h, struct held_list **ret);
int held_list_union(const struct held_list *a, const struct held_list *b, struct held_list **ret);
/* From now on h is `list`, which it takes over. What it was is in *old, for held_free. */
void held_seal(struct held *h, struct held_list *list, struct held *old);

#endif
