/* The verbs of the control socket (docs/control.md): arguments checked, the core or the store asked, answers as JSON.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/repl_shell.h"
#include "net/ctl.h"

#ifndef REPFS_VERSION
#define REPFS_VERSION "0"
#endif

#define TIMEOUT_MAX_MS UINT64_C(1000000000000) /* what is above means the same: never */

struct call {
	struct daemon *d;
	struct ctl_conn *ctl;
	const char *verb;
	const json_t *args;
	json_t **ret;
	struct err *e;
};

/* ---- arguments ---- */

static const char *arg_str(const struct call *c, const char *key)
{
	return json_string_value(json_object_get(c->args, key));
}

static bool arg_bool(const struct call *c, const char *key, bool def)
{
	const json_t *j = json_object_get(c->args, key);
	return j ? json_is_true(j) : def;
}

static uint64_t arg_u64(const struct call *c, const char *key, uint64_t def)
{
	const json_t *j = json_object_get(c->args, key);
	return json_is_integer(j) && json_integer_value(j) >= 0 ? (uint64_t)json_integer_value(j) : def;
}

/* timeout_ms as a deadline; 0: none. */
static uint64_t deadline(const struct call *c)
{
	uint64_t ms = min_u64(arg_u64(c, "timeout_ms", 0), TIMEOUT_MAX_MS);
	return ms ? clock_mono_ns() + ms * NS_PER_MS : 0;
}

static int need_name(const struct call *c, const char **ret)
{
	const char *name = arg_str(c, "name");
	if (name == NULL)
		return err_set(c->e, ERR_USAGE, "%s: a name is missing", c->verb);
	if (!store_name_valid(name))
		return err_set(c->e, ERR_USAGE,
			       "%s: %.80s is not a name: 1 to 63 of A-Z a-z 0-9 . _ -, the first a letter or digit",
			       c->verb, name);
	*ret = name;
	return 0;
}

static int need_group(const struct call *c, struct group **ret)
{
	const char *name;
	int err = need_name(c, &name);
	if (err)
		return err;
	*ret = daemon_group(c->d, name);
	if (*ret == NULL)
		return err_set(c->e, ERR_NOENT, "%s %s: no such volume or group; `list` shows them", c->verb, name);
	return 0;
}

static int need_volume(const struct call *c, struct gvol **ret, struct group **ret_group)
{
	const char *name;
	int err = need_name(c, &name);
	if (err)
		return err;
	struct gvol *v = gvol_find(c->d, name);
	struct group *g = v ? gvol_group(v) : NULL;
	if (g == NULL) {
		gvol_unref(v);
		return err_set(c->e, ERR_NOENT, "%s %s: no such volume; `list` shows them", c->verb, name);
	}
	*ret = v;
	*ret_group = g;
	return 0;
}

static json_t *result(const struct call *c, json_t *o)
{
	if (o == NULL)
		o = json_object();
	json_object_set_new(o, "schema", json_integer(1));
	*c->ret = o;
	return o;
}

/* Puts "VERB NAME: " before what the core said. */
static int prefixed(const struct call *c, const char *name, int err)
{
	if (err && c->e) {
		char text[ERR_TEXT_MAX];
		memcpy(text, c->e->text, sizeof(text));
		(void)err_set(c->e, -err, "%s %s: %.400s", c->verb, name, text);
	}
	return err;
}

/* ---- volumes ---- */

struct progress_arg {
	const struct call *c;
	uint64_t started, told;
};

static int verb_progress(void *arg, uint64_t done, uint64_t total)
{
	struct progress_arg *p = arg;
	uint64_t now = clock_mono_ns();
	if (p->c->ctl && ctl_canceled(p->c->ctl))
		return 1;
	if (p->c->ctl && (now - p->told > NS_PER_SEC / 5 || done == total)) {
		p->told = now;
		double s = (double)(now - p->started) / (double)NS_PER_SEC, rate = s > 0 ? (double)done / s : 0;
		(void)ctl_progress(p->c->ctl,
				   json_pack("{s:I, s:I, s:f, s:o}", "done", (json_int_t)done, "total",
					     (json_int_t)total, "rate", rate, "eta_s",
					     rate > 0 ? json_real((double)(total - done) / rate) : json_null()));
	}
	return 0;
}

/* A group whose record the store is about to change goes out of the daemon and comes back after. */
static int take_out(const struct call *c, const char *group)
{
	struct group *g = daemon_group_exact(c->d, group);
	if (g == NULL)
		return 0;
	mutex_lock(&g->lock);
	unsigned role = repl_meta(g->core)->role, state = repl_meta(g->core)->state;
	mutex_unlock(&g->lock);
	int err;
	if (role != ROLE_STANDALONE || state == STATE_FAILOVER || state == STATE_FAILOVER_FAILED)
		err = err_set(
		    c->e, ERR_STATE,
		    "group %s is %s in %s: its volumes can't be added or deleted; `stop` and `unprotect` it first",
		    group, role_name(role), state_name(state));
	else
		err = daemon_remove_group(c->d, g, c->e);
	group_unref(g);
	return err;
}

static int bring_back(const struct call *c, const char *group, struct err *e)
{
	struct repl_meta *m = NULL;
	int err = store_load_group(c->d->store, group, &m, e);
	if (err == -ERR_NOENT)
		return 0;
	if (!err)
		err = daemon_add_group(c->d, m, e);
	if (err)
		log_error(group,
			  "the group could not be taken up again, its volumes are not served; start repfs anew: %s",
			  e->text);
	free(m);
	return err;
}

struct import_arg {
	struct progress_arg p;
	const char *group;
	bool out; /* the group is out, admin held */
	int err;
	struct err why;
};

/* A copy may take hours: others do their work meanwhile. Once all is copied the record is next, and the group has to
 * be out for that. */
static int import_progress(void *arg, uint64_t done, uint64_t total)
{
	struct import_arg *a = arg;
	const struct call *c = a->p.c;
	int stop = verb_progress(&a->p, done, total);
	if (stop || done < total || a->out)
		return stop;
	mutex_lock(&c->d->admin);
	a->out = true;
	a->err = take_out(c, a->group);
	if (a->err)
		a->why = *c->e; /* the store will say that it was cancelled */
	return a->err;
}

static int do_store_import(const struct call *c, const char *name, const char *file, const char *group)
{
	struct import_arg a = {.p = {.c = c, .started = clock_mono_ns()}, .group = group};
	int err = store_import(c->d->store, name, file, arg_str(c, "format"), group, import_progress, &a, c->e);
	if (a.err) {
		err = a.err;
		*c->e = a.why;
	}
	if (!a.out)
		return err;
	struct err e2 = {0};
	int err2 = a.err ? 0 : bring_back(c, group, &e2);
	mutex_unlock(&c->d->admin);
	if (!err && err2) {
		err = err2;
		*c->e = e2;
	}
	return err;
}

static int do_store_create(const struct call *c, const char *name, uint64_t size, const char *group)
{
	mutex_lock(&c->d->admin);
	int err = take_out(c, group);
	if (!err) {
		err = store_create_volume(c->d->store, name, size, group, c->e);
		struct err e2 = {0};
		int err2 = bring_back(c, group, &e2);
		if (!err && err2) {
			err = err2;
			*c->e = e2;
		}
	}
	mutex_unlock(&c->d->admin);
	return err;
}

static int add_volume(const struct call *c, bool import)
{
	const char *name, *group = arg_str(c, "group"), *file = arg_str(c, "file");
	int err = need_name(c, &name);
	if (err)
		return err;
	group = group ? group : name;
	if (!store_name_valid(group))
		return err_set(c->e, ERR_USAGE, "%s %s: %.80s is not a group's name", c->verb, name, group);
	if (import && (file == NULL || file[0] != '/'))
		return err_set(c->e, ERR_USAGE, "%s %s: the file's absolute path is missing", c->verb, name);
	uint64_t size = arg_u64(c, "size", 0);
	if (!import && (err = store_check_size(size, c->e)) < 0)
		return prefixed(c, name, err);
	struct gvol *there = gvol_find(c->d, name);
	if (there) {
		gvol_unref(there);
		return err_set(c->e, ERR_EXIST, "%s %s: a volume of that name exists already", c->verb, name);
	}
	err = import ? do_store_import(c, name, file, group) : do_store_create(c, name, size, group);
	if (err)
		return prefixed(c, name, err);
	struct gvol *v = gvol_find(c->d, name);
	result(c, json_pack("{s:s, s:s, s:I}", "volume", name, "group", group, "size",
			    (json_int_t)(v ? gvol_size(v) : size)));
	if (import)
		json_object_set_new(*c->ret, "format", json_string("raw"));
	gvol_unref(v);
	return 0;
}

static int do_create(const struct call *c)
{
	return add_volume(c, false);
}

static int do_import(const struct call *c)
{
	return add_volume(c, true);
}

static int do_delete(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	mutex_lock(&c->d->admin);
	int err = need_volume(c, &v, &g);
	if (err) {
		mutex_unlock(&c->d->admin);
		return err;
	}
	char group[NAME_SIZE], name[NAME_SIZE];
	memcpy(group, g->name, sizeof(group));
	memcpy(name, v->name, sizeof(name));
	group_unref(g);
	gvol_unref(v);
	err = take_out(c, group);
	if (!err) {
		err = store_delete_volume(c->d->store, name, c->e);
		struct err e2 = {0};
		int err2 = bring_back(c, group, &e2);
		if (!err && err2) {
			err = err2;
			*c->e = e2;
		}
	}
	mutex_unlock(&c->d->admin);
	if (!err)
		result(c, json_pack("{s:s}", "volume", name));
	return prefixed(c, name, err);
}

static int do_export(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	const char *file = arg_str(c, "file");
	int err = need_volume(c, &v, &g);
	if (err)
		return err;
	struct gvol_handle *h = NULL; /* open, so that it is not deleted meanwhile */
	bool direct;
	if (file == NULL || file[0] != '/') {
		err = err_set(c->e, ERR_USAGE, "the file's absolute path is missing");
	} else if ((err = gvol_open(v, false, true, &h, &direct)) < 0) {
		(void)err_set(c->e, -err, "the volume could not be opened: %s", err_short(err));
	} else {
		struct progress_arg p = {.c = c, .started = clock_mono_ns()};
		uint64_t ckpt = arg_u64(c, "checkpoint", 0);
		enum volume_layer layer = LAYER_IMAGE;
		int serving = atomic_load(&g->serving);
		if (ckpt == 0 && serving == SERVING_EIO) {
			err = err_set(c->e, ERR_STATE,
				      "this host's copy can't be read in its state; name a checkpoint (%s@N)", v->name);
		} else if (ckpt == 0) {
			layer = serving == SERVING_VIEW ? LAYER_VIEW : LAYER_DISK;
			ckpt = serving == SERVING_VIEW ? atomic_load(&g->base) : 0;
		}
		struct gvol_attr a;
		if (!err && layer == LAYER_IMAGE && gvol_attr(v, GVOL_CKPT, ckpt, &a) < 0)
			err = err_set(c->e, ERR_NOENT, "it has no checkpoint %llu; see `checkpoints`",
				      (unsigned long long)ckpt);
		const char *gone =
		    "its local disk is detached and not current; export it on the peer, or `resync` first";
		bool disk = layer == LAYER_DISK;
		if (!err && disk && gvol_detached(v))
			err = err_set(c->e, ERR_STATE, "%s", gone);
		if (!err)
			err = volume_export(v->vol, layer, ckpt, file, verb_progress, &p, c->e);
		if (!err && disk && gvol_detached(v)) { /* while it was read */
			(void)unlink(file);
			err = err_set(c->e, ERR_STATE, "%s", gone);
		}
		if (!err)
			result(c, json_pack("{s:s, s:s, s:I}", "volume", v->name, "file", file, "size",
					    (json_int_t)volume_size(v->vol)));
	}
	gvol_release(h);
	err = prefixed(c, v->name, err);
	group_unref(g);
	gvol_unref(v);
	return err;
}

static json_t *volume_entry(struct group *g, uint32_t i, bool full)
{
	uint64_t allocated = 0;
	(void)volume_allocated(g->vols[i]->vol, LAYER_DISK, 0, &allocated);
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	json_t *j = json_pack("{s:s, s:s, s:I, s:I, s:s, s:s, s:I}", "name", m->volumes[i].name, "group", g->name,
			      "size", (json_int_t)m->volumes[i].size, "id", (json_int_t)m->volumes[i].id, "role",
			      role_name(m->role), "state", state_name(m->state), "allocated", (json_int_t)allocated);
	if (full) {
		char uuid[40], path[4096 + 128];
		const uint8_t *u = m->volumes[i].uuid;
		(void)snprintf(uuid, sizeof(uuid),
			       "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2],
			       u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
		json_object_set_new(j, "uuid", json_string(uuid));
		(void)snprintf(path, sizeof(path), "%s/volumes/%s", g->d->cfg.mount ? g->d->cfg.mount : "",
			       m->volumes[i].name);
		json_object_set_new(j, "path", g->d->cfg.mount ? json_string(path) : json_null());
		(void)snprintf(path, sizeof(path), "%s/volumes/%s/disk.raw", store_path(g->d->store),
			       m->volumes[i].name);
		json_object_set_new(j, "store_path", json_string(path));
		json_t *list = json_array();
		for (uint32_t k = 0; k < m->n_ckpts; k++)
			json_array_append_new(list, json_integer((json_int_t)m->ckpts[k].number));
		json_object_set_new(j, "checkpoints", list);
	}
	mutex_unlock(&g->lock);
	return j;
}

struct list_arg {
	struct daemon *d;
	char (*names)[NAME_SIZE];
	size_t n, max;
};

static void list_name(void *arg, const char *name, uint32_t id)
{
	struct list_arg *l = arg;
	(void)id;
	if (l->n < l->max)
		(void)snprintf(l->names[l->n++], NAME_SIZE, "%s", name);
}

static json_t *entry_by_name(struct daemon *d, const char *name, bool full)
{
	json_t *j = NULL;
	struct gvol *v = gvol_find(d, name);
	struct group *g = v ? gvol_group(v) : NULL;
	if (g)
		j = volume_entry(g, v->index, full);
	group_unref(g);
	gvol_unref(v);
	return j;
}

static int do_list(const struct call *c)
{
	struct list_arg l = {.d = c->d, .max = (size_t)STORE_GROUPS_MAX * GROUP_VOLUMES_MAX};
	l.names = calloc(l.max, sizeof(*l.names));
	if (l.names == NULL)
		return err_set(c->e, ERR_NOMEM, "list: out of memory");
	daemon_each_volume(c->d, list_name, &l);
	json_t *a = json_array();
	for (size_t i = 0; i < l.n; i++) {
		json_t *j = entry_by_name(c->d, l.names[i], false);
		if (j)
			json_array_append_new(a, j);
	}
	free(l.names);
	result(c, json_pack("{s:o}", "volumes", a));
	return 0;
}

static int do_show(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	int err = need_volume(c, &v, &g);
	if (err)
		return err;
	result(c, entry_by_name(c->d, v->name, true));
	group_unref(g);
	gvol_unref(v);
	return 0;
}

/* ---- replication ---- */

static int command(const struct call *c, struct group *g, struct shell_command *sc)
{
	if (sc == NULL)
		return err_set(c->e, ERR_NOMEM, "%s %s: out of memory", c->verb, g->name);
	return prefixed(c, g->name, group_command(g, sc, c->ctl, deadline(c), c->e));
}

enum wait_for { WAIT_RUNNING, WAIT_IN_SYNC, WAIT_DONE };

static bool wait_holds(struct group *g, enum wait_for what, struct err *e, int *ret_err)
{
	struct repl_status s;
	const struct repl_meta *m = repl_meta(g->core);
	repl_status(g->core, clock_mono_ns(), &s);
	*ret_err = 0;
	if (m->split_brain && what != WAIT_DONE)
		*ret_err = err_set(e, ERR_SPLIT,
				   "split brain: it will not get there by itself; see `diverged`, then `resolve`");
	switch (what) {
	case WAIT_RUNNING:
		return m->state == STATE_RUNNING;
	case WAIT_IN_SYNC:
		/* A secondary in its first sync has no view yet; in sync means that it can take over. */
		if (m->role == ROLE_STANDALONE)
			*ret_err = err_set(e, ERR_STATE, "it is standalone: it has no peer to be in sync with");
		if (m->role == ROLE_PRIMARY && repl_unsynced(g->core))
			*ret_err = err_set(e, ERR_STATE, "%s",
					   strcmp(s.error.operation, "resync") == 0 && s.error.code
					       ? s.error.text
					       : "a local disk is detached: it gets there by `resync` only, once the "
						 "disk accepts I/O again");
		return m->state == STATE_RUNNING && s.link == LINK_SYNCED && s.checkpoint != 0 && s.detached == 0;
	case WAIT_DONE:
		if (m->state == STATE_FAILOVER_FAILED)
			*ret_err = err_set(e, ERR_STATE, "the commit met an error: %s", s.error.text);
		return m->state == STATE_DONE;
	}
	return false;
}

static int wait_for(const struct call *c, struct group *g, enum wait_for what)
{
	uint64_t until = deadline(c), told = 0;
	for (;;) {
		struct err e = {0};
		int err = 0;
		mutex_lock(&g->lock);
		bool holds = wait_holds(g, what, &e, &err);
		if (!holds && !err && g->closing)
			err = atomic_load(&c->d->ending)
				  ? err_set(&e, ERR_CANCELED, "the daemon is shutting down")
				  : err_set(&e, ERR_CANCELED, "volumes were added to the group or deleted meanwhile");
		mutex_unlock(&g->lock);
		if (holds)
			return 0;
		if (err) {
			*c->e = e;
			return prefixed(c, g->name, err);
		}
		uint64_t now = clock_mono_ns();
		if (until && now >= until)
			return prefixed(c, g->name, err_set(c->e, ERR_TIMEOUT, "not there in the time given"));
		if (c->ctl && ctl_canceled(c->ctl))
			return prefixed(c, g->name,
					atomic_load(&c->d->ending)
					    ? err_set(c->e, ERR_CANCELED, "the daemon is shutting down")
					    : err_set(c->e, ERR_INTR, "interrupted"));
		if (c->ctl && now - told > NS_PER_SEC / 2) {
			struct repl_status s;
			told = now;
			mutex_lock(&g->lock);
			repl_status(g->core, now, &s);
			mutex_unlock(&g->lock);
			if (s.resync)
				(void)ctl_progress(
				    c->ctl,
				    json_pack("{s:I, s:I, s:I, s:o}", "done", (json_int_t)s.resync_done, "total",
					      (json_int_t)s.resync_total, "rate", (json_int_t)s.resync_rate, "eta_s",
					      s.resync_rate ? json_real((double)(s.resync_total - s.resync_done) /
									(double)s.resync_rate)
							    : json_null()));
			else if (s.commit)
				(void)ctl_progress(c->ctl, json_pack("{s:I, s:I}", "done", (json_int_t)s.commit_done,
								     "total", (json_int_t)s.commit_total));
		}
		mutex_lock(&g->lock);
		(void)cond_wait_until(&g->cond, &g->lock, now + 20 * NS_PER_MS);
		mutex_unlock(&g->lock);
	}
}

/* `ids`: the numbers that a hub assigns to the volumes, before the protection begins. The caller holds no reference of
 * the group, as taking it out waits for all others. */
static int set_ids(const struct call *c, const char *group)
{
	const json_t *ids = json_object_get(c->args, "ids");
	if (!json_is_object(ids) || json_object_size(ids) == 0)
		return 0;
	struct repl_meta *m = NULL;
	int err = take_out(c, group);
	if (err)
		return err;
	err = store_load_group(c->d->store, group, &m, c->e);
	const char *key;
	json_t *value;
	json_object_foreach((json_t *)ids, key, value)
	{
		if (err)
			break;
		int i = repl_meta_find_volume(m, key);
		json_int_t id = json_integer_value(value);
		if (i < 0)
			err = err_set(c->e, ERR_NOENT, "the group has no volume %s", key);
		else if (id < 1 || id > UINT32_MAX)
			err =
			    err_set(c->e, ERR_USAGE, "an id is a number from 1 to 4294967295, not %lld", (long long)id);
		else
			m->volumes[i].id = (uint32_t)id;
	}
	for (uint32_t i = 0; !err && i < m->n_volumes; i++)
		for (uint32_t k = 0; k < i; k++)
			if (m->volumes[i].id == m->volumes[k].id)
				err = err_set(c->e, ERR_USAGE, "two volumes would have the id %u", m->volumes[i].id);
	if (!err)
		err = store_save_group(c->d->store, m, c->e);
	free(m);
	struct err e2 = {0};
	int err2 = bring_back(c, group, &e2);
	if (!err && err2) {
		err = err2;
		*c->e = e2;
	}
	return err;
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
	/* Policies that come in a later release are refused, not accepted without effect. */
	const struct settings *n = &sc->c.settings;
	if (!err && (n->keep_minutely || n->keep_hourly || n->keep_daily || n->history_max_bytes))
		err = err_set(c->e, ERR_NOTSUP,
			      "keep_minutely, keep_hourly, keep_daily and history_max_bytes come in a later release; "
			      "keep_last is what there is");
	if (!err)
		err = group_command(g, sc, c->ctl, deadline(c), c->e);
	shell_command_unref(sc);
	return err;
}

/* --peer HOST:PORT, checked. The caller prefixes the error. */
static int need_peer(const struct call *c, const char **ret)
{
	const char *peer = arg_str(c, "peer");
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

/* Gives a command for which the peer is connected to, and waits for what follows if it was asked to. */
static int command_with_peer(const struct call *c, struct group *g, enum repl_cmd cmd, const char *peer, uint32_t flags)
{
	struct shell_command *sc = shell_command_new(cmd);
	if (sc) {
		(void)snprintf(sc->c.text, sizeof(sc->c.text), "%s", peer);
		sc->c.flags = flags;
	}
	int err = command(c, g, sc);
	shell_command_unref(sc);
	if (!err && arg_bool(c, "wait", false))
		err = wait_for(c, g, WAIT_IN_SYNC);
	if (!err)
		result(c, json_pack("{s:s, s:s}", "group", g->name, "peer", peer));
	return err;
}

static int do_protect(const struct call *c)
{
	struct group *g;
	const char *peer = NULL, *protocol = arg_str(c, "protocol");
	int err = need_group(c, &g);
	if (err)
		return err;
	err = prefixed(c, g->name, need_peer(c, &peer));
	if (!err && json_object_get(c->args, "ids")) {
		char group[NAME_SIZE];
		memcpy(group, g->name, sizeof(group));
		group_unref(g);
		mutex_lock(&c->d->admin);
		err = set_ids(c, group);
		mutex_unlock(&c->d->admin);
		if (err)
			return prefixed(c, arg_str(c, "name"), err);
		err = need_group(c, &g);
		if (err)
			return err;
	}
	if (!err && protocol) {
		mutex_lock(&g->lock);
		bool standalone = repl_meta(g->core)->role == ROLE_STANDALONE;
		mutex_unlock(&g->lock);
		json_t *map = json_pack("{s:s}", "protocol", protocol);
		err = standalone ? prefixed(c, g->name, change_settings(c, g, map)) : 0;
		json_decref(map);
	}
	if (!err)
		err = command_with_peer(c, g, CMD_PROTECT, peer,
					(arg_bool(c, "adopt", false) ? (uint32_t)WIRE_JOIN_ADOPT : 0U) |
					    (arg_bool(c, "hash", false) ? PROTECT_HASH : 0U));
	group_unref(g);
	return err;
}

static int do_failback(const struct call *c)
{
	struct group *g;
	const char *peer = NULL;
	int err = need_group(c, &g);
	if (err)
		return err;
	err = prefixed(c, g->name, need_peer(c, &peer));
	if (!err)
		err = command_with_peer(c, g, CMD_FAILBACK, peer, 0);
	group_unref(g);
	return err;
}

static int do_resolve(const struct call *c)
{
	struct group *g;
	const char *discard = arg_str(c, "discard");
	int err = need_group(c, &g);
	if (err)
		return err;
	bool local = discard && strcmp(discard, "local") == 0;
	if (!local && (discard == NULL || strcmp(discard, "peer") != 0)) {
		err = prefixed(c, g->name, err_set(c->e, ERR_USAGE, "--discard takes local or peer"));
		group_unref(g);
		return err;
	}
	struct shell_command *sc = shell_command_new(CMD_RESOLVE);
	if (sc)
		sc->c.number = local ? DISCARD_LOCAL : DISCARD_PEER;
	err = command(c, g, sc);
	if (!err)
		result(c, json_pack("{s:s, s:s, s:o}", "group", g->name, "discarded", discard, "checkpoint",
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

static int do_diverged(const struct call *c)
{
	struct group *g;
	struct repl_diverged d;
	int err = need_group(c, &g);
	if (err)
		return err;
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	repl_diverged(g->core, &d);
	json_t *local = diverged_side(g, false, d.since_ns);
	json_t *peer = d.peer_known ? diverged_side(g, true, d.peer_since_ns) : json_null();
	result(c, json_pack("{s:s, s:b, s:o, s:o}", "group", g->name, "split_brain", (int)m->split_brain, "local",
			    local, "peer", peer));
	mutex_unlock(&g->lock);
	group_unref(g);
	return 0;
}

static int simple(const struct call *c, enum repl_cmd cmd, uint32_t flags)
{
	struct group *g;
	int err = need_group(c, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(cmd);
	if (sc)
		sc->c.flags = flags;
	err = command(c, g, sc);
	if (!err) {
		result(c, json_pack("{s:s}", "group", g->name));
		if (cmd == CMD_STOP || cmd == CMD_DISCARD || cmd == CMD_UNPROTECT)
			json_object_set_new(*c->ret, "discarded_bytes", json_integer((json_int_t)sc->c.result2));
	}
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

static int do_start(const struct call *c)
{
	return simple(c, CMD_START, 0);
}

static int do_stop(const struct call *c)
{
	return simple(c, CMD_STOP, 0);
}

static int do_pause(const struct call *c)
{
	return simple(c, CMD_PAUSE, 0);
}

static int do_resume(const struct call *c)
{
	return simple(c, CMD_RESUME, 0);
}

static int do_unprotect(const struct call *c)
{
	return simple(c, CMD_UNPROTECT, arg_bool(c, "force", false) ? UNPROTECT_FORCE : 0);
}

static int do_discard(const struct call *c)
{
	return simple(c, CMD_DISCARD, 0);
}

static int do_resync(const struct call *c)
{
	int err = simple(c, CMD_RESYNC, 0);
	struct group *g = NULL;
	if (err || !arg_bool(c, "wait", false) || (err = need_group(c, &g)) < 0)
		return err;
	err = wait_for(c, g, WAIT_IN_SYNC);
	group_unref(g);
	return err;
}

static int do_checkpoint(const struct call *c)
{
	struct group *g;
	int err = need_group(c, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(CMD_CHECKPOINT);
	json_t *number = NULL;
	if (sc)
		sc->c.flags = arg_bool(c, "keep", false) ? WIRE_CKPT_PIN : 0;
	if (sc && !arg_bool(c, "wait", true)) {
		/* Asked for only: a refusal comes at once, the rest goes on. */
		err = group_command(g, sc, c->ctl, clock_mono_ns() + 1, c->e);
		err = err == -ERR_TIMEOUT ? 0 : prefixed(c, g->name, err);
	} else {
		err = command(c, g, sc);
		if (!err)
			number = json_integer((json_int_t)sc->c.result);
	}
	if (!err)
		result(c, json_pack("{s:s, s:o}", "group", g->name, "checkpoint", number ? number : json_null()));
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

static int do_failover(const struct call *c)
{
	struct group *g;
	int err = need_group(c, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(CMD_FAILOVER);
	if (sc == NULL)
		err = prefixed(c, g->name, err_set(c->e, ERR_NOMEM, "out of memory"));
	const json_t *to = json_object_get(c->args, "to");
	if (sc && to) {
		const char *text = json_string_value(to);
		if (text && strcmp(text, "latest") == 0)
			sc->c.number = FAILOVER_LATEST;
		else if (json_is_integer(to) && json_integer_value(to) > 0)
			sc->c.number = (uint64_t)json_integer_value(to);
		else
			err = prefixed(c, g->name,
				       err_set(c->e, ERR_USAGE, "--to takes `latest` or a checkpoint's number"));
	}
	if (sc && !err) {
		sc->c.flags = (arg_bool(c, "force", false) ? (uint32_t)FAILOVER_FORCE : 0U) |
			      (arg_bool(c, "discard_active", false) ? (uint32_t)FAILOVER_DISCARD_ACTIVE : 0U);
		err = command(c, g, sc);
	}
	if (sc && !err) {
		uint64_t now = clock_wall_ns(), t = sc->c.result_time_ns;
		result(c, json_pack("{s:s, s:o, s:o, s:o, s:I}", "group", g->name, "checkpoint",
				    sc->c.result ? json_integer((json_int_t)sc->c.result) : json_null(), "age_s",
				    t ? json_real((double)(now > t ? now - t : 0) / (double)NS_PER_SEC) : json_null(),
				    "received_checkpoint",
				    sc->c.result2 ? json_integer((json_int_t)sc->c.result2) : json_null(),
				    "received_bytes", (json_int_t)sc->c.result3));
		if (arg_bool(c, "wait", false))
			err = wait_for(c, g, WAIT_DONE);
	}
	shell_command_unref(sc);
	group_unref(g);
	return err;
}

static int do_error(const struct call *c)
{
	struct group *g;
	int err = need_group(c, &g);
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
		err =
		    prefixed(c, g->name, err_set(c->e, ERR_STATE, "replication was never started; `protect` it first"));
	} else {
		bool clean = !standing && (failed_over || strcmp(link, "SYNCED") == 0);
		json_t *reasons = json_incref(json_object_get(s, "reasons"));
		if (!clean && json_array_size(reasons) == 0)
			json_array_append_new(reasons, json_sprintf("not in sync: the link is %s", link));
		result(c, json_pack("{s:s, s:b, s:b, s:o, s:O}", "group", g->name, "clean", (int)clean, "split_brain",
				    (int)json_is_true(json_object_get(s, "split_brain")), "reasons", reasons, "error",
				    json_object_get(s, "error")));
	}
	json_decref(s);
	group_unref(g);
	return err;
}

static int do_status(const struct call *c)
{
	const char *name = arg_str(c, "name");
	json_t *j = daemon_status(c->d, name);
	if (j == NULL)
		return err_set(c->e, ERR_NOENT, "status %.80s: no such volume or group; `list` shows them", name);
	*c->ret = j;
	return 0;
}

static int do_wait(const struct call *c)
{
	static const char *const names[] = {"running", "in-sync", "done"};
	struct group *g;
	const char *what = arg_str(c, "for");
	int err = need_group(c, &g);
	if (err)
		return err;
	int i = 0;
	while (i < 3 && (what == NULL || strcmp(what, names[i]) != 0))
		i++;
	err = i < 3 ? wait_for(c, g, (enum wait_for)i)
		    : prefixed(c, g->name, err_set(c->e, ERR_USAGE, "--for takes running, in-sync or done"));
	if (!err)
		result(c, json_pack("{s:s}", "group", g->name));
	group_unref(g);
	return err;
}

/* ---- history ---- */

static int do_checkpoints(const struct call *c)
{
	struct group *g;
	int err = need_group(c, &g);
	if (err)
		return err;
	uint64_t drop = arg_u64(c, "drop", 0);
	if (drop) {
		struct shell_command *sc = shell_command_new(CMD_DROP);
		if (sc)
			sc->c.number = drop;
		err = command(c, g, sc);
		shell_command_unref(sc);
	}
	if (!err) {
		json_t *a = json_array();
		mutex_lock(&g->lock);
		const struct repl_meta *m = repl_meta(g->core);
		for (uint32_t i = 0; i < m->n_ckpts; i++) {
			char t[40], gen[20];
			clock_format(m->ckpts[i].time_ns, t, sizeof(t));
			(void)snprintf(gen, sizeof(gen), "%016llx", (unsigned long long)m->ckpts[i].generation);
			json_array_append_new(
			    a, json_pack("{s:I, s:s, s:b, s:s, s:s}", "number", (json_int_t)m->ckpts[i].number, "kind",
					 ckpt_kind_name(m->ckpts[i].kind), "pinned",
					 (m->ckpts[i].flags & CKPT_PINNED) != 0, "time", t, "generation", gen));
		}
		mutex_unlock(&g->lock);
		result(c, json_pack("{s:s, s:o}", "group", g->name, "checkpoints", a));
	}
	group_unref(g);
	return err;
}

struct runs_arg {
	json_t *a;
};

static void add_run(void *arg, uint64_t off, uint64_t len)
{
	struct runs_arg *r = arg;
	json_array_append_new(r->a, json_pack("{s:I, s:I}", "offset", (json_int_t)off, "length", (json_int_t)len));
}

static int do_extents(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	int err = need_volume(c, &v, &g);
	if (err)
		return err;
	const json_t *layer = json_object_get(c->args, "layer");
	const char *text = json_string_value(layer);
	uint64_t number = json_is_integer(layer) ? (uint64_t)json_integer_value(layer) : 0;
	uint64_t since = arg_u64(c, "since", 0), size = volume_size(v->vol);
	struct runs_arg r = {json_array()};
	enum gvol_file file = GVOL_CKPT;
	if (text && strcmp(text, "active") == 0)
		file = GVOL_ACTIVE;
	else if (text && strcmp(text, "hidden") == 0)
		file = GVOL_HIDDEN;
	else if (number == 0)
		err = err_set(c->e, ERR_USAGE, "extents takes overlays/NAME/active, overlays/NAME/hidden or NAME@N");
	if (!err && file == GVOL_CKPT) {
		struct gvol_attr a;
		if (gvol_attr(v, GVOL_CKPT, number, &a) < 0 || (since && gvol_attr(v, GVOL_CKPT, since, &a) < 0))
			err = err_set(c->e, ERR_NOENT, "no such checkpoint; see `checkpoints`");
		else if (since && since >= number)
			err = err_set(c->e, ERR_USAGE, "--since has to name an older checkpoint");
	}
	if (!err && since) {
		/* What changed from `since` to `number`: undo(since) up to the one before `number`. */
		uint64_t last = since;
		mutex_lock(&g->lock);
		const struct repl_meta *m = repl_meta(g->core);
		for (uint32_t i = 0; i < m->n_ckpts && m->ckpts[i].number < number; i++)
			last = m->ckpts[i].number;
		mutex_unlock(&g->lock);
		if ((err = volume_changed(v->vol, since, last, false, add_run, &r)) < 0)
			(void)err_set(c->e, -err, "the map could not be read: %s", err_short(err));
	}
	for (uint64_t off = 0; !err && !since && off < size;) {
		struct extent x;
		if ((err = gvol_extent(v, file, number, off, &x)) < 0) {
			(void)err_set(c->e, -err, "the map could not be read: %s", err_short(err));
			break;
		}
		size_t n = json_array_size(r.a);
		json_t *prev = x.data && n ? json_array_get(r.a, n - 1) : NULL;
		uint64_t end = x.off + x.len;
		if (prev && json_integer_value(json_object_get(prev, "offset")) +
				    json_integer_value(json_object_get(prev, "length")) ==
				(json_int_t)off)
			json_object_set_new(
			    prev, "length",
			    json_integer((json_int_t)end - json_integer_value(json_object_get(prev, "offset"))));
		else if (x.data)
			add_run(&r, off, end - off);
		off = end;
	}
	err = prefixed(c, v->name, err);
	if (!err)
		result(c, json_pack("{s:s, s:I, s:O}", "volume", v->name, "size", (json_int_t)size, "extents", r.a));
	json_decref(r.a);
	group_unref(g);
	gvol_unref(v);
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

static int do_set(const struct call *c)
{
	struct group *g;
	const json_t *map = json_object_get(c->args, "settings");
	int err = need_group(c, &g);
	if (err)
		return err;
	if (!json_is_object(map) || json_object_size(map) == 0)
		err = err_set(c->e, ERR_USAGE, "give one or more KEY=VALUE; `get` shows the keys");
	else
		err = change_settings(c, g, map);
	err = prefixed(c, g->name, err);
	if (!err)
		result(c, json_pack("{s:s, s:o}", "group", g->name, "settings", settings_json(g)));
	group_unref(g);
	return err;
}

static int do_get(const struct call *c)
{
	struct group *g;
	int err = need_group(c, &g);
	if (err)
		return err;
	result(c, json_pack("{s:s, s:o}", "group", g->name, "settings", settings_json(g)));
	group_unref(g);
	return 0;
}

/* ---- the daemon ---- */

static int do_ping(const struct call *c)
{
	result(c, json_pack("{s:i}", "pid", (int)getpid()));
	return 0;
}

static int do_version(const struct call *c)
{
	result(c, json_pack("{s:s, s:i, s:i}", "version", REPFS_VERSION, "protocol", WIRE_VERSION_MAX, "format",
			    REPL_META_VERSION));
	return 0;
}

static int do_shutdown(const struct call *c)
{
	result(c, NULL);
	if (c->d->cfg.hooks.shutdown)
		c->d->cfg.hooks.shutdown(c->d->cfg.hooks.arg);
	return 0;
}

int daemon_command(struct daemon *d, struct ctl_conn *ctl, const char *verb, const json_t *args, json_t **ret,
		   struct err *e)
{
	static const struct {
		const char *verb;
		int (*fn)(const struct call *c);
	} table[] = {
	    {"ping", do_ping},	       {"version", do_version},
	    {"create", do_create},     {"import", do_import},
	    {"export", do_export},     {"delete", do_delete},
	    {"list", do_list},	       {"show", do_show},
	    {"protect", do_protect},   {"start", do_start},
	    {"stop", do_stop},	       {"checkpoint", do_checkpoint},
	    {"failover", do_failover}, {"error", do_error},
	    {"status", do_status},     {"wait", do_wait},
	    {"discard", do_discard},   {"checkpoints", do_checkpoints},
	    {"extents", do_extents},   {"set", do_set},
	    {"get", do_get},	       {"shutdown", do_shutdown},
	    {"pause", do_pause},       {"resume", do_resume},
	    {"failback", do_failback}, {"unprotect", do_unprotect},
	    {"resolve", do_resolve},   {"diverged", do_diverged},
	    {"resync", do_resync},
	};
	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		if (strcmp(table[i].verb, verb) != 0)
			continue;
		struct call c = {d, ctl, verb, args, ret, e};
		return table[i].fn(&c);
	}
	return err_set(e, ERR_USAGE, "%.40s: the daemon knows no such verb", verb);
}
