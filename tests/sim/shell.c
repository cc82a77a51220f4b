/* One host's shell of the core: what fs/repl_shell.c does with threads, with coroutines (core/repl.h has the contract).
 *
 * Everything that is submitted starts after a delay of its own, is carried out with stops in between, and is reported
 * after another delay: "carried out and not reported" is a state that lasts. Flushes share rounds, stream writes go in
 * batches through at most two workers, a save is prepare, record, switch, report, reap: as in the daemon.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "tests/sim/world_internal.h"

enum owner { OWNER_GUEST = 1, OWNER_STREAM };

struct job {
	struct host *h;
	struct repl_io *io;
};

/* Allocations in it count (tests/sim/simalloc.h). */
#define WATCHED(expr)                                                                                                  \
	({                                                                                                             \
		simalloc_watch(true);                                                                                  \
		int watched_rc_ = (expr);                                                                              \
		simalloc_watch(false);                                                                                 \
		watched_rc_;                                                                                           \
	})

static struct sim_io *sim_io_of(struct repl_io *io)
{
	return io->internal ? NULL : CONTAINER_OF(io, struct sim_io, io);
}

static void link_in(struct sim_io **list, struct sim_io *s)
{
	s->next = *list;
	s->prev = NULL;
	if (*list)
		(*list)->prev = s;
	*list = s;
}

static void link_out(struct sim_io **list, struct sim_io *s)
{
	if (s->prev)
		s->prev->next = s->next;
	else
		*list = s->next;
	if (s->next)
		s->next->prev = s->prev;
}

static uint64_t start_delay(struct host *h)
{
	return world_delay(h->w, h->w->disk_ns / 4 + 1);
}

static void report_delay(struct host *h)
{
	co_pause(h, world_delay(h->w, h->w->disk_ns / 4 + 1));
}

/* ---- steps ---- */

void host_step(struct host *h, struct repl_event *ev)
{
	struct world *w = h->w;
	if (h->dying || !h->core)
		return;
	ev->now_ns = w->now;
	ev->wall_ns = world_wall(w, h->id);
	INVARIANT(!h->in_step);
	h->in_step = 1;
	repl_step(h->core, ev);
	h->in_step = 0;
	w->count.steps++;
	if (w->count.steps % 16 == 0)
		repl_check(h->core);
	model_after_step(h);
}

static void io_done(struct host *h, struct repl_io *io, int error)
{
	bool read = io->internal && io->kind != REPL_REBUILD;
	host_step(h, &(struct repl_event){.type = EV_IO_DONE, .io = io, .error = error});
	if (read) { /* not sent after all */
		free(io->payload);
		io->payload = NULL;
	}
}

/* ---- requests ---- */

static bool writes(const struct repl_io *io)
{
	if (io->target == TARGET_OWN)
		return io->kind == REPL_COMMIT || io->kind == REPL_REBUILD;
	return (io->target == TARGET_DISK || io->target == TARGET_ACTIVE) &&
	       (io->kind == REPL_WRITE || io->kind == REPL_ZERO || io->kind == REPL_DISCARD);
}

static int execute(struct host *h, struct repl_io *io)
{
	struct sim_io *s = sim_io_of(io);
	struct exec *x = NULL;
	bool active = io->target == TARGET_ACTIVE && io->kind != REPL_FLUSH;
	/* one volume's chain lock would do for it alone, but the model looks at all of them */
	bool point = io->target == TARGET_DISK && io->owner == OWNER_GUEST && writes(io);
	if (active || point)
		pthread_rwlock_rdlock(&h->view);
	if (s && !s->stream && writes(io) && s->forwarded) /* the daemon has given its copy to the link */
		world_fail(h->w, "host %u: a write is carried out here after it has been sent", h->id);
	if (s && !s->stream && writes(io))
		model_fill(h, s);
	if (writes(io))
		x = model_begin(h, io, s);
	void *into = s && !s->stream && io->kind == REPL_READ ? s->data : NULL;
	int err = WATCHED(repl_exec_io(&h->x, io, s ? s->data : NULL, into, h->base));
	if (x)
		model_end(h, x, err, io->save_failed);
	if (io->kind == REPL_REOPEN)
		model_reopened(h, io->arg);
	if (active || point)
		pthread_rwlock_unlock(&h->view);
	return err;
}

static void io_job(void *arg)
{
	struct job j = *(struct job *)arg;
	simfree(arg);
	if (j.io->owner == OWNER_STREAM && j.io->kind != REPL_READ)
		model_barrier(j.h, j.io);
	int err = execute(j.h, j.io);
	report_delay(j.h);
	io_done(j.h, j.io, err);
}

struct round_job {
	struct host *h;
	struct round *s;
};

static void round_sync(struct host *h, struct round *s, struct repl_io *served, int errors[static GROUP_VOLUMES_MAX],
		       uint64_t *failed)
{
	uint64_t mark;
	if (s == &h->marks) {
		(void)WATCHED((repl_exec_set_intents(&h->x, served, errors), 0));
		return;
	}
	model_sync_begin(h, &mark);
	int err = s == &h->flush ? repl_exec_sync_disks(&h->x, failed) : repl_exec_sync_actives(&h->x);
	if (s == &h->active_flush && !err)
		model_synced(h, mark, MODEL_ACTIVES);
	for (unsigned i = 0; i < GROUP_VOLUMES_MAX; i++)
		errors[i] = err;
}

static void round_job(void *arg)
{
	struct round_job j = *(struct round_job *)arg;
	struct host *h = j.h;
	int errors[GROUP_VOLUMES_MAX];
	simfree(arg);
	while (j.s->waiting) {
		uint64_t failed = 0;
		struct repl_io *served = j.s->waiting;
		j.s->waiting = NULL;
		for (struct repl_io *io = served; io; io = io->next_shell)
			if (io->owner == OWNER_STREAM)
				model_barrier(h, io);
		round_sync(h, j.s, served, errors, &failed);
		report_delay(h);
		while (served) {
			struct repl_io *io = served;
			served = io->next_shell;
			io->next_shell = NULL;
			io->failed = failed;
			io_done(h, io, errors[io->volume]);
		}
	}
	j.s->running = false;
}

static struct round *round_of(struct host *h, const struct repl_io *io)
{
	if (io->target == TARGET_INTENT)
		return h->w->cfg.power ? &h->marks : NULL;
	if (io->kind != REPL_FLUSH || (io->target != TARGET_DISK && io->target != TARGET_ACTIVE))
		return NULL;
	return io->target == TARGET_DISK ? &h->flush : &h->active_flush;
}

static void submit(struct host *h, struct repl_io *io)
{
	struct round *s = round_of(h, io);
	if (s) {
		io->next_shell = s->waiting;
		s->waiting = io;
		if (s->running)
			return;
		s->running = true;
		struct round_job *j = simalloc(sizeof(*j));
		*j = (struct round_job){h, s};
		host_spawn(h, round_job, j, start_delay(h));
		return;
	}
	struct job *j = simalloc(sizeof(*j));
	*j = (struct job){h, io};
	host_spawn(h, io_job, j, start_delay(h));
}

/* ---- the peer's stream ---- */

static unsigned apply_take(struct host *h, struct repl_io **ios, unsigned most)
{
	unsigned n = 0;
	while (h->apply && n < most && (n == 0 || h->apply->volume == ios[0]->volume)) {
		ios[n] = h->apply;
		h->apply = h->apply->next_shell;
		h->apply_count--;
		n++;
	}
	if (!h->apply)
		h->apply_tail = &h->apply;
	return n;
}

static void apply_job(void *arg)
{
	struct host *h = arg;
	struct repl_io *ios[VOLUME_BATCH_MAX];
	struct exec *x[VOLUME_BATCH_MAX];
	int errors[VOLUME_BATCH_MAX];
	for (;;) {
		static const unsigned most[] = {1, 4, 32, VOLUME_BATCH_MAX};
		unsigned n = apply_take(h, ios, most[world_below(h->w, 4)]);
		if (n == 0 || h->dying)
			break;
		for (unsigned i = 0; i < n; i++)
			x[i] = ios[i]->kind == REPL_HASH || ios[i]->kind == REPL_VERIFY
				   ? NULL
				   : model_begin(h, ios[i], sim_io_of(ios[i]));
		(void)WATCHED((repl_exec_apply(&h->x, ios, n, errors), 0));
		for (unsigned i = 0; i < n; i++)
			if (ios[i]->kind == REPL_HASH)
				model_hashed(h, sim_io_of(ios[i]));
			else if (ios[i]->kind == REPL_VERIFY)
				model_compared(h, sim_io_of(ios[i]));
			else
				model_end(h, x[i], errors[i], ios[i]->save_failed);
		report_delay(h);
		for (unsigned i = 0; i < n; i++)
			io_done(h, ios[i], errors[i]);
		host_step(h, &(struct repl_event){.type = EV_BATCH, .session = h->conn ? h->conn->session : 0});
	}
	h->appliers--;
}

static void apply_push(struct host *h, struct repl_io *io)
{
	io->next_shell = NULL;
	*h->apply_tail = io;
	h->apply_tail = &io->next_shell;
	h->apply_count++;
	unsigned most = h->w->cfg.power ? 2 : 1;
	if (h->appliers < most && (h->appliers == 0 || h->apply_count > 4)) {
		h->appliers++;
		host_spawn(h, apply_job, h, start_delay(h));
	}
}

static uint64_t stream_bytes(const struct sim_io *s)
{
	bool data = s->io.kind == REPL_WRITE || s->io.kind == REPL_READ;
	return sizeof(*s) + (data ? s->io.len : 0);
}

struct sim_io *shell_stream_new(struct host *h, const struct wire_frame *f, void *payload, const char **why)
{
	struct sim_io *s = simalloc(sizeof(*s));
	s->h = h;
	s->stream = true;
	s->io.owner = OWNER_STREAM;
	*why = repl_exec_stream_io(&h->x, f, payload, &s->io);
	if (*why) {
		simfree(s);
		return NULL;
	}
	h->stream_bytes += stream_bytes(s);
	link_in(&h->streams, s);
	return s;
}

void shell_stream_free(struct host *h, struct sim_io *s)
{
	h->stream_bytes -= stream_bytes(s);
	link_out(&h->streams, s);
	free(s->io.payload);
	sent_free(s->sent);
	memset(s, 0xdd, sizeof(*s)); /* the core must not look at it any more */
	simfree(s);
	net_room(h);
}

/* ---- saving ---- */

static void save_job(void *arg)
{
	struct host *h = arg;
	struct err e = {0};
	uint64_t discarded = 0;
	bool chain = h->save.ckpt || h->save.drop || h->save.drop_through;
	int err = WATCHED(repl_exec_save(&h->x, &h->save, &e));
	if (h->dying)
		return;
	if (err) {
		world_note(h->w, "host %u: save: %s", h->id, e.text);
	} else {
		pthread_rwlock_wrlock(&h->view);
		if (h->dying) {
			pthread_rwlock_unlock(&h->view);
			return;
		}
		discarded = repl_exec_switch(&h->x, &h->save);
		model_publish(h, h->save.meta, &h->save);
		h->serving = repl_serving(h->save.meta, false);
		h->base = h->save.meta->base;
		pthread_rwlock_unlock(&h->view);
	}
	report_delay(h);
	h->saving = false;
	host_step(h, &(struct repl_event){.type = EV_META_SAVED,
					  .error = err,
					  .bytes = discarded,
					  .maps = err ? NULL : repl_exec_grow(&h->x)});
	if (!err)
		(void)repl_exec_grown(&h->x);
	if (!err && !h->dying)
		repl_exec_reap(&h->x);
	if (!err && !h->dying && chain)
		(void)WATCHED((repl_exec_look_usage(&h->x), 0));
}

/* ---- guests ---- */

static void guest_end(struct host *h, struct sim_io *s, int error)
{
	link_out(&h->ios, s);
	h->n_ios--;
	if (!h->dying)
		model_done(h, s, error);
	free(s->data);
	simfree(s->before);
	memset(s, 0xdd, sizeof(*s));
	simfree(s);
}

/* As gvol_read does: the core knows what to do with a disk that is detached, or is to be. */
static void read_by_core(struct host *h, struct sim_io *s)
{
	s->io.kind = REPL_READ;
	memset(s->data, 0xa5, s->io.len);
	model_read_begin(h, s);
	host_step(h, &(struct repl_event){.type = EV_IO, .io = &s->io});
}

static void read_job(void *arg)
{
	struct sim_io *s = arg;
	struct host *h = s->h;
	while (!h->dying && repl_holding(h->core))
		co_pause(h, 5 * MS);
	if (!h->dying) {
		s->data = malloc(s->io.len);
		pthread_rwlock_rdlock(&h->view);
		bool detached = !s->promised && (repl_detached(h->core) >> s->io.volume & 1);
		bool disk = h->serving == SERVING_DISK && !s->promised;
		int err = detached ? -ERR_IO : model_read(h, s, s->data);
		pthread_rwlock_unlock(&h->view);
		if (err && disk && !h->dying && h->serving == SERVING_DISK) {
			read_by_core(h, s);
			return;
		}
	}
	guest_end(h, s, 0);
}

bool world_io(struct world *w, unsigned host, enum world_io kind, uint32_t vol, uint64_t off, uint64_t len)
{
	struct host *h = &w->h[host];
	if (!h->up || h->closing || h->n_ios >= 64)
		return false;
	static const enum repl_kind kinds[] = {REPL_WRITE, REPL_ZERO, REPL_DISCARD, REPL_FLUSH, REPL_WRITE, REPL_WRITE};
	struct sim_io *s = simalloc(sizeof(*s));
	uint64_t size = size_now(h, vol);
	off = off / WORLD_UNIT * WORLD_UNIT % size;
	len = (len + WORLD_UNIT - 1) / WORLD_UNIT * WORLD_UNIT;
	if (len > size - off)
		len = size - off;
	if (kind == WORLD_WRITE && len > REPL_DATA_MAX)
		len = REPL_DATA_MAX;
	s->h = h;
	s->io = (struct repl_io){.kind = kinds[kind], .volume = vol, .off = off, .len = len, .owner = OWNER_GUEST};
	if (kind == WORLD_FLUSH)
		s->io.volume = 0, s->io.off = s->io.len = 0;
	s->begun_ns = w->now;
	link_in(&h->ios, s);
	h->n_ios++;
	if (kind >= WORLD_READ) {
		s->is_read = true;
		s->promised = kind == WORLD_READ_CKPT;
		host_spawn(h, read_job, s, start_delay(h));
		return true;
	}
	if (kind == WORLD_WRITE)
		s->data = malloc(len);
	s->done_before = h->done.base + h->done.n;
	s->done_before_peer = h->done_peer.base + h->done_peer.n;
	s->sent_before = h->sent_n;
	/* A flush that came in a resync promises what SYNCED does if it ends in SYNCED; a write that came then does
	 * not. */
	bool live = repl_forwarding(h->core) && h->conn &&
		    (world_link(w, host) == LINK_SYNCED || (kind == WORLD_FLUSH && world_link(w, host) == LINK_RESYNC));
	s->session = live ? h->conn->session : 0;
	uint64_t p = repl_meta(h->core)->settings.protocol;
	s->promised = kind == WORLD_FLUSH && s->session && (p == PROTOCOL_C || p == PROTOCOL_F);
	world_note(w, "host %u: guest %s %u %" PRIu64 "+%" PRIu64, host,
		   kind == WORLD_FLUSH	 ? "flush"
		   : kind == WORLD_WRITE ? "write"
		   : kind == WORLD_ZERO	 ? "zero"
					 : "discard",
		   vol, off, len);
	host_step(h, &(struct repl_event){.type = EV_IO, .io = &s->io});
	return true;
}

unsigned world_outstanding(const struct world *w, unsigned host)
{
	return w->h[host].n_ios;
}

/* ---- commands ---- */

static void command_end(struct sim_command *c, int error)
{
	struct host *h = c->h;
	struct sim_command **at = &h->commands;
	while (*at != c)
		at = &(*at)->next;
	*at = c->next;
	if (!h->dying)
		model_command(h, c, error);
	if (c->c.cmd == CMD_VERIFY) {
		if (!h->dying)
			h->verified = *c->c.verify;
		simfree(c->c.verify);
	}
	if (c->ret)
		*c->ret = (struct world_result){true, error, c->c.result, c->c.result2};
	world_note(h->w, "host %u: command %d ends: %s %s", h->id, c->c.cmd, error ? err_name(error) : "ok",
		   error ? c->c.err.text : "");
	memset(c, 0xdd, sizeof(*c));
	simfree(c);
}

bool world_command(struct world *w, unsigned host, const struct repl_command *cmd, struct world_result *ret)
{
	struct host *h = &w->h[host];
	if (!h->up || h->closing)
		return false;
	struct sim_command *c = simalloc(sizeof(*c));
	c->c = *cmd;
	c->h = h;
	c->ret = ret;
	c->down = world_link(w, host) == LINK_DOWN;
	if (cmd->cmd == CMD_VERIFY)
		c->c.verify = simalloc(sizeof(*c->c.verify));
	for (const struct sim_command *v = h->commands; v && cmd->cmd == CMD_VERIFY_CANCEL; v = v->next)
		if (v->c.cmd == CMD_VERIFY)
			c->c.verify = v->c.verify;
	c->next = h->commands;
	h->commands = c;
	if (ret)
		*ret = (struct world_result){0};
	if (cmd->cmd == CMD_FAILOVER)
		c->c.result3 = repl_exec_active_bytes(&h->x);
	world_note(w, "host %u: command %d number %" PRIu64 " flags %u", host, cmd->cmd, cmd->number, cmd->flags);
	host_step(h, &(struct repl_event){.type = EV_COMMAND, .command = &c->c});
	return true;
}

/* ---- what the core asks for ---- */

static void emit(void *arg, const struct repl_action *a)
{
	struct host *h = arg;
	PRE(h->in_step);
	switch (a->type) {
	case ACT_SUBMIT:
		if (a->io->kind == REPL_REBUILD) {
			a->io->payload = a->data_len ? malloc(a->data_len) : NULL;
			if (a->data_len)
				memcpy(a->io->payload, a->data, a->data_len);
		}
		if (a->io->owner == OWNER_STREAM && repl_exec_is_apply(a->io))
			apply_push(h, a->io);
		else
			submit(h, a->io);
		return;
	case ACT_COMPLETE:
		if (a->io->owner == OWNER_GUEST && a->io->kind == REPL_READ && a->answered && !a->error) {
			if (a->data)
				memcpy(sim_io_of(a->io)->data, a->data, a->io->len);
			else
				memset(sim_io_of(a->io)->data, 0, a->io->len);
		}
		if (a->io->owner == OWNER_STREAM)
			shell_stream_free(h, sim_io_of(a->io));
		else
			guest_end(h, sim_io_of(a->io), a->error);
		return;
	case ACT_SEND:
		net_send(h, a);
		return;
	case ACT_SAVE_META:
		if (h->saving)
			world_fail(h->w, "host %u: a second save before the first has ended", h->id);
		h->saving = true;
		repl_meta_copy(h->save.meta, a->meta);
		h->save.ckpt = a->ckpt;
		if (a->ckpt && a->meta->ckpts[a->meta->n_ckpts - 1].time_ns != world_wall(h->w, h->id))
			world_fail(h->w, "host %u: checkpoint %" PRIu64 " is not of now by its clock", h->id, a->ckpt);
		h->save.active_id = a->active_id;
		h->save.drop = a->drop;
		h->save.drop_through = a->drop_through;
		host_spawn(h, save_job, h, start_delay(h));
		return;
	case ACT_DIAL:
		net_dial(h, a->dial);
		return;
	case ACT_CLOSE:
		if (h->conn) {
			h->conn->closed_by_core = true;
			net_close(h->conn, a->drain ? 500 * MS : 0);
		}
		return;
	case ACT_CMD_DONE:
		command_end(CONTAINER_OF(a->command, struct sim_command, c), a->error);
		return;
	case ACT_LOG:
		world_note(h->w, "host %u: log %d: %s", h->id, a->level, a->text);
		h->w->count.thinned += strstr(a->text, "has filled 80 %") != NULL;
		h->w->count.room_drops += strstr(a->text, ": no room: checkpoint ") != NULL;
		if (strncmp(a->text, GROUP_NAME ": ", strlen(GROUP_NAME) + 2) == 0 &&
		    strstr(a->text, "; applying stopped, the last checkpoint stays good"))
			model_stopped(h);
		if (strstr(a->text, "broke the protocol")) /* neither host of this world ever does */
			world_fail(h->w, "host %u: %s", h->id, a->text);
		return;
	case ACT_SERVING:
	case ACT_CHANGED:
		return;
	}
}

/* ---- a host's life ---- */

/* What it sees may be of before anything that comes between: it is known for what it is by its version. */
static void usage_job(void *arg)
{
	struct host *h = arg;
	(void)WATCHED((repl_exec_look_usage(&h->x), 0));
	h->usage_busy = false;
}

void host_tick(struct world *w, void *arg, uint64_t life)
{
	struct host *h = arg;
	if (!h->up || h->life != life)
		return;
	bool known = repl_exec_usage_known(&h->x);
	if (!h->usage_busy && !h->closing && (!known || w->now - h->usage_ns >= SEC)) {
		h->usage_busy = true;
		h->usage_ns = w->now;
		host_spawn(h, usage_job, h, start_delay(h));
	}
	struct repl_event ev = {.type = EV_TICK, .usage = known ? &h->x.usage : NULL};
	if (h->conn)
		ev.heard_ns = h->conn->waiting ? (h->conn->waited_ns = w->now) : h->conn->heard_ns;
	host_step(h, &ev);
	if (h->closing)
		host_shutdown_end(h);
	if (h->up && h->life == life)
		world_at(w, 80 * MS + world_below(w, 40 * MS), host_tick, h, life);
}

int host_open(struct host *h)
{
	struct world *w = h->w;
	struct err e = {0};
	struct repl_meta *m = NULL;
	struct repl_init_args a = {
	    .random_seed = world_random(w) | 1, .now_ns = w->now, .power = w->cfg.power, .emit = emit, .emit_arg = h};
	int err = WATCHED(store_open_on(h->storage, "sim", -1, &h->store, &e));
	if (!err)
		err = WATCHED(store_load_group(h->store, GROUP_NAME, &m, &e));
	if (!err)
		err = WATCHED(repl_exec_open(&h->x, h->store, m, &e));
	if (err) {
		world_note(w, "host %u: open: %s", h->id, e.text);
		free(m);
		return err;
	}
	mutex_init(&h->lock);
	pthread_rwlock_init(&h->view, NULL);
	h->core = malloc(repl_size());
	h->metas[0] = m;
	h->metas[1] = malloc(sizeof(*m));
	h->save.meta = malloc(sizeof(*m));
	h->x.core = h->core;
	h->x.lock = &h->lock;
	a.store = store_info(h->store)->uuid;
	a.meta = m;
	a.next = h->metas[1];
	for (uint32_t i = 0; i < m->n_volumes; i++)
		a.volume_memory[i] = h->x.maps[i];
	h->apply = NULL;
	h->apply_tail = &h->apply;
	h->apply_count = 0;
	h->appliers = 0;
	h->flush = h->active_flush = h->marks = (struct round){0};
	h->serving = repl_serving(m, false);
	h->base = m->base;
	h->stream_bytes = 0;
	h->stream_max = (64U << 10) << world_below(w, 6);
	h->saving = h->usage_busy = false;
	h->in_step = 1; /* it may emit */
	repl_init(h->core, &a);
	h->in_step = 0;
	err = WATCHED(repl_exec_load_intents(&h->x, &e));
	if (err)
		world_note(w, "host %u: open: %s", h->id, e.text);
	return err;
}

void shell_complete_all(struct host *h)
{
	while (h->ios)
		guest_end(h, h->ios, -ERR_IO);
	while (h->streams)
		shell_stream_free(h, h->streams);
	while (h->commands)
		command_end(h->commands, -ERR_CANCELED);
}

void host_close(struct host *h)
{
	repl_exec_close(&h->x);
	memset(&h->x, 0, sizeof(h->x));
	free(h->core);
	free(h->metas[0]);
	free(h->metas[1]);
	free(h->save.meta);
	h->core = NULL;
	h->metas[0] = h->metas[1] = h->save.meta = NULL;
	store_close(h->store);
	h->store = NULL;
}
