/* TARGET.extents: which ranges of a volume a backup holds (docs/format.md). JSON lines: a head, then one line for each
 * extent, ascending. Read and written a line at a time: it may have millions.
 */
#ifndef REPFS_IMAGE_EXTENTLIST_H
#define REPFS_IMAGE_EXTENTLIST_H

#include <stdint.h>
#include <stdio.h>

#include "core/err.h"
#include "core/range.h"
#include "core/repl_meta.h"

#define EXTENTLIST_VERSION 1
#define EXTENTLIST_SUFFIX ".extents"

struct extentlist_head {
	char volume[NAME_SIZE];
	uint8_t uuid[16]; /* the volume's */
	char mode[16];
	char target[8];	     /* what the backup's file is: "raw" or "zst" */
	uint64_t size;	     /* of the volume */
	uint64_t since;	     /* checkpoint; 0: none */
	uint64_t checkpoint; /* the image that the extents are of; 0: none */
	uint64_t count;	     /* extents */
	uint64_t bytes;	     /* that they cover */
};

/* path of the list of `target`, owned; NULL: out of memory. */
char *extentlist_path(const char *target);

/* ---- writing: to a file, head first. 0 or -ERR_x ---- */
int extentlist_put_head(FILE *f, const struct extentlist_head *h);
int extentlist_put(FILE *f, uint64_t off, uint64_t len);

/* ---- reading ---- */
struct extentlist;
/* The list of `target` as a file; the whole of it is validated first: ascending, within the size, as many as the head
 * says. what: for messages. -ERR_NOENT: there is none. Returns owned. */
int extentlist_open(const char *what, const char *target, struct extentlist **ret, struct err *e);
const struct extentlist_head *extentlist_head(const struct extentlist *l);
/* The next one; 1: *ret is set, 0: there are no more. */
int extentlist_next(struct extentlist *l, struct range *ret, struct err *e);
/* To the first one again. */
int extentlist_rewind(struct extentlist *l, struct err *e);
void extentlist_close(struct extentlist *l);

#endif
