/* What hubs and `repctl read|write|report` ask (fs/hub.h), over two real daemons (tests/lib/pair.h): I/O on this host's
 * and on the peer's volumes by what SPEC 5 says of their states, reports, the ids that a hub assigns. The wire from
 * outside is in tests/e2e/test_57_hub.py. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/bytes.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(1) << 20)

static void setup(void)
{
	OK(pair_open(&p));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	OK(pair_create(&p.a, "vm-data", "vm", SIZE));
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	set("peer_timeout", "2s");
}

TestSuite(hub, .init = setup, .fini = teardown, .timeout = 120);

static int hub_read(struct pair_host *h, const char *name, bool remote, uint64_t off, uint64_t len, uint8_t *buf)
{
	json_t *r = NULL;
	int err = pair_do(h, "read",
			  json_pack("{s:s, s:I, s:I, s:b}", "name", name, "offset", (json_int_t)off, "length",
				    (json_int_t)len, "remote", (int)remote),
			  &r);
	if (!err) {
		const json_t *t = json_object_get(r, "data");
		memset(buf, 0xee, len);
		cr_assert_eq(base64_decode(json_string_value(t), json_string_length(t), buf, len), (int64_t)len);
	}
	json_decref(r);
	return err;
}

static int hub_write(struct pair_host *h, const char *name, bool remote, uint64_t off, uint64_t len, uint8_t byte,
		     bool flush)
{
	uint8_t *buf = malloc(len + 1);
	char *text = malloc(BASE64_LEN(len) + 1);
	memset(buf, byte, len + 1);
	base64_encode(buf, len, text);
	int err = pair_do(h, "write",
			  json_pack("{s:s, s:I, s:s, s:b, s:b}", "name", name, "offset", (json_int_t)off, "data", text,
				    "flush", (int)flush, "remote", (int)remote),
			  NULL);
	free(buf);
	free(text);
	return err;
}

/* The bytes of the range, all of them `byte`. */
static void reads(struct pair_host *h, const char *name, bool remote, uint64_t off, uint64_t len, uint8_t byte)
{
	uint8_t *buf = malloc(len);
	OK(hub_read(h, name, remote, off, len, buf));
	for (uint64_t i = 0; i < len; i++)
		cr_assert_eq(buf[i], byte, "byte %llu: %02x, not %02x", (unsigned long long)i, buf[i], byte);
	free(buf);
}

static uint64_t checkpoint(void)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", named(), &r));
	uint64_t n = (uint64_t)json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	return n;
}

Test(hub, reads_and_writes_of_this_host)
{
	reads(&p.a, "vm", false, 0, 512 << 10, 0x11);
	reads(&p.a, "vm-data", false, 12345, 77, 0);
	OK(hub_write(&p.a, "vm", false, 4095, 3, 0x22, false));
	cr_assert_eq(pair_is(&p.a, "vm", 4095, 3, 0x22), 0);
	cr_assert_eq(pair_is(&p.a, "vm", 0, 4095, 0x11), 0);
	cr_assert_eq(pair_is(&p.a, "vm", 4098, 4096, 0x11), 0);
	OK(hub_write(&p.a, "vm", false, SIZE - 1, 1, 0x33, true));
	reads(&p.a, "vm", false, SIZE - 1, 1, 0x33);
	OK(hub_write(&p.a, "vm", false, SIZE, 0, 0, true)); /* a flush alone */
	OK(hub_write(&p.a, "vm", false, 0, 512 << 10, 0x44, true));
	cr_assert_eq(pair_is(&p.a, "vm", 0, 512 << 10, 0x44), 0);
}

Test(hub, what_is_refused_says_why)
{
	uint8_t buf[64];
	static const struct {
		const char *name;
		uint64_t off, len;
		int code;
		const char *says;
	} bad[] = {
	    {"vm", SIZE, 1, -ERR_RANGE, "behind the end of volume vm (1048576 bytes)"},
	    {"vm", SIZE - 1, 2, -ERR_RANGE, "read vm: 2 bytes at 1048575 reach"},
	    {"vm", UINT64_C(1) << 62, 1, -ERR_RANGE, "no volume reaches that far"},
	    {"vm", 0, 0, -ERR_USAGE, "a length from 1"},
	    {"vm", 0, (512 << 10) + 1, -ERR_USAGE, "a length from 1"},
	    {"nope", 0, 1, -ERR_NOENT, "no volume nope"},
	    {"../vm", 0, 1, -ERR_USAGE, "is not a name"},
	};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		cr_assert_eq(hub_read(&p.a, bad[i].name, false, bad[i].off, bad[i].len, buf), bad[i].code, "%u: %s", i,
			     p.a.err.text);
		cr_assert(strstr(p.a.err.text, bad[i].says) != NULL, "%s", p.a.err.text);
	}
	cr_assert_eq(hub_write(&p.a, "vm", false, SIZE - 1, 2, 0x22, false), -ERR_RANGE);
	cr_assert_eq(hub_write(&p.a, "vm", false, 0, 0, 0, false), -ERR_USAGE);
	cr_assert_eq(
	    pair_do(&p.a, "write", json_pack("{s:s, s:i, s:s}", "name", "vm", "offset", 0, "data", "AA=A"), NULL),
	    -ERR_USAGE);
	cr_assert_eq(hub_read(&p.a, "vm", true, 0, 1, buf), -ERR_STATE); /* it has no peer */
	cr_assert_eq(pair_do(&p.a, "report", json_pack("{s:b}", "remote", 1), NULL), -ERR_PEER);
	cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, 0x11), 0);
}

Test(hub, the_peers_view_and_the_peers_disk)
{
	protect();
	uint64_t first = checkpoint();
	/* What the primary wrote since is not on the secondary's view; what is written there is the view's alone. */
	OK(pair_write(&p.a, "vm", 0, 8192, 0x22));
	OK(flush(&p.a));
	reads(&p.a, "vm", true, 0, 8192, 0x11);
	reads(&p.b, "vm", false, 0, 8192, 0x11);
	OK(hub_write(&p.a, "vm", true, 4096, 100, 0x55, true));
	reads(&p.a, "vm", true, 4096, 100, 0x55);
	reads(&p.a, "vm", true, 4196, 1000, 0x11);
	cr_assert_eq(pair_is(&p.b, "vm", 4096, 100, 0x55), 0);
	cr_assert_eq(pair_is(&p.a, "vm", 4096, 4096, 0x22), 0);
	reads(&p.a, "vm-data", true, 0, 4096, 0);
	/* From the secondary: a guest's, on the primary, replicated as any. */
	reads(&p.b, "vm", true, 0, 8192, 0x22);
	OK(hub_write(&p.b, "vm", true, 65536, 4096, 0x66, true));
	cr_assert_eq(pair_is(&p.a, "vm", 65536, 4096, 0x66), 0);
	reads(&p.b, "vm", false, 65536, 4096, 0x11);
	uint64_t next = checkpoint();
	cr_assert_gt(next, first);
	reads(&p.b, "vm", false, 65536, 4096, 0x66);
	reads(&p.b, "vm", false, 0, 8192, 0x22);
	/* Refused there, said here. */
	uint8_t byte;
	cr_assert_eq(hub_read(&p.a, "vm", true, SIZE, 1, &byte), -ERR_RANGE);
	cr_assert(strstr(p.a.err.text, "read vm: the peer: 1 bytes at 1048576 reach behind the end"), "%s",
		  p.a.err.text);
	/* Nobody there. */
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	cr_assert_eq(hub_read(&p.a, "vm", true, 0, 1, &byte), -ERR_PEER);
}

Test(hub, a_volume_that_is_not_served_answers_eio_and_says_its_state)
{
	uint8_t byte;
	json_t *args = named();
	protect();
	OK(pair_do(&p.a, "stop", args, NULL));
	reads(&p.b, "vm", false, 0, 4096, 0x11); /* DONE: the disk */
	WAIT_FOR(pair_do(&p.b, "unprotect", named(), NULL) == 0);
	OK(hub_write(&p.b, "vm", false, 0, 4096, 0x77, true));
	reads(&p.b, "vm", false, 0, 4096, 0x77);
	OK(pair_do(&p.a, "unprotect", named(), NULL));
	/* Shut out: the old primary of a failover is secondary in NONE. */
	args = json_pack("{s:s, s:s, s:b, s:b}", "name", "vm", "peer", p.addr, "adopt", 1, "wait", 1);
	OK(pair_do(&p.a, "protect", args, NULL));
	OK(pair_wait_state(&p.b, "vm", "RUNNING"));
	OK(pair_do(&p.b, "failover", named(), NULL));
	/* A moment before its state is told so it serves as one already. */
	WAIT_FOR(hub_read(&p.a, "vm", false, 0, 1, &byte) == -ERR_IO &&
		 strstr(p.a.err.text, "volume vm (secondary in NONE)"));
	cr_assert_eq(hub_write(&p.a, "vm", false, 0, 1, 0, true), -ERR_IO);
}

static int64_t id_of(const json_t *volumes, const char *name, const char *role)
{
	size_t i;
	json_t *v;
	json_array_foreach(volumes, i, v)
	{
		if (strcmp(json_string_value(json_object_get(v, "name")), name) == 0 &&
		    strcmp(json_string_value(json_object_get(v, "role")), role) == 0)
			return json_integer_value(json_object_get(v, "id"));
	}
	return -1;
}

Test(hub, ids_are_given_while_the_volume_is_open_and_reports_show_them)
{
	struct gvol *v = gvol_find(p.a.d, "vm");
	struct gvol_handle *h = NULL;
	bool direct;
	json_t *r = NULL;
	OK(gvol_open(v, true, true, &h, &direct));
	set("checkpoint_interval", "0");
	json_t *args = json_pack("{s:s, s:s, s:b, s:{s:I}}", "name", "vm", "peer", p.addr, "wait", 1, "ids", "vm-data",
				 (json_int_t)4000000000);
	OK(pair_do(&p.a, "protect", args, NULL));
	uint8_t byte = 0x12;
	OK(gvol_write(v, h, 0, 1, &byte)); /* the handle is as good as before */
	gvol_release(h);
	gvol_unref(v);
	OK(pair_do(&p.a, "report", json_object(), &r));
	cr_assert_eq(id_of(json_object_get(r, "volumes"), "vm-data", "primary"), 4000000000);
	cr_assert_eq(json_array_size(json_object_get(r, "volumes")), 2);
	json_decref(r);
	OK(pair_do(&p.a, "report", json_pack("{s:b}", "remote", 1), &r));
	const json_t *peers = json_object_get(r, "peers");
	cr_assert_eq(json_array_size(peers), 1);
	const json_t *volumes = json_object_get(json_array_get(peers, 0), "volumes");
	cr_assert_eq(id_of(volumes, "vm-data", "secondary"), 4000000000);
	cr_assert_eq(id_of(volumes, "vm", "secondary"), id_of(volumes, "vm", "secondary"));
	json_decref(r);
	r = NULL;
	OK(pair_do(&p.b, "report", json_pack("{s:b}", "remote", 1), &r));
	volumes = json_object_get(json_array_get(json_object_get(r, "peers"), 0), "volumes");
	cr_assert_eq(id_of(volumes, "vm-data", "primary"), 4000000000);
	json_decref(r);
}

Test(hub, ids_that_cannot_be_are_refused_and_nothing_changes)
{
	json_t *r = NULL;
	static const struct {
		const char *name;
		int64_t id;
		int code;
	} bad[] = {{"nope", 7, -ERR_NOENT},
		   {"vm-data", 1, -ERR_USAGE},
		   {"vm", 0, -ERR_USAGE},
		   {"vm", INT64_C(1) << 32, -ERR_USAGE}};
	OK(pair_do(&p.a, "report", json_object(), &r));
	cr_assert_eq(id_of(json_object_get(r, "volumes"), "vm", "standalone"), 1);
	json_decref(r);
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		json_t *args = json_pack("{s:s, s:s, s:{s:I}}", "name", "vm", "peer", p.addr, "ids", bad[i].name,
					 (json_int_t)bad[i].id);
		cr_assert_eq(pair_do(&p.a, "protect", args, NULL), bad[i].code, "%u: %s", i, p.a.err.text);
	}
	OK(pair_do(&p.a, "report", json_object(), &r));
	cr_assert_eq(id_of(json_object_get(r, "volumes"), "vm", "standalone"), 1);
	json_decref(r);
	protect();
	json_t *args = json_pack("{s:s, s:s, s:{s:i}}", "name", "vm", "peer", p.addr, "ids", "vm", 9);
	cr_assert_eq(pair_do(&p.a, "protect", args, NULL), -ERR_STATE);
}

/* Many at once, on both ways, beside guests' writes: each answered, none mixed up. */
Test(hub, many_at_once)
{
	protect();
	for (unsigned round = 0; round < 40; round++) {
		uint64_t off = round * UINT64_C(8192);
		OK(hub_write(&p.b, "vm-data", true, off, 4096, (uint8_t)(round + 1), false));
		OK(hub_write(&p.a, "vm-data", true, off + 4096, 4096, (uint8_t)(round + 101), false));
	}
	for (unsigned round = 0; round < 40; round++) {
		uint64_t off = round * UINT64_C(8192);
		reads(&p.b, "vm-data", true, off, 4096, (uint8_t)(round + 1));
		reads(&p.b, "vm-data", true, off + 4096, 4096, 0);
		reads(&p.a, "vm-data", true, off + 4096, 4096, (uint8_t)(round + 101));
	}
}

static void *set_it(void *arg)
{
	struct err e = {0};
	json_t *r = NULL, *args = json_pack("{s:s, s:{s:s}}", "name", "vm", "settings", "keep_last", "7");
	*(int *)arg = daemon_command(p.a.d, NULL, "set", args, &r, &e);
	json_decref(args);
	json_decref(r);
	return NULL;
}

static json_int_t reconnects(void)
{
	json_t *r = daemon_status(p.a.d, "vm");
	json_int_t n = json_integer_value(json_object_get(
	    json_object_get(json_array_get(json_object_get(r, "groups"), 0), "counters"), "reconnects"));
	json_decref(r);
	return n;
}

/* A connection that has not said yet whose it is, as its host saves a record first, is asked nothing on: the peer would
 * take it for a hub's, and refuse the JOIN. */
Test(hub, nothing_is_asked_before_the_join, .init = NULL)
{
	static struct faults slow = {.match = "groups"};
	pthread_t t;
	int err = 1;
	struct err e = {0};
	json_t *r = NULL, *args = json_pack("{s:b}", "remote", 1);
	OK(pair_open_with(&p, &slow, NULL));
	OK(pair_create(&p.a, "vm", "vm", 1 << 20));
	protect();
	json_int_t before = reconnects();
	atomic_store(&slow.hold, 1);
	cr_assert_eq(pthread_create(&t, NULL, set_it, &err), 0);
	(void)usleep(50000);
	pair_host_stop(&p.b);
	OK(pair_host_start(&p, &p.b));
	OK(pair_wait_link(&p.a, "vm", "HANDSHAKE"));
	int asked = daemon_command(p.a.d, NULL, "report", args, &r, &e);
	json_decref(r);
	json_decref(args);
	atomic_store(&slow.hold, 0);
	(void)pthread_join(t, NULL);
	cr_assert_eq(err, 0);
	OK(pair_wait_link(&p.a, "vm", "SYNCED"));
	cr_assert_eq(asked, -ERR_PEER, "%d: %s", asked, e.text);
	cr_assert_eq(reconnects(), before + 1);
}
