/* Table-driven state machines: what the table has is made, everything else traps and changes nothing. */
#include <criterion/criterion.h>
#include <signal.h>

#include "core/sm.h"

enum { OFF, ON, BROKEN };

static const struct sm_table table = {
    .name = "lamp",
    .n = 3,
    .state_names = {"OFF", "ON", "BROKEN"},
    .allowed =
	{
	    [OFF] = 1U << ON,
	    [ON] = 1U << OFF | 1U << ON | 1U << BROKEN,
	},
};

Test(sm, allowed_is_the_table)
{
	const bool want[3][3] = {{false, true, false}, {true, true, true}, {false, false, false}};

	for (unsigned from = 0; from < 3; from++)
		for (unsigned to = 0; to < 3; to++)
			cr_assert_eq(sm_allowed(&table, from, to), want[from][to], "%u -> %u", from, to);
}

Test(sm, moves)
{
	struct {
		uint8_t before, state, after;
	} s = {0xa5, OFF, 0xa5};

	sm_move(&table, &s.state, ON);
	cr_assert_eq(s.state, ON);
	sm_move(&table, &s.state, ON);
	cr_assert_eq(s.state, ON);
	sm_move(&table, &s.state, BROKEN);
	cr_assert_eq(s.state, BROKEN);
	cr_assert_eq(s.before, 0xa5);
	cr_assert_eq(s.after, 0xa5);
}

Test(sm, names)
{
	cr_assert_str_eq(sm_name(&table, BROKEN), "BROKEN");
	cr_assert_str_eq(sm_name(&table, 3), "?");
	cr_assert_str_eq(sm_name(&table, 4000), "?");
}

Test(sm, move_that_the_table_lacks_traps, .signal = SIGILL)
{
	uint8_t state = OFF;

	sm_move(&table, &state, BROKEN);
}

Test(sm, state_outside_the_table_traps, .signal = SIGILL)
{
	uint8_t state = 3;

	sm_move(&table, &state, ON);
}

Test(sm, target_outside_the_table_traps, .signal = SIGILL)
{
	uint8_t state = ON;

	sm_move(&table, &state, 3);
}

/* Without the check, the shift by the width of the row would read as bit 0, which is set. */
Test(sm, target_beyond_the_row_traps, .signal = SIGILL)
{
	volatile unsigned to = 32;

	(void)sm_allowed(&table, ON, to);
}
