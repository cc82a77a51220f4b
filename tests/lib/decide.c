/* core/lineage's decision for other programs: from the payloads of two JOINs, as they go over the wire. Loaded by
 * tests/e2e/test_57_hub.py, which compares it with an implementation written from docs/protocol.md. */
#include "core/lineage.h"

/* The decision, and its source (0 the dialer, 1 the listener) times 256; or -ERR_x: a JOIN does not decode. */
int decide(const void *dialer, size_t dialer_len, const void *listener, size_t listener_len);

int decide(const void *dialer, size_t dialer_len, const void *listener, size_t listener_len)
{
	static struct wire_join a, b;
	int source = 0;
	int rc = wire_join_decode(&a, dialer, dialer_len, NULL);
	if (rc == 0)
		rc = wire_join_decode(&b, listener, listener_len, NULL);
	if (rc < 0)
		return rc;
	int d = (int)lineage_decide(&a, &b, &source);
	return d | source << 8;
}
