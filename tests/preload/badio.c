/* A preloaded library that makes file operations of a program fail: bad disks for the e2e tests.
 *
 * $REPFS_BADIO names a file of rules, looked at before each operation, one rule a line: OPS CODE PATTERN. OPS are
 * letters: r (read), w (write), s (sync of a file or folder), o (making or opening a file for writing); CODE is an
 * errno; PATTERN is an fnmatch pattern of the whole path. An absent or empty file: nothing fails. A failed write has
 * written nothing, a failed sync has synced nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static bool rule_fails(char op, const char *path)
{
	const char *file = getenv("REPFS_BADIO");
	struct stat st;
	if (file == NULL || stat(file, &st) < 0 || st.st_size == 0)
		return false;
	FILE *f = fopen(file, "re");
	char ops[16], pattern[PATH_MAX];
	int code;
	bool fails = false;
	while (f && !fails && fscanf(f, "%15s %d %4095s", ops, &code, pattern) == 3)
		if (strchr(ops, op) && fnmatch(pattern, path, 0) == 0) {
			fails = true;
			errno = code;
		}
	int keep = errno;
	if (f)
		(void)fclose(f);
	errno = keep;
	return fails;
}

static bool fd_fails(char op, int fd)
{
	char link[64], path[PATH_MAX];
	int keep = errno;
	(void)snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof(path) - 1);
	errno = keep;
	if (n <= 0)
		return false;
	path[n] = 0;
	return rule_fails(op, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pread64(int fd, void *buf, size_t n, off64_t off)
{
	return fd_fails('r', fd) ? -1 : REAL(pread64)(fd, buf, n, off);
}

ssize_t pwrite64(int fd, const void *buf, size_t n, off64_t off)
{
	return fd_fails('w', fd) ? -1 : REAL(pwrite64)(fd, buf, n, off);
}

int fallocate64(int fd, int mode, off64_t off, off64_t len)
{
	return fd_fails('w', fd) ? -1 : REAL(fallocate64)(fd, mode, off, len);
}

int fdatasync(int fd)
{
	return fd_fails('s', fd) ? -1 : REAL(fdatasync)(fd);
}

int fsync(int fd)
{
	return fd_fails('s', fd) ? -1 : REAL(fsync)(fd);
}

int openat64(int dir, const char *path, int flags, ...)
{
	mode_t mode = 0;
	if (flags & (O_CREAT | O_TMPFILE)) {
		va_list ap;
		va_start(ap, flags);
		mode = va_arg(ap, mode_t);
		va_end(ap);
	}
	char folder[PATH_MAX], whole[2 * PATH_MAX], link[64];
	if ((flags & O_CREAT) && dir >= 0 && path[0] != '/') {
		(void)snprintf(link, sizeof(link), "/proc/self/fd/%d", dir);
		ssize_t n = readlink(link, folder, sizeof(folder) - 1);
		folder[n > 0 ? n : 0] = 0;
		(void)snprintf(whole, sizeof(whole), "%s/%s", folder, path);
		if (rule_fails('o', whole))
			return -1;
	}
	return REAL(openat64)(dir, path, flags, mode);
}
