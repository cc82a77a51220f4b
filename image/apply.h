/* Puts a backup that has a list of extents (image/extentlist.h) onto a volume that holds what it is to go onto: an
 * incremental onto its base, a stream onto what it began with, a none onto what came after.
 */
#ifndef REPFS_IMAGE_APPLY_H
#define REPFS_IMAGE_APPLY_H

#include "image/extentlist.h"
#include "image/store.h"

/* Writes len bytes, at most APPLY_PIECE, at off; buf NULL: zeroes, of any length. 0 or -ERR_x. */
typedef int (*apply_write_fn)(void *arg, uint64_t off, uint64_t len, const void *buf);
#define APPLY_PIECE (1U << 20)

/* Everything that can be checked is checked before the first write: the list, that the volume has its size, and each
 * frame of a .zst. A failure or a cancel after that leaves a part of it written; the same again completes it. Messages
 * have no verb in front. *ret_head (may be NULL): what was applied. */
int apply_backup(const char *file, uint64_t size, apply_write_fn fn, void *arg, store_progress_fn progress,
		 void *progress_arg, struct extentlist_head *ret_head, struct err *e);

/* The same on a volume of a store that no daemon uses: one that has never had a peer, as what differs from a peer is
 * the daemon's to know. */
int store_apply(struct store *st, const char *volume, const char *file, store_progress_fn fn, void *arg,
		struct extentlist_head *ret_head, struct err *e);

#endif
