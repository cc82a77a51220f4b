/* Inode numbers; see fs/inode.h. Pure functions. */
#include "fs/inode.h"

#include "core/check.h"

#define CKPT_BITS 37U
#define ID_BITS 22U
#define KIND_SHIFT (CKPT_BITS + ID_BITS)

static bool kind_is_fixed(enum inode_kind kind)
{
	return kind >= INODE_ROOT && kind <= INODE_STATUS;
}

/* Volume ids begin at 1; a group's may be 0. */
static bool id_valid(enum inode_kind kind, uint32_t id)
{
	return id <= INODE_ID_MAX && (id > 0 || kind == INODE_STATUS_FILE);
}

static bool ckpt_valid(enum inode_kind kind, uint64_t ckpt)
{
	if (kind == INODE_CKPT)
		return ckpt > 0 && ckpt <= INODE_CKPT_MAX;
	return ckpt == 0;
}

uint64_t inode_make(enum inode_kind kind, uint32_t id, uint64_t ckpt)
{
	PRE(kind > INODE_NONE && kind < INODE_KINDS);
	if (kind_is_fixed(kind))
		return id == 0 && ckpt == 0 ? (uint64_t)kind : 0;
	if (!id_valid(kind, id) || !ckpt_valid(kind, ckpt))
		return 0;
	return (uint64_t)kind << KIND_SHIFT | (uint64_t)id << CKPT_BITS | ckpt;
}

bool inode_parse(uint64_t ino, struct inode_id *ret)
{
	if (ino < INODE_VOLUME) {
		if (ino < INODE_ROOT)
			return false;
		*ret = (struct inode_id){.kind = (enum inode_kind)ino};
		return true;
	}
	uint64_t kind = ino >> KIND_SHIFT;
	if (kind < INODE_VOLUME || kind >= INODE_KINDS)
		return false;
	struct inode_id id = {
	    .kind = (enum inode_kind)kind,
	    .id = (uint32_t)(ino >> CKPT_BITS) & INODE_ID_MAX,
	    .ckpt = ino & INODE_CKPT_MAX,
	};
	if (!id_valid(id.kind, id.id) || !ckpt_valid(id.kind, id.ckpt))
		return false;
	*ret = id;
	return true;
}

bool inode_is_dir(enum inode_kind kind)
{
	return kind_is_fixed(kind) || kind == INODE_OVERLAY_DIR || kind == INODE_CKPT_DIR;
}

uint64_t inode_parent(const struct inode_id *id)
{
	switch (id->kind) {
	case INODE_VOLUME:
		return INODE_VOLUMES;
	case INODE_OVERLAY_DIR:
		return INODE_OVERLAYS;
	case INODE_ACTIVE:
	case INODE_HIDDEN:
		return inode_make(INODE_OVERLAY_DIR, id->id, 0);
	case INODE_CKPT_DIR:
		return INODE_CHECKPOINTS;
	case INODE_CKPT:
	case INODE_LATEST:
		return inode_make(INODE_CKPT_DIR, id->id, 0);
	case INODE_CLONE:
		return INODE_CLONES;
	case INODE_STATUS_FILE:
		return INODE_STATUS;
	default:
		return INODE_ROOT;
	}
}

bool inode_parse_ckpt(const char *name, uint64_t *ret)
{
	uint64_t n = 0;

	if (name[0] < '1' || name[0] > '9')
		return false;
	for (const char *p = name; *p; p++) {
		if (*p < '0' || *p > '9')
			return false;
		n = n * 10 + (uint64_t)(*p - '0');
		if (n > INODE_CKPT_MAX)
			return false;
	}
	*ret = n;
	return true;
}
