/* A disk over a base image and the bitmaps of changed blocks, on the simulated storage: kills, power cuts, calls that
 * fail and are gone on from, disks without room.
 *
 * Of the disk each sector holds after a start what a flush that succeeded found there, or what was written since, done
 * or failed; and what it holds then stays until it is written again. Of the bitmaps an answer lacks nothing that was
 * marked since the checkpoint, given that what was marked has its intent bit until a flush has succeeded.
 *
 * simstore_based [FIRST [SEEDS]] */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/err.h"
#include "core/range.h"
#include "core/settings.h"
#include "image/based.h"
#include "image/changed.h"
#include "tests/sim/simalloc.h"
#include "tests/sim/simstore.h"

#define BASE_SIZE (20U * BLOCK_SIZE + 1536)
#define SIZE (26U * BLOCK_SIZE + 512)
#define SECTORS (SIZE / SECTOR_SIZE)
#define VERSIONS 512U
#define SEEDS 150U

static char base_path[32];
static uint8_t base_bytes[SIZE];
static struct source *base;

struct run {
	uint64_t seed, random;
	struct simstore *ss;
	struct storage *s;
	bool power;
	struct disk *d;
	uint8_t versions[SECTORS][VERSIONS][SECTOR_SIZE];
	unsigned n[SECTORS];
};

static uint64_t below(struct run *r, uint64_t n)
{
	r->random ^= r->random << 13;
	r->random ^= r->random >> 7;
	r->random ^= r->random << 17;
	return r->random % n;
}

static void fail(const struct run *r, const char *what, uint64_t n)
{
	printf("seed %" PRIu64 " (%s) [%s]: %s %" PRIu64 "\n", r->seed, r->power ? "power" : "process",
	       simstore_fault_text(r->ss), what, n);
	exit(1);
}

static void faults(struct run *r)
{
	static const char *const paths[] = {NULL, "*.map", "*.data", "*changed-*"};
	struct simstore_rule rule = {.calls = SIMSTORE_CHANGES,
				     .path = paths[below(r, 4)],
				     .error = below(r, 2) ? ERR_IO : ERR_NOSPC,
				     .one_in = (unsigned)(4 + below(r, 60))};

	simstore_rules_clear(r->ss);
	if (below(r, 3) == 0)
		rule.calls &= ~SIMSTORE_BIT(SIMSTORE_SYNC);
	if (below(r, 3))
		simstore_rule_add(r->ss, &rule);
	if (below(r, 3) == 0)
		simstore_stop_at(r->ss, 1 + below(r, 120), (enum simstore_stop)below(r, 3));
}

static void come_back(struct run *r)
{
	static const enum simstore_keep keeps[] = {SIMSTORE_KEEP_NONE, SIMSTORE_KEEP_RANDOM, SIMSTORE_KEEP_RANDOM,
						   SIMSTORE_KEEP_ALL};

	simstore_rules_clear(r->ss);
	if (!simstore_stopped(r->ss))
		simstore_stop(r->ss);
	if (r->power && below(r, 2))
		simstore_power_cut(r->ss, keeps[below(r, 4)]);
	else
		simstore_restart(r->ss);
	simstore_stop_at(r->ss, 0, SIMSTORE_NOT_DONE);
}

/* ---- the disk ---- */

static void remember(struct run *r, uint64_t sector, const uint8_t *data)
{
	if (r->n[sector] == VERSIONS)
		fail(r, "too many versions of sector", sector);
	memcpy(r->versions[sector][r->n[sector]++], data, SECTOR_SIZE);
}

/* What is there now is one of what may be; settled: nothing else may be from here on. */
static void look(struct run *r, bool settled)
{
	static uint8_t got[SIZE];

	simstore_look(r->ss, true);
	if (disk_read(r->d, 0, got, SIZE) < 0)
		fail(r, "a read fails", 0);
	simstore_look(r->ss, false);
	for (uint64_t s = 0; s < SECTORS; s++) {
		bool found = false;

		for (unsigned i = 0; i < r->n[s] && !found; i++)
			found = memcmp(r->versions[s][i], got + s * SECTOR_SIZE, SECTOR_SIZE) == 0;
		if (!found)
			fail(r, "what was never there is in sector", s);
		if (settled)
			r->n[s] = 0;
		if (settled)
			remember(r, s, got + s * SECTOR_SIZE);
	}
}

static void step(struct run *r)
{
	static uint8_t data[SIZE];
	uint64_t first = below(r, SECTORS), n = min_u64(1 + below(r, below(r, 4) ? 20 : 100), SECTORS - first);
	unsigned kind = (unsigned)below(r, 10);
	uint64_t off = first * SECTOR_SIZE, len = n * SECTOR_SIZE;

	if (kind == 0) {
		if (disk_sync(r->d) == 0)
			look(r, true);
		return;
	}
	if (kind < 3) { /* whole blocks */
		off = round_down_u64(off, BLOCK_SIZE);
		len = min_u64(round_up_u64(len, BLOCK_SIZE), SIZE - off);
	}
	for (uint64_t i = 0; i < len; i++)
		data[i] = kind > 6 ? 0 : (uint8_t)below(r, 256);
	for (uint64_t s = off / SECTOR_SIZE; s < (off + len) / SECTOR_SIZE; s++)
		remember(r, s, data + s * SECTOR_SIZE - off);
	if (kind > 6)
		(void)disk_zero(r->d, off, len, kind > 7);
	else
		(void)disk_write(r->d, off, data, len);
}

static void run_disk(struct run *r)
{
	struct based_args a = {.source = base, .path = base_path};
	struct err e = {0};

	if (based_create(r->s, "v", SIZE, &a, r->power, &e) < 0 || storage_sync_dir(r->s, "volumes/v") < 0)
		fail(r, e.text, 0);
	for (uint64_t s = 0; s < SECTORS; s++)
		remember(r, s, base_bytes + s * SECTOR_SIZE);
	for (unsigned life = 0; life < 8; life++) {
		if (below(r, 3) == 0) { /* a start that is cut off, or fails */
			faults(r);
			if (based_open(r->s, "v", SIZE, r->power, &r->d, &e) == 0)
				disk_close(r->d);
			come_back(r);
		}
		if (based_open(r->s, "v", SIZE, r->power, &r->d, &e) < 0)
			fail(r, e.text, 0);
		look(r, false);
		faults(r);
		for (unsigned i = 0, steps = (unsigned)below(r, 40); i < steps && !simstore_stopped(r->ss); i++)
			step(r);
		simstore_rules_clear(r->ss);
		if (!simstore_stopped(r->ss))
			look(r, false);
		disk_close(r->d);
		come_back(r);
	}
}

/* ---- the bitmaps ---- */

#define BLOCKS 20000U
#define CHANGED_SIZE ((uint64_t)BLOCKS * BLOCK_SIZE)
#define REGION_BLOCKS (INTENT_SIZE / BLOCK_SIZE)
#define REGIONS (BLOCKS / REGION_BLOCKS + 1)
#define EPOCHS 60U

static struct {
	uint64_t number;
	bool blocks[BLOCKS];
} truth[EPOCHS];
static unsigned n_truth;
static bool intents[REGIONS];

static void check_since(struct run *r, struct changed *c)
{
	uint64_t numbers[EPOCHS];
	uint32_t n = changed_numbers(c, numbers, EPOCHS);
	void *mem = calloc(1, bitmap_bytes(BLOCKS));
	struct bitmap b;

	for (uint32_t i = 0; i < n; i++) {
		bitmap_init(&b, BLOCKS, mem);
		bitmap_clear_all(&b);
		if (changed_since(c, numbers[i], &b) < 0)
			continue;
		for (unsigned k = 0; k < n_truth; k++)
			for (unsigned x = 0; truth[k].number >= numbers[i] && x < BLOCKS; x++)
				if (truth[k].blocks[x] && !bitmap_test(&b, x))
					fail(r, "what was marked is missing since", numbers[i]);
	}
	free(mem);
}

static void mark(struct run *r, struct changed *c)
{
	uint64_t block = below(r, BLOCKS), n = min_u64(1 + below(r, 300), BLOCKS - block);

	changed_mark(c, block * BLOCK_SIZE, n * BLOCK_SIZE);
	for (uint64_t i = block; i < block + n; i++) {
		intents[i / REGION_BLOCKS] = true;
		if (n_truth)
			truth[n_truth - 1].blocks[i] = true;
	}
}

static void run_changed(struct run *r)
{
	struct settings keep;
	struct changed *c;
	uint64_t next = 1;
	bool before[REGIONS];
	struct err e;

	settings_default(&keep);
	keep.keep_last = 4;
	n_truth = 0;
	memset(intents, 0, sizeof(intents));
	for (unsigned life = 0; life < 10; life++) {
		faults(r);
		if (changed_open(r->s, "v", CHANGED_SIZE, r->power, true, &c, &e) < 0) {
			come_back(r);
			continue;
		}
		/* The start makes what names there are durable (intent_begin), or ends. */
		if (r->power && storage_sync_dir(r->s, "volumes/v") < 0) {
			changed_close(c);
			come_back(r);
			continue;
		}
		for (unsigned k = 0; k < REGIONS; k++)
			if (intents[k])
				changed_mark(c, (uint64_t)k * INTENT_SIZE, INTENT_SIZE);
		for (unsigned i = 0; i < 60 && !simstore_stopped(r->ss); i++) {
			switch (below(r, 8)) {
			case 0:
				if (n_truth == EPOCHS)
					break;
				changed_begin(c, next, next * 1000000000U, below(r, 8) == 0, CHANGED_SIZE);
				memset(&truth[n_truth], 0, sizeof(truth[0]));
				truth[n_truth++].number = next++;
				break;
			case 1:
			case 2:
				memcpy(before, intents, sizeof(before));
				if (changed_flush(c, &keep) == 0)
					for (unsigned k = 0; k < REGIONS; k++)
						intents[k] = intents[k] && !(before[k] && below(r, 2));
				break;
			case 3:
				if (!simstore_stopped(r->ss))
					check_since(r, c);
				break;
			case 4:
				if (below(r, 10) == 0)
					(void)changed_drop(c);
				break;
			default:
				mark(r, c);
			}
		}
		changed_close(c);
		come_back(r);
	}
	if (changed_open(r->s, "v", CHANGED_SIZE, r->power, true, &c, &e) < 0)
		fail(r, e.text, 0);
	for (unsigned k = 0; k < REGIONS; k++)
		if (intents[k])
			changed_mark(c, (uint64_t)k * INTENT_SIZE, INTENT_SIZE);
	check_since(r, c);
	changed_close(c);
}

static void run(struct run *r, uint64_t seed, void (*fn)(struct run *r))
{
	memset(r, 0, sizeof(*r));
	r->seed = seed;
	r->random = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	r->power = seed % 4 != 0;
	r->ss = simstore_new(seed);
	r->s = simstore_storage(r->ss);
	(void)storage_mkdir(r->s, "volumes");
	(void)storage_mkdir(r->s, "volumes/v");
	(void)storage_sync_dir(r->s, "volumes");
	(void)storage_sync_dir(r->s, "");
	fn(r);
	simstore_free(r->ss);
}

int main(int argc, char **argv)
{
	struct run *r = simalloc(sizeof(*r));
	uint64_t first = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, n = argc > 2 ? strtoull(argv[2], NULL, 10) : SEEDS;
	struct err e = {0};

	(void)snprintf(base_path, sizeof(base_path), "/tmp/simbaseXXXXXX");
	int fd = mkstemp(base_path);
	for (size_t i = 0; i < BASE_SIZE; i++)
		base_bytes[i] = i / BLOCK_SIZE >= 6 && i / BLOCK_SIZE < 12 ? 0 : (uint8_t)(1 + i / SECTOR_SIZE % 251);
	if (fd < 0 || pwrite(fd, base_bytes, 6 * BLOCK_SIZE, 0) < 0 ||
	    pwrite(fd, base_bytes + 12 * BLOCK_SIZE, BASE_SIZE - 12 * BLOCK_SIZE, 12 * BLOCK_SIZE) < 0 ||
	    source_open(base_path, "raw", NULL, &base, &e) < 0) {
		printf("the base: %s\n", e.text);
		return 1;
	}
	close(fd);
	for (uint64_t seed = first; seed < first + n; seed++)
		run(r, seed, run_disk);
	printf("disk: %" PRIu64 " seeds\n", n);
	for (uint64_t seed = first; seed < first + n; seed++)
		run(r, seed, run_changed);
	printf("bitmaps: %" PRIu64 " seeds\n", n);
	source_close(base);
	(void)unlink(base_path);
	simfree(r);
	return 0;
}
