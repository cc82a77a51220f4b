/* checkpoints and extents. */
#include "cli/cli.h"

#include <string.h>

/* A 64-bit identifier may come as text or as a number. */
static void cell_id(const json_t *o, const char *key, char buf[FORMAT_SIZE])
{
	const json_t *v = json_object_get(o, key);
	if (json_is_string(v))
		(void)snprintf(buf, FORMAT_SIZE, "%s", json_string_value(v));
	else if (json_is_integer(v))
		(void)snprintf(buf, FORMAT_SIZE, "%016llx", (unsigned long long)json_integer_value(v));
	else
		(void)snprintf(buf, FORMAT_SIZE, "-");
}

static void cell_number(const json_t *o, const char *key, char buf[FORMAT_SIZE])
{
	uint64_t v;
	if (js_u64(o, key, &v))
		(void)snprintf(buf, FORMAT_SIZE, "%llu", (unsigned long long)v);
	else
		(void)snprintf(buf, FORMAT_SIZE, "-");
}

/* A list of texts. */
static void cell_words(const json_t *o, const char *key, char *buf, size_t size)
{
	size_t i, at = 0;
	json_t *w;
	buf[0] = '\0';
	json_array_foreach(json_object_get(o, key), i, w)
	{
		int n = snprintf(buf + at, size - at, "%s%s", i ? ", " : "", json_string_value(w));
		if (n < 0 || (size_t)n >= size - at)
			return;
		at += (size_t)n;
	}
}

static bool is_listed(const json_t *doc, uint64_t number)
{
	size_t i;
	json_t *k;
	uint64_t n;
	json_array_foreach(json_object_get(doc, "checkpoints"), i, k)
	{
		if (js_u64(k, "number", &n) && n == number)
			return true;
	}
	return false;
}

/* Looks before and after: a daemon that does not know the argument would list the checkpoints and drop nothing. */
static int drop(struct cli *c, uint64_t number)
{
	json_t *r;
	int rc = cli_call(c, "checkpoints", cli_name_args(c->args[0]), &r);
	if (rc)
		return rc;
	bool listed = is_listed(r, number);
	json_decref(r);
	if (!listed)
		return cli_fail(c, ERR_NOENT,
				"there is no checkpoint %llu; repctl checkpoints %s lists those there are",
				(unsigned long long)number, c->args[0]);
	if (!cli_confirm(c, "checkpoints %s: checkpoint %llu will be dropped.", c->args[0], (unsigned long long)number))
		return 1;
	json_t *args = json_pack("{s:s, s:I}", "name", c->args[0], "drop", (json_int_t)number), *after;
	if (!args)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	rc = cli_call(c, "checkpoints", args, &r);
	if (rc)
		return rc;
	rc = cli_call(c, "checkpoints", cli_name_args(c->args[0]), &after);
	if (rc == 0 && is_listed(after, number))
		rc = cli_fail(
		    c, ERR_NOTSUP,
		    "checkpoint %llu is still there; this daemon can't drop one, repctl version shows its version",
		    (unsigned long long)number);
	if (rc == 0)
		json_decref(after);
	if (rc) {
		json_decref(r);
		return rc;
	}
	if (!c->json)
		cli_note(c, "%s: checkpoint %llu dropped", c->args[0], (unsigned long long)number);
	return cli_finish(c, r);
}

int cmd_checkpoints(struct cli *c)
{
	static const struct table_column columns[] = {
	    {"NUMBER", TABLE_RIGHT}, {"KIND", TABLE_LEFT},	 {"PINNED", TABLE_LEFT},
	    {"TIME", TABLE_LEFT},    {"GENERATION", TABLE_LEFT}, {"HELD BY", TABLE_LEFT},
	};
	const char *which = cli_value(c, "drop");
	uint64_t number = 0;
	if (which && !cli_parse_u64(which, 1, INT64_MAX, &number))
		return cli_fail(c, ERR_USAGE, "--drop takes the number of a checkpoint, not '%.100s'", which);
	if (number)
		return drop(c, number);
	json_t *r;
	int rc = cli_call_print(c, "checkpoints", cli_name_args(c->args[0]), false, &r);
	if (!r)
		return rc;
	const json_t *list = json_object_get(r, "checkpoints");
	struct table *t = table_new(columns, 6, c->out.color);
	size_t i;
	json_t *k;
	json_array_foreach(list, i, k)
	{
		char num[FORMAT_SIZE], gen[FORMAT_SIZE], held[256];
		cell_number(k, "number", num);
		cell_id(k, "generation", gen);
		cell_words(k, "held_by", held, sizeof(held));
		const char *cells[] = {
		    num, js_str(k, "kind", NULL), js_bool(k, "pinned") ? "yes" : "no", js_str(k, "time", NULL), gen,
		    held};
		table_row(t, cells);
	}
	rc = table_finish(t, stdout) < 0 ? cli_fail(c, ERR_NOMEM, "out of memory") : 0;
	if (rc == 0 && json_array_size(list) == 0)
		cli_note(c, "%s keeps no checkpoints", c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_extents(struct cli *c)
{
	static const struct table_column columns[] = {{"OFFSET", TABLE_RIGHT}, {"LENGTH", TABLE_RIGHT}};
	char name[NAME_SIZE], layer[16];
	uint64_t ckpt, since = 0;
	struct err e = {0};
	int rc = cli_parse_layer(c->args[0], name, layer, &ckpt, &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	const char *from = cli_value(c, "since");
	if (from && !ckpt)
		return cli_fail(c, ERR_USAGE, "--since goes with NAME@N, not with an overlay");
	if (from && !cli_parse_u64(from, 1, INT64_MAX, &since))
		return cli_fail(c, ERR_USAGE, "--since takes the number of a checkpoint, not '%.100s'", from);
	if (from && since > ckpt)
		return cli_fail(c, ERR_USAGE, "--since %s is newer than checkpoint %llu", from,
				(unsigned long long)ckpt);

	json_t *args =
	    json_pack("{s:s, s:o}", "name", name, "layer", ckpt ? json_integer((json_int_t)ckpt) : json_string(layer));
	json_t *r;
	if (!args || (since && json_object_set_new(args, "since", json_integer((json_int_t)since)) != 0)) {
		json_decref(args);
		return cli_fail(c, ERR_NOMEM, "out of memory");
	}
	rc = cli_call_print(c, "extents", args, false, &r);
	if (!r)
		return rc;
	struct table *t = table_new(columns, 2, c->out.color);
	size_t i;
	json_t *x;
	json_array_foreach(json_object_get(r, "extents"), i, x)
	{
		char off[FORMAT_SIZE], len[FORMAT_SIZE];
		cell_number(x, "offset", off);
		cell_number(x, "length", len);
		const char *cells[] = {off, len};
		table_row(t, cells);
	}
	json_decref(r);
	return table_finish(t, stdout) < 0 ? cli_fail(c, ERR_NOMEM, "out of memory") : 0;
}
