/* Epochs of a volume: opening a new one, dropping old ones, and what changed between them.
 *
 * A switch costs the same whatever the overlays hold: the new files are made before the metadata write that decides
 * (volume_prepare), and in memory it is a pointer put at the end of the chain. Overlays that leave the chain go to the
 * retired list and lose their files later (volume_reap). Nobody can be reading them by then: who read them held
 * the chain lock shared, and they left under it held exclusively. A merge, which runs without that lock because it may
 * take long, holds references of its own.
 *
 * Merging checkpoint k into the next older one, j: blocks of k that j lacks are copied into j. image(j) does not
 * change by that, for those are the blocks that it took from k. So it does not matter when it is cut off, or done
 * again; and once it is done, k can go and every older image stays. The order that keeps it so after a power cut: j's
 * data, j's words, and only then the metadata that no longer names k.
 * The live epoch's overlay is never merged: writers add blocks to it all the time.
 *
 * Sealing: a closed epoch gets no more blocks but by merges, so what it holds is kept as a list instead of a bitmap,
 * and is entered into the index (image/chainindex.h) by which reads of old images find it. That costs what the overlay
 * holds, so it is not part of the switch: volume_reap does it after, in its worker, and until then reads go by the
 * bitmap. Images are the same at each moment of it: S1 chain[0 .. n_sealed) are sealed and in the index [X1]; of what
 * follows each overlay is looked at by itself. So all are looked at, and the older first: entries of one that is just
 * being sealed come behind all older ones [X2]. S2 n_sealed, and what an overlay holds as a list, change only under
 * chain_lock held exclusively; readers hold it shared for a whole look. S3 A merge adds to the older overlay in this
 * order: data and words; the list; its entries. So an entry never says more than its overlay has, and until it is there
 * the newer one, which keeps its own, answers the same. S4 An overlay that left the chain has its entries taken out
 * before its number could be used again (volume_reap, which volume_prepare waits for). Until then they answer nothing
 * [X2].
 */
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/os/cleanup.h"
#include "image/volume_internal.h"

/* ---- prepare, switch ---- */

static int make_layer(struct volume *v, enum layer_kind kind, uint64_t id, struct layer **ret, struct err *e)
{
	char path[VOLUME_PATH_SIZE];
	struct overlay *o;
	int rc;

	layer_path(v, kind, id, path);
	rc = overlay_create(v->storage, path, volume_size(v), &o, e);
	if (rc < 0)
		return rc;
	rc = layer_new(v, o, kind, id, ret);
	if (rc < 0) {
		(void)overlay_unlink(v->storage, path);
		return err_set(e, -rc, "make overlay %s: %s", path, err_short(rc));
	}
	return 0;
}

static void unmake_layer(struct volume *v, struct layer **l)
{
	char path[VOLUME_PATH_SIZE];

	if (!*l)
		return;
	layer_path(v, (*l)->kind, (*l)->id, path);
	layer_unref(*l);
	*l = NULL;
	(void)overlay_unlink(v->storage, path);
}

static bool is_retired(struct volume *v, enum layer_kind kind, uint64_t id)
{
	bool found = false;

	mutex_lock(&v->retired_lock);
	for (const struct layer *l = v->retired; l && !found; l = l->next)
		found = l->kind == kind && l->id == id;
	mutex_unlock(&v->retired_lock);
	return found;
}

/* Makes *slot the overlay of id (0: none), which may be what it is already. */
static int prepare_one(struct volume *v, struct layer **slot, enum layer_kind kind, uint64_t id, struct err *e)
{
	if (*slot && (*slot)->id != id)
		unmake_layer(v, slot);
	if (id == 0 || *slot)
		return 0;
	/* A name used again: its old files must be gone before, not after. */
	if (is_retired(v, kind, id))
		volume_reap(v);
	return make_layer(v, kind, id, slot, e);
}

static int prepare_locked(struct volume *v, uint64_t ckpt, uint64_t active_id, struct err *e)
{
	char folder[VOLUME_PATH_SIZE];
	uint64_t live, active;
	uint32_t n;
	int rc;

	volume_lock_shared(v);
	n = v->n_chain;
	live = n ? v->chain[n - 1]->id : 0;
	active = v->active ? v->active->id : 0;
	volume_unlock(v);
	if (ckpt && ckpt <= live)
		return err_set(e, ERR_EXIST,
			       "prepare checkpoint %llu of volume %s: %llu is taken already; numbers only grow",
			       (unsigned long long)ckpt, v->name, (unsigned long long)live);
	if (ckpt && n == VOLUME_CKPTS_MAX)
		return err_set(
		    e, ERR_LIMIT,
		    "prepare checkpoint %llu of volume %s: %d are kept already, the most there can be; drop some",
		    (unsigned long long)ckpt, v->name, VOLUME_CKPTS_MAX);
	rc = prepare_one(v, &v->prepared_undo, LAYER_KIND_UNDO, ckpt, e);
	if (rc == 0)
		rc = prepare_one(v, &v->prepared_active, LAYER_KIND_ACTIVE, active_id == active ? 0 : active_id, e);
	if (rc < 0 || !v->power || (!v->prepared_undo && !v->prepared_active))
		return rc;
	volume_path(v->name, "", folder);
	rc = storage_sync_dir(v->storage, folder);
	return rc < 0
		   ? err_set(e, -rc, "prepare checkpoint of volume %s: syncing %s: %s", v->name, folder, err_short(rc))
		   : 0;
}

int volume_prepare(struct volume *v, uint64_t ckpt, uint64_t active_id, struct err *e)
{
	int rc;

	mutex_lock(&v->prepare_lock);
	rc = prepare_locked(v, ckpt, active_id, e);
	if (rc < 0) {
		unmake_layer(v, &v->prepared_undo);
		unmake_layer(v, &v->prepared_active);
	}
	mutex_unlock(&v->prepare_lock);
	return rc;
}

void volume_unprepare(struct volume *v)
{
	mutex_lock(&v->prepare_lock);
	unmake_layer(v, &v->prepared_undo);
	unmake_layer(v, &v->prepared_active);
	unmake_layer(v, &v->prepared_clone);
	mutex_unlock(&v->prepare_lock);
}

void volume_switch(struct volume *v, uint64_t ckpt, uint64_t active_id)
{
	struct layer *old = NULL;

	mutex_lock(&v->prepare_lock);
	PRE(ckpt == (v->prepared_undo ? v->prepared_undo->id : 0));
	volume_lock_exclusive(v);
	if (v->prepared_undo) {
		INVARIANT(v->n_chain < VOLUME_CKPTS_MAX);
		v->chain[v->n_chain++] = TAKE_PTR(v->prepared_undo);
		history_changed(v);
	}
	if (active_id != (v->active ? v->active->id : 0)) {
		PRE(active_id == (v->prepared_active ? v->prepared_active->id : 0));
		old = v->active;
		v->active = TAKE_PTR(v->prepared_active);
	}
	volume_unlock(v);
	/* One prepared for nothing: the caller came to another mind about it between the two steps. */
	unmake_layer(v, &v->prepared_active);
	mutex_unlock(&v->prepare_lock);
	if (old)
		volume_retire(v, old);
}

/* ---- clones ---- */

static bool ckpt_is_kept(struct volume *v, uint64_t ckpt)
{
	bool kept;

	volume_lock_shared(v);
	kept = chain_find(v, ckpt) >= 0;
	volume_unlock(v);
	return kept;
}

int volume_prepare_clone(struct volume *v, uint64_t id, struct err *e)
{
	char folder[VOLUME_PATH_SIZE];
	int rc = 0;

	mutex_lock(&v->prepare_lock);
	if (!clone_is_there(v, id))
		rc = prepare_one(v, &v->prepared_clone, LAYER_KIND_CLONE, id, e);
	if (rc == 0 && v->power && v->prepared_clone) {
		volume_path(v->name, "", folder);
		rc = storage_sync_dir(v->storage, folder);
		if (rc < 0) {
			(void)err_set(e, -rc, "prepare a clone of volume %s: syncing %s: %s", v->name, folder,
				      err_short(rc));
			unmake_layer(v, &v->prepared_clone);
		}
	}
	mutex_unlock(&v->prepare_lock);
	return rc;
}

static bool listed(const struct volume_clone *c, uint32_t n, uint64_t id)
{
	for (uint32_t i = 0; i < n; i++)
		if (c[i].id == id)
			return true;
	return false;
}

/* Takes out one that is not named any more, or has lost its checkpoint. NULL: there is none. */
static struct layer *clone_take_out(struct volume *v, const struct volume_clone *c, uint32_t n)
{
	struct layer *l = NULL;

	volume_lock_exclusive(v);
	for (uint32_t i = 0; i < v->n_clones && !l; i++) {
		if (listed(c, n, v->clones[i].l->id) && chain_find(v, v->clones[i].ckpt) >= 0)
			continue;
		l = v->clones[i].l;
		v->clones[i] = v->clones[--v->n_clones];
	}
	volume_unlock(v);
	return l;
}

void volume_switch_clones(struct volume *v, const struct volume_clone *c, uint32_t n)
{
	struct layer *l;

	if (n == 0 && v->n_clones == 0) /* only this changes it */
		return;
	while ((l = clone_take_out(v, c, n)) != NULL)
		volume_retire(v, l);
	mutex_lock(&v->prepare_lock);
	for (uint32_t i = 0; i < n && v->prepared_clone; i++) {
		if (c[i].id != v->prepared_clone->id || !ckpt_is_kept(v, c[i].ckpt))
			continue;
		volume_lock_exclusive(v);
		INVARIANT(v->n_clones < VOLUME_CLONES_MAX);
		v->clones[v->n_clones++] = (struct clone){TAKE_PTR(v->prepared_clone), c[i].ckpt};
		volume_unlock(v);
	}
	unmake_layer(v, &v->prepared_clone);
	mutex_unlock(&v->prepare_lock);
}

/* ---- drop, merge, reap ---- */

void volume_retire(struct volume *v, struct layer *l)
{
	mutex_lock(&v->retired_lock);
	l->next = v->retired;
	__atomic_store_n(&v->retired, l, __ATOMIC_RELEASE); /* volume_history_version looks without the lock */
	mutex_unlock(&v->retired_lock);
	history_changed(v);
}

/* ---- sealing ---- */

static struct layer *next_to_seal(struct volume *v)
{
	struct layer *l = NULL;

	volume_lock_shared(v);
	if (v->n_sealed + 1 < v->n_chain)
		layer_ref(l = v->chain[v->n_sealed]);
	volume_unlock(v);
	return l;
}

/* What it holds from now on, in its list; under index_lock. False: it has left the chain. */
static bool seal_layer(struct volume *v, struct layer *l, struct held_list *list)
{
	struct held old = {0};

	volume_lock_exclusive(v);
	int i = chain_find(v, l->id);
	bool there = i >= 0 && v->chain[i] == l;
	if (there) {
		char path[VOLUME_PATH_SIZE];

		overlay_seal(l->o, list, &old);
		layer_path(v, l->kind, l->id, path);
		overlay_cache(l->o, v->files, v->storage, path);
		if ((uint32_t)i == v->n_sealed)
			v->n_sealed++;
	}
	volume_unlock(v);
	held_free(&old);
	return there;
}

static int seal_locked(struct volume *v, struct layer *l)
{
	struct held_list *list;
	int rc = v->index ? 0 : chainindex_new(volume_blocks(v), &v->index);

	/* Nobody adds to it any more: it is closed, and merges are for sealed ones. */
	if (rc == 0)
		rc = held_list_of(l->held, &list);
	if (rc < 0)
		return rc;
	rc = chainindex_add(v->index, l->id, list);
	if (rc == 0 && seal_layer(v, l, list))
		return 0;
	chainindex_remove(v->index, l->id, list);
	free(list);
	return rc;
}

void chain_seal(struct volume *v)
{
	struct layer *l;
	int rc = 0;

	mutex_lock(&v->index_lock);
	while (rc == 0 && (l = next_to_seal(v)) != NULL) {
		rc = seal_locked(v, l);
		layer_unref(l);
	}
	mutex_unlock(&v->index_lock);
	filecache_trim(v->files);
}

/* It has left the chain, with all that readers of then were doing. */
static void index_forget(struct volume *v, const struct layer *l)
{
	mutex_lock(&v->index_lock);
	if (l->kind == LAYER_KIND_UNDO && l->held->list && v->index)
		chainindex_remove(v->index, l->id, l->held->list);
	mutex_unlock(&v->index_lock);
}

void volume_reap(struct volume *v)
{
	char path[VOLUME_PATH_SIZE];
	struct layer *l, **at;

	chain_seal(v);
	mutex_lock(&v->reap_lock);
	for (;;) {
		mutex_lock(&v->retired_lock);
		l = v->retired;
		mutex_unlock(&v->retired_lock);
		if (!l)
			break;
		index_forget(v, l);
		layer_path(v, l->kind, l->id, path);
		/* A file that can't be removed now is a leftover for the next open. */
		(void)overlay_unlink(v->storage, path);
		mutex_lock(&v->retired_lock);
		for (at = &v->retired; *at != l; at = &(*at)->next)
			;
		__atomic_store_n(at, l->next, __ATOMIC_RELEASE);
		mutex_unlock(&v->retired_lock);
		layer_unref(l);
		history_changed(v);
	}
	mutex_unlock(&v->reap_lock);
}

void volume_drop(struct volume *v, uint64_t ckpt)
{
	struct layer *l;
	int i;

	volume_lock_exclusive(v);
	i = chain_find(v, ckpt);
	if (i < 0) {
		volume_unlock(v);
		return;
	}
	l = v->chain[i];
	/* What it holds, older images need: dropping it unmerged would make them wrong without a word. */
	PRE(i == 0 || overlay_count(l->o) == 0 || __atomic_load_n(&l->merged, __ATOMIC_ACQUIRE));
	v->n_chain--;
	v->n_sealed -= (uint32_t)i < v->n_sealed;
	for (uint32_t k = (uint32_t)i; k < v->n_chain; k++)
		v->chain[k] = v->chain[k + 1];
	volume_unlock(v);
	volume_retire(v, l);
}

void volume_drop_through(struct volume *v, uint64_t ckpt)
{
	struct layer *l;

	for (;;) {
		volume_lock_exclusive(v);
		l = v->n_chain && v->chain[0]->id <= ckpt ? v->chain[0] : NULL;
		if (l) {
			memmove(&v->chain[0], &v->chain[1], --v->n_chain * sizeof(v->chain[0]));
			v->n_sealed -= v->n_sealed > 0;
		}
		volume_unlock(v);
		if (!l)
			return;
		volume_retire(v, l);
	}
}

/* To a resize; it is begun anew after that. */
static bool gives_way(struct volume *v)
{
	return __atomic_load_n(&v->growing, __ATOMIC_SEQ_CST);
}

/* Copies what `from` holds and `to` lacks. Both are sealed: nothing is published. */
static int merge_copy(struct volume *v, struct layer *from, struct layer *to, struct scratch *s)
{
	uint64_t blocks = volume_blocks(v);
	uint64_t block = bits_next_set(from->held, 0, blocks);
	int rc = 0;

	while (rc == 0 && block < blocks) {
		uint64_t limit = min_u64(blocks, block + ROUND_BLOCKS - s->n_blocks);
		uint64_t start = bits_next_clear(to->held, block, min_u64(blocks, block + ROUND_BLOCKS)), stop;

		if (start == block) {
			stop = bits_next_clear(from->held, block, limit);
			stop = bits_next_set(to->held, block, stop);
			s->runs[s->n_runs++] = (struct block_run){block, stop - block};
			s->n_blocks += (uint32_t)(stop - block);
			start = stop;
		}
		block = bits_next_set(from->held, start, blocks);
		if (s->n_runs == ROUND_RUNS || s->n_blocks == ROUND_BLOCKS) {
			rc = save_round(v, to, from, s);
			if (rc == 0 && gives_way(v))
				rc = -ERR_BUSY;
		}
	}
	if (rc == 0 && s->n_runs)
		rc = save_round(v, to, from, s);
	return rc;
}

/* What was copied is `to`'s from now on (S3). One that has left the chain meanwhile has no entries any more. */
static int merge_publish(struct volume *v, struct layer *from, struct layer *to)
{
	struct held_list *list;
	int rc = held_list_union(from->held->list, to->held->list, &list);

	if (rc < 0)
		return rc;
	mutex_lock(&v->index_lock);
	if (!seal_layer(v, to, list))
		free(list);
	else
		rc = chainindex_add(v->index, to->id, from->held->list);
	mutex_unlock(&v->index_lock);
	return rc;
}

static int merge(struct volume *v, struct layer *from, struct layer *to)
{
	struct scratch *s;
	int rc;

	chain_seal(v);
	if (!from->held->list || !to->held->list)
		return -ERR_NOMEM;
	s = scratch_get(v);
	if (!s)
		return -ERR_NOMEM;
	rc = layer_ascertain(v, to);
	if (rc == 0)
		rc = merge_copy(v, from, to, s);
	scratch_put(v, s);
	return rc < 0 ? rc : merge_publish(v, from, to);
}

/* References to checkpoint k's overlay and the next older one; both NULL if there is nothing to merge. */
static int merge_find(struct volume *v, uint64_t ckpt, struct layer **ret_from, struct layer **ret_to)
{
	int i, rc = 0;

	volume_lock_shared(v);
	i = chain_find(v, ckpt);
	if (i < 0)
		rc = i;
	else if (i > 0 && (uint32_t)i == v->n_chain - 1)
		rc = -ERR_STATE;
	else if (i > 0) {
		layer_ref(*ret_from = v->chain[i]);
		layer_ref(*ret_to = v->chain[i - 1]);
	}
	volume_unlock(v);
	return rc;
}

void volume_merge_cost(struct volume *v, uint64_t ckpt, uint64_t *ret_copies, uint64_t *ret_frees)
{
	struct layer *from = NULL, *to = NULL;
	uint64_t both = 0;

	*ret_copies = *ret_frees = 0;
	if (merge_find(v, ckpt, &from, &to) == 0 && from) {
		uint64_t blocks = volume_blocks(v);

		volume_lock_shared(v); /* of what they hold, not of where they are */
		for (uint64_t at = bits_next_set(from->held, 0, blocks), end; at < blocks;
		     at = bits_next_set(from->held, end, blocks)) {
			end = bits_next_clear(from->held, at, blocks);
			for (uint64_t b = bits_next_set(to->held, at, end); b < end;
			     b = bits_next_set(to->held, b, end)) {
				uint64_t stop = bits_next_clear(to->held, b, end);

				both += stop - b;
				b = stop;
			}
		}
		*ret_frees = both << BLOCK_SHIFT;
		*ret_copies = (overlay_count(from->o) - min_u64(both, overlay_count(from->o))) << BLOCK_SHIFT;
		volume_unlock(v);
	}
	layer_unref(from);
	layer_unref(to);
}

int volume_merge_into_older(struct volume *v, uint64_t ckpt)
{
	struct layer *from = NULL, *to = NULL;
	int rc;

	mutex_lock(&v->merge_lock);
	rc = gives_way(v) ? -ERR_BUSY : merge_find(v, ckpt, &from, &to);
	if (rc == 0 && from) {
		__atomic_store_n(&to->merged, false, __ATOMIC_RELEASE);
		rc = merge(v, from, to);
		if (rc == 0)
			__atomic_store_n(&from->merged, true, __ATOMIC_RELEASE);
		history_changed(v);
	}
	layer_unref(from);
	layer_unref(to);
	mutex_unlock(&v->merge_lock);
	return rc;
}

/* ---- what changed ---- */

/* The union of the bitmaps as of now, in *ret with its memory owned. */
static int changed_union(struct volume *v, uint64_t from, uint64_t to, bool active, struct bitmap *ret,
			 void **ret_memory)
{
	int first = from ? chain_find(v, from) : (int)v->n_chain - 1;
	int last = to ? chain_find(v, to) : (int)v->n_chain - 1;
	uint64_t blocks = volume_blocks(v);
	void *memory;

	if (v->n_chain == 0 && from == 0 && to == 0)
		first = 0; /* nothing but active, if that */
	else if (first < 0 || last < 0)
		return -ERR_NOENT;
	else if (first > last)
		return -ERR_RANGE;
	memory = calloc(1, bitmap_bytes(blocks));
	if (!memory)
		return -ERR_NOMEM;
	bitmap_init(ret, blocks, memory);
	for (int i = first; i <= last; i++)
		held_or_into(v->chain[i]->held, ret);
	if (active && v->active)
		held_or_into(v->active->held, ret);
	*ret_memory = memory;
	return 0;
}

/* fn is called with no lock held: it may use the volume. */
int volume_changed(struct volume *v, uint64_t from, uint64_t to, bool active,
		   void (*fn)(void *arg, uint64_t off, uint64_t len), void *arg)
{
	struct bitmap all;
	void *memory = NULL;
	uint64_t size;
	int rc;

	volume_lock_shared(v);
	size = v->size;
	rc = changed_union(v, from, to, active, &all, &memory);
	volume_unlock(v);
	if (rc < 0)
		return rc;
	for (uint64_t block, end = 0; bitmap_next_run(&all, end, &block, &end);) {
		uint64_t off = block << BLOCK_SHIFT;

		fn(arg, off, min_u64(end << BLOCK_SHIFT, size) - off);
	}
	free(memory);
	return 0;
}
