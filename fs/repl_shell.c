/* Carries out what the replication core asks for: requests on volumes, frames, saves, commands.
 *
 * A step runs under group.lock; what it emits is collected in an outbox. Frames are queued to the link at once, under
 * the lock, so they leave in order; everything else is done after the lock is released. The thread of a guest's request
 * carries out that request's own I/O itself, so that a write in the common case costs no hand-over; everything else
 * goes to the pool.
 *
 * A guest's data is copied once, before the first step, when a session stands: the copy is written locally and then
 * belongs to the link. Without a session it is copied only if the request has to wait.
 *
 * Requests of the peer's stream are written in batches of one volume, so that syncs follow batches (volume_write).
 */
#include "fs/repl_shell.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "core/os/log.h"

enum owner { OWNER_GUEST = 1, OWNER_STREAM };

struct outbox {
	struct repl_list submits, completed;
	struct shell_command *commands, **commands_tail;
	char dial[ADDR_SIZE];
	uint64_t dial_number;
	bool save, wake, apply;
	bool flush_changed;
	bool invalidate; /* before a command is answered, and after requests have gone on */
	struct gio *own; /* the request whose thread runs this step */
};

struct stream_io {
	struct repl_io io;
};

/* A pool job for one of the core's own requests. */
struct own_job {
	struct pool_job job;
	struct group *g;
	struct repl_io *io;
};

static void outbox_init(struct outbox *o)
{
	memset(o, 0, sizeof(*o));
	o->commands_tail = &o->commands;
}

/* The shell's lists. What is submitted is at the same time in a list of the core's. */
static void ios_push(struct repl_list *l, struct repl_io *io)
{
	io->next_shell = NULL;
	if (l->tail)
		l->tail->next_shell = io;
	else
		l->head = io;
	l->tail = io;
	l->count++;
}

static struct repl_io *ios_pop(struct repl_list *l)
{
	struct repl_io *io = l->head;
	if (!io)
		return NULL;
	l->head = io->next_shell;
	if (!l->head)
		l->tail = NULL;
	l->count--;
	io->next_shell = NULL;
	return io;
}

static struct gio *gio_of(struct repl_io *io)
{
	return CONTAINER_OF(io, struct gio, io);
}

/* ---- emitting ---- */

/* The bytes of a READ_REPLY count against what the peer may have in memory here until they are sent. */
struct reply {
	struct group *g;
	uint64_t len;
	void *payload;
};

static void reply_sent(void *arg)
{
	struct reply *y = arg;
	atomic_fetch_sub(&y->g->reply_bytes, y->len); /* who waits for room is woken by group_sent, or the tick */
	free(y->payload);
	free(y);
}

static void send_reply(struct group *g, struct conn *c, const struct wire_frame *f, void *payload)
{
	struct reply *y = malloc(sizeof(*y));
	if (y == NULL) {
		free(payload);
		link_close(c->link, 0);
		return;
	}
	*y = (struct reply){g, f->length_payload, payload};
	atomic_fetch_add(&g->reply_bytes, y->len);
	(void)link_send(c->link, f, payload, reply_sent, y);
}

static bool stream_full(struct group *g)
{
	return g->stream_bytes + atomic_load(&g->reply_bytes) >= STREAM_BYTES_MAX;
}

/* ---- what has changed since the peer's checkpoints (image/changed.h) ---- */

/* A new epoch is brought to its file so soon after the last one was, or when so many are in memory: a crash before that
 * leaves no number to ask for. */
#define CHANGED_FLUSH_NS NS_PER_SEC
#define CHANGED_IN_MEMORY_MAX 16

static bool is_change(const struct gio *gio)
{
	return gio->kind == REPL_WRITE || gio->kind == REPL_ZERO || gio->kind == REPL_DISCARD;
}

/* Before its disk may change, and until the core has done with it: one that is under way at a checkpoint's point may
 * come behind it in the stream. */
static void flight_begin(struct group *g, struct gio *gio) REQUIRES(g->lock)
{
	gio->flight_at = NULL;
	if (!is_change(gio))
		return;
	changed_mark(g->exec.changed[gio->v->index], gio->off, gio->len);
	gio->flight_next = g->flights;
	gio->flight_at = &g->flights;
	if (g->flights)
		g->flights->flight_at = &gio->flight_next;
	g->flights = gio;
}

static void flight_end(struct gio *gio)
{
	if (gio->flight_at == NULL)
		return;
	*gio->flight_at = gio->flight_next;
	if (gio->flight_next)
		gio->flight_next->flight_at = gio->flight_at;
	gio->flight_at = NULL;
}

/* The barrier leaves: what was sent before it is in the checkpoint, what is sent after it is not. Within a step. */
static void changed_point(struct group *g, const struct wire_frame *f)
{
	for (uint32_t i = 0; i < g->n_vols; i++)
		changed_begin(g->exec.changed[i], f->offset, f->length, (f->flags & WIRE_CKPT_PIN) != 0,
			      volume_size(g->vols[i]->vol));
	for (const struct gio *x = g->flights; x; x = x->flight_next)
		changed_mark(g->exec.changed[x->v->index], x->off, x->len);
	g->changed_new = true;
	if (g->n_vols && changed_in_memory(g->exec.changed[0]) > CHANGED_IN_MEMORY_MAX)
		g->out->flush_changed = true;
}

static bool changed_due(struct group *g) REQUIRES(g->lock)
{
	return g->changed_new && clock_mono_ns() - g->changed_flushed_ns >= CHANGED_FLUSH_NS;
}

static void emit_send(struct group *g, const struct repl_action *a)
{
	struct conn *c = g->conn;
	if (c == NULL || c->session == 0)
		return;
	void *payload = NULL;
	if (a->frame.length_payload && a->io) {
		if (a->io->internal || a->io->owner == OWNER_STREAM) {
			payload = TAKE_PTR(a->io->payload);
		} else {
			struct gio *gio = gio_of(a->io);
			if (gio->copy == NULL) { /* the session came while it was under way */
				gio->copy = malloc(gio->len);
				if (gio->copy)
					memcpy(gio->copy, gio->data, gio->len);
			}
			payload = TAKE_PTR(gio->copy);
		}
	} else if (a->frame.length_payload) {
		payload = malloc(a->data_len);
		if (payload)
			memcpy(payload, a->data, a->data_len);
	}
	if (a->frame.length_payload && payload == NULL) {
		link_close(c->link, 0); /* out of memory: the session ends, nothing is lost */
		return;
	}
	if (a->frame.type == WIRE_CHECKPOINT)
		changed_point(g, &a->frame);
	/* Under A and F nobody waits for a write to be sent; a barrier that somebody waits for takes it along. */
	unsigned t = a->frame.type;
	uint64_t p = repl_meta(g->core)->settings.protocol;
	bool lazy = (t == WIRE_WRITE || t == WIRE_ZERO || t == WIRE_DISCARD) && (p == PROTOCOL_A || p == PROTOCOL_F) &&
		    !a->io->strict;
	if (t == WIRE_READ_REPLY && payload) {
		send_reply(g, c, &a->frame, payload);
		return;
	}
	(void)(lazy ? link_send_lazy : link_send)(c->link, &a->frame, payload, NULL, NULL);
	if (t == WIRE_JOIN)
		atomic_store(&c->joined, true);
}

static void group_log(struct group *g, int level, const char *text)
{
	log_line(level == 0 ? LOG_LEVEL_ERROR : level == 1 ? LOG_LEVEL_WARN : LOG_LEVEL_INFO, g->name, "%s", text);
}

/* The peer's bytes, copied under the lock, while the frame's payload is there. */
static void read_answered(struct gio *gio, const struct repl_action *a)
{
	if (a->error)
		return;
	if (a->data)
		memcpy(gio->into, a->data, gio->len);
	else
		memset(gio->into, 0, gio->len);
}

static void emit(void *arg, const struct repl_action *a)
{
	struct group *g = arg;
	struct outbox *o = g->out;
	switch (a->type) {
	case ACT_SUBMIT:
		if (a->io->kind == REPL_REBUILD) {
			a->io->payload = a->data_len ? malloc(a->data_len) : NULL;
			a->io->hole = a->data_len && a->io->payload == NULL; /* out of memory: the job says so */
			if (a->io->payload)
				memcpy(a->io->payload, a->data, a->data_len);
		}
		if (a->io->owner == OWNER_STREAM && repl_exec_is_apply(a->io)) {
			ios_push(&g->apply, a->io);
			o->apply = true;
			return;
		}
		if (a->io->owner == OWNER_GUEST && gio_of(a->io) == o->own) {
			o->own->own = true;
			return;
		}
		ios_push(&o->submits, a->io);
		return;
	case ACT_COMPLETE:
		a->io->error = a->error;
		if (a->io->owner == OWNER_GUEST && a->io->kind == REPL_READ && a->answered)
			read_answered(gio_of(a->io), a);
		if (a->io->owner == OWNER_GUEST)
			flight_end(gio_of(a->io));
		ios_push(&o->completed, a->io);
		return;
	case ACT_SEND:
		emit_send(g, a);
		return;
	case ACT_SAVE_META:
		repl_meta_copy(g->save.meta, a->meta);
		g->save.ckpt = a->ckpt;
		g->save.active_id = a->active_id;
		g->save.drop = a->drop;
		g->save.drop_through = a->drop_through;
		o->save = true;
		return;
	case ACT_DIAL:
		(void)snprintf(o->dial, sizeof(o->dial), "%s", a->text);
		o->dial_number = a->dial;
		return;
	case ACT_CLOSE:
		if (g->conn) {
			g->conn->closed = true; /* its receiver waits for room no longer */
			o->wake = true;
			link_close(g->conn->link, a->drain ? CLOSE_DRAIN_MS : 0);
		}
		return;
	case ACT_CMD_DONE: {
		struct shell_command *c = CONTAINER_OF(a->command, struct shell_command, c);
		c->error = a->error;
		c->next = NULL;
		*o->commands_tail = c;
		o->commands_tail = &c->next;
		return;
	}
	case ACT_LOG:
		group_log(g, a->level, a->text);
		return;
	case ACT_SERVING:
		o->wake = true;
		return;
	case ACT_CHANGED:
		o->invalidate = true;
		return;
	}
}

/* ---- carrying out ---- */

static void step(struct group *g, struct repl_event *ev) REQUIRES(g->lock)
{
	ev->now_ns = clock_mono_ns();
	ev->wall_ns = clock_wall_ns();
	repl_step(g->core, ev);
}

static void lock_with(struct group *g, struct outbox *o) ACQUIRES(g->lock)
{
	mutex_lock(&g->lock);
	g->out = o;
}

static void unlock_with(struct group *g) RELEASES(g->lock)
{
	atomic_store(&g->forwarding, repl_forwarding(g->core));
	atomic_store(&g->holding, repl_holding(g->core));
	atomic_store(&g->detached, repl_detached(g->core));
	g->out = NULL;
	mutex_unlock(&g->lock);
}

static void outbox_run(struct group *g, struct outbox *o);

/* One event from a thread that owns no request. */
static void step_and_run(struct group *g, struct repl_event *ev)
{
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	step(g, ev);
	unlock_with(g);
	outbox_run(g, &o);
}

static void io_done(struct group *g, struct repl_io *io, int error)
{
	struct repl_event ev = {.type = EV_IO_DONE, .io = io, .error = error};
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	bool read = io->internal && io->kind != REPL_REBUILD;
	step(g, &ev);
	if (read) { /* not sent after all: its session had ended. It is not read again before the lock is released. */
		free(io->payload);
		io->payload = NULL;
	}
	unlock_with(g);
	outbox_run(g, &o);
}

static const void *data_of(struct repl_io *io)
{
	if (io->owner != OWNER_GUEST)
		return NULL;
	struct gio *gio = gio_of(io);
	return gio->copy ? gio->copy : gio->data;
}

/* One request's I/O, in the calling thread. */
static int execute(struct group *g, struct repl_io *io)
{
	void *into = io->kind == REPL_READ && io->owner == OWNER_GUEST ? gio_of(io)->into : NULL;
	if (io->kind == REPL_REBUILD && io->hole)
		return -ERR_NOMEM;
	bool active = io->target == TARGET_ACTIVE && io->kind != REPL_FLUSH;
	/* A point in time of several disks (a job's, core/repl_hold.c) lies between guests' writes. One volume's chain
	 * lock does that for it alone. */
	bool point = g->n_vols > 1 && io->target == TARGET_DISK && io->owner == OWNER_GUEST && io->kind <= REPL_DISCARD;
	if (!active && !point)
		return repl_exec_io(&g->exec, io, data_of(io), into, 0);
	pthread_rwlock_rdlock(&g->view);
	int err = repl_exec_io(&g->exec, io, data_of(io), NULL, atomic_load(&g->base));
	pthread_rwlock_unlock(&g->view);
	return err;
}

static void job_ended(struct group *g)
{
	mutex_lock(&g->lock);
	g->jobs--;
	cond_broadcast(&g->cond);
	mutex_unlock(&g->lock);
}

/* ---- flushes share syncs, and so do first writes to clean intent units ---- */

static struct sync_round *round_of(struct group *g, const struct repl_io *io)
{
	if (io->target == TARGET_INTENT) /* in `process` there is no sync to share */
		return store_info(g->d->store)->durability == DURABILITY_POWER ? &g->marks : NULL;
	if (io->kind != REPL_FLUSH || (io->target != TARGET_DISK && io->target != TARGET_ACTIVE))
		return NULL;
	return io->target == TARGET_DISK ? &g->flush : &g->active_flush;
}

static void round_sync(struct group *g, const struct sync_round *s, int errors[static GROUP_VOLUMES_MAX],
		       uint64_t *failed)
{
	if (s == &g->marks) {
		repl_exec_set_intents(&g->exec, s->served.head, errors);
		return;
	}
	int err = s == &g->flush ? repl_exec_sync_disks(&g->exec, failed) : repl_exec_sync_actives(&g->exec);
	for (unsigned i = 0; i < GROUP_VOLUMES_MAX; i++)
		errors[i] = err;
}

/* Serves `io` and all that come meanwhile, until none waits. The caller's thread leads if no other does. A request is
 * served by a sync that began after it came: all that it stands for was written by then. */
static void sync_in_rounds(struct group *g, struct sync_round *s, struct repl_io *io)
{
	mutex_lock(&g->lock);
	ios_push(&s->waiting, io);
	if (s->running) {
		mutex_unlock(&g->lock);
		return;
	}
	s->running = true;
	while (s->waiting.head) {
		s->served = s->waiting;
		s->waiting = (struct repl_list){0};
		mutex_unlock(&g->lock);
		int errors[GROUP_VOLUMES_MAX];
		uint64_t failed = 0;
		round_sync(g, s, errors, &failed);
		struct outbox o;
		outbox_init(&o);
		lock_with(g, &o);
		struct repl_io *w;
		while ((w = ios_pop(&s->served)) != NULL) {
			struct repl_event ev = {.type = EV_IO_DONE, .io = w, .error = errors[w->volume]};
			w->failed = failed;
			step(g, &ev);
		}
		unlock_with(g);
		outbox_run(g, &o);
		mutex_lock(&g->lock);
	}
	s->running = false;
	mutex_unlock(&g->lock);
}

static void own_job_run(struct pool_job *job)
{
	struct own_job *j = CONTAINER_OF(job, struct own_job, job);
	struct group *g = j->g;
	struct repl_io *io = j->io;
	free(j);
	struct sync_round *s = round_of(g, io);
	if (s)
		sync_in_rounds(g, s, io);
	else
		io_done(g, io, execute(g, io));
	job_ended(g);
}

static void guest_job_run(struct pool_job *job)
{
	struct gio *gio = CONTAINER_OF(job, struct gio, job);
	struct group *g = gio->group;
	struct sync_round *s = round_of(g, &gio->io);
	if (s)
		sync_in_rounds(g, s, &gio->io);
	else
		io_done(g, &gio->io, execute(g, &gio->io));
	job_ended(g);
}

static void submit_job(struct group *g, struct repl_io *io)
{
	mutex_lock(&g->lock);
	g->jobs++;
	mutex_unlock(&g->lock);
	if (io->owner == OWNER_GUEST) {
		gio_of(io)->job.fn = guest_job_run;
		pool_submit(g->d->pool, &gio_of(io)->job);
		return;
	}
	struct own_job *j = malloc(sizeof(*j));
	if (j == NULL) {
		io_done(g, io, -ERR_NOMEM);
		job_ended(g);
		return;
	}
	*j = (struct own_job){.job.fn = own_job_run, .g = g, .io = io};
	pool_submit(g->d->pool, &j->job);
}

/* ---- the peer's stream ---- */

static void apply_job_run(struct pool_job *job);

static void apply_kick(struct group *g)
{
	/* A second worker joins when there is more than one batch to do, and syncs to overlap: without them two writers
	 * of the same files only wait for each other in the kernel. */
	unsigned most = store_info(g->d->store)->durability == DURABILITY_POWER ? APPLY_WORKERS_MAX : 1;
	for (unsigned i = 0; i < most; i++) {
		mutex_lock(&g->lock);
		struct apply_worker *w = &g->appliers[i];
		bool start = g->apply.head && !w->busy && (i == 0 || g->apply.count > APPLY_BATCH_MAX);
		if (start) {
			w->busy = true;
			g->jobs++;
		}
		mutex_unlock(&g->lock);
		if (start) {
			w->g = g;
			w->job.fn = apply_job_run;
			pool_submit(g->d->pool, &w->job);
		}
	}
}

/* Up to a batch of requests of one volume, from the front. */
static unsigned apply_take(struct group *g, struct repl_io *ios[APPLY_BATCH_MAX]) REQUIRES(g->lock)
{
	unsigned n = 0;
	while (g->apply.head && n < APPLY_BATCH_MAX && (n == 0 || g->apply.head->volume == ios[0]->volume))
		ios[n++] = ios_pop(&g->apply);
	return n;
}

static void apply_job_run(struct pool_job *job)
{
	struct apply_worker *w = CONTAINER_OF(job, struct apply_worker, job);
	struct group *g = w->g;
	struct repl_io *ios[APPLY_BATCH_MAX];
	int errors[APPLY_BATCH_MAX];
	for (;;) {
		mutex_lock(&g->lock);
		unsigned n = apply_take(g, ios);
		if (n == 0) {
			w->busy = false;
			mutex_unlock(&g->lock);
			break;
		}
		mutex_unlock(&g->lock);
		repl_exec_apply(&g->exec, ios, n, errors);
		struct outbox o;
		outbox_init(&o);
		lock_with(g, &o);
		for (unsigned i = 0; i < n; i++) {
			struct repl_event ev = {.type = EV_IO_DONE, .io = ios[i], .error = errors[i]};
			step(g, &ev);
		}
		struct repl_event ev = {.type = EV_BATCH, .session = g->conn ? g->conn->session : 0};
		step(g, &ev);
		unlock_with(g);
		outbox_run(g, &o);
	}
	job_ended(g);
}

/* What it holds, or will. */
static uint64_t stream_bytes(const struct stream_io *s)
{
	bool data = s->io.kind == REPL_WRITE || s->io.kind == REPL_READ;
	return sizeof(*s) + (data ? s->io.len : 0);
}

static void stream_free(struct group *g, struct repl_io *io)
{
	struct stream_io *s = CONTAINER_OF(io, struct stream_io, io);
	uint64_t bytes = stream_bytes(s);
	free(io->payload);
	free(s);
	mutex_lock(&g->lock);
	bool was_full = stream_full(g);
	g->stream_bytes -= bytes;
	if (was_full && !stream_full(g))
		cond_broadcast(&g->cond);
	mutex_unlock(&g->lock);
}

/* ---- saving ---- */

static void publish(struct group *g, const struct repl_meta *m)
{
	int old = atomic_load(&g->serving);
	enum repl_serving now = repl_serving(m, false);
	atomic_store(&g->serving, now);
	atomic_store(&g->base, m->base);
	/* A handle opened while this host wrote to its disk is stale once it follows another [SPEC 4], and so is one
	 * of a detached disk that is now taken as it is: what it wrote through the peer is not there. */
	bool follows = m->role == ROLE_SECONDARY && now != SERVING_DISK;
	bool back = m->role == ROLE_STANDALONE && atomic_load(&g->detached) != 0;
	if (old == SERVING_DISK && (follows || back))
		atomic_fetch_add(&g->handle_epoch, 1);
}

static void invalidate(struct group *g)
{
	for (uint32_t i = 0; i < g->n_vols; i++) {
		atomic_store(&g->vols[i]->mtime_ns, clock_wall_ns());
		if (g->d->cfg.hooks.invalidate)
			g->d->cfg.hooks.invalidate(g->d->cfg.hooks.arg, g->vols[i]->id);
	}
}

/* The order that I7 rests on: the new epochs' files durable, then the one record that names them, then memory. */
static void save_run(struct pool_job *job)
{
	struct group *g = CONTAINER_OF(job, struct group, save_job);
	struct err e = {0};
	uint64_t discarded = 0;
	bool chain = g->save.ckpt || g->save.drop || g->save.drop_through;
	uint64_t old_base = atomic_load(&g->base);
	int old_serving = atomic_load(&g->serving);
	uint64_t old_handles = atomic_load(&g->handle_epoch);
	int err = repl_exec_save(&g->exec, &g->save, &e);
	if (err)
		group_log(g, 0, e.text);
	bool changed = false;
	if (!err) {
		pthread_rwlock_wrlock(&g->view);
		discarded = repl_exec_switch(&g->exec, &g->save);
		publish(g, g->save.meta);
		changed = discarded || old_base != g->save.meta->base || old_serving != atomic_load(&g->serving) ||
			  old_handles != atomic_load(&g->handle_epoch);
		pthread_rwlock_unlock(&g->view);
		repl_exec_forget_changed(&g->exec, g->save.meta);
	}
	chain = (!err && group_clones_publish(g, g->save.meta)) || chain;
	/* Before the core's answers go out: the kernel shows the new content when the command ends. But a host that
	 * served its disk may have requests that hold pages of the kernel's cache and wait for this very save (a hold,
	 * a generation, a lost peer): invalidation would wait for them, so they get on first. */
	bool late = old_serving == SERVING_DISK;
	if (changed && !late)
		invalidate(g);
	struct repl_event ev = {.type = EV_META_SAVED, .error = err, .bytes = discarded};
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	/* Not before: a guest that sees the new size may write there, and the core has to know of it by then. */
	ev.maps = err ? NULL : repl_exec_grow(&g->exec);
	step(g, &ev);
	bool grown = !err && repl_exec_grown(&g->exec);
	unlock_with(g);
	o.invalidate = (changed && late) || grown;
	outbox_run(g, &o);
	if (!err)
		repl_exec_reap(&g->exec);
	if (!err && chain) /* retention may have more to do: the next tick knows */
		repl_exec_look_usage(&g->exec);
	if (!err)
		hub_volumes_changed(g->d);
	if (!err && chain)
		daemon_names_changed(g->d);
	job_ended(g);
}

/* A failure has dropped what it was about, or the next clear cycle meets it again. */
static void changed_run(struct pool_job *job)
{
	struct group *g = CONTAINER_OF(job, struct group, changed_job);
	(void)repl_exec_flush_changed(&g->exec);
	mutex_lock(&g->lock);
	g->flushing_changed = false;
	mutex_unlock(&g->lock);
	job_ended(g);
}

static void changed_kick(struct group *g)
{
	mutex_lock(&g->lock);
	bool start = !g->flushing_changed;
	if (start) {
		g->flushing_changed = true;
		g->changed_new = false;
		g->changed_flushed_ns = clock_mono_ns();
		g->jobs++;
	}
	mutex_unlock(&g->lock);
	if (start) {
		g->changed_job.fn = changed_run;
		pool_submit(g->d->pool, &g->changed_job);
	}
}

/* ---- the outbox ---- */

static void complete(struct group *g, struct outbox *o, struct repl_io *io)
{
	if (io->owner == OWNER_STREAM) {
		stream_free(g, io);
		return;
	}
	struct gio *gio = gio_of(io);
	if (gio == o->own) {
		gio->completed = true;
		gio->error = io->error;
		return;
	}
	free(gio->copy);
	gio->copy = NULL;
	gio->done(gio, io->error);
}

static void dial(struct group *g, const char *addr, uint64_t number)
{
	struct err e = {0};
	struct conn *c = calloc(1, sizeof(*c));
	int err = -ERR_NOMEM;
	if (c) {
		struct link *l;
		c->d = g->d;
		atomic_store(&c->refs, 2);
		atomic_store(&c->g, group_ref(g));
		c->dialled = true;
		c->dial = number;
		mutex_lock(&g->lock);
		g->conns++;
		mutex_unlock(&g->lock);
		daemon_conn_add(c);
		err = daemon_addr_allowed(g->d, addr, &e) ? 0 : -ERR_PERM;
		if (!err)
			err = link_dial(addr, &g->d->self, daemon_link_callbacks(true), c, &l, &e);
		if (!err) {
			daemon_conn_set_link(c, l); /* its `up`, even its `down`, may have come already */
			mutex_lock(&g->lock);
			bool closing = g->closing;
			mutex_unlock(&g->lock);
			if (closing)
				link_close(l, 0);
			daemon_conn_put(c);
			return;
		}
		daemon_conn_remove(c);
		free(c);
		mutex_lock(&g->lock);
		g->conns--;
		cond_broadcast(&g->cond);
		mutex_unlock(&g->lock);
		group_unref(g);
	}
	struct repl_event ev = {.type = EV_LINK_DOWN, .dial = number, .error = err, .text = e.text};
	step_and_run(g, &ev);
}

static void outbox_run(struct group *g, struct outbox *o)
{
	struct repl_io *io;
	while ((io = ios_pop(&o->completed)) != NULL)
		complete(g, o, io);
	while ((io = ios_pop(&o->submits)) != NULL)
		submit_job(g, io);
	if (o->save) {
		o->save = false;
		mutex_lock(&g->lock);
		g->jobs++;
		mutex_unlock(&g->lock);
		g->save_job.fn = save_run;
		pool_submit(g->d->pool, &g->save_job);
	}
	if (o->flush_changed) {
		o->flush_changed = false;
		changed_kick(g);
	}
	if (o->wake || o->invalidate) {
		o->wake = false;
		mutex_lock(&g->lock);
		cond_broadcast(&g->cond);
		mutex_unlock(&g->lock);
	}
	if (o->invalidate)
		invalidate(g);
	if (o->commands) {
		mutex_lock(&g->lock);
		for (struct shell_command *c = o->commands, *next; c; c = next) {
			next = c->next;
			c->done = true;
			shell_command_unref(c); /* the core's reference */
		}
		o->commands = NULL;
		o->commands_tail = &o->commands;
		cond_broadcast(&g->cond);
		mutex_unlock(&g->lock);
	}
	if (o->apply) {
		o->apply = false;
		apply_kick(g);
	}
	if (o->dial[0]) {
		char addr[ADDR_SIZE];
		memcpy(addr, o->dial, sizeof(addr));
		o->dial[0] = 0;
		dial(g, addr, o->dial_number);
	}
}

/* ---- guests ---- */

/* Whether the request waits in the core and its data must outlive the caller's buffer. */
static void own_parked(struct gio *gio)
{
	if (gio->copy || gio->kind != REPL_WRITE)
		return;
	/* It cannot be called back from the core, so memory has to be found: at most 1 MiB. */
	while ((gio->copy = malloc(gio->len)) == NULL) {
		log_error(gio->group->name, "out of memory for a waiting write of %llu bytes; trying again",
			  (unsigned long long)gio->len);
		(void)poll(NULL, 0, 10);
	}
	memcpy(gio->copy, gio->data, gio->len);
}

void group_io(struct group *g, struct gio *gio)
{
	struct outbox o;
	outbox_init(&o);
	o.own = gio;
	gio->io = (struct repl_io){.kind = gio->kind, .volume = gio->v->index, .off = gio->off, .len = gio->len};
	gio->io.owner = OWNER_GUEST;
	gio->group = g;
	gio->own = gio->completed = false;
	gio->copy = NULL;
	if (gio->kind == REPL_WRITE && atomic_load(&g->forwarding)) {
		gio->copy = malloc(gio->len);
		if (gio->copy == NULL) {
			gio->done(gio, -ERR_NOMEM);
			return;
		}
		memcpy(gio->copy, gio->data, gio->len);
	}
	if (gio->kind != REPL_FLUSH && gio->kind != REPL_READ)
		atomic_store_explicit(&gio->v->mtime_ns, clock_wall_ns(), memory_order_relaxed);
	struct repl_event ev = {.type = EV_IO, .io = &gio->io};
	for (;;) {
		lock_with(g, &o);
		/* What came before this host stepped down waits in the core, or has ended; what comes later is told by
		 * its handle, also where it was looked at before. The epoch is published before the core hears of it.
		 */
		if (ev.type == EV_IO && gio->h && gio->h->epoch != atomic_load(&g->handle_epoch)) {
			unlock_with(g);
			free(TAKE_PTR(gio->copy));
			gio->done(gio, -ERR_IO);
			return;
		}
		if (ev.type == EV_IO)
			flight_begin(g, gio);
		step(g, &ev);
		bool mine = gio->own, completed = false;
		for (struct repl_io *c = o.completed.head; c; c = c->next_shell)
			completed = completed || c == &gio->io;
		if (!mine && !completed) {
			/* It waits: from here on another thread goes on with it. */
			o.own = NULL;
			own_parked(gio);
		}
		gio->own = false;
		unlock_with(g);
		if (!mine) {
			outbox_run(g, &o);
			break;
		}
		struct sync_round *s = round_of(g, &gio->io);
		if (s) { /* this thread may serve others' syncs too; how this request goes on comes through the outbox
			  */
			o.own = NULL;
			outbox_run(g, &o);
			own_parked(gio);
			sync_in_rounds(g, s, &gio->io);
			return;
		}
		outbox_run(g, &o);
		int err = execute(g, &gio->io);
		ev = (struct repl_event){.type = EV_IO_DONE, .io = &gio->io, .error = err};
	}
	if (o.own && gio->completed) {
		free(gio->copy);
		gio->copy = NULL;
		gio->done(gio, gio->error);
	}
}

/* ---- links ---- */

int group_frame(struct conn *c, const struct wire_frame *f, void *payload)
{
	struct group *g = c->g;
	struct outbox o;
	outbox_init(&o);
	struct repl_event ev = {.type = EV_FRAME, .session = c->session, .frame = f, .payload = payload};
	bool taken = false;
	lock_with(g, &o);
	if (repl_exec_is_stream(f->type)) {
		/* Backpressure on the peer: this thread reads the socket. */
		while (stream_full(g) && !g->closing && !c->closed && g->conn == c) {
			g->out = NULL;
			c->waiting = true;
			cond_wait(&g->cond, &g->lock);
			c->waiting = false;
			g->out = &o;
		}
		struct stream_io *s = calloc(1, sizeof(*s));
		const char *why =
		    s ? repl_exec_stream_io(&g->exec, f, payload, &s->io) : "more than there is memory for";
		if (why) {
			unlock_with(g);
			free(s);
			free(payload);
			log_error(g->name, "the peer sent %s", why);
			return -ERR_PROTO;
		}
		s->io.owner = OWNER_STREAM;
		taken = s->io.payload != NULL;
		g->stream_bytes += stream_bytes(s);
		ev.io = &s->io;
	}
	step(g, &ev);
	unlock_with(g);
	outbox_run(g, &o);
	if (!taken)
		free(payload);
	return 0;
}

void group_batch(struct conn *c)
{
	struct repl_event ev = {.type = EV_BATCH, .session = c->session};
	step_and_run(c->g, &ev);
}

void group_sent(struct conn *c, uint64_t bytes)
{
	struct group *g = c->g;
	struct repl_event ev = {.type = EV_SENT, .session = c->session, .bytes = bytes};
	if (ev.session)
		step_and_run(g, &ev);
	mutex_lock(&g->lock);
	if (g->conn && g->conn->waiting && !stream_full(g))
		cond_broadcast(&g->cond);
	mutex_unlock(&g->lock);
}

/* The connection stands: it becomes the group's, with the next session number. */
void group_attach(struct group *g, struct conn *c, const struct wire_join *j, const struct wire_frame *f, void *payload)
{
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	if (g->closing || !repl_takes_link(g->core, j, c->dial)) {
		unlock_with(g);
		outbox_run(g, &o);
		link_close(c->link, 0);
		free(payload);
		return;
	}
	c->session = ++g->sessions;
	struct conn *old = g->conn;
	g->conn = c;
	cond_broadcast(&g->cond); /* the old one's receiver may wait for room */
	struct repl_event ev = {
	    .type = EV_LINK_UP, .session = c->session, .dialer = c->dialled, .peer_store = link_peer(c->link)->store};
	step(g, &ev);
	if (f) {
		ev = (struct repl_event){.type = EV_FRAME, .session = c->session, .frame = f, .payload = payload};
		step(g, &ev);
	}
	if (old)
		link_close(old->link, 0);
	unlock_with(g);
	outbox_run(g, &o);
	free(payload);
}

void group_conn_down(struct conn *c, int code, const char *text)
{
	struct group *g = c->g;
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	if (g->conn == c)
		g->conn = NULL;
	cond_broadcast(&g->cond);
	struct repl_event ev = {
	    .type = EV_LINK_DOWN, .session = c->session, .dial = c->dial, .error = code, .text = text};
	if (c->session || c->dialled)
		step(g, &ev);
	unlock_with(g);
	outbox_run(g, &o);
	/* Not before all that followed is under way: who waits for quiet goes by the counts. */
	mutex_lock(&g->lock);
	g->conns--;
	cond_broadcast(&g->cond);
	mutex_unlock(&g->lock);
	group_unref(g);
}

static void usage_job_run(struct pool_job *job)
{
	struct group *g = CONTAINER_OF(job, struct group, usage_job);
	repl_exec_look_usage(&g->exec);
	mutex_lock(&g->lock);
	g->usage_busy = false;
	mutex_unlock(&g->lock);
	job_ended(g);
}

/* For the tick: NULL where it is to be looked at first, which this begins. */
static const struct repl_usage *usage_now(struct group *g) REQUIRES(g->lock)
{
	uint64_t now = clock_mono_ns();
	bool known = repl_exec_usage_known(&g->exec);
	if (repl_meta(g->core)->n_ckpts && !g->usage_busy && !g->closing && (!known || now - g->usage_ns >= USAGE_NS)) {
		g->usage_busy = true;
		g->usage_ns = now;
		g->jobs++;
		g->usage_job.fn = usage_job_run;
		pool_submit(g->d->pool, &g->usage_job);
	}
	return known ? &g->exec.usage : NULL;
}

void group_tick(struct group *g)
{
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	/* A receiver that waits for room does not listen: that is this host's slowness, not the peer's silence. */
	struct repl_event ev = {.type = EV_TICK, .usage = usage_now(g)};
	if (g->conn)
		ev.heard_ns = g->conn->waiting ? clock_mono_ns() : link_heard_ns(g->conn->link);
	step(g, &ev);
	if (g->conn && g->conn->waiting && !stream_full(g))
		cond_broadcast(&g->cond);
	o.flush_changed = o.flush_changed || changed_due(g);
	unlock_with(g);
	outbox_run(g, &o);
}

/* ---- commands ---- */

struct shell_command *shell_command_new(enum repl_cmd cmd)
{
	struct shell_command *c = calloc(1, sizeof(*c));
	if (c) {
		c->c.cmd = cmd;
		atomic_store(&c->refs, 1);
	}
	return c;
}

void shell_command_unref(struct shell_command *c)
{
	if (c == NULL || atomic_fetch_sub(&c->refs, 1) != 1)
		return;
	if (c->c.cmd == CMD_VERIFY)
		free(c->c.verify);
	free(c);
}

void group_command_start(struct group *g, struct shell_command *c)
{
	struct outbox o;
	outbox_init(&o);
	atomic_fetch_add(&c->refs, 1); /* the core's, until ACT_CMD_DONE */
	lock_with(g, &o);
	c->c.result3 = c->c.cmd == CMD_FAILOVER ? repl_exec_active_bytes(&g->exec) : 0;
	struct repl_event ev = {.type = EV_COMMAND, .command = &c->c};
	step(g, &ev);
	unlock_with(g);
	outbox_run(g, &o);
}

bool group_command_wait(struct group *g, struct shell_command *c, uint64_t until_ns, int *ret, struct err *e)
{
	bool in_time = true;
	mutex_lock(&g->lock);
	while (!c->done && in_time)
		in_time = cond_wait_until(&g->cond, &g->lock, until_ns);
	bool done = c->done;
	if (done)
		*ret = c->error ? err_set(e, -c->error, "%s", c->c.err.text) : 0;
	mutex_unlock(&g->lock);
	return done;
}

int group_command(struct group *g, struct shell_command *c, struct ctl_conn *ctl, uint64_t deadline_ns, struct err *e)
{
	int err = 0;
	group_command_start(g, c);
	for (;;) {
		uint64_t until = clock_mono_ns() + 200 * NS_PER_MS;
		if (group_command_wait(g, c, deadline_ns ? min_u64(until, deadline_ns) : until, &err, e))
			return err;
		if (deadline_ns && clock_mono_ns() >= deadline_ns)
			return err_set(e, ERR_TIMEOUT, "it has not ended in the time given; it goes on");
		if (atomic_load(&g->d->ending))
			return err_set(e, ERR_CANCELED, "the daemon is shutting down");
		if (ctl && ctl_canceled(ctl))
			return err_set(e, ERR_INTR, "interrupted; it goes on");
	}
}

int group_hold(struct group *g, enum repl_cmd cmd, uint64_t ckpt, const char *who, uint64_t *ret_ckpt, struct err *e)
{
	struct shell_command *sc = shell_command_new(cmd);
	if (sc == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	sc->c.number = ckpt;
	(void)snprintf(sc->c.text, sizeof(sc->c.text), "%s", who);
	int err = group_command(g, sc, NULL, 0, e);
	if (!err && ret_ckpt)
		*ret_ckpt = sc->c.result;
	shell_command_unref(sc);
	return err;
}

/* ---- a group's life ---- */

struct group *group_ref(struct group *g)
{
	atomic_fetch_add(&g->refs, 1);
	return g;
}

void group_unref(struct group *g)
{
	if (g == NULL || atomic_fetch_sub(&g->refs, 1) != 1)
		return;
	repl_exec_close(&g->exec);
	for (uint32_t i = 0; i < g->n_vols; i++) {
		g->vols[i]->vol = NULL;
		gvol_unref(g->vols[i]);
	}
	free(g->metas[0]);
	free(g->metas[1]);
	free(g->save.meta);
	free(g->core);
	pthread_rwlock_destroy(&g->view);
	cond_destroy(&g->cond);
	mutex_destroy(&g->lock);
	free(g);
}

static int add_gvol(struct group *g, const char *name)
{
	struct gvol *v = calloc(1, sizeof(*v));
	if (v == NULL)
		return -ERR_NOMEM;
	atomic_store(&v->refs, 1);
	v->g = g;
	v->d = g->d;
	v->index = g->n_vols;
	v->id = g->id + 1 + v->index;
	v->vol = g->exec.vols[v->index];
	(void)snprintf(v->name, sizeof(v->name), "%s", name);
	atomic_store(&v->mtime_ns, clock_wall_ns());
	g->vols[g->n_vols++] = v;
	return 0;
}

int group_open(struct daemon *d, const struct repl_meta *m, uint32_t id, struct group **ret, struct err *e)
{
	struct group *g = calloc(1, sizeof(*g));
	if (g == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	g->d = d;
	g->id = id;
	atomic_store(&g->refs, 1);
	memcpy(g->name, m->group, sizeof(g->name));
	mutex_init(&g->lock);
	cond_init(&g->cond);
	pthread_rwlockattr_t attr;
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&g->view, &attr);
	pthread_rwlockattr_destroy(&attr);
	struct repl_init_args a = {.store = store_info(d->store)->uuid,
				   .random_seed = random_u64_nonzero(),
				   .now_ns = clock_mono_ns(),
				   .power = store_info(d->store)->durability == DURABILITY_POWER,
				   .emit = emit,
				   .emit_arg = g};
	int err = 0;
	g->core = malloc(repl_size());
	g->save.meta = malloc(sizeof(*m));
	a.meta = g->metas[0] = malloc(sizeof(*m));
	a.next = g->metas[1] = malloc(sizeof(*m));
	if (!g->core || !g->save.meta || !a.meta || !a.next)
		err = err_set(e, ERR_NOMEM, "out of memory");
	else
		*a.meta = *m;
	g->exec.core = g->core;
	g->exec.lock = &g->lock;
	if (!err)
		err = repl_exec_open(&g->exec, d->store, m, e);
	for (uint32_t i = 0; i < m->n_volumes && !err; i++) {
		a.volume_memory[i] = g->exec.maps[i];
		if ((err = add_gvol(g, m->volumes[i].name)) < 0)
			(void)err_set(e, ERR_NOMEM, "out of memory");
	}
	if (err) {
		group_unref(g);
		return err;
	}
	publish(g, m);
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	repl_init(g->core, &a);
	err = repl_exec_load_intents(&g->exec, e);
	unlock_with(g);
	if (err) {
		group_unref(g);
		return err;
	}
	*ret = g;
	outbox_run(g, &o);
	return 0;
}

void group_shutdown(struct group *g)
{
	struct repl_event ev = {.type = EV_SHUTDOWN};
	struct outbox o;
	outbox_init(&o);
	lock_with(g, &o);
	bool again = g->closing;
	g->closing = true;
	cond_broadcast(&g->cond);
	if (!again)
		step(g, &ev);
	unlock_with(g);
	outbox_run(g, &o);
}

bool group_wait_quiet(struct group *g, uint64_t deadline_ns)
{
	bool in_time = true;
	mutex_lock(&g->lock);
	while ((g->conns || g->jobs) && in_time)
		if (deadline_ns)
			in_time = cond_wait_until(&g->cond, &g->lock, deadline_ns);
		else
			cond_wait(&g->cond, &g->lock);
	bool quiet = g->conns == 0 && g->jobs == 0;
	mutex_unlock(&g->lock);
	return quiet;
}

void group_end(struct group *g)
{
	int err = repl_exec_end(&g->exec);
	if (err)
		log_warn(g->name,
			 "which regions are dirty could not be kept (%s): the next sync sends whole units of %u KiB",
			 err_short(err), (unsigned)(INTENT_SIZE >> 10));
}

void group_close(struct group *g)
{
	group_unref(g);
}
