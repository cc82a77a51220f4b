/* The FUSE handlers and the mount's life, for ThreadSanitizer: two daemons in one process (tests/lib/pair.h), each with
 * a mount, and a second process whose threads use both all the time, also while they are unmounted and mounted again.
 *
 *   server      several rounds of: start both hosts and their mounts; managers send verbs over the control sockets;
 *               everything ends in the daemon's order (fs/main.c), under all that is going on
 *   writers     write, punch, flush and read back on the primary's mount, each in stripes of its own, with O_DIRECT and
 *               through the page cache in turn; every byte read is the last one written
 *   guest       writes a volume of its own on the secondary's mount, where checkpoints take it back
 *   readers     read all kinds of the secondary's files: a sector is one write's, whole, and of whose stripe it is
 *   mapper      maps the secondary's view and touches its pages, while checkpoints drop them
 *   walkers     list every folder, stat what is there, read status files, seek data and holes, and try what is refused
 *
 * The processes are apart because a process that waits for its own mount cannot be killed. A wrong byte, a refusal that
 * did not come, or a server that ends badly is exit code 1; 77: no mount can be made here. Arguments: seconds (default
 * 8), seed (default: the clock).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

/* A relic of <sys/mount.h>, in the way of core/range.h. */
#undef BLOCK_SIZE

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "fs/fuse_ops.h"
#include "fs/mount.h"
#include "net/ctl.h"
#include "tests/lib/pair.h"

#define SECTOR 512U
#define SIZE (UINT64_C(4) << 20)
#define STRIPE (UINT64_C(64) << 10)
#define OP_MAX (UINT64_C(32) << 10)
#define WRITERS 3U
#define GUEST WRITERS
#define ROUNDS 4U
#define END_WAIT_S 90U /* beyond the seconds asked for */
#define SKIPPED 77
/* What a sector holds, 64 times: its owner above, a count below. */
#define OWNER_SHIFT 56
#define UNKNOWN UINT64_MAX /* in a model: a write that failed may be there or not */

/* v0 and v1 are the writers', v2 is the guest's. */
static const char *const volumes[] = {"v0", "v1", "v2"};

struct shared {
	atomic_bool end, failed;
	atomic_ulong writes, read_back, flushes, guest_writes, reads, maps, walks, refusals, verbs, mounts;
};

static struct shared *shared;
static char base[96], mounts[2][128]; /* the primary's, the secondary's */

struct worker {
	pthread_t thread;
	unsigned index;
	uint64_t seed, count;
	uint64_t *model[2]; /* a writer's; 0: zeroes */
	uint64_t *buf;
};

static uint64_t rnd(struct worker *w, uint64_t below)
{
	w->seed ^= w->seed << 13;
	w->seed ^= w->seed >> 7;
	w->seed ^= w->seed << 17;
	return w->seed % below;
}

static void fail(const char *what, const char *name, uint64_t off, uint64_t got)
{
	(void)fprintf(stderr, "stress_fuse: %s: %s at %llu: %llx\n", what, name, (unsigned long long)off,
		      (unsigned long long)got);
	atomic_store(&shared->failed, true);
	atomic_store(&shared->end, true);
}

/* ---- clients -------------------------------------------------------------------------------------------------------
 */

static uint64_t owner_of(const char *volume, uint64_t off)
{
	return strcmp(volume, "v2") == 0 ? GUEST + 1 : off / STRIPE % WRITERS + 1;
}

/* Each sector is whole and its owner's, or zeroes. */
static void check_sectors(const char *volume, uint64_t off, const uint64_t *buf, uint64_t len)
{
	for (uint64_t at = 0; at < len; at += SECTOR, buf += SECTOR / 8) {
		uint64_t mark = buf[0];
		bool whole = memcmp(buf, buf + 1, SECTOR - 8) == 0;
		if (!whole || (mark && mark >> OWNER_SHIFT != owner_of(volume, off + at)))
			fail(whole ? "a sector is somebody else's" : "a sector is torn", volume, off + at, mark);
	}
}

/* -1: not now. */
static int open_file(unsigned host, const char *folder, const char *name, int flags)
{
	char path[300];
	(void)snprintf(path, sizeof(path), "%s/%s/%s", mounts[host], folder, name);
	int fd = open(path, flags | O_CLOEXEC);
	if (fd < 0)
		(void)usleep(2000);
	return fd;
}

static bool read_back(int fd, struct worker *w, unsigned v, uint64_t off, uint64_t len)
{
	memset(w->buf, 0xee, len);
	if (pread(fd, w->buf, len, (off_t)off) != (ssize_t)len)
		return false;
	for (uint64_t i = 0; i < len / SECTOR; i++) {
		const uint64_t *s = w->buf + i * (SECTOR / 8);
		uint64_t want = w->model[v][off / SECTOR + i];
		if (want != UNKNOWN && (s[0] != want || memcmp(s, s + 1, SECTOR - 8) != 0))
			fail("not what was written last", volumes[v], off + i * SECTOR, s[0]);
	}
	atomic_fetch_add(&shared->read_back, 1);
	return true;
}

static bool write_once(int fd, struct worker *w, unsigned v, uint64_t stripe)
{
	uint64_t off = stripe + rnd(w, STRIPE / SECTOR) * SECTOR, n;
	uint64_t len = (1 + rnd(w, min_u64(OP_MAX, stripe + STRIPE - off) / SECTOR)) * SECTOR;
	uint64_t mark = 0, what = rnd(w, 10);
	bool ok;
	if (what == 0) {
		atomic_fetch_add(&shared->flushes, 1);
		return (rnd(w, 2) ? fsync(fd) : fdatasync(fd)) == 0;
	}
	if (what < 4)
		return read_back(fd, w, v, off, len);
	if (what == 4) {
		ok = fallocate(fd, FALLOC_FL_KEEP_SIZE | (rnd(w, 2) ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE),
			       (off_t)off, (off_t)len) == 0;
	} else {
		mark = (uint64_t)(w->index + 1) << OWNER_SHIFT | ++w->count;
		for (n = 0; n < len / 8; n++)
			w->buf[n] = mark;
		ok = pwrite(fd, w->buf, len, (off_t)off) == (ssize_t)len;
	}
	for (uint64_t i = 0; i < len / SECTOR; i++)
		w->model[v][off / SECTOR + i] = ok ? mark : UNKNOWN;
	atomic_fetch_add(&shared->writes, 1);
	return ok;
}

static void writer(struct worker *w)
{
	unsigned v = (unsigned)rnd(w, 2);
	int cached = open_file(0, "volumes", volumes[v], O_RDWR);
	int direct = open_file(0, "volumes", volumes[v], O_RDWR | O_DIRECT);
	/* Within one stripe, so that what one file has brought into the cache is written through the other. */
	uint64_t stripe = (rnd(w, SIZE / STRIPE / WRITERS) * WRITERS + w->index) * STRIPE;
	bool go = cached >= 0 && direct >= 0;
	for (unsigned i = 0; go && i < 40; i++)
		go = write_once(rnd(w, 2) ? cached : direct, w, v, stripe);
	if (cached >= 0)
		(void)close(cached);
	if (direct >= 0)
		(void)close(direct);
}

static void guest(struct worker *w)
{
	int fd = open_file(1, "volumes", "v2", O_RDWR | (rnd(w, 2) ? O_DIRECT : 0));
	uint64_t off = rnd(w, (SIZE - OP_MAX) / SECTOR) * SECTOR, len = (1 + rnd(w, OP_MAX / SECTOR)) * SECTOR;
	uint64_t mark = (uint64_t)(GUEST + 1) << OWNER_SHIFT | ++w->count;
	for (uint64_t n = 0; n < len / 8; n++)
		w->buf[n] = mark;
	if (fd >= 0 && pwrite(fd, w->buf, len, (off_t)off) == (ssize_t)len) {
		atomic_fetch_add(&shared->guest_writes, 1);
		if (rnd(w, 4) == 0)
			(void)fsync(fd);
	}
	if (fd >= 0)
		(void)close(fd);
}

static void reader(struct worker *w)
{
	static const char *const folders[] = {"volumes", "overlays", "overlays", "checkpoints"};
	static const char *const files[] = {"", "/active", "/hidden", "/latest"};
	unsigned what = (unsigned)rnd(w, ARRAY_LEN(files)), v = (unsigned)rnd(w, ARRAY_LEN(volumes));
	char name[64];
	(void)snprintf(name, sizeof(name), "%s%s", volumes[v], files[what]);
	int fd = open_file(1, folders[what], name, O_RDONLY | (rnd(w, 2) ? O_DIRECT : 0));
	for (unsigned i = 0; fd >= 0 && i < 20; i++) {
		uint64_t off = rnd(w, (SIZE - OP_MAX) / SECTOR) * SECTOR;
		if (pread(fd, w->buf, OP_MAX, (off_t)off) != (ssize_t)OP_MAX)
			break;
		check_sectors(volumes[v], off, w->buf, OP_MAX);
		atomic_fetch_add(&shared->reads, 1);
	}
	if (fd >= 0)
		(void)close(fd);
}

static _Thread_local sigjmp_buf mapper_out;

static void on_bus(int signo)
{
	(void)signo;
	siglongjmp(mapper_out, 1);
}

/* Only touches: a sector may change between two loads. */
static void mapper(struct worker *w)
{
	int fd = open_file(1, "volumes", volumes[rnd(w, 2)], O_RDONLY);
	if (fd < 0)
		return;
	volatile uint8_t *map = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);
	if (map != MAP_FAILED && sigsetjmp(mapper_out, 1) == 0)
		for (unsigned i = 0; i < 50; i++) {
			(void)map[rnd(w, SIZE)];
			atomic_fetch_add(&shared->maps, 1);
		}
	if (map != MAP_FAILED)
		(void)munmap((void *)map, SIZE);
	(void)close(fd);
}

static void refused(unsigned host)
{
	char path[200], other[200];
	(void)snprintf(path, sizeof(path), "%s/volumes/v0", mounts[host]);
	(void)snprintf(other, sizeof(other), "%s/volumes/none", mounts[host]);
	if (rename(path, other) == 0 || unlink(path) == 0 || chmod(path, 0777) == 0)
		fail("it let go of", path, 0, 0);
	/* With nothing mounted there the folder below is an ordinary one, without `volumes`. */
	if (mkdir(other, 0700) == 0 || open(other, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600) >= 0)
		fail("it took", other, 0, 0);
	atomic_fetch_add(&shared->refusals, 1);
}

static void walk_file(struct worker *w, int dir, const struct dirent *e)
{
	int fd = openat(dir, e->d_name, O_RDONLY | O_CLOEXEC);
	const size_t n = strlen(e->d_name);
	if (fd < 0)
		return;
	ssize_t got = pread(fd, w->buf, 4096, 0);
	if (n > 5 && strcmp(e->d_name + n - 5, ".json") == 0) {
		if (got > 0 && *(const char *)w->buf != '{')
			fail("no status", e->d_name, 0, w->buf[0]);
	} else {
		off_t at = 0;
		for (unsigned i = 0; i < 20 && at >= 0; i++)
			at = lseek(fd, at, i % 2 ? SEEK_HOLE : SEEK_DATA);
	}
	(void)close(fd);
}

static void walk(struct worker *w, const char *path, unsigned depth)
{
	DIR *d = opendir(path);
	const struct dirent *e;
	while (d && !atomic_load(&shared->end) && (e = readdir(d)) != NULL) {
		struct stat st;
		char sub[PATH_MAX];
		if (e->d_name[0] == '.' || fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
			continue;
		(void)snprintf(sub, sizeof(sub), "%s/%s", path, e->d_name);
		if (S_ISDIR(st.st_mode) && depth < 4)
			walk(w, sub, depth + 1);
		else if (S_ISREG(st.st_mode))
			walk_file(w, dirfd(d), e);
		else if (S_ISLNK(st.st_mode))
			(void)!readlink(sub, (char *)w->buf, 4096);
	}
	if (d)
		(void)closedir(d);
}

static void walker(struct worker *w)
{
	struct statvfs vfs;
	walk(w, mounts[w->index], 0);
	(void)statvfs(mounts[w->index], &vfs);
	refused(w->index);
	atomic_fetch_add(&shared->walks, 1);
	(void)usleep(1000);
}

static const struct client {
	void (*once)(struct worker *w);
	unsigned index;
} clients[] = {{writer, 0}, {writer, 1}, {writer, 2}, {guest, 0}, {reader, 0},
	       {reader, 1}, {mapper, 0}, {walker, 0}, {walker, 1}};

static void *client_main(void *arg)
{
	struct worker *w = arg;
	const struct client *c = &clients[w->index];
	w->index = c->index;
	while (!atomic_load(&shared->end))
		c->once(w);
	return NULL;
}

_Noreturn static void clients_run(uint64_t seed)
{
	static struct worker w[ARRAY_LEN(clients)];
	struct sigaction bus = {.sa_handler = on_bus};
	(void)sigaction(SIGBUS, &bus, NULL);
	for (unsigned i = 0; i < ARRAY_LEN(w); i++) {
		w[i] = (struct worker){.index = i, .seed = (seed + i * UINT64_C(0x9E3779B97F4A7C15)) | 1};
		w[i].buf = aligned_alloc(4096, OP_MAX);
		for (unsigned v = 0; v < 2; v++)
			w[i].model[v] = calloc(SIZE / SECTOR, sizeof(uint64_t));
		if (!w[i].buf || !w[i].model[0] || !w[i].model[1] ||
		    pthread_create(&w[i].thread, NULL, client_main, &w[i]) != 0)
			abort();
	}
	for (unsigned i = 0; i < ARRAY_LEN(w); i++) {
		(void)pthread_join(w[i].thread, NULL);
		free(w[i].buf);
		free(w[i].model[0]);
		free(w[i].model[1]);
	}
	exit(0);
}

/* ---- the server ----------------------------------------------------------------------------------------------------
 */

static struct pair p;

struct served {
	struct pair_host *host;
	struct mount *mount;
	struct fuse_ops *ops;
	struct mount_options options;
};

static const char *const requests[] = {
    "checkpoint {\"name\":\"g\",\"timeout_ms\":2000}",
    "checkpoint {\"name\":\"g\",\"wait\":false}",
    "set {\"name\":\"g\",\"settings\":{\"keep_last\":\"2\",\"checkpoint_interval\":\"0.1\"}}",
    "set {\"name\":\"g\",\"settings\":{\"keep_last\":\"4\",\"protocol\":\"C\"}}",
    "set {\"name\":\"g\",\"settings\":{\"protocol\":\"A\"}}",
    "pause {\"name\":\"g\"}",
    "resume {\"name\":\"g\"}",
    "resume {\"name\":\"g\"}",
    "discard {\"name\":\"g\"}",
    "create {\"name\":\"x\",\"size\":1048576}",
    "create {\"name\":\"y\",\"size\":1048576,\"group\":\"x\"}",
    "delete {\"name\":\"x\"}",
    "delete {\"name\":\"y\"}",
    "delete {\"name\":\"v0\"}",
    "status {}",
    "extents {\"name\":\"v0\",\"layer\":\"hidden\"}",
    "checkpoints {\"name\":\"g\"}",
};

/* Over the sockets, so that they may go on while the hosts come and go. */
static void *manager_main(void *arg)
{
	struct worker *w = arg;
	char path[300];
	(void)snprintf(path, sizeof(path), "%s/control.sock", w->index ? p.b.store : p.a.store);
	while (!atomic_load(&shared->end)) {
		char verb[32];
		json_t *result = NULL;
		struct err e;
		const char *r = requests[rnd(w, ARRAY_LEN(requests))], *args = strchr(r, ' ');
		(void)snprintf(verb, sizeof(verb), "%.*s", (int)(args - r), r);
		if (ctl_call(path, verb, json_loads(args, 0, NULL), 3000, NULL, NULL, &result, NULL, &e) ==
		    -ERR_UNREACHABLE_DAEMON)
			(void)usleep(2000);
		json_decref(result);
		atomic_fetch_add(&shared->verbs, 1);
	}
	return NULL;
}

static void on_ended(void *arg)
{
	fail("a session ended by itself", arg, 0, 0);
}

static int host_serve(struct served *s, struct pair_host *h, char *path, struct err *e)
{
	const struct fuse_ops_config cfg = {0};
	bool cleaned;
	s->host = h;
	s->options = (struct mount_options){.fsname = h->store};
	int r = mount_prepare(path, &cleaned, e);
	r = r ? r : mount_create(&s->mount, e);
	r = r ? r : fuse_ops_create(&cfg, s->mount, &s->ops, e);
	if (r)
		return r;
	h->hooks = (struct daemon_hooks){.invalidate = fuse_ops_invalidate, .arg = s->ops};
	r = pair_host_start(&p, h);
	if (r) {
		*e = h->err;
		return r;
	}
	fuse_ops_set_daemon(s->ops, h->d);
	r = mount_start(s->mount, path, &s->options, 0, fuse_ops_table(), s->ops, on_ended, path, e);
	return r ? r : daemon_serve_control(h->d, e);
}

/* As fs/main.c does it. */
static void host_unserve(struct served *s)
{
	if (s->mount)
		mount_detach(s->mount);
	if (s->host && s->host->d)
		daemon_shutdown(s->host->d);
	if (s->ops)
		fuse_ops_wait_answered(s->ops, 3000);
	if (s->mount)
		mount_stop(s->mount);
	if (s->ops)
		fuse_ops_close_files(s->ops);
	if (s->host && s->host->d)
		pair_host_stop(s->host);
	mount_free(s->mount);
	fuse_ops_free(s->ops);
}

/* Nobody has the volumes open yet. */
static int set_up(void)
{
	int r = pair_open(&p);
	for (unsigned i = 0; i < ARRAY_LEN(volumes) && !r; i++)
		r = pair_create(&p.a, volumes[i], "g", SIZE);
	r = r ? r : pair_protect(&p, "g");
	pair_host_stop(&p.a);
	pair_host_stop(&p.b);
	return r;
}

static bool round_run(unsigned round, uint64_t ns)
{
	struct served a = {0}, b = {0};
	struct err e = {0};
	int r = host_serve(&b, &p.b, mounts[1], &e);
	r = r ? r : host_serve(&a, &p.a, mounts[0], &e);
	if (r)
		fail(e.text, "round", round, (uint64_t)-r);
	else
		atomic_fetch_add(&shared->mounts, 1);
	for (uint64_t until = clock_mono_ns() + ns; !r && clock_mono_ns() < until && !atomic_load(&shared->end);)
		(void)usleep(10000);
	if (round == ROUNDS - 1)
		atomic_store(&shared->end, true);
	host_unserve(round % 2 ? &a : &b);
	host_unserve(round % 2 ? &b : &a);
	return r == 0;
}

_Noreturn static void server_run(uint64_t seconds, uint64_t seed)
{
	struct worker m[2];
	log_init("stress_fuse", LOG_STDERR, LOG_TEXT, LOG_LEVEL_ERROR);
	(void)signal(SIGPIPE, SIG_IGN);
	(void)setenv("TMPDIR", base, 1);
	int r = set_up();
	if (r) {
		fail("two hosts could not be set up", p.a.err.text, 0, (uint64_t)-r);
		exit(1);
	}
	for (unsigned i = 0; i < ARRAY_LEN(m); i++) {
		m[i] = (struct worker){.index = i, .seed = (seed ^ (i + 1) * UINT64_C(0x9E3779B97F4A7C15)) | 1};
		if (pthread_create(&m[i].thread, NULL, manager_main, &m[i]) != 0)
			abort();
	}
	for (unsigned i = 0; i < ROUNDS && round_run(i, seconds * NS_PER_SEC / ROUNDS); i++)
		;
	atomic_store(&shared->end, true);
	for (unsigned i = 0; i < ARRAY_LEN(m); i++)
		(void)pthread_join(m[i].thread, NULL);
	pair_close(&p);
	exit(atomic_load(&shared->failed) ? 1 : 0);
}

/* ---- main ----------------------------------------------------------------------------------------------------------
 */

/* What is left behind goes with this process. */
static void namespace_own(void)
{
	if (unshare(CLONE_NEWNS) == 0)
		(void)mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
}

/* False: it ended badly, or had to be killed. */
static bool await(pid_t pid, const char *what, uint64_t until_ns)
{
	int status = 0;
	while (waitpid(pid, &status, WNOHANG) == 0) {
		if (clock_mono_ns() > until_ns) {
			(void)fprintf(stderr, "stress_fuse: the %s do not end\n", what);
			(void)kill(pid, SIGKILL);
			for (unsigned i = 0; i < 2; i++)
				(void)umount2(mounts[i], MNT_FORCE);
			until_ns = UINT64_MAX;
		}
		(void)usleep(5000);
	}
	if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
		return until_ns != UINT64_MAX;
	(void)fprintf(stderr, "stress_fuse: the %s ended with status %x\n", what, (unsigned)status);
	return false;
}

int main(int argc, char **argv)
{
	uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 8;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : clock_wall_ns();
	const char *tmp = getenv("TMPDIR");

	if (geteuid() != 0 || access("/dev/fuse", R_OK | W_OK) != 0) {
		(void)printf("no mount can be made here: it needs root and /dev/fuse\n");
		return SKIPPED;
	}
	(void)printf("seed %llu\n", (unsigned long long)seed);
	(void)fflush(stdout);
	namespace_own();
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	(void)snprintf(base, sizeof(base), "%.60s/repfs-stress-XXXXXX", tmp && *tmp ? tmp : "/tmp");
	if (shared == MAP_FAILED || !mkdtemp(base))
		return 1;
	for (unsigned i = 0; i < 2; i++) {
		(void)snprintf(mounts[i], sizeof(mounts[i]), "%s/m%c", base, i ? 'b' : 'a');
		if (mkdir(mounts[i], 0700) < 0)
			return 1;
	}
	pid_t users = fork();
	if (users == 0)
		clients_run(seed);
	pid_t server = users > 0 ? fork() : -1;
	if (server == 0)
		server_run(seconds, seed);
	uint64_t until = clock_mono_ns() + (seconds + END_WAIT_S) * NS_PER_SEC;
	bool ok = server > 0 && await(server, "servers", until);
	atomic_store(&shared->end, true);
	ok = (users <= 0 || await(users, "clients", until + END_WAIT_S * NS_PER_SEC)) && ok;
	ok = ok && !atomic_load(&shared->failed);
	for (unsigned i = 0; i < 2; i++) {
		(void)umount2(mounts[i], MNT_DETACH);
		ok = rmdir(mounts[i]) == 0 && ok;
	}
	ok = rmdir(base) == 0 && ok;
	(void)printf(
	    "%lu times mounted, %lu writes, %lu read back, %lu flushes, %lu guest writes, %lu reads, %lu pages "
	    "touched, %lu walks, %lu refusals, %lu verbs: %s\n",
	    atomic_load(&shared->mounts), atomic_load(&shared->writes), atomic_load(&shared->read_back),
	    atomic_load(&shared->flushes), atomic_load(&shared->guest_writes), atomic_load(&shared->reads),
	    atomic_load(&shared->maps), atomic_load(&shared->walks), atomic_load(&shared->refusals),
	    atomic_load(&shared->verbs), ok ? "ok" : "FAILED");
	return ok ? 0 : 1;
}
