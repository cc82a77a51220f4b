/* Copies what a volume holds out of the store, in bounded steps (SPEC 11): the engine of `backup` and `export`.
 *
 * A source is a layer of an open volume that does not change any more while it is copied (image(k), or with the
 * caller's care another), or the ranges of it that a bitmap names. The target is a raw sparse file or a seekable .zst;
 * it has its name only when it is whole (image/newfile.h). One that does not hold the whole image has a list of its
 * extents beside it, TARGET.extents (image/extentlist.h).
 *
 * The engine does not sleep, knows no speed and no policy: whoever drives it (fs/jobs.c, or a loop) repeats a step that
 * failed, or gives up. A step can be repeated after any error. Not thread-safe: one step at a time.
 */
#ifndef REPFS_IMAGE_BACKUP_H
#define REPFS_IMAGE_BACKUP_H

#include "core/bitmap.h"
#include "core/err.h"
#include "image/extentlist.h"
#include "image/newfile.h"
#include "image/volume.h"

enum backup_format { BACKUP_RAW, BACKUP_ZST };
/* By the name's end: ".zst", else raw. */
enum backup_format backup_format_of(const char *path);

struct backup;

struct backup_args {
	const char *what;      /* messages begin with it and the path: "export to" */
	struct volume *volume; /* borrowed until backup_close; NULL: writes come by backup_write alone */
	enum volume_layer layer;
	uint64_t ckpt;
	uint64_t size; /* of the image, in bytes: not more than the volume's */
	const char *path;
	enum backup_format format;
	bool list;	/* TARGET.extents goes with it */
	unsigned flags; /* enum newfile_flags */
};

/* Makes the target, without its name. Refused before anything is made where TARGET or its list exists. Returns owned.
 */
int backup_open(const struct backup_args *args, struct backup **ret, struct err *e);
/* Takes away what is not finished. NULL is fine. */
void backup_close(struct backup *b);

/* The blocks to copy, from the beginning: *only (its memory taken over: bits and `memory` live until the next call or
 * backup_close). Never called: all that the layer holds. A .zst is written in one pass: only before the first step. */
void backup_select(struct backup *b, const struct bitmap *only, void *memory);

enum backup_side { BACKUP_SOURCE, BACKUP_TARGET };
struct backup_step {
	uint64_t off;	       /* where it was */
	uint64_t bytes;	       /* content that it read or wrote: what a speed limit counts */
	enum backup_side side; /* where the error came from */
};
/* Copies at most one unit, or passes over a stretch of holes. 1: there may be more; 0: all is copied; -ERR_x. */
int backup_step(struct backup *b, struct backup_step *ret);
/* In bytes of the image, or of the selection: how far, of how much. */
void backup_progress(const struct backup *b, uint64_t *ret_done, uint64_t *ret_total);
uint64_t backup_copied(const struct backup *b); /* content written, in bytes */

/* A range of a raw target, from the caller's memory, in any order: what a guest has just written (buf NULL: zeroes).
 * The list gets it too; ranges may be of any bytes. */
int backup_write(struct backup *b, uint64_t off, uint64_t len, const void *buf);

/* All is copied: list and target get their names, durably, the list first. `about` is the list's head; its size, counts
 * and extents are filled in here. May be NULL without a list. Once, whatever it returns. */
int backup_finish(struct backup *b, struct extentlist_head *about, struct err *e);

#endif
