/* The daemon: the store, its groups and their volumes by name, connections, the clock.
 *
 * A connection is accepted without a group; its first frame is a JOIN that names one. A group that does not exist here
 * is made if the JOIN asks to protect (SPEC 13: without TLS every peer that may connect may do that).
 */
#include "fs/daemon.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/repl_shell.h"

#ifndef REPFS_VERSION
#define REPFS_VERSION "0"
#endif

/* ---- names ---- */

struct group *daemon_group_exact(struct daemon *d, const char *name)
{
	struct group *found = NULL;
	pthread_rwlock_rdlock(&d->names);
	for (struct group *g = d->groups; g && !found; g = g->next)
		if (strcmp(g->name, name) == 0)
			found = group_ref(g);
	pthread_rwlock_unlock(&d->names);
	return found;
}

struct group *daemon_group(struct daemon *d, const char *name)
{
	struct group *found = daemon_group_exact(d, name);
	if (found)
		return found;
	pthread_rwlock_rdlock(&d->names);
	for (struct gvol *v = d->gvols; v && !found; v = v->next)
		if (v->g && strcmp(v->name, name) == 0)
			found = group_ref(v->g);
	pthread_rwlock_unlock(&d->names);
	return found;
}

struct gvol *gvol_find(struct daemon *d, const char *name)
{
	struct gvol *found = NULL;
	pthread_rwlock_rdlock(&d->names);
	for (struct gvol *v = d->gvols; v && !found; v = v->next)
		if (v->g && strcmp(v->name, name) == 0)
			found = gvol_ref(v);
	pthread_rwlock_unlock(&d->names);
	return found;
}

struct gvol *gvol_by_id(struct daemon *d, uint32_t id)
{
	struct gvol *found = NULL;
	pthread_rwlock_rdlock(&d->names);
	for (struct gvol *v = d->gvols; v && !found; v = v->next)
		if (v->g && v->id == id)
			found = gvol_ref(v);
	pthread_rwlock_unlock(&d->names);
	return found;
}

void daemon_each_volume(struct daemon *d, void (*fn)(void *arg, const char *name, uint32_t id), void *arg)
{
	pthread_rwlock_rdlock(&d->names);
	for (struct gvol *v = d->gvols; v; v = v->next)
		fn(arg, v->name, v->id);
	pthread_rwlock_unlock(&d->names);
}

void daemon_each_group(struct daemon *d, void (*fn)(void *arg, const char *name, uint32_t id), void *arg)
{
	pthread_rwlock_rdlock(&d->names);
	for (struct group *g = d->groups; g; g = g->next)
		fn(arg, g->name, g->id);
	pthread_rwlock_unlock(&d->names);
}

bool daemon_has_group(struct daemon *d, const char *name, uint32_t *ret_id)
{
	struct group *g = daemon_group_exact(d, name);
	if (g == NULL)
		return false;
	*ret_id = g->id;
	group_unref(g);
	return true;
}

bool daemon_group_name(struct daemon *d, uint32_t id, char name[NAME_SIZE])
{
	bool found = false;
	pthread_rwlock_rdlock(&d->names);
	for (struct group *g = d->groups; g && !found; g = g->next)
		if (g->id == id) {
			memcpy(name, g->name, NAME_SIZE);
			found = true;
		}
	pthread_rwlock_unlock(&d->names);
	return found;
}

void daemon_names_changed(struct daemon *d)
{
	if (d->cfg.hooks.names_changed)
		d->cfg.hooks.names_changed(d->cfg.hooks.arg);
}

int daemon_add_group(struct daemon *d, const struct repl_meta *m, struct err *e)
{
	struct group *g = NULL;
	pthread_rwlock_wrlock(&d->names);
	uint32_t id = ++d->next_id;
	pthread_rwlock_unlock(&d->names);
	int err = group_open(d, m, id, &g, e);
	if (err)
		return err;
	pthread_rwlock_wrlock(&d->names);
	struct group **gp = &d->groups;
	while (*gp && strcmp((*gp)->name, g->name) < 0)
		gp = &(*gp)->next;
	g->next = *gp;
	*gp = g;
	for (uint32_t i = 0; i < g->n_vols; i++) {
		struct gvol *v = gvol_ref(g->vols[i]);
		v->id = ++d->next_id;
		struct gvol **vp = &d->gvols;
		while (*vp && strcmp((*vp)->name, v->name) < 0)
			vp = &(*vp)->next;
		v->next = *vp;
		*vp = v;
	}
	pthread_rwlock_unlock(&d->names);
	daemon_names_changed(d);
	return 0;
}

int daemon_remove_group(struct daemon *d, struct group *g, struct err *e)
{
	pthread_rwlock_wrlock(&d->names);
	for (uint32_t i = 0; i < g->n_vols; i++)
		if (atomic_load(&g->vols[i]->opens)) {
			pthread_rwlock_unlock(&d->names);
			return err_set(e, ERR_BUSY, "volume %s is open; close it first", g->vols[i]->name);
		}
	for (struct group **gp = &d->groups; *gp; gp = &(*gp)->next)
		if (*gp == g) {
			*gp = g->next;
			break;
		}
	for (struct gvol **vp = &d->gvols; *vp;) {
		struct gvol *v = *vp;
		if (v->g != g) {
			vp = &v->next;
			continue;
		}
		*vp = v->next;
		v->g = NULL;
		gvol_unref(v);
	}
	pthread_rwlock_unlock(&d->names);
	group_shutdown(g);
	group_wait_quiet(g, clock_mono_ns() + 10 * NS_PER_SEC);
	/* Readers hold references for the length of one call. */
	while (atomic_load(&g->refs) > 2)
		(void)usleep(1000);
	group_close(g); /* the daemon's own; the caller's is left */
	daemon_names_changed(d);
	return 0;
}

/* ---- connections ---- */

bool daemon_addr_allowed(const struct daemon *d, const char *addr, struct err *e)
{
	char host[ADDR_SIZE], port[16];
	if (addr_split(addr, host, sizeof(host), port, sizeof(port), e) < 0)
		return false;
	if (d->cfg.insecure || strcmp(host, "localhost") == 0 || strncmp(host, "127.", 4) == 0 ||
	    strcmp(host, "::1") == 0)
		return true;
	err_set(e, ERR_PERM,
		"%s is not loopback, and there is no key: start the daemon with `insecure` to allow it in the clear",
		addr);
	return false;
}

static void conn_remember(struct conn *c)
{
	struct daemon *d = c->d;
	mutex_lock(&d->lock);
	c->next = d->conns;
	d->conns = c;
	mutex_unlock(&d->lock);
}

static void conn_forget(struct conn *c)
{
	struct daemon *d = c->d;
	mutex_lock(&d->lock);
	for (struct conn **p = &d->conns; *p; p = &(*p)->next)
		if (*p == c) {
			*p = c->next;
			break;
		}
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
}

static int on_up_dialled(struct link *l, void *arg)
{
	struct conn *c = arg;
	c->link = l; /* link_dial may not have returned yet */
	conn_remember(c);
	group_attach(c->g, c, NULL, NULL);
	return 0;
}

static int on_up_accepted(struct link *l, void *arg)
{
	struct conn *c = calloc(1, sizeof(*c));
	if (c == NULL)
		return -ERR_NOMEM;
	c->d = arg;
	c->link = l;
	conn_remember(c);
	link_set_arg(l, c);
	return 0;
}

static void refuse(struct conn *c, int code, const char *text)
{
	struct wire_refuse x = {.code = (uint16_t)code};
	uint8_t buf[WIRE_TEXT_MAX + 64];
	(void)snprintf(x.text, sizeof(x.text), "%s", text);
	int n = wire_refuse_encode(&x, buf, sizeof(buf));
	void *payload = n > 0 ? malloc((size_t)n) : NULL;
	if (payload) {
		memcpy(payload, buf, (size_t)n);
		struct wire_frame f = {.type = WIRE_REFUSE, .length_payload = (uint32_t)n};
		(void)link_send(c->link, &f, payload, NULL, NULL);
	}
	link_close(c->link, CLOSE_DRAIN_MS);
	log_warn("", "refused %s: %s", link_peer_name(c->link), text);
}

/* Makes the recovery volumes of a group that a peer protects. Crash order: folders, then the record that names them. */
static int make_recovery(struct daemon *d, const struct wire_join *j, struct err *e)
{
	struct repl_meta *m = malloc(sizeof(*m));
	if (m == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	repl_meta_init(m, j->group);
	memcpy(m->uuid, j->group_uuid, sizeof(m->uuid));
	m->role = ROLE_SECONDARY;
	m->inconsistent = m->fresh = m->has_peer = true;
	m->settings = j->settings;
	int err = 0;
	uint32_t made = 0;
	for (; made < j->n_volumes && !err; made++) {
		struct gvol *other = gvol_find(d, j->volumes[made].name);
		if (other) {
			gvol_unref(other);
			err = err_set(e, ERR_STATE, "a volume %s is there already, in another group",
				      j->volumes[made].name);
			break;
		}
		m->volumes[m->n_volumes++] = j->volumes[made];
		err = volume_create(store_storage(d->store), j->volumes[made].name, j->volumes[made].size,
				    store_info(d->store)->durability, e);
		if (err)
			break;
	}
	if (!err)
		err = store_save_group(d->store, m, e);
	if (!err && (err = daemon_add_group(d, m, e)) < 0)
		(void)store_delete_group(d->store, m->group, NULL);
	if (err)
		while (made--)
			(void)volume_delete(store_storage(d->store), j->volumes[made].name, NULL);
	free(m);
	return err;
}

static int groups_count(struct daemon *d)
{
	int n = 0;
	pthread_rwlock_rdlock(&d->names);
	for (struct group *g = d->groups; g; g = g->next)
		n++;
	pthread_rwlock_unlock(&d->names);
	return n;
}

/* The first frame of an accepted connection. Takes payload. */
static int first_frame(struct conn *c, const struct wire_frame *f, void *payload)
{
	struct daemon *d = c->d;
	struct err e = {0};
	if (f->type == WIRE_PING || f->type == WIRE_GOODBYE) {
		free(payload);
		return 0;
	}
	if (f->type == WIRE_REFUSE) {
		free(payload);
		return -ERR_PEER;
	}
	struct wire_join *j = f->type == WIRE_JOIN ? malloc(sizeof(*j)) : NULL;
	if (j == NULL || wire_join_decode(j, payload, f->length_payload, &e) < 0) {
		refuse(c, ERR_PROTO, j ? e.text : "the first frame has to be JOIN");
		free(j);
		free(payload);
		return 0;
	}
	mutex_lock(&d->admin);
	struct group *g = daemon_group_exact(d, j->group);
	if (g == NULL && !(j->flags & WIRE_JOIN_PROTECT)) {
		char text[WIRE_TEXT_MAX];
		(void)snprintf(text, sizeof(text), "there is no group %s here; protect it afresh", j->group);
		refuse(c, ERR_NOENT, text);
	} else if (g == NULL && groups_count(d) >= STORE_GROUPS_MAX) {
		refuse(c, ERR_LIMIT, "this host has as many groups as it may");
	} else {
		if (g == NULL && make_recovery(d, j, &e) < 0)
			refuse(c, e.code ? e.code : ERR_FAILED, e.text);
		else if (g == NULL)
			g = daemon_group_exact(d, j->group);
	}
	mutex_unlock(&d->admin);
	free(j);
	if (g == NULL) {
		free(payload);
		return 0;
	}
	/* One primary a group: a stranger does not push out the one that is connected. */
	mutex_lock(&g->lock);
	bool taken = g->conn && memcmp(link_peer(g->conn->link)->store, link_peer(c->link)->store, 16) != 0;
	mutex_unlock(&g->lock);
	if (taken) {
		refuse(c, ERR_STATE,
		       "that group is connected to another host already; choose another name, or unprotect it there");
		group_unref(g);
		free(payload);
		return 0;
	}
	if (repl_meta(g->core)->role == ROLE_STANDALONE) {
		for (uint32_t i = 0; i < g->n_vols; i++)
			if (atomic_load(&g->vols[i]->opens) && repl_meta(g->core)->failover_generation == 0) {
				char text[WIRE_TEXT_MAX];
				(void)snprintf(text, sizeof(text),
					       "volume %s is open on that host; close it there first",
					       g->vols[i]->name);
				refuse(c, ERR_STATE, text);
				group_unref(g);
				free(payload);
				return 0;
			}
	}
	c->g = g;
	mutex_lock(&g->lock);
	g->conns++;
	mutex_unlock(&g->lock);
	group_attach(g, c, f, payload);
	return 0;
}

static int on_frame(struct link *l, void *arg, const struct wire_frame *f, void *payload)
{
	struct conn *c = arg;
	(void)l;
	return c->g ? group_frame(c, f, payload) : first_frame(c, f, payload);
}

static void on_batch(struct link *l, void *arg)
{
	struct conn *c = arg;
	(void)l;
	if (c->g)
		group_batch(c);
}

static void on_sent(struct link *l, void *arg, uint64_t n)
{
	struct conn *c = arg;
	(void)l;
	if (c->g)
		group_sent(c, n);
}

static void on_down(struct link *l, void *arg, int code, const char *text)
{
	struct conn *c = arg;
	log_debug("", "connection to %s down: %s", link_peer_name(l), text);
	conn_forget(c);
	if (c->g)
		group_conn_down(c, code, text);
	link_unref(l);
	free(c);
}

/* An accepted link that failed before `up` has the daemon as its argument. */
static void on_down_accepted(struct link *l, void *arg, int code, const char *text)
{
	if (link_session(l) == 0) {
		log_debug("", "a connection from %s failed: %s", link_peer_name(l), text);
		return;
	}
	on_down(l, arg, code, text);
}

const struct link_callbacks *daemon_link_callbacks(bool dialled)
{
	static const struct link_callbacks d = {on_up_dialled, on_frame, on_batch, on_sent, on_down};
	static const struct link_callbacks a = {on_up_accepted, on_frame, on_batch, on_sent, on_down_accepted};
	return dialled ? &d : &a;
}

/* ---- the clock ---- */

static void *tick_main(void *arg)
{
	struct daemon *d = arg;
	uint64_t next = clock_mono_ns();
	mutex_lock(&d->lock);
	while (!d->stop) {
		next += TICK_NS;
		while (!d->stop && cond_wait_until(&d->cond, &d->lock, next))
			;
		if (d->stop)
			break;
		mutex_unlock(&d->lock);
		struct group *all[STORE_GROUPS_MAX];
		unsigned n = 0;
		pthread_rwlock_rdlock(&d->names);
		for (struct group *g = d->groups; g && n < STORE_GROUPS_MAX; g = g->next)
			all[n++] = group_ref(g);
		pthread_rwlock_unlock(&d->names);
		for (unsigned i = 0; i < n; i++) {
			group_tick(all[i]);
			group_unref(all[i]);
		}
		mutex_lock(&d->lock);
		if (clock_mono_ns() > next + 10 * TICK_NS) /* suspended, or starved: no burst */
			next = clock_mono_ns();
	}
	mutex_unlock(&d->lock);
	return NULL;
}

/* ---- life ---- */

struct load_arg {
	struct daemon *d;
	struct err *e;
};

static int load_group(void *arg, const char *name)
{
	struct load_arg *l = arg;
	struct repl_meta *m = NULL;
	int err = store_load_group(l->d->store, name, &m, l->e);
	if (!err)
		err = daemon_add_group(l->d, m, l->e);
	free(m);
	return err;
}

static void daemon_free(struct daemon *d)
{
	while (d->groups) {
		struct group *g = d->groups;
		d->groups = g->next;
		group_close(g);
	}
	while (d->gvols) {
		struct gvol *v = d->gvols;
		d->gvols = v->next;
		gvol_unref(v);
	}
	pool_destroy(d->pool);
	store_close(d->store);
	pthread_rwlock_destroy(&d->names);
	mutex_destroy(&d->admin);
	mutex_destroy(&d->lock);
	cond_destroy(&d->cond);
	free(d);
}

static unsigned pick_threads(unsigned wanted)
{
	long n = sysconf(_SC_NPROCESSORS_ONLN);
	unsigned t = wanted ? wanted : (unsigned)(n > 0 ? n : 1) * 2;
	return t < 4 ? 4 : t > POOL_THREADS_MAX ? POOL_THREADS_MAX : t;
}

int daemon_open(const struct daemon_config *cfg, struct daemon **ret, struct err *e)
{
	struct daemon *d = calloc(1, sizeof(*d));
	if (d == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	d->cfg = *cfg;
	mutex_init(&d->lock);
	mutex_init(&d->admin);
	cond_init(&d->cond);
	pthread_rwlock_init(&d->names, NULL);
	struct load_arg l = {d, e};
	int err = store_open(cfg->store, STORE_CREATE, cfg->durability, &d->store, e);
	if (!err && cfg->durability >= 0 && (int)store_info(d->store)->durability != cfg->durability)
		err = store_set_durability(d->store, (enum volume_durability)cfg->durability, e);
	if (!err && (err = pool_create(pick_threads(cfg->threads), "worker", &d->pool)) < 0)
		(void)err_set(e, -err, "the worker threads could not be started: %s", err_short(err));
	if (!err) {
		memcpy(d->self.store, store_info(d->store)->uuid, sizeof(d->self.store));
		(void)snprintf(d->self.program, sizeof(d->self.program), "repfs %s", REPFS_VERSION);
		err = store_list_groups(d->store, load_group, &l);
	}
	if (!err && cfg->listen)
		err = link_server_start(cfg->listen, cfg->insecure, &d->self, daemon_link_callbacks(false), d,
					&d->server, e);
	if (!err && (err = thread_start(&d->ticker, "ticker", tick_main, d)) < 0)
		(void)err_set(e, -err, "the clock's thread could not be started");
	if (err) {
		if (d->server)
			link_server_stop(d->server);
		if (d->pool)
			pool_drain(d->pool);
		daemon_free(d);
		return err;
	}
	d->ticking = true;
	*ret = d;
	return 0;
}

static int serve_command(void *arg, struct ctl_conn *c, const char *verb, const json_t *args, json_t **ret,
			 struct err *e)
{
	return daemon_command(arg, c, verb, args, ret, e);
}

int daemon_serve_control(struct daemon *d, struct err *e)
{
	char path[4096];
	(void)snprintf(path, sizeof(path), "%s/control.sock", store_path(d->store));
	return ctl_server_start(path, serve_command, d, &d->ctl, e);
}

/* Within twice peer_timeout whatever the peer does: goodbyes are bounded by CLOSE_DRAIN_MS, the rest is local. */
void daemon_close(struct daemon *d)
{
	if (d == NULL)
		return;
	atomic_store(&d->ending, true);
	if (d->ctl)
		ctl_server_stop(d->ctl);
	mutex_lock(&d->lock);
	d->stop = true;
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
	if (d->ticking)
		(void)pthread_join(d->ticker, NULL);
	for (struct group *g = d->groups; g; g = g->next)
		group_shutdown(g);
	if (d->server)
		link_server_stop(d->server);
	uint64_t deadline = clock_mono_ns() + 8 * NS_PER_SEC;
	for (struct group *g = d->groups; g; g = g->next)
		group_wait_quiet(g, deadline);
	mutex_lock(&d->lock);
	while (d->conns && cond_wait_until(&d->cond, &d->lock, deadline))
		;
	mutex_unlock(&d->lock);
	pool_drain(d->pool);
	for (struct group *g = d->groups; g; g = g->next)
		for (uint32_t i = 0; i < g->n_vols; i++) {
			int err = volume_sync(g->vols[i]->vol);
			err = err ? err : volume_sync_active(g->vols[i]->vol);
			if (err)
				log_error(g->name, "volume %s could not be flushed: %s", g->vols[i]->name,
					  err_short(err));
		}
	daemon_free(d);
}

const char *daemon_listen_addr(const struct daemon *d)
{
	return d->server ? link_server_addr(d->server) : NULL;
}

const char *daemon_store_path(const struct daemon *d)
{
	return store_path(d->store);
}
