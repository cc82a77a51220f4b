/* A link: one connection to a peer, framed (core/wire.h), with a bounded handshake, a sender thread with a queue and
 * a receiver thread.
 *
 * Life: link_dial or link_server makes it → handshake → `up` → frames → `down`, called exactly once, also when the
 * handshake failed (then without `up`). After `down` no callback comes any more. Reference-counted: the creator of a
 * dialled link owns one reference; `up` of an accepted link hands one to the callee if it returns 0.
 * Callbacks come from the link's own threads, never with a lock of the link held; link_send, link_close and link_ref
 * may be called from anywhere, also under the caller's lock (lock order: caller's lock → link's queue lock).
 * The first callback may come before link_dial has returned. link_server_stop must not be called from a callback.
 */
#ifndef REPFS_NET_LINK_H
#define REPFS_NET_LINK_H

#include <stdbool.h>
#include <stdint.h>

#include "core/wire.h"
#include "net/stream.h"

#define LINK_PREAUTH_MAX 16    /* connections in handshake at once; more are closed unanswered */
#define LINK_HANDSHAKE_MS 2000 /* for the whole handshake */
#define LINK_CONNECT_MS 2000   /* for connecting, each address */
#define LINKS_MAX 512
#define LINK_HEARD_BYTES 4096 /* of an unfinished frame: so much since the last word counts as one */
#define LINK_LAZY_NS UINT64_C(1000000)
#define LINK_LAZY_BYTES (128U << 10)

struct link;

struct link_callbacks {
	/* The handshake is done. Return 0 to keep it, a negative code to have it refused and closed. An accepted link's
	 * comes before the listener's answer, so that what is refused here never comes up at the dialer. */
	int (*up)(struct link *l, void *arg);
	/* One frame, in order; payload (f->length_payload bytes) is owned by the callee (free), NULL if there is none.
	 * May block: that is the backpressure on the peer; whoever closes the link ends such a wait himself.
	 * Negative: the link is closed with that code, what is queued already (a REFUSE, say) is sent first. */
	int (*frame)(struct link *l, void *arg, const struct wire_frame *f, void *payload);
	/* All complete frames of one read have been handed over. */
	void (*batch)(struct link *l, void *arg);
	/* n bytes of queued frames (headers and payloads) have been handed to the kernel. */
	void (*sent)(struct link *l, void *arg, uint64_t n);
	/* It has ended and every release has been called. code is -ERR_x: -ERR_CANCELED after link_close, the peer's
	 * code and text when it refused the handshake, else -ERR_PEER (lost), -ERR_PROTO or -ERR_CORRUPT (violated). */
	void (*down)(struct link *l, void *arg, int code, const char *text);
};

struct link_self {
	uint8_t store[16];
	uint32_t features;
	char program[64];
};

/* Connects and shakes hands in a thread of its own. addr is copied. Returns owned: link_close, then link_unref. */
int link_dial(const char *addr, const struct link_self *self, const struct link_callbacks *cb, void *arg,
	      struct link **ret, struct err *e);

struct link_server;
/* Accepts on addr in a thread of its own. allow_remote false: only loopback peers are accepted, others are closed
 * with a REFUSE frame that says so. cb->up gets each link with `arg`; it then may call link_set_arg. */
int link_server_start(const char *addr, bool allow_remote, const struct link_self *self,
		      const struct link_callbacks *cb, void *arg, struct link_server **ret, struct err *e);
const char *link_server_addr(const struct link_server *s); /* as bound */
void link_server_stop(struct link_server *s);		   /* closes and waits for all links it made */

void link_set_arg(struct link *l, void *arg);
struct link *link_ref(struct link *l);
void link_unref(struct link *l);

/* Queues a frame: the link fills number and CRCs (payload's too, in the sender thread). payload is borrowed until
 * release(release_arg) is called: after it was written, or when the link goes down, or at once if it is closed or down
 * (then returns -ERR_PEER). release NULL: payload (if any) is freed. Never blocks; bounding the bytes queued is the
 * caller's business with the help of `sent`. Returns 0 or -ERR_PEER. */
int link_send(struct link *l, const struct wire_frame *f, void *payload, void (*release)(void *), void *release_arg);
/* The same for a frame that nobody waits for: it may stay queued for LINK_LAZY_NS, or until LINK_LAZY_BYTES are queued
 * or link_send is called, so that many leave together. Order is kept. */
int link_send_lazy(struct link *l, const struct wire_frame *f, void *payload, void (*release)(void *),
		   void *release_arg);
/* Total queued bytes not yet handed to the kernel. */
uint64_t link_queued(struct link *l);

/* Ends it. drain_ms > 0: what is queued is sent first, for so long at most; before `up` there is nothing to drain.
 * From then on link_send is answered -ERR_PEER and frames that arrive are dropped. Asynchronous: `down` follows, once a
 * callback that is under way has returned and a name look-up or connect under way has noticed. */
void link_close(struct link *l, unsigned drain_ms);

bool link_is_dialer(const struct link *l);
uint64_t link_session(const struct link *l);
const struct wire_hello *link_peer(const struct link *l);
const char *link_peer_name(const struct link *l);
/* Monotonic time, ns, of the last whole frame, or of LINK_HEARD_BYTES of an unfinished one. */
uint64_t link_heard_ns(const struct link *l);

#endif
