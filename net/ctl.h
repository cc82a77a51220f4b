/* The control socket (STORE/control.sock, mode 0600): newline-delimited JSON (docs/control.md).
 *   request   {"verb":"checkpoint","args":{...}}
 *   replies   {"progress":{...}}*  then  {"ok":true,"result":{...}}  or
 *             {"ok":false,"code":"ERR_STATE","exit":5,"message":"..."}
 * One connection carries requests one after another. The client hanging up cancels the request under way.
 */
#ifndef REPFS_NET_CTL_H
#define REPFS_NET_CTL_H

#include <jansson.h>
#include <stdbool.h>

#include "core/err.h"

#define CTL_LINE_MAX (1U << 20)	   /* a request, its newline included */
#define CTL_REPLY_MAX (256U << 20) /* a reply: lists of extents are long */
#define CTL_CONNECTIONS_MAX 64
#define CTL_PIECE_MAX (512U << 10) /* bytes of one `read` or `write`, before they are text */

struct ctl_server;
struct ctl_conn;

/* Runs one request in the connection's thread. args is an object, never NULL. Returns 0 with *ret_result (new
 * reference, may stay NULL = {}), or a negative code with *e filled. */
typedef int (*ctl_handler)(void *arg, struct ctl_conn *c, const char *verb, const json_t *args, json_t **ret_result,
			   struct err *e);

/* path is removed first if it is a socket that nothing answers on; -ERR_BUSY if something does. Its folder should be
 * 0700. A path too long for a socket's address is fine. */
int ctl_server_start(const char *path, ctl_handler fn, void *arg, struct ctl_server **ret, struct err *e);
/* Stops accepting, cancels (ctl_canceled becomes true), waits for the handlers and their answers (a client that does
 * not read its answer is left after a second), removes the socket. Not from a handler. */
void ctl_server_stop(struct ctl_server *s);

/* For handlers; c may be NULL (no client): nothing is sent, never cancelled. ctl_progress steals p and leaves out a
 * line that a client does not read; one thread at a time; -ERR_PEER: the client is gone. ctl_canceled may be asked from
 * any thread while the handler runs. */
int ctl_progress(struct ctl_conn *c, json_t *p);
bool ctl_canceled(struct ctl_conn *c); /* the client has hung up or the server stops */

/* Client: connects, sends, waits. -ERR_UNREACHABLE_DAEMON if nothing answers; -ERR_TIMEOUT after timeout_ms (0: none).
 * A refusal comes back as its code (of err_name) with its message in *e and *ret_exit its exit code.
 * progress may be NULL; p is borrowed. *ret_result: new reference. *ret_exit is set in every case, 0 on success; it
 * may be NULL, args too. SIGPIPE is not raised. */
int ctl_call(const char *path, const char *verb, json_t *args /* stolen */, unsigned timeout_ms,
	     void (*progress)(void *arg, const json_t *p), void *arg, json_t **ret_result, int *ret_exit,
	     struct err *e);

#endif
