/* verify and its repairs over two real daemons (tests/lib/pair.h): bits are turned over in the files under them. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(8) << 20)
static struct faults fa, fb;

static void setup(void)
{
	fa.match = fb.match = "/disk.raw";
	OK(pair_open_with(&p, &fa, &fb));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	OK(pair_write(&p.a, "vm", 0, 1 << 20, 0x11)); /* behind it a hole, but for the last part */
	OK(pair_write(&p.a, "vm", SIZE - 65536, 65536, 0x12));
	protect();
}

TestSuite(verify, .init = setup, .fini = teardown);

/* Its result, owned; the verify has to end. */
static json_t *verify(const char *repair)
{
	json_t *args = named(), *r = NULL;
	if (repair)
		json_object_set_new(args, "repair", json_string(repair));
	OK(pair_do(&p.a, "verify", args, &r));
	return r;
}

static int64_t number(const json_t *o, const char *key)
{
	const json_t *v = json_object_get(o, key);
	cr_assert(json_is_integer(v), "%s is not a number", key);
	return json_integer_value(v);
}

static void clean(void)
{
	json_t *r = verify(NULL);
	cr_assert(json_is_true(json_object_get(r, "clean")));
	cr_assert_eq(json_array_size(json_object_get(r, "differences")), 0);
	cr_assert_eq(number(r, "bytes"), SIZE);
	json_decref(r);
}

/* Exactly one, and what it says. checkpoint 0: null. */
static void finds(const json_t *r, const char *host, const char *what, int64_t ckpt, const char *problem, uint64_t off,
		  uint64_t len, bool repaired)
{
	json_t *list = json_object_get(r, "differences"), *d = json_array_get(list, 0);
	char *text = json_dumps(r, JSON_INDENT(1));
	cr_assert_eq(json_array_size(list), 1, "%s", text);
	cr_assert_str_eq(json_string_value(json_object_get(d, "host")), host, "%s", text);
	cr_assert_str_eq(json_string_value(json_object_get(d, "what")), what, "%s", text);
	cr_assert_str_eq(json_string_value(json_object_get(d, "volume")), "vm");
	cr_assert_eq(json_integer_value(json_object_get(d, "checkpoint")), ckpt, "%s", text);
	cr_assert_str_eq(json_string_value(json_object_get(d, "problem")), problem, "%s", text);
	cr_assert_eq((uint64_t)number(d, "offset"), off, "%s", text);
	cr_assert_eq((uint64_t)number(d, "length"), len, "%s", text);
	cr_assert_eq(json_is_true(json_object_get(d, "repaired")), repaired, "%s", text);
	cr_assert_eq(json_is_true(json_object_get(r, "clean")), repaired, "%s", text);
	cr_assert_eq((uint64_t)number(r, "wrong_bytes"), len);
	cr_assert_eq((uint64_t)number(r, "repaired_bytes"), repaired ? len : 0);
	free(text);
}

static int64_t checkpoint(void)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", named(), &r));
	int64_t n = number(r, "checkpoint");
	json_decref(r);
	return n;
}

static atomic_bool guest_ends;

static void *guest(void *arg)
{
	(void)arg;
	for (unsigned n = 1; !atomic_load(&guest_ends); n++) {
		uint64_t off = (uint64_t)(n * 7919U) % (SIZE / 4096) * 4096;
		if (pair_write(&p.a, "vm", off, 4096, (uint8_t)(n | 1)) != 0)
			return "failed";
	}
	return NULL;
}

/* Writes, checkpoints and the merges of retention beside it are no differences. */
Test(verify, nothing_differs_while_a_guest_writes)
{
	pthread_t t[2];
	void *failed;
	set("keep_last", "2");
	set("queue_max", "4M");
	for (unsigned i = 0; i < 2; i++)
		cr_assert_eq(pthread_create(&t[i], NULL, guest, NULL), 0);
	for (unsigned i = 0; i < 4; i++) {
		(void)checkpoint();
		clean();
	}
	atomic_store(&guest_ends, true);
	for (unsigned i = 0; i < 2; i++) {
		cr_assert_eq(pthread_join(t[i], &failed), 0);
		cr_assert_null(failed);
	}
	clean();
}

Test(verify, a_byte_of_the_secondarys_disk_is_found_and_repaired_and_the_old_kept)
{
	uint8_t buf[4096], was[4096];
	OK(pair_flip(&p.b, "volumes/vm/disk.raw", 65536 + 17));
	json_t *r = verify(NULL);
	finds(r, "both", "disk", 0, "differs", 65536, 4096, false);
	cr_assert(json_is_null(json_object_get(r, "checkpoint")));
	json_decref(r);
	r = verify("peer");
	finds(r, "both", "disk", 0, "differs", 65536, 4096, true);
	int64_t kept = number(r, "checkpoint");
	json_decref(r);
	clean();
	OK(flush(&p.a));
	OK(pair_disk_is(&p.b, "vm", 0, 1 << 20, 0x11));
	memset(was, 0x11, sizeof(was));
	was[17] ^= 0xff;
	struct gvol *v = gvol_find(p.b.d, "vm");
	memset(buf, 0xee, sizeof(buf));
	OK(gvol_read(v, NULL, GVOL_CKPT, (uint64_t)kept, 65536, sizeof(buf), buf));
	gvol_unref(v);
	cr_assert_arr_eq(buf, was, sizeof(was));
	json_t *list = NULL;
	OK(pair_do(&p.b, "checkpoints", named(), &list));
	json_t *c = json_array_get(json_object_get(list, "checkpoints"),
				   json_array_size(json_object_get(list, "checkpoints")) - 1);
	cr_assert_eq(number(c, "number"), kept);
	cr_assert(json_is_true(json_object_get(c, "pinned")));
	json_decref(list);
}

/* In a hole, where the primary has nothing to read. */
Test(verify, a_byte_in_a_hole_is_found_on_either_host)
{
	OK(pair_flip(&p.b, "volumes/vm/disk.raw", 4 << 20));
	OK(pair_flip(&p.a, "volumes/vm/disk.raw", 5 << 20));
	json_t *r = verify(NULL), *list = json_object_get(r, "differences");
	cr_assert_eq(json_array_size(list), 2);
	cr_assert_eq(number(json_array_get(list, 0), "offset"), 4 << 20);
	cr_assert_eq(number(json_array_get(list, 1), "offset"), 5 << 20);
	json_decref(r);
	json_decref(verify("peer"));
	clean();
	OK(pair_disk_is(&p.b, "vm", 4 << 20, 4096, 0));
	OK(pair_disk_is(&p.a, "vm", 4 << 20, 4096, 0));
}

static unsigned invalidated;

static void on_invalidate(void *arg, uint32_t id)
{
	(void)arg;
	(void)id;
	invalidated++;
}

Test(verify, a_byte_of_the_primarys_disk_comes_back_from_the_peer)
{
	pair_host_stop(&p.a);
	p.a.hooks.invalidate = on_invalidate;
	OK(pair_host_start(&p, &p.a));
	in_sync();
	OK(pair_flip(&p.a, "volumes/vm/disk.raw", 12345));
	json_t *r = verify(NULL);
	finds(r, "both", "disk", 0, "differs", 12288, 4096, false);
	json_decref(r);
	invalidated = 0;
	r = verify("from-peer");
	finds(r, "both", "disk", 0, "differs", 12288, 4096, true);
	cr_assert_gt(number(r, "checkpoint"), 0);
	cr_assert(json_is_null(json_object_get(r, "kept_here")), "a primary without checkpoints keeps nothing");
	json_decref(r);
	cr_assert_gt(invalidated, 0, "pages that the kernel has of the disk are dropped");
	clean();
	OK(pair_is(&p.a, "vm", 0, 1 << 20, 0x11));
	OK(pair_disk_is(&p.a, "vm", 0, 1 << 20, 0x11));
	OK(pair_disk_is(&p.b, "vm", 0, 1 << 20, 0x11));
}

/* The repaired region is dirty until both hosts have it durably: a kill in between leads to a sync. */
Test(verify, what_was_repaired_becomes_clean_again)
{
	OK(pair_flip(&p.b, "volumes/vm/disk.raw", 65536));
	json_decref(verify("peer"));
	WAIT_FOR(pair_status_int(&p.a, "vm", "dirty_bytes") == 0);
}

Test(verify, a_byte_of_an_overlay_is_found_with_its_checkpoint)
{
	char path[64];
	int64_t n = checkpoint();
	OK(pair_write(&p.a, "vm", 32768, 4096, 0x21));
	(void)checkpoint();
	OK(flush(&p.a));
	(void)snprintf(path, sizeof(path), "volumes/vm/undo-%lld.data", (long long)n);
	OK(pair_flip(&p.b, path, 32768 + 5));
	json_t *r = verify(NULL);
	finds(r, "secondary", "overlay", n, "checksum", 32768, 4096, false);
	cr_assert_gt(number(r, "overlay_bytes"), 0);
	json_decref(r);
	r = verify("peer"); /* no other copy of it exists */
	finds(r, "secondary", "overlay", n, "checksum", 32768, 4096, false);
	cr_assert(json_is_null(json_object_get(r, "checkpoint")));
	json_decref(r);
}

Test(verify, the_active_overlay_and_the_primarys_own_chain_are_looked_at_too)
{
	OK(pair_write(&p.b, "vm", 8192, 4096, 0x31)); /* of a guest on the view */
	OK(flush(&p.b));
	json_t *all = daemon_status(p.b.d, "vm");
	json_decref(all);
	char path[64];
	int found = 0;
	for (unsigned id = 1; id < 20 && !found; id++) {
		(void)snprintf(path, sizeof(path), "volumes/vm/active-%u.data", id);
		found = pair_flip(&p.b, path, 8192) == 0;
	}
	cr_assert(found);
	json_t *r = verify(NULL), *d = json_array_get(json_object_get(r, "differences"), 0);
	cr_assert_eq(json_array_size(json_object_get(r, "differences")), 1);
	cr_assert_str_eq(json_string_value(json_object_get(d, "checkpoint")), "active");
	cr_assert_str_eq(json_string_value(json_object_get(d, "host")), "secondary");
	json_decref(r);
	/* With a guest's writes on the view no checkpoint is taken, so nothing is repaired. */
	OK(pair_flip(&p.b, "volumes/vm/disk.raw", 0));
	json_t *args = named();
	json_object_set_new(args, "repair", json_string("peer"));
	cr_assert_eq(pair_do(&p.a, "verify", args, NULL), -ERR_STATE, "%s", p.a.err.text);
	cr_assert(strstr(p.a.err.text, "discard"), "%s", p.a.err.text);
}

Test(verify, what_cannot_be_read_is_named)
{
	atomic_store(&fb.read, -ERR_IO);
	json_t *r = verify("peer"), *list = json_object_get(r, "differences"), *d;
	size_t i;
	cr_assert_not(json_is_true(json_object_get(r, "clean")));
	cr_assert_gt(json_array_size(list), 0);
	json_array_foreach(list, i, d)
	{
		cr_assert_str_eq(json_string_value(json_object_get(d, "host")), "secondary");
		cr_assert_str_eq(json_string_value(json_object_get(d, "problem")), "unreadable");
	}
	cr_assert_eq(number(r, "wrong_bytes"), (1 << 20) + 65536);
	cr_assert_eq(number(r, "repaired_bytes"), 0);
	json_decref(r);
	atomic_store(&fb.read, 0);
	clean();
}

Test(verify, it_ends_with_its_time_and_with_the_peer)
{
	set("resync_rate", "64K");
	json_t *args = json_pack("{s:s, s:i}", "name", "vm", "timeout_ms", 300);
	cr_assert_eq(pair_do(&p.a, "verify", args, NULL), -ERR_TIMEOUT);
	cr_assert(strstr(p.a.err.text, "stopped"), "%s", p.a.err.text);
	set("resync_rate", "0");
	clean(); /* it did not go on */
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	cr_assert_eq(pair_do(&p.a, "verify", named(), NULL), -ERR_PEER);
}

Test(verify, a_secondary_sends_to_the_primary)
{
	cr_assert_eq(pair_do(&p.b, "verify", named(), NULL), -ERR_STATE);
	cr_assert(strstr(p.b.err.text, "primary"), "%s", p.b.err.text);
	json_t *args = named();
	json_object_set_new(args, "repair", json_string("sideways"));
	cr_assert_eq(pair_do(&p.a, "verify", args, NULL), -ERR_USAGE);
}
