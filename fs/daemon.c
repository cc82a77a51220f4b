/* The daemon: the store, its groups and their volumes by name, connections, the clock.
 *
 * A connection is accepted without a group; its first frame is a JOIN that names one, or it asks for
 * something of the whole host (fs/hub.h). A group that does not exist here
 * is made if the JOIN asks to protect (SPEC 13: without TLS every peer that may connect may do that).
 */
#include "fs/daemon.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/jobs.h"
#include "fs/repl_shell.h"

#ifndef REPFS_VERSION
#define REPFS_VERSION "0"
#endif

/* From an accepted connection's handshake to its JOIN, which a peer sends at once. */
#define JOIN_WAIT_NS (5 * NS_PER_SEC)

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
	for (struct gvol *v = d->clones; v && !found; v = v->next)
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
	hub_volumes_changed(d);
	if (d->cfg.hooks.names_changed)
		d->cfg.hooks.names_changed(d->cfg.hooks.arg);
}

/* ---- groups that are not served ---- */

/* d->names is held for writing. */
static void unserved_drop(struct daemon *d, const char *group)
{
	for (struct unserved **u = &d->unserved; *u; u = &(*u)->next)
		if (strcmp((*u)->group, group) == 0) {
			struct unserved *gone = *u;
			*u = gone->next;
			free(gone);
			return;
		}
}

void daemon_unserved_remove(struct daemon *d, const char *group)
{
	pthread_rwlock_wrlock(&d->names);
	unserved_drop(d, group);
	pthread_rwlock_unlock(&d->names);
}

void daemon_unserved_add(struct daemon *d, const char *group, const struct repl_meta *m, const char *why)
{
	struct unserved *u = calloc(1, sizeof(*u));
	if (u == NULL)
		return; /* it is in the log */
	(void)snprintf(u->group, sizeof(u->group), "%s", group);
	u->n_volumes = m ? m->n_volumes : 0;
	for (uint32_t i = 0; i < u->n_volumes; i++)
		memcpy(u->volumes[i], m->volumes[i].name, NAME_SIZE);
	u->n_clones = m ? m->n_clones : 0;
	for (uint32_t i = 0; i < u->n_clones; i++)
		memcpy(u->clones[i], m->clones[i].name, NAME_SIZE);
	(void)snprintf(u->why, sizeof(u->why), "%s", why);
	pthread_rwlock_wrlock(&d->names);
	unserved_drop(d, group);
	u->next = d->unserved;
	d->unserved = u;
	pthread_rwlock_unlock(&d->names);
}

bool daemon_unserved(struct daemon *d, const char *name, char why[ERR_TEXT_MAX], char group[NAME_SIZE])
{
	bool found = false;
	pthread_rwlock_rdlock(&d->names);
	for (const struct unserved *u = d->unserved; u && !found; u = u->next) {
		found = strcmp(u->group, name) == 0;
		for (uint32_t i = 0; i < u->n_volumes && !found; i++)
			found = strcmp(u->volumes[i], name) == 0;
		if (found) {
			memcpy(why, u->why, ERR_TEXT_MAX);
			memcpy(group, u->group, NAME_SIZE);
		}
	}
	pthread_rwlock_unlock(&d->names);
	return found;
}

void daemon_away_set(struct daemon *d, struct repl_meta *m)
{
	pthread_rwlock_wrlock(&d->names);
	struct repl_meta *old = d->away;
	d->away = m;
	pthread_rwlock_unlock(&d->names);
	free(old);
}

bool daemon_away(struct daemon *d, const char *name)
{
	pthread_rwlock_rdlock(&d->names);
	const struct repl_meta *m = d->away;
	bool is = m && (strcmp(m->group, name) == 0 || repl_meta_find_volume(m, name) >= 0);
	pthread_rwlock_unlock(&d->names);
	return is;
}

int daemon_clone_unlisted(struct daemon *d, const char *clone)
{
	pthread_rwlock_rdlock(&d->names);
	int err = d->away && repl_meta_find_clone(d->away, clone) >= 0 ? -ERR_BUSY : 0;
	for (const struct unserved *u = d->unserved; u && !err; u = u->next)
		for (uint32_t i = 0; i < u->n_clones && !err; i++)
			err = strcmp(u->clones[i], clone) == 0 ? -ERR_EXIST : 0;
	pthread_rwlock_unlock(&d->names);
	return err;
}

int daemon_add_group(struct daemon *d, const struct repl_meta *m, struct err *e)
{
	struct group *g = NULL;
	pthread_rwlock_wrlock(&d->names);
	uint32_t id = d->next_id + 1; /* its own, then one for each volume */
	d->next_id += 1 + m->n_volumes;
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
	unserved_drop(d, g->name);
	for (uint32_t i = 0; i < g->n_vols; i++) {
		struct gvol *v = gvol_ref(g->vols[i]);
		struct gvol **vp = &d->gvols;
		while (*vp && strcmp((*vp)->name, v->name) < 0)
			vp = &(*vp)->next;
		v->next = *vp;
		*vp = v;
	}
	pthread_rwlock_unlock(&d->names);
	(void)group_clones_publish(g, m);
	daemon_names_changed(d);
	return 0;
}

static void gvols_forget(struct gvol **list, const struct group *g)
{
	while (*list) {
		struct gvol *v = *list;
		if (v->g != g) {
			list = &v->next;
			continue;
		}
		*list = v->next;
		v->g = NULL;
		gvol_unref(v);
	}
}

int daemon_remove_group(struct daemon *d, struct group *g, struct err *e)
{
	pthread_rwlock_wrlock(&d->names);
	for (uint32_t i = 0; i < g->n_vols; i++)
		if (atomic_load(&g->vols[i]->opens)) {
			pthread_rwlock_unlock(&d->names);
			return err_set(e, ERR_BUSY, "volume %s is open; close it first", g->vols[i]->name);
		}
	for (struct gvol *v = d->clones; v; v = v->next)
		if (v->g == g && atomic_load(&v->opens)) {
			pthread_rwlock_unlock(&d->names);
			return err_set(e, ERR_BUSY, "clone %s is open; close it first", v->name);
		}
	for (struct group **gp = &d->groups; *gp; gp = &(*gp)->next)
		if (*gp == g) {
			*gp = g->next;
			break;
		}
	g->nameless = true;
	gvols_forget(&d->gvols, g);
	gvols_forget(&d->clones, g);
	pthread_rwlock_unlock(&d->names);
	group_shutdown(g);
	daemon_conns_close(d, g);
	/* Nobody finds it any more. Who holds a reference still, a call or a connection, ends soon; what they have
	 * started is waited for after that, as nothing can be started any more. */
	while (atomic_load(&g->refs) > 2)
		(void)usleep(1000);
	(void)group_wait_quiet(g, 0);
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
	struct in_addr v4;
	if (d->cfg.insecure || strcmp(host, "localhost") == 0 || strcmp(host, "::1") == 0 ||
	    (inet_pton(AF_INET, host, &v4) == 1 && ntohl(v4.s_addr) >> 24 == IN_LOOPBACKNET))
		return true;
	err_set(e, ERR_PERM,
		"%s is not loopback, and there is no key: start the daemon with `insecure` to allow it in the clear",
		addr);
	return false;
}

void daemon_conn_add(struct conn *c)
{
	struct daemon *d = c->d;
	mutex_lock(&d->lock);
	c->next = d->conns;
	d->conns = c;
	mutex_unlock(&d->lock);
}

void daemon_conn_remove(struct conn *c)
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

void daemon_conn_set_link(struct conn *c, struct link *l)
{
	mutex_lock(&c->d->lock);
	if (c->link == NULL)
		c->link = l;
	mutex_unlock(&c->d->lock);
}

void daemon_conn_put(struct conn *c)
{
	if (atomic_fetch_sub(&c->refs, 1) != 1)
		return;
	link_unref(c->link);
	free(c);
}

void daemon_conns_close(struct daemon *d, const struct group *g)
{
	mutex_lock(&d->lock);
	for (struct conn *c = d->conns; c; c = c->next)
		if (c->link && (g == NULL || atomic_load(&c->g) == g))
			link_close(c->link, 0);
	mutex_unlock(&d->lock);
}

bool daemon_peer_may(const struct conn *c, const char *group)
{
	/* Without TLS a connection has no identity, and all that are taken (loopback, or `insecure`) may all. */
	(void)c;
	(void)group;
	return true;
}

static int on_up_dialled(struct link *l, void *arg)
{
	struct conn *c = arg;
	daemon_conn_set_link(c, l);
	hub_conn_up(c);
	group_attach(c->g, c, NULL, NULL, NULL);
	return 0;
}

static int on_up_accepted(struct link *l, void *arg)
{
	struct daemon *d = ((struct conn *)arg)->d;
	if (atomic_load(&d->ending))
		return -ERR_CANCELED;
	struct conn *c = calloc(1, sizeof(*c));
	if (c == NULL)
		return -ERR_NOMEM;
	c->d = d;
	atomic_store(&c->refs, 1);
	c->link = l;
	c->since_ns = clock_mono_ns();
	daemon_conn_add(c);
	link_set_arg(l, c);
	hub_conn_up(c);
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

static int make_recovery(struct daemon *d, const struct wire_join *j, struct err *e)
{
	int err = 0;
	for (uint32_t i = 0; i < j->n_volumes && !err; i++) {
		struct gvol *other = gvol_find(d, j->volumes[i].name);
		if (other)
			err =
			    err_set(e, ERR_STATE, "a volume %s is there already, in another group", j->volumes[i].name);
		gvol_unref(other);
	}
	if (err)
		return err;
	struct repl_meta *m = malloc(sizeof(*m));
	if (m == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	err = repl_exec_make(d->store, j, m, e);
	if (!err && (err = daemon_add_group(d, m, e)) < 0)
		repl_exec_unmake(d->store, m);
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

/* The group that a JOIN asks for, made if the peer wants to protect into a new one. NULL: refused. A group that is here
 * is found without the verbs' lock: a long import must not keep peers from coming back. */
static struct group *group_for(struct conn *c, const struct wire_join *j)
{
	struct daemon *d = c->d;
	struct err e = {0};
	struct group *g = daemon_group_exact(d, j->group);
	if (g)
		return g;
	char why[ERR_TEXT_MAX], name[NAME_SIZE];
	if (daemon_unserved(d, j->group, why, name)) {
		refuse(c, ERR_STATE, why);
		return NULL;
	}
	mutex_lock(&d->admin);
	g = daemon_group_exact(d, j->group); /* a verb may have had it out */
	if (g == NULL && atomic_load(&d->ending)) {
		refuse(c, ERR_CANCELED, "repfs is ending on that host");
	} else if (g == NULL && !(j->flags & WIRE_JOIN_PROTECT)) {
		char text[WIRE_TEXT_MAX];
		(void)snprintf(text, sizeof(text), "there is no group %s here; protect it afresh", j->group);
		refuse(c, ERR_NOENT, text);
	} else if (g == NULL && groups_count(d) >= STORE_GROUPS_MAX) {
		refuse(c, ERR_LIMIT, "this host has as many groups as it may");
	} else if (g == NULL) {
		if (make_recovery(d, j, &e) < 0)
			refuse(c, e.code ? e.code : ERR_FAILED, e.text);
		else
			g = daemon_group_exact(d, j->group);
	}
	mutex_unlock(&d->admin);
	return g;
}

/* Why the group can't take this connection, in text; 0: it can. */
static int check_taken(struct group *g, const struct conn *c, const struct wire_join *j, char text[WIRE_TEXT_MAX])
{
	int err = 0;
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	/* One primary a group: a stranger does not push out the one that is connected. */
	if (g->conn && memcmp(link_peer(g->conn->link)->store, link_peer(c->link)->store, 16) != 0) {
		(void)snprintf(text, WIRE_TEXT_MAX,
			       "that group is connected to another host already; choose another name, or unprotect it "
			       "there");
		err = ERR_STATE;
	}
	if (!err && !repl_takes_link(g->core, j, 0)) {
		(void)snprintf(text, WIRE_TEXT_MAX, "that host dials itself for that group, or was dialled since");
		err = ERR_BUSY;
	}
	bool own = m->role == ROLE_STANDALONE && (j->flags & WIRE_JOIN_PROTECT) != 0;
	for (uint32_t i = 0; own && !err && i < g->n_vols; i++)
		if (atomic_load(&g->vols[i]->opens)) {
			(void)snprintf(text, WIRE_TEXT_MAX, "volume %s is open on that host; close it there first",
				       g->vols[i]->name);
			err = ERR_STATE;
		}
	mutex_unlock(&g->lock);
	return err;
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
	mutex_lock(&d->lock);
	c->since_ns = 0;
	mutex_unlock(&d->lock);
	struct wire_join *j = f->type == WIRE_JOIN ? malloc(sizeof(*j)) : NULL;
	if (j == NULL || wire_join_decode(j, payload, f->length_payload, &e) < 0) {
		refuse(c, ERR_PROTO, j ? e.text : "the first frame has to be JOIN");
		free(j);
		free(payload);
		return 0;
	}
	if (!daemon_peer_may(c, j->group)) {
		refuse(c, ERR_PERM, "this host does not accept that peer for that group");
		free(j);
		free(payload);
		return 0;
	}
	struct group *g = group_for(c, j);
	char text[WIRE_TEXT_MAX];
	int err = g ? check_taken(g, c, j, text) : 0;
	if (err) {
		refuse(c, err, text);
		group_unref(g);
	}
	if (g == NULL || err) {
		free(j);
		free(payload);
		return 0;
	}
	c->g = g;
	mutex_lock(&g->lock);
	g->conns++;
	mutex_unlock(&g->lock);
	group_attach(g, c, j, f, payload);
	free(j);
	return 0;
}

static int on_frame(struct link *l, void *arg, const struct wire_frame *f, void *payload)
{
	struct conn *c = arg;
	(void)l;
	if (f->type == WIRE_REPORT) {
		int err = hub_report_frame(c, f, payload);
		free(payload);
		return err;
	}
	if (hub_is(f->type))
		return hub_frame(c, f, payload);
	if (atomic_load(&c->host))
		return hub_host_frame(c, f, payload);
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
	if (c->g)
		group_conn_down(c, code, text);
	hub_conn_down(c);
	daemon_conn_remove(c); /* the daemon may be gone after this */
	daemon_conn_put(c);
}

/* One that failed before `up`, or whose `up` failed, has no connection of its own. */
static void on_down_accepted(struct link *l, void *arg, int code, const char *text)
{
	struct conn *c = arg;
	if (c == &c->d->acceptor) {
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

/* Of those that are there now, without the names' lock. */
static void each_group(struct daemon *d, void (*fn)(struct group *g))
{
	struct group *all[STORE_GROUPS_MAX];
	unsigned n = 0;
	pthread_rwlock_rdlock(&d->names);
	for (struct group *g = d->groups; g && n < STORE_GROUPS_MAX; g = g->next)
		all[n++] = group_ref(g);
	pthread_rwlock_unlock(&d->names);
	for (unsigned i = 0; i < n; i++) {
		fn(all[i]);
		group_unref(all[i]);
	}
}

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
		each_group(d, group_tick);
		hub_tick(d);
		jobs_tick(d->jobs);
		mutex_lock(&d->lock);
		for (struct conn *c = d->conns; c; c = c->next)
			if (c->since_ns && clock_mono_ns() - c->since_ns > JOIN_WAIT_NS)
				link_close(c->link, 0);
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
	/* Its record or a file of it is damaged or missing, or its base image is not what it was: the others are
	 * served, and nothing of it is touched. */
	if (err && err != -ERR_NOMEM) {
		struct err why;
		(void)err_set(&why, -err, "%s; then start repfs anew", l->e->text);
		log_error(name, "the group is not served: %s", why.text);
		daemon_unserved_add(l->d, name, m, why.text);
		err = 0;
	}
	free(m);
	return err;
}

static void daemon_free(struct daemon *d)
{
	jobs_close(d->jobs);
	while (d->groups) {
		struct group *g = d->groups;
		d->groups = g->next;
		group_close(g);
	}
	struct gvol **lists[] = {&d->gvols, &d->clones};
	for (size_t i = 0; i < ARRAY_LEN(lists); i++)
		while (*lists[i]) {
			struct gvol *v = *lists[i];
			*lists[i] = v->next;
			gvol_unref(v);
		}
	clones_late_free(d);
	hub_free(&d->hub);
	while (d->unserved) {
		struct unserved *u = d->unserved;
		d->unserved = u->next;
		free(u);
	}
	pool_destroy(d->pool);
	store_close(d->store);
	pthread_rwlock_destroy(&d->names);
	mutex_destroy(&d->admin);
	mutex_destroy(&d->cloning);
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
	d->acceptor.d = d;
	hub_init(&d->hub);
	mutex_init(&d->lock);
	mutex_init(&d->admin);
	mutex_init(&d->cloning);
	cond_init(&d->cond);
	pthread_rwlock_init(&d->names, NULL);
	struct load_arg l = {d, e};
	int err = cfg->storage ? store_open_on(cfg->storage, cfg->store, cfg->durability, &d->store, e)
			       : store_open(cfg->store, STORE_CREATE, cfg->durability, &d->store, e);
	if (!err && cfg->durability >= 0 && (int)store_info(d->store)->durability != cfg->durability)
		err = store_set_durability(d->store, (enum volume_durability)cfg->durability, e);
	if (!err && (err = pool_create(pick_threads(cfg->threads), "worker", &d->pool)) < 0)
		(void)err_set(e, -err, "the worker threads could not be started: %s", err_short(err));
	if (!err && (err = jobs_open(d, &d->jobs)) < 0)
		(void)err_set(e, -err, "out of memory");
	if (!err) {
		memcpy(d->self.store, store_info(d->store)->uuid, sizeof(d->self.store));
		(void)snprintf(d->self.program, sizeof(d->self.program), "repfs %s", REPFS_VERSION);
		err = store_list_groups(d->store, load_group, &l);
	}
	if (!err && cfg->listen)
		err = link_server_start(cfg->listen, cfg->insecure, &d->self, daemon_link_callbacks(false),
					&d->acceptor, &d->server, e);
	if (!err && (err = thread_start(&d->ticker, "ticker", tick_main, d)) < 0)
		(void)err_set(e, -err, "the clock's thread could not be started");
	d->ticking = err == 0;
	if (err) {
		daemon_close(d);
		return err;
	}
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

static bool conns_wait(struct daemon *d, uint64_t deadline_ns)
{
	mutex_lock(&d->lock);
	while (d->conns && cond_wait_until(&d->cond, &d->lock, deadline_ns))
		;
	bool none = d->conns == NULL;
	mutex_unlock(&d->lock);
	return none;
}

static void sync_volumes(struct group *g)
{
	for (uint32_t i = 0; i < g->n_vols; i++) {
		int err = volume_sync(g->vols[i]->vol);
		err = err ? err : volume_sync_active(g->vols[i]->vol);
		if (err)
			log_error(g->name, "volume %s could not be flushed: %s", g->vols[i]->name, err_short(err));
	}
}

void daemon_shutdown(struct daemon *d)
{
	if (atomic_exchange(&d->ending, true))
		return;
	/* First: verbs are waited for, and they wait for a job's end, or for a request that waits for the peer. */
	if (d->jobs)
		jobs_shutdown(d->jobs);
	each_group(d, group_shutdown);
	if (d->ctl)
		ctl_server_stop(d->ctl);
	mutex_lock(&d->lock);
	d->stop = true;
	cond_broadcast(&d->cond);
	mutex_unlock(&d->lock);
	if (d->ticking)
		(void)pthread_join(d->ticker, NULL);
	/* A JOIN that makes a group ends first; no other is made: from here on the list stands. Those that were made,
	 * or brought back by a verb, meanwhile: */
	mutex_lock(&d->admin);
	mutex_unlock(&d->admin);
	each_group(d, group_shutdown);
	hub_shutdown(d);
}

/* Within twice peer_timeout whatever the peer does: goodbyes are bounded by CLOSE_DRAIN_MS, the rest is local. Also of
 * one that daemon_open could not finish. */
void daemon_close(struct daemon *d)
{
	if (d == NULL)
		return;
	daemon_shutdown(d);
	(void)conns_wait(d, clock_mono_ns() + (CLOSE_DRAIN_MS + 100) * NS_PER_MS);
	daemon_conns_close(d, NULL);
	if (d->server)
		link_server_stop(d->server);
	uint64_t deadline = clock_mono_ns() + 8 * NS_PER_SEC;
	bool quiet = d->jobs == NULL || jobs_wait_quiet(d->jobs, deadline);
	for (struct group *g = d->groups; g; g = g->next)
		quiet = group_wait_quiet(g, deadline) && quiet;
	quiet = conns_wait(d, deadline) && quiet;
	quiet = hub_wait_quiet(d, deadline) && quiet;
	if (d->pool && quiet)
		pool_drain(d->pool);
	for (struct gvol *v = d->clones; v; v = v->next) {
		int err = volume_sync_clone(v->vol, v->clone->id);
		if (err && err != -ERR_NOENT)
			log_error(v->name, "the clone could not be flushed: %s", err_short(err));
	}
	for (struct group *g = d->groups; g; g = g->next) {
		sync_volumes(g);
		if (quiet) /* all that came was answered, and what comes now is refused */
			group_end(g);
	}
	if (quiet)
		daemon_free(d);
	else /* a name look-up, or a disk that hangs: its thread still uses what would be freed */
		log_warn("", "ending without waiting any longer for what is under way");
}

const char *daemon_listen_addr(const struct daemon *d)
{
	return d->server ? link_server_addr(d->server) : NULL;
}

const char *daemon_store_path(const struct daemon *d)
{
	return store_path(d->store);
}
