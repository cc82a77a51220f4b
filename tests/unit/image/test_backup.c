/* Files that appear whole, seekable zstd, lists of extents, and the engine that makes backups of them. */
#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/bytes.h"
#include "image/apply.h"
#include "image/backup.h"
#include "image/store.h"
#include "image/zst.h"
#include "tests/unit/image/tmpdir.h"

#define MIB (UINT64_C(1) << 20)
#define POISON 0xa5

static struct tmpdir dir;
static struct err e;
static uint32_t seed = 1;

static void setup(void)
{
	tmpdir_make(&dir);
}

static void teardown(void)
{
	tmpdir_remove(&dir);
}

TestSuite(backup, .init = setup, .fini = teardown);

static uint32_t rnd(uint32_t n)
{
	seed = seed * 1664525U + 1013904223U;
	return (seed >> 8) % n;
}

static void says(const char *text)
{
	cr_assert_not_null(strstr(e.text, text), "\"%s\" is not in \"%s\"", text, e.text);
}

static uint8_t *slurp(const char *name, size_t *ret)
{
	size_t n = (size_t)tmpdir_size(&dir, name);
	uint8_t *p = malloc(n + 1);

	memset(p, POISON, n + 1);
	cr_assert_eq(tmpdir_read(&dir, name, p, n, 0), n);
	*ret = n;
	return p;
}

/* ---- newfile ---- */

Test(backup, a_new_file_has_no_name_before_it_is_whole)
{
	struct newfile f, g;

	for (unsigned flags = 0; flags <= NEWFILE_NAMED; flags += NEWFILE_NAMED) {
		char path[600];

		snprintf(path, sizeof(path), "%s", tmpdir_at(&dir, "f"));
		cr_assert_eq(newfile_make("backup to", path, flags, &f, &e), 0, "%s", e.text);
		cr_assert_eq(write(f.fd, "whole", 5), 5);
		cr_assert_not(tmpdir_has(&dir, "f"));
		if (flags) {
			cr_assert(tmpdir_has(&dir, "f.part"));
			cr_assert_eq(newfile_make("backup to", path, flags, &g, &e), -ERR_EXIST);
			says("f.part is in the way");
		}
		cr_assert_eq(newfile_commit(&f, &e), 0, "%s", e.text);
		newfile_drop(&f);
		cr_assert_eq(tmpdir_size(&dir, "f"), 5);
		cr_assert_not(tmpdir_has(&dir, "f.part"));
		cr_assert_eq(newfile_make("backup to", path, flags, &g, &e), -ERR_EXIST);
		says("the file exists; choose another name");
		/* Dropped, or met by a rival, it leaves nothing. */
		snprintf(path, sizeof(path), "%s", tmpdir_at(&dir, "r"));
		cr_assert_eq(newfile_make("backup to", path, flags, &f, &e), 0);
		newfile_drop(&f);
		cr_assert(!tmpdir_has(&dir, "r") && !tmpdir_has(&dir, "r.part"));
		cr_assert_eq(newfile_make("backup to", path, flags, &f, &e), 0);
		tmpdir_write(&dir, "r", "rival", 5, 0);
		cr_assert_eq(newfile_commit(&f, &e), -ERR_EXIST);
		newfile_drop(&f);
		cr_assert_eq(tmpdir_size(&dir, "r"), 5);
		cr_assert_not(tmpdir_has(&dir, "r.part"));
		cr_assert_eq(unlink(tmpdir_at(&dir, "r")), 0);
		cr_assert_eq(unlink(tmpdir_at(&dir, "f")), 0);
		cr_assert_eq(newfile_make("backup to", tmpdir_at(&dir, "none/f"), flags, &f, &e), -ERR_FAILED);
		says("its folder must exist");
		cr_assert_eq(newfile_make("backup to", tmpdir_at(&dir, ""), flags, &f, &e), -ERR_EXIST);
	}
}

/* ---- zst ---- */

/* Data, zeroes that are a frame or more, and a last frame that is short. */
#define IMAGE_SIZE (7 * MIB + 4096 + 512)
static uint8_t image[IMAGE_SIZE];

static void make_image(void)
{
	memset(image, 0, sizeof(image));
	for (size_t i = 0; i < MIB / 2; i++)
		image[i] = (uint8_t)rnd(256); /* does not compress */
	memset(image + 3 * MIB + 100, 7, MIB);
	memset(image + 5 * MIB, 0, MIB);
	memset(image + sizeof(image) - 300, 9, 300);
}

static void write_zst(const char *name, const uint8_t *data, uint64_t size)
{
	struct zst_writer *w;
	int fd = open(tmpdir_at(&dir, name), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	cr_assert_geq(fd, 0);
	cr_assert_eq(zst_writer_new(fd, size, &w), 0);
	while (zst_writer_at(w) < size) {
		uint64_t at = zst_writer_at(w), n = min_u64(zst_writer_unit(w), size - at);
		bool zero = data[at] == 0 && memcmp(data + at, data + at + 1, n - 1) == 0;

		cr_assert_eq(zero ? zst_writer_put_zeroes(w) : zst_writer_put(w, data + at, n), 0);
		cr_assert_eq(zst_writer_at(w), at + n);
	}
	cr_assert_eq(zst_writer_end(w), 0);
	zst_writer_free(w);
	cr_assert_eq(close(fd), 0);
}

static int open_zst(const char *name, struct disk **ret)
{
	struct disk *file;

	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, name), STORAGE_RDONLY, &file), 0);
	e = (struct err){0};
	return disk_zst_open(file, "f.zst", ret, &e);
}

Test(backup, seekable_zstd_goes_around)
{
	struct disk *d;
	static uint8_t buf[IMAGE_SIZE];
	uint64_t size;
	char command[1500];

	make_image();
	write_zst("f.zst", image, sizeof(image));
	cr_assert_eq(open_zst("f.zst", &d), 0, "%s", e.text);
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, sizeof(image));
	memset(buf, POISON, sizeof(buf));
	cr_assert_eq(disk_read(d, 0, buf, sizeof(buf)), 0);
	cr_assert_eq(memcmp(buf, image, sizeof(buf)), 0);
	for (unsigned i = 0; i < 300; i++) {
		uint64_t off = rnd(sizeof(image)), len = 1 + rnd(i % 10 ? 5000 : 3 * MIB);

		memset(buf, POISON, sizeof(buf));
		len = min_u64(len, sizeof(image) - off);
		cr_assert_eq(disk_read(d, off, buf, len), 0);
		cr_assert_eq(memcmp(buf, image + off, len), 0);
		cr_assert(len == sizeof(buf) || buf[len] == POISON);
	}
	/* Past the end there are zeroes; whole frames of zeroes are holes, found whatever was read before. */
	memset(buf, POISON, 1024);
	cr_assert_eq(disk_read(d, sizeof(image) - 512, buf, 1024), 0);
	cr_assert_eq(memcmp(buf, image + sizeof(image) - 512, 512), 0);
	cr_assert(buf[512] == 0 && buf[1023] == 0);
	static const bool data[] = {true, false, false, true, true, false, false, true};
	for (unsigned turn = 0; turn < 2; turn++)
		for (uint64_t i = 0; i < 8; i++) {
			struct extent x;
			uint64_t f = turn ? 7 - i : i;

			cr_assert_eq(disk_extent(d, f * MIB + 5, sizeof(image), &x), 0);
			cr_assert_eq(x.off, f * MIB + 5);
			cr_assert_eq(x.off + x.len, min_u64((f + 1) * MIB, sizeof(image)));
			cr_assert_eq(x.data, data[f], "%u", (unsigned)f);
		}
	cr_assert_eq(disk_write(d, 0, buf, 512), -ERR_PERM);
	cr_assert_eq(disk_set_size(d, 512), -ERR_PERM);
	disk_close(d);
	/* zstd's own tool reads it. */
	snprintf(command, sizeof(command), "zstd -dqf %s -o %s", tmpdir_at(&dir, "f.zst"), tmpdir_at(&dir, "raw"));
	cr_assert_eq(system(command), 0);
	cr_assert_eq(tmpdir_size(&dir, "raw"), (off_t)sizeof(image));
	cr_assert_eq(tmpdir_read(&dir, "raw", buf, sizeof(buf), 0), sizeof(buf));
	cr_assert_eq(memcmp(buf, image, sizeof(buf)), 0);
}

static void put_file(const char *name, const uint8_t *p, size_t n)
{
	(void)unlink(tmpdir_at(&dir, name));
	tmpdir_write(&dir, name, p, n, 0);
}

/* Refused when opened or read; -1: read as what it should be, 1: as something else. */
static int read_back(const char *name, const uint8_t *expect, size_t size)
{
	uint8_t *buf = malloc(size);
	struct disk *d;
	uint64_t now = 0;
	int rc = open_zst(name, &d);

	if (rc == 0) {
		memset(buf, POISON, size);
		cr_assert_eq(disk_get_size(d, &now), 0);
		rc = disk_read(d, 0, buf, size);
		if (rc == 0)
			rc = now == size && memcmp(buf, expect, size) == 0 ? -1 : 1;
		disk_close(d);
	}
	free(buf);
	return rc;
}

Test(backup, a_damaged_zst_is_refused_and_never_misread)
{
	const size_t size = 2 * MIB + 512;
	unsigned harmless = 0;
	size_t n;

	memset(image, 3, size);
	for (size_t i = 0; i < 600; i++)
		image[i * 3000] = (uint8_t)rnd(256);
	write_zst("f.zst", image, size);
	uint8_t *whole = slurp("f.zst", &n), *p = malloc(n + 64);

	cr_assert_lt(n, 10000);
	cr_assert_eq(read_back("f.zst", image, size), -1);
	for (size_t i = 0; i < n; i++) { /* cut off */
		put_file("cut", whole, i);
		cr_assert_leq(read_back("cut", image, size), -2, "%zu of %zu", i, n);
	}
	for (size_t i = 0; i < n; i++) { /* a flipped bit */
		memcpy(p, whole, n);
		p[i] ^= (uint8_t)(1U << rnd(8));
		put_file("flip", p, n);
		int rc = read_back("flip", image, size);
		cr_assert_neq(rc, 1, "byte %zu of %zu", i, n);
		harmless += rc == -1;
	}
	cr_assert_leq(harmless, 8, "%u", harmless);
	/* Tables that ask for much. */
	memcpy(p, whole, n);
	put_u32(p + n - 9, UINT32_MAX);
	put_file("flip", p, n);
	cr_assert_eq(read_back("flip", image, size), -ERR_LIMIT);
	memcpy(p, whole, n);
	put_u32(p + n - 9 - 4, 0x40000000);
	put_file("flip", p, n);
	cr_assert_eq(read_back("flip", image, size), -ERR_LIMIT);
	says("can be read at most");
	/* A table for other frames: sizes that add up, but are not theirs. */
	memcpy(p, whole, n);
	for (unsigned i = 0; i < 2; i++) {
		uint8_t *entry = p + n - 9 - (3 - i) * 8;
		put_u32(entry + 4, get_u32(entry + 4) + (i ? 512U : -512U));
	}
	put_file("flip", p, n);
	cr_assert_eq(read_back("flip", image, size), -ERR_CORRUPT);
	/* Something else's zstd. */
	put_file("plain", whole, n - (9 + 3 * 8 + 8));
	cr_assert_eq(read_back("plain", image, size), -ERR_NOTSUP);
	says("not seekable");
	free(whole);
	free(p);
}

/* ---- lists of extents ---- */

static int open_list(struct extentlist **ret)
{
	e = (struct err){0};
	return extentlist_open("import v", tmpdir_at(&dir, "t"), ret, &e);
}

static const char good_head[] =
    "{\"format\":\"repfs-extents\",\"version\":1,\"volume\":\"v\",\"uuid\":"
    "\"000102030405060708090a0b0c0d0e0f\",\"size\":65536,\"mode\":\"incremental\",\"target\":\"raw\","
    "\"since\":3,\"checkpoint\":7,\"extents\":2,\"bytes\":8192}\n";

static int try_list(const char *head, const char *extents)
{
	char text[4000];
	struct extentlist *l;
	int n = snprintf(text, sizeof(text), "%s%s", head, extents);

	put_file("t.extents", (const uint8_t *)text, (size_t)n);
	int rc = open_list(&l);
	if (rc == 0)
		extentlist_close(l);
	return rc;
}

Test(backup, a_list_of_extents_is_read_whole_or_not_at_all)
{
	static const char good[] = "{\"offset\":0,\"length\":4096}\n{\"offset\":8192,\"length\":4096}\n";
	static const char *const bad[] = {
	    "{\"offset\":0,\"length\":4096}\n",
	    "{\"offset\":0,\"length\":4096}\n{\"offset\":8192,\"length\":4096}",
	    "{\"offset\":8192,\"length\":4096}\n{\"offset\":0,\"length\":4096}\n",
	    "{\"offset\":0,\"length\":4096}\n{\"offset\":4095,\"length\":4096}\n",
	    "{\"offset\":0,\"length\":8192}\n{\"offset\":8192,\"length\":0}\n",
	    "{\"offset\":0,\"length\":4096}\n{\"offset\":65536,\"length\":4096}\n",
	    "{\"offset\":0,\"length\":4096}\n{\"offset\":8192,\"length\":9223372036854775807}\n",
	    "{\"offset\":-1,\"length\":4096}\n{\"offset\":8192,\"length\":4096}\n",
	    "{\"offset\":0,\"length\":4096}\n{\"offset\":8192,\"length\":4095}\n",
	    "{\"offset\":0,\"length\":4096}\nnonsense\n",
	    "{\"offset\":0,\"length\":2048}\n{\"offset\":2048,\"length\":2048}\n{\"offset\":8192,\"length\":4096}\n",
	};
	struct extentlist *l;
	struct range r;

	cr_assert_eq(try_list(good_head, good), 0, "%s", e.text);
	cr_assert_eq(open_list(&l), 0);
	cr_assert_eq(extentlist_head(l)->size, 65536);
	cr_assert_eq(extentlist_head(l)->since, 3);
	cr_assert_eq(extentlist_head(l)->uuid[15], 15);
	cr_assert_eq(extentlist_next(l, &r, &e), 1);
	cr_assert(r.off == 0 && r.len == 4096);
	cr_assert_eq(extentlist_next(l, &r, &e), 1);
	cr_assert(r.off == 8192 && r.len == 4096);
	cr_assert_eq(extentlist_next(l, &r, &e), 0);
	extentlist_close(l);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		cr_assert_eq(try_list(good_head, bad[i]), -ERR_CORRUPT, "%zu", i);
	cr_assert_eq(try_list("", ""), -ERR_CORRUPT);
	cr_assert_eq(try_list("{}\n", good), -ERR_CORRUPT);
	cr_assert_eq(try_list("{\"format\":\"repfs-extents\",\"version\":2}\n", good), -ERR_VERSION);
	char *longer = malloc(3000);
	memset(longer, ' ', 2999);
	longer[2999] = 0;
	cr_assert_eq(try_list(good_head, longer), -ERR_CORRUPT);
	free(longer);
	cr_assert_eq(unlink(tmpdir_at(&dir, "t.extents")), 0);
	cr_assert_eq(open_list(&l), -ERR_NOENT);
	says("there is no ");
}

/* ---- the engine ---- */

#define VOL_SIZE (4 * MIB + 4096 + 512)
static uint8_t now[VOL_SIZE], then[VOL_SIZE];
static struct storage *storage;
static struct volume *v;

static void open_vol(void)
{
	const struct volume_open_args args = {.name = "v", .size = VOL_SIZE, .durability = DURABILITY_PROCESS};

	cr_assert_eq(mkdir(tmpdir_at(&dir, "s"), 0700), 0);
	cr_assert_eq(storage_posix_open(tmpdir_at(&dir, "s"), &storage), 0);
	cr_assert_eq(volume_create(storage, "v", VOL_SIZE, DURABILITY_PROCESS, &e), 0, "%s", e.text);
	cr_assert_eq(volume_open(storage, &args, &v, &e), 0, "%s", e.text);
	memset(now, 0, sizeof(now));
}

static void close_vol(void)
{
	volume_close(v);
	storage_close(storage);
}

static void put(uint64_t off, uint64_t len, uint8_t byte)
{
	memset(now + off, byte, len);
	struct volume_req req = {.kind = VOLUME_WRITE, .off = off, .len = len, .buf = now + off};
	cr_assert_eq(volume_write(v, &req, 1), 0);
}

static void ckpt(uint64_t k)
{
	cr_assert_eq(volume_prepare(v, k, 0, &e), 0, "%s", e.text);
	volume_switch(v, k, 0);
	memcpy(then, now, sizeof(now));
}

/* Some writes, then checkpoint 1, then others. */
static void history(void)
{
	open_vol();
	put(0, 5 * 4096, 1);
	put(MIB + 100, 900, 2);
	put(2 * MIB, MIB, 3);
	put(VOL_SIZE - 512, 512, 4);
	ckpt(1);
	put(4096, 4096, 5);
	put(MIB, 3 * 4096, 6);
	put(3 * MIB + 5000, 10000, 7);
	put(VOL_SIZE - 100, 100, 8);
	put(2 * MIB + 8192, 4096, 0);
}

static void run(struct backup *b, const char *mode)
{
	struct backup_step s;
	struct extentlist_head h = {.volume = "v", .since = 1, .checkpoint = 2, .uuid = {9}};
	uint64_t done, total;
	int more;

	snprintf(h.mode, sizeof(h.mode), "%s", mode);
	while ((more = backup_step(b, &s)) > 0)
		;
	cr_assert_eq(more, 0);
	backup_progress(b, &done, &total);
	cr_assert_eq(done, total);
	cr_assert_eq(backup_finish(b, &h, &e), 0, "%s", e.text);
	backup_close(b);
}

static struct backup *start(const char *name, uint64_t k, bool list)
{
	struct backup_args a = {.what = "backup to",
				.volume = v,
				.layer = k ? LAYER_IMAGE : LAYER_DISK,
				.ckpt = k,
				.size = VOL_SIZE,
				.path = tmpdir_at(&dir, name),
				.format = backup_format_of(name),
				.list = list};
	struct backup *b;

	cr_assert_eq(backup_open(&a, &b, &e), 0, "%s", e.text);
	return b;
}

/* The content of a raw or .zst target. */
static void expect(const char *name, const uint8_t *content)
{
	static uint8_t buf[VOL_SIZE];
	struct disk *d, *file;
	uint64_t size;

	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, name), STORAGE_RDONLY, &file), 0, "%s", name);
	if (backup_format_of(name) == BACKUP_ZST)
		cr_assert_eq(disk_zst_open(file, name, &d, &e), 0, "%s", e.text);
	else
		d = file;
	memset(buf, POISON, sizeof(buf));
	cr_assert_eq(disk_get_size(d, &size), 0);
	cr_assert_eq(size, VOL_SIZE);
	cr_assert_eq(disk_read(d, 0, buf, sizeof(buf)), 0);
	for (size_t i = 0; i < sizeof(buf); i++)
		cr_assert(buf[i] == content[i], "%s: byte %zu is %u, not %u", name, i, buf[i], content[i]);
	disk_close(d);
}

Test(backup, a_full_one_is_the_image_at_the_checkpoint)
{
	history();
	run(start("full", 1, false), "full");
	run(start("full.zst", 1, false), "full");
	run(start("disk.zst", 0, false), "full");
	expect("full", then);
	expect("full.zst", then);
	expect("disk.zst", now);
	cr_assert_leq(tmpdir_allocated(&dir, "full"), 2 * (off_t)MIB);
	cr_assert_not(tmpdir_has(&dir, "full.extents"));
	close_vol();
}

/* ranges of a list as bytes of a map */
static void list_map(const char *name, uint8_t *map, struct extentlist_head *h)
{
	struct extentlist *l;
	struct range r;
	uint64_t last = 0;
	int rc;

	cr_assert_eq(extentlist_open("test", tmpdir_at(&dir, name), &l, &e), 0, "%s", e.text);
	*h = *extentlist_head(l);
	memset(map, 0, h->size);
	while ((rc = extentlist_next(l, &r, &e)) == 1) {
		cr_assert(last == 0 || r.off > last, "extents that touch are one");
		memset(map + r.off, 1, r.len);
		last = range_end(r);
	}
	cr_assert_eq(rc, 0);
	extentlist_close(l);
}

static void select_add(void *arg, uint64_t off, uint64_t len)
{
	bitmap_set_range(arg, off >> BLOCK_SHIFT, units_of(off + len, BLOCK_SHIFT) - (off >> BLOCK_SHIFT));
}

static void select_changed(struct backup *b)
{
	struct bitmap bits;
	void *memory = calloc(1, bitmap_bytes(units_of(VOL_SIZE, BLOCK_SHIFT)));

	bitmap_init(&bits, units_of(VOL_SIZE, BLOCK_SHIFT), memory);
	cr_assert_eq(volume_changed(v, 1, 1, false, select_add, &bits), 0);
	backup_select(b, &bits, memory);
}

Test(backup, an_incremental_holds_what_changed_and_its_list)
{
	static const char *const names[] = {"inc", "inc.zst"};
	static uint8_t map[VOL_SIZE], expected[VOL_SIZE], at2[VOL_SIZE];
	struct extentlist_head h;

	history();
	ckpt(2);
	memcpy(at2, now, sizeof(now));
	put(0, VOL_SIZE, 0xee);
	memset(expected, 0, sizeof(expected));
	static const struct range changed[] = {
	    {4096, 4096}, {MIB, 12288}, {2 * MIB + 8192, 4096}, {3 * MIB + 4096, 12288}, {VOL_SIZE - 512, 512}};
	for (size_t i = 0; i < 5; i++)
		memcpy(expected + changed[i].off, at2 + changed[i].off, changed[i].len);
	for (unsigned i = 0; i < 2; i++) {
		struct backup *b = start(names[i], 2, true);

		select_changed(b);
		cr_assert_not(tmpdir_has(&dir, names[i]));
		run(b, "incremental");
		expect(names[i], expected);
		list_map(names[i], map, &h);
		cr_assert(h.size == VOL_SIZE && h.count == 5 && h.since == 1 && h.checkpoint == 2 && h.uuid[0] == 9);
		cr_assert_str_eq(h.mode, "incremental");
		for (size_t k = 0; k < 5; k++) {
			cr_assert_eq(memchr(map + changed[k].off, 0, changed[k].len), NULL);
			memset(map + changed[k].off, 0, changed[k].len);
		}
		cr_assert_eq(memchr(map, 1, sizeof(map)), NULL);
	}
	/* Zeroes that were written are data of the raw target: its ranges are the list's. */
	struct disk *d;
	struct extent x;
	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, "inc"), STORAGE_RDONLY, &d), 0);
	cr_assert_eq(disk_extent(d, 2 * MIB + 8192, VOL_SIZE, &x), 0);
	cr_assert(x.data && x.len == 4096);
	disk_close(d);
	close_vol();
}

Test(backup, several_selections_are_one_target)
{
	static uint8_t map[VOL_SIZE], expected[VOL_SIZE];
	struct backup_step s;
	struct extentlist_head h;
	struct backup *b;

	history();
	b = start("none", 1, true);
	memset(expected, 0, sizeof(expected));
	for (unsigned turn = 0; turn < 2; turn++) {
		struct bitmap bits;
		void *memory = calloc(1, bitmap_bytes(units_of(VOL_SIZE, BLOCK_SHIFT)));
		uint64_t off = turn ? MIB : 4096, len = turn ? 8192 : 4096;

		bitmap_init(&bits, units_of(VOL_SIZE, BLOCK_SHIFT), memory);
		select_add(&bits, off, len);
		memcpy(expected + off, then + off, len);
		backup_select(b, &bits, memory);
		while (backup_step(b, &s) > 0)
			;
	}
	run(b, "none");
	expect("none", expected);
	list_map("none", map, &h);
	cr_assert(h.count == 2 && h.bytes == 12288);
	close_vol();
}

/* A target that can't grow for a while. The limit is the process's: Criterion gives each test its own. */
static void limit(rlim_t size)
{
	struct rlimit r;

	cr_assert_eq(getrlimit(RLIMIT_FSIZE, &r), 0);
	r.rlim_cur = size;
	cr_assert_eq(setrlimit(RLIMIT_FSIZE, &r), 0);
}

Test(backup, a_step_that_failed_is_done_again)
{
	static const char *const names[] = {"full", "full.zst"};
	struct backup_step s;

	signal(SIGXFSZ, SIG_IGN);
	history();
	for (unsigned i = 0; i < 2; i++) {
		struct backup *b = start(names[i], 1, false);
		int more = 1;

		limit(i ? 100 : 2 * MIB);
		while ((more = backup_step(b, &s)) > 0)
			;
		cr_assert_eq(more, -ERR_IO, "%s: %d", names[i], more);
		cr_assert_eq(s.side, BACKUP_TARGET);
		cr_assert_eq(backup_step(b, &s), -ERR_IO);
		limit(RLIM_INFINITY);
		run(b, "full");
		expect(names[i], then);
	}
	/* A source that went: its checkpoint was dropped. */
	struct backup *b = start("gone", 1, false);
	volume_drop_through(v, 1);
	cr_assert_eq(backup_step(b, &s), -ERR_NOENT);
	cr_assert_eq(s.side, BACKUP_SOURCE);
	backup_close(b);
	cr_assert(!tmpdir_has(&dir, "gone") && !tmpdir_has(&dir, "gone.part"));
	close_vol();
}

Test(backup, a_stream_lists_exactly_what_was_written)
{
	static uint8_t map[VOL_SIZE], expected_map[VOL_SIZE], content[VOL_SIZE], data[64 << 10];
	struct extentlist_head h;

	for (unsigned turn = 0; turn < 12; turn++) {
		struct backup_args a = {.what = "backup to",
					.size = VOL_SIZE,
					.path = tmpdir_at(&dir, "stream"),
					.list = true,
					.flags = turn % 2 ? NEWFILE_NAMED : 0};
		struct extentlist_head about = {.volume = "v", .mode = "stream"};
		struct backup *b;

		cr_assert_eq(backup_open(&a, &b, &e), 0, "%s", e.text);
		memset(content, 0, sizeof(content));
		memset(expected_map, 0, sizeof(expected_map));
		for (unsigned i = 0; i < 40 * turn; i++) {
			uint64_t unit = turn % 3 == 0 ? 4096 : turn % 3 == 1 ? 512 : 1;
			uint64_t off = rnd((uint32_t)(VOL_SIZE / unit)) * unit;
			uint64_t len = min_u64((1 + rnd((uint32_t)(10000 / unit))) * unit, VOL_SIZE - off);
			bool zero = rnd(4) == 0;

			if (rnd(10) == 0) {
				len = min_u64(len, 512);
				off = VOL_SIZE - len;
			}
			memset(data, (int)(1 + rnd(255)), sizeof(data));
			memset(content + off, zero ? 0 : data[0], len);
			memset(expected_map + off, 1, len);
			cr_assert_eq(backup_write(b, off, len, zero ? NULL : data), 0);
		}
		cr_assert_not(tmpdir_has(&dir, "stream.extents"));
		cr_assert_eq(backup_finish(b, &about, &e), 0, "%s", e.text);
		backup_close(b);
		expect("stream", content);
		list_map("stream", map, &h);
		cr_assert_eq(memcmp(map, expected_map, sizeof(map)), 0, "turn %u", turn);
		cr_assert_eq(unlink(tmpdir_at(&dir, "stream")), 0);
		cr_assert_eq(unlink(tmpdir_at(&dir, "stream.extents")), 0);
	}
}

Test(backup, a_target_or_list_that_is_there_is_refused)
{
	struct backup_args a = {.what = "backup to", .size = VOL_SIZE, .path = tmpdir_at(&dir, "t"), .list = true};
	struct extentlist_head about = {.volume = "v", .mode = "stream"};
	struct backup *b;

	tmpdir_write(&dir, "t.extents", "x", 1, 0);
	cr_assert_eq(backup_open(&a, &b, &e), -ERR_EXIST);
	says("t.extents: the file exists");
	cr_assert_not(tmpdir_has(&dir, "t"));
	cr_assert_eq(unlink(tmpdir_at(&dir, "t.extents")), 0);
	tmpdir_write(&dir, "t", "x", 1, 0);
	cr_assert_eq(backup_open(&a, &b, &e), -ERR_EXIST);
	cr_assert_eq(unlink(tmpdir_at(&dir, "t")), 0);
	/* One that appears meanwhile is not replaced, and no list is left beside it. */
	cr_assert_eq(backup_open(&a, &b, &e), 0, "%s", e.text);
	tmpdir_write(&dir, "t", "x", 1, 0);
	cr_assert_eq(backup_finish(b, &about, &e), -ERR_EXIST);
	backup_close(b);
	cr_assert_eq(tmpdir_size(&dir, "t"), 1);
	cr_assert_not(tmpdir_has(&dir, "t.extents"));
}

/* ---- restoring ---- */

static int import(struct store *st, const char *volume, const char *file, const char *format)
{
	struct store_import_args args = {.volume = volume, .file = file, .format = format};

	return store_import(st, &args, NULL, NULL, NULL, &e);
}

Test(backup, a_zst_is_imported)
{
	struct store *st;

	make_image();
	write_zst("f.zst", image, sizeof(image));
	cr_assert_eq(store_open(tmpdir_at(&dir, "st"), STORE_CREATE, -1, &st, &e), 0, "%s", e.text);
	cr_assert_eq(import(st, "a", tmpdir_at(&dir, "f.zst"), NULL), 0, "%s", e.text);
	size_t n;
	uint8_t *p = slurp("st/volumes/a/disk.raw", &n);
	cr_assert_eq(n, sizeof(image));
	cr_assert_eq(memcmp(p, image, n), 0);
	free(p);
	cr_assert_leq(tmpdir_allocated(&dir, "st/volumes/a/disk.raw"), 2 * (off_t)MIB);
	/* Its bytes as they are, if asked. */
	p = slurp("f.zst", &n);
	put_file("odd", p, n / 512 * 512);
	cr_assert_eq(import(st, "b", tmpdir_at(&dir, "odd"), "raw"), 0, "%s", e.text);
	cr_assert_eq(tmpdir_size(&dir, "st/volumes/b/disk.raw"), (off_t)(n / 512 * 512));
	/* Cut off, damaged, or none: nothing is left. */
	cr_assert_eq(import(st, "c", tmpdir_at(&dir, "odd"), NULL), -ERR_NOTSUP);
	says("import c: ");
	p[5000] ^= 1;
	put_file("odd", p, n);
	cr_assert_eq(import(st, "c", tmpdir_at(&dir, "odd"), NULL), -ERR_CORRUPT);
	says("import c: reading ");
	put_file("odd", image, 4096);
	cr_assert_eq(import(st, "c", tmpdir_at(&dir, "odd"), "zst"), -ERR_NOTSUP);
	cr_assert_not(tmpdir_has(&dir, "st/volumes/c"));
	free(p);
	store_close(st);
}

static int try_apply(struct store *st, const char *file)
{
	e = (struct err){0};
	return store_apply(st, "r", tmpdir_at(&dir, file), NULL, NULL, NULL, &e);
}

static void expect_disk(const uint8_t *content)
{
	size_t n;
	uint8_t *p = slurp("st/volumes/r/disk.raw", &n);

	cr_assert_eq(n, VOL_SIZE);
	for (size_t i = 0; i < n; i++)
		cr_assert(p[i] == content[i], "byte %zu is %u, not %u", i, p[i], content[i]);
	free(p);
}

Test(backup, an_incremental_goes_onto_its_base)
{
	static const char *const names[] = {"inc", "inc.zst"};
	static uint8_t at1[VOL_SIZE];
	struct store *st;
	struct backup *b;

	char full[600];
	snprintf(full, sizeof(full), "%s", tmpdir_at(&dir, "full"));
	history();
	memcpy(at1, then, sizeof(at1));
	ckpt(2);
	run(start("full", 1, false), "full");
	for (unsigned i = 0; i < 2; i++) {
		b = start(names[i], 2, true);
		select_changed(b);
		run(b, "incremental");
	}
	close_vol();
	cr_assert_eq(store_open(tmpdir_at(&dir, "st"), STORE_CREATE, -1, &st, &e), 0, "%s", e.text);
	cr_assert_eq(try_apply(st, "inc"), -ERR_NOENT);
	says("import r: there is no such volume");
	for (unsigned i = 0; i < 2; i++) {
		struct extentlist_head h;
		const struct store_import_args args = {.volume = "r", .file = full};

		cr_assert_eq(store_import(st, &args, NULL, NULL, NULL, &e), 0, "%s", e.text);
		expect_disk(at1);
		cr_assert_eq(store_apply(st, "r", tmpdir_at(&dir, names[i]), NULL, NULL, &h, &e), 0, "%s", e.text);
		expect_disk(now);
		cr_assert(h.since == 1 && h.checkpoint == 2 && h.bytes > 0);
		cr_assert_str_eq(h.target, i ? "zst" : "raw");
		cr_assert_eq(try_apply(st, names[i]), 0); /* again */
		expect_disk(now);
		cr_assert_eq(store_delete_volume(st, "r", &e), 0);
	}
	/* What does not check out changes nothing. */
	const struct store_import_args args = {.volume = "r", .file = full};
	cr_assert_eq(store_import(st, &args, NULL, NULL, NULL, &e), 0, "%s", e.text);
	size_t n;
	uint8_t *p = slurp("inc.zst", &n);
	unsigned harmless = 0;
	for (size_t at = 0; at < n; at += 1 + n / 200) {
		p[at] ^= 0x10;
		put_file("inc.zst", p, n);
		int rc = try_apply(st, "inc.zst");
		expect_disk(rc ? at1 : now);
		if (rc == 0) { /* a bit that means nothing */
			harmless++;
			cr_assert_eq(store_delete_volume(st, "r", &e), 0);
			cr_assert_eq(store_import(st, &args, NULL, NULL, NULL, &e), 0);
		}
		p[at] ^= 0x10;
	}
	cr_assert_leq(harmless, 3);
	put_file("inc.zst", p, n - 1);
	cr_assert_eq(try_apply(st, "inc.zst"), -ERR_NOTSUP);
	put_file("inc.zst", p, n);
	free(p);
	cr_assert_eq(truncate(tmpdir_at(&dir, "inc"), VOL_SIZE - 512), 0);
	cr_assert_eq(try_apply(st, "inc"), -ERR_CORRUPT);
	says("they are not of one backup");
	cr_assert_eq(try_apply(st, "full"), -ERR_NOENT);
	says("full.extents");
	expect_disk(at1);
	cr_assert_eq(store_delete_volume(st, "r", &e), 0);
	cr_assert_eq(store_create_volume(st, "r", VOL_SIZE - 512, NULL, &e), 0, "%s", e.text);
	cr_assert_eq(try_apply(st, "inc.zst"), -ERR_STATE);
	says("the backup is of a volume of ");
	/* What differs from a peer is the daemon's to know. */
	struct repl_meta *m;
	cr_assert_eq(store_load_group(st, "r", &m, &e), 0);
	m->has_peer = true;
	cr_assert_eq(store_save_group(st, m, &e), 0, "%s", e.text);
	free(m);
	cr_assert_eq(try_apply(st, "inc.zst"), -ERR_STATE);
	says("has a peer");
	store_close(st);
}
