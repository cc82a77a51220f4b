/* Verbs of a group: roles, replication, status, settings. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/os/clock.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"

/* `ids`: the numbers that a hub assigns to the volumes. */
static int ids_arg(const struct call *c, struct wire_start *x)
{
	const json_t *ids = json_object_get(c->args, "ids");
	const char *key;
	json_t *value;
	json_object_foreach((json_t *)ids, key, value)
	{
		json_int_t id = json_integer_value(value);
		struct wire_start_volume *v = &x->volumes[x->n_volumes];
		if (x->n_volumes == GROUP_VOLUMES_MAX || strlen(key) > NAME_MAX_LEN)
			return err_set(c->e, ERR_NOENT, "the group has no volume %.80s", key);
		if (id < 1 || id > UINT32_MAX)
			return err_set(c->e, ERR_USAGE, "an id is a number from 1 to 4294967295, not %lld",
				       (long long)id);
		(void)snprintf(v->name, sizeof(v->name), "%s", key);
		v->id = (uint32_t)id;
		x->n_volumes++;
	}
	return 0;
}

static int change_settings(const struct call *c, struct group *g, const json_t *map)
{
	struct shell_command *sc = shell_command_new(CMD_SETTINGS);
	if (sc == NULL)
		return err_set(c->e, ERR_NOMEM, "out of memory");
	mutex_lock(&g->lock);
	sc->c.settings = repl_meta(g->core)->settings;
	mutex_unlock(&g->lock);
	int err = 0;
	const char *key;
	json_t *value;
	json_object_foreach((json_t *)map, key, value)
	{
		const char *text = json_string_value(value);
		err = text ? settings_set(&sc->c.settings, key, text, c->e)
			   : err_set(c->e, ERR_USAGE, "%s: the value has to be a string", key);
		if (err)
			break;
		for (unsigned i = 0; i < SETTINGS_COUNT; i++) /* no others: they may change meanwhile */
			if (strcmp(settings_key(i), key) == 0)
				sc->c.number |= UINT64_C(1) << i;
	}
	if (!err)
		err = group_command(g, sc, c->ctl, verb_deadline(c), c->e);
	shell_command_unref(sc);
	return err;
}

/* --peer HOST:PORT, checked. The caller prefixes the error. */
static int need_peer(const struct call *c, const char **ret)
{
	const char *peer = verb_arg_str(c, "peer");
	char host[ADDR_SIZE], port[16];
	if (peer == NULL)
		return err_set(c->e, ERR_USAGE, "--peer HOST:PORT is missing");
	if (addr_split(peer, host, sizeof(host), port, sizeof(port), c->e) < 0 || strlen(peer) >= ADDR_SIZE)
		return -ERR_USAGE;
	if (!daemon_addr_allowed(c->d, peer, c->e))
		return -ERR_PERM;
	*ret = peer;
	return 0;
}

/* It replicates to the peer: waits for what follows if it was asked to. */
static int with_peer(const struct call *c, struct group *g, const char *peer)
{
	int err = verb_arg_bool(c, "wait", false) ? verb_wait_for(c, g, WAIT_IN_SYNC) : 0;
	if (!err)
		verb_result(c, json_pack("{s:s, s:s}", "group", g->name, "peer", peer));
	return err;
}

int verb_do_protect(const struct call *c)
{
	struct group *g;
	struct wire_start x = {.n_volumes = 0};
	const char *peer = NULL, *protocol = verb_arg_str(c, "protocol");
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	err = need_peer(c, &peer);
	if (!err)
		err = ids_arg(c, &x);
	if (!err && protocol) {
		mutex_lock(&g->lock);
		bool standalone = repl_meta(g->core)->role == ROLE_STANDALONE;
		mutex_unlock(&g->lock);
		json_t *map = json_pack("{s:s}", "protocol", protocol);
		err = standalone ? change_settings(c, g, map) : 0;
		json_decref(map);
	}
	if (!err) {
		(void)snprintf(x.peer, sizeof(x.peer), "%s", peer);
		err = hub_protect(g, &x,
				  (verb_arg_bool(c, "adopt", false) ? (uint32_t)WIRE_JOIN_ADOPT : 0U) |
				      (verb_arg_bool(c, "hash", false) ? PROTECT_HASH : 0U),
				  c->ctl, verb_deadline(c), c->e);
	}
	err = verb_prefixed(c, g->name, err);
	if (!err)
		err = with_peer(c, g, peer);
	group_unref(g);
	return err;
}

int verb_do_failback(const struct call *c)
{
	struct group *g;
	const char *peer = NULL;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	err = verb_prefixed(c, g->name, need_peer(c, &peer));
	struct shell_command *sc = err ? NULL : shell_command_new(CMD_FAILBACK);
	if (sc)
		(void)snprintf(sc->c.text, sizeof(sc->c.text), "%s", peer);
	if (!err)
		err = verb_command(c, g, sc);
	shell_command_unref(sc);
	if (!err)
		err = with_peer(c, g, peer);
	group_unref(g);
	return err;
}

int verb_do_switchover(const struct call *c)
{
	struct group *g;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(CMD_SWITCHOVER);
	err = verb_command(c, g, sc);
	if (!err)
		verb_result(c, json_pack("{s:s, s:o}", "group", g->name, "checkpoint",
					 sc->c.result ? json_integer((json_int_t)sc->c.result) : json_null()));
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

int verb_do_resolve(const struct call *c)
{
	struct group *g;
	const char *discard = verb_arg_str(c, "discard");
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	bool local = discard && strcmp(discard, "local") == 0;
	if (!local && (discard == NULL || strcmp(discard, "peer") != 0)) {
		err = verb_prefixed(c, g->name, err_set(c->e, ERR_USAGE, "--discard takes local or peer"));
		group_unref(g);
		return err;
	}
	struct shell_command *sc = shell_command_new(CMD_RESOLVE);
	if (sc)
		sc->c.number = local ? DISCARD_LOCAL : DISCARD_PEER;
	err = verb_command(c, g, sc);
	if (!err)
		verb_result(c, json_pack("{s:s, s:s, s:o}", "group", g->name, "discarded", discard, "checkpoint",
					 sc->c.result ? json_integer((json_int_t)sc->c.result) : json_null()));
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

static json_t *since_json(uint64_t ns)
{
	char t[40];
	if (ns == 0)
		return json_null();
	clock_format(ns, t, sizeof(t));
	return json_string(t);
}

/* One side's part: the runs of set bits of each volume. */
static json_t *diverged_side(struct group *g, bool peer, uint64_t since_ns)
{
	const struct repl_meta *m = repl_meta(g->core);
	json_t *volumes = json_array();
	uint64_t bytes = 0;
	for (uint32_t i = 0; i < m->n_volumes; i++) {
		const struct repl_volume_state *v = repl_volume_state(g->core, i);
		const struct bitmap *b = peer ? &v->theirs : &v->dirty;
		uint64_t size = m->volumes[i].size, sum = 0;
		json_t *extents = json_array();
		for (uint64_t at, end = 0; m->has_peer && bitmap_next_run(b, end, &at, &end);) {
			uint64_t off = at << REGION_SHIFT, len = min_u64(end << REGION_SHIFT, size) - off;
			json_array_append_new(
			    extents, json_pack("{s:I, s:I}", "offset", (json_int_t)off, "length", (json_int_t)len));
			sum += len;
		}
		bytes += sum;
		json_array_append_new(volumes, json_pack("{s:s, s:I, s:o}", "name", m->volumes[i].name, "bytes",
							 (json_int_t)sum, "extents", extents));
	}
	return json_pack("{s:I, s:o, s:o}", "bytes", (json_int_t)bytes, "since", since_json(since_ns), "volumes",
			 volumes);
}

int verb_do_diverged(const struct call *c)
{
	struct group *g;
	struct repl_diverged d;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	repl_diverged(g->core, &d);
	json_t *local = diverged_side(g, false, d.since_ns);
	json_t *peer = d.peer_known ? diverged_side(g, true, d.peer_since_ns) : json_null();
	verb_result(c, json_pack("{s:s, s:b, s:o, s:o}", "group", g->name, "split_brain", (int)m->split_brain, "local",
				 local, "peer", peer));
	mutex_unlock(&g->lock);
	group_unref(g);
	return 0;
}

static int simple(const struct call *c, enum repl_cmd cmd, uint32_t flags)
{
	struct group *g;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(cmd);
	if (sc)
		sc->c.flags = flags;
	err = verb_command(c, g, sc);
	if (!err) {
		verb_result(c, json_pack("{s:s}", "group", g->name));
		if (cmd == CMD_STOP || cmd == CMD_DISCARD || cmd == CMD_UNPROTECT)
			json_object_set_new(*c->ret, "discarded_bytes", json_integer((json_int_t)sc->c.result2));
	}
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

int verb_do_start(const struct call *c)
{
	return simple(c, CMD_START, 0);
}

int verb_do_stop(const struct call *c)
{
	return simple(c, CMD_STOP, 0);
}

int verb_do_pause(const struct call *c)
{
	return simple(c, CMD_PAUSE, 0);
}

int verb_do_resume(const struct call *c)
{
	return simple(c, CMD_RESUME, 0);
}

int verb_do_unprotect(const struct call *c)
{
	return simple(c, CMD_UNPROTECT, verb_arg_bool(c, "force", false) ? UNPROTECT_FORCE : 0);
}

int verb_do_discard(const struct call *c)
{
	return simple(c, CMD_DISCARD, 0);
}

int verb_do_resync(const struct call *c)
{
	int err = simple(c, CMD_RESYNC, 0);
	struct group *g = NULL;
	if (err || !verb_arg_bool(c, "wait", false) || (err = verb_need_group(c, &g)) < 0)
		return err;
	err = verb_wait_for(c, g, WAIT_IN_SYNC);
	group_unref(g);
	return err;
}

int verb_do_checkpoint(const struct call *c)
{
	struct group *g;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(CMD_CHECKPOINT);
	json_t *number = NULL;
	if (sc)
		sc->c.flags = verb_arg_bool(c, "keep", false) ? WIRE_CKPT_PIN : 0;
	if (sc && !verb_arg_bool(c, "wait", true)) {
		/* Asked for only: a refusal comes at once, the rest goes on. */
		err = group_command(g, sc, c->ctl, clock_mono_ns() + 1, c->e);
		err = err == -ERR_TIMEOUT ? 0 : verb_prefixed(c, g->name, err);
	} else {
		err = verb_command(c, g, sc);
		if (!err)
			number = json_integer((json_int_t)sc->c.result);
	}
	if (!err)
		verb_result(c, json_pack("{s:s, s:o}", "group", g->name, "checkpoint", number ? number : json_null()));
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

int verb_do_failover(const struct call *c)
{
	struct group *g;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(CMD_FAILOVER);
	if (sc == NULL)
		err = verb_prefixed(c, g->name, err_set(c->e, ERR_NOMEM, "out of memory"));
	const json_t *to = json_object_get(c->args, "to");
	if (sc && to) {
		const char *text = json_string_value(to);
		if (text && strcmp(text, "latest") == 0)
			sc->c.number = FAILOVER_LATEST;
		else if (json_is_integer(to) && json_integer_value(to) > 0)
			sc->c.number = (uint64_t)json_integer_value(to);
		else
			err = verb_prefixed(c, g->name,
					    err_set(c->e, ERR_USAGE, "--to takes `latest` or a checkpoint's number"));
	}
	if (sc && !err) {
		sc->c.flags = (verb_arg_bool(c, "force", false) ? (uint32_t)FAILOVER_FORCE : 0U) |
			      (verb_arg_bool(c, "discard_active", false) ? (uint32_t)FAILOVER_DISCARD_ACTIVE : 0U);
		err = verb_command(c, g, sc);
	}
	if (sc && !err) {
		uint64_t now = clock_wall_ns(), t = sc->c.result_time_ns;
		verb_result(c,
			    json_pack("{s:s, s:o, s:o, s:o, s:I}", "group", g->name, "checkpoint",
				      sc->c.result ? json_integer((json_int_t)sc->c.result) : json_null(), "age_s",
				      t ? json_real((double)(now > t ? now - t : 0) / (double)NS_PER_SEC) : json_null(),
				      "received_checkpoint",
				      sc->c.result2 ? json_integer((json_int_t)sc->c.result2) : json_null(),
				      "received_bytes", (json_int_t)sc->c.result3));
		if (verb_arg_bool(c, "wait", false))
			err = verb_wait_for(c, g, WAIT_DONE);
	}
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

int verb_do_error(const struct call *c)
{
	struct group *g;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	json_t *s = group_status_json(g);
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	bool never = m->role == ROLE_STANDALONE && !m->has_peer;
	bool before = m->state == STATE_NONE && m->role != ROLE_PRIMARY && !m->shut_out && !m->inconsistent;
	bool failed_over = m->role == ROLE_STANDALONE && m->state == STATE_DONE;
	mutex_unlock(&g->lock);
	const char *link = json_string_value(json_object_get(s, "link"));
	bool standing = !json_is_null(json_object_get(s, "error")) || json_is_true(json_object_get(s, "split_brain"));
	if (never || before) {
		err = verb_prefixed(c, g->name,
				    err_set(c->e, ERR_STATE, "replication was never started; `protect` it first"));
	} else {
		bool clean = !standing && (failed_over || strcmp(link, "SYNCED") == 0);
		json_t *reasons = json_incref(json_object_get(s, "reasons"));
		if (!clean && json_array_size(reasons) == 0)
			json_array_append_new(reasons, json_sprintf("not in sync: the link is %s", link));
		verb_result(c, json_pack("{s:s, s:b, s:b, s:o, s:O}", "group", g->name, "clean", (int)clean,
					 "split_brain", (int)json_is_true(json_object_get(s, "split_brain")), "reasons",
					 reasons, "error", json_object_get(s, "error")));
	}
	json_decref(s);
	group_unref(g);
	return err;
}

int verb_do_status(const struct call *c)
{
	const char *name = verb_arg_str(c, "name");
	json_t *j = daemon_status(c->d, name);
	if (j == NULL && verb_awaited(c, name))
		j = daemon_status(c->d, name);
	if (j == NULL)
		return verb_not_there(c, name, "volume or group");
	*c->ret = j;
	return 0;
}

int verb_do_wait(const struct call *c)
{
	static const char *const names[] = {"running", "in-sync", "done"};
	struct group *g;
	const char *what = verb_arg_str(c, "for");
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	int i = 0;
	while (i < 3 && (what == NULL || strcmp(what, names[i]) != 0))
		i++;
	err = i < 3 ? verb_wait_for(c, g, (enum wait_for)i)
		    : verb_prefixed(c, g->name, err_set(c->e, ERR_USAGE, "--for takes running, in-sync or done"));
	if (!err)
		verb_result(c, json_pack("{s:s}", "group", g->name));
	group_unref(g);
	return err;
}

/* ---- settings ---- */

static json_t *settings_json(struct group *g)
{
	json_t *o = json_object();
	mutex_lock(&g->lock);
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		char text[64];
		settings_format(&repl_meta(g->core)->settings, i, text, sizeof(text));
		json_object_set_new(o, settings_key(i), json_string(text));
	}
	mutex_unlock(&g->lock);
	return o;
}

int verb_do_set(const struct call *c)
{
	struct group *g;
	const json_t *map = json_object_get(c->args, "settings");
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	if (!json_is_object(map) || json_object_size(map) == 0)
		err = err_set(c->e, ERR_USAGE, "give one or more KEY=VALUE; `get` shows the keys");
	else
		err = change_settings(c, g, map);
	err = verb_prefixed(c, g->name, err);
	if (!err)
		verb_result(c, json_pack("{s:s, s:o}", "group", g->name, "settings", settings_json(g)));
	group_unref(g);
	return err;
}

int verb_do_get(const struct call *c)
{
	struct group *g;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	verb_result(c, json_pack("{s:s, s:o}", "group", g->name, "settings", settings_json(g)));
	group_unref(g);
	return 0;
}
