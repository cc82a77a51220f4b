/* A file that has its name only when it is whole: what a backup or an export leaves outside the store.
 *
 * It is made without a name in the folder of its path (O_TMPFILE), so that whatever ends the process leaves nothing. A
 * filesystem that can't do that gets PATH.part, made exclusively: that one stays behind a kill, and can't be taken for
 * the whole. newfile_commit makes the content durable, then the name, and never replaces a file.
 *
 * Messages begin with `what` and the path: "export to /b/vm1.raw: ...".
 */
#ifndef REPFS_IMAGE_NEWFILE_H
#define REPFS_IMAGE_NEWFILE_H

#include <stdbool.h>

#include "core/err.h"

enum newfile_flags {
	NEWFILE_NAMED = 1 << 0, /* as where O_TMPFILE does not work; for tests */
};

struct newfile {
	const char *what; /* borrowed */
	char *path;
	char *part; /* the name that it has meanwhile; NULL: none */
	int fd;
};

/* -ERR_EXIST where path or PATH.part is there. The file is empty, mode 0600. On failure *ret needs no drop. */
int newfile_make(const char *what, const char *path, unsigned flags, struct newfile *ret, struct err *e);
/* Syncs the file, names it, syncs the folder; then it is closed, as newfile_drop does. On failure nothing is left and
 * newfile_drop is still called. */
int newfile_commit(struct newfile *f, struct err *e);
/* Closes it and, if it was not committed, removes it. Idempotent, and fine for a zeroed one. */
void newfile_drop(struct newfile *f);

#endif
