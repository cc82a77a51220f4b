/* The shell of the replication core: one `struct group` for each group, with its volumes, its link and the threads'
 * side of every action (core/repl.h). Private to fs/: daemon.c owns the groups, verbs.c drives them.
 *
 * Lock order (docs/LOCKING.md): daemon.names → group.lock → the link's queue. group.view is taken with none of them
 * held and is held across reads and writes of the view; group.lock is never held across I/O.
 */
#ifndef REPFS_FS_REPL_SHELL_H
#define REPFS_FS_REPL_SHELL_H

#include <stdatomic.h>

#include "core/os/pool.h"
#include "core/os/thread.h"
#include "core/repl.h"
#include "fs/daemon.h"
#include "fs/hub.h"
#include "fs/repl_exec.h"
#include "net/ctl.h"
#include "net/link.h"

/* Bytes of the peer's stream that may be in memory at once, per group; above it the receiver thread waits. */
#define STREAM_BYTES_MAX (UINT64_C(32) << 20)
#define APPLY_BATCH_MAX VOLUME_BATCH_MAX
#define APPLY_WORKERS_MAX 2
#define CLOSE_DRAIN_MS 500
#define TICK_NS UINT64_C(100000000)
#define USAGE_NS UINT64_C(1000000000)

struct group;

/* What a gvol is that is a clone. */
struct gclone {
	uint64_t size; /* of its checkpoint */
	uint64_t id;   /* of its overlay, in the record */
	bool going;    /* being removed: it can't be opened; under daemon.names */
	struct mutex lock;
	struct reqset claims; /* of its writes, under lock */
};

struct gvol {
	struct group *g; /* NULL: deleted; under daemon.names for changes */
	struct daemon *d;
	uint32_t id, index;
	char name[NAME_SIZE];
	_Atomic int refs;
	_Atomic unsigned cached_opens, opens;
	_Atomic uint64_t mtime_ns;
	struct volume *vol;   /* the group's, NULL once deleted */
	struct gclone *clone; /* NULL: a volume; index and vol are of the one that it is a clone of */
	struct gvol *next;
};

struct gvol_handle {
	struct gvol *v;
	bool write, cached;
	uint64_t epoch; /* of the group when it was opened */
};

/* A connection: dialled for a group, or accepted and given to one by its JOIN. Two may hold one: the link, until its
 * `down`, and the thread that dials, until link_dial has returned; who comes last frees it. */
struct conn {
	struct daemon *d;
	_Atomic int refs;
	struct link *link;	   /* a reference; set under daemon.lock, NULL while link_dial is under way */
	_Atomic(struct group *) g; /* a reference; set before the first event of this connection */
	_Atomic uint64_t session;
	bool dialled;
	uint64_t dial;		/* the core's number of that */
	bool closed, waiting;	/* under group.lock: the core has closed it; its receiver waits for room */
	bool up;		/* under daemon.lock: gets reports */
	uint64_t since_ns;	/* under daemon.lock. Accepted: when, until its JOIN came; else 0 */
	_Atomic bool joined;	/* dialled: its JOIN has been sent, before which nothing may be asked for */
	_Atomic bool host;	/* host-wide: it carries no group (fs/hub.h) */
	_Atomic unsigned asked; /* requests of a hub's, or the peer's, under way */
	/* host-wide, the ticker's: what was heard when it looked last, how often that was the same, how often it looked
	 */
	uint64_t heard_ns;
	unsigned silent_ticks, ticks;
	struct conn *next;
};

struct shell_command {
	struct repl_command c;
	_Atomic int refs;
	bool done; /* under group.lock */
	int error;
	struct shell_command *next;
};

/* Requests that share one sync: those that arrive while one runs are served together by the next. */
struct sync_round {
	bool running;
	struct repl_list waiting, served;
};

struct group {
	struct daemon *d;
	char name[NAME_SIZE];
	uint32_t id;
	_Atomic int refs;
	struct group *next;
	bool nameless; /* taken out of the daemon: it has no name any more, nor have its clones; under daemon.names */

	struct mutex lock; /* the core's exclusion, and all that follows */
	struct cond cond;  /* command done, holding ended, stream bytes freed, connection ended */
	struct repl *core;
	struct repl_meta *metas[2];
	struct outbox *out; /* while a step runs */
	struct conn *conn;  /* the current one, or NULL */
	unsigned conns;	    /* not yet down */
	uint64_t sessions;  /* given so far */
	uint64_t stream_bytes;
	_Atomic uint64_t reply_bytes; /* of READ_REPLYs queued */
	struct repl_list apply;	      /* stream requests to be written */
	struct apply_worker {
		struct pool_job job;
		struct group *g;
		bool busy;
	} appliers[APPLY_WORKERS_MAX];
	struct sync_round flush, active_flush, marks;
	struct gio *flights; /* guests' writes that have not completed */
	bool changed_new;    /* an epoch has begun since the last such job */
	uint64_t changed_flushed_ns;
	bool flushing_changed; /* the job below is under way */
	struct pool_job changed_job;
	bool closing;
	unsigned jobs; /* pool jobs of this group under way */

	/* what the overlays hold is looked at by a pool job: not often, or when checkpoints came or went */
	struct pool_job usage_job;
	bool usage_busy;
	uint64_t usage_ns;

	/* the save under way */
	struct repl_save save;
	struct pool_job save_job;

	/* how volumes are served; `view` makes a change of all volumes one step for readers and active writers */
	pthread_rwlock_t view;
	_Atomic int serving; /* enum repl_serving without HOLD */
	_Atomic uint64_t base;
	_Atomic bool holding, forwarding;
	_Atomic uint64_t detached; /* repl_detached */
	_Atomic uint64_t handle_epoch;

	uint32_t n_vols;
	struct gvol *vols[GROUP_VOLUMES_MAX];
	_Atomic uint32_t n_clones; /* as last published */
	struct repl_exec exec;	   /* the volumes themselves */
};

/* ---- repl_shell.c ---- */
int group_open(struct daemon *d, const struct repl_meta *m, uint32_t id, struct group **ret, struct err *e);
/* No link, no request may be under way or come any more. Drops the daemon's reference. */
void group_close(struct group *g);
/* Says goodbye, answers what waits, takes no connection; asynchronous. Again: does nothing. */
void group_shutdown(struct group *g);
/* Until no connection and no job is left. deadline_ns 0: none; false: it has passed. */
bool group_wait_quiet(struct group *g, uint64_t deadline_ns);
/* A clean end of a quiet group whose disks are synced: keeps what the next start need not guess. */
void group_end(struct group *g);
struct group *group_ref(struct group *g);
void group_unref(struct group *g);
void group_tick(struct group *g);
void group_io(struct group *g, struct gio *io);
/* Starts it and waits: for its end, for `deadline_ns` (0: none), for the client's hang-up. */
int group_command(struct group *g, struct shell_command *c, struct ctl_conn *ctl, uint64_t deadline_ns, struct err *e);
/* CMD_HOLD or CMD_UNHOLD of a checkpoint by `who`, to its end; HOLD 0: of the disks as they are now. *ret_ckpt (may be
 * NULL) is set where it succeeds: the number. */
int group_hold(struct group *g, enum repl_cmd cmd, uint64_t ckpt, const char *who, uint64_t *ret_ckpt, struct err *e);
/* The two halves of group_command, for who has to look meanwhile. wait: true: it has ended, with *ret (and *e). */
void group_command_start(struct group *g, struct shell_command *c);
bool group_command_wait(struct group *g, struct shell_command *c, uint64_t until_ns, int *ret, struct err *e);
struct shell_command *shell_command_new(enum repl_cmd cmd);
void shell_command_unref(struct shell_command *c);
/* An accepted connection that asks for this group, with its JOIN frame. Takes over conn->g. */
void group_attach(struct group *g, struct conn *c, const struct wire_join *j, const struct wire_frame *f,
		  void *payload);
int group_frame(struct conn *c, const struct wire_frame *f, void *payload);
void group_conn_down(struct conn *c, int code, const char *text);
void group_batch(struct conn *c);
void group_sent(struct conn *c, uint64_t bytes);

/* ---- clones.c ---- */
/* The list of clones as m says; true: it has changed. Takes daemon.names. */
bool group_clones_publish(struct group *g, const struct repl_meta *m);
void clone_io(struct group *g, struct gio *gio); /* a WRITE, ZERO, DISCARD or FLUSH */
void gclone_free(struct gclone *k);
/* A CMD_CLONE that nobody waits for any more takes its name until it has ended. Takes a reference of its own; needs
 * d->cloning held, as does asking. */
void clone_late(struct daemon *d, struct shell_command *sc);
bool clone_is_late(struct daemon *d, const char *name);
void clones_late_free(struct daemon *d);
json_t *group_clones_json(struct group *g, const char *volume); /* of that one; NULL: of all */

/* ---- daemon.c, for the shell and the verbs ---- */
/* A group of the store that is not served, and why: a file of it is missing or damaged, or it could not be taken up
 * again. */
struct unserved {
	struct unserved *next;
	char group[NAME_SIZE];
	char volumes[GROUP_VOLUMES_MAX][NAME_SIZE];
	char clones[GROUP_CLONES_MAX][NAME_SIZE];
	uint32_t n_volumes, n_clones;
	char why[ERR_TEXT_MAX];
};

struct daemon {
	struct daemon_config cfg;
	struct store *store;
	struct pool *pool;
	struct jobs *jobs;
	struct link_server *server;
	struct link_self self;
	struct ctl_server *ctl;
	pthread_t ticker;
	bool ticking;
	struct mutex lock; /* tick stop, conns */
	struct cond cond;
	bool stop;
	_Atomic bool ending; /* daemon_close has begun */
	struct conn *conns;
	struct conn acceptor; /* the argument of an accepted link before `up`: only its `d` is used */

	struct mutex admin;		/* verbs that add or remove groups and volumes: one at a time */
	pthread_rwlock_t names;		/* groups, gvols: lists and ids */
	struct group *groups;		/* in name order */
	struct gvol *gvols;		/* in name order */
	struct gvol *clones;		/* likewise */
	struct mutex cloning;		/* one `clone` at a time: names are the host's */
	struct late_clone *late_clones; /* under it: asked for, given up, and not ended yet */
	struct unserved *unserved;
	struct repl_meta *away; /* under names: the record of the group that a verb, which holds admin, has out */
	uint32_t next_id;
	struct hub hub;
};

struct group *daemon_group(struct daemon *d, const char *name);	      /* by group or volume name; a reference */
struct group *daemon_group_exact(struct daemon *d, const char *name); /* a reference */
int daemon_add_group(struct daemon *d, const struct repl_meta *m, struct err *e);
/* Says for as long as the group is not added that it is not served. m NULL: its record can't be read. */
void daemon_unserved_add(struct daemon *d, const char *group, const struct repl_meta *m, const char *why);
void daemon_unserved_remove(struct daemon *d, const char *group);
/* Whether a group, or one with a volume, of this name is not served; then why, and its group. */
bool daemon_unserved(struct daemon *d, const char *name, char why[ERR_TEXT_MAX], char group[NAME_SIZE]);
json_t *daemon_unserved_json(struct daemon *d); /* all of them; new reference */
/* A verb has the group out, to change it, until this is called with NULL: it is not gone, and its names are its own.
 * m: owned. */
void daemon_away_set(struct daemon *d, struct repl_meta *m);
bool daemon_away(struct daemon *d, const char *name); /* a group that is out has, or is of, this name */
/* Whether a clone of this name is of a group that is not in the list now; -ERR_BUSY: it comes back; -ERR_EXIST. */
int daemon_clone_unlisted(struct daemon *d, const char *clone);
/* Takes a group out of the daemon: no handle may be open. -ERR_BUSY names the volume. */
int daemon_remove_group(struct daemon *d, struct group *g, struct err *e);
const struct link_callbacks *daemon_link_callbacks(bool dialled);
/* Whether the peer at the other end may protect into, start-protect, or read and write in this group (SPEC 13). */
bool daemon_peer_may(const struct conn *c, const char *group);
bool daemon_addr_allowed(const struct daemon *d, const char *addr, struct err *e);
void daemon_conn_add(struct conn *c);
void daemon_conn_set_link(struct conn *c, struct link *l);
void daemon_conn_remove(struct conn *c);
void daemon_conn_put(struct conn *c);
void daemon_conns_close(struct daemon *d, const struct group *g);      /* at once; g NULL: all */
uint64_t gvol_size_at(struct group *g, struct gvol *v, uint64_t ckpt); /* as of a checkpoint; takes group.lock */
struct group *gvol_group(struct gvol *v);			       /* a reference; NULL: deleted */
void daemon_names_changed(struct daemon *d);
json_t *group_status_json(struct group *g);

#endif
