/* Inode numbers of the mount: fixed, so that nothing has to be remembered between requests.
 *
 * The fixed folders have the numbers of their kinds (1 to 6; the root is FUSE's 1). Everything else is
 *   kind << 59 | id << 37 | checkpoint
 * with id the volume's (a clone's; for a status file, the group's) number in the daemon, and checkpoint 0 but for the
 * files of a checkpoint. The top bit stays clear: some tools print inode numbers as signed. Invariant: inode_parse
 * accepts exactly the numbers that inode_make gives.
 */
#ifndef REPFS_FS_INODE_H
#define REPFS_FS_INODE_H

#include <stdbool.h>
#include <stdint.h>

/* Largest volume or group id: so many volumes can be made during one daemon's life. */
#define INODE_ID_MAX ((UINT32_C(1) << 22) - 1)
/* Largest checkpoint number: forty years of one each 10 ms. */
#define INODE_CKPT_MAX ((UINT64_C(1) << 37) - 1)

enum inode_kind {
	INODE_NONE,
	/* the fixed folders */
	INODE_ROOT,
	INODE_VOLUMES,
	INODE_OVERLAYS,
	INODE_CHECKPOINTS,
	INODE_CLONES,
	INODE_STATUS,
	/* of a volume */
	INODE_VOLUME,	   /* volumes/NAME */
	INODE_OVERLAY_DIR, /* overlays/NAME */
	INODE_ACTIVE,	   /* overlays/NAME/active */
	INODE_HIDDEN,	   /* overlays/NAME/hidden */
	INODE_CKPT_DIR,	   /* checkpoints/NAME */
	INODE_CKPT,	   /* checkpoints/NAME/N */
	INODE_LATEST,	   /* checkpoints/NAME/latest */
	INODE_CLONE,	   /* clones/NAME; id: the clone's own */
	/* of a group */
	INODE_STATUS_FILE, /* status/GROUP.json */
	INODE_KINDS
};

struct inode_id {
	enum inode_kind kind;
	uint32_t id;   /* of the volume or group; 0 for the fixed folders */
	uint64_t ckpt; /* INODE_CKPT: its number, else 0 */
};

/* 0: id or ckpt does not fit, or the combination is none. */
uint64_t inode_make(enum inode_kind kind, uint32_t id, uint64_t ckpt);
/* false: no number of ours; *ret untouched. */
bool inode_parse(uint64_t ino, struct inode_id *ret);
bool inode_is_dir(enum inode_kind kind);
/* The folder that holds it; the root's is itself. */
uint64_t inode_parent(const struct inode_id *id);

/* A checkpoint's name: plain decimal, no sign, no leading zero, 1 to INODE_CKPT_MAX. false: not one. */
bool inode_parse_ckpt(const char *name, uint64_t *ret);

#endif
