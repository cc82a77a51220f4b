/* core/wire: the bytes are those of docs/protocol.md (its test vectors were made by another program), a header is
 * accepted only by its own session and undamaged, every type's rule is enforced at both sides of its bound, and every
 * payload refuses each cut, each excess and each bad field by name, leaving its output untouched. */
#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/range.h"
#include "core/wire.h"

#define DIALER UINT64_C(0x1122334455667788)
#define LISTENER UINT64_C(0x99aabbccddeeff00)
#define SESSION UINT64_C(0x6c534f65b94292a8)

static const unsigned types[] = {
#define TYPE(name, value) WIRE_##name,
    WIRE_TYPES(TYPE)
#undef TYPE
};
#define N_TYPES (sizeof(types) / sizeof(types[0]))

/* ---- header ---- */

Test(wire_header, documented_bytes)
{
	static const uint8_t write[WIRE_HEADER_SIZE] = {
	    0x09, 0x00, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00, 0x07, 0x00, 0x00, 0x00, 0x00, 0x00,
	    0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00,
	    0x00, 0x00, 0x00, 0x00, 0x09, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00,
	    0x00, 0x00, 0x83, 0x92, 0x06, 0xe3, 0x00, 0x00, 0x00, 0x00, 0xc3, 0xdf, 0xb0, 0x51,
	};
	static const uint8_t hello[WIRE_HEADER_SIZE] = {
	    [0] = 0x35,	 [4] = 0x01,  [44] = 0xd7, [45] = 0xc2, [46] = 0x35,
	    [47] = 0x4c, [52] = 0x21, [53] = 0x46, [54] = 0x6c, [55] = 0xdb,
	};
	struct wire_frame f = {.type = WIRE_WRITE,
			       .number = 7,
			       .seq = 3,
			       .offset = 0x10000,
			       .length = 9,
			       .length_payload = 9,
			       .volume = 2,
			       .crc_payload = crc32c(0, "123456789", 9)};
	struct wire_frame h = {.type = WIRE_HELLO, .length_payload = 53, .crc_payload = 0x4c35c2d7};
	uint8_t out[WIRE_HEADER_SIZE + 1];

	memset(out, 0xee, sizeof(out));
	wire_header_encode(&f, SESSION, out);
	cr_assert_arr_eq(out, write, sizeof(write));
	cr_assert_eq(out[WIRE_HEADER_SIZE], 0xee);
	memset(out, 0xee, sizeof(out));
	wire_header_encode(&h, 0, out);
	cr_assert_arr_eq(out, hello, sizeof(hello));
	struct wire_frame back;
	memset(&back, 0x5a, sizeof(back));
	cr_assert_eq(wire_header_decode(&back, SESSION, write, WIRE_PAYLOAD_MAX, NULL), 0);
	cr_assert_eq(back.type, WIRE_WRITE);
	cr_assert_eq(back.flags, 0);
	cr_assert_eq(back.number, 7);
	cr_assert_eq(back.seq, 3);
	cr_assert_eq(back.offset, 0x10000);
	cr_assert_eq(back.length, 9);
	cr_assert_eq(back.length_payload, 9);
	cr_assert_eq(back.volume, 2);
	cr_assert_eq(back.crc_payload, UINT32_C(0xe3069283));
}

/* The least that its type allows, with unrelated fields set to all ones. */
static struct wire_frame frame_min(unsigned type)
{
	struct wire_frame f = {.type = (uint16_t)type, .number = UINT64_MAX, .seq = UINT64_MAX, .volume = UINT32_MAX};

	switch (type) {
	case WIRE_HELLO:
	case WIRE_JOIN:
		f.length_payload = 1;
		break;
	case WIRE_REPORT:
	case WIRE_REFUSE:
	case WIRE_HISTORY_LOST:
	case WIRE_IO_ERROR:
	case WIRE_WRITE_FAILED:
		f.length_payload = 4;
		break;
	case WIRE_WRITE:
	case WIRE_RESYNC_WRITE:
	case WIRE_READ_REPLY:
		f.length_payload = 1;
		f.length = 1;
		break;
	case WIRE_VOLUME_DATA:
		f.length_payload = 1;
		f.length = 1;
		break;
	case WIRE_START_PROTECT:
		f.length_payload = 16;
		break;
	case WIRE_VOLUME_READ:
		f.length_payload = 3;
		f.length = 1;
		break;
	case WIRE_VOLUME_WRITE:
		f.length_payload = 4;
		f.length = 1;
		break;
	case WIRE_ZERO:
	case WIRE_DISCARD:
	case WIRE_RESYNC_ZERO:
	case WIRE_READ_REQ:
		f.length = 1;
		break;
	case WIRE_HASH:
	case WIRE_VERIFY:
		f.length_payload = 24;
		f.length = 1;
		break;
	case WIRE_SCRUBBED:
		f.length_payload = 32;
		break;
	case WIRE_RESIZE:
		f.offset = 512;
		break;
	case WIRE_CHECKPOINT:
	case WIRE_CHECKPOINT_ACK:
	case WIRE_RESYNC_BEGIN:
	case WIRE_TAKE_OVER:
	case WIRE_TOOK_OVER:
		f.offset = 1;
		break;
	case WIRE_RESYNC_DONE:
	case WIRE_DETACH:
		f.length_payload = 144;
		break;
	case WIRE_ACK:
		f.length_payload = 24;
		break;
	case WIRE_SETTINGS:
		f.length_payload = 2;
		break;
	default:
		break;
	}
	f.crc_payload = f.length_payload > 0 ? UINT32_MAX : 0;
	return f;
}

static int decode_at(const struct wire_frame *f, uint32_t payload_max, struct err *e)
{
	uint8_t bytes[WIRE_HEADER_SIZE];
	struct wire_frame back, before;

	memset(bytes, 0xee, sizeof(bytes));
	memset(&back, 0x5a, sizeof(back));
	before = back;
	wire_header_encode(f, SESSION, bytes);
	int rc = wire_header_decode(&back, SESSION, bytes, payload_max, e);
	if (rc < 0)
		cr_assert_eq(memcmp(&back, &before, sizeof(back)), 0);
	else
		cr_assert(back.type == f->type && back.flags == f->flags && back.number == f->number &&
			  back.seq == f->seq && back.offset == f->offset && back.length == f->length &&
			  back.volume == f->volume && back.length_payload == f->length_payload &&
			  back.crc_payload == f->crc_payload);
	return rc;
}

static void assert_taken(struct wire_frame f)
{
	struct err e = {0};

	cr_assert_eq(decode_at(&f, WIRE_PAYLOAD_MAX, &e), 0, "%s: %s", wire_type_name(f.type), e.text);
}

static void assert_refused(struct wire_frame f, const char *field)
{
	struct err e = {0};
	char want[64];

	snprintf(want, sizeof(want), "field %s:", field);
	cr_assert_eq(decode_at(&f, WIRE_PAYLOAD_MAX, &e), -ERR_PROTO, "%s taken, wanted '%s'", wire_type_name(f.type),
		     want);
	cr_assert_eq(e.code, ERR_PROTO);
	cr_assert(strstr(e.text, want) != NULL, "'%s' lacks '%s'", e.text, want);
	cr_assert_eq(decode_at(&f, WIRE_PAYLOAD_MAX, NULL), -ERR_PROTO);
}

Test(wire_header, every_type_has_a_name_and_a_rule_and_no_other_is_known)
{
	for (unsigned t = 0; t < 65536; t++) {
		bool known = false;
		for (unsigned i = 0; i < N_TYPES; i++)
			known = known || types[i] == t;
		struct wire_frame f = frame_min(t);
		if (known)
			assert_taken(f);
		else
			assert_refused(f, "type");
		cr_assert_eq(strcmp(wire_type_name(t), "UNKNOWN") != 0, known, "%u", t);
	}
	cr_assert_str_eq(wire_type_name(WIRE_RESYNC_WRITE), "RESYNC_WRITE");
	cr_assert_str_eq(wire_type_name(UINT32_MAX), "UNKNOWN");
}

Test(wire_header, payload_bounds_of_each_type)
{
	static const struct {
		unsigned type;
		uint32_t min, max, step;
	} bounds[] = {
	    {WIRE_HELLO, 1, WIRE_HELLO_MAX, 1},
	    {WIRE_REPORT, 4, 163844, 1},
	    {WIRE_JOIN, 1, WIRE_JOIN_ENCODED_MAX, 1},
	    {WIRE_REFUSE, 4, 483, 1},
	    {WIRE_WRITE, 1, WIRE_PAYLOAD_MAX, 1},
	    {WIRE_RESYNC_WRITE, 1, WIRE_PAYLOAD_MAX, 1},
	    {WIRE_RESYNC_DONE, 144, 144, 1},
	    {WIRE_DIRTY, 0, WIRE_PAYLOAD_MAX, 16},
	    {WIRE_ACK, 24, 24, 1},
	    {WIRE_IO_ERROR, 4, 483, 1},
	    {WIRE_HISTORY_LOST, 4, 483, 1},
	    {WIRE_SETTINGS, 2, WIRE_SETTINGS_MAX, 1},
	    {WIRE_DETACH, 144, 144, 1},
	    {WIRE_READ_REPLY, 1, WIRE_PAYLOAD_MAX, 1},
	    {WIRE_WRITE_FAILED, 4, 483, 1},
	    {WIRE_HASH, 24, 1032, 1},
	    {WIRE_START_PROTECT, 16, WIRE_START_ENCODED_MAX, 1},
	    {WIRE_VOLUME_READ, 3, 65, 1},
	    {WIRE_VOLUME_WRITE, 4, WIRE_RANGE_MAX + 65, 1},
	    {WIRE_VOLUME_DATA, 1, WIRE_RANGE_MAX, 1},
	    {WIRE_DONE, 0, 483, 1},
	    {WIRE_VERIFY, 0, 2056, 1},
	    {WIRE_VERIFY_ANSWER, 0, 3072, 24},
	    {WIRE_SCRUBBED, 32, 2080, 32},
	    {WIRE_RESIZE_ACK, 0, 483, 1},
	};

	for (unsigned i = 0; i < N_TYPES; i++) {
		uint32_t min = 0, max = 0, step = 1;
		bool reply = types[i] == WIRE_READ_REPLY || types[i] == WIRE_VOLUME_DATA;
		bool data = types[i] == WIRE_WRITE || types[i] == WIRE_RESYNC_WRITE || reply;
		for (unsigned k = 0; k < sizeof(bounds) / sizeof(bounds[0]); k++) {
			if (bounds[k].type == types[i]) {
				min = bounds[k].min;
				max = bounds[k].max;
				step = bounds[k].step;
			}
		}
		struct wire_frame f = frame_min(types[i]);
		uint32_t lengths[] = {min - 1, max + 1, max + step, UINT32_MAX};
		for (unsigned k = min == 0 ? 1 : 0; k < 4; k++) {
			f.length_payload = lengths[k];
			f.crc_payload = lengths[k] != 0;
			f.length = data ? lengths[k] : f.length;
			assert_refused(f, reply && lengths[k] == 0 ? "length" : "length_payload");
		}
		f.length_payload = max;
		f.crc_payload = max != 0;
		f.length = data			     ? max
			   : types[i] == WIRE_HASH   ? WIRE_HASH_REGIONS_MAX * WIRE_HASH_REGION
			   : types[i] == WIRE_VERIFY ? WIRE_VERIFY_BLOCKS_MAX * WIRE_VERIFY_BLOCK
						     : f.length;
		if (types[i] == WIRE_VOLUME_WRITE)
			f.length = WIRE_RANGE_MAX;
		if (types[i] == WIRE_DONE)
			f.flags = WIRE_DONE_ERROR;
		assert_taken(f);
		if (step > 1) {
			f.length_payload = max - 1;
			assert_refused(f, "length_payload");
		}
		if (max > 0) {
			struct err e = {0};
			f.length_payload = max;
			cr_assert_eq(decode_at(&f, max - 1, &e), -ERR_PROTO);
			cr_assert_eq(decode_at(&f, max, &e), 0);
		}
	}
}

Test(wire_header, a_read_reply_is_what_its_flags_say)
{
	struct wire_frame f = frame_min(WIRE_READ_REPLY);
	f.length = 4096;
	assert_refused(f, "length_payload");
	f.length_payload = 4096;
	assert_taken(f);
	f.flags = WIRE_READ_ZERO;
	assert_refused(f, "length_payload");
	f.length_payload = f.crc_payload = 0;
	assert_taken(f);
	f.flags = WIRE_READ_ERROR;
	assert_refused(f, "length_payload");
	f.length_payload = 4;
	assert_taken(f);
	f.flags = WIRE_READ_ERROR | WIRE_READ_ZERO;
	assert_refused(f, "length_payload");
	f = frame_min(WIRE_READ_REQ);
	f.length = WIRE_PAYLOAD_MAX;
	assert_taken(f);
	f.length++;
	assert_refused(f, "length");
	f.length = 0;
	assert_refused(f, "length");
}

Test(wire_header, what_a_hub_asks_for_and_is_answered)
{
	struct wire_frame f = frame_min(WIRE_VOLUME_WRITE);
	f.length = 4096;
	f.length_payload = 4096 + 2;
	assert_refused(f, "length_payload");
	f.length_payload = 4096 + 66;
	assert_refused(f, "length_payload");
	f.length_payload = 4096 + 65;
	assert_taken(f);
	f.length = f.length_payload = 0;
	f.length_payload = 3;
	assert_refused(f, "length");
	f.flags = WIRE_VOLUME_FLUSH; /* a flush alone */
	assert_taken(f);
	f.length = WIRE_RANGE_MAX + 1;
	f.length_payload = WIRE_RANGE_MAX + 4;
	assert_refused(f, "length");
	f.length = (UINT64_C(1) << 32) + 1; /* equal in its low half */
	f.length_payload = 4;
	assert_refused(f, "length");
	f = frame_min(WIRE_VOLUME_READ);
	f.length = WIRE_RANGE_MAX;
	f.offset = VOLUME_SIZE_MAX - WIRE_RANGE_MAX;
	assert_taken(f);
	f.offset++;
	assert_refused(f, "offset");
	f.offset = 0;
	f.length++;
	assert_refused(f, "length");
	f.length = 0;
	assert_refused(f, "length");
	f = frame_min(WIRE_VOLUME_DATA);
	f.flags = WIRE_READ_ZERO;
	assert_refused(f, "length_payload");
	f.length_payload = f.crc_payload = 0;
	assert_taken(f);
	f.flags = WIRE_READ_ERROR;
	f.length_payload = 4;
	assert_taken(f);
	f.length = WIRE_RANGE_MAX + 1;
	assert_refused(f, "length");
	f = frame_min(WIRE_DONE);
	f.length_payload = 4;
	f.crc_payload = 1;
	assert_refused(f, "length_payload");
	f.flags = WIRE_DONE_ERROR;
	assert_taken(f);
	f.length_payload = 3;
	assert_refused(f, "length_payload");
}

Test(wire_header, flags_seq_and_reserved)
{
	for (unsigned i = 0; i < N_TYPES; i++) {
		unsigned t = types[i];
		uint16_t allowed = t == WIRE_CHECKPOINT						      ? 15
				   : t == WIRE_START_PROTECT					      ? 3
				   : t == WIRE_REPORT || t == WIRE_VOLUME_WRITE || t == WIRE_SCRUBBED ? 1
												      : 0;
		for (unsigned bit = 0; bit < 16; bit++) {
			struct wire_frame f = frame_min(t);
			f.flags = (uint16_t)(1U << bit);
			if (((t == WIRE_READ_REPLY || t == WIRE_VOLUME_DATA) && bit < 2) ||
			    (t == WIRE_DONE && bit < 1)) /* each says what its payload is: a test of their own */
				assert_refused(f, "length_payload");
			else if (t == WIRE_VERIFY && bit == 0) /* no payload then */
				assert_refused(f, "length");
			else if ((allowed & f.flags) != 0)
				assert_taken(f);
			else
				assert_refused(f, "flags");
		}
		struct wire_frame f = frame_min(t);
		f.seq = 0;
		if ((t >= WIRE_WRITE && t <= WIRE_RESYNC_DONE) || t == WIRE_RESYNC_BEGIN || t == WIRE_HASH ||
		    (t >= WIRE_VERIFY && t <= WIRE_RESIZE_ACK) || (t >= WIRE_DETACH && t <= WIRE_READ_REPLY) ||
		    (t >= WIRE_REPORT_WANT && t <= WIRE_DONE))
			assert_refused(f, "seq");
		else
			assert_taken(f);
		f = frame_min(t);
		if (f.length_payload == 0) {
			f.crc_payload = 1;
			assert_refused(f, "crc_payload");
		}
		for (unsigned at = 48; at < 52; at++) {
			uint8_t bytes[WIRE_HEADER_SIZE], seed[8];
			struct err e = {0};
			struct wire_frame back;
			f = frame_min(t);
			wire_header_encode(&f, SESSION, bytes);
			bytes[at] = 1;
			put_u64(seed, SESSION);
			put_u32(bytes + 52, crc32c(crc32c(0, seed, 8), bytes, 52));
			cr_assert_eq(wire_header_decode(&back, SESSION, bytes, WIRE_PAYLOAD_MAX, &e), -ERR_PROTO);
			cr_assert(strstr(e.text, "field reserved:") != NULL, "%s", e.text);
		}
	}
}

Test(wire_header, ranges)
{
	for (unsigned i = 0; i < N_TYPES; i++) {
		unsigned t = types[i];
		struct wire_frame f = frame_min(t);
		bool data = t == WIRE_WRITE || t == WIRE_RESYNC_WRITE;
		bool span = t == WIRE_ZERO || t == WIRE_DISCARD || t == WIRE_RESYNC_ZERO;
		if (!data && !span && t != WIRE_IO_ERROR)
			continue;
		f.offset = VOLUME_SIZE_MAX - f.length;
		assert_taken(f);
		f.offset++;
		assert_refused(f, "offset");
		f.offset = UINT64_MAX;
		assert_refused(f, "offset");
		f.offset = UINT64_MAX - f.length + (f.length > 0); /* the sum wraps to 0 */
		assert_refused(f, "offset");
		f.offset = 0;
		if (data) {
			f.length = 2;
			assert_refused(f, "length");
			f.length = 0;
			assert_refused(f, "length");
			f.length = (UINT64_C(1) << 32) + 1; /* equal in its low half */
			assert_refused(f, "length");
			continue;
		}
		f.length = span ? WIRE_SPAN_MAX : VOLUME_SIZE_MAX;
		assert_taken(f);
		f.length++;
		assert_refused(f, span ? "length" : "offset");
		f.length = UINT64_MAX;
		f.offset = 1;
		assert_refused(f, span ? "length" : "offset");
		f.length = f.offset = 0;
		if (span)
			assert_refused(f, "length");
		else
			assert_taken(f);
	}
}

Test(wire_header, verify_lengths)
{
	static const struct {
		uint64_t length;
		uint32_t hashes;
		bool zero, taken;
	} cases[] = {{1, 1, false, true},
		     {0, 1, false, false},
		     {4096, 1, false, true},
		     {4096, 2, false, false},
		     {4097, 2, false, true},
		     {1 << 19, 128, false, true},
		     {(1 << 19) + 1, 128, false, false},
		     {UINT64_MAX, 1, false, false},
		     {1, 0, true, true},
		     {0, 0, true, false},
		     {WIRE_SPAN_MAX, 0, true, true},
		     {WIRE_SPAN_MAX + 1, 0, true, false},
		     {4096, 1, true, false}};

	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct wire_frame f = frame_min(WIRE_VERIFY);
		f.length = cases[i].length;
		f.flags = cases[i].zero;
		f.length_payload = cases[i].hashes ? 8 + 16 * cases[i].hashes : 0;
		f.crc_payload = cases[i].hashes != 0;
		if (cases[i].taken)
			assert_taken(f);
		else
			assert_refused(f, "length");
	}
	struct wire_frame f = frame_min(WIRE_VERIFY);
	f.offset = 512;
	assert_refused(f, "offset");
	f.offset = VOLUME_SIZE_MAX;
	assert_refused(f, "offset");
}

Test(wire_verify, answers_are_ranges_of_what_was_asked_in_order)
{
	uint8_t buf[WIRE_VERIFY_RANGE_SIZE * (WIRE_VERIFY_RANGES_MAX + 1)];
	struct wire_verify_range out[WIRE_VERIFY_RANGES_MAX];
	struct err e;
	static const struct {
		struct wire_verify_range r[2];
		bool taken;
	} cases[] = {
	    {{{4096, 512, 1}, {8192, 1, 2}}, true},	    {{{4096, 4096, 1}, {8192, 4096, 1}}, true},
	    {{{4096, 4097, 1}, {8192, 1, 1}}, false},	    {{{8192, 1, 1}, {4096, 1, 1}}, false},
	    {{{4095, 1, 1}, {8192, 1, 1}}, false},	    {{{4096, 0, 1}, {8192, 1, 1}}, false},
	    {{{4096, 1, 0}, {8192, 1, 1}}, false},	    {{{4096, 1, 3}, {8192, 1, 1}}, false},
	    {{{4096, 1, 1}, {8192, 4097, 1}}, false},	    {{{4096, 1, 1}, {12288, 1, 1}}, false},
	    {{{4096, 1, 1}, {8192, UINT64_MAX, 1}}, false},
	};

	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		memset(out, 0xee, sizeof(out));
		for (unsigned k = 0; k < 2; k++)
			wire_verify_range_put(buf + (size_t)k * WIRE_VERIFY_RANGE_SIZE, &cases[i].r[k]);
		int n = wire_verify_answer_decode(out, 4096, 8192, buf, 2 * (size_t)WIRE_VERIFY_RANGE_SIZE, &e);
		cr_assert_eq(n, cases[i].taken ? 2 : -ERR_PROTO, "%u", i);
		if (n == 2)
			cr_assert_eq(memcmp(out, cases[i].r, sizeof(cases[i].r)), 0);
	}
	cr_assert_eq(wire_verify_answer_decode(out, 0, 1, buf, 0, &e), 0);
	cr_assert_eq(wire_verify_answer_decode(out, 0, 1 << 20, buf, 23, &e), -ERR_PROTO);
	cr_assert_eq(wire_verify_answer_decode(out, 0, 1 << 20, buf, sizeof(buf), &e), -ERR_PROTO);
}

Test(wire_verify, scrubbed_round_trip_and_bounds)
{
	uint8_t buf[WIRE_SCRUBBED_HEAD + WIRE_SCRUBBED_ENTRY * (WIRE_SCRUBBED_MAX + 1)] = {0};
	struct wire_scrubbed s = {.next_layer = 3, .next_off = 8192, .bytes = 4096, .left = 12288, .n = 2}, back;
	struct err e;

	s.bad[0] = (struct wire_scrub_bad){7, 4096, 512, 1};
	s.bad[1] = (struct wire_scrub_bad){WIRE_SCRUB_ACTIVE, 0, 4096, 0};
	int n = wire_scrubbed_encode(&s, buf, sizeof(buf));
	cr_assert_eq(n, 32 + 64);
	memset(&back, 0xee, sizeof(back));
	cr_assert_eq(wire_scrubbed_decode(&back, buf, (size_t)n, &e), 0);
	cr_assert_eq(back.n, 2);
	cr_assert(back.next_layer == 3 && back.next_off == 8192 && back.bytes == 4096 && back.left == 12288);
	cr_assert_eq(memcmp(back.bad, s.bad, 2 * sizeof(s.bad[0])), 0);
	for (size_t len = 0; len < 32 + 32; len++)
		if (len != 32)
			cr_assert_eq(wire_scrubbed_decode(&back, buf, len, &e), -ERR_PROTO, "%zu", len);
	cr_assert_eq(wire_scrubbed_decode(&back, buf, sizeof(buf), &e), -ERR_PROTO);
	s.n = 1;
	s.bad[0].len = 0;
	n = wire_scrubbed_encode(&s, buf, sizeof(buf));
	cr_assert_eq(wire_scrubbed_decode(&back, buf, (size_t)n, &e), -ERR_PROTO);
	s.bad[0].len = 1;
	s.bad[0].off = VOLUME_SIZE_MAX;
	n = wire_scrubbed_encode(&s, buf, sizeof(buf));
	cr_assert_eq(wire_scrubbed_decode(&back, buf, (size_t)n, &e), -ERR_PROTO);
	s.bad[0].off = 0;
	s.bad[0].unreadable = 2;
	n = wire_scrubbed_encode(&s, buf, sizeof(buf));
	cr_assert_eq(wire_scrubbed_decode(&back, buf, (size_t)n, &e), -ERR_PROTO);
	s.n = 0;
	s.next_off = VOLUME_SIZE_MAX + 1;
	n = wire_scrubbed_encode(&s, buf, sizeof(buf));
	cr_assert_eq(wire_scrubbed_decode(&back, buf, (size_t)n, &e), -ERR_PROTO);
}

Test(wire_header, hash_lengths)
{
	static const struct {
		uint64_t length;
		uint32_t hashes;
		bool taken;
	} cases[] = {{1, 1, true},
		     {0, 1, false},
		     {WIRE_HASH_REGION, 1, true},
		     {WIRE_HASH_REGION, 2, false},
		     {WIRE_HASH_REGION + 1, 1, false},
		     {WIRE_HASH_REGION + 1, 2, true},
		     {UINT64_C(1) << 22, 64, true},
		     {(UINT64_C(1) << 22) + 1, 64, false},
		     {(UINT64_C(1) << 32) + 1, 1, false},
		     {UINT64_MAX, 1, false}};

	for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct wire_frame f = frame_min(WIRE_HASH);
		f.length = cases[i].length;
		f.length_payload = 8 + 16 * cases[i].hashes;
		f.crc_payload = 1;
		if (cases[i].taken)
			assert_taken(f);
		else
			assert_refused(f, "length");
	}
	struct wire_frame f = frame_min(WIRE_HASH);
	f.offset = VOLUME_SIZE_MAX;
	assert_refused(f, "offset");
}

Test(wire_header, values_in_offset_and_length)
{
	static const struct {
		unsigned type;
		uint64_t low, high, length_max;
	} bounds[] = {
	    {WIRE_PING, 0, UINT64_MAX, UINT64_MAX},
	    {WIRE_GOODBYE, 0, WIRE_BYE_FAILOVER, UINT64_MAX},
	    {WIRE_CHECKPOINT, 1, WIRE_CKPT_NUMBER_MAX, UINT64_MAX},
	    {WIRE_CHECKPOINT_ACK, 1, WIRE_CKPT_NUMBER_MAX, WIRE_VOID_ERROR},
	    {WIRE_CHECKPOINT_WANT, 0, 3, UINT64_MAX},
	    {WIRE_RESYNC_BEGIN, 1, UINT64_MAX, UINT64_MAX},
	    {WIRE_BEHIND, 0, WIRE_BEHIND_FAILED, UINT64_MAX},
	    {WIRE_RESYNC_READY, 0, WIRE_CKPT_NUMBER_MAX, UINT64_MAX},
	    {WIRE_TAKE_OVER, 1, WIRE_CKPT_NUMBER_MAX, UINT64_MAX},
	    {WIRE_TOOK_OVER, 1, WIRE_CKPT_NUMBER_MAX, UINT64_MAX},
	};

	for (unsigned n = 0; n < sizeof(bounds) / sizeof(bounds[0]); n++) {
		struct wire_frame f = frame_min(bounds[n].type);
		f.offset = bounds[n].low;
		f.length = bounds[n].length_max;
		assert_taken(f);
		f.offset = bounds[n].high;
		assert_taken(f);
		if (bounds[n].length_max != UINT64_MAX) {
			f.length++;
			assert_refused(f, "length");
			f.length = 0;
		}
		if (bounds[n].low > 0) {
			f.offset = bounds[n].low - 1;
			assert_refused(f, "offset");
		}
		if (bounds[n].high < UINT64_MAX) {
			f.offset = bounds[n].high + 1;
			assert_refused(f, "offset");
			f.offset = UINT64_MAX;
			assert_refused(f, "offset");
		}
	}
}

/* I14: every single flipped bit, every pair of neighbours, every swapped pair of bytes, every other session. */
Test(wire_header, damage_and_strange_sessions_are_seen)
{
	struct wire_frame f = frame_min(WIRE_WRITE), back, before;
	uint8_t good[WIRE_HEADER_SIZE], bytes[WIRE_HEADER_SIZE];

	f.offset = 0x123456789000;
	f.number = 0x55aa;
	wire_header_encode(&f, SESSION, good);
	memset(&back, 0x5a, sizeof(back));
	before = back;
	for (unsigned bit = 0; bit < 8 * WIRE_HEADER_SIZE; bit++) {
		for (unsigned wide = 1; wide <= 3; wide += 2) {
			memcpy(bytes, good, sizeof(bytes));
			for (unsigned k = 0; k < wide && bit + k < 8 * WIRE_HEADER_SIZE; k++)
				bytes[(bit + k) / 8] ^= (uint8_t)(1U << (bit + k) % 8);
			cr_assert_eq(wire_header_decode(&back, SESSION, bytes, WIRE_PAYLOAD_MAX, NULL), -ERR_PROTO);
		}
		uint64_t other = SESSION ^ UINT64_C(1) << bit % 64;
		cr_assert_eq(wire_header_decode(&back, other, good, WIRE_PAYLOAD_MAX, NULL), -ERR_PROTO);
	}
	for (unsigned i = 0; i + 1 < WIRE_HEADER_SIZE; i++) {
		memcpy(bytes, good, sizeof(bytes));
		bytes[i] = good[i + 1];
		bytes[i + 1] = good[i];
		int want = good[i] == good[i + 1] ? 0 : -ERR_PROTO;
		struct wire_frame swapped;
		cr_assert_eq(wire_header_decode(&swapped, SESSION, bytes, WIRE_PAYLOAD_MAX, NULL), want);
	}
	cr_assert_eq(wire_header_decode(&back, 0, good, WIRE_PAYLOAD_MAX, NULL), -ERR_PROTO);
	memset(bytes, 0, sizeof(bytes));
	cr_assert_eq(wire_header_decode(&back, 0, bytes, WIRE_PAYLOAD_MAX, NULL), -ERR_PROTO);
	memset(bytes, 0xff, sizeof(bytes));
	cr_assert_eq(wire_header_decode(&back, 0, bytes, WIRE_PAYLOAD_MAX, NULL), -ERR_PROTO);
	cr_assert_eq(memcmp(&back, &before, sizeof(back)), 0);
}

Test(wire_session, vectors_and_properties)
{
	cr_assert_eq(wire_session(DIALER, LISTENER), SESSION);
	cr_assert_eq(wire_session(LISTENER, DIALER), UINT64_C(0x2164863b280089f0));
	cr_assert_eq(wire_session(0, 0), UINT64_C(0x48218226ff3cd4bf));
	/* the one listener nonce that would give 0 */
	cr_assert_eq(wire_session(DIALER, UINT64_C(0x8a8517a201dde457)), UINT64_C(0x9e3779b97f4a7c15));
	for (unsigned bit = 0; bit < 64; bit++) {
		uint64_t flip = UINT64_C(1) << bit;
		cr_assert_neq(wire_session(DIALER ^ flip, LISTENER), SESSION);
		cr_assert_neq(wire_session(DIALER, LISTENER ^ flip), SESSION);
		cr_assert_neq(wire_session(flip, 0), wire_session(0, flip));
	}
}

/* ---- payloads: each cut, each excess ---- */

#define POISON(x) memset(&(x), 0x5a, sizeof(x))
#define UNTOUCHED(x)                                                                                                   \
	do {                                                                                                           \
		for (size_t at_ = 0; at_ < sizeof(x); at_++)                                                           \
			cr_assert_eq(((const uint8_t *)&(x))[at_], 0x5a);                                              \
	} while (0)

typedef int decode_fn(void *out, const void *buf, size_t len, struct err *e);

static int decode_hello(void *out, const void *buf, size_t len, struct err *e)
{
	return wire_hello_decode(out, buf, len, e);
}

static int decode_refuse(void *out, const void *buf, size_t len, struct err *e)
{
	return wire_refuse_decode(out, buf, len, e);
}

static int decode_ack(void *out, const void *buf, size_t len, struct err *e)
{
	return wire_ack_decode(out, buf, len, e);
}

static int decode_join(void *out, const void *buf, size_t len, struct err *e)
{
	return wire_join_decode(out, buf, len, e);
}

static int decode_report(void *out, const void *buf, size_t len, struct err *e)
{
	return wire_report_decode(out, 8, buf, len, e);
}

static int decode_start(void *out, const void *buf, size_t len, struct err *e)
{
	return wire_start_decode(out, buf, len, e);
}

static void assert_bad(decode_fn *decode, size_t out_size, const void *buf, size_t len, const char *says)
{
	struct err e = {0};
	uint8_t *out = malloc(out_size), *tight = malloc(len > 0 ? len : 1);

	memcpy(tight, buf, len); /* a block of its own: reading behind the end is seen */
	memset(out, 0x5a, out_size);
	cr_assert_eq(decode(out, tight, len, &e), -ERR_PROTO, "%zu bytes taken, wanted '%s'", len, says);
	cr_assert_eq(e.code, ERR_PROTO);
	cr_assert(strstr(e.text, says) != NULL, "'%s' lacks '%s'", e.text, says);
	cr_assert_eq(decode(out, tight, len, NULL), -ERR_PROTO);
	for (size_t i = 0; i < out_size; i++)
		cr_assert_eq(out[i], 0x5a);
	free(out);
	free(tight);
}

static void assert_cuts_bad(decode_fn *decode, size_t out_size, const void *buf, size_t len, bool excess_bad)
{
	uint8_t *longer = malloc(len + 1);

	for (size_t cut = 0; cut < len; cut++)
		assert_bad(decode, out_size, buf, cut, "field ");
	memcpy(longer, buf, len);
	longer[len] = 0;
	if (excess_bad)
		assert_bad(decode, out_size, longer, len + 1, "1 bytes too many");
	free(longer);
}

/* ---- HELLO ---- */

static struct wire_hello hello_some(void)
{
	struct wire_hello h;

	memset(&h, 0, sizeof(h));
	h.version_min = h.version_max = 2;
	for (unsigned i = 0; i < 16; i++)
		h.store[i] = (uint8_t)i;
	h.nonce = DIALER;
	snprintf(h.program, sizeof(h.program), "repfs 0.1.0");
	return h;
}

Test(wire_hello, documented_bytes_and_round_trip)
{
	static const uint8_t want[53] = "repfs\0\1\0\2\0\2\0\0\0\0\0"
					"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f"
					"\x88\x77\x66\x55\x44\x33\x22\x11\x0b\0repfs 0.1.0";
	struct wire_hello h = hello_some(), back;
	uint8_t buf[128];

	memset(buf, 0xee, sizeof(buf));
	cr_assert_eq(wire_hello_encode(&h, buf, sizeof(buf)), 53);
	cr_assert_arr_eq(buf, want, 53);
	cr_assert_eq(buf[53], 0xee);
	cr_assert_eq(crc32c(0, buf, 53), UINT32_C(0x4c35c2d7));
	POISON(back);
	cr_assert_eq(wire_hello_decode(&back, buf, 53, NULL), 0);
	cr_assert_eq(memcmp(&back, &h, sizeof(h)), 0);
	/* a later version may say more behind it */
	POISON(back);
	cr_assert_eq(wire_hello_decode(&back, buf, sizeof(buf), NULL), 0);
	cr_assert_eq(memcmp(&back, &h, sizeof(h)), 0);
	memset(buf, 0xee, sizeof(buf));
	cr_assert_eq(wire_hello_encode(&h, buf, 52), -ERR_LIMIT);
	cr_assert_eq(buf[52], 0xee);
}

Test(wire_hello, hostile)
{
	struct wire_hello h = hello_some(), back;
	uint8_t buf[256];
	size_t len = (size_t)wire_hello_encode(&h, buf, sizeof(buf));

	assert_cuts_bad(decode_hello, sizeof(h), buf, len, false);
	for (unsigned i = 0; i < 8; i++) {
		buf[i] ^= 1;
		assert_bad(decode_hello, sizeof(h), buf, len, "field magic: this is not a repfs peer");
		buf[i] ^= 1;
	}
	put_u16(buf + 8, 3);
	assert_bad(decode_hello, sizeof(h), buf, len, "field version:");
	put_u16(buf + 8, 0);
	assert_bad(decode_hello, sizeof(h), buf, len, "field version:");
	put_u16(buf + 8, 2);
	put_u16(buf + 40, 64); /* one more than fits */
	memset(buf + 42, 'x', 100);
	assert_bad(decode_hello, sizeof(h), buf, sizeof(buf), "field program:");
	put_u16(buf + 40, 63);
	buf[50] = 0;
	assert_bad(decode_hello, sizeof(h), buf, sizeof(buf), "field program:");
	buf[50] = 0x1b;
	buf[51] = 0xff;
	cr_assert_eq(wire_hello_decode(&back, buf, sizeof(buf), NULL), 0);
	cr_assert_eq(strlen(back.program), 63);
	cr_assert_arr_eq(back.program, "xxxxxxxx??xx", 12);
}

Test(wire_hello, negotiation)
{
	static const struct {
		uint16_t a_min, a_max, b_min, b_max;
		int want;
	} cases[] = {
	    {1, 1, 1, 1, 1},
	    {1, 3, 2, 9, 3},
	    {2, 9, 1, 3, 3},
	    {1, 9, 4, 5, 5},
	    {1, 1, 2, 2, -ERR_VERSION},
	    {5, 7, 1, 4, -ERR_VERSION},
	};

	for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
		struct wire_hello a = hello_some(), b = hello_some();
		struct err e = {0};
		a.version_min = cases[n].a_min;
		a.version_max = cases[n].a_max;
		b.version_min = cases[n].b_min;
		b.version_max = cases[n].b_max;
		snprintf(b.program, sizeof(b.program), "other 9");
		cr_assert_eq(wire_negotiate(&a, &b, &e), cases[n].want);
		cr_assert_eq(wire_negotiate(&b, &a, NULL), cases[n].want);
		if (cases[n].want > 0)
			continue;
		char want[64];
		snprintf(want, sizeof(want), "(repfs 0.1.0) speaks %u to %u", cases[n].a_min, cases[n].a_max);
		cr_assert(strstr(e.text, want) != NULL, "%s", e.text);
		snprintf(want, sizeof(want), "(other 9) speaks %u to %u", cases[n].b_min, cases[n].b_max);
		cr_assert(strstr(e.text, want) != NULL, "%s", e.text);
	}
}

/* ---- REFUSE ---- */

Test(wire_refuse, bytes_and_round_trip)
{
	struct wire_refuse x, back;
	uint8_t buf[WIRE_TEXT_MAX + 64];

	memset(&x, 0, sizeof(x));
	x.code = ERR_STATE;
	snprintf(x.text, sizeof(x.text), "abc");
	memset(buf, 0xee, sizeof(buf));
	cr_assert_eq(wire_refuse_encode(&x, buf, sizeof(buf)), 7);
	cr_assert_arr_eq(buf,
			 "\x12\0\x03\0"
			 "abc\xee",
			 8);
	POISON(back);
	cr_assert_eq(wire_refuse_decode(&back, buf, 7, NULL), 0);
	cr_assert_eq(memcmp(&back, &x, sizeof(x)), 0);
	assert_cuts_bad(decode_refuse, sizeof(x), buf, 7, true);
	cr_assert_eq(wire_refuse_encode(&x, buf, 6), -ERR_LIMIT);
	/* the longest there is, and the shortest */
	memset(x.text, 'y', sizeof(x.text) - 1);
	int len = wire_refuse_encode(&x, buf, sizeof(buf));
	cr_assert_eq(len, 4 + WIRE_TEXT_MAX - 1);
	cr_assert_eq(wire_refuse_decode(&back, buf, (size_t)len, NULL), 0);
	cr_assert_eq(memcmp(&back, &x, sizeof(x)), 0);
	put_u16(buf + 2, WIRE_TEXT_MAX);
	assert_bad(decode_refuse, sizeof(x), buf, (size_t)len + 1, "field text:");
	memset(x.text, 0, sizeof(x.text));
	cr_assert_eq(wire_refuse_encode(&x, buf, sizeof(buf)), 4);
	/* never terminated: cut, not read past */
	memset(x.text, 'z', sizeof(x.text));
	cr_assert_eq(wire_refuse_encode(&x, buf, sizeof(buf)), 4 + WIRE_TEXT_MAX - 1);
}

Test(wire_refuse, codes_are_frozen)
{
	static const char *const names[] = {
	    "",
	    "ERR_FAILED",
	    "ERR_IO",
	    "ERR_NOSPC",
	    "ERR_NOMEM",
	    "ERR_CORRUPT",
	    "ERR_VERSION",
	    "ERR_EXIST",
	    "ERR_BUSY",
	    "ERR_PERM",
	    "ERR_CANCELED",
	    "ERR_PROTO",
	    "ERR_LIMIT",
	    "ERR_NOTSUP",
	    "ERR_USAGE",
	    "ERR_RANGE",
	    "ERR_UNREACHABLE_DAEMON",
	    "ERR_NOENT",
	    "ERR_STATE",
	    "ERR_PEER",
	    "ERR_DEGRADED",
	    "ERR_SPLIT",
	    "ERR_DIFFERS",
	    "ERR_TIMEOUT",
	    "ERR_INTR",
	};

	for (unsigned code = 0; code < 65536; code++) {
		uint8_t buf[8];
		struct wire_refuse x, back;
		bool known = code > 0 && code < sizeof(names) / sizeof(names[0]);
		put_u16(buf, (uint16_t)code);
		put_u16(buf + 2, 0);
		cr_assert_eq(wire_refuse_decode(&back, buf, 4, NULL), 0);
		cr_assert_eq(back.code, known ? code : ERR_FAILED, "%u", code);
		memset(&x, 0, sizeof(x));
		x.code = (uint16_t)code;
		wire_refuse_encode(&x, buf, sizeof(buf));
		cr_assert_eq(get_u16(buf), known ? code : ERR_FAILED);
		if (known)
			cr_assert_str_eq(err_name((int)code), names[code]);
	}
}

Test(wire_refuse, text_is_made_printable_both_ways)
{
	struct wire_refuse x, back;
	uint8_t buf[64];

	memset(&x, 0, sizeof(x));
	x.code = 1;
	memcpy(x.text, "a\x1b[2J\n\xc3\xa4~", 9);
	int len = wire_refuse_encode(&x, buf, sizeof(buf));
	cr_assert_arr_eq(buf + 4, "a?[2J???~", 9);
	memcpy(buf + 4, "\x7f\x80\t ok\r\x01!", 9);
	cr_assert_eq(wire_refuse_decode(&back, buf, (size_t)len, NULL), 0);
	cr_assert_str_eq(back.text, "??? ok?\?!");
}

/* ---- ACK, lineage ---- */

Test(wire_ack, bytes_order_and_cuts)
{
	struct wire_ack a = {9, 8, UINT64_C(0x0102030405060708) & 7}, back;
	uint8_t buf[32];

	a.flushed = 7;
	memset(buf, 0xee, sizeof(buf));
	cr_assert_eq(wire_ack_encode(&a, buf, sizeof(buf)), 24);
	cr_assert_arr_eq(buf, "\x09\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\xee", 25);
	POISON(back);
	cr_assert_eq(wire_ack_decode(&back, buf, 24, NULL), 0);
	cr_assert(back.received == 9 && back.applied == 8 && back.flushed == 7);
	cr_assert_eq(wire_ack_encode(&a, buf, 23), -ERR_LIMIT);
	wire_ack_encode(&a, buf, sizeof(buf));
	assert_cuts_bad(decode_ack, sizeof(a), buf, 24, true);
	put_u64(buf + 8, 10);
	assert_bad(decode_ack, sizeof(a), buf, 24, "field applied: above received");
	put_u64(buf + 8, 6);
	assert_bad(decode_ack, sizeof(a), buf, 24, "field flushed: above applied");
	memset(buf, 0xff, 24);
	cr_assert_eq(wire_ack_decode(&back, buf, 24, NULL), 0);
	memset(buf, 0, 24);
	cr_assert_eq(wire_ack_decode(&back, buf, 24, NULL), 0);
}

Test(wire_lineage, bytes_and_gaps)
{
	struct lineage l = {.current = 1, .bitmap = 2, .history = {3, 4}}, back;
	uint8_t buf[160];
	struct wbuf w = {.data = buf, .size = sizeof(buf)};

	memset(buf, 0xee, sizeof(buf));
	wire_lineage_encode(&l, &w);
	cr_assert(!w.failed);
	cr_assert_eq(w.len, 144);
	for (unsigned i = 0; i < 18; i++)
		cr_assert_eq(get_u64(buf + 8 * i), i < 4 ? i + 1 : 0);
	struct rbuf r = {.data = buf, .size = 144};
	POISON(back);
	wire_lineage_decode(&back, &r);
	cr_assert(!r.failed);
	cr_assert_eq(r.pos, 144);
	cr_assert_eq(memcmp(&l, &back, sizeof(l)), 0);
	for (unsigned i = 3; i < 18; i++) {
		if (i == 4)
			continue;
		put_u64(buf + 8 * i, i == 3 ? 4 : 1); /* no gap at 3 */
		if (i > 4) {
			r = (struct rbuf){.data = buf, .size = 144};
			POISON(back);
			wire_lineage_decode(&back, &r);
			cr_assert(r.failed, "%u", i);
			UNTOUCHED(back);
			put_u64(buf + 8 * i, 0);
		}
	}
	for (size_t cut = 0; cut < 144; cut++) {
		r = (struct rbuf){.data = buf, .size = cut};
		POISON(back);
		wire_lineage_decode(&back, &r);
		cr_assert(r.failed);
		UNTOUCHED(back);
	}
}

/* ---- JOIN ---- */

static void join_some(struct wire_join *j)
{
	memset(j, 0, sizeof(*j));
	snprintf(j->group, sizeof(j->group), "vm1");
	memset(j->group_uuid, 0x77, 16);
	j->flags = WIRE_JOIN_PROTECT | WIRE_JOIN_FRESH;
	j->role = ROLE_PRIMARY;
	j->state = STATE_RUNNING;
	j->lineage.current = 5;
	j->lineage.history[0] = 4;
	j->sync_from = 0xa1;
	j->ckpt_max = 41;
	j->last_stream = 40;
	j->failover_generation = 0xa2;
	j->start = 0xa3;
	j->number = 0xa4;
	settings_default(&j->settings);
	j->n_volumes = 2;
	for (uint32_t i = 0; i < 2; i++) {
		snprintf(j->volumes[i].name, NAME_SIZE, "v%u", i);
		memset(j->volumes[i].uuid, 0x10 + (int)i, 16);
		j->volumes[i].id = 3 - i;
		j->volumes[i].size = 512 * (i + 1);
		j->volumes[i].flags = (uint8_t)(i ? VOLUME_STALE | VOLUME_REBUILD : VOLUME_PEER_STALE);
	}
}

#define JOIN_HEAD 27 /* name, uuid, flags, role, state of the group vm1 */
#define JOIN_SETTINGS (27 + 144 + 48)

Test(wire_join, documented_bytes_and_round_trip)
{
	static struct wire_join j, back;
	static uint8_t buf[WIRE_JOIN_ENCODED_MAX];
	uint8_t settings[2048];
	struct wbuf w = {.data = settings, .size = sizeof(settings)};

	join_some(&j);
	memset(buf, 0xee, sizeof(buf));
	int len = wire_join_encode(&j, buf, sizeof(buf));
	cr_assert_gt(len, 0);
	cr_assert_eq(buf[len], 0xee);
	cr_assert_arr_eq(buf, "\x03\0vm1\x77\x77", 7);
	cr_assert_eq(get_u32(buf + 21), 0x81);
	cr_assert_eq(buf[25], ROLE_PRIMARY);
	cr_assert_eq(buf[26], STATE_RUNNING);
	cr_assert_eq(get_u64(buf + JOIN_HEAD), 5);
	cr_assert_eq(get_u64(buf + JOIN_HEAD + 16), 4);
	static const uint64_t numbers[] = {0xa1, 41, 40, 0xa2, 0xa3, 0xa4};
	for (unsigned i = 0; i < 6; i++)
		cr_assert_eq(get_u64(buf + JOIN_HEAD + 144 + 8 * i), numbers[i]);
	settings_encode(&j.settings, &w);
	cr_assert_arr_eq(buf + JOIN_SETTINGS, settings, w.len);
	const uint8_t *v = buf + JOIN_SETTINGS + w.len;
	cr_assert_eq(get_u32(v), 2);
	cr_assert_arr_eq(v + 4, "\x02\0v0\x10", 5);
	cr_assert_eq(get_u32(v + 24), 3);
	cr_assert_eq(get_u64(v + 28), 512);
	cr_assert_eq(v[36], VOLUME_PEER_STALE);
	cr_assert_arr_eq(v + 37, "\x02\0v1\x11", 5);
	cr_assert_eq(v[69], VOLUME_STALE | VOLUME_REBUILD);
	cr_assert_eq(v + 70 - buf, len);
	POISON(back);
	cr_assert_eq(wire_join_decode(&back, buf, (size_t)len, NULL), 0);
	cr_assert_eq(memcmp(&back, &j, sizeof(j)), 0);
	assert_cuts_bad(decode_join, sizeof(j), buf, (size_t)len, true);
	memset(buf, 0xee, sizeof(buf));
	cr_assert_eq(wire_join_encode(&j, buf, (size_t)len - 1), -ERR_LIMIT);
	cr_assert_eq(buf[len - 1], 0xee);
}

Test(wire_join, the_largest_fits_its_limit)
{
	static struct wire_join j, back;
	static uint8_t buf[WIRE_JOIN_ENCODED_MAX];

	join_some(&j);
	memset(j.group, 'g', NAME_MAX_LEN);
	for (unsigned i = 0; i < GENERATIONS_MAX; i++)
		j.lineage.history[i] = UINT64_MAX;
	j.n_volumes = GROUP_VOLUMES_MAX;
	for (uint32_t i = 0; i < GROUP_VOLUMES_MAX; i++) {
		snprintf(j.volumes[i].name, NAME_SIZE, "%063u", i);
		j.volumes[i].id = i;
		j.volumes[i].size = VOLUME_SIZE_MAX;
	}
	int len = wire_join_encode(&j, buf, sizeof(buf));
	cr_assert_gt(len, 0);
	POISON(back);
	cr_assert_eq(wire_join_decode(&back, buf, (size_t)len, NULL), 0);
	cr_assert_eq(memcmp(&back, &j, sizeof(j)), 0);
	j.n_volumes = 0;
	len = wire_join_encode(&j, buf, sizeof(buf));
	cr_assert_eq(wire_join_decode(&back, buf, (size_t)len, NULL), 0);
}

#define JOIN_BAD(says, ...)                                                                                            \
	do {                                                                                                           \
		static struct wire_join j;                                                                             \
		static uint8_t buf[WIRE_JOIN_ENCODED_MAX];                                                             \
		join_some(&j);                                                                                         \
		__VA_ARGS__;                                                                                           \
		int len = wire_join_encode(&j, buf, sizeof(buf));                                                      \
		cr_assert_gt(len, 0);                                                                                  \
		assert_bad(decode_join, sizeof(j), buf, (size_t)len, says);                                            \
	} while (0)

Test(wire_join, bad_fields_by_name)
{
	JOIN_BAD("field group:", j.group[0] = '\0');
	JOIN_BAD("field group:", j.group[0] = '-');
	JOIN_BAD("field group:", memcpy(j.group, "../", 4));
	JOIN_BAD("field flags:", j.flags = 1U << 31);
	JOIN_BAD("field flags:", j.flags = 1U << 31);
	JOIN_BAD("field role:", j.role = 3);
	JOIN_BAD("field state:", j.state = 5);
	JOIN_BAD("field state:", j.state = STATE_FAILOVER);
	JOIN_BAD("field state:", j.role = ROLE_STANDALONE);
	JOIN_BAD("field lineage:", j.lineage.history[2] = 9);
	JOIN_BAD("field last_stream:", j.last_stream = 42);
	JOIN_BAD("field ckpt_max:", j.ckpt_max = WIRE_CKPT_NUMBER_MAX + 1);
	JOIN_BAD("field settings:", j.settings.protocol = 4);
	JOIN_BAD("field volumes[0]: its name", j.volumes[0].name[0] = '/');
	JOIN_BAD("field volumes[1]: its name stands twice", j.volumes[1].name[1] = '0');
	JOIN_BAD("field volumes[1]: its id stands twice", j.volumes[1].id = 3);
	JOIN_BAD("field volumes[1]: its size", j.volumes[1].size = 0);
	JOIN_BAD("field volumes[1]: its flags", j.volumes[1].flags = 8);
	JOIN_BAD("field volumes[1]: it is being rebuilt", j.volumes[1].flags = VOLUME_REBUILD);
	JOIN_BAD("field volumes[1]: its size", j.volumes[1].size = 511);
	JOIN_BAD("field volumes[1]: its size", j.volumes[1].size = UINT64_MAX - 511);
}

Test(wire_join, counts_that_lie)
{
	static struct wire_join j;
	static uint8_t buf[WIRE_JOIN_ENCODED_MAX];

	join_some(&j);
	size_t len = (size_t)wire_join_encode(&j, buf, sizeof(buf));
	size_t at = len - 70;
	cr_assert_eq(get_u32(buf + at), 2);
	put_u32(buf + at, 3);
	assert_bad(decode_join, sizeof(j), buf, len, "field volumes:");
	put_u32(buf + at, 1);
	assert_bad(decode_join, sizeof(j), buf, len, "33 bytes too many");
	put_u32(buf + at, GROUP_VOLUMES_MAX + 1);
	assert_bad(decode_join, sizeof(j), buf, len, "field n_volumes:");
	put_u32(buf + at, UINT32_MAX);
	assert_bad(decode_join, sizeof(j), buf, len, "field n_volumes:");
	put_u32(buf + at, 2);
	buf[3] = '\0';
	assert_bad(decode_join, sizeof(j), buf, len, "field group:");
	buf[3] = 'm';
	put_u16(buf, UINT16_MAX);
	assert_bad(decode_join, sizeof(j), buf, len, "field group:");
}

/* ---- REPORT ---- */

static void report_some(struct wire_report_volume *v, uint32_t n)
{
	memset(v, 0, n * sizeof(*v));
	for (uint32_t i = 0; i < n; i++) {
		snprintf(v[i].name, NAME_SIZE, "disk%u", i);
		snprintf(v[i].group, NAME_SIZE, "vm1");
		memset(v[i].uuid, (int)i, 16);
		v[i].id = i;
		v[i].size = 4096;
		v[i].role = ROLE_STANDALONE;
		v[i].state = STATE_FAILOVER;
	}
}

Test(wire_report, bytes_and_round_trip)
{
	struct wire_report_volume v[3], back[8];
	uint8_t buf[512];

	report_some(v, 3);
	memset(buf, 0xee, sizeof(buf));
	int len = wire_report_encode(v, 3, buf, sizeof(buf));
	cr_assert_eq(len, 4 + 3 * (7 + 5 + 30));
	cr_assert_arr_eq(buf, "\x03\0\0\0\x05\0disk0\x03\0vm1", 16);
	cr_assert_eq(get_u32(buf + 32), 0);
	cr_assert_eq(get_u64(buf + 36), 4096);
	cr_assert_eq(buf[44], ROLE_STANDALONE);
	cr_assert_eq(buf[45], STATE_FAILOVER);
	cr_assert_arr_eq(buf + 46, "\x05\0disk1", 7);
	cr_assert_eq(buf[len], 0xee);
	POISON(back);
	cr_assert_eq(wire_report_decode(back, 3, buf, (size_t)len, NULL), 3);
	cr_assert_eq(memcmp(back, v, sizeof(v)), 0);
	cr_assert_eq(((uint8_t *)&back[3])[0], 0x5a);
	assert_cuts_bad(decode_report, sizeof(back), buf, (size_t)len, true);
	/* more than the caller has room for */
	struct err e = {0};
	POISON(back);
	cr_assert_eq(wire_report_decode(back, 2, buf, (size_t)len, &e), -ERR_PROTO);
	UNTOUCHED(back);
	cr_assert_eq(wire_report_encode(v, 3, buf, (size_t)len - 1), -ERR_LIMIT);
	cr_assert_eq(wire_report_encode(v, 0, buf, sizeof(buf)), 4);
	cr_assert_eq(wire_report_decode(back, 0, buf, 4, NULL), 0);
}

Test(wire_report, the_largest_fits_its_limit)
{
	struct wire_report_volume *v = malloc((WIRE_REPORT_MAX + 1) * sizeof(*v));
	uint8_t *buf = malloc(WIRE_REPORT_ENCODED_MAX + 160);

	report_some(v, WIRE_REPORT_MAX);
	for (uint32_t i = 0; i < WIRE_REPORT_MAX; i++) {
		snprintf(v[i].name, NAME_SIZE, "%063u", i);
		memset(v[i].group, 'g', NAME_MAX_LEN);
	}
	cr_assert_eq(wire_report_encode(v, WIRE_REPORT_MAX, buf, WIRE_REPORT_ENCODED_MAX), WIRE_REPORT_ENCODED_MAX);
	cr_assert_eq(wire_report_decode(v, WIRE_REPORT_MAX, buf, WIRE_REPORT_ENCODED_MAX, NULL), WIRE_REPORT_MAX);
	/* one more, all of it there, and room for it: still above the limit */
	memcpy(buf + WIRE_REPORT_ENCODED_MAX, buf + 4, 160);
	put_u32(buf, WIRE_REPORT_MAX + 1);
	cr_assert_eq(wire_report_decode(v, WIRE_REPORT_MAX + 1, buf, WIRE_REPORT_ENCODED_MAX + 160, NULL), -ERR_PROTO);
	put_u32(buf, UINT32_MAX);
	cr_assert_eq(wire_report_decode(v, WIRE_REPORT_MAX, buf, WIRE_REPORT_ENCODED_MAX, NULL), -ERR_PROTO);
	free(v);
	free(buf);
}

Test(wire_report, bad_fields_by_name)
{
	static const char *const says[] = {
	    "field name:", "field group:", "field size:", "field size:", "field size:", "field state:", "field state:"};

	for (unsigned n = 0; n < sizeof(says) / sizeof(says[0]); n++) {
		struct wire_report_volume v[3];
		uint8_t buf[512];
		report_some(v, 3);
		switch (n) {
		case 0:
			v[1].name[0] = '.';
			break;
		case 1:
			v[1].group[1] = '/';
			break;
		case 2:
			v[1].size = 0;
			break;
		case 3:
			v[1].size = 4097;
			break;
		case 4:
			v[1].size = VOLUME_SIZE_MAX + 512;
			break;
		case 5:
			v[1].role = 3;
			break;
		case 6:
			v[1].state = STATE_RUNNING;
			break;
		}
		int len = wire_report_encode(v, 3, buf, sizeof(buf));
		assert_bad(decode_report, 8 * sizeof(v[0]), buf, (size_t)len, says[n]);
	}
}

/* ---- START_PROTECT, VOLUME_READ, VOLUME_WRITE ---- */

static struct wire_start start_some(void)
{
	struct wire_start x;

	memset(&x, 0, sizeof(x));
	snprintf(x.peer, sizeof(x.peer), "127.0.0.1:7790");
	x.n_volumes = 2;
	snprintf(x.volumes[0].name, NAME_SIZE, "vm1");
	x.volumes[0].id = 0x01020304;
	snprintf(x.volumes[1].name, NAME_SIZE, "vm1-data");
	x.volumes[1].id = UINT32_MAX;
	return x;
}

Test(wire_start, bytes_and_round_trip)
{
	static const uint8_t want[] = "\x0e\0"
				      "127.0.0.1:7790\x02\0\0\0\x03\0vm1\x04\x03\x02\x01\x08\0vm1-data"
				      "\xff\xff\xff\xff";
	struct wire_start x = start_some(), back;
	uint8_t buf[128];

	memset(buf, 0xee, sizeof(buf));
	cr_assert_eq(wire_start_encode(&x, buf, sizeof(buf)), sizeof(want) - 1);
	cr_assert_arr_eq(buf, want, sizeof(want) - 1);
	cr_assert_eq(buf[sizeof(want) - 1], 0xee);
	POISON(back);
	cr_assert_eq(wire_start_decode(&back, want, sizeof(want) - 1, NULL), 0);
	cr_assert_eq(memcmp(&back, &x, sizeof(x)), 0);
	assert_cuts_bad(decode_start, sizeof(back), want, sizeof(want) - 1, true);
	cr_assert_eq(wire_start_encode(&x, buf, sizeof(want) - 2), -ERR_LIMIT);
}

Test(wire_start, the_largest_fits_its_limit)
{
	struct wire_start x = start_some(), back;
	uint8_t *buf = malloc(WIRE_START_ENCODED_MAX);

	memset(x.peer, 'p', ADDR_SIZE - 1);
	x.n_volumes = GROUP_VOLUMES_MAX;
	for (uint32_t i = 0; i < GROUP_VOLUMES_MAX; i++) {
		snprintf(x.volumes[i].name, NAME_SIZE, "%063u", i);
		x.volumes[i].id = i + 1;
	}
	cr_assert_eq(wire_start_encode(&x, buf, WIRE_START_ENCODED_MAX), WIRE_START_ENCODED_MAX);
	cr_assert_eq(wire_start_decode(&back, buf, WIRE_START_ENCODED_MAX, NULL), 0);
	cr_assert_eq(memcmp(&back, &x, sizeof(x)), 0);
	put_u32(buf + 2 + ADDR_SIZE - 1, GROUP_VOLUMES_MAX + 1);
	assert_bad(decode_start, sizeof(x), buf, WIRE_START_ENCODED_MAX, "field n_volumes:");
	put_u32(buf + 2 + ADDR_SIZE - 1, 0);
	assert_bad(decode_start, sizeof(x), buf, WIRE_START_ENCODED_MAX, "field n_volumes:");
	free(buf);
}

Test(wire_start, bad_fields_by_name)
{
	static const char *const says[] = {
	    "field peer:", "field peer:", "volumes[1]:", "volumes[1]:", "volumes[1]:", "volumes[0]:", "volumes[1]:"};

	for (unsigned n = 0; n < sizeof(says) / sizeof(says[0]); n++) {
		struct wire_start x = start_some();
		uint8_t buf[256];
		switch (n) {
		case 0:
			x.peer[0] = '\0';
			break;
		case 1:
			x.peer[3] = ' ';
			break;
		case 2:
			snprintf(x.volumes[1].name, NAME_SIZE, "vm1");
			break;
		case 3:
			x.volumes[1].id = x.volumes[0].id;
			break;
		case 4:
			x.volumes[1].id = 0;
			break;
		case 5:
			x.volumes[0].name[0] = '/';
			break;
		case 6:
			x.volumes[1].name[2] = '\x7f';
			break;
		}
		int len = wire_start_encode(&x, buf, sizeof(buf));
		assert_bad(decode_start, sizeof(x), buf, (size_t)len, says[n]);
	}
}

Test(wire_volume, a_name_and_its_bytes)
{
	uint8_t buf[128];
	char name[NAME_SIZE + 1];
	size_t at = 77;
	struct err e = {0};

	memset(buf, 0xee, sizeof(buf));
	int n = wire_volume_encode("vm1", buf, sizeof(buf));
	cr_assert_eq(n, 5);
	cr_assert_arr_eq(buf, "\x03\0vm1\xee", 6);
	memset(name, 0x5a, sizeof(name));
	cr_assert_eq(wire_volume_decode(name, &at, buf, 5 + 9, 9, NULL), 0);
	cr_assert_str_eq(name, "vm1");
	cr_assert_eq(at, 5);
	cr_assert_eq(name[NAME_SIZE], 0x5a);
	memset(name, 0x5a, sizeof(name));
	at = 77;
	static const struct {
		size_t len;
		uint64_t bytes;
	} bad[] = {{5, 1}, {6, 0}, {5 + 9, 8}, {5 + 9, 10}, {5, UINT64_MAX}, {4, 0}, {1, 0}, {0, 0}};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		cr_assert_eq(wire_volume_decode(name, &at, buf, bad[i].len, bad[i].bytes, &e), -ERR_PROTO, "%u", i);
		cr_assert(at == 77 && name[0] == 0x5a);
	}
	buf[2] = '.';
	cr_assert_eq(wire_volume_decode(name, &at, buf, 5, 0, &e), -ERR_PROTO);
	cr_assert(strstr(e.text, "field name:") != NULL, "%s", e.text);
	buf[2] = 0;
	cr_assert_eq(wire_volume_decode(name, &at, buf, 5, 0, &e), -ERR_PROTO);
	cr_assert(at == 77 && name[0] == 0x5a);
}
