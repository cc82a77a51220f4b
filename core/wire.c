/* The codec of docs/protocol.md: frame headers and message payloads to and from bytes.
 *
 * Nothing here trusts its input: a header is judged by one table (what its type may carry), a payload by its parser,
 * which bounds every count before it loops and names the field that is wrong. What passes can be acted on without
 * looking again at encodings; what only the session knows (is this volume ours, is the range inside it, is this type
 * expected now) stays with the session. Outputs are untouched on failure.
 */
#include "core/wire.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/range.h"

/* Header layout; docs/protocol.md has the table. */
enum header_offset {
	AT_LENGTH_PAYLOAD = 0,
	AT_TYPE = 4,
	AT_FLAGS = 6,
	AT_NUMBER = 8,
	AT_SEQ = 16,
	AT_OFFSET = 24,
	AT_LENGTH = 32,
	AT_VOLUME = 40,
	AT_CRC_PAYLOAD = 44,
	AT_RESERVED = 48,
	AT_CRC = 52,
};

#define ACK_SIZE 24U
#define DIRTY_ENTRY_SIZE 16U
#define LINEAGE_SIZE (8U * (2U + GENERATIONS_MAX))
#define REFUSE_MIN 4U
#define REFUSE_MAX (REFUSE_MIN + WIRE_TEXT_MAX - 1)
#define VOLUME_NAME_MIN 3U
#define START_MIN (2U + 3U + 4U + VOLUME_NAME_MIN + 4U)
#define JOIN_FLAGS_ALL 0x307ffU
#define CKPT_FLAGS_KNOWN (WIRE_CKPT_COMMAND | WIRE_CKPT_PIN | WIRE_CKPT_STOP | WIRE_CKPT_HAND_OVER)

/* The numbers of enum err_code go over the wire and are frozen in docs/protocol.md: a new code goes to the end. */
#define CODE_IS(name, number) _Static_assert((name) == (number), "frozen on the wire")
CODE_IS(ERR_FAILED, 1);
CODE_IS(ERR_IO, 2);
CODE_IS(ERR_NOSPC, 3);
CODE_IS(ERR_NOMEM, 4);
CODE_IS(ERR_CORRUPT, 5);
CODE_IS(ERR_VERSION, 6);
CODE_IS(ERR_EXIST, 7);
CODE_IS(ERR_BUSY, 8);
CODE_IS(ERR_PERM, 9);
CODE_IS(ERR_CANCELED, 10);
CODE_IS(ERR_PROTO, 11);
CODE_IS(ERR_LIMIT, 12);
CODE_IS(ERR_NOTSUP, 13);
CODE_IS(ERR_USAGE, 14);
CODE_IS(ERR_RANGE, 15);
CODE_IS(ERR_UNREACHABLE_DAEMON, 16);
CODE_IS(ERR_NOENT, 17);
CODE_IS(ERR_STATE, 18);
CODE_IS(ERR_PEER, 19);
CODE_IS(ERR_DEGRADED, 20);
CODE_IS(ERR_SPLIT, 21);
CODE_IS(ERR_DIFFERS, 22);
CODE_IS(ERR_TIMEOUT, 23);
CODE_IS(ERR_INTR, 24);

/* ---- what each type may carry ---- */

enum range_rule {
	RANGE_FREE,   /* offset and length are not a range */
	RANGE_DATA,   /* length bytes of payload, at least one */
	RANGE_SPAN,   /* 1 to WIRE_SPAN_MAX bytes, no payload */
	RANGE_ANY,    /* may be empty */
	RANGE_READ,   /* 1 to length_max bytes */
	RANGE_REPLY,  /* the same range: its bytes as payload, unless the flags say otherwise */
	RANGE_NAMED,  /* length_max at most: that many bytes of payload behind a name; may be empty with a flush */
	RANGE_HASH,   /* as many regions as the payload has hashes for */
	RANGE_VERIFY, /* as many blocks as the payload has hashes for, or a span without payload */
};

struct type_rule {
	bool known;
	bool sequenced;
	uint16_t flags; /* those allowed */
	enum range_rule range;
	uint32_t payload_min, payload_max;
	uint32_t payload_entry;			     /* a multiple of this; 0: any length */
	uint64_t offset_min, offset_max, length_max; /* a maximum of 0: none */
};

#define PLAIN .known = true
#define SEQUENCED .known = true, .sequenced = true
#define PAYLOAD(min, max) .payload_min = (min), .payload_max = (max)

static const struct type_rule rules[] = {
    [WIRE_HELLO] = {PLAIN, PAYLOAD(1, WIRE_HELLO_MAX)},
    [WIRE_REPORT] = {PLAIN, PAYLOAD(4, WIRE_REPORT_ENCODED_MAX), .flags = WIRE_REPORT_LAST},
    [WIRE_JOIN] = {PLAIN, PAYLOAD(1, WIRE_JOIN_ENCODED_MAX)},
    [WIRE_REFUSE] = {PLAIN, PAYLOAD(REFUSE_MIN, REFUSE_MAX)},
    [WIRE_PING] = {PLAIN},
    [WIRE_PONG] = {PLAIN},
    [WIRE_GOODBYE] = {PLAIN, .offset_max = WIRE_BYE_FAILOVER},
    [WIRE_WRITE] = {SEQUENCED, PAYLOAD(1, WIRE_PAYLOAD_MAX), .range = RANGE_DATA},
    [WIRE_ZERO] = {SEQUENCED, .range = RANGE_SPAN},
    [WIRE_DISCARD] = {SEQUENCED, .range = RANGE_SPAN},
    [WIRE_FLUSH] = {SEQUENCED},
    [WIRE_CHECKPOINT] = {SEQUENCED, .flags = CKPT_FLAGS_KNOWN, .offset_min = 1, .offset_max = WIRE_CKPT_NUMBER_MAX},
    [WIRE_RESYNC_WRITE] = {SEQUENCED, PAYLOAD(1, WIRE_PAYLOAD_MAX), .range = RANGE_DATA},
    [WIRE_RESYNC_ZERO] = {SEQUENCED, .range = RANGE_SPAN},
    [WIRE_RESYNC_DONE] = {SEQUENCED, PAYLOAD(LINEAGE_SIZE, LINEAGE_SIZE)},
    [WIRE_DIRTY] = {PLAIN, PAYLOAD(0, WIRE_PAYLOAD_MAX), .payload_entry = DIRTY_ENTRY_SIZE},
    [WIRE_DIRTY_END] = {PLAIN},
    [WIRE_RESYNC_BEGIN] = {SEQUENCED, .offset_min = 1},
    [WIRE_RESYNC_READY] = {PLAIN, .offset_max = WIRE_CKPT_NUMBER_MAX},
    [WIRE_ACK] = {PLAIN, PAYLOAD(ACK_SIZE, ACK_SIZE)},
    [WIRE_CHECKPOINT_ACK] = {PLAIN, .offset_min = 1, .offset_max = WIRE_CKPT_NUMBER_MAX, .length_max = WIRE_VOID_ERROR},
    [WIRE_RESYNC_ACK] = {PLAIN},
    [WIRE_IO_ERROR] = {PLAIN, PAYLOAD(REFUSE_MIN, REFUSE_MAX), .range = RANGE_ANY},
    [WIRE_CHECKPOINT_WANT] = {PLAIN, .offset_max = WIRE_CKPT_COMMAND | WIRE_CKPT_PIN},
    [WIRE_SETTINGS] = {PLAIN, PAYLOAD(2, WIRE_SETTINGS_MAX)},
    [WIRE_SETTINGS_ACK] = {PLAIN},
    [WIRE_STOP_WANT] = {PLAIN},
    [WIRE_HISTORY_LOST] = {PLAIN, PAYLOAD(REFUSE_MIN, REFUSE_MAX)},
    [WIRE_TAKE_OVER] = {PLAIN, .offset_min = 1, .offset_max = WIRE_CKPT_NUMBER_MAX},
    [WIRE_TOOK_OVER] = {PLAIN, .offset_min = 1, .offset_max = WIRE_CKPT_NUMBER_MAX},
    [WIRE_BEHIND] = {PLAIN, .offset_max = WIRE_BEHIND_FAILED},
    [WIRE_DETACH] = {SEQUENCED, PAYLOAD(LINEAGE_SIZE, LINEAGE_SIZE)},
    [WIRE_ATTACH] = {SEQUENCED},
    [WIRE_READ_REQ] = {SEQUENCED, .range = RANGE_READ, .length_max = WIRE_PAYLOAD_MAX},
    [WIRE_READ_REPLY] = {SEQUENCED, PAYLOAD(0, WIRE_PAYLOAD_MAX), .range = RANGE_REPLY, .length_max = WIRE_PAYLOAD_MAX,
			 .flags = WIRE_READ_ZERO | WIRE_READ_ERROR},
    [WIRE_WRITE_FAILED] = {PLAIN, PAYLOAD(REFUSE_MIN, REFUSE_MAX), .range = RANGE_ANY},
    [WIRE_HASH] = {SEQUENCED, PAYLOAD(8 + WIRE_HASH_SIZE, 8 + WIRE_HASH_SIZE * WIRE_HASH_REGIONS_MAX),
		   .range = RANGE_HASH},
    [WIRE_HASH_ANSWER] = {PLAIN},
    [WIRE_REPORT_WANT] = {SEQUENCED},
    [WIRE_START_PROTECT] = {SEQUENCED, PAYLOAD(START_MIN, WIRE_START_ENCODED_MAX),
			    .flags = WIRE_START_ADOPT | WIRE_START_HASH},
    [WIRE_VOLUME_READ] = {SEQUENCED, PAYLOAD(VOLUME_NAME_MIN, WIRE_VOLUME_NAME_MAX), .range = RANGE_READ,
			  .length_max = WIRE_RANGE_MAX},
    [WIRE_VOLUME_WRITE] = {SEQUENCED, PAYLOAD(VOLUME_NAME_MIN, WIRE_VOLUME_NAME_MAX + WIRE_RANGE_MAX),
			   .range = RANGE_NAMED, .length_max = WIRE_RANGE_MAX, .flags = WIRE_VOLUME_FLUSH},
    [WIRE_VOLUME_DATA] = {SEQUENCED, PAYLOAD(0, WIRE_RANGE_MAX), .range = RANGE_REPLY, .length_max = WIRE_RANGE_MAX,
			  .flags = WIRE_READ_ZERO | WIRE_READ_ERROR},
    [WIRE_DONE] = {SEQUENCED, PAYLOAD(0, REFUSE_MAX), .flags = WIRE_DONE_ERROR},
    [WIRE_VERIFY] = {SEQUENCED, PAYLOAD(0, 8 + WIRE_HASH_SIZE * WIRE_VERIFY_BLOCKS_MAX), .range = RANGE_VERIFY,
		     .flags = WIRE_VERIFY_ZERO},
    [WIRE_VERIFY_ANSWER] = {SEQUENCED, PAYLOAD(0, WIRE_VERIFY_RANGE_SIZE *WIRE_VERIFY_RANGES_MAX),
			    .payload_entry = WIRE_VERIFY_RANGE_SIZE},
    [WIRE_RESIZE] = {SEQUENCED, .offset_min = SECTOR_SIZE, .offset_max = VOLUME_SIZE_MAX},
    [WIRE_RESIZE_ACK] = {SEQUENCED, PAYLOAD(0, REFUSE_MAX), .offset_max = UINT16_MAX},
    [WIRE_SCRUB] = {SEQUENCED, .offset_max = VOLUME_SIZE_MAX},
    [WIRE_SCRUBBED] = {SEQUENCED,
		       PAYLOAD(WIRE_SCRUBBED_HEAD, WIRE_SCRUBBED_HEAD + WIRE_SCRUBBED_ENTRY * WIRE_SCRUBBED_MAX),
		       .payload_entry = WIRE_SCRUBBED_ENTRY, .flags = WIRE_SCRUBBED_END},
};

const char *wire_type_name(unsigned type)
{
	static const char *const names[] = {
#define TYPE_NAME(name, value) [value] = #name,
	    WIRE_TYPES(TYPE_NAME)
#undef TYPE_NAME
	};
	return type < ARRAY_LEN(names) && names[type] != NULL ? names[type] : "UNKNOWN";
}

/* ---- frame header ---- */

static uint32_t header_crc(uint64_t session, const uint8_t *header)
{
	uint8_t seed[8];

	put_u64(seed, session);
	return crc32c(crc32c(0, seed, sizeof(seed)), header, AT_CRC);
}

void wire_header_encode(const struct wire_frame *f, uint64_t session, uint8_t out[WIRE_HEADER_SIZE])
{
	put_u32(out + AT_LENGTH_PAYLOAD, f->length_payload);
	put_u16(out + AT_TYPE, f->type);
	put_u16(out + AT_FLAGS, f->flags);
	put_u64(out + AT_NUMBER, f->number);
	put_u64(out + AT_SEQ, f->seq);
	put_u64(out + AT_OFFSET, f->offset);
	put_u64(out + AT_LENGTH, f->length);
	put_u32(out + AT_VOLUME, f->volume);
	put_u32(out + AT_CRC_PAYLOAD, f->crc_payload);
	put_u32(out + AT_RESERVED, 0);
	put_u32(out + AT_CRC, header_crc(session, out));
}

static int frame_bad(struct err *e, const struct wire_frame *f, const char *field, const char *matter)
{
	return err_set(e, ERR_PROTO, "frame %" PRIu64 " (%s), field %s: %s", f->number, wire_type_name(f->type), field,
		       matter);
}

static int payload_check(const struct wire_frame *f, const struct type_rule *rule, uint32_t payload_max, struct err *e)
{
	if (f->length_payload > payload_max || f->length_payload > rule->payload_max)
		return frame_bad(e, f, "length_payload", "above the limit");
	if (f->length_payload < rule->payload_min)
		return frame_bad(e, f, "length_payload", "too short for its type");
	if (rule->payload_entry != 0 && f->length_payload % rule->payload_entry != 0)
		return frame_bad(e, f, "length_payload", "not a whole number of entries");
	if (f->length_payload == 0 && f->crc_payload != 0)
		return frame_bad(e, f, "crc_payload", "not 0 without a payload");
	return 0;
}

static int range_check(const struct wire_frame *f, const struct type_rule *rule, struct err *e)
{
	if (rule->range == RANGE_FREE) {
		if (f->offset < rule->offset_min || (rule->offset_max != 0 && f->offset > rule->offset_max))
			return frame_bad(e, f, "offset", "out of bounds");
		if (rule->length_max != 0 && f->length > rule->length_max)
			return frame_bad(e, f, "length", "out of bounds");
		if (f->type == WIRE_DONE &&
		    (f->flags & WIRE_DONE_ERROR ? f->length_payload < REFUSE_MIN : f->length_payload != 0))
			return frame_bad(e, f, "length_payload", "not what its flags say");
		return 0;
	}
	if (rule->range == RANGE_DATA && f->length != f->length_payload)
		return frame_bad(e, f, "length", "not its payload's");
	if (rule->range == RANGE_HASH &&
	    (f->length == 0 || f->length > (uint64_t)WIRE_HASH_REGION * WIRE_HASH_REGIONS_MAX ||
	     f->length_payload != 8 + WIRE_HASH_SIZE * units_of(f->length, WIRE_HASH_SHIFT)))
		return frame_bad(e, f, "length", "not that of its hashes");
	if (rule->range == RANGE_VERIFY) {
		bool zero = f->flags & WIRE_VERIFY_ZERO;
		if (f->length == 0 || f->length > (zero ? WIRE_SPAN_MAX : WIRE_VERIFY_BLOCK * WIRE_VERIFY_BLOCKS_MAX) ||
		    f->length_payload != (zero ? 0 : 8 + WIRE_HASH_SIZE * units_of(f->length, WIRE_VERIFY_SHIFT)))
			return frame_bad(e, f, "length", "not that of its hashes");
		if (f->offset % WIRE_VERIFY_BLOCK)
			return frame_bad(e, f, "offset", "not a block's");
	}
	if (rule->range == RANGE_SPAN && (f->length == 0 || f->length > WIRE_SPAN_MAX))
		return frame_bad(e, f, "length", "out of bounds");
	if ((rule->range == RANGE_READ || rule->range == RANGE_REPLY) &&
	    (f->length == 0 || f->length > rule->length_max))
		return frame_bad(e, f, "length", "out of bounds");
	if (rule->range == RANGE_NAMED && (f->length > rule->length_max || (f->length == 0 && f->flags == 0)))
		return frame_bad(e, f, "length", "out of bounds");
	if (rule->range == RANGE_NAMED &&
	    (f->length_payload < VOLUME_NAME_MIN + f->length || f->length_payload > WIRE_VOLUME_NAME_MAX + f->length))
		return frame_bad(e, f, "length_payload", "not a name's and its bytes'");
	if (rule->range == RANGE_REPLY) {
		bool fits = f->flags == 0		 ? f->length_payload == f->length
			    : f->flags == WIRE_READ_ZERO ? f->length_payload == 0
			    : f->flags == WIRE_READ_ERROR
				? f->length_payload >= REFUSE_MIN && f->length_payload <= REFUSE_MAX
				: false;
		if (!fits)
			return frame_bad(e, f, "length_payload", "not what its flags say");
	}
	if (f->offset > VOLUME_SIZE_MAX || f->length > VOLUME_SIZE_MAX - f->offset)
		return frame_bad(e, f, "offset", "the range ends behind the largest volume");
	return 0;
}

static int frame_check(const struct wire_frame *f, uint32_t payload_max, struct err *e)
{
	int rc;

	if (f->type >= ARRAY_LEN(rules) || !rules[f->type].known)
		return err_set(e, ERR_PROTO, "frame %" PRIu64 ", field type: %u is not a known one", f->number,
			       (unsigned)f->type);
	const struct type_rule *rule = &rules[f->type];
	if ((f->flags & ~rule->flags) != 0)
		return frame_bad(e, f, "flags", "holds unknown bits");
	if (rule->sequenced && f->seq == 0)
		return frame_bad(e, f, "seq", "is 0");
	if ((rc = payload_check(f, rule, payload_max, e)) < 0)
		return rc;
	return range_check(f, rule, e);
}

int wire_header_decode(struct wire_frame *f, uint64_t session, const uint8_t in[WIRE_HEADER_SIZE], uint32_t payload_max,
		       struct err *e)
{
	struct wire_frame out = {
	    .type = get_u16(in + AT_TYPE),
	    .flags = get_u16(in + AT_FLAGS),
	    .length_payload = get_u32(in + AT_LENGTH_PAYLOAD),
	    .number = get_u64(in + AT_NUMBER),
	    .seq = get_u64(in + AT_SEQ),
	    .offset = get_u64(in + AT_OFFSET),
	    .length = get_u64(in + AT_LENGTH),
	    .volume = get_u32(in + AT_VOLUME),
	    .crc_payload = get_u32(in + AT_CRC_PAYLOAD),
	};
	int rc;

	if (get_u32(in + AT_CRC) != header_crc(session, in))
		return err_set(e, ERR_PROTO,
			       "frame header does not check out: damaged on the way, or not of this session");
	if (get_u32(in + AT_RESERVED) != 0)
		return frame_bad(e, &out, "reserved", "not 0");
	if ((rc = frame_check(&out, payload_max, e)) < 0)
		return rc;
	*f = out;
	return 0;
}

/* ---- payloads: common ---- */

/* A reader of one message that remembers the first field it failed at. */
struct message_reader {
	struct rbuf r;
	const char *message;
	const char *bad;
};

static struct message_reader message_open(const char *message, const void *buf, size_t len)
{
	return (struct message_reader){.r = {.data = buf, .size = len}, .message = message};
}

static void field_end(struct message_reader *m, const char *field)
{
	if (m->r.failed && m->bad == NULL)
		m->bad = field;
}

static int field_bad(const struct message_reader *m, struct err *e, const char *field, const char *matter)
{
	return err_set(e, ERR_PROTO, "%s, field %s: %s", m->message, field, matter);
}

static int message_parsed(const struct message_reader *m, struct err *e)
{
	return m->bad == NULL ? 0 : field_bad(m, e, m->bad, "cut short or out of bounds");
}

/* For messages whose format the negotiated version fixes: nothing may follow the last field. */
static int message_end(const struct message_reader *m, struct err *e)
{
	int rc = message_parsed(m, e);

	if (rc == 0 && m->r.pos != m->r.size)
		return err_set(e, ERR_PROTO, "%s: %zu bytes too many behind the last field", m->message,
			       m->r.size - m->r.pos);
	return rc;
}

static int encoded(const struct wbuf *w)
{
	return w->failed ? -ERR_LIMIT : (int)w->len;
}

static bool printable(char c)
{
	return c >= 0x20 && c < 0x7f;
}

/* Text of a peer ends in logs, terminals and JSON: everything but printable ASCII becomes '?'. */
static void text_clean(char *text)
{
	for (; *text != '\0'; text++) {
		if (!printable(*text))
			*text = '?';
	}
}

/* ---- HELLO ---- */

int wire_hello_encode(const struct wire_hello *h, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	wbuf_raw(&w, WIRE_MAGIC, 8);
	wbuf_u16(&w, h->version_min);
	wbuf_u16(&w, h->version_max);
	wbuf_u32(&w, h->features);
	wbuf_raw(&w, h->store, sizeof(h->store));
	wbuf_u64(&w, h->nonce);
	wbuf_str(&w, h->program);
	return encoded(&w);
}

/* Bytes behind `program` are allowed: a later version may say more, and must still be read by this one. */
int wire_hello_decode(struct wire_hello *h, const void *buf, size_t len, struct err *e)
{
	struct message_reader m = message_open("HELLO", buf, len);
	struct wire_hello out;
	uint8_t magic[8];
	int rc;

	memset(&out, 0, sizeof(out));
	rbuf_raw(&m.r, magic, sizeof(magic));
	if (m.r.failed || memcmp(magic, WIRE_MAGIC, sizeof(magic)) != 0)
		return field_bad(&m, e, "magic", "this is not a repfs peer");
	out.version_min = rbuf_u16(&m.r);
	out.version_max = rbuf_u16(&m.r);
	field_end(&m, "version");
	out.features = rbuf_u32(&m.r);
	field_end(&m, "features");
	rbuf_raw(&m.r, out.store, sizeof(out.store));
	field_end(&m, "store");
	out.nonce = rbuf_u64(&m.r);
	field_end(&m, "nonce");
	rbuf_str(&m.r, out.program, sizeof(out.program));
	field_end(&m, "program");
	if ((rc = message_parsed(&m, e)) < 0)
		return rc;
	if (out.version_min == 0 || out.version_min > out.version_max)
		return field_bad(&m, e, "version", "the lowest is 0, or above the highest");
	text_clean(out.program);
	*h = out;
	return 0;
}

int wire_negotiate(const struct wire_hello *mine, const struct wire_hello *theirs, struct err *e)
{
	unsigned low = mine->version_min > theirs->version_min ? mine->version_min : theirs->version_min;
	unsigned high = mine->version_max < theirs->version_max ? mine->version_max : theirs->version_max;

	if (low <= high)
		return (int)high;
	return err_set(
	    e, ERR_VERSION,
	    "no common protocol version: this host (%.63s) speaks %u to %u, the peer (%.63s) speaks %u to %u; "
	    "upgrade the older of the two",
	    mine->program, (unsigned)mine->version_min, (unsigned)mine->version_max, theirs->program,
	    (unsigned)theirs->version_min, (unsigned)theirs->version_max);
}

static uint64_t mix64(uint64_t z)
{
	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

/* With one nonce fixed this is a bijection of the other (0 apart): a fresh nonce on either side always makes a
 * session that no replay can have been made for. */
uint64_t wire_session(uint64_t dialer_nonce, uint64_t listener_nonce)
{
	const uint64_t step = UINT64_C(0x9e3779b97f4a7c15);
	uint64_t session = mix64(mix64(dialer_nonce + step) + listener_nonce);

	return session != 0 ? session : step;
}

/* ---- REFUSE, IO_ERROR ---- */

static uint16_t code_known(uint16_t code)
{
	return code > ERR_OK && code < ERR_CODES_END ? code : (uint16_t)ERR_FAILED;
}

int wire_refuse_encode(const struct wire_refuse *x, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};
	char text[WIRE_TEXT_MAX];

	snprintf(text, sizeof(text), "%.*s", WIRE_TEXT_MAX - 1, x->text);
	text_clean(text);
	wbuf_u16(&w, code_known(x->code));
	wbuf_str(&w, text);
	return encoded(&w);
}

int wire_refuse_decode(struct wire_refuse *x, const void *buf, size_t len, struct err *e)
{
	struct message_reader m = message_open("REFUSE", buf, len);
	struct wire_refuse out;
	int rc;

	memset(&out, 0, sizeof(out));
	out.code = code_known(rbuf_u16(&m.r));
	field_end(&m, "code");
	rbuf_str(&m.r, out.text, sizeof(out.text));
	field_end(&m, "text");
	if ((rc = message_end(&m, e)) < 0)
		return rc;
	text_clean(out.text);
	*x = out;
	return 0;
}

/* ---- ACK ---- */

int wire_ack_encode(const struct wire_ack *a, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	wbuf_u64(&w, a->received);
	wbuf_u64(&w, a->applied);
	wbuf_u64(&w, a->flushed);
	return encoded(&w);
}

int wire_ack_decode(struct wire_ack *a, const void *buf, size_t len, struct err *e)
{
	struct message_reader m = message_open("ACK", buf, len);
	struct wire_ack out;
	int rc;

	out.received = rbuf_u64(&m.r);
	field_end(&m, "received");
	out.applied = rbuf_u64(&m.r);
	field_end(&m, "applied");
	out.flushed = rbuf_u64(&m.r);
	field_end(&m, "flushed");
	if ((rc = message_end(&m, e)) < 0)
		return rc;
	if (out.applied > out.received)
		return field_bad(&m, e, "applied", "above received");
	if (out.flushed > out.applied)
		return field_bad(&m, e, "flushed", "above applied");
	*a = out;
	return 0;
}

/* ---- JOIN ---- */

void wire_lineage_encode(const struct lineage *l, struct wbuf *w)
{
	repl_meta_lineage_encode(l, w);
}

void wire_lineage_decode(struct lineage *l, struct rbuf *r)
{
	repl_meta_lineage_decode(l, r);
}

int wire_join_encode(const struct wire_join *j, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	PRE(j->n_volumes <= GROUP_VOLUMES_MAX);
	wbuf_str(&w, j->group);
	wbuf_raw(&w, j->group_uuid, sizeof(j->group_uuid));
	wbuf_u32(&w, j->flags);
	wbuf_u8(&w, j->role);
	wbuf_u8(&w, j->state);
	wire_lineage_encode(&j->lineage, &w);
	wbuf_u64(&w, j->sync_from);
	wbuf_u64(&w, j->ckpt_max);
	wbuf_u64(&w, j->last_stream);
	wbuf_u64(&w, j->failover_generation);
	wbuf_u64(&w, j->start);
	wbuf_u64(&w, j->number);
	settings_encode(&j->settings, &w);
	wbuf_u32(&w, j->n_volumes);
	for (uint32_t i = 0; i < j->n_volumes; i++)
		repl_meta_volume_encode(&j->volumes[i], &w);
	return encoded(&w);
}

static int join_parse(struct message_reader *m, struct wire_join *j, struct err *e)
{
	rbuf_str(&m->r, j->group, sizeof(j->group));
	field_end(m, "group");
	rbuf_raw(&m->r, j->group_uuid, sizeof(j->group_uuid));
	field_end(m, "group_uuid");
	j->flags = rbuf_u32(&m->r);
	field_end(m, "flags");
	j->role = rbuf_u8(&m->r);
	field_end(m, "role");
	j->state = rbuf_u8(&m->r);
	field_end(m, "state");
	wire_lineage_decode(&j->lineage, &m->r);
	field_end(m, "lineage");
	j->sync_from = rbuf_u64(&m->r);
	field_end(m, "sync_from");
	j->ckpt_max = rbuf_u64(&m->r);
	field_end(m, "ckpt_max");
	j->last_stream = rbuf_u64(&m->r);
	field_end(m, "last_stream");
	j->failover_generation = rbuf_u64(&m->r);
	field_end(m, "failover_generation");
	j->start = rbuf_u64(&m->r);
	field_end(m, "start");
	j->number = rbuf_u64(&m->r);
	field_end(m, "number");
	settings_decode(&j->settings, &m->r);
	field_end(m, "settings");
	j->n_volumes = rbuf_u32(&m->r);
	if (j->n_volumes > GROUP_VOLUMES_MAX)
		m->r.failed = true;
	field_end(m, "n_volumes");
	for (uint32_t i = 0; i < j->n_volumes && !m->r.failed; i++)
		repl_meta_volume_decode(&j->volumes[i], &m->r, REPL_META_VERSION);
	field_end(m, "volumes");
	return message_end(m, e);
}

static int join_check(const struct message_reader *m, const struct wire_join *j, struct err *e)
{
	uint32_t i;

	if (!name_valid(j->group))
		return field_bad(m, e, "group", "not a valid name");
	if ((j->flags & ~JOIN_FLAGS_ALL) != 0)
		return field_bad(m, e, "flags", "holds unknown bits");
	if (j->role > ROLE_SECONDARY)
		return field_bad(m, e, "role", "not a known one");
	if (j->state > STATE_DONE)
		return field_bad(m, e, "state", "not a known one");
	if (!repl_meta_role_state_valid(j->role, j->state))
		return err_set(e, ERR_PROTO, "JOIN, field state: a %s is never in %s", role_name(j->role),
			       state_name(j->state));
	if (j->ckpt_max > WIRE_CKPT_NUMBER_MAX)
		return field_bad(m, e, "ckpt_max", "above the limit");
	if (j->last_stream > j->ckpt_max)
		return field_bad(m, e, "last_stream", "above ckpt_max");
	const char *fault = repl_meta_volumes_fault(j->volumes, j->n_volumes, &i);
	if (fault != NULL)
		return err_set(e, ERR_PROTO, "JOIN, field volumes[%" PRIu32 "]: %s", i, fault);
	return 0;
}

int wire_join_decode(struct wire_join *j, const void *buf, size_t len, struct err *e)
{
	struct message_reader m = message_open("JOIN", buf, len);
	struct wire_join out;
	int rc;

	memset(&out, 0, sizeof(out));
	if ((rc = join_parse(&m, &out, e)) < 0 || (rc = join_check(&m, &out, e)) < 0)
		return rc;
	*j = out;
	return 0;
}

/* ---- START_PROTECT, VOLUME_READ, VOLUME_WRITE ---- */

int wire_start_encode(const struct wire_start *x, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	PRE(x->n_volumes <= GROUP_VOLUMES_MAX);
	wbuf_str(&w, x->peer);
	wbuf_u32(&w, x->n_volumes);
	for (uint32_t i = 0; i < x->n_volumes; i++) {
		wbuf_str(&w, x->volumes[i].name);
		wbuf_u32(&w, x->volumes[i].id);
	}
	return encoded(&w);
}

/* Like the record's (docs/format-group.md): printable ASCII without blanks. What an address is in it is looked at by
 * whoever dials it. */
static bool address_clean(const char *text)
{
	if (*text == '\0')
		return false;
	for (; *text != '\0'; text++)
		if (!printable(*text) || *text == ' ')
			return false;
	return true;
}

static const char *start_volumes_fault(const struct wire_start *x, uint32_t *ret_index)
{
	for (uint32_t i = 0; i < x->n_volumes; i++) {
		*ret_index = i;
		if (!name_valid(x->volumes[i].name))
			return "not a valid name";
		if (x->volumes[i].id == 0)
			return "the id is 0";
		for (uint32_t k = 0; k < i; k++) {
			if (strcmp(x->volumes[k].name, x->volumes[i].name) == 0)
				return "a name that stands twice";
			if (x->volumes[k].id == x->volumes[i].id)
				return "an id that stands twice";
		}
	}
	return NULL;
}

int wire_start_decode(struct wire_start *x, const void *buf, size_t len, struct err *e)
{
	struct message_reader m = message_open("START_PROTECT", buf, len);
	struct wire_start out;
	uint32_t at = 0;
	int rc;

	memset(&out, 0, sizeof(out));
	rbuf_str(&m.r, out.peer, sizeof(out.peer));
	field_end(&m, "peer");
	out.n_volumes = rbuf_u32(&m.r);
	if (out.n_volumes == 0 || out.n_volumes > GROUP_VOLUMES_MAX)
		m.r.failed = true;
	field_end(&m, "n_volumes");
	for (uint32_t i = 0; i < out.n_volumes && !m.r.failed; i++) {
		rbuf_str(&m.r, out.volumes[i].name, sizeof(out.volumes[i].name));
		out.volumes[i].id = rbuf_u32(&m.r);
	}
	field_end(&m, "volumes");
	if ((rc = message_end(&m, e)) < 0)
		return rc;
	if (!address_clean(out.peer))
		return field_bad(&m, e, "peer", "empty, or not printable ASCII without blanks");
	const char *fault = start_volumes_fault(&out, &at);
	if (fault != NULL)
		return err_set(e, ERR_PROTO, "START_PROTECT, field volumes[%" PRIu32 "]: %s", at, fault);
	*x = out;
	return 0;
}

int wire_volume_encode(const char *name, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	wbuf_str(&w, name);
	return encoded(&w);
}

int wire_volume_decode(char name[NAME_SIZE], size_t *ret_at, const void *buf, size_t len, uint64_t bytes, struct err *e)
{
	struct message_reader m = message_open("VOLUME_READ or VOLUME_WRITE", buf, len);
	char out[NAME_SIZE];
	int rc;

	rbuf_str(&m.r, out, sizeof(out));
	field_end(&m, "name");
	if ((rc = message_parsed(&m, e)) < 0)
		return rc;
	if (!name_valid(out))
		return field_bad(&m, e, "name", "not a valid name");
	if (len - m.r.pos != bytes)
		return field_bad(&m, e, "length", "not that of the bytes behind the name");
	memcpy(name, out, sizeof(out));
	*ret_at = m.r.pos;
	return 0;
}

/* ---- REPORT ---- */

int wire_report_encode(const struct wire_report_volume *v, uint32_t n, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	PRE(n <= WIRE_REPORT_MAX);
	wbuf_u32(&w, n);
	for (uint32_t i = 0; i < n; i++) {
		wbuf_str(&w, v[i].name);
		wbuf_str(&w, v[i].group);
		wbuf_raw(&w, v[i].uuid, sizeof(v[i].uuid));
		wbuf_u32(&w, v[i].id);
		wbuf_u64(&w, v[i].size);
		wbuf_u8(&w, v[i].role);
		wbuf_u8(&w, v[i].state);
	}
	return encoded(&w);
}

static void report_parse(struct message_reader *m, struct wire_report_volume *v)
{
	memset(v, 0, sizeof(*v));
	rbuf_str(&m->r, v->name, sizeof(v->name));
	field_end(m, "name");
	rbuf_str(&m->r, v->group, sizeof(v->group));
	field_end(m, "group");
	rbuf_raw(&m->r, v->uuid, sizeof(v->uuid));
	field_end(m, "uuid");
	v->id = rbuf_u32(&m->r);
	field_end(m, "id");
	v->size = rbuf_u64(&m->r);
	field_end(m, "size");
	v->role = rbuf_u8(&m->r);
	field_end(m, "role");
	v->state = rbuf_u8(&m->r);
	field_end(m, "state");
}

static int report_check(const struct message_reader *m, const struct wire_report_volume *v, struct err *e)
{
	if (!name_valid(v->name))
		return field_bad(m, e, "name", "not a valid name");
	if (!name_valid(v->group))
		return field_bad(m, e, "group", "not a valid name");
	if (v->size == 0 || v->size % SECTOR_SIZE != 0 || v->size > VOLUME_SIZE_MAX)
		return field_bad(m, e, "size", "not a multiple of 512 from 512 to 64 TiB");
	if (!repl_meta_role_state_valid(v->role, v->state))
		return field_bad(m, e, "state", "not one that its role can be in");
	return 0;
}

/* One pass over the entries; into v unless that is NULL. */
static int report_walk(struct wire_report_volume *v, uint32_t max, const void *buf, size_t len, struct err *e)
{
	struct message_reader m = message_open("REPORT", buf, len);
	uint32_t n = rbuf_u32(&m.r);
	int rc;

	field_end(&m, "count");
	if (n > max || n > WIRE_REPORT_MAX)
		return field_bad(&m, e, "count", "above the limit");
	for (uint32_t i = 0; i < n; i++) {
		struct wire_report_volume one;
		report_parse(&m, &one);
		if ((rc = message_parsed(&m, e)) < 0 || (rc = report_check(&m, &one, e)) < 0)
			return rc;
		if (v != NULL)
			v[i] = one;
	}
	rc = message_end(&m, e);
	return rc < 0 ? rc : (int)n;
}

int wire_report_decode(struct wire_report_volume *v, uint32_t max, const void *buf, size_t len, struct err *e)
{
	int n = report_walk(NULL, max, buf, len, e);

	return n < 0 ? n : report_walk(v, max, buf, len, e);
}

/* ---- verify ---- */

void wire_verify_range_put(uint8_t out[WIRE_VERIFY_RANGE_SIZE], const struct wire_verify_range *r)
{
	put_u64(out, r->off);
	put_u64(out + 8, r->len);
	put_u64(out + 16, r->problem);
}

int wire_verify_answer_decode(struct wire_verify_range *r, uint64_t off, uint64_t len, const void *buf, size_t length,
			      struct err *e)
{
	const uint8_t *p = buf;
	size_t n = length / WIRE_VERIFY_RANGE_SIZE;
	uint64_t at = off;

	if (length % WIRE_VERIFY_RANGE_SIZE || n > WIRE_VERIFY_RANGES_MAX)
		return err_set(e, ERR_PROTO, "VERIFY_ANSWER: not a whole number of ranges, or too many");
	for (size_t i = 0; i < n; i++, p += WIRE_VERIFY_RANGE_SIZE) {
		struct wire_verify_range x = {get_u64(p), get_u64(p + 8), get_u64(p + 16)};
		if (x.len == 0 || x.off < at || x.off >= off + len || x.len > off + len - x.off)
			return err_set(e, ERR_PROTO, "VERIFY_ANSWER, range %zu: outside of what was asked", i);
		if (x.problem != WIRE_VERIFY_DIFFERS && x.problem != WIRE_VERIFY_UNREADABLE)
			return err_set(e, ERR_PROTO, "VERIFY_ANSWER, range %zu: its problem is not a known one", i);
		at = x.off + x.len;
		r[i] = x;
	}
	return (int)n;
}

int wire_scrubbed_encode(const struct wire_scrubbed *s, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	PRE(s->n <= WIRE_SCRUBBED_MAX);
	wbuf_u64(&w, s->next_layer);
	wbuf_u64(&w, s->next_off);
	wbuf_u64(&w, s->bytes);
	wbuf_u64(&w, s->left);
	for (uint32_t i = 0; i < s->n; i++) {
		wbuf_u64(&w, s->bad[i].layer);
		wbuf_u64(&w, s->bad[i].off);
		wbuf_u64(&w, s->bad[i].len);
		wbuf_u64(&w, s->bad[i].unreadable);
	}
	return w.failed ? -ERR_LIMIT : (int)w.len;
}

int wire_scrubbed_decode(struct wire_scrubbed *s, const void *buf, size_t len, struct err *e)
{
	struct rbuf r = {.data = buf, .size = len};
	struct wire_scrubbed out = {0};

	if (len < WIRE_SCRUBBED_HEAD || (len - WIRE_SCRUBBED_HEAD) % WIRE_SCRUBBED_ENTRY ||
	    (len - WIRE_SCRUBBED_HEAD) / WIRE_SCRUBBED_ENTRY > WIRE_SCRUBBED_MAX)
		return err_set(e, ERR_PROTO, "SCRUBBED: not a whole number of entries, or too many");
	out.next_layer = rbuf_u64(&r);
	out.next_off = rbuf_u64(&r);
	out.bytes = rbuf_u64(&r);
	out.left = rbuf_u64(&r);
	out.n = (uint32_t)((len - WIRE_SCRUBBED_HEAD) / WIRE_SCRUBBED_ENTRY);
	if (out.next_off > VOLUME_SIZE_MAX || out.bytes > VOLUME_SIZE_MAX || out.left > UINT64_C(1) << 62)
		return err_set(e, ERR_PROTO, "SCRUBBED: what it says of its progress is out of bounds");
	for (uint32_t i = 0; i < out.n; i++) {
		struct wire_scrub_bad *b = &out.bad[i];
		b->layer = rbuf_u64(&r);
		b->off = rbuf_u64(&r);
		b->len = rbuf_u64(&r);
		b->unreadable = rbuf_u64(&r);
		if (b->len == 0 || b->off > VOLUME_SIZE_MAX || b->len > VOLUME_SIZE_MAX - b->off || b->unreadable > 1)
			return err_set(e, ERR_PROTO, "SCRUBBED, entry %u: not a range of an overlay", i);
	}
	*s = out;
	return 0;
}
