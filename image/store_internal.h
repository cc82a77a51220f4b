/* What store.c lends to store_volumes.c. */
#ifndef REPFS_IMAGE_STORE_INTERNAL_H
#define REPFS_IMAGE_STORE_INTERNAL_H

#include "core/os/thread.h"
#include "image/store.h"

#define STORE_RECORD_LOCKS 64U

struct store {
	char *path;
	int lock_fd;
	struct storage *storage;
	struct store_info info;
	/* Held while names of volumes and groups are checked and the record that settles them is saved; across I/O, but
	 * never that of a long copy. Taken before one of records. */
	struct mutex names;
	struct store_making *making; /* under names */
	/* Of a group's record, by its name: a load mends what it finds of a save, so neither runs beside the other.
	 * Innermost; across I/O. */
	struct mutex records[STORE_RECORD_LOCKS];
};

/* "VERB NAME: ", then fmt. Returns -code. */
int store_refuse(struct err *e, int code, const char *verb, const char *name, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
/* -ERR_USAGE with the rule for names. what: "volume" or "group". */
int store_check_name(struct err *e, const char *verb, const char *what, const char *name);

/* Marks `volume` as being made or deleted: a folder that no record names is then removed by the next store_open. */
int store_pending_add(struct store *st, const char *volume);
void store_pending_remove(struct store *st, const char *volume);
/* volume_delete, and in `power` durably: its mark may go then. */
int store_remove_folder(struct store *st, const char *volume, struct err *e);
/* In `power`: what records there are is durable, those that are not there included. */
int store_sync_groups(struct store *st);

/* Whether volumes/NAME is there. Negative: can't be told. One that nobody is making, and no record names, which the
 * caller has seen, is settled first, as store_open does, unless it has data that is not marked. */
int store_settle_folder(struct store *st, const char *volume) REQUIRES(st->names);

#endif
