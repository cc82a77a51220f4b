/* Two links over loopback TCP exchange frames in both directions while either side closes at a random moment, hard or
 * with a drain, until enough frames have arrived. Own main, for ThreadSanitizer.
 *
 *   stress_link [FRAMES [SEED]]        default 100000 frames
 *   stress_link bench FRAMES PAYLOAD   one way, no close; prints the rate
 *
 * Checked in every round: frames arrive in order and whole; each release is called once, before `down`; `down` comes
 * once for each link; nothing stays queued; and when one side drained and the other never closed, all that the former
 * had been given to send has arrived.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/thread.h"
#include "net/link.h"

#define ROUND_FRAMES_MAX 3000
#define QUEUED_MAX (4U << 20)
#define PAYLOAD_MAX 200000U
#define WAIT_S 60

#define MUST(cond)                                                                                                     \
	do {                                                                                                           \
		if (!(cond)) {                                                                                         \
			fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond);                             \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

struct side {
	struct mutex lock;
	struct cond cond;
	struct link *link;
	bool up;
	unsigned down;
	int code;
	char text[ERR_TEXT_MAX];
	uint64_t sent_bytes;
	_Atomic uint64_t taken, offered, released, received;
	atomic_bool over;
	unsigned seed;
	unsigned close_after_us, close_drain_ms; /* close_after_us 0: this side does not close */
	bool slow;				 /* its frame callback waits now and then */
	unsigned frames;			 /* to send at most */
};

struct cargo {
	struct side *owner;
	uint8_t data[];
};

static size_t payload_size(uint64_t seq)
{
	static const size_t sizes[] = {0, 1, 4096, 512, 0, 4096, 70000, 4096, 33000, 17, 0, 8192};

	return seq % 48 == 47 ? PAYLOAD_MAX : sizes[seq % (sizeof sizes / sizeof sizes[0])];
}

/* Payloads are made and compared by whole ranges: byte by byte, ThreadSanitizer would look at nothing else. */
static uint8_t payload_bytes[PAYLOAD_MAX + 251];

static void payload_init(void)
{
	for (size_t i = 0; i < sizeof payload_bytes; i++)
		payload_bytes[i] = (uint8_t)(i % 251);
}

static const uint8_t *payload_of(uint64_t seq)
{
	return payload_bytes + seq % 251;
}

static void side_init(struct side *s, unsigned seed)
{
	memset(s, 0, sizeof *s);
	mutex_init(&s->lock);
	cond_init(&s->cond);
	s->seed = seed;
}

static void side_destroy(struct side *s)
{
	cond_destroy(&s->cond);
	mutex_destroy(&s->lock);
}

static void side_wait(struct side *s, bool (*is)(struct side *))
{
	uint64_t deadline = clock_mono_ns() + WAIT_S * NS_PER_SEC;

	mutex_lock(&s->lock);
	while (!is(s))
		MUST(cond_wait_until(&s->cond, &s->lock, deadline));
	mutex_unlock(&s->lock);
}

static bool is_up_or_down(struct side *s)
{
	return s->up || s->down;
}

static bool is_down(struct side *s)
{
	return s->down > 0;
}

static int on_up(struct link *l, void *arg)
{
	struct side *s = arg;

	mutex_lock(&s->lock);
	MUST(!s->up && !s->down);
	s->up = true;
	s->link = l;
	cond_broadcast(&s->cond);
	mutex_unlock(&s->lock);
	return 0;
}

static int on_frame(struct link *l, void *arg, const struct wire_frame *f, void *payload)
{
	struct side *s = arg;
	uint64_t n = atomic_fetch_add(&s->received, 1) + 1;

	(void)l;
	MUST(f->seq == n);
	MUST(f->length_payload == payload_size(n));
	MUST(f->length_payload == 0 || memcmp(payload, payload_of(n), f->length_payload) == 0);
	free(payload);
	if (s->slow && n % 64 == 0)
		nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
	return 0;
}

static void on_batch(struct link *l, void *arg)
{
	(void)l;
	(void)arg;
}

static void on_sent(struct link *l, void *arg, uint64_t n)
{
	struct side *s = arg;

	(void)l;
	mutex_lock(&s->lock);
	s->sent_bytes += n;
	cond_broadcast(&s->cond);
	mutex_unlock(&s->lock);
}

static void on_down(struct link *l, void *arg, int code, const char *text)
{
	struct side *s = arg;

	MUST(link_queued(l) == 0);
	MUST(code < 0);
	atomic_store(&s->over, true);
	mutex_lock(&s->lock);
	s->down++;
	s->code = code;
	(void)snprintf(s->text, sizeof s->text, "%s", text);
	cond_broadcast(&s->cond);
	mutex_unlock(&s->lock);
}

static const struct link_callbacks callbacks = {
    .up = on_up, .frame = on_frame, .batch = on_batch, .sent = on_sent, .down = on_down};

static void cargo_release(void *arg)
{
	struct cargo *c = arg;

	atomic_fetch_add(&c->owner->released, 1);
	free(c);
}

static bool has_room(struct side *s)
{
	return s->down || link_queued(s->link) < QUEUED_MAX;
}

static void *writer_main(void *arg)
{
	struct side *s = arg;

	for (uint64_t seq = 1; seq <= s->frames; seq++) {
		size_t n = payload_size(seq);
		struct cargo *c = malloc(sizeof *c + n);
		struct wire_frame f = {
		    .type = n ? WIRE_WRITE : WIRE_FLUSH, .seq = seq, .length_payload = (uint32_t)n, .length = n};

		MUST(c);
		c->owner = s;
		memcpy(c->data, payload_of(seq), n);
		side_wait(s, has_room);
		atomic_fetch_add(&s->offered, 1);
		if (link_send(s->link, &f, c->data, cargo_release, c))
			return NULL;
		atomic_fetch_add(&s->taken, 1);
	}
	return NULL;
}

static void *closer_main(void *arg)
{
	struct side *s = arg;

	nanosleep(&(struct timespec){.tv_nsec = (long)s->close_after_us * 1000}, NULL);
	link_close(s->link, s->close_drain_ms);
	return NULL;
}

static const struct link_self self_a = {.store = "store a", .program = "stress a"};
static const struct link_self self_b = {.store = "store b", .program = "stress b"};

static void pair_connect(struct side *a, struct side *b, struct link_server **ret)
{
	struct err e = {0};

	MUST(link_server_start("127.0.0.1:0", false, &self_b, &callbacks, b, ret, &e) == 0);
	mutex_lock(&a->lock);
	MUST(link_dial(link_server_addr(*ret), &self_a, &callbacks, a, &a->link, &e) == 0);
	mutex_unlock(&a->lock);
	side_wait(a, is_up_or_down);
	side_wait(b, is_up_or_down);
	MUST(a->up && b->up);
}

static void round_choose(struct side *a, struct side *b, unsigned *seed)
{
	struct side *both[2] = {a, b};

	for (int i = 0; i < 2; i++) {
		struct side *s = both[i];

		s->frames = (unsigned)rand_r(seed) % ROUND_FRAMES_MAX;
		s->slow = rand_r(seed) % 4 == 0;
		if (rand_r(seed) % 3)
			s->close_after_us = 1 + (unsigned)rand_r(seed) % (rand_r(seed) % 2 ? 2000 : 60000);
		if (rand_r(seed) % 2)
			s->close_drain_ms = rand_r(seed) % 4 ? 20000 : 1 + (unsigned)rand_r(seed) % 5;
	}
}

static uint64_t round_run(unsigned *seed)
{
	struct side a, b;
	struct link_server *server = NULL;
	pthread_t writers[2], closers[2];
	struct side *both[2] = {&a, &b};
	uint64_t received;

	side_init(&a, *seed);
	side_init(&b, *seed + 1);
	round_choose(&a, &b, seed);
	pair_connect(&a, &b, &server);
	for (int i = 0; i < 2; i++) {
		MUST(thread_start(&writers[i], "writer", writer_main, both[i]) == 0);
		if (both[i]->close_after_us)
			MUST(thread_start(&closers[i], "closer", closer_main, both[i]) == 0);
	}
	for (int i = 0; i < 2; i++) {
		(void)pthread_join(writers[i], NULL);
		if (both[i]->close_after_us)
			(void)pthread_join(closers[i], NULL);
	}
	/* Nobody did: this side does, and everything must arrive. */
	if (!a.close_after_us && !b.close_after_us) {
		a.close_after_us = 1;
		a.close_drain_ms = 30000;
		link_close(a.link, a.close_drain_ms);
	}
	side_wait(&a, is_down);
	side_wait(&b, is_down);
	for (int i = 0; i < 2; i++) {
		struct side *s = both[i], *o = both[1 - i];

		MUST(atomic_load(&s->released) == atomic_load(&s->offered));
		MUST(atomic_load(&s->taken) <= atomic_load(&s->offered));
		MUST(atomic_load(&o->received) <= atomic_load(&s->taken));
		if (s->close_after_us && s->close_drain_ms >= 20000 && !o->close_after_us)
			MUST(atomic_load(&o->received) == atomic_load(&s->taken));
		if (!s->close_after_us && s->code != -ERR_PEER) {
			fprintf(stderr, "unexpected end: %d %s\n", s->code, s->text);
			abort();
		}
	}
	link_server_stop(server);
	MUST(a.down == 1 && b.down == 1);
	link_unref(a.link);
	link_unref(b.link);
	received = atomic_load(&a.received) + atomic_load(&b.received);
	side_destroy(&a);
	side_destroy(&b);
	return received;
}

/* ---- rate ---- */

static _Atomic uint64_t bench_frames;
static struct side *bench_sender;

static int bench_frame(struct link *l, void *arg, const struct wire_frame *f, void *payload)
{
	(void)l;
	(void)arg;
	(void)f;
	free(payload);
	atomic_fetch_add_explicit(&bench_frames, 1, memory_order_relaxed);
	return 0;
}

static void bench_release(void *arg)
{
	(void)arg;
}

static int bench_run(uint64_t frames, size_t payload)
{
	struct link_callbacks cb = callbacks;
	struct link_server *server = NULL;
	struct side a, b;
	struct err e = {0};
	void *data = calloc(1, payload + 1);
	uint64_t start, ns;

	side_init(&a, 1);
	side_init(&b, 2);
	bench_sender = &a;
	cb.frame = bench_frame;
	MUST(data);
	MUST(link_server_start("127.0.0.1:0", false, &self_b, &cb, &b, &server, &e) == 0);
	MUST(link_dial(link_server_addr(server), &self_a, &cb, &a, &a.link, &e) == 0);
	side_wait(&a, is_up_or_down);
	side_wait(&b, is_up_or_down);
	start = clock_mono_ns();
	for (uint64_t seq = 1; seq <= frames; seq++) {
		struct wire_frame f = {.type = payload ? WIRE_WRITE : WIRE_FLUSH,
				       .seq = seq,
				       .length_payload = (uint32_t)payload,
				       .length = payload};

		if (seq % 256 == 0)
			side_wait(&a, has_room);
		MUST(link_send(a.link, &f, data, bench_release, NULL) == 0);
	}
	link_close(a.link, 60000);
	side_wait(&a, is_down);
	side_wait(&b, is_down);
	ns = clock_mono_ns() - start;
	MUST(atomic_load(&bench_frames) == frames);
	printf("%llu frames of %zu bytes: %.0f frames/s, %.1f MiB/s\n", (unsigned long long)frames, payload,
	       (double)frames * 1e9 / (double)ns,
	       (double)(frames * (payload + WIRE_HEADER_SIZE)) * 1e9 / (double)ns / 1048576.0);
	link_server_stop(server);
	link_unref(a.link);
	link_unref(b.link);
	side_destroy(&a);
	side_destroy(&b);
	free(data);
	return 0;
}

int main(int argc, char **argv)
{
	uint64_t want = argc > 1 ? strtoull(argv[1], NULL, 10) : 100000, got = 0;
	unsigned seed = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : (unsigned)random_u64_nonzero();
	unsigned rounds = 0;

	if (argc == 4 && strcmp(argv[1], "bench") == 0)
		return bench_run(strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10));
	payload_init();
	printf("seed %u\n", seed);
	fflush(stdout);
	while (got < want) {
		got += round_run(&seed);
		rounds++;
	}
	printf("%u rounds, %llu frames\n", rounds, (unsigned long long)got);
	return 0;
}
