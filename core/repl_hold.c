/* Who holds checkpoints: clones, by the record, and jobs, in memory.
 *
 * A held checkpoint is pinned for as long as it is held (SPEC 2): retention neither counts nor drops it, a drop is
 * refused with the holder's name, and it is not merged away. What is newer may be merged into it: its image stays. For
 * want of room it goes after the other pinned ones and before those that SPEC 8 protects (repl_room.c). Its holders
 * then find it no longer: they answer EIO.
 *
 * Jobs die with the daemon, so their holds are nowhere but here. A job on a host whose disk is served itself (a
 * primary's, standalone, DONE) has no checkpoint to read while guests write, so it opens an epoch of its own, one that
 * CKPT_JOB marks in the record: TX_HOLD. It goes when the last holder has let go; after a restart that is so from the
 * start, for all that no clone holds.
 *
 * What such an epoch is: the disks of all volumes of the group between two guests' writes. The record only makes its
 * name durable. The point is where the shell switches the volumes in memory, which excludes guests' writes to all of
 * them at once, for no longer than those under way take. So a write that was answered before another began is in it if
 * that one is. Writes between the record and the switch are saved as those before it were, or not at all where nothing
 * was kept. No disk is synced: the point is good as long as this daemon lives, and nobody looks at it after that. A
 * clone over it does last; the disks are synced before the record names that (TX_CLONE), and from there on
 * what the checkpoint's image takes from a disk is durable there, and what it takes from an overlay was saved durably
 * before it changed.
 *
 * The live epoch's overlay can't be merged, so a CKPT_JOB that is the newest of several stays until another epoch is
 * opened over it or the older ones are gone. It costs nothing but its number: what is saved in it, the older images
 * need. Nobody sees it meanwhile (repl_shows_ckpt).
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

/* ---- looking ---- */

static bool job_holds(const struct repl *r, uint64_t number)
{
	if (r->cloning && r->cloning->cmd == CMD_CLONE && r->cloning->number == number)
		return true;
	if (r->failing_over && r->failover_outcome == number) /* its record is to name it */
		return true;
	for (unsigned i = 0; i < r->n_holds; i++)
		if (r->holds[i].number == number)
			return true;
	return false;
}

static bool clone_holds(const struct repl_meta *m, uint64_t number)
{
	for (uint32_t i = 0; i < m->n_clones; i++)
		if (m->clones[i].ckpt == number)
			return true;
	return false;
}

bool hold_held(const struct repl *r, const struct repl_meta *m, uint64_t number)
{
	return clone_holds(m, number) || job_holds(r, number);
}

bool repl_shows_ckpt(const struct repl *r, uint32_t i)
{
	const struct repl_ckpt *c = &r->meta->ckpts[i];
	return !(c->flags & CKPT_JOB) || hold_held(r, r->meta, c->number);
}

const char *repl_holder(const struct repl *r, uint64_t number, unsigned nth, char buf[static HOLDER_SIZE])
{
	const struct repl_meta *m = r->meta;
	for (uint32_t i = 0; i < m->n_clones; i++)
		if (m->clones[i].ckpt == number && nth-- == 0) {
			(void)snprintf(buf, HOLDER_SIZE, "clone %s", m->clones[i].name);
			return buf;
		}
	for (unsigned i = 0; i < r->n_holds; i++)
		if (r->holds[i].number == number && nth-- == 0) {
			(void)snprintf(buf, HOLDER_SIZE, "%s", r->holds[i].holder);
			return buf;
		}
	return NULL;
}

/* Of the record that is being saved, or that is: whether the checkpoint is on its way out. */
static bool going(const struct repl *r, uint64_t number)
{
	return r->saving && !r->resaving && repl_meta_find_ckpt(r->next, number) < 0;
}

/* ---- jobs ---- */

static void add(struct repl *r, struct repl_command *c, uint64_t number)
{
	INVARIANT(r->n_holds < HOLDS_MAX);
	struct repl_hold *h = &r->holds[r->n_holds++];
	h->number = number;
	(void)snprintf(h->holder, sizeof(h->holder), "%.*s", HOLDER_SIZE - 1, c->text);
	int i = repl_meta_find_ckpt(r->meta, number);
	INVARIANT(i >= 0);
	c->result = number;
	c->result_time_ns = r->meta->ckpts[i].time_ns;
	repl_command_done(r, c, 0, " ");
}

static bool hold_refused_now(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	if (repl_serving(m, false) != SERVING_DISK)
		repl_command_done(
		    r, c, -ERR_STATE,
		    "no checkpoint of its disk can be taken for a job: this host is %s in %s; name one of "
		    "`checkpoints`",
		    role_name(m->role), state_name(m->state));
	else if (detach_any(r) || repl_meta_flagged(m, VOLUME_STALE))
		repl_command_done(r, c, -ERR_STATE,
				  "a local disk is detached: only the peer holds its content; `resync` it first");
	else
		return false;
	return true;
}

void hold_command(struct repl *r, struct repl_command *c)
{
	if (r->n_holds + r->n_hold_waits >= HOLDS_MAX) {
		repl_command_done(r, c, -ERR_LIMIT, "%d jobs hold checkpoints of it already; wait for one to end",
				  HOLDS_MAX);
		return;
	}
	if (c->number) {
		int i = repl_meta_find_ckpt(r->meta, c->number);
		if (i < 0 || !repl_shows_ckpt(r, (uint32_t)i) || going(r, c->number))
			repl_command_done(r, c, -ERR_NOENT, "no checkpoint %llu here; see `checkpoints`",
					  (unsigned long long)c->number);
		else
			add(r, c, c->number);
		return;
	}
	if (hold_refused_now(r, c))
		return;
	c->next = r->hold_waits;
	r->hold_waits = c;
	r->n_hold_waits++;
	if (!repl_tx_queued(r, TX_HOLD)) /* those that wait share one */
		repl_tx(r, TX_HOLD);
}

void hold_release(struct repl *r, struct repl_command *c)
{
	for (unsigned i = 0; i < r->n_holds; i++) {
		struct repl_hold *h = &r->holds[i];
		if (h->number != c->number || strncmp(h->holder, c->text, HOLDER_SIZE - 1) != 0)
			continue;
		*h = r->holds[--r->n_holds];
		repl_command_done(r, c, 0, " ");
		history_retention(r, NULL);
		return;
	}
	repl_command_done(r, c, -ERR_NOENT, "%.*s does not hold checkpoint %llu", HOLDER_SIZE - 1, c->text,
			  (unsigned long long)c->number);
}

bool hold_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	if (repl_serving(m, false) != SERVING_DISK || detach_any(r) || repl_meta_flagged(m, VOLUME_STALE))
		return false;
	if (!history_make_room(r, t, m, CKPTS_MOST))
		return false;
	t->command = r->hold_waits;
	r->hold_waits = NULL;
	t->opened = m->ckpt_max + 1;
	history_add(r, m, t->opened, CKPT_LOCAL, CKPT_JOB);
	r->ckpt_used = t->opened; /* none from the stream gets the same while this is saved */
	return true;
}

void hold_tx_done(struct repl *r, struct tx *t, int error)
{
	struct repl_command *c = t->command, *next;
	if (c == NULL) { /* it was not even prepared */
		c = r->hold_waits;
		r->hold_waits = NULL;
	}
	if (!error && detach_any(r)) /* what was written since went to the peer only */
		error = -ERR_STATE;
	if (error == -ERR_CANCELED && r->meta->n_ckpts >= CKPTS_MOST)
		error = -ERR_LIMIT;
	for (; c; c = next) {
		next = c->next;
		r->n_hold_waits--;
		if (error)
			repl_command_done(r, c, error, "no checkpoint of its disk could be taken for a job: %s",
					  error == -ERR_LIMIT ? CKPTS_FULL_TEXT
					  : error == -ERR_CANCELED || error == -ERR_STATE
					      ? "this host's role or its disk changed meanwhile"
					      : err_short(error));
		else
			add(r, c, t->opened);
	}
}

/* ---- clones ---- */

/* One that is made exists from its record on: the files of its overlay, empty, are durable before (repl_exec_save), and
 * a crash before the record leaves files that the next start removes. One that is removed is gone from its record on;
 * its files go after, or at the next start. Its checkpoint is held from the command's first look on. */

/* NULL, or what is the matter with one that is to be made; checked again when its record is prepared. */
static const char *clone_refused(const struct repl *r, const struct repl_meta *m, const struct repl_command *c,
				 int *ret_err)
{
	int i = repl_meta_find_ckpt(m, c->number);
	if (i < 0 || (m == r->meta && (!repl_shows_ckpt(r, (uint32_t)i) || going(r, c->number)))) {
		*ret_err = -ERR_NOENT;
		return "no such checkpoint here; see `checkpoints`";
	}
	if (m->ckpts[i].kind == CKPT_PARTIAL) {
		*ret_err = -ERR_STATE;
		return "that checkpoint is of a disk whose sync had not ended: nothing could run from it; see "
		       "`checkpoints` for others";
	}
	if (repl_meta_find_clone(m, c->text) >= 0) {
		*ret_err = -ERR_EXIST;
		return "a clone of that name is there already; choose another name, or remove it with `rm`";
	}
	if (m->n_clones == GROUP_CLONES_MAX) {
		*ret_err = -ERR_LIMIT;
		return "the group has 64 clones, the most there can be; remove one with `rm`";
	}
	return NULL;
}

static void clone_end(struct repl *r, int error, const char *text)
{
	struct repl_command *c = r->cloning;
	r->cloning = NULL;
	repl_command_done(r, c, error, "%s", text);
	while (!r->cloning && (c = r->clone_waits) != NULL) {
		r->clone_waits = c->next;
		repl_command(r, c);
	}
}

void clone_command(struct repl *r, struct repl_command *c)
{
	c->next = NULL;
	if (r->cloning) {
		struct repl_command **at = &r->clone_waits;
		while (*at)
			at = &(*at)->next;
		*at = c;
		return;
	}
	PRE(c->cmd == CMD_UNCLONE || (name_valid(c->text) && c->flags < r->meta->n_volumes));
	int err = 0;
	const char *why = NULL;
	if (c->cmd == CMD_CLONE) {
		why = clone_refused(r, r->meta, c, &err);
	} else if (repl_meta_find_clone(r->meta, c->text) < 0) {
		err = -ERR_NOENT;
		why = "there is no such clone";
	}
	r->cloning = c;
	if (why) {
		clone_end(r, err, why);
		return;
	}
	if (c->cmd == CMD_UNCLONE) {
		repl_tx(r, TX_UNCLONE);
		return;
	}
	if (r->meta->ckpts[repl_meta_find_ckpt(r->meta, c->number)].flags & CKPT_JOB) {
		r->clone_io.kind = REPL_FLUSH;
		repl_submit(r, &r->clone_io, TARGET_CKPT);
	} else { /* the disks were synced when it was taken */
		repl_tx(r, TX_CLONE);
	}
}

void clone_synced(struct repl *r, int error)
{
	if (error)
		clone_end(r, error, "the disks could not be flushed; look at the disk under the store");
	else
		repl_tx(r, TX_CLONE);
}

bool clone_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	const struct repl_command *c = r->cloning;
	int err;
	if (t->kind == TX_UNCLONE) {
		int i = repl_meta_find_clone(m, c->text);
		if (i < 0)
			return false;
		m->clones[i] = m->clones[--m->n_clones];
		memset(&m->clones[m->n_clones], 0, sizeof(m->clones[0]));
		return true;
	}
	if (clone_refused(r, m, c, &err))
		return false;
	struct repl_clone *k = &m->clones[m->n_clones++];
	*k = (struct repl_clone){.ckpt = c->number, .id = ++m->clone_max, .time_ns = r->wall_ns};
	(void)snprintf(k->name, sizeof(k->name), "%.*s", NAME_MAX_LEN, c->text);
	memcpy(k->volume, m->volumes[c->flags].name, sizeof(k->volume));
	return true;
}

void clone_tx_done(struct repl *r, struct tx *t, int error)
{
	char text[128];
	(void)t;
	(void)snprintf(text, sizeof(text), "the group's record could not be saved: %s", err_short(error));
	clone_end(r, error == -ERR_CANCELED ? -ERR_NOENT : error,
		  error == -ERR_CANCELED ? "its checkpoint is gone meanwhile; see `checkpoints`" : text);
}

/* ---- what is lost ---- */

void hold_lost(struct repl *r, const struct repl_meta *old)
{
	const struct repl_meta *m = r->meta;
	for (uint32_t i = 0; i < m->n_clones; i++) {
		const struct repl_clone *c = &m->clones[i];
		if (repl_meta_find_ckpt(m, c->ckpt) < 0 && repl_meta_find_ckpt(old, c->ckpt) >= 0)
			repl_log(r, 0,
				 "checkpoint %llu was given up for want of room: clone %s over it is lost, remove it "
				 "with `rm`",
				 (unsigned long long)c->ckpt, c->name);
	}
	for (unsigned i = 0; i < r->n_holds; i++)
		if (repl_meta_find_ckpt(m, r->holds[i].number) < 0 && repl_meta_find_ckpt(old, r->holds[i].number) >= 0)
			repl_log(r, 0, "checkpoint %llu was given up for want of room: %s has lost it",
				 (unsigned long long)r->holds[i].number, r->holds[i].holder);
}
