/* The reader of qcow images on images made by hand: what qemu-img never writes, byte for byte, and each fault by its
 * message. Whole images that it does write are compared in tests/e2e/test_56_qcow.py. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "core/bytes.h"
#include "image/qcow.h"
#include "image/source.h"
#include "tests/unit/image/tmpdir.h"

#define BITS 12U
#define CLUSTER (1U << BITS)
#define COPIED (UINT64_C(1) << 63)
#define COMPRESSED (UINT64_C(1) << 62)
#define FILE_CLUSTERS 16U

static struct tmpdir dir;
static struct err e;

static void make_dir(void)
{
	tmpdir_make(&dir);
	memset(&e, 0, sizeof(e));
}

static void remove_dir(void)
{
	tmpdir_remove(&dir);
}

TestSuite(qcow, .init = make_dir, .fini = remove_dir);

/* ---- making images ---- */

static void put_be32(uint8_t *p, uint32_t v)
{
	for (int i = 0; i < 4; i++)
		p[i] = (uint8_t)(v >> (24 - 8 * i));
}

static void put_be64(uint8_t *p, uint64_t v)
{
	put_be32(p, (uint32_t)(v >> 32));
	put_be32(p + 4, (uint32_t)v);
}

/* Cluster 0 header, 1 L1 table, 2 refcount table, 3 L2 table, from 4 data: cluster c filled with the byte c. */
struct image {
	uint8_t file[FILE_CLUSTERS * CLUSTER];
	size_t len;
	unsigned version;
};

static void image_init(struct image *m, unsigned version, uint64_t size)
{
	memset(m, 0, sizeof(*m));
	m->version = version;
	m->len = sizeof(m->file);
	memcpy(m->file, "QFI\xfb", 4);
	put_be32(m->file + 4, version);
	if (version == 1) {
		put_be64(m->file + 24, size);
		m->file[32] = BITS;
		m->file[33] = BITS - 3;
		put_be64(m->file + 40, CLUSTER);
	} else {
		put_be32(m->file + 20, BITS);
		put_be64(m->file + 24, size);
		put_be32(m->file + 36, 1);
		put_be64(m->file + 40, CLUSTER);
		put_be64(m->file + 48, UINT64_C(2) * CLUSTER);
		put_be32(m->file + 56, 1);
	}
	if (version == 3) {
		put_be32(m->file + 96, 4);
		put_be32(m->file + 100, 104);
	}
	put_be64(m->file + CLUSTER, UINT64_C(3) * CLUSTER | (version == 1 ? 0 : COPIED));
	for (unsigned c = 4; c < FILE_CLUSTERS; c++)
		memset(m->file + (size_t)c * CLUSTER, (int)c, CLUSTER);
}

static void image_entry(struct image *m, unsigned i, uint64_t entry)
{
	put_be64(m->file + 3U * CLUSTER + (size_t)8 * i, entry);
}

/* Raw deflate of a cluster of `byte` at `at`; returns the entry. fill: bytes that it inflates to. */
static uint64_t image_compress(struct image *m, size_t at, uint8_t byte, size_t fill, size_t *ret_len)
{
	uint8_t plain[CLUSTER];
	z_stream z = {0};

	for (size_t i = 0; i < sizeof(plain); i++)
		plain[i] = (uint8_t)(byte + i % 7);
	cr_assert_eq(deflateInit2(&z, 9, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
	z.next_in = plain;
	z.avail_in = (uInt)fill;
	z.next_out = m->file + at;
	z.avail_out = CLUSTER;
	cr_assert_eq(deflate(&z, Z_FINISH), Z_STREAM_END);
	*ret_len = CLUSTER - z.avail_out;
	(void)deflateEnd(&z);
	if (m->version == 1)
		return COPIED | (uint64_t)*ret_len << (63 - BITS) | at;
	uint64_t sectors = (at % 512 + *ret_len + 511) / 512;

	return COMPRESSED | (sectors - 1) << (62 - (BITS - 8)) | at;
}

static int open_as(const struct image *m, const char *name, struct disk **ret, struct qcow_info *info)
{
	struct disk *file;

	(void)unlink(tmpdir_at(&dir, name));
	tmpdir_write(&dir, name, m->file, m->len, 0);
	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, name), STORAGE_RDONLY, &file), 0);
	int rc = qcow_open(file, name, ret, info, &e);

	return rc < 0 ? rc : qcow_attach(*ret, NULL, 1U << 20);
}

static struct disk *open_image(const struct image *m)
{
	struct qcow_info info;
	struct disk *d;

	cr_assert_eq(open_as(m, "img", &d, &info), 0, "%s", e.text);
	return d;
}

static void says(const char *words)
{
	cr_assert_not_null(strstr(e.text, words), "\"%s\" is not in \"%s\"", words, e.text);
}

static void refused(const struct image *m, int code, const char *words)
{
	struct qcow_info info;
	struct disk *d;

	e.text[0] = '\0';
	cr_assert_eq(open_as(m, "img", &d, &info), -code, "%s", e.text);
	says(words);
	cr_assert_eq(strncmp(e.text, "img: ", 5), 0, "%s", e.text);
}

/* Every byte of [off, off + len) is `byte`, read in one go and byte by byte at its edges. */
static void expect(struct disk *d, uint64_t off, size_t len, int byte)
{
	uint8_t *buf = malloc(len);

	memset(buf, ~byte, len);
	cr_assert_eq(disk_read(d, off, buf, len), 0, "at %llu", (unsigned long long)off);
	for (size_t i = 0; i < len; i++)
		cr_assert_eq(buf[i], (uint8_t)byte, "byte %llu is %u", (unsigned long long)(off + i), buf[i]);
	free(buf);
}

static void expect_compressed(struct disk *d, uint64_t off, uint8_t byte)
{
	uint8_t buf[CLUSTER];

	memset(buf, 0xa5, sizeof(buf));
	cr_assert_eq(disk_read(d, off, buf, sizeof(buf)), 0);
	for (size_t i = 0; i < sizeof(buf); i++)
		cr_assert_eq(buf[i], (uint8_t)(byte + i % 7));
}

/* A read there fails, and why. */
static void broken(struct disk *d, uint64_t off, const char *words)
{
	uint8_t byte;
	int rc = disk_read(d, off, &byte, 1);

	cr_assert_eq(rc, -ERR_CORRUPT);
	cr_assert_eq(qcow_explain(d, off, rc, &e), rc);
	says(words);
	says("img: byte ");
}

/* ---- clusters ---- */

Test(qcow, clusters_of_each_kind)
{
	for (unsigned version = 1; version <= 3; version++) {
		static struct image m;
		struct extent x;
		size_t len;

		image_init(&m, version, UINT64_C(8) * CLUSTER);
		image_entry(&m, 1, UINT64_C(5) * CLUSTER);
		image_entry(&m, 2, UINT64_C(4) * CLUSTER);
		image_entry(&m, 3, image_compress(&m, UINT64_C(6) * CLUSTER + 77, 0x30, CLUSTER, &len));
		if (version == 3) {
			image_entry(&m, 4, 1);			       /* zero, no cluster */
			image_entry(&m, 5, UINT64_C(7) * CLUSTER | 1); /* zero over data */
		}
		struct disk *d = open_image(&m);
		expect(d, 0, CLUSTER, 0);
		expect(d, CLUSTER, CLUSTER, 5);
		expect(d, UINT64_C(2) * CLUSTER, CLUSTER, 4);
		expect_compressed(d, UINT64_C(3) * CLUSTER, 0x30);
		expect_compressed(d, UINT64_C(3) * CLUSTER, 0x30); /* out of the cache */
		expect(d, UINT64_C(4) * CLUSTER, 4U * CLUSTER, 0);
		expect(d, UINT64_C(8) * CLUSTER, 100, 0); /* past the end */
		cr_assert_eq(qcow_check(d, &e), 0, "%s", e.text);
		/* Neighbours of one kind are one extent. */
		cr_assert_eq(disk_extent(d, 10, UINT64_C(8) * CLUSTER, &x), 0);
		cr_assert(!x.data && x.off == 10 && x.len == CLUSTER - 10);
		cr_assert_eq(disk_extent(d, CLUSTER, UINT64_C(8) * CLUSTER, &x), 0);
		cr_assert(x.data && x.len == 3U * CLUSTER);
		cr_assert_eq(disk_extent(d, UINT64_C(4) * CLUSTER, UINT64_C(8) * CLUSTER, &x), 0);
		cr_assert(!x.data && x.len == 4U * CLUSTER);
		/* Nothing can be written to it. */
		cr_assert_eq(disk_write(d, 0, "x", 1), -ERR_PERM);
		cr_assert_eq(disk_zero(d, 0, 1, true), -ERR_PERM);
		cr_assert_eq(disk_set_size(d, 512), -ERR_PERM);
		disk_close(d);
	}
}

Test(qcow, a_short_last_cluster)
{
	static struct image m;
	size_t len;

	/* The disk ends in the middle of a cluster, and the file where the disk does. */
	image_init(&m, 3, CLUSTER + 1024);
	image_entry(&m, 1, UINT64_C(15) * CLUSTER);
	m.len = 15U * CLUSTER + 1024;
	struct disk *d = open_image(&m);
	expect(d, CLUSTER, 1024, 15);
	expect(d, CLUSTER + 1024, 5000, 0);
	disk_close(d);
	m.len--;
	d = open_image(&m);
	broken(d, CLUSTER, "past the end of the file");
	disk_close(d);

	/* Compressed data counts in sectors: the last one need not be there, its data has to. */
	image_init(&m, 2, UINT64_C(2) * CLUSTER);
	image_entry(&m, 0, image_compress(&m, UINT64_C(15) * CLUSTER, 0x41, CLUSTER, &len));
	m.len = 15U * CLUSTER + len;
	d = open_image(&m);
	expect_compressed(d, 0, 0x41);
	disk_close(d);
	m.len -= 3;
	d = open_image(&m);
	broken(d, 100, "does not inflate to a whole cluster");
	disk_close(d);
}

Test(qcow, faults_of_entries)
{
	static const struct {
		unsigned version;
		uint64_t entry;
		const char *words;
	} cases[] = {
	    {2, UINT64_C(4) * CLUSTER | 1, "which version 2 does not know"},
	    {3, UINT64_C(4) * CLUSTER + 512, "not a multiple of the cluster size"},
	    {3, (UINT64_C(4) * CLUSTER + 512) | 1, "not a multiple of the cluster size"},
	    {3, UINT64_C(16) * CLUSTER, "its data lies past the end of the file"},
	    {2, UINT64_C(1) << 50, "its data lies past the end of the file"},
	    {2, COMPRESSED | UINT64_C(16) * CLUSTER, "compressed data lies past the end"},
	    {2, COMPRESSED, "compressed data lies past the end"},
	    {1, UINT64_C(4) * CLUSTER + 100, "not a multiple of 512"},
	    {1, UINT64_C(16) * CLUSTER, "its data lies past the end of the file"},
	    {1, COPIED | UINT64_C(100) << (63 - BITS) | (UINT64_C(16) * CLUSTER - 50), "compressed data lies past"},
	    {2, COMPRESSED | UINT64_C(4) * CLUSTER, "does not inflate"},
	};
	static struct image m;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		bool inflates = strstr(cases[i].words, "inflate") != NULL;

		image_init(&m, cases[i].version, UINT64_C(8) * CLUSTER);
		image_entry(&m, 1, UINT64_C(5) * CLUSTER);
		image_entry(&m, 2, cases[i].entry);
		struct disk *d = open_image(&m);
		expect(d, CLUSTER, CLUSTER, 5); /* the others are read */
		broken(d, UINT64_C(2) * CLUSTER + 5, cases[i].words);
		says("8192"); /* where its cluster begins */
		cr_assert_eq(qcow_check(d, &e), inflates ? 0 : -ERR_CORRUPT);
		disk_close(d);
	}
	/* A stream that is right and too short: what is missing is not made up. */
	size_t len;
	image_init(&m, 3, UINT64_C(8) * CLUSTER);
	image_entry(&m, 0, image_compress(&m, UINT64_C(4) * CLUSTER, 0x41, CLUSTER - 1, &len));
	struct disk *d = open_image(&m);
	broken(d, 0, "does not inflate to a whole cluster");
	disk_close(d);
}

Test(qcow, faults_of_tables)
{
	static struct image m;

	image_init(&m, 3, UINT64_C(8) * CLUSTER);
	put_be64(m.file + CLUSTER, UINT64_C(3) * CLUSTER + 512);
	struct disk *d = open_image(&m);
	broken(d, 0, "L2 table is not a multiple");
	disk_close(d);
	put_be64(m.file + CLUSTER, UINT64_C(16) * CLUSTER);
	d = open_image(&m);
	broken(d, 0, "its L2 table lies past the end of the file");
	disk_close(d);

	/* 20 tables of one cluster each can't be in a file of 16. */
	image_init(&m, 3, UINT64_C(20) * 512 * CLUSTER);
	put_be32(m.file + 36, 20);
	for (unsigned i = 0; i < 20; i++)
		put_be64(m.file + CLUSTER + (size_t)8 * i, UINT64_C(3) * CLUSTER);
	refused(&m, ERR_CORRUPT, "more L2 tables than the file has room for");
	for (unsigned i = 10; i < 20; i++)
		put_be64(m.file + CLUSTER + (size_t)8 * i, 0);
	d = open_image(&m);
	cr_assert_eq(qcow_check(d, &e), 0, "%s", e.text);
	disk_close(d);
}

Test(qcow, headers_cut_short_and_names)
{
	static struct image m;
	struct qcow_info info;
	struct disk *d;

	for (unsigned version = 1; version <= 3; version++) {
		static const size_t enough[] = {0, 48, 72, 104};

		image_init(&m, version, UINT64_C(8) * CLUSTER);
		for (m.len = 8; m.len < enough[version]; m.len += 7)
			refused(&m, ERR_CORRUPT, "header is cut short");
		m.len = 2;
		refused(&m, ERR_NOTSUP, "magic");
	}
	/* An unknown feature by the name that the image has for it, which is untrusted too. */
	image_init(&m, 3, CLUSTER);
	put_be64(m.file + 72, UINT64_C(1) << 33);
	put_be32(m.file + 104, 0x6803f857);
	put_be32(m.file + 108, 96);
	m.file[112] = 1; /* compatible: not ours */
	m.file[113] = 33;
	memcpy(m.file + 114, "wrong", 5);
	m.file[160] = 0;
	m.file[161] = 33;
	memcpy(m.file + 162, "shiny\x1b[31m", 10);
	refused(&m, ERR_NOTSUP, "bit 33 (shiny)");
	/* The backing file's name and format. */
	image_init(&m, 3, CLUSTER);
	put_be32(m.file + 104, 0xe2792aca);
	put_be32(m.file + 108, 5);
	memcpy(m.file + 112, "qcow2", 5);
	put_be64(m.file + 8, 200);
	put_be32(m.file + 16, 9);
	memcpy(m.file + 200, "base.imgX", 9);
	cr_assert_eq(open_as(&m, "img", &d, &info), 0, "%s", e.text);
	cr_assert_str_eq(info.backing, "base.imgX");
	cr_assert_str_eq(info.backing_format, "qcow2");
	disk_close(d);
	put_be32(m.file + 108, 16);
	refused(&m, ERR_CORRUPT, "backing file's format");
	put_be32(m.file + 108, 5);
	/* What would go onto a terminal, or into JSON, as it is. */
	static const char *const odd[] = {"a\0b",   "a\x1b[",	    "a\x7f!",	"\xff\xfe",
					  "\xc3(x", "\xed\xa0\x80", "\xc2\x9b!"};
	for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
		memcpy(m.file + 200, "base.imgX", 9);
		memcpy(m.file + 203, odd[i], 3);
		refused(&m, ERR_CORRUPT, "a control character or what is not UTF-8");
	}
	memcpy(m.file + 200, "b\xc3\xa4\xe2\x82\xac.gX", 9);
	cr_assert_eq(open_as(&m, "img", &d, &info), 0, "%s", e.text);
	disk_close(d);
}

Test(qcow, over_a_backing_file)
{
	static struct image m;
	struct source *s;
	uint8_t below[CLUSTER + 100];
	struct extent x;

	memset(below, 0x77, sizeof(below));
	tmpdir_write(&dir, "below", below, sizeof(below), 0);
	image_init(&m, 3, UINT64_C(4) * CLUSTER);
	image_entry(&m, 0, 1); /* zero: does not let it through */
	image_entry(&m, 2, UINT64_C(9) * CLUSTER);
	put_be64(m.file + 8, 200);
	put_be32(m.file + 16, 5);
	memcpy(m.file + 200, "below", 5);
	tmpdir_write(&dir, "img", m.file, m.len, 0);
	cr_assert_eq(source_open(tmpdir_at(&dir, "img"), NULL, NULL, &s, &e), 0, "%s", e.text);
	cr_assert_eq(s->n_files, 2);
	cr_assert_str_eq(s->files[1].format, "raw");
	expect(s->disk, 0, CLUSTER, 0);
	expect(s->disk, CLUSTER, 100, 0x77);
	expect(s->disk, CLUSTER + 100, CLUSTER - 100, 0);
	expect(s->disk, UINT64_C(2) * CLUSTER, CLUSTER, 9);
	expect(s->disk, UINT64_C(3) * CLUSTER, CLUSTER, 0);
	cr_assert_eq(disk_extent(s->disk, CLUSTER, UINT64_C(4) * CLUSTER, &x), 0);
	cr_assert(x.data && x.off == CLUSTER);
	cr_assert_eq(source_check(s, &e), 0, "%s", e.text);
	cr_assert_eq(source_unchanged(s, &e), 0, "%s", e.text);
	tmpdir_write(&dir, "below", "x", 1, 5000);
	cr_assert_eq(source_unchanged(s, &e), -ERR_FAILED);
	says("below changed");
	source_close(s);
}

/* ---- many at once ---- */

struct reader {
	struct disk *d;
	unsigned seed;
	int bad;
};

static void *read_around(void *arg)
{
	struct reader *r = arg;
	uint8_t buf[3000];

	for (unsigned i = 0; i < 3000 && !r->bad; i++) {
		uint64_t c = (r->seed = r->seed * 1103515245 + 12345) >> 8 & 7, in = r->seed >> 12 & 1023;

		memset(buf, 0, sizeof(buf));
		r->bad = disk_read(r->d, c * CLUSTER + in, buf, sizeof(buf)) != 0;
		for (size_t k = 0; k < sizeof(buf) && !r->bad; k++)
			r->bad = buf[k] != (uint8_t)(0x10 * c + (in + k) % 7);
	}
	return NULL;
}

/* Eight compressed clusters, a cache of four, readers that push each other's out. */
Test(qcow, readers_of_compressed_clusters_at_once)
{
	static struct image m;
	struct qcow_info info;
	struct disk *d, *file;
	struct reader r[4];
	pthread_t t[4];
	size_t len;

	image_init(&m, 3, UINT64_C(8) * CLUSTER);
	for (unsigned c = 0; c < 8; c++)
		image_entry(&m, c, image_compress(&m, (4U + c) * CLUSTER + 3, (uint8_t)(0x10 * c), CLUSTER, &len));
	tmpdir_write(&dir, "img", m.file, m.len, 0);
	cr_assert_eq(disk_posix_open(tmpdir_at(&dir, "img"), STORAGE_RDONLY, &file), 0);
	cr_assert_eq(qcow_open(file, "img", &d, &info, &e), 0, "%s", e.text);
	cr_assert_eq(qcow_attach(d, NULL, 0), 0);
	for (unsigned i = 0; i < 4; i++) {
		r[i] = (struct reader){.d = d, .seed = i + 1};
		cr_assert_eq(pthread_create(&t[i], NULL, read_around, &r[i]), 0);
	}
	for (unsigned i = 0; i < 4; i++) {
		cr_assert_eq(pthread_join(t[i], NULL), 0);
		cr_assert_eq(r[i].bad, 0);
	}
	disk_close(d);
}
