/* Memory of the simulator, and allocations that fail.
 *
 * The programs of tests/sim are linked with --wrap for malloc and its kin. While `watch` is on (around a call of the
 * code under test), each allocation counts, and the nth after simalloc_fail_nth fails. The simulator's own memory comes
 * from simalloc: never NULL, zeroed, not counted.
 */
#ifndef REPFS_TESTS_SIMALLOC_H
#define REPFS_TESTS_SIMALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *simalloc(size_t n);		  /* owned; zeroed */
void *simdup(const void *data, size_t n); /* owned */
void *simrealloc(void *p, size_t n);	  /* what is new is not zeroed */
char *simstrdup(const char *s);		  /* owned */
void simfree(void *p);			  /* NULL is fine */

/* Nests: on as long as more were switched on than off. */
void simalloc_watch(bool on);
/* For who switches stacks: what is on, made `n`; returns what it was. */
unsigned simalloc_watch_swap(unsigned n);
void simalloc_fail_nth(uint64_t nth); /* 0: none */
/* Allocations counted since the program began; whether the one that was to fail has. */
uint64_t simalloc_counted(void);
bool simalloc_failed(void);

#endif
