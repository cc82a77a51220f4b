/* The replication core of one group: a finite state machine without I/O, threads or clock (docs/ARCHITECTURE.md).
 *
 * Events go in through repl_step, each with the time; actions come out through the shell's `emit`, in order, during
 * the step. The shell (fs/repl_shell.c, or the simulator) carries them out and reports back with further events. It
 * calls repl_step from one thread at a time. Payload never enters the core: it sees ranges, sequence numbers,
 * generations.
 *
 * Rules of carrying out (the shell's side of the contract):
 *   - ACT_SEND: frames leave in the order emitted, on the session they were emitted for, or not at all.
 *   - ACT_SAVE_META is the one barrier: encode the record pointed to before repl_step returns, make it durable, make
 *     the switch that it names in memory, then report EV_META_SAVED. The core emits no second one before that. A save
 *     that failed may be found by the next start all the same, so the files that it names stay, until another save has
 *     succeeded; the core's next one, at once, is of the record as it was, with nothing to switch.
 *   - ACT_SUBMIT: carry out the I/O of `io`, in any order against others, report EV_IO_DONE once.
 *   - ACT_COMPLETE: the io is the owner's again; the core does not touch it any more.
 *   - emit must not call repl_step.
 *
 * Invariants are numbered in docs/INVARIANTS.md; the comments in core/repl_*.c name them.
 */
#ifndef REPFS_CORE_REPL_H
#define REPFS_CORE_REPL_H

#include <stdbool.h>
#include <stdint.h>

#include "core/bitmap.h"
#include "core/err.h"
#include "core/lineage.h"
#include "core/range.h"
#include "core/repl_meta.h"
#include "core/reqset.h"
#include "core/wire.h"

/* Largest single request: FUSE's 1 MiB; zeroes and discards are split by the owner above this. */
#define REPL_DATA_MAX (1U << 20)
#define REPL_ZERO_MAX (UINT64_C(1) << 30)

enum repl_kind {
	/* of a guest, of the peer's stream */
	REPL_WRITE,
	REPL_ZERO,
	REPL_DISCARD,
	REPL_FLUSH,
	/* of the peer's stream only */
	REPL_CHECKPOINT,
	REPL_RESYNC_BEGIN,
	REPL_HASH, /* compare the disk with payload's hashes: shell sets ext_len, a mask of the regions that differ */
	REPL_RESYNC_DONE,
	/* of the peer's stream: compare the disk with payload's hashes, or with zeroes (hole); the shell puts the
	 * ranges that do not fit in their place, as VERIFY_ANSWER's payload, ext_len bytes. TARGET_OWN, the core's own:
	 * the hashes, seeded with hash_seed, into a buffer that the following ACT_SEND of this io sends; `bad`: blocks
	 * that can't be read */
	REPL_VERIFY,
	/* the core's own; see enum repl_target for what the shell does */
	REPL_RESYNC_SCAN, /* find the extent at off: shell sets hole, ext_len (<= len) */
	REPL_RESYNC_READ, /* read [off, off + len) into a buffer that the following ACT_SEND of this io sends */
	REPL_RESYNC_HASH, /* the same with the hashes of its regions, seeded with hash_seed (docs/protocol.md, HASH) */
	REPL_MARK,	  /* repl_mark every block in undo(base) .. live and active as dirty; then as REPL_INTENT_ALL */
	REPL_COMMIT,	  /* volume_commit over [off, off + len) */
	REPL_INTENT_CLEAR, /* clear the intent bits in the volumes' `clearing` maps */
	REPL_INTENT_ALL,   /* set the intent bits in the volumes' `marking` maps, durably (union, full sync) */
	REPL_MERGE,	   /* volume_merge_into_older(arg) on all volumes; flags REPL_MERGE_FOR_ROOM: -ERR_NOSPC, with
			    * nothing done, unless that frees room and there is room for what it copies */
	/* of local disk errors (core/repl_detach.c) */
	REPL_READ,    /* of a guest where the disk is detached or failed; of the peer: READ_REQ. With ACT_SUBMIT,
		       * TARGET_DISK: read the disk into the owner's buffer; of the peer's stream into one that the
		       * following ACT_SEND sends */
	REPL_DETACH,  /* of the peer's stream, a barrier: volume, lineage */
	REPL_ATTACH,  /* of the peer's stream, a barrier: volume */
	REPL_REBUILD, /* the core's own: write the bytes that came with ACT_SUBMIT (none: zeroes) to the disk */
	REPL_RESIZE,  /* of the peer's stream, a barrier: volume; arg: its size to be. The disk is synced and its file
		       * made  that long, which nothing shows: ext_len is 0, or the error's code */
	REPL_GROW,    /* the core's own: the same of this host's file, without the sync; arg: also the size that it has,
		       * to go back */
	REPL_SCRUB,   /* one step of a look at the volume's overlays, into *scrub */
	REPL_REOPEN,  /* the core's own: open the disks of the volumes in the mask `arg` anew (volume_reopen) */
};

#define REPL_MERGE_FOR_ROOM 1U

/* What ACT_SUBMIT asks for. */
enum repl_target {
	TARGET_DISK, /* WRITE ZERO DISCARD: volume_write; HASH; FLUSH: volume_sync of all volumes of the group but those
		      * in repl_unsynced; sets `failed` */
	TARGET_ACTIVE, /* WRITE ZERO DISCARD: volume_write_active; FLUSH: volume_sync_active of all, and the disks */
	/* Set intent bits [mark_first, mark_first + mark_units), durably. Those that are asked for while a sync of the
	 * map runs may share the next one. */
	TARGET_INTENT,
	TARGET_CKPT, /* CHECKPOINT, RESYNC_BEGIN: volume_sync of all in `power`, nothing in `process` */
	TARGET_OWN,  /* the kinds that are the core's own */
};

/* One request in the core's hands. The owner (the shell) zero-fills it, sets the first part, and gets it back with
 * ACT_COMPLETE. */
struct repl_io {
	enum repl_kind kind;
	uint32_t volume; /* index in the group */
	uint64_t off, len;
	bool resync;		     /* of the peer's stream: RESYNC_WRITE, RESYNC_ZERO */
	bool internal;		     /* the core's own object */
	uint64_t seq;		     /* of the peer's stream: the frame's. Of a primary: the core's, when it was sent */
	uint64_t arg;		     /* CHECKPOINT, MERGE: number. RESYNC_BEGIN: the source's generation */
	uint32_t flags;		     /* CHECKPOINT: enum wire_ckpt_flags. MERGE: REPL_MERGE_FOR_ROOM */
	struct lineage lineage;	     /* RESYNC_DONE: the source's. */
	uint64_t hash_seed;	     /* RESYNC_HASH, VERIFY */
	struct wire_scrubbed *scrub; /* SCRUB: next_* say where to begin; the core's */
	enum repl_target target;     /* with ACT_SUBMIT */
	uint64_t mark_first, mark_units; /* TARGET_INTENT */
	/* results the shell sets before EV_IO_DONE */
	/* RESYNC_SCAN. MARK: active is not empty. CHECKPOINT: its files may hold what it does not: a write failed */
	bool hole;
	uint64_t ext_len;	    /* RESYNC_SCAN; HASH: which regions differ; VERIFY: bytes of the answer */
	uint64_t bad[2];	    /* VERIFY, the core's own: a bit for each block that can't be read here */
	bool scrub_end;		    /* SCRUB: that was the last step of this volume */
	bool save_failed;	    /* old content could not be saved: the disk was not touched */
	uint64_t failed;	    /* FLUSH of disks: a bit for each volume whose sync failed */
	void *payload;		    /* the shell's own: bytes of a RESYNC_READ or of a stream's WRITE */
	uint8_t owner;		    /* the shell's own */
	struct repl_io *next_shell; /* the shell's own; `next` is the core's while an io is submitted */
	/* the core's */
	uint8_t phase;
	bool barrier_sent, local_done, wants_bump;
	bool strict; /* completes when the peer has applied (flushed) it, whatever the protocol */
	bool tried;  /* the local disk was tried */
	bool parked; /* has been: it is not counted among the writes in flight */
	bool verify; /* one of repl_verify.c's */
	int error;
	uint64_t session;
	uint64_t start_ns, asked_ns; /* asked: when it came, though it may have waited at the gate */
	struct reqset_claim claim;
	struct repl_io *next, *prev;
	struct repl_list *list;
};

struct repl_list {
	struct repl_io *head, *tail;
	uint64_t count;
};

enum link_state { LINK_DOWN, LINK_HANDSHAKE, LINK_RESYNC, LINK_SYNCED };
const char *link_state_name(unsigned s);

enum repl_cmd {
	CMD_PROTECT,   /* text: peer; flags: WIRE_JOIN_ADOPT, PROTECT_HASH */
	CMD_FAILBACK,  /* text: peer */
	CMD_UNPROTECT, /* flags: UNPROTECT_FORCE */
	CMD_RESOLVE, /* number: enum repl_discard; result: the loser's kept checkpoint, where this host is the loser */
	CMD_START,
	CMD_STOP,
	CMD_CHECKPOINT, /* flags: WIRE_CKPT_PIN; result number */
	CMD_FAILOVER, /* number: FAILOVER_DEFAULT, FAILOVER_LATEST, or a checkpoint; flags: enum repl_failover_flags */
	CMD_DISCARD,
	CMD_SETTINGS, /* settings: the new ones; number: a bit for each of them that is to change (settings_take) */
	CMD_DROP,     /* number: a checkpoint */
	CMD_PAUSE,    /* stop forwarding, go on with dirty tracking; durable */
	CMD_RESUME,   /* answered when resync may begin; in sync is what `wait` waits for */
	CMD_IDS,      /* ids: what frames are to call the volumes; of a standalone group, before it is protected */
	CMD_RESYNC,   /* rebuild detached disks from the peer; done when that has begun */
	/* A job holds a checkpoint of this host (core/repl_hold.c): nothing but want of room drops it, and reads of it
	 * are -ERR_NOENT from then on. number: which one; 0: the disks as they are now, all volumes between two guests'
	 * writes, on a host that serves its disk. text: who, as a refusal names it ("job 3"), shorter than HOLDER_SIZE.
	 * result: the number; result_time_ns: when it was taken. Several may hold one. Forgotten with the daemon. */
	CMD_HOLD,
	CMD_UNHOLD,	/* number, text: as held. What was taken for it is dropped in the background */
	CMD_SWITCHOVER, /* planned: the roles are swapped; result: the checkpoint at which, 0: it was done before */
	/* A clone: text: its name; number: a checkpoint; flags: the volume's index. That no other group has one of that
	 * name is the shell's to know. The record holds its checkpoint, durably, until CMD_UNCLONE (text). */
	CMD_CLONE,
	CMD_UNCLONE,
	CMD_RESIZE, /* flags: the volume's index; number: the size it is to have; result: the one it had */
	/* flags: enum repl_repair; verify: what is found, filled in until it is done */
	CMD_VERIFY,
	/* verify: of the one that is to end, with -ERR_INTR; it may have ended by itself */
	CMD_VERIFY_CANCEL,
};
#define HOLDER_SIZE 80		/* who holds a checkpoint, terminated */
#define PROTECT_HASH (1U << 31) /* compare hashes before anything is sent, until the first time in sync */
#define UNPROTECT_FORCE 1U	/* a detached disk is taken as it is, without what went through the peer */
#define FAILOVER_DEFAULT 0
#define FAILOVER_LATEST UINT64_MAX
enum repl_discard { DISCARD_LOCAL, DISCARD_PEER };
enum repl_failover_flags { FAILOVER_FORCE = 1, FAILOVER_DISCARD_ACTIVE = 2 };

/* What CMD_VERIFY does about what differs: nothing; the secondary gets the primary's content; the other way. */
enum repl_repair { REPAIR_NONE, REPAIR_PEER, REPAIR_FROM_PEER };

#define VERIFY_DIFFERENCES_MAX 1024U
enum repl_problem {
	PROBLEM_DIFFERS,    /* the two disks */
	PROBLEM_UNREADABLE, /* a disk or an overlay */
	PROBLEM_CHECKSUM,   /* an overlay's block is not what was saved */
};
enum repl_where { WHERE_BOTH, WHERE_PRIMARY, WHERE_SECONDARY };

/* What a verify says; the shell's memory, zeroed; written by the core until its command is done. */
struct repl_verify {
	uint64_t done, total; /* bytes, of disks and overlays on both hosts; total may still grow */
	uint64_t bytes;	      /* of disks compared */
	uint64_t found;	      /* of what is wrong, in bytes, all of it */
	uint64_t repaired;    /* of that: made equal, and compared again */
	uint64_t ckpt;	      /* the pinned checkpoint before the first repair; 0: none was needed */
	uint64_t kept;	      /* FROM_PEER: the checkpoint here whose overlay has this disk's old content; 0: nothing */
	bool wrote_here;      /* FROM_PEER: this disk was written */
	uint64_t more;	      /* ranges that the list has no room for */
	uint32_t n;
	struct repl_difference {
		uint32_t volume; /* index in the group */
		uint8_t problem, where;
		bool overlay, repaired;
		uint64_t layer; /* overlay: its checkpoint, or WIRE_SCRUB_ACTIVE */
		uint64_t off, len;
	} list[VERIFY_DIFFERENCES_MAX];
};

/* A command under way; owned by the shell until ACT_CMD_DONE. */
struct repl_command {
	enum repl_cmd cmd;
	char text[ADDR_SIZE];
	uint32_t flags;
	uint64_t number;
	struct settings settings;
	uint32_t ids[GROUP_VOLUMES_MAX]; /* by index */
	struct repl_verify *verify;	 /* CMD_VERIFY: the shell's */
	/* results */
	uint64_t result, result2, result3;
	uint64_t result_time_ns;
	struct err err;
	/* the core's */
	uint8_t phase;
	uint64_t seq;
	struct repl_command *next;
};

/* What the undo overlays hold, of all volumes of the group together, and the room for more. */
struct repl_usage {
	uint64_t free_bytes; /* under the store; UINT64_MAX: not known */
	uint32_t n;	     /* checkpoints in the chain, ascending; the last is the live epoch's */
	uint64_t numbers[GROUP_CKPTS_MAX], bytes[GROUP_CKPTS_MAX];
};

enum repl_event_type {
	EV_TICK, /* every 50 to 200 ms (later: this host was held up); heard_ns: when the link last heard, 0: no link;
		  * usage: as it is now, or NULL: not known yet, retention waits for it */
	EV_IO,	 /* io: a guest's WRITE, ZERO, DISCARD, FLUSH */
	EV_IO_DONE,    /* io, error: an ACT_SUBMIT is done */
	EV_META_SAVED, /* error: 0, or the record on disk is the old one, or perhaps the new one: see ACT_SAVE_META */
	EV_LINK_UP,    /* session, dialer: a framed connection for this group stands; peer_store */
	EV_LINK_DOWN,  /* session (0: a dial that failed, its number in `dial`), error, text */
	EV_FRAME,      /* session; frame; io (WRITE ... RESYNC_DONE: owned by the shell until ACT_COMPLETE); payload */
	EV_BATCH,      /* session: the frames of one read have all been given */
	EV_SENT,       /* session, bytes: left the queue */
	EV_COMMAND,    /* command */
	EV_SHUTDOWN,   /* answer what waits: frozen I/O gets EIO; say goodbye */
};

struct repl_event {
	enum repl_event_type type;
	uint64_t now_ns;  /* monotonic */
	uint64_t wall_ns; /* since 1970 */
	struct repl_io *io;
	int error; /* 0 or -ERR_x */
	uint64_t session, dial;
	bool dialer;
	const uint8_t *peer_store;
	const char *text;
	const struct wire_frame *frame;
	const void *payload;
	uint64_t bytes, heard_ns;
	void *const
	    *maps; /* META_SAVED: of volumes that have grown with it, zeroed, repl_volume_bytes of the new size */
	const struct repl_usage *usage;
	struct repl_command *command;
};

enum repl_action_type {
	ACT_SUBMIT,    /* io; REBUILD: data/data_len to copy */
	ACT_COMPLETE,  /* io, error; answered: the bytes of a READ, data/data_len to copy (NULL: io->len zeroes) */
	ACT_SEND,      /* frame; io: its payload is the frame's (WRITE, RESYNC_READ), or data/data_len to copy */
	ACT_SAVE_META, /* meta, whose volumes may have grown (the shell makes all ready first); ckpt: epoch to open (0:
			* none); active_id; drop: number to leave the chain, drop_through: it and all older ones leave
			* it, whatever they hold (0: none) */
	ACT_DIAL,      /* text: address; dial: its number. An older one counts no more */
	ACT_CLOSE,     /* drain: send what is queued first, bounded; flags: 1 = keep what was received (failover) */
	ACT_CMD_DONE,  /* command, error */
	ACT_LOG,       /* level 0..2 (error, warning, info), text */
	ACT_SERVING,   /* the way I/O is served changed: role, state, hold (repl_serving) */
	ACT_CHANGED,   /* the disks' content changed under the guests: cached pages are dropped, before commands of this
			* step are answered */
};

struct repl_action {
	enum repl_action_type type;
	struct repl_io *io;
	int error;
	struct wire_frame frame;
	const void *data;
	uint32_t data_len;
	bool answered; /* COMPLETE of a READ: by the peer, with data */
	const struct repl_meta *meta;
	uint64_t ckpt, active_id, drop, drop_through, dial;
	bool drain;
	struct repl_command *command;
	int level;
	const char *text;
};

typedef void (*repl_emit_fn)(void *arg, const struct repl_action *a);

/* How volumes of the group are served now: the table of SPEC 5. */
enum repl_serving {
	SERVING_DISK, /* the disk */
	SERVING_VIEW, /* active over image(base) */
	SERVING_EIO,
	SERVING_HOLD, /* wait: a restarted primary before its handshake */
};
enum repl_serving repl_serving(const struct repl_meta *m, bool holding);

/* Dirty tracking of one volume; maps over regions (REGION_SIZE), intent ones over INTENT_SIZE. */
struct repl_volume_state {
	struct bitmap dirty;	/* may differ from the peer */
	struct bitmap touched;	/* written since the running clear cycle began */
	struct bitmap cycle;	/* touched before it: cleared when both hosts have it durable */
	struct bitmap todo;	/* resync: to be sent. FAILOVER: to be committed */
	struct bitmap theirs;	/* the peer's dirty set, as this or the last handshake told it */
	struct bitmap intent;	/* as durable in the intent map: set here only after it is set there */
	struct bitmap marking;	/* being set by REPL_INTENT_ALL or REPL_MARK */
	struct bitmap hot;	/* intent regions used since the last look */
	struct bitmap clearing; /* intent regions being cleared by REPL_INTENT_CLEAR */
};
size_t repl_volume_bytes(uint64_t size); /* zeroed memory for one volume's maps */

struct repl_error {
	int code; /* positive; 0: none */
	char operation[24];
	char volume[NAME_SIZE];
	char text[ERR_TEXT_MAX];
	uint64_t off, len, time_ns; /* wall clock */
};

struct repl_counters {
	uint64_t writes, write_bytes, flushes, sent_bytes, received_bytes, resync_bytes, checkpoints, reconnects;
};

struct repl; /* core/repl_internal.h */

struct repl_init_args {
	struct repl_meta *meta; /* taken over (the shell allocates; freed by the shell after the core's end) */
	struct repl_meta *next; /* scratch of the same type, taken over */
	void *volume_memory[GROUP_VOLUMES_MAX]; /* zeroed, repl_volume_bytes each, borrowed */
	const uint8_t *store;			/* this host's uuid, borrowed */
	uint64_t random_seed;			/* generations and jitter come from it: a seed per start */
	uint64_t now_ns;
	bool power; /* setting an intent bit costs a sync: many first writes set runs of bits at once */
	repl_emit_fn emit;
	void *emit_arg;
};
size_t repl_size(void);
/* into memory of repl_size() bytes. The shell loads `intent` and `dirty` (repl_load_intent) before the first step. */
void repl_init(struct repl *r, const struct repl_init_args *a);
/* What the intent map holds. All regions of its units are dirty; or, with `fine`, those that the shell has set in the
 * volume's `dirty` map already (a clean end has kept them). */
void repl_load_intent(struct repl *r, uint32_t volume, const struct bitmap *intent, bool fine);
void repl_step(struct repl *r, const struct repl_event *ev);
/* The shell's answer to REPL_MARK, within the submit and under the same exclusion as repl_step. */
void repl_mark(struct repl *r, uint32_t volume, uint64_t off, uint64_t len);
void repl_check(const struct repl *r); /* every invariant that can be seen from here */

/* ---- what the shell and status read, under the same exclusion as repl_step ---- */
const struct repl_meta *repl_meta(const struct repl *r);
struct repl_volume_state *repl_volume_state(struct repl *r, uint32_t volume);
bool repl_holding(const struct repl *r);
/* A stop is under way: the link that it found in sync stays so to its end, whatever is paused meanwhile. */
bool repl_stopping(const struct repl *r);
/* Volumes (a mask of their indices) whose local disk must not be read: reads go through the core as REPL_READ. */
uint64_t repl_detached(const struct repl *r);
/* Those whose local disk is not synced either: detached, and not being rebuilt. */
uint64_t repl_unsynced(const struct repl *r);
bool repl_forwarding(const struct repl *r); /* a primary on a live session, not behind: payload will be sent */
/* Whether a connection that has just come up is this group's from now on: asked by the shell before EV_LINK_UP, under
 * the same exclusion. `join` is what the peer dialled with; NULL: this host dialled, and `dial` is the number of that.
 * Two that cross each other (a failback, while the old primary dials) must not end both, and one that its dialler has
 * given up for another since is heard of by neither. */
bool repl_takes_link(const struct repl *r, const struct wire_join *join, uint64_t dial);
/* Builds the JOIN of this host into *j, with the number of the last one that it said. */
void repl_join(const struct repl *r, struct wire_join *j);

struct repl_status {
	enum link_state link;
	uint64_t dirty_bytes, queue_bytes;
	bool resync;
	uint64_t resync_done, resync_total, resync_rate; /* bytes, bytes a second */
	uint64_t detached, rebuilding; /* masks of volume indices; while rebuilding, resync is its progress */
	bool commit;
	uint64_t commit_done, commit_total;
	bool rpo_known;
	uint64_t rpo_ns;
	uint64_t checkpoint;	     /* newest completed from the stream; 0: none */
	uint64_t checkpoint_time_ns; /* wall clock; 0: not known */
	struct repl_error error;
	struct repl_counters counters;
	bool degraded;
	char reasons[4][160];
	unsigned n_reasons;
};
void repl_status(const struct repl *r, uint64_t now_ns, struct repl_status *ret);

/* The record's checkpoint i is one for people and programs to see: not one that was opened for a job and is only still
 * there because it can't go yet. After a crash such a one need not be what it was. */
bool repl_shows_ckpt(const struct repl *r, uint32_t i);
/* Who holds a checkpoint: the nth holder, in buf, or NULL: there are no more. */
const char *repl_holder(const struct repl *r, uint64_t number, unsigned nth, char buf[static HOLDER_SIZE]);

/* What the two copies hold that the other was never told: `dirty` and, where peer_known, `theirs` of the volumes. */
struct repl_diverged {
	uint64_t since_ns; /* wall clock; 0: this copy holds nothing of the kind */
	bool peer_known;   /* the peer has told its part since this daemon's start */
	uint64_t peer_since_ns;
};
void repl_diverged(const struct repl *r, struct repl_diverged *ret);

#endif
