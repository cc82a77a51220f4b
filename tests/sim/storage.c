/* What lies between the code under test and the simulated disk: a call may stop before and after it is carried out, for
 * long if the disk is stalled, and others go on meanwhile. */
#include <string.h>

#include "tests/sim/world_internal.h"

struct sstorage {
	struct storage s;
	struct storage *in;
	struct host *h;
};

struct sdisk {
	struct disk d;
	struct disk *in;
	struct host *h;
	int vol;     /* it is the disk of a volume, or a file of its active overlay; -1: something else */
	bool active; /* the latter: durable only by a sync of both files, which is the shell's to tell */
	bool map;    /* of these the map */
};

static void stop(struct host *h)
{
	struct world *w = h->w;
	if (co_current() == NULL || h->dying || h->looking)
		return;
	if (h->stalled_until > w->now)
		co_pause(h, h->stalled_until - w->now);
	else if (w->stop_one_in && world_chance(w, w->stop_one_in)) {
		uint64_t ns = world_delay(w, w->disk_ns);
		/* Work of a session that ends while it is carried out, and goes on in the next one. */
		if (w->shaky && !w->calm && ns > 2 * MS && world_more(w, 4) == 0) {
			world_cut(w);
			ns += world_more(w, 200 * MS);
		}
		co_pause(h, ns);
	}
}

#define IN(d) (((struct sdisk *)(void *)(d))->in)
#define HOST(d) (((struct sdisk *)(void *)(d))->h)
#define CALL(d, expr)                                                                                                  \
	do {                                                                                                           \
		stop(HOST(d));                                                                                         \
		int rc_ = (expr);                                                                                      \
		stop(HOST(d));                                                                                         \
		return rc_;                                                                                            \
	} while (0)

static int s_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	CALL(d, disk_read(IN(d), off, buf, len));
}
static int s_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	CALL(d, disk_write(IN(d), off, buf, len));
}
static int s_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	CALL(d, disk_zero(IN(d), off, len, punch));
}
static int s_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	return disk_extent(IN(d), off, end, ret);
}
static int s_sync(struct disk *d)
{
	struct sdisk *s = (void *)d;
	uint64_t mark;
	stop(s->h);
	model_sync_begin(s->h, &mark);
	int rc = disk_sync(s->in);
	if (s->vol >= 0 && rc < 0)
		model_sync_failed(s->h, s->active, (uint32_t)s->vol);
	else if (s->active && rc == 0)
		s->h->active_synced[s->vol][s->map] = mark;
	else if (s->vol >= 0)
		model_synced(s->h, mark, s->vol);
	stop(s->h);
	return rc;
}
static int s_set_size(struct disk *d, uint64_t size)
{
	CALL(d, disk_set_size(IN(d), size));
}
static int s_get_size(struct disk *d, uint64_t *ret)
{
	return disk_get_size(IN(d), ret);
}
static int s_allocated(struct disk *d, uint64_t *ret)
{
	return disk_allocated(IN(d), ret);
}
static void s_close(struct disk *d)
{
	disk_close(IN(d));
	simfree(d);
}

static const struct disk_ops disk_ops = {s_read,     s_write,	 s_zero,      s_extent, s_sync,
					 s_set_size, s_get_size, s_allocated, s_close,	NULL};

#define STORE(s) ((struct sstorage *)(void *)(s))

static void vol_of(struct sdisk *d, const char *path)
{
	static const char *const folders[WORLD_VOLUMES] = {"volumes/a/", "volumes/b/"};
	d->vol = -1;
	for (int v = 0; v < WORLD_VOLUMES; v++) {
		if (strncmp(path, folders[v], strlen(folders[v])) != 0)
			continue;
		const char *file = path + strlen(folders[v]);
		d->active = strncmp(file, "active-", strlen("active-")) == 0;
		d->map = strstr(file, ".map") != NULL;
		if (d->active || strcmp(file, "disk.raw") == 0)
			d->vol = v;
	}
}

static int st_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	struct disk *in;
	stop(STORE(s)->h);
	int rc = storage_open(STORE(s)->in, path, flags, &in);
	if (rc < 0)
		return rc;
	struct sdisk *d = simalloc(sizeof(*d));
	d->d.ops = &disk_ops;
	d->in = in;
	d->h = STORE(s)->h;
	vol_of(d, path);
	*ret = &d->d;
	return 0;
}
static int st_unlink(struct storage *s, const char *path)
{
	stop(STORE(s)->h);
	return storage_unlink(STORE(s)->in, path);
}
static int st_rename(struct storage *s, const char *from, const char *to)
{
	stop(STORE(s)->h);
	return storage_rename(STORE(s)->in, from, to);
}
static int st_mkdir(struct storage *s, const char *path)
{
	return storage_mkdir(STORE(s)->in, path);
}
static int st_rmdir(struct storage *s, const char *path)
{
	return storage_rmdir(STORE(s)->in, path);
}
static int st_sync_dir(struct storage *s, const char *path)
{
	stop(STORE(s)->h);
	return storage_sync_dir(STORE(s)->in, path);
}
static int st_list(struct storage *s, const char *path, int (*fn)(void *arg, const char *name), void *arg)
{
	return storage_list(STORE(s)->in, path, fn, arg);
}
static int st_free_bytes(struct storage *s, uint64_t *ret_free, uint64_t *ret_total)
{
	return storage_free_bytes(STORE(s)->in, ret_free, ret_total);
}
static void st_close(struct storage *s)
{
	(void)s; /* lives as long as the host's disk */
}

static const struct storage_ops storage_ops = {st_open,	    st_unlink, st_rename,     st_mkdir, st_rmdir,
					       st_sync_dir, st_list,   st_free_bytes, st_close};

struct storage *sim_storage_new(struct host *h)
{
	struct sstorage *s = simalloc(sizeof(*s));
	s->s.ops = &storage_ops;
	s->in = simstore_storage(h->ss);
	s->h = h;
	return &s->s;
}

void sim_storage_free(struct storage *s)
{
	simfree(s);
}
