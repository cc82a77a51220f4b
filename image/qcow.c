/* qcow and qcow2, read-only (image/qcow.h).
 *
 * Opening: the header is parsed and bounded, then the header extensions (format of the backing file, names of features
 * for messages), then the L1 table is read. An image that passes has no entry of which it isn't known what it means:
 * anything else is refused here, by name, or at the entry.
 *
 * Reading: each cluster of the disk is classified by its L2 entry (classify), and then
 *   unallocated   read from the backing file, zeroes without one or past its end
 *   zero          zeroes, with (version 3) or without a cluster in the file
 *   data          read from the file at the offset of the entry, as far as the disk goes
 *   compressed    inflated whole, kept in a small cache, copied from there
 * A data cluster has to lie inside the file as far as the disk goes: the last one may be short. A compressed one has to
 * inflate to a whole cluster; its last sector may lie past the file's end.
 *
 * Limits. One L2 table belongs to one L1 entry, so that an image with more of them than the file has room for is
 * refused: all walks are bounded by the file's size, whatever size it claims for its disk.
 *
 * Locks: one for each slot of the two caches, held while the slot is filled, so that two readers of one compressed
 * cluster inflate it once. No other lock is taken under them.
 */
#include "image/qcow.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/thread.h"
#include "core/range.h"

#define HEADER_1_SIZE 48U
#define HEADER_2_SIZE 72U
#define HEADER_3_SIZE 104U
/* What a header with its extensions and names can take: the first cluster, the largest of which is 2 MiB; qemu-img
 * writes a few hundred bytes. */
#define HEADER_READ_MAX (64U << 10)

#define ENTRY_OFFSET UINT64_C(0x00fffffffffffe00)
#define ENTRY_COMPRESSED (UINT64_C(1) << 62)
#define ENTRY_COMPRESSED_1 (UINT64_C(1) << 63)
#define ENTRY_ZERO UINT64_C(1)
#define ENTRY_SIZE 8U

#define INCOMPATIBLE_DIRTY (UINT64_C(1) << 0)
#define INCOMPATIBLE_CORRUPT (UINT64_C(1) << 1)
#define INCOMPATIBLE_DATA_FILE (UINT64_C(1) << 2)
#define INCOMPATIBLE_COMPRESSION (UINT64_C(1) << 3)
#define INCOMPATIBLE_EXTENDED_L2 (UINT64_C(1) << 4)

#define EXTENSION_END UINT32_C(0)
#define EXTENSION_BACKING_FORMAT UINT32_C(0xe2792aca)
#define EXTENSION_FEATURES UINT32_C(0x6803f857)
#define FEATURE_SIZE 48U

#define PIECE_ENTRIES 512U
/* Clusters looked at for one answer of extent, at most; and bytes of data, of which whoever asks takes a piece and asks
 * again. */
#define EXTENT_STEPS_MAX 65536U
#define EXTENT_DATA_MAX (UINT64_C(16) << 20)

struct l2_piece {
	struct mutex lock;
	uint64_t key; /* offset in the file; 0: empty */
	uint8_t *data;
};

struct inflated {
	struct mutex lock;
	uint64_t key; /* cluster number + 1; 0: empty */
	uint8_t *data;
};

struct qcow {
	struct disk disk;
	struct disk *file, *backing;
	char *name;
	uint64_t file_size, size, backing_size;
	unsigned version, cluster_bits, l2_bits; /* an L2 table has 1 << l2_bits entries */
	uint64_t *l1;				 /* offsets of L2 tables, 0: none; flags masked out */
	uint32_t n_l1;
	struct l2_piece *pieces; /* [QCOW_L2_PIECES_MAX] */
	struct inflated *inflated;
	uint32_t n_inflated;
};

enum cluster_kind { CLUSTER_UNALLOCATED, CLUSTER_ZERO, CLUSTER_DATA, CLUSTER_COMPRESSED };

struct cluster {
	enum cluster_kind kind;
	uint64_t off;	   /* in the file */
	uint64_t len;	   /* compressed: bytes stored, as far as the file goes */
	bool table;	   /* unallocated: there is no L2 table at all */
	const char *fault; /* after -ERR_CORRUPT: what is the matter */
};

static const struct disk_ops qcow_ops;

static struct qcow *qcow_of(struct disk *d)
{
	return CONTAINER_OF(d, struct qcow, disk);
}

static uint16_t be16(const void *p)
{
	const uint8_t *b = p;

	return (uint16_t)(b[0] << 8 | b[1]);
}

static uint32_t be32(const void *p)
{
	return (uint32_t)be16(p) << 16 | be16((const uint8_t *)p + 2);
}

static uint64_t be64(const void *p)
{
	return (uint64_t)be32(p) << 32 | be32((const uint8_t *)p + 4);
}

const char *qcow_magic(const uint8_t head[8])
{
	if (memcmp(head, "QFI\xfb", 4) != 0)
		return NULL;
	return be32(head + 4) == 1 ? "qcow" : "qcow2";
}

bool qcow_is(const struct disk *d)
{
	return d->ops == &qcow_ops;
}

static uint64_t cluster_size(const struct qcow *q)
{
	return UINT64_C(1) << q->cluster_bits;
}

static uint64_t table_bytes(const struct qcow *q)
{
	return (uint64_t)ENTRY_SIZE << q->l2_bits;
}

static bool in_file(const struct qcow *q, uint64_t off, uint64_t len)
{
	return off <= q->file_size && len <= q->file_size - off;
}

/* ---- opening ---- */

static int refuse(const struct qcow *q, struct err *e, int code, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
static int refuse(const struct qcow *q, struct err *e, int code, const char *fmt, ...)
{
	char matter[ERR_TEXT_MAX];
	va_list ap;

	va_start(ap, fmt);
	(void)vsnprintf(matter, sizeof(matter), fmt, ap);
	va_end(ap);
	return err_set(e, code, "%.200s: %s", q->name, matter);
}

/* The header as read: zeroes behind the file's end. */
struct header {
	const uint8_t *p; /* HEADER_READ_MAX bytes */
	uint64_t backing_off;
	uint32_t backing_len, length, l1_n;
	uint64_t l1_off;
};

static int open_size(struct qcow *q, uint64_t size, struct err *e)
{
	if (size == 0 || size % SECTOR_SIZE != 0)
		return refuse(q, e, ERR_NOTSUP,
			      "its disk has %" PRIu64
			      " bytes, which is not a multiple of %u above 0; convert it: qemu-img convert",
			      size, SECTOR_SIZE);
	if (size > VOLUME_SIZE_MAX)
		return refuse(q, e, ERR_NOTSUP, "its disk has %" PRIu64 " bytes, and a volume can have 64T at most",
			      size);
	q->size = size;
	return 0;
}

static int bad_geometry(const struct qcow *q, struct err *e, const char *what, uint64_t value)
{
	return refuse(q, e, ERR_CORRUPT,
		      "%s in its header (%" PRIu64 ") is out of range; the image is damaged: try qemu-img check", what,
		      value);
}

static int open_1(struct qcow *q, struct header *h, struct err *e)
{
	uint32_t crypt = be32(h->p + 36);
	uint64_t tables;
	int rc;

	if (q->file_size < HEADER_1_SIZE)
		return refuse(q, e, ERR_CORRUPT, "its header is cut short");
	q->cluster_bits = h->p[32];
	q->l2_bits = h->p[33];
	h->backing_off = be64(h->p + 8);
	h->backing_len = be32(h->p + 16);
	h->l1_off = be64(h->p + 40);
	if (crypt == 1)
		return refuse(q, e, ERR_NOTSUP,
			      "it is encrypted (AES), which is not read; decrypt it first with qemu-img convert");
	if (crypt != 0)
		return refuse(q, e, ERR_NOTSUP, "it is encrypted (method %" PRIu32 "), which is not read", crypt);
	/* The bounds of QEMU's driver. */
	if (q->cluster_bits < QCOW_CLUSTER_BITS_MIN || q->cluster_bits > 16)
		return bad_geometry(q, e, "the cluster size", q->cluster_bits);
	if (q->l2_bits < 6 || q->l2_bits > 13)
		return bad_geometry(q, e, "the size of L2 tables", q->l2_bits);
	if ((rc = open_size(q, be64(h->p + 24), e)) < 0)
		return rc;
	tables = units_of(q->size, q->cluster_bits + q->l2_bits);
	if (tables > QCOW_L1_BYTES_MAX / ENTRY_SIZE)
		return bad_geometry(q, e, "the size of the disk", q->size);
	h->l1_n = (uint32_t)tables;
	h->length = HEADER_1_SIZE;
	return 0;
}

/* What the image itself calls an incompatible feature, "" if it does not say; printable. */
static void feature_name(const struct qcow *q, const struct header *h, unsigned bit, char out[FEATURE_SIZE])
{
	uint64_t at = h->length, end = min_u64(HEADER_READ_MAX, q->file_size);

	out[0] = '\0';
	while (at + 8 <= end) {
		uint32_t type = be32(h->p + at), len = be32(h->p + at + 4);

		at += 8;
		if (type == EXTENSION_END || len > end - at)
			return;
		for (uint32_t i = 0; type == EXTENSION_FEATURES && i + FEATURE_SIZE <= len; i += FEATURE_SIZE) {
			const uint8_t *f = h->p + at + i;
			size_t n = 0;

			if (f[0] != 0 || f[1] != bit)
				continue;
			for (; n < FEATURE_SIZE - 2 && f[2 + n] >= 0x20 && f[2 + n] < 0x7f; n++)
				out[n] = (char)f[2 + n];
			out[n] = '\0';
			return;
		}
		at += round_up_u64(len, 8);
	}
}

static int open_features(const struct qcow *q, const struct header *h, struct qcow_info *info, struct err *e)
{
	uint64_t bits = be64(h->p + 72), known = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_DATA_FILE |
						 INCOMPATIBLE_COMPRESSION | INCOMPATIBLE_EXTENDED_L2;
	unsigned type = h->length > HEADER_3_SIZE ? h->p[104] : 0;

	if (bits & ~known) {
		unsigned bit = (unsigned)__builtin_ctzll(bits & ~known);
		char name[FEATURE_SIZE];

		feature_name(q, h, bit, name);
		return refuse(q, e, ERR_NOTSUP,
			      "it uses a feature that is not known here: bit %u%s%s%s; convert it first: "
			      "qemu-img convert -O qcow2",
			      bit, name[0] ? " (" : "", name, name[0] ? ")" : "");
	}
	if (bits & INCOMPATIBLE_DATA_FILE)
		return refuse(
		    q, e, ERR_NOTSUP,
		    "its data is in an external data file, which is not read; convert it first: qemu-img convert "
		    "-O qcow2");
	if (bits & INCOMPATIBLE_EXTENDED_L2)
		return refuse(
		    q, e, ERR_NOTSUP,
		    "it has extended L2 entries (subclusters), which are not read; convert it first: qemu-img "
		    "convert -O qcow2");
	if (type == 1)
		return refuse(
		    q, e, ERR_NOTSUP,
		    "its clusters are compressed with zstd, which is not read; convert it first: qemu-img convert "
		    "-O qcow2");
	if (type != 0)
		return refuse(q, e, ERR_NOTSUP, "its clusters are compressed in a way that is not known here (type %u)",
			      type);
	if (bits & INCOMPATIBLE_COMPRESSION)
		return refuse(q, e, ERR_CORRUPT, "its header names another compression than zlib and gives none");
	info->dirty = (bits & INCOMPATIBLE_DIRTY) != 0;
	info->corrupt = (bits & INCOMPATIBLE_CORRUPT) != 0;
	return 0;
}

static int open_tables(const struct qcow *q, const struct header *h, struct err *e)
{
	uint64_t mask = cluster_size(q) - 1, tables = units_of(q->size, q->cluster_bits + q->l2_bits);
	uint64_t reftable = be64(h->p + 48), reftable_bytes = (uint64_t)be32(h->p + 56) << q->cluster_bits;

	if (h->l1_n > QCOW_L1_BYTES_MAX / ENTRY_SIZE)
		return bad_geometry(q, e, "the size of the L1 table", h->l1_n);
	if (h->l1_n < tables)
		return refuse(q, e, ERR_CORRUPT,
			      "its L1 table has %" PRIu32 " entries and needs %" PRIu64
			      " for its disk; the image is damaged: try qemu-img check",
			      h->l1_n, tables);
	if (h->l1_off & mask)
		return bad_geometry(q, e, "the offset of the L1 table", h->l1_off);
	/* Not used, but what has none is not an image. */
	if (reftable == 0 || (reftable & mask) || reftable >= q->file_size)
		return bad_geometry(q, e, "the offset of the refcount table", reftable);
	if (reftable_bytes == 0 || reftable_bytes > QCOW_REFTABLE_BYTES_MAX)
		return bad_geometry(q, e, "the size of the refcount table", reftable_bytes);
	return 0;
}

static int open_2(struct qcow *q, struct header *h, struct qcow_info *info, struct err *e)
{
	uint32_t crypt = be32(h->p + 32);
	int rc;

	if (q->file_size < (q->version == 2 ? HEADER_2_SIZE : HEADER_3_SIZE))
		return refuse(q, e, ERR_CORRUPT, "its header is cut short");
	if (be32(h->p + 20) < QCOW_CLUSTER_BITS_MIN || be32(h->p + 20) > QCOW_CLUSTER_BITS_MAX)
		return bad_geometry(q, e, "the cluster size", be32(h->p + 20));
	q->cluster_bits = be32(h->p + 20);
	q->l2_bits = q->cluster_bits - 3;
	h->backing_off = be64(h->p + 8);
	h->backing_len = be32(h->p + 16);
	h->l1_n = be32(h->p + 36);
	h->l1_off = be64(h->p + 40);
	h->length = q->version == 2 ? HEADER_2_SIZE : be32(h->p + 100);
	if (h->length < (q->version == 2 ? HEADER_2_SIZE : HEADER_3_SIZE) ||
	    h->length > min_u64(cluster_size(q), HEADER_READ_MAX))
		return bad_geometry(q, e, "the length of the header", h->length);
	if (crypt)
		return refuse(q, e, ERR_NOTSUP,
			      "it is encrypted (%s), which is not read; decrypt it first with qemu-img convert",
			      crypt == 1   ? "AES"
			      : crypt == 2 ? "LUKS"
					   : "in a way that is not known here");
	if (q->version == 3) {
		if ((rc = open_features(q, h, info, e)) < 0)
			return rc;
		if (be32(h->p + 96) > 6)
			return bad_geometry(q, e, "the refcount width", be32(h->p + 96));
	}
	info->snapshots = be32(h->p + 60);
	if (info->snapshots > QCOW_SNAPSHOTS_MAX)
		return bad_geometry(q, e, "the number of snapshots", info->snapshots);
	rc = open_size(q, be64(h->p + 24), e);
	return rc < 0 ? rc : open_tables(q, h, e);
}

/* UTF-8 without control characters: names go into messages, and those onto terminals and into JSON. */
static bool is_text(const char *text)
{
	for (const uint8_t *p = (const uint8_t *)text; *p;) {
		unsigned more = *p < 0x80 ? 0 : *p >= 0xf0 ? 3 : *p >= 0xe0 ? 2 : 1;
		uint32_t c = *p & (more ? 0x3fU >> more : 0x7fU);

		if (*p < 0x20 || *p == 0x7f || (*p >= 0x80 && *p < 0xc2) || *p > 0xf4)
			return false;
		for (p++; more > 0; more--, p++) {
			if ((*p & 0xc0) != 0x80)
				return false;
			c = c << 6 | (*p & 0x3fU);
			if (more == 1 && (c < 0xa0 || (c >= 0xd800 && c < 0xe000) || c > 0x10ffff))
				return false;
		}
	}
	return true;
}

/* Extensions stand between the header and the backing file's name, or the end of the first cluster. */
static int open_extensions(struct qcow *q, const struct header *h, struct qcow_info *info, struct err *e)
{
	uint64_t at = h->length, end = h->backing_off ? h->backing_off : cluster_size(q);

	end = min_u64(end, min_u64(HEADER_READ_MAX, q->file_size));
	while (q->version > 1 && at + 8 <= end) {
		uint32_t type = be32(h->p + at), len = be32(h->p + at + 4);

		if (type == EXTENSION_END)
			break;
		at += 8;
		if (len > end - at)
			return bad_geometry(q, e, "the length of an extension", len);
		if (type == EXTENSION_BACKING_FORMAT) {
			if (len > QCOW_FORMAT_NAME_MAX)
				return bad_geometry(q, e, "the length of the backing file's format", len);
			memcpy(info->backing_format, h->p + at, len);
			info->backing_format[len] = '\0';
			if (!is_text(info->backing_format))
				return refuse(q, e, ERR_CORRUPT, "the format of its backing file is no text");
		}
		at += round_up_u64(len, 8);
	}
	return 0;
}

static int open_backing_name(const struct qcow *q, const struct header *h, struct qcow_info *info, struct err *e)
{
	if (h->backing_off == 0)
		return 0;
	if (h->backing_len > QCOW_BACKING_NAME_MAX)
		return bad_geometry(q, e, "the length of the backing file's name", h->backing_len);
	if (h->backing_off < h->length || h->backing_off > HEADER_READ_MAX ||
	    h->backing_len > HEADER_READ_MAX - h->backing_off || !in_file(q, h->backing_off, h->backing_len) ||
	    (q->version > 1 && h->backing_off + h->backing_len > cluster_size(q)))
		return bad_geometry(q, e, "the place of the backing file's name", h->backing_off);
	memcpy(info->backing, h->p + h->backing_off, h->backing_len);
	info->backing[h->backing_len] = '\0';
	if (strlen(info->backing) != h->backing_len || !is_text(info->backing))
		return refuse(
		    q, e, ERR_CORRUPT,
		    "the name of its backing file holds a zero byte, a control character or what is not UTF-8");
	return 0;
}

static int load_l1(struct qcow *q, const struct header *h, struct qcow_info *info, struct err *e)
{
	/* Entries beyond what the disk needs are for snapshots with state, and mean nothing here. */
	uint64_t n = units_of(q->size, q->cluster_bits + q->l2_bits), used = 0;
	size_t bytes = (size_t)n * ENTRY_SIZE;
	int rc;

	if (h->l1_off == 0 || !in_file(q, h->l1_off, bytes))
		return refuse(q, e, ERR_CORRUPT,
			      "its L1 table (%zu bytes at %" PRIu64 ") does not lie in the file; it was cut short",
			      bytes, h->l1_off);
	q->l1 = malloc(bytes);
	if (!q->l1)
		return refuse(q, e, ERR_NOMEM, "%s", err_short(ERR_NOMEM));
	rc = disk_read(q->file, h->l1_off, q->l1, bytes);
	if (rc < 0)
		return refuse(q, e, -rc, "reading its L1 table: %s", err_short(rc));
	q->n_l1 = (uint32_t)n;
	info->l1_crc = crc32c(0, q->l1, bytes);
	for (uint32_t i = 0; i < q->n_l1; i++) {
		q->l1[i] = be64(&q->l1[i]) & (q->version == 1 ? UINT64_MAX : ENTRY_OFFSET);
		used += q->l1[i] != 0;
	}
	if (used > q->file_size / table_bytes(q))
		return refuse(q, e, ERR_CORRUPT,
			      "it names more L2 tables than the file has room for; it is damaged or was cut short");
	return 0;
}

static int open_parts(struct qcow *q, uint8_t *head, struct qcow_info *info, struct err *e)
{
	struct header h = {.p = head};
	int rc = disk_get_size(q->file, &q->file_size);

	if (rc == 0)
		rc = disk_read(q->file, 0, head, HEADER_READ_MAX);
	if (rc < 0)
		return refuse(q, e, -rc, "reading its header: %s", err_short(rc));
	if (q->file_size < 8 || !qcow_magic(head))
		return refuse(q, e, ERR_NOTSUP, "not a qcow or qcow2 image: it does not begin with their magic");
	q->version = be32(head + 4);
	if (q->version < 1 || q->version > 3)
		return refuse(q, e, ERR_NOTSUP, "a qcow2 image of version %u; 1 to 3 are known", q->version);
	rc = q->version == 1 ? open_1(q, &h, e) : open_2(q, &h, info, e);
	if (rc == 0)
		rc = open_backing_name(q, &h, info, e);
	if (rc == 0)
		rc = open_extensions(q, &h, info, e);
	if (rc == 0)
		rc = load_l1(q, &h, info, e);
	if (rc < 0)
		return rc;
	info->version = q->version;
	info->size = q->size;
	info->cluster_size = (uint32_t)cluster_size(q);
	return 0;
}

static int make_caches(struct qcow *q)
{
	q->pieces = calloc(QCOW_L2_PIECES_MAX, sizeof(*q->pieces));
	if (!q->pieces)
		return -ERR_NOMEM;
	for (uint32_t i = 0; i < QCOW_L2_PIECES_MAX; i++)
		mutex_init(&q->pieces[i].lock);
	return 0;
}

static void qcow_close(struct disk *d)
{
	struct qcow *q = qcow_of(d);

	disk_close(q->file);
	disk_close(q->backing);
	for (uint32_t i = 0; q->pieces && i < QCOW_L2_PIECES_MAX; i++) {
		mutex_destroy(&q->pieces[i].lock);
		free(q->pieces[i].data);
	}
	free(q->pieces);
	for (uint32_t i = 0; q->inflated && i < q->n_inflated; i++) {
		mutex_destroy(&q->inflated[i].lock);
		free(q->inflated[i].data);
	}
	free(q->inflated);
	free(q->l1);
	free(q->name);
	free(q);
}

int qcow_open(struct disk *file, const char *name, struct disk **ret, struct qcow_info *ret_info, struct err *e)
{
	struct qcow_info info = {0};
	_cleanup_free_ uint8_t *head = malloc(HEADER_READ_MAX);
	struct qcow *q = calloc(1, sizeof(*q));
	int rc = 0;

	if (!q) {
		disk_close(file);
		return err_set(e, ERR_NOMEM, "%.200s: %s", name, err_short(ERR_NOMEM));
	}
	q->disk.ops = &qcow_ops;
	q->file = file;
	q->name = strdup(name);
	if (!q->name || !head || make_caches(q) < 0)
		rc = err_set(e, ERR_NOMEM, "%.200s: %s", name, err_short(ERR_NOMEM));
	if (rc == 0)
		rc = open_parts(q, head, &info, e);
	if (rc < 0) {
		qcow_close(&q->disk);
		return rc;
	}
	*ret_info = info;
	*ret = &q->disk;
	return 0;
}

int qcow_attach(struct disk *d, struct disk *backing, size_t cache_bytes)
{
	struct qcow *q = qcow_of(d);
	uint64_t n = max_u64(cache_bytes >> q->cluster_bits, QCOW_INFLATED_MIN);

	PRE(qcow_is(d) && !q->backing && !q->inflated);
	q->backing = backing;
	/* Past its end it reads as zeroes, so that not knowing its size loses nothing. */
	if (backing && disk_get_size(backing, &q->backing_size) < 0)
		q->backing_size = q->size;
	/* Clusters of less than 4 KiB get no more slots than those of 4 KiB: a slot has a cost of its own. */
	q->n_inflated = (uint32_t)min_u64(n, QCOW_INFLATED_BYTES_MAX >> BLOCK_SHIFT);
	q->inflated = calloc(q->n_inflated, sizeof(*q->inflated));
	if (!q->inflated)
		return -ERR_NOMEM;
	for (uint32_t i = 0; i < q->n_inflated; i++)
		mutex_init(&q->inflated[i].lock);
	return 0;
}

struct disk *qcow_backing(struct disk *d)
{
	return qcow_of(d)->backing;
}

/* ---- the walk ---- */

/* Entry i of the L2 table at `table`, through the cache. */
static int l2_entry(struct qcow *q, uint64_t table, uint32_t i, uint64_t *ret)
{
	uint32_t n = (uint32_t)min_u64(PIECE_ENTRIES, UINT64_C(1) << q->l2_bits);
	uint64_t key = table + (uint64_t)(i / n) * n * ENTRY_SIZE;
	struct l2_piece *p = &q->pieces[key / (n * ENTRY_SIZE) % QCOW_L2_PIECES_MAX];
	int rc = 0;

	mutex_lock(&p->lock);
	if (p->key != key) {
		p->key = 0;
		if (!p->data && !(p->data = malloc((size_t)n * ENTRY_SIZE)))
			rc = -ERR_NOMEM;
		if (rc == 0)
			rc = disk_read(q->file, key, p->data, (size_t)n * ENTRY_SIZE);
		if (rc == 0)
			p->key = key;
	}
	if (rc == 0)
		*ret = be64(p->data + (size_t)(i % n) * ENTRY_SIZE);
	mutex_unlock(&p->lock);
	return rc;
}

static int fault(struct cluster *c, const char *text)
{
	c->fault = text;
	return -ERR_CORRUPT;
}

static int classify_compressed(const struct qcow *q, uint64_t entry, struct cluster *c)
{
	unsigned shift = q->version == 1 ? 63 - q->cluster_bits : 62 - (q->cluster_bits - 8);
	uint64_t off = entry & ((UINT64_C(1) << shift) - 1);

	if (q->version == 1) {
		c->len = entry >> shift & (cluster_size(q) - 1);
	} else {
		uint64_t sectors = (entry >> shift & ((UINT64_C(1) << (q->cluster_bits - 8)) - 1)) + 1;

		c->len = sectors * SECTOR_SIZE - off % SECTOR_SIZE;
	}
	c->kind = CLUSTER_COMPRESSED;
	c->off = off;
	if (off == 0 || off >= q->file_size)
		return fault(c, "its compressed data lies past the end of the file");
	if (q->version == 1 && !in_file(q, off, c->len))
		return fault(c, "its compressed data lies past the end of the file");
	/* Version 2 counts in sectors: the last one need not be whole. */
	c->len = min_u64(c->len, q->file_size - off);
	return 0;
}

/* Cluster number `index`, which lies in the disk. -ERR_CORRUPT: ret->fault says why. */
static int classify(struct qcow *q, uint64_t index, struct cluster *ret)
{
	uint64_t table = q->l1[index >> q->l2_bits], entry = 0, need;
	struct cluster c = {.kind = CLUSTER_UNALLOCATED, .table = table != 0};
	int rc;

	*ret = c;
	if (!table)
		return 0;
	if (q->version > 1 && (table & (cluster_size(q) - 1)))
		return fault(ret, "the offset of its L2 table is not a multiple of the cluster size");
	if (!in_file(q, table, table_bytes(q)))
		return fault(ret, "its L2 table lies past the end of the file");
	rc = l2_entry(q, table, (uint32_t)(index & ((UINT64_C(1) << q->l2_bits) - 1)), &entry);
	if (rc < 0)
		return rc;
	if (entry & (q->version == 1 ? ENTRY_COMPRESSED_1 : ENTRY_COMPRESSED))
		return classify_compressed(q, entry, ret);
	ret->off = entry & (q->version == 1 ? UINT64_MAX : ENTRY_OFFSET);
	if (q->version > 1 && (entry & ENTRY_ZERO)) {
		if (q->version < 3)
			return fault(ret, "its entry says that it is zero, which version 2 does not know");
		if (ret->off & (cluster_size(q) - 1))
			return fault(ret, "its offset is not a multiple of the cluster size");
		ret->kind = CLUSTER_ZERO;
		return 0;
	}
	if (ret->off == 0)
		return 0;
	ret->kind = CLUSTER_DATA;
	if (ret->off & (q->version == 1 ? SECTOR_SIZE - 1 : cluster_size(q) - 1))
		return fault(ret, q->version == 1 ? "its offset is not a multiple of 512"
						  : "its offset is not a multiple of the cluster size");
	/* The disk's last cluster need not be whole. */
	need = min_u64(cluster_size(q), q->size - (index << q->cluster_bits));
	if (!in_file(q, ret->off, need))
		return fault(ret, "its data lies past the end of the file");
	return 0;
}

/* ---- compressed clusters ---- */

/* All of in has to give just one cluster; what is stored behind it in the last sector is another's. */
static int inflate_cluster(const uint8_t *in, size_t len, uint8_t *out, size_t out_len)
{
	z_stream z = {
	    .next_in = (uint8_t *)(uintptr_t)in, .avail_in = (uInt)len, .next_out = out, .avail_out = (uInt)out_len};
	int zrc;

	/* Raw deflate. QEMU writes with a window of 12 bits; 15 reads those too. */
	zrc = inflateInit2(&z, -15);
	if (zrc != Z_OK)
		return zrc == Z_MEM_ERROR ? -ERR_NOMEM : -ERR_FAILED;
	zrc = inflate(&z, Z_FINISH);
	(void)inflateEnd(&z);
	if (zrc == Z_MEM_ERROR)
		return -ERR_NOMEM;
	return (zrc == Z_STREAM_END || zrc == Z_BUF_ERROR) && z.avail_out == 0 ? 0 : -ERR_CORRUPT;
}

static int load_inflated(struct qcow *q, const struct cluster *c, uint8_t *out)
{
	_cleanup_free_ uint8_t *in = malloc((size_t)c->len ? (size_t)c->len : 1);
	int rc;

	if (!in)
		return -ERR_NOMEM;
	rc = disk_read(q->file, c->off, in, (size_t)c->len);
	return rc < 0 ? rc : inflate_cluster(in, (size_t)c->len, out, (size_t)cluster_size(q));
}

/* Bytes [in_cluster, in_cluster + len) of the cluster. */
static int read_compressed(struct qcow *q, uint64_t index, const struct cluster *c, uint64_t in_cluster, void *buf,
			   size_t len)
{
	struct inflated *slot = &q->inflated[index % q->n_inflated];
	int rc = 0;

	mutex_lock(&slot->lock);
	if (slot->key != index + 1) {
		slot->key = 0;
		if (!slot->data && !(slot->data = malloc((size_t)cluster_size(q))))
			rc = -ERR_NOMEM;
		if (rc == 0)
			rc = load_inflated(q, c, slot->data);
		if (rc == 0)
			slot->key = index + 1;
	}
	if (rc == 0)
		memcpy(buf, slot->data + in_cluster, len);
	mutex_unlock(&slot->lock);
	return rc;
}

/* ---- the disk ---- */

static int read_backing(struct qcow *q, uint64_t off, uint8_t *buf, size_t len)
{
	size_t there = !q->backing || off >= q->backing_size ? 0 : (size_t)min_u64(len, q->backing_size - off);

	memset(buf + there, 0, len - there);
	return there ? disk_read(q->backing, off, buf, there) : 0;
}

/* Inside one cluster. */
static int read_part(struct qcow *q, uint64_t off, uint8_t *buf, size_t len)
{
	uint64_t index = off >> q->cluster_bits, in_cluster = off & (cluster_size(q) - 1);
	struct cluster c;
	int rc = classify(q, index, &c);

	if (rc < 0)
		return rc;
	switch (c.kind) {
	case CLUSTER_UNALLOCATED:
		return read_backing(q, off, buf, len);
	case CLUSTER_ZERO:
		memset(buf, 0, len);
		return 0;
	case CLUSTER_DATA:
		return disk_read(q->file, c.off + in_cluster, buf, len);
	case CLUSTER_COMPRESSED:
		return read_compressed(q, index, &c, in_cluster, buf, len);
	}
	UNREACHABLE();
}

static int qcow_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	struct qcow *q = qcow_of(d);
	uint8_t *p = buf;

	while (len > 0) {
		size_t n;
		int rc;

		if (off >= q->size) {
			memset(p, 0, len);
			return 0;
		}
		n = (size_t)min_u64(len, min_u64(cluster_size(q) - (off & (cluster_size(q) - 1)), q->size - off));
		rc = read_part(q, off, p, n);
		if (rc < 0)
			return rc;
		off += n;
		p += n;
		len -= n;
	}
	return 0;
}

/* The piece of one kind that begins at off. */
static int extent_one(struct qcow *q, uint64_t off, uint64_t end, struct extent *ret)
{
	uint64_t index = off >> q->cluster_bits, stop;
	struct cluster c;
	int rc = classify(q, index, &c);

	if (rc < 0)
		return rc;
	/* Where there is no table at all, its whole range. */
	stop = c.kind == CLUSTER_UNALLOCATED && !c.table ? ((index >> q->l2_bits) + 1) << (q->l2_bits + q->cluster_bits)
							 : (index + 1) << q->cluster_bits;
	stop = min_u64(stop, min_u64(end, q->size));
	*ret = (struct extent){off, stop - off, c.kind == CLUSTER_DATA || c.kind == CLUSTER_COMPRESSED};
	if (c.kind == CLUSTER_UNALLOCATED && q->backing && off < q->backing_size)
		return disk_extent(q->backing, off, min_u64(stop, q->backing_size), ret);
	return 0;
}

static int qcow_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	struct qcow *q = qcow_of(d);
	struct extent x;
	int rc;

	PRE(off < end);
	if (off >= q->size) {
		*ret = (struct extent){off, end - off, false};
		return 0;
	}
	rc = extent_one(q, off, end, &x);
	for (unsigned i = 0; rc == 0 && i < EXTENT_STEPS_MAX && x.off + x.len < min_u64(end, q->size); i++) {
		struct extent next;

		if (x.data && x.len >= EXTENT_DATA_MAX)
			break;
		/* What can't be told further on is not told here. */
		if (extent_one(q, x.off + x.len, end, &next) < 0 || next.data != x.data)
			break;
		x.len += next.len;
	}
	if (rc == 0)
		*ret = x;
	return rc;
}

static int qcow_get_size(struct disk *d, uint64_t *ret)
{
	*ret = qcow_of(d)->size;
	return 0;
}

static int qcow_allocated(struct disk *d, uint64_t *ret)
{
	struct qcow *q = qcow_of(d);
	uint64_t below = 0;
	int rc = disk_allocated(q->file, ret);

	if (rc == 0 && q->backing)
		rc = disk_allocated(q->backing, &below);
	*ret += rc == 0 ? below : 0;
	return rc;
}

static int qcow_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	(void)d;
	(void)off;
	(void)buf;
	(void)len;
	return -ERR_PERM;
}

static int qcow_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	(void)d;
	(void)off;
	(void)len;
	(void)punch;
	return -ERR_PERM;
}

static int qcow_set_size(struct disk *d, uint64_t size)
{
	(void)d;
	(void)size;
	return -ERR_PERM;
}

static int qcow_sync(struct disk *d)
{
	(void)d;
	return 0;
}

static const struct disk_ops qcow_ops = {
    .read = qcow_read,
    .write = qcow_write,
    .zero = qcow_zero,
    .extent = qcow_extent,
    .sync = qcow_sync,
    .set_size = qcow_set_size,
    .get_size = qcow_get_size,
    .allocated = qcow_allocated,
    .close = qcow_close,
};

/* ---- what is the matter ---- */

static int tell(const struct qcow *q, uint64_t off, int rc, const char *matter, struct err *e)
{
	return refuse(q, e, -rc, "byte %" PRIu64 " of its disk: %s%s", off, matter,
		      rc == -ERR_CORRUPT ? "; the image is damaged or was cut short: try qemu-img check" : "");
}

int qcow_check(struct disk *d, struct err *e)
{
	struct qcow *q = qcow_of(d);
	uint64_t clusters = units_of(q->size, q->cluster_bits);

	PRE(qcow_is(d));
	for (uint64_t i = 0; i < clusters;) {
		struct cluster c;
		int rc = classify(q, i, &c);

		if (rc < 0)
			return tell(q, i << q->cluster_bits, rc, c.fault ? c.fault : err_short(rc), e);
		i = c.kind == CLUSTER_UNALLOCATED && !c.table ? ((i >> q->l2_bits) + 1) << q->l2_bits : i + 1;
	}
	return 0;
}

int qcow_explain(struct disk *d, uint64_t off, int rc, struct err *e)
{
	struct qcow *q = qcow_of(d);
	struct cluster c = {0};

	PRE(qcow_is(d));
	if (off >= q->size)
		return tell(q, off, rc, err_short(rc), e);
	off = round_down_u64(off, cluster_size(q));
	if (classify(q, off >> q->cluster_bits, &c) < 0 && c.fault)
		return tell(q, off, rc, c.fault, e);
	if (c.kind == CLUSTER_UNALLOCATED && q->backing && qcow_is(q->backing))
		return qcow_explain(q->backing, off, rc, e);
	return tell(q, off, rc,
		    rc == -ERR_CORRUPT && c.kind == CLUSTER_COMPRESSED
			? "its compressed data does not inflate to a whole cluster"
			: err_short(rc),
		    e);
}
