/* The connections of the simulated world: frames are encoded, cut into pieces, delayed, stalled, flipped, and decoded
 * as net/link.c does with sockets.
 *
 * A connection can end by either side's closing, or be cut: what is under way is delivered or lost, and each side hears
 * of it in its own time, perhaps never. An old one may still deliver after a new one has taken its place: its receiver
 * may be held up with a frame in hand, the last one that it hands over when it goes on (`held`).
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "tests/sim/world_internal.h"

#define SOCKET_BYTES (256U << 10)
#define HANDSHAKE_NS (2 * SEC)

static struct end *other(struct end *e)
{
	return &e->c->end[!e->side];
}

static bool alive(const struct end *e)
{
	return !e->gone && e->h->up && e->h->life == e->life && !e->h->dying;
}

void sent_free(struct sent *s)
{
	if (!s)
		return;
	simfree(s->vers);
	for (unsigned v = 0; v < WORLD_VOLUMES; v++)
		simfree(s->snap[v]);
	simfree(s);
}

static uint64_t blocked_until(struct world *w)
{
	return w->partition_until > w->now ? w->partition_until : w->now;
}

/* ---- the end of a connection, as one side hears of it ---- */

static void on_down(struct world *w, void *arg, uint64_t n)
{
	struct end *e = arg;
	int code = -(int)n;
	if (!alive(e))
		return;
	if (e->held) { /* the receiver tells, when it has handed over what it has */
		world_at(w, 100 * US, on_down, e, n);
		return;
	}
	e->gone = true;
	if (e->h->conn == e)
		e->h->conn = NULL;
	world_note(w, "host %u: connection down: %s", e->h->id, err_name(code));
	if (e->attached || e->side == 0)
		host_step(e->h, &(struct repl_event){.type = EV_LINK_DOWN,
						     .session = e->session,
						     .dial = e->dial,
						     .error = code,
						     .text = "the connection ended"});
}

/* Until then what has arrived is taken, unless it is closed from this side. */
static void plan_down(struct end *e, int code, uint64_t ns)
{
	if (e->down_planned)
		return;
	e->down_planned = true;
	world_at(e->c->w, ns, on_down, e, (uint64_t)-code);
}

/* ---- sending ---- */

static void fifo_add(struct fifo *q, const void *data, size_t len)
{
	if (q->at + q->len + len > q->cap && q->at > q->len) {
		memcpy(q->data, q->data + q->at, q->len);
		q->at = 0;
	}
	if (q->at + q->len + len > q->cap) {
		q->cap = 2 * (q->at + q->len + len);
		q->data = simrealloc(q->data, q->cap);
	}
	memcpy(q->data + q->at + q->len, data, len);
	q->len += len;
}

static void fifo_drop(struct fifo *q, size_t len)
{
	PRE(len <= q->len);
	q->len -= len;
	q->at = q->len ? q->at + len : 0;
}

static void fifo_clear(struct fifo *q)
{
	fifo_drop(q, q->len);
}

static void deliver(struct world *w, void *arg, uint64_t n);

static void fly(struct end *e, const uint8_t *data, size_t len, bool fin)
{
	struct world *w = e->c->w;
	struct chunk *k = simrealloc(NULL, sizeof(*k) + len);
	memset(k, 0, sizeof(*k));
	k->len = len;
	k->fin = fin;
	if (len)
		memcpy(k->data, data, len);
	k->at = w->now + world_delay(w, w->net_ns);
	if (e->fly_tail && e->fly_tail->at > k->at)
		k->at = e->fly_tail->at;
	if (e->fly_tail)
		e->fly_tail->next = k;
	else
		e->fly = k;
	e->fly_tail = k;
	e->fly_bytes += len;
	if (w->flip && len && e->c->end[0].attached && e->c->end[1].attached) {
		uint64_t bit = world_below(w, len * 8);
		w->flip = false;
		w->count.flips++;
		k->data[bit / 8] ^= (uint8_t)(1U << bit % 8);
		if (e->taint_at == UINT64_MAX)
			e->taint_at = e->fly_total + bit / 8;
		world_note(w, "net: bit %" PRIu64 " of the stream from host %u flipped", (e->fly_total + bit / 8) * 8,
			   e->h->id);
	}
	e->fly_total += len;
	world_at(w, k->at - w->now, deliver, e, 0);
}

static void pump(struct world *w, void *arg, uint64_t n);

static void pump_plan(struct end *e, uint64_t ns)
{
	if (e->pumping)
		return;
	e->pumping = true;
	world_at(e->c->w, ns, pump, e, 0);
}

static void pump(struct world *w, void *arg, uint64_t n)
{
	struct end *e = arg;
	(void)n;
	e->pumping = false;
	if (!alive(e) || e->c->cut)
		return;
	size_t len = e->out.len, most = 1 + (size_t)world_below(w, 64 << 10);
	len = len < most ? len : most;
	if (e->closing && w->now > e->drain_until) {
		fifo_clear(&e->out);
		len = 0;
	}
	if (len && e->fly_bytes + len > SOCKET_BYTES) {
		pump_plan(e, world_delay(w, w->net_ns));
		return;
	}
	if (len) {
		fly(e, e->out.data + e->out.at, len, false);
		fifo_drop(&e->out, len);
		size_t own = len < e->out_own ? len : e->out_own;
		e->out_own -= own;
		if (e->session && len > own)
			host_step(e->h,
				  &(struct repl_event){.type = EV_SENT, .session = e->session, .bytes = len - own});
		if (!alive(e))
			return;
	}
	if (e->out.len) {
		pump_plan(e, world_below(w, 10 * US));
	} else if (e->closing && !e->down_planned) {
		fly(e, NULL, 0, true);
		plan_down(e, -ERR_CANCELED, world_delay(w, w->net_ns));
	}
}

static void send_frame(struct end *e, struct wire_frame *f, const void *payload)
{
	uint8_t header[WIRE_HEADER_SIZE];
	f->number = e->tx_number++;
	f->crc_payload = f->length_payload ? crc32c(0, payload, f->length_payload) : 0;
	wire_header_encode(f, f->type == WIRE_HELLO ? 0 : e->seed, header);
	fifo_add(&e->out, header, sizeof(header));
	if (f->length_payload)
		fifo_add(&e->out, payload, f->length_payload);
	if (!e->session)
		e->out_own = e->out.len;
	pump_plan(e, world_below(e->c->w, 20 * US));
}

static bool in_sequence(unsigned type)
{
	return repl_exec_is_stream(type) && type != WIRE_READ_REQ; /* whose seq is a token */
}

void net_send(struct host *h, const struct repl_action *a)
{
	struct end *e = h->conn;
	bool own = a->io && !a->io->internal; /* a guest's, or of the stream: a READ_REPLY */
	struct sim_io *s =
	    own && !CONTAINER_OF(a->io, struct sim_io, io)->stream ? CONTAINER_OF(a->io, struct sim_io, io) : NULL;
	if (e == NULL || e->session == 0)
		return;
	struct sent *sent = NULL;
	h->w->count.aheads += a->frame.type == WIRE_BEHIND && a->frame.offset == WIRE_BEHIND_CONGESTED;
	h->w->count.apply_stops += a->frame.type == WIRE_IO_ERROR;
	if (in_sequence(a->frame.type)) {
		sent = simalloc(sizeof(*sent));
		sent->seq = a->frame.seq;
		sent->type = a->frame.type;
	}
	model_sent(h, a, s, sent);
	if (!alive(e) || e->closing) { /* as one that is lost on the way */
		sent_free(sent);
		return;
	}
	if (sent) {
		if (e->c->sent_tail)
			e->c->sent_tail->next = sent;
		else
			e->c->sent = sent;
		e->c->sent_tail = sent;
	}
	struct wire_frame f = a->frame;
	const void *payload = NULL;
	if (f.length_payload)
		payload = !a->io ? a->data : s ? s->data : a->io->payload;
	if (e->c->w->cfg.verbose && f.type != WIRE_PING && f.type != WIRE_PONG)
		world_note(e->c->w, "host %u: send %s seq %" PRIu64 " %u %" PRIu64 "+%" PRIu64, h->id,
			   wire_type_name(f.type), f.seq, f.volume, f.offset, f.length);
	send_frame(e, &f, payload);
	if (a->io && !s && f.length_payload) {
		free(a->io->payload);
		a->io->payload = NULL;
	}
}

void net_close(struct end *e, uint64_t drain_ns)
{
	struct world *w = e->c->w;
	if (!alive(e) || e->closing)
		return;
	e->closing = true;
	e->drain_until = w->now + drain_ns;
	if (drain_ns == 0)
		fifo_clear(&e->out);
	if (e->c->cut)
		plan_down(e, -ERR_CANCELED, world_delay(w, w->net_ns));
	pump_plan(e, world_below(w, 50 * US));
}

/* ---- receiving ---- */

static void parse(struct world *w, void *arg, uint64_t n);

static void parse_plan(struct end *e, uint64_t ns)
{
	if (e->parsing)
		return;
	e->parsing = true;
	world_at(e->c->w, ns, parse, e, 0);
}

static void deliver(struct world *w, void *arg, uint64_t n)
{
	struct end *e = arg, *to = other(e);
	struct chunk *k = e->fly;
	(void)n;
	if (!k) /* lost by a cut */
		return;
	uint64_t until = blocked_until(w);
	if (until > w->now || k->at > w->now) {
		uint64_t at = until > k->at ? until : k->at;
		world_at(w, at - w->now + 1, deliver, e, 0);
		return;
	}
	e->fly = k->next;
	if (!e->fly)
		e->fly_tail = NULL;
	e->fly_bytes -= k->len;
	if (alive(to)) {
		fifo_add(&to->rx, k->data, k->len);
		if (k->fin)
			to->fin = true;
		parse_plan(to, world_below(w, 5 * US));
	}
	simfree(k);
}

static void violate(struct end *e, const char *what, const char *text)
{
	struct world *w = e->c->w;
	world_note(w, "host %u: closes a connection that lies: %s %s", e->h->id, what, text);
	if (other(e)->taint_at == UINT64_MAX)
		world_fail(w, "host %u: what the peer sent is refused: %s %s", e->h->id, what, text);
	w->count.flips_seen++;
	e->closing = true;
	fifo_clear(&e->rx);
	fly(e, NULL, 0, true);
	plan_down(e, -ERR_PROTO, world_delay(w, w->net_ns));
}

static void send_hello(struct end *e)
{
	struct wire_hello hello = {
	    .version_min = WIRE_VERSION_MIN, .version_max = WIRE_VERSION_MAX, .nonce = e->nonce, .program = "sim"};
	uint8_t buf[WIRE_HELLO_MAX];
	memcpy(hello.store, store_info(e->h->store)->uuid, sizeof(hello.store));
	int n = wire_hello_encode(&hello, buf, sizeof(buf));
	INVARIANT(n > 0);
	struct wire_frame f = {.type = WIRE_HELLO, .length_payload = (uint32_t)n};
	send_frame(e, &f, buf);
	e->hello_sent = true;
}

static void send_refuse(struct end *e, int code, const char *text)
{
	struct wire_refuse x = {.code = (uint16_t)code};
	uint8_t buf[WIRE_TEXT_MAX + 64];
	(void)snprintf(x.text, sizeof(x.text), "%s", text);
	int n = wire_refuse_encode(&x, buf, sizeof(buf));
	INVARIANT(n > 0);
	struct wire_frame f = {.type = WIRE_REFUSE, .length_payload = (uint32_t)n};
	send_frame(e, &f, buf);
}

/* The connection stands: it becomes the group's. */
static void attach(struct end *e, const struct wire_frame *f, const void *payload)
{
	struct host *h = e->h;
	struct end *old = h->conn;
	static struct wire_join j;
	if (f && wire_join_decode(&j, payload, f->length_payload, NULL) < 0)
		memset(&j, 0, sizeof(j)); /* the core refuses it */
	if (!repl_takes_link(h->core, f ? &j : NULL, e->dial)) {
		if (e->side == 1)
			send_refuse(e, ERR_BUSY, "that host is dialling itself for that group");
		net_close(e, e->side == 1 ? 500 * MS : 0);
		return;
	}
	e->session = ++h->sessions;
	e->attached = true;
	h->conn = e;
	h->w->count.sessions++;
	world_note(h->w, "host %u: session %" PRIu64, h->id, e->session);
	model_session(h);
	host_step(h,
		  &(struct repl_event){
		      .type = EV_LINK_UP, .session = e->session, .dialer = e->side == 0, .peer_store = e->peer_store});
	if (f)
		host_step(
		    h, &(struct repl_event){.type = EV_FRAME, .session = e->session, .frame = f, .payload = payload});
	if (old)
		net_close(old, 0);
}

static void on_hello(struct end *e, const uint8_t *payload, size_t len)
{
	struct wire_hello theirs;
	struct err err = {0};
	if (wire_hello_decode(&theirs, payload, len, &err) < 0) {
		violate(e, "HELLO", err.text);
		return;
	}
	e->hello_got = true;
	memcpy(e->peer_store, theirs.store, sizeof(e->peer_store));
	if (e->side == 1)
		send_hello(e);
	e->seed = e->side == 0 ? wire_session(e->nonce, theirs.nonce) : wire_session(theirs.nonce, e->nonce);
	if (e->side == 0)
		attach(e, NULL, NULL);
}

static struct sent *sent_take(struct end *e, uint64_t seq)
{
	struct conn *c = e->c;
	struct sent *s = c->sent;
	if (s == NULL || s->seq != seq)
		world_fail(c->w, "host %u: frame with number %" PRIu64 " that was not sent next", e->h->id, seq);
	c->sent = s->next;
	if (!c->sent)
		c->sent_tail = NULL;
	s->next = NULL;
	return s;
}

static void on_frame(struct end *e, const struct wire_frame *f, uint8_t *payload)
{
	struct host *h = e->h;
	if (f->type == WIRE_HELLO) {
		on_hello(e, payload, f->length_payload);
		return;
	}
	if (!e->attached) {
		if (f->type != WIRE_JOIN) {
			if (f->type != WIRE_PING && f->type != WIRE_GOODBYE && f->type != WIRE_REFUSE)
				world_fail(h->w, "host %u: the first frame is %s", h->id, wire_type_name(f->type));
			return;
		}
		attach(e, f, payload);
		return;
	}
	struct repl_event ev = {.type = EV_FRAME, .session = e->session, .frame = f, .payload = payload};
	if (repl_exec_is_stream(f->type)) {
		const char *why;
		void *copy = NULL;
		struct sent *sent = in_sequence(f->type) ? sent_take(e, f->seq) : NULL;
		if (f->length_payload) {
			copy = malloc(f->length_payload);
			memcpy(copy, payload, f->length_payload);
		}
		struct sim_io *s = shell_stream_new(h, f, copy, &why);
		if (s == NULL)
			world_fail(h->w, "host %u: the peer sent %s", h->id, why);
		if (s->io.payload != copy)
			free(copy);
		s->sent = sent;
		model_received(h, s);
		ev.io = &s->io;
	}
	host_step(h, &ev);
}

/* One whole frame from rx; 0: there is none yet. */
static size_t take_frame(struct end *e)
{
	struct world *w = e->c->w;
	uint8_t *rx = e->rx.data + e->rx.at;
	struct wire_frame f;
	struct err err = {0};
	if (e->rx.len < WIRE_HEADER_SIZE)
		return 0;
	uint64_t seed = e->hello_got ? e->seed : 0;
	if (wire_header_decode(&f, seed, rx, e->hello_got ? WIRE_PAYLOAD_MAX : WIRE_HELLO_MAX, &err) < 0) {
		violate(e, "header", err.text);
		return 0;
	}
	if (f.number != e->rx_number || (f.type == WIRE_HELLO) == e->hello_got) {
		violate(e, "number", wire_type_name(f.type));
		return 0;
	}
	size_t len = WIRE_HEADER_SIZE + (size_t)f.length_payload;
	if (e->rx.len < len)
		return 0;
	if (f.length_payload && crc32c(0, rx + WIRE_HEADER_SIZE, f.length_payload) != f.crc_payload) {
		violate(e, "payload", wire_type_name(f.type));
		return 0;
	}
	e->rx_number++;
	/* I14: nothing that the wire has changed is taken for a frame. */
	if (e->rx_at + len > other(e)->taint_at)
		world_fail(w, "host %u took a %s frame that was flipped on the wire", e->h->id, wire_type_name(f.type));
	w->count.frames++;
	e->heard_ns = w->now;
	on_frame(e, &f, f.length_payload ? rx + WIRE_HEADER_SIZE : NULL);
	return len;
}

/* The receiver does not run for a while, with the next frame in hand. */
static void hold(struct end *e)
{
	struct world *w = e->c->w;
	uint64_t most = e->slow ? 300 * MS : 4 * MS;
	e->slow = false;
	e->held = e->rx.len;
	parse_plan(e, 1 + world_more(w, most));
}

/* It goes on; true: its connection was closed meanwhile, and that was the last frame. */
static bool hand_over(struct end *e)
{
	size_t held = e->held;
	if (!e->closing) {
		e->held = 0;
		return false;
	}
	e->rx.len = held;
	if (alive(e)) {
		world_note(e->c->w, "host %u: a frame of session %" PRIu64 " after its end", e->h->id, e->session);
		(void)take_frame(e);
	}
	e->held = 0;
	fifo_clear(&e->rx);
	return true;
}

static void parse(struct world *w, void *arg, uint64_t n)
{
	struct end *e = arg;
	unsigned taken = 0, most = world_chance(w, 3) ? 1 : 100;
	(void)n;
	e->parsing = false;
	if (e->held && hand_over(e))
		return;
	while (alive(e) && !e->closing && taken < most) {
		/* Backpressure: this thread reads the socket. */
		e->waiting = e->attached && e->h->stream_bytes >= e->h->stream_max && e->h->conn == e;
		if (e->waiting)
			return; /* net_room */
		if (e->attached && e->rx.len && (e->slow || (w->shaky && world_more(w, 200) == 0))) {
			hold(e);
			return;
		}
		size_t len = take_frame(e);
		if (len == 0)
			break;
		fifo_drop(&e->rx, len);
		e->rx_at += len;
		taken++;
	}
	if (!alive(e))
		return;
	if (e->closing) {
		fifo_clear(&e->rx);
		return;
	}
	if (taken && e->attached)
		host_step(e->h, &(struct repl_event){.type = EV_BATCH, .session = e->session});
	if (taken == most)
		parse_plan(e, world_below(w, 20 * US));
	else if (e->fin)
		plan_down(e, -ERR_PEER, world_below(w, 100 * US));
}

void net_room(struct host *h)
{
	struct end *e = h->conn;
	if (e && e->waiting && h->stream_bytes < h->stream_max) {
		e->waiting = false;
		parse_plan(e, world_below(h->w, 20 * US));
	}
}

/* ---- dialling ---- */

static void cut(struct conn *c, bool may_be_silent);

/* A network that loses most connections, mostly in its handshake or soon after. */
static void shaky_cut(struct world *w, void *arg, uint64_t n)
{
	struct conn *c = arg;
	(void)n;
	if (w->calm || c->cut || !(alive(&c->end[0]) || alive(&c->end[1])))
		return;
	world_note(w, "net: cut of a shaky connection");
	w->count.cuts++;
	cut(c, true);
}

static void shaky(struct conn *c)
{
	struct world *w = c->w;
	if (!w->shaky || w->calm || world_more(w, 6) == 0)
		return;
	static const uint64_t by[] = {10, 40, 200, 1000};
	world_at(w, w->net_ns + world_more(w, by[world_more(w, 4)] * w->net_ns), shaky_cut, c, 0);
}

/* Which life of the host, and which dial in it. */
#define DIAL_BITS 32
#define DIAL_MASK ((UINT64_C(1) << DIAL_BITS) - 1)

static void dial_failed(struct world *w, void *arg, uint64_t which)
{
	struct host *h = arg;
	struct repl_event ev = {.type = EV_LINK_DOWN, .error = -ERR_PEER, .text = "connection refused"};
	(void)w;
	ev.dial = which & DIAL_MASK;
	if (h->up && h->life == which >> DIAL_BITS)
		host_step(h, &ev);
}

static void handshake_over(struct world *w, void *arg, uint64_t n)
{
	struct end *e = arg;
	(void)w;
	(void)n;
	if (alive(e) && !e->attached) {
		e->closing = true;
		plan_down(e, -ERR_PEER, 0);
	}
}

static void dial_done(struct world *w, void *arg, uint64_t which)
{
	struct host *h = arg, *to = peer_of(h);
	if (!h->up || h->life != which >> DIAL_BITS || h->dying)
		return;
	if (to->bare && blocked_until(w) <= w->now) { /* that connection goes no further: the next one finds it */
		static struct wire_join j;
		repl_join(h->core, &j);
		if (j.flags & WIRE_JOIN_PROTECT)
			host_make(to, &j);
	}
	if (!to->up || to->dying || to->closing || blocked_until(w) > w->now) {
		world_at(w, to->up ? world_below(w, 2 * SEC) : world_delay(w, w->net_ns), dial_failed, h, which);
		return;
	}
	struct conn *c = simalloc(sizeof(*c));
	c->w = w;
	c->next = w->conns;
	w->conns = c;
	for (unsigned i = 0; i < 2; i++) {
		struct end *e = &c->end[i];
		e->c = c;
		e->side = i;
		e->h = i ? to : h;
		e->life = e->h->life;
		e->nonce = world_random(w);
		e->taint_at = UINT64_MAX;
		e->heard_ns = w->now;
		world_at(w, HANDSHAKE_NS, handshake_over, e, 0);
	}
	c->end[0].dial = which & DIAL_MASK;
	send_hello(&c->end[0]);
	shaky(c);
}

void net_dial(struct host *h, uint64_t dial)
{
	struct world *w = h->w;
	world_at(w, world_delay(w, w->net_ns), dial_done, h, h->life << DIAL_BITS | dial);
}

/* ---- cuts ---- */

static void lose(struct end *e)
{
	while (e->fly) {
		struct chunk *k = e->fly;
		e->fly = k->next;
		e->fly_bytes -= k->len;
		simfree(k);
	}
	e->fly_tail = NULL;
}

static void cut(struct conn *c, bool may_be_silent)
{
	struct world *w = c->w;
	if (c->cut)
		return;
	c->cut = true;
	for (unsigned i = 0; i < 2; i++) {
		struct end *e = &c->end[i];
		if (world_chance(w, 2))
			lose(e);
		e->slow = w->shaky && world_more(w, 2) == 0;
		fifo_clear(&e->out);
		if (!alive(e))
			continue;
		if (may_be_silent && world_chance(w, 3) && e->attached)
			continue; /* peer_timeout tells */
		plan_down(e, -ERR_PEER, world_delay(w, 5 * MS));
	}
}

void world_cut(struct world *w)
{
	for (struct conn *c = w->conns; c; c = c->next)
		if (!c->cut && (alive(&c->end[0]) || alive(&c->end[1]))) {
			world_note(w, "net: cut");
			w->count.cuts++;
			cut(c, true);
		}
}

void net_host_died(struct host *h, enum world_crash how)
{
	for (struct conn *c = h->w->conns; c; c = c->next)
		for (unsigned i = 0; i < 2; i++) {
			struct end *e = &c->end[i];
			if (e->h != h || e->life != h->life || e->gone)
				continue;
			e->gone = true;
			if (e->h->conn == e)
				e->h->conn = NULL;
			if (how == WORLD_POWER) {
				cut(c, true);
			} else if (!c->cut) {
				/* The kernel sends what it has, then FIN. */
				fifo_clear(&e->out);
				fly(e, NULL, 0, true);
			}
		}
	h->conn = NULL;
}

static void conn_free(struct conn *c)
{
	for (unsigned i = 0; i < 2; i++) {
		lose(&c->end[i]);
		simfree(c->end[i].out.data);
		simfree(c->end[i].rx.data);
	}
	while (c->sent) {
		struct sent *s = c->sent;
		c->sent = s->next;
		sent_free(s);
	}
	simfree(c);
}

void net_free(struct world *w)
{
	while (w->conns) {
		struct conn *c = w->conns;
		w->conns = c->next;
		conn_free(c);
	}
}
