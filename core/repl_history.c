/* The checkpoints in the group's record: which are there, which are needed, and how one goes.
 *
 * A checkpoint's overlay is dropped after the record that no longer names it is durable. Out of the middle its blocks
 * go into the older neighbour first (REPL_MERGE), the oldest one's go with it. One merge is under way at a time,
 * whoever asked for it: retention, the command, or want of room (repl_room.c), which gives up more than retention does.
 * Those that a clone or a job holds (repl_hold.c) go for want of room only.
 */
#include "core/repl_internal.h"

#include <string.h>

#include "core/check.h"

bool history_protected(const struct repl_meta *m, uint64_t n)
{
	return n == m->base || n == m->kept || n == m->target ||
	       ((m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED) && n == m->received);
}

bool history_needed(const struct repl_meta *m, uint32_t i)
{
	uint64_t n = m->ckpts[i].number;
	return i == m->n_ckpts - 1 || n == m->last_stream || history_protected(m, n);
}

/* Appends a checkpoint to the record. */
void history_add(struct repl *r, struct repl_meta *m, uint64_t number, enum ckpt_kind kind, unsigned flags)
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
void history_release_kept(struct repl_meta *m)
{
	if (m->kept && !m->own_dirty)
		pin(m, m->kept, false);
	m->kept = 0;
	m->own_dirty = false;
}

/* Retention may be behind: then the oldest goes now; it needs no merge. */
void history_make_room(struct tx *t, struct repl_meta *m)
{
	if (m->n_ckpts < GROUP_CKPTS_MAX)
		return;
	t->dropped_through = m->ckpts[0].number;
	history_remove(m, t->dropped_through);
}

void history_remove(struct repl_meta *m, uint64_t number)
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

void history_merge(struct repl *r, uint64_t number, uint32_t flags)
{
	PRE(!r->merge_busy);
	r->merge_busy = true;
	r->merge_io.kind = REPL_MERGE;
	r->merge_io.flags = flags;
	r->merge_io.arg = number;
	repl_submit(r, &r->merge_io, TARGET_OWN);
}

/* One that was opened for a job which has ended: it goes as soon as it can. UINT32_MAX: none. */
static uint32_t let_go(const struct repl *r)
{
	const struct repl_meta *m = r->meta;
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		const struct repl_ckpt *c = &m->ckpts[i];
		bool can = m->n_ckpts == 1 ? !history_protected(m, c->number) : !history_needed(m, i);
		if ((c->flags & CKPT_JOB) && can && !hold_held(r, m, c->number))
			return i;
	}
	return UINT32_MAX;
}

/* keep_last: the oldest unpinned one above the count goes. Merging into an older neighbour is I/O and comes first. */
void history_retention(struct repl *r)
{
	const struct repl_meta *m = r->meta;
	if (r->merge_busy || r->dropping || r->saving || r->failing_over || m->state == STATE_FAILOVER ||
	    m->state == STATE_FAILOVER_FAILED || r->now_ns < r->retention_ns)
		return;
	/* A primary's are from when it followed: they go once the new secondary has one of its own. */
	bool now_primary = m->role == ROLE_PRIMARY && m->last_stream;
	uint64_t unpinned = 0;
	uint32_t oldest = UINT32_MAX, gone = let_go(r);
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		if ((m->ckpts[i].flags & CKPT_PINNED) || hold_held(r, m, m->ckpts[i].number))
			continue;
		unpinned++;
		bool alone = now_primary && m->n_ckpts == 1; /* the live epoch's goes as the last one of the chain */
		if (oldest == UINT32_MAX && (alone || !history_needed(m, i)))
			oldest = i;
	}
	if (gone != UINT32_MAX)
		oldest = gone;
	else if (unpinned <= (now_primary ? 0 : m->settings.keep_last) || oldest == UINT32_MAX)
		return;
	if (m->n_ckpts == 1) {
		if (!repl_tx_pending(r, TX_DROP))
			repl_tx(r, TX_DROP)->number = m->ckpts[0].number;
		return;
	}
	history_merge(r, m->ckpts[oldest].number, 0);
}

static void refuse_held(struct repl *r, struct repl_command *c, uint64_t number)
{
	char holder[HOLDER_SIZE], more[HOLDER_SIZE];
	const char *who = repl_holder(r, number, 0, holder);
	bool clone = who && strncmp(who, "clone ", 6) == 0;
	repl_command_done(r, c, -ERR_BUSY, "%s%s holds it; %s first", who ? who : "somebody",
			  repl_holder(r, number, 1, more) ? " (and others)" : "",
			  clone ? "remove that with `rm`" : "wait for that to end, or cancel it");
}

void history_drop(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	int i = repl_meta_find_ckpt(m, c->number);
	if (i < 0 || !repl_shows_ckpt(r, (uint32_t)i))
		repl_command_done(r, c, -ERR_NOENT, "no such checkpoint; see `checkpoints`");
	else if (m->state == STATE_FAILOVER)
		repl_command_done(r, c, -ERR_BUSY, "a failover is being committed; wait with `wait --for=done`");
	else if (history_needed(m, (uint32_t)i))
		repl_command_done(
		    r, c, -ERR_STATE,
		    "it is in use (the base of the view, the newest one, or one that a resync or failover "
		    "needs)");
	else if (hold_held(r, m, c->number))
		refuse_held(r, c, c->number);
	else if (r->drop_next)
		repl_command_done(r, c, -ERR_BUSY, "another checkpoint is being dropped");
	else if (r->merge_busy || r->dropping)
		r->drop_next = c; /* retention's merges come all the time: no reason to refuse it */
	else {
		r->dropping = c;
		history_merge(r, c->number, 0);
	}
}

void history_settle(struct repl *r)
{
	struct repl_command *c = r->drop_next;
	if (c == NULL || (!r->shutdown && (r->merge_busy || r->dropping)))
		return;
	r->drop_next = NULL;
	repl_command(r, c); /* anew: its checkpoint may be gone, or in use */
}

void history_merged(struct repl *r, int error)
{
	if (r->room_merging) {
		room_merge_done(r, error);
		return;
	}
	if (!error && hold_held(r, r->meta, r->merge_io.arg)) { /* since the merge began; the image stays what it is */
		r->merge_busy = false;
		refuse_held(r, r->dropping, r->merge_io.arg);
		r->dropping = NULL;
		room_merge_done(r, -ERR_BUSY);
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

void history_dropped(struct repl *r, struct tx *t, int error)
{
	if (t->command == r->dropping)
		r->dropping = NULL;
	r->merge_busy = false;
	if (error == -ERR_CANCELED)
		refuse_held(r, t->command, t->number);
	else
		repl_command_done(r, t->command, error, "the group's record could not be saved: %s", err_short(error));
	room_merge_done(r, error);
}
