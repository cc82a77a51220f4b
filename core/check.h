/* PRE/POST/INVARIANT: programmer errors only, on in release builds. Peer, disk and user input is validated and
 * answered with an error, never asserted. */
#ifndef REPFS_CORE_CHECK_H
#define REPFS_CORE_CHECK_H

#include <stddef.h>

/* Called once with the failed check before the trap; core/os/log installs one that prints it. May be NULL. */
extern void (*check_hook)(const char *kind, const char *expr, const char *file, int line);

_Noreturn void check_fail(const char *kind, const char *expr, const char *file, int line);

#define CHECK_(kind, cond) ((void)((cond) || (check_fail(kind, #cond, __FILE__, __LINE__), 0)))
#define PRE(cond) CHECK_("PRE", cond)
#define POST(cond) CHECK_("POST", cond)
#define INVARIANT(cond) CHECK_("INVARIANT", cond)
#define UNREACHABLE() check_fail("UNREACHABLE", "", __FILE__, __LINE__)

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define CONTAINER_OF(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

#endif
