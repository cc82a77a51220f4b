/* What the tests over two daemons share: the pair, the group `vm` in it, and the words that their set-up is made of.
 * Criterion runs each test in a process of its own. */
#ifndef REPFS_TESTS_UNIT_FS_PAIRTEST_H
#define REPFS_TESTS_UNIT_FS_PAIRTEST_H

#include <criterion/criterion.h>
#include <poll.h>

#include "core/os/clock.h"
#include "tests/lib/pair.h"

static struct pair p;

#define OK(call)                                                                                                       \
	do {                                                                                                           \
		int ok_ = (call);                                                                                      \
		cr_assert_eq(ok_, 0, "%s: %d (%s / %s)", #call, ok_, p.a.err.text, p.b.err.text);                      \
	} while (0)

/* A verb's arguments: the group, and a limit that only a test that fails reaches. */
static inline json_t *named(void)
{
	return json_pack("{s:s, s:i}", "name", "vm", "timeout_ms", 60000);
}

static inline void set(const char *key, const char *value)
{
	OK(pair_do(&p.a, "set", json_pack("{s:s, s:{s:s}}", "name", "vm", "settings", key, value), NULL));
}

/* a's group `vm` is in sync with b, and b's view stands; no checkpoint is taken but on command. */
static inline void protect(void)
{
	set("checkpoint_interval", "0");
	OK(pair_protect(&p, "vm"));
	OK(pair_wait_state(&p.b, "vm", "RUNNING"));
	OK(pair_wait_link(&p.b, "vm", "SYNCED"));
}

static inline int flush(struct pair_host *h)
{
	struct gvol *v = gvol_find(h->d, "vm");
	int err = v ? gvol_flush(v, NULL) : -ERR_NOENT;
	gvol_unref(v);
	return err;
}

static inline void in_sync(void)
{
	json_t *args = named();
	json_object_set_new(args, "for", json_string("in-sync"));
	OK(pair_do(&p.a, "wait", args, NULL));
}

#define WAIT_FOR(condition)                                                                                            \
	do {                                                                                                           \
		uint64_t end_ = clock_mono_ns() + 20 * NS_PER_SEC;                                                     \
		while (!(condition)) {                                                                                 \
			cr_assert_lt(clock_mono_ns(), end_, "waited in vain for %s", #condition);                      \
			(void)poll(NULL, 0, 5);                                                                        \
		}                                                                                                      \
	} while (0)

/* The clear cycle has been: nothing is dirty any more. */
static inline void wait_clean(void)
{
	WAIT_FOR(pair_status_int(&p.a, "vm", "dirty_bytes") == 0);
}

static inline void teardown(void)
{
	pair_close(&p);
}

#endif
