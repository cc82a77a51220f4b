/* Which closed epoch of a chain has a block: for reads of old images, in a time that does not grow with the number of
 * epochs kept.
 *
 * For each word of 64 blocks that any closed epoch holds there is a cell: (checkpoint, mask) for each that holds some,
 * ascending by checkpoint. The first entry at or behind k with a block's bit is the overlay that image(k) takes the
 * block from. All 64 blocks are answered in one pass over one cell.
 *
 * Invariants
 *   X1 For each sealed overlay of the chain (image/volume_internal.h) each word that it holds has its entry, with
 * exactly its mask. X2 Other entries are of an overlay that is being sealed (a part of what it holds; it is in the
 * chain, behind all sealed ones), or of one that has left the chain and is not reaped yet. Such a one is never the
 * answer: what it held the next older one of the chain holds too, in front of it, since it was merged into that; or
 * nothing older was left, so that no k asked for is at or below it.
 *
 * One thread changes it at a time (the caller's index_lock), beside readers: a lock for each group of cells, held for
 * one look, or one change, of one cell.
 */
#ifndef REPFS_IMAGE_CHAININDEX_H
#define REPFS_IMAGE_CHAININDEX_H

#include "image/held.h"

struct chainindex;

int chainindex_new(uint64_t blocks, struct chainindex **ret); /* returns owned; 0 or -ERR_NOMEM */
void chainindex_free(struct chainindex *x);		      /* NULL is fine */

/* Checkpoint `id` holds what `l` does, beside what it has already. -ERR_NOMEM: a part of it was added; it may be added
 * again. */
int chainindex_add(struct chainindex *x, uint64_t id, const struct held_list *l);
/* Takes out what `id` holds in the words of l. */
void chainindex_remove(struct chainindex *x, uint64_t id, const struct held_list *l);

/* Who has block `from` in image(k): true, its checkpoint in *ret_id and the end of the run of blocks that it is the
 * answer for, `end` at most. False: no closed epoch; *ret_end is the first block in [from, end) that one has, or end.
 */
bool chainindex_find(struct chainindex *x, uint64_t k, uint64_t from, uint64_t end, uint64_t *ret_id,
		     uint64_t *ret_end);
/* The first block in [from, end) that any (no) closed epoch at or behind k has; `end` if there is none. */
uint64_t chainindex_next_held(struct chainindex *x, uint64_t k, uint64_t from, uint64_t end);
uint64_t chainindex_next_free(struct chainindex *x, uint64_t k, uint64_t from, uint64_t end);

uint64_t chainindex_entries(const struct chainindex *x); /* tests: nothing is left behind */

#endif
