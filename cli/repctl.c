/* repctl: the command line of repfs. Reads the command line (options.c), runs the verb (cmd_*.c), and looks whether the
 * output could be written. A reader of stdout that goes away ends the process by SIGPIPE, as it ends any filter.
 */
#include "cli/cli.h"

#include <errno.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>

#include "core/os/log.h"

static int run(struct cli *c, int argc, char *const argv[])
{
	struct err e = {0};
	int rc = cli_parse(argc, argv, c, &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	if (c->version) {
		cli_print_version();
		return 0;
	}
	if (c->help) {
		if (c->verb)
			cli_help_verb(stdout, c->verb);
		else
			cli_help(stdout);
		return 0;
	}
	if (!c->verb->run)
		return cli_fail_text(c, err_exit(ERR_NOTSUP), "comes in a later release");
	for (unsigned i = 0; i < c->n_given; i++)
		if (c->given[i].opt->later)
			return cli_fail(c, ERR_NOTSUP, "--%s comes in a later release", c->given[i].opt->name);
	rc = cli_resolve(c, &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	return c->verb->run(c);
}

int main(int argc, char *argv[])
{
	static struct cli c;
	(void)setlocale(LC_CTYPE, "");
	log_init("repctl", LOG_STDERR, LOG_TEXT, LOG_LEVEL_WARN);
	cli_catch_signals();
	int rc = run(&c, argc, argv);
	errno = 0;
	if (fflush(stdout) != 0 || ferror(stdout)) {
		if (errno != EPIPE)
			(void)fprintf(stderr, "repctl: the output could not be written whole%s%s\n", errno ? ": " : "",
				      errno ? strerror(errno) : "");
		rc = rc ? rc : 1;
	}
	return rc;
}
