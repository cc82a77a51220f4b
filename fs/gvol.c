/* Volumes as the mount sees them: names, attributes, reads, opens. Writes go to group_io (fs/repl_shell.c). */
#include <stdlib.h>
#include <string.h>

#include "core/os/clock.h"
#include "fs/repl_shell.h"

struct gvol *gvol_ref(struct gvol *v)
{
	atomic_fetch_add(&v->refs, 1);
	return v;
}

void gvol_unref(struct gvol *v)
{
	if (v && atomic_fetch_sub(&v->refs, 1) == 1) {
		gclone_free(v->clone);
		free(v);
	}
}

const char *gvol_name(const struct gvol *v)
{
	return v->name;
}

uint32_t gvol_id(const struct gvol *v)
{
	return v->id;
}

/* The group of a volume that may be deleted at any time: a reference, or NULL. */
struct group *gvol_group(struct gvol *v)
{
	pthread_rwlock_rdlock(&v->d->names);
	struct group *g = v->g ? group_ref(v->g) : NULL;
	pthread_rwlock_unlock(&v->d->names);
	return g;
}

uint64_t gvol_size(struct gvol *v)
{
	struct group *g = gvol_group(v);
	uint64_t size = !g ? 0 : v->clone ? v->clone->size : volume_size(v->vol);
	group_unref(g);
	return size;
}

uint64_t gvol_size_at(struct group *g, struct gvol *v, uint64_t ckpt)
{
	mutex_lock(&g->lock);
	uint64_t size = repl_meta_size_at(repl_meta(g->core), v->index, ckpt);
	mutex_unlock(&g->lock);
	return size;
}

/* Of a file; ckpt: of GVOL_CKPT. */
static uint64_t file_size(struct group *g, struct gvol *v, enum gvol_file file, uint64_t ckpt)
{
	if (file == GVOL_CKPT)
		return gvol_size_at(g, v, ckpt);
	return v->clone ? v->clone->size : volume_size(v->vol);
}

/* ---- opens ---- */

int gvol_open(struct gvol *v, bool write, bool o_direct, struct gvol_handle **ret, bool *ret_direct)
{
	struct gvol_handle *h = calloc(1, sizeof(*h));
	if (h == NULL)
		return -ERR_NOMEM;
	pthread_rwlock_rdlock(&v->d->names);
	struct group *g = v->g;
	if (g == NULL || (v->clone && v->clone->going)) {
		pthread_rwlock_unlock(&v->d->names);
		free(h);
		return -ERR_NOENT;
	}
	/* Before `serving` is looked at: publish changes them the other way round, so that a handle of the old way to
	 * serve can't carry the new epoch. */
	h->epoch = atomic_load(&g->handle_epoch);
	/* A secondary's content changes under its readers: written pages must not come back after a switch (SPEC 4). */
	bool view = atomic_load(&g->serving) != SERVING_DISK && !v->clone;
	*ret_direct = o_direct || (write && view);
	h->v = gvol_ref(v);
	h->write = write;
	h->cached = !*ret_direct;
	atomic_fetch_add(&v->opens, 1);
	if (h->cached)
		atomic_fetch_add(&v->cached_opens, 1);
	pthread_rwlock_unlock(&v->d->names);
	*ret = h;
	return 0;
}

void gvol_release(struct gvol_handle *h)
{
	if (h == NULL)
		return;
	if (h->cached)
		atomic_fetch_sub(&h->v->cached_opens, 1);
	atomic_fetch_sub(&h->v->opens, 1);
	gvol_unref(h->v);
	free(h);
}

unsigned gvol_cached_opens(struct gvol *v)
{
	return atomic_load(&v->cached_opens);
}

static bool detached(const struct group *g, const struct gvol *v)
{
	return (atomic_load(&g->detached) >> v->index & 1) != 0;
}

static bool stale(const struct group *g, const struct gvol_handle *h)
{
	return h && !h->v->clone && h->epoch != atomic_load(&g->handle_epoch);
}

bool gvol_stale(const struct gvol_handle *h)
{
	struct group *g = gvol_group(h->v);
	bool yes = g == NULL || stale(g, h);
	group_unref(g);
	return yes;
}

/* ---- reads ---- */

static int submit_and_wait(struct gvol *v, const struct gvol_handle *h, enum repl_kind kind, uint64_t off, uint64_t len,
			   const void *data, void *into);

/* A restarted primary holds its I/O until it knows that its peer has not failed over, at most peer_timeout. If the
 * daemon ends before, what the disk holds may be the past: false. */
static bool wait_while_holding(struct group *g)
{
	mutex_lock(&g->lock);
	while (repl_holding(g->core) && !g->closing)
		cond_wait(&g->cond, &g->lock);
	bool known = !repl_holding(g->core);
	mutex_unlock(&g->lock);
	return known;
}

bool gvol_detached(struct gvol *v)
{
	struct group *g = gvol_group(v);
	bool yes = g && detached(g, v);
	group_unref(g);
	return yes;
}

static int read_volume(struct group *g, struct gvol *v, uint64_t off, uint64_t len, void *buf)
{
	switch ((enum repl_serving)atomic_load(&g->serving)) {
	case SERVING_DISK:
		return volume_read_disk(v->vol, off, len, buf);
	case SERVING_VIEW:
		return volume_read_view(v->vol, atomic_load(&g->base), off, len, buf);
	default:
		return -ERR_IO;
	}
}

int gvol_read(struct gvol *v, const struct gvol_handle *h, enum gvol_file file, uint64_t ckpt, uint64_t off,
	      uint64_t len, void *buf)
{
	struct group *g = gvol_group(v);
	if (g == NULL)
		return -ERR_IO;
	int err = -ERR_IO;
	if (file == GVOL_VOLUME && atomic_load(&g->holding) && !wait_while_holding(g)) {
		group_unref(g);
		return err;
	}
	pthread_rwlock_rdlock(&g->view);
	if (!stale(g, h) && !(file == GVOL_VOLUME && detached(g, v))) {
		switch (file) {
		case GVOL_VOLUME:
			err = read_volume(g, v, off, len, buf);
			break;
		case GVOL_ACTIVE:
			err = volume_read_overlay(v->vol, LAYER_ACTIVE, 0, off, len, buf);
			break;
		case GVOL_HIDDEN:
			err = volume_read_overlay(v->vol, LAYER_UNDO, 0, off, len, buf);
			break;
		case GVOL_CKPT:
			err = volume_read_ckpt(v->vol, ckpt, off, len, buf);
			break;
		case GVOL_CLONE:
			err = volume_read_clone(v->vol, v->clone->id, off, len, buf);
			break;
		}
	}
	pthread_rwlock_unlock(&g->view);
	/* Its disk is detached, or was while it was read, or is to be, as it can't be read: the core knows. */
	if (file == GVOL_VOLUME && atomic_load(&g->serving) == SERVING_DISK && !stale(g, h) && (err || detached(g, v)))
		err = submit_and_wait(v, h, REPL_READ, off, len, NULL, buf);
	group_unref(g);
	return err;
}

/* ---- attributes ---- */

static enum volume_layer layer_of(const struct group *g, const struct gvol *v, enum gvol_file file, uint64_t *ckpt)
{
	switch (file) {
	case GVOL_CLONE:
		*ckpt = v->clone->id;
		return LAYER_CLONE;
	case GVOL_ACTIVE:
		*ckpt = 0;
		return LAYER_ACTIVE;
	case GVOL_HIDDEN:
		*ckpt = 0;
		return LAYER_UNDO;
	case GVOL_CKPT:
		return LAYER_IMAGE;
	case GVOL_VOLUME:
		break;
	}
	*ckpt = atomic_load(&g->base);
	return atomic_load(&g->serving) == SERVING_VIEW ? LAYER_VIEW : LAYER_DISK;
}

static int find_ckpt(struct group *g, uint64_t number, struct repl_ckpt *ret)
{
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	int i = repl_meta_find_ckpt(m, number);
	i = i < 0 || repl_shows_ckpt(g->core, (uint32_t)i) ? i : -ERR_NOENT;
	if (i >= 0)
		*ret = m->ckpts[i];
	mutex_unlock(&g->lock);
	return i < 0 ? -ERR_NOENT : 0;
}

int gvol_attr(struct gvol *v, enum gvol_file file, uint64_t ckpt, struct gvol_attr *ret)
{
	struct group *g = gvol_group(v);
	struct repl_ckpt c = {0};
	struct gvol_attr a = {0};
	if (g == NULL)
		return -ERR_NOENT;
	int err = file == GVOL_CKPT ? find_ckpt(g, ckpt, &c) : 0;
	if (!err) {
		a.size = file_size(g, v, file, ckpt);
		pthread_rwlock_rdlock(&g->view);
		enum volume_layer layer = layer_of(g, v, file, &ckpt);
		if (volume_allocated(v->vol, layer, ckpt, &a.allocated) < 0)
			a.allocated = 0;
		pthread_rwlock_unlock(&g->view);
		a.mtime_ns = file == GVOL_CKPT ? c.time_ns : atomic_load(&v->mtime_ns);
		a.writable = file == GVOL_VOLUME || file == GVOL_CLONE;
		*ret = a;
	}
	group_unref(g);
	return err;
}

uint32_t gvol_ckpts(struct gvol *v, uint64_t *numbers, uint32_t max, uint64_t *ret_latest)
{
	struct group *g = gvol_group(v);
	*ret_latest = 0;
	if (g == NULL)
		return 0;
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	uint32_t n = 0;
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		if (!repl_shows_ckpt(g->core, i))
			continue;
		if (n < max)
			numbers[n] = m->ckpts[i].number;
		n++;
		*ret_latest = m->ckpts[i].number;
	}
	mutex_unlock(&g->lock);
	group_unref(g);
	return n;
}

int gvol_extent(struct gvol *v, enum gvol_file file, uint64_t ckpt, uint64_t off, struct extent *ret)
{
	struct group *g = gvol_group(v);
	if (g == NULL)
		return -ERR_NOENT;
	if (file == GVOL_VOLUME && atomic_load(&g->holding) && !wait_while_holding(g)) {
		group_unref(g);
		return -ERR_IO;
	}
	uint64_t size = file_size(g, v, file, ckpt);
	pthread_rwlock_rdlock(&g->view);
	enum volume_layer layer = layer_of(g, v, file, &ckpt);
	int err = off < size ? 0 : -ERR_RANGE;
	if (err)
		;					/* past the end of a smaller checkpoint */
	else if (file == GVOL_VOLUME && detached(g, v)) /* where the peer's disk has holes is not known here */
		*ret = (struct extent){off, volume_size(v->vol) - off, true};
	else
		err = volume_extent(v->vol, layer, ckpt, off, ret);
	if (!err && ret->len > size - off) /* the volume has grown since */
		ret->len = size - off;
	pthread_rwlock_unlock(&g->view);
	group_unref(g);
	return err;
}

/* ---- requests ---- */

void gvol_submit(struct gio *gio)
{
	struct group *g = gvol_group(gio->v);
	if (g == NULL || stale(g, gio->h) || (gio->kind != REPL_FLUSH && gio->len == 0)) {
		int err = g && gio->kind != REPL_FLUSH && gio->len == 0 ? 0 : -ERR_IO;
		group_unref(g);
		gio->done(gio, err);
		return;
	}
	if (gio->v->clone)
		clone_io(g, gio);
	else
		group_io(g, gio);
	group_unref(g);
}

struct waiter {
	struct mutex m;
	struct cond c;
	bool done;
	int error;
};

static void waiter_done(struct gio *gio, int error)
{
	struct waiter *w = gio->user;
	mutex_lock(&w->m);
	w->done = true;
	w->error = error;
	cond_signal(&w->c);
	mutex_unlock(&w->m);
}

static int submit_and_wait(struct gvol *v, const struct gvol_handle *h, enum repl_kind kind, uint64_t off, uint64_t len,
			   const void *data, void *into)
{
	struct waiter w = {.done = false};
	struct gio gio = {.v = v,
			  .h = h,
			  .kind = kind,
			  .off = off,
			  .len = len,
			  .data = data,
			  .into = into,
			  .done = waiter_done,
			  .user = &w};
	mutex_init(&w.m);
	cond_init(&w.c);
	gvol_submit(&gio);
	mutex_lock(&w.m);
	while (!w.done)
		cond_wait(&w.c, &w.m);
	mutex_unlock(&w.m);
	cond_destroy(&w.c);
	mutex_destroy(&w.m);
	return w.error;
}

int gvol_write(struct gvol *v, const struct gvol_handle *h, uint64_t off, uint64_t len, const void *data)
{
	return submit_and_wait(v, h, REPL_WRITE, off, len, data, NULL);
}

int gvol_zero(struct gvol *v, const struct gvol_handle *h, uint64_t off, uint64_t len, bool discard)
{
	int err = 0;
	while (len && !err) { /* REPL_ZERO_MAX a request */
		uint64_t n = min_u64(len, REPL_ZERO_MAX);
		err = submit_and_wait(v, h, discard ? REPL_DISCARD : REPL_ZERO, off, n, NULL, NULL);
		off += n;
		len -= n;
	}
	return err;
}

int gvol_flush(struct gvol *v, const struct gvol_handle *h)
{
	return submit_and_wait(v, h, REPL_FLUSH, 0, 0, NULL, NULL);
}
