/* A link: frames over a byte stream, with a bounded handshake, a queue and two threads.
 *
 *   link_send → queue of chunks → sender thread  → stream → peer
 *   frame, batch ← receiver thread ← 256 KiB buffer ← stream ← peer
 *
 * The receiver thread owns the link's life: it connects (dialler), shakes hands, calls `up`, starts the sender,
 * receives until the end, joins everything, calls `down`, closes the stream. So every end, whoever wants it, is the
 * receiver returning from a read; others only note the reason and shut the stream down.
 *
 * Ends. Hard: the stream is shut down, what is queued is dropped. Drain: the sender sends what is queued, half-closes
 * and lingers until the peer has closed too; the receiver reads on and drops what it reads, for a socket closed with
 * unread bytes resets the connection and takes with it what the peer has not fetched yet. A thread that exists
 * only while draining makes it a hard end at the deadline, since both others may be stuck (in a write that the peer
 * does not read, in a callback that waits).
 *
 * Broken while sending: nothing more is queued, but the receiver goes on for a moment, as the peer's last words (why
 * it refused us) may lie in the socket still.
 *
 * Invariants: the first reason for the end is the one reported. A frame is in exactly one place: a chunk of the
 * queue, or the sender's hands; its release is called once by whoever holds it. No callback and no release runs with
 * a lock of the link held. After `closing` is set nothing is queued and no frame is handed over.
 *
 * Lock order: the server's lock → a link's lock. Both are leaves otherwise.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "net/link.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/thread.h"

#define LINK_CHUNK_FRAMES 256
#define LINK_SPARE_CHUNKS_MAX 8
#define LINK_WRITE_FRAMES 64 /* in one writev */
#define LINK_WRITE_BYTES (1U << 20)
#define LINK_BUFFER_SIZE (256U << 10)
/* An incomplete payload above this is read straight into its own memory; a smaller one waits in the buffer, as one
 * more read of its rest alone would cost more than moving it. */
#define LINK_DIRECT_MIN (32U << 10)
/* For a peer that is to read our last words, or whose last words we are to read. */
#define LINK_LINGER_MS 1000
#define LINK_ACCEPT_RETRY_MS 100

/* The buffer always has room for what is waited for in it. */
_Static_assert(LINK_BUFFER_SIZE >= 2 * (LINK_DIRECT_MIN + WIRE_HEADER_SIZE), "receive buffer too small");

struct link_item {
	struct wire_frame frame;
	void *payload;
	void (*release)(void *);
	void *release_arg;
};

struct link_chunk {
	struct link_chunk *next;
	unsigned n;
	struct link_item items[LINK_CHUNK_FRAMES];
};

enum link_state {
	LINK_CONNECTING, /* until `up` is called */
	LINK_OPEN,
	LINK_ENDING, /* the receiver has left its loop */
};

struct link {
	atomic_uint refs;
	struct link_callbacks cb;
	_Atomic(void *) arg;
	struct link_self self;
	bool dialer;
	bool refuse_remote;	    /* set at accept: the peer is not loopback and that is not allowed */
	struct link_server *server; /* NULL: dialled */
	char *addr;		    /* dialled: as given */
	char name[ADDR_SIZE];
	struct wire_hello peer; /* written before `up`, as session */
	uint64_t session;
	_Atomic uint64_t heard_ns;
	_Atomic uint64_t queued;
	atomic_bool closing; /* written under lock */
	pthread_t receiver, sender, drainer;

	struct mutex lock; /* everything below */
	struct cond work;  /* the sender waits: something queued, or the end */
	struct cond timer; /* the drainer waits */
	enum link_state state;
	bool hard, draining, drain_over, receiver_done, sender_asleep, send_failed;
	bool urgent;		/* something queued is to be sent at once */
	uint64_t lazy_until_ns; /* what is queued lazily leaves by then */
	uint64_t drain_deadline_ns;
	struct stream *stream;
	struct link_chunk *head, *tail, *spare;
	unsigned n_spare;
	struct err reason; /* code 0: none yet */

	/* the server's, under its lock */
	struct link *next;
	bool preauth, finished, joined;
};

struct link_server {
	struct mutex lock;
	struct cond finished;
	struct link *links; /* each holds a reference for the list */
	unsigned n_preauth, n_established;
	bool stopping;
	int listen_fd, wake_fd;
	bool allow_remote;
	struct link_self self;
	struct link_callbacks cb;
	void *arg;
	pthread_t thread;
	char addr[STREAM_NAME_SIZE];
};

/* The link whose receiver this thread is: the last reference may be dropped there, where joining is impossible. */
static _Thread_local const struct link *link_of_thread;

static void *link_arg(struct link *l)
{
	return atomic_load_explicit(&l->arg, memory_order_relaxed);
}

/* ---- reasons and ends ---- */

static void fail_locked(struct link *l, int code, const char *fmt, ...) REQUIRES(&l->lock)
    __attribute__((format(printf, 3, 4)));
static void fail_locked(struct link *l, int code, const char *fmt, ...)
{
	va_list ap;

	if (l->reason.code)
		return;
	va_start(ap, fmt);
	(void)err_setv(&l->reason, code < 0 ? -code : code, fmt, ap);
	va_end(ap);
}

#define link_fail(l, ...)                                                                                              \
	do {                                                                                                           \
		mutex_lock(&(l)->lock);                                                                                \
		fail_locked(l, __VA_ARGS__);                                                                           \
		mutex_unlock(&(l)->lock);                                                                              \
	} while (0)

static void hard_end_locked(struct link *l) REQUIRES(&l->lock)
{
	l->hard = true;
	atomic_store(&l->closing, true);
	if (l->stream)
		l->stream->ops->shutdown(l->stream);
	cond_broadcast(&l->work);
	cond_broadcast(&l->timer);
}

static void *drainer_main(void *p)
{
	struct link *l = p;
	bool in_time = true;

	mutex_lock(&l->lock);
	while (!l->drain_over && !l->hard && in_time)
		in_time = cond_wait_until(&l->timer, &l->lock, l->drain_deadline_ns);
	if (!l->drain_over)
		hard_end_locked(l);
	mutex_unlock(&l->lock);
	return NULL;
}

static void close_locked(struct link *l, unsigned drain_ms) REQUIRES(&l->lock)
{
	if (l->hard)
		return;
	if (drain_ms == 0 || l->state == LINK_CONNECTING) {
		hard_end_locked(l);
		return;
	}
	/* Ending already, draining or broken: its own deadline stands. */
	if (atomic_load(&l->closing) || l->state == LINK_ENDING)
		return;
	l->drain_deadline_ns = clock_mono_ns() + drain_ms * NS_PER_MS;
	if (thread_start(&l->drainer, "link-drain", drainer_main, l)) {
		hard_end_locked(l);
		return;
	}
	l->draining = true;
	atomic_store(&l->closing, true);
	cond_broadcast(&l->work);
}

void link_close(struct link *l, unsigned drain_ms)
{
	mutex_lock(&l->lock);
	fail_locked(l, ERR_CANCELED, "the connection to %s was closed by this host", l->name);
	close_locked(l, drain_ms);
	mutex_unlock(&l->lock);
}

/* ---- queue ---- */

static void item_release(const struct link_item *it)
{
	if (it->release)
		it->release(it->release_arg);
	else
		free(it->payload);
}

static uint64_t item_bytes(const struct link_item *it)
{
	return WIRE_HEADER_SIZE + (uint64_t)it->frame.length_payload;
}

static struct link_chunk *chunk_get_locked(struct link *l) REQUIRES(&l->lock)
{
	struct link_chunk *c = l->spare;

	if (c) {
		l->spare = c->next;
		l->n_spare--;
	} else {
		c = malloc(sizeof *c);
		if (!c)
			return NULL;
	}
	c->next = NULL;
	c->n = 0;
	if (l->tail)
		l->tail->next = c;
	else
		l->head = c;
	l->tail = c;
	return c;
}

static void chunk_put(struct link *l, struct link_chunk *c)
{
	mutex_lock(&l->lock);
	if (l->n_spare < LINK_SPARE_CHUNKS_MAX) {
		c->next = l->spare;
		l->spare = c;
		l->n_spare++;
		c = NULL;
	}
	mutex_unlock(&l->lock);
	free(c);
}

/* Releases the frames of a chain, the first chunk's from `from` on, and frees it. */
static void chunks_drop(struct link *l, struct link_chunk *c, unsigned from)
{
	while (c) {
		struct link_chunk *next = c->next;

		for (; from < c->n; from++) {
			atomic_fetch_sub(&l->queued, item_bytes(&c->items[from]));
			item_release(&c->items[from]);
		}
		from = 0;
		free(c);
		c = next;
	}
}

static int queue_frame(struct link *l, const struct wire_frame *f, void *payload, void (*release)(void *),
		       void *release_arg, bool lazy)
{
	const struct link_item item = {.frame = *f, .payload = payload, .release = release, .release_arg = release_arg};
	struct link_chunk *c;
	bool wake;

	PRE(f->length_payload <= WIRE_PAYLOAD_MAX);
	PRE(payload || f->length_payload == 0);
	mutex_lock(&l->lock);
	if (l->send_failed || atomic_load_explicit(&l->closing, memory_order_relaxed))
		goto refused;
	c = l->tail;
	if (!c || c->n == LINK_CHUNK_FRAMES) {
		c = chunk_get_locked(l);
		if (!c) {
			fail_locked(l, ERR_NOMEM, "sending to %s: out of memory", l->name);
			hard_end_locked(l);
			goto refused;
		}
	}
	bool first = l->head == c && c->n == 0;
	c->items[c->n++] = item;
	uint64_t queued =
	    atomic_fetch_add_explicit(&l->queued, item_bytes(&item), memory_order_relaxed) + item_bytes(&item);
	if (!lazy)
		l->urgent = true;
	if (first)
		l->lazy_until_ns = clock_mono_ns() + LINK_LAZY_NS;
	wake = l->sender_asleep && (first || l->urgent || queued >= LINK_LAZY_BYTES);
	if (wake)
		l->sender_asleep = false;
	mutex_unlock(&l->lock);
	if (wake)
		cond_signal(&l->work);
	return 0;
refused:
	mutex_unlock(&l->lock);
	item_release(&item);
	return -ERR_PEER;
}

int link_send(struct link *l, const struct wire_frame *f, void *payload, void (*release)(void *), void *release_arg)
{
	return queue_frame(l, f, payload, release, release_arg, false);
}

int link_send_lazy(struct link *l, const struct wire_frame *f, void *payload, void (*release)(void *),
		   void *release_arg)
{
	return queue_frame(l, f, payload, release, release_arg, true);
}

uint64_t link_queued(struct link *l)
{
	return atomic_load(&l->queued);
}

/* ---- sender ---- */

struct link_tx {
	uint64_t next; /* number of the next frame */
	uint8_t headers[LINK_WRITE_FRAMES][WIRE_HEADER_SIZE];
	struct iovec iov[2 * LINK_WRITE_FRAMES];
	int n_iov;
};

static void tx_add(struct link_tx *tx, void *base, size_t len)
{
	struct iovec *last = tx->n_iov ? &tx->iov[tx->n_iov - 1] : NULL;

	if (last && (uint8_t *)last->iov_base + last->iov_len == (uint8_t *)base)
		last->iov_len += len; /* headers of frames without payload lie side by side */
	else
		tx->iov[tx->n_iov++] = (struct iovec){.iov_base = base, .iov_len = len};
}

/* Writes frames of c from `from` on, as many as one writev takes. Returns how many, or a negative code. */
static int tx_write(struct link *l, struct link_tx *tx, struct link_chunk *c, unsigned from, uint64_t *ret_bytes)
{
	unsigned n = 0;
	uint64_t bytes = 0;
	int r;

	tx->n_iov = 0;
	while (from + n < c->n && n < LINK_WRITE_FRAMES && bytes < LINK_WRITE_BYTES) {
		struct link_item *it = &c->items[from + n];

		it->frame.number = tx->next++;
		it->frame.crc_payload = crc32c(0, it->payload, it->frame.length_payload);
		wire_header_encode(&it->frame, l->session, tx->headers[n]);
		tx_add(tx, tx->headers[n], WIRE_HEADER_SIZE);
		if (it->frame.length_payload)
			tx_add(tx, it->payload, it->frame.length_payload);
		bytes += item_bytes(it);
		n++;
	}
	r = l->stream->ops->writev(l->stream, tx->iov, tx->n_iov);
	if (r)
		return r;
	*ret_bytes = bytes;
	return (int)n;
}

/* Sends and frees a chain. 0, or a negative code with the rest released. */
static int tx_chunks(struct link *l, struct link_tx *tx, struct link_chunk *c)
{
	while (c) {
		struct link_chunk *next = c->next;

		for (unsigned done = 0; done < c->n;) {
			uint64_t bytes = 0;
			int n = tx_write(l, tx, c, done, &bytes);

			if (n < 0) {
				chunks_drop(l, c, done);
				return n;
			}
			atomic_fetch_sub(&l->queued, bytes);
			for (unsigned end = done + (unsigned)n; done < end; done++)
				item_release(&c->items[done]);
			l->cb.sent(l, link_arg(l), bytes);
		}
		chunk_put(l, c);
		c = next;
	}
	return 0;
}

/* The queue, taken whole; NULL with *ret_finish: draining and all is sent, or NULL without: a hard end. */
static struct link_chunk *tx_take(struct link *l, bool *ret_finish)
{
	struct link_chunk *c;

	mutex_lock(&l->lock);
	while (!atomic_load(&l->closing)) {
		bool in_time = true;

		/* Frames queued lazily wait for company: a wake-up and a system call for each would cost more than
		 * they. */
		if (l->head && (l->urgent || atomic_load(&l->queued) >= LINK_LAZY_BYTES))
			break;
		l->sender_asleep = true;
		if (l->head)
			in_time = cond_wait_until(&l->work, &l->lock, l->lazy_until_ns);
		else
			cond_wait(&l->work, &l->lock);
		if (!in_time)
			break;
	}
	l->sender_asleep = l->urgent = false;
	c = NULL;
	if (!l->hard) {
		c = l->head;
		l->head = l->tail = NULL;
	}
	*ret_finish = !l->hard && !c;
	mutex_unlock(&l->lock);
	return c;
}

/* Gives the peer time to close, and the receiver to read what the peer said last; then ends it. */
static void tx_linger(struct link *l, uint64_t deadline_ns)
{
	bool in_time = true;

	mutex_lock(&l->lock);
	while (!l->receiver_done && !l->hard && in_time)
		in_time = cond_wait_until(&l->work, &l->lock, deadline_ns);
	hard_end_locked(l);
	mutex_unlock(&l->lock);
}

static void *sender_main(void *p)
{
	struct link *l = p;
	struct link_tx tx = {.next = 1};
	bool finish = false;
	int r = 0;

	while (r == 0) {
		struct link_chunk *c = tx_take(l, &finish);

		if (!c)
			break;
		r = tx_chunks(l, &tx, c);
	}
	if (finish) {
		l->stream->ops->finish(l->stream);
		tx_linger(l, l->drain_deadline_ns);
	} else if (r) {
		mutex_lock(&l->lock);
		fail_locked(l, r, "the connection to %s was lost while sending", l->name);
		l->send_failed = true;
		mutex_unlock(&l->lock);
		tx_linger(l, clock_mono_ns() + LINK_LINGER_MS * NS_PER_MS);
	}
	return NULL;
}

/* ---- receiver ---- */

struct link_rx {
	uint8_t *buf; /* unparsed: [pos, end) */
	size_t pos, end;
	uint64_t next;	/* number of the next frame */
	bool delivered; /* since the last `batch` */
	size_t unheard; /* bytes since the peer last counted as heard */
};

/* A whole frame counts as a word of the peer's, and so does a large frame's progress. A trickle does not: after bytes
 * were lost on the way, later frames would fill up the one that was cut, and keep the link alive for minutes. */
static void rx_heard(struct link *l, struct link_rx *rx)
{
	rx->unheard = 0;
	atomic_store_explicit(&l->heard_ns, clock_mono_ns(), memory_order_relaxed);
}

static int64_t rx_read(struct link *l, struct link_rx *rx, void *buf, size_t len)
{
	int64_t n;

	if (rx->delivered) {
		rx->delivered = false;
		l->cb.batch(l, link_arg(l));
	}
	n = l->stream->ops->read(l->stream, buf, len);
	if (n > 0) {
		rx->unheard += (size_t)n;
		if (rx->unheard >= LINK_HEARD_BYTES)
			rx_heard(l, rx);
	}
	return n;
}

/* Notes why a read gave no bytes. n: what it returned. */
static int rx_ended(struct link *l, int64_t n, bool inside_frame)
{
	if (n < 0) {
		link_fail(l, (int)n, "the connection to %s was lost", l->name);
		return (int)n;
	}
	if (inside_frame)
		link_fail(l, ERR_PEER, "the connection to %s ended in the middle of a frame", l->name);
	else
		link_fail(l, ERR_PEER, "the peer %s closed the connection", l->name);
	return -ERR_PEER;
}

static int rx_fill(struct link *l, struct link_rx *rx)
{
	int64_t n;

	if (rx->pos) {
		memmove(rx->buf, rx->buf + rx->pos, rx->end - rx->pos);
		rx->end -= rx->pos;
		rx->pos = 0;
	}
	n = rx_read(l, rx, rx->buf + rx->end, LINK_BUFFER_SIZE - rx->end);
	if (n <= 0)
		return rx_ended(l, n, rx->end > 0);
	rx->end += (size_t)n;
	return 0;
}

/* The payload, complete or not in the buffer, into memory of its own. */
static int rx_payload(struct link *l, struct link_rx *rx, size_t len, uint8_t **ret)
{
	size_t have = rx->end - rx->pos;
	uint8_t *p = malloc(len);

	if (!p) {
		link_fail(l, ERR_NOMEM, "receiving from %s: out of memory", l->name);
		return -ERR_NOMEM;
	}
	if (have > len)
		have = len;
	memcpy(p, rx->buf + rx->pos, have);
	rx->pos += have;
	while (have < len) {
		int64_t n = rx_read(l, rx, p + have, len - have);

		if (n <= 0) {
			free(p);
			return rx_ended(l, n, true);
		}
		have += (size_t)n;
	}
	*ret = p;
	return 0;
}

static int rx_check(struct link *l, struct link_rx *rx, struct wire_frame *f)
{
	struct err e = {0};
	int r = wire_header_decode(f, l->session, rx->buf + rx->pos, WIRE_PAYLOAD_MAX, &e);

	if (r) {
		link_fail(l, r, "frame %llu from %s: %s", (unsigned long long)rx->next, l->name, e.text);
		return r;
	}
	if (f->number != rx->next) {
		link_fail(l, ERR_PROTO, "frame %llu was expected from %s, frame %llu came: lost or doubled data",
			  (unsigned long long)rx->next, l->name, (unsigned long long)f->number);
		return -ERR_PROTO;
	}
	if (f->type == WIRE_HELLO) {
		link_fail(l, ERR_PROTO, "frame %llu from %s is a second HELLO", (unsigned long long)rx->next, l->name);
		return -ERR_PROTO;
	}
	return 0;
}

/* Takes the frame whose header is checked out of the buffer and hands it over. */
static int rx_deliver(struct link *l, struct link_rx *rx, const struct wire_frame *f)
{
	uint8_t *payload = NULL;
	int r;

	rx->pos += WIRE_HEADER_SIZE;
	if (f->length_payload) {
		r = rx_payload(l, rx, f->length_payload, &payload);
		if (r)
			return r;
	}
	if (crc32c(0, payload, f->length_payload) != f->crc_payload) {
		free(payload);
		link_fail(l, ERR_CORRUPT, "frame %llu (%s) from %s: the payload's checksum does not match",
			  (unsigned long long)f->number, wire_type_name(f->type), l->name);
		return -ERR_CORRUPT;
	}
	rx->next++;
	/* Closed while the payload was on its way. */
	if (atomic_load_explicit(&l->closing, memory_order_relaxed)) {
		free(payload);
		return 0;
	}
	rx->delivered = true;
	rx_heard(l, rx);
	r = l->cb.frame(l, link_arg(l), f, payload);
	if (r < 0) {
		mutex_lock(&l->lock);
		fail_locked(l, r, "frame %llu (%s) from %s was refused here: %s", (unsigned long long)f->number,
			    wire_type_name(f->type), l->name, err_short(r));
		close_locked(l, LINK_LINGER_MS);
		mutex_unlock(&l->lock);
	}
	return 0;
}

/* Until the end, for whatever reason; the reason is noted. Returns true if it ended with the peer's end of stream
 * while our own close drains: the peer may still read. */
static bool rx_loop(struct link *l, struct link_rx *rx)
{
	bool draining;
	int64_t n;

	while (!atomic_load_explicit(&l->closing, memory_order_relaxed)) {
		struct wire_frame f;
		size_t have = rx->end - rx->pos;

		if (have < WIRE_HEADER_SIZE) {
			if (rx_fill(l, rx))
				goto ended;
			continue;
		}
		if (rx_check(l, rx, &f))
			return false;
		if (f.length_payload > have - WIRE_HEADER_SIZE && f.length_payload <= LINK_DIRECT_MIN) {
			if (rx_fill(l, rx))
				goto ended;
			continue;
		}
		if (rx_deliver(l, rx, &f))
			goto ended;
	}
	/* Closed here: read on, or closing the socket would reset it under what the peer has yet to read. */
	do
		n = rx_read(l, rx, rx->buf, LINK_BUFFER_SIZE);
	while (n > 0);
ended:
	mutex_lock(&l->lock);
	draining = l->draining;
	mutex_unlock(&l->lock);
	return draining;
}

/* ---- handshake, in the receiver thread ---- */

static int shake_bound(struct link *l, uint64_t deadline_ns)
{
	uint64_t now = clock_mono_ns();

	if (now >= deadline_ns)
		return -ERR_TIMEOUT;
	stream_tcp_set_timeout(l->stream, (unsigned)((deadline_ns - now) / NS_PER_MS + 1));
	return 0;
}

static int shake_read(struct link *l, void *buf, size_t len, uint64_t deadline_ns)
{
	for (size_t have = 0; have < len;) {
		int r = shake_bound(l, deadline_ns);
		int64_t n = r ? r : l->stream->ops->read(l->stream, (uint8_t *)buf + have, len - have);

		if (n < 0)
			return (int)n;
		if (n == 0)
			return -ERR_PEER;
		atomic_store_explicit(&l->heard_ns, clock_mono_ns(), memory_order_relaxed);
		have += (size_t)n;
	}
	return 0;
}

static int shake_write(struct link *l, enum wire_type type, void *payload, size_t len, uint64_t session,
		       uint64_t number, uint64_t deadline_ns)
{
	struct wire_frame f = {.type = (uint16_t)type, .length_payload = (uint32_t)len, .number = number};
	uint8_t header[WIRE_HEADER_SIZE];
	struct iovec iov[2] = {{header, sizeof header}, {payload, len}};
	int r = shake_bound(l, deadline_ns);

	if (r)
		return r;
	f.crc_payload = crc32c(0, payload, len);
	wire_header_encode(&f, session, header);
	return l->stream->ops->writev(l->stream, iov, 2);
}

/* Notes a failure of the transport during the handshake. */
static int shake_failed(struct link *l, int r)
{
	mutex_lock(&l->lock);
	if (r == -ERR_TIMEOUT)
		fail_locked(l, ERR_TIMEOUT, "the peer %s did not complete the handshake within %g s", l->name,
			    LINK_HANDSHAKE_MS / 1000.0);
	else
		fail_locked(l, r, "the connection to %s was lost during the handshake", l->name);
	mutex_unlock(&l->lock);
	return r;
}

/* Frame 0 of the far end: HELLO or REFUSE. */
static int shake_receive(struct link *l, struct wire_frame *f, uint8_t payload[WIRE_HELLO_MAX], uint64_t deadline_ns)
{
	uint8_t header[WIRE_HEADER_SIZE];
	struct err e = {0};
	int r = shake_read(l, header, sizeof header, deadline_ns);

	if (r)
		return shake_failed(l, r);
	r = wire_header_decode(f, 0, header, WIRE_HELLO_MAX, &e);
	if (r) {
		link_fail(l, r, "what %s sent is no handshake of repfs: %s", l->name, e.text);
		return r;
	}
	if (f->number != 0 || (f->type != WIRE_HELLO && f->type != WIRE_REFUSE)) {
		link_fail(l, ERR_PROTO, "the peer %s began with frame %llu (%s) in place of a HELLO", l->name,
			  (unsigned long long)f->number, wire_type_name(f->type));
		return -ERR_PROTO;
	}
	r = shake_read(l, payload, f->length_payload, deadline_ns);
	if (r)
		return shake_failed(l, r);
	if (crc32c(0, payload, f->length_payload) != f->crc_payload) {
		link_fail(l, ERR_CORRUPT, "the checksum of the handshake of %s does not match", l->name);
		return -ERR_CORRUPT;
	}
	return 0;
}

/* Tells the peer why and waits, within bounds, until it has closed: a reset would take the words from it. */
static int shake_refuse(struct link *l, int code, const char *text, uint64_t session, uint64_t number)
{
	uint64_t deadline_ns = clock_mono_ns() + LINK_LINGER_MS * NS_PER_MS;
	struct wire_refuse x = {.code = (uint16_t)(code < 0 ? -code : code)};
	uint8_t buf[WIRE_HELLO_MAX];
	int len;

	link_fail(l, code, "%s", text);
	(void)snprintf(x.text, sizeof x.text, "%.*s", (int)sizeof x.text - 1, text);
	len = wire_refuse_encode(&x, buf, sizeof buf);
	INVARIANT(len > 0);
	if (shake_write(l, WIRE_REFUSE, buf, (size_t)len, session, number, deadline_ns) == 0) {
		l->stream->ops->finish(l->stream);
		while (shake_bound(l, deadline_ns) == 0 && l->stream->ops->read(l->stream, buf, sizeof buf) > 0)
			;
	}
	return code < 0 ? code : -code;
}

static int shake_refused(struct link *l, const void *payload, size_t len)
{
	struct wire_refuse x;
	struct err e = {0};
	int r = wire_refuse_decode(&x, payload, len, &e);

	if (r) {
		link_fail(l, r, "the refusal of %s can't be read: %s", l->name, e.text);
		return r;
	}
	link_fail(l, x.code, "%s", x.text[0] ? x.text : "the peer refused the connection");
	return -x.code;
}

static void hello_fill(const struct link *l, struct wire_hello *h)
{
	*h = (struct wire_hello){
	    .version_min = WIRE_VERSION_MIN,
	    .version_max = WIRE_VERSION_MAX,
	    .features = l->self.features,
	    .nonce = random_u64_nonzero(),
	};
	memcpy(h->store, l->self.store, sizeof h->store);
	memcpy(h->program, l->self.program, sizeof h->program);
	h->program[sizeof h->program - 1] = '\0';
}

/* Decodes and judges the peer's HELLO into l->peer. */
static int shake_judge(struct link *l, const struct wire_hello *mine, const void *payload, size_t len, struct err *e)
{
	int r = wire_hello_decode(&l->peer, payload, len, e);

	if (r)
		return r;
	r = wire_negotiate(mine, &l->peer, e);
	if (r < 0)
		return r;
	if (memcmp(l->peer.store, mine->store, sizeof mine->store) == 0)
		return err_set(e, ERR_USAGE,
			       "both ends of the connection are the same store; give the other host's address");
	return 0;
}

static bool server_admit(struct link *l);

/* state OPEN from before `up`, so that the callee may queue and close with a drain in it already. */
static int link_call_up(struct link *l)
{
	bool hard;
	int r;

	mutex_lock(&l->lock);
	hard = l->hard;
	if (!hard)
		l->state = LINK_OPEN;
	mutex_unlock(&l->lock);
	if (hard)
		return -ERR_CANCELED;
	if (!l->dialer)
		(void)link_ref(l);
	r = l->cb.up(l, link_arg(l));
	if (r < 0 && !l->dialer)
		link_unref(l);
	return r < 0 ? r : 0;
}

static int link_up_refused(struct link *l, int r, uint64_t session, uint64_t number)
{
	char text[128];

	(void)snprintf(text, sizeof text, "the connection was refused: %s", err_short(r));
	return shake_refuse(l, r, text, session, number);
}

static int shake_listener(struct link *l, uint64_t deadline_ns)
{
	uint8_t payload[WIRE_HELLO_MAX];
	struct wire_frame f;
	struct wire_hello mine;
	struct err e = {0};
	int r;

	if (l->refuse_remote)
		return shake_refuse(l, ERR_PERM,
				    "the listening host takes peers over loopback only, as it runs without TLS; "
				    "start its repfs with the option `insecure` to take others, in clear text",
				    0, 0);
	r = shake_receive(l, &f, payload, deadline_ns);
	if (r)
		return r;
	if (f.type == WIRE_REFUSE)
		return shake_refused(l, payload, f.length_payload);
	hello_fill(l, &mine);
	r = shake_judge(l, &mine, payload, f.length_payload, &e);
	if (r)
		return shake_refuse(l, r, e.text, 0, 0);
	if (!server_admit(l))
		return shake_refuse(l, ERR_LIMIT, "the listening host has all the connections that it takes", 0, 0);
	l->session = wire_session(l->peer.nonce, mine.nonce);
	r = link_call_up(l);
	if (r)
		return link_up_refused(l, r, 0, 0);
	r = wire_hello_encode(&mine, payload, sizeof payload);
	INVARIANT(r > 0);
	r = shake_write(l, WIRE_HELLO, payload, (size_t)r, 0, 0, deadline_ns);
	return r ? shake_failed(l, r) : 0;
}

static int shake_dialer(struct link *l, uint64_t deadline_ns)
{
	uint8_t payload[WIRE_HELLO_MAX];
	struct wire_frame f;
	struct wire_hello mine;
	struct err e = {0};
	int r;

	hello_fill(l, &mine);
	r = wire_hello_encode(&mine, payload, sizeof payload);
	INVARIANT(r > 0);
	r = shake_write(l, WIRE_HELLO, payload, (size_t)r, 0, 0, deadline_ns);
	/* A peer that refuses unasked may have closed already: its words are there to be read. */
	if (r == -ERR_TIMEOUT)
		return shake_failed(l, r);
	r = shake_receive(l, &f, payload, deadline_ns);
	if (r)
		return r;
	if (f.type == WIRE_REFUSE)
		return shake_refused(l, payload, f.length_payload);
	r = shake_judge(l, &mine, payload, f.length_payload, &e);
	if (r) {
		link_fail(l, r, "%s", e.text);
		return r;
	}
	l->session = wire_session(mine.nonce, l->peer.nonce);
	r = link_call_up(l);
	return r ? link_up_refused(l, r, l->session, 1) : 0;
}

/* ---- life ---- */

static bool link_connect_canceled(void *arg)
{
	struct link *l = arg;

	return atomic_load(&l->closing);
}

static int link_connect(struct link *l)
{
	struct stream *s = NULL;
	struct err e = {0};
	int r = stream_tcp_dial_cancelable(l->addr, LINK_CONNECT_MS, link_connect_canceled, l, &s, &e);

	if (r) {
		link_fail(l, r, "%s", e.text);
		return r;
	}
	mutex_lock(&l->lock);
	l->stream = s;
	if (l->hard)
		r = -ERR_CANCELED;
	mutex_unlock(&l->lock);
	return r;
}

static int link_establish(struct link *l)
{
	uint64_t deadline_ns;
	int r = l->dialer ? link_connect(l) : 0;

	if (r)
		return r;
	deadline_ns = clock_mono_ns() + LINK_HANDSHAKE_MS * NS_PER_MS;
	r = l->dialer ? shake_dialer(l, deadline_ns) : shake_listener(l, deadline_ns);
	if (r)
		return r;
	stream_tcp_set_timeout(l->stream, 0);
	return 0;
}

static void link_exchange(struct link *l)
{
	struct link_rx rx = {.next = 1};
	bool peer_may_read = false;

	rx.buf = malloc(LINK_BUFFER_SIZE);
	if (!rx.buf || thread_start(&l->sender, "link-send", sender_main, l)) {
		free(rx.buf);
		link_fail(l, ERR_NOMEM, "the connection to %s: no memory or no thread for it", l->name);
		return;
	}
	peer_may_read = rx_loop(l, &rx);
	if (rx.delivered)
		l->cb.batch(l, link_arg(l));
	mutex_lock(&l->lock);
	l->state = LINK_ENDING;
	l->receiver_done = true;
	if (!peer_may_read)
		hard_end_locked(l);
	cond_broadcast(&l->work);
	mutex_unlock(&l->lock);
	(void)pthread_join(l->sender, NULL);
	free(rx.buf);
}

/* Everything that may still run is waited for, everything queued released; then the one `down`. */
static void link_end(struct link *l)
{
	struct link_chunk *rest;
	struct stream *s;
	struct err reason;
	bool drainer;

	mutex_lock(&l->lock);
	l->state = LINK_ENDING;
	fail_locked(l, ERR_PEER, "the connection to %s was lost", l->name);
	reason = l->reason;
	drainer = l->draining;
	l->drain_over = true;
	hard_end_locked(l);
	rest = l->head;
	l->head = l->tail = NULL;
	s = l->stream;
	l->stream = NULL;
	mutex_unlock(&l->lock);
	if (drainer)
		(void)pthread_join(l->drainer, NULL);
	chunks_drop(l, rest, 0);
	if (s)
		s->ops->close(s);
	l->cb.down(l, link_arg(l), -reason.code, reason.text);
}

static void server_finished(struct link *l);

static void *receiver_main(void *p)
{
	struct link *l = p;

	link_of_thread = l;
	if (link_establish(l) == 0)
		link_exchange(l);
	link_end(l);
	if (l->server)
		server_finished(l);
	link_unref(l);
	return NULL;
}

static struct link *link_new(const struct link_self *self, const struct link_callbacks *cb, void *arg)
{
	struct link *l = calloc(1, sizeof *l);

	if (!l)
		return NULL;
	atomic_init(&l->refs, 1);
	l->cb = *cb;
	atomic_init(&l->arg, arg);
	l->self = *self;
	atomic_init(&l->heard_ns, clock_mono_ns());
	atomic_init(&l->queued, 0);
	atomic_init(&l->closing, false);
	mutex_init(&l->lock);
	cond_init(&l->work);
	cond_init(&l->timer);
	return l;
}

static void link_free(struct link *l)
{
	INVARIANT(!l->stream && !l->head);
	while (l->spare) {
		struct link_chunk *next = l->spare->next;

		free(l->spare);
		l->spare = next;
	}
	cond_destroy(&l->timer);
	cond_destroy(&l->work);
	mutex_destroy(&l->lock);
	free(l->addr);
	free(l);
}

struct link *link_ref(struct link *l)
{
	unsigned was = atomic_fetch_add(&l->refs, 1);

	PRE(was > 0);
	return l;
}

void link_unref(struct link *l)
{
	if (!l)
		return;
	unsigned was = atomic_fetch_sub(&l->refs, 1);
	PRE(was > 0);
	if (was > 1)
		return;
	/* The receiver holds a reference until it has nothing left to do, so this join is momentary. */
	if (link_of_thread == l)
		(void)pthread_detach(pthread_self());
	else if (!l->joined)
		(void)pthread_join(l->receiver, NULL);
	link_free(l);
}

int link_dial(const char *addr, const struct link_self *self, const struct link_callbacks *cb, void *arg,
	      struct link **ret, struct err *e)
{
	char host[STREAM_HOST_SIZE], port[STREAM_PORT_SIZE];
	struct link *l;
	int r = addr_split(addr, host, sizeof host, port, sizeof port, e);

	if (r)
		return r;
	if (strtoul(port, NULL, 10) == 0)
		return err_set(e, ERR_USAGE, "address '%.100s': port 0 can't be dialled", addr);
	l = link_new(self, cb, arg);
	if (!l)
		return err_set(e, ERR_NOMEM, "connecting to %s: out of memory", addr);
	l->dialer = true;
	l->addr = strdup(addr);
	(void)snprintf(l->name, sizeof l->name, "%s", addr);
	(void)link_ref(l); /* the receiver's */
	if (!l->addr || thread_start(&l->receiver, "link-recv", receiver_main, l)) {
		link_free(l);
		return err_set(e, ERR_NOMEM, "connecting to %s: no memory or no thread for it", addr);
	}
	*ret = l;
	return 0;
}

/* ---- server ---- */

static void server_wake(struct link_server *s)
{
	uint64_t one = 1;

	/* Fails only when the counter is full: awake enough. */
	(void)!write(s->wake_fd, &one, sizeof one);
}

/* The handshake is as good as done: no more counted as unauthenticated. false: there are enough links. */
static bool server_admit(struct link *l)
{
	struct link_server *s = l->server;
	bool ok;

	mutex_lock(&s->lock);
	ok = s->n_established < LINKS_MAX && !s->stopping;
	if (ok) {
		l->preauth = false;
		s->n_preauth--;
		s->n_established++;
	}
	mutex_unlock(&s->lock);
	return ok;
}

static void server_finished(struct link *l)
{
	struct link_server *s = l->server;

	mutex_lock(&s->lock);
	if (l->preauth)
		s->n_preauth--;
	else
		s->n_established--;
	l->finished = true;
	cond_broadcast(&s->finished);
	server_wake(s);
	mutex_unlock(&s->lock);
}

/* Takes a finished link out of the list. */
static struct link *server_pop_locked(struct link_server *s) REQUIRES(&s->lock)
{
	for (struct link **at = &s->links; *at; at = &(*at)->next) {
		struct link *l = *at;

		if (l->finished) {
			*at = l->next;
			return l;
		}
	}
	return NULL;
}

static void server_reap(struct link_server *s)
{
	struct link *l;

	do {
		mutex_lock(&s->lock);
		l = server_pop_locked(s);
		mutex_unlock(&s->lock);
		if (l) {
			(void)pthread_join(l->receiver, NULL);
			l->joined = true;
			link_unref(l);
		}
	} while (l);
}

static void server_take(struct link_server *s, int fd)
{
	struct link *l;
	bool room;

	mutex_lock(&s->lock);
	room = s->n_preauth < LINK_PREAUTH_MAX && !s->stopping;
	mutex_unlock(&s->lock);
	l = room ? link_new(&s->self, &s->cb, s->arg) : NULL;
	if (!l) {
		(void)close(fd);
		return;
	}
	l->refuse_remote = !s->allow_remote && !tcp_peer_is_loopback(fd);
	l->server = s;
	l->preauth = true;
	l->stream = stream_tcp_from_fd(fd);
	if (!l->stream) {
		link_free(l);
		return;
	}
	(void)snprintf(l->name, sizeof l->name, "%s", l->stream->ops->peer_name(l->stream));
	(void)link_ref(l); /* the receiver's; the first one is the list's */
	mutex_lock(&s->lock);
	if (thread_start(&l->receiver, "link-recv", receiver_main, l)) {
		mutex_unlock(&s->lock);
		l->stream->ops->close(l->stream);
		l->stream = NULL;
		link_free(l);
		return;
	}
	l->next = s->links;
	s->links = l;
	s->n_preauth++;
	mutex_unlock(&s->lock);
}

static void *server_main(void *p)
{
	struct link_server *s = p;
	bool stopping = false, starved = false;

	while (!stopping) {
		struct pollfd fds[2] = {{.fd = s->wake_fd, .events = POLLIN},
					{.fd = starved ? -1 : s->listen_fd, .events = POLLIN}};
		uint64_t count;

		if (poll(fds, 2, starved ? LINK_ACCEPT_RETRY_MS : -1) < 0)
			continue;
		starved = false;
		if (fds[0].revents)
			(void)!read(s->wake_fd, &count, sizeof count);
		server_reap(s);
		if (fds[1].revents) {
			int fd = accept4(s->listen_fd, NULL, NULL, SOCK_CLOEXEC);

			if (fd >= 0)
				server_take(s, fd);
			else /* out of descriptors: the listening socket stays readable, don't spin on it */
				starved = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
		}
		mutex_lock(&s->lock);
		stopping = s->stopping;
		mutex_unlock(&s->lock);
	}
	return NULL;
}

static void server_free(struct link_server *s)
{
	if (s->wake_fd >= 0)
		(void)close(s->wake_fd);
	if (s->listen_fd >= 0)
		(void)close(s->listen_fd);
	cond_destroy(&s->finished);
	mutex_destroy(&s->lock);
	free(s);
}

int link_server_start(const char *addr, bool allow_remote, const struct link_self *self,
		      const struct link_callbacks *cb, void *arg, struct link_server **ret, struct err *e)
{
	struct link_server *s = calloc(1, sizeof *s);
	int r;

	if (!s)
		return err_set(e, ERR_NOMEM, "listening on %s: out of memory", addr);
	mutex_init(&s->lock);
	cond_init(&s->finished);
	s->listen_fd = -1;
	s->allow_remote = allow_remote;
	s->self = *self;
	s->cb = *cb;
	s->arg = arg;
	s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (s->wake_fd < 0)
		r = err_set(e, ERR_LIMIT, "listening on %s: %s", addr, strerror(errno));
	else
		r = tcp_listen(addr, &s->listen_fd, s->addr, sizeof s->addr, e);
	if (r == 0 && thread_start(&s->thread, "link-accept", server_main, s))
		r = err_set(e, ERR_LIMIT, "listening on %s: no thread for it", addr);
	if (r) {
		server_free(s);
		return r;
	}
	*ret = s;
	return 0;
}

const char *link_server_addr(const struct link_server *s)
{
	return s->addr;
}

void link_server_stop(struct link_server *s)
{
	if (!s)
		return;
	mutex_lock(&s->lock);
	s->stopping = true;
	server_wake(s);
	mutex_unlock(&s->lock);
	(void)pthread_join(s->thread, NULL);
	/* No new ones from here on. */
	mutex_lock(&s->lock);
	for (struct link *l = s->links; l; l = l->next)
		link_close(l, 0);
	while (s->n_preauth + s->n_established > 0)
		cond_wait(&s->finished, &s->lock);
	mutex_unlock(&s->lock);
	server_reap(s);
	INVARIANT(!s->links);
	server_free(s);
}

/* ---- what it is ---- */

void link_set_arg(struct link *l, void *arg)
{
	atomic_store(&l->arg, arg);
}

bool link_is_dialer(const struct link *l)
{
	return l->dialer;
}

uint64_t link_session(const struct link *l)
{
	return l->session;
}

const struct wire_hello *link_peer(const struct link *l)
{
	return &l->peer;
}

const char *link_peer_name(const struct link *l)
{
	return l->name;
}

uint64_t link_heard_ns(const struct link *l)
{
	return atomic_load_explicit(&l->heard_ns, memory_order_relaxed);
}
