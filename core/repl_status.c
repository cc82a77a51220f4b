/* What is said of a group: its status, why it is degraded, and where the two hosts differ. Looks, and changes nothing.
 */
#include "core/repl_internal.h"

#include <stdio.h>

#include "core/check.h"

const char *repl_peer_text(const struct repl *r)
{
	return r->meta->peer[0] ? r->meta->peer : "the peer";
}

static void reason(struct repl_status *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void reason(struct repl_status *s, const char *fmt, ...)
{
	if (s->n_reasons == ARRAY_LEN(s->reasons))
		return;
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(s->reasons[s->n_reasons++], sizeof(s->reasons[0]), fmt, ap);
	va_end(ap);
	s->degraded = true;
}

/* What may be said of the link: nothing is known of a peer that has been silent for peer_timeout (the next tick ends
 * the session, unless it was this host that was held up), or whose session this host is closing; and a halted pair only
 * looks whether it is still one. */
enum link_state repl_link(const struct repl *r, uint64_t now_ns)
{
	bool silent = now_ns - min_u64(now_ns, r->heard_ns) > r->meta->settings.peer_timeout_ms * UINT64_C(1000000);
	return r->closing || silent || r->meta->split_brain ? LINK_DOWN : r->link;
}

/* The rate is that of the last seconds: what the ETA needs, and what a changed resync_rate shows at once. */
static void status_resync(const struct repl *r, uint64_t now_ns, struct repl_status *s)
{
	if (r->behind) { /* all that is dirty, once it begins */
		s->resync_total = s->dirty_bytes;
		return;
	}
	s->resync_total = r->rs_total;
	s->resync_done = r->rs_total - min_u64(resync_left(r), r->rs_total);
	if (r->rs_n_samples == 0)
		return;
	uint64_t first = r->rs_n_samples > RATE_SAMPLES ? r->rs_n_samples - RATE_SAMPLES : 0;
	uint64_t ns = r->rs_samples[first % RATE_SAMPLES].ns, done = r->rs_samples[first % RATE_SAMPLES].done;
	uint64_t elapsed_ms = (now_ns - min_u64(now_ns, ns)) / UINT64_C(1000000);
	if (elapsed_ms && s->resync_done > done)
		s->resync_rate = (s->resync_done - done) * 1000 / elapsed_ms;
}

/* By what is left: guests' writes bring regions back. */
static void status_commit(const struct repl *r, struct repl_status *s)
{
	uint64_t left = 0;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		left += r->vol[i].todo.count << REGION_SHIFT;
	for (unsigned i = 0; i < COMMITS_MAX; i++)
		left += r->commit_busy[i] ? units_of(r->commit[i].len, REGION_SHIFT) << REGION_SHIFT : 0;
	s->commit_total = r->commit_total;
	s->commit_done = r->commit_total - min_u64(left, r->commit_total);
}

void repl_status(const struct repl *r, uint64_t now_ns, struct repl_status *s)
{
	const struct repl_meta *m = r->meta;
	memset(s, 0, sizeof(*s));
	s->link = repl_link(r, now_ns);
	for (uint32_t i = 0; i < m->n_volumes; i++) {
		uint64_t bytes = r->vol[i].dirty.count << REGION_SHIFT;
		s->dirty_bytes += min_u64(bytes, m->volumes[i].size);
	}
	if (!m->has_peer)
		s->dirty_bytes = 0;
	s->queue_bytes = r->queue_bytes;
	s->detached = r->stale | r->detaching;
	s->rebuilding = r->rebuild;
	s->resync = r->is_source && r->link == LINK_RESYNC;
	if (!s->resync && r->rebuild) {
		uint64_t left = 0;
		for (uint32_t i = 0; i < m->n_volumes; i++)
			left += r->rebuild >> i & 1 ? r->vol[i].todo.count << REGION_SHIFT : 0;
		s->resync = true;
		s->resync_total = r->rb_total;
		s->resync_done = r->rb_total - min_u64(left, r->rb_total);
		uint64_t elapsed = now_ns - min_u64(now_ns, r->rb_started_ns);
		if (elapsed > UINT64_C(1000000))
			s->resync_rate = s->resync_done * 1000 / (elapsed / UINT64_C(1000000));
	} else if (s->resync) {
		status_resync(r, now_ns, s);
	}
	s->commit = m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED;
	if (s->commit)
		status_commit(r, s);
	if (m->role == ROLE_PRIMARY) {
		bool any = false;
		for (uint32_t i = 0; i < m->n_volumes; i++)
			any = any || r->vol[i].dirty.count != 0;
		/* In sync, what was sent and not applied may be lost with this host (a peer that has to stop applying
		 * drops what it has received); else all that is dirty: how old that is, a host that was not in sync
		 * since its start does not know. */
		bool behind = s->link == LINK_SYNCED ? r->applied < r->seq : any;
		s->rpo_known = !behind || r->applied_ns;
		s->rpo_ns = behind ? now_ns - min_u64(now_ns, r->applied_ns) : 0;
	}
	s->checkpoint = m->last_stream;
	int i = repl_meta_find_ckpt(m, m->last_stream);
	s->checkpoint_time_ns = i >= 0 ? m->ckpts[i].time_ns : r->last_ckpt_wall_ns;
	s->error = r->error;
	s->counters = r->counters;
	if (m->split_brain)
		reason(s, "split brain: both hosts wrote alone; replication is halted");
	for (uint32_t k = 0; k < m->n_volumes; k++) {
		if (r->rebuild >> k & 1)
			reason(s, "the local disk of %s is detached and is being rebuilt from the peer",
			       m->volumes[k].name);
		else if ((r->stale | r->detaching) >> k & 1)
			reason(s,
			       "the local disk of %s is detached: its I/O goes through the peer; `resync` rebuilds it "
			       "when it accepts I/O again",
			       m->volumes[k].name);
		else if (m->role == ROLE_SECONDARY && (m->volumes[k].flags & VOLUME_PEER_STALE))
			reason(s, "the primary's disk of %s is detached: this host holds the only current copy",
			       m->volumes[k].name);
	}
	if (m->role == ROLE_PRIMARY && m->state == STATE_RUNNING && s->link != LINK_SYNCED && !m->split_brain)
		reason(s, "%s is not in sync: the link is %s%s", repl_peer_text(r), link_state_name(s->link),
		       m->paused      ? "; replication is paused until `resume`"
		       : r->congested ? "; the queue was full (on_congestion=ahead)"
				      : "");
	if (m->role == ROLE_PRIMARY && m->state == STATE_DONE)
		reason(s, "replication is stopped");
	if (m->broken)
		reason(s, "no checkpoint is valid: %s could not save old content (on_cow_error=break)",
		       m->role == ROLE_PRIMARY ? "the peer" : "this host");
	if (r->unsure_holds)
		reason(s, "the group's record cannot be saved: nothing is applied or answered until it can");
	if (m->shut_out)
		reason(s, "the peer has failed over; this copy waits for a failback");
	if (m->handed)
		reason(s,
		       "this host has handed over; the peer has not been heard to have taken over yet. If it is lost, "
		       "`failover` here");
	if (m->state == STATE_FAILOVER_FAILED)
		reason(s, "the commit of the failover met an error; run `failover` again when it is mended");
	if (r->error.code && !(m->split_brain && r->error.code == ERR_SPLIT)) /* that is said above */
		reason(s, "%s", r->error.text);
	if (m->role == ROLE_PRIMARY && m->state == STATE_DONE)
		s->degraded = r->error.code != 0 || m->split_brain || s->link != LINK_SYNCED;
}

void repl_diverged(const struct repl *r, struct repl_diverged *d)
{
	d->since_ns = r->meta->has_peer ? r->meta->diverged_ns : 0;
	d->peer_known = r->theirs_known;
	d->peer_since_ns = r->theirs_since_ns;
}
