/* The durable record of a group on one host, and its encoding (docs/format.md). Changed only by the core; saved by
 * the shell as one write that decides (SPEC 5: state, role and base change in one metadata write). */
#ifndef REPFS_CORE_REPL_META_H
#define REPFS_CORE_REPL_META_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/err.h"
#include "core/settings.h"

#define NAME_MAX_LEN 63 /* SPEC 13: [A-Za-z0-9][A-Za-z0-9._-]{0,62} */
#define NAME_SIZE (NAME_MAX_LEN + 1)
#define ADDR_SIZE 272 /* HOST:PORT, terminated */
#define GROUP_VOLUMES_MAX 64
#define GROUP_CKPTS_MAX 4096
#define GROUP_CLONES_MAX 64
#define GENERATIONS_MAX 16
#define GROUP_GROWTHS_MAX 256

enum role { ROLE_STANDALONE, ROLE_PRIMARY, ROLE_SECONDARY };
enum state { STATE_NONE, STATE_RUNNING, STATE_FAILOVER, STATE_FAILOVER_FAILED, STATE_DONE };

/* Generations (SPEC 8, core/lineage.h). Random non-zero 64-bit identifiers; 0 = none. cur == 0: never written. */
struct lineage {
	uint64_t current;
	uint64_t bitmap; /* the current one when the peer was last in sync; 0: in sync or never had one */
	uint64_t history[GENERATIONS_MAX]; /* newest first, 0-filled */
};

enum ckpt_kind { CKPT_STREAM, CKPT_LOCAL, CKPT_PARTIAL };
enum ckpt_flags {
	CKPT_PINNED = 1 << 0,  /* retention leaves it alone */
	CKPT_FOREIGN = 1 << 1, /* of data that the lineage now followed has discarded: no default target (LASTLIN) */
	CKPT_JOB = 1 << 2,     /* opened for a job of this host only: goes when nothing holds it (repl_hold.c) */
};

struct repl_ckpt {
	uint64_t number;
	uint64_t generation; /* lineage.current of the stream it was taken from */
	uint64_t time_ns;    /* wall clock, ns since 1970 */
	uint8_t kind;	     /* enum ckpt_kind */
	uint8_t flags;	     /* enum ckpt_flags */
};

/* A writable scratch over a checkpoint of one volume; it holds the checkpoint (core/repl_hold.c). */
struct repl_clone {
	char name[NAME_SIZE]; /* unique on the host */
	char volume[NAME_SIZE];
	uint64_t ckpt;	  /* what it stands on. Not listed any more: given up for want of room, all I/O is EIO */
	uint64_t id;	  /* of its overlay's files; never used again */
	uint64_t time_ns; /* wall clock: when it was made */
};

/* A volume has grown: its checkpoints up to `last` have `size` bytes, but for those that an earlier entry of it has. */
struct repl_growth {
	char volume[NAME_SIZE];
	uint64_t last;
	uint64_t size;
};

struct repl_volume {
	char name[NAME_SIZE];
	uint8_t uuid[16];
	uint32_t id; /* on the wire; assigned by who started the protection; unique in the group */
	uint64_t size;
	uint8_t flags; /* enum volume_flags */
};

/* Of local disk errors (core/repl_detach.c). */
enum volume_flags {
	VOLUME_STALE = 1 << 0,	    /* this host's disk of it is not current: the peer's is */
	VOLUME_REBUILD = 1 << 1,    /* with STALE, on a primary: being rebuilt from the peer */
	VOLUME_PEER_STALE = 1 << 2, /* a secondary's: the primary's disk of it is not current, this host's is */
};

struct repl_meta {
	char group[NAME_SIZE];
	uint8_t uuid[16];
	uint8_t role;  /* enum role */
	uint8_t state; /* enum state */
	bool has_peer; /* dirty tracking is on: a peer has, or had, a copy */
	bool alone;    /* a generation was begun since the last completed handshake: further writes alone begin none */
	bool inconsistent; /* an unfinished sync target: never a source, no view */
	bool fresh; /* with inconsistent: made for this sync, nothing kept, nothing saved before the first checkpoint */
	bool split_brain;
	bool shut_out;	/* a primary that learnt that its peer failed over: role secondary, state NONE, waits for
			   failback */
	bool broken;	/* on_cow_error=break: no checkpoint is valid until the next */
	bool own_dirty; /* an inconsistent target that had dirty regions of its own: `kept` stays pinned for good */
	bool paused;	/* a primary that forwards nothing until `resume` */
	bool hash_sync; /* a primary whose first sync compares hashes, and has not ended */
	bool switched;	/* a secondary that was the primary, and handed over in a switchover */
	bool handed;	/* with switched: it has not followed the peer yet, which may still have to take over */
	struct lineage lineage;
	uint64_t sync_from;   /* with inconsistent: the source's generation */
	uint64_t ckpt_max;    /* the highest number ever used or heard of; only grows */
	uint64_t base;	      /* the checkpoint that the view stands on; 0: the disk itself */
	uint64_t last_stream; /* the newest completed one from the stream in the lineage last adopted; 0: none. A
			       * primary's is among its peer's, not its own */
	uint64_t kept;	      /* local one taken before an unfinished resync; 0: none */
	uint64_t
	    target; /* state FAILOVER*: the checkpoint gone back to; 0: latest. Kept in DONE for "the same again" */
	uint64_t received; /* last failover: the local checkpoint of the disk as received; 0: none */
	uint64_t received_bytes;
	uint64_t failover_generation; /* the generation that the last failover began */
	uint64_t active_id;	      /* the active overlay's file; 0: none yet */
	uint64_t diverged_ns; /* wall clock: since when this copy holds what the peer was never told; 0: it does not */
	char peer[ADDR_SIZE]; /* HOST:PORT that this host dials; "": it does not */
	uint8_t peer_store[16]; /* the peer's store uuid once known, else zeroes */
	struct settings settings;
	uint32_t n_volumes;
	struct repl_volume volumes[GROUP_VOLUMES_MAX];
	uint64_t clone_max; /* the highest id of a clone ever used; only grows */
	uint32_t n_clones;
	struct repl_clone clones[GROUP_CLONES_MAX];
	uint32_t n_growths;
	struct repl_growth growths[GROUP_GROWTHS_MAX]; /* in the order in which they came */
	uint32_t n_ckpts;
	struct repl_ckpt ckpts[GROUP_CKPTS_MAX]; /* ascending by number */
};

#define REPL_META_VERSION 3
#define REPL_META_VERSION_MIN 1 /* read too: what it lacks is 0 */
#define REPL_META_ENCODED_MAX (512U << 10)

void repl_meta_init(struct repl_meta *m, const char *group); /* standalone, NONE, defaults */
/* *to = *from, at the cost of the checkpoints that it holds: what lies behind them in *to is left alone. */
void repl_meta_copy(struct repl_meta *to, const struct repl_meta *from);
/* Into buf[size]; returns the length, or -ERR_LIMIT. The record must be valid (repl_meta_validate): one that a later
 * start would refuse must never reach the disk, so that is asserted. */
int repl_meta_encode(const struct repl_meta *m, void *buf, size_t size);
/* Validates everything: enumerations, counts, names, sizes, order, and what the fields say of each other.
 * -ERR_CORRUPT (-ERR_VERSION for a version it does not know) and *e say which field; *m is then unspecified. */
int repl_meta_decode(struct repl_meta *m, const void *buf, size_t len, uint32_t version, struct err *e);

/* The same checks on a record in memory: 0, or -ERR_CORRUPT and *e say which field. */
int repl_meta_validate(const struct repl_meta *m, struct err *e);

/* The parts that the wire's messages share with the record (docs/format-group.md). */
void repl_meta_lineage_encode(const struct lineage *l, struct wbuf *w);
void repl_meta_lineage_decode(struct lineage *l, struct rbuf *r); /* fails r on a gap in the history */
void repl_meta_volume_encode(const struct repl_volume *v, struct wbuf *w);
void repl_meta_volume_decode(struct repl_volume *v, struct rbuf *r, uint32_t version);
/* What is wrong with the first bad one of v[n] (its index in *ret_index), or NULL: names and ids valid and used
 * once, sizes valid. */
const char *repl_meta_volumes_fault(const struct repl_volume *v, uint32_t n, uint32_t *ret_index);
/* Whether a host in this role can be in this state (SPEC 5). */
bool repl_meta_role_state_valid(unsigned role, unsigned state);

int repl_meta_find_volume(const struct repl_meta *m, const char *name); /* index or -ERR_NOENT */
int repl_meta_volume_by_id(const struct repl_meta *m, uint32_t id);	/* likewise, by what the wire calls it */
bool repl_meta_flagged(const struct repl_meta *m, unsigned flag);	/* of any volume: VOLUME_x */
int repl_meta_find_ckpt(const struct repl_meta *m, uint64_t number);	/* index or -ERR_NOENT */
int repl_meta_find_clone(const struct repl_meta *m, const char *name);	/* index or -ERR_NOENT */
/* The size of a volume (by index) as of a checkpoint; 0: now. */
uint64_t repl_meta_size_at(const struct repl_meta *m, uint32_t volume, uint64_t number);
/* The volume has `size` bytes from now on, more than before; its checkpoints keep what they have. -ERR_LIMIT: too many
 * growths are remembered for checkpoints that are kept. */
int repl_meta_grow(struct repl_meta *m, uint32_t volume, uint64_t size);
void repl_meta_forget_growths(struct repl_meta *m, const char *volume); /* NULL: those that no checkpoint needs */
bool name_valid(const char *name);

const char *role_name(unsigned role);	   /* "primary" */
const char *state_name(unsigned state);	   /* "RUNNING" */
const char *ckpt_kind_name(unsigned kind); /* "stream" */

#endif
