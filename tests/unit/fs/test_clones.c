/* Clones in real daemons without a mount (fs/clones.c): overlapping writes of one clone, open handles against removal,
 * what the record and the store hold. What a mount or a kill shows is in tests/e2e/test_52_clone.py. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fs/daemon.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(1) << 20)

static void setup(void)
{
	OK(pair_open(&p));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	protect();
}

TestSuite(clones, .init = setup, .fini = teardown, .timeout = 120);

static uint64_t checkpoint(void)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", named(), &r));
	uint64_t n = (uint64_t)json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	return n;
}

static int clone_make(struct pair_host *h, uint64_t ckpt, const char *name)
{
	json_t *args = named();
	json_object_set_new(args, "checkpoint", json_integer((json_int_t)ckpt));
	json_object_set_new(args, "clone", json_string(name));
	return pair_do(h, "clone", args, NULL);
}

static int write_error;
static _Atomic unsigned writes_left;

static void write_done(struct gio *g, int error)
{
	write_error = error ? error : write_error;
	free(g);
	atomic_fetch_sub(&writes_left, 1);
}

struct lane {
	struct gvol *v;
	uint8_t byte;
	int error;
};

static void *overlapping(void *arg)
{
	struct lane *l = arg;
	uint8_t *buf = malloc(SIZE);
	memset(buf, l->byte, SIZE);
	for (unsigned i = 0; i < 40 && !l->error; i++)
		l->error = gvol_write(l->v, NULL, 512, SIZE - 1024, buf);
	free(buf);
	return NULL;
}

/* Each write is there whole or overwritten whole: never a mixture, also within a block that two complete. */
Test(clones, overlapping_writes_are_carried_out_one_after_another)
{
	enum { LANES = 4 };
	struct lane lanes[LANES];
	pthread_t t[LANES];
	OK(clone_make(&p.b, checkpoint(), "c"));
	struct gvol *v = gvol_find_clone(p.b.d, "c");
	cr_assert_not_null(v);
	for (unsigned i = 0; i < LANES; i++) {
		lanes[i] = (struct lane){v, (uint8_t)(0x20 + i), 0};
		cr_assert_eq(pthread_create(&t[i], NULL, overlapping, &lanes[i]), 0);
	}
	for (unsigned i = 0; i < LANES; i++)
		pthread_join(t[i], NULL);
	uint8_t *buf = malloc(SIZE);
	memset(buf, 0xee, SIZE);
	OK(gvol_read(v, NULL, GVOL_CLONE, 0, 0, SIZE, buf));
	for (uint64_t i = 0; i < SIZE; i++)
		cr_assert_eq(buf[i], i < 512 || i >= SIZE - 512 ? 0x11 : buf[512], "byte %lu", (unsigned long)i);
	for (unsigned i = 0; i < LANES; i++)
		OK(lanes[i].error);
	/* Those that wait go on in the pool, in order: the last one counts. */
	atomic_store(&writes_left, 50);
	for (unsigned i = 0; i < 50; i++) {
		struct gio *g = calloc(1, sizeof(*g));
		memset(buf, 0x40 + (int)i, 8192);
		*g = (struct gio){.v = v, .kind = REPL_WRITE, .off = 100, .len = 8192, .data = buf, .done = write_done};
		gvol_submit(g);
	}
	WAIT_FOR(atomic_load(&writes_left) == 0);
	OK(write_error);
	memset(buf, 0xee, SIZE);
	OK(gvol_read(v, NULL, GVOL_CLONE, 0, 100, 8192, buf));
	for (unsigned i = 0; i < 8192; i++)
		cr_assert_eq(buf[i], 0x40 + 49);
	OK(gvol_flush(v, NULL));
	free(buf);
	gvol_unref(v);
	cr_assert_eq(pair_is(&p.b, "vm", 0, SIZE, 0x11), 0);
}

Test(clones, one_that_is_open_is_not_removed)
{
	struct gvol_handle *h = NULL;
	bool direct = true;
	struct err e = {0};
	OK(clone_make(&p.b, checkpoint(), "c"));
	struct gvol *v = gvol_find_clone(p.b.d, "c");
	OK(gvol_open(v, true, false, &h, &direct));
	cr_assert_not(direct, "a secondary's view is served direct, a clone need not be");
	cr_assert_eq(daemon_remove_clone(p.b.d, "c", &e), -ERR_BUSY);
	cr_assert(strstr(e.text, "open"), "%s", e.text);
	OK(gvol_write(v, h, 0, 4, "abcd"));
	gvol_release(h);
	OK(daemon_remove_clone(p.b.d, "c", &e));
	cr_assert_null(gvol_find_clone(p.b.d, "c"));
	cr_assert_eq(gvol_open(v, true, false, &h, &direct), -ERR_NOENT);
	uint8_t byte;
	cr_assert_eq(gvol_read(v, NULL, GVOL_CLONE, 0, 0, 1, &byte), -ERR_IO);
	gvol_unref(v);
	cr_assert_eq(daemon_remove_clone(p.b.d, "c", &e), -ERR_NOENT);
	OK(clone_make(&p.b, checkpoint(), "c")); /* the name is free again */
}

Test(clones, they_come_back_with_the_daemon_and_stay_through_a_change_of_role)
{
	uint64_t n = checkpoint();
	OK(clone_make(&p.b, n, "c"));
	struct gvol *v = gvol_find_clone(p.b.d, "c");
	OK(gvol_write(v, NULL, 4096, 4, "abcd"));
	gvol_unref(v);
	pair_host_stop(&p.b);
	OK(pair_host_start(&p, &p.b));
	pair_host_stop(&p.a);
	json_t *args = named();
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.b, "failover", args, NULL));
	OK(pair_write(&p.b, "vm", 0, SIZE, 0x22));
	/* adding a volume takes the group out of the daemon and back in */
	OK(pair_do(&p.b, "unprotect", named(), NULL));
	OK(pair_create(&p.b, "vm-more", "vm", SIZE));
	v = gvol_find_clone(p.b.d, "c");
	cr_assert_not_null(v);
	uint8_t buf[8192];
	memset(buf, 0xee, sizeof(buf));
	OK(gvol_read(v, NULL, GVOL_CLONE, 0, 0, sizeof(buf), buf));
	for (unsigned i = 0; i < sizeof(buf); i++)
		cr_assert_eq(buf[i], i >= 4096 && i < 4100 ? (uint8_t) "abcd"[i - 4096] : 0x11, "byte %u", i);
	gvol_unref(v);
	cr_assert_eq(pair_do(&p.b, "delete", json_pack("{s:s}", "name", "vm"), NULL), -ERR_BUSY);
}

static uint64_t checkpoint_of(const char *group)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", json_pack("{s:s, s:i}", "name", group, "timeout_ms", 60000), &r));
	uint64_t n = (uint64_t)json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	return n;
}

static int clone_of(const char *volume, uint64_t n, int timeout_ms)
{
	return pair_do(&p.b, "clone",
		       json_pack("{s:s, s:I, s:s, s:i}", "name", volume, "checkpoint", (json_int_t)n, "clone", "c",
				 "timeout_ms", timeout_ms),
		       NULL);
}

static size_t n_clones(void)
{
	json_t *r = NULL;
	OK(pair_do(&p.b, "list", json_object(), &r));
	size_t n = json_array_size(json_object_get(r, "clones"));
	json_decref(r);
	return n;
}

/* Names are the host's, also that of one whose making is not waited for any more. */
Test(clones, a_name_is_taken_while_it_is_made, .init = NULL)
{
	static struct faults slow = {.match = "groups/vm"};
	OK(pair_open_with(&p, NULL, &slow));
	OK(pair_create(&p.a, "vm", "vm", 1 << 20));
	OK(pair_create(&p.a, "two", "two", 1 << 20));
	protect();
	OK(pair_protect(&p, "two"));
	uint64_t n = checkpoint_of("vm"), two = checkpoint_of("two");
	atomic_store(&slow.hold, 1);
	cr_assert_eq(clone_of("vm", n, 300), -ERR_TIMEOUT, "%s", p.b.err.text);
	int err = clone_of("two", two, 60000);
	atomic_store(&slow.hold, 0);
	cr_assert_eq(err, -ERR_BUSY, "%d", err);
	WAIT_FOR(n_clones() == 1);
	cr_assert_eq(clone_of("two", two, 60000), -ERR_EXIST);
	cr_assert_eq(n_clones(), 1);
}

static void *set_it(void *arg)
{
	struct err e = {0};
	json_t *r = NULL, *args = json_pack("{s:s, s:{s:s}}", "name", "vm", "settings", "keep_last", "7");
	*(int *)arg = daemon_command(p.b.d, NULL, "set", args, &r, &e);
	json_decref(args);
	json_decref(r);
	return NULL;
}

static void *create_it(void *arg)
{
	struct err e = {0};
	json_t *r = NULL, *args = json_pack("{s:s, s:s, s:I}", "name", "more", "group", "vm", "size", (json_int_t)SIZE);
	*(int *)arg = daemon_command(p.b.d, NULL, "create", args, &r, &e);
	json_decref(args);
	json_decref(r);
	return NULL;
}

static void count(void *arg, const char *name, uint32_t id)
{
	(void)name;
	(void)id;
	++*(unsigned *)arg;
}

/* A record that is being saved while its group is taken out names the clones of a group that is no more. */
Test(clones, they_are_there_once_after_a_save_beside_a_change_of_the_group, .init = NULL)
{
	static struct faults slow = {.match = "groups/vm"};
	pthread_t setter, creator;
	int set_err = 1, create_err = 1;
	unsigned n = 0;
	OK(pair_open_with(&p, NULL, &slow));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	protect();
	OK(clone_make(&p.b, checkpoint(), "c"));
	OK(pair_do(&p.b, "failover", json_pack("{s:s, s:b}", "name", "vm", "wait", 1), NULL));
	atomic_store(&slow.hold, 1);
	cr_assert_eq(pthread_create(&setter, NULL, set_it, &set_err), 0);
	(void)usleep(100000);
	cr_assert_eq(pthread_create(&creator, NULL, create_it, &create_err), 0);
	uint32_t id;
	WAIT_FOR(!daemon_has_group(p.b.d, "vm", &id));
	atomic_store(&slow.hold, 0);
	(void)pthread_join(setter, NULL);
	(void)pthread_join(creator, NULL);
	cr_assert_eq(create_err, 0);
	daemon_each_clone(p.b.d, count, &n);
	cr_assert_eq(n, 1);
	struct gvol *v = gvol_find_clone(p.b.d, "c");
	OK(gvol_write(v, NULL, 0, 5, "hello"));
	gvol_unref(v);
}

static void *status_of_it(void *arg)
{
	struct err e = {0};
	json_t *r = NULL, *args = json_pack("{s:s}", "name", "vm");
	*(int *)arg = daemon_command(p.b.d, NULL, "status", args, &r, &e);
	json_decref(args);
	json_decref(r);
	return NULL;
}

/* Its clones' names are its own then, and who asks for it waits, as it is not gone. */
Test(clones, a_group_that_is_out_while_it_changes_has_its_names, .init = NULL)
{
	static struct faults slow = {.match = "groups/vm"};
	pthread_t creator, asker;
	int create_err = 1, status_err = 1;
	OK(pair_open_with(&p, NULL, &slow));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	protect();
	uint64_t one = checkpoint();
	OK(pair_create(&p.a, "two", "two", SIZE));
	OK(pair_protect(&p, "two"));
	uint64_t two = checkpoint_of("two");
	OK(clone_make(&p.b, one, "c"));
	OK(pair_do(&p.b, "failover", json_pack("{s:s, s:b}", "name", "vm", "wait", 1), NULL));
	atomic_store(&slow.hold, 1);
	cr_assert_eq(pthread_create(&creator, NULL, create_it, &create_err), 0);
	uint32_t id;
	WAIT_FOR(!daemon_has_group(p.b.d, "vm", &id));
	int err = clone_of("two", two, 60000);
	cr_assert_eq(pthread_create(&asker, NULL, status_of_it, &status_err), 0);
	(void)usleep(50000);
	atomic_store(&slow.hold, 0);
	(void)pthread_join(creator, NULL);
	(void)pthread_join(asker, NULL);
	cr_assert_eq(create_err, 0);
	cr_assert_eq(err, -ERR_BUSY, "%d", err);
	cr_assert_eq(status_err, 0, "%d", status_err);
	cr_assert_eq(clone_of("two", two, 60000), -ERR_EXIST);
	cr_assert_eq(n_clones(), 1);
}
