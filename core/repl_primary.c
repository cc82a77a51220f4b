/* The sending side: forwarding, acknowledgements, the clear cycle, falling behind, checkpoints asked of the peer.
 *
 * Sequence numbers count from 1 in a session. A write gets its number and is sent while its claim is held.
 *
 * The clear cycle: dirty bits clear lazily. Once a second, what was touched so far becomes `cycle`, `touched` starts
 * empty, a barrier goes to the peer and a local flush begins. When the peer has flushed the barrier and the local flush
 * has succeeded, regions in `cycle` that nothing touched since, and that no resync has still to send, become clean
 * [LOCALDUR, NEWER]. A write touches its regions when it starts and again when it is sent, so a write in flight over
 * the cut counts as newer.
 *
 * Behind: a session stands, but nothing is forwarded: paused, or the queue was full (on_congestion=ahead). The host is
 * alone as without a session: a generation is durable before anything completes [BUMPFIRST, BUMPFLUSH, BUMPC], what
 * waited for the peer included; the clear cycle ends what it had begun, and no other begins. Catching up is a new
 * resync in the same session: new requests wait for one save that ends being alone [BUMPAGAIN], `todo` becomes the
 * dirty set, RESYNC_BEGIN follows all that was sent before. The same function begins a session's first resync
 * (repl_resync.c).
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

bool primary_live(const struct repl *r)
{
	return r->is_source && !r->closing && (r->link == LINK_RESYNC || r->link == LINK_SYNCED);
}

bool primary_forwarding(const struct repl *r)
{
	return primary_live(r) && !r->behind;
}

void primary_send_io(struct repl *r, struct repl_io *io, unsigned type)
{
	struct repl_action a = {.type = ACT_SEND, .io = io};
	io->seq = ++r->seq;
	a.frame.type = (uint16_t)type;
	a.frame.seq = io->seq;
	a.frame.volume = r->meta->volumes[io->volume].id;
	a.frame.offset = io->off;
	a.frame.length = io->len;
	a.frame.length_payload = type == WIRE_WRITE || type == WIRE_RESYNC_WRITE ? (uint32_t)io->len
				 : type == WIRE_HASH				 ? resync_hash_payload(io->len)
										 : 0;
	r->last_was_flush = false;
	repl_emit(r, &a);
}

/* A barrier after all that was sent; two in a row are one. Returns its number. */
uint64_t primary_barrier(struct repl *r)
{
	if (!r->last_was_flush) {
		session_send(r, WIRE_FLUSH, ++r->seq, 0, 0, 0, NULL, 0);
		r->last_was_flush = true;
	}
	return r->seq;
}

static bool all_in_todo(const struct repl_volume_state *v, const struct repl_io *io)
{
	uint64_t first = io->off >> REGION_SHIFT, last = (io->off + io->len - 1) >> REGION_SHIFT;
	uint64_t clear = bitmap_next_clear(&v->todo, first);
	return clear == BITMAP_NONE || clear > last;
}

/* Does the peer's word that this io's completion asks for stand? Only a SYNCED link makes anything wait. */
static bool acknowledged(const struct repl *r, const struct repl_io *io)
{
	uint64_t p = r->meta->settings.protocol;
	bool flush = io->kind == REPL_FLUSH;
	if (io->strict)
		return (flush ? r->flushed : r->applied) >= io->seq;
	if (r->link != LINK_SYNCED || p == PROTOCOL_A || (p == PROTOCOL_F && !flush))
		return true;
	return (p == PROTOCOL_B ? r->received : flush ? r->flushed : r->applied) >= io->seq;
}

static void ack_complete(struct repl *r, struct repl_io *io)
{
	if (io->strict && io->kind != REPL_FLUSH && detach_of(r, io->volume)) {
		r->strict_seq = max_u64(r->strict_seq, io->seq);
		r->strict_ns = r->now_ns;
	}
	repl_complete(r, io, 0);
}

void primary_wait_ack(struct repl *r, struct repl_io *io)
{
	if (acknowledged(r, io)) {
		ack_complete(r, io);
		return;
	}
	io->phase = PHASE_ACK;
	list_push(&r->acks, io);
}

/* Under its claim, so that both hosts see overlapping writes in one order. */
void primary_send_write(struct repl *r, struct repl_io *io)
{
	uint64_t p = r->meta->settings.protocol;
	io->session = r->session;
	io->strict = detach_of(r, io->volume);
	primary_send_io(r, io, io->kind == REPL_WRITE ? WIRE_WRITE : io->kind == REPL_ZERO ? WIRE_ZERO : WIRE_DISCARD);
	repl_release_claim(r, io);
	if (io->strict || (r->link == LINK_SYNCED && (p == PROTOCOL_B || p == PROTOCOL_C)))
		primary_wait_ack(r, io);
	else
		repl_complete(r, io, 0);
}

static void fall_behind(struct repl *r, enum wire_behind why);

/* on_io_error=pass: the peer hears of it, and the pair is not in sync any more: a resync reads the range again, as soon
 * as the disk can be read. */
static void report_failed_write(struct repl *r, const struct repl_io *io)
{
	struct wire_refuse x = {.code = (uint16_t)-io->error};
	(void)snprintf(x.text, sizeof(x.text), "a local write to %s failed: %s", r->meta->volumes[io->volume].name,
		       err_short(io->error));
	int n = wire_refuse_encode(&x, r->scratch, sizeof(r->scratch));
	struct repl_action a = {.type = ACT_SEND, .data = r->scratch, .data_len = n > 0 ? (uint32_t)n : 0};
	a.frame.type = WIRE_WRITE_FAILED;
	a.frame.volume = r->meta->volumes[io->volume].id;
	a.frame.offset = io->off;
	a.frame.length = io->len;
	a.frame.length_payload = a.data_len;
	repl_emit(r, &a);
	/* From here on it must not be said to be, nor be said when the end of the resync is answered. */
	if (primary_forwarding(r) && r->rs_done_sent)
		fall_behind(r, WIRE_BEHIND_FAILED);
}

void primary_local_done(struct repl *r, struct repl_io *io)
{
	bool stale = detach_of(r, io->volume);
	io->tried = true;
	/* Again: a clear cycle may have gone by since it started. */
	if (r->meta->has_peer && !(stale && !(r->rebuild >> io->volume & 1)))
		repl_mark_written(r, io);
	if (io->error)
		(void)detach_failed(r, io->volume, io, io->error);
	if (detach_route(r, io))
		return;
	if (io->error) {
		/* What the disk holds now was not sent: the range stays dirty for the next resync, or for this one. */
		if (primary_live(r)) {
			uint64_t first = io->off >> REGION_SHIFT, last = (io->off + io->len - 1) >> REGION_SHIFT;
			bitmap_set_range(&r->vol[io->volume].todo, first, last - first + 1);
		}
		repl_set_error(r, io->error, "write", (int)io->volume, io->off, io->len,
			       "a local write to %s failed: %s", r->meta->volumes[io->volume].name,
			       err_short(io->error));
		if (primary_live(r))
			report_failed_write(r, io);
		repl_io_finish(r, io, io->error);
		return;
	}
	if (!primary_forwarding(r)) {
		repl_release_claim(r, io);
		repl_alone(r, io);
		return;
	}
	if (!stale && r->link == LINK_RESYNC && all_in_todo(&r->vol[io->volume], io))
		repl_io_finish(r, io, 0);
	else
		primary_send_write(r, io);
}

void primary_flush_start(struct repl *r, struct repl_io *io)
{
	io->phase = PHASE_IO;
	if (repl_serving(r->meta, false) == SERVING_VIEW) {
		repl_submit(r, io, TARGET_ACTIVE);
		return;
	}
	if (detach_flush(r, io))
		return;
	io->failed = 0;
	io->session = 0;
	if (primary_forwarding(r)) {
		io->seq = primary_barrier(r);
		io->session = r->session;
	}
	repl_submit(r, io, TARGET_DISK);
}

void primary_flush_done(struct repl *r, struct repl_io *io)
{
	/* Disks that failed and are detached now do not count: again, on the peer's word. Never theirs [I10]. */
	bool given_up = io->error && io->target == TARGET_DISK && detach_flush_failed(r, io->failed, io->error);
	bool session = io->session != 0 && io->session == r->session && primary_live(r);
	if (given_up || (!io->error && detach_any(r) && (!io->strict || !session))) {
		primary_flush_start(r, io);
		return;
	}
	if (io->error) {
		repl_set_error(r, io->error, "flush", -1, 0, 0, "a local flush failed: %s", err_short(io->error));
		repl_complete(r, io, io->error);
		return;
	}
	if (io->target == TARGET_DISK && repl_serving(r->meta, false) != SERVING_DISK) { /* stepped down meanwhile */
		repl_complete(r, io, -ERR_IO);
		return;
	}
	if (io->target == TARGET_ACTIVE) {
		repl_complete(r, io, 0);
		return;
	}
	if (io->strict && session) /* behind too, if it fell behind meanwhile: only the peer can flush what it has */
		primary_wait_ack(r, io);
	else if (!primary_forwarding(r))
		repl_alone(r, io);
	else if (io->session != r->session)
		/* A resync began while the local flush ran: what it covers is in that, and SYNCED means that it ended.
		 */
		repl_complete(r, io, 0);
	else
		/* By the link as it is now: one begun in RESYNC that completes in SYNCED holds what SYNCED promises. */
		primary_wait_ack(r, io);
}

/* ---- what the peer says ---- */

static void scan_acks(struct repl *r)
{
	for (struct repl_io *io = r->acks.head, *next; io; io = next) {
		next = io->next;
		if (!acknowledged(r, io))
			continue;
		list_remove(io);
		ack_complete(r, io);
	}
}

static void cycle_check(struct repl *r);
static bool cycle_start(struct repl *r);

/* For the RPO: how old the newest moment is of which all that was sent has been applied. */
static void sample_applied(struct repl *r)
{
	if (r->applied < r->sample_seq)
		return;
	r->applied_ns = r->sample_ns;
	r->sample_seq = r->seq;
	r->sample_ns = r->now_ns;
}

static void on_ack(struct repl *r, const struct repl_event *ev)
{
	struct wire_ack a;
	struct err e;
	if (wire_ack_decode(&a, ev->payload, ev->frame->length_payload, &e) < 0) {
		session_protocol_error(r, "%s", e.text);
		return;
	}
	if (a.received < r->received || a.applied < r->applied || a.flushed < r->flushed || a.received > r->seq ||
	    a.applied > a.received || a.flushed > a.applied) {
		session_protocol_error(r, "an ACK that goes back, or names what was never sent");
		return;
	}
	r->received = a.received;
	r->applied = a.applied;
	r->flushed = a.flushed;
	r->progress_ns = r->now_ns;
	if (r->link == LINK_SYNCED)
		sample_applied(r);
	scan_acks(r);
	cycle_check(r);
	detach_acked(r);
	resync_pump(r);
}

static void on_checkpoint_ack(struct repl *r, const struct wire_frame *f)
{
	uint64_t number = f->offset;
	verify_checkpoint(r, number, f->length == WIRE_VOID_NONE);
	r->progress_ns = r->now_ns;
	bool stopping = r->stopping && number == r->stop_number && r->handing < HAND_SAVE;
	bool asked = stopping || number == r->auto_ckpt;
	if (number == r->auto_ckpt)
		r->auto_ckpt = 0;
	struct repl_command *c = NULL;
	for (struct repl_command **p = &r->ckpts; *p; p = &(*p)->next)
		if ((*p)->result == number) {
			c = *p;
			*p = c->next;
			c->next = NULL;
			break;
		}
	if (number == 0 || (!asked && c == NULL)) {
		session_protocol_error(r, "CHECKPOINT_ACK for %llu, which was not asked", (unsigned long long)number);
		return;
	}
	if (f->length != WIRE_VOID_NONE) {
		if (stopping && r->handing != HAND_NONE) {
			switchover_void(r, (unsigned)f->length);
			return;
		}
		if (f->length == WIRE_VOID_ACTIVE)
			repl_log(r, 2, "checkpoint %llu not taken: the secondary's active overlay is not empty",
				 (unsigned long long)number);
		if (stopping) {
			c = r->stop;
			r->stop = NULL;
			r->stopping = r->stop_cleared = false;
			r->stop_number = 0;
		}
		repl_command_done(r, c, -ERR_STATE, "the secondary did not take checkpoint %llu",
				  (unsigned long long)number);
		return;
	}
	r->counters.checkpoints++;
	if (r->meta->broken || r->peer_broken) /* the next one is valid again */
		r->error.code = 0;
	r->peer_broken = false;
	if (stopping && r->handing != HAND_NONE) {
		switchover_checkpointed(r, number);
		return;
	}
	if (stopping) {
		r->stop_number = 0; /* its answer is here: another would be one too many */
		struct tx *t = repl_tx(r, TX_STOPPED);
		t->number = number;
		t->command = r->stop;
		if (r->stop)
			r->stop->result2 = f->seq;
		return;
	}
	/* Those that complete while the disk is slow are saved together. */
	struct tx *t = repl_tx_queued(r, TX_CKPT);
	if (t == NULL)
		t = repl_tx(r, TX_CKPT);
	t->number = max_u64(t->number, number);
	if (c) {
		c->next = t->command;
		t->command = c;
	}
}

static void on_io_error(struct repl *r, const struct repl_event *ev)
{
	struct wire_refuse x;
	if (!session_reason(r, ev, &x))
		return;
	int vi = repl_meta_volume_by_id(r->meta, ev->frame->volume);
	repl_set_error(r, x.code, "peer", vi, ev->frame->offset, ev->frame->length, "the peer stopped applying: %.*s",
		       WIRE_TEXT_MAX, x.text);
	r->redial_wait_ns = REDIAL_MAX_NS;
	session_close(r, false);
	session_link_down(r, -ERR_BUSY, "the peer stopped applying");
	r->session = 0;
}

static void on_history_lost(struct repl *r, const struct repl_event *ev)
{
	struct wire_refuse x;
	if (!session_reason(r, ev, &x))
		return;
	repl_set_error(r, x.code, "peer", -1, 0, 0, "the peer: %.*s; mirroring goes on", WIRE_TEXT_MAX, x.text);
	r->peer_broken = true;
	if (!repl_tx_queued(r, TX_PEER_BROKEN))
		repl_tx(r, TX_PEER_BROKEN);
}

/* Its record could not be saved; status goes by that. */
static void broken_late(struct repl *r)
{
	if (r->peer_broken && !r->meta->broken && !r->unsure && !r->saving && r->tx_count == 0)
		repl_tx(r, TX_PEER_BROKEN);
}

void primary_in_sync(struct repl *r)
{
	r->link = LINK_SYNCED;
	r->congestion_said = false;
	r->error.code = 0;
	/* The peer has it all durable: clear as soon as this host has. */
	r->cycle_next_ns = r->now_ns;
	(void)cycle_start(r);
	sample_applied(r);
	repl_log(r, 2, "in sync");
	/* The checkpoint that ends a resync: the secondary's view stands on it. */
	primary_checkpoint(r, NULL, 0);
}

static void stop_want(struct repl *r)
{
	if (!r->stop_wanted || r->link != LINK_SYNCED || r->stopping || detach_any(r))
		return;
	r->stop_wanted = false;
	primary_stop_begin(r);
}

void primary_frame(struct repl *r, const struct repl_event *ev)
{
	const struct wire_frame *f = ev->frame;
	switch (f->type) {
	case WIRE_ACK:
		on_ack(r, ev);
		break;
	case WIRE_CHECKPOINT_ACK:
		on_checkpoint_ack(r, f);
		break;
	case WIRE_RESYNC_READY:
		if (f->offset > CKPT_PEER_MAX) {
			session_protocol_error(r, "RESYNC_READY with number %llu", (unsigned long long)f->offset);
			break;
		}
		r->ckpt_used = max_u64(r->ckpt_used, f->offset); /* [NUMMAX] */
		r->rs_ready = r->rs_ready || f->seq == r->rs_begin_seq;
		r->progress_ns = r->now_ns;
		session_resolved(r); /* the loser has it durably */
		resync_pump(r);
		break;
	case WIRE_HASH_ANSWER:
		resync_hash_answer(r, f);
		break;
	case WIRE_RESYNC_ACK:
		resync_acked(r, f);
		break;
	case WIRE_VERIFY_ANSWER:
		verify_answer(r, ev);
		break;
	case WIRE_SCRUBBED:
		verify_scrubbed(r, ev);
		break;
	case WIRE_RESIZE_ACK:
		resize_acked(r, ev);
		break;
	case WIRE_IO_ERROR:
		on_io_error(r, ev);
		break;
	case WIRE_HISTORY_LOST:
		on_history_lost(r, ev);
		break;
	case WIRE_READ_REPLY:
		detach_read_reply(r, ev);
		break;
	case WIRE_CHECKPOINT_WANT:
		if (r->link != LINK_SYNCED) /* BEHIND has answered a command, and the end of the resync takes one */
			break;
		r->ckpt_wanted = true;
		r->ckpt_wanted_flags |= (uint32_t)(f->offset & (WIRE_CKPT_COMMAND | WIRE_CKPT_PIN));
		break;
	case WIRE_SETTINGS_ACK:
		if (r->setting && f->seq == r->setting_token) {
			struct repl_command *c = r->setting;
			r->setting = NULL;
			repl_command_done(r, c, 0, " ");
		}
		break;
	case WIRE_TOOK_OVER:
		switchover_took_over(r, f);
		break;
	case WIRE_STOP_WANT:
		/* One that finds a stop under way is answered by that. Nobody else would answer one that finds a
		 * switchover, or a disk whose end of the rebuild the peer knows before this host's record. */
		r->stop_wanted = r->link == LINK_SYNCED && (!r->stopping || r->handing != HAND_NONE) &&
				 (!detach_any(r) || detach_ending(r));
		stop_want(r);
		break;
	default:
		session_protocol_error(r, "%s out of order", wire_type_name(f->type));
		if (ev->io)
			repl_complete(r, ev->io, -ERR_CANCELED);
	}
}

static void send_settings(struct repl *r)
{
	struct wbuf w = {.data = r->scratch, .size = sizeof(r->scratch)};
	settings_encode(&r->meta->settings, &w);
	INVARIANT(!w.failed);
	session_send(r, WIRE_SETTINGS, ++r->setting_token, 0, 0, 0, w.data, (uint32_t)w.len);
}

void primary_settings_changed(struct repl *r)
{
	send_settings(r);
	scan_acks(r);		    /* a weaker protocol may release what waits */
	r->rs_allow_ns = r->now_ns; /* at the old rate the next step may be far away */
}

/* ---- checkpoints, stop ---- */

static void send_checkpoint(struct repl *r, uint64_t number, uint32_t flags)
{
	session_send(r, WIRE_CHECKPOINT, ++r->seq, number, r->wall_ns, (uint16_t)flags, NULL, 0);
	r->last_was_flush = false;
}

void primary_checkpoint(struct repl *r, struct repl_command *c, uint32_t flags)
{
	uint64_t number = ++r->ckpt_used;
	r->last_auto_ns = r->now_ns;
	if (c) {
		c->result = number;
		c->next = r->ckpts;
		r->ckpts = c;
	} else {
		r->auto_ckpt = number;
	}
	send_checkpoint(r, number, flags);
}

void primary_stop_begin(struct repl *r)
{
	verify_end(r, -ERR_STATE, "it is being stopped"); /* nothing of it follows the last checkpoint */
	r->stop_wanted = r->stop_wanted && r->handing != HAND_NONE;
	r->stopping = true;
	primary_stop_check(r);
}

/* The pair is not in sync any more: requests would wait for as long as that lasts. */
static void stop_given_up(struct repl *r)
{
	struct repl_command *c = r->stop;
	if (r->handing != HAND_NONE) {
		switchover_behind(r);
		return;
	}
	r->stop = NULL;
	r->stopping = r->stop_cleared = false;
	r->stop_number = 0;
	repl_command_done(r, c, -ERR_STATE,
			  "a local write failed meanwhile, so the peer does not have all any more; see `error`, "
			  "`wait --for=in-sync`, then give it again");
}

/* A clean stop: requests are held, those under way end, the last checkpoint goes out, its answer ends replication. A
 * switchover (repl_switchover.c) begins in the same way. */
void primary_stop_check(struct repl *r)
{
	if (!r->stopping || r->writes_in_flight || r->link != LINK_SYNCED || !primary_forwarding(r))
		return;
	if (r->stop_number || r->cycle_on)
		return;
	/* One clear cycle over all that was written: what is clean now costs nothing at the next start. */
	if (!r->stop_cleared) {
		r->stop_cleared = true;
		if (cycle_start(r))
			return;
	}
	if (r->handing != HAND_NONE && !switchover_ready(r))
		return;
	r->stop_number = ++r->ckpt_used;
	send_checkpoint(r, r->stop_number,
			r->handing != HAND_NONE ? WIRE_CKPT_HAND_OVER : WIRE_CKPT_COMMAND | WIRE_CKPT_STOP);
}

static void pause_saved(struct repl *r, struct tx *t, int error);
static void catch_up_saved(struct repl *r, struct tx *t, int error);

void primary_tx_done(struct repl *r, struct tx *t, int error)
{
	switch (t->kind) {
	case TX_IN_SYNC:
	case TX_PEER_BROKEN:
		return;
	case TX_PAUSE:
		pause_saved(r, t, error);
		return;
	case TX_CATCH_UP:
		catch_up_saved(r, t, error);
		return;
	case TX_CKPT:
		r->last_ckpt_wall_ns = r->wall_ns;
		for (struct repl_command *c = t->command, *next; c; c = next) {
			next = c->next;
			repl_command_done(r, c, error,
					  "checkpoint %llu was taken, but its number could not be saved here: %s",
					  (unsigned long long)c->result, err_short(error));
		}
		return;
	case TX_STOPPED:
		if (!error)
			r->holding = false;
		r->stopping = r->stop_cleared = false;
		r->stop_number = 0;
		if (t->command == r->stop)
			r->stop = NULL;
		if (!error && r->link != LINK_DOWN && !r->closing) {
			session_send(r, WIRE_GOODBYE, 0, WIRE_BYE_STOP, 0, 0, NULL, 0);
			session_close(r, true);
		}
		if (!error)
			r->error.code = 0;
		if (error == -ERR_CANCELED)
			repl_command_done(r, t->command, -ERR_STATE, "its role changed meanwhile; see `status`");
		else if (error)
			repl_command_done(r, t->command, error, "the stop could not be saved: %s", err_short(error));
		else
			repl_stopped(r, t->command);
		return;
	default:
		UNREACHABLE();
	}
}

/* ---- the clear cycle ---- */

static void cycle_flush(struct repl *r)
{
	r->cycle_io_busy = true;
	r->cycle_io.failed = 0;
	r->cycle_io.kind = REPL_FLUSH;
	repl_submit(r, &r->cycle_io, TARGET_DISK);
}

/* False: nothing was touched. One that is under way takes it along. What was touched has been sent, or is in flight:
 * while nothing is forwarded, as from the moment that the connection is being closed, it would be said to be clean by a
 * barrier that lies before it. */
static bool cycle_start(struct repl *r)
{
	PRE(primary_forwarding(r));
	bool any = false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		any = any || r->vol[i].touched.count;
	if (!any)
		return false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		bitmap_or(&r->vol[i].cycle, &r->vol[i].touched);
		bitmap_clear_all(&r->vol[i].touched);
	}
	r->cycle_on = true;
	r->cycle_local = false;
	r->cycle_session = r->session;
	r->cycle_started_ns = r->now_ns;
	r->cycle_seq = primary_barrier(r);
	r->cycle_again = r->cycle_io_busy;
	if (!r->cycle_io_busy)
		cycle_flush(r);
	return true;
}

static void cycle_check(struct repl *r)
{
	if (!r->cycle_on || !r->cycle_local || r->flushed < r->cycle_seq)
		return;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		for (uint64_t b = bitmap_next_set(&v->cycle, 0); b != BITMAP_NONE;
		     b = bitmap_next_set(&v->cycle, b + 1))
			if (!bitmap_test(&v->touched, b) && !bitmap_test(&v->todo, b))
				bitmap_clear(&v->dirty, b);
		bitmap_clear_all(&v->cycle);
	}
	r->cycle_on = false;
	r->cycle_next_ns = r->now_ns + max_u64(CYCLE_NS, CYCLE_REST * (r->now_ns - r->cycle_started_ns));
	primary_stop_check(r);
}

void primary_cycle_done(struct repl *r, int error)
{
	r->cycle_io_busy = false;
	if (!r->cycle_on || r->cycle_session != r->session)
		return;
	if (error) {
		/* The regions of a disk whose sync failed stay dirty [I10], but of one that is rebuilt, where it says
		 * that they are not durable on the peer: the next cycle's. What the other disks have is durable; where
		 * none was synced, all is the next one's. */
		uint64_t failed = r->cycle_io.failed;
		for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
			if (failed && !(failed >> i & 1))
				continue;
			if (!failed || (r->rebuild >> i & 1))
				bitmap_or(&r->vol[i].touched, &r->vol[i].cycle);
			bitmap_clear_all(&r->vol[i].cycle);
		}
		if (!detach_flush_failed(r, failed, error))
			repl_set_error(r, error, "flush", -1, 0, 0, "a local flush failed: %s", err_short(error));
		r->cycle_on = r->cycle_on && failed;
	}
	if (!r->cycle_on)
		return;
	if (r->cycle_again) {
		r->cycle_again = false;
		cycle_flush(r);
		return;
	}
	r->cycle_local = true;
	cycle_check(r);
}

/* Intent bits of regions that are clean and were not used since the last look go, lazily. Not those that a request in
 * flight lies over: a slow write may have relied on its unit's bit two looks ago, and a clear cycle have found its
 * regions clean meanwhile; its claim tells (repl_intent has the other half of the argument). */
static void intent_look(struct repl *r)
{
	if (r->clear_busy || r->union_busy || r->mark_busy || r->marks_busy || resize_saving(r))
		return;
	r->intent_looked_ns = r->now_ns;
	const unsigned per = INTENT_SHIFT - REGION_SHIFT;
	bool any = false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		for (uint64_t b = bitmap_next_set(&v->intent, 0); b != BITMAP_NONE;
		     b = bitmap_next_set(&v->intent, b + 1)) {
			uint64_t first = b << per, n = min_u64(UINT64_C(1) << per, v->dirty.nbits - first);
			if (bitmap_test(&v->hot, b) || bitmap_any(&v->dirty, first, n) ||
			    reqset_overlaps(&r->claims, i, b << INTENT_SHIFT, (b + 1) << INTENT_SHIFT))
				continue;
			bitmap_clear(&v->intent, b);
			bitmap_set(&v->clearing, b);
			any = true;
		}
		bitmap_clear_all(&v->hot);
	}
	if (!any)
		return;
	r->clear_busy = true;
	r->clear_io.kind = REPL_INTENT_CLEAR;
	repl_submit(r, &r->clear_io, TARGET_OWN);
}

void primary_clear_done(struct repl *r, int error)
{
	(void)error; /* a clear that failed leaves a bit set: it costs a resync of that region, never data */
	r->clear_busy = false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		bitmap_clear_all(&r->vol[i].clearing);
}

/* ---- the session's start and end; falling behind and catching up ---- */

void primary_activate(struct repl *r)
{
	r->link = LINK_RESYNC;
	r->progress_ns = r->now_ns;
	r->sample_seq = 0;
	r->sample_ns = r->applied_ns;
	r->auto_ckpt = 0;
	r->peer_broken = r->meta->broken;
	r->rs_begin_seq = r->rs_done_seq = r->rs_adopted_seq = 0;
	r->rs_whole =
	    r->decision <= LINEAGE_DETACHED && (r->theirs.flags & (WIRE_JOIN_INCONSISTENT | WIRE_JOIN_FRESH)) == 0;
	r->behind = r->meta->paused && !detach_any(r);
	r->congested = false;
	if (memcmp(&r->meta->settings, &r->mine.settings, sizeof(struct settings)) != 0) /* set since its JOIN */
		send_settings(r);
	struct repl_io *io;
	if (r->behind) {
		r->rs_done_sent = r->cycle_on = false;
		while ((io = list_pop(&r->frozen)) != NULL)
			repl_alone(r, io);
		return;
	}
	/* What waited for the peer is in this resync. Not so of a disk that was detached, as this host has heard by
	 * now: what was written there alone goes to the peer. */
	while ((io = list_pop(&r->frozen)) != NULL)
		if (io->kind == REPL_FLUSH ? detach_any(r) : detach_of(r, io->volume))
			detach_park(r, io); /* then resync_begin */
		else
			repl_complete(r, io, 0);
	resync_begin(r);
}

/* What waits for the peer's word completes without it. A write that was sent while its disk was detached can't, unless
 * the disk is whole again by now: then it came behind the ATTACH, whose barrier says that all before it was applied,
 * and went to both. */
static void acks_alone(struct repl *r)
{
	for (uint64_t n = r->acks.count; n && r->acks.head; n--) {
		struct repl_io *io = list_pop(&r->acks);
		if (io->strict && primary_live(r)) /* of a detached disk, only behind: the word comes */
			list_push(&r->acks, io);
		else if (io->strict && io->kind == REPL_FLUSH) {
			io->strict = false;
			primary_flush_start(r, io); /* it waits for the peer, or has failed */
		} else if (io->strict && detach_of(r, io->volume))
			repl_complete(r, io, -ERR_IO);
		else
			repl_alone(r, io);
	}
}

static void fall_behind(struct repl *r, enum wire_behind why)
{
	PRE(primary_forwarding(r));
	verify_end(r, -ERR_STATE, "the pair fell out of sync; give it again when it is in sync");
	r->stop_wanted = r->ckpt_wanted = false; /* the peer hears of this, and answers them */
	r->ckpt_wanted_flags = 0;
	if (r->stopping)
		stop_given_up(r);
	bool congested = why == WIRE_BEHIND_CONGESTED;
	if (!congested || !r->congestion_said)
		repl_log(r, 1, "%s; writes are tracked here and sent later",
			 why == WIRE_BEHIND_PAUSED   ? "replication is paused"
			 : why == WIRE_BEHIND_FAILED ? "a write failed here and was not sent"
						     : "the queue to the peer is full");
	/* A guest that writes faster than the link takes fills the queue again in each resync: each try costs both
	 * hosts a sync, so there is one a second. */
	if (congested) {
		r->congestion_said = true;
		r->catch_up_ns = r->now_ns + CATCH_UP_RETRY_NS;
	}
	/* What was sent may still become clean: nothing newer touches it without saying so. */
	(void)cycle_start(r);
	session_send(r, WIRE_BEHIND, 0, why, 0, 0, NULL, 0);
	r->behind = true;
	r->congested = congested;
	r->link = LINK_RESYNC;
	r->rs_done_sent = false;
	r->rs_run++;
	acks_alone(r);
}

/* on_congestion=ahead. */
void primary_congestion(struct repl *r)
{
	if (primary_forwarding(r) && !r->stopping && !detach_any(r) &&
	    r->queue_bytes >= r->meta->settings.queue_max_bytes &&
	    r->meta->settings.on_congestion == ON_CONGESTION_AHEAD)
		fall_behind(r, WIRE_BEHIND_CONGESTED);
}

static void caught_up(struct repl *r)
{
	r->behind = r->congested = false;
	resync_begin(r);
}

/* Begins the resync when nothing keeps it behind any more: the queue has drained, and the clear cycle has ended that
 * says what of it arrived. */
void primary_catch_up(struct repl *r)
{
	if (!r->behind || !primary_live(r) || r->meta->paused || r->activating || r->now_ns < r->catch_up_ns ||
	    (r->congested && r->queue_bytes) || r->cycle_on || repl_tx_pending(r, TX_PAUSE))
		return;
	if (!r->meta->alone && !repl_tx_pending(r, TX_BUMP)) {
		caught_up(r);
		return;
	}
	r->activating = true;
	repl_tx(r, TX_CATCH_UP);
}

static void catch_up_saved(struct repl *r, struct tx *t, int error)
{
	if (t->session != r->session)
		return;
	r->activating = false;
	if (error == 0 && primary_live(r) && r->behind && !r->meta->paused)
		caught_up(r);
	else if (error && error != -ERR_CANCELED)
		r->catch_up_ns = r->now_ns + CATCH_UP_RETRY_NS;
}

/* A stop under way ends first, one way or the other. */
static void pause_check(struct repl *r)
{
	if (r->meta->paused && primary_forwarding(r) && !r->stopping && !detach_any(r))
		fall_behind(r, WIRE_BEHIND_PAUSED);
}

static void pause_saved(struct repl *r, struct tx *t, int error)
{
	pause_check(r);
	repl_command_done(r, t->command, error, "it could not be saved: %s", err_short(error));
	primary_catch_up(r);
}

void primary_session_lost(struct repl *r)
{
	verify_end(r, -ERR_PEER, "the connection to the peer was lost");
	resize_session_lost(r);
	detach_session_lost(r);
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		bitmap_clear_all(&v->touched);
		bitmap_clear_all(&v->cycle);
		if (r->rebuild >> i & 1)
			continue;
		bitmap_clear_all(&v->todo);
	}
	r->cycle_on = r->behind = r->congested = false;
	r->rs_run++;
	memset(r->rs_hash, 0, sizeof(r->rs_hash));
	r->auto_ckpt = 0;
	r->ckpt_wanted = r->stop_wanted = false;
	r->ckpt_wanted_flags = 0;
	if (r->handing != HAND_NONE) {
		switchover_session_lost(r);
	} else if (!repl_tx_pending(r, TX_STOPPED)) {
		r->stopping = r->stop_cleared = false;
		r->stop_number = 0;
	}
	while (r->ckpts) {
		struct repl_command *c = r->ckpts;
		r->ckpts = c->next;
		repl_command_done(r, c, -ERR_PEER, "the connection was lost before the checkpoint completed");
	}
	acks_alone(r);
}

/* ---- time ---- */

void primary_tick(struct repl *r)
{
	const struct settings *s = &r->meta->settings;
	/* Often during a resync, so that after a crash it goes on about where it was. */
	uint64_t look = primary_live(r) && r->link == LINK_RESYNC ? CYCLE_NS : INTENT_LOOK_NS;
	if (r->now_ns - r->intent_looked_ns >= look && r->meta->has_peer)
		intent_look(r);
	while (r->frozen.head && !repl_frozen(r)) /* the setting was changed, or replication stopped */
		repl_alone(r, list_pop(&r->frozen));
	if (!primary_live(r))
		return;
	/* Something outstanding made no progress for four times peer_timeout: a hung disk behind a live daemon. */
	bool outstanding = r->seq > r->applied || r->setting || r->reads.head || r->vf.peer.busy;
	if (outstanding && r->now_ns - r->progress_ns > 4 * s->peer_timeout_ms * UINT64_C(1000000)) {
		repl_set_error(r, ERR_TIMEOUT, "peer", -1, 0, 0,
			       "the peer made no progress for four times peer_timeout");
		session_drop(r, "the peer made no progress");
		return;
	}
	if (!outstanding)
		r->progress_ns = r->now_ns;
	if (r->link == LINK_SYNCED)
		sample_applied(r);
	else if (!r->behind)
		resync_sample(r);
	pause_check(r);
	primary_catch_up(r);
	stop_want(r);
	broken_late(r);
	if (!r->behind && !r->cycle_on && r->now_ns >= r->cycle_next_ns)
		(void)cycle_start(r);
	primary_stop_check(r);
	resync_pump(r);
	if (r->link != LINK_SYNCED || r->stopping)
		return;
	if (r->ckpt_wanted && !r->auto_ckpt) {
		uint32_t flags = r->ckpt_wanted_flags;
		r->ckpt_wanted = false;
		r->ckpt_wanted_flags = 0;
		primary_checkpoint(r, NULL, flags);
		return;
	}
	if (s->checkpoint_interval_ms && !r->auto_ckpt &&
	    r->now_ns - r->last_auto_ns >= s->checkpoint_interval_ms * UINT64_C(1000000))
		primary_checkpoint(r, NULL, 0);
}
