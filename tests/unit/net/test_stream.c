/* net/stream_tcp.c: addresses, dialling, time bounds, and that shutdown and finish do what they say. */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "net/stream.h"

TestSuite(stream, .timeout = 300);

struct pair {
	int listen_fd;
	struct stream *a, *b; /* dialled, accepted */
	char addr[STREAM_NAME_SIZE];
};

static void pair_open(struct pair *p, const char *addr)
{
	struct err e = {0};

	memset(p, 0, sizeof *p);
	cr_assert_eq(tcp_listen(addr, &p->listen_fd, p->addr, sizeof p->addr, &e), 0, "%s", e.text);
	cr_assert_eq(stream_tcp_dial(p->addr, 1000, &p->a, &e), 0, "%s", e.text);
	p->b = stream_tcp_from_fd(accept(p->listen_fd, NULL, NULL));
	cr_assert(p->b);
}

static void pair_close(struct pair *p)
{
	p->a->ops->close(p->a);
	p->b->ops->close(p->b);
	(void)close(p->listen_fd);
}

Test(stream, addr_split_accepts)
{
	static const struct {
		const char *addr, *host, *port;
	} good[] = {
	    {"10.0.0.2:7790", "10.0.0.2", "7790"},
	    {"host-1.example_x:0", "host-1.example_x", "0"},
	    {"[::1]:65535", "::1", "65535"},
	    {"[fe80::1%eth0]:1", "fe80::1%eth0", "1"},
	};

	for (size_t i = 0; i < ARRAY_LEN(good); i++) {
		char host[STREAM_HOST_SIZE], port[STREAM_PORT_SIZE];
		struct err e = {0};

		memset(host, 0xaa, sizeof host);
		memset(port, 0xaa, sizeof port);
		cr_assert_eq(addr_split(good[i].addr, host, sizeof host, port, sizeof port, &e), 0, "%s", e.text);
		cr_assert_str_eq(host, good[i].host);
		cr_assert_str_eq(port, good[i].port);
	}
}

Test(stream, addr_split_refuses)
{
	static const char *const bad[] = {
	    "",	       "host",	  ":1",	      "host:", "host:65536", "host:123456", "host:1x",
	    "host:-1", "host: 1", "::1:7790", "[::1]", "[::1",	     "[]:1",	    "[::1]7790",
	    "ho st:1", "ho/st:1", "host\n:1", "a:b:1", "[a]b:1",
	};
	char host[STREAM_HOST_SIZE], port[STREAM_PORT_SIZE], poison[STREAM_HOST_SIZE], tiny[4];
	char *long_name = malloc(400);

	memset(poison, 0xaa, sizeof poison);
	for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
		struct err e = {0};

		memset(host, 0xaa, sizeof host);
		memset(port, 0xaa, sizeof port);
		cr_assert_eq(addr_split(bad[i], host, sizeof host, port, sizeof port, &e), -ERR_USAGE, "'%s'", bad[i]);
		cr_assert(strstr(e.text, "HOST:PORT"), "'%s': %s", bad[i], e.text);
		cr_assert_arr_eq(host, poison, sizeof host);
		cr_assert_arr_eq(port, poison, sizeof port);
	}
	memset(long_name, 'a', 399);
	long_name[399] = '\0';
	memcpy(long_name + 390, ":1", 3);
	cr_assert_eq(addr_split(long_name, host, sizeof host, port, sizeof port, NULL), -ERR_USAGE);
	cr_assert_eq(addr_split("abcd:1", tiny, sizeof tiny, port, sizeof port, NULL), -ERR_USAGE);
	cr_assert_eq(addr_split("abc:1", tiny, sizeof tiny, port, sizeof port, NULL), 0);
	cr_assert_eq(addr_split("abc:12345", tiny, sizeof tiny, port, 5, NULL), -ERR_USAGE);
	free(long_name);
}

static void exchange(const char *addr, const char *name_prefix)
{
	struct pair p;
	char one[] = "one ", two[] = "", three[] = "three", got[16];
	struct iovec iov[3] = {{one, 4}, {two, 0}, {three, 5}};
	int64_t n, have = 0;

	pair_open(&p, addr);
	cr_assert_eq(p.a->ops->writev(p.a, iov, 3), 0);
	p.a->ops->finish(p.a);
	memset(got, 0xaa, sizeof got);
	while ((n = p.b->ops->read(p.b, got + have, sizeof got - (size_t)have)) > 0)
		have += n;
	cr_assert_eq(n, 0);
	cr_assert_eq(have, 9);
	cr_assert_arr_eq(got, "one three", 9);
	cr_assert_eq((uint8_t)got[9], 0xaa);
	/* After finish the other direction still works. */
	iov[0] = (struct iovec){three, 5};
	cr_assert_eq(p.b->ops->writev(p.b, iov, 1), 0);
	cr_assert_eq(p.a->ops->read(p.a, got, sizeof got), 5);
	cr_assert_arr_eq(got, "three", 5);
	cr_assert_str_eq(p.a->ops->peer_name(p.a), p.addr);
	cr_assert_eq(strncmp(p.b->ops->peer_name(p.b), name_prefix, strlen(name_prefix)), 0, "%s",
		     p.b->ops->peer_name(p.b));
	cr_assert_str_not_empty(p.addr);
	cr_assert(!strstr(p.addr, ":0") || strlen(strstr(p.addr, ":0")) > 2);
	pair_close(&p);
}

Test(stream, exchanges_over_ipv4)
{
	exchange("127.0.0.1:0", "127.0.0.1:");
}

Test(stream, exchanges_over_ipv6)
{
	int fd = socket(AF_INET6, SOCK_STREAM, 0);
	struct sockaddr_in6 in6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};

	if (fd < 0 || bind(fd, (struct sockaddr *)&in6, sizeof in6) < 0)
		cr_skip_test("no IPv6 here");
	(void)close(fd);
	exchange("[::1]:0", "[::1]:");
}

Test(stream, mapped_ipv4_is_shown_as_ipv4_and_counts_as_loopback)
{
	struct err e = {0};
	char bound[STREAM_NAME_SIZE], addr[STREAM_NAME_SIZE];
	struct stream *a = NULL, *b;
	int listen_fd, fd;

	if (tcp_listen("[::]:0", &listen_fd, bound, sizeof bound, &e))
		cr_skip_test("no IPv6 here");
	(void)snprintf(addr, sizeof addr, "127.0.0.1:%s", strrchr(bound, ':') + 1);
	cr_assert_eq(stream_tcp_dial(addr, 1000, &a, &e), 0, "%s", e.text);
	fd = accept(listen_fd, NULL, NULL);
	cr_assert_geq(fd, 0);
	cr_assert(tcp_peer_is_loopback(fd));
	b = stream_tcp_from_fd(fd);
	cr_assert_eq(strncmp(b->ops->peer_name(b), "127.0.0.1:", 10), 0, "%s", b->ops->peer_name(b));
	a->ops->close(a);
	b->ops->close(b);
	(void)close(listen_fd);
}

Test(stream, nodelay_and_keepalive_are_on_at_both_ends)
{
	struct pair p;
	int keep, nodelay, fd;
	socklen_t len = sizeof keep;

	/* The streams hide their descriptors: the accepted one is the next number after the dialled one. */
	pair_open(&p, "127.0.0.1:0");
	unsigned found = 0;
	for (fd = 3; fd < 64; fd++) {
		struct sockaddr_in peer;
		socklen_t peer_len = sizeof peer;

		if (getpeername(fd, (struct sockaddr *)&peer, &peer_len) < 0 || peer.sin_family != AF_INET)
			continue;
		keep = nodelay = 0;
		cr_assert_eq(getsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &keep, &len), 0);
		cr_assert_eq(getsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &nodelay, &len), 0);
		cr_assert(keep && nodelay);
		found++;
	}
	cr_assert_eq(found, 2);
	pair_close(&p);
}

Test(stream, dial_nobody_is_refused_and_says_so)
{
	struct stream *s = (void *)1;
	struct err e = {0};
	char bound[STREAM_NAME_SIZE];
	int fd;

	cr_assert_eq(tcp_listen("127.0.0.1:0", &fd, bound, sizeof bound, &e), 0);
	(void)close(fd);
	cr_assert_eq(stream_tcp_dial(bound, 1000, &s, &e), -ERR_PEER);
	cr_assert(strstr(e.text, bound) && strstr(e.text, "--listen"), "%s", e.text);
	cr_assert_eq(s, (void *)1);
}

Test(stream, dialling_an_ephemeral_port_never_meets_its_own_end)
{
	struct sockaddr_in in4 = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	unsigned port = 0;
	char bound[STREAM_NAME_SIZE];

	/* A port of the ephemeral range that nobody has, an even one, as Linux takes those first for connecting: sooner
	 * or later it is the connection's own. */
	for (unsigned try = 40000; try < 50000 && !port; try += 2) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		in4.sin_port = htons((uint16_t)try);
		if (bind(fd, (struct sockaddr *)&in4, sizeof in4) == 0)
			port = try;
		(void)close(fd);
	}
	cr_assert(port);
	(void)snprintf(bound, sizeof bound, "127.0.0.1:%u", port);
	for (int i = 0; i < 40000; i++) {
		struct stream *s = NULL;

		cr_assert_eq(stream_tcp_dial(bound, 1000, &s, NULL), -ERR_PEER);
	}
}

Test(stream, a_taken_port_is_busy_and_can_be_had_again)
{
	char bound[STREAM_NAME_SIZE], again[STREAM_NAME_SIZE];
	struct err e = {0};
	struct stream *a = NULL, *b;
	int fd, other = -7;

	cr_assert_eq(tcp_listen("127.0.0.1:0", &fd, bound, sizeof bound, &e), 0);
	cr_assert_eq(tcp_listen(bound, &other, again, sizeof again, &e), -ERR_BUSY);
	cr_assert_eq(other, -7);
	/* The side that closes first leaves a connection in TIME_WAIT on the port; listening works all the same. */
	cr_assert_eq(stream_tcp_dial(bound, 1000, &a, &e), 0);
	b = stream_tcp_from_fd(accept(fd, NULL, NULL));
	b->ops->close(b);
	a->ops->close(a);
	(void)close(fd);
	cr_assert_eq(tcp_listen(bound, &fd, again, sizeof again, &e), 0, "%s", e.text);
	cr_assert_str_eq(bound, again);
	(void)close(fd);
}

Test(stream, time_bound_ends_a_read_and_a_write)
{
	struct pair p;
	char *big = calloc(1, 32U << 20), byte;
	struct iovec iov = {big, 32U << 20};
	uint64_t start;

	pair_open(&p, "127.0.0.1:0");
	stream_tcp_set_timeout(p.a, 50);
	start = clock_mono_ns();
	cr_assert_eq(p.a->ops->read(p.a, &byte, 1), -ERR_TIMEOUT);
	cr_assert_geq(clock_mono_ns() - start, 50 * NS_PER_MS);
	start = clock_mono_ns();
	cr_assert_eq(p.a->ops->writev(p.a, &iov, 1), -ERR_TIMEOUT);
	cr_assert_geq(clock_mono_ns() - start, 50 * NS_PER_MS);
	free(big);
	pair_close(&p);
}

struct blocked {
	struct stream *s;
	int64_t got;
	int wrote;
	atomic_int ended;
};

static void *blocked_read(void *arg)
{
	struct blocked *b = arg;
	char byte;

	b->got = b->s->ops->read(b->s, &byte, 1);
	atomic_fetch_add(&b->ended, 1);
	return NULL;
}

static void *blocked_write(void *arg)
{
	struct blocked *b = arg;
	char *big = calloc(1, 64U << 20);
	struct iovec iov = {big, 64U << 20};

	b->wrote = b->s->ops->writev(b->s, &iov, 1);
	free(big);
	atomic_fetch_add(&b->ended, 1);
	return NULL;
}

Test(stream, shutdown_wakes_a_blocked_read_and_write)
{
	struct pair p;
	struct blocked b = {0};
	pthread_t reader, writer;
	char byte = 0;
	struct iovec iov = {&byte, 1};

	pair_open(&p, "127.0.0.1:0");
	b.s = p.a;
	cr_assert_eq(pthread_create(&reader, NULL, blocked_read, &b), 0);
	cr_assert_eq(pthread_create(&writer, NULL, blocked_write, &b), 0);
	(void)usleep(50000);
	cr_assert_eq(atomic_load(&b.ended), 0);
	p.a->ops->shutdown(p.a);
	p.a->ops->shutdown(p.a);
	cr_assert_eq(pthread_join(reader, NULL), 0);
	cr_assert_eq(pthread_join(writer, NULL), 0);
	cr_assert_leq(b.got, 0);
	cr_assert_eq(b.wrote, -ERR_PEER);
	cr_assert_eq(p.a->ops->writev(p.a, &iov, 1), -ERR_PEER);
	pair_close(&p);
}

static bool cancel_at_once(void *arg)
{
	(*(int *)arg)++;
	return true;
}

Test(stream, dial_can_be_canceled)
{
	struct stream *s = NULL;
	struct err e = {0};
	char bound[STREAM_NAME_SIZE];
	struct stream *fill[200];
	int fd, asked = 0, n = 0;

	/* A full queue: further connects get no answer. */
	cr_assert_eq(tcp_listen("127.0.0.1:0", &fd, bound, sizeof bound, &e), 0);
	cr_assert_eq(listen(fd, 0), 0);
	while (n < 200 && stream_tcp_dial(bound, 200, &fill[n], NULL) == 0)
		n++;
	cr_assert_lt(n, 200);
	cr_assert_eq(stream_tcp_dial_cancelable(bound, 60000, cancel_at_once, &asked, &s, &e), -ERR_CANCELED);
	cr_assert_eq(asked, 1);
	while (n > 0) {
		n--;
		fill[n]->ops->close(fill[n]);
	}
	(void)close(fd);
}

Test(stream, long_iov_is_written_whole)
{
	enum { N = 3000 };
	struct pair p;
	uint8_t *data = malloc(N * 3), *got = malloc(N * 3);
	struct iovec *iov = calloc(N, sizeof *iov);
	int64_t n, have = 0;

	pair_open(&p, "127.0.0.1:0");
	for (int i = 0; i < N * 3; i++)
		data[i] = (uint8_t)(i * 13);
	for (int i = 0; i < N; i++)
		iov[i] = (struct iovec){data + (size_t)i * 3, 3};
	cr_assert_eq(p.a->ops->writev(p.a, iov, N), 0);
	p.a->ops->finish(p.a);
	while (have < N * 3 && (n = p.b->ops->read(p.b, got + have, (size_t)(N * 3 - have))) > 0)
		have += n;
	cr_assert_eq(have, N * 3);
	cr_assert_arr_eq(got, data, N * 3);
	pair_close(&p);
	free(iov);
	free(data);
	free(got);
}
