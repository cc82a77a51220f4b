/* The verb verify: both hosts' disks and overlays are looked at, and repaired if asked to (core/repl_verify.c). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/os/clock.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"
#include "net/ctl.h"

#define LOOK_NS (200 * NS_PER_MS)

static void tell(const struct call *c, struct group *g, const struct shell_command *sc, uint64_t started)
{
	mutex_lock(&g->lock);
	uint64_t done = sc->c.verify->done, total = sc->c.verify->total;
	mutex_unlock(&g->lock);
	if (total)
		verb_tell(c, started, done, total);
}

static void cancel(struct group *g, const struct shell_command *sc)
{
	struct shell_command *stop = shell_command_new(CMD_VERIFY_CANCEL);
	if (stop == NULL)
		return; /* it goes on, to nobody */
	stop->c.verify = sc->c.verify;
	(void)group_command(g, stop, NULL, 0, NULL);
	shell_command_unref(stop);
}

/* Until it ends; who hangs up, or has no more time, ends it. */
static int run(const struct call *c, struct group *g, struct shell_command *sc)
{
	uint64_t started = clock_mono_ns(), deadline = verb_deadline(c);
	int err = 0;
	group_command_start(g, sc);
	for (;;) {
		uint64_t now = clock_mono_ns();
		if (group_command_wait(g, sc, deadline ? min_u64(deadline, now + LOOK_NS) : now + LOOK_NS, &err, c->e))
			return err;
		if (c->ctl)
			tell(c, g, sc, started);
		bool late = deadline && clock_mono_ns() >= deadline;
		if (!late && !(c->ctl && ctl_canceled(c->ctl)))
			continue;
		cancel(g, sc);
		if (!group_command_wait(g, sc, clock_mono_ns() + NS_PER_SEC, &err, c->e))
			return err_set(c->e, ERR_INTR, "interrupted; it could not be stopped and goes on");
		if (late && err == -ERR_INTR)
			err = err_set(c->e, ERR_TIMEOUT, "not done in the time given: it was stopped");
		return err;
	}
}

static json_t *one(const struct repl_meta *m, const struct repl_difference *d)
{
	static const char *const problems[] = {"differs", "unreadable", "checksum"};
	static const char *const hosts[] = {"both", "primary", "secondary"};
	json_t *layer = !d->overlay			? json_null()
			: d->layer == WIRE_SCRUB_ACTIVE ? json_string("active")
							: json_integer((json_int_t)d->layer);
	return json_pack("{s:s, s:s, s:s, s:o, s:s, s:I, s:I, s:b}", "host", hosts[d->where], "what",
			 d->overlay ? "overlay" : "disk", "volume", m->volumes[d->volume].name, "checkpoint", layer,
			 "problem", problems[d->problem], "offset", (json_int_t)d->off, "length", (json_int_t)d->len,
			 "repaired", (int)d->repaired);
}

static bool joins(const struct repl_difference *a, const struct repl_difference *b)
{
	return a->volume == b->volume && a->problem == b->problem && a->where == b->where && a->overlay == b->overlay &&
	       a->layer == b->layer && a->repaired == b->repaired && a->off + a->len == b->off;
}

static int order(const void *a, const void *b)
{
	const struct repl_difference *x = a, *y = b;
	if (x->volume != y->volume)
		return x->volume < y->volume ? -1 : 1;
	if (x->overlay != y->overlay)
		return x->overlay ? 1 : -1;
	if (x->where != y->where)
		return x->where < y->where ? -1 : 1;
	if (x->layer != y->layer)
		return x->layer < y->layer ? -1 : 1;
	return (x->off > y->off) - (x->off < y->off);
}

static json_t *differences(const struct repl_meta *m, struct repl_verify *v)
{
	json_t *a = json_array();
	qsort(v->list, v->n, sizeof(v->list[0]), order);
	for (uint32_t i = 0; i < v->n;) {
		struct repl_difference d = v->list[i++];
		for (; i < v->n && joins(&d, &v->list[i]); i++)
			d.len += v->list[i].len;
		json_array_append_new(a, one(m, &d));
	}
	return a;
}

int verb_do_verify(const struct call *c)
{
	struct group *g;
	const char *repair = verb_arg_str(c, "repair");
	int err = verb_need_group(c, &g);
	if (err)
		return err;
	bool peer = repair && strcmp(repair, "peer") == 0, from = repair && strcmp(repair, "from-peer") == 0;
	if (repair && !peer && !from) {
		err = verb_prefixed(c, g->name, err_set(c->e, ERR_USAGE, "repair takes peer or from-peer"));
		group_unref(g);
		return err;
	}
	struct shell_command *sc = shell_command_new(CMD_VERIFY);
	if (sc)
		sc->c.verify = calloc(1, sizeof(*sc->c.verify));
	if (sc == NULL || sc->c.verify == NULL) {
		err = err_set(c->e, ERR_NOMEM, "out of memory");
	} else {
		sc->c.flags = peer ? REPAIR_PEER : from ? REPAIR_FROM_PEER : REPAIR_NONE;
		err = run(c, g, sc);
	}
	err = verb_prefixed(c, g->name, err);
	if (!err) {
		struct repl_verify *v = sc->c.verify;
		mutex_lock(&g->lock);
		json_t *list = differences(repl_meta(g->core), v);
		mutex_unlock(&g->lock);
		verb_result(c, json_pack("{s:s, s:b, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:I}", "group", g->name,
					 "clean", (int)(v->found == v->repaired), "bytes", (json_int_t)v->bytes,
					 "overlay_bytes", (json_int_t)(v->done - v->bytes), "wrong_bytes",
					 (json_int_t)v->found, "repaired_bytes", (json_int_t)v->repaired, "checkpoint",
					 v->ckpt ? json_integer((json_int_t)v->ckpt) : json_null(), "kept_here",
					 v->kept ? json_integer((json_int_t)v->kept) : json_null(), "differences", list,
					 "more", (json_int_t)v->more));
	}
	shell_command_unref(sc);
	group_unref(g);
	return err;
}
