/* TCP as a byte stream.
 *
 * The socket is a blocking one: one thread reads, one writes, and shutdown(2) from a third wakes both. While a time
 * bound is set (the handshake) each call waits with poll and never blocks in the socket call itself, so that a peer
 * that takes one byte a second can't stretch it. Nothing here raises SIGPIPE.
 *
 * Invariants: the descriptor lives from creation to close, so shutdown can never hit another file's number; a stream
 * is never connected to its own end (TCP allows that when a port of the ephemeral range is dialled).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "net/stream.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"

#define TCP_BACKLOG 64
#define TCP_CANCEL_POLL_MS 100
/* A dead host is found by the daemon's own pings long before; this only ends sockets nobody asks after. */
#define TCP_KEEPALIVE_IDLE_S 15
#define TCP_KEEPALIVE_INTERVAL_S 5
#define TCP_KEEPALIVE_PROBES 4

union sock_addr {
	struct sockaddr any;
	struct sockaddr_in in4;
	struct sockaddr_in6 in6;
	struct sockaddr_storage storage;
};

struct stream_tcp {
	struct stream stream;
	int fd;
	atomic_uint timeout_ms;
	char peer[STREAM_NAME_SIZE];
};

static struct stream_tcp *tcp_of(struct stream *s)
{
	return CONTAINER_OF(s, struct stream_tcp, stream);
}

/* ---- addresses ---- */

static int addr_bad(const char *addr, const char *why, struct err *e)
{
	return err_set(e, ERR_USAGE, "address '%.100s': %s; expected HOST:PORT or [IPV6]:PORT, as in 10.0.0.2:7790",
		       addr, why);
}

int addr_split(const char *addr, char *host, size_t host_size, char *port, size_t port_size, struct err *e)
{
	const char *colon = strrchr(addr, ':');
	const char *host_at = addr;
	size_t host_len, port_len;
	unsigned value = 0;

	if (!colon)
		return addr_bad(addr, "it has no port", e);
	host_len = (size_t)(colon - addr);
	if (addr[0] == '[') {
		if (host_len < 3 || addr[host_len - 1] != ']')
			return addr_bad(addr, "the bracket is not closed before the port", e);
		host_at++;
		host_len -= 2;
	} else if (memchr(addr, ':', host_len)) {
		return addr_bad(addr, "an IPv6 address needs brackets", e);
	}
	if (host_len == 0)
		return addr_bad(addr, "it has no host", e);
	if (host_len >= host_size)
		return addr_bad(addr, "the host is too long", e);
	for (size_t i = 0; i < host_len; i++) {
		char c = host_at[i];
		bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');

		if (!plain && !strchr(addr[0] == '[' ? ":.%-_" : ".-_", c))
			return addr_bad(addr, "the host has a character that no host name has", e);
	}
	port_len = strlen(colon + 1);
	if (port_len == 0 || port_len > 5 || port_len >= port_size)
		return addr_bad(addr, "the port is not a number from 0 to 65535", e);
	for (size_t i = 1; i <= port_len; i++) {
		if (colon[i] < '0' || colon[i] > '9')
			return addr_bad(addr, "the port is not a number from 0 to 65535", e);
		value = value * 10 + (unsigned)(colon[i] - '0');
	}
	if (value > 65535)
		return addr_bad(addr, "the port is not a number from 0 to 65535", e);
	memcpy(host, host_at, host_len);
	host[host_len] = '\0';
	memcpy(port, colon + 1, port_len + 1);
	return 0;
}

/* An IPv4 peer of an IPv6 socket is shown, and judged, as the IPv4 peer that it is. */
static void sock_addr_unmap(union sock_addr *a)
{
	struct sockaddr_in in4 = {.sin_family = AF_INET};

	if (a->any.sa_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&a->in6.sin6_addr))
		return;
	in4.sin_port = a->in6.sin6_port;
	memcpy(&in4.sin_addr, &a->in6.sin6_addr.s6_addr[12], sizeof in4.sin_addr);
	a->in4 = in4;
}

static void sock_addr_format(const union sock_addr *addr, char *buf, size_t size)
{
	union sock_addr a = *addr;
	char host[STREAM_NAME_SIZE], port[STREAM_PORT_SIZE];
	socklen_t len;

	sock_addr_unmap(&a);
	len = a.any.sa_family == AF_INET6 ? sizeof a.in6 : sizeof a.in4;
	if (getnameinfo(&a.any, len, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV))
		(void)snprintf(buf, size, "unknown address");
	else if (a.any.sa_family == AF_INET6)
		(void)snprintf(buf, size, "[%s]:%s", host, port);
	else
		(void)snprintf(buf, size, "%s:%s", host, port);
}

bool tcp_peer_is_loopback(int fd)
{
	union sock_addr a = {0};
	socklen_t len = sizeof a;

	if (getpeername(fd, &a.any, &len) < 0)
		return false;
	sock_addr_unmap(&a);
	if (a.any.sa_family == AF_INET)
		return ntohl(a.in4.sin_addr.s_addr) >> 24 == 127;
	return a.any.sa_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&a.in6.sin6_addr);
}

static int addr_resolve(const char *addr, bool passive, struct addrinfo **ret, struct err *e)
{
	struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_protocol = IPPROTO_TCP};
	char host[STREAM_HOST_SIZE], port[STREAM_PORT_SIZE];
	int r = addr_split(addr, host, sizeof host, port, sizeof port, e);

	if (r)
		return r;
	hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
	r = getaddrinfo(host, port, &hints, ret);
	if (r)
		return err_set(e, ERR_PEER, "%s: the host name can't be resolved: %s", addr,
			       r == EAI_SYSTEM ? strerror(errno) : gai_strerror(r));
	return 0;
}

/* ---- the stream ---- */

/* 0 when ready; -ERR_TIMEOUT at the deadline. */
static int wait_ready(int fd, short events, uint64_t deadline_ns)
{
	for (;;) {
		struct pollfd p = {.fd = fd, .events = events};
		uint64_t now = clock_mono_ns();
		uint64_t left_ms = deadline_ns > now ? (deadline_ns - now + NS_PER_MS - 1) / NS_PER_MS : 0;
		int r = poll(&p, 1, left_ms > INT_MAX ? INT_MAX : (int)left_ms);

		if (r > 0)
			return 0;
		if (r < 0 && errno != EINTR)
			return -ERR_PEER;
		if (r == 0 && left_ms == 0)
			return -ERR_TIMEOUT;
	}
}

static int64_t tcp_read(struct stream *s, void *buf, size_t len)
{
	struct stream_tcp *t = tcp_of(s);
	unsigned timeout_ms = atomic_load(&t->timeout_ms);
	uint64_t deadline = timeout_ms ? clock_mono_ns() + timeout_ms * NS_PER_MS : 0;

	for (;;) {
		ssize_t n = recv(t->fd, buf, len, timeout_ms ? MSG_DONTWAIT : 0);

		if (n >= 0)
			return n;
		if (errno == EINTR)
			continue;
		if (!timeout_ms || (errno != EAGAIN && errno != EWOULDBLOCK))
			return -ERR_PEER;
		int r = wait_ready(t->fd, POLLIN, deadline);
		if (r)
			return r;
	}
}

static void iov_advance(struct iovec **iov, int *n, size_t done)
{
	while (*n > 0 && done >= (*iov)->iov_len) {
		done -= (*iov)->iov_len;
		(*iov)++;
		(*n)--;
	}
	if (*n > 0) {
		(*iov)->iov_base = (char *)(*iov)->iov_base + done;
		(*iov)->iov_len -= done;
	}
}

static int tcp_writev(struct stream *s, struct iovec *iov, int n)
{
	struct stream_tcp *t = tcp_of(s);
	unsigned timeout_ms = atomic_load(&t->timeout_ms);
	uint64_t deadline = timeout_ms ? clock_mono_ns() + timeout_ms * NS_PER_MS : 0;

	iov_advance(&iov, &n, 0);
	while (n > 0) {
		struct msghdr msg = {.msg_iov = iov, .msg_iovlen = (size_t)(n > IOV_MAX ? IOV_MAX : n)};
		ssize_t done = sendmsg(t->fd, &msg, MSG_NOSIGNAL | (timeout_ms ? MSG_DONTWAIT : 0));

		if (done >= 0) {
			iov_advance(&iov, &n, (size_t)done);
			continue;
		}
		if (errno == EINTR)
			continue;
		if (!timeout_ms || (errno != EAGAIN && errno != EWOULDBLOCK))
			return -ERR_PEER;
		int r = wait_ready(t->fd, POLLOUT, deadline);
		if (r)
			return r;
	}
	return 0;
}

static void tcp_finish(struct stream *s)
{
	(void)shutdown(tcp_of(s)->fd, SHUT_WR);
}

static void tcp_shutdown(struct stream *s)
{
	(void)shutdown(tcp_of(s)->fd, SHUT_RDWR);
}

static void tcp_close(struct stream *s)
{
	struct stream_tcp *t = tcp_of(s);

	(void)close(t->fd);
	free(t);
}

static const char *tcp_peer_name(struct stream *s)
{
	return tcp_of(s)->peer;
}

static const struct stream_ops tcp_ops = {
    .read = tcp_read,
    .writev = tcp_writev,
    .finish = tcp_finish,
    .shutdown = tcp_shutdown,
    .close = tcp_close,
    .peer_name = tcp_peer_name,
};

/* Options only tune: a socket that refuses one still works. */
static void sock_tune(int fd)
{
	static const struct {
		int level, name, value;
	} options[] = {
	    {IPPROTO_TCP, TCP_NODELAY, 1},
	    {SOL_SOCKET, SO_KEEPALIVE, 1},
	    {IPPROTO_TCP, TCP_KEEPIDLE, TCP_KEEPALIVE_IDLE_S},
	    {IPPROTO_TCP, TCP_KEEPINTVL, TCP_KEEPALIVE_INTERVAL_S},
	    {IPPROTO_TCP, TCP_KEEPCNT, TCP_KEEPALIVE_PROBES},
	};

	for (size_t i = 0; i < ARRAY_LEN(options); i++)
		(void)setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof options[i].value);
}

struct stream *stream_tcp_from_fd(int fd)
{
	struct stream_tcp *t = calloc(1, sizeof *t);
	union sock_addr a = {0};
	socklen_t len = sizeof a;

	if (!t) {
		(void)close(fd);
		return NULL;
	}
	t->stream.ops = &tcp_ops;
	t->fd = fd;
	atomic_init(&t->timeout_ms, 0);
	sock_tune(fd);
	if (getpeername(fd, &a.any, &len) == 0)
		sock_addr_format(&a, t->peer, sizeof t->peer);
	else
		(void)snprintf(t->peer, sizeof t->peer, "unknown address");
	return &t->stream;
}

void stream_tcp_set_timeout(struct stream *s, unsigned timeout_ms)
{
	atomic_store(&tcp_of(s)->timeout_ms, timeout_ms);
}

/* ---- dialling and listening ---- */

static bool sock_is_own_end(int fd)
{
	union sock_addr a = {0}, b = {0};
	socklen_t a_len = sizeof a, b_len = sizeof b;

	if (getsockname(fd, &a.any, &a_len) < 0 || getpeername(fd, &b.any, &b_len) < 0 || a_len != b_len)
		return false;
	return memcmp(&a, &b, a_len) == 0;
}

/* 0 when connected, else the errno; ECANCELED when asked to end. */
static int connect_wait(int fd, uint64_t deadline_ns, bool (*canceled)(void *arg), void *arg)
{
	for (;;) {
		uint64_t slice = clock_mono_ns() + TCP_CANCEL_POLL_MS * NS_PER_MS;
		int r = wait_ready(fd, POLLOUT, canceled && slice < deadline_ns ? slice : deadline_ns);

		if (canceled && canceled(arg))
			return ECANCELED;
		if (r == 0) {
			int sys = 0;
			socklen_t len = sizeof sys;

			return getsockopt(fd, SOL_SOCKET, SO_ERROR, &sys, &len) < 0 ? errno : sys;
		}
		if (r != -ERR_TIMEOUT)
			return EIO;
		if (clock_mono_ns() >= deadline_ns)
			return ETIMEDOUT;
	}
}

static int connect_one(const struct addrinfo *ai, unsigned timeout_ms, bool (*canceled)(void *arg), void *arg,
		       int *ret_fd)
{
	int fd = socket(ai->ai_family, ai->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, ai->ai_protocol);
	int sys = 0, flags;

	if (fd < 0)
		return errno;
	/* Before connecting: the first data must not wait for Nagle either. */
	sock_tune(fd);
	if (connect(fd, ai->ai_addr, ai->ai_addrlen) < 0) {
		sys = errno;
		if (sys == EINPROGRESS || sys == EINTR)
			sys = connect_wait(fd, clock_mono_ns() + timeout_ms * NS_PER_MS, canceled, arg);
	}
	if (!sys && sock_is_own_end(fd))
		sys = ECONNREFUSED;
	flags = sys ? 0 : fcntl(fd, F_GETFL);
	if (!sys && (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0))
		sys = errno;
	if (sys) {
		(void)close(fd);
		return sys;
	}
	*ret_fd = fd;
	return 0;
}

int stream_tcp_dial_cancelable(const char *addr, unsigned timeout_ms, bool (*canceled)(void *arg), void *arg,
			       struct stream **ret, struct err *e)
{
	struct addrinfo *list = NULL;
	unsigned tried = 0;
	int sys = EHOSTUNREACH, fd = -1;
	int r = addr_resolve(addr, false, &list, e);

	if (r)
		return r;
	for (const struct addrinfo *ai = list; ai && tried < STREAM_ADDRESSES_MAX; ai = ai->ai_next, tried++) {
		sys = connect_one(ai, timeout_ms, canceled, arg, &fd);
		if (sys == 0 || sys == ECANCELED)
			break;
	}
	freeaddrinfo(list);
	if (sys == ECANCELED)
		return err_set(e, ERR_CANCELED, "connecting to %s was cancelled", addr);
	if (sys == ECONNREFUSED)
		return err_set(e, ERR_PEER, "connecting to %s was refused; is repfs running there with --listen?",
			       addr);
	if (sys)
		return err_set(e, ERR_PEER, "connecting to %s failed: %s", addr, strerror(sys));
	struct stream *s = stream_tcp_from_fd(fd);
	if (!s)
		return err_set(e, ERR_NOMEM, "connecting to %s failed: out of memory", addr);
	*ret = s;
	return 0;
}

int stream_tcp_dial(const char *addr, unsigned timeout_ms, struct stream **ret, struct err *e)
{
	return stream_tcp_dial_cancelable(addr, timeout_ms, NULL, NULL, ret, e);
}

/* 0 or the errno. */
static int listen_one(const struct addrinfo *ai, int *ret_fd)
{
	const int on = 1, off = 0;
	int fd = socket(ai->ai_family, ai->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, ai->ai_protocol);

	if (fd < 0)
		return errno;
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0)
		goto failed;
	/* [::] serves both families, whatever the host's default is. */
	if (ai->ai_family == AF_INET6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off) < 0)
		goto failed;
	if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, TCP_BACKLOG) < 0)
		goto failed;
	*ret_fd = fd;
	return 0;
failed:;
	int sys = errno;
	(void)close(fd);
	return sys;
}

int tcp_listen(const char *addr, int *ret_fd, char *bound, size_t size, struct err *e)
{
	struct addrinfo *list = NULL;
	union sock_addr a = {0};
	socklen_t len = sizeof a;
	int sys = EADDRNOTAVAIL, fd = -1;
	int r = addr_resolve(addr, true, &list, e);

	if (r)
		return r;
	for (const struct addrinfo *ai = list; ai && sys; ai = ai->ai_next)
		sys = listen_one(ai, &fd);
	freeaddrinfo(list);
	if (sys == EADDRINUSE)
		return err_set(e, ERR_BUSY,
			       "listening on %s: the port is in use; pick another one or end the program that has it",
			       addr);
	if (sys)
		return err_set(e, -err_from_errno(sys), "listening on %s: %s", addr, strerror(sys));
	if (getsockname(fd, &a.any, &len) < 0) {
		sys = errno;
		(void)close(fd);
		return err_set(e, ERR_IO, "listening on %s: %s", addr, strerror(sys));
	}
	sock_addr_format(&a, bound, size);
	*ret_fd = fd;
	return 0;
}
