/* Failover, and its commit.
 *
 * End of the stream → what was received is applied → every block of undo(base) .. live and active is durably dirty
 * [FOBITS] → the disks are synced [FOFLUSH] → one metadata write: generation [FOGEN], target, state, local checkpoint
 * of the disk as received [FOTARGET, FOKEEP] → answered. The way back is written in the background, as ordinary writes
 * of the new epoch, region by region under exclusive claims; a guest's write to active puts its regions back into
 * `todo`, and after the first pass guests' writes are let in at half the commit's pace, so that it ends under any load.
 * When `todo` is empty the disks are synced; then requests wait, the little that came meanwhile is written and synced,
 * one metadata write: DONE.
 */
#include "core/repl_internal.h"

#include "core/check.h"

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
	int i = to == FAILOVER_LATEST ? 0 : repl_meta_find_ckpt(m, to);
	if (to != FAILOVER_LATEST && (i < 0 || !repl_shows_ckpt(r, (uint32_t)i))) {
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

void failover_begin(struct repl *r, struct repl_command *c)
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
	if (r->taking) {
		repl_command_done(r, c, -ERR_BUSY, "a switchover to this host is under way");
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
	failover_go(r);
}

/* Goes on when all that was received is applied and no write to active is under way. A merge, which may take long, is
 * not waited for: images stay what they are beside it, and what it was for comes to nothing (history_merged). */
void failover_go(struct repl *r)
{
	if (!r->failing_over || !secondary_quiet(r) || r->writes_in_flight || r->mark_busy || r->marked ||
	    r->clear_busy || r->sync_busy || r->union_busy || r->saving || r->tx_count)
		return;
	/* What was received may have ended in a checkpoint, or in the end of a resync: what is asked for is looked at
	 * again. */
	if (outcome(r, r->failover, &r->failover_outcome) < 0) {
		r->failover = NULL;
		r->failing_over = false;
		repl_gate_run(r);
		return;
	}
	/* A disk that was detached lacks what went through the peer, which stands in nobody's dirty set. By force it is
	 * taken as it is, and the record forgets what it was: so all of it may differ. */
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		if (!(r->meta->volumes[i].flags & VOLUME_STALE))
			continue;
		bitmap_set_range(&v->dirty, 0, v->dirty.nbits);
		bitmap_set_range(&v->marking, 0, v->marking.nbits);
	}
	/* From the older of the target and the base: what differs from the primary, and what has to go back. */
	uint64_t to = r->failover_outcome, base = r->meta->base;
	r->mark_busy = true;
	r->mark_io.kind = REPL_MARK;
	r->mark_io.arg = to == FAILOVER_LATEST ? base : base && base < to ? base : to;
	repl_submit(r, &r->mark_io, TARGET_OWN);
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

static void commit_failed(struct repl *r, const struct repl_io *io, int error);

static void failover_failed(struct repl *r, int error, const char *matter)
{
	repl_set_error(r, error, "failover", -1, 0, 0, "%s: %s", matter, err_short(error));
	repl_command_done(r, failover_undo(r), error, "%s: %s; nothing was changed, look at the disk under the store",
			  matter, err_short(error));
}

/* What was received waits for the record, so one that waits for that would not be answered. One that has come further
 * has its own end. */
void failover_unsure(struct repl *r, int error)
{
	if (r->failing_over && r->unsure_holds && r->held.head)
		failover_failed(r, error, "the group's record could not be saved");
}

void failover_marked(struct repl *r, int error)
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
		failover_commit_start(r);
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

static void failover_save(struct repl *r, int error)
{
	if (error) {
		failover_failed(r, error, "the disk as received could not be flushed");
		return;
	}
	struct tx *t = repl_tx(r, TX_FAILOVER);
	/* What was received since the target: the shell counted it while marking. */
	t->arg = r->mark_io.ext_len;
}

void failover_synced(struct repl *r, int error)
{
	if (r->failing_over) {
		failover_save(r, error);
	} else if (error) {
		commit_failed(r, NULL, error);
	} else if (r->finalising) {
		repl_tx(r, TX_COMMITTED);
	} else {
		r->presynced = r->throttled = true;
		failover_commit_pump(r);
	}
}

/* ---- its record ---- */

static bool prepare_failover(struct repl *r, struct tx *t, struct repl_meta *m)
{
	uint64_t to = r->failover_outcome;
	bool latest = to == FAILOVER_LATEST, other = to != m->base;
	bool room = history_make_room(r, t, m, CKPTS_LAST);
	/* Nothing received is thrown away; `latest` keeps it on the disk. */
	if (!room && !latest)
		return false;
	t->opened = 0;
	if (m->n_ckpts && room) {
		t->opened = m->ckpt_max + 1;
		history_add(r, m, t->opened, m->inconsistent ? CKPT_PARTIAL : CKPT_LOCAL, CKPT_PINNED);
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
		m->ckpts[repl_meta_find_ckpt(m, to)].flags &= (uint8_t)~CKPT_JOB; /* the disks are synced by now */
	}
	/* A former primary has no active overlay yet. Over another base it is empty or given up, but its files may hold
	 * what a failed write has left. */
	if (latest || other || m->active_id == 0 || (r->failover && (r->failover->flags & FAILOVER_DISCARD_ACTIVE)))
		secondary_fresh_active(t, m);
	repl_begin_generation(r, m);
	m->failover_generation = m->lineage.current;
	m->has_peer = true;
	m->inconsistent = m->fresh = m->shut_out = m->broken = m->own_dirty = m->handed = m->switched = false;
	m->sync_from = 0;
	m->kept = 0;
	for (uint32_t i = 0; i < m->n_volumes; i++)
		m->volumes[i].flags = 0;
	return true;
}

static void failed_over(struct repl *r, int error)
{
	if (error == -ERR_CANCELED) {
		repl_command_done(r, failover_undo(r), -ERR_LIMIT,
				  CKPTS_FULL_TEXT ". What was received could not be kept as one; `--to latest` goes "
						  "without; nothing was changed");
		repl_gate_run(r);
		return;
	}
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
	if (m->state == STATE_FAILOVER) {
		failover_commit_start(r);
		return;
	}
	for (uint32_t i = 0; i < m->n_volumes; i++)
		bitmap_clear_all(&r->vol[i].todo);
}

bool failover_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	switch (t->kind) {
	case TX_FAILOVER:
		return prepare_failover(r, t, m);
	case TX_COMMITTED:
		repl_state_move(m, STATE_DONE);
		m->base = 0;
		secondary_fresh_active(t, m);
		return true;
	case TX_COMMIT_FAILED:
		repl_state_move(m, STATE_FAILOVER_FAILED);
		return true;
	case TX_COMMIT_RETRY:
		repl_state_move(m, STATE_FAILOVER);
		return true;
	default:
		UNREACHABLE();
	}
}

void failover_tx_done(struct repl *r, struct tx *t, int error)
{
	switch (t->kind) {
	case TX_FAILOVER:
		failed_over(r, error);
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
			r->commit_stopped = false; /* now, or by the tick, when a clear of intent bits has ended */
			failover_commit_start(r);
		}
		if (t->kind == TX_COMMIT_FAILED && error)
			r->commit_stopped = false; /* not even that could be saved: the tick tries the commit again */
		repl_command_done(r, t->command, error, "the group's record could not be saved: %s", err_short(error));
		return;
	default:
		UNREACHABLE();
	}
}

/* ---- the commit ---- */

void failover_commit_start(struct repl *r)
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
	r->commit_total = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		r->commit_total += r->vol[i].todo.count << REGION_SHIFT;
	failover_commit_pump(r);
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
			struct range run;
			if (!repl_todo_next(r, r->commit_vol, r->commit_off, &run))
				continue;
			io->volume = r->commit_vol;
			io->off = run.off;
			io->len = min_u64(run.len, COMMIT_MAX);
			r->commit_off = io->off + io->len;
			r->throttled = r->throttled || turn > 0; /* behind the first pass: guests write it anew */
			return true;
		}
		r->commit_vol = 0;
		r->commit_off = 0;
	}
	return false;
}

void failover_commit_pump(struct repl *r)
{
	if (r->shutdown || !r->committing || r->commit_stopped || r->meta->state != STATE_FAILOVER ||
	    repl_tx_pending(r, TX_COMMITTED))
		return;
	struct repl_io *io;
	while ((io = commit_slot(r)) != NULL && commit_next(r, io)) {
		io->kind = REPL_COMMIT;
		io->phase = PHASE_CLAIM;
		repl_claim_blocks(io);
		/* Cleared before the commit reads: a write to active that comes later sets it again. */
		bitmap_clear_range(&r->vol[io->volume].todo, io->off >> REGION_SHIFT, units_of(io->len, REGION_SHIFT));
		r->commit_busy[io - r->commit] = true;
		if (reqset_add(&r->claims, &io->claim))
			failover_commit_granted(r, io);
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

void failover_commit_granted(struct repl *r, struct repl_io *io)
{
	io->phase = PHASE_IO;
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

void failover_commit_end(struct repl *r, struct repl_io *io, int error)
{
	r->commit_busy[io - r->commit] = false;
	io->phase = PHASE_NONE; /* it may have failed in PHASE_ROOM */
	repl_release_claim(r, io);
	if (error) {
		bitmap_set_range(&r->vol[io->volume].todo, io->off >> REGION_SHIFT, units_of(io->len, REGION_SHIFT));
		commit_failed(r, io, error);
		return;
	}
	r->admit = (unsigned)min_u64(r->admit + 1, 2 * COMMITS_MAX);
	failover_commit_pump(r);
}
