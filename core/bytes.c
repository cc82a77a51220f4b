/* The bounded writer and reader of core/bytes.h. Both keep len (pos) <= size at all times, and compare lengths by
 * what is left, so that no sum can overflow whatever a peer's length field says. */
#include "core/bytes.h"

#include <isa-l/crc.h>

#include "core/check.h"

/* crc32_iscsi takes its length as an int. */
#define CRC_CHUNK_MAX ((size_t)1 << 30)

static uint8_t *wbuf_reserve(struct wbuf *w, size_t n)
{
	PRE(w->len <= w->size);
	if (w->failed || n > w->size - w->len) {
		w->failed = true;
		return NULL;
	}
	uint8_t *p = w->data + w->len;

	w->len += n;
	return p;
}

void wbuf_raw(struct wbuf *w, const void *p, size_t n)
{
	uint8_t *to = wbuf_reserve(w, n);

	if (to != NULL && n > 0)
		memcpy(to, p, n);
}

void wbuf_u8(struct wbuf *w, uint8_t v)
{
	wbuf_raw(w, &v, 1);
}

void wbuf_u16(struct wbuf *w, uint16_t v)
{
	uint8_t *to = wbuf_reserve(w, 2);

	if (to != NULL)
		put_u16(to, v);
}

void wbuf_u32(struct wbuf *w, uint32_t v)
{
	uint8_t *to = wbuf_reserve(w, 4);

	if (to != NULL)
		put_u32(to, v);
}

void wbuf_u64(struct wbuf *w, uint64_t v)
{
	uint8_t *to = wbuf_reserve(w, 8);

	if (to != NULL)
		put_u64(to, v);
}

void wbuf_str(struct wbuf *w, const char *s)
{
	size_t n = strlen(s);

	if (n > UINT16_MAX) {
		w->failed = true;
		return;
	}
	/* Both or neither: a length without its bytes would be a torn string to whoever ignores `failed`. */
	uint8_t *to = wbuf_reserve(w, 2 + n);

	if (to != NULL) {
		put_u16(to, (uint16_t)n);
		memcpy(to + 2, s, n);
	}
}

static const uint8_t *rbuf_take(struct rbuf *r, size_t n)
{
	PRE(r->pos <= r->size);
	if (r->failed || n > r->size - r->pos) {
		r->failed = true;
		return NULL;
	}
	const uint8_t *p = r->data + r->pos;

	r->pos += n;
	return p;
}

void rbuf_raw(struct rbuf *r, void *p, size_t n)
{
	const uint8_t *from = rbuf_take(r, n);

	if (n == 0)
		return;
	if (from != NULL)
		memcpy(p, from, n);
	else
		memset(p, 0, n);
}

uint8_t rbuf_u8(struct rbuf *r)
{
	const uint8_t *from = rbuf_take(r, 1);

	return from != NULL ? from[0] : 0;
}

uint16_t rbuf_u16(struct rbuf *r)
{
	const uint8_t *from = rbuf_take(r, 2);

	return from != NULL ? get_u16(from) : 0;
}

uint32_t rbuf_u32(struct rbuf *r)
{
	const uint8_t *from = rbuf_take(r, 4);

	return from != NULL ? get_u32(from) : 0;
}

uint64_t rbuf_u64(struct rbuf *r)
{
	const uint8_t *from = rbuf_take(r, 8);

	return from != NULL ? get_u64(from) : 0;
}

void rbuf_str(struct rbuf *r, char *dst, size_t size)
{
	PRE(size > 0);
	size_t n = rbuf_u16(r);

	if (n >= size)
		r->failed = true;
	const uint8_t *from = rbuf_take(r, n);

	for (size_t i = 0; from != NULL && i < n; i++)
		if (from[i] == 0)
			r->failed = true;
	if (r->failed) {
		dst[0] = '\0';
		return;
	}
	if (n > 0)
		memcpy(dst, from, n);
	dst[n] = '\0';
}

uint32_t crc32c(uint32_t crc, const void *p, size_t n)
{
	/* Not const in ISA-L's prototype, but only read. */
	unsigned char *data = (unsigned char *)(uintptr_t)p;

	while (n > 0) {
		size_t chunk = n < CRC_CHUNK_MAX ? n : CRC_CHUNK_MAX;

		/* ISA-L's takes and gives the raw register; the check value is its complement. */
		crc = ~crc32_iscsi(data, (int)chunk, ~crc);
		data += chunk;
		n -= chunk;
	}
	return crc;
}

/* ---- base64 ---- */

static const char base64_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

void base64_encode(const void *p, size_t n, char *out)
{
	const uint8_t *b = p;

	for (size_t i = 0; i < n; i += 3) {
		size_t left = n - i;
		uint32_t v =
		    (uint32_t)b[i] << 16 | (left > 1 ? (uint32_t)b[i + 1] << 8 : 0) | (left > 2 ? b[i + 2] : 0);
		*out++ = base64_digits[v >> 18];
		*out++ = base64_digits[v >> 12 & 63];
		*out++ = left > 1 ? base64_digits[v >> 6 & 63] : '=';
		*out++ = left > 2 ? base64_digits[v & 63] : '=';
	}
	*out = '\0';
}

/* -1: not a digit. */
static int base64_value(char c)
{
	if (c >= 'A' && c <= 'Z')
		return c - 'A';
	if (c >= 'a' && c <= 'z')
		return c - 'a' + 26;
	if (c >= '0' && c <= '9')
		return c - '0' + 52;
	return c == '+' ? 62 : c == '/' ? 63 : -1;
}

int64_t base64_decode(const char *text, size_t len, void *out, size_t size)
{
	uint8_t *b = out;
	size_t n = 0;

	if (len % 4 != 0)
		return -1;
	for (size_t i = 0; i < len; i += 4) {
		bool last = i + 4 == len;
		unsigned pad = !last || text[i + 3] != '=' ? 0 : text[i + 2] == '=' ? 2 : 1;
		uint32_t v = 0;
		for (unsigned k = 0; k < 4; k++) {
			int digit = k < 4 - pad ? base64_value(text[i + k]) : 0;
			if (digit < 0)
				return -1;
			v = v << 6 | (uint32_t)digit;
		}
		/* One text for each content: the bits that stand for nothing are 0. */
		if ((v & ((1U << 8 * pad) - 1)) != 0 || size - n < 3 - pad)
			return -1;
		for (unsigned k = 0; k < 3 - pad; k++)
			b[n++] = (uint8_t)(v >> (16 - 8 * k));
	}
	return (int64_t)n;
}

void uuid_format(const uint8_t uuid[static 16], char text[static UUID_TEXT_SIZE])
{
	static const char digits[] = "0123456789abcdef";
	char *p = text;

	for (unsigned i = 0; i < 16; i++) {
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*p++ = '-';
		*p++ = digits[uuid[i] >> 4];
		*p++ = digits[uuid[i] & 15];
	}
	*p = '\0';
}
