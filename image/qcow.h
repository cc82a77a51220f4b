/* Reading qcow and qcow2 images (versions 1, 2 and 3), read-only, as a struct disk (image/storage.h). docs/qcow.md has
 * each variant of the format, whether it is read or refused, and how that was tested; docs/adr/0015 says why the walk
 * and the reads are our own.
 *
 * An image is untrusted input (SPEC 13): every count and offset in it is bounded by a named limit and by the size of
 * the file before it is used, and what can't be read right is refused by name, never read wrong. What a cut or damaged
 * file no longer holds is an error, not zeroes.
 *
 * Reads may run concurrently; nothing of the image is kept in memory but its L1 table and two bounded caches.
 */
#ifndef REPFS_IMAGE_QCOW_H
#define REPFS_IMAGE_QCOW_H

#include "core/err.h"
#include "image/storage.h"

#define QCOW_CLUSTER_BITS_MIN 9U  /* 512 bytes */
#define QCOW_CLUSTER_BITS_MAX 21U /* 2 MiB */
#define QCOW_L1_BYTES_MAX (32U << 20)
#define QCOW_SNAPSHOTS_MAX 65536U
#define QCOW_REFTABLE_BYTES_MAX (8U << 20)
#define QCOW_BACKING_NAME_MAX 1023U
#define QCOW_FORMAT_NAME_MAX 15U
/* Inflated clusters kept by an image with all its backing files, in bytes: random reads of 4 KiB would inflate the
 * whole cluster each time. */
#define QCOW_INFLATED_BYTES_MAX (16U << 20)
/* And at least so many clusters by each file. */
#define QCOW_INFLATED_MIN 4U
/* L2 tables kept by each file, in pieces of at most 4 KiB: 512 pieces cover 16 GiB of an image with 64 KiB clusters. */
#define QCOW_L2_PIECES_MAX 512U

struct qcow_info {
	unsigned version;      /* 1, 2, 3 */
	uint64_t size;	       /* of the disk in it, bytes */
	uint32_t cluster_size; /* bytes */
	uint32_t snapshots;    /* internal ones; the active state is read */
	bool dirty;	       /* refcounts are not up to date: no matter to a reader */
	bool corrupt;	       /* marked so by who wrote it: QEMU reads such an image too, and refuses to write it */
	uint32_t l1_crc;       /* CRC-32C of the L1 table as stored */
	char backing[QCOW_BACKING_NAME_MAX + 1]; /* as written in the image, "" if there is none */
	char backing_format[QCOW_FORMAT_NAME_MAX + 1];
};

/* The format's name by the first 8 bytes of a file: "qcow", "qcow2" (any version that is not 1), or NULL. */
const char *qcow_magic(const uint8_t head[8]);

/* Opens an image; *file is taken over, on failure too. name: for messages, copied. Messages say what the matter is, not
 * what was asked. Backing files are the caller's to find.
 * -ERR_NOTSUP: a variant that is not read; -ERR_CORRUPT: damaged, cut short or out of range. Returns owned. */
int qcow_open(struct disk *file, const char *name, struct disk **ret, struct qcow_info *ret_info, struct err *e);
/* Once after qcow_open, before anything is read. backing: taken over, on failure too; shorter or longer than d, or
 * NULL: what d lacks reads as zeroes. cache_bytes: its share of QCOW_INFLATED_BYTES_MAX. 0 or -ERR_NOMEM. */
int qcow_attach(struct disk *d, struct disk *backing, size_t cache_bytes);

bool qcow_is(const struct disk *d);
struct disk *qcow_backing(struct disk *d); /* borrowed; NULL: none */
/* Looks at every table entry of d (not of its backing file): -ERR_CORRUPT names the first that can't be right. Its cost
 * follows the size of the file, not that of the disk. Compressed data is not inflated. */
int qcow_check(struct disk *d, struct err *e);
/* Fills *e with what is the matter at off, after a read failed there with rc; returns rc. */
int qcow_explain(struct disk *d, uint64_t off, int rc, struct err *e);

#endif
