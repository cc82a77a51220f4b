/* Which checkpoints the retention settings keep (core/retention.h; docs/adr/0010 argues for it).
 *
 * All rules go from the newest to the oldest by number. keep_last goes twice: over all, and over those whose disk
 * differs from that of the checkpoint before. A period rule keeps the first that it meets of each stretch of
 * checkpoints within one period; by number and not by time, so that a clock that jumped costs a period or two and
 * nothing else.
 */
#include "core/retention.h"

#include <string.h>

#define NS_PER_SEC UINT64_C(1000000000)
#define MINUTE_NS (60 * NS_PER_SEC)
#define HOUR_NS (60 * MINUTE_NS)
#define DAY_NS (24 * HOUR_NS) /* of UTC: its leap seconds are not counted in ns since 1970 */

/* Whether checkpoint i's disk differs from that of the one before it, of whatever kind that is. */
static bool counts(const uint64_t *bytes, uint32_t i)
{
	return i == 0 || bytes[i - 1] != 0;
}

static void keep_last(uint64_t keep, uint32_t n, const bool *apart, const uint64_t *bytes, uint8_t *rules)
{
	uint64_t all = 0, counted = 0;
	for (uint32_t i = n; i-- > 0 && (all < keep || counted < keep);) {
		if (apart[i])
			continue;
		bool one = counts(bytes, i);
		if (all < keep || (one && counted < keep))
			rules[i] |= RETENTION_LAST;
		all++;
		counted += one;
	}
}

static void keep_periods(uint64_t keep, uint64_t period_ns, uint8_t rule, const struct repl_ckpt *c, uint32_t n,
			 const bool *apart, uint8_t *rules)
{
	uint64_t periods = 0, last = 0;
	for (uint32_t i = n; i-- > 0 && keep;) {
		if (apart[i])
			continue;
		uint64_t period = c[i].time_ns / period_ns;
		if (periods && period == last)
			continue;
		if (periods++ == keep)
			return;
		last = period;
		rules[i] |= rule;
	}
}

void retention_rules(const struct settings *s, const struct repl_ckpt *c, uint32_t n, const bool *apart,
		     const uint64_t *bytes, uint8_t *rules)
{
	memset(rules, 0, n);
	keep_last(s->keep_last, n, apart, bytes, rules);
	keep_periods(s->keep_minutely, MINUTE_NS, RETENTION_MINUTELY, c, n, apart, rules);
	keep_periods(s->keep_hourly, HOUR_NS, RETENTION_HOURLY, c, n, apart, rules);
	keep_periods(s->keep_daily, DAY_NS, RETENTION_DAILY, c, n, apart, rules);
}
