/* Disk images outside the store, opened read-only with all their backing files: what `import` copies and what a volume
 * may be based on.
 *
 * Which files may be opened (SPEC 12): the one that was named; and as backing files those that lie, links resolved, in
 * the folder of the named one or below, or in backing_dir or below. A relative name in an image starts at the folder of
 * that image, as in QEMU. Which file was opened is asked of the kernel after it was found, so that nothing that moves
 * meanwhile leads outside.
 *
 * The format of a backing file is the one that the image gives for it. Where it gives none it is found by the magic, as
 * QEMU does; so the owner of a raw backing file that begins with the magic of qcow2 can make it refer to other files,
 * of the allowed folders only.
 */
#ifndef REPFS_IMAGE_SOURCE_H
#define REPFS_IMAGE_SOURCE_H

#include "core/err.h"
#include "image/storage.h"

#define SOURCE_PATH_MAX 4096
/* An image and its backing files. */
#define SOURCE_FILES_MAX 16U

/* What a file was when it was opened. */
struct source_file {
	char path[SOURCE_PATH_MAX]; /* absolute, links resolved */
	const char *format;	    /* "raw", "qcow", "qcow2"; the named one may be "zst": seekable zstd of raw */
	uint64_t size;		    /* of the file, bytes */
	uint64_t mtime_ns;
	uint32_t crc;	   /* of its first and last 64 KiB and, of qcow and qcow2, of its L1 table */
	uint64_t dev, ino; /* while it is open only: another filesystem may give another */
};

struct source {
	struct disk *disk; /* read-only */
	uint64_t size;	   /* bytes, any number for raw */
	const char *format;
	uint32_t n_files; /* the named one first, then its backing file, ... */
	struct source_file files[SOURCE_FILES_MAX];
};

/* format: NULL (by the magic; none means raw), "raw", "zst", "qcow", "qcow2": it has to be that. backing_dir: may be
 * NULL. Messages say what the matter is, with the file's name, not what was asked. Returns owned. */
int source_open(const char *path, const char *format, const char *backing_dir, struct source **ret, struct err *e);
void source_close(struct source *s); /* NULL is fine */
/* Walks the tables of all its files; see qcow_check. */
int source_check(struct source *s, struct err *e);
/* Whether all files are what they were when they were opened; -ERR_FAILED names the one that is not. */
int source_unchanged(struct source *s, struct err *e);
/* What is the matter at off, after a read failed there with rc; returns rc. */
int source_explain(struct source *s, uint64_t off, int rc, struct err *e);

#endif
