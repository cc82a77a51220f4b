/* Overlays: what is saved comes back byte for byte and checked, zeroes cost no space and are still data, and whatever
 * is cut off halfway, a block that is there reads right (I9). */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/bytes.h"
#include "image/overlay.h"
#include "tests/unit/image/crashstore.h"
#include "tests/unit/image/tmpdir.h"

static struct tmpdir dir;
static struct storage *s;

static void setup(void)
{
	tmpdir_make(&dir);
	cr_assert_eq(storage_posix_open(dir.path, &s), 0);
}

static void teardown(void)
{
	storage_close(s);
	tmpdir_remove(&dir);
}

TestSuite(overlay, .init = setup, .fini = teardown);

static void fill(uint8_t *p, uint64_t block, unsigned version)
{
	for (unsigned i = 0; i < BLOCK_SIZE; i++)
		p[i] = (uint8_t)(block * 31 + version * 7 + i % 253 + 1);
}

static int put(struct overlay *o, uint64_t block, uint32_t n, const void *data)
{
	uint32_t words[64];
	int rc;

	memset(words, 0xee, sizeof(words));
	rc = overlay_put_data(o, block, n, data, words);
	if (rc == 0)
		rc = overlay_sync_data(o);
	if (rc == 0)
		rc = overlay_put_map(o, block, n, words);
	if (rc == 0)
		rc = overlay_sync_map(o);
	if (rc == 0)
		overlay_publish(o, block, n);
	return rc;
}

static void expect(struct overlay *o, uint64_t block, const uint8_t *want)
{
	uint8_t got[BLOCK_SIZE];

	cr_assert(overlay_has(o, block), "block %llu", (unsigned long long)block);
	memset(got, 0x55, sizeof(got));
	cr_assert_eq(overlay_read(o, block, 0, got, BLOCK_SIZE), 0);
	cr_assert_arr_eq(got, want, BLOCK_SIZE);
	memset(got, 0x55, sizeof(got));
	cr_assert_eq(overlay_read(o, block, 513, got + 8, 1000), 0);
	cr_assert_arr_eq(got + 8, want + 513, 1000);
	cr_assert(got[7] == 0x55 && got[1008] == 0x55);
}

Test(overlay, saves_and_finds_again)
{
	const uint64_t size = 1000 * BLOCK_SIZE + 512; /* a short last block */
	static uint8_t blocks[6][BLOCK_SIZE];
	static const uint64_t at[] = {0, 1, 2, 500, 999, 1000};
	struct overlay *o;

	cr_assert_eq(overlay_create(s, "u", size, &o, NULL), 0);
	cr_assert_eq(overlay_count(o), 0);
	for (unsigned i = 0; i < 6; i++)
		fill(blocks[i], at[i], 1);
	memset(blocks[5] + 512, 0, BLOCK_SIZE - 512);
	cr_assert_eq(put(o, 0, 3, blocks), 0);
	for (unsigned i = 3; i < 6; i++)
		cr_assert_eq(put(o, at[i], 1, blocks[i]), 0);
	for (int again = 0; again < 2; again++) {
		cr_assert_eq(overlay_count(o), 6);
		for (unsigned i = 0; i < 6; i++)
			expect(o, at[i], blocks[i]);
		cr_assert_not(overlay_has(o, 3));
		cr_assert_not(overlay_has(o, 501));
		cr_assert_not(overlay_has(o, 1001));
		cr_assert_eq(bits_next_set(overlay_held(o), 3, 1000), 500);
		overlay_check(o);
		overlay_close(o);
		cr_assert_eq(overlay_open(s, "u", size, &o, NULL), 0);
	}
	overlay_close(o);
	cr_assert_eq(overlay_unlink(s, "u"), 0);
	cr_assert_eq(overlay_unlink(s, "u"), 0);
	cr_assert_not(tmpdir_has(&dir, "u.data"));
	cr_assert_not(tmpdir_has(&dir, "u.map"));
	overlay_close(NULL);
}

/* What a put that failed has left of a word is not found by opening the files again beside the overlay. */
Test(overlay, opened_again_it_holds_what_it_held)
{
	static uint8_t blocks[3][BLOCK_SIZE];
	struct overlay *o, *larger;
	uint32_t words[2];

	for (unsigned i = 0; i < 3; i++)
		fill(blocks[i], i, 1);
	cr_assert_eq(overlay_create(s, "u", 70 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(put(o, 0, 1, blocks[0]), 0);
	cr_assert_eq(put(o, 69, 1, blocks[1]), 0);
	/* as one that failed with its words half written */
	cr_assert_eq(overlay_put_data(o, 1, 2, blocks[1], words), 0);
	cr_assert_eq(overlay_put_map(o, 1, 1, words), 0);
	cr_assert_eq(overlay_open(s, "u", 200 * BLOCK_SIZE, &larger, NULL), 0);
	cr_assert(overlay_has(larger, 1), "else this shows nothing");
	overlay_take_over(larger, o);
	overlay_close(o);
	cr_assert_eq(overlay_count(larger), 2);
	expect(larger, 0, blocks[0]);
	expect(larger, 69, blocks[1]);
	cr_assert_not(overlay_has(larger, 1));
	cr_assert_not(overlay_has(larger, 2));
	cr_assert_eq(put(larger, 1, 1, blocks[2]), 0);
	cr_assert_eq(put(larger, 199, 1, blocks[2]), 0);
	expect(larger, 1, blocks[2]);
	overlay_check(larger);
	overlay_close(larger);
}

Test(overlay, the_files_are_those_of_the_format)
{
	uint8_t block[BLOCK_SIZE], zero[BLOCK_SIZE] = {0}, raw[BLOCK_SIZE], words[16], want[16];
	struct overlay *o;

	fill(block, 2, 1);
	cr_assert_eq(overlay_create(s, "u", 4 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(put(o, 2, 1, block), 0);
	cr_assert_eq(put(o, 3, 1, zero), 0);
	memset(want, 0, sizeof(want));
	put_u32(want + 8, crc32c(0, block, BLOCK_SIZE));
	put_u32(want + 12, crc32c(0, zero, BLOCK_SIZE));
	cr_assert_eq(tmpdir_size(&dir, "u.map"), 16);
	cr_assert_eq(tmpdir_read(&dir, "u.map", words, 16, 0), 16);
	cr_assert_arr_eq(words, want, 16);
	cr_assert_eq(tmpdir_size(&dir, "u.data"), 3 * BLOCK_SIZE);
	cr_assert_eq(tmpdir_read(&dir, "u.data", raw, BLOCK_SIZE, 2 * BLOCK_SIZE), BLOCK_SIZE);
	cr_assert_arr_eq(raw, block, BLOCK_SIZE);
	overlay_close(o);
}

Test(overlay, zeroes_cost_no_space_but_are_data)
{
	static uint8_t zeroes[64 * BLOCK_SIZE];
	uint64_t allocated;
	struct overlay *o;

	cr_assert_eq(overlay_create(s, "u", 4096 * BLOCK_SIZE, &o, NULL), 0);
	for (unsigned i = 0; i < 64; i++)
		cr_assert_eq(put(o, i * 64, 64, zeroes), 0);
	cr_assert_eq(overlay_count(o), 4096);
	cr_assert_eq(tmpdir_allocated(&dir, "u.data"), 0);
	cr_assert_eq(overlay_allocated(o, &allocated), 0);
	cr_assert_leq(allocated, 32 << 10); /* the map's 16 KiB */
	overlay_close(o);
	cr_assert_eq(overlay_open(s, "u", 4096 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(overlay_count(o), 4096);
	expect(o, 4095, zeroes);
	overlay_check(o);
	overlay_close(o);
}

/* Bytes under a block that is not there, from a save that was cut off, or a block that is replaced by zeroes. */
Test(overlay, zeroes_over_older_bytes)
{
	static uint8_t run[5 * BLOCK_SIZE];
	struct overlay *o;

	for (unsigned i = 0; i < 5; i++)
		fill(run + i * BLOCK_SIZE, i, 1);
	cr_assert_eq(overlay_create(s, "u", 8 * BLOCK_SIZE, &o, NULL), 0);
	uint32_t words[5];
	cr_assert_eq(overlay_put_data(o, 0, 5, run, words), 0);
	overlay_close(o);
	cr_assert_eq(overlay_open(s, "u", 8 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(overlay_count(o), 0);
	/* Data, zeroes, zeroes, data, zeroes. */
	memset(run + BLOCK_SIZE, 0, 2 * BLOCK_SIZE);
	memset(run + 4 * BLOCK_SIZE, 0, BLOCK_SIZE);
	fill(run, 0, 2);
	cr_assert_eq(put(o, 0, 5, run), 0);
	for (unsigned i = 0; i < 5; i++)
		expect(o, i, run + i * BLOCK_SIZE);
	memset(run, 0, BLOCK_SIZE);
	cr_assert_eq(put(o, 0, 1, run), 0);
	expect(o, 0, run);
	fill(run, 0, 3);
	cr_assert_eq(put(o, 0, 1, run), 0);
	expect(o, 0, run);
	overlay_check(o);
	overlay_close(o);
}

/* The last byte of a block alone is not zero. */
Test(overlay, almost_zero_is_not_zero)
{
	for (unsigned at = 0; at < BLOCK_SIZE; at += at == 16 ? BLOCK_SIZE - 17 : at < 32 ? 1 : 511) {
		uint8_t block[BLOCK_SIZE] = {0};
		struct overlay *o;

		block[at] = 1;
		cr_assert_eq(overlay_create(s, "u", BLOCK_SIZE, &o, NULL), 0);
		cr_assert_eq(put(o, 0, 1, block), 0);
		expect(o, 0, block);
		overlay_close(o);
	}
}

Test(overlay, a_changed_byte_is_detected)
{
	uint8_t block[BLOCK_SIZE], got[BLOCK_SIZE], byte;
	struct overlay *o;

	fill(block, 1, 1);
	cr_assert_eq(overlay_create(s, "u", 4 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(put(o, 1, 1, block), 0);
	byte = (uint8_t)(block[4000] ^ 0x10);
	tmpdir_write(&dir, "u.data", &byte, 1, BLOCK_SIZE + 4000);
	cr_assert_eq(overlay_read(o, 1, 0, got, 16), -ERR_CORRUPT);
	cr_assert_eq(overlay_read(o, 1, 0, got, BLOCK_SIZE), -ERR_CORRUPT);
	tmpdir_write(&dir, "u.data", &block[4000], 1, BLOCK_SIZE + 4000);
	cr_assert_eq(overlay_read(o, 1, 0, got, BLOCK_SIZE), 0);
	/* Its word lost. */
	tmpdir_write(&dir, "u.map", "\0\0\0\0", 4, 4);
	cr_assert_eq(overlay_read(o, 1, 0, got, BLOCK_SIZE), -ERR_CORRUPT);
	overlay_close(o);
}

Test(overlay, bounds)
{
	static uint8_t run[2 * BLOCK_SIZE];
	uint32_t words[2] = {5, 5};
	struct overlay *o;

	cr_assert_eq(overlay_create(s, "u", 2 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(overlay_put_data(o, 1, 2, run, words), -ERR_RANGE);
	cr_assert_eq(overlay_put_data(o, 2, 1, run, words), -ERR_RANGE);
	cr_assert_eq(overlay_put_data(o, UINT64_MAX, 2, run, words), -ERR_RANGE);
	cr_assert_eq(overlay_put_map(o, 1, 2, words), -ERR_RANGE);
	cr_assert(words[0] == 5 && words[1] == 5);
	cr_assert_not(overlay_has(o, 2));
	cr_assert_not(overlay_has(o, UINT64_MAX));
	overlay_close(o);
}

Test(overlay, odd_files_are_refused_by_name)
{
	struct overlay *o = (struct overlay *)1;
	struct err e = {0};

	cr_assert_eq(overlay_open(s, "u", BLOCK_SIZE, &o, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, "u.data is missing"), "%s", e.text);
	tmpdir_write(&dir, "u.data", "", 0, 0);
	cr_assert_eq(overlay_open(s, "u", BLOCK_SIZE, &o, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, "u.map is missing"), "%s", e.text);
	tmpdir_write(&dir, "u.map", "12345678", 8, 0);
	cr_assert_eq(overlay_open(s, "u", BLOCK_SIZE, &o, &e), -ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, "larger than"), "%s", e.text);
	cr_assert_eq(o, (struct overlay *)1);
	cr_assert_eq(overlay_create(s, "none/u", BLOCK_SIZE, &o, &e), -ERR_NOENT);
	/* Made anew over leftovers: nothing of them is there. */
	cr_assert_eq(overlay_create(s, "u", 4 * BLOCK_SIZE, &o, &e), 0);
	cr_assert_eq(overlay_count(o), 0);
	cr_assert_eq(tmpdir_size(&dir, "u.map"), 0);
	overlay_close(o);
}

/* Half a word at the map's end was never saved. */
Test(overlay, a_cut_word_is_absent)
{
	uint8_t block[BLOCK_SIZE];
	struct overlay *o;

	fill(block, 0, 1);
	cr_assert_eq(overlay_create(s, "u", 4 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(put(o, 0, 1, block), 0);
	overlay_close(o);
	tmpdir_write(&dir, "u.map", "\x99\x88", 2, 4);
	cr_assert_eq(overlay_open(s, "u", 4 * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(overlay_count(o), 1);
	cr_assert_eq(tmpdir_size(&dir, "u.map"), 4);
	expect(o, 0, block);
	overlay_check(o);
	overlay_close(o);
}

/* Opening costs what was saved, not what could be: 16 TiB with a few blocks, far apart. */
Test(overlay, a_large_volume_opens_at_once, .timeout = 60)
{
	const uint64_t blocks = (UINT64_C(15) << 40) / BLOCK_SIZE;
	uint8_t block[BLOCK_SIZE];
	struct overlay *o;

	cr_assert_eq(overlay_create(s, "u", blocks * BLOCK_SIZE, &o, NULL), 0);
	for (uint64_t b = 0; b < blocks; b += blocks / 10) {
		fill(block, b, 1);
		cr_assert_eq(put(o, b, 1, block), 0);
	}
	overlay_close(o);
	cr_assert_eq(overlay_open(s, "u", blocks * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_geq(overlay_count(o), 10);
	for (uint64_t b = 0; b < blocks; b += blocks / 10) {
		fill(block, b, 1);
		expect(o, b, block);
	}
	overlay_close(o);
}

#define SMALL 24U

/* A machine that loses power anywhere while blocks are saved (undo) or saved and replaced (active): each block that
 * is there reads as one of the contents put there since the last certain one, and what was certain stays there. */
static void random_life(uint64_t seed, bool replace, bool power)
{
	struct crashstore *cs = malloc(sizeof(*cs));
	unsigned sure[SMALL] = {0}, tried[SMALL] = {0};
	struct overlay *o;

	cs_init(cs, seed);
	cr_assert_eq(overlay_create(&cs->storage, "u", SMALL * BLOCK_SIZE, &o, NULL), 0);
	cr_assert_eq(storage_sync_dir(&cs->storage, ""), 0);
	for (unsigned boot = 0; boot < 6; boot++) {
		overlay_set_durable(o, power);
		cs->ops_left = (long)cs_random(cs, 60);
		while (!cs->stopped) {
			static uint8_t run[4 * BLOCK_SIZE];
			uint32_t words[4], n = 1 + (uint32_t)cs_random(cs, 4);
			uint64_t b = cs_random(cs, SMALL - n + 1);
			int rc;

			for (uint32_t i = 0; i < n; i++) {
				/* Version 0 of a block is zeroes; an undo overlay saves the same again. */
				unsigned version = replace ? tried[b + i] + 1 : 1 + (unsigned)(b + i) % 3;

				tried[b + i] = version;
				memset(run + i * BLOCK_SIZE, 0, BLOCK_SIZE);
				if (version % 3)
					fill(run + i * BLOCK_SIZE, b + i, version);
			}
			if (!replace && overlay_has(o, b))
				n = 0; /* first save wins */
			for (uint32_t i = 1; !replace && i < n; i++)
				n = overlay_has(o, b + i) ? i : n;
			if (n == 0) {
				if (cs_stop(cs))
					break;
				continue;
			}
			rc = overlay_put_data(o, b, n, run, words);
			if (rc == 0 && power)
				rc = overlay_sync_data(o);
			if (rc == 0)
				rc = overlay_put_map(o, b, n, words);
			if (rc == 0 && power)
				rc = overlay_sync_map(o);
			if (rc < 0)
				break;
			overlay_publish(o, b, n);
			for (uint32_t i = 0; i < n; i++)
				sure[b + i] = tried[b + i];
		}
		overlay_close(o);
		if (power)
			cs_power_cut(cs);
		else
			cs_killed(cs);
		cr_assert_eq(overlay_open(&cs->storage, "u", SMALL * BLOCK_SIZE, &o, NULL), 0);
		overlay_check(o);
		for (uint64_t b = 0; b < SMALL; b++) {
			uint8_t got[BLOCK_SIZE], want[BLOCK_SIZE];
			int rc;

			cr_assert(overlay_has(o, b) || sure[b] == 0, "seed %llu: block %llu is lost",
				  (unsigned long long)seed, (unsigned long long)b);
			if (!overlay_has(o, b))
				continue;
			rc = overlay_read(o, b, 0, got, BLOCK_SIZE);
			cr_assert_eq(rc, 0, "seed %llu boot %u: block %llu: %s", (unsigned long long)seed, boot,
				     (unsigned long long)b, err_name(rc));
			/* A block that was certain and not touched since is exactly that. */
			if (sure[b] && sure[b] == tried[b]) {
				memset(want, 0, sizeof(want));
				if (sure[b] % 3)
					fill(want, b, sure[b]);
				cr_assert_arr_eq(got, want, BLOCK_SIZE);
			}
			sure[b] = tried[b] = replace ? tried[b] : sure[b];
			if (replace) {
				/* What it holds now is unknown to the model: put a known content there. */
				memset(want, 0, sizeof(want));
				tried[b]++;
				if (tried[b] % 3)
					fill(want, b, tried[b]);
				cr_assert_eq(put(o, b, 1, want), 0);
				sure[b] = tried[b];
			}
		}
	}
	overlay_close(o);
	cs_free(cs);
	free(cs);
}

/* The word of a write that failed is on the medium; that it was taken back went with a sync that failed. What is
 * written there later must not come to light with it. */
Test(overlay, a_failed_sync_of_words_that_were_taken_back)
{
	struct crashstore *cs = malloc(sizeof(*cs));
	struct overlay *o;
	static uint8_t block[BLOCK_SIZE], back[BLOCK_SIZE];
	uint32_t word;

	cs_init(cs, 3);
	cr_assert_eq(overlay_create(&cs->storage, "u", 8 * BLOCK_SIZE, &o, NULL), 0);
	overlay_set_durable(o, true);
	cr_assert_eq(storage_sync_dir(&cs->storage, ""), 0);
	memset(block, 0x11, sizeof(block));
	cr_assert_eq(overlay_put_data(o, 3, 1, block, &word), 0);
	cr_assert_eq(overlay_sync_data(o), 0);
	cr_assert_eq(overlay_put_map(o, 3, 1, &word), 0);
	cr_assert_eq(overlay_sync_map(o), 0); /* written out by itself: the write has failed */
	cr_assert_eq(overlay_take_back(o, 3, 1), 0);
	cr_assert_not(overlay_unsure(o));
	cs->sync_fails_in = 1;
	cr_assert_eq(overlay_sync_map(o), -ERR_IO);
	cs->sync_fails_in = 0;
	cr_assert(overlay_unsure(o));
	memset(block, 0x22, sizeof(block));
	cr_assert_eq(overlay_put_data(o, 3, 1, block, &word), 0);
	cr_assert_eq(overlay_sync_data(o), 0);
	cs_power_cut(cs);
	overlay_close(o);
	cr_assert_eq(overlay_open(&cs->storage, "u", 8 * BLOCK_SIZE, &o, NULL), 0);
	memset(back, 0xa5, sizeof(back));
	if (overlay_has(o, 3))
		cr_assert_eq(overlay_read(o, 3, 0, back, BLOCK_SIZE), 0);
	overlay_close(o);
	cs_free(cs);
	free(cs);
}

Test(overlay, undo_survives_power_cuts, .timeout = 100)
{
	for (uint64_t seed = 1; seed <= 400; seed++)
		random_life(seed, false, true);
}

Test(overlay, active_survives_power_cuts, .timeout = 100)
{
	for (uint64_t seed = 1; seed <= 400; seed++)
		random_life(seed, true, true);
}

Test(overlay, both_survive_kills, .timeout = 100)
{
	for (uint64_t seed = 1; seed <= 300; seed++)
		random_life(seed, seed & 1, false);
}
