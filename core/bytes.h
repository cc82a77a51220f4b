/* Little-endian access and bounded readers/writers for the formats in docs/format.md and docs/protocol.md. */
#ifndef REPFS_CORE_BYTES_H
#define REPFS_CORE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline void put_u16(void *p, uint16_t v)
{
	uint8_t *b = p;
	b[0] = (uint8_t)v;
	b[1] = (uint8_t)(v >> 8);
}
static inline void put_u32(void *p, uint32_t v)
{
	uint8_t *b = p;
	put_u16(b, (uint16_t)v);
	put_u16(b + 2, (uint16_t)(v >> 16));
}
static inline void put_u64(void *p, uint64_t v)
{
	uint8_t *b = p;
	put_u32(b, (uint32_t)v);
	put_u32(b + 4, (uint32_t)(v >> 32));
}
static inline uint16_t get_u16(const void *p)
{
	const uint8_t *b = p;
	return (uint16_t)(b[0] | b[1] << 8);
}
static inline uint32_t get_u32(const void *p)
{
	const uint8_t *b = p;
	return (uint32_t)get_u16(b) | (uint32_t)get_u16(b + 2) << 16;
}
static inline uint64_t get_u64(const void *p)
{
	const uint8_t *b = p;
	return (uint64_t)get_u32(b) | (uint64_t)get_u32(b + 4) << 32;
}

/* Appends to a fixed buffer; `failed` sticks when it would overflow, and nothing past the end is written. */
struct wbuf {
	uint8_t *data;
	size_t size, len;
	bool failed;
};
/* Reads from a fixed buffer; `failed` sticks when it would run past the end, and reads then give zeroes. */
struct rbuf {
	const uint8_t *data;
	size_t size, pos;
	bool failed;
};

void wbuf_raw(struct wbuf *w, const void *p, size_t n);
void wbuf_u8(struct wbuf *w, uint8_t v);
void wbuf_u16(struct wbuf *w, uint16_t v);
void wbuf_u32(struct wbuf *w, uint32_t v);
void wbuf_u64(struct wbuf *w, uint64_t v);
/* u16 length, then the bytes without a terminator. */
void wbuf_str(struct wbuf *w, const char *s);

void rbuf_raw(struct rbuf *r, void *p, size_t n);
uint8_t rbuf_u8(struct rbuf *r);
uint16_t rbuf_u16(struct rbuf *r);
uint32_t rbuf_u32(struct rbuf *r);
uint64_t rbuf_u64(struct rbuf *r);
/* Into dst[size], always terminated; fails if it does not fit or holds a NUL. */
void rbuf_str(struct rbuf *r, char *dst, size_t size);

/* Base64 (RFC 4648, padded), as the control socket carries bytes. */
#define BASE64_LEN(n) (((size_t)(n) + 2) / 3 * 4)
void base64_encode(const void *p, size_t n, char *out); /* BASE64_LEN(n) characters and the terminator */
/* At most size bytes into out, which is untouched behind them. How many, or -1: not base64 as encode writes it, or
 * more than fit. */
int64_t base64_decode(const char *text, size_t len, void *out, size_t size);

/* CRC-32C (Castagnoli) of n bytes, continued from crc (0 to begin). ISA-L's crc32_iscsi. */
uint32_t crc32c(uint32_t crc, const void *p, size_t n);

#define UUID_TEXT_SIZE 37
/* 8-4-4-4-12 digits, as uuidgen prints one, and the terminator. */
void uuid_format(const uint8_t uuid[static 16], char text[static UUID_TEXT_SIZE]);

#endif
