/* minifuse: the least that a FUSE server for a disk image can do, as the baseline of the benchmarks.
 *
 *   minifuse FILE MOUNTPOINT [THREADS]     serves MOUNTPOINT/disk until it is unmounted or gets SIGTERM
 *
 * It has the session settings of repfs (1 MiB requests, a cloned descriptor a thread, direct_io with parallel direct
 * writes) and does pread and pwrite on a buffered backing file, nothing else: no replication, no dirty bits, no claims,
 * no asynchronous answers. What repfs costs above it is what repfs adds; what it costs above the bare file is FUSE.
 */
#define FUSE_USE_VERSION 312
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REQUEST_MAX (1U << 20)
#define BACKGROUND_MAX 256
#define THREADS_MAX 64
#define DISK_INO 2
#define DISK_NAME "disk"

static int disk_fd;
static pthread_key_t read_buffer;

static int attr_fill(fuse_ino_t ino, struct stat *st)
{
	if (ino == DISK_INO) {
		if (fstat(disk_fd, st) < 0)
			return errno;
		st->st_ino = DISK_INO;
		return 0;
	}
	*st = (struct stat){.st_ino = FUSE_ROOT_ID, .st_mode = S_IFDIR | 0755, .st_nlink = 2};
	return ino == FUSE_ROOT_ID ? 0 : ENOENT;
}

static void mini_init(void *arg, struct fuse_conn_info *conn)
{
	(void)arg;
	conn->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE |
				  FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_ATOMIC_O_TRUNC);
	conn->max_write = REQUEST_MAX;
	conn->max_background = BACKGROUND_MAX;
	conn->congestion_threshold = BACKGROUND_MAX - BACKGROUND_MAX / 4;
}

static void mini_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param e = {.ino = DISK_INO, .attr_timeout = 1, .entry_timeout = 1};
	int r = parent == FUSE_ROOT_ID && strcmp(name, DISK_NAME) == 0 ? attr_fill(DISK_INO, &e.attr) : ENOENT;
	if (r)
		(void)fuse_reply_err(req, r);
	else
		(void)fuse_reply_entry(req, &e);
}

static void mini_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct stat st;
	int r = attr_fill(ino, &st);
	(void)fi;
	if (r)
		(void)fuse_reply_err(req, r);
	else
		(void)fuse_reply_attr(req, &st, 1);
}

/* The size stays what it is, as on a block device. */
static void mini_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi)
{
	(void)attr;
	(void)to_set;
	mini_getattr(req, ino, fi);
}

static void mini_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	char buf[256];
	struct stat st = {.st_ino = DISK_INO, .st_mode = S_IFREG};
	(void)ino;
	(void)fi;
	size_t n = off == 0 ? fuse_add_direntry(req, buf, sizeof(buf), DISK_NAME, &st, 1) : 0;
	(void)fuse_reply_buf(req, buf, n <= size ? n : 0);
}

static void mini_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)fi;
	if (ino != DISK_INO) {
		(void)fuse_reply_err(req, EISDIR);
		return;
	}
	/* By hand: libfuse before 3.15 has no name for parallel direct writes. */
	const struct fuse_open_out out = {.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES};
	(void)fuse_reply_buf(req, (const char *)&out, sizeof(out));
}

static void mini_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	void *buf = pthread_getspecific(read_buffer);
	(void)ino;
	(void)fi;
	if (!buf && (posix_memalign(&buf, 4096, REQUEST_MAX) != 0 || pthread_setspecific(read_buffer, buf) != 0)) {
		(void)fuse_reply_err(req, ENOMEM);
		return;
	}
	ssize_t n = pread(disk_fd, buf, size < REQUEST_MAX ? size : REQUEST_MAX, off);
	if (n < 0)
		(void)fuse_reply_err(req, errno);
	else
		(void)fuse_reply_buf(req, buf, (size_t)n);
}

static void mini_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off,
		       struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	ssize_t n = pwrite(disk_fd, buf, size, off);
	if (n < 0)
		(void)fuse_reply_err(req, errno);
	else
		(void)fuse_reply_write(req, (size_t)n);
}

static void mini_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	(void)ino;
	(void)datasync;
	(void)fi;
	(void)fuse_reply_err(req, fdatasync(disk_fd) < 0 ? errno : 0);
}

static void mini_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t len, struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	(void)fuse_reply_err(req, fallocate(disk_fd, mode | FALLOC_FL_KEEP_SIZE, off, len) < 0 ? errno : 0);
}

static const struct fuse_lowlevel_ops ops = {
    .init = mini_init,
    .lookup = mini_lookup,
    .getattr = mini_getattr,
    .setattr = mini_setattr,
    .readdir = mini_readdir,
    .open = mini_open,
    .read = mini_read,
    .write = mini_write,
    .fsync = mini_fsync,
    .fallocate = mini_fallocate,
};

static unsigned threads_parse(const char *text)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	long n = text ? strtol(text, NULL, 10) : cpus * 2 < 4 ? 4 : cpus * 2;
	return n >= 1 && n <= THREADS_MAX ? (unsigned)n : 0;
}

static int serve(struct fuse_session *se, const char *mountpoint, unsigned threads)
{
	struct fuse_loop_config *config = fuse_loop_cfg_create();
	int r = 1;
	if (!config)
		return 1;
	fuse_loop_cfg_set_clone_fd(config, 1);
	fuse_loop_cfg_set_max_threads(config, threads);
	fuse_loop_cfg_set_idle_threads(config, threads);
	if (fuse_set_signal_handlers(se) == 0) {
		if (fuse_session_mount(se, mountpoint) == 0) {
			r = fuse_session_loop_mt(se, config) < 0;
			fuse_session_unmount(se);
		}
		fuse_remove_signal_handlers(se);
	}
	fuse_loop_cfg_destroy(config);
	return r;
}

int main(int argc, char **argv)
{
	char fsname[] = "-ofsname=minifuse,subtype=minifuse,default_permissions";
	unsigned threads = argc == 3 || argc == 4 ? threads_parse(argc == 4 ? argv[3] : NULL) : 0;
	if (threads == 0) {
		(void)fprintf(stderr, "usage: minifuse FILE MOUNTPOINT [THREADS, 1 to %d]\n", THREADS_MAX);
		return 2;
	}
	disk_fd = open(argv[1], O_RDWR | O_CLOEXEC);
	if (disk_fd < 0) {
		perror(argv[1]);
		return 1;
	}
	if (pthread_key_create(&read_buffer, free) != 0)
		return 1;
	char *fuse_argv[] = {argv[0], fsname, NULL};
	struct fuse_args args = FUSE_ARGS_INIT(2, fuse_argv);
	struct fuse_session *se = fuse_session_new(&args, &ops, sizeof(ops), NULL);
	fuse_opt_free_args(&args);
	if (!se)
		return 1;
	int r = serve(se, argv[2], threads);
	fuse_session_destroy(se);
	(void)close(disk_fd);
	return r;
}
