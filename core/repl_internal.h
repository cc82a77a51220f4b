/* The private side of the replication core, shared by the files core/repl*.c (docs/ARCHITECTURE.md says what is in
 * which). */
#ifndef REPFS_CORE_REPL_INTERNAL_H
#define REPFS_CORE_REPL_INTERNAL_H

#include "core/repl.h"

#define TX_MAX 32
#define RESYNC_READS_MAX 4
#define REBUILDS_MAX 4
#define RESYNC_RETRY_NS UINT64_C(2000000000) /* after a local read for a resync failed */
#define RESYNC_READ_MAX (512U << 10)
#define HASHES_MAX 16			     /* hashed ranges whose answer is not there, or that are to be sent */
#define VERIFY_SLOTS 16			     /* chunks of a verify under way */
#define VERIFY_SPAN_MAX (UINT64_C(64) << 20) /* of zeroes, in one frame */
#define RATE_SAMPLES 16
#define RATE_SAMPLE_NS UINT64_C(500000000)
#define RATE_BURST_NS UINT64_C(250000000)
#define RESYNC_SCAN_MAX (UINT64_C(1) << 30)
#define RESYNC_ZERO_FRAME_MAX (UINT64_C(64) << 20)
#define RESYNC_QUEUE_MAX (UINT64_C(8) << 20)   /* bytes queued to the peer above which resync waits */
#define RESYNC_WINDOW_MAX (UINT64_C(64) << 20) /* resync bytes sent and not applied */
#define WINDOW_MAX 1024			       /* requests of the stream claimed at once; the rest wait in order */
#define COMMITS_MAX 2
#define COMMIT_MAX (512U << 10)
#define CYCLE_NS UINT64_C(1000000000) /* clear cycle: at least so long between two, */
#define CYCLE_REST 9		      /* and so many times as long as the last one's flushes took */
#define INTENT_LOOK_NS UINT64_C(10000000000)
#define RETENTION_REST_NS UINT64_C(10000000000)
#define EARLY_MIN_NS UINT64_C(1000000000) /* from a checkpoint to an early one */
#define RESAVE_NS UINT64_C(1000000000)
/* First writes to clean intent units (docs/adr/0007): up to MARKS_LIGHT of them, drained by one each
 * MARKS_DRAIN_NS, set one unit each; then the run that one sets doubles with each further MARKS_STEP, to MARK_RUN_MAX.
 */
#define MARKS_LIGHT 16
#define MARKS_STEP 8
#define MARK_RUN_SHIFT_MAX 6 /* 64 MiB */
#define MARKS_MAX (MARKS_LIGHT + MARKS_STEP * MARK_RUN_SHIFT_MAX)
#define MARKS_DRAIN_NS UINT64_C(250000000)
/* Of the checkpoints that a record can hold one stays free, as an epoch is opened before another goes. The last ones
 * below that are for what must not fail for want of one (a resync, a failover, the end of a replication); retention
 * makes room for the others from so many below those on. */
#define CKPTS_LAST (GROUP_CKPTS_MAX - 1)
#define CKPTS_RESERVE 16
#define CKPTS_MARGIN 64
#define CKPTS_MOST (CKPTS_LAST - CKPTS_RESERVE)
#define CKPTS_FULL_TEXT                                                                                                \
	"the group has as many checkpoints as there can be, and the oldest may not go (pinned, held or in use); drop " \
	"some with `checkpoints --drop`"
#define HOLDS_MAX 64 /* of jobs, per group */
#define ACK_LAZY_NS UINT64_C(100000000)
#define REDIAL_MIN_NS UINT64_C(50000000)
#define REDIAL_MAX_NS UINT64_C(2000000000)
#define REFUSED_REDIAL_NS UINT64_C(2000000000) /* also between two handshakes of a halted pair */
#define TICK_MAX_NS UINT64_C(200000000)	       /* between two ticks, see EV_TICK; what is above is lateness */
#define DIALLED_WAIT_NS UINT64_C(5000000000)   /* a command waits so long, and peer_timeout, for the peer to dial */
#define CATCH_UP_RETRY_NS UINT64_C(1000000000)
/* Of what a peer may name: room above it for this host's own, so that no number outgrows the wire's limit. */
#define CKPT_PEER_MAX (WIRE_CKPT_NUMBER_MAX / 2)

enum phase {
	PHASE_NONE,
	PHASE_GATED,	  /* list gated */
	PHASE_CLAIM,	  /* in the claims, waiting */
	PHASE_BUMP,	  /* list bumping: a generation is being begun before it starts */
	PHASE_CLEAR_WAIT, /* list clear_wait: its intent bits are being cleared */
	PHASE_INTENT,	  /* its intent bits are being set */
	PHASE_IO,	  /* local I/O */
	PHASE_ACK,	  /* list acks: the peer has to say something */
	PHASE_BUMP_DONE,  /* list bumping: all done but the generation */
	PHASE_FROZEN,	  /* list frozen: on_disconnect=freeze */
	PHASE_HELD,	  /* list held: of the stream, not looked at yet */
	PHASE_BARRIER,	  /* of the stream: a barrier being carried out */
	PHASE_PARKED,	  /* list parked: of a detached volume, waiting for the peer */
	PHASE_REMOTE,	  /* list reads: the peer has been asked */
	PHASE_ROOM,	  /* failed for want of room; submitted again when some is made. A guest's: list room */
};

/* What may be given up for a request that failed for want of room (repl_room.c). */
enum room_policy {
	ROOM_NONE,
	ROOM_UNNEEDED, /* unpinned checkpoints that nothing needs, one at a time */
	ROOM_ANY,      /* any, one at a time, the dearest last */
	ROOM_ALL,      /* all at once */
	ROOM_BREAK,    /* all at once, and the view */
};

/* Metadata changes: each one save. Ordered, one under way at a time. */
enum tx_kind {
	TX_BUMP,      /* begin a generation: writing without the peer */
	TX_SECONDARY, /* a standalone group becomes a fresh recovery copy (or, arg 1, an adopted one) */
	TX_UNPROTECT, /* standalone again, its peer forgotten */
	TX_RESTART,   /* a stopped secondary: DONE → NONE */
	TX_ACTIVATE,  /* source: the session begins; role primary, RUNNING */
	TX_IN_SYNC,   /* source: the target adopted generation `number` */
	TX_PAUSE,     /* primary: arg 1 paused, 0 resumed */
	TX_CATCH_UP,  /* primary that was behind: it is alone no longer */
	TX_SHUT_OUT,  /* a primary steps down: its peer failed over. arg 1: for a failback, whose JOIN is answered after
		       */
	TX_SPLIT,     /* both wrote alone */
	TX_KEEP,      /* target: local checkpoint, inconsistent, sync_from */
	TX_ADOPT,     /* target: resync done */
	TX_SWITCH,    /* secondary: a checkpoint from the stream */
	TX_CKPT,      /* primary: a checkpoint completed over there */
	TX_STOPPED,   /* primary: clean stop, or a stop of this side only */
	TX_FAILOVER,
	TX_COMMITTED,
	TX_COMMIT_FAILED,
	TX_COMMIT_RETRY,
	TX_DISCARD,
	TX_SETTINGS,
	TX_IDS,	 /* the volumes' ids are the command's */
	TX_DROP, /* number; arg 1: it and all older ones, which nothing needs */
	TX_HOLD, /* an epoch for a job on this host's own disk; command: a list of those that share it */
	TX_CLONE,
	TX_UNCLONE,
	TX_PEER_BROKEN, /* primary: the peer's checkpoints are given up */
	TX_ROOM,	/* arg: enum room_policy; number: what goes, 0: all */
	TX_RESIZE,	/* number: volume; arg: its size. io: of the stream; command; or neither: the handshake's */
	TX_DETACH,	/* primary: the peer has begun the generation of a detach */
	TX_REBUILD,	/* primary: a rebuild begins */
	TX_ATTACH,	/* primary: a rebuild has ended */
	TX_PEER_DETACH, /* secondary: DETACH or ATTACH of the stream */
	TX_HAND_OVER,	/* primary: it becomes secondary at checkpoint `number` */
	TX_TAKE_OVER,	/* secondary: it becomes primary, at checkpoint `number` */
};

struct tx {
	enum tx_kind kind;
	uint64_t number, arg;
	uint32_t flags;
	struct repl_io *io;
	struct repl_command *command;
	struct lineage lineage;
	struct settings settings;
	uint64_t session;
	uint64_t opened, active_id, dropped, dropped_through; /* what the save switches */
};

struct repl {
	struct repl_meta *meta, *next;
	uint8_t store[16];
	repl_emit_fn emit;
	void *emit_arg;
	uint64_t random;
	uint64_t start_id, joins;      /* what the JOINs of this start are told apart by, and how many were said */
	uint64_t heard[2], heard_join; /* the peer's last start, the one before, and the number of its last JOIN */
	uint64_t now_ns, wall_ns;

	/* metadata */
	struct tx txq[TX_MAX];
	unsigned tx_head, tx_count;
	bool saving;
	struct tx tx; /* under way */
	/* A save failed: what it was to save may still be found by the next start. See repl.c. */
	bool unsure, unsure_holds, resaving, tx_failed;
	int save_error;
	uint64_t resave_ns;
	uint64_t ckpt_used; /* highest number used or heard of, may be ahead of the record */

	/* requests */
	struct reqset claims;
	struct repl_list gated, bumping, clear_wait, acks, frozen, held, window;
	struct repl_list room;	      /* guests' writes in PHASE_ROOM */
	enum room_policy room_policy; /* of the room being made; ROOM_NONE: none is */
	int room_error;
	uint32_t room_tried; /* so many that may go could not help */
	unsigned room_rank;  /* how dear the one that was chosen is */
	bool room_merging;
	struct repl_volume_state vol[GROUP_VOLUMES_MAX];
	uint64_t writes_in_flight; /* guests' writes past the gate and not locally done */
	bool power;
	uint64_t marks, marks_ns; /* first writes to clean units of late, drained up to marks_ns */
	uint64_t marks_busy;	  /* requests whose intent bits are being set */
	bool holding;		  /* restarted primary: nothing served before the handshake */
	uint64_t hold_until_ns;
	bool activating, stopping, stop_cleared, failing_over, finalising, shutdown;
	/* switchover (repl_switchover.c). The primary: `stopping` as long as it is not HAND_NONE. */
	enum handing {
		HAND_NONE,
		HAND_DRAIN, /* what is under way ends */
		HAND_CKPT,  /* the peer takes its checkpoint */
		HAND_SAVE,  /* this host steps down */
		HAND_TOLD,  /* and has told the peer to take over */
	} handing;
	struct repl_command *switchover; /* also waits when the session that it began in is over */
	uint64_t switchover_until_ns;
	/* The secondary. */
	uint64_t armed; /* that checkpoint is the one to take over at: no write to the view starts; 0: none */
	bool taking;	/* it is taking over: likewise */
	bool take_busy;
	uint64_t taking_session, taking_number;
	struct repl_io take_io;

	/* session */
	enum link_state link;
	uint64_t session;
	bool dialer, join_sent, join_got, closing;
	bool dialing;		       /* the newest dial is under way */
	uint64_t dials;		       /* its number */
	struct wire_join mine, theirs; /* as sent and got: both hosts decide from the same two */
	bool join_owed;		       /* this host dialled and has not said its own: see session_join_ready */
	bool join_waits;	       /* their JOIN is here, but the old session's work has not ended */
	bool refused;		       /* this session ended in a refusal: no quick redial */
	bool is_source, is_target;
	enum lineage_decision decision;
	uint64_t link_since_ns, heard_ns, pinged_ns, redial_ns, redial_wait_ns, progress_ns;
	uint64_t tick_ns, silent_ns; /* the last tick; the peer's silence counts from here: see ev_tick */
	bool was_connected;
	uint8_t scratch[64 << 10];		     /* payloads being encoded */
	struct repl_command *protect, *start, *stop; /* protect: a failback too */
	struct repl_command *resolve;
	uint64_t resolve_until_ns, start_until_ns; /* they wait so long for a connection */
	bool yielding;	 /* no request starts: this host is about to give up its disk to a sync */
	bool adopting;	 /* it does so for a `protect --adopt` whose JOIN is answered after */
	bool dirty_sent; /* what this side holds is on its way */
	bool theirs_known;
	uint64_t theirs_since_ns;
	bool told;			  /* a survivor that dials: its old primary knows of the failover */
	struct repl_command *start_waits; /* for the connection of a stop just done to end */
	char dial_addr[ADDR_SIZE];

	/* primary */
	uint64_t seq; /* last sent */
	bool last_was_flush;
	uint64_t received, applied, flushed; /* the peer's word */
	uint64_t queue_bytes;
	struct repl_command *ckpts; /* waiting for CHECKPOINT_ACK */
	uint64_t auto_ckpt, last_auto_ns, stop_number;
	bool peer_broken; /* the peer's last word: its checkpoints are given up; `broken` of the record follows */
	bool ckpt_wanted;
	uint32_t ckpt_wanted_flags;
	bool stop_wanted; /* the peer's STOP_WANT waits for what may come to nothing, see stop_want */
	struct repl_command *setting;
	uint64_t setting_token;
	/* clear cycle */
	struct repl_io cycle_io;
	bool cycle_on, cycle_local;
	bool cycle_io_busy, cycle_again; /* again: the local flush under way began too early for this cycle */
	uint64_t cycle_seq, cycle_session, cycle_started_ns, cycle_next_ns;
	/* What the peer is known to have applied: all sent up to `sample_seq`, as it was at sample_ns. */
	uint64_t sample_seq, sample_ns, applied_ns;
	struct repl_io clear_io;
	bool clear_busy;
	uint64_t intent_looked_ns;
	/* resync source */
	struct repl_io rs[RESYNC_READS_MAX];
	bool rs_busy[RESYNC_READS_MAX];
	bool rs_ready, rs_done_sent, union_busy, union_started, dirty_ended;
	bool rs_whole;	 /* the peer is no unfinished target: with nothing dirty RESYNC_DONE may come alone */
	uint64_t rs_run; /* of this resync; what was read for another one is not sent */
	uint64_t rs_begin_seq, rs_done_seq, rs_done_generation, rs_adopted_seq;
	bool dirty_unsaved; /* regions are dirty whose intent bits could not be, or are yet to be, set: none is lost by
			       it */
	struct repl_io union_io;
	/* behind: the session stands, nothing of guests' is forwarded (the top of repl_primary.c) */
	bool behind, congested;
	bool congestion_said; /* in the log of either side, since it was in sync */
	uint64_t catch_up_ns; /* not before: a save failed, or the queue was full */
	uint32_t rs_vol;
	uint64_t rs_off;
	uint32_t rs_data_vol;
	uint64_t rs_data_off, rs_data_end;
	uint64_t rs_total, rs_allow_ns;
	struct {
		uint64_t ns, done;
	} rs_samples[RATE_SAMPLES]; /* of the last seconds, a ring; rs_n_samples counts on */
	uint64_t rs_n_samples;
	/* Ranges that were hashed: `seq` of the HASH, `mask` of the regions that the target says to differ. */
	struct rs_hash {
		bool used;
		uint32_t volume;
		uint64_t off, len, seq, mask;
	} rs_hash[HASHES_MAX];

	/* local disk errors (repl_detach.c): masks of volume indices */
	uint64_t detaching; /* DETACH is sent and not confirmed */
	uint64_t stale;	    /* the local disk is not current: I/O goes through the peer */
	uint64_t rebuild;   /* of those, being rebuilt: `todo` is what the local disk lacks */
	uint64_t detach_seq, attach_seq;
	uint64_t strict_seq; /* of this session: the last answered write of a detached disk */
	uint64_t strict_ns;  /* when it was answered */
	/* Such writes may be lost with a peer that was: a flush that came after the last of them was answered has to
	 * say so. */
	bool unflushed_untold;
	uint64_t unflushed_ns;	  /* when that was; 0: never. So have all flushes that came before */
	bool detach_saving;	  /* confirmed, and being recorded here */
	uint64_t detach_retry_ns; /* that failed: not again before */
	bool lineage_pending;	  /* `detach_lineage` may be the peer's, and is not in the record */
	struct lineage detach_lineage;
	struct repl_list parked, reads;
	uint64_t read_token;
	struct repl_io rb[REBUILDS_MAX];
	bool rb_busy[REBUILDS_MAX];
	uint32_t rb_vol;
	uint64_t rb_off, rb_total, rb_started_ns;
	uint64_t rb_session, rb_flushed; /* what is copied in this session is durable there from this barrier on */
	struct repl_io reopen_io, attach_io;
	bool reopening;
	unsigned attach_phase; /* enum attach_phase in repl_detach.c */
	struct repl_command *rebuilding;
	uint64_t rs_retry_ns; /* a local read for a resync failed: not before */

	/* verify (repl_verify.c) */
	struct {
		struct repl_command *c; /* NULL: none is under way */
		uint64_t run;		/* what belongs to another one ends by itself */
		enum repl_repair repair;
		uint32_t vol; /* the cursor over the disks; data_*: a part that is known to be no hole */
		uint64_t off, data_off, data_end;
		uint64_t allow_ns; /* resync_rate */
		uint64_t ckpt_asked, asked_ns;
		bool ckpt_wanted;
		struct verify_slot {
			struct repl_io io;
			uint8_t phase; /* enum verify_phase */
			bool failed, checking, counted;
			uint64_t run, off, len, seq; /* the chunk, and its frame */
			uint64_t lo, hi, at;	     /* being repaired: of it, up to where */
			uint32_t first, n;	     /* of what was found in it, in the list */
		} slot[VERIFY_SLOTS];
		struct verify_scrub { /* of this host's overlays, and of the peer's */
			uint32_t vol;
			bool busy;
			uint64_t run, total; /* of this volume, as counted in */
			uint64_t token;
			struct wire_scrubbed s;
		} own, peer;
		struct repl_io own_io;
		struct wire_scrubbed own_step; /* own_io's: the shell's while that is under way */
	} vf;
	/* resize (repl_resize.c) */
	struct {
		struct repl_command *c; /* NULL: none is under way */
		unsigned phase;		/* enum resize_phase */
		uint32_t volume;
		uint64_t size, seq;
		struct repl_io io;
		bool busy;	  /* io is under way */
		uint64_t joining; /* and is for the handshake of this session; 0: for the command */
		bool beyond;	  /* the peer has dirty regions past this host's end of some volume */
	} rz;
	/* a target's answer to SCRUB */
	struct repl_io scrub_io;
	struct wire_scrubbed scrub;
	bool scrub_busy;
	uint64_t scrub_waits;	      /* the session of scrub_next; 0: none */
	struct wire_frame scrub_next; /* waits for the end of one that an ended session asked for */

	/* secondary */
	uint64_t in_seq;     /* last received */
	uint64_t in_applied; /* all up to it applied */
	uint64_t in_flushed;
	struct wire_ack acked; /* as last told */
	uint64_t acked_ns;
	struct repl_io *barrier;
	bool apply_stopped;
	enum {
		STREAM_CLOSED, /* the primary does not forward: RESYNC_BEGIN comes first */
		STREAM_RESYNC, /* RESYNC_BEGIN has come */
		STREAM_OPEN,   /* RESYNC_DONE has come */
	} in_phase;
	bool in_whole; /* nothing of an unfinished sync is in this copy or on its way: RESYNC_DONE may come alone */
	uint64_t in_done_seq;
	bool barrier_waits; /* a checkpoint waits for the view's writes under way */
	bool ckpt_owed;	    /* the one that ends a resync is still to come */
	struct repl_command *want_ckpt;
	/* failover, commit */
	struct repl_command *failover;
	uint64_t failover_outcome;
	struct repl_io mark_io, sync_io, merge_io;
	bool mark_busy, marked, sync_busy, merge_busy;
	uint64_t retention_ns;		       /* not before: a merge failed */
	uint64_t epoch_bytes[GROUP_CKPTS_MAX]; /* of the record's checkpoints, in bytes, as of this tick */
	bool apart[GROUP_CKPTS_MAX];	       /* left out of retention */
	uint8_t rules[GROUP_CKPTS_MAX];	       /* which keep them */
	bool thinning;			       /* history has filled its room, and that was said */
	uint64_t thin_passed, thin_rest_ns;    /* dropping those up to it would free nothing; looked at again then */
	uint64_t early_ns;		       /* no early checkpoint is asked for before */
	struct repl_io commit[COMMITS_MAX];
	bool commit_busy[COMMITS_MAX];
	uint32_t commit_vol;
	uint64_t commit_off, commit_total;
	bool committing, commit_stopped;
	bool presynced;		/* the disks were synced once since the commit began */
	bool throttled;		/* guests' writes are let in at half the commit's pace, so that it ends */
	unsigned admit;		/* throttled: writes that may start, in halves */
	uint64_t active_writes; /* in flight to active in FAILOVER */
	struct repl_command *dropping, *drop_next; /* the latter waits for a merge under way */
	/* jobs that hold checkpoints (repl_hold.c), and those that wait for one to be taken */
	struct repl_hold {
		uint64_t number;
		char holder[HOLDER_SIZE];
	} holds[HOLDS_MAX];
	unsigned n_holds, n_hold_waits;
	struct repl_command *hold_waits;
	struct repl_command *cloning, *clone_waits; /* made or removed one after another; those that wait, in order */
	struct repl_io clone_io;		    /* the disks' sync before one over a job's checkpoint */

	uint64_t last_ckpt_wall_ns;
	struct repl_error error;
	struct repl_counters counters;
};

/* repl.c */
void list_push(struct repl_list *l, struct repl_io *io);
void list_remove(struct repl_io *io);
struct repl_io *list_pop(struct repl_list *l);
void repl_emit(struct repl *r, struct repl_action *a);
void repl_log(struct repl *r, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
void repl_set_error(struct repl *r, int code, const char *operation, int volume, uint64_t off, uint64_t len,
		    const char *fmt, ...) __attribute__((format(printf, 7, 8)));
uint64_t repl_random(struct repl *r);
/* The first run of a volume's `todo` from byte `from` on, in bytes, not past the volume's end: false if there is none.
 */
bool repl_todo_next(const struct repl *r, uint32_t volume, uint64_t from, struct range *ret_run);
void repl_submit(struct repl *r, struct repl_io *io, enum repl_target target);
void repl_complete(struct repl *r, struct repl_io *io, int error);
void repl_command_done(struct repl *r, struct repl_command *c, int error, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
struct tx *repl_tx(struct repl *r, enum tx_kind kind);	      /* queues one and returns it; repl_tx_run starts it */
struct tx *repl_tx_queued(struct repl *r, enum tx_kind kind); /* one that has not started yet, or NULL */
void repl_tx_run(struct repl *r);
bool repl_tx_pending(const struct repl *r, enum tx_kind kind);
void repl_gate_run(struct repl *r);
void repl_io_granted(struct repl *r, struct repl_io *io);
void repl_io_finish(struct repl *r, struct repl_io *io, int error); /* ends its claim, completes it */
/* Sets the io's claim: exclusive, over the whole blocks that it touches. */
void repl_claim_blocks(struct repl_io *io);
void repl_release_claim(struct repl *r, struct repl_io *io);
void repl_alone(struct repl *r, struct repl_io *io); /* complete it without the peer's word */
void repl_ready_claims(struct repl *r, struct reqset_claim *ready);
void repl_mark_written(struct repl *r, const struct repl_io *io);
void repl_fail_list(struct repl *r, struct repl_list *l, int error);
void repl_stepped_down(struct repl *r); /* nothing of this host's guests is served any more: what waits gets EIO */
void repl_begin_generation(struct repl *r, struct repl_meta *m);
bool repl_frozen(const struct repl *r); /* nothing may complete without the peer: on_disconnect=freeze */
void repl_guest_failed(struct repl *r, struct repl_io *io, int error); /* its local write, at last */
void repl_intent(struct repl *r, struct repl_io *io);		       /* its intent bits, then its local write */
void repl_marking_done(struct repl *r, bool durable);		       /* `marking` is in the map, or may not be */
extern const struct sm_table repl_states;
void repl_state_move(struct repl_meta *m, unsigned to);

/* repl_session.c */
void session_link_up(struct repl *r, const struct repl_event *ev);
void session_link_down(struct repl *r, int code, const char *text);
void session_close(struct repl *r, bool drain);
void session_drop(struct repl *r, const char *why); /* at once; what still comes of it is fenced */
void session_refuse(struct repl *r, int code, const char *text);
void session_yielded(struct repl *r); /* at the end of each step: what waits for the last guest's write */
void session_resolved(struct repl *r);
void session_answer(struct repl *r); /* a JOIN with this host's own, and decides */
void session_frame(struct repl *r, const struct repl_event *ev);
void session_tick(struct repl *r);
void session_join_ready(struct repl *r);
/* Ends *c, if there is one, which is NULL from then on. */
void repl_command_fail(struct repl *r, struct repl_command **c, int code, const char *text);
void session_dial(struct repl *r);
void session_redial(struct repl *r); /* if it is time; else from the tick */
/* What a frame of REFUSE's form says; false: it was none, and the session has ended. */
bool session_reason(struct repl *r, const struct repl_event *ev, struct wire_refuse *ret);
void session_tx_done(struct repl *r, struct tx *tx, int error);
void session_union_done(struct repl *r, int error);
void session_send(struct repl *r, unsigned type, uint64_t seq, uint64_t offset, uint64_t length, uint16_t flags,
		  const void *data, uint32_t len);
void session_protocol_error(struct repl *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* repl_primary.c */
bool primary_live(const struct repl *r);       /* a session as source stands */
bool primary_forwarding(const struct repl *r); /* and it is not behind */
void primary_congestion(struct repl *r);
void primary_catch_up(struct repl *r);
void primary_local_done(struct repl *r, struct repl_io *io);
void primary_flush_start(struct repl *r, struct repl_io *io);
void primary_flush_done(struct repl *r, struct repl_io *io);
void primary_frame(struct repl *r, const struct repl_event *ev);
void primary_activate(struct repl *r);
void primary_session_lost(struct repl *r);
void primary_tick(struct repl *r);
void primary_cycle_done(struct repl *r, int error);
void primary_clear_done(struct repl *r, int error);
void primary_in_sync(struct repl *r);
void primary_stop_begin(struct repl *r); /* a stop, or a switchover: no request starts any more */
void primary_stop_check(struct repl *r);
void primary_checkpoint(struct repl *r, struct repl_command *c, uint32_t flags);
void primary_tx_done(struct repl *r, struct tx *tx, int error);
void primary_settings_changed(struct repl *r);
uint64_t primary_barrier(struct repl *r);

void primary_send_io(struct repl *r, struct repl_io *io, unsigned type);
void primary_wait_ack(struct repl *r, struct repl_io *io);
void primary_send_write(struct repl *r, struct repl_io *io); /* numbers it, sends it, ends its claim */

/* repl_resync.c */
void resync_begin(struct repl *r);
void resync_pump(struct repl *r);
void resync_granted(struct repl *r, struct repl_io *io);
void resync_io_done(struct repl *r, struct repl_io *io, int error);
void resync_hash_answer(struct repl *r, const struct wire_frame *f);
void resync_acked(struct repl *r, const struct wire_frame *f);
uint64_t resync_left(const struct repl *r); /* bytes to be sent */
void resync_sample(struct repl *r);	    /* of its rate, for status */
/* A part of its range was hashed, and whether it differs is not known. */
bool resync_unanswered(const struct repl *r, const struct repl_io *io);
uint32_t resync_hash_payload(uint64_t len); /* bytes of a HASH frame's payload */

/* repl_resize.c */
void resize_command(struct repl *r, struct repl_command *c);
void resize_io_done(struct repl *r, int error);
void resize_acked(struct repl *r, const struct repl_event *ev);
void resize_session_lost(struct repl *r);	       /* source */
bool resize_asked(struct repl *r, struct repl_io *io); /* target, at the barrier: false: answered, it is over */
bool resize_prepare(struct tx *t, struct repl_meta *m);
void resize_tx_done(struct repl *r, struct tx *t, int error);
void resize_maps(struct repl *r, const struct repl_meta *next, void *const *maps);
/* The peer's JOIN names larger volumes: true: this host grows first. */
bool resize_join(struct repl *r);
bool resize_saving(const struct repl *r); /* its bitmaps are about to be replaced: no job begins that looks at them */

/* repl_verify.c */
void verify_init(struct repl *r);
void verify_begin(struct repl *r, struct repl_command *c);
void verify_cancel(struct repl *r, struct repl_command *c);
void verify_end(struct repl *r, int error, const char *why); /* if one is under way */
void verify_pump(struct repl *r);
void verify_granted(struct repl *r, struct repl_io *io);
void verify_marked(struct repl *r, struct repl_io *io); /* its intent bits are durable */
void verify_io_done(struct repl *r, struct repl_io *io, int error);
void verify_read_lost(struct repl *r, struct repl_io *io);
/* The peer's answer to its READ_REQ: data NULL with error 0: zeroes. */
void verify_read_reply(struct repl *r, struct repl_io *io, int error, const void *data, uint32_t len);
void verify_answer(struct repl *r, const struct repl_event *ev);
void verify_scrubbed(struct repl *r, const struct repl_event *ev);
void verify_checkpoint(struct repl *r, uint64_t number, bool taken);
void verify_scrub_asked(struct repl *r, const struct wire_frame *f); /* target */
void verify_scrub_done(struct repl *r);				     /* target: a step */
void verify_answer_send(struct repl *r, struct repl_io *io);	     /* target */

/* repl_detach.c */
void detach_send_read(struct repl *r, struct repl_io *io); /* READ_REQ; in `reads` until the reply */
void detach_init(struct repl *r);
/* The volume is, or is being, or now begins to be, detached. io: what failed, NULL: a sync. */
bool detach_failed(struct repl *r, uint32_t volume, const struct repl_io *io, int error);
bool detach_flush_failed(struct repl *r, uint64_t failed, int error);	/* the same of each volume in the mask */
bool detach_route(struct repl *r, struct repl_io *io);			/* took it: it goes through the peer */
bool detach_flush(struct repl *r, struct repl_io *io);			/* took it: it waits for the peer */
bool detach_read_failed(struct repl *r, struct repl_io *io, int error); /* took it: the peer is asked */
void detach_park(struct repl *r, struct repl_io *io);
bool detach_any(const struct repl *r);
bool detach_ending(const struct repl *r);	       /* the peer may know already that the disks are whole */
bool detach_of(const struct repl *r, uint32_t volume); /* stale */
void detach_acked(struct repl *r);
void detach_resume(struct repl *r);
void detach_learn(struct repl *r, enum lineage_decision d);
void detach_clear_maps(struct repl *r, uint64_t volumes);
void detach_flags(const struct repl *r, struct repl_volume *v, uint32_t n);
void detach_session_lost(struct repl *r);
void detach_role_lost(struct repl *r);
void detach_shutdown(struct repl *r);
void detach_tick(struct repl *r);
void detach_resync(struct repl *r, struct repl_command *c);
void detach_read_reply(struct repl *r, const struct repl_event *ev);
void detach_rebuild_granted(struct repl *r, struct repl_io *io);
void detach_internal_done(struct repl *r, struct repl_io *io, int error);
bool detach_prepare(struct repl *r, struct tx *t, struct repl_meta *m);
void detach_tx_done(struct repl *r, struct tx *t, int error);

/* repl_secondary.c */
void secondary_stream(struct repl *r, struct repl_io *io);
void secondary_granted(struct repl *r, struct repl_io *io);
void secondary_apply_done(struct repl *r, struct repl_io *io, int error);
void secondary_run(struct repl *r);
bool secondary_quiet(const struct repl *r);
bool secondary_current(const struct repl *r, const struct repl_io *io); /* of the session that stands */
void secondary_ack(struct repl *r, bool now);
void secondary_tick(struct repl *r, const struct repl_usage *u);
void secondary_tx_done(struct repl *r, struct tx *tx, int error);
void secondary_internal_done(struct repl *r, struct repl_io *io, int error);
void secondary_behind(struct repl *r, const struct wire_frame *f);
void secondary_write_failed(struct repl *r, const struct repl_event *ev);
void secondary_session_lost(struct repl *r);
void secondary_settle(struct repl *r); /* at the end of each step: what waits for quiet */
bool secondary_switching(const struct repl *r);
void secondary_adopt_sync(struct repl *r);			    /* the disk, before TX_SECONDARY of an adoption */
void secondary_barrier_flushed(struct repl *r, struct repl_io *io); /* it was one like a FLUSH; it is over */
void secondary_fresh_active(struct tx *t, struct repl_meta *m);
bool secondary_prepare(struct repl *r, struct tx *tx, struct repl_meta *m); /* false: no longer */
void secondary_apply_end(struct repl *r, struct repl_io *io, int error);
void secondary_unsure(struct repl *r); /* the record could not be saved again */

/* repl_failover.c */
void failover_begin(struct repl *r, struct repl_command *c);
void failover_go(struct repl *r); /* when what was received is applied and no write to active is under way */
void failover_marked(struct repl *r, int error);
void failover_unsure(struct repl *r, int error); /* the record could not be saved again */
void failover_synced(struct repl *r, int error);
bool failover_prepare(struct repl *r, struct tx *t, struct repl_meta *m);
void failover_tx_done(struct repl *r, struct tx *t, int error);
void failover_commit_start(struct repl *r);
void failover_commit_pump(struct repl *r);
void failover_commit_granted(struct repl *r, struct repl_io *io);
void failover_commit_end(struct repl *r, struct repl_io *io, int error);

/* repl_history.c */
/* Never dropped by retention, merge or command (SPEC 8) [MERGEPIN]. */
bool history_protected(const struct repl_meta *m, uint64_t number);
bool history_needed(const struct repl_meta *m, uint32_t i); /* that, or the live one, or the last of the stream */
void history_add(struct repl *r, struct repl_meta *m, uint64_t number, enum ckpt_kind kind, unsigned flags);
void history_remove(struct repl_meta *m, uint64_t number);
/* For one more in the record, which then holds `most`: the oldest go that retention may drop; they need no merge.
 * False: the oldest may not; what wants one more comes to nothing. */
bool history_make_room(const struct repl *r, struct tx *t, struct repl_meta *m, uint32_t most);
void history_release_kept(struct repl_meta *m);
void history_retention(struct repl *r,
		       const struct repl_usage *u); /* each tick; without usage only what jobs let go of */
void history_merge(struct repl *r, uint64_t number, uint32_t flags);	      /* no other is under way */
bool history_prepare_drop(struct repl *r, struct tx *t, struct repl_meta *m); /* false: no longer */
void history_drop(struct repl *r, struct repl_command *c);
void history_settle(struct repl *r); /* a drop that waited has its turn */
void history_merged(struct repl *r, int error);
void history_dropped(struct repl *r, struct tx *t, int error);

/* repl_hold.c */
bool hold_held(const struct repl *r, const struct repl_meta *m, uint64_t number);
void hold_command(struct repl *r, struct repl_command *c);
void hold_release(struct repl *r, struct repl_command *c);
bool hold_prepare(struct repl *r, struct tx *t, struct repl_meta *m);
void hold_tx_done(struct repl *r, struct tx *t, int error);
void clone_command(struct repl *r, struct repl_command *c); /* CMD_CLONE, CMD_UNCLONE */
void clone_synced(struct repl *r, int error);
bool clone_prepare(struct repl *r, struct tx *t, struct repl_meta *m);
void clone_tx_done(struct repl *r, struct tx *t, int error);
void hold_lost(struct repl *r, const struct repl_meta *old); /* says whose checkpoint a save has given up */

/* repl_switchover.c */
void switchover_command(struct repl *r, struct repl_command *c);
bool switchover_ready(struct repl *r); /* its checkpoint may be sent */
void switchover_checkpointed(struct repl *r, uint64_t number);
void switchover_behind(struct repl *r);
void switchover_void(struct repl *r, unsigned why); /* enum wire_void */
void switchover_session_lost(struct repl *r);
void switchover_frame(struct repl *r, const struct wire_frame *f);     /* TAKE_OVER */
void switchover_took_over(struct repl *r, const struct wire_frame *f); /* TOOK_OVER */
void switchover_join(struct repl *r);
void switchover_settle(struct repl *r); /* at the end of each step */
void switchover_synced(struct repl *r, int error);
void switchover_taken(struct repl *r);
void switchover_refused(struct repl *r, int code, const char *text);
void switchover_tick(struct repl *r);
bool switchover_prepare(struct repl *r, struct tx *t, struct repl_meta *m);
void switchover_tx_done(struct repl *r, struct tx *t, int error);

/* repl_commands.c */
uint64_t repl_wait_until(const struct repl *r); /* a command that waits for a connection gives up then */
void repl_command(struct repl *r, struct repl_command *c);
void repl_stopped(struct repl *r, struct repl_command *c); /* its stop is durable; an `unprotect` goes on */

/* repl_status.c */
const char *repl_peer_text(const struct repl *r);
enum link_state repl_link(const struct repl *r, uint64_t now_ns);

/* repl_room.c */
/* True: the io, which failed with `error`, waits for room to be made; it is submitted again, or fails for good. */
bool room_wait(struct repl *r, struct repl_io *io, int error);
void room_merge_done(struct repl *r, int error);		       /* a merge has ended, and what followed of it */
bool room_prepare(struct repl *r, struct tx *tx, struct repl_meta *m); /* false: no longer */
void room_tx_done(struct repl *r, struct tx *tx, int error);

#endif
