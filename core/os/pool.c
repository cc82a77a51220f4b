/* Worker threads over one FIFO (core/os/pool.h).
 *
 *	submit ──► head ─ … ─ tail ──► worker: take the head, running++, unlock, fn(job), lock, running--
 *
 * One lock for the queue and both counts; it is never held while a job runs. Lock order: innermost, nothing is
 * acquired under it.
 * Invariants: head == NULL exactly if tail_next == &head; running <= threads; `stopping` is only set when nothing is
 * queued or running, and nothing is submitted from then on.
 * A job's memory is the pool's from submit until fn is called; fn may free it or submit it again, so the worker does
 * not look at it once fn has begun.
 */
#include "core/os/pool.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/check.h"
#include "core/err.h"
#include "core/os/thread.h"

#define POOL_NAME_SIZE 32

struct pool {
	struct mutex lock;
	struct cond work; /* a job was queued, or stopping */
	struct cond idle; /* nothing queued or running */
	struct pool_job *head;
	struct pool_job **tail_next;
	unsigned running;
	unsigned threads;
	bool stopping;
	pthread_t thread[POOL_THREADS_MAX];
};

/* The pool this thread works for: waiting for it from inside would never end. */
static _Thread_local const struct pool *pool_self;

static bool idle_locked(const struct pool *p) REQUIRES(&p->lock)
{
	return p->head == NULL && p->running == 0;
}

static struct pool_job *take_locked(struct pool *p) REQUIRES(&p->lock)
{
	struct pool_job *job = p->head;

	p->head = job->next;
	if (p->head == NULL)
		p->tail_next = &p->head;
	job->next = NULL;
	p->running++;
	INVARIANT(p->running <= p->threads);
	return job;
}

static void drain_locked(struct pool *p) REQUIRES(&p->lock)
{
	while (!idle_locked(p))
		cond_wait(&p->idle, &p->lock);
}

static void *pool_worker(void *arg)
{
	struct pool *p = arg;

	pool_self = p;
	mutex_lock(&p->lock);
	for (;;) {
		while (p->head == NULL && !p->stopping)
			cond_wait(&p->work, &p->lock);
		if (p->head == NULL)
			break;
		struct pool_job *job = take_locked(p);

		mutex_unlock(&p->lock);
		job->fn(job);
		mutex_lock(&p->lock);
		p->running--;
		if (idle_locked(p))
			cond_broadcast(&p->idle);
	}
	mutex_unlock(&p->lock);
	return NULL;
}

static void pool_stop(struct pool *p)
{
	mutex_lock(&p->lock);
	drain_locked(p);
	p->stopping = true;
	cond_broadcast(&p->work);
	mutex_unlock(&p->lock);
	for (unsigned i = 0; i < p->threads; i++) {
		int r = pthread_join(p->thread[i], NULL);

		INVARIANT(r == 0);
	}
	cond_destroy(&p->idle);
	cond_destroy(&p->work);
	mutex_destroy(&p->lock);
	free(p);
}

int pool_create(unsigned threads, const char *name, struct pool **ret)
{
	if (threads == 0 || threads > POOL_THREADS_MAX)
		return -ERR_LIMIT;
	struct pool *p = calloc(1, sizeof(*p));

	if (p == NULL)
		return -ERR_NOMEM;
	mutex_init(&p->lock);
	cond_init(&p->work);
	cond_init(&p->idle);
	p->tail_next = &p->head;
	for (unsigned i = 0; i < threads; i++) {
		char thread_name[POOL_NAME_SIZE];
		pthread_t thread;

		(void)snprintf(thread_name, sizeof(thread_name), "%.12s-%u", name, i);
		int r = thread_start(&thread, thread_name, pool_worker, p);

		if (r < 0) {
			pool_stop(p);
			return r;
		}
		/* Workers read `threads` once there is a job, which is after this function. */
		p->thread[p->threads++] = thread;
	}
	*ret = p;
	return 0;
}

void pool_submit(struct pool *p, struct pool_job *job)
{
	PRE(job->fn != NULL);
	job->next = NULL;
	mutex_lock(&p->lock);
	PRE(!p->stopping);
	*p->tail_next = job;
	p->tail_next = &job->next;
	cond_signal(&p->work);
	mutex_unlock(&p->lock);
}

void pool_drain(struct pool *p)
{
	PRE(pool_self != p);
	mutex_lock(&p->lock);
	drain_locked(p);
	mutex_unlock(&p->lock);
}

void pool_destroy(struct pool *p)
{
	if (p == NULL)
		return;
	PRE(pool_self != p);
	pool_stop(p);
}
