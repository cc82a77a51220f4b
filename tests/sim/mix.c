/* What a seed does beside sim.c's operations and faults. All of it is drawn from the world's second stream: it begins
 * with the seed too, but a kind that is added here, or left out (--plain), changes nothing of what the first one draws.
 *
 * A seed has about half of the kinds; of those that it has one comes with every so many operations.
 */
#include <inttypes.h>

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

static void (*const kinds[])(struct sim *s) = {clock_jump};

#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

void mix_begin(struct sim *s, bool plain)
{
	struct world *w = s->w;
	if (plain)
		return;
	for (unsigned k = 0; k < KINDS; k++)
		s->mix_kinds |= (unsigned)world_more(w, 2) << k;
	s->mix_one_in = 10 + world_more(w, 60);
}

void mix_op(struct sim *s)
{
	if (s->mix_kinds == 0 || world_more(s->w, s->mix_one_in) != 0)
		return;
	unsigned k = (unsigned)world_more(s->w, KINDS);
	if (s->mix_kinds >> k & 1)
		kinds[k](s);
}
