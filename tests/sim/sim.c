/* The simulator: random operations and faults on two hosts, from a seed; then no faults, and everything has to come
 * right (docs/HACKING.md).
 *
 *   sim [--seeds N] [--first S] [--ops N] [--jobs J] [--list FILE] [--plain]
 *                                                                     those of FILE, then N seeds from S on, in J
 *                                                                     processes; --plain: without mix.c's draws
 *   sim --seed S [-v] [--plain]                                       one seed; -v: with a trace
 *   sim --crash-points|--fail-points|--alloc-points [--stride K] [--offset J]
 *                                                                     every Kth point of the script in points.c
 *   sim --point WHAT [-v]                                             one of them
 *
 * N is REPFS_SIM_SEEDS or 2,000 if it is not given. Exit 1: a promise was broken; the seed and how to replay it are
 * said.
 */
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/check.h"
#include "tests/sim/sim.h"
#include "tests/sim/world_internal.h"

static uint64_t first_seed = 1, seeds = 2000, ops = 1000, only_seed;
static bool one_seed, verbose, plain_seeds;
static unsigned points; /* bits of enum points_kind */
static uint64_t stride = 1, offset;
static const char *one_point;
static unsigned jobs = 1;
static uint64_t current_seed;
static char replay[256];
static const char *list_path;

void sim_replay_set(const char *text)
{
	(void)snprintf(replay, sizeof(replay), "%s", text);
}

/* ---- operations ---- */

static void range_pick(struct sim *s, uint32_t *vol, uint64_t *off, uint64_t *len, uint64_t most)
{
	struct world *w = s->w;
	static const uint64_t lens[] = {128, 512, 1024, 4096, 4096, 8192, 20000, 65536, 200000, 700000};
	uint64_t l = 1 + world_below(w, lens[world_below(w, world_chance(w, 8) ? 10 : 7)]);
	if (!world_chance(w, 4)) {
		unsigned k = (unsigned)world_below(w, 8);
		*vol = s->hot_vol[k];
		*off = s->hot[k] + world_below(w, 24 << 10);
	} else {
		*vol = (uint32_t)world_below(w, WORLD_VOLUMES);
		*off = world_below(w, world_volume_size(w, *vol));
	}
	if (world_chance(w, 3)) {
		*off = *off / BLOCK_SIZE * BLOCK_SIZE;
		l = (l + BLOCK_SIZE - 1) / BLOCK_SIZE * BLOCK_SIZE;
	}
	*len = l < most ? l : most;
}

static unsigned pick_writer(struct sim *s)
{
	struct world *w = s->w;
	if (s->reckless && world_chance(w, 10))
		return (unsigned)world_below(w, 2);
	return s->vm;
}

static void op_io(struct sim *s, unsigned host, enum world_io kind)
{
	uint32_t vol;
	uint64_t off, len;
	range_pick(s, &vol, &off, &len, kind == WORLD_WRITE ? 256 << 10 : 4 << 20);
	if (kind == WORLD_ZERO || kind == WORLD_DISCARD)
		len *= 1 + world_below(s->w, 8);
	(void)world_io(s->w, host, kind, vol, off, len);
}

/* The guest's own requests stay within the view of a secondary where that host is one. */
static void op_other(struct sim *s, enum world_io kind)
{
	unsigned h = !s->vm;
	if (world_serving(s->w, h) == SERVING_VIEW || kind == WORLD_READ)
		op_io(s, h, kind);
}

static void command(struct sim *s, unsigned host, struct repl_command c)
{
	(void)world_command(s->w, host, &c, NULL);
}

static void op_settings(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = s->vm;
	const struct repl_meta *m = world_meta(w, h);
	if (!m)
		return;
	struct repl_command c = {.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = m->settings};
	switch (world_below(w, 5)) {
	case 0:
		c.settings.protocol = world_below(w, 4);
		break;
	case 1:
		c.settings.on_disconnect = world_below(w, 2);
		break;
	case 2:
		c.settings.checkpoint_interval_ms = world_chance(w, 3) ? 0 : 50 + world_below(w, 2000);
		break;
	case 3:
		c.settings.keep_last = 1 + world_below(w, 6);
		break;
	case 4:
		c.settings.failover_to = world_below(w, 2);
		break;
	}
	command(s, h, c);
}

static void op_failover(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = (unsigned)world_below(w, 2);
	const struct repl_meta *m = world_meta(w, h);
	if (!m || m->role != ROLE_SECONDARY || (world_up(w, !h) && !world_chance(w, 4)) || s->failover_asked)
		return;
	struct repl_command c = {.cmd = CMD_FAILOVER};
	switch (world_below(w, 4)) {
	case 0:
		c.number = FAILOVER_LATEST;
		break;
	case 1:
		if (m->n_ckpts)
			c.number = m->ckpts[world_below(w, m->n_ckpts)].number;
		break;
	default:
		c.number = FAILOVER_DEFAULT;
		break;
	}
	if (!world_chance(w, 3))
		c.flags |= FAILOVER_DISCARD_ACTIVE;
	if (s->reckless && world_chance(w, 3))
		c.flags |= FAILOVER_FORCE;
	if (world_command(w, h, &c, &s->failover)) {
		s->failover_asked = true;
		s->failover_host = h;
	}
}

/* By force where a disk of it is detached and its peer has forgotten it: nobody else can help it (docs/adr/0009). The
 * reckless do so while the peer is merely away. */
void sim_unprotect(struct sim *s, unsigned h)
{
	const struct repl_meta *o = world_meta(s->w, !h);
	bool forgotten = world_bare(s->w, !h) || (o && o->role == ROLE_STANDALONE && !o->has_peer);
	bool force = forgotten || (s->reckless && world_detached(s->w, h));
	command(s, h, (struct repl_command){.cmd = CMD_UNPROTECT, .flags = force ? UNPROTECT_FORCE : 0});
}

static void op_command(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = world_chance(w, 4) ? !s->vm : s->vm;
	const struct repl_meta *m = world_meta(w, h);
	if (!m)
		return;
	switch (world_below(w, 27)) {
	case 26:
		sim_unprotect(s, h);
		break;
	case 0 ... 9:
		command(s, h,
			(struct repl_command){.cmd = CMD_CHECKPOINT, .flags = world_chance(w, 8) ? WIRE_CKPT_PIN : 0});
		break;
	case 24:
	case 25:
		command(s, h, (struct repl_command){.cmd = world_chance(w, 3) ? CMD_PAUSE : CMD_RESUME});
		break;
	case 10:
	case 11:
		command(s, !s->vm, (struct repl_command){.cmd = CMD_DISCARD});
		break;
	case 12:
	case 13:
		m = world_meta(w, !s->vm);
		if (m && m->n_ckpts)
			command(s, !s->vm,
				(struct repl_command){.cmd = CMD_DROP,
						      .number = m->ckpts[world_below(w, m->n_ckpts)].number});
		break;
	case 14:
	case 15:
		command(s, h, (struct repl_command){.cmd = CMD_STOP});
		break;
	case 16 ... 19:
		op_settings(s);
		break;
	default:
		op_failover(s);
		break;
	}
}

static void op_fault(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = (unsigned)world_below(w, 2);
	switch (world_below(w, 16)) {
	case 0:
	case 1:
	case 2:
		world_cut(w);
		break;
	case 3:
		world_partition(w, world_below(w, world_chance(w, 4) ? 5 * SEC : 300 * MS));
		break;
	case 4:
		world_stall(w, h, world_below(w, world_chance(w, 4) ? 6 * SEC : 200 * MS));
		break;
	case 5:
	case 6:
		world_crash(w, h, WORLD_KILL);
		break;
	case 7:
	case 8:
		world_crash(w, h, WORLD_POWER);
		break;
	case 9:
	case 10:
	case 11:
		if (world_up(w, h))
			world_crash_at(w, h, world_chance(w, 2) ? WORLD_POWER : WORLD_KILL, 1 + world_below(w, 60));
		break;
	case 12:
		world_flip(w);
		break;
	case 13:
		world_shutdown(w, h);
		break;
	case 14:
		world_disk_errors(w, h, world_chance(w, 2) ? 0 : (unsigned)(20 + world_below(w, 400)));
		break;
	case 15:
		world_disk_full(w, h, world_chance(w, 3));
		break;
	}
}

static void resolve(struct sim *s)
{
	struct world *w = s->w;
	for (unsigned i = 0; i < WORLD_HOSTS; i++) { /* the other was unprotected: nothing will be resolved with it */
		const struct repl_meta *m = world_meta(w, i), *o = world_meta(w, !i);
		if (m && o && m->split_brain && !o->split_brain && o->role == ROLE_STANDALONE && !o->has_peer) {
			sim_unprotect(s, i);
			return;
		}
	}
	unsigned h = (unsigned)world_below(w, 2), loser = s->reckless && world_chance(w, 3) ? s->vm : !s->vm;
	const struct repl_meta *keeper = world_meta(w, !loser);
	if (keeper && (world_detached(w, !loser) || repl_meta_flagged(keeper, VOLUME_STALE))) /* else it is refused */
		loser = !loser;
	keeper = world_meta(w, !loser);
	if (keeper && keeper->role == ROLE_SECONDARY && keeper->state != STATE_DONE) {
		command(s, !loser, (struct repl_command){.cmd = CMD_FAILOVER, .flags = FAILOVER_DISCARD_ACTIVE});
		return;
	}
	command(s, h, (struct repl_command){.cmd = CMD_RESOLVE, .number = loser == h ? DISCARD_LOCAL : DISCARD_PEER});
}

static void protect(struct sim *s, const struct repl_meta *m)
{
	struct world *w = s->w;
	struct repl_command c = {.cmd = CMD_PROTECT, .text = "peer"};
	if (m->failover_generation && !world_chance(w, 4))
		c.cmd = CMD_FAILBACK;
	else if (m->has_peer || world_chance(w, 2))
		c.flags = WIRE_JOIN_ADOPT;
	c.flags |= mix_protect_flags(s);
	command(s, s->vm, c);
}

/* What a manager would do to get the pair back to work. */
/* Two that forgot each other are protected afresh only with equal sizes: somebody makes them so. */
static void even_sizes(struct sim *s)
{
	struct world *w = s->w;
	const struct repl_meta *m[WORLD_HOSTS] = {world_meta(w, 0), world_meta(w, 1)};
	if (!m[0] || !m[1])
		return;
	for (uint32_t v = 0; v < WORLD_VOLUMES; v++) {
		unsigned h = m[0]->volumes[v].size > m[1]->volumes[v].size;
		struct repl_command c = {.cmd = CMD_RESIZE, .flags = v, .number = m[!h]->volumes[v].size};
		if (m[h]->volumes[v].size < c.number && m[h]->role == ROLE_STANDALONE)
			(void)world_command(w, h, &c, NULL);
	}
}

void sim_maintain(struct sim *s)
{
	even_sizes(s);
	struct world *w = s->w;
	if (s->failover_asked && s->failover.done) {
		s->failover_asked = false;
		if (s->failover.error == 0)
			s->vm = s->failover_host;
	}
	if (s->switchover_asked && s->switchover.done) {
		s->switchover_asked = false;
		if (s->switchover.error == 0)
			s->vm = !s->switchover_host;
	}
	const struct repl_meta *m[2] = {world_meta(w, 0), world_meta(w, 1)};
	if (m[0] && m[1] && m[s->vm]->role == ROLE_SECONDARY && m[!s->vm]->role != ROLE_SECONDARY)
		s->vm = !s->vm;	  /* a failover or a resolve was under way */
	if (world_bare(w, s->vm)) /* replaced after a failover of which nobody had heard yet */
		s->vm = !s->vm;
	unsigned h = s->vm;
	for (unsigned i = 0; i < WORLD_HOSTS; i++)
		if (m[i] && m[i]->state == STATE_FAILOVER_FAILED)
			command(s, i, (struct repl_command){.cmd = CMD_FAILOVER});
	if (!m[h])
		return;
	if (world_link(w, h) == LINK_DOWN && world_chance(w, 12)) { /* afresh */
		sim_unprotect(s, (unsigned)world_below(w, 2));
	} else if (m[0] && m[1] && m[0]->split_brain != m[1]->split_brain && !world_chance(w, 4)) {
		/* One has it from before the other was unprotected: only that helps here too. Or the other is stopped,
		 * and learns of it when it connects. */
		unsigned other = !m[1]->split_brain;
		if (m[other]->role == ROLE_PRIMARY && m[other]->state == STATE_DONE)
			command(s, other, (struct repl_command){.cmd = CMD_START});
		else if (m[!other]->role == ROLE_SECONDARY &&
			 (m[!other]->state == STATE_RUNNING ||
			  m[!other]->inconsistent)) /* refuses that, and says this */
			command(s, !other,
				(struct repl_command){.cmd = CMD_FAILOVER,
						      .flags = FAILOVER_DISCARD_ACTIVE |
							       (m[!other]->inconsistent ? FAILOVER_FORCE : 0U)});
		else
			sim_unprotect(s, !other);
	} else if (world_split(w)) {
		resolve(s);
	} else if (m[h]->role == ROLE_STANDALONE && (m[h]->state == STATE_NONE || m[h]->state == STATE_DONE)) {
		if (!m[!h] || m[!h]->role != ROLE_PRIMARY)
			protect(s, m[h]);
		else if (m[!h]->state == STATE_DONE &&
			 !world_chance(w, 3)) /* connected, it learns that it was shut out */
			command(s, !h, (struct repl_command){.cmd = CMD_START});
		else if (m[!h]->state == STATE_DONE || world_unrelated(w) || !m[h]->has_peer)
			sim_unprotect(s, !h);
	} else if (world_detached(w, h) && world_chance(w, 3)) {
		command(s, h, (struct repl_command){.cmd = CMD_RESYNC});
	} else if (m[h]->role == ROLE_PRIMARY &&
		   (world_bare(w, !h) || (m[!h] && m[!h]->role == ROLE_STANDALONE && !m[!h]->has_peer))) {
		sim_unprotect(s, h); /* stops it first */
	} else if (m[h]->role == ROLE_PRIMARY && m[h]->state == STATE_DONE) {
		if (m[!h] && m[!h]->role == ROLE_STANDALONE && !world_chance(w, 3))
			sim_unprotect(s, h);
		else if (m[!h] && m[!h]->role == ROLE_PRIMARY && m[!h]->state == STATE_DONE && world_chance(w, 2))
			command(s, !h, (struct repl_command){.cmd = CMD_START}); /* it is the one that dials, perhaps */
		else
			command(s, h, (struct repl_command){.cmd = CMD_START});
	} else if (m[h]->role == ROLE_PRIMARY && world_unrelated(w)) {
		if (m[h]->state == STATE_RUNNING)
			command(s, h, (struct repl_command){.cmd = CMD_STOP});
		else
			sim_unprotect(s, h);
	} else if (m[!h] && m[h]->role == ROLE_SECONDARY && m[!h]->role == ROLE_SECONDARY &&
		   (!(m[h]->handed || m[!h]->handed) || world_chance(w, 8))) { /* one of them is about to take over */
		command(s, h, (struct repl_command){.cmd = CMD_FAILOVER, .flags = FAILOVER_FORCE});
	}
}

static void op(struct sim *s)
{
	struct world *w = s->w;
	if (world_chance(w, (unsigned)s->fault_one_in)) {
		op_fault(s);
		return;
	}
	if (world_chance(w, 10))
		sim_maintain(s);
	uint64_t k = world_below(w, 100);
	unsigned h = pick_writer(s);
	if (k < 48)
		op_io(s, h, WORLD_WRITE);
	else if (k < 52)
		op_io(s, h, WORLD_ZERO);
	else if (k < 56)
		op_io(s, h, WORLD_DISCARD);
	else if (k < 66)
		op_io(s, h, WORLD_FLUSH);
	else if (k < 76)
		op_io(s, h, WORLD_READ);
	else if (k < 80)
		op_other(s, WORLD_READ_CKPT);
	else if (k < 84)
		op_other(s, WORLD_READ);
	else if (k < 87)
		op_other(s, WORLD_WRITE);
	else if (k < 88)
		op_other(s, WORLD_FLUSH);
	else
		op_command(s);
}

/* ---- a seed ---- */

struct sim *the_sim;

bool sim_in_sync(struct world *w)
{
	unsigned h = the_sim->vm;
	const struct repl_meta *m = world_meta(w, h), *p = world_meta(w, !h);
	return m && p && m->role == ROLE_PRIMARY && m->state == STATE_RUNNING && world_link(w, h) == LINK_SYNCED &&
	       world_link(w, !h) == LINK_SYNCED && p->role == ROLE_SECONDARY && p->state == STATE_RUNNING &&
	       !world_detached(w, h);
}

static bool quiet(struct world *w)
{
	return world_outstanding(w, 0) == 0 && world_outstanding(w, 1) == 0;
}

static bool clean(struct world *w)
{
	struct repl_status st;
	if (!sim_in_sync(w) || !quiet(w))
		return false;
	repl_status(w->h[the_sim->vm].core, w->now, &st);
	bool numbers = world_meta(w, 0)->last_stream == world_meta(w, 1)->last_stream; /* no checkpoint under way */
	return st.dirty_bytes == 0 && numbers && !world_detached(w, the_sim->vm) && w->h[0].n_cos == 0 &&
	       w->h[1].n_cos == 0;
}

static const char *kinds_left(struct world *w)
{
	static char text[256];
	(void)snprintf(text, sizeof(text), "outstanding %u and %u", world_outstanding(w, 0), world_outstanding(w, 1));
	return text;
}

/* The phase without faults: I16. */
void sim_settle(struct sim *s)
{
	struct world *w = s->w;
	world_note(w, "faults are over");
	world_heal(w);
	for (unsigned h = 0; h < WORLD_HOSTS; h++)
		world_crash(w, h, WORLD_KILL);
	bool done = false;
	for (unsigned i = 0; i < 300 && !done; i++) {
		sim_maintain(s);
		command(s, s->vm, (struct repl_command){.cmd = CMD_RESUME});
		const struct repl_meta *p = world_meta(w, !s->vm);
		if (p && p->role == ROLE_SECONDARY && p->state == STATE_RUNNING)
			command(s, !s->vm, (struct repl_command){.cmd = CMD_DISCARD});
		done = world_run_until(w, sim_in_sync, SEC);
	}
	if (!done)
		world_fail(w, "faults are over for 300 s, and the pair is not in sync");
	for (unsigned i = 0; i < 20; i++) {
		op_io(s, s->vm, world_chance(w, 4) ? WORLD_FLUSH : WORLD_WRITE);
		world_run(w, world_below(w, 20 * MS));
	}
	if (!world_run_until(w, quiet, 60 * SEC))
		world_fail(w, "faults are over, and requests are not answered: %s", kinds_left(w));
	struct world_result r = {0};
	(void)world_command(w, s->vm, &(struct repl_command){.cmd = CMD_CHECKPOINT}, &r);
	world_run(w, 5 * SEC);
	if (!r.done || r.error)
		world_fail(w, "faults are over, and a checkpoint %s", r.done ? err_name(r.error) : "does not end");
	if (!world_run_until(w, clean, 60 * SEC))
		world_fail(w, "faults are over, and dirty regions stay");
	world_check(w);
	world_check_converged(w);
}

/* ---- bits turned over, and a verify that has to find them ---- */

struct plant {
	unsigned host;
	uint32_t vol;
	bool overlay;
	uint64_t layer, off; /* of the block */
};

static void first_run(void *arg, uint64_t off, uint64_t len)
{
	uint64_t *at = arg;
	(void)len;
	*at = *at == UINT64_MAX ? off : *at;
}

static const char *const folders[WORLD_VOLUMES] = {"volumes/a", "volumes/b"};

static bool plant_in_overlay(struct sim *s, struct plant *p)
{
	struct world *w = s->w;
	const struct repl_meta *m = world_meta(w, p->host);
	uint64_t size = 0;
	char path[64];
	if (m->n_ckpts == 0)
		return false;
	p->layer = m->ckpts[world_more(w, m->n_ckpts)].number;
	p->off = UINT64_MAX;
	world_quiet(&w->h[p->host], true);
	(void)volume_changed(w->h[p->host].x.vols[p->vol], p->layer, p->layer, false, first_run, &p->off);
	world_quiet(&w->h[p->host], false);
	(void)snprintf(path, sizeof(path), "%s/undo-%" PRIu64 ".data", folders[p->vol], p->layer);
	if (p->off == UINT64_MAX || simstore_peek_size(w->h[p->host].ss, path, false, &size) < 0 || size <= p->off)
		return false;
	return simstore_corrupt(w->h[p->host].ss, path, p->off + world_more(w, 100), 1) == 0;
}

static bool plant(struct sim *s, struct plant *p)
{
	struct world *w = s->w;
	*p = (struct plant){.host = (unsigned)world_more(w, 2), .vol = (uint32_t)world_more(w, 2)};
	if (world_more(w, 3) == 0) {
		p->overlay = true;
		return plant_in_overlay(s, p);
	}
	uint64_t at = world_more(w, size_now(&w->h[p->host], p->vol));
	char path[64];
	(void)snprintf(path, sizeof(path), "%s/disk.raw", folders[p->vol]);
	p->off = at / BLOCK_SIZE * BLOCK_SIZE;
	return simstore_corrupt(w->h[p->host].ss, path, at, 1) == 0;
}

static void verify_ends(struct sim *s, enum repl_repair repair, const struct plant *p, bool repaired)
{
	struct world *w = s->w;
	struct world_result r = {0};
	struct repl_command c = {.cmd = CMD_VERIFY, .flags = repair};
	(void)world_command(w, s->vm, &c, &r);
	for (unsigned i = 0; i < 6000 && !r.done; i++) /* all overlays at 256 KiB a second take minutes */
		world_run(w, 100 * MS);
	const struct repl_verify *v = &w->h[s->vm].verified;
	const struct repl_difference *d = &v->list[0];
	/* Retention may have taken the overlay meanwhile, and what is wrong in it. */
	bool gone = p && p->overlay && repl_meta_find_ckpt(world_meta(w, p->host), p->layer) < 0;
	if (gone && r.done && !r.error && v->n == 0)
		return;
	if (!r.done || r.error || v->n != (p != NULL) || v->more)
		world_fail(w, "faults are over, and a verify %s, with %u differences instead of %u",
			   !r.done ? "does not end" : err_name(r.error), v->n, p != NULL);
	if (p == NULL)
		return;
	bool primary = p->host == s->vm;
	uint64_t size = size_now(&w->h[s->vm], p->vol);
	if (d->volume != p->vol || d->overlay != p->overlay || d->off != p->off ||
	    d->len != (size - p->off < BLOCK_SIZE ? size - p->off : BLOCK_SIZE) ||
	    (p->overlay && (d->layer != p->layer || d->problem != PROBLEM_CHECKSUM ||
			    d->where != (primary ? WHERE_PRIMARY : WHERE_SECONDARY))) ||
	    (!p->overlay && (d->problem != PROBLEM_DIFFERS || d->where != WHERE_BOTH)))
		world_fail(w,
			   "a byte in block %" PRIu64 " of volume %u of host %u: verify says %s %" PRIu64 "+%" PRIu64,
			   p->off, p->vol, p->host, d->overlay ? "overlay" : "disk", d->off, d->len);
	if (d->repaired != repaired || (repaired && (v->repaired != d->len || v->ckpt == 0)))
		world_fail(w, "a byte in block %" PRIu64 " of volume %u of host %u: %srepaired", p->off, p->vol,
			   p->host, d->repaired ? "" : "not ");
	w->count.repairs += repaired;
}

/* The pair is in sync and quiet: a verify finds nothing, then exactly what is turned over; a repair undoes it. */
static void sim_verify(struct sim *s)
{
	struct world *w = s->w;
	struct plant p;
	uint8_t before[BLOCK_SIZE], after[BLOCK_SIZE];
	char path[64];
	verify_ends(s, (enum repl_repair)world_more(w, 3), NULL, false);
	w->planted = true;
	if (!plant(s, &p))
		return;
	w->count.planted++;
	verify_ends(s, REPAIR_NONE, &p, false);
	enum repl_repair repair = p.host == s->vm ? REPAIR_FROM_PEER : REPAIR_PEER;
	(void)snprintf(path, sizeof(path), "%s/disk.raw", folders[p.vol]);
	(void)simstore_peek(w->h[!p.host].ss, path, false, p.off, before, sizeof(before));
	verify_ends(s, repair, &p, !p.overlay);
	for (unsigned h = 0; h < WORLD_HOSTS; h++) {
		(void)simstore_peek(w->h[h].ss, path, false, p.off, after, sizeof(after));
		if (memcmp(before, after, sizeof(after)) != 0)
			world_fail(w, "after a repair block %" PRIu64 " of volume %u of host %u is not what was right",
				   p.off, p.vol, h);
	}
	if (!p.overlay)
		verify_ends(s, REPAIR_NONE, NULL, false);
}

static void settings_first(struct sim *s)
{
	struct world *w = s->w;
	struct repl_command c = {.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = world_meta(w, 0)->settings};
	c.settings.protocol = world_below(w, 4);
	c.settings.on_io_error = world_chance(w, 2) ? ON_IO_ERROR_PASS : ON_IO_ERROR_DETACH;
	c.settings.peer_timeout_ms = 500 + world_below(w, 2000);
	c.settings.checkpoint_interval_ms = world_chance(w, 4) ? 0 : 50 + world_below(w, 1500);
	c.settings.keep_last = 1 + world_below(w, 6);
	c.settings.failover_to = world_below(w, 2);
	mix_settings(s, &c.settings);
	command(s, 0, c);
}

static void seed_run(uint64_t seed, bool plain, struct world_counters *total)
{
	current_seed = seed;
	(void)snprintf(replay, sizeof(replay), "sim --seed %" PRIu64 " --ops %" PRIu64 "%s -v", seed, ops,
		       plain ? " --plain" : "");
	struct world_config c = {.seed = seed, .power = seed % 4 != 0, .verbose = verbose, .replay = replay};
	struct sim s = {.w = world_new(&c)};
	struct world *w = s.w;
	the_sim = &s;
	s.reckless = world_chance(w, 6);
	s.fault_one_in = 10 + world_below(w, 60);
	for (unsigned i = 0; i < 8; i++) {
		s.hot_vol[i] = (uint32_t)world_below(w, WORLD_VOLUMES);
		s.hot[i] = world_below(w, world_volume_size(w, s.hot_vol[i]));
	}
	uint64_t gap = 200 * US + world_below(w, 20 * MS);
	mix_begin(&s, plain);
	settings_first(&s);
	/* What the guest wrote before it was protected. */
	for (unsigned i = 0; i < world_below(w, 40); i++) {
		op_io(&s, 0, world_chance(w, 5) ? WORLD_FLUSH : WORLD_WRITE);
		world_run(w, world_below(w, gap));
	}
	for (uint64_t i = 0; i < ops; i++) {
		op(&s);
		mix_op(&s);
		world_run(w, world_below(w, 2 * gap));
		if (i % 16 == 0)
			world_check(w);
	}
	sim_settle(&s);
	if (!plain)
		sim_verify(&s);
	const uint64_t *from = (const uint64_t *)world_counters(w);
	for (size_t i = 0; i < sizeof(*total) / sizeof(uint64_t); i++)
		((uint64_t *)total)[i] += from[i];
	world_free(w);
}

/* ---- many ---- */

static void die(int sig)
{
	char text[160];
	int n =
	    snprintf(text, sizeof(text), "sim: seed %" PRIu64 ": signal %d\n  replay: %s\n", current_seed, sig, replay);
	(void)!write(STDERR_FILENO, text, (size_t)n);
	/* as it was going to end: with a core file, where those are wanted */
	signal(sig, SIG_DFL);
	raise(sig);
}

static void on_check(const char *kind, const char *expr, const char *file, int line)
{
	fprintf(stderr, "sim: seed %" PRIu64 ": %s %s does not hold at %s:%d\n  replay: %s\n", current_seed, kind, expr,
		file, line, replay);
	fflush(stderr);
	_exit(1);
}

/* Seeds that once failed come first: one a line, and what it found. With a + behind the number: with mix.c's draws. */
static void run_list(unsigned job, struct world_counters *total)
{
	FILE *f = list_path ? fopen(list_path, "r") : NULL;
	char line[512];
	for (unsigned n = 0; f && fgets(line, sizeof(line), f);) {
		char *end;
		uint64_t seed = strtoull(line, &end, 10);
		if (seed && n++ % jobs == job)
			seed_run(seed, *end != '+', total);
	}
	if (list_path && !f) {
		fprintf(stderr, "sim: %s can't be read\n", list_path);
		exit(2);
	}
	if (f)
		(void)fclose(f);
}

static void run_range(unsigned job)
{
	struct world_counters total = {0};
	run_list(job, &total);
	for (uint64_t i = job; i < seeds; i += jobs)
		seed_run(first_seed + i, plain_seeds, &total);
	co_free_all();
	printf("sim: job %u: steps %" PRIu64 " events %" PRIu64 " frames %" PRIu64 " kills %" PRIu64 " power %" PRIu64
	       " cuts %" PRIu64 " flips %" PRIu64 "/%" PRIu64 " reads %" PRIu64 " checkpoints %" PRIu64
	       " failovers %" PRIu64 " sessions %" PRIu64 " resyncs %" PRIu64 " disk error windows %" PRIu64
	       " switchovers %" PRIu64 "/%" PRIu64 "\n",
	       job, total.steps, total.events, total.frames, total.crashes[0], total.crashes[1], total.cuts,
	       total.flips_seen, total.flips, total.reads, total.checkpoints, total.failovers, total.sessions,
	       total.resyncs, total.disk_errors, total.switchovers, total.hand_overs);
	printf("sim: job %u: mix: clock jumps %" PRIu64 " settings %" PRIu64 " ahead %" PRIu64 " queue full %" PRIu64
	       " error windows %" PRIu64 " no room %" PRIu64 " applying stopped %" PRIu64 " cow errors %" PRIu64
	       "/%" PRIu64 "/%" PRIu64 " (stop/drop-history/break) broken %" PRIu64 " dropped %" PRIu64
	       " retained %" PRIu64 " thinned %" PRIu64 " hashed %" PRIu64 ", %" PRIu64
	       " of them different, replaced %" PRIu64 ", made %" PRIu64 " holds %" PRIu64 " verified %" PRIu64
	       "/%" PRIu64 " turned over %" PRIu64 " repaired %" PRIu64 " resized %" PRIu64 "/%" PRIu64
	       " clones %" PRIu64 ", %" PRIu64 " of them lost, written %" PRIu64 ", read %" PRIu64 "\n",
	       job, total.clock_jumps, total.settings, total.aheads, total.queue_full, total.path_errors, total.no_room,
	       total.apply_stops, total.cow_errors[0], total.cow_errors[1], total.cow_errors[2], total.broken,
	       total.room_drops, total.retained, total.thinned, total.hashes, total.hashes_differ, total.replaced,
	       total.made, total.holds, total.verify_ends, total.verifies, total.planted, total.repairs, total.resized,
	       total.resizes, total.clones, total.clones_lost, total.clone_writes, total.clone_reads);
	fflush(stdout);
}

static double seconds(void);

static int run_points(void)
{
	double start = seconds();
	uint64_t runs = 0;
	for (unsigned k = 0; k < POINTS_KINDS; k++)
		if (points & 1U << k)
			runs += points_run(k, stride, offset);
	co_free_all();
	printf("sim: %" PRIu64 " runs in %.1f s: ok\n", runs, seconds() - start);
	return 0;
}

static double seconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	bool given = false;
	static const struct option options[] = {{"seeds", 1, NULL, 'n'},	{"first", 1, NULL, 'f'},
						{"ops", 1, NULL, 'o'},		{"jobs", 1, NULL, 'j'},
						{"list", 1, NULL, 'l'},		{"seed", 1, NULL, 's'},
						{"crash-points", 0, NULL, 'C'}, {"fail-points", 0, NULL, 'F'},
						{"alloc-points", 0, NULL, 'A'}, {"stride", 1, NULL, 'k'},
						{"offset", 1, NULL, 'O'},	{"point", 1, NULL, 'p'},
						{"plain", 0, NULL, 'P'},	{NULL, 0, NULL, 0}};
	for (int c; (c = getopt_long(argc, argv, "v", options, NULL)) != -1;) {
		uint64_t n = optarg ? strtoull(optarg, NULL, 10) : 0;
		switch (c) {
		case 'n':
			seeds = n;
			given = true;
			break;
		case 'f':
			first_seed = n;
			break;
		case 'o':
			ops = n;
			break;
		case 'j':
			jobs = n ? (unsigned)n : 1;
			break;
		case 's':
			one_seed = true;
			only_seed = n;
			break;
		case 'l':
			list_path = optarg;
			break;
		case 'C':
			points |= 1U << POINTS_CRASH;
			break;
		case 'F':
			points |= 1U << POINTS_FAIL;
			break;
		case 'A':
			points |= 1U << POINTS_ALLOC;
			break;
		case 'k':
			stride = n ? n : 1;
			break;
		case 'O':
			offset = n;
			break;
		case 'p':
			one_point = optarg;
			break;
		case 'P':
			plain_seeds = true;
			break;
		case 'v':
			verbose = true;
			break;
		default:
			return 2;
		}
	}
	if (!given && getenv("REPFS_SIM_SEEDS"))
		seeds = strtoull(getenv("REPFS_SIM_SEEDS"), NULL, 10);
	if (one_seed) {
		first_seed = only_seed;
		seeds = jobs = 1;
	}
	check_hook = on_check;
	signal(SIGSEGV, die);
	signal(SIGABRT, die);
	signal(SIGILL, die);
	signal(SIGTRAP, die);
	if (one_point)
		return points_replay(one_point, verbose) ? 0 : 2;
	if (points)
		return run_points();
	double start = seconds();
	int bad = 0;
	if (jobs == 1) {
		run_range(0);
	} else {
		for (unsigned j = 0; j < jobs; j++)
			if (fork() == 0) {
				run_range(j);
				exit(0);
			}
		for (int status; wait(&status) > 0;)
			bad |= status;
	}
	double took = seconds() - start;
	printf("sim: %" PRIu64 " seeds of %" PRIu64 " operations in %.1f s, %.1f seeds a second: %s\n", seeds, ops,
	       took, (double)seeds / took, bad ? "FAILED" : "ok");
	return bad ? 1 : 0;
}
