/* Error codes, and the caller-owned error report used at module boundaries.
 *
 * Functions return 0 (or a count) on success and a negative code, -ERR_x, on failure. Where a person will
 * read about the failure, the function also takes a `struct err *` (may be NULL) and fills it once, at the
 * place that knows what was asked, what is the matter and what to do.
 *
 * ERR_CODES is the one list: name, errno for FUSE replies, exit code of repctl (SPEC 14), short text.
 */
#ifndef REPFS_CORE_ERR_H
#define REPFS_CORE_ERR_H

#include <stdarg.h>
#include <stdint.h>

#define ERR_CODES(X)                                                                                                   \
	X(ERR_FAILED, EIO, 1, "failed")                                                                                \
	X(ERR_IO, EIO, 1, "input/output error")                                                                        \
	X(ERR_NOSPC, ENOSPC, 1, "no space left")                                                                       \
	X(ERR_NOMEM, ENOMEM, 1, "out of memory")                                                                       \
	X(ERR_CORRUPT, EIO, 1, "does not check out")                                                                   \
	X(ERR_VERSION, EPROTONOSUPPORT, 1, "version not supported")                                                    \
	X(ERR_EXIST, EEXIST, 1, "exists already")                                                                      \
	X(ERR_BUSY, EBUSY, 1, "in use")                                                                                \
	X(ERR_PERM, EPERM, 1, "not permitted")                                                                         \
	X(ERR_CANCELED, ECANCELED, 1, "cancelled")                                                                     \
	X(ERR_PROTO, EPROTO, 1, "protocol error")                                                                      \
	X(ERR_LIMIT, EMFILE, 1, "limit reached")                                                                       \
	X(ERR_NOTSUP, EOPNOTSUPP, 1, "not supported")                                                                  \
	X(ERR_USAGE, EINVAL, 2, "usage")                                                                               \
	X(ERR_RANGE, EINVAL, 2, "out of range")                                                                        \
	X(ERR_UNREACHABLE_DAEMON, ECONNREFUSED, 3, "daemon unreachable")                                               \
	X(ERR_NOENT, ENOENT, 4, "no such object")                                                                      \
	X(ERR_STATE, EINVAL, 5, "wrong state or role")                                                                 \
	X(ERR_PEER, ENOTCONN, 6, "peer unreachable")                                                                   \
	X(ERR_DEGRADED, EIO, 7, "degraded")                                                                            \
	X(ERR_SPLIT, EIO, 8, "split brain")                                                                            \
	X(ERR_DIFFERS, EIO, 9, "differences found")                                                                    \
	X(ERR_TIMEOUT, ETIMEDOUT, 124, "timed out")                                                                    \
	X(ERR_INTR, EINTR, 130, "interrupted")

enum err_code {
	ERR_OK = 0,
#define ERR_ENUM(name, sys, exit, text) name,
	ERR_CODES(ERR_ENUM)
#undef ERR_ENUM
	    ERR_CODES_END
};

#define ERR_TEXT_MAX 512

struct err {
	int code;		 /* enum err_code, positive; 0: nothing set */
	char text[ERR_TEXT_MAX]; /* one sentence: what was asked, what is the matter, what to do */
};

/* Fills *e (NULL: ignored) and returns -code. The first report wins nothing: a later call overwrites. */
int err_set(struct err *e, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
int err_setv(struct err *e, int code, const char *fmt, va_list ap) __attribute__((format(printf, 3, 0)));

/* Each takes a code of either sign. Unknown codes read as ERR_FAILED. */
const char *err_name(int code);	 /* "ERR_IO" */
const char *err_short(int code); /* "input/output error" */
int err_errno(int code);	 /* positive errno for a FUSE reply; 0 for 0 */
int err_exit(int code);		 /* exit code of repctl; 0 for 0 */

/* Negative code for a positive errno: ENOSPC and EDQUOT → -ERR_NOSPC, ENOENT → -ERR_NOENT, ENOMEM → -ERR_NOMEM,
 * EEXIST → -ERR_EXIST, EACCES/EPERM/EROFS → -ERR_PERM, everything else → -ERR_IO. */
int err_from_errno(int sys);

#endif
