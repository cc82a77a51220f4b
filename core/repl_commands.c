/* Commands of the host's administrator: what refuses each, and what it begins. A refusal names the state and what to do
 * instead. Those with a part of their own are there: failover (repl_failover.c), resync of a detached disk
 * (repl_detach.c), the drop of a checkpoint (repl_history.c), who holds one (repl_hold.c), verify (repl_verify.c).
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

static bool is_primary(const struct repl *r)
{
	return r->meta->role == ROLE_PRIMARY;
}

#define SPLIT_TEXT "split brain: both hosts wrote alone; see `diverged`, then `resolve`"

/* A command that the peer has to connect for, or that gets several tries, gives up then. */
uint64_t repl_wait_until(const struct repl *r)
{
	return r->now_ns + r->meta->settings.peer_timeout_ms * UINT64_C(1000000) + DIALLED_WAIT_NS;
}

/* A session stands that is not on its way out: after a stop and an `unprotect` one is for a moment. */
static bool session_stands(const struct repl *r)
{
	return r->link > LINK_HANDSHAKE && !r->closing;
}

static void dial_for(struct repl *r, struct repl_command *c)
{
	if (r->link != LINK_DOWN) /* the old primary dials */
		session_drop(r, "this host dials itself");
	r->protect = c;
	(void)snprintf(r->dial_addr, sizeof(r->dial_addr), "%s", c->text);
	session_dial(r);
}

static void refuse_committing(struct repl *r, struct repl_command *c)
{
	if (r->meta->state == STATE_FAILOVER_FAILED)
		repl_command_done(r, c, -ERR_STATE,
				  "the commit of a failover failed (FAILOVER_FAILED); see `error`, mend that and give "
				  "`failover` again");
	else
		repl_command_done(r, c, -ERR_STATE,
				  "a failover is being committed (FAILOVER); wait with `wait --for=done`");
}

/* A command would undo what another one, or the peer's protect, is about to do; or what a JOIN says of this host is not
 * what its record will say in a moment. */
static bool role_changing(const struct repl *r)
{
	return r->protect || r->start || r->start_waits || r->resolve || r->failing_over || r->adopting ||
	       repl_tx_pending(r, TX_SECONDARY) || repl_tx_pending(r, TX_RESTART) || repl_tx_pending(r, TX_UNPROTECT);
}

static void cmd_protect(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	if (m->role != ROLE_STANDALONE)
		repl_command_done(r, c, -ERR_STATE, "this host is %s for it already; %s", role_name(m->role),
				  is_primary(r) ? "see `status`" : "run it on the host that has the VM");
	else if (m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED)
		refuse_committing(r, c);
	else if (m->split_brain)
		repl_command_done(r, c, -ERR_SPLIT, SPLIT_TEXT "; `unprotect` forgets the other copy");
	else if (role_changing(r) || session_stands(r))
		repl_command_done(r, c, -ERR_BUSY, "another protect, of this host or of its peer, is under way");
	else if (m->n_volumes == 0)
		repl_command_done(r, c, -ERR_STATE, "the group has no volumes; `create` one first");
	else
		dial_for(r, c);
}

static void cmd_failback(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	if (m->split_brain)
		repl_command_done(r, c, -ERR_SPLIT, SPLIT_TEXT);
	else if (m->role == ROLE_PRIMARY && (r->stop || repl_tx_pending(r, TX_STOPPED)))
		repl_command_done(r, c, -ERR_BUSY, "a stop is under way");
	else if (m->role == ROLE_PRIMARY && m->state == STATE_RUNNING && strcmp(m->peer, c->text) == 0)
		repl_command_done(r, c, 0, " "); /* the same again */
	else if (m->role == ROLE_PRIMARY)
		repl_command_done(r, c, -ERR_STATE, "this host is primary for it already; see `status`");
	else if (m->role == ROLE_SECONDARY)
		repl_command_done(r, c, -ERR_STATE,
				  "this host is secondary for it; run it on the one that failed over");
	else if (m->failover_generation == 0)
		repl_command_done(r, c, -ERR_STATE, "it has not failed over here; `protect` begins a protection");
	else if (m->state != STATE_DONE)
		refuse_committing(r, c);
	else if (role_changing(r) || r->link > LINK_HANDSHAKE)
		repl_command_done(r, c, -ERR_BUSY, "another command is changing its role");
	else
		dial_for(r, c);
}

static void cmd_resolve(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	bool local = c->number == DISCARD_LOCAL;
	if (!m->split_brain && repl_tx_pending(r, TX_SPLIT)) {
		repl_command_done(r, c, -ERR_BUSY, "the split brain has just been found and is being recorded; again");
	} else if (!m->split_brain && m->role == (local ? ROLE_SECONDARY : ROLE_PRIMARY)) {
		c->result = m->kept;
		repl_command_done(r, c, 0, " "); /* the same again: so it is already */
	} else if (!m->split_brain) {
		repl_command_done(r, c, -ERR_STATE, "there is no split brain here (%s, %s)", role_name(m->role),
				  state_name(m->state));
	} else if (m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED) {
		refuse_committing(r, c);
	} else if (!local && (detach_any(r) || repl_meta_flagged(m, VOLUME_STALE))) {
		repl_command_done(
		    r, c, -ERR_STATE,
		    "a disk of it here is detached: what it lacks is in the peer's copy only, so that can't "
		    "be discarded. `resolve --discard local` takes all from there; `unprotect --force` takes "
		    "the disk as it is");
	} else if (r->resolve || role_changing(r)) {
		repl_command_done(r, c, -ERR_BUSY, "another command is changing its role");
	} else {
		r->resolve = c;
		r->resolve_until_ns = repl_wait_until(r);
		r->redial_ns = r->now_ns;
	}
}

static void cmd_start(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	if (m->role == ROLE_STANDALONE)
		repl_command_done(r, c, -ERR_STATE, "it has no peer; `protect` it first");
	else if (m->split_brain)
		repl_command_done(r, c, -ERR_SPLIT, SPLIT_TEXT);
	else if (m->state == STATE_RUNNING)
		repl_command_done(r, c, -ERR_STATE, "it runs already");
	else if (m->role == ROLE_SECONDARY)
		repl_command_done(r, c, -ERR_STATE, "this host is secondary for it; run it on the primary");
	else if (r->start || r->start_waits || (m->peer[0] && r->link != LINK_DOWN && !r->closing))
		repl_command_done(r, c, -ERR_BUSY, "another start is under way");
	else if (m->peer[0] == 0) {
		/* The peer dials, and goes on doing so while replication is stopped. */
		if (r->link != LINK_DOWN)
			session_drop(r, "a start came after its JOIN");
		r->start = c;
		r->start_until_ns = repl_wait_until(r);
	} else if (r->link != LINK_DOWN)
		r->start_waits = c;
	else {
		r->start = c;
		(void)snprintf(r->dial_addr, sizeof(r->dial_addr), "%s", m->peer);
		if (!r->dialing) /* else the one under way serves */
			session_dial(r);
	}
}

/* The peer's daemon lives, and its disk hangs perhaps: its handshake does not end. For a stop that is as if it were not
 * there, else nobody could end replication here. */
static bool handshake_hangs(const struct repl *r)
{
	return r->link == LINK_HANDSHAKE && !r->closing &&
	       r->now_ns - r->link_since_ns > r->meta->settings.peer_timeout_ms * UINT64_C(1000000);
}

static void cmd_stop(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	enum link_state link = r->closing ? LINK_DOWN : r->link;
	if (m->role == ROLE_STANDALONE || m->state != STATE_RUNNING) {
		repl_command_done(r, c, -ERR_STATE, "it does not run (%s, %s)", role_name(m->role),
				  state_name(m->state));
		return;
	}
	if (r->stop) {
		repl_command_done(r, c, -ERR_BUSY, "another stop is under way");
		return;
	}
	if (repl_tx_pending(r, TX_STOPPED)) {
		repl_command_done(r, c, -ERR_BUSY, "another stop is under way");
	} else if (r->handing != HAND_NONE || r->taking) {
		repl_command_done(r, c, -ERR_BUSY, "a switchover is under way");
	} else if (is_primary(r) && r->is_target) {
		repl_command_done(r, c, -ERR_BUSY,
				  "the peer's `resolve` is under way: this copy is given up, and follows from then on");
	} else if (is_primary(r) && detach_any(r) && r->link != LINK_DOWN && !m->split_brain) {
		repl_command_done(
		    r, c, -ERR_STATE,
		    "a local disk is detached: only the peer holds its content; `resync` it first, or fail over there");
	} else if (repl_meta_flagged(m, VOLUME_PEER_STALE)) {
		repl_command_done(
		    r, c, -ERR_STATE,
		    "the primary's disk is detached: it writes through this host; `resync` it there first, "
		    "or `failover`");
	} else if (is_primary(r) && (link == LINK_DOWN || m->split_brain || handshake_hangs(r))) {
		if (handshake_hangs(r))
			session_drop(r, "this host is stopped beside a handshake that does not end");
		struct tx *t = repl_tx(r, TX_STOPPED);
		t->command = c;
	} else if (link != LINK_SYNCED) {
		repl_command_done(r, c, -ERR_STATE, "the link is %s, not SYNCED; %s", link_state_name(link),
				  !is_primary(r) ? "use `failover` if the primary is lost"
				  : m->paused	 ? "it is paused: `resume` it, then `wait --for=in-sync`"
						 : "`wait --for=in-sync` first");
	} else if (is_primary(r)) {
		r->stop = c;
		c->phase = 0;
		primary_stop_begin(r);
	} else {
		r->stop = c;
		session_send(r, WIRE_STOP_WANT, 0, 0, 0, 0, NULL, 0);
	}
}

static void cmd_unprotect(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	bool stale = repl_meta_flagged(m, VOLUME_STALE) || detach_any(r), force = (c->flags & UNPROTECT_FORCE) != 0;
	if (m->role == ROLE_STANDALONE && !m->has_peer && !m->split_brain)
		repl_command_done(r, c, -ERR_STATE, "it is standalone already: it has no peer to forget");
	else if (m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED)
		refuse_committing(r, c);
	else if (m->inconsistent)
		repl_command_done(
		    r, c, -ERR_STATE,
		    "the sync of this copy has not ended: its disk is incomplete. `failover --force` goes "
		    "back to what it held before");
	else if (stale && !force)
		repl_command_done(
		    r, c, -ERR_STATE,
		    "a disk of it here is detached and not current, only the peer holds its content; `resync` it, "
		    "or fail over there. If the peer is lost for good or has forgotten this host, `--force` takes the "
		    "disk as it is, without what was written through the peer");
	else if (stale && primary_live(r))
		repl_command_done(r, c, -ERR_STATE,
				  "the peer is connected and holds what the detached disk lacks; `resync` it, or fail "
				  "over there");
	else if (role_changing(r))
		repl_command_done(r, c, -ERR_BUSY, "another command is changing its role");
	else if (m->state == STATE_RUNNING) { /* by the rules of `stop`; then repl_stopped */
		if (stale && r->link == LINK_HANDSHAKE)
			session_drop(r, "the detached disk is unprotected");
		cmd_stop(r, c);
	} else if (r->is_target ||
		   !secondary_quiet(r)) /* what comes would be applied to a disk that is its host's own */
		repl_command_done(r, c, -ERR_BUSY,
				  "the primary's sync of this copy is under way (the link is %s); "
				  "`wait --for=in-sync`, or `unprotect` it on the primary first",
				  link_state_name(r->link));
	else
		repl_tx(r, TX_UNPROTECT)->command = c;
}

void repl_stopped(struct repl *r, struct repl_command *c)
{
	if (c && c->cmd == CMD_UNPROTECT)
		repl_tx(r, TX_UNPROTECT)->command = c;
	else
		repl_command_done(r, c, 0, " ");
}

static void cmd_checkpoint(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	enum link_state link = repl_link(r, r->now_ns);
	if (m->role == ROLE_STANDALONE || m->state != STATE_RUNNING)
		repl_command_done(r, c, -ERR_STATE, "it does not run (%s, %s); `protect` or `start` it first",
				  role_name(m->role), state_name(m->state));
	else if (link == LINK_DOWN || link == LINK_HANDSHAKE)
		repl_command_done(r, c, -ERR_PEER, "%s is not connected; a checkpoint needs it in sync",
				  repl_peer_text(r));
	else if (link != LINK_SYNCED)
		repl_command_done(r, c, -ERR_STATE, "the link is %s, not SYNCED; %s", link_state_name(link),
				  m->paused ? "it is paused: `resume` it, then `wait --for=in-sync`"
					    : "`wait --for=in-sync` first");
	else if (r->stopping)
		repl_command_done(r, c, -ERR_STATE, "it is being %s",
				  r->handing != HAND_NONE ? "switched over" : "stopped");
	else if (is_primary(r))
		primary_checkpoint(r, c, WIRE_CKPT_COMMAND | c->flags);
	else if (r->want_ckpt)
		repl_command_done(r, c, -ERR_BUSY, "another checkpoint asked for here is under way");
	else {
		r->want_ckpt = c;
		session_send(r, WIRE_CHECKPOINT_WANT, 0, c->flags | WIRE_CKPT_COMMAND, 0, 0, NULL, 0);
	}
}

static void cmd_pause(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	bool pause = c->cmd == CMD_PAUSE;
	if (m->role == ROLE_SECONDARY)
		repl_command_done(r, c, -ERR_STATE, "this host is secondary for it; run it on the primary");
	else if (m->role != ROLE_PRIMARY || m->state != STATE_RUNNING)
		repl_command_done(r, c, -ERR_STATE, "it does not run (%s, %s)", role_name(m->role),
				  state_name(m->state));
	else if (m->split_brain)
		repl_command_done(r, c, -ERR_SPLIT,
				  "split brain: both hosts wrote alone; see `diverged`, then `resolve`");
	else if (r->stopping || repl_tx_pending(r, TX_STOPPED))
		repl_command_done(r, c, -ERR_BUSY, "it is being %s",
				  r->handing != HAND_NONE ? "switched over" : "stopped");
	else if (repl_tx_pending(r, TX_PAUSE))
		repl_command_done(r, c, -ERR_BUSY, "another pause or resume is under way");
	else if (m->paused == pause)
		repl_command_done(r, c, 0, " ");
	else if (pause && detach_any(r))
		repl_command_done(r, c, -ERR_STATE,
				  "a local disk is detached: its I/O goes through the peer; `resync` it first");
	else {
		struct tx *t = repl_tx(r, TX_PAUSE);
		t->command = c;
		t->arg = pause;
	}
}

static void cmd_discard(struct repl *r, struct repl_command *c)
{
	if (r->meta->role != ROLE_SECONDARY || r->meta->state != STATE_RUNNING)
		repl_command_done(r, c, -ERR_STATE,
				  "only a running secondary has an active overlay to discard (%s, %s)",
				  role_name(r->meta->role), state_name(r->meta->state));
	else if (r->failing_over)
		repl_command_done(r, c, -ERR_BUSY, "a failover is under way");
	else if (repl_tx_pending(r, TX_DISCARD))
		repl_command_done(r, c, -ERR_BUSY, "another discard is under way");
	else
		repl_tx(r, TX_DISCARD)->command = c;
}

static void cmd_settings(struct repl *r, struct repl_command *c)
{
	if (r->meta->role == ROLE_SECONDARY) {
		repl_command_done(r, c, -ERR_STATE,
				  "this host is secondary for it; set it on the primary, the peer gets it from there");
		return;
	}
	if (r->setting || repl_tx_pending(r, TX_SETTINGS)) {
		repl_command_done(r, c, -ERR_BUSY, "another change of settings is under way");
		return;
	}
	struct tx *t = repl_tx(r, TX_SETTINGS);
	t->command = c;
	t->settings = c->settings;
	t->arg = c->number;
}

/* A peer that is connected knows the volumes by their ids: they change while there is none. */
static void cmd_ids(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	if (m->role != ROLE_STANDALONE) {
		repl_command_done(r, c, -ERR_STATE, "this host is %s for it already; %s", role_name(m->role),
				  is_primary(r) ? "see `status`" : "run it on the host that has the VM");
		return;
	}
	if (role_changing(r) || session_stands(r) || repl_tx_pending(r, TX_IDS)) {
		repl_command_done(r, c, -ERR_BUSY, "another command is changing its role");
		return;
	}
	if (r->link != LINK_DOWN) /* one that ends, or the old primary's */
		session_drop(r, "its volumes get other ids");
	repl_tx(r, TX_IDS)->command = c;
}

void repl_command(struct repl *r, struct repl_command *c)
{
	if (r->shutdown) {
		repl_command_done(r, c, -ERR_CANCELED, "the daemon is shutting down");
		return;
	}
	switch (c->cmd) {
	case CMD_PROTECT:
		cmd_protect(r, c);
		break;
	case CMD_FAILBACK:
		cmd_failback(r, c);
		break;
	case CMD_UNPROTECT:
		cmd_unprotect(r, c);
		break;
	case CMD_RESOLVE:
		cmd_resolve(r, c);
		break;
	case CMD_START:
		cmd_start(r, c);
		break;
	case CMD_STOP:
		cmd_stop(r, c);
		break;
	case CMD_CHECKPOINT:
		cmd_checkpoint(r, c);
		break;
	case CMD_FAILOVER:
		failover_begin(r, c);
		break;
	case CMD_DISCARD:
		cmd_discard(r, c);
		break;
	case CMD_SETTINGS:
		cmd_settings(r, c);
		break;
	case CMD_IDS:
		cmd_ids(r, c);
		break;
	case CMD_DROP:
		history_drop(r, c);
		break;
	case CMD_HOLD:
		hold_command(r, c);
		break;
	case CMD_UNHOLD:
		hold_release(r, c);
		break;
	case CMD_CLONE:
	case CMD_UNCLONE:
		clone_command(r, c);
		break;
	case CMD_PAUSE:
	case CMD_RESUME:
		cmd_pause(r, c);
		break;
	case CMD_RESYNC:
		detach_resync(r, c);
		break;
	case CMD_SWITCHOVER:
		switchover_command(r, c);
		break;
	case CMD_RESIZE:
		resize_command(r, c);
		break;
	case CMD_VERIFY:
		verify_begin(r, c);
		break;
	case CMD_VERIFY_CANCEL:
		verify_cancel(r, c);
		break;
	}
}
