/* The jobs of a daemon (SPEC 11): backups that run on the worker pool beside everything else.
 *
 * A job is made by jobs_backup, runs in bounded steps, and ends as done, failed or cancelled; the last JOBS_ENDED_MAX
 * that have ended stay listed. Its id is never used again while the daemon runs. No job outlives its daemon: what it
 * had not finished leaves nothing at its target. Thread-safe.
 */
#ifndef REPFS_FS_JOBS_H
#define REPFS_FS_JOBS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/err.h"

#define JOBS_MAX 64	   /* that have not ended */
#define JOBS_ENDED_MAX 100 /* listed after their end */
/* What a `stream` holds in memory for a target that is slower than the guest; bytes. */
#define JOB_QUEUE_MAX (UINT64_C(64) << 20)

struct daemon;
struct ctl_conn;
struct gvol;
struct jobs;

enum job_mode { JOB_FULL, JOB_TOP, JOB_NONE, JOB_STREAM, JOB_INCREMENTAL, JOB_MODES };
/* What an error of one side does, as QEMU's block jobs have it: report fails the job; ignore tries again, for as long
 * as it takes; stop pauses the job, resume tries again; enospc is stop for ENOSPC and report for all else. */
enum job_policy { JOB_REPORT, JOB_IGNORE, JOB_STOP, JOB_ENOSPC, JOB_POLICIES };
enum job_state { JOB_RUNNING, JOB_PAUSED, JOB_DONE, JOB_FAILED, JOB_CANCELLED };

bool job_mode_parse(const char *text, enum job_mode *ret);
bool job_policy_parse(const char *text, enum job_policy *ret);

struct job_args {
	const char *target; /* absolute path */
	enum job_mode mode;
	uint64_t ckpt;		   /* NAME@N; 0: NAME */
	uint64_t since;		   /* incremental */
	uint64_t speed;		   /* bytes a second; 0: no limit */
	enum job_policy policy[2]; /* by enum backup_side */
};

int jobs_open(struct daemon *d, struct jobs **ret);
/* Every job is cancelled, none begins any more. Does not wait. */
void jobs_shutdown(struct jobs *t);
/* After jobs_shutdown: until no step is under way; false: the deadline has passed. */
bool jobs_wait_quiet(struct jobs *t, uint64_t deadline_ns);
void jobs_close(struct jobs *t); /* quiet; NULL is fine */
/* Every TICK: lets those go on whose time has come. */
void jobs_tick(struct jobs *t);

/* Begins one of volume v. c: who waits for it. */
int jobs_backup(struct jobs *t, struct gvol *v, const struct job_args *a, uint64_t *ret_id, struct err *e);
/* -ERR_NOENT: no such job. -ERR_STATE: it has ended. Pausing one that is paused is fine, as is resuming one that runs.
 */
int jobs_pause(struct jobs *t, uint64_t id, struct err *e);
int jobs_resume(struct jobs *t, uint64_t id, struct err *e);
/* Ends it, without waiting. `none` and `stream` end no other way: their target gets its name, and they are done; a
 * second cancel gives that up. */
int jobs_cancel(struct jobs *t, uint64_t id, struct err *e);
/* Until it has ended. Returns what it ended with: 0 done, -ERR_x with its text. c may be NULL: nobody to tell progress
 * to; with `own` the job is cancelled when c hangs up, or at the deadline. deadline_ns 0: none. */
int jobs_wait(struct jobs *t, uint64_t id, struct ctl_conn *c, bool own, uint64_t deadline_ns, struct err *e);
/* As docs/control.md: one job (NULL: no such job), or all, or those of a group (NULL: all). New references. */
json_t *jobs_one_json(struct jobs *t, uint64_t id);
json_t *jobs_json(struct jobs *t, const char *group);

#endif
