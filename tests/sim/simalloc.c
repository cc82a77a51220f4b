#include "tests/sim/simalloc.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"

/* One seed after the other builds up and tears down megabytes: giving them back to the kernel each time costs more than
 * all the rest. */
__attribute__((constructor)) static void keep_the_heap(void)
{
	(void)mallopt(M_TRIM_THRESHOLD, 256 << 20);
	(void)mallopt(M_MMAP_THRESHOLD, 64 << 20);
}

void *simalloc(size_t n)
{
	void *p = calloc(1, n);

	PRE(p);
	return p;
}

void *simrealloc(void *p, size_t n)
{
	p = realloc(p, n);
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
