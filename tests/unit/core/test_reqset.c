/* Claims in flight against a model that compares every pair: who is granted, when, and in which order. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/reqset.h"

#define CLAIMS_MAX 96U

static uint64_t rnd_state;

static uint64_t rnd(void)
{
	rnd_state ^= rnd_state << 13;
	rnd_state ^= rnd_state >> 7;
	rnd_state ^= rnd_state << 17;
	return rnd_state;
}

static struct reqset_claim claim(uint32_t volume, uint64_t off, uint64_t end, bool shared)
{
	return (struct reqset_claim){.volume = volume, .off = off, .end = end, .shared = shared};
}

Test(reqset, disjoint_and_touching_ranges_run_together)
{
	struct reqset s;
	struct reqset_claim a = claim(0, 0, 10, false);
	struct reqset_claim b = claim(0, 10, 20, false);
	struct reqset_claim c = claim(1, 0, 20, false);

	reqset_init(&s);
	cr_assert(reqset_add(&s, &a));
	cr_assert(reqset_add(&s, &b));
	cr_assert(reqset_add(&s, &c));
	cr_assert_eq(s.count, 3U);
	reqset_check(&s);
	cr_assert_null(reqset_remove(&s, &b));
	cr_assert_null(reqset_remove(&s, &a));
	cr_assert_null(reqset_remove(&s, &c));
	cr_assert_eq(s.count, 0U);
	cr_assert_null(s.root);
}

Test(reqset, overlapping_writes_run_in_order)
{
	struct reqset s;
	struct reqset_claim a = claim(0, 0, 10, false);
	struct reqset_claim b = claim(0, 9, 20, false);
	struct reqset_claim c = claim(0, 5, 12, false);

	reqset_init(&s);
	cr_assert(reqset_add(&s, &a));
	cr_assert_not(reqset_add(&s, &b));
	cr_assert_not(reqset_add(&s, &c));
	cr_assert(reqset_granted(&a));
	cr_assert_not(reqset_granted(&b));
	cr_assert_eq(reqset_remove(&s, &a), &b);
	cr_assert_null(b.next_ready);
	cr_assert_not(reqset_granted(&a));
	cr_assert(reqset_granted(&b));
	cr_assert_not(reqset_granted(&c));
	cr_assert_eq(reqset_remove(&s, &b), &c);
	cr_assert_null(reqset_remove(&s, &c));
}

Test(reqset, shared_claims_do_not_starve_an_exclusive_one)
{
	struct reqset s;
	struct reqset_claim r1 = claim(0, 0, 100, true);
	struct reqset_claim w = claim(0, 50, 60, false);
	struct reqset_claim r2 = claim(0, 0, 100, true);
	struct reqset_claim r3 = claim(0, 60, 100, true);

	reqset_init(&s);
	cr_assert(reqset_add(&s, &r1));
	cr_assert_not(reqset_add(&s, &w));
	cr_assert_not(reqset_add(&s, &r2)); /* behind w, though it could run beside r1 */
	cr_assert(reqset_add(&s, &r3));
	cr_assert_eq(reqset_remove(&s, &r1), &w);
	cr_assert_null(reqset_remove(&s, &r3));
	cr_assert_eq(reqset_remove(&s, &w), &r2);
	cr_assert_null(reqset_remove(&s, &r2));
}

Test(reqset, a_waiting_claim_can_go)
{
	struct reqset s;
	struct reqset_claim a = claim(0, 0, 10, false);
	struct reqset_claim b = claim(0, 0, 30, false);
	struct reqset_claim c = claim(0, 20, 30, false);

	reqset_init(&s);
	cr_assert(reqset_add(&s, &a));
	cr_assert_not(reqset_add(&s, &b));
	cr_assert_not(reqset_add(&s, &c));
	cr_assert_eq(reqset_remove(&s, &b), &c);
	cr_assert_null(reqset_remove(&s, &a));
	reqset_check(&s);
	cr_assert_null(reqset_remove(&s, &c));
}

Test(reqset, ready_list_is_in_ticket_order)
{
	struct reqset s;
	struct reqset_claim wide = claim(0, 0, 1000, false);
	struct reqset_claim c[100];
	unsigned n = 0;

	reqset_init(&s);
	cr_assert(reqset_add(&s, &wide));
	for (unsigned i = 0; i < ARRAY_LEN(c); i++) {
		unsigned slot = i * 37 % 100; /* not in the order of the offsets */

		c[i] = claim(0, slot * 10, slot * 10 + 10, i % 3 == 0);
		cr_assert_not(reqset_add(&s, &c[i]));
	}
	for (struct reqset_claim *r = reqset_remove(&s, &wide); r != NULL; r = r->next_ready) {
		cr_assert_eq(r, &c[n]);
		cr_assert(reqset_granted(r));
		n++;
	}
	cr_assert_eq(n, 100U);
}

/* The model: claims in ticket order, compared pair by pair. */
struct model {
	struct reqset_claim *list[CLAIMS_MAX];
	size_t n;
};

static bool model_conflict(const struct reqset_claim *a, const struct reqset_claim *b)
{
	if (a->volume != b->volume || (a->shared && b->shared))
		return false;
	return !(a->end <= b->off || b->end <= a->off);
}

static bool model_granted(const struct model *m, const struct reqset_claim *c)
{
	for (size_t i = 0; m->list[i] != c; i++)
		if (model_conflict(m->list[i], c))
			return false;
	return true;
}

static void model_remove(struct model *m, size_t at)
{
	memmove(&m->list[at], &m->list[at + 1], (m->n - at - 1) * sizeof(m->list[0]));
	m->n--;
}

static void random_run(uint64_t seed, unsigned steps, uint64_t space, uint64_t len_max, uint32_t volumes,
		       unsigned check_every)
{
	struct reqset s;
	struct model m = {0};
	struct reqset_claim pool[CLAIMS_MAX] = {0};

	rnd_state = seed;
	reqset_init(&s);
	for (unsigned step = 0; step < steps; step++) {
		/* Long stretches of filling and of emptying. */
		bool fill = rnd() % 100 < (step / 1000 % 2 == 0 ? 60U : 40U);

		if (m.n == 0 || (fill && m.n < CLAIMS_MAX)) {
			struct reqset_claim *c = pool;

			while (c->added)
				c++;
			memset(c, 0xa5, sizeof(*c));
			c->added = false;
			c->volume = (uint32_t)(rnd() % volumes);
			c->shared = rnd() % 2 == 0;
			c->off = rnd() % space;
			c->end = c->off + 1 + rnd() % len_max;
			m.list[m.n++] = c;
			bool granted = reqset_add(&s, c);
			cr_assert_eq(granted, model_granted(&m, c), "seed %llu step %u", (unsigned long long)seed,
				     step);
		} else {
			size_t at = rnd() % m.n;
			struct reqset_claim *c = m.list[at];
			bool was[CLAIMS_MAX];

			for (size_t i = 0; i < m.n; i++)
				was[i] = model_granted(&m, m.list[i]);
			memmove(&was[at], &was[at + 1], (m.n - at - 1) * sizeof(was[0]));
			model_remove(&m, at);
			struct reqset_claim *ready = reqset_remove(&s, c);
			cr_assert_not(c->added);
			for (size_t i = 0; i < m.n; i++) {
				bool now = model_granted(&m, m.list[i]);

				cr_assert_eq(reqset_granted(m.list[i]), now);
				if (now && !was[i]) {
					cr_assert_eq(ready, m.list[i], "seed %llu step %u", (unsigned long long)seed,
						     step);
					ready = ready->next_ready;
				}
			}
			cr_assert_null(ready);
		}
		cr_assert_eq(s.count, m.n);
		if (step % check_every == 0)
			reqset_check(&s);
	}
	while (m.n > 0)
		(void)reqset_remove(&s, m.list[--m.n]);
	cr_assert_null(s.root);
}

Test(reqset, random_operations, .timeout = 120)
{
	random_run(1, 100000, 1000, 60, 2, 50);
}

Test(reqset, random_operations_crowded, .timeout = 120)
{
	random_run(2, 20000, 16, 16, 1, 10);
}

Test(reqset, random_operations_over_large_offsets, .timeout = 120)
{
	random_run(3, 20000, UINT64_C(1) << 62, UINT64_C(1) << 60, 5, 20);
}

Test(reqset, random_operations_many_volumes, .timeout = 120)
{
	random_run(4, 20000, 40, 20, 30, 20);
}

static unsigned depth(const struct reqset_claim *c)
{
	if (c == NULL)
		return 0;
	unsigned l = depth(c->left);
	unsigned r = depth(c->right);

	return 1 + (l > r ? l : r);
}

/* A sequential writer, the usual guest: ascending offsets must not make a list of the tree. */
Test(reqset, ascending_offsets_stay_shallow)
{
	enum { N = 20000 };
	struct reqset s;
	struct reqset_claim *c = calloc(N, sizeof(*c));

	cr_assert_not_null(c);
	reqset_init(&s);
	for (unsigned i = 0; i < N; i++) {
		c[i] = claim(0, (uint64_t)i * 4096, (uint64_t)i * 4096 + 4096, false);
		cr_assert(reqset_add(&s, &c[i]));
	}
	cr_assert_lt(depth(s.root), 64U);
	for (unsigned i = 0; i < N; i++)
		cr_assert_null(reqset_remove(&s, &c[i]));
	cr_assert_eq(s.count, 0U);
	free(c);
}

Test(reqset, adding_twice_traps, .signal = SIGILL)
{
	struct reqset s;
	struct reqset_claim a = claim(0, 0, 10, false);

	reqset_init(&s);
	(void)reqset_add(&s, &a);
	(void)reqset_add(&s, &a);
}

Test(reqset, an_empty_range_traps, .signal = SIGILL)
{
	struct reqset s;
	struct reqset_claim a = claim(0, 10, 10, false);

	reqset_init(&s);
	(void)reqset_add(&s, &a);
}

Test(reqset, check_finds_a_wrong_blocker_count, .signal = SIGILL)
{
	struct reqset s;
	struct reqset_claim a = claim(0, 0, 10, false);
	struct reqset_claim b = claim(0, 5, 15, false);

	reqset_init(&s);
	(void)reqset_add(&s, &a);
	(void)reqset_add(&s, &b);
	b.blockers = 0;
	reqset_check(&s);
}
