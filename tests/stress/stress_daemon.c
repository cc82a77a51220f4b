/* Two daemons in one process (tests/lib/pair.h) with everything at once: what a mount, a manager and a bad day do.
 *
 *   writers     write, zero, discard, flush and read back on the primary, each in stripes of its own; every byte read
 *               must be the last one written
 *   guest       writes the end of v1 on the secondary's view (its active overlay) and reads it back
 *   readers     read the secondary's view: a sector is one write's, whole, or zeroes
 *   controller  stops the writers for a moment, takes a checkpoint, lets them go on and compares the whole view with
 *               what was there at that moment; restarts either host; changes the protocol; pauses; drops checkpoints;
 * makes the primary's disk fail, so that its I/O goes through the peer, and has it rebuilt churn       creates, writes,
 * exports and deletes other volumes, protects a few managers    send verbs, odd ones too, over the control sockets,
 * also while a host goes down
 *
 * In the end the primary is lost, and the secondary fails over: group g to its checkpoint with the guest's own writes,
 * group h to the latest. A difference or an error that nothing explains ends it with exit code 1. Arguments: seconds
 * (default 5), seed (default: the clock).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "net/ctl.h"
#include "tests/lib/pair.h"

#define SECTOR 512U
#define STRIPE (UINT64_C(128) << 10)
#define WRITERS 3U
#define READERS 2U
#define GUEST_LEN (UINT64_C(512) << 10)
#define OP_MAX (UINT64_C(64) << 10)
#define PROTECTED_MAX 4U
/* Marks of the guest on the secondary have the high bit set. */
#define GUEST_BIT (UINT64_C(1) << 63)

struct vol {
	const char *name, *group;
	uint64_t size, shared; /* what lies above `shared` belongs to the guest */
	uint64_t *model;       /* a mark per sector; each sector is its writer's */
	uint64_t *at_ckpt;     /* as of the last checkpoint */
};

static struct vol vols[] = {
    {"v0", "g", UINT64_C(8) << 20, UINT64_C(8) << 20, NULL, NULL},
    {"v1", "g", UINT64_C(4) << 20, (UINT64_C(4) << 20) - GUEST_LEN, NULL, NULL},
    {"v2", "h", UINT64_C(4) << 20, UINT64_C(4) << 20, NULL, NULL},
};
#define VOLS (sizeof(vols) / sizeof(vols[0]))

static struct pair p;
static struct faults disk_faults = {.match = "v0/disk.raw"}; /* the primary's */
static pthread_rwlock_t a_up, b_up; /* shared: a call on that host; exclusive: it stops and starts */
static pthread_rwlock_t pause_lock; /* shared: one operation of a writer; exclusive: the writers stand still */
static pthread_mutex_t guest_lock;  /* the guest's model, and that no checkpoint comes in between */
static uint64_t guest_model[GUEST_LEN / SECTOR];
static atomic_bool end, failed;
static atomic_ulong marks, writes, flushes, checkpoints, restarts, compares, verbs, churned, guest_writes, detaches;

static _Thread_local struct err last;

/* pair_do for several threads: the error is the thread's. */
static int act(struct pair_host *h, const char *verb, json_t *args)
{
	json_t *result = NULL;
	memset(&last, 0, sizeof(last));
	int err = daemon_command(h->d, NULL, verb, args, &result, &last);
	json_decref(args);
	json_decref(result);
	return err;
}

static int create(const char *name, const char *group, uint64_t size)
{
	return act(&p.a, "create",
		   json_pack("{s:s, s:s, s:I}", "name", name, "group", group, "size", (json_int_t)size));
}

struct worker {
	pthread_t thread;
	unsigned index;
	uint64_t seed;
};

static uint64_t rnd(struct worker *w, uint64_t below)
{
	w->seed ^= w->seed << 13;
	w->seed ^= w->seed >> 7;
	w->seed ^= w->seed << 17;
	return w->seed % below;
}

static void fail(const char *what, const char *volume, uint64_t off, int err)
{
	(void)fprintf(stderr, "stress_daemon: %s: %s at %llu: %d %s\n", what, volume, (unsigned long long)off, err,
		      err ? last.text : "");
	atomic_store(&failed, true);
	atomic_store(&end, true);
}

static void fill(uint64_t *buf, uint64_t sectors, uint64_t mark)
{
	for (uint64_t i = 0; i < sectors * (SECTOR / 8); i++)
		buf[i] = mark;
}

/* The mark of a sector; false: it is not one write's. */
static bool sector_mark(const uint64_t *s, uint64_t *mark)
{
	for (unsigned i = 1; i < SECTOR / 8; i++)
		if (s[i] != s[0])
			return false;
	*mark = s[0];
	return true;
}

/* buf holds [off, off + len) of v: must be model's. */
static bool same(const struct vol *v, const uint64_t *model, uint64_t off, uint64_t len, const uint64_t *buf,
		 const char *what)
{
	for (uint64_t i = 0; i < len / SECTOR; i++) {
		uint64_t mark = 0, want = model[off / SECTOR + i];
		if (sector_mark(buf + i * (SECTOR / 8), &mark) && mark == want)
			continue;
		(void)fprintf(stderr, "%s: %s at %llu has mark %llx, not %llx\n", what, v->name,
			      (unsigned long long)(off + i * SECTOR), (unsigned long long)buf[i * (SECTOR / 8)],
			      (unsigned long long)want);
		return false;
	}
	return true;
}

/* ---- on the primary ---- */

static int write_op(struct worker *w, struct vol *v, struct gvol_handle *h, struct gvol *gv, uint64_t *buf)
{
	uint64_t stripes = v->shared / STRIPE / WRITERS;
	uint64_t base = (rnd(w, stripes) * WRITERS + w->index) * STRIPE;
	uint64_t off = base + rnd(w, STRIPE / SECTOR) * SECTOR;
	uint64_t len = (1 + rnd(w, min_u64(OP_MAX, base + STRIPE - off) / SECTOR)) * SECTOR;
	uint64_t mark = 0;
	int err;
	switch (rnd(w, 10)) {
	case 0:
		err = gvol_zero(gv, h, off, len, rnd(w, 2) == 0);
		break;
	case 1:
		atomic_fetch_add(&flushes, 1);
		return gvol_flush(gv, h);
	case 2:
	case 3:
		memset(buf, 0xee, len);
		err = gvol_read(gv, h, GVOL_VOLUME, 0, off, len, buf);
		if (!err && !same(v, v->model, off, len, buf, "read back"))
			err = -ERR_CORRUPT;
		return err;
	default:
		mark = atomic_fetch_add(&marks, 1) + 1;
		fill(buf, len / SECTOR, mark);
		err = gvol_write(gv, h, off, len, buf);
		atomic_fetch_add(&writes, 1);
	}
	for (uint64_t i = 0; !err && i < len / SECTOR; i++)
		v->model[off / SECTOR + i] = mark;
	return err;
}

static void *writer_main(void *arg)
{
	struct worker *w = arg;
	uint64_t *buf = malloc(OP_MAX);
	while (buf && !atomic_load(&end)) {
		struct vol *v = &vols[rnd(w, VOLS)];
		struct gvol_handle *h = NULL;
		bool direct;
		(void)pthread_rwlock_rdlock(&a_up);
		struct gvol *gv = gvol_find(p.a.d, v->name);
		int err = gv ? gvol_open(gv, true, rnd(w, 2) == 0, &h, &direct) : -ERR_NOENT;
		for (unsigned i = 0; i < 20 && !err && !atomic_load(&end); i++) {
			(void)pthread_rwlock_rdlock(&pause_lock);
			err = write_op(w, v, h, gv, buf);
			(void)pthread_rwlock_unlock(&pause_lock);
		}
		gvol_release(h);
		gvol_unref(gv);
		(void)pthread_rwlock_unlock(&a_up);
		if (err)
			fail("a writer", v->name, 0, err);
	}
	free(buf);
	return NULL;
}

static void churn_one(struct worker *w, const char *name, const char *group)
{
	int err = create(name, group, UINT64_C(1) << 20);
	if (err && err != -ERR_EXIST && err != -ERR_BUSY && err != -ERR_STATE)
		fail("create", name, 0, err);
	(void)pair_write(&p.a, name, rnd(w, 200) * SECTOR, 8192, 0x77);
	if (rnd(w, 8) == 0) {
		char file[256];
		(void)snprintf(file, sizeof(file), "%s/export-%u-%llu", p.dir, w->index,
			       (unsigned long long)rnd(w, 1000000));
		(void)act(&p.a, "export", json_pack("{s:s, s:s}", "name", name, "file", file));
		(void)act(&p.a, "import",
			  json_pack("{s:s, s:s, s:s}", "name", "imported", "file", file, "group", group));
		(void)unlink(file);
	}
	if (rnd(w, 3) == 0)
		return;
	err = act(&p.a, "delete", json_pack("{s:s}", "name", rnd(w, 6) ? name : "imported"));
	if (err && err != -ERR_NOENT && err != -ERR_BUSY && err != -ERR_STATE)
		fail("delete", name, 0, err);
	atomic_fetch_add(&churned, 1);
}

/* Two of these: they meet on the same names. */
static void *churn_main(void *arg)
{
	struct worker *w = arg;
	unsigned made = 0;
	while (!atomic_load(&end)) {
		char name[16];
		(void)snprintf(name, sizeof(name), "x%u", (unsigned)rnd(w, 3));
		(void)pthread_rwlock_rdlock(&a_up);
		churn_one(w, name, rnd(w, 2) ? "xs" : name);
		if (w->index == 0 && made < PROTECTED_MAX && rnd(w, 20) == 0) {
			(void)snprintf(name, sizeof(name), "y%u", made++);
			(void)create(name, name, UINT64_C(1) << 20);
			(void)act(&p.a, "protect",
				  json_pack("{s:s, s:s, s:{s:i}, s:i}", "name", name, "peer", p.addr, "ids", name,
					    (int)made + 100, "timeout_ms", 200));
		}
		(void)pthread_rwlock_unlock(&a_up);
		(void)usleep(1000);
	}
	return NULL;
}

/* ---- on the secondary ---- */

static void *reader_main(void *arg)
{
	struct worker *w = arg;
	uint64_t *buf = malloc(OP_MAX);
	while (buf && !atomic_load(&end)) {
		const struct vol *v = &vols[rnd(w, VOLS)];
		uint64_t off = rnd(w, v->size / SECTOR) * SECTOR;
		uint64_t len = min_u64(OP_MAX, v->size - off), mark = 0, newest;
		(void)pthread_rwlock_rdlock(&b_up);
		struct gvol *gv = gvol_find(p.b.d, v->name);
		struct gvol_attr attr;
		struct extent x;
		enum gvol_file file = (enum gvol_file)rnd(w, 3);
		int err = gv ? gvol_read(gv, NULL, file, 0, off, len, buf) : -ERR_NOENT;
		newest = atomic_load(&marks);
		for (uint64_t i = 0; !err && i < len / SECTOR; i++)
			if (!sector_mark(buf + i * (SECTOR / 8), &mark) || (mark & ~GUEST_BIT) > newest)
				fail("the secondary shows a torn sector", v->name, off + i * SECTOR, (int)file);
		if (gv) {
			(void)gvol_attr(gv, file, 0, &attr);
			(void)gvol_extent(gv, file, 0, off, &x);
			uint64_t latest, numbers[8];
			(void)gvol_ckpts(gv, numbers, 8, &latest);
			if (latest && gvol_attr(gv, GVOL_CKPT, latest, &attr) == 0)
				(void)gvol_read(gv, NULL, GVOL_CKPT, latest, off, len, buf);
		}
		gvol_unref(gv);
		(void)pthread_rwlock_unlock(&b_up);
	}
	free(buf);
	return NULL;
}

/* One write into the guest's part of v1 and one read back; errors are the view's being away. */
static void guest_once(struct worker *w, uint64_t *buf)
{
	const struct vol *v = &vols[1];
	uint64_t first = rnd(w, GUEST_LEN / SECTOR), n = 1 + rnd(w, min_u64(32, GUEST_LEN / SECTOR - first));
	uint64_t mark = GUEST_BIT | (atomic_fetch_add(&marks, 1) + 1);
	struct gvol *gv = gvol_find(p.b.d, v->name);
	fill(buf, n, mark);
	if (gv && gvol_write(gv, NULL, v->shared + first * SECTOR, n * SECTOR, buf) == 0) {
		for (uint64_t i = 0; i < n; i++)
			guest_model[first + i] = mark;
		memset(buf, 0xee, n * SECTOR);
		int err = gvol_read(gv, NULL, GVOL_VOLUME, 0, v->shared + first * SECTOR, n * SECTOR, buf);
		for (uint64_t i = 0; !err && i < n * (SECTOR / 8); i++)
			if (buf[i] != mark)
				fail("the guest's write is not there", v->name, v->shared + first * SECTOR, 0);
		atomic_fetch_add(&guest_writes, 1);
	}
	gvol_unref(gv);
}

static void *guest_main(void *arg)
{
	struct worker *w = arg;
	uint64_t *buf = malloc(OP_MAX);
	while (buf && !atomic_load(&end)) {
		(void)pthread_rwlock_rdlock(&b_up);
		(void)pthread_mutex_lock(&guest_lock);
		guest_once(w, buf);
		(void)pthread_mutex_unlock(&guest_lock);
		(void)pthread_rwlock_unlock(&b_up);
		(void)usleep(500);
	}
	free(buf);
	return NULL;
}

/* ---- managers ---- */

static const char *const requests[] = {
    "status {}",
    "status {\"name\":\"g\"}",
    "status {\"name\":7}",
    "list {}",
    "show {\"name\":\"v0\"}",
    "show {\"name\":\"xs\"}",
    "show {\"name\":\"../x\"}",
    "checkpoints {\"name\":\"g\"}",
    "checkpoints {\"name\":\"g\",\"drop\":-1}",
    "checkpoints {\"name\":\"g\",\"drop\":9223372036854775807}",
    "extents {\"name\":\"v1\",\"layer\":\"active\"}",
    "extents {\"name\":\"v0\",\"layer\":\"hidden\"}",
    "extents {\"name\":\"v0\",\"layer\":-5}",
    "extents {\"name\":\"v0\",\"layer\":3,\"since\":2}",
    "extents {\"name\":\"v0\",\"layer\":{}}",
    "get {\"name\":\"h\"}",
    "set {\"name\":\"h\",\"settings\":{\"keep_last\":\"3\"}}",
    "set {\"name\":\"h\",\"settings\":{\"keep_last\":3}}",
    "set {\"name\":\"h\",\"settings\":[]}",
    "error {\"name\":\"g\"}",
    "error {\"name\":\"xs\"}",
    "wait {\"name\":\"g\",\"for\":\"in-sync\",\"timeout_ms\":50}",
    "wait {\"name\":\"xs\",\"for\":\"running\",\"timeout_ms\":9223372036854775807}",
    "wait {\"name\":\"g\",\"for\":7,\"timeout_ms\":-1}",
    "checkpoint {\"name\":\"h\",\"wait\":false}",
    "checkpoint {\"name\":\"h\",\"timeout_ms\":1}",
    "checkpoint {\"name\":\"xs\"}",
    "failover {\"name\":\"xs\",\"to\":-1}",
    "failover {\"name\":\"xs\",\"to\":[]}",
    "create {\"name\":\"z\",\"size\":-512}",
    "create {\"name\":\"z\",\"size\":9223372036854775807}",
    "create {\"name\":\"z\",\"size\":\"1\",\"group\":7}",
    "export {\"name\":\"v0\",\"file\":7}",
    "import {\"name\":\"z\",\"file\":\"relative\"}",
    "protect {\"name\":\"xs\",\"peer\":\"127.0.0.1:1\",\"timeout_ms\":100}",
    "protect {\"name\":\"xs\",\"peer\":\"127.example:1\"}",
    "protect {\"name\":\"xs\",\"peer\":\"127.0.0.1:1\",\"ids\":{\"no\":1}}",
    "protect {\"name\":\"xs\",\"peer\":7,\"ids\":7}",
    "read {\"name\":\"v0\",\"offset\":12345,\"length\":524288}",
    "read {\"name\":\"v1\",\"offset\":1,\"length\":70000,\"remote\":true}",
    "read {\"name\":\"v2\",\"offset\":0,\"length\":4096,\"remote\":true,\"timeout_ms\":1}",
    "read {\"name\":\"v2\",\"offset\":4194304,\"length\":1,\"remote\":true}",
    "read {\"name\":\"xs\",\"offset\":0,\"length\":512}",
    "read {\"name\":\"v0\",\"offset\":-1,\"length\":524289}",
    "write {\"name\":\"v0\",\"offset\":0,\"data\":\"\",\"flush\":true}",
    "write {\"name\":\"v1\",\"offset\":0,\"data\":\"\",\"flush\":true,\"remote\":true}",
    "write {\"name\":\"xs\",\"offset\":7,\"data\":\"AAAA\"}",
    "write {\"name\":\"xs\",\"offset\":7,\"data\":\"A===\",\"remote\":7}",
    "report {}",
    "report {\"remote\":true}",
    "start {\"name\":\"xs\"}",
    "stop {\"name\":\"xs\"}",
    "delete {\"name\":\"v0\"}",
    "nonsense {}",
    "ping {}",
};

static void *manager_main(void *arg)
{
	struct worker *w = arg;
	char path[300];
	(void)snprintf(path, sizeof(path), "%s/control.sock", w->index ? p.b.store : p.a.store);
	while (!atomic_load(&end)) {
		char verb[32];
		json_t *result = NULL;
		struct err e;
		const char *r = requests[rnd(w, ARRAY_LEN(requests))], *args = strchr(r, ' ');
		(void)snprintf(verb, sizeof(verb), "%.*s", (int)(args - r), r);
		(void)ctl_call(path, verb, json_loads(args, 0, NULL), 300, NULL, NULL, &result, NULL, &e);
		json_decref(result);
		atomic_fetch_add(&verbs, 1);
	}
	return NULL;
}

static void *poller_main(void *arg)
{
	struct worker *w = arg;
	while (!atomic_load(&end)) {
		struct pair_host *h = w->index ? &p.b : &p.a;
		pthread_rwlock_t *up = w->index ? &b_up : &a_up;
		(void)pthread_rwlock_rdlock(up);
		json_decref(daemon_status(h->d, NULL));
		(void)pthread_rwlock_unlock(up);
		(void)usleep(2000);
	}
	return NULL;
}

/* ---- the controller ---- */

static int host_start(struct pair_host *h)
{
	int err = pair_host_start(&p, h);
	return err ? err : daemon_serve_control(h->d, &h->err);
}

static void restart(struct pair_host *h, pthread_rwlock_t *up, bool at_once)
{
	(void)pthread_rwlock_wrlock(up);
	uint64_t t = clock_mono_ns();
	pair_host_stop(h);
	if (clock_mono_ns() - t > 60 * NS_PER_SEC)
		fail("a host took more than 60 s to end", h->store, 0, 0);
	if (!at_once)
		(void)usleep(100000);
	int err = host_start(h);
	(void)pthread_rwlock_unlock(up);
	atomic_fetch_add(&restarts, 1);
	if (err) {
		fail("a host did not start again", h->store, 0, err);
		(void)fprintf(stderr, "stress_daemon: %s\n", h->err.text);
		_exit(1);
	}
}

static bool view_is(struct pair_host *h, const struct vol *v, const uint64_t *model, const char *what)
{
	uint64_t *buf = malloc(v->shared);
	struct gvol *gv = gvol_find(h->d, v->name);
	int err = gv && buf ? gvol_read(gv, NULL, GVOL_VOLUME, 0, 0, v->shared, buf) : -ERR_NOENT;
	bool ok = !err && same(v, model, 0, v->shared, buf, what);
	if (!ok)
		fail(what, v->name, 0, err);
	gvol_unref(gv);
	free(buf);
	return ok;
}

/* Both groups, while nobody writes on the primary, and no guest on the secondary. */
static int checkpoint_now(void)
{
	(void)pthread_mutex_lock(&guest_lock);
	(void)pthread_rwlock_wrlock(&pause_lock);
	int err = act(&p.a, "checkpoint", json_pack("{s:s, s:i}", "name", "g", "timeout_ms", 60000));
	for (size_t i = 0; !err && i < VOLS; i++)
		memcpy(vols[i].at_ckpt, vols[i].model, vols[i].size / SECTOR * sizeof(uint64_t));
	(void)pthread_rwlock_unlock(&pause_lock);
	if (!err)
		memset(guest_model, 0, sizeof(guest_model));
	(void)pthread_mutex_unlock(&guest_lock);
	if (err && err != -ERR_STATE && err != -ERR_PEER && err != -ERR_BUSY)
		fail("checkpoint", "g", 0, err);
	if (!err)
		atomic_fetch_add(&checkpoints, 1);
	return err;
}

static int synced(const char *group)
{
	int err =
	    act(&p.a, "wait", json_pack("{s:s, s:s, s:i}", "name", group, "for", "in-sync", "timeout_ms", 120000));
	if (err)
		fail("not in sync again", group, 0, err);
	return err;
}

static bool detached(const char *volume)
{
	json_t *status = daemon_status(p.a.d, "g"), *v;
	json_t *group = json_array_get(json_object_get(status, "groups"), 0);
	bool is = false;
	size_t i;
	json_array_foreach(json_object_get(group, "volumes"), i,
			   v) if (strcmp(json_string_value(json_object_get(v, "name")), volume) == 0) is =
	    json_is_true(json_object_get(v, "detached"));
	json_decref(status);
	return is;
}

/* The primary's disk fails: its writers go on through the peer, and have it back after a while. */
static void disk_fails(struct worker *w)
{
	if (synced("g"))
		return;
	uint64_t until = clock_mono_ns() + 60 * NS_PER_SEC;
	atomic_store(rnd(w, 2) ? &disk_faults.write : &disk_faults.read, -ERR_IO);
	while (!detached("v0") && clock_mono_ns() < until && !atomic_load(&end))
		(void)usleep(5000);
	if (!detached("v0") && !atomic_load(&end))
		fail("nobody has met the failed disk", "v0", 0, 0);
	(void)usleep((useconds_t)rnd(w, 100000));
	atomic_store(&disk_faults.write, 0);
	atomic_store(&disk_faults.read, 0);
	int err;
	/* Busy: what the daemon says is detached may still be on its way into the record. */
	while ((err = act(&p.a, "resync",
			  json_pack("{s:s, s:b, s:i}", "name", "g", "wait", 1, "timeout_ms", 120000))) == -ERR_BUSY &&
	       clock_mono_ns() < until)
		(void)usleep(5000);
	if (err || detached("v0"))
		fail("the disk does not come back", "v0", 0, err);
	atomic_fetch_add(&detaches, 1);
}

static void drop_one(struct worker *w)
{
	uint64_t numbers[16], latest;
	struct gvol *gv = gvol_find(p.b.d, "v0");
	uint64_t n = gv ? min_u64(gvol_ckpts(gv, numbers, ARRAY_LEN(numbers), &latest), ARRAY_LEN(numbers)) : 0;
	gvol_unref(gv);
	if (n)
		(void)act(&p.b, "checkpoints",
			  json_pack("{s:s, s:I}", "name", "g", "drop", (json_int_t)numbers[rnd(w, n)]));
}

/* The first steps are one of each kind, however slow the machine is. */
static const uint8_t first_steps[] = {11, 6, 0, 12, 6, 1, 10, 3, 6};

static void control_once(struct worker *w, unsigned step)
{
	static const char *const protocols[] = {"A", "B", "C", "F"};
	uint64_t what = step < ARRAY_LEN(first_steps) ? first_steps[step] : rnd(w, 23);
	if (what == 0)
		restart(&p.b, &b_up, rnd(w, 2));
	else if (what == 1)
		restart(&p.a, &a_up, rnd(w, 2));
	else if (what < 5)
		(void)act(&p.a, "set",
			  json_pack("{s:s, s:{s:s}}", "name", rnd(w, 2) ? "g" : "h", "settings", "protocol",
				    protocols[rnd(w, 4)]));
	else if (what < 10 && synced("g") == 0 && checkpoint_now() == 0) {
		for (size_t i = 0; i < 2; i++)
			if (!view_is(&p.b, &vols[i], vols[i].at_ckpt, "the view after a checkpoint"))
				return;
		atomic_fetch_add(&compares, 1);
	} else if (what == 10) {
		(void)act(&p.a, "pause", json_pack("{s:s}", "name", "g"));
		(void)usleep((useconds_t)rnd(w, 50000));
		(void)act(&p.a, "resume", json_pack("{s:s}", "name", "g"));
	} else if (what == 11) {
		disk_fails(w);
	} else if (what < 14) {
		drop_one(w);
	} else
		(void)usleep(20000);
}

static int set_up(void)
{
	int err = pair_open_with(&p, &disk_faults, NULL);
	for (size_t i = 0; !err && i < VOLS; i++) {
		vols[i].model = calloc(vols[i].size / SECTOR, sizeof(uint64_t));
		vols[i].at_ckpt = calloc(vols[i].size / SECTOR, sizeof(uint64_t));
		err = vols[i].model && vols[i].at_ckpt ? 0 : -ERR_NOMEM;
		err = err ? err : create(vols[i].name, vols[i].group, vols[i].size);
	}
	/* Checkpoints of g are the controller's own: it knows what was there. */
	if (!err)
		err =
		    act(&p.a, "set", json_pack("{s:s, s:{s:s}}", "name", "g", "settings", "checkpoint_interval", "0"));
	if (!err)
		err =
		    act(&p.a, "set", json_pack("{s:s, s:{s:s}}", "name", "h", "settings", "checkpoint_interval", "1s"));
	err = err ? err : pair_protect(&p, "g");
	err = err ? err : pair_protect(&p, "h");
	err = err ? err : daemon_serve_control(p.a.d, &p.a.err);
	return err ? err : daemon_serve_control(p.b.d, &p.b.err);
}

/* The primary is lost. g goes back to the checkpoint with the guest's writes, h to all that was flushed. */
static void finish(struct worker *w)
{
	uint64_t *buf = malloc(OP_MAX);
	for (unsigned i = 0; i < 2 && !atomic_load(&failed); i++)
		(void)act(&p.a, "set", json_pack("{s:s, s:{s:s}}", "name", i ? "h" : "g", "settings", "protocol", "F"));
	if (buf == NULL || atomic_load(&failed) || synced("g") || synced("h"))
		goto out;
	int err;
	for (unsigned i = 0; (err = checkpoint_now()) != 0 && i < 100; i++)
		(void)usleep(20000);
	for (unsigned i = 0; i < 100 && !err; i++) {
		struct vol *v = &vols[i % VOLS];
		struct gvol *gv = gvol_find(p.a.d, v->name);
		w->index = i % WRITERS;
		err = gv ? write_op(w, v, NULL, gv, buf) : -ERR_NOENT;
		gvol_unref(gv);
		guest_once(w, buf);
	}
	struct gvol *gv = gvol_find(p.a.d, "v2");
	err = err || gv == NULL ? err : gvol_flush(gv, NULL);
	gvol_unref(gv);
	if (err) {
		fail("the last writes", "", 0, err);
		goto out;
	}
	pair_host_stop(&p.a);
	for (unsigned i = 0; i < 2; i++) {
		json_t *args = json_pack("{s:s, s:b, s:i}", "name", i ? "h" : "g", "wait", 1, "timeout_ms", 120000);
		if (i)
			json_object_set_new(args, "to", json_string("latest"));
		err = act(&p.b, "failover", args);
		if (err)
			fail("failover", i ? "h" : "g", 0, err);
	}
	for (size_t i = 0; i < VOLS; i++)
		(void)view_is(&p.b, &vols[i], i == 2 ? vols[i].model : vols[i].at_ckpt, "after the failover");
	for (uint64_t i = 0; i < GUEST_LEN / SECTOR; i++) {
		uint64_t mark = 1;
		err = pair_read(&p.b, "v1", vols[1].shared + i * SECTOR, SECTOR, buf);
		if (err || !sector_mark(buf, &mark) || mark != guest_model[i]) {
			fail("the guest's own write after the failover", "v1", vols[1].shared + i * SECTOR, err);
			break;
		}
	}
out:
	free(buf);
}

int main(int argc, char **argv)
{
	static void *(*const mains[])(void *) = {writer_main,  writer_main,  writer_main, reader_main,
						 reader_main,  guest_main,   churn_main,  churn_main,
						 manager_main, manager_main, poller_main, poller_main};
	static const unsigned index[] = {0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 0, 1};
	struct worker w[ARRAY_LEN(mains)];
	uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 5;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : clock_wall_ns();
	struct worker c = {.seed = seed | 1};

	log_init("stress_daemon", LOG_STDERR, LOG_TEXT, LOG_LEVEL_ERROR);
	pthread_rwlockattr_t attr;
	(void)pthread_rwlockattr_init(&attr);
	(void)pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	(void)pthread_rwlock_init(&a_up, &attr);
	(void)pthread_rwlock_init(&b_up, &attr);
	(void)pthread_rwlock_init(&pause_lock, &attr);
	(void)pthread_mutex_init(&guest_lock, NULL);
	(void)printf("seed %llu\n", (unsigned long long)seed);
	(void)fflush(stdout);
	int err = set_up();
	if (err) {
		fail("setting up", "", 0, err);
		pair_close(&p);
		return 1;
	}
	for (size_t i = 0; i < ARRAY_LEN(mains); i++) {
		w[i] = (struct worker){.index = index[i], .seed = (seed + i * UINT64_C(0x9E3779B97F4A7C15)) | 1};
		if (pthread_create(&w[i].thread, NULL, mains[i], &w[i]) != 0)
			abort();
	}
	uint64_t stop = clock_mono_ns() + seconds * NS_PER_SEC;
	for (unsigned step = 0; (step < ARRAY_LEN(first_steps) || clock_mono_ns() < stop) && !atomic_load(&end); step++)
		control_once(&c, step);
	atomic_store(&end, true);
	for (size_t i = 0; i < ARRAY_LEN(mains); i++)
		(void)pthread_join(w[i].thread, NULL);
	finish(&c);
	pair_close(&p);
	for (size_t i = 0; i < VOLS; i++) {
		free(vols[i].model);
		free(vols[i].at_ckpt);
	}
	(void)printf(
	    "%lu writes, %lu flushes, %lu checkpoints, %lu compared, %lu restarts, %lu detached, %lu guest writes, "
	    "%lu verbs, %lu created and deleted: %s\n",
	    atomic_load(&writes), atomic_load(&flushes), atomic_load(&checkpoints), atomic_load(&compares),
	    atomic_load(&restarts), atomic_load(&detaches), atomic_load(&guest_writes), atomic_load(&verbs),
	    atomic_load(&churned), atomic_load(&failed) ? "FAILED" : "ok");
	return atomic_load(&failed) ? 1 : 0;
}
