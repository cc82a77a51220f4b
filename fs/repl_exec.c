/* The replication core's requests on volumes, intent maps and the group's record (fs/repl_exec.h). */
#include "fs/repl_exec.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"

/* ---- opening ---- */

static int open_volume(struct repl_exec *x, const struct repl_meta *m, uint32_t i, struct err *e)
{
	const char *name = m->volumes[i].name;
	uint64_t size = m->volumes[i].size;
	bool power = store_info(x->store)->durability == DURABILITY_POWER;
	int err = store_open_volume(x->store, m, i, &x->vols[i], e);
	if (!err)
		err = intent_open(store_storage(x->store), name, size,
				  (power ? INTENT_DURABLE : 0U) | (m->has_peer && !m->fresh ? INTENT_NEW_SET : 0U),
				  &x->intents[i], e);
	if (!err)
		err = changed_open(store_storage(x->store), name, size, power, m->role == ROLE_PRIMARY && m->has_peer,
				   &x->changed[i], e);
	if (err)
		return err;
	x->maps[i] = calloc(1, repl_volume_bytes(size));
	return x->maps[i] ? 0 : err_set(e, ERR_NOMEM, "out of memory for the maps of volume %s", name);
}

int repl_exec_open(struct repl_exec *x, struct store *st, const struct repl_meta *m, struct err *e)
{
	int err = 0;
	x->store = st;
	x->usage_version = 0;
	for (uint32_t i = 0; i < m->n_volumes && !err; i++) {
		x->n_vols = i + 1;
		err = open_volume(x, m, i, e);
	}
	return err;
}

void repl_exec_close(struct repl_exec *x)
{
	for (uint32_t i = 0; i < x->n_vols; i++) {
		volume_close(x->vols[i]);
		intent_close(x->intents[i]);
		changed_close(x->changed[i]);
		free(x->maps[i]);
	}
	x->n_vols = 0;
}

int repl_exec_load_intents(struct repl_exec *x, struct err *e)
{
	int err = 0;
	for (uint32_t i = 0; i < x->n_vols && !err; i++) {
		uint64_t n = units_of(volume_size(x->vols[i]), INTENT_SHIFT);
		_cleanup_free_ void *mem = calloc(1, bitmap_bytes(n));
		if (mem == NULL)
			return err_set(e, ERR_NOMEM, "out of memory for the write-intent map");
		struct bitmap b;
		bitmap_init(&b, n, mem);
		intent_load(x->intents[i], &b);
		bool clean = intent_load_fine(x->intents[i], &repl_volume_state(x->core, i)->dirty);
		repl_load_intent(x->core, i, &b, clean);
		/* What was marked and reached no file has its intent bit; a clean end left nothing of the kind. */
		for (uint64_t first, end = 0; !clean && bitmap_next_run(&b, end, &first, &end);)
			changed_mark(x->changed[i], first << INTENT_SHIFT, (end - first) << INTENT_SHIFT);
		err = intent_begin(x->intents[i], e);
	}
	return err;
}

int repl_exec_flush_changed(struct repl_exec *x)
{
	int first = 0;
	mutex_lock(x->lock);
	struct settings keep = repl_meta(x->core)->settings;
	mutex_unlock(x->lock);
	for (uint32_t i = 0; i < x->n_vols; i++) {
		int err = changed_flush(x->changed[i], &keep);
		first = first ? first : err;
	}
	return first;
}

void repl_exec_forget_changed(struct repl_exec *x, const struct repl_meta *m)
{
	if (m->role == ROLE_PRIMARY && m->has_peer)
		return;
	/* One whose files can't be removed is never asked again while this daemon runs. */
	for (uint32_t i = 0; i < x->n_vols; i++)
		(void)changed_drop(x->changed[i]);
}

int repl_exec_end(struct repl_exec *x)
{
	int first = repl_exec_flush_changed(x);
	for (uint32_t i = 0; !first && i < x->n_vols && repl_meta(x->core)->has_peer; i++) {
		int err = intent_end(x->intents[i], &repl_volume_state(x->core, i)->dirty);
		first = first ? first : err;
	}
	return first;
}

/* ---- making ---- */

void repl_exec_unmake(struct store *st, const struct repl_meta *m)
{
	/* Without their folders a record that is still there, or comes back with a power cut, would keep the store from
	 * being used. With them it is a group that was made; if no record names them the next store_open removes them.
	 */
	int err = store_delete_group(st, m->group, NULL);
	for (uint32_t i = 0; (!err || err == -ERR_NOENT) && i < m->n_volumes; i++)
		(void)volume_delete(store_storage(st), m->volumes[i].name, NULL);
}

/* The store may have a group that the caller does not know: one that a verb had out and that could not be taken up
 * again. A record of that name, one that can't be read too, is not ours to save over, nor to delete with what failed.
 */
static int check_no_group(struct store *st, const char *group, struct err *e)
{
	struct repl_meta *there = NULL;
	int err = store_load_group(st, group, &there, e);
	free(there);
	if (err == -ERR_NOENT)
		return 0;
	return err ? err
		   : err_set(e, ERR_EXIST,
			     "store %s has group %s already, which repfs does not serve; start repfs anew there",
			     store_path(st), group);
}

/* Crash order: folders, then the record that names them. */
int repl_exec_make(struct store *st, const struct wire_join *j, struct repl_meta *m, struct err *e)
{
	struct store_making making[GROUP_VOLUMES_MAX];
	uint32_t begun = 0;
	int err = check_no_group(st, j->group, e);
	if (err)
		return err;
	repl_meta_init(m, j->group);
	memcpy(m->uuid, j->group_uuid, sizeof(m->uuid));
	m->role = ROLE_SECONDARY;
	m->inconsistent = m->fresh = m->has_peer = true;
	m->settings = j->settings;
	while (m->n_volumes < j->n_volumes && !err) {
		struct repl_volume *v = &m->volumes[m->n_volumes];
		*v = j->volumes[m->n_volumes];
		v->flags = 0; /* of the peer's disk */
		store_making_begin(st, &making[begun++], v->name);
		err = volume_create(store_storage(st), v->name, v->size, store_info(st)->durability, e);
		m->n_volumes += !err;
	}
	if (!err)
		err = store_save_group(st, m, e);
	if (err)
		repl_exec_unmake(st, m);
	while (begun > 0)
		store_making_end(st, &making[--begun]);
	return err;
}

/* ---- hashes ---- */

/* One for each region, behind the 8 bytes of the seed (docs/protocol.md, HASH). */
static int hash_range(struct repl_exec *x, const struct repl_io *io, uint64_t seed, uint8_t *out)
{
	_cleanup_free_ uint8_t *buf = malloc(io->len);
	if (buf == NULL)
		return -ERR_NOMEM;
	int err = volume_read_disk(x->vols[io->volume], io->off, io->len, buf);
	for (uint64_t at = 0; at < io->len && !err; at += WIRE_HASH_REGION, out += WIRE_HASH_SIZE) {
		XXH128_hash_t h = XXH3_128bits_withSeed(buf + at, min_u64(io->len - at, WIRE_HASH_REGION), seed);
		XXH128_canonicalFromHash((XXH128_canonical_t *)out, h);
	}
	return err;
}

static int hash_for_resync(struct repl_exec *x, struct repl_io *io)
{
	uint8_t *out = malloc(8 + WIRE_HASH_SIZE * units_of(io->len, WIRE_HASH_SHIFT));
	if (out == NULL)
		return -ERR_NOMEM;
	put_u64(out, io->hash_seed);
	int err = hash_range(x, io, io->hash_seed, out + 8);
	if (err)
		free(out);
	else
		io->payload = out;
	return err;
}

/* What can't be read here differs: the resync writes it. */
static void hash_compare(struct repl_exec *x, struct repl_io *io)
{
	const uint8_t *theirs = (const uint8_t *)io->payload + 8;
	uint8_t mine[WIRE_HASH_SIZE * WIRE_HASH_REGIONS_MAX];
	int err = hash_range(x, io, get_u64(io->payload), mine);
	io->ext_len = 0;
	for (uint64_t i = 0; i < units_of(io->len, WIRE_HASH_SHIFT); i++)
		if (err || memcmp(mine + i * WIRE_HASH_SIZE, theirs + i * WIRE_HASH_SIZE, WIRE_HASH_SIZE) != 0)
			io->ext_len |= UINT64_C(1) << i;
}

/* ---- verify ---- */

/* Whole, or block by block: those that can't be read get a bit in *bad, and zeroes. */
static void read_blocks(struct repl_exec *x, const struct repl_io *io, uint8_t *buf, uint64_t bad[static 2])
{
	bad[0] = bad[1] = 0;
	volume_forget(x->vols[io->volume], io->off, io->len);
	if (volume_read_disk(x->vols[io->volume], io->off, io->len, buf) == 0)
		return;
	for (uint64_t at = 0, i = 0; at < io->len; at += BLOCK_SIZE, i++) {
		uint64_t n = min_u64(io->len - at, BLOCK_SIZE);
		if (volume_read_disk(x->vols[io->volume], io->off + at, n, buf + at) == 0)
			continue;
		memset(buf + at, 0, n);
		bad[i / 64] |= UINT64_C(1) << i % 64;
	}
}

static void hash_block(const uint8_t *buf, uint64_t len, uint64_t seed, uint8_t out[WIRE_HASH_SIZE])
{
	XXH128_canonicalFromHash((XXH128_canonical_t *)out, XXH3_128bits_withSeed(buf, len, seed));
}

/* The payload of a VERIFY: seed, and a hash for each block. */
static int verify_hash(struct repl_exec *x, struct repl_io *io)
{
	_cleanup_free_ uint8_t *buf = malloc(io->len);
	uint8_t *out = malloc(8 + WIRE_HASH_SIZE * units_of(io->len, WIRE_VERIFY_SHIFT));
	if (buf == NULL || out == NULL) {
		free(out);
		return -ERR_NOMEM;
	}
	read_blocks(x, io, buf, io->bad);
	put_u64(out, io->hash_seed);
	io->payload = out;
	out += 8;
	for (uint64_t at = 0; at < io->len; at += WIRE_VERIFY_BLOCK, out += WIRE_HASH_SIZE)
		hash_block(buf + at, min_u64(io->len - at, WIRE_VERIFY_BLOCK), io->hash_seed, out);
	return 0;
}

/* The ranges of an answer. Neighbours of a kind are one; when there is no room left, the last one grows over what is
 * still found. */
struct answer {
	struct wire_verify_range r[WIRE_VERIFY_RANGES_MAX];
	uint32_t n;
};

static void answer_add(struct answer *a, uint64_t off, uint64_t len, enum wire_verify_problem problem)
{
	struct wire_verify_range *last = a->n ? &a->r[a->n - 1] : NULL;
	if (last && ((last->problem == problem && last->off + last->len == off) || a->n == WIRE_VERIFY_RANGES_MAX))
		last->len = off + len - last->off;
	else
		a->r[a->n++] = (struct wire_verify_range){off, len, problem};
}

static void compare_hashes(struct repl_exec *x, const struct repl_io *io, uint8_t *buf, struct answer *a)
{
	const uint8_t *theirs = (const uint8_t *)io->payload + 8;
	uint64_t seed = get_u64(io->payload), bad[2], i = 0;
	read_blocks(x, io, buf, bad);
	for (uint64_t at = 0; at < io->len; at += WIRE_VERIFY_BLOCK, theirs += WIRE_HASH_SIZE, i++) {
		uint64_t n = min_u64(io->len - at, WIRE_VERIFY_BLOCK);
		uint8_t mine[WIRE_HASH_SIZE];
		hash_block(buf + at, n, seed, mine);
		if (bad[i / 64] >> i % 64 & 1)
			answer_add(a, io->off + at, n, WIRE_VERIFY_UNREADABLE);
		else if (memcmp(mine, theirs, WIRE_HASH_SIZE) != 0)
			answer_add(a, io->off + at, n, WIRE_VERIFY_DIFFERS);
	}
}

static bool all_zero(const uint8_t *buf, uint64_t len)
{
	return len == 0 || (buf[0] == 0 && memcmp(buf, buf + 1, len - 1) == 0);
}

/* What the source has zeroes for: only data is read. */
static void compare_zeroes(struct repl_exec *x, const struct repl_io *io, uint8_t *buf, struct answer *a)
{
	for (uint64_t off = io->off, end = io->off + io->len, n; off < end; off += n) {
		struct extent ext = {off, end - off, true};
		if (volume_extent(x->vols[io->volume], LAYER_DISK, 0, off, &ext) < 0)
			ext = (struct extent){off, end - off, true}; /* then the reads tell */
		n = min_u64(ext.off + ext.len, end) - off;
		if (!ext.data)
			continue;
		n = min_u64(n, WIRE_VERIFY_BLOCK - off % WIRE_VERIFY_BLOCK);
		if (volume_read_disk(x->vols[io->volume], off, n, buf) < 0)
			answer_add(a, off, n, WIRE_VERIFY_UNREADABLE);
		else if (!all_zero(buf, n))
			answer_add(a, off, n, WIRE_VERIFY_DIFFERS);
	}
}

/* Of the peer's stream. Without memory nothing can be said of the range: as if it could not be read. */
static void verify_compare(struct repl_exec *x, struct repl_io *io)
{
	_cleanup_free_ uint8_t *buf = malloc(io->hole ? WIRE_VERIFY_BLOCK : io->len);
	struct answer a = {.n = 0};
	if (buf == NULL)
		answer_add(&a, io->off, io->len, WIRE_VERIFY_UNREADABLE);
	else if (io->hole)
		compare_zeroes(x, io, buf, &a);
	else
		compare_hashes(x, io, buf, &a);
	free(io->payload);
	io->payload = NULL;
	io->ext_len = 0;
	if (a.n == 0)
		return;
	uint8_t *out = io->payload = malloc((size_t)a.n * WIRE_VERIFY_RANGE_SIZE);
	for (uint32_t i = 0; out && i < a.n; i++)
		wire_verify_range_put(out + (size_t)i * WIRE_VERIFY_RANGE_SIZE, &a.r[i]);
	io->ext_len = (uint64_t)a.n * WIRE_VERIFY_RANGE_SIZE; /* without memory for it the session ends */
}

/* ---- growing ---- */

/* No room: the filesystem has no files that large, a limit stands against it, or the volume would be larger than all of
 * the filesystem. A hole needs no room now, so what is free now says nothing. */
static int grow_file(struct repl_exec *x, const struct repl_io *io)
{
	struct volume *v = x->vols[io->volume];
	uint64_t room, total;
	int err = 0;
	if (io->arg > volume_size(v))
		err = storage_free_bytes(store_storage(x->store), &room, &total);
	if (!err && io->arg > volume_size(v) && io->arg > total)
		err = -ERR_NOSPC;
	return err ? err : volume_extend(v, io->arg);
}

static int resize_barrier(struct repl_exec *x, struct repl_io *io)
{
	int err = repl_exec_sync_disks(x, &io->failed);
	io->ext_len = 0;
	if (!err && io->arg > volume_size(x->vols[io->volume]))
		io->ext_len = (uint64_t)-grow_file(x, io);
	return err;
}

static void grown_free(struct repl_exec *x)
{
	for (uint32_t i = 0; i < x->n_vols; i++) {
		if (x->grown[i])
			volume_ungrow(x->vols[i]);
		free(x->grown[i]);
		x->grown[i] = NULL;
	}
}

/* All that may fail of the volumes that m has larger, before the record says so. */
static int grow_prepare(struct repl_exec *x, const struct repl_meta *m, struct err *e)
{
	int err = 0;
	for (uint32_t i = 0; i < x->n_vols && !err; i++) {
		uint64_t size = m->volumes[i].size;
		if (size <= volume_size(x->vols[i]))
			continue;
		x->grown[i] = calloc(1, repl_volume_bytes(size));
		err = x->grown[i] ? volume_grow_prepare(x->vols[i], size) : -ERR_NOMEM;
		if (!err)
			err = intent_grow_prepare(x->intents[i], size);
		if (err)
			(void)err_set(e, -err, "volume %s can't grow to %llu bytes: %s", m->volumes[i].name,
				      (unsigned long long)size, err_short(err));
	}
	if (err)
		grown_free(x);
	return err;
}

void *const *repl_exec_grow(struct repl_exec *x)
{
	for (uint32_t i = 0; i < x->n_vols; i++) {
		if (!x->grown[i])
			continue;
		volume_grow(x->vols[i]);
		intent_grow(x->intents[i]);
	}
	return x->grown;
}

bool repl_exec_grown(struct repl_exec *x)
{
	bool any = false;
	for (uint32_t i = 0; i < x->n_vols; i++) {
		if (!x->grown[i])
			continue;
		free(x->maps[i]);
		x->maps[i] = x->grown[i];
		x->grown[i] = NULL;
		any = true;
	}
	return any;
}

/* One step: so much is read under the volume's locks, and between two questions of the peer. */
#define SCRUB_STEP (UINT64_C(1) << 20)

static int scrub(struct repl_exec *x, struct repl_io *io)
{
	struct wire_scrubbed *w = io->scrub;
	struct volume_scrub s = {.layer = w->next_layer, .off = w->next_off};
	volume_scrub(x->vols[io->volume], &s, SCRUB_STEP);
	io->scrub_end = s.end;
	*w = (struct wire_scrubbed){
	    .next_layer = s.layer, .next_off = s.off, .bytes = s.bytes, .left = s.left, .n = s.n};
	for (uint32_t i = 0; i < s.n; i++)
		w->bad[i] =
		    (struct wire_scrub_bad){s.bad[i].layer, s.bad[i].off, s.bad[i].len, s.bad[i].error != -ERR_CORRUPT};
	return 0;
}

/* ---- writes, flushes ---- */

static struct volume_req req_of(const struct repl_io *io, const void *buf)
{
	struct volume_req q = {.off = io->off, .len = io->len};
	q.kind = io->kind == REPL_WRITE ? VOLUME_WRITE : io->kind == REPL_ZERO ? VOLUME_ZERO : VOLUME_DISCARD;
	if (io->kind == REPL_WRITE)
		q.buf = buf;
	return q;
}

/* Of a resync: only what does not read as zeroes already is changed, so that a copy that is equal costs no undo blocks.
 */
static int resync_zero(struct repl_exec *x, struct repl_io *io)
{
	struct volume *v = x->vols[io->volume];
	_cleanup_free_ uint8_t *buf = NULL;
	int err = 0;
	io->save_failed = false;
	for (uint64_t off = io->off, end = io->off + io->len; off < end && !err;) {
		struct extent ext;
		if ((err = volume_extent(v, LAYER_DISK, 0, off, &ext)) < 0)
			return err;
		uint64_t n = min_u64(ext.off + ext.len, end) - off;
		if (ext.data) {
			n = min_u64(n, REGION_SIZE);
			if (buf == NULL && (buf = malloc(REGION_SIZE)) == NULL)
				return -ERR_NOMEM;
			struct volume_req q = {.kind = VOLUME_ZERO, .off = off, .len = n};
			/* What can't be read is no reason not to overwrite it. */
			if (volume_read_disk(v, off, n, buf) < 0 || !all_zero(buf, n)) {
				err = volume_write(v, &q, 1);
				io->save_failed = q.save_failed;
			}
		}
		off += n;
	}
	return err;
}

bool repl_exec_is_apply(const struct repl_io *io)
{
	return io->target == TARGET_DISK &&
	       (io->kind == REPL_WRITE || io->kind == REPL_ZERO || io->kind == REPL_DISCARD || io->kind == REPL_HASH ||
		io->kind == REPL_VERIFY);
}

void repl_exec_apply(struct repl_exec *x, struct repl_io *const *ios, unsigned n, int *errors)
{
	struct volume_req reqs[VOLUME_BATCH_MAX];
	unsigned at[VOLUME_BATCH_MAX], k = 0;
	PRE(n > 0 && n <= VOLUME_BATCH_MAX);
	for (unsigned i = 0; i < n; i++) {
		errors[i] = 0;
		if (ios[i]->kind == REPL_HASH) {
			hash_compare(x, ios[i]);
			continue;
		}
		if (ios[i]->kind == REPL_VERIFY) {
			verify_compare(x, ios[i]);
			continue;
		}
		if (ios[i]->resync && ios[i]->kind == REPL_ZERO) {
			errors[i] = resync_zero(x, ios[i]);
			continue;
		}
		reqs[k] = req_of(ios[i], ios[i]->payload);
		at[k++] = i;
	}
	if (k)
		(void)volume_write(x->vols[ios[0]->volume], reqs, k);
	for (unsigned i = 0; i < k; i++) {
		ios[at[i]]->save_failed = reqs[i].save_failed;
		errors[at[i]] = reqs[i].error;
	}
}

int repl_exec_sync_disks(struct repl_exec *x, uint64_t *ret_failed)
{
	int first = 0;
	uint64_t failed = 0;
	mutex_lock(x->lock);
	uint64_t skip = repl_unsynced(x->core);
	mutex_unlock(x->lock);
	for (uint32_t i = 0; i < x->n_vols; i++) {
		int err = skip >> i & 1 ? 0 : volume_sync(x->vols[i]);
		first = first ? first : err;
		failed |= err ? UINT64_C(1) << i : 0;
	}
	if (ret_failed)
		*ret_failed = failed;
	return first;
}

int repl_exec_sync_actives(struct repl_exec *x)
{
	int first = repl_exec_sync_disks(x, NULL);
	for (uint32_t i = 0; i < x->n_vols; i++) {
		int err = volume_sync_active(x->vols[i]);
		first = first ? first : err;
	}
	return first;
}

uint64_t repl_exec_active_bytes(struct repl_exec *x)
{
	uint64_t n = 0;
	for (uint32_t i = 0; i < x->n_vols; i++)
		n += volume_active_blocks(x->vols[i]) * BLOCK_SIZE;
	return n;
}

/* ---- usage ---- */

/* 0: what left the chains is still on the disk, and what is free says little. */
static uint64_t usage_version(struct repl_exec *x)
{
	uint64_t sum = 0;
	for (uint32_t i = 0; i < x->n_vols; i++) {
		uint64_t v = volume_history_version(x->vols[i]);
		if (v == 0)
			return 0;
		sum += v;
	}
	return sum;
}

struct usage_arg {
	struct repl_usage *u;
	uint32_t at;
};

static void add_usage(void *arg, uint64_t ckpt, uint64_t bytes)
{
	struct usage_arg *a = arg;
	struct repl_usage *u = a->u;
	while (a->at < u->n && u->numbers[a->at] < ckpt)
		a->at++;
	if (a->at < u->n && u->numbers[a->at] == ckpt) {
		u->bytes[a->at] += bytes;
	} else if (a->at == u->n && u->n < GROUP_CKPTS_MAX) {
		u->numbers[u->n] = ckpt;
		u->bytes[u->n++] = bytes;
	} /* else: this volume's chain has one more by now; the version tells */
}

void repl_exec_look_usage(struct repl_exec *x)
{
	_cleanup_free_ struct repl_usage *u = malloc(sizeof(*u));
	uint64_t version = usage_version(x), total;
	if (u == NULL || version == 0)
		return;
	u->n = 0;
	for (uint32_t i = 0; i < x->n_vols; i++) {
		struct usage_arg a = {u, 0};
		volume_history(x->vols[i], add_usage, &a);
	}
	if (storage_free_bytes(store_storage(x->store), &u->free_bytes, &total) != 0)
		u->free_bytes = UINT64_MAX;
	mutex_lock(x->lock);
	if (version == usage_version(x)) {
		x->usage.n = u->n;
		x->usage.free_bytes = u->free_bytes;
		memcpy(x->usage.numbers, u->numbers, u->n * sizeof(u->numbers[0]));
		memcpy(x->usage.bytes, u->bytes, u->n * sizeof(u->bytes[0]));
		x->usage_version = version;
	}
	mutex_unlock(x->lock);
}

bool repl_exec_usage_known(struct repl_exec *x)
{
	return x->usage_version && x->usage_version == usage_version(x);
}

static int sync_for_checkpoint(struct repl_exec *x, struct repl_io *io)
{
	int err = 0;
	if (store_info(x->store)->durability == DURABILITY_POWER)
		err = repl_exec_sync_disks(x, NULL);
	io->ext_len = repl_exec_active_bytes(x);
	io->hole = false;
	for (uint32_t i = 0; i < x->n_vols; i++)
		io->hole = io->hole || volume_active_unsure(x->vols[i]);
	return err;
}

/* ---- intent bits ---- */

void repl_exec_set_intents(struct repl_exec *x, const struct repl_io *first, int errors[static GROUP_VOLUMES_MAX])
{
	bool used[GROUP_VOLUMES_MAX] = {false};
	memset(errors, 0, GROUP_VOLUMES_MAX * sizeof(errors[0]));
	for (const struct repl_io *io = first; io; io = io->next_shell) {
		int err = intent_write(x->intents[io->volume], io->mark_first, io->mark_units, true);
		errors[io->volume] = errors[io->volume] ? errors[io->volume] : err;
		used[io->volume] = true;
	}
	for (uint32_t i = 0; i < x->n_vols; i++)
		if (used[i] && !errors[i])
			errors[i] = intent_sync(x->intents[i]);
}

static int set_intent(struct repl_exec *x, const struct repl_io *io)
{
	struct intent *t = x->intents[io->volume];
	int err = intent_write(t, io->mark_first, io->mark_units, true);
	return err ? err : intent_sync(t);
}

/* Writes all runs of set bits of `b`, which does not change before this is done. */
static int write_intents(struct repl_exec *x, uint32_t vol, const struct bitmap *b, bool set)
{
	int err = 0;
	for (uint64_t at, end = 0; !err && bitmap_next_run(b, end, &at, &end);)
		err = intent_write(x->intents[vol], at, end - at, set);
	return err || !set ? err : intent_sync(x->intents[vol]);
}

static int all_intents(struct repl_exec *x, bool set)
{
	int err = 0;
	for (uint32_t i = 0; i < x->n_vols && !err; i++) {
		struct repl_volume_state *v = repl_volume_state(x->core, i);
		err = write_intents(x, i, set ? &v->marking : &v->clearing, set);
	}
	return err;
}

static int scan(struct repl_exec *x, struct repl_io *io)
{
	struct extent ext;
	uint64_t at = io->off, end = io->off + io->len;
	int err = volume_extent(x->vols[io->volume], LAYER_DISK, 0, at, &ext);
	if (err)
		return err;
	io->hole = !ext.data;
	io->ext_len = min_u64(ext.off + ext.len, end) - at;
	while (at + io->ext_len < end) { /* joined as far as it is one kind */
		if ((err = volume_extent(x->vols[io->volume], LAYER_DISK, 0, at + io->ext_len, &ext)) < 0)
			return err;
		if (ext.data == io->hole)
			break;
		io->ext_len = min_u64(ext.off + ext.len, end) - at;
	}
	return 0;
}

static int read_for_resync(struct repl_exec *x, struct repl_io *io)
{
	io->payload = malloc(io->len);
	if (io->payload == NULL)
		return -ERR_NOMEM;
	int err = volume_read_disk(x->vols[io->volume], io->off, io->len, io->payload);
	if (err) {
		free(io->payload);
		io->payload = NULL;
	}
	return err;
}

struct mark_arg {
	struct repl_exec *x;
	uint32_t volume;
	uint64_t bytes;
};

static void mark_run(void *arg, uint64_t off, uint64_t len)
{
	struct mark_arg *m = arg;
	repl_mark(m->x->core, m->volume, off, len);
}

static void count_run(void *arg, uint64_t off, uint64_t len)
{
	(void)off;
	((struct mark_arg *)arg)->bytes += len;
}

/* No request is under way that could move the overlays, so the lock is held for the walk over their bitmaps only. */
static int mark(struct repl_exec *x, struct repl_io *io)
{
	struct mark_arg m = {.x = x};
	int err = 0;
	mutex_lock(x->lock);
	const struct repl_meta *meta = repl_meta(x->core);
	uint64_t from = io->arg ? io->arg : meta->n_ckpts ? meta->ckpts[0].number : 0;
	for (m.volume = 0; m.volume < x->n_vols && !err; m.volume++) {
		struct volume *v = x->vols[m.volume];
		if (from)
			err = volume_changed(v, from, 0, true, mark_run, &m);
		if (from && !err)
			err = volume_changed(v, from, 0, false, count_run, &m);
	}
	mutex_unlock(x->lock);
	io->ext_len = m.bytes;
	io->hole = repl_exec_active_bytes(x) != 0;
	return err ? err : all_intents(x, true);
}

static int commit(struct repl_exec *x, struct repl_io *io)
{
	uint64_t base, written = 0;
	mutex_lock(x->lock);
	base = repl_meta(x->core)->base;
	mutex_unlock(x->lock);
	return volume_commit(x->vols[io->volume], base, io->off, io->len, &written);
}

/* Whether merging checkpoint `number` away frees room, and what it copies before it frees any fits. */
static int merge_helps(struct repl_exec *x, uint64_t number)
{
	uint64_t copies = 0, frees = 0, room = 0, total;
	for (uint32_t i = 0; i < x->n_vols; i++) {
		uint64_t c, f;
		volume_merge_cost(x->vols[i], number, &c, &f);
		copies += c;
		frees += f;
	}
	if (copies) {
		int err = storage_free_bytes(store_storage(x->store), &room, &total);
		if (err)
			return err;
	}
	return frees && copies <= room / 2 ? 0 : -ERR_NOSPC; /* the rest for the maps, and for others */
}

static int merge(struct repl_exec *x, struct repl_io *io)
{
	int err = io->flags & REPL_MERGE_FOR_ROOM ? merge_helps(x, io->arg) : 0;
	for (uint32_t i = 0; i < x->n_vols && !err; i++)
		err = volume_merge_into_older(x->vols[i], io->arg);
	return err;
}

/* Of a guest, into its buffer; of the peer, into one that its answer takes along, if there is anything to tell. */
static int read_disk(struct repl_exec *x, struct repl_io *io, void *into)
{
	if (into)
		return volume_read_disk(x->vols[io->volume], io->off, io->len, into);
	int err = read_for_resync(x, io);
	io->hole = !err && all_zero(io->payload, io->len);
	return err;
}

/* What the peer sent of a range, to this disk. Zeroes free their space. */
static int rebuild(struct repl_exec *x, struct repl_io *io)
{
	struct volume_req q = {.kind = VOLUME_WRITE, .off = io->off, .len = io->len, .buf = io->payload};
	if (io->payload == NULL || all_zero(io->payload, io->len))
		q.kind = VOLUME_DISCARD;
	/* No guest's write, and no intent bit stands for it, nor for what was written through the peer: what has
	 * changed here is not known any more. */
	int err = changed_drop(x->changed[io->volume]);
	if (!err)
		err = volume_write(x->vols[io->volume], &q, 1);
	free(io->payload);
	io->payload = NULL;
	return err;
}

static int reopen(struct repl_exec *x, const struct repl_io *io)
{
	int err = 0;
	for (uint32_t i = 0; i < x->n_vols && !err; i++) {
		if (!(io->arg >> i & 1))
			continue;
		err = volume_reopen(x->vols[i], NULL);
		if (!err)
			err = intent_reopen(x->intents[i]);
	}
	return err;
}

int repl_exec_io(struct repl_exec *x, struct repl_io *io, const void *buf, void *into, uint64_t base)
{
	struct volume_req q;
	int err;
	switch (io->target) {
	case TARGET_INTENT:
		return set_intent(x, io);
	case TARGET_CKPT:
		return sync_for_checkpoint(x, io);
	case TARGET_DISK:
		if (io->kind == REPL_READ)
			return read_disk(x, io, into);
		if (io->kind == REPL_RESIZE)
			return resize_barrier(x, io);
		INVARIANT(io->kind != REPL_HASH); /* answers: only repl_exec_apply does */
		if (io->kind != REPL_WRITE && io->kind != REPL_ZERO && io->kind != REPL_DISCARD) /* barriers */
			return repl_exec_sync_disks(x, &io->failed);
		q = req_of(io, buf);
		err = volume_write(x->vols[io->volume], &q, 1);
		io->save_failed = q.save_failed;
		return err;
	case TARGET_ACTIVE:
		if (io->kind == REPL_FLUSH)
			return repl_exec_sync_actives(x);
		q = req_of(io, buf);
		return volume_write_active(x->vols[io->volume], base, &q);
	case TARGET_OWN:
		break;
	}
	switch (io->kind) {
	case REPL_RESYNC_SCAN:
		return scan(x, io);
	case REPL_RESYNC_READ:
		return read_for_resync(x, io);
	case REPL_RESYNC_HASH:
		return hash_for_resync(x, io);
	case REPL_VERIFY:
		return verify_hash(x, io);
	case REPL_SCRUB:
		return scrub(x, io);
	case REPL_GROW:
		return grow_file(x, io);
	case REPL_MARK:
		return mark(x, io);
	case REPL_COMMIT:
		return commit(x, io);
	case REPL_INTENT_CLEAR:
		/* These bits stand for marks that are in memory only, until now. */
		err = repl_exec_flush_changed(x);
		return err ? err : all_intents(x, false);
	case REPL_INTENT_ALL:
		return all_intents(x, true);
	case REPL_MERGE:
		return merge(x, io);
	case REPL_REBUILD:
		return rebuild(x, io);
	case REPL_REOPEN:
		return reopen(x, io);
	default:
		UNREACHABLE();
	}
}

/* ---- the peer's stream ---- */

bool repl_exec_is_stream(unsigned type)
{
	return (type >= WIRE_WRITE && type <= WIRE_RESYNC_DONE) || type == WIRE_RESYNC_BEGIN || type == WIRE_HASH ||
	       type == WIRE_VERIFY || type == WIRE_RESIZE || (type >= WIRE_DETACH && type <= WIRE_READ_REQ);
}

static enum repl_kind stream_kind(unsigned type)
{
	switch (type) {
	case WIRE_WRITE:
	case WIRE_RESYNC_WRITE:
		return REPL_WRITE;
	case WIRE_ZERO:
	case WIRE_RESYNC_ZERO:
		return REPL_ZERO;
	case WIRE_DISCARD:
		return REPL_DISCARD;
	case WIRE_CHECKPOINT:
		return REPL_CHECKPOINT;
	case WIRE_RESYNC_BEGIN:
		return REPL_RESYNC_BEGIN;
	case WIRE_HASH:
		return REPL_HASH;
	case WIRE_VERIFY:
		return REPL_VERIFY;
	case WIRE_RESIZE:
		return REPL_RESIZE;
	case WIRE_RESYNC_DONE:
		return REPL_RESYNC_DONE;
	case WIRE_DETACH:
		return REPL_DETACH;
	case WIRE_ATTACH:
		return REPL_ATTACH;
	case WIRE_READ_REQ:
		return REPL_READ;
	default:
		return REPL_FLUSH;
	}
}

static const char *stream_volume(struct repl_exec *x, const struct wire_frame *f, struct repl_io *io)
{
	uint32_t i = 0;
	while (i < x->n_vols && repl_meta(x->core)->volumes[i].id != f->volume)
		i++;
	if (i == x->n_vols)
		return "a volume that is not the group's";
	io->volume = i;
	return NULL;
}

static const char *stream_lineage(const struct wire_frame *f, const void *payload, struct repl_io *io)
{
	struct rbuf b = {.data = payload, .size = f->length_payload};
	wire_lineage_decode(&io->lineage, &b);
	return b.failed || io->lineage.current == 0 ? "a lineage that does not decode" : NULL;
}

static const char *stream_range(struct repl_exec *x, const struct wire_frame *f, struct repl_io *io)
{
	const char *why = stream_volume(x, f, io);
	if (why)
		return why;
	uint32_t i = io->volume;
	uint64_t size = volume_size(x->vols[i]);
	if (f->length == 0 || f->offset >= size || f->length > size - f->offset || f->length > REPL_ZERO_MAX)
		return "a range outside the volume";
	if (io->kind == REPL_WRITE && f->length != f->length_payload)
		return "a write whose length is not its payload's";
	io->off = f->offset;
	io->len = f->length;
	return NULL;
}

const char *repl_exec_stream_io(struct repl_exec *x, const struct wire_frame *f, void *payload, struct repl_io *io)
{
	const char *why = NULL;
	io->kind = stream_kind(f->type);
	io->seq = f->seq;
	io->resync = f->type == WIRE_RESYNC_WRITE || f->type == WIRE_RESYNC_ZERO || f->type == WIRE_HASH;
	if (io->kind == REPL_CHECKPOINT) {
		io->arg = f->offset;
		io->flags = f->flags;
		if (f->offset == 0)
			why = "a checkpoint without a number";
	} else if (io->kind == REPL_RESYNC_BEGIN) {
		io->arg = f->offset;
		if (f->offset == 0)
			why = "RESYNC_BEGIN without a generation";
	} else if (io->kind == REPL_RESYNC_DONE) {
		why = stream_lineage(f, payload, io);
	} else if (io->kind == REPL_RESIZE) {
		why = stream_volume(x, f, io);
		io->arg = f->offset;
		if (why == NULL && f->offset % SECTOR_SIZE)
			why = "a size that is not a multiple of 512";
	} else if (io->kind == REPL_DETACH || io->kind == REPL_ATTACH) {
		why = stream_volume(x, f, io);
		if (why == NULL && io->kind == REPL_DETACH)
			why = stream_lineage(f, payload, io);
	} else if (io->kind != REPL_FLUSH) {
		why = stream_range(x, f, io);
	}
	io->hole = f->type == WIRE_VERIFY && (f->flags & WIRE_VERIFY_ZERO) != 0;
	if (why == NULL && (io->kind == REPL_WRITE || io->kind == REPL_HASH || (io->kind == REPL_VERIFY && !io->hole)))
		io->payload = payload;
	return why;
}

/* ---- saving ---- */

static void unprepare(struct repl_exec *x)
{
	for (uint32_t i = 0; i < x->n_vols; i++)
		volume_unprepare(x->vols[i]);
}

static int prepare(struct repl_exec *x, const struct repl_save *s, uint32_t i, struct err *e)
{
	struct volume_clone clones[GROUP_CLONES_MAX];
	uint32_t n = store_clones_of(s->meta, i, clones);
	int err = volume_prepare(x->vols[i], s->ckpt, s->active_id, e);
	for (uint32_t k = 0; k < n && !err; k++)
		if (repl_meta_find_ckpt(s->meta, clones[k].ckpt) >= 0)
			err = volume_prepare_clone(x->vols[i], clones[k].id, e);
	return err;
}

int repl_exec_save(struct repl_exec *x, const struct repl_save *s, struct err *e)
{
	int err = 0;
	INVARIANT(!x->unsure || s->ckpt == 0); /* the record as it was, in place of the one that failed */
	for (uint32_t i = 0; i < x->n_vols && !err && !x->unsure; i++)
		err = prepare(x, s, i, e);
	if (!err && !x->unsure)
		err = grow_prepare(x, s->meta, e);
	if (err) { /* no record names them */
		unprepare(x);
		return err;
	}
	err = store_save_group(x->store, s->meta, e);
	if (!err && x->unsure)
		unprepare(x);
	x->unsure = err != 0;
	if (err) /* their files stay as long as they are */
		grown_free(x);
	return err;
}

uint64_t repl_exec_switch(struct repl_exec *x, const struct repl_save *s)
{
	uint64_t discarded = 0;
	struct volume_clone clones[GROUP_CLONES_MAX];
	for (uint32_t i = 0; i < x->n_vols; i++) {
		uint64_t held = volume_active_blocks(x->vols[i]);
		volume_switch(x->vols[i], s->ckpt, s->active_id);
		discarded += (held - min_u64(held, volume_active_blocks(x->vols[i]))) * BLOCK_SIZE;
		if (s->drop)
			volume_drop(x->vols[i], s->drop);
		volume_drop_through(x->vols[i], s->drop_through);
		volume_switch_clones(x->vols[i], clones, store_clones_of(s->meta, i, clones));
	}
	return discarded;
}

void repl_exec_reap(struct repl_exec *x)
{
	for (uint32_t i = 0; i < x->n_vols; i++)
		volume_reap(x->vols[i]);
}
