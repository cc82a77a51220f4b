/* core/settings: parsing and formatting are exact inverses, whatever is refused says what is allowed and changes
 * nothing, and the encoding survives strangers: unknown keys, cut buffers, values out of bounds. */
#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/settings.h"

static const struct {
	const char *key, *kind, *choices;
	uint64_t def, min, max;
} rows[] = {
#define ROW(field, key, kind, def, min, max, choices) {key, #kind, choices, def, min, max},
    SETTINGS(ROW)
#undef ROW
};

static uint64_t rng_state;

static uint64_t rng(void)
{
	rng_state += UINT64_C(0x9e3779b97f4a7c15);
	uint64_t z = rng_state;
	z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
	return z ^ z >> 31;
}

static uint64_t field(const struct settings *s, unsigned i)
{
	uint64_t v[SETTINGS_COUNT];
	_Static_assert(sizeof(v) == sizeof(*s), "one u64 per setting");
	memcpy(v, s, sizeof(v));
	return v[i];
}

static void field_put(struct settings *s, unsigned i, uint64_t v)
{
	memcpy((char *)s + i * sizeof(v), &v, sizeof(v));
}

/* Bounds, defaults, powers of two around them, round multiples, and anything between. */
static uint64_t value_random(unsigned i)
{
	uint64_t span = rows[i].max - rows[i].min + 1;
	uint64_t v = rows[i].min;

	switch (rng() % 5) {
	case 0:
		v = rows[i].min;
		break;
	case 1:
		v = rows[i].max;
		break;
	case 2:
		v = rows[i].min + rng() % span;
		break;
	case 3:
		v = (rng() % 4096) << (rng() % 50);
		break;
	case 4:
		v = rng() % 100 * 50;
		break;
	}
	return v < rows[i].min || v > rows[i].max ? rows[i].min + v % span : v;
}

Test(settings, defaults_are_the_table)
{
	struct settings s;

	memset(&s, 0xee, sizeof(s));
	settings_default(&s);
	cr_assert_eq(SETTINGS_COUNT, sizeof(rows) / sizeof(rows[0]));
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		cr_assert_str_eq(settings_key(i), rows[i].key);
		cr_assert_eq(field(&s, i), rows[i].def, "%s", rows[i].key);
		cr_assert(rows[i].min <= rows[i].def && rows[i].def <= rows[i].max, "%s", rows[i].key);
	}
	cr_assert(settings_valid(&s));
	cr_assert_eq(s.protocol, PROTOCOL_F);
	cr_assert_eq(s.checkpoint_interval_ms, 5000);
	cr_assert_eq(s.queue_max_bytes, UINT64_C(256) << 20);
}

/* What format writes, set takes back as the same value, into that field and no other. */
Test(settings, taking_some_leaves_the_others)
{
	struct settings s, from, want;
	settings_default(&s);
	settings_default(&from);
	from.protocol = PROTOCOL_A;
	from.keep_last = 77;
	from.history_max_bytes = 1;
	want = s;
	settings_take(&s, &from, 0);
	cr_assert_eq(memcmp(&s, &want, sizeof(s)), 0);
	want.keep_last = 77;
	want.history_max_bytes = 1;
	settings_take(&s, &from, UINT64_C(1) << SETTING_keep_last | UINT64_C(1) << SETTING_history_max_bytes);
	cr_assert_eq(memcmp(&s, &want, sizeof(s)), 0);
	settings_take(&s, &from, SETTINGS_ALL);
	cr_assert_eq(memcmp(&s, &from, sizeof(s)), 0);
}

Test(settings, format_then_set_is_the_identity)
{
	rng_state = 20260;
	for (unsigned round = 0; round < 20000; round++) {
		unsigned i = (unsigned)(rng() % SETTINGS_COUNT);
		struct settings from, to, want;
		char text[64];
		struct err e = {0};

		settings_default(&from);
		field_put(&from, i, value_random(i));
		settings_format(&from, i, text, sizeof(text));
		for (unsigned k = 0; k < SETTINGS_COUNT; k++)
			field_put(&to, k, rows[k].min);
		want = to;
		field_put(&want, i, field(&from, i));
		cr_assert_eq(settings_set(&to, rows[i].key, text, &e), 0, "%s=%s: %s", rows[i].key, text, e.text);
		cr_assert_eq(memcmp(&to, &want, sizeof(to)), 0, "%s=%s", rows[i].key, text);
	}
}

Test(settings, format_is_what_a_person_writes)
{
	static const struct {
		unsigned i;
		uint64_t v;
		const char *text;
	} cases[] = {
	    {SETTING_protocol, PROTOCOL_A, "A"},
	    {SETTING_protocol, PROTOCOL_F, "F"},
	    {SETTING_on_cow_error, ON_COW_ERROR_DROP_HISTORY, "drop-history"},
	    {SETTING_on_cow_error, ON_COW_ERROR_BREAK, "break"},
	    {SETTING_checkpoint_interval_ms, 0, "0"},
	    {SETTING_checkpoint_interval_ms, 1, "1ms"},
	    {SETTING_checkpoint_interval_ms, 999, "999ms"},
	    {SETTING_checkpoint_interval_ms, 5000, "5s"},
	    {SETTING_checkpoint_interval_ms, 1500, "1.5s"},
	    {SETTING_checkpoint_interval_ms, 1050, "1.05s"},
	    {SETTING_checkpoint_interval_ms, 1020, "1.02s"},
	    {SETTING_checkpoint_interval_ms, 1005, "1.005s"},
	    {SETTING_checkpoint_interval_ms, 86400000, "86400s"},
	    {SETTING_queue_max_bytes, UINT64_C(256) << 20, "256M"},
	    {SETTING_queue_max_bytes, (UINT64_C(256) << 20) + 1, "268435457"},
	    {SETTING_resync_rate, 0, "0"},
	    {SETTING_resync_rate, 1536, "1536"},
	    {SETTING_resync_rate, 3072, "3K"},
	    {SETTING_history_max_bytes, UINT64_C(1) << 60, "1048576T"},
	    {SETTING_keep_last, 10, "10"},
	};

	for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
		struct settings s;
		char text[32];

		memset(text, '#', sizeof(text));
		settings_default(&s);
		field_put(&s, cases[n].i, cases[n].v);
		settings_format(&s, cases[n].i, text, sizeof(text));
		cr_assert_str_eq(text, cases[n].text);
	}
}

Test(settings, format_stays_within_a_short_buffer)
{
	struct settings s;
	char text[8];

	memset(text, '#', sizeof(text));
	settings_default(&s);
	s.on_cow_error = ON_COW_ERROR_DROP_HISTORY;
	settings_format(&s, SETTING_on_cow_error, text, 5);
	cr_assert_arr_eq(text, "drop\0###", 8);
}

Test(settings, set_takes_every_spelling)
{
	static const struct {
		const char *key, *value;
		unsigned i;
		uint64_t want;
	} cases[] = {
	    {"protocol", "B", SETTING_protocol, PROTOCOL_B},
	    {"on_disconnect", "freeze", SETTING_on_disconnect, ON_DISCONNECT_FREEZE},
	    {"on_congestion", "ahead", SETTING_on_congestion, ON_CONGESTION_AHEAD},
	    {"on_io_error", "pass", SETTING_on_io_error, ON_IO_ERROR_PASS},
	    {"failover_to", "latest", SETTING_failover_to, FAILOVER_TO_LATEST},
	    {"checkpoint_interval", "1.5", SETTING_checkpoint_interval_ms, 1500},
	    {"checkpoint_interval", "250ms", SETTING_checkpoint_interval_ms, 250},
	    {"checkpoint_interval", "0.25", SETTING_checkpoint_interval_ms, 250},
	    {"checkpoint_interval", "2s", SETTING_checkpoint_interval_ms, 2000},
	    {"checkpoint_interval", "0.5m", SETTING_checkpoint_interval_ms, 30000},
	    {"checkpoint_interval", "24h", SETTING_checkpoint_interval_ms, 86400000},
	    {"checkpoint_interval", "0.0000025h", SETTING_checkpoint_interval_ms, 9},
	    {"checkpoint_interval", "1.000000000000000000000000", SETTING_checkpoint_interval_ms, 1000},
	    {"peer_timeout", "500ms", SETTING_peer_timeout_ms, 500},
	    {"queue_max", "0.5G", SETTING_queue_max_bytes, UINT64_C(512) << 20},
	    {"queue_max", "16GiB", SETTING_queue_max_bytes, UINT64_C(16) << 30},
	    {"keep_last", "2000", SETTING_keep_last, 2000},
	    {"keep_last", "007", SETTING_keep_last, 7},
	};

	for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
		struct settings s;
		struct err e = {0};

		settings_default(&s);
		cr_assert_eq(settings_set(&s, cases[n].key, cases[n].value, &e), 0, "%s", e.text);
		cr_assert_eq(field(&s, cases[n].i), cases[n].want, "%s=%s", cases[n].key, cases[n].value);
	}
}

Test(settings, refusals_change_nothing_and_name_what_is_allowed)
{
	static const struct {
		const char *key, *value, *says;
	} cases[] = {
	    {"protocol", "D", "A|B|C|F"},
	    {"protocol", "", "A|B|C|F"},
	    {"protocol", "A|B", "A|B|C|F"},
	    {"protocol", "AB", "A|B|C|F"},
	    {"on_cow_error", "drop", "stop|drop-history|break"},
	    {"checkpoint_interval", "", "from 0 to 86400s"},
	    {"checkpoint_interval", "5 s", "not understood"},
	    {"checkpoint_interval", "-1", "not understood"},
	    {"checkpoint_interval", "+1", "not understood"},
	    {"checkpoint_interval", "1.", "not understood"},
	    {"checkpoint_interval", ".5", "not understood"},
	    {"checkpoint_interval", "1e3", "not understood"},
	    {"checkpoint_interval", "5d", "ms, s, m or h"},
	    {"checkpoint_interval", "25h", "out of range"},
	    {"checkpoint_interval", "0.0005", "finer than a millisecond"},
	    {"checkpoint_interval", "1.5ms", "finer than a millisecond"},
	    {"checkpoint_interval", "0.0000000000000000001", "finer than a millisecond"},
	    {"checkpoint_interval", "99999999999999999999", "out of range"},
	    {"checkpoint_interval", "18446744073709551615h", "out of range"},
	    {"checkpoint_interval", "5124095576030.5h", "out of range"}, /* wraps by the fraction alone */
	    {"peer_timeout", "499ms", "from 500ms to 600s"},
	    {"queue_max", "4194303", "from 4M to 16G"},
	    {"queue_max", "17G", "from 4M to 16G"},
	    {"resync_rate", "10M/s", "K, M, G or T"},
	    {"keep_last", "0", "from 1 to 2000"},
	    {"keep_last", "2001", "out of range"},
	    {"keep_last", "1.5", "not a whole number"},
	    {"keep_last", "10K", "not understood"},
	    {"keep-last", "10", "keep_last"},
	    {"", "10", "history_max_bytes"},
	};

	for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
		struct settings s, before;
		struct err e;

		memset(&e, '#', sizeof(e));
		memset(&s, 0x5a, sizeof(s));
		before = s;
		cr_assert_eq(settings_set(&s, cases[n].key, cases[n].value, &e), -ERR_USAGE, "%s=%s", cases[n].key,
			     cases[n].value);
		cr_assert_eq(memcmp(&s, &before, sizeof(s)), 0, "%s=%s", cases[n].key, cases[n].value);
		cr_assert_eq(e.code, ERR_USAGE);
		cr_assert(strstr(e.text, cases[n].says) != NULL, "'%s' lacks '%s'", e.text, cases[n].says);
		cr_assert_eq(settings_set(&s, cases[n].key, cases[n].value, NULL), -ERR_USAGE);
	}
}

Test(settings, an_unknown_key_lists_them_all)
{
	struct settings s;
	struct err e;

	settings_default(&s);
	cr_assert_eq(settings_set(&s, "protokoll", "F", &e), -ERR_USAGE);
	cr_assert(strstr(e.text, "'protokoll'") != NULL);
	for (unsigned i = 0; i < SETTINGS_COUNT; i++)
		cr_assert(strstr(e.text, rows[i].key) != NULL, "%s", rows[i].key);
}

/* A message repeats at most a piece of what it was given, in printable ASCII: it goes to JSON and terminals. */
Test(settings, messages_quote_safely)
{
	struct settings s;
	struct err e;
	char value[4000];

	memset(value, '\xff', sizeof(value));
	value[0] = '\x1b';
	value[1] = '\n';
	value[sizeof(value) - 1] = '\0';
	settings_default(&s);
	for (unsigned n = 0; n < 3; n++) {
		if (n == 0)
			settings_set(&s, "keep_last", value, &e);
		else if (n == 1)
			settings_set(&s, value, "1", &e);
		else
			settings_set(&s, "protocol", value, &e);
		cr_assert(strstr(e.text, "?...") != NULL, "%s", e.text);
		for (const char *p = e.text; *p != '\0'; p++)
			cr_assert(*p >= 0x20 && *p < 0x7f);
	}
}

/* ---- sizes ---- */

Test(parse_size, exact_values)
{
	static const struct {
		const char *text;
		uint64_t want;
	} cases[] = {
	    {"0", 0},
	    {"512", 512},
	    {"512B", 512},
	    {"1K", 1024},
	    {"1k", 1024},
	    {"1KB", 1024},
	    {"1KiB", 1024},
	    {"20G", UINT64_C(20) << 30},
	    {"20GiB", UINT64_C(20) << 30},
	    {"1.5T", UINT64_C(3) << 39},
	    {"1.50000000000000000000T", UINT64_C(3) << 39},
	    {"0.0009765625M", 1024},
	    {"0.5K", 512},
	    {"1.0", 1},
	    {"18446744073709551615", UINT64_MAX},
	    {"16777215T", UINT64_C(16777215) << 40},
	    {"16777215.5T", (UINT64_C(16777215) << 40) + (UINT64_C(1) << 39)},
	    {"00000000000000000000000000000001", 1},
	};

	for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
		uint64_t v = 77;
		struct err e = {0};

		cr_assert_eq(parse_size(cases[n].text, &v, &e), 0, "%s: %s", cases[n].text, e.text);
		cr_assert_eq(v, cases[n].want, "%s gave %" PRIu64, cases[n].text, v);
	}
}

Test(parse_size, refusals)
{
	static const struct {
		const char *text, *says;
	} cases[] = {
	    {"", "not a size"},
	    {" 1", "not a size"},
	    {"1 ", "not a size"},
	    {"-1", "not a size"},
	    {"+1", "not a size"},
	    {"G", "not a size"},
	    {"1.G", "not a size"},
	    {".5G", "not a size"},
	    {"1..5G", "not a size"},
	    {"1GG", "not a size"},
	    {"1iB", "not a size"},
	    {"1Ki", "not a size"},
	    {"1KiBx", "not a size"},
	    {"1BB", "not a size"},
	    {"1P", "not a size"},
	    {"0x10", "not a size"},
	    {"1e3", "not a size"},
	    {"1,5G", "not a size"},
	    {"18446744073709551616", "too large"},
	    {"99999999999999999999999999", "too large"},
	    {"16777216T", "too large"},
	    {"18014398509481984K", "too large"},
	    {"0.1K", "not a whole number of bytes"},
	    {"1.1T", "not a whole number of bytes"},
	    {"0.5", "not a whole number of bytes"},
	    {"0.0000000000000000001T", "not a whole number of bytes"},
	    /* 1 byte, but in more digits than are kept: refused rather than rounded */
	    {"0.000000000931322574615478515625G", "write it in a smaller unit"},
	};

	for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
		uint64_t v = 77;
		struct err e = {0};

		cr_assert_eq(parse_size(cases[n].text, &v, &e), -ERR_USAGE, "'%s'", cases[n].text);
		cr_assert_eq(v, 77);
		cr_assert_eq(e.code, ERR_USAGE);
		cr_assert(strstr(e.text, cases[n].says) != NULL, "'%s': %s", cases[n].text, e.text);
		cr_assert_eq(parse_size(cases[n].text, &v, NULL), -ERR_USAGE);
	}
}

/* Against 128-bit arithmetic: n / 10^d in a unit is accepted exactly when it is whole, and then with that value. */
Test(parse_size, agrees_with_wide_arithmetic)
{
	static const char units[] = " KMGT";

	rng_state = 5;
	for (unsigned round = 0; round < 200000; round++) {
		unsigned d = (unsigned)(rng() % 7) + 1, u = (unsigned)(rng() % 5);
		uint64_t scale = 1, whole = rng() >> (rng() % 64), frac;
		for (unsigned i = 0; i < d; i++)
			scale *= 10;
		frac = rng() % 2 ? scale / 8 * (rng() % 8) : rng() % scale;
		char text[80];
		snprintf(text, sizeof(text), "%" PRIu64 ".%0*" PRIu64 "%.1s", whole, (int)d, frac, u ? units + u : "");
		unsigned __int128 exact = ((unsigned __int128)whole * scale + frac) << (10 * u);
		bool fits = exact % scale == 0 && exact / scale <= UINT64_MAX;
		uint64_t v = 77;
		int rc = parse_size(text, &v, NULL);
		cr_assert_eq(rc, fits ? 0 : -ERR_USAGE, "%s", text);
		cr_assert_eq(v, fits ? (uint64_t)(exact / scale) : 77, "%s", text);
	}
}

/* ---- encoding ---- */

static size_t encode(const struct settings *s, uint8_t *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	settings_encode(s, &w);
	cr_assert(!w.failed);
	return w.len;
}

Test(settings, encoding_round_trip_and_bytes)
{
	struct settings s, back;
	uint8_t buf[2048];

	rng_state = 99;
	for (unsigned round = 0; round < 500; round++) {
		for (unsigned i = 0; i < SETTINGS_COUNT; i++)
			field_put(&s, i, value_random(i));
		memset(buf, 0xee, sizeof(buf));
		size_t len = encode(&s, buf, sizeof(buf));
		cr_assert_eq(buf[len], 0xee);
		struct rbuf r = {.data = buf, .size = len};
		memset(&back, 0x5a, sizeof(back));
		settings_decode(&back, &r);
		cr_assert(!r.failed);
		cr_assert_eq(r.pos, len);
		cr_assert_eq(memcmp(&s, &back, sizeof(s)), 0);
	}
	settings_default(&s);
	encode(&s, buf, sizeof(buf));
	static const char head[] = "\x0f\0\x08\0protocol\x03\0\0\0\0\0\0\0\x0d\0on_disconnect\0\0\0\0\0\0\0\0";
	cr_assert_arr_eq(buf, head, sizeof(head) - 1);
}

Test(settings, every_cut_fails_and_changes_nothing)
{
	struct settings s, back, before;
	uint8_t buf[2048];

	settings_default(&s);
	size_t len = encode(&s, buf, sizeof(buf));
	memset(&before, 0x5a, sizeof(before));
	for (size_t cut = 0; cut < len; cut++) {
		struct rbuf r = {.data = buf, .size = cut};
		back = before;
		settings_decode(&back, &r);
		cr_assert(r.failed, "%zu", cut);
		cr_assert_eq(memcmp(&back, &before, sizeof(back)), 0);
	}
}

static void entry(struct wbuf *w, const char *key, uint64_t v)
{
	wbuf_str(w, key);
	wbuf_u64(w, v);
}

Test(settings, unknown_keys_are_skipped_and_missing_ones_keep_defaults)
{
	uint8_t buf[512];
	struct wbuf w = {.data = buf, .size = sizeof(buf)};
	struct settings s, want;

	wbuf_u16(&w, 3);
	entry(&w, "a_setting_of_the_future", UINT64_MAX);
	entry(&w, "keep_last", 3);
	entry(&w, "", 1);
	wbuf_u8(&w, 0xaa);
	struct rbuf r = {.data = buf, .size = w.len};
	memset(&s, 0x5a, sizeof(s));
	settings_decode(&s, &r);
	settings_default(&want);
	want.keep_last = 3;
	cr_assert(!r.failed);
	cr_assert_eq(r.pos, w.len - 1);
	cr_assert_eq(memcmp(&s, &want, sizeof(s)), 0);
}

Test(settings, hostile_encodings_fail)
{
	for (unsigned n = 0; n < 2 * SETTINGS_COUNT + 4; n++) {
		uint8_t buf[8192];
		struct wbuf w = {.data = buf, .size = sizeof(buf)};
		struct settings s, before;
		unsigned i = n / 2;

		if (n < 2 * SETTINGS_COUNT) {
			if (n % 2 == 0 && rows[i].min == 0)
				continue;
			wbuf_u16(&w, 1);
			entry(&w, rows[i].key, n % 2 == 0 ? rows[i].min - 1 : rows[i].max + 1);
		} else if (n == 2 * SETTINGS_COUNT) { /* a key twice */
			wbuf_u16(&w, 2);
			entry(&w, "keep_last", 5);
			entry(&w, "keep_last", 5);
		} else if (n == 2 * SETTINGS_COUNT + 1) { /* too many, all of them there */
			wbuf_u16(&w, SETTINGS_KEYS_MAX + 1);
			for (unsigned k = 0; k <= SETTINGS_KEYS_MAX; k++)
				entry(&w, "x", k);
		} else if (n == 2 * SETTINGS_COUNT + 2) { /* a key longer than any may be */
			char key[SETTINGS_KEY_SIZE + 1];
			memset(key, 'k', sizeof(key));
			key[SETTINGS_KEY_SIZE] = '\0';
			wbuf_u16(&w, 1);
			entry(&w, key, 1);
		} else { /* a NUL inside */
			wbuf_u16(&w, 1);
			wbuf_u16(&w, 9);
			wbuf_raw(&w, "keep\0last", 9);
			wbuf_u64(&w, 1);
		}
		cr_assert(!w.failed);
		memset(&s, 0x5a, sizeof(s));
		before = s;
		struct rbuf r = {.data = buf, .size = w.len};
		settings_decode(&s, &r);
		cr_assert(r.failed, "case %u", n);
		cr_assert_eq(memcmp(&s, &before, sizeof(s)), 0);
	}
}

Test(settings, valid_knows_the_bounds)
{
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		struct settings s;

		settings_default(&s);
		field_put(&s, i, rows[i].max + 1);
		cr_assert(!settings_valid(&s), "%s", rows[i].key);
		field_put(&s, i, rows[i].max);
		cr_assert(settings_valid(&s), "%s", rows[i].key);
		field_put(&s, i, rows[i].min - 1);
		cr_assert(rows[i].min == 0 ? true : !settings_valid(&s), "%s", rows[i].key);
	}
}
