/* Which blocks changed since a checkpoint (image/changed.h): exact while nothing fails, and after a kill or a power cut
 * never too little, whatever was in memory. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "image/changed.h"
#include "tests/lib/faultstore.h"
#include "tests/unit/image/crashstore.h"
#include "tests/unit/image/tmpdir.h"

/* 5 pages of bits, the last block short. */
#define BLOCKS 20000U
#define SIZE ((uint64_t)BLOCKS * BLOCK_SIZE - 512)
#define REGION_BLOCKS (INTENT_SIZE / BLOCK_SIZE)
#define REGIONS (BLOCKS / REGION_BLOCKS + 1)
#define EPOCHS 40

static struct tmpdir dir;
static struct storage *s;
static struct changed *c;
static struct err e;

/* What was marked, by epoch; number 0: not begun. */
static struct {
	uint64_t number;
	bool blocks[BLOCKS];
} truth[EPOCHS];
static unsigned n_truth;

static void setup(void)
{
	tmpdir_make(&dir);
	cr_assert_eq(storage_posix_open(dir.path, &s), 0);
	cr_assert_eq(storage_mkdir(s, "volumes"), 0);
	cr_assert_eq(storage_mkdir(s, "volumes/v"), 0);
	n_truth = 0;
}

static void teardown(void)
{
	changed_close(c);
	storage_close(s);
	tmpdir_remove(&dir);
}

TestSuite(changed, .init = setup, .fini = teardown, .timeout = 60);

static void open_it(bool keep)
{
	changed_close(c);
	cr_assert_eq(changed_open(s, "v", SIZE, true, keep, &c, &e), 0, "%s", e.text);
}

static void begin(uint64_t number)
{
	changed_begin(c, number, number * 1000000000U, false, SIZE);
	memset(&truth[n_truth], 0, sizeof(truth[0]));
	truth[n_truth++].number = number;
}

static void mark(uint64_t block, uint64_t n)
{
	changed_mark(c, block * BLOCK_SIZE, n * BLOCK_SIZE);
	for (uint64_t i = block; n_truth && i < block + n && i < BLOCKS; i++)
		truth[n_truth - 1].blocks[i] = true;
}

/* since(number) against what was marked; exact: nothing more. False: it is not known. */
static bool check_since(uint64_t number, bool exact)
{
	struct bitmap b;
	void *mem = calloc(1, bitmap_bytes(BLOCKS));

	bitmap_init(&b, BLOCKS, mem);
	int rc = changed_since(c, number, &b);
	cr_assert(rc == 0 || rc == -ERR_NOENT || rc == -ERR_IO, "%d", rc); /* IO: the machine has stopped */
	static uint8_t is[BLOCKS];
	memset(is, 0, sizeof(is));
	for (unsigned k = 0; k < n_truth; k++)
		for (unsigned i = 0; truth[k].number >= number && i < BLOCKS; i++)
			is[i] |= truth[k].blocks[i];
	for (unsigned i = 0; rc == 0 && i < BLOCKS; i++) {
		bool found = bitmap_test(&b, i);

		if (found != (is[i] != 0) && (exact || is[i])) /* an assertion for each block would take long */
			cr_assert(false, "block %u since %lu: %d", i, (unsigned long)number, (int)found);
	}
	if (rc == 0)
		bitmap_check(&b);
	free(mem);
	return rc == 0;
}

static uint32_t known(uint64_t *numbers)
{
	return changed_numbers(c, numbers, EPOCHS);
}

Test(changed, exact_over_epochs_flushes_and_restarts)
{
	uint64_t numbers[EPOCHS];

	open_it(true);
	mark(5, 5); /* before there is an epoch */
	cr_assert_not(check_since(3, true));
	cr_assert_eq(changed_flush(c, NULL), 0);
	for (unsigned round = 0; round < 6; round++) {
		begin(3 + 2 * round);
		mark(round * 300, 200);
		mark(BLOCKS - 1 - round, 1 + round);
		mark(508U * 8U * round - (round ? 3 : 0), 7); /* over two pages */
		if (round % 2)
			cr_assert_eq(changed_flush(c, NULL), 0);
		mark(round * 1000 + 7, 1);
		for (unsigned k = 0; k <= round; k++)
			cr_assert(check_since(3 + 2 * k, true));
		cr_assert_not(check_since(4, true));
		if (round == 3 || round == 5) { /* a clean end */
			cr_assert_eq(changed_flush(c, NULL), 0);
			open_it(true);
			cr_assert_eq(known(numbers), round + 1);
		}
	}
	/* A number that is not above the newest: the stream begins anew. */
	begin(13);
	n_truth = 0;
	begin(12);
	mark(17, 1);
	cr_assert_eq(known(numbers), 1);
	cr_assert(check_since(12, true) && !check_since(3, true));
	cr_assert_eq(changed_flush(c, NULL), 0);
	open_it(true);
	cr_assert_eq(known(numbers), 1);
	cr_assert(check_since(12, true));
	/* The disk was changed by others: nothing is known, and no file is left. */
	cr_assert_eq(changed_drop(c), 0);
	cr_assert_not(check_since(12, true));
	cr_assert_not(tmpdir_has(&dir, "volumes/v/changed-12"));
	n_truth = 0;
	begin(20);
	mark(3, 3);
	cr_assert_eq(changed_flush(c, NULL), 0);
	cr_assert(tmpdir_has(&dir, "volumes/v/changed-20"));
	open_it(false);
	cr_assert_not(tmpdir_has(&dir, "volumes/v/changed-20"));
	cr_assert_eq(known(numbers), 0);
}

Test(changed, what_grew_begins_anew)
{
	uint64_t numbers[EPOCHS];
	struct bitmap b;

	open_it(true);
	begin(1);
	mark(0, 10);
	cr_assert_eq(changed_flush(c, NULL), 0);
	changed_begin(c, 2, 2, false, 2 * SIZE);
	cr_assert_eq(known(numbers), 1);
	cr_assert_eq(numbers[0], 2);
	changed_mark(c, SIZE + 4096, 4096);
	uint64_t blocks = units_of(2 * SIZE, BLOCK_SHIFT);
	void *mem = calloc(1, bitmap_bytes(blocks));
	bitmap_init(&b, blocks, mem);
	cr_assert_eq(changed_since(c, 2, &b), 0);
	cr_assert_leq(b.count, 2);
	cr_assert_eq(changed_since(c, 1, &b), -ERR_NOENT);
	cr_assert_eq(changed_flush(c, NULL), 0);
	cr_assert_not(tmpdir_has(&dir, "volumes/v/changed-1"));
	free(mem);
	open_it(true); /* with the old size: not this volume's */
	cr_assert_eq(known(numbers), 0);
}

Test(changed, retention_merges_into_the_older)
{
	uint64_t numbers[EPOCHS];
	struct settings keep;

	settings_default(&keep);
	keep.keep_last = 3;
	open_it(true);
	for (uint64_t i = 1; i <= 10; i++) {
		changed_begin(c, i, i, i == 2, SIZE);
		memset(&truth[n_truth], 0, sizeof(truth[0]));
		truth[n_truth++].number = i;
		mark(i * 100, 50);
		mark(i * 1900, 3);
		cr_assert_eq(changed_flush(c, &keep), 0);
		for (uint32_t k = known(numbers); k-- > 0;)
			cr_assert(check_since(numbers[k], true));
	}
	uint32_t n = known(numbers);
	cr_assert(n >= 4 && n <= 5, "%u", n);
	cr_assert_eq(numbers[0], 2); /* pinned */
	cr_assert_eq(numbers[n - 1], 10);
	open_it(true);
	cr_assert_eq(known(numbers), n);
	for (uint32_t k = 0; k < n; k++)
		cr_assert(check_since(numbers[k], true));
	cr_assert_not(tmpdir_has(&dir, "volumes/v/changed-1"));
}

/* A page that does not check out counts as changed; a header takes it and all older ones along. */
Test(changed, what_does_not_check_out_is_never_called_unchanged)
{
	uint64_t numbers[EPOCHS];
	uint8_t byte;

	open_it(true);
	for (uint64_t i = 1; i <= 3; i++) {
		begin(i);
		mark(i * 100, 50);
	}
	cr_assert_eq(changed_flush(c, NULL), 0);
	for (off_t at = 512; at < 1024; at += 37) {
		cr_assert_eq(tmpdir_read(&dir, "volumes/v/changed-2", &byte, 1, at), 1);
		byte ^= 0x40;
		tmpdir_write(&dir, "volumes/v/changed-2", &byte, 1, at);
		open_it(true);
		for (uint64_t i = 1; i <= 3; i++)
			cr_assert(check_since(i, i == 3));
		struct bitmap b;
		void *mem = calloc(1, bitmap_bytes(BLOCKS));
		bitmap_init(&b, BLOCKS, mem);
		cr_assert_eq(changed_since(c, 2, &b), 0);
		cr_assert_eq(b.count, 508 * 8); /* the whole page */
		free(mem);
		byte ^= 0x40;
		tmpdir_write(&dir, "volumes/v/changed-2", &byte, 1, at);
	}
	cr_assert_eq(tmpdir_read(&dir, "volumes/v/changed-2", &byte, 1, 17), 1);
	byte ^= 1;
	tmpdir_write(&dir, "volumes/v/changed-2", &byte, 1, 17);
	open_it(true);
	cr_assert_eq(known(numbers), 1);
	cr_assert(check_since(3, true));
	cr_assert(!tmpdir_has(&dir, "volumes/v/changed-2") && !tmpdir_has(&dir, "volumes/v/changed-1"));
}

/* A store that fails: what can't be kept is dropped, and if even that fails no intent bit may go. */
Test(changed, a_flush_that_fails_drops_all)
{
	struct faults f = {.match = "changed-"};
	struct storage *mine = s;
	uint64_t numbers[EPOCHS];

	s = faultstore_open(dir.path, &f);
	cr_assert_not_null(s);
	open_it(true);
	begin(1);
	mark(1, 1);
	atomic_store(&f.write, -ERR_NOSPC);
	cr_assert_eq(changed_flush(c, NULL), 0); /* the files are gone: nothing is claimed */
	cr_assert_eq(known(numbers), 0);
	atomic_store(&f.write, 0);
	cr_assert_not(tmpdir_has(&dir, "volumes/v/changed-1"));
	begin(2);
	mark(1, 1);
	cr_assert_eq(changed_flush(c, NULL), 0);
	n_truth = 0;
	cr_assert(check_since(2, false));
	changed_close(c);
	c = NULL;
	storage_close(s);
	s = mine;
}

static const struct storage_ops *real_ops;
static bool no_open, no_unlink, no_sync_dir;

static int failing_open(struct storage *st, const char *path, unsigned flags, struct disk **ret)
{
	return no_open ? -ERR_IO : real_ops->open(st, path, flags, ret);
}

static int failing_unlink(struct storage *st, const char *path)
{
	return no_unlink ? -ERR_IO : real_ops->unlink(st, path);
}

static int unlink_one(struct storage *st, const char *path)
{
	int rc = failing_unlink(st, path);

	no_unlink = true;
	return rc;
}

static int failing_sync_dir(struct storage *st, const char *path)
{
	return no_sync_dir ? -ERR_IO : real_ops->sync_dir(st, path);
}

/* Files that can't be removed are found by the next start: as long as they are there no intent bit may go, and what
 * was marked meanwhile is never missed. */
Test(changed, files_that_cant_be_removed_hold_the_intent_bits)
{
	struct storage_ops ops = *s->ops;
	bool *const unremovable[] = {&no_unlink, &no_sync_dir};
	uint64_t numbers[EPOCHS];

	real_ops = s->ops;
	ops.open = failing_open;
	ops.unlink = failing_unlink;
	ops.sync_dir = failing_sync_dir;
	s->ops = &ops;
	for (uint64_t i = 0; i < 4; i++) {
		n_truth = 0;
		open_it(true);
		begin(1 + 10 * i);
		mark(1, 1);
		cr_assert_eq(changed_flush(c, NULL), 0);
		mark(9000, 1);
		no_open = *unremovable[i % 2] = true;
		if (i < 2) {
			cr_assert_lt(changed_flush(c, NULL), 0);
		} else {
			open_it(true); /* they can't be read, nor removed then */
			cr_assert_eq(known(numbers), 0);
		}
		no_open = false;
		cr_assert_lt(changed_flush(c, NULL), 0);
		cr_assert_lt(changed_flush(c, NULL), 0);
		*unremovable[i % 2] = false;
		cr_assert_eq(changed_flush(c, NULL), 0);
		open_it(true);
		cr_assert_eq(known(numbers), 0);
	}
	changed_close(c);
	c = NULL;
	s->ops = real_ops;
}

/* A file that does not check out takes the older ones along, also when that is cut off. */
Test(changed, an_older_file_never_stays_alone)
{
	struct storage_ops ops = *s->ops;
	uint64_t numbers[EPOCHS];
	uint8_t byte = 0;

	open_it(true);
	for (uint64_t i = 1; i <= 3; i++) {
		begin(i);
		mark(i * 100, 50);
	}
	cr_assert_eq(changed_flush(c, NULL), 0);
	tmpdir_write(&dir, "volumes/v/changed-2", &byte, 1, 17);
	byte = 0x40;
	tmpdir_write(&dir, "volumes/v/changed-2", &byte, 1, 18);
	real_ops = s->ops;
	ops.unlink = unlink_one;
	s->ops = &ops;
	open_it(true); /* that is all that it could remove, and it can't say so */
	s->ops = real_ops;
	open_it(true);
	for (uint32_t k = known(numbers); k-- > 0;)
		cr_assert(check_since(numbers[k], true));
	cr_assert_not(check_since(1, false));
}

/* ---- crashes ---- */

static int crash_list(struct storage *st, const char *path, int (*fn)(void *arg, const char *name), void *arg)
{
	struct crashstore *cs = crashstore(st);
	size_t n = strlen(path);
	int rc = 0;

	if (cs_stop(cs))
		return -ERR_IO;
	for (unsigned i = 0; rc == 0 && i < cs->names.n; i++)
		if (strncmp(cs->names.list[i].path, path, n) == 0 && cs->names.list[i].path[n] == '/')
			rc = fn(arg, cs->names.list[i].path + n + 1);
	return rc;
}

static bool intents[REGIONS];

static void mark_with_intent(struct crashstore *cs, uint64_t block, uint64_t n)
{
	for (uint64_t i = block; i < block + n && i < BLOCKS; i++)
		intents[i / REGION_BLOCKS] = true;
	mark(block, n);
	(void)cs;
}

/* Runs until the machine stops; what a start then finds has to hold all that was marked. */
static unsigned life(struct crashstore *cs, uint64_t *next)
{
	struct settings keep;
	unsigned answers = 0;
	uint64_t numbers[EPOCHS];

	settings_default(&keep);
	keep.keep_last = 4;
	if (changed_open(&cs->storage, "v", SIZE, true, true, &c, &e) < 0)
		return 0;
	for (unsigned r = 0; r < REGIONS; r++)
		if (intents[r])
			changed_mark(c, (uint64_t)r * INTENT_SIZE, INTENT_SIZE);
	for (uint32_t k = cs->stopped ? 0 : known(numbers); k-- > 0;)
		answers += check_since(numbers[k], false);
	for (unsigned step = 0; !cs->stopped && step < 200; step++) {
		bool before[REGIONS];

		switch (cs_random(cs, 9)) {
		case 0:
			if (n_truth < EPOCHS)
				begin((*next)++);
			break;
		case 1:
		case 2:
		case 3:
			mark_with_intent(cs, cs_random(cs, BLOCKS), 1 + cs_random(cs, 300));
			break;
		case 4:
		case 5:
		case 6:
			memcpy(before, intents, sizeof(before));
			if (changed_flush(c, &keep) == 0)
				for (unsigned r = 0; r < REGIONS; r++)
					intents[r] = intents[r] && !(before[r] && cs_random(cs, 2));
			break;
		default:
			if (known(numbers))
				(void)check_since(numbers[cs_random(cs, known(numbers))], false);
		}
	}
	changed_close(c);
	c = NULL;
	return answers;
}

static void crashes(uint64_t seed, bool power_cut)
{
	struct crashstore *cs = malloc(sizeof(*cs));
	struct storage_ops ops;
	uint64_t next = 1;
	unsigned answers = 0;

	cs_init(cs, seed);
	ops = *cs->storage.ops;
	ops.list = crash_list;
	cs->storage.ops = &ops;
	n_truth = 0;
	memset(intents, 0, sizeof(intents));
	for (unsigned i = 0; i < 12; i++) {
		cs->ops_left = (long)cs_random(cs, 150);
		answers += life(cs, &next);
		if (power_cut)
			cs_power_cut(cs);
		else
			cs_killed(cs);
	}
	cr_assert_gt(answers, 0, "seed %lu: nothing was ever known after a crash", (unsigned long)seed);
	cs_free(cs);
	free(cs);
}

Test(changed, a_crash_loses_no_mark)
{
	for (uint64_t seed = 1; seed <= 30; seed++)
		crashes(seed * 7919, seed % 2);
}
