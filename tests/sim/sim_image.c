/* The image layer alone on the simulated storage: two volumes, one of them over a base image, with their chains, the
 * record, the intent maps, driven by a script of random operations against a model, over power cuts, kills, failing
 * calls and failing allocations.
 *
 *   sim_image                     some seeds, and a slice of every exhaustive mode
 *   sim_image --seeds N           seeds 1 to N: operations and faults by chance
 *   sim_image --crash-points      each changing call of the script as the last one: not done, half done, done; then a
 *                                 power cut that keeps none, some or all of the unsynced, or a kill
 *   sim_image --fail-points       each call of the script fails once, or all from it on for a while
 *   sim_image --alloc-points      each allocation of the script fails
 *     --stride K --offset J       only every Kth point, from the Jth on
 *     --long                      all of it
 *   sim_image --replay WHAT       one run, as printed by one that failed
 *
 * The model knows of each sector what it is now and what else a power cut may leave of it. After each restart what is
 * found has to be one of these; it is what the model goes on with. Images of checkpoints have no such freedom: each
 * reads, always, as what the disk was when it was taken (I1, I3, V1).
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/check.h"
#include "core/err.h"
#include "core/range.h"
#include "image/based.h"
#include "image/filecache.h"
#include "image/intent.h"
#include "image/meta.h"
#include "image/volume.h"
#include "tests/sim/simalloc.h"
#include "tests/sim/simstore.h"

#define VOLUMES 2
#define BASED 1 /* of them is over a base image */
#define BLOCKS_MAX 24U
#define SECTORS (BLOCKS_MAX * BLOCK_SIZE / SECTOR_SIZE)
#define SIZE_FIRST (20U * BLOCK_SIZE + 3 * SECTOR_SIZE)
#define CKPTS_MAX 7U
#define MAYBE_MAX 14U
#define NUMBERS_MAX 600U
#define INTENT_BYTES (UINT64_C(40) << 30) /* the maps are for volumes of this size: several pages */
#define INTENT_BITS 24U			  /* looked at, spread over the pages */
#define NONE UINT32_MAX
#define SCRIPT_OPS 300U
#define SCRIPT_SEED 1U

/* What a sector holds is told by a stamp: 0 is zeroes. */
struct sector {
	uint32_t now, alt;	   /* alt: or this, after a write that failed; NONE */
	uint32_t maybe[MAYBE_MAX]; /* what a power cut may leave; `now` is among them */
	uint8_t n;
	bool lost; /* a sync failed: no later one makes it durable, only being written again */
};

struct record {
	uint64_t size, max, base, active_id, received;
	uint64_t ckpts[CKPTS_MAX + 1];
	uint32_t n_ckpts;
	uint32_t committing;
	uint8_t spread[3 * SECTOR_SIZE]; /* another in each save, over several sectors: one that is torn shows */
};

struct vol {
	char name[8];
	struct volume *v;
	struct intent *intent;
	struct sector disk[SECTORS], view[SECTORS];
	bool disk_dead, active_dead, intent_dead; /* a sync failed: all later ones must */
	bool bit_durable[INTENT_BITS];
};

struct world {
	struct simstore *ss;
	struct storage *s;
	struct record rec, next; /* as saved; as it is being saved */
	bool saving, unsure;	 /* the last save failed */
	bool new_view;		 /* `next` begins a new view: of images[next.base] */
	struct vol vols[VOLUMES];
	uint32_t (*images)[VOLUMES][SECTORS]; /* by number */
	uint64_t random;
	uint32_t stamps;
	unsigned op;
	const char *op_name;
	bool open;
	struct err start_error;
	char what[128]; /* to replay */
};

static bool verbose;

__attribute__((format(printf, 2, 3), noreturn)) static void violation(struct world *w, const char *fmt, ...)
{
	va_list ap;

	fflush(stdout);
	printf("VIOLATION in operation %u (%s), last fault: %s\n  ", w->op, w->op_name,
	       *simstore_fault_text(w->ss) ? simstore_fault_text(w->ss) : "none");
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\nto replay: sim_image --replay %s\n", w->what);
	exit(1);
}

static uint64_t pick(struct world *w, uint64_t below)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return (w->random >> 11) % below;
}

#define WATCHED(expr)                                                                                                  \
	({                                                                                                             \
		simalloc_watch(true);                                                                                  \
		int watched_rc = (expr);                                                                               \
		simalloc_watch(false);                                                                                 \
		watched_rc;                                                                                            \
	})

/* ---- sectors ---- */

static void stamp_fill(uint8_t *buf, unsigned vol, unsigned sector, uint32_t stamp)
{
	uint64_t x = ((uint64_t)stamp << 20 | (uint64_t)vol << 16 | sector) * UINT64_C(0x9e3779b97f4a7c15);

	for (unsigned i = 0; i < SECTOR_SIZE; i += 8) {
		uint64_t word = stamp ? x ^ (x >> 29) : 0;

		memcpy(buf + i, &word, 8);
		x += UINT64_C(0xbf58476d1ce4e5b9);
	}
}

static bool stamp_is(const uint8_t *buf, unsigned vol, unsigned sector, uint32_t stamp)
{
	uint8_t want[SECTOR_SIZE];

	stamp_fill(want, vol, sector, stamp);
	return memcmp(buf, want, SECTOR_SIZE) == 0;
}

static void sector_may_be(struct sector *s, uint32_t stamp)
{
	for (unsigned i = 0; i < s->n; i++) {
		if (s->maybe[i] == stamp)
			return;
	}
	PRE(s->n < MAYBE_MAX);
	s->maybe[s->n++] = stamp;
}

static void sector_is(struct sector *s, uint32_t stamp)
{
	*s = (struct sector){.now = stamp, .alt = NONE, .maybe = {stamp}, .n = 1};
}

static bool sectors_have_room(const struct sector *s, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		if (s[i].n >= MAYBE_MAX - 2)
			return false;
	}
	return true;
}

static void sectors_written(struct sector *s, unsigned n, uint32_t stamp, int rc)
{
	for (unsigned i = 0; i < n; i++) {
		sector_may_be(&s[i], stamp);
		/* What reads like that already may not have been written again. */
		if (s[i].now == stamp && s[i].alt == NONE)
			continue;
		if (rc < 0) {
			s[i].alt = stamp;
			continue;
		}
		s[i].now = stamp;
		s[i].alt = NONE;
		s[i].lost = false;
	}
}

static void sectors_synced(struct sector *s, int rc)
{
	for (unsigned i = 0; i < SECTORS; i++) {
		if (s[i].n == 1)
			continue;
		if (rc < 0)
			s[i].lost = true;
		else if (!s[i].lost)
			sector_is(&s[i], s[i].now);
	}
}

/* Since when the content may have changed. */
enum since { SINCE_WRITTEN, SINCE_OPENED, SINCE_POWER_CUT };

/* What a read found is what it is. A write that failed has left the old or the new. Opening shows of what a failed sync
 * has lost what the medium has. A power cut leaves any of what may be. */
static void sector_found(struct world *w, const char *what, unsigned vol, unsigned i, struct sector *s,
			 const uint8_t *buf, enum since since)
{
	bool any = since == SINCE_POWER_CUT || (since == SINCE_OPENED && s->lost);
	uint32_t found = NONE;

	if (stamp_is(buf, vol, i, s->now))
		found = s->now;
	else if (s->alt != NONE && stamp_is(buf, vol, i, s->alt))
		found = s->alt;
	for (unsigned k = 0; any && found == NONE && k < s->n; k++) {
		if (stamp_is(buf, vol, i, s->maybe[k]))
			found = s->maybe[k];
	}
	for (uint32_t k = 0; found == NONE && k <= w->stamps; k++) {
		if (stamp_is(buf, vol, i, k))
			printf("it holds write %" PRIu32 "\n", k);
	}
	if (found == NONE)
		violation(w,
			  "%s of volume %s, sector %u (block %u): is not what it may be (now write %" PRIu32
			  ", %u in all%s)",
			  what, w->vols[vol].name, i, i / 8, s->now, s->n, s->lost ? ", lost" : "");
	s->now = found;
	s->alt = NONE;
	s->lost = s->lost && since == SINCE_WRITTEN;
	if (since == SINCE_POWER_CUT)
		sector_is(s, found);
}

static unsigned sectors_in(const struct world *w)
{
	return (unsigned)(w->rec.size / SECTOR_SIZE);
}

/* ---- reading it all ---- */

static void read_layer(struct world *w, unsigned vol, int layer, uint64_t ckpt, uint8_t *buf)
{
	struct volume *v = w->vols[vol].v;
	int rc;

	memset(buf, 0xa5, SECTORS * SECTOR_SIZE);
	if (layer == LAYER_DISK)
		rc = volume_read_disk(v, 0, w->rec.size, buf);
	else if (layer == LAYER_VIEW)
		rc = volume_read_view(v, ckpt, 0, w->rec.size, buf);
	else
		rc = volume_read_ckpt(v, ckpt, 0, w->rec.size, buf);
	if (rc < 0)
		violation(w, "reading %s of volume %s: %s",
			  layer == LAYER_DISK	? "the disk"
			  : layer == LAYER_VIEW ? "the view"
						: "a checkpoint",
			  w->vols[vol].name, err_short(rc));
}

static uint8_t readback[SECTORS * SECTOR_SIZE];

static void check_disk(struct world *w, unsigned vol, enum since since)
{
	read_layer(w, vol, LAYER_DISK, 0, readback);
	for (unsigned i = 0; i < sectors_in(w); i++)
		sector_found(w, "the disk", vol, i, &w->vols[vol].disk[i], readback + i * SECTOR_SIZE, since);
}

static void check_view(struct world *w, unsigned vol, enum since since)
{
	if (!w->rec.base)
		return;
	read_layer(w, vol, LAYER_VIEW, w->rec.base, readback);
	for (unsigned i = 0; i < sectors_in(w); i++)
		sector_found(w, "the view", vol, i, &w->vols[vol].view[i], readback + i * SECTOR_SIZE, since);
}

static void check_images(struct world *w, unsigned vol)
{
	for (unsigned k = 0; k < w->rec.n_ckpts; k++) {
		uint64_t number = w->rec.ckpts[k];

		read_layer(w, vol, LAYER_IMAGE, number, readback);
		for (unsigned i = 0; i < sectors_in(w); i++) {
			if (!stamp_is(readback + i * SECTOR_SIZE, vol, i, w->images[number][vol][i]))
				violation(w,
					  "checkpoint %" PRIu64
					  " of volume %s no longer reads as what it was: sector %u (block %u)",
					  number, w->vols[vol].name, i, i / 8);
		}
	}
}

static void check_all(struct world *w, enum since since)
{
	/* Files that come and go by turns are synced when they go: not another crash point. */
	simstore_look(w->ss, true);
	for (unsigned v = 0; v < VOLUMES; v++) {
		check_disk(w, v, since);
		check_view(w, v, since);
		check_images(w, v);
	}
	simstore_look(w->ss, false);
	simstore_check(w->ss);
}

/* Reads without faults, to learn what a failed write has left. */
static void settle(struct world *w, enum since since)
{
	simstore_look(w->ss, true);
	for (unsigned v = 0; v < VOLUMES; v++) {
		check_disk(w, v, since);
		check_view(w, v, since);
	}
	simstore_look(w->ss, false);
}

/* ---- the record ---- */

static void images_take(struct world *w, uint64_t number)
{
	PRE(number < NUMBERS_MAX);
	for (unsigned v = 0; v < VOLUMES; v++) {
		for (unsigned i = 0; i < SECTORS; i++)
			w->images[number][v][i] = w->vols[v].disk[i].now;
	}
}

static void record_adopt(struct world *w)
{
	uint64_t grown = w->next.size;

	for (unsigned v = 0; v < VOLUMES && w->new_view && w->next.base; v++) {
		for (unsigned i = 0; i < SECTORS; i++)
			sector_is(&w->vols[v].view[i], w->images[w->next.base][v][i]);
		w->vols[v].active_dead = false;
	}
	w->rec = w->next;
	w->rec.size = grown;
	w->saving = w->unsure = false;
}

static int record_save(struct world *w, bool new_view)
{
	struct err e = {0};
	int rc;

	w->saving = true;
	w->new_view = new_view;
	memset(w->next.spread, w->rec.spread[0] + 1, sizeof(w->next.spread));
	rc = WATCHED(meta_save(w->s, "", "record", "test", 1, &w->next, sizeof(w->next), true, &e));
	if (simstore_stopped(w->ss))
		return -ERR_IO; /* either is found by the next start */
	/* What a failed save has written may be found all the same. */
	w->saving = false;
	w->unsure = rc < 0;
	return rc;
}

/* ---- opening, closing ---- */

static void close_all(struct world *w)
{
	for (unsigned v = 0; v < VOLUMES; v++) {
		volume_close(w->vols[v].v);
		intent_close(w->vols[v].intent);
		w->vols[v].v = NULL;
		w->vols[v].intent = NULL;
	}
	w->open = false;
}

static uint64_t bit_at(unsigned i)
{
	return i * (INTENT_BYTES >> INTENT_SHIFT) / INTENT_BITS;
}

static void intents_found(struct world *w, struct vol *v)
{
	uint64_t bits = units_of(INTENT_BYTES, INTENT_SHIFT);
	void *memory = simalloc(bitmap_bytes(bits));
	struct bitmap b;

	bitmap_init(&b, bits, memory);
	intent_load(v->intent, &b);
	for (unsigned i = 0; i < INTENT_BITS; i++) {
		if (v->bit_durable[i] && !bitmap_test(&b, bit_at(i)))
			violation(w, "intent bit %" PRIu64 " of volume %s was set durably and is not there", bit_at(i),
				  v->name);
		/* Once the map is in use, what was found set is taken for durable. */
		v->bit_durable[i] = bitmap_test(&b, bit_at(i));
	}
	simfree(memory);
}

static int open_volume(struct world *w, struct vol *v, struct err *e)
{
	struct volume_open_args a = {.name = v->name,
				     .size = w->rec.size,
				     .durability = DURABILITY_POWER,
				     .ckpts = w->rec.ckpts,
				     .n_ckpts = w->rec.n_ckpts,
				     .active_id = w->rec.active_id};
	int rc = WATCHED(volume_open(w->s, &a, &v->v, e));

	if (rc == 0)
		rc = WATCHED(intent_open(w->s, v->name, INTENT_BYTES, INTENT_DURABLE, &v->intent, e));
	if (rc == 0)
		rc = WATCHED(intent_begin(v->intent, e));
	return rc;
}

static int load_record(struct world *w, struct err *e)
{
	uint32_t version = 0;
	void *payload = NULL;
	size_t len = 0;
	int rc = WATCHED(meta_load(w->s, "record", "test", 1, &version, &payload, &len, e));

	if (rc < 0)
		return rc;
	if (len != sizeof(w->rec))
		violation(w, "the record has another length");
	if (memcmp(payload, &w->rec, len) != 0) {
		if (!(w->saving || w->unsure) || memcmp(payload, &w->next, len) != 0)
			violation(w, "the record found is neither the last one saved nor the one being saved");
		record_adopt(w);
	} else {
		w->saving = w->unsure = false;
	}
	free(payload);
	return 0;
}

static int start(struct world *w)
{
	struct err e = {0};
	int rc = load_record(w, &e);

	for (unsigned v = 0; rc == 0 && v < VOLUMES; v++)
		rc = open_volume(w, &w->vols[v], &e);
	if (rc < 0) {
		/* An open syncs too, what it has found. */
		for (unsigned v = 0; v < VOLUMES && !simstore_stopped(w->ss); v++)
			sectors_synced(w->vols[v].disk, rc);
		close_all(w);
		if (verbose)
			printf("  start fails: %s\n", e.text);
		w->start_error = e;
		return rc;
	}
	for (unsigned v = 0; v < VOLUMES; v++)
		intents_found(w, &w->vols[v]);
	w->open = true;
	for (unsigned v = 0; v < VOLUMES; v++)
		w->vols[v].disk_dead = w->vols[v].active_dead = w->vols[v].intent_dead = false;
	return 0;
}

enum crash { CRASH_NONE, CRASH_RANDOM, CRASH_ALL, CRASH_KILL, CRASH_KINDS };
static const char *const crash_names[] = {"none", "random", "all", "kill"};

/* The host dies and comes back; faults by rule stay what they are and may make the start fail, once they are over it
 * has to come up. */
static void crash(struct world *w, enum crash how)
{
	bool power = how != CRASH_KILL;

	if (verbose)
		printf("%3u %s: crash %s, fault %s\n", w->op, w->op_name, crash_names[how], simstore_fault_text(w->ss));
	simstore_stop(w->ss);
	close_all(w);
	if (power)
		simstore_power_cut(w->ss, (enum simstore_keep)how);
	else
		simstore_restart(w->ss);
	if (start(w) < 0) {
		/* The start itself may have been cut off. */
		simstore_stop_at(w->ss, 0, SIMSTORE_DONE);
		if (simstore_stopped(w->ss) && power)
			simstore_power_cut(w->ss, (enum simstore_keep)how);
		else if (simstore_stopped(w->ss))
			simstore_restart(w->ss);
		simstore_rules_clear(w->ss);
		simalloc_fail_nth(0);
		if (start(w) < 0)
			violation(w, "no start though the faults are over: %s", w->start_error.text);
	}
	simstore_rules_clear(w->ss);
	simalloc_fail_nth(0);
	check_all(w, power ? SINCE_POWER_CUT : SINCE_OPENED);
}

/* ---- operations: 0 or the error that the code under test gave ---- */

static int op_write(struct world *w)
{
	struct vol *v = &w->vols[pick(w, VOLUMES)];
	unsigned n = 1 + (unsigned)pick(w, 3), at = 0, vi = (unsigned)(v - w->vols);
	struct volume_req reqs[3] = {0};
	uint32_t stamps[3];
	uint8_t *bufs[3] = {0};

	if (w->rec.committing)
		return 0;
	for (unsigned i = 0; i < n; i++) {
		unsigned first = at + (unsigned)pick(w, 40), len = 1 + (unsigned)pick(w, pick(w, 2) ? 8 : 24);

		if (first + len > sectors_in(w) || !sectors_have_room(v->disk + first, len)) {
			n = i;
			break;
		}
		reqs[i].kind = pick(w, 3) ? VOLUME_WRITE : pick(w, 2) ? VOLUME_ZERO : VOLUME_DISCARD;
		reqs[i].off = (uint64_t)first * SECTOR_SIZE;
		reqs[i].len = (uint64_t)len * SECTOR_SIZE;
		stamps[i] = reqs[i].kind == VOLUME_WRITE ? ++w->stamps : 0;
		bufs[i] = simalloc(reqs[i].len);
		for (unsigned k = 0; k < len; k++)
			stamp_fill(bufs[i] + k * SECTOR_SIZE, vi, first + k, stamps[i]);
		reqs[i].buf = bufs[i];
		at = (first + len + 7) / 8 * 8;
	}
	int rc = n ? WATCHED(volume_write(v->v, reqs, n)) : 0;
	for (unsigned i = 0; i < n; i++) {
		/* What could not be saved was not written. */
		if (!reqs[i].save_failed)
			sectors_written(v->disk + reqs[i].off / SECTOR_SIZE, (unsigned)(reqs[i].len / SECTOR_SIZE),
					stamps[i], reqs[i].error);
		simfree(bufs[i]);
	}
	/* Over a base image its data was synced before its word, and what else lay there unsynced with it. */
	if (rc < 0 && vi == BASED)
		sectors_synced(v->disk, rc);
	return rc;
}

static int op_write_active(struct world *w)
{
	struct vol *v = &w->vols[pick(w, VOLUMES)];
	unsigned first = (unsigned)pick(w, sectors_in(w)), len = 1 + (unsigned)pick(w, 20),
		 vi = (unsigned)(v - w->vols);
	struct volume_req r = {.kind = pick(w, 3) ? VOLUME_WRITE : VOLUME_DISCARD};
	uint32_t stamp;
	uint8_t *buf;

	if (!w->rec.base || !w->rec.active_id || first + len > sectors_in(w) ||
	    !sectors_have_room(v->view + first, len))
		return 0;
	stamp = r.kind == VOLUME_WRITE ? ++w->stamps : 0;
	r.off = (uint64_t)first * SECTOR_SIZE;
	r.len = (uint64_t)len * SECTOR_SIZE;
	r.buf = buf = simalloc(r.len);
	for (unsigned k = 0; k < len; k++)
		stamp_fill(buf + k * SECTOR_SIZE, vi, first + k, stamp);
	int rc = WATCHED(volume_write_active(v->v, w->rec.base, &r));
	sectors_written(v->view + first, len, stamp, rc);
	/* Its data was synced before its word: what a sync that failed has lost does not come back. */
	if (rc < 0)
		sectors_synced(v->view, rc);
	simfree(buf);
	return rc;
}

static int sync_one(struct world *w, struct vol *v, bool active)
{
	bool *dead = active ? &v->active_dead : &v->disk_dead;
	int rc = active ? WATCHED(volume_sync_active(v->v)) : WATCHED(volume_sync(v->v));

	if (rc == 0 && *dead)
		violation(w, "a sync succeeds after one that failed");
	*dead = *dead || rc < 0;
	/* At a stop nothing is lost: there it is the power cut that decides. */
	if (rc == 0 || !simstore_stopped(w->ss))
		sectors_synced(active ? v->view : v->disk, rc);
	return rc;
}

static int op_sync(struct world *w)
{
	return sync_one(w, &w->vols[pick(w, VOLUMES)], false);
}

static int op_sync_active(struct world *w)
{
	return w->rec.active_id && w->rec.base ? sync_one(w, &w->vols[pick(w, VOLUMES)], true) : 0;
}

static int sync_disks(struct world *w)
{
	int rc = 0;

	for (unsigned v = 0; rc == 0 && v < VOLUMES; v++)
		rc = sync_one(w, &w->vols[v], false);
	return rc;
}

static void unprepare(struct world *w)
{
	for (unsigned v = 0; v < VOLUMES; v++)
		volume_unprepare(w->vols[v].v);
}

/* After a save that failed nothing goes on before it is certain which record stands: the old one is saved again, and
 * until then the files that the other names stay. */
static int op_save_again(struct world *w)
{
	struct err e = {0};
	int rc = WATCHED(meta_save(w->s, "", "record", "test", 1, &w->rec, sizeof(w->rec), true, &e));

	if (rc == 0) {
		w->unsure = false;
		unprepare(w);
	}
	return rc;
}

/* As the shell does it: files, record, memory, files. */
static int save_and_switch(struct world *w, uint64_t ckpt, bool new_view, uint64_t drop)
{
	struct err e = {0};
	int rc = 0;

	for (unsigned v = 0; rc == 0 && v < VOLUMES; v++)
		rc = WATCHED(volume_prepare(w->vols[v].v, ckpt, w->next.active_id, &e));
	if (rc == 0)
		rc = record_save(w, new_view);
	if (rc < 0) {
		if (!w->unsure)
			unprepare(w);
		return rc;
	}
	record_adopt(w);
	for (unsigned v = 0; v < VOLUMES; v++) {
		volume_switch(w->vols[v].v, ckpt, w->rec.active_id);
		if (drop)
			volume_drop(w->vols[v].v, drop);
	}
	return 0;
}

static void record_remove(struct record *r, uint64_t number)
{
	unsigned n = 0;

	for (unsigned i = 0; i < r->n_ckpts; i++) {
		if (r->ckpts[i] != number)
			r->ckpts[n++] = r->ckpts[i];
	}
	r->n_ckpts = n;
	r->ckpts[n] = 0;
}

static int op_checkpoint(struct world *w)
{
	uint64_t drop = 0;
	int rc;

	if (w->rec.committing || w->rec.max + 2 >= NUMBERS_MAX)
		return 0;
	rc = sync_disks(w);
	if (rc < 0)
		return rc;
	w->next = w->rec;
	if (w->next.n_ckpts == CKPTS_MAX) {
		drop = w->next.ckpts[0];
		record_remove(&w->next, drop);
	}
	w->next.base = w->next.ckpts[w->next.n_ckpts++] = ++w->next.max;
	w->next.active_id++;
	images_take(w, w->next.max);
	return save_and_switch(w, w->next.max, true, drop);
}

static int op_discard(struct world *w)
{
	if (w->rec.committing || !w->rec.base)
		return 0;
	w->next = w->rec;
	w->next.active_id++;
	return save_and_switch(w, 0, true, 0);
}

static int op_drop(struct world *w)
{
	uint64_t number;
	int rc = 0;

	if (w->rec.committing || w->rec.n_ckpts < 2)
		return 0;
	number = w->rec.ckpts[pick(w, w->rec.n_ckpts - 1)];
	for (unsigned v = 0; rc == 0 && v < VOLUMES; v++)
		rc = WATCHED(volume_merge_into_older(w->vols[v].v, number));
	if (rc < 0)
		return rc;
	w->next = w->rec;
	record_remove(&w->next, number);
	return save_and_switch(w, 0, false, number);
}

static int op_failover(struct world *w)
{
	uint64_t to;
	bool moves;
	int rc;

	if (w->rec.committing || !w->rec.base || w->rec.n_ckpts == CKPTS_MAX || w->rec.max + 2 >= NUMBERS_MAX)
		return 0;
	rc = sync_disks(w);
	if (rc < 0)
		return rc;
	to = pick(w, 2) ? w->rec.base : w->rec.ckpts[pick(w, w->rec.n_ckpts)];
	moves = to != w->rec.base;
	w->next = w->rec;
	w->next.received = w->next.ckpts[w->next.n_ckpts++] = ++w->next.max;
	w->next.base = to;
	w->next.committing = 1;
	w->next.active_id += moves;
	images_take(w, w->next.max);
	return save_and_switch(w, w->next.max, moves, 0);
}

static int commit_piece(struct world *w, struct vol *v, unsigned block, unsigned blocks)
{
	uint64_t off = (uint64_t)block * BLOCK_SIZE, len = (uint64_t)blocks * BLOCK_SIZE, written = 0;
	unsigned first = block * 8, end = (unsigned)min_u64(first + blocks * 8, sectors_in(w));

	if (first >= end || !sectors_have_room(v->disk + first, end - first))
		return 0;
	int rc = WATCHED(volume_commit(v->v, w->rec.base, off, len, &written));
	for (unsigned i = first; i < end; i++)
		sectors_written(v->disk + i, 1, v->view[i].now, rc);
	return rc;
}

static int op_commit(struct world *w)
{
	struct vol *v = &w->vols[pick(w, VOLUMES)];

	return w->rec.committing ? commit_piece(w, v, (unsigned)pick(w, BLOCKS_MAX), 1 + (unsigned)pick(w, 8)) : 0;
}

static int op_commit_end(struct world *w)
{
	int rc = 0;

	if (!w->rec.committing || pick(w, 3))
		return 0;
	for (unsigned v = 0; rc == 0 && v < VOLUMES; v++) {
		if (!sectors_have_room(w->vols[v].disk, sectors_in(w)))
			return op_sync(w);
		rc = commit_piece(w, &w->vols[v], 0, BLOCKS_MAX);
	}
	if (rc == 0)
		rc = sync_disks(w);
	if (rc < 0)
		return rc;
	w->next = w->rec;
	w->next.committing = 0;
	w->next.base = w->next.received = 0;
	w->next.active_id++;
	return save_and_switch(w, 0, true, 0);
}

static int op_resize(struct world *w)
{
	uint64_t size = w->rec.size + (1 + pick(w, 4)) * SECTOR_SIZE;
	int rc = 0;

	if (w->rec.committing || size > SECTORS * SECTOR_SIZE || pick(w, 4))
		return 0;
	for (unsigned v = 0; rc == 0 && v < VOLUMES; v++)
		rc = WATCHED(volume_resize(w->vols[v].v, size));
	if (rc < 0) {
		/* It syncs: what that may have lost is. */
		for (unsigned v = 0; v < VOLUMES; v++) {
			sectors_synced(w->vols[v].disk, rc);
			sectors_synced(w->vols[v].view, rc);
		}
		return rc;
	}
	w->next = w->rec;
	w->next.size = size;
	return save_and_switch(w, 0, false, 0);
}

static int op_intent(struct world *w)
{
	struct vol *v = &w->vols[pick(w, VOLUMES)];
	unsigned i = (unsigned)pick(w, INTENT_BITS);
	bool set = pick(w, 3);
	int rc;

	if (!set) {
		v->bit_durable[i] = false;
		return WATCHED(intent_write(v->intent, bit_at(i), 1, false));
	}
	/* As the core: a bit that is known to be durable is not set again. */
	if (v->bit_durable[i])
		return 0;
	rc = WATCHED(intent_write(v->intent, bit_at(i), 1, true));
	if (rc == 0)
		rc = WATCHED(intent_sync(v->intent));
	if (rc == 0 && v->intent_dead)
		violation(w, "an intent map's sync succeeds after one that failed");
	v->bit_durable[i] = rc == 0;
	return rc;
}

static int op_reap(struct world *w)
{
	for (unsigned v = 0; v < VOLUMES; v++)
		volume_reap(w->vols[v].v);
	return 0;
}

static int op_reopen(struct world *w)
{
	if (pick(w, 3))
		return 0;
	close_all(w);
	int rc = start(w);
	if (rc == 0)
		settle(w, SINCE_OPENED);
	return rc;
}

static const struct {
	const char *name;
	int (*fn)(struct world *w);
	unsigned weight;
} ops[] = {
    {"write", op_write, 30},
    {"write_active", op_write_active, 14},
    {"sync", op_sync, 8},
    {"sync_active", op_sync_active, 5},
    {"checkpoint", op_checkpoint, 10},
    {"discard", op_discard, 2},
    {"drop", op_drop, 6},
    {"failover", op_failover, 3},
    {"commit", op_commit, 10},
    {"commit_end", op_commit_end, 6},
    {"resize", op_resize, 2},
    {"intent", op_intent, 10},
    {"reap", op_reap, 3},
    {"reopen", op_reopen, 2},
};

static unsigned op_pick(struct world *w)
{
	unsigned sum = 0, at;

	for (unsigned i = 0; i < ARRAY_LEN(ops); i++)
		sum += ops[i].weight;
	at = (unsigned)pick(w, sum);
	for (unsigned i = 0;; i++) {
		if (at < ops[i].weight)
			return i;
		at -= ops[i].weight;
	}
}

/* One operation; when it stopped the host: dead until `crash`. Errors are legal only while there are faults. */
static void step(struct world *w, bool faults)
{
	unsigned which = op_pick(w);
	int rc;

	w->op++;
	w->op_name = w->unsure ? "save_again" : ops[which].name;
	rc = w->unsure ? op_save_again(w) : ops[which].fn(w);
	if (verbose)
		printf("%3u %s: %s\n", w->op, w->op_name, rc ? err_name(rc) : "ok");
	if (rc < 0 && w->open && !simstore_stopped(w->ss))
		settle(w, SINCE_WRITTEN);
	if (rc < 0 && !faults)
		violation(w, "an error without a fault: %s", err_name(rc));
}

/* ---- runs ---- */

#define BASE_SECTORS (16U * 8 + 2)

static char base_path[] = "/tmp/simbaseXXXXXX";
static struct source *base;

static void base_remove(void)
{
	(void)unlink(base_path);
}

/* Volume b's disk is one over this image, with a hole. */
static void base_make(void)
{
	static uint8_t buf[BASE_SECTORS * SECTOR_SIZE];
	struct err e;
	int fd = mkstemp(base_path);

	for (unsigned i = 0; i < BASE_SECTORS; i++)
		stamp_fill(buf + i * SECTOR_SIZE, 1, i, 1);
	PRE(pwrite(fd, buf, 5 * BLOCK_SIZE, 0) > 0);
	PRE(pwrite(fd, buf + 8 * BLOCK_SIZE, sizeof(buf) - 8 * BLOCK_SIZE, 8 * BLOCK_SIZE) > 0);
	PRE(source_open(base_path, "raw", NULL, &base, &e) == 0);
	close(fd);
	PRE(atexit(base_remove) == 0);
}

static void world_make(struct world *w, uint64_t seed)
{
	static const char *const names[] = {"a", "b"};
	uint64_t images = sizeof(*w->images);
	struct err e = {0};

	memset(w, 0, sizeof(*w));
	w->ss = simstore_new(seed);
	w->s = simstore_storage(w->ss);
	w->random = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	w->images = simalloc(NUMBERS_MAX * images);
	w->op_name = "make";
	w->stamps = 1;
	w->rec.size = SIZE_FIRST;
	w->next = w->rec;
	for (unsigned v = 0; v < VOLUMES; v++) {
		snprintf(w->vols[v].name, sizeof(w->vols[v].name), "%s", names[v]);
		for (unsigned i = 0; i < SECTORS; i++) {
			sector_is(&w->vols[v].disk[i], 0);
			sector_is(&w->vols[v].view[i], 0);
		}
		for (unsigned i = 0; v == 1 && i < BASE_SECTORS; i++)
			if (i / 8 < 5 || i / 8 >= 8) {
				sector_is(&w->vols[v].disk[i], 1);
				sector_is(&w->vols[v].view[i], 1);
			}
		struct based_args over = {.source = base, .path = base_path};
		if (volume_create_over(w->s, names[v], SIZE_FIRST, v == BASED ? &over : NULL, DURABILITY_POWER, &e) < 0)
			violation(w, "%s", e.text);
	}
	int rc = record_save(w, false);
	w->rec = w->next;
	if (rc < 0 || start(w) < 0)
		violation(w, "cannot be made");
}

static void world_free(struct world *w)
{
	close_all(w);
	simstore_free(w->ss);
	simfree(w->images);
}

/* The faults are over: after a last power cut all goes on, and what is made durable is. */
static void finish(struct world *w)
{
	simstore_rules_clear(w->ss);
	simalloc_fail_nth(0);
	simstore_stop_at(w->ss, 0, SIMSTORE_DONE);
	w->op_name = "finish";
	/* A disk whose sync has failed works again when it is opened anew. */
	close_all(w);
	if (start(w) < 0)
		violation(w, "no start though the faults are over: %s", w->start_error.text);
	settle(w, SINCE_OPENED);
	for (enum crash how = CRASH_NONE; how < CRASH_KILL; how++) {
		for (unsigned i = 0; i < 15; i++)
			step(w, false);
		w->op_name = "finish";
		check_all(w, SINCE_WRITTEN);
		crash(w, how);
	}
}

static void run_crash(uint64_t nth, enum simstore_stop how, enum crash keep)
{
	static struct world w;
	bool stopped = false;

	world_make(&w, SCRIPT_SEED);
	snprintf(w.what, sizeof(w.what), "crash:%" PRIu64 ":%d:%d", nth, how, keep);
	simstore_stop_at(w.ss, nth, how);
	simstore_reseed(w.ss, nth * 16 + (uint64_t)how * 4 + keep);
	for (unsigned i = 0; i < SCRIPT_OPS && !stopped; i++) {
		step(&w, true);
		stopped = simstore_stopped(w.ss);
	}
	if (stopped)
		crash(&w, keep);
	finish(&w);
	world_free(&w);
}

static void run_fail(uint64_t nth, int error, uint64_t times)
{
	static struct world w;
	unsigned rule, after = 0;

	world_make(&w, SCRIPT_SEED);
	snprintf(w.what, sizeof(w.what), "fail:%" PRIu64 ":%d:%" PRIu64, nth, error, times);
	rule = simstore_rule_add(w.ss, &(struct simstore_rule){SIMSTORE_ALL, NULL, error, 0, nth, times});
	for (unsigned i = 0; i < SCRIPT_OPS && after < 10; i++) {
		bool hit = simstore_rule_hits(w.ss, rule) > 0;

		step(&w, true);
		after += hit;
		if (!w.open)
			break;
	}
	finish(&w);
	world_free(&w);
}

static void run_alloc(uint64_t nth)
{
	static struct world w;

	world_make(&w, SCRIPT_SEED);
	snprintf(w.what, sizeof(w.what), "alloc:%" PRIu64, nth);
	simalloc_fail_nth(nth);
	for (unsigned i = 0; i < SCRIPT_OPS; i++) {
		step(&w, true);
		if (!w.open || simalloc_failed())
			break;
	}
	finish(&w);
	world_free(&w);
}

/* Faults by chance. */
static void faults_on(struct world *w)
{
	static const int errors[] = {ERR_IO, ERR_NOSPC};
	static const char *const paths[] = {NULL, "*.raw", "*undo*", "*active*", "record*", "*intent*"};
	struct simstore_rule r = {.error = errors[pick(w, 2)], .path = paths[pick(w, 6)]};

	r.calls = pick(w, 2) ? SIMSTORE_ALL : pick(w, 2) ? SIMSTORE_CHANGES : SIMSTORE_BIT(SIMSTORE_SYNC);
	if (pick(w, 2)) {
		r.one_in = 2 + (unsigned)pick(w, 30);
	} else {
		r.nth = 1 + pick(w, 40);
		r.times = pick(w, 3);
	}
	(void)simstore_rule_add(w->ss, &r);
}

/* Syncs of the record fail, and what would put it right again too, and soon after comes the crash: what was durable
 * must not have been overwritten while what is newer is not. */
static void record_faults(struct world *w)
{
	bool twice = pick(w, 2); /* a copy's sync, and its putting back */
	unsigned writes = twice || pick(w, 2) ? SIMSTORE_BIT(SIMSTORE_WRITE) : 0;

	simstore_rules_clear(w->ss);
	(void)simstore_rule_add(w->ss, &(struct simstore_rule){.calls = SIMSTORE_BIT(SIMSTORE_SYNC) | writes,
							       .path = "record*",
							       .error = ERR_IO,
							       .nth = twice ? 2 : 1 + pick(w, 3),
							       .times = twice ? 2 : 1 + pick(w, 3)});
	if (twice &&
	    pick(w, 2)) /* that one not in part: a save opens both to read, one to write, and this is the next */
		(void)simstore_rule_add(w->ss, &(struct simstore_rule){.calls = SIMSTORE_BIT(SIMSTORE_OPEN),
								       .path = "record*",
								       .error = ERR_IO,
								       .nth = 4,
								       .times = 1});
	else if (pick(w, 3) == 0) /* nor can one of the copies be read, perhaps not before the next start */
		(void)simstore_rule_add(
		    w->ss, &(struct simstore_rule){.calls = SIMSTORE_BIT(SIMSTORE_OPEN) | SIMSTORE_BIT(SIMSTORE_READ),
						   .path = pick(w, 2) ? "record.a" : "record.b",
						   .error = ERR_IO,
						   .nth = 1 + pick(w, 4),
						   .times = 1 + pick(w, 3)});
	if (!twice) /* else when that is saved again */
		simstore_stop_at(w->ss, 1 + pick(w, 14), pick(w, 3));
}

/* Some saves into the view's overlay fail half way; what is written there next has to take away what they left. */
static void view_faults(struct world *w)
{
	simstore_rules_clear(w->ss);
	(void)simstore_rule_add(
	    w->ss, &(struct simstore_rule){.calls = SIMSTORE_BIT(SIMSTORE_SYNC) | SIMSTORE_BIT(SIMSTORE_WRITE),
					   .path = pick(w, 2) ? "*active*" : "*active*.map",
					   .error = ERR_IO,
					   .nth = 1 + pick(w, 4),
					   .times = 1 + pick(w, 2)});
}

static void run_seed(uint64_t seed)
{
	static struct world w;

	world_make(&w, seed);
	snprintf(w.what, sizeof(w.what), "seed:%" PRIu64, seed);
	for (unsigned i = 0; i < 200; i++) {
		uint64_t what = pick(&w, 40);

		if (what == 0) {
			simstore_rules_clear(w.ss);
			faults_on(&w);
		} else if (what == 1) {
			simstore_stop_at(w.ss, 1 + pick(&w, 30), pick(&w, 3));
		} else if (what == 2) {
			simstore_rules_clear(w.ss);
		} else if (what <= 4) {
			record_faults(&w);
		} else if (what <= 6) {
			view_faults(&w);
		}
		if (w.unsure && pick(&w, 4)) /* the crash comes while what failed is saved again */
			simstore_stop_at(w.ss, 1 + pick(&w, 3), pick(&w, 3));
		step(&w, true);
		if (simstore_stopped(w.ss) || !w.open || pick(&w, 60) == 0)
			crash(&w, (enum crash)pick(&w, CRASH_KINDS));
	}
	finish(&w);
	world_free(&w);
}

/* How many changing calls, calls and allocations the script makes. */
static void script_counts(uint64_t *changes, uint64_t *calls, uint64_t *allocs)
{
	static struct world w;
	const struct simstore_counters *c;
	uint64_t began, calls_made = 0, changes_made;

	world_make(&w, SCRIPT_SEED);
	snprintf(w.what, sizeof(w.what), "script");
	c = simstore_counters(w.ss);
	began = simalloc_counted();
	changes_made = c->changes;
	for (unsigned i = 0; i < SIMSTORE_CALLS; i++)
		calls_made += c->calls[i];
	for (unsigned i = 0; i < SCRIPT_OPS; i++)
		step(&w, false);
	*changes = c->changes - changes_made;
	*calls = 0;
	for (unsigned i = 0; i < SIMSTORE_CALLS; i++)
		*calls += c->calls[i];
	*calls -= calls_made;
	*allocs = simalloc_counted() - began;
	check_all(&w, SINCE_WRITTEN);
	finish(&w);
	world_free(&w);
}

struct options {
	bool crash, fail, alloc, all;
	uint64_t stride, offset, seeds;
};

static void crash_points(const struct options *o, uint64_t changes)
{
	uint64_t runs = 0;

	for (uint64_t n = 1 + o->offset; n <= changes; n += o->stride) {
		for (unsigned how = SIMSTORE_NOT_DONE; how <= SIMSTORE_DONE; how++) {
			for (unsigned keep = 0; keep < CRASH_KINDS; keep++) {
				run_crash(n, how, keep);
				runs++;
			}
		}
	}
	printf("crash points: %" PRIu64 " of %" PRIu64 " changing calls, %" PRIu64 " runs\n",
	       changes ? (changes - 1 - o->offset) / o->stride + 1 : 0, changes, runs);
}

static void fail_points(const struct options *o, uint64_t calls)
{
	static const int errors[] = {ERR_IO, ERR_NOSPC};
	uint64_t runs = 0;

	for (uint64_t n = 1 + o->offset; n <= calls; n += o->stride) {
		for (unsigned e = 0; e < 2; e++) {
			run_fail(n, errors[e], 1);
			run_fail(n, errors[e], 0);
			runs += 2;
		}
	}
	printf("fail points: every %" PRIu64 "th of %" PRIu64 " calls, %" PRIu64 " runs\n", o->stride, calls, runs);
}

static void alloc_points(const struct options *o, uint64_t allocs)
{
	uint64_t runs = 0;

	for (uint64_t n = 1 + o->offset; n <= allocs; n += o->stride) {
		run_alloc(n);
		runs++;
	}
	printf("alloc points: every %" PRIu64 "th of %" PRIu64 " allocations, %" PRIu64 " runs\n", o->stride, allocs,
	       runs);
}

static int replay(const char *what)
{
	uint64_t n = 0, times = 0;
	int a = 0, b = 0;

	verbose = true;
	if (sscanf(what, "crash:%" SCNu64 ":%d:%d", &n, &a, &b) == 3)
		run_crash(n, (enum simstore_stop)a, (enum crash)b);
	else if (sscanf(what, "fail:%" SCNu64 ":%d:%" SCNu64, &n, &a, &times) == 3)
		run_fail(n, a, times);
	else if (sscanf(what, "alloc:%" SCNu64, &n) == 1)
		run_alloc(n);
	else if (sscanf(what, "seed:%" SCNu64, &n) == 1)
		run_seed(n);
	else
		return 2;
	return 0;
}

static uint64_t number_arg(int argc, char **argv, int *i)
{
	return *i + 1 < argc ? strtoull(argv[++*i], NULL, 10) : 0;
}

int main(int argc, char **argv)
{
	filecache_limit(3);
	base_make();
	struct options o = {.stride = 0};
	uint64_t changes, calls, allocs;
	bool any;

	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--crash-points") == 0)
			o.crash = true;
		else if (strcmp(argv[i], "--fail-points") == 0)
			o.fail = true;
		else if (strcmp(argv[i], "--alloc-points") == 0)
			o.alloc = true;
		else if (strcmp(argv[i], "--long") == 0)
			o.all = true;
		else if (strcmp(argv[i], "--seeds") == 0)
			o.seeds = number_arg(argc, argv, &i);
		else if (strcmp(argv[i], "--stride") == 0)
			o.stride = number_arg(argc, argv, &i);
		else if (strcmp(argv[i], "--offset") == 0)
			o.offset = number_arg(argc, argv, &i);
		else if (strcmp(argv[i], "--replay") == 0 && i + 1 < argc)
			return replay(argv[++i]);
		else {
			fprintf(stderr, "sim_image: %s? see the top of tests/sim/sim_image.c\n", argv[i]);
			return 2;
		}
	}
	any = o.crash || o.fail || o.alloc || o.seeds;
	if (!any) {
		o.crash = o.fail = o.alloc = true;
		o.seeds = o.all ? 5000 : 300;
	}
	if (!o.stride)
		o.stride = o.all || any ? 1 : 37;
	script_counts(&changes, &calls, &allocs);
	for (uint64_t seed = 1; seed <= o.seeds; seed++)
		run_seed(seed);
	if (o.seeds)
		printf("seeds: %" PRIu64 "\n", o.seeds);
	if (o.crash)
		crash_points(&o, changes);
	if (o.fail)
		fail_points(&o, calls);
	if (o.alloc)
		alloc_points(&o, allocs);
	return 0;
}
