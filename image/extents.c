/* What a volume's layers look like from outside: extents, allocated sizes, counts (volume_extent and its neighbours).
 *
 * All of it goes by the bitmaps and by asking the disk for its holes; nothing walks a volume block by block. Writers
 * set bits while this looks, so each answer rests on one look at a bitmap, and "a hole of the disk" is believed only
 * after a second one: a block that was discarded in between is in the live overlay by then (V2).
 */
#include "core/check.h"
#include "image/volume_internal.h"

/* Neighbours of one kind joined into one answer, at most. */
#define EXTENT_JOINS_MAX 64U
/* Runs of blocks looked at for an allocated size, at most; beyond, blocks held count as allocated on the disk too. */
#define ALLOCATED_RUNS_MAX 1024U

/* The piece of one kind that holds off: by the layers, or where none has it, by the disk. */
static int view_extent_one(struct volume *v, const struct view *w, uint64_t off, struct extent *ret)
{
	uint64_t block = off >> BLOCK_SHIFT, blocks = volume_blocks(v), held = view_next_held(w, block, blocks);
	int rc;

	/* One look at the bitmaps for both questions: writers set bits all the time. */
	if (held != block) {
		rc = disk_extent(v->disk, off, min_u64(held << BLOCK_SHIFT, v->size), ret);
		if (rc < 0 || ret->data)
			return rc;
		/* A hole may be one that a discard of this moment punched: its blocks are in the live overlay by now
		 * (V2). */
		volume_fence();
		held = view_next_held(w, block, units_of(ret->off + ret->len, BLOCK_SHIFT));
		if (held != block) {
			ret->len = min_u64(ret->off + ret->len, held << BLOCK_SHIFT) - ret->off;
			return 0;
		}
	}
	*ret = (struct extent){off, min_u64(view_next_free(w, block, blocks) << BLOCK_SHIFT, v->size) - off, true};
	return 0;
}

static int view_extent(struct volume *v, const struct view *w, uint64_t off, struct extent *ret)
{
	struct extent x = {off, 0, false};
	int rc = view_extent_one(v, w, off, &x);

	for (unsigned i = 0; rc == 0 && i < EXTENT_JOINS_MAX && x.off + x.len < v->size; i++) {
		struct extent next;

		rc = view_extent_one(v, w, x.off + x.len, &next);
		if (rc < 0 || next.data != x.data)
			break;
		x.len += next.len;
	}
	if (rc == 0)
		*ret = x;
	return rc;
}

static void overlay_extent(struct volume *v, const struct layer *l, uint64_t off, struct extent *ret)
{
	uint64_t block = off >> BLOCK_SHIFT, blocks = volume_blocks(v);
	uint64_t stop = l ? bits_next_set(l->held, block, blocks) : blocks;
	bool there = l && stop == block;

	if (there)
		stop = bits_next_clear(l->held, block, blocks);
	*ret = (struct extent){off, min_u64(stop << BLOCK_SHIFT, v->size) - off, there};
}

static int extent_locked(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t off, struct extent *ret)
{
	struct layer *l;
	struct view w;
	int rc;

	if (off >= v->size)
		return -ERR_RANGE;
	switch (layer) {
	case LAYER_DISK:
		return disk_extent(v->disk, off, v->size, ret);
	case LAYER_ACTIVE:
	case LAYER_UNDO:
		rc = chain_find_overlay(v, layer, ckpt, &l);
		if (rc == 0)
			overlay_extent(v, l, off, ret);
		return rc;
	case LAYER_IMAGE:
	case LAYER_VIEW:
	case LAYER_CLONE:
		break;
	}
	rc = view_make(v, layer, ckpt, &w);
	return rc < 0 ? rc : view_extent(v, &w, off, ret);
}

int volume_extent(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t off, struct extent *ret)
{
	int rc;

	volume_lock_shared(v);
	rc = extent_locked(v, layer, ckpt, off, ret);
	volume_unlock(v);
	return rc;
}

/* The disk's, and what layers hold where the disk has a hole. */
static int view_allocated(struct volume *v, const struct view *w, uint64_t *ret)
{
	uint64_t total, blocks = volume_blocks(v), block = view_next_held(w, 0, blocks);
	int rc = disk_allocated(v->disk, &total);

	for (unsigned i = 0; rc == 0 && i < ALLOCATED_RUNS_MAX && block < blocks; i++) {
		uint64_t end = view_next_free(w, block, blocks);
		uint64_t at = block << BLOCK_SHIFT, stop = min_u64(end << BLOCK_SHIFT, v->size);

		while (at < stop) {
			struct extent x;

			rc = disk_extent(v->disk, at, stop, &x);
			if (rc < 0)
				return rc;
			if (!x.data)
				total += round_up_u64(x.len, BLOCK_SIZE);
			at = x.off + x.len;
		}
		block = view_next_held(w, end, blocks);
	}
	if (rc == 0)
		*ret = total;
	return rc;
}

static int allocated_locked(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t *ret)
{
	struct layer *l;
	struct view w;
	int rc;

	switch (layer) {
	case LAYER_DISK:
		return disk_allocated(v->disk, ret);
	case LAYER_ACTIVE:
	case LAYER_UNDO:
		rc = chain_find_overlay(v, layer, ckpt, &l);
		if (rc == 0)
			*ret = l ? overlay_count(l->o) << BLOCK_SHIFT : 0;
		return rc;
	case LAYER_IMAGE:
	case LAYER_VIEW:
	case LAYER_CLONE:
		break;
	}
	rc = view_make(v, layer, ckpt, &w);
	return rc < 0 ? rc : view_allocated(v, &w, ret);
}

int volume_allocated(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t *ret)
{
	int rc;

	volume_lock_shared(v);
	rc = allocated_locked(v, layer, ckpt, ret);
	volume_unlock(v);
	return rc;
}

uint64_t volume_active_blocks(struct volume *v)
{
	uint64_t n;

	volume_lock_shared(v);
	n = v->active ? overlay_count(v->active->o) : 0;
	volume_unlock(v);
	return n;
}

bool volume_active_unsure(struct volume *v)
{
	bool unsure;

	volume_lock_shared(v);
	unsure = v->active && overlay_unsure(v->active->o);
	volume_unlock(v);
	return unsure;
}

uint64_t volume_undo_blocks(struct volume *v, uint64_t ckpt)
{
	struct layer *l = NULL;
	uint64_t n;

	volume_lock_shared(v);
	n = chain_find_overlay(v, LAYER_UNDO, ckpt, &l) == 0 && l ? overlay_count(l->o) : 0;
	volume_unlock(v);
	return n;
}

void volume_history(struct volume *v, void (*fn)(void *arg, uint64_t ckpt, uint64_t bytes), void *arg)
{
	volume_lock_shared(v);
	for (uint32_t i = 0; i < v->n_chain; i++)
		fn(arg, v->chain[i]->id, overlay_count(v->chain[i]->o) << BLOCK_SHIFT);
	volume_unlock(v);
}

uint64_t volume_history_version(struct volume *v)
{
	return __atomic_load_n(&v->retired, __ATOMIC_ACQUIRE)
		   ? 0
		   : 1 + __atomic_load_n(&v->history_version, __ATOMIC_ACQUIRE);
}

uint64_t volume_clone_blocks(struct volume *v, uint64_t id)
{
	struct layer *l = NULL;
	uint64_t n;

	volume_lock_shared(v);
	n = chain_find_overlay(v, LAYER_CLONE, id, &l) == 0 ? overlay_count(l->o) : 0;
	volume_unlock(v);
	return n;
}

uint64_t volume_live(struct volume *v)
{
	uint64_t id;

	volume_lock_shared(v);
	id = v->n_chain ? v->chain[v->n_chain - 1]->id : 0;
	volume_unlock(v);
	return id;
}

void volume_counters(struct volume *v, struct volume_counters *ret)
{
	struct volume_counters c = {.cow_bytes = __atomic_load_n(&v->cow_bytes, __ATOMIC_RELAXED)};

	volume_lock_shared(v);
	for (uint32_t i = 0; i + 1 < v->n_chain; i++)
		c.history_bytes += overlay_count(v->chain[i]->o) << BLOCK_SHIFT;
	volume_unlock(v);
	*ret = c;
}
