/* The wire protocol's frames and messages (docs/protocol.md, normative). Pure codec: no socket here.
 *
 * A frame is a 56-byte header and 0 to WIRE_PAYLOAD_MAX bytes of payload. The header carries the frame's number in
 * its direction, a CRC-32C of the payload and one of itself, seeded with the session: so a flipped, lost or doubled
 * bit or chunk is detected before anything is applied, and a frame of another session never checks out (I14).
 */
#ifndef REPFS_CORE_WIRE_H
#define REPFS_CORE_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "core/err.h"
#include "core/repl_meta.h"

#define WIRE_MAGIC "repfs\0\1\0" /* first 8 bytes of a HELLO payload */
#define WIRE_VERSION_MIN 2
#define WIRE_VERSION_MAX 2
#define WIRE_HEADER_SIZE 56
#define WIRE_PAYLOAD_MAX (2U << 20)
#define WIRE_SPAN_MAX (UINT64_C(1) << 30) /* bytes of one ZERO, DISCARD, RESYNC_ZERO: bounds one request's work */
#define WIRE_HELLO_MAX 4096		  /* largest payload before the handshake is complete */
#define WIRE_TEXT_MAX 480
#define WIRE_SETTINGS_MAX 4096	  /* largest SETTINGS payload */
#define WIRE_RANGE_MAX (1U << 20) /* bytes of one VOLUME_READ, VOLUME_WRITE */
/* Largest checkpoint number that a peer may bring: what is left above it is more than can ever be counted, so no peer
 * can use the numbers up. */
#define WIRE_CKPT_NUMBER_MAX (UINT64_C(1) << 62)

enum wire_features {
	WIRE_FEATURE_ZSTD = 1 << 0, /* payload compression; not offered yet */
};

/* X(name, value, payload kind) */
#define WIRE_TYPES(X)                                                                                                  \
	X(HELLO, 1)	    /* wire_hello */                                                                           \
	X(REPORT, 2)	    /* wire_report */                                                                          \
	X(JOIN, 3)	    /* wire_join: the sender's view of one group */                                            \
	X(REFUSE, 4)	    /* wire_refuse: fatal for the connection */                                                \
	X(PING, 5)	    /* offset: an opaque token */                                                              \
	X(PONG, 6)	    /* offset: the ping's token */                                                             \
	X(GOODBYE, 7)	    /* offset: enum wire_goodbye; the sender closes after it */                                \
	X(WRITE, 16)	    /* seq volume offset length; payload: length bytes */                                      \
	X(ZERO, 17)	    /* seq volume offset length */                                                             \
	X(DISCARD, 18)	    /* seq volume offset length */                                                             \
	X(FLUSH, 19)	    /* seq: a barrier */                                                                       \
	X(CHECKPOINT, 20)   /* seq; offset: number; flags: enum wire_ckpt_flags; length: wall clock ns. A barrier */   \
	X(RESYNC_WRITE, 21) /* as WRITE */                                                                             \
	X(RESYNC_ZERO, 22)  /* as ZERO */                                                                              \
	X(RESYNC_DONE, 23)  /* seq; payload: wire_lineage of the source. A barrier */                                  \
	X(DIRTY, 24) /* volume; payload: (u64 offset, u64 length)*: dirty ranges of a target, or of a split brain */   \
	X(DIRTY_END, 25) /* no more of them; offset: ns since 1970 when the sender's copy began to differ, 0: none */  \
	X(RESYNC_BEGIN, 26) /* seq; offset: source's generation; length: bytes to do. A barrier */                     \
	X(RESYNC_READY, 27) /* seq: of BEGIN; marked inconsistent, durable; offset: target's ckpt_max */               \
	X(ACK, 32)	    /* payload: wire_ack */                                                                    \
	X(CHECKPOINT_ACK,                                                                                              \
	  33)		  /* offset: number; length: enum wire_void; seq: bytes of active that taking it emptied */    \
	X(RESYNC_ACK, 34) /* seq: adopted */                                                                           \
	X(IO_ERROR, 35)	  /* seq volume offset length; payload: wire_refuse (code and text): applying stopped */       \
	X(CHECKPOINT_WANT, 36) /* secondary → primary: take one now; offset: enum wire_ckpt_flags, no STOP */        \
	X(SETTINGS, 37)	       /* payload: settings_encode; seq: token */                                              \
	X(SETTINGS_ACK, 38)    /* seq: token */                                                                        \
	X(STOP_WANT, 39)       /* secondary → primary: stop the group cleanly */                                     \
	X(BEHIND, 44)	       /* source → target: nothing more is forwarded; offset: enum wire_behind */            \
	X(HASH, 45)	       /* seq volume offset length; payload: u64 seed, then a hash for each region */          \
	X(HASH_ANSWER, 46)     /* seq: of HASH; offset: mask of its regions that differ */                             \
	X(DETACH, 50)	       /* seq volume; payload: wire_lineage: the source's disk of it is gone. A barrier */     \
	X(ATTACH, 51)	       /* seq volume: and is whole again. A barrier */                                         \
	X(READ_REQ, 52)	       /* volume offset length; seq: token: the receiver's disk, behind all sent before */     \
	X(READ_REPLY, 53)      /* volume offset length; seq: token; flags: enum wire_read_flags; payload: the bytes */ \
	X(WRITE_FAILED, 54)    /* volume offset length; payload: wire_refuse: a write that failed at the source */     \
	X(HISTORY_LOST, 56)  /* secondary → primary: no checkpoint is valid until the next; payload: wire_refuse */  \
	X(TAKE_OVER, 57)     /* primary → secondary, which it is itself from now on; offset: the checkpoint */       \
	X(TOOK_OVER, 58)     /* secondary → primary, which it is itself from now on; offset: the same */             \
	X(VERIFY, 60)	     /* seq volume offset length; payload: u64 seed, then a hash for each block */             \
	X(VERIFY_ANSWER, 61) /* seq: of VERIFY; payload: (u64 offset, u64 length, u64 wire_verify_problem)* */         \
	X(SCRUB, 62)	     /* seq: token; volume; offset: from here; length: of this overlay on */                   \
	X(SCRUBBED, 63)	     /* seq: token; payload: wire_scrubbed */                                                  \
	X(RESIZE, 64)	     /* seq volume; offset: the size it is to have. A barrier */                               \
	X(RESIZE_ACK, 65)    /* seq: of RESIZE; offset: 0 it has, or an error's code; then payload: wire_refuse */     \
	X(REPORT_WANT, 70)   /* seq: token of the REPORT that answers */                                               \
	X(START_PROTECT, 71) /* seq: token; flags: enum wire_start_flags; payload: wire_start */                       \
	X(VOLUME_READ, 72)   /* seq: token; offset length; payload: the volume's name */                               \
	X(VOLUME_WRITE, 73)  /* seq: token; offset length; flags: enum wire_volume_flags; payload: name, bytes */      \
	X(VOLUME_DATA, 74)   /* seq: the token; otherwise as READ_REPLY: answers VOLUME_READ */                        \
	X(DONE, 75)	     /* seq: the token; flags: enum wire_done_flags: answers START_PROTECT, VOLUME_WRITE */

enum wire_type {
#define WIRE_ENUM(name, value) WIRE_##name = (value),
	WIRE_TYPES(WIRE_ENUM)
#undef WIRE_ENUM
};

enum wire_ckpt_flags {
	WIRE_CKPT_COMMAND = 1 << 0, /* asked for by a command: taken even when active is not empty */
	WIRE_CKPT_PIN = 1 << 1,
	WIRE_CKPT_STOP = 1 << 2,      /* the clean stop's last one: the secondary moves to DONE with it */
	WIRE_CKPT_HAND_OVER = 1 << 3, /* a switchover's: TAKE_OVER follows */
};
enum wire_void { WIRE_VOID_NONE, WIRE_VOID_ACTIVE = 1, WIRE_VOID_ERROR = 2 };
/* HASH: one hash for each WIRE_HASH_REGION bytes of its range, the last for what is left. */
#define WIRE_HASH_SHIFT 16
#define WIRE_HASH_REGION (1U << WIRE_HASH_SHIFT)
#define WIRE_HASH_REGIONS_MAX 64U
#define WIRE_HASH_SIZE 16U
/* VERIFY: one hash for each WIRE_VERIFY_BLOCK bytes of its range, or WIRE_VERIFY_ZERO and none. */
#define WIRE_VERIFY_SHIFT 12
#define WIRE_VERIFY_BLOCK (1U << WIRE_VERIFY_SHIFT)
#define WIRE_VERIFY_BLOCKS_MAX 128U
#define WIRE_VERIFY_RANGES_MAX 128U /* in a VERIFY_ANSWER */
#define WIRE_VERIFY_RANGE_SIZE 24U
enum wire_verify_flags { WIRE_VERIFY_ZERO = 1 << 0 }; /* the sender's disk holds zeroes there */
enum wire_verify_problem { WIRE_VERIFY_DIFFERS = 1, WIRE_VERIFY_UNREADABLE = 2 };
#define WIRE_SCRUB_ACTIVE UINT64_MAX /* the active overlay, behind all checkpoints' */
#define WIRE_SCRUBBED_HEAD 32U
#define WIRE_SCRUBBED_ENTRY 32U
#define WIRE_SCRUBBED_MAX 64U
#define WIRE_SCRUBBED_END (1U << 0) /* flag: that was the last of the volume */
enum wire_behind { WIRE_BEHIND_PAUSED, WIRE_BEHIND_CONGESTED, WIRE_BEHIND_FAILED };
enum wire_read_flags {
	WIRE_READ_ZERO = 1 << 0,  /* the range is all zeroes: no payload */
	WIRE_READ_ERROR = 1 << 1, /* payload: wire_refuse */
};
enum wire_start_flags {
	WIRE_START_ADOPT = 1 << 0, /* as protect --adopt */
	WIRE_START_HASH = 1 << 1,  /* as protect --hash */
};
enum wire_volume_flags {
	WIRE_VOLUME_FLUSH = 1 << 0, /* VOLUME_WRITE: then a guest's flush; its length may be 0 */
};
enum wire_done_flags {
	WIRE_DONE_ERROR = 1 << 0, /* payload: wire_refuse */
};
enum wire_goodbye { WIRE_BYE_SHUTDOWN, WIRE_BYE_STOP, WIRE_BYE_FAILOVER };

struct wire_frame {
	uint16_t type, flags;
	uint32_t length_payload;
	uint64_t number; /* of this frame in its direction, from 0; HELLO is 0 */
	uint64_t seq;
	uint64_t offset, length;
	uint32_t volume;
	uint32_t crc_payload;
};

/* session: 0 for HELLO frames, then wire_session of both nonces. */
void wire_header_encode(const struct wire_frame *f, uint64_t session, uint8_t out[WIRE_HEADER_SIZE]);
/* Checks the header's CRC and everything that its type says of its fields; the payload's length against payload_max
 * too. -ERR_PROTO (also for a type it does not know), *f untouched. What only the session knows (the frame's number,
 * the volume and its size, the payload's CRC, whether the type is expected now) is the caller's to check. */
int wire_header_decode(struct wire_frame *f, uint64_t session, const uint8_t in[WIRE_HEADER_SIZE], uint32_t payload_max,
		       struct err *e);
const char *wire_type_name(unsigned type);

struct wire_hello {
	uint16_t version_min, version_max;
	uint32_t features;
	uint8_t store[16];
	uint64_t nonce;
	char program[64]; /* "repfs 0.1.0": for messages only; decoded as printable ASCII */
};
int wire_hello_encode(const struct wire_hello *h, void *buf, size_t size); /* length or -ERR_LIMIT */
int wire_hello_decode(struct wire_hello *h, const void *buf, size_t len, struct err *e);
/* The version both speak, or -ERR_VERSION with both versions named in *e. */
int wire_negotiate(const struct wire_hello *mine, const struct wire_hello *theirs, struct err *e);
/* Session seed from the dialer's and the listener's nonce; never 0. */
uint64_t wire_session(uint64_t dialer_nonce, uint64_t listener_nonce);

struct wire_refuse {
	uint16_t code;		  /* enum err_code, as a stable number: docs/protocol.md */
	char text[WIRE_TEXT_MAX]; /* encoded and decoded as printable ASCII, other bytes as '?' */
};
int wire_refuse_encode(const struct wire_refuse *x, void *buf, size_t size);
int wire_refuse_decode(struct wire_refuse *x, const void *buf, size_t len, struct err *e);

struct wire_ack {
	uint64_t received, applied, flushed; /* cumulative sequence numbers: all up to it */
};
int wire_ack_encode(const struct wire_ack *a, void *buf, size_t size);
int wire_ack_decode(struct wire_ack *a, const void *buf, size_t len, struct err *e);

void wire_lineage_encode(const struct lineage *l, struct wbuf *w);
void wire_lineage_decode(struct lineage *l, struct rbuf *r);

/* A range of VERIFY_ANSWER. */
struct wire_verify_range {
	uint64_t off, len;
	uint64_t problem; /* enum wire_verify_problem */
};
void wire_verify_range_put(uint8_t out[WIRE_VERIFY_RANGE_SIZE], const struct wire_verify_range *r);
/* n = length / WIRE_VERIFY_RANGE_SIZE of them into r[WIRE_VERIFY_RANGES_MAX]; ascending, without overlaps, whole
 * inside [off, off + len). Returns n. */
int wire_verify_answer_decode(struct wire_verify_range *r, uint64_t off, uint64_t len, const void *buf, size_t length,
			      struct err *e);

/* What one step of a scrub found: of the overlays of one volume. */
struct wire_scrubbed {
	uint64_t next_layer, next_off; /* where to go on; ignored with WIRE_SCRUBBED_END */
	uint64_t bytes;		       /* of blocks that were looked at */
	uint64_t left;		       /* of blocks that are left in this volume, about */
	uint32_t n;
	struct wire_scrub_bad {
		uint64_t layer; /* checkpoint, or WIRE_SCRUB_ACTIVE */
		uint64_t off, len;
		uint64_t unreadable; /* 1: could not be read; 0: its checksum does not fit */
	} bad[WIRE_SCRUBBED_MAX];
};
int wire_scrubbed_encode(const struct wire_scrubbed *s, void *buf, size_t size); /* length */
int wire_scrubbed_decode(struct wire_scrubbed *s, const void *buf, size_t len, struct err *e);

enum wire_join_flags {
	WIRE_JOIN_PROTECT = 1 << 0,	  /* make (or adopt) the recovery volumes */
	WIRE_JOIN_ADOPT = 1 << 1,	  /* adopt even if it was written */
	WIRE_JOIN_START = 1 << 2,	  /* after a stop: DONE → NONE → RUNNING */
	WIRE_JOIN_ALONE = 1 << 3,	  /* meta.alone */
	WIRE_JOIN_INCONSISTENT = 1 << 4,  /* meta.inconsistent */
	WIRE_JOIN_HOLDING = 1 << 5,	  /* a restarted primary that has served nothing yet */
	WIRE_JOIN_SPLIT = 1 << 6,	  /* the sender stands halted by split brain */
	WIRE_JOIN_FRESH = 1 << 7,	  /* meta.fresh, or never written */
	WIRE_JOIN_DISCARD_MINE = 1 << 8,  /* resolve: the sender's copy is given up */
	WIRE_JOIN_DISCARD_YOURS = 1 << 9, /* resolve: the receiver's copy is given up */
	WIRE_JOIN_FAILBACK = 1 << 10,	  /* the sender has failed over and becomes primary of the old primary */
	WIRE_JOIN_BROKEN = 1 << 16,	  /* meta.broken of a secondary: no checkpoint is valid until the next */
	WIRE_JOIN_HANDED = 1 << 17,	  /* meta.handed: the receiver takes over */
};

/* What each side says of a group when a connection is made for it. */
struct wire_join {
	char group[NAME_SIZE];
	uint8_t group_uuid[16];
	uint32_t flags; /* enum wire_join_flags */
	uint8_t role, state;
	struct lineage lineage;
	uint64_t sync_from;
	uint64_t ckpt_max;
	uint64_t last_stream;
	uint64_t failover_generation;
	uint64_t start, number; /* of this start of the sender, its `number`th JOIN; start 0: it does not number them */
	struct settings settings;
	uint32_t n_volumes;
	struct repl_volume volumes[GROUP_VOLUMES_MAX];
};
#define WIRE_JOIN_ENCODED_MAX (32U << 10)
int wire_join_encode(const struct wire_join *j, void *buf, size_t size);
int wire_join_decode(struct wire_join *j, const void *buf, size_t len, struct err *e);

/* START_PROTECT: this host is to be primary for the group of these volumes, which are to have these ids, and `peer` its
 * secondary. */
struct wire_start {
	char peer[ADDR_SIZE]; /* HOST:PORT, dialled by the receiver */
	uint32_t n_volumes;   /* at least 1 */
	struct wire_start_volume {
		char name[NAME_SIZE];
		uint32_t id;
	} volumes[GROUP_VOLUMES_MAX]; /* names and ids used once */
};
#define WIRE_START_ENCODED_MAX (2U + ADDR_SIZE - 1 + 4U + GROUP_VOLUMES_MAX * (2U + NAME_MAX_LEN + 4U))
int wire_start_encode(const struct wire_start *x, void *buf, size_t size);
int wire_start_decode(struct wire_start *x, const void *buf, size_t len, struct err *e);

/* The payload of VOLUME_READ and VOLUME_WRITE: the name, then `bytes` bytes (0 for a READ), which are to be at
 * *ret_at. */
#define WIRE_VOLUME_NAME_MAX (2U + NAME_MAX_LEN)
int wire_volume_encode(const char *name, void *buf, size_t size); /* the name's part */
int wire_volume_decode(char name[NAME_SIZE], size_t *ret_at, const void *buf, size_t len, uint64_t bytes,
		       struct err *e);

/* The volume report of a host. */
struct wire_report_volume {
	char name[NAME_SIZE], group[NAME_SIZE];
	uint8_t uuid[16];
	uint32_t id;
	uint64_t size;
	uint8_t role, state;
};
#define WIRE_REPORT_MAX 1024 /* volumes in one frame; more frames follow, the last has flags bit 0 set */
#define WIRE_REPORT_LAST (1U << 0)
#define WIRE_REPORT_ENCODED_MAX (4U + WIRE_REPORT_MAX * (2U * (2U + NAME_MAX_LEN) + 30U))
int wire_report_encode(const struct wire_report_volume *v, uint32_t n, void *buf, size_t size);
/* Into v[max]; returns n. */
int wire_report_decode(struct wire_report_volume *v, uint32_t max, const void *buf, size_t len, struct err *e);

#endif
