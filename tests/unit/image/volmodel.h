/* A plain model of a volume, for tests: the disk's bytes, a copy of them per kept checkpoint, and the active blocks. It
 * does to a real volume what it does to itself; model_check compares all that can be read, byte for byte.
 */
#ifndef REPFS_TESTS_VOLMODEL_H
#define REPFS_TESTS_VOLMODEL_H

#include <criterion/criterion.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "image/based.h"
#include "image/overlay.h"
#include "image/volume.h"

#define MODEL_CKPTS 8
#define POISON 0xa7

/* ---- a folder for a test ---- */

struct tmp_store {
	char path[256];
	struct storage *storage;
};

static inline void tmp_store_open(struct tmp_store *t)
{
	const char *dir = getenv("TMPDIR");

	snprintf(t->path, sizeof(t->path), "%s/repfs-volume-XXXXXX", dir && *dir ? dir : "/tmp");
	cr_assert_not_null(mkdtemp(t->path));
	cr_assert_eq(storage_posix_open(t->path, &t->storage), 0);
}

static inline int tmp_remove(const char *path, const struct stat *st, int flag, struct FTW *ftw)
{
	(void)st;
	(void)flag;
	(void)ftw;
	return remove(path);
}

static inline void tmp_store_close(struct tmp_store *t)
{
	storage_close(t->storage);
	cr_assert_eq(nftw(t->path, tmp_remove, 8, FTW_DEPTH | FTW_PHYS), 0);
}

/* ---- the model ---- */

struct model_ckpt {
	uint64_t number;
	uint8_t *image;
	bool *touched; /* blocks that a request covered while it was the live one, or that were merged into it */
};

struct model {
	struct storage *storage;
	struct volume *v;
	enum volume_durability dur;
	uint64_t size, blocks;
	uint8_t *disk;
	struct model_ckpt ckpts[MODEL_CKPTS + 1];
	unsigned n_ckpts;
	uint64_t last_number;
	uint64_t base, active_id;
	uint8_t *active;
	bool *active_has;
	uint64_t seed, start_seed;
	unsigned step;
};

static inline uint64_t model_random(struct model *m, uint64_t below)
{
	m->seed ^= m->seed << 13;
	m->seed ^= m->seed >> 7;
	m->seed ^= m->seed << 17;
	return m->seed % below;
}

static inline void model_fill(struct model *m, uint8_t *p, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		p[i] = (uint8_t)(1 + model_random(m, 255));
}

static inline void model_open_volume(struct model *m)
{
	uint64_t numbers[MODEL_CKPTS + 1];
	struct volume_open_args a = {.name = "vol",
				     .size = m->size,
				     .durability = m->dur,
				     .ckpts = numbers,
				     .n_ckpts = m->n_ckpts,
				     .active_id = m->active_id};
	struct err e = {0};

	for (unsigned i = 0; i < m->n_ckpts; i++)
		numbers[i] = m->ckpts[i].number;
	cr_assert_eq(volume_open(m->storage, &a, &m->v, &e), 0, "seed %llu step %u: %s",
		     (unsigned long long)m->start_seed, m->step, e.text);
}

/* When it is set, model_init makes the volume over this base. */
static struct source *model_over;

/* A base of `size` bytes with data and holes, as a file in the tmp_store. */
static inline void model_over_open(struct tmp_store *t, uint64_t size)
{
	char path[300];
	uint8_t block[3000];
	struct err e = {0};
	FILE *f;

	snprintf(path, sizeof(path), "%s/base.img", t->path);
	f = fopen(path, "we");
	cr_assert_not_null(f);
	for (uint64_t off = 0; off < size; off += sizeof(block)) {
		memset(block, (int)(1 + off / sizeof(block) % 250), sizeof(block));
		cr_assert_eq(fseek(f, (long)off, SEEK_SET), 0);
		if (off / 20000 % 3)
			cr_assert_eq(fwrite(block, 1, min_u64(sizeof(block), size - off), f),
				     min_u64(sizeof(block), size - off));
	}
	cr_assert_eq(fclose(f), 0);
	cr_assert_eq(truncate(path, (off_t)size), 0);
	cr_assert_eq(source_open(path, "raw", NULL, &model_over, &e), 0, "%s", e.text);
}

static inline void model_over_close(void)
{
	source_close(model_over);
	model_over = NULL;
}

static inline void model_init(struct model *m, struct storage *s, uint64_t size, enum volume_durability dur,
			      uint64_t seed)
{
	*m = (struct model){.storage = s, .size = size, .blocks = overlay_blocks_in(size), .dur = dur};
	m->start_seed = seed;
	m->seed = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	m->disk = calloc(1, size);
	m->active = calloc(m->blocks, BLOCK_SIZE);
	m->active_has = calloc(m->blocks, sizeof(bool));
	if (model_over) {
		struct based_args a = {.source = model_over, .path = model_over->files[0].path};
		struct err e = {0};

		cr_assert_eq(volume_create_over(s, "vol", size, &a, dur, &e), 0, "%s", e.text);
		cr_assert_eq(disk_read(model_over->disk, 0, m->disk, (size_t)model_over->size), 0);
	} else {
		cr_assert_eq(volume_create(s, "vol", size, dur, NULL), 0);
	}
	model_open_volume(m);
}

static inline void model_free(struct model *m)
{
	volume_close(m->v);
	for (unsigned i = 0; i < m->n_ckpts; i++) {
		free(m->ckpts[i].image);
		free(m->ckpts[i].touched);
	}
	free(m->disk);
	free(m->active);
	free(m->active_has);
}

static inline void model_reopen(struct model *m)
{
	volume_close(m->v);
	model_open_volume(m);
}

static inline const uint8_t *model_image(const struct model *m, uint64_t number)
{
	for (unsigned i = 0; i < m->n_ckpts; i++)
		if (m->ckpts[i].number == number)
			return m->ckpts[i].image;
	return m->disk;
}

static inline void model_view(const struct model *m, uint8_t *out)
{
	memcpy(out, model_image(m, m->base), m->size);
	for (uint64_t b = 0; b < m->blocks; b++)
		if (m->active_has[b])
			memcpy(out + b * BLOCK_SIZE, m->active + b * BLOCK_SIZE,
			       min_u64(BLOCK_SIZE, m->size - b * BLOCK_SIZE));
}

/* What a request does to a plain array. */
static inline void model_apply(uint8_t *bytes, const struct volume_req *r)
{
	if (r->kind == VOLUME_WRITE)
		memcpy(bytes + r->off, r->buf, r->len);
	else
		memset(bytes + r->off, 0, r->len);
}

static inline void model_touch(struct model *m, uint64_t off, uint64_t len)
{
	if (m->n_ckpts == 0 || len == 0)
		return;
	for (uint64_t b = off / BLOCK_SIZE; b <= (off + len - 1) / BLOCK_SIZE; b++)
		m->ckpts[m->n_ckpts - 1].touched[b] = true;
}

static inline void model_did_write(struct model *m, const struct volume_req *r)
{
	model_apply(m->disk, r);
	model_touch(m, r->off, r->len);
}

static inline void model_did_write_active(struct model *m, const struct volume_req *r)
{
	uint8_t *view = malloc(m->blocks * BLOCK_SIZE);

	memset(view + m->size, 0, m->blocks * BLOCK_SIZE - m->size);
	model_view(m, view);
	model_apply(view, r);
	for (uint64_t b = r->off / BLOCK_SIZE; r->len && b <= (r->off + r->len - 1) / BLOCK_SIZE; b++) {
		m->active_has[b] = true;
		memcpy(m->active + b * BLOCK_SIZE, view + b * BLOCK_SIZE, BLOCK_SIZE);
	}
	free(view);
}

static inline void model_empty_active(struct model *m)
{
	memset(m->active_has, 0, m->blocks * sizeof(bool));
}

/* The metadata write that opens checkpoint `number` has been made. */
static inline void model_did_checkpoint(struct model *m, uint64_t number)
{
	struct model_ckpt *c = &m->ckpts[m->n_ckpts++];

	cr_assert_leq(m->n_ckpts, MODEL_CKPTS);
	c->number = m->last_number = number;
	c->image = malloc(m->size);
	memcpy(c->image, m->disk, m->size);
	c->touched = calloc(m->blocks, sizeof(bool));
}

static inline void model_did_drop(struct model *m, unsigned i)
{
	if (i > 0)
		for (uint64_t b = 0; b < m->blocks; b++)
			m->ckpts[i - 1].touched[b] |= m->ckpts[i].touched[b];
	if (m->base == m->ckpts[i].number)
		m->base = 0;
	free(m->ckpts[i].image);
	free(m->ckpts[i].touched);
	memmove(&m->ckpts[i], &m->ckpts[i + 1], (--m->n_ckpts - i) * sizeof(m->ckpts[0]));
}

/* ---- comparing ---- */

static inline void model_compare(const struct model *m, const char *what, uint64_t number, const uint8_t *got,
				 const uint8_t *want, uint64_t off, uint64_t len)
{
	for (uint64_t i = 0; i < len; i++)
		if (got[i] != want[i])
			cr_assert_fail("seed %llu step %u: %s %llu at byte %llu (block %llu): %02x, not %02x",
				       (unsigned long long)m->start_seed, m->step, what, (unsigned long long)number,
				       (unsigned long long)(off + i), (unsigned long long)((off + i) / BLOCK_SIZE),
				       got[i], want[i]);
}

struct changed_arg {
	struct model *m;
	bool *blocks;
	uint64_t last_end;
};

static inline void changed_note(void *arg, uint64_t off, uint64_t len)
{
	struct changed_arg *a = arg;

	cr_assert_eq(off % BLOCK_SIZE, 0);
	cr_assert_gt(len, 0);
	/* Ascending, and neighbours are one run. */
	cr_assert(a->last_end == 0 || off > a->last_end);
	cr_assert_leq(off + len, a->m->size);
	a->last_end = off + len;
	for (uint64_t b = off / BLOCK_SIZE; b <= (off + len - 1) / BLOCK_SIZE; b++)
		a->blocks[b] = true;
}

/* Every extent of a layer: they tile the volume, holes read as zeroes, and an overlay's data is its blocks. */
static inline void model_check_extents(struct model *m, enum volume_layer layer, uint64_t ckpt, const uint8_t *content,
				       const bool *blocks)
{
	uint64_t off = 0, held = 0;

	while (off < m->size) {
		struct extent x = {0};

		cr_assert_eq(volume_extent(m->v, layer, ckpt, off, &x), 0);
		cr_assert_eq(x.off, off);
		cr_assert(x.len > 0 && x.len <= m->size - off);
		for (uint64_t i = 0; content && !x.data && i < x.len; i++)
			if (content[off + i])
				cr_assert_fail("seed %llu step %u: layer %d of %llu: a hole over data at %llu",
					       (unsigned long long)m->start_seed, m->step, (int)layer,
					       (unsigned long long)ckpt, (unsigned long long)(off + i));
		for (uint64_t b = off / BLOCK_SIZE; blocks && b <= (off + x.len - 1) / BLOCK_SIZE; b++) {
			cr_assert_eq(blocks[b], x.data);
			held += x.data;
		}
		off += x.len;
	}
	if (blocks) {
		uint64_t bytes = 1;

		cr_assert_eq(volume_allocated(m->v, layer, ckpt, &bytes), 0);
		cr_assert_eq(bytes, held * BLOCK_SIZE);
	}
}

static inline void model_check_undo(struct model *m, unsigned i, uint8_t *buf)
{
	const struct model_ckpt *c = &m->ckpts[i];
	const uint8_t *next = i + 1 < m->n_ckpts ? m->ckpts[i + 1].image : m->disk;
	bool *held = calloc(m->blocks, sizeof(bool));
	struct changed_arg arg = {m, held, 0};
	uint64_t n = 0;

	cr_assert_eq(volume_changed(m->v, c->number, c->number, false, changed_note, &arg), 0);
	memset(buf, POISON, m->size);
	cr_assert_eq(volume_read_overlay(m->v, LAYER_UNDO, c->number, 0, m->size, buf), 0);
	for (uint64_t b = 0; b < m->blocks; b++) {
		uint64_t off = b * BLOCK_SIZE, len = min_u64(BLOCK_SIZE, m->size - off);

		n += held[b];
		if (held[b])
			cr_assert(c->touched[b], "block %llu was saved for nothing", (unsigned long long)b);
		else
			cr_assert_eq(memcmp(c->image + off, next + off, len), 0);
		for (uint64_t k = off; k < off + len; k++)
			if (buf[k] != (held[b] ? c->image[k] : 0))
				cr_assert_fail("undo %llu differs at %llu", (unsigned long long)c->number,
					       (unsigned long long)k);
	}
	cr_assert_eq(volume_undo_blocks(m->v, c->number), n);
	model_check_extents(m, LAYER_UNDO, c->number, buf, held);
	free(held);
}

static inline void model_check_active(struct model *m, uint8_t *buf)
{
	uint64_t n = 0;

	memset(buf, POISON, m->size);
	cr_assert_eq(volume_read_overlay(m->v, LAYER_ACTIVE, 0, 0, m->size, buf), 0);
	for (uint64_t k = 0; k < m->size; k++)
		if (buf[k] != (m->active_has[k / BLOCK_SIZE] ? m->active[k] : 0))
			cr_assert_fail("active differs at %llu", (unsigned long long)k);
	for (uint64_t b = 0; b < m->blocks; b++)
		n += m->active_has[b];
	cr_assert_eq(volume_active_blocks(m->v), n);
	model_check_extents(m, LAYER_ACTIVE, 0, buf, m->active_has);
}

static inline void model_check(struct model *m)
{
	uint8_t *buf = malloc(m->size), *view = malloc(m->size);

	cr_assert_eq(volume_live(m->v), m->n_ckpts ? m->ckpts[m->n_ckpts - 1].number : 0);
	memset(buf, POISON, m->size);
	cr_assert_eq(volume_read_disk(m->v, 0, m->size, buf), 0);
	model_compare(m, "disk", 0, buf, m->disk, 0, m->size);
	model_check_extents(m, LAYER_DISK, 0, m->disk, NULL);
	for (unsigned i = 0; i < m->n_ckpts; i++) {
		uint64_t number = m->ckpts[i].number;
		/* In parts too, at odd places. */
		uint64_t off = model_random(m, m->size), len = 1 + model_random(m, m->size - off);

		memset(buf, POISON, m->size);
		cr_assert_eq(volume_read_ckpt(m->v, number, 0, m->size, buf), 0);
		model_compare(m, "checkpoint", number, buf, m->ckpts[i].image, 0, m->size);
		memset(buf, POISON, m->size);
		cr_assert_eq(volume_read_ckpt(m->v, number, off, len, buf), 0);
		model_compare(m, "part of checkpoint", number, buf, m->ckpts[i].image + off, off, len);
		cr_assert(len == m->size || buf[len] == POISON);
		model_check_extents(m, LAYER_IMAGE, number, m->ckpts[i].image, NULL);
		model_check_undo(m, i, buf);
	}
	model_view(m, view);
	memset(buf, POISON, m->size);
	cr_assert_eq(volume_read_view(m->v, m->base, 0, m->size, buf), 0);
	model_compare(m, "view", m->base, buf, view, 0, m->size);
	model_check_extents(m, LAYER_VIEW, m->base, view, NULL);
	model_check_active(m, buf);
	free(buf);
	free(view);
}

/* ---- doing ---- */

static inline void model_checkpoint(struct model *m, bool empty_active)
{
	uint64_t number = m->last_number + 1 + model_random(m, 3);
	uint64_t active_id = m->active_id + empty_active;

	cr_assert_eq(volume_sync(m->v), 0);
	cr_assert_eq(volume_prepare(m->v, number, active_id, NULL), 0);
	volume_switch(m->v, number, active_id);
	model_did_checkpoint(m, number);
	if (empty_active)
		model_empty_active(m);
	m->active_id = active_id;
}

static inline void model_drop(struct model *m, unsigned i)
{
	uint64_t number = m->ckpts[i].number;

	cr_assert_eq(volume_merge_into_older(m->v, number), 0);
	volume_drop(m->v, number);
	model_did_drop(m, i);
}

/* A request somewhere in blocks [first, end), at any byte. */
static inline struct volume_req model_req(struct model *m, uint64_t first, uint64_t end, uint8_t **ret_buf)
{
	uint64_t lo = first * BLOCK_SIZE, hi = min_u64(end * BLOCK_SIZE, m->size);
	uint64_t off = lo + model_random(m, hi - lo), len = 1 + model_random(m, hi - off);
	struct volume_req r = {.off = off, .len = len, .error = 77, .save_failed = true};

	if (model_random(m, 3)) { /* mostly whole blocks */
		r.off = round_down_u64(off, BLOCK_SIZE);
		r.len = min_u64(round_up_u64(off + len, BLOCK_SIZE), m->size) - r.off;
	}
	if (model_random(m, 2)) /* and mostly small */
		r.len = min_u64(r.len, BLOCK_SIZE);
	*ret_buf = NULL;
	switch (model_random(m, 6)) {
	case 0:
		r.kind = VOLUME_ZERO;
		break;
	case 1:
		r.kind = VOLUME_DISCARD;
		break;
	default:
		r.kind = VOLUME_WRITE;
		*ret_buf = malloc(r.len);
		model_fill(m, *ret_buf, r.len);
		if (model_random(m, 8) == 0)
			memset(*ret_buf, 0, r.len);
		r.buf = *ret_buf;
	}
	return r;
}

#define MODEL_BATCH 8

/* A batch of requests that share no block, in no order. */
static inline unsigned model_batch(struct model *m, struct volume_req *reqs, uint8_t **bufs)
{
	unsigned n = 1 + (unsigned)model_random(m, min_u64(MODEL_BATCH, m->blocks));
	uint64_t each = m->blocks / n;

	for (unsigned i = 0; i < n; i++)
		reqs[i] = model_req(m, i * each, (i + 1) * each + (i == n - 1 ? m->blocks % n : 0), &bufs[i]);
	for (unsigned i = n; i > 1; i--) {
		unsigned k = (unsigned)model_random(m, i);
		struct volume_req r = reqs[i - 1];
		uint8_t *b = bufs[i - 1];

		reqs[i - 1] = reqs[k];
		bufs[i - 1] = bufs[k];
		reqs[k] = r;
		bufs[k] = b;
	}
	return n;
}

static inline void model_write(struct model *m)
{
	struct volume_req reqs[MODEL_BATCH];
	uint8_t *bufs[MODEL_BATCH];
	unsigned n = model_batch(m, reqs, bufs);

	cr_assert_eq(volume_write(m->v, reqs, n), 0);
	for (unsigned i = 0; i < n; i++) {
		cr_assert_eq(reqs[i].error, 0);
		cr_assert_not(reqs[i].save_failed);
		model_did_write(m, &reqs[i]);
		free(bufs[i]);
	}
}

static inline void model_write_active(struct model *m)
{
	uint8_t *buf;
	struct volume_req r = model_req(m, 0, m->blocks, &buf);

	if (m->active_id == 0)
		cr_assert_eq(volume_write_active(m->v, m->base, &r), -ERR_STATE);
	else {
		cr_assert_eq(volume_write_active(m->v, m->base, &r), 0);
		model_did_write_active(m, &r);
	}
	free(buf);
}

/* The whole way back of a failover, in steps. */
static inline void model_commit(struct model *m)
{
	uint64_t step = (1 + model_random(m, 64)) * BLOCK_SIZE;
	uint8_t *view = malloc(m->size), *before = malloc(m->size);
	uint64_t total = 0, differing = 0;

	model_view(m, view);
	memcpy(before, m->disk, m->size);
	for (uint64_t off = 0; off < m->size; off += step) {
		uint64_t written = UINT64_MAX;

		cr_assert_eq(volume_commit(m->v, m->base, off, step, &written), 0);
		total += written;
	}
	for (uint64_t b = 0; b < m->blocks; b++) {
		uint64_t off = b * BLOCK_SIZE, len = min_u64(BLOCK_SIZE, m->size - off);

		if (memcmp(before + off, view + off, len) == 0)
			continue;
		differing += len;
		model_touch(m, off, len);
	}
	memcpy(m->disk, view, m->size);
	/* What is equal is not written: not the first time, and nothing at all the second time. */
	cr_assert_eq(total, differing);
	total = 1;
	cr_assert_eq(volume_commit(m->v, m->base, 0, m->size, &total), 0);
	cr_assert_eq(total, 0);
	free(view);
	free(before);
}

#endif
