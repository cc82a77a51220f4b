/* What the mount shows (SPEC 4), as FUSE low-level operations over fs/daemon.h. */
#ifndef REPFS_FS_FUSE_OPS_H
#define REPFS_FS_FUSE_OPS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "core/err.h"

struct daemon;
struct fuse_lowlevel_ops;
struct fuse_ops;
struct mount;

struct fuse_ops_config {
	uid_t uid; /* owner of everything */
	gid_t gid;
	bool umask_given; /* false: folders 0755, volumes 0600, the rest 0400 */
	mode_t umask;
};

/* m is borrowed until fuse_ops_free. Returns owned. */
int fuse_ops_create(const struct fuse_ops_config *cfg, struct mount *m, struct fuse_ops **ret, struct err *e);
/* Before the session starts. d is borrowed until the session has stopped. */
void fuse_ops_set_daemon(struct fuse_ops *f, struct daemon *d);
/* Until every request that changes a volume has its answer, or `ms` have passed. */
void fuse_ops_wait_answered(struct fuse_ops *f, unsigned ms);
/* The session has stopped: closes what users still had open on a mount that was detached under them, unless a request
 * is under way that may use it (fuse_ops_free does it then: a volume's handle may outlive its daemon). */
void fuse_ops_close_files(struct fuse_ops *f);
/* Every request answered and every file closed or never to be used again. NULL is fine. */
void fuse_ops_free(struct fuse_ops *f);

const struct fuse_lowlevel_ops *fuse_ops_table(void); /* userdata: struct fuse_ops */

/* daemon_hooks.invalidate; arg: struct fuse_ops. */
void fuse_ops_invalidate(void *arg, uint32_t gvol_id);

#endif
