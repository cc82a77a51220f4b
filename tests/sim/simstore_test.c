/* Shows that each fault of the simulated storage really happens, and that nothing else does: without faults it is a
 * disk, and what is synced stays. Prints what it checks; the first check that fails ends it. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/err.h"
#include "core/os/clock.h"
#include "core/range.h"
#include "tests/sim/simalloc.h"
#include "tests/sim/simstore.h"

#define EXPECT(cond)                                                                                                   \
	do {                                                                                                           \
		if (!(cond)) {                                                                                         \
			printf("%s:%d: %s: expected %s\n", __FILE__, __LINE__, __func__, #cond);                       \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

#define FLAT_BYTES (64U << 10)
#define SEEDS 400U

static struct disk *file(struct simstore *ss, const char *path)
{
	struct disk *d = NULL;

	EXPECT(storage_open(simstore_storage(ss), path, STORAGE_CREATE, &d) == 0);
	return d;
}

/* A file of `len` bytes of `fill` that is durable, name and all. */
static struct disk *durable_file(struct simstore *ss, const char *path, uint8_t fill, size_t len)
{
	struct disk *d = file(ss, path);
	uint8_t *buf = simalloc(len);

	memset(buf, fill, len);
	EXPECT(disk_write(d, 0, buf, len) == 0);
	EXPECT(disk_sync(d) == 0);
	EXPECT(storage_sync_dir(simstore_storage(ss), "") == 0);
	simfree(buf);
	return d;
}

static bool there(struct simstore *ss, const char *path)
{
	uint64_t size;

	return simstore_peek_size(ss, path, false, &size) == 0;
}

static uint8_t byte_at(struct simstore *ss, const char *path, uint64_t off)
{
	uint8_t b = 0xee;

	EXPECT(simstore_peek(ss, path, false, off, &b, 1) == 0);
	return b;
}

static uint64_t random_below(uint64_t *seed, uint64_t below)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed % below;
}

/* --- without faults it is a disk
 * ------------------------------------------------------------------------------------*/

struct flat {
	uint8_t bytes[FLAT_BYTES];
	uint64_t size;
};

static void flat_compare(struct disk *d, const struct flat *f)
{
	static uint8_t got[FLAT_BYTES + 100];
	uint64_t size = 0;

	EXPECT(disk_get_size(d, &size) == 0 && size == f->size);
	memset(got, 0xa5, sizeof(got));
	EXPECT(disk_read(d, 0, got, sizeof(got)) == 0);
	EXPECT(memcmp(got, f->bytes, f->size) == 0);
	for (size_t i = f->size; i < sizeof(got); i++)
		EXPECT(got[i] == 0);
}

/* What extents call a hole reads as zeroes, they cover everything, and together they are what is allocated. */
static void extents_compare(struct disk *d, const struct flat *f)
{
	uint64_t off = 0, pages = 0, allocated = 0;

	while (off < f->size) {
		struct extent x = {0};

		EXPECT(disk_extent(d, off, f->size, &x) == 0);
		EXPECT(x.off == off && x.len > 0 && off + x.len <= f->size);
		for (uint64_t i = off; !x.data && i < off + x.len; i++)
			EXPECT(f->bytes[i] == 0);
		pages += x.data ? units_of(x.len, BLOCK_SHIFT) : 0;
		off += x.len;
	}
	EXPECT(disk_allocated(d, &allocated) == 0 && allocated == pages * BLOCK_SIZE);
}

static void flat_step(struct disk *d, struct flat *f, uint64_t *seed)
{
	uint8_t buf[FLAT_BYTES];
	uint64_t what = random_below(seed, 10), off = random_below(seed, FLAT_BYTES);
	uint64_t len = random_below(seed, min_u64(random_below(seed, 2) ? 20000 : 600, FLAT_BYTES - off) + 1);

	if (what < 5) {
		memset(buf, (int)random_below(seed, 256), len);
		EXPECT(disk_write(d, off, buf, len) == 0);
		memcpy(f->bytes + off, buf, len);
		f->size = len ? max_u64(f->size, off + len) : f->size;
	} else if (what < 8) {
		EXPECT(disk_zero(d, off, len, what == 5) == 0);
		memset(f->bytes + off, 0, len);
	} else if (what == 8) {
		EXPECT(disk_set_size(d, off) == 0);
		if (off < f->size)
			memset(f->bytes + off, 0, f->size - off);
		f->size = off;
	} else {
		EXPECT(disk_sync(d) == 0);
	}
}

static void test_is_a_disk(void)
{
	for (uint64_t n = 1; n <= 60; n++) {
		struct simstore *ss = simstore_new(n);
		struct disk *d = file(ss, "f");
		struct flat *f = simalloc(sizeof(*f));
		uint64_t seed = n;

		for (unsigned i = 0; i < 100; i++) {
			flat_step(d, f, &seed);
			flat_compare(d, f);
			extents_compare(d, f);
			simstore_check(ss);
		}
		EXPECT(disk_sync(d) == 0 && storage_sync_dir(simstore_storage(ss), "") == 0 && simstore_clean(ss));
		disk_close(d);
		simstore_power_cut(ss, SIMSTORE_KEEP_NONE);
		simstore_check(ss);
		d = file(ss, "f");
		flat_compare(d, f);
		extents_compare(d, f);
		disk_close(d);
		simstore_free(ss);
		simfree(f);
	}
}

static void test_sparse_and_large(void)
{
	struct simstore *ss = simstore_new(1);
	struct disk *d = file(ss, "f");
	struct extent x = {0};
	uint64_t tib = UINT64_C(1) << 40, n = 0;

	EXPECT(disk_set_size(d, tib) == 0);
	EXPECT(disk_write(d, tib / 2, "x", 1) == 0);
	EXPECT(disk_extent(d, 0, tib, &x) == 0 && !x.data && x.len == tib / 2);
	EXPECT(disk_extent(d, tib / 2, tib, &x) == 0 && x.data && x.len == BLOCK_SIZE);
	EXPECT(disk_extent(d, tib / 2 + BLOCK_SIZE, tib, &x) == 0 && !x.data && x.off + x.len == tib);
	EXPECT(disk_allocated(d, &n) == 0 && n == BLOCK_SIZE);
	EXPECT(disk_zero(d, 0, tib, true) == 0);
	EXPECT(disk_allocated(d, &n) == 0 && n == 0);
	disk_close(d);
	simstore_free(ss);
}

/* --- power cut
 * ------------------------------------------------------------------------------------------------------*/

static void test_power_cut_keeps_none_or_all(void)
{
	for (int all = 0; all <= 1; all++) {
		struct simstore *ss = simstore_new(7);
		struct disk *d = durable_file(ss, "f", 1, 8192);
		uint64_t size = 0;

		EXPECT(disk_write(d, 4096, "\2\2", 2) == 0);
		EXPECT(disk_write(d, 10000, "\3", 1) == 0);
		EXPECT(disk_zero(d, 0, 512, true) == 0);
		EXPECT(!simstore_clean(ss));
		disk_close(d);
		simstore_power_cut(ss, all ? SIMSTORE_KEEP_ALL : SIMSTORE_KEEP_NONE);
		EXPECT(byte_at(ss, "f", 4096) == (all ? 2 : 1) && byte_at(ss, "f", 4098) == 1);
		EXPECT(byte_at(ss, "f", 0) == (all ? 0 : 1));
		EXPECT(simstore_peek_size(ss, "f", false, &size) == 0 && size == (all ? 10001 : 8192));
		EXPECT(simstore_clean(ss));
		simstore_check(ss);
		simstore_free(ss);
	}
}

/* Three versions of 16 sectors; after the cut each sector is of one of them, whole, and every mixture is met. */
static void test_power_cut_tears_and_reorders(void)
{
	unsigned whole[3] = {0}, torn = 0, middle_over_last = 0;

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct disk *d = durable_file(ss, "f", 0, 8192);
		uint8_t buf[8192], got[8192];
		unsigned sectors[3] = {0};

		for (uint8_t v = 1; v <= 2; v++) {
			memset(buf, v, sizeof(buf));
			EXPECT(disk_write(d, 0, buf, sizeof(buf)) == 0);
		}
		disk_close(d);
		simstore_power_cut(ss, SIMSTORE_KEEP_RANDOM);
		EXPECT(simstore_peek(ss, "f", false, 0, got, sizeof(got)) == 0);
		for (unsigned s = 0; s < 16; s++) {
			EXPECT(got[s * 512] <= 2);
			for (unsigned i = 1; i < 512; i++)
				EXPECT(got[s * 512 + i] == got[s * 512]);
			sectors[got[s * 512]]++;
		}
		for (unsigned v = 0; v < 3; v++)
			whole[v] += sectors[v] == 16;
		torn += sectors[0] < 16 && sectors[1] < 16 && sectors[2] < 16;
		middle_over_last += sectors[1] == 16;
		simstore_free(ss);
	}
	EXPECT(whole[0] > 10 && whole[1] > 10 && whole[2] > 10 && torn > 10 && middle_over_last > 10);
}

/* Of two files, and of two writes to one file, the later can be there without the earlier. */
static void test_power_cut_keeps_the_later_alone(void)
{
	unsigned met[2][4] = {{0}};

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct disk *a = durable_file(ss, "a", 0, 8192), *b = durable_file(ss, "b", 0, 8192);

		EXPECT(disk_write(a, 0, "\1", 1) == 0);
		EXPECT(disk_write(b, 0, "\1", 1) == 0);
		EXPECT(disk_write(b, 4096, "\1", 1) == 0);
		disk_close(a);
		disk_close(b);
		simstore_power_cut(ss, SIMSTORE_KEEP_RANDOM);
		met[0][byte_at(ss, "a", 0) + 2 * byte_at(ss, "b", 0)]++;
		met[1][byte_at(ss, "b", 0) + 2 * byte_at(ss, "b", 4096)]++;
		simstore_free(ss);
	}
	for (unsigned i = 0; i < 8; i++)
		EXPECT(met[i / 4][i % 4] > 10);
}

static void test_large_zero_is_cut_between_sectors(void)
{
	unsigned cut = 0;

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct disk *d = durable_file(ss, "f", 1, 8192);
		uint8_t got[8192];
		unsigned zeroed = 0;

		EXPECT(disk_zero(d, 256, 7000, seed % 2) == 0);
		disk_close(d);
		simstore_power_cut(ss, SIMSTORE_KEEP_RANDOM);
		EXPECT(simstore_peek(ss, "f", false, 0, got, sizeof(got)) == 0);
		for (unsigned i = 0; i < sizeof(got); i++) {
			bool edge = i % 512 == 0 || i == 256 || i == 7256;

			EXPECT(got[i] == 1 || (i >= 256 && i < 7256));
			EXPECT(i == 0 || edge || got[i] == got[i - 1]);
			zeroed += got[i] == 0;
		}
		cut += zeroed > 0 && zeroed < 7000;
		simstore_free(ss);
	}
	EXPECT(cut > 10);
}

/* --- names
 * ----------------------------------------------------------------------------------------------------------*/

static void test_names_need_sync_dir(void)
{
	struct simstore *ss = simstore_new(3);
	struct storage *s = simstore_storage(ss);
	struct disk *a = file(ss, "a"), *b = durable_file(ss, "b", 1, 10), *c;

	/* A synced file is not there without its name, and the sync of a folder is not the one of its own name. */
	c = file(ss, "c");
	EXPECT(disk_write(c, 0, "c", 1) == 0 && disk_sync(c) == 0);
	EXPECT(storage_mkdir(s, "dir") == 0 && storage_mkdir(s, "dir") == 0);
	disk_close(a);
	a = file(ss, "dir/a");
	EXPECT(storage_sync_dir(s, "dir") == 0);
	disk_close(a);
	disk_close(b);
	disk_close(c);
	EXPECT(there(ss, "a") && there(ss, "b") && there(ss, "c") && there(ss, "dir/a"));
	simstore_power_cut(ss, SIMSTORE_KEEP_NONE);
	EXPECT(there(ss, "a") && there(ss, "b")); /* b's sync_dir was after a's creation */
	EXPECT(!there(ss, "c") && !there(ss, "dir/a"));
	EXPECT(storage_mkdir(s, "dir") == 0);
	EXPECT(!there(ss, "dir/a"));
	/* An unlink without sync_dir is undone, with its content. */
	EXPECT(storage_unlink(s, "b") == 0 && !there(ss, "b"));
	EXPECT(storage_unlink(s, "b") == -ERR_NOENT);
	simstore_power_cut(ss, SIMSTORE_KEEP_NONE);
	EXPECT(byte_at(ss, "b", 9) == 1);
	simstore_check(ss);
	simstore_free(ss);
}

/* new is written, synced and renamed over old: after a cut it is one of the two, whole; never none, never both names.
 */
static void test_rename_is_atomic(void)
{
	unsigned was_new = 0;

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct storage *s = simstore_storage(ss);
		struct disk *d = durable_file(ss, "old", 1, 600), *other;

		disk_close(d);
		d = durable_file(ss, "new", 2, 600);
		disk_close(d);
		other = file(ss, "other");
		disk_close(other);
		EXPECT(storage_rename(s, "new", "old") == 0);
		EXPECT(!there(ss, "new") && byte_at(ss, "old", 599) == 2);
		simstore_power_cut(ss, SIMSTORE_KEEP_RANDOM);
		EXPECT(byte_at(ss, "old", 0) == (there(ss, "new") ? 1 : 2));
		was_new += byte_at(ss, "old", 0) == 2;
		simstore_check(ss);
		simstore_free(ss);
	}
	EXPECT(was_new > 10 && was_new < SEEDS - 10);
}

/* Changes of unrelated names come in any order; of the same file, the later not without the earlier. */
static void test_names_keep_their_order_where_they_meet(void)
{
	unsigned b_without_a = 0, a_without_b = 0;

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct storage *s = simstore_storage(ss);
		bool a, b;

		disk_close(file(ss, "a"));
		disk_close(file(ss, "b1"));
		EXPECT(storage_rename(s, "b1", "b2") == 0);
		simstore_power_cut(ss, SIMSTORE_KEEP_RANDOM);
		a = there(ss, "a");
		b = there(ss, "b1") || there(ss, "b2");
		EXPECT(!(there(ss, "b1") && there(ss, "b2")));
		b_without_a += b && !a;
		a_without_b += a && !b;
		simstore_free(ss);
	}
	EXPECT(b_without_a > 10 && a_without_b > 10);
}

static int count_name(void *arg, const char *name)
{
	++*(unsigned *)arg;
	return strcmp(name, "stop") == 0 ? 5 : 0;
}

static void test_names_and_folders(void)
{
	struct simstore *ss = simstore_new(3);
	struct storage *s = simstore_storage(ss);
	struct disk *d = NULL, *gone;
	unsigned n = 0;
	uint8_t buf[3] = {0};

	EXPECT(storage_open(s, "nowhere/f", STORAGE_CREATE, &d) == -ERR_NOENT);
	EXPECT(storage_open(s, "f", 0, &d) == -ERR_NOENT);
	EXPECT(storage_open(s, "../f", STORAGE_CREATE, &d) == -ERR_RANGE);
	EXPECT(storage_open(s, "/f", STORAGE_CREATE, &d) == -ERR_RANGE);
	EXPECT(storage_mkdir(s, "d") == 0 && storage_mkdir(s, "d/e") == 0);
	EXPECT(storage_open(s, "d", 0, &d) == -ERR_IO);
	EXPECT(storage_rmdir(s, "d") == -ERR_IO);
	gone = file(ss, "d/e/f");
	EXPECT(storage_open(s, "d/e/f", STORAGE_CREATE | STORAGE_EXCL, &d) == -ERR_EXIST);
	EXPECT(storage_mkdir(s, "d/e/f") == -ERR_EXIST);
	EXPECT(storage_list(s, "d", count_name, &n) == 0 && n == 1);
	EXPECT(storage_unlink(s, "d/e/f") == 0);
	/* An open file outlives its name. */
	EXPECT(disk_write(gone, 0, "abc", 3) == 0 && disk_read(gone, 0, buf, 3) == 0 && memcmp(buf, "abc", 3) == 0);
	disk_close(gone);
	EXPECT(storage_rename(s, "d/e", "e") == 0 && storage_rmdir(s, "d") == 0);
	disk_close(file(ss, "e/stop"));
	EXPECT(storage_list(s, "e", count_name, &n) == 5);
	EXPECT(storage_open(s, "e/stop", STORAGE_RDONLY, &d) == 0 && disk_write(d, 0, "x", 1) == -ERR_IO);
	disk_close(d);
	simstore_check(ss);
	simstore_free(ss);
}

/* --- kill, failed syncs
 * ---------------------------------------------------------------------------------------------*/

static void test_kill_keeps_all_and_makes_nothing_durable(void)
{
	struct simstore *ss = simstore_new(3);
	struct disk *d = durable_file(ss, "f", 1, 512);

	EXPECT(disk_write(d, 0, "\2", 1) == 0);
	simstore_stop(ss);
	EXPECT(simstore_stopped(ss) && disk_write(d, 1, "\2", 1) == -ERR_IO && disk_sync(d) == -ERR_IO);
	EXPECT(storage_unlink(simstore_storage(ss), "f") == -ERR_IO);
	disk_close(d);
	simstore_restart(ss);
	EXPECT(byte_at(ss, "f", 0) == 2 && byte_at(ss, "f", 1) == 1 && !simstore_clean(ss));
	simstore_power_cut(ss, SIMSTORE_KEEP_NONE);
	EXPECT(byte_at(ss, "f", 0) == 1);
	simstore_free(ss);
}

static void test_failed_sync_loses_what_it_was_for(void)
{
	unsigned reached = 0;

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct disk *d = durable_file(ss, "f", 1, 1024), *other = file(ss, "f"), *later;
		const struct simstore_rule rule = {SIMSTORE_BIT(SIMSTORE_SYNC), NULL, ERR_IO, 0, 1, 1};
		uint8_t b = 0;

		EXPECT(disk_write(d, 0, "\2", 1) == 0);
		simstore_rule_add(ss, &rule);
		EXPECT(disk_sync(d) == -ERR_IO);
		later = file(ss, "f");
		/* Each handle that was open is told, and never trusted again; a new one knows nothing. */
		EXPECT(disk_sync(d) == -ERR_IO && disk_sync(other) == -ERR_IO && disk_sync(other) == -ERR_IO);
		EXPECT(disk_sync(later) == 0);
		EXPECT(disk_read(d, 0, &b, 1) == 0 && b == 2);
		EXPECT(disk_write(d, 512, "\3", 1) == 0 && disk_sync(later) == 0);
		disk_close(d);
		disk_close(other);
		disk_close(later);
		if (seed % 3 == 0) {
			simstore_power_cut(ss, SIMSTORE_KEEP_ALL);
		} else if (seed % 3 == 1) {
			simstore_restart(ss);
			EXPECT(byte_at(ss, "f", 0) == 2);
			simstore_evict(ss);
		} else {
			EXPECT(storage_open(simstore_storage(ss), "f", STORAGE_FRESH, &d) == 0);
			disk_close(d);
		}
		EXPECT(byte_at(ss, "f", 512) == 3);
		reached += byte_at(ss, "f", 0) == 2;
		simstore_check(ss);
		simstore_free(ss);
	}
	EXPECT(reached > 10 && reached < SEEDS - 10);
}

/* --- rules, room, rot
 * -----------------------------------------------------------------------------------------------*/

static void test_rules(void)
{
	struct simstore *ss = simstore_new(3);
	struct storage *s = simstore_storage(ss);
	struct disk *a = durable_file(ss, "a.map", 1, 512), *b = file(ss, "b.data"), *x = NULL;
	uint8_t buf[512];
	unsigned failed = 0, r;

	r = simstore_rule_add(ss, &(struct simstore_rule){SIMSTORE_BIT(SIMSTORE_READ), "*.map", ERR_IO, 0, 2, 2});
	EXPECT(disk_read(b, 0, buf, 1) == 0 && disk_read(a, 0, buf, 1) == 0);
	EXPECT(disk_read(a, 0, buf, 1) == -ERR_IO && disk_read(b, 0, buf, 1) == 0);
	EXPECT(strcmp(simstore_fault_text(ss), "read a.map 0+1") == 0);
	EXPECT(disk_read(a, 0, buf, 1) == -ERR_IO && disk_read(a, 0, buf, 1) == 0);
	EXPECT(simstore_rule_hits(ss, r) == 2);
	simstore_rules_clear(ss);

	/* A file goes by its new name. */
	EXPECT(storage_rename(s, "b.data", "b.map") == 0);
	simstore_rule_add(ss, &(struct simstore_rule){SIMSTORE_CHANGES, "b.map", ERR_NOSPC, 0, 1, 0});
	EXPECT(disk_write(b, 0, "x", 1) == -ERR_NOSPC && disk_sync(b) == -ERR_NOSPC);
	EXPECT(disk_zero(b, 0, 1, true) == -ERR_NOSPC && disk_set_size(b, 0) == -ERR_NOSPC);
	EXPECT(disk_read(b, 0, buf, 1) == 0 && disk_write(a, 0, "x", 1) == 0);
	EXPECT(storage_unlink(s, "b.map") == -ERR_NOSPC && storage_rename(s, "a.map", "b.map") == -ERR_NOSPC);
	EXPECT(there(ss, "a.map") && there(ss, "b.map"));
	simstore_rules_clear(ss);

	simstore_rule_add(ss, &(struct simstore_rule){SIMSTORE_ALL, NULL, ERR_IO, 10, 0, 0});
	for (unsigned i = 0; i < 1000; i++)
		failed += disk_read(a, 0, buf, 512) < 0;
	EXPECT(failed > 50 && failed < 200);
	simstore_rules_clear(ss);

	simstore_rule_add(ss, &(struct simstore_rule){SIMSTORE_ALL, NULL, ERR_IO, 0, 1, 0});
	EXPECT(storage_open(s, "new", STORAGE_CREATE, &x) == -ERR_IO && storage_open(s, "a.map", 0, &x) == -ERR_IO);
	EXPECT(storage_mkdir(s, "d") == -ERR_IO && storage_rmdir(s, "d") == -ERR_IO);
	EXPECT(storage_sync_dir(s, "") == -ERR_IO && storage_list(s, "", count_name, &failed) == -ERR_IO);
	simstore_rules_clear(ss);
	EXPECT(!there(ss, "new"));
	disk_close(a);
	disk_close(b);
	simstore_free(ss);
}

/* A write that fails may have written its first sectors. */
static void test_failed_write_leaves_a_part(void)
{
	unsigned none = 0, part = 0, all = 0;

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct disk *d = durable_file(ss, "f", 0, 2048);
		uint8_t buf[2048];
		unsigned n = 0;

		memset(buf, 1, sizeof(buf));
		simstore_rule_add(ss, &(struct simstore_rule){SIMSTORE_CHANGES, NULL, ERR_IO, 0, 1, 1});
		EXPECT(disk_write(d, 0, buf, sizeof(buf)) == -ERR_IO);
		EXPECT(disk_read(d, 0, buf, sizeof(buf)) == 0);
		while (n < sizeof(buf) && buf[n])
			n++;
		EXPECT(n % 512 == 0);
		for (unsigned i = n; i < sizeof(buf); i++)
			EXPECT(!buf[i]);
		none += n == 0;
		part += n > 0 && n < sizeof(buf);
		all += n == sizeof(buf);
		disk_close(d);
		simstore_free(ss);
	}
	EXPECT(none > 10 && part > 10 && none + part + all == SEEDS);
}

static void test_room(void)
{
	struct simstore *ss = simstore_new(3);
	struct disk *d = durable_file(ss, "f", 1, 2 * BLOCK_SIZE);
	uint8_t buf[3 * BLOCK_SIZE] = {0};
	uint64_t left = 0, total = 0, n = 0;

	simstore_set_space(ss, 4 * BLOCK_SIZE);
	EXPECT(storage_free_bytes(simstore_storage(ss), &left, &total) == 0);
	EXPECT(left == 2 * BLOCK_SIZE && total == 4 * BLOCK_SIZE);
	EXPECT(disk_write(d, 0, buf, 2 * BLOCK_SIZE) == 0); /* over what is there */
	EXPECT(disk_write(d, 2 * BLOCK_SIZE, buf, 3 * BLOCK_SIZE) == -ERR_NOSPC);
	EXPECT(disk_allocated(d, &n) == 0 && n == 4 * BLOCK_SIZE);
	EXPECT(disk_set_size(d, 8 * BLOCK_SIZE) == 0);
	EXPECT(disk_zero(d, 4 * BLOCK_SIZE, BLOCK_SIZE, false) == 0); /* stays a hole */
	EXPECT(disk_zero(d, 0, BLOCK_SIZE, true) == 0);
	EXPECT(disk_write(d, 7 * BLOCK_SIZE, buf, BLOCK_SIZE) == 0);
	EXPECT(disk_write(d, 6 * BLOCK_SIZE, buf, 1) == -ERR_NOSPC);
	/* An unlinked file's room is there once it is closed and its name durably gone. */
	EXPECT(storage_unlink(simstore_storage(ss), "f") == 0);
	disk_close(d);
	EXPECT(storage_sync_dir(simstore_storage(ss), "") == 0);
	EXPECT(storage_free_bytes(simstore_storage(ss), &left, &total) == 0 && left == total);
	simstore_free(ss);
}

static void test_rot(void)
{
	struct simstore *ss = simstore_new(3);
	struct disk *d = durable_file(ss, "f", 1, 1024);

	EXPECT(simstore_corrupt(ss, "f", 512, 2) == 0 && simstore_corrupt(ss, "g", 0, 1) == -ERR_NOENT);
	disk_close(d);
	EXPECT(byte_at(ss, "f", 511) == 1 && byte_at(ss, "f", 512) == 0xfe && byte_at(ss, "f", 514) == 1);
	simstore_power_cut(ss, SIMSTORE_KEEP_NONE);
	EXPECT(byte_at(ss, "f", 513) == 0xfe);
	simstore_free(ss);
}

/* --- crash points
 * ---------------------------------------------------------------------------------------------------*/

/* A record replaced the usual way, twice. Returns how many calls said that they were done. */
static unsigned script(struct simstore *ss)
{
	struct storage *s = simstore_storage(ss);
	unsigned done = 0;

	for (uint8_t v = 1; v <= 2; v++) {
		struct disk *d = NULL;
		uint8_t buf[1500];

		memset(buf, v, sizeof(buf));
		if (storage_open(s, "tmp", STORAGE_CREATE | STORAGE_TRUNC, &d) == 0) {
			done++;
			done += disk_write(d, 0, buf, sizeof(buf)) == 0;
			done += disk_sync(d) == 0;
			disk_close(d);
		}
		done += storage_rename(s, "tmp", "f") == 0;
		done += storage_sync_dir(s, "") == 0;
	}
	return done;
}

static void script_check(struct simstore *ss, unsigned done)
{
	uint8_t buf[1500];
	uint64_t size = 0;
	unsigned v;

	if (simstore_peek_size(ss, "f", false, &size) < 0) {
		EXPECT(done < 5);
		return;
	}
	EXPECT(size == sizeof(buf) && simstore_peek(ss, "f", false, 0, buf, size) == 0);
	v = buf[0];
	EXPECT((v == 1 && done >= 3 && done < 10) || (v == 2 && done >= 8));
	for (unsigned i = 0; i < sizeof(buf); i++)
		EXPECT(buf[i] == v);
}

static void test_every_crash_point(void)
{
	unsigned points = 0;

	for (uint64_t nth = 1; nth <= 11; nth++) {
		for (unsigned how = SIMSTORE_NOT_DONE; how <= SIMSTORE_DONE; how++) {
			for (unsigned keep = 0; keep < 60; keep++) {
				struct simstore *ss = simstore_new(keep);
				unsigned done;

				simstore_stop_at(ss, nth, how);
				done = script(ss);
				EXPECT(done == min_u64(nth - 1, 10) && simstore_stopped(ss) == (nth <= 10));
				EXPECT((*simstore_fault_text(ss) != 0) == (nth <= 10));
				if (keep % 4 == 3)
					simstore_restart(ss);
				else
					simstore_power_cut(ss, keep % 4);
				simstore_check(ss);
				if (keep % 4 != 3 || nth > 10)
					script_check(ss, done);
				EXPECT(simstore_stop_pending(ss) == (nth > 10));
				simstore_stop_at(ss, 0, SIMSTORE_DONE);
				EXPECT(script(ss) == 10);
				script_check(ss, 10);
				simstore_free(ss);
				points++;
			}
		}
	}
	printf("  %u crash points\n", points);
}

static void test_stop_done_half_and_not(void)
{
	unsigned halves[3] = {0};

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		for (unsigned how = SIMSTORE_NOT_DONE; how <= SIMSTORE_DONE; how++) {
			struct simstore *ss = simstore_new(seed);
			struct disk *d = durable_file(ss, "f", 0, 2048);
			uint8_t buf[2048];
			unsigned n = 0;

			memset(buf, 1, sizeof(buf));
			simstore_stop_at(ss, 1, how);
			EXPECT(disk_write(d, 0, buf, sizeof(buf)) == -ERR_IO);
			disk_close(d);
			simstore_restart(ss);
			EXPECT(simstore_peek(ss, "f", false, 0, buf, sizeof(buf)) == 0);
			for (unsigned i = 0; i < sizeof(buf); i += 512)
				n += buf[i];
			EXPECT(how != SIMSTORE_NOT_DONE || n == 0);
			EXPECT(how != SIMSTORE_DONE || n == 4);
			if (how == SIMSTORE_HALF_DONE)
				halves[n == 0 ? 0 : n == 4 ? 2 : 1]++;
			simstore_free(ss);
		}
	}
	EXPECT(halves[0] > 10 && halves[1] > 10);
}

/* A sync at which the power goes: none, some or all of it is durable. */
static void test_stop_in_a_sync(void)
{
	unsigned met[4] = {0};

	for (uint64_t seed = 0; seed < SEEDS; seed++) {
		struct simstore *ss = simstore_new(seed);
		struct disk *d = durable_file(ss, "f", 0, 8192);

		EXPECT(disk_write(d, 0, "\1", 1) == 0 && disk_write(d, 4096, "\1", 1) == 0);
		simstore_stop_at(ss, 1, SIMSTORE_HALF_DONE);
		EXPECT(disk_sync(d) == -ERR_IO);
		disk_close(d);
		simstore_power_cut(ss, SIMSTORE_KEEP_NONE);
		met[byte_at(ss, "f", 0) + 2 * byte_at(ss, "f", 4096)]++;
		simstore_free(ss);
	}
	for (unsigned i = 0; i < 4; i++)
		EXPECT(met[i] > 10);
}

/* --- the same again
 * -------------------------------------------------------------------------------------------------*/

static uint64_t trace(uint64_t seed)
{
	struct simstore *ss = simstore_new(seed);
	struct disk *d = durable_file(ss, "f", 0, FLAT_BYTES);
	struct flat *f = simalloc(sizeof(*f));
	uint64_t sum = 0, ops = 5;

	simstore_rule_add(ss, &(struct simstore_rule){SIMSTORE_CHANGES, NULL, ERR_IO, 20, 0, 0});
	for (unsigned i = 0; i < 300; i++) {
		uint8_t buf[3000];

		memset(buf, (int)i, sizeof(buf));
		sum = sum * 31 + (uint64_t)(disk_write(d, random_below(&ops, FLAT_BYTES - 3000), buf, 3000) < 0);
		if (i % 10 == 0)
			sum = sum * 31 + (uint64_t)(disk_sync(d) < 0);
	}
	disk_close(d);
	simstore_power_cut(ss, SIMSTORE_KEEP_RANDOM);
	EXPECT(simstore_peek(ss, "f", false, 0, f->bytes, FLAT_BYTES) == 0);
	for (unsigned i = 0; i < FLAT_BYTES; i += 7)
		sum = sum * 31 + f->bytes[i];
	simstore_free(ss);
	simfree(f);
	return sum;
}

static void test_a_seed_repeats(void)
{
	for (uint64_t seed = 0; seed < 20; seed++) {
		EXPECT(trace(seed) == trace(seed));
		EXPECT(trace(seed) != trace(seed + 1));
	}
}

/* What a seed of 1,000 operations does: 20,000 calls. */
static void calls_20000(void)
{
	uint64_t began = clock_mono_ns(), seed = 9;
	struct simstore *ss = simstore_new(3);
	struct disk *d[4];
	uint8_t buf[8192] = {1};

	for (unsigned i = 0; i < 4; i++) {
		char path[] = {(char)('a' + i), 0};

		d[i] = durable_file(ss, path, 1, 1U << 20);
	}
	for (unsigned i = 0; i < 20000; i++) {
		struct disk *at = d[random_below(&seed, 4)];
		uint64_t off = random_below(&seed, 250) * BLOCK_SIZE;

		if (i % 10 < 5)
			EXPECT(disk_read(at, off, buf, BLOCK_SIZE) == 0);
		else if (i % 10 < 9)
			EXPECT(disk_write(at, off, buf, BLOCK_SIZE) == 0);
		else
			EXPECT(disk_sync(at) == 0);
	}
	for (unsigned i = 0; i < 4; i++)
		disk_close(d[i]);
	simstore_power_cut(ss, SIMSTORE_KEEP_RANDOM);
	simstore_free(ss);
	printf("  20000 calls in %" PRIu64 " us\n", (clock_mono_ns() - began) / 1000);
}

static void test_speed(void)
{
	calls_20000(); /* the heap grows */
	calls_20000();
}

#define TEST(name)                                                                                                     \
	{                                                                                                              \
#name, test_##name                                                                                     \
	}

int main(void)
{
	static const struct {
		const char *name;
		void (*fn)(void);
	} tests[] = {
	    TEST(is_a_disk),
	    TEST(sparse_and_large),
	    TEST(power_cut_keeps_none_or_all),
	    TEST(power_cut_tears_and_reorders),
	    TEST(power_cut_keeps_the_later_alone),
	    TEST(large_zero_is_cut_between_sectors),
	    TEST(names_need_sync_dir),
	    TEST(rename_is_atomic),
	    TEST(names_keep_their_order_where_they_meet),
	    TEST(names_and_folders),
	    TEST(kill_keeps_all_and_makes_nothing_durable),
	    TEST(failed_sync_loses_what_it_was_for),
	    TEST(rules),
	    TEST(failed_write_leaves_a_part),
	    TEST(room),
	    TEST(rot),
	    TEST(every_crash_point),
	    TEST(stop_done_half_and_not),
	    TEST(stop_in_a_sync),
	    TEST(a_seed_repeats),
	    TEST(speed),
	};

	for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
		printf("%s\n", tests[i].name);
		fflush(stdout);
		tests[i].fn();
	}
	return 0;
}
