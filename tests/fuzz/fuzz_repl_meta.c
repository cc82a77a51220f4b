/* Fuzzes the decoder of the group record: what it accepts is valid, encodes again, and decodes to the same.
 *   clang-14 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/repl_meta.h"

#define MUST(cond)                                                                                                     \
	do {                                                                                                           \
		if (!(cond))                                                                                           \
			abort();                                                                                       \
	} while (0)

static struct repl_meta first, second;
static uint8_t encoded[REPL_META_ENCODED_MAX];

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct err e = {0};

	memset(&first, 0x5a, 64);
	if (repl_meta_decode(&first, data, len, REPL_META_VERSION, &e) < 0) {
		MUST(e.code == ERR_CORRUPT && strncmp(e.text, "group record", 12) == 0);
		return 0;
	}
	MUST(repl_meta_validate(&first, NULL) == 0);
	MUST(first.n_volumes <= GROUP_VOLUMES_MAX && first.n_ckpts <= GROUP_CKPTS_MAX);
	for (uint32_t i = 0; i < first.n_ckpts; i++)
		MUST(repl_meta_find_ckpt(&first, first.ckpts[i].number) == (int)i);
	for (uint32_t i = 0; i < first.n_volumes; i++)
		MUST(repl_meta_find_volume(&first, first.volumes[i].name) == (int)i);
	int n = repl_meta_encode(&first, encoded, sizeof(encoded));
	MUST(n > 0);
	MUST(repl_meta_decode(&second, encoded, (size_t)n, REPL_META_VERSION, NULL) == 0);
	MUST(memcmp(&first, &second, sizeof(first)) == 0);
	return 0;
}
