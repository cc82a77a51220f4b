/* Table-driven state machines: every move of a state variable goes through one const table that is checked at
 * run time. A move that the table lacks is a programmer error (user-visible refusals are decided before). */
#ifndef REPFS_CORE_SM_H
#define REPFS_CORE_SM_H

#include <stdbool.h>
#include <stdint.h>

#define SM_STATES_MAX 16

struct sm_table {
	const char *name;
	unsigned n;
	const char *state_names[SM_STATES_MAX];
	uint32_t allowed[SM_STATES_MAX]; /* allowed[from]: bit `to` set where from → to is a move */
};

bool sm_allowed(const struct sm_table *t, unsigned from, unsigned to);
/* Checks and makes the move. */
void sm_move(const struct sm_table *t, uint8_t *state, unsigned to);
const char *sm_name(const struct sm_table *t, unsigned state);

#endif
