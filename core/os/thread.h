/* Mutex, condition and thread with clang's thread-safety annotations; wrong use traps. */
#ifndef REPFS_CORE_OS_THREAD_H
#define REPFS_CORE_OS_THREAD_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__clang__)
#define THREAD_ANNOTATION(x) __attribute__((x))
#else
#define THREAD_ANNOTATION(x)
#endif
#define CAPABILITY(name) THREAD_ANNOTATION(capability(name))
#define ACQUIRES(...) THREAD_ANNOTATION(acquire_capability(__VA_ARGS__))
#define RELEASES(...) THREAD_ANNOTATION(release_capability(__VA_ARGS__))
#define REQUIRES(...) THREAD_ANNOTATION(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) THREAD_ANNOTATION(locks_excluded(__VA_ARGS__))
#define NO_THREAD_ANALYSIS THREAD_ANNOTATION(no_thread_safety_analysis)

struct CAPABILITY("mutex") mutex {
	pthread_mutex_t m; /* error-checking in debug builds, adaptive otherwise */
};
struct cond {
	pthread_cond_t c; /* on CLOCK_MONOTONIC */
};

void mutex_init(struct mutex *m);
void mutex_destroy(struct mutex *m);
void mutex_lock(struct mutex *m) ACQUIRES(m);
void mutex_unlock(struct mutex *m) RELEASES(m);

void cond_init(struct cond *c);
void cond_destroy(struct cond *c);
void cond_wait(struct cond *c, struct mutex *m) REQUIRES(m);
/* Until deadline_ns of clock_mono_ns; false: timed out. */
bool cond_wait_until(struct cond *c, struct mutex *m, uint64_t deadline_ns) REQUIRES(m);
void cond_signal(struct cond *c);
void cond_broadcast(struct cond *c);

/* Starts a joinable thread with all signals blocked and a name of at most 15 characters. 0 or -ERR_x. */
int thread_start(pthread_t *ret, const char *name, void *(*fn)(void *), void *arg);

#endif
