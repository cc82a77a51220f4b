/* The sending side: forwarding, acknowledgements, the clear cycle, resync as source, checkpoints asked of the peer.
 *
 * Sequence numbers count from 1 in a session. A write gets its number and is sent while its claim is held.
 *
 * The clear cycle: dirty bits clear lazily. Once a second, what was touched so far becomes `cycle`, `touched` starts
 * empty, a barrier goes to the peer and a local flush begins. When the peer has flushed the barrier and the local flush
 * has succeeded, regions in `cycle` that nothing touched since, and that no resync has still to send, become clean
 * [LOCALDUR, NEWER]. A write touches its regions when it starts and again when it is sent, so a write in flight over
 * the cut counts as newer.
 *
 * Resync: `todo` is the dirty set at its start. Regions are read and sent under an exclusive claim [RSLOCK]; a guest's
 * write to a region still in `todo` is not forwarded, it will be read later. One pass converges. With `hash_sync` a
 * region's hash is sent first, and its content only if the target says that it differs.
 *
 * Behind: a session stands, but nothing is forwarded: paused, or the queue was full (on_congestion=ahead). The host is
 * alone as without a session: a generation is durable before anything completes [BUMPFIRST, BUMPFLUSH, BUMPC], what
 * waited for the peer included; the clear cycle ends what it had begun, and no other begins. Catching up is a new
 * resync in the same session: new requests wait for one save that ends being alone [BUMPAGAIN], `todo` becomes the
 * dirty set, RESYNC_BEGIN follows all that was sent before. The same function begins a session's first resync.
 */
#include "core/repl_internal.h"

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

static uint32_t hash_payload(uint64_t len)
{
	return (uint32_t)(8 + WIRE_HASH_SIZE * units_of(len, WIRE_HASH_SHIFT));
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
				 : type == WIRE_HASH				 ? hash_payload(io->len)
										 : 0;
	r->last_was_flush = false;
	r->queue_bytes += WIRE_HEADER_SIZE + a.frame.length_payload;
	repl_emit(r, &a);
}

/* A barrier after all that was sent; two in a row are one. Returns its number. */
static uint64_t send_barrier(struct repl *r)
{
	if (!r->last_was_flush) {
		session_send(r, WIRE_FLUSH, ++r->seq, 0, 0, 0, NULL, 0);
		r->queue_bytes += WIRE_HEADER_SIZE;
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
	if (io->strict && io->kind != REPL_FLUSH)
		r->strict_seq = max_u64(r->strict_seq, io->seq);
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
	(void)memcpy(x.text, r->error.text, min_u64(sizeof(x.text) - 1, strlen(r->error.text)));
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
		io->seq = send_barrier(r);
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

/* For the RPO: how old the newest moment is of which all that was sent has been received. */
static void sample_received(struct repl *r)
{
	if (r->received < r->sample_seq)
		return;
	r->received_ns = r->sample_ns;
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
		sample_received(r);
	scan_acks(r);
	cycle_check(r);
	detach_acked(r);
	primary_resync_pump(r);
}

static void on_checkpoint_ack(struct repl *r, const struct wire_frame *f)
{
	uint64_t number = f->offset;
	r->progress_ns = r->now_ns;
	bool stopping = r->stopping && number == r->stop_number;
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
	if (r->meta->broken) /* the next one is valid again */
		r->error.code = 0;
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

static void on_resync_ack(struct repl *r, const struct wire_frame *f)
{
	if (f->seq <= r->rs_adopted_seq || f->seq > r->rs_done_seq) {
		session_protocol_error(r, "RESYNC_ACK out of order");
		return;
	}
	r->rs_adopted_seq = f->seq;
	r->progress_ns = r->now_ns;
	if (f->seq != r->rs_done_seq) /* another end was sent since: its answer follows */
		return;
	repl_tx(r, TX_IN_SYNC)->number = r->rs_done_generation;
	if (r->behind || !r->rs_done_sent) /* it fell behind meanwhile */
		return;
	r->link = LINK_SYNCED;
	r->congestion_said = false;
	r->error.code = 0;
	/* The peer has it all durable: clear as soon as this host has. */
	r->cycle_next_ns = r->now_ns;
	(void)cycle_start(r);
	sample_received(r);
	repl_log(r, 2, "in sync");
	/* The checkpoint that ends a resync: the secondary's view stands on it. */
	primary_checkpoint(r, NULL, 0);
}

static void on_io_error(struct repl *r, const struct repl_event *ev)
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
	struct err e;
	if (wire_refuse_decode(&x, ev->payload, ev->frame->length_payload, &e) < 0) {
		session_protocol_error(r, "%s", e.text);
		return;
	}
	repl_set_error(r, x.code, "peer", -1, 0, 0, "the peer: %.*s; mirroring goes on", WIRE_TEXT_MAX, x.text);
	if (!r->meta->broken && !repl_tx_pending(r, TX_PEER_BROKEN))
		repl_tx(r, TX_PEER_BROKEN);
}

/* What differs is put back into todo, so that guests' writes there are not forwarded, and is read and sent as it is by
 * then. Also while behind: the clear cycle asks todo what may not become clean. */
static void on_hash_answer(struct repl *r, const struct wire_frame *f)
{
	struct rs_hash *h = NULL;
	for (unsigned i = 0; i < HASHES_MAX; i++)
		if (r->rs_hash[i].used && r->rs_hash[i].seq == f->seq)
			h = &r->rs_hash[i];
	r->progress_ns = r->now_ns;
	if (f->seq != 0 && f->seq < r->rs_begin_seq) /* of a resync that has begun anew */
		return;
	if (h == NULL || h->mask != 0 || f->seq == 0 ||
	    (units_of(h->len, REGION_SHIFT) < 64 && f->offset >> units_of(h->len, REGION_SHIFT) != 0)) {
		session_protocol_error(r, "HASH_ANSWER out of order");
		return;
	}
	h->mask = f->offset;
	h->used = h->mask != 0;
	for (uint64_t b = 0; b < 64; b++)
		if (h->mask >> b & 1)
			bitmap_set(&r->vol[h->volume].todo, (h->off >> REGION_SHIFT) + b);
	primary_resync_pump(r);
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
		primary_resync_pump(r);
		break;
	case WIRE_HASH_ANSWER:
		on_hash_answer(r, f);
		break;
	case WIRE_RESYNC_ACK:
		on_resync_ack(r, f);
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
	case WIRE_STOP_WANT:
		if (r->link == LINK_SYNCED && !r->stopping && !detach_any(r)) {
			r->stopping = true;
			primary_stop_check(r);
		}
		break;
	default:
		session_protocol_error(r, "%s out of order", wire_type_name(f->type));
		if (ev->io)
			repl_complete(r, ev->io, -ERR_CANCELED);
	}
}

void primary_settings_changed(struct repl *r)
{
	struct wbuf w = {.data = r->scratch, .size = sizeof(r->scratch)};
	settings_encode(&r->meta->settings, &w);
	INVARIANT(!w.failed);
	session_send(r, WIRE_SETTINGS, ++r->setting_token, 0, 0, 0, w.data, (uint32_t)w.len);
	scan_acks(r);		    /* a weaker protocol may release what waits */
	r->rs_allow_ns = r->now_ns; /* at the old rate the next step may be far away */
}

/* ---- checkpoints, stop ---- */

static void send_checkpoint(struct repl *r, uint64_t number, uint32_t flags)
{
	session_send(r, WIRE_CHECKPOINT, ++r->seq, number, r->wall_ns, (uint16_t)flags, NULL, 0);
	r->queue_bytes += WIRE_HEADER_SIZE;
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

/* A clean stop: requests are held, those under way end, the last checkpoint goes out, its answer ends replication. */
void primary_stop_check(struct repl *r)
{
	if (!r->stopping || r->writes_in_flight || r->link != LINK_SYNCED || !r->is_source)
		return;
	if (r->stop_number || r->cycle_on)
		return;
	/* One clear cycle over all that was written: what is clean now costs nothing at the next start. */
	if (!r->stop_cleared) {
		r->stop_cleared = true;
		if (cycle_start(r))
			return;
	}
	r->stop_number = ++r->ckpt_used;
	send_checkpoint(r, r->stop_number, WIRE_CKPT_COMMAND | WIRE_CKPT_STOP);
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
		if (!error && r->link != LINK_DOWN) {
			session_send(r, WIRE_GOODBYE, 0, WIRE_BYE_STOP, 0, 0, NULL, 0);
			session_close(r, true);
		}
		if (!error)
			r->error.code = 0;
		if (error)
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

/* False: nothing was touched. One that is under way takes it along. */
static bool cycle_start(struct repl *r)
{
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
	r->cycle_seq = send_barrier(r);
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
	if (r->cycle_again && !error) {
		r->cycle_again = false;
		cycle_flush(r);
		return;
	}
	if (error) {
		r->cycle_on = false; /* its regions stay dirty [I10] */
		for (uint32_t i = 0; i < r->meta->n_volumes; i++)
			bitmap_clear_all(&r->vol[i].cycle);
		if (!detach_flush_failed(r, r->cycle_io.failed, error))
			repl_set_error(r, error, "flush", -1, 0, 0, "a local flush failed: %s", err_short(error));
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
	if (r->clear_busy || r->union_busy || r->mark_busy || r->marks_busy)
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

/* The dirty set as it is now is what this resync sends, and what is written from now on is forwarded or in that set.
 * New requests waited for the caller's save, so that both are cut at one point; a write under way has its dirty bit. */
static void resync_begin(struct repl *r)
{
	bool any = false;
	r->rs_run++;
	r->rs_ready = r->rs_done_sent = false;
	r->rs_vol = 0;
	r->rs_off = 0;
	r->rs_data_end = r->rs_data_off = 0;
	r->rs_total = 0;
	r->rs_allow_ns = r->progress_ns = r->now_ns;
	r->rs_n_samples = 0;
	memset(r->rs_hash, 0, sizeof(r->rs_hash));
	r->cycle_on = false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		bitmap_clear_all(&v->touched);
		bitmap_clear_all(&v->cycle);
		if (r->rebuild >> i & 1)
			continue; /* its todo is what is to come from there */
		bitmap_copy(&v->todo, &v->dirty);
		r->rs_total += v->todo.count << REGION_SHIFT;
		any = any || v->todo.count;
	}
	if (!any && r->rs_whole) {
		r->rs_ready = true; /* nothing differs: adopt and go on */
	} else {
		r->rs_whole = false;
		r->rs_begin_seq = ++r->seq;
		session_send(r, WIRE_RESYNC_BEGIN, r->seq, r->meta->lineage.current, r->rs_total, 0, NULL, 0);
		r->queue_bytes += WIRE_HEADER_SIZE;
		r->last_was_flush = false;
	}
	primary_resync_pump(r);
	detach_resume(r); /* behind RESYNC_BEGIN, or the RESYNC_DONE that stands for it */
}

void primary_activate(struct repl *r)
{
	r->link = LINK_RESYNC;
	r->progress_ns = r->now_ns;
	r->sample_seq = 0;
	r->sample_ns = r->received_ns;
	r->auto_ckpt = 0;
	r->rs_begin_seq = r->rs_done_seq = r->rs_adopted_seq = 0;
	r->rs_whole =
	    r->decision <= LINEAGE_DETACHED && (r->theirs.flags & (WIRE_JOIN_INCONSISTENT | WIRE_JOIN_FRESH)) == 0;
	r->behind = r->meta->paused && !detach_any(r);
	r->congested = false;
	struct repl_io *io;
	if (r->behind) {
		r->rs_done_sent = r->cycle_on = false;
		while ((io = list_pop(&r->frozen)) != NULL)
			repl_alone(r, io);
		return;
	}
	while ((io = list_pop(&r->frozen)) != NULL) /* what waited for the peer is in this resync */
		repl_complete(r, io, 0);
	resync_begin(r);
}

/* What waits for the peer's word completes without it. */
static void acks_alone(struct repl *r)
{
	for (uint64_t n = r->acks.count; n && r->acks.head; n--) {
		struct repl_io *io = list_pop(&r->acks);
		if (io->strict && primary_live(r)) /* of a detached disk, only behind: the word comes */
			list_push(&r->acks, io);
		else if (io->strict && io->kind == REPL_FLUSH) {
			io->strict = false;
			primary_flush_start(r, io); /* it waits for the peer, or has failed */
		} else if (io->strict)
			repl_complete(r, io, -ERR_IO);
		else
			repl_alone(r, io);
	}
}

static void fall_behind(struct repl *r, enum wire_behind why)
{
	PRE(primary_forwarding(r));
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
	r->ckpt_wanted = false;
	if (!repl_tx_pending(r, TX_STOPPED)) {
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

uint64_t primary_resync_left(const struct repl *r)
{
	uint64_t left = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) /* a detached disk's is what its rebuild has to read */
		left += detach_of(r, i) ? 0 : r->vol[i].todo.count << REGION_SHIFT;
	return left;
}

static void sample_rate(struct repl *r)
{
	if (r->rs_n_samples && r->now_ns - r->rs_samples[(r->rs_n_samples - 1) % RATE_SAMPLES].ns < RATE_SAMPLE_NS)
		return;
	uint64_t at = r->rs_n_samples++ % RATE_SAMPLES;
	r->rs_samples[at].ns = r->now_ns;
	r->rs_samples[at].done = r->rs_total - min_u64(primary_resync_left(r), r->rs_total);
}

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
	bool outstanding = r->seq > r->applied || r->setting || r->reads.head;
	if (outstanding && r->now_ns - r->progress_ns > 4 * s->peer_timeout_ms * UINT64_C(1000000)) {
		repl_set_error(r, ERR_TIMEOUT, "peer", -1, 0, 0,
			       "the peer made no progress for four times peer_timeout");
		session_drop(r, "the peer made no progress");
		return;
	}
	if (!outstanding)
		r->progress_ns = r->now_ns;
	if (r->link == LINK_SYNCED)
		sample_received(r);
	else if (!r->behind)
		sample_rate(r);
	pause_check(r);
	primary_catch_up(r);
	if (!r->behind && !r->cycle_on && r->now_ns >= r->cycle_next_ns)
		(void)cycle_start(r);
	primary_stop_check(r);
	primary_resync_pump(r);
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

/* ---- resync as source ---- */

/* The next run of regions to do, from the cursor on: false if there is none. */
static bool resync_next(struct repl *r, uint32_t *vol, struct range *run)
{
	for (; r->rs_vol < r->meta->n_volumes; r->rs_vol++, r->rs_off = 0) {
		const struct repl_volume_state *v = &r->vol[r->rs_vol];
		if (detach_of(r, r->rs_vol))
			continue;
		uint64_t first = bitmap_next_set(&v->todo, r->rs_off >> REGION_SHIFT);
		if (first == BITMAP_NONE)
			continue;
		uint64_t end = bitmap_next_clear(&v->todo, first);
		if (end == BITMAP_NONE)
			end = v->todo.nbits;
		*vol = r->rs_vol;
		run->off = first << REGION_SHIFT;
		run->len = min_u64(end << REGION_SHIFT, r->meta->volumes[r->rs_vol].size) - run->off;
		return true;
	}
	return false;
}

static bool resyncing(const struct repl *r)
{
	return primary_forwarding(r) && r->link == LINK_RESYNC && r->rs_ready && !r->rs_done_sent;
}

static bool resync_may_go(struct repl *r)
{
	if (!resyncing(r))
		return false;
	/* The queue is for guests: a resync, the reads under way included, never fills it. */
	uint64_t most = min_u64(RESYNC_QUEUE_MAX, r->meta->settings.queue_max_bytes / 4);
	if (r->queue_bytes > most || r->seq - r->applied > RESYNC_WINDOW_MAX / RESYNC_READ_MAX * 4)
		return false;
	uint64_t rate = r->meta->settings.resync_rate;
	return r->now_ns >= r->rs_retry_ns && (rate == 0 || r->now_ns >= r->rs_allow_ns);
}

static void resync_end(struct repl *r)
{
	struct wbuf w = {.data = r->scratch, .size = sizeof(r->scratch)};
	wire_lineage_encode(&r->meta->lineage, &w);
	session_send(r, WIRE_RESYNC_DONE, ++r->seq, 0, 0, 0, w.data, (uint32_t)w.len);
	r->last_was_flush = false;
	r->rs_done_sent = r->rs_whole = true;
	r->rs_done_seq = r->sample_seq = r->seq;
	r->rs_done_generation = r->meta->lineage.current;
	r->sample_ns = r->now_ns;
}

/* The bytes that one step may move: small under a low rate, so that it is kept evenly. */
static uint64_t resync_step(const struct repl *r)
{
	uint64_t rate = r->meta->settings.resync_rate;
	uint64_t step = rate ? round_down_u64(rate / 8, REGION_SIZE) : RESYNC_READ_MAX;
	return min_u64(step < REGION_SIZE ? REGION_SIZE : step, RESYNC_READ_MAX);
}

/* A slow moment is made up for, up to RATE_BURST_NS: steps start on ticks. */
static void resync_charge(struct repl *r, uint64_t bytes)
{
	uint64_t rate = r->meta->settings.resync_rate;
	if (rate)
		r->rs_allow_ns =
		    max_u64(r->rs_allow_ns, r->now_ns - RATE_BURST_NS) + bytes * UINT64_C(1000000000) / rate;
}

static void resync_start(struct repl *r, struct repl_io *io, enum repl_kind kind, struct range range)
{
	io->kind = kind;
	io->off = range.off;
	io->len = range.len;
	io->arg = r->rs_run;
	if (kind != REPL_RESYNC_SCAN)
		resync_charge(r, io->len);
	repl_claim_blocks(io);
	r->rs_busy[io - r->rs] = true;
	if (reqset_add(&r->claims, &io->claim))
		repl_submit(r, io, TARGET_OWN);
}

/* Sends a run of what a target has said to differ. */
static bool resync_differing(struct repl *r, struct repl_io *io)
{
	for (unsigned i = 0; i < HASHES_MAX; i++) {
		struct rs_hash *h = &r->rs_hash[i];
		if (!h->used || h->mask == 0)
			continue;
		uint64_t first = 0, n = 0, most = resync_step(r) >> REGION_SHIFT;
		while (!(h->mask >> first & 1))
			first++;
		for (; n < most && first + n < 64 && (h->mask >> (first + n) & 1); n++)
			h->mask &= ~(UINT64_C(1) << (first + n));
		h->used = h->mask != 0;
		uint64_t off = first << REGION_SHIFT;
		io->volume = h->volume;
		resync_start(r, io, REPL_RESYNC_READ,
			     (struct range){h->off + off, min_u64(n << REGION_SHIFT, h->len - off)});
		return true;
	}
	return false;
}

static struct rs_hash *hash_slot(struct repl *r)
{
	for (unsigned i = 0; i < HASHES_MAX; i++)
		if (!r->rs_hash[i].used)
			return &r->rs_hash[i];
	return NULL;
}

/* Starts the next step from the cursor on. False: there is none, or it has to wait. */
static bool resync_go_on(struct repl *r, struct repl_io *io)
{
	uint32_t vol = 0;
	struct range run;
	if (!resync_next(r, &vol, &run))
		return false;
	bool data = r->rs_data_vol == vol && run.off >= r->rs_data_off && run.off < r->rs_data_end;
	bool hash = data && r->meta->hash_sync;
	struct rs_hash *h = hash ? hash_slot(r) : NULL;
	if (hash && h == NULL)
		return false;
	run.len = min_u64(run.len, data ? resync_step(r) : RESYNC_SCAN_MAX);
	if (h)
		*h = (struct rs_hash){.used = true, .volume = vol, .off = run.off, .len = run.len};
	io->volume = vol;
	io->hash_seed = hash ? repl_random(r) : 0;
	io->flags = h ? (uint32_t)(h - r->rs_hash) : 0;
	r->rs_off = run.off + run.len;
	resync_start(r, io, hash ? REPL_RESYNC_HASH : data ? REPL_RESYNC_READ : REPL_RESYNC_SCAN, run);
	/* A scan decides where to go on: nothing else is started before it has ended. */
	return data;
}

static bool resync_idle(const struct repl *r)
{
	for (unsigned i = 0; i < RESYNC_READS_MAX; i++)
		if (r->rs_busy[i])
			return false;
	for (unsigned i = 0; i < HASHES_MAX; i++)
		if (r->rs_hash[i].used)
			return false;
	return true;
}

void primary_resync_pump(struct repl *r)
{
	for (unsigned i = 0; i < RESYNC_READS_MAX; i++)
		if (r->rs_busy[i] && r->rs[i].kind == REPL_RESYNC_SCAN)
			return;
	for (unsigned i = 0; i < RESYNC_READS_MAX && resync_may_go(r); i++)
		if (!r->rs_busy[i] && !resync_differing(r, &r->rs[i]) && !resync_go_on(r, &r->rs[i]))
			break;
	if (!resyncing(r) || !resync_idle(r))
		return;
	if (primary_resync_left(r) == 0)
		resync_end(r);
	else if (r->rs_vol >= r->meta->n_volumes) /* a region that failed or was passed over: go round again */
		r->rs_vol = 0, r->rs_off = 0;
}

void primary_resync_granted(struct repl *r, struct repl_io *io)
{
	if (io->arg != r->rs_run || !primary_live(r)) {
		r->rs_busy[io - r->rs] = false;
		repl_release_claim(r, io);
		return;
	}
	repl_submit(r, io, TARGET_OWN);
}

/* It is sent: its regions are done for this session. */
static void resync_sent(struct repl *r, struct repl_io *io, uint64_t len)
{
	struct repl_volume_state *v = &r->vol[io->volume];
	uint64_t first = io->off >> REGION_SHIFT, n = units_of(len, REGION_SHIFT);
	bitmap_clear_range(&v->todo, first, n);
	bitmap_set_range(&v->touched, first, n);
}

static void scan_done(struct repl *r, struct repl_io *io)
{
	uint64_t size = r->meta->volumes[io->volume].size;
	bool to_end = io->off + io->ext_len >= size;
	if (io->hole) {
		uint64_t len = to_end ? io->ext_len : round_down_u64(io->ext_len, REGION_SIZE);
		if (len) {
			struct repl_io z = {.kind = REPL_ZERO, .volume = io->volume, .off = io->off, .len = 0};
			for (uint64_t done = 0; done < len; done += z.len) {
				z.off = io->off + done;
				z.len = min_u64(len - done, RESYNC_ZERO_FRAME_MAX);
				primary_send_io(r, &z, WIRE_RESYNC_ZERO);
			}
			resync_sent(r, io, len);
			r->rs_total -=
			    min_u64(r->rs_total, units_of(len, REGION_SHIFT) << REGION_SHIFT); /* holes are not data */
			r->rs_off = io->off + len;
			return;
		}
		io->ext_len = REGION_SIZE; /* a hole smaller than a region: read the region as data */
	}
	r->rs_data_vol = io->volume;
	r->rs_data_off = io->off;
	r->rs_data_end = io->off + io->ext_len;
	r->rs_vol = io->volume;
	r->rs_off = io->off;
}

void primary_resync_io_done(struct repl *r, struct repl_io *io, int error)
{
	r->rs_busy[io - r->rs] = false;
	if (io->arg != r->rs_run || !primary_live(r)) { /* of a resync that has ended: the next reads it again */
		repl_release_claim(r, io);
		primary_resync_pump(r);
		return;
	}
	if (error) {
		repl_release_claim(r, io);
		repl_set_error(r, error, "resync", (int)io->volume, io->off, io->len,
			       "reading %s for the resync failed: %s", r->meta->volumes[io->volume].name,
			       err_short(error));
		/* It stays to be sent: the link stays RESYNC, and it is tried again until the disk can be read. */
		r->rs_retry_ns = r->now_ns + RESYNC_RETRY_NS;
		return;
	}
	if (io->kind == REPL_RESYNC_SCAN) {
		scan_done(r, io);
	} else {
		bool hash = io->kind == REPL_RESYNC_HASH;
		primary_send_io(r, io, hash ? WIRE_HASH : WIRE_RESYNC_WRITE);
		/* What is hashed counts as sent: guests' writes go out behind it. */
		resync_sent(r, io, io->len);
		r->counters.resync_bytes += hash ? hash_payload(io->len) : io->len;
		if (hash)
			r->rs_hash[io->flags].seq = io->seq;
	}
	repl_release_claim(r, io);
	primary_resync_pump(r);
}
