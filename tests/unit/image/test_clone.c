/* Clones of a volume against a plain model: each is the image of its checkpoint with what was written to it, whatever
 * else happens to the volume meanwhile. */
#include <criterion/criterion.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>

#include "core/err.h"
#include "tests/unit/image/volmodel.h"

/* Not a multiple of a block: the last one is short. */
#define ODD_SIZE ((UINT64_C(150) << BLOCK_SHIFT) + 1536)
#define CLONES 4

struct scratchpad {
	uint64_t id, ckpt;
	uint8_t *content;
	bool *has; /* blocks that were written */
};

static struct tmp_store store;
static struct model m;
static struct scratchpad pads[CLONES];
static unsigned n_pads;
static uint64_t last_id;

static bool held(uint64_t ckpt)
{
	for (unsigned i = 0; i < n_pads; i++)
		if (pads[i].ckpt == ckpt)
			return true;
	return false;
}

static uint32_t named(struct volume_clone out[CLONES])
{
	for (unsigned i = 0; i < n_pads; i++)
		out[i] = (struct volume_clone){pads[i].id, pads[i].ckpt};
	return n_pads;
}

static void clones_switch(void)
{
	struct volume_clone c[CLONES];
	volume_switch_clones(m.v, c, named(c));
}

static void reopen(void)
{
	uint64_t numbers[MODEL_CKPTS + 1];
	struct volume_clone c[CLONES];
	struct err e = {0};
	struct volume_open_args a = {.name = "vol",
				     .size = m.size,
				     .durability = m.dur,
				     .ckpts = numbers,
				     .n_ckpts = m.n_ckpts,
				     .active_id = m.active_id,
				     .clones = c,
				     .n_clones = named(c)};
	for (unsigned i = 0; i < m.n_ckpts; i++)
		numbers[i] = m.ckpts[i].number;
	volume_close(m.v);
	cr_assert_eq(volume_open(m.storage, &a, &m.v, &e), 0, "%s", e.text);
}

static void pad_make(uint64_t ckpt)
{
	struct scratchpad *s = &pads[n_pads];
	*s = (struct scratchpad){.id = ++last_id, .ckpt = ckpt};
	s->content = malloc(m.size);
	s->has = calloc(m.blocks, sizeof(bool));
	memcpy(s->content, model_image(&m, ckpt), m.size);
	cr_assert_eq(volume_prepare_clone(m.v, s->id, NULL), 0);
	n_pads++;
	clones_switch();
}

static void pad_remove(unsigned i)
{
	free(pads[i].content);
	free(pads[i].has);
	pads[i] = pads[--n_pads];
	clones_switch();
}

static void pad_write(struct scratchpad *s)
{
	uint8_t *buf;
	struct volume_req r = model_req(&m, 0, m.blocks, &buf);
	cr_assert_eq(volume_write_clone(m.v, s->id, &r), 0);
	cr_assert_eq(r.error, 0);
	cr_assert_not(r.save_failed);
	model_apply(s->content, &r);
	for (uint64_t b = r.off / BLOCK_SIZE; b <= (r.off + r.len - 1) / BLOCK_SIZE; b++)
		s->has[b] = true;
	free(buf);
}

static void pads_check(void)
{
	uint8_t *buf = malloc(m.size);
	for (unsigned i = 0; i < n_pads; i++) {
		struct scratchpad *s = &pads[i];
		uint64_t off = model_random(&m, m.size), len = 1 + model_random(&m, m.size - off), n = 0;
		memset(buf, POISON, m.size);
		cr_assert_eq(volume_read_clone(m.v, s->id, 0, m.size, buf), 0);
		model_compare(&m, "clone", s->id, buf, s->content, 0, m.size);
		memset(buf, POISON, m.size);
		cr_assert_eq(volume_read_clone(m.v, s->id, off, len, buf), 0);
		model_compare(&m, "part of clone", s->id, buf, s->content + off, off, len);
		cr_assert(len == m.size || buf[len] == POISON);
		model_check_extents(&m, LAYER_CLONE, s->id, s->content, NULL);
		for (uint64_t b = 0; b < m.blocks; b++)
			n += s->has[b];
		cr_assert_eq(volume_clone_blocks(m.v, s->id), n);
	}
	free(buf);
}

static void begin(enum volume_durability dur, uint64_t seed)
{
	tmp_store_open(&store);
	model_init(&m, store.storage, ODD_SIZE, dur, seed);
}

static void end(void)
{
	while (n_pads)
		pad_remove(0);
	volume_reap(m.v);
	model_free(&m);
	tmp_store_close(&store);
}

static bool file_there(const char *file)
{
	char path[512];
	struct stat st;
	snprintf(path, sizeof(path), "%s/volumes/vol/%s", store.path, file);
	return stat(path, &st) == 0;
}

static void random_step(void)
{
	uint64_t i = m.n_ckpts ? model_random(&m, m.n_ckpts) : 0;
	switch (model_random(&m, 12)) {
	case 0:
		if (m.n_ckpts < MODEL_CKPTS)
			model_checkpoint(&m, model_random(&m, 2) == 0);
		break;
	case 1:
		if (m.n_ckpts > 1 && i + 1 < m.n_ckpts && !held(m.ckpts[i].number))
			model_drop(&m, (unsigned)i);
		break;
	case 2:
		if (m.n_ckpts && n_pads < CLONES)
			pad_make(m.ckpts[i].number);
		break;
	case 3:
		if (n_pads && model_random(&m, 3) == 0)
			pad_remove((unsigned)model_random(&m, n_pads));
		break;
	case 4:
		if (model_random(&m, 3) == 0)
			reopen();
		else
			volume_reap(m.v);
		break;
	case 5: /* one that came to nothing */
		cr_assert_eq(volume_prepare_clone(m.v, last_id + 1, NULL), 0);
		if (model_random(&m, 2))
			volume_unprepare(m.v);
		else
			clones_switch();
		last_id++;
		break;
	case 6:
		model_write_active(&m);
		break;
	case 7 ... 9:
		if (n_pads)
			pad_write(&pads[model_random(&m, n_pads)]);
		break;
	default:
		model_write(&m);
	}
}

static void random_run(enum volume_durability dur, uint64_t seed, unsigned steps)
{
	begin(dur, seed);
	for (m.step = 0; m.step < steps; m.step++) {
		random_step();
		pads_check();
		if (m.step % 8 == 0)
			model_check(&m);
	}
	reopen();
	pads_check();
	model_check(&m);
	end();
}

Test(clone, random_operations_match_the_model)
{
	for (uint64_t seed = 1; seed <= 6; seed++)
		random_run(DURABILITY_PROCESS, seed, 200);
	random_run(DURABILITY_POWER, 101, 80);
}

static void teardown(void)
{
	end();
}

static void setup(void)
{
	begin(DURABILITY_PROCESS, 7);
	for (unsigned i = 0; i < 20; i++)
		model_write(&m);
	model_checkpoint(&m, true);
}

TestSuite(clone_one, .init = setup, .fini = teardown);

Test(clone_one, its_files_come_before_the_record_and_go_after)
{
	uint64_t ckpt = m.ckpts[0].number;
	cr_assert_eq(volume_prepare_clone(m.v, 1, NULL), 0);
	cr_assert(file_there("clone-1.data") && file_there("clone-1.map"));
	uint8_t byte = POISON;
	cr_assert_eq(volume_read_clone(m.v, 1, 0, 1, &byte), -ERR_NOENT);
	reopen(); /* killed before the record named it */
	cr_assert_not(file_there("clone-1.data") || file_there("clone-1.map"));
	last_id = 1;
	pad_make(ckpt);
	pad_write(&pads[0]);
	cr_assert_eq(volume_sync_clone(m.v, 2), 0);
	reopen();
	pads_check();
	pad_remove(0); /* no record names it */
	cr_assert(file_there("clone-2.data"));
	cr_assert_eq(volume_read_clone(m.v, 2, 0, 1, &byte), -ERR_NOENT);
	cr_assert_eq(volume_sync_clone(m.v, 2), -ERR_NOENT);
	reopen(); /* killed before they were unlinked */
	cr_assert_not(file_there("clone-2.data") || file_there("clone-2.map"));
	model_check(&m);
}

/* Its checkpoint is given up for want of room: what it held goes too. */
Test(clone_one, one_that_has_lost_its_checkpoint)
{
	struct volume_req r = {.kind = VOLUME_ZERO, .off = 0, .len = BLOCK_SIZE};
	struct extent x;
	uint64_t bytes;
	pad_make(m.ckpts[0].number);
	model_checkpoint(&m, false);
	pad_make(m.ckpts[1].number);
	pad_write(&pads[0]);
	volume_drop_through(m.v, m.ckpts[0].number);
	uint8_t byte;
	cr_assert_eq(volume_read_clone(m.v, 1, 0, 1, &byte), -ERR_NOENT);
	clones_switch(); /* it is named still */
	cr_assert_eq(volume_read_clone(m.v, 1, 0, 1, &byte), -ERR_NOENT);
	cr_assert_eq(volume_write_clone(m.v, 1, &r), -ERR_NOENT);
	cr_assert_eq(volume_extent(m.v, LAYER_CLONE, 1, 0, &x), -ERR_NOENT);
	cr_assert_eq(volume_allocated(m.v, LAYER_CLONE, 1, &bytes), -ERR_NOENT);
	cr_assert_eq(volume_clone_blocks(m.v, 1), 0);
	volume_reap(m.v);
	cr_assert_not(file_there("clone-1.data") || file_there("clone-1.map"));
	model_did_drop(&m, 0);
	reopen();
	cr_assert_eq(volume_read_clone(m.v, 1, 0, 1, &byte), -ERR_NOENT);
	free(pads[0].content);
	free(pads[0].has);
	pads[0] = pads[--n_pads];
	pads_check();
	model_check(&m);
}

Test(clone_one, requests_outside_and_of_nothing)
{
	struct volume_req r = {.kind = VOLUME_ZERO, .off = ODD_SIZE, .len = 512};
	pad_make(m.ckpts[0].number);
	cr_assert_eq(volume_write_clone(m.v, 1, &r), -ERR_RANGE);
	r = (struct volume_req){.kind = VOLUME_ZERO, .off = 100, .len = 0};
	cr_assert_eq(volume_write_clone(m.v, 1, &r), 0);
	cr_assert_eq(volume_clone_blocks(m.v, 1), 0);
	cr_assert_eq(volume_prepare_clone(m.v, 1, NULL), 0, "it is there: nothing to do");
	clones_switch();
	pads_check();
}

/* The volume grows under it: it shows what it showed, and zeroes behind. */
Test(clone_one, the_volume_grows)
{
	const uint64_t more = ODD_SIZE + (UINT64_C(40) << BLOCK_SHIFT);
	uint8_t *buf = malloc(more), byte = 0x5c;
	pad_make(m.ckpts[0].number);
	for (unsigned i = 0; i < 8; i++)
		pad_write(&pads[0]);
	cr_assert_eq(volume_prepare_clone(m.v, 77, NULL), 0);
	cr_assert_eq(volume_resize(m.v, more), -ERR_BUSY);
	volume_unprepare(m.v);
	cr_assert_eq(volume_resize(m.v, more), 0);
	memset(buf, POISON, more);
	cr_assert_eq(volume_read_clone(m.v, 1, 0, more, buf), 0);
	model_compare(&m, "grown clone", 1, buf, pads[0].content, 0, ODD_SIZE);
	for (uint64_t i = ODD_SIZE; i < more; i++)
		cr_assert_eq(buf[i], 0, "byte %lu", (unsigned long)i);
	struct volume_req r = {.kind = VOLUME_WRITE, .off = more - 1, .len = 1, .buf = &byte};
	cr_assert_eq(volume_write_clone(m.v, 1, &r), 0);
	cr_assert_eq(volume_read_clone(m.v, 1, 0, more, buf), 0);
	cr_assert(buf[more - 1] == byte && buf[more - 2] == 0);
	model_compare(&m, "grown clone", 1, buf, pads[0].content, 0, ODD_SIZE);
	free(buf);
}
