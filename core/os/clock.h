#ifndef REPFS_CORE_OS_CLOCK_H
#define REPFS_CORE_OS_CLOCK_H

#include <stddef.h>
#include <stdint.h>

#define NS_PER_SEC UINT64_C(1000000000)
#define NS_PER_MS UINT64_C(1000000)

uint64_t clock_mono_ns(void); /* CLOCK_MONOTONIC */
uint64_t clock_wall_ns(void); /* CLOCK_REALTIME, ns since 1970 */
/* RFC 3339 in UTC with milliseconds: "2026-01-02T03:04:05.678Z" */
void clock_format(uint64_t wall_ns, char *buf, size_t size);
/* n random bytes from the kernel (getrandom); never fails. */
void random_bytes(void *buf, size_t n);
uint64_t random_u64_nonzero(void);

#endif
