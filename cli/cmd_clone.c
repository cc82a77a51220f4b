/* clone. */
#include "cli/cli.h"

#include <string.h>

int cmd_clone(struct cli *c)
{
	char name[NAME_SIZE];
	uint64_t ckpt = 0;
	struct err e = {0};
	int rc = strchr(c->args[0], '@') ? cli_parse_at(c->args[0], name, &ckpt, &e)
					 : err_set(&e, ERR_USAGE,
						   "'%.100s' names no checkpoint; give NAME@N, `checkpoints NAME` "
						   "lists those there are",
						   c->args[0]);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	json_t *args = json_pack("{s:s, s:I, s:s}", "name", name, "checkpoint", (json_int_t)ckpt, "clone", c->args[1]),
	       *r;
	if (!args)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	rc = cli_call_print(c, "clone", args, false, &r);
	if (!r)
		return rc;
	const char *path = js_str(r, "path", NULL);
	(void)printf("%s\n", path ? path : js_str(r, "clone", ""));
	json_decref(r);
	return rc;
}
