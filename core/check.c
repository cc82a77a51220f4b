/* The end of a failed check: the hook says what failed, then the trap. Whatever would go on with a broken invariant
 * could write wrong bytes to a disk; a killed daemon loses nothing (SPEC 9). */
#include "core/check.h"

#include <stddef.h>

void (*check_hook)(const char *kind, const char *expr, const char *file, int line);

_Noreturn void check_fail(const char *kind, const char *expr, const char *file, int line)
{
	/* Taken out first: a check that fails inside the hook, or in another thread meanwhile, must not call it again.
	 */
	void (*hook)(const char *, const char *, const char *, int) =
	    __atomic_exchange_n(&check_hook, NULL, __ATOMIC_ACQ_REL);

	if (hook != NULL)
		hook(kind, expr, file, line);
	__builtin_trap();
}
