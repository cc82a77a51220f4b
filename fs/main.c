/* repfs: from the command line to a serving mount, and back.
 *
 * Up: options, the store and its groups (daemon_open), the mount, the control socket, and only then the parent process,
 * which has waited on a pipe, ends with 0. Whatever goes wrong before travels through that pipe: the parent prints the
 * text and ends with the code.
 * Down (SIGTERM, SIGINT, `repctl shutdown`, unmounted from outside): the mount first, so that nothing new comes in;
 * then the daemon answers what is parked and takes leave of its peers, while the connection to the kernel still carries
 * answers; then that, and at last the daemon's files. A second signal ends the process on the spot.
 */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/os/log.h"
#include "core/range.h"
#include "fs/daemon.h"
#include "fs/fuse_ops.h"
#include "fs/mount.h"
#include "fs/options.h"
#include "image/filecache.h"

#ifndef REPFS_VERSION
#define REPFS_VERSION "0.1.0"
#endif

#define ANSWERS_WAIT_MS 3000 /* for a guest's requests, at the end */

struct program {
	struct options o;
	char *store, *mountpoint; /* absolute, links resolved */
	int parent;		  /* pipe to the waiting parent, -1: none */
	int wake;		  /* eventfd: look at what happened */
	int signals;		  /* signalfd */
	struct mount *mount;
	struct fuse_ops *ops;
	struct daemon *daemon;
};

static int complain(const struct err *e)
{
	(void)fprintf(stderr, "repfs: %s\n", e->text);
	int code = err_exit(e->code);
	return code ? code : 1;
}

/* ---- paths ---------------------------------------------------------------------------------------------------------
 */

/* path's folder resolved, with path's last part behind it; that need not exist. NULL: errno. Returns owned. */
static char *path_resolve_new(const char *path)
{
	char folder[PATH_MAX], real[PATH_MAX], *whole;
	size_t len = strlen(path);
	while (len > 1 && path[len - 1] == '/')
		len--;
	if (len >= sizeof(folder)) {
		errno = ENAMETOOLONG;
		return NULL;
	}
	memcpy(folder, path, len);
	folder[len] = '\0';
	char *slash = strrchr(folder, '/');
	const char *base = path + (slash ? slash + 1 - folder : 0);
	int base_len = (int)(path + len - base);
	if (slash)
		slash[slash == folder] = '\0';
	if (base_len == 0 || strspn(base, "./") >= (size_t)base_len || !realpath(slash ? folder : ".", real))
		return NULL;
	return asprintf(&whole, "%s/%.*s", strcmp(real, "/") == 0 ? "" : real, base_len, base) < 0 ? NULL : whole;
}

/* Absolute with links resolved; the last part need not exist, or may be a mount whose daemon is gone. Returns owned. */
static int path_resolve(const char *path, char **ret, struct err *e)
{
	char *whole = realpath(path, NULL);
	if (!whole && (errno == ENOENT || errno == ENOTCONN || errno == ECONNABORTED))
		whole = path_resolve_new(path);
	if (!whole)
		return err_set(e, ERR_USAGE, "%s: %s%s", path, strerror(errno),
			       errno == ENOENT ? "; make its parent folder first" : "");
	*ret = whole;
	return 0;
}

static bool path_within(const char *path, const char *folder)
{
	size_t n = strlen(folder);
	if (strcmp(folder, "/") == 0)
		return true;
	return strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == '\0');
}

static int paths_check(struct program *p, struct err *e)
{
	int r = path_resolve(p->o.store, &p->store, e);
	if (r == 0)
		r = path_resolve(p->o.mountpoint, &p->mountpoint, e);
	if (r < 0)
		return r;
	if (path_within(p->store, p->mountpoint))
		return err_set(e, ERR_USAGE,
			       "STORE %s lies in MOUNTPOINT %s and would be hidden by it; choose another folder",
			       p->store, p->mountpoint);
	if (path_within(p->mountpoint, p->store))
		return err_set(e, ERR_USAGE, "MOUNTPOINT %s lies in STORE %s; choose a folder outside of it",
			       p->mountpoint, p->store);
	return 0;
}

/* ---- the waiting parent --------------------------------------------------------------------------------------------
 */

/* What the child says: one byte, its exit code or 0 for "serves", then the text of an error. */
_Noreturn static void parent_wait(int pipe_fd, pid_t child)
{
	char text[ERR_TEXT_MAX + 1];
	unsigned char code = 1;
	size_t len = 0;
	ssize_t n;
	int status = 0;

	while ((n = read(pipe_fd, &code, 1)) < 0 && errno == EINTR)
		;
	if (n == 1 && code == 0)
		_exit(0);
	if (n == 1) {
		while (len < ERR_TEXT_MAX) {
			n = read(pipe_fd, text + len, ERR_TEXT_MAX - len);
			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				break;
			len += (size_t)n;
		}
		text[len] = '\0';
		(void)fprintf(stderr, "repfs: %s\n", text);
	} else {
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			;
		if (WIFSIGNALED(status))
			(void)fprintf(stderr, "repfs: ended before it served: %s\n", strsignal(WTERMSIG(status)));
		else
			(void)fprintf(stderr, "repfs: ended before it served; its log tells why\n");
		code = 1;
	}
	(void)fflush(stderr);
	_exit(code);
}

/* In the parent it does not return. */
static int background(struct program *p, struct err *e)
{
	int fds[2];
	if (pipe2(fds, O_CLOEXEC) < 0)
		return err_set(e, ERR_FAILED, "pipe: %s", strerror(errno));
	pid_t child = fork();
	if (child < 0)
		return err_set(e, ERR_FAILED, "fork: %s", strerror(errno));
	if (child > 0) {
		(void)close(fds[1]);
		parent_wait(fds[0], child);
	}
	(void)close(fds[0]);
	p->parent = fds[1];
	(void)setsid();
	return 0;
}

static void parent_tell(struct program *p, int code, const char *text)
{
	unsigned char byte = (unsigned char)code;
	if (p->parent < 0)
		return;
	if (write(p->parent, &byte, 1) == 1 && *text)
		(void)!write(p->parent, text, strlen(text));
	(void)close(p->parent);
	p->parent = -1;
}

/* Lets go of the terminal; a log that was asked to go to stderr stays there. */
static void streams_leave(const struct options *o)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0)
		return;
	(void)dup2(null, STDIN_FILENO);
	(void)dup2(null, STDOUT_FILENO);
	if (o->log_target != LOG_STDERR)
		(void)dup2(null, STDERR_FILENO);
	if (null > STDERR_FILENO)
		(void)close(null);
}

/* ---- the process ---------------------------------------------------------------------------------------------------
 */

/* Each worker has a clone of /dev/fuse, each volume a handful of files, and two for each checkpoint kept. */
static void limits_raise(void)
{
	struct rlimit l;
	if (getrlimit(RLIMIT_NOFILE, &l) == 0 && l.rlim_cur < l.rlim_max) {
		l.rlim_cur = l.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &l);
	}
	/* Half of them for closed epochs, two a checkpoint of each volume; the rest is all else there is. */
	if (getrlimit(RLIMIT_NOFILE, &l) == 0 && l.rlim_cur != RLIM_INFINITY)
		filecache_limit((unsigned)min_u64(max_u64(l.rlim_cur / 2, 16), UINT_MAX));
}

static int signals_prepare(struct program *p, struct err *e)
{
	sigset_t set;
	(void)signal(SIGPIPE, SIG_IGN);
	(void)signal(SIGXFSZ, SIG_IGN); /* a limit on the size of files is an error of the call */
	(void)sigemptyset(&set);
	(void)sigaddset(&set, SIGTERM);
	(void)sigaddset(&set, SIGINT);
	(void)sigaddset(&set, SIGHUP);
	(void)pthread_sigmask(SIG_BLOCK, &set, NULL);
	p->signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (p->signals < 0 || p->wake < 0)
		return err_set(e, ERR_FAILED, "signalfd or eventfd: %s", strerror(errno));
	return 0;
}

static void wake(struct program *p)
{
	const uint64_t one = 1;
	(void)!write(p->wake, &one, sizeof(one));
}

static void hook_shutdown(void *arg)
{
	log_info("", "shutdown was asked for");
	wake(arg);
}

static void hook_ended(void *arg)
{
	struct program *p = arg;
	log_info("", "%s was unmounted from outside", p->mountpoint);
	wake(p);
}

static void hook_invalidate(void *arg, uint32_t gvol_id)
{
	const struct program *p = arg;
	fuse_ops_invalidate(p->ops, gvol_id);
}

static int serve(struct program *p, struct err *e)
{
	bool cleaned = false;
	const struct fuse_ops_config oc = {
	    .uid = p->o.uid,
	    .gid = p->o.gid,
	    .umask_given = p->o.umask_given,
	    .umask = p->o.umask,
	};
	const struct daemon_config dc = {
	    .store = p->store,
	    .mount = p->mountpoint,
	    .listen = p->o.listen,
	    .insecure = p->o.insecure,
	    .threads = p->o.threads,
	    .durability = p->o.durability,
	    .hooks = {.invalidate = hook_invalidate, .shutdown = hook_shutdown, .arg = p},
	};

	int r = mount_prepare(p->mountpoint, &cleaned, e);
	if (r < 0)
		return r;
	if (cleaned)
		log_info("", "unmounted what an ended repfs had left at %s", p->mountpoint);
	r = mount_create(&p->mount, e);
	if (r == 0)
		r = fuse_ops_create(&oc, p->mount, &p->ops, e);
	if (r == 0)
		r = daemon_open(&dc, &p->daemon, e);
	if (r < 0)
		return r;
	fuse_ops_set_daemon(p->ops, p->daemon);
	if (!p->o.fsname)
		p->o.mount.fsname = p->store;
	r = mount_start(p->mount, p->mountpoint, &p->o.mount, p->o.threads, fuse_ops_table(), p->ops, hook_ended, p, e);
	return r < 0 ? r : daemon_serve_control(p->daemon, e);
}

/* Any of what may have been made is taken down, in the reverse order. */
static void unserve(struct program *p)
{
	if (p->mount)
		mount_detach(p->mount);
	if (p->daemon)
		daemon_shutdown(p->daemon);
	if (p->ops)
		fuse_ops_wait_answered(p->ops, ANSWERS_WAIT_MS);
	if (p->mount)
		mount_stop(p->mount);
	if (p->ops)
		fuse_ops_close_files(p->ops);
	if (p->daemon)
		daemon_close(p->daemon);
	mount_free(p->mount);
	fuse_ops_free(p->ops);
}

static void on_second_signal(int signo)
{
	(void)signo;
	_exit(1);
}

/* Returns when it is time to end. */
static void wait_for_end(struct program *p)
{
	struct signalfd_siginfo info;
	struct pollfd fds[] = {{.fd = p->signals, .events = POLLIN}, {.fd = p->wake, .events = POLLIN}};
	struct sigaction second = {.sa_handler = on_second_signal};
	sigset_t set;

	while (poll(fds, 2, -1) < 0 && errno == EINTR)
		;
	if (read(p->signals, &info, sizeof(info)) == (ssize_t)sizeof(info))
		log_info("", "%s: ending", strsignal((int)info.ssi_signo));
	(void)sigaction(SIGTERM, &second, NULL);
	(void)sigaction(SIGINT, &second, NULL);
	(void)sigemptyset(&set);
	(void)sigaddset(&set, SIGTERM);
	(void)sigaddset(&set, SIGINT);
	(void)pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static void program_free(struct program *p)
{
	if (p->wake >= 0)
		(void)close(p->wake);
	if (p->signals >= 0)
		(void)close(p->signals);
	free(p->store);
	free(p->mountpoint);
	options_free(&p->o);
}

static int program_run(struct program *p)
{
	struct err e = {0};
	int r = paths_check(p, &e);
	if (r == 0 && !p->o.foreground)
		r = background(p, &e);
	if (r < 0)
		return complain(&e);
	(void)umask(077);
	(void)!chdir("/");
	limits_raise();
	log_init("repfs", p->o.log_target, p->o.log_format, p->o.log_level);
	r = signals_prepare(p, &e);
	if (r == 0)
		r = serve(p, &e);
	if (r < 0) {
		int code = err_exit(e.code) ? err_exit(e.code) : 1;
		unserve(p);
		if (p->parent < 0)
			return complain(&e);
		parent_tell(p, code, e.text);
		return code;
	}
	log_info("", "%s serves at %s", p->store, p->mountpoint);
	if (!p->o.foreground) {
		streams_leave(&p->o);
		parent_tell(p, 0, "");
	}
	wait_for_end(p);
	unserve(p);
	log_info("", "ended");
	return 0;
}

int main(int argc, char **argv)
{
	struct program p = {.parent = -1, .wake = -1, .signals = -1};
	struct err e = {0};
	int r = 0;

	/* Payloads come and go by the thousand, allocated in one thread and freed in another: keep their memory. */
	(void)mallopt(M_MMAP_THRESHOLD, 4 << 20);
	(void)mallopt(M_TRIM_THRESHOLD, 64 << 20);
	(void)mallopt(M_TOP_PAD, 1 << 20);
	if (options_parse(argc, argv, &p.o, &e) < 0) {
		(void)complain(&e);
		return 2;
	}
	if (p.o.help)
		options_help(stdout);
	else if (p.o.version)
		(void)printf("repfs %s\n", REPFS_VERSION);
	else if (p.o.check_config)
		(void)printf("repfs: the options%s%s are right\n", p.o.config ? " and " : "",
			     p.o.config ? p.o.config : "");
	else if (!p.o.fake)
		r = program_run(&p);
	program_free(&p);
	return r;
}
