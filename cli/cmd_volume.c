/* create, import, export, delete, list, show: through the daemon, or on the store itself (delete excepted). */
#include "cli/cli.h"

#include <string.h>

#include "core/settings.h"

/* Adds key: text when there is one. False: out of memory (or text is no UTF-8). */
static bool put_text(json_t *args, const char *key, const char *text)
{
	return !text || json_object_set_new(args, key, json_string(text)) == 0;
}

static int odd_text(const struct cli *c, json_t *args)
{
	json_decref(args);
	return cli_fail(c, ERR_USAGE, "an argument is not valid UTF-8; use a name or path that is");
}

static void note_made(const struct cli *c, const json_t *r)
{
	uint64_t size = 0;
	char text[FORMAT_SIZE];
	(void)js_u64(r, "size", &size);
	format_bytes(size, text);
	const char *format = js_str(r, "format", NULL);
	cli_note(c, "%s: %s, group %s%s%s", js_str(r, "volume", c->args[0]), text, js_str(r, "group", c->args[0]),
		 !format		   ? ""
		 : js_str(r, "base", NULL) ? ", over "
					   : ", from ",
		 format ? format : "");
}

static void note_applied(const struct cli *c, const json_t *r)
{
	uint64_t bytes = 0, at = 0;
	char text[FORMAT_SIZE], number[64] = "";
	(void)js_u64(r, "applied", &bytes);
	format_bytes(bytes, text);
	if (js_u64(r, "checkpoint", &at) && at)
		(void)snprintf(number, sizeof(number), ": it is as of checkpoint %llu", (unsigned long long)at);
	cli_note(c, "%s: %s applied%s", js_str(r, "volume", c->args[0]), text, number);
}

int cmd_create(struct cli *c)
{
	const char *name = c->args[0], *size_text = cli_value(c, "size"), *group = cli_value(c, "group");
	const char *over = cli_value(c, "base"), *backing = cli_value(c, "backing-dir");
	char base[CLI_PATH_MAX], dir[CLI_PATH_MAX];
	struct err e = {0};
	uint64_t size = 0;
	if (!size_text && !over)
		return cli_fail(
		    c, ERR_USAGE,
		    "the size is missing; give it with --size, such as --size 20G, or an image with --base");
	if (backing && !over)
		return cli_fail(c, ERR_USAGE, "--backing-dir goes with --base");
	int rc = size_text ? parse_size(size_text, &size, &e) : 0;
	if (rc == 0 && size_text && size == 0)
		rc = err_set(&e, ERR_USAGE, "a volume's size can't be 0");
	if (rc == 0 && over)
		rc = cli_absolute(over, base, sizeof(base), &e);
	if (rc == 0 && backing)
		rc = cli_absolute(backing, dir, sizeof(dir), &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	if (size > INT64_MAX)
		return cli_fail(c, ERR_USAGE, "%s is larger than any volume can be", size_text);
	/* Its path is shown in JSON for as long as the volume lives. */
	json_t *args = json_pack("{s:s}", "name", name);
	if (!args || !put_text(args, "group", group) || !put_text(args, "base", over ? base : NULL) ||
	    !put_text(args, "backing_dir", backing ? dir : NULL) ||
	    (size_text && json_object_set_new(args, "size", json_integer((json_int_t)size)) != 0))
		return odd_text(c, args);

	struct store *st;
	json_t *r = NULL;
	rc = cli_offline(c, STORE_CREATE, &st);
	if (rc) {
		json_decref(args);
		return rc;
	}
	if (!st) {
		rc = cli_call(c, "create", args, &r);
	} else {
		json_decref(args);
		const struct store_base_args on = {name, base, backing ? dir : NULL, group};
		rc = over ? offline_create_over(c, st, &on, size, &r) : offline_create(c, st, name, size, group, &r);
	}
	if (rc)
		return rc;
	if (!c->json)
		note_made(c, r);
	return cli_finish(c, r);
}

int cmd_import(struct cli *c)
{
	const char *name = c->args[0], *group = cli_value(c, "group"), *format = cli_value(c, "format");
	const char *backing = cli_value(c, "backing-dir");
	char file[CLI_PATH_MAX], dir[CLI_PATH_MAX];
	struct err e = {0};
	int rc = cli_absolute(c->args[1], file, sizeof(file), &e);
	if (rc == 0 && backing)
		rc = cli_absolute(backing, dir, sizeof(dir), &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);

	struct store *st;
	json_t *r = NULL;
	bool apply = cli_has(c, "apply");
	if (apply && (group || format || backing))
		return cli_fail(c, ERR_USAGE, "--apply goes with no other option of import");
	rc = cli_offline(c, apply ? 0 : STORE_CREATE, &st);
	if (rc)
		return rc;
	if (st && apply) {
		rc = offline_apply(c, st, name, file, &r);
	} else if (st) {
		struct store_import_args args = {name, file, format, backing ? dir : NULL, group};
		rc = offline_import(c, st, &args, &r);
	} else {
		json_t *args = json_pack("{s:s, s:s}", "name", name, "file", file);
		if (!args || !put_text(args, "group", group) || !put_text(args, "format", format) ||
		    !put_text(args, "backing_dir", backing ? dir : NULL) ||
		    (apply && json_object_set_new(args, "apply", json_true()) != 0))
			return odd_text(c, args);
		rc = cli_call(c, "import", args, &r);
	}
	if (rc)
		return rc;
	if (!c->json && apply)
		note_applied(c, r);
	else if (!c->json)
		note_made(c, r);
	return cli_finish(c, r);
}

int cmd_export(struct cli *c)
{
	char name[NAME_SIZE], file[CLI_PATH_MAX];
	uint64_t ckpt;
	struct err e = {0};
	int rc = cli_parse_at(c->args[0], name, &ckpt, &e);
	if (rc == 0)
		rc = cli_absolute(c->args[1], file, sizeof(file), &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);

	struct store *st;
	json_t *r = NULL;
	rc = cli_offline(c, 0, &st);
	if (rc)
		return rc;
	if (st) {
		rc = offline_export(c, st, name, ckpt, file, &r);
	} else {
		json_t *args = json_pack("{s:s, s:s}", "name", name, "file", file);
		if (!args)
			return odd_text(c, args);
		if (ckpt && json_object_set_new(args, "checkpoint", json_integer((json_int_t)ckpt)) != 0)
			return odd_text(c, args);
		rc = cli_call(c, "export", args, &r);
	}
	if (rc)
		return rc;
	if (!c->json)
		cli_note(c, "%s: written to %s", c->args[0], file);
	return cli_finish(c, r);
}

int cmd_delete(struct cli *c)
{
	if (!cli_confirm(c, "delete %s: its disk and all its checkpoints on this host go.", c->args[0]))
		return 1;
	json_t *r;
	int rc = cli_call_print(c, "delete", cli_name_args(c->args[0]), false, &r);
	if (r)
		cli_note(c, "%s: deleted", c->args[0]);
	json_decref(r);
	return rc;
}

static void cell_bytes(const json_t *o, const char *key, char buf[FORMAT_SIZE])
{
	uint64_t v;
	if (js_u64(o, key, &v))
		format_bytes(v, buf);
	else
		(void)snprintf(buf, FORMAT_SIZE, "-");
}

static int print_clones(struct cli *c, const json_t *clones)
{
	static const struct table_column columns[] = {
	    {"CLONE", TABLE_LEFT}, {"OF", TABLE_LEFT}, {"OWN", TABLE_RIGHT}, {"MADE", TABLE_LEFT}, {"", TABLE_LEFT}};
	size_t i;
	json_t *k;
	if (json_array_size(clones) == 0)
		return 0;
	(void)putchar('\n');
	struct table *t = table_new(columns, 5, c->out.color);
	json_array_foreach(clones, i, k)
	{
		char of[NAME_SIZE + 24], bytes[FORMAT_SIZE];
		uint64_t number = 0;
		(void)js_u64(k, "checkpoint", &number);
		(void)snprintf(of, sizeof(of), "%.63s@%llu", js_str(k, "volume", "-"), (unsigned long long)number);
		cell_bytes(k, "bytes", bytes);
		const char *cells[] = {js_str(k, "name", NULL), of, bytes, js_str(k, "time", NULL),
				       js_bool(k, "lost") ? "lost: its checkpoint was given up" : ""};
		table_row(t, cells);
	}
	return table_finish(t, stdout);
}

static int print_list(struct cli *c, const json_t *doc)
{
	static const struct table_column columns[] = {
	    {"NAME", TABLE_LEFT}, {"GROUP", TABLE_LEFT}, {"SIZE", TABLE_RIGHT}, {"ALLOCATED", TABLE_RIGHT},
	    {"ROLE", TABLE_LEFT}, {"STATE", TABLE_LEFT}, {"BASE", TABLE_LEFT},
	};
	bool based = false; /* the last column only where there is something in it */
	const json_t *volumes = json_object_get(doc, "volumes");
	size_t i;
	json_t *v;
	if (cli_has(c, "names")) {
		json_array_foreach(volumes, i, v)
		{
			(void)printf("%s\n", js_str(v, "name", ""));
		}
		return 0;
	}
	json_array_foreach(volumes, i, v)
	{
		based = based || js_str(v, "base", NULL);
	}
	struct table *t = table_new(columns, based ? 7 : 6, c->out.color);
	json_array_foreach(volumes, i, v)
	{
		char size[FORMAT_SIZE], allocated[FORMAT_SIZE];
		cell_bytes(v, "size", size);
		cell_bytes(v, "allocated", allocated);
		const char *cells[] = {
		    js_str(v, "name", NULL),  js_str(v, "group", NULL), size, allocated, js_str(v, "role", NULL),
		    js_str(v, "state", NULL), js_str(v, "base", NULL)};
		table_row(t, cells);
	}
	if (table_finish(t, stdout) < 0)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	if (print_clones(c, json_object_get(doc, "clones")) < 0)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	const json_t *unserved = json_object_get(doc, "unserved");
	json_array_foreach(unserved, i, v)
	{
		cli_note(c, "group %s is not served: %s", js_str(v, "group", "?"), js_str(v, "why", "?"));
	}
	if (json_array_size(volumes) == 0 && json_array_size(unserved) == 0)
		cli_note(c, "no volumes; repctl create NAME --size SIZE makes one");
	return 0;
}

int cmd_list(struct cli *c)
{
	struct store *st;
	json_t *r = NULL;
	int rc = cli_offline(c, 0, &st);
	if (rc)
		return rc;
	/* A store with a bad record lists the others, and fails. */
	rc = st ? offline_list(c, st, &r) : cli_call(c, "list", NULL, &r);
	if (!r)
		return rc;
	if (c->json) {
		int printed = cli_finish(c, r);
		return rc ? rc : printed;
	}
	int printed = print_list(c, r);
	json_decref(r);
	return rc ? rc : printed;
}

/* One line of `show`: numbers of bytes for people, lists as their length. */
static void print_fact(const char *key, const json_t *v)
{
	char text[FORMAT_SIZE];
	(void)printf("%-12s", key);
	if (json_is_string(v)) {
		(void)printf("  %s\n", json_string_value(v));
	} else if (json_is_integer(v) && (strcmp(key, "size") == 0 || strcmp(key, "allocated") == 0)) {
		uint64_t bytes = json_integer_value(v) < 0 ? 0 : (uint64_t)json_integer_value(v);
		format_bytes(bytes, text);
		(void)printf("  %s (%llu bytes)\n", text, (unsigned long long)bytes);
	} else if (json_is_integer(v)) {
		(void)printf("  %" JSON_INTEGER_FORMAT "\n", json_integer_value(v));
	} else if (json_is_boolean(v)) {
		(void)printf("  %s\n", json_is_true(v) ? "yes" : "no");
	} else if (json_is_array(v)) {
		size_t i;
		json_t *n;
		if (json_array_size(v) == 0)
			(void)printf("  none");
		json_array_foreach(v, i, n)
		{
			uint64_t number;
			if (json_is_integer(n))
				(void)printf("%s%" JSON_INTEGER_FORMAT, i ? ", " : "  ", json_integer_value(n));
			else if (js_str(n, "name", NULL) && js_u64(n, "checkpoint", &number))
				(void)printf("%s%s@%llu", i ? ", " : "  ", js_str(n, "name", NULL),
					     (unsigned long long)number);
			else if (js_u64(n, "number", &number))
				(void)printf("%s%llu", i ? ", " : "  ", (unsigned long long)number);
		}
		(void)putchar('\n');
	} else {
		(void)printf("  -\n");
	}
}

int cmd_show(struct cli *c)
{
	struct store *st;
	json_t *r = NULL;
	int rc = cli_offline(c, 0, &st);
	if (rc)
		return rc;
	rc = st ? offline_show(c, st, c->args[0], &r) : cli_call(c, "show", cli_name_args(c->args[0]), &r);
	if (rc)
		return rc;
	if (c->json)
		return cli_finish(c, r);
	const char *key;
	json_t *v;
	json_object_foreach(r, key, v)
	{
		if (strcmp(key, "schema") != 0)
			print_fact(key, v);
	}
	json_decref(r);
	return 0;
}

int cmd_resize(struct cli *c)
{
	struct err e = {0};
	uint64_t size, old = 0;
	char from[FORMAT_SIZE], to[FORMAT_SIZE];
	json_t *r;
	int rc = parse_size(c->args[1], &size, &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	if (size > INT64_MAX)
		return cli_fail(c, ERR_USAGE, "%s is larger than any volume can be", c->args[1]);
	json_t *args = json_pack("{s:s, s:I}", "name", c->args[0], "size", (json_int_t)size);
	if (!args)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	rc = cli_call_print(c, "resize", args, true, &r);
	if (!r)
		return rc;
	(void)js_u64(r, "old_size", &old);
	(void)js_u64(r, "size", &size);
	format_bytes(old, from);
	format_bytes(size, to);
	if (old == size)
		cli_note(c, "%s: has %s already", c->args[0], to);
	else
		cli_note(
		    c,
		    "%s: %s, was %s; a guest sees it when its device is told (virsh blockresize, QEMU's block_resize)",
		    c->args[0], to, from);
	json_decref(r);
	return rc;
}
