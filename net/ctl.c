/* The control socket, both ends: JSON lines over a UNIX stream socket (docs/control.md).
 *
 * Server: one thread accepts, one thread a connection reads a line, runs the handler, answers, reads the next. The
 * client hanging up is seen by asking the socket (POLLHUP: the far end is closed, not only its writing half), so no
 * watcher thread is needed, and a client that half-closes after its request still gets its answer.
 *
 * A client may stop reading at any time. A progress line waits a moment for room and is then left out; the final
 * line waits as long as the client lives and the server runs.
 *
 * Invariants: what goes out is whole lines: a line once begun is finished or nothing follows it. A connection's socket
 * is closed by its own thread only, after it left the list, so stop never shuts down another file's number. The
 * socket is 0600 from its first moment on, whatever the umask.
 *
 * Addresses: sun_path holds 108 bytes and a store's path may be longer; then the folder is opened and the address is
 * /proc/self/fd/N/NAME.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "net/ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "core/os/io.h"
#include "core/os/thread.h"

#define CTL_BACKLOG 64
#define CTL_READ_SIZE (64U << 10)
#define CTL_PROGRESS_WAIT_MS 100 /* for room in the socket, before a progress line is left out */
#define CTL_POLL_MS 200		 /* how often a wait looks whether the server stops */
#define CTL_STOP_MS 1000	 /* for a last answer to be read while the server stops */
#define CTL_ACCEPT_RETRY_MS 100
#define CTL_BUSY_MS 5000 /* a client waits so long for a place in the queue of the listening socket */
#define CTL_BUSY_STEP_MS 20

/* ---- address ---- */

struct ctl_addr {
	struct sockaddr_un un;
	int folder_fd; /* -1: the path fits */
};

static void addr_close(struct ctl_addr *a)
{
	cleanup_closep(&a->folder_fd);
}

/* 0, or a positive errno. */
static int addr_open(const char *path, struct ctl_addr *a)
{
	char folder[PATH_MAX];
	const char *slash = strrchr(path, '/');
	const char *name = slash ? slash + 1 : path;
	int n;

	*a = (struct ctl_addr){.un = {.sun_family = AF_UNIX}, .folder_fd = -1};
	if (!*name)
		return EISDIR;
	if (strlen(path) < sizeof a->un.sun_path) {
		strcpy(a->un.sun_path, path);
		return 0;
	}
	if (strlen(path) >= sizeof folder)
		return ENAMETOOLONG;
	io_dirname(path, folder, sizeof folder);
	a->folder_fd = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (a->folder_fd < 0)
		return errno;
	n = snprintf(a->un.sun_path, sizeof a->un.sun_path, "/proc/self/fd/%d/%s", a->folder_fd, name);
	if (n < 0 || (size_t)n >= sizeof a->un.sun_path) {
		addr_close(a);
		return ENAMETOOLONG;
	}
	return 0;
}

static int addr_connect(int fd, const struct ctl_addr *a)
{
	const struct sockaddr *sa = (const void *)&a->un;

	return connect(fd, sa, sizeof a->un) < 0 ? errno : 0;
}

/* ---- lines ---- */

/* JSON holds only UTF-8: bytes of a name that are not, or a character cut by a text's limit, become '?'. */
static json_t *json_text(const char *text)
{
	json_t *j = json_string(text);
	char copy[ERR_TEXT_MAX];

	if (j)
		return j;
	(void)snprintf(copy, sizeof copy, "%s", text);
	for (char *p = copy; *p; p++)
		if ((unsigned char)*p >= 0x80)
			*p = '?';
	return json_string(copy);
}

static json_t *error_line(int code, const char *text)
{
	return json_pack("{s:b, s:s, s:i, s:o}", "ok", 0, "code", err_name(code), "exit", err_exit(code), "message",
			 json_text(text && *text ? text : err_short(code)));
}

/* An owned line with its newline; NULL: out of memory, or longer than any reply may be. Steals j. */
static char *line_of(json_t *j, size_t *ret_len)
{
	char *text = j ? json_dumps(j, JSON_COMPACT) : NULL;
	size_t len = text ? strlen(text) : 0;

	json_decref(j);
	if (!text || len >= CTL_REPLY_MAX) {
		free(text);
		return NULL;
	}
	text[len] = '\n'; /* in place of the terminator: a line has a length */
	*ret_len = len + 1;
	return text;
}

/* ---- server ---- */

struct ctl_server;

struct ctl_conn {
	struct ctl_server *server;
	struct ctl_conn *next;
	int fd;
	pthread_t thread;
	bool finished;	    /* under the server's lock */
	atomic_bool broken; /* nothing more can be sent */
	bool stuck;	    /* the client did not make room for the last progress line */
	char *buf;	    /* what was read and not yet handled: [0, len) */
	size_t len, size;
};

struct ctl_server {
	struct mutex lock; /* the list */
	struct ctl_conn *conns;
	unsigned n_conns;
	atomic_bool stopping;
	uint64_t stop_ns; /* written before stopping is set */
	int listen_fd, wake_fd;
	struct ctl_addr addr;
	dev_t dev;
	ino_t ino;
	ctl_handler fn;
	void *arg;
	pthread_t thread;
};

static short conn_poll(const struct ctl_conn *c, short events, int timeout_ms)
{
	struct pollfd p = {.fd = c->fd, .events = events};

	return poll(&p, 1, timeout_ms) > 0 ? p.revents : 0;
}

static bool conn_hung_up(struct ctl_conn *c)
{
	return atomic_load(&c->broken) || (conn_poll(c, 0, 0) & (POLLHUP | POLLERR | POLLNVAL));
}

bool ctl_canceled(struct ctl_conn *c)
{
	return c && (atomic_load(&c->server->stopping) || conn_hung_up(c));
}

/* Waits for room; false: the client is gone, or the server stops and has waited for it long enough. */
static bool conn_wait_room(struct ctl_conn *c)
{
	for (;;) {
		short got = conn_poll(c, POLLOUT, CTL_POLL_MS);

		if (got & (POLLHUP | POLLERR | POLLNVAL))
			return false;
		if (got & POLLOUT)
			return true;
		if (atomic_load(&c->server->stopping) && clock_mono_ns() > c->server->stop_ns + CTL_STOP_MS * NS_PER_MS)
			return false;
	}
}

static int conn_send(struct ctl_conn *c, const char *line, size_t len)
{
	while (len > 0) {
		ssize_t n = send(c->fd, line, len, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n >= 0) {
			line += n;
			len -= (size_t)n;
		} else if (errno == EAGAIN || errno == EWOULDBLOCK) {
			if (!conn_wait_room(c))
				goto broken;
		} else if (errno != EINTR) {
			goto broken;
		}
	}
	return 0;
broken:
	atomic_store(&c->broken, true);
	return -ERR_PEER;
}

int ctl_progress(struct ctl_conn *c, json_t *p)
{
	size_t len = 0;
	char *line;
	int r;

	if (!c || !p) {
		json_decref(p);
		return 0;
	}
	line = line_of(json_pack("{s:o}", "progress", p), &len);
	if (!line)
		return -ERR_NOMEM;
	if (conn_hung_up(c)) {
		free(line);
		return -ERR_PEER;
	}
	/* A stopped client costs the handler one wait, not one for each line. */
	c->stuck = !(conn_poll(c, POLLOUT, c->stuck ? 0 : CTL_PROGRESS_WAIT_MS) & POLLOUT);
	r = c->stuck ? 0 : conn_send(c, line, len);
	free(line);
	return r;
}

/* Steals j. */
static int conn_answer(struct ctl_conn *c, json_t *j)
{
	size_t len = 0;
	char *line = line_of(j, &len);
	int r;

	if (!line)
		line = line_of(error_line(ERR_LIMIT, "the answer is too long, or there is no memory for it"), &len);
	if (!line) {
		atomic_store(&c->broken, true);
		return -ERR_NOMEM;
	}
	r = conn_send(c, line, len);
	free(line);
	return r;
}

static int conn_refuse(struct ctl_conn *c, int code, const char *text)
{
	return conn_answer(c, error_line(code, text));
}

static int conn_run(struct ctl_conn *c, const char *verb, const json_t *args)
{
	json_t *result = NULL;
	struct err e = {0};
	int r = c->server->fn(c->server->arg, c, verb, args, &result, &e);

	if (r < 0) {
		json_decref(result);
		return conn_refuse(c, r, e.text);
	}
	if (!result)
		result = json_object();
	return conn_answer(c, json_pack("{s:b, s:o}", "ok", 1, "result", result));
}

/* One request. Returns a negative code when the connection is of no more use. */
static int conn_line(struct ctl_conn *c, const char *line, size_t len)
{
	json_error_t je;
	json_t *request = json_loadb(line, len, JSON_REJECT_DUPLICATES, &je);
	json_t *none = NULL;
	const json_t *args;
	const char *verb;
	char text[ERR_TEXT_MAX];
	int r;

	if (!request) {
		(void)snprintf(text, sizeof text, "the request is not valid JSON: %s (column %d)", je.text, je.column);
		return conn_refuse(c, ERR_USAGE, text);
	}
	verb = json_string_value(json_object_get(request, "verb"));
	args = json_object_get(request, "args");
	if (!args)
		args = none = json_object();
	if (!verb)
		r = conn_refuse(c, ERR_USAGE,
				"the request has no \"verb\"; expected {\"verb\":\"...\",\"args\":{...}}");
	else if (!json_is_object(args))
		r = conn_refuse(c, ERR_USAGE, "\"args\" of the request is not an object");
	else
		r = conn_run(c, verb, args);
	json_decref(none);
	json_decref(request);
	return r;
}

/* Runs the complete lines of the buffer. */
static int conn_lines(struct ctl_conn *c)
{
	size_t done = 0;
	char *end;

	while ((end = memchr(c->buf + done, '\n', c->len - done))) {
		size_t len = (size_t)(end - (c->buf + done));
		int r = len < CTL_LINE_MAX ? conn_line(c, c->buf + done, len) : -ERR_LIMIT;

		if (r)
			return r;
		if (atomic_load(&c->server->stopping))
			return -ERR_CANCELED;
		done += len + 1;
	}
	memmove(c->buf, c->buf + done, c->len - done);
	c->len -= done;
	return c->len < CTL_LINE_MAX ? 0 : -ERR_LIMIT;
}

/* Room for one more read; the buffer never holds more than one line and one read. */
static int conn_grow(struct ctl_conn *c)
{
	size_t size = c->size ? c->size * 2 : 2 * (size_t)CTL_READ_SIZE;
	char *buf;

	if (c->size - c->len >= CTL_READ_SIZE)
		return 0;
	buf = realloc(c->buf, size);
	if (!buf)
		return -ERR_NOMEM;
	c->buf = buf;
	c->size = size;
	return 0;
}

static void *conn_main(void *p)
{
	struct ctl_conn *c = p;
	struct ctl_server *s = c->server;
	uint64_t one = 1;
	int r = 0;

	while (r == 0) {
		ssize_t n;

		r = conn_grow(c);
		if (r)
			break;
		n = recv(c->fd, c->buf + c->len, CTL_READ_SIZE, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		c->len += (size_t)n;
		r = conn_lines(c);
	}
	if (r == -ERR_LIMIT)
		(void)conn_refuse(c, ERR_LIMIT, "the request is longer than 1 MiB");
	mutex_lock(&s->lock);
	c->finished = true;
	(void)!write(s->wake_fd, &one, sizeof one);
	mutex_unlock(&s->lock);
	return NULL;
}

static void conn_free(struct ctl_conn *c)
{
	(void)close(c->fd);
	free(c->buf);
	free(c);
}

/* Joins and frees the connections that have ended; all of them, waiting, with `all`. */
static void server_reap(struct ctl_server *s, bool all)
{
	for (;;) {
		struct ctl_conn **at, *c;

		mutex_lock(&s->lock);
		for (at = &s->conns; *at && !all && !(*at)->finished;)
			at = &(*at)->next;
		c = *at;
		if (c) {
			*at = c->next;
			s->n_conns--;
		}
		mutex_unlock(&s->lock);
		if (!c)
			return;
		(void)pthread_join(c->thread, NULL);
		conn_free(c);
	}
}

static void server_refuse(int fd)
{
	size_t len = 0;
	char *line =
	    line_of(error_line(ERR_LIMIT, "the daemon has all the control connections that it takes; try again"), &len);

	if (line)
		(void)!send(fd, line, len, MSG_NOSIGNAL | MSG_DONTWAIT);
	free(line);
	(void)close(fd);
}

static void server_take(struct ctl_server *s, int fd)
{
	struct ctl_conn *c = NULL;

	mutex_lock(&s->lock);
	if (s->n_conns < CTL_CONNECTIONS_MAX)
		c = calloc(1, sizeof *c);
	if (!c)
		goto refused;
	c->server = s;
	c->fd = fd;
	atomic_init(&c->broken, false);
	if (thread_start(&c->thread, "ctl-conn", conn_main, c))
		goto refused;
	c->next = s->conns;
	s->conns = c;
	s->n_conns++;
	mutex_unlock(&s->lock);
	return;
refused:
	mutex_unlock(&s->lock);
	free(c);
	server_refuse(fd);
}

static void *server_main(void *p)
{
	struct ctl_server *s = p;
	bool starved = false;

	while (!atomic_load(&s->stopping)) {
		struct pollfd fds[2] = {{.fd = s->wake_fd, .events = POLLIN},
					{.fd = starved ? -1 : s->listen_fd, .events = POLLIN}};
		uint64_t count;

		if (poll(fds, 2, starved ? CTL_ACCEPT_RETRY_MS : -1) < 0)
			continue;
		starved = false;
		if (fds[0].revents)
			(void)!read(s->wake_fd, &count, sizeof count);
		server_reap(s, false);
		if (fds[1].revents) {
			int fd = accept4(s->listen_fd, NULL, NULL, SOCK_CLOEXEC);

			if (fd >= 0)
				server_take(s, fd);
			else /* out of descriptors: the listening socket stays readable, don't spin on it */
				starved = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
		}
	}
	return NULL;
}

/* Removes a socket that nothing answers on. */
static int socket_clear(const char *path, const struct ctl_addr *a, struct err *e)
{
	struct stat st;
	int fd, sys;

	if (lstat(a->un.sun_path, &st) < 0)
		return errno == ENOENT ? 0 : err_set(e, -err_from_errno(errno), "%s: %s", path, strerror(errno));
	if (!S_ISSOCK(st.st_mode))
		return err_set(e, ERR_EXIST,
			       "%s: the control socket belongs here, but this is another file; move it away", path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return err_set(e, ERR_LIMIT, "%s: %s", path, strerror(errno));
	sys = addr_connect(fd, a);
	(void)close(fd);
	if (sys == 0 || sys == EAGAIN)
		return err_set(e, ERR_BUSY, "%s: another daemon answers on this control socket", path);
	if (sys == ENOENT)
		return 0;
	if (sys != ECONNREFUSED)
		return err_set(e, -err_from_errno(sys), "%s: %s", path, strerror(sys));
	if (unlink(a->un.sun_path) < 0 && errno != ENOENT)
		return err_set(e, -err_from_errno(errno), "%s: removing the old control socket: %s", path,
			       strerror(errno));
	return 0;
}

static int socket_bind(struct ctl_server *s, const char *path, struct err *e)
{
	const struct sockaddr *sa = (const void *)&s->addr.un;
	struct stat st;

	s->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (s->listen_fd < 0)
		return err_set(e, ERR_LIMIT, "%s: %s", path, strerror(errno));
	/* Linux gives the file the mode of the socket, less the umask: never more than this, not for a moment. */
	if (fchmod(s->listen_fd, 0600) < 0 || bind(s->listen_fd, sa, sizeof s->addr.un) < 0)
		return err_set(e, -err_from_errno(errno), "%s: making the control socket: %s", path, strerror(errno));
	if (chmod(s->addr.un.sun_path, 0600) < 0 || lstat(s->addr.un.sun_path, &st) < 0 ||
	    listen(s->listen_fd, CTL_BACKLOG) < 0) {
		int sys = errno;

		(void)unlink(s->addr.un.sun_path);
		return err_set(e, -err_from_errno(sys), "%s: making the control socket: %s", path, strerror(sys));
	}
	s->dev = st.st_dev;
	s->ino = st.st_ino;
	return 0;
}

/* Only our own: another daemon may have put its socket here meanwhile. */
static void socket_remove(const struct ctl_server *s)
{
	struct stat st;

	if (s->ino && lstat(s->addr.un.sun_path, &st) == 0 && st.st_dev == s->dev && st.st_ino == s->ino)
		(void)unlink(s->addr.un.sun_path);
}

static void server_free(struct ctl_server *s)
{
	cleanup_closep(&s->listen_fd);
	cleanup_closep(&s->wake_fd);
	addr_close(&s->addr);
	mutex_destroy(&s->lock);
	free(s);
}

int ctl_server_start(const char *path, ctl_handler fn, void *arg, struct ctl_server **ret, struct err *e)
{
	struct ctl_server *s = calloc(1, sizeof *s);
	int r;

	if (!s)
		return err_set(e, ERR_NOMEM, "%s: out of memory", path);
	mutex_init(&s->lock);
	atomic_init(&s->stopping, false);
	s->fn = fn;
	s->arg = arg;
	s->listen_fd = s->wake_fd = -1;
	r = addr_open(path, &s->addr);
	if (r)
		r = err_set(e, -err_from_errno(r), "%s: %s", path, strerror(r));
	if (!r)
		r = socket_clear(path, &s->addr, e);
	if (!r) {
		s->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (s->wake_fd < 0)
			r = err_set(e, ERR_LIMIT, "%s: %s", path, strerror(errno));
	}
	if (!r)
		r = socket_bind(s, path, e);
	if (!r && thread_start(&s->thread, "ctl-accept", server_main, s)) {
		socket_remove(s);
		r = err_set(e, ERR_LIMIT, "%s: no thread for it", path);
	}
	if (r) {
		server_free(s);
		return r;
	}
	*ret = s;
	return 0;
}

void ctl_server_stop(struct ctl_server *s)
{
	uint64_t one = 1;

	if (!s)
		return;
	s->stop_ns = clock_mono_ns();
	atomic_store(&s->stopping, true);
	(void)!write(s->wake_fd, &one, sizeof one);
	(void)pthread_join(s->thread, NULL);
	socket_remove(s);
	/* Only the reading half: a handler's last answer still goes out. */
	mutex_lock(&s->lock);
	for (struct ctl_conn *c = s->conns; c; c = c->next)
		(void)shutdown(c->fd, SHUT_RD);
	mutex_unlock(&s->lock);
	server_reap(s, true);
	server_free(s);
}

/* ---- client ---- */

struct ctl_client {
	int fd;
	const char *path, *verb;
	uint64_t deadline_ns; /* 0: none */
	unsigned timeout_ms;
	char *buf;
	size_t len, size;
};

static int client_timed_out(const struct ctl_client *c, struct err *e)
{
	return err_set(e, ERR_TIMEOUT, "%s: no answer within %g s; the daemon may go on with it", c->verb,
		       c->timeout_ms / 1000.0);
}

static int client_unreachable(const struct ctl_client *c, int sys, struct err *e)
{
	if (sys == ENOENT || sys == ECONNREFUSED)
		return err_set(e, ERR_UNREACHABLE_DAEMON, "%s: no daemon answers on %s; is repfs running?", c->verb,
			       c->path);
	return err_set(e, ERR_UNREACHABLE_DAEMON, "%s: the daemon can't be reached on %s: %s", c->verb, c->path,
		       strerror(sys));
}

/* 0 when ready, -ERR_TIMEOUT at the deadline. */
static int client_wait(const struct ctl_client *c, short events)
{
	for (;;) {
		struct pollfd p = {.fd = c->fd, .events = events};
		int wait_ms = -1;

		if (c->deadline_ns) {
			uint64_t now = clock_mono_ns();
			uint64_t left_ms;

			if (now >= c->deadline_ns)
				return -ERR_TIMEOUT;
			left_ms = (c->deadline_ns - now) / NS_PER_MS + 1;
			wait_ms = left_ms > INT_MAX ? INT_MAX : (int)left_ms;
		}
		if (poll(&p, 1, wait_ms) > 0)
			return 0;
	}
}

static int client_connect(struct ctl_client *c, struct err *e)
{
	uint64_t give_up_ns = clock_mono_ns() + CTL_BUSY_MS * NS_PER_MS;
	struct ctl_addr a;
	int sys = addr_open(c->path, &a);

	if (sys)
		return client_unreachable(c, sys, e);
	c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	sys = c->fd < 0 ? errno : addr_connect(c->fd, &a);
	/* EAGAIN: the queue of the listening socket is full. */
	while (sys == EAGAIN || sys == EINTR) {
		uint64_t now = clock_mono_ns();

		if ((c->deadline_ns && now >= c->deadline_ns) || now >= give_up_ns)
			break;
		(void)poll(NULL, 0, CTL_BUSY_STEP_MS);
		sys = addr_connect(c->fd, &a);
	}
	addr_close(&a);
	if (sys == EAGAIN && c->deadline_ns && clock_mono_ns() >= c->deadline_ns)
		return client_timed_out(c, e);
	return sys ? client_unreachable(c, sys, e) : 0;
}

/* A server that refuses unasked closes while we send: its line is there to be read, so that is no failure. */
static int client_send(struct ctl_client *c, const char *line, size_t len, struct err *e)
{
	while (len > 0) {
		ssize_t n = send(c->fd, line, len, MSG_NOSIGNAL);

		if (n >= 0) {
			line += n;
			len -= (size_t)n;
		} else if (errno == EAGAIN || errno == EWOULDBLOCK) {
			if (client_wait(c, POLLOUT))
				return client_timed_out(c, e);
		} else if (errno != EINTR) {
			return 0;
		}
	}
	return 0;
}

static int client_room(struct ctl_client *c, struct err *e)
{
	size_t size = c->size ? c->size * 2 : 2 * (size_t)CTL_READ_SIZE;
	char *buf;

	if (c->size - c->len >= CTL_READ_SIZE)
		return 0;
	if (c->len >= CTL_REPLY_MAX)
		return err_set(e, ERR_LIMIT, "%s: the daemon's answer is longer than any should be", c->verb);
	buf = realloc(c->buf, size);
	if (!buf)
		return err_set(e, ERR_NOMEM, "%s: no memory for the answer", c->verb);
	c->buf = buf;
	c->size = size;
	return 0;
}

/* The next line, without its newline, as JSON. *used: bytes of the buffer that the caller drops afterwards. */
static int client_line(struct ctl_client *c, json_t **ret, size_t *used, struct err *e)
{
	size_t seen = 0;
	json_error_t je;
	char *end;

	while (!(end = memchr(c->buf + seen, '\n', c->len - seen))) {
		ssize_t n;
		int r;

		seen = c->len;
		r = client_room(c, e);
		if (r)
			return r;
		n = recv(c->fd, c->buf + c->len, c->size - c->len, 0);
		if (n > 0) {
			c->len += (size_t)n;
		} else if (n == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) {
			return err_set(e, ERR_UNREACHABLE_DAEMON, "%s: the daemon on %s ended before it answered",
				       c->verb, c->path);
		} else if (client_wait(c, POLLIN)) {
			return client_timed_out(c, e);
		}
	}
	*ret = json_loadb(c->buf, (size_t)(end - c->buf), 0, &je);
	if (!*ret)
		return err_set(e, ERR_PROTO, "%s: the daemon's answer is not valid JSON: %s", c->verb, je.text);
	*used = (size_t)(end - c->buf) + 1;
	return 0;
}

static int code_of_name(const char *name)
{
	for (int code = ERR_OK + 1; name && code < ERR_CODES_END; code++)
		if (strcmp(err_name(code), name) == 0)
			return code;
	return ERR_FAILED;
}

/* The final line. *ret_exit: what a refusal says. */
static int client_final(const struct ctl_client *c, json_t *line, json_t **ret_result, int *ret_exit, struct err *e)
{
	const json_t *ok = json_object_get(line, "ok");
	json_t *result = json_object_get(line, "result");
	const char *message = json_string_value(json_object_get(line, "message"));
	const json_t *exit_code = json_object_get(line, "exit");
	int code;

	if (json_is_true(ok)) {
		*ret_result = result ? json_incref(result) : json_object();
		if (*ret_result)
			return 0;
		return err_set(e, ERR_NOMEM, "%s: no memory for the answer", c->verb);
	}
	if (!json_is_false(ok))
		return err_set(e, ERR_PROTO, "%s: the daemon's answer is neither progress nor a result", c->verb);
	code = code_of_name(json_string_value(json_object_get(line, "code")));
	*ret_exit = err_exit(code);
	if (json_is_integer(exit_code) && json_integer_value(exit_code) > 0 && json_integer_value(exit_code) < 256)
		*ret_exit = (int)json_integer_value(exit_code);
	return err_set(e, code, "%s", message && *message ? message : err_short(code));
}

static int client_receive(struct ctl_client *c, void (*progress)(void *arg, const json_t *p), void *arg,
			  json_t **ret_result, int *ret_exit, struct err *e)
{
	int r = client_room(c, e);

	if (r)
		return r;
	for (;;) {
		json_t *line = NULL;
		const json_t *p;
		size_t used = 0;

		r = client_line(c, &line, &used, e);
		if (r)
			return r;
		p = json_object_get(line, "progress");
		if (!p) {
			r = client_final(c, line, ret_result, ret_exit, e);
			json_decref(line);
			return r;
		}
		if (progress)
			progress(arg, p);
		json_decref(line);
		memmove(c->buf, c->buf + used, c->len - used);
		c->len -= used;
	}
}

static int client_call(struct ctl_client *c, json_t *args, void (*progress)(void *arg, const json_t *p), void *arg,
		       json_t **ret_result, int *ret_exit, struct err *e)
{
	size_t len = 0;
	json_t *request =
	    args ? json_pack("{s:s, s:o}", "verb", c->verb, "args", args) : json_pack("{s:s}", "verb", c->verb);
	_cleanup_free_ char *line = line_of(request, &len);
	int r;

	if (!line)
		r = err_set(e, ERR_USAGE, "%s: the request can't be encoded (a name that is not UTF-8?)", c->verb);
	else if (len > CTL_LINE_MAX)
		r = err_set(e, ERR_LIMIT, "%s: the request is longer than 1 MiB", c->verb);
	else
		r = client_connect(c, e);
	if (!r)
		r = client_send(c, line, len, e);
	if (r)
		return r;
	return client_receive(c, progress, arg, ret_result, ret_exit, e);
}

int ctl_call(const char *path, const char *verb, json_t *args, unsigned timeout_ms,
	     void (*progress)(void *arg, const json_t *p), void *arg, json_t **ret_result, int *ret_exit, struct err *e)
{
	struct ctl_client c = {.fd = -1, .path = path, .verb = verb, .timeout_ms = timeout_ms};
	int exit_code = 0;
	int r;

	if (timeout_ms)
		c.deadline_ns = clock_mono_ns() + timeout_ms * NS_PER_MS;
	r = client_call(&c, args, progress, arg, ret_result, &exit_code, e);
	if (ret_exit)
		*ret_exit = r && !exit_code ? err_exit(r) : exit_code;
	cleanup_closep(&c.fd);
	free(c.buf);
	return r;
}
