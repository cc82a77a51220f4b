/* More checkpoints than files that may be open (image/filecache.h), over real files. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "image/filecache.h"
#include "image/volume.h"
#include "tests/unit/image/tmpdir.h"

#define SIZE (UINT64_C(64) << BLOCK_SHIFT)
#define KEPT 120U
#define LIMIT 16U

static unsigned open_files(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;
	cr_assert_not_null(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static uint8_t disk[SIZE], images[KEPT + 2][SIZE];

static void change(struct volume *v, unsigned k)
{
	for (unsigned i = 0; i < 3; i++) {
		uint64_t block = (k * 7 + i * 11) % 64;
		uint8_t data[BLOCK_SIZE];
		memset(data, (int)(1 + k % 250), sizeof(data));
		struct volume_req q = {
		    .kind = VOLUME_WRITE, .off = block << BLOCK_SHIFT, .len = BLOCK_SIZE, .buf = data};
		cr_assert_eq(volume_write(v, &q, 1), 0);
		memcpy(disk + q.off, data, BLOCK_SIZE);
	}
}

static void check_images(struct volume *v, unsigned from, unsigned step)
{
	static uint8_t got[SIZE];
	for (unsigned k = from; k <= KEPT; k += step) {
		memset(got, 0xee, sizeof(got));
		cr_assert_eq(volume_read_ckpt(v, k, 0, SIZE, got), 0);
		cr_assert_eq(memcmp(got, images[k], SIZE), 0, "image %u", k);
		cr_assert_leq(filecache_open_files(), LIMIT);
	}
}

static void all_of_it(enum volume_durability durability)
{
	struct tmpdir t;
	struct storage *s;
	struct volume *v;
	uint64_t numbers[KEPT];
	unsigned n = 0;
	struct volume_open_args a = {.name = "v", .size = SIZE, .durability = durability, .ckpts = numbers};
	tmpdir_make(&t);
	cr_assert_eq(storage_posix_open(t.path, &s), 0);
	filecache_limit(LIMIT);
	unsigned before = open_files();
	cr_assert_eq(volume_create(s, "v", SIZE, durability, NULL), 0);
	cr_assert_eq(volume_open(s, &a, &v, NULL), 0);
	for (unsigned k = 1; k <= KEPT; k++) {
		cr_assert_eq(volume_prepare(v, k, 0, NULL), 0);
		volume_switch(v, k, 0);
		volume_reap(v);
		memcpy(images[k], disk, SIZE);
		change(v, k);
	}
	cr_assert_eq(filecache_open_files(), LIMIT);
	check_images(v, 1, 1);
	cr_assert_leq(open_files() - before, LIMIT + 3, "%u files",
		      open_files() - before); /* disk, live data and map */
	/* Every third goes, into files that are closed by now. */
	for (unsigned k = 2; k < KEPT; k += 3) {
		cr_assert_eq(volume_merge_into_older(v, k), 0);
		volume_drop(v, k);
		volume_reap(v);
	}
	check_images(v, 1, 3);
	check_images(v, 3, 3);
	volume_close(v);
	cr_assert_eq(filecache_open_files(), 0);
	cr_assert_eq(open_files(), before);
	for (unsigned k = 1; k <= KEPT; k++)
		if (k % 3 != 2 || k == KEPT)
			numbers[n++] = k;
	a.n_ckpts = n;
	cr_assert_eq(volume_open(s, &a, &v, NULL), 0);
	cr_assert_leq(open_files() - before, LIMIT + 3);
	check_images(v, 1, 3);
	check_images(v, 3, 3);
	volume_drop_through(v, 60);
	volume_reap(v);
	check_images(v, 61, 3);
	volume_close(v);
	cr_assert_eq(open_files(), before);
	storage_close(s);
	filecache_limit(0);
	tmpdir_remove(&t);
}

Test(filecache, more_checkpoints_than_open_files_process)
{
	all_of_it(DURABILITY_PROCESS);
}

Test(filecache, more_checkpoints_than_open_files_power)
{
	all_of_it(DURABILITY_POWER);
}

/* ---- a file that can't be synced ---- */

struct sick {
	struct disk disk;
	unsigned syncs, closes;
	int error;
};

static int sick_sync(struct disk *d)
{
	struct sick *x = CONTAINER_OF(d, struct sick, disk);
	x->syncs++;
	return x->error;
}

static int sick_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	(void)d;
	(void)off;
	(void)buf;
	(void)len;
	return 0;
}

static void sick_close(struct disk *d)
{
	CONTAINER_OF(d, struct sick, disk)->closes++;
}

Test(filecache, what_cannot_be_synced_stays_open_and_goes_on_failing)
{
	static const struct disk_ops ops = {.sync = sick_sync, .write = sick_write, .close = sick_close};
	struct sick x[3] = {{.disk.ops = &ops, .error = -ERR_IO}, {.disk.ops = &ops}, {.disk.ops = &ops}};
	struct disk *d[3] = {&x[0].disk, &x[1].disk, &x[2].disk};
	struct filecache *c;
	filecache_limit(1);
	cr_assert_eq(filecache_new(&c), 0);
	for (unsigned i = 0; i < 3; i++) {
		cr_assert_eq(filecache_add(c, NULL, "x", &d[i]), 0);
		cr_assert_neq(d[i], &x[i].disk);
	}
	filecache_trim(c);
	cr_assert_eq(x[0].syncs, 1);
	cr_assert_eq(x[0].closes, 0); /* I10 */
	cr_assert_eq(x[1].syncs, 1);
	cr_assert_eq(x[1].closes, 1);
	cr_assert_eq(x[2].closes, 1);
	cr_assert_eq(filecache_open_files(), 1);
	x[0].error = 0;
	cr_assert_eq(disk_sync(d[0]), -ERR_IO);
	cr_assert_eq(disk_sync(d[1]), 0); /* it was, and is closed */
	cr_assert_eq(disk_write(d[0], 0, "", 1), 0);
	for (unsigned i = 0; i < 3; i++)
		disk_close(d[i]);
	cr_assert_eq(x[0].closes, 1);
	cr_assert_eq(filecache_open_files(), 0);
	filecache_free(c);
	filecache_limit(0);
}

static const struct disk_ops *plain_ops;
static struct disk_ops noting;
static unsigned forgotten;

static void forget_noted(struct disk *d, uint64_t off, uint64_t len)
{
	forgotten++;
	plain_ops->forget(d, off, len);
}

/* A scrub reads what the medium has: of closed epochs too. */
Test(filecache, forgets_what_the_system_remembers_of_a_file)
{
	struct tmpdir t;
	struct storage *s;
	struct filecache *c;
	struct disk *d;
	uint8_t b = 1;

	tmpdir_make(&t);
	cr_assert_eq(storage_posix_open(t.path, &s), 0);
	filecache_limit(LIMIT);
	cr_assert_eq(filecache_new(&c), 0);
	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE, &d), 0);
	cr_assert_eq(disk_write(d, 0, &b, 1), 0);
	plain_ops = d->ops;
	noting = *d->ops;
	noting.forget = forget_noted;
	d->ops = &noting;
	cr_assert_eq(filecache_add(c, s, "f", &d), 0);
	disk_forget(d, 0, 0);
	cr_assert_eq(forgotten, 1);
	disk_close(d);
	filecache_free(c);
	storage_close(s);
	tmpdir_remove(&t);
}
