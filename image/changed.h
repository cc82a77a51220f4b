/* Which blocks of a primary's volume have changed since a checkpoint that its peer keeps: an undo overlay's bitmap
 * without the content (SPEC 3), for incremental backups on the primary.
 *
 * An epoch is what was written between the points in the stream of two checkpoints; it has the number of the older one,
 * and `changed since k` is the union of the epochs from k on. Epochs are made in memory; changed_flush brings them to
 * files, volumes/NAME/changed-K (docs/format.md).
 *
 * Crash safety is the write-intent map's: a write sets its intent bit durably before it is made, and that bit is
 * cleared only after changed_flush, which covers every mark made before it. So after a crash whatever is in no file has
 * its intent bit, and the caller marks all regions whose bits are set (changed_mark) in what was loaded. Too much is
 * marked then, never too little. What can't be proven whole is dropped: no answer is given for it.
 *
 * Thread-safe. The caller orders changed_begin and changed_mark: a mark belongs to the epoch that is the newest when it
 * is made; a write that is under way while an epoch begins is marked in that one again.
 */
#ifndef REPFS_IMAGE_CHANGED_H
#define REPFS_IMAGE_CHANGED_H

#include <stdbool.h>

#include "core/bitmap.h"
#include "core/err.h"
#include "core/settings.h"
#include "image/storage.h"

#define CHANGED_EPOCHS_MAX 512

struct changed;

/* Loads the epochs of the volume's files; with keep false removes them: the disk was, or will be, changed by other than
 * this host's own writes. Files that do not check out go, and with them all older epochs. Returns owned. */
int changed_open(struct storage *s, const char *volume, uint64_t size, bool power, bool keep, struct changed **ret,
		 struct err *e);
void changed_close(struct changed *c); /* flushes nothing; NULL is fine */

/* A checkpoint's point in the stream is now. size: the volume's by now; another than before drops the older epochs. In
 * memory; without memory all is dropped. */
void changed_begin(struct changed *c, uint64_t number, uint64_t time_ns, bool pinned, uint64_t size);
/* [off, off + len) is about to be written, or may have been. Nothing where there is no epoch. In memory. */
void changed_mark(struct changed *c, uint64_t off, uint64_t len);
/* Every mark made before this is in the files, durably with `power`. Also merges epochs that `keep` (NULL: none are
 * merged) does not keep into the older one beside them. A failure has dropped everything, files too; if even that
 * failed: -ERR_x, and no intent bit may be cleared. */
int changed_flush(struct changed *c, const struct settings *keep);
/* No epoch any more, in memory and as files. */
int changed_drop(struct changed *c);

/* Sets the blocks that have changed since the point of checkpoint `since` in *into (a bit for each block of the
 * volume). -ERR_NOENT: that is not known here. */
int changed_since(struct changed *c, uint64_t since, struct bitmap *into);
uint32_t changed_in_memory(struct changed *c); /* epochs that have no file yet */
/* The numbers that can be asked for, ascending; returns how many, at most max. */
uint32_t changed_numbers(struct changed *c, uint64_t *numbers, uint32_t max);

#endif
