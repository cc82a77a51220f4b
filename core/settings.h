/* The settings of a group (repctl set/get), one X-macro: key, type, default, minimum, maximum, help. Pure.
 * Those marked shared are the group's: set on its primary they go to the peer too. */
#ifndef REPFS_CORE_SETTINGS_H
#define REPFS_CORE_SETTINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/bytes.h"
#include "core/err.h"

enum protocol { PROTOCOL_A, PROTOCOL_B, PROTOCOL_C, PROTOCOL_F };
enum on_disconnect { ON_DISCONNECT_CONTINUE, ON_DISCONNECT_FREEZE };
enum on_congestion { ON_CONGESTION_BLOCK, ON_CONGESTION_AHEAD };
enum on_io_error { ON_IO_ERROR_DETACH, ON_IO_ERROR_PASS };
enum on_cow_error { ON_COW_ERROR_STOP, ON_COW_ERROR_DROP_HISTORY, ON_COW_ERROR_BREAK };
enum failover_to { FAILOVER_TO_CHECKPOINT, FAILOVER_TO_LATEST };

/* X(field, key, kind, default, min, max, choices)
 *   kind: CHOICE (choices separated by '|', in enum order), BYTES (K M G T suffixes), MSEC (seconds with fraction, or
 *   with a suffix ms s m h; stored in ms), COUNT */
#define SETTINGS(X)                                                                                                    \
	X(protocol, "protocol", CHOICE, PROTOCOL_F, 0, 3, "A|B|C|F")                                                   \
	X(on_disconnect, "on_disconnect", CHOICE, ON_DISCONNECT_CONTINUE, 0, 1, "continue|freeze")                     \
	X(on_congestion, "on_congestion", CHOICE, ON_CONGESTION_BLOCK, 0, 1, "block|ahead")                            \
	X(on_io_error, "on_io_error", CHOICE, ON_IO_ERROR_DETACH, 0, 1, "detach|pass")                                 \
	X(on_cow_error, "on_cow_error", CHOICE, ON_COW_ERROR_STOP, 0, 2, "stop|drop-history|break")                    \
	X(failover_to, "failover_to", CHOICE, FAILOVER_TO_CHECKPOINT, 0, 1, "checkpoint|latest")                       \
	X(checkpoint_interval_ms, "checkpoint_interval", MSEC, 5000, 0, UINT64_C(86400000), "")                        \
	X(peer_timeout_ms, "peer_timeout", MSEC, 5000, 500, UINT64_C(600000), "")                                      \
	X(queue_max_bytes, "queue_max", BYTES, UINT64_C(256) << 20, UINT64_C(4) << 20, UINT64_C(16) << 30, "")         \
	X(resync_rate, "resync_rate", BYTES, 0, 0, UINT64_C(1) << 40, "")                                              \
	X(keep_last, "keep_last", COUNT, 10, 1, 2000, "")                                                              \
	X(keep_minutely, "keep_minutely", COUNT, 0, 0, 2000, "")                                                       \
	X(keep_hourly, "keep_hourly", COUNT, 0, 0, 2000, "")                                                           \
	X(keep_daily, "keep_daily", COUNT, 0, 0, 2000, "")                                                             \
	X(history_max_bytes, "history_max_bytes", BYTES, 0, 0, UINT64_C(1) << 60, "")

struct settings {
#define SETTINGS_FIELD(field, key, kind, def, min, max, choices) uint64_t field;
	SETTINGS(SETTINGS_FIELD)
#undef SETTINGS_FIELD
};

enum settings_id {
#define SETTINGS_ID(field, key, kind, def, min, max, choices) SETTING_##field,
	SETTINGS(SETTINGS_ID)
#undef SETTINGS_ID
	    SETTINGS_COUNT
};

void settings_default(struct settings *s);
/* One KEY=VALUE. -ERR_USAGE with what is allowed; *s untouched on failure. */
int settings_set(struct settings *s, const char *key, const char *value, struct err *e);
/* The values of `from` whose bit is set: bit 0 is the first of the table. */
void settings_take(struct settings *s, const struct settings *from, uint64_t which);
#define SETTINGS_ALL ((UINT64_C(1) << SETTINGS_COUNT) - 1)
/* i < SETTINGS_COUNT: the key, and the value as a person writes it, into buf. */
const char *settings_key(unsigned i);
void settings_format(const struct settings *s, unsigned i, char *buf, size_t size);
/* Keyed encoding (u16 count, then key string and u64 value each): unknown keys are skipped, missing ones keep their
 * default, values out of bounds and a key given twice fail the reader (*s is then untouched). */
void settings_encode(const struct settings *s, struct wbuf *w);
void settings_decode(struct settings *s, struct rbuf *r);
#define SETTINGS_KEY_SIZE 64		       /* a key in the encoding, with a terminator */
#define SETTINGS_KEYS_MAX 128U		       /* keys in one encoding, known or not */
bool settings_valid(const struct settings *s); /* every value within its bounds */

/* "20G", "512", "1.5T" (powers of 1024; an optional trailing B or iB) to bytes. -ERR_USAGE. */
int parse_size(const char *text, uint64_t *ret, struct err *e);

#endif
