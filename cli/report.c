/* What repctl says besides results, and what it does on a signal.
 *
 * An interrupt ends the process at once with 130; the daemon sees the hang-up and cancels what must be. Only while
 * this process itself works on a store is it noted instead, and the work undone before leaving.
 */
#include "cli/cli.h"

#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"

static volatile sig_atomic_t signal_deferred;
static volatile sig_atomic_t signal_seen;

static void on_signal(int sig)
{
	bool again = signal_seen != 0;
	signal_seen = sig;
	if (signal_deferred && !again)
		return;
	/* Leave the shell's prompt a line of its own behind a bar. */
	if (isatty(STDERR_FILENO) == 1)
		(void)!write(STDERR_FILENO, "\n", 1);
	_exit(128 + sig);
}

void cli_catch_signals(void)
{
	static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
	for (size_t i = 0; i < ARRAY_LEN(signals); i++) {
		struct sigaction old, act = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
		/* Ignored on purpose (nohup, a background job of a script): leave it so. */
		if (sigaction(signals[i], NULL, &old) == 0 && old.sa_handler == SIG_IGN)
			continue;
		(void)sigemptyset(&act.sa_mask);
		(void)sigaction(signals[i], &act, NULL);
	}
}

void cli_defer_signals(bool on)
{
	signal_deferred = on;
}

int cli_interrupted(void)
{
	return (int)signal_seen;
}

int cli_fail_text(const struct cli *c, int exit_code, const char *text)
{
	(void)fflush(stdout);
	const char *verb = c->verb ? c->verb->name : NULL;
	size_t n = verb ? strlen(verb) : 0;
	bool has_verb = verb && strncmp(text, verb, n) == 0 && (text[n] == ' ' || text[n] == ':');
	if (!verb || has_verb)
		(void)fprintf(stderr, "repctl: %s\n", text);
	else if (c->n_args > 0)
		(void)fprintf(stderr, "repctl: %s %.300s: %s\n", verb, c->args[0], text);
	else
		(void)fprintf(stderr, "repctl: %s: %s\n", verb, text);
	return exit_code;
}

int cli_fail(const struct cli *c, int code, const char *fmt, ...)
{
	char text[ERR_TEXT_MAX + CLI_PATH_MAX];
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	return cli_fail_text(c, err_exit(code), text);
}

void cli_note(const struct cli *c, const char *fmt, ...)
{
	if (c->quiet || c->json)
		return;
	va_list ap;
	va_start(ap, fmt);
	(void)vfprintf(stderr, fmt, ap);
	va_end(ap);
	(void)fputc('\n', stderr);
}

bool cli_confirm(struct cli *c, const char *fmt, ...)
{
	if (c->yes || isatty(STDIN_FILENO) != 1 || isatty(STDERR_FILENO) != 1)
		return true;
	va_list ap;
	va_start(ap, fmt);
	(void)vfprintf(stderr, fmt, ap);
	va_end(ap);
	(void)fputs(" Go on? [y/N] ", stderr);
	(void)fflush(stderr);
	char line[16];
	if (fgets(line, sizeof(line), stdin) && (line[0] == 'y' || line[0] == 'Y') &&
	    (line[1] == '\n' || strncasecmp(line, "yes\n", 4) == 0))
		return true;
	(void)cli_fail_text(c, 1, "not confirmed, nothing was done; -y answers yes");
	return false;
}
