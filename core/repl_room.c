/* Room: what is given up when the old content of a block cannot be saved, or a write finds no room.
 *
 * Whose request it is decides what may go (SPEC 3, 7):
 *   a guest's, on its own disk  any checkpoint: room for history never fails its write
 *   the peer's stream           by on_cow_error: none (stop); unpinned ones that nothing needs (drop-history); all of
 *                               them and the view (break), unless the disk is inconsistent: then the checkpoint taken
 *                               before the resync is all there is to go back to
 *   a commit                    as the stream's under drop-history, else none: its failover stays and is tried again
 *
 * The request waits in PHASE_ROOM, with its claim, while one save of the record gives up what has to go. That save is
 * durable before the request is submitted again: an unsaved overwrite never comes before the record that says what it
 * spoils. Requests that fail together wait for the same save.
 *
 * Only ENOSPC gets better by dropping some. Where the live overlay itself cannot be written (EIO), nothing short of
 * giving up the whole chain lets the disk be written, so that is what a guest's write and `break` do, and
 * `drop-history` stops at once and keeps what there is.
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

/* What may go, as this host's role and settings are, for want of room (`full`) or after another error. */
static enum room_policy policy(const struct repl *r, bool full)
{
	const struct repl_meta *m = r->meta;
	if (m->n_ckpts == 0)
		return ROOM_NONE;
	if (repl_serving(m, false) == SERVING_DISK)
		return full ? ROOM_ANY : ROOM_ALL;
	switch ((enum on_cow_error)m->settings.on_cow_error) {
	case ON_COW_ERROR_DROP_HISTORY:
		return full ? ROOM_UNNEEDED : ROOM_NONE;
	case ON_COW_ERROR_BREAK:
		/* A failover that is under way goes back to what this would give up. */
		if (m->role != ROLE_SECONDARY || m->inconsistent ||
		    (r->failing_over && r->failover_outcome != FAILOVER_LATEST))
			return ROOM_NONE;
		return ROOM_BREAK;
	case ON_COW_ERROR_STOP:
		break;
	}
	return ROOM_NONE;
}

/* How dear a checkpoint is; those of one rank go oldest first. */
enum { RANK_UNPINNED, RANK_PINNED, RANK_HELD, RANK_PROTECTED, RANKS };

static unsigned rank_of(const struct repl *r, uint32_t i)
{
	const struct repl_meta *m = r->meta;
	if (history_protected(m, m->ckpts[i].number))
		return RANK_PROTECTED;
	if (hold_held(r, m, m->ckpts[i].number))
		return RANK_HELD;
	return m->ckpts[i].flags & CKPT_PINNED ? RANK_PINNED : RANK_UNPINNED;
}

/* The nth checkpoint that may go, in the order in which they go; 0: there is none. The live epoch's overlay can go only
 * when it is the last. */
static uint64_t candidate(const struct repl *r, enum room_policy p, uint32_t nth)
{
	const struct repl_meta *m = r->meta;
	unsigned ranks = p == ROOM_ANY ? RANKS : RANK_UNPINNED + 1;
	for (unsigned rank = 0; rank < ranks; rank++)
		for (uint32_t i = 0; i < m->n_ckpts; i++) {
			bool free = p == ROOM_ANY ? i + 1 < m->n_ckpts || i == 0 : !history_needed(m, i);
			if (free && rank_of(r, i) == rank && nth-- == 0)
				return m->ckpts[i].number;
		}
	return 0;
}

static void room_end(struct repl *r, bool made);

static void save_room(struct repl *r, uint64_t number)
{
	struct tx *t = repl_tx(r, TX_ROOM);
	t->arg = r->room_policy;
	t->number = number;
}

/* Goes on with the next that may go. The oldest one's blocks go with it; one in the middle is merged into its older
 * neighbour first, where that frees some and there is room for the copies, else its turn has passed. */
static void room_next(struct repl *r)
{
	if (r->room_policy == ROOM_ALL || r->room_policy == ROOM_BREAK) {
		save_room(r, 0);
		return;
	}
	uint64_t number = candidate(r, r->room_policy, r->room_tried);
	r->room_rank = number ? rank_of(r, (uint32_t)repl_meta_find_ckpt(r->meta, number)) : 0;
	if (number == 0) {
		room_end(r, false);
	} else if (number == r->meta->ckpts[0].number) {
		save_room(r, number);
	} else if (!r->merge_busy && !r->dropping) { /* else when that has ended */
		r->room_merging = true;
		history_merge(r, number, REPL_MERGE_FOR_ROOM);
	}
}

bool room_wait(struct repl *r, struct repl_io *io, int error)
{
	bool full = error == -ERR_NOSPC;
	enum room_policy p = full || io->save_failed ? policy(r, full) : ROOM_NONE;
	if (p == ROOM_NONE || ((p == ROOM_ANY || p == ROOM_UNNEEDED) && candidate(r, p, 0) == 0))
		return false;
	io->error = error;
	io->phase = PHASE_ROOM;
	/* One of the stream stays in the window, whose order and barriers count it as not applied; a commit's is known
	 * by its slot. */
	if (io->list == NULL && !io->internal)
		list_push(&r->room, io);
	if (r->room_policy == ROOM_NONE) {
		r->room_policy = p;
		r->room_error = error;
		r->room_tried = 0;
		room_next(r);
	}
	return true;
}

void room_merge_done(struct repl *r, int error)
{
	if (r->room_policy == ROOM_NONE)
		return;
	if (!r->room_merging) { /* another's has ended */
		if (!repl_tx_pending(r, TX_ROOM))
			room_next(r);
		return;
	}
	if (error == 0) { /* no other merge before it is dropped: it would bring new blocks into it */
		save_room(r, r->merge_io.arg);
		return;
	}
	r->merge_busy = r->room_merging = false;
	r->room_tried++;
	room_next(r);
}

bool room_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	if (policy(r, r->room_error == -ERR_NOSPC) != t->arg) /* the role or a setting has changed */
		return false;
	if (t->number) {
		int i = repl_meta_find_ckpt(m, t->number);
		if (i < 0 || rank_of(r, (uint32_t)i) > r->room_rank)
			return false; /* gone since it was chosen, or dearer: who waits looks again */
		if (i == 0)
			t->dropped_through = t->number;
		else
			t->dropped = t->number; /* merged */
		history_remove(m, t->number);
		return true;
	}
	t->dropped_through = UINT64_MAX;
	while (m->n_ckpts)
		history_remove(m, m->ckpts[m->n_ckpts - 1].number);
	m->broken = t->arg == ROOM_BREAK;
	return true;
}

static void resubmit(struct repl *r, struct repl_io *io)
{
	io->error = 0;
	if (io->target == TARGET_INTENT) { /* a clear may have begun meanwhile */
		repl_intent(r, io);
		return;
	}
	io->phase = PHASE_IO;
	repl_submit(r, io, io->target);
}

/* The record says what is given up, or could not be saved: all that waits goes on, or fails as it had. */
static void room_end(struct repl *r, bool made)
{
	r->room_policy = ROOM_NONE;
	for (uint64_t n = r->room.count; n; n--) {
		struct repl_io *io = list_pop(&r->room);
		if (made) {
			resubmit(r, io);
			continue;
		}
		repl_guest_failed(r, io, io->error);
	}
	for (struct repl_io *io = r->window.head, *next; io; io = next) {
		next = io->next;
		if (io->phase != PHASE_ROOM)
			continue;
		if (made)
			resubmit(r, io);
		else
			secondary_apply_end(r, io, io->error);
	}
	for (unsigned i = 0; i < COMMITS_MAX; i++)
		if (r->commit_busy[i] && r->commit[i].phase == PHASE_ROOM) {
			if (made)
				resubmit(r, &r->commit[i]);
			else
				failover_commit_end(r, &r->commit[i], r->commit[i].error);
		}
}

/* Its status would still call them valid. */
static void tell_primary(struct repl *r)
{
	struct wire_refuse x = {.code = (uint16_t)-r->room_error};
	if (!r->is_target || r->closing)
		return;
	(void)snprintf(x.text, sizeof(x.text), "%s: old content could not be saved (%s): all checkpoints are given up",
		       r->meta->group, err_short(r->room_error));
	int n = wire_refuse_encode(&x, r->scratch, sizeof(r->scratch));
	INVARIANT(n > 0);
	session_send(r, WIRE_HISTORY_LOST, 0, 0, 0, 0, r->scratch, (uint32_t)n);
}

static void room_log(struct repl *r, const struct tx *t)
{
	const char *matter = err_short(r->room_error);
	switch ((enum room_policy)t->arg) {
	case ROOM_BREAK:
		repl_set_error(
		    r, r->room_error, "cow", -1, 0, 0,
		    "%s: old content could not be saved (%s): all checkpoints are given up and mirroring goes on; "
		    "until the next one only `failover --to latest` works",
		    r->meta->group, matter);
		tell_primary(r);
		break;
	case ROOM_ALL:
		repl_log(
		    r, 0,
		    "old content could not be saved (%s): all checkpoints here were dropped so that guests' writes "
		    "succeed; look at the disk under the store",
		    matter);
		break;
	default:
		repl_log(r, 0, "%s: no room: checkpoint %llu was dropped so that %s", r->meta->group,
			 (unsigned long long)t->number,
			 t->arg == ROOM_ANY ? "guests' writes succeed" : "mirroring goes on");
	}
}

void room_tx_done(struct repl *r, struct tx *t, int error)
{
	if (error == 0)
		room_log(r, t);
	if (r->room_merging)
		r->merge_busy = r->room_merging = false;
	/* Canceled: what it was to drop has gone already. */
	room_end(r, error == 0 || error == -ERR_CANCELED);
}
