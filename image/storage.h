/* The storage vtable: the only way the image modules touch files. storage_posix is the real one; the simulator
 * brings one that loses, reorders and tears unsynced writes.
 *
 * Paths are relative to the storage's root, '/'-separated, without "..", at most STORAGE_PATH_MAX bytes.
 * All functions return 0 (or a count where said) or -ERR_x. A file's functions may be called concurrently.
 * Durability: what `sync` of a file covers is that file's data and size; a name (create, rename, unlink) is
 * durable after sync_dir of its folder. Neither is implied by anything else.
 */
#ifndef REPFS_IMAGE_STORAGE_H
#define REPFS_IMAGE_STORAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STORAGE_PATH_MAX 512

struct storage;

/* A random-access file. */
struct disk {
	const struct disk_ops *ops;
};

struct extent {
	uint64_t off, len; /* bytes */
	bool data;	   /* false: a hole, reads as zeroes */
};

struct disk_ops {
	/* Whole ranges or an error. Reading past the end gives zeroes (an overlay file is as long as what was saved).
	 */
	int (*read)(struct disk *d, uint64_t off, void *buf, size_t len);
	int (*write)(struct disk *d, uint64_t off, const void *buf, size_t len);
	/* Make the range read as zeroes. punch: free the space; otherwise keep or make it allocated where that is
	 * possible. Falls back to writing zeroes where the filesystem cannot do it. Never changes the size. */
	int (*zero)(struct disk *d, uint64_t off, uint64_t len, bool punch);
	/* The extent that holds `off`, clipped to [off, end); end is the size at most. Past the size: a hole. */
	int (*extent)(struct disk *d, uint64_t off, uint64_t end, struct extent *ret);
	/* Data and size durable. After an error the data written since the last success counts as lost, and every
	 * later sync of this disk fails too (I10); one opened afterwards knows nothing of it. */
	int (*sync)(struct disk *d);
	int (*set_size)(struct disk *d, uint64_t size);
	int (*get_size)(struct disk *d, uint64_t *ret);
	/* Allocated bytes (st_blocks * 512). */
	int (*allocated)(struct disk *d, uint64_t *ret);
	void (*close)(struct disk *d);
	/* What is read of the range next comes from the medium, as far as the system can; what is not written out
	 * stays. len 0: to the end. May be NULL. */
	void (*forget)(struct disk *d, uint64_t off, uint64_t len);
};

enum storage_open_flags {
	STORAGE_CREATE = 1 << 0, /* make it if it does not exist, mode 0600 */
	STORAGE_EXCL = 1 << 1,	 /* with CREATE: -ERR_EXIST if it exists */
	STORAGE_TRUNC = 1 << 2,
	STORAGE_RDONLY = 1 << 3,
	/* Reads show what the medium has or will get, not what a failed sync of an earlier process has left behind in
	 * the system's cache: that looks written and never will be. As far as the system can. */
	STORAGE_FRESH = 1 << 4,
};

struct storage_ops {
	int (*open)(struct storage *s, const char *path, unsigned flags, struct disk **ret); /* returns owned */
	int (*unlink)(struct storage *s, const char *path);				     /* -ERR_NOENT if absent */
	int (*rename)(struct storage *s, const char *from, const char *to);
	int (*mkdir)(struct storage *s, const char *path); /* mode 0700; 0 if it is there already */
	int (*rmdir)(struct storage *s, const char *path);
	int (*sync_dir)(struct storage *s, const char *path); /* "" is the root */
	/* Calls fn for every entry except . and ..; a non-zero return of fn ends it and is returned. */
	int (*list)(struct storage *s, const char *path, int (*fn)(void *arg, const char *name), void *arg);
	int (*free_bytes)(struct storage *s, uint64_t *ret_free, uint64_t *ret_total);
	void (*close)(struct storage *s);
};

struct storage {
	const struct storage_ops *ops;
};

static inline int disk_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	return d->ops->read(d, off, buf, len);
}
static inline int disk_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	return d->ops->write(d, off, buf, len);
}
static inline int disk_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	return d->ops->zero(d, off, len, punch);
}
static inline int disk_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	return d->ops->extent(d, off, end, ret);
}
static inline int disk_sync(struct disk *d)
{
	return d->ops->sync(d);
}
static inline int disk_set_size(struct disk *d, uint64_t size)
{
	return d->ops->set_size(d, size);
}
static inline int disk_get_size(struct disk *d, uint64_t *ret)
{
	return d->ops->get_size(d, ret);
}
static inline void disk_forget(struct disk *d, uint64_t off, uint64_t len)
{
	if (d->ops->forget)
		d->ops->forget(d, off, len);
}
static inline int disk_allocated(struct disk *d, uint64_t *ret)
{
	return d->ops->allocated(d, ret);
}
static inline void disk_close(struct disk *d) /* NULL is fine */
{
	if (d)
		d->ops->close(d);
}
static inline int storage_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	return s->ops->open(s, path, flags, ret);
}
static inline int storage_unlink(struct storage *s, const char *path)
{
	return s->ops->unlink(s, path);
}
static inline int storage_rename(struct storage *s, const char *from, const char *to)
{
	return s->ops->rename(s, from, to);
}
static inline int storage_mkdir(struct storage *s, const char *path)
{
	return s->ops->mkdir(s, path);
}
static inline int storage_rmdir(struct storage *s, const char *path)
{
	return s->ops->rmdir(s, path);
}
static inline int storage_sync_dir(struct storage *s, const char *path)
{
	return s->ops->sync_dir(s, path);
}
static inline int storage_list(struct storage *s, const char *path, int (*fn)(void *, const char *), void *arg)
{
	return s->ops->list(s, path, fn, arg);
}
static inline int storage_free_bytes(struct storage *s, uint64_t *ret_free, uint64_t *ret_total)
{
	return s->ops->free_bytes(s, ret_free, ret_total);
}
static inline void storage_close(struct storage *s)
{
	if (s)
		s->ops->close(s);
}

/* The real one, rooted at the folder `root` (must exist). Returns owned. */
int storage_posix_open(const char *root, struct storage **ret);
/* A single existing file or block device outside a store, by its path in the host. */
int disk_posix_open(const char *path, unsigned flags, struct disk **ret);
/* The same on a descriptor that is open already; takes it over, on failure too. */
int disk_posix_take(int fd, struct disk **ret);

#endif
