/* Little-endian access, the bounded writer and reader, and CRC-32C against published vectors. */
#include <criterion/criterion.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"

#define POISON 0xa5

Test(bytes, little_endian_at_any_alignment)
{
	for (size_t at = 0; at < 8; at++) {
		uint8_t b[24];
		uint8_t want[24];

		memset(b, POISON, sizeof(b));
		memset(want, POISON, sizeof(want));
		put_u16(b + at, 0x0201);
		memcpy(want + at, "\x01\x02", 2);
		cr_assert_arr_eq(b, want, sizeof(b));
		put_u32(b + at, 0x84838281U);
		memcpy(want + at, "\x81\x82\x83\x84", 4);
		cr_assert_arr_eq(b, want, sizeof(b));
		cr_assert_eq(get_u16(b + at), 0x8281);
		cr_assert_eq(get_u32(b + at), 0x84838281U);
		put_u64(b + at, UINT64_C(0xf8f7f6f5f4f3f2f1));
		memcpy(want + at, "\xf1\xf2\xf3\xf4\xf5\xf6\xf7\xf8", 8);
		cr_assert_arr_eq(b, want, sizeof(b));
		cr_assert_eq(get_u64(b + at), UINT64_C(0xf8f7f6f5f4f3f2f1));
	}
}

Test(bytes, writer_layout)
{
	uint8_t b[64];
	const uint8_t want[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 3, 0, 'v', 'm', '1', 0, 0, 'x', 'y'};
	struct wbuf w = {.data = b, .size = sizeof(b)};

	memset(b, POISON, sizeof(b));
	wbuf_u8(&w, 1);
	wbuf_u16(&w, 0x0302);
	wbuf_u32(&w, 0x07060504);
	wbuf_u64(&w, UINT64_C(0x0f0e0d0c0b0a0908));
	wbuf_str(&w, "vm1");
	wbuf_str(&w, "");
	wbuf_raw(&w, "xy", 2);
	wbuf_raw(&w, NULL, 0);
	cr_assert_not(w.failed);
	cr_assert_eq(w.len, sizeof(want));
	cr_assert_arr_eq(b, want, sizeof(want));
	for (size_t i = sizeof(want); i < sizeof(b); i++)
		cr_assert_eq(b[i], POISON);
}

/* Writes that start below the end and would cross it, at each remaining room. */
Test(bytes, writer_never_passes_the_end)
{
	for (size_t room = 0; room <= 12; room++) {
		for (int kind = 0; kind < 6; kind++) {
			const size_t needs[] = {1, 2, 4, 8, 5, 7};
			uint8_t b[32];
			struct wbuf w = {.data = b, .size = 8 + room, .len = 8};

			memset(b, POISON, sizeof(b));
			switch (kind) {
			case 0:
				wbuf_u8(&w, 1);
				break;
			case 1:
				wbuf_u16(&w, 1);
				break;
			case 2:
				wbuf_u32(&w, 1);
				break;
			case 3:
				wbuf_u64(&w, 1);
				break;
			case 4:
				wbuf_str(&w, "abc");
				break;
			default:
				wbuf_raw(&w, "1234567", 7);
			}
			bool fits = needs[kind] <= room;
			cr_assert_eq(w.failed, !fits);
			cr_assert_eq(w.len, fits ? 8 + needs[kind] : 8U);
			for (size_t i = 0; i < sizeof(b); i++)
				if (i < 8 || i >= w.len)
					cr_assert_eq(b[i], POISON);
		}
	}
}

Test(bytes, writer_failure_sticks)
{
	uint8_t b[4];
	struct wbuf w = {.data = b, .size = sizeof(b)};

	memset(b, POISON, sizeof(b));
	wbuf_u64(&w, 1);
	cr_assert(w.failed);
	wbuf_u8(&w, 1);
	cr_assert(w.failed);
	cr_assert_eq(w.len, 0U);
	cr_assert_eq(b[0], POISON);
}

Test(bytes, writer_refuses_a_string_without_a_length)
{
	size_t n = UINT16_MAX + 1;
	char *s = malloc(n + 1);
	uint8_t *b = malloc(n + 16);

	cr_assert(s != NULL && b != NULL);
	memset(s, 's', n);
	s[n] = '\0';
	struct wbuf w = {.data = b, .size = n + 16};
	wbuf_str(&w, s);
	cr_assert(w.failed);
	cr_assert_eq(w.len, 0U);

	w = (struct wbuf){.data = b, .size = n + 16};
	s[n - 1] = '\0';
	wbuf_str(&w, s);
	cr_assert_not(w.failed);
	cr_assert_eq(w.len, n + 1);
	cr_assert_eq(get_u16(b), UINT16_MAX);
	free(b);
	free(s);
}

Test(bytes, reader_reads_what_was_written)
{
	uint8_t b[64];
	struct wbuf w = {.data = b, .size = sizeof(b)};

	wbuf_u8(&w, 0xf1);
	wbuf_u16(&w, 0xf2f3);
	wbuf_u32(&w, 0xf4f5f6f7U);
	wbuf_u64(&w, UINT64_MAX - 1);
	wbuf_str(&w, "group");
	wbuf_str(&w, "");
	wbuf_raw(&w, "\0z", 2);

	struct rbuf r = {.data = b, .size = w.len};
	char s[6];
	char raw[3] = {1, 1, 1};
	cr_assert_eq(rbuf_u8(&r), 0xf1);
	cr_assert_eq(rbuf_u16(&r), 0xf2f3);
	cr_assert_eq(rbuf_u32(&r), 0xf4f5f6f7U);
	cr_assert_eq(rbuf_u64(&r), UINT64_MAX - 1);
	rbuf_str(&r, s, sizeof(s));
	cr_assert_str_eq(s, "group");
	rbuf_str(&r, s, 1);
	cr_assert_str_eq(s, "");
	rbuf_raw(&r, raw, 2);
	cr_assert_eq(memcmp(raw, "\0z\1", 3), 0);
	cr_assert_eq(r.pos, r.size);
	cr_assert_not(r.failed);
	rbuf_raw(&r, NULL, 0);
	cr_assert_not(r.failed);
	cr_assert_eq(rbuf_u8(&r), 0);
	cr_assert(r.failed);
}

Test(bytes, reader_gives_zeroes_once_failed)
{
	const uint8_t b[] = {1, 2, 3, 4, 5, 6, 7};
	struct rbuf r = {.data = b, .size = sizeof(b)};
	uint8_t raw[4];
	char s[8];

	memset(raw, POISON, sizeof(raw));
	memset(s, POISON, sizeof(s));
	cr_assert_eq(rbuf_u64(&r), 0U);
	cr_assert(r.failed);
	cr_assert_eq(rbuf_u8(&r), 0);
	cr_assert_eq(rbuf_u16(&r), 0);
	cr_assert_eq(rbuf_u32(&r), 0U);
	rbuf_raw(&r, raw, 3);
	cr_assert_arr_eq(raw, ((uint8_t[]){0, 0, 0, POISON}), 4);
	rbuf_str(&r, s, sizeof(s));
	cr_assert_str_eq(s, "");
	cr_assert(r.failed);
}

Test(bytes, reader_refuses_bad_strings)
{
	const struct {
		const char *bytes;
		size_t n;
		size_t room;
		bool good;
	} cases[] = {
	    {"\x03\x00"
	     "abc",
	     5, 4, true},
	    {"\x03\x00"
	     "abc",
	     5, 3, false}, /* no room for the terminator */
	    {"\x04\x00"
	     "abc",
	     5, 8, false}, /* longer than the buffer */
	    {"\xff\xff"
	     "abc",
	     5, 8, false},
	    {"\x03\x00"
	     "a\0c",
	     5, 8, false}, /* a NUL would hide what follows */
	    {"\x03", 1, 8, false},
	    {"", 0, 8, false},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct rbuf r = {.data = (const uint8_t *)cases[i].bytes, .size = cases[i].n};
		char s[16];

		memset(s, POISON, sizeof(s));
		rbuf_str(&r, s, cases[i].room);
		cr_assert_eq(r.failed, !cases[i].good, "case %zu", i);
		cr_assert_str_eq(s, cases[i].good ? "abc" : "", "case %zu", i);
		for (size_t k = cases[i].room; k < sizeof(s); k++)
			cr_assert_eq((uint8_t)s[k], POISON, "case %zu", i);
	}
}

/* RFC 3720, B.4, and the usual check string. */
Test(bytes, crc32c_vectors)
{
	uint8_t b[32];

	cr_assert_eq(crc32c(0, "123456789", 9), 0xe3069283U);
	memset(b, 0, sizeof(b));
	cr_assert_eq(crc32c(0, b, sizeof(b)), 0x8a9136aaU);
	memset(b, 0xff, sizeof(b));
	cr_assert_eq(crc32c(0, b, sizeof(b)), 0x62a8ab43U);
	for (size_t i = 0; i < sizeof(b); i++)
		b[i] = (uint8_t)i;
	cr_assert_eq(crc32c(0, b, sizeof(b)), 0x46dd794eU);
	for (size_t i = 0; i < sizeof(b); i++)
		b[i] = (uint8_t)(31 - i);
	cr_assert_eq(crc32c(0, b, sizeof(b)), 0x113fdb5cU);
}

Test(bytes, crc32c_continues)
{
	uint8_t b[4096 + 7];

	for (size_t i = 0; i < sizeof(b); i++)
		b[i] = (uint8_t)(i * 131 + i / 256);
	uint32_t whole = crc32c(0, b, sizeof(b));
	for (size_t cut = 0; cut <= sizeof(b); cut += 89)
		cr_assert_eq(crc32c(crc32c(0, b, cut), b + cut, sizeof(b) - cut), whole);
	cr_assert_eq(crc32c(0, NULL, 0), 0U);
	cr_assert_eq(crc32c(0x12345678, NULL, 0), 0x12345678U);
	b[17] ^= 0x10;
	cr_assert_neq(crc32c(0, b, sizeof(b)), whole);
}

Test(bytes, base64_vectors_and_round_trip)
{
	static const struct {
		const char *bytes, *text;
	} vectors[] = {/* RFC 4648, 10 */
		       {"", ""},
		       {"f", "Zg=="},
		       {"fo", "Zm8="},
		       {"foo", "Zm9v"},
		       {"foob", "Zm9vYg=="},
		       {"fooba", "Zm9vYmE="},
		       {"foobar", "Zm9vYmFy"},
		       {"\xfb\xff\xbf", "+/+/"}};
	char text[400];
	uint8_t bytes[256], back[257];

	for (unsigned i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++) {
		size_t n = strlen(vectors[i].bytes);
		memset(text, 0x5a, sizeof(text));
		base64_encode(vectors[i].bytes, n, text);
		cr_assert_str_eq(text, vectors[i].text);
		cr_assert_eq(text[BASE64_LEN(n) + 1], 0x5a);
		memset(back, 0xee, sizeof(back));
		cr_assert_eq(base64_decode(text, strlen(text), back, n), (int64_t)n);
		cr_assert_arr_eq(back, vectors[i].bytes, n);
		cr_assert_eq(back[n], 0xee);
		if (n > 0)
			cr_assert_eq(base64_decode(text, strlen(text), back, n - 1), -1, "more than fit");
		cr_assert_eq(back[n], 0xee);
	}
	for (size_t n = 0; n <= 256; n++) {
		for (size_t i = 0; i < n; i++)
			bytes[i] = (uint8_t)(i * 167 + n);
		base64_encode(bytes, n, text);
		cr_assert_eq(strlen(text), BASE64_LEN(n));
		memset(back, 0xee, sizeof(back));
		cr_assert_eq(base64_decode(text, BASE64_LEN(n), back, 256), (int64_t)n);
		cr_assert(memcmp(back, bytes, n) == 0 && back[n] == 0xee);
	}
}

Test(bytes, base64_refuses_what_encode_does_not_write)
{
	static const char *const bad[] = {"Z",	  "Zg",	  "Zg=",  "=Zg=", "Zh==",  "Zm9=", "Zm8=Zm8=",	      "Z===",
					  "====", "Zm8-", "Zm_v", "Zm8 ", "Zm\n=", "Zg=a", "\xc3\xa4\xc3\xa4"};
	uint8_t back[16];

	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		cr_assert_eq(base64_decode(bad[i], strlen(bad[i]), back, sizeof(back)), -1, "%s", bad[i]);
}

Test(bytes, uuid_is_written_as_people_know_it)
{
	static const uint8_t uuid[16] = {0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77,
					 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff};
	char text[UUID_TEXT_SIZE + 1];

	memset(text, 0x5e, sizeof(text));
	uuid_format(uuid, text);
	cr_assert_str_eq(text, "00112233-4455-6677-8899-aabbccddeeff");
	cr_assert_eq(text[UUID_TEXT_SIZE], 0x5e);
}
