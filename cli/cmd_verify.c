/* verify: what it found, and what was done about it. */
#include "cli/cli.h"

#include <string.h>

static void cell(const json_t *o, const char *key, char buf[FORMAT_SIZE])
{
	uint64_t v;
	if (js_u64(o, key, &v))
		(void)snprintf(buf, FORMAT_SIZE, "%llu", (unsigned long long)v);
	else
		(void)snprintf(buf, FORMAT_SIZE, "%s", js_str(o, key, "-"));
}

static int rows(struct cli *c, const json_t *list)
{
	static const struct table_column columns[] = {
	    {"HOST", TABLE_LEFT},    {"WHAT", TABLE_LEFT},    {"VOLUME", TABLE_LEFT},  {"CHECKPOINT", TABLE_RIGHT},
	    {"OFFSET", TABLE_RIGHT}, {"LENGTH", TABLE_RIGHT}, {"PROBLEM", TABLE_LEFT}, {"REPAIRED", TABLE_LEFT},
	};
	struct table *t = table_new(columns, 8, c->out.color);
	size_t i;
	json_t *d;
	json_array_foreach(list, i, d)
	{
		char ckpt[FORMAT_SIZE], off[FORMAT_SIZE], len[FORMAT_SIZE];
		cell(d, "checkpoint", ckpt);
		cell(d, "offset", off);
		cell(d, "length", len);
		const char *cells[] = {js_str(d, "host", NULL),
				       js_str(d, "what", NULL),
				       js_str(d, "volume", NULL),
				       ckpt,
				       off,
				       len,
				       js_str(d, "problem", NULL),
				       js_bool(d, "repaired") ? "yes" : "no"};
		table_row(t, cells);
	}
	return table_finish(t, stdout) < 0 ? cli_fail(c, ERR_NOMEM, "out of memory") : 0;
}

static bool is(const json_t *d, const char *key, const char *value)
{
	return strcmp(js_str(d, key, ""), value) == 0;
}

/* A block of an overlay has no other copy: which checkpoint is lost, and what gets rid of it. Once for each. */
static void overlay_notes(const struct cli *c, const json_t *list)
{
	size_t i, k;
	json_t *d, *e;
	json_array_foreach(list, i, d)
	{
		bool told = false;
		uint64_t n;
		if (!is(d, "what", "overlay"))
			continue;
		json_array_foreach(list, k, e)
		{
			if (k >= i)
				break;
			told = told || (is(e, "what", "overlay") && is(e, "host", js_str(d, "host", "")) &&
					json_equal(json_object_get(e, "checkpoint"), json_object_get(d, "checkpoint")));
		}
		if (told)
			continue;
		if (js_u64(d, "checkpoint", &n))
			cli_note(
			    c,
			    "checkpoint %llu on the %s, and older ones that rest on it, can't be read there: no other "
			    "copy of it exists; on that host, drop the checkpoints up to %llu, the oldest first "
			    "(checkpoints %s --drop N; if it is the newest, take a new one first)",
			    (unsigned long long)n, js_str(d, "host", "?"), (unsigned long long)n, c->args[0]);
		else
			cli_note(c,
				 "what the %s wrote itself can't be read there: no other copy of it exists; discard %s "
				 "drops it",
				 js_str(d, "host", "?"), c->args[0]);
	}
}

static void notes(const struct cli *c, const json_t *r)
{
	uint64_t wrong = 0, repaired = 0, more = 0, n;
	char a[FORMAT_SIZE], b[FORMAT_SIZE];
	const char *repair = cli_value(c, "repair");
	bool asked = cli_has(c, "repair");
	(void)js_u64(r, "wrong_bytes", &wrong);
	(void)js_u64(r, "repaired_bytes", &repaired);
	(void)js_u64(r, "more", &more);
	format_bytes(wrong, a);
	format_bytes(repaired, b);
	if (more)
		cli_note(c, "%llu more ranges are not listed; repair what is, and verify again",
			 (unsigned long long)more);
	if (wrong == 0)
		return;
	if (asked && js_u64(r, "checkpoint", &n))
		cli_note(c,
			 "%s of %s repaired with the %s content; what the secondary held before is its pinned "
			 "checkpoint %llu",
			 b, a, repair ? "peer's" : "primary's", (unsigned long long)n);
	if (asked && repair && repaired) {
		if (js_u64(r, "kept_here", &n))
			cli_note(c, "what this host's disk held before is in its checkpoint %llu",
				 (unsigned long long)n);
		else
			cli_note(c, "what this host's disk held before is not kept: it keeps no checkpoints");
	}
	if (!asked)
		cli_note(c,
			 "%s do not fit; verify %s --repair gives the secondary's disk the primary's content, "
			 "--repair=from-peer the other way",
			 a, c->args[0]);
	else if (repaired < wrong)
		cli_note(c, "what is not repaired could not be read, or is an overlay's");
	overlay_notes(c, json_object_get(r, "differences"));
}

int cmd_verify(struct cli *c)
{
	json_t *args = cli_name_args(c->args[0]), *r;
	const char *repair = cli_value(c, "repair");
	if (cli_has(c, "repair") &&
	    (!args || json_object_set_new(args, "repair", json_string(repair ? repair : "peer")) != 0)) {
		json_decref(args);
		return cli_fail(c, ERR_NOMEM, "out of memory");
	}
	if (repair &&
	    !cli_confirm(c, "verify %s: where the disks differ, this host's live disk gets the peer's content.",
			 c->args[0])) {
		json_decref(args);
		return 1;
	}
	int rc = cli_call_timed(c, "verify", args, &r);
	if (rc)
		return rc;
	bool clean = js_bool(r, "clean");
	int found = clean ? 0 : err_exit(ERR_DIFFERS);
	if (c->json) {
		rc = cli_finish(c, r);
		return rc ? rc : found;
	}
	rc = rows(c, json_object_get(r, "differences"));
	uint64_t bytes = 0, overlays = 0;
	char a[FORMAT_SIZE], b[FORMAT_SIZE];
	(void)js_u64(r, "bytes", &bytes);
	(void)js_u64(r, "overlay_bytes", &overlays);
	format_bytes(bytes, a);
	format_bytes(overlays, b);
	cli_note(c, "%s: %s of disks and %s of overlays were looked at: %s", c->args[0], a, b,
		 clean ? "all fits" : "not all fits");
	notes(c, r);
	json_decref(r);
	return rc ? rc : found;
}
