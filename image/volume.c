/* A volume: making, opening, closing, growing, and reading it. Saving and writing are in cow.c, epochs in
 * history.c, extents and sizes in extents.c; the locks and what they protect are in volume_internal.h.
 *
 * A read resolves its range to runs of blocks with one source: the active overlay if it is asked for and holds them,
 * else the oldest overlay of the chain from the checkpoint on that does, else the disk. Between the look at the bitmaps
 * and the read of the disk a writer may have come: it set its bits in the live overlay before it touched the disk, so
 * after a read of the disk the live bits of that run are looked at again and what they show is read from the overlay
 * instead (V2). Other overlays gain bits only by a merge, of blocks that a newer one in the same chain held already.
 *
 * Growing is in three steps, so that nothing can fail once it is decided: the disk gets longer (volume_extend; nobody
 * sees it, and the next open cuts a hole off again), memory is found (volume_grow_prepare), and after the record that
 * names the size all bitmaps grow under the exclusive lock (volume_grow). No overlay file changes: they are as long as
 * what was saved.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "image/based.h"
#include "image/volume_internal.h"

/* ---- locks ---- */

static void check_zero(int r)
{
	INVARIANT(r == 0);
}

void volume_rwlock_init(pthread_rwlock_t *l)
{
	pthread_rwlockattr_t attr;

	check_zero(pthread_rwlockattr_init(&attr));
	/* A checkpoint must not wait for as long as a guest keeps reading. */
	check_zero(pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP));
	check_zero(pthread_rwlock_init(l, &attr));
	check_zero(pthread_rwlockattr_destroy(&attr));
}

void volume_lock_shared(struct volume *v)
{
	check_zero(pthread_rwlock_rdlock(&v->chain_lock));
}

void volume_lock_exclusive(struct volume *v)
{
	check_zero(pthread_rwlock_wrlock(&v->chain_lock));
}

void volume_unlock(struct volume *v)
{
	check_zero(pthread_rwlock_unlock(&v->chain_lock));
}

/* ---- paths and layers ---- */

#define DISK_FILE "disk.raw"
#define UNDO_PREFIX "undo-"
#define ACTIVE_PREFIX "active-"
#define CLONE_PREFIX "clone-"

void volume_path(const char *name, const char *file, char out[VOLUME_PATH_SIZE])
{
	int n = snprintf(out, VOLUME_PATH_SIZE, "volumes/%s%s%s", name, file[0] ? "/" : "", file);

	PRE(n > 0 && n < (int)VOLUME_PATH_SIZE);
}

void layer_path(const struct volume *v, enum layer_kind kind, uint64_t id, char out[VOLUME_PATH_SIZE])
{
	static const char *const prefixes[] = {UNDO_PREFIX, ACTIVE_PREFIX, CLONE_PREFIX};
	char file[48];

	(void)snprintf(file, sizeof(file), "%s%" PRIu64, prefixes[kind], id);
	volume_path(v->name, file, out);
}

int layer_new(const struct volume *v, struct overlay *o, enum layer_kind kind, uint64_t id, struct layer **ret)
{
	struct layer *l = calloc(1, sizeof(*l));

	if (!l) {
		overlay_close(o);
		return -ERR_NOMEM;
	}
	overlay_set_durable(o, v->power);
	*l = (struct layer){.o = o, .held = overlay_held(o), .kind = kind, .id = id, .refs = 1};
	*ret = l;
	return 0;
}

int layer_ascertain(struct volume *v, struct layer *l)
{
	int rc = 0;

	if (!v->power || l->certain)
		return 0;
	rc = overlay_sync_data(l->o);
	if (rc == 0)
		rc = overlay_sync_map(l->o);
	l->certain = rc == 0;
	return rc;
}

void layer_ref(struct layer *l)
{
	unsigned before = __atomic_fetch_add(&l->refs, 1, __ATOMIC_RELAXED);

	INVARIANT(before > 0);
}

void layer_unref(struct layer *l)
{
	if (!l || __atomic_sub_fetch(&l->refs, 1, __ATOMIC_ACQ_REL) > 0)
		return;
	overlay_close(l->o);
	free(l);
}

/* ---- names in a folder ---- */

/* Enough for two files of every kept checkpoint and as many leftovers; what is more waits for the next open. */
#define NAMES_MAX (4U * VOLUME_CKPTS_MAX)

struct name_list {
	char (*names)[256];
	size_t n, cap;
	bool (*wanted)(const void *arg, const char *name);
	const void *arg;
};

static int name_list_add(void *arg, const char *name)
{
	struct name_list *l = arg;

	if (l->n == NAMES_MAX || strlen(name) >= sizeof(l->names[0]) || (l->wanted && !l->wanted(l->arg, name)))
		return 0;
	if (l->n == l->cap) {
		size_t cap = l->cap ? 2 * l->cap : 16;
		void *p = realloc(l->names, cap * sizeof(l->names[0]));

		if (!p)
			return -ERR_NOMEM;
		l->names = p;
		l->cap = cap;
	}
	(void)snprintf(l->names[l->n++], sizeof(l->names[0]), "%s", name);
	return 0;
}

/* Unlinks the entries of the volume's folder that `wanted` picks (NULL: all). */
static int unlink_entries(struct storage *s, const char *name, bool (*wanted)(const void *, const char *),
			  const void *arg)
{
	struct name_list l = {.wanted = wanted, .arg = arg};
	char path[VOLUME_PATH_SIZE];
	int rc;

	volume_path(name, "", path);
	rc = storage_list(s, path, name_list_add, &l);
	for (size_t i = 0; rc == 0 && i < l.n; i++) {
		char file[STORAGE_PATH_MAX];

		(void)snprintf(file, sizeof(file), "%s/%s", path, l.names[i]);
		rc = storage_unlink(s, file);
		if (rc == -ERR_NOENT)
			rc = 0;
	}
	free(l.names);
	return rc;
}

/* ---- make, delete ---- */

static int stop_at_first(void *arg, const char *name)
{
	(void)arg;
	(void)name;
	return -ERR_EXIST;
}

static int create_raw(struct storage *s, const char *name, uint64_t size)
{
	char path[VOLUME_PATH_SIZE];
	struct disk *d;
	int rc;

	volume_path(name, DISK_FILE, path);
	rc = storage_open(s, path, STORAGE_CREATE | STORAGE_EXCL, &d);
	if (rc < 0)
		return rc;
	rc = disk_set_size(d, size);
	/* In `process` too: without its length, which a sync that failed would take, it could not be opened. */
	if (rc == 0)
		rc = disk_sync(d);
	disk_close(d);
	return rc;
}

static int create_disk(struct storage *s, const char *name, uint64_t size, const struct based_args *base, bool power,
		       struct err *e)
{
	char folder[VOLUME_PATH_SIZE];
	int rc;

	if (base) {
		rc = based_create(s, name, size, base, power, e);
		if (rc < 0)
			return rc;
	} else {
		rc = create_raw(s, name, size);
	}
	volume_path(name, "", folder);
	if (rc == 0 && power)
		rc = storage_sync_dir(s, folder);
	if (rc == 0 && power)
		rc = storage_sync_dir(s, "volumes");
	if (rc == 0 && power)
		rc = storage_sync_dir(s, "");
	return rc < 0 ? err_set(e, -rc, "create volume %s: making its disk: %s", name, err_short(rc)) : 0;
}

int volume_create(struct storage *s, const char *name, uint64_t size, enum volume_durability dur, struct err *e)
{
	return volume_create_over(s, name, size, NULL, dur, e);
}

int volume_create_over(struct storage *s, const char *name, uint64_t size, const struct based_args *base,
		       enum volume_durability dur, struct err *e)
{
	char folder[VOLUME_PATH_SIZE];
	int rc;

	PRE(size > 0 && size % SECTOR_SIZE == 0 && size <= VOLUME_SIZE_MAX);
	volume_path(name, "", folder);
	rc = storage_mkdir(s, "volumes");
	if (rc == 0) {
		/* mkdir is content with a folder that is there: ask first. One process at a time has the store's lock.
		 */
		rc = storage_list(s, folder, stop_at_first, NULL);
		if (rc == 0)
			rc = -ERR_EXIST;
		else if (rc == -ERR_NOENT)
			rc = 0;
	}
	if (rc == -ERR_EXIST)
		return err_set(e, ERR_EXIST, "create volume %s: its folder %s is there already", name, folder);
	if (rc == 0)
		rc = storage_mkdir(s, folder);
	if (rc < 0)
		return err_set(e, -rc, "create volume %s: making its folder: %s", name, err_short(rc));
	rc = create_disk(s, name, size, base, dur == DURABILITY_POWER, e);
	if (rc < 0)
		(void)volume_delete(s, name, NULL);
	return rc;
}

int volume_delete(struct storage *s, const char *name, struct err *e)
{
	char folder[VOLUME_PATH_SIZE];
	int rc;

	volume_path(name, "", folder);
	rc = unlink_entries(s, name, NULL, NULL);
	if (rc == 0)
		rc = storage_rmdir(s, folder);
	if (rc < 0 && rc != -ERR_NOENT)
		return err_set(e, -rc, "delete volume %s: removing its files: %s", name, err_short(rc));
	return 0;
}

/* ---- open, close ---- */

static bool args_keep(const struct volume_open_args *args, uint64_t ckpt)
{
	uint32_t low = 0, high = args->n_ckpts;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (args->ckpts[mid] < ckpt)
			low = mid + 1;
		else
			high = mid;
	}
	return low < args->n_ckpts && args->ckpts[low] == ckpt;
}

/* A clone whose checkpoint was given up is named still, and has no overlay any more. */
static bool args_clone(const struct volume_open_args *args, uint64_t id)
{
	for (uint32_t i = 0; i < args->n_clones; i++)
		if (args->clones[i].id == id)
			return args_keep(args, args->clones[i].ckpt);
	return false;
}

/* An overlay file of the volume that args do not name. */
static bool is_leftover(const void *arg, const char *name)
{
	static const char *const prefixes[] = {UNDO_PREFIX, ACTIVE_PREFIX, CLONE_PREFIX};
	const struct volume_open_args *args = arg;
	char expect[64], *end;
	size_t kind = 0;
	bool named;

	while (kind < ARRAY_LEN(prefixes) && strncmp(name, prefixes[kind], strlen(prefixes[kind])) != 0)
		kind++;
	if (kind == ARRAY_LEN(prefixes))
		return false;
	uint64_t id = strtoull(name + strlen(prefixes[kind]), &end, 10);

	switch ((enum layer_kind)kind) {
	case LAYER_KIND_UNDO:
		named = args_keep(args, id);
		break;
	case LAYER_KIND_ACTIVE:
		named = args->active_id && args->active_id == id;
		break;
	default:
		named = args_clone(args, id);
		break;
	}
	if (!named || (strcmp(end, ".data") != 0 && strcmp(end, ".map") != 0))
		return true;
	/* "undo-07.map" is nobody's. */
	(void)snprintf(expect, sizeof(expect), "%s%" PRIu64 "%s", prefixes[kind], id, end);
	return strcmp(name, expect) != 0;
}

/* What a filesystem may call data beyond a size that is not a multiple of its blocks. */
#define TAIL_MAX (64U << 10)

/* Whether nothing but zeroes was ever put into [off, end): a hole, but for the rest of the filesystem's block at off.
 */
static int is_untouched(struct disk *d, uint64_t off, uint64_t end, bool *ret)
{
	struct extent x;
	int rc = disk_extent(d, off, end, &x);

	*ret = true;
	if (rc == 0 && x.data && x.len <= TAIL_MAX) {
		uint8_t *tail = malloc((size_t)x.len);

		if (!tail)
			return -ERR_NOMEM;
		rc = disk_read(d, off, tail, (size_t)x.len);
		for (uint64_t i = 0; rc == 0 && i < x.len; i++)
			*ret = *ret && tail[i] == 0;
		free(tail);
		off += x.len;
		if (rc == 0 && off < end)
			rc = disk_extent(d, off, end, &x);
		else
			x = (struct extent){off, 0, false};
	}
	if (rc == 0)
		*ret = *ret && !x.data && x.off + x.len == end;
	return rc;
}

/* A disk that is longer than it should be, with nothing in the surplus, is a growth that was cut off before anything
 * knew of it: the surplus goes again. Anything else is not ours to mend. */
static int disk_fit(struct volume *v, uint64_t size, struct err *e)
{
	bool untouched = false;
	uint64_t now;
	int rc = disk_get_size(v->disk, &now);

	if (rc == 0 && now > size) {
		rc = is_untouched(v->disk, size, now, &untouched);
		if (rc == 0 && untouched) {
			rc = disk_set_size(v->disk, size);
			now = size;
		}
	}
	if (rc < 0)
		return err_set(e, -rc, "open volume %s: asking for the size of its " DISK_FILE ": %s", v->name,
			       err_short(rc));
	if (now != size)
		return err_set(e, ERR_CORRUPT,
			       "open volume %s: volumes/%s/" DISK_FILE " has %" PRIu64 " bytes and should have %" PRIu64
			       "; something else changed it: restore it from a backup, or from the peer",
			       v->name, v->name, now, size);
	return 0;
}

/* disk.raw, or else the disk over a base. */
static int open_disk_at(struct volume *v, uint64_t size, struct disk **ret, struct err *e)
{
	char path[VOLUME_PATH_SIZE];
	int rc;

	volume_path(v->name, DISK_FILE, path);
	rc = storage_open(v->storage, path, STORAGE_FRESH, ret);
	if (rc == 0)
		return 0;
	if (rc != -ERR_NOENT)
		return err_set(e, -rc, "open volume %s: opening %s: %s", v->name, path, err_short(rc));
	rc = based_open(v->storage, v->name, size, v->power, ret, e);
	if (rc != -ERR_NOENT)
		return rc;
	return err_set(e, ERR_CORRUPT, "open volume %s: %s is missing; restore it from a backup, or delete the volume",
		       v->name, path);
}

static int open_disk(struct volume *v, uint64_t size, struct err *e)
{
	int rc = open_disk_at(v, size, &v->disk, e);

	if (rc < 0)
		return rc;
	if (!based_is(v->disk))
		return disk_fit(v, size, e);
	v->base = strdup(based_path(v->disk, &v->base_format));
	return v->base ? 0 : err_set(e, ERR_NOMEM, "open volume %s: %s", v->name, err_short(ERR_NOMEM));
}

const char *volume_base(const struct volume *v, const char **ret_format)
{
	*ret_format = v->base_format;
	return v->base;
}

int volume_check_base(struct volume *v, struct err *e)
{
	int rc = 0;

	volume_lock_shared(v);
	if (based_is(v->disk))
		rc = based_check(v->disk, e);
	volume_unlock(v);
	return rc;
}

bool volume_own(struct volume *v, struct bitmap *ret)
{
	bool based;

	volume_lock_shared(v);
	based = based_is(v->disk);
	if (based)
		based_own(v->disk, ret);
	volume_unlock(v);
	return based;
}

static int open_layer(struct volume *v, enum layer_kind kind, uint64_t id, uint64_t size, struct layer **ret,
		      struct err *e)
{
	char path[VOLUME_PATH_SIZE];
	struct overlay *o;
	int rc;

	layer_path(v, kind, id, path);
	rc = overlay_open(v->storage, path, size, &o, e);
	if (rc < 0)
		return rc;
	rc = layer_new(v, o, kind, id, ret);
	if (rc < 0)
		(void)err_set(e, -rc, "open overlay %s: %s", path, err_short(rc));
	return rc;
}

static int open_layers(struct volume *v, const struct volume_open_args *args, struct err *e)
{
	int rc = 0;

	for (uint32_t i = 0; rc == 0 && i < args->n_ckpts; i++) {
		PRE(args->ckpts[i] > (i ? args->ckpts[i - 1] : 0));
		rc = open_layer(v, LAYER_KIND_UNDO, args->ckpts[i], args->size, &v->chain[i], e);
		if (rc == 0)
			v->n_chain = i + 1;
		if (rc == 0 && i > 0) /* one at a time: their bitmaps are larger than what they hold */
			chain_seal(v);
	}
	if (rc == 0 && v->n_chain) {
		rc = layer_ascertain(v, v->chain[v->n_chain - 1]);
		if (rc < 0)
			return err_set(e, -rc, "open volume %s: syncing the overlay of checkpoint %" PRIu64 ": %s",
				       v->name, v->chain[v->n_chain - 1]->id, err_short(rc));
	}
	if (rc == 0 && args->active_id)
		rc = open_layer(v, LAYER_KIND_ACTIVE, args->active_id, args->size, &v->active, e);
	for (uint32_t i = 0; rc == 0 && i < args->n_clones; i++) {
		struct clone *c = &v->clones[v->n_clones];

		if (!args_keep(args, args->clones[i].ckpt))
			continue;
		rc = open_layer(v, LAYER_KIND_CLONE, args->clones[i].id, args->size, &c->l, e);
		c->ckpt = args->clones[i].ckpt;
		v->n_clones += rc == 0;
	}
	return rc;
}

struct growth;
static void growth_free(struct growth *g);

static void free_volume(struct volume *v)
{
	for (uint32_t i = 0; i < v->n_chain; i++)
		layer_unref(v->chain[i]);
	layer_unref(v->active);
	for (uint32_t i = 0; i < v->n_clones; i++)
		layer_unref(v->clones[i].l);
	layer_unref(v->prepared_undo);
	layer_unref(v->prepared_active);
	layer_unref(v->prepared_clone);
	growth_free(v->growth);
	disk_close(v->disk);
	free(v->base);
	scratch_free_all(v);
	for (unsigned i = 0; i < STRIPES; i++)
		check_zero(pthread_rwlock_destroy(&v->stripes[i]));
	check_zero(pthread_rwlock_destroy(&v->chain_lock));
	check_zero(pthread_rwlock_destroy(&v->sync_lock));
	check_zero(pthread_rwlock_destroy(&v->tap_lock));
	mutex_destroy(&v->prepare_lock);
	mutex_destroy(&v->merge_lock);
	mutex_destroy(&v->reap_lock);
	mutex_destroy(&v->index_lock);
	chainindex_free(v->index);
	filecache_free(v->files);
	mutex_destroy(&v->retired_lock);
	mutex_destroy(&v->scratch_lock);
	free(v);
}

int volume_open(struct storage *s, const struct volume_open_args *args, struct volume **ret, struct err *e)
{
	struct volume *v;
	int rc;

	PRE(args->size > 0 && args->size % SECTOR_SIZE == 0 && args->size <= VOLUME_SIZE_MAX);
	PRE(strlen(args->name) < NAME_SIZE);
	if (args->n_ckpts > VOLUME_CKPTS_MAX)
		return err_set(e, ERR_LIMIT, "open volume %s: %u checkpoints, at most %d can be kept", args->name,
			       args->n_ckpts, VOLUME_CKPTS_MAX);
	if (args->n_clones > VOLUME_CLONES_MAX)
		return err_set(e, ERR_LIMIT, "open volume %s: %u clones, at most %d can be there", args->name,
			       args->n_clones, VOLUME_CLONES_MAX);
	v = calloc(1, sizeof(*v));
	if (!v)
		return err_set(e, ERR_NOMEM, "open volume %s: %s", args->name, err_short(ERR_NOMEM));
	v->storage = s;
	(void)snprintf(v->name, sizeof(v->name), "%s", args->name);
	v->size = args->size;
	v->power = args->durability == DURABILITY_POWER;
	volume_rwlock_init(&v->sync_lock);
	volume_rwlock_init(&v->chain_lock);
	volume_rwlock_init(&v->tap_lock);
	for (unsigned i = 0; i < STRIPES; i++)
		volume_rwlock_init(&v->stripes[i]);
	mutex_init(&v->prepare_lock);
	mutex_init(&v->merge_lock);
	mutex_init(&v->reap_lock);
	mutex_init(&v->index_lock);
	mutex_init(&v->retired_lock);
	mutex_init(&v->scratch_lock);

	rc = filecache_new(&v->files);
	if (rc < 0)
		rc = err_set(e, -rc, "open volume %s: %s", args->name, err_short(rc));
	else
		rc = open_disk(v, args->size, e);
	if (rc == 0)
		rc = open_layers(v, args, e);
	/* Last: nothing is removed when something that args name does not check out. */
	if (rc == 0) {
		rc = unlink_entries(s, args->name, is_leftover, args);
		if (rc < 0)
			rc = err_set(e, -rc, "open volume %s: removing leftover overlays: %s", args->name,
				     err_short(rc));
	}
	if (rc < 0) {
		free_volume(v);
		return rc;
	}
	*ret = v;
	return 0;
}

void volume_close(struct volume *v)
{
	if (!v)
		return;
	/* What is prepared keeps its files: the metadata may name them by now. The next open tells. */
	volume_reap(v);
	free_volume(v);
}

uint64_t volume_size(const struct volume *v)
{
	return __atomic_load_n(&v->size, __ATOMIC_RELAXED);
}

int volume_sync(struct volume *v)
{
	check_zero(pthread_rwlock_rdlock(&v->sync_lock));
	int rc = disk_sync(v->disk);
	check_zero(pthread_rwlock_unlock(&v->sync_lock));
	return rc;
}

int volume_reopen(struct volume *v, struct err *e)
{
	struct err why = {0};
	struct disk *fresh = NULL;
	uint64_t size = 0;
	int rc;

	rc = open_disk_at(v, volume_size(v), &fresh, &why);
	if (rc < 0)
		return err_set(e, -rc, "reopen volume %s: %s", v->name, why.text);
	rc = disk_get_size(fresh, &size);
	/* Longer is one whose growth was not recorded. */
	if (rc == 0 && size < volume_size(v))
		rc = -ERR_CORRUPT;
	if (rc < 0) {
		disk_close(fresh);
		return err_set(e, -rc, "reopen volume %s: its disk has %" PRIu64 " bytes and should have %" PRIu64,
			       v->name, size, volume_size(v));
	}
	check_zero(pthread_rwlock_wrlock(&v->sync_lock));
	volume_lock_exclusive(v);
	struct disk *old = v->disk;
	v->disk = fresh;
	volume_unlock(v);
	check_zero(pthread_rwlock_unlock(&v->sync_lock));
	disk_close(old);
	return 0;
}

/* ---- growing ---- */

/* Memory for the bitmaps of all overlays, by their order. */
struct growth {
	uint64_t size;
	uint32_t n;
	void *memory[VOLUME_CKPTS_MAX + 1 + VOLUME_CLONES_MAX];
};

static void growth_free(struct growth *g)
{
	for (uint32_t i = 0; g && i < g->n; i++)
		free(g->memory[i]);
	free(g);
}

int volume_extend(struct volume *v, uint64_t size)
{
	int rc;

	if (size < volume_size(v) || size % SECTOR_SIZE != 0 || size > VOLUME_SIZE_MAX)
		return -ERR_RANGE;
	check_zero(pthread_rwlock_rdlock(&v->sync_lock));
	rc = disk_set_size(v->disk, size);
	if (rc == 0)
		rc = disk_sync(v->disk);
	check_zero(pthread_rwlock_unlock(&v->sync_lock));
	return rc;
}

static uint32_t overlays_count(const struct volume *v)
{
	return v->n_chain + (v->active ? 1 : 0) + v->n_clones;
}

static int growth_new(struct volume *v, uint64_t size, struct growth **ret)
{
	struct growth *g = calloc(1, sizeof(*g));
	uint32_t n;

	if (!g)
		return -ERR_NOMEM;
	volume_lock_shared(v);
	n = overlays_count(v);
	volume_unlock(v);
	g->size = size;
	for (; g->n < n; g->n++) {
		g->memory[g->n] = calloc(1, overlay_grow_bytes(size));
		if (!g->memory[g->n]) {
			growth_free(g);
			return -ERR_NOMEM;
		}
	}
	*ret = g;
	return 0;
}

int volume_grow_prepare(struct volume *v, uint64_t size)
{
	struct growth *g = NULL;
	uint64_t now = 0;
	int rc;

	if (size < volume_size(v) || size % SECTOR_SIZE != 0 || size > VOLUME_SIZE_MAX)
		return -ERR_RANGE;
	__atomic_store_n(&v->growing, true, __ATOMIC_SEQ_CST);
	mutex_lock(&v->merge_lock);
	mutex_unlock(&v->merge_lock);
	mutex_lock(&v->prepare_lock);
	rc = v->prepared_undo || v->prepared_active || v->prepared_clone ? -ERR_BUSY : disk_get_size(v->disk, &now);
	if (rc == 0 && now < size)
		rc = volume_extend(v, size);
	else if (rc == 0)
		rc = volume_sync(v); /* a length that a failed sync left in the cache is none [I10] */
	if (rc == 0)
		rc = growth_new(v, size, &g);
	if (rc == 0) {
		growth_free(v->growth);
		v->growth = g;
	} else {
		__atomic_store_n(&v->growing, v->growth != NULL, __ATOMIC_SEQ_CST);
	}
	mutex_unlock(&v->prepare_lock);
	return rc;
}

void volume_ungrow(struct volume *v)
{
	mutex_lock(&v->prepare_lock);
	growth_free(v->growth);
	v->growth = NULL;
	__atomic_store_n(&v->growing, false, __ATOMIC_SEQ_CST);
	mutex_unlock(&v->prepare_lock);
}

static void layer_grow(struct growth *g, struct layer *l)
{
	INVARIANT(g->n > 0);
	overlay_grow(l->o, g->size, g->memory[--g->n]);
}

void volume_grow(struct volume *v)
{
	struct chainindex *index;
	struct growth *g;

	mutex_lock(&v->prepare_lock);
	mutex_lock(&v->merge_lock);
	mutex_lock(&v->index_lock);
	g = v->growth;
	v->growth = NULL;
	PRE(g != NULL);
	volume_lock_exclusive(v);
	for (uint32_t i = 0; i < v->n_chain; i++)
		layer_grow(g, v->chain[i]);
	if (v->active)
		layer_grow(g, v->active);
	for (uint32_t i = 0; i < v->n_clones; i++)
		layer_grow(g, v->clones[i].l);
	index = v->index; /* of the old size; what was sealed is put into a new one */
	v->index = NULL;
	v->n_sealed = 0;
	__atomic_store_n(&v->size, g->size, __ATOMIC_RELAXED);
	volume_unlock(v);
	mutex_unlock(&v->index_lock);
	__atomic_store_n(&v->growing, false, __ATOMIC_SEQ_CST);
	mutex_unlock(&v->merge_lock);
	mutex_unlock(&v->prepare_lock);
	growth_free(g);
	chainindex_free(index);
	chain_seal(v);
}

int volume_resize(struct volume *v, uint64_t size)
{
	int rc = size == volume_size(v) ? 0 : volume_grow_prepare(v, size);

	if (rc == 0 && size != volume_size(v))
		volume_grow(v);
	return rc;
}

/* ---- the chain ---- */

int chain_find(const struct volume *v, uint64_t ckpt)
{
	uint32_t low = 0, high = v->n_chain;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;

		if (v->chain[mid]->id < ckpt)
			low = mid + 1;
		else
			high = mid;
	}
	return low < v->n_chain && v->chain[low]->id == ckpt ? (int)low : -ERR_NOENT;
}

static const struct clone *clone_find(const struct volume *v, uint64_t id)
{
	for (uint32_t i = 0; i < v->n_clones; i++)
		if (v->clones[i].l->id == id)
			return &v->clones[i];
	return NULL;
}

int view_make(struct volume *v, enum volume_layer layer, uint64_t ckpt, struct view *ret)
{
	const struct clone *c = layer == LAYER_CLONE ? clone_find(v, ckpt) : NULL;
	struct view w = {.top = layer == LAYER_VIEW ? v->active : c ? c->l : NULL};
	uint64_t base = c ? c->ckpt : ckpt;

	PRE(layer == LAYER_VIEW || layer == LAYER_IMAGE || layer == LAYER_CLONE);
	if ((layer == LAYER_CLONE && !c) || (layer == LAYER_IMAGE && ckpt == 0))
		return -ERR_NOENT;
	if (base) {
		int i = chain_find(v, base);

		if (i < 0)
			return i;
		w.chain = &v->chain[i];
		w.n = v->n_chain - (uint32_t)i;
		w.live = v->chain[v->n_chain - 1];
		w.v = v;
		w.sealed = v->n_sealed > (uint32_t)i ? v->n_sealed - (uint32_t)i : 0;
	}
	*ret = w;
	return 0;
}

static uint64_t view_next_held_within(const struct view *w, uint64_t from, uint64_t end)
{
	if (w->top)
		end = bits_next_set(w->top->held, from, end);
	if (w->sealed)
		end = chainindex_next_held(w->v->index, w->chain[0]->id, from, end);
	for (uint32_t i = w->sealed; i < w->n; i++)
		end = bits_next_set(w->chain[i]->held, from, end);
	return end;
}

#define SEARCH_SMALL 4096U /* blocks */

/* In growing windows: what one layer has nearby must not wait for a search of an empty one to its end. */
uint64_t view_next_held(const struct view *w, uint64_t from, uint64_t end)
{
	for (uint64_t window = SEARCH_SMALL; from < end; window *= 8) {
		uint64_t stop = end - from < window ? end : from + window;
		uint64_t found = view_next_held_within(w, from, stop);

		if (found < stop)
			return found;
		from = stop;
	}
	return end;
}

uint64_t view_next_free(const struct view *w, uint64_t from, uint64_t end)
{
	uint64_t before;

	do {
		before = from;
		if (w->top)
			from = bits_next_clear(w->top->held, from, end);
		if (w->sealed)
			from = chainindex_next_free(w->v->index, w->chain[0]->id, from, end);
		for (uint32_t i = w->sealed; i < w->n; i++)
			from = bits_next_clear(w->chain[i]->held, from, end);
	} while (from != before && from < end);
	return from;
}

/* Whether l has block `from`: then *ret_end is the end of its run, else the block where it may begin. */
static bool layer_has(const struct layer *l, uint64_t from, uint64_t end, uint64_t *ret_end)
{
	*ret_end = bits_next_set(l->held, from, end);
	if (*ret_end != from)
		return false;
	*ret_end = bits_next_clear(l->held, from, end);
	return true;
}

/* Who has block `from`: a layer, or NULL for the disk. *ret_end: the end of the run of that source, `end` at most. */
static struct layer *view_resolve(const struct view *w, uint64_t from, uint64_t end, uint64_t *ret_end)
{
	uint64_t id = 0;

	if (w->top && layer_has(w->top, from, end, &end)) {
		*ret_end = end;
		return w->top;
	}
	if (w->sealed && chainindex_find(w->v->index, w->chain[0]->id, from, end, &id, &end)) {
		int i = chain_find(w->v, id);

		INVARIANT(i >= 0); /* X2 */
		*ret_end = end;
		return w->v->chain[i];
	}
	for (uint32_t i = w->sealed; i < w->n; i++)
		if (layer_has(w->chain[i], from, end, &end)) {
			*ret_end = end;
			return w->chain[i];
		}
	*ret_end = end;
	return NULL;
}

/* ---- reads ---- */

int layer_read(struct volume *v, struct layer *l, uint64_t off, uint64_t len, uint8_t *buf)
{
	bool replaced = l->kind != LAYER_KIND_UNDO;

	while (len > 0) {
		uint64_t block = off >> BLOCK_SHIFT;
		uint32_t in_block = (uint32_t)(off & (BLOCK_SIZE - 1));
		uint32_t n = (uint32_t)min_u64(len, BLOCK_SIZE - in_block);
		pthread_rwlock_t *stripe = &v->stripes[(block >> STRIPE_SHIFT) % STRIPES];
		int rc;

		if (replaced)
			check_zero(pthread_rwlock_rdlock(stripe));
		rc = overlay_read(l->o, block, in_block, buf, n);
		if (replaced)
			check_zero(pthread_rwlock_unlock(stripe));
		if (rc < 0)
			return rc;
		off += n;
		buf += n;
		len -= n;
	}
	return 0;
}

/* Bytes of the disk in blocks that no layer held a moment ago. */
static int disk_read_stable(struct volume *v, struct layer *live, uint64_t off, uint64_t len, uint8_t *buf)
{
	uint64_t end = off + len, block = off >> BLOCK_SHIFT, block_end = units_of(end, BLOCK_SHIFT);
	int rc = disk_read(v->disk, off, buf, (size_t)len);

	if (rc < 0 || !live)
		return rc;
	volume_fence();
	for (block = bits_next_set(live->held, block, block_end); block < block_end;
	     block = bits_next_set(live->held, block + 1, block_end)) {
		uint64_t lo = max_u64(off, block << BLOCK_SHIFT), hi = min_u64(end, (block + 1) << BLOCK_SHIFT);

		rc = layer_read(v, live, lo, hi - lo, buf + (lo - off));
		if (rc < 0)
			return rc;
	}
	return 0;
}

int view_read(struct volume *v, const struct view *w, uint64_t off, uint64_t len, void *buf)
{
	uint64_t end = off + len, at = off, block_end = units_of(end, BLOCK_SHIFT);

	while (at < end) {
		uint64_t run_end;
		struct layer *l = view_resolve(w, at >> BLOCK_SHIFT, block_end, &run_end);
		uint64_t n = min_u64(end, run_end << BLOCK_SHIFT) - at;
		uint8_t *p = (uint8_t *)buf + (at - off);
		int rc = l ? layer_read(v, l, at, n, p) : disk_read_stable(v, w->live, at, n, p);

		if (rc < 0)
			return rc;
		at += n;
	}
	return 0;
}

static bool range_fits(const struct volume *v, uint64_t off, uint64_t len)
{
	uint64_t size = volume_size(v);

	return off <= size && len <= size - off;
}

void volume_forget(struct volume *v, uint64_t off, uint64_t len)
{
	check_zero(pthread_rwlock_rdlock(&v->sync_lock));
	disk_forget(v->disk, off, len);
	check_zero(pthread_rwlock_unlock(&v->sync_lock));
}

int volume_read_disk(struct volume *v, uint64_t off, uint64_t len, void *buf)
{
	int rc = -ERR_RANGE;

	/* No lock of the chain: nothing but opening it anew changes which disk it is. */
	check_zero(pthread_rwlock_rdlock(&v->sync_lock));
	if (range_fits(v, off, len))
		rc = disk_read(v->disk, off, buf, (size_t)len);
	check_zero(pthread_rwlock_unlock(&v->sync_lock));
	return rc;
}

static int read_through(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t off, uint64_t len, void *buf)
{
	struct view w;
	int rc;

	volume_lock_shared(v);
	rc = view_make(v, layer, ckpt, &w);
	if (rc == 0)
		rc = range_fits(v, off, len) ? view_read(v, &w, off, len, buf) : -ERR_RANGE;
	volume_unlock(v);
	return rc;
}

int volume_read_view(struct volume *v, uint64_t base, uint64_t off, uint64_t len, void *buf)
{
	return read_through(v, LAYER_VIEW, base, off, len, buf);
}

int volume_read_ckpt(struct volume *v, uint64_t ckpt, uint64_t off, uint64_t len, void *buf)
{
	return read_through(v, LAYER_IMAGE, ckpt, off, len, buf);
}

int volume_read_clone(struct volume *v, uint64_t id, uint64_t off, uint64_t len, void *buf)
{
	return read_through(v, LAYER_CLONE, id, off, len, buf);
}

int chain_find_overlay(struct volume *v, enum volume_layer layer, uint64_t ckpt, struct layer **ret)
{
	int i;

	if (layer == LAYER_ACTIVE) {
		*ret = v->active;
		return 0;
	}
	if (layer == LAYER_CLONE) {
		const struct clone *c = clone_find(v, ckpt);

		*ret = c ? c->l : NULL;
		return c ? 0 : -ERR_NOENT;
	}
	if (ckpt == 0) {
		*ret = v->n_chain ? v->chain[v->n_chain - 1] : NULL;
		return 0;
	}
	i = chain_find(v, ckpt);
	if (i < 0)
		return i;
	*ret = v->chain[i];
	return 0;
}

static int read_overlay_locked(struct volume *v, struct layer *l, uint64_t off, uint64_t len, uint8_t *buf)
{
	uint64_t at = off, end = off + len, block_end = units_of(end, BLOCK_SHIFT);

	while (at < end) {
		uint64_t block = at >> BLOCK_SHIFT, stop = l ? bits_next_set(l->held, block, block_end) : block_end;
		bool there = l && stop == block;
		uint64_t n;
		int rc = 0;

		if (there)
			stop = bits_next_clear(l->held, block, block_end);
		n = min_u64(end, stop << BLOCK_SHIFT) - at;
		if (there)
			rc = layer_read(v, l, at, n, buf + (at - off));
		else
			memset(buf + (at - off), 0, (size_t)n);
		if (rc < 0)
			return rc;
		at += n;
	}
	return 0;
}

bool clone_is_there(struct volume *v, uint64_t id)
{
	bool there;

	volume_lock_shared(v);
	there = clone_find(v, id) != NULL;
	volume_unlock(v);
	return there;
}

int volume_read_overlay(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t off, uint64_t len, void *buf)
{
	struct layer *l;
	int rc;

	PRE(layer == LAYER_ACTIVE || layer == LAYER_UNDO || layer == LAYER_CLONE);
	volume_lock_shared(v);
	rc = chain_find_overlay(v, layer, ckpt, &l);
	if (rc == 0)
		rc = range_fits(v, off, len) ? read_overlay_locked(v, l, off, len, buf) : -ERR_RANGE;
	volume_unlock(v);
	return rc;
}
