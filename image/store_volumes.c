/* Making, importing and deleting volumes (image/store.h).
 *
 * Making one: its name is marked in pending/, its folder made, and its group's record saved, which decides; then the
 * mark goes. Deleting one: mark, record, folder, mark. A crash anywhere leaves a volume that is whole and named, or a
 * marked folder that no record names and the next store_open removes.
 *
 * An import copies between the folder and the record without the lock; what was checked before is checked again.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "image/based.h"
#include "image/source.h"
#include "image/store.h"
#include "image/store_internal.h"
#include "image/zero.h"

/* Bytes copied at a time. */
#define COPY_CHUNK (1U << 20)

/* ---- finding ---- */

struct find {
	struct store *st;
	const char *volume;
	struct repl_meta *found;
	uint32_t index;
	int unreadable; /* the error of a record that could not be read: the volume may be in there */
	struct err why;
};

static int find_in_group(void *arg, const char *group)
{
	struct find *f = arg;
	struct repl_meta *m;
	struct err why;
	int i, rc = store_load_group(f->st, group, &m, &why);

	if (rc < 0) {
		if (rc != -ERR_NOENT) {
			f->unreadable = rc;
			f->why = why;
		}
		return rc == -ERR_NOMEM ? rc : 0;
	}
	i = repl_meta_find_volume(m, f->volume);
	if (i < 0) {
		free(m);
		return 0;
	}
	f->found = m;
	f->index = (uint32_t)i;
	return 1;
}

int store_find_volume(struct store *st, const char *volume, struct repl_meta **ret_group, uint32_t *ret_index,
		      struct err *e)
{
	struct find f = {.st = st, .volume = volume};
	int rc = store_list_groups(st, find_in_group, &f);

	if (rc < 0)
		return store_refuse(e, -rc, "find", volume, "reading the groups of store %s: %s", store_path(st),
				    err_short(rc));
	if (rc == 0 && f.unreadable)
		return store_refuse(e, -f.unreadable, "find", volume, "not in the groups that can be read; %s",
				    f.why.text);
	if (rc == 0)
		return store_refuse(e, ERR_NOENT, "find", volume,
				    "there is no such volume in store %s; repctl list shows what there is",
				    store_path(st));
	*ret_group = f.found;
	*ret_index = f.index;
	return 0;
}

/* ---- the rules ---- */

/* A group may gain or lose volumes only while nothing is replicated and no commit is under way. */
static int check_idle(const struct repl_meta *m, const char *verb, const char *volume, struct err *e)
{
	if (m->role != ROLE_STANDALONE)
		return store_refuse(e, ERR_STATE, verb, volume,
				    "its group %s is %s here (%s); end its replication first: repctl unprotect %s",
				    m->group, role_name(m->role), state_name(m->state), m->group);
	if (m->state != STATE_NONE && m->state != STATE_DONE)
		return store_refuse(e, ERR_STATE, verb, volume,
				    "its group %s is in a failover (%s); wait for its end: repctl wait %s --for=done",
				    m->group, state_name(m->state), m->group);
	return 0;
}

/* Finding nothing is the good case; a record that can't be read might name it too. */
static int check_name_free(struct store *st, const char *verb, const char *volume, struct err *e)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	struct err why;
	uint32_t index;
	int rc = store_find_volume(st, volume, &m, &index, &why);

	if (rc == -ERR_NOENT)
		return 0;
	if (rc < 0)
		return store_refuse(e, -rc, verb, volume, "whether the name is free can't be told: %s", why.text);
	return store_refuse(e, ERR_EXIST, verb, volume,
			    "there is a volume of this name already, in group %s; choose another name", m->group);
}

/* A name stands for a volume or for a group (SPEC 14), so a volume and a group that is not its own never share one. */
static int check_no_clash(struct store *st, const char *verb, const char *volume, const char *group, bool new_group,
			  struct err *e)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	uint32_t index;
	int rc;

	if (strcmp(volume, group) == 0)
		return 0;
	rc = store_load_group(st, volume, &m, NULL);
	if (rc != -ERR_NOENT)
		return store_refuse(
		    e, ERR_EXIST, verb, volume,
		    "there is a group of this name, and the volume is to be in group %s; choose another name", group);
	if (!new_group)
		return 0;
	rc = store_find_volume(st, group, &m, &index, NULL);
	if (rc == 0)
		return store_refuse(
		    e, ERR_EXIST, verb, volume,
		    "group %s is new, and there is a volume of its name in group %s; choose another name for it", group,
		    m->group);
	return 0;
}

/* The group's record as it will be but for the volume; returns owned. */
static int open_group(struct store *st, const char *verb, const char *volume, const char *group, struct repl_meta **ret,
		      struct err *e)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	struct err why;
	int rc = store_load_group(st, group, &m, &why);
	bool new_group = rc == -ERR_NOENT;

	if (rc < 0 && !new_group)
		return store_refuse(e, -rc, verb, volume, "%s", why.text);
	if ((rc = check_no_clash(st, verb, volume, group, new_group, e)) < 0)
		return rc;
	if (new_group) {
		m = malloc(sizeof(*m));
		if (!m)
			return store_refuse(e, ERR_NOMEM, verb, volume, "out of memory");
		repl_meta_init(m, group);
		random_bytes(m->uuid, sizeof(m->uuid));
	} else if ((rc = check_idle(m, verb, volume, e)) < 0) {
		return rc;
	}
	if (m->n_volumes >= GROUP_VOLUMES_MAX)
		return store_refuse(e, ERR_LIMIT, verb, volume,
				    "group %s holds %u volumes, the limit; use another group", group,
				    GROUP_VOLUMES_MAX);
	*ret = TAKE_PTR(m);
	return 0;
}

/* One above the highest; in a group that once held the highest possible id, the lowest that is free. */
static uint32_t next_id(const struct repl_meta *m)
{
	uint32_t id = 0;

	for (uint32_t i = 0; i < m->n_volumes; i++)
		id = m->volumes[i].id > id ? m->volumes[i].id : id;
	if (id < UINT32_MAX)
		return id + 1;
	for (id = 1;; id++) {
		bool taken = false;

		for (uint32_t i = 0; i < m->n_volumes; i++)
			taken = taken || m->volumes[i].id == id;
		if (!taken)
			return id;
	}
}

/* ---- making ---- */

static int check_folder_free(struct store *st, const char *verb, const char *volume, struct err *e) REQUIRES(st->names)
{
	int rc = store_settle_folder(st, volume);

	if (rc < 0)
		return store_refuse(e, -rc, verb, volume, "looking at volumes/%s in store %s: %s", volume,
				    store_path(st), err_short(rc));
	if (rc > 0)
		return store_refuse(
		    e, ERR_EXIST, verb, volume,
		    "volumes/%s is there already though no group names it; wait if it is being made just "
		    "now, else restart repfs, which clears leftovers away",
		    volume);
	return 0;
}

static void making_begin(struct store *st, struct store_making *m, const char *volume) REQUIRES(st->names)
{
	*m = (struct store_making){volume, st->making};
	st->making = m;
}

static void making_end(struct store *st, const struct store_making *m) REQUIRES(st->names)
{
	struct store_making **at = &st->making;

	while (*at != m)
		at = &(*at)->next;
	*at = m->next;
}

void store_making_begin(struct store *st, struct store_making *m, const char *volume)
{
	mutex_lock(&st->names);
	if (check_name_free(st, "create", volume, NULL) == 0)
		(void)store_settle_folder(st, volume);
	making_begin(st, m, volume);
	mutex_unlock(&st->names);
}

void store_making_end(struct store *st, const struct store_making *m)
{
	mutex_lock(&st->names);
	making_end(st, m);
	mutex_unlock(&st->names);
}

static void abandon(struct store *st, const char *volume)
{
	if (store_remove_folder(st, volume, NULL) == 0)
		store_pending_remove(st, volume);
}

/* Checks everything and makes the folder; after it the name is taken. */
static int reserve_locked(struct store *st, const char *verb, const char *volume, uint64_t size, const char *group,
			  const struct based_args *base, struct err *e) REQUIRES(st->names)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	int rc;

	if ((rc = check_name_free(st, verb, volume, e)) < 0 || (rc = open_group(st, verb, volume, group, &m, e)) < 0 ||
	    (rc = check_folder_free(st, verb, volume, e)) < 0)
		return rc;
	rc = store_pending_add(st, volume);
	if (rc < 0) {
		store_pending_remove(st, volume);
		return store_refuse(e, -rc, verb, volume, "making pending/%s in store %s: %s", volume, store_path(st),
				    err_short(rc));
	}
	rc = volume_create_over(store_storage(st), volume, size, base, store_info(st)->durability, e);
	if (rc < 0)
		abandon(st, volume);
	return rc;
}

uint32_t store_clones_of(const struct repl_meta *m, uint32_t i, struct volume_clone ret[static GROUP_CLONES_MAX])
{
	uint32_t n = 0;

	for (uint32_t k = 0; k < m->n_clones; k++)
		if (strcmp(m->clones[k].volume, m->volumes[i].name) == 0)
			ret[n++] = (struct volume_clone){m->clones[k].id, m->clones[k].ckpt};
	return n;
}

int store_open_volume(struct store *st, const struct repl_meta *m, uint32_t i, struct volume **ret, struct err *e)
{
	_cleanup_free_ uint64_t *numbers = calloc(m->n_ckpts ? m->n_ckpts : 1, sizeof(*numbers));
	struct volume_clone clones[GROUP_CLONES_MAX];

	if (!numbers)
		return err_set(e, ERR_NOMEM, "open volume %s: out of memory", m->volumes[i].name);
	for (uint32_t k = 0; k < m->n_ckpts; k++)
		numbers[k] = m->ckpts[k].number;
	const struct volume_open_args args = {
	    .name = m->volumes[i].name,
	    .size = m->volumes[i].size,
	    .durability = store_info(st)->durability,
	    .ckpts = numbers,
	    .n_ckpts = m->n_ckpts,
	    .active_id = m->active_id,
	    .clones = clones,
	    .n_clones = store_clones_of(m, i, clones),
	};
	return volume_open(store_storage(st), &args, ret, e);
}

/* In a group that keeps checkpoints the new volume takes part in them: as of each it is what it is made as. */
static int join_chain(struct store *st, const char *volume, uint64_t size, const struct repl_meta *m, struct err *e)
{
	const struct volume_open_args args = {.name = volume, .size = size, .durability = store_info(st)->durability};
	struct volume *v;
	int rc = 0;

	if (m->n_ckpts == 0 && m->active_id == 0)
		return 0;
	rc = volume_open(store_storage(st), &args, &v, e);
	if (rc < 0)
		return rc;
	for (uint32_t i = 0; rc == 0 && i < m->n_ckpts; i++) {
		rc = volume_prepare(v, m->ckpts[i].number, m->active_id, e);
		if (rc == 0)
			volume_switch(v, m->ckpts[i].number, m->active_id);
	}
	if (rc == 0 && m->n_ckpts == 0) {
		rc = volume_prepare(v, 0, m->active_id, e);
		if (rc == 0)
			volume_switch(v, 0, m->active_id);
	}
	volume_close(v);
	return rc;
}

/* After a failed save: whether the record surely does not name the volume, after a power cut too: the name of a new
 * record may have become durable, and its removal not. */
static bool surely_unnamed(struct store *st, const char *group, const char *volume)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	int rc = store_load_group(st, group, &m, NULL);

	return (rc == -ERR_NOENT || (rc == 0 && repl_meta_find_volume(m, volume) < 0)) && store_sync_groups(st) == 0;
}

/* Puts the volume into its group's record. On failure *ret_abandon says whether its folder may go. */
static int settle_locked(struct store *st, const char *verb, const char *volume, uint64_t size, const char *group,
			 bool written, bool *ret_abandon, struct err *e) REQUIRES(st->names)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	struct repl_volume *rv;
	int rc;

	*ret_abandon = true;
	if ((rc = check_name_free(st, verb, volume, e)) < 0 || (rc = open_group(st, verb, volume, group, &m, e)) < 0)
		return rc;
	POST(m != NULL);
	if ((rc = join_chain(st, volume, size, m, e)) < 0)
		return rc;
	rv = &m->volumes[m->n_volumes];
	memset(rv, 0, sizeof(*rv));
	snprintf(rv->name, sizeof(rv->name), "%s", volume);
	random_bytes(rv->uuid, sizeof(rv->uuid));
	rv->uuid[6] = (uint8_t)((rv->uuid[6] & 0x0f) | 0x40); /* a random UUID's marks, RFC 4122 */
	rv->uuid[8] = (uint8_t)((rv->uuid[8] & 0x3f) | 0x80);
	rv->id = next_id(m);
	rv->size = size;
	m->n_volumes++;
	/* One that was imported or has a base counts as written: a peer must never take it for a fresh one (SPEC 8). */
	if (written && m->lineage.current == 0) {
		m->lineage.current = random_u64_nonzero();
		m->alone = true;
	}
	rc = store_save_group(st, m, e);
	if (rc < 0)
		*ret_abandon = surely_unnamed(st, group, volume);
	else
		store_pending_remove(st, volume);
	return rc;
}

static int settle_or_abandon(struct store *st, const char *verb, const char *volume, uint64_t size, const char *group,
			     bool written, struct err *e) REQUIRES(st->names)
{
	bool may_go;
	int rc = settle_locked(st, verb, volume, size, group, written, &may_go, e);

	if (rc < 0 && may_go)
		abandon(st, volume);
	return rc;
}

static int make(struct store *st, const char *volume, uint64_t size, const char *group, const struct based_args *base,
		struct err *e)
{
	int rc;

	mutex_lock(&st->names);
	rc = reserve_locked(st, "create", volume, size, group, base, e);
	if (rc == 0)
		rc = settle_or_abandon(st, "create", volume, size, group, base != NULL, e);
	mutex_unlock(&st->names);
	return rc;
}

static int check_request(const char *verb, const char *volume, const char *group, struct err *e)
{
	int rc = store_check_name(e, verb, "volume", volume);

	return rc < 0 ? rc : store_check_name(e, verb, "group", group);
}

int store_create_volume(struct store *st, const char *volume, uint64_t size, const char *group, struct err *e)
{
	struct err why;
	int rc;

	group = group ? group : volume;
	if ((rc = check_request("create", volume, group, e)) < 0)
		return rc;
	if ((rc = store_check_size(size, &why)) < 0)
		return store_refuse(e, -rc, "create", volume, "%s", why.text);
	return make(st, volume, size, group, NULL, e);
}

/* ---- over a base image ---- */

/* The base as it is to be recorded: opened, whole, and of a size that the volume can have. */
static int open_base(const struct store_base_args *a, uint64_t *size, struct source **ret, struct err *e)
{
	struct source *s = NULL;
	struct err why = {0};
	int rc = source_open(a->file, NULL, a->backing_dir, &s, &why);

	if (rc < 0)
		return store_refuse(e, -rc, "create", a->volume, "%s", why.text);
	POST(s != NULL);
	*size = *size ? *size : s->size;
	if (strncmp(s->format, "qcow", 4) != 0)
		rc = store_refuse(
		    e, ERR_USAGE, "create", a->volume,
		    "%s is not a qcow or qcow2 image, and only those can be a base; to copy it, use import", a->file);
	else if (*size < s->size)
		rc =
		    store_refuse(e, ERR_USAGE, "create", a->volume,
				 "a volume can't be smaller than its base image, which has %" PRIu64 " bytes", s->size);
	else if (store_check_size(*size, &why) < 0 || source_check(s, &why) < 0)
		rc = store_refuse(e, why.code, "create", a->volume, "%s", why.text);
	if (rc < 0)
		source_close(s);
	else
		*ret = s;
	return rc;
}

int store_create_over(struct store *st, const struct store_base_args *a, uint64_t size, uint64_t *ret_size,
		      const char **ret_format, struct err *e)
{
	const char *group = a->group ? a->group : a->volume;
	struct source *s;
	int rc;

	if ((rc = check_request("create", a->volume, group, e)) < 0 || (rc = open_base(a, &size, &s, e)) < 0)
		return rc;
	struct based_args base = {.source = s, .path = a->file, .backing_dir = a->backing_dir};
	rc = make(st, a->volume, size, group, &base, e);
	if (rc == 0) {
		*ret_size = size;
		*ret_format = s->format;
	}
	source_close(s);
	return rc;
}

/* ---- deleting ---- */

static int unname(struct store *st, struct repl_meta *m, uint32_t index, struct err *e)
{
	if (m->n_volumes == 1)
		return store_delete_group(st, m->group, e);
	repl_meta_forget_growths(m, m->volumes[index].name);
	memmove(&m->volumes[index], &m->volumes[index + 1], (m->n_volumes - index - 1) * sizeof(m->volumes[0]));
	m->n_volumes--;
	memset(&m->volumes[m->n_volumes], 0, sizeof(m->volumes[0]));
	return store_save_group(st, m, e);
}

static bool is_named(struct store *st, const char *volume)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	uint32_t index;

	return store_find_volume(st, volume, &m, &index, NULL) == 0;
}

static int delete_locked(struct store *st, const char *volume, struct err *e) REQUIRES(st->names)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	struct err why;
	uint32_t index;
	int rc = store_find_volume(st, volume, &m, &index, &why);

	if (rc == -ERR_NOENT)
		return store_refuse(e, ERR_NOENT, "delete", volume,
				    "there is no such volume in store %s; repctl list shows what there is",
				    store_path(st));
	if (rc < 0)
		return store_refuse(e, -rc, "delete", volume, "%s", why.text);
	POST(m != NULL);
	if ((rc = check_idle(m, "delete", volume, e)) < 0)
		return rc;
	for (uint32_t i = 0; i < m->n_clones; i++)
		if (strcmp(m->clones[i].volume, volume) == 0)
			return store_refuse(e, ERR_BUSY, "delete", volume,
					    "clone %s is made of it; remove that first, with `rm` in the mount",
					    m->clones[i].name);
	rc = store_pending_add(st, volume);
	if (rc < 0) {
		store_pending_remove(st, volume);
		return store_refuse(e, -rc, "delete", volume, "making pending/%s in store %s: %s", volume,
				    store_path(st), err_short(rc));
	}
	if ((rc = unname(st, m, index, e)) < 0) {
		/* A mark does nothing to a volume that is named; were its record lost, it would cost the disk. */
		if (is_named(st, volume))
			store_pending_remove(st, volume);
		return rc;
	}
	rc = store_remove_folder(st, volume, &why);
	if (rc < 0)
		return store_refuse(
		    e, -rc, "delete", volume,
		    "the volume is gone, but its files are not (%s); the next start of repfs removes them",
		    err_short(rc));
	store_pending_remove(st, volume);
	return 0;
}

int store_delete_volume(struct store *st, const char *volume, struct err *e)
{
	int rc = store_check_name(e, "delete", "volume", volume);

	if (rc < 0)
		return rc;
	mutex_lock(&st->names);
	rc = delete_locked(st, volume, e);
	mutex_unlock(&st->names);
	return rc;
}

/* ---- importing ---- */

struct import {
	const struct store_import_args *args;
	struct source *source;
	store_progress_fn progress;
	void *arg;
};

static int check_format(const struct store_import_args *a, struct err *e)
{
	static const char *const known[] = {"raw", "zst", "qcow", "qcow2"};

	for (size_t i = 0; i < ARRAY_LEN(known); i++)
		if (!a->format || strcmp(a->format, known[i]) == 0)
			return 0;
	return store_refuse(e, ERR_USAGE, "import", a->volume, "format %s is not known; use raw, zst, qcow or qcow2",
			    a->format);
}

static int check_source_size(const struct import *im, struct err *e)
{
	const struct store_import_args *a = im->args;
	uint64_t size = im->source->size;
	struct err why;
	int rc;

	if (size % SECTOR_SIZE != 0 && size < VOLUME_SIZE_MAX)
		return store_refuse(
		    e, ERR_USAGE, "import", a->volume,
		    "the size of %s, %" PRIu64
		    " bytes, is not a multiple of %u; round it up with: qemu-img resize -f raw %s %" PRIu64,
		    a->file, size, SECTOR_SIZE, a->file, round_up_u64(size, SECTOR_SIZE));
	rc = store_check_size(size, &why);
	return rc < 0 ? store_refuse(e, -rc, "import", a->volume, "%s: %s", a->file, why.text) : 0;
}

static int open_source(struct import *im, struct err *e)
{
	const struct store_import_args *a = im->args;
	struct err why;
	int rc = check_format(a, e);

	if (rc < 0)
		return rc;
	rc = source_open(a->file, a->format, a->backing_dir, &im->source, &why);
	if (rc < 0)
		return store_refuse(e, -rc, "import", a->volume, "%s", why.text);
	rc = check_source_size(im, e);
	if (rc < 0)
		source_close(im->source);
	return rc;
}

/* The new disk is one hole: only what is not zero is written. */
static int write_nonzero(struct volume *v, uint64_t off, const uint8_t *buf, size_t len)
{
	while (len > 0) {
		bool zero;
		size_t n = zero_run(buf, len, BLOCK_SIZE, &zero);
		struct volume_req req = {.kind = VOLUME_WRITE, .off = off, .len = n, .buf = buf};
		int rc = zero ? 0 : volume_write(v, &req, 1);

		if (rc < 0)
			return rc;
		off += n;
		buf += n;
		len -= n;
	}
	return 0;
}

/* All is copied: it is what the source is still, and durable. */
static int import_end(const struct import *im, struct volume *v, struct err *e)
{
	const char *volume = im->args->volume;
	struct err why;
	int rc = source_unchanged(im->source, &why);

	if (rc < 0)
		return store_refuse(e, ERR_FAILED, "import", volume, "%s; import it again when nothing writes to it",
				    why.text);
	rc = volume_sync(v);
	if (rc < 0)
		return store_refuse(e, -rc, "import", volume, "syncing the new disk: %s", err_short(rc));
	return 0;
}

static int import_copy(const struct import *im, struct volume *v, uint8_t *buf, struct err *e)
{
	const char *volume = im->args->volume;
	uint64_t off = 0, size = im->source->size;
	struct disk *from = im->source->disk;
	struct err why;
	int rc;

	while (off < size) {
		struct extent x;

		rc = disk_extent(from, off, size, &x);
		if (rc == 0 && x.data) {
			x.len = min_u64(x.len, COPY_CHUNK);
			rc = disk_read(from, off, buf, (size_t)x.len);
		}
		if (rc < 0) {
			(void)source_explain(im->source, off, rc, &why);
			return store_refuse(e, -rc, "import", volume, "%s", why.text);
		}
		rc = x.data ? write_nonzero(v, off, buf, (size_t)x.len) : 0;
		if (rc < 0)
			return store_refuse(e, -rc, "import", volume, "writing at byte %" PRIu64 ": %s", off,
					    err_short(rc));
		off += x.len;
		/* Before the progress says that it is whole: the caller then takes the group out for the record. */
		if (off == size && (rc = import_end(im, v, e)) < 0)
			return rc;
		if (im->progress && im->progress(im->arg, off, size) != 0)
			return store_refuse(e, ERR_CANCELED, "import", volume, "cancelled; nothing is left of it");
	}
	return 0;
}

static int import_into(struct store *st, const struct import *im, struct err *e)
{
	const struct volume_open_args args = {
	    .name = im->args->volume, .size = im->source->size, .durability = store_info(st)->durability};
	struct volume *v = NULL;
	uint8_t *buf;
	int rc = volume_open(store_storage(st), &args, &v, e);

	if (rc < 0)
		return rc;
	buf = malloc(COPY_CHUNK);
	if (buf)
		rc = import_copy(im, v, buf, e);
	else
		rc = store_refuse(e, ERR_NOMEM, "import", im->args->volume, "out of memory");
	free(buf);
	volume_close(v);
	return rc;
}

int store_import(struct store *st, const struct store_import_args *args, store_progress_fn fn, void *arg,
		 const char **ret_format, struct err *e)
{
	const char *volume = args->volume, *group = args->group ? args->group : volume;
	struct import im = {.args = args, .progress = fn, .arg = arg};
	struct store_making making;
	uint64_t size;
	int rc;

	if ((rc = check_request("import", volume, group, e)) < 0 || (rc = open_source(&im, e)) < 0)
		return rc;
	size = im.source->size;
	if (ret_format)
		*ret_format = im.source->format;
	mutex_lock(&st->names);
	rc = reserve_locked(st, "import", volume, size, group, NULL, e);
	if (rc == 0)
		making_begin(st, &making, volume);
	mutex_unlock(&st->names);
	if (rc == 0) {
		rc = import_into(st, &im, e);
		mutex_lock(&st->names);
		making_end(st, &making);
		if (rc == 0)
			rc = settle_or_abandon(st, "import", volume, size, group, true, e);
		else
			abandon(st, volume);
		mutex_unlock(&st->names);
	}
	source_close(im.source);
	return rc;
}
