/* Verbs of backup jobs: backup, jobs, job. */
#include <string.h>

#include "fs/jobs.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"
#include "image/backup.h"

/* One of a side's policies; absent: report. */
static int policy_arg(const struct call *c, const char *key, enum job_policy *ret)
{
	const char *text = verb_arg_str(c, key);
	*ret = JOB_REPORT;
	if (text && !job_policy_parse(text, ret))
		return err_set(c->e, ERR_USAGE, "%s takes report, ignore, stop or enospc, not %.40s", key, text);
	return 0;
}

static int read_args(const struct call *c, struct job_args *ret)
{
	const char *sync = verb_arg_str(c, "sync");
	struct job_args a = {.target = verb_arg_str(c, "target"),
			     .ckpt = verb_arg_u64(c, "checkpoint", 0),
			     .since = verb_arg_u64(c, "since", 0),
			     .speed = verb_arg_u64(c, "speed", 0)};
	if (a.target == NULL || a.target[0] != '/')
		return err_set(c->e, ERR_USAGE, "the target's absolute path is missing");
	if (sync == NULL || !job_mode_parse(sync, &a.mode))
		return err_set(c->e, ERR_USAGE, "--sync takes full, top, none, stream or incremental");
	int err = policy_arg(c, "on_source_error", &a.policy[BACKUP_SOURCE]);
	if (!err)
		err = policy_arg(c, "on_target_error", &a.policy[BACKUP_TARGET]);
	if (!err)
		*ret = a;
	return err;
}

int verb_do_backup(const struct call *c)
{
	struct gvol *v;
	struct group *g;
	struct job_args a;
	uint64_t id = 0;
	int err = verb_need_volume(c, &v, &g);
	if (err)
		return err;
	group_unref(g); /* the job takes its own, for each step */
	err = read_args(c, &a);
	if (!err)
		err = jobs_backup(c->d->jobs, v, &a, &id, c->e);
	err = verb_prefixed(c, v->name, err);
	if (!err && !verb_arg_bool(c, "detach", false))
		err = jobs_wait(c->d->jobs, id, c->ctl, true, verb_deadline(c), c->e);
	if (!err)
		verb_result(c, jobs_one_json(c->d->jobs, id));
	gvol_unref(v);
	return err;
}

int verb_do_jobs(const struct call *c)
{
	verb_result(c, json_pack("{s:o}", "jobs", jobs_json(c->d->jobs, NULL)));
	return 0;
}

int verb_do_job(const struct call *c)
{
	const char *op = verb_arg_str(c, "op");
	uint64_t id = verb_arg_u64(c, "id", 0);
	int err;
	if (op == NULL || id == 0)
		return err_set(c->e, ERR_USAGE, "job: pause, resume, cancel or wait, and the job's id are needed");
	if (strcmp(op, "pause") == 0)
		err = jobs_pause(c->d->jobs, id, c->e);
	else if (strcmp(op, "resume") == 0)
		err = jobs_resume(c->d->jobs, id, c->e);
	else if (strcmp(op, "cancel") == 0)
		err = jobs_cancel(c->d->jobs, id, c->e);
	else if (strcmp(op, "wait") == 0)
		err = jobs_wait(c->d->jobs, id, c->ctl, false, verb_deadline(c), c->e);
	else
		err = err_set(c->e, ERR_USAGE, "job: pause, resume, cancel or wait, not %.40s", op);
	if (!err) {
		json_t *j = jobs_one_json(c->d->jobs, id);
		verb_result(c, j ? j : json_pack("{s:I}", "id", (json_int_t)id));
	}
	return err;
}
