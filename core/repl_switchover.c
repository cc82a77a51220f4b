/* The planned change of roles (SPEC 7; docs/adr/0012-switchover.md): the primary steps down first, durably, and then
 * the secondary takes over. So there is no moment with two primaries.
 *
 *   primary                                             secondary
 *   no request starts, those under way end, one clear
 *   cycle: nothing is dirty
 *   CHECKPOINT n with HAND_OVER      ────────────────▶  a checkpoint as any that was not given as a command: void if
 *                                                       active is not empty. From then on no write to the view starts
 *                                                       (`armed`), until the session ends or anything else follows
 *   one write: secondary, RUNNING on ◀────────────────  CHECKPOINT_ACK
 *   checkpoint n, `handed`; what waits, and what open
 *   handles ask for from here on, is EIO
 *   TAKE_OVER n                      ────────────────▶  one write: primary, RUNNING. Its requests are held until the
 *                                                       handshake, as a restarted primary's are
 *   the command is answered          ◀────────────────  TOOK_OVER n, and both end the session: the next one goes the
 *                                                       other way, with equal generations and nothing dirty
 *
 * What holds, wherever it is cut or a host is killed:
 *   - before the first of the two writes nothing has changed: the primary goes on, at the latest when the session ends;
 *   - between them there are two secondaries, RUNNING on the same checkpoint, with the same disk: nothing was dirty,
 *     which means durable on both [LOCALDUR]. No guest writes to a disk. `handed` is in the JOIN, and whoever has a
 *     whole copy at that checkpoint takes over when it hears it (LINEAGE_TAKE_OVER): this goes on, never back;
 *   - after the second the roles are swapped, and what is left is an ordinary handshake.
 * If a host is lost for good between the two, `failover` on the other is what it always is. No generation begins here:
 * one does when a host writes alone, and a secondary is never a source (SPEC 8: not at promotion alone).
 */
#include "core/repl_internal.h"

#include <stdio.h>

#include "core/check.h"

/* ---- the primary ---- */

/* It is over for this session: requests go on. A command goes on waiting for the peer to take over. */
static void hand_end(struct repl *r)
{
	r->handing = HAND_NONE;
	r->stopping = r->stop_cleared = false;
	r->stop_number = 0;
}

static void hand_done(struct repl *r, int error, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void hand_done(struct repl *r, int error, const char *fmt, ...)
{
	char text[ERR_TEXT_MAX];
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	hand_end(r);
	while (r->switchover) {
		struct repl_command *c = r->switchover;
		r->switchover = c->next;
		c->result = r->meta->last_stream;
		repl_command_done(r, c, error, "%s", text);
	}
}

static void wait_with(struct repl *r, struct repl_command *c)
{
	c->next = r->switchover;
	r->switchover = c;
}

/* Given again where it has been done, or is on its way. */
static void again(struct repl *r, struct repl_command *c)
{
	if (!r->meta->handed) { /* at which checkpoint is not remembered */
		repl_command_done(r, c, 0, " ");
		return;
	}
	wait_with(r, c);
	r->switchover_until_ns = repl_wait_until(r);
	r->redial_ns = r->now_ns;
}

void switchover_command(struct repl *r, struct repl_command *c)
{
	const struct repl_meta *m = r->meta;
	enum link_state link = repl_link(r, r->now_ns);
	if (m->role == ROLE_SECONDARY && m->switched)
		again(r, c);
	else if (m->role == ROLE_SECONDARY)
		repl_command_done(r, c, -ERR_STATE, "this host is secondary for it; run it on the primary (%s)",
				  m->peer[0] ? m->peer : "the peer");
	else if (m->role != ROLE_PRIMARY || m->state != STATE_RUNNING)
		repl_command_done(r, c, -ERR_STATE, "it does not run (%s, %s); %s", role_name(m->role),
				  state_name(m->state),
				  m->role == ROLE_PRIMARY	? "`start` it first"
				  : m->failover_generation != 0 ? "`failback` it first"
								: "`protect` it first");
	else if (m->split_brain)
		repl_command_done(r, c, -ERR_SPLIT,
				  "split brain: both hosts wrote alone; see `diverged`, then `resolve`");
	else if (r->handing != HAND_NONE)
		wait_with(r, c);
	else if (r->stopping || repl_tx_pending(r, TX_STOPPED))
		repl_command_done(r, c, -ERR_BUSY, "it is being stopped");
	else if (r->rz.c)
		repl_command_done(r, c, -ERR_BUSY, "a volume of it is being resized");
	else if (detach_any(r))
		repl_command_done(r, c, -ERR_STATE,
				  "a local disk is detached: only the peer holds its content; `resync` it first, or "
				  "`failover` on the peer");
	else if (m->paused || repl_tx_pending(r, TX_PAUSE))
		repl_command_done(r, c, -ERR_STATE, "it is paused: `resume` it, then `wait --for=in-sync`");
	else if (link != LINK_SYNCED)
		repl_command_done(r, c, -ERR_STATE, "the link is %s, not SYNCED; %s", link_state_name(link),
				  link == LINK_DOWN ? "the peer has to be there to take over"
						    : "`wait --for=in-sync` first");
	else {
		wait_with(r, c);
		r->handing = HAND_DRAIN;
		primary_stop_begin(r);
	}
}

/* Whether its checkpoint may be sent: all has ended and been answered, and nothing is dirty, so both disks are equal
 * and durable. */
bool switchover_ready(struct repl *r)
{
	if (r->acks.head || r->handing != HAND_DRAIN)
		return false;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		if (r->vol[i].dirty.count) {
			hand_done(r, -ERR_IO,
				  "what was written to %s is not known to be durable here, as a local flush "
				  "failed; this host goes on as the primary. See `error`; `failover` on the peer "
				  "does without this disk",
				  r->meta->volumes[i].name);
			return false;
		}
	r->handing = HAND_CKPT;
	return true;
}

void switchover_void(struct repl *r, unsigned why)
{
	hand_done(r, -ERR_STATE,
		  why == WIRE_VOID_ACTIVE
		      ? "the active overlay on the peer is not empty: something writes to the secondary's view; "
			"end that, `discard` it there, then give this again"
		      : "the peer could not take the last checkpoint; see `error` there");
	repl_gate_run(r);
}

void switchover_behind(struct repl *r)
{
	hand_done(r, -ERR_STATE,
		  "a local write failed meanwhile, so the peer does not have all any more; this host goes on as the "
		  "primary. See `error`; `failover` on the peer does without this disk");
}

void switchover_checkpointed(struct repl *r, uint64_t number)
{
	r->handing = HAND_SAVE;
	repl_tx(r, TX_HAND_OVER)->number = number;
}

/* TX_HAND_OVER decides, where it waits to be saved: it applies in its own session only, or is under way. */
void switchover_session_lost(struct repl *r)
{
	if (repl_tx_pending(r, TX_HAND_OVER))
		return;
	if (r->meta->role == ROLE_SECONDARY)
		hand_end(r);
	else
		hand_done(r, -ERR_PEER,
			  "the connection was lost; nothing was changed, this host goes on as the primary");
}

static bool prepare_hand_over(struct repl *r, struct tx *t, struct repl_meta *m)
{
	if (t->session != r->session || !primary_live(r) || r->link != LINK_SYNCED || m->role != ROLE_PRIMARY ||
	    m->state != STATE_RUNNING)
		return false;
	if (m->n_ckpts && m->ckpts[m->n_ckpts - 1].number > t->number) /* a job's own came in between */
		return false;
	if (!history_make_room(r, t, m, CKPTS_LAST))
		return false;
	t->opened = t->number;
	history_add(r, m, t->number, CKPT_STREAM, 0);
	m->role = ROLE_SECONDARY;
	m->base = m->last_stream = t->number;
	secondary_fresh_active(t, m);
	lineage_in_sync(&m->lineage);
	m->diverged_ns = 0;
	m->broken = false;
	m->handed = m->switched = true;
	return true;
}

static void handed_over(struct repl *r, struct tx *t, int error)
{
	if (error) {
		bool lost = t->session != r->session || !primary_live(r) || r->link != LINK_SYNCED;
		hand_done(r,
			  error != -ERR_CANCELED ? error
			  : lost		 ? -ERR_PEER
						 : -ERR_BUSY,
			  "%s; nothing was changed, this host goes on as the primary",
			  error != -ERR_CANCELED ? "the group's record could not be saved"
			  : lost		 ? "the connection was lost"
			  : r->meta->n_ckpts >= CKPTS_LAST
			      ? CKPTS_FULL_TEXT
			      : "a job took a checkpoint of its own meanwhile: give it again");
		if (!lost)
			(void)primary_barrier(r); /* tells the peer, whose view's writers wait */
		return;
	}
	repl_log(r, 1, "handed over to the peer at checkpoint %llu; handles opened before answer EIO",
		 (unsigned long long)t->number);
	repl_fail_list(r, &r->gated, -ERR_IO);
	repl_stepped_down(r);
	r->was_connected = false;
	r->switchover_until_ns = repl_wait_until(r);
	if (t->session != r->session || !primary_live(r)) {
		hand_end(r);
		return;
	}
	r->handing = HAND_TOLD;
	session_send(r, WIRE_TAKE_OVER, 0, t->number, 0, 0, NULL, 0);
}

/* The peer is the primary: it has said so, or its JOIN has. */
void switchover_taken(struct repl *r)
{
	if (r->switchover && r->meta->handed)
		hand_done(r, 0, " ");
}

void switchover_took_over(struct repl *r, const struct wire_frame *f)
{
	if (r->handing != HAND_TOLD || f->offset != r->meta->last_stream) {
		session_protocol_error(r, "TOOK_OVER out of order");
		return;
	}
	switchover_taken(r);
	session_drop(r, "the peer has taken over; what follows comes from there");
	session_redial(r); /* at once: the peer's guests wait for it */
}

void switchover_refused(struct repl *r, int code, const char *text)
{
	if (r->switchover && r->meta->handed && code != -ERR_BUSY)
		hand_done(r, code, "%s", text);
}

void switchover_tick(struct repl *r)
{
	if (!r->meta->handed || r->now_ns < r->switchover_until_ns)
		return;
	if (r->handing == HAND_TOLD) /* it may hang: the next handshake asks again */
		session_drop(r, "the peer has not taken over in time");
	if (r->switchover)
		hand_done(r, -ERR_PEER,
			  "this host has handed over and is secondary now, but the peer has not been heard to "
			  "have taken over; it does so as soon as they are connected. If it is lost, `failover` "
			  "here");
}

/* ---- the secondary ---- */

static void take_over(struct repl *r, uint64_t number)
{
	r->taking = true;
	r->taking_session = r->session; /* who is answered: the newest that asked */
	r->taking_number = number;
	switchover_settle(r);
}

void switchover_frame(struct repl *r, const struct wire_frame *f)
{
	if (r->armed == 0 || f->offset != r->armed || r->link != LINK_SYNCED)
		session_protocol_error(r, "TAKE_OVER out of order");
	else
		take_over(r, f->offset);
}

/* The peer's JOIN says that it has handed over. */
void switchover_join(struct repl *r)
{
	take_over(r, r->theirs.last_stream);
}

/* Whether active is empty is looked at when no write to the view is under way; new ones wait (gate_open). */
void switchover_settle(struct repl *r)
{
	if (r->switchover && r->handing == HAND_NONE && !r->meta->handed)
		hand_done(r, -ERR_STATE, "a failover here has come first: this host's copy is the live one again");
	if (!r->taking || r->take_busy || r->writes_in_flight || !secondary_quiet(r) ||
	    repl_tx_pending(r, TX_TAKE_OVER))
		return;
	r->take_busy = true;
	r->take_io.kind = REPL_FLUSH;
	r->take_io.ext_len = 0;
	repl_submit(r, &r->take_io, TARGET_CKPT);
}

static void take_over_failed(struct repl *r, int error, const char *matter)
{
	bool current = r->taking_session == r->session && r->link != LINK_DOWN && !r->closing;
	r->taking = false;
	r->armed = 0;
	repl_set_error(r, error, "switchover", -1, 0, 0, "%s", matter);
	if (current)
		session_refuse(r, error, matter);
	repl_gate_run(r);
}

void switchover_synced(struct repl *r, int error)
{
	r->take_busy = false;
	if (error)
		take_over_failed(r, error, "the host that is to take over could not flush its disk");
	else if (r->take_io.ext_len)
		take_over_failed(r, -ERR_STATE,
				 "the active overlay of the host that is to take over is not empty: `discard` it "
				 "there, and it takes over by itself");
	else
		repl_tx(r, TX_TAKE_OVER)->number = r->taking_number;
}

static bool prepare_take_over(struct repl *r, struct tx *t, struct repl_meta *m)
{
	if (m->role != ROLE_SECONDARY || m->state != STATE_RUNNING || m->inconsistent || m->split_brain || m->broken ||
	    m->last_stream != t->number || r->failing_over)
		return false;
	m->role = ROLE_PRIMARY;
	m->base = 0;
	m->target = m->received = m->received_bytes = m->failover_generation = 0;
	m->alone = m->shut_out = m->handed = m->switched = false;
	return true;
}

static void took_over(struct repl *r, struct tx *t, int error)
{
	if (error) {
		take_over_failed(r, error == -ERR_CANCELED ? -ERR_STATE : error,
				 error == -ERR_CANCELED ? "this copy is not at the checkpoint that was handed over"
							: "the host that is to take over could not save its record");
		return;
	}
	bool current = r->taking_session == r->session && r->link != LINK_DOWN && !r->closing;
	r->taking = false;
	r->armed = 0;
	r->was_connected = false;
	r->error.code = 0;
	r->applied_ns = r->now_ns;
	/* What its guests ask for waits for the session that follows at once, so that it needs no generation. */
	r->holding = true;
	r->hold_until_ns = r->now_ns + r->meta->settings.peer_timeout_ms * UINT64_C(1000000);
	repl_log(r, 1, "taken over at checkpoint %llu: this host is primary now", (unsigned long long)t->number);
	if (!current)
		return;
	if (r->link == LINK_HANDSHAKE && !r->dialer) {
		session_answer(r);
		return;
	}
	if (r->link != LINK_HANDSHAKE)
		session_send(r, WIRE_TOOK_OVER, 0, t->number, 0, 0, NULL, 0);
	session_close(r, true);
	session_link_down(r, -ERR_PEER, "this host has taken over; what follows goes from here");
	r->session = 0;
	r->redial_ns = r->now_ns;
	session_redial(r);
}

/* ---- both ---- */

bool switchover_prepare(struct repl *r, struct tx *t, struct repl_meta *m)
{
	return t->kind == TX_HAND_OVER ? prepare_hand_over(r, t, m) : prepare_take_over(r, t, m);
}

void switchover_tx_done(struct repl *r, struct tx *t, int error)
{
	if (t->kind == TX_HAND_OVER)
		handed_over(r, t, error);
	else
		took_over(r, t, error);
}
