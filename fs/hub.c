/* Hub messages: see fs/hub.h.
 *
 * A request (struct hub_request) goes through the pool of this file, whose threads may wait, for what they wait for is
 * done by others: the daemon's workers, a peer's receiver, the clock.
 *
 *   frame, verb → request_begin → [pool] request_run → gvol_submit ... its end, in any thread
 *     → [pool] request_finish → the answer: a frame, or the verb's thread goes on
 *
 * A request that reads or writes holds no thread while the group makes it wait (its range, a full queue, the peer): its
 * end comes as that of a guest's does. What takes longer than answer_ns is answered with a time-out, and goes on; its
 * object, and its place among the HUB_REQUESTS_MAX, are free when it has ended. So a connection is answered in bounded
 * time and holds bounded memory. Whoever sets `answered`, under hub.lock, answers.
 *
 * A call (struct hub_call) is a verb's thread that waits for the peer's answer. One that gave up stays in the list
 * until the answer has come or the connection has ended: a late answer is no violation, an answer to nothing is.
 *
 * References: a request holds its connection, volume and group; a call its connection.
 */
#include "fs/hub.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"

#define ERROR_SIZE (WIRE_TEXT_MAX + 64U)

struct hub_request {
	struct gio gio;
	struct pool_job job;
	struct daemon *d;
	struct conn *c;	     /* who asked, a reference; NULL: a verb */
	enum wire_type type; /* START_PROTECT, VOLUME_READ, VOLUME_WRITE; REPORT_WANT, for its answer alone */
	uint64_t token;
	uint16_t flags;
	char name[NAME_SIZE];
	uint64_t off, len;
	void *payload; /* owned: the frame's; a READ's bytes; a verb's bytes to be written */
	uint8_t *data; /* in payload */
	struct wire_start *start;
	struct gvol *v;
	struct group *g;
	bool listed; /* in hub.requests, and counted there */
	int error;
	struct err e;
	uint8_t why[ERROR_SIZE]; /* the answer's, of an error */
	uint64_t begun_ns, answer_ns;
	/* under hub.lock */
	bool answered, waited, done; /* waited: a verb's thread looks at it still */
	struct hub_request *next;
};

struct hub_call {
	struct conn *c; /* a reference */
	uint64_t token;
	enum wire_type type; /* REPORT_WANT, VOLUME_READ, VOLUME_WRITE */
	uint64_t off, len;
	void *data; /* of a READ, owned; NULL: zeroes */
	json_t *volumes;
	unsigned n_volumes;
	uint64_t limit_ns;
	struct wire_refuse why;
	/* under hub.lock */
	bool done, abandoned;
	int error;
	struct hub_call *next;
};

void hub_init(struct hub *h)
{
	mutex_init(&h->lock);
	cond_init(&h->cond);
}

void hub_free(struct hub *h)
{
	if (h->pool)
		pool_destroy(h->pool);
	cond_destroy(&h->cond);
	mutex_destroy(&h->lock);
}

static struct conn *conn_ref(struct conn *c)
{
	atomic_fetch_add(&c->refs, 1);
	return c;
}

/* ---- sending ---- */

static void send_copy(struct conn *c, const struct wire_frame *f, const void *data, uint32_t len)
{
	void *payload = len ? malloc(len) : NULL;
	if (len && payload == NULL) {
		link_close(c->link, 0);
		return;
	}
	struct wire_frame out = *f;
	out.length_payload = len;
	if (payload)
		memcpy(payload, data, len);
	(void)link_send(c->link, &out, payload, NULL, NULL);
}

/* The answer that something did not work. Its payload, into buf. */
static struct wire_frame error_frame(enum wire_type asked, uint64_t token, uint64_t off, uint64_t len, int code,
				     const char *text, uint8_t buf[ERROR_SIZE])
{
	struct wire_refuse x = {.code = (uint16_t)(code < 0 ? -code : code)};
	struct wire_frame f = {.type = WIRE_DONE, .flags = WIRE_DONE_ERROR, .seq = token};
	if (asked == WIRE_VOLUME_READ) {
		f.type = WIRE_VOLUME_DATA;
		f.flags = WIRE_READ_ERROR;
		f.offset = off;
		f.length = len;
	}
	(void)snprintf(x.text, sizeof(x.text), "%s", text);
	int n = wire_refuse_encode(&x, buf, ERROR_SIZE);
	INVARIANT(n > 0);
	f.length_payload = (uint32_t)n;
	return f;
}

/* ---- the report ---- */

static json_t *volume_json(const struct wire_report_volume *v)
{
	char uuid[UUID_TEXT_SIZE];
	uuid_format(v->uuid, uuid);
	return json_pack("{s:s, s:s, s:s, s:I, s:I, s:s, s:s}", "name", v->name, "group", v->group, "uuid", uuid, "id",
			 (json_int_t)v->id, "size", (json_int_t)v->size, "role", role_name(v->role), "state",
			 state_name(v->state));
}

struct report {
	struct wire_report_volume *v;
	uint32_t n;
};

static int report_make(struct daemon *d, struct report *ret)
{
	uint32_t room = 0;
	*ret = (struct report){0};
	pthread_rwlock_rdlock(&d->names);
	for (struct gvol *x = d->gvols; x; x = x->next)
		room++;
	struct wire_report_volume *v = calloc(room ? room : 1, sizeof(*v));
	for (struct gvol *x = d->gvols; v && x; x = x->next) {
		struct group *g = x->g;
		mutex_lock(&g->lock);
		const struct repl_meta *m = repl_meta(g->core);
		const struct repl_volume *rv = &m->volumes[x->index];
		struct wire_report_volume *w = &v[ret->n++];
		w->id = rv->id;
		w->size = rv->size;
		w->role = m->role;
		w->state = m->state;
		memcpy(w->name, rv->name, sizeof(w->name));
		memcpy(w->group, m->group, sizeof(w->group));
		memcpy(w->uuid, rv->uuid, sizeof(w->uuid));
		mutex_unlock(&g->lock);
	}
	pthread_rwlock_unlock(&d->names);
	ret->v = v;
	return v ? 0 : -ERR_NOMEM;
}

static void request_sent(void *arg);

/* In frames of at most WIRE_REPORT_MAX, the last one marked; under daemon.lock, so that no other report's frames come
 * between. q: what asked for it, over when it has left; NULL: nothing. */
static void report_send_locked(struct conn *c, const struct report *r, struct hub_request *q)
{
	uint32_t at = 0;
	bool last;
	do {
		uint32_t n = r->n - at < WIRE_REPORT_MAX ? r->n - at : WIRE_REPORT_MAX;
		size_t room = 4 + n * (size_t)(WIRE_REPORT_ENCODED_MAX / WIRE_REPORT_MAX + 1);
		uint8_t *buf = malloc(room);
		int len = buf ? wire_report_encode(r->v + at, n, buf, room) : -ERR_NOMEM;
		at += n;
		last = len < 0 || at == r->n;
		struct wire_frame f = {.type = WIRE_REPORT, .seq = q ? q->token : 0};
		f.flags = (uint16_t)(last ? WIRE_REPORT_LAST : 0U);
		f.length_payload = len < 0 ? 0 : (uint32_t)len;
		if (len < 0)
			link_close(c->link, 0);
		if (last && q) {
			q->payload = buf;
			(void)link_send(c->link, &f, buf, request_sent, q);
		} else if (len < 0) {
			free(buf);
		} else {
			(void)link_send(c->link, &f, buf, NULL, NULL);
		}
	} while (!last);
}

static void report_to(struct conn *c, struct hub_request *q)
{
	struct report r;
	if (report_make(c->d, &r) < 0) {
		link_close(c->link, 0);
		r = (struct report){0};
	}
	mutex_lock(&c->d->lock);
	c->up = true;
	report_send_locked(c, &r, q);
	mutex_unlock(&c->d->lock);
	free(r.v);
}

void hub_conn_up(struct conn *c)
{
	report_to(c, NULL);
}

void hub_volumes_changed(struct daemon *d)
{
	atomic_store(&d->hub.changed, true);
}

/* To all, when something is not as it was told last. */
static void report_again(struct daemon *d)
{
	struct report r;
	if (!atomic_exchange(&d->hub.changed, false))
		return;
	if (report_make(d, &r) < 0) {
		hub_volumes_changed(d);
		return;
	}
	uint64_t hash = XXH3_64bits(r.v, r.n * sizeof(*r.v)); /* zero-filled, no pointers */
	if (hash != d->hub.reported) {
		d->hub.reported = hash;
		mutex_lock(&d->lock);
		for (struct conn *c = d->conns; c; c = c->next)
			if (c->up)
				report_send_locked(c, &r, NULL);
		mutex_unlock(&d->lock);
	}
	free(r.v);
}

/* ---- requests: their end ---- */

static void request_free(struct hub_request *q)
{
	if (q->c)
		daemon_conn_put(q->c);
	gvol_unref(q->v);
	group_unref(q->g);
	free(q->payload);
	free(q->start);
	free(q);
}

/* Nothing works on it any more, and its answer has left: it goes, unless a verb's thread looks at it. */
static void request_over(struct hub_request *q)
{
	struct hub *h = &q->d->hub;
	bool listed = q->listed;
	mutex_lock(&h->lock);
	q->done = true;
	bool waited = q->waited;
	if (q->c)
		atomic_fetch_sub(&q->c->asked, 1);
	for (struct hub_request **p = &h->requests; *p; p = &(*p)->next)
		if (*p == q) {
			*p = q->next;
			break;
		}
	mutex_unlock(&h->lock);
	/* Its references go before the count says that it is gone: the daemon may end after that. */
	if (!waited)
		request_free(q);
	if (!listed)
		return;
	mutex_lock(&h->lock);
	h->n_requests--;
	cond_broadcast(&h->cond);
	mutex_unlock(&h->lock);
}

static void request_sent(void *arg)
{
	request_over(arg);
}

/* The bytes, and the request's place, stay until they have left. */
static void request_answer(struct hub_request *q)
{
	struct wire_frame f = {.type = WIRE_DONE, .seq = q->token};
	void *bytes = NULL;
	if (q->error) {
		f = error_frame(q->type, q->token, q->off, q->len, q->error, q->e.text, q->why);
		bytes = q->why;
	} else if (q->type == WIRE_VOLUME_READ) {
		f.type = WIRE_VOLUME_DATA;
		f.offset = q->off;
		f.length = q->len;
		bool zero = q->data[0] == 0 && memcmp(q->data, q->data + 1, q->len - 1) == 0;
		f.flags = (uint16_t)(zero ? WIRE_READ_ZERO : 0U);
		f.length_payload = zero ? 0 : (uint32_t)q->len;
		bytes = zero ? NULL : q->data;
	}
	/* It may have left, and the request be gone with its reference, before link_send has returned. */
	struct conn *c = conn_ref(q->c);
	(void)link_send(c->link, &f, bytes, request_sent, q);
	daemon_conn_put(c);
}

/* Why a request on this volume failed, for a person. */
static void request_explain(struct hub_request *q)
{
	if (q->error == 0 || q->e.text[0])
		return;
	mutex_lock(&q->g->lock);
	const struct repl_meta *m = repl_meta(q->g->core);
	unsigned role = m->role, state = m->state;
	mutex_unlock(&q->g->lock);
	(void)err_set(&q->e, -q->error, "volume %s (%s in %s): %s", q->name, role_name(role), state_name(state),
		      err_short(q->error));
}

static void request_finish(struct pool_job *job)
{
	struct hub_request *q = CONTAINER_OF(job, struct hub_request, job);
	struct daemon *d = q->d;
	/* What a reader of the mount holds in the kernel's cache is old now, also after a write that failed midway. */
	if (q->type == WIRE_VOLUME_WRITE && q->v && q->len && gvol_cached_opens(q->v) && d->cfg.hooks.invalidate)
		d->cfg.hooks.invalidate(d->cfg.hooks.arg, gvol_id(q->v));
	if (q->g)
		request_explain(q);
	/* A peer may take its time to read the answer: nothing here waits for it. */
	gvol_unref(q->v);
	group_unref(q->g);
	q->v = NULL;
	q->g = NULL;
	mutex_lock(&d->hub.lock);
	bool late = q->answered;
	q->answered = true;
	mutex_unlock(&d->hub.lock);
	if (late || q->c == NULL)
		request_over(q);
	else
		request_answer(q);
}

static void request_end(struct hub_request *q, int error)
{
	q->error = error;
	q->job.fn = request_finish;
	pool_submit(q->d->hub.pool, &q->job);
}

static void request_io_done(struct gio *gio, int error)
{
	struct hub_request *q = gio->user;
	if (error == 0 && gio->kind == REPL_WRITE && (q->flags & WIRE_VOLUME_FLUSH)) {
		gio->kind = REPL_FLUSH;
		gvol_submit(gio);
		return;
	}
	request_end(q, error);
}

/* ---- requests: carrying out ---- */

/* Finds the volume, and who may. */
static int request_admit(struct hub_request *q)
{
	struct gvol *v = gvol_find(q->d, q->name);
	struct group *g = v ? gvol_group(v) : NULL;
	q->v = v;
	q->g = g;
	if (g == NULL)
		return err_set(&q->e, ERR_NOENT, "there is no volume %s on that host", q->name);
	if (q->c && atomic_load(&q->c->g) && atomic_load(&q->c->g) != g)
		return err_set(&q->e, ERR_PERM, "volume %s is not one of the group that this connection carries",
			       q->name);
	if (q->c && !daemon_peer_may(q->c, g->name))
		return err_set(&q->e, ERR_PERM, "that host does not accept this peer for group %s", g->name);
	uint64_t size = volume_size(v->vol);
	if (q->off > size || q->len > size - q->off)
		return err_set(&q->e, ERR_RANGE,
			       "%" PRIu64 " bytes at %" PRIu64 " reach behind the end of volume %s (%" PRIu64 " bytes)",
			       q->len, q->off, q->name, size);
	return 0;
}

static void request_io(struct hub_request *q)
{
	q->gio = (struct gio){.v = q->v, .off = q->off, .len = q->len, .done = request_io_done, .user = q};
	if (q->type == WIRE_VOLUME_READ) {
		if (q->payload == NULL)
			q->payload = q->data = malloc(q->len);
		if (q->payload == NULL) {
			request_end(q, -ERR_NOMEM);
			return;
		}
		/* As a guest's: past the core, but where that has to wait, for the peer or for who this host is. Then
		 * it holds no thread meanwhile. */
		if (!atomic_load(&q->g->holding) && !gvol_detached(q->v)) {
			request_end(q, gvol_read(q->v, NULL, GVOL_VOLUME, 0, q->off, q->len, q->data));
			return;
		}
		q->gio.kind = REPL_READ;
		q->gio.into = q->data;
	} else {
		q->gio.kind = q->len ? REPL_WRITE : REPL_FLUSH;
		q->gio.data = q->data;
	}
	gvol_submit(&q->gio);
}

static int start_protect(struct hub_request *q)
{
	const struct wire_start *x = q->start;
	struct gvol *v = gvol_find(q->d, x->volumes[0].name);
	q->g = v ? gvol_group(v) : NULL;
	gvol_unref(v);
	if (q->g == NULL)
		return err_set(&q->e, ERR_NOENT, "there is no volume %s on that host", x->volumes[0].name);
	if (!daemon_peer_may(q->c, q->g->name))
		return err_set(&q->e, ERR_PERM, "that host does not accept this peer for group %s", q->g->name);
	if (!daemon_addr_allowed(q->d, x->peer, &q->e))
		return -q->e.code;
	uint32_t flags = (q->flags & WIRE_START_ADOPT ? (uint32_t)WIRE_JOIN_ADOPT : 0U) |
			 (q->flags & WIRE_START_HASH ? PROTECT_HASH : 0U);
	log_info(q->g->name, "the hub at %s starts its protection, to %s", link_peer_name(q->c->link), x->peer);
	return hub_protect(q->g, x, flags, NULL, clock_mono_ns() + HUB_START_NS, &q->e);
}

static void request_run(struct pool_job *job)
{
	struct hub_request *q = CONTAINER_OF(job, struct hub_request, job);
	if (q->type == WIRE_START_PROTECT) {
		request_end(q, start_protect(q));
		return;
	}
	int err = request_admit(q);
	if (err) {
		request_end(q, err);
		return;
	}
	mutex_lock(&q->g->lock);
	uint64_t timeout = repl_meta(q->g->core)->settings.peer_timeout_ms * NS_PER_MS;
	mutex_unlock(&q->g->lock);
	mutex_lock(&q->d->hub.lock);
	q->answer_ns = 2 * timeout;
	mutex_unlock(&q->d->hub.lock);
	request_io(q);
}

/* Takes it in; refused: it is still the caller's. */
static int request_begin(struct hub_request *q, struct err *e)
{
	struct daemon *d = q->d;
	struct hub *h = &d->hub;
	int err = 0;
	unsigned starts = 0;
	q->begun_ns = clock_mono_ns();
	q->answer_ns = q->type == WIRE_START_PROTECT ? 0 : HUB_ANSWER_NS;
	mutex_lock(&h->lock);
	for (const struct hub_request *x = h->requests; x; x = x->next)
		starts += x->type == WIRE_START_PROTECT;
	if (atomic_load(&d->ending))
		err = err_set(e, ERR_CANCELED, "repfs is ending on that host");
	else if (h->n_requests >= HUB_REQUESTS_ALL_MAX || (q->c && atomic_load(&q->c->asked) > HUB_REQUESTS_LAX))
		err = err_set(e, ERR_BUSY,
			      "more requests at once than %u on a connection, or %u of all; wait for an answer first",
			      HUB_REQUESTS_MAX, HUB_REQUESTS_ALL_MAX);
	else if (q->type == WIRE_START_PROTECT && starts >= HUB_STARTS_MAX)
		err = err_set(e, ERR_BUSY, "%u protections are being started already; wait for an answer first",
			      HUB_STARTS_MAX);
	else if (h->pool == NULL && pool_create(HUB_THREADS, "hub", &h->pool) < 0)
		err = err_set(e, ERR_NOMEM, "no threads for the requests of hubs");
	if (!err) {
		q->next = h->requests;
		h->requests = q;
		h->n_requests++;
		q->listed = true;
	}
	mutex_unlock(&h->lock);
	if (!err) {
		q->job.fn = request_run;
		pool_submit(h->pool, &q->job);
	}
	return err;
}

static struct hub_request *request_new(struct daemon *d, enum wire_type type)
{
	struct hub_request *q = calloc(1, sizeof(*q));
	if (q) {
		q->d = d;
		q->type = type;
	}
	return q;
}

/* ---- frames ---- */

bool hub_is(unsigned type)
{
	return type >= WIRE_REPORT_WANT && type <= WIRE_DONE;
}

static int broken(const struct conn *c, const char *what)
{
	log_warn("", "%s broke the protocol: %s", link_peer_name(c->link), what);
	return -ERR_PROTO;
}

/* A request of the peer's: what it holds counts until its answer has left, whatever that is. NULL: too many. */
static struct hub_request *asked_for(struct conn *c, const struct wire_frame *f)
{
	struct hub_request *q = request_new(c->d, (enum wire_type)f->type);
	if (q == NULL)
		return NULL;
	if (atomic_load(&c->asked) >= HUB_ASKED_MAX) {
		free(q);
		return NULL;
	}
	atomic_fetch_add(&c->asked, 1);
	q->token = f->seq;
	q->flags = f->flags;
	q->off = f->offset;
	q->len = f->length;
	q->c = conn_ref(c);
	return q;
}

/* Takes payload. */
static int asked(struct conn *c, const struct wire_frame *f, void *payload)
{
	struct err e = {0};
	struct hub_request *q = asked_for(c, f);
	if (q == NULL) {
		free(payload);
		return broken(c, "it asks on and does not read the answers");
	}
	if (f->type == WIRE_REPORT_WANT) {
		report_to(c, q);
		return 0;
	}
	int err = 0;
	if (f->type == WIRE_START_PROTECT) {
		q->start = malloc(sizeof(*q->start));
		err = q->start ? wire_start_decode(q->start, payload, f->length_payload, &e) : -ERR_NOMEM;
	} else {
		size_t at = 0;
		err = wire_volume_decode(q->name, &at, payload, f->length_payload,
					 f->type == WIRE_VOLUME_WRITE ? f->length : 0, &e);
		if (f->type == WIRE_VOLUME_WRITE) {
			q->payload = payload;
			q->data = (uint8_t *)payload + at;
			payload = NULL;
		}
	}
	free(payload);
	if (err) {
		request_over(q);
		return broken(c, e.text);
	}
	err = request_begin(q, &e);
	if (err) { /* else it is the pool's, and perhaps gone already */
		q->error = err;
		q->e = e;
		request_answer(q);
	}
	return 0;
}

static void call_unlink_locked(struct hub *h, struct hub_call *x)
{
	for (struct hub_call **p = &h->calls; *p; p = &(*p)->next)
		if (*p == x) {
			*p = x->next;
			return;
		}
}

static void call_free(struct hub_call *x)
{
	daemon_conn_put(x->c);
	json_decref(x->volumes);
	free(x->data);
	free(x);
}

static struct hub_call *call_find_locked(struct hub *h, const struct conn *c, uint64_t token)
{
	for (struct hub_call *x = h->calls; x; x = x->next)
		if (x->c == c && x->token == token && !x->done)
			return x;
	return NULL;
}

/* It has its answer. Returns the call if nobody waits for it any more: the caller frees it. */
static struct hub_call *call_done_locked(struct hub *h, struct hub_call *x, int error)
{
	x->done = true;
	x->error = error;
	call_unlink_locked(h, x);
	cond_broadcast(&h->cond);
	return x->abandoned ? x : NULL;
}

/* VOLUME_DATA, DONE. Takes payload. */
static int answered(struct conn *c, const struct wire_frame *f, void *payload)
{
	struct hub *h = &c->d->hub;
	bool data = f->type == WIRE_VOLUME_DATA;
	bool error = (f->flags & (data ? (unsigned)WIRE_READ_ERROR : (unsigned)WIRE_DONE_ERROR)) != 0;
	struct wire_refuse why = {0};
	struct err e = {0};
	if (error && wire_refuse_decode(&why, payload, f->length_payload, &e) < 0) {
		free(payload);
		return broken(c, e.text);
	}
	mutex_lock(&h->lock);
	struct hub_call *x = call_find_locked(h, c, f->seq), *gone = NULL;
	bool fits = x && (data ? x->type == WIRE_VOLUME_READ && x->off == f->offset && x->len == f->length
			       : x->type == WIRE_VOLUME_WRITE);
	if (fits) {
		x->why = why;
		if (data && !error) {
			x->data = payload;
			payload = NULL;
		}
		gone = call_done_locked(h, x, error ? -(int)why.code : 0);
	}
	mutex_unlock(&h->lock);
	if (gone)
		call_free(gone);
	free(payload);
	return fits ? 0 : broken(c, "an answer to what was not asked");
}

int hub_frame(struct conn *c, const struct wire_frame *f, void *payload)
{
	/* A connection that carries no group yet, and whose dialer asks for this, carries none. */
	if (atomic_load(&c->g) == NULL && !atomic_load(&c->host)) {
		mutex_lock(&c->d->lock);
		c->since_ns = 0;
		mutex_unlock(&c->d->lock);
		atomic_store(&c->host, true);
		log_debug("", "%s (%s) asks as a hub", link_peer_name(c->link), link_peer(c->link)->program);
	}
	switch (f->type) {
	case WIRE_START_PROTECT:
		if (!atomic_load(&c->host)) {
			free(payload);
			return broken(c, "START_PROTECT on a connection that carries a group");
		}
		/* fall through */
	case WIRE_REPORT_WANT:
	case WIRE_VOLUME_READ:
	case WIRE_VOLUME_WRITE:
		return asked(c, f, payload);
	default:
		return answered(c, f, payload);
	}
}

/* Whatever else comes on a host-wide connection. */
int hub_host_frame(struct conn *c, const struct wire_frame *f, void *payload)
{
	free(payload);
	if (link_queued(c->link) > HUB_QUEUED_MAX)
		return broken(c, "it sends on and does not read the answers");
	switch (f->type) {
	case WIRE_PING: {
		struct wire_frame pong = {.type = WIRE_PONG, .offset = f->offset};
		(void)link_send(c->link, &pong, NULL, NULL, NULL);
		return 0;
	}
	case WIRE_PONG:
		return 0;
	case WIRE_GOODBYE:
	case WIRE_REFUSE:
		link_close(c->link, 0);
		return 0;
	default:
		return broken(c, "a message of a group on a connection that carries none");
	}
}

/* A REPORT: of no use but to a call that asked for it. Looked at all the same, for what does not decode ends the
 * connection. */
int hub_report_frame(struct conn *c, const struct wire_frame *f, const void *payload)
{
	struct err e = {0};
	struct wire_report_volume *v = calloc(WIRE_REPORT_MAX, sizeof(*v));
	if (v == NULL)
		return -ERR_NOMEM;
	int n = wire_report_decode(v, WIRE_REPORT_MAX, payload, f->length_payload, &e);
	struct hub *h = &c->d->hub;
	struct hub_call *gone = NULL;
	if (n < 0) {
		log_warn("", "the report of %s does not decode: %s", link_peer_name(c->link), e.text);
	} else if (f->seq) {
		mutex_lock(&h->lock);
		struct hub_call *x = call_find_locked(h, c, f->seq);
		if (x == NULL || x->type != WIRE_REPORT_WANT || x->n_volumes + (unsigned)n > HUB_VOLUMES_MAX) {
			n = -ERR_PROTO;
		} else {
			x->n_volumes += (unsigned)n;
			for (int i = 0; i < n; i++)
				json_array_append_new(x->volumes, volume_json(&v[i]));
			if (f->flags & WIRE_REPORT_LAST)
				gone = call_done_locked(h, x, 0);
		}
		mutex_unlock(&h->lock);
		if (n < 0)
			(void)broken(c, "a report that was not asked for, or of too many volumes");
	}
	if (gone)
		call_free(gone);
	free(v);
	return n < 0 ? n : 0;
}

void hub_conn_down(struct conn *c)
{
	struct hub *h = &c->d->hub;
	struct hub_call *gone = NULL;
	mutex_lock(&h->lock);
	for (struct hub_call **p = &h->calls; *p;) {
		struct hub_call *x = *p;
		if (x->c != c) {
			p = &x->next;
			continue;
		}
		*p = x->next;
		x->done = true;
		x->error = -ERR_PEER;
		(void)snprintf(x->why.text, sizeof(x->why.text), "the connection to the peer ended");
		if (x->abandoned) {
			x->next = gone;
			gone = x;
		}
	}
	cond_broadcast(&h->cond);
	mutex_unlock(&h->lock);
	while (gone) {
		struct hub_call *next = gone->next;
		call_free(gone);
		gone = next;
	}
}

/* ---- the clock ---- */

/* Answers, with a time-out, those that wait for too long. One at a time, as sending is done without the lock. */
static void requests_expire(struct daemon *d)
{
	struct hub *h = &d->hub;
	uint64_t now = clock_mono_ns();
	for (;;) {
		struct hub_request *q;
		mutex_lock(&h->lock);
		for (q = h->requests; q; q = q->next)
			if (q->c && !q->answered && q->answer_ns && now - q->begun_ns > q->answer_ns)
				break;
		if (q == NULL) {
			mutex_unlock(&h->lock);
			return;
		}
		q->answered = true;
		struct conn *c = conn_ref(q->c);
		enum wire_type type = q->type;
		uint64_t token = q->token, off = q->off, len = q->len;
		mutex_unlock(&h->lock);
		uint8_t buf[ERROR_SIZE];
		struct wire_frame f = error_frame(type, token, off, len, ERR_TIMEOUT,
						  "it has not ended within twice peer_timeout; it goes on", buf);
		send_copy(c, &f, buf, f.length_payload);
		daemon_conn_put(c);
	}
}

/* Counted in ticks, so that a host that was suspended does not take its own absence for the hub's. */
static void host_conns_tick(struct daemon *d)
{
	const struct wire_frame ping = {.type = WIRE_PING};
	mutex_lock(&d->lock);
	for (struct conn *c = d->conns; c; c = c->next) {
		if (!atomic_load(&c->host))
			continue;
		uint64_t heard = link_heard_ns(c->link);
		c->silent_ticks = heard == c->heard_ns ? c->silent_ticks + 1 : 0;
		c->heard_ns = heard;
		c->ticks++;
		if (c->silent_ticks * (TICK_NS / NS_PER_MS) >= HUB_SILENT_MS)
			link_close(c->link, 0);
		else if (c->ticks * (TICK_NS / NS_PER_MS) % HUB_PING_MS == 0)
			(void)link_send(c->link, &ping, NULL, NULL, NULL);
	}
	mutex_unlock(&d->lock);
}

void hub_tick(struct daemon *d)
{
	report_again(d);
	requests_expire(d);
	host_conns_tick(d);
}

/* ---- life ---- */

void hub_shutdown(struct daemon *d)
{
	const struct wire_frame bye = {.type = WIRE_GOODBYE, .offset = WIRE_BYE_SHUTDOWN};
	mutex_lock(&d->lock);
	for (struct conn *c = d->conns; c; c = c->next)
		if (atomic_load(&c->host)) {
			(void)link_send(c->link, &bye, NULL, NULL, NULL);
			link_close(c->link, CLOSE_DRAIN_MS);
		}
	mutex_unlock(&d->lock);
}

bool hub_wait_quiet(struct daemon *d, uint64_t deadline_ns)
{
	struct hub *h = &d->hub;
	bool in_time = true;
	mutex_lock(&h->lock);
	while (h->n_requests && in_time)
		in_time = cond_wait_until(&h->cond, &h->lock, deadline_ns);
	bool quiet = h->n_requests == 0;
	mutex_unlock(&h->lock);
	return quiet;
}

/* ---- for the verbs: this host's volumes ---- */

static int no_memory(const struct call *c)
{
	return err_set(c->e, ERR_NOMEM, "out of memory");
}

/* deadline: the client's, 0: none; limit: that by which there is an answer, or there will be none. */
static int give_up(const struct call *c, uint64_t deadline, uint64_t limit)
{
	uint64_t now = clock_mono_ns();
	if (deadline && now >= deadline)
		return err_set(c->e, ERR_TIMEOUT, "it has not ended in the time given; it goes on");
	if (now >= limit)
		return err_set(c->e, ERR_TIMEOUT, "it has not ended within twice peer_timeout; it goes on");
	if (c->ctl && ctl_canceled(c->ctl))
		return atomic_load(&c->d->ending) ? err_set(c->e, ERR_CANCELED, "the daemon is shutting down")
						  : err_set(c->e, ERR_INTR, "interrupted; it goes on");
	return 0;
}

static int request_wait(const struct call *c, struct hub_request *q, void **ret)
{
	struct hub *h = &c->d->hub;
	uint64_t deadline = verb_deadline(c);
	int err = 0;
	mutex_lock(&h->lock);
	while (!q->done && !err) {
		(void)cond_wait_until(&h->cond, &h->lock, clock_mono_ns() + 200 * NS_PER_MS);
		err = q->done ? 0 : give_up(c, deadline, q->begun_ns + q->answer_ns);
	}
	bool done = q->done;
	q->waited = false;
	mutex_unlock(&h->lock);
	if (!done)
		return err;
	err = q->error;
	if (err)
		*c->e = q->e;
	else if (ret) {
		*ret = q->payload;
		q->payload = NULL;
	}
	request_free(q);
	return err;
}

static int request_local(const struct call *c, struct hub_request *q, const char *name, uint64_t off, uint64_t len,
			 void **ret)
{
	(void)snprintf(q->name, sizeof(q->name), "%s", name);
	q->off = off;
	q->len = len;
	q->waited = true;
	int err = request_begin(q, c->e);
	if (err) {
		request_free(q);
		return err;
	}
	return request_wait(c, q, ret);
}

/* ---- for the verbs: the peer's ---- */

/* Whether the peer may be asked on it: one that was dialled for a group, and asks before it has named that, would count
 * as a hub's, and its JOIN as a violation. */
static bool may_ask(const struct conn *c)
{
	return !c->dialled || atomic_load(&c->joined);
}

/* The connection that the volume's group has, a reference; and how long an answer may take. */
static int peer_conn(const struct call *c, const char *name, struct conn **ret, uint64_t *ret_limit_ns)
{
	struct gvol *v = gvol_find(c->d, name);
	struct group *g = v ? gvol_group(v) : NULL;
	gvol_unref(v);
	if (g == NULL)
		return err_set(c->e, ERR_NOENT, "no such volume; `list` shows them");
	mutex_lock(&g->lock);
	bool alone = repl_meta(g->core)->role == ROLE_STANDALONE && !repl_meta(g->core)->has_peer;
	*ret_limit_ns = 2 * repl_meta(g->core)->settings.peer_timeout_ms * NS_PER_MS + HUB_CALL_NS;
	struct conn *conn =
	    g->conn && g->conn->session && !g->conn->closed && may_ask(g->conn) ? conn_ref(g->conn) : NULL;
	mutex_unlock(&g->lock);
	group_unref(g);
	if (conn == NULL && alone)
		return err_set(c->e, ERR_STATE, "it is standalone: it has no peer");
	if (conn == NULL)
		return err_set(c->e, ERR_PEER, "the peer is not connected; see `status`");
	*ret = conn;
	return 0;
}

/* Takes conn's reference. */
static int call_new(const struct call *c, struct conn *conn, const struct hub_call *like, struct hub_call **ret)
{
	struct hub *h = &c->d->hub;
	struct hub_call *x = malloc(sizeof(*x));
	unsigned n = 0;
	if (x == NULL) {
		daemon_conn_put(conn);
		return no_memory(c);
	}
	*x = *like;
	x->c = conn;
	x->limit_ns += clock_mono_ns();
	x->volumes = x->type == WIRE_REPORT_WANT ? json_array() : NULL;
	mutex_lock(&h->lock);
	for (const struct hub_call *o = h->calls; o; o = o->next)
		n++;
	if (n < HUB_CALLS_MAX) {
		x->token = ++h->tokens;
		x->next = h->calls;
		h->calls = x;
	}
	mutex_unlock(&h->lock);
	if (n >= HUB_CALLS_MAX) {
		call_free(x);
		return err_set(c->e, ERR_BUSY, "%u questions to peers have no answer yet", HUB_CALLS_MAX);
	}
	*ret = x;
	return 0;
}

/* Until the answer has come, the connection has ended, or the caller has waited for long enough. Frees the call, or
 * leaves it to whom its answer comes to. ret_data, ret_volumes: one of them, owned. */
static int call_wait(const struct call *c, struct hub_call *x, void **ret_data, json_t **ret_volumes)
{
	struct hub *h = &c->d->hub;
	uint64_t deadline = verb_deadline(c);
	int err = 0;
	mutex_lock(&h->lock);
	while (!x->done && !err) {
		(void)cond_wait_until(&h->cond, &h->lock, clock_mono_ns() + 200 * NS_PER_MS);
		err = x->done ? 0 : give_up(c, deadline, x->limit_ns);
	}
	x->abandoned = !x->done;
	bool done = x->done;
	mutex_unlock(&h->lock);
	if (!done)
		return err;
	if (x->error)
		err = err_set(c->e, -x->error, "the peer: %s", x->why.text);
	else if (ret_data) {
		*ret_data = x->data;
		x->data = NULL;
	} else if (ret_volumes) {
		*ret_volumes = x->volumes;
		x->volumes = NULL;
	}
	call_free(x);
	return err;
}

/* VOLUME_READ, VOLUME_WRITE on the peer. */
static int remote_io(const struct call *c, enum wire_type type, const char *name, uint64_t off, uint64_t len,
		     const void *data, uint16_t flags, void **ret)
{
	struct hub_call like = {.type = type, .off = off, .len = len}, *x = NULL;
	struct conn *conn = NULL;
	size_t more = type == WIRE_VOLUME_WRITE ? len : 0;
	uint8_t *payload = malloc(WIRE_VOLUME_NAME_MAX + more);
	int n = payload ? wire_volume_encode(name, payload, WIRE_VOLUME_NAME_MAX) : no_memory(c);
	int err = n < 0 ? n : peer_conn(c, name, &conn, &like.limit_ns);
	err = err ? err : call_new(c, conn, &like, &x);
	if (err) {
		free(payload);
		return err;
	}
	if (more)
		memcpy(payload + n, data, more);
	struct wire_frame f = {.type = (uint16_t)type,
			       .flags = flags,
			       .seq = x->token,
			       .offset = off,
			       .length = len,
			       .length_payload = (uint32_t)n + (uint32_t)more};
	/* Its `down` may have come before the call was in the list. */
	if (link_send(conn->link, &f, payload, NULL, NULL) < 0)
		hub_conn_down(conn);
	return call_wait(c, x, ret, NULL);
}

int hub_read(const struct call *c, const char *name, bool remote, uint64_t off, uint64_t len, void **ret)
{
	PRE(len > 0 && len <= WIRE_RANGE_MAX);
	if (off > VOLUME_SIZE_MAX - len)
		return err_set(c->e, ERR_RANGE, "no volume reaches that far");
	if (remote)
		return remote_io(c, WIRE_VOLUME_READ, name, off, len, NULL, 0, ret);
	struct hub_request *q = request_new(c->d, WIRE_VOLUME_READ);
	return q ? request_local(c, q, name, off, len, ret) : no_memory(c);
}

int hub_write(const struct call *c, const char *name, bool remote, uint64_t off, uint64_t len, const void *data,
	      bool flush)
{
	PRE(len <= WIRE_RANGE_MAX && (len || flush));
	if (off > VOLUME_SIZE_MAX - len)
		return err_set(c->e, ERR_RANGE, "no volume reaches that far");
	uint16_t flags = flush ? WIRE_VOLUME_FLUSH : 0;
	if (remote)
		return remote_io(c, WIRE_VOLUME_WRITE, name, off, len, data, flags, NULL);
	struct hub_request *q = request_new(c->d, WIRE_VOLUME_WRITE);
	if (q == NULL)
		return no_memory(c);
	q->flags = flags;
	q->payload = q->data = malloc(len ? len : 1);
	if (q->payload == NULL) {
		request_free(q);
		return no_memory(c);
	}
	if (len)
		memcpy(q->data, data, len);
	return request_local(c, q, name, off, len, NULL);
}

/* ---- for the verbs: report ---- */

static int report_local(const struct call *c, json_t **ret)
{
	struct report r;
	char store[UUID_TEXT_SIZE];
	if (report_make(c->d, &r) < 0)
		return no_memory(c);
	json_t *a = json_array();
	for (uint32_t i = 0; i < r.n; i++)
		json_array_append_new(a, volume_json(&r.v[i]));
	free(r.v);
	uuid_format(store_info(c->d->store)->uuid, store);
	*ret = json_pack("{s:s, s:o}", "store", store, "volumes", a);
	return 0;
}

/* One connection of each host that is a peer of this one. Returns how many, each a reference. */
static unsigned peers(struct daemon *d, struct conn *ret[STORE_GROUPS_MAX])
{
	unsigned n = 0;
	mutex_lock(&d->lock);
	for (struct conn *c = d->conns; c && n < STORE_GROUPS_MAX; c = c->next) {
		bool known = !c->up || atomic_load(&c->g) == NULL || !may_ask(c);
		for (unsigned i = 0; i < n && !known; i++)
			known = memcmp(link_peer(ret[i]->link)->store, link_peer(c->link)->store, 16) == 0;
		if (!known)
			ret[n++] = conn_ref(c);
	}
	mutex_unlock(&d->lock);
	return n;
}

static int report_peer(const struct call *c, struct conn *conn, json_t *all)
{
	char store[UUID_TEXT_SIZE];
	uuid_format(link_peer(conn->link)->store, store);
	json_t *one = json_pack("{s:s, s:s, s:s}", "address", link_peer_name(conn->link), "store", store, "program",
				link_peer(conn->link)->program);
	struct hub_call like = {.type = WIRE_REPORT_WANT, .limit_ns = HUB_CALL_NS}, *x = NULL;
	json_t *volumes = NULL;
	int err = call_new(c, conn, &like, &x);
	if (err) {
		json_decref(one);
		return err;
	}
	struct wire_frame f = {.type = WIRE_REPORT_WANT, .seq = x->token};
	if (link_send(conn->link, &f, NULL, NULL, NULL) < 0)
		hub_conn_down(conn);
	err = call_wait(c, x, NULL, &volumes);
	if (err) {
		json_decref(one);
		return err;
	}
	json_object_set_new(one, "volumes", volumes);
	json_array_append_new(all, one);
	return 0;
}

int hub_report(const struct call *c, bool remote, json_t **ret)
{
	struct conn *all[STORE_GROUPS_MAX];
	if (!remote)
		return report_local(c, ret);
	unsigned n = peers(c->d, all);
	json_t *a = json_array();
	int err = n ? 0 : err_set(c->e, ERR_PEER, "no peer is connected; see `status`");
	for (unsigned i = 0; i < n; i++) {
		if (err)
			daemon_conn_put(all[i]);
		else
			err = report_peer(c, all[i], a);
	}
	if (err)
		json_decref(a);
	else
		*ret = json_pack("{s:o}", "peers", a);
	return err;
}

/* ---- the start of a protection ---- */

static int set_ids(struct group *g, const struct wire_start *x, struct ctl_conn *ctl, uint64_t deadline, struct err *e)
{
	struct shell_command *sc = shell_command_new(CMD_IDS);
	if (sc == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	int err = 0;
	bool same = true;
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	for (uint32_t i = 0; i < m->n_volumes; i++)
		sc->c.ids[i] = m->volumes[i].id;
	for (uint32_t k = 0; k < x->n_volumes && !err; k++) {
		int i = repl_meta_find_volume(m, x->volumes[k].name);
		if (i < 0) {
			err = err_set(e, ERR_NOENT, "the group has no volume %s", x->volumes[k].name);
			break;
		}
		same = same && sc->c.ids[i] == x->volumes[k].id;
		sc->c.ids[i] = x->volumes[k].id;
	}
	for (uint32_t i = 0; i < m->n_volumes && !err; i++)
		for (uint32_t k = 0; k < i; k++)
			if (sc->c.ids[i] == sc->c.ids[k])
				err = err_set(e, ERR_USAGE, "two volumes would have the id %u", sc->c.ids[i]);
	mutex_unlock(&g->lock);
	if (!err && !same)
		err = group_command(g, sc, ctl, deadline, e);
	shell_command_unref(sc);
	return err;
}

int hub_protect(struct group *g, const struct wire_start *x, uint32_t flags, struct ctl_conn *ctl, uint64_t deadline_ns,
		struct err *e)
{
	int err = x->n_volumes ? set_ids(g, x, ctl, deadline_ns, e) : 0;
	struct shell_command *sc = err ? NULL : shell_command_new(CMD_PROTECT);
	if (!err && sc == NULL)
		err = err_set(e, ERR_NOMEM, "out of memory");
	if (sc) {
		memcpy(sc->c.text, x->peer, sizeof(sc->c.text));
		sc->c.flags = flags;
		err = group_command(g, sc, ctl, deadline_ns, e);
	}
	shell_command_unref(sc);
	return err;
}
