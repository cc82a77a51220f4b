/* Who syncs to whom: the decision over both sides' generations as one pure function (SPEC 8; the table is DRBD's in
 * meaning). Both hosts compute it from the two JOINs and must come to the same answer. */
#ifndef REPFS_CORE_LINEAGE_H
#define REPFS_CORE_LINEAGE_H

#include "core/wire.h"

enum lineage_decision {
	LINEAGE_EQUAL,	   /* the dirty regions of both, from the primary */
	LINEAGE_DETACHED,  /* as EQUAL: the secondary's newest generations were begun for a detach of the primary's disk
			    */
	LINEAGE_PARTIAL,   /* the dirty regions of both, from `source` */
	LINEAGE_FULL,	   /* everything, from `source` */
	LINEAGE_SPLIT,	   /* both wrote alone, and nobody has said whose copy is given up */
	LINEAGE_UNRELATED, /* nothing in common: refuse */
	LINEAGE_SHUT_OUT,  /* the primary's peer has failed over and is ahead; the primary wrote nothing alone */
	LINEAGE_NO_SOURCE, /* neither side may be the source (both inconsistent, or the source is not a primary) */
	LINEAGE_TAKE_OVER, /* two secondaries: one has handed over in a switchover, `source` becomes primary first */
};

/* a is the dialer, b the listener. *ret_source: 0 = a, 1 = b; set for EQUAL, PARTIAL, FULL, SHUT_OUT (the survivor),
 * TAKE_OVER. */
enum lineage_decision lineage_decide(const struct wire_join *a, const struct wire_join *b, int *ret_source);
const char *lineage_decision_name(enum lineage_decision d);

/* Begins generation g: current → bitmap if that is free, else into the history. */
void lineage_begin(struct lineage *l, uint64_t g);
/* Begins generation g without a peer: nothing is tracked any more, so no later sync of it can be partial. */
void lineage_part(struct lineage *l, uint64_t g);
/* The peer is in sync: bitmap moves to the history. */
void lineage_in_sync(struct lineage *l);
/* The peer holds all of generation g, the current one now or at an earlier moment: that is what the dirty regions are
 * counted from. */
void lineage_followed(struct lineage *l, uint64_t g);
/* x has not heard that y adopted a generation of its, one begun after x->bitmap, and has begun another since. x has
 * kept its dirty set since x->bitmap, so what differs from y is in it all the same. */
bool lineage_adopted_since(const struct lineage *x, const struct lineage *y);
/* What a target adopts from its source. */
void lineage_adopt(struct lineage *l, const struct lineage *source);
bool lineage_has(const struct lineage *l, uint64_t g); /* in the history, g != 0 */

#endif
