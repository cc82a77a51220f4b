/* Writing to a volume: save before change (V1), what is written over an image (active, clones), and the commit of a
 * failover.
 *
 * volume_write goes over the whole batch in phases, so that in `power` the syncs are one a phase and not one a write:
 *   gather   the blocks that requests touch and the live overlay lacks, as runs: sorted, neighbours joined
 *   data     each run read from the disk in one go and put into the overlay           [sync]
 *   map      the words of all runs                                                     [sync]
 *   publish  their bits: from here on a reader of an older image takes the overlay's blocks
 *   disk     the requests themselves
 * With no chain, or when the overlay has it all, gathering finds nothing and only the last phase is left; no memory is
 * asked for on that way.
 *
 * A block that two requests of a batch share is harmless: both see it before the disk changes, so it is saved once,
 * or twice with the same content.
 *
 * A save that fails publishes nothing. Words of its blocks may lie in the map by then; that is no lie, since none of
 * the requests that share the round touches the disk: the saved content stays the content.
 *
 * A zero or discard leaves holes of the disk alone: they read as zeroes already. Large ones work through their range
 * in pieces of ZERO_PIECE, each saved and zeroed under the chain lock and then letting go of it: a checkpoint waits
 * for one piece, and what it then shows is a part of the request done, as of any request in flight.
 *
 * The active overlay and clones replace their blocks in place. In `power` the data is synced before its word is
 * written; the word itself only by volume_sync_active (volume_sync_clone): lost in a power cut, it leaves the block as
 * it was before a write that nobody flushed (absent, or, for one replaced, with its checksum marked unknown, which
 * overlay_put_data has made durable).
 */
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "image/volume_internal.h"

/* ---- scratch ---- */

struct scratch *scratch_get(struct volume *v)
{
	struct scratch *s;

	mutex_lock(&v->scratch_lock);
	s = v->scratch;
	if (s) {
		v->scratch = s->next;
		v->n_scratch--;
	}
	mutex_unlock(&v->scratch_lock);
	if (!s)
		s = aligned_alloc(BLOCK_SIZE, round_up_u64(sizeof(*s), BLOCK_SIZE));
	if (s)
		s->n_runs = s->n_blocks = 0;
	return s;
}

void scratch_put(struct volume *v, struct scratch *s)
{
	if (!s)
		return;
	mutex_lock(&v->scratch_lock);
	if (v->n_scratch < SCRATCH_KEPT_MAX) {
		s->next = v->scratch;
		v->scratch = s;
		v->n_scratch++;
		s = NULL;
	}
	mutex_unlock(&v->scratch_lock);
	free(s);
}

void scratch_free_all(struct volume *v)
{
	while (v->scratch) {
		struct scratch *s = v->scratch;

		v->scratch = s->next;
		free(s);
	}
}

/* ---- saving ---- */

static int run_order(const void *a, const void *b)
{
	const struct block_run *x = a, *y = b;

	return (x->block > y->block) - (x->block < y->block);
}

/* Sorted, without overlaps, neighbours joined. */
static void runs_join(struct scratch *s)
{
	uint32_t n = 0;
	bool sorted = true;

	for (uint32_t i = 1; i < s->n_runs; i++)
		sorted = sorted && s->runs[i - 1].block <= s->runs[i].block;
	if (!sorted)
		qsort(s->runs, s->n_runs, sizeof(s->runs[0]), run_order);
	for (uint32_t i = 0; i < s->n_runs; i++) {
		struct block_run *last = n ? &s->runs[n - 1] : NULL, r = s->runs[i];

		if (last && r.block <= last->block + last->n)
			last->n = max_u64(last->block + last->n, r.block + r.n) - last->block;
		else
			s->runs[n++] = r;
	}
	s->n_runs = n;
}

static int read_blocks(struct volume *v, struct layer *from, uint64_t block, uint32_t n, uint8_t *buf)
{
	int rc = 0;

	/* The volume's last block may be short: past the disk's end come zeroes. */
	if (!from)
		return disk_read(v->disk, block << BLOCK_SHIFT, buf, (size_t)n << BLOCK_SHIFT);
	for (uint32_t i = 0; rc == 0 && i < n; i++)
		rc = overlay_read(from->o, block + i, 0, buf + ((size_t)i << BLOCK_SHIFT), BLOCK_SIZE);
	return rc;
}

static int save_data(struct volume *v, struct layer *to, struct layer *from, struct scratch *s)
{
	uint32_t word = 0;

	for (uint32_t i = 0; i < s->n_runs; i++) {
		uint64_t block = s->runs[i].block, end = block + s->runs[i].n;

		while (block < end) {
			uint32_t n = (uint32_t)min_u64(end - block, PIECE_BLOCKS);
			int rc = read_blocks(v, from, block, n, s->bounce);

			if (rc == 0)
				rc = overlay_put_data(to->o, block, n, s->bounce, s->words + word);
			if (rc < 0)
				return rc;
			block += n;
			word += n;
		}
	}
	return v->power ? overlay_sync_data(to->o) : 0;
}

static int save_map(struct volume *v, struct layer *to, const struct scratch *s)
{
	uint32_t word = 0;

	for (uint32_t i = 0; i < s->n_runs; i++) {
		int rc = overlay_put_map(to->o, s->runs[i].block, (uint32_t)s->runs[i].n, s->words + word);

		if (rc < 0)
			return rc;
		word += (uint32_t)s->runs[i].n;
	}
	return v->power ? overlay_sync_map(to->o) : 0;
}

int save_round(struct volume *v, struct layer *to, struct layer *from, struct scratch *s)
{
	uint64_t blocks = 0;
	int rc;

	runs_join(s);
	rc = save_data(v, to, from, s);
	if (rc == 0)
		rc = save_map(v, to, s);
	for (uint32_t i = 0; rc == 0 && i < s->n_runs; i++) {
		if (!from) /* else it is sealed: the merge publishes all at its end */
			overlay_publish(to->o, s->runs[i].block, (uint32_t)s->runs[i].n);
		blocks += s->runs[i].n;
	}
	s->n_runs = s->n_blocks = 0;
	if (rc < 0)
		return rc;
	if (!from)
		(void)__atomic_fetch_add(&v->cow_bytes, blocks << BLOCK_SHIFT, __ATOMIC_RELAXED);
	volume_fence();
	return 0;
}

/* ---- gathering ---- */

/* Goes over the blocks that a request will change. */
struct change {
	uint64_t at, end;  /* bytes still to look at */
	uint64_t data_end; /* up to here the disk has data (always, for a write) */
};

/* The next run of blocks, at most `max`, that the request changes and `live` lacks. 1, 0 at the end, or -ERR_x. */
static int change_next_unsaved(struct volume *v, const struct layer *live, struct change *c, uint64_t max,
			       struct block_run *ret)
{
	while (c->at < c->end) {
		uint64_t block = c->at >> BLOCK_SHIFT, block_end, stop;

		if (c->at >= c->data_end) {
			struct extent x;
			int rc = disk_extent(v->disk, c->at, c->end, &x);

			if (rc < 0)
				return rc;
			if (!x.data) {
				c->at = x.off + x.len;
				continue;
			}
			c->data_end = x.off + x.len;
		}
		block_end = units_of(c->data_end, BLOCK_SHIFT);
		block = bits_next_clear(live->held, block, block_end);
		stop = bits_next_set(live->held, block, min_u64(block_end, block + max));
		/* The last block may reach past data_end: what is left of it in the request is saved with it. */
		c->at = max_u64(c->at, min_u64(stop << BLOCK_SHIFT, c->end));
		if (block < stop) {
			*ret = (struct block_run){block, stop - block};
			return 1;
		}
	}
	return 0;
}

static bool req_range_fits(const struct volume *v, const struct volume_req *r)
{
	return r->off <= v->size && r->len <= v->size - r->off;
}

static void req_fail(struct volume_req *r, int rc, bool save_failed)
{
	if (r->error)
		return;
	r->error = rc;
	r->save_failed = save_failed;
}

/* One batch being saved. */
struct save {
	struct volume *v;
	struct layer *live;
	struct volume_req *reqs;
	unsigned n;
	struct scratch *s; /* NULL until something is found */
	bool in_round[VOLUME_BATCH_MAX];
};

static void save_close_round(struct save *b)
{
	int rc;

	if (!b->s || b->s->n_runs == 0)
		return;
	rc = save_round(b->v, b->live, NULL, b->s);
	for (unsigned i = 0; i < b->n; i++) {
		if (rc < 0 && b->in_round[i])
			req_fail(&b->reqs[i], rc, true);
		b->in_round[i] = false;
	}
}

static void save_req(struct save *b, unsigned i)
{
	struct volume_req *r = &b->reqs[i];
	struct change c = {r->off, r->off + r->len, r->kind == VOLUME_WRITE ? r->off + r->len : r->off};
	uint64_t room = ROUND_BLOCKS;
	struct block_run run;
	int rc;

	while (r->error == 0) {
		if (b->s) {
			if (b->s->n_runs == ROUND_RUNS || b->s->n_blocks == ROUND_BLOCKS)
				save_close_round(b);
			room = ROUND_BLOCKS - b->s->n_blocks;
		}
		rc = change_next_unsaved(b->v, b->live, &c, room, &run);
		if (rc == 0)
			return;
		if (rc < 0) {
			req_fail(r, rc, false);
			return;
		}
		if (!b->s && !(b->s = scratch_get(b->v))) {
			req_fail(r, -ERR_NOMEM, true);
			return;
		}
		b->s->runs[b->s->n_runs++] = run;
		b->s->n_blocks += (uint32_t)run.n;
		b->in_round[i] = true;
	}
}

/* V1 for the batch. Requests whose blocks could not be saved have their error after it. */
static void save_batch(struct volume *v, struct layer *live, struct volume_req *reqs, unsigned n)
{
	struct save b;

	/* Not an initializer: the flags are cleared up to n only. */
	b.v = v;
	b.live = live;
	b.reqs = reqs;
	b.n = n;
	b.s = NULL;
	memset(b.in_round, 0, n * sizeof(b.in_round[0]));
	for (unsigned i = 0; i < n; i++)
		if (reqs[i].error == 0)
			save_req(&b, i);
	save_close_round(&b);
	scratch_put(v, b.s);
}

/* ---- the disk ---- */

static int disk_zero_data(struct volume *v, uint64_t off, uint64_t end, bool punch)
{
	while (off < end) {
		struct extent x;
		int rc = disk_extent(v->disk, off, end, &x);

		if (rc == 0 && x.data)
			rc = disk_zero(v->disk, x.off, x.len, punch);
		if (rc < 0)
			return rc;
		off = x.off + x.len;
	}
	return 0;
}

static int req_apply(struct volume *v, const struct volume_req *r)
{
	if (r->len == 0)
		return 0;
	if (r->kind == VOLUME_WRITE)
		return disk_write(v->disk, r->off, r->buf, (size_t)r->len);
	return disk_zero_data(v, r->off, r->off + r->len, r->kind == VOLUME_DISCARD);
}

static bool req_is_large(const struct volume_req *r)
{
	return r->kind != VOLUME_WRITE && r->len > ZERO_PIECE;
}

/* chain_lock held. Leaves out requests that have an error. */
static void write_batch_locked(struct volume *v, struct volume_req *reqs, unsigned n)
{
	if (v->n_chain)
		save_batch(v, v->chain[v->n_chain - 1], reqs, n);
	for (unsigned i = 0; i < n; i++)
		if (reqs[i].error == 0)
			reqs[i].error = req_apply(v, &reqs[i]);
}

/* Under the lock: the range's first piece, with the hole before it, up to *at, which moves on. */
static int zero_piece_locked(struct volume *v, struct volume_req *r, uint64_t *at)
{
	uint64_t end = r->off + r->len;
	struct volume_req piece;
	struct extent x;
	int rc = disk_extent(v->disk, *at, end, &x);

	if (rc < 0)
		return rc;
	if (!x.data) {
		*at = x.off + x.len;
		return 0;
	}
	/* Pieces end between blocks: a block zeroed in two halves would never be freed. */
	piece =
	    (struct volume_req){.kind = r->kind, .off = *at, .len = min_u64(end - *at, ZERO_PIECE - *at % ZERO_PIECE)};
	write_batch_locked(v, &piece, 1);
	r->save_failed = piece.save_failed;
	*at += piece.len;
	return piece.error;
}

static void write_large_zero(struct volume *v, struct volume_req *r)
{
	uint64_t at = r->off;

	while (r->error == 0 && at < r->off + r->len) {
		volume_lock_shared(v);
		r->error = zero_piece_locked(v, r, &at);
		volume_unlock(v);
	}
}

static void tell_tap(struct volume *v, const struct volume_req *reqs, unsigned n)
{
	if (!__atomic_load_n(&v->tap, __ATOMIC_RELAXED))
		return;
	INVARIANT(pthread_rwlock_rdlock(&v->tap_lock) == 0);
	for (unsigned i = 0; v->tap && i < n; i++)
		if (reqs[i].error == 0 && reqs[i].len)
			v->tap(v->tap_arg, &reqs[i]);
	INVARIANT(pthread_rwlock_unlock(&v->tap_lock) == 0);
}

int volume_set_tap(struct volume *v, volume_tap_fn fn, void *arg)
{
	int rc = 0;

	INVARIANT(pthread_rwlock_wrlock(&v->tap_lock) == 0);
	if (fn && v->tap) {
		rc = -ERR_BUSY;
	} else {
		v->tap_arg = arg;
		__atomic_store_n(&v->tap, fn, __ATOMIC_RELAXED);
	}
	INVARIANT(pthread_rwlock_unlock(&v->tap_lock) == 0);
	return rc;
}

int volume_write(struct volume *v, struct volume_req *reqs, unsigned n)
{
	unsigned first = 0, large = 0;
	int rc = 0;

	PRE(n <= VOLUME_BATCH_MAX);
	volume_lock_shared(v);
	for (unsigned i = 0; i < n; i++) {
		reqs[i].save_failed = false;
		reqs[i].error = req_range_fits(v, &reqs[i]) ? 0 : -ERR_RANGE;
		large += req_is_large(&reqs[i]);
	}
	/* Large ones stand alone; the runs of others between them go as batches. */
	for (unsigned i = 0; large && i < n; i++) {
		if (!req_is_large(&reqs[i]))
			continue;
		write_batch_locked(v, reqs + first, i - first);
		if (reqs[i].error == 0) {
			volume_unlock(v);
			write_large_zero(v, &reqs[i]);
			volume_lock_shared(v);
		}
		first = i + 1;
	}
	write_batch_locked(v, reqs + first, n - first);
	volume_unlock(v);
	tell_tap(v, reqs, n);
	for (unsigned i = 0; rc == 0 && i < n; i++)
		rc = reqs[i].error;
	return rc;
}

/* ---- what is written over an image: active, clones ---- */

/* Blocks put with one sync, and under one hold of the chain lock. */
#define TOP_ROUND_BLOCKS 4096U

static uint64_t stripes_of(uint64_t block, uint64_t n)
{
	uint64_t first = block >> STRIPE_SHIFT, last = (block + n - 1) >> STRIPE_SHIFT, mask = 0;

	if (last - first >= STRIPES)
		return UINT64_MAX;
	for (; first <= last; first++)
		mask |= UINT64_C(1) << first % STRIPES;
	return mask;
}

static void stripes_lock(struct volume *v, uint64_t mask)
{
	for (unsigned i = 0; i < STRIPES; i++)
		if (mask >> i & 1) {
			int r = pthread_rwlock_wrlock(&v->stripes[i]);

			INVARIANT(r == 0);
		}
}

static void stripes_unlock(struct volume *v, uint64_t mask)
{
	for (unsigned i = 0; i < STRIPES; i++)
		if (mask >> i & 1) {
			int r = pthread_rwlock_unlock(&v->stripes[i]);

			INVARIANT(r == 0);
		}
}

/* A block that is written in part, from the view. Past the volume's end: zeroes. */
static int complete_block(struct volume *v, const struct view *w, uint64_t block, uint8_t *buf)
{
	uint64_t off = block << BLOCK_SHIFT, n = min_u64(BLOCK_SIZE, v->size - off);

	memset(buf + n, 0, BLOCK_SIZE - n);
	return view_read(v, w, off, n, buf);
}

/* The new content of blocks [block, block + n), whole: in *ret, which is the request's own buffer where that will do.
 */
static int top_content(struct volume *v, const struct view *w, const struct volume_req *r, uint64_t block, uint32_t n,
		       uint8_t *bounce, const uint8_t **ret)
{
	uint64_t off = block << BLOCK_SHIFT, end = off + ((uint64_t)n << BLOCK_SHIFT);
	uint64_t lo = max_u64(off, r->off), hi = min_u64(end, r->off + r->len);
	int rc = 0;

	if (r->kind == VOLUME_WRITE && lo == off && hi == end) {
		*ret = (const uint8_t *)r->buf + (lo - r->off);
		return 0;
	}
	if (lo > off || hi < off + BLOCK_SIZE)
		rc = complete_block(v, w, block, bounce);
	if (rc == 0 && n > 1 && hi < end)
		rc = complete_block(v, w, block + n - 1, bounce + ((size_t)(n - 1) << BLOCK_SHIFT));
	if (rc < 0)
		return rc;
	if (r->kind == VOLUME_WRITE)
		memcpy(bounce + (lo - off), (const uint8_t *)r->buf + (lo - r->off), (size_t)(hi - lo));
	else
		memset(bounce + (lo - off), 0, (size_t)(hi - lo));
	*ret = bounce;
	return 0;
}

static int top_put(struct volume *v, struct layer *top, uint64_t block, uint32_t n, const uint8_t *data,
		   uint32_t *words)
{
	/* Only these blocks' own writer, excluded by the caller's claims, could make one of them appear meanwhile. */
	uint64_t mask = bits_next_set(top->held, block, block + n) < block + n ? stripes_of(block, n) : 0;
	int rc;

	stripes_lock(v, mask);
	rc = overlay_put_data(top->o, block, n, data, words);
	stripes_unlock(v, mask);
	return rc;
}

/* Blocks [block, block + n) of the request, n <= TOP_ROUND_BLOCKS. A reader between data and word finds either the
 * block absent or its word saying that the checksum is not known: no mismatch (image/overlay.h). */
static int top_round(struct volume *v, const struct view *w, const struct volume_req *r, uint64_t block, uint32_t n,
		     struct scratch *s)
{
	int rc;

	for (uint32_t i = 0; i < n; i += PIECE_BLOCKS) {
		uint32_t piece = (uint32_t)min_u64(n - i, PIECE_BLOCKS);
		const uint8_t *data;

		rc = top_content(v, w, r, block + i, piece, s->bounce, &data);
		if (rc == 0)
			rc = top_put(v, w->top, block + i, piece, data, s->words + i);
		if (rc < 0)
			return rc;
	}
	rc = v->power ? overlay_sync_data(w->top->o) : 0;
	if (rc < 0)
		return rc;
	rc = overlay_put_map(w->top->o, block, n, s->words);
	if (rc == 0)
		overlay_publish(w->top->o, block, n);
	else /* else the next start would find in a block what this write failed to put there, whatever was flushed
		since */
		(void)overlay_take_back(w->top->o, block, n);
	return rc;
}

/* From *block on, one round. */
static int write_top_locked(struct volume *v, enum volume_layer layer, uint64_t id, const struct volume_req *r,
			    uint64_t *block)
{
	uint64_t end = units_of(r->off + r->len, BLOCK_SHIFT);
	uint32_t n = (uint32_t)min_u64(end - *block, TOP_ROUND_BLOCKS);
	struct scratch *s;
	struct view w;
	int rc;

	if (!req_range_fits(v, r))
		return -ERR_RANGE;
	rc = view_make(v, layer, id, &w);
	if (rc < 0)
		return rc;
	if (!w.top)
		return -ERR_STATE;
	if (r->len == 0) {
		*block = end;
		return 0;
	}
	s = scratch_get(v);
	if (!s)
		return -ERR_NOMEM;
	rc = top_round(v, &w, r, *block, n, s);
	scratch_put(v, s);
	*block += n;
	return rc;
}

/* Large zeroes let go of the lock between rounds, as those of a disk do. */
static int write_top(struct volume *v, enum volume_layer layer, uint64_t id, struct volume_req *r)
{
	uint64_t block = r->off >> BLOCK_SHIFT;

	r->save_failed = false;
	do {
		volume_lock_shared(v);
		r->error = write_top_locked(v, layer, id, r, &block);
		volume_unlock(v);
	} while (r->error == 0 && block < units_of(r->off + r->len, BLOCK_SHIFT));
	return r->error;
}

/* Without the chain lock: a checkpoint does not wait for it. */
static int sync_top(struct volume *v, enum volume_layer layer, uint64_t id)
{
	struct layer *l = NULL;
	int rc;

	volume_lock_shared(v);
	rc = chain_find_overlay(v, layer, id, &l);
	if (rc == 0 && l)
		layer_ref(l);
	volume_unlock(v);
	if (rc < 0 || !l)
		return rc;
	rc = overlay_sync_data(l->o);
	if (rc == 0)
		rc = overlay_sync_map(l->o);
	layer_unref(l);
	return rc;
}

int volume_write_active(struct volume *v, uint64_t base, struct volume_req *req)
{
	return write_top(v, LAYER_VIEW, base, req);
}

int volume_sync_active(struct volume *v)
{
	return sync_top(v, LAYER_ACTIVE, 0);
}

/* The room that is left to replication: what a clone takes would be missing there. */
static int clone_room(struct volume *v, uint64_t len)
{
	uint64_t room, total, kept;
	int rc = storage_free_bytes(v->storage, &room, &total);

	if (rc < 0)
		return rc;
	kept = min_u64(total / CLONE_ROOM_SHARE, CLONE_ROOM_MAX);
	return room < kept || room - kept < len ? -ERR_NOSPC : 0;
}

int volume_write_clone(struct volume *v, uint64_t id, struct volume_req *req)
{
	/* Zeroes take words of the map only. */
	uint64_t takes = req->kind == VOLUME_WRITE ? req->len : req->len / BLOCK_SIZE * sizeof(uint32_t);

	req->save_failed = false;
	req->error = clone_is_there(v, id) ? clone_room(v, takes + BLOCK_SIZE) : -ERR_NOENT;
	return req->error ? req->error : write_top(v, LAYER_CLONE, id, req);
}

int volume_sync_clone(struct volume *v, uint64_t id)
{
	return sync_top(v, LAYER_CLONE, id);
}

/* ---- commit ---- */

static bool is_zero(const uint8_t *p, uint64_t n)
{
	return p[0] == 0 && memcmp(p, p + 1, n - 1) == 0;
}

/* Requests that make `have` into `want` over [off, off + len), block by block, neighbours joined; zeroes become holes.
 */
static unsigned commit_requests(uint64_t off, uint64_t len, const uint8_t *want, const uint8_t *have,
				struct volume_req *reqs)
{
	unsigned n = 0;

	for (uint64_t at = 0; at < len; at += BLOCK_SIZE) {
		uint64_t part = min_u64(len - at, BLOCK_SIZE);
		struct volume_req *last = n ? &reqs[n - 1] : NULL;
		enum volume_req_kind kind;

		if (memcmp(want + at, have + at, part) == 0)
			continue;
		kind = is_zero(want + at, part) ? VOLUME_DISCARD : VOLUME_WRITE;
		if (last && last->kind == kind && last->off + last->len == off + at)
			last->len += part;
		else
			reqs[n++] = (struct volume_req){.kind = kind, .off = off + at, .len = part, .buf = want + at};
	}
	return n;
}

/* A commit under way. */
struct commit {
	uint64_t base, block, end;
	struct scratch *want, *have; /* NULL until there is something to write */
	struct volume_req reqs[PIECE_BLOCKS];
	unsigned n; /* of the last run */
};

/* Blocks [block, end), at most PIECE_BLOCKS. */
static int commit_run(struct volume *v, const struct view *w, uint64_t block, uint64_t end, struct commit *c)
{
	uint64_t off = block << BLOCK_SHIFT, len = min_u64(end << BLOCK_SHIFT, v->size) - off;
	int rc = view_read(v, w, off, len, c->want->bounce);

	if (rc == 0)
		rc = disk_read(v->disk, off, c->have->bounce, (size_t)len);
	if (rc < 0)
		return rc;
	c->n = commit_requests(off, len, c->want->bounce, c->have->bounce, c->reqs);
	write_batch_locked(v, c->reqs, c->n);
	return 0;
}

/* The next run, with which c->block moves on. */
static int commit_next_locked(struct volume *v, struct commit *c)
{
	struct view w;
	int rc = view_make(v, LAYER_VIEW, c->base, &w);
	uint64_t stop;

	if (rc < 0 || (c->block = view_next_held(&w, c->block, c->end)) == c->end)
		return rc;
	stop = view_next_free(&w, c->block, min_u64(c->end, c->block + PIECE_BLOCKS));
	if (!c->want)
		c->want = scratch_get(v);
	if (!c->have)
		c->have = scratch_get(v);
	rc = c->want && c->have ? commit_run(v, &w, c->block, stop, c) : -ERR_NOMEM;
	c->block = stop;
	return rc;
}

/* As after any write, who is told of them is told without the lock. */
static int commit_next(struct volume *v, struct commit *c, uint64_t *written)
{
	int rc;

	c->n = 0;
	volume_lock_shared(v);
	rc = commit_next_locked(v, c);
	volume_unlock(v);
	tell_tap(v, c->reqs, c->n);
	for (unsigned i = 0; rc == 0 && i < c->n; i++) {
		rc = c->reqs[i].error;
		*written += c->reqs[i].len;
	}
	return rc;
}

int volume_commit(struct volume *v, uint64_t base, uint64_t off, uint64_t len, uint64_t *ret_written)
{
	uint64_t size = volume_size(v), written = 0;
	struct commit c;
	int rc = off < size ? 0 : -ERR_RANGE;

	PRE(off % BLOCK_SIZE == 0);
	/* Not an initializer: the requests are many, and made one by one. */
	c.base = base;
	c.block = off >> BLOCK_SHIFT;
	c.end = rc == 0 ? units_of(off + min_u64(len, size - off), BLOCK_SHIFT) : c.block;
	c.want = c.have = NULL;
	while (rc == 0 && c.block < c.end)
		rc = commit_next(v, &c, &written);
	scratch_put(v, c.want);
	scratch_put(v, c.have);
	if (rc == 0)
		*ret_written = written;
	return rc;
}
