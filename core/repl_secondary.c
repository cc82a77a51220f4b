/* The receiving side: applying the stream, barriers, checkpoints, resync as target; and failover with its commit.
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
 *
 * Failover: end of the stream → what was received is applied → every block of undo(base) .. live and active is durably
 * dirty [FOBITS] → the disks are synced [FOFLUSH] → one metadata write: generation [FOGEN], target, state, local
 * checkpoint of the disk as received [FOTARGET, FOKEEP] → answered. The way back is written in the background, as
 * ordinary writes of the new epoch, region by region under exclusive claims; a guest's write to active puts its regions
 * back into `todo`, and after the first pass guests' writes are let in at half the commit's pace, so that it ends under
 * any load. When `todo` is empty the disks are synced; then requests wait, the little that came meanwhile is written
 * and synced, one metadata write: DONE.
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

static bool is_barrier(const struct repl_io *io)
{
	return io->kind == REPL_FLUSH || io->kind == REPL_CHECKPOINT || io->kind == REPL_RESYNC_BEGIN ||
	       io->kind == REPL_RESYNC_DONE || io->kind == REPL_DETACH || io->kind == REPL_ATTACH;
}

/* Of the session that stands; what an ended one delivered is applied and answered to nobody. */
static bool current(const struct repl *r, const struct repl_io *io)
{
	return r->is_target && io->session == r->session;
}

bool secondary_quiet(const struct repl *r)
{
	return r->held.head == NULL && r->window.head == NULL && r->barrier == NULL;
}

static uint64_t active_id_next(const struct repl_meta *m)
{
	return m->active_id + 1;
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
	if (io->resync)
		return r->in_phase == STREAM_RESYNC ? NULL : "resync data outside a resync";
	return r->in_phase == STREAM_CLOSED ? "data before RESYNC_BEGIN" : NULL;
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
	if ((io->kind == REPL_DETACH || io->kind == REPL_ATTACH) && r->link != LINK_SYNCED) {
		repl_complete(r, io, -ERR_CANCELED);
		session_protocol_error(r, "a detach outside of SYNCED");
		return;
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

void secondary_settle(struct repl *r)
{
	if (r->barrier_waits && r->writes_in_flight == 0) {
		r->barrier_waits = false;
		repl_submit(r, r->barrier, TARGET_CKPT);
	}
	session_join_ready(r);
	if (r->failing_over)
		secondary_failover_go(r);
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
		io->claim.shared = io->kind == REPL_READ;
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
	if (!current(r, io) || r->closing)
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

/* Nothing more is applied on top of what the record may not say. */
void secondary_unsure(struct repl *r)
{
	if (r->is_target)
		stop_applying(r, &(struct repl_io){.session = r->session}, r->save_error, "saving the group's record");
	secondary_run(r);
}

static void applied_up_to(struct repl *r, uint64_t seq)
{
	const struct repl_io *head = r->window.head;
	if (head)
		r->in_applied = max_u64(r->in_applied, head->kind == REPL_READ ? head->seq : head->seq - 1);
	else
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
	uint64_t last = r->window.tail->seq;
	list_remove(io);
	repl_release_claim(r, io);
	if (io->kind == REPL_READ)
		answer_read(r, io, error);
	else if (error)
		stop_applying(r, io, error, io->save_failed ? "saving the old content" : "writing a block");
	bool counts = current(r, io) && !r->apply_stopped;
	if (io->kind == REPL_HASH && counts) /* before the ACK that covers it, so the source clears nothing too early */
		session_send(r, WIRE_HASH_ANSWER, io->seq, io->ext_len, 0, 0, NULL, 0);
	repl_complete(r, io, error);
	if (counts)
		applied_up_to(r, last);
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
	if (current(r, io))
		r->in_applied = max_u64(r->in_applied, io->seq);
	repl_complete(r, io, 0);
	secondary_run(r);
}

static void flushed_up_to(struct repl *r, const struct repl_io *io)
{
	if (!current(r, io))
		return;
	r->in_applied = max_u64(r->in_applied, io->seq);
	r->in_flushed = max_u64(r->in_flushed, io->seq);
	secondary_ack(r, true);
}

static void checkpoint_void(struct repl *r, struct repl_io *io, enum wire_void why)
{
	if (current(r, io))
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
		/* The shell says with hole=false, ext_len > 0 how many bytes active holds. */
		if (r->meta->inconsistent) {
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
	if (io->kind == REPL_RESYNC_BEGIN && !current(r, io)) {
		/* Cut before it began: this copy stays as it is (what stood behind it is gone already). */
		r->barrier = NULL;
		repl_complete(r, io, -ERR_CANCELED);
		secondary_run(r);
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
	bool due = now || r->now_ns - r->acked_ns >= ACK_LAZY_NS ||
		   (p == PROTOCOL_B && a.received != r->acked.received) ||
		   ((p == PROTOCOL_C || repl_peer_stale(r->meta)) && a.applied != r->acked.applied);
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
	struct err e;
	if (wire_refuse_decode(&x, ev->payload, ev->frame->length_payload, &e) < 0) {
		session_protocol_error(r, "%s", e.text);
		return;
	}
	int vi = -1;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		if (r->meta->volumes[i].id == ev->frame->volume)
			vi = (int)i;
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

void secondary_tick(struct repl *r)
{
	if (r->is_target)
		secondary_ack(r, false);
	if (r->committing)
		secondary_commit_pump(r);
	else if (r->meta->state == STATE_FAILOVER && !r->mark_busy && !r->commit_stopped)
		secondary_commit_start(r);
	secondary_retention(r);
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

/* Appends a checkpoint to the record. */
static void add_ckpt(struct repl *r, struct repl_meta *m, uint64_t number, enum ckpt_kind kind, unsigned flags)
{
	INVARIANT(m->n_ckpts < GROUP_CKPTS_MAX);
	INVARIANT(m->n_ckpts == 0 || m->ckpts[m->n_ckpts - 1].number < number);
	m->ckpts[m->n_ckpts++] = (struct repl_ckpt){.number = number,
						    .generation = m->lineage.current,
						    .time_ns = r->wall_ns,
						    .kind = (uint8_t)kind,
						    .flags = (uint8_t)flags};
	m->ckpt_max = max_u64(m->ckpt_max, number);
}

static void pin(struct repl_meta *m, uint64_t number, bool on)
{
	int i = repl_meta_find_ckpt(m, number);
	if (i < 0)
		return;
	if (on)
		m->ckpts[i].flags |= CKPT_PINNED;
	else
		m->ckpts[i].flags &= (uint8_t)~CKPT_PINNED;
}

/* The checkpoint before the last resync: pinned until that has taken its own, for good where it holds more. */
void secondary_release_kept(struct repl_meta *m)
{
	if (m->kept && !m->own_dirty)
		pin(m, m->kept, false);
	m->kept = 0;
	m->own_dirty = false;
}

/* Retention may be behind: then the oldest goes now; it needs no merge. */
static void make_room(struct tx *t, struct repl_meta *m)
{
	if (m->n_ckpts < GROUP_CKPTS_MAX)
		return;
	t->dropped_through = m->ckpts[0].number;
	repl_ckpt_remove(m, t->dropped_through);
}

/* The disk as it is becomes a checkpoint that is pinned, for now. */
static void keep_disk(struct repl *r, struct tx *t, struct repl_meta *m)
{
	make_room(t, m);
	t->opened = m->ckpt_max + 1;
	add_ckpt(r, m, t->opened, CKPT_LOCAL, CKPT_PINNED);
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

static void prepare_keep(struct repl *r, struct tx *t, struct repl_meta *m)
{
	if (m->role != ROLE_SECONDARY || m->state == STATE_DONE) /* the loser of a resolve */
		give_up_disk(m);
	m->split_brain = false;
	m->settings = r->theirs.settings;
	if (!r->dialer)
		m->peer[0] = 0; /* one of the two dials */
	if (!m->inconsistent) {
		secondary_release_kept(m);
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
	m->inconsistent = m->alone = m->shut_out = m->split_brain = false;
	m->sync_from = 0;
	m->has_peer = true;
}

/* ---- retention ---- */

/* keep_last: the oldest unpinned one above the count goes. Merging into an older neighbour is I/O and comes first. */
void secondary_retention(struct repl *r)
{
	const struct repl_meta *m = r->meta;
	if (r->merge_busy || r->dropping || r->saving || r->failing_over || m->state == STATE_FAILOVER ||
	    m->state == STATE_FAILOVER_FAILED || r->now_ns < r->retention_ns)
		return;
	/* A primary's are from when it followed: they go once the new secondary has one of its own. */
	bool now_primary = m->role == ROLE_PRIMARY && m->last_stream;
	uint64_t unpinned = 0;
	uint32_t oldest = UINT32_MAX;
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		if (m->ckpts[i].flags & CKPT_PINNED)
			continue;
		unpinned++;
		bool alone = now_primary && m->n_ckpts == 1; /* the live epoch's goes as the last one of the chain */
		if (oldest == UINT32_MAX && (alone || !repl_ckpt_needed(m, i)))
			oldest = i;
	}
	if (unpinned <= (now_primary ? 0 : m->settings.keep_last) || oldest == UINT32_MAX)
		return;
	if (m->n_ckpts == 1) {
		if (!repl_tx_pending(r, TX_DROP))
			repl_tx(r, TX_DROP)->number = m->ckpts[0].number;
		return;
	}
	r->merge_busy = true;
	r->merge_io.kind = REPL_MERGE;
	r->merge_io.flags = 0;
	r->merge_io.arg = m->ckpts[oldest].number;
	repl_submit(r, &r->merge_io, TARGET_OWN);
}

void repl_ckpt_remove(struct repl_meta *m, uint64_t number)
{
	int i = repl_meta_find_ckpt(m, number);
	if (i < 0)
		return;
	memmove(&m->ckpts[i], &m->ckpts[i + 1], (m->n_ckpts - (uint32_t)i - 1) * sizeof(m->ckpts[0]));
	m->n_ckpts--;
	memset(&m->ckpts[m->n_ckpts], 0, sizeof(m->ckpts[0]));
	uint64_t *refs[] = {&m->base, &m->last_stream, &m->kept};
	for (unsigned k = 0; k < ARRAY_LEN(refs); k++)
		if (*refs[k] == number)
			*refs[k] = 0;
	if (m->target == number && (m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED))
		m->target = 0;
}

/* ---- metadata changes ---- */

static void prepare_failover(struct repl *r, struct tx *t, struct repl_meta *m)
{
	uint64_t to = r->failover_outcome;
	bool latest = to == FAILOVER_LATEST;
	t->opened = 0;
	if (m->n_ckpts && m->n_ckpts < GROUP_CKPTS_MAX) {
		t->opened = m->ckpt_max + 1;
		add_ckpt(r, m, t->opened, m->inconsistent ? CKPT_PARTIAL : CKPT_LOCAL, CKPT_PINNED);
	}
	m->received = t->opened;
	m->received_bytes = t->arg;
	m->role = ROLE_STANDALONE;
	if (m->state == STATE_DONE)
		repl_state_move(m, STATE_NONE);
	repl_state_move(m, STATE_FAILOVER);
	if (latest) {
		repl_state_move(m, STATE_DONE);
		m->target = m->base = 0;
	} else {
		m->target = m->base = to;
	}
	/* A former primary has no active overlay yet. */
	if (latest || m->active_id == 0 || (r->failover && (r->failover->flags & FAILOVER_DISCARD_ACTIVE))) {
		t->active_id = active_id_next(m);
		m->active_id = t->active_id;
	}
	repl_begin_generation(r, m);
	m->failover_generation = m->lineage.current;
	m->has_peer = true;
	m->inconsistent = m->fresh = m->shut_out = m->broken = m->own_dirty = false;
	m->sync_from = 0;
	m->kept = 0;
	for (uint32_t i = 0; i < m->n_volumes; i++)
		m->volumes[i].flags = 0;
}

void secondary_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	switch (t->kind) {
	case TX_SECONDARY:
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
		return;
	case TX_RESTART:
		repl_state_move(m, STATE_NONE);
		return;
	case TX_KEEP:
		prepare_keep(r, t, m);
		return;
	case TX_ADOPT:
		prepare_adopt(r, t, m);
		return;
	case TX_PEER_DETACH:
		prepare_peer_detach(t, m);
		return;
	case TX_SWITCH:
		make_room(t, m);
		t->opened = t->number;
		add_ckpt(r, m, t->number, CKPT_STREAM, t->flags & WIRE_CKPT_PIN ? CKPT_PINNED : 0);
		m->base = m->last_stream = t->number;
		secondary_release_kept(m);
		m->fresh = m->broken = false;
		if (t->arg || m->active_id == 0) {
			t->active_id = active_id_next(m);
			m->active_id = t->active_id;
		}
		repl_state_move(m, STATE_RUNNING);
		if (t->flags & WIRE_CKPT_STOP)
			repl_state_move(m, STATE_DONE);
		return;
	case TX_FAILOVER:
		prepare_failover(r, t, m);
		return;
	case TX_COMMITTED:
		repl_state_move(m, STATE_DONE);
		m->base = 0;
		t->active_id = active_id_next(m);
		m->active_id = t->active_id;
		return;
	case TX_COMMIT_FAILED:
		repl_state_move(m, STATE_FAILOVER_FAILED);
		return;
	case TX_COMMIT_RETRY:
		repl_state_move(m, STATE_FAILOVER);
		return;
	case TX_DISCARD:
		t->active_id = active_id_next(m);
		m->active_id = t->active_id;
		return;
	case TX_DROP:
		t->dropped = t->number;
		repl_ckpt_remove(m, t->dropped);
		return;
	default:
		UNREACHABLE();
	}
}

static void switched(struct repl *r, struct tx *t, int error)
{
	struct repl_io *io = t->io;
	if (error) {
		checkpoint_void(r, io, WIRE_VOID_ERROR);
		if (r->want_ckpt) {
			repl_command_done(r, r->want_ckpt, error, "the checkpoint could not be saved: %s",
					  err_short(error));
			r->want_ckpt = NULL;
		}
		barrier_end(r, io);
		return;
	}
	r->counters.checkpoints++;
	r->error.code = 0;
	r->ckpt_owed = false;
	if (current(r, io))
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
		if (current(r, io))
			session_close(r, true);
	}
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
	if (error) {
		barrier_unsaved(r, t->io, error);
		return;
	}
	session_resolved(r); /* it goes on from here without a new decision */
	repl_stepped_down(r);
	if (r->meta->own_dirty && t->opened) /* not again where a resync begins anew */
		repl_log(r, 1, "what this host held and the peer may not have, %llu bytes, stays as checkpoint %llu",
			 (unsigned long long)dirty_bytes(r), (unsigned long long)r->meta->kept);
	if (current(r, t->io))
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
	if (current(r, io)) {
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

static void failed_over(struct repl *r, struct tx *t, int error)
{
	struct repl_command *c = r->failover;
	r->failover = NULL;
	r->failing_over = r->told = false;
	r->marked = !error;
	if (error) {
		repl_command_done(r, c, error, "the failover could not be saved: %s; nothing was changed",
				  err_short(error));
		return;
	}
	const struct repl_meta *m = r->meta;
	repl_log(r, 1, "failed over to %s", m->target ? "a checkpoint" : "latest");
	if (c) {
		c->result = m->target;
		c->result2 = m->received;
		c->result3 = m->received_bytes;
		int i = repl_meta_find_ckpt(m, m->target);
		c->result_time_ns = i >= 0 ? m->ckpts[i].time_ns : 0;
		repl_command_done(r, c, 0, " ");
	}
	r->error.code = 0;
	(void)t;
	if (m->state == STATE_FAILOVER) {
		secondary_commit_start(r);
		return;
	}
	for (uint32_t i = 0; i < m->n_volumes; i++)
		bitmap_clear_all(&r->vol[i].todo);
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
		failed_over(r, t, error);
		return;
	case TX_COMMITTED:
		r->finalising = false;
		if (!error) {
			r->committing = r->throttled = false;
			repl_log(r, 2, "the failover is committed");
		}
		return;
	case TX_COMMIT_FAILED:
	case TX_COMMIT_RETRY:
		if (t->kind == TX_COMMIT_RETRY && !error) {
			r->error.code = 0;
			secondary_commit_start(r);
		}
		if (t->kind == TX_COMMIT_FAILED && error)
			r->commit_stopped = false; /* not even that could be saved: the tick tries the commit again */
		repl_command_done(r, t->command, error, "the group's record could not be saved: %s", err_short(error));
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
		if (t->command == r->dropping)
			r->dropping = NULL;
		r->merge_busy = false;
		repl_command_done(r, t->command, error, "the group's record could not be saved: %s", err_short(error));
		room_merge_done(r, error);
		return;
	default:
		UNREACHABLE();
	}
}

/* ---- failover ---- */

static bool same_outcome(const struct repl_meta *m, uint64_t to)
{
	return to == FAILOVER_DEFAULT || to == (m->target ? m->target : FAILOVER_LATEST);
}

/* What `to` means now: a checkpoint's number or FAILOVER_LATEST; -ERR_x with the reason in the command. */
static int outcome(struct repl *r, struct repl_command *c, uint64_t *ret)
{
	const struct repl_meta *m = r->meta;
	uint64_t to = c->number;
	bool force = (c->flags & FAILOVER_FORCE) != 0;
	if (to == FAILOVER_DEFAULT && m->settings.failover_to == FAILOVER_TO_LATEST)
		to = FAILOVER_LATEST;
	if (to == FAILOVER_DEFAULT) {
		to = m->last_stream;
		if (to == 0 && !force && m->inconsistent && m->kept) {
			repl_command_done(
			    r, c, -ERR_STATE,
			    "this copy has no checkpoint of the data that it follows now; `--force` goes back "
			    "to what this host held itself before that, checkpoint %llu",
			    (unsigned long long)m->kept);
			return -ERR_STATE;
		}
		if (to == 0 && !force) {
			repl_command_done(r, c, -ERR_STATE,
					  "there is no checkpoint from the stream to go back to%s; `--to latest` takes "
					  "the disk as received, "
					  "`--force` what there is",
					  m->inconsistent ? " and the first sync has not ended"
					  : m->broken	  ? " (they were given up: on_cow_error=break)"
							  : "");
			return -ERR_STATE;
		}
		if (to == 0)
			to = FAILOVER_LATEST;
	}
	if (to == FAILOVER_LATEST && m->inconsistent) { /* [LATESTINC] */
		if (m->kept) {
			to = m->kept;
		} else if (m->n_ckpts && m->last_stream) {
			to = m->last_stream;
		} else if (!force) {
			repl_command_done(
			    r, c, -ERR_STATE,
			    "the first sync has not ended: the disk is incomplete; `--force` takes it as it is");
			return -ERR_STATE;
		}
	}
	if (to != FAILOVER_LATEST && repl_meta_find_ckpt(m, to) < 0) {
		repl_command_done(r, c, -ERR_NOENT, "no checkpoint %llu here; see `checkpoints`",
				  (unsigned long long)to);
		return -ERR_NOENT;
	}
	*ret = to;
	return 0;
}

/* Own writes in active belong to the base: only the default outcome that stays there keeps them. */
static bool loses_active(const struct repl *r, const struct repl_command *c, uint64_t to)
{
	bool stays = c->number == FAILOVER_DEFAULT && to == r->meta->base;
	return !stays && !(c->flags & FAILOVER_DISCARD_ACTIVE);
}

static void refuse_active(struct repl *r, struct repl_command *c)
{
	repl_command_done(r, c, -ERR_STATE,
			  "the active overlay holds this side's own writes, which belong to checkpoint %llu; "
			  "`--discard-active` gives them up",
			  (unsigned long long)r->meta->base);
}

void secondary_failover(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	if (m->role == ROLE_PRIMARY) {
		repl_command_done(r, c, -ERR_STATE, "this host is primary for it; run it on the peer (%s)",
				  m->peer[0] ? m->peer : "unknown");
		return;
	}
	if (r->failing_over) {
		repl_command_done(r, c, -ERR_BUSY, "another failover is under way");
		return;
	}
	if (m->role == ROLE_STANDALONE) {
		if (m->failover_generation == 0) {
			repl_command_done(r, c, -ERR_STATE,
					  "it is standalone on this host: there is nothing to fail over from");
			return;
		}
		if (!same_outcome(m, c->number)) {
			repl_command_done(r, c, -ERR_STATE, "it has failed over to %s%llu already",
					  m->target ? "checkpoint " : "latest, checkpoint ",
					  (unsigned long long)(m->target ? m->target : m->received));
			return;
		}
		c->result = m->target;
		c->result2 = m->received;
		c->result3 = m->received_bytes;
		int i = repl_meta_find_ckpt(m, m->target);
		c->result_time_ns = i >= 0 ? m->ckpts[i].time_ns : 0;
		if (m->state == STATE_FAILOVER_FAILED && repl_tx_pending(r, TX_COMMIT_RETRY)) {
			repl_command_done(r, c, -ERR_BUSY, "the commit is about to be tried again");
			return;
		}
		if (m->state == STATE_FAILOVER_FAILED) {
			repl_tx(r, TX_COMMIT_RETRY)->command = c;
			return;
		}
		repl_command_done(r, c, 0, " ");
		return;
	}
	if (m->state == STATE_DONE) {
		repl_command_done(r, c, -ERR_STATE,
				  "replication is stopped: this host owns its disk already; `unprotect` frees it");
		return;
	}
	for (uint32_t i = 0; i < m->n_volumes; i++) {
		if (!(m->volumes[i].flags & VOLUME_STALE) || (c->flags & FAILOVER_FORCE))
			continue;
		repl_command_done(
		    r, c, -ERR_STATE,
		    "the disk of %s here was detached and is not current; the peer's is. `--force` takes it as it is",
		    m->volumes[i].name);
		return;
	}
	if (m->shut_out && !(c->flags & FAILOVER_FORCE)) {
		repl_command_done(r, c, -ERR_STATE,
				  "the peer has failed over; run `failback` there, or `--force` to make two lineages");
		return;
	}
	uint64_t to;
	if (outcome(r, c, &to) < 0)
		return;
	/* The shell puts the number of bytes in active into result3. */
	if (c->result3 && loses_active(r, c, to)) {
		refuse_active(r, c);
		return;
	}
	r->failover = c;
	r->failover_outcome = to;
	r->failing_over = true;
	r->marked = false;
	if (r->link != LINK_DOWN) {
		/* End of the stream. What follows of this session is fenced by its number. */
		if (!r->closing)
			session_send(r, WIRE_GOODBYE, 0, WIRE_BYE_FAILOVER, 0, 0, NULL, 0);
		session_close(r, true);
		session_link_down(r, -ERR_PEER, "this host fails over");
		r->session = 0;
	}
	secondary_failover_go(r);
}

/* Goes on when all that was received is applied and no write to active is under way. */
void secondary_failover_go(struct repl *r)
{
	if (!r->failing_over || !secondary_quiet(r) || r->writes_in_flight || r->mark_busy || r->marked ||
	    r->clear_busy || r->merge_busy || r->sync_busy || r->union_busy || r->saving || r->tx_count)
		return;
	/* What was received may have ended in a checkpoint, or in the end of a resync: what is asked for is looked at
	 * again. */
	if (outcome(r, r->failover, &r->failover_outcome) < 0) {
		r->failover = NULL;
		r->failing_over = false;
		repl_gate_run(r);
		return;
	}
	/* From the older of the target and the base: what differs from the primary, and what has to go back. */
	uint64_t to = r->failover_outcome, base = r->meta->base;
	r->mark_busy = true;
	r->mark_io.kind = REPL_MARK;
	r->mark_io.arg = to == FAILOVER_LATEST ? base : base && base < to ? base : to;
	repl_submit(r, &r->mark_io, TARGET_OWN);
}

void secondary_commit_start(struct repl *r)
{
	if (!r->marked && !r->mark_busy) { /* after a restart: what is to do is found again */
		if (r->clear_busy)
			return; /* it could undo the bits that the mark sets; the tick comes again */
		r->mark_busy = true;
		r->mark_io.kind = REPL_MARK;
		r->mark_io.arg = r->meta->base;
		repl_submit(r, &r->mark_io, TARGET_OWN);
		return;
	}
	r->committing = true;
	r->commit_stopped = r->presynced = r->throttled = false;
	r->admit = 0;
	r->commit_vol = 0;
	r->commit_off = 0;
	r->commit_total = r->commit_done = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		r->commit_total += r->vol[i].todo.count << REGION_SHIFT;
	secondary_commit_pump(r);
}

static struct repl_io *commit_slot(struct repl *r)
{
	for (unsigned i = 0; i < COMMITS_MAX; i++)
		if (!r->commit_busy[i])
			return &r->commit[i];
	return NULL;
}

static bool commit_next(struct repl *r, struct repl_io *io)
{
	for (unsigned turn = 0; turn < 2; turn++) {
		for (; r->commit_vol < r->meta->n_volumes; r->commit_vol++, r->commit_off = 0) {
			struct repl_volume_state *v = &r->vol[r->commit_vol];
			uint64_t first = bitmap_next_set(&v->todo, r->commit_off >> REGION_SHIFT);
			if (first == BITMAP_NONE)
				continue;
			uint64_t end = bitmap_next_clear(&v->todo, first);
			if (end == BITMAP_NONE)
				end = v->todo.nbits;
			uint64_t off = first << REGION_SHIFT;
			io->volume = r->commit_vol;
			io->off = off;
			io->len = min_u64(min_u64(end << REGION_SHIFT, r->meta->volumes[r->commit_vol].size) - off,
					  COMMIT_MAX);
			r->commit_off = off + io->len;
			r->throttled = r->throttled || turn > 0; /* behind the first pass: guests write it anew */
			return true;
		}
		r->commit_vol = 0;
		r->commit_off = 0;
	}
	return false;
}

void secondary_commit_pump(struct repl *r)
{
	if (r->shutdown || !r->committing || r->commit_stopped || r->meta->state != STATE_FAILOVER ||
	    repl_tx_pending(r, TX_COMMITTED))
		return;
	struct repl_io *io;
	while ((io = commit_slot(r)) != NULL && commit_next(r, io)) {
		io->kind = REPL_COMMIT;
		repl_claim_blocks(io);
		/* Cleared before the commit reads: a write to active that comes later sets it again. */
		bitmap_clear_range(&r->vol[io->volume].todo, io->off >> REGION_SHIFT, units_of(io->len, REGION_SHIFT));
		r->commit_busy[io - r->commit] = true;
		if (reqset_add(&r->claims, &io->claim))
			repl_submit(r, io, TARGET_OWN);
	}
	for (unsigned i = 0; i < COMMITS_MAX; i++)
		if (r->commit_busy[i])
			return;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		if (r->vol[i].todo.count)
			return;
	if (r->sync_busy)
		return;
	/* All is written. The disks are synced once while guests go on, so that the hold is short. Then new requests
	 * wait; those under way end and are written too; the disks are synced; one metadata write. */
	if (r->presynced) {
		r->finalising = true;
		if (r->active_writes || r->writes_in_flight)
			return; /* the last of them calls again */
	}
	r->throttled = false;
	r->sync_busy = true;
	r->sync_io.kind = REPL_FLUSH;
	repl_submit(r, &r->sync_io, TARGET_DISK);
}

void secondary_commit_granted(struct repl *r, struct repl_io *io)
{
	repl_submit(r, io, TARGET_OWN);
}

static void commit_failed(struct repl *r, const struct repl_io *io, int error)
{
	if (r->commit_stopped)
		return;
	r->commit_stopped = true;
	r->finalising = r->throttled = false;
	repl_set_error(r, error, "commit", io ? (int)io->volume : -1, io ? io->off : 0, io ? io->len : 0,
		       "the commit of the failover met an error: %s; run `failover` again when it is mended",
		       err_short(error));
	repl_tx(r, TX_COMMIT_FAILED);
}

void secondary_commit_end(struct repl *r, struct repl_io *io, int error)
{
	r->commit_busy[io - r->commit] = false;
	repl_release_claim(r, io);
	if (error) {
		bitmap_set_range(&r->vol[io->volume].todo, io->off >> REGION_SHIFT, units_of(io->len, REGION_SHIFT));
		commit_failed(r, io, error);
		return;
	}
	r->commit_done += io->len;
	r->admit = (unsigned)min_u64(r->admit + 1, 2 * COMMITS_MAX);
	secondary_commit_pump(r);
}

/* The failover that is under way does not come about. Returns its command, to be answered. */
static struct repl_command *failover_undo(struct repl *r)
{
	struct repl_command *c = r->failover;
	r->failover = NULL;
	r->failing_over = r->marked = false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		bitmap_clear_all(&r->vol[i].todo);
	return c;
}

static void failover_failed(struct repl *r, int error, const char *matter)
{
	repl_set_error(r, error, "failover", -1, 0, 0, "%s: %s", matter, err_short(error));
	repl_command_done(r, failover_undo(r), error, "%s: %s; nothing was changed, look at the disk under the store",
			  matter, err_short(error));
}

static void mark_done(struct repl *r, int error)
{
	r->mark_busy = false;
	repl_marking_done(r, error == 0);
	r->dirty_unsaved = r->dirty_unsaved || error;
	if (error && r->failing_over) {
		failover_failed(r, error, "the dirty map could not be written");
		return;
	}
	if (error) {
		commit_failed(r, NULL, error);
		return;
	}
	r->marked = true;
	if (!r->failing_over) {
		secondary_commit_start(r);
		return;
	}
	/* A write to active that was under way when the command came has ended by now: the shell looked again. */
	if (r->mark_io.hole && r->failover && loses_active(r, r->failover, r->failover_outcome)) {
		refuse_active(r, failover_undo(r));
		return;
	}
	/* [FOFLUSH] The record makes the disk as it is into a checkpoint, for good, and with `latest` into the disk of
	 * a new lineage: what it says is there must not be in the page cache only. In `process` too: the way back
	 * writes over what a guest's flush was promised to have left on a disk. Bounded by what was not synced, not by
	 * the overlays: the primary's clear cycle has barriers in the stream all the time. */
	r->sync_busy = true;
	r->sync_io.kind = REPL_FLUSH;
	repl_submit(r, &r->sync_io, TARGET_DISK);
}

static void failover_synced(struct repl *r, int error)
{
	if (error) {
		failover_failed(r, error, "the disk as received could not be flushed");
		return;
	}
	struct tx *t = repl_tx(r, TX_FAILOVER);
	/* What was received since the target: the shell counted it while marking. */
	t->arg = r->mark_io.ext_len;
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
	if (session) {
		adopt_synced(r, session, error);
	} else if (r->failing_over) {
		failover_synced(r, error);
	} else if (error) {
		commit_failed(r, NULL, error);
	} else if (r->finalising) {
		repl_tx(r, TX_COMMITTED);
	} else {
		r->presynced = r->throttled = true;
		secondary_commit_pump(r);
	}
}

static void merged(struct repl *r, int error)
{
	if (r->room_merging) {
		room_merge_done(r, error);
		return;
	}
	if (error) {
		uint64_t n = r->merge_io.arg;
		if (r->dropping == NULL)
			repl_log(r, 0, "checkpoint %llu could not be merged into the older one: %s; it stays for now",
				 (unsigned long long)n, err_short(error));
		r->merge_busy = false;
		r->retention_ns = r->now_ns + RETENTION_REST_NS;
		repl_command_done(
		    r, r->dropping, error,
		    "its blocks could not be merged into the older one: %s; it stays. Dropping the oldest "
		    "one (%llu) takes no room",
		    err_short(error), (unsigned long long)r->meta->ckpts[0].number);
		r->dropping = NULL;
		room_merge_done(r, error);
		return;
	}
	struct tx *t = repl_tx(r, TX_DROP);
	t->number = r->merge_io.arg;
	t->command = r->dropping;
}

void secondary_internal_done(struct repl *r, struct repl_io *io, int error)
{
	if (io == &r->mark_io)
		mark_done(r, error);
	else if (io == &r->sync_io)
		synced(r, error);
	else if (io == &r->merge_io)
		merged(r, error);
	else if (!error || !room_wait(r, io, error))
		secondary_commit_end(r, io, error);
	repl_tx_run(r);
}
