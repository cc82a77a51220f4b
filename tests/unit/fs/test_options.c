/* fs/options: the command line, -o, the configuration file, and how they rank. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fs/options.h"
#include "image/volume.h"

#define ARGS_MAX 24

static struct options o;
static struct err e;

/* Words separated by single blanks; the first is the program. */
static int parse(const char *line)
{
	static char copy[16384];
	char *argv[ARGS_MAX + 1];
	int argc = 0;
	snprintf(copy, sizeof(copy), "%s", line);
	char *save = NULL;
	for (char *w = strtok_r(copy, " ", &save); w; w = strtok_r(NULL, " ", &save)) {
		cr_assert_lt(argc, ARGS_MAX);
		argv[argc++] = w;
	}
	argv[argc] = NULL;
	memset(&o, 0xa5, sizeof(o));
	memset(&e, 0, sizeof(e));
	return options_parse(argc, argv, &o, &e);
}

static void parse_ok(const char *line)
{
	cr_assert_eq(parse(line), 0, "%s: %s", line, e.text);
}

/* Refused as a usage error whose text has `says`, the result untouched. */
static void parse_bad(const char *line, const char *says)
{
	struct options poison;
	memset(&poison, 0xa5, sizeof(poison));
	cr_assert_eq(parse(line), -ERR_USAGE, "%s", line);
	cr_assert_eq(err_exit(e.code), 2);
	cr_assert(strstr(e.text, says), "%s: '%s' does not say '%s'", line, e.text, says);
	cr_assert_eq(memcmp(&o, &poison, sizeof(o)), 0, "%s: the result was touched", line);
}

static char file_path[64];

static void file_make(const char *text)
{
	strcpy(file_path, "/tmp/repfs-options-XXXXXX");
	int fd = mkstemp(file_path);
	cr_assert_geq(fd, 0);
	cr_assert_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
	close(fd);
}

static void parse_file_ok(const char *text, const char *more)
{
	char line[512];
	file_make(text);
	snprintf(line, sizeof(line), "repfs S M --config %s %s", file_path, more);
	int r = parse(line);
	unlink(file_path);
	cr_assert_eq(r, 0, "%s: %s", text, e.text);
}

static void parse_file_bad(const char *text, const char *more, const char *says)
{
	char line[512];
	file_make(text);
	snprintf(line, sizeof(line), "repfs S M --config %s %s", file_path, more);
	int r = parse(line);
	unlink(file_path);
	cr_assert_eq(r, -ERR_USAGE, "%s", text);
	cr_assert(strstr(e.text, says), "'%s' does not say '%s'", e.text, says);
}

Test(options, defaults)
{
	parse_ok("repfs /store /mnt");
	cr_assert_str_eq(o.store, "/store");
	cr_assert_str_eq(o.mountpoint, "/mnt");
	cr_assert_null(o.listen);
	cr_assert_null(o.config);
	cr_assert_not(o.foreground || o.debug || o.insecure || o.check_config || o.version || o.help || o.fake);
	cr_assert_eq(o.threads, 0);
	cr_assert_eq(o.durability, -1);
	cr_assert_eq(o.log_target, LOG_SYSLOG);
	cr_assert_eq(o.log_level, LOG_LEVEL_INFO);
	cr_assert_eq(o.log_format, LOG_TEXT);
	cr_assert_eq(o.uid, geteuid());
	cr_assert_eq(o.gid, getegid());
	cr_assert_not(o.umask_given);
	cr_assert_eq(o.mount.flags, 0);
	cr_assert_str_eq(o.mount.fsname, "/store");
	cr_assert_null(o.mount.kernel);
	options_free(&o);
	options_free(NULL);
}

Test(options, every_long_option)
{
	parse_ok("repfs S M -f --listen 127.0.0.1:0 --insecure --threads 7 --durability process --log=journal "
		 "--log-level warn --log-format json --tls=off");
	cr_assert(o.foreground);
	cr_assert(o.insecure);
	cr_assert_str_eq(o.listen, "127.0.0.1:0");
	cr_assert_eq(o.threads, 7);
	cr_assert_eq(o.durability, DURABILITY_PROCESS);
	cr_assert_eq(o.log_target, LOG_JOURNAL);
	cr_assert_eq(o.log_level, LOG_LEVEL_WARN);
	cr_assert_eq(o.log_format, LOG_JSON);
	options_free(&o);
}

Test(options, foreground_logs_to_stderr_unless_told)
{
	parse_ok("repfs -f S M");
	cr_assert_eq(o.log_target, LOG_STDERR);
	options_free(&o);
	parse_ok("repfs -f S M --log=syslog");
	cr_assert_eq(o.log_target, LOG_SYSLOG);
	options_free(&o);
	parse_ok("repfs S M -d");
	cr_assert(o.foreground);
	cr_assert_eq(o.log_level, LOG_LEVEL_DEBUG);
	cr_assert_eq(o.log_target, LOG_STDERR);
	options_free(&o);
}

Test(options, dash_o_takes_fuse_options_and_the_same_keys)
{
	parse_ok("repfs S M -o allow_other,ro,uid=107,gid=108,umask=027,fsname=vms,max_background=64,guard "
		 "-o listen=127.0.0.1:7790,threads=3,durability=power,insecure,log_level=error,log-format=text");
	cr_assert(o.mount.allow_other);
	cr_assert(o.mount.guard);
	cr_assert_eq(o.mount.flags, MS_RDONLY);
	cr_assert_eq(o.uid, 107);
	cr_assert_eq(o.gid, 108);
	cr_assert(o.umask_given);
	cr_assert_eq(o.umask, 027);
	cr_assert_str_eq(o.mount.fsname, "vms");
	cr_assert_eq(o.mount.background, 64);
	cr_assert_str_eq(o.listen, "127.0.0.1:7790");
	cr_assert_eq(o.threads, 3);
	cr_assert_eq(o.durability, DURABILITY_POWER);
	cr_assert(o.insecure);
	cr_assert_eq(o.log_level, LOG_LEVEL_ERROR);
	options_free(&o);
}

Test(options, what_mount_and_fstab_pass)
{
	parse_ok("repfs S M -o rw,suid,dev,noexec,nosuid,nodev,_netdev,user,user=joe,noauto,nofail,defaults,relatime,"
		 "x-systemd.automount,x-initrd.mount,comment=abc,sync,context=\"a:b\"");
	cr_assert_eq(o.mount.flags, MS_NOEXEC | MS_SYNCHRONOUS);
	cr_assert_str_eq(o.mount.kernel, "context=\"a:b\"");
	options_free(&o);
	parse_ok("/sbin/mount.repfs S M -f -n -v -s -o ro,rw");
	cr_assert(o.fake);
	cr_assert_not(o.foreground);
	cr_assert_eq(o.mount.flags, 0, "the last one wins");
	options_free(&o);
}

Test(options, dash_o_commas_within_a_value)
{
	parse_ok("repfs S M -o fsname=a\\,b\\\\c,ro");
	cr_assert_str_eq(o.fsname, "a,b\\c");
	cr_assert_eq(o.mount.flags, MS_RDONLY);
	options_free(&o);
	parse_ok("repfs S M -o ,,ro,");
	cr_assert_eq(o.mount.flags, MS_RDONLY);
	options_free(&o);
}

Test(options, options_may_stand_anywhere)
{
	parse_ok("repfs -o ro S --threads=2 M -f");
	cr_assert_str_eq(o.store, "S");
	cr_assert_str_eq(o.mountpoint, "M");
	cr_assert_eq(o.threads, 2);
	cr_assert(o.foreground);
	options_free(&o);
}

Test(options, help_and_version_need_nothing_else)
{
	parse_ok("repfs -h");
	cr_assert(o.help);
	options_free(&o);
	parse_ok("repfs -V");
	cr_assert(o.version);
	options_free(&o);
	parse_ok("repfs --check-config");
	cr_assert(o.check_config);
	cr_assert_null(o.store);
	options_free(&o);
}

Test(options, wrong_lines_are_refused)
{
	parse_bad("repfs", "STORE is missing");
	parse_bad("repfs S", "MOUNTPOINT is missing");
	parse_bad("repfs S M X", "'X' is one argument too many");
	parse_bad("repfs S M --frobnicate", "--frobnicate");
	parse_bad("repfs S M -x", "-x");
	parse_bad("repfs S M -o frobnicate", "'frobnicate'");
	parse_bad("repfs S M -o frobnicate=1", "'frobnicate'");
	parse_bad("repfs S M -o nonempty", "'nonempty'");
	parse_bad("repfs S M --threads", "--threads");
	parse_bad("repfs S M --insecure=yes", "--insecure=yes");
	parse_bad("repfs S M -o", "-o");
	parse_bad("repfs S M --threads 0", "1 to 64");
	parse_bad("repfs S M --threads 65", "1 to 64");
	parse_bad("repfs S M --threads -1", "1 to 64");
	parse_bad("repfs S M --threads 4x", "1 to 64");
	parse_bad("repfs S M --threads 99999999999999999999999", "1 to 64");
	parse_bad("repfs S M -o threads", "needs a value");
	parse_bad("repfs S M -o threads=", "needs a value");
	parse_bad("repfs S M -o umask=8", "octal");
	parse_bad("repfs S M -o umask=1000", "octal");
	parse_bad("repfs S M -o uid=root", "number");
	parse_bad("repfs S M -o uid=4294967295", "number");
	parse_bad("repfs S M -o ro=maybe", "yes or no");
	parse_bad("repfs S M --durability paper", "power|process");
	parse_bad("repfs S M --durability power|process", "power|process");
	parse_bad("repfs S M --log=file", "stderr|journal|syslog");
	parse_bad("repfs S M --log-level=loud", "error|warn|info|debug");
	parse_bad("repfs S M --log-format=xml", "text|json");
	parse_bad("repfs S M --listen nonsense", "nonsense");
	parse_bad("repfs S M -o allow_other,allow_root", "exclude");
	parse_bad("repfs S M --config /nonexistent/x.conf", "/nonexistent/x.conf");
}

Test(options, of_a_later_version_refused_by_name)
{
	parse_bad("repfs S M --tls=on", "tls=on");
	parse_bad("repfs S M --tls=require", "tls=require");
	parse_bad("repfs S M -o tls=on", "tls=on");
	parse_bad("repfs S M --tls=perhaps", "off|on|require");
	parse_bad("repfs S M --tls-psk /k", "tls-psk");
	parse_bad("repfs S M -o accept=a:b", "accept");
	parse_file_bad("accept = a:*\n", "", "accept");
	parse_file_bad("tls_psk = /k\n", "", "tls-psk");
	parse_file_bad("pre_checkpoint = /bin/true\n", "", "pre-checkpoint");
}

Test(options, the_file_knows_every_option)
{
	parse_file_ok("# comment\n; another\n\n[repfs]\nlisten = 127.0.0.1:7790\nthreads=5\ninsecure = yes\n"
		      "durability = process\nlog = syslog\nlog_level = debug\nlog-format = json\ntls = off\n"
		      "allow_other = yes\nuid = 7\numask = 077\nro = no\nforeground = no\n",
		      "");
	cr_assert_str_eq(o.listen, "127.0.0.1:7790");
	cr_assert_eq(o.threads, 5);
	cr_assert(o.insecure);
	cr_assert_eq(o.durability, DURABILITY_PROCESS);
	cr_assert_eq(o.log_target, LOG_SYSLOG);
	cr_assert_eq(o.log_level, LOG_LEVEL_DEBUG);
	cr_assert_eq(o.log_format, LOG_JSON);
	cr_assert(o.mount.allow_other);
	cr_assert_eq(o.uid, 7);
	cr_assert_eq(o.umask, 077);
	cr_assert_eq(o.mount.flags, 0);
	options_free(&o);
	parse_file_ok("threads = 5", "");
	cr_assert_eq(o.threads, 5, "no section, no newline at the end");
	options_free(&o);
}

Test(options, the_command_line_wins)
{
	parse_file_ok("threads = 5\ninsecure = yes\nlisten = 127.0.0.1:1\nlog = syslog\n",
		      "--threads 6 -o insecure=no,log=stderr");
	cr_assert_eq(o.threads, 6);
	cr_assert_not(o.insecure);
	cr_assert_str_eq(o.listen, "127.0.0.1:1");
	cr_assert_eq(o.log_target, LOG_STDERR);
	options_free(&o);
}

Test(options, wrong_files_are_refused_with_their_line)
{
	char text[1024];
	parse_file_bad("threads = 5\nfrobnicate = 1\n", "", ":2: unknown option 'frobnicate'");
	parse_file_bad("\n\nthreads = many\n", "", ":3: threads=many");
	parse_file_bad("threads = 5\nthreads = 6\n", "", ":2: threads: stands there twice");
	parse_file_bad("[net]\nlisten = 127.0.0.1:1\n", "", ":2: section [net]");
	parse_file_bad("threads = 5\nwhat is this\n", "", ":2: expected KEY = VALUE");
	parse_file_bad("[repfs\nthreads = 5\n", "", ":1: expected KEY = VALUE");
	parse_file_bad("threads = 5\n  listen = 127.0.0.1:1\n", "", ":2: the line begins with white space");
	parse_file_bad("config = /other\n", "", "another one");
	parse_file_bad("x-systemd.automount = yes\n", "", "unknown option");
	parse_file_bad("threads = many\n", "--threads 3", ":1: threads=many");
	memset(text, 'a', sizeof(text));
	memcpy(text, "threads = 5\nfsname = ", 21);
	strcpy(text + 400, "\n");
	parse_file_bad(text, "", ":2: the line is too long");
	memset(text, 'a', sizeof(text));
	text[0] = '#';
	strcpy(text + 400, "\nthreads = 5\n");
	parse_file_bad(text, "", ":1: the line is too long");
}

Test(options, values_are_bounded)
{
	char line[OPTIONS_TEXT_MAX + 200];
	memcpy(line, "repfs S M -o fsname=", 20);
	memset(line + 20, 'a', OPTIONS_TEXT_MAX);
	line[20 + OPTIONS_TEXT_MAX] = '\0';
	parse_ok(line);
	cr_assert_eq(strlen(o.fsname), OPTIONS_TEXT_MAX);
	options_free(&o);
	memset(line + 20, 'a', OPTIONS_TEXT_MAX + 1);
	line[20 + OPTIONS_TEXT_MAX + 1] = '\0';
	parse_bad(line, "longer than");
}
