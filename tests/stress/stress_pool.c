/* Races of the worker pool, for ThreadSanitizer and for plain runs: many submitters, jobs that submit others, drains
 * from several threads, and pools made and destroyed meanwhile. Ends with 0 if every job ran exactly as often as it
 * was submitted, what a job wrote without atomics is seen after drain, and no worker was lost on the way. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/pool.h"
#include "core/os/thread.h"

#define ROUNDS 40U
#define SUBMITTERS 4U
#define JOBS 500U
#define MEETING_TIMEOUT_NS (30 * NS_PER_SEC)

struct stress_job {
	struct pool_job job;
	struct pool *pool;
	unsigned left; /* runs to go; plain: the pool alone orders its users */
	unsigned runs;
};

struct submitter {
	struct pool *pool;
	struct stress_job *jobs;
};

static void stress_run(struct pool_job *job)
{
	struct stress_job *j = CONTAINER_OF(job, struct stress_job, job);

	j->runs++;
	if (--j->left > 0)
		pool_submit(j->pool, job);
}

static void *submit_all(void *arg)
{
	struct submitter *s = arg;

	for (unsigned i = 0; i < JOBS; i++) {
		s->jobs[i] = (struct stress_job){.job.fn = stress_run, .pool = s->pool, .left = 1 + i % 3};
		pool_submit(s->pool, &s->jobs[i].job);
		if (i % 100 == 99)
			pool_drain(s->pool);
	}
	return NULL;
}

/* As many jobs as workers, each of which ends only when all have begun: one lost worker, and they never meet. */
struct meeting {
	struct mutex lock;
	struct cond all_here;
	unsigned here;
	unsigned expected;
	bool missed;
};

struct guest {
	struct pool_job job;
	struct meeting *meeting;
};

static void meet_run(struct pool_job *job)
{
	struct meeting *m = CONTAINER_OF(job, struct guest, job)->meeting;
	uint64_t deadline_ns = clock_mono_ns() + MEETING_TIMEOUT_NS;

	mutex_lock(&m->lock);
	m->here++;
	cond_broadcast(&m->all_here);
	while (m->here < m->expected && !m->missed)
		m->missed = !cond_wait_until(&m->all_here, &m->lock, deadline_ns) && m->here < m->expected;
	mutex_unlock(&m->lock);
}

static int all_workers_there(struct pool *pool, unsigned threads)
{
	struct meeting m = {.expected = threads};
	struct guest guests[POOL_THREADS_MAX];

	mutex_init(&m.lock);
	cond_init(&m.all_here);
	for (unsigned i = 0; i < threads; i++) {
		guests[i] = (struct guest){.job.fn = meet_run, .meeting = &m};
		pool_submit(pool, &guests[i].job);
	}
	pool_drain(pool);
	cond_destroy(&m.all_here);
	mutex_destroy(&m.lock);
	if (m.missed)
		(void)fprintf(stderr, "%u threads: only %u of them still work\n", threads, m.here);
	return m.missed;
}

static int round_run(unsigned threads, struct stress_job *jobs)
{
	struct pool *pool = NULL;
	struct submitter s[SUBMITTERS];
	pthread_t thread[SUBMITTERS];
	int bad = 0;

	if (pool_create(threads, "stress", &pool) < 0) {
		(void)fprintf(stderr, "no pool of %u threads\n", threads);
		return 1;
	}
	for (unsigned i = 0; i < SUBMITTERS; i++) {
		s[i] = (struct submitter){.pool = pool, .jobs = jobs + (size_t)i * JOBS};
		if (thread_start(&thread[i], "submitter", submit_all, &s[i]) < 0)
			abort();
	}
	for (unsigned i = 0; i < SUBMITTERS; i++)
		(void)pthread_join(thread[i], NULL);
	/* Half of the rounds leave the rest to destroy. */
	if (threads % 2 == 0) {
		pool_drain(pool);
		bad += all_workers_there(pool, threads);
	}
	pool_destroy(pool);
	for (unsigned i = 0; i < SUBMITTERS * JOBS; i++)
		bad += jobs[i].left != 0 || jobs[i].runs != 1 + i % JOBS % 3;
	if (bad != 0)
		(void)fprintf(stderr, "%u threads: %d jobs ran too often or not often enough\n", threads, bad);
	return bad != 0;
}

int main(void)
{
	struct stress_job *jobs = calloc((size_t)SUBMITTERS * JOBS, sizeof(*jobs));
	int bad = 0;

	if (jobs == NULL)
		return 1;
	for (unsigned i = 0; i < ROUNDS; i++)
		bad += round_run(1 + i % 8, jobs);
	free(jobs);
	return bad != 0;
}
