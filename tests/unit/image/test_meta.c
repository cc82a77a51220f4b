/* The two-copy record: every torn save leaves the old or the new record; a random machine that loses power, kills the
 * process and fails syncs; refusals. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "image/meta.h"
#include "tests/unit/image/crashstore.h"

#define KIND "TEST"
#define HEADER 48

static struct crashstore *new_store(uint64_t seed)
{
	struct crashstore *cs = malloc(sizeof(*cs));

	cs_init(cs, seed);
	return cs;
}

static void drop_store(struct crashstore *cs)
{
	cs_free(cs);
	free(cs);
}

static int save_number(struct crashstore *cs, uint64_t n, size_t len, bool durable)
{
	uint8_t *payload = malloc(len);
	int rc;

	memset(payload, (int)(n & 0xff), len);
	put_u64(payload, n);
	rc = meta_save(&cs->storage, "", "rec", KIND, 1, payload, len, durable, NULL);
	free(payload);
	return rc;
}

/* 0: none is there. Fails the test when neither copy checks out, or when a record is not one that was ever saved. */
static uint64_t load_number(struct crashstore *cs, int *ret_rc)
{
	void *payload = NULL;
	size_t len = 0;
	uint32_t version = 0;
	uint64_t n;
	int rc = meta_load(&cs->storage, "rec", KIND, 1, &version, &payload, &len, NULL);

	*ret_rc = rc;
	if (rc < 0)
		return 0;
	cr_assert_geq(len, 8);
	cr_assert_eq(version, 1);
	n = get_u64(payload);
	for (size_t i = 8; i < len; i++)
		cr_assert_eq(((uint8_t *)payload)[i], (uint8_t)n);
	free(payload);
	return n;
}

static void write_copy(struct crashstore *cs, const char *path, uint64_t off, const void *p, size_t len)
{
	struct disk *d;

	cr_assert_eq(storage_open(&cs->storage, path, 0, &d), 0);
	cr_assert_eq(disk_write(d, off, p, len), 0);
	disk_close(d);
}

static void resize_copy(struct crashstore *cs, const char *path, uint64_t size)
{
	struct disk *d;

	cr_assert_eq(storage_open(&cs->storage, path, 0, &d), 0);
	cr_assert_eq(disk_set_size(d, size), 0);
	disk_close(d);
}

static struct cs_image image_of(struct crashstore *cs, const char *path)
{
	struct cs_name *n = cs_find(cs, path);

	cr_assert_not_null(n);
	return *n->inode->cache;
}

Test(meta, round_trip_and_sizes)
{
	static const size_t sizes[] = {0, 1, 47, 48, 512, 70000};
	struct crashstore *cs = new_store(1);

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		uint8_t *in = malloc(sizes[i] + 1);
		void *out = NULL;
		size_t len = 99;
		uint32_t version = 99;

		for (size_t k = 0; k < sizes[i]; k++)
			in[k] = (uint8_t)(k * 7 + i);
		cr_assert_eq(meta_save(&cs->storage, "", "rec", KIND, (uint32_t)i, in, sizes[i], true, NULL), 0);
		cr_assert_eq(meta_load(&cs->storage, "rec", KIND, 100, &version, &out, &len, NULL), 0);
		cr_assert_eq(version, i);
		cr_assert_eq(len, sizes[i]);
		cr_assert_arr_eq(out, in, len);
		free(in);
		free(out);
	}
	drop_store(cs);
}

Test(meta, the_bytes_are_those_of_the_format)
{
	struct crashstore *cs = new_store(1);
	uint8_t want[HEADER + 3];
	struct cs_image got;

	cr_assert_eq(meta_save(&cs->storage, "", "rec", KIND, 0x01020304, "xyz", 3, true, NULL), 0);
	memset(want, 0, sizeof(want));
	memcpy(want, "repfsrec", 8);
	put_u32(want + 8, 1);
	memcpy(want + 12, KIND, 4);
	put_u64(want + 16, 1);
	put_u32(want + 24, 0x01020304);
	put_u32(want + 28, 3);
	put_u32(want + 32, 1);
	put_u32(want + 36, crc32c(0, "xyz", 3));
	put_u32(want + 40, 1);
	put_u32(want + 44, crc32c(0, want, 44));
	memcpy(want + HEADER, "xyz", 3);
	got = image_of(cs, "rec.a");
	cr_assert_eq(got.size, sizeof(want));
	cr_assert_arr_eq(got.bytes, want, sizeof(want));
	put_u32(want + 32, 2);
	put_u32(want + 44, crc32c(0, want, 44));
	got = image_of(cs, "rec.b");
	cr_assert_arr_eq(got.bytes, want, sizeof(want));
	/* The next save goes over .b first, in place. */
	cr_assert_eq(meta_save(&cs->storage, "", "rec", KIND, 0x01020304, "xyz", 3, true, NULL), 0);
	put_u64(want + 16, 2);
	put_u32(want + 32, 1);
	put_u32(want + 40, 0);
	put_u32(want + 44, crc32c(0, want, 44));
	got = image_of(cs, "rec.b");
	cr_assert_arr_eq(got.bytes, want, sizeof(want));
	drop_store(cs);
}

/* Both copies of a save torn at each byte, over an older record that is longer and one that is shorter. */
static void tear_everywhere(size_t old_len, size_t new_len)
{
	struct crashstore *cs = new_store(2);
	struct cs_image olds[2], news[2];
	static const char *const paths[] = {"rec.a", "rec.b"};
	unsigned first;
	int rc;

	cr_assert_eq(save_number(cs, 1, old_len, true), 0);
	for (int i = 0; i < 2; i++)
		olds[i] = image_of(cs, paths[i]);
	cr_assert_eq(save_number(cs, 2, new_len, true), 0);
	for (int i = 0; i < 2; i++)
		news[i] = image_of(cs, paths[i]);
	first = get_u32(news[0].bytes + 32) == 1 ? 0 : 1;
	for (unsigned pass = 0; pass < 2; pass++) {
		unsigned torn = pass == 0 ? first : 1 - first;

		for (size_t cut = 0; cut <= HEADER + new_len; cut++) {
			uint64_t n;

			/* As the machine would find it: the other copy old before the first pass is over, new after. */
			resize_copy(cs, paths[1 - torn], 0);
			write_copy(cs, paths[1 - torn], 0, (pass == 0 ? olds : news)[1 - torn].bytes,
				   pass == 0 ? HEADER + old_len : HEADER + new_len);
			resize_copy(cs, paths[torn], 0);
			write_copy(cs, paths[torn], 0, olds[torn].bytes, HEADER + old_len);
			write_copy(cs, paths[torn], 0, news[torn].bytes, cut);
			n = load_number(cs, &rc);
			cr_assert_eq(rc, 0, "cut at %zu of pass %u: %s", cut, pass, err_name(rc));
			if (pass == 1 || cut == HEADER + new_len)
				cr_assert_eq(n, 2);
			else
				cr_assert(n == 1 || n == 2);
			/* The load has repaired it: the other copy alone says the same. */
			resize_copy(cs, paths[cut & 1], 0);
			cr_assert_eq(load_number(cs, &rc), n);
			cr_assert_eq(rc, 0);
			for (unsigned i = 0; i < cs->n_inodes; i++)
				cs_forget_ops(cs->inodes[i]);
		}
	}
	drop_store(cs);
}

Test(meta, torn_at_every_byte)
{
	tear_everywhere(300, 120);
	tear_everywhere(120, 300);
}

/* Every prefix of the very first save: nothing or the record, never an error that stops a store. */
Test(meta, first_save_cut_off_anywhere)
{
	for (uint64_t seed = 1; seed < 400; seed++) {
		struct crashstore *cs = new_store(seed);
		uint64_t n;
		int rc, saved;

		cs->tear_bytes = true;
		cs->ops_left = (long)cs_random(cs, 12);
		saved = save_number(cs, 7, 200, true);
		cs_power_cut(cs);
		n = load_number(cs, &rc);
		cr_assert(rc == -ERR_NOENT || n == 7, "seed %llu: %s", (unsigned long long)seed, err_name(rc));
		if (saved == 0)
			cr_assert_eq(n, 7);
		drop_store(cs);
	}
}

/* A machine that stops, is killed or loses power anywhere, in saves and in loads, with syncs that fail. */
static void random_life(uint64_t seed, bool durable)
{
	struct crashstore *cs = new_store(seed);
	uint64_t last = 0, tried = 0; /* last: certain; above it up to tried: possible */

	cs->tear_bytes = true;
	for (unsigned boot = 0; boot < 12; boot++) {
		uint64_t n;
		int rc;

		cs->sync_fails_in = durable && cs_random(cs, 3) == 0 ? 4 : 0;
		for (unsigned i = 0; i < 6 && !cs->stopped; i++) {
			if (cs->ops_left < 0 && cs_random(cs, 4) == 0)
				cs->ops_left = (long)cs_random(cs, 14);
			if (cs_random(cs, 4) == 0) {
				(void)load_number(cs, &rc);
				continue;
			}
			tried++;
			if (save_number(cs, tried, 8 + (size_t)cs_random(cs, 600), durable) == 0)
				last = tried;
		}
		if (durable && cs_random(cs, 3))
			cs_power_cut(cs);
		else
			cs_killed(cs);
		cs->sync_fails_in = 0;
		if (cs_random(cs, 3) == 0)
			continue;
		n = load_number(cs, &rc);
		cr_assert(rc == 0 || (rc == -ERR_NOENT && last == 0), "seed %llu boot %u: %s", (unsigned long long)seed,
			  boot, err_name(rc));
		cr_assert(n >= last && n <= tried, "seed %llu boot %u: loaded %llu, saved %llu",
			  (unsigned long long)seed, boot, (unsigned long long)n, (unsigned long long)last);
		/* What a load has said without a fault stays said. */
		last = n;
	}
	drop_store(cs);
}

Test(meta, random_power_cuts)
{
	for (uint64_t seed = 1; seed <= 3000; seed++)
		random_life(seed, true);
}

Test(meta, random_kills_without_syncs)
{
	for (uint64_t seed = 1; seed <= 1500; seed++) {
		random_life(seed, false);
	}
	struct crashstore *cs = new_store(3);

	cr_assert_eq(save_number(cs, 1, 100, false), 0);
	cr_assert_eq(save_number(cs, 2, 100, false), 0);
	cr_assert_eq(cs->syncs, 0);
	drop_store(cs);
}

Test(meta, one_lost_copy_costs_nothing)
{
	static const char *const paths[] = {"rec.a", "rec.b"};

	for (int i = 0; i < 2; i++) {
		struct crashstore *cs = new_store(4);
		int rc;

		cr_assert_eq(save_number(cs, 5, 100, true), 0);
		cr_assert_eq(save_number(cs, 6, 100, true), 0);
		write_copy(cs, paths[i], HEADER + 40, "X", 1);
		cr_assert_eq(load_number(cs, &rc), 6);
		cr_assert_eq(storage_unlink(&cs->storage, paths[1 - i]), 0);
		cr_assert_eq(load_number(cs, &rc), 6);
		drop_store(cs);
	}
}

Test(meta, both_bad_names_the_files)
{
	struct crashstore *cs = new_store(5);
	void *payload = (void *)1;
	size_t len = 77;
	uint32_t version = 77;
	struct err e = {0};

	cr_assert_eq(save_number(cs, 5, 100, true), 0);
	write_copy(cs, "rec.a", HEADER + 40, "X", 1);
	resize_copy(cs, "rec.b", 60);
	cr_assert_eq(meta_load(&cs->storage, "rec", KIND, 1, &version, &payload, &len, &e), -ERR_CORRUPT);
	cr_assert_eq(e.code, ERR_CORRUPT);
	cr_assert_not_null(strstr(e.text, "rec.a: the checksum of its content does not match"), "%s", e.text);
	cr_assert_not_null(strstr(e.text, "rec.b: cut short"), "%s", e.text);
	cr_assert_not_null(strstr(e.text, "from a backup"), "%s", e.text);
	cr_assert(payload == (void *)1 && len == 77 && version == 77);
	/* A daemon that holds the record in memory can still save it. */
	cr_assert_eq(save_number(cs, 6, 100, true), 0);
	int rc;
	cr_assert_eq(load_number(cs, &rc), 6);
	drop_store(cs);
}

Test(meta, other_kinds_and_newer_versions_are_refused)
{
	struct crashstore *cs = new_store(6);
	struct cs_image raw;
	void *payload;
	uint32_t version;
	size_t len;
	struct err e = {0};

	cr_assert_eq(meta_save(&cs->storage, "", "rec", KIND, 3, "abc", 3, true, NULL), 0);
	cr_assert_eq(meta_load(&cs->storage, "rec", "ELSE", 9, &version, &payload, &len, &e), -ERR_CORRUPT);
	cr_assert_eq(meta_load(&cs->storage, "rec", KIND, 2, &version, &payload, &len, &e), -ERR_VERSION);
	cr_assert_not_null(strstr(e.text, "version 3"), "%s", e.text);
	cr_assert_not_null(strstr(e.text, "up to 2"), "%s", e.text);
	cr_assert_eq(meta_save(&cs->storage, "", "rec", KIND, 2, "old", 3, true, &e), -ERR_VERSION);
	cr_assert_eq(meta_load(&cs->storage, "rec", KIND, 3, &version, &payload, &len, &e), 0);
	cr_assert_arr_eq(payload, "abc", 3);
	free(payload);
	/* A newer container: only its header is known. */
	raw = image_of(cs, "rec.a");
	put_u32(raw.bytes + 8, 2);
	put_u64(raw.bytes + 16, 100);
	put_u32(raw.bytes + 28, 0xffffffff);
	put_u32(raw.bytes + 44, crc32c(0, raw.bytes, 44));
	write_copy(cs, "rec.a", 0, raw.bytes, HEADER);
	cr_assert_eq(meta_load(&cs->storage, "rec", KIND, 9, &version, &payload, &len, &e), -ERR_VERSION);
	cr_assert_eq(meta_save(&cs->storage, "", "rec", KIND, 9, "old", 3, true, &e), -ERR_VERSION);
	drop_store(cs);
}

Test(meta, limits_and_delete)
{
	struct crashstore *cs = new_store(7);
	uint8_t *big = calloc(1, META_PAYLOAD_MAX + 1);
	struct err e = {0};
	int rc;

	cr_assert_eq(meta_save(&cs->storage, "", "rec", KIND, 1, big, META_PAYLOAD_MAX + 1, true, &e), -ERR_LIMIT);
	cr_assert_eq(e.code, ERR_LIMIT);
	free(big);
	load_number(cs, &rc);
	cr_assert_eq(rc, -ERR_NOENT);
	cr_assert_eq(save_number(cs, 1, 10, true), 0);
	cr_assert_eq(meta_delete(&cs->storage, "", "rec", KIND, true, NULL), 0);
	load_number(cs, &rc);
	cr_assert_eq(rc, -ERR_NOENT);
	cr_assert_eq(meta_delete(&cs->storage, "", "rec", KIND, true, NULL), 0);
	cr_assert_eq(cs->names.n, 0);
	drop_store(cs);
}

/* A save that fails leaves the old record, also when the failed copy looks whole in the cache. */
Test(meta, failed_sync_takes_the_new_record_back)
{
	struct crashstore *cs = new_store(8);
	int rc;

	cr_assert_eq(save_number(cs, 1, 50, true), 0);
	cs->sync_fails_in = 1;
	cr_assert_eq(save_number(cs, 2, 50, true), -ERR_IO);
	cs->sync_fails_in = 0;
	cr_assert_eq(load_number(cs, &rc), 1);
	cs_power_cut(cs);
	cr_assert_eq(load_number(cs, &rc), 1);
	cr_assert_eq(save_number(cs, 3, 50, true), 0);
	cs_power_cut(cs);
	cr_assert_eq(load_number(cs, &rc), 3);
	drop_store(cs);
}

static void make_unreadable(struct crashstore *cs, const char *path)
{
	struct cs_name *n = cs_find(cs, path);

	cr_assert_not_null(n);
	n->inode->unreadable = true;
}

/* Every way in which one copy can be unreadable beside the other: the record loaded is the last one saved, or none is,
 * with the name of the file; and a save goes on. `lost`: the save of 3 ended with its second write failed. */
static bool with_one_unreadable(uint64_t seed, const char *path, bool lost)
{
	bool told;
	struct crashstore *cs = new_store(seed);
	struct err e = {0};
	void *payload = NULL;
	uint32_t version;
	size_t len;
	uint64_t found;
	int rc, again;

	cr_assert_eq(save_number(cs, 1, 50, true), 0);
	cr_assert_eq(save_number(cs, 2, 50, true), 0);
	if (lost) {
		/* Read both, [secure: nothing], write and sync the first; the write of the second fails. */
		cs->ops_left = 2;
		cr_assert_eq(save_number(cs, 3, 50, true), 0);
		cs_killed(cs);
	}
	make_unreadable(cs, path);
	rc = meta_load(&cs->storage, "rec", KIND, 1, &version, &payload, &len, &e);
	told = rc == 0;
	if (told) {
		free(payload);
		cr_assert_eq(load_number(cs, &again), lost ? 3 : 2, "%s", path);
	} else {
		cr_assert_eq(rc, -ERR_IO);
		cr_assert_not_null(strstr(e.text, path), "%s", e.text);
		cr_assert_not_null(strstr(e.text, "move it away"), "%s", e.text);
		make_unreadable(cs, path);
	}
	/* The daemon that holds the record saves the next one: failing, it takes nothing back. */
	cs->sync_fails_in = 2;
	rc = save_number(cs, 4, 50, true);
	cs->sync_fails_in = 0;
	found = load_number(cs, &again);
	cr_assert(again == -ERR_IO || found >= (rc == 0 ? 4
						: lost	? 3
							: 2),
		  "%s: %llu, %s", path, (unsigned long long)found, err_name(again));
	make_unreadable(cs, path);
	/* Then over whatever is there. */
	cr_assert_eq(save_number(cs, 4, 50, true), 0);
	cs_power_cut(cs);
	cr_assert_eq(load_number(cs, &rc), 4);
	cr_assert_eq(storage_unlink(&cs->storage, path), 0);
	cr_assert_eq(load_number(cs, &rc), 4);
	drop_store(cs);
	return told;
}

Test(meta, an_unreadable_copy_never_takes_the_record_back)
{
	for (uint64_t seed = 1; seed <= 40; seed++) {
		/* The copy written last tells that it is the newest, the one written first does not. */
		cr_assert_eq(with_one_unreadable(seed, "rec.a", false) + with_one_unreadable(seed, "rec.b", false), 1);
		(void)with_one_unreadable(seed, "rec.a", true);
		(void)with_one_unreadable(seed, "rec.b", true);
	}
}

Test(meta, two_copies_that_cant_be_read_are_not_overwritten)
{
	struct crashstore *cs = new_store(10);
	int rc;

	cr_assert_eq(save_number(cs, 1, 50, true), 0);
	make_unreadable(cs, "rec.a");
	make_unreadable(cs, "rec.b");
	cr_assert_eq(save_number(cs, 2, 50, true), -ERR_IO);
	cs_find(cs, "rec.a")->inode->unreadable = cs_find(cs, "rec.b")->inode->unreadable = false;
	cr_assert_eq(load_number(cs, &rc), 1);
	drop_store(cs);
}

/* Nothing is the matter with them, perhaps: a limit of open files, an owner. Nobody is told to remove them. */
Test(meta, copies_that_cant_be_read_are_not_said_to_be_bad)
{
	static const char *const unreadable[][2] = {{"rec.a", "rec.b"}, {"rec.a", NULL}, {"rec.b", NULL}};
	for (size_t i = 0; i < 3; i++) {
		struct crashstore *cs = new_store(10);
		struct err e = {0};
		void *payload = NULL;
		uint32_t version;
		size_t len;

		cr_assert_eq(save_number(cs, 1, 50, true), 0);
		for (size_t k = 0; k < 2; k++)
			if (unreadable[i][k] == NULL)
				resize_copy(cs, i == 1 ? "rec.b" : "rec.a", 10);
		for (size_t k = 0; k < 2; k++)
			if (unreadable[i][k])
				make_unreadable(cs, unreadable[i][k]);
		cr_assert_eq(meta_load(&cs->storage, "rec", KIND, 1, &version, &payload, &len, &e), -ERR_IO);
		cr_assert_not_null(strstr(e.text, unreadable[i][0]), "%s", e.text);
		cr_assert_not_null(strstr(e.text, "can't be"), "%s", e.text);
		cr_assert_null(strstr(e.text, "remove"), "%s", e.text);
		cs_find(cs, unreadable[i][0])->inode->unreadable = false;
		drop_store(cs);
	}
}

/* Long lives of saves with failing syncs and cuts, then one copy that can't be read: what is loaded is no older than
 * the last record said to be saved. */
Test(meta, unreadable_after_anything)
{
	unsigned refused = 0, loaded = 0;

	for (uint64_t seed = 1; seed <= 3000; seed++) {
		struct crashstore *cs = new_store(seed);
		uint64_t last = 0, n = 0;
		int rc;

		for (unsigned i = 0; i < 8; i++) {
			cs->ops_left = cs_random(cs, 3) ? -1 : (long)cs_random(cs, 8);
			if (save_number(cs, ++n, 50, true) == 0)
				last = n;
			if (cs->stopped && cs_random(cs, 2))
				cs_power_cut(cs);
			else
				cs_killed(cs);
			if (cs_random(cs, 3) == 0) {
				const char *path = cs_random(cs, 2) ? "rec.a" : "rec.b";
				uint64_t found;

				if (cs_find(cs, path))
					make_unreadable(cs, path);
				found = load_number(cs, &rc);
				if (rc == 0) {
					cr_assert_geq(found, last, "seed %llu: %llu of %llu", (unsigned long long)seed,
						      (unsigned long long)found, (unsigned long long)last);
					last = found;
					loaded++;
				} else if (rc == -ERR_IO) {
					refused++;
				}
				if (cs_find(cs, path) && cs_random(cs, 2)) /* the medium comes to its senses */
					cs_find(cs, path)->inode->unreadable = false;
			}
		}
		drop_store(cs);
	}
	cr_assert(refused > 100 && loaded > 100, "%u refused, %u loaded", refused, loaded);
}

/* The newest copy is in the cache only, its save was cut off: nobody acts on it before it is durable. */
Test(meta, a_record_that_cant_be_made_durable_is_not_acted_on)
{
	struct crashstore *cs = new_store(11);
	struct err e = {0};
	void *payload = NULL;
	uint32_t version;
	size_t len;
	int rc;

	cr_assert_eq(save_number(cs, 1, 50, true), 0);
	cs->ops_left = 2; /* the folder is synced, the first copy written, its sync does not come */
	cr_assert_eq(save_number(cs, 2, 50, true), -ERR_IO);
	cs_killed(cs);
	cs->sync_fails_in = 1;
	cr_assert_eq(meta_load(&cs->storage, "rec", KIND, 1, &version, &payload, &len, &e), -ERR_IO);
	cr_assert_not_null(strstr(e.text, "can't be made durable"), "%s", e.text);
	cs->sync_fails_in = 0;
	cr_assert_eq(load_number(cs, &rc), 2);
	cs_power_cut(cs);
	cr_assert_eq(load_number(cs, &rc), 2);
	drop_store(cs);
}

/* The first save was cut off before its file's name was durable: there is no other copy to go back to, but a power cut
 * could take the record away. */
Test(meta, the_first_record_is_made_durable_before_it_is_acted_on)
{
	struct crashstore *cs = new_store(11);
	struct err e = {0};
	void *payload = NULL;
	uint32_t version;
	size_t len;
	int rc;

	cs->ops_left = 4; /* made, written, synced, renamed */
	cr_assert_eq(save_number(cs, 1, 50, true), -ERR_IO);
	cs_killed(cs);
	cr_assert_not_null(cs_find(cs, "rec.a"));
	cs->ops_left = 1; /* the folder's sync, behind the file's */
	rc = meta_load(&cs->storage, "rec", KIND, 1, &version, &payload, &len, &e);
	cs_killed(cs);
	cr_assert_eq(rc, -ERR_IO, "%d", rc);
	cr_assert_eq(load_number(cs, &rc), 1);
	cs_power_cut(cs);
	cr_assert_eq(load_number(cs, &rc), 1);
	drop_store(cs);
}

/* 1, then 2, on a medium that tears a write anywhere. */
static struct crashstore *two_saved(uint64_t seed)
{
	struct crashstore *cs = new_store(seed);

	cs->tear_bytes = true;
	cr_assert_eq(save_number(cs, 1, 50, true), 0);
	cr_assert_eq(save_number(cs, 2, 50, true), 0);
	return cs;
}

static uint64_t loaded_until(struct crashstore *cs, long ops)
{
	uint64_t n;
	int rc;

	cs->ops_left = ops;
	n = load_number(cs, &rc);
	cs_killed(cs);
	return n;
}

/* The save's sync failed, and yet it is on the medium; what was put back over it was torn as the process was killed. A
 * load that can't write that copy anew must not be acted on: the failed record would come back. */
Test(meta, a_torn_copy_is_made_anew_before_the_record_is_acted_on)
{
	unsigned torn = 0, acted = 0;

	for (uint64_t seed = 1; seed <= 20; seed++)
		for (long ops = 0; ops < 8; ops++) {
			struct crashstore *cs = two_saved(seed);
			uint64_t n;
			int rc;

			cs->sync_fails_in = 1;
			cs->failed_sync_writes = true;
			cs->ops_left = 2; /* written, [not] synced, put back in part */
			cr_assert_lt(save_number(cs, 3, 50, true), 0);
			cs->sync_fails_in = 0;
			cs_killed(cs);
			n = loaded_until(cs, ops);
			torn += n == 0;
			acted += n != 0;
			if (n) {
				cs_power_cut(cs);
				cr_assert_eq(load_number(cs, &rc), n, "seed %d, %ld operations", (int)seed, ops);
			}
			drop_store(cs);
		}
	cr_assert_gt(torn, 10);
	cr_assert_gt(acted, 40);
}

/* A place of the disk under the torn copy that can't be written: it is removed, and the record is the other's. */
Test(meta, a_torn_copy_that_cant_be_written_is_removed)
{
	struct crashstore *cs = two_saved(5);
	struct cs_name *b;
	struct disk *d;
	int rc;

	cr_assert_eq(storage_open(&cs->storage, "rec.b", 0, &d), 0);
	cr_assert_eq(disk_write(d, 60, "torn", 4), 0);
	cr_assert_eq(disk_sync(d), 0);
	disk_close(d);
	cr_assert_not_null(b = cs_find(cs, "rec.b"));
	b->inode->tears = true;
	cr_assert_eq(load_number(cs, &rc), 2);
	cs_power_cut(cs);
	cr_assert_null(cs_find(cs, "rec.b"));
	cr_assert_eq(load_number(cs, &rc), 2);
	cr_assert_not_null(cs_find(cs, "rec.b"));
	cr_assert_eq(storage_unlink(&cs->storage, "rec.a"), 0);
	cr_assert_eq(load_number(cs, &rc), 2);
	drop_store(cs);
}

/* Where the copy that was written first can't be read, the other is the only one that is known: a save that fails
 * anywhere leaves the record before it or its own. */
Test(meta, a_save_beside_a_copy_that_cant_be_read_loses_no_record)
{
	static const char *const paths[] = {"rec.a", "rec.b"};
	unsigned failed = 0;

	for (uint64_t seed = 1; seed <= 120; seed++)
		for (int i = 0; i < 4; i++) {
			struct crashstore *cs = two_saved(seed);
			uint64_t n;
			int rc;

			cs->ops_left = (long)(seed % 12);
			make_unreadable(cs, paths[i & 1]);
			cs_find(cs, paths[!(i & 1)])->inode->tears = i & 2;
			cs->sync_fails_in = seed % 2 ? 3 : 0;
			rc = save_number(cs, 3, 50, true);
			failed += rc < 0;
			cs->sync_fails_in = 0;
			cs_power_cut(cs);
			for (unsigned k = 0; k < 2; k++)
				cs_find(cs, paths[k])->inode->tears = cs_find(cs, paths[k])->inode->unreadable = false;
			n = load_number(cs, &(int){0});
			cr_assert(n == 3 || (n == 2 && rc < 0), "seed %d, %d: %d, %s", (int)seed, i, (int)n,
				  err_name(rc));
			drop_store(cs);
		}
	cr_assert_gt(failed, 100);
	cr_assert_lt(failed, 480);
}

/* The save's sync failed, and yet it is on the medium; what was put back over it was not synced when the process was
 * killed. The next one has gone on from the old record: the failed one must not come back. */
Test(meta, a_record_whose_save_failed_stays_away)
{
	for (unsigned i = 0; i < 100; i++) {
		struct crashstore *cs = new_store(12 + i);
		unsigned left = i % 4;
		int rc;

		cs->failed_sync_writes = true;
		cr_assert_eq(save_number(cs, 1, 50, true), 0);
		cr_assert_eq(save_number(cs, 2, 50, true), 0);
		cs->sync_fails_in = 1;
		cs->ops_left = 2 + (long)left; /* written, synced, put back, synced */
		cr_assert_eq(save_number(cs, 3, 50, true), -ERR_IO);
		cs_killed(cs);
		cs->sync_fails_in = 0;
		uint64_t n = load_number(cs, &rc);
		cr_assert_eq(rc, 0);
		cs_power_cut(cs);
		cr_assert_eq(load_number(cs, &rc), n, "stopped after %u: %llu became another", left,
			     (unsigned long long)n);
		drop_store(cs);
	}
}
