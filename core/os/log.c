/* One event is one line, built in a local buffer and handed over by one write(2) or one syslog(3), so that lines of
 * several threads never mix and no lock of ours is held across output.
 *
 * Text may come from a peer or a guest: control characters (a newline would forge a line) and bytes that are not UTF-8
 * are replaced, in both formats. A line that is too long ends in "...".
 */
#include "core/os/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <syslog.h>
#undef LOG_SYSLOG /* syslog.h's facility; here the name is log.h's target, and the facility is not used */

#include "core/check.h"
#include "core/os/clock.h"

#define LOG_MESSAGE_MAX 1536
#define LOG_SUBJECT_MAX 160
/* JSON needs up to two bytes for one: what is not printable has been replaced. */
#define LOG_LINE_MAX ((LOG_MESSAGE_MAX + LOG_SUBJECT_MAX) * 2 + 512)

static struct {
	const char *program;
	enum log_target target;
	enum log_format format;
	int level; /* atomic */
} log_state = {.program = "repfs", .target = LOG_STDERR, .format = LOG_TEXT, .level = LOG_LEVEL_INFO};

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static const int level_priorities[] = {LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG};

/* A line under construction. LOG_LINE_MAX holds any; `cut` is the bound that does not depend on that sum. */
struct line {
	char text[LOG_LINE_MAX];
	size_t len;
	bool cut;
};

static void line_add(struct line *l, const char *s, size_t n)
{
	/* One byte stays free for the newline or the terminator. */
	if (l->cut || n > sizeof(l->text) - 1 - l->len) {
		l->cut = true;
		return;
	}
	memcpy(l->text + l->len, s, n);
	l->len += n;
}

static void line_text(struct line *l, const char *s)
{
	line_add(l, s, strlen(s));
}

/* Length of the UTF-8 sequence at s (left bytes are there), 0 if it is none. */
static size_t utf8_length(const unsigned char *s, size_t left)
{
	size_t n;

	if (s[0] < 0x80)
		n = 1;
	else if (s[0] >= 0xc2 && s[0] <= 0xdf)
		n = 2;
	else if (s[0] >= 0xe0 && s[0] <= 0xef)
		n = 3;
	else if (s[0] >= 0xf0 && s[0] <= 0xf4)
		n = 4;
	else
		return 0;
	if (n > left)
		return 0;
	for (size_t i = 1; i < n; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	/* Overlong forms, surrogates, and what lies above U+10FFFF. */
	if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf0 && s[1] < 0x90) ||
	    (s[0] == 0xf4 && s[1] > 0x8f))
		return 0;
	return n;
}

/* What came from elsewhere, made safe for the format. */
static void line_foreign(struct line *l, const char *text, bool json)
{
	const unsigned char *s = (const unsigned char *)text;
	size_t left = strlen(text);

	while (left > 0) {
		size_t n = utf8_length(s, left);
		/* C0, DEL and C1: a terminal obeys all three. */
		bool control = s[0] < 0x20 || s[0] == 0x7f || (n == 2 && s[0] == 0xc2 && s[1] < 0xa0);

		if (n == 0 || control) {
			line_text(l, "?");
			n = n == 0 ? 1 : n;
		} else {
			if (json && (s[0] == '"' || s[0] == '\\'))
				line_text(l, "\\");
			line_add(l, (const char *)s, n);
		}
		s += n;
		left -= n;
	}
}

static void line_build(struct line *l, enum log_level level, const char *subject, const char *message)
{
	bool json = log_state.format == LOG_JSON;
	char now[32];

	clock_format(clock_wall_ns(), now, sizeof(now));
	l->len = 0;
	l->cut = false;
	if (json) {
		line_text(l, "{\"time\":\"");
		line_text(l, now);
		line_text(l, "\",\"level\":\"");
		line_text(l, level_names[level]);
		line_text(l, "\",\"program\":\"");
		line_foreign(l, log_state.program, true);
		line_text(l, subject[0] != '\0' ? "\",\"subject\":\"" : "\",\"subject\":null,\"message\":\"");
		if (subject[0] != '\0') {
			line_foreign(l, subject, true);
			line_text(l, "\",\"message\":\"");
		}
		line_foreign(l, message, true);
		line_text(l, "\"}");
	} else {
		/* The journal and syslog have time and priority of their own. */
		if (log_state.target == LOG_STDERR) {
			line_text(l, now);
			line_text(l, " ");
			line_text(l, level_names[level]);
			line_text(l, " ");
		}
		if (subject[0] != '\0') {
			line_foreign(l, subject, false);
			line_text(l, ": ");
		}
		line_foreign(l, message, false);
	}
	l->text[l->len] = '\0';
}

static void line_out(struct line *l, enum log_level level)
{
	if (log_state.target != LOG_STDERR) {
		syslog(level_priorities[level], "%s", l->text);
		return;
	}
	l->text[l->len++] = '\n';
	for (size_t done = 0; done < l->len;) {
		ssize_t n = write(STDERR_FILENO, l->text + done, l->len - done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) /* nowhere left to say so */
			return;
		done += (size_t)n;
	}
}

static void log_check_failed(const char *kind, const char *expr, const char *file, int line)
{
	log_line(LOG_LEVEL_ERROR, "",
		 "%s(%s) does not hold at %s:%d: a bug in %s; it ends here so that no wrong data is written", kind,
		 expr, file, line, log_state.program);
}

void log_init(const char *program, enum log_target target, enum log_format format, enum log_level level)
{
	log_state.program = program;
	log_state.target = target;
	log_state.format = format;
	log_set_level(level);
	if (target != LOG_STDERR)
		openlog(program, LOG_PID | LOG_NDELAY, LOG_DAEMON);
	__atomic_store_n(&check_hook, log_check_failed, __ATOMIC_RELEASE);
}

void log_set_level(enum log_level level)
{
	PRE(level <= LOG_LEVEL_DEBUG);
	__atomic_store_n(&log_state.level, (int)level, __ATOMIC_RELAXED);
}

bool log_enabled(enum log_level level)
{
	return (int)level <= __atomic_load_n(&log_state.level, __ATOMIC_RELAXED);
}

void log_line(enum log_level level, const char *subject, const char *fmt, ...)
{
	int saved_errno = errno;
	char message[LOG_MESSAGE_MAX];
	char short_subject[LOG_SUBJECT_MAX];
	struct line line;
	va_list ap;

	if (!log_enabled(level))
		return;
	va_start(ap, fmt);
	int n = vsnprintf(message, sizeof(message), fmt, ap);
	va_end(ap);
	if (n < 0)
		message[0] = '\0';
	else if ((size_t)n >= sizeof(message))
		memcpy(message + sizeof(message) - 4, "...", 4);
	(void)snprintf(short_subject, sizeof(short_subject), "%s", subject);
	line_build(&line, level, short_subject, message);
	line_out(&line, level);
	errno = saved_errno;
}
