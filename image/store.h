/* A store: the folder that holds everything repfs keeps on a host (SPEC 2, docs/format.md), its lock, its groups.
 *
 *   STORE/lock             flock'ed by the daemon or an offline verb; holds the pid of the holder for messages
 *   STORE/store.a .b       store record: uuid, format version, durability
 *   STORE/groups/G.a .b    one group's record (struct repl_meta, core/repl_meta.h)
 *   STORE/volumes/NAME/    see image/volume.h
 *   STORE/control.sock     the daemon's
 *   STORE/pending/NAME     a volume that is being made or deleted (an empty file)
 *   STORE/orphans/NAME     a folder with data that no record named when the store was opened
 *
 * A volume exists when a group's record names it. Making one: its folder first, then the record. Deleting: the record
 * first, then the folder. Folders that no record names are leftovers, settled by store_open: removed when pending/
 * names them or when they hold no data; else moved to orphans/, since a lost record must not cost the disk. While a
 * record can't be read, nothing is removed or moved. One that holds no data, or that pending/ names, is removed too
 * when its name is to be used again: what kept it from being removed may be over.
 *
 * Thread-safe, except that the caller makes the saves of one group one at a time. Making and deleting volumes exclude
 * each other here, an import only while it begins and ends. They look at the records of groups that are in use too: a
 * load waits for a save.
 */
#ifndef REPFS_IMAGE_STORE_H
#define REPFS_IMAGE_STORE_H

#include "core/err.h"
#include "core/repl_meta.h"
#include "image/storage.h"
#include "image/volume.h"

#define STORE_GROUPS_MAX 256

struct store;

struct store_info {
	uint8_t uuid[16];
	enum volume_durability durability;
};

enum store_open_flags {
	STORE_CREATE = 1 << 0, /* make the folder (mode 0700) and the store record if absent */
};

/* Takes the lock; held by another process: -ERR_BUSY, naming its pid. `durability` is used when it is made here; -1 =
 * POWER. A folder that is not empty and not a store is refused by name. Returns owned. */
int store_open(const char *path, unsigned flags, int durability, struct store **ret, struct err *e);
/* The same on a storage that is there already and that nobody else uses, made if it holds no store: no folder, no lock.
 * Takes it over (storage_close), after a failure too. name: for messages. */
int store_open_on(struct storage *s, const char *name, int durability, struct store **ret, struct err *e);
void store_close(struct store *st);
const struct store_info *store_info(const struct store *st);
struct storage *store_storage(struct store *st); /* borrowed */
const char *store_path(const struct store *st);
/* Change of durability, durable. From process to power everything in the store is synced first: before volumes are
 * opened. */
int store_set_durability(struct store *st, enum volume_durability dur, struct err *e);

/* Groups. load returns owned (free); every record is validated in full (I11). Saving is repl_meta_encode + meta_save.
 */
int store_list_groups(struct store *st, int (*fn)(void *arg, const char *group), void *arg);
int store_load_group(struct store *st, const char *group, struct repl_meta **ret, struct err *e);
int store_save_group(struct store *st, const struct repl_meta *m, struct err *e);
/* -ERR_NOENT: there is none; in `power` that is durable then, as the deletion is. */
int store_delete_group(struct store *st, const char *group, struct err *e);

/* The offline forms of the verbs, also used by the daemon; the daemon passes the groups that it has loaded through
 * `find`/`saved` hooks instead of files where needed (see daemon.c). Names and sizes are validated here:
 * -ERR_USAGE with the rule that was broken. */
bool store_name_valid(const char *name);	    /* SPEC 13 */
int store_check_size(uint64_t size, struct err *e); /* > 0, multiple of 512, <= VOLUME_SIZE_MAX */
/* Finds the group that has the volume; returns owned copy of its record or -ERR_NOENT. */
int store_find_volume(struct store *st, const char *volume, struct repl_meta **ret_group, uint32_t *ret_index,
		      struct err *e);
/* Adds a volume to group (made if absent; NULL: of the volume's name): folder, then record. Refused unless the group
 * is standalone. */
int store_create_volume(struct store *st, const char *volume, uint64_t size, const char *group, struct err *e);
struct store_base_args {
	const char *volume, *file; /* file: absolute */
	const char *backing_dir;   /* absolute, or NULL */
	const char *group;	   /* NULL: the volume's name */
};
/* Makes a volume over a qcow or qcow2 image (image/based.h); nothing is copied. size 0: the image's. The volume counts
 * as written. The image is opened, with its backing files, whenever the volume is, and must stay as it is. */
int store_create_over(struct store *st, const struct store_base_args *args, uint64_t size, uint64_t *ret_size,
		      const char **ret_format, struct err *e);
int store_delete_volume(struct store *st, const char *volume, struct err *e);
/* For who makes a folder by volume_create. begin: what is left there of one that could not be removed is, and until end
 * nobody takes the folder, which no record names yet, for such a one. */
struct store_making {
	const char *volume; /* borrowed */
	struct store_making *next;
};
void store_making_begin(struct store *st, struct store_making *m, const char *volume);
void store_making_end(struct store *st, const struct store_making *m);

/* Opens the i-th volume of a group with the overlays that its record names (volume_open). Returns owned. */
int store_open_volume(struct store *st, const struct repl_meta *m, uint32_t i, struct volume **ret, struct err *e);
/* The clones of the i-th volume, as volume_open and volume_switch_clones take them; returns how many. */
uint32_t store_clones_of(const struct repl_meta *m, uint32_t i, struct volume_clone ret[static GROUP_CLONES_MAX]);

/* Progress of a long copy; a non-zero return cancels (-ERR_CANCELED). */
typedef int (*store_progress_fn)(void *arg, uint64_t done, uint64_t total);

struct store_import_args {
	const char *volume, *file;
	const char *format;	 /* NULL: told from the magic, none means raw; else "raw", "zst", "qcow", "qcow2" */
	const char *backing_dir; /* where backing files may lie too, or NULL */
	const char *group;	 /* NULL: the volume's name */
};
/* Copies an image (image/source.h) into a new volume: holes, zero clusters and blocks of zeroes become holes. Nothing
 * is left behind on failure or cancel. *ret_format (may be NULL): what the file was taken as. */
int store_import(struct store *st, const struct store_import_args *args, store_progress_fn fn, void *arg,
		 const char **ret_format, struct err *e);
/* Copies a layer of an open volume to a new sparse file; FILE must not exist, appears under its name only when
 * whole (image/newfile.h), synced. ckpt 0 with LAYER_DISK: the disk. */
/* size: what the file gets; 0: the volume's. */
int volume_export(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t size, const char *file,
		  store_progress_fn fn, void *arg, struct err *e);

#endif
