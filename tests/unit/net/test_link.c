/* net/link.c: handshakes good and bad, every kind of damage on the wire, ends of every kind.
 *
 * Three kinds of far ends: a real link, a raw dialler and a raw listener that speak the codec themselves and can
 * therefore misbehave. Callbacks only record; assertions are made in the test's own thread.
 */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <dirent.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/thread.h"
#include "net/link.h"

#define WAIT_NS (60 * NS_PER_SEC)
#define SEEN_MAX 4096

struct seen_frame {
	struct wire_frame f;
	uint8_t *payload;
};

struct end {
	struct mutex lock;
	struct cond cond;
	struct link *link;
	unsigned ups, downs, batches, frames_at_batch, n;
	unsigned late; /* callbacks after `down` */
	uint64_t sent_bytes;
	int code;
	char text[ERR_TEXT_MAX];
	struct seen_frame seen[SEEN_MAX];
	/* how it behaves */
	int up_result, frame_result;
	bool hold; /* frame callbacks wait until it is cleared */
	bool unref_in_down;
	bool refuse_in_frame;	    /* queue a REFUSE, then fail */
	unsigned close_in_frame_ms; /* with a drain, once */
	unsigned holding;
};

static atomic_uint released;

static void count_release(void *arg)
{
	(void)arg;
	atomic_fetch_add(&released, 1);
}

static int on_up(struct link *l, void *arg)
{
	struct end *d = arg;
	int r;

	mutex_lock(&d->lock);
	d->ups++;
	d->late += d->downs && link_is_dialer(l);
	r = d->up_result;
	if (!r && !link_is_dialer(l))
		d->link = l;
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
	return r;
}

static int on_frame(struct link *l, void *arg, const struct wire_frame *f, void *payload)
{
	struct end *d = arg;
	int r;

	mutex_lock(&d->lock);
	d->late += d->downs;
	if (d->n < SEEN_MAX)
		d->seen[d->n++] = (struct seen_frame){*f, payload};
	else
		free(payload);
	d->holding++;
	cond_broadcast(&d->cond);
	while (d->hold)
		cond_wait(&d->cond, &d->lock);
	d->holding--;
	r = d->frame_result;
	mutex_unlock(&d->lock);
	if (d->refuse_in_frame) {
		struct wire_refuse x = {.code = ERR_STATE, .text = "not now"};
		uint8_t *buf = malloc(WIRE_HELLO_MAX);
		int n = wire_refuse_encode(&x, buf, WIRE_HELLO_MAX);
		struct wire_frame out = {.type = WIRE_REFUSE, .length_payload = (uint32_t)n};

		(void)link_send(l, &out, buf, NULL, NULL);
	}
	if (d->close_in_frame_ms)
		link_close(l, d->close_in_frame_ms);
	return r;
}

static void on_batch(struct link *l, void *arg)
{
	struct end *d = arg;

	(void)l;
	mutex_lock(&d->lock);
	d->late += d->downs;
	d->batches++;
	d->frames_at_batch = d->n;
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
}

static void on_sent(struct link *l, void *arg, uint64_t n)
{
	struct end *d = arg;

	(void)l;
	mutex_lock(&d->lock);
	d->late += d->downs;
	d->sent_bytes += n;
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
}

static void on_down(struct link *l, void *arg, int code, const char *text)
{
	struct end *d = arg;
	struct link *drop;

	mutex_lock(&d->lock);
	d->downs++;
	d->code = code;
	(void)snprintf(d->text, sizeof d->text, "%s", text);
	drop = d->unref_in_down ? l : NULL;
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
	link_unref(drop);
}

static const struct link_callbacks callbacks = {
    .up = on_up, .frame = on_frame, .batch = on_batch, .sent = on_sent, .down = on_down};
static const struct link_self self_a = {.store = "the store of a!", .program = "repfs a"};
static const struct link_self self_b = {.store = "the store of b!", .program = "repfs b"};

static struct end *end_new(void)
{
	struct end *d = calloc(1, sizeof *d);

	mutex_init(&d->lock);
	cond_init(&d->cond);
	return d;
}

static void end_free(struct end *d)
{
	for (unsigned i = 0; i < d->n; i++)
		free(d->seen[i].payload);
	cond_destroy(&d->cond);
	mutex_destroy(&d->lock);
	free(d);
}

/* Waits until *counter has reached want. */
static bool end_reaches(struct end *d, const unsigned *counter, unsigned want)
{
	uint64_t deadline = clock_mono_ns() + WAIT_NS;
	bool ok = true;

	mutex_lock(&d->lock);
	while (*counter < want && ok)
		ok = cond_wait_until(&d->cond, &d->lock, deadline);
	ok = *counter >= want;
	mutex_unlock(&d->lock);
	return ok;
}

static void end_set_hold(struct end *d, bool hold)
{
	mutex_lock(&d->lock);
	d->hold = hold;
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
}

static unsigned threads_now(void)
{
	unsigned n = 0;
	DIR *dir = opendir("/proc/self/task");

	while (dir && readdir(dir))
		n++;
	closedir(dir);
	return n - 2;
}

/* Joined threads are gone; a detached one may need a moment. */
static bool threads_become(unsigned want)
{
	uint64_t deadline = clock_mono_ns() + WAIT_NS;

	while (threads_now() != want) {
		if (clock_mono_ns() > deadline)
			return false;
		(void)usleep(1000);
	}
	return true;
}

static unsigned threads_before;

static void before(void)
{
	threads_before = threads_now();
	atomic_store(&released, 0);
}

static void after(void)
{
	cr_assert(threads_become(threads_before), "%u threads in place of %u", threads_now(), threads_before);
}

TestSuite(link, .init = before, .fini = after, .timeout = 300);

/* ---- pairs ---- */

struct pair {
	struct link_server *server;
	struct end *a, *b; /* dialler, listener */
	struct link *la;
};

static void pair_open(struct pair *p)
{
	struct err e = {0};

	p->a = end_new();
	p->b = end_new();
	cr_assert_eq(link_server_start("127.0.0.1:0", false, &self_b, &callbacks, p->b, &p->server, &e), 0, "%s",
		     e.text);
	cr_assert_eq(link_dial(link_server_addr(p->server), &self_a, &callbacks, p->a, &p->la, &e), 0, "%s", e.text);
}

static void pair_up(struct pair *p)
{
	pair_open(p);
	cr_assert(end_reaches(p->a, &p->a->ups, 1), "%s", p->a->text);
	cr_assert(end_reaches(p->b, &p->b->ups, 1));
}

static void pair_close(struct pair *p)
{
	link_close(p->la, 0);
	end_set_hold(p->a, false);
	end_set_hold(p->b, false);
	cr_assert(end_reaches(p->a, &p->a->downs, 1));
	link_server_stop(p->server);
	cr_assert_eq(p->a->downs, 1);
	cr_assert_leq(p->b->downs, 1);
	cr_assert_eq(p->a->late, 0);
	cr_assert_eq(p->b->late, 0);
	link_unref(p->la);
	link_unref(p->b->link);
	end_free(p->a);
	end_free(p->b);
}

static void send_write(struct link *l, uint64_t seq, const void *data, size_t len)
{
	struct wire_frame f = {.type = WIRE_WRITE,
			       .seq = seq,
			       .volume = 3,
			       .offset = seq * 4096,
			       .length = len,
			       .length_payload = (uint32_t)len};
	void *copy = malloc(len);

	memcpy(copy, data, len);
	(void)link_send(l, &f, copy, NULL, NULL);
}

static void fill(uint8_t *p, size_t n, uint64_t seed)
{
	for (size_t i = 0; i < n; i++) {
		seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		p[i] = (uint8_t)(seed >> 56);
	}
}

/* ---- raw ends ---- */

struct raw {
	int fd;
	uint64_t nonce, session;
	struct wire_hello theirs;
	struct wire_refuse refuse;
	int got; /* type of the handshake's answer, or negative: the connection ended */
};

static bool raw_write(int fd, const void *p, size_t n)
{
	const uint8_t *b = p;

	while (n > 0) {
		ssize_t w = send(fd, b, n, MSG_NOSIGNAL);

		if (w <= 0)
			return false;
		b += w;
		n -= (size_t)w;
	}
	return true;
}

static bool raw_read(int fd, void *p, size_t n)
{
	uint8_t *b = p;

	while (n > 0) {
		ssize_t r = recv(fd, b, n, 0);

		if (r <= 0)
			return false;
		b += r;
		n -= (size_t)r;
	}
	return true;
}

static size_t raw_encode(uint8_t *buf, enum wire_type type, uint64_t number, uint64_t session, const void *payload,
			 size_t len)
{
	struct wire_frame f = {.type = (uint16_t)type, .number = number, .length_payload = (uint32_t)len};

	if (type >= WIRE_WRITE && type <= WIRE_FLUSH)
		f.seq = number;
	if (type == WIRE_WRITE)
		f.length = len;
	f.crc_payload = crc32c(0, payload, len);
	wire_header_encode(&f, session, buf);
	if (len)
		memcpy(buf + WIRE_HEADER_SIZE, payload, len);
	return WIRE_HEADER_SIZE + len;
}

static int raw_connect(const char *addr)
{
	struct sockaddr_in in4 = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	in4.sin_port = htons((uint16_t)strtoul(strrchr(addr, ':') + 1, NULL, 10));
	cr_assert_eq(connect(fd, (struct sockaddr *)&in4, sizeof in4), 0);
	return fd;
}

static size_t raw_hello(uint8_t *buf, uint16_t version_min, uint16_t version_max, const char *store, uint64_t nonce)
{
	struct wire_hello h = {.version_min = version_min, .version_max = version_max, .nonce = nonce};
	uint8_t payload[WIRE_HELLO_MAX];
	int n;

	(void)snprintf(h.program, sizeof h.program, "raw %u", version_max);
	memcpy(h.store, store, 15);
	n = wire_hello_encode(&h, payload, sizeof payload);
	cr_assert_gt(n, 0);
	return raw_encode(buf, WIRE_HELLO, 0, 0, payload, (size_t)n);
}

/* Reads frame 0 of the far end: HELLO into theirs, REFUSE into refuse. */
static void raw_answer(struct raw *r)
{
	uint8_t header[WIRE_HEADER_SIZE], payload[WIRE_HELLO_MAX];
	struct wire_frame f;

	r->got = -1;
	if (!raw_read(r->fd, header, sizeof header) || wire_header_decode(&f, 0, header, WIRE_HELLO_MAX, NULL) ||
	    !raw_read(r->fd, payload, f.length_payload) || crc32c(0, payload, f.length_payload) != f.crc_payload)
		return;
	if (f.type == WIRE_HELLO && wire_hello_decode(&r->theirs, payload, f.length_payload, NULL) == 0)
		r->got = WIRE_HELLO;
	if (f.type == WIRE_REFUSE && wire_refuse_decode(&r->refuse, payload, f.length_payload, NULL) == 0)
		r->got = WIRE_REFUSE;
}

/* Connects as a dialler; session is set when the listener answers HELLO. */
static void raw_dial(struct raw *r, const char *addr, uint16_t version_min, uint16_t version_max, const char *store)
{
	uint8_t buf[WIRE_HEADER_SIZE + WIRE_HELLO_MAX];

	memset(r, 0, sizeof *r);
	r->fd = raw_connect(addr);
	r->nonce = random_u64_nonzero();
	cr_assert(raw_write(r->fd, buf, raw_hello(buf, version_min, version_max, store, r->nonce)));
	raw_answer(r);
	if (r->got == WIRE_HELLO)
		r->session = wire_session(r->nonce, r->theirs.nonce);
}

struct raw_pair {
	struct link_server *server;
	struct end *b;
	struct raw raw;
};

static void raw_open(struct raw_pair *p)
{
	struct err e = {0};

	p->b = end_new();
	cr_assert_eq(link_server_start("127.0.0.1:0", false, &self_b, &callbacks, p->b, &p->server, &e), 0, "%s",
		     e.text);
}

static void raw_up(struct raw_pair *p)
{
	raw_open(p);
	raw_dial(&p->raw, link_server_addr(p->server), WIRE_VERSION_MIN, WIRE_VERSION_MAX, "the raw store!!");
	cr_assert_eq(p->raw.got, WIRE_HELLO);
	cr_assert(end_reaches(p->b, &p->b->ups, 1));
}

static void raw_close(struct raw_pair *p)
{
	(void)close(p->raw.fd);
	end_set_hold(p->b, false);
	link_server_stop(p->server);
	cr_assert_eq(p->b->late, 0);
	link_unref(p->b->link);
	end_free(p->b);
}

/* ---- plain running ---- */

Test(link, handshake_tells_each_side_about_the_other)
{
	struct pair p;

	pair_up(&p);
	cr_assert(link_is_dialer(p.la));
	cr_assert(!link_is_dialer(p.b->link));
	cr_assert_neq(link_session(p.la), 0);
	cr_assert_eq(link_session(p.la), link_session(p.b->link));
	cr_assert_arr_eq(link_peer(p.la)->store, self_b.store, 16);
	cr_assert_arr_eq(link_peer(p.b->link)->store, self_a.store, 16);
	cr_assert_str_eq(link_peer(p.la)->program, "repfs b");
	cr_assert_str_eq(link_peer(p.b->link)->program, "repfs a");
	cr_assert_neq(link_peer(p.la)->nonce, link_peer(p.b->link)->nonce);
	cr_assert_str_eq(link_peer_name(p.la), link_server_addr(p.server));
	cr_assert_eq(strncmp(link_peer_name(p.b->link), "127.0.0.1:", 10), 0);
	cr_assert_leq(link_heard_ns(p.la), clock_mono_ns());
	pair_close(&p);
}

Test(link, sessions_differ)
{
	struct pair p, q;

	pair_up(&p);
	pair_up(&q);
	cr_assert_neq(link_session(p.la), link_session(q.la));
	pair_close(&p);
	pair_close(&q);
}

Test(link, frames_of_all_sizes_arrive_in_order_byte_for_byte)
{
	static const size_t sizes[] = {
	    0, 1, 511, 4096, 32 << 10, (32 << 10) + 1, 65536, 262144, 1 << 20, WIRE_PAYLOAD_MAX};
	enum { N = 120 };
	struct pair p;
	uint8_t *data = malloc(WIRE_PAYLOAD_MAX);
	uint64_t bytes = 0, heard;

	pair_up(&p);
	heard = link_heard_ns(p.b->link);
	for (unsigned i = 1; i <= N; i++) {
		size_t len = sizes[(i * 7) % ARRAY_LEN(sizes)];

		fill(data, len, i);
		bytes += WIRE_HEADER_SIZE + len;
		if (len) {
			send_write(p.la, i, data, len);
		} else {
			struct wire_frame f = {.type = WIRE_FLUSH, .seq = i};

			cr_assert_eq(link_send(p.la, &f, NULL, NULL, NULL), 0);
		}
	}
	cr_assert(end_reaches(p.b, &p.b->n, N), "%s", p.b->text);
	cr_assert(end_reaches(p.b, &p.b->frames_at_batch, N));
	for (unsigned i = 1; i <= N; i++) {
		const struct seen_frame *s = &p.b->seen[i - 1];
		size_t len = sizes[(i * 7) % ARRAY_LEN(sizes)];

		cr_assert_eq(s->f.number, i);
		cr_assert_eq(s->f.seq, i);
		cr_assert_eq(s->f.length_payload, len);
		cr_assert_eq(s->f.type, len ? WIRE_WRITE : WIRE_FLUSH);
		cr_assert_eq(s->f.volume, len ? 3 : 0);
		cr_assert_eq(s->payload == NULL, len == 0);
		fill(data, len, i);
		cr_assert(len == 0 || memcmp(data, s->payload, len) == 0, "frame %u", i);
	}
	cr_assert_gt(link_heard_ns(p.b->link), heard);
	/* Everything was reported as sent, and nothing stays queued. */
	uint64_t deadline = clock_mono_ns() + WAIT_NS;
	mutex_lock(&p.a->lock);
	while (p.a->sent_bytes < bytes && cond_wait_until(&p.a->cond, &p.a->lock, deadline))
		;
	cr_assert_eq(p.a->sent_bytes, bytes);
	mutex_unlock(&p.a->lock);
	cr_assert_eq(link_queued(p.la), 0);
	free(data);
	pair_close(&p);
}

Test(link, frames_split_at_any_byte_arrive)
{
	enum { N = 40 };
	struct raw_pair p;
	size_t size = 0, cap = (size_t)N * (WIRE_HEADER_SIZE + 70000);
	uint8_t *stream = malloc(cap), *data = malloc(70000);
	unsigned seed = 5;

	raw_up(&p);
	for (unsigned i = 1; i <= N; i++) {
		size_t len = i % 3 == 0 ? 70000 : i % 3 == 1 ? 100 : 5000;

		fill(data, len, i);
		size += raw_encode(stream + size, WIRE_WRITE, i, p.raw.session, data, len);
	}
	for (size_t done = 0; done < size;) {
		size_t n = 1 + (size_t)rand_r(&seed) % (rand_r(&seed) % 4 ? 60 : 9000);

		if (n > size - done)
			n = size - done;
		cr_assert(raw_write(p.raw.fd, stream + done, n));
		done += n;
	}
	cr_assert(end_reaches(p.b, &p.b->n, N), "%s", p.b->text);
	for (unsigned i = 1; i <= N; i++) {
		size_t len = i % 3 == 0 ? 70000 : i % 3 == 1 ? 100 : 5000;

		fill(data, len, i);
		cr_assert_eq(p.b->seen[i - 1].f.length_payload, len);
		cr_assert_eq(memcmp(p.b->seen[i - 1].payload, data, len), 0);
	}
	free(stream);
	free(data);
	raw_close(&p);
}

Test(link, refuse_within_the_session_is_a_frame_like_others)
{
	struct raw_pair p;
	struct wire_refuse x = {.code = ERR_SPLIT, .text = "split brain"};
	uint8_t payload[WIRE_HELLO_MAX], buf[WIRE_HEADER_SIZE + WIRE_HELLO_MAX];
	int n = wire_refuse_encode(&x, payload, sizeof payload);

	raw_up(&p);
	cr_assert(raw_write(p.raw.fd, buf, raw_encode(buf, WIRE_REFUSE, 1, p.raw.session, payload, (size_t)n)));
	cr_assert(end_reaches(p.b, &p.b->n, 1));
	cr_assert_eq(p.b->seen[0].f.type, WIRE_REFUSE);
	cr_assert_arr_eq(p.b->seen[0].payload, payload, (size_t)n);
	cr_assert_eq(p.b->downs, 0);
	raw_close(&p);
}

/* ---- damage ---- */

/* Sends bytes after a good handshake and one good frame, half-closes, and expects the end with one of two codes, the
 * damaged part not handed over. */
static void expect_cut(const char *what, const uint8_t *bytes, size_t n, int code, const char *text)
{
	struct raw_pair p;
	uint8_t good[WIRE_HEADER_SIZE];

	raw_up(&p);
	cr_assert(raw_write(p.raw.fd, good, raw_encode(good, WIRE_PING, 1, p.raw.session, NULL, 0)));
	cr_assert(raw_write(p.raw.fd, bytes, n));
	(void)shutdown(p.raw.fd, SHUT_WR);
	cr_assert(end_reaches(p.b, &p.b->downs, 1), "%s", what);
	cr_assert_eq(p.b->n, 1, "%s: %u frames", what, p.b->n);
	cr_assert_eq(p.b->frames_at_batch, 1);
	cr_assert_eq(p.b->code, code, "%s: %d %s", what, p.b->code, p.b->text);
	cr_assert(strstr(p.b->text, text), "%s: %s", what, p.b->text);
	raw_close(&p);
}

/* One server for all: each attempt is a connection of its own. */
Test(link, every_flipped_bit_of_a_frame_is_detected)
{
	enum { PAYLOAD = 24, SIZE = WIRE_HEADER_SIZE + PAYLOAD };
	struct raw_pair p;
	uint8_t data[PAYLOAD], frame[SIZE];

	fill(data, sizeof data, 9);
	raw_open(&p);
	p.raw.fd = -1;
	for (unsigned bit = 0; bit < SIZE * 8; bit++) {
		raw_dial(&p.raw, link_server_addr(p.server), WIRE_VERSION_MIN, WIRE_VERSION_MAX, "the raw store!!");
		cr_assert_eq(p.raw.got, WIRE_HELLO);
		cr_assert_eq(raw_encode(frame, WIRE_WRITE, 1, p.raw.session, data, sizeof data), SIZE);
		frame[bit / 8] ^= (uint8_t)(1 << bit % 8);
		cr_assert(raw_write(p.raw.fd, frame, sizeof frame));
		cr_assert(end_reaches(p.b, &p.b->downs, bit + 1), "bit %u", bit);
		cr_assert_eq(p.b->code, bit < WIRE_HEADER_SIZE * 8 ? -ERR_PROTO : -ERR_CORRUPT, "bit %u: %s", bit,
			     p.b->text);
		cr_assert_eq(p.b->n, 0, "bit %u went through", bit);
		(void)close(p.raw.fd);
		mutex_lock(&p.b->lock);
		link_unref(p.b->link);
		p.b->link = NULL;
		mutex_unlock(&p.b->lock);
	}
	p.raw.fd = -1;
	raw_close(&p);
}

Test(link, doubled_dropped_and_foreign_frames_are_detected)
{
	static const uint8_t data[64] = {1, 2, 3};
	struct raw_pair p;
	uint8_t buf[2 * (WIRE_HEADER_SIZE + sizeof data)];
	static const struct {
		const char *what;
		uint64_t number, session_xor;
		const char *text;
	} cases[] = {
	    {"doubled", 1, 0, "lost or doubled"},
	    {"dropped", 3, 0, "lost or doubled"},
	    {"of the handshake", 0, 0, "lost or doubled"},
	    {"far ahead", UINT64_MAX, 0, "lost or doubled"},
	    {"of another session", 2, 1, "does not check out"},
	    {"of another session, high bit", 2, UINT64_C(1) << 63, "does not check out"},
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		size_t n;

		raw_up(&p);
		n = raw_encode(buf, WIRE_WRITE, 1, p.raw.session, data, sizeof data);
		n += raw_encode(buf + n, WIRE_PING, cases[i].number, p.raw.session ^ cases[i].session_xor, NULL, 0);
		cr_assert(raw_write(p.raw.fd, buf, n));
		cr_assert(end_reaches(p.b, &p.b->downs, 1), "%s", cases[i].what);
		cr_assert_eq(p.b->n, 1);
		cr_assert_eq(p.b->code, -ERR_PROTO);
		cr_assert(strstr(p.b->text, cases[i].text), "%s: %s", cases[i].what, p.b->text);
		raw_close(&p);
	}
}

Test(link, a_replayed_session_does_not_begin)
{
	struct raw_pair p;
	struct raw again;
	uint8_t hello[WIRE_HEADER_SIZE + WIRE_HELLO_MAX], frame[WIRE_HEADER_SIZE];
	size_t n;

	raw_up(&p);
	(void)raw_encode(frame, WIRE_PING, 1, p.raw.session, NULL, 0);
	link_unref(p.b->link); /* the recorder has one place: the second link's reference comes into it */
	p.b->link = NULL;
	/* The same bytes on a new connection. */
	memset(&again, 0, sizeof again);
	again.fd = raw_connect(link_server_addr(p.server));
	n = raw_hello(hello, WIRE_VERSION_MIN, WIRE_VERSION_MAX, "the raw store!!", p.raw.nonce);
	cr_assert(raw_write(again.fd, hello, n));
	raw_answer(&again);
	cr_assert_eq(again.got, WIRE_HELLO);
	cr_assert(raw_write(again.fd, frame, sizeof frame));
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->code, -ERR_PROTO);
	cr_assert_eq(p.b->n, 0);
	(void)close(again.fd);
	(void)close(p.raw.fd);
	p.raw.fd = -1;
	cr_assert(end_reaches(p.b, &p.b->downs, 2));
	raw_close(&p);
}

Test(link, truncated_streams_end_with_nothing_half_applied)
{
	enum { PAYLOAD = 40, SIZE = WIRE_HEADER_SIZE + PAYLOAD };
	struct raw_pair p;
	uint8_t data[PAYLOAD] = {7}, frame[SIZE];

	for (unsigned cut = 0; cut < SIZE; cut += cut % WIRE_HEADER_SIZE == 55 ? 1 : 5) {
		raw_up(&p);
		(void)raw_encode(frame, WIRE_WRITE, 1, p.raw.session, data, sizeof data);
		cr_assert(raw_write(p.raw.fd, frame, cut));
		(void)shutdown(p.raw.fd, SHUT_WR);
		cr_assert(end_reaches(p.b, &p.b->downs, 1));
		cr_assert_eq(p.b->n, 0);
		cr_assert_eq(p.b->code, -ERR_PEER);
		cr_assert(strstr(p.b->text, cut ? "middle of a frame" : "closed the connection"), "cut %u: %s", cut,
			  p.b->text);
		raw_close(&p);
	}
}

Test(link, truncated_large_payload_ends_with_nothing_half_applied)
{
	struct raw_pair p;
	uint8_t *frame = calloc(1, WIRE_HEADER_SIZE + 200000), *data = calloc(1, 200000);

	raw_up(&p);
	(void)raw_encode(frame, WIRE_WRITE, 1, p.raw.session, data, 200000);
	cr_assert(raw_write(p.raw.fd, frame, 150000));
	(void)shutdown(p.raw.fd, SHUT_WR);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->n, 0);
	cr_assert(strstr(p.b->text, "middle of a frame"), "%s", p.b->text);
	raw_close(&p);
	free(frame);
	free(data);
}

Test(link, oversize_lengths_are_refused_before_anything_is_allocated)
{
	static const uint32_t lengths[] = {WIRE_PAYLOAD_MAX + 1, 1U << 31, UINT32_MAX};

	for (size_t i = 0; i < ARRAY_LEN(lengths); i++) {
		struct raw_pair p;
		uint8_t header[WIRE_HEADER_SIZE];

		raw_up(&p);
		struct wire_frame f = {
		    .type = WIRE_WRITE, .number = 1, .seq = 1, .length_payload = lengths[i], .length = lengths[i]};
		wire_header_encode(&f, p.raw.session, header);
		cr_assert(raw_write(p.raw.fd, header, sizeof header));
		cr_assert(end_reaches(p.b, &p.b->downs, 1));
		cr_assert_eq(p.b->code, -ERR_PROTO, "%s", p.b->text);
		cr_assert_eq(p.b->n, 0);
		raw_close(&p);
	}
}

Test(link, garbage_after_the_handshake_ends_it)
{
	uint8_t noise[4096];

	fill(noise, sizeof noise, 77);
	expect_cut("noise", noise, sizeof noise, -ERR_PROTO, "does not check out");
	memset(noise, 0, sizeof noise);
	expect_cut("zeroes", noise, sizeof noise, -ERR_PROTO, "does not check out");
}

Test(link, a_second_hello_ends_it)
{
	struct raw_pair p;
	uint8_t buf[WIRE_HEADER_SIZE + WIRE_HELLO_MAX], hello[WIRE_HEADER_SIZE + WIRE_HELLO_MAX];
	size_t n = raw_hello(hello, WIRE_VERSION_MIN, WIRE_VERSION_MAX, "the raw store!!", 5) - WIRE_HEADER_SIZE;

	raw_up(&p);
	n = raw_encode(buf, WIRE_HELLO, 1, p.raw.session, hello + WIRE_HEADER_SIZE, n);
	cr_assert(raw_write(p.raw.fd, buf, n));
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->code, -ERR_PROTO);
	cr_assert(strstr(p.b->text, "second HELLO"), "%s", p.b->text);
	raw_close(&p);
}

/* ---- handshakes that fail ---- */

static void expect_version_refused(uint16_t version_min, uint16_t version_max)
{
	struct raw_pair p;
	char program[32], versions[32];

	(void)snprintf(program, sizeof program, "raw %u", version_max);
	(void)snprintf(versions, sizeof versions, "%u to %u", version_min, version_max);
	raw_open(&p);
	raw_dial(&p.raw, link_server_addr(p.server), version_min, version_max, "the raw store!!");
	cr_assert_eq(p.raw.got, WIRE_REFUSE);
	cr_assert_eq(p.raw.refuse.code, ERR_VERSION);
	cr_assert(strstr(p.raw.refuse.text, "repfs b") && strstr(p.raw.refuse.text, "2 to 2"), "%s", p.raw.refuse.text);
	cr_assert(strstr(p.raw.refuse.text, program) && strstr(p.raw.refuse.text, versions), "%s", p.raw.refuse.text);
	(void)shutdown(p.raw.fd, SHUT_WR);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->ups, 0);
	cr_assert_eq(p.b->code, -ERR_VERSION);
	cr_assert_str_eq(p.b->text, p.raw.refuse.text);
	raw_close(&p);
}

Test(link, a_listener_without_a_common_version_refuses_naming_both)
{
	expect_version_refused(1, 1); /* of before the first release */
	expect_version_refused(7, 9);
}

struct raw_listener {
	int fd;
	char addr[STREAM_NAME_SIZE];
	pthread_t thread;
	uint8_t answer[8192];
	size_t n;
	bool reset; /* close at once, with the HELLO unread */
};

/* Takes one connection, reads the HELLO, sends the prepared answer, waits for the end. */
static void *raw_listener_main(void *arg)
{
	struct raw_listener *r = arg;
	struct raw raw = {.fd = accept(r->fd, NULL, NULL)};
	char byte;

	if (!r->reset) {
		raw_answer(&raw);
		(void)raw_write(raw.fd, r->answer, r->n);
		while (recv(raw.fd, &byte, 1, 0) > 0)
			;
	}
	(void)close(raw.fd);
	return NULL;
}

static void raw_listen(struct raw_listener *r)
{
	struct err e = {0};

	cr_assert_eq(tcp_listen("127.0.0.1:0", &r->fd, r->addr, sizeof r->addr, &e), 0);
}

/* Dials a listener that answers so; expects `down` without `up`. */
static void dial_expect(struct raw_listener *r, int code, const char *text)
{
	struct end *a = end_new();
	struct link *l = NULL;
	struct err e = {0};

	cr_assert_eq(link_dial(r->addr, &self_a, &callbacks, a, &l, &e), 0);
	struct pollfd pfd = {.fd = r->fd, .events = POLLIN}; /* the socket is a non-blocking one */
	cr_assert_eq(poll(&pfd, 1, 10000), 1);
	cr_assert_eq(pthread_create(&r->thread, NULL, raw_listener_main, r), 0);
	cr_assert(end_reaches(a, &a->downs, 1));
	cr_assert_eq(a->ups, 0);
	cr_assert_eq(a->code, code, "%d %s", a->code, a->text);
	cr_assert(strstr(a->text, text), "%s", a->text);
	link_unref(l);
	(void)pthread_join(r->thread, NULL);
	end_free(a);
}

Test(link, a_dialler_reports_the_listeners_refusal_word_for_word)
{
	struct raw_listener r = {0};
	struct wire_refuse x = {.code = ERR_VERSION, .text = "I speak 7 to 9 and you 2 to 2"};
	uint8_t payload[WIRE_HELLO_MAX];

	raw_listen(&r);
	r.n = raw_encode(r.answer, WIRE_REFUSE, 0, 0, payload, (size_t)wire_refuse_encode(&x, payload, sizeof payload));
	dial_expect(&r, -ERR_VERSION, "I speak 7 to 9 and you 2 to 2");
	(void)close(r.fd);
}

Test(link, a_dialler_judges_the_answer_itself)
{
	struct raw_listener r = {0};
	uint8_t payload[WIRE_HELLO_MAX] = {0};

	raw_listen(&r);
	r.n = raw_hello(r.answer, 7, 9, "the raw store!!", 5);
	dial_expect(&r, -ERR_VERSION, "7 to 9");
	r.n = raw_hello(r.answer, WIRE_VERSION_MIN, WIRE_VERSION_MAX, (const char *)self_a.store, 5);
	dial_expect(&r, -ERR_USAGE, "same store");
	r.n = raw_encode(r.answer, WIRE_PING, 0, 0, NULL, 0);
	dial_expect(&r, -ERR_PROTO, "in place of a HELLO");
	r.n = raw_encode(r.answer, WIRE_HELLO, 1, 0, payload, 70);
	dial_expect(&r, -ERR_PROTO, "in place of a HELLO");
	r.n = raw_encode(r.answer, WIRE_HELLO, 0, 0, payload, 70);
	dial_expect(&r, -ERR_PROTO, "not a repfs peer");
	r.n = raw_hello(r.answer, WIRE_VERSION_MIN, WIRE_VERSION_MAX, "the raw store!!", 5);
	r.answer[r.n - 1] ^= 1;
	dial_expect(&r, -ERR_CORRUPT, "checksum");
	memcpy(r.answer, "SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3 -- and so on, long enough\r\n", r.n = 66);
	dial_expect(&r, -ERR_PROTO, "no handshake of repfs");
	r.reset = true;
	dial_expect(&r, -ERR_PEER, "lost during the handshake");
	(void)close(r.fd);
}

Test(link, a_link_to_itself_is_refused)
{
	struct end *a = end_new(), *b = end_new();
	struct link_server *server = NULL;
	struct link *l = NULL;
	struct err e = {0};

	cr_assert_eq(link_server_start("127.0.0.1:0", false, &self_a, &callbacks, b, &server, &e), 0);
	cr_assert_eq(link_dial(link_server_addr(server), &self_a, &callbacks, a, &l, &e), 0);
	cr_assert(end_reaches(a, &a->downs, 1));
	cr_assert(end_reaches(b, &b->downs, 1));
	cr_assert_eq(a->ups + b->ups, 0);
	cr_assert_eq(a->code, -ERR_USAGE);
	cr_assert(strstr(a->text, "same store"), "%s", a->text);
	cr_assert_str_eq(a->text, b->text);
	link_server_stop(server);
	link_unref(l);
	end_free(a);
	end_free(b);
}

Test(link, up_may_refuse)
{
	struct pair p;

	p.a = end_new();
	p.b = end_new();
	p.b->up_result = -ERR_BUSY;
	struct err e = {0};
	cr_assert_eq(link_server_start("127.0.0.1:0", false, &self_b, &callbacks, p.b, &p.server, &e), 0);
	cr_assert_eq(link_dial(link_server_addr(p.server), &self_a, &callbacks, p.a, &p.la, &e), 0);
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->ups, 1);
	cr_assert_eq(p.a->ups, 0);
	cr_assert_eq(p.a->code, -ERR_BUSY);
	cr_assert_eq(p.b->code, -ERR_BUSY);
	pair_close(&p);
}

Test(link, up_of_a_dialler_may_refuse)
{
	struct pair p;

	p.a = end_new();
	p.b = end_new();
	p.a->up_result = -ERR_STATE;
	struct err e = {0};
	cr_assert_eq(link_server_start("127.0.0.1:0", false, &self_b, &callbacks, p.b, &p.server, &e), 0);
	cr_assert_eq(link_dial(link_server_addr(p.server), &self_a, &callbacks, p.a, &p.la, &e), 0);
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.a->code, -ERR_STATE);
	cr_assert_eq(p.b->n, 1);
	cr_assert_eq(p.b->seen[0].f.type, WIRE_REFUSE);
	pair_close(&p);
}

Test(link, garbage_in_place_of_a_hello_is_cut_at_once)
{
	struct raw_pair p;
	static const char http[] = "GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: somebody who got lost\r\n\r\n";
	char byte;

	raw_open(&p);
	p.raw.fd = raw_connect(link_server_addr(p.server));
	cr_assert(raw_write(p.raw.fd, http, sizeof http - 1));
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->ups, 0);
	cr_assert_eq(p.b->code, -ERR_PROTO); /* not by the deadline: that is -ERR_TIMEOUT */
	cr_assert_leq(recv(p.raw.fd, &byte, 1, 0), 0);
	raw_close(&p);
}

Test(link, a_handshake_payload_above_its_limit_is_refused)
{
	struct raw_pair p;
	uint8_t *buf = calloc(1, WIRE_HEADER_SIZE + WIRE_HELLO_MAX + 1), *payload = calloc(1, WIRE_HELLO_MAX + 1);

	raw_open(&p);
	p.raw.fd = raw_connect(link_server_addr(p.server));
	cr_assert(raw_write(p.raw.fd, buf, raw_encode(buf, WIRE_HELLO, 0, 0, payload, WIRE_HELLO_MAX + 1)));
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->code, -ERR_PROTO);
	raw_close(&p);
	free(buf);
	free(payload);
}

/* Those above the limit are closed unanswered, long before the deadline of the others. False: the machine stood still
 * until the deadline. */
static bool silent_ones(struct raw_pair *p, int *fds, int n)
{
	uint64_t start = clock_mono_ns();
	unsigned cut = 0;

	for (int i = 0; i < n; i++)
		fds[i] = raw_connect(link_server_addr(p->server));
	for (int i = n; i-- > 0;) {
		struct pollfd pfd = {.fd = fds[i], .events = POLLIN};

		cut += poll(&pfd, 1, i < LINK_PREAUTH_MAX ? 0 : LINK_HANDSHAKE_MS) == 1;
	}
	unsigned threads = threads_now();
	if (clock_mono_ns() - start >= LINK_HANDSHAKE_MS * NS_PER_MS)
		return false;
	cr_assert_eq(cut, (unsigned)n - LINK_PREAUTH_MAX);
	cr_assert_leq(threads, threads_before + 1 + LINK_PREAUTH_MAX);
	cr_assert(end_reaches(p->b, &p->b->downs, LINK_PREAUTH_MAX));
	cr_assert_geq(clock_mono_ns() - start, (LINK_HANDSHAKE_MS - 100) * NS_PER_MS);
	return true;
}

Test(link, connections_that_say_nothing_are_bounded_and_cut)
{
	enum { SILENT = 20 };
	struct raw_pair p;
	int fds[SILENT];
	unsigned tries = 0;

	raw_open(&p);
	p.raw.fd = -1;
	while (!silent_ones(&p, fds, SILENT)) {
		cr_assert_lt(++tries, 6);
		raw_close(&p);
		for (int i = 0; i < SILENT; i++)
			(void)close(fds[i]);
		raw_open(&p);
	}
	cr_assert_eq(p.b->ups, 0);
	cr_assert_eq(p.b->code, -ERR_TIMEOUT);
	cr_assert(strstr(p.b->text, "2 s"), "%s", p.b->text);
	/* And then there is room again. */
	raw_dial(&p.raw, link_server_addr(p.server), WIRE_VERSION_MIN, WIRE_VERSION_MAX, "the raw store!!");
	cr_assert_eq(p.raw.got, WIRE_HELLO);
	for (int i = 0; i < SILENT; i++)
		(void)close(fds[i]);
	raw_close(&p);
}

Test(link, a_peer_that_sends_a_byte_now_and_then_is_cut_at_the_deadline)
{
	struct raw_pair p;
	uint8_t hello[WIRE_HEADER_SIZE + WIRE_HELLO_MAX];
	uint64_t start = clock_mono_ns();

	raw_open(&p);
	p.raw.fd = raw_connect(link_server_addr(p.server));
	(void)raw_hello(hello, WIRE_VERSION_MIN, WIRE_VERSION_MAX, "the raw store!!", 5);
	unsigned i = 0;
	for (; i < WIRE_HEADER_SIZE + 40; i++) {
		struct pollfd pfd = {.fd = p.raw.fd, .events = POLLIN};

		if (!raw_write(p.raw.fd, &hello[i], 1) || poll(&pfd, 1, 40))
			break;
	}
	cr_assert_lt(i, WIRE_HEADER_SIZE + 40, "a byte put the deadline off");
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_geq(clock_mono_ns() - start, (LINK_HANDSHAKE_MS - 100) * NS_PER_MS);
	cr_assert_eq(p.b->code, -ERR_TIMEOUT);
	raw_close(&p);
}

Test(link, a_listener_that_says_nothing_is_given_up)
{
	struct end *a = end_new();
	struct link *l = NULL;
	struct err e = {0};
	char addr[STREAM_NAME_SIZE];
	int fd;

	cr_assert_eq(tcp_listen("127.0.0.1:0", &fd, addr, sizeof addr, &e), 0);
	cr_assert_eq(link_dial(addr, &self_a, &callbacks, a, &l, &e), 0);
	cr_assert(end_reaches(a, &a->downs, 1));
	cr_assert_eq(a->code, -ERR_TIMEOUT);
	cr_assert_eq(a->ups, 0);
	link_unref(l);
	end_free(a);
	(void)close(fd);
}

Test(link, remote_peers_are_refused_by_name_of_the_option)
{
	struct ifaddrs *list = NULL;
	struct end *a = end_new(), *b = end_new();
	struct link_server *server = NULL;
	struct link *l = NULL;
	struct err e = {0};
	char host[INET_ADDRSTRLEN] = "", addr[64];

	cr_assert_eq(getifaddrs(&list), 0);
	for (struct ifaddrs *i = list; i && !host[0]; i = i->ifa_next) {
		if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET || (i->ifa_flags & IFF_LOOPBACK) ||
		    !(i->ifa_flags & IFF_UP))
			continue;
		(void)inet_ntop(AF_INET, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, host, sizeof host);
	}
	freeifaddrs(list);
	if (!host[0]) {
		end_free(a);
		end_free(b);
		cr_skip_test("this host has a loopback address only");
	}
	cr_assert_eq(link_server_start("0.0.0.0:0", false, &self_b, &callbacks, b, &server, &e), 0);
	(void)snprintf(addr, sizeof addr, "%s:%s", host, strrchr(link_server_addr(server), ':') + 1);
	cr_assert_eq(link_dial(addr, &self_a, &callbacks, a, &l, &e), 0);
	cr_assert(end_reaches(a, &a->downs, 1));
	cr_assert(end_reaches(b, &b->downs, 1));
	cr_assert_eq(a->ups + b->ups, 0);
	cr_assert_eq(a->code, -ERR_PERM, "%s", a->text);
	cr_assert(strstr(a->text, "insecure"), "%s", a->text);
	link_unref(l);
	link_server_stop(server);
	/* Spelt out, it works. */
	server = NULL;
	cr_assert_eq(link_server_start("0.0.0.0:0", true, &self_b, &callbacks, b, &server, &e), 0);
	(void)snprintf(addr, sizeof addr, "%s:%s", host, strrchr(link_server_addr(server), ':') + 1);
	cr_assert_eq(link_dial(addr, &self_a, &callbacks, a, &l, &e), 0);
	cr_assert(end_reaches(a, &a->ups, 1), "%s", a->text);
	link_close(l, 0);
	cr_assert(end_reaches(a, &a->downs, 2));
	link_unref(l);
	link_server_stop(server);
	link_unref(b->link);
	end_free(a);
	end_free(b);
}

Test(link, bad_addresses_are_refused_at_once)
{
	struct link *l = (void *)1;
	struct link_server *s = (void *)1;
	struct err e = {0};

	cr_assert_eq(link_dial("10.0.0.2", &self_a, &callbacks, NULL, &l, &e), -ERR_USAGE);
	cr_assert_eq(link_dial("10.0.0.2:0", &self_a, &callbacks, NULL, &l, &e), -ERR_USAGE);
	cr_assert_eq(link_server_start("nowhere", false, &self_a, &callbacks, NULL, &s, &e), -ERR_USAGE);
	cr_assert_eq(l, (void *)1);
	cr_assert_eq(s, (void *)1);
}

Test(link, nobody_there_is_a_down_without_an_up)
{
	struct end *a = end_new();
	struct link *l = NULL;
	struct err e = {0};
	char addr[STREAM_NAME_SIZE];
	int fd;

	cr_assert_eq(tcp_listen("127.0.0.1:0", &fd, addr, sizeof addr, &e), 0);
	(void)close(fd);
	cr_assert_eq(link_dial(addr, &self_a, &callbacks, a, &l, &e), 0);
	cr_assert(end_reaches(a, &a->downs, 1));
	cr_assert_eq(a->ups, 0);
	cr_assert_eq(a->code, -ERR_PEER);
	cr_assert(strstr(a->text, addr), "%s", a->text);
	link_unref(l);
	end_free(a);
}

/* ---- ends ---- */

Test(link, send_after_down_releases_at_once)
{
	struct pair p;
	struct wire_frame f = {.type = WIRE_WRITE, .seq = 1, .length = 5, .length_payload = 5};
	char data[] = "12345";

	pair_up(&p);
	link_close(p.la, 0);
	/* Refused from the close on, not only from `down` on. */
	cr_assert_eq(link_send(p.la, &f, data, count_release, NULL), -ERR_PEER);
	cr_assert_eq(atomic_load(&released), 1);
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	cr_assert_eq(p.a->code, -ERR_CANCELED);
	cr_assert_eq(link_send(p.la, &f, data, count_release, NULL), -ERR_PEER);
	cr_assert_eq(atomic_load(&released), 2);
	cr_assert_eq(link_send(p.la, &f, strdup(data), NULL, NULL), -ERR_PEER); /* freed: the leak check sees it */
	cr_assert_eq(link_queued(p.la), 0);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->code, -ERR_PEER);
	cr_assert_eq(p.b->n, 0);
	pair_close(&p);
}

Test(link, frames_queued_before_up_are_sent)
{
	struct pair p;
	struct wire_frame f = {.type = WIRE_PING};

	pair_open(&p);
	f.offset = 41;
	cr_assert_eq(link_send(p.la, &f, NULL, count_release, NULL), 0);
	cr_assert(end_reaches(p.b, &p.b->n, 1));
	cr_assert_eq(p.b->seen[0].f.offset, 41);
	pair_close(&p);
}

Test(link, close_with_a_drain_delivers_everything_while_the_peer_sends_too)
{
	enum { N = 2000 };
	struct pair p;
	uint8_t data[8192];

	pair_up(&p);
	/* The listener's callback is slow to begin with, so that almost all is queued or in the sockets when the close
	 * comes; and the other way runs full as well, unread at the close. */
	end_set_hold(p.b, true);
	fill(data, sizeof data, 1);
	for (unsigned i = 1; i <= N; i++) {
		struct wire_frame f = {
		    .type = WIRE_WRITE, .seq = i, .length = sizeof data, .length_payload = sizeof data};

		cr_assert_eq(link_send(p.la, &f, data, count_release, NULL), 0);
		send_write(p.b->link, i, data, sizeof data);
	}
	link_close(p.la, 20000);
	end_set_hold(p.b, false);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	cr_assert_eq(p.b->n, N, "%u: %s", p.b->n, p.b->text);
	for (unsigned i = 0; i < N; i++)
		cr_assert(p.b->seen[i].f.seq == i + 1 && memcmp(p.b->seen[i].payload, data, sizeof data) == 0);
	cr_assert_eq(atomic_load(&released), N);
	cr_assert_eq(p.a->code, -ERR_CANCELED);
	cr_assert_eq(p.b->code, -ERR_PEER);
	pair_close(&p);
}

/* The sender waits for `open` between sending a frame and what comes after it. */
struct gate {
	struct mutex lock;
	struct cond cond;
	bool open;
};

static void gate_wait(void *arg)
{
	struct gate *g = arg;

	mutex_lock(&g->lock);
	while (!g->open)
		cond_wait(&g->cond, &g->lock);
	mutex_unlock(&g->lock);
}

static void gate_open(struct gate *g)
{
	mutex_lock(&g->lock);
	g->open = true;
	cond_broadcast(&g->cond);
	mutex_unlock(&g->lock);
}

/* Neither sees the other's end before it is closing itself: that would be its reason. */
Test(link, both_closing_with_a_drain_deliver_what_the_other_still_takes)
{
	struct pair p;
	struct wire_frame f = {.type = WIRE_PING};
	struct gate gate = {.open = false};

	mutex_init(&gate.lock);
	cond_init(&gate.cond);
	pair_up(&p);
	for (int i = 0; i < 99; i++)
		cr_assert_eq(link_send(p.la, &f, NULL, NULL, NULL), 0);
	cr_assert_eq(link_send(p.la, &f, NULL, gate_wait, &gate), 0);
	link_close(p.la, 120000);
	link_close(p.b->link, 120000);
	gate_open(&gate);
	uint64_t start = clock_mono_ns();
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_lt(clock_mono_ns() - start, 60 * NS_PER_SEC); /* not the drain's limit */
	cr_assert_eq(p.a->code, -ERR_CANCELED);
	cr_assert_eq(p.b->code, -ERR_CANCELED);
	pair_close(&p);
}

/* A peer that reads nothing: the sender sits in the socket. */
static void stuff(struct raw_pair *p, unsigned n, uint8_t *data, size_t len)
{
	for (unsigned i = 1; i <= n; i++) {
		struct wire_frame f = {.type = WIRE_WRITE, .seq = i, .length = len, .length_payload = (uint32_t)len};

		cr_assert_eq(link_send(p->b->link, &f, data, count_release, NULL), 0);
	}
}

Test(link, close_without_a_drain_releases_everything_once)
{
	enum { N = 3000 };
	struct raw_pair p;
	uint8_t *data = calloc(1, 65536);

	raw_up(&p);
	stuff(&p, N, data, 65536); /* returns: link_send never waits for the socket */
	cr_assert_gt(link_queued(p.b->link), 0);
	cr_assert_lt(atomic_load(&released), N);
	link_close(p.b->link, 0);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(atomic_load(&released), N);
	cr_assert_eq(link_queued(p.b->link), 0);
	raw_close(&p);
	cr_assert_eq(atomic_load(&released), N);
	free(data);
}

Test(link, a_drain_ends_at_its_limit_when_the_peer_does_not_read)
{
	enum { N = 3000 };
	struct raw_pair p;
	uint8_t *data = calloc(1, 65536);
	uint64_t start, took;

	raw_up(&p);
	stuff(&p, N, data, 65536);
	start = clock_mono_ns();
	link_close(p.b->link, 1500);
	cr_assert_lt(clock_mono_ns() - start, 1500 * NS_PER_MS); /* it does not wait for that */
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	took = clock_mono_ns() - start;
	cr_assert_geq(took, 1500 * NS_PER_MS);
	cr_assert_eq(p.b->code, -ERR_CANCELED);
	cr_assert_eq(atomic_load(&released), N);
	raw_close(&p);
	free(data);
}

Test(link, a_second_close_cuts_a_drain_short)
{
	struct raw_pair p;
	uint8_t *data = calloc(1, 65536);
	uint64_t start;

	raw_up(&p);
	stuff(&p, 3000, data, 65536);
	start = clock_mono_ns();
	link_close(p.b->link, 120000);
	link_close(p.b->link, 120000);
	link_close(p.b->link, 0);
	link_close(p.b->link, 0);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_lt(clock_mono_ns() - start, 60 * NS_PER_SEC);
	cr_assert_eq(p.b->downs, 1);
	raw_close(&p);
	free(data);
}

Test(link, a_drain_ends_at_its_limit_when_the_peer_reads_but_never_closes)
{
	struct raw_pair p;
	uint8_t header[WIRE_HEADER_SIZE];
	struct wire_frame f = {.type = WIRE_GOODBYE};
	uint64_t start;
	char byte;

	raw_up(&p);
	cr_assert_eq(link_send(p.b->link, &f, NULL, NULL, NULL), 0);
	start = clock_mono_ns();
	link_close(p.b->link, 300);
	/* The last word and the end of the stream come at once; the peer sits on its half. */
	cr_assert(raw_read(p.raw.fd, header, sizeof header));
	cr_assert_eq(wire_header_decode(&f, p.raw.session, header, WIRE_PAYLOAD_MAX, NULL), 0);
	cr_assert_eq(f.type, WIRE_GOODBYE);
	cr_assert_eq(recv(p.raw.fd, &byte, 1, 0), 0);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_geq(clock_mono_ns() - start, 300 * NS_PER_MS);
	raw_close(&p);
}

Test(link, a_drain_goes_on_when_the_peer_has_ended_its_half_but_reads)
{
	enum { N = 600 };
	struct raw_pair p;
	uint8_t *data = calloc(1, 65536), header[WIRE_HEADER_SIZE];
	struct wire_frame f;
	char byte;

	raw_up(&p);
	stuff(&p, N, data, 65536);
	link_close(p.b->link, 20000);
	(void)shutdown(p.raw.fd, SHUT_WR);
	/* Time for a wrong end to happen before anything is read. */
	(void)usleep(100000);
	for (unsigned i = 1; i <= N; i++) {
		cr_assert(raw_read(p.raw.fd, header, sizeof header), "frame %u", i);
		cr_assert_eq(wire_header_decode(&f, p.raw.session, header, WIRE_PAYLOAD_MAX, NULL), 0);
		cr_assert_eq(f.number, i);
		cr_assert(raw_read(p.raw.fd, data, f.length_payload), "frame %u", i);
	}
	cr_assert_eq(recv(p.raw.fd, &byte, 1, 0), 0);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(atomic_load(&released), N);
	raw_close(&p);
	free(data);
}

Test(link, a_frame_callback_that_waits_is_backpressure_and_no_deadlock)
{
	enum { N = 2000 };
	struct pair p;
	uint8_t *data = calloc(1, 65536);

	pair_up(&p);
	end_set_hold(p.b, true);
	for (unsigned i = 1; i <= N; i++)
		send_write(p.la, i, data, 65536);
	cr_assert(end_reaches(p.b, &p.b->holding, 1));
	cr_assert_gt(link_queued(p.la), 0);
	cr_assert_eq(p.b->n, 1);
	/* Both of its threads are stuck, this one in the callback: the close returns, the callee frees itself. */
	link_close(p.b->link, 0);
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	cr_assert_eq(p.b->downs, 0);
	end_set_hold(p.b, false);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->n, 1);
	pair_close(&p);
	free(data);
}

Test(link, frames_after_a_close_are_dropped)
{
	struct raw_pair p;
	uint8_t buf[WIRE_HEADER_SIZE * 20];
	size_t n = 0;

	raw_up(&p);
	p.b->close_in_frame_ms = 5000;
	for (unsigned i = 1; i <= 20; i++)
		n += raw_encode(buf + n, WIRE_PING, i, p.raw.session, NULL, 0);
	cr_assert(raw_write(p.raw.fd, buf, n));
	cr_assert(end_reaches(p.b, &p.b->n, 1));
	(void)shutdown(p.raw.fd, SHUT_WR);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->n, 1);
	cr_assert_eq(p.b->code, -ERR_CANCELED);
	raw_close(&p);
}

Test(link, a_failing_frame_callback_ends_it_and_its_last_words_arrive)
{
	struct pair p;
	uint8_t *data = calloc(1, 65536);

	pair_up(&p);
	p.b->frame_result = -ERR_NOSPC;
	p.b->refuse_in_frame = true;
	for (unsigned i = 1; i <= 200; i++)
		send_write(p.la, i, data, 65536);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	cr_assert_eq(p.b->code, -ERR_NOSPC);
	cr_assert(strstr(p.b->text, "WRITE"), "%s", p.b->text);
	cr_assert_eq(p.b->n, 1);
	cr_assert_eq(p.a->n, 1);
	cr_assert_eq(p.a->seen[0].f.type, WIRE_REFUSE);
	pair_close(&p);
	free(data);
}

Test(link, a_reset_connection_ends_both_directions)
{
	struct raw_pair p;
	struct linger hard = {.l_onoff = 1};

	raw_up(&p);
	cr_assert_eq(setsockopt(p.raw.fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard), 0);
	(void)close(p.raw.fd);
	p.raw.fd = -1;
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->code, -ERR_PEER);
	raw_close(&p);
}

Test(link, last_words_of_a_peer_are_heard_though_sending_to_it_fails)
{
	struct raw_pair p;
	struct wire_refuse x = {.code = ERR_STATE, .text = "go away"};
	uint8_t payload[WIRE_HELLO_MAX], buf[WIRE_HEADER_SIZE + WIRE_HELLO_MAX];
	struct wire_frame f = {.type = WIRE_PING};
	int n = wire_refuse_encode(&x, payload, sizeof payload);

	raw_up(&p);
	end_set_hold(p.b, true);
	cr_assert(raw_write(p.raw.fd, buf, raw_encode(buf, WIRE_PING, 1, p.raw.session, NULL, 0)));
	cr_assert(end_reaches(p.b, &p.b->holding, 1));
	/* While its receiver is busy: the last words, then a close; sending then fails. */
	cr_assert(raw_write(p.raw.fd, buf, raw_encode(buf, WIRE_REFUSE, 2, p.raw.session, payload, (size_t)n)));
	(void)close(p.raw.fd);
	p.raw.fd = -1;
	uint64_t deadline = clock_mono_ns() + WAIT_NS;
	while (clock_mono_ns() < deadline && link_send(p.b->link, &f, NULL, NULL, NULL) == 0)
		(void)usleep(1000);
	end_set_hold(p.b, false);
	cr_assert(end_reaches(p.b, &p.b->downs, 1));
	cr_assert_eq(p.b->n, 2, "%u frames: %s", p.b->n, p.b->text);
	cr_assert_eq(p.b->seen[1].f.type, WIRE_REFUSE);
	cr_assert_eq(p.b->code, -ERR_PEER);
	raw_close(&p);
}

Test(link, closing_while_it_connects_is_quick)
{
	struct end *a = end_new();
	struct stream *fill_queue[200];
	struct link *l = NULL;
	struct err e = {0};
	char addr[STREAM_NAME_SIZE];
	int fd, n = 0;

	cr_assert_eq(tcp_listen("127.0.0.1:0", &fd, addr, sizeof addr, &e), 0);
	cr_assert_eq(listen(fd, 0), 0);
	while (n < 200 && stream_tcp_dial(addr, 200, &fill_queue[n], NULL) == 0)
		n++;
	cr_assert_eq(link_dial(addr, &self_a, &callbacks, a, &l, &e), 0);
	link_close(l, 5000);
	cr_assert(end_reaches(a, &a->downs, 1));
	cr_assert_eq(a->ups, 0);
	cr_assert_eq(a->code, -ERR_CANCELED);
	link_unref(l);
	while (n > 0) {
		n--;
		fill_queue[n]->ops->close(fill_queue[n]);
	}
	(void)close(fd);
	end_free(a);
}

Test(link, the_last_reference_may_be_dropped_in_down)
{
	struct pair p;

	pair_open(&p);
	p.a->unref_in_down = true;
	cr_assert(end_reaches(p.a, &p.a->ups, 1));
	cr_assert(end_reaches(p.b, &p.b->ups, 1));
	link_close(p.la, 0);
	cr_assert(end_reaches(p.a, &p.a->downs, 1));
	link_server_stop(p.server);
	link_unref(p.b->link);
	cr_assert(threads_become(threads_before));
	end_free(p.a);
	end_free(p.b);
}

Test(link, stopping_a_server_ends_all_its_links_and_threads)
{
	enum { N = 12 };
	struct end *b = end_new(), *a[N];
	struct link *la[N];
	struct link_server *server = NULL;
	struct err e = {0};

	cr_assert_eq(link_server_start("127.0.0.1:0", false, &self_b, &callbacks, b, &server, &e), 0);
	for (int i = 0; i < N; i++) {
		a[i] = end_new();
		cr_assert_eq(link_dial(link_server_addr(server), &self_a, &callbacks, a[i], &la[i], &e), 0);
		cr_assert(end_reaches(a[i], &a[i]->ups, 1));
		/* The recorder keeps one reference only; these are dropped while the links live. */
		cr_assert(end_reaches(b, &b->ups, (unsigned)i + 1));
		link_unref(b->link);
		b->link = NULL;
	}
	link_server_stop(server);
	cr_assert_eq(b->downs, N);
	cr_assert_eq(b->code, -ERR_CANCELED);
	for (int i = 0; i < N; i++) {
		cr_assert(end_reaches(a[i], &a[i]->downs, 1));
		link_unref(la[i]);
		end_free(a[i]);
	}
	link_server_stop(NULL);
	link_unref(NULL);
	end_free(b);
}
