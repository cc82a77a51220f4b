/* Thin, checked wrappers. Every error pthread can give here is a programmer error (a mutex unlocked by another thread,
 * destroyed while held, locked twice), so it traps; only starting a thread can fail for want of resources.
 * The analysis is off in the bodies: it knows our names, not pthread's. */
#include "core/os/thread.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>

#include "core/check.h"
#include "core/err.h"
#include "core/os/clock.h"

/* The kernel's limit, with the terminator. */
#define THREAD_NAME_SIZE 16

/* Outside the macro's condition: a check must not be where the work is done. */
static void check_zero(int r)
{
	INVARIANT(r == 0);
}

void mutex_init(struct mutex *m)
{
	pthread_mutexattr_t attr;

	check_zero(pthread_mutexattr_init(&attr));
#ifdef NDEBUG
	check_zero(pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP));
#else
	check_zero(pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ERRORCHECK));
#endif
	check_zero(pthread_mutex_init(&m->m, &attr));
	check_zero(pthread_mutexattr_destroy(&attr));
}

void mutex_destroy(struct mutex *m)
{
	check_zero(pthread_mutex_destroy(&m->m));
}

NO_THREAD_ANALYSIS void mutex_lock(struct mutex *m)
{
	check_zero(pthread_mutex_lock(&m->m));
}

NO_THREAD_ANALYSIS void mutex_unlock(struct mutex *m)
{
	check_zero(pthread_mutex_unlock(&m->m));
}

void cond_init(struct cond *c)
{
	pthread_condattr_t attr;

	check_zero(pthread_condattr_init(&attr));
	check_zero(pthread_condattr_setclock(&attr, CLOCK_MONOTONIC));
	check_zero(pthread_cond_init(&c->c, &attr));
	check_zero(pthread_condattr_destroy(&attr));
}

void cond_destroy(struct cond *c)
{
	check_zero(pthread_cond_destroy(&c->c));
}

void cond_wait(struct cond *c, struct mutex *m)
{
	check_zero(pthread_cond_wait(&c->c, &m->m));
}

bool cond_wait_until(struct cond *c, struct mutex *m, uint64_t deadline_ns)
{
	struct timespec ts = {
	    .tv_sec = (time_t)(deadline_ns / NS_PER_SEC),
	    .tv_nsec = (long)(deadline_ns % NS_PER_SEC),
	};
	int r = pthread_cond_timedwait(&c->c, &m->m, &ts);

	INVARIANT(r == 0 || r == ETIMEDOUT);
	return r == 0;
}

void cond_signal(struct cond *c)
{
	check_zero(pthread_cond_signal(&c->c));
}

void cond_broadcast(struct cond *c)
{
	check_zero(pthread_cond_broadcast(&c->c));
}

int thread_start(pthread_t *ret, const char *name, void *(*fn)(void *), void *arg)
{
	char short_name[THREAD_NAME_SIZE];
	sigset_t all;
	sigset_t before;
	pthread_t thread;

	/* The new thread inherits the mask of this moment: it never runs with a signal open. */
	(void)sigfillset(&all);
	check_zero(pthread_sigmask(SIG_SETMASK, &all, &before));
	int r = pthread_create(&thread, NULL, fn, arg);

	check_zero(pthread_sigmask(SIG_SETMASK, &before, NULL));
	if (r != 0)
		return r == EAGAIN ? -ERR_LIMIT : err_from_errno(r);
	(void)snprintf(short_name, sizeof(short_name), "%s", name);
	/* A name is a help for whoever looks at top; a failure to set it is nothing to anyone. */
	(void)pthread_setname_np(thread, short_name);
	*ret = thread;
	return 0;
}
