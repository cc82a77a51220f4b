/* Images and their backing files (image/source.h).
 *
 * A file is looked at before it is opened: found with O_PATH, which opens nothing (no FIFO that hangs, no tape that
 * winds), asked what it is and where it lies, and then opened through that descriptor: it is the file that was asked
 * about, whatever its name has come to mean.
 *
 * QEMU's lock bytes are honoured: an image that a VM has open for writing is refused, and one that is open here is
 * refused by QEMU for writing. Where there are no such locks (some network filesystems) there are none.
 */
#include "image/source.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/range.h"
#include "image/qcow.h"
#include "image/zst.h"

/* Of the beginning and of the end, for the fingerprint. */
#define FINGERPRINT_BYTES (64U << 10)

/* QEMU's file-posix.c: byte 100 + n is locked by who uses permission n, 200 + n by who can't share it. */
#define LOCK_USES 100
#define LOCK_KEEPS 200
#define PERMISSION_READ 0
#define PERMISSION_WRITE 1
#define PERMISSION_RESIZE 3

struct roots {
	char dir[2][SOURCE_PATH_MAX]; /* real paths; "" if there is none */
};

/* One file of the chain while it is being opened. */
struct level {
	struct disk *disk;
	struct qcow_info info;
	bool qcow;
};

struct opening {
	struct source *s;
	struct roots roots;
	struct level level[SOURCE_FILES_MAX];
};

/* ---- one file ---- */

static int real_path_of(int fd, char out[static SOURCE_PATH_MAX])
{
	char link[64];
	ssize_t n;

	(void)snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, out, SOURCE_PATH_MAX);
	if (n < 0)
		return err_from_errno(errno);
	if (n >= SOURCE_PATH_MAX)
		return -ERR_LIMIT;
	out[n] = '\0';
	return 0;
}

static bool is_below(const char *path, const char *dir)
{
	size_t n = strlen(dir);

	if (n == 0)
		return false;
	return strcmp(dir, "/") == 0 || (strncmp(path, dir, n) == 0 && path[n] == '/');
}

/* 0, 1: there are no locks here; -ERR_BUSY. */
static int lock_image(int fd)
{
	static const int bytes[] = {LOCK_USES + PERMISSION_READ, LOCK_KEEPS + PERMISSION_WRITE,
				    LOCK_KEEPS + PERMISSION_RESIZE};
	static const int theirs[] = {LOCK_KEEPS + PERMISSION_READ, LOCK_USES + PERMISSION_WRITE,
				     LOCK_USES + PERMISSION_RESIZE};

	for (size_t i = 0; i < ARRAY_LEN(bytes); i++) {
		struct flock l = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = bytes[i], .l_len = 1};

		if (fcntl(fd, F_OFD_SETLK, &l) < 0)
			return errno == EAGAIN || errno == EACCES ? -ERR_BUSY : 1;
	}
	for (size_t i = 0; i < ARRAY_LEN(theirs); i++) {
		struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = theirs[i], .l_len = 1};

		if (fcntl(fd, F_OFD_GETLK, &l) == 0 && l.l_type != F_UNLCK)
			return -ERR_BUSY;
	}
	return 0;
}

static uint64_t mtime_of(const struct stat *st)
{
	return (uint64_t)st->st_mtim.tv_sec * UINT64_C(1000000000) + (uint64_t)st->st_mtim.tv_nsec;
}

static int fingerprint(struct disk *d, uint64_t size, uint32_t *ret)
{
	uint64_t n = min_u64(size, FINGERPRINT_BYTES);
	_cleanup_free_ uint8_t *buf = malloc(FINGERPRINT_BYTES);
	uint32_t crc = 0;
	int rc;

	if (!buf)
		return -ERR_NOMEM;
	rc = disk_read(d, 0, buf, (size_t)n);
	if (rc == 0) {
		crc = crc32c(0, buf, (size_t)n);
		rc = disk_read(d, size - n, buf, (size_t)n);
	}
	if (rc == 0)
		*ret = crc32c(crc, buf, (size_t)n);
	return rc;
}

/* Finds `path`, which has to lie below the roots if they are given, and opens it. */
static int open_file(const char *path, const struct roots *roots, struct source_file *f, struct disk **ret,
		     struct err *e)
{
	_cleanup_close_ int found = open(path, O_PATH | O_CLOEXEC);
	char again[64];
	struct stat st;
	int fd, rc;

	if (found < 0)
		return errno == ENOENT || errno == ENOTDIR
			   ? err_set(e, ERR_FAILED, "there is no file %.200s; check its path", path)
			   : err_set(e, -err_from_errno(errno), "opening %.200s: %s", path, strerror(errno));
	if (fstat(found, &st) < 0 || (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)))
		return err_set(e, ERR_USAGE, "%.200s is neither a file nor a block device", path);
	rc = real_path_of(found, f->path);
	if (rc < 0)
		return err_set(e, -rc, "where %.200s lies can't be told: %s", path, err_short(rc));
	if (roots && !is_below(f->path, roots->dir[0]) && !is_below(f->path, roots->dir[1]))
		return err_set(e, ERR_PERM,
			       "its backing file %.150s lies outside the folder %.150s; allow its folder with "
			       "--backing-dir DIR",
			       f->path, roots->dir[0]);
	(void)snprintf(again, sizeof(again), "/proc/self/fd/%d", found);
	fd = open(again, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return err_set(e, -err_from_errno(errno), "opening %.200s: %s", path, strerror(errno));
	rc = lock_image(fd);
	if (rc == -ERR_BUSY) {
		(void)close(fd);
		return err_set(
		    e, ERR_BUSY,
		    "%.200s is open for writing in another process, such as a VM; end that first, or use a copy", path);
	}
	rc = disk_posix_take(fd, ret);
	if (rc == 0 && (rc = disk_get_size(*ret, &f->size)) == 0)
		rc = fingerprint(*ret, f->size, &f->crc);
	if (rc < 0)
		return err_set(e, -rc, "reading %.200s: %s", path, err_short(rc));
	f->mtime_ns = mtime_of(&st);
	f->dev = st.st_dev;
	f->ino = st.st_ino;
	return 0;
}

/* ---- names of backing files ---- */

/* "nbd://..." and the like: a colon before the first slash. */
static bool has_protocol(const char *name)
{
	return name[strcspn(name, ":/")] == ':';
}

/* The backing file's name in an image at `image` (as it was found) as a path; borrowed parts are copied. */
static int backing_path(const char *image, const char *name, char out[static SOURCE_PATH_MAX], struct err *e)
{
	const char *slash;
	int n;

	if (strncmp(name, "file:", 5) == 0)
		name += 5;
	else if (strncmp(name, "json:", 5) == 0 || has_protocol(name))
		return err_set(
		    e, ERR_NOTSUP,
		    "%.150s: its backing file is %.150s, and only files are followed; convert it first: qemu-img "
		    "convert",
		    image, name);
	slash = strrchr(image, '/');
	if (name[0] == '/' || !slash)
		n = snprintf(out, SOURCE_PATH_MAX, "%s", name);
	else
		n = snprintf(out, SOURCE_PATH_MAX, "%.*s/%s", (int)(slash - image), image, name);
	if (n < 0 || n >= SOURCE_PATH_MAX)
		return err_set(e, ERR_LIMIT, "%.150s: the path of its backing file is too long", image);
	return 0;
}

/* The real path of the folder that `path` stands in. */
static int folder_of(const char *path, char out[static SOURCE_PATH_MAX], struct err *e)
{
	char dir[SOURCE_PATH_MAX];
	_cleanup_free_ char *real = NULL;
	const char *slash = strrchr(path, '/');
	int n;

	if (!slash)
		n = snprintf(dir, sizeof(dir), ".");
	else
		n = snprintf(dir, sizeof(dir), "%.*s", slash == path ? 1 : (int)(slash - path), path);
	if (n < 0 || n >= (int)sizeof(dir))
		return err_set(e, ERR_LIMIT, "%.200s...: the path is too long", path);
	real = realpath(dir, NULL);
	if (!real)
		return err_set(e, ERR_FAILED, "%.200s: its folder: %s", path, strerror(errno));
	n = snprintf(out, SOURCE_PATH_MAX, "%s", real);
	return n < 0 || n >= SOURCE_PATH_MAX ? err_set(e, ERR_LIMIT, "%.200s...: the path is too long", path) : 0;
}

static int open_backing_dir(const char *dir, char out[static SOURCE_PATH_MAX], struct err *e)
{
	_cleanup_free_ char *real = realpath(dir, NULL);
	struct stat st;

	if (!real || stat(real, &st) < 0 || !S_ISDIR(st.st_mode) || strlen(real) >= SOURCE_PATH_MAX)
		return err_set(e, ERR_USAGE, "--backing-dir %.200s: %s", dir, real ? "not a folder" : strerror(errno));
	(void)snprintf(out, SOURCE_PATH_MAX, "%s", real);
	return 0;
}

/* ---- the chain ---- */

/* What the file is taken as. wanted: NULL, or what has to be there. named: it may be a compressed backup, which is
 * nobody's backing file. */
static int pick_format(const char *path, struct disk *d, uint64_t size, const char *wanted, bool named,
		       const char **ret, struct err *e)
{
	uint8_t head[8];
	const char *found;
	int rc = disk_read(d, 0, head, sizeof(head));

	if (rc < 0)
		return err_set(e, -rc, "reading %.200s: %s", path, err_short(rc));
	found = size >= sizeof(head) ? qcow_magic(head) : NULL;
	if (!found && named && size >= sizeof(head) && zst_magic(head))
		found = "zst";
	if (!wanted)
		*ret = found ? found : "raw";
	else if (strcmp(wanted, "raw") == 0)
		*ret = "raw";
	else if (strcmp(wanted, "qcow") != 0 && strcmp(wanted, "qcow2") != 0 && !(named && strcmp(wanted, "zst") == 0))
		return err_set(e, ERR_NOTSUP, "%.200s has the format %.20s, which is not read; raw, qcow and qcow2 are",
			       path, wanted);
	else if (!found || strcmp(found, wanted) != 0)
		return err_set(e, ERR_NOTSUP, "%.200s is no %s image: by its first bytes it is %s", path, wanted,
			       found ? found : "raw");
	else
		*ret = found;
	return 0;
}

static bool is_repeated(const struct source *s, const struct source_file *f)
{
	for (uint32_t i = 0; i < s->n_files; i++)
		if (s->files[i].dev == f->dev && s->files[i].ino == f->ino)
			return true;
	return false;
}

/* Opens the file at `path` as the next of the chain. */
static int open_level(struct opening *o, const char *path, const char *wanted, struct err *e)
{
	struct source *s = o->s;
	struct source_file *f = &s->files[s->n_files];
	struct level *l = &o->level[s->n_files];
	struct disk *file = NULL;
	int rc = open_file(path, s->n_files ? &o->roots : NULL, f, &file, e);

	if (rc == 0 && is_repeated(s, f))
		rc = err_set(e, ERR_CORRUPT,
			     "%.200s stands twice in its chain of backing files: they go round in a circle", path);
	if (rc == 0)
		rc = pick_format(path, file, f->size, wanted, s->n_files == 0, &f->format, e);
	if (rc < 0) {
		disk_close(file);
		return rc;
	}
	l->qcow = strncmp(f->format, "qcow", 4) == 0;
	if (l->qcow)
		rc = qcow_open(file, path, &l->disk, &l->info, e);
	else if (strcmp(f->format, "zst") == 0)
		rc = disk_zst_open(file, path, &l->disk, e);
	else
		l->disk = file;
	if (rc < 0)
		return rc;
	if (l->qcow)
		f->crc = crc32c(f->crc, &l->info.l1_crc, sizeof(l->info.l1_crc));
	s->n_files++;
	return 0;
}

static int open_chain(struct opening *o, const char *path, const char *format, struct err *e)
{
	char at[SOURCE_PATH_MAX], next[SOURCE_PATH_MAX];
	struct source *s = o->s;
	int rc = open_level(o, path, format, e);

	(void)snprintf(at, sizeof(at), "%s", path);
	while (rc == 0) {
		const struct level *l = &o->level[s->n_files - 1];
		const char *wanted = l->info.backing_format[0] ? l->info.backing_format : NULL;

		if (!l->qcow || !l->info.backing[0])
			return 0;
		if (s->n_files == SOURCE_FILES_MAX)
			return err_set(e, ERR_LIMIT,
				       "%.200s has a chain of more than %u backing files; shorten it: qemu-img "
				       "rebase or commit",
				       path, SOURCE_FILES_MAX - 1);
		rc = backing_path(at, l->info.backing, next, e);
		if (rc == 0)
			rc = open_level(o, next, wanted, e);
		(void)snprintf(at, sizeof(at), "%s", next);
	}
	return rc;
}

/* Puts each file over the next, the deepest first. */
static int join_chain(struct opening *o, struct err *e)
{
	struct source *s = o->s;
	struct disk *below = NULL;

	for (uint32_t i = s->n_files; i-- > 0;) {
		struct level *l = &o->level[i];
		int rc = l->qcow ? qcow_attach(l->disk, below, QCOW_INFLATED_BYTES_MAX / s->n_files) : 0;

		below = TAKE_PTR(l->disk);
		if (rc < 0) {
			disk_close(below);
			return err_set(e, -rc, "%.200s: %s", s->files[i].path, err_short(rc));
		}
	}
	s->disk = below;
	return disk_get_size(below, &s->size);
}

int source_open(const char *path, const char *format, const char *backing_dir, struct source **ret, struct err *e)
{
	_cleanup_free_ struct opening *o = calloc(1, sizeof(*o));
	struct source *s = calloc(1, sizeof(*s));
	int rc = 0;

	if (!o || !s) {
		free(s);
		return err_set(e, ERR_NOMEM, "%.200s: %s", path, err_short(ERR_NOMEM));
	}
	o->s = s;
	if (backing_dir)
		rc = open_backing_dir(backing_dir, o->roots.dir[1], e);
	if (rc == 0)
		rc = folder_of(path, o->roots.dir[0], e);
	if (rc == 0)
		rc = open_chain(o, path, format, e);
	if (rc == 0)
		rc = join_chain(o, e);
	if (rc < 0) {
		for (uint32_t i = 0; i < SOURCE_FILES_MAX; i++)
			disk_close(o->level[i].disk);
		source_close(s);
		return rc;
	}
	s->format = s->files[0].format;
	*ret = s;
	return 0;
}

void source_close(struct source *s)
{
	if (!s)
		return;
	disk_close(s->disk);
	free(s);
}

int source_check(struct source *s, struct err *e)
{
	struct disk *d = s->disk;
	int rc = 0;

	for (; rc == 0 && d && qcow_is(d); d = qcow_backing(d))
		rc = qcow_check(d, e);
	return rc;
}

int source_unchanged(struct source *s, struct err *e)
{
	for (uint32_t i = 0; i < s->n_files; i++) {
		const struct source_file *f = &s->files[i];
		struct stat st;

		if (stat(f->path, &st) < 0 || st.st_dev != f->dev || st.st_ino != f->ino ||
		    mtime_of(&st) != f->mtime_ns || (S_ISREG(st.st_mode) && (uint64_t)st.st_size != f->size))
			return err_set(e, ERR_FAILED, "%.300s changed while it was read", f->path);
	}
	return 0;
}

int source_explain(struct source *s, uint64_t off, int rc, struct err *e)
{
	if (qcow_is(s->disk))
		return qcow_explain(s->disk, off, rc, e);
	return err_set(e, -rc, "reading %.300s at byte %" PRIu64 ": %s", s->files[0].path, off, err_short(rc));
}
