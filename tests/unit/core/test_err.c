/* Error codes: the one table, its mapping to errno and exit codes, and what err_set leaves behind. Also the traps of
 * core/check.h. */
#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/err.h"

Test(err, set_fills_and_returns_negative)
{
	struct err e;

	memset(&e, 0xa5, sizeof(e));
	cr_assert_eq(err_set(&e, ERR_STATE, "failover %s: it is %s", "vm1", "DONE"), -ERR_STATE);
	cr_assert_eq(e.code, ERR_STATE);
	cr_assert_str_eq(e.text, "failover vm1: it is DONE");
	cr_assert_eq(err_set(NULL, ERR_IO, "%d", 1), -ERR_IO);
	/* A code that was taken from a return value. */
	cr_assert_eq(err_set(&e, -ERR_NOSPC, "x"), -ERR_NOSPC);
	cr_assert_eq(e.code, ERR_NOSPC);
}

Test(err, set_may_put_a_prefix_before_its_own_text)
{
	struct err e = {0};

	(void)err_set(&e, ERR_IO, "disk.raw: cannot be read");
	(void)err_set(&e, ERR_IO, "import vm1: %s", e.text);
	cr_assert_str_eq(e.text, "import vm1: disk.raw: cannot be read");
}

Test(err, set_cuts_a_long_text)
{
	struct {
		struct err e;
		char after[16];
	} s;
	char text[ERR_TEXT_MAX * 2];

	memset(&s, 0xa5, sizeof(s));
	memset(text, 'x', sizeof(text));
	text[sizeof(text) - 1] = '\0';
	(void)err_set(&s.e, ERR_USAGE, "%s", text);
	cr_assert_eq(strlen(s.e.text), (size_t)ERR_TEXT_MAX - 1);
	for (size_t i = 0; i < sizeof(s.after); i++)
		cr_assert_eq((unsigned char)s.after[i], 0xa5U);
}

Test(err, a_long_text_is_cut_between_characters)
{
	static const char *const chars[] = {"a", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
	for (size_t k = 0; k < 4; k++)
		for (size_t before = 0; before < 4; before++) {
			char text[2 * ERR_TEXT_MAX] = "xxx";
			struct err e = {0};
			size_t n = strlen(chars[k]);
			text[before] = '\0';
			while (strlen(text) < sizeof(text) - 8)
				strcat(text, chars[k]);
			(void)err_set(&e, ERR_IO, "%s", text);
			size_t whole = before + (ERR_TEXT_MAX - 1 - before) / n * n;
			cr_assert_eq(strlen(e.text), whole);
			cr_assert_eq(memcmp(e.text, text, whole), 0);
			/* A short one is whole. */
			text[before + n] = '\0';
			(void)err_set(&e, ERR_IO, "%s", text);
			cr_assert_str_eq(e.text, text);
		}
}

Test(err, every_code_has_its_facts)
{
	for (int code = 1; code < ERR_CODES_END; code++) {
		cr_assert_eq(strncmp(err_name(code), "ERR_", 4), 0);
		cr_assert_eq(err_name(code), err_name(-code));
		cr_assert_gt(strlen(err_short(code)), 0U);
		cr_assert_gt(err_errno(code), 0);
		cr_assert_gt(err_exit(code), 0);
		cr_assert_eq(err_exit(code), err_exit(-code));
		for (int other = 1; other < code; other++)
			cr_assert_str_neq(err_name(code), err_name(other));
	}
	cr_assert_eq(err_errno(0), 0);
	cr_assert_eq(err_exit(0), 0);
}

Test(err, exit_codes_are_the_documented_ones)
{
	cr_assert_eq(err_exit(-ERR_FAILED), 1);
	cr_assert_eq(err_exit(-ERR_USAGE), 2);
	cr_assert_eq(err_exit(-ERR_UNREACHABLE_DAEMON), 3);
	cr_assert_eq(err_exit(-ERR_NOENT), 4);
	cr_assert_eq(err_exit(-ERR_STATE), 5);
	cr_assert_eq(err_exit(-ERR_PEER), 6);
	cr_assert_eq(err_exit(-ERR_DEGRADED), 7);
	cr_assert_eq(err_exit(-ERR_SPLIT), 8);
	cr_assert_eq(err_exit(-ERR_DIFFERS), 9);
	cr_assert_eq(err_exit(-ERR_TIMEOUT), 124);
	cr_assert_eq(err_exit(-ERR_INTR), 130);
	cr_assert_str_eq(err_name(-ERR_NOSPC), "ERR_NOSPC");
	cr_assert_str_eq(err_short(-ERR_IO), "input/output error");
	cr_assert_eq(err_errno(-ERR_NOSPC), ENOSPC);
}

Test(err, unknown_codes_read_as_failed)
{
	const int unknown[] = {ERR_CODES_END, -ERR_CODES_END, 100000, -100000, INT32_MIN, INT32_MAX};

	for (size_t i = 0; i < ARRAY_LEN(unknown); i++) {
		cr_assert_str_eq(err_name(unknown[i]), "ERR_FAILED");
		cr_assert_eq(err_errno(unknown[i]), EIO);
		cr_assert_eq(err_exit(unknown[i]), 1);
	}
}

Test(err, from_errno)
{
	const struct {
		int sys, code;
	} map[] = {
	    {ENOSPC, ERR_NOSPC}, {EDQUOT, ERR_NOSPC}, {ENOENT, ERR_NOENT}, {ENOMEM, ERR_NOMEM}, {EEXIST, ERR_EXIST},
	    {EACCES, ERR_PERM},	 {EPERM, ERR_PERM},   {EROFS, ERR_PERM},   {EIO, ERR_IO},	{EINVAL, ERR_IO},
	};

	for (size_t i = 0; i < ARRAY_LEN(map); i++)
		cr_assert_eq(err_from_errno(map[i].sys), -map[i].code, "errno %d", map[i].sys);
}

/* The hook ends the process with a code of its own: only then was it called, once, and before the trap. */
static void exit_77(const char *kind, const char *expr, const char *file, int line)
{
	bool right = strcmp(kind, "PRE") == 0 && strcmp(expr, "n == 2") == 0 && strstr(file, "test_err.c") != NULL;

	_exit(right && line > 0 ? 77 : 1);
}

Test(check, failed_check_traps, .signal = SIGILL)
{
	check_hook = NULL;
	INVARIANT(check_hook != NULL);
}

Test(check, failed_check_calls_the_hook, .exit_code = 77)
{
	volatile int n = 1;

	check_hook = exit_77;
	PRE(n == 2);
}

static void fails_itself(const char *kind, const char *expr, const char *file, int line)
{
	(void)kind, (void)expr, (void)file;
	INVARIANT(line < 0);
}

Test(check, failed_check_inside_the_hook_traps, .signal = SIGILL)
{
	check_hook = fails_itself;
	UNREACHABLE();
}

Test(check, true_checks_evaluate_once)
{
	int n = 0;

	PRE(++n == 1);
	POST(++n == 2);
	INVARIANT(++n == 3);
	cr_assert_eq(n, 3);
}
