/* Fuzzes every decoder of core/wire. The first byte picks one; what it accepts must encode again, decode to the same,
 * and stand within its documented bounds.
 *   clang-14 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/range.h"
#include "core/wire.h"

#define MUST(cond)                                                                                                     \
	do {                                                                                                           \
		if (!(cond))                                                                                           \
			abort();                                                                                       \
	} while (0)

#define SESSION UINT64_C(0x6c534f65b94292a8)
#define REPORT_ROOM 64U

static uint8_t again[WIRE_PAYLOAD_MAX];

static bool printable(const char *text)
{
	for (; *text != '\0'; text++) {
		if (*text < 0x20 || *text >= 0x7f)
			return false;
	}
	return true;
}

static void header_facts(const struct wire_frame *f)
{
	MUST(f->length_payload <= WIRE_PAYLOAD_MAX);
	MUST(strcmp(wire_type_name(f->type), "UNKNOWN") != 0);
	MUST(f->length_payload > 0 || f->crc_payload == 0);
	switch (f->type) {
	case WIRE_WRITE:
	case WIRE_RESYNC_WRITE:
		MUST(f->length == f->length_payload);
		/* fall through */
	case WIRE_ZERO:
	case WIRE_DISCARD:
	case WIRE_RESYNC_ZERO:
		MUST(f->seq != 0 && f->length != 0 && f->length <= WIRE_SPAN_MAX);
		MUST(f->offset <= VOLUME_SIZE_MAX && f->length <= VOLUME_SIZE_MAX - f->offset);
		break;
	case WIRE_DIRTY:
		MUST(f->length_payload % 16 == 0);
		break;
	case WIRE_VOLUME_READ:
	case WIRE_VOLUME_WRITE:
	case WIRE_VOLUME_DATA:
		MUST(f->seq != 0 && f->length <= WIRE_RANGE_MAX);
		MUST(f->length_payload <= WIRE_RANGE_MAX + WIRE_VOLUME_NAME_MAX);
		MUST(f->offset <= VOLUME_SIZE_MAX && f->length <= VOLUME_SIZE_MAX - f->offset);
		break;
	default:
		break;
	}
}

/* The checksum is put right, or nothing behind it would ever be reached. */
static void fuzz_header(const uint8_t *data, size_t len)
{
	uint8_t bytes[WIRE_HEADER_SIZE] = {0}, back[WIRE_HEADER_SIZE], seed[8];
	struct wire_frame f;
	struct err e;

	memcpy(bytes, data, len < sizeof(bytes) ? len : sizeof(bytes));
	(void)wire_header_decode(&f, SESSION, bytes, WIRE_PAYLOAD_MAX, &e);
	put_u64(seed, SESSION);
	put_u32(bytes + 52, crc32c(crc32c(0, seed, sizeof(seed)), bytes, 52));
	if (wire_header_decode(&f, SESSION, bytes, WIRE_PAYLOAD_MAX, &e) < 0)
		return;
	header_facts(&f);
	wire_header_encode(&f, SESSION, back);
	MUST(memcmp(bytes, back, sizeof(bytes)) == 0);
	for (unsigned bit = 0; bit < 8 * WIRE_HEADER_SIZE; bit++) {
		bytes[bit / 8] ^= (uint8_t)(1U << bit % 8);
		MUST(wire_header_decode(&f, SESSION, bytes, WIRE_PAYLOAD_MAX, NULL) < 0);
		bytes[bit / 8] ^= (uint8_t)(1U << bit % 8);
	}
}

static void fuzz_hello(const uint8_t *data, size_t len)
{
	struct wire_hello a, b;
	struct err e;

	if (wire_hello_decode(&a, data, len, &e) < 0)
		return;
	MUST(printable(a.program));
	int n = wire_hello_encode(&a, again, sizeof(again));
	MUST(n > 0 && (size_t)n <= len);
	MUST(wire_hello_decode(&b, again, (size_t)n, NULL) == 0);
	MUST(memcmp(&a, &b, sizeof(a)) == 0);
	(void)wire_negotiate(&a, &b, &e);
	MUST(wire_session(a.nonce, ~a.nonce) != 0);
}

static void fuzz_refuse(const uint8_t *data, size_t len)
{
	struct wire_refuse a, b;
	struct err e;

	if (wire_refuse_decode(&a, data, len, &e) < 0)
		return;
	MUST(printable(a.text) && a.code > 0 && a.code < ERR_CODES_END);
	int n = wire_refuse_encode(&a, again, sizeof(again));
	MUST(n > 0 && (size_t)n == len);
	MUST(wire_refuse_decode(&b, again, (size_t)n, NULL) == 0);
	MUST(memcmp(&a, &b, sizeof(a)) == 0);
}

static void fuzz_ack(const uint8_t *data, size_t len)
{
	struct wire_ack a;
	struct err e;

	if (wire_ack_decode(&a, data, len, &e) < 0)
		return;
	MUST(a.flushed <= a.applied && a.applied <= a.received);
	int n = wire_ack_encode(&a, again, sizeof(again));
	MUST(n > 0 && (size_t)n == len && memcmp(again, data, len) == 0);
}

static void fuzz_join(const uint8_t *data, size_t len)
{
	static struct wire_join a, b;
	struct err e;

	if (wire_join_decode(&a, data, len, &e) < 0)
		return;
	MUST(name_valid(a.group) && a.n_volumes <= GROUP_VOLUMES_MAX && settings_valid(&a.settings));
	for (uint32_t i = 0; i < a.n_volumes; i++)
		MUST(name_valid(a.volumes[i].name) && a.volumes[i].size <= VOLUME_SIZE_MAX);
	int n = wire_join_encode(&a, again, WIRE_JOIN_ENCODED_MAX);
	MUST(n > 0);
	MUST(wire_join_decode(&b, again, (size_t)n, NULL) == 0);
	MUST(memcmp(&a, &b, sizeof(a)) == 0);
}

static void fuzz_report(const uint8_t *data, size_t len)
{
	static struct wire_report_volume a[REPORT_ROOM + 1];
	struct err e;

	memset(&a[REPORT_ROOM], 0x5a, sizeof(a[0]));
	int n = wire_report_decode(a, REPORT_ROOM, data, len, &e);
	MUST(((const uint8_t *)&a[REPORT_ROOM])[0] == 0x5a);
	if (n < 0)
		return;
	MUST((unsigned)n <= REPORT_ROOM);
	for (int i = 0; i < n; i++)
		MUST(name_valid(a[i].name) && name_valid(a[i].group) && a[i].size > 0);
	int m = wire_report_encode(a, (uint32_t)n, again, sizeof(again));
	MUST(m > 0 && (size_t)m == len && memcmp(again, data, len) == 0);
}

static void fuzz_start(const uint8_t *data, size_t len)
{
	static struct wire_start a, b;
	struct err e;

	if (wire_start_decode(&a, data, len, &e) < 0)
		return;
	MUST(printable(a.peer) && a.n_volumes > 0 && a.n_volumes <= GROUP_VOLUMES_MAX);
	for (uint32_t i = 0; i < a.n_volumes; i++)
		MUST(name_valid(a.volumes[i].name) && a.volumes[i].id != 0);
	int n = wire_start_encode(&a, again, WIRE_START_ENCODED_MAX);
	MUST(n > 0 && (size_t)n == len && memcmp(again, data, len) == 0);
	MUST(wire_start_decode(&b, again, (size_t)n, NULL) == 0);
	MUST(memcmp(&a, &b, sizeof(a)) == 0);
}

static void fuzz_volume(const uint8_t *data, size_t len)
{
	char name[NAME_SIZE];
	size_t at;
	struct err e;

	if (len < 1 || wire_volume_decode(name, &at, data + 1, len - 1, data[0], &e) < 0)
		return;
	MUST(name_valid(name) && at + data[0] == len - 1);
	int n = wire_volume_encode(name, again, sizeof(again));
	MUST(n > 0 && (size_t)n == at && memcmp(again, data + 1, at) == 0);
}

static void fuzz_settings(const uint8_t *data, size_t len)
{
	struct rbuf r = {.data = data, .size = len};
	struct settings a, b;

	settings_decode(&a, &r);
	if (r.failed)
		return;
	MUST(settings_valid(&a));
	settings_default(&b);
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		char text[64];
		settings_format(&a, i, text, sizeof(text));
		MUST(settings_set(&b, settings_key(i), text, NULL) == 0);
	}
	MUST(memcmp(&a, &b, sizeof(a)) == 0);
}

/* KEY=VALUE and sizes as a user types them. */
static void fuzz_text(const uint8_t *data, size_t len)
{
	char text[256], *value;
	struct settings s;
	struct err e;
	uint64_t v;

	if (len >= sizeof(text))
		len = sizeof(text) - 1;
	memcpy(text, data, len);
	text[len] = '\0';
	e.text[0] = '\0';
	(void)parse_size(text, &v, &e);
	MUST(printable(e.text));
	settings_default(&s);
	value = strchr(text, '=');
	if (value == NULL)
		return;
	*value++ = '\0';
	(void)settings_set(&s, text, value, &e);
	MUST(printable(e.text) && settings_valid(&s));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static void (*const targets[])(const uint8_t *, size_t) = {
	    fuzz_header, fuzz_hello,	fuzz_refuse, fuzz_ack,	 fuzz_join,
	    fuzz_report, fuzz_settings, fuzz_text,   fuzz_start, fuzz_volume,
	};

	if (len > 0)
		targets[data[0] % (sizeof(targets) / sizeof(targets[0]))](data + 1, len - 1);
	return 0;
}
