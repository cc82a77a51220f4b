/* The command line: what the parser takes, what it refuses, and with which words. */
#include "cli/cli.h"

#include <criterion/criterion.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WORDS_MAX 80

static int parse(struct cli *c, struct err *e, const char *line)
{
	static char text[4096];
	static char *argv[WORDS_MAX + 1];
	int argc = 0;
	cr_assert_lt(strlen(line), sizeof(text));
	(void)strcpy(text, line);
	argv[argc++] = (char *)(uintptr_t) "repctl";
	for (char *p = strtok(text, " "); p && argc < WORDS_MAX; p = strtok(NULL, " "))
		argv[argc++] = p;
	argv[argc] = NULL;
	memset(c, 0xa5, sizeof(*c));
	memset(e, 0, sizeof(*e));
	return cli_parse(argc, argv, c, e);
}

static void refused(const char *line, const char *words)
{
	struct cli c;
	struct err e;
	cr_assert_eq(parse(&c, &e, line), -ERR_USAGE, "%s", line);
	cr_assert_eq(e.code, ERR_USAGE, "%s", line);
	cr_assert(strstr(e.text, words), "%s: '%s' lacks '%s'", line, e.text, words);
}

Test(options, verb_and_arguments)
{
	struct cli c;
	struct err e;
	cr_assert_eq(parse(&c, &e, "import vm1 disk.img --group g --format raw"), 0);
	cr_assert_str_eq(c.verb->name, "import");
	cr_assert_eq(c.n_args, 2);
	cr_assert_str_eq(c.args[0], "vm1");
	cr_assert_str_eq(c.args[1], "disk.img");
	cr_assert_str_eq(cli_value(&c, "group"), "g");
	cr_assert_str_eq(cli_value(&c, "format"), "raw");
	cr_assert(!cli_has(&c, "apply"));
	cr_assert_null(cli_value(&c, "apply"));
	cr_assert(!c.json && !c.yes && !c.quiet && !c.verbose && !c.help && !c.version && !c.no_progress);
	cr_assert_null(c.store);
	cr_assert_null(c.socket);
	cr_assert_eq(c.timeout_ms, 0);
	cr_assert_eq(c.color, COLOR_AUTO);
}

Test(options, global_options_stand_before_or_behind_the_verb)
{
	static const char *const lines[] = {
	    "--json -q -y -v --no-progress --color never --store /s -S /x --timeout 1.5 failover vm1 --wait",
	    "failover --json -q -y -v vm1 --no-progress --color=never --wait --store=/s -S/x --timeout=1.5",
	    "failover vm1 --wait -qyvS /x --json --no-progress --color never --store /s --timeout 1.5",
	    "-qyv failover --wait --socket=/x --json --no-progress --color never --store /s --timeout 1.5 -- vm1",
	};
	for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
		struct cli c;
		struct err e;
		cr_assert_eq(parse(&c, &e, lines[i]), 0, "%s: %s", lines[i], e.text);
		cr_assert_str_eq(c.verb->name, "failover");
		cr_assert(c.json && c.quiet && c.yes && c.verbose && c.no_progress, "%s", lines[i]);
		cr_assert_eq(c.color, COLOR_NEVER);
		cr_assert_str_eq(c.store, "/s");
		cr_assert_str_eq(c.socket, "/x");
		cr_assert_eq(c.timeout_ms, 1500);
		cr_assert_eq(c.n_args, 1);
		cr_assert_str_eq(c.args[0], "vm1");
		cr_assert(cli_has(&c, "wait"));
	}
}

Test(options, color_values)
{
	struct cli c;
	struct err e;
	cr_assert_eq(parse(&c, &e, "--color=always ping"), 0);
	cr_assert_eq(c.color, COLOR_ALWAYS);
	cr_assert_eq(parse(&c, &e, "--color=auto ping"), 0);
	cr_assert_eq(c.color, COLOR_AUTO);
	cr_assert_eq(parse(&c, &e, "--color=never ping"), 0);
	cr_assert_eq(c.color, COLOR_NEVER);
	refused("--color=sometimes ping", "auto|always|never");
}

Test(options, last_value_wins_and_repeated_ones_are_kept)
{
	struct cli c;
	struct err e;
	cr_assert_eq(parse(&c, &e, "protect g --peer a:1 --peer b:2 --id x=1 --id y=2"), 0);
	cr_assert_str_eq(cli_value(&c, "peer"), "b:2");
	unsigned ids = 0;
	for (unsigned i = 0; i < c.n_given; i++)
		ids += strcmp(c.given[i].opt->name, "id") == 0;
	cr_assert_eq(ids, 2);
}

Test(options, double_dash_ends_them)
{
	struct cli c;
	struct err e;
	cr_assert_eq(parse(&c, &e, "import vm1 -- --odd-file"), 0);
	cr_assert_str_eq(c.args[1], "--odd-file");
	cr_assert_eq(parse(&c, &e, "import vm1 -"), 0);
	cr_assert_str_eq(c.args[1], "-");
}

Test(options, what_is_refused)
{
	refused("", "a verb is missing");
	refused("--json", "a verb is missing");
	refused("frobnicate", "no such verb");
	refused("statuses", "no such verb");
	refused("failover", "argument is missing");
	refused("import vm1", "NAME FILE");
	refused("failover vm1 vm2", "'vm2' is one argument too many");
	refused("ping now", "one argument too many");
	refused("failover vm1 --size 3", "unknown option --size");
	refused("--wait failover vm1", "unknown option --wait");
	refused("failover vm1 --wai", "unknown option --wai");
	refused("failover vm1 -x", "unknown option -x");
	refused("failover vm1 --wait=yes", "takes no value");
	refused("failover vm1 --to", "needs a value");
	refused("failover vm1 --to=", "empty");
	refused("ping -S", "needs a value");
	refused("wait vm1 --for=sync", "running|in-sync|done");
	refused("protect vm1 --peer a:1 --protocol D", "A|B|C|F");
	refused("import vm1 f --format vmdk", "raw|zst|qcow|qcow2");
	refused("ping --timeout 0", "above 0");
	refused("ping --timeout -1", "above 0");
	refused("ping --timeout 1e3", "above 0");
	refused("ping --timeout soon", "soon");
}

Test(options, more_arguments_than_there_is_room_for)
{
	char line[1024] = "set vm1";
	for (int i = 0; i < CLI_ARGS_MAX; i++)
		(void)strcat(line, " a=1");
	refused(line, "too many");
	char opts[4096] = "protect vm1";
	for (int i = 0; i <= CLI_GIVEN_MAX; i++)
		(void)strcat(opts, " --wait");
	refused(opts, "more than");
}

Test(options, help_version_and_later_verbs_end_the_parsing)
{
	struct cli c;
	struct err e;
	cr_assert_eq(parse(&c, &e, "failover --help"), 0);
	cr_assert(c.help);
	cr_assert_str_eq(c.verb->name, "failover");
	cr_assert_eq(parse(&c, &e, "-h"), 0);
	cr_assert(c.help);
	cr_assert_null(c.verb);
	cr_assert_eq(parse(&c, &e, "-V"), 0);
	cr_assert(c.version);
	cr_assert_eq(parse(&c, &e, "events vm1 3 --speed=3 -Z"), 0);
	cr_assert_null(c.verb->run);
}

Test(options, a_value_that_may_be_left_out_is_given_with_an_equals_sign_only)
{
	struct cli c;
	struct err e;

	cr_assert_eq(parse(&c, &e, "verify --repair vm1"), 0);
	cr_assert(cli_has(&c, "repair"));
	cr_assert_null(cli_value(&c, "repair"));
	cr_assert_str_eq(c.args[0], "vm1");
	cr_assert_eq(parse(&c, &e, "verify --repair=from-peer vm1"), 0);
	cr_assert_str_eq(cli_value(&c, "repair"), "from-peer");
	cr_assert_eq(parse(&c, &e, "verify --repair=to-peer vm1"), -ERR_USAGE);
	cr_assert_eq(parse(&c, &e, "verify --repair= vm1"), -ERR_USAGE);
	cr_assert_eq(parse(&c, &e, "verify --repair from-peer vm1"), -ERR_USAGE);
}

Test(options, every_verb_of_the_contract_is_known)
{
	static const char *const now[] = {"create",  "import", "export",      "delete",	    "list",	  "show",
					  "protect", "start",  "stop",	      "checkpoint", "failover",	  "error",
					  "status",  "wait",   "checkpoints", "extents",    "discard",	  "set",
					  "get",     "ping",   "version",     "shutdown",   "completion", "check",
					  "pause",   "resume", "failback",    "unprotect",  "resolve",	  "diverged",
					  "resync",  "read",   "write",	      "report",	    "switchover", "backup",
					  "jobs",    "job",    "clone",	      "verify",	    "resize"};
	static const char *const later[] = {"events", "metrics", "key"};
	for (size_t i = 0; i < sizeof(now) / sizeof(now[0]); i++) {
		const struct cli_verb *v = cli_find_verb(now[i]);
		cr_assert(v && v->run, "%s", now[i]);
	}
	for (size_t i = 0; i < sizeof(later) / sizeof(later[0]); i++) {
		const struct cli_verb *v = cli_find_verb(later[i]);
		cr_assert(v && !v->run, "%s", later[i]);
	}
}

Test(options, tables_are_sound)
{
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		cr_assert_eq(cli_find_verb(v->name), v, "%s is there twice", v->name);
		cr_assert(v->help && v->args, "%s", v->name);
		cr_assert_leq(v->max_args, CLI_ARGS_MAX);
		for (const struct cli_opt *o = v->opts; o && o->name; o++) {
			cr_assert(o->help, "%s --%s", v->name, o->name);
			for (const struct cli_opt *g = cli_global_opts; g->name; g++)
				cr_assert(strcmp(g->name, o->name) != 0 && (!o->letter || o->letter != g->letter),
					  "%s --%s hides a global option", v->name, o->name);
		}
	}
}

Test(options, seconds)
{
	static const struct {
		const char *text;
		uint64_t ms;
	} good[] = {{"1", 1000},      {"0.5", 500},  {"2.25", 2250},
		    {".1", 100},      {"3.", 3000},  {"0.0001", 1},
		    {"1.0009", 1001}, {"007", 7000}, {"2592000", CLI_TIMEOUT_MAX_MS}};
	static const char *const bad[] = {"",	   ".",	   "0",	  "0.0",	 "-1",
					  "+1",	   " 1",   "1 ",  "1s",		 "1,5",
					  "1.2.3", "0x10", "1e3", "2592000.001", "99999999999999999999999"};
	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		uint64_t ms = 77;
		cr_assert_eq(cli_parse_seconds(good[i].text, &ms, NULL), 0, "%s", good[i].text);
		cr_assert_eq(ms, good[i].ms, "%s: %llu", good[i].text, (unsigned long long)ms);
	}
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		uint64_t ms = 77;
		cr_assert_eq(cli_parse_seconds(bad[i], &ms, NULL), -ERR_USAGE, "'%s'", bad[i]);
		cr_assert_eq(ms, 77);
	}
}

Test(options, numbers)
{
	uint64_t v = 5;
	cr_assert(cli_parse_u64("0", 0, 10, &v) && v == 0);
	cr_assert(cli_parse_u64("18446744073709551615", 0, UINT64_MAX, &v) && v == UINT64_MAX);
	v = 5;
	cr_assert(!cli_parse_u64("18446744073709551616", 0, UINT64_MAX, &v));
	cr_assert(!cli_parse_u64("99999999999999999999", 0, UINT64_MAX, &v));
	cr_assert(!cli_parse_u64("", 0, 10, &v));
	cr_assert(!cli_parse_u64("-1", 0, 10, &v));
	cr_assert(!cli_parse_u64("1 ", 0, 10, &v));
	cr_assert(!cli_parse_u64("11", 0, 10, &v));
	cr_assert(!cli_parse_u64("0", 1, 10, &v));
	cr_assert_eq(v, 5);
}

Test(options, name_at_checkpoint)
{
	char name[NAME_SIZE], longest[NAME_SIZE + 1];
	uint64_t n;
	cr_assert_eq(cli_parse_at("vm1", name, &n, NULL), 0);
	cr_assert_str_eq(name, "vm1");
	cr_assert_eq(n, 0);
	cr_assert_eq(cli_parse_at("vm-1.x_y@41", name, &n, NULL), 0);
	cr_assert_str_eq(name, "vm-1.x_y");
	cr_assert_eq(n, 41);
	memset(longest, 'a', sizeof(longest));
	longest[NAME_MAX_LEN] = '\0';
	cr_assert_eq(cli_parse_at(longest, name, &n, NULL), 0);
	cr_assert_str_eq(name, longest);

	memset(name, 0x5a, sizeof(name));
	n = 99;
	longest[NAME_MAX_LEN] = 'a';
	longest[NAME_SIZE] = '\0';
	static const char *const bad[] = {"",	     "@1",  "vm1@", "vm1@0", "vm1@x", "vm1@-1",
					  "vm1@1@2", "-vm", ".vm",  "v/m",   "v m"};
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		cr_assert_eq(cli_parse_at(bad[i], name, &n, NULL), -ERR_USAGE, "'%s'", bad[i]);
	cr_assert_eq(cli_parse_at(longest, name, &n, NULL), -ERR_USAGE);
	for (size_t i = 0; i < sizeof(name); i++)
		cr_assert_eq(name[i], 0x5a);
	cr_assert_eq(n, 99);
}

Test(options, layers_of_extents)
{
	static const struct {
		const char *text, *name, *layer;
		uint64_t ckpt;
	} good[] = {
	    {"overlays/vm1/active", "vm1", "active", 0},
	    {"/mnt/repfs/overlays/vm1/hidden", "vm1", "hidden", 0},
	    {"./overlays/overlays/active", "overlays", "active", 0},
	    {"vm1@7", "vm1", "", 7},
	    {"checkpoints/vm1/12", "vm1", "", 12},
	    {"/m/checkpoints/vm1/12", "vm1", "", 12},
	};
	static const char *const bad[] = {"vm1",
					  "overlays/vm1",
					  "overlays/vm1/other",
					  "vm1/active",
					  "overlays//active",
					  "x/vm1/active",
					  "overlays/vm1/active/",
					  "checkpoints/vm1/latest",
					  "checkpoints/vm1/0",
					  "vm1@0",
					  "/",
					  "overlays/-a/active",
					  "xoverlays/vm1/active"};
	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
		char name[NAME_SIZE], layer[16];
		uint64_t ckpt = 1;
		cr_assert_eq(cli_parse_layer(good[i].text, name, layer, &ckpt, NULL), 0, "%s", good[i].text);
		cr_assert_str_eq(name, good[i].name);
		cr_assert_str_eq(layer, good[i].layer);
		cr_assert_eq(ckpt, good[i].ckpt);
	}
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		char name[NAME_SIZE], layer[16];
		uint64_t ckpt;
		struct err e = {0};
		cr_assert_eq(cli_parse_layer(bad[i], name, layer, &ckpt, &e), -ERR_USAGE, "'%s'", bad[i]);
		cr_assert_neq(e.text[0], '\0');
	}
}

Test(options, absolute_paths)
{
	char buf[CLI_PATH_MAX], cwd[PATH_MAX], want[PATH_MAX + 16], small[8];
	cr_assert_not_null(getcwd(cwd, sizeof(cwd)));
	cr_assert_eq(cli_absolute("/a/b", buf, sizeof(buf), NULL), 0);
	cr_assert_str_eq(buf, "/a/b");
	(void)snprintf(want, sizeof(want), "%s/x y", cwd);
	cr_assert_eq(cli_absolute("x y", buf, sizeof(buf), NULL), 0);
	cr_assert_str_eq(buf, want);
	cr_assert_eq(chdir("/"), 0);
	cr_assert_eq(cli_absolute("tmp", buf, sizeof(buf), NULL), 0);
	cr_assert_str_eq(buf, "/tmp");
	cr_assert_eq(cli_absolute("/1234567", small, sizeof(small), NULL), -ERR_LIMIT);
	cr_assert_eq(cli_absolute("/123456", small, sizeof(small), NULL), 0);
}

Test(options, where_store_and_socket_are)
{
	struct cli c;
	struct err e;
	cr_assert_eq(unsetenv("REPFS_STORE"), 0);
	cr_assert_eq(parse(&c, &e, "ping"), 0);
	cr_assert_eq(cli_resolve(&c, &e), 0);
	cr_assert_str_eq(c.store_path, "/var/lib/repfs");
	cr_assert_str_eq(c.socket_path, "/var/lib/repfs/control.sock");
	cr_assert(c.may_work_offline);

	cr_assert_eq(setenv("REPFS_STORE", "/srv/r", 1), 0);
	cr_assert_eq(parse(&c, &e, "ping"), 0);
	cr_assert_eq(cli_resolve(&c, &e), 0);
	cr_assert_str_eq(c.socket_path, "/srv/r/control.sock");

	cr_assert_eq(parse(&c, &e, "--store /other ping"), 0);
	cr_assert_eq(cli_resolve(&c, &e), 0);
	cr_assert_str_eq(c.socket_path, "/other/control.sock");

	/* A socket alone says nothing of the store: never fall back to another one's files. */
	cr_assert_eq(parse(&c, &e, "-S /run/x.sock ping"), 0);
	cr_assert_eq(cli_resolve(&c, &e), 0);
	cr_assert_str_eq(c.socket_path, "/run/x.sock");
	cr_assert(!c.may_work_offline);
	cr_assert_eq(parse(&c, &e, "-S /run/x.sock --store /other ping"), 0);
	cr_assert_eq(cli_resolve(&c, &e), 0);
	cr_assert(c.may_work_offline);
	cr_assert_str_eq(c.store_path, "/other");
}

static char *printed(void (*fn)(FILE *f, const void *arg), const void *arg)
{
	char *text = NULL;
	size_t size = 0;
	FILE *f = open_memstream(&text, &size);
	cr_assert_not_null(f);
	fn(f, arg);
	cr_assert_eq(fclose(f), 0);
	return text;
}

static void print_help(FILE *f, const void *arg)
{
	(void)arg;
	cli_help(f);
}

static void print_verb(FILE *f, const void *arg)
{
	cli_help_verb(f, arg);
}

static void print_completion(FILE *f, const void *arg)
{
	cr_assert_eq(cli_completion(f, arg), 0);
}

Test(options, help_lists_later_verbs_apart)
{
	char *text = printed(print_help, NULL);
	const char *later = strstr(text, "later release");
	cr_assert_not_null(later);
	for (const struct cli_verb *v = cli_verbs; v->name; v++) {
		char word[64];
		(void)snprintf(word, sizeof(word), v->run ? "\n  %s " : " %s", v->name);
		const char *at = strstr(v->run ? text : later, word);
		cr_assert(at && (!v->run || at < later), "%s", v->name);
	}
	free(text);
	text = printed(print_verb, cli_find_verb("failover"));
	cr_assert_eq(
	    strncmp(text, "usage: repctl failover GROUP [--to latest|N] [--force] [--discard-active] [--wait]\n", 83),
	    0, "%s", text);
	free(text);
}

Test(options, completions_know_every_verb)
{
	static const char *const shells[] = {"bash", "zsh", "fish"};
	for (size_t i = 0; i < 3; i++) {
		char *text = printed(print_completion, shells[i]);
		for (const struct cli_verb *v = cli_verbs; v->name; v++)
			cr_assert(!v->run || strstr(text, v->name), "%s: %s", shells[i], v->name);
		cr_assert(strstr(text, "discard-active"), "%s", shells[i]);
		cr_assert(!strstr(text, "metrics"), "%s", shells[i]);
		free(text);
	}
	cr_assert_eq(cli_completion(stdout, "tcsh"), -ERR_USAGE);
}
