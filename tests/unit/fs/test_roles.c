/* Roles and lineage over two real daemons (tests/lib/pair.h): split brain and its end, adoption, unprotect. What a
 * mount, a kill or a second listening host shows is in tests/e2e/test_42_lineage.py. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(1) << 20)
#define PART (UINT64_C(64) << 10)

static const char *const volumes[] = {"vm", "vm-data"};

/* Two volumes of 0x11, protected, in sync, no automatic checkpoints. */
static void setup(void)
{
	OK(pair_open(&p));
	for (int i = 0; i < 2; i++) {
		OK(pair_create(&p.a, volumes[i], "vm", SIZE));
		OK(pair_write(&p.a, volumes[i], 0, SIZE, 0x11));
	}
	set("peer_timeout", "2s");
	protect();
}

TestSuite(roles, .init = setup, .fini = teardown, .timeout = 300);

static bool holds(bool (*fn)(void))
{
	for (int i = 0; i < 6000; i++) {
		if (fn())
			return true;
		(void)nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
	}
	return false;
}

static bool both_split(void)
{
	return pair_status_int(&p.a, "vm", "split_brain") == 1 && pair_status_int(&p.b, "vm", "split_brain") == 1;
}

/* a wrote 0x22 to the first part of each volume, b 0x33 to the second, each alone; both know. */
static void split(void)
{
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	for (int i = 0; i < 2; i++)
		OK(pair_write(&p.a, volumes[i], 0, PART, 0x22));
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.b));
	json_t *args = named();
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.b, "failover", args, NULL));
	for (int i = 0; i < 2; i++)
		OK(pair_write(&p.b, volumes[i], PART, PART, 0x33));
	OK(pair_host_start(&p, &p.a));
	cr_assert(holds(both_split));
}

static void content(struct pair_host *h, uint8_t first, uint8_t second)
{
	for (int i = 0; i < 2; i++) {
		cr_assert_eq(pair_is(h, volumes[i], 0, PART, first), 0, "%s, first part", volumes[i]);
		cr_assert_eq(pair_is(h, volumes[i], PART, PART, second), 0, "%s, second part", volumes[i]);
		cr_assert_eq(pair_is(h, volumes[i], 2 * PART, SIZE - 2 * PART, 0x11), 0, "%s, the rest", volumes[i]);
	}
}

static void checkpoint_content(struct pair_host *h, uint64_t number, uint8_t first, uint8_t second)
{
	uint8_t *buf = malloc(SIZE);
	for (int i = 0; i < 2; i++) {
		struct gvol *v = gvol_find(h->d, volumes[i]);
		memset(buf, 0xee, SIZE);
		OK(gvol_read(v, NULL, GVOL_CKPT, number, 0, SIZE, buf));
		gvol_unref(v);
		for (uint64_t k = 0; k < SIZE; k++)
			cr_assert_eq(buf[k],
				     k < PART	    ? first
				     : k < 2 * PART ? second
						    : 0x11,
				     "%s, byte %lu", volumes[i], (unsigned long)k);
	}
	free(buf);
}

static int resolve(struct pair_host *h, const char *discard, json_t **ret)
{
	json_t *args = named();
	json_object_set_new(args, "discard", json_string(discard));
	return pair_do(h, "resolve", args, ret);
}

static bool a_follows(void)
{
	char link[32], state[32];
	pair_status(&p.b, "vm", "link", link, sizeof(link));
	pair_status(&p.a, "vm", "state", state, sizeof(state));
	return strcmp(link, "SYNCED") == 0 && strcmp(state, "RUNNING") == 0;
}

static bool b_follows(void)
{
	char link[32], state[32];
	pair_status(&p.a, "vm", "link", link, sizeof(link));
	pair_status(&p.b, "vm", "state", state, sizeof(state));
	return strcmp(link, "SYNCED") == 0 && strcmp(state, "RUNNING") == 0;
}

static uint64_t pinned_newest(struct pair_host *h)
{
	json_t *r = NULL;
	uint64_t found = 0;
	size_t i;
	json_t *k;
	OK(pair_do(h, "checkpoints", named(), &r));
	json_array_foreach(json_object_get(r, "checkpoints"), i, k)
	{
		if (json_is_true(json_object_get(k, "pinned")))
			found = (uint64_t)json_integer_value(json_object_get(k, "number"));
	}
	json_decref(r);
	return found;
}

Test(roles, the_loser_that_dials_follows_and_keeps_what_it_had)
{
	split();
	struct gvol *v = gvol_find(p.a.d, "vm");
	struct gvol_handle *h = NULL;
	bool direct;
	uint8_t byte = 0x77;
	OK(gvol_open(v, true, true, &h, &direct));
	OK(gvol_write(v, h, 3 * PART, 1, &byte)); /* it serves until it is given up */
	byte = 0x11;
	OK(gvol_write(v, h, 3 * PART, 1, &byte));
	json_t *r = NULL;
	OK(resolve(&p.a, "local", &r));
	uint64_t kept = (uint64_t)json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	cr_assert_gt(kept, 0);
	cr_assert_eq(gvol_write(v, h, 0, 1, &byte), -ERR_IO, "a handle from before");
	cr_assert(holds(a_follows));
	cr_assert_eq(gvol_write(v, h, 0, 1, &byte), -ERR_IO, "until it is opened again");
	gvol_release(h);
	gvol_unref(v);
	content(&p.b, 0x11, 0x33);
	content(&p.a, 0x11, 0x33);
	checkpoint_content(&p.a, kept, 0x22, 0x11);
	cr_assert_eq(pinned_newest(&p.a), kept);
	/* it does not rot under what comes now */
	for (int i = 0; i < 2; i++)
		OK(pair_write(&p.b, volumes[i], 0, SIZE, 0x99));
	OK(pair_do(&p.b, "checkpoint", named(), NULL));
	checkpoint_content(&p.a, kept, 0x22, 0x11);
	OK(resolve(&p.a, "local", NULL)); /* the same again */
	cr_assert_eq(resolve(&p.a, "peer", NULL), -ERR_STATE);
}

Test(roles, the_survivor_is_given_up_from_either_side)
{
	split();
	json_t *r = NULL;
	OK(resolve(&p.a, "peer", &r));
	cr_assert(json_is_null(json_object_get(r, "checkpoint")));
	json_decref(r);
	cr_assert(holds(b_follows));
	content(&p.a, 0x22, 0x11);
	content(&p.b, 0x22, 0x11);
	checkpoint_content(&p.b, pinned_newest(&p.b), 0x11, 0x33);
	cr_assert_eq(pair_status_int(&p.a, "vm", "split_brain"), -1);
	cr_assert_eq(pair_status_int(&p.b, "vm", "split_brain"), -1);
}

Test(roles, status_says_it_once)
{
	split();
	json_t *r = NULL;
	OK(pair_do(&p.a, "status", named(), &r));
	const json_t *g = json_array_get(json_object_get(r, "groups"), 0);
	cr_assert_eq(json_array_size(json_object_get(g, "reasons")), 1);
	cr_assert_str_eq(json_string_value(json_object_get(g, "health")), "split_brain");
	cr_assert_str_eq(json_string_value(json_object_get(g, "link")), "DOWN");
	cr_assert_str_eq(json_string_value(json_object_get(json_object_get(g, "error"), "code")), "ERR_SPLIT");
	json_decref(r);
}

Test(roles, what_differs_is_told_on_both_sides)
{
	static const struct {
		const char *side;
		uint64_t at;
	} want[2][2] = {{{"local", 0}, {"peer", PART}}, {{"local", PART}, {"peer", 0}}};
	split();
	for (int k = 0; k < 2; k++) {
		struct pair_host *h = k ? &p.b : &p.a;
		json_t *r = NULL;
		for (int i = 0; i < 6000; i++) {
			OK(pair_do(h, "diverged", named(), &r));
			if (!json_is_null(json_object_get(r, "peer")))
				break;
			json_decref(r);
			(void)nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
		}
		for (int s = 0; s < 2; s++) {
			const json_t *side = json_object_get(r, want[k][s].side);
			cr_assert(json_is_string(json_object_get(side, "since")));
			for (int v = 0; v < 2; v++) {
				const json_t *x = json_object_get(
				    json_array_get(json_object_get(side, "volumes"), (size_t)v), "extents");
				bool found = false;
				size_t i;
				json_t *e;
				json_array_foreach(x, i, e)
				{
					uint64_t off = (uint64_t)json_integer_value(json_object_get(e, "offset"));
					uint64_t len = (uint64_t)json_integer_value(json_object_get(e, "length"));
					found = found || (off <= want[k][s].at && want[k][s].at + PART <= off + len);
				}
				cr_assert(found, "host %d, %s, volume %d", k, want[k][s].side, v);
			}
		}
		json_decref(r);
	}
}

Test(roles, a_secondary_that_wrote_after_a_stop_may_win)
{
	OK(pair_do(&p.a, "stop", named(), NULL));
	OK(pair_wait_state(&p.b, "vm", "DONE"));
	for (int i = 0; i < 2; i++)
		OK(pair_write(&p.b, volumes[i], PART, PART, 0x33));
	cr_assert_eq(pair_do(&p.a, "start", named(), NULL), -ERR_SPLIT);
	cr_assert(holds(both_split));
	OK(resolve(&p.b, "peer", NULL));
	cr_assert(holds(a_follows));
	content(&p.b, 0x11, 0x33);
	content(&p.a, 0x11, 0x33);
}

Test(roles, unprotect_in_a_split_brain_forgets_the_other_copy)
{
	split();
	OK(pair_do(&p.a, "unprotect", named(), NULL));
	cr_assert_eq(pair_status_int(&p.a, "vm", "split_brain"), -1);
	content(&p.a, 0x22, 0x11);
	cr_assert_eq(resolve(&p.b, "local", NULL), -ERR_PEER); /* nobody dials any more */
	OK(pair_do(&p.b, "unprotect", named(), NULL));
	content(&p.b, 0x11, 0x33);
	/* what was written in between is in no dirty set: everything travels */
	OK(pair_write(&p.a, "vm", 2 * PART, PART, 0x44));
	OK(pair_write(&p.b, "vm", 3 * PART, PART, 0x55));
	struct gvol *v = gvol_find(p.b.d, "vm");
	struct gvol_handle *h = NULL;
	bool direct;
	OK(gvol_open(v, true, true, &h, &direct));
	json_t *args = json_pack("{s:s, s:s, s:b, s:b, s:i}", "name", "vm", "peer", p.addr, "adopt", 1, "wait", 1,
				 "timeout_ms", 20000);
	cr_assert_eq(pair_do(&p.a, "protect", json_incref(args), NULL), -ERR_STATE, "it is open there");
	gvol_release(h);
	gvol_unref(v);
	OK(pair_do(&p.a, "protect", args, NULL));
	cr_assert_eq(pair_is(&p.b, "vm", 2 * PART, PART, 0x44), 0);
	cr_assert_eq(pair_is(&p.b, "vm", 3 * PART, PART, 0x11), 0);
	cr_assert_eq(pair_is(&p.b, "vm", PART, PART, 0x11), 0);
	cr_assert_eq(pair_is(&p.b, "vm-data", PART, PART, 0x11), 0);
	for (uint64_t i = 0; i < 8; i++) /* its view is written to as any other's */
		OK(pair_write(&p.b, "vm", i * PART, PART, 0x66));
	cr_assert_eq(pair_is(&p.b, "vm", 0, 8 * PART, 0x66), 0);
	cr_assert_eq(pair_is(&p.a, "vm", 2 * PART, PART, 0x44), 0);
}

static atomic_int resolved;

static void *resolve_it(void *arg)
{
	struct err e = {0};
	json_t *result = NULL,
	       *args = json_pack("{s:s, s:s, s:i}", "name", "vm", "discard", "peer", "timeout_ms", 60000);
	(void)arg;
	atomic_store(&resolved, daemon_command(p.b.d, NULL, "resolve", args, &result, &e));
	json_decref(args);
	json_decref(result);
	return NULL;
}

/* The clock, which ends the wait for the peer, is not its any more then. */
Test(roles, a_resolve_that_waits_ends_when_its_group_is_taken_out)
{
	pthread_t t;
	split();
	pair_host_stop(&p.a);
	OK(pair_do(&p.b, "set", json_pack("{s:s, s:{s:s}}", "name", "vm", "settings", "peer_timeout", "60s"), NULL));
	do { /* again where it came while the group was out */
		atomic_store(&resolved, 1);
		cr_assert_eq(pthread_create(&t, NULL, resolve_it, NULL), 0);
		while (atomic_load(&resolved) == 1) { /* nothing tells that it waits */
			OK(pair_create(&p.b, "vm-log", "vm", SIZE));
			OK(pair_do(&p.b, "delete", json_pack("{s:s}", "name", "vm-log"), NULL));
		}
		(void)pthread_join(t, NULL);
	} while (atomic_load(&resolved) == -ERR_NOENT);
	cr_assert_eq(atomic_load(&resolved), -ERR_CANCELED);
	content(&p.b, 0x11, 0x33);
	OK(pair_host_start(&p, &p.a));
}

Test(roles, a_survivor_that_is_open_is_not_adopted)
{
	pair_host_stop(&p.a);
	json_t *args = named();
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.b, "failover", args, NULL));
	OK(pair_host_start(&p, &p.a));
	struct gvol *v = gvol_find(p.b.d, "vm");
	struct gvol_handle *h = NULL;
	bool direct;
	OK(gvol_open(v, true, true, &h, &direct));
	OK(pair_wait_state(&p.a, "vm", "NONE")); /* a connects all the same: it has to hear of the failover */
	OK(pair_do(&p.a, "unprotect", named(), NULL));
	cr_assert_eq(
	    pair_do(&p.a, "protect", json_pack("{s:s, s:s, s:b}", "name", "vm", "peer", p.addr, "adopt", 1), NULL),
	    -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "open"), "%s", p.a.err.text);
	gvol_release(h);
	gvol_unref(v);
}
