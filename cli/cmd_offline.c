/* The volume verbs on a store that no daemon uses. They give the documents that the daemon gives (docs/control.md);
 * what only a running daemon knows is null.
 */
#include "cli/cli.h"

#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "image/based.h"
#include "image/apply.h"

static int fail_err(const struct cli *c, int rc, const struct err *e)
{
	/* That a volume was looked for is not what was asked. */
	const char *text = e->text[0] ? e->text : err_short(rc), *behind;
	if (strncmp(text, "find ", 5) == 0 && (behind = strstr(text, ": ")) != NULL)
		text = behind + 2;
	return cli_fail_text(c, cli_interrupted() ? 128 + cli_interrupted() : err_exit(rc), text);
}

static int made(const struct cli *c, json_t *doc, json_t **ret)
{
	if (!doc)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	*ret = doc;
	return 0;
}

int offline_create(struct cli *c, struct store *st, const char *name, uint64_t size, const char *group, json_t **ret)
{
	struct err e = {0};
	cli_defer_signals(true);
	int rc = store_create_volume(st, name, size, group ? group : name, &e);
	store_close(st);
	cli_defer_signals(false);
	if (rc < 0)
		return fail_err(c, rc, &e);
	return made(c,
		    json_pack("{s:i, s:s, s:s, s:I}", "schema", 1, "volume", name, "group", group ? group : name,
			      "size", (json_int_t)size),
		    ret);
}

int offline_create_over(struct cli *c, struct store *st, const struct store_base_args *args, uint64_t size,
			json_t **ret)
{
	const char *format = NULL, *group = args->group ? args->group : args->volume;
	struct err e = {0};
	cli_defer_signals(true);
	int rc = store_create_over(st, args, size, &size, &format, &e);
	store_close(st);
	cli_defer_signals(false);
	if (rc < 0)
		return fail_err(c, rc, &e);
	return made(c,
		    json_pack("{s:i, s:s, s:s, s:I, s:s, s:s}", "schema", 1, "volume", args->volume, "group", group,
			      "size", (json_int_t)size, "format", format, "base", args->file),
		    ret);
}

static int on_copy(void *arg, uint64_t done, uint64_t total)
{
	progress_step(arg, done, total);
	return cli_interrupted();
}

int offline_import(struct cli *c, struct store *st, const struct store_import_args *args, json_t **ret)
{
	const char *name = args->volume, *format = NULL;
	struct err e = {0};
	struct progress p;
	_cleanup_free_ struct repl_meta *m = NULL;
	uint32_t i = 0;
	char label[128];
	int rc;

	(void)snprintf(label, sizeof(label), "import %.70s", name);
	progress_init(&p, c->out.progress, stderr, label);
	cli_defer_signals(true);
	rc = store_import(st, args, on_copy, &p, &format, &e);
	progress_end(&p);
	if (rc == 0)
		rc = store_find_volume(st, name, &m, &i, &e);
	store_close(st);
	cli_defer_signals(false);
	if (rc < 0)
		return fail_err(c, rc, &e);
	POST(m != NULL);
	return made(c,
		    json_pack("{s:i, s:s, s:s, s:I, s:s}", "schema", 1, "volume", name, "group", m->group, "size",
			      (json_int_t)m->volumes[i].size, "format", format),
		    ret);
}

int offline_apply(struct cli *c, struct store *st, const char *name, const char *file, json_t **ret)
{
	struct extentlist_head head = {0};
	struct err e = {0};
	struct progress p;
	char label[128];

	(void)snprintf(label, sizeof(label), "import %.70s", name);
	progress_init(&p, c->out.progress, stderr, label);
	cli_defer_signals(true);
	int rc = store_apply(st, name, file, on_copy, &p, &head, &e);
	progress_end(&p);
	store_close(st);
	cli_defer_signals(false);
	if (rc < 0)
		return fail_err(c, rc, &e);
	return made(c,
		    json_pack("{s:i, s:s, s:I, s:s, s:I, s:I, s:I}", "schema", 1, "volume", name, "size",
			      (json_int_t)head.size, "format", head.target, "applied", (json_int_t)head.bytes, "since",
			      (json_int_t)head.since, "checkpoint", (json_int_t)head.checkpoint),
		    ret);
}

/* What the volume's file in the mount would show (SPEC 5). */
static int plain_layer(const struct repl_meta *m, enum volume_layer *layer, uint64_t *ckpt, struct err *e)
{
	bool view = m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED ||
		    (m->state == STATE_RUNNING && m->role == ROLE_SECONDARY);
	if (m->inconsistent || (m->state == STATE_NONE && m->role == ROLE_SECONDARY))
		return err_set(e, ERR_STATE,
			       "this host's copy is not a whole disk yet (%s, %s); export a checkpoint with NAME@N, or "
			       "on the peer",
			       role_name(m->role), state_name(m->state));
	if (view && m->broken)
		return err_set(e, ERR_STATE,
			       "no checkpoint is valid, so there is no image to export; let the group sync first");
	*layer = view ? LAYER_VIEW : LAYER_DISK;
	*ckpt = view ? m->base : 0;
	return 0;
}

int offline_export(struct cli *c, struct store *st, const char *name, uint64_t ckpt, const char *file, json_t **ret)
{
	struct err e = {0};
	struct progress p;
	struct volume *v = NULL;
	_cleanup_free_ struct repl_meta *m = NULL;
	enum volume_layer layer = LAYER_IMAGE;
	uint32_t i = 0;
	uint64_t at = ckpt;
	char label[128];

	cli_defer_signals(true);
	int rc = store_find_volume(st, name, &m, &i, &e);
	if (rc == 0 && ckpt && repl_meta_find_ckpt(m, ckpt) < 0)
		rc = err_set(&e, ERR_NOENT, "%s keeps no checkpoint %llu; repctl show %s lists those it keeps",
			     m->group, (unsigned long long)ckpt, name);
	if (rc == 0 && !ckpt)
		rc = plain_layer(m, &layer, &at, &e);
	if (rc == 0)
		rc = store_open_volume(st, m, i, &v, &e);
	if (rc == 0) {
		(void)snprintf(label, sizeof(label), "export %.70s", c->args[0]);
		progress_init(&p, c->out.progress, stderr, label);
		rc = volume_export(v, layer, at, repl_meta_size_at(m, i, ckpt), file, on_copy, &p, &e);
		progress_end(&p);
		volume_close(v);
	}
	store_close(st);
	cli_defer_signals(false);
	if (rc < 0)
		return fail_err(c, rc, &e);
	return made(c,
		    json_pack("{s:i, s:s, s:s, s:I}", "schema", 1, "volume", name, "file", file, "size",
			      (json_int_t)repl_meta_size_at(m, i, ckpt)),
		    ret);
}

static json_t *volume_json(struct store *st, const struct repl_meta *m, uint32_t i)
{
	const struct repl_volume *v = &m->volumes[i];
	char path[STORAGE_PATH_MAX], base[SOURCE_PATH_MAX];
	const char *format;
	struct disk *d = NULL;
	uint64_t allocated;
	json_t *j = json_null();
	bool based = false;
	(void)snprintf(path, sizeof(path), "volumes/%s/disk.raw", v->name);
	if (storage_open(store_storage(st), path, STORAGE_RDONLY, &d) == 0) {
		if (disk_allocated(d, &allocated) == 0)
			j = json_integer((json_int_t)allocated);
		disk_close(d);
	} else {
		based = based_look(store_storage(st), v->name, base, &format, NULL) == 0;
		if (based && based_own_allocated(store_storage(st), v->name, &allocated) == 0)
			j = json_integer((json_int_t)allocated);
	}
	return json_pack("{s:s, s:s, s:I, s:I, s:s, s:s, s:o, s:s?}", "name", v->name, "group", m->group, "size",
			 (json_int_t)v->size, "id", (json_int_t)v->id, "role", role_name(m->role), "state",
			 state_name(m->state), "allocated", j, "base", based ? base : NULL);
}

/* Of one volume, or (NULL) of all. What each holds is for a daemon to say. */
static void add_clones(json_t *list, const struct repl_meta *m, const char *volume)
{
	for (uint32_t i = 0; i < m->n_clones; i++) {
		const struct repl_clone *k = &m->clones[i];
		char t[40];
		if (volume && strcmp(volume, k->volume) != 0)
			continue;
		clock_format(k->time_ns, t, sizeof(t));
		(void)json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:I, s:s, s:n, s:b}", "name", k->name,
							    "group", m->group, "volume", k->volume, "checkpoint",
							    (json_int_t)k->ckpt, "time", t, "bytes", "lost",
							    (int)(repl_meta_find_ckpt(m, k->ckpt) < 0)));
	}
}

struct listing {
	struct cli *c;
	struct store *st;
	json_t *volumes, *clones;
	int exit_code;
};

/* A group that can't be read is told about; the others are listed. */
static int list_group(void *arg, const char *group)
{
	struct listing *l = arg;
	struct repl_meta *m = NULL;
	struct err e = {0};
	int rc = store_load_group(l->st, group, &m, &e);
	if (rc < 0) {
		l->exit_code = fail_err(l->c, rc, &e);
		return 0;
	}
	for (uint32_t i = 0; i < m->n_volumes; i++)
		(void)json_array_append_new(l->volumes, volume_json(l->st, m, i));
	add_clones(l->clones, m, NULL);
	free(m);
	return 0;
}

int offline_list(struct cli *c, struct store *st, json_t **ret)
{
	struct listing l = {.c = c, .st = st, .volumes = json_array(), .clones = json_array()};
	int rc = l.volumes && l.clones ? store_list_groups(st, list_group, &l) : -ERR_NOMEM;
	store_close(st);
	if (rc < 0) {
		json_decref(l.volumes);
		json_decref(l.clones);
		return cli_fail(c, rc, "the store's groups can't be listed: %s", err_short(rc));
	}
	rc = made(c, json_pack("{s:i, s:o, s:o}", "schema", 1, "volumes", l.volumes, "clones", l.clones), ret);
	return rc ? rc : l.exit_code;
}

int offline_show(struct cli *c, struct store *st, const char *name, json_t **ret)
{
	struct err e = {0};
	_cleanup_free_ struct repl_meta *m = NULL;
	uint32_t i = 0;
	char path[CLI_PATH_MAX + STORAGE_PATH_MAX], uuid[UUID_TEXT_SIZE];
	int rc = store_find_volume(st, name, &m, &i, &e);
	if (rc < 0) {
		store_close(st);
		return fail_err(c, rc, &e);
	}
	char base[SOURCE_PATH_MAX];
	const char *format = NULL;
	bool based = based_look(store_storage(st), name, base, &format, NULL) == 0;
	json_t *doc = json_object(), *facts = volume_json(st, m, i), *ckpts = json_array(), *clones = json_array();
	store_close(st);
	uuid_format(m->volumes[i].uuid, uuid);
	(void)snprintf(path, sizeof(path), "%s/volumes/%s/%s", c->store_path, name, based ? "own.data" : "disk.raw");
	for (uint32_t k = 0; k < m->n_ckpts; k++)
		(void)json_array_append_new(ckpts, json_integer((json_int_t)m->ckpts[k].number));
	rc = json_object_set_new(doc, "schema", json_integer(1));
	rc |= json_object_update(doc, facts);
	rc |= json_object_set_new(doc, "uuid", json_string(uuid));
	rc |= json_object_set_new(doc, "base_format", based ? json_string(format) : json_null());
	rc |= json_object_set_new(doc, "path", json_null());
	rc |= json_object_set_new(doc, "store_path", json_string(path));
	rc |= json_object_set_new(doc, "checkpoints", ckpts);
	add_clones(clones, m, name);
	rc |= json_object_set_new(doc, "clones", clones);
	json_decref(facts);
	if (rc) {
		json_decref(doc);
		doc = NULL;
	}
	return made(c, doc, ret);
}
