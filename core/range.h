/* Byte ranges of a volume. off + len never overflows: callers validate against the volume's size first. */
#ifndef REPFS_CORE_RANGE_H
#define REPFS_CORE_RANGE_H

#include <stdbool.h>
#include <stdint.h>

/* The unit of copy-on-write, overlays and range claims, in bytes. */
#define BLOCK_SHIFT 12U
#define BLOCK_SIZE (1U << BLOCK_SHIFT)
/* The unit of dirty tracking after a lost link, in bytes. */
#define REGION_SHIFT 16U
#define REGION_SIZE (1U << REGION_SHIFT)
/* The unit of the durable write-intent map, in bytes. */
#define INTENT_SHIFT 20U
#define INTENT_SIZE (1U << INTENT_SHIFT)
#define SECTOR_SIZE 512U
/* Largest volume, in bytes: 64 TiB. */
#define VOLUME_SIZE_MAX (UINT64_C(64) << 40)

struct range {
	uint64_t off; /* bytes */
	uint64_t len; /* bytes */
};

static inline uint64_t range_end(struct range r)
{
	return r.off + r.len;
}

static inline bool range_overlaps(struct range a, struct range b)
{
	return a.off < range_end(b) && b.off < range_end(a);
}

static inline uint64_t round_down_u64(uint64_t v, uint64_t pow2)
{
	return v & ~(pow2 - 1);
}

static inline uint64_t round_up_u64(uint64_t v, uint64_t pow2)
{
	return (v + pow2 - 1) & ~(pow2 - 1);
}

/* The smallest range of whole units of `pow2` bytes that covers r. */
static inline struct range range_align_out(struct range r, uint64_t pow2)
{
	uint64_t start = round_down_u64(r.off, pow2);
	return (struct range){start, round_up_u64(range_end(r), pow2) - start};
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* Number of units of 1 << shift bytes that cover `bytes`. */
static inline uint64_t units_of(uint64_t bytes, unsigned shift)
{
	return (bytes + (UINT64_C(1) << shift) - 1) >> shift;
}

#endif
