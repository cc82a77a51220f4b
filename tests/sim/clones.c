/* Clones in the simulated world: what a guest of a clone does, and the model of what it must find.
 *
 * For every unit of a clone the model knows which write is there and which one is durable; where no write is, the clone
 * shows its checkpoint, whose content the model has in a ghost. There is one request at a time on a clone (what lets
 * several run beside each other is fs/clones.c's), but it stops at any call of its storage and at any lock, while the
 * peer's stream, guests, checkpoints, merges and commits go on. A read is exact. After a kill a clone is what it was,
 * but for the write under way; after a power cut, and where a sync failed, each unit is what was durable or any newer
 * write. One whose checkpoint was given up answers nothing but an error.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/check.h"
#include "tests/sim/world_internal.h"

struct sim_clone {
	uint64_t id, ckpt;
	uint32_t vol;
	char name[NAME_SIZE];
	uint32_t tag; /* of its writes, in this world */
	ver *now, *durable, *zeroed;
	bool lost, gone, busy;
	bool loose; /* what is not durable may go with the process: a sync or a write failed */
	ver flight; /* the write under way; 0: none */
	struct sim_clone *next;
};

struct clone_op {
	struct host *h;
	uint64_t id;
	enum world_io kind;
	uint32_t first, n;
};

static ver *units_of_clone(struct host *h, const struct sim_clone *c, ver v)
{
	ver *u = simalloc(h->w->units[c->vol] * sizeof(ver));
	for (uint32_t i = 0; i < h->w->units[c->vol]; i++)
		u[i] = v;
	return u;
}

static void clone_free(struct sim_clone *c)
{
	simfree(c->now);
	simfree(c->durable);
	simfree(c->zeroed);
	simfree(c);
}

static struct sim_clone *clone_by_id(struct host *h, uint64_t id)
{
	struct sim_clone *c = h->clones;
	while (c && c->id != id)
		c = c->next;
	return c;
}

static ver shown(struct host *h, const struct sim_clone *c, ver v, uint32_t u)
{
	return model_shows(h->w, v == NOT_THERE ? model_ckpt(h, c->ckpt, c->vol)[u] : v);
}

/* ---- the record ---- */

static void clone_add(struct host *h, const struct repl_meta *m, const struct repl_clone *k)
{
	int vol = repl_meta_find_volume(m, k->volume);
	struct sim_clone *c = simalloc(sizeof(*c));
	INVARIANT(vol >= 0);
	c->id = k->id;
	c->ckpt = k->ckpt;
	c->vol = (uint32_t)vol;
	(void)snprintf(c->name, sizeof(c->name), "%s", k->name);
	c->tag = ++h->w->clone_tags;
	c->now = units_of_clone(h, c, NOT_THERE);
	c->durable = units_of_clone(h, c, NOT_THERE);
	c->zeroed = units_of_clone(h, c, 0);
	c->next = h->clones;
	h->clones = c;
	h->w->count.clones++;
}

void clones_publish(struct host *h, const struct repl_meta *m)
{
	for (struct sim_clone **at = &h->clones; *at;) {
		struct sim_clone *c = *at;
		bool named = false;
		for (uint32_t i = 0; i < m->n_clones; i++)
			named = named || m->clones[i].id == c->id;
		c->lost = repl_meta_find_ckpt(m, c->ckpt) < 0;
		if (named) {
			at = &c->next;
			continue;
		}
		*at = c->next;
		c->gone = true;
		if (!c->busy)
			clone_free(c);
	}
	for (uint32_t i = 0; i < m->n_clones; i++)
		if (!clone_by_id(h, m->clones[i].id))
			clone_add(h, m, &m->clones[i]);
	/* SPEC 3, 7: what a clone holds goes for want of room only, and never so that the peer's stream can go on. */
	for (struct sim_clone *c = h->clones; c; c = c->next) {
		c->lost = repl_meta_find_ckpt(m, c->ckpt) < 0;
		bool given_up = !c->lost || repl_meta_find_ckpt(h->seen, c->ckpt) < 0;
		if (!given_up && !h->full && !h->had_full && !h->had_errors && !h->path_errors.path &&
		    !h->errors_one_in)
			world_fail(h->w, "host %u: checkpoint %" PRIu64 " is gone, and clone %s holds it", h->id,
				   c->ckpt, c->name);
		h->w->count.clones_lost += !given_up;
	}
}

void clones_forget(struct host *h)
{
	while (h->clones) {
		struct sim_clone *c = h->clones;
		h->clones = c->next;
		clone_free(c);
	}
}

/* ---- after a crash ---- */

static bool may_be(struct host *h, const struct sim_clone *c, uint32_t u, ver is, ver *ret)
{
	struct world *w = h->w;
	ver durable = c->durable[u], least = durable == NOT_THERE ? 0 : durable;
	if (is == shown(h, c, durable, u)) {
		*ret = durable;
		return true;
	}
	if (is == 0) {
		*ret = c->zeroed[u];
		return c->zeroed[u] > least;
	}
	if (is >= w->n_writes)
		return false;
	const struct write *x = &w->writes[is];
	*ret = is;
	return x->clone == c->tag && x->first <= u && u < x->first + x->n && is > least;
}

static void clone_look(struct host *h, struct sim_clone *c, enum world_crash how)
{
	struct world *w = h->w;
	uint8_t *buf = simalloc(w->size[c->vol]);
	world_quiet(h, true);
	int err = volume_read_clone(h->x.vols[c->vol], c->id, 0, size_clip(h, c->vol, 0, w->size[c->vol], buf), buf);
	world_quiet(h, false);
	if (c->lost ? err != -ERR_NOENT : err)
		world_fail(w, "host %u: clone %s, which is %s, is read after a crash with %s", h->id, c->name,
			   c->lost ? "lost" : "there", err_name(err));
	for (uint32_t u = 0; !c->lost && u < w->units[c->vol]; u++) {
		ver is = model_unit(w, buf + (size_t)u * WORLD_UNIT, c->vol, u), v = c->now[u];
		const struct write *x = &w->writes[c->flight];
		bool all = how == WORLD_POWER || c->loose;
		bool flight = c->flight && x->first <= u && u < x->first + x->n;
		if (is == shown(h, c, v, u))
			;
		else if (flight && is == model_shows(w, c->flight))
			v = c->flight;
		else if (v == NOT_THERE && model_ckpt_given_up(h, c->ckpt, c->vol))
			v = is; /* a write here had its block filled before the disk lost that */
		else if (!all || !may_be(h, c, u, is, &v))
			world_fail(w, "host %u: after %s unit %u of clone %s is %s; it was %s, durable %s", h->id,
				   how == WORLD_POWER ? "a power cut" : "a kill", u, c->name, model_text(w, is),
				   model_text(w, c->now[u]), model_text(w, c->durable[u]));
		c->now[u] = v;
		if (how == WORLD_POWER)
			c->durable[u] = v;
	}
	c->flight = 0;
	c->loose = false;
	simfree(buf);
}

void clones_opened(struct host *h, enum world_crash how)
{
	for (struct sim_clone *c = h->clones; c; c = c->next)
		clone_look(h, c, how);
}

void clones_check(struct host *h)
{
	for (struct sim_clone *c = h->clones; c; c = c->next)
		if (!c->busy)
			clone_look(h, c, WORLD_KILL);
}

/* ---- requests ---- */

/* It is closed, or lost, before the record without it, or without its checkpoint, counts as published. */
static bool being_removed(const struct host *h, const struct sim_clone *c)
{
	if (h->saving && repl_meta_find_ckpt(h->save.meta, c->ckpt) < 0)
		return true;
	for (const struct sim_command *s = h->commands; s; s = s->next)
		if (s->c.cmd == CMD_UNCLONE && strcmp(s->c.text, c->name) == 0)
			return true;
	return false;
}

/* What a write that failed has left. */
static void write_failed(struct host *h, struct sim_clone *c, ver v, const struct clone_op *o)
{
	struct world *w = h->w;
	uint8_t *buf = simalloc((size_t)o->n * WORLD_UNIT);
	c->loose = true;
	world_quiet(h, true);
	int err = volume_read_clone(h->x.vols[c->vol], c->id, (uint64_t)o->first * WORLD_UNIT,
				    (uint64_t)o->n * WORLD_UNIT, buf);
	world_quiet(h, false);
	for (uint32_t i = 0; !err && i < o->n; i++) {
		uint32_t u = o->first + i;
		ver is = model_unit(w, buf + (size_t)i * WORLD_UNIT, c->vol, u);
		if (is == shown(h, c, c->now[u], u))
			continue;
		if (is != model_shows(w, v))
			world_fail(w, "host %u: a write that failed leaves unit %u of clone %s as %s; it was %s", h->id,
				   u, c->name, model_text(w, is), model_text(w, c->now[u]));
		c->now[u] = v;
	}
	if (err && !c->lost && !c->gone && !h->dying && !(err == -ERR_NOENT && being_removed(h, c)))
		world_fail(w, "host %u: clone %s can't be read: %s", h->id, c->name, err_name(err));
	simfree(buf);
}

static void clone_write(struct host *h, struct sim_clone *c, const struct clone_op *o)
{
	struct world *w = h->w;
	bool zero = o->kind != WORLD_WRITE;
	ver v = model_write_new(w, h->id, c->vol, o->first, o->n, zero);
	uint8_t *buf = zero ? NULL : simalloc((size_t)o->n * WORLD_UNIT);
	w->writes[v].clone = c->tag;
	for (uint32_t i = 0; buf && i < o->n; i++)
		model_unit_fill(buf + (size_t)i * WORLD_UNIT, v, c->vol, o->first + i);
	struct volume_req q = {.kind = o->kind == WORLD_WRITE  ? VOLUME_WRITE
				       : o->kind == WORLD_ZERO ? VOLUME_ZERO
							       : VOLUME_DISCARD,
			       .off = (uint64_t)o->first * WORLD_UNIT,
			       .len = (uint64_t)o->n * WORLD_UNIT,
			       .buf = buf};
	c->flight = v;
	for (uint32_t i = 0; zero && i < o->n; i++)
		c->zeroed[o->first + i] = v;
	int err = volume_write_clone(h->x.vols[c->vol], c->id, &q);
	simfree(buf);
	if (h->dying || simstore_stopped(h->ss))
		return; /* the next start finds it or not */
	c->flight = 0;
	if (c->gone)
		return;
	if (err) {
		write_failed(h, c, v, o);
		return;
	}
	if (c->lost)
		return;
	for (uint32_t i = 0; i < o->n; i++)
		c->now[o->first + i] = v;
	w->count.clone_writes++;
}

static void clone_sync(struct host *h, struct sim_clone *c)
{
	int err = volume_sync_clone(h->x.vols[c->vol], c->id);
	if (h->dying || simstore_stopped(h->ss) || c->gone)
		return;
	if (err)
		c->loose = true;
	else
		memcpy(c->durable, c->now, h->w->units[c->vol] * sizeof(ver));
}

static void clone_read(struct host *h, struct sim_clone *c, const struct clone_op *o)
{
	struct world *w = h->w;
	uint8_t *buf = simalloc((size_t)o->n * WORLD_UNIT);
	bool was_lost = c->lost;
	memset(buf, 0xa5, (size_t)o->n * WORLD_UNIT);
	int err = volume_read_clone(h->x.vols[c->vol], c->id, (uint64_t)o->first * WORLD_UNIT,
				    (uint64_t)o->n * WORLD_UNIT, buf);
	bool over = h->dying || simstore_stopped(h->ss) || c->gone;
	if (!over && was_lost && err != -ERR_NOENT)
		world_fail(w, "host %u: a read of clone %s, which is lost, ends with %s", h->id, c->name,
			   err_name(err));
	for (uint32_t i = 0; !over && !err && !c->lost && i < o->n; i++) {
		uint32_t u = o->first + i;
		ver is = model_unit(w, buf + (size_t)i * WORLD_UNIT, c->vol, u);
		if (is != shown(h, c, c->now[u], u))
			world_fail(w, "host %u: unit %u of clone %s reads as %s, not %s", h->id, u, c->name,
				   model_text(w, is), model_text(w, shown(h, c, c->now[u], u)));
	}
	w->count.clone_reads += !over && !err;
	simfree(buf);
}

static void clone_job(void *arg)
{
	struct clone_op o = *(struct clone_op *)arg;
	struct host *h = o.h;
	struct sim_clone *c = clone_by_id(h, o.id);
	simfree(arg);
	if (!c || c->busy || h->dying)
		return;
	c->busy = true;
	if (o.kind == WORLD_READ)
		clone_read(h, c, &o);
	else if (o.kind == WORLD_FLUSH)
		clone_sync(h, c);
	else
		clone_write(h, c, &o);
	c->busy = false;
	if (c->gone)
		clone_free(c);
}

static struct sim_clone *clone_nth(struct host *h, uint64_t n)
{
	struct sim_clone *c = h->clones;
	while (c && n--)
		c = c->next;
	return c;
}

unsigned world_clones(const struct world *w, unsigned host)
{
	unsigned n = 0;
	for (const struct sim_clone *c = w->h[host].clones; c; c = c->next)
		n++;
	return n;
}

const char *world_clone_name(const struct world *w, unsigned host, unsigned nth)
{
	const struct sim_clone *c = w->h[host].clones;
	while (c && nth--)
		c = c->next;
	return c && !c->busy ? c->name : NULL;
}

void world_clone_io(struct world *w, unsigned host, unsigned nth, enum world_io kind, uint64_t off, uint64_t len)
{
	struct host *h = &w->h[host];
	struct sim_clone *c = clone_nth(h, nth);
	if (!h->up || h->closing || !c || c->busy)
		return;
	uint64_t size = size_now(h, c->vol);
	off = off % size / WORLD_UNIT * WORLD_UNIT;
	len = (len + WORLD_UNIT - 1) / WORLD_UNIT * WORLD_UNIT;
	if (len > size - off)
		len = size - off;
	struct clone_op *o = simalloc(sizeof(*o));
	*o = (struct clone_op){h, c->id, kind, UNITS_IN(off), UNITS_IN(len)};
	host_spawn(h, clone_job, o, world_delay(w, w->disk_ns / 4 + 1));
}
