/* A fixed pool of worker threads over one FIFO of intrusive jobs. A job's fn runs once, on some worker; it may
 * submit further jobs, itself included. No allocation; the queue is bounded by what its users own. */
#ifndef REPFS_CORE_OS_POOL_H
#define REPFS_CORE_OS_POOL_H

#include <stdbool.h>

struct pool;
struct pool_job {
	void (*fn)(struct pool_job *job);
	struct pool_job *next; /* the pool's */
};

#define POOL_THREADS_MAX 64

int pool_create(unsigned threads, const char *name, struct pool **ret); /* returns owned */
void pool_submit(struct pool *p, struct pool_job *job);			/* borrows job until fn has been called */
/* Waits until nothing is queued or running. */
void pool_drain(struct pool *p);
/* Drains, stops the threads, frees. */
void pool_destroy(struct pool *p);

#endif
