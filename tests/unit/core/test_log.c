/* Log lines as they leave through stderr, byte for byte behind the time. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/log.h"

#define TIME_LENGTH 24 /* 2026-01-02T03:04:05.678Z */

/* Everything written to stderr since capture_begin, terminated. Each test is a process of its own. */
static int capture_fd;
static char captured[65536];

static void capture_begin(void)
{
	char path[] = "/tmp/test_log.XXXXXX";

	capture_fd = mkstemp(path);
	cr_assert_geq(capture_fd, 0);
	cr_assert_eq(unlink(path), 0);
	cr_assert_geq(dup2(capture_fd, STDERR_FILENO), 0);
}

static const char *capture_read(void)
{
	ssize_t n = pread(capture_fd, captured, sizeof(captured) - 1, 0);

	cr_assert_geq(n, 0);
	captured[n] = '\0';
	cr_assert_eq(ftruncate(capture_fd, 0), 0);
	cr_assert_eq(lseek(capture_fd, 0, SEEK_SET), 0);
	return captured;
}

static void check_time(const char *text)
{
	const char *form = "dddd-dd-ddTdd:dd:dd.dddZ";

	cr_assert_geq(strlen(text), (size_t)TIME_LENGTH, "'%s'", text);
	for (size_t i = 0; i < TIME_LENGTH; i++) {
		if (form[i] == 'd')
			cr_assert(text[i] >= '0' && text[i] <= '9', "'%s'", text);
		else
			cr_assert_eq(text[i], form[i], "'%s'", text);
	}
}

Test(log, text)
{
	const char *line;

	capture_begin();
	log_init("repfs", LOG_STDERR, LOG_TEXT, LOG_LEVEL_INFO);
	log_info("vm1", "checkpoint %d", 41);
	line = capture_read();
	check_time(line);
	cr_assert_str_eq(line + TIME_LENGTH, " info vm1: checkpoint 41\n");
	log_error("", "no volume");
	cr_assert_str_eq(capture_read() + TIME_LENGTH, " error no volume\n");
	log_warn("a", "%s", "");
	cr_assert_str_eq(capture_read() + TIME_LENGTH, " warn a: \n");
}

Test(log, json)
{
	const char *line;

	capture_begin();
	log_init("repfs", LOG_STDERR, LOG_JSON, LOG_LEVEL_DEBUG);
	log_debug("vm1", "say \"%s\" \\ to\x01 %s", "hello\n", "gr\xc3\xbc\xc3\x9f");
	line = capture_read();
	cr_assert_eq(strncmp(line, "{\"time\":\"", 9), 0);
	check_time(line + 9);
	cr_assert_str_eq(line + 9 + TIME_LENGTH, "\",\"level\":\"debug\",\"program\":\"repfs\",\"subject\":\"vm1\","
						 "\"message\":\"say \\\"hello?\\\" \\\\ to? gr\xc3\xbc\xc3\x9f\"}\n");
	log_warn("", "x");
	cr_assert_str_eq(capture_read() + 9 + TIME_LENGTH,
			 "\",\"level\":\"warn\",\"program\":\"repfs\",\"subject\":null,\"message\":\"x\"}\n");
}

Test(log, foreign_bytes_are_replaced)
{
	const struct {
		const char *in, *out;
	} cases[] = {
	    {"a\nfake line", "a?fake line"},
	    {"\x1b[31m", "?[31m"},
	    {"\x7f", "?"},
	    {"\xc2\x9b", "?"},		  /* C1 */
	    {"\xc0\x80", "??"},		  /* overlong NUL */
	    {"\xe0\x80\x80", "???"},	  /* overlong */
	    {"\xed\xa0\x80", "???"},	  /* surrogate */
	    {"\xf4\x90\x80\x80", "????"}, /* above U+10FFFF */
	    {"\xf0\x8f\xbf\xbf", "????"}, /* overlong */
	    {"\xff", "?"},
	    {"\xe2\x82", "??"}, /* cut short */
	    {"\xe2\x82z", "??z"},
	    {"\xe2\x82\xac", "\xe2\x82\xac"}, /* the euro sign */
	    {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"},
	};

	capture_begin();
	log_init("repfs", LOG_STDERR, LOG_TEXT, LOG_LEVEL_INFO);
	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		char want[64];

		(void)snprintf(want, sizeof(want), " info %s: %s\n", cases[i].out, cases[i].out);
		log_info(cases[i].in, "%s", cases[i].in);
		cr_assert_str_eq(capture_read() + TIME_LENGTH, want, "case %zu", i);
	}
}

Test(log, long_lines_are_cut)
{
	static char text[100000];
	const char *line;

	capture_begin();
	for (int json = 0; json < 2; json++) {
		log_init("repfs", LOG_STDERR, json ? LOG_JSON : LOG_TEXT, LOG_LEVEL_INFO);
		/* The worst case of escaping, in the subject too. */
		memset(text, '"', sizeof(text) - 1);
		log_info(text, "%s", text);
		line = capture_read();
		cr_assert_lt(strlen(line), 8192U);
		cr_assert_str_eq(line + strlen(line) - (json ? 6 : 4), json ? "...\"}\n" : "...\n");
		cr_assert_eq(strchr(line, '\n'), line + strlen(line) - 1);
	}
}

Test(log, levels)
{
	capture_begin();
	log_init("repfs", LOG_STDERR, LOG_TEXT, LOG_LEVEL_WARN);
	log_info("a", "no");
	log_debug("a", "no");
	cr_assert_str_eq(capture_read(), "");
	cr_assert(log_enabled(LOG_LEVEL_ERROR));
	cr_assert(log_enabled(LOG_LEVEL_WARN));
	cr_assert_not(log_enabled(LOG_LEVEL_INFO));
	log_set_level(LOG_LEVEL_DEBUG);
	log_debug("a", "yes");
	cr_assert_str_eq(capture_read() + TIME_LENGTH, " debug a: yes\n");
}

Test(log, errno_is_kept)
{
	capture_begin();
	log_init("repfs", LOG_STDERR, LOG_TEXT, LOG_LEVEL_INFO);
	(void)close(STDERR_FILENO);
	errno = EXDEV;
	log_error("a", "goes nowhere");
	cr_assert_eq(errno, EXDEV);
}

/* The hook alone first: what it wrote can be read, and is wrong if this test ends by anything but the trap. */
Test(log, a_failed_check_is_logged_before_the_trap, .signal = SIGILL)
{
	capture_begin();
	log_init("repfs", LOG_STDERR, LOG_TEXT, LOG_LEVEL_ERROR);
	void (*hook)(const char *, const char *, const char *, int) = check_hook;
	cr_assert(hook != NULL);
	hook("PRE", "n > 0", "core/x.c", 12);
	const char *line = capture_read();
	if (strncmp(line + TIME_LENGTH, " error PRE(n > 0) does not hold at core/x.c:12: ", 48) != 0)
		_exit(1); /* not the SIGILL that is expected */
	INVARIANT(line == NULL);
}
