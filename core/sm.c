/* The run-time check behind core/sm.h: a state variable never holds a value, and never makes a move, that its table
 * lacks. */
#include "core/sm.h"

#include <stddef.h>

#include "core/check.h"

static void sm_check_table(const struct sm_table *t)
{
	PRE(t->n > 0 && t->n <= SM_STATES_MAX);
}

bool sm_allowed(const struct sm_table *t, unsigned from, unsigned to)
{
	sm_check_table(t);
	PRE(from < t->n);
	PRE(to < t->n);
	return (t->allowed[from] >> to & 1) != 0;
}

void sm_move(const struct sm_table *t, uint8_t *state, unsigned to)
{
	PRE(sm_allowed(t, *state, to));
	*state = (uint8_t)to;
}

const char *sm_name(const struct sm_table *t, unsigned state)
{
	sm_check_table(t);
	return state < t->n && t->state_names[state] != NULL ? t->state_names[state] : "?";
}
