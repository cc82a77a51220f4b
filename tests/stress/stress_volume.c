/* Readers of checkpoints, of a secondary's view and of a clone against writers, checkpoints, merges and drops, all at
 * once (I8).
 *
 *   writers     write, zero and discard whole and partial blocks of their own part of the volume through volume_write
 *   controller  stops the writers for a moment, copies what the disk must hold, opens a checkpoint; merges and drops
 *               others while everything runs; replaces the active overlay, and the clone by one of another checkpoint
 *   active      writes uniform blocks to the active overlay, over and over the same ones; another does so to the clone
 *   readers     read a range of a kept checkpoint, of the view, or of the clone, and compare each byte with the copy;
 *               of active (the clone) a block must be uniform, one write's bytes, and carry the mark of such a write
 *
 * Two thirds of the time on a raw disk, then on one over a base image. A difference, or an error of any call, ends it
 * with exit code 1. Argument: seconds (default 3).
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "image/based.h"
#include "image/volume.h"

#define SIZE ((UINT64_C(512) << BLOCK_SHIFT) + 1536)
#define BLOCKS 513U
#define WRITERS 2U
#define READERS 3U
#define WORKERS (WRITERS + READERS + 2U)
#define BATCH 12U
#define KEPT_MAX 24U
/* Bytes of writers have the high bit clear, those of the active overlay have it set. */
#define ACTIVE_BIT 0x80U
#define ACTIVE_FIRST 100U
#define ACTIVE_COUNT 60U

struct kept {
	uint64_t number;
	uint8_t *image;
};

struct stress {
	struct storage *storage;
	struct volume *v;
	/* Writers hold it shared for a batch, the controller exclusively to take a checkpoint. */
	pthread_rwlock_t pause;
	uint8_t *disk; /* each byte is its writer's */
	/* Readers hold it shared while they compare. */
	pthread_rwlock_t list;
	struct kept kept[KEPT_MAX];
	unsigned n_kept;
	uint64_t base, active_id;
	struct volume_clone clone;
	atomic_bool end, failed;
	atomic_ulong reads, batches, checkpoints, drops;
};

struct worker {
	struct stress *s;
	unsigned index;
	uint64_t seed;
};

static uint64_t next_random(uint64_t *seed, uint64_t below)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed % below;
}

static void fail(struct stress *s, const char *what, uint64_t where, int rc)
{
	if (!atomic_exchange(&s->failed, true))
		fprintf(stderr, "stress_volume: %s, block %llu, code %d\n", what, (unsigned long long)where, rc);
	atomic_store(&s->end, true);
}

static void lock_shared(pthread_rwlock_t *l)
{
	INVARIANT(pthread_rwlock_rdlock(l) == 0);
}

static void lock_exclusive(pthread_rwlock_t *l)
{
	INVARIANT(pthread_rwlock_wrlock(l) == 0);
}

static void unlock(pthread_rwlock_t *l)
{
	INVARIANT(pthread_rwlock_unlock(l) == 0);
}

/* ---- writers ---- */

static void write_batch(struct worker *w, uint8_t *buf)
{
	struct volume_req reqs[BATCH] = {0};
	unsigned n = 1 + (unsigned)next_random(&w->seed, BATCH);
	/* Every WRITERS-th block is this writer's; a request stays in one block, no two share one. */
	uint64_t slot = next_random(&w->seed, BLOCKS / WRITERS - BATCH);
	int rc;

	for (unsigned i = 0; i < n; i++) {
		struct volume_req *r = &reqs[i];
		uint64_t off = next_random(&w->seed, 4) ? 0 : next_random(&w->seed, BLOCK_SIZE);

		r->off = (((slot + i) * WRITERS + w->index) << BLOCK_SHIFT) + off;
		r->len = off ? 1 + next_random(&w->seed, BLOCK_SIZE - off) : BLOCK_SIZE;
		r->kind = next_random(&w->seed, 5) ? VOLUME_WRITE : VOLUME_ZERO + (unsigned)next_random(&w->seed, 2);
		r->buf = buf + (size_t)i * BLOCK_SIZE;
		memset(buf + (size_t)i * BLOCK_SIZE, (int)next_random(&w->seed, ACTIVE_BIT), BLOCK_SIZE);
	}
	lock_shared(&w->s->pause);
	rc = volume_write(w->s->v, reqs, n);
	for (unsigned i = 0; i < n; i++) {
		if (reqs[i].kind == VOLUME_WRITE)
			memcpy(w->s->disk + reqs[i].off, reqs[i].buf, reqs[i].len);
		else
			memset(w->s->disk + reqs[i].off, 0, reqs[i].len);
	}
	unlock(&w->s->pause);
	if (rc < 0)
		fail(w->s, "a write failed", reqs[0].off >> BLOCK_SHIFT, rc);
	atomic_fetch_add(&w->s->batches, 1);
}

static void *writer(void *arg)
{
	struct worker *w = arg;
	uint8_t *buf = malloc((size_t)BATCH * BLOCK_SIZE);

	while (!atomic_load(&w->s->end))
		write_batch(w, buf);
	free(buf);
	return NULL;
}

static void *active_writer(void *arg)
{
	struct worker *w = arg;
	bool clone = w->index == WORKERS - 1;
	uint8_t *buf = malloc(4 * BLOCK_SIZE);

	while (!atomic_load(&w->s->end)) {
		uint64_t n = 1 + next_random(&w->seed, 4);
		struct volume_req r = {.kind = VOLUME_WRITE, .buf = buf, .len = n << BLOCK_SHIFT};
		int rc;

		r.off = (ACTIVE_FIRST + next_random(&w->seed, ACTIVE_COUNT - n)) << BLOCK_SHIFT;
		for (uint64_t i = 0; i < n; i++)
			memset(buf + (i << BLOCK_SHIFT), (int)(ACTIVE_BIT | next_random(&w->seed, ACTIVE_BIT)),
			       BLOCK_SIZE);
		lock_shared(&w->s->list);
		rc = clone ? volume_write_clone(w->s->v, w->s->clone.id, &r)
			   : volume_write_active(w->s->v, w->s->base, &r);
		if (clone && rc == 0 && next_random(&w->seed, 512) == 0)
			rc = volume_sync_clone(w->s->v, w->s->clone.id);
		unlock(&w->s->list);
		if (rc < 0)
			fail(w->s, clone ? "a write to the clone failed" : "a write to active failed",
			     r.off >> BLOCK_SHIFT, rc);
	}
	free(buf);
	return NULL;
}

/* ---- readers ---- */

/* Bytes of one block, or part of one, as the view may show them: the base's, or one active write's. */
static bool view_block_right(const uint8_t *got, const uint8_t *image, uint64_t block, uint64_t len)
{
	if (memcmp(got, image, len) == 0)
		return true;
	if (block < ACTIVE_FIRST || block >= ACTIVE_FIRST + ACTIVE_COUNT || !(got[0] & ACTIVE_BIT))
		return false;
	return len == 1 || memcmp(got, got + 1, len - 1) == 0;
}

static void read_once(struct worker *w, uint8_t *buf)
{
	struct stress *s = w->s;
	bool clone = next_random(&w->seed, 3) == 0, view = !clone && next_random(&w->seed, 2) == 0;
	uint64_t off = next_random(&w->seed, SIZE), len, at;
	struct kept k;
	int rc;

	len = 1 + next_random(&w->seed, min_u64(SIZE - off, 64 * BLOCK_SIZE));
	if (next_random(&w->seed, 2))
		off = round_down_u64(off, BLOCK_SIZE);
	memset(buf, 0x55, len);
	lock_shared(&s->list);
	k = s->kept[view || clone ? 0 : next_random(&w->seed, s->n_kept)];
	for (unsigned i = 0; (view || clone) && i < s->n_kept; i++)
		if (s->kept[i].number == (view ? s->base : s->clone.ckpt))
			k = s->kept[i];
	rc = view    ? volume_read_view(s->v, k.number, off, len, buf)
	     : clone ? volume_read_clone(s->v, s->clone.id, off, len, buf)
		     : volume_read_ckpt(s->v, k.number, off, len, buf);
	if (rc < 0)
		fail(s,
		     view    ? "the view can't be read"
		     : clone ? "the clone can't be read"
			     : "a checkpoint can't be read",
		     off >> BLOCK_SHIFT, rc);
	for (at = off; rc == 0 && at < off + len;) {
		uint64_t block = at >> BLOCK_SHIFT, n = min_u64((block + 1) << BLOCK_SHIFT, off + len) - at;
		const uint8_t *got = buf + (at - off);

		if (view || clone ? !view_block_right(got, k.image + at, block, n) : memcmp(got, k.image + at, n) != 0)
			fail(s,
			     view    ? "the view differs"
			     : clone ? "the clone differs"
				     : "a checkpoint differs",
			     block, 0);
		at += n;
	}
	unlock(&s->list);
	atomic_fetch_add(&s->reads, 1);
}

/* An extent said to be a hole must be zeroes in the image, whatever writers do. */
static void extents_once(struct worker *w)
{
	static const enum volume_layer layers[] = {LAYER_UNDO, LAYER_ACTIVE, LAYER_VIEW, LAYER_IMAGE};
	struct stress *s = w->s;
	struct extent x = {0};
	uint64_t off = next_random(&w->seed, SIZE);
	struct kept k;
	int rc = 0;

	lock_shared(&s->list);
	k = s->kept[next_random(&w->seed, s->n_kept)];
	for (unsigned i = 0; i < ARRAY_LEN(layers); i++) {
		/* The last stays for the look at its holes. */
		rc = volume_extent(s->v, layers[i], layers[i] == LAYER_VIEW ? s->base : k.number, off, &x);
		if (rc < 0 || x.off != off || x.len == 0 || x.len > SIZE - off)
			fail(s, "an extent is not right", off >> BLOCK_SHIFT, rc);
	}
	for (uint64_t i = 0; rc == 0 && !x.data && i < x.len; i++)
		if (k.image[x.off + i] != 0) {
			fail(s, "a hole over data", (x.off + i) >> BLOCK_SHIFT, 0);
			break;
		}
	unlock(&s->list);
}

static void *reader(void *arg)
{
	struct worker *w = arg;
	uint8_t *buf = malloc(64 * BLOCK_SIZE);

	while (!atomic_load(&w->s->end)) {
		read_once(w, buf);
		extents_once(w);
	}
	free(buf);
	return NULL;
}

/* ---- controller ---- */

static void checkpoint(struct stress *s, uint64_t number, bool empty_active)
{
	struct kept k = {.number = number, .image = malloc(SIZE)};
	uint64_t active_id = s->active_id + empty_active;
	int rc = volume_prepare(s->v, number, active_id, NULL);

	if (rc < 0) {
		fail(s, "prepare failed", 0, rc);
		free(k.image);
		return;
	}
	lock_exclusive(&s->pause);
	memcpy(k.image, s->disk, SIZE);
	/* The base moves only with an empty active: what the view shows stays one thing. */
	if (empty_active)
		lock_exclusive(&s->list);
	volume_switch(s->v, number, active_id);
	unlock(&s->pause);
	if (!empty_active)
		lock_exclusive(&s->list);
	s->kept[s->n_kept++] = k;
	s->active_id = active_id;
	if (empty_active)
		s->base = number;
	unlock(&s->list);
	atomic_fetch_add(&s->checkpoints, 1);
}

static void drop(struct stress *s, uint64_t *seed)
{
	unsigned i = (unsigned)next_random(seed, s->n_kept - 1);
	int rc;

	if (s->kept[i].number == s->base || s->kept[i].number == s->clone.ckpt)
		return;
	rc = volume_merge_into_older(s->v, s->kept[i].number);
	if (rc < 0) {
		fail(s, "merge failed", 0, rc);
		return;
	}
	lock_exclusive(&s->list);
	free(s->kept[i].image);
	volume_drop(s->v, s->kept[i].number);
	memmove(&s->kept[i], &s->kept[i + 1], (--s->n_kept - i) * sizeof(s->kept[0]));
	unlock(&s->list);
	volume_reap(s->v);
	atomic_fetch_add(&s->drops, 1);
}

static void make_clone(struct stress *s, uint64_t *seed)
{
	struct volume_clone c = {s->clone.id + 1, s->kept[next_random(seed, s->n_kept)].number};
	int rc = volume_prepare_clone(s->v, c.id, NULL);

	if (rc < 0) {
		fail(s, "a clone could not be prepared", 0, rc);
		return;
	}
	lock_exclusive(&s->list);
	volume_switch_clones(s->v, &c, 1);
	s->clone = c;
	unlock(&s->list);
}

static void control(struct stress *s, uint64_t end_ns)
{
	uint64_t seed = 99, number = 1;

	while (clock_mono_ns() < end_ns && !atomic_load(&s->end)) {
		if (s->n_kept < 4 || (s->n_kept < KEPT_MAX && next_random(&seed, 9) < 5))
			checkpoint(s, ++number, next_random(&seed, 2) == 0);
		else
			drop(s, &seed);
		if (next_random(&seed, 8) == 0)
			make_clone(s, &seed);
		if (next_random(&seed, 2)) /* else the closed epoch stays a bitmap for a while */
			volume_reap(s->v);
		/* Time for a few blocks to change; not a wait for anything. */
		(void)usleep((useconds_t)next_random(&seed, 4000));
	}
	atomic_store(&s->end, true);
}

/* ---- main ---- */

static void compare_disk(struct stress *s)
{
	uint8_t *buf = malloc(SIZE);
	int rc = volume_read_disk(s->v, 0, SIZE, buf);

	if (rc < 0 || memcmp(buf, s->disk, SIZE) != 0)
		fail(s, "the disk differs at the end", 0, rc);
	free(buf);
}

/* base NULL: a sparse disk. */
static bool run(struct storage *storage, struct source *base, double seconds)
{
	struct volume_open_args args = {
	    .name = "stress", .size = SIZE, .durability = base ? DURABILITY_POWER : DURABILITY_PROCESS};
	struct based_args over = {.source = base, .path = base ? base->files[0].path : NULL};
	struct stress *s = calloc(1, sizeof(*s));
	struct worker w[WORKERS];
	pthread_t threads[WORKERS];
	uint64_t seed = 7;
	/* Everyone is in a loop: without this the controller would never have its turn. */
	pthread_rwlockattr_t attr;
	bool ok;

	s->storage = storage;
	s->disk = calloc(1, SIZE);
	INVARIANT(pthread_rwlockattr_init(&attr) == 0);
	INVARIANT(pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP) == 0);
	INVARIANT(pthread_rwlock_init(&s->list, &attr) == 0);
	INVARIANT(pthread_rwlock_init(&s->pause, &attr) == 0);
	INVARIANT(pthread_rwlockattr_destroy(&attr) == 0);
	INVARIANT(volume_create_over(storage, "stress", SIZE, base ? &over : NULL, args.durability, NULL) == 0);
	INVARIANT(!base || disk_read(base->disk, 0, s->disk, (size_t)base->size) == 0);
	INVARIANT(volume_open(storage, &args, &s->v, NULL) == 0);
	checkpoint(s, 1, true);
	make_clone(s, &seed);
	for (unsigned i = 0; i < WORKERS; i++) {
		w[i] = (struct worker){s, i, (i + 1) * UINT64_C(0x9e3779b97f4a7c15)};
		INVARIANT(pthread_create(&threads[i], NULL,
					 i < WRITERS		 ? writer
					 : i < WRITERS + READERS ? reader
								 : active_writer,
					 &w[i]) == 0);
	}
	control(s, clock_mono_ns() + (uint64_t)(seconds * 1e9));
	for (unsigned i = 0; i < WORKERS; i++)
		INVARIANT(pthread_join(threads[i], NULL) == 0);
	compare_disk(s);
	printf("stress_volume%s: %lu batches, %lu reads, %lu checkpoints, %lu drops\n", base ? ", over a base" : "",
	       atomic_load(&s->batches), atomic_load(&s->reads), atomic_load(&s->checkpoints), atomic_load(&s->drops));
	ok = !atomic_load(&s->failed);
	volume_close(s->v);
	for (unsigned i = 0; i < s->n_kept; i++)
		free(s->kept[i].image);
	INVARIANT(pthread_rwlock_destroy(&s->pause) == 0);
	INVARIANT(pthread_rwlock_destroy(&s->list) == 0);
	free(s->disk);
	free(s);
	return ok;
}

/* Half as long as the volume; bytes as of writers. */
static struct source *make_base(const char *path)
{
	struct source *base = NULL;
	FILE *f = fopen(path, "we");

	if (!f)
		return NULL;
	for (uint64_t i = 0; i < SIZE / 2 / 512 * 512; i++)
		(void)fputc((int)(1 + i / 777 % 120), f);
	return fclose(f) == 0 && source_open(path, "raw", NULL, &base, NULL) == 0 ? base : NULL;
}

static void show_check(const char *kind, const char *expr, const char *file, int line)
{
	fprintf(stderr, "stress_volume: %s(%s) does not hold at %s:%d\n", kind, expr, file, line);
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 3;
	const char *tmp = getenv("TMPDIR");
	char dir[256], sub[300];
	struct storage *storage;
	bool ok;

	check_hook = show_check;
	if (seconds <= 0 || seconds > 3600) {
		fprintf(stderr, "usage: stress_volume [SECONDS]\n");
		return 2;
	}
	snprintf(dir, sizeof(dir), "%s/repfs-stress-XXXXXX", tmp && *tmp ? tmp : "/tmp");
	if (!mkdtemp(dir) || storage_posix_open(dir, &storage) != 0) {
		fprintf(stderr, "stress_volume: no folder for the test under %s\n", dir);
		return 1;
	}
	ok = run(storage, NULL, seconds * 2 / 3);
	if (volume_delete(storage, "stress", NULL) != 0)
		ok = false;
	snprintf(sub, sizeof(sub), "%s/base", dir);
	struct source *base = make_base(sub);
	ok = base && run(storage, base, seconds / 3) && ok;
	if (volume_delete(storage, "stress", NULL) != 0 || unlink(sub) != 0)
		ok = false;
	source_close(base);
	storage_close(storage);
	snprintf(sub, sizeof(sub), "%s/volumes", dir);
	if (rmdir(sub) != 0 || rmdir(dir) != 0)
		ok = false;
	return ok ? 0 : 1;
}
