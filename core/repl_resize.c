/* Growing a volume, on both hosts, with guests running.
 *
 *   primary                                            secondary
 *   the disk's file gets the new length; nobody sees it
 *   RESIZE, a barrier                ────────────────▶  disks synced, its file gets the new length: if the filesystem
 *                                                       refuses, or there is no room, nothing has changed, and the
 *                                                       primary takes its own back
 *   one record with the new size     ◀────────────────  one record with the new size, and from there its view has it;
 *   from there its guests see it; a                      RESIZE_ACK
 *   checkpoint follows
 *
 * So both have grown before either shows it. The record names each volume's size, and the sizes of the checkpoints that
 * are older than a growth (struct repl_growth). A file that is longer than its record says is cut back by the next
 * open; one that the record names was that long, durably, before.
 *
 * Cut off anywhere: before the secondary's record nothing has happened. After it the primary has the old size, and the
 * next handshake shows two: the smaller side grows to the larger, in a record of its own, before anything is decided.
 * What lies past its old end reads as zeroes on it, as it does on the other where nothing was written since, and what
 * was is dirty there. That holds for whatever else made one of them larger: a survivor that was resized alone.
 *
 * Which is why shrinking there is none: the larger size wins.
 *
 * The core's bitmaps of the volume are replaced by larger ones in the step in which the record is found saved. Jobs
 * that look at them outside of the core's exclusion (clearing and setting of intent bits, a failover's mark) and that
 * step exclude each other: it is not saved while one runs, none begins until it is.
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

enum resize_phase {
	RESIZE_NONE,
	RESIZE_LOCAL, /* this host's file gets longer */
	RESIZE_PEER,  /* RESIZE is sent */
	RESIZE_SAVE,  /* TX_RESIZE */
	RESIZE_BACK,  /* this host's file gets its old length again; the command's error is set */
};

bool resize_saving(const struct repl *r)
{
	return repl_tx_pending(r, TX_RESIZE);
}

static void grow_file(struct repl *r, uint32_t volume, uint64_t size, uint64_t joining)
{
	r->rz.busy = true;
	r->rz.joining = joining;
	r->rz.io.kind = REPL_GROW;
	r->rz.io.volume = volume;
	r->rz.io.arg = size;
	repl_submit(r, &r->rz.io, TARGET_OWN);
}

static void done(struct repl *r, int error, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void done(struct repl *r, int error, const char *fmt, ...)
{
	struct repl_command *c = r->rz.c;
	char text[ERR_TEXT_MAX];
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	r->rz.c = NULL;
	r->rz.phase = RESIZE_NONE;
	repl_command_done(r, c, error, "%s", text);
}

/* It does not come about: the file gets its old length, then the command its answer. */
static void go_back(struct repl *r, int error, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void go_back(struct repl *r, int error, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	err_setv(&r->rz.c->err, -error, fmt, ap);
	va_end(ap);
	r->rz.phase = RESIZE_BACK;
	grow_file(r, r->rz.volume, r->meta->volumes[r->rz.volume].size, 0);
}

static void save(struct repl *r)
{
	struct tx *t = repl_tx(r, TX_RESIZE);
	t->number = r->rz.volume;
	t->arg = r->rz.size;
	t->command = r->rz.c;
	r->rz.phase = RESIZE_SAVE;
}

/* ---- the command ---- */

static const char *hindered(const struct repl *r)
{
	const struct repl_meta *m = r->meta;
	if (m->role == ROLE_STANDALONE)
		return r->link == LINK_DOWN ? NULL : "a connection is being made for it; give it again in a moment";
	if (r->link != LINK_SYNCED || !primary_forwarding(r))
		return m->paused ? "it is paused: `resume` it, then `wait --for=in-sync`"
				 : "the pair is not in sync; `wait --for=in-sync` first";
	if (r->stopping)
		return "it is being stopped";
	return detach_any(r) ? "a local disk is detached; `resync` it first" : NULL;
}

void resize_command(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	uint64_t now = c->flags < m->n_volumes ? m->volumes[c->flags].size : 0;
	const char *why = hindered(r);
	c->result = now;
	if (now == 0)
		repl_command_done(r, c, -ERR_NOENT, "the group has no such volume");
	else if (c->number == 0 || c->number % SECTOR_SIZE || c->number > VOLUME_SIZE_MAX)
		repl_command_done(r, c, -ERR_RANGE, "a size is a multiple of 512 bytes, at most 64 TiB");
	else if (c->number < now)
		repl_command_done(
		    r, c, -ERR_RANGE,
		    "it has %llu bytes: a volume never shrinks, what lies behind the new end would be lost "
		    "on both hosts and in every checkpoint. `create` a smaller one and copy what is needed",
		    (unsigned long long)now);
	else if (m->role == ROLE_SECONDARY)
		repl_command_done(r, c, -ERR_STATE, "this host is secondary for it; run it on the primary");
	else if (m->split_brain)
		repl_command_done(r, c, -ERR_SPLIT,
				  "split brain: both hosts wrote alone; see `diverged`, then `resolve`");
	else if (m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED)
		repl_command_done(r, c, -ERR_STATE, "a failover is being committed; wait with `wait --for=done`");
	else if (m->role == ROLE_PRIMARY && m->state != STATE_RUNNING)
		repl_command_done(r, c, -ERR_STATE, "it does not run (%s); `start` it first", state_name(m->state));
	else if (why)
		repl_command_done(r, c, -ERR_STATE, "%s", why);
	else if (r->rz.c || r->rz.busy || r->vf.c)
		repl_command_done(r, c, -ERR_BUSY, "%s is under way", r->vf.c ? "a verify" : "another resize");
	else if (c->number == now)
		repl_command_done(r, c, 0, " ");
	else {
		r->rz.c = c;
		r->rz.phase = RESIZE_LOCAL;
		r->rz.volume = c->flags;
		r->rz.size = c->number;
		grow_file(r, r->rz.volume, r->rz.size, 0);
	}
}

static void local_grown(struct repl *r, int error)
{
	const struct repl_meta *m = r->meta;
	const char *why = hindered(r);
	if (error) {
		done(r, error, "this host's disk can't have %llu bytes: %s; nothing was changed",
		     (unsigned long long)r->rz.size, err_short(error));
	} else if (r->shutdown || m->role == ROLE_SECONDARY || why) {
		go_back(r, -ERR_STATE, "%s; nothing was changed", why ? why : "its role changed meanwhile");
	} else if (m->role == ROLE_STANDALONE) {
		save(r);
	} else {
		struct repl_action a = {.type = ACT_SEND};
		a.frame.type = WIRE_RESIZE;
		a.frame.seq = r->rz.seq = ++r->seq;
		a.frame.volume = m->volumes[r->rz.volume].id;
		a.frame.offset = r->rz.size;
		r->last_was_flush = false;
		repl_emit(r, &a);
		r->rz.phase = RESIZE_PEER;
	}
}

static void join_grown(struct repl *r, uint64_t session, int error);

void resize_io_done(struct repl *r, int error)
{
	uint64_t joining = r->rz.joining;
	r->rz.busy = false;
	r->rz.joining = 0;
	if (joining) {
		join_grown(r, joining, error);
	} else if (r->rz.phase == RESIZE_LOCAL) {
		local_grown(r, error);
	} else if (r->rz.phase == RESIZE_BACK) {
		struct repl_command *c = r->rz.c;
		r->rz.c = NULL;
		r->rz.phase = RESIZE_NONE;
		char text[ERR_TEXT_MAX];
		(void)snprintf(text, sizeof(text), "%s", c->err.text);
		repl_command_done(r, c, -c->err.code, "%s", text);
	}
}

void resize_acked(struct repl *r, const struct repl_event *ev)
{
	struct wire_refuse x = {.code = ERR_FAILED};
	if (r->rz.phase != RESIZE_PEER || ev->frame->seq != r->rz.seq) {
		session_protocol_error(r, "RESIZE_ACK that was not asked for");
		return;
	}
	r->progress_ns = r->now_ns;
	if (ev->frame->offset == 0) {
		save(r);
		return;
	}
	if (!session_reason(r, ev, &x))
		return;
	int code = x.code > 0 && x.code < ERR_CODES_END ? -(int)x.code : -ERR_FAILED;
	go_back(r, code, "the peer: %.*s; nothing was changed on either host", WIRE_TEXT_MAX, x.text);
}

/* What the peer has done of it shows in the next handshake. */
void resize_session_lost(struct repl *r)
{
	if (r->rz.phase == RESIZE_PEER)
		done(r, -ERR_PEER,
		     "the connection was lost before the peer answered; if it has grown, this host follows when it is "
		     "back");
}

/* ---- the record ---- */

bool resize_prepare(struct tx *t, struct repl_meta *m)
{
	if (m->volumes[t->number].size >= t->arg)
		return false;
	return repl_meta_grow(m, (uint32_t)t->number, t->arg) == 0;
}

static void *part(uint8_t **memory, uint64_t bits)
{
	uint8_t *p = *memory;
	*memory += bitmap_bytes(bits);
	return p;
}

void resize_maps(struct repl *r, const struct repl_meta *next, void *const *maps)
{
	for (uint32_t i = 0; i < next->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		struct bitmap *fine[] = {&v->dirty, &v->touched, &v->cycle, &v->todo, &v->theirs};
		struct bitmap *coarse[] = {&v->intent, &v->marking, &v->hot, &v->clearing};
		uint64_t size = next->volumes[i].size, old = r->meta->volumes[i].size;
		uint64_t regions = units_of(size, REGION_SHIFT), intents = units_of(size, INTENT_SHIFT);
		if (size == old)
			continue;
		PRE(size > old && maps && maps[i]);
		uint8_t *p = maps[i];
		for (unsigned k = 0; k < ARRAY_LEN(fine); k++)
			bitmap_grow(fine[k], regions, part(&p, regions));
		for (unsigned k = 0; k < ARRAY_LEN(coarse); k++)
			bitmap_grow(coarse[k], intents, part(&p, intents));
		/* Which of them it was is not remembered: all of the new part of all, which is a hole mostly. */
		if (r->rz.beyond)
			bitmap_set_range(&v->theirs, old >> REGION_SHIFT, regions - (old >> REGION_SHIFT));
	}
}

static void peer_answer(struct repl *r, const struct repl_io *io, int error, const char *text)
{
	struct wire_refuse x = {.code = (uint16_t)-error};
	int n = 0;
	if (!r->is_target || io->session != r->session)
		return;
	if (error) {
		(void)snprintf(x.text, sizeof(x.text), "%s", text);
		n = wire_refuse_encode(&x, r->scratch, sizeof(r->scratch));
	}
	session_send(r, WIRE_RESIZE_ACK, io->seq, (uint64_t)-error, 0, 0, n > 0 ? r->scratch : NULL,
		     n > 0 ? (uint32_t)n : 0);
}

static void peer_done(struct repl *r, struct tx *t, int error)
{
	const struct repl_volume *v = &r->meta->volumes[t->number];
	char text[WIRE_TEXT_MAX];
	if (error == -ERR_CANCELED && v->size == t->arg)
		error = 0; /* it has that size */
	if (error)
		(void)snprintf(text, sizeof(text), "its record with the new size of %s could not be saved: %s", v->name,
			       err_short(error));
	else
		repl_log(r, 2, "%s has %llu bytes now", v->name, (unsigned long long)t->arg);
	peer_answer(r, t->io, error, text);
	secondary_barrier_flushed(r, t->io);
}

void resize_tx_done(struct repl *r, struct tx *t, int error)
{
	if (t->io) {
		peer_done(r, t, error);
	} else if (t->command == NULL) { /* then session_join_ready */
		if (error && t->session == r->session && r->link == LINK_HANDSHAKE && !r->closing) {
			r->join_waits = false;
			session_refuse(r, error, "the record with the peer's size could not be saved there");
		}
	} else if (error == -ERR_CANCELED) {
		done(r, -ERR_LIMIT,
		     "its checkpoints have %d different sizes already; drop the older ones, then give the same again",
		     GROUP_GROWTHS_MAX);
	} else if (error) {
		done(r, error,
		     "the record with the new size could not be saved: %s. The peer may have it already: give the same "
		     "again",
		     err_short(error));
	} else {
		repl_log(r, 2, "%s has %llu bytes now", r->meta->volumes[t->number].name, (unsigned long long)t->arg);
		if (r->link == LINK_SYNCED && primary_forwarding(r) && !r->stopping)
			r->ckpt_wanted = true; /* the tick takes it */
		done(r, 0, " ");
	}
}

/* ---- the target ---- */

bool resize_asked(struct repl *r, struct repl_io *io)
{
	const struct repl_volume *v = &r->meta->volumes[io->volume];
	char text[WIRE_TEXT_MAX];
	int error = io->arg < v->size ? -ERR_RANGE : -(int)io->ext_len;
	if (error == 0 && io->arg > v->size)
		return true;
	if (error == -ERR_RANGE)
		(void)snprintf(text, sizeof(text), "its %s has %llu bytes already; resize to that", v->name,
			       (unsigned long long)v->size);
	else
		(void)snprintf(text, sizeof(text), "its disk of %s can't have %llu bytes: %s", v->name,
			       (unsigned long long)io->arg, err_short(error));
	if (error)
		repl_log(r, 1, "the primary wants %s to grow: %s", v->name, text);
	peer_answer(r, io, error, text);
	secondary_barrier_flushed(r, io);
	return false;
}

/* ---- the handshake ---- */

/* A halted pair that nobody resolves with these JOINs: each side keeps what it has. */
static bool stays_halted(const struct repl *r)
{
	struct wire_join mine = r->mine;
	int source;
	if (!r->meta->split_brain && !(r->theirs.flags & WIRE_JOIN_SPLIT))
		return false;
	if (r->dialer)
		return lineage_decide(&mine, &r->theirs, &source) == LINEAGE_SPLIT;
	repl_join(r, &mine); /* about to be its answer */
	return lineage_decide(&r->theirs, &mine, &source) == LINEAGE_SPLIT;
}

bool resize_join(struct repl *r)
{
	const struct wire_join *j = &r->theirs;
	if (r->rz.busy || r->rz.c)
		return true; /* its end comes first; nothing of it is in the record yet */
	if (stays_halted(r))
		return false;
	for (uint32_t k = 0; k < j->n_volumes; k++) {
		int i = repl_meta_find_volume(r->meta, j->volumes[k].name);
		if (i < 0 || r->meta->volumes[i].size >= j->volumes[k].size)
			continue;
		repl_log(r, 1, "the peer's %s has %llu bytes, this host's %llu: it grows", j->volumes[k].name,
			 (unsigned long long)j->volumes[k].size, (unsigned long long)r->meta->volumes[i].size);
		grow_file(r, (uint32_t)i, j->volumes[k].size, r->session);
		return true;
	}
	r->rz.beyond = false;
	return false;
}

static void join_grown(struct repl *r, uint64_t session, int error)
{
	if (session != r->session || r->link != LINK_HANDSHAKE || r->closing)
		return; /* the file is longer than it has to be: the next open cuts it back */
	const struct repl_volume *v = &r->meta->volumes[r->rz.io.volume];
	if (error) {
		char why[WIRE_TEXT_MAX];
		(void)snprintf(why, sizeof(why), "volume %s has %llu bytes and can't have the peer's %llu: %s", v->name,
			       (unsigned long long)v->size, (unsigned long long)r->rz.io.arg, err_short(error));
		repl_set_error(r, error, "handshake", (int)r->rz.io.volume, 0, 0, "%s", why);
		r->join_waits = false;
		session_refuse(r, error, why);
		return;
	}
	struct tx *t = repl_tx(r, TX_RESIZE);
	t->number = r->rz.io.volume;
	t->arg = r->rz.io.arg;
}
