/* Falling behind and catching up (SPEC 6: pause, resume, on_congestion=ahead) over two real daemons: what is forwarded,
 * what waits and what completes, through the real queue, link and disks. Every order of events is in the traces of
 * tests/unit/core/test_repl.c; kills and proxies are in tests/e2e/test_41_sync.py. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/fs/pairtest.h"

#define MIB (UINT64_C(1) << 20)
#define SIZE (4 * MIB)
#define PART (UINT64_C(64) << 10)

static struct faults fb = {.match = "/disk.raw"};

/* Everything 0x11, in sync, nothing dirty. */
static void setup(void)
{
	OK(pair_open_with(&p, NULL, &fb));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	for (uint64_t off = 0; off < SIZE; off += MIB)
		OK(pair_write(&p.a, "vm", off, MIB, 0x11));
	protect();
}

TestSuite(behind, .init = setup, .fini = teardown, .timeout = 90);

static int64_t dirty_bytes(void)
{
	return pair_status_int(&p.a, "vm", "dirty_bytes");
}

static int64_t moved(void)
{
	json_t *all = daemon_status(p.a.d, "vm");
	const json_t *g = json_array_get(json_object_get(all, "groups"), 0);
	int64_t n = json_integer_value(json_object_get(json_object_get(g, "counters"), "resync_bytes"));
	json_decref(all);
	return n;
}

/* Both disks, past the daemons, and a checkpoint's view. */
static void both_are(uint64_t off, uint64_t len, uint8_t want)
{
	OK(flush(&p.a));
	OK(pair_disk_is(&p.a, "vm", off, len, want));
	OK(pair_disk_is(&p.b, "vm", off, len, want));
	OK(pair_do(&p.a, "checkpoint", named(), NULL));
	OK(pair_is(&p.b, "vm", off, len, want));
}

static void generations_are_equal(void)
{
	char a[64], b[64];
	pair_status(&p.a, "vm", "generation", a, sizeof(a));
	pair_status(&p.b, "vm", "generation", b, sizeof(b));
	cr_assert_str_eq(a, b);
}

Test(behind, paused_nothing_leaves_and_the_resume_sends_what_changed)
{
	wait_clean();
	int64_t sent = moved();
	OK(pair_do(&p.a, "pause", named(), NULL));
	OK(pair_do(&p.a, "pause", named(), NULL)); /* it is */
	OK(pair_wait_link(&p.a, "vm", "RESYNC"));
	OK(pair_wait_link(&p.b, "vm", "RESYNC"));
	OK(pair_write(&p.a, "vm", PART, PART, 0x22));
	struct gvol *v = gvol_find(p.a.d, "vm");
	OK(gvol_zero(v, NULL, MIB, PART, true));
	gvol_unref(v);
	OK(flush(&p.a)); /* of this host alone */
	OK(pair_is(&p.a, "vm", PART, PART, 0x22));
	cr_assert_eq(dirty_bytes(), (int64_t)(2 * PART));
	OK(pair_disk_is(&p.b, "vm", 0, SIZE, 0x11));
	cr_assert_eq(pair_do(&p.a, "checkpoint", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.a, "stop", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.b, "resume", named(), NULL), -ERR_STATE);
	OK(pair_do(&p.a, "resume", named(), NULL));
	in_sync();
	cr_assert_leq(moved() - sent, (int64_t)(2 * PART));
	both_are(0, PART, 0x11);
	both_are(PART, PART, 0x22);
	both_are(2 * PART, MIB - 2 * PART, 0x11);
	both_are(MIB, PART, 0);
	both_are(MIB + PART, 3 * MIB - PART, 0x11);
	generations_are_equal();
}

Test(behind, a_pause_lasts_over_a_restart_of_either_host)
{
	OK(pair_do(&p.a, "pause", named(), NULL));
	OK(pair_write(&p.a, "vm", 0, PART, 0x22));
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	OK(pair_write(&p.a, "vm", PART, PART, 0x33));
	OK(pair_host_start(&p, &p.b));
	OK(pair_wait_link(&p.a, "vm", "RESYNC"));
	OK(pair_write(&p.a, "vm", 2 * PART, PART, 0x44));
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.a));
	OK(pair_wait_link(&p.a, "vm", "RESYNC"));
	OK(pair_write(&p.a, "vm", 3 * PART, PART, 0x55));
	OK(pair_disk_is(&p.b, "vm", 0, SIZE, 0x11));
	OK(pair_do(&p.a, "resume", named(), NULL));
	in_sync();
	for (uint64_t i = 0; i < 4; i++)
		both_are(i * PART, PART, (uint8_t)(0x22 + 0x11 * i));
	both_are(4 * PART, SIZE - 4 * PART, 0x11);
	generations_are_equal();
}

struct writer {
	pthread_t thread;
	uint64_t off;
	_Atomic bool done;
	int err;
};

static void *write_one(void *arg)
{
	struct writer *w = arg;
	w->err = pair_write(&p.a, "vm", w->off, PART, 0x22);
	atomic_store(&w->done, true);
	return NULL;
}

/* Under C it waits for a peer that applies nothing; paused, its completion asks for nobody's word, but for a generation
 * that is durable first [BUMPC]. What the peer has of it counts for nothing: it travels again, or not, but it is there.
 */
Test(behind, a_write_that_waits_for_the_peer_completes_at_a_pause)
{
	char before[64], after[64];
	wait_clean();
	set("protocol", "C");
	pair_status(&p.a, "vm", "generation", before, sizeof(before));
	atomic_store(&fb.hold, 1);
	struct writer w[4];
	memset(w, 0, sizeof(w));
	for (uint64_t i = 0; i < 4; i++) {
		w[i].off = i * MIB;
		cr_assert_eq(pthread_create(&w[i].thread, NULL, write_one, &w[i]), 0);
	}
	WAIT_FOR(dirty_bytes() == (int64_t)(4 * PART)); /* all of them have begun */
	for (int i = 0; i < 4; i++)
		cr_assert_not(atomic_load(&w[i].done), "the peer has applied nothing");
	OK(pair_do(&p.a, "pause", named(), NULL));
	for (int i = 0; i < 4; i++) {
		cr_assert_eq(pthread_join(w[i].thread, NULL), 0);
		OK(w[i].err);
	}
	pair_status(&p.a, "vm", "generation", after, sizeof(after));
	cr_assert_str_neq(before, after);
	atomic_store(&fb.hold, 0);
	OK(pair_do(&p.a, "resume", named(), NULL));
	in_sync();
	for (uint64_t i = 0; i < 4; i++) {
		both_are(i * MIB, PART, 0x22);
		both_are(i * MIB + PART, MIB - PART, 0x11);
	}
	generations_are_equal();
}

/* Paused in its middle, a resync goes on with what is left and what was written meanwhile. */
Test(behind, a_resync_is_paused)
{
	wait_clean();
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	OK(pair_write(&p.a, "vm", 0, MIB, 0x22));
	set("resync_rate", "64K");
	OK(pair_host_start(&p, &p.b));
	WAIT_FOR(moved() > 0);
	OK(pair_do(&p.a, "pause", named(), NULL));
	OK(pair_write(&p.a, "vm", 0, PART, 0x33)); /* of what had been sent first */
	OK(pair_write(&p.a, "vm", 3 * MIB, PART, 0x44));
	set("resync_rate", "0");
	OK(pair_wait_link(&p.a, "vm", "RESYNC"));
	OK(pair_disk_is(&p.b, "vm", 3 * MIB, PART, 0x11));
	OK(pair_do(&p.a, "resume", named(), NULL));
	in_sync();
	both_are(0, PART, 0x33);
	both_are(PART, MIB - PART, 0x22);
	both_are(MIB, 2 * MIB, 0x11);
	both_are(3 * MIB, PART, 0x44);
	both_are(3 * MIB + PART, MIB - PART, 0x11);
}

/* The peer's disk takes nothing: what it, the sockets and the queue hold fills up, and the guest goes on. */
Test(behind, ahead_delays_no_write_when_the_queue_is_full)
{
	const uint64_t size = 96 * MIB;
	uint64_t n = 0;
	OK(pair_do(&p.a, "unprotect", named(), NULL));
	OK(pair_create(&p.a, "big", "big", size));
	OK(pair_do(&p.a, "set",
		   json_pack("{s:s, s:{s:s, s:s, s:s, s:s, s:s}}", "name", "big", "settings", "queue_max", "4M",
			     "on_congestion", "ahead", "protocol", "A", "peer_timeout", "60s", "checkpoint_interval",
			     "0"),
		   NULL));
	OK(pair_protect(&p, "big"));
	atomic_store(&fb.hold, 1);
	char link[32] = "";
	for (; n < size / MIB && strcmp(link, "RESYNC") != 0; n++) {
		OK(pair_write(&p.a, "big", n * MIB, MIB, (uint8_t)(n + 1)));
		pair_status(&p.a, "big", "link", link, sizeof(link));
	}
	cr_assert_str_eq(link, "RESYNC", "%d MiB did not fill the queue", (int)n);
	for (uint64_t i = 0; i < 4 && n < size / MIB; i++, n++)
		OK(pair_write(&p.a, "big", n * MIB, MIB, (uint8_t)(n + 1)));
	cr_assert_leq(pair_status_int(&p.a, "big", "queue_bytes"), (int64_t)(6 * MIB));
	atomic_store(&fb.hold, 0);
	OK(pair_do(&p.a, "wait", json_pack("{s:s, s:s, s:i}", "name", "big", "for", "in-sync", "timeout_ms", 60000),
		   NULL));
	OK(pair_do(&p.a, "checkpoint", json_pack("{s:s, s:i}", "name", "big", "timeout_ms", 60000), NULL));
	for (uint64_t i = 0; i < n; i++) {
		OK(pair_disk_is(&p.a, "big", i * MIB, MIB, (uint8_t)(i + 1)));
		OK(pair_disk_is(&p.b, "big", i * MIB, MIB, (uint8_t)(i + 1)));
		OK(pair_is(&p.b, "big", i * MIB, MIB, (uint8_t)(i + 1)));
	}
}
