/* The verbs and options of repctl as tables, and the parser that reads a command line by them.
 *
 * Global options may stand before or after the verb, options of a verb only after it. "--name=value" and
 * "--name value" are the same, as are "-Svalue" and "-S value"; "--" ends the options. Names are not abbreviated: a
 * script written today must mean the same when there are more options.
 */
#include "cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"

#define STORE_DEFAULT "/var/lib/repfs"

const struct cli_opt cli_global_opts[] = {
    {.name = "store", .arg = "STORE", .help = "the store; default $REPFS_STORE, then " STORE_DEFAULT},
    {.name = "socket",
     .letter = 'S',
     .arg = "SOCKET",
     .help = "the daemon's control socket; default STORE/control.sock"},
    {.name = "json", .help = "print one JSON document; progress as JSON lines on stderr"},
    {.name = "color", .arg = "WHEN", .choices = "auto|always|never", .help = "colour; auto: on a terminal"},
    {.name = "no-progress", .help = "no progress bar, no progress lines"},
    {.name = "quiet", .help = "no messages and no progress; results and errors only", .letter = 'q'},
    {.name = "verbose", .help = "say more", .letter = 'v'},
    {.name = "timeout", .arg = "SEC", .help = "give up after so many seconds (exit code 124)"},
    {.name = "yes", .help = "do not ask for confirmation", .letter = 'y'},
    {.name = "help", .help = "this text, or that of a verb", .letter = 'h'},
    {.name = "version", .help = "the version of repctl", .letter = 'V'},
    {.name = NULL},
};

static const struct cli_opt create_opts[] = {
    {.name = "size", .arg = "SIZE", .help = "bytes, or with K M G T (powers of 1024); with --base: that of the image"},
    {.name = "group", .arg = "GROUP", .help = "the consistency group; default: one of the volume's name"},
    {.name = "base", .arg = "QCOW2", .help = "over this image, which is only read and must stay as it is"},
    {.name = "backing-dir", .arg = "DIR", .help = "where its backing files may lie too"},
    {.name = NULL},
};
static const struct cli_opt import_opts[] = {
    {.name = "group", .arg = "GROUP", .help = "the consistency group; default: one of the volume's name"},
    {.name = "format", .arg = "FORMAT", .choices = "raw|zst|qcow|qcow2", .help = "what FILE is; default: by its magic"},
    {.name = "backing-dir",
     .arg = "DIR",
     .help = "where backing files may lie too; default: in FILE's folder and below"},
    {.name = "apply", .help = "put a backup of changed blocks onto the volume NAME, which holds its base"},
    {.name = NULL},
};
static const struct cli_opt list_opts[] = {
    {.name = "names", .help = "the names alone, one a line"},
    {.name = NULL},
};
static const struct cli_opt protect_opts[] = {
    {.name = "peer", .arg = "HOST:PORT", .needed = true, .help = "where the other host's repfs --listen is reached"},
    {.name = "protocol", .arg = "P", .choices = "A|B|C|F", .help = "when a write completes; default F"},
    {.name = "adopt", .help = "use the peer's volumes of the same names, their content kept as a checkpoint"},
    {.name = "id", .arg = "NAME=ID", .help = "the volume's id on the wire; may be given for each volume"},
    {.name = "wait", .help = "return when in sync, not when replication runs"},
    {.name = "hash", .help = "compare hashes first and ship only what differs: for a copy that is there already"},
    {.name = NULL},
};
static const struct cli_opt checkpoint_opts[] = {
    {.name = "no-wait", .help = "only ask for one; prints nothing"},
    {.name = "keep", .help = "pin it: retention leaves it alone"},
    {.name = NULL},
};
static const struct cli_opt failover_opts[] = {
    {.name = "to", .arg = "latest|N", .help = "keep all that was received, or go to checkpoint N"},
    {.name = "force", .help = "with no checkpoint to go back to: take the disk as it is"},
    {.name = "discard-active", .help = "with --to: drop what this side wrote itself"},
    {.name = "wait", .help = "return when the commit in the background has ended"},
    {.name = NULL},
};
static const struct cli_opt failback_opts[] = {
    {.name = "peer", .arg = "HOST:PORT", .needed = true, .help = "the old primary; this host dials it"},
    {.name = "wait", .help = "return when in sync"},
    {.name = NULL},
};
static const struct cli_opt resolve_opts[] = {
    {.name = "discard",
     .arg = "local|peer",
     .choices = "local|peer",
     .needed = true,
     .help = "whose copy is given up; it stays as a pinned checkpoint"},
    {.name = NULL},
};
static const struct cli_opt unprotect_opts[] = {
    {.name = "force", .help = "take a detached disk as it is, without what was written through the peer"},
    {.name = NULL},
};
static const struct cli_opt resync_opts[] = {
    {.name = "wait", .help = "return when the disk is whole again"},
    {.name = NULL},
};
static const struct cli_opt verify_opts[] = {
    {.name = "repair",
     .arg = "from-peer",
     .choices = "from-peer",
     .optional = true,
     .help = "give the secondary the primary's content where they differ; from-peer: the other way"},
    {.name = NULL},
};
static const struct cli_opt status_opts[] = {
    {.name = "watch", .help = "again every second until interrupted"},
    {.name = "exit-code", .help = "exit 7 if a group is degraded, 8 on split brain"},
    {.name = NULL},
};
static const struct cli_opt wait_opts[] = {
    {.name = "for", .arg = "WHAT", .choices = "running|in-sync|done", .help = "default in-sync"},
    {.name = NULL},
};
static const struct cli_opt checkpoints_opts[] = {
    {.name = "drop", .arg = "N", .help = "drop checkpoint N"},
    {.name = NULL},
};
static const struct cli_opt backup_opts[] = {
    {.name = "sync",
     .arg = "MODE",
     .choices = "full|top|none|stream|incremental",
     .needed = true,
     .help = "what TARGET gets"},
    {.name = "since", .arg = "N", .help = "incremental: what changed since checkpoint N"},
    {.name = "speed", .arg = "RATE", .help = "bytes a second at most, or with K M G T"},
    {.name = "on-source-error",
     .arg = "P",
     .choices = "report|ignore|stop|enospc",
     .help = "report: fail; ignore: try again; stop: pause; enospc: stop if there is no room, else report"},
    {.name = "on-target-error", .arg = "P", .choices = "report|ignore|stop|enospc", .help = "the same of TARGET"},
    {.name = "detach", .help = "do not wait: print the job's id"},
    {.name = NULL},
};
static const struct cli_opt extents_opts[] = {
    {.name = "since", .arg = "M", .help = "only what changed between checkpoints M and N"},
    {.name = NULL},
};

static const struct cli_opt remote_opts[] = {
    {.name = "remote", .help = "of the peer's volume, over the connection that replicates it"},
    {.name = NULL},
};
static const struct cli_opt report_opts[] = {
    {.name = "remote", .help = "of the peers that are connected"},
    {.name = NULL},
};

const struct cli_verb cli_verbs[] = {
    {"create", "NAME", 1, 1, "make a volume", create_opts, cmd_create},
    {"import", "NAME FILE", 2, 2, "make a volume from a disk image", import_opts, cmd_import},
    {"export", "NAME[@N] FILE", 2, 2, "copy a volume, or its checkpoint N, to a file", NULL, cmd_export},
    {"delete", "NAME", 1, 1, "delete a volume and its checkpoints", NULL, cmd_delete},
    {"resize", "NAME SIZE", 2, 2, "grow a volume, here and on the peer, while it is in use", NULL, cmd_resize},
    {"list", "", 0, 0, "the volumes of the store", list_opts, cmd_list},
    {"show", "NAME", 1, 1, "all about one volume", NULL, cmd_show},
    {"protect", "GROUP", 1, 1, "make this host primary for the group and replicate it to a peer", protect_opts,
     cmd_protect},
    {"start", "GROUP", 1, 1, "start replication again after stop", NULL, cmd_start},
    {"stop", "GROUP", 1, 1, "end replication on both hosts", NULL, cmd_stop},
    {"pause", "GROUP", 1, 1, "on the primary: stop shipping, go on tracking what changes", NULL, cmd_pause},
    {"resume", "GROUP", 1, 1, "go on shipping after pause; wait --for=in-sync waits for the rest", NULL, cmd_resume},
    {"checkpoint", "GROUP", 1, 1, "take a checkpoint; prints its number", checkpoint_opts, cmd_checkpoint},
    {"failover", "GROUP", 1, 1, "on the secondary: make its copy the live disk", failover_opts, cmd_failover},
    {"switchover", "GROUP", 1, 1, "on the primary: swap the roles with the peer; nothing is lost", NULL,
     cmd_switchover},
    {"failback", "GROUP", 1, 1, "after a failover: make this host primary and the old primary its secondary",
     failback_opts, cmd_failback},
    {"unprotect", "GROUP", 1, 1, "end the protection on this host for good; its disk and checkpoints stay",
     unprotect_opts, cmd_unprotect},
    {"diverged", "GROUP", 1, 1, "what each side of a split brain holds that the other does not", NULL, cmd_diverged},
    {"resolve", "GROUP", 1, 1, "end a split brain: the copy that is given up follows the other", resolve_opts,
     cmd_resolve},
    {"discard", "GROUP", 1, 1, "drop what the secondary side wrote itself", NULL, cmd_discard},
    {"resync", "GROUP", 1, 1, "rebuild a detached disk of the primary from the peer", resync_opts, cmd_resync},
    {"verify", "GROUP", 1, 1, "on the primary: compare both disks, and all overlays with their checksums", verify_opts,
     cmd_verify},
    {"error", "GROUP", 1, 1, "the error that stands; exit 7 if one does or the peer is not in sync", NULL, cmd_error},
    {"status", "[GROUP]", 0, 1, "how replication is doing", status_opts, cmd_status},
    {"wait", "GROUP", 1, 1, "wait for a state", wait_opts, cmd_wait},
    {"checkpoints", "NAME", 1, 1, "the checkpoints that are kept", checkpoints_opts, cmd_checkpoints},
    {"clone", "NAME@N CLONE", 2, 2, "make a writable scratch over a checkpoint: clones/CLONE in the mount", NULL,
     cmd_clone},
    {"extents", "overlays/NAME/active|hidden | NAME@N", 1, 1, "which ranges an overlay or a checkpoint holds",
     extents_opts, cmd_extents},
    {"read", "NAME OFFSET LENGTH", 3, 3, "bytes of a volume to stdout", remote_opts, cmd_read},
    {"write", "NAME OFFSET", 2, 2, "bytes from stdin to a volume", remote_opts, cmd_write},
    {"report", "", 0, 0, "the volumes of this host, as a hub is told them", report_opts, cmd_report},
    {"backup", "NAME[@N] TARGET", 2, 2, "copy a live volume, or a part of it, to a file", backup_opts, cmd_backup},
    {"jobs", "", 0, 0, "the jobs of the daemon", NULL, cmd_jobs},
    {"job", "pause|resume|cancel|wait ID", 2, 2, "control a job, or wait for its end", NULL, cmd_job},
    {"set", "GROUP KEY=VALUE...", 2, CLI_ARGS_MAX, "change settings of a group", NULL, cmd_set},
    {"get", "GROUP", 1, 1, "the settings of a group", NULL, cmd_get},
    {"check", "", 0, 0, "check the metadata and overlays of a store that no daemon uses", NULL, cmd_check},
    {"ping", "", 0, 0, "does the daemon answer", NULL, cmd_ping},
    {"version", "", 0, 0, "the versions of repctl and of the daemon", NULL, cmd_version},
    {"shutdown", "", 0, 0, "end the daemon", NULL, cmd_shutdown},
    {"completion", "bash|zsh|fish", 1, 1, "a completion script for the shell", NULL, cmd_completion},
    {"help", "[VERB]", 0, 1, "this text, or that of a verb", NULL, cmd_help},

    {"events", "", 0, 0, "follow what happens", NULL, NULL},
    {"metrics", "", 0, 0, "counters as Prometheus text", NULL, NULL},
    {"key", "new FILE", 0, 0, "make a pre-shared key", NULL, NULL},
    {NULL, NULL, 0, 0, NULL, NULL, NULL},
};

const struct cli_verb *cli_find_verb(const char *name)
{
	for (const struct cli_verb *v = cli_verbs; v->name; v++)
		if (strcmp(v->name, name) == 0)
			return v;
	return NULL;
}

static const struct cli_opt *find_long(const struct cli_opt *opts, const char *name, size_t len)
{
	for (; opts && opts->name; opts++)
		if (strlen(opts->name) == len && memcmp(opts->name, name, len) == 0)
			return opts;
	return NULL;
}

static const struct cli_opt *find_letter(const struct cli_opt *opts, char letter)
{
	for (; opts && opts->name; opts++)
		if (opts->letter == letter)
			return opts;
	return NULL;
}

static bool is_choice(const char *choices, const char *value)
{
	size_t len = strlen(value);
	for (const char *p = choices; *p;) {
		size_t n = strcspn(p, "|");
		if (n == len && memcmp(p, value, n) == 0)
			return true;
		p += n;
		p += *p == '|';
	}
	return false;
}

static bool is_global(const struct cli_opt *o)
{
	for (const struct cli_opt *g = cli_global_opts; g->name; g++)
		if (g == o)
			return true;
	return false;
}

static int take_global(struct cli *c, const struct cli_opt *o, const char *value, struct err *e)
{
	const char *n = o->name;
	if (strcmp(n, "store") == 0)
		c->store = value;
	else if (strcmp(n, "socket") == 0)
		c->socket = value;
	else if (strcmp(n, "json") == 0)
		c->json = true;
	else if (strcmp(n, "color") == 0 && value)
		c->color = value[1] == 'u' ? COLOR_AUTO : value[0] == 'a' ? COLOR_ALWAYS : COLOR_NEVER;
	else if (strcmp(n, "no-progress") == 0)
		c->no_progress = true;
	else if (strcmp(n, "quiet") == 0)
		c->quiet = true;
	else if (strcmp(n, "verbose") == 0)
		c->verbose = true;
	else if (strcmp(n, "timeout") == 0 && value)
		return cli_parse_seconds(value, &c->timeout_ms, e);
	else if (strcmp(n, "yes") == 0)
		c->yes = true;
	else if (strcmp(n, "help") == 0)
		c->help = true;
	else
		c->version = true;
	return 0;
}

static int take(struct cli *c, const struct cli_opt *o, const char *value, struct err *e)
{
	if (value && !value[0])
		return err_set(e, ERR_USAGE, "--%s needs a value; an empty one was given", o->name);
	if (value && o->choices && !is_choice(o->choices, value))
		return err_set(e, ERR_USAGE, "--%s takes %s, not '%.100s'", o->name, o->choices, value);
	if (is_global(o))
		return take_global(c, o, value, e);
	if (c->n_given == CLI_GIVEN_MAX)
		return err_set(e, ERR_USAGE, "more than %d options", CLI_GIVEN_MAX);
	c->given[c->n_given++] = (struct cli_given){o, value};
	return 0;
}

static int unknown_option(const struct cli *c, const char *arg, struct err *e)
{
	if (c->verb)
		return err_set(e, ERR_USAGE, "%s: unknown option %.100s; repctl %s --help lists those there are",
			       c->verb->name, arg, c->verb->name);
	return err_set(e, ERR_USAGE,
		       "unknown option %.100s; options of a verb come behind it, repctl --help lists the others", arg);
}

static int parse_long(struct cli *c, int argc, char *const argv[], int *i, struct err *e)
{
	const char *arg = argv[*i] + 2;
	size_t len = strcspn(arg, "=");
	const struct cli_opt *o = c->verb ? find_long(c->verb->opts, arg, len) : NULL;
	if (!o)
		o = find_long(cli_global_opts, arg, len);
	if (!o)
		return unknown_option(c, argv[*i], e);
	const char *value = arg[len] == '=' ? arg + len + 1 : NULL;
	if (!o->arg) {
		if (value)
			return err_set(e, ERR_USAGE, "--%s takes no value", o->name);
	} else if (!value && !o->optional) {
		if (*i + 1 >= argc)
			return err_set(e, ERR_USAGE, "--%s needs a value: %s", o->name, o->arg);
		value = argv[++*i];
	}
	return take(c, o, value, e);
}

static int parse_letters(struct cli *c, int argc, char *const argv[], int *i, struct err *e)
{
	for (const char *p = argv[*i] + 1; *p; p++) {
		const struct cli_opt *o = c->verb ? find_letter(c->verb->opts, *p) : NULL;
		if (!o)
			o = find_letter(cli_global_opts, *p);
		if (!o)
			return unknown_option(c, argv[*i], e);
		if (!o->arg) {
			int rc = take(c, o, NULL, e);
			if (rc < 0)
				return rc;
			continue;
		}
		if (p[1])
			return take(c, o, p + 1, e);
		if (*i + 1 >= argc)
			return err_set(e, ERR_USAGE, "-%c needs a value: %s", o->letter, o->arg);
		return take(c, o, argv[++*i], e);
	}
	return 0;
}

static int take_word(struct cli *c, const char *word, struct err *e)
{
	if (!c->verb) {
		c->verb = cli_find_verb(word);
		if (!c->verb)
			return err_set(e, ERR_USAGE, "%.100s: no such verb; repctl --help lists them", word);
		return 0;
	}
	if (c->n_args >= c->verb->max_args)
		return err_set(e, ERR_USAGE,
			       "%s: '%.100s' is one argument too many; repctl %s --help says which it takes",
			       c->verb->name, word, c->verb->name);
	c->args[c->n_args++] = word;
	return 0;
}

int cli_parse(int argc, char *const argv[], struct cli *c, struct err *e)
{
	*c = (struct cli){.color = COLOR_AUTO};
	bool words_only = false;
	for (int i = 1; i < argc; i++) {
		const char *a = argv[i];
		int rc;
		if (!words_only && strcmp(a, "--") == 0) {
			words_only = true;
			continue;
		}
		if (!words_only && a[0] == '-' && a[1] == '-')
			rc = parse_long(c, argc, argv, &i, e);
		else if (!words_only && a[0] == '-' && a[1])
			rc = parse_letters(c, argc, argv, &i, e);
		else
			rc = take_word(c, a, e);
		if (rc < 0)
			return rc;
		/* What stands behind such a verb is not known here. */
		if (c->help || c->version || (c->verb && !c->verb->run))
			return 0;
	}
	if (!c->verb)
		return err_set(e, ERR_USAGE, "a verb is missing; repctl --help lists them");
	if (c->n_args < c->verb->min_args)
		return err_set(e, ERR_USAGE, "%s: an argument is missing; it takes %s", c->verb->name, c->verb->args);
	return 0;
}

bool cli_has(const struct cli *c, const char *opt)
{
	for (unsigned i = 0; i < c->n_given; i++)
		if (strcmp(c->given[i].opt->name, opt) == 0)
			return true;
	return false;
}

const char *cli_value(const struct cli *c, const char *opt)
{
	for (unsigned i = c->n_given; i > 0; i--)
		if (strcmp(c->given[i - 1].opt->name, opt) == 0)
			return c->given[i - 1].value;
	return NULL;
}

int cli_resolve(struct cli *c, struct err *e)
{
	const char *env = getenv("REPFS_STORE");
	const char *store = c->store ? c->store : env && env[0] ? env : STORE_DEFAULT;
	int rc = cli_absolute(store, c->store_path, sizeof(c->store_path), e);
	if (rc < 0)
		return rc;
	if (c->socket)
		rc = cli_absolute(c->socket, c->socket_path, sizeof(c->socket_path), e);
	else if ((size_t)snprintf(c->socket_path, sizeof(c->socket_path), "%s/control.sock", c->store_path) >=
		 sizeof(c->socket_path))
		rc = err_set(e, ERR_USAGE, "the path of the store is too long");
	if (rc < 0)
		return rc;
	c->may_work_offline = !c->socket || c->store;

	c->out.color = color_wanted(c->color, isatty(STDOUT_FILENO) == 1, getenv("NO_COLOR"), getenv("TERM"));
	if (c->quiet || c->no_progress)
		c->out.progress = PROGRESS_NONE;
	else if (c->json)
		c->out.progress = PROGRESS_JSON;
	else
		c->out.progress = isatty(STDERR_FILENO) == 1 ? PROGRESS_BAR : PROGRESS_NONE;
	return 0;
}

bool cli_parse_u64(const char *text, uint64_t min, uint64_t max, uint64_t *ret)
{
	uint64_t v = 0;
	if (!text[0])
		return false;
	for (const char *p = text; *p; p++) {
		if (*p < '0' || *p > '9')
			return false;
		unsigned digit = (unsigned)(*p - '0');
		if (v > (UINT64_MAX - digit) / 10)
			return false;
		v = v * 10 + digit;
	}
	if (v < min || v > max)
		return false;
	*ret = v;
	return true;
}

int cli_parse_seconds(const char *text, uint64_t *ret_ms, struct err *e)
{
	/* Digits with at most one point: no sign, exponent, blanks or locale. */
	uint64_t ms = 0, unit = 1000;
	bool point = false, digits = false, more = false;
	for (const char *p = text; *p; p++) {
		if (*p == '.' && !point) {
			point = true;
			continue;
		}
		if (*p < '0' || *p > '9')
			goto bad;
		digits = true;
		unsigned d = (unsigned)(*p - '0');
		if (!point) {
			ms = ms * 10 + d * UINT64_C(1000);
		} else if (unit > 1) {
			unit /= 10;
			ms += d * unit;
		} else if (d) {
			more = true;
		}
		if (ms > CLI_TIMEOUT_MAX_MS)
			goto bad;
	}
	ms += more;
	if (!digits || ms == 0 || ms > CLI_TIMEOUT_MAX_MS)
		goto bad;
	*ret_ms = ms;
	return 0;
bad:
	return err_set(e, ERR_USAGE,
		       "--timeout takes seconds above 0 and at most %llu, such as 10 or 0.5, not '%.100s'",
		       (unsigned long long)(CLI_TIMEOUT_MAX_MS / 1000), text);
}

static int copy_name(const char *text, size_t len, char name[NAME_SIZE], struct err *e)
{
	char buf[NAME_SIZE];
	if (len == 0 || len >= sizeof(buf))
		return err_set(e, ERR_USAGE, "a name has 1 to %d characters, '%.100s' has not", NAME_MAX_LEN, text);
	memcpy(buf, text, len);
	buf[len] = '\0';
	if (!name_valid(buf))
		return err_set(e, ERR_USAGE,
			       "'%s' is no name: letters, digits, '.', '_' and '-', the first a letter or a digit",
			       buf);
	memcpy(name, buf, len + 1);
	return 0;
}

int cli_parse_at(const char *text, char name[NAME_SIZE], uint64_t *ret_ckpt, struct err *e)
{
	const char *at = strchr(text, '@');
	uint64_t n = 0;
	if (at && !cli_parse_u64(at + 1, 1, INT64_MAX, &n))
		return err_set(e, ERR_USAGE, "'%.100s' is no NAME@N with N the number of a checkpoint", text);
	int rc = copy_name(text, at ? (size_t)(at - text) : strlen(text), name, e);
	if (rc < 0)
		return rc;
	*ret_ckpt = n;
	return 0;
}

/* Cuts the last component off [text, *end); false if there is none. */
static bool last_component(const char *text, const char **end, const char **ret, size_t *ret_len)
{
	const char *stop = *end;
	const char *p = stop;
	while (p > text && p[-1] != '/')
		p--;
	if (p == stop)
		return false;
	*ret = p;
	*ret_len = (size_t)(stop - p);
	*end = p > text ? p - 1 : p;
	return true;
}

static bool is_word(const char *p, size_t len, const char *word)
{
	return strlen(word) == len && memcmp(p, word, len) == 0;
}

int cli_parse_layer(const char *text, char name[NAME_SIZE], char layer[16], uint64_t *ret_ckpt, struct err *e)
{
	if (!strchr(text, '/')) {
		uint64_t n = 0;
		if (!strchr(text, '@'))
			goto bad;
		int rc = cli_parse_at(text, name, &n, e);
		if (rc < 0)
			return rc;
		layer[0] = '\0';
		*ret_ckpt = n;
		return 0;
	}
	const char *end = text + strlen(text), *file, *volume, *folder;
	size_t file_len, volume_len, folder_len;
	if (!last_component(text, &end, &file, &file_len) || !last_component(text, &end, &volume, &volume_len) ||
	    !last_component(text, &end, &folder, &folder_len))
		goto bad;
	uint64_t n = 0;
	bool active = is_word(file, file_len, "active"), hidden = is_word(file, file_len, "hidden");
	if (is_word(folder, folder_len, "overlays")) {
		if (!active && !hidden)
			goto bad;
	} else if (!is_word(folder, folder_len, "checkpoints") || !cli_parse_u64(file, 1, INT64_MAX, &n)) {
		goto bad;
	}
	int rc = copy_name(volume, volume_len, name, e);
	if (rc < 0)
		return rc;
	(void)snprintf(layer, 16, "%s", n ? "" : active ? "active" : "hidden");
	*ret_ckpt = n;
	return 0;
bad:
	return err_set(e, ERR_USAGE, "'%.200s' is neither overlays/NAME/active, overlays/NAME/hidden nor NAME@N", text);
}

int cli_absolute(const char *path, char *buf, size_t size, struct err *e)
{
	char cwd[CLI_PATH_MAX];
	int n;
	if (path[0] == '/') {
		n = snprintf(buf, size, "%s", path);
	} else {
		if (!getcwd(cwd, sizeof(cwd)))
			return err_set(e, ERR_FAILED, "%.200s: the current folder has no path; give an absolute one",
				       path);
		n = snprintf(buf, size, "%s/%s", strcmp(cwd, "/") == 0 ? "" : cwd, path);
	}
	if (n < 0 || (size_t)n >= size)
		return err_set(e, ERR_LIMIT, "%.100s...: the path is longer than %zu bytes", path, size - 1);
	return 0;
}
