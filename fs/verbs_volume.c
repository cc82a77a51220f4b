/* Verbs of volumes: made, imported, deleted, exported, listed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/bytes.h"
#include "core/os/clock.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"
#include "image/based.h"
#include "image/apply.h"

struct import_arg {
	struct verb_progress p;
	const char *group;
	bool out; /* the group is out, admin held */
	int err;
	struct err why;
};

/* A copy may take hours: others do their work meanwhile. Once all is copied the record is next, and the group has to
 * be out for that. */
static int import_progress(void *arg, uint64_t done, uint64_t total) NO_THREAD_ANALYSIS
{
	struct import_arg *a = arg;
	const struct call *c = a->p.c;
	int stop = verb_progress(&a->p, done, total);
	if (stop || done < total || a->out)
		return stop;
	mutex_lock(&c->d->admin);
	a->out = true;
	a->err = verb_take_out(c, a->group);
	if (a->err)
		a->why = *c->e; /* the store will say that it was cancelled */
	return a->err;
}

static int do_store_import(const struct call *c, const char *name, const char *file, const char *group,
			   const char **ret_format) NO_THREAD_ANALYSIS
{
	struct import_arg a = {.p = {.c = c, .started = clock_mono_ns()}, .group = group};
	struct store_import_args args = {.volume = name,
					 .file = file,
					 .format = verb_arg_str(c, "format"),
					 .backing_dir = verb_arg_str(c, "backing_dir"),
					 .group = group};
	int err = store_import(c->d->store, &args, import_progress, &a, ret_format, c->e);
	if (a.err) {
		err = a.err;
		*c->e = a.why;
	}
	if (!a.out)
		return err;
	struct err e2 = {0};
	int err2 = a.err ? 0 : verb_bring_back(c, group, &e2);
	mutex_unlock(&c->d->admin);
	if (!err && err2) {
		err = err2;
		*c->e = e2;
	}
	return err;
}

/* base NULL: a sparse disk. */
static int do_store_create(const struct call *c, const char *name, uint64_t size, const char *group, const char *base,
			   const char **ret_format)
{
	const struct store_base_args over = {
	    .volume = name, .file = base, .backing_dir = verb_arg_str(c, "backing_dir"), .group = group};
	mutex_lock(&c->d->admin);
	int err = verb_take_out(c, group);
	if (!err) {
		err = base ? store_create_over(c->d->store, &over, size, &size, ret_format, c->e)
			   : store_create_volume(c->d->store, name, size, group, c->e);
		struct err e2 = {0};
		int err2 = verb_bring_back(c, group, &e2);
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
	const char *name, *group = verb_arg_str(c, "group"), *file = verb_arg_str(c, "file");
	const char *dir = verb_arg_str(c, "backing_dir"), *base = import ? NULL : verb_arg_str(c, "base"),
		   *format = NULL;
	int err = verb_need_name(c, &name);
	if (err)
		return err;
	group = group ? group : name;
	if (!store_name_valid(group))
		return err_set(c->e, ERR_USAGE, "%s %s: %.80s is not a group's name", c->verb, name, group);
	if (import && (file == NULL || file[0] != '/'))
		return err_set(c->e, ERR_USAGE, "%s %s: the file's absolute path is missing", c->verb, name);
	if (dir && dir[0] != '/')
		return err_set(c->e, ERR_USAGE, "%s %s: backing_dir is not an absolute path", c->verb, name);
	if (base && base[0] != '/')
		return err_set(c->e, ERR_USAGE, "%s %s: the base's absolute path is missing", c->verb, name);
	size_t n = c->d->cfg.mount ? strlen(c->d->cfg.mount) : 0;
	if (base && n > 0 && strncmp(base, c->d->cfg.mount, n) == 0 && (base[n] == '/' || base[n] == '\0'))
		return err_set(
		    c->e, ERR_USAGE,
		    "%s %s: %.200s lies in this daemon's own mount, where it is not before the volume is open; "
		    "give an image elsewhere",
		    c->verb, name, base);
	uint64_t size = verb_arg_u64(c, "size", 0);
	if (!import && !(base && size == 0) && (err = store_check_size(size, c->e)) < 0)
		return verb_prefixed(c, name, err);
	struct gvol *there = gvol_find(c->d, name);
	if (there) {
		gvol_unref(there);
		return err_set(c->e, ERR_EXIST, "%s %s: a volume of that name exists already", c->verb, name);
	}
	err = import ? do_store_import(c, name, file, group, &format)
		     : do_store_create(c, name, size, group, base, &format);
	if (err)
		return verb_prefixed(c, name, err);
	struct gvol *v = gvol_find(c->d, name);
	verb_result(c, json_pack("{s:s, s:s, s:I}", "volume", name, "group", group, "size",
				 (json_int_t)(v ? gvol_size(v) : size)));
	if (format)
		json_object_set_new(*c->ret, "format", json_string(format));
	if (base)
		json_object_set_new(*c->ret, "base", json_string(base));
	gvol_unref(v);
	return 0;
}

int verb_do_create(const struct call *c)
{
	return add_volume(c, false);
}

struct apply_to {
	struct gvol *v;
	struct gvol_handle *h; /* open, so that it is not deleted meanwhile, nor written to as another's secondary */
};

/* A guest's writes: they are recorded, forwarded and saved as any. */
static int apply_write(void *arg, uint64_t off, uint64_t len, const void *buf)
{
	const struct apply_to *to = arg;
	return buf ? gvol_write(to->v, to->h, off, len, buf) : gvol_zero(to->v, to->h, off, len, true);
}

static int apply(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	const char *file = verb_arg_str(c, "file");
	struct extentlist_head head = {0};
	int err = verb_need_volume(c, &v, &g);
	if (err == -ERR_NOENT)
		return err_set(c->e, ERR_NOENT,
			       "%s %s: there is no such volume to apply it to; restore its base first, without --apply",
			       c->verb, verb_arg_str(c, "name"));
	if (err)
		return err;
	struct apply_to to = {.v = v};
	bool direct;
	if (file == NULL || file[0] != '/')
		err = err_set(c->e, ERR_USAGE, "the file's absolute path is missing");
	else if (verb_arg_str(c, "group") || verb_arg_str(c, "format") || verb_arg_str(c, "backing_dir"))
		err = err_set(c->e, ERR_USAGE, "--apply goes with no other option of import");
	else if ((err = gvol_open(v, true, true, &to.h, &direct)) < 0)
		(void)err_set(c->e, -err, "the volume could not be opened: %s", err_short(err));
	else if (atomic_load(&g->serving) != SERVING_DISK) /* from here on its handle tells */
		err = err_set(c->e, ERR_STATE, "this host does not serve its disk; apply it on the primary");
	else if (atomic_load(&v->opens) > 1)
		err = err_set(c->e, ERR_BUSY, "it is open, by a guest or a job; close it first");
	if (!err) {
		struct verb_progress p = {.c = c, .started = clock_mono_ns()};
		err = apply_backup(file, volume_size(v->vol), apply_write, &to, verb_progress, &p, &head, c->e);
		int flushed = err ? 0 : gvol_flush(v, to.h);
		if (flushed < 0)
			err = err_set(c->e, -flushed, "flushing it: %s", err_short(flushed));
	}
	if (!err)
		verb_result(c, json_pack("{s:s, s:s, s:I, s:s, s:I, s:I, s:I}", "volume", v->name, "group", g->name,
					 "size", (json_int_t)volume_size(v->vol), "format", head.target, "applied",
					 (json_int_t)head.bytes, "since", (json_int_t)head.since, "checkpoint",
					 (json_int_t)head.checkpoint));
	gvol_release(to.h);
	err = verb_prefixed(c, v->name, err);
	group_unref(g);
	gvol_unref(v);
	return err;
}

int verb_do_import(const struct call *c)
{
	return verb_arg_bool(c, "apply", false) ? apply(c) : add_volume(c, true);
}

int verb_do_delete(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	char group[NAME_SIZE], name[NAME_SIZE], why[ERR_TEXT_MAX];
	const char *asked = verb_arg_str(c, "name");
	mutex_lock(&c->d->admin);
	int err = verb_need_volume(c, &v, &g);
	/* One that is not served for want of its base goes as well: nothing is open. */
	bool unserved = err == -ERR_STATE && asked && daemon_unserved(c->d, asked, why, group);
	if (err && !unserved) {
		mutex_unlock(&c->d->admin);
		return err;
	}
	if (unserved) {
		(void)snprintf(name, sizeof(name), "%s", asked);
		err = 0;
	} else {
		memcpy(group, g->name, sizeof(group));
		memcpy(name, v->name, sizeof(name));
		group_unref(g);
		gvol_unref(v);
		err = verb_take_out(c, group);
	}
	if (!err) {
		if (unserved)
			daemon_unserved_remove(c->d, group);
		err = store_delete_volume(c->d->store, name, c->e);
		struct err e2 = {0};
		int err2 = verb_bring_back(c, group, &e2);
		if (!err && err2 && !unserved) { /* its other volumes are as little served as before */
			err = err2;
			*c->e = e2;
		}
	}
	mutex_unlock(&c->d->admin);
	if (!err)
		verb_result(c, json_pack("{s:s}", "volume", name));
	return verb_prefixed(c, name, err);
}

/* What is read stays while it is read: no retention takes it, and a `drop` is refused. */
static int export_held(const struct call *c, struct group *g, struct gvol *v, enum volume_layer layer, uint64_t ckpt,
		       uint64_t size, const char *file)
{
	static _Atomic unsigned exports;
	struct verb_progress p = {.c = c, .started = clock_mono_ns()};
	char who[HOLDER_SIZE];
	struct err e = {0};
	(void)snprintf(who, sizeof(who), "export %u of %s", atomic_fetch_add(&exports, 1) + 1, v->name);
	int err = ckpt ? group_hold(g, CMD_HOLD, ckpt, who, NULL, c->e) : 0;
	if (err)
		return err;
	err = volume_export(v->vol, layer, ckpt, size, file, verb_progress, &p, c->e);
	if (ckpt)
		(void)group_hold(g, CMD_UNHOLD, ckpt, who, NULL, &e);
	return err;
}

int verb_do_export(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	const char *file = verb_arg_str(c, "file");
	int err = verb_need_volume(c, &v, &g);
	if (err)
		return err;
	struct gvol_handle *h = NULL; /* open, so that it is not deleted meanwhile */
	bool direct;
	if (file == NULL || file[0] != '/') {
		err = err_set(c->e, ERR_USAGE, "the file's absolute path is missing");
	} else if ((err = gvol_open(v, false, true, &h, &direct)) < 0) {
		(void)err_set(c->e, -err, "the volume could not be opened: %s", err_short(err));
	} else {
		uint64_t ckpt = verb_arg_u64(c, "checkpoint", 0);
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
		uint64_t size = layer == LAYER_IMAGE ? gvol_size_at(g, v, ckpt) : volume_size(v->vol);
		if (!err && layer == LAYER_IMAGE && gvol_attr(v, GVOL_CKPT, ckpt, &a) < 0)
			err = err_set(c->e, ERR_NOENT, "it has no checkpoint %llu; see `checkpoints`",
				      (unsigned long long)ckpt);
		const char *gone =
		    "its local disk is detached and not current; export it on the peer, or `resync` first";
		bool disk = layer == LAYER_DISK;
		if (!err && disk && gvol_detached(v))
			err = err_set(c->e, ERR_STATE, "%s", gone);
		if (!err)
			err = export_held(c, g, v, layer, ckpt, size, file);
		bool lost = disk && gvol_detached(v), stale = disk && gvol_stale(h);
		if (!err && (lost || stale)) { /* while it was read */
			(void)unlink(file);
			err = err_set(c->e, ERR_STATE, "%s",
				      lost ? gone
					   : "this host became the secondary while it was read, what came of it is no "
					     "point in time; export it on the primary, or a checkpoint");
		}
		if (!err)
			verb_result(
			    c, json_pack("{s:s, s:s, s:I}", "volume", v->name, "file", file, "size", (json_int_t)size));
	}
	gvol_release(h);
	err = verb_prefixed(c, v->name, err);
	group_unref(g);
	gvol_unref(v);
	return err;
}

static json_t *volume_entry(struct group *g, uint32_t i, bool full)
{
	uint64_t allocated = 0;
	const char *format, *base = volume_base(g->vols[i]->vol, &format);
	if (base) /* what the base takes is nobody's here */
		(void)based_own_allocated(store_storage(g->d->store), g->vols[i]->name, &allocated);
	else
		(void)volume_allocated(g->vols[i]->vol, LAYER_DISK, 0, &allocated);
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	json_t *j =
	    json_pack("{s:s, s:s, s:I, s:I, s:s, s:s, s:I, s:s?}", "name", m->volumes[i].name, "group", g->name, "size",
		      (json_int_t)m->volumes[i].size, "id", (json_int_t)m->volumes[i].id, "role", role_name(m->role),
		      "state", state_name(m->state), "allocated", (json_int_t)allocated, "base", base);
	if (full) {
		char uuid[UUID_TEXT_SIZE], path[4096 + 128];
		uuid_format(m->volumes[i].uuid, uuid);
		json_object_set_new(j, "uuid", json_string(uuid));
		json_object_set_new(j, "base_format", base ? json_string(format) : json_null());
		(void)snprintf(path, sizeof(path), "%s/volumes/%s", g->d->cfg.mount ? g->d->cfg.mount : "",
			       m->volumes[i].name);
		json_object_set_new(j, "path", g->d->cfg.mount ? json_string(path) : json_null());
		(void)snprintf(path, sizeof(path), "%s/volumes/%s/%s", store_path(g->d->store), m->volumes[i].name,
			       base ? "own.data" : "disk.raw");
		json_object_set_new(j, "store_path", json_string(path));
		json_t *list = json_array();
		for (uint32_t k = 0; k < m->n_ckpts; k++)
			if (repl_shows_ckpt(g->core, k))
				json_array_append_new(list, json_integer((json_int_t)m->ckpts[k].number));
		json_object_set_new(j, "checkpoints", list);
		uint64_t numbers[CHANGED_EPOCHS_MAX];
		uint32_t n = changed_numbers(g->exec.changed[i], numbers, CHANGED_EPOCHS_MAX);
		list = json_array();
		for (uint32_t k = 0; k < n; k++)
			json_array_append_new(list, json_integer((json_int_t)numbers[k]));
		json_object_set_new(j, "changed_since", list);
	}
	mutex_unlock(&g->lock);
	if (full)
		json_object_set_new(j, "clones", group_clones_json(g, g->vols[i]->name));
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

static json_t *entry_by_name(struct daemon *d, const char *name)
{
	json_t *j = NULL;
	struct gvol *v = gvol_find(d, name);
	struct group *g = v ? gvol_group(v) : NULL;
	if (g)
		j = volume_entry(g, v->index, false);
	group_unref(g);
	gvol_unref(v);
	return j;
}

int verb_do_list(const struct call *c)
{
	struct list_arg l = {.d = c->d, .max = (size_t)STORE_GROUPS_MAX * GROUP_VOLUMES_MAX};
	l.names = calloc(l.max, sizeof(*l.names));
	if (l.names == NULL)
		return err_set(c->e, ERR_NOMEM, "list: out of memory");
	daemon_each_volume(c->d, list_name, &l);
	json_t *a = json_array();
	for (size_t i = 0; i < l.n; i++) {
		json_t *j = entry_by_name(c->d, l.names[i]);
		if (j)
			json_array_append_new(a, j);
	}
	json_t *clones = json_array();
	l.n = 0;
	daemon_each_group(c->d, list_name, &l);
	for (size_t i = 0; i < l.n; i++) {
		struct group *g = daemon_group_exact(c->d, l.names[i]);
		json_t *some = g ? group_clones_json(g, NULL) : NULL;
		json_array_extend(clones, some);
		json_decref(some);
		group_unref(g);
	}
	free(l.names);
	verb_result(
	    c, json_pack("{s:o, s:o, s:o}", "volumes", a, "clones", clones, "unserved", daemon_unserved_json(c->d)));
	return 0;
}

int verb_do_show(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	int err = verb_need_volume(c, &v, &g);
	if (err)
		return err;
	verb_result(c, volume_entry(g, v->index, true));
	group_unref(g);
	gvol_unref(v);
	return 0;
}

int verb_do_resize(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	uint64_t size = verb_arg_u64(c, "size", 0);
	int err = verb_need_volume(c, &v, &g);
	if (err)
		return err;
	struct shell_command *sc = shell_command_new(CMD_RESIZE);
	if (sc) {
		sc->c.flags = v->index;
		sc->c.number = size;
	}
	err = verb_prefixed(c, v->name, store_check_size(size, c->e));
	if (!err)
		err = verb_command(c, g, sc);
	if (!err)
		verb_result(c, json_pack("{s:s, s:s, s:I, s:I}", "volume", v->name, "group", g->name, "size",
					 (json_int_t)volume_size(v->vol), "old_size", (json_int_t)sc->c.result));
	shell_command_unref(sc);
	group_unref(g);
	gvol_unref(v);
	return err;
}
