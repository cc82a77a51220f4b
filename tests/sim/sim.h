/* What the simulator's two drivers share: the one by seeds (sim.c), the one over every point of a script (points.c). */
#ifndef REPFS_TESTS_SIM_SIM_H
#define REPFS_TESTS_SIM_SIM_H

#include "tests/sim/world_internal.h"

struct sim_job { /* that holds a checkpoint */
	unsigned host;
	bool asked;
	struct world_result held;
};

struct sim {
	struct world *w;
	unsigned vm;   /* where the guest runs */
	bool reckless; /* a guest may run on both sides */
	uint64_t hot[8];
	uint32_t hot_vol[8];
	uint64_t fault_one_in;
	struct world_result failover;
	unsigned failover_host;
	bool failover_asked;
	struct world_result switchover;
	unsigned switchover_host; /* that it was asked of */
	bool switchover_asked;
	unsigned mix_kinds;  /* mix.c: those that this seed has, */
	uint64_t mix_one_in; /* and how often */
	struct sim_job jobs[4];
};
extern struct sim *the_sim;

void sim_replay_set(const char *text); /* said with whatever breaks */

void sim_unprotect(struct sim *s, unsigned h);
/* What a manager would do to get the pair back to work. */
void sim_maintain(struct sim *s);
bool sim_in_sync(struct world *w); /* of the_sim */
/* The phase without faults, to its end, and every check (I16). */
void sim_settle(struct sim *s);

/* mix.c: what is drawn from the second stream. plain: nothing. */
void mix_begin(struct sim *s, bool plain);
void mix_settings(struct sim *s, struct settings *set);
uint32_t mix_protect_flags(struct sim *s);
void mix_op(struct sim *s);

enum points_kind { POINTS_CRASH, POINTS_FAIL, POINTS_ALLOC, POINTS_KINDS };
/* Every stride-th point from `offset` on; returns how many runs that were. */
uint64_t points_run(enum points_kind kind, uint64_t stride, uint64_t offset);
/* One, as a failure has printed it; false: it is none. */
bool points_replay(const char *what, bool verbose);

#endif
