/* Who syncs to whom (SPEC 8). DRBD's table in meaning; the rules in brackets are the model's names.
 *
 * What makes the answer safe: a generation begins, durably, before a side completes anything that the other lacks
 * (BUMPFIRST), so equal generations mean that all that differs is in someone's dirty set; a target adopts a lineage
 * only when it holds all of it (ADOPTEND), so "your bitmap generation is my current" means partial is enough.
 *
 * docs/protocol.md has this in words ("Who is the source"), tests/lib/repfs_hub.py from these, and
 * tests/e2e/test_57_hub.py compares the two.
 */
#include "core/lineage.h"

#include "core/check.h"

static void history_push(struct lineage *l, uint64_t g)
{
	if (g == 0)
		return;
	for (unsigned i = GENERATIONS_MAX - 1; i > 0; i--)
		l->history[i] = l->history[i - 1];
	l->history[0] = g;
}

void lineage_begin(struct lineage *l, uint64_t g)
{
	PRE(g != 0);
	if (l->bitmap == 0)
		l->bitmap = l->current;
	else
		history_push(l, l->current);
	l->current = g;
}

void lineage_part(struct lineage *l, uint64_t g)
{
	PRE(g != 0);
	lineage_in_sync(l);
	history_push(l, l->current);
	l->current = g;
}

void lineage_in_sync(struct lineage *l)
{
	history_push(l, l->bitmap);
	l->bitmap = 0;
}

void lineage_followed(struct lineage *l, uint64_t g)
{
	if (l->current == g) {
		lineage_in_sync(l);
		return;
	}
	for (unsigned i = 0; i < GENERATIONS_MAX && l->bitmap != 0; i++)
		if (l->history[i] == g) { /* begun since: it took the place of the bitmap generation, which is past */
			l->history[i] = l->bitmap;
			l->bitmap = g;
			return;
		}
}

void lineage_adopt(struct lineage *l, const struct lineage *source)
{
	*l = *source;
	lineage_in_sync(l);
}

bool lineage_has(const struct lineage *l, uint64_t g)
{
	if (g == 0)
		return false;
	for (unsigned i = 0; i < GENERATIONS_MAX; i++)
		if (l->history[i] == g)
			return true;
	return false;
}

/* g is l's own, its bitmap generation, or in its past. */
static bool knows(const struct lineage *l, uint64_t g)
{
	return g != 0 && (l->current == g || l->bitmap == g || lineage_has(l, g));
}

static bool unfinished(const struct wire_join *t)
{
	return (t->flags & WIRE_JOIN_INCONSISTENT) != 0;
}

/* Its disks are whole, current and its own: what it serves is the content, not a copy that follows. What a detached one
 * lacks is on the peer, among what that has written since. */
static bool owns(const struct wire_join *j)
{
	for (uint32_t i = 0; i < j->n_volumes; i++)
		if (j->volumes[i].flags & VOLUME_STALE)
			return false;
	return !unfinished(j) && j->state != STATE_FAILOVER && j->state != STATE_FAILOVER_FAILED &&
	       (j->role != ROLE_SECONDARY || j->state == STATE_DONE);
}

/* The generation that the dirty set of l is complete since: at it the two copies differed by dirty sets alone. */
static uint64_t tracked_since(const struct lineage *l)
{
	return l->bitmap ? l->bitmap : l->current;
}

/* Which of the two a `resolve` gives up: 0, 1, or -1 when none was asked for or the two contradict each other. */
static int given_up(const struct wire_join *const j[2])
{
	bool lost[2];
	for (int i = 0; i < 2; i++)
		lost[i] = (j[i]->flags & WIRE_JOIN_DISCARD_MINE) != 0 || (j[!i]->flags & WIRE_JOIN_DISCARD_YOURS) != 0;
	return lost[0] == lost[1] ? -1 : lost[1];
}

/* Both wrote alone: nothing is synced, unless somebody has decided whose copy is given up. */
static enum lineage_decision split(const struct wire_join *const j[2], int *ret_source)
{
	int loser = given_up(j);
	if (loser < 0 || !owns(j[!loser]))
		return LINEAGE_SPLIT;
	const struct lineage *a = &j[0]->lineage, *b = &j[1]->lineage;
	bool covered = a->current == b->current || tracked_since(a) == tracked_since(b);
	*ret_source = !loser;
	return covered && !unfinished(j[loser]) ? LINEAGE_PARTIAL : LINEAGE_FULL;
}

/* A secondary that knows of a detached disk of its primary. */
static bool detached(const struct wire_join *s)
{
	for (uint32_t i = 0; i < s->n_volumes && s->role == ROLE_SECONDARY && s->state != STATE_DONE; i++)
		if (s->volumes[i].flags & VOLUME_PEER_STALE)
			return true;
	return false;
}

bool lineage_adopted_since(const struct lineage *x, const struct lineage *y)
{
	return y->bitmap == 0 && y->history[0] == x->bitmap && lineage_has(x, y->current);
}

/* t was the primary, and has handed over to o, which holds all that it had at the same checkpoint. */
static bool hands_over(const struct wire_join *t, const struct wire_join *o)
{
	return (t->flags & WIRE_JOIN_HANDED) != 0 && (o->flags & (WIRE_JOIN_HANDED | WIRE_JOIN_BROKEN)) == 0 &&
	       t->role == ROLE_SECONDARY && t->state == STATE_RUNNING && o->role == ROLE_SECONDARY &&
	       o->state == STATE_RUNNING && !unfinished(t) && !unfinished(o) &&
	       t->lineage.current == o->lineage.current && t->last_stream == o->last_stream && t->last_stream != 0;
}

/* The generations alone, roles aside. */
static enum lineage_decision by_generations(const struct wire_join *const j[2], int *ret_source)
{
	const struct lineage *a = &j[0]->lineage, *b = &j[1]->lineage;
	if (a->current == b->current) {
		if (a->current == 0)
			return LINEAGE_UNRELATED;
		*ret_source = j[0]->role == ROLE_PRIMARY ? 0 : 1;
		return j[0]->role == ROLE_PRIMARY && j[1]->role == ROLE_PRIMARY ? LINEAGE_SPLIT : LINEAGE_EQUAL;
	}
	for (int i = 0; i < 2; i++) {
		const struct lineage *x = &j[i]->lineage, *y = &j[!i]->lineage;
		if (x->bitmap != 0 && (x->bitmap == y->current || lineage_adopted_since(x, y))) {
			*ret_source = i;
			return LINEAGE_PARTIAL;
		}
	}
	for (int i = 0; i < 2; i++) {
		if (lineage_has(&j[i]->lineage, j[!i]->lineage.current)) {
			*ret_source = i;
			return LINEAGE_FULL;
		}
	}
	if (knows(b, a->bitmap) || knows(a, b->bitmap))
		return LINEAGE_SPLIT;
	for (unsigned k = 0; k < GENERATIONS_MAX; k++)
		if (lineage_has(a, b->history[k]))
			return LINEAGE_SPLIT;
	return LINEAGE_UNRELATED;
}

enum lineage_decision lineage_decide(const struct wire_join *a, const struct wire_join *b, int *ret_source)
{
	const struct wire_join *const j[2] = {a, b};
	/* A halted pair stays halted until `resolve`. */
	if ((a->flags | b->flags) & WIRE_JOIN_SPLIT)
		return split(j, ret_source);
	for (int i = 0; i < 2; i++) {
		if (!hands_over(j[i], j[!i]))
			continue;
		*ret_source = !i;
		return LINEAGE_TAKE_OVER;
	}
	for (int i = 0; i < 2; i++) {
		const struct wire_join *t = j[i], *o = j[!i];
		if (t->role != ROLE_SECONDARY || o->role != ROLE_PRIMARY || unfinished(o))
			continue;
		/* [SYNCFROM] an unfinished target of o goes on partially, without a new decision. But what o wrote
		 * between an `unprotect` and this `protect` stands in no dirty set. */
		if (unfinished(t) && knows(&o->lineage, t->sync_from)) {
			*ret_source = !i;
			return o->flags & WIRE_JOIN_PROTECT ? LINEAGE_FULL : LINEAGE_PARTIAL;
		}
		/* Made, or given up, for a sync that was cut before its first block: everything. */
		if (unfinished(t) && t->sync_from == 0) {
			*ret_source = !i;
			return LINEAGE_FULL;
		}
		/* Made for this protection, or its owner asked for it: everything. */
		if ((o->flags & WIRE_JOIN_PROTECT) != 0 &&
		    ((t->flags & WIRE_JOIN_FRESH) != 0 || (o->flags & WIRE_JOIN_ADOPT) != 0)) {
			*ret_source = !i;
			return LINEAGE_FULL;
		}
	}
	int source = 0;
	enum lineage_decision d = by_generations(j, &source);
	/* [SYNCFROM] An unfinished target wrote nothing alone, and what it had is kept: that its source's generation is
	 * so long past there that it is forgotten (a target that can't record a newer one, a guest that writes between
	 * the tries) makes no split brain of it. Everything, then. Unless the primary's disk was not current. */
	for (int i = 0; i < 2 && d == LINEAGE_SPLIT; i++)
		if (j[i]->role == ROLE_SECONDARY && unfinished(j[i]) && !detached(j[i]) &&
		    j[!i]->role == ROLE_PRIMARY && !unfinished(j[!i])) {
			*ret_source = !i;
			return LINEAGE_FULL;
		}
	if (d == LINEAGE_SPLIT)
		return split(j, ret_source);
	if (d == LINEAGE_UNRELATED)
		return d;
	const struct wire_join *s = j[source], *t = j[!source];
	if (d == LINEAGE_EQUAL && (s->role != ROLE_PRIMARY || t->role != ROLE_SECONDARY))
		return LINEAGE_NO_SOURCE;
	if (t->role == ROLE_PRIMARY) {
		/* The other side is ahead of a primary. It failed over [PRIMTGT]: the primary steps down; a secondary
		 * that wrote after a stop instead is a split brain, whatever the primary did (SPEC 5). */
		if (s->role == ROLE_SECONDARY && detached(s) && !unfinished(s)) {
			*ret_source = !source; /* the primary has not written alone since */
			return LINEAGE_DETACHED;
		}
		if (s->role == ROLE_SECONDARY)
			return split(j, ret_source);
		*ret_source = source;
		return LINEAGE_SHUT_OUT;
	}
	if (s->role != ROLE_PRIMARY || t->role != ROLE_SECONDARY || unfinished(s))
		return LINEAGE_NO_SOURCE;
	*ret_source = source;
	/* What an unfinished sync from elsewhere has changed on it stands in nobody's dirty set. */
	return unfinished(t) ? LINEAGE_FULL : d;
}

const char *lineage_decision_name(enum lineage_decision d)
{
	switch (d) {
	case LINEAGE_EQUAL:
		return "equal";
	case LINEAGE_DETACHED:
		return "detached";
	case LINEAGE_PARTIAL:
		return "partial";
	case LINEAGE_FULL:
		return "full";
	case LINEAGE_SPLIT:
		return "split brain";
	case LINEAGE_UNRELATED:
		return "unrelated";
	case LINEAGE_SHUT_OUT:
		return "shut out";
	case LINEAGE_NO_SOURCE:
		return "no source";
	case LINEAGE_TAKE_OVER:
		return "take over";
	}
	return "?";
}
