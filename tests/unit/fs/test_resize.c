/* Growing a volume over two real daemons (tests/lib/pair.h): with writes beside it, refused, cut off, and what the
 * checkpoints show of it. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/store.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(8) << 20)
#define LARGER (SIZE + (UINT64_C(3) << 20) + 512)
static struct faults fa, fb;

static void setup(void)
{
	fa.match = fb.match = "/disk.raw";
	OK(pair_open_with(&p, &fa, &fb));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	OK(pair_write(&p.a, "vm", 0, 1 << 20, 0x11));
}

TestSuite(resize, .init = setup, .fini = teardown);

static int resize(struct pair_host *h, uint64_t size)
{
	return pair_do(h, "resize",
		       json_pack("{s:s, s:I, s:i}", "name", "vm", "size", (json_int_t)size, "timeout_ms", 60000), NULL);
}

static uint64_t size_of(struct pair_host *h)
{
	struct gvol *v = gvol_find(h->d, "vm");
	uint64_t size = gvol_size(v);
	gvol_unref(v);
	return size;
}

static uint64_t disk_size(struct pair_host *h)
{
	char path[512];
	struct stat st;
	(void)snprintf(path, sizeof(path), "%s/volumes/vm/disk.raw", h->store);
	cr_assert_eq(stat(path, &st), 0);
	return (uint64_t)st.st_size;
}

static int64_t checkpoint(void)
{
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", named(), &r));
	int64_t n = json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	return n;
}

static uint64_t ckpt_size(struct pair_host *h, int64_t n)
{
	struct gvol_attr a = {0};
	struct gvol *v = gvol_find(h->d, "vm");
	OK(gvol_attr(v, GVOL_CKPT, (uint64_t)n, &a));
	gvol_unref(v);
	return a.size;
}

static void same(void)
{
	OK(flush(&p.a));
	json_t *r = NULL;
	OK(pair_do(&p.a, "verify", named(), &r));
	cr_assert(json_is_true(json_object_get(r, "clean")));
	cr_assert_eq((uint64_t)json_integer_value(json_object_get(r, "bytes")), size_of(&p.a));
	json_decref(r);
}

Test(resize, both_hosts_grow_and_older_checkpoints_do_not)
{
	protect();
	int64_t before = checkpoint();
	OK(resize(&p.a, LARGER));
	cr_assert_eq(size_of(&p.a), LARGER);
	cr_assert_eq(size_of(&p.b), LARGER);
	cr_assert_eq(disk_size(&p.a), LARGER);
	cr_assert_eq(disk_size(&p.b), LARGER);
	OK(pair_is(&p.a, "vm", SIZE, LARGER - SIZE, 0));
	OK(pair_write(&p.a, "vm", LARGER - 65536, 65536, 0x22));
	int64_t after = checkpoint();
	OK(pair_is(&p.b, "vm", LARGER - 65536, 65536, 0x22));
	OK(pair_is(&p.b, "vm", 0, 1 << 20, 0x11));
	same();
	cr_assert_eq(ckpt_size(&p.b, before), SIZE);
	cr_assert_eq(ckpt_size(&p.b, after), LARGER);
	json_t *r = NULL;
	OK(pair_do(&p.b, "extents", json_pack("{s:s, s:I}", "name", "vm", "layer", (json_int_t)before), &r));
	cr_assert_eq((uint64_t)json_integer_value(json_object_get(r, "size")), SIZE);
	json_decref(r);
	char file[300];
	struct stat st;
	(void)snprintf(file, sizeof(file), "%s/out", p.dir);
	OK(pair_do(&p.b, "export",
		   json_pack("{s:s, s:I, s:s}", "name", "vm", "checkpoint", (json_int_t)before, "file", file), NULL));
	cr_assert_eq(stat(file, &st), 0);
	cr_assert_eq((uint64_t)st.st_size, SIZE);
	/* Going back to a smaller one keeps the new size, zeroes beyond. */
	json_t *args = named();
	json_object_set_new(args, "to", json_integer(before));
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.b, "failover", args, NULL));
	cr_assert_eq(size_of(&p.b), LARGER);
	OK(pair_is(&p.b, "vm", 0, 1 << 20, 0x11));
	OK(pair_is(&p.b, "vm", SIZE, LARGER - SIZE, 0));
	OK(pair_disk_is(&p.b, "vm", SIZE, LARGER - SIZE, 0));
}

Test(resize, sizes_survive_restarts_of_both)
{
	protect();
	int64_t before = checkpoint();
	OK(resize(&p.a, LARGER));
	OK(resize(&p.a, LARGER + 4096)); /* no checkpoint between them but the one that follows by itself */
	OK(pair_write(&p.a, "vm", LARGER, 4096, 0x33));
	int64_t after = checkpoint();
	pair_host_stop(&p.b);
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.b));
	OK(pair_host_start(&p, &p.a));
	in_sync();
	cr_assert_eq(size_of(&p.a), LARGER + 4096);
	cr_assert_eq(size_of(&p.b), LARGER + 4096);
	cr_assert_eq(ckpt_size(&p.b, before), SIZE);
	cr_assert_eq(ckpt_size(&p.b, after), LARGER + 4096);
	OK(pair_is(&p.a, "vm", LARGER, 4096, 0x33));
	same();
}

static uint64_t clone_size(const char *name)
{
	uint64_t size = 0;
	struct gvol *v = gvol_find_clone(p.b.d, name);
	if (v)
		size = gvol_size(v);
	gvol_unref(v);
	return size;
}

static void make_clone(int64_t ckpt, const char *name, uint64_t size)
{
	json_t *r = NULL;
	OK(pair_do(&p.b, "clone",
		   json_pack("{s:s, s:I, s:s}", "name", "vm", "checkpoint", (json_int_t)ckpt, "clone", name), &r));
	cr_assert_eq((uint64_t)json_integer_value(json_object_get(r, "size")), size);
	json_decref(r);
	WAIT_FOR(clone_size(name) == size);
}

Test(resize, clones_have_the_size_of_their_checkpoints)
{
	protect();
	int64_t before = checkpoint();
	make_clone(before, "early", SIZE);
	OK(resize(&p.a, LARGER));
	int64_t after = checkpoint();
	cr_assert_eq(clone_size("early"), SIZE); /* it does not follow */
	make_clone(before, "late", SIZE);
	make_clone(after, "new", LARGER);
	pair_host_stop(&p.b);
	OK(pair_host_start(&p, &p.b));
	cr_assert_eq(clone_size("early"), SIZE);
	cr_assert_eq(clone_size("late"), SIZE);
	cr_assert_eq(clone_size("new"), LARGER);
}

static atomic_bool guest_ends;

static void *guest(void *arg)
{
	const char *failed = NULL;
	(void)arg;
	for (unsigned n = 1; !atomic_load(&guest_ends) && !failed; n++) {
		uint64_t size = size_of(&p.a), off = (uint64_t)(n * 7919U) * 512 % (size - 4096);
		if (pair_write(&p.a, "vm", off, 4096, (uint8_t)(n | 1)) != 0)
			failed = "a write";
		else if (n % 50 == 0 && pair_write(&p.a, "vm", size - 512, 512, 0x55) != 0)
			failed = "a write at the end";
	}
	return (void *)failed;
}

Test(resize, guests_write_meanwhile_also_to_the_new_part)
{
	pthread_t t[2];
	void *failed;
	protect();
	set("queue_max", "4M");
	for (unsigned i = 0; i < 2; i++)
		cr_assert_eq(pthread_create(&t[i], NULL, guest, NULL), 0);
	for (unsigned i = 1; i <= 8; i++) {
		OK(resize(&p.a, SIZE + (uint64_t)i * 1536 * 512));
		if (i % 3 == 0)
			(void)checkpoint();
	}
	atomic_store(&guest_ends, true);
	for (unsigned i = 0; i < 2; i++) {
		cr_assert_eq(pthread_join(t[i], &failed), 0);
		cr_assert_null(failed, "%s", (char *)failed);
	}
	same();
	cr_assert_eq(size_of(&p.b), SIZE + 8 * 1536 * 512);
}

Test(resize, refused_where_it_can_not_be)
{
	OK(resize(&p.a, SIZE + 512)); /* standalone */
	cr_assert_eq(size_of(&p.a), SIZE + 512);
	cr_assert_eq(resize(&p.a, SIZE), -ERR_RANGE);
	cr_assert(strstr(p.a.err.text, "never shrinks"), "%s", p.a.err.text);
	cr_assert_neq(resize(&p.a, SIZE + 513), 0);
	protect();
	OK(resize(&p.a, SIZE + 512)); /* as it is */
	cr_assert_eq(resize(&p.b, LARGER), -ERR_STATE);
	cr_assert(strstr(p.b.err.text, "primary"), "%s", p.b.err.text);
	OK(pair_do(&p.a, "pause", named(), NULL));
	OK(pair_wait_link(&p.a, "vm", "RESYNC"));
	cr_assert_eq(resize(&p.a, LARGER), -ERR_STATE);
	OK(pair_do(&p.a, "resume", named(), NULL));
	in_sync();
	pair_host_stop(&p.b);
	OK(pair_wait_link(&p.a, "vm", "DOWN"));
	cr_assert_eq(resize(&p.a, LARGER), -ERR_STATE);
	cr_assert_eq(size_of(&p.a), SIZE + 512);
}

/* One host has recorded it and the other has not, as after a kill between the two: the smaller one grows with the next
 * handshake, whoever dials. */
static void half_done(struct pair_host *h)
{
	struct pair_host *other = h == &p.a ? &p.b : &p.a;
	protect();
	int64_t before = checkpoint();
	OK(pair_write(&p.a, "vm", SIZE - 4096, 4096, 0x41));
	pair_host_stop(&p.a);
	pair_host_stop(&p.b);
	char path[512];
	struct store *st = NULL;
	struct repl_meta *m = NULL;
	(void)snprintf(path, sizeof(path), "%s/volumes/vm/disk.raw", h->store);
	cr_assert_eq(truncate(path, (off_t)LARGER), 0);
	OK(store_open(h->store, 0, -1, &st, &h->err));
	OK(store_load_group(st, "vm", &m, &h->err));
	OK(repl_meta_grow(m, 0, LARGER));
	OK(store_save_group(st, m, &h->err));
	free(m);
	store_close(st);
	OK(pair_host_start(&p, &p.b));
	OK(pair_host_start(&p, &p.a));
	in_sync();
	cr_assert_eq(size_of(other), LARGER);
	cr_assert_eq(disk_size(other), LARGER);
	OK(pair_write(&p.a, "vm", LARGER - 4096, 4096, 0x42));
	(void)checkpoint();
	OK(pair_is(&p.b, "vm", LARGER - 4096, 4096, 0x42));
	OK(pair_is(&p.b, "vm", SIZE - 4096, 4096, 0x41));
	cr_assert_eq(ckpt_size(&p.b, before), SIZE);
	same();
}

Test(resize, a_secondary_that_has_it_alone_takes_its_primary_along)
{
	half_done(&p.b);
}

Test(resize, a_primary_that_has_it_alone_takes_its_secondary_along)
{
	half_done(&p.a);
}

/* Cut off before any record: the longer file is cut back. */
Test(resize, a_longer_file_without_a_record_is_cut_back)
{
	protect();
	pair_host_stop(&p.a);
	char path[512];
	(void)snprintf(path, sizeof(path), "%s/volumes/vm/disk.raw", p.a.store);
	cr_assert_eq(truncate(path, (off_t)LARGER), 0);
	OK(pair_host_start(&p, &p.a));
	in_sync();
	cr_assert_eq(disk_size(&p.a), SIZE);
	OK(resize(&p.a, LARGER));
	same();
}

/* A survivor grows alone, writes its new part, and fails back. */
Test(resize, a_survivor_grows_alone_and_its_old_primary_follows)
{
	protect();
	pair_host_stop(&p.a);
	json_t *args = named();
	json_object_set_new(args, "wait", json_true());
	OK(pair_do(&p.b, "failover", args, NULL));
	OK(resize(&p.b, LARGER));
	OK(pair_write(&p.b, "vm", LARGER - 4096, 4096, 0x61));
	OK(pair_is(&p.b, "vm", SIZE, LARGER - 4096 - SIZE, 0));
}
