/* Two copies of a record, each a 48-byte header and the payload (image/meta.h, docs/format.md).
 *
 * The header holds a sequence number, which grows by one a save, and a pass: 1 for the copy that a save writes first,
 * 2 for the one written after that was durable. So of two copies with one sequence number the one with the higher
 * pass is the one whose own sync may be missing, and that is the one to overwrite first; the other is known durable.
 *
 * Two copies of different sequence numbers are what an interrupted save leaves. The newer may lie in the page cache
 * only, or its sync may have failed, while the older is durable. Before the older is overwritten the newer is made
 * certain: its own bytes are written over it again and synced (a rewrite of the same bytes can't lose them, and pages
 * that a failed sync has marked clean are written out again).
 *
 * A copy that can't be read is not one that is torn: it may hold the newest record, saved and answered, where the other
 * is older (a second write that failed does not fail a save). So it is never passed over on the strength of the other
 * copy alone, unless that one proves itself the newest: a copy of pass 2 or more was written after the record was
 * durable in the other, and is itself the first to be overwritten by the next save. For that to hold where the best is
 * of a later pass (the other could not be read, or was torn), a save first makes the other one of pass 1 that says the
 * same. A load that can't tell refuses. A save goes on: its record is newer than anything the unreadable copy may hold;
 * if its first write over that one fails, the other's older one is not put in its place.
 *
 * The older record that is written over one whose save failed may itself not have reached the medium, where that one
 * then still lies, to be found after the next power cut as the newest. So this copy is marked, and a load writes and
 * syncs it again before anybody acts on the record.
 *
 * A copy says too whether its file was made for it: then its name may not be durable yet, and the folder is synced
 * when that copy is next written or relied on.
 *
 * The header's layout is fixed for every container version, so that sequence numbers and versions can be read, and a
 * newer record be refused, by any program.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"
#include "image/meta.h"

#define META_MAGIC "repfsrec"
#define META_CONTAINER 1
#define META_HEADER_SIZE 48
#define META_NAME_MAX (STORAGE_PATH_MAX + 8)
#define META_CREATED 1U /* flag: the file was made for this copy */
#define META_UNDOES 2U	/* flag: written over a record whose save failed */

enum copy_state {
	COPY_ABSENT,
	COPY_UNREADABLE, /* whatever it holds, it could not be asked */
	COPY_BAD,	 /* what was read does not check out */
	COPY_GOOD,
};

struct copy {
	char path[META_NAME_MAX];
	enum copy_state state;
	const char *matter; /* what is wrong with it */
	int error;	    /* COPY_UNREADABLE */
	uint64_t sequence;
	uint32_t container, version, pass, flags, payload_len;
	uint8_t *raw; /* header and payload; owned */
};

struct pair {
	struct storage *s;
	char dir[META_NAME_MAX];
	char tmp[META_NAME_MAX];
	struct copy copies[2];
};

/* ---- one copy ---- */

static void header_encode(uint8_t *h, const char kind[4], uint64_t sequence, uint32_t version, uint32_t pass,
			  uint32_t flags, const void *payload, size_t len)
{
	memcpy(h, META_MAGIC, 8);
	put_u32(h + 8, META_CONTAINER);
	memcpy(h + 12, kind, 4);
	put_u64(h + 16, sequence);
	put_u32(h + 24, version);
	put_u32(h + 28, (uint32_t)len);
	put_u32(h + 32, pass);
	put_u32(h + 36, crc32c(0, payload, len));
	put_u32(h + 40, flags);
	put_u32(h + 44, crc32c(0, h, 44));
}

static int copy_bad(struct copy *c, const char *matter)
{
	c->state = COPY_BAD;
	c->matter = matter;
	return 0;
}

static int copy_unreadable(struct copy *c, int error, const char *matter)
{
	c->state = COPY_UNREADABLE;
	c->error = error;
	c->matter = matter;
	return 0;
}

/* Fills c from the header; its state says whether that checks out. */
static int copy_parse_header(struct copy *c, const uint8_t *h, const char kind[4])
{
	if (memcmp(h, META_MAGIC, 8) != 0)
		return copy_bad(c, "not a record of repfs");
	if (get_u32(h + 44) != crc32c(0, h, 44))
		return copy_bad(c, "the checksum of its header does not match");
	if (memcmp(h + 12, kind, 4) != 0)
		return copy_bad(c, "holds a record of another kind");
	c->container = get_u32(h + 8);
	c->sequence = get_u64(h + 16);
	c->version = get_u32(h + 24);
	c->payload_len = get_u32(h + 28);
	c->pass = get_u32(h + 32);
	c->flags = get_u32(h + 40);
	c->state = COPY_GOOD;
	return 0;
}

static int copy_read_disk(struct copy *c, struct disk *d, const char kind[4])
{
	uint8_t header[META_HEADER_SIZE];
	uint64_t size;
	int rc = disk_get_size(d, &size);

	if (rc < 0)
		return copy_unreadable(c, rc, "can't be read");
	if (size < META_HEADER_SIZE)
		return copy_bad(c, "too short");
	rc = disk_read(d, 0, header, sizeof(header));
	if (rc < 0)
		return copy_unreadable(c, rc, "can't be read");
	copy_parse_header(c, header, kind);
	/* What follows the header of a newer container is unknown: its version alone counts. */
	if (c->state != COPY_GOOD || c->container > META_CONTAINER)
		return 0;
	if (c->payload_len > META_PAYLOAD_MAX)
		return copy_bad(c, "its length is above the limit");
	if (size < META_HEADER_SIZE + (uint64_t)c->payload_len)
		return copy_bad(c, "cut short");
	c->raw = malloc(META_HEADER_SIZE + c->payload_len);
	if (!c->raw)
		return -ERR_NOMEM;
	rc = disk_read(d, 0, c->raw, META_HEADER_SIZE + c->payload_len);
	if (rc < 0)
		return copy_unreadable(c, rc, "can't be read");
	if (memcmp(c->raw, header, sizeof(header)) != 0 ||
	    get_u32(header + 36) != crc32c(0, c->raw + META_HEADER_SIZE, c->payload_len))
		return copy_bad(c, "the checksum of its content does not match");
	return 0;
}

/* 0, the copy's state telling what was found; an error only where nothing can be told. */
static int copy_read(struct storage *s, struct copy *c, const char kind[4])
{
	struct disk *d;
	int rc = storage_open(s, c->path, STORAGE_RDONLY, &d);

	if (rc == -ERR_NOENT) {
		c->state = COPY_ABSENT;
		c->matter = "missing";
		return 0;
	}
	if (rc == -ERR_NOMEM || rc == -ERR_PERM)
		return rc;
	if (rc < 0)
		return copy_unreadable(c, rc, "can't be opened");
	rc = copy_read_disk(c, d, kind);
	disk_close(d);
	return rc;
}

static int write_file(struct storage *s, const char *path, unsigned flags, const uint8_t *raw, size_t len, bool durable)
{
	struct disk *d;
	int rc = storage_open(s, path, flags, &d);

	if (rc < 0)
		return rc;
	rc = disk_write(d, 0, raw, len);
	if (rc == 0 && durable)
		rc = disk_sync(d);
	disk_close(d);
	return rc;
}

static uint32_t flags_for(const struct copy *target)
{
	return target->state == COPY_ABSENT ? META_CREATED : 0;
}

static bool name_is_durable(const struct copy *c)
{
	return c->state == COPY_GOOD && !(c->flags & META_CREATED);
}

/* A file that is not there appears whole. */
static int copy_create(struct pair *p, const struct copy *c, const uint8_t *raw, size_t len, bool durable)
{
	int rc = write_file(p->s, p->tmp, STORAGE_CREATE | STORAGE_TRUNC, raw, len, durable);

	if (rc == 0)
		rc = storage_rename(p->s, p->tmp, c->path);
	if (rc < 0) {
		(void)storage_unlink(p->s, p->tmp);
		return rc;
	}
	rc = durable ? storage_sync_dir(p->s, p->dir) : 0;
	if (rc < 0)
		(void)storage_unlink(p->s, c->path);
	return rc;
}

/* The name is made durable before the bytes that say it is. */
static int copy_write(struct pair *p, const struct copy *c, const uint8_t *raw, size_t len, bool durable)
{
	int rc = 0;

	if (c->state == COPY_ABSENT)
		return copy_create(p, c, raw, len, durable);
	if (durable && !name_is_durable(c))
		rc = storage_sync_dir(p->s, p->dir);
	return rc < 0 ? rc : write_file(p->s, c->path, 0, raw, len, durable);
}

/* ---- both ---- */

static void pair_free(struct pair *p)
{
	free(p->copies[0].raw);
	free(p->copies[1].raw);
}

static int pair_read(struct pair *p, struct storage *s, const char *path, const char kind[4])
{
	const char *slash = strrchr(path, '/');
	int rc;

	memset(p, 0, sizeof(*p));
	p->s = s;
	if (strnlen(path, STORAGE_PATH_MAX + 1) > STORAGE_PATH_MAX - 4)
		return -ERR_RANGE;
	if (slash)
		snprintf(p->dir, sizeof(p->dir), "%.*s", (int)(slash - path), path);
	snprintf(p->tmp, sizeof(p->tmp), "%s.tmp", path);
	for (int i = 0; i < 2; i++) {
		snprintf(p->copies[i].path, sizeof(p->copies[i].path), "%s.%c", path, "ab"[i]);
		rc = copy_read(s, &p->copies[i], kind);
		if (rc < 0) {
			pair_free(p);
			return rc;
		}
	}
	return 0;
}

/* The newest copy that checks out, NULL if none does; of two with one sequence number the one known durable. */
static struct copy *pair_best(struct pair *p)
{
	struct copy *a = &p->copies[0], *b = &p->copies[1];

	if (a->state != COPY_GOOD || b->state != COPY_GOOD)
		return a->state == COPY_GOOD ? a : b->state == COPY_GOOD ? b : NULL;
	if (a->sequence != b->sequence)
		return a->sequence > b->sequence ? a : b;
	return a->pass <= b->pass ? a : b;
}

static struct copy *pair_other(struct pair *p, const struct copy *c)
{
	return c == &p->copies[0] ? &p->copies[1] : &p->copies[0];
}

/* Makes `best` certain, so that the other copy may be overwritten. */
static int secure(struct pair *p, const struct copy *best, const struct copy *other)
{
	struct disk *d;
	int rc;

	if (other->state == COPY_GOOD && other->sequence == best->sequence)
		return 0;
	if (other->state == COPY_GOOD)
		return copy_write(p, best, best->raw, META_HEADER_SIZE + best->payload_len, true);
	/* The only good copy is never written. */
	rc = storage_open(p->s, best->path, 0, &d);
	if (rc < 0)
		return rc;
	rc = disk_sync(d);
	disk_close(d);
	return rc < 0 ? rc : storage_sync_dir(p->s, p->dir);
}

/* best's record as the other copy is to hold it; *ret_len bytes, to be freed. NULL: out of memory. */
static uint8_t *copy_for(const struct copy *best, const struct copy *other, uint32_t pass, uint32_t flags,
			 size_t *ret_len)
{
	size_t len = META_HEADER_SIZE + best->payload_len;
	uint8_t *raw = malloc(len);

	if (!raw)
		return NULL;
	memcpy(raw, best->raw, len);
	put_u32(raw + 32, pass);
	put_u32(raw + 40, flags_for(other) | flags);
	put_u32(raw + 44, crc32c(0, raw, 44));
	*ret_len = len;
	return raw;
}

/* Writes best's record over the other copy, as one whose durability comes after best's. `undoes`: a newer one may lie
 * there. */
static int copy_over(struct pair *p, const struct copy *best, const struct copy *other, bool undoes, bool durable)
{
	size_t len;
	uint8_t *raw = copy_for(best, other, best->pass + 1, undoes ? META_UNDOES : 0, &len);
	int rc;

	if (!raw)
		return -ERR_NOMEM;
	rc = copy_write(p, other, raw, len, durable);
	free(raw);
	return rc;
}

/* Makes the other copy the one that was written first, in the place of a best one of a later pass, which a save would
 * overwrite second: if that failed, what it holds would pass for the newest where the new one can't be read. */
static int lead(struct pair *p, const struct copy **best, bool durable)
{
	struct copy *other = pair_other(p, *best);
	size_t len;
	uint8_t *raw = copy_for(*best, other, 1, 0, &len);
	int rc;

	if (!raw)
		return -ERR_NOMEM;
	rc = copy_write(p, other, raw, len, durable);
	if (rc < 0) {
		free(raw);
		return rc;
	}
	free(other->raw);
	other->raw = raw;
	other->flags = get_u32(raw + 40);
	other->state = COPY_GOOD;
	other->sequence = (*best)->sequence;
	other->container = (*best)->container;
	other->version = (*best)->version;
	other->payload_len = (*best)->payload_len;
	other->pass = 1;
	*best = other;
	return 0;
}

static int version_refuse(const struct copy *c, const char *what, const char *path, uint32_t version_max, struct err *e)
{
	if (c->container > META_CONTAINER)
		return err_set(e, ERR_VERSION,
			       "%s %s: %s is in container format %" PRIu32
			       ", this program knows up to %d; use the program that wrote it, or a newer one",
			       what, path, c->path, c->container, META_CONTAINER);
	return err_set(e, ERR_VERSION,
		       "%s %s: %s is of version %" PRIu32 ", this program knows up to %" PRIu32
		       "; use the program that wrote it, or a newer one",
		       what, path, c->path, c->version, version_max);
}

static bool version_known(const struct copy *c, uint32_t version_max)
{
	return c->container <= META_CONTAINER && c->version <= version_max;
}

/* ---- save, load, delete ---- */

static int save_pair(struct pair *p, uint8_t *raw, const char kind[4], uint32_t version, size_t len, bool durable)
{
	const struct copy *best = pair_best(p), *first, *second;
	uint64_t sequence = best ? best->sequence + 1 : 1;
	int rc;

	first = best ? pair_other(p, best) : &p->copies[0];
	second = pair_other(p, first);
	if (!best && (first->state == COPY_UNREADABLE || second->state == COPY_UNREADABLE))
		return first->state == COPY_UNREADABLE ? first->error : second->error;
	if (best && durable && (rc = secure(p, best, first)) < 0)
		return rc;
	if (best && best->pass > 1) {
		if ((rc = lead(p, &best, durable)) < 0)
			return rc;
		second = best;
		first = pair_other(p, best);
	}
	header_encode(raw, kind, sequence, version, 1, flags_for(first), raw + META_HEADER_SIZE, len);
	rc = copy_write(p, first, raw, META_HEADER_SIZE + len, durable);
	if (rc < 0) {
		/* It may be whole in the page cache: without this a later load could find what was not saved. */
		if (best && first->state != COPY_UNREADABLE)
			(void)copy_over(p, best, first, true, durable);
		return rc;
	}
	/* Failing, it leaves what was written first there, or nothing that checks out: the next save begins with it. */
	header_encode(raw, kind, sequence, version, 2, flags_for(second), raw + META_HEADER_SIZE, len);
	(void)copy_write(p, second, raw, META_HEADER_SIZE + len, durable);
	return 0;
}

/* raw: room for the header, then the payload. */
static int save_raw(struct storage *s, const char *dir, const char *path, const char kind[4], uint32_t version,
		    uint8_t *raw, size_t len, bool durable, struct err *e)
{
	const struct copy *best;
	struct pair p;
	int rc = pair_read(&p, s, path, kind);

	if (rc < 0)
		return err_set(e, -rc, "save %s: its two copies can't be read: %s", path, err_short(rc));
	snprintf(p.dir, sizeof(p.dir), "%s", dir);
	best = pair_best(&p);
	if (best && !version_known(best, version))
		rc = version_refuse(best, "save", path, version, e);
	else if ((rc = save_pair(&p, raw, kind, version, len, durable)) < 0)
		err_set(e, -rc, "save %s: %s; the record saved before stays; look at the disk under the store", path,
			err_short(rc));
	pair_free(&p);
	return rc;
}

int meta_save(struct storage *s, const char *dir, const char *path, const char kind[4], uint32_t version,
	      const void *payload, size_t len, bool durable, struct err *e)
{
	uint8_t *raw;
	int rc;

	if (len > META_PAYLOAD_MAX)
		return err_set(e, ERR_LIMIT, "save %s: %zu bytes are above the limit of %u", path, len,
			       META_PAYLOAD_MAX);
	raw = malloc(META_HEADER_SIZE + len);
	if (!raw)
		return err_set(e, ERR_NOMEM, "save %s: out of memory", path);
	memcpy(raw + META_HEADER_SIZE, payload, len);
	rc = save_raw(s, dir, path, kind, version, raw, len, durable, e);
	free(raw);
	return rc;
}

static int copy_remove(struct pair *p, const struct copy *c)
{
	int rc = storage_unlink(p->s, c->path);

	return rc < 0 ? rc : storage_sync_dir(p->s, p->dir);
}

/* Before it is acted on the newest record must be certain: a power cut could take it back, to an older copy or to none.
 * Nor may it bring back what the medium has where a torn copy lies, an older record or one whose save failed: that copy
 * is made anew or, where it can't be written, removed. A copy that can't be read beside one of pass 2 is no newer, and
 * the next save begins with it; that an older or a missing one can't be written is no error either. */
static int repair(struct pair *p, const struct copy *best)
{
	const struct copy *other = pair_other(p, best);
	int rc;

	if (other->state == COPY_GOOD && other->sequence == best->sequence)
		return other->flags & META_UNDOES ? copy_over(p, best, other, true, true) : 0;
	rc = secure(p, best, other);
	if (rc < 0)
		return other->state == COPY_UNREADABLE ? 0 : rc;
	rc = copy_over(p, best, other, false, true);
	return rc < 0 && other->state == COPY_BAD ? copy_remove(p, other) : 0;
}

/* Whether `best` is the newest record for sure, and may be gone on with. */
static bool is_newest(struct pair *p, const struct copy *best)
{
	return pair_other(p, best)->state != COPY_UNREADABLE || best->pass > 1;
}

static int unreadable_refuse(const struct copy *other, const struct copy *best, const char *path, struct err *e)
{
	return err_set(e, -other->error,
		       "load %s: %s %s (%s), and %s may be older than what it holds; look at the disk under the store, "
		       "and only if that copy is lost for good move it away to go on with the other",
		       path, other->path, other->matter, err_short(other->error), best->path);
}

static int load_refuse(const struct pair *p, const char *path, struct err *e)
{
	const struct copy *a = &p->copies[0], *b = &p->copies[1];

	if (a->state == COPY_ABSENT && b->state == COPY_ABSENT)
		return err_set(e, ERR_NOENT, "load %s: neither %s nor %s is there", path, a->path, b->path);
	if (a->state == COPY_UNREADABLE || b->state == COPY_UNREADABLE)
		return err_set(e, a->state == COPY_UNREADABLE ? -a->error : -b->error,
			       "load %s: %s: %s; %s: %s; look at the disk under the store, at the owner of these files "
			       "and at the limit of open files",
			       path, a->path, a->matter, b->path, b->matter);
	return err_set(
	    e, ERR_CORRUPT,
	    "load %s: neither copy checks out (%s: %s; %s: %s); put one of them back from a backup, or remove "
	    "both to give this record up",
	    path, a->path, a->matter, b->path, b->matter);
}

int meta_load(struct storage *s, const char *path, const char kind[4], uint32_t version_max, uint32_t *ret_version,
	      void **ret_payload, size_t *ret_len, struct err *e)
{
	struct copy *best;
	struct pair p;
	int rc = pair_read(&p, s, path, kind);

	if (rc < 0)
		return err_set(e, -rc, "load %s: %s", path, err_short(rc));
	best = pair_best(&p);
	if (!best) {
		rc = load_refuse(&p, path, e);
	} else if (!is_newest(&p, best)) {
		rc = unreadable_refuse(pair_other(&p, best), best, path, e);
	} else if (!version_known(best, version_max)) {
		rc = version_refuse(best, "load", path, version_max, e);
	} else if ((rc = repair(&p, best)) < 0) {
		err_set(e, -rc,
			"load %s: what was found in %s can't be made durable: %s; look at the disk under the store",
			path, best->path, err_short(rc));
	} else {
		memmove(best->raw, best->raw + META_HEADER_SIZE, best->payload_len);
		*ret_version = best->version;
		*ret_len = best->payload_len;
		*ret_payload = TAKE_PTR(best->raw);
	}
	pair_free(&p);
	return rc;
}

static int delete_copy(struct storage *s, const char *path)
{
	int rc = storage_unlink(s, path);

	return rc == -ERR_NOENT ? 0 : rc;
}

/* The copy that counts goes last, and when the other is gone for good, unless that says the same: cut off between the
 * two, this leaves the record as it was, not an older one whose files are gone, nor one that does not check out. */
int meta_delete(struct storage *s, const char *dir, const char *path, const char kind[4], bool durable, struct err *e)
{
	struct copy *best, *other;
	struct pair p;
	int rc = pair_read(&p, s, path, kind);

	if (rc < 0)
		return err_set(e, -rc, "delete %s: its two copies can't be read: %s", path, err_short(rc));
	best = pair_best(&p);
	best = best ? best : &p.copies[0];
	other = pair_other(&p, best);
	rc = delete_copy(s, p.tmp);
	if (rc == 0)
		rc = delete_copy(s, other->path);
	if (rc == 0 && durable && !(other->state == COPY_GOOD && other->sequence == best->sequence))
		rc = storage_sync_dir(s, dir);
	if (rc == 0)
		rc = delete_copy(s, best->path);
	if (rc == 0 && durable)
		rc = storage_sync_dir(s, dir);
	pair_free(&p);
	return rc < 0 ? err_set(e, -rc, "delete %s: %s; look at the disk under the store", path, err_short(rc)) : 0;
}
