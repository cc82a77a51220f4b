/* A disk over a base image, alone: power cuts and kills at any operation, its record, writers at once. Below undo
 * overlays it is tested with the volume's model (test_volume.c, test_cow.c), over real images in
 * tests/e2e/test_56_qcow.py. */
#include <criterion/criterion.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/os/cleanup.h"
#include "image/based.h"
#include "image/meta.h"
#include "tests/lib/faultstore.h"
#include "tests/unit/image/crashstore.h"
#include "tests/unit/image/tmpdir.h"

#define BASE_SIZE (40U * BLOCK_SIZE + 1536)
#define SIZE (50U * BLOCK_SIZE + 512)
#define SECTORS (SIZE / SECTOR_SIZE)
#define VERSIONS 256

static struct tmpdir dir;
static struct err e;
static uint8_t base_bytes[BASE_SIZE];
static struct source *base;

static void begin(void)
{
	tmpdir_make(&dir);
	memset(&e, 0, sizeof(e));
	for (size_t i = 0; i < sizeof(base_bytes); i++)
		base_bytes[i] = (uint8_t)(1 + i / SECTOR_SIZE % 251);
	tmpdir_write(&dir, "base", base_bytes, sizeof(base_bytes), 0);
	/* Blocks 8 to 15 are a hole. */
	memset(base_bytes + 8 * BLOCK_SIZE, 0, 8 * BLOCK_SIZE);
	int fd = open(tmpdir_at(&dir, "base"), O_WRONLY | O_CLOEXEC);
	cr_assert_eq(fallocate(fd, 0x03 /* KEEP_SIZE, PUNCH_HOLE */, 8 * BLOCK_SIZE, 8 * BLOCK_SIZE), 0);
	cr_assert_eq(close(fd), 0);
	cr_assert_eq(source_open(tmpdir_at(&dir, "base"), "raw", NULL, &base, &e), 0, "%s", e.text);
}

static void end(void)
{
	source_close(base);
	tmpdir_remove(&dir);
}

TestSuite(based, .init = begin, .fini = end);

static void make(struct storage *s, bool durable)
{
	struct based_args a = {.source = base, .path = base->files[0].path};

	cr_assert_eq(based_create(s, "vol", SIZE, &a, durable, &e), 0, "%s", e.text);
	cr_assert_eq(storage_sync_dir(s, "volumes/vol"), 0);
}

static struct disk *open_it(struct storage *s, bool durable)
{
	struct disk *d;

	cr_assert_eq(based_open(s, "vol", SIZE, durable, &d, &e), 0, "%s", e.text);
	return d;
}

/* ---- power cuts and kills ---- */

/* What each sector may hold after a power cut: what it held at the last sync, and all that was written since. */
struct crash {
	struct crashstore cs;
	struct disk *d;
	uint8_t now[SIZE];
	uint8_t versions[SECTORS][VERSIONS][SECTOR_SIZE];
	unsigned n[SECTORS];
	uint64_t seed;
};

static void remember(struct crash *c, uint64_t off, uint64_t len)
{
	for (uint64_t s = off / SECTOR_SIZE; s <= (off + len - 1) / SECTOR_SIZE; s++) {
		cr_assert_lt(c->n[s], VERSIONS);
		memcpy(c->versions[s][c->n[s]++], c->now + s * SECTOR_SIZE, SECTOR_SIZE);
	}
}

static void flushed(struct crash *c)
{
	memset(c->n, 0, sizeof(c->n));
	remember(c, 0, SIZE);
}

/* Sector-aligned, as a guest's requests are, or not; some end inside blocks, some cover many. Where zeroes are data
 * (kinds 3, 4) a sector that a power cut took looks like one that was written. */
static int step(struct crash *c)
{
	static uint8_t data[SIZE];
	uint64_t off = cs_random(&c->cs, SECTORS) * SECTOR_SIZE, len;
	int kind = (int)cs_random(&c->cs, 8), rc;
	bool zeroes = false;

	if (kind == 0) {
		rc = disk_sync(c->d);
		if (rc == 0)
			flushed(c);
		return rc;
	}
	len = (1 + cs_random(&c->cs, kind == 1 ? 100 : 20)) * SECTOR_SIZE;
	if (c->cs.whole_sectors && cs_random(&c->cs, 2)) {
		off += cs_random(&c->cs, SECTOR_SIZE);
		len -= cs_random(&c->cs, SECTOR_SIZE);
	}
	len = min_u64(len, SIZE - off);
	for (uint64_t i = 0; i < len; i++) {
		if (i == 0 || (off + i) % SECTOR_SIZE == 0)
			zeroes = kind <= 2 || (kind <= 4 && cs_random(&c->cs, 2));
		data[i] = zeroes ? 0 : (uint8_t)cs_random(&c->cs, 256);
	}
	memcpy(c->now + off, data, len);
	/* Done or not: these bytes may be there now. */
	remember(c, off, len);
	return kind <= 2 ? disk_zero(c->d, off, len, kind == 1) : disk_write(c->d, off, data, len);
}

static void verify(struct crash *c, bool exact, uint64_t ops)
{
	static uint8_t got[SIZE];

	memset(got, 0xa7, sizeof(got));
	cr_assert_eq(disk_read(c->d, 0, got, SIZE), 0);
	for (unsigned s = 0; s < SECTORS; s++) {
		const uint8_t *p = got + (size_t)s * SECTOR_SIZE;
		bool found = false;

		/* A kill loses nothing of what was written; but the last step was cut off. */
		for (unsigned i = exact && c->n[s] > 2 ? c->n[s] - 2 : 0; i < c->n[s] && !found; i++)
			found = memcmp(p, c->versions[s][i], SECTOR_SIZE) == 0;
		cr_assert(found,
			  "seed %" PRIu64 ", stopped after %" PRIu64 ": sector %u holds what was never written there",
			  c->seed, ops, s);
	}
	memcpy(c->now, got, SIZE);
}

enum ends {
	KILLS = 1,
	CUTS = 2,
};

static void run(bool power, unsigned ends, bool unaligned, uint64_t seed)
{
	struct crash *c = calloc(1, sizeof(*c));

	cr_assert_not_null(c);
	c->seed = seed;
	cs_init(&c->cs, seed);
	c->cs.whole_sectors = unaligned;
	make(&c->cs.storage, power);
	c->d = open_it(&c->cs.storage, power);
	memcpy(c->now, base_bytes, BASE_SIZE);
	flushed(c);
	for (unsigned round = 0; round < 6; round++) {
		uint64_t ops = cs_random(&c->cs, 100);
		bool cut = ends == CUTS || (ends == (KILLS | CUTS) && cs_random(&c->cs, 2));
		int rc = 0;

		c->cs.ops_left = (long)ops;
		for (unsigned i = 0; rc == 0 && i < 40; i++)
			rc = step(c);
		cr_assert(rc == 0 || c->cs.stopped, "seed %" PRIu64 ": error %d without a reason", seed, rc);
		c->cs.stopped = true;
		disk_close(c->d);
		if (cut)
			cs_power_cut(&c->cs);
		else
			cs_killed(&c->cs);
		/* Opening it can be cut off too. */
		c->cs.ops_left = (long)cs_random(&c->cs, 8);
		if (based_open(&c->cs.storage, "vol", SIZE, power, &c->d, &e) == 0) {
			c->cs.stopped = true;
			disk_close(c->d);
		}
		if (cut)
			cs_power_cut(&c->cs);
		else
			cs_killed(&c->cs);
		c->d = open_it(&c->cs.storage, power);
		verify(c, !cut, ops);
		/* What a power cut left is on the medium. */
		if (cut)
			flushed(c);
		else
			remember(c, 0, SIZE);
	}
	disk_close(c->d);
	cs_free(&c->cs);
	free(c);
}

Test(based, power_cuts_at_any_operation)
{
	for (uint64_t seed = 1; seed <= 150; seed++)
		run(true, CUTS, seed % 3 == 0, seed);
}

Test(based, kills_at_any_operation)
{
	for (uint64_t seed = 1; seed <= 100; seed++) {
		run(false, KILLS, seed % 3 == 0, seed);
		run(true, KILLS, seed % 3 == 0, seed);
	}
}

Test(based, power_cuts_after_kills)
{
	for (uint64_t seed = 1; seed <= 150; seed++)
		run(true, KILLS | CUTS, seed % 3 == 0, seed);
}

/* ---- the words of blocks that no sync has covered ---- */

static uint32_t word_of(struct storage *s, uint64_t block)
{
	uint8_t word[4];
	struct disk *d;

	cr_assert_eq(storage_open(s, "volumes/vol/own.map", STORAGE_RDONLY, &d), 0);
	cr_assert_eq(disk_read(d, block * 4, word, 4), 0);
	disk_close(d);
	return get_u32(word);
}

static void sync_file(struct crashstore *cs, const char *path)
{
	struct disk *d;

	cr_assert_eq(storage_open(&cs->storage, path, 0, &d), 0);
	cr_assert_eq(disk_sync(d), 0);
	disk_close(d);
}

/* At the end the medium has all of the map and nothing of what own.data got since the flush. */
Test(based, a_first_write_waits_for_no_sync_and_a_flush_settles_it)
{
	struct crashstore *cs = calloc(1, sizeof(*cs));
	uint8_t buf[BLOCK_SIZE], got[BLOCK_SIZE];
	struct disk *d;
	unsigned syncs;

	cr_assert_not_null(cs);
	cs_init(cs, 1);
	make(&cs->storage, true);
	d = open_it(&cs->storage, true);
	syncs = cs->syncs;
	memset(buf, 0x5a, sizeof(buf));
	memset(buf + 1024, 0, 512);
	cr_assert_eq(disk_write(d, 3 * BLOCK_SIZE, buf, BLOCK_SIZE), 0);
	cr_assert_eq(word_of(&cs->storage, 3), 0x104);
	cr_assert_eq(disk_write(d, 4 * BLOCK_SIZE + 512, buf, 512), 0);
	cr_assert_eq(word_of(&cs->storage, 4), 0x100);
	/* Its last byte that is not zero goes: the sector's bit comes. */
	memset(buf, 0, sizeof(buf));
	cr_assert_eq(disk_write(d, 4 * BLOCK_SIZE + 512, buf, 511), 0);
	cr_assert_eq(word_of(&cs->storage, 4), 0x100);
	cr_assert_eq(disk_write(d, 4 * BLOCK_SIZE + 1023, buf, 1), 0);
	cr_assert_eq(word_of(&cs->storage, 4), 0x102);
	cr_assert_eq(disk_zero(d, 4 * BLOCK_SIZE + 3584, 512, true), 0);
	cr_assert_eq(word_of(&cs->storage, 4), 0x182);
	/* A discarded block is settled from the start. */
	cr_assert_eq(disk_zero(d, 5 * BLOCK_SIZE, BLOCK_SIZE, true), 0);
	cr_assert_eq(word_of(&cs->storage, 5), 1);
	cr_assert_eq(cs->syncs, syncs, "a write waited for a sync");
	cr_assert_eq(disk_sync(d), 0);
	cr_assert_eq(cs->syncs, syncs + 2);
	cr_assert_eq(word_of(&cs->storage, 3), 1);
	cr_assert_eq(word_of(&cs->storage, 4), 1);
	cr_assert_eq(disk_write(d, 3 * BLOCK_SIZE, buf, BLOCK_SIZE), 0);
	cr_assert_eq(word_of(&cs->storage, 3), 1);
	memset(buf, 0x77, sizeof(buf));
	cr_assert_eq(disk_write(d, 7 * BLOCK_SIZE, buf, BLOCK_SIZE), 0);
	disk_close(d);
	/* The map got out and the data did not. */
	sync_file(cs, "volumes/vol/own.map");
	cr_assert_eq(storage_open(&cs->storage, "volumes/vol/own.data", 0, &d), 0);
	cs_forget_ops(cs_disk(d)->inode);
	disk_close(d);
	cs_power_cut(cs);
	cr_assert_eq(word_of(&cs->storage, 7), 0x100);
	d = open_it(&cs->storage, true);
	cr_assert_eq(word_of(&cs->storage, 7), 1);
	memset(got, 0xa7, sizeof(got));
	cr_assert_eq(disk_read(d, 7 * BLOCK_SIZE, got, BLOCK_SIZE), 0);
	cr_assert_arr_eq(got, base_bytes + 7 * BLOCK_SIZE, BLOCK_SIZE);
	cr_assert_eq(disk_read(d, 3 * BLOCK_SIZE, got, BLOCK_SIZE), 0);
	memset(buf, 0x5a, sizeof(buf));
	memset(buf + 1024, 0, 512);
	cr_assert_arr_eq(got, buf, BLOCK_SIZE);
	disk_close(d);
	cs_free(cs);
	free(cs);
}

/* What was left of a write is punched, and the process killed before that is durable: the next one must not take the
 * hole for one of the medium. */
Test(based, a_leftover_whose_punch_was_cut_off)
{
	struct crashstore *cs = calloc(1, sizeof(*cs));
	uint8_t buf[BLOCK_SIZE], got[BLOCK_SIZE];
	struct disk *d;

	cr_assert_not_null(cs);
	cs_init(cs, 2); /* the word is cut off before its first byte */
	make(&cs->storage, true);
	for (unsigned i = 0; i < 2; i++) {
		d = open_it(&cs->storage, true);
		memset(buf, 0x31 + (int)i, sizeof(buf));
		/* Killed between data and word; then between the punch and its sync. */
		cs->ops_left = 1;
		cr_assert_lt(disk_write(d, 7 * BLOCK_SIZE, buf, BLOCK_SIZE), 0);
		disk_close(d);
		cs_killed(cs);
		cr_assert_eq(word_of(&cs->storage, 7), 0);
		if (i == 0)
			sync_file(cs, "volumes/vol/own.data");
	}
	d = open_it(&cs->storage, true);
	cr_assert_eq(disk_write(d, 7 * BLOCK_SIZE, buf, BLOCK_SIZE), 0);
	disk_close(d);
	sync_file(cs, "volumes/vol/own.map");
	cr_assert_eq(storage_open(&cs->storage, "volumes/vol/own.data", 0, &d), 0);
	cs_forget_ops(cs_disk(d)->inode);
	disk_close(d);
	cs_power_cut(cs);
	d = open_it(&cs->storage, true);
	cr_assert_eq(disk_read(d, 7 * BLOCK_SIZE, got, BLOCK_SIZE), 0);
	cr_assert_arr_eq(got, base_bytes + 7 * BLOCK_SIZE, BLOCK_SIZE);
	disk_close(d);
	cs_free(cs);
	free(cs);
}

/* The same where its sync fails: that hole is one of the cache alone for as long as this process has it. */
Test(based, a_leftover_whose_punch_could_not_be_synced)
{
	struct crashstore *cs = calloc(1, sizeof(*cs));
	uint8_t buf[BLOCK_SIZE], got[BLOCK_SIZE];
	struct disk *d;

	cr_assert_not_null(cs);
	cs_init(cs, 2);
	make(&cs->storage, true);
	d = open_it(&cs->storage, true);
	memset(buf, 0x31, sizeof(buf));
	cs->ops_left = 1; /* between data and word */
	cr_assert_lt(disk_write(d, 7 * BLOCK_SIZE, buf, BLOCK_SIZE), 0);
	disk_close(d);
	cs_killed(cs);
	cr_assert_eq(word_of(&cs->storage, 7), 0);
	sync_file(cs, "volumes/vol/own.data");
	d = open_it(&cs->storage, true);
	cs->sync_fails_in = 1;
	cr_assert_lt(disk_write(d, 7 * BLOCK_SIZE, buf, SECTOR_SIZE), 0);
	cs->sync_fails_in = 0;
	(void)disk_write(d, 7 * BLOCK_SIZE, buf, SECTOR_SIZE);
	disk_close(d);
	sync_file(cs, "volumes/vol/own.map");
	cr_assert_eq(storage_open(&cs->storage, "volumes/vol/own.data", 0, &d), 0);
	cs_forget_ops(cs_disk(d)->inode);
	disk_close(d);
	cs_power_cut(cs);
	d = open_it(&cs->storage, true);
	cr_assert_eq(disk_read(d, 7 * BLOCK_SIZE, got, BLOCK_SIZE), 0);
	cr_assert_arr_eq(got + SECTOR_SIZE, base_bytes + 7 * BLOCK_SIZE + SECTOR_SIZE, BLOCK_SIZE - SECTOR_SIZE);
	disk_close(d);
	cs_free(cs);
	free(cs);
}

/* Words that could be written in part only leave their blocks the base's, after the next start too: what reads as that,
 * and what was discarded where the base has a hole, was flushed as that. */
Test(based, words_that_could_not_be_written_are_none)
{
	struct faults f = {.match = "own.map"};
	static uint8_t buf[4 * BLOCK_SIZE], got[4 * BLOCK_SIZE];

	for (int power = 0; power < 2; power++) {
		struct storage *s = faultstore_open(tmpdir_at(&dir, power ? "p" : "k"), &f);
		cr_assert_not_null(s);
		cr_assert_eq(storage_mkdir(s, "volumes"), 0);
		cr_assert_eq(storage_mkdir(s, "volumes/vol"), 0);
		make(s, power);
		struct disk *d = open_it(s, power);
		memset(buf, 0x31, sizeof(buf));
		cr_assert_eq(disk_write(d, 20 * BLOCK_SIZE, buf, BLOCK_SIZE), 0); /* the map is that long */
		atomic_store(&f.write_once, -ERR_NOSPC);
		cr_assert_lt(disk_write(d, 0, buf, sizeof(buf)), 0);
		atomic_store(&f.write_once, -ERR_NOSPC);
		cr_assert_lt(disk_write(d, 8 * BLOCK_SIZE, buf, sizeof(buf)), 0);
		cr_assert_eq(disk_zero(d, 8 * BLOCK_SIZE, sizeof(buf), true), 0);
		cr_assert_eq(disk_sync(d), 0);
		for (int i = 0; i < 2; i++) {
			for (unsigned block = 0; block <= 8; block += 8) {
				cr_assert_eq(disk_read(d, block * BLOCK_SIZE, got, sizeof(got)), 0);
				cr_assert_arr_eq(got, base_bytes + block * BLOCK_SIZE, sizeof(got), "%d, %u", i, block);
			}
			disk_close(d);
			d = open_it(s, power);
		}
		/* Where they can't be taken back, nothing is promised any more. */
		atomic_store(&f.write, -ERR_IO);
		cr_assert_lt(disk_write(d, 0, buf, sizeof(buf)), 0);
		atomic_store(&f.write, 0);
		cr_assert_eq(disk_sync(d), -ERR_IO);
		disk_close(d);
		storage_close(s);
	}
}

/* ---- what is copied, and what is not ---- */

static uint64_t own_blocks(struct storage *s)
{
	uint64_t size = 0, n = 0;
	uint8_t word[4];
	struct disk *d;

	cr_assert_eq(storage_open(s, "volumes/vol/own.map", STORAGE_RDONLY, &d), 0);
	cr_assert_eq(disk_get_size(d, &size), 0);
	for (uint64_t at = 0; at < size; at += 4) {
		cr_assert_eq(disk_read(d, at, word, 4), 0);
		n += word[0] | word[1] | word[2] | word[3] ? 1 : 0;
	}
	disk_close(d);
	return n;
}

static struct storage *folder(void)
{
	struct storage *s;

	cr_assert_eq(storage_posix_open(dir.path, &s), 0);
	cr_assert_eq(storage_mkdir(s, "volumes"), 0);
	cr_assert_eq(storage_mkdir(s, "volumes/vol"), 0);
	return s;
}

Test(based, a_hole_of_the_base_stays_one_and_data_is_zeroed_by_its_map)
{
	struct storage *s = folder();
	struct extent x;
	uint64_t n = 0;

	make(s, true);
	struct disk *d = open_it(s, true);
	/* Whole holes of the base, and what lies past its end: nothing is recorded. */
	cr_assert_eq(disk_zero(d, 9 * BLOCK_SIZE, 6 * BLOCK_SIZE, true), 0);
	cr_assert_eq(disk_zero(d, 45 * BLOCK_SIZE, 5 * BLOCK_SIZE, true), 0);
	cr_assert_eq(own_blocks(s), 0);
	/* Over data: recorded, and without data of its own. */
	cr_assert_eq(disk_zero(d, 20 * BLOCK_SIZE, 4 * BLOCK_SIZE, true), 0);
	cr_assert_eq(own_blocks(s), 4);
	cr_assert_eq(tmpdir_allocated(&dir, "volumes/vol/own.data"), 0);
	cr_assert_eq(disk_extent(d, 20 * BLOCK_SIZE, SIZE, &x), 0);
	cr_assert(!x.data && x.off == 20 * BLOCK_SIZE && x.len == 4 * BLOCK_SIZE);
	/* One byte takes its block along, no more. */
	cr_assert_eq(disk_write(d, 30 * BLOCK_SIZE + 5, "!", 1), 0);
	cr_assert_eq(own_blocks(s), 5);
	cr_assert_eq(based_own_allocated(s, "vol", &n), 0);
	cr_assert_lt(n, 32768);
	cr_assert_eq(disk_write(d, SIZE - 1, "xx", 2), -ERR_RANGE);
	disk_close(d);
	storage_close(s);
}

/* ---- growing ---- */

static const struct storage_ops *plain_storage;
static const struct disk_ops *plain_disk;
static struct disk_ops noting;
static uint64_t forgotten_off, forgotten_len;

static void forget_noted(struct disk *d, uint64_t off, uint64_t len)
{
	(void)d;
	forgotten_off = off;
	forgotten_len = len;
}

static int open_noting(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	int rc = plain_storage->open(s, path, flags, ret);

	if (rc == 0 && strcmp(path, "volumes/vol/own.data") == 0) {
		plain_disk = (*ret)->ops;
		noting = *plain_disk;
		noting.forget = forget_noted;
		(*ret)->ops = &noting;
	}
	return rc;
}

/* What a verify compares is read from the medium. */
Test(based, forgets_what_the_system_remembers_of_its_blocks)
{
	struct crashstore *cs = calloc(1, sizeof(*cs));
	struct storage_ops ops = cs_ops;
	struct disk *d;

	cr_assert_not_null(cs);
	cs_init(cs, 1);
	make(&cs->storage, true);
	plain_storage = &cs_ops;
	ops.open = open_noting;
	cs->storage.ops = &ops;
	d = open_it(&cs->storage, true);
	disk_forget(d, 3 * BLOCK_SIZE, 2 * BLOCK_SIZE);
	cr_assert_eq(forgotten_off, 3 * BLOCK_SIZE);
	cr_assert_eq(forgotten_len, 2 * BLOCK_SIZE);
	disk_close(d);
	cs_free(cs);
	free(cs);
}

Test(based, growing_shows_zeroes)
{
	struct storage *s = folder();
	uint8_t buf[3 * BLOCK_SIZE];
	uint64_t size;

	make(s, true);
	struct disk *d = open_it(s, true);
	cr_assert_eq(disk_write(d, SIZE - 512, base_bytes, 512), 0);
	cr_assert_eq(disk_set_size(d, SIZE + 4 * BLOCK_SIZE), 0);
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, SIZE + 4 * BLOCK_SIZE);
	memset(buf, 0xa7, sizeof(buf));
	cr_assert_eq(disk_read(d, SIZE - 512, buf, sizeof(buf)), 0);
	cr_assert_arr_eq(buf, base_bytes, 512);
	for (size_t i = 512; i < sizeof(buf); i++)
		cr_assert_eq(buf[i], 0);
	cr_assert_eq(disk_write(d, SIZE + 3 * BLOCK_SIZE, base_bytes, BLOCK_SIZE), 0);
	/* Not below the base. */
	cr_assert_eq(disk_set_size(d, BASE_SIZE - 512), -ERR_RANGE);
	disk_close(d);
	storage_close(s);
}

/* ---- the record ---- */

static void refused(struct storage *s, int code, const char *words)
{
	struct disk *d;

	cr_assert_eq(based_open(s, "vol", SIZE, true, &d, &e), -code, "%s", e.text);
	cr_assert_not_null(strstr(e.text, words), "\"%s\" is not in \"%s\"", words, e.text);
	cr_assert_eq(strncmp(e.text, "open volume vol: ", 17), 0, "%s", e.text);
}

Test(based, records_that_do_not_check_out)
{
	struct storage *s = folder();
	_Alignas(8) uint8_t payload[200] = {0};
	struct disk *d;
	char path[SOURCE_PATH_MAX];
	const char *format;

	cr_assert_eq(based_open(s, "vol", SIZE, true, &d, &e), -ERR_NOENT);
	make(s, true);
	cr_assert_eq(based_look(s, "vol", path, &format, &e), 0);
	cr_assert_str_eq(path, base->files[0].path);
	cr_assert_str_eq(format, "raw");
	for (size_t len = 0; len <= sizeof(payload); len += 10) {
		memset(payload, (int)len, sizeof(payload));
		cr_assert_eq(meta_save(s, "volumes/vol", "volumes/vol/base", "BASE", 2, payload, len, true, &e), 0,
			     "%s", e.text);
		refused(s, ERR_CORRUPT, "hold no record of a base image");
	}
	cr_assert_eq(meta_save(s, "volumes/vol", "volumes/vol/base", "BASE", 3, payload, 1, true, &e), 0);
	cr_assert_eq(based_open(s, "vol", SIZE, true, &d, &e), -ERR_VERSION);
	storage_close(s);
}

/* Of before there were unsettled words: an older program must not open it any more. */
Test(based, a_record_of_version_1_becomes_one_of_2)
{
	struct storage *s = folder();
	_cleanup_free_ void *payload = NULL;
	uint32_t version = 0;
	size_t len;

	make(s, true);
	cr_assert_eq(meta_load(s, "volumes/vol/base", "BASE", 2, &version, &payload, &len, &e), 0);
	cr_assert_eq(unlink(tmpdir_at(&dir, "volumes/vol/base.a")), 0);
	cr_assert_eq(unlink(tmpdir_at(&dir, "volumes/vol/base.b")), 0);
	cr_assert_eq(meta_save(s, "volumes/vol", "volumes/vol/base", "BASE", 1, payload, len, true, &e), 0);
	disk_close(open_it(s, true));
	free(TAKE_PTR(payload));
	cr_assert_eq(meta_load(s, "volumes/vol/base", "BASE", 2, &version, &payload, &len, &e), 0);
	cr_assert_eq(version, 2);
	disk_close(open_it(s, true));
	storage_close(s);
}

Test(based, a_base_that_changed_is_refused)
{
	struct storage *s = folder();
	uint8_t byte = 0xff;

	make(s, true);
	source_close(base);
	base = NULL;
	tmpdir_write(&dir, "base", &byte, 1, 70000); /* in the middle: what it has is another time */
	refused(s, ERR_STATE, "another time of change");
	refused(s, ERR_STATE, "touch -d @");
	tmpdir_write(&dir, "base", &byte, 1, 10);
	refused(s, ERR_STATE, "its content differs");
	tmpdir_write(&dir, "base", &byte, 1, BASE_SIZE);
	refused(s, ERR_STATE, "another size");
	cr_assert_eq(unlink(tmpdir_at(&dir, "base")), 0);
	refused(s, ERR_STATE, "there is no file");
	storage_close(s);
}

/* ---- many at once ---- */

#define WRITERS 4U

struct writer {
	struct disk *d;
	unsigned me;
	int rc;
};

/* Every fourth block, from two requests each, read back between others' first writes. */
static void *write_some(void *arg)
{
	struct writer *w = arg;
	uint8_t half[BLOCK_SIZE / 2], got[BLOCK_SIZE];

	for (uint64_t b = w->me; b < 40 && w->rc == 0; b += WRITERS) {
		for (unsigned i = 0; i < 2 && w->rc == 0; i++) {
			memset(half, (int)(b * 2 + i + 1), sizeof(half));
			w->rc = disk_write(w->d, b * BLOCK_SIZE + i * sizeof(half), half, sizeof(half));
		}
		/* Others are in the middle of their first writes. */
		if (w->rc == 0 && w->me == 0)
			w->rc = disk_sync(w->d);
		if (w->rc == 0)
			w->rc = disk_read(w->d, b * BLOCK_SIZE, got, sizeof(got));
		for (size_t i = 0; i < sizeof(got) && w->rc == 0; i++)
			w->rc = got[i] == (uint8_t)(b * 2 + i / sizeof(half) + 1) ? 0 : -ERR_CORRUPT;
	}
	return NULL;
}

Test(based, writers_at_once)
{
	struct storage *s = folder();
	struct writer w[WRITERS];
	pthread_t t[WRITERS];
	uint8_t *got = malloc(SIZE);

	make(s, true);
	struct disk *d = open_it(s, true);
	for (unsigned i = 0; i < WRITERS; i++) {
		w[i] = (struct writer){d, i, 0};
		cr_assert_eq(pthread_create(&t[i], NULL, write_some, &w[i]), 0);
	}
	for (unsigned i = 0; i < WRITERS; i++) {
		cr_assert_eq(pthread_join(t[i], NULL), 0);
		cr_assert_eq(w[i].rc, 0);
	}
	cr_assert_eq(disk_sync(d), 0);
	disk_close(d);
	d = open_it(s, true);
	cr_assert_eq(disk_read(d, 0, got, SIZE), 0);
	for (size_t i = 0; i < SIZE; i++) {
		uint8_t want = i < 40 * BLOCK_SIZE
				   ? (uint8_t)(i / BLOCK_SIZE * 2 + i % BLOCK_SIZE / (BLOCK_SIZE / 2) + 1)
			       : i < BASE_SIZE ? base_bytes[i]
					       : 0;

		cr_assert_eq(got[i], want, "byte %zu", i);
	}
	free(got);
	disk_close(d);
	storage_close(s);
}
