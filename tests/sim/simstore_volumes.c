/* Volumes made, imported and deleted on the simulated storage, cut off at every call: by a kill or by the power, which
 * may also go once the next start has settled what it found in the cache; and with every call that fails in turn. The
 * store starts afterwards with all that it had; what was in the making is there whole or not at all, what was answered
 * is as answered, and nothing is left lying about.
 *
 * simstore_volumes [SEEDS]: how many for each call */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/err.h"
#include "core/range.h"
#include "fs/repl_exec.h"
#include "image/intent.h"
#include "image/store.h"
#include "tests/sim/simstore.h"

#define SIZE (UINT64_C(64) << 10)
#define SEEDS 3U

enum op { OP_CREATE, OP_JOIN, OP_IMPORT, OP_OVER, OP_MAKE, OP_DELETE, OP_DELETE_ONE, OP_DELETE_OVER, OPS };

static const char *const op_names[OPS] = {
    "create a volume",		"create one in a group",    "import one",
    "create one over an image", "make a peer's group",	    "delete a volume",
    "delete one of a group",	"delete one over an image",
};
/* The volume that it is about; of OP_MAKE the first of two. */
static const char *const op_volume[OPS] = {"new", "new", "new", "new", "new", "alone", "two", "over"};

struct run {
	enum op op;
	bool power;
	uint64_t n; /* the call */
	uint64_t seed;
	const char *what;
	struct simstore *ss;
	struct store *st;
	int answer; /* 1: none */
	char imported[32], image[32];
};

static void fail(const struct run *r, const char *fmt, ...)
{
	va_list ap;

	printf("%s (%s), %s %" PRIu64 ", seed %" PRIu64 " [%s]: ", op_names[r->op], r->power ? "power" : "process",
	       r->what, r->n, r->seed, simstore_fault_text(r->ss));
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	exit(1);
}

static uint64_t random_below(struct run *r, uint64_t below)
{
	r->seed ^= r->seed << 13;
	r->seed ^= r->seed >> 7;
	r->seed ^= r->seed << 17;
	return r->seed % below;
}

static void pattern(const char *volume, uint8_t buf[BLOCK_SIZE])
{
	memset(buf, volume[0] ^ volume[strlen(volume) - 1], BLOCK_SIZE);
}

/* ---- a start, as the daemon makes it ---- */

struct look {
	struct run *r;
	bool there; /* the volume of the operation */
	int error;
	struct err e;
};

static int open_one(struct look *l, const struct repl_meta *m, uint32_t i)
{
	const char *name = m->volumes[i].name;
	struct volume *v = NULL;
	struct intent *t = NULL;
	uint8_t want[BLOCK_SIZE] = {0}, got[BLOCK_SIZE];
	int rc = store_open_volume(l->r->st, m, i, &v, &l->e);
	bool mine = strcmp(name, op_volume[l->r->op]) == 0;

	if (rc == 0)
		rc = intent_open(store_storage(l->r->st), name, m->volumes[i].size, l->r->power ? INTENT_DURABLE : 0,
				 &t, &l->e);
	if (rc == 0)
		rc = intent_begin(t, &l->e);
	if (rc == 0)
		rc = volume_read_disk(v, 0, sizeof(got), got);
	if (name[0] != 'n') /* new, new2, next */
		pattern(name, want);
	else if (mine && l->r->op == OP_IMPORT)
		pattern("import", want);
	if (rc == 0 && memcmp(got, want, sizeof(got)) != 0)
		fail(l->r, "volume %s does not hold what it held", name);
	intent_close(t);
	volume_close(v);
	l->there = l->there || mine;
	return rc;
}

static int open_group(void *arg, const char *group)
{
	struct look *l = arg;
	struct repl_meta *m = NULL;
	int rc = store_load_group(l->r->st, group, &m, &l->e);

	for (uint32_t i = 0; rc == 0 && i < m->n_volumes; i++)
		rc = open_one(l, m, i);
	free(m);
	return rc;
}

/* All groups and volumes as they are; an error is one of a stopped machine. */
static int open_all(struct run *r, struct look *l)
{
	*l = (struct look){.r = r};
	l->error = store_list_groups(r->st, open_group, l);
	if (l->error < 0 && !simstore_stopped(r->ss))
		fail(r, "the start is refused: %s", l->e.text);
	return l->error;
}

static int start(struct run *r, struct look *l)
{
	struct err e = {0};
	int rc =
	    store_open_on(simstore_storage(r->ss), "sim", r->power ? DURABILITY_POWER : DURABILITY_PROCESS, &r->st, &e);

	if (rc < 0 && !simstore_stopped(r->ss))
		fail(r, "the store is refused: %s", e.text);
	return rc < 0 ? rc : open_all(r, l);
}

static void end(struct run *r)
{
	store_close(r->st);
	r->st = NULL;
}

static int print_it(void *arg, const char *name)
{
	printf("%s/%s is left\n", (const char *)arg, name);
	return 1;
}

static void check_none(struct run *r, const char *folder)
{
	int rc = storage_list(simstore_storage(r->ss), folder, print_it, (void *)(uintptr_t)folder);

	if (rc == 1)
		fail(r, "something is left");
}

static int check_folder(void *arg, const char *name)
{
	struct run *r = arg;
	struct repl_meta *m = NULL;
	uint32_t i;
	struct err e;

	if (store_find_volume(r->st, name, &m, &i, &e) < 0)
		fail(r, "volumes/%s is left", name);
	free(m);
	return 0;
}

/* What a start that was not cut off leaves. */
static void check(struct run *r, const struct look *l)
{
	static const char *const kept[] = {"alone", "one", "two", "over", "other"};
	bool made = r->op < OP_DELETE;

	simstore_look(r->ss, true);
	for (size_t i = 0; i < sizeof(kept) / sizeof(kept[0]); i++) {
		struct repl_meta *m = NULL;
		uint32_t k;
		struct err e;

		if (strcmp(kept[i], op_volume[r->op]) != 0 && store_find_volume(r->st, kept[i], &m, &k, &e) < 0)
			fail(r, "volume %s is gone: %s", kept[i], e.text);
		free(m);
	}
	if (r->answer == 0 && l->there != made)
		fail(r, "it was answered, and the volume is %s", l->there ? "there" : "not there");
	check_none(r, "orphans");
	check_none(r, "pending");
	(void)storage_list(simstore_storage(r->ss), "volumes", check_folder, r);
	simstore_look(r->ss, false);
}

/* ---- the operations ---- */

static int do_op(struct run *r)
{
	const struct store_import_args args = {.volume = "new", .file = r->imported};
	const struct store_base_args over = {.volume = "new", .file = r->image};
	static struct wire_join j;
	struct repl_meta *m;
	const char *format;
	uint64_t size = 0;
	struct err e;
	int rc;

	switch (r->op) {
	case OP_CREATE:
		return store_create_volume(r->st, "new", SIZE, NULL, &e);
	case OP_JOIN:
		return store_create_volume(r->st, "new", SIZE, "g", &e);
	case OP_IMPORT:
		return store_import(r->st, &args, NULL, NULL, NULL, &e);
	case OP_OVER:
		return store_create_over(r->st, &over, 0, &size, &format, &e);
	case OP_MAKE:
		memset(&j, 0, sizeof(j));
		(void)snprintf(j.group, sizeof(j.group), "peer");
		settings_default(&j.settings);
		j.n_volumes = 2;
		for (uint32_t i = 0; i < 2; i++) {
			(void)snprintf(j.volumes[i].name, NAME_SIZE, "new%s", i ? "2" : "");
			j.volumes[i].id = i + 1;
			j.volumes[i].size = SIZE;
		}
		m = malloc(sizeof(*m));
		rc = repl_exec_make(r->st, &j, m, &e);
		free(m);
		return rc;
	case OP_DELETE:
	case OP_DELETE_ONE:
	case OP_DELETE_OVER:
		return store_delete_volume(r->st, op_volume[r->op], &e);
	case OPS:
		break;
	}
	abort();
}

static void write_pattern(struct run *r, const char *name)
{
	struct err e = {0};
	struct repl_meta *m = NULL;
	struct volume *v = NULL;
	uint8_t buf[BLOCK_SIZE];
	struct volume_req q = {.kind = VOLUME_WRITE, .len = sizeof(buf), .buf = buf};
	uint32_t i;

	pattern(name, buf);
	if (store_find_volume(r->st, name, &m, &i, &e) < 0 || store_open_volume(r->st, m, i, &v, &e) < 0 ||
	    volume_write(v, &q, 1) < 0 || volume_sync(v) < 0)
		fail(r, "setting up: %s", e.text);
	volume_close(v);
	free(m);
}

static void make_volume(struct run *r, const char *name, const char *group)
{
	struct err e = {0};

	if (store_create_volume(r->st, name, SIZE, group, &e) < 0)
		fail(r, "setting up: %s", e.text);
	write_pattern(r, name);
}

/* Group g has checkpoints, which volumes that join it take part in. */
static void take_checkpoints(struct run *r)
{
	struct repl_meta *m = NULL;
	struct volume *v = NULL;
	struct err e = {0};

	if (store_load_group(r->st, "g", &m, &e) < 0 || store_open_volume(r->st, m, 0, &v, &e) < 0)
		fail(r, "setting up: %s", e.text);
	m->active_id = 2;
	for (uint64_t n = 3; n <= 7; n += 4) {
		if (volume_prepare(v, n, 2, &e) < 0)
			fail(r, "setting up: %s", e.text);
		volume_switch(v, n, 2);
		m->ckpts[m->n_ckpts++] =
		    (struct repl_ckpt){.number = n, .generation = 1, .time_ns = 1, .kind = CKPT_LOCAL};
		m->ckpt_max = n;
	}
	volume_close(v);
	if (store_save_group(r->st, m, &e) < 0)
		fail(r, "setting up: %s", e.text);
	free(m);
}

static void begin(struct run *r)
{
	struct look l;
	struct err e;

	r->ss = simstore_new(r->seed);
	r->answer = 1;
	if (start(r, &l) < 0)
		abort();
	make_volume(r, "alone", NULL);
	make_volume(r, "one", "g");
	take_checkpoints(r);
	make_volume(r, "two", "g");
	const struct store_base_args over = {.volume = "over", .file = r->image};
	const char *format;
	uint64_t size = 0;
	if (store_create_over(r->st, &over, 0, &size, &format, &e) < 0)
		fail(r, "setting up: %s", e.text);
	write_pattern(r, "over");
	make_volume(r, "other", NULL);
	/* A record whose second copy can't be written any more since a volume of it was deleted: that one names it
	 * still. */
	make_volume(r, "gone", "alone");
	bool bad = random_below(r, 2) == 0;
	int rc = -ERR_IO;
	for (int i = 0; bad && i < 2 && rc < 0; i++) { /* the one that is written first fails the save */
		const struct simstore_rule rule = {.calls = SIMSTORE_BIT(SIMSTORE_WRITE),
						   .path = i ? "groups/alone.a" : "groups/alone.b",
						   .error = ERR_IO,
						   .nth = 1};
		simstore_rules_clear(r->ss);
		simstore_rule_add(r->ss, &rule);
		rc = store_delete_volume(r->st, "gone", &e);
	}
	if (!bad)
		rc = store_delete_volume(r->st, "gone", &e);
	if (rc < 0)
		fail(r, "setting up: %s", e.text);
	/* What the set-up left unsynced is no matter in half of them. */
	if (!bad && random_below(r, 2)) {
		end(r);
		simstore_stop(r->ss);
		simstore_power_cut(r->ss, SIMSTORE_KEEP_ALL);
		if (start(r, &l) < 0)
			abort();
	}
}

/* ---- crashes ---- */

static void come_back(struct run *r, bool cut)
{
	static const enum simstore_keep keeps[] = {SIMSTORE_KEEP_NONE, SIMSTORE_KEEP_RANDOM, SIMSTORE_KEEP_RANDOM,
						   SIMSTORE_KEEP_ALL};

	end(r);
	if (!simstore_stopped(r->ss))
		simstore_stop(r->ss);
	if (cut && r->power)
		simstore_power_cut(r->ss, keeps[random_below(r, 4)]);
	else
		simstore_restart(r->ss);
	simstore_stop_at(r->ss, 0, SIMSTORE_NOT_DONE);
}

/* Starts, some of them cut off, until one is whole and stays so through a power cut. */
static void settle(struct run *r)
{
	struct look l;

	come_back(r, random_below(r, 3) == 0);
	while (random_below(r, 3) == 0) {
		simstore_stop_at(r->ss, 1 + random_below(r, 40), (enum simstore_stop)random_below(r, 3));
		(void)start(r, &l);
		come_back(r, random_below(r, 2) == 0);
	}
	for (int i = 0; i < 2; i++) {
		if (start(r, &l) < 0)
			fail(r, "the start stopped");
		check(r, &l);
		/* What is not there can be made again. */
		if (r->answer != 0 && !l.there && r->op < OP_DELETE && r->op != OP_MAKE && random_below(r, 2)) {
			r->answer = do_op(r);
			if (r->answer < 0)
				fail(r, "it can't be made again: %s", err_short(r->answer));
		}
		come_back(r, true);
	}
	if (start(r, &l) < 0)
		fail(r, "the start stopped");
	check(r, &l);
	end(r);
}

/* A record that is lost must not cost the disk: it is in orphans/ then, for good. */
static void lose_record(struct run *r)
{
	uint8_t want[BLOCK_SIZE], got[BLOCK_SIZE] = {0};
	struct err e = {0};

	pattern("import", want);
	come_back(r, true);
	simstore_look(r->ss, true);
	(void)storage_unlink(simstore_storage(r->ss), "groups/new.a");
	(void)storage_unlink(simstore_storage(r->ss), "groups/new.b");
	simstore_look(r->ss, false);
	for (int i = 0; i < 2; i++) {
		struct look l;

		if (start(r, &l) < 0 ||
		    (i == 0 && random_below(r, 2) && store_create_volume(r->st, "next", SIZE, NULL, &e) < 0))
			fail(r, "after the loss of its record: %s", e.text);
		come_back(r, true);
	}
	if (simstore_peek(r->ss, "orphans/new/disk.raw", true, 0, got, sizeof(got)) < 0 ||
	    memcmp(got, want, sizeof(got)) != 0)
		fail(r, "the disk went with its record");
}

static bool crash_at(struct run *r)
{
	uint64_t seed = r->seed;

	begin(r);
	simstore_stop_at(r->ss, r->n, (enum simstore_stop)(random_below(r, 3)));
	r->answer = do_op(r);
	bool stopped = simstore_stopped(r->ss);
	simstore_rules_clear(r->ss);
	if (stopped)
		r->answer = 1;
	else if (r->answer < 0)
		fail(r, "without a fault it fails: %s", err_short(r->answer));
	if (!stopped && r->op == OP_IMPORT && r->power && random_below(r, 2))
		lose_record(r);
	else
		settle(r);
	simstore_free(r->ss);
	r->seed = seed;
	return stopped;
}

static bool fail_at(struct run *r, unsigned calls, bool once)
{
	const struct simstore_rule rule = {.calls = calls, .error = ERR_IO, .nth = r->n, .times = once ? 1 : 0};
	uint64_t seed = r->seed;
	struct look l;

	begin(r);
	unsigned k = simstore_rule_add(r->ss, &rule);
	int rc = do_op(r);
	bool hit = simstore_rule_hits(r->ss, k) > 0;
	simstore_rules_clear(r->ss);
	r->answer = rc == 0 ? 0 : 1;
	/* The daemon goes on with what the records say. */
	(void)open_all(r, &l);
	if (rc < 0 && random_below(r, 2)) {
		bool named = l.there;
		int again = do_op(r);
		/* But for what stands by now: it is as after a start. */
		if (again < 0 && !named && r->op < OP_DELETE)
			fail(r, "it can't be done again: %s", err_short(again));
		(void)open_all(r, &l);
	}
	settle(r);
	simstore_free(r->ss);
	r->seed = seed;
	return hit;
}

/* A store of `process` becomes one of `power`, with a sync that fails at first: what that has taken is not there to be
 * found by the next try, and by a start behind a power cut it is. */
static bool set_power(struct run *r)
{
	const struct simstore_rule rule = {
	    .calls = SIMSTORE_BIT(SIMSTORE_SYNC), .error = ERR_IO, .nth = r->n, .times = 1};
	uint64_t seed = r->seed;
	struct err e = {0};
	struct look l;

	begin(r);
	simstore_rules_clear(r->ss);
	unsigned k = simstore_rule_add(r->ss, &rule);
	int rc = store_set_durability(r->st, DURABILITY_POWER, &e);
	bool hit = simstore_rule_hits(r->ss, k) > 0;
	if (rc < 0 && !hit)
		fail(r, "durability is not set: %s", e.text);
	if (rc < 0 && store_set_durability(r->st, DURABILITY_POWER, &e) < 0)
		fail(r, "durability can't be set: %s", e.text);
	simstore_rules_clear(r->ss);
	r->power = true;
	end(r);
	simstore_stop(r->ss);
	simstore_power_cut(r->ss, SIMSTORE_KEEP_NONE);
	for (int i = 0; i < 2; i++) {
		if (start(r, &l) < 0)
			fail(r, "the start stopped");
		check(r, &l);
		come_back(r, true);
	}
	simstore_free(r->ss);
	r->seed = seed;
	r->power = false;
	return hit;
}

/* An image of qcow2 with SIZE bytes of nothing: its header; the first level's table, of one entry, and the rest are
 * zeroes.
 */
static const uint8_t qcow2[] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16,
				0,   0,	  0,   0,    0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0,
				0,   0,	  0,   0,    0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};

/* A file outside the store. */
static bool outside(char *path, const uint8_t *data, size_t len, off_t size)
{
	int fd = mkstemp(path);
	bool ok = fd >= 0 && write(fd, data, len) == (ssize_t)len && (size == 0 || ftruncate(fd, size) == 0);

	if (fd >= 0)
		(void)close(fd);
	return ok;
}

int main(int argc, char **argv)
{
	uint64_t seeds = argc > 1 ? strtoull(argv[1], NULL, 10) : SEEDS;
	struct run r = {0};
	uint8_t buf[SIZE] = {0};

	pattern("import", buf);
	(void)snprintf(r.imported, sizeof(r.imported), "/tmp/simstoreXXXXXX");
	(void)snprintf(r.image, sizeof(r.image), "/tmp/simimageXXXXXX");
	if (!outside(r.imported, buf, sizeof(buf), 0) || !outside(r.image, qcow2, sizeof(qcow2), 3U << 16))
		return 1;
	r.op = OP_CREATE;
	r.what = "durability set, a failure of sync";
	bool failing = true;
	for (r.n = 1; failing; r.n++) {
		failing = false;
		for (uint64_t s = 1; s <= seeds; s++) {
			r.seed = s * UINT64_C(0x9e3779b97f4a7c15) + r.n;
			failing = set_power(&r) || failing;
		}
	}
	printf("set durability: %" PRIu64 " syncs\n", r.n - 2);
	for (int power = 0; power < 2; power++)
		for (r.op = 0; r.op < OPS; r.op++) {
			r.power = power;
			bool more = true;
			for (r.n = 1; more; r.n++)
				for (uint64_t s = 1; s <= seeds; s++) {
					r.seed = s * UINT64_C(0x9e3779b97f4a7c15) + r.n;
					r.what = "cut off at call";
					more = crash_at(&r);
					r.what = "a failure of call";
					more = fail_at(&r, SIMSTORE_CHANGES, true) || more;
					r.what = "failures from call";
					more = fail_at(&r, SIMSTORE_CHANGES, false) || more;
					r.what = "failures from sync of a folder";
					more = fail_at(&r, SIMSTORE_BIT(SIMSTORE_SYNC_DIR), false) || more;
				}
			printf("%s (%s): %" PRIu64 " calls\n", op_names[r.op], power ? "power" : "process", r.n - 2);
			fflush(stdout);
		}
	(void)unlink(r.imported);
	(void)unlink(r.image);
	return 0;
}
