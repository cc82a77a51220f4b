/* Carries out one request of the replication core on a group's volumes, in the calling thread, and the parts of a save.
 * The shell calls it from its threads, the simulator (tests/sim) from its one: what a request does to a volume is
 * written once.
 */
#ifndef REPFS_FS_REPL_EXEC_H
#define REPFS_FS_REPL_EXEC_H

#include "core/os/thread.h"
#include "core/repl.h"
#include "image/changed.h"
#include "image/intent.h"
#include "image/store.h"
#include "image/volume.h"

struct repl_exec {
	struct store *store; /* borrowed */
	struct repl *core;   /* borrowed */
	struct mutex *lock;  /* the core's exclusion: taken to look at it, never across I/O */
	uint32_t n_vols;
	/* owned: repl_exec_open to repl_exec_close */
	struct volume *vols[GROUP_VOLUMES_MAX];
	struct intent *intents[GROUP_VOLUMES_MAX];
	struct changed *changed[GROUP_VOLUMES_MAX]; /* a primary's: what has changed since its peer's checkpoints */
	void *maps[GROUP_VOLUMES_MAX];		    /* the core's bitmaps */
	void *grown[GROUP_VOLUMES_MAX]; /* of volumes that the save under way makes larger: the core's next maps */
	bool unsure;			/* the last save failed, and may be found all the same */
	struct repl_usage usage;	/* of usage_version, which is 0 before the first; under the core's exclusion */
	uint64_t usage_version;
};

/* Opens the volumes that m names and their intent maps. What was opened is repl_exec_close's, after a failure too. */
int repl_exec_open(struct repl_exec *x, struct store *st, const struct repl_meta *m, struct err *e);
void repl_exec_close(struct repl_exec *x);
/* Gives the core the bits that the intent maps hold, and begins with these: after repl_init, before its first step. */
int repl_exec_load_intents(struct repl_exec *x, struct err *e);
/* Brings what has changed into its files. A failure: no intent bit may be cleared. */
int repl_exec_flush_changed(struct repl_exec *x);
/* After a save, before anything of it is begun: a host that m does not make a primary with a peer forgets what has
 * changed, as its disk will be written by others, or without intent bits. */
void repl_exec_forget_changed(struct repl_exec *x, const struct repl_meta *m);
/* A clean end: nothing is under way and nothing comes any more. Keeps which regions are dirty. */
int repl_exec_end(struct repl_exec *x);

/* The recovery volumes of a group that a peer protects, and its record, into *ret_m too. A failure leaves what was
 * there, a group of that name too: -ERR_EXIST, or why its record can't be read. */
int repl_exec_make(struct store *st, const struct wire_join *j, struct repl_meta *ret_m, struct err *e);
void repl_exec_unmake(struct store *st, const struct repl_meta *m);

/* ACT_SUBMIT. buf: the bytes of a WRITE, borrowed; base: of the view, for TARGET_ACTIVE, whose caller keeps the epoch
 * from being switched meanwhile. A RESYNC_READ, a VERIFY and a READ
 * that is no guest's leave their bytes, owned, in io->payload; a guest's READ goes to `into`, which is NULL for all
 * others.
 */
int repl_exec_io(struct repl_exec *x, struct repl_io *io, const void *buf, void *into, uint64_t base);
/* Of the peer's stream: whether it is one for repl_exec_apply. Else it is one for repl_exec_io. */
bool repl_exec_is_apply(const struct repl_io *io);
/* A batch of the peer's stream, all of one volume, bytes in io->payload; errors[i] is for EV_IO_DONE. */
void repl_exec_apply(struct repl_exec *x, struct repl_io *const *ios, unsigned n, int *errors);
/* TARGET_INTENT requests that share a sync: those linked by `next` from `first` on. errors[volume] is for EV_IO_DONE: a
 * failure is that of all requests of its volume. */
void repl_exec_set_intents(struct repl_exec *x, const struct repl_io *first, int errors[static GROUP_VOLUMES_MAX]);
/* What flushes share: the disks of all volumes; those and the active overlays. */
int repl_exec_sync_disks(struct repl_exec *x, uint64_t *ret_failed); /* NULL, or a bit for each that failed */
int repl_exec_sync_actives(struct repl_exec *x);
uint64_t repl_exec_active_bytes(struct repl_exec *x);

/* For EV_TICK's usage: what it is now, in a worker, since it waits for the volumes and the store's filesystem; into
 * x's, under the core's exclusion. */
void repl_exec_look_usage(struct repl_exec *x);
/* Under the core's exclusion: whether closed epochs are as that saw them. Else it is to be looked at again first. */
bool repl_exec_usage_known(struct repl_exec *x);

/* A frame of the stream as a request. NULL, or what is wrong with it: the peer's word is never trusted (I19). A WRITE's
 * io->payload is the frame's. Under the core's exclusion. */
const char *repl_exec_stream_io(struct repl_exec *x, const struct wire_frame *f, void *payload, struct repl_io *io);
bool repl_exec_is_stream(unsigned type);

/* What ACT_SAVE_META asks for. In this order (I7): the new epochs' files durable, then the record that names them
 * (repl_exec_save), then memory (repl_exec_switch, while no view is read or written), then the files that nothing
 * names any more (repl_exec_reap). The files that a failed save names stay until another has succeeded. */
struct repl_save {
	struct repl_meta *meta;
	uint64_t ckpt, active_id, drop, drop_through;
};
int repl_exec_save(struct repl_exec *x, const struct repl_save *s, struct err *e);
uint64_t repl_exec_switch(struct repl_exec *x, const struct repl_save *s); /* bytes that left the active overlays */
void repl_exec_reap(struct repl_exec *x);
/* Volumes that a save has made larger. Under the core's exclusion and in one with EV_META_SAVED, whose `maps` it
 * returns: from here on their new part can be written to, which the core has to know of. */
void *const *repl_exec_grow(struct repl_exec *x);
bool repl_exec_grown(struct repl_exec *x); /* after that step: whether there were any */

#endif
