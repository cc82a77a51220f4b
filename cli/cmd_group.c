/* The manager's operations, roles and settings of a group: protect, start, stop, checkpoint, failover, switchover,
 * failback, unprotect, diverged, resolve, discard, resync, wait, set, get. Each is one request; the daemon decides,
 * this prints.
 */
#include "cli/cli.h"

#include <string.h>

static int no_memory(const struct cli *c, json_t *args)
{
	json_decref(args);
	return cli_fail(c, ERR_NOMEM, "out of memory, or an argument is not valid UTF-8");
}

static bool put_flag(json_t *args, const char *key, bool on)
{
	return !on || json_object_set_new(args, key, json_true()) == 0;
}

static bool put_text(json_t *args, const char *key, const char *text)
{
	return !text || json_object_set_new(args, key, json_string(text)) == 0;
}

/* The --id options as {volume: id}. *ret NULL: none given. */
static int wire_ids(const struct cli *c, json_t **ret, struct err *e)
{
	json_t *ids = NULL;
	for (unsigned i = 0; i < c->n_given; i++) {
		if (strcmp(c->given[i].opt->name, "id") != 0)
			continue;
		const char *text = c->given[i].value, *eq = strchr(text, '=');
		char name[NAME_SIZE];
		uint64_t id;
		size_t len = eq ? (size_t)(eq - text) : 0;
		if (len == 0 || len >= sizeof(name) || !cli_parse_u64(eq + 1, 1, UINT32_MAX, &id)) {
			json_decref(ids);
			return err_set(e, ERR_USAGE, "--id takes VOLUME=ID with ID from 1 to %u, not '%.100s'",
				       UINT32_MAX, text);
		}
		memcpy(name, text, len);
		name[len] = '\0';
		if (!ids && !(ids = json_object()))
			return err_set(e, ERR_NOMEM, "out of memory");
		if (json_object_get(ids, name)) {
			json_decref(ids);
			return err_set(e, ERR_USAGE, "--id names the volume %s twice", name);
		}
		if (json_object_set_new(ids, name, json_integer((json_int_t)id)) != 0) {
			json_decref(ids);
			return err_set(e, ERR_USAGE, "--id %.100s: not valid UTF-8", text);
		}
	}
	*ret = ids;
	return 0;
}

int cmd_protect(struct cli *c)
{
	const char *peer = cli_value(c, "peer");
	struct err e = {0};
	json_t *ids = NULL;
	if (!peer)
		return cli_fail(c, ERR_USAGE, "the peer is missing; give it with --peer HOST:PORT");
	int rc = wire_ids(c, &ids, &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	bool wait = cli_has(c, "wait");
	json_t *args = json_pack("{s:s, s:s}", "name", c->args[0], "peer", peer);
	if (!args || !put_text(args, "protocol", cli_value(c, "protocol")) ||
	    !put_flag(args, "adopt", cli_has(c, "adopt")) || !put_flag(args, "hash", cli_has(c, "hash")) ||
	    !put_flag(args, "wait", wait)) {
		json_decref(ids);
		return no_memory(c, args);
	}
	if (ids && json_object_set_new(args, "ids", ids) != 0)
		return no_memory(c, args);
	json_t *r;
	rc = cli_call_print(c, "protect", args, true, &r);
	if (r && wait)
		cli_note(c, "%s: in sync with %s", c->args[0], js_str(r, "peer", peer));
	else if (r)
		cli_note(c, "%s: replicating to %s; repctl wait %s --for=in-sync waits for the initial sync",
			 c->args[0], js_str(r, "peer", peer), c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_start(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "start", cli_name_args(c->args[0]), true, &r);
	if (r)
		cli_note(c, "%s: started", c->args[0]);
	json_decref(r);
	return rc;
}

static void say_discarded(const json_t *r, const char *what)
{
	uint64_t bytes = 0;
	char text[FORMAT_SIZE];
	(void)js_u64(r, "discarded_bytes", &bytes);
	format_bytes(bytes, text);
	(void)printf("%s: %s%s written on the secondary side discarded\n", js_str(r, "group", "-"), what, text);
}

int cmd_stop(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "stop", cli_name_args(c->args[0]), true, &r);
	if (r)
		say_discarded(r, "stopped; ");
	json_decref(r);
	return rc;
}

int cmd_pause(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "pause", cli_name_args(c->args[0]), true, &r);
	if (r)
		cli_note(c, "%s: paused; what changes is tracked here until repctl resume %s", c->args[0], c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_resume(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "resume", cli_name_args(c->args[0]), true, &r);
	if (r)
		cli_note(c, "%s: resumed; repctl wait %s --for=in-sync waits until the peer has it all", c->args[0],
			 c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_discard(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "discard", cli_name_args(c->args[0]), false, &r);
	if (r)
		say_discarded(r, "");
	json_decref(r);
	return rc;
}

int cmd_checkpoint(struct cli *c)
{
	json_t *args = cli_name_args(c->args[0]), *r;
	if (!args || !put_flag(args, "keep", cli_has(c, "keep")) ||
	    (cli_has(c, "no-wait") && json_object_set_new(args, "wait", json_false()) != 0))
		return no_memory(c, args);
	int rc = cli_call_print(c, "checkpoint", args, false, &r);
	uint64_t number;
	if (r && js_u64(r, "checkpoint", &number))
		(void)printf("%llu\n", (unsigned long long)number);
	json_decref(r);
	return rc;
}

void failover_sentence(const json_t *result, char *buf, size_t size)
{
	uint64_t ckpt = 0, received = 0, bytes = 0;
	double age;
	char at[128], kept[128] = "", text[FORMAT_SIZE];
	(void)js_u64(result, "checkpoint", &ckpt);
	(void)js_u64(result, "received_checkpoint", &received);

	if (!ckpt || ckpt == received) {
		(void)snprintf(at, sizeof(at), "at all that was received");
		if (received)
			(void)snprintf(kept, sizeof(kept), ", which is checkpoint %llu", (unsigned long long)received);
	} else {
		(void)snprintf(at, sizeof(at), "at checkpoint %llu", (unsigned long long)ckpt);
		if (js_real(result, "age_s", &age)) {
			format_duration(age, text);
			(void)snprintf(at, sizeof(at), "at checkpoint %llu, %s old", (unsigned long long)ckpt, text);
		}
		if (received) {
			(void)snprintf(kept, sizeof(kept), "; all received is kept as checkpoint %llu",
				       (unsigned long long)received);
			if (js_u64(result, "received_bytes", &bytes)) {
				format_bytes(bytes, text);
				(void)snprintf(kept, sizeof(kept),
					       "; all received is kept as checkpoint %llu (%s more)",
					       (unsigned long long)received, text);
			}
		}
	}
	(void)snprintf(buf, size, "%s: %s%s", js_str(result, "group", "-"), at, kept);
}

int cmd_failover(struct cli *c)
{
	const char *to = cli_value(c, "to");
	uint64_t number = 0;
	bool latest = to && strcmp(to, "latest") == 0;
	if (to && !latest && !cli_parse_u64(to, 1, INT64_MAX, &number))
		return cli_fail(c, ERR_USAGE, "--to takes latest or the number of a checkpoint, not '%.100s'", to);
	if (!cli_confirm(c, "failover %s: this host's copy becomes the live disk, and the old primary is shut out.",
			 c->args[0]))
		return 1;
	json_t *args = cli_name_args(c->args[0]), *r;
	if (!args || !put_flag(args, "force", cli_has(c, "force")) ||
	    !put_flag(args, "discard_active", cli_has(c, "discard-active")) ||
	    !put_flag(args, "wait", cli_has(c, "wait")) ||
	    (latest && json_object_set_new(args, "to", json_string("latest")) != 0) ||
	    (number && json_object_set_new(args, "to", json_integer((json_int_t)number)) != 0))
		return no_memory(c, args);
	int rc = cli_call_print(c, "failover", args, false, &r);
	if (r) {
		char text[512];
		failover_sentence(r, text, sizeof(text));
		(void)printf("%s\n", text);
	}
	json_decref(r);
	return rc;
}

int cmd_switchover(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "switchover", cli_name_args(c->args[0]), true, &r);
	uint64_t number;
	if (r && js_u64(r, "checkpoint", &number))
		cli_note(c, "%s: the peer is primary now, this host its secondary; handed over at checkpoint %llu",
			 c->args[0], (unsigned long long)number);
	else if (r)
		cli_note(c, "%s: the peer is primary already, this host its secondary", c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_failback(struct cli *c)
{
	const char *peer = cli_value(c, "peer");
	if (!peer)
		return cli_fail(c, ERR_USAGE, "the old primary is missing; give it with --peer HOST:PORT");
	bool wait = cli_has(c, "wait");
	json_t *args = json_pack("{s:s, s:s}", "name", c->args[0], "peer", peer), *r;
	if (!args || !put_flag(args, "wait", wait))
		return no_memory(c, args);
	int rc = cli_call_print(c, "failback", args, true, &r);
	if (r && wait)
		cli_note(c, "%s: in sync with %s", c->args[0], js_str(r, "peer", peer));
	else if (r)
		cli_note(c, "%s: this host is primary now and replicates to %s; repctl wait %s --for=in-sync waits",
			 c->args[0], js_str(r, "peer", peer), c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_unprotect(struct cli *c)
{
	bool force = cli_has(c, "force");
	if (force &&
	    !cli_confirm(c,
			 "unprotect %s: a detached disk is taken as it is. What was written through the peer since "
			 "it was detached is not on it; if the peer still holds that, `failover` it there.",
			 c->args[0]))
		return 1;
	json_t *args = cli_name_args(c->args[0]), *r;
	if (!args || !put_flag(args, "force", force))
		return no_memory(c, args);
	int rc = cli_call_print(c, "unprotect", args, true, &r);
	if (r)
		cli_note(c, "%s: standalone; its checkpoints stay", c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_resolve(struct cli *c)
{
	const char *discard = cli_value(c, "discard");
	if (!discard)
		return cli_fail(c, ERR_USAGE,
				"whose copy is given up is missing: --discard local or --discard peer; repctl diverged "
				"%s shows what differs",
				c->args[0]);
	bool local = strcmp(discard, "local") == 0;
	if (!cli_confirm(c,
			 "resolve %s: %s copy is given up; its VM must not run any more. It stays as a pinned "
			 "checkpoint there.",
			 c->args[0], local ? "this host's" : "the peer's"))
		return 1;
	json_t *args = json_pack("{s:s, s:s}", "name", c->args[0], "discard", discard), *r;
	if (!args)
		return no_memory(c, args);
	int rc = cli_call_print(c, "resolve", args, true, &r);
	uint64_t kept;
	if (r && js_u64(r, "checkpoint", &kept))
		(void)printf("%s: this host's copy follows the peer's; what it held is checkpoint %llu\n",
			     js_str(r, "group", "-"), (unsigned long long)kept);
	else if (r)
		(void)printf("%s: %s\n", js_str(r, "group", "-"),
			     local ? "this host's copy follows the peer's"
				   : "the peer's copy follows this host's; what it held is a pinned checkpoint there");
	json_decref(r);
	return rc;
}

static void diverged_rows(struct table *t, const json_t *side, const char *who)
{
	size_t i, k;
	json_t *v, *x;
	json_array_foreach(json_object_get(side, "volumes"), i, v)
	{
		json_array_foreach(json_object_get(v, "extents"), k, x)
		{
			char off[FORMAT_SIZE] = "-", len[FORMAT_SIZE] = "-";
			uint64_t n;
			if (js_u64(x, "offset", &n))
				(void)snprintf(off, sizeof(off), "%llu", (unsigned long long)n);
			if (js_u64(x, "length", &n))
				(void)snprintf(len, sizeof(len), "%llu", (unsigned long long)n);
			const char *cells[] = {who, js_str(v, "name", NULL), off, len};
			table_row(t, cells);
		}
	}
}

static void diverged_sum(const json_t *side, const char *who)
{
	char text[FORMAT_SIZE];
	uint64_t bytes = 0;
	if (!json_is_object(side)) {
		(void)printf("  %s: not known: it has not been reached since this daemon's start\n", who);
		return;
	}
	(void)js_u64(side, "bytes", &bytes);
	format_bytes(bytes, text);
	(void)printf("  %s: %s", who, text);
	const char *since = js_str(side, "since", NULL);
	(void)printf("%s%s\n", since ? " since " : "", since ? since : "");
}

int cmd_diverged(struct cli *c)
{
	static const struct table_column columns[] = {
	    {"SIDE", TABLE_LEFT}, {"VOLUME", TABLE_LEFT}, {"OFFSET", TABLE_RIGHT}, {"LENGTH", TABLE_RIGHT}};
	json_t *r;
	int rc = cli_call_print(c, "diverged", cli_name_args(c->args[0]), false, &r);
	if (!r)
		return rc;
	const json_t *local = json_object_get(r, "local"), *peer = json_object_get(r, "peer");
	(void)printf("%s  %s\n", js_str(r, "group", c->args[0]),
		     js_bool(r, "split_brain") ? "split brain" : "no split brain");
	diverged_sum(local, "this host");
	diverged_sum(peer, "the peer");
	struct table *t = table_new(columns, 4, c->out.color);
	diverged_rows(t, local, "local");
	diverged_rows(t, peer, "peer");
	json_decref(r);
	return table_finish(t, stdout) < 0 ? cli_fail(c, ERR_NOMEM, "out of memory") : 0;
}

int cmd_resync(struct cli *c)
{
	bool wait = cli_has(c, "wait");
	json_t *args = json_pack("{s:s}", "name", c->args[0]), *r;
	if (!args || !put_flag(args, "wait", wait))
		return no_memory(c, args);
	int rc = cli_call_print(c, "resync", args, wait, &r);
	if (r && wait)
		cli_note(c, "%s: the local disk is whole again", c->args[0]);
	else if (r)
		cli_note(c,
			 "%s: rebuilding the local disk from the peer; repctl wait %s --for=in-sync waits for its end",
			 c->args[0], c->args[0]);
	json_decref(r);
	return rc;
}

int cmd_wait(struct cli *c)
{
	const char *what = cli_value(c, "for");
	json_t *args = json_pack("{s:s, s:s}", "name", c->args[0], "for", what ? what : "in-sync"), *r;
	if (!args)
		return no_memory(c, args);
	int rc = cli_call_print(c, "wait", args, true, &r);
	json_decref(r);
	return rc;
}

static void print_settings(const json_t *r)
{
	const char *key;
	json_t *v;
	json_object_foreach(json_object_get(r, "settings"), key, v)
	{
		if (json_is_string(v))
			(void)printf("%s=%s\n", key, json_string_value(v));
	}
}

int cmd_set(struct cli *c)
{
	json_t *settings = json_object(), *r;
	for (unsigned i = 1; i < c->n_args; i++) {
		const char *text = c->args[i], *eq = strchr(text, '=');
		char key[64];
		size_t len = eq ? (size_t)(eq - text) : 0;
		int rc = 0;
		if (len == 0 || len >= sizeof(key)) {
			rc = cli_fail(c, ERR_USAGE, "'%.100s' is not KEY=VALUE; repctl get %s shows keys and values",
				      text, c->args[0]);
		} else {
			memcpy(key, text, len);
			key[len] = '\0';
			if (json_object_get(settings, key))
				rc = cli_fail(c, ERR_USAGE, "%s is given twice", key);
			else if (json_object_set_new(settings, key, json_string(eq + 1)) != 0)
				rc = no_memory(c, NULL);
		}
		if (rc) {
			json_decref(settings);
			return rc;
		}
	}
	json_t *args = json_pack("{s:s, s:o}", "name", c->args[0], "settings", settings);
	if (!args)
		return no_memory(c, NULL);
	int rc = cli_call_print(c, "set", args, false, &r);
	if (r && c->verbose)
		print_settings(r);
	json_decref(r);
	return rc;
}

int cmd_get(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "get", cli_name_args(c->args[0]), false, &r);
	if (r)
		print_settings(r);
	json_decref(r);
	return rc;
}
