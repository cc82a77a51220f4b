/* The model: which write every 128 bytes must hold, on each host's disks, active overlays, checkpoints and on the wire.
 *
 * Every guest's write gets a number when it is carried out; overlapping ones are carried out one after the other, so
 * for one unit the numbers say which is newer. A unit's bytes name the write that made them. Zeroes and discards have
 * numbers too, but leave nothing that names them: a unit of zeroes is whichever of the writes allowed there is one of
 * zeroes.
 *
 * What is kept (struct host):
 *   disk.now      what the disk reads as. Changed by what is carried out: guests' writes, the peer's stream, a commit
 *   disk.durable  what is there after a power cut at the least, by the syncs that succeeded; `log` is what may be there
 *   act           the same of the active overlays; NOT_THERE where they hold nothing
 *   ghosts        what every kept checkpoint must read as, noted when it was made
 *   str           source: what the target will hold when all that was sent is applied. Its state at a CHECKPOINT frame
 * is what that checkpoint must be, at RESYNC_DONE what the target must hold durably when it adopts prom_*        what
 * this secondary has to have with `--to latest`, because a guest was told so (I2)
 *
 * Checked: every read; what is there after each crash; what each flush and each write under C and B promised, when it
 * is answered and at failover; the order of barriers; checkpoints against the stream; failover's outcome; that what
 * differs between the hosts is in a dirty set of theirs (I4), numbers, SYNCED; and at the end, everything.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "tests/sim/world_internal.h"

#define GARBAGE (UINT32_MAX - 1)

/* ---- bytes ---- */

static uint64_t hash(uint64_t z)
{
	z = (z ^ (z >> 33)) * UINT64_C(0xff51afd7ed558ccd);
	return z ^ (z >> 29);
}

static void unit_fill(uint64_t out[static WORLD_UNIT / 8], ver v, uint32_t vol, uint32_t unit)
{
	uint64_t base = hash(((uint64_t)v << 33) ^ ((uint64_t)vol << 32) ^ unit);
	out[0] = (base & ~UINT64_C(0xffffffff)) | v;
	for (unsigned i = 1; i < WORLD_UNIT / 8; i++)
		out[i] = base + i * UINT64_C(0x9e3779b97f4a7c15);
}

/* The write that the unit names, 0 for zeroes, or GARBAGE. */
static ver unit_read(const struct world *w, const uint8_t *p, uint32_t vol, uint32_t unit)
{
	uint64_t have[WORLD_UNIT / 8], want[WORLD_UNIT / 8];
	memcpy(have, p, sizeof(have));
	ver v = (ver)have[0];
	if (v == 0) {
		uint64_t any = 0;
		for (unsigned i = 0; i < WORLD_UNIT / 8; i++)
			any |= have[i];
		return any ? GARBAGE : 0;
	}
	if (v >= w->n_writes)
		return GARBAGE;
	unit_fill(want, v, vol, unit);
	return memcmp(have, want, sizeof(want)) == 0 ? v : GARBAGE;
}

static const char *text_of(const struct world *w, ver v)
{
	static char bufs[4][96];
	static unsigned at;
	char *b = bufs[at++ % 4];
	if (v == GARBAGE)
		return "garbage";
	if (v == NOT_THERE)
		return "nothing";
	if (v == 0 || v >= w->n_writes)
		return "zeroes";
	const struct write *x = &w->writes[v];
	(void)snprintf(b, sizeof(bufs[0]), "write %u (%s of host %u, units %u+%u)", v, x->zero ? "zeroes" : "data",
		       x->host, x->first, x->n);
	return b;
}

static ver at_least(ver a, ver b)
{
	return a > b ? a : b;
}

static ver write_new(struct world *w, unsigned host, uint32_t vol, uint32_t first, uint32_t n, bool zero)
{
	if (w->n_writes == w->cap_writes) {
		w->cap_writes = w->cap_writes ? 2 * w->cap_writes : 1024;
		w->writes = simrealloc(w->writes, w->cap_writes * sizeof(*w->writes));
	}
	w->writes[w->n_writes] =
	    (struct write){.zero = zero, .host = (uint8_t)host, .vol = (uint8_t)vol, .first = first, .n = n};
	return w->n_writes++;
}

/* ---- making ---- */

static ver *units_new(struct world *w, uint32_t vol)
{
	return simalloc(w->units[vol] * sizeof(ver));
}

static void units_copy(struct world *w, uint32_t vol, ver *to, const ver *from)
{
	memcpy(to, from, w->units[vol] * sizeof(ver));
}

static ver *units_dup(struct world *w, uint32_t vol, const ver *from)
{
	return simdup(from, w->units[vol] * sizeof(ver));
}

static void units_set(struct world *w, uint32_t vol, ver *to, ver v)
{
	for (uint32_t u = 0; u < w->units[vol]; u++)
		to[u] = v;
}

void model_new(struct world *w)
{
	(void)write_new(w, 0, 0, 0, 0, true); /* number 0: never written */
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		struct host *h = &w->h[i];
		h->execs = simalloc(EXECS_MAX * sizeof(*h->execs));
		h->seen = simalloc(sizeof(*h->seen));
		for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
			ver **all[] = {&h->disk[v].now,	     &h->disk[v].durable, &h->act[v].now,
				       &h->act[v].durable,   &h->prom_flushed[v], &h->prom_applied[v],
				       &h->prom_received[v], &h->str[v],	  &h->adopt[v]};
			for (unsigned k = 0; k < ARRAY_LEN(all); k++)
				*all[k] = units_new(w, v);
			h->failed[v] = simalloc(w->units[v]);
			h->told[v] = simalloc(w->units[v] * sizeof(struct told));
			units_set(w, v, h->act[v].now, NOT_THERE);
			units_set(w, v, h->act[v].durable, NOT_THERE);
			h->disk[v].since = simalloc(w->units[v] * sizeof(uint64_t));
			h->act[v].since = simalloc(w->units[v] * sizeof(uint64_t));
		}
	}
}

static void exec_drop(struct exec *x)
{
	simfree(x->vers);
	x->vers = NULL;
}

static void ghost_free(struct ghost *g)
{
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		simfree(g->v[v]);
	simfree(g);
}

void model_free(struct world *w)
{
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		struct host *h = &w->h[i];
		for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
			ver *all[] = {h->disk[v].now,	   h->disk[v].durable, h->act[v].now,
				      h->act[v].durable,   h->prom_flushed[v], h->prom_applied[v],
				      h->prom_received[v], h->str[v],	       h->adopt[v]};
			for (unsigned k = 0; k < ARRAY_LEN(all); k++)
				simfree(all[k]);
			simfree(h->disk[v].since);
			simfree(h->act[v].since);
			simfree(h->failed[v]);
			simfree(h->told[v]);
		}
		for (unsigned k = 0; k < h->n_log; k++)
			exec_drop(&h->log[k]);
		while (h->running) {
			struct running *r = h->running;
			h->running = r->next;
			exec_drop(&r->x);
			simfree(r);
		}
		while (h->ghosts) {
			struct ghost *g = h->ghosts;
			h->ghosts = g->next;
			ghost_free(g);
		}
		clones_forget(h);
		simfree(h->log);
		simfree(h->execs);
		simfree(h->seen);
		simfree(h->done.d);
		simfree(h->done_peer.d);
	}
	simfree(w->writes);
}

/* ---- checkpoints ---- */

static struct ghost *ghost_find(struct host *h, uint64_t number)
{
	struct ghost *g = h->ghosts;
	while (g && g->number != number)
		g = g->next;
	return g;
}

static void ghost_add(struct host *h, uint64_t number, enum ckpt_kind kind)
{
	struct ghost *g = simalloc(sizeof(*g));
	g->number = number;
	g->kind = kind;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		g->v[v] = units_dup(h->w, v, h->disk[v].now);
		g->given_up[v] = h->seen->volumes[v].flags & VOLUME_STALE;
		g->size[v] = size_now(h, v);
	}
	g->next = h->ghosts;
	h->ghosts = g;
}

static void ghosts_keep(struct host *h, const struct repl_meta *m)
{
	for (struct ghost **at = &h->ghosts; *at;) {
		struct ghost *g = *at;
		if (repl_meta_find_ckpt(m, g->number) >= 0) {
			at = &g->next;
			continue;
		}
		*at = g->next;
		ghost_free(g);
	}
}

/* ---- what a host shows ---- */

/* A unit of the view: active over the image of the base. */
static ver view_ver(struct host *h, const struct ghost *base, uint32_t vol, uint32_t u)
{
	ver v = h->act[vol].now[u];
	return v != NOT_THERE ? v : base ? base->v[vol][u] : h->disk[vol].now[u];
}

static struct ghost *base_of(struct host *h, uint64_t number)
{
	struct ghost *g = number ? ghost_find(h, number) : NULL;
	if (number && !g)
		world_fail(h->w, "host %u: stands on checkpoint %" PRIu64 ", which was never made", h->id, number);
	return g;
}

/* ---- carrying out writes ---- */

void model_fill(struct host *h, struct sim_io *s)
{
	struct world *w = h->w;
	uint32_t first = UNITS_IN(s->io.off), n = UNITS_IN(s->io.len);
	if (s->v)
		return;
	s->v = write_new(w, h->id, s->io.volume, first, n, s->io.kind != REPL_WRITE);
	for (uint32_t i = 0; s->io.kind == REPL_WRITE && i < n; i++) {
		uint64_t unit[WORLD_UNIT / 8];
		unit_fill(unit, s->v, s->io.volume, first + i);
		memcpy(s->data + (size_t)i * WORLD_UNIT, unit, WORLD_UNIT);
	}
}

static ver exec_ver(const struct exec *x, uint32_t u)
{
	return x->vers ? x->vers[u - x->first] : x->v;
}

static bool exec_covers(const struct exec *x, bool active, uint32_t vol, uint32_t u)
{
	return x->active == active && x->vol == vol && u >= x->first && u < x->first + x->n;
}

struct exec *model_begin(struct host *h, const struct repl_io *io, struct sim_io *s)
{
	struct world *w = h->w;
	if (h->dying)
		return NULL;
	struct running *r = simalloc(sizeof(*r));
	struct exec *x = &r->x;
	x->active = io->target == TARGET_ACTIVE;
	x->vol = io->volume;
	x->first = UNITS_IN(io->off);
	x->n = UNITS_IN(io->len);
	x->begin = ++w->tick;
	for (struct running *o = h->running; o; o = o->next)
		if (o->x.vol == x->vol && o->x.active == x->active && o->x.first < x->first + x->n &&
		    x->first < o->x.first + o->x.n)
			world_fail(w,
				   "host %u: two writes to the same blocks at once: units %u+%u and %u+%u of volume %u",
				   h->id, x->first, x->n, o->x.first, o->x.n, x->vol);
	if (io->kind == REPL_COMMIT) {
		struct ghost *base = base_of(h, h->base);
		x->vers = simalloc(x->n * sizeof(ver));
		for (uint32_t i = 0; i < x->n; i++)
			x->vers[i] = view_ver(h, base, x->vol, x->first + i);
	} else if (io->kind == REPL_REBUILD) {
		x->vers = simdup(h->str[x->vol] + x->first, x->n * sizeof(ver));
	} else if (s->stream) {
		INVARIANT(s->sent != NULL && s->sent->vol == x->vol && s->sent->first == x->first &&
			  s->sent->n == x->n);
		/* I12: nothing is applied across a barrier. */
		if (s->io.session == h->barrier_session && s->io.seq < h->last_flush_seq)
			world_fail(w, "host %u: frame %" PRIu64 " is applied behind barrier %" PRIu64, h->id, s->io.seq,
				   h->last_flush_seq);
		x->v = s->sent->v;
		if (s->sent->vers)
			x->vers = simdup(s->sent->vers, x->n * sizeof(ver));
	} else {
		x->v = s->v;
	}
	x->io = s;
	r->next = h->running;
	h->running = r;
	return x;
}

static void log_add(struct host *h, struct exec *x)
{
	if (h->n_log == h->cap_log) {
		h->cap_log = h->cap_log ? 2 * h->cap_log : 64;
		h->log = simrealloc(h->log, h->cap_log * sizeof(*h->log));
	}
	h->log[h->n_log++] = *x;
}

static void running_end(struct host *h, struct exec *x)
{
	struct running *r = CONTAINER_OF(x, struct running, x), **at = &h->running;
	while (*at != r)
		at = &(*at)->next;
	*at = r->next;
	x->end = ++h->w->tick;
	struct exec *ring = &h->execs[h->n_execs++ % EXECS_MAX];
	*ring = *x;
	ring->vers = NULL;
	log_add(h, x); /* takes vers */
	simfree(r);
}

/* The volume's disk on h is behind: guests read and write through the peer (core/repl_detach.c). */
static bool detached(struct host *h, uint32_t vol)
{
	return h->up && (repl_detached(h->core) >> vol & 1);
}

bool model_stale(struct host *h, uint32_t vol)
{
	struct host *p = peer_of(h);
	return detached(h, vol) || detached(p, vol) || (h->seen->volumes[vol].flags | p->seen->volumes[vol].flags);
}

static ver *now_of(struct host *h, const struct exec *x)
{
	return x->active ? h->act[x->vol].now : h->disk[x->vol].now;
}

/* Reads the disk beside all faults. */
static const char *const disk_paths[WORLD_VOLUMES] = {"volumes/a/disk.raw", "volumes/b/disk.raw"};

static void peek(struct host *h, uint32_t vol, bool durable, uint32_t first, uint32_t n, uint8_t *buf)
{
	if (simstore_peek(h->ss, disk_paths[vol], durable, (uint64_t)first * WORLD_UNIT, buf, (size_t)n * WORLD_UNIT) <
	    0)
		world_fail(h->w, "host %u: %s is not there", h->id, disk_paths[vol]);
}

/* A write that failed may have been done in part: what is there is looked at. False: the host died meanwhile, as the
 * look waited for a lock, and x is model_died's. */
static bool settle_failed(struct host *h, const struct exec *x)
{
	struct world *w = h->w;
	uint8_t *buf = simalloc((size_t)x->n * WORLD_UNIT);
	ver *now = now_of(h, x);
	if (x->active) {
		world_quiet(h, true);
		int err = volume_read_view(h->x.vols[x->vol], h->base, (uint64_t)x->first * WORLD_UNIT,
					   (uint64_t)x->n * WORLD_UNIT, buf);
		world_quiet(h, false);
		if (h->dying || simstore_stopped(h->ss)) {
			simfree(buf);
			return false;
		}
		if (err)
			world_fail(w, "host %u: the view can't be read after a failed write: %s", h->id, err_name(err));
	} else {
		peek(h, x->vol, false, x->first, x->n, buf);
	}
	struct ghost *base = x->active ? base_of(h, h->base) : NULL;
	for (uint32_t i = 0; i < x->n; i++) {
		uint32_t u = x->first + i;
		ver c = unit_read(w, buf + (size_t)i * WORLD_UNIT, x->vol, u);
		ver old = x->active ? view_ver(h, base, x->vol, u) : now[u];
		if (c == model_shows(w, old))
			continue;
		if (c != model_shows(w, exec_ver(x, u)))
			world_fail(w, "host %u: after a failed write unit %u of volume %u is %s, neither %s nor %s",
				   h->id, u, x->vol, text_of(w, c), text_of(w, old), text_of(w, exec_ver(x, u)));
		now[u] = exec_ver(x, u);
	}
	simfree(buf);
	return true;
}

void model_end(struct host *h, struct exec *x, int error, bool save_failed)
{
	if (h->dying || simstore_stopped(h->ss)) /* model_died takes it over */
		return;
	struct world_counters *n = &h->w->count;
	n->no_room += error == -ERR_NOSPC;
	if (save_failed && h->seen->role == ROLE_SECONDARY)
		n->cow_errors[h->seen->settings.on_cow_error]++;
	for (uint32_t i = 0; error && !x->active && i < x->n; i++)
		h->failed[x->vol][x->first + i] = 1;
	ver *now = now_of(h, x) + x->first;
	if (x->io && !error)
		x->io->executed = true;
	h->own |= !x->active && x->io && !x->io->stream;
	x->io = NULL;
	if (error && !settle_failed(h, x))
		return;
	if (error && x->active) { /* words that were not published may be found by the next start */
		x->lost = true;
		running_end(h, x);
		return;
	}
	if (error) { /* from here on it is the write that was done */
		simfree(x->vers);
		x->vers = simdup(now, x->n * sizeof(ver));
	}
	for (uint32_t i = 0; i < x->n; i++)
		now[i] = exec_ver(x, x->first + i);
	running_end(h, x);
}

/* ---- syncs ---- */

void model_sync_begin(struct host *h, uint64_t *mark)
{
	*mark = ++h->w->tick;
}

static void fold(struct host *h, const struct exec *x)
{
	struct image *m = x->active ? &h->act[x->vol] : &h->disk[x->vol];
	for (uint32_t i = 0; i < x->n; i++) {
		m->durable[x->first + i] = exec_ver(x, x->first + i);
		m->since[x->first + i] = x->begin;
	}
}

/* What had ended when the sync began is durable. */
void model_synced(struct host *h, uint64_t mark, int disk)
{
	unsigned kept = 0;
	if (h->dying || simstore_stopped(h->ss))
		return;
	if (disk == MODEL_ACTIVES && h->active_failed && h->active_failed < mark)
		world_fail(h->w,
			   "host %u: the active overlays are said to be durable, and a sync of one has failed before",
			   h->id);
	for (unsigned i = 0; i < h->n_log; i++) {
		struct exec *x = &h->log[i];
		bool theirs = disk == MODEL_ACTIVES ? x->active : !x->active && x->vol == (uint32_t)disk;
		if (theirs && x->end < mark && !x->lost) {
			fold(h, x);
			exec_drop(x);
			continue;
		}
		h->log[kept++] = *x;
	}
	h->n_log = kept;
}

/* Nothing that was not durable yet ever will be, except by being written again; flushes fail from now on (I10). For an
 * overlay that is a sync of either file, and not only a flush's: a write to blocks that active holds syncs their words
 * itself, and its failure takes along those of writes that were answered before and not flushed. */
void model_sync_failed(struct host *h, bool active, uint32_t vol)
{
	if (h->dying || simstore_stopped(h->ss))
		return;
	/* What a flush has synced whose answer is still to come is durable. */
	const uint64_t *done = h->active_synced[vol], covered = !active ? 0 : done[0] < done[1] ? done[0] : done[1];
	if (active && !h->active_failed)
		h->active_failed = ++h->w->tick;
	for (unsigned i = 0; i < h->n_log; i++)
		h->log[i].lost |= h->log[i].active == active && h->log[i].vol == vol && h->log[i].end >= covered;
	for (struct running *r = h->running; r; r = r->next)
		r->x.lost |= r->x.active == active && r->x.vol == vol;
}

/* ---- the stream ---- */

static void str_begin(struct host *h)
{
	if (h->str_valid)
		return;
	h->str_valid = true;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		units_copy(h->w, v, h->str[v], peer_of(h)->disk[v].now);
	/* A read that waited over the end of a session is asked anew in this one; writes that failed with the old one,
	 * its own place in whose stream was behind them, may or may not be there. */
	for (struct sim_io *o = h->ios; o; o = o->next)
		if (o->before && detached(h, o->io.volume))
			memcpy(o->before, h->str[o->io.volume] + UNITS_IN(o->io.off),
			       UNITS_IN(o->io.len) * sizeof(ver));
}

void model_session(struct host *h)
{
	h->str_valid = false;
	h->last_flush_seq = 0;
	h->peer_life = peer_of(h)->life;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		memset(h->failed[v], 0, h->w->units[v]);
}

static bool written(struct host *h, uint32_t vol, uint32_t u)
{
	for (const struct running *r = h->running; r; r = r->next)
		if (exec_covers(&r->x, false, vol, u))
			return true;
	return false;
}

/* I4 to the letter: the disk is what the peer will hold, or the unit is in flight. */
bool model_in_flight(struct host *h, uint32_t vol, uint32_t u)
{
	if (written(h, vol, u))
		return true;
	for (struct sim_io *s = h->ios; s; s = s->next)
		if (s->v && !s->forwarded && s->io.volume == vol && u >= UNITS_IN(s->io.off) &&
		    u < UNITS_IN(s->io.off + s->io.len))
			return true;
	return false;
}

static void str_check(struct host *h, const char *when)
{
	struct world *w = h->w;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		if (model_stale(h, v))
			continue;
		for (uint32_t u = 0; u < w->units[v]; u++)
			if (h->str[v][u] != h->disk[v].now[u] &&
			    model_shows(w, h->str[v][u]) != model_shows(w, h->disk[v].now[u]) && !h->failed[v][u] &&
			    !model_in_flight(h, v, u))
				world_fail(w, "host %u: %s unit %u of volume %u is %s, and what was sent is %s", h->id,
					   when, u, v, text_of(w, h->disk[v].now[u]), text_of(w, h->str[v][u]));
	}
}

static uint32_t volume_by_id(struct host *h, uint32_t id)
{
	const struct repl_meta *m = repl_meta(h->core);
	for (uint32_t i = 0; i < m->n_volumes; i++)
		if (m->volumes[i].id == id)
			return i;
	world_fail(h->w, "host %u sends a frame for volume id %u", h->id, id);
}

void model_sent(struct host *h, const struct repl_action *a, struct sim_io *s, struct sent *sent)
{
	struct world *w = h->w;
	if (a->frame.type == WIRE_RESYNC_BEGIN || a->frame.type == WIRE_READ_REQ || sent)
		str_begin(h);
	if (!sent)
		return;
	h->sent_n += a->io != NULL;
	if (!a->io)
		h->barrier_n = h->sent_n;
	if (a->io) {
		if (s) {
			if (s->forwarded)
				world_fail(w, "host %u: a write is sent a second time", h->id);
			model_fill(h, s);
			s->forwarded = true;
		}
		sent->vol = volume_by_id(h, a->frame.volume);
		sent->first = UNITS_IN(a->frame.offset);
		sent->n = UNITS_IN(a->frame.length);
		ver *str = h->str[sent->vol] + sent->first;
		bool hash = a->frame.type == WIRE_HASH;
		bool verify = a->frame.type == WIRE_VERIFY;
		/* Without s: a repair. */
		if (hash || verify || !s || a->frame.type == WIRE_RESYNC_WRITE || a->frame.type == WIRE_RESYNC_ZERO) {
			/* [RSLOCK] the region is read and sent while nobody writes it. */
			sent->vers = simdup(h->disk[sent->vol].now + sent->first, sent->n * sizeof(ver));
			for (struct running *r = h->running; r; r = r->next)
				if (!r->x.active && r->x.vol == sent->vol && r->x.first < sent->first + sent->n &&
				    sent->first < r->x.first + r->x.n)
					world_fail(w, "host %u: a resync sends units %u+%u while %u+%u are written",
						   h->id, sent->first, sent->n, r->x.first, r->x.n);
			/* By its hash: what is equal there counts as this write; what is not follows. */
			for (uint32_t i = 0; i < sent->n && !verify; i++)
				if (!hash || model_shows(w, str[i]) == model_shows(w, sent->vers[i]))
					str[i] = sent->vers[i];
		} else {
			sent->v = s->v;
			for (uint32_t i = 0; i < sent->n; i++)
				str[i] = s->v;
			memset(h->failed[sent->vol] + sent->first, 0, sent->n);
		}
		return;
	}
	if (a->frame.type == WIRE_CHECKPOINT || a->frame.type == WIRE_RESYNC_DONE) {
		sent->number = a->frame.offset;
		for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
			sent->snap[v] = units_dup(w, v, h->str[v]);
			if (a->frame.type == WIRE_RESYNC_DONE)
				units_copy(w, v, h->adopt[v], h->str[v]);
		}
		if (a->frame.type == WIRE_RESYNC_DONE)
			str_check(h, "at the end of the resync");
	}
}

/* Whether the next sync of a disk leaves something else there than it shows now: what failed ones have lost. */
static bool lost_differs(struct host *h, uint32_t vol, uint32_t u)
{
	const struct world *w = h->w;
	ver shown = model_shows(w, h->disk[vol].now[u]);
	bool differs = model_shows(w, h->disk[vol].durable[u]) != shown;
	for (unsigned i = 0; i < h->n_log; i++) {
		const struct exec *x = &h->log[i];
		if (exec_covers(x, false, vol, u))
			differs = model_shows(w, exec_ver(x, u)) != shown || (x->lost && differs);
	}
	return differs;
}

/* What is equal counts as if the source's write had been carried out here: as durable as what is there already, or with
 * the next sync, but for what a failed one has lost. */
static void hash_equal(struct host *h, const struct sent *sent)
{
	struct world *w = h->w;
	ver *now = h->disk[sent->vol].now + sent->first;
	for (uint32_t i = 0; i < sent->n; i++)
		if (model_shows(w, now[i]) == model_shows(w, sent->vers[i]))
			now[i] = sent->vers[i];
	for (uint32_t i = 0, first; i < sent->n; i++) {
		for (first = i; i < sent->n && now[i] == sent->vers[i] && !lost_differs(h, sent->vol, sent->first + i);)
			i++;
		if (i == first)
			continue;
		struct exec x = {.vol = sent->vol, .first = sent->first + first, .n = i - first};
		x.vers = simdup(sent->vers + first, x.n * sizeof(ver));
		x.begin = ++w->tick;
		x.end = ++w->tick;
		log_add(h, &x);
	}
}

void model_hashed(struct host *h, const struct sim_io *s)
{
	struct world *w = h->w;
	const struct sent *sent = s->sent;
	uint64_t differ = 0;
	if (h->dying || simstore_stopped(h->ss))
		return;
	for (uint32_t i = 0; i < sent->n; i++)
		if (model_shows(w, sent->vers[i]) != model_shows(w, h->disk[sent->vol].now[sent->first + i]))
			differ |= UINT64_C(1) << (((uint64_t)i * WORLD_UNIT) >> REGION_SHIFT);
	w->count.hashes++;
	w->count.hashes_differ += differ != 0;
	/* What can't be read counts as different. */
	if (differ & ~s->io.ext_len || (s->io.ext_len != differ && !h->had_errors))
		world_fail(w, "host %u: hashes of units %u+%u of volume %u say that %" PRIx64 " differ, not %" PRIx64,
			   h->id, sent->first, sent->n, sent->vol, s->io.ext_len, differ);
	hash_equal(h, sent);
}

/* At its place in the stream both disks hold the same, block by block, whatever guests do meanwhile; what can't be read
 * is said to be so. Where applying has stopped it may stand behind a write that failed: nobody hears what it finds. */
void model_compared(struct host *h, const struct sim_io *s)
{
	struct world *w = h->w;
	const struct sent *sent = s->sent;
	struct wire_verify_range x[WIRE_VERIFY_RANGES_MAX];
	if (h->dying || simstore_stopped(h->ss) || w->planted || h->stopped)
		return;
	for (uint32_t i = 0; i < sent->n; i++)
		if (model_shows(w, sent->vers[i]) != model_shows(w, h->disk[sent->vol].now[sent->first + i]))
			world_fail(w, "host %u: verify: unit %u of volume %u is %s there and %s here", h->id,
				   sent->first + i, sent->vol, text_of(w, sent->vers[i]),
				   text_of(w, h->disk[sent->vol].now[sent->first + i]));
	int n = wire_verify_answer_decode(x, s->io.off, s->io.len, s->io.payload, s->io.ext_len, NULL);
	for (int i = 0; i < n; i++)
		/* A block that the source could not read differs from what it is said to be: it knows. */
		if (!(x[i].problem == WIRE_VERIFY_UNREADABLE ? h : peer_of(h))->had_errors)
			world_fail(w, "host %u: verify finds %" PRIu64 "+%" PRIu64 " of volume %u (%" PRIu64 ")", h->id,
				   x[i].off, x[i].len, sent->vol, x[i].problem);
	if (n < 0)
		world_fail(w, "host %u: verify: an answer that does not decode", h->id);
}

void model_received(struct host *h, struct sim_io *s)
{
	(void)h;
	(void)s;
}

/* A barrier of the stream is about to be carried out: everything before it is applied. */
void model_barrier(struct host *h, const struct repl_io *io)
{
	struct world *w = h->w;
	if (h->dying)
		return;
	if (io->session == h->barrier_session && io->seq < h->last_flush_seq)
		world_fail(w, "host %u: barrier %" PRIu64 " after %" PRIu64, h->id, io->seq, h->last_flush_seq);
	for (struct sim_io *s = h->streams; s; s = s->next)
		if (s->io.session == io->session && s->io.seq < io->seq && s->io.kind != REPL_FLUSH &&
		    s->io.kind != REPL_READ && s->io.kind != REPL_DETACH && s->io.kind != REPL_ATTACH)
			world_fail(w, "host %u: barrier %" PRIu64 " before frame %" PRIu64 " is applied", h->id,
				   io->seq, s->io.seq);
	h->barrier_session = io->session;
	h->last_flush_seq = io->seq;
	const struct sim_io *s = CONTAINER_OF(io, struct sim_io, io);
	for (uint32_t v = 0; s->sent && v < WORLD_VOLUMES && s->sent->snap[v]; v++)
		for (uint32_t u = 0; u < w->units[v]; u++)
			if (h->disk[v].now[u] != s->sent->snap[v][u])
				world_fail(
				    w, "host %u: at the barrier %s the disk's unit %u of volume %u is %s, sent was %s",
				    h->id, wire_type_name(s->sent->type), u, v, text_of(w, h->disk[v].now[u]),
				    text_of(w, s->sent->snap[v][u]));
}

/* ---- what guests were told ---- */

static void done_push(struct done_list *l, const struct done *d)
{
	if (l->n == l->cap) {
		l->cap = l->cap ? 2 * l->cap : 64;
		l->d = simrealloc(l->d, l->cap * sizeof(*l->d));
	}
	l->d[l->n++] = *d;
}

static void done_drop(struct done_list *l, uint64_t n)
{
	if (n == 0)
		return;
	memmove(l->d, l->d + n, (l->n - n) * sizeof(*l->d));
	l->n -= n;
	l->base += n;
}

static void done_clear(struct done_list *l)
{
	done_drop(l, l->n);
}

/* What it had received and not applied is dropped, so that nothing lands behind a write that is missing
 * (docs/FAILURES.md). Under B a guest was told that it was received: until the next resync that is on its primary only.
 */
void model_stopped(struct host *h)
{
	if (!h->had_errors && !h->had_full)
		world_fail(h->w, "host %u: applying stops, and nothing has failed there", h->id);
	h->stopped = true;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		for (uint32_t u = 0; u < h->w->units[v]; u++)
			if (h->prom_received[v][u] > h->disk[v].now[u])
				h->prom_received[v][u] = h->disk[v].now[u];
}

/* ---- changes of the record ---- */

static void promises_check(struct host *h, const ver *const have[WORLD_VOLUMES])
{
	struct world *w = h->w;
	static const char *const what[] = {"flushed", "applied", "received"};
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		const ver *need[] = {h->prom_flushed[v], h->prom_applied[v], h->prom_received[v]};
		for (unsigned k = 0; k < ARRAY_LEN(need); k++)
			for (uint32_t u = 0; u < w->units[v]; u++)
				if (have[v][u] < need[k][u] && model_shows(w, have[v][u]) != model_shows(w, need[k][u]))
					world_fail(w,
						   "host %u: failover to latest has %s in unit %u of volume %u, but "
						   "the guest was told that "
						   "%s is %s by it",
						   h->id, text_of(w, have[v][u]), u, v, text_of(w, need[k][u]),
						   what[k]);
	}
}

static void promises_forget(struct host *h)
{
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		units_set(h->w, v, h->prom_flushed[v], 0);
		units_set(h->w, v, h->prom_applied[v], 0);
		units_set(h->w, v, h->prom_received[v], 0);
	}
}

static void failed_over(struct host *h, const struct repl_meta *old, const struct repl_meta *m)
{
	struct world *w = h->w;
	w->count.failovers++;
	world_note(w, "host %u: failed over to %" PRIu64 ", received %" PRIu64, h->id, m->target, m->received);
	if (m->received && !ghost_find(h, m->received))
		world_fail(w, "host %u: the checkpoint as received, %" PRIu64 ", was not opened", h->id, m->received);
	/* [FENCEFO] what was received is applied, and no worker of the session goes on. */
	if (h->streams)
		world_fail(w, "host %u: fails over while frame %" PRIu64 " of the stream is not applied", h->id,
			   h->streams->io.seq);
	/* [FOGEN] that shuts the old primary out. */
	if (m->lineage.current == old->lineage.current || m->lineage.current == peer_of(h)->seen->lineage.current)
		world_fail(w, "host %u: a failover begins no generation", h->id);
	/* [FOFLUSH] what that checkpoint says, and what latest is from now on, is there whatever happens. */
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		for (uint32_t u = 0; u < w->units[v]; u++)
			if (model_shows(w, h->disk[v].now[u]) != model_shows(w, h->disk[v].durable[u]))
				world_fail(w, "host %u: a failover keeps unit %u of volume %u as %s, durable is %s",
					   h->id, u, v, text_of(w, h->disk[v].now[u]),
					   text_of(w, h->disk[v].durable[u]));
	/* [FOKEEP] nothing that was received is thrown away. */
	if (!m->received && old->n_ckpts && !old->broken)
		world_fail(w, "host %u: a failover keeps no checkpoint of the disk as received", h->id);
	/* [LATESTINC] nobody has asked for a torso while there was something whole. */
	if (m->target == 0 && old->inconsistent && (old->kept || old->last_stream))
		world_fail(w, "host %u: a failover takes a disk whose resync has not ended", h->id);
	const ver *have[WORLD_VOLUMES];
	struct ghost *g = m->target ? base_of(h, m->target) : NULL;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		have[v] = g ? g->v[v] : h->disk[v].now;
	/* Latest of an unfinished resync is what was kept before it. */
	if (old->inconsistent ? m->target && m->target == old->kept : m->target == 0)
		promises_check(h, have);
	promises_forget(h);
	done_clear(&h->done_peer);
}

static void committed(struct host *h, const struct repl_meta *old)
{
	struct world *w = h->w;
	struct ghost *base = base_of(h, old->base);
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		for (uint32_t u = 0; u < w->units[v]; u++) {
			ver want = view_ver(h, base, v, u);
			if (model_shows(w, h->disk[v].now[u]) != model_shows(w, want))
				world_fail(w, "host %u: the commit has ended and unit %u of volume %u is %s, not %s",
					   h->id, u, v, text_of(w, h->disk[v].now[u]), text_of(w, want));
			if (model_shows(w, h->disk[v].durable[u]) != model_shows(w, want))
				world_fail(
				    w,
				    "host %u: the commit has ended and unit %u of volume %u is durable as %s, not %s",
				    h->id, u, v, text_of(w, h->disk[v].durable[u]), text_of(w, want));
			/* Zeroes that came after the base, over a hole of the disk, are still there: they change
			 * nothing, so nothing was saved for them (image/cow.c), the commit has nothing to take back and
			 * no dirty set has them. No resync sends them again, so it is by them that a later flush must
			 * find the peer's write. Of what shows the same the newer is what is here; durable is what was
			 * synced of it. */
			h->disk[v].now[u] = at_least(h->disk[v].now[u], want);
			h->disk[v].durable[u] = at_least(h->disk[v].durable[u], want);
		}
}

static void adopted(struct host *h, const struct repl_meta *m)
{
	struct world *w = h->w;
	w->count.resyncs++;
	struct host *s = peer_of(h);
	if (s->seen->lineage.current == m->lineage.current)
		s->wrote_alone = false;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		for (uint32_t u = 0; u < w->units[v]; u++) {
			if (model_shows(w, h->disk[v].durable[u]) != model_shows(w, h->disk[v].now[u]))
				world_fail(
				    w, "host %u: adopts with unit %u of volume %u not durable: %s, durable is %s",
				    h->id, u, v, text_of(w, h->disk[v].now[u]), text_of(w, h->disk[v].durable[u]));
			ver have = h->disk[v].now[u]; /* a source that lost power may have lost what was not flushed */
			ver *need[] = {&h->prom_flushed[v][u], &h->prom_applied[v][u], &h->prom_received[v][u]};
			for (unsigned k = 0; k < ARRAY_LEN(need); k++)
				*need[k] = *need[k] < have ? *need[k] : have;
		}
}

/* A switchover: the primary steps down, with nothing dirty, on a checkpoint that the peer has. */
static void handed_over(struct host *h, const struct repl_meta *old, const struct repl_meta *m)
{
	struct world *w = h->w;
	struct host *p = peer_of(h);
	w->count.hand_overs++;
	if (old->role != ROLE_PRIMARY || m->role != ROLE_SECONDARY || m->state != STATE_RUNNING ||
	    m->lineage.current != old->lineage.current)
		world_fail(w, "host %u: hands over as %s %s", h->id, role_name(m->role), state_name(m->state));
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		for (uint32_t u = 0; u < w->units[v]; u++) {
			ver here = model_shows(w, h->disk[v].now[u]);
			if (here != model_shows(w, h->disk[v].durable[u]))
				world_fail(w, "host %u: hands over with unit %u of volume %u not durable: %s", h->id, u,
					   v, text_of(w, h->disk[v].now[u]));
			/* The peer may have failed over meanwhile, or been replaced: nobody here can know. */
			if (p->seen->role == ROLE_SECONDARY && p->seen->last_stream == m->last_stream &&
			    here != model_shows(w, p->disk[v].durable[u]))
				world_fail(w, "host %u: hands over unit %u of volume %u, %s; the peer has %s", h->id, u,
					   v, text_of(w, h->disk[v].now[u]), text_of(w, p->disk[v].durable[u]));
		}
	h->own = h->wrote_alone = false;
}

/* The secondary takes over: never beside a primary, never without what that had answered, durably. */
static void took_over(struct host *h, const struct repl_meta *old, const struct repl_meta *m)
{
	struct world *w = h->w;
	struct host *p = peer_of(h);
	w->count.switchovers++;
	world_note(w, "host %u: has taken over", h->id);
	/* A record whose save was said to have failed, found by a start: the peer may have failed over since, which
	 * knows this generation as a past one, and this host steps down when it hears of it, like any old primary. */
	const struct lineage *ahead = &p->seen->lineage;
	bool past = ahead->current != m->lineage.current &&
		    (ahead->bitmap == m->lineage.current || lineage_has(ahead, m->lineage.current));
	if (p->seen->role == ROLE_PRIMARY && past)
		return;
	if (p->seen->role == ROLE_PRIMARY)
		world_fail(w, "host %u: takes over beside a primary", h->id);
	if (old->inconsistent || m->lineage.current != old->lineage.current || m->last_stream != old->last_stream)
		world_fail(w, "host %u: takes over what is not the same", h->id);
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		for (uint32_t u = 0; u < w->units[v]; u++) {
			if (h->act[v].now[u] != NOT_THERE)
				world_fail(w, "host %u: takes over, and its view's unit %u of volume %u is lost", h->id,
					   u, v);
			if (!p->seen->handed) /* failed over, or replaced, since its JOIN */
				continue;
			ver have = h->disk[v].durable[u], told = p->told[v][u].v;
			if (model_shows(w, have) != model_shows(w, p->disk[v].now[u]))
				world_fail(w, "host %u: takes over unit %u of volume %u as %s; the peer had %s", h->id,
					   u, v, text_of(w, have), text_of(w, p->disk[v].now[u]));
			if (told > have && told > p->disk[v].now[u] && model_shows(w, told) != model_shows(w, have) &&
			    told >= p->reign_from &&
			    p->told[v][u].ns >= p->died_ns && /* what it had not flushed may have died with it */
			    p->told[v][u].ns >= h->died_ns)   /* or, of a detached disk, with the peer */
				world_fail(w, "host %u: takes over without %s, which was answered", h->id,
					   text_of(w, told));
		}
	h->wrote_alone = false;
}

/* There is nothing in the active overlays. */
static void active_clear(struct host *h)
{
	unsigned kept = 0;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		units_set(h->w, v, h->act[v].now, NOT_THERE);
		units_set(h->w, v, h->act[v].durable, NOT_THERE);
	}
	for (unsigned i = 0; i < h->n_log; i++) {
		if (h->log[i].active)
			exec_drop(&h->log[i]);
		else
			h->log[kept++] = h->log[i];
	}
	h->n_log = kept;
}

static void active_emptied(struct host *h, bool is_committed)
{
	h->emptied_ns = h->w->now;
	h->active_failed = 0;
	if (!is_committed) /* the secondary's own writes are given up */
		done_clear(&h->done);
	active_clear(h);
	for (unsigned i = 0; i < EXECS_MAX; i++)
		if (h->execs[i].active)
			h->execs[i].n = 0;
	for (struct running *r = h->running; r; r = r->next)
		if (r->x.active)
			world_fail(h->w, "host %u: the active overlay is emptied while it is written", h->id);
}

static void number_check(struct host *h, uint64_t number)
{
	if (number <= h->numbers_max)
		world_fail(h->w, "host %u: checkpoint %" PRIu64 " is made after %" PRIu64, h->id, number,
			   h->numbers_max);
	h->numbers_max = number;
	h->numbers_ever = number > h->numbers_ever ? number : h->numbers_ever;
}

/* on_cow_error: what a secondary may give up so that it can go on (SPEC 7). */
static void room_check(struct host *h, const struct repl_meta *old, const struct repl_meta *m)
{
	/* In DONE the disk is its host's own: room for history never fails a write there (docs/adr/0006). */
	if (m->role != ROLE_SECONDARY || old->role != ROLE_SECONDARY || old->state == STATE_DONE)
		return;
	if (m->broken && !old->broken) {
		h->w->count.broken++;
		if (old->settings.on_cow_error != ON_COW_ERROR_BREAK || old->inconsistent || m->n_ckpts)
			world_fail(h->w, "host %u: its checkpoints are given up, and that was not asked for", h->id);
	}
	for (uint32_t i = 0; i < old->n_ckpts && !m->broken; i++) {
		const struct repl_ckpt *c = &old->ckpts[i];
		bool gone = repl_meta_find_ckpt(m, c->number) < 0;
		if (gone && (c->number == m->base || c->number == m->kept || c->number == m->last_stream))
			world_fail(h->w, "host %u: checkpoint %" PRIu64 " is gone, and is needed", h->id, c->number);
		if (gone && c->number == old->last_stream && m->last_stream == 0 && !m->inconsistent)
			world_fail(h->w, "host %u: the last checkpoint, %" PRIu64 ", is gone", h->id, c->number);
	}
}

static bool drop_asked(const struct host *h, uint64_t number)
{
	for (const struct sim_command *c = h->commands; c; c = c->next)
		if (c->c.cmd == CMD_DROP && c->c.number == number)
			return true;
	for (unsigned i = 0; i < h->n_drops; i++)
		if (h->drops[i] == number)
			return true;
	return false;
}

static bool is_apart(const struct host *h, const struct repl_ckpt *c)
{
	char buf[HOLDER_SIZE];
	return (c->flags & (CKPT_PINNED | CKPT_JOB)) || repl_holder(h->core, c->number, 0, buf);
}

/* Was it neither counted nor dropped already when the merge may have begun that a drop ends? */
static bool was_apart(const struct host *h, const struct repl_ckpt *c)
{
	for (unsigned i = 0; i < h->n_late; i++)
		if (h->late[i] == c->number)
			return false;
	return is_apart(h, c);
}

/* How many stretches of one period `of` begin among the unpinned checkpoints above index i, and whether i goes on with
 * the last of them. */
static uint64_t periods_above(const struct host *h, const struct repl_meta *m, uint32_t i, uint64_t of,
			      bool *ret_goes_on)
{
	uint64_t n = 0, last = 0;
	for (uint32_t k = m->n_ckpts; k-- > i + 1;) {
		if (was_apart(h, &m->ckpts[k]))
			continue;
		n += n == 0 || m->ckpts[k].time_ns / of != last;
		last = m->ckpts[k].time_ns / of;
	}
	*ret_goes_on = n && m->ckpts[i].time_ns / of == last;
	return n;
}

/* What the overlay of a checkpoint held when the core last heard of it, or -1. */
static int64_t epoch_bytes(const struct host *h, uint64_t number)
{
	const struct repl_usage *u = &h->x.usage;
	for (uint32_t i = 0; i < u->n; i++)
		if (u->numbers[i] == number)
			return (int64_t)u->bytes[i];
	return -1;
}

static bool same_disks(struct host *h, uint64_t a, uint64_t b)
{
	const struct ghost *x = ghost_find(h, a), *y = ghost_find(h, b);
	for (uint32_t v = 0; v < WORLD_VOLUMES && x && y; v++)
		for (uint32_t u = 0; u < h->w->units[v]; u++)
			if (model_shows(h->w, x->v[v][u]) != model_shows(h->w, y->v[v][u]))
				return false;
	return x && y;
}

/* The least that the settings have kept since a checkpoint was dropped: the merge of the next may have begun then. */
static void least_kept(struct host *h, const struct settings *s, bool dropped)
{
	struct settings *l = &h->least;
	if (dropped) {
		h->n_late = 0;
		*l = *s;
		return;
	}
	l->keep_last = l->keep_last < s->keep_last ? l->keep_last : s->keep_last;
	l->keep_minutely = l->keep_minutely < s->keep_minutely ? l->keep_minutely : s->keep_minutely;
	l->keep_hourly = l->keep_hourly < s->keep_hourly ? l->keep_hourly : s->keep_hourly;
	l->keep_daily = l->keep_daily < s->keep_daily ? l->keep_daily : s->keep_daily;
	l->history_max_bytes |= s->history_max_bytes;
}

/* Retention may drop what no setting keeps (docs/adr/0010). Where there was no room, or little is allowed, more goes.
 */
static void retention_check(struct host *h, const struct repl_meta *old, const struct repl_meta *m)
{
	const struct settings *s = &h->least;
	bool room = h->had_errors || h->had_full || h->errors_one_in || h->path_errors.path || h->faulty ||
		    s->history_max_bytes || m->settings.history_max_bytes;
	if (room || m->n_ckpts == 0 || old->role == ROLE_PRIMARY || m->role == ROLE_PRIMARY)
		return;
	uint64_t above = 0, differ = 0;
	for (uint32_t i = old->n_ckpts; i-- > 0;) {
		const struct repl_ckpt *c = &old->ckpts[i];
		bool is_pinned = is_apart(h, c), gone = repl_meta_find_ckpt(m, c->number) < 0;
		/* An overlay may hold blocks that were written with what they held, but not lack one that changed. */
		int64_t epoch = i ? epoch_bytes(h, old->ckpts[i - 1].number) : -1;
		bool same = gone && i && same_disks(h, old->ckpts[i - 1].number, c->number);
		bool differs = i == 0 || (epoch != 0 && !same); /* by now the merge may have brought some */
		if (gone && epoch == 0 && !same && !drop_asked(h, c->number))
			world_fail(
			    h->w, "host %u: checkpoint %" PRIu64 " counts for nothing, and differs from the one before",
			    h->id, c->number);
		/* What it has begun to drop as a primary, it still drops when it is none any more. */
		bool was_going = c->number <= h->reign_number;
		if (gone && !drop_asked(h, c->number) && !(c->flags & CKPT_JOB) && !was_going) {
			static const uint64_t of[] = {60 * SEC, 3600 * SEC, 86400 * SEC};
			const uint64_t keep[] = {s->keep_minutely, s->keep_hourly, s->keep_daily};
			bool kept = is_pinned || above < s->keep_last || (differs && differ < s->keep_last);
			for (unsigned k = 0; k < 3; k++) {
				bool goes_on;
				kept |= periods_above(h, old, i, of[k], &goes_on) < keep[k] && !goes_on;
			}
			if (kept)
				world_fail(h->w, "host %u: checkpoint %" PRIu64 " is gone, and retention keeps it",
					   h->id, c->number);
			h->w->count.retained++;
		}
		bool counts = !was_apart(h, c);
		above += counts;
		differ += counts && differs;
	}
}

/* [SYNCFROM] An unfinished target wrote nothing alone: it is in no split brain with the primary that it follows, unless
 * one stands recorded already, or it remembers a detached disk of it. */
static void split_check(struct host *h, const struct repl_meta *old, const struct repl_meta *m)
{
	const struct repl_meta *p = peer_of(h)->seen;
	const struct repl_meta *t = m->role == ROLE_SECONDARY ? m : p, *s = t == m ? p : m;
	if (!m->split_brain || old->split_brain || p->split_brain || model_stale(h, 0) || model_stale(h, 1))
		return;
	if (t->role == ROLE_SECONDARY && t->inconsistent && s->role == ROLE_PRIMARY && !s->inconsistent)
		world_fail(h->w, "host %u: a split brain, and one of the two copies is an unfinished target", h->id);
}

/* The record is on the disk and the switch is made in memory: what the next start finds if nothing else happens. */
void model_publish(struct host *h, const struct repl_meta *m, const struct repl_save *s)
{
	struct world *w = h->w;
	const struct repl_meta *old = h->seen;
	if (m->ckpt_max < old->ckpt_max)
		world_fail(w, "host %u: ckpt_max goes back from %" PRIu64 " to %" PRIu64, h->id, old->ckpt_max,
			   m->ckpt_max);
	world_note(w,
		   "host %u: record %s %s base %" PRIu64 " last %" PRIu64 " kept %" PRIu64 " cur %" PRIx64
		   " bm %" PRIx64 "%s%s%s%s ckpt %" PRIu64 " drop %" PRIu64,
		   h->id, role_name(m->role), state_name(m->state), m->base, m->last_stream, m->kept,
		   m->lineage.current, m->lineage.bitmap, m->alone ? " alone" : "",
		   m->inconsistent ? " inconsistent" : "", m->split_brain ? " split" : "",
		   m->shut_out ? " shut_out" : "", s->ckpt, s->drop);
	bool failover = m->failover_generation != 0 && m->failover_generation != old->failover_generation;
	if (s->ckpt) {
		number_check(h, s->ckpt);
		w->count.checkpoints++;
		ghost_add(h, s->ckpt, (enum ckpt_kind)m->ckpts[m->n_ckpts - 1].kind);
	}
	if (failover)
		failed_over(h, old, m);
	room_check(h, old, m);
	split_check(h, old, m);
	retention_check(h, old, m);
	least_kept(h, &m->settings, s->drop || s->drop_through);
	bool is_committed = old->state == STATE_FAILOVER && m->state == STATE_DONE;
	if (is_committed)
		committed(h, old);
	if (failover)
		h->own = true;
	if (m->handed && !old->handed)
		handed_over(h, old, m);
	if (old->role == ROLE_SECONDARY && old->state == STATE_RUNNING && m->role == ROLE_PRIMARY)
		took_over(h, old, m);
	bool other = old->role == ROLE_SECONDARY && m->lineage.current != old->lineage.current;
	if (m->role == ROLE_SECONDARY && ((old->inconsistent && !m->inconsistent) || other)) {
		/* [LASTLIN] What it had by itself is given up, and so no default target of a failover. */
		if (h->own && m->last_stream)
			world_fail(w, "host %u: a failover would go back to checkpoint %" PRIu64 ", which was given up",
				   h->id, m->last_stream);
		h->own = false;
	}
	/* Without a mark too: where nothing was dirty, RESYNC_DONE comes alone, and with it the generation that the
	 * source began meanwhile for a flush. */
	other = other && m->lineage.current == peer_of(h)->seen->lineage.current;
	if (m->role == ROLE_SECONDARY && ((old->inconsistent && !m->inconsistent) || other))
		adopted(h, m);
	/* [PREKEEP] a consistent target takes a checkpoint before the first write of a resync. */
	if (m->inconsistent && !old->inconsistent && !m->fresh && m->lineage.current && !m->kept)
		world_fail(w, "host %u: a resync begins, and what this host had is not kept", h->id);
	if (m->shut_out && !old->shut_out && h->wrote_alone)
		world_fail(w, "host %u steps down though it has answered guests alone: that is a split brain", h->id);
	if (s->active_id != old->active_id)
		active_emptied(h, is_committed);
	if (m->role != ROLE_PRIMARY && old->role == ROLE_PRIMARY)
		h->reign_number = old->n_ckpts ? old->ckpts[old->n_ckpts - 1].number : 0;
	if (m->role == ROLE_PRIMARY && old->role != ROLE_PRIMARY)
		h->reign_from = w->n_writes;
	if (m->role != old->role || (m->inconsistent && !old->inconsistent)) {
		done_clear(&h->done);
		done_clear(&h->done_peer);
	}
	clones_publish(h, m);
	repl_meta_copy(h->seen, m);
	ghosts_keep(h, m);
	world_moment(h);
}

/* ---- guests' answers ---- */

/* Whether `image` has write d or one after it. */
static void done_check(struct host *h, const struct done *d, const ver *have, unsigned where, const char *what)
{
	for (uint32_t u = d->first; u < d->first + d->n; u++)
		if (have[u] < d->v || have[u] == NOT_THERE)
			world_fail(h->w, "host %u: %s, but unit %u of volume %u is %s on host %u, not %s", h->id, what,
				   u, d->vol, text_of(h->w, have[u]), where, text_of(h->w, d->v));
}

/* Whether p is still what h's session was with: it may have failed over, or died with what it had not synced, while its
 * answer was on the way. */
static bool follows(struct host *p, struct host *h)
{
	return p->up && p->life == h->peer_life && p->seen->role == ROLE_SECONDARY &&
	       (repl_detached(h->core) || p->seen->lineage.current == h->seen->lineage.current);
}

static void read_done(struct host *h, struct sim_io *s, int error);

static void flush_done(struct host *h, struct sim_io *s)
{
	struct host *p = peer_of(h);
	uint64_t n = s->done_before > h->done.base ? s->done_before - h->done.base : 0;
	n = n < h->done.n ? n : h->done.n;
	for (uint64_t i = 0; i < n; i++) {
		const struct done *d = &h->done.d[i];
		/* On the peer's word. One that had flushed the disk before it failed goes by that, as long as the peer
		 * has not heard of the detach: until then the disk is the current one, and has it durably. */
		if (s->io.target == TARGET_DISK && s->io.strict && detached(h, d->vol)) {
			if (follows(p, h))
				done_check(h, d, p->disk[d->vol].durable, p->id,
					   "a flush has ended on a detached disk");
			continue;
		}
		/* A commit that has ended meanwhile has brought it from active to the disk. */
		bool active = s->io.target == TARGET_ACTIVE && h->emptied_ns < s->begun_ns;
		done_check(h, d, active ? h->act[d->vol].durable : h->disk[d->vol].durable, h->id, "a flush has ended");
	}
	done_drop(&h->done, n);
	/* [RSBARRIER] Whether it waits for the peer or not: what was sent before it is not passed by what comes after.
	 */
	if (s->session && h->conn && h->conn->session == s->session && repl_forwarding(h->core) &&
	    h->barrier_n < s->sent_before)
		world_fail(h->w, "host %u: a flush has ended, and the peer was sent no barrier for it", h->id);
	uint64_t prot = repl_meta(h->core)->settings.protocol;
	bool still = s->session && h->conn && h->conn->session == s->session && repl_forwarding(h->core) &&
		     world_link(h->w, h->id) == LINK_SYNCED;
	if (!s->promised || !still || !follows(p, h) || (prot != PROTOCOL_F && prot != PROTOCOL_C))
		return;
	/* I2: all before it is durable on the peer. */
	n = s->done_before_peer > h->done_peer.base ? s->done_before_peer - h->done_peer.base : 0;
	n = n < h->done_peer.n ? n : h->done_peer.n;
	for (uint64_t i = 0; i < n; i++) {
		const struct done *d = &h->done_peer.d[i];
		done_check(h, d, p->disk[d->vol].durable, p->id, "a flush has ended in sync");
		for (uint32_t u = d->first; u < d->first + d->n; u++)
			p->prom_flushed[d->vol][u] = at_least(p->prom_flushed[d->vol][u], d->v);
	}
	done_drop(&h->done_peer, n);
}

static void done_drop_strict(struct done_list *l, uint64_t before)
{
	for (uint64_t i = 0; i < l->n && l->base + i < before; i++)
		if (l->d[i].strict)
			l->d[i].n = 0;
}

/* A flush that failed promises nothing of what was before it (I10), and of what went to the peer alone neither does the
 * next: the peer may have lost power with it, and this host has no copy to flush. */
static void flush_failed(struct host *h, const struct sim_io *s)
{
	done_drop_strict(&h->done, s->done_before);
	done_drop_strict(&h->done_peer, s->done_before_peer);
}

void model_done(struct host *h, struct sim_io *s, int error)
{
	struct world *w = h->w;
	if (s->before)
		read_done(h, s, error);
	if (s->io.kind == REPL_READ || (s->io.kind == REPL_WRITE && s->is_read))
		return;
	world_note(w, "host %u: guest's %s %" PRIu64 "+%" PRIu64 " (write %u) ends: %s", h->id,
		   s->io.kind == REPL_FLUSH ? "flush" : "write", s->io.off, s->io.len, s->v,
		   error ? err_name(error) : "ok");
	if (error && s->io.kind == REPL_FLUSH)
		flush_failed(h, s);
	if (error)
		return;
	if (h->handed_ns && s->begun_ns < h->handed_ns)
		world_fail(w, "host %u: has handed over, and goes on answering what was asked of the primary", h->id);
	const struct repl_meta *m = repl_meta(h->core);
	bool live = repl_forwarding(h->core);
	/* Of a detached disk it is answered on the peer's word, behind too: the peer has it. */
	bool alone = s->io.target == TARGET_DISK && m->has_peer && !live && !s->io.strict;
	if (alone)
		h->wrote_alone = true;
	if (alone && !m->alone && (s->io.kind != REPL_FLUSH || m->lineage.current))
		world_fail(w, "host %u: a %s was answered alone, and no generation was begun for it", h->id,
			   s->io.kind == REPL_FLUSH ? "flush" : "write");
	if (s->io.kind == REPL_FLUSH) {
		flush_done(h, s);
		return;
	}
	if (!s->v)
		world_fail(w, "host %u: a write was answered that was never carried out", h->id);
	struct done d = {s->v, s->io.volume, UNITS_IN(s->io.off), UNITS_IN(s->io.len), s->io.strict};
	bool active = s->io.target == TARGET_ACTIVE;
	if (active && h->emptied_ns >= s->begun_ns)
		return;		       /* discarded meanwhile */
	if (!active && !s->executed) { /* through the peer alone */
		if (!detached(h, d.vol) && !s->io.strict)
			world_fail(w, "host %u: a write was answered that was never carried out here", h->id);
		if (follows(peer_of(h), h))
			done_check(h, &d, peer_of(h)->disk[d.vol].now, !h->id, "a write has ended on a detached disk");
	} else {
		done_check(h, &d, active ? h->act[d.vol].now : h->disk[d.vol].now, h->id, "a write has ended");
	}
	done_push(&h->done, &d);
	if (active)
		return;
	for (uint32_t u = d.first; u < d.first + d.n; u++)
		h->told[d.vol][u] = (struct told){d.v, w->now};
	done_push(&h->done_peer, &d);
	if (h->done_peer.n > 2048)
		done_drop(&h->done_peer, 1024);
	if (!s->forwarded || !live || world_link(w, h->id) != LINK_SYNCED || !h->conn || s->session != h->conn->session)
		return;
	struct host *p = peer_of(h);
	uint64_t prot = m->settings.protocol;
	if (!follows(p, h))
		return;
	if (prot == PROTOCOL_C)
		done_check(h, &d, p->disk[d.vol].now, p->id, "a write has ended under C");
	if (prot == PROTOCOL_B && p->stopped) /* its word came before that */
		return;
	ver *prom = prot == PROTOCOL_C ? p->prom_applied[d.vol] : prot == PROTOCOL_B ? p->prom_received[d.vol] : NULL;
	for (uint32_t u = d.first; prom && u < d.first + d.n; u++)
		prom[u] = at_least(prom[u], d.v);
}

/* Nothing was turned over: only what could not be read may be named, and all of it was looked at. */
static void verify_check(struct host *h, const struct repl_verify *v, int error)
{
	struct world *w = h->w;
	uint64_t sizes = 0;
	w->count.verifies++;
	w->count.verify_ends += error == 0;
	w->count.repairs += v->repaired != 0;
	for (uint32_t i = 0; i < v->n; i++)
		if (v->list[i].problem != PROBLEM_UNREADABLE || !(h->had_errors || peer_of(h)->had_errors))
			world_fail(w, "host %u: verify finds %" PRIu64 "+%" PRIu64 " of volume %u (%u, %s)", h->id,
				   v->list[i].off, v->list[i].len, v->list[i].volume, v->list[i].problem,
				   v->list[i].overlay ? "overlay" : "disk");
	for (uint32_t i = 0; i < WORLD_VOLUMES; i++)
		sizes += size_now(h, i);
	if (error == 0 && v->bytes != sizes)
		world_fail(w, "host %u: verify looked at %" PRIu64 " of %" PRIu64 " bytes", h->id, v->bytes, sizes);
}

void model_command(struct host *h, const struct sim_command *s, int error)
{
	struct world *w = h->w;
	const struct repl_command *c = &s->c;
	status_command(h, s, error);
	if (c->cmd == CMD_VERIFY && !w->planted)
		verify_check(h, c->verify, error);
	if (!error && (c->cmd == CMD_HOLD || c->cmd == CMD_CLONE) && h->n_late < sizeof(h->late) / sizeof(h->late[0]))
		h->late[h->n_late++] = c->number ? c->number : c->result;
	if (error || c->cmd != CMD_CHECKPOINT)
		return;
	/* I17: answered after the secondary's completion, and numbers only grow. */
	struct host *p = repl_meta(h->core)->role == ROLE_SECONDARY ? h : peer_of(h);
	if (c->result > p->numbers_ever) /* by the host in whose place p has come since, perhaps */
		world_fail(w, "host %u: checkpoint %" PRIu64 " is answered and was not taken", h->id, c->result);
	const struct repl_meta *m = repl_meta(h->core);
	if (m->ckpt_max < c->result)
		world_fail(w, "host %u: checkpoint %" PRIu64 " is answered before it is durable here", h->id,
			   c->result);
}

/* ---- after every step ---- */

static bool lost_here(struct host *h, bool active, uint32_t vol, uint32_t u)
{
	for (unsigned i = 0; i < h->n_log; i++)
		if (h->log[i].lost && exec_covers(&h->log[i], active, vol, u))
			return true;
	return false;
}

/* SYNCED is said: everything up to the end of the resync is durable over there [SPEC 6]. What is newer there came
 * after. The peer may have failed over while its answer was on the way, which nobody here can know: then the checkpoint
 * of its disk as received has it (SPEC 7: nothing received is thrown away). */
static void synced_check(struct host *h)
{
	struct world *w = h->w;
	struct host *p = peer_of(h);
	bool left = p->seen->role != ROLE_SECONDARY;
	struct ghost *received = left ? ghost_find(p, p->seen->received) : NULL;
	if (left && !received) /* there was no room for one, or it was dropped since */
		return;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		for (uint32_t u = 0; u < w->units[v]; u++) {
			ver there = received ? received->v[v][u] : p->disk[v].durable[u], want = h->adopt[v][u];
			/* Of a detached disk only the peer had it, and its sync failed there: nobody can send it
			 * again. The flush was answered with an error (I10). */
			if (detached(h, v) && lost_here(p, false, v, u))
				continue;
			if (model_shows(w, there) != model_shows(w, want) && there <= want)
				world_fail(w,
					   "host %u says SYNCED, and unit %u of volume %u is durably %s there, not %s",
					   h->id, u, v, text_of(w, there), text_of(w, want));
		}
}

void model_after_step(struct host *h)
{
	bool handed = repl_meta(h->core)->handed;
	if (handed && !h->handed_before)
		h->handed_ns = h->w->now;
	h->handed_before = handed;
	bool in_sync = world_link(h->w, h->id) == LINK_SYNCED, synced = in_sync && repl_forwarding(h->core);
	h->stopped = h->stopped && !in_sync;
	if (synced && !h->synced_before) {
		synced_check(h);
		world_moment(h);
	}
	h->synced_before = synced;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) { /* regions have become clean: was that right? */
		uint64_t n = repl_volume_state(h->core, v)->dirty.count;
		bool fewer = n<h->dirty_before[v], more = n> h->dirty_before[v];
		h->dirty_before[v] = n;
		if (fewer)
			model_check(h->w);
		if (more)
			world_moment(h);
	}
	status_check(h);
}

/* ---- crashes ---- */

void model_died(struct host *h, enum world_crash how, bool evict)
{
	(void)how;
	(void)evict;
	while (h->running) {
		struct running *r = h->running;
		h->running = r->next;
		r->x.end = ++h->w->tick;
		r->x.cut = true;
		log_add(h, &r->x);
		simfree(r);
	}
	/* What it was about to drop the next start may find dropped. */
	h->n_drops = 0;
	for (const struct sim_command *c = h->commands; c; c = c->next)
		if (c->c.cmd == CMD_DROP && h->n_drops < sizeof(h->drops) / sizeof(h->drops[0]))
			h->drops[h->n_drops++] = c->c.number;
	done_clear(&h->done);
	done_clear(&h->done_peer);
	h->str_valid = false;
	h->synced_before = false;
	h->died_ns = h->w->now;
	h->active_failed = 0; /* files that are opened anew know nothing of it */
	h->n_execs = 0;
	memset(h->execs, 0, EXECS_MAX * sizeof(*h->execs));
}

/* Of what may be in unit u after a crash, what shows as c: the newest. Not what was lost before something newer became
 * durable over it. */
static bool may_be(struct host *h, bool active, uint32_t vol, uint32_t u, ver c, bool all, ver *ret)
{
	struct world *w = h->w;
	uint64_t since = active ? h->act[vol].since[u] : h->disk[vol].since[u];
	for (unsigned i = h->n_log; i-- > 0;) {
		const struct exec *x = &h->log[i];
		if (!exec_covers(x, active, vol, u) || !(all || x->cut) || x->begin < since)
			continue;
		if (model_shows(w, exec_ver(x, u)) == c) {
			*ret = exec_ver(x, u);
			return true;
		}
	}
	return false;
}

/* What a crash took from the disk must not be missed by a checkpoint. */
static void ckpt_look(struct host *h, uint32_t vol, struct ghost *g, uint32_t first, uint32_t n);

static void crash_look_disk(struct host *h, uint32_t vol, enum world_crash how, bool evict)
{
	struct world *w = h->w;
	const uint32_t per = BLOCK_SIZE / WORLD_UNIT, n_blocks = (w->units[vol] + per - 1) / per;
	const uint8_t **blocks = simalloc(n_blocks * sizeof(*blocks));
	struct image *d = &h->disk[vol];
	uint32_t first = UINT32_MAX, end = 0;
	if (simstore_peek_blocks(h->ss, disk_paths[vol], blocks, n_blocks) < 0)
		world_fail(w, "host %u: %s is not there", h->id, disk_paths[vol]);
	for (uint32_t u = 0; u < w->units[vol]; u++) {
		const uint8_t *block = blocks[u / per];
		ver c = block ? unit_read(w, block + (size_t)(u % per) * WORLD_UNIT, vol, u) : 0, is = 0;
		bool all = how == WORLD_POWER || (evict && lost_here(h, false, vol, u));
		if ((how != WORLD_POWER && c == model_shows(w, d->now[u])) || written(h, vol, u))
			continue;
		if (c != model_shows(w, d->now[u])) {
			first = first < u ? first : u;
			end = u + 1;
		}
		if (may_be(h, false, vol, u, c, all, &is))
			d->now[u] = is;
		else if (all && c == model_shows(w, d->durable[u]))
			d->now[u] = d->durable[u];
		else
			world_fail(w, "host %u: after %s unit %u of volume %u is %s; it was %s, durable %s", h->id,
				   how == WORLD_POWER ? "a power cut" : "a kill", u, vol, text_of(w, c),
				   text_of(w, d->now[u]), text_of(w, d->durable[u]));
	}
	if (how == WORLD_POWER)
		units_copy(w, vol, d->durable, d->now);
	simfree(blocks);
	for (uint32_t k = 0; k < repl_meta(h->core)->n_ckpts && first < end; k++) {
		if (!repl_shows_ckpt(h->core, k))
			continue;
		struct ghost *g = ghost_find(h, repl_meta(h->core)->ckpts[k].number);
		if (g)
			ckpt_look(h, vol, g, first, end - first);
	}
}

static void crash_look_active(struct host *h, uint32_t vol, enum world_crash how, bool evict)
{
	struct world *w = h->w;
	uint8_t *buf = simalloc((size_t)w->units[vol] * WORLD_UNIT);
	struct image *a = &h->act[vol];
	struct ghost *base = base_of(h, h->base);
	world_quiet(h, true);
	int err = volume_read_view(h->x.vols[vol], h->base, 0, size_clip(h, vol, 0, w->size[vol], buf), buf);
	world_quiet(h, false);
	if (err)
		world_fail(w, "host %u: the view of volume %u can't be read after a crash: %s", h->id, vol,
			   err_name(err));
	for (uint32_t u = 0; u < w->units[vol]; u++) {
		ver c = unit_read(w, buf + (size_t)u * WORLD_UNIT, vol, u), is = 0;
		ver below = base ? base->v[vol][u] : h->disk[vol].now[u];
		ver dur = a->durable[u] == NOT_THERE ? below : a->durable[u];
		bool all = how == WORLD_POWER || (evict && lost_here(h, true, vol, u));
		if (how != WORLD_POWER && c == model_shows(w, view_ver(h, base, vol, u)))
			continue;
		if (may_be(h, true, vol, u, c, all, &is))
			a->now[u] = is;
		else if (all && c == model_shows(w, dur))
			a->now[u] = a->durable[u];
		else
			world_fail(w, "host %u: after %s unit %u of the view of volume %u is %s; it was %s, durable %s",
				   h->id, how == WORLD_POWER ? "a power cut" : "a kill", u, vol, text_of(w, c),
				   text_of(w, view_ver(h, base, vol, u)), text_of(w, dur));
	}
	if (how == WORLD_POWER)
		units_copy(w, vol, a->durable, a->now);
	simfree(buf);
}

/* The record that was found may be one that was written and never reported: it counts as published. */
static void record_look(struct host *h)
{
	const struct repl_meta *m = repl_meta(h->core);
	struct repl_save s = {.active_id = m->active_id};
	uint64_t last = m->n_ckpts ? m->ckpts[m->n_ckpts - 1].number : 0;
	if (last && !ghost_find(h, last))
		s.ckpt = last;
	model_publish(h, m, &s);
	for (uint32_t i = 0; i < m->n_ckpts; i++)
		if (!ghost_find(h, m->ckpts[i].number))
			world_fail(h->w, "host %u: checkpoint %" PRIu64 " is kept and was never made", h->id,
				   m->ckpts[i].number);
}

/* What a failed sync has lost went from the cache as the files were opened (STORAGE_FRESH). What is there and not on
 * the medium was written by a handle whose later syncs were never carried out: it goes out with the next. */
static void lost_left(struct host *h, int disk)
{
	for (unsigned i = 0, n = h->n_log; i < n; i++) {
		struct exec x = h->log[i];
		if (!x.lost || (disk >= 0 && (x.active || x.vol != (uint32_t)disk)))
			continue;
		x.vers = simdup(now_of(h, &x) + x.first, x.n * sizeof(ver));
		x.begin = ++h->w->tick;
		x.end = ++h->w->tick;
		x.lost = false;
		log_add(h, &x);
	}
}

/* Given up, and opened anew for its rebuild: what is there is looked at, as after a kill. */
void model_reopened(struct host *h, uint64_t volumes)
{
	for (uint32_t v = 0; v < WORLD_VOLUMES && !h->dying && !simstore_stopped(h->ss); v++)
		if (volumes >> v & 1) {
			for (struct ghost *g = h->ghosts; g; g = g->next)
				g->reopened[v] = true;
			crash_look_disk(h, v, WORLD_KILL, true);
			lost_left(h, (int)v);
		}
}

void model_replaced(struct host *h)
{
	struct world *w = h->w;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		units_set(w, v, h->disk[v].now, 0);
		units_set(w, v, h->disk[v].durable, 0);
		units_set(w, v, h->act[v].now, NOT_THERE);
		units_set(w, v, h->act[v].durable, NOT_THERE);
	}
	for (unsigned i = 0; i < h->n_log; i++)
		exec_drop(&h->log[i]);
	h->n_log = 0;
	while (h->ghosts) {
		struct ghost *g = h->ghosts;
		h->ghosts = g->next;
		ghost_free(g);
	}
	clones_forget(h);
	promises_forget(h);
	h->numbers_max = 0;
	h->wrote_alone = h->meta_seen = false;
	memset(h->seen, 0, sizeof(*h->seen));
}

void model_opened(struct host *h, enum world_crash how, bool evict)
{
	struct world *w = h->w;
	if (!h->meta_seen) {
		h->meta_seen = true;
		*h->seen = *repl_meta(h->core);
		h->least = h->seen->settings;
		return;
	}
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		crash_look_disk(h, v, how, evict);
	record_look(h);
	h->n_drops = h->n_late = 0;
	h->least = h->seen->settings;
	/* Of the active overlays only where they are shown; what was not served before is of no account. Zeroes that
	 * are there no more may show all the same, from below. Where there is nothing in the overlays at all that
	 * counts, as they are shown over another checkpoint then without being emptied first: over the next one, or
	 * over what the next sync of a secondary keeps whose checkpoints were given up. */
	if (h->serving == SERVING_VIEW)
		for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
			crash_look_active(h, v, how, evict);
	if ((h->serving == SERVING_VIEW || (h->seen->role == ROLE_SECONDARY && h->seen->broken)) &&
	    repl_exec_active_bytes(&h->x) == 0)
		active_clear(h);
	clones_opened(h, how);
	unsigned kept = 0;
	for (unsigned i = 0; i < h->n_log; i++) {
		struct exec *x = &h->log[i];
		if (how == WORLD_POWER) {
			exec_drop(x);
			continue;
		}
		if (x->cut) { /* what of it is there was seen just now */
			exec_drop(x);
			x->vers = simdup(now_of(h, x) + x->first, x->n * sizeof(ver));
			x->cut = false;
		}
		h->log[kept++] = *x;
	}
	h->n_log = kept;
	if (evict)
		lost_left(h, -1);
	/* What the guest was told of this secondary's memory or cache is gone with them. */
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		units_set(w, v, h->prom_received[v], 0);
		if (how == WORLD_POWER || evict)
			units_set(w, v, h->prom_applied[v], 0);
	}
	model_check(w);
}

/* ---- reads ---- */

struct look {
	struct host *h;
	struct sim_io *s;
	bool active; /* of the view */
	struct ghost *ghost;
	uint32_t vol, first, n;
};

static ver look_ver(const struct look *l, uint32_t u)
{
	if (l->ghost && !l->active)
		return l->ghost->v[l->vol][u];
	return l->active ? view_ver(l->h, l->ghost, l->vol, u) : l->h->disk[l->vol].now[u];
}

static bool busy_with(const struct look *l, uint32_t u, ver c, uint64_t since)
{
	struct host *h = l->h;
	if (l->ghost && !l->active)
		return false;
	for (struct running *r = h->running; r; r = r->next)
		if (exec_covers(&r->x, l->active, l->vol, u) && model_shows(h->w, exec_ver(&r->x, u)) == c)
			return true;
	for (unsigned i = 0; i < EXECS_MAX; i++) {
		const struct exec *x = &h->execs[i];
		if (x->n && x->end >= since && exec_covers(x, l->active, l->vol, u) && model_shows(h->w, x->v) == c)
			return true;
	}
	return false;
}

static void look_check(const struct look *l, const uint8_t *buf, const ver *before, uint64_t since)
{
	struct world *w = l->h->w;
	if (l->ghost && !l->active && l->ghost->reopened[l->vol])
		return;
	for (uint32_t i = 0; i < l->n; i++) {
		uint32_t u = l->first + i;
		ver c = unit_read(w, buf + (size_t)i * WORLD_UNIT, l->vol, u), now = look_ver(l, u);
		if (c == model_shows(w, now) || (before && c == model_shows(w, before[i])) || busy_with(l, u, c, since))
			continue;
		world_fail(w, "host %u: a read of unit %u of volume %u%s %" PRIu64 " gives %s, not %s", l->h->id, u,
			   l->vol,
			   l->active  ? ", the view over"
			   : l->ghost ? ", checkpoint"
				      : ", the disk",
			   l->ghost ? l->ghost->number : 0, text_of(w, c), text_of(w, now));
	}
}

static int look_read(struct host *h, struct look *l, uint8_t *buf)
{
	uint64_t off = (uint64_t)l->first * WORLD_UNIT, len = (uint64_t)l->n * WORLD_UNIT;
	struct volume *v = h->x.vols[l->vol];
	len = size_clip(h, l->vol, off, len, buf);
	if (len == 0)
		return 0;
	if (l->active)
		return volume_read_view(v, h->base, off, len, buf);
	if (l->ghost)
		return volume_read_ckpt(v, l->ghost->number, off, len, buf);
	return volume_read_disk(v, off, len, buf);
}

int model_read(struct host *h, struct sim_io *s, uint8_t *buf)
{
	struct world *w = h->w;
	struct look l = {.h = h, .s = s, .vol = s->io.volume, .first = UNITS_IN(s->io.off), .n = UNITS_IN(s->io.len)};
	const struct repl_meta *m = h->seen;
	if (s->promised) { /* of a checkpoint */
		if (m->n_ckpts == 0)
			return 0;
		uint64_t n = m->ckpts[world_below(w, m->n_ckpts)].number;
		int i = repl_meta_find_ckpt(repl_meta(h->core), n);
		if (i < 0 || !repl_shows_ckpt(h->core, (uint32_t)i))
			return 0;
		l.ghost = base_of(h, n);
	} else if (h->serving == SERVING_VIEW) {
		l.active = true;
		l.ghost = base_of(h, h->base);
	} else if (h->serving != SERVING_DISK) {
		return 0;
	}
	w->count.reads++;
	memset(buf, 0xa5, s->io.len);
	uint64_t since = ++w->tick;
	ver *before = simalloc(l.n * sizeof(ver));
	for (uint32_t i = 0; i < l.n; i++)
		before[i] = look_ver(&l, l.first + i);
	uint64_t number = l.ghost ? l.ghost->number : 0;
	int err = look_read(h, &l, buf);
	if (h->dying || simstore_stopped(h->ss)) {
		simfree(before);
		return 0;
	}
	l.ghost = number ? ghost_find(h, number) : NULL;
	if (err && !h->errors_one_in && !h->had_errors)
		world_fail(w, "host %u: a read of volume %u fails: %s", h->id, l.vol, err_name(err));
	if (!err && (number == 0 || l.ghost))
		look_check(&l, buf, before, since);
	simfree(before);
	return err;
}

/* A read through the core: of the peer's disk, behind all that was sent when it came. */
void model_read_begin(struct host *h, struct sim_io *s)
{
	uint32_t vol = s->io.volume, first = UNITS_IN(s->io.off), n = UNITS_IN(s->io.len);
	const ver *have = !detached(h, vol) ? h->disk[vol].now : h->str_valid ? h->str[vol] : peer_of(h)->disk[vol].now;
	s->before = simdup(have + first, n * sizeof(ver));
	s->of_detached = detached(h, vol);
	s->from = h->w->n_writes;
	for (struct sim_io *o = h->ios; o; o = o->next)
		if (o->v && o->v < s->from && o->io.volume == vol)
			s->from = o->v;
}

static void read_done(struct host *h, struct sim_io *s, int error)
{
	struct world *w = h->w;
	uint32_t vol = s->io.volume, first = UNITS_IN(s->io.off), n = UNITS_IN(s->io.len);
	if (error) {
		/* Nor is it answered by a host that has stepped down meanwhile, or was unprotected by force: what it
		 * asked for only the peer had. */
		bool serves = repl_serving(repl_meta(h->core), false) != SERVING_EIO && !s->of_detached;
		if (!h->errors_one_in && !h->had_errors && !repl_detached(h->core) && serves)
			world_fail(w, "host %u: a read of volume %u fails: %s", h->id, vol, err_name(error));
		return;
	}
	w->count.reads++;
	for (uint32_t i = 0; i < n; i++) {
		uint32_t u = first + i;
		ver c = unit_read(w, s->data + (size_t)i * WORLD_UNIT, vol, u);
		bool right = c == model_shows(w, s->before[i]);
		for (ver v = s->from; v < w->n_writes && !right; v++) {
			const struct write *x = &w->writes[v];
			right = x->vol == vol && u >= x->first && u < x->first + x->n && model_shows(w, v) == c;
		}
		if (!right)
			world_fail(w, "host %u: a read through the core of unit %u of volume %u gives %s, not %s",
				   h->id, u, vol, text_of(w, c), text_of(w, s->before[i]));
	}
}

/* ---- both hosts ---- */

static bool dirty_on(struct host *h, uint32_t vol, uint64_t region)
{
	const struct bitmap *b = &repl_volume_state(h->core, vol)->dirty;
	return region < b->nbits && bitmap_test(b, region);
}

/* Who would sync to whom if they met now, and whether the dirty sets would be enough for it. */
static bool by_dirty_sets(struct world *w)
{
	static struct wire_join j[WORLD_HOSTS];
	int source = 0;
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		repl_join(w->h[i].core, &j[i]);
	enum lineage_decision d = lineage_decide(&j[0], &j[1], &source);
	if (d == LINEAGE_SHUT_OUT || d == LINEAGE_NO_SOURCE) { /* as a failback will see it */
		for (unsigned i = 0; i < WORLD_HOSTS; i++)
			if (j[i].role == ROLE_STANDALONE && j[i].failover_generation && j[!i].role != ROLE_STANDALONE) {
				j[i].flags |= WIRE_JOIN_FAILBACK;
				j[i].role = ROLE_PRIMARY;
				j[!i].role = ROLE_SECONDARY;
				d = lineage_decide(&j[0], &j[1], &source);
				break;
			}
	}
	return d == LINEAGE_EQUAL || d == LINEAGE_PARTIAL || d == LINEAGE_TAKE_OVER;
}

/* A power cut of either host would change nothing [LOCALDUR]. */
static bool all_show(const struct world *w, uint32_t vol, uint32_t u)
{
	ver raw = w->h[0].disk[vol].now[u], v = model_shows(w, raw);
	if (w->h[0].disk[vol].durable[u] == raw && w->h[1].disk[vol].now[u] == raw &&
	    w->h[1].disk[vol].durable[u] == raw)
		return true;
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		if (model_shows(w, w->h[i].disk[vol].now[u]) != v || model_shows(w, w->h[i].disk[vol].durable[u]) != v)
			return false;
	return true;
}

/* The same for all units of a region, at a glance; false says nothing. */
static bool region_shows(const struct world *w, uint32_t vol, uint32_t first, uint32_t n)
{
	const ver *v = w->h[0].disk[vol].now + first;
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		if (memcmp(v, w->h[i].disk[vol].now + first, n * sizeof(*v)) != 0 ||
		    memcmp(v, w->h[i].disk[vol].durable + first, n * sizeof(*v)) != 0)
			return false;
	return true;
}

void model_check(struct world *w)
{
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		if (!w->h[i].up || w->h[i].dying)
			return;
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		status_check_loss(&w->h[i]);
		status_check_settings(&w->h[i]);
	}
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		if (repl_forwarding(w->h[i].core) && world_link(w, i) == LINK_SYNCED && w->h[i].str_valid)
			str_check(&w->h[i], "in sync");
	if (!by_dirty_sets(w))
		return;
	/* I4 */
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		if (model_stale(&w->h[0], v))
			continue;
		for (uint32_t u = 0; u < w->units[v]; u++) {
			uint64_t region = ((uint64_t)u * WORLD_UNIT) >> REGION_SHIFT;
			uint32_t n = u % REGION_UNITS ? 0 : u + REGION_UNITS <= w->units[v] ? REGION_UNITS : 0;
			if (n && (dirty_on(&w->h[0], v, region) || dirty_on(&w->h[1], v, region) ||
				  region_shows(w, v, u, n))) {
				u += n - 1;
				continue;
			}
			if (all_show(w, v, u))
				continue;
			/* A clear cycle may find the region clean under a write that lay over its cut: that is dirty
			 * or sent when it ends, and its host waits for it before it says what is dirty. */
			if (model_in_flight(&w->h[0], v, u) || model_in_flight(&w->h[1], v, u))
				continue;
			if (!dirty_on(&w->h[0], v, region) && !dirty_on(&w->h[1], v, region))
				world_fail(w,
					   "unit %u of volume %u (region %" PRIu64
					   ") is %s (durably %s) on host 0, %s (durably %s) on host 1, and dirty on "
					   "neither",
					   u, v, region, text_of(w, w->h[0].disk[v].now[u]),
					   text_of(w, w->h[0].disk[v].durable[u]), text_of(w, w->h[1].disk[v].now[u]),
					   text_of(w, w->h[1].disk[v].durable[u]));
		}
	}
}

static void ckpt_look(struct host *h, uint32_t vol, struct ghost *g, uint32_t first, uint32_t n)
{
	uint8_t *buf = simalloc((size_t)n * WORLD_UNIT);
	struct look l = {.h = h, .vol = vol, .first = first, .n = n, .ghost = g};
	world_quiet(h, true);
	int err = look_read(h, &l, buf);
	world_quiet(h, false);
	if (err)
		world_fail(h->w, "host %u: checkpoint %" PRIu64 " can't be read after a crash: %s", h->id, g->number,
			   err_name(err));
	for (uint32_t i = 0; i < n && g->given_up[vol]; i++) {
		ver c = unit_read(h->w, buf + (size_t)i * WORLD_UNIT, vol, first + i);
		if (c != model_shows(h->w, g->v[vol][first + i]) && c == model_shows(h->w, h->disk[vol].now[first + i]))
			g->v[vol][first + i] = h->disk[vol].now[first + i];
	}
	look_check(&l, buf, NULL, UINT64_MAX);
	simfree(buf);
}

static void check_bytes(struct host *h, uint32_t vol, struct ghost *g)
{
	struct world *w = h->w;
	static uint8_t buf[REGION_UNITS * WORLD_UNIT]; /* not all at once: it stays in the processor's cache */
	for (uint32_t first = 0; first < w->units[vol]; first += REGION_UNITS) {
		uint32_t n = w->units[vol] - first;
		struct look l = {
		    .h = h, .vol = vol, .first = first, .n = n < REGION_UNITS ? n : REGION_UNITS, .ghost = g};
		memset(buf, 0xa7, sizeof(buf));
		int err = look_read(h, &l, buf);
		if (err)
			world_fail(w, "host %u: reading %s of volume %u: %s", h->id, g ? "a checkpoint" : "the disk",
				   vol, err_name(err));
		look_check(&l, buf, NULL, UINT64_MAX);
	}
}

void model_check_all(struct world *w)
{
	status_check_clean(w);
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		struct host *h = &w->h[i];
		const struct repl_meta *m = repl_meta(h->core);
		clones_check(h);
		for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
			check_bytes(h, v, NULL);
			if (m->volumes[v].size != size_now(h, v) || size_now(h, v) != size_now(&w->h[0], v))
				world_fail(w,
					   "at the end volume %u has %" PRIu64 " bytes on host %u, %" PRIu64
					   " in its record, %" PRIu64 " on host 0",
					   v, size_now(h, v), h->id, m->volumes[v].size, size_now(&w->h[0], v));
			for (uint32_t k = 0; k < m->n_ckpts; k++) {
				struct ghost *g = ghost_find(h, m->ckpts[k].number);
				if (g && repl_meta_size_at(m, v, g->number) != g->size[v])
					world_fail(w,
						   "host %u: checkpoint %" PRIu64 " of volume %u had %" PRIu64
						   " bytes, and is said to have %" PRIu64,
						   h->id, g->number, v, g->size[v], repl_meta_size_at(m, v, g->number));
			}
			for (uint32_t k = 0; k < m->n_ckpts; k++)
				if (repl_shows_ckpt(h->core, k))
					check_bytes(h, v, base_of(h, m->ckpts[k].number));
			for (uint32_t u = 0; u < w->units[v]; u++)
				if (model_shows(w, h->disk[v].now[u]) != model_shows(w, w->h[0].disk[v].now[u]))
					world_fail(w,
						   "at the end unit %u of volume %u is %s on host 0 and %s on host %u",
						   u, v, text_of(w, w->h[0].disk[v].now[u]),
						   text_of(w, h->disk[v].now[u]), h->id);
		}
	}
}

/* ---- for the clones (clones.c) ---- */

bool model_ckpt_given_up(struct host *h, uint64_t number, uint32_t vol)
{
	return base_of(h, number)->given_up[vol];
}

const ver *model_ckpt(struct host *h, uint64_t number, uint32_t vol)
{
	return base_of(h, number)->v[vol];
}

const char *model_text(const struct world *w, ver v)
{
	return text_of(w, v);
}

ver model_write_new(struct world *w, unsigned host, uint32_t vol, uint32_t first, uint32_t n, bool zero)
{
	return write_new(w, host, vol, first, n, zero);
}

void model_unit_fill(void *p, ver v, uint32_t vol, uint32_t unit)
{
	uint64_t out[WORLD_UNIT / 8];
	unit_fill(out, v, vol, unit);
	memcpy(p, out, sizeof(out));
}

ver model_unit(const struct world *w, const uint8_t *p, uint32_t vol, uint32_t unit)
{
	return unit_read(w, p, vol, unit);
}
