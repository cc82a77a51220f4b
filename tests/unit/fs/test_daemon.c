/* The threads' side of the daemon: what waits for what, and that ends come in bounded time. Over two daemons in one
 * process (tests/lib/pair.h). */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/os/clock.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(1) << 20)
/* An end that waits for nothing but goodbyes; far below any time-out of the network. */
#define QUICK_NS (1500 * NS_PER_MS)

static void setup(void)
{
	OK(pair_open(&p));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
}

TestSuite(daemon, .init = setup, .fini = teardown, .timeout = 300);

/* ---- verbs ---- */

Test(daemon, protect_takes_the_ids_that_a_hub_assigns)
{
	OK(pair_do(&p.a, "protect",
		   json_pack("{s:s, s:s, s:b, s:i, s:{s:i}}", "name", "vm", "peer", p.addr, "wait", 1, "timeout_ms",
			     60000, "ids", "vm", 77),
		   NULL));
	struct pair_host *hosts[] = {&p.a, &p.b};
	for (size_t i = 0; i < 2; i++) {
		json_t *r = NULL;
		OK(pair_do(hosts[i], "show", json_pack("{s:s}", "name", "vm"), &r));
		cr_assert_eq(json_integer_value(json_object_get(r, "id")), 77);
		json_decref(r);
	}
}

Test(daemon, ids_that_are_none_change_nothing)
{
	const char *const bad[] = {"{\"vm\":0}", "{\"vm\":-1}", "{\"vm\":4294967296}", "{\"vm\":\"7\"}", "{\"no\":1}"};
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		cr_assert_lt(pair_do(&p.a, "protect",
				     json_pack("{s:s, s:s, s:o}", "name", "vm", "peer", p.addr, "ids",
					       json_loads(bad[i], 0, NULL)),
				     NULL),
			     0, "%s", bad[i]);
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, 0x11), 0);
}

static void *wait_for_ever(void *arg)
{
	int *ret = arg;
	struct err e = {0};
	json_t *result = NULL, *args = json_pack("{s:s, s:s}", "name", "vm", "for", "running");
	*ret = daemon_command(p.a.d, NULL, "wait", args, &result, &e);
	json_decref(args);
	json_decref(result);
	return NULL;
}

Test(daemon, a_delete_ends_the_waits_for_its_group)
{
	/* Nothing tells that the wait has begun: one that came after the delete is tried again, with more time. */
	int ret = -ERR_NOENT;
	for (useconds_t us = 50000; ret == -ERR_NOENT && us < 10000000; us *= 2) {
		pthread_t t;
		cr_assert_eq(pthread_create(&t, NULL, wait_for_ever, &ret), 0);
		(void)usleep(us);
		OK(pair_do(&p.a, "delete", json_pack("{s:s}", "name", "vm"), NULL));
		(void)pthread_join(t, NULL);
		if (ret == -ERR_NOENT)
			OK(pair_create(&p.a, "vm", "vm", SIZE));
	}
	cr_assert_eq(ret, -ERR_CANCELED);
}

Test(daemon, an_open_volume_is_not_deleted)
{
	struct gvol *v = gvol_find(p.a.d, "vm");
	struct gvol_handle *h = NULL;
	bool direct;
	OK(gvol_open(v, false, false, &h, &direct));
	cr_assert_eq(pair_do(&p.a, "delete", json_pack("{s:s}", "name", "vm"), NULL), -ERR_BUSY);
	gvol_release(h);
	OK(pair_do(&p.a, "delete", json_pack("{s:s}", "name", "vm"), NULL));
	cr_assert_eq(gvol_write(v, NULL, 0, 512, p.dir), -ERR_IO);
	cr_assert_eq(gvol_size(v), 0);
	gvol_unref(v);
}

static void *import_it(void *arg)
{
	char file[200];
	struct err e = {0};
	snprintf(file, sizeof(file), "%s/image", p.dir);
	json_t *result = NULL, *args = json_pack("{s:s, s:s, s:s}", "name", "new", "group", "vm", "file", file);
	*(int *)arg = daemon_command(p.a.d, NULL, "import", args, &result, &e);
	json_decref(args);
	json_decref(result);
	return NULL;
}

/* What was copied may be much, and bringing it to the disk take long. */
Test(daemon, an_import_is_synced_while_its_group_is_served, .init = NULL)
{
	static struct faults slow = {.match = "new/"};
	char file[200];
	int ret = 1, there;
	pthread_t t;
	OK(pair_open_with(&p, &slow, NULL));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	snprintf(file, sizeof(file), "%s/image", p.dir);
	FILE *f = fopen(file, "w");
	for (unsigned i = 0; i < SIZE; i++)
		cr_assert_neq(fputc(0x22, f), EOF);
	cr_assert_eq(fclose(f), 0);
	atomic_store(&slow.hold_sync, 1);
	cr_assert_eq(pthread_create(&t, NULL, import_it, &ret), 0);
	WAIT_FOR(atomic_load(&slow.syncing));
	struct gvol *v = gvol_find(p.a.d, "vm");
	there = v != NULL;
	gvol_unref(v);
	int err = there ? pair_create(&p.a, "other", "other", SIZE) : 0;
	atomic_store(&slow.hold_sync, 0);
	(void)pthread_join(t, NULL);
	cr_assert(there, "the group is not served");
	cr_assert_eq(err, 0);
	cr_assert_eq(ret, 0);
	cr_assert_eq(pair_is(&p.a, "new", 0, SIZE, 0x22), 0);
}

Test(daemon, a_name_that_begins_like_loopback_is_not_loopback)
{
	cr_assert_eq(
	    pair_do(&p.a, "protect", json_pack("{s:s, s:s}", "name", "vm", "peer", "127.0.0.1.example:1"), NULL),
	    -ERR_PERM);
}

Test(daemon, a_time_out_without_end_does_not_overflow)
{
	pthread_t t;
	json_t *args =
	    json_pack("{s:s, s:s, s:I}", "name", "vm", "for", "running", "timeout_ms", (json_int_t)INT64_MAX);
	int ret = 0;
	struct err e = {0};
	json_t *result = NULL;
	cr_assert_eq(pthread_create(&t, NULL, wait_for_ever, &ret), 0);
	OK(pair_protect(&p, "vm"));
	cr_assert_eq(daemon_command(p.a.d, NULL, "wait", args, &result, &e), 0, "%s", e.text);
	(void)pthread_join(t, NULL);
	cr_assert_eq(ret, 0);
	json_decref(args);
	json_decref(result);
}

/* ---- the kernel's cache ---- */

static atomic_bool answered, waited_too_long;
static atomic_int answer, invalidations;

/* The kernel's part: a page is dropped when the request that holds it has been answered. */
static void invalidate(void *arg, uint32_t id)
{
	(void)arg;
	(void)id;
	atomic_fetch_add(&invalidations, 1);
	for (unsigned i = 0; i < 3000 && !atomic_load(&answered); i++)
		(void)usleep(10000);
	if (!atomic_load(&answered))
		atomic_store(&waited_too_long, true);
}

static void on_done(struct gio *g, int error)
{
	(void)g;
	atomic_store(&answer, error);
	atomic_store(&answered, true);
}

Test(daemon, a_request_that_waits_does_not_hold_up_the_invalidation)
{
	static const char data[4096] = {1};
	OK(pair_protect(&p, "vm"));
	pair_host_stop(&p.a);
	OK(pair_do(&p.b, "failover", json_pack("{s:s, s:b}", "name", "vm", "wait", 1), NULL));
	p.a.hooks = (struct daemon_hooks){.invalidate = invalidate};
	OK(pair_host_start(&p, &p.a));
	/* Held until the handshake, which says that this host is primary no more. */
	struct gvol *v = gvol_find(p.a.d, "vm");
	struct gio io = {.v = v, .kind = REPL_WRITE, .len = sizeof(data), .data = data, .done = on_done};
	gvol_submit(&io);
	OK(pair_wait_state(&p.a, "vm", "NONE"));
	while (!atomic_load(&answered))
		(void)usleep(1000);
	pair_host_stop(&p.a);
	gvol_unref(v);
	cr_assert_gt(atomic_load(&invalidations), 0);
	cr_assert_not(atomic_load(&waited_too_long));
	cr_assert_eq(atomic_load(&answer), -ERR_IO);
	p.a.hooks = (struct daemon_hooks){0};
	OK(pair_host_start(&p, &p.a));
}

/* ---- a store with a damaged group ---- */

static void damage(const char *how, const char *file)
{
	char command[600];
	(void)snprintf(command, sizeof(command), "cd %s && %s %s", p.a.store, how, file);
	cr_assert_eq(system(command), 0, "%s", command);
}

/* Says what to do with it, and serves the others; nothing of it is lost by what is tried meanwhile. */
Test(daemon, a_damaged_group_does_not_keep_the_others_from_being_served)
{
	static const struct {
		const char *how, *file, *text;
	} cases[] = {
	    {"truncate -s 10", "groups/vm.a groups/vm.b", "put one of them back from a backup"},
	    {"rm", "volumes/vm/disk.raw", "restore it from a backup"},
	    {"truncate -s 4096", "volumes/vm/disk.raw", "restore it from a backup"},
	    {"rm -r", "volumes/vm", "restore it from a backup"},
	};
	OK(pair_create(&p.a, "other", "other", SIZE));
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	OK(pair_write(&p.a, "other", 0, SIZE, 0x22));
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		json_t *r = NULL, *why;
		pair_host_stop(&p.a);
		damage("rm -rf ../good && cp -a", ". ../good");
		damage(cases[i].how, cases[i].file);
		OK(pair_host_start(&p, &p.a));
		OK(pair_write(&p.a, "other", 0, SIZE / 2, (uint8_t)(0x33 + i)));
		OK(pair_do(&p.a, "status", json_object(), &r));
		why = json_object_get(json_array_get(json_object_get(r, "unserved"), 0), "why");
		cr_assert(json_is_string(why) && strstr(json_string_value(why), cases[i].text), "%s %s: %s",
			  cases[i].how, cases[i].file, json_string_value(why));
		json_decref(r);
		cr_assert_eq(pair_do(&p.a, "status", json_pack("{s:s}", "name", "vm"), NULL), -ERR_STATE);
		cr_assert_lt(pair_create(&p.a, "vm", "vm", SIZE), 0);
		cr_assert_lt(pair_create(&p.a, "more", "vm", SIZE), 0);
		cr_assert_eq(pair_is(&p.a, "other", 0, SIZE / 2, (uint8_t)(0x33 + i)), 0);
		pair_host_stop(&p.a);
		damage("rm -r groups volumes && cp -a", "../good/* .");
		OK(pair_host_start(&p, &p.a));
		cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, 0x11), 0);
		cr_assert_eq(pair_is(&p.a, "other", SIZE / 2, SIZE / 2, 0x22), 0);
	}
}

/* One whose record can't be read is still told of after it could not be deleted. */
Test(daemon, a_damaged_record_is_told_of_until_it_is_mended)
{
	pair_host_stop(&p.a);
	damage("truncate -s 10", "groups/vm.a groups/vm.b");
	OK(pair_host_start(&p, &p.a));
	for (int i = 0; i < 2; i++) {
		cr_assert_lt(pair_do(&p.a, "delete", json_pack("{s:s}", "name", "vm"), NULL), 0);
		cr_assert(strstr(p.a.err.text, "put one of them back"), "%s", p.a.err.text);
		cr_assert_eq(pair_do(&p.a, "status", json_pack("{s:s}", "name", "vm"), NULL), -ERR_STATE);
	}
}

/* ---- the end ---- */

Test(daemon, a_port_in_use_ends_the_start)
{
	char store[300];
	struct err e = {0};
	struct daemon *d = NULL;
	(void)snprintf(store, sizeof(store), "%s/c", p.dir);
	struct daemon_config cfg = {.store = store, .listen = p.addr, .durability = DURABILITY_PROCESS};
	cr_assert_lt(daemon_open(&cfg, &d, &e), 0);
	cr_assert_null(d);
	cr_assert(strstr(e.text, strrchr(p.addr, ':')) != NULL, "%s", e.text);
	cfg.listen = NULL;
	cr_assert_eq(daemon_open(&cfg, &d, &e), 0, "%s", e.text);
	daemon_close(d);
}

/* Whether an end and a new start are done; else, as a machine may stand still for a moment, again: not each time. */
static bool ended_quickly(struct pair_host *h)
{
	static unsigned tries;
	uint64_t t = clock_mono_ns();
	pair_host_stop(h);
	t = clock_mono_ns() - t;
	OK(pair_host_start(&p, h));
	cr_assert(t < QUICK_NS || ++tries < 6, "an end takes %llu ms", (unsigned long long)(t / NS_PER_MS));
	return t < QUICK_NS;
}

static struct sockaddr_in listen_addr(void)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	sin.sin_port = htons((uint16_t)strtoul(strrchr(p.addr, ':') + 1, NULL, 10));
	return sin;
}

Test(daemon, ends_in_time_while_it_dials_one_that_never_answers)
{
	const int on = 1;
	OK(pair_protect(&p, "vm"));
	pair_host_stop(&p.b);
	struct sockaddr_in sin = listen_addr();
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	cr_assert_eq(bind(fd, (struct sockaddr *)&sin, sizeof(sin)), 0);
	cr_assert_eq(listen(fd, 8), 0);
	do
		(void)usleep(500000);
	while (!ended_quickly(&p.a));
	(void)close(fd);
	OK(pair_host_start(&p, &p.b));
}

Test(daemon, ends_in_time_with_connections_that_say_nothing)
{
	struct sockaddr_in sin = listen_addr();
	int fds[8];
	bool quick;
	do {
		for (size_t i = 0; i < 8; i++) {
			fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
			cr_assert_eq(connect(fds[i], (struct sockaddr *)&sin, sizeof(sin)), 0);
		}
		(void)usleep(20000);
		quick = ended_quickly(&p.b);
		for (size_t i = 0; i < 8; i++)
			(void)close(fds[i]);
	} while (!quick);
}

static atomic_bool over;

static void *come_and_go(void *arg)
{
	(void)arg;
	struct pair_host h = p.a; /* an error text of its own */
	while (!atomic_load(&over)) {
		(void)pair_create(&h, "x", "x", SIZE);
		(void)pair_do(&h, "delete", json_pack("{s:s}", "name", "x"), NULL);
	}
	return NULL;
}

Test(daemon, show_beside_a_delete_shows_it_or_says_that_it_is_not_there)
{
	pthread_t t;
	unsigned empty = 0;
	cr_assert_eq(pthread_create(&t, NULL, come_and_go, NULL), 0);
	for (unsigned i = 0; i < 300000; i++) {
		json_t *r = NULL;
		if (pair_do(&p.a, "show", json_pack("{s:s}", "name", "x"), &r) == 0)
			empty += !json_is_string(json_object_get(r, "name"));
		json_decref(r);
	}
	atomic_store(&over, true);
	(void)pthread_join(t, NULL);
	cr_assert_eq(empty, 0);
}
