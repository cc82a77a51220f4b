/* Memory of the simulator itself: never NULL, zeroed, and not counted among the allocations of the code under test. */
#ifndef REPFS_TESTS_SIMALLOC_H
#define REPFS_TESTS_SIMALLOC_H

#include <stddef.h>

void *simalloc(size_t n);		  /* owned; zeroed */
void *simdup(const void *data, size_t n); /* owned */
void *simrealloc(void *p, size_t n);	  /* what is new is not zeroed */
char *simstrdup(const char *s);		  /* owned */
void simfree(void *p);			  /* NULL is fine */

#endif
