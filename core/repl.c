/* The replication core: dispatch, metadata changes, and the life of a guest's request.
 *
 * A guest's write:
 *
 *   gate → claim its blocks → [alone: begin a generation, durable] → [clean region: intent bit, durable] → dirty bit →
 *   local write → [session: number it, send it] → release the claim → complete as the protocol says
 *
 * The order is what holds I4 and I5: the generation before anything completes without the peer (BUMPFIRST), the intent
 * bit before the write (BITFIRST), the number and the send under the claim, so that both hosts see overlapping writes
 * in one order (I6).
 *
 * Metadata: every durable change of the group's record is a transaction (enum tx_kind). One is under way at a time: it
 * is prepared on a copy (`next`), saved by the shell as one write that decides, and becomes `meta` when it is durable;
 * a failed save leaves `meta` as it was and the transaction's initiator is told.
 *
 * A save that failed may have reached the disk all the same (a write whose sync failed), and then the next start finds
 * it: an epoch switched, an active overlay emptied, a mark dropped, though this host went on without. So the record as
 * it is is saved again before the initiator is told. While that is under way, or cannot be done, nothing goes on that
 * the other record would make untrue (`unsure_holds`): nothing of the stream is applied, no request of a guest is
 * answered but with EIO. That goes for the records that change what the disk, the view or the role mean (tx_holds); a
 * generation begun, a session's start, a number, a setting or split brain found later than heard of do no harm.
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"
#include "core/sm.h"

#define BIT(n) (1U << (n))

/* SPEC 5's moves. RUNNING→RUNNING (switchover: the role changes) and same-state saves do not go through it. */
const struct sm_table repl_states = {
    .name = "group",
    .n = 5,
    .state_names = {"NONE", "RUNNING", "FAILOVER", "FAILOVER_FAILED", "DONE"},
    .allowed =
	{
	    [STATE_NONE] = BIT(STATE_RUNNING) | BIT(STATE_FAILOVER) | BIT(STATE_DONE),
	    [STATE_RUNNING] = BIT(STATE_DONE) | BIT(STATE_FAILOVER) | BIT(STATE_NONE),
	    [STATE_FAILOVER] = BIT(STATE_DONE) | BIT(STATE_FAILOVER_FAILED),
	    [STATE_FAILOVER_FAILED] = BIT(STATE_FAILOVER),
	    [STATE_DONE] = BIT(STATE_NONE),
	},
};

void repl_state_move(struct repl_meta *m, unsigned to)
{
	if (m->state != to)
		sm_move(&repl_states, &m->state, to);
}

const char *link_state_name(unsigned s)
{
	static const char *const names[] = {"DOWN", "HANDSHAKE", "RESYNC", "SYNCED"};
	return s < ARRAY_LEN(names) ? names[s] : "?";
}

enum repl_serving repl_serving(const struct repl_meta *m, bool holding)
{
	if (m->role == ROLE_SECONDARY) {
		if (m->state == STATE_RUNNING)
			return m->broken ? SERVING_EIO : SERVING_VIEW;
		return m->state == STATE_DONE ? SERVING_DISK : SERVING_EIO;
	}
	if (m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED)
		return SERVING_VIEW;
	return holding ? SERVING_HOLD : SERVING_DISK;
}

/* ---- lists, emitting ---- */

void list_push(struct repl_list *l, struct repl_io *io)
{
	PRE(io->list == NULL);
	io->list = l;
	io->next = NULL;
	io->prev = l->tail;
	if (l->tail)
		l->tail->next = io;
	else
		l->head = io;
	l->tail = io;
	l->count++;
}

void list_remove(struct repl_io *io)
{
	struct repl_list *l = io->list;
	PRE(l != NULL);
	if (io->prev)
		io->prev->next = io->next;
	else
		l->head = io->next;
	if (io->next)
		io->next->prev = io->prev;
	else
		l->tail = io->prev;
	io->next = io->prev = NULL;
	io->list = NULL;
	l->count--;
}

struct repl_io *list_pop(struct repl_list *l)
{
	struct repl_io *io = l->head;
	if (io)
		list_remove(io);
	return io;
}

void repl_emit(struct repl *r, struct repl_action *a)
{
	if (a->type == ACT_SEND)
		r->queue_bytes += WIRE_HEADER_SIZE + a->frame.length_payload;
	r->emit(r->emit_arg, a);
}

void repl_log(struct repl *r, int level, const char *fmt, ...)
{
	char text[ERR_TEXT_MAX];
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	repl_emit(r, &(struct repl_action){.type = ACT_LOG, .level = level, .text = text});
}

void repl_set_error(struct repl *r, int code, const char *operation, int volume, uint64_t off, uint64_t len,
		    const char *fmt, ...)
{
	char text[ERR_TEXT_MAX];
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	/* The first one is kept (SPEC 5); said once, however often it is met again. */
	if (r->error.code == 0 || strcmp(r->error.text, text) != 0)
		repl_log(r, 0, "%s", text);
	if (r->error.code)
		return;
	r->error.code = code < 0 ? -code : code;
	(void)snprintf(r->error.operation, sizeof(r->error.operation), "%s", operation);
	(void)snprintf(r->error.volume, sizeof(r->error.volume), "%s", volume < 0 ? "" : r->meta->volumes[volume].name);
	(void)snprintf(r->error.text, sizeof(r->error.text), "%s", text);
	r->error.off = off;
	r->error.len = len;
	r->error.time_ns = r->wall_ns;
}

/* An error of this host's that did not take the group out of sync ends when the same works again; any other, when it is
 * in sync again. */
static void error_over(struct repl *r, const char *operation)
{
	if (r->link == LINK_SYNCED && strcmp(r->error.operation, operation) == 0)
		r->error.code = 0;
}

/* splitmix64: reproducible from the seed; uniqueness of generations rests on 64 random bits a start. */
uint64_t repl_random(struct repl *r)
{
	uint64_t z = r->random += UINT64_C(0x9E3779B97F4A7C15);
	z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
	z ^= z >> 31;
	return z ? z : 1;
}

void repl_submit(struct repl *r, struct repl_io *io, enum repl_target target)
{
	io->target = target;
	io->save_failed = false;
	repl_emit(r, &(struct repl_action){.type = ACT_SUBMIT, .io = io});
}

void repl_complete(struct repl *r, struct repl_io *io, int error)
{
	PRE(io->list == NULL && !io->claim.added && !io->internal);
	io->phase = PHASE_NONE;
	repl_emit(r, &(struct repl_action){.type = ACT_COMPLETE, .io = io, .error = error});
}

void repl_command_done(struct repl *r, struct repl_command *c, int error, const char *fmt, ...)
{
	if (c == NULL)
		return;
	if (error) {
		va_list ap;
		va_start(ap, fmt);
		err_setv(&c->err, -error, fmt, ap);
		va_end(ap);
	}
	repl_emit(r, &(struct repl_action){.type = ACT_CMD_DONE, .command = c, .error = error});
}

/* ---- metadata transactions ---- */

struct tx *repl_tx(struct repl *r, enum tx_kind kind)
{
	PRE(r->tx_count < TX_MAX);
	struct tx *t = &r->txq[(r->tx_head + r->tx_count++) % TX_MAX];
	memset(t, 0, sizeof(*t));
	t->kind = kind;
	t->session = r->session;
	return t;
}

struct tx *repl_tx_queued(struct repl *r, enum tx_kind kind)
{
	for (unsigned i = 0; i < r->tx_count; i++) {
		struct tx *t = &r->txq[(r->tx_head + i) % TX_MAX];
		if (t->kind == kind)
			return t;
	}
	return NULL;
}

bool repl_tx_pending(const struct repl *r, enum tx_kind kind)
{
	if (r->saving && r->tx.kind == kind)
		return true;
	for (unsigned i = 0; i < r->tx_count; i++)
		if (r->txq[(r->tx_head + i) % TX_MAX].kind == kind)
			return true;
	return false;
}

void repl_begin_generation(struct repl *r, struct repl_meta *m)
{
	if (r->lineage_pending) /* of a detach that the peer may have recorded or not */
		m->lineage = r->detach_lineage;
	if (m->lineage.bitmap == 0)
		m->diverged_ns = r->wall_ns;
	lineage_begin(&m->lineage, repl_random(r));
	m->alone = true;
}

static void prepare_activate(struct repl *r, struct repl_meta *m)
{
	if (m->role != ROLE_PRIMARY) {
		/* A survivor, or the winner of a resolve. Its checkpoints are its own history, not the peer's. */
		m->role = ROLE_PRIMARY;
		m->base = m->last_stream = 0;
		m->target = m->received = m->received_bytes = m->failover_generation = 0;
		m->switched = m->handed = false;
	}
	if (m->state == STATE_DONE)
		repl_state_move(m, STATE_NONE);
	repl_state_move(m, STATE_RUNNING);
	if (m->lineage.current == 0)
		repl_begin_generation(r, m);
	if (r->decision == LINEAGE_DETACHED) /* the generation that the peer began for it */
		m->lineage = r->theirs.lineage;
	/* Heard now. It must not fall out of the history while the peer can record no newer one. */
	if (r->decision == LINEAGE_PARTIAL && lineage_adopted_since(&m->lineage, &r->theirs.lineage))
		lineage_followed(&m->lineage, r->theirs.lineage.current);
	detach_flags(r, m->volumes, m->n_volumes);
	if (r->protect || r->start || m->split_brain)
		m->paused = false;
	m->alone = m->split_brain = false;
	m->has_peer = true;
	m->broken = (r->theirs.flags & WIRE_JOIN_BROKEN) != 0;
	if (r->protect) {
		(void)snprintf(m->peer, sizeof(m->peer), "%s", r->dial_addr);
		memset(m->peer_store, 0, sizeof(m->peer_store));
		m->hash_sync = (r->protect->flags & PROTECT_HASH) != 0;
	}
}

/* The peer is forgotten: from here on nothing is recorded as dirty, so the generation that begins ends all partial
 * syncs with what was its peer. */
static void prepare_unprotect(struct repl *r, struct tx *t, struct repl_meta *m)
{
	m->role = ROLE_STANDALONE;
	repl_state_move(m, STATE_DONE);
	if (r->lineage_pending)
		m->lineage = r->detach_lineage;
	if (repl_meta_flagged(m, VOLUME_STALE) || r->stale) {
		/* By force. It lacks what was written in the generations of its detach, so nothing it has in common
		 * with its peer may say that it is newer: a later `protect` of the two is refused without --adopt,
		 * which keeps what the other holds. */
		m->lineage = (struct lineage){.current = repl_random(r)};
		t->arg = 1;
	} else if (m->lineage.current) {
		lineage_part(&m->lineage, repl_random(r));
	}
	m->alone = m->lineage.current != 0;
	m->has_peer = m->split_brain = m->shut_out = m->broken = m->switched = m->handed = false;
	history_release_kept(m);
	m->base = m->last_stream = 0;
	m->target = m->received = m->received_bytes = m->failover_generation = m->diverged_ns = 0;
	m->peer[0] = 0;
	memset(m->peer_store, 0, sizeof(m->peer_store));
	for (uint32_t i = 0; i < m->n_volumes; i++)
		m->volumes[i].flags = 0;
}

/* Edits `m`, a copy of the record. False: it no longer applies, nothing is saved. */
static bool tx_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	m->ckpt_max = max_u64(m->ckpt_max, r->ckpt_used);
	switch (t->kind) {
	case TX_BUMP:
		/* A resync that began meanwhile takes what waits here along; a host that stepped down meanwhile writes
		 * no more. */
		if (m->alone || primary_forwarding(r) || repl_serving(m, false) != SERVING_DISK)
			return false;
		repl_begin_generation(r, m);
		return true;
	case TX_ACTIVATE:
		if (t->session != r->session || r->link != LINK_HANDSHAKE || r->closing)
			return false;
		prepare_activate(r, m);
		return true;
	case TX_SECONDARY: /* it waited for another's save: its connection may have ended, and nothing is given up */
	case TX_RESTART:
		if (t->session != r->session || r->link != LINK_HANDSHAKE || r->closing)
			return false;
		return secondary_prepare(r, t, m);
	case TX_KEEP: /* likewise; and what it goes by may be the next one's JOIN by now */
		return secondary_current(r, t->io) && secondary_prepare(r, t, m);
	case TX_UNPROTECT:
		if ((m->state != STATE_NONE && m->state != STATE_DONE) || m->inconsistent)
			return false;
		prepare_unprotect(r, t, m);
		return true;
	case TX_IN_SYNC:
		if (t->session != r->session)
			return false;
		if (r->link == LINK_SYNCED && m->lineage.current == t->number)
			m->hash_sync = false;
		lineage_followed(&m->lineage, t->number);
		if (m->lineage.bitmap == 0)
			m->diverged_ns = 0;
		return true;
	case TX_PAUSE:
		if (m->role != ROLE_PRIMARY || m->state != STATE_RUNNING)
			return false;
		m->paused = t->arg != 0;
		return true;
	case TX_CATCH_UP: /* as a completed handshake: the next write alone begins a generation again [BUMPAGAIN] */
		if (t->session != r->session || !primary_live(r) || !r->behind || m->paused)
			return false;
		m->alone = false;
		return true;
	case TX_SHUT_OUT:
		/* It has written alone since its JOIN: the next handshake will find a split brain. */
		if (m->lineage.current != t->lineage.current)
			return false;
		m->role = ROLE_SECONDARY;
		repl_state_move(m, STATE_NONE);
		m->shut_out = true;
		m->last_stream = 0; /* its numbers were those of the copy that the peer has now */
		m->broken = false;
		return true;
	case TX_SPLIT:
		if (m->split_brain)
			return false;
		m->split_brain = true;
		if (r->protect) /* who was given an address dials: a `resolve` on either has to reach the other */
			(void)snprintf(m->peer, sizeof(m->peer), "%s", r->dial_addr);
		return true;
	case TX_PEER_BROKEN:
		if (t->session != r->session || !r->peer_broken)
			return false;
		m->broken = true;
		return true;
	case TX_CKPT:
		m->last_stream = max_u64(m->last_stream, t->number);
		m->broken = r->peer_broken;
		return true;
	case TX_STOPPED: /* it may have stepped down meanwhile: then there is nothing of it to stop */
		if (m->role != ROLE_PRIMARY || m->state != STATE_RUNNING)
			return false;
		if (t->number) {
			m->last_stream = max_u64(m->last_stream, t->number);
			m->broken = false;
		}
		repl_state_move(m, STATE_DONE);
		return true;
	case TX_SETTINGS:
		if (t->command && m->role == ROLE_SECONDARY) /* it follows meanwhile: they are the primary's */
			return false;
		settings_take(&m->settings, &t->settings, t->command ? t->arg : SETTINGS_ALL);
		return true;
	case TX_IDS:
		if (m->role != ROLE_STANDALONE || r->link != LINK_DOWN) /* a peer's JOIN came in between */
			return false;
		for (uint32_t i = 0; i < m->n_volumes; i++)
			m->volumes[i].id = t->command->ids[i];
		return true;
	case TX_ROOM:
		return room_prepare(r, t, m);
	case TX_DROP:
		return history_prepare_drop(r, t, m);
	case TX_HOLD:
		return hold_prepare(r, t, m);
	case TX_CLONE:
	case TX_UNCLONE:
		return clone_prepare(r, t, m);
	case TX_DETACH:
	case TX_REBUILD:
	case TX_ATTACH:
		return detach_prepare(r, t, m);
	case TX_RESIZE:
		return resize_prepare(t, m);
	case TX_HAND_OVER:
	case TX_TAKE_OVER:
		return switchover_prepare(r, t, m);
	default:
		return secondary_prepare(r, t, m);
	}
}

static void tx_done(struct repl *r, struct tx *t, int error);

/* The record as it is, in place of one whose save failed. */
static void save_again(struct repl *r)
{
	r->saving = r->resaving = true;
	r->resave_ns = r->now_ns + RESAVE_NS;
	repl_emit(r, &(struct repl_action){.type = ACT_SAVE_META, .meta = r->meta, .active_id = r->meta->active_id});
}

void repl_tx_run(struct repl *r)
{
	while (!r->saving && r->tx_count) {
		if (r->unsure) {
			save_again(r);
			return;
		}
		if (r->txq[r->tx_head].kind == TX_RESIZE && (r->clear_busy || r->union_busy || r->mark_busy))
			return; /* these look at the bitmaps that it replaces; their end comes here again */
		r->tx = r->txq[r->tx_head];
		r->tx_head = (r->tx_head + 1) % TX_MAX;
		r->tx_count--;
		repl_meta_copy(r->next, r->meta);
		r->tx.active_id = r->meta->active_id;
		bool applies = tx_prepare(r, &r->tx, r->next);
		if (r->meta->role == ROLE_PRIMARY && r->next->role == ROLE_SECONDARY)
			detach_flags(r, r->next->volumes, r->next->n_volumes); /* nobody else knows from here on */
		if (r->next->role != ROLE_PRIMARY)
			r->next->paused = r->next->hash_sync = false;
		if (!applies) {
			struct tx t = r->tx;
			int error = t.kind == TX_BUMP || t.kind == TX_SPLIT ? 0 : -ERR_CANCELED;
			if (t.kind == TX_BUMP && repl_serving(r->meta, false) != SERVING_DISK)
				error = -ERR_IO;
			tx_done(r, &t, error);
			continue;
		}
		r->saving = true;
		repl_emit(r, &(struct repl_action){.type = ACT_SAVE_META,
						   .meta = r->next,
						   .ckpt = r->tx.opened,
						   .active_id = r->tx.active_id,
						   .drop = r->tx.dropped,
						   .drop_through = r->tx.dropped_through});
	}
}

static void bump_done(struct repl *r, int error);

static void tx_done(struct repl *r, struct tx *t, int error)
{
	switch (t->kind) {
	case TX_BUMP:
		bump_done(r, error);
		break;
	case TX_ACTIVATE:
	case TX_SECONDARY:
	case TX_RESTART:
	case TX_SHUT_OUT:
	case TX_SPLIT:
	case TX_UNPROTECT:
		session_tx_done(r, t, error);
		break;
	case TX_IN_SYNC:
	case TX_PEER_BROKEN:
	case TX_CKPT:
	case TX_STOPPED:
	case TX_PAUSE:
	case TX_CATCH_UP:
		primary_tx_done(r, t, error);
		break;
	case TX_DETACH:
	case TX_REBUILD:
	case TX_ATTACH:
		detach_tx_done(r, t, error);
		break;
	case TX_RESIZE:
		resize_tx_done(r, t, error);
		break;
	case TX_HAND_OVER:
	case TX_TAKE_OVER:
		switchover_tx_done(r, t, error);
		break;
	case TX_SETTINGS:
		if (t->command && error)
			repl_command_done(r, t->command, error, "the settings could not be saved: %s",
					  err_short(error));
		else if (t->command && primary_live(r)) {
			r->setting = t->command;
			primary_settings_changed(r);
		} else if (t->command)
			repl_command_done(r, t->command, 0, " ");
		else if (t->session == r->session && r->is_target) {
			if (error) /* the primary waits for an answer, and tells them again with its next JOIN */
				session_refuse(r, ERR_IO, "the settings could not be saved there");
			else if (t->number) /* else those of its JOIN */
				session_send(r, WIRE_SETTINGS_ACK, t->number, 0, 0, 0, NULL, 0);
		}
		break;
	case TX_IDS:
		repl_command_done(r, t->command, error, "the ids could not be saved: %s", err_short(error));
		break;
	case TX_ROOM:
		room_tx_done(r, t, error);
		break;
	case TX_HOLD:
		hold_tx_done(r, t, error);
		break;
	case TX_CLONE:
	case TX_UNCLONE:
		clone_tx_done(r, t, error);
		break;
	default:
		secondary_tx_done(r, t, error);
		break;
	}
}

/* Whether a record of this kind, found by the next start though its save failed, would belie what this host did since.
 */
static bool tx_holds(const struct tx *t)
{
	switch (t->kind) {
	case TX_ROOM: /* what was written to the view would be over a base that is given up */
		return t->arg == ROOM_BREAK;
	case TX_SECONDARY: /* what a guest writes now would be taken for never written */
	case TX_SHUT_OUT:
	case TX_KEEP:
	case TX_ADOPT:
	case TX_SWITCH:
	case TX_FAILOVER:
	case TX_COMMITTED:
	case TX_DISCARD:
	case TX_ATTACH: /* what went to the peer only is not on this disk */
	case TX_PEER_DETACH:
	case TX_HAND_OVER: /* the next start would not know what was written after it */
	case TX_TAKE_OVER:
		return true;
	default:
		return false;
	}
}

static void save_failed(struct repl *r, int error)
{
	repl_set_error(r, error, "metadata", -1, 0, 0,
		       "%s: the group's record could not be saved: %s; look at the disk under the store",
		       r->meta->group, err_short(error));
	r->save_error = error;
	r->unsure = r->tx_failed = true;
	r->unsure_holds = tx_holds(&r->tx);
	save_again(r);
}

/* The record as it was is saved again, or that failed too: then the failed one's kind still holds, and those that wait
 * to be saved fail with it. */
static void saved_again(struct repl *r, int error)
{
	r->resaving = false;
	if (error == 0)
		r->unsure = r->unsure_holds = false;
	if (r->tx_failed) {
		struct tx t = r->tx;
		r->tx_failed = false;
		tx_done(r, &t, r->save_error);
	}
	for (unsigned n = error ? r->tx_count : 0; n && r->tx_count; n--) {
		struct tx t = r->txq[r->tx_head];
		r->tx_head = (r->tx_head + 1) % TX_MAX;
		r->tx_count--;
		tx_done(r, &t, error);
	}
	if (error)
		failover_unsure(r, error);
	if (r->unsure_holds)
		secondary_unsure(r);
	else
		secondary_run(r);
}

static void meta_saved(struct repl *r, const struct repl_event *ev)
{
	PRE(r->saving);
	r->saving = false;
	if (r->resaving) {
		saved_again(r, ev->error);
	} else if (ev->error) {
		save_failed(r, ev->error);
	} else {
		struct tx t = r->tx;
		struct repl_meta *old = r->meta;
		t.arg = ev->bytes ? ev->bytes : t.arg;
		INVARIANT(r->next->ckpt_max >= old->ckpt_max);
		resize_maps(r, r->next, ev->maps);
		r->meta = r->next;
		r->next = old;
		r->ckpt_used = max_u64(r->ckpt_used, r->meta->ckpt_max);
		/* Not that of a disk that has failed since. */
		if (t.kind == TX_BUMP || t.kind == TX_ACTIVATE || t.kind == TX_UNPROTECT ||
		    (t.kind == TX_DETACH && r->meta->lineage.current == r->detach_lineage.current))
			r->lineage_pending = false;
		repl_emit(r, &(struct repl_action){.type = ACT_SERVING, .meta = r->meta});
		error_over(r, "metadata");
		if (t.dropped || t.dropped_through)
			hold_lost(r, old);
		tx_done(r, &t, 0);
	}
	repl_tx_run(r);
	repl_gate_run(r);
}

/* ---- the life of a guest's request ---- */

static bool is_flush(const struct repl_io *io)
{
	return io->kind == REPL_FLUSH;
}

bool repl_frozen(const struct repl *r)
{
	return r->meta->settings.on_disconnect == ON_DISCONNECT_FREEZE && r->meta->role == ROLE_PRIMARY &&
	       r->meta->state == STATE_RUNNING && !primary_live(r);
}

static bool gate_open(const struct repl *r, const struct repl_io *io)
{
	if (r->holding || r->activating || r->stopping || r->failing_over || r->finalising || r->yielding)
		return false;
	if (r->unsure_holds && r->saving)
		return false;
	if (repl_frozen(r) || (!is_flush(io) && (secondary_switching(r) || r->armed || r->taking)))
		return false;
	if (!is_flush(io) && io->kind != REPL_READ && r->throttled && r->admit < 2)
		return false;
	/* The queue to the peer is full: new writes wait (on_congestion=block). */
	if (!is_flush(io) && io->kind != REPL_READ && primary_forwarding(r) &&
	    r->queue_bytes >= r->meta->settings.queue_max_bytes)
		return false;
	return true;
}

void repl_claim_blocks(struct repl_io *io)
{
	struct range b = range_align_out((struct range){io->off, io->len}, BLOCK_SIZE);
	io->claim.volume = io->volume;
	io->claim.shared = false;
	io->claim.off = b.off;
	io->claim.end = range_end(b);
}

static void io_start(struct repl *r, struct repl_io *io)
{
	if (repl_serving(r->meta, false) == SERVING_EIO || r->shutdown || r->unsure_holds) {
		repl_complete(r, io, -ERR_IO);
		return;
	}
	io->start_ns = r->now_ns;
	if (io->kind == REPL_READ) {
		io->phase = PHASE_CLAIM;
		repl_claim_blocks(io);
		io->claim.shared = true;
		if (reqset_add(&r->claims, &io->claim))
			repl_io_granted(r, io);
		return;
	}
	if (is_flush(io)) {
		r->counters.flushes++;
		primary_flush_start(r, io);
		return;
	}
	r->counters.writes++;
	r->counters.write_bytes += io->len;
	if (r->throttled)
		r->admit -= r->admit < 2 ? r->admit : 2;
	r->writes_in_flight++;
	io->phase = PHASE_CLAIM;
	repl_claim_blocks(io);
	if (reqset_add(&r->claims, &io->claim))
		repl_io_granted(r, io);
}

void repl_gate_run(struct repl *r)
{
	primary_congestion(r);
	/* One pass: what is gated behind a full queue waits in order. */
	while (r->gated.head && gate_open(r, r->gated.head))
		io_start(r, list_pop(&r->gated));
}

static void ev_io(struct repl *r, struct repl_io *io)
{
	PRE(io->len > 0 || is_flush(io));
	io->asked_ns = r->now_ns;
	primary_congestion(r);
	if (r->gated.head || !gate_open(r, io)) {
		if (r->shutdown) {
			repl_complete(r, io, -ERR_IO);
			return;
		}
		io->phase = PHASE_GATED;
		list_push(&r->gated, io);
		return;
	}
	io_start(r, io);
}

void repl_release_claim(struct repl *r, struct repl_io *io)
{
	if (io->claim.added)
		repl_ready_claims(r, reqset_remove(&r->claims, &io->claim));
}

void repl_ready_claims(struct repl *r, struct reqset_claim *ready)
{
	while (ready) {
		struct reqset_claim *c = ready;
		ready = c->next_ready;
		struct repl_io *io = CONTAINER_OF(c, struct repl_io, claim);
		if (io->verify) {
			verify_granted(r, io);
			continue;
		}
		switch (io->kind) {
		case REPL_RESYNC_SCAN:
		case REPL_RESYNC_READ:
		case REPL_RESYNC_HASH:
			resync_granted(r, io);
			break;
		case REPL_COMMIT:
			failover_commit_granted(r, io);
			break;
		case REPL_REBUILD:
			detach_rebuild_granted(r, io);
			break;
		default:
			if (io->list == &r->window)
				secondary_granted(r, io);
			else
				repl_io_granted(r, io);
		}
	}
}

static void want_bump(struct repl *r, struct repl_io *io, enum phase phase)
{
	io->phase = (uint8_t)phase;
	list_push(&r->bumping, io);
	if (!repl_tx_pending(r, TX_BUMP))
		repl_tx(r, TX_BUMP);
	repl_tx_run(r);
}

void repl_io_finish(struct repl *r, struct repl_io *io, int error)
{
	repl_release_claim(r, io);
	repl_complete(r, io, error);
}

/* A generation was begun (or could not be). */
static void bump_done(struct repl *r, int error)
{
	struct repl_list waiting = r->bumping;
	r->bumping = (struct repl_list){0};
	for (struct repl_io *io = waiting.head, *next; io; io = next) {
		next = io->next;
		io->next = io->prev = NULL;
		io->list = NULL;
		if (error == 0 && io->phase == PHASE_BUMP) {
			repl_intent(r, io);
			continue;
		}
		if (io->phase == PHASE_BUMP)
			r->writes_in_flight--;
		repl_io_finish(r, io, error);
	}
	primary_stop_check(r);
}

/* Complete it on this host's word alone: the generation first [BUMPFIRST, BUMPFLUSH, BUMPC]. A group that never had a
 * peer begins one with its first write only (cur != 0: written), and not for flushes. */
void repl_alone(struct repl *r, struct repl_io *io)
{
	if (repl_frozen(r)) {
		if (r->shutdown) {
			repl_io_finish(r, io, -ERR_IO);
			return;
		}
		io->phase = PHASE_FROZEN;
		list_push(&r->frozen, io);
		return;
	}
	if (r->meta->alone || (is_flush(io) && !r->meta->has_peer)) {
		repl_io_finish(r, io, 0);
		return;
	}
	want_bump(r, io, PHASE_BUMP_DONE);
}

static bool active_target(const struct repl *r)
{
	return repl_serving(r->meta, false) == SERVING_VIEW;
}

static bool committing_state(const struct repl_meta *m)
{
	return m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED;
}

static void io_local(struct repl *r, struct repl_io *io);

void repl_io_granted(struct repl *r, struct repl_io *io)
{
	if (io->kind == REPL_READ) {
		/* Also of a host that stepped down while the read waited: its disk may be anything. */
		if (repl_serving(r->meta, false) != SERVING_DISK) {
			repl_io_finish(r, io, -ERR_IO);
			return;
		}
		if (detach_route(r, io))
			return;
		io->phase = PHASE_IO;
		repl_submit(r, io, TARGET_DISK);
		return;
	}
	if (active_target(r)) {
		if (committing_state(r->meta))
			repl_intent(r, io);
		else
			io_local(r, io);
		return;
	}
	if (detach_route(r, io))
		return;
	if (!primary_forwarding(r) && !r->meta->alone) {
		want_bump(r, io, PHASE_BUMP);
		return;
	}
	repl_intent(r, io);
}

/* First and number of intent bits of a range. */
static struct range intent_bits(const struct repl_io *io)
{
	uint64_t first = io->off >> INTENT_SHIFT, last = (io->off + io->len - 1) >> INTENT_SHIFT;
	return (struct range){first, last - first + 1};
}

/* How many units this first write to a clean one is to set. One under light use, so that what travels after a crash
 * stays small; but where each costs a sync, random writes over a large disk would cost one sync each. */
static uint64_t mark_units(struct repl *r)
{
	uint64_t drained = (r->now_ns - r->marks_ns) / MARKS_DRAIN_NS;
	r->marks -= min_u64(r->marks, drained);
	r->marks_ns += drained * MARKS_DRAIN_NS;
	r->marks = min_u64(r->marks + 1, MARKS_MAX);
	if (!r->power || r->marks <= MARKS_LIGHT)
		return 1;
	return UINT64_C(1) << (r->marks - MARKS_LIGHT + MARKS_STEP - 1) / MARKS_STEP;
}

/* The aligned run around the units b; without the spare ones while a clear is under way that may undo them. */
static struct range mark_run(struct repl *r, const struct repl_volume_state *v, struct range b)
{
	uint64_t n = mark_units(r), first = round_down_u64(b.off, n);
	uint64_t end = min_u64(round_up_u64(range_end(b), n), v->intent.nbits);
	if (r->clear_busy && bitmap_any(&v->clearing, first, end - first))
		return b;
	return (struct range){first, end - first};
}

/* A set and a clear of one unit are never both under way, so it does not matter in which order they reach the file:
 *   a set waits for a clear of its unit (clear_wait), and leaves out spare units that are being cleared;
 *   a clear does not begin while any set is under way (marks_busy, union_busy, mark_busy).
 * And no unit is cleared under a request that has relied on its bit: its claim covers it from before this look at the
 * bit until after its regions are dirty for good (intent_look). */
void repl_intent(struct repl *r, struct repl_io *io)
{
	if (!r->meta->has_peer) {
		io_local(r, io);
		return;
	}
	struct repl_volume_state *v = &r->vol[io->volume];
	struct range b = intent_bits(io);
	if (r->clear_busy && bitmap_any(&v->clearing, b.off, b.len)) {
		io->phase = PHASE_CLEAR_WAIT;
		list_push(&r->clear_wait, io);
		return;
	}
	bitmap_set_range(&v->hot, b.off, b.len);
	if (bitmap_next_clear(&v->intent, b.off) < range_end(b)) {
		struct range run = mark_run(r, v, b);
		io->mark_first = run.off;
		io->mark_units = run.len;
		io->phase = PHASE_INTENT;
		r->marks_busy++;
		repl_submit(r, io, TARGET_INTENT);
		return;
	}
	io_local(r, io);
}

/* Its regions may differ from the peer from now on [BITFIRST in memory; the durable bit is the intent's]. */
void repl_mark_written(struct repl *r, const struct repl_io *io)
{
	struct repl_volume_state *v = &r->vol[io->volume];
	uint64_t first = io->off >> REGION_SHIFT, last = (io->off + io->len - 1) >> REGION_SHIFT;
	bitmap_set_range(&v->dirty, first, last - first + 1);
	bitmap_set_range(&v->touched, first, last - first + 1);
}

static void io_local(struct repl *r, struct repl_io *io)
{
	if (io->verify) {
		verify_marked(r, io);
		return;
	}
	io->phase = PHASE_IO;
	if (active_target(r)) {
		if (committing_state(r->meta)) {
			repl_mark_written(r, io);
			r->active_writes++;
		}
		repl_submit(r, io, TARGET_ACTIVE);
		return;
	}
	if (detach_route(r, io)) /* since its intent bit was set */
		return;
	if (r->meta->has_peer)
		repl_mark_written(r, io);
	repl_submit(r, io, TARGET_DISK);
}

/* It will not be done: neither now nor with more room. */
void repl_guest_failed(struct repl *r, struct repl_io *io, int error)
{
	/* Without its bit it is not written here: the map lies on the disk that fails. */
	if (io->target == TARGET_INTENT && detach_failed(r, io->volume, io, error) && detach_route(r, io))
		return;
	r->writes_in_flight--;
	if (io->target == TARGET_INTENT) {
		repl_set_error(r, error, "intent", (int)io->volume, io->off, io->len,
			       "the write-intent map of %s could not be written: %s", r->meta->volumes[io->volume].name,
			       err_short(error));
		repl_io_finish(r, io, error);
	} else {
		io->error = error;
		primary_local_done(r, io);
	}
	primary_stop_check(r);
}

/* A set that failed may be in the file or not: it is not relied on, the next write there sets it again. Nothing was
 * written to the disk. */
static void intent_done(struct repl *r, struct repl_io *io, int error)
{
	if (error) {
		repl_guest_failed(r, io, error);
		return;
	}
	bitmap_set_range(&r->vol[io->volume].intent, io->mark_first, io->mark_units);
	error_over(r, "intent");
	io_local(r, io);
}

void repl_marking_done(struct repl *r, bool durable)
{
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		if (durable)
			bitmap_or(&v->intent, &v->marking);
		bitmap_clear_all(&v->marking);
	}
}

static void read_done(struct repl *r, struct repl_io *io, int error)
{
	io->error = error;
	io->tried = true;
	if (error && detach_read_failed(r, io, error))
		return;
	if (error)
		repl_set_error(r, error, "read", (int)io->volume, io->off, io->len, "a local read of %s failed: %s",
			       r->meta->volumes[io->volume].name, err_short(error));
	repl_io_finish(r, io, error);
}

static void guest_io_done(struct repl *r, struct repl_io *io, int error)
{
	if (io->kind == REPL_READ) {
		read_done(r, io, error);
		return;
	}
	if (io->phase == PHASE_INTENT)
		r->marks_busy--;
	/* Room for history never fails a guest's write (SPEC 3). */
	if (error && !is_flush(io) && io->target != TARGET_ACTIVE && room_wait(r, io, error)) {
		repl_tx_run(r);
		return;
	}
	if (io->phase == PHASE_INTENT) {
		intent_done(r, io, error);
		return;
	}
	if (is_flush(io)) {
		io->error = error;
		primary_flush_done(r, io);
		return;
	}
	INVARIANT(io->phase == PHASE_IO);
	if (error && io->target != TARGET_ACTIVE) {
		repl_guest_failed(r, io, error);
		return;
	}
	io->error = error;
	r->writes_in_flight--;
	if (io->target == TARGET_ACTIVE) {
		if (committing_state(r->meta)) {
			r->active_writes--;
			/* After an error too: what of it is in active is shown by the view. */
			uint64_t first = io->off >> REGION_SHIFT, last = (io->off + io->len - 1) >> REGION_SHIFT;
			bitmap_set_range(&r->vol[io->volume].todo, first, last - first + 1);
		}
		repl_io_finish(r, io, error);
		failover_commit_pump(r);
		return;
	}
	primary_local_done(r, io);
	primary_stop_check(r);
}

static void ev_io_done(struct repl *r, struct repl_io *io, int error)
{
	if (io->verify)
		verify_io_done(r, io, error);
	else if (io == &r->rz.io)
		resize_io_done(r, error);
	else if (io == &r->cycle_io)
		primary_cycle_done(r, error);
	else if (io == &r->clear_io) {
		primary_clear_done(r, error);
		struct repl_list waiting = r->clear_wait;
		r->clear_wait = (struct repl_list){0};
		for (struct repl_io *w = waiting.head, *next; w; w = next) {
			next = w->next;
			w->next = w->prev = NULL;
			w->list = NULL;
			repl_intent(r, w);
		}
	} else if (io == &r->clone_io)
		clone_synced(r, error);
	else if (io == &r->union_io)
		session_union_done(r, error);
	else if (io == &r->take_io)
		switchover_synced(r, error);
	else if (io->kind == REPL_RESYNC_SCAN || io->kind == REPL_RESYNC_READ || io->kind == REPL_RESYNC_HASH)
		resync_io_done(r, io, error);
	else if (io->kind == REPL_REBUILD || io == &r->reopen_io || io == &r->attach_io)
		detach_internal_done(r, io, error);
	else if (io->internal)
		secondary_internal_done(r, io, error);
	else if (io->list == &r->window || io == r->barrier)
		secondary_apply_done(r, io, error);
	else
		guest_io_done(r, io, error);
	repl_gate_run(r);
}

/* ---- events ---- */

void repl_fail_list(struct repl *r, struct repl_list *l, int error)
{
	struct repl_io *io;
	while ((io = list_pop(l)) != NULL) {
		repl_release_claim(r, io);
		repl_complete(r, io, error);
	}
}

static void ev_shutdown(struct repl *r)
{
	r->shutdown = true;
	repl_fail_list(r, &r->gated, -ERR_IO);
	repl_fail_list(r, &r->frozen, -ERR_IO);
	verify_end(r, -ERR_CANCELED, "the daemon is shutting down");
	/* It waits for a peer, and for no tick any more. */
	repl_command_fail(r, &r->resolve, -ERR_CANCELED,
			  "the daemon is shutting down, or volumes are added to the group or deleted; give it again");
	detach_shutdown(r);
	if (r->link != LINK_DOWN) {
		session_send(r, WIRE_GOODBYE, 0, WIRE_BYE_SHUTDOWN, 0, 0, NULL, 0);
		session_close(r, true);
	}
}

/* Ticks that come late say that this host was held up: suspended, starved of processor or memory. It could not listen
 * meanwhile, so none of that is the peer's silence, its lack of progress, or its time to answer a restarted primary:
 * else a host that goes on after a pause would first of all give up a healthy peer, whose words lie unread in the
 * socket, and with a detached disk answer its guests EIO. What may be *said* of the link goes by heard_ns alone. */
static void ev_tick_late(struct repl *r)
{
	uint64_t gap = r->now_ns - min_u64(r->now_ns, r->tick_ns);
	uint64_t late = gap - min_u64(gap, TICK_MAX_NS);
	r->tick_ns = r->now_ns;
	r->silent_ns = min_u64(max_u64(r->silent_ns + late, r->heard_ns), r->now_ns);
	r->progress_ns = min_u64(r->progress_ns + late, r->now_ns);
	r->hold_until_ns += late;
}

static void ev_tick(struct repl *r, const struct repl_event *ev)
{
	r->heard_ns = max_u64(r->heard_ns, ev->heard_ns);
	ev_tick_late(r);
	if (r->unsure && !r->saving && r->now_ns >= r->resave_ns)
		save_again(r);
	session_tick(r);
	primary_tick(r);
	verify_pump(r);
	detach_tick(r);
	secondary_tick(r, ev->usage);
	switchover_tick(r);
	repl_gate_run(r);
}

void repl_step(struct repl *r, const struct repl_event *ev)
{
	r->now_ns = ev->now_ns;
	if (ev->wall_ns)
		r->wall_ns = ev->wall_ns;
	switch (ev->type) {
	case EV_TICK:
		ev_tick(r, ev);
		break;
	case EV_IO:
		ev_io(r, ev->io);
		break;
	case EV_IO_DONE:
		ev_io_done(r, ev->io, ev->error);
		break;
	case EV_META_SAVED:
		meta_saved(r, ev);
		break;
	case EV_LINK_UP:
		session_link_up(r, ev);
		break;
	case EV_LINK_DOWN:
		if (ev->session ? ev->session == r->session : r->dialing && ev->dial == r->dials)
			session_link_down(r, ev->error, ev->text);
		break;
	case EV_FRAME:
		if (ev->session == r->session && r->link != LINK_DOWN && !r->closing)
			session_frame(r, ev);
		else if (ev->io)
			repl_complete(r, ev->io, -ERR_CANCELED);
		break;
	case EV_BATCH:
		if (r->is_target)
			secondary_ack(r, false);
		break;
	case EV_SENT:
		if (ev->session == r->session) {
			r->counters.sent_bytes += ev->bytes;
			r->queue_bytes -= min_u64(r->queue_bytes, ev->bytes);
			resync_pump(r);
			verify_pump(r);
			primary_catch_up(r);
			repl_gate_run(r);
		}
		break;
	case EV_COMMAND:
		repl_command(r, ev->command);
		repl_gate_run(r);
		break;
	case EV_SHUTDOWN:
		ev_shutdown(r);
		break;
	}
	history_settle(r);
	secondary_settle(r);
	switchover_settle(r);
	session_yielded(r);
	repl_tx_run(r);
}

void repl_stepped_down(struct repl *r)
{
	r->holding = false;
	detach_role_lost(r);
	repl_fail_list(r, &r->frozen, -ERR_IO);
	repl_emit(r, &(struct repl_action){.type = ACT_SERVING, .meta = r->meta});
}

/* ---- setting up, looking ---- */

size_t repl_size(void)
{
	return sizeof(struct repl);
}

size_t repl_volume_bytes(uint64_t size)
{
	return 5 * bitmap_bytes(units_of(size, REGION_SHIFT)) + 4 * bitmap_bytes(units_of(size, INTENT_SHIFT));
}

static void volume_maps_init(struct repl_volume_state *v, uint64_t size, void *mem)
{
	uint64_t regions = units_of(size, REGION_SHIFT), intents = units_of(size, INTENT_SHIFT);
	uint8_t *p = mem;
	struct bitmap *fine[] = {&v->dirty, &v->touched, &v->cycle, &v->todo, &v->theirs};
	struct bitmap *coarse[] = {&v->intent, &v->marking, &v->hot, &v->clearing};
	for (unsigned i = 0; i < ARRAY_LEN(fine); i++, p += bitmap_bytes(regions))
		bitmap_init(fine[i], regions, p);
	for (unsigned i = 0; i < ARRAY_LEN(coarse); i++, p += bitmap_bytes(intents))
		bitmap_init(coarse[i], intents, p);
}

void repl_init(struct repl *r, const struct repl_init_args *a)
{
	memset(r, 0, sizeof(*r));
	r->meta = a->meta;
	r->next = a->next;
	memcpy(r->store, a->store, sizeof(r->store));
	r->emit = a->emit;
	r->emit_arg = a->emit_arg;
	r->random = ~a->random_seed; /* beside the generations */
	r->start_id = repl_random(r);
	r->random = a->random_seed;
	r->now_ns = r->marks_ns = a->now_ns;
	r->power = a->power;
	r->ckpt_used = r->meta->ckpt_max;
	reqset_init(&r->claims);
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		volume_maps_init(&r->vol[i], r->meta->volumes[i].size, a->volume_memory[i]);
	struct repl_io *own[] = {&r->cycle_io, &r->clear_io, &r->union_io, &r->mark_io,
				 &r->sync_io,  &r->merge_io, &r->take_io,  &r->clone_io};
	for (unsigned i = 0; i < ARRAY_LEN(own); i++)
		own[i]->internal = true;
	for (unsigned i = 0; i < RESYNC_READS_MAX; i++)
		r->rs[i].internal = true;
	for (unsigned i = 0; i < COMMITS_MAX; i++)
		r->commit[i].internal = true;
	/* After a restart a group that was RUNNING as primary holds its I/O until the handshake, at most peer_timeout:
	 * its peer may have failed over meanwhile (SPEC 8). */
	if (r->meta->role == ROLE_PRIMARY && r->meta->state == STATE_RUNNING && !r->meta->split_brain) {
		r->holding = true;
		r->hold_until_ns = a->now_ns + r->meta->settings.peer_timeout_ms * UINT64_C(1000000);
	}
	r->redial_wait_ns = REDIAL_MIN_NS;
	r->tick_ns = a->now_ns;
	detach_init(r);
	verify_init(r);
	r->rz.io.internal = true;
	if (r->meta->state == STATE_FAILOVER)
		failover_commit_start(r);
}

void repl_load_intent(struct repl *r, uint32_t volume, const struct bitmap *intent, bool fine)
{
	struct repl_volume_state *v = &r->vol[volume];
	const unsigned per = INTENT_SHIFT - REGION_SHIFT;
	bitmap_copy(&v->intent, intent);
	if (detach_of(r, volume))
		return; /* from before the detach: the peer has it all */
	for (uint64_t i = fine ? BITMAP_NONE : bitmap_next_set(intent, 0); i != BITMAP_NONE;
	     i = bitmap_next_set(intent, i + 1)) {
		uint64_t first = i << per;
		bitmap_set_range(&v->dirty, first, min_u64(UINT64_C(1) << per, v->dirty.nbits - first));
	}
}

void repl_mark(struct repl *r, uint32_t volume, uint64_t off, uint64_t len)
{
	struct repl_volume_state *v = &r->vol[volume];
	uint64_t first = off >> REGION_SHIFT, last = (off + len - 1) >> REGION_SHIFT;
	bitmap_set_range(&v->dirty, first, last - first + 1);
	bitmap_set_range(&v->todo, first, last - first + 1);
	first = off >> INTENT_SHIFT;
	last = (off + len - 1) >> INTENT_SHIFT;
	bitmap_set_range(&v->marking, first, last - first + 1);
}

const struct repl_meta *repl_meta(const struct repl *r)
{
	return r->meta;
}

struct repl_volume_state *repl_volume_state(struct repl *r, uint32_t volume)
{
	return &r->vol[volume];
}

bool repl_todo_next(const struct repl *r, uint32_t volume, uint64_t from, struct range *ret_run)
{
	const struct bitmap *todo = &r->vol[volume].todo;
	uint64_t first, end;
	if (!bitmap_next_run(todo, from >> REGION_SHIFT, &first, &end))
		return false;
	ret_run->off = first << REGION_SHIFT;
	ret_run->len = min_u64(end << REGION_SHIFT, r->meta->volumes[volume].size) - ret_run->off;
	return true;
}

bool repl_holding(const struct repl *r)
{
	return r->holding;
}

bool repl_stopping(const struct repl *r)
{
	return r->stopping;
}

bool repl_forwarding(const struct repl *r)
{
	return primary_forwarding(r);
}

void repl_check(const struct repl *r)
{
	reqset_check(&r->claims);
	INVARIANT(r->tx_count <= TX_MAX);
	INVARIANT(r->ckpt_used >= r->meta->ckpt_max);
	INVARIANT(r->applied <= r->received && r->flushed <= r->applied && r->received <= r->seq);
	INVARIANT(r->in_flushed <= r->in_applied && r->in_applied <= r->in_seq);
	INVARIANT(!(r->is_source && r->is_target));
	INVARIANT(!primary_forwarding(r) || !r->meta->alone);
	INVARIANT(!r->behind || r->link != LINK_SYNCED);
	INVARIANT(r->link == LINK_DOWN || r->session != 0);
	INVARIANT(r->handing == HAND_NONE || r->stopping);
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		const struct repl_volume_state *v = &r->vol[i];
		bitmap_check(&v->dirty);
		if (!r->meta->has_peer || r->dirty_unsaved)
			continue;
		/* Every dirty region has its intent bit, or it is being set. */
		for (uint64_t b = bitmap_next_set(&v->dirty, 0); b != BITMAP_NONE;
		     b = bitmap_next_set(&v->dirty, b + 1)) {
			uint64_t unit = b >> (INTENT_SHIFT - REGION_SHIFT);
			INVARIANT(bitmap_test(&v->intent, unit) || bitmap_test(&v->marking, unit));
		}
	}
}
