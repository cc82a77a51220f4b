/* The real storage: what each operation does to the bytes, the refusals, and a sync that failed once. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/err.h"
#include "core/range.h"
#include "image/storage.h"
#include "tests/unit/image/tmpdir.h"

static struct tmpdir dir;
static struct storage *s;

static void setup(void)
{
	tmpdir_make(&dir);
	cr_assert_eq(storage_posix_open(dir.path, &s), 0);
}

static void teardown(void)
{
	storage_close(s);
	tmpdir_remove(&dir);
}

TestSuite(storage, .init = setup, .fini = teardown);

Test(storage, reads_what_was_written_and_zeroes_past_the_end)
{
	uint8_t buf[64], want[64];
	struct disk *d;
	uint64_t size;

	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE, &d), 0);
	cr_assert_eq(disk_write(d, 10, "hello", 5), 0);
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, 15);
	memset(buf, 0xaa, sizeof(buf));
	memset(want, 0, sizeof(want));
	memcpy(want + 10, "hello", 5);
	cr_assert_eq(disk_read(d, 0, buf, 60), 0);
	cr_assert_arr_eq(buf, want, 60);
	cr_assert_eq(buf[60], 0xaa);
	memset(buf, 0xaa, sizeof(buf));
	cr_assert_eq(disk_read(d, 1 << 20, buf, 8), 0);
	cr_assert_arr_eq(buf, want + 32, 8);
	cr_assert_eq(disk_sync(d), 0);
	disk_close(d);
	cr_assert_eq(tmpdir_size(&dir, "f"), 15);
	disk_close(NULL);
}

/* Synced or not: what is read next is what was written. */
Test(storage, forgetting_loses_nothing)
{
	uint8_t buf[8192], want[8192];
	struct disk *d;

	memset(want, 0x5a, sizeof(want));
	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE, &d), 0);
	for (unsigned turn = 0; turn < 3; turn++) {
		cr_assert_eq(disk_write(d, 4096 * turn, want, sizeof(want)), 0);
		if (turn == 1)
			cr_assert_eq(disk_sync(d), 0);
		disk_forget(d, 4096, turn == 2 ? 0 : 4096);
		memset(buf, 0xaa, sizeof(buf));
		cr_assert_eq(disk_read(d, 4096 * turn, buf, sizeof(buf)), 0);
		cr_assert_arr_eq(buf, want, sizeof(buf));
	}
	disk_close(d);
}

Test(storage, open_flags)
{
	struct disk *d = (struct disk *)1;
	struct stat st;
	uint64_t size;
	uint8_t b;

	cr_assert_eq(storage_open(s, "f", 0, &d), -ERR_NOENT);
	cr_assert_eq(d, (struct disk *)1);
	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE | STORAGE_EXCL, &d), 0);
	cr_assert_eq(disk_write(d, 0, "x", 1), 0);
	disk_close(d);
	cr_assert_eq(stat(tmpdir_at(&dir, "f"), &st), 0);
	cr_assert_eq(st.st_mode & 0777, 0600);
	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE | STORAGE_EXCL, &d), -ERR_EXIST);
	cr_assert_eq(storage_open(s, "f", STORAGE_RDONLY, &d), 0);
	cr_assert_lt(disk_write(d, 0, "y", 1), 0);
	cr_assert_eq(disk_read(d, 0, &b, 1), 0);
	cr_assert_eq(b, 'x');
	disk_close(d);
	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE | STORAGE_TRUNC, &d), 0);
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, 0);
	disk_close(d);
}

Test(storage, paths_stay_inside)
{
	static const char *const bad[] = {"/etc/passwd", "..",	     "../x",  "a/../../x", "a/..", "",
					  "./..",	 "a//../..", "a/b/.."};
	char longest[STORAGE_PATH_MAX + 8];
	struct disk *d;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		cr_assert_eq(storage_open(s, bad[i], STORAGE_CREATE, &d), -ERR_RANGE, "%s", bad[i]);
		cr_assert_eq(storage_unlink(s, bad[i]), -ERR_RANGE, "%s", bad[i]);
		cr_assert_eq(storage_rename(s, "f", bad[i]), -ERR_RANGE, "%s", bad[i]);
		cr_assert_eq(storage_rename(s, bad[i], "f"), -ERR_RANGE, "%s", bad[i]);
		cr_assert_eq(storage_mkdir(s, bad[i]), -ERR_RANGE, "%s", bad[i]);
		cr_assert_eq(storage_rmdir(s, bad[i]), -ERR_RANGE, "%s", bad[i]);
	}
	memset(longest, 'a', sizeof(longest));
	longest[STORAGE_PATH_MAX + 1] = '\0';
	cr_assert_eq(storage_mkdir(s, longest), -ERR_RANGE);
	/* Names that only look like it are fine. */
	cr_assert_eq(storage_mkdir(s, "..."), 0);
	cr_assert_eq(storage_open(s, ".../..f", STORAGE_CREATE, &d), 0);
	disk_close(d);
	cr_assert(tmpdir_has(&dir, ".../..f"));
}

Test(storage, only_files_are_disks)
{
	struct disk *d;

	cr_assert_eq(storage_mkdir(s, "sub"), 0);
	cr_assert_lt(storage_open(s, "sub", 0, &d), 0);
	cr_assert_eq(storage_open(s, "sub", STORAGE_RDONLY, &d), -ERR_NOTSUP);
	cr_assert_eq(mkfifo(tmpdir_at(&dir, "pipe"), 0600), 0);
	cr_assert_eq(storage_open(s, "pipe", 0, &d), -ERR_NOTSUP);
	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, "pipe"), 0, &d), -ERR_NOTSUP);
	cr_assert_lt(disk_posix_open("/dev/null", STORAGE_RDONLY, &d), 0);
	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, "nothing"), STORAGE_RDONLY, &d), -ERR_NOENT);
	tmpdir_write(&dir, "out", "abc", 3, 0);
	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, "out"), STORAGE_RDONLY, &d), 0);
	disk_close(d);
}

static void zero_and_check(bool punch)
{
	static uint8_t before[1 << 20], got[1 << 20];
	uint64_t size, full, after;
	struct disk *d;

	for (size_t i = 0; i < sizeof(before); i++)
		before[i] = (uint8_t)(i % 251 + 1);
	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE | STORAGE_TRUNC, &d), 0);
	cr_assert_eq(disk_write(d, 0, before, sizeof(before)), 0);
	cr_assert_eq(disk_sync(d), 0);
	cr_assert_eq(disk_allocated(d, &full), 0);
	/* Neither end on a block. */
	cr_assert_eq(disk_zero(d, 5000, 600000, punch), 0);
	memset(before + 5000, 0, 600000);
	cr_assert_eq(disk_read(d, 0, got, sizeof(got)), 0);
	cr_assert_arr_eq(got, before, sizeof(before));
	cr_assert_eq(disk_allocated(d, &after), 0);
	if (punch)
		cr_assert_leq(after, full - 500000);
	/* Past the end, and nothing. */
	cr_assert_eq(disk_zero(d, sizeof(before) - 10, 1 << 20, punch), 0);
	cr_assert_eq(disk_zero(d, 0, 0, punch), 0);
	memset(before + sizeof(before) - 10, 0, 10);
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, sizeof(before));
	cr_assert_eq(disk_read(d, 0, got, sizeof(got)), 0);
	cr_assert_arr_eq(got, before, sizeof(before));
	cr_assert_eq(disk_zero(d, UINT64_MAX - 5, 100, punch), -ERR_RANGE);
	disk_close(d);
}

Test(storage, zero_punches)
{
	zero_and_check(true);
}

Test(storage, zero_keeps_space)
{
	zero_and_check(false);
}

Test(storage, extents)
{
	static uint8_t data[64 << 10];
	struct extent x;
	struct disk *d;

	memset(data, 1, sizeof(data));
	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE, &d), 0);
	cr_assert_eq(disk_extent(d, 100, 5000, &x), 0); /* empty: past the end */
	cr_assert(x.off == 100 && x.len == 4900 && !x.data);
	cr_assert_eq(disk_set_size(d, 4 << 20), 0);
	cr_assert_eq(disk_write(d, 1 << 20, data, sizeof(data)), 0);
	cr_assert_eq(disk_extent(d, 0, 4 << 20, &x), 0);
	cr_assert(x.off == 0 && x.len == 1 << 20 && !x.data);
	cr_assert_eq(disk_extent(d, 1 << 20, 4 << 20, &x), 0);
	cr_assert(x.off == 1 << 20 && x.len == sizeof(data) && x.data);
	/* From inside, clipped by the end asked for. */
	cr_assert_eq(disk_extent(d, (1 << 20) + 7, (1 << 20) + 100, &x), 0);
	cr_assert(x.off == (1 << 20) + 7 && x.len == 93 && x.data);
	cr_assert_eq(disk_extent(d, (1 << 20) + sizeof(data), 4 << 20, &x), 0);
	cr_assert(x.len == (3 << 20) - sizeof(data) && !x.data);
	cr_assert_eq(disk_extent(d, 4 << 20, 5 << 20, &x), 0);
	cr_assert(x.off == 4 << 20 && x.len == 1 << 20 && !x.data);
	cr_assert_eq(disk_extent(d, (4 << 20) - 1, 5 << 20, &x), 0);
	cr_assert(x.len >= 1 && !x.data);
	disk_close(d);
}

Test(storage, sizes)
{
	struct disk *d;
	uint64_t size, allocated, total;

	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE, &d), 0);
	cr_assert_eq(disk_set_size(d, UINT64_C(10) << 30), 0);
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, UINT64_C(10) << 30);
	cr_assert_eq(disk_allocated(d, &allocated), 0);
	cr_assert_eq(allocated, 0);
	cr_assert_eq(disk_set_size(d, UINT64_MAX), -ERR_RANGE);
	cr_assert_eq(disk_write(d, UINT64_MAX - 1, "ab", 2), -ERR_RANGE);
	cr_assert_eq(disk_read(d, UINT64_MAX - 1, &size, 2), -ERR_RANGE);
	disk_close(d);
	cr_assert_eq(storage_free_bytes(s, &size, &total), 0);
	cr_assert(total > 0 && size <= total);
}

struct seen {
	unsigned n, stop_at;
	bool a, b;
};

static int see(void *arg, const char *name)
{
	struct seen *seen = arg;

	seen->a |= strcmp(name, "a") == 0;
	seen->b |= strcmp(name, "b") == 0;
	return ++seen->n == seen->stop_at ? 7 : 0;
}

Test(storage, folders)
{
	struct seen seen = {0};
	struct disk *d;

	cr_assert_eq(storage_mkdir(s, "sub"), 0);
	cr_assert_eq(storage_mkdir(s, "sub"), 0);
	cr_assert_eq(storage_open(s, "sub/a", STORAGE_CREATE, &d), 0);
	disk_close(d);
	cr_assert_eq(storage_mkdir(s, "sub/a"), -ERR_EXIST);
	cr_assert_eq(storage_open(s, "sub/c", STORAGE_CREATE, &d), 0);
	disk_close(d);
	cr_assert_eq(storage_rename(s, "sub/c", "sub/b"), 0);
	cr_assert_eq(storage_rename(s, "sub/c", "sub/b"), -ERR_NOENT);
	cr_assert_eq(storage_list(s, "sub", see, &seen), 0);
	cr_assert(seen.n == 2 && seen.a && seen.b);
	seen = (struct seen){.stop_at = 1};
	cr_assert_eq(storage_list(s, "sub", see, &seen), 7);
	cr_assert_eq(seen.n, 1);
	cr_assert_eq(storage_list(s, "none", see, &seen), -ERR_NOENT);
	cr_assert_lt(storage_rmdir(s, "sub"), 0);
	cr_assert_eq(storage_sync_dir(s, "sub"), 0);
	cr_assert_eq(storage_sync_dir(s, ""), 0);
	cr_assert_eq(storage_sync_dir(s, "none"), -ERR_NOENT);
	cr_assert_eq(storage_unlink(s, "sub/a"), 0);
	cr_assert_eq(storage_unlink(s, "sub/a"), -ERR_NOENT);
	cr_assert_eq(storage_unlink(s, "sub/b"), 0);
	cr_assert_eq(storage_rmdir(s, "sub"), 0);
	cr_assert_eq(storage_posix_open(tmpdir_at(&dir, "none"), &s), -ERR_NOENT);
}

/* fdatasync of these tests: fails as often as it is told. */
static int fail_syncs;
int fdatasync(int fd)
{
	if (fail_syncs > 0) {
		fail_syncs--;
		errno = EIO;
		return -1;
	}
	return fsync(fd);
}

Test(storage, a_failed_sync_stays_failed)
{
	struct disk *d, *other;

	cr_assert_eq(storage_open(s, "f", STORAGE_CREATE, &d), 0);
	cr_assert_eq(disk_write(d, 0, "x", 1), 0);
	cr_assert_eq(disk_sync(d), 0);
	fail_syncs = 1;
	cr_assert_eq(disk_sync(d), -ERR_IO);
	cr_assert_eq(fail_syncs, 0, "the storage does not sync by fdatasync");
	cr_assert_eq(disk_sync(d), -ERR_IO);
	cr_assert_eq(disk_write(d, 0, "y", 1), 0);
	cr_assert_eq(disk_sync(d), -ERR_IO);
	cr_assert_eq(storage_open(s, "g", STORAGE_CREATE, &other), 0);
	cr_assert_eq(disk_sync(other), 0);
	disk_close(d);
	disk_close(other);
}
