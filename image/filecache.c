/* Files of closed epochs, of which only so many are open at a time (image/filecache.h).
 *
 * The limit is the process's, the order of use each cache's own: whoever opens one too many closes one of its own.
 * A cache's lock is held while a file is opened, synced to be closed, or closed, not while it is read or written; a
 * file in use is not closed.
 */
#include "image/filecache.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/err.h"
#include "core/os/thread.h"

struct cached {
	struct disk disk;
	struct filecache *c;
	struct storage *s;
	struct disk *real; /* NULL: closed */
	unsigned users;
	bool unsynced; /* perhaps written since its last sync */
	int error;     /* of the first sync that failed */
	struct cached *newer, *older;
	char path[];
};

struct filecache {
	struct mutex lock;
	struct cached *newest, *oldest; /* all of its files, by their last use */
};

static unsigned files_max;
static atomic_uint files_open;

void filecache_limit(unsigned files)
{
	files_max = files;
}

unsigned filecache_open_files(void)
{
	return atomic_load(&files_open);
}

int filecache_new(struct filecache **ret)
{
	struct filecache *c = calloc(1, sizeof(*c));

	if (!c)
		return -ERR_NOMEM;
	mutex_init(&c->lock);
	*ret = c;
	return 0;
}

void filecache_free(struct filecache *c)
{
	if (!c)
		return;
	PRE(!c->newest);
	mutex_destroy(&c->lock);
	free(c);
}

static void list_out(struct cached *x)
{
	*(x->newer ? &x->newer->older : &x->c->newest) = x->older;
	*(x->older ? &x->older->newer : &x->c->oldest) = x->newer;
}

static void list_in(struct cached *x)
{
	x->newer = NULL;
	x->older = x->c->newest;
	*(x->older ? &x->older->newer : &x->c->oldest) = x;
	x->c->newest = x;
}

static void close_real(struct cached *x)
{
	disk_close(x->real);
	x->real = NULL;
	(void)atomic_fetch_sub(&files_open, 1);
}

static void trim_locked(struct filecache *c)
{
	for (struct cached *x = c->oldest; x && atomic_load(&files_open) > files_max; x = x->newer) {
		if (!x->real || x->users || x->error)
			continue;
		if (x->unsynced)
			x->error = disk_sync(x->real);
		if (x->error)
			continue;
		x->unsynced = false;
		close_real(x);
	}
}

void filecache_trim(struct filecache *c)
{
	mutex_lock(&c->lock);
	trim_locked(c);
	mutex_unlock(&c->lock);
}

static struct cached *cached_of(struct disk *d)
{
	return CONTAINER_OF(d, struct cached, disk);
}

/* Open, and not closed before its put. */
static int get(struct cached *x, bool write)
{
	int rc = 0;

	mutex_lock(&x->c->lock);
	if (!x->real) {
		rc = storage_open(x->s, x->path, 0, &x->real);
		if (rc == 0)
			(void)atomic_fetch_add(&files_open, 1);
	}
	if (rc == 0) {
		x->users++;
		x->unsynced = x->unsynced || write;
		if (x->c->newest != x) {
			list_out(x);
			list_in(x);
		}
		trim_locked(x->c);
	}
	mutex_unlock(&x->c->lock);
	return rc;
}

static void put(struct cached *x)
{
	mutex_lock(&x->c->lock);
	x->users--;
	mutex_unlock(&x->c->lock);
}

/* One call of the real file. */
#define WITH_REAL(d, write, expr)                                                                                      \
	do {                                                                                                           \
		struct cached *x = cached_of(d);                                                                       \
		int rc = get(x, write);                                                                                \
		if (rc < 0)                                                                                            \
			return rc;                                                                                     \
		rc = (expr);                                                                                           \
		put(x);                                                                                                \
		return rc;                                                                                             \
	} while (0)

static int cached_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	WITH_REAL(d, false, disk_read(x->real, off, buf, len));
}

static int cached_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	WITH_REAL(d, true, disk_write(x->real, off, buf, len));
}

static int cached_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	WITH_REAL(d, true, disk_zero(x->real, off, len, punch));
}

static int cached_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	WITH_REAL(d, false, disk_extent(x->real, off, end, ret));
}

static int cached_set_size(struct disk *d, uint64_t size)
{
	WITH_REAL(d, true, disk_set_size(x->real, size));
}

static int cached_get_size(struct disk *d, uint64_t *ret)
{
	WITH_REAL(d, false, disk_get_size(x->real, ret));
}

static int cached_allocated(struct disk *d, uint64_t *ret)
{
	WITH_REAL(d, false, disk_allocated(x->real, ret));
}

/* One that is closed was synced. It stays `unsynced` here: a write beside this sync may have come too late for it. */
static int cached_sync(struct disk *d)
{
	struct cached *x = cached_of(d);
	int rc;

	mutex_lock(&x->c->lock);
	bool closed = !x->real;
	mutex_unlock(&x->c->lock);
	if (closed)
		return 0;
	rc = get(x, false);
	if (rc < 0)
		return rc;
	rc = disk_sync(x->real);
	mutex_lock(&x->c->lock);
	x->error = x->error ? x->error : rc;
	rc = x->error;
	x->users--;
	mutex_unlock(&x->c->lock);
	return rc;
}

static void cached_forget(struct disk *d, uint64_t off, uint64_t len)
{
	struct cached *x = cached_of(d);

	if (get(x, false) < 0)
		return;
	disk_forget(x->real, off, len);
	put(x);
}

static void cached_close(struct disk *d)
{
	struct cached *x = cached_of(d);
	struct filecache *c = x->c;

	mutex_lock(&c->lock);
	INVARIANT(x->users == 0);
	if (x->real)
		close_real(x);
	list_out(x);
	mutex_unlock(&c->lock);
	free(x);
}

static const struct disk_ops cached_ops = {
    .read = cached_read,
    .write = cached_write,
    .zero = cached_zero,
    .extent = cached_extent,
    .sync = cached_sync,
    .set_size = cached_set_size,
    .get_size = cached_get_size,
    .allocated = cached_allocated,
    .close = cached_close,
    .forget = cached_forget,
};

int filecache_add(struct filecache *c, struct storage *s, const char *path, struct disk **d)
{
	struct cached *x;

	if (files_max == 0)
		return 0;
	x = malloc(sizeof(*x) + strlen(path) + 1);
	if (!x)
		return -ERR_NOMEM;
	*x = (struct cached){.disk.ops = &cached_ops, .c = c, .s = s, .real = *d, .unsynced = true};
	memcpy(x->path, path, strlen(path) + 1);
	(void)atomic_fetch_add(&files_open, 1);
	mutex_lock(&c->lock);
	list_in(x);
	mutex_unlock(&c->lock);
	*d = &x->disk;
	return 0;
}
