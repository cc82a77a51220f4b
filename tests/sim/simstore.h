/* The simulated storage of one host: struct storage and struct disk in memory, deterministic from a seed, one thread.
 *
 * Faults that the code above it has to survive:
 *   - The power is cut. Of what was not synced, any part is kept: none, all, or for each write all, nothing or some of
 *     its 512-byte sectors, in any order (a sector itself is never torn). Of the names not made durable by sync_dir
 *     likewise: a rename is there or not, never half; what came later for the same name or file goes with it.
 *   - The process is killed: all that it wrote is kept, nothing of it is durable yet.
 *   - It stops at the Nth change: a call that changes something is not done, half done or done, all later ones fail,
 *     and then the power is cut or the process is found dead ("crash point").
 *   - A call fails: by chance, by the path, or the Nth ("fail point"). A failed write may have written a part.
 *   - A sync fails as Linux' does: what was not yet synced stays readable and is never written out, each handle that
 *     was open gets the error once (and, as storage_posix makes it, for ever after), and syncs through handles opened
 *     later succeed, in the same process or the next, though that data is gone (simstore_evict, STORAGE_FRESH: from
 *     the cache too).
 *   - There is no room: writes that need new pages fail when `space` is used up.
 *   - Stored bytes rot (simstore_corrupt).
 *
 * A handle of before a stop is dead: its calls fail with -ERR_IO, closing it is fine. So a crash is: simstore_stop (or
 * the crash point, simstore_stopped), close all that the host had open as usual (nothing of it reaches the disk), then
 * simstore_power_cut or simstore_restart. Both PRE that no handle is open: a leak is found there.
 */
#ifndef REPFS_TESTS_SIMSTORE_H
#define REPFS_TESTS_SIMSTORE_H

#include "image/storage.h"

enum simstore_call {
	/* These change something. */
	SIMSTORE_CREATE, /* an open that makes or truncates */
	SIMSTORE_WRITE,
	SIMSTORE_ZERO,
	SIMSTORE_SYNC,
	SIMSTORE_SET_SIZE,
	SIMSTORE_UNLINK,
	SIMSTORE_RENAME,
	SIMSTORE_MKDIR,
	SIMSTORE_RMDIR,
	SIMSTORE_SYNC_DIR,
	/* These do not. */
	SIMSTORE_OPEN,
	SIMSTORE_READ,
	SIMSTORE_EXTENT,
	SIMSTORE_STAT, /* get_size, allocated, free_bytes */
	SIMSTORE_LIST,
	SIMSTORE_CALLS
};

#define SIMSTORE_CHANGES ((1U << SIMSTORE_OPEN) - 1) /* as bits of simstore_rule.calls */
#define SIMSTORE_ALL ((1U << SIMSTORE_CALLS) - 1)
#define SIMSTORE_BIT(call) (1U << (call))

#define SIMSTORE_RULES_MAX 16

struct simstore;

/* Owned; NULL without memory. */
struct simstore *simstore_new(uint64_t seed);
void simstore_free(struct simstore *ss); /* NULL is fine; PRE: no handle is open */

/* Borrowed. storage_close on it does nothing: it lives as long as ss, over all crashes. */
struct storage *simstore_storage(struct simstore *ss);

/* What the host's disk does from here on depends on this seed (and on the calls). */
void simstore_reseed(struct simstore *ss, uint64_t seed);

/* --- faults by rule --- */

struct simstore_rule {
	unsigned calls;	  /* which: SIMSTORE_BIT(call) or'ed */
	const char *path; /* fnmatch pattern without FNM_PATHNAME, borrowed; NULL: any. For rename: either name */
	int error;	  /* ERR_IO, ERR_NOSPC, ... (positive) */
	unsigned one_in;  /* one call in so many fails, by chance; 0: none */
	uint64_t nth;	  /* the nth call that matches from now on fails; 1: the next; 0: none */
	uint64_t times;	  /* that one and so many after it in all; 0: all from the nth on */
};

/* Returns the rule's number; PRE: fewer than SIMSTORE_RULES_MAX. */
unsigned simstore_rule_add(struct simstore *ss, const struct simstore_rule *rule);
/* How many calls it made fail. */
uint64_t simstore_rule_hits(const struct simstore *ss, unsigned rule);
void simstore_rules_clear(struct simstore *ss);

/* Allocated bytes at most, over all files; UINT64_MAX (the beginning): no limit. */
void simstore_set_space(struct simstore *ss, uint64_t bytes);

/* --- crashes --- */

enum simstore_stop { SIMSTORE_NOT_DONE, SIMSTORE_HALF_DONE, SIMSTORE_DONE };

/* The nth changing call from now on (1: the next), over any restarts, is the last: done as said, and answered -ERR_IO.
 * 0: no crash point.
 * Half: of a write or zero some sectors; of a sync some of what was to be synced; anything else is done or not. */
void simstore_stop_at(struct simstore *ss, uint64_t nth, enum simstore_stop how);
bool simstore_stop_pending(const struct simstore *ss);
/* Stops now. */
void simstore_stop(struct simstore *ss);
bool simstore_stopped(const struct simstore *ss);

enum simstore_keep { SIMSTORE_KEEP_NONE, SIMSTORE_KEEP_RANDOM, SIMSTORE_KEEP_ALL };

/* The machine comes back after it lost power: of the unsynced, `keep` is there. */
void simstore_power_cut(struct simstore *ss, enum simstore_keep keep);
/* A process comes back on a machine that stayed up. */
void simstore_restart(struct simstore *ss);
/* Memory is short: what failed syncs have lost is gone from the cache too. At any time. */
void simstore_evict(struct simstore *ss);

/* --- looking, without counting and without faults --- */

/* While on, calls are carried out without faults and not counted: for checks that read through the code under test. */
void simstore_look(struct simstore *ss, bool on);

struct simstore_counters {
	uint64_t calls[SIMSTORE_CALLS], failed[SIMSTORE_CALLS]; /* failed by a rule or for room, included in calls */
	uint64_t changes;					/* the sum of calls[] below SIMSTORE_OPEN */
	uint64_t written_bytes;
	uint64_t power_cuts, restarts;
};

const struct simstore_counters *simstore_counters(const struct simstore *ss);
const char *simstore_call_name(enum simstore_call call); /* "write" */
/* The call at which it stopped, or else the last that a rule made fail: "write volumes/a/disk.raw 4096+512", or "". */
const char *simstore_fault_text(const struct simstore *ss);

/* A file's content as read now, or what a power cut that keeps nothing would leave of it. -ERR_NOENT. Reads past the
 * end are zeroes. durable: found by its durable name. */
int simstore_peek(struct simstore *ss, const char *path, bool durable, uint64_t off, void *buf, size_t len);
int simstore_peek_size(struct simstore *ss, const char *path, bool durable, uint64_t *ret);
/* The blocks (BLOCK_SIZE) of a file as read now, the first n: NULL for one that is a hole or past the end. The file's
 * own, until it is written to. -ERR_NOENT. */
int simstore_peek_blocks(struct simstore *ss, const char *path, const uint8_t **ret_blocks, uint64_t n);
/* Flips bits in the stored bytes, those of the cache and the durable ones. -ERR_NOENT. */
int simstore_corrupt(struct simstore *ss, const char *path, uint64_t off, size_t len);
/* Whether nothing is unsynced: no data, no name. */
bool simstore_clean(const struct simstore *ss);
/* Its invariants. */
void simstore_check(const struct simstore *ss);

#endif
