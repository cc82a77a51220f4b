/* A storage in memory that can lose power, for tests.
 *
 * What is written lies in a cache until its file is synced; names until a folder is synced. cs_power_cut keeps of each
 * unsynced write all, nothing or a part, and of the unsynced changes of names the first few. A failed sync behaves as
 * the kernel's does: the error comes once, the data stays readable from the cache and is never written out, or was
 * all the same.
 * cs->ops_left makes the machine stop at an operation, in the middle of it if it is a write.
 */
#ifndef REPFS_TESTS_CRASHSTORE_H
#define REPFS_TESTS_CRASHSTORE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/err.h"
#include "core/range.h"
#include "image/storage.h"

#define CS_FILE_MAX (256U << 10)
#define CS_PAGES (CS_FILE_MAX / BLOCK_SIZE)
#define CS_INODES 64
#define CS_NAMES 24
#define CS_HISTORY 16
#define CS_OPS 512

struct cs_image {
	uint8_t bytes[CS_FILE_MAX];
	bool allocated[CS_PAGES];
	uint64_t size;
};

struct cs_op {
	uint64_t off, len;
	uint8_t *data; /* NULL: set_size to off */
};

struct cs_inode {
	struct cs_image *cache, *disk;
	struct cs_op ops[CS_OPS];
	unsigned n_ops;
	bool unreadable; /* until it is written to */
	bool tears;	 /* a write to it is done in part, and fails */
};

struct cs_name {
	char path[64];
	struct cs_inode *inode;
};

struct cs_names {
	struct cs_name list[CS_NAMES];
	unsigned n;
};

struct crashstore {
	struct storage storage;
	struct cs_inode *inodes[CS_INODES];
	unsigned n_inodes;
	struct cs_names names, history[CS_HISTORY]; /* history[0]: the durable ones */
	unsigned n_history;
	uint64_t seed;
	long ops_left;		 /* < 0: no stop */
	unsigned sync_fails_in;	 /* one sync in so many fails; 0: none */
	bool failed_sync_writes; /* such a one writes all out nevertheless */
	bool tear_bytes;	 /* a write tears at any byte, else at sectors */
	bool whole_sectors;	 /* what reaches the disk of a write is the sectors as they were then, whole */
	bool stopped;
	unsigned writes, syncs;
};

struct cs_disk {
	struct disk disk;
	struct crashstore *cs;
	struct cs_inode *inode;
};

static inline uint64_t cs_random(struct crashstore *cs, uint64_t below)
{
	cs->seed ^= cs->seed << 13;
	cs->seed ^= cs->seed >> 7;
	cs->seed ^= cs->seed << 17;
	return cs->seed % below;
}

/* Whether this operation is the one that the machine stops at, or comes after it. */
static inline bool cs_stop(struct crashstore *cs)
{
	if (!cs->stopped && cs->ops_left >= 0 && cs->ops_left-- == 0)
		cs->stopped = true;
	return cs->stopped;
}

static inline void cs_image_write(struct cs_image *im, uint64_t off, const uint8_t *data, uint64_t len)
{
	PRE(off + len <= CS_FILE_MAX);
	memcpy(im->bytes + off, data, len);
	for (uint64_t p = off / BLOCK_SIZE; len > 0 && p <= (off + len - 1) / BLOCK_SIZE; p++)
		im->allocated[p] = true;
	im->size = max_u64(im->size, off + len);
}

static inline void cs_image_resize(struct cs_image *im, uint64_t size)
{
	PRE(size <= CS_FILE_MAX);
	if (size < im->size)
		memset(im->bytes + size, 0, im->size - size);
	im->size = size;
}

static inline struct cs_disk *cs_disk(struct disk *d)
{
	return CONTAINER_OF(d, struct cs_disk, disk);
}

static inline void cs_queue(struct cs_inode *in, uint64_t off, const uint8_t *data, uint64_t len)
{
	struct cs_op *op = &in->ops[in->n_ops++];

	PRE(in->n_ops < CS_OPS);
	*op = (struct cs_op){off, len, NULL};
	if (data) {
		op->data = malloc(len + 1);
		memcpy(op->data, data, len);
	}
}

static inline int cs_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	struct cs_disk *cd = cs_disk(d);

	if (cd->cs->stopped)
		return -ERR_IO;
	cd->cs->writes++;
	cd->inode->unreadable = false;
	bool torn = cs_stop(cd->cs) || cd->inode->tears;
	if (torn) {
		uint64_t stop = off + cs_random(cd->cs, len + 1);

		if (!cd->cs->tear_bytes && stop < off + len)
			stop = max_u64(round_down_u64(stop, SECTOR_SIZE), off);
		len = (size_t)(stop - off);
	}
	cs_image_write(cd->inode->cache, off, buf, len);
	if (cd->cs->whole_sectors && len > 0) {
		uint64_t first = round_down_u64(off, SECTOR_SIZE);
		uint64_t end = min_u64(round_up_u64(off + len, SECTOR_SIZE), cd->inode->cache->size);

		cs_queue(cd->inode, first, cd->inode->cache->bytes + first, end - first);
	} else {
		cs_queue(cd->inode, off, buf, len);
	}
	return torn ? -ERR_IO : 0;
}

static inline int cs_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	struct cs_disk *cd = cs_disk(d);
	uint8_t *none = calloc(1, len + 1);
	int rc;

	(void)punch;
	len = off < cd->inode->cache->size ? min_u64(len, cd->inode->cache->size - off) : 0;
	rc = len ? cs_write(d, off, none, len) : 0;
	free(none);
	return rc;
}

static inline int cs_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	struct cs_disk *cd = cs_disk(d);
	uint64_t have = off < CS_FILE_MAX ? min_u64(len, CS_FILE_MAX - off) : 0;

	if (cd->cs->stopped || cd->inode->unreadable)
		return -ERR_IO;
	memset(buf, 0, len);
	memcpy(buf, cd->inode->cache->bytes + off, have);
	return 0;
}

static inline int cs_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	const struct cs_image *im = cs_disk(d)->inode->cache;
	uint64_t at = off;
	bool data = off < im->size && im->allocated[off / BLOCK_SIZE];

	while (at < end && (at < im->size && im->allocated[at / BLOCK_SIZE]) == data)
		at = round_down_u64(at, BLOCK_SIZE) + BLOCK_SIZE;
	*ret = (struct extent){off, min_u64(at, end) - off, data};
	return 0;
}

static inline void cs_apply(struct cs_image *im, const struct cs_op *op)
{
	if (op->data)
		cs_image_write(im, op->off, op->data, op->len);
	else
		cs_image_resize(im, op->off);
}

static inline void cs_forget_ops(struct cs_inode *in)
{
	for (unsigned i = 0; i < in->n_ops; i++)
		free(in->ops[i].data);
	in->n_ops = 0;
}

static inline int cs_sync(struct disk *d)
{
	struct cs_disk *cd = cs_disk(d);
	struct crashstore *cs = cd->cs;

	if (cs_stop(cs))
		return -ERR_IO;
	cs->syncs++;
	if (cs->sync_fails_in && cs_random(cs, cs->sync_fails_in) == 0) {
		for (unsigned i = 0; cs->failed_sync_writes && i < cd->inode->n_ops; i++)
			cs_apply(cd->inode->disk, &cd->inode->ops[i]);
		cs_forget_ops(cd->inode);
		return -ERR_IO;
	}
	for (unsigned i = 0; i < cd->inode->n_ops; i++)
		cs_apply(cd->inode->disk, &cd->inode->ops[i]);
	cs_forget_ops(cd->inode);
	return 0;
}

static inline int cs_set_size(struct disk *d, uint64_t size)
{
	struct cs_disk *cd = cs_disk(d);

	if (cs_stop(cd->cs))
		return -ERR_IO;
	cs_image_resize(cd->inode->cache, size);
	cs_queue(cd->inode, size, NULL, 0);
	return 0;
}

static inline int cs_get_size(struct disk *d, uint64_t *ret)
{
	*ret = cs_disk(d)->inode->cache->size;
	return 0;
}

static inline int cs_allocated(struct disk *d, uint64_t *ret)
{
	const struct cs_image *im = cs_disk(d)->inode->cache;

	*ret = 0;
	for (unsigned i = 0; i < CS_PAGES; i++)
		*ret += im->allocated[i] ? BLOCK_SIZE : 0;
	return 0;
}

static inline void cs_disk_close(struct disk *d)
{
	free(cs_disk(d));
}

static const struct disk_ops cs_disk_ops = {
    .read = cs_read,
    .write = cs_write,
    .zero = cs_zero,
    .extent = cs_extent,
    .sync = cs_sync,
    .set_size = cs_set_size,
    .get_size = cs_get_size,
    .allocated = cs_allocated,
    .close = cs_disk_close,
};

static inline struct crashstore *crashstore(struct storage *s)
{
	return CONTAINER_OF(s, struct crashstore, storage);
}

static inline struct cs_name *cs_find(struct crashstore *cs, const char *path)
{
	for (unsigned i = 0; i < cs->names.n; i++) {
		if (strcmp(cs->names.list[i].path, path) == 0)
			return &cs->names.list[i];
	}
	return NULL;
}

/* After each change of names. */
static inline void cs_names_changed(struct crashstore *cs)
{
	PRE(cs->n_history < CS_HISTORY);
	cs->history[cs->n_history++] = cs->names;
}

static inline void cs_remove(struct crashstore *cs, const char *path)
{
	struct cs_name *n = cs_find(cs, path);

	if (n)
		*n = cs->names.list[--cs->names.n];
}

static inline void cs_link(struct crashstore *cs, const char *path, struct cs_inode *inode)
{
	struct cs_name *n;

	cs_remove(cs, path);
	PRE(cs->names.n < CS_NAMES);
	n = &cs->names.list[cs->names.n++];
	snprintf(n->path, sizeof(n->path), "%s", path);
	n->inode = inode;
}

static inline int cs_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	struct crashstore *cs = crashstore(s);
	struct cs_name *n = cs_find(cs, path);
	struct cs_disk *cd;
	struct cs_inode *inode;

	if (cs->stopped)
		return -ERR_IO;
	if (!n && !(flags & STORAGE_CREATE))
		return -ERR_NOENT;
	if (n && (flags & STORAGE_EXCL))
		return -ERR_EXIST;
	if (!n) {
		if (cs_stop(cs))
			return -ERR_IO;
		PRE(cs->n_inodes < CS_INODES);
		inode = calloc(1, sizeof(*inode));
		inode->cache = calloc(1, sizeof(*inode->cache));
		inode->disk = calloc(1, sizeof(*inode->disk));
		cs->inodes[cs->n_inodes++] = inode;
		cs_link(cs, path, inode);
		cs_names_changed(cs);
	} else {
		inode = n->inode;
		if (flags & STORAGE_TRUNC) {
			cs_image_resize(inode->cache, 0);
			cs_queue(inode, 0, NULL, 0);
		}
	}
	cd = calloc(1, sizeof(*cd));
	cd->disk.ops = &cs_disk_ops;
	cd->cs = cs;
	cd->inode = inode;
	*ret = &cd->disk;
	return 0;
}

static inline int cs_unlink(struct storage *s, const char *path)
{
	struct crashstore *cs = crashstore(s);

	if (cs_stop(cs))
		return -ERR_IO;
	if (!cs_find(cs, path))
		return -ERR_NOENT;
	cs_remove(cs, path);
	cs_names_changed(cs);
	return 0;
}

static inline int cs_rename(struct storage *s, const char *from, const char *to)
{
	struct crashstore *cs = crashstore(s);
	struct cs_name *n = cs_find(cs, from);
	struct cs_inode *inode;

	if (cs_stop(cs))
		return -ERR_IO;
	if (!n)
		return -ERR_NOENT;
	inode = n->inode;
	cs_remove(cs, from);
	cs_link(cs, to, inode);
	cs_names_changed(cs);
	return 0;
}

static inline int cs_sync_dir(struct storage *s, const char *path)
{
	struct crashstore *cs = crashstore(s);

	(void)path;
	if (cs_stop(cs))
		return -ERR_IO;
	cs->history[0] = cs->names;
	cs->n_history = 1;
	return 0;
}

static const struct storage_ops cs_ops = {
    .open = cs_open,
    .unlink = cs_unlink,
    .rename = cs_rename,
    .sync_dir = cs_sync_dir,
};

static inline void cs_init(struct crashstore *cs, uint64_t seed)
{
	memset(cs, 0, sizeof(*cs));
	cs->storage.ops = &cs_ops;
	cs->seed = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	cs->ops_left = -1;
	cs->n_history = 1;
}

static inline void cs_free(struct crashstore *cs)
{
	for (unsigned i = 0; i < cs->n_inodes; i++) {
		cs_forget_ops(cs->inodes[i]);
		free(cs->inodes[i]->cache);
		free(cs->inodes[i]->disk);
		free(cs->inodes[i]);
	}
}

/* The process alone died: what it wrote stays in the cache. */
static inline void cs_killed(struct crashstore *cs)
{
	cs->stopped = false;
	cs->ops_left = -1;
}

static inline void cs_apply_torn(struct crashstore *cs, struct cs_image *im, const struct cs_op *op)
{
	uint64_t at = op->off, end = op->off + op->len;

	if (!op->data || cs->tear_bytes) {
		struct cs_op part = *op;

		part.len = op->data ? cs_random(cs, op->len + 1) : 0;
		cs_apply(im, &part);
		return;
	}
	while (at < end) {
		uint64_t stop = min_u64(round_down_u64(at, SECTOR_SIZE) + SECTOR_SIZE, end);

		if (cs_random(cs, 2))
			cs_image_write(im, at, op->data + (at - op->off), stop - at);
		at = stop;
	}
}

static inline void cs_power_cut(struct crashstore *cs)
{
	cs->names = cs->history[cs_random(cs, cs->n_history)];
	cs->history[0] = cs->names;
	cs->n_history = 1;
	for (unsigned i = 0; i < cs->n_inodes; i++) {
		struct cs_inode *in = cs->inodes[i];

		for (unsigned k = 0; k < in->n_ops; k++) {
			uint64_t what = cs_random(cs, 3);

			if (what == 0)
				cs_apply(in->disk, &in->ops[k]);
			else if (what == 1)
				cs_apply_torn(cs, in->disk, &in->ops[k]);
		}
		cs_forget_ops(in);
		*in->cache = *in->disk;
	}
	cs_killed(cs);
}

#endif
