/* The byte-stream vtable: TCP now, TLS over it and the simulator's later. */
#ifndef REPFS_NET_STREAM_H
#define REPFS_NET_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "core/err.h"

struct stream {
	const struct stream_ops *ops;
};
struct stream_ops {
	/* At least one byte, at most len; 0 at the end; -ERR_PEER on failure, -ERR_TIMEOUT past the bound. Blocks. */
	int64_t (*read)(struct stream *s, void *buf, size_t len);
	/* All of iov, or -ERR_PEER (-ERR_TIMEOUT past the bound). Blocks. May modify iov. */
	int (*writev)(struct stream *s, struct iovec *iov, int n);
	/* Nothing more will be written: the far end reads what was, then the end. Reading goes on. Never blocks. */
	void (*finish)(struct stream *s);
	/* Makes blocked and later calls of other threads fail; callable at any time, more than once. Never blocks. */
	void (*shutdown)(struct stream *s);
	void (*close)(struct stream *s);
	/* "10.0.0.2:7790" of the far end, borrowed. */
	const char *(*peer_name)(struct stream *s);
};

#define STREAM_HOST_SIZE 256
#define STREAM_PORT_SIZE 6
#define STREAM_NAME_SIZE 80    /* a numeric address with its port, terminated */
#define STREAM_ADDRESSES_MAX 8 /* of one host name: how many are tried */

/* HOST:PORT, [IPV6]:PORT. TCP_NODELAY, keep-alive. timeout_ms bounds connecting (each address). Returns owned. */
int stream_tcp_dial(const char *addr, unsigned timeout_ms, struct stream **ret, struct err *e);
/* The same; canceled(arg) is asked about ten times a second while it connects, true ends it with -ERR_CANCELED. */
int stream_tcp_dial_cancelable(const char *addr, unsigned timeout_ms, bool (*canceled)(void *arg), void *arg,
			       struct stream **ret, struct err *e);
struct stream *stream_tcp_from_fd(int fd); /* takes fd (closes it on failure too); NULL: out of memory */
/* Bounds each read and writev of the handshake; 0: no bound. */
void stream_tcp_set_timeout(struct stream *s, unsigned timeout_ms);

/* Listens (SO_REUSEADDR). bound[size] gets the address as bound, so port 0 shows the one picked. */
int tcp_listen(const char *addr, int *ret_fd, char *bound, size_t size, struct err *e);
/* The far end is this host, by its loopback address. */
bool tcp_peer_is_loopback(int fd);
/* Splits and validates HOST:PORT; -ERR_USAGE says what is expected. */
int addr_split(const char *addr, char *host, size_t host_size, char *port, size_t port_size, struct err *e);

#endif
