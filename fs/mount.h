/* The /dev/fuse session: mounting, the worker threads, the thread that sends notifications, and the orderly end.
 *
 * The mount is made here with mount(2) (fusermount3 for an ordinary user) and libfuse gets the open descriptor, so that
 * nothing but this module knows where the descriptor comes from.
 *
 * Notifications (dropping pages of the kernel's cache) wait for pages that requests hold locked. They are therefore
 * sent by a thread of their own and never from a request's handler, and the session serves on while one is under way.
 */
#ifndef REPFS_FS_MOUNT_H
#define REPFS_FS_MOUNT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/err.h"

#define MOUNT_REQUEST_MAX (1U << 20) /* largest read or write, bytes */
#define MOUNT_THREADS_MAX 64
#define MOUNT_BACKGROUND_DEFAULT 256
#define MOUNT_BACKGROUND_MAX 4096

struct fuse_conn_info;
struct fuse_lowlevel_ops;
struct mount;

struct mount_options {
	bool allow_other, allow_root;
	bool fuse_debug;     /* libfuse prints every request */
	bool guard;	     /* mark the folder below immutable while it is mounted over */
	unsigned long flags; /* MS_RDONLY, MS_NOEXEC, ... */
	unsigned background; /* max_background; 0: the default */
	const char *fsname;  /* source in the mount table, borrowed */
	const char *kernel;  /* further options for the kernel ("context=..."), comma separated, borrowed; NULL: none */
};

/* Refuses what can't be mounted on, with the reason: not a folder, not empty. A dead mount of repfs there (its daemon
 * is gone) is unmounted first; *ret_cleaned says so. */
int mount_prepare(const char *path, bool *ret_cleaned, struct err *e);

/* The object alone, so that notifications can be posted to it; nothing is mounted yet. Returns owned. */
int mount_create(struct mount **ret, struct err *e);
/* Mounts, starts the threads and returns when the kernel has been answered. path (absolute) and o are borrowed until
 * mount_stop. threads 0: max(4, 2 * processors). ended(arg) is called once from a thread when the session ends by
 * itself (unmounted from outside). */
int mount_start(struct mount *m, const char *path, const struct mount_options *o, unsigned threads,
		const struct fuse_lowlevel_ops *ops, void *userdata, void (*ended)(void *arg), void *arg,
		struct err *e);
/* To be called by the session's init handler. */
void mount_init(struct mount *m, struct fuse_conn_info *conn);

/* Unmounts; a busy mount is detached, and who has files open there is served until mount_stop. Bounded, as mount_stop:
 * what does not end by itself is cut off. */
void mount_detach(struct mount *m);
/* mount_detach, if that was not called, and ends the session's threads; no handler runs after it. A request that has no
 * answer by then fails in the kernel (ECONNABORTED), though one may be sent until mount_free. */
void mount_stop(struct mount *m);
/* All requests must have been answered. NULL is fine. */
void mount_free(struct mount *m);

/* A piece of work for the notification thread. fn runs once, in order. */
struct mount_job {
	void (*fn)(struct mount *m, struct mount_job *job);
	struct mount_job *next; /* the module's */
};
/* Before mount_start and from mount_stop on fn runs at once, in the caller's thread, and mount_drop_cache does
 * nothing: there is nobody to be told. */
void mount_post(struct mount *m, struct mount_job *job);
/* mount_post and wait until it has run. Not from a request's handler and with no lock held. */
void mount_post_wait(struct mount *m, struct mount_job *job);
/* For fn: drops the attributes and the cached pages of [off, off + len) of an inode; len 0: all. */
void mount_drop_cache(struct mount *m, uint64_t ino, uint64_t off, uint64_t len);

#endif
