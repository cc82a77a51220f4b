/* The checkpoints in the group's record: which are there, which are needed, and how one goes.
 *
 * A checkpoint's overlay is dropped after the record that no longer names it is durable. Out of the middle its blocks
 * go into the older neighbour first (REPL_MERGE), the oldest one's go with it. One merge is under way at a time,
 * whoever asked for it: retention, the command, or want of room (repl_room.c), which gives up more than retention does.
 * Those that a clone or a job holds (repl_hold.c) go for want of room only.
 *
 * Retention looks at each tick that brings the usage, and begins one thing: what no rule keeps goes first
 * (core/retention.h); with that done, and too little room left, so does what only a rule keeps (docs/adr/0010).
 */
#include "core/repl_internal.h"

#include <string.h>

#include "core/check.h"
#include "core/retention.h"

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

/* ---- retention ---- */

/* A primary's are from when it followed: they go once the new secondary has one of its own. */
static bool all_go(const struct repl_meta *m)
{
	/* Up to the one at which a switchover was, the numbers are this host's. */
	return m->role == ROLE_PRIMARY && m->last_stream && repl_meta_find_ckpt(m, m->last_stream) < 0;
}

/* Neither counted nor dropped by retention. A job's own goes when that lets go of it, whatever is kept. */
static bool is_apart(const struct repl *r, const struct repl_meta *m, uint32_t i)
{
	return (m->ckpts[i].flags & (CKPT_PINNED | CKPT_JOB)) || hold_held(r, m, m->ckpts[i].number);
}

/* Whether nothing but a retention rule keeps checkpoint i. */
static bool may_go(const struct repl *r, const struct repl_meta *m, uint32_t i)
{
	return !is_apart(r, m, i) && !history_needed(m, i);
}

bool history_make_room(const struct repl *r, struct tx *t, struct repl_meta *m, uint32_t most)
{
	while (m->n_ckpts >= most && may_go(r, m, 0)) {
		t->dropped_through = m->ckpts[0].number;
		history_remove(m, t->dropped_through);
	}
	return m->n_ckpts < most;
}

/* What each checkpoint of the record holds. False: the usage was looked at before it was in the chain. */
static bool take_usage(struct repl *r, const struct repl_usage *u, uint64_t *ret_used, uint64_t *ret_live)
{
	const struct repl_meta *m = r->meta;
	uint32_t k = 0;
	*ret_used = *ret_live = 0;
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		while (k < u->n && u->numbers[k] < m->ckpts[i].number)
			k++;
		if (k == u->n || u->numbers[k] != m->ckpts[i].number)
			return false;
		r->epoch_bytes[i] = *ret_live = u->bytes[k];
		*ret_used += u->bytes[k];
	}
	return true;
}

/* Whether `used` bytes are 80 % of `room` or more. */
static bool fills(uint64_t used, uint64_t room)
{
	return used && used >= room - room / 5;
}

/* Room for the overlays is history_max_bytes, and what is free under the store beside what they hold. */
static bool room_is_short(const struct repl *r, const struct repl_usage *u, uint64_t used)
{
	uint64_t most = r->meta->settings.history_max_bytes;
	return (most && fills(used, most)) || (u->free_bytes < UINT64_MAX - used && fills(used, used + u->free_bytes));
}

/* The live epoch can't be thinned; a checkpoint makes history of it. One that is refused is not asked for again at
 * once. */
static void early_checkpoint(struct repl *r, uint64_t used, uint64_t live)
{
	if (live < used - live || r->now_ns < r->early_ns || !r->is_target || r->closing || r->link != LINK_SYNCED ||
	    r->meta->state != STATE_RUNNING)
		return;
	r->early_ns = r->now_ns + RETENTION_REST_NS;
	session_send(r, WIRE_CHECKPOINT_WANT, 0, 0, 0, 0, NULL, 0);
}

/* The oldest ones, up to `number`: their blocks go with them. */
static void drop_through(struct repl *r, uint64_t number)
{
	struct tx *t = repl_tx(r, TX_DROP);
	t->number = number;
	t->arg = 1;
	r->merge_busy = true; /* to its end, as a merge is to that of its drop */
}

/* Checkpoint i, with the merge that it needs. */
static void drop_one(struct repl *r, uint32_t i)
{
	const struct repl_meta *m = r->meta;
	if (m->n_ckpts > 1) {
		history_merge(r, m->ckpts[i].number, 0);
		return;
	}
	repl_tx(r, TX_DROP)->number = m->ckpts[0].number; /* the live epoch's goes as the last one */
	r->merge_busy = true;
}

/* Of those that no rule keeps the oldest goes; all of them that are the oldest of the chain at once. False: there is
 * none. */
static bool drop_unkept(struct repl *r)
{
	const struct repl_meta *m = r->meta;
	bool all = all_go(m);
	uint32_t i, end;
	if (all && m->n_ckpts == 1 && !is_apart(r, m, 0)) {
		drop_one(r, 0);
		return true;
	}
	if (!all) {
		for (i = 0; i < m->n_ckpts; i++)
			r->apart[i] = is_apart(r, m, i);
		retention_rules(&m->settings, m->ckpts, m->n_ckpts, r->apart, r->epoch_bytes, r->rules);
	}
	for (i = 0; i < m->n_ckpts && !(may_go(r, m, i) && (all || !r->rules[i])); i++)
		;
	if (i == m->n_ckpts)
		return false;
	if (i > 0) {
		drop_one(r, i);
		return true;
	}
	for (end = 1; may_go(r, m, end) && (all || !r->rules[end]); end++) /* the newest may not */
		;
	drop_through(r, m->ckpts[end - 1].number);
	return true;
}

/* The record is nearly full: the oldest that may go goes whatever the rules say, also out of the middle. */
static bool drop_crowded(struct repl *r)
{
	const struct repl_meta *m = r->meta;
	uint32_t i = 0;
	if (m->n_ckpts < CKPTS_MOST - CKPTS_MARGIN)
		return false;
	while (i < m->n_ckpts && !may_go(r, m, i))
		i++;
	if (i == m->n_ckpts)
		return false;
	if (i == 0)
		drop_through(r, m->ckpts[0].number);
	else
		drop_one(r, i);
	return true;
}

/* Old history goes whatever the rules say, oldest first; in the middle only where that frees something. */
static void thin(struct repl *r)
{
	const struct repl_meta *m = r->meta;
	uint32_t i = 0;
	if (r->now_ns >= r->thin_rest_ns)
		r->thin_passed = 0;
	while (i < m->n_ckpts && !(may_go(r, m, i) && m->ckpts[i].number > r->thin_passed))
		i++;
	if (i == m->n_ckpts)
		return;
	if (!r->thinning)
		repl_log(r, 1,
			 "%s: history has filled 80 %% of its room (history_max_bytes, or the free space): the oldest "
			 "checkpoints that are not pinned go",
			 m->group);
	r->thinning = true;
	if (i == 0)
		drop_through(r, m->ckpts[0].number);
	else
		history_merge(r, m->ckpts[i].number, REPL_MERGE_FOR_ROOM);
}

void history_retention(struct repl *r, const struct repl_usage *u)
{
	const struct repl_meta *m = r->meta;
	uint64_t used, live;
	bool known = u && take_usage(r, u, &used, &live), is_short = known && room_is_short(r, u, used);
	r->thinning = r->thinning && (is_short || !known);
	if (is_short)
		early_checkpoint(r, used, live);
	if (r->merge_busy || r->dropping || r->saving || r->failing_over || m->state == STATE_FAILOVER ||
	    m->state == STATE_FAILOVER_FAILED || r->now_ns < r->retention_ns)
		return;
	uint32_t gone = let_go(r);
	if (gone != UINT32_MAX)
		drop_one(r, gone);
	else if (!(known && m->n_ckpts && drop_unkept(r)) && !drop_crowded(r) && is_short && m->n_ckpts)
		thin(r);
}

/* Between the choice and this save one of them may have come into use. */
bool history_prepare_drop(struct repl *r, struct tx *t, struct repl_meta *m)
{
	if (!t->arg) {
		if (hold_held(r, m, t->number))
			return false;
		t->dropped = t->number;
		history_remove(m, t->dropped);
		return true;
	}
	while (m->n_ckpts && m->ckpts[0].number <= t->number && may_go(r, m, 0)) {
		t->dropped_through = m->ckpts[0].number;
		history_remove(m, t->dropped_through);
	}
	return t->dropped_through != 0;
}

static void refuse_held(struct repl *r, struct repl_command *c, uint64_t number)
{
	char holder[HOLDER_SIZE], more[HOLDER_SIZE];
	const char *who = repl_holder(r, number, 0, holder);
	bool clone = who && strncmp(who, "clone ", 6) == 0;
	repl_command_done(r, c, -ERR_BUSY, "%s%s holds it; %s first", who ? who : "a failover under way",
			  repl_holder(r, number, 1, more) ? " (and others)" : "",
			  clone ? "remove that with `rm`" : "wait for that to end, or cancel it");
}

void history_drop(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	int i = repl_meta_find_ckpt(m, c->number);
	if (i < 0 || !repl_shows_ckpt(r, (uint32_t)i))
		repl_command_done(r, c, -ERR_NOENT, "no such checkpoint; see `checkpoints`");
	else if (r->failing_over || m->state == STATE_FAILOVER) /* it may have decided for this one, and not said so */
		repl_command_done(r, c, -ERR_BUSY, "a failover is under way; wait with `wait --for=done`");
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

/* A failover that came since its merge began goes by the chain as it is, or stands on this one by now. */
static bool failover_since(const struct repl *r, uint64_t number)
{
	int i = repl_meta_find_ckpt(r->meta, number);
	return r->failing_over || (i >= 0 && history_needed(r->meta, (uint32_t)i));
}

void history_merged(struct repl *r, int error)
{
	if (r->room_merging) {
		room_merge_done(r, error);
		return;
	}
	uint64_t n = r->merge_io.arg;
	if (error == -ERR_NOSPC && r->merge_io.flags & REPL_MERGE_FOR_ROOM) { /* of thin() */
		r->merge_busy = false;
		r->thin_passed = n;
		r->thin_rest_ns = r->now_ns + RETENTION_REST_NS;
		room_merge_done(r, error);
		return;
	}
	/* Since the merge began; the image stays what it is. */
	if (!error && (hold_held(r, r->meta, n) || failover_since(r, n))) {
		r->merge_busy = false;
		refuse_held(r, r->dropping, n);
		r->dropping = NULL;
		room_merge_done(r, -ERR_BUSY);
		return;
	}
	if (error) {
		if (r->dropping == NULL && error != -ERR_BUSY) /* a resize came in between */
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
	t->number = n;
	t->command = r->dropping;
}

void history_dropped(struct repl *r, struct tx *t, int error)
{
	if (t->command == r->dropping)
		r->dropping = NULL;
	r->merge_busy = false;
	if (error && error != -ERR_CANCELED)
		r->retention_ns = r->now_ns + RETENTION_REST_NS;
	if (error == -ERR_CANCELED)
		refuse_held(r, t->command, t->number);
	else
		repl_command_done(r, t->command, error, "the group's record could not be saved: %s", err_short(error));
	room_merge_done(r, error);
}
