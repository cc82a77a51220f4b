/* Jobs: the table, and how one runs.
 *
 *   jobs_backup ── RUNNING ── step, step, ... ── finish ── DONE
 *                    │  ▲                          │
 *          pause, or │  │ resume                   ├──── FAILED      an error whose policy is report
 *          an error  ▼  │                          └──── CANCELLED
 *          whose policy is stop: PAUSED
 *
 * A running job is in the pool (`queued`), or waits for a time (`due_ns`): for its speed limit, for the next look at
 * what there is to do, or before an ignored error is tried again. jobs_tick puts it back into the pool then. One step
 * copies a unit (image/backup.h), so that pause and cancel come through soon, and the pool's other work in between.
 *
 * What it reads is the image of a checkpoint that it holds (core/repl.h CMD_HOLD), so it does not matter what happens
 * to the disk meanwhile; if room has to be made that checkpoint may be given up, and then the job fails, never the
 * guest's write. `none` copies what the epoch's overlay gathers, from time to time; `stream` is given what is written
 * to the disk (volume_set_tap) and queues it, as a guest must not wait for a target that hangs.
 *
 * `lock` is the innermost but the pool's; it is not held across I/O. What only the step uses (backup, the queue's head)
 * belongs to it: one step at a time, and jobs_close comes when none is under way.
 */
#include "fs/jobs.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/repl_shell.h"
#include "image/backup.h"

/* Between two looks of `none` at what was saved, and before an ignored error is tried again. */
#define LOOK_NS NS_PER_SEC
#define RETRY_NS NS_PER_SEC
/* So long a job's last step is waited for while the daemon ends: what it reads, or its target, may hang. */
#define ENDING_NS NS_PER_SEC
/* Progress is told so often, and the rate is that of about the last RATE_NS. */
#define TELL_NS (NS_PER_SEC / 5)
#define RATE_NS (2 * NS_PER_SEC)
/* Of a stream, written in a step; bytes. */
#define STREAM_STEP (UINT64_C(1) << 20)

struct job {
	struct pool_job run;
	struct jobs *t;
	struct job *next; /* by id */
	uint64_t id;
	char group[NAME_SIZE], volume[NAME_SIZE];
	char *target, *view;
	enum job_mode mode;
	enum job_policy policy[2];
	uint64_t speed, ckpt, since;
	bool held; /* ckpt is held by it */
	uint64_t started_wall_ns;

	struct gvol *v;
	struct gvol_handle *h; /* so that it is not deleted */

	/* under t->lock */
	enum job_state state;
	bool begun, listed;
	bool queued;	   /* in the pool, or its step runs */
	bool cancel, drop; /* asked for; drop: nothing is to be left */
	bool idle;	   /* stream: there is nothing to do before something is written */
	uint64_t due_ns;   /* not before */
	struct err err;	   /* what it ended with, or is paused for */
	int side;	   /* of err; -1: neither */
	uint64_t errors;   /* ignored */
	uint64_t done, total, copied;
	double rate;
	uint64_t rate_ns, rate_copied;
	double budget; /* bytes that may be copied now; below 0: of the future */
	uint64_t budget_ns;

	/* the step's own */
	struct backup *b;
	struct bitmap seen; /* none: blocks selected so far */
	void *seen_memory;
	bool pass, last; /* none: a selection is being copied; it is the last one */

	/* stream: what was written and is not in the target yet */
	struct mutex queue_lock; /* below t->lock */
	struct cond queue_cond;	 /* it got shorter, or dead */
	struct written *queue, **queue_tail;
	uint64_t queue_bytes;
	bool tapped;   /* the step's own */
	bool closing;  /* its end is asked for: what is under way is taken, whatever the queue holds */
	bool dead;     /* nothing more is taken */
	bool full;     /* it could not be taken: the target lacks it */
	bool outgrown; /* as full: it lies behind the end that the volume had when the job began */
	uint64_t size; /* that end; set before the tap */
};

/* Of a stream: one request. */
struct written {
	struct written *next;
	uint64_t off, len;
	bool zero;
	uint8_t data[]; /* unless zero: len bytes */
};

struct jobs {
	struct daemon *d;
	struct mutex lock;
	struct cond cond; /* a state changed, a step ended */
	struct job *list; /* by id, ascending */
	uint64_t last_id;
	unsigned beginning; /* not in the list yet */
	bool ending;
	uint64_t ending_ns; /* since when */
};

static const char *const mode_names[JOB_MODES] = {"full", "top", "none", "stream", "incremental"};
static const char *const policy_names[JOB_POLICIES] = {"report", "ignore", "stop", "enospc"};
static const char *const state_names[] = {"running", "paused", "done", "failed", "cancelled"};
static const char *const side_names[] = {"source", "target"};

static bool parse(const char *text, const char *const *names, unsigned n, unsigned *ret)
{
	for (unsigned i = 0; i < n; i++)
		if (strcmp(text, names[i]) == 0) {
			*ret = i;
			return true;
		}
	return false;
}

bool job_mode_parse(const char *text, enum job_mode *ret)
{
	unsigned i;
	bool ok = parse(text, mode_names, JOB_MODES, &i);
	if (ok)
		*ret = (enum job_mode)i;
	return ok;
}

bool job_policy_parse(const char *text, enum job_policy *ret)
{
	unsigned i;
	bool ok = parse(text, policy_names, JOB_POLICIES, &i);
	if (ok)
		*ret = (enum job_policy)i;
	return ok;
}

/* ---- the table ---- */

static bool ended(const struct job *j)
{
	return j->state >= JOB_DONE;
}

static struct job *find_locked(struct jobs *t, uint64_t id) REQUIRES(t->lock)
{
	struct job *j = t->list;
	while (j && j->id != id)
		j = j->next;
	return j;
}

static void job_free(struct job *j)
{
	if (j == NULL)
		return;
	backup_close(j->b);
	free(j->seen_memory);
	gvol_release(j->h);
	gvol_unref(j->v);
	free(j->target);
	free(j->view);
	cond_destroy(&j->queue_cond);
	mutex_destroy(&j->queue_lock);
	free(j);
}

/* The oldest that have ended go, so that their number stays bounded. */
static void forget_locked(struct jobs *t) REQUIRES(t->lock)
{
	unsigned n = 0;
	for (const struct job *j = t->list; j; j = j->next)
		n += ended(j) && !j->queued;
	for (struct job **at = &t->list; *at && n > JOBS_ENDED_MAX;) {
		struct job *j = *at;
		if (!ended(j) || j->queued) {
			at = &j->next;
			continue;
		}
		*at = j->next;
		job_free(j);
		n--;
	}
}

static void queue_locked(struct jobs *t, struct job *j) REQUIRES(t->lock)
{
	if (!j->listed || j->queued || ended(j) || (j->state == JOB_PAUSED && !j->cancel))
		return;
	j->queued = true;
	pool_submit(t->d->pool, &j->run);
}

int jobs_open(struct daemon *d, struct jobs **ret)
{
	struct jobs *t = calloc(1, sizeof(*t));
	if (t == NULL)
		return -ERR_NOMEM;
	t->d = d;
	mutex_init(&t->lock);
	cond_init(&t->cond);
	*ret = t;
	return 0;
}

void jobs_shutdown(struct jobs *t)
{
	mutex_lock(&t->lock);
	t->ending = true;
	t->ending_ns = clock_mono_ns();
	for (struct job *j = t->list; j; j = j->next) {
		if (ended(j))
			continue;
		j->cancel = j->drop = true;
		queue_locked(t, j);
	}
	cond_broadcast(&t->cond);
	mutex_unlock(&t->lock);
}

bool jobs_wait_quiet(struct jobs *t, uint64_t deadline_ns)
{
	mutex_lock(&t->lock);
	bool quiet = false;
	for (bool timely = true; !quiet && timely;) {
		quiet = true;
		for (const struct job *j = t->list; j; j = j->next)
			quiet = quiet && !j->queued;
		if (!quiet)
			timely = cond_wait_until(&t->cond, &t->lock, deadline_ns);
	}
	mutex_unlock(&t->lock);
	return quiet;
}

void jobs_close(struct jobs *t)
{
	if (t == NULL)
		return;
	while (t->list) {
		struct job *j = t->list;
		t->list = j->next;
		job_free(j);
	}
	cond_destroy(&t->cond);
	mutex_destroy(&t->lock);
	free(t);
}

void jobs_tick(struct jobs *t)
{
	uint64_t now = clock_mono_ns();
	mutex_lock(&t->lock);
	for (struct job *j = t->list; j; j = j->next)
		if (j->state == JOB_RUNNING && j->due_ns <= now)
			queue_locked(t, j);
	mutex_unlock(&t->lock);
}

/* ---- running ---- */

static void set_state_locked(struct jobs *t, struct job *j, enum job_state s) REQUIRES(t->lock)
{
	__atomic_store_n(&j->state, s, __ATOMIC_RELAXED); /* a guest that waits for room looks without the lock */
	cond_broadcast(&t->cond);
}

/* Now, also if it is paused or waits for a time. */
static void go_on_locked(struct jobs *t, struct job *j) REQUIRES(t->lock)
{
	j->due_ns = 0;
	if (j->state == JOB_PAUSED) {
		j->err = (struct err){0};
		j->side = -1;
		j->budget = 0;
		j->rate = 0;
		j->budget_ns = j->rate_ns = clock_mono_ns();
		j->rate_copied = j->copied;
		set_state_locked(t, j, JOB_RUNNING);
	}
	queue_locked(t, j);
}

/* ---- holding a checkpoint ---- */

static void holder_name(const struct job *j, char buf[ADDR_SIZE])
{
	(void)snprintf(buf, ADDR_SIZE, "job %" PRIu64, j->id);
}

/* n 0: of the disks as they are now. */
static int hold(struct job *j, struct group *g, uint64_t n, struct err *e)
{
	char who[ADDR_SIZE];
	holder_name(j, who);
	int err = group_hold(g, CMD_HOLD, n, who, &j->ckpt, e);
	if (!err)
		j->held = true;
	return err;
}

/* The core forgets holds with the daemon: one that is ending is left alone. An UNHOLD is answered within its step, so
 * no worker waits for another here. */
static void let_go(struct job *j)
{
	mutex_lock(&j->t->lock);
	bool ending = j->t->ending;
	mutex_unlock(&j->t->lock);
	struct group *g = j->held && !ending ? gvol_group(j->v) : NULL;
	j->held = false;
	if (g) {
		struct err e = {0};
		char who[ADDR_SIZE];
		holder_name(j, who);
		(void)group_hold(g, CMD_UNHOLD, j->ckpt, who, NULL, &e);
	}
	group_unref(g);
}

/* ---- what a stream is told ---- */

/* A guest waits for a target that takes what it gets, at its speed; one that takes nothing for so long ends the job,
 * as does a full queue while the job is paused. */
#define STREAM_WAIT_NS (2 * NS_PER_SEC)

static bool wait_for_room(struct job *j, uint64_t len) REQUIRES(j->queue_lock)
{
	uint64_t before = j->queue_bytes, deadline = clock_mono_ns() + STREAM_WAIT_NS;
	while (!j->dead && !j->closing && j->queue_bytes + len > JOB_QUEUE_MAX && j->queue_bytes) {
		if (__atomic_load_n(&j->state, __ATOMIC_RELAXED) != JOB_RUNNING ||
		    !cond_wait_until(&j->queue_cond, &j->queue_lock, deadline)) {
			if (j->queue_bytes >= before)
				return false;
		}
		if (j->queue_bytes < before) {
			before = j->queue_bytes;
			deadline = clock_mono_ns() + STREAM_WAIT_NS;
		}
	}
	return !j->dead;
}

static uint64_t written_bytes(const struct written *w)
{
	return sizeof(*w) + (w->zero ? 0 : w->len);
}

static void written(void *arg, const struct volume_req *r)
{
	struct job *j = arg;
	bool zero = r->kind != VOLUME_WRITE, behind = r->len > j->size || r->off > j->size - r->len;
	struct written *w = behind ? NULL : malloc(sizeof(*w) + (zero ? 0 : (size_t)r->len));
	if (w) {
		w->next = NULL;
		w->off = r->off;
		w->len = r->len;
		w->zero = zero;
		if (!zero)
			memcpy(w->data, r->buf, (size_t)r->len);
	}
	mutex_lock(&j->queue_lock);
	bool room = w && wait_for_room(j, written_bytes(w));
	if (room) {
		*j->queue_tail = w;
		j->queue_tail = &w->next;
		j->queue_bytes += written_bytes(w);
		w = NULL;
	} else if (!j->dead && behind) {
		j->outgrown = true;
	} else if (!j->dead) {
		j->full = true;
	}
	mutex_unlock(&j->queue_lock);
	free(w);
	mutex_lock(&j->t->lock);
	if (j->idle || !room) {
		j->idle = false;
		j->due_ns = 0;
		queue_locked(j->t, j);
	}
	mutex_unlock(&j->t->lock);
}

/* Nothing more is told: who waits for room goes on, and none is under way any more. */
static void untap(struct job *j)
{
	if (!j->tapped)
		return;
	/* Who waits for this thread to make room must not be waited for by it. */
	mutex_lock(&j->queue_lock);
	j->closing = true;
	cond_broadcast(&j->queue_cond);
	mutex_unlock(&j->queue_lock);
	j->tapped = false;
	(void)volume_set_tap(j->v->vol, NULL, NULL);
}

static void drop_queue(struct job *j)
{
	mutex_lock(&j->queue_lock);
	j->dead = true;
	cond_broadcast(&j->queue_cond);
	mutex_unlock(&j->queue_lock);
	untap(j);
	while (j->queue) {
		struct written *w = j->queue;
		j->queue = w->next;
		free(w);
	}
	j->queue_bytes = 0;
}

/* What the job had open is closed before its end is seen: its target's name is there or will never be. */
static void end(struct job *j, enum job_state s, const struct err *e)
{
	struct jobs *t = j->t;
	drop_queue(j);
	let_go(j);
	backup_close(j->b);
	j->b = NULL;
	free(j->seen_memory);
	j->seen_memory = NULL;
	if (s == JOB_DONE)
		log_line(LOG_LEVEL_INFO, j->group, "job %" PRIu64 ": backup of %s to %s is done", j->id, j->volume,
			 j->target);
	else
		log_line(s == JOB_FAILED ? LOG_LEVEL_ERROR : LOG_LEVEL_INFO, j->group, "job %" PRIu64 ": %s", j->id,
			 e->text);
	gvol_release(j->h);
	j->h = NULL;
	mutex_lock(&t->lock);
	if (e)
		j->err = *e;
	else
		j->err = (struct err){0};
	if (s == JOB_DONE)
		j->side = -1;
	set_state_locked(t, j, s);
	mutex_unlock(&t->lock);
}

static void cancelled(struct job *j)
{
	struct err e = {0};
	bool ending;
	mutex_lock(&j->t->lock);
	ending = j->t->ending;
	j->side = -1;
	mutex_unlock(&j->t->lock);
	(void)err_set(&e, ERR_CANCELED, "backup %s: %s; nothing is left of %s", j->volume,
		      ending ? "cancelled, the daemon is shutting down" : "cancelled", j->target);
	end(j, JOB_CANCELLED, &e);
}

/* An error of one side, by its policy. */
static void met(struct job *j, int code, enum backup_side side, uint64_t off)
{
	enum job_policy p = j->policy[side];
	struct err e = {0};
	if (code == -ERR_NOENT && side == BACKUP_SOURCE) {
		p = JOB_REPORT;
		(void)err_set(&e, ERR_IO,
			      "backup %s: checkpoint %" PRIu64
			      " that it reads was given up to make room for what is written; free room and begin again",
			      j->volume, j->ckpt);
	} else {
		(void)err_set(&e, -code, "backup %s: %s %s at byte %" PRIu64 ": %s", j->volume,
			      side == BACKUP_SOURCE ? "reading" : "writing",
			      side == BACKUP_SOURCE ? "the volume" : j->target, off, err_short(code));
	}
	if (p == JOB_ENOSPC)
		p = code == -ERR_NOSPC ? JOB_STOP : JOB_REPORT;
	mutex_lock(&j->t->lock);
	j->side = (int)side;
	bool first = j->err.code == 0;
	if (p == JOB_IGNORE) {
		j->errors++;
		j->err = e;
		j->due_ns = clock_mono_ns() + RETRY_NS;
	} else if (p == JOB_STOP) {
		j->err = e;
		set_state_locked(j->t, j, JOB_PAUSED);
	}
	mutex_unlock(&j->t->lock);
	if (p == JOB_REPORT)
		end(j, JOB_FAILED, &e);
	else if (p == JOB_STOP || first)
		log_line(LOG_LEVEL_WARN, j->group, "job %" PRIu64 ": %s; %s", j->id, e.text,
			 p == JOB_STOP ? "paused, `job resume` tries again" : "it is tried again");
}

/* Bytes were copied: what the limit says about the next ones, and what is shown. */
static void account(struct job *j, uint64_t bytes)
{
	struct jobs *t = j->t;
	uint64_t now = clock_mono_ns();
	mutex_lock(&t->lock);
	backup_progress(j->b, &j->done, &j->total);
	j->copied = backup_copied(j->b);
	if (bytes && j->side >= 0 && j->state == JOB_RUNNING) { /* it is past an ignored error */
		j->err = (struct err){0};
		j->side = -1;
	}
	if (now - j->rate_ns >= RATE_NS / 2) {
		double rate = (double)(j->copied - j->rate_copied) * (double)NS_PER_SEC / (double)(now - j->rate_ns);
		j->rate = j->rate > 0 ? (j->rate + rate) / 2 : rate;
		j->rate_ns = now;
		j->rate_copied = j->copied;
	}
	if (j->speed) {
		double s = (double)j->speed, most = s / 4;
		j->budget += s * (double)(now - j->budget_ns) / (double)NS_PER_SEC;
		if (j->budget > most)
			j->budget = most;
		j->budget -= (double)bytes;
		j->budget_ns = now;
		j->due_ns = j->budget < 0 ? now + (uint64_t)(-j->budget / s * (double)NS_PER_SEC) : 0;
	}
	mutex_unlock(&t->lock);
}

static void finish(struct job *j)
{
	struct extentlist_head about = {.since = j->since, .checkpoint = j->ckpt};
	struct err e = {0};
	struct group *g = gvol_group(j->v);
	if (g) {
		mutex_lock(&g->lock);
		memcpy(about.uuid, repl_meta(g->core)->volumes[j->v->index].uuid, sizeof(about.uuid));
		mutex_unlock(&g->lock);
		group_unref(g);
	}
	(void)snprintf(about.volume, sizeof(about.volume), "%s", j->volume);
	(void)snprintf(about.mode, sizeof(about.mode), "%s", mode_names[j->mode]);
	int err = backup_finish(j->b, &about, &e);
	if (err == 0) {
		end(j, JOB_DONE, NULL);
		return;
	}
	mutex_lock(&j->t->lock);
	j->side = BACKUP_TARGET;
	mutex_unlock(&j->t->lock);
	end(j, JOB_FAILED, &e);
}

/* One step of a copy: as backup_step, errors taken care of. */
static int copy(struct job *j)
{
	struct backup_step s;
	int more = backup_step(j->b, &s);
	if (more < 0)
		met(j, more, s.side, s.off);
	else
		account(j, s.bytes);
	return more;
}

static void wait_until(struct job *j, uint64_t due_ns, bool idle)
{
	mutex_lock(&j->t->lock);
	j->due_ns = due_ns;
	j->idle = idle;
	mutex_unlock(&j->t->lock);
}

/* For volume_changed. What the volume has grown by since is not of the checkpoint's image. */
static void add_changed(void *arg, uint64_t off, uint64_t len)
{
	struct bitmap *b = arg;
	uint64_t first = off >> BLOCK_SHIFT, end = min_u64(units_of(off + len, BLOCK_SHIFT), b->nbits);
	if (first < end)
		(void)bitmap_set_range(b, first, end - first);
}

/* `none`: what was saved in the epoch and not seen yet is selected. */
static int gather(struct job *j)
{
	struct bitmap bits;
	uint64_t blocks = j->seen.nbits;
	void *memory = calloc(1, bitmap_bytes(blocks));
	int err = memory ? 0 : -ERR_NOMEM;
	if (!err) {
		bitmap_init(&bits, blocks, memory);
		err = volume_changed(j->v->vol, j->ckpt, 0, false, add_changed, &bits);
	}
	if (err) {
		free(memory);
		return err;
	}
	for (uint64_t first, last, at = 0; bitmap_next_run(&j->seen, at, &first, &last); at = last)
		(void)bitmap_clear_range(&bits, first, last - first);
	bitmap_or(&j->seen, &bits);
	backup_select(j->b, &bits, memory);
	return 0;
}

static void step_none(struct job *j, bool cancel)
{
	uint64_t later = clock_mono_ns() + LOOK_NS;
	if (!j->pass && !cancel && backup_format_of(j->target) == BACKUP_ZST) { /* one pass, at the end */
		wait_until(j, later, false);
		return;
	}
	if (!j->pass) {
		int err = gather(j);
		if (err) {
			met(j, err, BACKUP_SOURCE, 0);
			return;
		}
		j->pass = true;
		j->last = cancel;
	}
	if (copy(j) != 0)
		return;
	j->pass = false;
	if (j->last)
		finish(j);
	else if (!cancel)
		wait_until(j, later, false);
}

/* The head of the queue goes into the target. Until it is there it stays the head. */
static int write_head(struct job *j, struct written *w)
{
	int err = backup_write(j->b, w->off, w->len, w->zero ? NULL : w->data);
	if (err) {
		met(j, err, BACKUP_TARGET, w->off);
		return err;
	}
	mutex_lock(&j->queue_lock);
	j->queue = w->next;
	if (j->queue == NULL)
		j->queue_tail = &j->queue;
	j->queue_bytes -= written_bytes(w);
	cond_broadcast(&j->queue_cond);
	mutex_unlock(&j->queue_lock);
	free(w);
	return 0;
}

/* Until something is written, or it is time to look whether the disk is still there. What was written since the queue
 * was found empty has not woken the job up. */
static void stream_rest(struct job *j)
{
	mutex_lock(&j->t->lock);
	mutex_lock(&j->queue_lock);
	j->idle = j->queue == NULL && !j->full && !j->outgrown;
	j->due_ns = j->idle ? clock_mono_ns() + LOOK_NS : 0;
	mutex_unlock(&j->queue_lock);
	mutex_unlock(&j->t->lock);
}

static void fail(struct job *j, enum backup_side side, int code, const char *text)
{
	struct err e = {0};
	(void)err_set(&e, code, "backup %s: %s", j->volume, text);
	mutex_lock(&j->t->lock);
	j->side = (int)side;
	mutex_unlock(&j->t->lock);
	end(j, JOB_FAILED, &e);
}

static void step_stream(struct job *j, bool cancel)
{
	uint64_t bytes = 0;
	struct written *w;
	if (cancel)
		untap(j); /* its end is now; what is queued still goes */
	do {
		mutex_lock(&j->queue_lock);
		w = j->queue;
		bool full = j->full, outgrown = j->outgrown;
		mutex_unlock(&j->queue_lock);
		if (outgrown) {
			fail(j, BACKUP_SOURCE, ERR_STATE,
			     "the volume has grown, and its new part is written to: the stream's target, which has the "
			     "old size, would lack that. Make a full backup, then begin again");
			return;
		}
		if (full) {
			fail(j, BACKUP_TARGET, ERR_LIMIT,
			     "the target took too little, and more was written than a stream keeps in memory (64 MiB)");
			return;
		}
		bytes += w ? written_bytes(w) : 0;
		if (w && write_head(j, w))
			return;
	} while (w && bytes < STREAM_STEP);
	account(j, bytes);
	if (w)
		return;
	if (cancel)
		finish(j);
	else if (gvol_detached(j->v))
		fail(j, BACKUP_SOURCE, ERR_IO,
		     "its local disk is detached: what is written goes to the peer only, and the stream is not whole");
	else
		stream_rest(j);
}

/* What a failed disk holds and had not synced goes with the system's cache, so what is read of its checkpoints may be
 * anything that it held. */
static bool source_lost(struct job *j)
{
	if (!gvol_detached(j->v))
		return false;
	fail(j, BACKUP_SOURCE, ERR_IO,
	     "its local disk is detached: what was read of it may not be what the checkpoint held; begin again when it "
	     "is rebuilt, or on the peer");
	return true;
}

static void step(struct job *j, bool cancel, bool drop)
{
	bool open_ended = j->mode == JOB_NONE || j->mode == JOB_STREAM;
	if (drop || (cancel && !open_ended))
		cancelled(j);
	else if (j->mode == JOB_STREAM)
		step_stream(j, cancel);
	else if (source_lost(j))
		return;
	else if (j->mode == JOB_NONE)
		step_none(j, cancel);
	else if (copy(j) == 0 && !source_lost(j))
		finish(j);
}

static void run(struct pool_job *p)
{
	struct job *j = CONTAINER_OF(p, struct job, run);
	struct jobs *t = j->t;
	mutex_lock(&t->lock);
	bool cancel = j->cancel, drop = j->drop, go = !ended(j) && (j->state == JOB_RUNNING || cancel);
	j->idle = false;
	mutex_unlock(&t->lock);
	/* The group may not be held across a wait (daemon_remove_group), but is for a step: its volume stays. */
	struct group *g = go ? gvol_group(j->v) : NULL;
	if (go)
		step(j, cancel, drop || g == NULL);
	group_unref(g);
	mutex_lock(&t->lock);
	j->queued = false;
	if ((j->cancel && !cancel) || (j->drop && !drop)) /* asked for meanwhile: the step knew nothing of it */
		go_on_locked(t, j);
	else if (j->state == JOB_RUNNING && j->due_ns <= clock_mono_ns())
		queue_locked(t, j);
	cond_broadcast(&t->cond);
	mutex_unlock(&t->lock);
}

/* ---- beginning ---- */

static int check_args(const struct job_args *a, struct err *e)
{
	bool zst = backup_format_of(a->target) == BACKUP_ZST;
	if (a->mode == JOB_STREAM && zst)
		return err_set(e, ERR_USAGE,
			       "a stream can't go to a .zst, whose frames are written once; give another TARGET");
	if (a->mode == JOB_STREAM && a->speed)
		return err_set(e, ERR_USAGE, "--speed does not go with a stream, whose speed is the guest's");
	if (a->mode == JOB_STREAM && a->ckpt)
		return err_set(e, ERR_USAGE, "a stream begins now; leave out the checkpoint");
	if (a->mode == JOB_INCREMENTAL && a->since == 0)
		return err_set(e, ERR_USAGE, "--sync incremental needs --since N, the checkpoint of the backup before");
	if (a->mode != JOB_INCREMENTAL && a->since)
		return err_set(e, ERR_USAGE, "--since goes with --sync incremental only");
	return 0;
}

/* The checkpoint that is backed up, held: the one that is named, the base of a secondary's view, or one of the disks as
 * they are now. */
static int choose(struct job *j, struct group *g, const struct job_args *a, struct err *e)
{
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	bool view = repl_serving(m, false) == SERVING_VIEW;
	uint64_t n = a->ckpt ? a->ckpt : view ? m->base : 0;
	int i = n ? repl_meta_find_ckpt(m, n) : -1;
	bool partial = i >= 0 && m->ckpts[i].kind == CKPT_PARTIAL;
	mutex_unlock(&g->lock);
	if (partial)
		return err_set(e, ERR_STATE,
			       "checkpoint %" PRIu64
			       " is of a disk whose sync had not ended: nothing could be restored "
			       "from it; see `checkpoints` for others",
			       n);
	if (view && n == 0)
		return err_set(e, ERR_STATE, "the view stands on no checkpoint; wait for the group to be in sync");
	return hold(j, g, n, e);
}

/* The checkpoint before `number` in the group's list, or `number` itself if it is `since`; 0: none. */
static uint64_t last_before(struct group *g, uint64_t since, uint64_t number)
{
	uint64_t last = 0;
	mutex_lock(&g->lock);
	const struct repl_meta *m = repl_meta(g->core);
	for (uint32_t i = 0; i < m->n_ckpts && m->ckpts[i].number < number; i++)
		if (m->ckpts[i].number >= since)
			last = m->ckpts[i].number;
	mutex_unlock(&g->lock);
	return last;
}

/* The blocks that changed between `since` and the checkpoint that is backed up, selected. */
static int select_changed(struct job *j, struct group *g, const struct job_args *a, uint64_t size, struct err *e)
{
	struct bitmap bits;
	uint64_t blocks = units_of(size, BLOCK_SHIFT);
	void *memory;
	int err = 0;
	mutex_lock(&g->lock);
	bool there = repl_meta_find_ckpt(repl_meta(g->core), j->since) >= 0;
	mutex_unlock(&g->lock);
	if (there && j->since > j->ckpt)
		return err_set(e, ERR_USAGE, "--since %" PRIu64 " is newer than checkpoint %" PRIu64, j->since,
			       j->ckpt);
	struct changed *c = g->exec.changed[j->v->index];
	memory = calloc(1, bitmap_bytes(blocks));
	if (memory == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	bitmap_init(&bits, blocks, memory);
	/* One that only the peer keeps: what this primary has written since. Asked after the image was taken, so that
	 * all that is in it is marked by now. */
	if (!there && (a->ckpt || changed_since(c, j->since, &bits) < 0)) {
		free(memory);
		return err_set(
		    e, ERR_NOENT,
		    "this host lacks the bitmap of what changed since checkpoint %" PRIu64
		    ": neither it nor a bitmap of it is kept here; `show` lists those there are. Make a full "
		    "backup, or the incremental on the peer",
		    j->since);
	}
	if (there && j->since < j->ckpt)
		err = volume_changed(j->v->vol, j->since, last_before(g, j->since, j->ckpt), false, add_changed, &bits);
	if (err < 0) {
		free(memory);
		return err_set(e, -err, "reading what changed since checkpoint %" PRIu64 ": %s", j->since,
			       err_short(err));
	}
	backup_select(j->b, &bits, memory);
	return 0;
}

/* What was written since the volume was made over its base, selected: as of the checkpoint, and perhaps more, since a
 * block that became the volume's own later was the base's then. */
static int select_own(struct job *j, uint64_t size, struct err *e)
{
	struct bitmap bits;
	uint64_t blocks = units_of(size, BLOCK_SHIFT);
	void *memory = calloc(1, bitmap_bytes(blocks));
	if (memory == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	bitmap_init(&bits, blocks, memory);
	if (volume_own(j->v->vol, &bits))
		backup_select(j->b, &bits, memory);
	else
		free(memory);
	return 0;
}

static int begin_none(struct job *j, uint64_t size, struct err *e)
{
	uint64_t blocks = units_of(size, BLOCK_SHIFT);
	const char *mount = j->t->d->cfg.mount;
	j->seen_memory = calloc(1, bitmap_bytes(blocks));
	if (j->seen_memory == NULL ||
	    (mount && asprintf(&j->view, "%s/checkpoints/%s/%" PRIu64, mount, j->volume, j->ckpt) < 0)) {
		j->view = NULL;
		return err_set(e, ERR_NOMEM, "out of memory");
	}
	bitmap_init(&j->seen, blocks, j->seen_memory);
	return 0;
}

static int begin_stream(struct job *j, struct group *g, uint64_t size, struct err *e)
{
	j->size = size;
	if (atomic_load(&g->serving) == SERVING_EIO)
		return err_set(e, ERR_STATE, "nothing is written to this host's copy in its state");
	if (gvol_detached(j->v))
		return err_set(e, ERR_STATE,
			       "its local disk is detached: what is written goes to the peer only; `resync` first");
	if (volume_set_tap(j->v->vol, written, j) < 0)
		return err_set(e, ERR_BUSY, "a stream of it runs already; see `jobs`");
	j->tapped = true;
	return 0;
}

static int begin(struct job *j, struct group *g, const struct job_args *a, struct err *e)
{
	int err = j->mode == JOB_STREAM ? 0 : choose(j, g, a, e);
	if (err < 0)
		return err;
	const char *format;
	bool own = j->mode == JOB_TOP && volume_base(j->v->vol, &format);
	struct backup_args b = {.what = "backup to",
				.volume = j->mode == JOB_STREAM ? NULL : j->v->vol,
				.layer = LAYER_IMAGE,
				.ckpt = j->ckpt,
				.size = j->ckpt ? gvol_size_at(g, j->v, j->ckpt) : volume_size(j->v->vol),
				.path = j->target,
				.format = backup_format_of(j->target),
				.list = j->mode != JOB_FULL && (j->mode != JOB_TOP || own)};
	err = backup_open(&b, &j->b, e);
	if (err == 0 && j->mode == JOB_INCREMENTAL)
		err = select_changed(j, g, a, b.size, e);
	if (err == 0 && own)
		err = select_own(j, b.size, e);
	if (err == 0 && j->mode == JOB_NONE)
		err = begin_none(j, b.size, e);
	if (err == 0 && j->mode == JOB_STREAM)
		err = begin_stream(j, g, b.size, e);
	if (err == 0 && (j->mode == JOB_FULL || j->mode == JOB_TOP || j->mode == JOB_INCREMENTAL))
		backup_progress(j->b, &j->done, &j->total);
	return err;
}

/* A place among those that run, and the id. */
static int reserve(struct jobs *t, struct job *j, struct err *e)
{
	unsigned n;
	int err = 0;
	mutex_lock(&t->lock);
	n = t->beginning;
	for (const struct job *x = t->list; x; x = x->next)
		n += !ended(x);
	if (t->ending)
		err = err_set(e, ERR_CANCELED, "the daemon is shutting down");
	else if (n >= JOBS_MAX)
		err = err_set(e, ERR_LIMIT, "%d jobs run already, the most there can be; wait for one, or cancel it",
			      JOBS_MAX);
	if (!err) {
		t->beginning++;
		j->id = ++t->last_id;
	}
	mutex_unlock(&t->lock);
	return err;
}

/* It is in the table, and runs. False: the daemon is ending. */
static bool launch(struct jobs *t, struct job *j)
{
	mutex_lock(&t->lock);
	t->beginning--;
	bool ok = !t->ending && j->begun;
	struct job **at = &t->list;
	while (*at && (*at)->id < j->id)
		at = &(*at)->next;
	if (ok) {
		j->next = *at;
		*at = j;
		j->listed = true;
		queue_locked(t, j);
		forget_locked(t);
	}
	mutex_unlock(&t->lock);
	return ok;
}

static struct job *job_new(struct jobs *t, struct gvol *v, const struct job_args *a)
{
	struct job *j = calloc(1, sizeof(*j));
	if (j == NULL || (j->target = strdup(a->target)) == NULL) {
		free(j);
		return NULL;
	}
	j->t = t;
	j->run.fn = run;
	j->mode = a->mode;
	memcpy(j->policy, a->policy, sizeof(j->policy));
	j->speed = a->speed;
	j->since = a->since;
	j->side = -1;
	j->started_wall_ns = clock_wall_ns();
	j->rate_ns = j->budget_ns = clock_mono_ns();
	mutex_init(&j->queue_lock);
	cond_init(&j->queue_cond);
	j->queue_tail = &j->queue;
	j->v = gvol_ref(v);
	(void)snprintf(j->volume, sizeof(j->volume), "%s", v->name);
	return j;
}

int jobs_backup(struct jobs *t, struct gvol *v, const struct job_args *a, uint64_t *ret_id, struct err *e)
{
	bool direct;
	int err = check_args(a, e);
	if (err < 0)
		return err;
	struct job *j = job_new(t, v, a);
	if (j == NULL)
		return err_set(e, ERR_NOMEM, "out of memory");
	err = reserve(t, j, e);
	if (err < 0) {
		job_free(j);
		return err;
	}
	uint64_t id = j->id;
	struct group *g = gvol_group(v);
	if (g == NULL || gvol_open(v, false, true, &j->h, &direct) < 0) {
		err = err_set(e, ERR_NOENT, "it was deleted meanwhile");
	} else {
		(void)snprintf(j->group, sizeof(j->group), "%s", g->name);
		err = begin(j, g, a, e);
	}
	j->begun = err == 0;
	if (launch(t, j)) {
		*ret_id = id;
		log_line(LOG_LEVEL_INFO, g->name, "job %" PRIu64 ": backup of %s to %s, %s", id, v->name, a->target,
			 mode_names[a->mode]);
	} else {
		if (!err)
			err = err_set(e, ERR_CANCELED, "the daemon is shutting down");
		drop_queue(j);
		let_go(j);
		job_free(j);
	}
	group_unref(g);
	return err;
}

/* ---- what is asked of one ---- */

static int no_job(uint64_t id, struct err *e)
{
	return err_set(e, ERR_NOENT, "job %" PRIu64 ": there is no such job; see `jobs`", id);
}

/* NULL: there is none, or it has ended, and *ret_err says so. */
static struct job *live_locked(struct jobs *t, uint64_t id, int *ret_err, struct err *e) REQUIRES(t->lock)
{
	struct job *j = find_locked(t, id);
	if (j == NULL)
		*ret_err = no_job(id, e);
	else if (ended(j))
		*ret_err = err_set(e, ERR_STATE, "job %" PRIu64 " has ended: it is %s", id, state_names[j->state]);
	else
		return j;
	return NULL;
}

int jobs_pause(struct jobs *t, uint64_t id, struct err *e)
{
	int err = 0;
	mutex_lock(&t->lock);
	struct job *j = live_locked(t, id, &err, e);
	if (j)
		set_state_locked(t, j, JOB_PAUSED);
	/* The step under way ends first: what is answered holds. */
	while (!err && (j = find_locked(t, id)) != NULL && j->queued && j->state == JOB_PAUSED) {
		cond_wait(&t->cond, &t->lock);
		if (t->ending)
			err = err_set(e, ERR_CANCELED, "job %" PRIu64 ": the daemon is shutting down", id);
	}
	mutex_unlock(&t->lock);
	return err;
}

int jobs_resume(struct jobs *t, uint64_t id, struct err *e)
{
	int err = 0;
	mutex_lock(&t->lock);
	struct job *j = live_locked(t, id, &err, e);
	if (j && j->state == JOB_PAUSED)
		go_on_locked(t, j);
	mutex_unlock(&t->lock);
	return err;
}

/* One that is open-ended has its end to be written yet, perhaps in many steps: it goes on, also if it was paused. */
static void cancel_locked(struct jobs *t, struct job *j) REQUIRES(t->lock)
{
	j->drop = j->cancel;
	j->cancel = true;
	go_on_locked(t, j);
}

int jobs_cancel(struct jobs *t, uint64_t id, struct err *e)
{
	int err = 0;
	mutex_lock(&t->lock);
	struct job *j = live_locked(t, id, &err, e);
	if (j)
		cancel_locked(t, j);
	mutex_unlock(&t->lock);
	return err;
}

/* ---- what is said of them ---- */

static json_t *json_locked(struct jobs *t, const struct job *j) REQUIRES(t->lock)
{
	(void)t;
	char started[40];
	clock_format(j->started_wall_ns, started, sizeof(started));
	bool moving = j->state == JOB_RUNNING && j->rate > 0;
	json_t *o = json_pack("{s:I, s:s, s:s, s:s, s:s, s:s, s:s, s:I, s:I, s:I}", "id", (json_int_t)j->id, "type",
			      "backup", "group", j->group, "volume", j->volume, "mode", mode_names[j->mode], "target",
			      j->target, "state", state_names[j->state], "done", (json_int_t)j->done, "total",
			      (json_int_t)j->total, "copied", (json_int_t)j->copied);
	json_t *rest = json_pack(
	    "{s:o, s:o, s:o, s:o, s:o, s:o, s:s, s:s, s:s, s:I, s:o}", "rate",
	    moving ? json_real(j->rate) : json_null(), "eta_s",
	    moving && j->total >= j->done && j->total ? json_real((double)(j->total - j->done) / j->rate) : json_null(),
	    "speed", j->speed ? json_integer((json_int_t)j->speed) : json_null(), "checkpoint",
	    j->ckpt ? json_integer((json_int_t)j->ckpt) : json_null(), "since",
	    j->since ? json_integer((json_int_t)j->since) : json_null(), "view",
	    j->view ? json_string(j->view) : json_null(), "on_source_error", policy_names[j->policy[BACKUP_SOURCE]],
	    "on_target_error", policy_names[j->policy[BACKUP_TARGET]], "started", started, "errors",
	    (json_int_t)j->errors, "error",
	    j->err.code ? json_pack("{s:s, s:o, s:s}", "code", err_name(j->err.code), "side",
				    j->side >= 0 ? json_string(side_names[j->side]) : json_null(), "text", j->err.text)
			: json_null());
	if (o && rest)
		json_object_update(o, rest);
	json_decref(rest);
	return o;
}

json_t *jobs_one_json(struct jobs *t, uint64_t id)
{
	mutex_lock(&t->lock);
	const struct job *j = find_locked(t, id);
	json_t *o = j ? json_locked(t, j) : NULL;
	mutex_unlock(&t->lock);
	return o;
}

json_t *jobs_json(struct jobs *t, const char *group)
{
	json_t *a = json_array();
	mutex_lock(&t->lock);
	for (const struct job *j = t->list; j; j = j->next)
		if (group == NULL || strcmp(j->group, group) == 0)
			json_array_append_new(a, json_locked(t, j));
	mutex_unlock(&t->lock);
	return a;
}

/* ---- waiting ---- */

static int wait_ended(struct jobs *t, uint64_t id, struct ctl_conn *c, bool own, uint64_t deadline_ns, struct err *e)
    REQUIRES(t->lock)
{
	uint64_t told = 0;
	bool given_up = false;
	struct job *j = NULL;
	while ((j = find_locked(t, id)) != NULL && !ended(j)) {
		uint64_t now = clock_mono_ns();
		bool late = deadline_ns && now >= deadline_ns;
		bool gone = c && ctl_canceled(c);
		if (t->ending && now >= t->ending_ns + ENDING_NS)
			return err_set(e, ERR_CANCELED,
				       "job %" PRIu64 ": cancelled, the daemon is shutting down; its last step hangs",
				       id);
		if (t->ending) /* it is being cancelled */
			late = gone = false;
		if ((late || gone) && !own)
			return late ? err_set(e, ERR_TIMEOUT,
					      "job %" PRIu64 ": it has not ended in the time given; it goes on", id)
				    : err_set(e, ERR_INTR, "job %" PRIu64 ": interrupted; it goes on", id);
		if ((late || gone) && !given_up) {
			given_up = true;
			cancel_locked(t, j);
		} else if (given_up && j->state == JOB_PAUSED && !j->queued) {
			/* What it has is not thrown away for a target that is full. */
			return err_set(e, late ? ERR_TIMEOUT : ERR_INTR,
				       "job %" PRIu64
				       ": cancelled, but its end could not be written, it is paused: %.300s; "
				       "`job resume` tries again, `job cancel` gives it up",
				       id, j->err.text);
		}
		if (c && !gone && now - told >= TELL_NS) {
			json_t *p = json_locked(t, j);
			told = now;
			mutex_unlock(&t->lock);
			(void)ctl_progress(c, p);
			mutex_lock(&t->lock);
			continue;
		}
		(void)cond_wait_until(&t->cond, &t->lock, now + TELL_NS / 2);
	}
	if (j == NULL)
		return no_job(id, e);
	if (given_up && deadline_ns && j->state == JOB_CANCELLED && !(c && ctl_canceled(c)))
		return err_set(e, ERR_TIMEOUT, "job %" PRIu64 ": not done in the time given: cancelled", id);
	if (j->err.code)
		*e = j->err;
	return -j->err.code;
}

int jobs_wait(struct jobs *t, uint64_t id, struct ctl_conn *c, bool own, uint64_t deadline_ns, struct err *e)
{
	struct err unused = {0};
	mutex_lock(&t->lock);
	int err = find_locked(t, id) ? wait_ended(t, id, c, own, deadline_ns, e ? e : &unused) : no_job(id, e);
	mutex_unlock(&t->lock);
	return err;
}
