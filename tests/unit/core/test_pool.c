/* Worker pool: every job runs once, in order on one thread, drain waits for all, and the calls that could never end
 * trap. Races are tests/stress/stress_pool.c's part. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "core/check.h"
#include "core/err.h"
#include "core/os/pool.h"
#include "core/os/thread.h"

struct counted {
	struct pool_job job;
	unsigned *next_seen;
	unsigned seen_as;
	unsigned runs;
};

static void count_job(struct pool_job *job)
{
	struct counted *c = CONTAINER_OF(job, struct counted, job);

	c->runs++;
	c->seen_as = __atomic_fetch_add(c->next_seen, 1, __ATOMIC_RELAXED);
}

Test(pool, refuses_bad_thread_counts)
{
	struct pool *p = (void *)0x5a5a;

	cr_assert_eq(pool_create(0, "t", &p), -ERR_LIMIT);
	cr_assert_eq(pool_create(POOL_THREADS_MAX + 1, "t", &p), -ERR_LIMIT);
	cr_assert_eq(p, (void *)0x5a5a);
	pool_destroy(NULL);
}

Test(pool, one_thread_runs_in_order)
{
	struct pool *p = NULL;
	struct counted c[500] = {0};
	unsigned seen = 0;

	cr_assert_eq(pool_create(1, "a-name-longer-than-the-kernel-takes", &p), 0);
	for (unsigned i = 0; i < ARRAY_LEN(c); i++) {
		c[i].job.fn = count_job;
		c[i].next_seen = &seen;
		pool_submit(p, &c[i].job);
	}
	pool_drain(p);
	for (unsigned i = 0; i < ARRAY_LEN(c); i++) {
		cr_assert_eq(c[i].runs, 1U);
		cr_assert_eq(c[i].seen_as, i);
	}
	pool_drain(p);
	pool_destroy(p);
}

Test(pool, destroy_runs_what_is_queued)
{
	for (unsigned threads = 1; threads <= POOL_THREADS_MAX; threads *= 4) {
		struct pool *p = NULL;
		struct counted c[300] = {0};
		unsigned seen = 0;

		cr_assert_eq(pool_create(threads, "t", &p), 0);
		for (unsigned i = 0; i < ARRAY_LEN(c); i++) {
			c[i].job.fn = count_job;
			c[i].next_seen = &seen;
			pool_submit(p, &c[i].job);
		}
		pool_destroy(p);
		for (unsigned i = 0; i < ARRAY_LEN(c); i++)
			cr_assert_eq(c[i].runs, 1U);
	}
}

struct again {
	struct pool_job job;
	struct pool *pool;
	unsigned left;
};

static void again_job(struct pool_job *job)
{
	struct again *a = CONTAINER_OF(job, struct again, job);

	if (--a->left > 0)
		pool_submit(a->pool, job);
}

Test(pool, drain_waits_for_jobs_that_submit_themselves)
{
	struct pool *p = NULL;
	struct again a = {.job.fn = again_job, .left = 1000};

	cr_assert_eq(pool_create(3, "t", &p), 0);
	a.pool = p;
	pool_submit(p, &a.job);
	pool_drain(p);
	cr_assert_eq(a.left, 0U);
	pool_destroy(p);
}

/* Each of two jobs goes on only when the other has begun. */
struct meeting {
	struct mutex lock;
	struct cond all_here;
	unsigned here;
};

struct guest {
	struct pool_job job;
	struct meeting *meeting;
};

static void meet_job(struct pool_job *job)
{
	struct meeting *m = CONTAINER_OF(job, struct guest, job)->meeting;

	mutex_lock(&m->lock);
	if (++m->here == 2)
		cond_broadcast(&m->all_here);
	while (m->here < 2)
		cond_wait(&m->all_here, &m->lock);
	mutex_unlock(&m->lock);
}

Test(pool, jobs_run_in_parallel, .timeout = 60)
{
	struct pool *p = NULL;
	struct meeting m = {.here = 0};
	struct guest g[2] = {{{meet_job, NULL}, &m}, {{meet_job, NULL}, &m}};

	mutex_init(&m.lock);
	cond_init(&m.all_here);
	cr_assert_eq(pool_create(2, "t", &p), 0);
	pool_submit(p, &g[0].job);
	pool_submit(p, &g[1].job);
	pool_drain(p);
	cr_assert_eq(m.here, 2U);
	pool_destroy(p);
	cond_destroy(&m.all_here);
	mutex_destroy(&m.lock);
}

struct self_drain {
	struct pool_job job;
	struct pool *pool;
};

static void drain_own_pool(struct pool_job *job)
{
	pool_drain(CONTAINER_OF(job, struct self_drain, job)->pool);
}

Test(pool, drain_from_inside_traps, .signal = SIGILL, .timeout = 60)
{
	struct self_drain s = {.job.fn = drain_own_pool};

	cr_assert_eq(pool_create(2, "t", &s.pool), 0);
	pool_submit(s.pool, &s.job);
	pool_drain(s.pool);
}
