/* A temporary folder for a test, and what tests ask of files in it. */
#ifndef REPFS_TESTS_TMPDIR_H
#define REPFS_TESTS_TMPDIR_H

#include <criterion/criterion.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct tmpdir {
	char path[200];
};

static inline void tmpdir_make(struct tmpdir *t)
{
	const char *base = getenv("TMPDIR");

	snprintf(t->path, sizeof(t->path), "%s/repfs-unit-XXXXXX", base && *base && strlen(base) < 150 ? base : "/tmp");
	cr_assert_not_null(mkdtemp(t->path));
}

static inline int tmpdir_remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st;
	(void)type;
	(void)ftw;
	return remove(path);
}

static inline void tmpdir_remove(struct tmpdir *t)
{
	cr_assert_eq(nftw(t->path, tmpdir_remove_entry, 16, FTW_DEPTH | FTW_PHYS), 0);
}

/* The path of a file in it; the last four answers stay valid. */
static inline const char *tmpdir_at(const struct tmpdir *t, const char *name)
{
	static char paths[4][600];
	static unsigned next;
	char *p = paths[next++ % 4];

	snprintf(p, sizeof(paths[0]), "%s/%s", t->path, name);
	return p;
}

static inline bool tmpdir_has(const struct tmpdir *t, const char *name)
{
	struct stat st;

	return lstat(tmpdir_at(t, name), &st) == 0;
}

static inline void tmpdir_write(const struct tmpdir *t, const char *name, const void *p, size_t len, off_t off)
{
	int fd = open(tmpdir_at(t, name), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	cr_assert_geq(fd, 0);
	cr_assert_eq(pwrite(fd, p, len, off), (ssize_t)len);
	cr_assert_eq(close(fd), 0);
}

static inline size_t tmpdir_read(const struct tmpdir *t, const char *name, void *p, size_t len, off_t off)
{
	int fd = open(tmpdir_at(t, name), O_RDONLY | O_CLOEXEC);
	ssize_t n;

	cr_assert_geq(fd, 0, "%s", name);
	n = pread(fd, p, len, off);
	cr_assert_geq(n, 0);
	cr_assert_eq(close(fd), 0);
	return (size_t)n;
}

static inline off_t tmpdir_size(const struct tmpdir *t, const char *name)
{
	struct stat st;

	cr_assert_eq(lstat(tmpdir_at(t, name), &st), 0, "%s", name);
	return st.st_size;
}

static inline off_t tmpdir_allocated(const struct tmpdir *t, const char *name)
{
	struct stat st;

	cr_assert_eq(lstat(tmpdir_at(t, name), &st), 0, "%s", name);
	return (off_t)st.st_blocks * 512;
}

#endif
