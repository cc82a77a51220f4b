/* net/ctl.c: requests good and bad, clients that hang up, half-close, stall or flood, the socket file itself. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "net/ctl.h"

#define WAIT_MS 60000

static char dir[PATH_MAX], sock[PATH_MAX];
static struct ctl_server *server;

/* What the handler does is chosen by the verb; what it saw is kept here. */
static atomic_int running, canceled, freed;
static atomic_bool release_wait;

static int handle(void *arg, struct ctl_conn *c, const char *verb, const json_t *args, json_t **ret, struct err *e)
{
	if (arg != &server)
		return err_set(e, ERR_CORRUPT, "not the argument that was given");
	if (strcmp(verb, "echo") == 0) {
		*ret = json_pack("{s:i, s:O}", "schema", 1, "args", args);
		return 0;
	}
	if (strcmp(verb, "nothing") == 0)
		return 0;
	if (strcmp(verb, "refuse") == 0) {
		*ret = json_object(); /* dropped */
		return err_set(e, ERR_STATE, "refuse vm1: this host is primary for it");
	}
	if (strcmp(verb, "silent") == 0)
		return -ERR_NOSPC;
	if (strcmp(verb, "latin1") == 0)
		return err_set(e, ERR_NOENT, "no such file: caf\xe9");
	if (strcmp(verb, "split") == 0) {
		char text[ERR_TEXT_MAX * 2];

		memset(text, 'x', sizeof text);
		text[ERR_TEXT_MAX - 2] = '\xc3'; /* the limit cuts the character in two */
		text[ERR_TEXT_MAX - 1] = '\xa9';
		text[sizeof text - 1] = '\0';
		return err_set(e, ERR_FAILED, "%s", text);
	}
	if (strcmp(verb, "progress") == 0) {
		json_int_t n = json_integer_value(json_object_get(args, "n"));

		for (json_int_t i = 0; i < n; i++)
			if (ctl_progress(c, json_pack("{s:I}", "done", i)))
				return err_set(e, ERR_PEER, "gone");
		return 0;
	}
	if (strcmp(verb, "flood") == 0) {
		/* For a client that does not read: must end all the same. */
		json_t *big = json_pack("{s:s%}", "text", "y", (size_t)1);

		atomic_fetch_add(&running, 1);
		for (int i = 0; i < 3; i++) {
			char *text = malloc(1 << 20);

			memset(text, 'z', 1 << 20);
			(void)ctl_progress(c, json_pack("{s:s%}", "text", text, (size_t)(150 << 10)));
			free(text);
		}
		for (int i = 0; i < 1000 && !ctl_canceled(c); i++)
			(void)ctl_progress(c, json_incref(big));
		json_decref(big);
		atomic_fetch_add(&freed, 1);
		/* More than the socket has room for. */
		*ret = json_array();
		for (int i = 0; i < 100000; i++)
			json_array_append_new(*ret, json_integer(i));
		return 0;
	}
	if (strcmp(verb, "large") == 0) {
		size_t n = (size_t)json_integer_value(json_object_get(args, "n"));
		char *text = malloc(n);

		memset(text, 'L', n);
		*ret = json_pack("{s:s%}", "text", text, n);
		free(text);
		return 0;
	}
	if (strcmp(verb, "wait") == 0) {
		atomic_fetch_add(&running, 1);
		while (!ctl_canceled(c) && !atomic_load(&release_wait))
			(void)usleep(2000);
		if (ctl_canceled(c))
			atomic_fetch_add(&canceled, 1);
		atomic_fetch_sub(&running, 1);
		*ret = json_pack("{s:b}", "canceled", ctl_canceled(c));
		return 0;
	}
	return err_set(e, ERR_USAGE, "no such verb: %s", verb);
}

static bool becomes(atomic_int *value, int want)
{
	uint64_t deadline = clock_mono_ns() + WAIT_MS * NS_PER_MS;

	while (atomic_load(value) != want) {
		if (clock_mono_ns() > deadline)
			return false;
		(void)usleep(1000);
	}
	return true;
}

static void start(void)
{
	struct err e = {0};

	cr_assert_eq(ctl_server_start(sock, handle, &server, &server, &e), 0, "%s", e.text);
}

static void before(void)
{
	const char *tmp = getenv("TMPDIR");

	(void)snprintf(dir, sizeof dir, "%s/repfs-ctl-XXXXXX", tmp && strlen(tmp) < 60 ? tmp : "/tmp");
	cr_assert(mkdtemp(dir));
	(void)snprintf(sock, sizeof sock, "%.200s/control.sock", dir);
	start();
}

static void after(void)
{
	char cmd[PATH_MAX + 16];

	ctl_server_stop(server);
	(void)snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
	cr_assert_eq(system(cmd), 0);
}

TestSuite(ctl, .init = before, .fini = after, .timeout = 300);

/* ---- raw client ---- */

static int raw_connect(void)
{
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	struct timeval limit = {.tv_sec = WAIT_MS / 1000};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	(void)snprintf(un.sun_path, sizeof un.sun_path, "%.100s", sock);
	cr_assert_eq(connect(fd, (struct sockaddr *)&un, sizeof un), 0);
	cr_assert_eq(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit), 0);
	return fd;
}

static bool raw_write(int fd, const char *p, size_t n)
{
	while (n > 0) {
		ssize_t w = send(fd, p, n, MSG_NOSIGNAL);

		if (w <= 0)
			return false;
		p += w;
		n -= (size_t)w;
	}
	return true;
}

/* The next line, owned, without its newline; NULL at the end. */
static char *raw_line(int fd)
{
	size_t n = 0, size = 4096;
	char *line = malloc(size);

	for (;;) {
		if (recv(fd, line + n, 1, 0) != 1) {
			free(line);
			return NULL;
		}
		if (line[n] == '\n') {
			line[n] = '\0';
			return line;
		}
		if (++n == size)
			line = realloc(line, size *= 2);
	}
}

static void expect_error(int fd, const char *code, const char *text)
{
	char *line = raw_line(fd);
	json_t *j;

	cr_assert(line, "no answer; expected %s", code);
	j = json_loads(line, 0, NULL);
	cr_assert(j, "%s", line);
	cr_assert(json_is_false(json_object_get(j, "ok")), "%s", line);
	cr_assert_str_eq(json_string_value(json_object_get(j, "code")), code, "%s", line);
	cr_assert(strstr(json_string_value(json_object_get(j, "message")), text), "%s", line);
	json_decref(j);
	free(line);
}

static void expect_bytes(int fd, const char *want)
{
	char *line = raw_line(fd);

	cr_assert(line);
	cr_assert_str_eq(line, want);
	free(line);
}

/* ---- answers ---- */

Test(ctl, answers_byte_for_byte)
{
	int fd = raw_connect();
	static const char requests[] = "{\"verb\":\"echo\",\"args\":{\"name\":\"vm1\"}}\n"
				       "{\"verb\":\"echo\"}\r\n"
				       "{\"verb\":\"nothing\",\"args\":{}}\n"
				       "{\"verb\":\"refuse\"}\n"
				       "{\"verb\":\"progress\",\"args\":{\"n\":2}}\n";

	/* All in one piece: one connection carries requests one after another. */
	cr_assert(raw_write(fd, requests, sizeof requests - 1));
	expect_bytes(fd, "{\"ok\":true,\"result\":{\"schema\":1,\"args\":{\"name\":\"vm1\"}}}");
	expect_bytes(fd, "{\"ok\":true,\"result\":{\"schema\":1,\"args\":{}}}");
	expect_bytes(fd, "{\"ok\":true,\"result\":{}}");
	expect_bytes(
	    fd,
	    "{\"ok\":false,\"code\":\"ERR_STATE\",\"exit\":5,\"message\":\"refuse vm1: this host is primary for it\"}");
	expect_bytes(fd, "{\"progress\":{\"done\":0}}");
	expect_bytes(fd, "{\"progress\":{\"done\":1}}");
	expect_bytes(fd, "{\"ok\":true,\"result\":{}}");
	(void)close(fd);
}

Test(ctl, a_request_may_come_in_pieces)
{
	static const char request[] = "{\"verb\":\"nothing\"}\n{\"verb\":\"silent\"}\n";
	int fd = raw_connect();

	for (size_t i = 0; i < sizeof request - 1; i++)
		cr_assert(raw_write(fd, request + i, 1));
	expect_bytes(fd, "{\"ok\":true,\"result\":{}}");
	expect_error(fd, "ERR_NOSPC", "no space left");
	(void)close(fd);
}

Test(ctl, bad_requests_are_answered_and_the_connection_goes_on)
{
	static const struct {
		const char *line, *text;
	} bad[] = {
	    {"", "not valid JSON"},
	    {"hello", "not valid JSON"},
	    {"{\"verb\":\"nothing\"", "not valid JSON"},
	    {"{\"verb\":\"nothing\"} x", "not valid JSON"},
	    {"{\"verb\":\"nothing\",\"verb\":\"echo\"}", "not valid JSON"},
	    {"{\"verb\":\"nothing\",\"args\":{\"a\":\"\xff\"}}", "not valid JSON"},
	    {"[]", "no \"verb\""},
	    {"{}", "no \"verb\""},
	    {"{\"verb\":1}", "no \"verb\""},
	    {"{\"verb\":null}", "no \"verb\""},
	    {"{\"verb\":\"nothing\",\"args\":[]}", "not an object"},
	    {"{\"verb\":\"nothing\",\"args\":null}", "not an object"},
	    {"{\"verb\":\"no such\"}", "no such verb"},
	};
	int fd = raw_connect();

	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		cr_assert(raw_write(fd, bad[i].line, strlen(bad[i].line)));
		cr_assert(raw_write(fd, "\n", 1));
		expect_error(fd, "ERR_USAGE", bad[i].text);
	}
	cr_assert(raw_write(fd, "{\"verb\":\"a\0b\"}\n", 15));
	expect_error(fd, "ERR_USAGE", "not valid JSON");
	char *deep = malloc(500001);
	memset(deep, '[', 500000);
	deep[500000] = '\n';
	cr_assert(raw_write(fd, deep, 500001));
	expect_error(fd, "ERR_USAGE", "not valid JSON");
	free(deep);
	cr_assert(raw_write(fd, "{\"verb\":\"nothing\"}\n", 19));
	expect_bytes(fd, "{\"ok\":true,\"result\":{}}");
	(void)close(fd);
}

Test(ctl, text_that_is_not_utf8_does_not_cost_the_answer)
{
	int fd = raw_connect();

	cr_assert(raw_write(fd, "{\"verb\":\"latin1\"}\n", 18));
	expect_bytes(fd, "{\"ok\":false,\"code\":\"ERR_NOENT\",\"exit\":4,\"message\":\"no such file: caf?\"}");
	cr_assert(raw_write(fd, "{\"verb\":\"split\"}\n", 17));
	expect_error(fd, "ERR_FAILED", "xxxx");
	(void)close(fd);
}

static char *request_of(size_t len)
{
	static const char head[] = "{\"verb\":\"nothing\",\"args\":{\"a\":\"", tail[] = "\"}}\n";
	char *line = malloc(len);

	memset(line, 'a', len);
	memcpy(line, head, sizeof head - 1);
	memcpy(line + len - (sizeof tail - 1), tail, sizeof tail - 1);
	return line;
}

Test(ctl, the_longest_request_passes_and_a_longer_one_is_refused)
{
	char *line = request_of(CTL_LINE_MAX), *longer = request_of(CTL_LINE_MAX + 1), *endless = malloc(8 << 20), byte;
	int fd = raw_connect();

	cr_assert(raw_write(fd, line, CTL_LINE_MAX));
	expect_bytes(fd, "{\"ok\":true,\"result\":{}}");
	/* Again: nothing of the first one counts for the second. */
	cr_assert(raw_write(fd, line, CTL_LINE_MAX));
	expect_bytes(fd, "{\"ok\":true,\"result\":{}}");
	(void)raw_write(fd, longer, CTL_LINE_MAX + 1);
	expect_error(fd, "ERR_LIMIT", "1 MiB");
	cr_assert_leq(recv(fd, &byte, 1, 0), 0);
	(void)close(fd);
	/* One without an end is cut while it is being sent, with its reason. */
	memset(endless, ' ', 8 << 20);
	fd = raw_connect();
	cr_assert(!raw_write(fd, endless, 8 << 20));
	expect_error(fd, "ERR_LIMIT", "1 MiB");
	cr_assert_leq(recv(fd, &byte, 1, 0), 0);
	(void)close(fd);
	free(line);
	free(longer);
	free(endless);
}

/* ---- clients that go, stall, or are too many ---- */

Test(ctl, hanging_up_cancels_the_request)
{
	int fd = raw_connect();

	cr_assert(raw_write(fd, "{\"verb\":\"wait\"}\n", 16));
	cr_assert(becomes(&running, 1));
	cr_assert_eq(atomic_load(&canceled), 0);
	(void)close(fd);
	cr_assert(becomes(&canceled, 1));
	cr_assert(becomes(&running, 0));
}

Test(ctl, half_closing_after_the_request_does_not_cancel_it)
{
	int fd = raw_connect();

	cr_assert(raw_write(fd, "{\"verb\":\"wait\"}\n", 16));
	(void)shutdown(fd, SHUT_WR);
	cr_assert(becomes(&running, 1));
	(void)usleep(20000);
	cr_assert_eq(atomic_load(&running), 1);
	atomic_store(&release_wait, true);
	expect_bytes(fd, "{\"ok\":true,\"result\":{\"canceled\":false}}");
	cr_assert_eq(atomic_load(&canceled), 0);
	(void)close(fd);
}

Test(ctl, a_client_that_does_not_read_holds_up_neither_the_handler_nor_stop)
{
	int fd = raw_connect();
	uint64_t begun = clock_mono_ns();

	cr_assert(raw_write(fd, "{\"verb\":\"flood\"}\n", 17));
	cr_assert(becomes(&freed, 1));
	/* Its answer waits for room now. */
	begun = clock_mono_ns();
	ctl_server_stop(server);
	server = NULL;
	cr_assert_lt(clock_mono_ns() - begun, 5 * NS_PER_SEC);
	(void)close(fd);
}

Test(ctl, stop_cancels_and_the_last_answer_goes_out)
{
	int fd = raw_connect();
	char byte;

	cr_assert(raw_write(fd, "{\"verb\":\"wait\"}\n", 16));
	cr_assert(becomes(&running, 1));
	ctl_server_stop(server);
	server = NULL;
	cr_assert_eq(atomic_load(&canceled), 1);
	expect_bytes(fd, "{\"ok\":true,\"result\":{\"canceled\":true}}");
	cr_assert_leq(recv(fd, &byte, 1, 0), 0);
	cr_assert_neq(access(sock, F_OK), 0);
	(void)close(fd);
}

Test(ctl, too_many_connections_are_told_so)
{
	int fds[CTL_CONNECTIONS_MAX], fd;

	for (int i = 0; i < CTL_CONNECTIONS_MAX; i++) {
		fds[i] = raw_connect();
		cr_assert(raw_write(fds[i], "{\"verb\":\"nothing\"}\n", 19));
		expect_bytes(fds[i], "{\"ok\":true,\"result\":{}}");
	}
	fd = raw_connect();
	expect_error(fd, "ERR_LIMIT", "connections");
	(void)close(fd);
	/* A place that becomes free can be had. */
	(void)close(fds[7]);
	uint64_t deadline = clock_mono_ns() + WAIT_MS * NS_PER_MS;
	for (bool ok = false; !ok;) {
		char *line;

		cr_assert_lt(clock_mono_ns(), deadline);
		fd = raw_connect();
		(void)raw_write(fd, "{\"verb\":\"nothing\"}\n", 19);
		line = raw_line(fd);
		ok = line && strstr(line, "true");
		free(line);
		(void)close(fd);
	}
	for (int i = 0; i < CTL_CONNECTIONS_MAX; i++)
		if (i != 7)
			(void)close(fds[i]);
}

Test(ctl, no_client_is_no_progress_and_never_canceled)
{
	cr_assert_eq(ctl_progress(NULL, json_object()), 0);
	cr_assert(!ctl_canceled(NULL));
	ctl_server_stop(NULL);
}

/* ---- the socket file ---- */

Test(ctl, the_socket_is_for_its_owner_alone_whatever_the_umask)
{
	static const mode_t masks[] = {0, 022, 077, 0377};
	struct stat st;

	for (size_t i = 0; i < ARRAY_LEN(masks); i++) {
		ctl_server_stop(server);
		(void)umask(masks[i]);
		start();
		cr_assert_eq(stat(sock, &st), 0);
		cr_assert(S_ISSOCK(st.st_mode));
		cr_assert_eq(st.st_mode & 07777, 0600, "umask %o: %o", (unsigned)masks[i], (unsigned)st.st_mode);
	}
	(void)umask(022);
}

Test(ctl, a_live_socket_is_not_taken)
{
	struct ctl_server *other = (void *)1;
	struct err e = {0};
	json_t *result = NULL;

	cr_assert_eq(ctl_server_start(sock, handle, &server, &other, &e), -ERR_BUSY);
	cr_assert(strstr(e.text, sock), "%s", e.text);
	cr_assert_eq(other, (void *)1);
	cr_assert_eq(ctl_call(sock, "nothing", NULL, WAIT_MS, NULL, NULL, &result, NULL, &e), 0, "%s", e.text);
	json_decref(result);
}

static void leave_stale(const char *path)
{
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	(void)snprintf(un.sun_path, sizeof un.sun_path, "%.100s", path);
	cr_assert_eq(bind(fd, (struct sockaddr *)&un, sizeof un), 0);
	(void)close(fd);
}

Test(ctl, a_stale_socket_is_replaced)
{
	json_t *result = NULL;

	ctl_server_stop(server);
	leave_stale(sock);
	start();
	cr_assert_eq(ctl_call(sock, "nothing", NULL, WAIT_MS, NULL, NULL, &result, NULL, NULL), 0);
	json_decref(result);
}

Test(ctl, another_file_in_its_place_is_left_alone)
{
	struct err e = {0};
	struct stat st;

	ctl_server_stop(server);
	server = NULL;
	int fd = open(sock, O_CREAT | O_WRONLY, 0644);
	cr_assert_eq(write(fd, "mine", 4), 4);
	(void)close(fd);
	cr_assert_eq(ctl_server_start(sock, handle, &server, &server, &e), -ERR_EXIST);
	cr_assert_eq(stat(sock, &st), 0);
	cr_assert_eq(st.st_size, 4);
}

Test(ctl, stop_removes_its_own_socket_only)
{
	struct stat st;

	cr_assert_eq(unlink(sock), 0);
	leave_stale(sock);
	ctl_server_stop(server);
	server = NULL;
	cr_assert_eq(stat(sock, &st), 0);
}

Test(ctl, a_folder_that_is_missing_is_an_error)
{
	struct ctl_server *other = NULL;
	struct err e = {0};

	cr_assert_eq(ctl_server_start("/nonexistent/folder/control.sock", handle, NULL, &other, &e), -ERR_NOENT);
	cr_assert(strstr(e.text, "/nonexistent"), "%s", e.text);
	cr_assert_eq(ctl_server_start("/tmp/", handle, NULL, &other, &e), -ERR_IO);
}

Test(ctl, a_path_longer_than_a_sockets_address_works)
{
	struct err e = {0};
	json_t *result = NULL;
	struct stat st;

	ctl_server_stop(server);
	for (int i = 0; i < 3; i++) {
		size_t n = strlen(dir);

		dir[n] = '/';
		memset(dir + n + 1, 'd', 90);
		dir[n + 91] = '\0';
		cr_assert_eq(mkdir(dir, 0700), 0);
	}
	(void)snprintf(sock, sizeof sock, "%.500s/control.sock", dir);
	cr_assert_gt(strlen(sock), 250);
	start();
	cr_assert_eq(stat(sock, &st), 0);
	cr_assert_eq(st.st_mode & 07777, 0600);
	cr_assert_eq(ctl_call(sock, "nothing", NULL, WAIT_MS, NULL, NULL, &result, NULL, &e), 0, "%s", e.text);
	json_decref(result);
	cr_assert_eq(ctl_server_start(sock, handle, NULL, &server, &e), -ERR_BUSY);
	ctl_server_stop(server);
	server = NULL;
	cr_assert_neq(stat(sock, &st), 0);
	cr_assert_eq(ctl_call(sock, "nothing", NULL, WAIT_MS, NULL, NULL, &result, NULL, &e), -ERR_UNREACHABLE_DAEMON);
	/* For the clean-up: back to the folder that was made first. */
	*strstr(dir, "/ddd") = '\0';
}

/* ---- client ---- */

static void collect(void *arg, const json_t *p)
{
	json_array_append((json_t *)arg, (json_t *)(uintptr_t)p);
}

Test(ctl, call_gives_progress_and_result)
{
	json_t *seen = json_array(), *result = NULL;
	struct err e = {0};
	int code = 77;

	cr_assert_eq(
	    ctl_call(sock, "progress", json_pack("{s:i}", "n", 500), WAIT_MS, collect, seen, &result, &code, &e), 0,
	    "%s", e.text);
	cr_assert_eq(code, 0);
	cr_assert_eq(json_array_size(seen), 500);
	for (size_t i = 0; i < 500; i++)
		cr_assert_eq(json_integer_value(json_object_get(json_array_get(seen, i), "done")), (json_int_t)i);
	cr_assert(json_is_object(result));
	cr_assert_eq(json_object_size(result), 0);
	json_decref(result);
	json_decref(seen);
	cr_assert_eq(ctl_call(sock, "progress", json_pack("{s:i}", "n", 5), WAIT_MS, NULL, NULL, &result, NULL, NULL),
		     0);
	json_decref(result);
}

Test(ctl, call_passes_arguments)
{
	json_t *result = NULL, *args = json_pack("{s:s, s:I}", "name", "caf\xc3\xa9", "big", (json_int_t)INT64_MAX),
	       *want;

	want = json_pack("{s:i, s:O}", "schema", 1, "args", args);
	cr_assert_eq(ctl_call(sock, "echo", args, WAIT_MS, NULL, NULL, &result, NULL, NULL), 0);
	cr_assert(json_equal(result, want));
	json_decref(result);
	json_decref(want);
}

Test(ctl, call_gives_a_refusal_with_code_text_and_exit)
{
	json_t *result = (void *)1;
	struct err e = {0};
	int code = 77;

	cr_assert_eq(ctl_call(sock, "refuse", NULL, WAIT_MS, NULL, NULL, &result, &code, &e), -ERR_STATE);
	cr_assert_eq(code, 5);
	cr_assert_eq(e.code, ERR_STATE);
	cr_assert_str_eq(e.text, "refuse vm1: this host is primary for it");
	cr_assert_eq(result, (void *)1);
	cr_assert_eq(ctl_call(sock, "latin1", NULL, WAIT_MS, NULL, NULL, &result, &code, &e), -ERR_NOENT);
	cr_assert_eq(code, 4);
}

Test(ctl, call_takes_large_answers)
{
	json_t *result = NULL;
	struct err e = {0};

	cr_assert_eq(ctl_call(sock, "large", json_pack("{s:i}", "n", 20 << 20), WAIT_MS, NULL, NULL, &result, NULL, &e),
		     0, "%s", e.text);
	cr_assert_eq(json_string_length(json_object_get(result, "text")), 20 << 20);
	json_decref(result);
}

Test(ctl, call_refuses_what_can_not_be_sent)
{
	json_t *result = NULL;
	struct err e = {0};
	char *long_text = malloc(CTL_LINE_MAX);
	int code = 77;

	memset(long_text, 'a', CTL_LINE_MAX);
	cr_assert_eq(ctl_call(sock, "echo", json_pack("{s:s%}", "a", long_text, (size_t)CTL_LINE_MAX), WAIT_MS, NULL,
			      NULL, &result, &code, &e),
		     -ERR_LIMIT);
	cr_assert_eq(code, 1);
	free(long_text);
}

Test(ctl, call_without_a_daemon_says_so)
{
	json_t *result = NULL;
	struct err e = {0};
	char path[PATH_MAX];
	int code = 77;

	(void)snprintf(path, sizeof path, "%.200s/other.sock", dir);
	cr_assert_eq(ctl_call(path, "ping", NULL, WAIT_MS, NULL, NULL, &result, &code, &e), -ERR_UNREACHABLE_DAEMON);
	cr_assert_eq(code, 3);
	cr_assert(strstr(e.text, path) && strstr(e.text, "ping"), "%s", e.text);
	leave_stale(path);
	cr_assert_eq(ctl_call(path, "ping", json_object(), 0, NULL, NULL, &result, &code, &e), -ERR_UNREACHABLE_DAEMON);
	cr_assert_eq(code, 3);
}

Test(ctl, call_times_out_and_that_cancels_the_request)
{
	json_t *result = NULL;
	struct err e = {0};
	uint64_t begun = clock_mono_ns();
	int code = 77;

	cr_assert_eq(ctl_call(sock, "wait", NULL, 150, NULL, NULL, &result, &code, &e), -ERR_TIMEOUT);
	cr_assert_eq(code, 124);
	cr_assert_geq(clock_mono_ns() - begun, 150 * NS_PER_MS);
	cr_assert_lt(clock_mono_ns() - begun, 5 * NS_PER_SEC);
	cr_assert(strstr(e.text, "wait"), "%s", e.text);
	cr_assert(becomes(&canceled, 1));
}

/* A server of another make. */
struct odd_server {
	int fd;
	const char *answer;
	size_t n;
};

static void *odd_main(void *arg)
{
	struct odd_server *o = arg;
	int fd = accept(o->fd, NULL, NULL);
	char buf[256];

	/* The request fits. */
	(void)!recv(fd, buf, sizeof buf, 0);
	(void)raw_write(fd, o->answer, o->n);
	(void)close(fd);
	return NULL;
}

static int odd_call(const char *answer, size_t n, json_t *args, int *code, struct err *e)
{
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	struct odd_server o = {.fd = socket(AF_UNIX, SOCK_STREAM, 0), .answer = answer, .n = n};
	json_t *result = NULL;
	pthread_t thread;
	int r;

	(void)snprintf(un.sun_path, sizeof un.sun_path, "%.90s/odd.sock", dir);
	(void)unlink(un.sun_path);
	cr_assert_eq(bind(o.fd, (struct sockaddr *)&un, sizeof un), 0);
	cr_assert_eq(listen(o.fd, 1), 0);
	cr_assert_eq(pthread_create(&thread, NULL, odd_main, &o), 0);
	r = ctl_call(un.sun_path, "ping", args, WAIT_MS, NULL, NULL, &result, code, e);
	(void)pthread_join(thread, NULL);
	(void)close(o.fd);
	json_decref(result);
	return r;
}

Test(ctl, call_judges_the_answer)
{
	static const struct {
		const char *answer;
		int r, exit;
	} odd[] = {
	    {"", -ERR_UNREACHABLE_DAEMON, 3},
	    {"{\"ok\":true", -ERR_UNREACHABLE_DAEMON, 3},
	    {"{\"progress\":{}}\n", -ERR_UNREACHABLE_DAEMON, 3},
	    {"SSH-2.0\n", -ERR_PROTO, 1},
	    {"[]\n", -ERR_PROTO, 1},
	    {"{}\n", -ERR_PROTO, 1},
	    {"{\"ok\":1}\n", -ERR_PROTO, 1},
	    {"{\"ok\":true}\n", 0, 0},
	    {"{\"ok\":false}\n", -ERR_FAILED, 1},
	    {"{\"ok\":false,\"code\":\"ERR_OF_TOMORROW\",\"exit\":42,\"message\":\"x\"}\n", -ERR_FAILED, 42},
	    {"{\"ok\":false,\"code\":\"ERR_SPLIT\",\"exit\":0}\n", -ERR_SPLIT, 8},
	    {"{\"ok\":false,\"code\":7,\"exit\":4000,\"message\":[]}\n", -ERR_FAILED, 1},
	    {"{\"progress\":1}\n{\"ok\":true,\"result\":{}}\n", 0, 0},
	};

	for (size_t i = 0; i < ARRAY_LEN(odd); i++) {
		struct err e = {0};
		int code = 77;

		cr_assert_eq(odd_call(odd[i].answer, strlen(odd[i].answer), NULL, &code, &e), odd[i].r, "%s: %s",
			     odd[i].answer, e.text);
		cr_assert_eq(code, odd[i].exit, "%s: exit %d", odd[i].answer, code);
		cr_assert(odd[i].r == 0 || e.text[0]);
	}
}

Test(ctl, call_reads_the_answer_of_a_server_that_closed_before_it_had_all)
{
	static const char answer[] = "{\"ok\":false,\"code\":\"ERR_LIMIT\",\"exit\":1,\"message\":\"too many\"}\n";
	char *text = malloc(CTL_LINE_MAX / 2);
	struct err e = {0};
	int code = 77;

	(void)signal(SIGPIPE, SIG_DFL);
	memset(text, 'a', CTL_LINE_MAX / 2);
	cr_assert_eq(
	    odd_call(answer, sizeof answer - 1, json_pack("{s:s%}", "a", text, (size_t)CTL_LINE_MAX / 2), &code, &e),
	    -ERR_LIMIT, "%s", e.text);
	cr_assert_str_eq(e.text, "too many");
	free(text);
}

Test(ctl, nothing_raises_sigpipe)
{
	int fd = raw_connect();

	/* The default action would end the test's process. */
	(void)signal(SIGPIPE, SIG_DFL);
	cr_assert(raw_write(fd, "{\"verb\":\"progress\",\"args\":{\"n\":100000}}\n", 40));
	(void)close(fd);
	fd = raw_connect();
	cr_assert(raw_write(fd, "{\"verb\":\"wait\"}\n", 16));
	cr_assert(becomes(&running, 1));
	(void)close(fd);
	cr_assert(becomes(&canceled, 1));
	cr_assert(becomes(&running, 0));
	ctl_server_stop(server);
	server = NULL;
}
