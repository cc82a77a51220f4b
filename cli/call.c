/* The ways a verb gets its work done: a request to the daemon, or the store itself under its lock. Also the small
 * checked accessors for the daemon's JSON.
 *
 * A verb that can do without a daemon asks first whether one answers. If none does it takes the store's lock; a lock
 * that is held by a daemon just starting, or by another repctl, is waited for a short while, asking again each time.
 */
#include "cli/cli.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/os/clock.h"
#include "net/ctl.h"

#define LOCK_RETRY_MS 50U

const char *js_str(const json_t *o, const char *key, const char *otherwise)
{
	const json_t *v = json_object_get(o, key);
	return json_is_string(v) ? json_string_value(v) : otherwise;
}

bool js_u64(const json_t *o, const char *key, uint64_t *ret)
{
	const json_t *v = json_object_get(o, key);
	if (!json_is_integer(v) || json_integer_value(v) < 0)
		return false;
	*ret = (uint64_t)json_integer_value(v);
	return true;
}

bool js_real(const json_t *o, const char *key, double *ret)
{
	const json_t *v = json_object_get(o, key);
	if (!json_is_number(v))
		return false;
	*ret = json_number_value(v);
	return true;
}

bool js_bool(const json_t *o, const char *key)
{
	return json_is_true(json_object_get(o, key));
}

json_t *cli_name_args(const char *name)
{
	return json_pack("{s:s}", "name", name);
}

/* A message of this side's end of the socket has the verb alone in front; cli_fail_text puts verb and argument there.
 * One of the daemon's, "VERB NAME: ...", stays as it is. */
static int fail_call(const struct cli *c, const char *verb, int rc, int exit_code, const struct err *e)
{
	const char *text = e->text[0] ? e->text : err_short(rc);
	size_t n = strlen(verb);
	bool local = strncmp(text, verb, n) == 0 && strncmp(text + n, ": ", 2) == 0;
	/* The limit that the socket was given may have the daemon's grace in it. */
	if (local && rc == -ERR_TIMEOUT && c->timeout_ms)
		return cli_fail(c, ERR_TIMEOUT, "no answer within %g s; what was asked may still go on in the daemon",
				(double)c->timeout_ms / 1000);
	return cli_fail_text(c, exit_code ? exit_code : err_exit(rc), local ? text + n + 2 : text);
}

struct listener {
	struct cli *c;
	struct progress p;
};

static void on_progress(void *arg, const json_t *p)
{
	struct listener *l = arg;
	char text[2 * ERR_TEXT_MAX];
	if (l->c->told && l->c->told(l->c, p, text, sizeof(text)) && !l->c->json) {
		progress_end(&l->p); /* the bar makes room, and is drawn again */
		cli_note(l->c, "%s", text);
	}
	progress_object(&l->p, p);
}

static int request(struct cli *c, const char *verb, json_t *args, uint64_t limit_ms, json_t **ret)
{
	struct listener l = {.c = c};
	struct err e = {0};
	char label[128];
	json_t *result = NULL;
	int exit_code = 0;

	(void)snprintf(label, sizeof(label), "%s%s%.70s", c->verb->name, c->n_args ? " " : "",
		       c->n_args ? c->args[0] : "");
	progress_init(&l.p, c->out.progress, stderr, label);
	int rc = ctl_call(c->socket_path, verb, args, (unsigned)limit_ms, on_progress, &l, &result, &exit_code, &e);
	progress_end(&l.p);
	if (rc == 0 && !result && !(result = json_object()))
		rc = -ERR_NOMEM;
	if (rc == 0) {
		*ret = result;
		return 0;
	}
	json_decref(result);
	return fail_call(c, verb, rc, exit_code, &e);
}

int cli_call(struct cli *c, const char *verb, json_t *args, json_t **ret)
{
	return request(c, verb, args, c->timeout_ms, ret);
}

int cli_call_timed(struct cli *c, const char *verb, json_t *args, json_t **ret)
{
	if (!c->timeout_ms)
		return cli_call(c, verb, args, ret);
	if (!args || json_object_set_new(args, "timeout_ms", json_integer((json_int_t)c->timeout_ms)) != 0) {
		json_decref(args);
		return cli_fail(c, ERR_NOMEM, "out of memory");
	}
	return request(c, verb, args, c->timeout_ms + CLI_GRACE_MS, ret);
}

int cli_finish(struct cli *c, json_t *doc)
{
	int rc = c->json ? json_print(stdout, doc) : 0;
	json_decref(doc);
	/* main reports what could not be written. */
	return rc == -ERR_NOMEM ? cli_fail(c, ERR_NOMEM, "out of memory") : 0;
}

int cli_call_print(struct cli *c, const char *verb, json_t *args, bool timed, json_t **ret_human)
{
	json_t *r;
	int rc = timed ? cli_call_timed(c, verb, args, &r) : cli_call(c, verb, args, &r);
	*ret_human = NULL;
	if (rc)
		return rc;
	if (c->json)
		return cli_finish(c, r);
	*ret_human = r;
	return 0;
}

/* 0, -ERR_UNREACHABLE_DAEMON, or another code. */
static int ping(const struct cli *c, struct err *e)
{
	json_t *r = NULL;
	int exit_code;
	uint64_t limit = c->timeout_ms && c->timeout_ms < CLI_PING_MS ? c->timeout_ms : CLI_PING_MS;
	int rc = ctl_call(c->socket_path, "ping", NULL, (unsigned)limit, NULL, NULL, &r, &exit_code, e);
	json_decref(r);
	return rc;
}

int cli_offline(struct cli *c, unsigned store_flags, struct store **ret)
{
	uint64_t wait_ms = c->timeout_ms && c->timeout_ms < CLI_LOCK_WAIT_MS ? c->timeout_ms : CLI_LOCK_WAIT_MS;
	uint64_t deadline = clock_mono_ns() + wait_ms * NS_PER_MS;
	struct err e = {0};
	int rc;
	for (;;) {
		rc = ping(c, &e);
		if (rc == 0) {
			*ret = NULL;
			return 0;
		}
		if (rc != -ERR_UNREACHABLE_DAEMON || !c->may_work_offline)
			return fail_call(c, "ping", rc, 0, &e);
		if (!(store_flags & STORE_CREATE) && access(c->store_path, F_OK) != 0)
			return cli_fail(
			    c, ERR_UNREACHABLE_DAEMON,
			    "there is no store at %.1000s and no daemon for it; name the store with --store",
			    c->store_path);
		e = (struct err){0};
		rc = store_open(c->store_path, store_flags, -1, ret, &e);
		if (rc == 0) {
			if (c->verbose)
				cli_note(c, "no daemon answers; working on the store %s itself", c->store_path);
			return 0;
		}
		if (rc != -ERR_BUSY || clock_mono_ns() >= deadline)
			break;
		const struct timespec pause = {.tv_nsec = (long)(LOCK_RETRY_MS * NS_PER_MS)};
		(void)nanosleep(&pause, NULL);
	}
	if (rc == -ERR_BUSY)
		return cli_fail(c, ERR_UNREACHABLE_DAEMON, "no daemon answers at %.1000s, but the store is in use: %s",
				c->socket_path, e.text[0] ? e.text : err_short(rc));
	return cli_fail_text(c, err_exit(rc), e.text[0] ? e.text : err_short(rc));
}
