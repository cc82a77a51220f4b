/* What a seed does beside sim.c's operations and faults. All of it is drawn from the world's second stream: it begins
 * with the seed too, but a kind that is added here, or left out (--plain), changes nothing of what the first one draws.
 *
 * A seed has about half of the kinds; of those that it has one comes with every so many operations. Some seeds are
 * shaky too (net.c cuts most connections early, and storage.c those that something slow was begun in), some cruel
 * (world_moment: power is lost just as something matters).
 */
#include <inttypes.h>
#include <stdio.h>

#include "core/check.h"
#include "tests/sim/sim.h"

#define DAY (86400 * SEC)

/* ---- the kinds ---- */

/* Somebody sets a clock, or NTP steps it, or the battery of the clock is empty: 1970. */
static void clock_jump(struct sim *s)
{
	struct world *w = s->w;
	static const uint64_t by[] = {SEC, 60 * SEC, 3600 * SEC, DAY, 400 * DAY};
	unsigned h = (unsigned)world_more(w, 2);
	uint64_t d = 1 + world_more(w, by[world_more(w, sizeof(by) / sizeof(by[0]))]);
	uint64_t now = world_wall(w, h);
	switch (world_more(w, 8)) {
	case 0:
		world_clock_set(w, h, 1 + world_more(w, DAY));
		break;
	case 1:
		world_clock_set(w, h, world_wall(w, !h));
		break;
	case 2 ... 4:
		world_clock_set(w, h, now + d);
		break;
	default:
		world_clock_set(w, h, now > d ? now - d : 1);
		break;
	}
}

/* Files of a store fail or find no room: what a secondary saves of old content, its view's overlays, the group's
 * record, the intent map, or the disk itself. */
static void path_errors(struct sim *s)
{
	struct world *w = s->w;
	static const char *const paths[] = {"volumes/*/undo-*",	    "volumes/*/undo-*",	  "volumes/*/undo-*.data",
					    "volumes/*/undo-*.map", "volumes/*/active-*", "groups/*",
					    "volumes/*/intent*",    "volumes/*/disk.raw", "*"};
	static const uint64_t lasts[] = {20 * MS, 300 * MS, 5 * SEC};
	unsigned h = world_more(w, 4) ? !s->vm : s->vm;
	bool room = world_more(w, 2);
	unsigned one_in = world_more(w, 2) ? 1 : 1 + (unsigned)world_more(w, 20);
	world_path_errors(w, h, paths[world_more(w, sizeof(paths) / sizeof(paths[0]))], room ? ERR_NOSPC : ERR_IO,
			  one_in, 1 + world_more(w, lasts[world_more(w, 3)]));
}

/* The room under a store runs out, all but a little, until it comes up again. */
static void no_room(struct sim *s)
{
	unsigned h = world_more(s->w, 4) ? !s->vm : s->vm;
	world_disk_full(s->w, h, !s->w->h[h].full);
}

/* More than the queue to the peer holds, while nothing leaves it: the network stands, or the peer's disk. */
static void burst(struct sim *s)
{
	struct world *w = s->w;
	uint64_t ns = 50 * MS + world_more(w, 800 * MS);
	if (world_more(w, 3))
		world_partition(w, ns);
	else
		world_stall(w, !s->vm, ns);
	for (unsigned n = 5 + (unsigned)world_more(w, 4); n; n--)
		(void)world_io(w, s->vm, WORLD_WRITE, 0, world_more(w, 2 << 20), REPL_DATA_MAX);
}

/* The host beside the guest's, forgotten by both, is replaced by a new one: its copy begins with a JOIN. */
static void replace(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = !s->vm;
	const struct repl_meta *m = world_meta(w, h), *o = world_meta(w, s->vm);
	if (!m || !o || o->split_brain || o->inconsistent || o->role == ROLE_SECONDARY || world_detached(w, s->vm))
		return;
	bool forgotten = m->role == ROLE_STANDALONE && !m->has_peer && !m->split_brain;
	if (!forgotten) {
		sim_unprotect(s, world_more(w, 4) ? s->vm : h);
		return;
	}
	world_replace(w, h);
	if (world_more(w, 2)) /* and loses power while it is made */
		world_crash_at(w, h, world_more(w, 2) ? WORLD_POWER : WORLD_KILL, 1 + world_more(w, 40));
}

static void settings_draw(struct world *w, struct settings *s)
{
	static const uint64_t rates[] = {0, 256 << 10, 1 << 20, 4 << 20, 32 << 20};
	switch (world_more(w, 8)) {
	case 0:
		s->on_cow_error = world_more(w, 3);
		break;
	case 1:
		s->on_congestion = world_more(w, 2);
		break;
	case 2:
		s->resync_rate = rates[world_more(w, sizeof(rates) / sizeof(rates[0]))];
		break;
	case 3:
		s->on_io_error = world_more(w, 2);
		break;
	case 4:
		s->keep_last = 1 + world_more(w, world_more(w, 2) ? 3 : 40);
		break;
	case 5:
		s->keep_minutely = world_more(w, 2) ? world_more(w, 5) : 0;
		s->keep_hourly = world_more(w, 2) ? world_more(w, 4) : 0;
		s->keep_daily = world_more(w, 2) ? world_more(w, 3) : 0;
		break;
	case 6:
		s->history_max_bytes = world_more(w, 2) ? world_more(w, 2 << 20) : 0;
		break;
	default:
		s->peer_timeout_ms = 500 + world_more(w, 3000);
		break;
	}
}

static void tune(struct sim *s)
{
	const struct repl_meta *m = world_meta(s->w, s->vm);
	if (!m)
		return;
	struct repl_command c = {.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = m->settings};
	settings_draw(s->w, &c.settings);
	(void)world_command(s->w, s->vm, &c, NULL);
	s->w->count.settings++;
}

/* The guest sleeps, now and then long enough for intent bits to go. */
static void idle(struct sim *s)
{
	world_run(s->w, world_more(s->w, world_more(s->w, 6) ? SEC : 25 * SEC));
}

/* What nobody should ask for now, or of this host. */
static void blunder(struct sim *s)
{
	struct world *w = s->w;
	static const unsigned cmds[] = {CMD_FAILBACK, CMD_PROTECT, CMD_START, CMD_RESYNC};
	struct repl_command c = {.cmd = cmds[world_more(w, 4)], .text = "peer"};
	if (c.cmd == CMD_PROTECT && world_more(w, 2))
		c.flags = WIRE_JOIN_ADOPT;
	(void)world_command(w, (unsigned)world_more(w, 2), &c, NULL);
}

/* The secondary takes over in the midst of the stream: its primary may go on, and does not hear of it at once. */
static void takeover(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = !s->vm;
	const struct repl_meta *m = world_meta(w, h);
	if (!m || m->role != ROLE_SECONDARY || m->state != STATE_RUNNING || s->failover_asked || world_more(w, 3))
		return;
	for (unsigned n = 4 + (unsigned)world_more(w, 12); n; n--)
		(void)world_io(w, s->vm, world_more(w, 4) ? WORLD_WRITE : WORLD_FLUSH, (uint32_t)world_more(w, 2),
			       world_more(w, 1 << 20), 1 + world_more(w, 64 << 10));
	world_run(w, world_more(w, 3 * MS));
	struct repl_command c = {.cmd = CMD_FAILOVER, .flags = FAILOVER_DISCARD_ACTIVE};
	c.number = world_more(w, 2) ? FAILOVER_LATEST : FAILOVER_DEFAULT;
	if (world_command(w, h, &c, &s->failover)) {
		s->failover_asked = true;
		s->failover_host = h;
	}
}

/* A job on either host begins or ends: it holds one of the checkpoints, or the disks as they are now. */
static void job(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = (unsigned)world_more(w, 2), at = (unsigned)world_more(w, ARRAY_LEN(s->jobs));
	struct sim_job *j = &s->jobs[at];
	const struct repl_meta *m = world_meta(w, h);
	if (j->asked && !j->held.done)
		return;
	struct repl_command c = {.cmd = CMD_UNHOLD, .number = j->held.result};
	(void)snprintf(c.text, sizeof(c.text), "job %u", at);
	if (j->asked && j->held.error == 0) {
		(void)world_command(w, j->host, &c, NULL);
		j->asked = false;
		return;
	}
	c.cmd = CMD_HOLD;
	c.number = m && m->n_ckpts && world_more(w, 2) ? m->ckpts[world_more(w, m->n_ckpts)].number : 0;
	j->host = h;
	j->asked = world_command(w, h, &c, &j->held);
	w->count.holds += j->asked;
}

/* The roles are swapped, in the midst of requests; now and then a host dies of it, or the connection does. */
static void switchover(struct sim *s)
{
	struct world *w = s->w;
	unsigned vm = s->vm;
	const struct repl_meta *m = world_meta(w, vm);
	if (!m || m->role != ROLE_PRIMARY || m->state != STATE_RUNNING || s->switchover_asked)
		return;
	if (world_more(w, 4)) { /* a manager waits for it */
		sim_maintain(s);
		if (!world_run_until(w, sim_in_sync, 2 * SEC) || s->vm != vm)
			return;
	}
	if (world_more(w, 4)) { /* its guest has left the view */
		(void)world_command(w, !vm, &(struct repl_command){.cmd = CMD_DISCARD}, NULL);
		world_run(w, world_more(w, 30 * MS));
	}
	for (unsigned n = (unsigned)world_more(w, 8); n; n--)
		(void)world_io(w, vm, world_more(w, 4) ? WORLD_WRITE : WORLD_FLUSH, (uint32_t)world_more(w, 2),
			       world_more(w, 1 << 20), 1 + world_more(w, 64 << 10));
	if (world_more(w, 2)) {
		enum world_crash how = world_more(w, 2) ? WORLD_POWER : WORLD_KILL;
		world_crash_at(w, world_more(w, 2) ? vm : !vm, how, 1 + world_more(w, 30));
	}
	if (world_command(w, vm, &(struct repl_command){.cmd = CMD_SWITCHOVER}, &s->switchover)) {
		s->switchover_asked = true;
		s->switchover_host = vm;
	}
	if (world_more(w, 4) == 0) {
		world_run(w, world_more(w, 30 * MS));
		world_cut(w);
	}
}

/* Compares the hosts while the guest goes on, and repairs what can't be read; now and then somebody hangs up. */
static void verify(struct sim *s)
{
	struct world *w = s->w;
	struct repl_command c = {.cmd = CMD_VERIFY, .flags = (uint32_t)world_more(w, 3)};
	if (world_more(w, 4)) /* else at any moment */
		(void)world_run_until(w, sim_in_sync, SEC);
	(void)world_command(w, world_more(w, 20) ? s->vm : !s->vm, &c, NULL);
	if (world_more(w, 6))
		return;
	world_run(w, world_more(w, 20 * MS));
	c.cmd = CMD_VERIFY_CANCEL;
	(void)world_command(w, s->vm, &c, NULL);
}

/* Somebody makes a scratch of a checkpoint, or gives one up; clone_work is what is done in them. */
static void clones(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = (unsigned)world_more(w, 2), n = world_clones(w, h);
	const struct repl_meta *m = world_meta(w, h);
	struct repl_command c = {.cmd = CMD_CLONE, .flags = (uint32_t)world_more(w, WORLD_VOLUMES)};
	const char *name = n ? world_clone_name(w, h, (unsigned)world_more(w, n)) : NULL;
	if (name && world_more(w, n < 3 ? 5 : 2) == 0) {
		c.cmd = CMD_UNCLONE;
		(void)snprintf(c.text, sizeof(c.text), "%s", name);
	} else if (m && m->n_ckpts) {
		c.number = m->ckpts[world_more(w, m->n_ckpts)].number;
		(void)snprintf(c.text, sizeof(c.text), "c%u", (unsigned)world_more(w, 5));
	} else {
		return;
	}
	(void)world_command(w, h, &c, NULL);
}

static void clone_work(struct sim *s)
{
	struct world *w = s->w;
	static const enum world_io does[] = {WORLD_WRITE,   WORLD_WRITE, WORLD_WRITE, WORLD_ZERO,
					     WORLD_DISCARD, WORLD_FLUSH, WORLD_READ,  WORLD_READ};
	unsigned h = (unsigned)world_more(w, 2), n = world_clones(w, h);
	uint64_t off = world_more(w, 2 << 20), len = 1 + world_more(w, world_more(w, 4) ? 12 << 10 : 300 << 10);
	if (n)
		world_clone_io(w, h, (unsigned)world_more(w, n), does[world_more(w, ARRAY_LEN(does))], off, len);
}

/* A volume grows, while the guest goes on; now and then a host dies of it, or the connection does. */
static void grow(struct sim *s)
{
	struct world *w = s->w;
	unsigned h = world_more(w, 10) ? s->vm : !s->vm;
	uint32_t vol = (uint32_t)world_more(w, WORLD_VOLUMES);
	const struct repl_meta *m = world_meta(w, h);
	if (m && world_more(w, 4) && world_more(w, 4))
		(void)world_run_until(w, sim_in_sync, SEC);
	m = world_meta(w, h);
	if (!m || m->volumes[vol].size >= w->size[vol])
		return;
	uint64_t now = m->volumes[vol].size, room = (w->size[vol] - now) / SECTOR_SIZE;
	struct repl_command c = {.cmd = CMD_RESIZE, .flags = vol};
	c.number = now + SECTOR_SIZE * (1 + world_more(w, world_more(w, 3) ? room / 4 + 1 : room));
	c.number = c.number > w->size[vol] ? w->size[vol] / SECTOR_SIZE * SECTOR_SIZE : c.number;
	if (c.number <= now)
		return;
	if (world_more(w, 3) == 0) {
		enum world_crash how = world_more(w, 2) ? WORLD_POWER : WORLD_KILL;
		world_crash_at(w, (unsigned)world_more(w, 2), how, 1 + world_more(w, 12));
	}
	w->count.resizes += world_command(w, h, &c, NULL);
	if (world_more(w, 6) == 0) {
		world_run(w, world_more(w, 10 * MS));
		world_cut(w);
	}
}

static void (*const kinds[])(struct sim *s) = {clock_jump, path_errors, no_room, burst,	     replace, tune,   idle,
					       blunder,	   takeover,	job,	 switchover, verify,  clones, grow};

#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

void mix_begin(struct sim *s, bool plain)
{
	struct world *w = s->w;
	if (plain)
		return;
	for (unsigned k = 0; k < KINDS; k++)
		s->mix_kinds |= (unsigned)world_more(w, 2) << k;
	s->mix_one_in = 8 + world_more(w, 40);
	w->shaky = world_more(w, 3) == 0;
	w->cruel = world_more(w, 4) == 0;
}

void mix_settings(struct sim *s, struct settings *set)
{
	if (s->mix_kinds == 0)
		return;
	for (unsigned n = 0; n < 8; n++)
		settings_draw(s->w, set);
	set->peer_timeout_ms = set->peer_timeout_ms > 800 ? set->peer_timeout_ms : 800;
	set->queue_max_bytes = 4 << 20;
}

uint32_t mix_protect_flags(struct sim *s)
{
	return s->mix_kinds && world_more(s->w, 2) ? PROTECT_HASH : 0;
}

static void count_full(struct world *w, unsigned host)
{
	struct repl_status st;
	if (!world_up(w, host))
		return;
	repl_status(w->h[host].core, w->now, &st);
	w->count.queue_full += st.queue_bytes >= world_meta(w, host)->settings.queue_max_bytes;
}

void mix_op(struct sim *s)
{
	struct world *w = s->w;
	if (s->mix_kinds == 0)
		return;
	count_full(w, s->vm);
	bool has_clones = s->mix_kinds >> (KINDS - 1) & 1; /* the last one */
	if (has_clones && world_more(w, 3) == 0)
		clone_work(s);
	if (has_clones && world_more(w, 50) == 0)
		clones(s);
	if (world_more(w, s->mix_one_in) != 0)
		return;
	unsigned k = (unsigned)world_more(w, KINDS);
	if (s->mix_kinds >> k & 1)
		kinds[k](s);
}
