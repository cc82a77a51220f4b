/* backup, jobs and job. */
#include "cli/cli.h"

#include <string.h>

static bool put(json_t *args, const char *key, json_t *value)
{
	return json_object_set_new(args, key, value) == 0;
}

static bool put_text(json_t *args, const char *key, const char *text)
{
	return !text || put(args, key, json_string(text));
}

/* What a person should know at once, while the job goes on: where the view is, and that it waits for them. */
static bool told(struct cli *c, const json_t *p, char *buf, size_t size)
{
	const char *state = js_str(p, "state", ""), *view = js_str(p, "view", NULL);
	const char *why = js_str(json_object_get(p, "error"), "text", NULL);
	uint64_t id = 0;
	(void)js_u64(p, "id", &id);
	if (view && !c->job_view) {
		c->job_view = true;
		(void)snprintf(buf, size, "job %llu: the view is %s", (unsigned long long)id, view);
		return true;
	}
	bool paused = strcmp(state, "paused") == 0, was = c->job_paused;
	c->job_paused = paused;
	if (paused && !was)
		(void)snprintf(buf, size, "job %llu is paused%s%s; repctl job resume %llu goes on",
			       (unsigned long long)id, why ? ": " : "", why ? why : "", (unsigned long long)id);
	return paused && !was;
}

static int odd(const struct cli *c, json_t *args)
{
	json_decref(args);
	return cli_fail(c, ERR_USAGE, "an argument is not valid UTF-8; use a name or path that is");
}

static int backup_args(struct cli *c, json_t *args, struct err *e)
{
	const char *speed = cli_value(c, "speed"), *since = cli_value(c, "since");
	uint64_t n;
	if (speed) {
		int rc = parse_size(speed, &n, e);
		if (rc < 0)
			return rc;
		if (n == 0 || n > INT64_MAX)
			return err_set(e, ERR_USAGE, "--speed %.40s: bytes a second, above 0", speed);
		if (!put(args, "speed", json_integer((json_int_t)n)))
			return -ERR_NOMEM;
	}
	if (since) {
		if (!cli_parse_u64(since, 1, INT64_MAX, &n))
			return err_set(e, ERR_USAGE, "--since takes the number of a checkpoint, not %.40s", since);
		if (!put(args, "since", json_integer((json_int_t)n)))
			return -ERR_NOMEM;
	}
	return cli_has(c, "detach") && !put(args, "detach", json_true()) ? -ERR_NOMEM : 0;
}

/* The document of a job for a person: what it did. */
static void print_done(const struct cli *c, const json_t *r)
{
	char copied[FORMAT_SIZE];
	uint64_t n = 0;
	(void)js_u64(r, "copied", &n);
	format_bytes(n, copied);
	uint64_t ckpt;
	char at[40] = "";
	if (js_u64(r, "checkpoint", &ckpt))
		(void)snprintf(at, sizeof(at), " at checkpoint %llu", (unsigned long long)ckpt);
	cli_note(c, "%s%s: %s copied to %s", js_str(r, "volume", ""), at, copied, js_str(r, "target", ""));
}

int cmd_backup(struct cli *c)
{
	char name[NAME_SIZE], target[CLI_PATH_MAX];
	const char *sync = cli_value(c, "sync");
	uint64_t ckpt;
	struct err e = {0};
	if (!sync)
		return cli_fail(c, ERR_USAGE, "what to copy is missing; give it with --sync, such as --sync full");
	int rc = cli_parse_at(c->args[0], name, &ckpt, &e);
	if (rc == 0)
		rc = cli_absolute(c->args[1], target, sizeof(target), &e);
	if (rc < 0)
		return cli_fail_text(c, err_exit(rc), e.text);
	json_t *args = json_pack("{s:s, s:s, s:s}", "name", name, "target", target, "sync", sync), *r;
	if (!args || (ckpt && !put(args, "checkpoint", json_integer((json_int_t)ckpt))) ||
	    !put_text(args, "on_source_error", cli_value(c, "on-source-error")) ||
	    !put_text(args, "on_target_error", cli_value(c, "on-target-error")))
		return odd(c, args);
	rc = backup_args(c, args, &e);
	if (rc < 0) {
		json_decref(args);
		return cli_fail_text(c, err_exit(rc), e.text[0] ? e.text : err_short(rc));
	}
	c->told = told;
	rc = cli_call_timed(c, "backup", args, &r);
	if (rc)
		return rc;
	if (!c->json && cli_has(c, "detach")) {
		uint64_t id = 0;
		const char *view = js_str(r, "view", NULL);
		(void)js_u64(r, "id", &id);
		(void)printf("%llu\n", (unsigned long long)id);
		if (view)
			cli_note(c, "job %llu: the view is %s", (unsigned long long)id, view);
	} else if (!c->json) {
		print_done(c, r);
	}
	return cli_finish(c, r);
}

static void cell_percent(const json_t *j, char buf[FORMAT_SIZE])
{
	uint64_t done, total;
	if (js_u64(j, "done", &done) && js_u64(j, "total", &total) && total)
		(void)snprintf(buf, FORMAT_SIZE, "%.1f%%", 100.0 * (double)done / (double)total);
	else
		(void)snprintf(buf, FORMAT_SIZE, "-");
}

static int print_jobs(struct cli *c, const json_t *doc)
{
	static const struct table_column columns[] = {
	    {"ID", TABLE_RIGHT},   {"VOLUME", TABLE_LEFT},  {"MODE", TABLE_LEFT},
	    {"STATE", TABLE_LEFT}, {"COPIED", TABLE_RIGHT}, {"DONE", TABLE_RIGHT},
	    {"RATE", TABLE_RIGHT}, {"LEFT", TABLE_RIGHT},   {"TARGET", TABLE_LEFT},
	};
	const json_t *jobs = json_object_get(doc, "jobs");
	struct table *t = table_new(columns, 9, c->out.color);
	size_t i;
	json_t *j;
	json_array_foreach(jobs, i, j)
	{
		char id[FORMAT_SIZE] = "-", copied[FORMAT_SIZE] = "-", percent[FORMAT_SIZE],
		     rate[FORMAT_SIZE + 2] = "-", left[FORMAT_SIZE] = "-";
		uint64_t n;
		double x;
		if (js_u64(j, "id", &n))
			(void)snprintf(id, sizeof(id), "%llu", (unsigned long long)n);
		if (js_u64(j, "copied", &n))
			format_bytes(n, copied);
		if (js_real(j, "rate", &x) && x >= 0 && x < 1e18) {
			format_bytes((uint64_t)x, rate);
			(void)strcat(rate, "/s");
		}
		if (js_real(j, "eta_s", &x))
			format_duration(x, left);
		cell_percent(j, percent);
		const char *cells[] = {id,
				       js_str(j, "volume", NULL),
				       js_str(j, "mode", NULL),
				       js_str(j, "state", NULL),
				       copied,
				       percent,
				       rate,
				       left,
				       js_str(j, "target", NULL)};
		table_row(t, cells);
	}
	if (table_finish(t, stdout) < 0)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	if (json_array_size(jobs) == 0)
		cli_note(c, "no jobs");
	json_array_foreach(jobs, i, j)
	{
		const char *text = js_str(json_object_get(j, "error"), "text", NULL);
		uint64_t id = 0;
		(void)js_u64(j, "id", &id);
		if (text)
			cli_note(c, "job %llu: %s", (unsigned long long)id, text);
	}
	return 0;
}

int cmd_jobs(struct cli *c)
{
	json_t *r;
	int rc = cli_call_print(c, "jobs", NULL, false, &r);
	if (rc == 0 && r)
		rc = print_jobs(c, r);
	json_decref(r);
	return rc;
}

int cmd_job(struct cli *c)
{
	static const char *const ops[] = {"pause", "resume", "cancel", "wait"};
	const char *op = c->args[0];
	uint64_t id;
	bool known = false;
	for (size_t i = 0; i < 4; i++)
		known = known || strcmp(op, ops[i]) == 0;
	if (!known)
		return cli_fail(c, ERR_USAGE, "use pause, resume, cancel or wait");
	if (!cli_parse_u64(c->args[1], 1, INT64_MAX, &id))
		return cli_fail(c, ERR_USAGE, "%.40s is no job's id; repctl jobs shows them", c->args[1]);
	json_t *args = json_pack("{s:s, s:I}", "op", op, "id", (json_int_t)id), *r;
	bool wait = strcmp(op, "wait") == 0;
	if (wait)
		c->told = told;
	int rc = cli_call_print(c, "job", args, wait, &r);
	if (r && wait)
		print_done(c, r);
	json_decref(r);
	return rc;
}
