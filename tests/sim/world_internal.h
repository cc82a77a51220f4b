/* What world.c, shell.c, net.c and model.c share. */
#ifndef REPFS_TESTS_SIM_WORLD_INTERNAL_H
#define REPFS_TESTS_SIM_WORLD_INTERNAL_H

#include <pthread.h>

#include "core/os/thread.h"
#include "fs/repl_exec.h"
#include "image/store.h"
#include "tests/sim/co.h"
#include "tests/sim/simalloc.h"
#include "tests/sim/world.h"

#define US UINT64_C(1000)
#define MS UINT64_C(1000000)
#define SEC UINT64_C(1000000000)
#define UNITS_IN(bytes) ((uint32_t)((bytes) / WORLD_UNIT))
#define REGION_UNITS UNITS_IN(1U << REGION_SHIFT)
#define GROUP_NAME "vm"
#define EXECS_MAX 512U

struct host;
struct conn;

struct sim_event {
	uint64_t at, order;
	void (*fn)(struct world *w, void *arg, uint64_t n);
	void *arg;
	uint64_t n;
};

/* Which write a unit holds: numbers grow in the order in which writes to one unit are carried out. 0: never written.
 * NOT_THERE: the active overlay lacks it. */
typedef uint32_t ver;
#define NOT_THERE UINT32_MAX

/* One write as it was carried out on a disk or an active overlay. */
struct exec {
	bool active;
	uint32_t vol, first, n; /* units */
	ver v, *vers;		/* vers: one a unit, owned; else all v */
	uint64_t begin, end;	/* in counts of w->tick; end 0: under way */
	bool lost;		/* its sync failed: never written out */
	struct sim_io *io;	/* a guest's, while it is under way */
	bool cut;		/* the host died while it was carried out */
};

struct running {
	struct exec x;
	struct running *next;
};

struct image {		 /* of one volume: a disk, or an active overlay */
	ver *now;	 /* what it reads as */
	ver *durable;	 /* what is there whatever happens, as the syncs promise */
	uint64_t *since; /* when what is durable was begun to be written */
};

struct ghost { /* what a checkpoint must read as */
	uint64_t number;
	enum ckpt_kind kind;
	ver *v[WORLD_VOLUMES];
	uint64_t size[WORLD_VOLUMES];
	/* Taken of a disk that was given up: it is not synced, so what a crash leaves on that disk is what the
	 * checkpoint shows of it from then on. */
	bool given_up[WORLD_VOLUMES];
	bool reopened[WORLD_VOLUMES]; /* its disk was detached and opened anew: nobody reads it any more */
	struct ghost *next;
};

/* A frame of the stream, as its sender knows it. */
struct sent {
	uint64_t seq;
	unsigned type;
	uint32_t vol, first, n;
	ver v, *vers;
	uint64_t number;	  /* CHECKPOINT */
	ver *snap[WORLD_VOLUMES]; /* CHECKPOINT, RESYNC_DONE: what the target holds when all before it is applied */
	struct sent *next;
};

struct sim_io {
	struct repl_io io;
	struct host *h;
	uint8_t *data;
	ver v;
	bool stream, executed, forwarded, is_read;
	int error;
	uint64_t begun_ns;
	/* guests' */
	ver *before;				/* READ through the core: what was there when it came */
	ver from;				/* and the first write that may have come after */
	bool of_detached;			/* and its disk was detached then */
	uint64_t done_before, done_before_peer; /* FLUSH: writes of this host that were complete when it came */
	uint64_t session;			/* in sync when it came: of which session */
	bool promised;				/* FLUSH: by its protocol */
	uint64_t sent_before;			/* FLUSH: h->sent_n when it came */
	struct sent *sent;			/* of the stream */
	struct sim_io *next, *prev;
};

struct sim_command {
	struct repl_command c;
	struct host *h;
	struct world_result *ret;
	bool down; /* the link, when it was given */
	struct sim_command *next;
};

struct round {
	bool running;
	struct repl_io *waiting;
};

/* A write that was answered with success. */
struct done {
	ver v;
	uint32_t vol, first, n;
	bool strict; /* it counts on the peer: a detached disk's */
};
struct told { /* of a unit: its last write that was answered, and when */
	ver v;
	uint64_t ns;
};
struct done_list {
	struct done *d;
	uint64_t n, cap, base; /* numbers count from base */
};

struct end { /* of a connection */
	struct conn *c;
	unsigned side; /* 0: dialled */
	struct host *h;
	uint64_t life; /* of the host when it was made */
	uint64_t dial;
	bool gone; /* down has been reported, or the host died */
	bool down_planned, closing, closed_by_core, attached, hello_sent, hello_got, waiting, fin;
	bool slow;   /* its receiver is held up at the next frame */
	size_t held; /* with the first frame of so much of rx in hand; 0: it is not */
	uint8_t peer_store[16];
	bool pumping, parsing;
	uint64_t session, seed, nonce;
	uint64_t tx_number, rx_number;
	uint64_t heard_ns, drain_until;
	uint64_t waited_ns; /* when it last had bytes that it could not take in */
	struct fifo {
		uint8_t *data;
		size_t at, len, cap; /* what is there begins at `at` */
	} out, rx;
	size_t out_own; /* of out, from before the session: not the core's */
	uint64_t rx_at; /* bytes of the stream before rx */
	/* on their way to the other end */
	struct chunk {
		uint64_t at;
		size_t len;
		bool fin;
		struct chunk *next;
		uint8_t data[];
	} * fly, *fly_tail;
	uint64_t fly_bytes, fly_total, taint_at; /* taint: from this byte on the wire has lied */
};

struct conn {
	struct world *w;
	struct end end[2];
	bool cut;
	struct sent *sent, *sent_tail; /* source to target */
	struct conn *next;
};

struct job;

struct host {
	struct world *w;
	unsigned id;
	struct simstore *ss;
	struct storage *storage; /* over ss: with stops, chance errors, stalls */
	struct store *store;
	struct repl_exec x;
	struct mutex lock;
	struct repl *core;
	struct repl_meta *metas[2];
	struct repl_save save;
	bool saving, usage_busy;
	uint64_t usage_ns;
	bool bare, making; /* its store has no group; one is being made for a JOIN */
	bool up, dying, closing, wanted, crash_point;
	unsigned tries;
	uint64_t shutdown_until;
	enum world_crash crash; /* how it died last */
	int keep;		/* enum simstore_keep of that power cut; -1: any */
	enum world_crash point; /* how a crash point ends, */
	int point_keep;		/* and what it keeps */
	bool faulty;		/* a fault was planned for it: it may not start at once, nor read */
	uint64_t life, seeds;
	uint64_t wall; /* its clock is that much before w->now */

	struct end *conn;
	uint64_t sessions, stream_bytes, stream_max;
	struct repl_io *apply, **apply_tail;
	uint64_t apply_count;
	unsigned appliers;
	struct round flush, active_flush, marks;
	pthread_rwlock_t view;
	enum repl_serving serving;
	uint64_t base;
	struct co *cos[256];
	unsigned n_cos;
	struct sim_io *ios, *streams; /* guests' and the peer's requests under way */
	unsigned n_ios;
	struct sim_command *commands;
	int in_step;
	struct repl_verify verified; /* what the last verify of this life said */

	uint64_t stalled_until;
	unsigned errors_one_in;
	struct {
		const char *path; /* NULL: none */
		int error;
		unsigned one_in;
		uint64_t until;
	} path_errors;
	bool full, evict, had_errors, had_full; /* since its start */
	unsigned looking;			/* world_quiet: several may wait for a lock with it */

	/* the model's */
	struct sim_clone *clones;
	struct image disk[WORLD_VOLUMES], act[WORLD_VOLUMES];
	struct running *running;
	struct exec *execs; /* ring of EXECS_MAX, for readers */
	uint64_t n_execs;
	struct exec *log; /* carried out and not durable */
	unsigned n_log, cap_log;
	struct ghost *ghosts;
	struct done_list done, done_peer;
	ver *prom_flushed[WORLD_VOLUMES], *prom_applied[WORLD_VOLUMES],
	    *prom_received[WORLD_VOLUMES]; /* of this secondary */
	ver *str[WORLD_VOLUMES];	   /* source: what the target holds once all that was sent is applied */
	bool str_valid;
	uint64_t sent_n, barrier_n;	/* data sent in all, and when the last barrier was */
	uint8_t *failed[WORLD_VOLUMES]; /* local writes of this session that failed: such a unit is anybody's guess */
	ver *adopt[WORLD_VOLUMES];	/* source: `str` when it sent RESYNC_DONE */
	uint64_t drops[8];		/* that were under way as it died; until its next start */
	unsigned n_drops;
	struct settings least; /* of what they keep, see least_kept */
	uint64_t late[16];     /* and those that are held since then */
	unsigned n_late;
	bool stopped; /* it applies nothing more of what it has received, until it is in sync again */
	bool wrote_alone;
	bool own;	    /* its disk was written by its own guest, or by a failover, since it last followed */
	uint64_t peer_life; /* when the session began */
	uint64_t emptied_ns;
	uint64_t numbers_max;	 /* highest checkpoint ever opened here */
	uint64_t numbers_ever;	 /* and by the one that it replaced */
	uint64_t last_flush_seq; /* last barrier carried out in this session */
	uint64_t barrier_session;
	bool meta_seen;
	struct repl_meta *seen; /* the record as last published */
	bool synced_before;
	uint64_t dirty_before[WORLD_VOLUMES]; /* regions */
	ver reign_from;			      /* the first write since it became primary */
	struct told *told[WORLD_VOLUMES];
	uint64_t died_ns;
	bool handed_before; /* this host has handed its role over; when it knew that */
	uint64_t handed_ns;
	uint64_t reign_number; /* the newest checkpoint that it had when it last stopped being a primary */
	/* The tick of the first sync of an active overlay that failed; 0: none since its open. And when those of its
	 * data and of its map began that were the last to succeed. */
	uint64_t active_failed, active_synced[WORLD_VOLUMES][2];
};

struct world {
	struct world_config cfg;
	uint64_t random, more, now, order, tick;
	struct sim_event *heap;
	size_t n_heap, cap_heap;
	struct host h[WORLD_HOSTS];
	struct conn *conns;
	uint64_t first_size[WORLD_VOLUMES]; /* as they are made */
	uint64_t size[WORLD_VOLUMES];	    /* and what they can grow to: the model's arrays */
	uint32_t units[WORLD_VOLUMES];
	bool calm;
	uint64_t partition_until;
	bool flip;
	bool planted; /* bits of disks or overlays were turned over behind everybody's back */
	bool cruel;   /* power is lost at the moments that matter, and nobody waits for the end of a commit */
	bool shaky;   /* most connections are cut, many of them early, and receivers are held up */
	/* the seed's temper */
	unsigned stop_one_in; /* of storage calls that stop; 0: none */
	uint64_t disk_ns, net_ns;
	unsigned slow_one_in;
	/* every write: index is its number */
	struct write {
		bool zero;
		uint8_t host, vol;
		uint32_t first, n;
		uint32_t clone; /* 0: none's */
	} * writes;
	ver n_writes, cap_writes;
	uint32_t clone_tags;
	struct world_counters count;
};

/* world.c */
void world_at(struct world *w, uint64_t ns, void (*fn)(struct world *w, void *arg, uint64_t n), void *arg, uint64_t n);
uint64_t world_delay(struct world *w, uint64_t mean_ns); /* mostly short, sometimes long */
void host_spawn(struct host *h, void (*fn)(void *arg), void *arg, uint64_t delay_ns);
void co_pause(struct host *h, uint64_t ns); /* from one of h's coroutines */
/* Something begins or has ended on h that a crash just then must not undo, or half do. */
void world_moment(struct host *h);
void host_make(struct host *h, const struct wire_join *j); /* of a bare one, as the daemon does for a JOIN */
void host_die(struct host *h, enum world_crash how);
void host_shutdown_end(struct host *h);
void world_quiet(struct host *h, bool on); /* no faults while the model looks */
static inline struct host *peer_of(struct host *h)
{
	return &h->w->h[!h->id];
}

/* What the volume of a host that is up has by now. */
static inline uint64_t size_now(const struct host *h, uint32_t vol)
{
	return volume_size(h->x.vols[vol]);
}
/* A range of the model as the volume has it: what lies past its end reads as zeroes. */
static inline uint64_t size_clip(const struct host *h, uint32_t vol, uint64_t off, uint64_t len, uint8_t *buf)
{
	uint64_t size = size_now(h, vol), have = off >= size ? 0 : len < size - off ? len : size - off;
	memset(buf + have, 0, len - have);
	return have;
}

/* shell.c */
int host_open(struct host *h);	 /* daemon's start: its store, its group */
void host_close(struct host *h); /* memory and handles: nothing runs any more */
void host_step(struct host *h, struct repl_event *ev);
void host_tick(struct world *w, void *arg, uint64_t life);
void shell_complete_all(struct host *h); /* of a dead host: what guests wait for */
void shell_stream_free(struct host *h, struct sim_io *s);
struct sim_io *shell_stream_new(struct host *h, const struct wire_frame *f, void *payload, const char **why);

/* net.c */
void net_dial(struct host *h, uint64_t dial);
void net_send(struct host *h, const struct repl_action *a);
void net_close(struct end *e, uint64_t drain_ns);
void net_host_died(struct host *h, enum world_crash how);
void net_room(struct host *h); /* stream bytes were freed */
void net_free(struct world *w);

/* storage.c */
struct storage *sim_storage_new(struct host *h);
void sim_storage_free(struct storage *s);

/* model.c */
void model_new(struct world *w);
void model_free(struct world *w);
void model_fill(struct host *h,
		struct sim_io *s); /* numbers a guest's write as it is carried out, and makes its bytes */
/* Around every write of a disk or an active overlay. */
struct exec *model_begin(struct host *h, const struct repl_io *io, struct sim_io *s);
void model_end(struct host *h, struct exec *x, int error, bool save_failed);
void model_reopened(struct host *h, uint64_t volumes);
void model_hashed(struct host *h, const struct sim_io *s);   /* HASH of the stream was compared */
void model_compared(struct host *h, const struct sim_io *s); /* and VERIFY */
void model_sync_begin(struct host *h, uint64_t *mark);
#define MODEL_ACTIVES (-1)
void model_synced(struct host *h, uint64_t mark, int disk); /* disk: a volume's, or MODEL_ACTIVES */
void model_sync_failed(struct host *h, bool active, uint32_t vol);
void model_sent(struct host *h, const struct repl_action *a, struct sim_io *s, struct sent *sent);
void model_received(struct host *h, struct sim_io *s);
void model_session(struct host *h); /* a connection stands */
void model_barrier(struct host *h, const struct repl_io *io);
void model_publish(struct host *h, const struct repl_meta *m, const struct repl_save *s);
void model_done(struct host *h, struct sim_io *s, int error);
void model_after_step(struct host *h);
void model_command(struct host *h, const struct sim_command *s, int error);
void model_stopped(struct host *h); /* applying, for an error */
void model_died(struct host *h, enum world_crash how, bool evict);
void model_replaced(struct host *h); /* its store is new */
void model_opened(struct host *h, enum world_crash how, bool evict);
int model_read(struct host *h, struct sim_io *s, uint8_t *buf);
void model_read_begin(struct host *h, struct sim_io *s);
void model_check(struct world *w);
void model_check_all(struct world *w);
void sent_free(struct sent *s);
/* What a unit that holds v reads as. */
static inline ver model_shows(const struct world *w, ver v)
{
	return v == NOT_THERE ? v : v == 0 || w->writes[v].zero ? 0 : v;
}
bool model_in_flight(struct host *h, uint32_t vol, uint32_t u);
bool model_stale(struct host *h, uint32_t vol); /* a disk of that volume is given up, on either host */

const ver *model_ckpt(struct host *h, uint64_t number, uint32_t vol); /* what a checkpoint must read as */
/* It is of a disk that had been detached: what a failed sync of that has lost may go from it. */
bool model_ckpt_given_up(struct host *h, uint64_t number, uint32_t vol);
const char *model_text(const struct world *w, ver v);
ver model_write_new(struct world *w, unsigned host, uint32_t vol, uint32_t first, uint32_t n, bool zero);
void model_unit_fill(void *p, ver v, uint32_t vol, uint32_t unit);
ver model_unit(const struct world *w, const uint8_t *p, uint32_t vol, uint32_t unit);

/* clones.c */
void clones_publish(struct host *h, const struct repl_meta *m);
void clones_opened(struct host *h, enum world_crash how);
void clones_check(struct host *h);
void clones_forget(struct host *h);

/* status.c */
void status_check(struct host *h);
void status_check_loss(struct host *h);
void status_command(struct host *h, const struct sim_command *sc, int error); /* that ends so */
void status_check_settings(struct host *h);
void status_check_clean(struct world *w);

#endif
