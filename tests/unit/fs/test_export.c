/* What happens to a volume while it is exported, or a backup is applied to it. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "fs/repl_shell.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(32) << 20)
#define PIECE (UINT64_C(1) << 20)

/* Reads of the disks, and of what lies over them. */
static struct faults slow = {.match = "vm/"};

static void setup(void)
{
	OK(pair_open_with(&p, &slow, NULL));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
}

TestSuite(export, .init = setup, .fini = teardown, .timeout = 120);

static void fill(struct pair_host *h, uint8_t byte)
{
	for (uint64_t off = 0; off < SIZE; off += PIECE)
		OK(pair_write(h, "vm", off, PIECE, byte));
}

struct exporting {
	char file[256];
	uint64_t ckpt;
	pthread_t thread;
	atomic_bool ended;
	int ret;
	struct err e;
};

static void *export_it(void *arg)
{
	struct exporting *x = arg;
	json_t *result = NULL, *args = json_pack("{s:s, s:s}", "name", "vm", "file", x->file);
	if (x->ckpt)
		json_object_set_new(args, "checkpoint", json_integer((json_int_t)x->ckpt));
	x->ret = daemon_command(p.a.d, NULL, "export", args, &result, &x->e);
	atomic_store(&x->ended, true);
	json_decref(args);
	json_decref(result);
	return NULL;
}

/* It waits in its first read. */
static void begin(struct exporting *x, uint64_t ckpt)
{
	memset(x, 0, sizeof(*x));
	x->ckpt = ckpt;
	snprintf(x->file, sizeof(x->file), "%s/out", p.dir);
	atomic_store(&slow.reading, 0);
	atomic_store(&slow.hold_read, 1);
	cr_assert_eq(pthread_create(&x->thread, NULL, export_it, x), 0);
	WAIT_FOR(atomic_load(&slow.reading) > 0);
}

static void end(struct exporting *x)
{
	atomic_store(&slow.hold_read, 0);
	(void)pthread_join(x->thread, NULL);
}

static int file_is(const char *file, uint8_t byte)
{
	static uint8_t buf[PIECE];
	FILE *f = fopen(file, "r");
	uint64_t n = 0;
	while (f && fread(buf, 1, PIECE, f) == PIECE) {
		for (uint64_t i = 0; i < PIECE; i++)
			if (buf[i] != byte)
				return 1;
		n += PIECE;
	}
	return f && fclose(f) == 0 && n == SIZE ? 0 : 1;
}

Test(export, a_checkpoint_that_is_exported_is_not_dropped)
{
	struct exporting x;
	json_t *r = NULL, *drop;
	fill(&p.a, 1);
	protect();
	OK(pair_do(&p.a, "switchover", named(), NULL));
	OK(pair_wait_link(&p.b, "vm", "SYNCED"));
	fill(&p.b, 2);
	OK(pair_do(&p.b, "checkpoint", named(), NULL));
	fill(&p.b, 3);
	OK(pair_do(&p.b, "checkpoint", named(), &r));
	uint64_t n = (uint64_t)json_integer_value(json_object_get(r, "checkpoint")) - 1;
	json_decref(r);
	begin(&x, n);
	drop = json_pack("{s:s, s:I, s:i}", "name", "vm", "drop", (json_int_t)n, "timeout_ms", 3000);
	int err = pair_do(&p.a, "checkpoints", drop, NULL);
	end(&x);
	cr_assert_eq(x.ret, 0, "%s", x.e.text);
	cr_assert_eq(err, -ERR_BUSY, "%d: %s", err, p.a.err.text);
	cr_assert(strstr(p.a.err.text, "export 1 of vm"), "%s", p.a.err.text);
	cr_assert_eq(file_is(x.file, 2), 0);
	/* Held no longer. */
	OK(pair_do(&p.a, "checkpoints",
		   json_pack("{s:s, s:I, s:i}", "name", "vm", "drop", (json_int_t)n, "timeout_ms", 60000), NULL));
}

static void *switch_over(void *arg)
{
	atomic_bool *done = arg;
	struct err e = {0};
	json_t *result = NULL, *args = named();
	(void)daemon_command(p.a.d, NULL, "switchover", args, &result, &e);
	atomic_store(done, true);
	json_decref(args);
	json_decref(result);
	return NULL;
}

Test(export, a_disk_that_becomes_the_secondarys_is_no_export)
{
	struct exporting x;
	static atomic_bool done;
	pthread_t t;
	fill(&p.a, 1);
	protect();
	begin(&x, 0);
	cr_assert_eq(pthread_create(&t, NULL, switch_over, &done), 0);
	while (!atomic_load(&done) && !atomic_load(&x.ended)) { /* a few reads at a time */
		unsigned n = atomic_load(&slow.reading);
		atomic_store(&slow.hold_read, 0);
		while (atomic_load(&slow.reading) == n && !atomic_load(&x.ended) && !atomic_load(&done))
			(void)usleep(100);
		atomic_store(&slow.hold_read, 1);
		(void)usleep(50000);
	}
	cr_assert(atomic_load(&done), "the export was too fast");
	end(&x);
	(void)pthread_join(t, NULL);
	cr_assert_eq(x.ret, -ERR_STATE, "%d: %s", x.ret, x.e.text);
	cr_assert_neq(access(x.file, F_OK), 0);
}

static void *apply_it(void *arg)
{
	struct exporting *x = arg;
	json_t *result = NULL, *args = json_pack("{s:s, s:s, s:b}", "name", "vm", "file", x->file, "apply", 1);
	x->ret = daemon_command(p.a.d, NULL, "import", args, &result, &x->e);
	json_decref(args);
	json_decref(result);
	return NULL;
}

static atomic_bool wanted;

static void got_sigio(int signo)
{
	(void)signo;
	atomic_store(&wanted, true);
}

static json_int_t active_bytes(struct pair_host *h)
{
	json_t *r = daemon_status(h->d, "vm");
	json_t *v = json_array_get(json_object_get(json_array_get(json_object_get(r, "groups"), 0), "volumes"), 0);
	json_int_t n = json_integer_value(json_object_get(v, "active_bytes"));
	json_decref(r);
	return n;
}

/* A backup of blocks of 1 in x->file; the volume holds 2. */
static void make_backup(struct exporting *x)
{
	json_t *r = NULL;
	fill(&p.a, 1);
	snprintf(x->file, sizeof(x->file), "%s/none", p.dir);
	OK(pair_do(&p.a, "backup",
		   json_pack("{s:s, s:s, s:s, s:b}", "name", "vm", "target", x->file, "sync", "none", "detach", 1),
		   &r));
	json_int_t id = json_integer_value(json_object_get(r, "id"));
	json_decref(r);
	fill(&p.a, 2);
	OK(pair_do(&p.a, "job", json_pack("{s:s, s:I}", "op", "cancel", "id", id), NULL));
	OK(pair_do(&p.a, "job", json_pack("{s:s, s:I}", "op", "wait", "id", id), NULL));
}

static void *apply_over_control(void *arg)
{
	struct exporting *x = arg;
	char sock[300];
	json_t *result = NULL, *args = json_pack("{s:s, s:s, s:b}", "name", "vm", "file", x->file, "apply", 1);
	(void)snprintf(sock, sizeof(sock), "%s/control.sock", p.a.store);
	x->ret = ctl_call(sock, "import", args, 0, NULL, NULL, &result, NULL, &x->e);
	json_decref(result);
	return NULL;
}

static bool write_under_way(void)
{
	struct group *g = daemon_group(p.a.d, "vm");
	mutex_lock(&g->lock);
	bool is = g->flights != NULL;
	mutex_unlock(&g->lock);
	group_unref(g);
	return is;
}

static void *shut_down(void *arg)
{
	daemon_shutdown(p.a.d);
	atomic_store((atomic_bool *)arg, true);
	return NULL;
}

/* Its write waits for the peer, and nobody but the end of the daemon ends that. */
Test(export, a_backup_that_is_applied_to_a_frozen_volume_does_not_keep_the_daemon_from_ending)
{
	struct exporting x = {.ret = 1};
	atomic_bool done = false;
	pthread_t t;
	make_backup(&x);
	set("on_disconnect", "freeze");
	protect();
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	OK(daemon_serve_control(p.a.d, &x.e));
	cr_assert_eq(pthread_create(&x.thread, NULL, apply_over_control, &x), 0);
	WAIT_FOR(write_under_way());
	cr_assert_eq(pthread_create(&t, NULL, shut_down, &done), 0);
	WAIT_FOR(atomic_load(&done));
	(void)pthread_join(t, NULL);
	(void)pthread_join(x.thread, NULL);
	cr_assert_eq(x.ret, -ERR_IO, "%d: %s", x.ret, x.e.text);
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.b));
	OK(pair_host_start(&p, &p.a));
}

/* The rest would go to what the secondary wrote itself, where it stops its checkpoints, and count as applied. */
Test(export, a_backup_that_is_applied_is_not_written_to_a_secondary)
{
	struct exporting x = {.ret = 1};
	make_backup(&x);
	protect();
	/* Opening the list of its extents waits for a lease to be given back. */
	char list[sizeof(x.file) + 16];
	snprintf(list, sizeof(list), "%s.extents", x.file);
	(void)signal(SIGIO, got_sigio);
	int fd = open(list, O_RDWR | O_CLOEXEC);
	cr_assert_geq(fd, 0);
	cr_assert_eq(fcntl(fd, F_SETLEASE, F_WRLCK), 0, "%s", strerror(errno));
	cr_assert_eq(pthread_create(&x.thread, NULL, apply_it, &x), 0);
	WAIT_FOR(atomic_load(&wanted));
	OK(pair_do(&p.a, "switchover", named(), NULL));
	(void)close(fd);
	(void)pthread_join(x.thread, NULL);
	OK(pair_wait_link(&p.b, "vm", "SYNCED"));
	char role[32];
	pair_status(&p.b, "vm", "role", role, sizeof(role));
	cr_assert_str_eq(role, "primary");
	cr_assert_eq(x.ret, -ERR_IO, "%d: %s", x.ret, x.e.text);
	cr_assert_eq(active_bytes(&p.a), 0);
}
