/* What volume.c, cow.c and history.c share: the volume's struct, its locks, and reads through a chain of overlays.
 *
 * Lock order: sync_lock, then prepare_lock or merge_lock, then chain_lock, then a stripe, then one of the small
 * mutexes (retired_lock, scratch_lock), which are never held across I/O.
 *
 *   chain_lock    which layers there are, and the volume's size. Shared: every read and write. Exclusive: switch, drop,
 *                 resize. Writers are preferred and nobody takes it twice: functions that need it held say so by
 *                 taking a struct view or ending in _locked.
 *   stripes       one of STRIPES locks for each block of what is written over an image, the active overlay or a
 *                 clone's, by its number. Only these replace blocks in place, and their readers take no claim, so
 * without them a reader could see a block half replaced, or its data against the other checksum. A writer holds the
 * stripes exclusively while it replaces the data, a reader shares one while it reads one block. Writing a block that is
 *                 not there yet needs none: its bit is set last, and nobody reads a block without its bit. A bit, once
 *                 set, stays until the overlay is switched, which chain_lock excludes. Writers take several, always in
 *                 ascending order, readers one: no deadlock.
 *   prepare_lock  prepared_undo, prepared_active.
 *   merge_lock    one merge or resize at a time.
 *   tap_lock      tap; taken with no other held.
 *   reap_lock     one reaper at a time.
 *   index_lock    one change of the index at a time, and of what is sealed. Memory only: never held across I/O. Taken
 *                 after merge_lock and reap_lock, before chain_lock; the index's own locks are innermost.
 */
#ifndef REPFS_IMAGE_VOLUME_INTERNAL_H
#define REPFS_IMAGE_VOLUME_INTERNAL_H

#include <pthread.h>

#include "core/check.h"
#include "core/os/thread.h"
#include "core/repl_meta.h"
#include "image/chainindex.h"
#include "image/filecache.h"
#include "image/overlay.h"
#include "image/volume.h"

#define VOLUME_CKPTS_MAX GROUP_CKPTS_MAX
#define VOLUME_CLONES_MAX GROUP_CLONES_MAX
#define STRIPES 64U
#define STRIPE_SHIFT 4U /* neighbours of one request share a stripe */
/* Copied at a time, in blocks. */
#define PIECE_BLOCKS 256U
#define PIECE_SIZE (PIECE_BLOCKS << BLOCK_SHIFT)
/* Saved or merged with one sync a phase: as much as a whole batch of the largest FUSE requests can ask for. */
#define ROUND_BLOCKS 65536U
#define ROUND_RUNS 4096U
/* Zeroes and discards above this give up the chain lock between pieces; bytes. */
#define ZERO_PIECE (UINT64_C(16) << 20)
/* A clone's write leaves that much of the store's filesystem free: this part of it, at most so many bytes. */
#define CLONE_ROOM_SHARE 16U
#define CLONE_ROOM_MAX (UINT64_C(1) << 30)
/* Kept for reuse; more exist only while more threads save at once. */
#define SCRATCH_KEPT_MAX 8U

enum layer_kind { LAYER_KIND_UNDO, LAYER_KIND_ACTIVE, LAYER_KIND_CLONE };

/* An overlay in use. One reference belongs to where it is listed (chain, active, clones, prepared, retired), others to
 * merges and syncs. */
struct layer {
	struct overlay *o;
	const struct held *held; /* o's; sealed by chain_seal, with chain_lock held exclusively */
	enum layer_kind kind;
	uint64_t id; /* checkpoint number, active id, or clone's id */
	unsigned refs;
	bool merged;	    /* all its blocks are in the next older one */
	bool certain;	    /* what it held when it was opened is durable; under merge_lock, or while opening */
	struct layer *next; /* retired list */
};

struct block_run {
	uint64_t block, n;
};

/* Memory of one save, merge or commit. */
struct scratch {
	uint8_t bounce[PIECE_SIZE];
	uint32_t words[ROUND_BLOCKS];
	struct block_run runs[ROUND_RUNS];
	uint32_t n_runs, n_blocks;
	struct scratch *next;
};

/* A scratch over image(ckpt). */
struct clone {
	struct layer *l;
	uint64_t ckpt;
};

struct volume {
	struct storage *storage;
	struct disk *disk;
	char *base; /* path of its base image as it was named; NULL: none */
	const char *base_format;
	char name[NAME_SIZE];
	bool power;
	uint64_t size; /* changes under chain_lock exclusively; volume_size() reads it without */

	pthread_rwlock_t sync_lock; /* shared: a sync or read of the disk alone; exclusive: the disk is opened anew */
	pthread_rwlock_t chain_lock;
	struct layer *chain[VOLUME_CKPTS_MAX]; /* oldest first; the last is live */
	uint32_t n_chain;
	/* The oldest of them, which are sealed and in the index: closed epochs, but for those that closed just now. */
	uint32_t n_sealed;
	struct chainindex *index; /* NULL: none is sealed yet */
	struct filecache *files;  /* the sealed ones' */
	struct layer *active;	  /* NULL: none */
	struct clone clones[VOLUME_CLONES_MAX];
	uint32_t n_clones;
	pthread_rwlock_t stripes[STRIPES];

	struct mutex prepare_lock;
	struct layer *prepared_undo, *prepared_active, *prepared_clone;
	struct growth *growth; /* prepared; under prepare_lock */
	struct mutex merge_lock;
	bool growing; /* atomic: from volume_grow_prepare to volume_grow or volume_ungrow no merge goes on */
	struct mutex reap_lock;
	struct mutex index_lock;
	struct mutex retired_lock;
	struct layer *retired; /* entries stay listed until their files are gone */

	struct mutex scratch_lock;
	struct scratch *scratch;
	unsigned n_scratch;

	uint64_t cow_bytes;	  /* atomic */
	uint64_t history_version; /* atomic */

	pthread_rwlock_t tap_lock; /* shared: the tap is told; innermost but the teller's */
	volume_tap_fn tap;	   /* changes under tap_lock; looked at without, atomically */
	void *tap_arg;
};

/* What a read looks at, top down; borrowed, valid while chain_lock is held. */
struct view {
	struct layer *top;    /* what is written over the image: active, a clone's overlay, or NULL */
	struct layer **chain; /* [n], oldest first */
	uint32_t n, sealed;   /* the first `sealed` of them are looked for in the index */
	struct volume *v;
	struct layer *live; /* NULL: nothing is saved over the disk below */
};

/* Orders bits of the live overlay against I/O on the disk, for V2: a writer's bits before its write, a reader's read
 * before its second look. */
static inline void volume_fence(void)
{
#if defined(__SANITIZE_THREAD__)
	/* TSan knows no fences. */
	static int fence;

	(void)__atomic_fetch_add(&fence, 1, __ATOMIC_SEQ_CST);
#else
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

static inline uint64_t volume_blocks(const struct volume *v)
{
	return overlay_blocks_in(v->size);
}

void volume_rwlock_init(pthread_rwlock_t *l); /* one that prefers writers */
void volume_lock_shared(struct volume *v);
void volume_lock_exclusive(struct volume *v);
void volume_unlock(struct volume *v);

/* volume.c: layers, paths, reads */
#define VOLUME_PATH_SIZE (NAME_SIZE + 64)
void volume_path(const char *name, const char *file, char out[VOLUME_PATH_SIZE]);
void layer_path(const struct volume *v, enum layer_kind kind, uint64_t id, char out[VOLUME_PATH_SIZE]);
/* Takes o over, also on failure. */
int layer_new(const struct volume *v, struct overlay *o, enum layer_kind kind, uint64_t id, struct layer **ret);
void layer_ref(struct layer *l);
void layer_unref(struct layer *l); /* NULL is fine */
/* A block that is found in an overlay counts as saved, durably: nothing saves it again before the disk changes. One
 * whose process was killed between writing and syncing it is not durable yet, so before the first such use of an
 * overlay it is synced. */
int layer_ascertain(struct volume *v, struct layer *l);

/* Index of checkpoint k in the chain, or -ERR_NOENT. chain_lock held. */
int chain_find(const struct volume *v, uint64_t ckpt);
/* The overlay that LAYER_ACTIVE, LAYER_UNDO or LAYER_CLONE names, NULL if there is none to have (no active; 0 without a
 * chain). -ERR_NOENT: a checkpoint that is not kept, a clone that is not there. chain_lock held. */
int chain_find_overlay(struct volume *v, enum volume_layer layer, uint64_t ckpt, struct layer **ret);
bool clone_is_there(struct volume *v, uint64_t id); /* chain_lock not held */
/* What LAYER_VIEW (ckpt: the base; 0: nothing but the disk below active), LAYER_IMAGE or LAYER_CLONE names. -ERR_NOENT.
 * chain_lock held. */
int view_make(struct volume *v, enum volume_layer layer, uint64_t ckpt, struct view *ret);
/* The first block in [from, end) that any (no) layer holds; `end` if there is none. */
uint64_t view_next_held(const struct view *w, uint64_t from, uint64_t end);
uint64_t view_next_free(const struct view *w, uint64_t from, uint64_t end);
int view_read(struct volume *v, const struct view *w, uint64_t off, uint64_t len, void *buf);
/* Bytes [off, off + len), all in blocks that l holds. chain_lock held. */
int layer_read(struct volume *v, struct layer *l, uint64_t off, uint64_t len, uint8_t *buf);

/* cow.c */
struct scratch *scratch_get(struct volume *v); /* NULL: out of memory */
void scratch_put(struct volume *v, struct scratch *s);
void scratch_free_all(struct volume *v);
/* Copies the blocks of s->runs into `to`: from the overlay `from`, or the disk if it is NULL. Data, map, bits, with the
 * syncs of `power`. A failure publishes nothing. Empties s. */
int save_round(struct volume *v, struct layer *to, struct layer *from, struct scratch *s);

static inline void history_changed(struct volume *v)
{
	(void)__atomic_fetch_add(&v->history_version, 1, __ATOMIC_RELEASE);
}

/* history.c */
/* Seals closed epochs that are not. For want of memory some stay as they are: images are right all the same, and the
 * next call tries again. */
void chain_seal(struct volume *v);
void volume_retire(struct volume *v, struct layer *l);

#endif
