/* Which checkpoints the retention settings keep (SPEC 7, docs/adr/0010). Pure. */
#ifndef REPFS_CORE_RETENTION_H
#define REPFS_CORE_RETENTION_H

#include "core/repl_meta.h"

enum retention_rule {
	RETENTION_LAST = 1 << 0,
	RETENTION_MINUTELY = 1 << 1,
	RETENTION_HOURLY = 1 << 2,
	RETENTION_DAILY = 1 << 3,
};

/* Sets rules[i] to the rules that keep c[i], for each i < n: 0 for one that none keeps, and for those that are apart
 * (pinned, held), which are left out of it. c: ascending by number. bytes[i]: what the overlay of c[i] holds. */
void retention_rules(const struct settings *s, const struct repl_ckpt *c, uint32_t n, const bool *apart,
		     const uint64_t *bytes, uint8_t *rules);

#endif
