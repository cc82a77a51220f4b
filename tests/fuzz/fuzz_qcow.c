/* Fuzzes the reader of qcow and qcow2: whatever the file holds, opening, walking and reading it stays inside its memory
 * and its limits, what is a hole reads as zeroes, and the same bytes come whatever the cuts between reads. clang-14
 * -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/range.h"
#include "image/qcow.h"

#define MUST(cond)                                                                                                     \
	do {                                                                                                           \
		if (!(cond))                                                                                           \
			abort();                                                                                       \
	} while (0)
/* An input may claim a disk of terabytes: so much of it is looked at. */
#define EXTENTS 64U
#define PIECE (64U << 10)

struct memory {
	struct disk disk;
	uint8_t *data; /* of just its size, so that the sanitizer sees what is read past it */
	size_t size;
};

static struct memory *memory_of(struct disk *d)
{
	return CONTAINER_OF(d, struct memory, disk);
}

static int memory_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	const struct memory *m = memory_of(d);
	size_t there = off >= m->size ? 0 : (size_t)min_u64(len, m->size - off);

	MUST(off <= INT64_MAX && len <= (size_t)QCOW_L1_BYTES_MAX);
	memset((uint8_t *)buf + there, 0, len - there);
	if (there)
		memcpy(buf, m->data + off, there);
	return 0;
}

static int memory_get_size(struct disk *d, uint64_t *ret)
{
	*ret = memory_of(d)->size;
	return 0;
}

static int memory_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	(void)d;
	*ret = (struct extent){off, end - off, true};
	return 0;
}

static void memory_close(struct disk *d)
{
	free(memory_of(d)->data);
	free(memory_of(d));
}

static const struct disk_ops memory_ops = {
    .read = memory_read, .get_size = memory_get_size, .extent = memory_extent, .close = memory_close};

static struct disk *memory_new(const uint8_t *data, size_t size)
{
	struct memory *m = calloc(1, sizeof(*m));

	MUST(m);
	m->disk.ops = &memory_ops;
	m->data = malloc(size ? size : 1);
	MUST(m->data);
	if (size)
		memcpy(m->data, data, size);
	m->size = size;
	return &m->disk;
}

/* Reads [off, off + len) in one go and in two, and compares. */
static void look(struct disk *d, uint64_t off, uint64_t len, bool data)
{
	static uint8_t once[PIECE], twice[PIECE];
	size_t n = (size_t)min_u64(len, PIECE), cut = n / 3;
	struct err e = {0};
	int rc;

	memset(once, 0x5a, n);
	memset(twice, 0xa5, n);
	rc = disk_read(d, off, once, n);
	if (rc < 0) {
		MUST(data && (rc == -ERR_CORRUPT || rc == -ERR_NOMEM));
		MUST(qcow_explain(d, off, rc, &e) == rc && e.text[0]);
		return;
	}
	MUST(disk_read(d, off, twice, cut) == 0 && disk_read(d, off + cut, twice + cut, n - cut) == 0);
	MUST(memcmp(once, twice, n) == 0);
	for (size_t i = 0; i < n && !data; i++)
		MUST(once[i] == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static const uint8_t below[3000] = {1, 2, 3, 4};
	struct qcow_info info;
	struct err e = {0};
	struct disk *d;
	uint64_t off = 0, step;
	bool backed = len & 1;

	if (qcow_open(memory_new(data, len), "fuzz", &d, &info, &e) < 0) {
		MUST(strncmp(e.text, "fuzz: ", 6) == 0);
		return 0;
	}
	MUST(info.size > 0 && info.size % SECTOR_SIZE == 0 && info.size <= VOLUME_SIZE_MAX);
	MUST(info.cluster_size >= 512 && info.cluster_size <= 2U << 20 && info.version >= 1 && info.version <= 3);
	MUST(strlen(info.backing) <= QCOW_BACKING_NAME_MAX && strlen(info.backing_format) <= QCOW_FORMAT_NAME_MAX);
	MUST(qcow_attach(d, backed ? memory_new(below, sizeof(below)) : NULL, 1U << 20) == 0);
	bool whole = qcow_check(d, &e) == 0;
	for (unsigned i = 0; i < EXTENTS && off < info.size; i++) {
		struct extent x;
		int rc = disk_extent(d, off, info.size, &x);

		MUST(!whole || rc == 0);
		if (rc < 0) {
			MUST(qcow_explain(d, off, rc, &e) == rc);
			look(d, off, info.size - off, true);
			off += info.cluster_size;
			continue;
		}
		MUST(x.off == off && x.len > 0 && x.off + x.len <= info.size);
		look(d, off, x.len, x.data);
		if (x.len > PIECE)
			look(d, x.off + x.len - 1000, 1000, x.data);
		off += x.len;
	}
	/* Anywhere, and over the end. */
	for (step = info.size / 5 + 1, off = 0; off < info.size; off += step) {
		uint8_t one[700];

		(void)disk_read(d, off, one, sizeof(one));
	}
	disk_close(d);
	return 0;
}
