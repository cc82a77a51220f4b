/* Files of closed epochs, of which only so many are open at a time: a host may keep more checkpoints than it may have
 * files open.
 *
 * A file that is given to a cache is closed when it was not used for the longest time and others need its place, and is
 * opened again by its path when it is used. A failed write-back is told to an open file only (I10), so one that may
 * have been written is synced before it is closed; one whose sync has failed stays open, and goes on failing.
 */
#ifndef REPFS_IMAGE_FILECACHE_H
#define REPFS_IMAGE_FILECACHE_H

#include "image/storage.h"

struct filecache;

/* So many files of all caches of the process may be open; 0 (the default): any number, nothing is closed. Before any
 * file is given to one. */
void filecache_limit(unsigned files);
unsigned filecache_open_files(void); /* how many are */

int filecache_new(struct filecache **ret); /* returns owned; 0 or -ERR_NOMEM */
void filecache_free(struct filecache *c);  /* NULL is fine. PRE: its files are closed */
/* *d, an open file of s at `path`, is the cache's from now on: *d becomes what stands for it. The caller excludes its
 * users. No I/O. A failure leaves *d. */
int filecache_add(struct filecache *c, struct storage *s, const char *path, struct disk **d);
/* Closes what is too much; I/O. Uses of a file do so too. */
void filecache_trim(struct filecache *c);

#endif
