/* Verbs of history: checkpoints and extents. */
#include <stdio.h>
#include <string.h>

#include "core/os/clock.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"

static json_t *holders(struct group *g, uint64_t number)
{
	json_t *a = json_array();
	char buf[HOLDER_SIZE];
	for (unsigned i = 0; repl_holder(g->core, number, i, buf); i++)
		json_array_append_new(a, json_string(buf));
	return a;
}

int verb_do_checkpoints(const struct call *c)
{
	struct group *g;
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	uint64_t drop = verb_arg_u64(c, "drop", 0);
	if (drop) {
		struct shell_command *sc = shell_command_new(CMD_DROP);
		if (sc)
			sc->c.number = drop;
		err = verb_command(c, g, sc);
		shell_command_unref(sc);
	}
	if (!err) {
		json_t *a = json_array();
		mutex_lock(&g->lock);
		const struct repl_meta *m = repl_meta(g->core);
		for (uint32_t i = 0; i < m->n_ckpts; i++) {
			char t[40], gen[20];
			if (!repl_shows_ckpt(g->core, i))
				continue;
			clock_format(m->ckpts[i].time_ns, t, sizeof(t));
			(void)snprintf(gen, sizeof(gen), "%016llx", (unsigned long long)m->ckpts[i].generation);
			json_array_append_new(
			    a, json_pack("{s:I, s:s, s:b, s:s, s:s, s:o}", "number", (json_int_t)m->ckpts[i].number,
					 "kind", ckpt_kind_name(m->ckpts[i].kind), "pinned",
					 (m->ckpts[i].flags & CKPT_PINNED) != 0, "time", t, "generation", gen,
					 "held_by", holders(g, m->ckpts[i].number)));
		}
		mutex_unlock(&g->lock);
		verb_result(c, json_pack("{s:s, s:o}", "group", g->name, "checkpoints", a));
	}
	group_unref(g);
	return err;
}

struct runs_arg {
	json_t *a;
	uint64_t size; /* of what is shown: what it has grown by since is not of it */
};

static void add_run(void *arg, uint64_t off, uint64_t len)
{
	struct runs_arg *r = arg;
	if (off < r->size)
		json_array_append_new(r->a, json_pack("{s:I, s:I}", "offset", (json_int_t)off, "length",
						      (json_int_t)min_u64(len, r->size - off)));
}

int verb_do_extents(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	int err = verb_need_volume(c, &v, &g);
	if (err)
		return err;
	const json_t *layer = json_object_get(c->args, "layer");
	const char *text = json_string_value(layer);
	uint64_t number = json_is_integer(layer) ? (uint64_t)json_integer_value(layer) : 0;
	uint64_t since = verb_arg_u64(c, "since", 0);
	uint64_t size = number ? gvol_size_at(g, v, number) : volume_size(v->vol);
	struct runs_arg r = {json_array(), size};
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
	err = verb_prefixed(c, v->name, err);
	if (!err)
		verb_result(c,
			    json_pack("{s:s, s:I, s:O}", "volume", v->name, "size", (json_int_t)size, "extents", r.a));
	json_decref(r.a);
	group_unref(g);
	gvol_unref(v);
	return err;
}
