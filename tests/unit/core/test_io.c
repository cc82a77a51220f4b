/* Whole-range file I/O and the clock: ends of files, other ends that are gone, limits, and paths. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/io.h"

#define POISON 0xa5

/* An open file that has no name any more. */
static int scratch_fd(void)
{
	char path[] = "/tmp/test_io.XXXXXX";
	int fd = mkstemp(path);

	cr_assert_geq(fd, 0);
	cr_assert_eq(unlink(path), 0);
	return fd;
}

Test(io, pread_past_the_end_gives_zeroes)
{
	int fd = scratch_fd();
	uint8_t b[16];

	cr_assert_eq(io_pwrite(fd, "abcdef", 6, 10), 0);
	memset(b, POISON, sizeof(b));
	cr_assert_eq(io_pread(fd, b, 10, 8), 0);
	cr_assert_eq(memcmp(b, "\0\0abcdef\0\0", 10), 0);
	for (size_t i = 10; i < sizeof(b); i++)
		cr_assert_eq(b[i], POISON);
	memset(b, POISON, sizeof(b));
	cr_assert_eq(io_pread(fd, b, 4, 1000000), 0);
	cr_assert_arr_eq(b, ((uint8_t[]){0, 0, 0, 0, POISON}), 5);
	cr_assert_eq(io_pread(fd, b, 0, 0), 0);
	(void)close(fd);
}

Test(io, offsets_that_overflow_are_refused)
{
	int fd = scratch_fd();
	uint8_t b[8] = {0};

	cr_assert_eq(io_pread(fd, b, 8, UINT64_MAX - 4), -ERR_RANGE);
	cr_assert_eq(io_pwrite(fd, b, 8, (uint64_t)INT64_MAX - 4), -ERR_RANGE);
	cr_assert_eq(lseek(fd, 0, SEEK_END), 0);
	(void)close(fd);
}

Test(io, errors_come_back)
{
	int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	int full = open("/dev/full", O_RDWR | O_CLOEXEC);
	uint8_t b[8] = {0};

	cr_assert_eq(io_pwrite(fd, b, 8, 0), -ERR_IO);
	cr_assert_eq(io_write_full(full, b, 8), -ERR_NOSPC);
	cr_assert_eq(io_pread(-1, b, 8, 0), -ERR_IO);
	cr_assert_eq(io_read_full(-1, b, 8), -ERR_IO);
	(void)close(fd);
	(void)close(full);
}

struct feeder {
	int fd;
	size_t total;
};

/* In small pieces of changing size, so that the reader gets short reads. */
static void *feed(void *arg)
{
	struct feeder *f = arg;
	uint8_t piece[97];

	for (size_t at = 0; at < f->total;) {
		size_t n = 1 + at % sizeof(piece);

		n = n < f->total - at ? n : f->total - at;
		for (size_t i = 0; i < n; i++)
			piece[i] = (uint8_t)((at + i) * 7);
		if (io_write_full(f->fd, piece, n) < 0)
			break;
		at += n;
	}
	(void)close(f->fd);
	return NULL;
}

Test(io, read_full_carries_on_and_says_when_the_end_came_too_early, .timeout = 60)
{
	enum { TOTAL = 200000 };
	uint8_t *b = malloc(TOTAL + 1);
	pthread_t thread;
	int fds[2];

	cr_assert_not_null(b);
	memset(b, POISON, TOTAL + 1);
	cr_assert_eq(pipe(fds), 0);
	struct feeder f = {.fd = fds[1], .total = TOTAL};
	cr_assert_eq(pthread_create(&thread, NULL, feed, &f), 0);
	cr_assert_eq(io_read_full(fds[0], b, TOTAL - 10), 0);
	for (size_t i = 0; i < TOTAL - 10; i++)
		cr_assert_eq(b[i], (uint8_t)(i * 7));
	cr_assert_eq(b[TOTAL - 10], POISON);
	cr_assert_eq(io_read_full(fds[0], b, 11), -ERR_PEER);
	cr_assert_eq(pthread_join(thread, NULL), 0);
	(void)close(fds[0]);
	free(b);
}

Test(io, write_full_to_a_peer_that_is_gone)
{
	int fds[2];

	(void)signal(SIGPIPE, SIG_IGN);
	cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	(void)close(fds[1]);
	cr_assert_eq(io_write_full(fds[0], "x", 1), -ERR_PEER);
	(void)close(fds[0]);
}

Test(io, a_descriptor_s_time_limit_is_a_timeout)
{
	struct timeval limit = {.tv_usec = 20000};
	uint8_t b[1];
	int fds[2];

	cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	cr_assert_eq(setsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)), 0);
	cr_assert_eq(io_read_full(fds[0], b, 1), -ERR_TIMEOUT);
	(void)close(fds[0]);
	(void)close(fds[1]);
}

Test(io, dirname)
{
	const struct {
		const char *path, *dir;
	} cases[] = {
	    {"/a/b/c", "/a/b"}, {"/a", "/"}, {"/", "/"},  {"a", "."}, {"a/b", "a"},   {"a/b/", "a"},
	    {"a//b", "a"},	{"a/", "."}, {"//", "/"}, {"", "."},  {"../x", ".."}, {"./x/y", "./x"},
	};

	for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
		char dir[16];

		memset(dir, POISON, sizeof(dir));
		io_dirname(cases[i].path, dir, sizeof(dir));
		cr_assert_str_eq(dir, cases[i].dir, "of '%s': '%s'", cases[i].path, dir);
	}
}

Test(io, dirname_that_does_not_fit_names_nothing)
{
	char dir[8];

	memset(dir, 'x', sizeof(dir));
	io_dirname("/sevench/x", dir, sizeof(dir));
	cr_assert_str_eq(dir, "");
	io_dirname("/sixchr/x", dir, sizeof(dir));
	cr_assert_str_eq(dir, "/sixchr");
}

Test(io, fsync_dir)
{
	cr_assert_eq(io_fsync_dir("/tmp"), 0);
	cr_assert_eq(io_fsync_dir("/nonexistent/folder"), -ERR_NOENT);
	cr_assert_eq(io_fsync_dir("/dev/null"), -ERR_IO);
}

static void write_file(const char *path, size_t n)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	cr_assert_geq(fd, 0);
	for (size_t i = 0; i < n; i++)
		cr_assert_eq(io_write_full(fd, &(uint8_t){(uint8_t)(i * 13)}, 1), 0);
	(void)close(fd);
}

Test(io, read_file)
{
	const size_t sizes[] = {0, 1, 4095, 4096, 4097, 8192, 20000};
	char path[] = "/tmp/test_io.XXXXXX";
	char *data = NULL;
	size_t len = 0;
	int fd = mkstemp(path);

	cr_assert_geq(fd, 0);
	(void)close(fd);
	for (size_t i = 0; i < ARRAY_LEN(sizes); i++) {
		size_t n = sizes[i];

		write_file(path, n);
		for (size_t max = n; max < n + 2; max++) {
			cr_assert_eq(io_read_file(path, max, &data, &len), 0);
			cr_assert_eq(len, n);
			cr_assert_eq(data[n], '\0');
			for (size_t k = 0; k < n; k++)
				cr_assert_eq((uint8_t)data[k], (uint8_t)(k * 13));
			free(data);
		}
		data = (char *)path;
		len = 4711;
		if (n > 0)
			cr_assert_eq(io_read_file(path, n - 1, &data, &len), -ERR_LIMIT);
		cr_assert_eq(data, path);
		cr_assert_eq(len, 4711U);
	}
	(void)unlink(path);
	cr_assert_eq(io_read_file(path, 100, &data, &len), -ERR_NOENT);
	cr_assert_eq(io_read_file("/tmp", 100, &data, &len), -ERR_IO);
	/* A file that says its size is 0. */
	cr_assert_eq(io_read_file("/proc/self/status", 1U << 20, &data, NULL), 0);
	cr_assert_not_null(strstr(data, "Name:"));
	free(data);
}

Test(clock, format)
{
	char text[32];

	memset(text, 'x', sizeof(text));
	clock_format(0, text, sizeof(text));
	cr_assert_str_eq(text, "1970-01-01T00:00:00.000Z");
	clock_format(UINT64_C(951827696) * NS_PER_SEC + UINT64_C(789999999), text, sizeof(text));
	cr_assert_str_eq(text, "2000-02-29T12:34:56.789Z");
	clock_format(UINT64_MAX, text, sizeof(text));
	cr_assert_str_eq(text, "2554-07-21T23:34:33.709Z");
	clock_format(0, text, 5);
	cr_assert_str_eq(text, "1970");
}

Test(clock, goes_on)
{
	uint64_t a = clock_mono_ns();
	uint64_t b = clock_mono_ns();

	cr_assert_geq(b, a);
	cr_assert_gt(clock_wall_ns(), UINT64_C(1600000000) * NS_PER_SEC);
}

Test(clock, random)
{
	uint8_t b[300];
	size_t unlike = 0;

	memset(b, POISON, sizeof(b));
	random_bytes(b, sizeof(b) - 1);
	for (size_t i = 0; i < sizeof(b) - 1; i++)
		unlike += b[i] != POISON;
	cr_assert_gt(unlike, 250U);
	cr_assert_eq(b[sizeof(b) - 1], POISON);
	cr_assert_neq(random_u64_nonzero(), random_u64_nonzero());
}
