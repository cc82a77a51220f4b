/* What a host's status says, against what the model knows (SPEC 9, I17: it never claims more than this host knows).
 *
 * After every step: the link and what may be said in it, the queue, progress, the checkpoint. Between operations, as it
 * goes over every unit: what the primary would lose, by its dirty bytes and by its RPO.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/check.h"
#include "tests/sim/world_internal.h"

static void link_check(struct host *h, const struct repl_status *s)
{
	struct world *w = h->w;
	const struct repl_meta *m = repl_meta(h->core);
	const struct end *e = h->conn;
	if (s->link == LINK_DOWN)
		return;
	if (m->split_brain || e == NULL || e->closed_by_core)
		world_fail(w, "host %u: status says %s, and %s", h->id, link_state_name(s->link),
			   m->split_brain ? "the pair is halted" : "there is no connection");
	uint64_t heard = e->heard_ns > e->waited_ns ? e->heard_ns : e->waited_ns;
	if (w->now - heard > m->settings.peer_timeout_ms * MS)
		world_fail(w, "host %u: status says %s of a peer that is silent since %" PRIu64 " ms", h->id,
			   link_state_name(s->link), (w->now - heard) / MS);
	/* One that was paused before it heard that its disk is detached goes on through the peer (docs/adr/0009); one
	 * whose stop overtook the pause is in sync until it has stopped. */
	bool paused = m->paused && !s->detached && !repl_stopping(h->core);
	if (s->link == LINK_SYNCED && (m->inconsistent || paused || m->role == ROLE_STANDALONE))
		world_fail(w, "host %u: status says SYNCED of a group that is %s%s", h->id, role_name(m->role),
			   paused ? ", paused" : "");
	if (!e->closing && !e->c->cut && s->queue_bytes != e->out.len - e->out_own)
		world_fail(w, "host %u: status says that %" PRIu64 " bytes are queued: %zu are", h->id, s->queue_bytes,
			   e->out.len - e->out_own);
}

static void progress_check(struct host *h, const struct repl_status *s)
{
	uint64_t most = 0;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		most += units_of(h->w->size[v], REGION_SHIFT) << REGION_SHIFT;
	if (s->resync_done > s->resync_total || s->resync_total > most)
		world_fail(h->w, "host %u: status says that %" PRIu64 " of %" PRIu64 " bytes are synced", h->id,
			   s->resync_done, s->resync_total);
	if (s->commit_done > s->commit_total || s->commit_total > most)
		world_fail(h->w, "host %u: status says that %" PRIu64 " of %" PRIu64 " bytes are committed", h->id,
			   s->commit_done, s->commit_total);
	if (s->dirty_bytes > most)
		world_fail(h->w, "host %u: status says that %" PRIu64 " bytes are dirty", h->id, s->dirty_bytes);
}

/* The newest from the stream: one that the secondary completed. Where it says that it is valid, it has it. */
static void checkpoint_check(struct host *h, const struct repl_status *s)
{
	const struct repl_meta *m = repl_meta(h->core);
	struct host *at = m->role == ROLE_SECONDARY ? h : peer_of(h);
	if (s->checkpoint > at->numbers_ever && s->checkpoint > h->numbers_ever)
		world_fail(h->w, "host %u: status says checkpoint %" PRIu64 ", which was never taken", h->id,
			   s->checkpoint);
	if (s->checkpoint && m->role == ROLE_SECONDARY && !m->broken && repl_meta_find_ckpt(m, s->checkpoint) < 0)
		world_fail(h->w, "host %u: status says that checkpoint %" PRIu64 " is valid, and it is gone", h->id,
			   s->checkpoint);
}

/* `ok` is said of a primary in sync with both its disks, and where no error stands. */
static void health_check(struct host *h, const struct repl_status *s)
{
	const struct repl_meta *m = repl_meta(h->core);
	bool alone = m->role == ROLE_PRIMARY && m->state == STATE_RUNNING && s->link != LINK_SYNCED;
	bool bad = alone || s->error.code || s->detached || m->broken || m->shut_out || m->split_brain ||
		   m->state == STATE_FAILOVER_FAILED;
	if (bad && (!s->degraded || s->n_reasons == 0))
		world_fail(h->w, "host %u: status says ok", h->id);
	if (s->degraded && s->n_reasons == 0)
		world_fail(h->w, "host %u: status says degraded, and not why", h->id);
}

void status_check(struct host *h)
{
	struct repl_status s;
	repl_status(h->core, h->w->now, &s);
	link_check(h, &s);
	progress_check(h, &s);
	checkpoint_check(h, &s);
	health_check(h, &s);
}

/* ---- what would be lost ---- */

/* A primary, and the copy that follows it: what was written since it became primary and is not there is dirty here, and
 * not older than its RPO. */
void status_check_loss(struct host *h)
{
	struct world *w = h->w;
	struct host *p = peer_of(h);
	struct repl_status s;
	uint64_t lost = 0, last = UINT64_MAX;
	if (repl_meta(h->core)->role != ROLE_PRIMARY || p->seen->role != ROLE_SECONDARY)
		return;
	repl_status(h->core, w->now, &s);
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		if (model_stale(h, v))
			continue;
		for (uint32_t u = 0; u < w->units[v]; u++) {
			ver a = h->disk[v].now[u];
			if (u % REGION_UNITS == 0 && u + REGION_UNITS <= w->units[v] &&
			    memcmp(&h->disk[v].now[u], &p->disk[v].now[u], REGION_UNITS * sizeof(a)) == 0) {
				u += REGION_UNITS - 1;
				continue;
			}
			if (a < h->reign_from || a <= p->disk[v].now[u] || w->writes[a].host != h->id ||
			    model_shows(w, a) == model_shows(w, p->disk[v].now[u]) || model_in_flight(h, v, u))
				continue;
			uint64_t region = ((uint64_t)u * WORLD_UNIT) >> REGION_SHIFT;
			if (!bitmap_test(&repl_volume_state(h->core, v)->dirty, region))
				world_fail(w, "host %u: unit %u of volume %u is not on the peer, and is not dirty here",
					   h->id, u, v);
			lost += region != last;
			last = region;
			const struct told *told = &h->told[v][u];
			/* What it had applied and lost with its power was acknowledged, perhaps by a word that was on
			 * its way then: nobody here has heard of it. */
			if (told->v != a || told->ns < p->died_ns || p->life != h->peer_life)
				continue;
			if (s.rpo_known && s.rpo_ns < w->now - told->ns)
				world_fail(w,
					   "host %u: status says an RPO of %" PRIu64 " us; unit %u of volume %u was "
					   "answered %" PRIu64 " us ago, and the peer does not have it",
					   h->id, s.rpo_ns / US, u, v, (w->now - told->ns) / US);
		}
	}
	if (s.dirty_bytes < (lost << REGION_SHIFT) / 2)
		world_fail(w, "host %u: status says that %" PRIu64 " bytes are dirty: %" PRIu64 " regions are", h->id,
			   s.dirty_bytes, lost);
}

/* ---- commands ---- */

/* What an answered command has done is in the record, durably. */
static bool command_did(struct host *h, const struct repl_command *c)
{
	const struct repl_meta *m = h->seen, *p = peer_of(h)->seen;
	struct settings want = m->settings;
	switch (c->cmd) {
	case CMD_PROTECT:
	case CMD_FAILBACK:
	case CMD_START:
		return m->role == ROLE_PRIMARY && m->state == STATE_RUNNING;
	case CMD_UNPROTECT:
		return m->role == ROLE_STANDALONE && m->state == STATE_DONE && !m->has_peer && !m->split_brain;
	case CMD_RESOLVE:
		return !m->split_brain && m->role == (c->number == DISCARD_LOCAL ? ROLE_SECONDARY : ROLE_PRIMARY);
	case CMD_STOP:
		return m->state == STATE_DONE;
	case CMD_FAILOVER:
		return m->role == ROLE_STANDALONE && m->failover_generation && m->state != STATE_FAILOVER_FAILED;
	case CMD_SETTINGS: /* the peer's too, if it answered; else the next handshake brings them */
		settings_take(&want, &c->settings, c->number);
		return memcmp(&m->settings, &want, sizeof(want)) == 0 &&
		       (!repl_forwarding(h->core) || p->role != ROLE_SECONDARY || !p->has_peer || !peer_of(h)->up ||
			memcmp(&p->settings, &want, sizeof(want)) == 0);
	case CMD_IDS:
		for (uint32_t i = 0; i < m->n_volumes; i++)
			if (m->volumes[i].id != c->ids[i])
				return false;
		return true;
	case CMD_RESIZE:
		h->w->count.resized++;
		return m->volumes[c->flags].size >= c->number;
	case CMD_DROP:
		return repl_meta_find_ckpt(m, c->number) < 0;
	case CMD_PAUSE:
	case CMD_RESUME:
		return m->paused == (c->cmd == CMD_PAUSE);
	case CMD_SWITCHOVER:
		return m->role == ROLE_SECONDARY && m->switched && m->state == STATE_RUNNING;
	case CMD_HOLD:
		return repl_meta_find_ckpt(m, c->result) >= 0;
	case CMD_CLONE:
	case CMD_UNCLONE:
		return (repl_meta_find_clone(m, c->text) >= 0) == (c->cmd == CMD_CLONE);
	case CMD_UNHOLD:
	case CMD_CHECKPOINT:
	case CMD_DISCARD:
	case CMD_RESYNC:
	case CMD_VERIFY:
	case CMD_VERIFY_CANCEL:
		return true;
	}
	return true;
}

/* SPEC 14: what is refused for a split brain is exit 8, a checkpoint without a connection 6. */
void status_command(struct host *h, const struct sim_command *sc, int error)
{
	const struct repl_meta *m = repl_meta(h->core);
	const struct repl_command *c = &sc->c;
	struct repl_status s;
	if (error == 0 && !command_did(h, c))
		world_fail(h->w, "host %u: command %d is answered and not done (%s, %s%s)", h->id, c->cmd,
			   role_name(h->seen->role), state_name(h->seen->state), h->seen->split_brain ? ", split" : "");
	if (error == 0 || error == -ERR_CANCELED || h->closing)
		return;
	repl_status(h->core, h->w->now, &s);
	bool starts = c->cmd == CMD_FAILBACK || (c->cmd == CMD_START && m->role != ROLE_STANDALONE);
	if (m->split_brain && starts && error != -ERR_SPLIT)
		world_fail(h->w, "host %u: command %d in a split brain is refused with %s", h->id, c->cmd,
			   err_name(error));
	/* One that was under way as the connection ended may have failed of something else before. */
	if (c->cmd == CMD_CHECKPOINT && m->role != ROLE_STANDALONE && m->state == STATE_RUNNING && sc->down &&
	    s.link == LINK_DOWN && error != -ERR_PEER)
		world_fail(h->w, "host %u: a checkpoint without a connection is refused with %s", h->id,
			   err_name(error));
}

/* Settings are the group's: in sync, and no change of them under way, both hosts have the same. */
void status_check_settings(struct host *h)
{
	struct host *p = peer_of(h);
	for (const struct sim_command *c = h->commands; c; c = c->next)
		if (c->c.cmd == CMD_SETTINGS)
			return;
	if (repl_forwarding(h->core) && world_link(h->w, h->id) == LINK_SYNCED &&
	    world_link(h->w, p->id) == LINK_SYNCED &&
	    memcmp(&h->seen->settings, &p->seen->settings, sizeof(struct settings)) != 0)
		world_fail(h->w, "host %u: in sync, and the peer has other settings", h->id);
}

/* In sync, and no faults for long. */
void status_check_clean(struct world *w)
{
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		struct repl_status s;
		repl_status(w->h[i].core, w->now, &s);
		if (s.degraded || s.n_reasons || s.error.code || s.dirty_bytes)
			world_fail(w, "host %u: in sync, and status says: %s", i,
				   s.n_reasons ? s.reasons[0] : "something is dirty, or an error stands");
		if (i == 1)
			continue;
		struct repl_status t;
		repl_status(w->h[1].core, w->now, &t);
		if (s.checkpoint != t.checkpoint)
			world_fail(w, "the newest checkpoint is %" PRIu64 " on host 0, %" PRIu64 " on host 1",
				   s.checkpoint, t.checkpoint);
	}
}
