/* Every point of fixed scripts at which something can break.
 *
 *   crash points  each change of a host's disk is its last: not done or half done (done is the next one not done);
 *                 then a power cut that keeps none, some or all of what was not synced, or a kill; on both hosts
 *   fail points   each call of a host's storage fails once, or all from it on until the faults are over
 *   alloc points  each allocation of the code under test fails
 *
 * The scripts:
 *
 * - main: some 280 operations: replication, checkpoints, resyncs, failovers, a stop, a split brain; on_io_error=pass
 * - detach: the primary's disk fails; its guest goes on through the peer; it is rebuilt; then that again, and a
 * failover
 * - commands: pause, settings, stop and start, failover and failback, switchover both ways, unprotect and protect, on
 *   both hosts
 * - clones: scratches on both hosts, a job, crashes of both
 *
 * A script goes on after that as well as it can; then the faults are over, and all has to come right as after a seed.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/check.h"
#include "tests/sim/sim.h"

#define SCRIPT_SEED 7
#define OP_NS (3 * MS)
#define KEEP_KILLED 3U

struct point {
	enum points_kind kind;
	unsigned script;
	unsigned host;
	uint64_t nth;  /* 0: no fault at all */
	unsigned how;  /* CRASH: enum simstore_stop. FAIL: enum err_code */
	unsigned mode; /* CRASH: enum simstore_keep, or KEEP_KILLED. FAIL: how many calls, 0: all */
};

/* What the script makes without a fault: so many points there are. */
struct cost {
	uint64_t changes[WORLD_HOSTS], calls[WORLD_HOSTS], allocs;
	unsigned ops;
};

struct script {
	struct sim *s;
	uint64_t random;
	unsigned ops;
};

/* ---- the script ---- */

static uint64_t below(struct script *x, uint64_t n)
{
	x->random = x->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (x->random >> 33) % n;
}

static void run(struct script *x, uint64_t ns)
{
	world_run(x->s->w, ns);
}

static void io(struct script *x, unsigned host, enum world_io kind)
{
	uint32_t vol = (uint32_t)below(x, WORLD_VOLUMES);
	/* A few places, so that there is something to save and to overlap with. */
	uint64_t off = below(x, 4) * (300 << 10) + below(x, 16) * 1024, len = 128 + below(x, 9000);

	x->ops++;
	(void)world_io(x->s->w, host, kind, vol, off, len);
	run(x, OP_NS);
}

/* What the manager asks for may fail: that is the fault's right. */
static void command(struct script *x, unsigned host, struct repl_command c)
{
	x->ops++;
	(void)world_command(x->s->w, host, &c, NULL);
	run(x, OP_NS);
}

static void guest(struct script *x, unsigned n)
{
	static const enum world_io kinds[] = {WORLD_WRITE, WORLD_WRITE, WORLD_WRITE, WORLD_FLUSH, WORLD_WRITE,
					      WORLD_ZERO,  WORLD_WRITE, WORLD_READ,  WORLD_FLUSH, WORLD_DISCARD};

	for (unsigned i = 0; i < n; i++) {
		sim_maintain(x->s);
		io(x, x->s->vm, kinds[i % ARRAY_LEN(kinds)]);
	}
}

static void sync_up(struct script *x)
{
	for (unsigned i = 0; i < 20; i++) {
		sim_maintain(x->s);
		if (world_run_until(x->s->w, sim_in_sync, SEC))
			return;
	}
}

static void checkpoint(struct script *x)
{
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_CHECKPOINT});
	run(x, 20 * MS);
}

static void own_writes(struct script *x, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		io(x, !x->s->vm, i % 4 == 3 ? WORLD_FLUSH : i % 4 == 2 ? WORLD_READ : WORLD_WRITE);
}

/* The primary is lost and its peer takes over; then what was lost comes back, as a secondary. */
static void failover(struct script *x, uint64_t number, uint32_t flags, enum world_crash how)
{
	struct sim *s = x->s;
	unsigned survivor = !s->vm;

	world_crash(s->w, s->vm, how);
	x->ops++;
	if (!s->failover_asked &&
	    world_command(s->w, survivor, &(struct repl_command){.cmd = CMD_FAILOVER, .number = number, .flags = flags},
			  &s->failover)) {
		s->failover_asked = true;
		s->failover_host = survivor;
	}
	run(x, 20 * MS);
	guest(x, 12); /* while it is committed, and after */
	sync_up(x);
	guest(x, 4);
}

static void settings(struct script *x, uint64_t protocol, uint64_t on_io_error)
{
	const struct repl_meta *m = world_meta(x->s->w, x->s->vm);

	if (!m)
		return;
	struct repl_command c = {.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = m->settings};
	c.settings.protocol = protocol;
	c.settings.on_io_error = on_io_error;
	c.settings.peer_timeout_ms = 1500;
	command(x, x->s->vm, c);
}

static void part_replicate(struct script *x)
{
	const struct repl_meta *m;

	settings(x, PROTOCOL_F, ON_IO_ERROR_PASS); /* a disk that fails is the guest's to see */
	for (unsigned i = 0; i < 10; i++)
		io(x, 0, i % 4 == 3 ? WORLD_FLUSH : WORLD_WRITE);
	sync_up(x);
	for (unsigned i = 0; i < 4; i++) {
		guest(x, 20);
		checkpoint(x);
		own_writes(x, i == 1 ? 6 : 0);
	}
	command(x, !x->s->vm, (struct repl_command){.cmd = CMD_DISCARD});
	checkpoint(x);
	m = world_meta(x->s->w, !x->s->vm);
	if (m && m->n_ckpts > 2)
		command(x, !x->s->vm,
			(struct repl_command){.cmd = CMD_DROP, .number = m->ckpts[m->n_ckpts - 2].number});
	guest(x, 8);
}

static void part_resync(struct script *x)
{
	world_partition(x->s->w, 200 * MS);
	world_cut(x->s->w);
	guest(x, 24);
	sync_up(x);
	guest(x, 5);
	world_crash(x->s->w, !x->s->vm, WORLD_KILL);
	guest(x, 22);
	sync_up(x);
	world_crash(x->s->w, x->s->vm, WORLD_POWER);
	sync_up(x);
	guest(x, 8);
	checkpoint(x);
}

/* Both sides write while neither hears the other; one of the two is given up. */
static void part_split(struct script *x)
{
	unsigned other = !x->s->vm;

	world_partition(x->s->w, SEC);
	world_cut(x->s->w);
	guest(x, 6);
	command(x, other,
		(struct repl_command){.cmd = CMD_FAILOVER, .flags = FAILOVER_FORCE | FAILOVER_DISCARD_ACTIVE});
	for (unsigned i = 0; i < 6; i++)
		io(x, other, i % 3 == 2 ? WORLD_FLUSH : WORLD_WRITE);
	guest(x, 4);
	sync_up(x);
	guest(x, 6);
}

static void part_stop(struct script *x)
{
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_STOP});
	run(x, 500 * MS);
	guest(x, 8); /* sim_maintain starts it again */
	sync_up(x);
	guest(x, 4);
	world_shutdown(x->s->w, x->s->vm);
	run(x, SEC);
	sync_up(x);
}

/* The next write to the disk of a volume fails on the host of the guest. */
static void disk_fails(struct script *x)
{
	struct host *h = &x->s->w->h[x->s->vm];

	h->had_errors = true;
	(void)simstore_rule_add(h->ss, &(struct simstore_rule){.calls = SIMSTORE_BIT(SIMSTORE_WRITE),
							       .path = "volumes/*/disk.raw",
							       .error = ERR_IO,
							       .nth = 1,
							       .times = 1});
}

static void begin(struct script *x, uint64_t protocol, uint64_t on_io_error)
{
	settings(x, protocol, on_io_error);
	for (unsigned i = 0; i < 6; i++)
		io(x, 0, i % 4 == 3 ? WORLD_FLUSH : WORLD_WRITE);
	sync_up(x);
	guest(x, 8);
	checkpoint(x);
}

static void script_detach(struct script *x)
{
	begin(x, PROTOCOL_F, ON_IO_ERROR_DETACH);
	disk_fails(x);
	for (unsigned i = 0; i < 24; i++) /* no manager mends it yet */
		io(x, x->s->vm, i % 6 == 5 ? WORLD_FLUSH : i % 4 == 3 ? WORLD_READ : WORLD_WRITE);
	checkpoint(x);
	world_crash(x->s->w, x->s->vm, WORLD_POWER);
	run(x, 200 * MS);
	for (unsigned i = 0; i < 8; i++)
		io(x, x->s->vm, i % 4 == 3 ? WORLD_FLUSH : i % 4 == 2 ? WORLD_READ : WORLD_WRITE);
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_RESYNC});
	guest(x, 16);
	sync_up(x);
	disk_fails(x);
	guest(x, 8);
	world_cut(x->s->w);
	guest(x, 8);
	sync_up(x);
	disk_fails(x);
	for (unsigned i = 0; i < 8; i++)
		io(x, x->s->vm, i % 4 == 3 ? WORLD_FLUSH : WORLD_WRITE);
	failover(x, FAILOVER_LATEST, FAILOVER_DISCARD_ACTIVE, WORLD_KILL);
	checkpoint(x);
	guest(x, 6);
}

/* The guest moves with the role, under its own requests. */
static void switchover(struct script *x)
{
	struct sim *s = x->s;

	x->ops++;
	for (unsigned i = 0; i < 4; i++)
		io(x, s->vm, i % 3 == 2 ? WORLD_FLUSH : WORLD_WRITE);
	if (!s->switchover_asked &&
	    world_command(s->w, s->vm, &(struct repl_command){.cmd = CMD_SWITCHOVER}, &s->switchover)) {
		s->switchover_asked = true;
		s->switchover_host = s->vm;
	}
	io(x, s->vm, WORLD_WRITE);
	run(x, 100 * MS);
	guest(x, 6);
	sync_up(x);
}

static void script_commands(struct script *x)
{
	const struct repl_meta *m;

	begin(x, PROTOCOL_C, ON_IO_ERROR_PASS);
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_PAUSE});
	guest(x, 8);
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_RESUME});
	guest(x, 6);
	sync_up(x);
	settings(x, PROTOCOL_B, ON_IO_ERROR_DETACH);
	guest(x, 8);
	own_writes(x, 6);
	command(x, !x->s->vm, (struct repl_command){.cmd = CMD_STOP}); /* from the other side, over active */
	run(x, 200 * MS);
	io(x, x->s->vm, WORLD_WRITE);
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_START});
	guest(x, 6);
	sync_up(x);
	checkpoint(x);
	guest(x, 4);
	checkpoint(x);
	m = world_meta(x->s->w, !x->s->vm);
	command(
	    x, !x->s->vm,
	    (struct repl_command){.cmd = CMD_FAILOVER,
				  .number = m && m->n_ckpts > 1 ? m->ckpts[m->n_ckpts - 2].number : FAILOVER_DEFAULT,
				  .flags = FAILOVER_DISCARD_ACTIVE});
	run(x, 100 * MS);
	x->s->vm = !x->s->vm;
	for (unsigned i = 0; i < 6; i++)
		io(x, x->s->vm, i % 3 == 2 ? WORLD_FLUSH : WORLD_WRITE);
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_FAILBACK, .text = "peer"});
	guest(x, 8);
	sync_up(x);
	checkpoint(x);
	switchover(x);
	switchover(x);
	command(x, x->s->vm, (struct repl_command){.cmd = CMD_UNPROTECT});
	run(x, 200 * MS);
	command(x, !x->s->vm, (struct repl_command){.cmd = CMD_UNPROTECT});
	for (unsigned i = 0; i < 4; i++)
		io(x, x->s->vm, WORLD_WRITE);
	command(x, x->s->vm,
		(struct repl_command){.cmd = CMD_PROTECT, .text = "peer", .flags = WIRE_JOIN_ADOPT | PROTECT_HASH});
	guest(x, 8);
	sync_up(x);
	checkpoint(x);
	guest(x, 4);
}

static void clone_named(struct script *x, unsigned host, enum repl_cmd cmd, const char *name, uint64_t number)
{
	struct repl_command c = {.cmd = cmd, .number = number};

	(void)snprintf(c.text, sizeof(c.text), "%s", name);
	command(x, host, c);
	run(x, 5 * MS);
}

static void clone_work(struct script *x, unsigned host, unsigned n)
{
	static const enum world_io kinds[] = {WORLD_WRITE, WORLD_ZERO, WORLD_WRITE, WORLD_FLUSH, WORLD_READ};

	for (unsigned i = 0; i < n; i++) {
		x->ops++;
		world_clone_io(x->s->w, host, 0, kinds[i % ARRAY_LEN(kinds)], below(x, 4) * (300 << 10),
			       128 + below(x, 9000));
		run(x, OP_NS);
	}
}

/* Scratches of a checkpoint on the secondary, and of one that was taken for a job on the primary; jobs come and go. */
static void script_clones(struct script *x)
{
	const struct repl_meta *m;

	begin(x, PROTOCOL_F, ON_IO_ERROR_PASS);
	m = world_meta(x->s->w, !x->s->vm);
	clone_named(x, !x->s->vm, CMD_CLONE, "c", m && m->n_ckpts ? m->ckpts[m->n_ckpts - 1].number : 1);
	clone_work(x, !x->s->vm, 6);
	guest(x, 6);
	checkpoint(x);
	clone_work(x, !x->s->vm, 10);
	world_crash(x->s->w, !x->s->vm, WORLD_POWER);
	guest(x, 4);
	sync_up(x);
	clone_work(x, !x->s->vm, 5);
	clone_named(x, x->s->vm, CMD_HOLD, "job 1", 0);
	guest(x, 6);
	m = world_meta(x->s->w, x->s->vm);
	clone_named(x, x->s->vm, CMD_CLONE, "d", m && m->n_ckpts ? m->ckpts[m->n_ckpts - 1].number : 1);
	clone_named(x, x->s->vm, CMD_UNHOLD, "job 1", m && m->n_ckpts ? m->ckpts[m->n_ckpts - 1].number : 1);
	guest(x, 4);
	clone_work(x, x->s->vm, 5);
	world_crash(x->s->w, x->s->vm, WORLD_POWER);
	sync_up(x);
	clone_work(x, x->s->vm, 5);
	clone_named(x, !x->s->vm, CMD_UNCLONE, "c", 0);
	failover(x, FAILOVER_DEFAULT, FAILOVER_DISCARD_ACTIVE, WORLD_KILL);
	clone_named(x, !x->s->vm, CMD_UNCLONE, "d", 0);
	checkpoint(x);
	guest(x, 4);
}

static void script_main(struct script *x)
{
	part_replicate(x);
	part_resync(x);
	own_writes(x, 5);
	guest(x, 8);
	failover(x, FAILOVER_DEFAULT, 0, WORLD_KILL);
	checkpoint(x);
	guest(x, 8);
	part_stop(x);
	guest(x, 10);
	part_split(x);
	failover(x, FAILOVER_LATEST, FAILOVER_DISCARD_ACTIVE, WORLD_POWER);
	checkpoint(x);
	guest(x, 10);
}

static const struct {
	const char *name;
	void (*run)(struct script *x);
} scripts[] = {
    {"main", script_main}, {"detach", script_detach}, {"commands", script_commands}, {"clones", script_clones}};

/* ---- a run ---- */

static uint64_t calls_of(const struct simstore_counters *c)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < SIMSTORE_CALLS; i++)
		n += c->calls[i];
	return n;
}

static void cost_add(struct world *w, struct cost *c, uint64_t sign)
{
	for (unsigned i = 0; i < WORLD_HOSTS; i++) {
		const struct simstore_counters *n = simstore_counters(world_store(w, i));

		c->changes[i] += sign * n->changes;
		c->calls[i] += sign * calls_of(n);
	}
	c->allocs += sign * simalloc_counted();
}

static void arm(struct world *w, const struct point *p)
{
	struct host *h = &w->h[p->host];

	if (p->nth == 0)
		return;
	if (p->kind == POINTS_CRASH) {
		h->point = p->mode == KEEP_KILLED ? WORLD_KILL : WORLD_POWER;
		h->point_keep = p->mode == KEEP_KILLED ? -1 : (int)p->mode;
		h->crash_point = true;
		simstore_stop_at(h->ss, p->nth, (enum simstore_stop)p->how);
		return;
	}
	/* Its peer too: what the fault has broken may be seen there. */
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		w->h[i].faulty = w->h[i].had_errors = true;
	if (p->kind == POINTS_ALLOC)
		simalloc_fail_nth(p->nth);
	else
		(void)simstore_rule_add(
		    h->ss, &(struct simstore_rule){
			       .calls = SIMSTORE_ALL, .error = (int)p->how, .nth = p->nth, .times = p->mode});
}

static const char *const kind_names[] = {"crash", "fail", "alloc"};

static void point_text(const struct point *p, char *out, size_t size)
{
	(void)snprintf(out, size, "%s:%s:%u:%" PRIu64 ":%u:%u", scripts[p->script].name, kind_names[p->kind], p->host,
		       p->nth, p->how, p->mode);
}

static void point_run(const struct point *p, bool verbose, struct cost *ret)
{
	char what[64], replay[96];
	struct cost cost = {0};

	point_text(p, what, sizeof(what));
	(void)snprintf(replay, sizeof(replay), "sim --point %s -v", what);
	sim_replay_set(replay);
	struct world_config c = {
	    .seed = SCRIPT_SEED, .power = true, .calm = true, .verbose = verbose, .replay = replay};
	struct sim s = {.w = world_new(&c)};
	struct script x = {.s = &s};
	the_sim = &s;
	cost_add(s.w, &cost, UINT64_MAX); /* - 1 */
	arm(s.w, p);
	scripts[p->script].run(&x);
	cost_add(s.w, &cost, 1);
	cost.ops = x.ops;
	sim_settle(&s);
	world_free(s.w);
	if (ret)
		*ret = cost;
}

/* ---- many ---- */

static uint64_t crash_points(unsigned script, const struct cost *c, uint64_t stride, uint64_t offset)
{
	uint64_t runs = 0;

	for (unsigned host = 0; host < WORLD_HOSTS; host++)
		for (uint64_t n = 1 + offset; n <= c->changes[host]; n += stride)
			for (unsigned how = SIMSTORE_NOT_DONE; how <= SIMSTORE_HALF_DONE; how++)
				for (unsigned mode = 0; mode <= KEEP_KILLED; mode++, runs++)
					point_run(&(struct point){POINTS_CRASH, script, host, n, how, mode}, false,
						  NULL);
	return runs;
}

static uint64_t fail_points(unsigned script, const struct cost *c, uint64_t stride, uint64_t offset)
{
	static const unsigned errors[] = {ERR_IO, ERR_NOSPC};
	uint64_t runs = 0;

	for (unsigned host = 0; host < WORLD_HOSTS; host++)
		for (uint64_t n = 1 + offset; n <= c->calls[host]; n += stride)
			for (unsigned e = 0; e < ARRAY_LEN(errors); e++)
				for (unsigned times = 0; times < 2; times++, runs++)
					point_run(&(struct point){POINTS_FAIL, script, host, n, errors[e], times},
						  false, NULL);
	return runs;
}

static uint64_t alloc_points(unsigned script, const struct cost *c, uint64_t stride, uint64_t offset)
{
	uint64_t runs = 0;

	for (uint64_t n = 1 + offset; n <= c->allocs; n += stride, runs++)
		point_run(&(struct point){POINTS_ALLOC, script, 0, n, 0, 0}, false, NULL);
	return runs;
}

static uint64_t script_points(unsigned script, enum points_kind kind, uint64_t stride, uint64_t offset)
{
	struct cost c;
	uint64_t runs;

	point_run(&(struct point){.kind = kind, .script = script}, false, &c);
	runs = kind == POINTS_CRASH  ? crash_points(script, &c, stride, offset)
	       : kind == POINTS_FAIL ? fail_points(script, &c, stride, offset)
				     : alloc_points(script, &c, stride, offset);
	printf("sim: %s: %s points: %" PRIu64 " runs, every %" PRIu64 "th of %" PRIu64 " and %" PRIu64
	       " of the hosts' %s, in a "
	       "script of %u operations\n",
	       scripts[script].name, kind_names[kind], runs, stride,
	       kind == POINTS_CRASH  ? c.changes[0]
	       : kind == POINTS_FAIL ? c.calls[0]
				     : c.allocs,
	       kind == POINTS_CRASH  ? c.changes[1]
	       : kind == POINTS_FAIL ? c.calls[1]
				     : 0,
	       kind == POINTS_CRASH  ? "changes"
	       : kind == POINTS_FAIL ? "calls"
				     : "allocations",
	       c.ops);
	fflush(stdout);
	return runs;
}

uint64_t points_run(enum points_kind kind, uint64_t stride, uint64_t offset)
{
	uint64_t runs = 0;

	for (unsigned i = 0; i < ARRAY_LEN(scripts); i++)
		runs += script_points(i, kind, stride, offset);
	return runs;
}

bool points_replay(const char *what, bool verbose)
{
	char script[16], kind[16];
	struct point p = {0};

	if (sscanf(what, "%15[a-z]:%15[a-z]:%u:%" SCNu64 ":%u:%u", script, kind, &p.host, &p.nth, &p.how, &p.mode) !=
		6 ||
	    p.host >= WORLD_HOSTS)
		return false;
	while (strcmp(script, scripts[p.script].name) != 0)
		if (++p.script == ARRAY_LEN(scripts))
			return false;
	for (p.kind = 0; p.kind < POINTS_KINDS; p.kind++)
		if (strcmp(kind, kind_names[p.kind]) == 0) {
			point_run(&p, verbose, NULL);
			return true;
		}
	return false;
}
