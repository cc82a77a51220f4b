/* The real storage with a switch for each fault: files whose path contains `match` fail as told, while it is told. For
 * tests of what happens when a disk fails under a running daemon. */
#ifndef REPFS_TESTS_LIB_FAULTSTORE_H
#define REPFS_TESTS_LIB_FAULTSTORE_H

#include <stdatomic.h>

#include "image/storage.h"

struct faults {
	const char *match;	       /* set before the store is opened */
	_Atomic int read, write, sync; /* 0, or the negative code that every such call gets */
	_Atomic int sync_once;	       /* the next sync fails with it; the disk that met it then goes on failing, as a
					* real one does until it is opened anew (I10) */
	_Atomic int write_once;	       /* the next write alone */
	_Atomic int hold;	       /* writes wait while it is not 0 */
	_Atomic int hold_read;	       /* so do reads */
	_Atomic int hold_sync;	       /* and syncs of what was written to */
	_Atomic int syncing;	       /* one has waited */
	_Atomic unsigned reading;      /* reads that have come, those that wait included */
	_Atomic unsigned failed;       /* calls that were made to fail */
};

/* Makes the folder if it is not there. f NULL: no faults. NULL: it can't be opened. */
struct storage *faultstore_open(const char *root, struct faults *f);

#endif
