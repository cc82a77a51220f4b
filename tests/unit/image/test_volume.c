/* Volumes against a plain model: random operations with every checkpoint's image kept, and the single properties. */
#include <criterion/criterion.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/err.h"
#include "image/volume_internal.h"
#include "tests/lib/faultstore.h"
#include "tests/unit/image/volmodel.h"

/* Not a multiple of a block: the last one is short. */
#define ODD_SIZE ((UINT64_C(200) << BLOCK_SHIFT) + 1536)

static void random_step(struct model *m)
{
	switch (model_random(m, 16)) {
	case 0:
		if (m->n_ckpts < MODEL_CKPTS)
			model_checkpoint(m, model_random(m, 2) == 0);
		break;
	case 1:
		if (m->n_ckpts > 1)
			model_drop(m, (unsigned)model_random(m, m->n_ckpts - 1));
		else if (m->n_ckpts == 1 && model_random(m, 4) == 0)
			model_drop(m, 0);
		break;
	case 2:
		m->base = m->n_ckpts ? m->ckpts[model_random(m, m->n_ckpts)].number : 0;
		break;
	case 3:
		if (model_random(m, 3) == 0)
			model_commit(m);
		break;
	case 4:
		if (model_random(m, 3) == 0)
			model_reopen(m);
		else
			volume_reap(m->v);
		break;
	case 5:
		/* One that came to nothing. */
		cr_assert_eq(volume_prepare(m->v, m->last_number + 1, m->active_id + 1, NULL), 0);
		if (model_random(m, 2))
			volume_unprepare(m->v);
		break;
	case 6:
		/* discard GROUP */
		cr_assert_eq(volume_prepare(m->v, 0, m->active_id + 1, NULL), 0);
		volume_switch(m->v, 0, ++m->active_id);
		model_empty_active(m);
		break;
	case 7:
	case 8:
	case 9:
		model_write_active(m);
		break;
	default:
		model_write(m);
	}
}

/* All that the overlays hold is looked at, however small the steps, and fits. */
static void scrub_all(struct model *m)
{
	struct volume_scrub s = {0};
	uint64_t held = volume_active_blocks(m->v), bytes = 0;

	for (unsigned i = 0; i < m->n_ckpts; i++)
		held += volume_undo_blocks(m->v, m->ckpts[i].number);
	do {
		uint64_t layer = s.layer, off = s.off;

		volume_scrub(m->v, &s, BLOCK_SIZE * (1 + model_random(m, 20)));
		cr_assert_eq(s.n, 0);
		bytes += s.bytes;
		cr_assert(s.end || s.layer > layer || (s.layer == layer && s.off > off));
		cr_assert_leq(bytes + s.left, (held + held) * BLOCK_SIZE);
	} while (!s.end);
	cr_assert_eq(bytes, held * BLOCK_SIZE);
	cr_assert_eq(s.left, 0);
}

static void random_run(uint64_t size, enum volume_durability dur, uint64_t seed, unsigned steps)
{
	struct tmp_store t;
	struct model m;

	tmp_store_open(&t);
	model_init(&m, t.storage, size, dur, seed);
	for (m.step = 0; m.step < steps; m.step++) {
		random_step(&m);
		if (m.step % 4 == 0)
			model_check(&m);
		if (m.step % 16 == 0)
			scrub_all(&m);
	}
	model_reopen(&m);
	model_check(&m);
	model_free(&m);
	tmp_store_close(&t);
}

Test(volume, random_operations_match_the_model)
{
	for (uint64_t seed = 1; seed <= 8; seed++)
		random_run(ODD_SIZE, DURABILITY_PROCESS, seed, 200);
}

Test(volume, random_operations_match_the_model_in_power)
{
	random_run(ODD_SIZE, DURABILITY_POWER, 101, 80);
}

Test(volume, random_operations_on_a_volume_smaller_than_a_block)
{
	for (uint64_t seed = 1; seed <= 4; seed++)
		random_run(512, DURABILITY_PROCESS, seed, 120);
}

/* The same over a base image, which is shorter. */
Test(volume, random_operations_over_a_base_match_the_model)
{
	struct tmp_store t;

	tmp_store_open(&t);
	model_over_open(&t, ODD_SIZE * 2 / 3 / 512 * 512);
	for (uint64_t seed = 1; seed <= 4; seed++)
		random_run(ODD_SIZE, DURABILITY_PROCESS, seed, 200);
	random_run(ODD_SIZE, DURABILITY_POWER, 101, 60);
	model_over_close();
	tmp_store_close(&t);
}

/* Disk, overlays and what is behind both grow together, and a smaller base stays what it is. */
Test(volume, resize_over_a_base)
{
	const uint64_t larger = ODD_SIZE + 7 * BLOCK_SIZE;
	uint8_t *got = malloc(larger), *old = malloc(ODD_SIZE);
	struct tmp_store t;
	struct model m;

	tmp_store_open(&t);
	model_over_open(&t, ODD_SIZE * 2 / 3 / 512 * 512);
	model_init(&m, t.storage, ODD_SIZE, DURABILITY_POWER, 3);
	model_write(&m);
	model_checkpoint(&m, false);
	memcpy(old, m.disk, ODD_SIZE);
	model_write(&m);
	cr_assert_eq(volume_resize(m.v, larger), 0);
	for (unsigned again = 0; again < 2; again++) {
		struct volume_req r = {.kind = VOLUME_WRITE, .off = larger - 700, .len = 700, .buf = m.disk};

		memset(got, POISON, larger);
		cr_assert_eq(volume_read_disk(m.v, 0, larger, got), 0);
		model_compare(&m, "disk", 0, got, m.disk, 0, ODD_SIZE);
		for (uint64_t i = ODD_SIZE; i < larger - (again ? 700 : 0); i++)
			cr_assert_eq(got[i], 0);
		cr_assert(!again || memcmp(got + larger - 700, m.disk, 700) == 0);
		cr_assert_eq(volume_read_ckpt(m.v, m.ckpts[0].number, 0, larger, got), 0);
		model_compare(&m, "checkpoint", 0, got, old, 0, ODD_SIZE);
		for (uint64_t i = ODD_SIZE; i < larger; i++)
			cr_assert_eq(got[i], 0);
		cr_assert_eq(volume_write(m.v, &r, 1), 0);
		m.size = larger;
		model_reopen(&m);
		m.size = ODD_SIZE;
	}
	model_free(&m);
	free(got);
	free(old);
	model_over_close();
	tmp_store_close(&t);
}

/* ---- single properties ---- */

static struct tmp_store store;
static struct model model;

static void setup(void)
{
	tmp_store_open(&store);
	model_init(&model, store.storage, ODD_SIZE, DURABILITY_PROCESS, 7);
}

static void teardown(void)
{
	model_free(&model);
	tmp_store_close(&store);
}

TestSuite(volume_one, .init = setup, .fini = teardown);

static void write_at(struct model *m, enum volume_req_kind kind, uint64_t off, uint64_t len, uint8_t byte)
{
	uint8_t *buf = malloc(len);
	struct volume_req r = {.kind = kind, .off = off, .len = len, .buf = buf, .error = 77, .save_failed = true};

	memset(buf, byte, len);
	cr_assert_eq(volume_write(m->v, &r, 1), 0);
	cr_assert_eq(r.error, 0);
	cr_assert_not(r.save_failed);
	model_did_write(m, &r);
	free(buf);
}

static void file_path(char *out, size_t size, const char *file)
{
	snprintf(out, size, "%s/volumes/vol/%s", store.path, file);
}

static bool file_there(const char *file)
{
	char path[512];
	struct stat st;

	file_path(path, sizeof(path), file);
	return stat(path, &st) == 0;
}

static void make_file(const char *file)
{
	char path[512];
	FILE *f;

	file_path(path, sizeof(path), file);
	f = fopen(path, "w");
	cr_assert_not_null(f);
	fclose(f);
}

static void flip(const char *file, uint64_t off)
{
	char path[512];
	uint8_t byte;
	FILE *f;

	file_path(path, sizeof(path), file);
	f = fopen(path, "r+");
	cr_assert_not_null(f);
	cr_assert_eq(fseek(f, (long)off, SEEK_SET), 0);
	cr_assert_eq(fread(&byte, 1, 1, f), 1);
	byte ^= 0x10;
	cr_assert_eq(fseek(f, (long)off, SEEK_SET), 0);
	cr_assert_eq(fwrite(&byte, 1, 1, f), 1);
	fclose(f);
}

Test(volume_one, a_scrub_names_blocks_that_are_not_what_was_saved)
{
	struct volume_scrub s = {0};

	write_at(&model, VOLUME_WRITE, 0, ODD_SIZE, 0x11);
	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 0, ODD_SIZE, 0x22);
	model_checkpoint(&model, true);
	write_at(&model, VOLUME_WRITE, 8192, 4096, 0x33);
	uint64_t first = model.ckpts[0].number, second = model.ckpts[1].number;
	char data[64], map[64];
	(void)snprintf(data, sizeof(data), "undo-%llu.data", (unsigned long long)first);
	(void)snprintf(map, sizeof(map), "undo-%llu.map", (unsigned long long)second);
	flip(data, 4096);
	flip(data, 8191 + 4096);
	flip(data, ODD_SIZE - 1); /* the short last block */
	flip(map, 2 * 4);	  /* a checksum itself */
	volume_scrub(model.v, &s, UINT64_MAX);
	cr_assert(s.end);
	cr_assert_eq(s.n, 3);
	cr_assert(s.bad[0].layer == first && s.bad[0].off == 4096 && s.bad[0].len == 8192);
	cr_assert(s.bad[1].layer == first && s.bad[1].off == ODD_SIZE - 1536 && s.bad[1].len == 1536);
	cr_assert(s.bad[2].layer == second && s.bad[2].off == 8192 && s.bad[2].len == 4096);
	for (unsigned i = 0; i < s.n; i++)
		cr_assert_eq(s.bad[i].error, -ERR_CORRUPT);
	/* From the middle, and behind a checkpoint that is gone. */
	s = (struct volume_scrub){.layer = first, .off = 12288};
	volume_scrub(model.v, &s, BLOCK_SIZE);
	cr_assert(!s.end && s.layer == first && s.off == 16384 && s.n == 0);
	s = (struct volume_scrub){.layer = first + 1};
	volume_scrub(model.v, &s, UINT64_MAX);
	cr_assert(s.end && s.n == 1 && s.bad[0].layer == second);
}

Test(volume_one, create_refuses_a_folder_that_is_there)
{
	struct err e = {0};

	cr_assert_eq(volume_create(store.storage, "vol", 512, DURABILITY_POWER, &e), -ERR_EXIST);
	cr_assert_not_null(strstr(e.text, "vol"));
	write_at(&model, VOLUME_WRITE, 0, 4096, 1);
	model_check(&model);
}

Test(volume_one, delete_removes_all_and_again_is_fine)
{
	char folder[512];

	cr_assert_eq(volume_create(store.storage, "other", 4096, DURABILITY_POWER, NULL), 0);
	snprintf(folder, sizeof(folder), "%s/volumes/other/intent.a", store.path);
	fclose(fopen(folder, "w"));
	cr_assert_eq(volume_delete(store.storage, "other", NULL), 0);
	snprintf(folder, sizeof(folder), "%s/volumes/other", store.path);
	cr_assert_neq(access(folder, F_OK), 0);
	cr_assert_eq(volume_delete(store.storage, "other", NULL), 0);
	cr_assert(file_there("disk.raw"));
}

Test(volume_one, open_removes_leftovers_and_nothing_else)
{
	const char *leftovers[] = {"undo-9.data", "undo-9.map",	   "undo-1.map.tmp", "undo-01.map",
				   "undo-x",	  "active-8.data", "active-8.map",   "active-"};
	const char *others[] = {"intent.a", "intent.b", "disk.raw", "note"};

	model_checkpoint(&model, true);
	cr_assert_eq(model.active_id, 1);
	for (unsigned i = 0; i < ARRAY_LEN(leftovers); i++)
		make_file(leftovers[i]);
	for (unsigned i = 0; i < ARRAY_LEN(others); i++)
		if (!file_there(others[i]))
			make_file(others[i]);
	model_reopen(&model);
	for (unsigned i = 0; i < ARRAY_LEN(leftovers); i++)
		cr_assert_not(file_there(leftovers[i]), "%s", leftovers[i]);
	for (unsigned i = 0; i < ARRAY_LEN(others); i++)
		cr_assert(file_there(others[i]), "%s", others[i]);
	cr_assert(file_there("active-1.data") && file_there("active-1.map"));
	model_check(&model);
}

static int open_with(const uint64_t *ckpts, uint32_t n, uint64_t active_id, uint64_t size, struct err *e)
{
	struct volume_open_args a = {.name = "vol", .size = size, .ckpts = ckpts, .n_ckpts = n, .active_id = active_id};
	struct volume *v = NULL;
	int rc = volume_open(store.storage, &a, &v, e);

	cr_assert((rc == 0) == (v != NULL));
	volume_close(v);
	return rc;
}

Test(volume_one, open_refuses_what_does_not_check_out)
{
	uint64_t ckpts[] = {4, 5};
	struct err e = {0};
	char path[512];

	make_file("undo-5.data");
	make_file("undo-5.map");
	cr_assert_eq(open_with(ckpts, 2, 0, ODD_SIZE, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, "undo-4"));
	/* What was refused was not cleaned up either. */
	cr_assert(file_there("undo-5.map"));
	cr_assert_eq(open_with(NULL, 0, 3, ODD_SIZE, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, "active-3"));
	cr_assert_eq(open_with(NULL, 0, 0, ODD_SIZE + 512, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, "disk.raw"));
	write_at(&model, VOLUME_WRITE, ODD_SIZE - 512, 512, 1);
	cr_assert_eq(open_with(NULL, 0, 0, ODD_SIZE - 512, &e), -ERR_CORRUPT);
	file_path(path, sizeof(path), "disk.raw");
	cr_assert_eq(unlink(path), 0);
	cr_assert_eq(open_with(NULL, 0, 0, ODD_SIZE, &e), -ERR_CORRUPT);
}

Test(volume_one, a_growth_that_was_cut_off_is_taken_back)
{
	char path[512];
	struct stat st;

	write_at(&model, VOLUME_WRITE, ODD_SIZE - 512, 512, 9);
	file_path(path, sizeof(path), "disk.raw");
	cr_assert_eq(truncate(path, (off_t)ODD_SIZE + (1 << 20)), 0);
	model_reopen(&model);
	cr_assert_eq(stat(path, &st), 0);
	cr_assert_eq((uint64_t)st.st_size, ODD_SIZE);
	model_check(&model);
}

/* The length is in the cache and not on the medium: no record may name it (I10). */
static void growth_that_fails(enum volume_durability durability)
{
	struct faults f = {.match = "other/disk.raw"};
	struct storage *s = faultstore_open(store.path, &f);
	struct volume_open_args a = {.name = "other", .size = 8192, .durability = durability};
	struct volume *v = NULL;
	struct err e = {0};

	cr_assert_not_null(s);
	cr_assert_eq(volume_create(s, "other", 8192, durability, &e), 0, "%s", e.text);
	cr_assert_eq(volume_open(s, &a, &v, &e), 0, "%s", e.text);
	atomic_store(&f.sync_once, -ERR_IO);
	cr_assert_eq(volume_resize(v, 12288), -ERR_IO);
	cr_assert_eq(volume_resize(v, 12288), -ERR_IO);
	cr_assert_eq(volume_size(v), 8192);
	cr_assert_eq(volume_reopen(v, &e), 0, "%s", e.text);
	cr_assert_eq(volume_resize(v, 12288), 0);
	cr_assert_eq(volume_size(v), 12288);
	volume_close(v);
	storage_close(s);
}

Test(volume_one, a_growth_whose_sync_failed_is_not_there_at_the_next_try)
{
	growth_that_fails(DURABILITY_POWER);
}

/* What a sync that failed takes it takes there too, and the volume could not be opened. */
Test(volume_one, a_growth_is_synced_in_process_too)
{
	growth_that_fails(DURABILITY_PROCESS);
}

static void follow(void *arg, const struct volume_req *r)
{
	if (r->kind == VOLUME_WRITE)
		memcpy((uint8_t *)arg + r->off, r->buf, r->len);
	else
		memset((uint8_t *)arg + r->off, 0, r->len);
}

/* A backup of what is written from now on goes through a failover: that writes too. */
Test(volume_one, a_commit_is_told_of_like_any_write)
{
	uint8_t *target = malloc(ODD_SIZE), *disk = malloc(ODD_SIZE);
	uint64_t written = 0;

	write_at(&model, VOLUME_WRITE, 0, 81920, 1);
	write_at(&model, VOLUME_WRITE, ODD_SIZE - 5120, 5120, 2);
	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 8192, 40960, 3);
	write_at(&model, VOLUME_WRITE, 122880, 8192, 4);
	write_at(&model, VOLUME_WRITE, ODD_SIZE - 1024, 1024, 5);
	cr_assert_eq(volume_read_disk(model.v, 0, ODD_SIZE, target), 0);
	cr_assert_eq(volume_set_tap(model.v, follow, target), 0);
	cr_assert_eq(volume_commit(model.v, model.ckpts[0].number, 0, ODD_SIZE, &written), 0);
	cr_assert_eq(volume_set_tap(model.v, NULL, NULL), 0);
	cr_assert_gt(written, 0);
	cr_assert_eq(volume_read_disk(model.v, 0, ODD_SIZE, disk), 0);
	cr_assert_eq(memcmp(target, disk, ODD_SIZE), 0);
	free(target);
	free(disk);
}

struct reopening {
	struct volume *v;
	_Atomic bool done;
};

static void *read_it(void *arg)
{
	struct reopening *r = arg;
	uint8_t buf[512];

	cr_assert_eq(volume_read_disk(r->v, 0, sizeof(buf), buf), 0);
	return NULL;
}

static void *reopen_it(void *arg)
{
	struct reopening *r = arg;

	cr_assert_eq(volume_reopen(r->v, NULL), 0);
	atomic_store(&r->done, true);
	return NULL;
}

/* A guest's read hangs on a disk that is detached meanwhile, and is to be rebuilt: what is read stays open. */
Test(volume_one, a_disk_is_reopened_behind_reads_under_way, .timeout = 60)
{
	struct faults f = {.match = "other/disk.raw"};
	struct storage *s = faultstore_open(store.path, &f);
	struct volume_open_args a = {.name = "other", .size = 8192};
	struct reopening r = {.v = NULL};
	struct err e = {0};
	pthread_t reads, reopens;

	cr_assert_not_null(s);
	cr_assert_eq(volume_create(s, "other", 8192, DURABILITY_PROCESS, &e), 0, "%s", e.text);
	cr_assert_eq(volume_open(s, &a, &r.v, &e), 0, "%s", e.text);
	atomic_store(&f.hold_read, 1);
	cr_assert_eq(pthread_create(&reads, NULL, read_it, &r), 0);
	while (atomic_load(&f.reading) == 0)
		(void)poll(NULL, 0, 1);
	cr_assert_eq(pthread_create(&reopens, NULL, reopen_it, &r), 0);
	for (unsigned i = 0; i < 100 && !atomic_load(&r.done); i++)
		(void)poll(NULL, 0, 1);
	cr_assert_not(atomic_load(&r.done), "the disk was closed while it was read");
	atomic_store(&f.hold_read, 0);
	cr_assert_eq(pthread_join(reads, NULL), 0);
	cr_assert_eq(pthread_join(reopens, NULL), 0);
	volume_close(r.v);
	storage_close(s);
}

Test(volume_one, ranges_past_the_end_are_refused)
{
	uint8_t buf[1024];
	struct volume_req reqs[] = {
	    {.kind = VOLUME_WRITE, .off = ODD_SIZE - 512, .len = 1024, .buf = buf},
	    {.kind = VOLUME_DISCARD, .off = UINT64_MAX - 10, .len = 100},
	    {.kind = VOLUME_WRITE, .off = 0, .len = 1024, .buf = buf},
	    {.kind = VOLUME_WRITE, .off = ODD_SIZE, .len = 0, .buf = NULL},
	};
	struct extent x;

	memset(buf, 5, sizeof(buf));
	cr_assert_eq(volume_write(model.v, reqs, 4), -ERR_RANGE);
	cr_assert_eq(reqs[0].error, -ERR_RANGE);
	cr_assert_eq(reqs[1].error, -ERR_RANGE);
	cr_assert_eq(reqs[2].error, 0);
	cr_assert_eq(reqs[3].error, 0);
	model_did_write(&model, &reqs[2]);
	cr_assert_eq(volume_read_disk(model.v, ODD_SIZE - 1, 2, buf), -ERR_RANGE);
	cr_assert_eq(volume_read_view(model.v, 0, ODD_SIZE, 1, buf), -ERR_RANGE);
	cr_assert_eq(volume_read_view(model.v, 3, 0, 1, buf), -ERR_NOENT);
	cr_assert_eq(volume_read_ckpt(model.v, 0, 0, 1, buf), -ERR_NOENT);
	cr_assert_eq(volume_read_ckpt(model.v, 1, 0, 1, buf), -ERR_NOENT);
	cr_assert_eq(volume_extent(model.v, LAYER_DISK, 0, ODD_SIZE, &x), -ERR_RANGE);
	cr_assert_eq(volume_extent(model.v, LAYER_IMAGE, 2, 0, &x), -ERR_NOENT);
	cr_assert_eq(volume_write_active(model.v, 0, &reqs[0]), -ERR_RANGE);
	model_check(&model);
}

Test(volume_one, prepare_is_repeatable_and_numbers_only_grow)
{
	struct err e = {0};

	model_checkpoint(&model, true);
	write_at(&model, VOLUME_WRITE, 4096, 8192, 3);
	cr_assert_eq(volume_prepare(model.v, model.last_number, 1, &e), -ERR_EXIST);
	cr_assert_eq(volume_prepare(model.v, 50, 2, NULL), 0);
	cr_assert(file_there("undo-50.map") && file_there("active-2.map"));
	cr_assert_eq(volume_prepare(model.v, 50, 2, NULL), 0);
	cr_assert_eq(volume_prepare(model.v, 60, 1, NULL), 0);
	cr_assert_not(file_there("undo-50.map"));
	cr_assert(file_there("undo-60.data"));
	volume_unprepare(model.v);
	cr_assert_not(file_there("undo-60.data") || file_there("undo-60.map") || file_there("active-2.map"));
	cr_assert_eq(volume_prepare(model.v, 61, 0, NULL), 0);
	volume_switch(model.v, 61, 0);
	model_did_checkpoint(&model, 61);
	model.active_id = 0;
	volume_reap(model.v);
	cr_assert_not(file_there("active-1.map"));
	model_check(&model);
}

Test(volume_one, a_name_used_again_survives_the_reaper)
{
	uint8_t buf[4096];
	struct volume_req r = {.kind = VOLUME_WRITE, .off = 0, .len = 4096, .buf = buf};

	memset(buf, 4, sizeof(buf));
	for (uint64_t round = 0; round < 3; round++)
		for (uint64_t id = 1; id <= 2; id++) {
			cr_assert_eq(volume_prepare(model.v, 0, id, NULL), 0);
			volume_switch(model.v, 0, model.active_id = id);
			model_empty_active(&model);
			cr_assert_eq(volume_write_active(model.v, 0, &r), 0);
			model_did_write_active(&model, &r);
		}
	volume_reap(model.v);
	cr_assert(file_there("active-2.map") && !file_there("active-1.map"));
	model_reopen(&model);
	model_check(&model);
}

Test(volume_one, merges_can_be_repeated_and_the_older_wins)
{
	uint64_t third;

	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 0, 8192, 1);
	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 4096, 8192, 2);
	model_checkpoint(&model, false);
	third = model.last_number;
	write_at(&model, VOLUME_WRITE, 0, 20000, 3);
	for (unsigned i = 0; i < 2; i++)
		cr_assert_eq(volume_merge_into_older(model.v, model.ckpts[1].number), 0);
	for (uint64_t b = 0; b < model.blocks; b++)
		model.ckpts[0].touched[b] |= model.ckpts[1].touched[b];
	model_check(&model);
	/* Cut off before the metadata: all over again. */
	model_reopen(&model);
	model_drop(&model, 1);
	cr_assert_eq(volume_merge_into_older(model.v, third), -ERR_STATE);
	cr_assert_eq(volume_merge_into_older(model.v, 999), -ERR_NOENT);
	model_check(&model);
	model_drop(&model, 0);
	model_drop(&model, 0);
	volume_reap(model.v);
	cr_assert_eq(volume_live(model.v), 0);
	write_at(&model, VOLUME_WRITE, 0, 100, 9);
	model_reopen(&model);
	model_check(&model);
}

struct merging {
	struct volume *v;
	uint64_t size;
	int merged, grown;
};

static void *merge_it(void *arg)
{
	struct merging *m = arg;
	m->merged = volume_merge_into_older(m->v, 2);
	return NULL;
}

static void *grow_it(void *arg)
{
	struct merging *m = arg;
	m->grown = volume_grow_prepare(m->v, m->size);
	return NULL;
}

/* A merge may take minutes, and what a resize waits for is waited for by all requests. */
Test(volume_one, a_merge_gives_way_to_a_resize, .timeout = 60)
{
	enum { EACH = 2 * BLOCK_SIZE, N = ROUND_RUNS + 100 };
	struct faults f = {.match = "other/undo-2"};
	struct storage *s = faultstore_open(store.path, &f);
	struct volume_open_args a = {.name = "other", .size = (uint64_t)EACH * N};
	struct merging m = {.size = a.size + BLOCK_SIZE};
	uint8_t buf[BLOCK_SIZE] = {1}, got[BLOCK_SIZE];
	struct err e = {0};
	pthread_t merges, grows;

	cr_assert_not_null(s);
	cr_assert_eq(volume_create(s, "other", a.size, DURABILITY_PROCESS, &e), 0, "%s", e.text);
	cr_assert_eq(volume_open(s, &a, &m.v, &e), 0, "%s", e.text);
	for (uint64_t number = 1; number <= 3; number++) {
		cr_assert_eq(volume_prepare(m.v, number, 0, NULL), 0);
		volume_switch(m.v, number, 0);
		for (uint64_t i = 0; number == 2 && i < N; i++) { /* more than are merged at once */
			struct volume_req r = {.kind = VOLUME_WRITE, .off = i * EACH, .len = BLOCK_SIZE, .buf = buf};
			cr_assert_eq(volume_write(m.v, &r, 1), 0);
		}
	}
	volume_reap(m.v);

	atomic_store(&f.hold_read, 1);
	cr_assert_eq(pthread_create(&merges, NULL, merge_it, &m), 0);
	while (atomic_load(&f.reading) == 0)
		(void)poll(NULL, 0, 1);
	cr_assert_eq(pthread_create(&grows, NULL, grow_it, &m), 0);
	while (!__atomic_load_n(&m.v->growing, __ATOMIC_SEQ_CST))
		(void)poll(NULL, 0, 1);
	atomic_store(&f.hold_read, 0);
	cr_assert_eq(pthread_join(merges, NULL), 0);
	cr_assert_eq(pthread_join(grows, NULL), 0);
	cr_assert_eq(m.merged, -ERR_BUSY);
	cr_assert_eq(m.grown, 0);
	cr_assert_eq(volume_merge_into_older(m.v, 2), -ERR_BUSY, "nor does one begin");
	volume_grow(m.v);
	cr_assert_eq(volume_merge_into_older(m.v, 2), 0);
	volume_drop(m.v, 2);
	for (uint64_t i = 0; i < N; i += N - 1) {
		cr_assert_eq(volume_read_ckpt(m.v, 1, i * EACH, BLOCK_SIZE, got), 0);
		cr_assert_eq(got[0], 0);
	}

	cr_assert_eq(volume_grow_prepare(m.v, m.size + BLOCK_SIZE), 0);
	cr_assert_eq(volume_merge_into_older(m.v, 3), -ERR_BUSY);
	volume_ungrow(m.v); /* its record could not be saved */
	cr_assert_eq(volume_merge_into_older(m.v, 3), -ERR_STATE, "that is the live one");
	volume_close(m.v);
	storage_close(s);
}

Test(volume_one, what_a_merge_costs_and_a_drop_of_all_older_ones)
{
	uint64_t copies = 77, frees = 77;

	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 0, 3 * 4096, 1); /* blocks 0 1 2 */
	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 4096, 4 * 4096, 2); /* 1 2 3 4 */
	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 0, 4096, 3);
	volume_merge_cost(model.v, model.ckpts[1].number, &copies, &frees);
	cr_assert_eq(copies, 2 * 4096);
	cr_assert_eq(frees, 2 * 4096);
	volume_merge_cost(model.v, model.ckpts[0].number, &copies, &frees); /* the oldest needs none */
	cr_assert_eq(copies + frees, 0);
	volume_merge_cost(model.v, 999, &copies, &frees);
	cr_assert_eq(copies + frees, 0);
	volume_drop_through(model.v, 0);
	model_check(&model);
	volume_drop_through(model.v, model.ckpts[1].number);
	model_did_drop(&model, 0);
	model_did_drop(&model, 0);
	model_check(&model);
	volume_drop_through(model.v, UINT64_MAX);
	model_did_drop(&model, 0);
	volume_reap(model.v);
	cr_assert_eq(volume_live(model.v), 0);
	write_at(&model, VOLUME_WRITE, 0, 100, 9); /* nothing is saved any more */
	model_reopen(&model);
	model_check(&model);
}

/* Merged once, but then given more by another merge: what it holds is not all in the older one any more. */
Test(volume_one, dropping_what_is_not_merged_traps)
{
	int status = 0;
	pid_t child;

	for (unsigned i = 0; i < 4; i++) {
		model_checkpoint(&model, false);
		write_at(&model, VOLUME_WRITE, i * 4096, 4096, (uint8_t)(1 + i));
	}
	cr_assert_eq(volume_merge_into_older(model.v, model.ckpts[1].number), 0);
	model_drop(&model, 2);
	child = fork();
	if (child == 0) {
		volume_drop(model.v, model.ckpts[1].number);
		_exit(0);
	}
	cr_assert_eq(waitpid(child, &status, 0), child);
	cr_assert(WIFSIGNALED(status));
}

Test(volume_one, resize_grows_and_older_images_read_zero_there)
{
	uint64_t size = ODD_SIZE + (UINT64_C(30) << BLOCK_SHIFT) + 512;
	uint8_t buf[512];
	struct volume_req r = {.kind = VOLUME_WRITE, .off = size - 512, .len = 512, .buf = buf};

	memset(buf, 8, sizeof(buf));
	model_checkpoint(&model, true);
	write_at(&model, VOLUME_WRITE, 0, ODD_SIZE, 1);
	cr_assert_eq(volume_resize(model.v, ODD_SIZE - 512), -ERR_RANGE);
	cr_assert_eq(volume_resize(model.v, ODD_SIZE + 1), -ERR_RANGE);
	cr_assert_eq(volume_resize(model.v, VOLUME_SIZE_MAX + 512), -ERR_RANGE);
	cr_assert_eq(volume_prepare(model.v, 90, 1, NULL), 0);
	cr_assert_eq(volume_resize(model.v, size), -ERR_BUSY);
	volume_unprepare(model.v);
	cr_assert_eq(volume_resize(model.v, size), 0);
	cr_assert_eq(volume_size(model.v), size);

	uint64_t blocks = overlay_blocks_in(size);
	uint8_t *disk = calloc(1, size), *image = calloc(1, size);

	memcpy(disk, model.disk, ODD_SIZE);
	memcpy(image, model.ckpts[0].image, ODD_SIZE);
	free(model.disk);
	free(model.ckpts[0].image);
	model.disk = disk;
	model.ckpts[0].image = image;
	model.ckpts[0].touched = realloc(model.ckpts[0].touched, blocks);
	memset(model.ckpts[0].touched + model.blocks, 0, blocks - model.blocks);
	free(model.active);
	free(model.active_has);
	model.active = calloc(blocks, BLOCK_SIZE);
	model.active_has = calloc(blocks, sizeof(bool));
	model.size = size;
	model.blocks = blocks;
	model_check(&model);
	write_at(&model, VOLUME_WRITE, ODD_SIZE - 700, size - ODD_SIZE + 700, 6);
	model_check(&model);
	cr_assert_eq(volume_write_active(model.v, model.base, &r), 0);
	model_did_write_active(&model, &r);
	model_checkpoint(&model, false);
	write_at(&model, VOLUME_DISCARD, 4000, size - 4000, 0);
	model_check(&model);
	model_reopen(&model);
	model_check(&model);
}

static void count_runs(void *arg, uint64_t off, uint64_t len)
{
	(void)off;
	(void)len;
	++*(uint64_t *)arg;
}

Test(volume_one, changed_takes_ranges_of_the_chain)
{
	uint64_t a, b, runs = 0;

	cr_assert_eq(volume_changed(model.v, 0, 0, true, count_runs, &runs), 0);
	cr_assert_eq(runs, 0);
	cr_assert_eq(volume_changed(model.v, 1, 0, true, count_runs, &runs), -ERR_NOENT);
	model_checkpoint(&model, true);
	a = model.last_number;
	write_at(&model, VOLUME_WRITE, 0, 4096, 1);
	model_checkpoint(&model, false);
	b = model.last_number;
	write_at(&model, VOLUME_WRITE, 3 * 4096, 4096, 1);
	cr_assert_eq(volume_changed(model.v, a, a, false, count_runs, &runs), 0);
	cr_assert_eq(runs, 1);
	cr_assert_eq(volume_changed(model.v, a, 0, false, count_runs, &runs), 0);
	cr_assert_eq(runs, 3);
	cr_assert_eq(volume_changed(model.v, b, a, false, count_runs, &runs), -ERR_RANGE);
	cr_assert_eq(runs, 3);
	runs = 0;
	write_at(&model, VOLUME_WRITE, 4096, 4096, 1);
	cr_assert_eq(volume_changed(model.v, a, b, false, count_runs, &runs), 0);
	cr_assert_eq(runs, 2); /* 0-1 and 3 */
}

Test(volume_one, counters_tell_what_was_saved)
{
	struct volume_counters c = {1, 1};

	write_at(&model, VOLUME_WRITE, 0, 40960, 1);
	volume_counters(model.v, &c);
	cr_assert_eq(c.cow_bytes, 0);
	cr_assert_eq(c.history_bytes, 0);
	model_checkpoint(&model, false);
	write_at(&model, VOLUME_WRITE, 100, 4096, 2);
	write_at(&model, VOLUME_WRITE, 100, 4096, 3);
	model_checkpoint(&model, false);
	volume_counters(model.v, &c);
	cr_assert_eq(c.cow_bytes, 8192);
	cr_assert_eq(c.history_bytes, 8192);
}

static const struct storage_ops *plain_ops;
static unsigned opened_with;

static int open_noted(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	opened_with = flags;
	return plain_ops->open(s, path, flags, ret);
}

/* What a failed sync has left in the system's cache is on no medium: a disk that is opened anew must not show it.
 * (Found by the simulator, whose disks lose it: a checkpoint of such a disk read otherwise after a power cut.) */
Test(volume_one, a_disk_that_is_reopened_is_asked_of_the_medium)
{
	struct storage_ops noting = *store.storage->ops;

	write_at(&model, VOLUME_WRITE, 0, 40960, 1);
	plain_ops = store.storage->ops;
	noting.open = open_noted;
	store.storage->ops = &noting;
	cr_assert_eq(volume_reopen(model.v, NULL), 0);
	cr_assert(opened_with & STORAGE_FRESH);
	store.storage->ops = plain_ops;
	model_check(&model);
}

/* A 1 TiB volume with a few blocks: nothing walks it. Bounded by the test's time limit. */
Test(volume, a_sparse_terabyte_is_not_walked, .timeout = 60)
{
	uint64_t size = UINT64_C(1) << 40, far = size - (UINT64_C(1) << 30), off, n = 0;
	struct volume_open_args args = {.name = "big", .size = size, .ckpts = &(uint64_t){3}, .n_ckpts = 0};
	uint8_t buf[4096], got[4096];
	struct volume_req r = {.kind = VOLUME_WRITE, .off = far, .len = 4096, .buf = buf};
	struct volume_req zero = {.kind = VOLUME_DISCARD, .off = 512, .len = size - 1024};
	struct volume *v;
	struct tmp_store t;
	uint64_t alloc = 0;

	memset(buf, 5, sizeof(buf));
	tmp_store_open(&t);
	cr_assert_eq(volume_create(t.storage, "big", size, DURABILITY_PROCESS, NULL), 0);
	cr_assert_eq(volume_open(t.storage, &args, &v, NULL), 0);
	cr_assert_eq(volume_write(v, &r, 1), 0);
	for (uint64_t k = 1; k <= 20; k++) {
		cr_assert_eq(volume_prepare(v, k, 1, NULL), 0);
		volume_switch(v, k, 1);
	}
	/* Saves the one block of data and nothing of the holes. */
	cr_assert_eq(volume_write(v, &zero, 1), 0);
	cr_assert_eq(volume_undo_blocks(v, 0), 1);
	for (unsigned turn = 0; turn < 50; turn++) {
		for (off = 0, n = 0; off < size; n++) {
			struct extent x;

			cr_assert_eq(volume_extent(v, LAYER_IMAGE, 1, off, &x), 0);
			cr_assert_eq(x.data, n == 1);
			off += x.len;
		}
		cr_assert_eq(n, 3);
		cr_assert_eq(volume_read_view(v, 1, far, 4096, got), 0);
		cr_assert_arr_eq(got, buf, 4096);
		cr_assert_eq(volume_allocated(v, LAYER_VIEW, 1, &alloc), 0);
	}
	cr_assert(alloc >= 4096 && alloc < 65536);
	volume_close(v);
	tmp_store_close(&t);
}
