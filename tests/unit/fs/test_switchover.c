/* Switchover over two real daemons (tests/lib/pair.h): what is read and written on either side, and what each of its
 * two writes of a record leaves when it fails. Whole traces are in tests/unit/core, kills in
 * tests/e2e/test_53_roles.py. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "core/os/clock.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(4) << 20)
#define PART (UINT64_C(64) << 10)
static struct faults fa, fb;

static void setup(void)
{
	fa.match = fb.match = "groups/";
	OK(pair_open_with(&p, &fa, &fb));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	for (uint64_t off = 0; off < SIZE; off += 1 << 20)
		OK(pair_write(&p.a, "vm", off, 1 << 20, 0x11));
	set("peer_timeout", "2s");
	protect();
}

TestSuite(switchover, .init = setup, .fini = teardown, .timeout = 300);

static bool is(struct pair_host *h, const char *field, const char *want)
{
	char text[64];
	pair_status(h, "vm", field, text, sizeof(text));
	return strcmp(text, want) == 0;
}

static int switchover(struct pair_host *h)
{
	return pair_do(h, "switchover", named(), NULL);
}

/* `to` is primary and in sync with the other; both run; nothing had to be sent again. */
static void swapped(struct pair_host *to, struct pair_host *from)
{
	/* The role first: until then the links may be SYNCED still, with the old one's session. */
	WAIT_FOR(is(to, "role", "primary"));
	WAIT_FOR(is(to, "link", "SYNCED") && is(from, "link", "SYNCED"));
	cr_assert(is(to, "role", "primary") && is(to, "state", "RUNNING"));
	cr_assert(is(from, "role", "secondary") && is(from, "state", "RUNNING"));
	WAIT_FOR(pair_status_int(to, "vm", "checkpoint") == pair_status_int(from, "vm", "checkpoint"));
	WAIT_FOR(is(to, "health", "ok") && is(from, "health", "ok"));
}

static int64_t resync_bytes(struct pair_host *h)
{
	json_t *all = daemon_status(h->d, "vm");
	const json_t *g = json_array_get(json_object_get(all, "groups"), 0);
	int64_t n = json_integer_value(json_object_get(json_object_get(g, "counters"), "resync_bytes"));
	json_decref(all);
	return n;
}

struct writer {
	struct pair_host *h;
	struct gvol *v;
	struct gvol_handle *handle;
	pthread_t thread;
	uint8_t first, last; /* bytes that were written with success, one after the other, and the next */
	int error;
};

/* Writes its byte everywhere, flushes, goes on to the next, until an error comes. */
static void *writer_run(void *arg)
{
	struct writer *w = arg;
	static uint8_t buf[PART];
	while (!w->error) {
		memset(buf, w->last + 1, sizeof(buf));
		for (uint64_t off = 0; off < SIZE && !w->error; off += PART)
			w->error = gvol_write(w->v, w->handle, off, PART, buf);
		if (!w->error)
			w->error = gvol_flush(w->v, w->handle);
		if (!w->error)
			w->last++;
	}
	return NULL;
}

static void writer_start(struct writer *w, struct pair_host *h, uint8_t byte)
{
	bool direct;
	*w = (struct writer){.h = h, .first = byte, .last = byte};
	w->v = gvol_find(h->d, "vm");
	OK(gvol_open(w->v, true, true, &w->handle, &direct));
	cr_assert_eq(pthread_create(&w->thread, NULL, writer_run, w), 0);
}

/* It was ended by the switchover. What it was told to be written is there, and of the last round so much as came. */
static void writer_end(struct writer *w, struct pair_host *now)
{
	static uint8_t buf[PART];
	pthread_join(w->thread, NULL);
	cr_assert_eq(w->error, -ERR_IO);
	bool next = true;
	for (uint64_t off = 0; off < SIZE; off += PART) {
		memset(buf, 0xee, sizeof(buf));
		OK(pair_read(now, "vm", off, PART, buf));
		next = next && buf[0] == w->last + 1;
		for (uint64_t i = 0; i < PART; i++)
			cr_assert_eq(buf[i], next ? w->last + 1 : w->last, "byte %lu", (unsigned long)(off + i));
	}
	/* Its handle is dead for good, whatever is asked for; the volume is not. */
	cr_assert_eq(gvol_write(w->v, w->handle, 0, PART, buf), -ERR_IO);
	cr_assert_eq(gvol_flush(w->v, w->handle), -ERR_IO);
	cr_assert_eq(gvol_read(w->v, w->handle, GVOL_VOLUME, 0, 0, PART, buf), -ERR_IO);
	gvol_release(w->handle);
	gvol_unref(w->v);
}

static void rounds(struct writer *w)
{
	WAIT_FOR(*(volatile uint8_t *)&w->last > w->first + 2 || w->error);
	cr_assert_eq(w->error, 0);
}

Test(switchover, there_and_back_under_a_writer)
{
	struct writer w;
	int64_t sent[2] = {resync_bytes(&p.a), resync_bytes(&p.b)};
	writer_start(&w, &p.a, 0x11);
	rounds(&w);
	OK(switchover(&p.a));
	writer_end(&w, &p.b);
	swapped(&p.b, &p.a);
	OK(switchover(&p.a)); /* the same again */
	cr_assert_eq(switchover(&p.b), 0);
	swapped(&p.a, &p.b);
	writer_start(&w, &p.a, 0x40);
	rounds(&w);
	OK(switchover(&p.a));
	writer_end(&w, &p.b);
	swapped(&p.b, &p.a);
	writer_start(&w, &p.b, 0x60);
	rounds(&w);
	OK(switchover(&p.b));
	writer_end(&w, &p.a);
	swapped(&p.a, &p.b);
	cr_assert_eq(resync_bytes(&p.a), sent[0]);
	cr_assert_eq(resync_bytes(&p.b), sent[1]);
	OK(flush(&p.a));
	static uint8_t a[SIZE], b[SIZE];
	memset(a, 0xee, sizeof(a));
	memset(b, 0xdd, sizeof(b));
	OK(pair_do(&p.a, "checkpoint", named(), NULL));
	OK(pair_read(&p.a, "vm", 0, SIZE, a));
	OK(pair_read(&p.b, "vm", 0, SIZE, b));
	cr_assert_eq(memcmp(a, b, SIZE), 0);
}

/* The view of the new secondary stands on the checkpoint that was handed over, whatever is written on the other side.
 */
Test(switchover, the_old_side_shows_a_secondarys_view)
{
	OK(switchover(&p.a));
	swapped(&p.b, &p.a);
	int64_t at = pair_status_int(&p.a, "vm", "checkpoint");
	OK(pair_write(&p.b, "vm", 0, PART, 0x22));
	OK(flush(&p.b));
	cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, 0x11), 0);
	OK(pair_write(&p.a, "vm", PART, PART, 0x33)); /* its own, in active */
	cr_assert_eq(pair_is(&p.a, "vm", PART, PART, 0x33), 0);
	cr_assert_eq(pair_is(&p.b, "vm", PART, PART, 0x11), 0);
	/* It is not thrown away by a switchover back. */
	cr_assert_eq(switchover(&p.b), -ERR_STATE);
	cr_assert(strstr(p.b.err.text, "discard"), "%s", p.b.err.text);
	cr_assert(is(&p.b, "role", "primary"));
	OK(pair_write(&p.b, "vm", 2 * PART, PART, 0x44)); /* and its guest goes on */
	OK(pair_do(&p.a, "discard", named(), NULL));
	OK(switchover(&p.b));
	swapped(&p.a, &p.b);
	cr_assert_eq(pair_is(&p.a, "vm", 0, PART, 0x22), 0);
	cr_assert_eq(pair_is(&p.a, "vm", PART, PART, 0x11), 0);
	cr_assert_eq(pair_is(&p.a, "vm", 2 * PART, PART, 0x44), 0);
	cr_assert_gt(pair_status_int(&p.a, "vm", "checkpoint"), at);
}

Test(switchover, is_refused_where_it_cannot_be)
{
	cr_assert_eq(switchover(&p.b), -ERR_STATE);
	cr_assert(strstr(p.b.err.text, "run it on the primary"), "%s", p.b.err.text);
	OK(pair_do(&p.a, "pause", named(), NULL));
	cr_assert_eq(switchover(&p.a), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "resume"), "%s", p.a.err.text);
	OK(pair_do(&p.a, "resume", named(), NULL));
	in_sync();
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	cr_assert_eq(switchover(&p.a), -ERR_STATE);
	OK(pair_write(&p.a, "vm", 0, PART, 0x22));
	OK(pair_host_start(&p, &p.b));
	in_sync();
	OK(pair_do(&p.a, "stop", named(), NULL));
	cr_assert_eq(switchover(&p.a), -ERR_STATE);
	OK(pair_do(&p.a, "start", named(), NULL));
	in_sync();
	OK(switchover(&p.a));
	swapped(&p.b, &p.a);
	cr_assert_eq(pair_is(&p.b, "vm", 0, PART, 0x22), 0);
}

struct late {
	struct gvol *v;
	struct gvol_handle *handle;
	pthread_t thread;
	enum repl_kind kind;
	_Atomic int begun;
	int error;
};

static void *late_run(void *arg)
{
	struct late *l = arg;
	static uint8_t buf[PART];
	memset(buf, 0x77, sizeof(buf));
	atomic_store(&l->begun, 1);
	l->error = l->kind == REPL_FLUSH   ? gvol_flush(l->v, l->handle)
		   : l->kind == REPL_WRITE ? gvol_write(l->v, l->handle, 0, PART, buf)
					   : gvol_zero(l->v, l->handle, 0, PART, false);
	return NULL;
}

/* What waits in the old primary while it steps down is of handles that are dead by then: it is neither carried out in
 * the view that follows, nor answered as if it had been. */
Test(switchover, what_waits_for_it_ends_with_the_handles)
{
	static const enum repl_kind kinds[] = {REPL_WRITE, REPL_ZERO, REPL_FLUSH};
	struct late late[3];
	struct gvol *v = gvol_find(p.a.d, "vm");
	struct gvol_handle *h = NULL;
	bool direct;
	OK(gvol_open(v, true, true, &h, &direct));
	json_t *args = named();
	json_object_set_new(args, "timeout_ms", json_integer(1));
	atomic_store(&fa.hold, 1); /* its save, and with it the moment, waits */
	cr_assert_lt(pair_do(&p.a, "switchover", args, NULL), 0);
	WAIT_FOR(pair_status_int(&p.b, "vm", "checkpoint") > pair_status_int(&p.a, "vm", "checkpoint"));
	for (int i = 0; i < 3; i++) {
		late[i] = (struct late){.v = v, .handle = h, .kind = kinds[i]};
		cr_assert_eq(pthread_create(&late[i].thread, NULL, late_run, &late[i]), 0);
		WAIT_FOR(atomic_load(&late[i].begun));
	}
	(void)poll(NULL, 0, 20); /* into the core, most times: what comes later ends likewise */
	atomic_store(&fa.hold, 0);
	for (int i = 0; i < 3; i++) {
		pthread_join(late[i].thread, NULL);
		cr_assert_eq(late[i].error, -ERR_IO, "request %d: %d", i, late[i].error);
	}
	gvol_release(h);
	gvol_unref(v);
	swapped(&p.b, &p.a);
	cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, 0x11), 0);
	cr_assert_eq(pair_is(&p.b, "vm", 0, SIZE, 0x11), 0);
	OK(switchover(&p.b)); /* nothing is in active */
	swapped(&p.a, &p.b);
}

/* The first of the two writes fails: nothing has changed, and nothing has been lost. */
Test(switchover, a_primary_that_cannot_save_goes_on)
{
	atomic_store(&fa.write, -ERR_NOSPC);
	atomic_store(&fa.failed, 0);
	/* What the record holds may be found by the next start: nothing goes on before it is as it was again. */
	json_t *args = named();
	json_object_set_new(args, "timeout_ms", json_integer(1500));
	cr_assert_lt(pair_do(&p.a, "switchover", args, NULL), 0);
	cr_assert_gt(atomic_load(&fa.failed), 0U);
	atomic_store(&fa.write, 0);
	WAIT_FOR(pair_write(&p.a, "vm", 0, PART, 0x22) == 0);
	cr_assert(is(&p.a, "role", "primary"));
	cr_assert(is(&p.b, "role", "secondary"));
	WAIT_FOR(is(&p.a, "link", "SYNCED"));
	OK(pair_write(&p.b, "vm", PART, PART, 0x33)); /* the view is not held for good */
	OK(pair_do(&p.b, "discard", named(), NULL));
	OK(switchover(&p.a));
	swapped(&p.b, &p.a);
	cr_assert_eq(pair_is(&p.b, "vm", 0, PART, 0x22), 0);
}

/* Up to the second of the two writes, which fails: two secondaries. */
static void cut_between(void)
{
	OK(pair_write(&p.a, "vm", 0, PART, 0x22));
	json_t *args = named();
	json_object_set_new(args, "timeout_ms", json_integer(1));
	atomic_store(&fa.hold,
		     1); /* the primary's own waits, so that the other's checkpoint is told from what follows */
	cr_assert_lt(pair_do(&p.a, "switchover", args, NULL), 0);
	WAIT_FOR(pair_status_int(&p.b, "vm", "checkpoint") > pair_status_int(&p.a, "vm", "checkpoint"));
	atomic_store(&fb.failed, 0);
	atomic_store(&fb.write, -ERR_IO);
	atomic_store(&fa.hold, 0);
	WAIT_FOR(is(&p.a, "role", "secondary") && atomic_load(&fb.failed) > 0);
	cr_assert(is(&p.b, "role", "secondary"));
	cr_assert(is(&p.a, "health", "degraded"));
}

/* The other one takes over by itself, when it can. */
Test(switchover, a_secondary_that_cannot_save_takes_over_when_it_can)
{
	cut_between();
	atomic_store(&fb.write, 0);
	WAIT_FOR(switchover(&p.a) == 0); /* again: it waits for that, or says what stood in its way just now */
	swapped(&p.b, &p.a);
	cr_assert_eq(pair_is(&p.b, "vm", 0, PART, 0x22), 0);
	cr_assert_eq(pair_is(&p.b, "vm", PART, SIZE - PART, 0x11), 0);
}

/* The peer is lost for good between the two: a failover brings the role back, with everything. */
Test(switchover, a_peer_that_is_lost_then_costs_a_failover)
{
	cut_between();
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	cr_assert_eq(pair_is(&p.a, "vm", 0, PART, 0x22), 0); /* the view shows it */
	json_t *args = named();
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.a, "failover", args, NULL));
	OK(pair_write(&p.a, "vm", PART, PART, 0x33));
	/* It was not: it comes back as the secondary that it is, and waits for the failback. */
	atomic_store(&fb.write, 0);
	OK(pair_host_start(&p, &p.b));
	cr_assert(is(&p.b, "role", "secondary"));
	OK(pair_do(&p.a, "failback", json_pack("{s:s, s:s, s:b}", "name", "vm", "peer", p.addr, "wait", 1), NULL));
	swapped(&p.a, &p.b);
	OK(pair_do(&p.a, "checkpoint", named(), NULL));
	cr_assert_eq(pair_is(&p.b, "vm", 0, PART, 0x22), 0);
	cr_assert_eq(pair_is(&p.b, "vm", PART, PART, 0x33), 0);
	cr_assert_eq(pair_is(&p.b, "vm", 2 * PART, SIZE - 2 * PART, 0x11), 0);
}

/* A restart of both with the roles swapped changes nothing. */
Test(switchover, it_stays_so_over_restarts)
{
	OK(switchover(&p.a));
	swapped(&p.b, &p.a);
	OK(pair_write(&p.b, "vm", 0, PART, 0x22));
	OK(flush(&p.b));
	pair_host_stop(&p.a);
	pair_host_stop(&p.b);
	OK(pair_host_start(&p, &p.b));
	OK(pair_host_start(&p, &p.a));
	swapped(&p.b, &p.a);
	OK(pair_do(&p.b, "checkpoint", named(), NULL));
	cr_assert_eq(pair_is(&p.a, "vm", 0, PART, 0x22), 0);
	OK(switchover(&p.b));
	swapped(&p.a, &p.b);
}
