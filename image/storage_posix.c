/* The real storage: files below one folder, reached with the *at calls relative to its descriptor.
 *
 * A path that could leave the folder (absolute, or with a ".." part) is refused before it reaches the kernel.
 * A disk is a descriptor and nothing else, used with pread and pwrite only, so its functions may run concurrently;
 * the file position, which SEEK_DATA moves, is never read.
 *
 * Invariant (I10): once fdatasync has failed on a disk, every later sync of it fails with the same code. The kernel
 * reports a write-back error once and drops the pages, so a later success would say nothing about that data.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "core/check.h"
#include "core/err.h"
#include "core/os/cleanup.h"
#include "core/os/io.h"
#include "core/range.h"
#include "image/storage.h"

/* Zeroes are written in pieces of this many bytes where the filesystem cannot make them itself. */
#define ZERO_CHUNK (64U << 10)

struct posix_disk {
	struct disk disk;
	int fd;
	bool block_device;
	atomic_int sync_error; /* 0, or the negative code of the first failed sync */
};

struct posix_storage {
	struct storage storage;
	int dir;
};

static const uint8_t zeroes[ZERO_CHUNK];

static struct posix_disk *posix_disk(struct disk *d)
{
	return CONTAINER_OF(d, struct posix_disk, disk);
}

static struct posix_storage *posix_storage(struct storage *s)
{
	return CONTAINER_OF(s, struct posix_storage, storage);
}

/* File offsets are signed in the kernel. */
static bool range_fits(uint64_t off, uint64_t len)
{
	return off <= (uint64_t)INT64_MAX && len <= (uint64_t)INT64_MAX - off;
}

static int posix_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	if (!range_fits(off, len))
		return -ERR_RANGE;
	return io_pread(posix_disk(d)->fd, buf, len, off);
}

static int posix_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	if (!range_fits(off, len))
		return -ERR_RANGE;
	return io_pwrite(posix_disk(d)->fd, buf, len, off);
}

static int posix_get_size(struct disk *d, uint64_t *ret)
{
	struct posix_disk *pd = posix_disk(d);
	struct stat st;

	if (pd->block_device) {
		off_t end = lseek(pd->fd, 0, SEEK_END);

		if (end < 0)
			return err_from_errno(errno);
		*ret = (uint64_t)end;
		return 0;
	}
	if (fstat(pd->fd, &st) < 0)
		return err_from_errno(errno);
	*ret = (uint64_t)st.st_size;
	return 0;
}

static void posix_forget(struct disk *d, uint64_t off, uint64_t len)
{
	(void)posix_fadvise(posix_disk(d)->fd, (off_t)off, (off_t)len, POSIX_FADV_DONTNEED);
}

static int posix_set_size(struct disk *d, uint64_t size)
{
	int rc;

	if (!range_fits(size, 0))
		return -ERR_RANGE;
	do
		rc = ftruncate(posix_disk(d)->fd, (off_t)size);
	while (rc < 0 && errno == EINTR);
	if (rc < 0 && errno == EFBIG) /* more than the filesystem's files, or a limit of the process, can have */
		return -ERR_NOSPC;
	return rc < 0 ? err_from_errno(errno) : 0;
}

static int posix_allocated(struct disk *d, uint64_t *ret)
{
	struct posix_disk *pd = posix_disk(d);
	struct stat st;

	if (pd->block_device)
		return posix_get_size(d, ret);
	if (fstat(pd->fd, &st) < 0)
		return err_from_errno(errno);
	*ret = (uint64_t)st.st_blocks * 512;
	return 0;
}

/* off < size. A filesystem that knows no holes (EINVAL) has data everywhere. */
static int posix_extent_below(struct posix_disk *pd, uint64_t off, uint64_t end, struct extent *ret)
{
	off_t data, hole;

	data = lseek(pd->fd, (off_t)off, SEEK_DATA);
	if (data < 0 && errno == ENXIO) {
		*ret = (struct extent){off, end - off, false};
		return 0;
	}
	if (data < 0 && errno != EINVAL)
		return err_from_errno(errno);
	if (data >= 0 && (uint64_t)data > off) {
		*ret = (struct extent){off, min_u64((uint64_t)data, end) - off, false};
		return 0;
	}
	hole = data < 0 ? -1 : lseek(pd->fd, (off_t)off, SEEK_HOLE);
	if (hole < 0) {
		*ret = (struct extent){off, end - off, true};
		return 0;
	}
	/* A punch between the two seeks can put the hole at off itself; calling that much data is always right. */
	if ((uint64_t)hole <= off)
		hole = (off_t)min_u64(end, round_down_u64(off, BLOCK_SIZE) + BLOCK_SIZE);
	*ret = (struct extent){off, min_u64((uint64_t)hole, end) - off, true};
	return 0;
}

static int posix_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	struct posix_disk *pd = posix_disk(d);
	uint64_t size = 0;
	int rc;

	PRE(off < end);
	if (!range_fits(end, 0))
		return -ERR_RANGE;
	rc = posix_get_size(d, &size);
	if (rc < 0)
		return rc;
	if (off >= size) {
		*ret = (struct extent){off, end - off, false};
		return 0;
	}
	return posix_extent_below(pd, off, min_u64(end, size), ret);
}

static int write_zeroes(struct posix_disk *pd, uint64_t off, uint64_t len)
{
	while (len > 0) {
		size_t n = (size_t)min_u64(len, ZERO_CHUNK);
		int rc = io_pwrite(pd->fd, zeroes, n, off);

		if (rc < 0)
			return rc;
		off += n;
		len -= n;
	}
	return 0;
}

/* Zeroes by writing, for filesystems that have no call for it. What is a hole already stays one when punching. */
static int zero_by_writing(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	uint64_t size = 0, end;
	int rc = posix_get_size(d, &size);

	if (rc < 0)
		return rc;
	end = min_u64(off + len, size);
	while (off < end) {
		struct extent x = {off, end - off, true};

		if (punch && (rc = posix_extent(d, off, end, &x)) < 0)
			return rc;
		if (x.data && (rc = write_zeroes(posix_disk(d), off, x.len)) < 0)
			return rc;
		off += x.len;
	}
	return 0;
}

/* 0 or a positive errno. */
static int posix_fallocate_mode(struct posix_disk *pd, int mode, uint64_t off, uint64_t len)
{
	int rc;

	do
		rc = fallocate(pd->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? errno : 0;
}

static int posix_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	struct posix_disk *pd = posix_disk(d);
	int sys;

	if (!range_fits(off, len))
		return -ERR_RANGE;
	if (len == 0)
		return 0;
	sys = posix_fallocate_mode(pd, punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE, off, len);
	/* Without room for allocated zeroes a hole still reads right. */
	if (sys == ENOSPC && !punch)
		sys = posix_fallocate_mode(pd, FALLOC_FL_PUNCH_HOLE, off, len);
	/* EINVAL: a block device asked for less than its sector. */
	if (sys == EOPNOTSUPP || sys == ENOSYS || sys == EINVAL)
		return zero_by_writing(d, off, len, punch);
	return sys ? err_from_errno(sys) : 0;
}

static int posix_sync(struct disk *d)
{
	struct posix_disk *pd = posix_disk(d);
	int rc, was = atomic_load(&pd->sync_error);

	if (was)
		return was;
	do
		rc = fdatasync(pd->fd);
	while (rc < 0 && errno == EINTR);
	if (rc < 0) {
		int code = err_from_errno(errno);

		if (atomic_compare_exchange_strong(&pd->sync_error, &was, code))
			was = code;
		return was;
	}
	/* Another thread's sync may have met the error that covers our data too. */
	return atomic_load(&pd->sync_error);
}

static void posix_disk_close(struct disk *d)
{
	struct posix_disk *pd = posix_disk(d);

	(void)close(pd->fd);
	free(pd);
}

static const struct disk_ops posix_disk_ops = {
    .read = posix_read,
    .write = posix_write,
    .zero = posix_zero,
    .extent = posix_extent,
    .sync = posix_sync,
    .forget = posix_forget,
    .set_size = posix_set_size,
    .get_size = posix_get_size,
    .allocated = posix_allocated,
    .close = posix_disk_close,
};

/* Takes fd when it returns 0. */
static int disk_from_fd(int fd, bool devices, struct disk **ret)
{
	struct posix_disk *pd;
	struct stat st;

	if (fstat(fd, &st) < 0)
		return err_from_errno(errno);
	if (!S_ISREG(st.st_mode) && !(devices && S_ISBLK(st.st_mode)))
		return -ERR_NOTSUP;
	pd = calloc(1, sizeof(*pd));
	if (!pd)
		return -ERR_NOMEM;
	pd->disk.ops = &posix_disk_ops;
	pd->block_device = S_ISBLK(st.st_mode);
	pd->fd = fd;
	*ret = &pd->disk;
	return 0;
}

static int disk_open_at(int dir, const char *path, unsigned flags, bool devices, struct disk **ret)
{
	/* O_NONBLOCK: a FIFO must not hang us before it is refused; files and block devices ignore it. */
	int sys_flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
	int fd, rc;

	PRE(!((flags & STORAGE_RDONLY) && (flags & (STORAGE_CREATE | STORAGE_TRUNC))));
	sys_flags |= flags & STORAGE_RDONLY ? O_RDONLY : O_RDWR;
	if (flags & STORAGE_CREATE)
		sys_flags |= O_CREAT | (flags & STORAGE_EXCL ? O_EXCL : 0);
	if (flags & STORAGE_TRUNC)
		sys_flags |= O_TRUNC;
	do
		fd = openat(dir, path, sys_flags, 0600);
	while (fd < 0 && errno == EINTR);
	if (fd < 0)
		return err_from_errno(errno);
	rc = disk_from_fd(fd, devices, ret);
	if (rc < 0) {
		(void)close(fd);
		return rc;
	}
	/* Pages whose write-back has failed are clean to the kernel: they go with the clean ones. Dirty ones stay. */
	if (flags & STORAGE_FRESH)
		(void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	return 0;
}

int disk_posix_open(const char *path, unsigned flags, struct disk **ret)
{
	return disk_open_at(AT_FDCWD, path, flags, true, ret);
}

int disk_posix_take(int fd, struct disk **ret)
{
	int rc = disk_from_fd(fd, true, ret);

	if (rc < 0)
		(void)close(fd);
	return rc;
}

/* "" (the root itself) is for those who allow it. */
static int path_check(const char *path)
{
	const char *p = path;

	if (path[0] == '/' || strnlen(path, STORAGE_PATH_MAX + 1) > STORAGE_PATH_MAX)
		return -ERR_RANGE;
	while (*p) {
		size_t n = strcspn(p, "/");

		if (n == 2 && p[0] == '.' && p[1] == '.')
			return -ERR_RANGE;
		p += n;
		p += strspn(p, "/");
	}
	return 0;
}

static int entry_check(const char *path)
{
	return *path ? path_check(path) : -ERR_RANGE;
}

static int posix_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	int rc = entry_check(path);

	return rc < 0 ? rc : disk_open_at(posix_storage(s)->dir, path, flags, false, ret);
}

static int posix_unlink(struct storage *s, const char *path)
{
	int rc = entry_check(path);

	if (rc < 0)
		return rc;
	return unlinkat(posix_storage(s)->dir, path, 0) < 0 ? err_from_errno(errno) : 0;
}

static int posix_rename(struct storage *s, const char *from, const char *to)
{
	int dir = posix_storage(s)->dir;
	int rc = entry_check(from);

	if (rc == 0)
		rc = entry_check(to);
	if (rc < 0)
		return rc;
	return renameat(dir, from, dir, to) < 0 ? err_from_errno(errno) : 0;
}

static int posix_mkdir(struct storage *s, const char *path)
{
	int dir = posix_storage(s)->dir;
	struct stat st;
	int rc = entry_check(path);

	if (rc < 0)
		return rc;
	if (mkdirat(dir, path, 0700) == 0)
		return 0;
	if (errno != EEXIST)
		return err_from_errno(errno);
	if (fstatat(dir, path, &st, 0) < 0)
		return err_from_errno(errno);
	return S_ISDIR(st.st_mode) ? 0 : -ERR_EXIST;
}

static int posix_rmdir(struct storage *s, const char *path)
{
	int rc = entry_check(path);

	if (rc < 0)
		return rc;
	return unlinkat(posix_storage(s)->dir, path, AT_REMOVEDIR) < 0 ? err_from_errno(errno) : 0;
}

static int open_folder(struct storage *s, const char *path, int *ret)
{
	int fd, rc = path_check(path);

	if (rc < 0)
		return rc;
	fd = openat(posix_storage(s)->dir, *path ? path : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return err_from_errno(errno);
	*ret = fd;
	return 0;
}

static int posix_sync_dir(struct storage *s, const char *path)
{
	_cleanup_close_ int fd = -1;
	int rc = open_folder(s, path, &fd);

	if (rc < 0)
		return rc;
	do
		rc = fsync(fd);
	while (rc < 0 && errno == EINTR);
	return rc < 0 ? err_from_errno(errno) : 0;
}

static int posix_list(struct storage *s, const char *path, int (*fn)(void *arg, const char *name), void *arg)
{
	struct dirent *ent;
	DIR *dir;
	int fd = -1, rc = open_folder(s, path, &fd);

	if (rc < 0)
		return rc;
	dir = fdopendir(fd);
	if (!dir) {
		rc = err_from_errno(errno);
		(void)close(fd);
		return rc;
	}
	rc = 0;
	while (rc == 0 && (errno = 0, ent = readdir(dir)) != NULL) {
		if (strcmp(ent->d_name, ".") == 0 || strcmp(ent->d_name, "..") == 0)
			continue;
		rc = fn(arg, ent->d_name);
	}
	if (rc == 0 && errno)
		rc = err_from_errno(errno);
	(void)closedir(dir);
	return rc;
}

static int posix_free_bytes(struct storage *s, uint64_t *ret_free, uint64_t *ret_total)
{
	struct statvfs vfs;

	if (fstatvfs(posix_storage(s)->dir, &vfs) < 0)
		return err_from_errno(errno);
	*ret_free = (uint64_t)vfs.f_bavail * vfs.f_frsize;
	*ret_total = (uint64_t)vfs.f_blocks * vfs.f_frsize;
	return 0;
}

static void posix_close(struct storage *s)
{
	struct posix_storage *ps = posix_storage(s);

	(void)close(ps->dir);
	free(ps);
}

static const struct storage_ops posix_storage_ops = {
    .open = posix_open,
    .unlink = posix_unlink,
    .rename = posix_rename,
    .mkdir = posix_mkdir,
    .rmdir = posix_rmdir,
    .sync_dir = posix_sync_dir,
    .list = posix_list,
    .free_bytes = posix_free_bytes,
    .close = posix_close,
};

int storage_posix_open(const char *root, struct storage **ret)
{
	struct posix_storage *ps = calloc(1, sizeof(*ps));

	if (!ps)
		return -ERR_NOMEM;
	ps->storage.ops = &posix_storage_ops;
	ps->dir = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (ps->dir < 0) {
		int rc = err_from_errno(errno);

		free(ps);
		return rc;
	}
	*ret = &ps->storage;
	return 0;
}
