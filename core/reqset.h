/* Ranges in flight: who may touch which bytes now, in which order.
 *
 * Each request adds one claim over a range of one volume, shared or exclusive. Two claims conflict when they
 * overlap on the same volume and at least one is exclusive. A claim is granted when no conflicting claim with a
 * smaller ticket remains; so conflicting requests run one at a time in the order in which they were added
 * (SPEC 6, I6), and nothing starves.
 *
 * Each claim counts its blockers: the conflicting claims added before it and not removed yet. Adding counts them,
 * removing decrements the later conflicting ones; a count of zero means granted.
 * Claims are intrusive and owned by the caller: no allocation here. Not thread-safe.
 * Structure: a treap keyed by (volume, off, ticket), each node with the largest end below it; priorities are a
 * hash of the ticket, so a run is reproducible.
 */
#ifndef REPFS_CORE_REQSET_H
#define REPFS_CORE_REQSET_H

#include <stdbool.h>
#include <stdint.h>

struct reqset_claim {
	/* set by the caller before reqset_add */
	uint32_t volume;
	bool shared;
	uint64_t off;
	uint64_t end; /* exclusive; > off */
	/* owned by reqset while added */
	bool added;
	uint32_t blockers;
	uint64_t ticket;
	uint64_t priority;
	uint64_t max_end;
	struct reqset_claim *left, *right;
	struct reqset_claim *next_ready;
};

struct reqset {
	struct reqset_claim *root;
	uint64_t next_ticket;
	uint64_t count;
};

void reqset_init(struct reqset *s);

/* Adds c; true if it is granted at once. */
bool reqset_add(struct reqset *s, struct reqset_claim *c);

/* Removes c, granted or not. Returns the claims that this grants, linked by next_ready in ticket order. */
struct reqset_claim *reqset_remove(struct reqset *s, struct reqset_claim *c);

static inline bool reqset_granted(const struct reqset_claim *c)
{
	return c->added && c->blockers == 0;
}

/* Whether any claim, granted or waiting, shared or not, overlaps [off, end). */
bool reqset_overlaps(const struct reqset *s, uint32_t volume, uint64_t off, uint64_t end);

void reqset_check(const struct reqset *s); /* O(n^2): tests only */

#endif
