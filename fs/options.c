/* Parsing of options; see fs/options.h.
 *
 * Every setting goes through option_apply(key, value, origin). A key is remembered with the origin that set it, and the
 * file, which is read last, leaves alone what the command line has set. Within one origin the last one wins, except in
 * the file, where a key that stands twice is an error: nobody can mean both.
 * '-' and '_' are the same in a key.
 */
#include "fs/options.h"

#include <errno.h>
#include <getopt.h>
#include <ini.h>
#include <linux/mount.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "core/check.h"
#include "image/volume.h"
#include "net/stream.h"

#define KEY_SIZE 48

enum origin { ORIGIN_NONE, ORIGIN_FILE, ORIGIN_COMMAND };

enum key_id {
	KEY_FOREGROUND,
	KEY_DEBUG,
	KEY_LISTEN,
	KEY_INSECURE,
	KEY_THREADS,
	KEY_DURABILITY,
	KEY_LOG,
	KEY_LOG_LEVEL,
	KEY_LOG_FORMAT,
	KEY_CONFIG,
	KEY_TLS,
	KEY_LATER, /* known by name, refused */
	KEY_ALLOW_OTHER,
	KEY_ALLOW_ROOT,
	KEY_DEFAULT_PERMISSIONS,
	KEY_RO,
	KEY_RW,
	KEY_UID,
	KEY_GID,
	KEY_UMASK,
	KEY_FSNAME,
	KEY_MAX_BACKGROUND,
	KEY_GUARD,
	KEY_FUSE_DEBUG,
	KEY_MS_SET,   /* a mount flag */
	KEY_MS_CLEAR, /* the opposite of one */
	KEY_KERNEL,   /* KEY=VALUE handed to the kernel */
	KEY_IGNORED,  /* of mount(8) and fstab, without a meaning here */
	KEY_COUNT
};

enum key_kind { KIND_FLAG, KIND_TEXT, KIND_EITHER };

static const struct key {
	const char *name;
	enum key_id id;
	enum key_kind kind;
	unsigned long flag;
} keys[] = {
    {"foreground", KEY_FOREGROUND, KIND_FLAG, 0},
    {"debug", KEY_DEBUG, KIND_FLAG, 0},
    {"listen", KEY_LISTEN, KIND_TEXT, 0},
    {"insecure", KEY_INSECURE, KIND_FLAG, 0},
    {"threads", KEY_THREADS, KIND_TEXT, 0},
    {"durability", KEY_DURABILITY, KIND_TEXT, 0},
    {"log", KEY_LOG, KIND_TEXT, 0},
    {"log-level", KEY_LOG_LEVEL, KIND_TEXT, 0},
    {"log-format", KEY_LOG_FORMAT, KIND_TEXT, 0},
    {"config", KEY_CONFIG, KIND_TEXT, 0},
    {"tls", KEY_TLS, KIND_TEXT, 0},
    {"tls-psk", KEY_LATER, KIND_EITHER, 0},
    {"accept", KEY_LATER, KIND_EITHER, 0},
    {"pre-checkpoint", KEY_LATER, KIND_EITHER, 0},
    {"post-checkpoint", KEY_LATER, KIND_EITHER, 0},
    {"allow-other", KEY_ALLOW_OTHER, KIND_FLAG, 0},
    {"allow-root", KEY_ALLOW_ROOT, KIND_FLAG, 0},
    {"default-permissions", KEY_DEFAULT_PERMISSIONS, KIND_FLAG, 0},
    {"ro", KEY_RO, KIND_FLAG, 0},
    {"rw", KEY_RW, KIND_FLAG, 0},
    {"uid", KEY_UID, KIND_TEXT, 0},
    {"gid", KEY_GID, KIND_TEXT, 0},
    {"umask", KEY_UMASK, KIND_TEXT, 0},
    {"fsname", KEY_FSNAME, KIND_TEXT, 0},
    {"max-background", KEY_MAX_BACKGROUND, KIND_TEXT, 0},
    {"guard", KEY_GUARD, KIND_FLAG, 0},
    {"fuse-debug", KEY_FUSE_DEBUG, KIND_FLAG, 0},
    {"noexec", KEY_MS_SET, KIND_FLAG, MS_NOEXEC},
    {"exec", KEY_MS_CLEAR, KIND_FLAG, MS_NOEXEC},
    {"sync", KEY_MS_SET, KIND_FLAG, MS_SYNCHRONOUS},
    {"async", KEY_MS_CLEAR, KIND_FLAG, MS_SYNCHRONOUS},
    {"dirsync", KEY_MS_SET, KIND_FLAG, MS_DIRSYNC},
    {"noatime", KEY_MS_SET, KIND_FLAG, MS_NOATIME},
    {"atime", KEY_MS_CLEAR, KIND_FLAG, MS_NOATIME},
    {"context", KEY_KERNEL, KIND_TEXT, 0},
    {"fscontext", KEY_KERNEL, KIND_TEXT, 0},
    {"defcontext", KEY_KERNEL, KIND_TEXT, 0},
    {"rootcontext", KEY_KERNEL, KIND_TEXT, 0},
    /* The mount is always nosuid and nodev: there is nothing in it that could be either. mount.fuse adds suid,dev. */
    {"suid", KEY_IGNORED, KIND_FLAG, 0},
    {"nosuid", KEY_IGNORED, KIND_FLAG, 0},
    {"dev", KEY_IGNORED, KIND_FLAG, 0},
    {"nodev", KEY_IGNORED, KIND_FLAG, 0},
    {"diratime", KEY_IGNORED, KIND_FLAG, 0},
    {"nodiratime", KEY_IGNORED, KIND_FLAG, 0},
    {"relatime", KEY_IGNORED, KIND_FLAG, 0},
    {"norelatime", KEY_IGNORED, KIND_FLAG, 0},
    {"strictatime", KEY_IGNORED, KIND_FLAG, 0},
    {"lazytime", KEY_IGNORED, KIND_FLAG, 0},
    {"nolazytime", KEY_IGNORED, KIND_FLAG, 0},
    {"auto", KEY_IGNORED, KIND_FLAG, 0},
    {"noauto", KEY_IGNORED, KIND_FLAG, 0},
    {"user", KEY_IGNORED, KIND_EITHER, 0},
    {"nouser", KEY_IGNORED, KIND_FLAG, 0},
    {"users", KEY_IGNORED, KIND_FLAG, 0},
    {"nousers", KEY_IGNORED, KIND_FLAG, 0},
    {"owner", KEY_IGNORED, KIND_FLAG, 0},
    {"group", KEY_IGNORED, KIND_FLAG, 0},
    {"defaults", KEY_IGNORED, KIND_FLAG, 0},
    {"-netdev", KEY_IGNORED, KIND_FLAG, 0}, /* _netdev */
    {"nofail", KEY_IGNORED, KIND_FLAG, 0},
    {"uhelper", KEY_IGNORED, KIND_TEXT, 0},
    {"helper", KEY_IGNORED, KIND_TEXT, 0},
    {"comment", KEY_IGNORED, KIND_TEXT, 0},
};

/* What parsing carries along; the result is copied out only when all went well. */
struct parse {
	struct options o;
	enum origin set_by[ARRAY_LEN(keys)];
	/* reading the file */
	FILE *file;
	unsigned line;
	bool line_cut, line_indented;
	struct err *e;
	int error;
};

/* ---- values --------------------------------------------------------------------------------------------------------
 */

static int value_bad(const char *key, const char *value, const char *expected, struct err *e)
{
	return err_set(e, ERR_USAGE, "%s=%.200s: expected %s", key, value, expected);
}

static int value_bool(const char *key, const char *value, bool *ret, struct err *e)
{
	static const char *const yes[] = {"yes", "true", "on", "1"}, *const no[] = {"no", "false", "off", "0"};
	if (!value) {
		*ret = true;
		return 0;
	}
	for (size_t i = 0; i < ARRAY_LEN(yes); i++) {
		if (strcasecmp(value, yes[i]) == 0 || strcasecmp(value, no[i]) == 0) {
			*ret = strcasecmp(value, yes[i]) == 0;
			return 0;
		}
	}
	return value_bad(key, value, "yes or no", e);
}

static int value_number(const char *key, const char *value, int base, uint64_t min, uint64_t max, uint64_t *ret,
			struct err *e)
{
	char expected[80];
	char *end;
	errno = 0;
	unsigned long long n = strtoull(value, &end, base);
	bool digits = value[0] >= '0' && value[0] <= '9';
	if (digits && *end == '\0' && errno == 0 && n >= min && n <= max) {
		*ret = n;
		return 0;
	}
	(void)snprintf(expected, sizeof(expected),
		       base == 8 ? "an octal number up to %llo" : "a number from %llu to %llu",
		       (unsigned long long)(base == 8 ? max : min), (unsigned long long)max);
	return value_bad(key, value, expected, e);
}

/* choices: separated by '|'; the result is the position. */
static int value_choice(const char *key, const char *value, const char *choices, int *ret, struct err *e)
{
	size_t len = strlen(value);
	int i = 0;
	for (const char *p = choices; p; i++) {
		const char *bar = strchr(p, '|');
		size_t n = bar ? (size_t)(bar - p) : strlen(p);
		if (n == len && strncmp(p, value, n) == 0) {
			*ret = i;
			return 0;
		}
		p = bar ? bar + 1 : NULL;
	}
	char expected[80];
	(void)snprintf(expected, sizeof(expected), "one of %s", choices);
	return value_bad(key, value, expected, e);
}

static int text_replace(char **dst, const char *value, struct err *e)
{
	char *copy = strdup(value);
	if (!copy)
		return err_set(e, ERR_NOMEM, "out of memory");
	free(*dst);
	*dst = copy;
	return 0;
}

static int kernel_option_add(char **dst, const char *key, const char *value, struct err *e)
{
	char *joined;
	if (asprintf(&joined, "%s%s%s=%s", *dst ? *dst : "", *dst ? "," : "", key, value) < 0)
		return err_set(e, ERR_NOMEM, "out of memory");
	free(*dst);
	*dst = joined;
	return 0;
}

/* ---- keys ----------------------------------------------------------------------------------------------------------
 */

static int apply_listen(struct options *o, const char *value, struct err *e)
{
	char host[256], port[32];
	int r = addr_split(value, host, sizeof(host), port, sizeof(port), e);
	return r < 0 ? -ERR_USAGE : text_replace(&o->listen, value, e);
}

static int apply_flag(struct options *o, const struct key *k, bool on, struct err *e)
{
	switch (k->id) {
	case KEY_FOREGROUND:
		o->foreground = on;
		return 0;
	case KEY_DEBUG:
		o->debug = on;
		return 0;
	case KEY_INSECURE:
		o->insecure = on;
		return 0;
	case KEY_ALLOW_OTHER:
		o->mount.allow_other = on;
		return 0;
	case KEY_ALLOW_ROOT:
		o->mount.allow_root = on;
		return 0;
	case KEY_DEFAULT_PERMISSIONS:
		/* Always on: nobody but the kernel checks modes here. */
		return on ? 0
			  : err_set(e, ERR_USAGE,
				    "default_permissions=no: permissions are always checked; leave it out");
	case KEY_RO:
		o->mount.flags = on ? o->mount.flags | MS_RDONLY : o->mount.flags & ~(unsigned long)MS_RDONLY;
		return 0;
	case KEY_RW:
		o->mount.flags = on ? o->mount.flags & ~(unsigned long)MS_RDONLY : o->mount.flags | MS_RDONLY;
		return 0;
	case KEY_GUARD:
		o->mount.guard = on;
		return 0;
	case KEY_FUSE_DEBUG:
		o->mount.fuse_debug = on;
		return 0;
	case KEY_MS_SET:
		o->mount.flags = on ? o->mount.flags | k->flag : o->mount.flags & ~k->flag;
		return 0;
	case KEY_MS_CLEAR:
		o->mount.flags = on ? o->mount.flags & ~k->flag : o->mount.flags | k->flag;
		return 0;
	default:
		return 0;
	}
}

static int apply_text(struct options *o, const struct key *k, const char *value, struct err *e)
{
	uint64_t n = 0;
	int i = 0, r;

	switch (k->id) {
	case KEY_LISTEN:
		return apply_listen(o, value, e);
	case KEY_CONFIG:
		return text_replace(&o->config, value, e);
	case KEY_FSNAME:
		return text_replace(&o->fsname, value, e);
	case KEY_KERNEL:
		return kernel_option_add(&o->kernel_options, k->name, value, e);
	case KEY_THREADS:
		r = value_number(k->name, value, 10, 1, MOUNT_THREADS_MAX, &n, e);
		if (r == 0)
			o->threads = (unsigned)n;
		return r;
	case KEY_MAX_BACKGROUND:
		r = value_number("max_background", value, 10, 1, MOUNT_BACKGROUND_MAX, &n, e);
		if (r == 0)
			o->mount.background = (unsigned)n;
		return r;
	case KEY_UID:
		r = value_number(k->name, value, 10, 0, UINT32_MAX - 1, &n, e);
		if (r == 0)
			o->uid = (uid_t)n;
		return r;
	case KEY_GID:
		r = value_number(k->name, value, 10, 0, UINT32_MAX - 1, &n, e);
		if (r == 0)
			o->gid = (gid_t)n;
		return r;
	case KEY_UMASK:
		r = value_number(k->name, value, 8, 0, 0777, &n, e);
		if (r == 0) {
			o->umask = (mode_t)n;
			o->umask_given = true;
		}
		return r;
	case KEY_DURABILITY:
		r = value_choice(k->name, value, "power|process", &i, e);
		if (r == 0)
			o->durability = i == 0 ? DURABILITY_POWER : DURABILITY_PROCESS;
		return r;
	case KEY_LOG:
		r = value_choice(k->name, value, "stderr|journal|syslog", &i, e);
		if (r == 0) {
			o->log_target = i == 0 ? LOG_STDERR : i == 1 ? LOG_JOURNAL : LOG_SYSLOG;
			o->log_given = true;
		}
		return r;
	case KEY_LOG_LEVEL:
		r = value_choice(k->name, value, "error|warn|info|debug", &i, e);
		if (r == 0)
			o->log_level = LOG_LEVEL_ERROR + (enum log_level)i;
		return r;
	case KEY_LOG_FORMAT:
		r = value_choice(k->name, value, "text|json", &i, e);
		if (r == 0)
			o->log_format = i == 0 ? LOG_TEXT : LOG_JSON;
		return r;
	case KEY_TLS:
		r = value_choice(k->name, value, "off|on|require", &i, e);
		if (r == 0 && i != 0)
			return err_set(
			    e, ERR_USAGE,
			    "tls=%s: this version has no TLS yet; use tls=off and keep the connection on a trusted "
			    "network (insecure for peers that are not on loopback)",
			    value);
		return r;
	default:
		return 0;
	}
}

static const struct key *key_find(const char *name)
{
	char norm[KEY_SIZE];
	size_t i;
	for (i = 0; name[i]; i++) {
		if (i == sizeof(norm) - 1)
			return NULL;
		norm[i] = name[i] == '_' ? '-' : name[i];
	}
	norm[i] = '\0';
	for (size_t k = 0; k < ARRAY_LEN(keys); k++)
		if (strcmp(keys[k].name, norm) == 0)
			return &keys[k];
	return NULL;
}

/* fstab's own remarks: they are for other programs. */
static bool key_is_remark(const char *name)
{
	return strncmp(name, "x-", 2) == 0 || strncmp(name, "X-", 2) == 0;
}

/* value NULL: the bare key. */
static int option_apply(struct parse *p, const char *name, const char *value, enum origin origin, struct err *e)
{
	const struct key *k = key_find(name);
	if (!k && origin == ORIGIN_COMMAND && key_is_remark(name))
		return 0;
	if (!k)
		return err_set(e, ERR_USAGE, "unknown option '%.60s'; repfs -h lists them", name);
	if (k->id == KEY_LATER)
		return err_set(e, ERR_USAGE, "%s: belongs to a later version of repfs; remove it", k->name);
	if (k->id == KEY_CONFIG && origin == ORIGIN_FILE)
		return err_set(e, ERR_USAGE, "config: a configuration file can't name another one; remove it");
	if (value && strlen(value) > OPTIONS_TEXT_MAX)
		return err_set(e, ERR_USAGE, "%s: longer than %d characters", k->name, OPTIONS_TEXT_MAX);
	if (k->kind == KIND_TEXT && (!value || !*value))
		return err_set(e, ERR_USAGE, "%s: needs a value: %s=...", k->name, k->name);

	enum origin *set_by = &p->set_by[k - keys];
	if (origin == ORIGIN_FILE && *set_by == ORIGIN_FILE)
		return err_set(e, ERR_USAGE, "%s: stands there twice; remove one", k->name);
	/* Checked even if the command line overrules it: a wrong file shall not pass because of that. */
	struct options scratch = {0};
	struct options *dst = origin == ORIGIN_FILE && *set_by == ORIGIN_COMMAND ? &scratch : &p->o;
	bool on = true;
	int r = 0;
	if (k->kind == KIND_FLAG) {
		r = value_bool(k->name, value, &on, e);
		if (r == 0)
			r = apply_flag(dst, k, on, e);
	} else if (value) {
		r = apply_text(dst, k, value, e);
	}
	if (dst == &scratch)
		options_free(&scratch);
	else if (r == 0)
		*set_by = origin;
	return r;
}

/* ---- -o ------------------------------------------------------------------------------------------------------------
 */

/* "a,b=c": as mount(8) writes them; "\," is a comma within a value and "\\" a backslash. */
static int options_apply_list(struct parse *p, const char *list, struct err *e)
{
	char item[OPTIONS_TEXT_MAX + KEY_SIZE];
	size_t n = 0;
	for (const char *c = list;; c++) {
		if (*c == '\\' && (c[1] == ',' || c[1] == '\\'))
			c++;
		else if (*c == ',' || *c == '\0') {
			item[n] = '\0';
			char *eq = strchr(item, '=');
			if (eq)
				*eq = '\0';
			int r = n ? option_apply(p, item, eq ? eq + 1 : NULL, ORIGIN_COMMAND, e) : 0;
			if (r < 0 || *c == '\0')
				return r;
			n = 0;
			continue;
		}
		if (n == sizeof(item) - 1)
			return err_set(e, ERR_USAGE, "-o: an option is longer than %d characters", OPTIONS_TEXT_MAX);
		item[n++] = *c;
	}
}

/* ---- the file ------------------------------------------------------------------------------------------------------
 */

/* fgets for inih that knows the line it is at, and ends the reading at a line that inih would misread: one that is
 * longer than its buffer (it cuts it), or one that begins with white space (it takes it for more of the value above).
 */
static char *config_gets(char *buf, int size, void *arg)
{
	struct parse *p = arg;
	if (p->error || p->line_cut || p->line_indented || !fgets(buf, size, p->file))
		return NULL;
	p->line++;
	size_t len = strlen(buf);
	size_t blank = strspn(buf, " \t\r\n\v\f");
	if ((len == 0 || buf[len - 1] != '\n') && !feof(p->file))
		p->line_cut = true;
	else if (blank > 0 && buf[blank] != '\0')
		p->line_indented = true;
	else
		return buf;
	return NULL;
}

/* Returns 1 to go on, as inih wants it. */
static int config_line(void *arg, const char *section, const char *name, const char *value)
{
	struct parse *p = arg;
	struct err e = {0};
	int r;
	if (p->error)
		return 0;
	if (*section && strcmp(section, "repfs") != 0)
		r = err_set(&e, ERR_USAGE, "section [%.40s] is unknown; there is only [repfs]", section);
	else
		r = option_apply(p, name, value, ORIGIN_FILE, &e);
	if (r < 0)
		p->error = err_set(p->e, ERR_USAGE, "%s:%u: %s", p->o.config, p->line, e.text);
	return r == 0;
}

static int config_read(struct parse *p, struct err *e)
{
	const char *path = p->o.config;
	p->file = fopen(path, "re");
	if (!p->file)
		return err_set(e, ERR_USAGE, "--config %s: %s", path, strerror(errno));
	p->e = e;
	int r = ini_parse_stream(config_gets, p, config_line, p);
	bool failed = ferror(p->file) != 0;
	(void)fclose(p->file);
	p->file = NULL;
	if (p->error)
		return p->error;
	if (p->line_cut)
		return err_set(e, ERR_USAGE, "%s:%u: the line is too long; keep lines below 190 characters", path,
			       p->line);
	if (p->line_indented)
		return err_set(e, ERR_USAGE, "%s:%u: the line begins with white space; begin it with its key", path,
			       p->line);
	if (failed)
		return err_set(e, ERR_USAGE, "--config %s: can't be read", path);
	if (r != 0)
		return err_set(e, ERR_USAGE, "%s:%d: expected KEY = VALUE", path, r);
	return 0;
}

/* ---- the command line ----------------------------------------------------------------------------------------------
 */

enum long_id { LONG_KEY = 256, LONG_CHECK };

static const struct option long_options[] = {
    {"foreground", no_argument, NULL, 'f'},
    {"debug", no_argument, NULL, 'd'},
    {"listen", required_argument, NULL, LONG_KEY},
    {"insecure", no_argument, NULL, LONG_KEY},
    {"tls", required_argument, NULL, LONG_KEY},
    {"tls-psk", required_argument, NULL, LONG_KEY},
    {"accept", required_argument, NULL, LONG_KEY},
    {"config", required_argument, NULL, LONG_KEY},
    {"threads", required_argument, NULL, LONG_KEY},
    {"durability", required_argument, NULL, LONG_KEY},
    {"log", required_argument, NULL, LONG_KEY},
    {"log-level", required_argument, NULL, LONG_KEY},
    {"log-format", required_argument, NULL, LONG_KEY},
    {"check-config", no_argument, NULL, LONG_CHECK},
    {"version", no_argument, NULL, 'V'},
    {"help", no_argument, NULL, 'h'},
    {0},
};

/* Called as /sbin/mount.fuse.repfs or mount.repfs the short options are those of mount(8). */
static bool called_as_helper(const char *argv0)
{
	const char *slash = strrchr(argv0, '/');
	return strncmp(slash ? slash + 1 : argv0, "mount.", 6) == 0;
}

static int option_wrong(int c, char **argv, struct err *e)
{
	if (c == ':' && optopt > 0 && optopt < 256)
		return err_set(e, ERR_USAGE, "-%c: needs a value; repfs -h lists the options", optopt);
	if (c == ':')
		return err_set(e, ERR_USAGE, "%.100s: needs a value; repfs -h lists the options", argv[optind - 1]);
	if (optopt > 0 && optopt < 256)
		return err_set(e, ERR_USAGE, "unknown option -%c; repfs -h lists them", optopt);
	if (optopt)
		return err_set(e, ERR_USAGE, "%.100s: takes no value; repfs -h lists the options", argv[optind - 1]);
	return err_set(e, ERR_USAGE, "unknown option %.100s; repfs -h lists them", argv[optind - 1]);
}

static int command_line_read(struct parse *p, int argc, char **argv, struct err *e)
{
	bool helper = called_as_helper(argv[0]);
	int index = 0, r = 0, c;
	optind = 0; /* begin anew, whoever has used getopt before */
	opterr = 0;
	while (r == 0 &&
	       (c = getopt_long(argc, argv, helper ? ":fsnvN:t:o:hV" : ":fdo:hV", long_options, &index)) != -1) {
		switch (c) {
		case 'f':
			if (helper)
				p->o.fake = true;
			else
				r = option_apply(p, "foreground", NULL, ORIGIN_COMMAND, e);
			break;
		case 'd':
			r = option_apply(p, "debug", NULL, ORIGIN_COMMAND, e);
			break;
		case 'o':
			r = options_apply_list(p, optarg, e);
			break;
		case 'h':
			p->o.help = true;
			return 0;
		case 'V':
			p->o.version = true;
			return 0;
		case 's':
		case 'n':
		case 'v':
		case 'N':
		case 't':
			break;
		case LONG_CHECK:
			p->o.check_config = true;
			break;
		case LONG_KEY:
			r = option_apply(p, long_options[index].name, optarg, ORIGIN_COMMAND, e);
			break;
		default:
			r = option_wrong(c, argv, e);
		}
	}
	return r;
}

static int positional_read(struct parse *p, int argc, char **argv, struct err *e)
{
	int n = argc - optind;
	if (n == 0 && p->o.check_config)
		return 0;
	if (n < 2)
		return err_set(e, ERR_USAGE, "%s is missing: repfs STORE MOUNTPOINT [-o OPTIONS]; repfs -h tells more",
			       n == 0 ? "STORE" : "MOUNTPOINT");
	if (n > 2)
		return err_set(e, ERR_USAGE, "'%.100s' is one argument too many: repfs STORE MOUNTPOINT [-o OPTIONS]",
			       argv[optind + 2]);
	if (!*argv[optind] || !*argv[optind + 1])
		return err_set(e, ERR_USAGE, "%s is an empty text: give a folder's path",
			       *argv[optind] ? "MOUNTPOINT" : "STORE");
	int r = text_replace(&p->o.store, argv[optind], e);
	return r < 0 ? r : text_replace(&p->o.mountpoint, argv[optind + 1], e);
}

/* What only the whole shows. */
static int options_finish(struct options *o, struct err *e)
{
	if (o->mount.allow_other && o->mount.allow_root)
		return err_set(e, ERR_USAGE, "allow_other and allow_root exclude each other; keep one");
	if (o->debug) {
		o->foreground = true;
		o->log_level = LOG_LEVEL_DEBUG;
	}
	if (!o->log_given)
		o->log_target = o->foreground ? LOG_STDERR : LOG_SYSLOG;
	o->mount.fsname = o->fsname ? o->fsname : o->store;
	o->mount.kernel = o->kernel_options;
	return 0;
}

int options_parse(int argc, char **argv, struct options *ret, struct err *e)
{
	struct parse p = {0};
	p.o.durability = -1;
	p.o.uid = geteuid();
	p.o.gid = getegid();
	p.o.log_level = LOG_LEVEL_INFO;
	p.o.log_format = LOG_TEXT;

	int r = command_line_read(&p, argc, argv, e);
	if (r == 0 && !p.o.help && !p.o.version) {
		r = positional_read(&p, argc, argv, e);
		if (r == 0 && p.o.config)
			r = config_read(&p, e);
		if (r == 0)
			r = options_finish(&p.o, e);
	}
	if (r < 0) {
		options_free(&p.o);
		return r;
	}
	*ret = p.o;
	return 0;
}

void options_free(struct options *o)
{
	if (!o)
		return;
	free(o->store);
	free(o->mountpoint);
	free(o->listen);
	free(o->config);
	free(o->fsname);
	free(o->kernel_options);
	*o = (struct options){0};
}

void options_help(FILE *f)
{
	(void)fputs("Usage: repfs STORE MOUNTPOINT [-o OPTIONS]\n"
		    "Shows the volumes of STORE as files under MOUNTPOINT and replicates them to their peers.\n"
		    "STORE is made if it does not exist; MOUNTPOINT must be an empty folder.\n"
		    "\n"
		    "  -f                           stay in the foreground\n"
		    "  -d                           as -f, with debug messages\n"
		    "      --listen ADDR:PORT       accept peers there (127.0.0.1:0 picks a port)\n"
		    "      --insecure               allow peers that are not on loopback, without TLS\n"
		    "      --tls off                the only mode of this version\n"
		    "      --threads N              worker threads (default: by the number of processors)\n"
		    "      --durability power|process\n"
		    "                               what a new store's metadata survives (default: power)\n"
		    "      --config FILE            read options from FILE (INI; every option is a key there)\n"
		    "      --log stderr|journal|syslog\n"
		    "                               default: stderr in the foreground, else syslog\n"
		    "      --log-level error|warn|info|debug\n"
		    "      --log-format text|json\n"
		    "      --check-config           check the options and end\n"
		    "  -V, --version                print the version and end\n"
		    "  -h, --help                   print this and end\n"
		    "\n"
		    "OPTIONS, separated by commas: any of the above as KEY=VALUE, and\n"
		    "  allow_other, allow_root      let other users (root) in; file modes are checked\n"
		    "  uid=N, gid=N, umask=OCTAL    owner and mode of the files\n"
		    "  ro                           read-only\n"
		    "  guard                        make the folder below immutable while mounted\n"
		    "  fsname=TEXT                  source in the mount table\n"
		    "  max_background=N             requests the kernel keeps in flight (default 256)\n"
		    "  fuse_debug                   print every FUSE request\n"
		    "  noexec, sync, dirsync, noatime, context=... and what fstab needs\n",
		    f);
}
