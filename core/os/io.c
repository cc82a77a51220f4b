/* Whole-range file I/O (core/os/io.h): a short transfer is carried on, EINTR is tried again, everything else is the
 * caller's, once. Nothing here tries a failed sync again (I10). */
#include "core/os/io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/cleanup.h"

/* The first allocation for a file whose size is not known (pipes, /proc). */
#define READ_FILE_STEP 4096U

static bool range_fits(size_t len, uint64_t off)
{
	return off <= INT64_MAX && len <= INT64_MAX - off;
}

int io_pread(int fd, void *buf, size_t len, uint64_t off)
{
	uint8_t *p = buf;

	if (!range_fits(len, off))
		return -ERR_RANGE;
	while (len > 0) {
		ssize_t n = pread(fd, p, len, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return err_from_errno(errno);
		if (n == 0) {
			memset(p, 0, len);
			return 0;
		}
		p += n;
		len -= (size_t)n;
		off += (uint64_t)n;
	}
	return 0;
}

int io_pwrite(int fd, const void *buf, size_t len, uint64_t off)
{
	const uint8_t *p = buf;

	if (!range_fits(len, off))
		return -ERR_RANGE;
	while (len > 0) {
		ssize_t n = pwrite(fd, p, len, (off_t)off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return err_from_errno(errno);
		if (n == 0) /* would go on for ever */
			return -ERR_IO;
		p += n;
		len -= (size_t)n;
		off += (uint64_t)n;
	}
	return 0;
}

/* What an error on a stream means: the other end is gone, or a time limit set on the descriptor ran out. */
static int stream_error(int sys)
{
	switch (sys) {
	case EPIPE:
	case ECONNRESET:
		return -ERR_PEER;
	case EAGAIN:
		return -ERR_TIMEOUT;
	default:
		return err_from_errno(sys);
	}
}

int io_read_full(int fd, void *buf, size_t len)
{
	uint8_t *p = buf;

	while (len > 0) {
		ssize_t n = read(fd, p, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return stream_error(errno);
		if (n == 0)
			return -ERR_PEER;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

int io_write_full(int fd, const void *buf, size_t len)
{
	const uint8_t *p = buf;

	while (len > 0) {
		ssize_t n = write(fd, p, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return stream_error(errno);
		if (n == 0)
			return -ERR_IO;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

int io_fsync_dir(const char *path)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return err_from_errno(errno);
	if (fsync(fd) < 0)
		return err_from_errno(errno);
	return 0;
}

void io_dirname(const char *path, char *dir, size_t size)
{
	size_t n = strlen(path);

	PRE(size > 1);
	while (n > 1 && path[n - 1] == '/')
		n--;
	while (n > 0 && path[n - 1] != '/')
		n--;
	while (n > 1 && path[n - 1] == '/')
		n--;
	if (n == 0) {
		memcpy(dir, ".", 2);
		return;
	}
	/* A path cut short would name another folder; no name at all can't be opened. */
	if (n >= size)
		n = 0;
	memcpy(dir, path, n);
	dir[n] = '\0';
}

int io_read_file(const char *path, size_t max, char **ret, size_t *ret_len)
{
	_cleanup_close_ int fd = open(path, O_RDONLY | O_CLOEXEC);
	_cleanup_free_ char *data = NULL;
	size_t size = 0;
	size_t len = 0;

	PRE(max < SIZE_MAX / 2);
	if (fd < 0)
		return err_from_errno(errno);
	/* By reading, not by st_size: that is 0 for pipes and /proc, and may change. One byte above max decides. */
	while (len <= max) {
		if (len == size) {
			size = size == 0 ? READ_FILE_STEP : size * 2;
			if (size > max + 1)
				size = max + 1;
			char *more = realloc(data, size + 1);

			if (more == NULL)
				return -ERR_NOMEM;
			data = more;
		}
		ssize_t n = read(fd, data + len, size - len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return err_from_errno(errno);
		if (n == 0) {
			data[len] = '\0';
			if (ret_len != NULL)
				*ret_len = len;
			*ret = TAKE_PTR(data);
			return 0;
		}
		len += (size_t)n;
	}
	return -ERR_LIMIT;
}
