/* The simulated world: two hosts with the real core, images, store and wire codec, their disks (simstore) and the
 * connections between them, in one thread, every order of events drawn from a seed; and a model beside it that knows,
 * for every 128 bytes, which write must be there (SPEC 9).
 *
 * A world is made, driven by operations while the clock runs, healed, and checked. Whatever breaks a promise ends the
 * process through `fail` of the config (or prints and exits 1).
 */
#ifndef REPFS_TESTS_SIM_WORLD_H
#define REPFS_TESTS_SIM_WORLD_H

#include <stdbool.h>
#include <stdint.h>

#include "core/repl.h"
#include "tests/sim/simstore.h"

#define WORLD_HOSTS 2
#define WORLD_VOLUMES 2
/* The model's grain, in bytes: guests' requests begin and end on it. */
#define WORLD_UNIT 128U

struct world;

struct world_config {
	uint64_t seed;
	bool power;		      /* durability `power`: power may be cut; else processes are killed only */
	uint64_t size[WORLD_VOLUMES]; /* bytes; 0: the seed chooses */
	bool calm;		      /* no random faults of its own: disks and net are quick and whole */
	bool verbose;		      /* a trace on stderr */
	const char *replay;	      /* said with a violation */
};

struct world *world_new(const struct world_config *c);
void world_free(struct world *w);

uint64_t world_now(const struct world *w);
uint64_t world_wall(const struct world *w, unsigned host);
uint64_t world_random(struct world *w);
uint64_t world_below(struct world *w, uint64_t n);
bool world_chance(struct world *w, unsigned one_in);
uint64_t world_more(struct world *w, uint64_t n); /* below n, of the second stream (mix.c) */
_Noreturn void world_fail(struct world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void world_note(struct world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3))); /* into the trace */

/* Runs the clock. until: ends early, true, when it holds. */
void world_run(struct world *w, uint64_t ns);
bool world_run_until(struct world *w, bool (*done)(struct world *w), uint64_t limit_ns);

/* ---- operations: begun here, they end while the clock runs ---- */

enum world_io { WORLD_WRITE, WORLD_ZERO, WORLD_DISCARD, WORLD_FLUSH, WORLD_READ, WORLD_READ_CKPT };
/* A guest's request on a host; false: that host is down. Ranges are cut to the volume. READ_CKPT: of one that is kept.
 */
bool world_io(struct world *w, unsigned host, enum world_io kind, uint32_t vol, uint64_t off, uint64_t len);
/* Of a clone of a host: the nth, if nothing is under way on it. */
unsigned world_clones(const struct world *w, unsigned host);
const char *world_clone_name(const struct world *w, unsigned host, unsigned nth);
void world_clone_io(struct world *w, unsigned host, unsigned nth, enum world_io kind, uint64_t off, uint64_t len);
unsigned world_outstanding(const struct world *w, unsigned host);

struct world_result {
	bool done;
	int error;
	uint64_t result, result2;
};
/* A command; *ret, if not NULL, lives until it is done. false: that host is down. */
bool world_command(struct world *w, unsigned host, const struct repl_command *c, struct world_result *ret);

/* ---- faults ---- */

enum world_crash { WORLD_KILL, WORLD_POWER };
void world_crash(struct world *w, unsigned host, enum world_crash how);
/* At the nth change of its disk from now on. */
void world_crash_at(struct world *w, unsigned host, enum world_crash how, uint64_t nth);
void world_shutdown(struct world *w, unsigned host); /* clean */
void world_start(struct world *w, unsigned host);    /* of a host that is down: as soon as it can */
void world_replace(struct world *w, unsigned host);  /* by one with an empty store */
bool world_bare(const struct world *w, unsigned host);
bool world_up(const struct world *w, unsigned host);
struct simstore *world_store(struct world *w, unsigned host);

void world_cut(struct world *w);					 /* the connections that stand */
void world_partition(struct world *w, uint64_t ns);			 /* nothing passes for so long */
void world_stall(struct world *w, unsigned host, uint64_t ns);		 /* its disk answers nothing for so long */
void world_flip(struct world *w);					 /* a bit of what is sent next */
void world_disk_errors(struct world *w, unsigned host, unsigned one_in); /* EIO; 0: no more */
void world_disk_full(struct world *w, unsigned host, bool full);
/* Files that match fail so often, for so long; one such at a time. path is kept. */
void world_path_errors(struct world *w, unsigned host, const char *path, int error, unsigned one_in, uint64_t ns);
void world_clock_set(struct world *w, unsigned host, uint64_t wall_ns); /* the wall clock, forward or back */

/* ---- looking ---- */

const struct repl_meta *world_meta(struct world *w, unsigned host);
enum link_state world_link(struct world *w, unsigned host);
enum repl_serving world_serving(struct world *w, unsigned host);
bool world_detached(struct world *w, unsigned host); /* a disk of it is given up: its guest goes through the peer */
uint64_t world_volume_size(const struct world *w, uint32_t vol);
bool world_split(struct world *w);     /* a host has recorded a split brain */
bool world_unrelated(struct world *w); /* the copies have nothing in common */

/* Faults are over: disks and net are well, hosts that are down start. */
void world_heal(struct world *w);
/* Everything that can be seen now; cheap enough for between operations. */
void world_check(struct world *w);
/* In sync, quiet, and all that the model knows is there: I16. Reads every byte of every kept checkpoint. */
void world_check_converged(struct world *w);

struct world_counters {
	uint64_t steps, events, crashes[2], cuts, frames, flips, flips_seen, reads, checkpoints, failovers, switchovers,
	    hand_overs, sessions, resyncs;
	uint64_t disk_errors;
	/* of mix.c */
	uint64_t clock_jumps, settings, aheads, queue_full, path_errors, no_room, apply_stops;
	uint64_t cow_errors[3];	    /* by on_cow_error */
	uint64_t retained, thinned; /* dropped by retention; times that history had filled its room */
	uint64_t broken, room_drops, hashes, hashes_differ, replaced, made, holds;
	uint64_t resizes, resized, verifies, verify_ends, planted, repairs;
	uint64_t clones, clones_lost, clone_writes, clone_reads;
};
const struct world_counters *world_counters(const struct world *w);

#endif
