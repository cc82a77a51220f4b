/* The verbs of the control socket (docs/control.md): which there are, and what their files share.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"
#include "net/ctl.h"

#ifndef REPFS_VERSION
#define REPFS_VERSION "0"
#endif

#define TIMEOUT_MAX_MS UINT64_C(1000000000000) /* what is above means the same: never */

/* ---- arguments ---- */

const char *verb_arg_str(const struct call *c, const char *key)
{
	return json_string_value(json_object_get(c->args, key));
}

bool verb_arg_bool(const struct call *c, const char *key, bool def)
{
	const json_t *j = json_object_get(c->args, key);
	return j ? json_is_true(j) : def;
}

uint64_t verb_arg_u64(const struct call *c, const char *key, uint64_t def)
{
	const json_t *j = json_object_get(c->args, key);
	return json_is_integer(j) && json_integer_value(j) >= 0 ? (uint64_t)json_integer_value(j) : def;
}

/* timeout_ms as a deadline; 0: none. */
uint64_t verb_deadline(const struct call *c)
{
	uint64_t ms = min_u64(verb_arg_u64(c, "timeout_ms", 0), TIMEOUT_MAX_MS);
	return ms ? clock_mono_ns() + ms * NS_PER_MS : 0;
}

int verb_need_name(const struct call *c, const char **ret)
{
	const char *name = verb_arg_str(c, "name");
	if (name == NULL)
		return err_set(c->e, ERR_USAGE, "%s: a name is missing", c->verb);
	if (!store_name_valid(name))
		return err_set(c->e, ERR_USAGE,
			       "%s: %.80s is not a name: 1 to 63 of A-Z a-z 0-9 . _ -, the first a letter or digit",
			       c->verb, name);
	*ret = name;
	return 0;
}

int verb_not_there(const struct call *c, const char *name, const char *what)
{
	char why[ERR_TEXT_MAX], group[NAME_SIZE];
	if (daemon_unserved(c->d, name, why, group))
		return err_set(c->e, ERR_STATE, "%s %s: not served: %.430s", c->verb, name, why);
	return err_set(c->e, ERR_NOENT, "%s %s: no such %s; `list` shows them", c->verb, name, what);
}

bool verb_awaited(const struct call *c, const char *name)
{
	if (!daemon_away(c->d, name))
		return false;
	mutex_lock(&c->d->admin);
	mutex_unlock(&c->d->admin);
	return true;
}

int verb_need_group(const struct call *c, struct group **ret)
{
	const char *name;
	int err = verb_need_name(c, &name);
	if (err)
		return err;
	*ret = daemon_group(c->d, name);
	if (*ret == NULL && verb_awaited(c, name))
		*ret = daemon_group(c->d, name);
	if (*ret == NULL)
		return verb_not_there(c, name, "volume or group");
	return 0;
}

int verb_need_volume(const struct call *c, struct gvol **ret, struct group **ret_group)
{
	const char *name;
	int err = verb_need_name(c, &name);
	if (err)
		return err;
	struct gvol *v;
	struct group *g;
	bool again = false;
	do {
		v = gvol_find(c->d, name);
		g = v ? gvol_group(v) : NULL;
		if (g == NULL)
			gvol_unref(v);
	} while (g == NULL && !again && (again = verb_awaited(c, name)));
	if (g == NULL)
		return verb_not_there(c, name, "volume");
	*ret = v;
	*ret_group = g;
	return 0;
}

json_t *verb_result(const struct call *c, json_t *o)
{
	if (o == NULL)
		o = json_object();
	json_object_set_new(o, "schema", json_integer(1));
	*c->ret = o;
	return o;
}

/* Puts "VERB NAME: " before what the core said. */
int verb_prefixed(const struct call *c, const char *name, int err)
{
	if (err && c->e) {
		char text[ERR_TEXT_MAX], begins[160];
		int n = snprintf(begins, sizeof(begins), "%s %s: ", c->verb, name);
		if (strncmp(c->e->text, begins, (size_t)n) == 0) /* the store says it itself */
			return err;
		memcpy(text, c->e->text, sizeof(text));
		(void)err_set(c->e, -err, "%s %s: %.400s", c->verb, name, text);
	}
	return err;
}

int verb_command(const struct call *c, struct group *g, struct shell_command *sc)
{
	if (sc == NULL)
		return err_set(c->e, ERR_NOMEM, "%s %s: out of memory", c->verb, g->name);
	return verb_prefixed(c, g->name, group_command(g, sc, c->ctl, verb_deadline(c), c->e));
}

static bool wait_holds(struct group *g, enum wait_for what, struct err *e, int *ret_err)
{
	struct repl_status s;
	const struct repl_meta *m = repl_meta(g->core);
	repl_status(g->core, clock_mono_ns(), &s);
	*ret_err = 0;
	if (m->split_brain && what != WAIT_DONE)
		*ret_err = err_set(e, ERR_SPLIT,
				   "split brain: it will not get there by itself; see `diverged`, then `resolve`");
	switch (what) {
	case WAIT_RUNNING:
		return m->state == STATE_RUNNING;
	case WAIT_IN_SYNC:
		/* A secondary in its first sync has no view yet; in sync means that it can take over. */
		if (m->role == ROLE_STANDALONE)
			*ret_err = err_set(e, ERR_STATE, "it is standalone: it has no peer to be in sync with");
		if (m->role == ROLE_PRIMARY && repl_unsynced(g->core))
			*ret_err = err_set(e, ERR_STATE, "%s",
					   strcmp(s.error.operation, "resync") == 0 && s.error.code
					       ? s.error.text
					       : "a local disk is detached: it gets there by `resync` only, once the "
						 "disk accepts I/O again");
		return m->state == STATE_RUNNING && s.link == LINK_SYNCED && s.checkpoint != 0 && s.detached == 0;
	case WAIT_DONE:
		if (m->state == STATE_FAILOVER_FAILED)
			*ret_err = err_set(e, ERR_STATE, "the commit met an error: %s", s.error.text);
		return m->state == STATE_DONE;
	}
	return false;
}

int verb_wait_for(const struct call *c, struct group *g, enum wait_for what)
{
	uint64_t until = verb_deadline(c), told = 0;
	for (;;) {
		struct err e = {0};
		int err = 0;
		mutex_lock(&g->lock);
		bool holds = wait_holds(g, what, &e, &err);
		if (!holds && !err && g->closing)
			err = atomic_load(&c->d->ending)
				  ? err_set(&e, ERR_CANCELED, "the daemon is shutting down")
				  : err_set(&e, ERR_CANCELED, "volumes were added to the group or deleted meanwhile");
		mutex_unlock(&g->lock);
		if (holds)
			return 0;
		if (err) {
			*c->e = e;
			return verb_prefixed(c, g->name, err);
		}
		uint64_t now = clock_mono_ns();
		if (until && now >= until)
			return verb_prefixed(c, g->name, err_set(c->e, ERR_TIMEOUT, "not there in the time given"));
		if (c->ctl && ctl_canceled(c->ctl))
			return verb_prefixed(c, g->name,
					     atomic_load(&c->d->ending)
						 ? err_set(c->e, ERR_CANCELED, "the daemon is shutting down")
						 : err_set(c->e, ERR_INTR, "interrupted"));
		if (c->ctl && now - told > NS_PER_SEC / 2) {
			struct repl_status s;
			told = now;
			mutex_lock(&g->lock);
			repl_status(g->core, now, &s);
			mutex_unlock(&g->lock);
			if (s.resync)
				(void)ctl_progress(
				    c->ctl,
				    json_pack("{s:I, s:I, s:I, s:o}", "done", (json_int_t)s.resync_done, "total",
					      (json_int_t)s.resync_total, "rate", (json_int_t)s.resync_rate, "eta_s",
					      s.resync_rate ? json_real((double)(s.resync_total - s.resync_done) /
									(double)s.resync_rate)
							    : json_null()));
			else if (s.commit)
				(void)ctl_progress(c->ctl, json_pack("{s:I, s:I}", "done", (json_int_t)s.commit_done,
								     "total", (json_int_t)s.commit_total));
		}
		mutex_lock(&g->lock);
		(void)cond_wait_until(&g->cond, &g->lock, now + 20 * NS_PER_MS);
		mutex_unlock(&g->lock);
	}
}

void verb_tell(const struct call *c, uint64_t started, uint64_t done, uint64_t total)
{
	double s = (double)(clock_mono_ns() - started) / (double)NS_PER_SEC, rate = s > 0 ? (double)done / s : 0;
	(void)ctl_progress(
	    c->ctl,
	    json_pack("{s:I, s:I, s:f, s:o}", "done", (json_int_t)done, "total", (json_int_t)total, "rate", rate,
		      "eta_s", rate > 0 ? json_real((double)(total - min_u64(done, total)) / rate) : json_null()));
}

int verb_progress(void *arg, uint64_t done, uint64_t total)
{
	struct verb_progress *p = arg;
	uint64_t now = clock_mono_ns();
	if (p->c->ctl && ctl_canceled(p->c->ctl))
		return 1;
	if (p->c->ctl && (now - p->told > NS_PER_SEC / 5 || done == total)) {
		p->told = now;
		verb_tell(p->c, p->started, done, total);
	}
	return 0;
}

int verb_take_out(const struct call *c, const char *group)
{
	struct group *g = daemon_group_exact(c->d, group);
	char why[ERR_TEXT_MAX], name[NAME_SIZE];
	if (g == NULL)
		return daemon_unserved(c->d, group, why, name)
			   ? err_set(c->e, ERR_STATE, "its group %s is not served: %.400s", group, why)
			   : 0;
	struct repl_meta *m = malloc(sizeof(*m));
	if (m == NULL) {
		group_unref(g);
		return err_set(c->e, ERR_NOMEM, "out of memory");
	}
	mutex_lock(&g->lock);
	*m = *repl_meta(g->core);
	mutex_unlock(&g->lock);
	unsigned role = m->role, state = m->state;
	int err;
	daemon_away_set(c->d, m); /* before its names go */
	if (role != ROLE_STANDALONE || state == STATE_FAILOVER || state == STATE_FAILOVER_FAILED)
		err = err_set(
		    c->e, ERR_STATE,
		    "group %s is %s in %s: its volumes can't be added or deleted; `stop` and `unprotect` it first",
		    group, role_name(role), state_name(state));
	else
		err = daemon_remove_group(c->d, g, c->e);
	if (err)
		daemon_away_set(c->d, NULL);
	group_unref(g);
	return err;
}

int verb_bring_back(const struct call *c, const char *group, struct err *e)
{
	struct repl_meta *m = NULL;
	int err = store_load_group(c->d->store, group, &m, e);
	if (err == -ERR_NOENT) {
		daemon_away_set(c->d, NULL);
		return 0;
	}
	if (!err)
		err = daemon_add_group(c->d, m, e);
	if (err)
		log_error(group,
			  "the group could not be taken up again, its volumes are not served; start repfs anew: %s",
			  e->text);
	if (err)
		daemon_unserved_add(c->d, group, m, e->text);
	daemon_away_set(c->d, NULL);
	free(m);
	return err;
}

/* ---- the daemon ---- */

static int verb_do_ping(const struct call *c)
{
	verb_result(c, json_pack("{s:i}", "pid", (int)getpid()));
	return 0;
}

static int verb_do_version(const struct call *c)
{
	verb_result(c, json_pack("{s:s, s:i, s:i}", "version", REPFS_VERSION, "protocol", WIRE_VERSION_MAX, "format",
				 REPL_META_VERSION));
	return 0;
}

static int verb_do_shutdown(const struct call *c)
{
	verb_result(c, NULL);
	if (c->d->cfg.hooks.shutdown)
		c->d->cfg.hooks.shutdown(c->d->cfg.hooks.arg);
	return 0;
}

int daemon_command(struct daemon *d, struct ctl_conn *ctl, const char *verb, const json_t *args, json_t **ret,
		   struct err *e)
{
	static const struct {
		const char *verb;
		int (*fn)(const struct call *c);
	} table[] = {
	    {"ping", verb_do_ping},	    {"version", verb_do_version},
	    {"create", verb_do_create},	    {"import", verb_do_import},
	    {"export", verb_do_export},	    {"delete", verb_do_delete},
	    {"list", verb_do_list},	    {"show", verb_do_show},
	    {"protect", verb_do_protect},   {"start", verb_do_start},
	    {"stop", verb_do_stop},	    {"checkpoint", verb_do_checkpoint},
	    {"failover", verb_do_failover}, {"error", verb_do_error},
	    {"status", verb_do_status},	    {"wait", verb_do_wait},
	    {"discard", verb_do_discard},   {"checkpoints", verb_do_checkpoints},
	    {"extents", verb_do_extents},   {"set", verb_do_set},
	    {"get", verb_do_get},	    {"shutdown", verb_do_shutdown},
	    {"pause", verb_do_pause},	    {"resume", verb_do_resume},
	    {"failback", verb_do_failback}, {"unprotect", verb_do_unprotect},
	    {"resolve", verb_do_resolve},   {"diverged", verb_do_diverged},
	    {"resync", verb_do_resync},	    {"read", verb_do_read},
	    {"write", verb_do_write},	    {"report", verb_do_report},
	    {"backup", verb_do_backup},	    {"switchover", verb_do_switchover},
	    {"jobs", verb_do_jobs},	    {"job", verb_do_job},
	    {"clone", verb_do_clone},	    {"verify", verb_do_verify},
	    {"resize", verb_do_resize},
	};
	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		if (strcmp(table[i].verb, verb) != 0)
			continue;
		struct call c = {d, ctl, verb, args, ret, e};
		return table[i].fn(&c);
	}
	return err_set(e, ERR_USAGE, "%.40s: the daemon knows no such verb", verb);
}
