/* Save before change under faults: every I/O of every operation failing in turn, power cuts and kills at any I/O, what
 * a batch costs, and holes. */
#include <criterion/criterion.h>
#include <stdint.h>
#include <string.h>

#include "core/err.h"
#include "tests/unit/image/crashstore.h"
#include "tests/lib/faultstore.h"
#include "tests/unit/image/tmpdir.h"
#include "tests/unit/image/volmodel.h"

#define ODD_SIZE ((UINT64_C(40) << BLOCK_SHIFT) + 1536)

/* ---- a storage whose n-th operation fails ---- */

struct fault_store {
	struct storage storage;
	struct storage *inner;
	long left;   /* operations until the fault; < 0: none */
	bool sticky; /* the fault stays */
	bool tripped;
	int code;
	unsigned reads, writes, zeroes, syncs;
};

struct fault_disk {
	struct disk disk;
	struct disk *inner;
	struct fault_store *f;
};

static struct fault_store *fault_store(struct storage *s)
{
	return CONTAINER_OF(s, struct fault_store, storage);
}

static struct fault_disk *fault_disk(struct disk *d)
{
	return CONTAINER_OF(d, struct fault_disk, disk);
}

static bool fault_now(struct fault_store *f)
{
	if (f->tripped && f->sticky)
		return true;
	if (f->left < 0 || f->left-- > 0)
		return false;
	return f->tripped = true;
}

static int f_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	fault_disk(d)->f->reads++;
	return fault_now(fault_disk(d)->f) ? -ERR_IO : disk_read(fault_disk(d)->inner, off, buf, len);
}

static int f_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	struct fault_disk *fd = fault_disk(d);

	fd->f->writes++;
	if (!fault_now(fd->f))
		return disk_write(fd->inner, off, buf, len);
	/* Half of it gets through. */
	cr_assert_eq(disk_write(fd->inner, off, buf, round_down_u64(len / 2, 4)), 0);
	return fd->f->code;
}

static int f_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	struct fault_disk *fd = fault_disk(d);

	fd->f->zeroes++;
	return fault_now(fd->f) ? fd->f->code : disk_zero(fd->inner, off, len, punch);
}

static int f_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	return fault_now(fault_disk(d)->f) ? -ERR_IO : disk_extent(fault_disk(d)->inner, off, end, ret);
}

static int f_sync(struct disk *d)
{
	fault_disk(d)->f->syncs++;
	return fault_now(fault_disk(d)->f) ? -ERR_IO : disk_sync(fault_disk(d)->inner);
}

static int f_set_size(struct disk *d, uint64_t size)
{
	return fault_now(fault_disk(d)->f) ? fault_disk(d)->f->code : disk_set_size(fault_disk(d)->inner, size);
}

static int f_get_size(struct disk *d, uint64_t *ret)
{
	return fault_now(fault_disk(d)->f) ? -ERR_IO : disk_get_size(fault_disk(d)->inner, ret);
}

static int f_allocated(struct disk *d, uint64_t *ret)
{
	return disk_allocated(fault_disk(d)->inner, ret);
}

static void f_disk_close(struct disk *d)
{
	disk_close(fault_disk(d)->inner);
	free(fault_disk(d));
}

static const struct disk_ops f_disk_ops = {f_read,     f_write,	   f_zero,	f_extent,     f_sync,
					   f_set_size, f_get_size, f_allocated, f_disk_close, NULL};

static int f_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	struct fault_disk *fd;
	struct disk *inner;
	int rc =
	    fault_now(fault_store(s)) ? fault_store(s)->code : storage_open(fault_store(s)->inner, path, flags, &inner);

	if (rc < 0)
		return rc;
	fd = calloc(1, sizeof(*fd));
	*fd = (struct fault_disk){{&f_disk_ops}, inner, fault_store(s)};
	*ret = &fd->disk;
	return 0;
}

static int f_unlink(struct storage *s, const char *path)
{
	return fault_now(fault_store(s)) ? -ERR_IO : storage_unlink(fault_store(s)->inner, path);
}

static int f_rename(struct storage *s, const char *from, const char *to)
{
	return fault_now(fault_store(s)) ? -ERR_IO : storage_rename(fault_store(s)->inner, from, to);
}

static int f_mkdir(struct storage *s, const char *path)
{
	return fault_now(fault_store(s)) ? fault_store(s)->code : storage_mkdir(fault_store(s)->inner, path);
}

static int f_rmdir(struct storage *s, const char *path)
{
	return fault_now(fault_store(s)) ? -ERR_IO : storage_rmdir(fault_store(s)->inner, path);
}

static int f_sync_dir(struct storage *s, const char *path)
{
	return fault_now(fault_store(s)) ? -ERR_IO : storage_sync_dir(fault_store(s)->inner, path);
}

static int f_list(struct storage *s, const char *path, int (*fn)(void *, const char *), void *arg)
{
	return fault_now(fault_store(s)) ? -ERR_IO : storage_list(fault_store(s)->inner, path, fn, arg);
}

static const struct storage_ops f_ops = {.open = f_open,
					 .unlink = f_unlink,
					 .rename = f_rename,
					 .mkdir = f_mkdir,
					 .rmdir = f_rmdir,
					 .sync_dir = f_sync_dir,
					 .list = f_list};

static void fault_init(struct fault_store *f, struct storage *inner)
{
	*f = (struct fault_store){.storage = {&f_ops}, .inner = inner, .left = -1, .code = -ERR_NOSPC};
}

static void fault_clear(struct fault_store *f)
{
	f->left = -1;
	f->tripped = false;
}

/* ---- each operation with each of its I/Os failing ---- */

struct faulty {
	struct tmp_store t;
	struct fault_store f;
	struct model m;
};

/* Three checkpoints, data, holes, and an active overlay. */
static void faulty_init(struct faulty *x, enum volume_durability dur, uint64_t seed)
{
	tmp_store_open(&x->t);
	fault_init(&x->f, x->t.storage);
	model_init(&x->m, &x->f.storage, ODD_SIZE, dur, seed);
	for (unsigned i = 0; i < 3; i++) {
		model_write(&x->m);
		model_checkpoint(&x->m, i == 0);
		model_write(&x->m);
		model_write_active(&x->m);
	}
	x->m.base = x->m.ckpts[1].number;
}

static void faulty_free(struct faulty *x)
{
	model_free(&x->m);
	tmp_store_close(&x->t);
}

static void check_images(struct model *m)
{
	uint8_t *buf = malloc(m->size);

	for (unsigned i = 0; i < m->n_ckpts; i++) {
		memset(buf, POISON, m->size);
		cr_assert_eq(volume_read_ckpt(m->v, m->ckpts[i].number, 0, m->size, buf), 0);
		model_compare(m, "checkpoint after the fault", m->ckpts[i].number, buf, m->ckpts[i].image, 0, m->size);
	}
	free(buf);
}

/* The disk is as modelled, except in requests that failed on the disk itself. */
static void check_disk_but(struct model *m, const struct volume_req *reqs, unsigned n)
{
	uint8_t *buf = malloc(m->size);

	memset(buf, POISON, m->size);
	cr_assert_eq(volume_read_disk(m->v, 0, m->size, buf), 0);
	for (unsigned i = 0; i < n; i++)
		if (reqs[i].error && !reqs[i].save_failed)
			memcpy(buf + reqs[i].off, m->disk + reqs[i].off, reqs[i].len);
	model_compare(m, "disk after the fault", 0, buf, m->disk, 0, m->size);
	free(buf);
}

/* The operations return whether the fault was met. Faults are off when they return. */
static bool try_writes(struct faulty *x, struct volume_req *reqs, unsigned n)
{
	int rc = volume_write(x->m.v, reqs, n), first = 0;
	bool tripped = x->f.tripped;

	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	for (unsigned i = 0; i < n; i++) {
		if (first == 0)
			first = reqs[i].error;
		cr_assert(reqs[i].error == 0 || reqs[i].error == -ERR_IO || reqs[i].error == -ERR_NOSPC);
		cr_assert(reqs[i].error || !reqs[i].save_failed);
		if (reqs[i].error == 0)
			model_did_write(&x->m, &reqs[i]);
	}
	cr_assert_eq(rc, first);
	check_disk_but(&x->m, reqs, n);
	check_images(&x->m);
	for (unsigned i = 0; i < n; i++)
		if (reqs[i].error) {
			struct volume_req again = reqs[i];

			cr_assert_eq(volume_write(x->m.v, &again, 1), 0);
			model_did_write(&x->m, &again);
		}
	return tripped;
}

static bool try_batch(struct faulty *x, long left)
{
	struct volume_req reqs[MODEL_BATCH];
	uint8_t *bufs[MODEL_BATCH];
	unsigned n = model_batch(&x->m, reqs, bufs);
	bool tripped;

	x->f.left = left;
	tripped = try_writes(x, reqs, n);
	for (unsigned i = 0; i < n; i++)
		free(bufs[i]);
	return tripped;
}

static bool try_discard(struct faulty *x, long left)
{
	struct volume_req r = {.kind = VOLUME_DISCARD, .off = 100, .len = ODD_SIZE - 300};

	x->f.left = left;
	return try_writes(x, &r, 1);
}

static bool try_checkpoint(struct faulty *x, long left)
{
	uint64_t number = x->m.last_number + 5;
	struct err e = {0};
	bool tripped;
	int rc;

	x->f.left = left;
	rc = volume_prepare(x->m.v, number, x->m.active_id + 1, &e);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	cr_assert(rc == 0 || e.text[0]);
	check_images(&x->m);
	if (tripped)
		cr_assert_eq(volume_prepare(x->m.v, number, x->m.active_id + 1, NULL), 0);
	volume_switch(x->m.v, number, ++x->m.active_id);
	model_did_checkpoint(&x->m, number);
	model_empty_active(&x->m);
	return tripped;
}

static bool try_merge(struct faulty *x, long left)
{
	bool tripped;
	int rc;

	x->f.left = left;
	rc = volume_merge_into_older(x->m.v, x->m.ckpts[1].number);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	check_images(&x->m);
	model_drop(&x->m, 1);
	return tripped;
}

static bool try_commit(struct faulty *x, long left)
{
	uint64_t written = 77;
	bool tripped;
	int rc;

	x->f.left = left;
	rc = volume_commit(x->m.v, x->m.base, 0, ODD_SIZE, &written);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	cr_assert(rc == 0 || written == 77);
	check_images(&x->m);
	cr_assert_eq(volume_commit(x->m.v, x->m.base, 0, ODD_SIZE, &written), 0);
	model_view(&x->m, x->m.disk);
	model_touch(&x->m, 0, ODD_SIZE);
	return tripped;
}

static bool try_active(struct faulty *x, long left)
{
	uint8_t buf[5 * BLOCK_SIZE], *view = malloc(ODD_SIZE), *got = malloc(ODD_SIZE);
	struct volume_req r = {.kind = VOLUME_WRITE, .off = 9 * BLOCK_SIZE + 77, .len = sizeof(buf), .buf = buf};
	uint64_t first = 9 * BLOCK_SIZE, end = first + 6 * BLOCK_SIZE;
	bool tripped;
	int rc;

	model_fill(&x->m, buf, sizeof(buf));
	x->f.left = left;
	rc = volume_write_active(x->m.v, x->m.base, &r);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	cr_assert_eq(r.error, rc);
	/* What its files say that it holds, unless it knows that they may say more. */
	char path[64];
	struct overlay *o;

	snprintf(path, sizeof(path), "volumes/vol/active-%u", (unsigned)x->m.active_id);
	cr_assert_eq(overlay_open(&x->f.storage, path, ODD_SIZE, &o, NULL), 0);
	cr_assert(overlay_count(o) == volume_active_blocks(x->m.v) || volume_active_unsure(x->m.v));
	cr_assert(tripped || !volume_active_unsure(x->m.v));
	overlay_close(o);
	check_images(&x->m);
	model_view(&x->m, view);
	cr_assert_eq(volume_read_view(x->m.v, x->m.base, 0, first, got), 0);
	model_compare(&x->m, "view below", 0, got, view, 0, first);
	cr_assert_eq(volume_read_view(x->m.v, x->m.base, end, ODD_SIZE - end, got), 0);
	model_compare(&x->m, "view above", 0, got, view + end, end, ODD_SIZE - end);
	cr_assert_eq(volume_write_active(x->m.v, x->m.base, &r), 0);
	if (tripped) {
		/* What the failed write left in its first and last block is not known: write them whole. */
		for (unsigned i = 0; i < 2; i++) {
			struct volume_req whole = {.kind = VOLUME_WRITE, .len = BLOCK_SIZE, .buf = buf};

			whole.off = i ? end - BLOCK_SIZE : first;
			cr_assert_eq(volume_write_active(x->m.v, x->m.base, &whole), 0);
			model_did_write_active(&x->m, &whole);
		}
		cr_assert_eq(volume_write_active(x->m.v, x->m.base, &r), 0);
	}
	model_did_write_active(&x->m, &r);
	free(view);
	free(got);
	return tripped;
}

static bool try_open(struct faulty *x, long left)
{
	uint64_t numbers[MODEL_CKPTS];
	struct volume_open_args a = {.name = "vol",
				     .size = ODD_SIZE,
				     .durability = x->m.dur,
				     .ckpts = numbers,
				     .n_ckpts = x->m.n_ckpts,
				     .active_id = x->m.active_id};
	struct volume *v = NULL;
	struct err e = {0};
	bool tripped;
	int rc;

	for (unsigned i = 0; i < x->m.n_ckpts; i++)
		numbers[i] = x->m.ckpts[i].number;
	cr_assert_eq(volume_prepare(x->m.v, 1000, 1000, NULL), 0);
	volume_close(x->m.v); /* leaves leftovers */
	x->f.left = left;
	rc = volume_open(&x->f.storage, &a, &v, &e);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	cr_assert((rc == 0) == (v != NULL));
	cr_assert(rc == 0 || e.text[0]);
	x->m.v = v;
	if (rc < 0)
		model_open_volume(&x->m);
	return tripped;
}

static bool try_create(struct faulty *x, long left)
{
	struct err e = {0};
	bool tripped;
	int rc;

	x->f.left = left;
	rc = volume_create(&x->f.storage, "other", 8192, x->m.dur, &e);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	/* Nothing is left of one that failed. */
	if (rc < 0)
		cr_assert_eq(volume_create(&x->f.storage, "other", 8192, x->m.dur, &e), 0, "%s", e.text);
	cr_assert_eq(volume_delete(&x->f.storage, "other", NULL), 0);
	return tripped;
}

static bool try_resize(struct faulty *x, long left)
{
	bool tripped;
	int rc;

	x->f.left = left;
	rc = volume_resize(x->m.v, ODD_SIZE + 4096);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	cr_assert_eq(volume_size(x->m.v), rc == 0 ? ODD_SIZE + 4096 : ODD_SIZE);
	check_images(&x->m);
	if (rc == 0) { /* back to what the model knows */
		x->m.v = (volume_close(x->m.v), NULL);
		struct disk *d;

		cr_assert_eq(storage_open(&x->f.storage, "volumes/vol/disk.raw", 0, &d), 0);
		cr_assert_eq(disk_set_size(d, ODD_SIZE), 0);
		disk_close(d);
		model_open_volume(&x->m);
	}
	return tripped;
}

static bool try_sync(struct faulty *x, long left)
{
	bool tripped;
	int rc;

	x->f.left = left;
	rc = volume_sync(x->m.v);
	if (rc == 0)
		rc = volume_sync_active(x->m.v);
	tripped = x->f.tripped;
	fault_clear(&x->f);
	cr_assert_eq(rc < 0, tripped);
	return tripped;
}

static void every_fault(bool (*try_op)(struct faulty *x, long left), enum volume_durability dur, uint64_t seeds)
{
	for (uint64_t seed = 1; seed <= seeds; seed++) {
		bool tripped = true;

		for (long left = 0; tripped; left++) {
			struct faulty x;

			cr_assert_lt(left, 1000);
			faulty_init(&x, dur, seed);
			x.f.code = left % 2 ? -ERR_IO : -ERR_NOSPC;
			tripped = try_op(&x, left);
			cr_assert(left > 0 || tripped, "this operation does no I/O at all");
			model_check(&x.m);
			model_reopen(&x.m);
			model_check(&x.m);
			faulty_free(&x);
		}
	}
}

#define FAULT_TEST(op, seeds)                                                                                          \
	Test(cow_fault, op)                                                                                            \
	{                                                                                                              \
		every_fault(try_##op, DURABILITY_PROCESS, seeds);                                                      \
		every_fault(try_##op, DURABILITY_POWER, 1);                                                            \
	}

FAULT_TEST(batch, 2)
FAULT_TEST(discard, 1)
FAULT_TEST(checkpoint, 1)
FAULT_TEST(merge, 1)
FAULT_TEST(commit, 1)
FAULT_TEST(active, 2)
FAULT_TEST(open, 1)
FAULT_TEST(create, 1)
FAULT_TEST(resize, 1)
FAULT_TEST(sync, 1)

Test(cow_fault, over_a_base)
{
	struct tmp_store t;

	tmp_store_open(&t);
	model_over_open(&t, ODD_SIZE * 2 / 3 / 512 * 512);
	every_fault(try_batch, DURABILITY_POWER, 1);
	every_fault(try_discard, DURABILITY_PROCESS, 1);
	every_fault(try_sync, DURABILITY_POWER, 1);
	model_over_close();
	tmp_store_close(&t);
}

/* No room for old blocks, and it stays so: the disk is untouched, every write says so, images stay; a request whose
 * blocks are saved already goes through. */
Test(cow_fault, no_room_for_saving)
{
	struct faulty x;
	uint8_t buf[BLOCK_SIZE];
	struct volume_req saved = {.kind = VOLUME_WRITE, .off = 0, .len = BLOCK_SIZE, .buf = buf};
	struct volume_req reqs[3];

	faulty_init(&x, DURABILITY_POWER, 3);
	memset(buf, 1, sizeof(buf));
	for (uint64_t b = 0; b < 40; b += 10) {
		saved.off = b * BLOCK_SIZE;
		cr_assert_eq(volume_write(x.m.v, &saved, 1), 0);
		model_did_write(&x.m, &saved);
	}
	model_checkpoint(&x.m, false);
	saved.off = 0;
	cr_assert_eq(volume_write(x.m.v, &saved, 1), 0);
	model_did_write(&x.m, &saved);
	memset(buf, 2, sizeof(buf));
	reqs[0] = (struct volume_req){.kind = VOLUME_WRITE, .off = 10 * BLOCK_SIZE, .len = BLOCK_SIZE, .buf = buf};
	reqs[1] = saved;
	reqs[2] = (struct volume_req){.kind = VOLUME_WRITE, .off = 20 * BLOCK_SIZE + 5, .len = 100, .buf = buf};
	x.f.left = 1; /* after the first read of old content: the overlay's write */
	cr_assert_eq(volume_write(x.m.v, reqs, 3), -ERR_NOSPC);
	cr_assert(reqs[0].error == -ERR_NOSPC && reqs[0].save_failed);
	cr_assert(reqs[1].error == 0 && !reqs[1].save_failed);
	cr_assert(reqs[2].error == -ERR_NOSPC && reqs[2].save_failed);
	fault_clear(&x.f);
	model_did_write(&x.m, &reqs[1]);
	model_check(&x.m);
	faulty_free(&x);
}

/* ---- what a batch costs ---- */

Test(cow, a_batch_costs_one_sync_a_phase_and_nothing_once_saved)
{
	struct tmp_store t;
	struct fault_store f;
	struct model m;
	static uint8_t buf[BLOCK_SIZE];
	static struct volume_req reqs[VOLUME_BATCH_MAX];

	tmp_store_open(&t);
	fault_init(&f, t.storage);
	model_init(&m, &f.storage, UINT64_C(3) << 20, DURABILITY_POWER, 1);
	memset(buf, 6, sizeof(buf));
	for (unsigned i = 0; i < VOLUME_BATCH_MAX; i++)
		reqs[i] =
		    (struct volume_req){.kind = VOLUME_WRITE, .off = (uint64_t)i * 2 * 4096, .len = 4096, .buf = buf};
	f.syncs = f.reads = f.writes = 0;
	cr_assert_eq(volume_write(m.v, reqs, VOLUME_BATCH_MAX), 0);
	cr_assert_eq(f.writes, VOLUME_BATCH_MAX);
	cr_assert_eq(f.syncs + f.reads, 0, "no chain, nothing to save");
	model_checkpoint(&m, false);
	f.syncs = f.reads = f.writes = 0;
	cr_assert_eq(volume_write(m.v, reqs, VOLUME_BATCH_MAX), 0);
	cr_assert_eq(f.syncs, 2, "data and map");
	cr_assert_eq(f.reads, VOLUME_BATCH_MAX);
	cr_assert_eq(volume_undo_blocks(m.v, 0), VOLUME_BATCH_MAX);
	f.syncs = f.reads = f.writes = 0;
	cr_assert_eq(volume_write(m.v, reqs, VOLUME_BATCH_MAX), 0);
	cr_assert_eq(f.syncs + f.reads, 0, "saved already");
	cr_assert_eq(f.writes, VOLUME_BATCH_MAX);
	/* Neighbours, in no order: one read, one write of data, one of words. */
	model_checkpoint(&m, false);
	for (unsigned i = 0; i < VOLUME_BATCH_MAX; i++)
		reqs[i].off = (uint64_t)(i * 37 % VOLUME_BATCH_MAX) * 4096;
	f.syncs = f.reads = f.writes = 0;
	cr_assert_eq(volume_write(m.v, reqs, VOLUME_BATCH_MAX), 0);
	cr_assert_eq(f.reads, 1);
	cr_assert_eq(f.syncs, 2);
	cr_assert_leq(f.writes, VOLUME_BATCH_MAX + VOLUME_BATCH_MAX / 2 + 1);
	model_free(&m);
	tmp_store_close(&t);
}

/* More runs than one round takes. */
Test(cow, a_batch_of_more_runs_than_a_round)
{
	struct tmp_store t;
	struct model m;
	static struct volume_req reqs[VOLUME_BATCH_MAX];
	uint8_t *buf = malloc(UINT64_C(2) << 20);

	tmp_store_open(&t);
	model_init(&m, t.storage, UINT64_C(44) << 20, DURABILITY_PROCESS, 1);
	memset(buf, 3, UINT64_C(2) << 20);
	/* Every second block below 40 MiB is in the overlay: 5120 runs are missing. */
	for (uint64_t off = 0; off < UINT64_C(40) << 20; off += 8192) {
		struct volume_req r = {.kind = VOLUME_WRITE, .off = off + 4096, .len = 4096, .buf = buf};

		cr_assert_eq(volume_write(m.v, &r, 1), 0);
		model_did_write(&m, &r);
	}
	model_checkpoint(&m, false);
	for (uint64_t off = 0; off < UINT64_C(40) << 20; off += 8192) {
		struct volume_req r = {.kind = VOLUME_WRITE, .off = off, .len = 4096, .buf = buf};

		cr_assert_eq(volume_write(m.v, &r, 1), 0);
		model_did_write(&m, &r);
	}
	memset(buf, 4, UINT64_C(2) << 20);
	for (uint64_t i = 0; i < VOLUME_BATCH_MAX; i++)
		reqs[i] =
		    (struct volume_req){.kind = VOLUME_WRITE, .off = i * 171 * 1024, .len = 172 * 1024, .buf = buf};
	cr_assert_eq(volume_write(m.v, reqs, VOLUME_BATCH_MAX), 0);
	for (unsigned i = 0; i < VOLUME_BATCH_MAX; i++)
		model_did_write(&m, &reqs[i]);
	model_check(&m);
	model_free(&m);
	tmp_store_close(&t);
	free(buf);
}

/* More blocks than one round takes, in one request; the old content is holes, so little is written for it. */
Test(cow, a_request_of_more_blocks_than_a_round)
{
	struct tmp_store t;
	struct model m;
	uint64_t size = UINT64_C(258) << 20;
	struct volume_req r = {.kind = VOLUME_WRITE, .off = 100, .len = size - 5000, .buf = calloc(1, size)};
	uint8_t byte = 9, got[BLOCK_SIZE];
	struct volume_req last = {.kind = VOLUME_WRITE, .off = size - 5001, .len = 1, .buf = &byte};

	cr_assert_not_null(r.buf);
	tmp_store_open(&t);
	model_init(&m, t.storage, size, DURABILITY_PROCESS, 1);
	cr_assert_eq(volume_write(m.v, &last, 1), 0);
	model_did_write(&m, &last);
	model_checkpoint(&m, false);
	cr_assert_eq(volume_write(m.v, &r, 1), 0);
	cr_assert_eq(volume_undo_blocks(m.v, 0), m.blocks - 1);
	memset(got, POISON, sizeof(got));
	cr_assert_eq(volume_read_ckpt(m.v, m.last_number, size - 2 * BLOCK_SIZE, BLOCK_SIZE, got), 0);
	cr_assert_arr_eq(got, m.disk + size - 2 * BLOCK_SIZE, BLOCK_SIZE);
	cr_assert_eq(got[2 * BLOCK_SIZE - 5001], 9);
	free((void *)(uintptr_t)r.buf);
	model_free(&m);
	tmp_store_close(&t);
}

/* Against the contract, but not a reason to lose data. */
Test(cow, a_block_twice_in_a_batch)
{
	struct tmp_store t;
	struct model m;
	uint8_t buf[8192];
	struct volume_req reqs[] = {{.kind = VOLUME_WRITE, .off = 4096, .len = 8192, .buf = buf},
				    {.kind = VOLUME_WRITE, .off = 8192 + 100, .len = 700, .buf = buf},
				    {.kind = VOLUME_ZERO, .off = 4096 + 10, .len = 9000}};

	tmp_store_open(&t);
	model_init(&m, t.storage, ODD_SIZE, DURABILITY_PROCESS, 1);
	model_write(&m);
	model_checkpoint(&m, false);
	model_fill(&m, buf, sizeof(buf));
	cr_assert_eq(volume_write(m.v, reqs, 3), 0);
	for (unsigned i = 0; i < 3; i++)
		model_did_write(&m, &reqs[i]);
	model_check(&m);
	model_free(&m);
	tmp_store_close(&t);
}

/* ---- zero and discard ---- */

Test(cow, large_zeroes_go_in_pieces_and_leave_holes_alone)
{
	struct tmp_store t;
	struct fault_store f;
	struct model m;
	uint8_t buf[BLOCK_SIZE];
	uint64_t size = (UINT64_C(50) << 20) + 512, before = 0, after = 1;
	struct volume_req zero = {.kind = VOLUME_DISCARD, .off = 777, .len = size - 1000};

	tmp_store_open(&t);
	fault_init(&f, t.storage);
	model_init(&m, &f.storage, size, DURABILITY_PROCESS, 5);
	/* Around the edges of pieces. */
	for (uint64_t at = 0; at + 3 * BLOCK_SIZE < size; at += UINT64_C(8) << 20) {
		struct volume_req r = {.kind = VOLUME_WRITE, .off = at ? at - 100 : 0, .len = BLOCK_SIZE, .buf = buf};

		model_fill(&m, buf, sizeof(buf));
		cr_assert_eq(volume_write(m.v, &r, 1), 0);
		model_did_write(&m, &r);
	}
	model_checkpoint(&m, false);
	/* The second piece with data can't be saved. */
	f.left = 14;
	cr_assert_lt(volume_write(m.v, &zero, 1), 0);
	fault_clear(&f);
	check_images(&m);
	zero.kind = VOLUME_ZERO;
	cr_assert_eq(volume_write(m.v, &zero, 1), 0);
	model_did_write(&m, &zero);
	model_check(&m);
	cr_assert_leq(volume_undo_blocks(m.v, 0), 14);
	/* Once more over what reads as zero: nothing changes hands. */
	zero.kind = VOLUME_DISCARD;
	cr_assert_eq(volume_write(m.v, &zero, 1), 0);
	f.writes = f.zeroes = f.syncs = 0;
	model_checkpoint(&m, false);
	zero.off = UINT64_C(1) << 20;
	zero.len = UINT64_C(40) << 20;
	f.writes = f.zeroes = f.reads = 0;
	cr_assert_eq(volume_allocated(m.v, LAYER_DISK, 0, &before), 0);
	for (zero.kind = VOLUME_ZERO; zero.kind <= VOLUME_DISCARD; zero.kind++)
		cr_assert_eq(volume_write(m.v, &zero, 1), 0);
	cr_assert_eq(volume_allocated(m.v, LAYER_DISK, 0, &after), 0);
	cr_assert_eq(f.writes + f.zeroes + f.reads, 0, "%u writes, %u zeroes, %u reads", f.writes, f.zeroes, f.reads);
	cr_assert_eq(before, after);
	cr_assert_eq(volume_undo_blocks(m.v, 0), 0);
	model_free(&m);
	tmp_store_close(&t);
}

Test(cow, zero_keeps_the_space_and_discard_frees_it)
{
	struct tmp_store t;
	struct model m;
	uint8_t *buf = malloc(1 << 20);
	struct volume_req r = {.kind = VOLUME_WRITE, .off = 0, .len = 1 << 20, .buf = buf};
	uint64_t full = 0, zeroed = 0, punched = 0;

	memset(buf, 1, 1 << 20);
	tmp_store_open(&t);
	model_init(&m, t.storage, 1 << 20, DURABILITY_PROCESS, 1);
	cr_assert_eq(volume_write(m.v, &r, 1), 0);
	cr_assert_eq(volume_allocated(m.v, LAYER_DISK, 0, &full), 0);
	r.kind = VOLUME_ZERO;
	cr_assert_eq(volume_write(m.v, &r, 1), 0);
	cr_assert_eq(volume_allocated(m.v, LAYER_DISK, 0, &zeroed), 0);
	cr_assert_geq(zeroed, full);
	r.kind = VOLUME_WRITE;
	cr_assert_eq(volume_write(m.v, &r, 1), 0);
	r.kind = VOLUME_DISCARD;
	cr_assert_eq(volume_write(m.v, &r, 1), 0);
	cr_assert_eq(volume_allocated(m.v, LAYER_DISK, 0, &punched), 0);
	cr_assert_eq(punched, 0);
	model_did_write(&m, &r);
	model_check(&m);
	model_free(&m);
	tmp_store_close(&t);
	free(buf);
}

/* ---- a flipped bit ---- */

Test(cow, a_flipped_bit_in_an_overlay_is_an_error_never_data)
{
	struct tmp_store t;
	struct model m;
	uint8_t buf[BLOCK_SIZE], byte;
	struct disk *d;
	char path[128];

	tmp_store_open(&t);
	model_init(&m, t.storage, ODD_SIZE, DURABILITY_PROCESS, 1);
	for (unsigned i = 0; i < 2; i++) {
		struct volume_req r = {
		    .kind = VOLUME_WRITE, .off = 0, .len = 3 * BLOCK_SIZE, .buf = malloc(3 * BLOCK_SIZE)};

		model_checkpoint(&m, false);
		model_fill(&m, (uint8_t *)(uintptr_t)r.buf, r.len);
		r.off = i * BLOCK_SIZE;
		cr_assert_eq(volume_write(m.v, &r, 1), 0);
		model_did_write(&m, &r);
		free((void *)(uintptr_t)r.buf);
	}
	model_checkpoint(&m, false);
	/* Block 1 of the second. */
	snprintf(path, sizeof(path), "volumes/vol/undo-%llu.data", (unsigned long long)m.ckpts[1].number);
	cr_assert_eq(storage_open(t.storage, path, 0, &d), 0);
	cr_assert_eq(disk_read(d, BLOCK_SIZE + 50, &byte, 1), 0);
	byte ^= 4;
	cr_assert_eq(disk_write(d, BLOCK_SIZE + 50, &byte, 1), 0);
	cr_assert_eq(volume_read_ckpt(m.v, m.ckpts[1].number, BLOCK_SIZE, BLOCK_SIZE, buf), -ERR_CORRUPT);
	cr_assert_eq(volume_read_ckpt(m.v, m.ckpts[1].number, 2 * BLOCK_SIZE, BLOCK_SIZE, buf), 0);
	cr_assert_arr_eq(buf, m.ckpts[1].image + 2 * BLOCK_SIZE, BLOCK_SIZE);
	cr_assert_eq(volume_read_ckpt(m.v, m.ckpts[0].number, BLOCK_SIZE, BLOCK_SIZE, buf), 0);
	/* Block 1 is in the older one too; block 3 is what a merge copies: flip that as well. */
	cr_assert_eq(disk_read(d, 3 * BLOCK_SIZE, &byte, 1), 0);
	byte ^= 1;
	cr_assert_eq(disk_write(d, 3 * BLOCK_SIZE, &byte, 1), 0);
	disk_close(d);
	cr_assert_eq(volume_merge_into_older(m.v, m.ckpts[1].number), -ERR_CORRUPT);
	cr_assert_eq(volume_read_ckpt(m.v, m.ckpts[0].number, 3 * BLOCK_SIZE, 1, buf), -ERR_CORRUPT);
	model_free(&m);
	tmp_store_close(&t);
}

/* ---- power cuts and kills ---- */

/* crashstore with folders; a write that the end comes in the middle of stops at a sector, as devices do. */
static int c_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	struct crashstore *cs = cs_disk(d)->cs;
	uint64_t stop;

	if (cs->stopped || cs->ops_left != 0)
		return cs_write(d, off, buf, len);
	stop = round_down_u64(off + cs_random(cs, len + 1), SECTOR_SIZE);
	if (stop > off) {
		cs_image_write(cs_disk(d)->inode->cache, off, buf, stop - off);
		cs_queue(cs_disk(d)->inode, off, buf, stop - off);
	}
	cs->stopped = true;
	return -ERR_IO;
}

static int c_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	return cs_disk(d)->cs->ops_left == 0 ? (cs_disk(d)->cs->stopped = true, -ERR_IO) : cs_zero(d, off, len, punch);
}

static struct disk_ops c_disk_ops;

static int c_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	int rc = cs_open(s, path, flags, ret);

	if (rc == 0) {
		c_disk_ops = cs_disk_ops;
		c_disk_ops.write = c_write;
		c_disk_ops.zero = c_zero;
		(*ret)->ops = &c_disk_ops;
	}
	return rc;
}

static int c_mkdir(struct storage *s, const char *path)
{
	(void)s;
	(void)path;
	return 0;
}

static int c_list(struct storage *s, const char *path, int (*fn)(void *, const char *), void *arg)
{
	struct cs_names names = crashstore(s)->names;
	size_t n = strlen(path);
	int rc = -ERR_NOENT;

	for (unsigned i = 0; i < names.n && rc != -ERR_EXIST; i++)
		if (strncmp(names.list[i].path, path, n) == 0 && names.list[i].path[n] == '/')
			rc = fn(arg, names.list[i].path + n + 1);
	return rc;
}

static struct storage_ops c_ops;

/* Bytes that an active block may show after a cut: those it had at the last flush, and all written since. */
struct versions {
	uint8_t (*list)[BLOCK_SIZE];
	unsigned n;
	bool absent; /* it may be gone: it was not there at the last flush */
};

struct crash {
	struct crashstore cs;
	struct model m;
	struct versions *active; /* per block */
};

static void versions_add(struct crash *c, uint64_t block, const uint8_t *bytes)
{
	struct versions *v = &c->active[block];

	v->list = realloc(v->list, (v->n + 1) * sizeof(v->list[0]));
	memcpy(v->list[v->n++], bytes, BLOCK_SIZE);
}

/* What the model has now is durable. */
static void versions_flushed(struct crash *c)
{
	for (uint64_t b = 0; b < c->m.blocks; b++) {
		c->active[b].n = 0;
		c->active[b].absent = !c->m.active_has[b];
		if (c->m.active_has[b])
			versions_add(c, b, c->m.active + b * BLOCK_SIZE);
	}
}

static void crash_init(struct crash *c, enum volume_durability dur, uint64_t seed)
{
	cs_init(&c->cs, seed);
	c_ops = cs_ops;
	c_ops.open = c_open;
	c_ops.mkdir = c_mkdir;
	c_ops.rmdir = c_mkdir;
	c_ops.list = c_list;
	c->cs.storage.ops = &c_ops;
	model_init(&c->m, &c->cs.storage, ODD_SIZE, dur, seed);
	c->active = calloc(c->m.blocks, sizeof(c->active[0]));
	versions_flushed(c);
}

static void crash_free(struct crash *c)
{
	model_free(&c->m);
	for (uint64_t b = 0; b < c->m.blocks; b++)
		free(c->active[b].list);
	free(c->active);
	cs_free(&c->cs);
}

/* Steps return -ERR_IO when the machine has stopped. They change the model as far as the metadata would. */
static int crash_checkpoint(struct crash *c)
{
	struct model *m = &c->m;
	bool empty = model_random(m, 2) || m->active_id == 0;
	int rc = volume_sync(m->v);

	if (rc == 0)
		rc = volume_prepare(m->v, m->last_number + 1, m->active_id + empty, NULL);
	if (rc < 0)
		return rc;
	/* The metadata write decides here. */
	m->active_id += empty;
	model_did_checkpoint(m, m->last_number + 1);
	if (empty) {
		model_empty_active(m);
		versions_flushed(c);
	}
	volume_switch(m->v, m->last_number, m->active_id);
	volume_reap(m->v);
	return storage_sync_dir(m->storage, "volumes/vol");
}

static int crash_drop(struct crash *c)
{
	struct model *m = &c->m;
	unsigned i = (unsigned)model_random(m, m->n_ckpts - 1);
	int rc = volume_merge_into_older(m->v, m->ckpts[i].number);

	if (rc < 0)
		return rc;
	volume_drop(m->v, m->ckpts[i].number);
	model_did_drop(m, i);
	volume_reap(m->v);
	return storage_sync_dir(m->storage, "volumes/vol");
}

static int crash_write(struct crash *c)
{
	struct volume_req reqs[MODEL_BATCH];
	uint8_t *bufs[MODEL_BATCH];
	unsigned n = model_batch(&c->m, reqs, bufs);
	int rc = volume_write(c->m.v, reqs, n);

	for (unsigned i = 0; i < n; i++) {
		if (reqs[i].error == 0)
			model_did_write(&c->m, &reqs[i]);
		else
			model_touch(&c->m, reqs[i].off, reqs[i].len);
		free(bufs[i]);
	}
	return rc;
}

static int crash_write_active(struct crash *c)
{
	struct model *m = &c->m;
	uint8_t *buf;
	struct volume_req r = model_req(m, 0, m->blocks, &buf);
	int rc = volume_write_active(m->v, m->base, &r);

	/* Done or not: these bytes may be there now. */
	model_did_write_active(m, &r);
	for (uint64_t b = r.off / BLOCK_SIZE; b <= (r.off + r.len - 1) / BLOCK_SIZE; b++)
		versions_add(c, b, m->active + b * BLOCK_SIZE);
	free(buf);
	return rc;
}

static int crash_step(struct crash *c)
{
	int rc;

	switch (model_random(&c->m, 8)) {
	case 0:
		return c->m.n_ckpts < 3 && c->cs.n_inodes < CS_INODES - 8 ? crash_checkpoint(c) : 0;
	case 1:
		return c->m.n_ckpts > 1 ? crash_drop(c) : 0;
	case 2:
		rc = volume_sync_active(c->m.v);
		if (rc == 0)
			versions_flushed(c);
		return rc;
	case 3:
	case 4:
		return c->m.active_id ? crash_write_active(c) : 0;
	default:
		/* The store keeps a bounded number of writes unsynced. */
		rc = model_random(&c->m, 6) == 0 ? volume_sync(c->m.v) : 0;
		return rc < 0 ? rc : crash_write(c);
	}
}

/* Sector by sector: one of the versions, or what is below where the block may be gone. */
static void check_active_block(struct crash *c, uint64_t b, const uint8_t *got, const uint8_t *below, bool there)
{
	const struct versions *v = &c->active[b];
	uint64_t len = min_u64(BLOCK_SIZE, c->m.size - b * BLOCK_SIZE);

	if (!there) {
		cr_assert(v->absent, "seed %llu: active block %llu was flushed and is gone",
			  (unsigned long long)c->m.start_seed, (unsigned long long)b);
		cr_assert_eq(memcmp(got, below, len), 0);
		return;
	}
	for (uint64_t at = 0; at < len; at += SECTOR_SIZE) {
		bool found = false;

		for (unsigned i = 0; i < v->n && !found; i++)
			found = memcmp(got + at, v->list[i] + at, SECTOR_SIZE) == 0;
		cr_assert(found, "seed %llu: active block %llu shows bytes that were never written",
			  (unsigned long long)c->m.start_seed, (unsigned long long)b);
	}
}

/* Reads the volume after the cut against what it may be, and takes it over as the model's. */
static void crash_verify(struct crash *c)
{
	struct model *m = &c->m;
	uint8_t *got = malloc(m->blocks * BLOCK_SIZE);

	check_images(m);
	memset(got, POISON, m->size);
	cr_assert_eq(volume_read_view(m->v, m->base, 0, m->size, got), 0, "seed %llu: the view can't be read",
		     (unsigned long long)m->start_seed);
	/* base 0: the disk below may be anything of what was not synced. */
	if (m->base == 0)
		cr_assert_eq(volume_read_disk(m->v, 0, m->size, m->disk), 0);
	for (uint64_t b = 0; b < m->blocks; b++) {
		struct extent x;

		cr_assert_eq(volume_extent(m->v, LAYER_ACTIVE, 0, b * BLOCK_SIZE, &x), 0);
		check_active_block(c, b, got + b * BLOCK_SIZE, model_image(m, m->base) + b * BLOCK_SIZE, x.data);
		m->active_has[b] = x.data;
	}
	memset(got, 0, m->blocks * BLOCK_SIZE);
	cr_assert_eq(volume_read_overlay(m->v, LAYER_ACTIVE, 0, 0, m->size, got), 0);
	memcpy(m->active, got, m->blocks * BLOCK_SIZE);
	cr_assert_eq(volume_read_disk(m->v, 0, m->size, m->disk), 0);
	versions_flushed(c);
	free(got);
}

static void crash_run(enum volume_durability dur, uint64_t seed)
{
	struct crash *c = malloc(sizeof(*c));
	unsigned stops = 0;

	crash_init(c, dur, seed);
	for (unsigned round = 0; round < 4; round++) {
		int rc = 0;

		c->cs.ops_left = (long)model_random(&c->m, 120);
		for (c->m.step = 0; rc == 0 && c->m.step < 60; c->m.step++) {
			rc = crash_step(c);
			if (rc == 0 && c->m.step % 8 == 0 && c->m.n_ckpts)
				c->m.base = c->m.ckpts[model_random(&c->m, c->m.n_ckpts)].number;
		}
		if (rc < 0)
			cr_assert(c->cs.stopped, "seed %llu: error %d without a reason", (unsigned long long)seed, rc);
		stops += c->cs.stopped;
		c->cs.stopped = true;
		volume_close(c->m.v);
		if (dur == DURABILITY_POWER)
			cs_power_cut(&c->cs);
		else
			cs_killed(&c->cs);
		model_open_volume(&c->m);
		crash_verify(c);
		cr_assert_eq(storage_sync_dir(c->m.storage, "volumes/vol"), 0);
	}
	cr_assert_gt(stops, 0);
	crash_free(c);
	free(c);
}

Test(cow, power_cuts_at_any_operation)
{
	for (uint64_t seed = 1; seed <= 150; seed++)
		crash_run(DURABILITY_POWER, seed);
}

Test(cow, kills_at_any_operation)
{
	for (uint64_t seed = 1; seed <= 100; seed++)
		crash_run(DURABILITY_PROCESS, seed);
}

Test(cow, power_cuts_and_kills_over_a_base)
{
	struct tmp_store t;

	tmp_store_open(&t);
	model_over_open(&t, ODD_SIZE * 2 / 3 / 512 * 512);
	for (uint64_t seed = 1; seed <= 60; seed++) {
		crash_run(DURABILITY_POWER, seed);
		crash_run(DURABILITY_PROCESS, seed);
	}
	model_over_close();
	tmp_store_close(&t);
}

/* A write over an image whose words could be written in part: what was read and flushed after it stays over a restart.
 */
Test(cow, words_of_a_failed_write_are_taken_back)
{
	static uint8_t buf[4 * BLOCK_SIZE], got[4 * BLOCK_SIZE];
	static const uint64_t ckpts[] = {1};
	struct volume_clone clone = {1, 1};
	struct faults f = {.match = ".map"};
	struct tmpdir t;
	struct volume *v;
	struct err e;

	tmpdir_make(&t);
	struct storage *s = faultstore_open(tmpdir_at(&t, "s"), &f);
	cr_assert_not_null(s);
	cr_assert_eq(volume_create(s, "vol", 16 * BLOCK_SIZE, DURABILITY_POWER, &e), 0, "%s", e.text);
	struct volume_open_args a = {.name = "vol", .size = 16 * BLOCK_SIZE, .durability = DURABILITY_POWER};
	cr_assert_eq(volume_open(s, &a, &v, &e), 0, "%s", e.text);
	cr_assert_eq(volume_prepare(v, 1, 1, &e), 0);
	volume_switch(v, 1, 1);
	cr_assert_eq(volume_prepare_clone(v, 1, &e), 0);
	volume_switch_clones(v, &clone, 1);
	memset(buf, 0x31, sizeof(buf));
	for (int i = 0; i < 2; i++) {
		struct volume_req r = {.kind = VOLUME_WRITE, .off = BLOCK_SIZE, .len = BLOCK_SIZE, .buf = buf};
		cr_assert_eq(i ? volume_write_clone(v, 1, &r) : volume_write_active(v, 1, &r), 0);
		r = (struct volume_req){.kind = VOLUME_WRITE, .off = 4 * BLOCK_SIZE, .len = sizeof(buf), .buf = buf};
		atomic_store(&f.write_once, -ERR_NOSPC);
		cr_assert_eq(i ? volume_write_clone(v, 1, &r) : volume_write_active(v, 1, &r), -ERR_NOSPC);
		cr_assert_eq(i ? volume_sync_clone(v, 1) : volume_sync_active(v), 0);
	}
	a.ckpts = ckpts;
	a.n_ckpts = 1;
	a.active_id = 1;
	a.clones = &clone;
	a.n_clones = 1;
	memset(buf, 0, sizeof(buf));
	for (int i = 0; i < 2; i++) {
		cr_assert_eq(volume_read_view(v, 1, 4 * BLOCK_SIZE, sizeof(got), got), 0);
		cr_assert_arr_eq(got, buf, sizeof(got), "%d", i);
		cr_assert_eq(volume_read_clone(v, 1, 4 * BLOCK_SIZE, sizeof(got), got), 0);
		cr_assert_arr_eq(got, buf, sizeof(got), "%d", i);
		volume_close(v);
		cr_assert_eq(volume_open(s, &a, &v, &e), 0, "%s", e.text);
	}
	volume_close(v);
	storage_close(s);
	tmpdir_remove(&t);
}
