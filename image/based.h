/* A volume's disk over a read-only base image (SPEC 12): what was written since the volume was made, in an overlay of
 * its own, over a qcow or qcow2 image outside the store with its backing files. To everything above it is a struct disk
 * like any other: the undo overlays, replication and backups don't know of it.
 *
 * Files of volumes/NAME (docs/format.md), in place of disk.raw:
 *   own.data, own.map   an overlay (image/overlay.h) whose words say no checksum: its blocks are written in place
 *   base.a, base.b      the record: which files the base is, and what they were when the volume was made
 *
 * A block is *own* when its word is set, for good: it is then read from and written to own.data as to a raw disk.
 * Before, it is the base's; past the base's end it is zeroes. B1 The first write to a block puts all of it into
 * own.data (what the write leaves out, from the base), then its word, and waits for no sync: a kill takes nothing of
 * it. The word is *unsettled* until a sync has covered the data, and says by which sectors a block is told that a power
 * cut, or a sync that failed, has taken: opening the volume gives those the base's content, as if the write, which
 * nobody had flushed, had not been. B2 A discard or zero makes blocks own that are a hole of own.data; where the base
 * has a hole already, nothing. B3 A sync is that of own.data, then the settled words, then the sync of own.map. B4 The
 * base is what it was when the volume was made, or the volume is not opened: size, time of change and a checksum of
 * parts of each of its files are compared.
 *
 * Who excludes whom: as for any disk, two writes in progress never touch the same block (image/volume.h).
 */
#ifndef REPFS_IMAGE_BASED_H
#define REPFS_IMAGE_BASED_H

#include "core/bitmap.h"
#include "core/err.h"
#include "image/source.h"
#include "image/storage.h"

struct based_args {
	const struct source *source; /* opened and checked */
	const char *path;	     /* absolute, as it was named; opened by this later */
	const char *backing_dir;     /* or NULL */
};

/* Makes the files in the volume's folder, which is there. size: at least the base's. The caller syncs the folder. */
int based_create(struct storage *s, const char *volume, uint64_t size, const struct based_args *a, bool durable,
		 struct err *e);
/* -ERR_NOENT: the volume has no base (no record). -ERR_STATE: the base is missing or not what it was; *e names the file
 * and says what to do. Returns owned. */
int based_open(struct storage *s, const char *volume, uint64_t size, bool durable, struct disk **ret, struct err *e);
bool based_is(const struct disk *d);
/* The base's path as it was named, borrowed, and its format. d: of based_open. */
const char *based_path(struct disk *d, const char **ret_format);
int based_check(struct disk *d, struct err *e);	    /* source_check of its base */
void based_own(struct disk *d, struct bitmap *ret); /* sets the bits of its own blocks, as far as *ret goes */
/* The same by the record alone, without opening the base. path[SOURCE_PATH_MAX]. */
int based_look(struct storage *s, const char *volume, char *path, const char **ret_format, struct err *e);
/* What the volume takes in the store, in bytes: its own blocks. */
int based_own_allocated(struct storage *s, const char *volume, uint64_t *ret);

#endif
