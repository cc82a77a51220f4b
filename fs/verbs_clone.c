/* The verb `clone`. A clone is removed by removing its file (fs/clones.c). */
#include <stdio.h>
#include <string.h>

#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"

static int make(const struct call *c, struct gvol *v, struct group *g, const char *clone, uint64_t ckpt)
{
	bool late = clone_is_late(c->d, clone);
	struct gvol *there = gvol_find_clone(c->d, clone); /* of another group, or this one */
	int unlisted = daemon_clone_unlisted(c->d, clone);
	if (!there && !unlisted) /* its group has just come back */
		there = gvol_find_clone(c->d, clone);
	struct shell_command *sc = there || unlisted || late ? NULL : shell_command_new(CMD_CLONE);
	int err;
	if (late) {
		err = err_set(c->e, ERR_BUSY,
			      "clone %s %s: a clone of that name is being made, for one who waits no longer; try again",
			      v->name, clone);
	} else if (there) {
		err = err_set(c->e, ERR_EXIST,
			      "clone %s %s: a clone of that name is there already; choose another name, or remove it "
			      "with `rm`",
			      v->name, clone);
	} else if (unlisted == -ERR_BUSY) {
		err = err_set(c->e, ERR_BUSY,
			      "clone %s %s: a clone of that name is of a group whose volumes are being added or "
			      "deleted; try again",
			      v->name, clone);
	} else if (unlisted) {
		err = err_set(c->e, ERR_EXIST,
			      "clone %s %s: a clone of that name is of a group that is not served, see `list`; choose "
			      "another name",
			      v->name, clone);
	} else if (sc == NULL) {
		err = err_set(c->e, ERR_NOMEM, "clone %s: out of memory", v->name);
	} else {
		(void)snprintf(sc->c.text, sizeof(sc->c.text), "%s", clone);
		sc->c.number = ckpt;
		sc->c.flags = v->index;
		err = verb_command(c, g, sc);
		if (err && atomic_load(&sc->refs) > 1)
			clone_late(c->d, sc);
	}
	shell_command_unref(sc);
	gvol_unref(there);
	return err;
}

int verb_do_clone(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	const char *clone = verb_arg_str(c, "clone"), *mount = c->d->cfg.mount;
	uint64_t ckpt = verb_arg_u64(c, "checkpoint", 0);
	char path[4096 + NAME_SIZE];
	int err = verb_need_volume(c, &v, &g);
	if (err)
		return err;
	if (clone == NULL || !store_name_valid(clone))
		err = err_set(c->e, ERR_USAGE,
			      "clone %s: %.80s is not a clone's name: 1 to 63 of A-Z a-z 0-9 . _ -, the first a letter "
			      "or digit",
			      v->name, clone ? clone : "nothing");
	else if (ckpt == 0)
		err =
		    err_set(c->e, ERR_USAGE, "clone %s: the number of a checkpoint is missing: %s@N", v->name, v->name);
	if (!err) {
		mutex_lock(&c->d->cloning);
		err = make(c, v, g, clone, ckpt);
		mutex_unlock(&c->d->cloning);
	}
	if (!err) {
		(void)snprintf(path, sizeof(path), "%s/clones/%s", mount ? mount : "", clone);
		verb_result(c, json_pack("{s:s, s:s, s:I, s:I, s:o}", "clone", clone, "volume", v->name, "checkpoint",
					 (json_int_t)ckpt, "size", (json_int_t)gvol_size_at(g, v, ckpt), "path",
					 mount ? json_string(path) : json_null()));
	}
	group_unref(g);
	gvol_unref(v);
	return err;
}
