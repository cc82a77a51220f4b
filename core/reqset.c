/* Claims in flight (core/reqset.h): a treap keyed by (volume, off, ticket), augmented with the largest end below each
 * node, so that the claims overlapping a range are found without walking the others.
 *
 * Invariants (reqset_check): keys are ordered; a parent's priority is at least its children's; max_end is the largest
 * `end` in the subtree, over all volumes in it, which only makes pruning less sharp where two volumes meet; blockers
 * is the number of conflicting claims in the set with a smaller ticket.
 *
 * Priorities are a hash of the ticket: the shape is random with respect to offsets, whatever order they come in, and
 * the same in each run. The depth is logarithmic then, so recursion is shallow.
 */
#include "core/reqset.h"

#include <stddef.h>

#include "core/check.h"

typedef void reqset_visit_fn(struct reqset_claim *found, void *ctx);

/* A mixing function with good avalanche (the finaliser of splitmix64). */
static uint64_t ticket_hash(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static bool key_less(const struct reqset_claim *a, const struct reqset_claim *b)
{
	if (a->volume != b->volume)
		return a->volume < b->volume;
	if (a->off != b->off)
		return a->off < b->off;
	return a->ticket < b->ticket;
}

static bool conflicts(const struct reqset_claim *a, const struct reqset_claim *b)
{
	return a->volume == b->volume && a->off < b->end && b->off < a->end && !(a->shared && b->shared);
}

static void update(struct reqset_claim *n)
{
	n->max_end = n->end;
	if (n->left != NULL && n->left->max_end > n->max_end)
		n->max_end = n->left->max_end;
	if (n->right != NULL && n->right->max_end > n->max_end)
		n->max_end = n->right->max_end;
}

/* All keys in a are less than all keys in b. */
static struct reqset_claim *merge(struct reqset_claim *a, struct reqset_claim *b)
{
	if (a == NULL)
		return b;
	if (b == NULL)
		return a;
	if (a->priority >= b->priority) {
		a->right = merge(a->right, b);
		update(a);
		return a;
	}
	b->left = merge(a, b->left);
	update(b);
	return b;
}

/* Parts t into keys less than key's and the others. */
static void split(struct reqset_claim *t, const struct reqset_claim *key, struct reqset_claim **ret_less,
		  struct reqset_claim **ret_rest)
{
	if (t == NULL) {
		*ret_less = NULL;
		*ret_rest = NULL;
	} else if (key_less(t, key)) {
		split(t->right, key, &t->right, ret_rest);
		update(t);
		*ret_less = t;
	} else {
		split(t->left, key, ret_less, &t->left);
		update(t);
		*ret_rest = t;
	}
}

static struct reqset_claim *insert(struct reqset_claim *t, struct reqset_claim *n)
{
	if (t == NULL || n->priority > t->priority) {
		split(t, n, &n->left, &n->right);
		update(n);
		return n;
	}
	if (key_less(n, t))
		t->left = insert(t->left, n);
	else
		t->right = insert(t->right, n);
	update(t);
	return t;
}

static struct reqset_claim *erase(struct reqset_claim *t, struct reqset_claim *n)
{
	PRE(t != NULL); /* else n is not in this set */
	if (t == n)
		return merge(t->left, t->right);
	if (key_less(n, t))
		t->left = erase(t->left, n);
	else
		t->right = erase(t->right, n);
	update(t);
	return t;
}

/* Calls fn for each claim below t that conflicts with c. fn must not change the tree. */
static void visit_conflicts(struct reqset_claim *t, const struct reqset_claim *c, reqset_visit_fn *fn, void *ctx)
{
	while (t != NULL && t->max_end > c->off) {
		if (t->volume < c->volume) {
			t = t->right;
			continue;
		}
		if (t->volume > c->volume || t->off >= c->end) {
			t = t->left;
			continue;
		}
		visit_conflicts(t->left, c, fn, ctx);
		if (conflicts(t, c))
			fn(t, ctx);
		t = t->right;
	}
}

static void count_blocker(struct reqset_claim *found, void *ctx)
{
	struct reqset_claim *c = ctx;

	(void)found;
	INVARIANT(c->blockers < UINT32_MAX);
	c->blockers++;
}

struct release {
	uint64_t ticket;
	struct reqset_claim *ready; /* by next_ready, in key order */
};

static void release_one(struct reqset_claim *found, void *ctx)
{
	struct release *r = ctx;

	if (found->ticket < r->ticket)
		return;
	INVARIANT(found->blockers > 0);
	if (--found->blockers == 0) {
		found->next_ready = r->ready;
		r->ready = found;
	}
}

static struct reqset_claim *merge_by_ticket(struct reqset_claim *a, struct reqset_claim *b)
{
	struct reqset_claim *head = NULL;
	struct reqset_claim **tail = &head;

	while (a != NULL && b != NULL) {
		struct reqset_claim **first = a->ticket < b->ticket ? &a : &b;

		*tail = *first;
		tail = &(*first)->next_ready;
		*first = (*first)->next_ready;
	}
	*tail = a != NULL ? a : b;
	return head;
}

/* Merge sort: bins[i] is empty or a sorted list of 2^i claims. */
static struct reqset_claim *sort_by_ticket(struct reqset_claim *list)
{
	struct reqset_claim *bins[64] = {NULL};
	size_t used = 0;

	while (list != NULL) {
		struct reqset_claim *run = list;
		size_t i = 0;

		list = list->next_ready;
		run->next_ready = NULL;
		for (; bins[i] != NULL; i++) {
			run = merge_by_ticket(bins[i], run);
			bins[i] = NULL;
		}
		bins[i] = run;
		if (i + 1 > used)
			used = i + 1;
	}
	struct reqset_claim *all = NULL;

	for (size_t i = 0; i < used; i++)
		all = merge_by_ticket(bins[i], all);
	return all;
}

void reqset_init(struct reqset *s)
{
	*s = (struct reqset){0};
}

bool reqset_add(struct reqset *s, struct reqset_claim *c)
{
	PRE(!c->added);
	PRE(c->end > c->off);
	c->added = true;
	c->blockers = 0;
	c->ticket = s->next_ticket++;
	c->priority = ticket_hash(c->ticket);
	c->left = NULL;
	c->right = NULL;
	c->next_ready = NULL;
	visit_conflicts(s->root, c, count_blocker, c);
	s->root = insert(s->root, c);
	s->count++;
	return c->blockers == 0;
}

struct reqset_claim *reqset_remove(struct reqset *s, struct reqset_claim *c)
{
	PRE(c->added);
	struct release r = {.ticket = c->ticket};

	s->root = erase(s->root, c);
	s->count--;
	c->added = false;
	c->left = NULL;
	c->right = NULL;
	visit_conflicts(s->root, c, release_one, &r);
	return sort_by_ticket(r.ready);
}

static void note_found(struct reqset_claim *found, void *ctx)
{
	bool *any = ctx;

	(void)found;
	*any = true;
}

bool reqset_overlaps(const struct reqset *s, uint32_t volume, uint64_t off, uint64_t end)
{
	const struct reqset_claim c = {.volume = volume, .off = off, .end = end};
	bool any = false;

	visit_conflicts(s->root, &c, note_found, &any);
	return any;
}

struct recount {
	const struct reqset_claim *of;
	uint64_t blockers;
};

static void recount_below(const struct reqset_claim *t, struct recount *r)
{
	if (t == NULL)
		return;
	recount_below(t->left, r);
	if (t->ticket < r->of->ticket && conflicts(t, r->of))
		r->blockers++;
	recount_below(t->right, r);
}

struct walk {
	const struct reqset *s;
	const struct reqset_claim *previous;
	uint64_t count;
};

static uint64_t check_below(const struct reqset_claim *t, struct walk *w)
{
	uint64_t max_end = t->end;

	if (t->left != NULL) {
		INVARIANT(t->left->priority <= t->priority);
		uint64_t below = check_below(t->left, w);

		max_end = below > max_end ? below : max_end;
	}
	INVARIANT(w->previous == NULL || key_less(w->previous, t));
	w->previous = t;
	w->count++;
	INVARIANT(t->added);
	INVARIANT(t->end > t->off);
	INVARIANT(t->ticket < w->s->next_ticket);
	INVARIANT(t->priority == ticket_hash(t->ticket));
	struct recount r = {.of = t};

	recount_below(w->s->root, &r);
	INVARIANT(r.blockers == t->blockers);
	if (t->right != NULL) {
		INVARIANT(t->right->priority <= t->priority);
		uint64_t below = check_below(t->right, w);

		max_end = below > max_end ? below : max_end;
	}
	INVARIANT(max_end == t->max_end);
	return max_end;
}

void reqset_check(const struct reqset *s)
{
	struct walk w = {.s = s};

	if (s->root != NULL)
		(void)check_below(s->root, &w);
	INVARIANT(w.count == s->count);
}
