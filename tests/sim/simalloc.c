#include "tests/sim/simalloc.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_aligned_alloc(size_t alignment, size_t n);

static unsigned watching;
static uint64_t counted, fail_in;
static bool failed;

/* One seed after the other builds up and tears down megabytes: giving them back to the kernel each time costs more than
 * all the rest. */
__attribute__((constructor)) static void keep_the_heap(void)
{
	(void)mallopt(M_TRIM_THRESHOLD, 256 << 20);
	(void)mallopt(M_MMAP_THRESHOLD, 32 << 20); /* the most that is taken */
}

static bool fails(void)
{
	if (!watching)
		return false;
	counted++;
	if (!fail_in || --fail_in)
		return false;
	failed = true;
	return true;
}

void *__wrap_malloc(size_t n)
{
	return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
	return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
	return fails() ? NULL : __real_realloc(p, n);
}

void *__wrap_aligned_alloc(size_t alignment, size_t n)
{
	return fails() ? NULL : __real_aligned_alloc(alignment, n);
}

void simalloc_watch(bool on)
{
	PRE(on || watching);
	watching += on ? 1U : -1U;
}

unsigned simalloc_watch_swap(unsigned n)
{
	unsigned was = watching;

	watching = n;
	return was;
}

void simalloc_fail_nth(uint64_t nth)
{
	fail_in = nth;
	failed = false;
}

uint64_t simalloc_counted(void)
{
	return counted;
}

bool simalloc_failed(void)
{
	return failed;
}

void *simalloc(size_t n)
{
	void *p = __real_calloc(1, n);

	PRE(p);
	return p;
}

void *simrealloc(void *p, size_t n)
{
	p = __real_realloc(p, n);
	PRE(p);
	return p;
}

void *simdup(const void *data, size_t n)
{
	return memcpy(simrealloc(NULL, n), data, n);
}

char *simstrdup(const char *s)
{
	return simdup(s, strlen(s) + 1);
}

void simfree(void *p)
{
	free(p);
}
