/* Durability: the content (fsync), then the name (link or rename, fsync of the folder). A crash between leaves no name,
 * or the name of a whole file.
 */
#include "image/newfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/os/io.h"

#define DIR_SIZE 4096

static int no_file(const struct newfile *f, int sys, const char *name, struct err *e)
{
	int rc = err_from_errno(sys);

	/* Exit code 4 is for what repfs knows by name. */
	return err_set(e, rc == -ERR_NOENT ? ERR_FAILED : -rc,
		       "%s %s: making %s: %s; its folder must exist and be writable", f->what, f->path, name,
		       err_short(rc));
}

static int open_named(struct newfile *f, struct err *e)
{
	if (asprintf(&f->part, "%s.part", f->path) < 0) {
		f->part = NULL;
		return err_set(e, ERR_NOMEM, "%s %s: out of memory", f->what, f->path);
	}
	f->fd = open(f->part, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (f->fd >= 0)
		return 0;
	int sys = errno;
	int rc = sys == EEXIST ? err_set(e, ERR_EXIST,
					 "%s %s: %s is in the way; another one is writing it, or one was cut off: then "
					 "remove it",
					 f->what, f->path, f->part)
			       : no_file(f, sys, f->part, e);
	free(f->part); /* not ours */
	f->part = NULL;
	return rc;
}

int newfile_make(const char *what, const char *path, unsigned flags, struct newfile *ret, struct err *e)
{
	struct newfile f = {.what = what, .fd = -1};
	char dir[DIR_SIZE];
	struct stat st;
	int rc = 0;

	if (strlen(path) >= DIR_SIZE)
		return err_set(e, ERR_USAGE, "%s %.80s...: the path is longer than %d bytes", what, path, DIR_SIZE - 1);
	if (lstat(path, &st) == 0)
		return err_set(e, ERR_EXIST, "%s %s: the file exists; choose another name or remove it", what, path);
	f.path = strdup(path);
	if (!f.path)
		return err_set(e, ERR_NOMEM, "%s %s: out of memory", what, path);
	io_dirname(path, dir, sizeof(dir));
	/* An overlong or empty last part would be noticed only at the end. */
	const char *base = strrchr(path, '/');
	base = base ? base + 1 : path;
	if (*base == 0 || strlen(base) > 255)
		rc = err_set(e, ERR_USAGE, "%s %s: that is no file's name", what, path);
	if (rc == 0 && !(flags & NEWFILE_NAMED) && access("/proc/self/fd", F_OK) == 0) /* what gives it its name */
		f.fd = open(dir, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
	if (rc == 0 && f.fd < 0) {
		/* ENOENT from a kernel that knows the flag says that the folder is not there, as open_named will. */
		rc = open_named(&f, e);
	}
	if (rc < 0) {
		free(f.path);
		return rc;
	}
	*ret = f;
	return 0;
}

/* 0 or a positive errno. */
static int rename_new(const char *from, const char *to)
{
	struct stat st;

	if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0)
		return 0;
	if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP)
		return errno;
	/* A filesystem without that flag: a hard link does not replace either. */
	if (link(from, to) == 0) {
		(void)unlink(from);
		return 0;
	}
	if (errno == EEXIST)
		return errno;
	/* One without hard links too. */
	if (lstat(to, &st) == 0)
		return EEXIST;
	return rename(from, to) == 0 ? 0 : errno;
}

static int give_name(const struct newfile *f)
{
	char self[64];

	if (f->part)
		return rename_new(f->part, f->path);
	(void)snprintf(self, sizeof(self), "/proc/self/fd/%d", f->fd);
	return linkat(AT_FDCWD, self, AT_FDCWD, f->path, AT_SYMLINK_FOLLOW) == 0 ? 0 : errno;
}

int newfile_commit(struct newfile *f, struct err *e)
{
	char dir[DIR_SIZE];
	int rc = 0, sys;

	if (fsync(f->fd) < 0) {
		sys = errno;
		return err_set(e, -err_from_errno(sys), "%s %s: syncing it: %s", f->what, f->path, strerror(sys));
	}
	sys = give_name(f);
	if (sys == EEXIST)
		return err_set(e, ERR_EXIST, "%s %s: the file exists by now; choose another name", f->what, f->path);
	if (sys)
		return err_set(e, -err_from_errno(sys), "%s %s: giving it its name: %s", f->what, f->path,
			       strerror(sys));
	free(f->part);
	f->part = NULL;
	io_dirname(f->path, dir, sizeof(dir));
	rc = io_fsync_dir(dir);
	if (rc < 0) {
		(void)unlink(f->path);
		return err_set(e, -rc, "%s %s: syncing folder %s: %s", f->what, f->path, dir, err_short(rc));
	}
	newfile_drop(f);
	return 0;
}

void newfile_drop(struct newfile *f)
{
	if (!f->path)
		return;
	(void)close(f->fd);
	if (f->part)
		(void)unlink(f->part);
	free(f->part);
	free(f->path);
	*f = (struct newfile){.fd = -1};
}
