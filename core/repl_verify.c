/* Verify: both disks are compared, chunk by chunk, while guests write; and the overlays of both hosts by their
 * checksums.
 *
 * A chunk is read and hashed on the primary under a shared claim, and its VERIFY frame gets its place in the stream
 * before the claim ends. So every write that overlaps it is either in what was read and before the frame, or not in it
 * and behind; the target, which orders the frame among overlapping ones like a read, compares with its own disk at that
 * place. In sync both hold the same there, whatever guests, checkpoints and merges do beside it: what differs differs.
 * A hole is sent as a span of zeroes. A host that can't read a block says so.
 *
 * Should the pair fall out of sync, or a disk be detached, the verify ends: what is not forwarded may differ by right.
 *
 * Repair: before the first block is replaced the secondary takes a pinned checkpoint, in either direction, so that what
 * it had stays. (Not by force: while its active overlay is not empty it is not taken, and nothing is repaired.) Then,
 * for each piece of what differs, under an exclusive claim: intent bit, durable → dirty bit → the primary's content is
 * read and sent as a WRITE like a guest's, which the target's copy-on-write saves before; or the peer's is read
 * (READ_REQ, behind all that was sent) and written here [PRIMTGT: under the claim of the range]. A crash in between
 * finds the region dirty, and the next sync makes both equal (I4). Then the piece is compared again.
 *
 * Overlays: each host looks at its own, in small steps; the primary asks for each of the target's (SCRUB, SCRUBBED).
 *
 * Slots: a chunk has a slot from its first read until it has been answered and repaired. What comes back for a verify
 * that has ended (`run`) only ends its claim.
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

#define CHUNK_MAX ((uint64_t)WIRE_VERIFY_BLOCK * WIRE_VERIFY_BLOCKS_MAX)

enum verify_phase {
	SLOT_FREE,
	SLOT_SCAN,   /* looking for a hole */
	SLOT_HASH,   /* reading and hashing here */
	SLOT_ANSWER, /* the peer compares */
	SLOT_WAIT,   /* to be repaired, once the checkpoint is taken */
	SLOT_CLAIM,  /* repair: the claim, the intent bit */
	SLOT_READ,   /* repair: its source is read, here or there */
	SLOT_WRITE,  /* repair: written here */
};

static struct verify_slot *slot_of(struct repl_io *io)
{
	return CONTAINER_OF(io, struct verify_slot, io);
}

static bool slot_current(const struct repl *r, const struct verify_slot *s)
{
	return r->vf.c != NULL && s->run == r->vf.run;
}

static struct repl_verify *result(struct repl *r)
{
	return r->vf.c->verify;
}

void verify_init(struct repl *r)
{
	for (unsigned i = 0; i < VERIFY_SLOTS; i++)
		r->vf.slot[i].io.internal = r->vf.slot[i].io.verify = true;
	r->vf.own_io.internal = r->vf.own_io.verify = true;
	r->scrub_io.internal = true;
}

/* ---- what is found ---- */

static void note(struct repl *r, struct repl_difference d)
{
	struct repl_verify *v = result(r);
	v->found += d.len;
	if (v->n == VERIFY_DIFFERENCES_MAX)
		v->more++;
	else
		v->list[v->n++] = d;
}

static void note_scrub(struct repl *r, enum repl_where where, uint32_t volume, const struct wire_scrubbed *s)
{
	uint64_t size = r->meta->volumes[volume].size;
	for (uint32_t i = 0; i < s->n; i++) {
		const struct wire_scrub_bad *b = &s->bad[i];
		if (b->off >= size)
			continue;
		note(r, (struct repl_difference){.volume = volume,
						 .where = (uint8_t)where,
						 .problem = b->unreadable ? PROBLEM_UNREADABLE : PROBLEM_CHECKSUM,
						 .overlay = true,
						 .layer = b->layer,
						 .off = b->off,
						 .len = min_u64(b->len, size - b->off)});
	}
}

static bool block_bad(const struct verify_slot *s, uint64_t off)
{
	uint64_t i = (off - s->io.off) >> BLOCK_SHIFT;
	return !s->io.hole && i < WIRE_VERIFY_BLOCKS_MAX && (s->io.bad[i / 64] >> i % 64 & 1);
}

/* A range of the slot's chunk, but for what this host can't read itself (want false), or only that. Widens lo, hi. */
static uint64_t note_range(struct repl *r, struct verify_slot *s, struct range x, enum repl_problem problem,
			   enum repl_where where, bool bad)
{
	uint64_t sum = 0, end = range_end(x);
	for (uint64_t at = x.off, stop; at < end; at = stop) {
		bool b = block_bad(s, at);
		for (stop = at; stop < end && block_bad(s, stop) == b;)
			stop = min_u64(round_down_u64(stop, BLOCK_SIZE) + BLOCK_SIZE, end);
		if (b != bad)
			continue;
		note(r, (struct repl_difference){.volume = s->io.volume,
						 .problem = (uint8_t)problem,
						 .where = (uint8_t)where,
						 .off = at,
						 .len = stop - at});
		sum += stop - at;
		s->lo = min_u64(s->lo, at);
		s->hi = max_u64(s->hi, stop);
	}
	return sum;
}

/* ---- the end ---- */

/* A piece that is being repaired is a write under way, as a guest's: a stop and whoever gives up this disk wait for it.
 */
static void slot_uncount(struct repl *r, struct verify_slot *s)
{
	if (!s->counted)
		return;
	s->counted = false;
	r->writes_in_flight--;
	primary_stop_check(r);
}

static void slot_free(struct repl *r, struct verify_slot *s)
{
	slot_uncount(r, s);
	s->phase = SLOT_FREE;
	repl_release_claim(r, &s->io);
}

static void finish(struct repl *r, int error, const char *why)
{
	struct repl_command *c = r->vf.c;
	bool changed = c->verify->wrote_here;
	r->vf.c = NULL;
	r->vf.run++;
	for (unsigned i = 0; i < VERIFY_SLOTS; i++) {
		struct verify_slot *s = &r->vf.slot[i];
		if (s->phase == SLOT_ANSWER || s->phase == SLOT_WAIT) /* else its request comes back */
			s->phase = SLOT_FREE;
	}
	if (changed)
		repl_emit(r, &(struct repl_action){.type = ACT_CHANGED});
	repl_command_done(r, c, error, "%s", why);
}

void verify_end(struct repl *r, int error, const char *why)
{
	if (error == -ERR_PEER || r->link == LINK_DOWN)
		r->vf.peer.busy = false; /* its answer does not come any more */
	if (r->vf.c == NULL)
		return;
	char text[ERR_TEXT_MAX];
	const struct repl_verify *v = result(r);
	(void)snprintf(text, sizeof(text), "%s (%llu of %llu bytes had been looked at, %llu of them are wrong)", why,
		       (unsigned long long)v->done, (unsigned long long)v->total, (unsigned long long)v->found);
	finish(r, error, text);
}

static void count_progress(struct repl *r)
{
	struct repl_verify *v = result(r);
	uint64_t own = r->vf.own.total, peer = r->vf.peer.total;
	v->done = v->bytes + own + peer;
	v->total = own + r->vf.own.s.left + peer + r->vf.peer.s.left;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		v->total += r->meta->volumes[i].size;
}

/* ---- pace ---- */

static bool may_go(const struct repl *r)
{
	return r->meta->settings.resync_rate == 0 || r->now_ns >= r->vf.allow_ns;
}

static void charge(struct repl *r, uint64_t bytes)
{
	uint64_t rate = r->meta->settings.resync_rate;
	if (rate)
		r->vf.allow_ns = max_u64(r->vf.allow_ns, r->now_ns - min_u64(r->now_ns, RATE_BURST_NS)) +
				 bytes * UINT64_C(1000000000) / rate;
}

/* ---- chunks ---- */

static void slot_claim(struct repl *r, struct verify_slot *s, enum verify_phase phase, struct range x, bool shared)
{
	s->phase = (uint8_t)phase;
	s->io.off = x.off;
	s->io.len = x.len;
	s->io.hole = false;
	repl_claim_blocks(&s->io);
	s->io.claim.shared = shared;
	if (reqset_add(&r->claims, &s->io.claim))
		verify_granted(r, &s->io);
}

/* Hashes a range here, and has the peer compare. */
static void slot_hash(struct repl *r, struct verify_slot *s, struct range x)
{
	s->io.kind = REPL_VERIFY;
	s->io.hash_seed = repl_random(r);
	charge(r, x.len);
	slot_claim(r, s, SLOT_HASH, x, true);
}

/* False: nothing is left, or it has to wait. */
static bool chunk_next(struct repl *r, struct verify_slot *s)
{
	while (r->vf.vol < r->meta->n_volumes && r->vf.off >= r->meta->volumes[r->vf.vol].size) {
		r->vf.vol++;
		r->vf.off = r->vf.data_off = r->vf.data_end = 0;
	}
	if (r->vf.vol >= r->meta->n_volumes)
		return false;
	uint64_t left = r->meta->volumes[r->vf.vol].size - r->vf.off;
	bool data = r->vf.off >= r->vf.data_off && r->vf.off < r->vf.data_end;
	*s = (struct verify_slot){.io = {.internal = true, .verify = true, .volume = r->vf.vol}, .run = r->vf.run};
	if (data) {
		struct range x = {r->vf.off, min_u64(min_u64(left, CHUNK_MAX), r->vf.data_end - r->vf.off)};
		r->vf.off += x.len;
		slot_hash(r, s, x);
		return true;
	}
	s->io.kind = REPL_RESYNC_SCAN;
	slot_claim(r, s, SLOT_SCAN, (struct range){r->vf.off, min_u64(left, VERIFY_SPAN_MAX)}, true);
	return false; /* it decides where to go on */
}

static bool scanning(const struct repl *r)
{
	for (unsigned i = 0; i < VERIFY_SLOTS; i++)
		if (r->vf.slot[i].phase == SLOT_SCAN)
			return true;
	return false;
}

static void send_verify(struct repl *r, struct verify_slot *s)
{
	struct repl_io *io = &s->io;
	struct repl_action a = {.type = ACT_SEND, .io = io};
	s->off = io->off;
	s->len = io->len;
	s->seq = io->seq = ++r->seq;
	a.frame.type = WIRE_VERIFY;
	a.frame.seq = io->seq;
	a.frame.volume = r->meta->volumes[io->volume].id;
	a.frame.offset = io->off;
	a.frame.length = io->len;
	a.frame.flags = io->hole ? WIRE_VERIFY_ZERO : 0;
	a.frame.length_payload = io->hole ? 0 : (uint32_t)(8 + WIRE_HASH_SIZE * units_of(io->len, WIRE_VERIFY_SHIFT));
	r->last_was_flush = false;
	repl_emit(r, &a);
	s->phase = SLOT_ANSWER;
	repl_release_claim(r, io);
}

static void scan_done(struct repl *r, struct verify_slot *s)
{
	struct repl_io *io = &s->io;
	uint64_t size = r->meta->volumes[io->volume].size, end = io->off + io->ext_len;
	if (io->hole && end < size)
		end = round_down_u64(end, BLOCK_SIZE);
	if (io->hole && end > io->off) {
		io->len = end - io->off;
		r->vf.off = end;
		send_verify(r, s);
		return;
	}
	r->vf.data_off = io->off;
	r->vf.data_end = max_u64(round_up_u64(end, BLOCK_SIZE), io->off + BLOCK_SIZE);
	slot_free(r, s);
}

/* ---- repair ---- */

static void repair_next(struct repl *r, struct verify_slot *s)
{
	struct repl_verify *v = result(r);
	if (s->at < s->hi) {
		s->phase = SLOT_WAIT;
		return;
	}
	if (!s->failed)
		for (uint32_t i = s->first; i < s->first + s->n; i++) {
			v->list[i].repaired = true;
			v->repaired += v->list[i].len;
		}
	slot_free(r, s);
}

static void repair_failed(struct repl *r, struct verify_slot *s)
{
	s->failed = true;
	s->at = s->io.off + s->io.len;
	slot_uncount(r, s);
	repl_release_claim(r, &s->io);
	repair_next(r, s);
}

static void repair_start(struct repl *r, struct verify_slot *s)
{
	struct range x = {s->at, min_u64(s->hi - s->at, CHUNK_MAX)};
	s->io.kind = REPL_READ;
	charge(r, x.len);
	slot_claim(r, s, SLOT_CLAIM, x, false);
}

void verify_marked(struct repl *r, struct repl_io *io)
{
	struct verify_slot *s = slot_of(io);
	io->phase = PHASE_NONE;
	if (!slot_current(r, s)) {
		slot_free(r, s);
		return;
	}
	repl_mark_written(r, io);
	s->phase = SLOT_READ;
	io->kind = REPL_READ;
	if (r->vf.repair == REPAIR_PEER)
		repl_submit(r, io, TARGET_DISK);
	else
		detach_send_read(r, io);
}

static void repaired(struct repl *r, struct verify_slot *s)
{
	struct range x = {s->io.off, s->io.len};
	repl_mark_written(r, &s->io); /* again: a clear cycle may have gone by since */
	slot_uncount(r, s);
	repl_release_claim(r, &s->io);
	s->checking = true;
	slot_hash(r, s, x);
}

static void repair_read(struct repl *r, struct verify_slot *s, int error)
{
	if (error) {
		repair_failed(r, s);
		return;
	}
	primary_send_io(r, &s->io, s->io.hole ? WIRE_ZERO : WIRE_WRITE);
	repaired(r, s);
}

void verify_read_lost(struct repl *r, struct repl_io *io)
{
	slot_free(r, slot_of(io));
}

void verify_read_reply(struct repl *r, struct repl_io *io, int error, const void *data, uint32_t len)
{
	struct verify_slot *s = slot_of(io);
	io->phase = PHASE_NONE;
	if (!slot_current(r, s)) {
		slot_free(r, s);
		return;
	}
	if (error) {
		repair_failed(r, s);
		return;
	}
	s->phase = SLOT_WRITE;
	io->kind = REPL_REBUILD;
	io->target = TARGET_OWN;
	repl_emit(r, &(struct repl_action){.type = ACT_SUBMIT, .io = io, .data = data, .data_len = data ? len : 0});
}

static void repair_written(struct repl *r, struct verify_slot *s, int error)
{
	struct repl_verify *v = result(r);
	v->wrote_here = true; /* after an error too: who knows how much */
	if (r->meta->n_ckpts)
		v->kept = r->meta->ckpts[r->meta->n_ckpts - 1].number;
	if (error) {
		repl_mark_written(r, &s->io);
		repair_failed(r, s);
	} else {
		repaired(r, s);
	}
}

void verify_checkpoint(struct repl *r, uint64_t number, bool taken)
{
	if (r->vf.c == NULL || r->vf.ckpt_asked != number)
		return;
	r->vf.ckpt_asked = 0;
	if (!taken) {
		verify_end(r, -ERR_STATE,
			   "the secondary did not take the checkpoint that is to keep what is replaced; if its active "
			   "overlay is not empty, `discard` it or take a `checkpoint` first");
		return;
	}
	result(r)->ckpt = number;
	verify_pump(r);
}

/* ---- requests come back ---- */

void verify_granted(struct repl *r, struct repl_io *io)
{
	struct verify_slot *s = slot_of(io);
	if (!slot_current(r, s))
		slot_free(r, s);
	else if (s->phase == SLOT_CLAIM) {
		s->counted = true;
		r->writes_in_flight++;
		repl_intent(r, io);
	} else
		repl_submit(r, io, TARGET_OWN);
}

static void own_scrubbed(struct repl *r)
{
	struct verify_scrub *o = &r->vf.own;
	o->busy = false;
	if (r->vf.c == NULL || o->run != r->vf.run)
		return;
	o->s = r->vf.own_step;
	note_scrub(r, WHERE_PRIMARY, o->vol, &o->s);
	o->total += o->s.bytes;
	charge(r, o->s.bytes);
	if (r->vf.own_io.scrub_end) {
		o->vol++;
		o->s.next_layer = o->s.next_off = o->s.left = 0;
	}
}

void verify_io_done(struct repl *r, struct repl_io *io, int error)
{
	if (io == &r->vf.own_io) {
		own_scrubbed(r);
		verify_pump(r);
		return;
	}
	struct verify_slot *s = slot_of(io);
	if (io->phase == PHASE_INTENT) {
		io->phase = PHASE_NONE;
		r->marks_busy--;
		if (!error) {
			bitmap_set_range(&r->vol[io->volume].intent, io->mark_first, io->mark_units);
			verify_marked(r, io);
			return;
		}
		slot_free(r, s);
		if (slot_current(r, s))
			verify_end(r, error, "the write-intent map could not be written: nothing more is repaired");
		return;
	}
	if (!slot_current(r, s)) {
		if (s->phase == SLOT_WRITE) {
			if (!detach_of(r, io->volume)) /* again: a clear cycle may have gone by since */
				repl_mark_written(r, io);
			repl_emit(r, &(struct repl_action){.type = ACT_CHANGED});
		}
		slot_free(r, s);
		verify_pump(r);
		return;
	}
	switch (s->phase) {
	case SLOT_READ:
		repair_read(r, s, error);
		break;
	case SLOT_WRITE:
		repair_written(r, s, error);
		break;
	default:
		if (error) {
			char why[128];
			(void)snprintf(why, sizeof(why), "reading %s failed: %s", r->meta->volumes[io->volume].name,
				       err_short(error));
			slot_free(r, s);
			verify_end(r, error, why);
			return;
		}
		if (s->phase == SLOT_SCAN)
			scan_done(r, s);
		else
			send_verify(r, s);
	}
	verify_pump(r);
}

/* ---- what the peer says ---- */

static bool any_bad(const struct verify_slot *s)
{
	return !s->io.hole && (s->io.bad[0] | s->io.bad[1]) != 0;
}

static void compared(struct repl *r, struct verify_slot *s, const struct wire_verify_range *x, int n)
{
	struct repl_verify *v = result(r);
	bool there_bad = false;
	uint64_t sum = 0;
	s->lo = UINT64_MAX;
	s->hi = 0;
	s->first = v->n;
	if (any_bad(s))
		sum += note_range(r, s, (struct range){s->off, s->len}, PROBLEM_UNREADABLE, WHERE_PRIMARY, true);
	for (int i = 0; i < n; i++) {
		struct range y = {x[i].off, x[i].len};
		if (x[i].problem == WIRE_VERIFY_DIFFERS) {
			sum += note_range(r, s, y, PROBLEM_DIFFERS, WHERE_BOTH, false);
			continue;
		}
		there_bad = true;
		note(r, (struct repl_difference){.volume = s->io.volume,
						 .problem = PROBLEM_UNREADABLE,
						 .where = WHERE_SECONDARY,
						 .off = y.off,
						 .len = y.len});
	}
	s->n = v->n - s->first;
	v->bytes += s->len;
	/* What can't be read can't be saved, so it can't be replaced on the secondary, nor come from there. */
	bool can = r->vf.repair == REPAIR_PEER ? !any_bad(s) : r->vf.repair == REPAIR_FROM_PEER;
	if (sum == 0 || there_bad || !can || v->more) {
		s->phase = SLOT_FREE;
		return;
	}
	r->vf.ckpt_wanted = true;
	s->at = s->lo;
	s->phase = SLOT_WAIT;
}

void verify_answer(struct repl *r, const struct repl_event *ev)
{
	const struct wire_frame *f = ev->frame;
	struct wire_verify_range x[WIRE_VERIFY_RANGES_MAX];
	struct verify_slot *s = NULL;
	struct err e;
	for (unsigned i = 0; i < VERIFY_SLOTS && !s; i++)
		if (r->vf.slot[i].phase == SLOT_ANSWER && r->vf.slot[i].seq == f->seq)
			s = &r->vf.slot[i];
	r->progress_ns = r->now_ns;
	if (f->seq > r->seq) {
		session_protocol_error(r, "VERIFY_ANSWER to what was not asked");
		return;
	}
	if (s == NULL) /* of one that has ended */
		return;
	int n = wire_verify_answer_decode(x, s->off, s->len, ev->payload, f->length_payload, &e);
	if (n < 0) {
		session_protocol_error(r, "%s", e.text);
		return;
	}
	if (s->checking) {
		s->failed = s->failed || n > 0 || any_bad(s);
		s->checking = false;
		s->at = s->off + s->len;
		repair_next(r, s);
	} else {
		compared(r, s, x, n);
	}
	verify_pump(r);
}

void verify_scrubbed(struct repl *r, const struct repl_event *ev)
{
	struct verify_scrub *p = &r->vf.peer;
	struct wire_scrubbed s;
	struct err e;
	bool end = (ev->frame->flags & WIRE_SCRUBBED_END) != 0;
	if (!p->busy || ev->frame->seq != p->token) {
		session_protocol_error(r, "SCRUBBED that was not asked for");
		return;
	}
	if (wire_scrubbed_decode(&s, ev->payload, ev->frame->length_payload, &e) < 0) {
		session_protocol_error(r, "%s", e.text);
		return;
	}
	p->busy = false;
	r->progress_ns = r->now_ns;
	if (r->vf.c && p->run == r->vf.run) {
		if (!end && (s.next_layer < p->s.next_layer ||
			     (s.next_layer == p->s.next_layer && s.next_off <= p->s.next_off))) {
			session_protocol_error(r, "SCRUBBED that gets nowhere");
			return;
		}
		note_scrub(r, WHERE_SECONDARY, p->vol, &s);
		p->s = s;
		p->total += s.bytes;
		charge(r, s.bytes);
		if (end) {
			p->vol++;
			p->s.next_layer = p->s.next_off = p->s.left = 0;
		}
	}
	verify_pump(r);
}

/* ---- going on ---- */

static void own_step(struct repl *r)
{
	struct verify_scrub *o = &r->vf.own;
	if (o->busy || o->vol >= r->meta->n_volumes || !may_go(r))
		return;
	o->busy = true;
	o->run = r->vf.run;
	r->vf.own_io.kind = REPL_SCRUB;
	r->vf.own_io.volume = o->vol;
	r->vf.own_step = o->s;
	r->vf.own_io.scrub = &r->vf.own_step;
	repl_submit(r, &r->vf.own_io, TARGET_OWN);
}

static void peer_step(struct repl *r)
{
	struct verify_scrub *p = &r->vf.peer;
	if (p->busy || p->vol >= r->meta->n_volumes || !may_go(r))
		return;
	struct repl_action a = {.type = ACT_SEND};
	if (r->seq == r->applied)
		r->progress_ns = r->now_ns;
	p->busy = true;
	p->run = r->vf.run;
	a.frame.type = WIRE_SCRUB;
	a.frame.seq = ++p->token;
	a.frame.volume = r->meta->volumes[p->vol].id;
	a.frame.offset = p->s.next_off;
	a.frame.length = p->s.next_layer;
	repl_emit(r, &a);
}

static bool all_done(const struct repl *r)
{
	for (unsigned i = 0; i < VERIFY_SLOTS; i++)
		if (r->vf.slot[i].phase != SLOT_FREE && r->vf.slot[i].run == r->vf.run)
			return false;
	return r->vf.vol >= r->meta->n_volumes && r->vf.own.vol >= r->meta->n_volumes &&
	       r->vf.peer.vol >= r->meta->n_volumes;
}

static bool hindered(struct repl *r)
{
	const char *why = r->link != LINK_SYNCED || !primary_forwarding(r) ? "the pair is not in sync any more"
			  : r->stopping					   ? "it is being stopped"
			  : detach_any(r)				   ? "a local disk was detached"
									   : NULL;
	if (why)
		verify_end(r, -ERR_STATE, why);
	return why != NULL;
}

static void slots_go_on(struct repl *r)
{
	/* However full the queue is: a frame is small, and guests that keep it full would keep the verify out. */
	for (unsigned i = 0; i < VERIFY_SLOTS && r->vf.c && may_go(r); i++) {
		struct verify_slot *s = &r->vf.slot[i];
		if (s->phase == SLOT_WAIT && result(r)->ckpt)
			repair_start(r, s);
		else if (s->phase == SLOT_FREE && !scanning(r))
			(void)chunk_next(r, s);
	}
}

void verify_pump(struct repl *r)
{
	if (r->vf.c == NULL || hindered(r))
		return;
	if (r->vf.ckpt_wanted && !result(r)->ckpt && !r->vf.ckpt_asked && !r->auto_ckpt) {
		primary_checkpoint(r, NULL, WIRE_CKPT_PIN);
		r->vf.ckpt_asked = r->auto_ckpt;
	}
	own_step(r);
	peer_step(r);
	slots_go_on(r);
	count_progress(r);
	if (all_done(r))
		finish(r, 0, " ");
}

/* ---- commands ---- */

void verify_begin(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	enum link_state link = repl_link(r, r->now_ns);
	if (m->role == ROLE_SECONDARY)
		repl_command_done(r, c, -ERR_STATE, "this host is secondary for it; run it on the primary");
	else if (m->role == ROLE_STANDALONE)
		repl_command_done(r, c, -ERR_STATE, "it is standalone: there is no peer's copy to compare with");
	else if (m->split_brain)
		repl_command_done(r, c, -ERR_SPLIT,
				  "split brain: both hosts wrote alone; see `diverged`, then `resolve`");
	else if (m->state != STATE_RUNNING)
		repl_command_done(r, c, -ERR_STATE, "it does not run (%s); `start` it first", state_name(m->state));
	else if (link == LINK_DOWN || link == LINK_HANDSHAKE)
		repl_command_done(r, c, -ERR_PEER, "%s is not connected; both disks are looked at", repl_peer_text(r));
	else if (link != LINK_SYNCED)
		repl_command_done(r, c, -ERR_STATE, "the link is %s, not SYNCED; %s", link_state_name(link),
				  m->paused ? "it is paused: `resume` it, then `wait --for=in-sync`"
					    : "`wait --for=in-sync` first");
	else if (detach_any(r))
		repl_command_done(r, c, -ERR_STATE,
				  "a local disk is detached and not current; `resync` rebuilds it from the peer first");
	else if (r->stopping)
		repl_command_done(r, c, -ERR_STATE, "it is being stopped");
	else if (r->vf.c)
		repl_command_done(r, c, -ERR_BUSY, "another verify is under way");
	else if (r->rz.c)
		repl_command_done(r, c, -ERR_BUSY, "a resize is under way; give it again in a moment");
	else {
		r->vf.c = c;
		r->vf.run++;
		r->vf.repair = (enum repl_repair)c->flags;
		r->vf.vol = 0;
		r->vf.off = r->vf.data_off = r->vf.data_end = 0;
		r->vf.allow_ns = r->now_ns;
		r->vf.ckpt_wanted = false;
		r->vf.ckpt_asked = 0;
		r->vf.own.vol = r->vf.peer.vol = 0;
		r->vf.own.total = r->vf.peer.total = 0;
		memset(&r->vf.own.s, 0, sizeof(r->vf.own.s));
		memset(&r->vf.peer.s, 0, sizeof(r->vf.peer.s));
		verify_pump(r);
	}
}

void verify_cancel(struct repl *r, struct repl_command *c)
{
	if (r->vf.c && r->vf.c->verify == c->verify)
		verify_end(r, -ERR_INTR, "interrupted");
	repl_command_done(r, c, 0, " ");
}

/* ---- the target's side ---- */

void verify_answer_send(struct repl *r, struct repl_io *io)
{
	struct repl_action a = {.type = ACT_SEND, .io = io->ext_len ? io : NULL};
	a.frame.type = WIRE_VERIFY_ANSWER;
	a.frame.seq = io->seq;
	a.frame.length_payload = (uint32_t)io->ext_len;
	repl_emit(r, &a);
}

static void scrub_start(struct repl *r, uint32_t volume, const struct wire_frame *f)
{
	r->scrub_busy = true;
	r->scrub = (struct wire_scrubbed){.next_layer = f->length, .next_off = f->offset};
	r->scrub_io.kind = REPL_SCRUB;
	r->scrub_io.volume = volume;
	r->scrub_io.scrub = &r->scrub;
	r->scrub_io.seq = f->seq;
	r->scrub_io.session = r->session;
	repl_submit(r, &r->scrub_io, TARGET_OWN);
}

void verify_scrub_asked(struct repl *r, const struct wire_frame *f)
{
	int vi = repl_meta_volume_by_id(r->meta, f->volume);
	if (vi < 0 || f->offset % BLOCK_SIZE) {
		session_protocol_error(r, "SCRUB of volume %u at %llu", f->volume, (unsigned long long)f->offset);
	} else if (r->scrub_busy && (r->scrub_io.session == r->session || r->scrub_waits == r->session)) {
		session_protocol_error(r, "SCRUB before the last one was answered");
	} else if (r->scrub_busy) {
		r->scrub_waits = r->session;
		r->scrub_next = *f;
	} else {
		scrub_start(r, (uint32_t)vi, f);
	}
}

void verify_scrub_done(struct repl *r)
{
	bool waits = r->scrub_waits == r->session;
	r->scrub_busy = false;
	r->scrub_waits = 0;
	if (!r->is_target || r->closing)
		return;
	if (r->scrub_io.session == r->session) {
		int n = wire_scrubbed_encode(&r->scrub, r->scratch, sizeof(r->scratch));
		INVARIANT(n > 0);
		session_send(r, WIRE_SCRUBBED, r->scrub_io.seq, 0, 0, r->scrub_io.scrub_end ? WIRE_SCRUBBED_END : 0,
			     r->scratch, (uint32_t)n);
	} else if (waits) {
		verify_scrub_asked(r, &r->scrub_next);
	}
}
