/* Coroutines: what is a thread in the daemon is one of these in the simulator, so that the code under test can be
 * stopped between any two calls of its storage and the order in which they go on comes from the seed.
 *
 * The locks of core/os/thread.h and pthread's rwlocks are replaced at link time (co.c): one that is held makes a
 * coroutine wait, and what is not a coroutine fails.
 */
#ifndef REPFS_TESTS_SIM_CO_H
#define REPFS_TESTS_SIM_CO_H

#include <stdbool.h>
#include <stdint.h>

struct co;

/* Makes one that will run fn(arg) at its first co_resume. owner: the caller's, see co_owner. */
struct co *co_new(void (*fn)(void *arg), void *arg, void *owner);
/* Runs it until it yields or ends; true: it has ended and is gone. Not from a coroutine. */
bool co_resume(struct co *c);
void co_yield (void);	     /* from a coroutine: back to who resumed it */
struct co *co_current(void); /* NULL: none runs */
void *co_owner(const struct co *c);
/* Counts its resumes, over all its lives: a wake-up planned for an older one is stale. */
uint64_t co_turn(const struct co *c);
/* Called instead of a plain co_yield where a coroutine waits for a lock. */
extern void (*co_lock_wait)(void);
void co_free_all(void); /* the stacks of those that have ended */

#endif
