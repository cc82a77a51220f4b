/* The /dev/fuse session; see fs/mount.h.
 *
 * Threads: libfuse's workers (each with a clone of the descriptor), "fuse-loop" that waits for them, and "fuse-notify".
 * Lock: mount.lock guards the job queue and the state; nothing is called with it held.
 *
 * The end. Three things can hang on a FUSE filesystem and each has its bound here:
 *   - a notification waits for a page that a request has locked. It must end before the workers stop reading requests,
 *     so mount_stop first lets the notification thread run dry while the session still serves;
 *   - umount(2) writes dirty pages back, and such a write may be parked for long (a frozen group): it runs in a thread
 *     of its own, and when its time is up the connection is aborted;
 *   - the process is killed while a notification waits for a page. The waiting thread can't be killed, its descriptors
 *     stay open, and so the kernel never learns that nobody serves any more. The watcher, a small child process,
 *     outlives the daemon for that moment and aborts the connection.
 */
#define FUSE_USE_VERSION 312
#include "fs/mount.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "core/os/thread.h"

#define MOUNT_TYPE "fuse.repfs"
#define MOUNT_TEXT_MAX 4096
#define DEAD_MOUNTS_MAX 8 /* stacked on one folder by so many crashes */
#define INIT_WAIT_NS (10 * NS_PER_SEC)
#define NOTIFY_DRAIN_NS (2 * NS_PER_SEC)
#define UNMOUNT_WAIT_NS (2 * NS_PER_SEC)
#define KICK_MS 20
#define SIGNAL_KICK SIGUSR1   /* interrupts the wait of fuse_session_loop_mt */
#define SIGNAL_ORPHAN SIGUSR2 /* what the watcher gets when the daemon is gone */

enum mount_state {
	MOUNT_IDLE,
	MOUNT_SERVING,
	MOUNT_DETACHED, /* unmounted; who has files open is served */
	MOUNT_STOPPING, /* no notification is sent any more */
};

struct mount {
	struct mutex lock;
	struct cond changed;
	_Atomic int state; /* enum mount_state; written under lock */
	struct mount_job *head, **tail;
	bool job_running, notify_quit, notify_started;
	pthread_t notify_thread;

	struct fuse_session *session;
	const char *path;
	const struct mount_options *options;
	unsigned threads;
	bool answered;	/* INIT */
	bool loop_over; /* the session has ended */
	pthread_t loop_thread;
	void (*ended)(void *arg);
	void *ended_arg;
	dev_t dev; /* of the mount; 0: unknown */
	int below; /* guard: the folder under the mount, -1: none */
	pid_t watcher;
};

/* ---- the mount table -----------------------------------------------------------------------------------------------
 */

/* Undoes the \ooo of /proc/self/mountinfo in place. */
static void mountinfo_unescape(char *s)
{
	char *out = s;
	while (*s) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] >= '0' && s[2] <= '7' && s[3] >= '0' &&
		    s[3] <= '7') {
			*out++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
			s += 4;
		} else {
			*out++ = *s++;
		}
	}
	*out = '\0';
}

/* The topmost mount at path: its device and whether it is one of repfs. false: nothing is mounted there. */
static bool mountinfo_find(const char *path, dev_t *ret_dev, bool *ret_ours)
{
	_cleanup_free_ char *line = NULL;
	size_t size = 0;
	bool found = false;
	FILE *f = fopen("/proc/self/mountinfo", "re");
	if (!f)
		return false;
	while (getline(&line, &size, f) > 0) {
		unsigned ma, mi;
		int at = 0;
		if (sscanf(line, "%*d %*d %u:%u %*s %n", &ma, &mi, &at) != 2 || at == 0)
			continue;
		char *point = line + at;
		char *end = strchr(point, ' ');
		char *type = end ? strstr(end, " - ") : NULL;
		if (!type)
			continue;
		*end = '\0';
		type += 3;
		mountinfo_unescape(point);
		if (strcmp(point, path) != 0)
			continue;
		found = true;
		*ret_dev = makedev(ma, mi);
		*ret_ours = strncmp(type, MOUNT_TYPE " ", sizeof(MOUNT_TYPE)) == 0;
	}
	(void)fclose(f);
	return found;
}

/* ---- fusermount3: for those who may not mount themselves -----------------------------------------------------------
 */

/* Runs it with all signals free. comm_fd >= 0: the socket for the descriptor. Returns its exit status, -1: not run. */
static int fusermount_run(char *const argv[], int comm_fd)
{
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attr;
	sigset_t none;
	char comm[40];
	pid_t pid;
	int status = -1;

	(void)snprintf(comm, sizeof(comm), "_FUSE_COMMFD=%d", comm_fd);
	char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
	char *env[] = {path, comm_fd >= 0 ? comm : NULL, NULL};

	(void)sigemptyset(&none);
	if (posix_spawn_file_actions_init(&actions) != 0)
		return -1;
	if (posix_spawnattr_init(&attr) != 0) {
		(void)posix_spawn_file_actions_destroy(&actions);
		return -1;
	}
	(void)posix_spawnattr_setsigmask(&attr, &none);
	(void)posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK);
	/* A descriptor put onto itself loses its close-on-exec flag. */
	if (comm_fd >= 0)
		(void)posix_spawn_file_actions_adddup2(&actions, comm_fd, comm_fd);
	if (posix_spawnp(&pid, "fusermount3", &actions, &attr, argv, env) == 0) {
		while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
			;
		status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
	}
	(void)posix_spawnattr_destroy(&attr);
	(void)posix_spawn_file_actions_destroy(&actions);
	return status;
}

static int fusermount_unmount(const char *path, bool lazy)
{
	char prog[] = "fusermount3", u[] = "-u", q[] = "-q", z[] = "-z", end[] = "--";
	char *copy = strdup(path);
	char *argv[] = {prog, u, q, lazy ? z : end, lazy ? end : copy, lazy ? copy : NULL, NULL};
	int status = copy ? fusermount_run(argv, -1) : -1;
	free(copy);
	return status == 0 ? 0 : -1;
}

static int receive_fd(int sock)
{
	char byte;
	struct iovec iov = {&byte, 1};
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr msg = {
	    .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	ssize_t n;
	int fd;

	while ((n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
		;
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
	if (!c || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS || c->cmsg_len < CMSG_LEN(sizeof(int)))
		return -1;
	memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	return fd;
}

/* fusermount3's list: a comma or backslash within a value is escaped. */
static void append_escaped(char *buf, size_t size, const char *text)
{
	size_t n = strlen(buf);
	for (; *text && n + 3 < size; text++) {
		if (*text == ',' || *text == '\\')
			buf[n++] = '\\';
		buf[n++] = *text;
	}
	buf[n] = '\0';
}

static int mount_by_fusermount(const char *path, const struct mount_options *o, int *ret_fd, struct err *e)
{
	char list[MOUNT_TEXT_MAX];
	int sv[2];

	(void)snprintf(list, sizeof(list), "%s,nosuid,nodev%s%s%s%s,default_permissions%s,subtype=repfs,fsname=",
		       o->flags & MS_RDONLY ? "ro" : "rw", o->flags & MS_NOEXEC ? ",noexec" : "",
		       o->flags & MS_SYNCHRONOUS ? ",sync" : "", o->flags & MS_DIRSYNC ? ",dirsync" : "",
		       o->flags & MS_NOATIME ? ",noatime" : "", o->allow_other || o->allow_root ? ",allow_other" : "");
	append_escaped(list, sizeof(list), o->fsname);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv) < 0)
		return err_set(e, ERR_FAILED, "mount on %s: %s", path, strerror(errno));
	char prog[] = "fusermount3", opt[] = "-o", end[] = "--";
	char *copy = strdup(path);
	char *argv[] = {prog, opt, list, end, copy, NULL};
	int status = copy ? fusermount_run(argv, sv[0]) : -1;
	free(copy);
	(void)close(sv[0]);
	int fd = status == 0 ? receive_fd(sv[1]) : -1;
	(void)close(sv[1]);
	if (fd < 0)
		return err_set(
		    e, ERR_FAILED,
		    status < 0 ? "mount on %s: not permitted, and fusermount3 can't be run; install fuse3 or be root"
			       : "mount on %s: fusermount3 refused it (its message is above)",
		    path);
	*ret_fd = fd;
	return 0;
}

static int mount_by_syscall(const char *path, const struct mount_options *o, int *ret_fd, struct err *e)
{
	char data[MOUNT_TEXT_MAX];
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return errno == EPERM || errno == EACCES
			   ? -ERR_PERM
			   : err_set(e, ERR_FAILED, "mount on %s: /dev/fuse: %s; load the fuse module", path,
				     strerror(errno));
	int n = snprintf(data, sizeof(data), "fd=%d,rootmode=%o,user_id=%u,group_id=%u,default_permissions%s%s%s", fd,
			 (unsigned)S_IFDIR, (unsigned)geteuid(), (unsigned)getegid(),
			 o->allow_other || o->allow_root ? ",allow_other" : "", o->kernel ? "," : "",
			 o->kernel ? o->kernel : "");
	if (n < 0 || (size_t)n >= sizeof(data)) {
		(void)close(fd);
		return err_set(e, ERR_USAGE, "mount on %s: the options are too long", path);
	}
	if (mount(o->fsname, path, MOUNT_TYPE, o->flags | MS_NOSUID | MS_NODEV, data) < 0) {
		int sys = errno;
		(void)close(fd);
		if (sys == EPERM)
			return -ERR_PERM;
		return err_set(e, ERR_FAILED, "mount on %s: %s", path, strerror(sys));
	}
	*ret_fd = fd;
	return 0;
}

/* Plain or lazy, by whatever is allowed. errno of umount2 is kept for the plain one: EBUSY. */
static int unmount_path(const char *path, bool lazy)
{
	if (umount2(path, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) == 0)
		return 0;
	if (errno != EPERM)
		return -1;
	return fusermount_unmount(path, lazy);
}

/* ---- before the mount ----------------------------------------------------------------------------------------------
 */

static bool is_dead(int sys)
{
	return sys == ENOTCONN || sys == ECONNABORTED;
}

/* *ret_dead: the mount there is dead after all. stat may still be answered from the kernel's cache. */
static int check_empty(const char *path, bool *ret_dead, struct err *e)
{
	DIR *d = opendir(path);
	*ret_dead = !d && is_dead(errno);
	if (*ret_dead)
		return 0;
	if (!d)
		return err_set(e, ERR_FAILED, "mount on %s: %s", path, strerror(errno));
	const struct dirent *entry;
	int r = 0;
	while (r == 0 && (entry = readdir(d)))
		if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
			r = err_set(e, ERR_FAILED,
				    "mount on %s: the folder is not empty (it has '%.100s'); choose an empty one, or "
				    "unmount what is "
				    "mounted there",
				    path, entry->d_name);
	(void)closedir(d);
	return r;
}

int mount_prepare(const char *path, bool *ret_cleaned, struct err *e)
{
	struct stat st;
	bool cleaned = false, ours = false;
	dev_t dev;
	int tries = 0;

	for (;;) {
		bool dead = false;
		int r = 0;
		bool there = stat(path, &st) == 0;
		if (!there)
			dead = is_dead(errno);
		else if (S_ISDIR(st.st_mode) && (r = check_empty(path, &dead, e)) < 0)
			return r;
		if (there && !dead)
			break;
		if (!dead)
			return err_set(e, ERR_FAILED, "mount on %s: %s%s", path, strerror(errno),
				       errno == ENOENT ? "; make the folder first" : "");
		if (!mountinfo_find(path, &dev, &ours) || !ours)
			return err_set(e, ERR_FAILED,
				       "mount on %s: a dead mount of another program is there; unmount it first", path);
		if (++tries > DEAD_MOUNTS_MAX || unmount_path(path, true) < 0)
			return err_set(
			    e, ERR_FAILED,
			    "mount on %s: a dead mount is there and can't be unmounted (%s); unmount it first", path,
			    strerror(errno));
		cleaned = true;
	}
	if (!S_ISDIR(st.st_mode))
		return err_set(e, ERR_FAILED, "mount on %s: not a folder; choose an empty one", path);
	*ret_cleaned = cleaned;
	return 0;
}

/* ---- guard ---------------------------------------------------------------------------------------------------------
 */

static int guard_set(int fd, bool on)
{
	int flags = 0;
	if (ioctl(fd, FS_IOC_GETFLAGS, &flags) < 0)
		return -errno;
	flags = on ? flags | FS_IMMUTABLE_FL : flags & ~FS_IMMUTABLE_FL;
	return ioctl(fd, FS_IOC_SETFLAGS, &flags) < 0 ? -errno : 0;
}

static void guard_begin(struct mount *m)
{
	int fd = open(m->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int r = fd < 0 ? -errno : guard_set(fd, true);
	if (r < 0) {
		log_warn(
		    "",
		    "guard: %s can't be made immutable: %s; a program that writes below it while nothing is mounted "
		    "goes unnoticed",
		    m->path, strerror(-r));
		if (fd >= 0)
			(void)close(fd);
		return;
	}
	log_info("", "guard: the folder below %s is immutable while it is mounted over", m->path);
	m->below = fd;
}

static void guard_end(struct mount *m)
{
	if (m->below < 0)
		return;
	int r = guard_set(m->below, false);
	if (r < 0)
		log_warn("", "guard: %s stays immutable: %s; chattr -i removes that", m->path, strerror(-r));
	(void)close(m->below);
	m->below = -1;
}

/* ---- abort and the watcher -----------------------------------------------------------------------------------------
 */

/* Makes every request on the connection fail at once, those under way included. */
static void connection_abort(const struct mount *m)
{
	char path[64];
	(void)snprintf(path, sizeof(path), "/sys/fs/fuse/connections/%u/abort", minor(m->dev));
	int fd = m->dev ? open(path, O_WRONLY | O_CLOEXEC) : -1;
	bool done = fd >= 0 && write(fd, "1", 1) == 1;
	if (fd >= 0)
		(void)close(fd);
	/* The forced unmount aborts first; whether the mount then goes is all the same. */
	if (!done)
		(void)umount2(m->path, MNT_FORCE | UMOUNT_NOFOLLOW);
}

/* Bytes of this process's command line, as ps shows it. */
static size_t command_line_size(void)
{
	char buf[4096];
	size_t size = 0;
	ssize_t n;
	int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	while ((n = read(fd, buf, sizeof(buf))) > 0)
		size += (size_t)n;
	(void)close(fd);
	return size;
}

/* In the child: only async-signal-safe calls. It takes a name of its own, so that who looks for the daemon by its name
 * or its arguments finds the daemon. */
_Noreturn static void watcher_run(pid_t daemon, const char *path, int abort_fd, size_t line_size)
{
	static const char name[] = "repfs-watch";
	sigset_t set;
	int signo;

	(void)prctl(PR_SET_NAME, name);
	memset(program_invocation_name, 0, line_size);
	if (line_size > sizeof(name))
		memcpy(program_invocation_name, name, sizeof(name));
	(void)setsid();
	if (abort_fd >= 0 && abort_fd != 0) {
		(void)dup2(abort_fd, 0);
		abort_fd = 0;
	}
	(void)syscall(SYS_close_range, abort_fd == 0 ? 1U : 0U, ~0U, 0U);
	(void)prctl(PR_SET_PDEATHSIG, SIGNAL_ORPHAN);
	(void)sigemptyset(&set);
	(void)sigaddset(&set, SIGNAL_ORPHAN);
	while (getppid() == daemon)
		if (sigwait(&set, &signo) == 0)
			break;
	if (abort_fd < 0 || write(abort_fd, "1", 1) != 1) {
		/* The descriptor keeps the forced unmount from doing more than aborting: the dead mount has to stay,
		 * for what writes to it shall fail and not land in the folder below. */
		int hold = open(path, O_PATH | O_CLOEXEC);
		if (hold >= 0)
			(void)umount2(path, MNT_FORCE | UMOUNT_NOFOLLOW);
	}
	_exit(0);
}

static void watcher_start(struct mount *m)
{
	char path[64];
	sigset_t all, old;
	pid_t daemon = getpid();
	size_t line_size = command_line_size();
	(void)snprintf(path, sizeof(path), "/sys/fs/fuse/connections/%u/abort", minor(m->dev));
	int fd = m->dev ? open(path, O_WRONLY | O_CLOEXEC) : -1;
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &old);
	pid_t pid = fork();
	if (pid == 0)
		watcher_run(daemon, m->path, fd, line_size);
	(void)pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (fd >= 0)
		(void)close(fd);
	if (pid < 0)
		log_warn(
		    "",
		    "no watcher process: %s; if this daemon is killed the mount may hang until it is aborted by hand",
		    strerror(errno));
	m->watcher = pid > 0 ? pid : 0;
}

static void watcher_stop(struct mount *m)
{
	if (m->watcher <= 0)
		return;
	(void)kill(m->watcher, SIGKILL);
	while (waitpid(m->watcher, NULL, 0) < 0 && errno == EINTR)
		;
	m->watcher = 0;
}

/* ---- notifications -------------------------------------------------------------------------------------------------
 */

static void *notify_main(void *arg)
{
	struct mount *m = arg;
	mutex_lock(&m->lock);
	for (;;) {
		while (!m->head && !m->notify_quit)
			cond_wait(&m->changed, &m->lock);
		if (!m->head)
			break;
		struct mount_job *job = m->head;
		m->head = job->next;
		if (!m->head)
			m->tail = &m->head;
		m->job_running = true;
		mutex_unlock(&m->lock);
		job->fn(m, job);
		mutex_lock(&m->lock);
		m->job_running = false;
		cond_broadcast(&m->changed);
	}
	mutex_unlock(&m->lock);
	return NULL;
}

static bool notifies(const struct mount *m)
{
	return m->state == MOUNT_SERVING || m->state == MOUNT_DETACHED;
}

void mount_post(struct mount *m, struct mount_job *job)
{
	mutex_lock(&m->lock);
	bool queue = notifies(m);
	if (queue) {
		job->next = NULL;
		*m->tail = job;
		m->tail = &job->next;
		cond_broadcast(&m->changed);
	}
	mutex_unlock(&m->lock);
	if (!queue)
		job->fn(m, job);
}

struct wait_job {
	struct mount_job job;
	struct mount_job *inner;
	bool done; /* under mount.lock */
};

static void wait_job_run(struct mount *m, struct mount_job *job)
{
	struct wait_job *w = CONTAINER_OF(job, struct wait_job, job);
	w->inner->fn(m, w->inner);
	mutex_lock(&m->lock);
	w->done = true;
	cond_broadcast(&m->changed);
	mutex_unlock(&m->lock);
}

void mount_post_wait(struct mount *m, struct mount_job *job)
{
	struct wait_job w = {.job.fn = wait_job_run, .inner = job};
	mount_post(m, &w.job);
	mutex_lock(&m->lock);
	while (!w.done)
		cond_wait(&m->changed, &m->lock);
	mutex_unlock(&m->lock);
}

void mount_drop_cache(struct mount *m, uint64_t ino, uint64_t off, uint64_t len)
{
	if (!notifies(m))
		return;
	/* -ENOENT: the kernel does not know the inode. Any other error: there is no mount any more. */
	(void)fuse_lowlevel_notify_inval_inode(m->session, ino, (off_t)off, (off_t)len);
}

/* ---- the session ---------------------------------------------------------------------------------------------------
 */

void mount_init(struct mount *m, struct fuse_conn_info *conn)
{
	/* Splicing needs a pipe per thread and gains nothing over one copy of at most 1 MiB. Without ATOMIC_O_TRUNC an
	 * open with O_TRUNC comes as a SETATTR that can be answered with the size unchanged. The cache is dropped by
	 * us, when content changes, and not by the kernel when it sees a new mtime. */
	const unsigned off = FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE |
			     FUSE_CAP_WRITEBACK_CACHE | FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_EXPORT_SUPPORT |
			     FUSE_CAP_ATOMIC_O_TRUNC;
	const unsigned on =
	    FUSE_CAP_EXPLICIT_INVAL_DATA | FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS;
	unsigned background = m->options->background ? m->options->background : MOUNT_BACKGROUND_DEFAULT;

	conn->want = (conn->want & ~off) | (on & conn->capable);
	conn->max_write = MOUNT_REQUEST_MAX;
	conn->max_background = background;
	conn->congestion_threshold = background - background / 4;
	log_debug("", "FUSE protocol %u.%u, requests of %u bytes, %u in the background", conn->proto_major,
		  conn->proto_minor, conn->max_write, conn->max_background);
	mutex_lock(&m->lock);
	m->answered = true;
	cond_broadcast(&m->changed);
	mutex_unlock(&m->lock);
}

static void *loop_main(void *arg)
{
	struct mount *m = arg;
	sigset_t kick;
	(void)sigemptyset(&kick);
	(void)sigaddset(&kick, SIGNAL_KICK);
	(void)pthread_sigmask(SIG_UNBLOCK, &kick, NULL);

	struct fuse_loop_config *config = fuse_loop_cfg_create();
	int r = -ENOMEM;
	if (config) {
		fuse_loop_cfg_set_clone_fd(config, 1);
		fuse_loop_cfg_set_max_threads(config, m->threads);
		fuse_loop_cfg_set_idle_threads(config, m->threads);
		r = fuse_session_loop_mt(m->session, config);
		fuse_loop_cfg_destroy(config);
	}
	mutex_lock(&m->lock);
	bool by_itself = m->state == MOUNT_SERVING;
	m->loop_over = true;
	cond_broadcast(&m->changed);
	mutex_unlock(&m->lock);
	if (r < 0)
		log_error("", "the FUSE session ended: %s", strerror(-r));
	if (by_itself)
		m->ended(m->ended_arg);
	return NULL;
}

static void fuse_log_line(enum fuse_log_level level, const char *fmt, va_list ap) __attribute__((format(printf, 2, 0)));

static void fuse_log_line(enum fuse_log_level level, const char *fmt, va_list ap)
{
	char text[1024];
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	text[strcspn(text, "\n")] = '\0';
	log_line(level <= FUSE_LOG_ERR	     ? LOG_LEVEL_ERROR
		 : level == FUSE_LOG_WARNING ? LOG_LEVEL_WARN
		 : level == FUSE_LOG_DEBUG   ? LOG_LEVEL_DEBUG
					     : LOG_LEVEL_INFO,
		 "", "fuse: %s", text);
}

static void kick_handler(int signo)
{
	(void)signo;
}

static unsigned threads_default(void)
{
	long n = sysconf(_SC_NPROCESSORS_ONLN);
	if (n < 2)
		return 4;
	return n * 2 > MOUNT_THREADS_MAX ? MOUNT_THREADS_MAX : (unsigned)(n * 2);
}

int mount_create(struct mount **ret, struct err *e)
{
	struct mount *m = calloc(1, sizeof(*m));
	if (!m)
		return err_set(e, ERR_NOMEM, "out of memory");
	mutex_init(&m->lock);
	cond_init(&m->changed);
	m->tail = &m->head;
	m->below = -1;
	*ret = m;
	return 0;
}

static int session_make(struct mount *m, const struct fuse_lowlevel_ops *ops, void *userdata, struct err *e)
{
	char prog[] = "repfs", debug[] = "-odebug", root[] = "-oallow_root", fd_path[32];
	char *argv[4] = {prog};
	int argc = 1, fd = -1;
	if (m->options->fuse_debug)
		argv[argc++] = debug;
	if (m->options->allow_root)
		argv[argc++] = root;
	struct fuse_args args = FUSE_ARGS_INIT(argc, argv);

	fuse_set_log_func(fuse_log_line);
	m->session = fuse_session_new(&args, ops, sizeof(*ops), userdata);
	fuse_opt_free_args(&args);
	if (!m->session)
		return err_set(e, ERR_FAILED, "mount on %s: libfuse refused to make a session", m->path);
	int r = mount_by_syscall(m->path, m->options, &fd, e);
	if (r == -ERR_PERM)
		r = mount_by_fusermount(m->path, m->options, &fd, e);
	if (r < 0)
		return r;
	(void)snprintf(fd_path, sizeof(fd_path), "/dev/fd/%d", fd);
	if (fuse_session_mount(m->session, fd_path) != 0) {
		(void)close(fd);
		(void)unmount_path(m->path, true);
		return err_set(e, ERR_FAILED, "mount on %s: libfuse refused the connection", m->path);
	}
	bool ours;
	if (!mountinfo_find(m->path, &m->dev, &ours) || !ours)
		m->dev = 0;
	return 0;
}

static int wait_answered(struct mount *m, struct err *e)
{
	uint64_t deadline = clock_mono_ns() + INIT_WAIT_NS;
	bool in_time = true;
	mutex_lock(&m->lock);
	while (!m->answered && !m->loop_over && in_time)
		in_time = cond_wait_until(&m->changed, &m->lock, deadline);
	bool ok = m->answered && !m->loop_over;
	mutex_unlock(&m->lock);
	return ok ? 0 : err_set(e, ERR_FAILED, "mount on %s: the kernel did not begin the session", m->path);
}

int mount_start(struct mount *m, const char *path, const struct mount_options *o, unsigned threads,
		const struct fuse_lowlevel_ops *ops, void *userdata, void (*ended)(void *arg), void *arg, struct err *e)
{
	PRE(m->state == MOUNT_IDLE && path[0] == '/' && threads <= MOUNT_THREADS_MAX);
	m->path = path;
	m->options = o;
	m->threads = threads ? threads : threads_default();
	m->ended = ended;
	m->ended_arg = arg;

	struct sigaction kick = {.sa_handler = kick_handler};
	(void)sigaction(SIGNAL_KICK, &kick, NULL);
	if (o->guard)
		guard_begin(m);
	int r = session_make(m, ops, userdata, e);
	if (r < 0)
		goto fail;
	mutex_lock(&m->lock);
	m->state = MOUNT_SERVING;
	mutex_unlock(&m->lock);
	watcher_start(m);
	r = thread_start(&m->notify_thread, "fuse-notify", notify_main, m);
	if (r == 0) {
		m->notify_started = true;
		r = thread_start(&m->loop_thread, "fuse-loop", loop_main, m);
	}
	if (r < 0) {
		(void)err_set(e, ERR_FAILED, "mount on %s: no thread could be started", path);
		(void)unmount_path(path, true);
		m->loop_over = true;
		mutex_lock(&m->lock);
		m->state = MOUNT_STOPPING;
		mutex_unlock(&m->lock);
		watcher_stop(m);
		goto fail;
	}
	r = wait_answered(m, e);
	if (r < 0)
		mount_stop(m);
	return r;
fail:
	guard_end(m);
	return r;
}

/* ---- the end -------------------------------------------------------------------------------------------------------
 */

struct unmount_job {
	struct mount *m;
	bool done; /* under mount.lock */
};

/* Ours only: somebody may have unmounted it, and what is at the path now is none of our business. */
static void *unmount_main(void *arg)
{
	struct unmount_job *u = arg;
	struct mount *m = u->m;
	dev_t dev = 0;
	bool ours = false;
	if (mountinfo_find(m->path, &dev, &ours) && ours && (!m->dev || dev == m->dev) &&
	    unmount_path(m->path, false) < 0) {
		log_info("", "%s is in use; it is detached, and who uses it gets errors", m->path);
		if (unmount_path(m->path, true) < 0)
			log_warn("", "unmount %s: %s; the next start cleans it up", m->path, strerror(errno));
	}
	mutex_lock(&m->lock);
	u->done = true;
	cond_broadcast(&m->changed);
	mutex_unlock(&m->lock);
	return NULL;
}

static void unmount_bounded(struct mount *m)
{
	struct unmount_job u = {.m = m};
	pthread_t thread;
	bool in_time = true;
	if (thread_start(&thread, "fuse-unmount", unmount_main, &u) < 0) {
		(void)unmount_path(m->path, true);
		return;
	}
	uint64_t deadline = clock_mono_ns() + UNMOUNT_WAIT_NS;
	mutex_lock(&m->lock);
	while (!u.done && in_time)
		in_time = cond_wait_until(&m->changed, &m->lock, deadline);
	bool done = u.done;
	mutex_unlock(&m->lock);
	if (!done) {
		log_warn("", "unmounting %s takes too long; the connection is cut", m->path);
		connection_abort(m);
	}
	(void)pthread_join(thread, NULL);
}

static void notify_drain(struct mount *m)
{
	uint64_t deadline = clock_mono_ns() + NOTIFY_DRAIN_NS;
	bool in_time = true;
	mutex_lock(&m->lock);
	m->state = MOUNT_STOPPING;
	while ((m->head || m->job_running) && in_time)
		in_time = cond_wait_until(&m->changed, &m->lock, deadline);
	bool idle = !m->head && !m->job_running;
	mutex_unlock(&m->lock);
	if (!idle) {
		log_warn("", "a reader of %s holds up the end; the connection is cut", m->path);
		connection_abort(m);
	}
}

static void loop_end(struct mount *m)
{
	struct timespec until;
	fuse_session_exit(m->session);
	do {
		(void)pthread_kill(m->loop_thread, SIGNAL_KICK);
		(void)clock_gettime(CLOCK_REALTIME, &until);
		until.tv_nsec += KICK_MS * (long)NS_PER_MS;
		if (until.tv_nsec >= (long)NS_PER_SEC) {
			until.tv_nsec -= (long)NS_PER_SEC;
			until.tv_sec++;
		}
	} while (pthread_timedjoin_np(m->loop_thread, NULL, &until) == ETIMEDOUT);
}

void mount_detach(struct mount *m)
{
	if (m->state != MOUNT_SERVING)
		return;
	mutex_lock(&m->lock);
	m->state = MOUNT_DETACHED;
	mutex_unlock(&m->lock);
	unmount_bounded(m);
}

void mount_stop(struct mount *m)
{
	mount_detach(m);
	if (m->state != MOUNT_DETACHED)
		return;
	notify_drain(m);
	loop_end(m);
	guard_end(m);
}

void mount_free(struct mount *m)
{
	if (!m)
		return;
	PRE(!notifies(m));
	if (m->notify_started) {
		mutex_lock(&m->lock);
		m->notify_quit = true;
		cond_broadcast(&m->changed);
		mutex_unlock(&m->lock);
		(void)pthread_join(m->notify_thread, NULL);
	}
	if (m->session)
		fuse_session_destroy(m->session);
	watcher_stop(m);
	cond_destroy(&m->changed);
	mutex_destroy(&m->lock);
	free(m);
}
