/* ping, version, shutdown, completion, help. */
#include "cli/cli.h"

#include <string.h>

#ifndef REPFS_VERSION
#define REPFS_VERSION "unknown"
#endif

void cli_print_version(void)
{
	(void)printf("repctl %s\n", REPFS_VERSION);
}

int cmd_ping(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "ping", NULL, false, &r);
	uint64_t pid;
	if (r && js_u64(r, "pid", &pid))
		(void)printf("the daemon answers, pid %llu\n", (unsigned long long)pid);
	else if (r)
		(void)printf("the daemon answers\n");
	json_decref(r);
	return rc;
}

int cmd_version(struct cli *c)
{
	if (!c->json)
		cli_print_version();
	json_t *r;
	int rc = cli_call(c, "version", NULL, &r);
	if (rc)
		return rc;
	if (c->json)
		return cli_finish(c, r);
	uint64_t protocol, format;
	(void)printf("repfs %s", js_str(r, "version", "unknown"));
	if (js_u64(r, "protocol", &protocol))
		(void)printf("  protocol %llu", (unsigned long long)protocol);
	if (js_u64(r, "format", &format))
		(void)printf("  format %llu", (unsigned long long)format);
	(void)putchar('\n');
	json_decref(r);
	return 0;
}

int cmd_shutdown(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "shutdown", NULL, false, &r);
	if (r)
		cli_note(c, "the daemon is ending");
	json_decref(r);
	return rc;
}

int cmd_completion(struct cli *c)
{
	if (cli_completion(stdout, c->args[0]) < 0)
		return cli_fail_text(c, err_exit(ERR_USAGE), "there is completion for bash, zsh and fish");
	return 0;
}

int cmd_help(struct cli *c)
{
	if (c->n_args == 0) {
		cli_help(stdout);
		return 0;
	}
	const struct cli_verb *v = cli_find_verb(c->args[0]);
	if (!v)
		return cli_fail_text(c, err_exit(ERR_USAGE), "no such verb; repctl --help lists them");
	cli_help_verb(stdout, v);
	return 0;
}
