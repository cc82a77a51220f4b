/* What an outside hub, `repctl read|write|report` and the peer's repctl ask of a host (docs/protocol.md, "Hub
 * messages"): reports of its volumes, the start of a protection, reads and writes of ranges. Private to fs/.
 *
 * Asked by a connection, a request is answered by a frame; asked by a verb, its caller waits. Either way it is carried
 * out by one path: on a protected volume as a guest's request, on a recovery volume as one on its view.
 *
 * A connection that carries no group (*host-wide*) is one whose dialer sent one of these messages in place of a JOIN.
 */
#ifndef REPFS_FS_HUB_H
#define REPFS_FS_HUB_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/os/thread.h"
#include "core/wire.h"

#define HUB_THREADS 4		/* of their own: what they wait for is done by the workers */
#define HUB_STARTS_MAX 2	/* START_PROTECTs under way: each holds a thread */
#define HUB_REQUESTS_MAX 16	/* of one connection, under way or with the answer not sent yet, that a peer may have */
#define HUB_REQUESTS_LAX 32	/* so many are taken: what has answers there already may count here still */
#define HUB_REQUESTS_ALL_MAX 64 /* of all connections and verbs */
#define HUB_ASKED_MAX 256	/* with those refused, of one connection: beyond it is closed */
#define HUB_QUEUED_MAX (17U << 20) /* bytes of answers on a host-wide connection: it does not read them */
#define HUB_CALLS_MAX 256	   /* of verbs, waiting for peers' answers or given up */
#define HUB_VOLUMES_MAX 16384	   /* in a peer's report */
#define HUB_SILENT_MS 10000U	   /* a host-wide connection from which nothing came for so long is closed */
#define HUB_PING_MS 2000U
#define HUB_START_NS (60 * NS_PER_SEC)	/* for a START_PROTECT to be answered */
#define HUB_ANSWER_NS (15 * NS_PER_SEC) /* for another, until its group is known: then twice its peer_timeout */
#define HUB_CALL_NS (30 * NS_PER_SEC)	/* for the peer's answer, beyond twice peer_timeout */

struct call;
struct conn;
struct ctl_conn;
struct daemon;
struct group;
struct pool;

struct hub {
	struct mutex lock; /* a leaf: nothing is called under it */
	struct cond cond;  /* a request or a call has ended */
	struct hub_request *requests;
	unsigned n_requests;
	struct hub_call *calls;
	uint64_t tokens;
	struct pool *pool;    /* made with the first request */
	_Atomic bool changed; /* a volume may have changed since the last report */
	uint64_t reported;    /* what the last report to all held, as a hash. The ticker's */
};

void hub_init(struct hub *h);
void hub_free(struct hub *h); /* no request is left */
/* Hub messages on any connection; the caller gives all frames of a host-wide one. Takes payload. As a link's `frame`.
 */
bool hub_is(unsigned type);
int hub_frame(struct conn *c, const struct wire_frame *f, void *payload);
int hub_host_frame(struct conn *c, const struct wire_frame *f, void *payload);
int hub_report_frame(struct conn *c, const struct wire_frame *f, const void *payload);
void hub_conn_down(struct conn *c);
/* The connection stands: it gets this host's report, and each later one. */
void hub_conn_up(struct conn *c);
void hub_volumes_changed(struct daemon *d);
void hub_tick(struct daemon *d); /* every TICK_NS */
void hub_shutdown(struct daemon *d);
bool hub_wait_quiet(struct daemon *d, uint64_t deadline_ns);

/* For the verbs. remote: of the peer that is connected. The range may be any of the volume, at most WIRE_RANGE_MAX.
 * hub_read: *ret is owned, NULL: all zeroes. */
int hub_read(const struct call *c, const char *name, bool remote, uint64_t off, uint64_t len, void **ret);
/* data is borrowed. */
int hub_write(const struct call *c, const char *name, bool remote, uint64_t off, uint64_t len, const void *data,
	      bool flush);
/* {"store", "volumes": [...]}, or with remote {"peers": [{"address", "store", "program", "volumes"}]}. */
int hub_report(const struct call *c, bool remote, json_t **ret);
/* The ids, then the protection. x->n_volumes 0: the ids stay as they are. flags: CMD_PROTECT's. */
int hub_protect(struct group *g, const struct wire_start *x, uint32_t flags, struct ctl_conn *ctl, uint64_t deadline_ns,
		struct err *e);

#endif
