/* The clocks and the kernel's random numbers. The core gets both handed in; only shells call these. */
#include "core/os/clock.h"

#include <errno.h>
#include <stdio.h>
#include <sys/random.h>
#include <time.h>

#include "core/check.h"

static uint64_t clock_ns(clockid_t id)
{
	struct timespec ts;
	int r = clock_gettime(id, &ts);

	INVARIANT(r == 0);
	/* A wall clock set to before 1970 reads as 1970. */
	return ts.tv_sec < 0 ? 0 : (uint64_t)ts.tv_sec * NS_PER_SEC + (uint64_t)ts.tv_nsec;
}

uint64_t clock_mono_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

uint64_t clock_wall_ns(void)
{
	return clock_ns(CLOCK_REALTIME);
}

void clock_format(uint64_t wall_ns, char *buf, size_t size)
{
	time_t seconds = (time_t)(wall_ns / NS_PER_SEC);
	unsigned ms = (unsigned)(wall_ns % NS_PER_SEC / NS_PER_MS);
	struct tm tm;

	PRE(size > 0);
	/* 2^64 ns end in the year 2554: gmtime_r can't fail. */
	if (gmtime_r(&seconds, &tm) == NULL)
		UNREACHABLE();
	(void)snprintf(buf, size, "%04d-%02d-%02dT%02d:%02d:%02d.%03uZ", tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday,
		       tm.tm_hour, tm.tm_min, tm.tm_sec, ms);
}

void random_bytes(void *buf, size_t n)
{
	uint8_t *p = buf;

	while (n > 0) {
		ssize_t got = getrandom(p, n, 0);

		if (got < 0 && errno == EINTR)
			continue;
		INVARIANT(got > 0);
		p += got;
		n -= (size_t)got;
	}
}

uint64_t random_u64_nonzero(void)
{
	uint64_t v = 0;

	while (v == 0)
		random_bytes(&v, sizeof(v));
	return v;
}
