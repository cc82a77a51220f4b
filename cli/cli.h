/* repctl: what its parts share. One process runs one verb.
 *
 * A verb is a row of the table in options.c: its name, arguments and options are data, from which the parser, --help
 * and the shell completions are made. Its function (cmd_*.c) sends one request to the daemon, or works on the store
 * itself where the verb can, prints the result and returns the exit code.
 *
 * Output: results on stdout, progress and messages on stderr. With --json one document, as the daemon gave it.
 */
#ifndef REPFS_CLI_CLI_H
#define REPFS_CLI_CLI_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cli/output.h"
#include "core/err.h"
#include "image/store.h"

#define CLI_ARGS_MAX 64
#define CLI_GIVEN_MAX 64
#define CLI_PATH_MAX 4096
/* How long a verb that can work on the store itself waits for the store's lock. */
#define CLI_LOCK_WAIT_MS 5000U
/* How long the daemon gets to answer a ping that only asks whether it is there. */
#define CLI_PING_MS 10000U
/* What the daemon gets on top of a limit that it keeps itself, so that its message comes through. */
#define CLI_GRACE_MS 1000U
#define CLI_TIMEOUT_MAX_MS UINT64_C(2592000000) /* 30 days */

struct cli;

struct cli_opt {
	const char *name;
	const char *arg;     /* the value's name in help; NULL: a flag */
	const char *choices; /* "a|b|c": the values allowed; NULL: any */
	const char *help;
	char letter;   /* 0: none */
	bool later;    /* known, and not in this release */
	bool optional; /* its value may be left out; given only as --name=value */
	bool needed;   /* the verb cannot do without it (shown without brackets; the verb checks) */
};

struct cli_verb {
	const char *name;
	const char *args; /* as in help: "NAME FILE" */
	unsigned min_args, max_args;
	const char *help;
	const struct cli_opt *opts; /* ends with a row without name; may be NULL */
	int (*run)(struct cli *c);  /* returns the exit code; NULL: comes in a later release */
};

struct cli_given {
	const struct cli_opt *opt;
	const char *value; /* NULL for a flag */
};

struct cli {
	/* as parsed; strings are borrowed from argv */
	const struct cli_verb *verb;
	const char *args[CLI_ARGS_MAX];
	unsigned n_args;
	struct cli_given given[CLI_GIVEN_MAX];
	unsigned n_given;
	const char *socket; /* -S */
	const char *store;  /* --store */
	enum color_mode color;
	bool json, no_progress, quiet, verbose, yes, help, version;
	uint64_t timeout_ms; /* 0: none */

	/* by cli_resolve */
	char socket_path[CLI_PATH_MAX];
	char store_path[CLI_PATH_MAX];
	bool may_work_offline; /* the store is known, not a socket alone */
	struct output out;

	/* Asked of each progress object of the daemon: whether buf is to be said. NULL: nobody. */
	bool (*told)(struct cli *c, const json_t *p, char *buf, size_t size);
	bool job_view, job_paused; /* of the job that is waited for: what was said */
};

/* ---- options.c ---- */
extern const struct cli_opt cli_global_opts[];
extern const struct cli_verb cli_verbs[]; /* ends with a row without name */
const struct cli_verb *cli_find_verb(const char *name);
/* Fills *c from argv; stops early at --help, --version and verbs of a later release. -ERR_USAGE with *e. On failure
 * *c holds what was read so far, for the message. */
int cli_parse(int argc, char *const argv[], struct cli *c, struct err *e);
/* Paths of the store and its socket, and how to print. */
int cli_resolve(struct cli *c, struct err *e);
bool cli_has(const struct cli *c, const char *opt);
const char *cli_value(const struct cli *c, const char *opt); /* the last one given, or NULL */
/* "2.5" seconds to milliseconds, rounded up; above 0. -ERR_USAGE. */
int cli_parse_seconds(const char *text, uint64_t *ret_ms, struct err *e);
/* Plain decimal, at least min and at most max; no sign, no blanks. */
bool cli_parse_u64(const char *text, uint64_t min, uint64_t max, uint64_t *ret);
/* "NAME" or "NAME@N" into name[NAME_SIZE] and *ret_ckpt (0: none was given). -ERR_USAGE. */
int cli_parse_at(const char *text, char name[NAME_SIZE], uint64_t *ret_ckpt, struct err *e);
/* What `extents` is asked about: overlays/NAME/active, checkpoints/NAME/N (with any folder before it) or NAME@N.
 * layer[16]: "active", "hidden" or "" with *ret_ckpt. */
int cli_parse_layer(const char *text, char name[NAME_SIZE], char layer[16], uint64_t *ret_ckpt, struct err *e);
/* Makes a path absolute without resolving links; -ERR_LIMIT if it is too long. */
int cli_absolute(const char *path, char *buf, size_t size, struct err *e);

/* ---- help.c ---- */
void cli_usage(FILE *f, const struct cli_verb *v); /* one line: "usage: repctl ..." */
void cli_help(FILE *f);
void cli_help_verb(FILE *f, const struct cli_verb *v);
int cli_completion(FILE *f, const char *shell); /* -ERR_USAGE: not one of bash, zsh, fish */

/* ---- report.c ---- */
/* Prints "repctl: VERB ARG: text" and returns the exit code of `code`. */
int cli_fail(const struct cli *c, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The same for a text that may carry the verb in front already. */
int cli_fail_text(const struct cli *c, int exit_code, const char *text);
/* A message, on stderr; none with -q, and none among the JSON lines. */
void cli_note(const struct cli *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Asks on a terminal; true when there is none or with -y. False: nothing may be done, the message has been given. */
bool cli_confirm(struct cli *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* With true an interrupt only sets cli_interrupted, so that what is half-made can be undone; a second one, or one with
 * false, ends the process. */
void cli_catch_signals(void);
void cli_defer_signals(bool on);
int cli_interrupted(void); /* the signal's number, 0: none */

/* ---- call.c ---- */
/* One request to the daemon, with progress. Steals args (may be NULL). 0 with *ret (new reference, never NULL), or the
 * exit code, the message printed. */
int cli_call(struct cli *c, const char *verb, json_t *args, json_t **ret);
/* The same for a verb whose time limit the daemon keeps: puts timeout_ms into args. */
int cli_call_timed(struct cli *c, const char *verb, json_t *args, json_t **ret);
/* cli_call, then the result document with --json. *ret_human: the result for the human form (new reference), NULL when
 * nothing more is to be printed. Returns the exit code. */
int cli_call_print(struct cli *c, const char *verb, json_t *args, bool timed, json_t **ret_human);
/* For verbs that also work without a daemon: 0 with *ret = NULL: a daemon answers, use cli_call; 0 with *ret: the
 * store, locked; else the exit code, the message printed. */
int cli_offline(struct cli *c, unsigned store_flags, struct store **ret);
json_t *cli_name_args(const char *name);    /* {"name": ...} */
int cli_finish(struct cli *c, json_t *doc); /* prints the document with --json; steals it; exit code 0 */

/* ---- json access: the daemon's answers are checked for type, missing is as null ---- */
const char *js_str(const json_t *o, const char *key, const char *otherwise);
bool js_u64(const json_t *o, const char *key, uint64_t *ret);
bool js_real(const json_t *o, const char *key, double *ret);
bool js_bool(const json_t *o, const char *key);

/* ---- cmd_*.c ---- */
void cli_print_version(void);
int cmd_create(struct cli *c);
int cmd_import(struct cli *c);
int cmd_export(struct cli *c);
int cmd_delete(struct cli *c);
int cmd_list(struct cli *c);
int cmd_show(struct cli *c);
int cmd_check(struct cli *c);
int cmd_protect(struct cli *c);
int cmd_start(struct cli *c);
int cmd_stop(struct cli *c);
int cmd_pause(struct cli *c);
int cmd_resume(struct cli *c);
int cmd_checkpoint(struct cli *c);
int cmd_failover(struct cli *c);
int cmd_failback(struct cli *c);
int cmd_switchover(struct cli *c);
int cmd_unprotect(struct cli *c);
int cmd_diverged(struct cli *c);
int cmd_resolve(struct cli *c);
int cmd_error(struct cli *c);
int cmd_status(struct cli *c);
int cmd_wait(struct cli *c);
int cmd_checkpoints(struct cli *c);
int cmd_clone(struct cli *c);
int cmd_extents(struct cli *c);
int cmd_discard(struct cli *c);
int cmd_resync(struct cli *c);
int cmd_verify(struct cli *c);
int cmd_resize(struct cli *c);
int cmd_set(struct cli *c);
int cmd_get(struct cli *c);
int cmd_read(struct cli *c);
int cmd_write(struct cli *c);
int cmd_report(struct cli *c);
int cmd_backup(struct cli *c);
int cmd_jobs(struct cli *c);
int cmd_job(struct cli *c);
int cmd_ping(struct cli *c);
int cmd_version(struct cli *c);
int cmd_shutdown(struct cli *c);
int cmd_completion(struct cli *c);
int cmd_help(struct cli *c);

/* The offline side of the volume verbs (cmd_offline.c): the result document (new reference), or the exit code. */
int offline_create(struct cli *c, struct store *st, const char *name, uint64_t size, const char *group, json_t **ret);
int offline_create_over(struct cli *c, struct store *st, const struct store_base_args *args, uint64_t size,
			json_t **ret);
int offline_import(struct cli *c, struct store *st, const struct store_import_args *args, json_t **ret);
int offline_apply(struct cli *c, struct store *st, const char *name, const char *file, json_t **ret);
int offline_export(struct cli *c, struct store *st, const char *name, uint64_t ckpt, const char *file, json_t **ret);
int offline_list(struct cli *c, struct store *st, json_t **ret);
int offline_show(struct cli *c, struct store *st, const char *name, json_t **ret);

/* The human form of a status document (cmd_status.c); true if every group is well (health ok). */
void status_print(FILE *f, const json_t *doc, bool color);
/* Exit code of `status --exit-code`: 0, 7 or 8. */
int status_exit(const json_t *doc);
/* failover's sentence (cmd_group.c). */
void failover_sentence(const json_t *result, char *buf, size_t size);

#endif
