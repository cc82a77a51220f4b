/* Who syncs to whom: the table of SPEC 8 row by row, and every history of two hosts against an oracle that knows no
 * generations.
 *
 * The oracle keeps of each host the content of its regions and two sets of events: `has`, all that ever went into its
 * copy, and `alone`, the writes, flushes and failovers among them that were completed without the other host. A sync
 * from s to t throws away alone(t) minus has(s): unless a person has decided that, it has to be empty. What a partial
 * sync moves has to be all that differs. The hosts beside it do with their generations and dirty sets what the core
 * does, through the real lineage_* functions.
 */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "core/lineage.h"

#define REGIONS 2
#define ALL ((1U << REGIONS) - 1)
#define LENGTH 6
#define WALKS 120000
#define WALK_LENGTH 24

struct side {
	uint8_t role, state;
	bool alone_flag, inconsistent, split, fresh, has_peer, shut_out;
	struct lineage lineage;
	uint64_t sync_from;
	uint16_t content[REGIONS], ckpt[REGIONS], kept[REGIONS];
	uint32_t dirty, touched; /* touched: since ckpt, or kept */
	bool has_ckpt, has_kept;
	bool handed;
	uint64_t last; /* the checkpoint of a switchover */
	/* the oracle's */
	uint64_t has[2], alone[2];
};

struct world {
	struct side s[2];
	bool up;
	int source;
	bool related; /* no unprotect since the last sync */
	uint64_t generation, numbers;
	unsigned events;
};

/* How far a connection gets. */
enum reach { ACTIVATED, MARKED, HALF, ADOPTED, SYNCED, REACHES };
enum kind {
	WRITE,
	WRITE_LOST,
	CLEAR,
	CUT,
	CRASH,
	FAILOVER,
	STOP,
	CONNECT,
	FAILBACK,
	RESOLVE,
	UNPROTECT,
	ADOPT,
	SWITCH,
	KINDS
};

struct event {
	enum kind kind;
	int host;
	int arg; /* region, reach, or for a failover: to the checkpoint */
};

static char trail[4096];
static uint64_t decisions[LINEAGE_TAKE_OVER + 1], checked;

static void bit_set(uint64_t set[2], unsigned n)
{
	set[n / 64] |= UINT64_C(1) << (n % 64);
}

static bool lost(const struct side *target, const struct side *source)
{
	return (target->alone[0] & ~source->has[0]) != 0 || (target->alone[1] & ~source->has[1]) != 0;
}

static bool primary(const struct side *x)
{
	return x->role == ROLE_PRIMARY;
}

static bool owner(const struct side *x)
{
	return x->role != ROLE_SECONDARY || x->state == STATE_DONE;
}

static void world_init(struct world *w)
{
	memset(w, 0, sizeof(*w));
	w->generation = 100;
	w->related = w->up = true;
	for (int i = 0; i < 2; i++) {
		w->s[i].role = i ? ROLE_SECONDARY : ROLE_PRIMARY;
		w->s[i].state = STATE_RUNNING;
		w->s[i].has_peer = true;
		w->s[i].lineage.current = w->generation;
	}
	w->s[1].has_ckpt = true;
}

static void join_of(const struct side *x, uint32_t flags, struct wire_join *j)
{
	j->role = x->role;
	j->state = x->state;
	j->lineage = x->lineage;
	j->sync_from = x->sync_from;
	j->flags = flags | (x->inconsistent ? WIRE_JOIN_INCONSISTENT : 0U) | (x->split ? WIRE_JOIN_SPLIT : 0U) |
		   (x->fresh ? WIRE_JOIN_FRESH : 0U) | (x->handed ? WIRE_JOIN_HANDED : 0U);
	j->last_stream = x->last;
	if (flags & (WIRE_JOIN_PROTECT | WIRE_JOIN_FAILBACK))
		j->role = ROLE_PRIMARY;
}

#define HOLDS(cond, what) cr_assert(cond, "%s\n  after%s\n  decided: %s", what, trail, lineage_decision_name(d))

/* Decides, both ways round, and asks the oracle. */
static enum lineage_decision decide(const struct world *w, const uint32_t flags[2], int *source)
{
	static struct wire_join j[2];
	int back = -1;
	*source = -1;
	for (int i = 0; i < 2; i++)
		join_of(&w->s[i], flags[i], &j[i]);
	enum lineage_decision d = lineage_decide(&j[0], &j[1], source);
	HOLDS(lineage_decide(&j[1], &j[0], &back) == d && (*source < 0 ? back < 0 : back == !*source),
	      "the two hosts disagree");
	decisions[d]++;
	checked++;
	const uint32_t asked = WIRE_JOIN_DISCARD_MINE | WIRE_JOIN_DISCARD_YOURS | WIRE_JOIN_ADOPT;
	bool by_hand = ((flags[0] | flags[1]) & asked) != 0;
	bool halted = w->s[0].split || w->s[1].split;
	bool both = lost(&w->s[0], &w->s[1]) && lost(&w->s[1], &w->s[0]);
	if (d == LINEAGE_EQUAL || d == LINEAGE_PARTIAL || d == LINEAGE_FULL || d == LINEAGE_SHUT_OUT) {
		const struct side *s = &w->s[*source], *t = &w->s[!*source];
		HOLDS(by_hand || t->inconsistent || !lost(t, s),
		      "what was completed alone is thrown away without a decision");
		HOLDS(!s->inconsistent, "an unfinished target is the source");
		HOLDS(!halted || by_hand, "a halted pair goes on by itself");
		if (d == LINEAGE_SHUT_OUT) {
			HOLDS(primary(t) && j[*source].role != ROLE_SECONDARY, "who is shut out is not a primary");
		} else if (by_hand) {
			HOLDS(owner(s), "a copy that only follows is the source");
		} else {
			HOLDS(j[*source].role == ROLE_PRIMARY, "the source is not a primary");
			HOLDS(t->role == ROLE_SECONDARY, "a disk that is served would be written over");
		}
		HOLDS(d != LINEAGE_FULL || by_hand || t->inconsistent || !w->related,
		      "everything travels, though what differs is known");
		for (unsigned r = 0; r < REGIONS && (d == LINEAGE_EQUAL || d == LINEAGE_PARTIAL); r++)
			HOLDS(s->content[r] == t->content[r] || ((s->dirty | t->dirty) >> r & 1) != 0,
			      "what differs is in nobody's dirty set");
		return d;
	}
	if (d == LINEAGE_TAKE_OVER) {
		const struct side *s = &w->s[*source], *t = &w->s[!*source];
		HOLDS(t->handed && !s->handed && s->role == ROLE_SECONDARY && !s->inconsistent && !halted,
		      "who takes over is not the secondary");
		HOLDS(!lost(t, s) && !lost(s, t) && memcmp(s->content, t->content, sizeof(s->content)) == 0,
		      "who takes over does not hold the same");
		return d;
	}
	HOLDS(!(w->s[0].handed || w->s[1].handed) || d != LINEAGE_NO_SOURCE || w->s[0].role == ROLE_STANDALONE ||
		  w->s[1].role == ROLE_STANDALONE || !w->related,
	      "nobody takes over");
	bool stopped_writer = false;
	for (int i = 0; i < 2; i++)
		stopped_writer = stopped_writer || (w->s[i].role == ROLE_SECONDARY && w->s[i].state == STATE_DONE &&
						    lost(&w->s[i], &w->s[!i]));
	if (d == LINEAGE_SPLIT)
		HOLDS(halted || both || stopped_writer, "no split brain: one of them knows all of the other");
	HOLDS(!both || !w->related || d == LINEAGE_SPLIT, "both completed something alone");
	if (d == LINEAGE_UNRELATED)
		HOLDS(!w->related, "they come from one another");
	for (int i = 0; i < 2; i++) {
		const struct side *s = &w->s[i], *t = &w->s[!i];
		bool follows = j[i].role == ROLE_PRIMARY && !s->inconsistent && t->role == ROLE_SECONDARY;
		HOLDS(!follows || !w->related || halted || (lost(t, s) && !t->inconsistent),
		      "a copy that has nothing of its own, or has given it up, can't follow");
	}
	return d;
}

static void event_of(struct world *w, struct side *x, bool by_itself)
{
	bit_set(x->has, w->events);
	if (by_itself)
		bit_set(x->alone, w->events);
	w->events++;
}

static void begin(struct world *w, struct side *x)
{
	lineage_begin(&x->lineage, ++w->generation);
	x->alone_flag = true;
}

static bool do_write(struct world *w, int h, unsigned r, bool received)
{
	struct side *x = &w->s[h], *y = &w->s[!h];
	if (!owner(x) || (w->up && w->source != h) || (!w->up && !received))
		return false;
	if (!w->up && !x->alone_flag)
		begin(w, x);
	if (x->has_peer)
		x->dirty |= 1U << r;
	x->content[r] = (uint16_t)(w->events + 1);
	event_of(w, x, !w->up);
	if (w->up && received) {
		y->content[r] = x->content[r];
		y->touched |= 1U << r;
		bit_set(y->has, w->events - 1);
	}
	if (w->up && !received)
		w->up = false; /* a cut swallowed it */
	return true;
}

/* Bits clear only when both have it. */
static bool do_clear(struct world *w)
{
	if (!w->up || !w->s[w->source].dirty)
		return false;
	w->s[w->source].dirty = 0;
	return true;
}

/* What the disk keeps of the dirty set is coarser. */
static bool do_crash(struct world *w, int h)
{
	if (w->s[h].dirty == 0 || w->s[h].dirty == ALL)
		return false;
	w->up = false;
	w->s[h].dirty = ALL;
	return true;
}

static bool do_failover(struct world *w, int h, bool to_ckpt)
{
	struct side *x = &w->s[h];
	if (x->role != ROLE_SECONDARY || x->state == STATE_DONE)
		return false;
	bool back = x->inconsistent || to_ckpt;
	if (back && !x->has_ckpt && !x->has_kept)
		return false;
	w->up = false;
	if (back)
		memcpy(x->content, x->has_ckpt ? x->ckpt : x->kept, sizeof(x->content));
	x->dirty |= x->touched; /* FOBITS */
	begin(w, x);		/* FOGEN */
	event_of(w, x, true);
	x->role = ROLE_STANDALONE;
	x->state = STATE_DONE;
	x->inconsistent = x->shut_out = x->fresh = x->has_ckpt = x->has_kept = x->handed = false;
	x->has_peer = true;
	x->sync_from = 0;
	x->touched = 0;
	return true;
}

static bool do_stop(struct world *w)
{
	if (!w->up)
		return false;
	w->up = false;
	w->s[0].state = w->s[1].state = STATE_DONE;
	return true;
}

static bool do_unprotect(struct world *w, int h)
{
	struct side *x = &w->s[h];
	if (w->up || x->inconsistent || !x->has_peer || (x->role == ROLE_SECONDARY && x->state == STATE_RUNNING))
		return false;
	lineage_part(&x->lineage, ++w->generation);
	x->alone_flag = true;
	event_of(w, x, true);
	x->role = ROLE_STANDALONE;
	x->state = STATE_DONE;
	x->has_peer = x->split = x->shut_out = false;
	x->dirty = 0;
	w->related = false;
	return true;
}

/* Nothing is dirty, both hold the checkpoint, the source is none any more; and perhaps the other is. */
static bool do_switch(struct world *w, bool taken)
{
	struct side *s = &w->s[w->source], *t = &w->s[!w->source];
	if (!w->up)
		return false;
	w->up = false;
	s->dirty = t->dirty = 0;
	s->role = ROLE_SECONDARY;
	s->handed = true;
	s->last = t->last = ++w->numbers;
	for (int i = 0; i < 2; i++) {
		memcpy(w->s[i].ckpt, w->s[i].content, sizeof(w->s[i].ckpt));
		w->s[i].has_ckpt = true;
		w->s[i].touched = 0;
	}
	if (taken)
		t->role = ROLE_PRIMARY;
	return true;
}

/* The target's durable mark, with what it had. */
static void keep(struct side *t, uint64_t from)
{
	if (owner(t) || t->shut_out) {
		t->has_ckpt = false; /* LASTLIN */
		t->state = STATE_NONE;
	}
	t->role = ROLE_SECONDARY;
	if (!t->inconsistent) {
		memcpy(t->kept, t->content, sizeof(t->kept));
		t->has_kept = true;
		if (!t->has_ckpt)
			t->touched = 0;
	}
	t->inconsistent = true;
	t->split = t->shut_out = t->handed = false;
	t->sync_from = from;
}

static void sync(struct world *w, int source, enum lineage_decision d, enum reach reach)
{
	struct side *s = &w->s[source], *t = &w->s[!source];
	uint32_t set = d == LINEAGE_FULL ? ALL : s->dirty | t->dirty;
	bool whole = !t->inconsistent && !t->fresh;
	s->dirty = set; /* UNION, UNIONDUR */
	s->role = ROLE_PRIMARY;
	s->state = STATE_RUNNING;
	s->has_peer = true;
	s->split = s->alone_flag = false;
	if (t->role == ROLE_SECONDARY && t->state == STATE_DONE && !t->alone_flag)
		t->state = STATE_NONE; /* a start */
	if (reach == ACTIVATED)
		return;
	if (set || d != LINEAGE_EQUAL || !whole) {
		keep(t, s->lineage.current);
		if (reach == MARKED)
			return;
		for (unsigned r = 0; r < (reach == HALF ? 1U : REGIONS); r++)
			if (set >> r & 1) {
				t->content[r] = s->content[r];
				t->touched |= 1U << r;
			}
		if (reach == HALF)
			return;
	}
	cr_assert(memcmp(s->content, t->content, sizeof(s->content)) == 0, "the sync left a difference\n  after%s",
		  trail);
	lineage_adopt(&t->lineage, &s->lineage);
	t->inconsistent = t->fresh = t->alone_flag = t->has_kept = t->handed = false;
	t->has_peer = true;
	t->sync_from = 0;
	t->dirty = 0;
	memcpy(t->has, s->has, sizeof(t->has));
	memcpy(t->alone, s->alone, sizeof(t->alone));
	w->related = true;
	if (reach == ADOPTED)
		return;
	lineage_in_sync(&s->lineage);
	w->up = true;
	w->source = source;
	memcpy(t->ckpt, t->content, sizeof(t->ckpt));
	t->has_ckpt = true;
	t->touched = 0;
	t->state = STATE_RUNNING;
}

/* A split brain is recorded by one or both of them. */
static bool connect(struct world *w, const uint32_t flags[2], enum reach reach)
{
	int source;
	enum lineage_decision d = decide(w, flags, &source);
	switch (d) {
	case LINEAGE_EQUAL:
	case LINEAGE_PARTIAL:
	case LINEAGE_FULL:
		sync(w, source, d, reach);
		return true;
	case LINEAGE_SHUT_OUT:
		w->s[!source].role = ROLE_SECONDARY;
		w->s[!source].state = STATE_NONE;
		w->s[!source].shut_out = true;
		w->s[!source].has_ckpt = false;
		return reach == SYNCED;
	case LINEAGE_SPLIT:
		if (reach == ACTIVATED || reach == SYNCED)
			w->s[0].split = true;
		if (reach == MARKED || reach == SYNCED)
			w->s[1].split = true;
		return reach == ACTIVATED || reach == MARKED || reach == SYNCED;
	case LINEAGE_TAKE_OVER:
		w->s[source].role = ROLE_PRIMARY;
		return reach == SYNCED;
	default:
		return reach == SYNCED;
	}
}

static bool do_connect(struct world *w, enum reach reach)
{
	static const uint32_t none[2];
	return !w->up && connect(w, none, reach);
}

static bool do_failback(struct world *w, int h, enum reach reach)
{
	struct side *x = &w->s[h], *y = &w->s[!h];
	if (w->up || x->role != ROLE_STANDALONE || !x->has_peer || x->split || y->role == ROLE_STANDALONE)
		return false;
	uint32_t flags[2] = {0};
	flags[h] = WIRE_JOIN_FAILBACK;
	int source;
	if (primary(y) && decide(w, flags, &source) == LINEAGE_SHUT_OUT)
		(void)connect(w, flags, SYNCED);
	return connect(w, flags, reach);
}

static bool do_resolve(struct world *w, int loser, enum reach reach)
{
	if (w->up || !(w->s[0].split || w->s[1].split))
		return false;
	/* Given on either host: the same answer. */
	uint32_t here[2] = {0}, there[2] = {0};
	here[loser] = WIRE_JOIN_DISCARD_MINE;
	there[!loser] = WIRE_JOIN_DISCARD_YOURS;
	int a, b;
	enum lineage_decision d = decide(w, here, &a);
	HOLDS(decide(w, there, &b) == d && a == b, "it matters where `resolve` is given");
	HOLDS(d == LINEAGE_SPLIT || a == !loser, "the one that was given up is the source");
	HOLDS(d != LINEAGE_SPLIT || !owner(&w->s[!loser]) || w->s[!loser].inconsistent, "the survivor may not win");
	uint32_t against[2] = {WIRE_JOIN_DISCARD_MINE, WIRE_JOIN_DISCARD_MINE};
	HOLDS(decide(w, against, &b) == LINEAGE_SPLIT, "two that contradict each other decide something");
	return d != LINEAGE_SPLIT && connect(w, here, reach);
}

static bool do_adopt(struct world *w, int h, enum reach reach)
{
	struct side *x = &w->s[h], *y = &w->s[!h];
	if (w->up || x->role != ROLE_STANDALONE || x->split || y->split || y->role == ROLE_PRIMARY ||
	    (y->role == ROLE_SECONDARY && w->related))
		return false;
	uint32_t flags[2] = {0};
	flags[h] = WIRE_JOIN_PROTECT | WIRE_JOIN_ADOPT;
	if (y->role == ROLE_STANDALONE) {
		/* One metadata write: it follows, its content is kept. */
		keep(y, 0);
		y->has_peer = true;
	}
	return connect(w, flags, reach);
}

static bool apply(struct world *w, const struct event *e)
{
	if (w->events >= 124)
		return false;
	switch (e->kind) {
	case WRITE:
		return do_write(w, e->host, (unsigned)e->arg, true);
	case WRITE_LOST:
		return do_write(w, e->host, (unsigned)e->arg, false);
	case CLEAR:
		return do_clear(w);
	case CUT:
		if (!w->up)
			return false;
		w->up = false;
		return true;
	case CRASH:
		return do_crash(w, e->host);
	case FAILOVER:
		return do_failover(w, e->host, e->arg != 0);
	case STOP:
		return do_stop(w);
	case CONNECT:
		return do_connect(w, (enum reach)e->arg);
	case FAILBACK:
		return do_failback(w, e->host, (enum reach)e->arg);
	case RESOLVE:
		return do_resolve(w, e->host, (enum reach)e->arg);
	case UNPROTECT:
		return do_unprotect(w, e->host);
	case ADOPT:
		return do_adopt(w, e->host, (enum reach)e->arg);
	case SWITCH:
		return do_switch(w, e->arg != 0);
	case KINDS:
		break;
	}
	return false;
}

static unsigned events_all(struct event *out)
{
	static const struct {
		int hosts, args;
	} dim[KINDS] = {
	    [WRITE] = {2, REGIONS},    [WRITE_LOST] = {2, 1},	 [CLEAR] = {1, 1},     [CUT] = {1, 1},
	    [CRASH] = {2, 1},	       [FAILOVER] = {2, 2},	 [STOP] = {1, 1},      [CONNECT] = {1, REACHES},
	    [FAILBACK] = {2, REACHES}, [RESOLVE] = {2, REACHES}, [UNPROTECT] = {2, 1}, [ADOPT] = {2, REACHES},
	    [SWITCH] = {1, 2}};
	unsigned n = 0;
	for (int k = 0; k < KINDS; k++)
		for (int h = 0; h < dim[k].hosts; h++)
			for (int a = 0; a < dim[k].args; a++)
				out[n++] = (struct event){(enum kind)k, h, a};
	return n;
}

static size_t trail_add(size_t at, const struct event *e)
{
	static const char *const names[] = {"write",	 "write-lost", "clear",	  "cut",      "crash",
					    "failover",	 "stop",       "connect", "failback", "resolve",
					    "unprotect", "adopt",      "switch"};
	return at +
	       (size_t)snprintf(trail + at, sizeof(trail) - at, " %s/%c/%d", names[e->kind], 'A' + e->host, e->arg);
}

static void every(const struct world *w, const struct event *all, unsigned n, unsigned depth, size_t at)
{
	for (unsigned i = 0; i < n; i++) {
		struct world next = *w;
		size_t end = trail_add(at, &all[i]);
		if (apply(&next, &all[i]) && depth > 1)
			every(&next, all, n, depth - 1, end);
		trail[at] = 0;
	}
}

Test(lineage, every_history_of_six_events, .timeout = 60)
{
	struct event all[96];
	struct world w;
	unsigned n = events_all(all);
	world_init(&w);
	every(&w, all, n, LENGTH, 0);
	for (int d = 0; d <= LINEAGE_TAKE_OVER; d++)
		/* A detach is no event of this world: the table has it. */
		cr_assert(decisions[d] > 0 || d == LINEAGE_UNRELATED || d == LINEAGE_DETACHED, "%s was never decided",
			  lineage_decision_name((enum lineage_decision)d));
	cr_assert_gt(checked, 100000);
}

static uint64_t rng_next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

Test(lineage, long_random_histories, .timeout = 60)
{
	struct event all[96];
	unsigned n = events_all(all);
	uint64_t x = UINT64_C(0x9e3779b97f4a7c15);
	for (unsigned walk = 0; walk < WALKS; walk++) {
		struct world w;
		size_t at = 0;
		world_init(&w);
		for (unsigned k = 0; k < WALK_LENGTH; k++) {
			const struct event *e = &all[rng_next(&x) % n];
			struct world next = w;
			size_t end = trail_add(at, e);
			if (apply(&next, e)) {
				w = next;
				at = end;
			}
			trail[at] = 0;
		}
	}
	cr_assert_gt(checked, 300000);
}

/* ---- the table ---- */

#define HOST(r, s, ...)                                                                                                \
	{                                                                                                              \
		.role = ROLE_##r, .state = STATE_##s, __VA_ARGS__                                                      \
	}
#define INC WIRE_JOIN_INCONSISTENT
#define SPLIT_FLAG WIRE_JOIN_SPLIT

struct row {
	const char *what;
	struct {
		uint8_t role, state;
		uint64_t current, bitmap, history, sync_from;
		uint32_t flags;
		uint8_t volume_flags;
	} h[2];
	enum lineage_decision want;
	int source; /* -1: none */
};

/* Generations: 1 the common one; 2 and 3 begun alone; 9 of somebody else. */
static const struct row rows[] = {
    {"equal: from the primary",
     {HOST(PRIMARY, RUNNING, .current = 1), HOST(SECONDARY, RUNNING, .current = 1)},
     LINEAGE_EQUAL,
     0},
    {"equal, but the target is unfinished from elsewhere",
     {HOST(PRIMARY, RUNNING, .current = 1), HOST(SECONDARY, NONE, .current = 1, .sync_from = 9, .flags = INC)},
     LINEAGE_FULL,
     0},
    {"equal, two secondaries",
     {HOST(SECONDARY, RUNNING, .current = 1), HOST(SECONDARY, RUNNING, .current = 1)},
     LINEAGE_NO_SOURCE,
     -1},
    {"equal, an unfinished primary",
     {HOST(PRIMARY, RUNNING, .current = 1, .flags = INC), HOST(SECONDARY, RUNNING, .current = 1)},
     LINEAGE_NO_SOURCE,
     -1},
    {"equal, two primaries",
     {HOST(PRIMARY, RUNNING, .current = 1), HOST(PRIMARY, RUNNING, .current = 1)},
     LINEAGE_SPLIT,
     -1},
    {"the primary wrote alone",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1), HOST(SECONDARY, RUNNING, .current = 1)},
     LINEAGE_PARTIAL,
     0},
    {"it did, and synced since without hearing the end",
     {HOST(PRIMARY, RUNNING, .current = 3, .bitmap = 1, .history = 2),
      HOST(SECONDARY, RUNNING, .current = 2, .history = 1)},
     LINEAGE_PARTIAL,
     0},
    {"the target followed it before the dirty set began",
     {HOST(PRIMARY, RUNNING, .current = 3, .bitmap = 1, .history = 2),
      HOST(SECONDARY, RUNNING, .current = 2, .history = 9)},
     LINEAGE_FULL,
     0},
    {"the target is an older copy",
     {HOST(PRIMARY, RUNNING, .current = 3, .bitmap = 0, .history = 1), HOST(SECONDARY, NONE, .current = 1)},
     LINEAGE_FULL,
     0},
    {"the peer has failed over",
     {HOST(STANDALONE, DONE, .current = 2, .bitmap = 1), HOST(PRIMARY, RUNNING, .current = 1)},
     LINEAGE_SHUT_OUT,
     0},
    {"failback to the one that stepped down",
     {HOST(PRIMARY, DONE, .current = 2, .bitmap = 1), HOST(SECONDARY, NONE, .current = 1)},
     LINEAGE_PARTIAL,
     0},
    {"failback to one that has not heard yet",
     {HOST(PRIMARY, DONE, .current = 2, .bitmap = 1), HOST(PRIMARY, RUNNING, .current = 1)},
     LINEAGE_SHUT_OUT,
     0},
    {"a survivor that nobody made primary is no source",
     {HOST(STANDALONE, DONE, .current = 2, .bitmap = 1), HOST(SECONDARY, NONE, .current = 1)},
     LINEAGE_NO_SOURCE,
     -1},
    {"both wrote alone",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1), HOST(STANDALONE, DONE, .current = 3, .bitmap = 1)},
     LINEAGE_SPLIT,
     -1},
    {"both, from what one of them had synced since",
     {HOST(PRIMARY, RUNNING, .current = 4, .bitmap = 1, .history = 2),
      HOST(STANDALONE, DONE, .current = 3, .bitmap = 2)},
     LINEAGE_SPLIT,
     -1},
    {"both, long ago",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 0, .history = 1),
      HOST(PRIMARY, RUNNING, .current = 3, .bitmap = 0, .history = 1)},
     LINEAGE_SPLIT,
     -1},
    {"a secondary wrote after a stop",
     {HOST(PRIMARY, DONE, .current = 1), HOST(SECONDARY, DONE, .current = 2, .bitmap = 1)},
     LINEAGE_SPLIT,
     -1},
    {"nothing in common",
     {HOST(PRIMARY, RUNNING, .current = 1), HOST(SECONDARY, RUNNING, .current = 9)},
     LINEAGE_UNRELATED,
     -1},
    {"never written, not made for this",
     {HOST(PRIMARY, RUNNING, .current = 0), HOST(SECONDARY, RUNNING, .current = 0)},
     LINEAGE_UNRELATED,
     -1},
    {"made for this protection",
     {HOST(PRIMARY, NONE, .current = 1, .flags = WIRE_JOIN_PROTECT), HOST(SECONDARY, NONE, .flags = WIRE_JOIN_FRESH)},
     LINEAGE_FULL,
     0},
    {"made for it, cut before its first block",
     {HOST(PRIMARY, RUNNING, .current = 1), HOST(SECONDARY, NONE, .flags = WIRE_JOIN_FRESH | INC)},
     LINEAGE_FULL,
     0},
    {"given up for it, cut likewise",
     {HOST(PRIMARY, RUNNING, .current = 1), HOST(SECONDARY, NONE, .current = 9, .flags = INC)},
     LINEAGE_FULL,
     0},
    {"unfinished, from the source as it is",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1),
      HOST(SECONDARY, NONE, .current = 3, .bitmap = 1, .sync_from = 2, .flags = INC)},
     LINEAGE_PARTIAL,
     0},
    {"unfinished, from the source as it was",
     {HOST(PRIMARY, RUNNING, .current = 4, .bitmap = 1, .history = 2),
      HOST(SECONDARY, NONE, .current = 3, .bitmap = 1, .sync_from = 2, .flags = INC)},
     LINEAGE_PARTIAL,
     0},
    {"unfinished, and the source was unprotected between",
     {HOST(PRIMARY, NONE, .current = 4, .bitmap = 0, .history = 2, .flags = WIRE_JOIN_PROTECT),
      HOST(SECONDARY, NONE, .current = 3, .bitmap = 1, .sync_from = 2, .flags = INC)},
     LINEAGE_FULL,
     0},
    {"unfinished, from the source as it was so long ago that it has forgotten",
     {HOST(PRIMARY, RUNNING, .current = 40, .bitmap = 1, .history = 39),
      HOST(SECONDARY, NONE, .current = 3, .bitmap = 1, .sync_from = 2, .flags = INC)},
     LINEAGE_FULL,
     0},
    {"that, and it has the only current copy of a disk",
     {HOST(PRIMARY, RUNNING, .current = 40, .bitmap = 1, .history = 39),
      HOST(SECONDARY, NONE, .current = 3, .bitmap = 1, .sync_from = 2, .flags = INC,
	   .volume_flags = VOLUME_PEER_STALE)},
     LINEAGE_SPLIT,
     -1},
    {"unfinished, from nobody known",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1),
      HOST(SECONDARY, NONE, .current = 3, .bitmap = 8, .sync_from = 9, .flags = INC)},
     LINEAGE_UNRELATED,
     -1},
    {"halted: nothing by itself",
     {HOST(PRIMARY, RUNNING, .current = 1, .flags = SPLIT_FLAG), HOST(SECONDARY, RUNNING, .current = 1)},
     LINEAGE_SPLIT,
     -1},
    {"resolved on the loser",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE),
      HOST(STANDALONE, DONE, .current = 3, .bitmap = 1)},
     LINEAGE_PARTIAL,
     1},
    {"resolved on the winner",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1),
      HOST(STANDALONE, DONE, .current = 3, .bitmap = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_YOURS)},
     LINEAGE_PARTIAL,
     1},
    {"resolved the other way",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1),
      HOST(STANDALONE, DONE, .current = 3, .bitmap = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE)},
     LINEAGE_PARTIAL,
     0},
    {"resolved both ways at once",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE),
      HOST(STANDALONE, DONE, .current = 3, .bitmap = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE)},
     LINEAGE_SPLIT,
     -1},
    {"resolved; their dirty sets begin at different times",
     {HOST(PRIMARY, RUNNING, .current = 4, .bitmap = 1, .history = 2, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE),
      HOST(STANDALONE, DONE, .current = 3, .bitmap = 2)},
     LINEAGE_FULL,
     1},
    {"resolved in favour of a copy that only follows",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE),
      HOST(SECONDARY, RUNNING, .current = 3, .bitmap = 1)},
     LINEAGE_SPLIT,
     -1},
    {"resolved in favour of a copy that is not whole",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE),
      HOST(SECONDARY, DONE, .current = 3, .bitmap = 1, .flags = INC)},
     LINEAGE_SPLIT,
     -1},
    {"resolved in favour of a secondary that owns its disk after a stop",
     {HOST(PRIMARY, DONE, .current = 1, .flags = SPLIT_FLAG | WIRE_JOIN_DISCARD_MINE),
      HOST(SECONDARY, DONE, .current = 2, .bitmap = 1)},
     LINEAGE_PARTIAL,
     1},
    {"detached, and both recorded it",
     {HOST(PRIMARY, RUNNING, .current = 2, .history = 1, .volume_flags = VOLUME_STALE),
      HOST(SECONDARY, RUNNING, .current = 2, .history = 1, .volume_flags = VOLUME_PEER_STALE)},
     LINEAGE_EQUAL,
     0},
    {"detached, and the primary could not record it",
     {HOST(PRIMARY, RUNNING, .current = 1),
      HOST(SECONDARY, RUNNING, .current = 2, .history = 1, .volume_flags = VOLUME_PEER_STALE)},
     LINEAGE_DETACHED,
     0},
    {"that, and it wrote alone since: its disk was not current",
     {HOST(PRIMARY, RUNNING, .current = 3, .bitmap = 1),
      HOST(SECONDARY, RUNNING, .current = 2, .history = 1, .volume_flags = VOLUME_PEER_STALE)},
     LINEAGE_SPLIT,
     -1},
    {"a detach whose answer was lost; the primary went on with its disk",
     {HOST(PRIMARY, RUNNING, .current = 3, .bitmap = 1, .history = 2),
      HOST(SECONDARY, RUNNING, .current = 2, .history = 1, .volume_flags = VOLUME_PEER_STALE)},
     LINEAGE_PARTIAL,
     0},
    {"detached; the primary wrote to its other disks alone",
     {HOST(PRIMARY, RUNNING, .current = 3, .bitmap = 2, .history = 1, .volume_flags = VOLUME_STALE),
      HOST(SECONDARY, RUNNING, .current = 2, .history = 1, .volume_flags = VOLUME_PEER_STALE)},
     LINEAGE_PARTIAL,
     0},
    {"detached, and the peer failed over since",
     {HOST(PRIMARY, RUNNING, .current = 2, .history = 1, .volume_flags = VOLUME_STALE),
      HOST(STANDALONE, DONE, .current = 3, .bitmap = 2)},
     LINEAGE_SHUT_OUT,
     1},
    {"`resolve` where nothing is split changes nothing",
     {HOST(PRIMARY, RUNNING, .current = 2, .bitmap = 1, .flags = WIRE_JOIN_DISCARD_MINE),
      HOST(SECONDARY, RUNNING, .current = 1)},
     LINEAGE_PARTIAL,
     0},
};

Test(lineage, table)
{
	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		const struct row *row = &rows[i];
		static struct wire_join j[2];
		int source = -1, back = -1;
		memset(j, 0, sizeof(j));
		for (int k = 0; k < 2; k++) {
			j[k].role = row->h[k].role;
			j[k].state = row->h[k].state;
			j[k].flags = row->h[k].flags;
			j[k].sync_from = row->h[k].sync_from;
			j[k].lineage.current = row->h[k].current;
			j[k].lineage.bitmap = row->h[k].bitmap;
			j[k].lineage.history[0] = row->h[k].history;
			j[k].n_volumes = 1;
			j[k].volumes[0].flags = row->h[k].volume_flags;
		}
		enum lineage_decision d = lineage_decide(&j[0], &j[1], &source);
		cr_assert_eq(d, row->want, "%s: %s, not %s", row->what, lineage_decision_name(d),
			     lineage_decision_name(row->want));
		cr_assert_eq(source, row->source, "%s: source %d", row->what, source);
		cr_assert_eq(lineage_decide(&j[1], &j[0], &back), row->want, "%s, swapped", row->what);
		cr_assert_eq(back, row->source < 0 ? -1 : !row->source, "%s, swapped", row->what);
	}
}

Test(lineage, generations)
{
	struct lineage l = {0}, t = {.current = 7};
	lineage_begin(&l, 1);
	cr_assert(l.current == 1 && l.bitmap == 0 && l.history[0] == 0);
	lineage_begin(&l, 2);
	lineage_begin(&l, 3);
	cr_assert(l.current == 3 && l.bitmap == 1 && l.history[0] == 2,
		  "the bitmap's stays the oldest unacknowledged one");
	t = (struct lineage){.current = 2, .history = {1}}; /* adopted 2, and its answer was lost */
	cr_assert(lineage_adopted_since(&l, &t));
	struct lineage heard = l;
	lineage_followed(&heard, 2);
	cr_assert(heard.current == 3 && heard.bitmap == 2 && heard.history[0] == 1);
	cr_assert_not(lineage_adopted_since(&heard, &t));
	t = (struct lineage){.current = 7};
	lineage_adopt(&t, &l);
	cr_assert(t.current == 3 && t.bitmap == 0 && lineage_has(&t, 1) && lineage_has(&t, 2) && !lineage_has(&t, 7));
	lineage_in_sync(&l);
	cr_assert(memcmp(&l, &t, sizeof(l)) == 0);
	lineage_begin(&l, 4);
	lineage_part(&l, 5);
	cr_assert(l.current == 5 && l.bitmap == 0 && lineage_has(&l, 3) && lineage_has(&l, 4));
	for (uint64_t g = 10; g < 40; g++)
		lineage_part(&l, g);
	cr_assert(l.history[0] == 38 && l.history[GENERATIONS_MAX - 1] == 23);
}

/* Of two secondaries the one that was not the primary takes over, where it has all: nothing else, and nobody else. */
Test(lineage, hand_over_is_taken_by_who_has_it_all)
{
	static const struct {
		const char *what;
		uint32_t flags[2];
		uint64_t last[2], current[2];
		uint8_t role[2], state;
		enum lineage_decision want;
	} cases[] = {
#define BOTH(role) {ROLE_##role, ROLE_##role}
	    {"handed", {WIRE_JOIN_HANDED, 0}, {5, 5}, {1, 1}, BOTH(SECONDARY), STATE_RUNNING, LINEAGE_TAKE_OVER},
	    {"nobody has", {0, 0}, {5, 5}, {1, 1}, BOTH(SECONDARY), STATE_RUNNING, LINEAGE_NO_SOURCE},
	    {"both have",
	     {WIRE_JOIN_HANDED, WIRE_JOIN_HANDED},
	     {5, 5},
	     {1, 1},
	     BOTH(SECONDARY),
	     STATE_RUNNING,
	     LINEAGE_NO_SOURCE},
	    {"another checkpoint",
	     {WIRE_JOIN_HANDED, 0},
	     {5, 4},
	     {1, 1},
	     BOTH(SECONDARY),
	     STATE_RUNNING,
	     LINEAGE_NO_SOURCE},
	    {"none", {WIRE_JOIN_HANDED, 0}, {0, 0}, {1, 1}, BOTH(SECONDARY), STATE_RUNNING, LINEAGE_NO_SOURCE},
	    {"broken",
	     {WIRE_JOIN_HANDED, WIRE_JOIN_BROKEN},
	     {5, 5},
	     {1, 1},
	     BOTH(SECONDARY),
	     STATE_RUNNING,
	     LINEAGE_NO_SOURCE},
	    {"unfinished",
	     {WIRE_JOIN_HANDED, WIRE_JOIN_INCONSISTENT},
	     {5, 5},
	     {1, 1},
	     BOTH(SECONDARY),
	     STATE_RUNNING,
	     LINEAGE_NO_SOURCE},
	    {"stopped", {WIRE_JOIN_HANDED, 0}, {5, 5}, {1, 1}, BOTH(SECONDARY), STATE_DONE, LINEAGE_NO_SOURCE},
	    {"another generation",
	     {WIRE_JOIN_HANDED, 0},
	     {5, 5},
	     {1, 2},
	     BOTH(SECONDARY),
	     STATE_RUNNING,
	     LINEAGE_UNRELATED},
	    {"halted",
	     {WIRE_JOIN_HANDED, WIRE_JOIN_SPLIT},
	     {5, 5},
	     {1, 1},
	     BOTH(SECONDARY),
	     STATE_RUNNING,
	     LINEAGE_SPLIT},
	    {"taken over",
	     {WIRE_JOIN_HANDED, 0},
	     {5, 5},
	     {1, 1},
	     {ROLE_SECONDARY, ROLE_PRIMARY},
	     STATE_RUNNING,
	     LINEAGE_EQUAL},
#undef BOTH
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		static struct wire_join j[2];
		int source = -1, back = -1;
		bool told = cases[i].want == LINEAGE_TAKE_OVER || cases[i].want == LINEAGE_EQUAL;
		memset(j, 0, sizeof(j));
		for (int k = 0; k < 2; k++) {
			j[k].role = cases[i].role[k];
			j[k].state = cases[i].state;
			j[k].flags = cases[i].flags[k];
			j[k].last_stream = cases[i].last[k];
			j[k].lineage.current = cases[i].current[k];
		}
		enum lineage_decision d = lineage_decide(&j[0], &j[1], &source);
		cr_assert_eq(d, cases[i].want, "%s: %s", cases[i].what, lineage_decision_name(d));
		cr_assert_eq(lineage_decide(&j[1], &j[0], &back), d, "%s, swapped", cases[i].what);
		if (told)
			cr_assert(source == 1 && back == 0, "%s: source %d, swapped %d", cases[i].what, source, back);
	}
}
