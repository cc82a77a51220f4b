/* What the files of verbs share. A verb's function checks its arguments, asks the core or the store, and leaves its
 * answer in *c->ret; or returns -ERR_x with the whole message in *c->e.
 */
#ifndef REPFS_FS_VERBS_INTERNAL_H
#define REPFS_FS_VERBS_INTERNAL_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/err.h"

struct daemon;
struct ctl_conn;
struct group;
struct gvol;
struct shell_command;

struct call {
	struct daemon *d;
	struct ctl_conn *ctl; /* NULL: nobody to tell progress to */
	const char *verb;
	const json_t *args;
	json_t **ret;
	struct err *e;
};

/* ---- arguments: what is absent or of another type counts as not given ---- */

const char *verb_arg_str(const struct call *c, const char *key);
bool verb_arg_bool(const struct call *c, const char *key, bool def);
uint64_t verb_arg_u64(const struct call *c, const char *key, uint64_t def);
/* timeout_ms as a deadline; 0: none. */
uint64_t verb_deadline(const struct call *c);
int verb_need_name(const struct call *c, const char **ret);
int verb_need_group(const struct call *c, struct group **ret);				 /* a reference */
int verb_need_volume(const struct call *c, struct gvol **ret, struct group **ret_group); /* two references */
/* A verb had the group of this name, or with this volume, out, to change it, and has ended: look again. To be asked
 * with no reference of a group held. */
bool verb_awaited(const struct call *c, const char *name);
/* There is no `name`: -ERR_NOENT; or there is, and it is not served: -ERR_STATE. what: "volume", "volume or group". */
int verb_not_there(const struct call *c, const char *name, const char *what);

/* Takes o (NULL: {}) as the answer; returns it, borrowed. */
json_t *verb_result(const struct call *c, json_t *o);
/* Puts "VERB NAME: " before what the core said. Returns err. */
int verb_prefixed(const struct call *c, const char *name, int err);

/* Gives sc, which may be NULL, to the group's core and waits for its end. */
int verb_command(const struct call *c, struct group *g, struct shell_command *sc);
enum wait_for { WAIT_RUNNING, WAIT_IN_SYNC, WAIT_DONE };
int verb_wait_for(const struct call *c, struct group *g, enum wait_for what);

/* For the callbacks of what copies: tells the client; nonzero: it has hung up. arg: one of these. */
struct verb_progress {
	const struct call *c;
	uint64_t started, told;
};
int verb_progress(void *arg, uint64_t done, uint64_t total);
/* One line of progress to the client, which there is, at the mean rate since `started` (monotonic). */
void verb_tell(const struct call *c, uint64_t started, uint64_t done, uint64_t total);

/* A group whose record the store is about to change goes out of the daemon and comes back after. */
int verb_take_out(const struct call *c, const char *group);
int verb_bring_back(const struct call *c, const char *group, struct err *e);

/* verbs_volume.c */
int verb_do_create(const struct call *c);
int verb_do_import(const struct call *c);
int verb_do_delete(const struct call *c);
int verb_do_export(const struct call *c);
int verb_do_resize(const struct call *c);
int verb_do_list(const struct call *c);
int verb_do_show(const struct call *c);

/* verbs_group.c */
int verb_do_protect(const struct call *c);
int verb_do_failback(const struct call *c);
int verb_do_switchover(const struct call *c);
int verb_do_resolve(const struct call *c);
int verb_do_diverged(const struct call *c);
int verb_do_start(const struct call *c);
int verb_do_stop(const struct call *c);
int verb_do_pause(const struct call *c);
int verb_do_resume(const struct call *c);
int verb_do_unprotect(const struct call *c);
int verb_do_discard(const struct call *c);
int verb_do_resync(const struct call *c);
int verb_do_checkpoint(const struct call *c);
int verb_do_failover(const struct call *c);
int verb_do_error(const struct call *c);
int verb_do_status(const struct call *c);
int verb_do_wait(const struct call *c);
int verb_do_set(const struct call *c);
int verb_do_get(const struct call *c);

/* verbs_hub.c */
int verb_do_read(const struct call *c);
int verb_do_write(const struct call *c);
int verb_do_report(const struct call *c);

/* verbs_jobs.c */
int verb_do_backup(const struct call *c);
int verb_do_jobs(const struct call *c);
int verb_do_job(const struct call *c);

/* verbs_verify.c */
int verb_do_verify(const struct call *c);

/* verbs_history.c */
int verb_do_checkpoints(const struct call *c);
int verb_do_extents(const struct call *c);

/* verbs_clone.c */
int verb_do_clone(const struct call *c);

#endif
