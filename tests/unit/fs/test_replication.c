/* What replication does to a volume, over two real daemons and loopback TCP (tests/lib/pair.h): the 13 cases of QEMU's
 * replication unit test by meaning, and those it lacks. Buffers are poisoned before each read; contents are compared
 * for equality. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(1) << 20)
#define HALF (SIZE / 2)

static void setup(void)
{
	OK(pair_open(&p));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
}

/* Everything 0x11 on both hosts, protected, in sync, no automatic checkpoints. */
static void protected_setup(void)
{
	setup();
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	protect();
}

static void checkpoint(void)
{
	OK(pair_do(&p.a, "checkpoint", named(), NULL));
}

static int failover(const char *to)
{
	json_t *args = named();
	if (to)
		json_object_set_new(args, "to", json_string(to));
	json_object_set_new(args, "wait", json_true());
	return pair_do(&p.b, "failover", args, NULL);
}

/* All that the primary sent so far is applied on the other side. */
static void settle(void)
{
	struct gvol *v = gvol_find(p.a.d, "vm");
	OK(gvol_flush(v, NULL)); /* protocol F: the peer has flushed all before it */
	gvol_unref(v);
}

static void is(struct pair_host *h, uint64_t off, uint64_t len, uint8_t byte)
{
	int r = pair_is(h, "vm", off, len, byte);
	cr_assert_eq(r, 0, "host %c: [%lu, %lu) is not all 0x%02x (%d)", h == &p.a ? 'a' : 'b', (unsigned long)off,
		     (unsigned long)(off + len), byte, r);
}

TestSuite(primary, .init = setup, .fini = teardown, .timeout = 300);
TestSuite(replication, .init = protected_setup, .fini = teardown, .timeout = 300);

/* ---- primary: 1 read, 2 write before start; 3 start; 4 stop; 5 checkpoint; 6 error ---- */

Test(primary, unstarted_read)
{
	is(&p.a, 0, SIZE, 0x00);
}

Test(primary, unstarted_write)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	is(&p.a, 0, HALF, 0x00);
	is(&p.a, HALF, HALF, 0x22);
	OK(pair_disk_is(&p.a, "vm", HALF, HALF, 0x22));
}

Test(primary, error_before_start_is_refused)
{
	cr_assert_eq(pair_do(&p.a, "error", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.a, "checkpoint", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.a, "stop", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.a, "failover", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.a, "start", named(), NULL), -ERR_STATE);
}

Test(replication, primary_start)
{
	char role[32], state[32], link[32];
	pair_status(&p.a, "vm", "role", role, sizeof(role));
	pair_status(&p.a, "vm", "state", state, sizeof(state));
	pair_status(&p.a, "vm", "link", link, sizeof(link));
	cr_assert_str_eq(role, "primary");
	cr_assert_str_eq(state, "RUNNING");
	cr_assert_str_eq(link, "SYNCED");
	pair_status(&p.b, "vm", "role", role, sizeof(role));
	cr_assert_str_eq(role, "secondary");
	is(&p.a, 0, SIZE, 0x11);
}

Test(replication, primary_stop)
{
	OK(pair_do(&p.a, "stop", named(), NULL));
	OK(pair_wait_state(&p.a, "vm", "DONE"));
	OK(pair_wait_state(&p.b, "vm", "DONE"));
}

Test(replication, primary_checkpoint)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", named(), &r));
	int64_t n = json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	cr_assert_gt(n, 0);
	cr_assert_eq(pair_status_int(&p.a, "vm", "checkpoint"), n);
	cr_assert_eq(pair_status_int(&p.b, "vm", "checkpoint"), n);
}

Test(replication, primary_error_is_clean_in_sync)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "error", named(), &r));
	cr_assert(json_is_true(json_object_get(r, "clean")));
	json_decref(r);
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	OK(pair_do(&p.a, "error", named(), &r));
	cr_assert(json_is_false(json_object_get(r, "clean")), "not clean without its peer");
	json_decref(r);
}

/* ---- secondary: 7 read, 8 write, 9 stop, 10 failover, 11 checkpoint, 12 continuous, 13 error ---- */

Test(replication, secondary_read)
{
	is(&p.b, 0, SIZE, 0x11);
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	is(&p.b, 0, SIZE, 0x11);
	OK(pair_disk_is(&p.b, "vm", HALF, HALF, 0x22));
}

Test(replication, secondary_write)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	OK(pair_write(&p.b, "vm", 0, HALF, 0x33));
	is(&p.b, 0, HALF, 0x33);
	is(&p.b, HALF, HALF, 0x11);
	OK(pair_disk_is(&p.b, "vm", 0, HALF, 0x11));
	is(&p.a, 0, HALF, 0x11);
}

Test(replication, secondary_stop_leaves_the_primarys_disk_and_empty_overlays)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	OK(pair_write(&p.b, "vm", 0, HALF, 0x33));
	json_t *r = NULL;
	OK(pair_do(&p.b, "stop", named(), &r));
	cr_assert_eq(json_integer_value(json_object_get(r, "discarded_bytes")), (json_int_t)HALF);
	json_decref(r);
	OK(pair_wait_state(&p.b, "vm", "DONE"));
	OK(pair_wait_state(&p.a, "vm", "DONE"));
	OK(pair_disk_is(&p.b, "vm", 0, HALF, 0x11));
	OK(pair_disk_is(&p.b, "vm", HALF, HALF, 0x22));
	is(&p.b, 0, HALF, 0x11);
	is(&p.b, HALF, HALF, 0x22);
	OK(pair_do(&p.b, "status", named(), &r));
	const json_t *vol =
	    json_array_get(json_object_get(json_array_get(json_object_get(r, "groups"), 0), "volumes"), 0);
	cr_assert_eq(json_integer_value(json_object_get(vol, "active_bytes")), 0);
	cr_assert_eq(json_integer_value(json_object_get(vol, "hidden_bytes")), 0);
	json_decref(r);
}

Test(replication, failover_goes_back_and_keeps_own_writes)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	is(&p.b, HALF, HALF, 0x11);
	OK(pair_write(&p.b, "vm", 0, HALF, 0x33));
	is(&p.b, 0, HALF, 0x33);
	OK(failover(NULL));
	OK(pair_wait_state(&p.b, "vm", "DONE"));
	is(&p.b, 0, HALF, 0x33);
	is(&p.b, HALF, HALF, 0x11); /* a block that only the primary changed since the checkpoint goes back */
	OK(pair_disk_is(&p.b, "vm", 0, HALF, 0x33));
	OK(pair_disk_is(&p.b, "vm", HALF, HALF, 0x11));
}

Test(replication, checkpoint_moves_the_view)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	OK(pair_write(&p.b, "vm", 0, HALF, 0x33));
	checkpoint();
	is(&p.b, 0, HALF, 0x11); /* own writes go with the checkpoint */
	is(&p.b, HALF, HALF, 0x22);
}

Test(replication, continuous)
{
	for (uint8_t round = 1; round <= 20; round++) {
		OK(pair_write(&p.a, "vm", HALF, HALF, (uint8_t)(0x40 + round)));
		settle();
		is(&p.b, HALF, HALF, round == 1 ? 0x11 : (uint8_t)(0x40 + round - 1));
		OK(pair_write(&p.b, "vm", 0, HALF, (uint8_t)(0x80 + round)));
		is(&p.b, 0, HALF, (uint8_t)(0x80 + round));
		checkpoint();
		is(&p.b, 0, HALF, 0x11);
		is(&p.b, HALF, HALF, (uint8_t)(0x40 + round));
	}
}

Test(replication, secondary_error_is_clean_in_sync)
{
	json_t *r = NULL;
	OK(pair_do(&p.b, "error", named(), &r));
	cr_assert(json_is_true(json_object_get(r, "clean")));
	json_decref(r);
}

/* ---- what that test lacks ---- */

Test(replication, failover_to_latest_keeps_all_received)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	OK(failover("latest"));
	is(&p.b, 0, HALF, 0x11);
	is(&p.b, HALF, HALF, 0x22);
	OK(failover("latest")); /* the same again is success */
	cr_assert_eq(pair_do(&p.b, "failover", json_pack("{s:s, s:i}", "name", "vm", "to", 1), NULL), -ERR_STATE);
}

Test(replication, latest_is_refused_over_own_writes)
{
	OK(pair_write(&p.b, "vm", 0, 4096, 0x33));
	cr_assert_eq(failover("latest"), -ERR_STATE);
	cr_assert(strstr(p.b.err.text, "--discard-active"), "%s", p.b.err.text);
	is(&p.b, 0, 4096, 0x33);
	json_t *args = json_pack("{s:s, s:s, s:b}", "name", "vm", "to", "latest", "discard_active", 1);
	OK(pair_do(&p.b, "failover", args, NULL));
	is(&p.b, 0, SIZE, 0x11);
}

Test(replication, all_received_is_kept_as_a_checkpoint)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	json_t *r = NULL, *args = named();
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.b, "failover", args, &r));
	uint64_t received = (uint64_t)json_integer_value(json_object_get(r, "received_checkpoint"));
	cr_assert_eq(json_integer_value(json_object_get(r, "received_bytes")), (json_int_t)HALF);
	json_decref(r);
	OK(pair_write(&p.b, "vm", 0, SIZE, 0x77)); /* and it does not rot under new writes */
	uint8_t *buf = malloc(SIZE);
	memset(buf, 0xee, SIZE);
	struct gvol *v = gvol_find(p.b.d, "vm");
	OK(gvol_read(v, NULL, GVOL_CKPT, received, 0, SIZE, buf));
	gvol_unref(v);
	for (uint64_t i = 0; i < SIZE; i++)
		cr_assert_eq(buf[i], i < HALF ? 0x11 : 0x22, "byte %lu", (unsigned long)i);
	free(buf);
	is(&p.b, 0, SIZE, 0x77);
}

Test(replication, a_failed_commit_serves_and_is_retried)
{
	OK(pair_write(&p.a, "vm", HALF, HALF, 0x22));
	settle();
	char path[128];
	(void)snprintf(path, sizeof(path), "volumes/vm/undo-%ld.data", (long)pair_status_int(&p.b, "vm", "checkpoint"));
	OK(pair_flip(&p.b, path, HALF + 5)); /* the saved block does not check out */
	OK(pair_do(&p.b, "failover", named(), NULL));
	OK(pair_wait_state(&p.b, "vm", "FAILOVER_FAILED"));
	json_t *r = NULL;
	OK(pair_do(&p.b, "error", named(), &r));
	cr_assert_str_eq(json_string_value(json_object_get(json_object_get(r, "error"), "operation")), "commit");
	json_decref(r);
	OK(pair_write(&p.b, "vm", 0, 4096, 0x44)); /* writes in FAILOVER_FAILED go to active */
	is(&p.b, 0, 4096, 0x44);
	OK(pair_disk_is(&p.b, "vm", 0, 4096, 0x11));
	OK(pair_flip(&p.b, path, HALF + 5));
	OK(failover(NULL));
	OK(pair_wait_state(&p.b, "vm", "DONE"));
	is(&p.b, 0, 4096, 0x44);
	is(&p.b, 4096, SIZE - 4096, 0x11);
	OK(pair_disk_is(&p.b, "vm", 0, 4096, 0x44));
	OK(pair_disk_is(&p.b, "vm", 4096, SIZE - 4096, 0x11));
}

Test(replication, double_start_and_wrong_role)
{
	cr_assert_eq(pair_do(&p.a, "start", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.b, "start", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.a, "failover", named(), NULL), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "run it on the peer"), "%s", p.a.err.text);
	cr_assert_eq(pair_protect(&p, "vm"), -ERR_STATE);
	cr_assert_eq(pair_do(&p.b, "protect", json_pack("{s:s, s:s}", "name", "vm", "peer", p.addr), NULL), -ERR_STATE);
	cr_assert_eq(pair_do(&p.a, "delete", named(), NULL), -ERR_STATE);
	cr_assert_eq(pair_create(&p.a, "vm2", "vm", SIZE), -ERR_STATE);
	is(&p.a, 0, SIZE, 0x11);
	is(&p.b, 0, SIZE, 0x11);
}

Test(primary, sizes_that_differ_are_refused)
{
	OK(pair_create(&p.b, "vm", "vm", SIZE * 2));
	cr_assert_eq(pair_protect(&p, "vm"), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "bytes here"), "%s", p.a.err.text);
	char role[32];
	pair_status(&p.a, "vm", "role", role, sizeof(role));
	cr_assert_str_eq(role, "standalone", "nothing has changed");
}

Test(primary, a_written_volume_of_the_peer_is_not_taken_without_asking)
{
	OK(pair_create(&p.b, "vm", "vm", SIZE));
	OK(pair_write(&p.b, "vm", 0, 4096, 0x99));
	cr_assert_eq(pair_protect(&p, "vm"), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "--adopt"), "%s", p.a.err.text);
	is(&p.b, 0, 4096, 0x99);
}

/* Two windows' worth of hashes, of which one region differs: that is sent, and found out before SYNCED is said. */
Test(primary, a_resync_that_compares_hashes_sends_what_differs, .timeout = 300)
{
	enum { BIG = 64 << 20, AT = 37 << 20 };
	for (int i = 0; i < 2; i++) {
		struct pair_host *h = i ? &p.b : &p.a;
		OK(pair_create(h, "big", "big", BIG));
		for (uint64_t off = 0; off < BIG; off += 1 << 20)
			OK(pair_write(h, "big", off, 1 << 20, 0x11));
	}
	OK(pair_write(&p.b, "big", AT, 4096, 0x99));
	OK(pair_do(&p.a, "protect",
		   json_pack("{s:s, s:s, s:b, s:b}", "name", "big", "peer", p.addr, "adopt", 1, "hash", 1), NULL));
	OK(pair_wait_link(&p.a, "big", "SYNCED"));
	OK(pair_wait_link(&p.b, "big", "SYNCED"));
	OK(pair_disk_is(&p.b, "big", 0, BIG, 0x11));
}

Test(primary, peer_unreachable)
{
	pair_host_stop(&p.b);
	cr_assert_eq(pair_protect(&p, "vm"), -ERR_PEER);
	OK(pair_write(&p.a, "vm", 0, 4096, 0x12));
	is(&p.a, 0, 4096, 0x12);
}

Test(replication, sub_block_and_block_crossing_overlaps)
{
	static const struct {
		uint64_t off, len;
	} w[] = {{512, 512},   {0, 513},     {4095, 2},	    {4096 - 512, 1024},
		 {8191, 4098}, {100, 50000}, {SIZE - 1, 1}, {HALF - 3, 7}};
	uint8_t *model = malloc(SIZE), *buf = malloc(SIZE);
	memset(model, 0x11, SIZE);
	for (unsigned i = 0; i < sizeof(w) / sizeof(w[0]); i++) {
		OK(pair_write(&p.a, "vm", w[i].off, w[i].len, (uint8_t)(0x50 + i)));
		memset(model + w[i].off, (int)(0x50 + i), w[i].len);
		OK(pair_write(&p.b, "vm", w[i].off, w[i].len, (uint8_t)(0xa0 + i)));
	}
	settle();
	/* the view: own bytes over the checkpoint's, completed from the checkpoint within a block */
	memset(buf, 0xee, SIZE);
	OK(pair_read(&p.b, "vm", 0, SIZE, buf));
	uint8_t *view = malloc(SIZE);
	memset(view, 0x11, SIZE);
	for (unsigned i = 0; i < sizeof(w) / sizeof(w[0]); i++)
		memset(view + w[i].off, (int)(0xa0 + i), w[i].len);
	cr_assert_arr_eq(buf, view, SIZE);
	checkpoint();
	memset(buf, 0xee, SIZE);
	OK(pair_read(&p.b, "vm", 0, SIZE, buf));
	cr_assert_arr_eq(buf, model, SIZE);
	free(view);
	free(model);
	free(buf);
}

Test(replication, a_primarys_write_over_blocks_in_active_and_twice_over_a_saved_one)
{
	OK(pair_write(&p.b, "vm", 0, 8192, 0x33));
	OK(pair_write(&p.a, "vm", 4096, 8192, 0x22));
	OK(pair_write(&p.a, "vm", 4096, 8192, 0x23)); /* first save wins: the checkpoint's 0x11 stays */
	settle();
	is(&p.b, 0, 8192, 0x33);
	is(&p.b, 8192, SIZE - 8192, 0x11);
	OK(failover(NULL));
	is(&p.b, 0, 8192, 0x33);
	is(&p.b, 8192, SIZE - 8192, 0x11);
	OK(pair_disk_is(&p.b, "vm", 0, 8192, 0x33));
	OK(pair_disk_is(&p.b, "vm", 8192, SIZE - 8192, 0x11));
}

Test(replication, io_during_the_commit)
{
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x22));
	settle();
	OK(pair_do(&p.b, "failover", named(), NULL));
	/* Whether the commit is still under way or not, what is written now wins and what is read is right. */
	for (uint64_t off = 0; off < SIZE; off += 64 << 10) {
		is(&p.b, off, 64 << 10, 0x11);
		OK(pair_write(&p.b, "vm", off + 512, 4096, 0x66));
		is(&p.b, off + 512, 4096, 0x66);
	}
	OK(pair_wait_state(&p.b, "vm", "DONE"));
	for (uint64_t off = 0; off < SIZE; off += 64 << 10) {
		OK(pair_disk_is(&p.b, "vm", off, 512, 0x11));
		OK(pair_disk_is(&p.b, "vm", off + 512, 4096, 0x66));
		OK(pair_disk_is(&p.b, "vm", off + 512 + 4096, (64 << 10) - 512 - 4096, 0x11));
	}
}

Test(replication, zeroes_and_discards_reach_the_peer)
{
	struct gvol *v = gvol_find(p.a.d, "vm");
	OK(gvol_zero(v, NULL, 1000, 70000, false));
	OK(gvol_zero(v, NULL, HALF + 1, HALF - 1, true));
	gvol_unref(v);
	settle();
	is(&p.b, 0, SIZE, 0x11);
	OK(pair_disk_is(&p.b, "vm", 1000, 70000, 0));
	checkpoint();
	is(&p.b, 0, 1000, 0x11);
	is(&p.b, 1000, 70000, 0);
	is(&p.b, 71000, HALF + 1 - 71000, 0x11);
	is(&p.b, HALF + 1, HALF - 1, 0);
}

Test(replication, stop_and_start_again)
{
	OK(pair_do(&p.a, "stop", named(), NULL));
	OK(pair_write(&p.a, "vm", 0, 4096, 0x55)); /* recorded as dirty */
	OK(pair_do(&p.a, "start", named(), NULL));
	OK(pair_do(&p.a, "wait", json_pack("{s:s, s:s, s:i}", "name", "vm", "for", "in-sync", "timeout_ms", 60000),
		   NULL));
	OK(pair_wait_state(&p.b, "vm", "RUNNING"));
	is(&p.b, 0, 4096, 0x55);
	is(&p.b, 4096, SIZE - 4096, 0x11);
}

Test(replication, a_secondary_that_wrote_after_a_stop_is_a_split_brain)
{
	OK(pair_do(&p.a, "stop", named(), NULL));
	OK(pair_wait_state(&p.b, "vm", "DONE"));
	OK(pair_write(&p.b, "vm", 0, 4096, 0x66));
	cr_assert_eq(pair_do(&p.a, "start", named(), NULL), -ERR_SPLIT);
	cr_assert_eq(pair_status_int(&p.a, "vm", "split_brain"), 1);
	is(&p.a, 0, 4096, 0x11);
	is(&p.b, 0, 4096, 0x66);
}

Test(replication, clean_restarts_reconnect_by_themselves)
{
	for (int round = 0; round < 3; round++) {
		struct pair_host *h = round % 2 ? &p.a : &p.b;
		pair_host_stop(h);
		if (h == &p.b)
			OK(pair_write(&p.a, "vm", 4096, 4096, (uint8_t)(0x60 + round)));
		OK(pair_host_start(&p, h));
		OK(pair_wait_link(&p.a, "vm", "SYNCED"));
		OK(pair_do(&p.a, "wait",
			   json_pack("{s:s, s:s, s:i}", "name", "vm", "for", "in-sync", "timeout_ms", 60000), NULL));
		checkpoint();
		is(&p.b, 0, 4096, 0x11);
		is(&p.b, 4096, 4096, round == 0 ? 0x60 : round == 1 ? 0x60 : 0x62);
	}
}

Test(replication, the_old_primary_steps_down)
{
	OK(failover(NULL));
	OK(pair_wait_state(&p.a, "vm", "NONE"));
	char role[32];
	pair_status(&p.a, "vm", "role", role, sizeof(role));
	cr_assert_str_eq(role, "secondary");
	cr_assert_eq(pair_write(&p.a, "vm", 0, 4096, 0x12), -ERR_IO);
	is(&p.b, 0, SIZE, 0x11);
}

Test(replication, both_wrote_alone_is_a_split_brain_on_both)
{
	OK(pair_do(&p.b, "failover", named(), NULL));
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	if (pair_write(&p.a, "vm", 0, 4096, 0x21) != 0)
		return; /* it had heard of the failover before it could write */
	OK(pair_host_start(&p, &p.b));
	/* Each host records it by itself. */
	for (int i = 0; i < 6000 && (pair_status_int(&p.a, "vm", "split_brain") != 1 ||
				     pair_status_int(&p.b, "vm", "split_brain") != 1);
	     i++)
		(void)nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	cr_assert_eq(pair_status_int(&p.a, "vm", "split_brain"), 1);
	cr_assert_eq(pair_status_int(&p.b, "vm", "split_brain"), 1);
	is(&p.a, 0, 4096, 0x21);
	is(&p.b, 0, 4096, 0x11);
}
