/* A volume on this host: its disk, the chain of undo overlays (one per kept checkpoint, oldest first) and the
 * active overlay. The one mechanism of SPEC 3.
 *
 * Words: undo(k) is the overlay of checkpoint k: what blocks held at k, saved before they first changed after k.
 * The last one is the live epoch's (the hidden overlay). image(k) = for each block the first of undo(k),
 * undo(k+1), ..., live that has it, else the disk. view = active over image(base). A clone is the same again: an
 * overlay of its own over the image of the checkpoint that it was made of.
 *
 * Files in the store (docs/format.md): volumes/NAME/disk.raw, volumes/NAME/undo-K.{data,map},
 * volumes/NAME/active-A.{data,map}, volumes/NAME/clone-C.{data,map}, volumes/NAME/intent. A volume over a base image
 * has other files for its disk (image/based.h); all here works on a struct disk and does not know.
 *
 * Invariants
 *   V1 A block of the disk changes only after the live undo overlay has its old content (if there is a chain):
 *      data, then map word, durable in `power`, then the disk's write. First save wins.
 *   V2 A reader of image(k) that finds a block in no overlay reads the disk first and looks at the live bitmap
 *      again after: a bit is set before the disk's write begins, so an unset bit proves that the bytes read are
 *      from before it (I8 without a lock against writers).
 *   V3 The chain changes (a checkpoint, a drop) under the chain lock held exclusively; every read and write holds
 *      it shared. No I/O happens under the exclusive lock.
 *
 * Who excludes whom: the caller (the core's range claims) guarantees that no two volume_write requests in progress
 * touch the same block, and likewise for volume_write_active, and volume_write_clone of one clone. Reads need no claim.
 * Errors: -ERR_x, first failure of the batch; the struct says how far it came. All sizes and offsets in bytes.
 */
#ifndef REPFS_IMAGE_VOLUME_H
#define REPFS_IMAGE_VOLUME_H

#include "core/bitmap.h"
#include "core/err.h"
#include "core/range.h"
#include "image/storage.h"

struct volume;

enum volume_durability { DURABILITY_PROCESS, DURABILITY_POWER };

enum volume_req_kind { VOLUME_WRITE, VOLUME_ZERO, VOLUME_DISCARD };

struct volume_req {
	enum volume_req_kind kind;
	uint64_t off, len;
	const void *buf; /* VOLUME_WRITE: len bytes, borrowed */
	int error;	 /* out: 0 or -ERR_x */
	/* out: the error was met while saving old blocks; the disk was not touched by this request. A large zero or
	 * discard may have finished earlier pieces, saved like all else: doing it again does no harm. */
	bool save_failed;
};

#define VOLUME_BATCH_MAX 256

/* Makes volumes/NAME with a sparse disk of `size` bytes; -ERR_EXIST if the folder is there.
 * Durable (folder entries synced) when durability is POWER. */
int volume_create(struct storage *s, const char *name, uint64_t size, enum volume_durability dur, struct err *e);
/* The same over a base image. NULL: a sparse disk. */
struct based_args;
int volume_create_over(struct storage *s, const char *name, uint64_t size, const struct based_args *base,
		       enum volume_durability dur, struct err *e);
/* Removes everything of volumes/NAME. Idempotent. */
int volume_delete(struct storage *s, const char *name, struct err *e);

struct volume_clone {
	uint64_t id, ckpt;
};

struct volume_open_args {
	const char *name;
	uint64_t size;
	enum volume_durability durability;
	const uint64_t *ckpts; /* numbers of the kept checkpoints, ascending; the last is the live epoch's */
	uint32_t n_ckpts;      /* 0: no chain, nothing is saved */
	uint64_t active_id;    /* 0: no active overlay */
	const struct volume_clone *clones; /* one whose checkpoint is not kept is not there: it was given up */
	uint32_t n_clones;
};
/* Opens it; overlay files that args do not name are leftovers of a switch that never happened and are removed.
 * A disk whose size is not args->size, or a missing overlay, is -ERR_CORRUPT, named; only a disk that is longer by
 * nothing but a hole is cut back: a resize that was cut off before its metadata write. -ERR_STATE: its base image is
 * missing or not what it was. Returns owned. */
int volume_open(struct storage *s, const struct volume_open_args *args, struct volume **ret, struct err *e);
void volume_close(struct volume *v);

uint64_t volume_size(const struct volume *v);
/* Path, as it was named, and format of its base image; borrowed. NULL: it has none. */
const char *volume_base(const struct volume *v, const char **ret_format);
/* Walks the tables of its base image (source_check); 0 without one. */
int volume_check_base(struct volume *v, struct err *e);
/* The blocks that were written since it was made over its base: their bits are set in *ret, which has a bit for each of
 * the volume's blocks or fewer. false: it has no base. */
bool volume_own(struct volume *v, struct bitmap *ret);

/* Reads of the disk in this range come from the medium next, as far as the system can. */
void volume_forget(struct volume *v, uint64_t off, uint64_t len);
/* Reads. view: active over image(base); base 0 = the disk below active. ckpt: image(k); -ERR_NOENT if k is not kept. */
int volume_read_disk(struct volume *v, uint64_t off, uint64_t len, void *buf);
int volume_read_view(struct volume *v, uint64_t base, uint64_t off, uint64_t len, void *buf);
int volume_read_ckpt(struct volume *v, uint64_t ckpt, uint64_t off, uint64_t len, void *buf);
/* A clone by its id; -ERR_NOENT: it is not there, or its checkpoint was given up. */
int volume_read_clone(struct volume *v, uint64_t id, uint64_t off, uint64_t len, void *buf);

/* Writes a batch to the disk, saving old blocks first (V1) with one sync a phase for the whole batch in `power`.
 * Requests with errors do not stop the others, except that a failed save leaves the disk untouched for all requests
 * of the batch that share the failed phase. Returns 0 or the first error. n <= VOLUME_BATCH_MAX.
 * A zero or discard of ranges that are holes already saves and writes nothing there.
 * Large zeroes and discards work through their range in bounded pieces. */
int volume_write(struct volume *v, struct volume_req *reqs, unsigned n);

/* fn is told of each request of volume_write, or of volume_commit, that the disk has got, in the writing thread and so
 * under its claims: overlapping ones in their order. buf is borrowed. One fn a volume: -ERR_BUSY. fn NULL: none any
 * more, and none is under way when it returns. */
typedef void (*volume_tap_fn)(void *arg, const struct volume_req *r);
int volume_set_tap(struct volume *v, volume_tap_fn fn, void *arg);

/* The secondary's own writes: into active only. Blocks written in part are completed from the view over base.
 * zero and discard are recorded as blocks of zeroes. -ERR_STATE without an active overlay. */
int volume_write_active(struct volume *v, uint64_t base, struct volume_req *req);
/* The same into a clone. -ERR_NOSPC also where the store would be left with less room than is kept for replication. */
int volume_write_clone(struct volume *v, uint64_t id, struct volume_req *req);

/* Disk (and in `power`, nothing else is pending by then) durable: a real fdatasync in either durability. */
int volume_sync(struct volume *v);
/* Opens the disk anew and lets go of the old descriptor, with what a failed sync left on it (I10) and in the
 * cache: what the disk holds is unknown to the caller from then on. -ERR_x: the old one stays. */
int volume_reopen(struct volume *v, struct err *e);
/* Active overlay durable: data, then map. */
int volume_sync_active(struct volume *v);
int volume_sync_clone(struct volume *v, uint64_t id); /* likewise */

/* Epoch switch in two steps, the metadata write between them decides (I7):
 *   volume_prepare: makes the files of undo(ckpt), and of active(active_id) when it differs from the open one;
 *                   durable names in `power`. Repeatable. -ERR_EXIST for a number that is not above the live one.
 *   volume_switch:  in memory, under the chain lock: undo(ckpt) becomes the live one, active is replaced.
 * volume_unprepare drops what prepare made, if the metadata write failed. */
int volume_prepare(struct volume *v, uint64_t ckpt /* 0: none */, uint64_t active_id, struct err *e);
void volume_switch(struct volume *v, uint64_t ckpt, uint64_t active_id);
void volume_unprepare(struct volume *v);
/* Clones come and go in the same two steps: volume_prepare_clone makes the files of one (durable names in `power`; of
 * one that is there it does nothing), volume_switch_clones, after the epoch's switch and drops, makes it that exactly
 * those in c[n] whose checkpoint is kept are there. The files of others go with volume_reap. */
int volume_prepare_clone(struct volume *v, uint64_t id, struct err *e);
void volume_switch_clones(struct volume *v, const struct volume_clone *c, uint32_t n);

/* Drops checkpoint k from the chain in memory (the metadata no longer names it): its overlay is merged into the
 * next older one (the older wins, SPEC 8 MERGEOLD), or just removed if it is the oldest. With one checkpoint left the
 * chain becomes empty. The merge, being I/O, must be done before the metadata write by volume_merge_into_older
 * (idempotent, safe to repeat after a crash; runs beside reads, writes and switches).
 * The live epoch's overlay can't be merged (-ERR_STATE): its checkpoint goes only as the last one of the chain. So
 * volume_drop's PRE: k is the oldest, or was merged since this volume was opened, or holds no block; a k that is not
 * in the chain is fine. */
int volume_merge_into_older(struct volume *v, uint64_t ckpt);
/* What that would copy, and what dropping k then frees beyond it, in bytes. Both 0 for one that needs no merge. */
void volume_merge_cost(struct volume *v, uint64_t ckpt, uint64_t *ret_copies, uint64_t *ret_frees);
void volume_drop(struct volume *v, uint64_t ckpt);
/* Drops k and all older ones, whatever they hold: no image older than what is left can be had any more. */
void volume_drop_through(struct volume *v, uint64_t ckpt);

/* Removes overlay files that left the chain (after volume_switch or volume_drop); does I/O, called from a worker. */
void volume_reap(struct volume *v);

/* What a file shows: extents of the disk, of the view, of active, of undo(k) (exactly its blocks), of image(k), of a
 * clone (all that it shows). */
enum volume_layer { LAYER_DISK, LAYER_VIEW, LAYER_ACTIVE, LAYER_UNDO, LAYER_IMAGE, LAYER_CLONE };
/* The extent that holds off, clipped to the volume's size; ckpt: base for VIEW, k for UNDO and IMAGE (0 in UNDO: the
 * live one), the id for CLONE. Adjacent extents of one kind are joined as far as cheap. off < size. */
int volume_extent(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t off, struct extent *ret);
/* Allocated bytes, as st_blocks * 512 of the file that shows the layer. Overlays: blocks held * BLOCK_SIZE. */
int volume_allocated(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t *ret);
/* For overlays/NAME/active and hidden, and checks of a clone's own blocks: reads a range; blocks that the overlay lacks
 * read as zeroes. */
int volume_read_overlay(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t off, uint64_t len,
			void *buf);

uint64_t volume_active_blocks(struct volume *v); /* blocks held */
/* Whether active's files may hold blocks that it does not: a write to it failed. Over another base they would be wrong.
 */
bool volume_active_unsure(struct volume *v);
uint64_t volume_undo_blocks(struct volume *v, uint64_t ckpt); /* 0: live; blocks held, 0 if not kept */
uint64_t volume_clone_blocks(struct volume *v, uint64_t id);  /* blocks held; 0 if it is not there */
uint64_t volume_live(struct volume *v);			      /* number of the live epoch's checkpoint, 0: no chain */
/* Calls fn(arg, k, bytes) with the bytes that undo(k) holds, oldest first, the live one last. */
void volume_history(struct volume *v, void (*fn)(void *arg, uint64_t ckpt, uint64_t bytes), void *arg);
/* Changes whenever what volume_history says of closed epochs may have changed, or files were removed; 0: files that
 * left the chain are still there. Takes no lock. */
uint64_t volume_history_version(struct volume *v);
/* Calls fn(arg, off, len) for every run of blocks in any of undo(from) ... undo(to), to inclusive (0: live, in either),
 * and, with active, in active. For the dirty bits of a failover and for changed-block lists. Without a chain 0 means no
 * overlay. fn is called with no lock held. -ERR_NOENT: from or to is not kept. */
int volume_changed(struct volume *v, uint64_t from, uint64_t to, bool active,
		   void (*fn)(void *arg, uint64_t off, uint64_t len), void *arg);

/* One step of a commit (SPEC 3): writes the view's content (active over image(base)) of up to `len` bytes at off
 * (block-aligned) to the disk through volume_write, for the blocks in undo(base) .. live or active; base 0: only
 * active. What an earlier step wrote is in live and is looked at again: a power cut can take back a block of active
 * that nobody flushed, and the disk has to follow the view. Blocks that the disk has already are not written again,
 * blocks of zeroes are discarded. Sets *ret_written to the bytes written. The caller holds an exclusive claim over the
 * range. */
int volume_commit(struct volume *v, uint64_t base, uint64_t off, uint64_t len, uint64_t *ret_written);

/* One step of a look at all saved blocks against their checksums: undo overlays, oldest first, then active. It goes on
 * from (layer, off) and sets both to where the next step goes on; an overlay that left the chain meanwhile is passed
 * over, one that came is looked at in its place. At most `budget` bytes of blocks, and as many bad ranges as there is
 * room for. Runs beside reads, writes, switches and merges: a block counts once its bit is set. */
#define VOLUME_SCRUB_ACTIVE UINT64_MAX
#define VOLUME_SCRUB_BAD_MAX 64U
struct volume_scrub {
	uint64_t layer, off; /* in, out; 0, 0: the beginning. layer: a checkpoint, or VOLUME_SCRUB_ACTIVE */
	bool end;	     /* out: that was the last step */
	uint64_t bytes;	     /* out: of blocks looked at */
	uint64_t left;	     /* out: of blocks that are left, about */
	uint32_t n;
	struct {
		uint64_t layer, off, len;
		int error; /* -ERR_CORRUPT: the checksum does not fit; else why it could not be read */
	} bad[VOLUME_SCRUB_BAD_MAX];
};
void volume_scrub(struct volume *v, struct volume_scrub *s, uint64_t budget);

/* Growing only; -ERR_RANGE to shrink. What lies past the old size reads as zeroes in every older image.
 *
 * volume_extend: the disk's file gets that long, or as long as the volume is again, durably in `process` too; nothing
 * shows it. -ERR_NOSPC: the filesystem has no files that large, or a limit stands against it.
 *
 * volume_grow_prepare: that, if it is not so yet, and memory; repeatable. The length is durable when it has succeeded,
 * so that a record may name it. -ERR_BUSY between volume_prepare and its end. A merge that is under way
 * gives way, with -ERR_BUSY, and none begins before volume_grow or volume_ungrow: that one would have to wait for it.
 *
 * volume_grow: in memory, under the chain lock; can't fail. For readers and writers it is one step.
 *
 * volume_ungrow: drops what volume_grow_prepare found, if the record that names the size could not be saved.
 *
 * volume_resize: all of it. */
int volume_extend(struct volume *v, uint64_t size);
int volume_grow_prepare(struct volume *v, uint64_t size);
void volume_grow(struct volume *v);
void volume_ungrow(struct volume *v);
int volume_resize(struct volume *v, uint64_t size);

struct volume_counters {
	uint64_t cow_bytes;	/* old content saved, in bytes */
	uint64_t history_bytes; /* blocks held by closed epochs, in bytes */
};
void volume_counters(struct volume *v, struct volume_counters *ret);

#endif
