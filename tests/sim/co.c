/* Coroutines, and the locks that know of them (co.h).
 *
 * A stack is entered by setcontext once; all later switches are _setjmp and _longjmp, which, unlike swapcontext, save
 * no signal mask and so make no system call: the simulator switches a million times a second.
 */
#include "tests/sim/co.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include "core/check.h"
#include "core/os/thread.h"
#include "tests/sim/simalloc.h"

/* The image code keeps its scratch on the stack; pages never touched cost nothing. */
#define STACK_SIZE (512U << 10)

struct co {
	ucontext_t first;
	jmp_buf at;
	void (*fn)(void *arg);
	void *arg, *owner, *stack, *kept;
	bool begun, ended;
	uint64_t turn;
	struct co *next;
};

static struct co *current, *pool;
static jmp_buf scheduler;
void (*co_lock_wait)(void) = co_yield;

/* AddressSanitizer has to know which stack is in use: where a switch goes to, and that it has got there. */
static struct stack {
	const void *bottom;
	size_t size;
} main_stack;

static void switch_begin(void **ret_kept, const void *bottom, size_t size)
{
#ifdef __SANITIZE_ADDRESS__
	__sanitizer_start_switch_fiber(ret_kept, bottom, size);
#else
	(void)ret_kept, (void)bottom, (void)size;
#endif
}

static void switch_end(void *kept, struct stack *ret_from)
{
#ifdef __SANITIZE_ADDRESS__
	struct stack ignored;
	ret_from = ret_from ? ret_from : &ignored;
	__sanitizer_finish_switch_fiber(kept, &ret_from->bottom, &ret_from->size);
#else
	(void)kept, (void)ret_from;
#endif
}

static void leave(struct co *c)
{
	if (_setjmp(c->at) == 0) {
		switch_begin(&c->kept, main_stack.bottom, main_stack.size);
		_longjmp(scheduler, 1);
	}
	switch_end(c->kept, &main_stack);
}

/* One after the other on the same stack: setcontext makes system calls. */
static void co_main(void)
{
	struct co *c = current;
	switch_end(NULL, &main_stack);
	for (;;) {
		c->fn(c->arg);
		c->ended = true;
		leave(c);
	}
}

static struct co *co_alloc(void)
{
	struct co *c = pool;
	if (c) {
		pool = c->next;
		return c;
	}
	c = calloc(1, sizeof(*c));
	PRE(c != NULL);
	c->stack = mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	PRE(c->stack != MAP_FAILED);
	return c;
}

static void first_turn(struct co *c)
{
	c->begun = true;
	PRE(getcontext(&c->first) == 0);
	c->first.uc_stack.ss_sp = c->stack;
	c->first.uc_stack.ss_size = STACK_SIZE;
	c->first.uc_link = NULL;
	makecontext(&c->first, co_main, 0);
	setcontext(&c->first);
	UNREACHABLE();
}

struct co *co_new(void (*fn)(void *arg), void *arg, void *owner)
{
	struct co *c = co_alloc();
	c->fn = fn;
	c->arg = arg;
	c->owner = owner;
	c->ended = false;
	return c;
}

bool co_resume(struct co *c)
{
	PRE(current == NULL && !c->ended);
	c->turn++;
	current = c;
	static void *kept;
	if (_setjmp(scheduler) == 0) {
		switch_begin(&kept, c->stack, STACK_SIZE);
		if (c->begun)
			_longjmp(c->at, 1);
		first_turn(c);
	}
	switch_end(kept, NULL);
	c = current;
	current = NULL;
	if (!c->ended)
		return false;
	c->next = pool;
	pool = c;
	return true;
}

void co_yield (void)
{
	struct co *c = current;
	PRE(c != NULL);
	unsigned watching = simalloc_watch_swap(0);
	leave(c);
	(void)simalloc_watch_swap(watching);
}

struct co *co_current(void)
{
	return current;
}

void *co_owner(const struct co *c)
{
	return c->owner;
}

uint64_t co_turn(const struct co *c)
{
	return c->turn;
}

void co_free_all(void)
{
	while (pool) {
		struct co *c = pool;
		pool = c->next;
		(void)munmap(c->stack, STACK_SIZE);
		free(c);
	}
}

/* ---- locks ----
 *
 * In the memory of the real ones. Readers come in beside waiting writers; a writer gets its turn because readers end.
 */

struct sim_lock {
	uint32_t readers, writer;
};
_Static_assert(sizeof(struct sim_lock) <= sizeof(pthread_mutex_t), "a lock fits");

static void wait_turn(void)
{
	/* What runs outside of coroutines never finds a lock held across a stop. */
	PRE(current != NULL);
	co_lock_wait();
}

static void lock_write(void *p)
{
	struct sim_lock *l = p;
	while (l->readers || l->writer)
		wait_turn();
	l->writer = 1;
}

static void lock_read(void *p)
{
	struct sim_lock *l = p;
	while (l->writer)
		wait_turn();
	l->readers++;
}

static void lock_release(void *p)
{
	struct sim_lock *l = p;
	PRE(l->writer ? l->readers == 0 : l->readers > 0);
	if (l->writer)
		l->writer = 0;
	else
		l->readers--;
}

void __wrap_mutex_init(struct mutex *m);
void __wrap_mutex_destroy(struct mutex *m);
void __wrap_mutex_lock(struct mutex *m) NO_THREAD_ANALYSIS;
void __wrap_mutex_unlock(struct mutex *m) NO_THREAD_ANALYSIS;
int __wrap_pthread_rwlock_init(pthread_rwlock_t *l, const pthread_rwlockattr_t *a);
int __wrap_pthread_rwlock_destroy(pthread_rwlock_t *l);
int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t *l);
int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t *l);
int __wrap_pthread_rwlock_unlock(pthread_rwlock_t *l);

void __wrap_mutex_init(struct mutex *m)
{
	memset(m, 0, sizeof(*m));
}

void __wrap_mutex_destroy(struct mutex *m)
{
	PRE(((struct sim_lock *)(void *)m)->writer == 0);
}

void __wrap_mutex_lock(struct mutex *m)
{
	lock_write(m);
}

void __wrap_mutex_unlock(struct mutex *m)
{
	lock_release(m);
}

int __wrap_pthread_rwlock_init(pthread_rwlock_t *l, const pthread_rwlockattr_t *a)
{
	(void)a;
	memset(l, 0, sizeof(*l));
	return 0;
}

int __wrap_pthread_rwlock_destroy(pthread_rwlock_t *l)
{
	struct sim_lock *s = (void *)l;
	return s->readers || s->writer ? EBUSY : 0;
}

int __wrap_pthread_rwlock_rdlock(pthread_rwlock_t *l)
{
	lock_read(l);
	return 0;
}

int __wrap_pthread_rwlock_wrlock(pthread_rwlock_t *l)
{
	lock_write(l);
	return 0;
}

int __wrap_pthread_rwlock_unlock(pthread_rwlock_t *l)
{
	lock_release(l);
	return 0;
}
