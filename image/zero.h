/* Whether memory is all zeroes, at memory speed: it is if it starts with zeroes and equals itself moved by that many
 * bytes. Used to keep zeroes out of sparse files. */
#ifndef REPFS_IMAGE_ZERO_H
#define REPFS_IMAGE_ZERO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline bool zero_is(const void *mem, size_t n)
{
	static const uint8_t none[16];
	const uint8_t *p = mem;

	if (n <= sizeof(none))
		return memcmp(p, none, n) == 0;
	return memcmp(p, none, sizeof(none)) == 0 && memcmp(p, p + sizeof(none), n - sizeof(none)) == 0;
}

/* Length of the run at p, in bytes, of units of `unit` bytes (the last may be short) that are all zero or all not. */
static inline size_t zero_run(const uint8_t *p, size_t n, size_t unit, bool *ret_zero)
{
	size_t at = 0, step = n < unit ? n : unit;
	bool zero = zero_is(p, step);

	do {
		at += step;
		step = n - at < unit ? n - at : unit;
	} while (at < n && zero_is(p + at, step) == zero);
	*ret_zero = zero;
	return at;
}

#endif
