/* Clones in the daemon: writable scratches over kept checkpoints, clones/NAME in the mount.
 *
 * The group's record says which there are (core/repl_hold.c); a struct gvol of its own stands for each, under its name
 * and with a number of its own, made and taken out of the list when the record that says so is durable. Its content is
 * one overlay over image(checkpoint) in image/volume.h, so nothing that happens to the group changes it: not a
 * checkpoint, a resync, a failover or its commit, nor a change of role. Only one thing does: when its checkpoint had to
 * be given up for want of room it is lost, and answers EIO until it is removed.
 *
 * Requests do not go through the replication core, which has nothing to do with them: a write claims its blocks in the
 * clone's own set, so that overlapping ones are carried out one after another and others in parallel, and runs in its
 * thread, or where it had to wait, in the pool. They use the chain lock of the volume as its view's requests do, one
 * round at a time, and leave some of the store's room to replication (image/cow.c).
 *
 * Removing waits a moment for the file to be closed (the kernel reports a close(2) after it has returned) and then
 * refuses: as with a disk of any volume manager, what a VM runs from is not pulled away under it.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/repl_shell.h"

#define CLOSE_WAIT_NS NS_PER_SEC
#define CLOSE_LOOK_MS 5
#define UNCLONE_WAIT_NS (60 * NS_PER_SEC)

/* ---- names ---- */

struct gvol *gvol_find_clone(struct daemon *d, const char *name)
{
	struct gvol *found = NULL;
	pthread_rwlock_rdlock(&d->names);
	for (struct gvol *v = d->clones; v && !found; v = v->next)
		if (v->g && strcmp(v->name, name) == 0)
			found = gvol_ref(v);
	pthread_rwlock_unlock(&d->names);
	return found;
}

void daemon_each_clone(struct daemon *d, void (*fn)(void *arg, const char *name, uint32_t id), void *arg)
{
	pthread_rwlock_rdlock(&d->names);
	for (struct gvol *v = d->clones; v; v = v->next)
		fn(arg, v->name, v->id);
	pthread_rwlock_unlock(&d->names);
}

static const struct repl_clone *named_by(const struct repl_meta *m, uint64_t id)
{
	for (uint32_t i = 0; i < m->n_clones; i++)
		if (m->clones[i].id == id)
			return &m->clones[i];
	return NULL;
}

static void clone_add(struct group *g, const struct repl_meta *m, const struct repl_clone *c)
{
	struct gvol *v = calloc(1, sizeof(*v)), **at = &g->d->clones;
	struct gclone *k = calloc(1, sizeof(*k));
	int volume = repl_meta_find_volume(m, c->volume);
	if (!v || !k || volume < 0) {
		log_error(g->name, "out of memory: clone %s is not shown until repfs is started anew", c->name);
		free(v);
		free(k);
		return;
	}
	k->id = c->id;
	k->size = repl_meta_size_at(m, (uint32_t)volume, c->ckpt);
	mutex_init(&k->lock);
	reqset_init(&k->claims);
	atomic_store(&v->refs, 1);
	v->g = g;
	v->d = g->d;
	v->index = (uint32_t)volume;
	v->id = ++g->d->next_id;
	v->vol = g->exec.vols[v->index];
	v->clone = k;
	memcpy(v->name, c->name, sizeof(v->name));
	atomic_store(&v->mtime_ns, c->time_ns);
	while (*at && strcmp((*at)->name, v->name) < 0)
		at = &(*at)->next;
	v->next = *at;
	*at = v;
}

bool group_clones_publish(struct group *g, const struct repl_meta *m)
{
	struct daemon *d = g->d;
	bool changed = false;
	uint64_t there[GROUP_CLONES_MAX];
	uint32_t n = 0;
	if (m->n_clones == 0 && atomic_load(&g->n_clones) == 0) /* with every checkpoint */
		return false;
	atomic_store(&g->n_clones, m->n_clones);
	pthread_rwlock_wrlock(&d->names);
	for (struct gvol **at = &d->clones; *at;) {
		struct gvol *v = *at;
		bool stays = v->g != g || named_by(m, v->clone->id);
		if (stays) {
			if (v->g == g && n < GROUP_CLONES_MAX)
				there[n++] = v->clone->id;
			at = &v->next;
			continue;
		}
		*at = v->next;
		v->g = NULL;
		gvol_unref(v);
		changed = true;
	}
	/* A save may end after its group was taken out. */
	for (uint32_t i = 0; i < m->n_clones && !g->nameless; i++) {
		bool is = false;
		for (uint32_t k = 0; k < n && !is; k++)
			is = there[k] == m->clones[i].id;
		if (is)
			continue;
		clone_add(g, m, &m->clones[i]);
		changed = true;
	}
	pthread_rwlock_unlock(&d->names);
	return changed;
}

void gclone_free(struct gclone *k)
{
	if (k == NULL)
		return;
	mutex_destroy(&k->lock);
	free(k);
}

static json_t *clone_json(struct group *g, const struct repl_clone *c, bool lost)
{
	char t[40];
	struct volume *v = NULL;
	for (uint32_t i = 0; i < g->n_vols && !v; i++)
		v = strcmp(g->vols[i]->name, c->volume) == 0 ? g->vols[i]->vol : NULL;
	clock_format(c->time_ns, t, sizeof(t));
	return json_pack("{s:s, s:s, s:s, s:I, s:s, s:I, s:b}", "name", c->name, "group", g->name, "volume", c->volume,
			 "checkpoint", (json_int_t)c->ckpt, "time", t, "bytes",
			 (json_int_t)(v ? volume_clone_blocks(v, c->id) * BLOCK_SIZE : 0), "lost", (int)lost);
}

json_t *group_clones_json(struct group *g, const char *volume)
{
	struct repl_clone c[GROUP_CLONES_MAX];
	bool lost[GROUP_CLONES_MAX];
	uint32_t n = 0;
	json_t *a = json_array();
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	for (; n < m->n_clones; n++) {
		c[n] = m->clones[n];
		lost[n] = repl_meta_find_ckpt(m, c[n].ckpt) < 0;
	}
	mutex_unlock(&g->lock);
	for (uint32_t i = 0; i < n; i++) /* without it: this waits for the volumes' locks */
		if (volume == NULL || strcmp(volume, c[i].volume) == 0)
			json_array_append_new(a, clone_json(g, &c[i], lost[i]));
	return a;
}

/* ---- those that are still being made ---- */

/* sc: a reference; the only one: it has ended, and is in the list of clones if all went well. */
struct late_clone {
	struct shell_command *sc;
	struct late_clone *next;
};

void clone_late(struct daemon *d, struct shell_command *sc)
{
	struct late_clone *x = malloc(sizeof(*x));
	if (x == NULL)
		return;
	atomic_fetch_add(&sc->refs, 1);
	*x = (struct late_clone){sc, d->late_clones};
	d->late_clones = x;
}

bool clone_is_late(struct daemon *d, const char *name)
{
	bool found = false;
	for (struct late_clone **at = &d->late_clones, *x; (x = *at) != NULL;) {
		if (atomic_load(&x->sc->refs) > 1) {
			found = found || strcmp(x->sc->c.text, name) == 0;
			at = &x->next;
			continue;
		}
		*at = x->next;
		shell_command_unref(x->sc);
		free(x);
	}
	return found;
}

void clones_late_free(struct daemon *d)
{
	for (struct late_clone *x; (x = d->late_clones) != NULL;) {
		d->late_clones = x->next;
		shell_command_unref(x->sc);
		free(x);
	}
}

/* ---- requests ---- */

static void clone_run(struct gio *gio, const void *data);

static void clone_job_run(struct pool_job *job)
{
	struct gio *gio = CONTAINER_OF(job, struct gio, job);
	struct group *g = gio->group;
	clone_run(gio, gio->copy);
	mutex_lock(&g->lock);
	g->jobs--;
	cond_broadcast(&g->cond);
	mutex_unlock(&g->lock);
	group_unref(g);
}

/* Its claim ends; those that waited for it go on in the pool. */
static void clone_release(struct gvol *v, struct gio *gio)
{
	mutex_lock(&v->clone->lock);
	struct reqset_claim *ready = reqset_remove(&v->clone->claims, &gio->io.claim);
	mutex_unlock(&v->clone->lock);
	while (ready) {
		struct gio *next = CONTAINER_OF(ready, struct gio, io.claim);
		struct group *g = next->group;
		ready = ready->next_ready;
		mutex_lock(&g->lock);
		g->jobs++;
		mutex_unlock(&g->lock);
		next->job.fn = clone_job_run;
		pool_submit(g->d->pool, &next->job);
	}
}

/* Granted. */
static void clone_run(struct gio *gio, const void *data)
{
	struct volume_req q = {.off = gio->off, .len = gio->len, .buf = data};
	q.kind = gio->kind == REPL_WRITE ? VOLUME_WRITE : gio->kind == REPL_ZERO ? VOLUME_ZERO : VOLUME_DISCARD;
	int err = volume_write_clone(gio->v->vol, gio->v->clone->id, &q);
	clone_release(gio->v, gio);
	free(gio->copy);
	gio->copy = NULL;
	gio->done(gio, err);
}

void clone_io(struct group *g, struct gio *gio)
{
	struct gclone *k = gio->v->clone;
	if (gio->kind == REPL_FLUSH) {
		gio->done(gio, volume_sync_clone(gio->v->vol, k->id));
		return;
	}
	INVARIANT(gio->kind <= REPL_DISCARD);
	gio->copy = NULL;
	gio->io = (struct repl_io){.kind = gio->kind, .off = gio->off, .len = gio->len};
	struct range b = range_align_out((struct range){gio->off, gio->len}, BLOCK_SIZE);
	gio->io.claim.off = b.off;
	gio->io.claim.end = range_end(b);
	atomic_store_explicit(&gio->v->mtime_ns, clock_wall_ns(), memory_order_relaxed);
	mutex_lock(&k->lock);
	bool granted = reqset_add(&k->claims, &gio->io.claim);
	if (!granted && gio->kind == REPL_WRITE) {
		/* The caller's buffer is gone when it runs. Under the lock: nobody can let it run before. */
		gio->copy = malloc(gio->len);
		if (gio->copy == NULL) {
			struct reqset_claim *none = reqset_remove(&k->claims, &gio->io.claim);
			mutex_unlock(&k->lock);
			INVARIANT(none == NULL); /* nobody has come after it */
			gio->done(gio, -ERR_NOMEM);
			return;
		}
		memcpy(gio->copy, gio->data, gio->len);
	}
	if (!granted)
		gio->group = group_ref(g);
	mutex_unlock(&k->lock);
	if (granted)
		clone_run(gio, gio->data);
}

/* ---- removing ---- */

/* No other open comes from here on. */
static int clone_close_door(struct gvol *v, const char **why)
{
	uint64_t until = clock_mono_ns() + CLOSE_WAIT_NS;
	for (;;) {
		int err = -ERR_BUSY;
		pthread_rwlock_wrlock(&v->d->names);
		if (v->g == NULL)
			err = -ERR_NOENT;
		else if (v->clone->going)
			*why = "it is being removed already";
		else if (atomic_load(&v->opens))
			*why = "it is open; close it first (a VM that runs from it)";
		else
			err = 0;
		if (err == 0)
			v->clone->going = true;
		bool open = v->g && !v->clone->going;
		pthread_rwlock_unlock(&v->d->names);
		if (err != -ERR_BUSY || !open || clock_mono_ns() >= until)
			return err;
		(void)poll(NULL, 0, CLOSE_LOOK_MS);
	}
}

int daemon_remove_clone(struct daemon *d, const char *name, struct err *e)
{
	struct gvol *v = gvol_find_clone(d, name);
	const char *why = "";
	int err = v ? clone_close_door(v, &why) : -ERR_NOENT;
	struct group *g = err ? NULL : gvol_group(v);
	if (g) {
		struct shell_command *sc = shell_command_new(CMD_UNCLONE);
		if (sc)
			(void)snprintf(sc->c.text, sizeof(sc->c.text), "%s", name);
		err = sc ? group_command(g, sc, NULL, clock_mono_ns() + UNCLONE_WAIT_NS, e)
			 : err_set(e, ERR_NOMEM, "out of memory");
		shell_command_unref(sc);
	} else if (err == -ERR_NOENT || !err) {
		err = err_set(e, ERR_NOENT, "there is no clone %s", name);
	} else {
		(void)err_set(e, -err, "%s", why);
	}
	if (g && err) { /* it stays */
		pthread_rwlock_wrlock(&d->names);
		v->clone->going = false;
		pthread_rwlock_unlock(&d->names);
	}
	group_unref(g);
	gvol_unref(v);
	return err;
}
