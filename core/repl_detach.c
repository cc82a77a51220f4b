/* Local disk errors on the primary (SPEC 6, on_io_error=detach): the disk of a volume is given up, its I/O goes through
 * the peer, and `resync` rebuilds it from there.
 *
 *   in sync, a local write, read or sync fails
 *     → DETACH: a barrier of the stream, with a new generation. The peer syncs what came before, and records generation
 *       and volume in one write. Until it says `flushed` the volume's requests wait, parked, with their claims.
 *     → `stale`: this disk is not current. Recorded here too before the first request is answered, if the store can
 *       still be written. Where it can't, the old generation stays in this host's record, which is in the peer's past:
 *       the next handshake tells it (LINEAGE_DETACHED), and should it write alone first, that is a split brain.
 *
 * So no answer is given through the peer before the peer has it durably that this disk is behind; and at that moment
 * the peer has everything, as only a pair in sync detaches. A stale volume therefore has no dirty regions, and nothing
 * of it is ever synced from here. A session that ends before the peer's word undoes the detach: what had failed is
 * answered EIO, the region is dirty, and the pending generation goes in below the next one that is begun here, so that
 * a peer which did record it is found behind and not beside.
 *
 * Before the pair is in sync nothing is detached (docs/adr/0009): an error is the guest's. Only a read that fails is
 * the peer's to answer, where that has the range; this needs no record, as the disk here stays the current one.
 *
 * A stale volume's write is sent under its claim, as any other, and completes when the peer has applied it; a flush of
 * the group when the peer has flushed; a read is a READ_REQ behind all that was sent before. A lost peer is EIO: at
 * once for a write that was sent, after peer_timeout for what had not been sent and for reads; and for the flushes
 * under way, or the next one, if the peer had not flushed what it had applied.
 *
 * The rebuild: the disks are opened anew (which lifts what a failed sync left), the start is recorded, then region by
 * region, each under an exclusive claim, is read from the peer and written here. A guest's write to regions that are
 * done goes to both, one that touches others to the peer only, and its regions are copied after it. At the end: disks
 * synced → ATTACH, the peer forgets the detach → this record forgets it. A cut between the two leaves it in this
 * record, from where the next JOIN tells the peer again. What is copied is not remembered over a restart: it begins
 * anew by itself.
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

enum attach_phase { ATTACH_NONE, ATTACH_SYNC, ATTACH_TOLD, ATTACH_SAVE };

static uint64_t mask_of(uint32_t volume)
{
	return UINT64_C(1) << volume;
}

bool detach_of(const struct repl *r, uint32_t volume)
{
	return (r->stale & mask_of(volume)) != 0;
}

bool detach_any(const struct repl *r)
{
	return (r->stale | r->detaching) != 0;
}

bool detach_ending(const struct repl *r)
{
	return r->attach_phase >= ATTACH_TOLD && r->detaching == 0;
}

uint64_t repl_detached(const struct repl *r)
{
	return r->stale | r->detaching;
}

uint64_t repl_unsynced(const struct repl *r)
{
	return r->stale & ~r->rebuild;
}

/* The peer can be asked: it knows of every detach there is. */
static bool ready(const struct repl *r)
{
	return primary_forwarding(r) && r->detaching == 0 && !r->detach_saving;
}

/* The peer may come back, or say its word. */
static bool worth_waiting(const struct repl *r)
{
	return r->meta->role == ROLE_PRIMARY && r->meta->state == STATE_RUNNING && !r->meta->split_brain &&
	       !r->shutdown;
}

/* The record does not know of a disk that is not current. */
static bool unrecorded(const struct repl *r)
{
	uint64_t recorded = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		recorded |= r->meta->volumes[i].flags & VOLUME_STALE ? mask_of(i) : 0;
	return (r->stale & ~recorded) != 0;
}

static struct range regions_of(const struct repl_io *io)
{
	uint64_t first = io->off >> REGION_SHIFT, last = (io->off + io->len - 1) >> REGION_SHIFT;
	return (struct range){first, last - first + 1};
}

static void maps_clear(struct repl_volume_state *v)
{
	bitmap_clear_all(&v->dirty);
	bitmap_clear_all(&v->touched);
	bitmap_clear_all(&v->cycle);
}

/* A stale volume has nothing that the peer lacks. */
void detach_clear_maps(struct repl *r, uint64_t volumes)
{
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		if (!(volumes & mask_of(i)))
			continue;
		maps_clear(&r->vol[i]);
		if (!(r->rebuild & mask_of(i)))
			bitmap_clear_all(&r->vol[i].todo);
	}
}

/* These are rebuilt from now on; others go on where they are. */
static void rebuild_add(struct repl *r, uint64_t volumes)
{
	if (r->rebuild == 0) {
		r->rb_total = 0;
		r->rb_started_ns = r->now_ns;
	}
	r->rebuild |= volumes;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		if (!(volumes & mask_of(i)))
			continue;
		bitmap_set_range(&v->todo, 0, v->todo.nbits);
		r->rb_total += v->todo.nbits << REGION_SHIFT;
	}
}

void detach_init(struct repl *r)
{
	uint64_t rebuild = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes && r->meta->role != ROLE_SECONDARY; i++) {
		unsigned flags = r->meta->volumes[i].flags;
		r->stale |= flags & VOLUME_STALE ? mask_of(i) : 0;
		rebuild |= flags & VOLUME_REBUILD ? mask_of(i) : 0;
	}
	rebuild_add(r, rebuild);
	r->reopen_io.internal = r->attach_io.internal = true;
	for (unsigned i = 0; i < REBUILDS_MAX; i++)
		r->rb[i].internal = true;
}

static void rebuild_pump(struct repl *r);

/* ---- a detach begins ---- */

static void rebuild_stop(struct repl *r, uint32_t volume, int error);

static bool is_disk_error(int error)
{
	return error != -ERR_NOMEM && error != -ERR_CANCELED && error != -ERR_RANGE;
}

static void detach_begin(struct repl *r, uint32_t volume)
{
	/* What it has under way for a repair reads a disk that will not be current. */
	verify_end(r, -ERR_STATE, "a local disk was detached");
	r->stop_wanted = false; /* the peer hears of the detach, and answers it */
	r->detaching |= mask_of(volume);
	if (!r->lineage_pending)
		r->detach_lineage = r->meta->lineage;
	r->lineage_pending = true;
	lineage_begin(&r->detach_lineage, repl_random(r));
	struct wbuf w = {.data = r->scratch, .size = sizeof(r->scratch)};
	wire_lineage_encode(&r->detach_lineage, &w);
	struct repl_action a = {.type = ACT_SEND, .data = w.data, .data_len = (uint32_t)w.len};
	a.frame.type = WIRE_DETACH;
	a.frame.seq = r->detach_seq = ++r->seq;
	a.frame.volume = r->meta->volumes[volume].id;
	a.frame.length_payload = a.data_len;
	r->last_was_flush = false;
	repl_emit(r, &a);
}

/* A stale disk's rebuild ends. What the peer was told, and the record may say by now, is that it is whole: only another
 * detach takes that back. */
static void rebuild_failed(struct repl *r, uint32_t volume, int error)
{
	bool told = r->attach_phase >= ATTACH_TOLD && primary_live(r);
	rebuild_stop(r, volume, error);
	if (told && r->link == LINK_SYNCED)
		detach_begin(r, volume);
	else if (told) /* the next JOIN says so */
		session_close(r, false);
}

bool detach_failed(struct repl *r, uint32_t volume, const struct repl_io *io, int error)
{
	const char *name = r->meta->volumes[volume].name;
	if (detach_of(r, volume)) {
		if (r->rebuild & mask_of(volume))
			rebuild_failed(r, volume, error);
		return true;
	}
	if (r->detaching & mask_of(volume))
		return true;
	if (r->meta->settings.on_io_error != ON_IO_ERROR_DETACH || !is_disk_error(error) || !primary_live(r) ||
	    r->link != LINK_SYNCED || r->stopping)
		return false;
	const char *operation = io == NULL		      ? "flush"
				: io->kind == REPL_READ	      ? "read"
				: io->target == TARGET_INTENT ? "intent"
							      : "write";
	repl_set_error(r, error, operation, (int)volume, io ? io->off : 0, io ? io->len : 0,
		       "a local %s of %s failed: %s; the disk is detached, its I/O goes to the peer", operation, name,
		       err_short(error));
	detach_begin(r, volume);
	return true;
}

bool detach_flush_failed(struct repl *r, uint64_t failed, int error)
{
	bool all = failed != 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		if (!(failed & mask_of(i)))
			continue;
		if (detach_failed(r, i, NULL, error))
			continue;
		all = false;
		repl_set_error(r, error, "flush", (int)i, 0, 0, "a local flush of %s failed: %s",
			       r->meta->volumes[i].name, err_short(error));
	}
	return all;
}

/* The peer's word is durable. */
void detach_acked(struct repl *r)
{
	rebuild_pump(r); /* it may wait for its barrier */
	if (r->detaching && r->flushed >= r->detach_seq) {
		r->stale |= r->detaching;
		detach_clear_maps(r, r->detaching);
		r->detaching = 0;
		lineage_in_sync(&r->detach_lineage);
		r->detach_saving = true;
		if (!repl_tx_queued(r, TX_DETACH)) /* it takes what there is by then */
			repl_tx(r, TX_DETACH);
	}
	if (r->attach_phase == ATTACH_TOLD && r->flushed >= r->attach_seq) {
		r->attach_phase = ATTACH_SAVE;
		repl_tx(r, TX_ATTACH);
	}
}

void detach_flags(const struct repl *r, struct repl_volume *v, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		v[i].flags &= (uint8_t) ~(VOLUME_STALE | VOLUME_REBUILD | VOLUME_PEER_STALE);
		v[i].flags |= (uint8_t)((r->stale & mask_of(i) ? VOLUME_STALE : 0U) |
					(r->rebuild & mask_of(i) ? VOLUME_REBUILD : 0U));
	}
}

bool detach_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	switch (t->kind) {
	case TX_DETACH:
		if (m->role != ROLE_PRIMARY) /* what it knew went into the record that ended this */
			return false;
		if (r->lineage_pending)
			m->lineage = r->detach_lineage;
		detach_flags(r, m->volumes, m->n_volumes);
		return true;
	case TX_REBUILD: /* of the disks that were opened anew, not of one that has failed since */
		t->arg &= r->stale;
		for (uint32_t i = 0; i < m->n_volumes; i++)
			if (t->arg & mask_of(i))
				m->volumes[i].flags |= VOLUME_STALE | VOLUME_REBUILD;
		return t->arg != 0;
	case TX_ATTACH:
		for (uint32_t i = 0; i < m->n_volumes; i++)
			if (r->rebuild & mask_of(i))
				m->volumes[i].flags = 0;
		return true;
	default:
		UNREACHABLE();
	}
}

/* ---- requests ---- */

void detach_park(struct repl *r, struct repl_io *io)
{
	if (!io->tried && !io->parked && io->kind != REPL_READ && io->kind != REPL_FLUSH)
		r->writes_in_flight--;
	io->parked = true;
	if (!worth_waiting(r)) {
		repl_io_finish(r, io, -ERR_IO);
		return;
	}
	io->phase = PHASE_PARKED;
	list_push(&r->parked, io);
}

void detach_send_read(struct repl *r, struct repl_io *io)
{
	struct repl_action a = {.type = ACT_SEND};
	io->phase = PHASE_REMOTE;
	io->session = r->session;
	io->seq = ++r->read_token;
	a.frame.type = WIRE_READ_REQ;
	a.frame.seq = io->seq;
	a.frame.volume = r->meta->volumes[io->volume].id;
	a.frame.offset = io->off;
	a.frame.length = io->len;
	if (r->reads.head == NULL && r->seq == r->applied)
		r->progress_ns = r->now_ns;
	repl_emit(r, &a);
	list_push(&r->reads, io);
}

static bool any_todo(const struct repl *r, const struct repl_io *io)
{
	struct range n = regions_of(io);
	return bitmap_any(&r->vol[io->volume].todo, n.off, n.len);
}

/* A write, zero, discard or read whose claim is granted, or whose local part is done. False: the local disk takes it.
 */
bool detach_route(struct repl *r, struct repl_io *io)
{
	if (!(repl_detached(r) & mask_of(io->volume)))
		return false;
	if (!ready(r)) {
		detach_park(r, io);
		return true;
	}
	if (io->kind == REPL_READ) {
		repl_release_claim(r, io); /* its place in the stream is taken with the frame */
		detach_send_read(r, io);
		return true;
	}
	bool rebuilding = (r->rebuild & mask_of(io->volume)) != 0;
	if (rebuilding && !any_todo(r, io))
		return false;
	if (rebuilding) {
		/* The copy that comes after it takes it along; also of the regions that were done. */
		struct range n = regions_of(io);
		bitmap_set_range(&r->vol[io->volume].todo, n.off, n.len);
		bitmap_set_range(&r->vol[io->volume].touched, n.off, n.len); /* until it is durable there */
	}
	if (!io->tried && !io->parked)
		r->writes_in_flight--;
	io->parked = true;
	primary_send_write(r, io);
	return true;
}

/* The peer's disk holds what a read of this range has to return, once all that was sent is applied there. While nothing
 * is forwarded that is what is clean; else what is neither still to be sent nor hashed without an answer: a write to
 * such a region is sent before its claim ends, which the read has waited for. */
static bool peer_has(const struct repl *r, const struct repl_io *io)
{
	const struct repl_volume_state *v = &r->vol[io->volume];
	struct range n = regions_of(io);
	if (r->behind)
		return !bitmap_any(&v->dirty, n.off, n.len);
	return !bitmap_any(&v->todo, n.off, n.len) && !resync_unanswered(r, io);
}

bool detach_read_failed(struct repl *r, struct repl_io *io, int error)
{
	if (detach_failed(r, io->volume, io, error) && detach_route(r, io))
		return true;
	if (r->meta->settings.on_io_error != ON_IO_ERROR_DETACH || !is_disk_error(error) || !primary_live(r) ||
	    !peer_has(r, io))
		return false;
	repl_set_error(r, error, "read", (int)io->volume, io->off, io->len,
		       "a local read of %s failed: %s; the peer's copy of the range is read",
		       r->meta->volumes[io->volume].name, err_short(error));
	repl_release_claim(r, io);
	detach_send_read(r, io);
	return true;
}

bool detach_flush(struct repl *r, struct repl_io *io)
{
	if (r->unflushed_untold || (r->unflushed_ns && io->asked_ns <= r->unflushed_ns)) {
		/* One that came before the last of those writes was answered tells nothing to who waited for that. */
		if (io->asked_ns > r->strict_ns)
			r->unflushed_untold = false;
		repl_set_error(r, ERR_PEER, "flush", -1, 0, 0,
			       "the peer was lost with writes of a detached disk that it had not flushed; if it lost "
			       "power, they are gone: the flush is answered with an error");
		repl_complete(r, io, -ERR_IO);
		return true;
	}
	if (!detach_any(r))
		return false;
	io->strict = true;
	if (ready(r))
		return false;
	detach_park(r, io);
	return true;
}

static void redo(struct repl *r, struct repl_io *io)
{
	if (io->kind == REPL_FLUSH) {
		io->strict = false;
		primary_flush_start(r, io);
		return;
	}
	if (io->kind != REPL_READ && (repl_detached(r) & mask_of(io->volume)) == 0 && !io->tried) {
		r->writes_in_flight++; /* to the local disk after all */
		io->parked = false;
	}
	if (io->kind == REPL_READ && !io->claim.added) { /* it had been sent: a new place in the order */
		io->phase = PHASE_CLAIM;
		if (reqset_add(&r->claims, &io->claim))
			repl_io_granted(r, io);
	} else if (io->tried && io->kind == REPL_READ && !(repl_detached(r) & mask_of(io->volume))) {
		repl_io_finish(r, io, io->error);
	} else if (!io->tried) {
		repl_io_granted(r, io);
	} else if (!detach_route(r, io)) {
		primary_local_done(r, io);
	}
}

void detach_resume(struct repl *r)
{
	for (uint64_t n = r->parked.count; n && r->parked.head; n--)
		redo(r, list_pop(&r->parked));
}

/* Those that were issued at or before `since_ns`. */
static void fail_parked(struct repl *r, uint64_t since_ns)
{
	for (uint64_t n = r->parked.count; n && r->parked.head; n--) {
		struct repl_io *io = list_pop(&r->parked);
		if (io->start_ns > since_ns) {
			list_push(&r->parked, io);
			continue;
		}
		repl_set_error(r, ERR_PEER, "peer", io->kind == REPL_FLUSH ? -1 : (int)io->volume, io->off, io->len,
			       "the peer is lost and a local disk is detached: I/O is answered with an error");
		repl_io_finish(r, io, -ERR_IO);
	}
}

/* ---- sessions ---- */

/* Source, before the start of a session: what the peer's JOIN says of detached disks. */
void detach_learn(struct repl *r, enum lineage_decision d)
{
	const struct wire_join *j = &r->theirs;
	for (uint32_t k = 0; k < j->n_volumes; k++) {
		int i = repl_meta_find_volume(r->meta, j->volumes[k].name);
		if (i < 0)
			continue;
		/* The peer's newest generation was begun for a detach, and is this host's too, or ahead of it. */
		if ((j->volumes[k].flags & VOLUME_PEER_STALE) && (d == LINEAGE_EQUAL || d == LINEAGE_DETACHED))
			r->stale |= mask_of((uint32_t)i);
		/* The disk of the target itself is that of an old primary, without what went through its peer. Its own
		 * record says so until the end of the sync: the intent bits come with the union's. */
		if (j->volumes[k].flags & VOLUME_STALE) {
			bitmap_set_range(&r->vol[i].dirty, 0, r->vol[i].dirty.nbits);
			r->dirty_unsaved = true;
		}
	}
}

static void rebuild_ended(struct repl *r, struct repl_io *io, bool copied)
{
	struct range n = regions_of(io);
	struct repl_volume_state *v = &r->vol[io->volume];
	if (!copied && (r->rebuild & mask_of(io->volume)))
		bitmap_set_range(&v->todo, n.off, n.len);
	/* What had gone to both before it was to be copied again: a clear cycle may have passed it over meanwhile. */
	for (uint64_t b = n.off; copied && b < n.off + n.len; b++)
		if (bitmap_test(&v->dirty, b))
			bitmap_set(&v->touched, b);
	r->rb_busy[io - r->rb] = false;
	repl_release_claim(r, io);
}

void detach_session_lost(struct repl *r)
{
	/* Answered when they were applied there: a peer that lost power has lost them, and this host has no copy. It
	 * can't tell that from a cut, so the guest hears of both, as of any cache that failed [I10]. */
	if (r->flushed < r->strict_seq) {
		r->unflushed_untold = true;
		r->unflushed_ns = r->now_ns;
	}
	r->detaching = 0;
	if (r->attach_phase == ATTACH_TOLD)
		r->attach_phase = ATTACH_NONE;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		if (!(r->rebuild & mask_of(i)))
			continue;
		/* What went to both may not have reached the peer, which is what counts. What went to it and was not
		 * flushed there goes with its power, also what was copied from it. */
		bitmap_or(&v->todo, &v->dirty);
		bitmap_or(&v->todo, &v->touched);
		bitmap_or(&v->todo, &v->cycle);
	}
	for (uint64_t n = r->reads.count; n; n--) {
		struct repl_io *io = list_pop(&r->reads);
		if (io->verify)
			verify_read_lost(r, io);
		else if (io->internal)
			rebuild_ended(r, io, false);
		else
			detach_park(r, io);
	}
	detach_resume(r);
}

/* Not the primary any more: its disks are what they are, the record remembers which are stale. */
void detach_role_lost(struct repl *r)
{
	/* First, so that what waits for the claims of those is parked too, and not carried out on a disk that lacks
	 * what the peer had. */
	while (r->parked.head)
		fail_parked(r, UINT64_MAX);
	r->stale = r->rebuild = 0;
	r->lineage_pending = false; /* what is begun here from now on lies above what it follows by then */
	r->unflushed_untold = false;
	if (r->attach_phase != ATTACH_SYNC) /* its end does that: until then no other begins */
		r->attach_phase = ATTACH_NONE;
}

void detach_shutdown(struct repl *r)
{
	fail_parked(r, UINT64_MAX);
}

/* ---- the rebuild ---- */

void detach_resync(struct repl *r, struct repl_command *c)
{
	if (r->meta->role != ROLE_PRIMARY)
		repl_command_done(r, c, -ERR_STATE,
				  "this host is %s for it; run it on the primary whose disk is detached",
				  role_name(r->meta->role));
	else if (!detach_any(r))
		repl_command_done(
		    r, c, -ERR_STATE,
		    "no disk of it is detached: there is nothing to rebuild (what is dirty is synced by itself)");
	else if (r->link == LINK_DOWN || r->link == LINK_HANDSHAKE)
		repl_command_done(r, c, -ERR_PEER, "the peer is not connected; the disk is rebuilt from it");
	else if (r->link != LINK_SYNCED)
		repl_command_done(r, c, -ERR_STATE, "the link is %s, not SYNCED; give it again when it is",
				  link_state_name(r->link));
	else if (!ready(r) || unrecorded(r)) /* with its generation: the record of the rebuild knows none */
		repl_command_done(r, c, -ERR_BUSY, "the detach is still being recorded; give it again in a moment");
	else if (r->reopening || r->rebuilding)
		repl_command_done(r, c, -ERR_BUSY, "another resync is about to begin");
	else if (r->stale == r->rebuild)
		repl_command_done(r, c, 0, " "); /* under way already */
	else if (r->attach_phase != ATTACH_NONE)
		repl_command_done(r, c, -ERR_BUSY,
				  "the end of another disk's rebuild is being recorded; give it again in a moment");
	else {
		r->rebuilding = c;
		r->reopening = true;
		r->reopen_io.kind = REPL_REOPEN;
		r->reopen_io.arg = r->stale & ~r->rebuild;
		repl_submit(r, &r->reopen_io, TARGET_OWN);
	}
}

static void rebuild_refused(struct repl *r, int error, const char *what)
{
	struct repl_command *c = r->rebuilding;
	r->rebuilding = NULL;
	repl_command_done(r, c, error, "%s: %s; the disk has to accept I/O again before it can be rebuilt", what,
			  err_short(error));
}

static void rebuild_stop(struct repl *r, uint32_t volume, int error)
{
	r->rebuild &= ~mask_of(volume);
	r->rb_total -= r->vol[volume].todo.nbits << REGION_SHIFT;
	maps_clear(&r->vol[volume]); /* what went to both went to the peer: it lacks nothing */
	bitmap_clear_all(&r->vol[volume].todo);
	r->error.code = 0; /* what it was detached for is known: what keeps it so is the news */
	repl_set_error(r, error, "resync", (int)volume, 0, 0,
		       "rebuilding the disk of %s failed: %s; `resync` again when it is mended",
		       r->meta->volumes[volume].name, err_short(error));
}

static bool rebuild_next(struct repl *r, struct repl_io *io)
{
	for (unsigned turn = 0; turn < 2; turn++, r->rb_vol = 0, r->rb_off = 0) {
		for (; r->rb_vol < r->meta->n_volumes; r->rb_vol++, r->rb_off = 0) {
			struct range run;
			if (!(r->rebuild & mask_of(r->rb_vol)) || !repl_todo_next(r, r->rb_vol, r->rb_off, &run))
				continue;
			io->volume = r->rb_vol;
			io->off = run.off;
			io->len = min_u64(run.len, RESYNC_READ_MAX);
			r->rb_off = io->off + io->len;
			return true;
		}
	}
	return false;
}

static bool rebuild_idle(const struct repl *r)
{
	for (unsigned i = 0; i < REBUILDS_MAX; i++)
		if (r->rb_busy[i])
			return false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		if ((r->rebuild & mask_of(i)) && r->vol[i].todo.count)
			return false;
	return true;
}

static void rebuild_pump(struct repl *r)
{
	if (r->rebuild == 0 || r->link != LINK_SYNCED || !ready(r) || r->attach_phase != ATTACH_NONE || r->shutdown)
		return;
	/* What was sent to it before is in no map: it is made durable there before any of it is copied. (What came in
	 * an earlier session is since the RESYNC_DONE of this one.) */
	if (r->rb_session != r->session) {
		r->rb_session = r->session;
		r->rb_flushed = r->flushed < r->seq ? primary_barrier(r) : r->flushed;
	}
	if (r->flushed < r->rb_flushed)
		return;
	uint64_t rate = r->meta->settings.resync_rate;
	for (unsigned i = 0; i < REBUILDS_MAX; i++) {
		struct repl_io *io = &r->rb[i];
		if (rate && r->now_ns < r->rs_allow_ns)
			return;
		if (r->rb_busy[i])
			continue;
		if (!rebuild_next(r, io))
			break;
		if (rate)
			r->rs_allow_ns = max_u64(r->rs_allow_ns, r->now_ns) + io->len * UINT64_C(1000000000) / rate;
		io->kind = REPL_REBUILD;
		/* A write that is before it in the claims may go to both from now on: it is before the read, too. */
		struct range n = regions_of(io);
		bitmap_clear_range(&r->vol[io->volume].todo, n.off, n.len);
		repl_claim_blocks(io);
		r->rb_busy[i] = true;
		if (reqset_add(&r->claims, &io->claim))
			detach_rebuild_granted(r, io);
	}
	/* What `rebuild` holds is what the peer and the record will be told: until then no other disk joins it. */
	if (!rebuild_idle(r) || r->reopening || r->rebuilding)
		return;
	r->attach_phase = ATTACH_SYNC;
	r->attach_io.kind = REPL_FLUSH;
	r->attach_io.failed = 0;
	repl_submit(r, &r->attach_io, TARGET_DISK);
}

void detach_rebuild_granted(struct repl *r, struct repl_io *io)
{
	if (!ready(r) || !(r->rebuild & mask_of(io->volume)))
		rebuild_ended(r, io, false);
	else
		detach_send_read(r, io);
}

static void rebuild_done(struct repl *r, struct repl_io *io, int error)
{
	if (error && (r->rebuild & mask_of(io->volume)))
		rebuild_stop(r, io->volume, error);
	rebuild_ended(r, io, !error);
	rebuild_pump(r);
}

static void attach_synced(struct repl *r, int error)
{
	r->attach_phase = ATTACH_NONE;
	if (error) {
		(void)detach_flush_failed(r, r->attach_io.failed, error);
		return;
	}
	if (!rebuild_idle(r) || !ready(r) || r->link != LINK_SYNCED || r->rebuild == 0)
		return; /* the tick comes again */
	r->attach_phase = ATTACH_TOLD;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		if (!(r->rebuild & mask_of(i)))
			continue;
		struct repl_action a = {.type = ACT_SEND};
		a.frame.type = WIRE_ATTACH;
		a.frame.seq = r->attach_seq = ++r->seq;
		a.frame.volume = r->meta->volumes[i].id;
		r->last_was_flush = false;
		repl_emit(r, &a);
	}
}

void detach_internal_done(struct repl *r, struct repl_io *io, int error)
{
	if (io == &r->attach_io) {
		attach_synced(r, error);
	} else if (io == &r->reopen_io) {
		r->reopening = false;
		if (error)
			rebuild_refused(r, error, "the local disk could not be opened");
		else
			repl_tx(r, TX_REBUILD)->arg = r->reopen_io.arg;
	} else {
		rebuild_done(r, io, error);
	}
}

void detach_tx_done(struct repl *r, struct tx *t, int error)
{
	switch (t->kind) {
	case TX_DETACH:
		r->detach_saving = repl_tx_pending(r, TX_DETACH); /* another disk's */
		if (error)
			r->detach_retry_ns = r->now_ns + RESAVE_NS;
		detach_resume(r);
		return;
	case TX_REBUILD:
		if (error) {
			rebuild_refused(r, error, "the start of the rebuild could not be recorded here");
			return;
		}
		r->rb_session = 0;
		rebuild_add(r, t->arg & r->stale);
		repl_log(r, 2, "rebuilding the detached disks from the peer");
		struct repl_command *c = r->rebuilding;
		r->rebuilding = NULL;
		repl_command_done(r, c, 0, " ");
		rebuild_pump(r);
		return;
	case TX_ATTACH:
		for (uint32_t i = 0; error && i < r->meta->n_volumes; i++)
			if (r->rebuild & mask_of(i))
				rebuild_failed(r, i, error);
		r->attach_phase = ATTACH_NONE;
		if (r->rebuild == 0) /* they failed meanwhile, and are being detached anew */
			return;
		r->stale &= ~r->rebuild;
		r->rebuild = 0;
		/* What was answered before the ATTACH is flushed there, what came after went to both. */
		if (r->stale == 0)
			r->strict_seq = 0;
		r->error.code = 0;
		repl_log(r, 2, "the detached disks are whole again");
		repl_emit(r, &(struct repl_action){.type = ACT_SERVING, .meta = r->meta});
		detach_resume(r); /* what came while the pair had fallen behind needs no peer any more */
		return;
	default:
		UNREACHABLE();
	}
}

/* ---- the peer's answers ---- */

void detach_read_reply(struct repl *r, const struct repl_event *ev)
{
	const struct wire_frame *f = ev->frame;
	struct repl_io *io = r->reads.head;
	while (io && io->seq != f->seq)
		io = io->next;
	if (io == NULL || f->offset != io->off || f->length != io->len) {
		session_protocol_error(r, "READ_REPLY that was not asked for");
		return;
	}
	r->progress_ns = r->now_ns;
	bool zero = (f->flags & WIRE_READ_ZERO) != 0;
	struct repl_action a = {.type = ACT_SUBMIT, .io = io, .data = zero ? NULL : ev->payload};
	a.data_len = zero ? 0 : f->length_payload;
	list_remove(io);
	if (io->verify) {
		verify_read_reply(r, io, f->flags & WIRE_READ_ERROR ? -ERR_IO : 0, a.data, a.data_len);
		return;
	}
	if (f->flags & WIRE_READ_ERROR) {
		struct wire_refuse x = {.code = ERR_IO};
		(void)wire_refuse_decode(&x, ev->payload, f->length_payload, NULL);
		repl_set_error(r, x.code, "read", (int)io->volume, io->off, io->len,
			       "the peer could not read %s for its detached primary: %.*s",
			       r->meta->volumes[io->volume].name, WIRE_TEXT_MAX, x.text);
		if (io->internal)
			rebuild_done(r, io, -(int)x.code);
		else
			repl_complete(r, io, -ERR_IO);
		return;
	}
	if (io->internal && !(r->rebuild & mask_of(io->volume))) {
		rebuild_ended(r, io, false);
		return;
	}
	if (io->internal) {
		io->target = TARGET_OWN;
		repl_emit(r, &a);
		return;
	}
	io->phase = PHASE_NONE;
	a.type = ACT_COMPLETE;
	a.answered = true;
	repl_emit(r, &a);
}

/* A store that could not be written may be written again, and then this host should know of the detach though it
 * restarts without its peer: its guests would read what was there before, and be a split brain with their first write.
 */
static void record_late(struct repl *r)
{
	if (!unrecorded(r) || r->detaching || r->detach_saving || r->now_ns < r->detach_retry_ns || r->unsure ||
	    repl_tx_pending(r, TX_DETACH) || repl_tx_pending(r, TX_ATTACH))
		return;
	repl_tx(r, TX_DETACH);
}

void detach_tick(struct repl *r)
{
	record_late(r);
	if (!worth_waiting(r))
		fail_parked(r, UINT64_MAX);
	else if (!primary_live(r) && r->parked.head) {
		uint64_t timeout = r->meta->settings.peer_timeout_ms * UINT64_C(1000000);
		fail_parked(r, r->now_ns - min_u64(r->now_ns, timeout));
	}
	rebuild_pump(r);
}
