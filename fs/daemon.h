/* The daemon without its mount: the store's groups and volumes, the replication shells, links and control verbs.
 * What fs/fuse_ops, the control socket and in-process tests call.
 *
 * A `struct gvol` is one volume of one group, as the mount shows it. Thread-safe throughout.
 */
#ifndef REPFS_FS_DAEMON_H
#define REPFS_FS_DAEMON_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/err.h"
#include "core/os/pool.h"
#include "core/repl.h"
#include "image/store.h"

struct daemon;
struct gvol;
struct ctl_conn;

struct daemon_hooks {
	/* The content of volume `id` changed under its readers: drop the kernel's cached pages and wait until that is
	 * done. Called from worker threads with no lock and no claim held. May be NULL. */
	void (*invalidate)(void *arg, uint32_t gvol_id);
	/* A name appeared or went under volumes/, overlays/, checkpoints/, status/. May be NULL. */
	void (*names_changed)(void *arg);
	/* `repctl shutdown`: end the main loop. */
	void (*shutdown)(void *arg);
	void *arg;
};

struct daemon_config {
	const char *store;  /* path */
	const char *mount;  /* for status paths; NULL: none */
	const char *listen; /* HOST:PORT or NULL */
	bool insecure;	    /* accept and dial non-loopback peers without TLS */
	unsigned threads;   /* workers; 0: pick */
	int durability;	    /* enum volume_durability; -1: the store's own */
	struct daemon_hooks hooks;
	struct storage *storage; /* for tests: the store is on it, in place of the folder `store`; taken over */
};

/* Opens the store, loads all groups, starts links and timers. Volumes serve I/O when it returns.
 * Hooks may be called from then on. Returns owned. */
int daemon_open(const struct daemon_config *cfg, struct daemon **ret, struct err *e);
/* Starts the control socket; the daemon answers verbs from then on. Call once the mount serves I/O. */
int daemon_serve_control(struct daemon *d, struct err *e);
/* The end begins: no verb and no connection is taken any more, parked I/O is answered, new I/O is refused (ERR_IO),
 * peers get a goodbye. Does not wait for what is under way. Again: does nothing. */
void daemon_shutdown(struct daemon *d);
/* daemon_shutdown, if that was not called; what is under way is waited for and volumes are flushed, within twice
 * peer_timeout whatever the peer does. Frees. */
void daemon_close(struct daemon *d);

const char *daemon_listen_addr(const struct daemon *d); /* as bound; NULL: none */
const char *daemon_store_path(const struct daemon *d);
/* The verb, as over the control socket; c may be NULL (tests). docs/control.md lists verbs and arguments. */
int daemon_command(struct daemon *d, struct ctl_conn *c, const char *verb, const json_t *args, json_t **ret,
		   struct err *e);
/* {"schema":1,"groups":[...]}; group NULL: all; new reference; NULL if there is no such group. */
json_t *daemon_status(struct daemon *d, const char *group);

/* ---- names ---- */
/* Calls fn for each volume (group) in name order under a read lock: fn must not call back into the daemon. */
void daemon_each_volume(struct daemon *d, void (*fn)(void *arg, const char *name, uint32_t id), void *arg);
void daemon_each_group(struct daemon *d, void (*fn)(void *arg, const char *name, uint32_t id), void *arg);
bool daemon_has_group(struct daemon *d, const char *name, uint32_t *ret_id);
bool daemon_group_name(struct daemon *d, uint32_t id, char name[NAME_SIZE]); /* false: gone */
struct gvol *gvol_find(struct daemon *d, const char *name);		     /* a reference, or NULL */
struct gvol *gvol_by_id(struct daemon *d, uint32_t id); /* a reference, or NULL: deleted meanwhile */
/* Clones are gvols too, under names of their own (fs/clones.c). */
void daemon_each_clone(struct daemon *d, void (*fn)(void *arg, const char *name, uint32_t id), void *arg);
struct gvol *gvol_find_clone(struct daemon *d, const char *name); /* a reference, or NULL */
/* Waits a moment for it to be closed; -ERR_BUSY: it is not. */
int daemon_remove_clone(struct daemon *d, const char *name, struct err *e);
struct gvol *gvol_ref(struct gvol *v);
void gvol_unref(struct gvol *v); /* NULL is fine */
const char *gvol_name(const struct gvol *v);
uint32_t gvol_id(const struct gvol *v); /* never reused while the daemon runs, >= 1 */
uint64_t gvol_size(struct gvol *v);

/* ---- files ---- */
enum gvol_file {
	GVOL_VOLUME, /* volumes/NAME: what the group's role and state say */
	GVOL_ACTIVE, /* overlays/NAME/active */
	GVOL_HIDDEN, /* overlays/NAME/hidden */
	GVOL_CKPT,   /* checkpoints/NAME/N */
	GVOL_CLONE,  /* clones/NAME: of a gvol that is a clone, which has no other */
};

struct gvol_attr {
	uint64_t size;
	uint64_t allocated; /* bytes; st_blocks = allocated / 512 */
	uint64_t mtime_ns;
	bool writable;
};
/* ckpt: for GVOL_CKPT, else 0. -ERR_NOENT: no such checkpoint. */
int gvol_attr(struct gvol *v, enum gvol_file file, uint64_t ckpt, struct gvol_attr *ret);
/* Kept checkpoints ascending; at most max; returns how many there are. latest: the newest completed, 0 = none. */
uint32_t gvol_ckpts(struct gvol *v, uint64_t *numbers, uint32_t max, uint64_t *ret_latest);
int gvol_extent(struct gvol *v, enum gvol_file file, uint64_t ckpt, uint64_t off, struct extent *ret);

/* An open file of volumes/NAME. It goes stale (every call: -ERR_IO) when the host stops being primary. */
struct gvol_handle;
/* *ret_direct: the file must be served direct whatever its flags (a secondary's, opened for writing). */
int gvol_open(struct gvol *v, bool write, bool o_direct, struct gvol_handle **ret, bool *ret_direct);
void gvol_release(struct gvol_handle *h);
bool gvol_stale(const struct gvol_handle *h);
/* Number of open handles that go through the page cache. */
unsigned gvol_cached_opens(struct gvol *v);

/* Reads, in the caller's thread; may wait while a restarted primary holds its I/O. h NULL: no staleness check.
 * off + len <= size. */
int gvol_read(struct gvol *v, const struct gvol_handle *h, enum gvol_file file, uint64_t ckpt, uint64_t off,
	      uint64_t len, void *buf);

/* One write, zero, discard or flush. Zero-fill, set the first part, submit. done is called exactly once, from the
 * submitting thread before gvol_submit returns or later from another, without locks; then the gio is the caller's
 * again. data (GIO_WRITE) must stay valid until gvol_submit returns: it is copied if needed longer. */
struct gio {
	struct gvol *v;		     /* a reference held by the caller until done */
	const struct gvol_handle *h; /* may be NULL */
	enum repl_kind kind;	     /* REPL_WRITE, REPL_ZERO, REPL_DISCARD, REPL_FLUSH, REPL_READ */
	uint64_t off, len;	     /* within the size; ignored by FLUSH */
	const void *data;
	void *into; /* REPL_READ: len bytes; valid until done */
	void (*done)(struct gio *g, int error);
	void *user;
	/* private */
	struct repl_io io;
	struct group *group;
	void *copy;
	struct pool_job job;
	bool own, completed;
	int error;
	struct gio *flight_next, **flight_at; /* under group.lock: a write, until it completes; at NULL: none */
};
void gvol_submit(struct gio *g);
/* gvol_submit and wait. For tests and simple callers. */
int gvol_write(struct gvol *v, const struct gvol_handle *h, uint64_t off, uint64_t len, const void *data);
int gvol_zero(struct gvol *v, const struct gvol_handle *h, uint64_t off, uint64_t len, bool discard);
int gvol_flush(struct gvol *v, const struct gvol_handle *h);
/* The local disk cannot be read now: a read of the volume is a gio that waits for the peer (gvol_read does it for a
 * caller that may wait). */
bool gvol_detached(struct gvol *v);

#endif
