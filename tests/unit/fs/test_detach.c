/* Local disk errors on the primary, over two real daemons (tests/lib/pair.h) and a storage that fails when told to. */
#include <criterion/criterion.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/os/clock.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(4) << 20)
static struct faults fa, fb;

/* Everything 0x11, in sync, no automatic checkpoints. `match` names the files that fail. */
static void begin(const char *match)
{
	fa.match = match;
	fb.match = "/disk.raw";
	OK(pair_open_with(&p, &fa, &fb));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	protect();
}

static void setup(void)
{
	begin("/disk.raw");
}

/* As a guest does: at most 1 MiB a request. */
static int write_all(struct pair_host *h, uint64_t off, uint64_t len, uint8_t byte)
{
	int err = 0;
	for (uint64_t n; len && !err; off += n, len -= n) {
		n = len < (1 << 20) ? len : 1 << 20;
		err = pair_write(h, "vm", off, n, byte);
	}
	return err;
}

TestSuite(detach, .init = setup, .fini = teardown);

static bool detached(void)
{
	json_t *all = daemon_status(p.a.d, "vm");
	json_t *g = json_array_get(json_object_get(all, "groups"), 0);
	bool yes = json_is_true(json_object_get(json_array_get(json_object_get(g, "volumes"), 0), "detached"));
	json_decref(all);
	return yes;
}

static void mend(struct faults *f)
{
	atomic_store(&f->write, 0);
	atomic_store(&f->read, 0);
	atomic_store(&f->sync, 0);
}

static void resync(void)
{
	OK(pair_do(&p.a, "resync", named(), NULL));
	in_sync();
	cr_assert_not(detached());
}

/* Both disks hold `want` bytes, past the daemons. */
static void disks_are(uint64_t off, uint64_t len, uint8_t want)
{
	OK(flush(&p.a));
	OK(pair_disk_is(&p.a, "vm", off, len, want));
	OK(pair_disk_is(&p.b, "vm", off, len, want));
}

Test(detach, a_failed_write_goes_to_the_peer_and_so_do_all_later_ones)
{
	char health[32];
	atomic_store(&fa.write, -ERR_IO);
	OK(pair_write(&p.a, "vm", 65536, 4096, 0x22));
	cr_assert(detached());
	OK(pair_disk_is(&p.b, "vm", 65536, 4096, 0x22)); /* as under C: it is there already */
	unsigned failed = atomic_load(&fa.failed);
	OK(pair_write(&p.a, "vm", 1 << 20, 1 << 20, 0x33));
	cr_assert_eq(atomic_load(&fa.failed), failed, "the local disk is not touched again");
	OK(pair_is(&p.a, "vm", 65536, 4096, 0x22));
	OK(pair_is(&p.a, "vm", 1 << 20, 1 << 20, 0x33));
	OK(pair_is(&p.a, "vm", 0, 65536, 0x11));
	OK(pair_is(&p.a, "vm", 2 << 20, 2 << 20, 0x11));
	OK(flush(&p.a));
	pair_status(&p.a, "vm", "health", health, sizeof(health));
	cr_assert_str_eq(health, "degraded");
	cr_assert_eq(pair_do(&p.a, "stop", named(), NULL), -ERR_STATE);
}

Test(detach, a_failed_read_is_served_by_the_peer)
{
	atomic_store(&fa.read, -ERR_IO);
	OK(pair_is(&p.a, "vm", 12345, 100000, 0x11));
	cr_assert(detached());
}

Test(detach, a_failed_fsync_detaches_and_is_honoured_by_the_peer)
{
	OK(pair_write(&p.a, "vm", 0, 8192, 0x44));
	atomic_store(&fa.sync_once, -ERR_IO);
	OK(flush(&p.a));
	cr_assert(detached());
	OK(pair_disk_is(&p.b, "vm", 0, 8192, 0x44));
	OK(flush(&p.a));
}

/* What the disk had not synced goes with the system's cache: a backup of it would be anything that it ever held. */
Test(detach, a_backup_under_way_fails)
{
	char target[256];
	json_t *r = NULL, *args;
	snprintf(target, sizeof(target), "%s/x.raw", p.dir);
	args = json_pack("{s:s, s:s, s:s, s:i, s:b}", "name", "vm", "target", target, "sync", "full", "speed", 1 << 16,
			 "detach", true);
	OK(pair_do(&p.a, "backup", args, &r));
	json_int_t id = json_integer_value(json_object_get(r, "id"));
	json_decref(r);
	atomic_store(&fa.write, -ERR_IO);
	OK(pair_write(&p.a, "vm", 65536, 4096, 0x22));
	cr_assert(detached());
	args = json_pack("{s:s, s:I, s:i}", "op", "wait", "id", id, "timeout_ms", 60000);
	cr_assert_eq(pair_do(&p.a, "job", args, NULL), -ERR_IO);
	cr_assert_eq(access(target, F_OK), -1);
}

Test(detach, everything_is_at_the_peer_when_it_fails_over)
{
	atomic_store(&fa.write, -ERR_NOSPC);
	OK(pair_write(&p.a, "vm", 0, 4096, 0x22));
	OK(pair_do(&p.a, "checkpoint", named(), NULL));
	OK(pair_write(&p.a, "vm", 4096, 4096, 0x33));
	OK(flush(&p.a));
	json_t *args = named();
	json_object_set_new(args, "to", json_string("latest"));
	OK(pair_do(&p.b, "failover", args, NULL));
	OK(pair_is(&p.b, "vm", 0, 4096, 0x22));
	OK(pair_is(&p.b, "vm", 4096, 4096, 0x33));
	/* its old primary is behind and knows it */
	OK(pair_wait_state(&p.a, "vm", "NONE"));
	cr_assert_eq(pair_is(&p.a, "vm", 0, 4096, 0x22), -ERR_IO);
}

Test(detach, a_lost_peer_is_an_error_and_its_return_ends_it)
{
	set("peer_timeout", "1s");
	atomic_store(&fa.write, -ERR_IO);
	OK(pair_write(&p.a, "vm", 0, 4096, 0x22));
	pair_host_stop(&p.b);
	uint64_t since = clock_mono_ns();
	cr_assert_eq(pair_write(&p.a, "vm", 0, 4096, 0x55), -ERR_IO);
	cr_assert_eq(pair_is(&p.a, "vm", 0, 4096, 0x22), -ERR_IO);
	cr_assert_eq(flush(&p.a), -ERR_IO);
	cr_assert_lt(clock_mono_ns() - since, 30 * NS_PER_SEC);
	OK(pair_host_start(&p, &p.b));
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	cr_assert(detached());
	OK(pair_is(&p.a, "vm", 0, 4096, 0x22));
	OK(pair_write(&p.a, "vm", 0, 4096, 0x66));
	OK(pair_is(&p.a, "vm", 0, 4096, 0x66));
}

Test(detach, it_stays_over_a_restart_of_the_primary)
{
	atomic_store(&fa.write, -ERR_IO);
	OK(pair_write(&p.a, "vm", 0, 4096, 0x22));
	OK(pair_write(&p.a, "vm", 1 << 20, 4096, 0x23));
	pair_host_stop(&p.a);
	mend(&fa);
	OK(pair_host_start(&p, &p.a));
	OK(pair_is(&p.a, "vm", 0, 4096, 0x22)); /* waits for the handshake, as any restarted primary */
	cr_assert(detached());
	OK(pair_is(&p.a, "vm", 1 << 20, 4096, 0x23));
	OK(pair_write(&p.a, "vm", 2 << 20, 4096, 0x24));
	OK(pair_disk_is(&p.b, "vm", 2 << 20, 4096, 0x24));
	OK(pair_disk_is(&p.a, "vm", 2 << 20, 4096, 0x11));
	cr_assert_eq(pair_status_int(&p.a, "vm", "dirty_bytes"), 0);
	resync();
	disks_are(0, 4096, 0x22);
	disks_are(1 << 20, 4096, 0x23);
	disks_are(2 << 20, 4096, 0x24);
}

Test(detach, without_its_peer_a_restarted_primary_serves_nothing_of_it)
{
	set("peer_timeout", "1s");
	atomic_store(&fa.write, -ERR_IO);
	OK(pair_write(&p.a, "vm", 0, 4096, 0x22));
	pair_host_stop(&p.b);
	pair_host_stop(&p.a);
	mend(&fa);
	OK(pair_host_start(&p, &p.a));
	cr_assert_eq(pair_is(&p.a, "vm", 0, 4096, 0x11), -ERR_IO, "a stale disk passes for current");
	cr_assert_eq(pair_write(&p.a, "vm", 0, 4096, 0x77), -ERR_IO);
	OK(pair_host_start(&p, &p.b));
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	OK(pair_is(&p.a, "vm", 0, 4096, 0x22));
}

static bool rebuild_failed(void)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "error", named(), &r));
	const char *op = json_string_value(json_object_get(json_object_get(r, "error"), "operation"));
	bool yes = op && strcmp(op, "resync") == 0;
	json_decref(r);
	return yes;
}

Test(detach, resync_brings_the_disk_back_under_writes)
{
	atomic_store(&fa.write, -ERR_IO);
	OK(write_all(&p.a, 0, 3 << 20, 0x22));
	OK(pair_do(&p.a, "checkpoint", named(), NULL));
	/* it fails still: nothing is gained, nothing lost, and who waits for it hears of it */
	OK(pair_do(&p.a, "resync", named(), NULL));
	const uint64_t end = clock_mono_ns() + 60 * NS_PER_SEC;
	for (; !rebuild_failed(); (void)poll(NULL, 0, 5)) {
		OK(pair_write(&p.a, "vm", 100, 5000, 0x25));
		cr_assert_lt(clock_mono_ns(), end, "the failed rebuild is not to be seen");
	}
	cr_assert(detached());
	OK(pair_write(&p.a, "vm", 100, 5000, 0x25));
	json_t *args = json_pack("{s:s, s:b, s:i}", "name", "vm", "wait", 1, "timeout_ms", 60000);
	cr_assert_eq(pair_do(&p.a, "resync", args, NULL), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "rebuilding the disk of vm failed"), "%s", p.a.err.text);
	mend(&fa);
	OK(pair_do(&p.a, "resync", named(), NULL));
	for (unsigned i = 0; i < 200; i++)
		OK(pair_write(&p.a, "vm", (uint64_t)i * 20000, 20000, (uint8_t)(0x30 + i % 7)));
	in_sync();
	cr_assert_not(detached());
	for (unsigned i = 0; i < 200; i++)
		disks_are((uint64_t)i * 20000, 20000, (uint8_t)(0x30 + i % 7));
	disks_are(4000000, SIZE - 4000000, 0x11);
	/* an ordinary pair again */
	OK(pair_write(&p.a, "vm", 0, 4096, 0x77));
	disks_are(0, 4096, 0x77);
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.a));
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	cr_assert_not(detached());
	OK(pair_is(&p.a, "vm", 0, 4096, 0x77));
	OK(pair_do(&p.a, "stop", named(), NULL));
}

/* The whole store fails, as a lost medium does: the record cannot be saved here. The peer's tells, after the restart.
 */
Test(detach, the_peer_tells_a_primary_whose_record_could_not_be_saved, .init = NULL)
{
	begin("/");
	atomic_store(&fa.write, -ERR_IO);
	atomic_store(&fa.sync, -ERR_IO);
	OK(pair_write(&p.a, "vm", 65536, 4096, 0x22));
	OK(flush(&p.a));
	OK(pair_is(&p.a, "vm", 65536, 4096, 0x22));
	pair_host_stop(&p.a);
	mend(&fa);
	OK(pair_host_start(&p, &p.a));
	OK(pair_is(&p.a, "vm", 65536, 4096, 0x22));
	cr_assert(detached());
	resync();
	disks_are(65536, 4096, 0x22);
}

Test(detach, a_rebuild_goes_on_after_a_restart)
{
	atomic_store(&fa.write, -ERR_IO);
	OK(write_all(&p.a, 0, SIZE, 0x22));
	mend(&fa);
	set("resync_rate", "512K");
	OK(pair_do(&p.a, "resync", named(), NULL));
	OK(pair_write(&p.a, "vm", 3 << 20, 4096, 0x33));
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.a));
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	cr_assert(detached());
	set("resync_rate", "0");
	OK(pair_do(&p.a, "wait", json_pack("{s:s, s:s, s:i}", "name", "vm", "for", "in-sync", "timeout_ms", 20000),
		   NULL));
	cr_assert_not(detached());
	disks_are(0, 3 << 20, 0x22);
	disks_are(3 << 20, 4096, 0x33);
	disks_are((3 << 20) + 4096, SIZE - (3 << 20) - 4096, 0x22);
}

Test(detach, pass_answers_the_error_and_syncs_the_range_again)
{
	set("on_io_error", "pass");
	atomic_store(&fa.write, -ERR_IO);
	cr_assert_eq(pair_write(&p.a, "vm", 65536, 8192, 0x22), -ERR_IO);
	cr_assert_not(detached());
	mend(&fa);
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	in_sync();
	/* the half that was written is on both */
	disks_are(65536, 4096, 0x22);
	disks_are(65536 + 4096, 4096, 0x11);
}

/* The peer lacks the region at 64 KiB and holds the rest; the disk here can neither be read nor written. */
static void dead_disk(void)
{
	atomic_store(&fa.read, -ERR_IO);
	atomic_store(&fa.write, -ERR_IO);
}

static bool peer_says(const char *text)
{
	json_t *all = daemon_status(p.b.d, "vm");
	const json_t *g = json_array_get(json_object_get(all, "groups"), 0);
	const char *have = json_string_value(json_object_get(json_object_get(g, "error"), "text"));
	bool yes = have && strcmp(have, text) == 0;
	json_decref(all);
	return yes;
}

static void dead_disk_is_seen(void)
{
	OK(pair_is(&p.a, "vm", 0, 65536, 0x11));
	OK(pair_is(&p.a, "vm", 131072, 131072, 0x11));
	cr_assert_eq(pair_is(&p.a, "vm", 65536, 65536, 0x22), -ERR_IO);
	cr_assert_eq(pair_is(&p.a, "vm", 61440, 8192, 0x22), -ERR_IO, "a part of it is not there");
	cr_assert_eq(pair_write(&p.a, "vm", 2 << 20, 4096, 0x33), -ERR_IO);
	cr_assert_eq(pair_is(&p.a, "vm", 2 << 20, 4096, 0x33), -ERR_IO, "what it holds now only this disk knows");
	cr_assert_not(detached());
}

/* Mended, it is still what the peer is synced from. */
static void mended_disk_is_the_source(void)
{
	mend(&fa);
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	disks_are(0, 65536, 0x11);
	disks_are(65536, 65536, 0x22);
	OK(pair_write(&p.a, "vm", 2 << 20, 4096, 0x33));
	disks_are(2 << 20, 4096, 0x33);
	disks_are((2 << 20) + 4096, 65536, 0x11);
}

Test(detach, in_a_resync_a_failed_read_is_the_peers_where_it_has_the_range)
{
	wait_clean();
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	OK(pair_write(&p.a, "vm", 65536, 65536, 0x22));
	dead_disk();
	OK(pair_host_start(&p, &p.b));
	OK(pair_wait_link(&p.a, "vm", "RESYNC"));
	dead_disk_is_seen();
	mended_disk_is_the_source();
}

Test(detach, while_paused_a_failed_read_is_the_peers_where_it_has_the_range)
{
	wait_clean();
	OK(pair_do(&p.a, "pause", named(), NULL));
	OK(pair_write(&p.a, "vm", 65536, 65536, 0x22));
	dead_disk();
	dead_disk_is_seen();
	/* What the peer is told is of the write, whatever failed before. */
	WAIT_FOR(peer_says("on the primary, a local write to vm failed: input/output error"));
	OK(pair_do(&p.a, "resume", named(), NULL));
	dead_disk_is_seen();
	mended_disk_is_the_source();
}

Test(detach, without_a_synced_peer_an_error_is_the_guests)
{
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	atomic_store(&fa.write, -ERR_IO);
	cr_assert_eq(pair_write(&p.a, "vm", 0, 4096, 0x22), -ERR_IO);
	atomic_store(&fa.read, -ERR_IO);
	cr_assert_eq(pair_is(&p.a, "vm", 1 << 20, 4096, 0x11), -ERR_IO);
	cr_assert_not(detached());
}

static int unprotect_by_force(void)
{
	json_t *args = named();
	json_object_set_new(args, "force", json_true());
	return pair_do(&p.a, "unprotect", args, NULL);
}

static int protect_again(bool adopt)
{
	return pair_do(&p.a, "protect",
		       json_pack("{s:s, s:s, s:b, s:b, s:i}", "name", "vm", "peer", p.addr, "adopt", adopt, "wait", 1,
				 "timeout_ms", 20000),
		       NULL);
}

/* What went through the peer is at 1 MiB, and not on the disk here. */
static void write_through_the_peer(void)
{
	atomic_store(&fa.write, -ERR_IO);
	OK(pair_write(&p.a, "vm", 65536, 4096, 0x22));
	OK(pair_write(&p.a, "vm", 1 << 20, 1 << 20, 0x33));
	OK(flush(&p.a));
	cr_assert(detached());
}

static void count_invalidation(void *arg, uint32_t volume)
{
	(void)volume;
	atomic_fetch_add((_Atomic unsigned *)arg, 1);
}

/* The peer is lost for good. */
Test(detach, by_force_the_disk_is_taken_as_it_is)
{
	static _Atomic unsigned invalidated;
	uint8_t block[4096];
	pair_host_stop(&p.a);
	p.a.hooks = (struct daemon_hooks){.invalidate = count_invalidation, .arg = &invalidated};
	OK(pair_host_start(&p, &p.a));
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	write_through_the_peer();
	cr_assert_eq(unprotect_by_force(), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "connected"), "%s", p.a.err.text);
	struct gvol *v = gvol_find(p.a.d, "vm");
	struct gvol_handle *h = NULL;
	bool direct;
	OK(gvol_open(v, true, true, &h, &direct));
	memset(block, 0xaa, sizeof(block));
	OK(gvol_read(v, h, GVOL_VOLUME, 0, 1 << 20, sizeof(block), block));
	cr_assert_eq(block[4095], 0x33);
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	cr_assert_eq(pair_do(&p.a, "unprotect", named(), NULL), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "--force"), "%s", p.a.err.text);
	unsigned before = atomic_load(&invalidated);
	OK(unprotect_by_force());
	cr_assert_not(detached());
	cr_assert_gt(atomic_load(&invalidated), before, "the kernel shows what it had cached");
	/* A guest that goes on does not find itself in the past. */
	cr_assert_eq(gvol_read(v, h, GVOL_VOLUME, 0, 1 << 20, sizeof(block), block), -ERR_IO);
	cr_assert_eq(gvol_write(v, h, 0, sizeof(block), block), -ERR_IO);
	gvol_release(h);
	gvol_unref(v);
	mend(&fa);
	OK(pair_is(&p.a, "vm", 1 << 20, 1 << 20, 0x11));
	OK(pair_write(&p.a, "vm", 0, 65536, 0x44));
	OK(flush(&p.a));
	OK(pair_disk_is(&p.a, "vm", 0, 65536, 0x44));
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.a));
	cr_assert_not(detached());
	OK(pair_is(&p.a, "vm", 0, 65536, 0x44));
}

/* A pinned checkpoint of b's holds `want` bytes there. */
static bool kept_on_b(uint64_t off, uint8_t want)
{
	json_t *r = NULL, *c;
	size_t i;
	unsigned found = 0;
	OK(pair_do(&p.b, "checkpoints", named(), &r));
	struct gvol *v = gvol_find(p.b.d, "vm");
	json_array_foreach(json_object_get(r, "checkpoints"), i, c)
	{
		uint8_t block[4096], wanted[4096];
		memset(block, 0xaa, sizeof(block));
		memset(wanted, want, sizeof(wanted));
		uint64_t number = (uint64_t)json_integer_value(json_object_get(c, "number"));
		OK(gvol_read(v, NULL, GVOL_CKPT, number, off, sizeof(block), block));
		found += json_is_true(json_object_get(c, "pinned")) && memcmp(block, wanted, sizeof(block)) == 0;
	}
	gvol_unref(v);
	json_decref(r);
	return found != 0;
}

/* The peer took over and was unprotected, before this host heard of it: nobody but this command helps. What it holds is
 * not written over but on command, and kept. */
Test(detach, a_survivor_that_forgot_its_old_primary_loses_nothing_to_it)
{
	write_through_the_peer();
	pair_host_stop(&p.a);
	mend(&fa);
	json_t *args = named();
	json_object_set_new(args, "to", json_string("latest"));
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.b, "failover", args, NULL));
	OK(pair_do(&p.b, "unprotect", named(), NULL));
	OK(pair_host_start(&p, &p.a));
	cr_assert_eq(pair_do(&p.a, "unprotect", named(), NULL), -ERR_STATE);
	OK(unprotect_by_force());
	OK(pair_is(&p.a, "vm", 1 << 20, 1 << 20, 0x11));
	cr_assert_eq(protect_again(false), -ERR_STATE);
	OK(pair_is(&p.b, "vm", 65536, 4096, 0x22));
	OK(pair_is(&p.b, "vm", 1 << 20, 1 << 20, 0x33));
	OK(protect_again(true));
	disks_are(1 << 20, 1 << 20, 0x11);
	cr_assert(kept_on_b(1 << 20, 0x33));
}
