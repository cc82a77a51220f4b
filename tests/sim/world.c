/* The clock of the simulated world, its faults, and the hosts' lives (world.h).
 *
 * Everything that happens is an event on one heap, at a time; times are drawn from the seed, mostly short and sometimes
 * long, so that any order that the real threads, disks and networks could bring comes up. Code that runs in a thread in
 * the daemon runs in a coroutine here; between two of its stops nothing else runs.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "tests/sim/world_internal.h"

/* ---- the seed ---- */

static uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

uint64_t world_random(struct world *w)
{
	return mix(w->random += UINT64_C(0x9e3779b97f4a7c15));
}

uint64_t world_below(struct world *w, uint64_t n)
{
	return n ? world_random(w) % n : 0;
}

uint64_t world_more(struct world *w, uint64_t n)
{
	return mix(w->more += UINT64_C(0x9e3779b97f4a7c15)) % n;
}

bool world_chance(struct world *w, unsigned one_in)
{
	return one_in && world_random(w) % one_in == 0;
}

uint64_t world_delay(struct world *w, uint64_t mean_ns)
{
	uint64_t ns = 1 + world_below(w, 2 * mean_ns);
	if (!w->calm && w->slow_one_in && world_chance(w, w->slow_one_in))
		ns *= 1 + world_below(w, 100);
	return ns;
}

/* The code under test draws from the seed too. */
static struct world *the_world;
void __wrap_random_bytes(void *buf, size_t n);
uint64_t __wrap_random_u64_nonzero(void);

void __wrap_random_bytes(void *buf, size_t n)
{
	for (uint8_t *p = buf; n; n--)
		*p++ = (uint8_t)world_random(the_world);
}

uint64_t __wrap_random_u64_nonzero(void)
{
	uint64_t v = world_random(the_world);
	return v ? v : 1;
}

/* ---- what is said ---- */

void world_note(struct world *w, const char *fmt, ...)
{
	if (!w->cfg.verbose)
		return;
	va_list ap;
	va_start(ap, fmt);
	fprintf(stderr, "%4" PRIu64 ".%06" PRIu64 " ", w->now / SEC, w->now % SEC / US);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
}

void world_fail(struct world *w, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	fflush(stdout);
	fprintf(stderr, "sim: seed %" PRIu64 ", at %" PRIu64 ".%06" PRIu64 " s: ", w->cfg.seed, w->now / SEC,
		w->now % SEC / US);
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, "\n");
	va_end(ap);
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		const struct repl_meta *m = w->h[i].up ? repl_meta(w->h[i].core) : NULL;
		if (m)
			fprintf(stderr,
				"  host %u: %s %s link %s current %" PRIx64 " bitmap %" PRIx64
				"%s%s%s%s%s base %" PRIu64 " last_stream %" PRIu64 " kept %" PRIu64 " target %" PRIu64
				"\n",
				i, role_name(m->role), state_name(m->state), link_state_name(world_link(w, i)),
				m->lineage.current, m->lineage.bitmap, m->alone ? " alone" : "",
				m->inconsistent ? " inconsistent" : "", m->split_brain ? " split" : "",
				m->shut_out ? " shut_out" : "", repl_holding(w->h[i].core) ? " holding" : "", m->base,
				m->last_stream, m->kept, m->target);
		else
			fprintf(stderr, "  host %u: down\n", i);
	}
	fprintf(stderr, "  replay: %s\n", w->cfg.replay ? w->cfg.replay : "?");
	fflush(stderr);
	exit(1);
}

/* ---- the clock ---- */

static bool before(const struct sim_event *a, const struct sim_event *b)
{
	return a->at != b->at ? a->at < b->at : a->order < b->order;
}

void world_at(struct world *w, uint64_t ns, void (*fn)(struct world *w, void *arg, uint64_t n), void *arg, uint64_t n)
{
	if (w->n_heap == w->cap_heap) {
		w->cap_heap = w->cap_heap ? 2 * w->cap_heap : 256;
		w->heap = simrealloc(w->heap, w->cap_heap * sizeof(*w->heap));
	}
	struct sim_event e = {w->now + ns, w->order++, fn, arg, n};
	size_t i = w->n_heap++;
	for (; i && before(&e, &w->heap[(i - 1) / 2]); i = (i - 1) / 2)
		w->heap[i] = w->heap[(i - 1) / 2];
	w->heap[i] = e;
}

static struct sim_event heap_pop(struct world *w)
{
	struct sim_event top = w->heap[0], e = w->heap[--w->n_heap];
	size_t i = 0;
	for (size_t k; (k = 2 * i + 1) < w->n_heap; i = k) {
		if (k + 1 < w->n_heap && before(&w->heap[k + 1], &w->heap[k]))
			k++;
		if (!before(&w->heap[k], &e))
			break;
		w->heap[i] = w->heap[k];
	}
	if (w->n_heap)
		w->heap[i] = e;
	return top;
}

static void bury(struct world *w)
{
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		if (w->h[i].up && !w->h[i].dying && simstore_stopped(w->h[i].ss)) {
			world_note(w, "host %u: crash point: %s", i, simstore_fault_text(w->h[i].ss));
			w->h[i].keep = w->h[i].point_keep;
			host_die(&w->h[i], w->h[i].point);
		}
}

static void world_event(struct world *w)
{
	struct sim_event e = heap_pop(w);
	if (e.at > w->now)
		w->now = e.at;
	w->count.events++;
	e.fn(w, e.arg, e.n);
	bury(w);
}

bool world_run_until(struct world *w, bool (*done)(struct world *w), uint64_t limit_ns)
{
	uint64_t end = w->now + limit_ns;
	for (;;) {
		if (done && done(w))
			return true;
		if (w->n_heap == 0 || w->heap[0].at > end)
			break;
		world_event(w);
	}
	w->now = w->now > end ? w->now : end;
	return false;
}

void world_run(struct world *w, uint64_t ns)
{
	(void)world_run_until(w, NULL, ns);
}

/* ---- coroutines ---- */

static void host_resume(struct host *h, struct co *c)
{
	if (!co_resume(c))
		return;
	unsigned i = 0;
	while (h->cos[i] != c)
		i++;
	h->cos[i] = h->cos[--h->n_cos];
}

static void on_wake(struct world *w, void *arg, uint64_t turn)
{
	struct co *c = arg;
	(void)w;
	if (co_turn(c) == turn)
		host_resume(co_owner(c), c);
}

void host_spawn(struct host *h, void (*fn)(void *arg), void *arg, uint64_t delay_ns)
{
	PRE(h->n_cos < sizeof(h->cos) / sizeof(h->cos[0]));
	struct co *c = co_new(fn, arg, h);
	h->cos[h->n_cos++] = c;
	world_at(h->w, delay_ns, on_wake, c, co_turn(c));
}

void co_pause(struct host *h, uint64_t ns)
{
	if (h->dying)
		return;
	struct co *c = co_current();
	PRE(c != NULL);
	world_at(h->w, ns, on_wake, c, co_turn(c));
	co_yield ();
}

static void lock_wait(void)
{
	struct host *h = co_owner(co_current());
	if (h->dying)
		co_yield ();
	else
		co_pause(h, 1 + world_below(h->w, 20 * US));
}

/* ---- a host's life ---- */

/* In `process` what a failed sync loses is lost for good, words and all: that is said with EIO, and not looked into. */
static void host_rules(struct host *h)
{
	unsigned calls = SIMSTORE_CHANGES | SIMSTORE_BIT(SIMSTORE_READ) | SIMSTORE_BIT(SIMSTORE_OPEN);
	if (!h->w->cfg.power)
		calls &= ~SIMSTORE_BIT(SIMSTORE_SYNC);
	simstore_rules_clear(h->ss);
	if (h->errors_one_in)
		(void)simstore_rule_add(
		    h->ss, &(struct simstore_rule){.calls = calls, .error = ERR_IO, .one_in = h->errors_one_in});
	if (h->path_errors.error == ERR_NOSPC)
		calls = SIMSTORE_BIT(SIMSTORE_CREATE) | SIMSTORE_BIT(SIMSTORE_WRITE) | SIMSTORE_BIT(SIMSTORE_ZERO) |
			SIMSTORE_BIT(SIMSTORE_SET_SIZE);
	if (h->path_errors.path)
		(void)simstore_rule_add(h->ss, &(struct simstore_rule){.calls = calls,
								       .path = h->path_errors.path,
								       .error = h->path_errors.error,
								       .one_in = h->path_errors.one_in});
}

/* All that runs is run to its end: every call of its storage fails by now, and no step is made. */
static void drain(struct host *h)
{
	while (h->n_cos)
		for (unsigned i = 0; i < h->n_cos; i++)
			host_resume(h, h->cos[i]);
}

static void on_start(struct world *w, void *arg, uint64_t life);
static void path_errors_over(struct world *w, void *arg, uint64_t until);

static void plan_start(struct host *h, uint64_t ns)
{
	world_at(h->w, ns, on_start, h, h->life);
}

/* Whether the store has the group by now: a crash in its making leaves all or nothing of it. */
static bool still_bare(struct host *h)
{
	struct err e = {0};
	struct store *st;
	struct repl_meta *m = NULL;
	int err = store_open_on(h->storage, "sim", -1, &st, &e);
	if (err) /* on_start tells what that means */
		return false;
	err = store_load_group(st, GROUP_NAME, &m, &e);
	free(m);
	store_close(st);
	return err == -ERR_NOENT;
}

static void on_start(struct world *w, void *arg, uint64_t life)
{
	struct host *h = arg;
	if (h->up || h->life != life || !h->wanted)
		return;
	enum world_crash how = h->crash;
	bool evict = h->evict;
	if (simstore_stopped(h->ss)) {
		int keep = h->keep < 0 ? (int)world_below(w, 3) : h->keep;
		if (how == WORLD_POWER)
			simstore_power_cut(h->ss, (enum simstore_keep)keep);
		else
			simstore_restart(h->ss);
		h->keep = -1;
		if (how == WORLD_KILL && evict)
			simstore_evict(h->ss);
	}
	world_note(w, "host %u starts", h->id);
	if (h->bare && still_bare(h)) {
		h->making = false;
		return;
	}
	int err = host_open(h);
	if (err) {
		world_note(w, "host %u does not start: %s", h->id, err_name(err));
		if (!h->errors_one_in && !h->path_errors.path && !h->full && !h->crash_point && !h->faulty)
			world_fail(w, "host %u does not start: %s", h->id, err_name(err));
		if (simstore_stopped(h->ss) && h->point == WORLD_POWER) {
			h->crash = WORLD_POWER; /* a crash point in the start itself */
			h->keep = h->point_keep;
		}
		if (!simstore_stopped(h->ss))
			simstore_stop(h->ss);
		h->dying = true; /* what the core has asked for already: nothing of it is carried out */
		drain(h);
		h->dying = false;
		host_close(h);
		h->life++;
		h->tries++;
		if (h->tries > 3) { /* somebody looks after it */
			path_errors_over(w, h, h->path_errors.until);
			world_disk_errors(w, h->id, 0);
			world_disk_full(w, h->id, false);
			h->crash_point = false;
			simstore_stop_at(h->ss, 0, SIMSTORE_NOT_DONE);
		}
		plan_start(h, world_delay(w, 100 * MS));
		return;
	}
	h->tries = 0;
	h->w->count.made += h->bare;
	h->bare = h->making = false;
	h->crash_point = simstore_stop_pending(h->ss);
	bool errors = h->errors_one_in != 0 || h->path_errors.path || h->faulty, full = h->full;
	h->had_errors |= errors; /* what is found was made in the life before */
	h->had_full |= full;
	h->up = true;
	model_opened(h, how, evict);
	h->had_errors = errors;
	h->had_full = full;
	host_tick(w, h, h->life);
}

static void host_down(struct host *h, enum world_crash how, uint64_t back_ns)
{
	h->dying = true;
	h->crash = how;
	h->evict = true; /* what a failed sync has lost: an open asks the medium (STORAGE_FRESH) */
	model_died(h, how, h->evict);
	drain(h);
	net_host_died(h, how);
	shell_complete_all(h);
	host_close(h);
	h->up = h->dying = h->closing = false;
	h->life++;
	h->stalled_until = 0;
	h->wanted = true;
	plan_start(h, back_ns);
}

void host_die(struct host *h, enum world_crash how)
{
	struct world *w = h->w;
	if (!simstore_stopped(h->ss))
		simstore_stop(h->ss);
	w->count.crashes[how]++;
	world_note(w, "host %u %s", h->id, how == WORLD_POWER ? "loses power" : "is killed");
	host_down(h, how, w->calm ? 10 * MS : world_delay(w, 300 * MS));
}

void world_crash(struct world *w, unsigned host, enum world_crash how)
{
	if (w->h[host].up)
		host_die(&w->h[host], how == WORLD_POWER && !w->cfg.power ? WORLD_KILL : how);
}

void world_crash_at(struct world *w, unsigned host, enum world_crash how, uint64_t nth)
{
	struct host *h = &w->h[host];
	h->point = how == WORLD_POWER && !w->cfg.power ? WORLD_KILL : how;
	h->point_keep = -1;
	h->crash_point = true;
	simstore_stop_at(h->ss, nth, (enum simstore_stop)world_below(w, 3));
}

/* A manager that does not wait for the end of a commit. */
static void hasty(struct world *w, void *arg, uint64_t life)
{
	struct host *h = arg;
	if (h->up && h->life == life)
		(void)world_command(w, h->id, &(struct repl_command){.cmd = CMD_FAILBACK, .text = "peer"}, NULL);
}

void world_moment(struct host *h)
{
	struct world *w = h->w;
	if (w->cruel && !w->calm && h->seen->state == STATE_FAILOVER)
		world_at(w, world_more(w, 5 * MS), hasty, h, h->life);
	if (!w->cruel || w->calm || world_more(w, 24) != 0)
		return;
	unsigned id = world_more(w, 4) ? h->id : !h->id;
	if (w->h[id].up && !w->h[id].crash_point)
		world_crash_at(w, id, WORLD_POWER, 1 + world_more(w, 6));
}

void world_shutdown(struct world *w, unsigned host)
{
	struct host *h = &w->h[host];
	if (!h->up || h->closing)
		return;
	world_note(w, "host %u: shutdown", host);
	h->closing = true;
	host_step(h, &(struct repl_event){.type = EV_SHUTDOWN});
	h->shutdown_until = w->now + 8 * SEC;
}

/* From the tick: all is quiet, or it has taken too long. */
void host_shutdown_end(struct host *h)
{
	struct world *w = h->w;
	if (h->n_cos && w->now < h->shutdown_until)
		return;
	if (h->n_cos == 0) {
		uint64_t mark;
		model_sync_begin(h, &mark);
		if (repl_exec_sync_actives(&h->x) == 0)
			model_synced(h, mark, MODEL_ACTIVES);
		(void)repl_exec_end(&h->x);
	}
	simstore_stop(h->ss);
	world_note(w, "host %u has ended", h->id);
	host_down(h, WORLD_KILL, world_delay(w, 200 * MS));
}

struct make {
	struct host *h;
	struct wire_join j;
};

static void make_job(void *arg)
{
	struct make *k = arg;
	struct host *h = k->h;
	struct err e = {0};
	struct store *st;
	struct repl_meta *m = simalloc(sizeof(*m));
	int err = store_open_on(h->storage, "sim", -1, &st, &e);
	if (!err) {
		err = repl_exec_make(st, &k->j, m, &e);
		store_close(st);
	}
	world_note(h->w, "host %u: making the recovery volumes: %s", h->id, err ? e.text : "ok");
	simfree(m);
	simfree(k);
	/* h->making lasts until on_start has seen what came of it. The daemon makes the volumes and takes the group up
	 * under one lock, and the next JOIN finds it: a second making, in a host that has started, is nothing that can
	 * be. */
	h->crash = h->point; /* if that ended it */
	h->life++;
	plan_start(h, 1 * MS);
}

void host_make(struct host *h, const struct wire_join *j)
{
	if (h->making)
		return;
	struct make *k = simalloc(sizeof(*k));
	k->h = h;
	k->j = *j;
	h->making = true;
	host_spawn(h, make_job, k, world_delay(h->w, h->w->disk_ns));
}

void world_replace(struct world *w, unsigned host)
{
	struct host *h = &w->h[host];
	struct store *st;
	struct err e;
	host_die(h, WORLD_KILL);
	world_note(w, "host %u is replaced", host);
	sim_storage_free(h->storage);
	simstore_free(h->ss);
	h->ss = simstore_new(world_more(w, UINT64_MAX));
	h->storage = sim_storage_new(h);
	h->path_errors.path = NULL;
	world_disk_errors(w, host, 0);
	world_disk_full(w, host, false);
	h->crash_point = false;
	if (store_open_on(simstore_storage(h->ss), "sim", w->cfg.power ? DURABILITY_POWER : DURABILITY_PROCESS, &st,
			  &e) < 0)
		world_fail(w, "making the store of host %u: %s", host, e.text);
	store_close(st);
	h->bare = true;
	h->making = false;
	h->life++; /* it waits for a JOIN */
	model_replaced(h);
	w->count.replaced++;
}

bool world_bare(const struct world *w, unsigned host)
{
	return w->h[host].bare;
}

bool world_up(const struct world *w, unsigned host)
{
	return w->h[host].up;
}

struct simstore *world_store(struct world *w, unsigned host)
{
	return w->h[host].ss;
}

/* ---- faults ---- */

void world_stall(struct world *w, unsigned host, uint64_t ns)
{
	w->h[host].stalled_until = w->now + ns;
}

void world_partition(struct world *w, uint64_t ns)
{
	w->partition_until = w->now + ns;
}

void world_flip(struct world *w)
{
	w->flip = true;
}

void world_disk_errors(struct world *w, unsigned host, unsigned one_in)
{
	w->h[host].errors_one_in = one_in;
	w->h[host].had_errors |= one_in != 0;
	host_rules(&w->h[host]);
	if (one_in)
		w->count.disk_errors++;
}

static void path_errors_over(struct world *w, void *arg, uint64_t until)
{
	struct host *h = arg;
	(void)w;
	if (h->path_errors.path == NULL || h->path_errors.until != until)
		return;
	h->path_errors.path = NULL;
	h->path_errors.error = 0;
	host_rules(h);
}

void world_path_errors(struct world *w, unsigned host, const char *path, int error, unsigned one_in, uint64_t ns)
{
	struct host *h = &w->h[host];
	world_note(w, "host %u: %s: one in %u %s for %" PRIu64 " ms", host, path, one_in, err_name(error), ns / MS);
	h->path_errors.path = path;
	h->path_errors.error = error;
	h->path_errors.one_in = one_in;
	h->path_errors.until = w->now + ns;
	h->had_errors = true;
	host_rules(h);
	w->count.path_errors++;
	world_at(w, ns, path_errors_over, h, h->path_errors.until);
}

void world_disk_full(struct world *w, unsigned host, bool full)
{
	struct host *h = &w->h[host];
	uint64_t free_bytes, total;
	h->full = full;
	h->had_full |= full;
	simstore_set_space(h->ss, UINT64_MAX);
	if (full && storage_free_bytes(simstore_storage(h->ss), &free_bytes, &total) == 0)
		simstore_set_space(h->ss, total - free_bytes + world_below(w, 256 << 10));
}

uint64_t world_wall(const struct world *w, unsigned host)
{
	return w->h[host].wall + w->now;
}

/* The monotonic clock, by which everything happens, never jumps. */
void world_clock_set(struct world *w, unsigned host, uint64_t wall_ns)
{
	world_note(w, "host %u: clock set from %" PRIu64 " s to %" PRIu64 " s", host, world_wall(w, host) / SEC,
		   wall_ns / SEC);
	w->h[host].wall = wall_ns - w->now; /* may wrap */
	w->count.clock_jumps++;
}

void world_quiet(struct host *h, bool on)
{
	h->looking += on ? 1U : -1U;
	simstore_look(h->ss, h->looking != 0);
}

void world_heal(struct world *w)
{
	w->calm = true;
	w->slow_one_in = 0;
	w->flip = false;
	w->partition_until = 0;
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		struct host *h = &w->h[i];
		path_errors_over(w, h, h->path_errors.until);
		world_disk_errors(w, i, 0);
		world_disk_full(w, i, false);
		simstore_stop_at(h->ss, 0, SIMSTORE_NOT_DONE);
		h->stalled_until = 0;
		h->crash_point = h->faulty = false;
	}
	simalloc_fail_nth(0);
}

/* ---- making ---- */

static void make_group(struct host *h)
{
	struct world *w = h->w;
	struct err e;
	struct store *st;
	static const char *const names[WORLD_VOLUMES] = {"a", "b"};
	if (store_open_on(simstore_storage(h->ss), "sim", w->cfg.power ? DURABILITY_POWER : DURABILITY_PROCESS, &st,
			  &e) < 0)
		world_fail(w, "making the store of host %u: %s", h->id, e.text);
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++)
		if (store_create_volume(st, names[v], w->first_size[v], GROUP_NAME, &e) < 0)
			world_fail(w, "making volume %s of host %u: %s", names[v], h->id, e.text);
	store_close(st);
}

struct world *world_new(const struct world_config *c)
{
	struct world *w = simalloc(sizeof(*w));
	the_world = w;
	co_lock_wait = lock_wait;
	w->cfg = *c;
	w->random = mix(c->seed + 1);
	w->more = mix(w->random);
	w->now = SEC; /* 0 means never in places */
	w->calm = c->calm;
	static const unsigned stops[] = {0, 2, 8, 32};
	w->stop_one_in = stops[world_below(w, 4)];
	w->disk_ns = 20 * US + world_below(w, 400 * US);
	w->net_ns = 20 * US + world_below(w, 1 * MS);
	w->slow_one_in = c->calm ? 0 : (unsigned)(10 + world_below(w, 200));
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		uint64_t most = v ? 1500 << 10 : 3600 << 10;
		w->size[v] = c->size[v] ? c->size[v] : (most - world_below(w, most / 2)) / SECTOR_SIZE * SECTOR_SIZE;
		w->first_size[v] = w->size[v];
		w->size[v] += (v + 1) * (100 << 10);
		w->units[v] = UNITS_IN(w->size[v]);
	}
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		struct host *h = &w->h[i];
		h->w = w;
		h->id = i;
		h->wall = UINT64_C(1700000000) * SEC;
		h->ss = simstore_new(world_random(w));
		h->storage = sim_storage_new(h);
		h->wanted = true;
		h->keep = h->point_keep = -1;
		h->life = 1;
		make_group(h);
	}
	model_new(w);
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		on_start(w, &w->h[i], 1);
	return w;
}

void world_free(struct world *w)
{
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		struct host *h = &w->h[i];
		if (h->up) {
			simstore_stop(h->ss);
			host_down(h, WORLD_KILL, 0);
		}
		sim_storage_free(h->storage);
		simstore_free(h->ss);
	}
	net_free(w);
	model_free(w);
	simfree(w->heap);
	simfree(w);
}

/* ---- looking ---- */

uint64_t world_now(const struct world *w)
{
	return w->now;
}

uint64_t world_volume_size(const struct world *w, uint32_t vol)
{
	return w->first_size[vol];
}

const struct world_counters *world_counters(const struct world *w)
{
	return &w->count;
}

const struct repl_meta *world_meta(struct world *w, unsigned host)
{
	return w->h[host].up ? repl_meta(w->h[host].core) : NULL;
}

enum link_state world_link(struct world *w, unsigned host)
{
	struct repl_status s;
	if (!w->h[host].up)
		return LINK_DOWN;
	repl_status(w->h[host].core, w->now, &s);
	return s.link;
}

enum repl_serving world_serving(struct world *w, unsigned host)
{
	struct host *h = &w->h[host];
	return h->up ? repl_serving(repl_meta(h->core), repl_holding(h->core)) : SERVING_EIO;
}

bool world_detached(struct world *w, unsigned host)
{
	return w->h[host].up && repl_detached(w->h[host].core) != 0;
}

bool world_split(struct world *w)
{
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		if (w->h[i].up && repl_meta(w->h[i].core)->split_brain)
			return true;
	return false;
}

bool world_unrelated(struct world *w)
{
	static struct wire_join j[WORLD_HOSTS];
	int source;
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		if (!w->h[i].up)
			return false;
		repl_join(w->h[i].core, &j[i]);
	}
	return lineage_decide(&j[0], &j[1], &source) == LINEAGE_UNRELATED;
}

void world_check(struct world *w)
{
	model_check(w);
}

void world_check_converged(struct world *w)
{
	model_check_all(w);
}
