/* See faultstore.h. */
#include "tests/lib/faultstore.h"

#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "core/check.h"
#include "core/err.h"

struct fault_disk {
	struct disk disk;
	struct disk *real;
	struct faults *f; /* NULL: not a file that fails */
	_Atomic int sync_error;
	_Atomic bool written;
};

struct fault_storage {
	struct storage storage;
	struct storage *real;
	struct faults *f;
};

static struct fault_disk *disk_of(struct disk *d)
{
	return CONTAINER_OF(d, struct fault_disk, disk);
}

static struct fault_storage *storage_of(struct storage *s)
{
	return CONTAINER_OF(s, struct fault_storage, storage);
}

static int hit(struct faults *f, int code)
{
	if (code)
		atomic_fetch_add(&f->failed, 1);
	return code;
}

static int fault_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	struct fault_disk *x = disk_of(d);
	if (x->f)
		atomic_fetch_add(&x->f->reading, 1);
	while (x->f && atomic_load(&x->f->hold_read))
		(void)poll(NULL, 0, 1);
	int err = x->f ? hit(x->f, atomic_load(&x->f->read)) : 0;
	return err ? err : disk_read(x->real, off, buf, len);
}

static void held(struct faults *f)
{
	while (f && atomic_load(&f->hold))
		(void)poll(NULL, 0, 1);
}

/* Half of it is written: what a failed write leaves is nobody's promise. */
static int fault_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	struct fault_disk *x = disk_of(d);
	x->written = true;
	held(x->f);
	int once = x->f ? atomic_exchange(&x->f->write_once, 0) : 0;
	int err = x->f ? hit(x->f, once ? once : atomic_load(&x->f->write)) : 0;
	int rc = disk_write(x->real, off, buf, err ? len / 2 : len);
	return err ? err : rc;
}

static int fault_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	struct fault_disk *x = disk_of(d);
	held(x->f);
	int err = x->f ? hit(x->f, atomic_load(&x->f->write)) : 0;
	return err ? err : disk_zero(x->real, off, len, punch);
}

static int fault_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	return disk_extent(disk_of(d)->real, off, end, ret);
}

static int fault_sync(struct disk *d)
{
	struct fault_disk *x = disk_of(d);
	for (; x->f && x->written && atomic_load(&x->f->hold_sync); atomic_store(&x->f->syncing, 1))
		(void)poll(NULL, 0, 1);
	int err = x->f ? atomic_load(&x->f->sync) : 0;
	if (x->f && !err && (err = atomic_exchange(&x->f->sync_once, 0)) != 0)
		atomic_store(&x->sync_error, err);
	err = err ? err : atomic_load(&x->sync_error);
	return err ? hit(x->f, err) : disk_sync(x->real);
}

static int fault_set_size(struct disk *d, uint64_t size)
{
	return disk_set_size(disk_of(d)->real, size);
}

static int fault_get_size(struct disk *d, uint64_t *ret)
{
	return disk_get_size(disk_of(d)->real, ret);
}

static int fault_allocated(struct disk *d, uint64_t *ret)
{
	return disk_allocated(disk_of(d)->real, ret);
}

static void fault_disk_close(struct disk *d)
{
	disk_close(disk_of(d)->real);
	free(disk_of(d));
}

static const struct disk_ops disk_ops = {
    .read = fault_read,
    .write = fault_write,
    .zero = fault_zero,
    .extent = fault_extent,
    .sync = fault_sync,
    .set_size = fault_set_size,
    .get_size = fault_get_size,
    .allocated = fault_allocated,
    .close = fault_disk_close,
};

static int fault_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	struct fault_storage *x = storage_of(s);
	struct fault_disk *d = calloc(1, sizeof(*d));
	if (d == NULL)
		return -ERR_NOMEM;
	int rc = storage_open(x->real, path, flags, &d->real);
	if (rc < 0) {
		free(d);
		return rc;
	}
	d->disk.ops = &disk_ops;
	d->f = x->f && strstr(path, x->f->match) ? x->f : NULL;
	*ret = &d->disk;
	return 0;
}

static int fault_unlink(struct storage *s, const char *path)
{
	return storage_unlink(storage_of(s)->real, path);
}

static int fault_rename(struct storage *s, const char *from, const char *to)
{
	return storage_rename(storage_of(s)->real, from, to);
}

static int fault_mkdir(struct storage *s, const char *path)
{
	return storage_mkdir(storage_of(s)->real, path);
}

static int fault_rmdir(struct storage *s, const char *path)
{
	return storage_rmdir(storage_of(s)->real, path);
}

static int fault_sync_dir(struct storage *s, const char *path)
{
	return storage_sync_dir(storage_of(s)->real, path);
}

static int fault_list(struct storage *s, const char *path, int (*fn)(void *, const char *), void *arg)
{
	return storage_list(storage_of(s)->real, path, fn, arg);
}

static int fault_free_bytes(struct storage *s, uint64_t *ret_free, uint64_t *ret_total)
{
	return storage_free_bytes(storage_of(s)->real, ret_free, ret_total);
}

static void fault_close(struct storage *s)
{
	storage_close(storage_of(s)->real);
	free(storage_of(s));
}

static const struct storage_ops storage_ops = {
    .open = fault_open,
    .unlink = fault_unlink,
    .rename = fault_rename,
    .mkdir = fault_mkdir,
    .rmdir = fault_rmdir,
    .sync_dir = fault_sync_dir,
    .list = fault_list,
    .free_bytes = fault_free_bytes,
    .close = fault_close,
};

struct storage *faultstore_open(const char *root, struct faults *f)
{
	struct fault_storage *x = calloc(1, sizeof(*x));
	(void)mkdir(root, 0700);
	if (x == NULL || storage_posix_open(root, &x->real) < 0) {
		free(x);
		return NULL;
	}
	x->storage.ops = &storage_ops;
	x->f = f;
	return &x->storage;
}
