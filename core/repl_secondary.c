/* The receiving side: applying the stream, barriers, checkpoints, resync as target. Failover is in repl_failover.c.
 *
 * The stream: requests come in order into `held`; up to the next barrier they move to `window`, claim their blocks and
 * are applied in any order that the claims allow (overlapping ones in the order of the stream, I6). A barrier waits
 * until the window is empty; nothing behind it starts before it is done (I12) [FLBARRIER, CKBARRIER, RSBARRIER].
 *
 *   FLUSH          disks synced → flushed = its number [FLACK]
 *   CHECKPOINT     disks synced (in `power`) [CKFLUSH] → one metadata write switches the epoch of all volumes (I7)
 *                  [CKATOMIC] → acknowledged [CKACKAFTER]
 *   RESYNC_BEGIN   disks synced (in `power`) [PREFLUSH] → one metadata write: local checkpoint of a consistent copy
 *                  [PREKEEP, PREONCE], inconsistent, synced from that generation [RESYNCFLAG] → RESYNC_READY
 *   RESYNC_DONE    disks synced [RDFLUSH] → one metadata write adopts the source's generations and drops the mark
 *                  [ADOPTEND] → acknowledged
 *
 * What changes a block on the disk saves the old content first; that is the image module's doing (volume V1).
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

static bool is_barrier(const struct repl_io *io)
{
	return io->kind == REPL_FLUSH || io->kind == REPL_CHECKPOINT || io->kind == REPL_RESYNC_BEGIN ||
	       io->kind == REPL_RESYNC_DONE || io->kind == REPL_DETACH || io->kind == REPL_ATTACH ||
	       io->kind == REPL_RESIZE;
}

/* Of the session that stands; what an ended one delivered is applied and answered to nobody. */
bool secondary_current(const struct repl *r, const struct repl_io *io)
{
	return r->is_target && io->session == r->session;
}

bool secondary_quiet(const struct repl *r)
{
	return r->held.head == NULL && r->window.head == NULL && r->barrier == NULL;
}

/* ---- the stream ---- */

/* What may come now (docs/protocol.md, "Resync"): NULL, or what is wrong with it. */
static const char *out_of_order(const struct repl *r, const struct repl_io *io)
{
	if (io->kind == REPL_RESYNC_BEGIN)
		return NULL;
	if (io->kind == REPL_RESYNC_DONE) /* without a BEGIN it ends at once a resync that has nothing to do */
		return r->in_phase == STREAM_RESYNC || (r->in_phase == STREAM_CLOSED && r->in_whole)
			   ? NULL
			   : "RESYNC_DONE out of order";
	if (io->kind == REPL_VERIFY || io->kind == REPL_RESIZE)
		return r->in_phase == STREAM_OPEN ? NULL : "VERIFY or RESIZE outside of SYNCED";
	if (io->resync)
		return r->in_phase == STREAM_RESYNC ? NULL : "resync data outside a resync";
	return r->in_phase == STREAM_CLOSED ? "data before RESYNC_BEGIN" : NULL;
}

/* A `stop` given here crossed with what the primary does not stop in: it has dropped the request without a word. */
static void stop_overtaken(struct repl *r, const char *why)
{
	struct repl_command *c = r->stop;
	r->stop = NULL;
	repl_command_done(r, c, -ERR_STATE, "%s", why);
}

/* The primary forwards nothing more: what comes next begins a resync. */
void secondary_behind(struct repl *r, const struct wire_frame *f)
{
	if (r->in_phase == STREAM_CLOSED) {
		session_protocol_error(r, "BEHIND out of order");
		return;
	}
	bool congested = f->offset != WIRE_BEHIND_PAUSED && f->offset != WIRE_BEHIND_FAILED;
	if (!congested || !r->congestion_said)
		repl_log(r, 1, "%s: this copy falls behind",
			 f->offset == WIRE_BEHIND_PAUSED   ? "replication was paused on the primary"
			 : f->offset == WIRE_BEHIND_FAILED ? "a write failed on the primary and was not sent"
							   : "the primary's queue is full");
	r->congestion_said = r->congestion_said || congested;
	r->in_phase = STREAM_CLOSED;
	r->link = LINK_RESYNC;
	stop_overtaken(r, "the primary fell behind meanwhile, the link is RESYNC; `wait --for=in-sync` first");
	struct repl_command *c = r->want_ckpt;
	r->want_ckpt = NULL;
	repl_command_done(r, c, -ERR_STATE,
			  "the primary fell behind meanwhile, the link is RESYNC; `wait --for=in-sync` first");
}

/* A READ_REQ has no number of its own: its place is behind all that was received before it. */
static void hold_read(struct repl *r, struct repl_io *io)
{
	io->arg = io->seq; /* the token */
	io->seq = r->in_seq;
	io->phase = PHASE_HELD;
	io->session = r->session;
	list_push(&r->held, io);
	secondary_run(r);
}

void secondary_stream(struct repl *r, struct repl_io *io)
{
	if (io->kind == REPL_READ) {
		hold_read(r, io);
		return;
	}
	if (io->seq != r->in_seq + 1) {
		session_protocol_error(r, "sequence number %llu after %llu", (unsigned long long)io->seq,
				       (unsigned long long)r->in_seq);
		repl_complete(r, io, -ERR_CANCELED);
		return;
	}
	const char *why = out_of_order(r, io);
	if (why) {
		repl_complete(r, io, -ERR_CANCELED);
		session_protocol_error(r, "%s", why);
		return;
	}
	/* A number that this host takes for a resync's own checkpoint must not come behind one on its way here. */
	if ((io->kind == REPL_DETACH || io->kind == REPL_ATTACH || io->kind == REPL_CHECKPOINT) &&
	    r->link != LINK_SYNCED) {
		repl_complete(r, io, -ERR_CANCELED);
		session_protocol_error(r, "a checkpoint or a detach outside of SYNCED");
		return;
	}
	if (r->armed) { /* the primary goes on as such */
		r->armed = 0;
		repl_gate_run(r);
	}
	/* Numbers only grow (I17); one that was used already is never taken again. */
	if (io->kind == REPL_CHECKPOINT) {
		if (io->arg <= r->ckpt_used || io->arg > CKPT_PEER_MAX) {
			session_protocol_error(r, "checkpoint %llu after %llu", (unsigned long long)io->arg,
					       (unsigned long long)r->ckpt_used);
			repl_complete(r, io, -ERR_CANCELED);
			return;
		}
		r->ckpt_used = io->arg;
	}
	if (io->kind == REPL_RESYNC_BEGIN) {
		r->in_phase = STREAM_RESYNC;
		r->in_whole = false;
		r->link = LINK_RESYNC;
	} else if (io->kind == REPL_RESYNC_DONE) {
		r->in_phase = STREAM_OPEN;
		r->in_whole = true;
		r->in_done_seq = io->seq;
	}
	r->in_seq = io->seq;
	io->phase = PHASE_HELD;
	io->session = r->session;
	list_push(&r->held, io);
	secondary_run(r);
}

static void barrier_start(struct repl *r, struct repl_io *io)
{
	r->barrier = io;
	io->phase = PHASE_BARRIER;
	if (io->kind != REPL_CHECKPOINT) {
		repl_submit(r, io, io->kind == REPL_RESYNC_BEGIN ? TARGET_CKPT : TARGET_DISK);
		return;
	}
	/* Whether active is empty is decided at the switch: writes to the view wait, those under way end first. */
	r->barrier_waits = true;
	secondary_settle(r);
}

bool secondary_switching(const struct repl *r)
{
	return r->barrier && r->barrier->kind == REPL_CHECKPOINT && r->meta->role == ROLE_SECONDARY;
}

/* A stop's last checkpoint has come: it decides, though the session may be over. */
static bool stop_received(const struct repl *r)
{
	const struct repl_io *b = r->barrier;
	if (b && b->kind == REPL_CHECKPOINT && (b->flags & WIRE_CKPT_STOP))
		return true;
	for (const struct repl_io *io = r->held.head; io; io = io->next)
		if (io->kind == REPL_CHECKPOINT && (io->flags & WIRE_CKPT_STOP))
			return true;
	return false;
}

void secondary_settle(struct repl *r)
{
	if (r->stop && r->meta->role == ROLE_SECONDARY && !r->is_target && !stop_received(r)) {
		struct repl_command *c = r->stop;
		r->stop = NULL;
		repl_command_done(r, c, -ERR_PEER,
				  "the connection to the primary was lost before its last checkpoint came; it goes on "
				  "running. Give it again when it is in sync, or `failover`");
	}
	if (r->barrier_waits && r->writes_in_flight == 0) {
		r->barrier_waits = false;
		repl_submit(r, r->barrier, TARGET_CKPT);
	}
	session_join_ready(r);
	if (r->failing_over)
		failover_go(r);
}

void secondary_run(struct repl *r)
{
	while (r->held.head && !r->barrier && (!r->unsure_holds || r->apply_stopped)) {
		struct repl_io *io = r->held.head;
		if (r->apply_stopped) {
			list_remove(io);
			repl_complete(r, io, -ERR_CANCELED);
			continue;
		}
		if (!is_barrier(io) && r->window.count >= WINDOW_MAX)
			break;
		if (is_barrier(io)) {
			if (r->window.head)
				break;
			list_remove(io);
			barrier_start(r, io);
			break;
		}
		list_remove(io);
		io->phase = PHASE_CLAIM;
		list_push(&r->window, io);
		repl_claim_blocks(io);
		io->claim.shared = io->kind == REPL_READ || io->kind == REPL_VERIFY;
		if (reqset_add(&r->claims, &io->claim))
			secondary_granted(r, io);
	}
}

void secondary_granted(struct repl *r, struct repl_io *io)
{
	io->phase = PHASE_IO;
	repl_submit(r, io, TARGET_DISK);
}

/* on_cow_error=stop, and any other failure to apply: nothing more is applied in this session, the last checkpoint stays
 * good, the primary is told and goes to dirty tracking. */
static void stop_applying(struct repl *r, const struct repl_io *io, int error, const char *what)
{
	if (r->apply_stopped)
		return;
	r->apply_stopped = true;
	const char *name = r->meta->volumes[io->volume].name;
	repl_set_error(r, error, io->save_failed ? "cow" : "apply", (int)io->volume, io->off, io->len,
		       "%s: %s of %s: %s; applying stopped, the last checkpoint stays good", r->meta->group, what, name,
		       err_short(error));
	if (!secondary_current(r, io) || r->closing)
		return;
	if (r->in_seq == 0) { /* the source may not have begun: to it this is the handshake still */
		session_refuse(r, error, r->error.text);
		return;
	}
	struct wire_refuse x = {.code = (uint16_t)-error};
	(void)memcpy(x.text, r->error.text, min_u64(sizeof(x.text) - 1, strlen(r->error.text)));
	int n = wire_refuse_encode(&x, r->scratch, sizeof(r->scratch));
	struct repl_action a = {.type = ACT_SEND, .data = r->scratch, .data_len = n > 0 ? (uint32_t)n : 0};
	a.frame.type = WIRE_IO_ERROR;
	a.frame.seq = io->seq;
	a.frame.volume = r->meta->volumes[io->volume].id;
	a.frame.offset = io->off;
	a.frame.length = io->len;
	a.frame.length_payload = a.data_len;
	repl_emit(r, &a);
	session_close(r, true);
}

/* Nothing more is applied on top of what the record may not say. A stop whose last checkpoint waits for that is taken
 * when the record can be saved again. */
void secondary_unsure(struct repl *r)
{
	if (r->stop && r->meta->role == ROLE_SECONDARY && !r->is_target && r->barrier == NULL) {
		struct repl_command *c = r->stop;
		r->stop = NULL;
		repl_command_done(r, c, r->save_error,
				  "the group's record could not be saved: %s; what was received, the stop's last "
				  "checkpoint too, is taken when it can be",
				  err_short(r->save_error));
	}
	if (r->is_target)
		stop_applying(r, &(struct repl_io){.session = r->session}, r->save_error, "saving the group's record");
	secondary_run(r);
}

/* All before the first that is left. A READ has the number of the frame before it. */
static void count_applied(struct repl *r)
{
	const struct repl_io *left = r->window.head ? r->window.head : r->held.head;
	uint64_t seq = left == NULL ? r->in_seq : left->kind == REPL_READ ? left->seq : left->seq - 1;
	r->in_applied = max_u64(r->in_applied, seq);
}

static void barrier_done(struct repl *r, struct repl_io *io, int error);

/* What was read, or why not; a failed read here is the peer's to judge, and stops nothing. */
static void answer_read(struct repl *r, struct repl_io *io, int error)
{
	struct wire_refuse x = {.code = (uint16_t)-error};
	struct repl_action a = {.type = ACT_SEND, .io = io};
	if (io->session != r->session || !r->is_target || r->closing)
		return;
	a.frame.type = WIRE_READ_REPLY;
	a.frame.seq = io->arg;
	a.frame.volume = r->meta->volumes[io->volume].id;
	a.frame.offset = io->off;
	a.frame.length = io->len;
	if (error) {
		(void)snprintf(x.text, sizeof(x.text), "%s", err_short(error));
		int n = wire_refuse_encode(&x, r->scratch, sizeof(r->scratch));
		a.io = NULL;
		a.data = r->scratch;
		a.data_len = n > 0 ? (uint32_t)n : 0;
		a.frame.flags = WIRE_READ_ERROR;
		a.frame.length_payload = a.data_len;
	} else if (io->hole) {
		a.frame.flags = WIRE_READ_ZERO;
	} else {
		a.frame.length_payload = (uint32_t)io->len;
	}
	repl_emit(r, &a);
}

void secondary_apply_end(struct repl *r, struct repl_io *io, int error)
{
	list_remove(io);
	repl_release_claim(r, io);
	if (io->kind == REPL_READ)
		answer_read(r, io, error);
	else if (error)
		stop_applying(r, io, error, io->save_failed ? "saving the old content" : "writing a block");
	bool counts = secondary_current(r, io) && !r->apply_stopped;
	if (io->kind == REPL_HASH && counts) /* before the ACK that covers it, so the source clears nothing too early */
		session_send(r, WIRE_HASH_ANSWER, io->seq, io->ext_len, 0, 0, NULL, 0);
	if (io->kind == REPL_VERIFY && counts)
		verify_answer_send(r, io);
	repl_complete(r, io, error);
	if (counts)
		count_applied(r);
	secondary_run(r);
}

void secondary_apply_done(struct repl *r, struct repl_io *io, int error)
{
	if (io == r->barrier) {
		barrier_done(r, io, error);
		return;
	}
	if (error && !r->apply_stopped && room_wait(r, io, error)) {
		repl_tx_run(r);
		return;
	}
	secondary_apply_end(r, io, error);
}

static void barrier_end(struct repl *r, struct repl_io *io)
{
	r->barrier = NULL;
	if (secondary_current(r, io))
		r->in_applied = max_u64(r->in_applied, io->seq);
	repl_complete(r, io, 0);
	secondary_run(r);
}

static void flushed_up_to(struct repl *r, const struct repl_io *io)
{
	if (!secondary_current(r, io))
		return;
	r->in_applied = max_u64(r->in_applied, io->seq);
	r->in_flushed = max_u64(r->in_flushed, io->seq);
	secondary_ack(r, true);
}

void secondary_barrier_flushed(struct repl *r, struct repl_io *io)
{
	flushed_up_to(r, io);
	barrier_end(r, io);
}

static void checkpoint_void(struct repl *r, struct repl_io *io, enum wire_void why)
{
	if (secondary_current(r, io))
		session_send(r, WIRE_CHECKPOINT_ACK, 0, io->arg, why, 0, NULL, 0);
	if (io->flags & WIRE_CKPT_STOP) {
		struct repl_command *c = r->stop;
		r->stop = NULL;
		repl_command_done(r, c, -ERR_STATE, "its last checkpoint could not be taken");
	}
	if (why == WIRE_VOID_ACTIVE)
		repl_log(r, 2, "checkpoint %llu not taken: the active overlay is not empty",
			 (unsigned long long)io->arg);
}

static void drop_held(struct repl *r)
{
	struct repl_io *io;
	while ((io = list_pop(&r->held)) != NULL)
		repl_complete(r, io, -ERR_CANCELED);
}

/* A resync that was cut before it began: this copy stays as it is. */
static void begin_cut(struct repl *r, struct repl_io *io)
{
	r->barrier = NULL;
	repl_complete(r, io, -ERR_CANCELED);
	drop_held(r); /* what stood behind it */
}

static void barrier_done(struct repl *r, struct repl_io *io, int error)
{
	if (error || r->apply_stopped) {
		if (error)
			stop_applying(r, io, error, "a flush");
		r->barrier = NULL;
		repl_complete(r, io, -ERR_CANCELED);
		secondary_run(r);
		return;
	}
	if (io->kind == REPL_FLUSH) {
		flushed_up_to(r, io);
		/* Barriers that follow with nothing between them are covered by the same sync. */
		while (r->held.head && r->held.head->kind == REPL_FLUSH && r->held.head->session == io->session) {
			struct repl_io *more = list_pop(&r->held);
			flushed_up_to(r, more);
			repl_complete(r, more, 0);
		}
		barrier_end(r, io);
		return;
	}
	if (io->kind == REPL_CHECKPOINT) {
		/* The shell says in ext_len how many bytes active holds. Of a copy that is stopped only a start makes
		 * one that runs. */
		if (r->meta->inconsistent || r->meta->state == STATE_DONE) {
			checkpoint_void(r, io, WIRE_VOID_ERROR);
			barrier_end(r, io);
			return;
		}
		if (io->ext_len && !(io->flags & (WIRE_CKPT_COMMAND | WIRE_CKPT_STOP))) {
			checkpoint_void(r, io, WIRE_VOID_ACTIVE);
			barrier_end(r, io);
			return;
		}
	}
	if (io->kind == REPL_RESIZE && !resize_asked(r, io))
		return;
	if (io->kind == REPL_RESYNC_BEGIN && !secondary_current(r, io)) {
		begin_cut(r, io);
		return;
	}
	if (io->kind == REPL_RESIZE) {
		struct tx *grow = repl_tx(r, TX_RESIZE);
		grow->io = io;
		grow->number = io->volume;
		grow->arg = io->arg;
		return;
	}
	struct tx *t = repl_tx(r, io->kind == REPL_CHECKPOINT	  ? TX_SWITCH
				  : io->kind == REPL_RESYNC_BEGIN ? TX_KEEP
				  : io->kind == REPL_RESYNC_DONE  ? TX_ADOPT
								  : TX_PEER_DETACH);
	t->io = io;
	t->number = io->arg;
	t->flags = io->flags;
	t->arg = io->ext_len;
	t->lineage = io->lineage;
	t->session = io->session;
}

void secondary_ack(struct repl *r, bool now)
{
	if (!r->is_target || r->closing)
		return;
	struct wire_ack a = {r->in_seq, r->in_applied, r->in_flushed};
	if (memcmp(&a, &r->acked, sizeof(a)) == 0)
		return;
	uint64_t p = r->meta->settings.protocol;
	bool due =
	    now || r->now_ns - r->acked_ns >= ACK_LAZY_NS || (p == PROTOCOL_B && a.received != r->acked.received) ||
	    ((p == PROTOCOL_C || repl_meta_flagged(r->meta, VOLUME_PEER_STALE)) && a.applied != r->acked.applied);
	if (!due)
		return;
	r->acked = a;
	r->acked_ns = r->now_ns;
	int n = wire_ack_encode(&a, r->scratch, sizeof(r->scratch));
	session_send(r, WIRE_ACK, 0, 0, 0, 0, r->scratch, (uint32_t)n);
}

/* on_io_error=pass on the primary: what the range holds there is not known. Its resync follows. */
void secondary_write_failed(struct repl *r, const struct repl_event *ev)
{
	struct wire_refuse x;
	if (!session_reason(r, ev, &x))
		return;
	int vi = repl_meta_volume_by_id(r->meta, ev->frame->volume);
	if (vi < 0) {
		session_protocol_error(r, "WRITE_FAILED names volume %u", ev->frame->volume);
		return;
	}
	repl_set_error(r, x.code, "peer write", vi, ev->frame->offset, ev->frame->length, "on the primary, %.*s",
		       WIRE_TEXT_MAX, x.text);
}

void secondary_session_lost(struct repl *r)
{
	/* What was received is still applied: protocol B promised it (I2). But not a resync that has not begun, nor
	 * what stands behind it: the primary has promised nothing since, and this copy stays consistent. */
	bool drop = r->barrier && r->barrier->kind == REPL_RESYNC_BEGIN && !repl_tx_pending(r, TX_KEEP);
	r->armed = 0;
	for (struct repl_io *io = r->held.head, *next; io; io = next) {
		next = io->next;
		drop = drop || io->kind == REPL_RESYNC_BEGIN;
		if (!drop)
			continue;
		list_remove(io);
		repl_complete(r, io, -ERR_CANCELED);
	}
	secondary_run(r);
}

void secondary_tick(struct repl *r, const struct repl_usage *u)
{
	if (r->is_target)
		secondary_ack(r, false);
	if (r->committing)
		failover_commit_pump(r);
	else if (r->meta->state == STATE_FAILOVER && !r->mark_busy && !r->commit_stopped)
		failover_commit_start(r);
	history_retention(r, u);
}

/* ---- resync as target ---- */

void secondary_adopt_sync(struct repl *r)
{
	r->sync_busy = true;
	r->sync_io.kind = REPL_FLUSH;
	r->sync_io.session = r->session;
	repl_submit(r, &r->sync_io, TARGET_CKPT);
}

static uint64_t dirty_bytes(const struct repl *r)
{
	uint64_t n = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		n += min_u64(r->vol[i].dirty.count << REGION_SHIFT, r->meta->volumes[i].size);
	return n;
}

/* The disk as it is becomes a checkpoint that is pinned, for now. There is room for it. */
static void keep_disk(struct repl *r, struct tx *t, struct repl_meta *m)
{
	t->opened = m->ckpt_max + 1;
	history_add(r, m, t->opened, CKPT_LOCAL, CKPT_PINNED);
	m->kept = t->opened;
}

/* A copy that was its host's own follows from now on. What it had checkpoints of is no default target [LASTLIN]. */
static void give_up_disk(struct repl_meta *m)
{
	m->role = ROLE_SECONDARY;
	if (m->state != STATE_NONE)
		repl_state_move(m, STATE_NONE);
	m->base = m->last_stream = 0;
	m->target = m->received = m->received_bytes = m->failover_generation = 0;
}

static bool prepare_keep(struct repl *r, struct tx *t, struct repl_meta *m)
{
	if (!m->inconsistent && !history_make_room(r, t, m, CKPTS_LAST))
		return false;
	if (m->role != ROLE_SECONDARY || m->state == STATE_DONE) /* the loser of a resolve */
		give_up_disk(m);
	m->split_brain = m->handed = false;
	m->settings = r->theirs.settings;
	if (!r->dialer)
		m->peer[0] = 0; /* one of the two dials */
	if (!m->inconsistent) {
		history_release_kept(m);
		keep_disk(r, t, m);
		/* Kept for good where it holds what the source never had. */
		uint64_t cur = m->lineage.current;
		const struct lineage *s = &r->theirs.lineage;
		bool related = cur == 0 || cur == s->current || cur == s->bitmap || lineage_has(s, cur);
		m->own_dirty = dirty_bytes(r) != 0 || !related;
	}
	m->inconsistent = true;
	m->sync_from = t->number;
	m->has_peer = true;
	return true;
}

/* Of the primary's detached disks. A primary that is ahead says all there is in its JOIN; one that is not may be the
 * one that could not record it. This host's own disks hold what the source's do. */
static void adopt_flags(const struct repl *r, struct repl_meta *m, bool ahead)
{
	for (uint32_t i = 0; i < m->n_volumes; i++) {
		uint8_t *f = &m->volumes[i].flags;
		*f &= (uint8_t) ~(VOLUME_STALE | VOLUME_REBUILD | (ahead ? VOLUME_PEER_STALE : 0));
		for (uint32_t k = 0; k < r->theirs.n_volumes; k++)
			if (strcmp(r->theirs.volumes[k].name, m->volumes[i].name) == 0 &&
			    (r->theirs.volumes[k].flags & VOLUME_STALE))
				*f |= VOLUME_PEER_STALE;
	}
}

/* DETACH: the generation that the primary begins, and the volume; ATTACH: the volume. One write. */
static void prepare_peer_detach(struct tx *t, struct repl_meta *m)
{
	uint8_t *f = &m->volumes[t->io->volume].flags;
	if (t->io->kind == REPL_DETACH) {
		lineage_adopt(&m->lineage, &t->lineage);
		*f |= VOLUME_PEER_STALE;
	} else {
		*f &= (uint8_t)~VOLUME_PEER_STALE;
	}
}

static void prepare_adopt(struct repl *r, struct tx *t, struct repl_meta *m)
{
	uint64_t old = m->lineage.current;
	adopt_flags(r, m, old != t->lineage.current);
	bool related =
	    old == 0 || old == t->lineage.current || old == t->lineage.bitmap || lineage_has(&t->lineage, old);
	lineage_adopt(&m->lineage, &t->lineage);
	/* [LASTLIN] what the followed lineage has discarded is no default target any more */
	if (!related || m->own_dirty) {
		for (uint32_t i = 0; i < m->n_ckpts; i++)
			m->ckpts[i].flags |= CKPT_FOREIGN;
		m->last_stream = 0;
	}
	m->diverged_ns = 0;
	m->inconsistent = m->alone = m->shut_out = m->split_brain = m->handed = false;
	m->sync_from = 0;
	m->has_peer = true;
}

/* ---- metadata changes ---- */

/* The view's own writes end: an active overlay of its own begins, empty. */
void secondary_fresh_active(struct tx *t, struct repl_meta *m)
{
	t->active_id = ++m->active_id;
}

/* A checkpoint from the stream. */
static bool prepare_switch(struct repl *r, struct tx *t, struct repl_meta *m)
{
	bool last = (t->flags & (WIRE_CKPT_STOP | WIRE_CKPT_HAND_OVER)) != 0;
	if (!history_make_room(r, t, m, last ? CKPTS_LAST : CKPTS_MOST))
		return false;
	t->opened = t->number;
	history_add(r, m, t->number, CKPT_STREAM, t->flags & WIRE_CKPT_PIN ? CKPT_PINNED : 0);
	m->base = m->last_stream = t->number;
	history_release_kept(m);
	m->fresh = m->broken = false;
	/* What a failed write has left in its files is of the old base: a restart would show it over this one. */
	if (t->arg || t->io->hole || m->active_id == 0)
		secondary_fresh_active(t, m);
	repl_state_move(m, STATE_RUNNING);
	if (t->flags & WIRE_CKPT_STOP)
		repl_state_move(m, STATE_DONE);
	return true;
}

bool secondary_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	switch (t->kind) {
	case TX_SECONDARY:
		if (t->arg && !history_make_room(r, t, m, CKPTS_LAST))
			return false;
		give_up_disk(m);
		m->inconsistent = m->has_peer = true;
		m->sync_from = 0;
		if (t->arg) { /* for good: nobody but its owner can know what was in it */
			keep_disk(r, t, m);
			m->own_dirty = true;
		} else {
			m->fresh = true;
			m->lineage = (struct lineage){0};
		}
		for (uint32_t i = 0; i < m->n_volumes; i++)
			m->volumes[i].flags &= VOLUME_STALE;
		for (uint32_t i = 0; i < m->n_volumes; i++) /* the hub's ids rule */
			for (uint32_t k = 0; k < r->theirs.n_volumes; k++)
				if (strcmp(m->volumes[i].name, r->theirs.volumes[k].name) == 0)
					m->volumes[i].id = r->theirs.volumes[k].id;
		m->peer[0] = 0;
		return true;
	case TX_RESTART:
		repl_state_move(m, STATE_NONE);
		return true;
	case TX_KEEP:
		return prepare_keep(r, t, m);
	case TX_ADOPT:
		prepare_adopt(r, t, m);
		return true;
	case TX_PEER_DETACH:
		prepare_peer_detach(t, m);
		return true;
	case TX_SWITCH:
		return prepare_switch(r, t, m);
	case TX_FAILOVER:
	case TX_COMMITTED:
	case TX_COMMIT_FAILED:
	case TX_COMMIT_RETRY:
		return failover_prepare(r, t, m);
	case TX_DISCARD:
		secondary_fresh_active(t, m);
		return true;
	default:
		UNREACHABLE();
	}
}

static void switched(struct repl *r, struct tx *t, int error)
{
	struct repl_io *io = t->io;
	if (error) {
		bool full = error == -ERR_CANCELED;
		if (full) {
			error = -ERR_LIMIT;
			repl_set_error(r, error, "checkpoint", -1, 0, 0,
				       "%s: no checkpoint was taken: " CKPTS_FULL_TEXT, r->meta->group);
		}
		checkpoint_void(r, io, WIRE_VOID_ERROR);
		if (r->want_ckpt) {
			repl_command_done(r, r->want_ckpt, error, "the checkpoint could not be saved: %s",
					  full ? CKPTS_FULL_TEXT : err_short(error));
			r->want_ckpt = NULL;
		}
		barrier_end(r, io);
		if (full)
			repl_gate_run(r); /* the view's writes waited; else the save's end does this */
		return;
	}
	r->counters.checkpoints++;
	r->error.code = 0;
	r->ckpt_owed = false;
	r->early_ns = r->now_ns + EARLY_MIN_NS;
	if (secondary_current(r, io))
		session_send(r, WIRE_CHECKPOINT_ACK, t->arg, t->number, WIRE_VOID_NONE, 0, NULL, 0);
	if (r->want_ckpt && (t->flags & WIRE_CKPT_COMMAND)) {
		r->want_ckpt->result = t->number;
		repl_command_done(r, r->want_ckpt, 0, " ");
		r->want_ckpt = NULL;
	}
	if (t->flags & WIRE_CKPT_STOP) {
		struct repl_command *c = r->stop;
		r->stop = NULL;
		if (c) {
			c->result2 = t->arg;
			repl_stopped(r, c);
		}
		if (secondary_current(r, io))
			session_close(r, true);
		drop_held(r); /* barriers; from here on the disk is this host's own */
	}
	if (secondary_current(r, io) && (t->flags & WIRE_CKPT_HAND_OVER) && r->in_seq == io->seq)
		r->armed = t->number; /* the primary has not gone on as such meanwhile */
	barrier_end(r, io);
}

/* The record could not be saved: nothing behind this barrier is applied. */
static void barrier_unsaved(struct repl *r, struct repl_io *io, int error)
{
	stop_applying(r, io, error, "the group's record");
	r->barrier = NULL;
	repl_complete(r, io, error);
	secondary_run(r);
}

static void kept(struct repl *r, struct tx *t, int error)
{
	r->yielding = false;
	if (error == -ERR_CANCELED && !secondary_current(r, t->io)) {
		begin_cut(r, t->io);
		repl_gate_run(r);
		return;
	}
	if (error == -ERR_CANCELED) {
		repl_log(r, 0, "%s: a resync keeps what this host holds as a checkpoint first: " CKPTS_FULL_TEXT,
			 r->meta->group);
		error = -ERR_LIMIT;
	}
	if (error) {
		barrier_unsaved(r, t->io, error);
		return;
	}
	session_resolved(r); /* it goes on from here without a new decision */
	repl_stepped_down(r);
	if (r->meta->own_dirty && t->opened) /* not again where a resync begins anew */
		repl_log(r, 1, "what this host held and the peer may not have, %llu bytes, stays as checkpoint %llu",
			 (unsigned long long)dirty_bytes(r), (unsigned long long)r->meta->kept);
	if (secondary_current(r, t->io))
		session_send(r, WIRE_RESYNC_READY, t->io->seq, r->ckpt_used, 0, 0, NULL, 0);
	barrier_end(r, t->io);
}

static void peer_detached(struct repl *r, struct tx *t, int error)
{
	struct repl_io *io = t->io;
	if (error) {
		barrier_unsaved(r, io, error);
		return;
	}
	repl_log(r, 1, "the primary's disk of %s is %s", r->meta->volumes[io->volume].name,
		 io->kind == REPL_DETACH ? "detached: this copy is the only current one" : "whole again");
	if (io->kind == REPL_DETACH)
		stop_overtaken(r, "the primary's disk was detached meanwhile: it writes through this host; `resync` it "
				  "there first, or `failover`");
	flushed_up_to(r, io);
	barrier_end(r, io);
}

static void adopted(struct repl *r, struct tx *t, int error)
{
	struct repl_io *io = t->io;
	if (error) {
		barrier_unsaved(r, io, error);
		return;
	}
	for (uint32_t i = 0; i < r->meta->n_volumes;
	     i++) { /* the end of the resync is durable: its own bits go [TGTBITS] */
		bitmap_clear_all(&r->vol[i].dirty);
		bitmap_clear_all(&r->vol[i].touched);
	}
	if (secondary_current(r, io)) {
		r->theirs.lineage = t->lineage;
		if (r->in_phase == STREAM_OPEN && io->seq == r->in_done_seq) {
			r->link = LINK_SYNCED;
			r->congestion_said = false;
		}
		r->error.code = 0;
		r->ckpt_owed = true;
		r->in_applied = r->in_flushed = max_u64(r->in_flushed, io->seq);
		session_send(r, WIRE_RESYNC_ACK, io->seq, 0, 0, 0, NULL, 0);
		secondary_ack(r, true);
	}
	barrier_end(r, io);
}

void secondary_tx_done(struct repl *r, struct tx *t, int error)
{
	switch (t->kind) {
	case TX_KEEP:
		kept(r, t, error);
		return;
	case TX_ADOPT:
		adopted(r, t, error);
		return;
	case TX_PEER_DETACH:
		peer_detached(r, t, error);
		return;
	case TX_SWITCH:
		switched(r, t, error);
		return;
	case TX_FAILOVER:
	case TX_COMMITTED:
	case TX_COMMIT_FAILED:
	case TX_COMMIT_RETRY:
		failover_tx_done(r, t, error);
		return;
	case TX_DISCARD:
		/* The checkpoint that ends a resync is asked for again once active is empty (SPEC 7). */
		if (!error && r->ckpt_owed && r->is_target && r->link == LINK_SYNCED)
			session_send(r, WIRE_CHECKPOINT_WANT, 0, 0, 0, 0, NULL, 0);
		if (t->command)
			t->command->result2 = t->arg;
		repl_command_done(r, t->command, error, "the discard could not be saved: %s", err_short(error));
		return;
	case TX_DROP:
		history_dropped(r, t, error);
		return;
	default:
		UNREACHABLE();
	}
}

static void adopt_synced(struct repl *r, uint64_t session, int error)
{
	if (!r->adopting || session != r->session || r->closing)
		return; /* its connection has ended: nothing was given up */
	if (error)
		session_refuse(r, ERR_IO, "that host could not flush its disk before the sync");
	else
		repl_tx(r, TX_SECONDARY)->arg = 1;
}

static void synced(struct repl *r, int error)
{
	uint64_t session = r->sync_io.session; /* an adoption's has one */
	r->sync_io.session = 0;
	r->sync_busy = false;
	if (session)
		adopt_synced(r, session, error);
	else
		failover_synced(r, error);
}

void secondary_internal_done(struct repl *r, struct repl_io *io, int error)
{
	if (io == &r->mark_io)
		failover_marked(r, error);
	else if (io == &r->sync_io)
		synced(r, error);
	else if (io == &r->merge_io)
		history_merged(r, error);
	else if (io == &r->scrub_io)
		verify_scrub_done(r);
	else if (!error || !room_wait(r, io, error))
		failover_commit_end(r, io, error);
	repl_tx_run(r);
}
