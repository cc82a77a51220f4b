/* Backup jobs (fs/jobs.h) in real daemons: what each mode's target holds, byte for byte, while a guest goes on writing;
 * pause, resume, cancel, wait, speed; errors and their policies; what a job that did not end leaves. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "fs/jobs.h"
#include "fs/repl_shell.h"
#include "image/backup.h"
#include "image/zst.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(4) << 20)
#define K UINT64_C(1024)
/* What it grows to; the last block of each is short. */
#define ODD (SIZE + 512)
#define LARGE (SIZE + 256 * K + 1536)
#define LARGEST (SIZE + 512 * K + 2048)

static uint8_t model[LARGEST], then[LARGEST], buf[LARGEST];

static void setup(void)
{
	OK(pair_open(&p));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
}

TestSuite(jobs, .init = setup, .fini = teardown, .timeout = 120);

static void put(uint64_t off, uint64_t len, uint8_t byte)
{
	memset(model + off, byte, len);
	for (uint64_t n; len; off += n, len -= n) { /* as FUSE hands them out */
		n = min_u64(len, REPL_DATA_MAX);
		OK(pair_write(&p.a, "vm", off, n, byte));
	}
}

static const char *target(const char *name)
{
	static char paths[4][512];
	static unsigned next;
	char *s = paths[next++ % 4];
	snprintf(s, sizeof(paths[0]), "%s/%s", p.dir, name);
	return s;
}

static bool there(const char *name)
{
	struct stat st;
	return lstat(target(name), &st) == 0;
}

static json_t *args_for(const char *file, const char *sync)
{
	return json_pack("{s:s, s:s, s:s}", "name", "vm", "target", target(file), "sync", sync);
}

/* Begins one and gives its id. */
static json_int_t begin_with(struct pair_host *h, json_t *args)
{
	json_t *r = NULL;
	json_object_set_new(args, "detach", json_true());
	OK(pair_do(h, "backup", args, &r));
	json_int_t id = json_integer_value(json_object_get(r, "id"));
	cr_assert_gt(id, 0);
	json_decref(r);
	return id;
}

static json_int_t begin(struct pair_host *h, const char *file, const char *sync)
{
	return begin_with(h, args_for(file, sync));
}

static int job(struct pair_host *h, const char *op, json_int_t id)
{
	return pair_do(h, "job", json_pack("{s:s, s:I, s:i}", "op", op, "id", id, "timeout_ms", 60000), NULL);
}

/* A field of a job; new reference. */
static json_t *field(struct pair_host *h, json_int_t id, const char *key)
{
	json_t *r = NULL, *j, *v = NULL;
	size_t i;
	OK(pair_do(h, "jobs", json_object(), &r));
	json_array_foreach(json_object_get(r, "jobs"), i, j)
	{
		if (json_integer_value(json_object_get(j, "id")) == id)
			v = json_incref(json_object_get(j, key));
	}
	json_decref(r);
	return v;
}

static bool is(struct pair_host *h, json_int_t id, const char *state)
{
	json_t *s = field(h, id, "state");
	bool same = s && strcmp(json_string_value(s), state) == 0;
	json_decref(s);
	return same;
}

static json_int_t number(struct pair_host *h, json_int_t id, const char *key)
{
	json_t *v = field(h, id, key);
	json_int_t n = json_integer_value(v);
	json_decref(v);
	return n;
}

static void expect_image(const char *name, const uint8_t *content, uint64_t want)
{
	struct disk *d, *file;
	struct err e;
	uint64_t size;
	cr_assert_eq(disk_posix_open(target(name), STORAGE_RDONLY, &file), 0, "%s", name);
	d = file;
	if (backup_format_of(name) == BACKUP_ZST)
		cr_assert_eq(disk_zst_open(file, name, &d, &e), 0, "%s", e.text);
	memset(buf, 0xa5, sizeof(buf));
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, want, "%s has %llu bytes, not %llu", name, (unsigned long long)size,
		     (unsigned long long)want);
	cr_assert_eq(disk_read(d, 0, buf, want), 0);
	for (size_t i = 0; i < want; i++)
		cr_assert(buf[i] == content[i], "%s: byte %zu is %u, not %u", name, i, buf[i], content[i]);
	disk_close(d);
}

static void expect_file(const char *name, const uint8_t *content)
{
	expect_image(name, content, SIZE);
}

/* The extents of name's list as ranges; returns how many. */
static unsigned list_of(const char *name, struct range *ranges, unsigned max, struct extentlist_head *h)
{
	struct extentlist *l;
	struct err e;
	unsigned n = 0;
	cr_assert_eq(extentlist_open("test", target(name), &l, &e), 0, "%s", e.text);
	while (n < max && extentlist_next(l, &ranges[n], &e) == 1)
		n++;
	*h = *extentlist_head(l);
	cr_assert_eq(h->count, n);
	extentlist_close(l);
	return n;
}

static uint64_t checkpoint(void)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", named(), &r));
	uint64_t n = (uint64_t)json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	return n;
}

static size_t n_checkpoints(struct pair_host *h)
{
	json_t *r = NULL;
	OK(pair_do(h, "checkpoints", named(), &r));
	size_t n = json_array_size(json_object_get(r, "checkpoints"));
	json_decref(r);
	return n;
}

/* Nothing of a target that was given up. */
static void nothing_of(const char *name)
{
	char other[200];
	cr_assert_not(there(name));
	snprintf(other, sizeof(other), "%s.part", name);
	cr_assert_not(there(other));
	snprintf(other, sizeof(other), "%s.extents", name);
	cr_assert_not(there(other));
}

/* ---- modes ---- */

Test(jobs, full_is_the_disk_as_of_the_start)
{
	static const char *const names[] = {"f", "f.zst"};
	put(0, 64 * K, 1);
	put(1024 * K, 1024 * K, 2);
	put(SIZE - 4 * K, 4 * K, 3);
	for (unsigned i = 0; i < 2; i++) {
		memcpy(then, model, SIZE);
		json_t *args = args_for(names[i], "full");
		json_object_set_new(args, "speed", json_integer(1 << 20));
		json_int_t id = begin_with(&p.a, args);
		cr_assert_eq(n_checkpoints(&p.a), 1); /* its epoch, for as long as it runs */
		put(0, SIZE, (uint8_t)(0x40 + i));
		cr_assert_not(there(names[i]));
		OK(job(&p.a, "wait", id));
		expect_file(names[i], then);
		cr_assert(is(&p.a, id, "done"));
		cr_assert_eq(number(&p.a, id, "done"), (json_int_t)SIZE);
		WAIT_FOR(n_checkpoints(&p.a) == 0);
		cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, (uint8_t)(0x40 + i)), 0);
	}
	cr_assert_not(there("f.extents"));
	json_t *r = NULL; /* in the foreground; `top` of a volume without a base is all of it */
	OK(pair_do(&p.a, "backup", args_for("t", "top"), &r));
	cr_assert_str_eq(json_string_value(json_object_get(r, "state")), "done");
	json_decref(r);
	expect_file("t", model);
	json_t *all = daemon_status(p.a.d, "vm");
	const json_t *jobs = json_object_get(json_array_get(json_object_get(all, "groups"), 0), "jobs");
	cr_assert_eq(json_array_size(jobs), 3);
	cr_assert_str_eq(json_string_value(json_object_get(json_array_get(jobs, 1), "mode")), "full");
	json_decref(all);
}

Test(jobs, on_a_secondary_it_is_of_the_base_or_a_checkpoint)
{
	struct range r[8];
	struct extentlist_head h;
	put(0, 64 * K, 1);
	protect();
	uint64_t first = checkpoint();
	memcpy(then, model, SIZE);
	put(8 * K, 4 * K, 2);
	put(2048 * K, 20 * K, 3);
	uint64_t second = checkpoint();
	static uint8_t at2[SIZE], changed[SIZE];
	memcpy(at2, model, SIZE);
	put(0, SIZE, 9);
	OK(flush(&p.a));
	OK(pair_do(&p.b, "backup", args_for("base", "full"), NULL));
	expect_file("base", at2);
	json_t *args = args_for("one.zst", "full");
	json_object_set_new(args, "checkpoint", json_integer((json_int_t)first));
	OK(pair_do(&p.b, "backup", args, NULL));
	expect_file("one.zst", then);
	memcpy(changed + 8 * K, at2 + 8 * K, 4 * K);
	memcpy(changed + 2048 * K, at2 + 2048 * K, 20 * K);
	for (unsigned i = 0; i < 2; i++) {
		const char *name = i ? "inc.zst" : "inc";
		args = args_for(name, "incremental");
		json_object_set_new(args, "since", json_integer((json_int_t)first));
		OK(pair_do(&p.b, "backup", args, NULL));
		expect_file(name, changed);
		cr_assert_eq(list_of(name, r, 8, &h), 2);
		cr_assert(r[0].off == 8 * K && r[0].len == 4 * K && r[1].off == 2048 * K && r[1].len == 20 * K);
		cr_assert(h.since == first && h.checkpoint == second && h.size == SIZE);
		cr_assert_str_eq(h.volume, "vm");
	}
	/* Nothing between a checkpoint and itself. */
	args = args_for("same", "incremental");
	json_object_set_new(args, "since", json_integer((json_int_t)second));
	OK(pair_do(&p.b, "backup", args, NULL));
	cr_assert_eq(list_of("same", r, 8, &h), 0);
	args = args_for("old", "incremental");
	json_object_set_new(args, "since", json_integer(4711));
	cr_assert_eq(pair_do(&p.b, "backup", args, NULL), -ERR_NOENT);
	cr_assert(strstr(p.b.err.text, "lacks the bitmap"), "%s", p.b.err.text);
	args = args_for("old", "incremental");
	json_object_set_new(args, "since", json_integer((json_int_t)second));
	json_object_set_new(args, "checkpoint", json_integer((json_int_t)first));
	cr_assert_eq(pair_do(&p.b, "backup", args, NULL), -ERR_USAGE);
	args = args_for("old", "full");
	json_object_set_new(args, "checkpoint", json_integer(4711));
	cr_assert_eq(pair_do(&p.b, "backup", args, NULL), -ERR_NOENT);
	cr_assert(strstr(p.b.err.text, "no checkpoint 4711"), "%s", p.b.err.text);
	nothing_of("old");
}

static int incremental(struct pair_host *h, const char *file, uint64_t since)
{
	json_t *args = args_for(file, "incremental");
	json_object_set_new(args, "since", json_integer((json_int_t)since));
	return pair_do(h, "backup", args, NULL);
}

/* The list of `file` covers exactly (or, after a crash, at least) what differs between the two images, and its content
 * is the newer one's. */
static void expect_changes(const char *file, const uint8_t *older, const uint8_t *newer, bool exact)
{
	static uint8_t patched[SIZE], listed[SIZE];
	static struct range r[2048];
	struct extentlist_head h;
	unsigned n = list_of(file, r, 2048, &h);
	memcpy(patched, older, SIZE);
	memset(listed, 0, SIZE);
	struct disk *d;
	cr_assert_eq(disk_posix_open(target(file), STORAGE_RDONLY, &d), 0);
	for (unsigned i = 0; i < n; i++) {
		OK(disk_read(d, r[i].off, patched + r[i].off, r[i].len));
		memset(listed + r[i].off, 1, r[i].len);
	}
	disk_close(d);
	for (size_t i = 0; i < SIZE; i++)
		cr_assert(patched[i] == newer[i], "%s: byte %zu is %u, not %u", file, i, patched[i], newer[i]);
	for (size_t i = 0; exact && i < SIZE; i += 4 * K)
		cr_assert(!listed[i] || memcmp(older + i, newer + i, 4 * K) != 0, "%s: block at %zu has not changed",
			  file, i);
}

Test(jobs, incremental_on_a_primary_by_its_bitmaps)
{
	static uint8_t at[4][SIZE];
	uint64_t n[4];
	put(0, SIZE, 1);
	protect();
	for (unsigned i = 0; i < 4; i++) {
		n[i] = checkpoint();
		memcpy(at[i], model, SIZE);
		put(256 * K * i + 100, 3 * K, (uint8_t)(10 + i));
		put(SIZE - 4 * K * (i + 1), 4 * K, (uint8_t)(20 + i));
		if (i == 1)
			wait_clean(); /* the clear cycle has been: the bitmaps are in their files */
	}
	struct gvol *v = gvol_find(p.a.d, "vm");
	OK(gvol_zero(v, NULL, 2048 * K, 64 * K, true));
	memset(model + 2048 * K, 0, 64 * K);
	gvol_unref(v);
	for (unsigned i = 0; i < 4; i++) {
		char name[16];
		snprintf(name, sizeof(name), "i%u", i);
		OK(incremental(&p.a, name, n[i]));
		expect_changes(name, at[i], model, true);
	}
	cr_assert_eq(incremental(&p.a, "x", n[3] + 100), -ERR_NOENT);
	cr_assert(strstr(p.a.err.text, "lacks the bitmap"), "%s", p.a.err.text);
	nothing_of("x");
	/* Over an end and a start, and beside a peer that is away. */
	pair_host_stop(&p.b);
	put(1024 * K, 4 * K, 33);
	OK(flush(&p.a));
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.a));
	OK(pair_host_start(&p, &p.b));
	in_sync();
	put(1028 * K, 4 * K, 34);
	for (unsigned i = 0; i < 4; i++) {
		char name[16];
		snprintf(name, sizeof(name), "j%u", i);
		OK(incremental(&p.a, name, n[i]));
		expect_changes(name, at[i], model, true);
	}
	/* A host that was no primary meanwhile knows nothing of it. */
	OK(pair_do(&p.a, "stop", named(), NULL));
	OK(pair_do(&p.a, "unprotect", named(), NULL));
	cr_assert_eq(incremental(&p.a, "x", n[3]), -ERR_NOENT);
}

static _Atomic bool halt;

static void *writer(void *arg)
{
	unsigned lane = *(const unsigned *)arg;
	uint32_t seed = lane * 7919 + 1;
	struct gvol *v = gvol_find(p.a.d, "vm");
	uint8_t data[16 * K];
	for (uint32_t n = 1; !atomic_load(&halt); n++) {
		seed = seed * 1664525U + 1013904223U;
		uint64_t len = (1 + seed % 31) * 512, off = lane * (SIZE / 4) + (seed >> 8) % (SIZE / 4 - sizeof(data));
		memset(data, (int)n, len);
		memcpy(data, &n, sizeof(n));
		if (gvol_write(v, NULL, off, len, data) < 0)
			break;
	}
	gvol_unref(v);
	return NULL;
}

/* Checkpoints, backups and a guest's writes that race: what the bitmap says has changed since a checkpoint, put onto
 * that checkpoint's image, is the primary's disk. */
Test(jobs, a_checkpoints_point_among_writes_under_way)
{
	static uint8_t image[SIZE];
	put(0, SIZE, 1);
	protect();
	for (unsigned round = 0; round < 20; round++) {
		pthread_t t[4];
		unsigned lanes[4];
		char name[16];
		atomic_store(&halt, false);
		for (unsigned i = 0; i < 4; i++) {
			lanes[i] = i;
			cr_assert_eq(pthread_create(&t[i], NULL, writer, &lanes[i]), 0);
		}
		(void)poll(NULL, 0, 5);
		uint64_t n = checkpoint();
		if (round % 2)
			(void)poll(NULL, 0, 10);
		atomic_store(&halt, true);
		for (unsigned i = 0; i < 4; i++)
			pthread_join(t[i], NULL);
		snprintf(name, sizeof(name), "e%u", round);
		OK(incremental(&p.a, name, n));
		struct gvol *v = gvol_find(p.b.d, "vm");
		OK(gvol_read(v, NULL, GVOL_CKPT, n, 0, SIZE, image));
		gvol_unref(v);
		OK(pair_read(&p.a, "vm", 0, SIZE, model));
		expect_changes(name, image, model, false);
	}
}

Test(jobs, none_gets_the_old_blocks)
{
	static const char *const names[] = {"n", "n.zst"};
	static uint8_t old[SIZE];
	struct range r[8];
	struct extentlist_head h;
	put(0, SIZE, 1);
	put(64 * K, 4 * K, 0);
	for (unsigned i = 0; i < 2; i++) {
		memcpy(then, model, SIZE);
		memset(old, 0, SIZE);
		json_int_t id = begin(&p.a, names[i], "none");
		json_int_t ckpt = number(&p.a, id, "checkpoint");
		put(64 * K, 4 * K, 5);
		put(1024 * K + 100, 5 * K, (uint8_t)(6 + i));
		WAIT_FOR(i || number(&p.a, id, "copied") == 12 * (json_int_t)K);
		put(64 * K, 4 * K, 7); /* the first save counts */
		put(SIZE - 512, 512, 8);
		cr_assert_not(there(names[i]));
		struct gvol *v = gvol_find(p.a.d, "vm");
		memset(buf, 0xa5, SIZE);
		OK(gvol_read(v, NULL, GVOL_CKPT, (uint64_t)ckpt, 0, SIZE, buf));
		cr_assert_eq(memcmp(buf, then, SIZE), 0);
		gvol_unref(v);
		OK(job(&p.a, "cancel", id));
		OK(job(&p.a, "wait", id));
		cr_assert(is(&p.a, id, "done"));
		memcpy(old + 64 * K, then + 64 * K, 4 * K);
		memcpy(old + 1024 * K, then + 1024 * K, 8 * K);
		memcpy(old + SIZE - 4 * K, then + SIZE - 4 * K, 4 * K);
		expect_file(names[i], old);
		cr_assert_eq(list_of(names[i], r, 8, &h), 3);
		cr_assert(r[0].off == 64 * K && r[0].len == 4 * K && r[1].off == 1024 * K && r[1].len == 8 * K);
		cr_assert(r[2].off == SIZE - 4 * K && r[2].len == 4 * K);
		cr_assert_str_eq(h.mode, "none");
		WAIT_FOR(n_checkpoints(&p.a) == 0);
	}
}

Test(jobs, stream_gets_every_write_and_nothing_else)
{
	static uint8_t written[SIZE];
	struct range r[8];
	struct extentlist_head h;
	put(0, SIZE, 1);
	protect();
	json_int_t here = begin(&p.a, "here", "stream"), other = begin(&p.b, "there", "stream");
	cr_assert_eq(pair_do(&p.a, "backup", args_for("again", "stream"), NULL), -ERR_BUSY);
	nothing_of("again");
	put(4 * K, 8 * K, 2);
	put(8 * K, 4 * K, 3);
	put(1024 * K + 7, 1000, 4);
	OK(pair_do(&p.a, "checkpoint", named(), NULL)); /* it is applied there */
	struct gvol *v = gvol_find(p.a.d, "vm");
	OK(gvol_zero(v, NULL, 2048 * K, 1024 * K, true));
	gvol_unref(v);
	OK(pair_do(&p.a, "checkpoint", named(), NULL));
	OK(job(&p.a, "cancel", here));
	OK(job(&p.a, "wait", here));
	OK(job(&p.b, "cancel", other));
	OK(job(&p.b, "wait", other));
	put(0, 4 * K, 9);
	memset(written + 4 * K, 2, 4 * K);
	memset(written + 8 * K, 3, 4 * K);
	memset(written + 1024 * K + 7, 4, 1000);
	for (unsigned i = 0; i < 2; i++) {
		const char *name = i ? "there" : "here";
		expect_file(name, written);
		cr_assert_eq(list_of(name, r, 8, &h), 3);
		cr_assert(r[0].off == 4 * K && r[0].len == 8 * K);
		cr_assert(r[1].off == 1024 * K + 7 && r[1].len == 1000);
		cr_assert(r[2].off == 2048 * K && r[2].len == 1024 * K);
		cr_assert_eq(h.checkpoint, 0);
	}
	/* And another may begin. */
	here = begin(&p.a, "again", "stream");
	OK(job(&p.a, "cancel", here));
	OK(job(&p.a, "wait", here));
	cr_assert_eq(list_of("again", r, 8, &h), 0);
}

Test(jobs, a_stream_that_is_not_taken_does_not_hold_the_guest_up)
{
	put(0, SIZE, 1);
	json_int_t id = begin(&p.a, "s", "stream");
	OK(job(&p.a, "pause", id));
	/* What is written meanwhile is kept, up to a limit. */
	put(0, 4 * K, 2);
	OK(job(&p.a, "resume", id));
	WAIT_FOR(number(&p.a, id, "copied") == 4 * (json_int_t)K);
	OK(job(&p.a, "pause", id));
	for (unsigned i = 0; i < JOB_QUEUE_MAX / SIZE + 1; i++)
		put(0, SIZE, (uint8_t)i);
	cr_assert(is(&p.a, id, "paused"));
	OK(job(&p.a, "resume", id));
	cr_assert_eq(job(&p.a, "wait", id), -ERR_LIMIT);
	nothing_of("s");
	cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, JOB_QUEUE_MAX / SIZE), 0);
}

/* ---- a volume that grows ---- */

static void resize(uint64_t size)
{
	OK(pair_do(&p.a, "resize",
		   json_pack("{s:s, s:I, s:i}", "name", "vm", "size", (json_int_t)size, "timeout_ms", 60000), NULL));
}

/* The file is checkpoints/vm/N, to the last byte. */
static void expect_ckpt(struct pair_host *h, const char *name, uint64_t n, const uint8_t *content, uint64_t size)
{
	struct gvol_attr a = {0};
	struct gvol *v = gvol_find(h->d, "vm");
	OK(gvol_attr(v, GVOL_CKPT, n, &a));
	cr_assert_eq(a.size, size);
	memset(buf, 0xa5, sizeof(buf));
	OK(gvol_read(v, NULL, GVOL_CKPT, n, 0, size, buf));
	cr_assert_eq(memcmp(buf, content, size), 0);
	gvol_unref(v);
	expect_image(name, content, size);
}

Test(jobs, a_checkpoint_older_than_a_resize_keeps_its_size)
{
	static const char *const ends[] = {"", ".zst"};
	static uint8_t at2[LARGEST], changed[LARGEST];
	struct range r[8];
	struct extentlist_head h;
	char name[16];
	put(0, 64 * K, 1);
	resize(ODD);
	protect();
	uint64_t first = checkpoint();
	memcpy(then, model, ODD);
	put(8 * K, 4 * K, 2);
	put(SIZE, 512, 3);
	uint64_t second = checkpoint();
	memcpy(at2, model, ODD);
	OK(pair_write(&p.b, "vm", 1024 * K, 4 * K, 9)); /* the view stays on that one */
	resize(LARGE);
	put(0, LARGE, 4);
	OK(flush(&p.a));
	memcpy(changed + 8 * K, at2 + 8 * K, 4 * K);
	memcpy(changed + SIZE, at2 + SIZE, 512);
	for (unsigned i = 0; i < 2; i++) {
		snprintf(name, sizeof(name), "one%s", ends[i]);
		json_t *args = args_for(name, "full");
		json_object_set_new(args, "checkpoint", json_integer((json_int_t)first));
		OK(pair_do(&p.b, "backup", args, NULL));
		expect_ckpt(&p.b, name, first, then, ODD);
		snprintf(name, sizeof(name), "base%s", ends[i]);
		json_int_t id = begin(&p.b, name, i ? "top" : "full");
		OK(job(&p.b, "wait", id));
		cr_assert_eq(number(&p.b, id, "checkpoint"), (json_int_t)second);
		cr_assert_eq(number(&p.b, id, "total"), (json_int_t)ODD);
		expect_ckpt(&p.b, name, second, at2, ODD);
		snprintf(name, sizeof(name), "inc%s", ends[i]);
		args = args_for(name, "incremental");
		json_object_set_new(args, "since", json_integer((json_int_t)first));
		OK(pair_do(&p.b, "backup", args, NULL));
		expect_image(name, changed, ODD);
		cr_assert_eq(list_of(name, r, 8, &h), 2);
		cr_assert(r[0].off == 8 * K && r[0].len == 4 * K && r[1].off == SIZE && r[1].len == 512);
		cr_assert(h.checkpoint == second && h.size == ODD);
	}
	uint64_t third = checkpoint();	   /* being a command it moves the view on */
	for (unsigned i = 0; i < 2; i++) { /* over the resize: of the new size, and with the new part */
		snprintf(name, sizeof(name), "over%s", ends[i]);
		json_t *args = args_for(name, "incremental");
		json_object_set_new(args, "since", json_integer((json_int_t)second));
		json_object_set_new(args, "checkpoint", json_integer((json_int_t)third));
		OK(pair_do(&p.b, "backup", args, NULL));
		expect_ckpt(&p.b, name, third, model, LARGE);
		cr_assert_eq(list_of(name, r, 8, &h), 1);
		cr_assert(r[0].off == 0 && r[0].len == LARGE && h.size == LARGE);
	}
	json_t *map = NULL;
	OK(pair_do(&p.b, "extents",
		   json_pack("{s:s, s:I, s:I}", "name", "vm", "layer", (json_int_t)second, "since", (json_int_t)first),
		   &map));
	const json_t *last = json_array_get(json_object_get(map, "extents"), 1);
	cr_assert_eq(json_integer_value(json_object_get(last, "offset")), (json_int_t)SIZE);
	cr_assert_eq(json_integer_value(json_object_get(last, "length")), 512);
	json_decref(map);
}

/* What a job began with stays its size. */
Test(jobs, a_resize_beside_a_job_that_runs)
{
	static uint8_t old[LARGEST];
	struct range r[8];
	struct extentlist_head h;
	put(0, SIZE, 1);
	resize(ODD);
	put(SIZE, 512, 2);
	protect();
	memcpy(then, model, ODD);
	json_t *args = args_for("full", "full");
	json_object_set_new(args, "speed", json_integer(1 << 20));
	json_int_t full = begin_with(&p.a, args), none = begin(&p.a, "none", "none");
	json_int_t stream = begin(&p.a, "stream", "stream");
	put(4 * K, 4 * K, 3);
	resize(LARGE);
	put(SIZE, LARGE - SIZE - 64 * K, 4);
	put(LARGE - 4 * K, 4 * K, 4);
	put(64 * K, 4 * K, 5);
	WAIT_FOR(number(&p.a, none, "copied") == 8 * (json_int_t)K + 512); /* while it runs */
	put(128 * K, 4 * K, 6);
	OK(job(&p.a, "cancel", none));
	OK(job(&p.a, "wait", none));
	memcpy(old + 4 * K, then + 4 * K, 4 * K);
	memcpy(old + 64 * K, then + 64 * K, 4 * K);
	memcpy(old + 128 * K, then + 128 * K, 4 * K);
	memcpy(old + SIZE, then + SIZE, 512);
	expect_image("none", old, ODD);
	cr_assert_eq(list_of("none", r, 8, &h), 4);
	cr_assert(h.size == ODD && r[3].off == SIZE && r[3].len == 512);
	OK(job(&p.a, "wait", full));
	expect_image("full", then, ODD);
	/* A stream would lack what went into the new part. */
	cr_assert_eq(job(&p.a, "wait", stream), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "has grown"), "%s", p.a.err.text);
	nothing_of("stream");
	OK(pair_is(&p.a, "vm", LARGE - 4 * K, 4 * K, 4));
	/* With nothing there it lacks nothing. */
	stream = begin(&p.a, "again", "stream");
	resize(LARGEST);
	put(LARGE - 4 * K, 4 * K, 7);
	OK(job(&p.a, "cancel", stream));
	OK(job(&p.a, "wait", stream));
	cr_assert_eq(list_of("again", r, 8, &h), 1);
	cr_assert(h.size == LARGE && r[0].off == LARGE - 4 * K && r[0].len == 4 * K);
}

/* ---- restoring ---- */

static int import(const char *name, const char *file, bool apply)
{
	json_t *args = json_pack("{s:s, s:s}", "name", name, "file", target(file));
	if (apply)
		json_object_set_new(args, "apply", json_true());
	return pair_do(&p.a, "import", args, NULL);
}

static void volume_is(struct pair_host *h, const char *name, const uint8_t *content)
{
	memset(buf, 0xa5, SIZE);
	OK(pair_read(h, name, 0, SIZE, buf));
	for (size_t i = 0; i < SIZE; i++)
		cr_assert(buf[i] == content[i], "%s: byte %zu is %u, not %u", name, i, buf[i], content[i]);
}

Test(jobs, a_restore_is_an_import_and_what_was_applied_is_replicated)
{
	put(0, SIZE / 2, 1);
	protect();
	uint64_t first = checkpoint();
	memcpy(then, model, SIZE);
	OK(pair_do(&p.b, "backup", args_for("full.zst", "full"), NULL));
	put(64 * K, 8 * K, 2);
	put(0, 4 * K, 0);
	checkpoint();
	json_t *args = args_for("inc", "incremental");
	json_object_set_new(args, "since", json_integer((json_int_t)first));
	OK(pair_do(&p.b, "backup", args, NULL));
	OK(import("r", "full.zst", false));
	volume_is(&p.a, "r", then);
	OK(import("r", "inc", true));
	volume_is(&p.a, "r", model);
	/* Back again, by what `none` saved. */
	json_int_t id = begin(&p.a, "none", "none");
	put(0, SIZE, 7);
	memcpy(then, model, SIZE);
	OK(job(&p.a, "cancel", id));
	OK(job(&p.a, "wait", id));
	OK(import("vm", "none", true));
	OK(import("vm", "inc", true));
	memset(model, 1, SIZE / 2);
	memset(model + SIZE / 2, 0, SIZE / 2);
	memset(model + 64 * K, 2, 8 * K);
	memset(model, 0, 4 * K);
	volume_is(&p.a, "vm", model);
	checkpoint(); /* applied there */
	for (uint64_t off = 0; off < SIZE; off += 4 * K)
		OK(pair_disk_is(&p.b, "vm", off, 4 * K, model[off]));
	cr_assert_eq(import("nobody", "inc", true), -ERR_NOENT);
	args = json_pack("{s:s, s:s, s:b}", "name", "vm", "file", target("inc"), "apply", 1);
	cr_assert_eq(pair_do(&p.b, "import", args, NULL), -ERR_STATE);
	struct gvol *v = gvol_find(p.a.d, "vm");
	struct gvol_handle *h;
	bool direct;
	OK(gvol_open(v, true, true, &h, &direct));
	cr_assert_eq(import("vm", "inc", true), -ERR_BUSY);
	gvol_release(h);
	gvol_unref(v);
}

/* ---- control ---- */

Test(jobs, pause_resume_cancel_wait_and_speed)
{
	put(0, SIZE, 1);
	json_t *args = args_for("p", "full");
	json_object_set_new(args, "speed", json_integer(1 << 20));
	uint64_t start = clock_mono_ns();
	json_int_t id = begin_with(&p.a, args);
	WAIT_FOR(number(&p.a, id, "copied") > 0);
	OK(job(&p.a, "pause", id));
	OK(job(&p.a, "pause", id));
	json_int_t before = number(&p.a, id, "copied");
	cr_assert_lt(before, (json_int_t)SIZE);
	cr_assert_eq(
	    pair_do(&p.a, "job", json_pack("{s:s, s:I, s:i}", "op", "wait", "id", id, "timeout_ms", 1500), NULL),
	    -ERR_TIMEOUT);
	cr_assert_eq(number(&p.a, id, "copied"), before);
	cr_assert(is(&p.a, id, "paused"));
	OK(job(&p.a, "resume", id));
	OK(job(&p.a, "wait", id));
	cr_assert_geq(clock_mono_ns() - start, 3 * NS_PER_SEC); /* the first MiB at once, then 1 MiB/s, and a pause */
	expect_file("p", model);
	cr_assert_eq(job(&p.a, "pause", id), -ERR_STATE);
	cr_assert(strstr(p.a.err.text, "it is done"), "%s", p.a.err.text);
	OK(job(&p.a, "wait", id)); /* again: its end is remembered */
	/* Cancelled, running or paused, it leaves nothing. */
	for (unsigned i = 0; i < 2; i++) {
		args = args_for("c", "full");
		json_object_set_new(args, "speed", json_integer(64 * 1024));
		id = begin_with(&p.a, args);
		if (i)
			OK(job(&p.a, "pause", id));
		OK(job(&p.a, "cancel", id));
		cr_assert_eq(job(&p.a, "wait", id), -ERR_CANCELED);
		cr_assert(is(&p.a, id, "cancelled"));
		nothing_of("c");
	}
	static const char *const ops[] = {"pause", "resume", "cancel", "wait"};
	for (unsigned i = 0; i < 4; i++)
		cr_assert_eq(job(&p.a, ops[i], 4711), -ERR_NOENT);
	cr_assert_eq(job(&p.a, "dance", 1), -ERR_USAGE);
}

Test(jobs, what_cannot_be_is_refused_before_anything)
{
	static const struct {
		const char *file, *sync, *key, *value;
		int code;
		const char *says;
	} bad[] = {
	    {"x", "some", NULL, NULL, ERR_USAGE, "--sync takes"},
	    {"x.zst", "stream", NULL, NULL, ERR_USAGE, "can't go to a .zst"},
	    {"x", "stream", "speed", "5", ERR_USAGE, "--speed does not go"},
	    {"x", "stream", "checkpoint", "5", ERR_USAGE, "begins now"},
	    {"x", "incremental", NULL, NULL, ERR_USAGE, "needs --since"},
	    {"x", "full", "since", "3", ERR_USAGE, "goes with --sync incremental"},
	    {"x", "full", "checkpoint", "3", ERR_NOENT, "no checkpoint 3"},
	    {"x", "full", "on_target_error", "explode", ERR_USAGE, "report, ignore, stop or enospc"},
	    {"none/x", "full", NULL, NULL, ERR_FAILED, "its folder must exist"},
	    {"taken", "full", NULL, NULL, ERR_EXIST, "the file exists"},
	};
	put(0, SIZE, 1);
	FILE *f = fopen(target("taken"), "w");
	cr_assert(f && fclose(f) == 0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		json_t *args = args_for(bad[i].file, bad[i].sync);
		if (bad[i].key)
			json_object_set_new(args, bad[i].key,
					    bad[i].value[0] <= '9' ? json_integer(atoi(bad[i].value))
								   : json_string(bad[i].value));
		cr_assert_eq(pair_do(&p.a, "backup", args, NULL), -bad[i].code, "%zu: %s", i, p.a.err.text);
		cr_assert(strstr(p.a.err.text, bad[i].says), "%zu: %s", i, p.a.err.text);
	}
	nothing_of("x");
	WAIT_FOR(n_checkpoints(&p.a) == 0);
	json_t *args = args_for("x", "full");
	json_object_set_new(args, "name", json_string("nobody"));
	cr_assert_eq(pair_do(&p.a, "backup", args, NULL), -ERR_NOENT);
	/* A volume that is read is not deleted. */
	args = args_for("x", "full");
	json_object_set_new(args, "speed", json_integer(1));
	json_int_t id = begin_with(&p.a, args);
	cr_assert_eq(pair_do(&p.a, "delete", named(), NULL), -ERR_BUSY);
	OK(job(&p.a, "cancel", id));
	(void)job(&p.a, "wait", id);
	OK(pair_do(&p.a, "delete", named(), NULL));
}

/* Files of this process can't grow past `size` for a while. The store's are as large as they get. */
static void limit(rlim_t size)
{
	struct rlimit r;
	signal(SIGXFSZ, SIG_IGN);
	cr_assert_eq(getrlimit(RLIMIT_FSIZE, &r), 0);
	r.rlim_cur = size;
	cr_assert_eq(setrlimit(RLIMIT_FSIZE, &r), 0);
}

Test(jobs, an_error_of_the_target_by_its_policy)
{
	static const char *const policies[] = {"report.zst", "enospc.zst", "stop.zst", "ignore.zst"};
	/* Frames that are as large as what is in them: the target outgrows the limit, the store's files do not. */
	for (size_t i = 0; i < SIZE; i++)
		model[i] = (uint8_t)rand();
	OK(pair_write_buf(&p.a, "vm", 0, SIZE / 4, model));
	for (unsigned i = 1; i < 4; i++)
		OK(pair_write_buf(&p.a, "vm", i * SIZE / 4, SIZE / 4, model + i * SIZE / 4));
	for (unsigned i = 0; i < 4; i++) {
		json_t *args = args_for(policies[i], "full");
		json_object_set_new(args, "on_target_error", json_stringn(policies[i], strlen(policies[i]) - 4));
		limit(SIZE / 2);
		json_int_t id = begin_with(&p.a, args);
		if (i < 2) { /* EFBIG is not ENOSPC */
			cr_assert_eq(job(&p.a, "wait", id), -ERR_IO);
			cr_assert(strstr(p.a.err.text, "writing "), "%s", p.a.err.text);
			cr_assert(is(&p.a, id, "failed"));
			nothing_of(policies[i]);
			limit(RLIM_INFINITY);
			continue;
		}
		if (i == 2) {
			WAIT_FOR(is(&p.a, id, "paused"));
			json_t *e = field(&p.a, id, "error");
			cr_assert_str_eq(json_string_value(json_object_get(e, "side")), "target");
			json_decref(e);
			OK(job(&p.a, "resume", id));
			WAIT_FOR(is(&p.a, id, "paused"));
		} else {
			WAIT_FOR(number(&p.a, id, "errors") > 0);
			cr_assert(is(&p.a, id, "running"));
		}
		limit(RLIM_INFINITY);
		if (i == 2)
			OK(job(&p.a, "resume", id));
		OK(job(&p.a, "wait", id));
		expect_file(policies[i], model);
		json_t *e = field(&p.a, id, "error");
		cr_assert(json_is_null(e));
		json_decref(e);
	}
}

/* The host again, on a store whose files fail on request. */
static void with_faults(struct faults *f)
{
	pair_host_stop(&p.a);
	p.a.faults = f;
	OK(pair_host_start(&p, &p.a));
}

Test(jobs, an_error_of_the_source_by_its_policy)
{
	static struct faults f = {.match = "disk.raw"};
	static const char *const policies[] = {"report", "stop", "ignore"};
	put(0, SIZE, 1);
	with_faults(&f);
	for (unsigned i = 0; i < 3; i++) {
		json_t *args = args_for(policies[i], "full");
		json_object_set_new(args, "on_source_error", json_string(policies[i]));
		atomic_store(&f.read, -ERR_IO);
		json_int_t id = begin_with(&p.a, args);
		if (i == 0) {
			cr_assert_eq(job(&p.a, "wait", id), -ERR_IO);
			cr_assert(strstr(p.a.err.text, "reading the volume at byte 0"), "%s", p.a.err.text);
			nothing_of("report");
			continue;
		}
		WAIT_FOR(i == 1 ? is(&p.a, id, "paused") : number(&p.a, id, "errors") > 0);
		json_t *e = field(&p.a, id, "error");
		cr_assert_str_eq(json_string_value(json_object_get(e, "side")), "source");
		json_decref(e);
		atomic_store(&f.read, 0);
		if (i == 1)
			OK(job(&p.a, "resume", id));
		OK(job(&p.a, "wait", id));
		expect_file(policies[i], model);
	}
}

/* Room for what a guest overwrites: its write goes on, the job does not. */
Test(jobs, a_checkpoint_that_was_given_up_fails_its_job)
{
	static struct faults f = {.match = "undo-"};
	put(0, SIZE, 1);
	with_faults(&f);
	json_t *args = args_for("none", "none");
	json_object_set_new(args, "on_source_error", json_string("stop")); /* no use in waiting for what is gone */
	json_int_t id = begin_with(&p.a, args);
	atomic_store(&f.write, -ERR_NOSPC);
	put(0, 64 * K, 2);
	cr_assert_eq(job(&p.a, "wait", id), -ERR_IO);
	cr_assert(strstr(p.a.err.text, "was given up to make room"), "%s", p.a.err.text);
	atomic_store(&f.write, 0);
	nothing_of("none");
	cr_assert_eq(pair_is(&p.a, "vm", 0, 64 * K, 2), 0);
}

Test(jobs, there_are_only_so_many)
{
	json_int_t ids[JOBS_MAX];
	char name[16];
	for (unsigned i = 0; i < JOBS_MAX; i++) {
		snprintf(name, sizeof(name), "s%u", i);
		ids[i] = begin(&p.a, name, "none");
	}
	cr_assert_eq(pair_do(&p.a, "backup", args_for("x", "full"), NULL), -ERR_LIMIT);
	nothing_of("x");
	for (unsigned i = 0; i < JOBS_MAX; i++) {
		OK(job(&p.a, "cancel", ids[i]));
		OK(job(&p.a, "wait", ids[i]));
	}
	OK(pair_do(&p.a, "backup", args_for("x", "full"), NULL));
	WAIT_FOR(n_checkpoints(&p.a) == 0);
}

/* While a step runs that pauses it, or before it knows that it is paused. */
Test(jobs, a_cancel_beside_the_step_that_pauses_it_holds)
{
	static struct faults f = {.match = "disk.raw"};
	put(0, SIZE, 1);
	with_faults(&f);
	for (unsigned i = 0; i < 2; i++) {
		json_t *args = args_for("x", "full");
		json_object_set_new(args, "on_source_error", json_string("stop"));
		atomic_store(&f.reading, 0);
		atomic_store(&f.hold_read, 1);
		atomic_store(&f.read, -ERR_IO);
		json_int_t id = begin_with(&p.a, args);
		WAIT_FOR(atomic_load(&f.reading) > 0);
		OK(job(&p.a, "cancel", id));
		atomic_store(&f.hold_read, 0);
		cr_assert_eq(job(&p.a, "wait", id), -ERR_CANCELED, "%s", p.a.err.text);
		nothing_of("x");
		atomic_store(&f.read, 0);
	}
}

static void *foreground(void *arg)
{
	int *ret = arg;
	struct err e = {0};
	json_t *result = NULL, *args = args_for("n", "none");
	json_object_set_new(args, "on_source_error", json_string("stop"));
	json_object_set_new(args, "timeout_ms", json_integer(1500));
	*ret = daemon_command(p.a.d, NULL, "backup", args, &result, &e);
	json_decref(args);
	json_decref(result);
	return NULL;
}

/* Its end can't be written, so it pauses again: who gave it up is told, and nothing of it is lost. */
Test(jobs, one_whose_end_fails_is_given_up_paused)
{
	static struct faults f = {.match = "vm/"};
	pthread_t t;
	int ret = 0;
	put(0, SIZE, 1);
	with_faults(&f);
	cr_assert_eq(pthread_create(&t, NULL, foreground, &ret), 0);
	WAIT_FOR(is(&p.a, 1, "running"));
	put(64 * K, 4 * K, 2);
	atomic_store(&f.read, -ERR_IO);
	(void)pthread_join(t, NULL);
	cr_assert_eq(ret, -ERR_TIMEOUT);
	cr_assert(is(&p.a, 1, "paused"));
	atomic_store(&f.read, 0);
	OK(job(&p.a, "resume", 1));
	OK(job(&p.a, "wait", 1));
	memset(then, 0, SIZE);
	memset(then + 64 * K, 1, 4 * K);
	expect_file("n", then);
}

/* Its end takes several steps, each of which knows that it is wanted. */
Test(jobs, a_paused_one_that_is_cancelled_comes_to_its_end)
{
	put(0, SIZE, 1);
	json_int_t id = begin(&p.a, "n", "none");
	OK(job(&p.a, "pause", id));
	put(0, SIZE, 2);
	OK(job(&p.a, "cancel", id));
	OK(job(&p.a, "wait", id));
	memset(then, 1, SIZE);
	expect_file("n", then);
}

/* The text of its error is cut, and not within a character: JSON would not take it, and say nothing of the job. */
Test(jobs, the_error_of_a_long_target_is_shown)
{
	for (size_t i = 0; i < SIZE; i++)
		model[i] = (uint8_t)rand();
	for (unsigned i = 0; i < 4; i++)
		OK(pair_write_buf(&p.a, "vm", i * SIZE / 4, SIZE / 4, model + i * SIZE / 4));
	for (unsigned i = 0; i < 2; i++) {
		char name[700], path[1000];
		size_t n = 0;
		name[n++] = 'x';
		for (unsigned k = 0; k < 2; k++) {
			for (unsigned c = 0; c < 125; c++) {
				name[n++] = '\xc3';
				name[n++] = '\xa9';
			}
			name[n] = '\0';
			snprintf(path, sizeof(path), "%s/%s", p.dir, name + i);
			(void)mkdir(path, 0700);
			name[n++] = '/';
		}
		snprintf(path, sizeof(path), "%s/%.*s/t.zst", p.dir, (int)(n - 1 - i), name + i);
		json_t *args = json_pack("{s:s, s:s, s:s}", "name", "vm", "target", path, "sync", "full");
		limit(SIZE / 2);
		json_int_t id = begin_with(&p.a, args);
		cr_assert_eq(job(&p.a, "wait", id), -ERR_IO);
		limit(RLIM_INFINITY);
		json_t *e = field(&p.a, id, "error");
		cr_assert(json_is_object(e), "%u", i);
		json_decref(e);
	}
}

/* ---- the end of the daemon ---- */

Test(jobs, a_daemon_that_ends_takes_its_jobs_along)
{
	put(0, SIZE, 1);
	json_t *args = args_for("full", "full");
	json_object_set_new(args, "speed", json_integer(1));
	begin_with(&p.a, args);
	begin(&p.a, "none", "none");
	json_int_t paused = begin(&p.a, "stream", "stream");
	OK(job(&p.a, "pause", paused));
	put(0, 64 * K, 2);
	pair_host_stop(&p.a);
	nothing_of("full");
	nothing_of("none");
	nothing_of("stream");
	OK(pair_host_start(&p, &p.a));
	cr_assert_eq(job(&p.a, "wait", 1), -ERR_NOENT);
	WAIT_FOR(n_checkpoints(&p.a) == 0);
	cr_assert_eq(pair_is(&p.a, "vm", 64 * K, SIZE - 64 * K, 1), 0);
	cr_assert_eq(pair_is(&p.a, "vm", 0, 64 * K, 2), 0);
}

static void *over_control(void *arg)
{
	char sock[300];
	const char *verb = arg;
	json_t *result = NULL, *args = NULL;
	struct err e = {0};
	(void)snprintf(sock, sizeof(sock), "%s/control.sock", p.a.store);
	if (strcmp(verb, "job") == 0)
		args = json_pack("{s:s, s:i}", "op", "pause", "id", 1);
	else
		args = args_for("target", verb);
	if (strcmp(verb, "none") == 0)
		json_object_set_new(args, "speed", json_integer(64 * K));
	int *ret = malloc(sizeof(*ret));
	*ret = ctl_call(sock, strcmp(verb, "job") == 0 ? verb : "backup", args, 0, NULL, NULL, &result, NULL, &e);
	json_decref(result);
	return ret;
}

static void *shut_down(void *arg)
{
	daemon_shutdown(p.a.d);
	atomic_store((atomic_bool *)arg, true);
	return NULL;
}

/* Whether a's end has got past the requests of the control socket, of which one waits; then `go` ends its wait. */
static void expect_end(pthread_t client, _Atomic int *go)
{
	pthread_t t;
	void *ret = NULL;
	atomic_bool done = false;
	cr_assert_eq(pthread_create(&t, NULL, shut_down, &done), 0);
	for (unsigned i = 0; i < 1000 && !atomic_load(&done); i++)
		(void)poll(NULL, 0, 5);
	bool in_time = atomic_load(&done);
	if (go)
		atomic_store(go, 0);
	cr_assert(in_time, "the end of the daemon waits for a request");
	(void)pthread_join(t, NULL);
	(void)pthread_join(client, &ret);
	cr_assert_eq(*(int *)ret, -ERR_CANCELED);
	free(ret);
}

/* Its end would be written for as long as its speed says. */
Test(jobs, a_daemon_that_ends_does_not_write_the_end_of_one_that_is_waited_for)
{
	pthread_t t;
	struct err e = {0};
	put(0, SIZE, 1);
	OK(daemon_serve_control(p.a.d, &e));
	cr_assert_eq(pthread_create(&t, NULL, over_control, (void *)"none"), 0);
	WAIT_FOR(is(&p.a, 1, "running"));
	put(0, SIZE, 2);
	expect_end(t, NULL);
	pair_host_stop(&p.a);
	nothing_of("target");
	OK(pair_host_start(&p, &p.a));
}

/* Something is under way in a's group: a save, which is held. */
static bool busy(void)
{
	struct group *g = daemon_group(p.a.d, "vm");
	mutex_lock(&g->lock);
	bool is = g->jobs > 0;
	mutex_unlock(&g->lock);
	group_unref(g);
	return is;
}

/* The disk under the store hangs: the record of the job's checkpoint is never saved. */
Test(jobs, a_daemon_that_ends_does_not_wait_for_a_hold)
{
	static struct faults f = {.match = "groups/"};
	pthread_t t;
	struct err e = {0};
	put(0, SIZE, 1);
	with_faults(&f);
	OK(daemon_serve_control(p.a.d, &e));
	atomic_store(&f.hold, 1);
	cr_assert_eq(pthread_create(&t, NULL, over_control, (void *)"full"), 0);
	WAIT_FOR(busy());
	expect_end(t, &f.hold);
}

/* The disk that it reads hangs, so the step under way does not end. The reads that have come before. */
static unsigned hung_disk(struct faults *f)
{
	struct err e = {0};
	put(0, SIZE, 1);
	with_faults(f);
	OK(daemon_serve_control(p.a.d, &e));
	atomic_store(&f->hold_read, 1);
	return atomic_load(&f->reading);
}

Test(jobs, a_daemon_that_ends_does_not_wait_for_a_pause)
{
	static struct faults f = {.match = "vm/"};
	pthread_t t;
	unsigned before = hung_disk(&f);
	begin(&p.a, "full", "full");
	WAIT_FOR(atomic_load(&f.reading) > before);
	cr_assert_eq(pthread_create(&t, NULL, over_control, (void *)"job"), 0);
	WAIT_FOR(is(&p.a, 1, "paused"));
	expect_end(t, &f.hold_read);
}

Test(jobs, a_daemon_that_ends_does_not_wait_for_the_step_of_one_that_is_waited_for)
{
	static struct faults f = {.match = "vm/"};
	pthread_t t;
	unsigned before = hung_disk(&f);
	cr_assert_eq(pthread_create(&t, NULL, over_control, (void *)"full"), 0);
	WAIT_FOR(atomic_load(&f.reading) > before);
	expect_end(t, &f.hold_read);
}
