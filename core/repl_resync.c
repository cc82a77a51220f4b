/* Resync as its source.
 *
 * `todo` is the dirty set at its start, and what of it is still to be sent. What holds until RESYNC_DONE is sent: a
 * region that differs on the peer is in `todo`, or is on its way, or a write that is under way here has its dirty bit
 * and sends it. A region leaves `todo` when it is sent, under an exclusive claim that its read had too [RSLOCK], and
 * counts as touched, so that only a later clear cycle makes it clean. A guest's write that lies in `todo` altogether is
 * not forwarded, its region is read later; any other is. So one pass converges, however the guest writes.
 *
 * A range is looked at before it is read: what is a hole here is sent as zeroes. With `hash_sync` a range's hash is
 * sent first, which counts as sent; what the target says to differ is put back into `todo` and read.
 *
 * What was read for a resync that has ended (`rs_run`) is not sent: the next one begins with the dirty set as it is
 * then.
 */
#include "core/repl_internal.h"

#include <string.h>

#include "core/check.h"

uint32_t resync_hash_payload(uint64_t len)
{
	return (uint32_t)(8 + WIRE_HASH_SIZE * units_of(len, WIRE_HASH_SHIFT));
}

/* The dirty set as it is now is what this resync sends, and what is written from now on is forwarded or in that set.
 * New requests waited for the caller's save, so that both are cut at one point; a write under way has its dirty bit. */
void resync_begin(struct repl *r)
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
		if (r->rebuild >> i & 1) {
			/* Its todo is what is to come from there; what was touched is not durable there. */
			bitmap_or(&v->touched, &v->cycle);
			bitmap_clear_all(&v->cycle);
			continue;
		}
		bitmap_clear_all(&v->touched);
		bitmap_clear_all(&v->cycle);
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
		r->last_was_flush = false;
	}
	resync_pump(r);
	detach_resume(r); /* behind RESYNC_BEGIN, or the RESYNC_DONE that stands for it */
}

/* ---- reading and sending ---- */

uint64_t resync_left(const struct repl *r)
{
	uint64_t left = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) /* a detached disk's is what its rebuild has to read */
		left += detach_of(r, i) ? 0 : r->vol[i].todo.count << REGION_SHIFT;
	return left;
}

void resync_sample(struct repl *r)
{
	if (r->rs_n_samples && r->now_ns - r->rs_samples[(r->rs_n_samples - 1) % RATE_SAMPLES].ns < RATE_SAMPLE_NS)
		return;
	uint64_t at = r->rs_n_samples++ % RATE_SAMPLES;
	r->rs_samples[at].ns = r->now_ns;
	r->rs_samples[at].done = r->rs_total - min_u64(resync_left(r), r->rs_total);
}

/* The next run of regions to do, from the cursor on: false if there is none. */
static bool resync_next(struct repl *r, uint32_t *vol, struct range *run)
{
	for (; r->rs_vol < r->meta->n_volumes; r->rs_vol++, r->rs_off = 0) {
		if (detach_of(r, r->rs_vol) || !repl_todo_next(r, r->rs_vol, r->rs_off, run))
			continue;
		*vol = r->rs_vol;
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

bool resync_unanswered(const struct repl *r, const struct repl_io *io)
{
	for (unsigned i = 0; i < HASHES_MAX; i++) {
		const struct rs_hash *h = &r->rs_hash[i];
		if (h->used && h->mask == 0 && h->volume == io->volume && h->off < io->off + io->len &&
		    io->off < h->off + h->len)
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

void resync_pump(struct repl *r)
{
	for (unsigned i = 0; i < RESYNC_READS_MAX; i++)
		if (r->rs_busy[i] && r->rs[i].kind == REPL_RESYNC_SCAN)
			return;
	for (unsigned i = 0; i < RESYNC_READS_MAX && resync_may_go(r); i++)
		if (!r->rs_busy[i] && !resync_differing(r, &r->rs[i]) && !resync_go_on(r, &r->rs[i]))
			break;
	if (!resyncing(r) || !resync_idle(r))
		return;
	if (resync_left(r) == 0)
		resync_end(r);
	else if (r->rs_vol >= r->meta->n_volumes) /* a region that failed or was passed over: go round again */
		r->rs_vol = 0, r->rs_off = 0;
}

void resync_granted(struct repl *r, struct repl_io *io)
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
			struct repl_io z = {.kind = REPL_ZERO, .volume = io->volume, .internal = true};
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

void resync_io_done(struct repl *r, struct repl_io *io, int error)
{
	r->rs_busy[io - r->rs] = false;
	if (io->arg != r->rs_run || !primary_live(r)) { /* of a resync that has ended: the next reads it again */
		repl_release_claim(r, io);
		resync_pump(r);
		return;
	}
	if (error) {
		if (io->kind == REPL_RESYNC_HASH) /* nothing was sent that the target would answer */
			r->rs_hash[io->flags].used = false;
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
		r->counters.resync_bytes += hash ? resync_hash_payload(io->len) : io->len;
		if (hash)
			r->rs_hash[io->flags].seq = io->seq;
	}
	repl_release_claim(r, io);
	resync_pump(r);
}

/* ---- what the target says ---- */

/* What differs is put back into todo, so that guests' writes there are not forwarded, and is read and sent as it is by
 * then. Also while behind: the clear cycle asks todo what may not become clean. */
void resync_hash_answer(struct repl *r, const struct wire_frame *f)
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
	resync_pump(r);
}

void resync_acked(struct repl *r, const struct wire_frame *f)
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
	primary_in_sync(r);
}
