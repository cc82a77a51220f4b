/* Sessions: dialling, the exchange of JOINs, the decision who syncs to whom, keep-alive, the end.
 *
 *   link up → JOIN each way → decision (core/lineage.h, the same on both) →
 *     target: sends its dirty ranges (DIRTY*, DIRTY_END)
 *     source: adds them to its own, durably [UNION, UNIONDUR] → saves the start of the session (TX_ACTIVATE) →
 *             RESYNC_BEGIN ... or, with nothing dirty and an equal, whole target, RESYNC_DONE at once
 *     split brain: each records it (TX_SPLIT), tells its dirty ranges, closes. The one that dials goes on dialling, so
 *             that a host that was killed before it recorded it learns of it too, and a `resolve` given on either
 *             reaches the other.
 *
 * Who dials is the record's `peer`, whatever the role: the loser of a resolve goes on dialling as a secondary.
 *
 * A host that serves its own disk and is to be a target (the loser of a resolve, an adopted volume) yields first: no
 * request starts, those under way end, and only then does it say what is dirty. If the connection ends before its role
 * has changed durably (TX_KEEP), requests go on as if nothing had been.
 *
 * Fencing: a session number is given by the shell with EV_LINK_UP; frames of another are dropped. What an old session
 * delivered is still applied (protocol B promised it), but the answer to a new JOIN waits until that has ended, so
 * nothing of an old connection is applied after it (I12) [FENCE].
 */
#include "core/repl_internal.h"

#include <stdio.h>
#include <string.h>

#include "core/check.h"

void session_send(struct repl *r, unsigned type, uint64_t seq, uint64_t offset, uint64_t length, uint16_t flags,
		  const void *data, uint32_t len)
{
	struct repl_action a = {.type = ACT_SEND, .data = data, .data_len = len};
	a.frame.type = (uint16_t)type;
	a.frame.flags = flags;
	a.frame.seq = seq;
	a.frame.offset = offset;
	a.frame.length = length;
	a.frame.length_payload = len;
	repl_emit(r, &a);
}

void session_close(struct repl *r, bool drain)
{
	if (r->closing)
		return;
	r->closing = true;
	repl_emit(r, &(struct repl_action){.type = ACT_CLOSE, .drain = drain});
}

void repl_command_fail(struct repl *r, struct repl_command **c, int code, const char *text)
{
	struct repl_command *x = *c;
	*c = NULL;
	if (x)
		repl_command_done(r, x, code, "%s", text);
}

void session_drop(struct repl *r, const char *why)
{
	session_close(r, false);
	session_link_down(r, -ERR_PEER, why);
	r->session = 0;
}

/* The peer dials and has not: a command that waits for it goes on waiting, to its own limit. */
static bool start_waits_for_dial(const struct repl *r)
{
	return r->start && r->meta->peer[0] == 0;
}

void session_resolved(struct repl *r)
{
	struct repl_command *c = r->resolve;
	r->resolve = NULL;
	if (c == NULL)
		return;
	bool loser = r->meta->role == ROLE_SECONDARY;
	c->result = loser ? r->meta->kept : 0;
	/* One that came after this host's JOIN had no say: the peer's was carried out. */
	bool so = loser == (c->number == DISCARD_LOCAL);
	repl_command_done(r, c, so ? 0 : -ERR_STATE,
			  "the peer's `resolve` came first and said the opposite: what is discarded is %s; its own "
			  "blocks stay as a checkpoint there",
			  loser ? "this host's copy" : "the peer's copy");
}

void session_refuse(struct repl *r, int code, const char *text)
{
	struct wire_refuse x = {.code = (uint16_t)(code < 0 ? -code : code)};
	(void)snprintf(x.text, sizeof(x.text), "%s", text);
	int n = wire_refuse_encode(&x, r->scratch, sizeof(r->scratch));
	if (n > 0)
		session_send(r, WIRE_REFUSE, 0, 0, 0, 0, r->scratch, (uint32_t)n);
	repl_command_fail(r, &r->protect, -(int)x.code, text);
	repl_command_fail(r, &r->start, -(int)x.code, text);
	session_close(r, true);
}

void session_protocol_error(struct repl *r, const char *fmt, ...)
{
	char text[WIRE_TEXT_MAX];
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	repl_set_error(r, ERR_PROTO, "protocol", -1, 0, 0, "the peer broke the protocol: %s", text);
	session_refuse(r, ERR_PROTO, text);
}

bool session_reason(struct repl *r, const struct repl_event *ev, struct wire_refuse *ret)
{
	struct err e;
	if (wire_refuse_decode(ret, ev->payload, ev->frame->length_payload, &e) >= 0)
		return true;
	session_protocol_error(r, "%s", e.text);
	return false;
}

void session_dial(struct repl *r)
{
	r->dialing = true;
	repl_emit(r, &(struct repl_action){.type = ACT_DIAL, .text = r->dial_addr, .dial = ++r->dials});
}

void repl_join(const struct repl *r, struct wire_join *j)
{
	const struct repl_meta *m = r->meta;
	memset(j, 0, sizeof(*j));
	memcpy(j->group, m->group, sizeof(j->group));
	memcpy(j->group_uuid, m->uuid, sizeof(j->group_uuid));
	j->role = r->protect ? ROLE_PRIMARY : m->role;
	j->state = m->state;
	j->lineage = m->lineage;
	j->sync_from = m->sync_from;
	j->ckpt_max = max_u64(m->ckpt_max, r->ckpt_used);
	j->last_stream = m->last_stream;
	j->failover_generation = m->failover_generation;
	j->start = r->start_id;
	j->number = r->joins;
	j->settings = m->settings;
	j->n_volumes = m->n_volumes;
	memcpy(j->volumes, m->volumes, m->n_volumes * sizeof(m->volumes[0]));
	if (m->role == ROLE_PRIMARY)
		detach_flags(r, j->volumes, j->n_volumes);
	j->flags = (m->alone ? WIRE_JOIN_ALONE : 0U) | (m->inconsistent ? WIRE_JOIN_INCONSISTENT : 0U) |
		   (m->split_brain ? WIRE_JOIN_SPLIT : 0U) | (r->holding ? WIRE_JOIN_HOLDING : 0U) |
		   (m->broken && m->role == ROLE_SECONDARY ? WIRE_JOIN_BROKEN : 0U) |
		   (r->start ? WIRE_JOIN_START : 0U) | (m->handed ? WIRE_JOIN_HANDED : 0U);
	if (r->protect)
		j->flags |= r->protect->cmd == CMD_FAILBACK ? WIRE_JOIN_FAILBACK : WIRE_JOIN_PROTECT;
	if (r->resolve)
		j->flags |= r->resolve->number == DISCARD_LOCAL ? WIRE_JOIN_DISCARD_MINE : WIRE_JOIN_DISCARD_YOURS;
	if (r->protect && (r->protect->flags & WIRE_JOIN_ADOPT))
		j->flags |= WIRE_JOIN_ADOPT;
	if (m->fresh || (m->role == ROLE_SECONDARY && m->lineage.current == 0 && m->sync_from == 0))
		j->flags |= WIRE_JOIN_FRESH;
}

static void decide(struct repl *r);

static void send_join(struct repl *r)
{
	r->joins++;
	repl_join(r, &r->mine);
	int n = wire_join_encode(&r->mine, r->scratch, sizeof(r->scratch));
	INVARIANT(n > 0);
	r->join_sent = true;
	session_send(r, WIRE_JOIN, 0, 0, 0, 0, r->scratch, (uint32_t)n);
}

void session_answer(struct repl *r)
{
	send_join(r);
	decide(r);
}

static void session_reset(struct repl *r)
{
	r->join_owed = r->join_sent = r->join_got = r->join_waits = r->closing = r->refused = false;
	r->is_source = r->is_target = r->dirty_ended = r->union_started = r->dirty_sent = false;
	r->decision = LINEAGE_NO_SOURCE;
	r->seq = r->received = r->applied = r->flushed = r->strict_seq = 0;
	r->last_was_flush = false;
	r->queue_bytes = 0;
}

/* Whether this host, as the one that dials, has anything to say: asked before a dial, and again when it has come up, as
 * a stop or stepping down may have come meanwhile. */
static bool dial_wanted(const struct repl *r)
{
	const struct repl_meta *m = r->meta;
	if (r->protect)
		return true;
	/* No handshake before a commit has ended [FODEFER]; who was shut out waits for the failback. */
	if (m->peer[0] == 0 || r->failing_over || m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED ||
	    m->shut_out)
		return false;
	if (r->start || m->split_brain)
		return true;
	if (m->role == ROLE_SECONDARY) /* stopped too: a start is given on the primary, which does not dial */
		return true;
	if (m->role == ROLE_STANDALONE) /* a survivor: the old primary has to hear of the failover */
		return m->state == STATE_DONE && m->failover_generation && !r->told;
	return m->state == STATE_RUNNING;
}

/* [OUTDATED] Said before another JOIN of the same host that was heard already, or before its restart: it comes late, on
 * a connection that its dialler has given up for a later one, and what it says may not hold any more (a stop, where a
 * start was given since; a split brain that is resolved). */
static bool outdated(const struct repl *r, const struct wire_join *j)
{
	return j->start && (j->start == r->heard[0] ? j->number <= r->heard_join : j->start == r->heard[1]);
}

static void heard(struct repl *r, const struct wire_join *j)
{
	if (j->start != r->heard[0]) {
		r->heard[1] = r->heard[0];
		r->heard[0] = j->start;
	}
	r->heard_join = j->number;
}

/* While a command dials, what the peer dials itself is not taken, nor what an older dial, perhaps of another address,
 * has come to; and what a peer's command has brought about is not given up for this host's own dial. */
bool repl_takes_link(const struct repl *r, const struct wire_join *join, uint64_t dial)
{
	if (join == NULL)
		return dial == r->dials && (r->link == LINK_DOWN || r->dialer || r->protect);
	return r->protect == NULL && !outdated(r, join);
}

static void theirs_forget(struct repl *r)
{
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		bitmap_clear_all(&r->vol[i].theirs);
	r->theirs_known = false;
	r->theirs_since_ns = 0;
}

void session_link_up(struct repl *r, const struct repl_event *ev)
{
	PRE(ev->session != 0 && ev->session != r->session);
	if (r->link != LINK_DOWN) /* the peer came again before we noticed that the old connection was dead */
		session_link_down(r, -ERR_PEER, "replaced by a new connection");
	session_reset(r);
	r->session = ev->session;
	r->dialer = ev->dialer;
	r->dialing = false;
	r->link = LINK_HANDSHAKE;
	r->link_since_ns = r->heard_ns = r->silent_ns = r->pinged_ns = r->progress_ns = r->now_ns;
	if (r->was_connected && !r->meta->split_brain)
		r->counters.reconnects++;
	if (!r->meta->split_brain) /* of a halted pair they only grow */
		theirs_forget(r);
	if (r->shutdown || (r->dialer && !dial_wanted(r)))
		session_close(r, false);
	else
		r->join_owed = r->dialer;
	session_join_ready(r);
}

/* Dial again: at once after a session that stood, else backing off to 2 s with jitter. */
static void redial_plan(struct repl *r, bool had_session)
{
	if (had_session)
		r->redial_wait_ns = REDIAL_MIN_NS;
	uint64_t half = r->redial_wait_ns / 2;
	r->redial_ns = r->now_ns + (had_session ? 0 : half + repl_random(r) % (half + 1));
	r->redial_wait_ns = min_u64(r->redial_wait_ns * 2, REDIAL_MAX_NS);
}

void session_link_down(struct repl *r, int code, const char *text)
{
	bool had = r->link == LINK_RESYNC || r->link == LINK_SYNCED;
	int fail = code == 0 || code == -ERR_IO || code == -ERR_TIMEOUT ? -ERR_PEER : code;
	char why[ERR_TEXT_MAX];
	(void)snprintf(why, sizeof(why), "%s", text && text[0] ? text : "the connection to the peer ended");
	if ((r->link != LINK_DOWN || r->dialing) && !r->meta->split_brain)
		repl_log(r, had ? 1 : 2, "link down: %s", why);
	r->link = LINK_DOWN;
	r->dialing = false;
	r->join_waits = r->join_owed = false;
	r->activating = r->adopting = false;
	r->yielding = repl_tx_pending(r, TX_KEEP) || repl_tx_pending(r, TX_SECONDARY); /* else its end does this */
	redial_plan(r, had);
	if (r->refused || code == -ERR_STATE || code == -ERR_SPLIT || code == -ERR_BUSY || code == -ERR_VERSION ||
	    code == -ERR_PERM)
		r->redial_ns = max_u64(r->redial_ns, r->now_ns + REFUSED_REDIAL_NS);
	if (r->meta->split_brain)
		r->redial_ns = r->now_ns + (r->resolve ? 0 : REFUSED_REDIAL_NS);
	if (!repl_tx_pending(r, TX_SPLIT)) { /* else its end answers them */
		repl_command_fail(r, &r->protect, fail, why);
		if (!start_waits_for_dial(r))
			repl_command_fail(r, &r->start, fail, why);
	}
	repl_command_fail(r, &r->want_ckpt, -ERR_PEER, why);
	if (r->setting) /* saved here; the peer gets it with the next JOIN */
		repl_command_done(r, r->setting, 0, " ");
	r->setting = NULL;
	/* A secondary's, see secondary_settle. */
	if (r->stop && r->meta->role == ROLE_PRIMARY && r->meta->state == STATE_RUNNING &&
	    !repl_tx_pending(r, TX_STOPPED))
		repl_command_fail(r, &r->stop, -ERR_PEER, why);
	bool source = r->is_source, target = r->is_target;
	r->is_source = r->is_target = false;
	r->queue_bytes = 0;
	if (source)
		primary_session_lost(r);
	if (target)
		secondary_session_lost(r);
	if (r->start_waits) {
		r->start = r->start_waits;
		r->start_waits = NULL;
		(void)snprintf(r->dial_addr, sizeof(r->dial_addr), "%s", r->meta->peer);
		session_dial(r);
	}
	repl_gate_run(r);
}

/* ---- JOIN ---- */

static bool volumes_match(struct repl *r, const struct wire_join *j, char *why, size_t size)
{
	const struct repl_meta *m = r->meta;
	if (j->n_volumes != m->n_volumes) {
		(void)snprintf(why, size, "group %s has %u volumes here and %u there", m->group, m->n_volumes,
			       j->n_volumes);
		return false;
	}
	for (uint32_t i = 0; i < j->n_volumes; i++) {
		int k = repl_meta_find_volume(m, j->volumes[i].name);
		if (k < 0) {
			(void)snprintf(why, size, "group %s has no volume %s here", m->group, j->volumes[i].name);
			return false;
		}
		/* Of two that know each other the smaller one grows (repl_resize.c). */
		bool afresh = (j->flags & WIRE_JOIN_PROTECT) && m->role == ROLE_STANDALONE;
		if (afresh && m->volumes[k].size != j->volumes[i].size) {
			(void)snprintf(why, size,
				       "volume %s has %llu bytes here and %llu there; `resize` the smaller one",
				       j->volumes[i].name, (unsigned long long)m->volumes[k].size,
				       (unsigned long long)j->volumes[i].size);
			return false;
		}
	}
	return true;
}

static void union_start(struct repl *r);

/* A clean stop whose answer was lost: the secondary is in DONE, the primary still in RUNNING. In a halted pair it makes
 * no difference: that is what both have to hear of. */
static bool stop_unheard(const struct wire_join *primary, const struct wire_join *secondary)
{
	return primary->role == ROLE_PRIMARY && primary->state == STATE_RUNNING && secondary->role == ROLE_SECONDARY &&
	       secondary->state == STATE_DONE && (primary->flags & (WIRE_JOIN_START | WIRE_JOIN_PROTECT)) == 0 &&
	       ((primary->flags | secondary->flags) & WIRE_JOIN_SPLIT) == 0;
}

/* A failback's JOIN at a primary that has not heard of the failover. */
static bool has_to_step_down(const struct repl *r, const struct wire_join *mine)
{
	int source = 0;
	return mine->role == ROLE_PRIMARY && lineage_decide(&r->theirs, mine, &source) == LINEAGE_SHUT_OUT;
}

/* The JOIN of a primary that has handed over to this host, which answers as the primary that it becomes. */
static bool has_to_take_over(const struct repl *r, const struct wire_join *mine)
{
	int source = 0;
	return lineage_decide(&r->theirs, mine, &source) == LINEAGE_TAKE_OVER && source == 1;
}

static void complete_stop(struct repl *r)
{
	repl_log(r, 1, "the peer has completed a stop whose answer was lost; this side stops too");
	repl_tx(r, TX_STOPPED)->number = r->theirs.last_stream;
}

/* The listener's side of a JOIN: what has to change here before the answer. */
static void listener_answer(struct repl *r)
{
	const struct repl_meta *m = r->meta;
	const struct wire_join *j = &r->theirs;
	struct wire_join mine;
	bool protect = (j->flags & WIRE_JOIN_PROTECT) != 0;
	repl_join(r, &mine);
	if (m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED) { /* [FODEFER] */
		session_refuse(r, ERR_BUSY,
			       "this host has failed over and is still committing; it answers when that has ended");
		return;
	}
	if (protect && m->split_brain) {
		session_refuse(r, ERR_SPLIT, "that group is halted by a split brain; `resolve` it first");
		return;
	}
	/* A split brain that its own `protect` has found is that peer's business. */
	if (!protect && m->role == ROLE_STANDALONE && !m->has_peer && !m->split_brain) {
		session_refuse(r, ERR_STATE,
			       "that group is not protected there any more; `unprotect` it here too, or `protect "
			       "--adopt` it afresh");
		return;
	}
	if (protect && m->role == ROLE_STANDALONE) {
		bool written = m->lineage.current != 0;
		if (written && !(j->flags & WIRE_JOIN_ADOPT)) {
			session_refuse(r, ERR_STATE,
				       "the peer has a volume of that name that was written already; `protect --adopt` "
				       "takes it over "
				       "(its content is kept as a checkpoint)");
			return;
		}
		if (written) {
			r->adopting = r->yielding = true; /* then session_yielded */
			return;
		}
		repl_tx(r, TX_SECONDARY);
		return;
	}
	if ((j->flags & WIRE_JOIN_FAILBACK) && has_to_step_down(r, &mine)) {
		struct tx *t = repl_tx(r, TX_SHUT_OUT);
		t->lineage = m->lineage;
		t->arg = 1;
		return;
	}
	if (has_to_take_over(r, &mine)) {
		switchover_join(r);
		return;
	}
	if (protect && m->role == ROLE_PRIMARY) {
		session_refuse(
		    r, ERR_STATE,
		    "the peer is primary for that group itself; after a failover `failback` makes it follow");
		return;
	}
	if (m->role == ROLE_PRIMARY && j->role == ROLE_SECONDARY && !m->split_brain && !(j->flags & WIRE_JOIN_SPLIT)) {
		/* The secondary dials. */
		if (stop_unheard(&mine, j)) {
			complete_stop(r);
			return;
		}
		if (m->state == STATE_DONE && !r->start) {
			session_refuse(r, ERR_BUSY, "replication of that group is stopped; `start` it on the primary");
			return;
		}
	}
	if (stop_unheard(j, &mine)) {
		send_join(r); /* it stops too */
		return;
	}
	if (m->role == ROLE_SECONDARY && m->state == STATE_DONE && !m->split_brain && !(j->flags & WIRE_JOIN_SPLIT)) {
		if (!(j->flags & (WIRE_JOIN_START | WIRE_JOIN_PROTECT)) || j->role != ROLE_PRIMARY) {
			session_refuse(r, ERR_STATE, "replication of that group is stopped; `start` it on the primary");
			return;
		}
		if (!m->alone) {
			repl_tx(r, TX_RESTART);
			return;
		}
	}
	send_join(r);
	decide(r);
}

/* A JOIN of this host's can be said, and both be looked at: the old session's work has ended, and no record is being
 * saved. What it says of this host must hold when it is decided upon: one that said that it is primary, while the
 * record by which it handed over was on its way, would make it primary again. */
void session_join_ready(struct repl *r)
{
	if ((!r->join_waits && !r->join_owed) || !secondary_quiet(r) || r->saving || r->tx_count || r->failing_over ||
	    r->taking)
		return;
	if (r->join_owed) {
		r->join_owed = false;
		if (!r->closing && dial_wanted(r))
			send_join(r);
		else
			session_close(r, false);
		return;
	}
	r->join_waits = false;
	if (r->closing) /* this host is not any more what its own JOIN said */
		return;
	char why[WIRE_TEXT_MAX];
	if (strcmp(r->theirs.group, r->meta->group) != 0) {
		session_refuse(r, ERR_PROTO, "the answer is about another group");
		return;
	}
	if (!volumes_match(r, &r->theirs, why, sizeof(why))) {
		repl_set_error(r, ERR_STATE, "handshake", -1, 0, 0, "%s", why);
		session_refuse(r, ERR_STATE, why);
		return;
	}
	if (resize_join(r)) {
		r->join_waits = true;
		return;
	}
	/* [NUMMAX] In the record with the next save, and heard before any save that this JOIN itself leads to: a
	 * primary that completes a lost stop records the peer's number for it, which a power cut may have taken from
	 * its own record, and the checkpoint that keeps an adopted disk needs one that the peer never used. */
	r->ckpt_used = max_u64(r->ckpt_used, r->theirs.ckpt_max);
	bool restart = r->theirs.role == ROLE_PRIMARY && (r->theirs.flags & WIRE_JOIN_START) &&
		       r->meta->role == ROLE_SECONDARY && r->meta->state == STATE_DONE && !r->meta->alone;
	if (!r->dialer)
		listener_answer(r);
	else if (restart)
		repl_tx(r, TX_RESTART); /* then the decision */
	else
		decide(r);
}

static void on_join(struct repl *r, const struct repl_event *ev)
{
	struct err e = {0};
	if (r->join_got || (r->dialer && !r->join_sent)) {
		session_protocol_error(r, r->join_got ? "a second JOIN" : "a JOIN before this host's");
		return;
	}
	if (wire_join_decode(&r->theirs, ev->payload, ev->frame->length_payload, &e) < 0) {
		session_protocol_error(r, "%s", e.text);
		return;
	}
	if (r->theirs.ckpt_max > CKPT_PEER_MAX) {
		session_protocol_error(r, "checkpoint numbers up to %llu", (unsigned long long)r->theirs.ckpt_max);
		return;
	}
	heard(r, &r->theirs);
	r->join_got = r->join_waits = true;
	session_join_ready(r);
}

static void set_all_dirty(struct repl *r)
{
	r->dirty_unsaved = true;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		bitmap_set_range(&v->dirty, 0, v->dirty.nbits);
	}
}

static void send_dirty(struct repl *r)
{
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct bitmap *b = &r->vol[i].dirty;
		struct wbuf w = {.data = r->scratch, .size = sizeof(r->scratch)};
		for (uint64_t at = bitmap_next_set(b, 0); at != BITMAP_NONE;) {
			uint64_t end = bitmap_next_clear(b, at);
			if (end == BITMAP_NONE)
				end = b->nbits;
			uint64_t off = at << REGION_SHIFT;
			wbuf_u64(&w, off);
			wbuf_u64(&w, min_u64(end << REGION_SHIFT, r->meta->volumes[i].size) - off);
			at = end < b->nbits ? bitmap_next_set(b, end) : BITMAP_NONE;
			if (w.len + 16 > w.size || at == BITMAP_NONE) {
				struct repl_action a = {.type = ACT_SEND, .data = w.data, .data_len = (uint32_t)w.len};
				a.frame.type = WIRE_DIRTY;
				a.frame.volume = r->meta->volumes[i].id;
				a.frame.length_payload = (uint32_t)w.len;
				repl_emit(r, &a);
				w.len = 0;
			}
		}
	}
	session_send(r, WIRE_DIRTY_END, 0, r->meta->diverged_ns, 0, 0, NULL, 0);
}

/* What this host holds that the peer does not, once no guest's write can add to it any more. */
static void target_begin(struct repl *r)
{
	if (r->meta->lineage.current != r->mine.lineage.current) {
		/* It wrote after its JOIN: what was decided does not hold. */
		session_close(r, false);
		return;
	}
	send_dirty(r);
}

/* A target says what is dirty here once no guest's write is under way to its disk: one whose region a clear cycle has
 * found clean meanwhile, or that has not set its bits yet, would be in neither dirty set. What serves the disk yields;
 * what serves nothing starts none; a view's writes go to active. */
void session_yielded(struct repl *r)
{
	bool target = r->is_target && !r->dirty_sent;
	if ((!r->yielding && !target) || r->closing)
		return;
	if (r->writes_in_flight && (r->yielding || repl_serving(r->meta, false) != SERVING_VIEW))
		return;
	if (r->yielding && (r->bumping.head || r->saving || r->tx_count || r->sync_busy))
		return;
	if (r->adopting)
		secondary_adopt_sync(r);
	else if (target) {
		r->dirty_sent = true;
		target_begin(r);
	}
}

/* Split brain: each tells the other what it holds, then the connection ends. */
static void apart_end(struct repl *r)
{
	if (r->dirty_sent && r->dirty_ended)
		session_close(r, true);
}

static void decide(struct repl *r)
{
	int source = 0;
	enum lineage_decision d =
	    r->dialer ? lineage_decide(&r->mine, &r->theirs, &source) : lineage_decide(&r->theirs, &r->mine, &source);
	bool me = (source == 0) == r->dialer;
	r->decision = d;
	/* A peer that began a generation of its own may have gone back to a checkpoint before: what it had applied says
	 * nothing any more of what it has, until the next time in sync. */
	uint64_t at = r->theirs.lineage.current;
	if (at != r->mine.lineage.current && at != r->mine.lineage.bitmap)
		r->applied_ns = 0;
	if (r->dialer && !r->start && !r->protect && stop_unheard(&r->mine, &r->theirs)) {
		complete_stop(r);
		return;
	}
	if (d == LINEAGE_NO_SOURCE && (r->mine.role == ROLE_STANDALONE || r->theirs.role == ROLE_STANDALONE)) {
		r->told = true; /* a survivor and one that knows: both wait for a failback */
		session_close(r, true);
		return;
	}
	if (d != LINEAGE_SPLIT || !r->meta->split_brain)
		repl_log(r, 2, "handshake: %s%s", lineage_decision_name(d),
			 d <= LINEAGE_FULL ? (me ? ", this host is the source" : ", this host is the target") : "");
	switch (d) {
	case LINEAGE_EQUAL:
	case LINEAGE_DETACHED:
	case LINEAGE_PARTIAL:
	case LINEAGE_FULL:
		if (me) {
			/* A detach that this host had not heard of: what its guests wrote since its JOIN, alone, went
			 * to a disk that was not current. The next handshake says that it is a split brain. */
			if (d == LINEAGE_DETACHED && r->meta->lineage.current != r->mine.lineage.current) {
				session_close(r, false);
				return;
			}
			if (d == LINEAGE_FULL)
				set_all_dirty(r);
			detach_learn(r, d);
			union_start(r); /* if DIRTY_END is here; else that goes on */
			return;
		}
		switchover_taken(r);
		r->is_target = true;
		r->link = LINK_RESYNC;
		r->in_seq = r->in_applied = r->in_flushed = r->in_done_seq = 0;
		r->in_phase = STREAM_CLOSED;
		r->in_whole = d <= LINEAGE_DETACHED && !r->meta->inconsistent;
		r->acked = (struct wire_ack){0};
		r->apply_stopped = false;
		r->was_connected = true;
		/* then session_yielded */
		if (repl_serving(r->meta, false) == SERVING_DISK) {
			r->yielding = true;
			return;
		}
		if (memcmp(&r->theirs.settings, &r->meta->settings, sizeof(struct settings)) != 0)
			repl_tx(r, TX_SETTINGS)->settings = r->theirs.settings;
		return;
	case LINEAGE_SHUT_OUT:
		if (!me)
			repl_tx(r, TX_SHUT_OUT)->lineage = r->mine.lineage;
		else
			session_close(r, true);
		return;
	case LINEAGE_SPLIT:
		repl_tx(r, TX_SPLIT);
		return;
	case LINEAGE_TAKE_OVER: /* the other one waits for its end */
		if (me)
			switchover_join(r);
		return;
	case LINEAGE_UNRELATED:
		repl_set_error(r, ERR_STATE, "handshake", -1, 0, 0, "the two copies of %s have nothing in common",
			       r->meta->group);
		session_refuse(
		    r, ERR_STATE,
		    "the two copies have nothing in common; protect afresh, with --adopt to take the other over");
		return;
	case LINEAGE_NO_SOURCE:
		session_refuse(r, ERR_STATE, "neither copy may be the source: no consistent primary among them");
		return;
	}
}

/* ---- source: the union of both dirty sets, then the start ---- */

static void on_dirty(struct repl *r, const struct repl_event *ev)
{
	const struct wire_frame *f = ev->frame;
	int vi = repl_meta_volume_by_id(r->meta, f->volume);
	if (vi < 0 || f->length_payload % 16) {
		session_protocol_error(r, "DIRTY names volume %u or has a bad length", f->volume);
		return;
	}
	struct rbuf b = {.data = ev->payload, .size = f->length_payload};
	/* The smaller side grows to the larger before it says anything, so what it says may lie past what its JOIN did.
	 */
	uint64_t size = r->meta->volumes[vi].size, theirs = size;
	for (uint32_t k = 0; k < r->theirs.n_volumes; k++)
		if (strcmp(r->theirs.volumes[k].name, r->meta->volumes[vi].name) == 0)
			theirs = max_u64(size, r->theirs.volumes[k].size);
	while (b.pos < b.size) {
		uint64_t off = rbuf_u64(&b), len = rbuf_u64(&b);
		if (len == 0 || off >= theirs || len > theirs - off) {
			session_protocol_error(r, "DIRTY names a range outside volume %s", r->meta->volumes[vi].name);
			return;
		}
		if (off + len > size) { /* this host's is growing to the peer's size just now */
			r->rz.beyond = true;
			if (off >= size)
				continue;
			len = size - off;
		}
		uint64_t first = off >> REGION_SHIFT, last = (off + len - 1) >> REGION_SHIFT;
		bitmap_set_range(&r->vol[vi].theirs, first, last - first + 1);
	}
}

/* The union's bits count as set when they are durable, not before: a guest's write meanwhile sets its own. */
static void marking_from_dirty(struct repl *r)
{
	const unsigned shift = INTENT_SHIFT - REGION_SHIFT;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++) {
		struct repl_volume_state *v = &r->vol[i];
		for (uint64_t b = bitmap_next_set(&v->dirty, 0); b != BITMAP_NONE;) {
			uint64_t unit = b >> shift;
			if (!bitmap_test(&v->intent, unit))
				bitmap_set(&v->marking, unit);
			uint64_t next = (unit + 1) << shift;
			b = next < v->dirty.nbits ? bitmap_next_set(&v->dirty, next) : BITMAP_NONE;
		}
	}
}

static void union_start(struct repl *r)
{
	if (resize_saving(r) || r->union_busy || r->union_started || r->clear_busy || !r->dirty_ended ||
	    r->join_waits || r->decision > LINEAGE_FULL)
		return; /* tried again from the tick */
	r->union_busy = r->union_started = true;
	for (uint32_t i = 0; i < r->meta->n_volumes; i++)
		bitmap_or(&r->vol[i].dirty, &r->vol[i].theirs);
	detach_clear_maps(r, r->stale);
	r->dirty_unsaved = true;
	marking_from_dirty(r);
	r->union_io.kind = REPL_INTENT_ALL;
	r->union_io.session = r->session;
	repl_submit(r, &r->union_io, TARGET_OWN);
}

void session_union_done(struct repl *r, int error)
{
	r->union_busy = false;
	repl_marking_done(r, error == 0);
	if (r->union_io.session != r->session || r->link != LINK_HANDSHAKE || r->closing)
		return;
	if (error) {
		repl_set_error(r, error, "intent", -1, 0, 0, "the write-intent map could not be written: %s",
			       err_short(error));
		session_refuse(r, ERR_IO, "the source could not write its dirty map");
		return;
	}
	r->dirty_unsaved = false;
	/* New requests wait for the few milliseconds of the save, so that `todo` and what is forwarded are cut at one
	 * point. */
	r->activating = true;
	repl_tx(r, TX_ACTIVATE);
}

static void activated(struct repl *r, struct tx *t, int error)
{
	if (t->session == r->session)
		r->activating = false;
	if (t->session != r->session || r->link != LINK_HANDSHAKE || r->closing)
		return;
	if (error) {
		session_refuse(r, ERR_IO, "the source could not save the start of the session");
		return;
	}
	r->is_source = true;
	r->holding = false;
	r->was_connected = true;
	r->redial_wait_ns = REDIAL_MIN_NS;
	primary_activate(r);
	if (r->protect) {
		struct repl_command *c = r->protect;
		r->protect = NULL;
		repl_command_done(r, c, 0, " ");
	}
	if (r->start) {
		struct repl_command *c = r->start;
		r->start = NULL;
		repl_command_done(r, c, 0, " ");
	}
	repl_emit(r, &(struct repl_action){.type = ACT_SERVING, .meta = r->meta});
}

void session_tx_done(struct repl *r, struct tx *t, int error)
{
	switch (t->kind) {
	case TX_ACTIVATE:
		activated(r, t, error);
		return;
	case TX_SECONDARY:
		r->yielding = r->adopting = false;
		if (error)
			repl_gate_run(r);
		else
			repl_stepped_down(r);
		/* fall through */
	case TX_RESTART:
		if (t->session != r->session || r->link != LINK_HANDSHAKE || r->closing)
			return;
		if (error == -ERR_CANCELED) {
			session_refuse(r, ERR_LIMIT, "there, " CKPTS_FULL_TEXT);
			return;
		}
		if (error) {
			session_refuse(r, ERR_IO, "the group's record could not be saved there");
			return;
		}
		if (!r->join_sent)
			send_join(r);
		decide(r);
		return;
	case TX_SHUT_OUT: {
		if (error) {
			if (t->session == r->session && r->link != LINK_DOWN)
				session_close(r, false);
			return;
		}
		repl_stepped_down(r);
		if (t->arg && t->session == r->session && r->link == LINK_HANDSHAKE) {
			send_join(r);
			decide(r);
			return;
		}
		repl_set_error(r, ERR_STATE, "handshake", -1, 0, 0,
			       "the peer has failed over; this host is no longer primary. `failback` on the peer makes "
			       "this copy follow");
		/* One that has come since is a survivor's, whose JOIN waits: it is answered as this host is now. */
		if (r->link != LINK_DOWN && (t->session == r->session || r->dialer))
			session_close(r, true);
		return;
	}
	case TX_UNPROTECT:
		if (error) {
			repl_command_done(r, t->command, error, "its record could not be saved: %s", err_short(error));
			return;
		}
		if (t->arg)
			repl_log(r, 1,
				 "the detached disk is taken as it is: what was written through the peer is not on it");
		r->error.code = 0;
		if (r->link != LINK_DOWN)
			session_close(r, true);
		repl_stepped_down(r);
		repl_command_done(r, t->command, 0, " ");
		return;
	case TX_SPLIT:
		r->holding = false;
		if (r->error.code != ERR_SPLIT)
			repl_set_error(r, ERR_SPLIT, "handshake", -1, 0, 0,
				       "split brain: both hosts wrote %s alone; replication is halted. See `diverged`, "
				       "then `resolve`",
				       r->meta->group);
		repl_command_fail(r, &r->protect, -ERR_SPLIT,
				  "split brain: both hosts wrote alone; see `diverged`, then `resolve`");
		repl_command_fail(r, &r->start, -ERR_SPLIT,
				  "split brain: both hosts wrote alone; see `diverged`, then `resolve`");
		if (t->session == r->session && r->link == LINK_HANDSHAKE && !r->closing) {
			if (r->mine.flags & (WIRE_JOIN_DISCARD_MINE | WIRE_JOIN_DISCARD_YOURS))
				repl_command_fail(
				    r, &r->resolve, -ERR_STATE,
				    "the copy to be kept can't be the source: it only follows (`failover` "
				    "there first), or a disk of it is detached, or `resolve` was given the "
				    "other way round on the peer");
			send_dirty(r);
			r->dirty_sent = true;
			apart_end(r);
		}
		repl_emit(r, &(struct repl_action){.type = ACT_SERVING, .meta = r->meta});
		return;
	default:
		UNREACHABLE();
	}
}

/* ---- frames ---- */

static void on_refuse(struct repl *r, const struct repl_event *ev)
{
	struct wire_refuse x;
	if (!session_reason(r, ev, &x))
		return;
	char text[ERR_TEXT_MAX];
	(void)snprintf(text, sizeof(text), "the peer refused: %.*s", WIRE_TEXT_MAX, x.text);
	int code = x.code > 0 && x.code < ERR_CODES_END ? -(int)x.code : -ERR_FAILED;
	if (!r->protect && !r->start && code != -ERR_BUSY)
		repl_set_error(r, code, "handshake", -1, 0, 0, "%s", text);
	repl_command_fail(r, &r->protect, code, text);
	repl_command_fail(r, &r->start, code, text);
	switchover_refused(r, code, text);
	if (code != -ERR_BUSY)
		repl_command_fail(r, &r->resolve, code, text);
	r->redial_wait_ns = REDIAL_MAX_NS;
	r->refused = true;
	session_close(r, false);
}

void session_frame(struct repl *r, const struct repl_event *ev)
{
	const struct wire_frame *f = ev->frame;
	r->heard_ns = r->now_ns;
	r->counters.received_bytes += WIRE_HEADER_SIZE + f->length_payload;
	switch (f->type) {
	case WIRE_PING:
		session_send(r, WIRE_PONG, 0, f->offset, 0, 0, NULL, 0);
		return;
	case WIRE_PONG:
		return;
	case WIRE_REFUSE:
		on_refuse(r, ev);
		return;
	case WIRE_GOODBYE:
		repl_log(r, 2, "the peer says goodbye");
		session_close(r, false);
		return;
	case WIRE_JOIN:
		on_join(r, ev);
		return;
	case WIRE_DIRTY:
	case WIRE_DIRTY_END:
		/* The peer may have decided while a save holds this host up: what it says is taken, and used then. */
		if (r->link != LINK_HANDSHAKE || !r->join_sent || !r->join_got || r->is_target || r->dirty_ended ||
		    (!r->join_waits && r->decision > LINEAGE_SPLIT)) {
			session_protocol_error(r, "%s out of order", wire_type_name(f->type));
			return;
		}
		if (f->type == WIRE_DIRTY) {
			on_dirty(r, ev);
			return;
		}
		r->dirty_ended = r->theirs_known = true;
		r->theirs_since_ns = f->offset;
		if (r->decision == LINEAGE_SPLIT)
			apart_end(r);
		else
			union_start(r);
		return;
	default:
		break;
	}
	if (r->taking) { /* the disk as of that checkpoint is about to be this host's own */
		session_protocol_error(r, "%s behind TAKE_OVER", wire_type_name(f->type));
		if (ev->io)
			repl_complete(r, ev->io, -ERR_CANCELED);
	} else if (r->is_source && (r->link == LINK_RESYNC || r->link == LINK_SYNCED))
		primary_frame(r, ev);
	else if (r->is_target && ev->io)
		secondary_stream(r, ev->io);
	else if (r->is_target && f->type == WIRE_BEHIND)
		secondary_behind(r, f);
	else if (r->is_target && f->type == WIRE_SCRUB)
		verify_scrub_asked(r, f);
	else if (r->is_target && f->type == WIRE_SETTINGS) {
		struct settings s = r->meta->settings;
		struct rbuf b = {.data = ev->payload, .size = f->length_payload};
		settings_decode(&s, &b);
		if (b.failed) {
			session_protocol_error(r, "SETTINGS do not decode");
			return;
		}
		r->theirs.settings = s; /* what a resync that is about to begin goes by */
		/* A peer that does not wait for the answer gets one for its last word only. */
		struct tx *t = repl_tx_queued(r, TX_SETTINGS);
		if (t == NULL || t->command)
			t = repl_tx(r, TX_SETTINGS);
		t->settings = s;
		t->number = f->seq;
		t->session = r->session;
	} else if (r->is_target && f->type == WIRE_WRITE_FAILED) {
		secondary_write_failed(r, ev);
	} else if (r->is_target && f->type == WIRE_TAKE_OVER) {
		switchover_frame(r, f);
	} else {
		session_protocol_error(r, "%s out of order", wire_type_name(f->type));
		if (ev->io)
			repl_complete(r, ev->io, -ERR_CANCELED);
	}
}

/* ---- time ---- */

static bool should_dial(const struct repl *r)
{
	return r->link == LINK_DOWN && !r->dialing && !r->shutdown && !r->protect && !r->start && dial_wanted(r);
}

void session_redial(struct repl *r)
{
	if (!should_dial(r) || r->now_ns < r->redial_ns)
		return;
	(void)snprintf(r->dial_addr, sizeof(r->dial_addr), "%s", r->meta->peer);
	session_dial(r);
}

static void commands_expire(struct repl *r)
{
	if (start_waits_for_dial(r) && r->now_ns >= r->start_until_ns)
		repl_command_fail(r, &r->start, -ERR_PEER, "the peer, which dials, has not connected; is it up?");
	if (r->resolve && r->now_ns >= r->resolve_until_ns)
		repl_command_fail(
		    r, &r->resolve, -ERR_PEER,
		    "the peer was not reached, or the connection was lost; see `status`, then give it again");
}

void session_tick(struct repl *r)
{
	const uint64_t timeout = r->meta->settings.peer_timeout_ms * UINT64_C(1000000);
	if (r->holding && r->now_ns >= r->hold_until_ns) {
		repl_log(r, 1, "the peer did not answer within peer_timeout; serving without it");
		r->holding = false;
		repl_emit(r, &(struct repl_action){.type = ACT_SERVING, .meta = r->meta});
	}
	commands_expire(r);
	session_redial(r);
	if (r->link == LINK_DOWN)
		return;
	session_join_ready(r);
	if (r->link == LINK_HANDSHAKE)
		union_start(r);
	if (r->now_ns - r->silent_ns > timeout && !r->closing) {
		repl_log(r, 1, "the peer was silent for peer_timeout");
		session_drop(r, "the peer was silent for peer_timeout");
		return;
	}
	if (r->now_ns - r->pinged_ns >= timeout / 5) {
		r->pinged_ns = r->now_ns;
		session_send(r, WIRE_PING, 0, r->now_ns, 0, 0, NULL, 0);
	}
}
