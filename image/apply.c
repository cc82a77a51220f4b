#include "image/apply.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "image/store_internal.h"
#include "image/zero.h"
#include "image/zst.h"

struct apply {
	const char *file;
	struct disk *source;
	struct extentlist *list;
	uint64_t size;
	uint8_t *buf; /* APPLY_PIECE */
	apply_write_fn write;
	void *arg;
	store_progress_fn progress;
	void *progress_arg;
	uint64_t done, total;
	bool written; /* something may have been */
};

static int open_source(struct apply *a, struct err *e)
{
	const struct extentlist_head *h = extentlist_head(a->list);
	struct disk *file;
	uint64_t size;
	int rc = disk_posix_open(a->file, STORAGE_RDONLY, &file);

	if (rc == -ERR_NOENT)
		return err_set(e, ERR_FAILED, "there is no file %s; check its path", a->file);
	if (rc == -ERR_NOTSUP)
		return err_set(e, ERR_USAGE, "%s is neither a file nor a block device", a->file);
	if (rc < 0)
		return err_set(e, -rc, "opening %s: %s", a->file, err_short(rc));
	if (strcmp(h->target, "zst") == 0)
		rc = disk_zst_open(file, a->file, &a->source, e);
	else
		a->source = file;
	if (rc < 0)
		return rc;
	rc = disk_get_size(a->source, &size);
	if (rc < 0)
		return err_set(e, -rc, "reading the size of %s: %s", a->file, err_short(rc));
	if (size != h->size)
		return err_set(e, ERR_CORRUPT,
			       "%s has %" PRIu64 " bytes and its list of extents says %" PRIu64
			       ": they are not of one backup, or it was cut off",
			       a->file, size, h->size);
	if (a->size != h->size)
		return err_set(e, ERR_STATE,
			       "the backup is of a volume of %" PRIu64 " bytes, and this one has %" PRIu64
			       "; apply it to the volume that its base was restored to",
			       h->size, a->size);
	return 0;
}

static int tell(struct apply *a, uint64_t n, struct err *e)
{
	a->done += n;
	if (!a->progress || a->progress(a->progress_arg, a->done, a->total) == 0)
		return 0;
	return err_set(e, ERR_CANCELED,
		       a->written ? "cancelled when a part of it was written; the same again completes it"
				  : "cancelled; nothing was written");
}

static int write_piece(struct apply *a, uint64_t off, size_t len, struct err *e)
{
	const uint8_t *p = a->buf;

	while (len > 0) {
		bool zero;
		size_t n = zero_run(p, len, BLOCK_SIZE, &zero);
		int rc;

		a->written = true;
		rc = a->write(a->arg, off, n, zero ? NULL : p);
		if (rc < 0)
			return err_set(e, -rc,
				       "writing at byte %" PRIu64 ": %s; a part of it is written, the same again "
				       "completes it",
				       off, err_short(rc));
		off += n;
		p += n;
		len -= n;
	}
	return 0;
}

/* All extents: read, and written if `write`. */
static int go_over(struct apply *a, bool write, struct err *e)
{
	struct range r = {0};
	int more;

	while ((more = extentlist_next(a->list, &r, e)) == 1) {
		while (r.len > 0) {
			size_t n = (size_t)min_u64(r.len, APPLY_PIECE - r.off % APPLY_PIECE);
			int rc = disk_read(a->source, r.off, a->buf, n);

			if (rc < 0)
				return err_set(e, -rc, "reading %s at byte %" PRIu64 ": %s; use another copy%s",
					       a->file, r.off, err_short(rc),
					       a->written ? "" : ", nothing was written");
			if (write)
				rc = write_piece(a, r.off, n, e);
			if (rc == 0)
				rc = tell(a, n, e);
			if (rc < 0)
				return rc;
			r.off += n;
			r.len -= n;
		}
	}
	return more;
}

int apply_backup(const char *file, uint64_t size, apply_write_fn fn, void *arg, store_progress_fn progress,
		 void *progress_arg, struct extentlist_head *ret_head, struct err *e)
{
	struct apply a = {.file = file,
			  .size = size,
			  .write = fn,
			  .arg = arg,
			  .progress = progress,
			  .progress_arg = progress_arg,
			  .buf = malloc(APPLY_PIECE)};
	int rc = a.buf ? extentlist_open("apply", file, &a.list, e) : err_set(e, ERR_NOMEM, "out of memory");

	if (rc == 0)
		rc = open_source(&a, e);
	if (rc == 0) {
		bool check = strcmp(extentlist_head(a.list)->target, "zst") == 0;

		a.total = extentlist_head(a.list)->bytes * (check ? 2 : 1);
		if (check)
			rc = go_over(&a, false, e);
		if (rc == 0)
			rc = extentlist_rewind(a.list, e);
		if (rc == 0)
			rc = go_over(&a, true, e);
	}
	if (rc == 0 && ret_head)
		*ret_head = *extentlist_head(a.list);
	disk_close(a.source);
	extentlist_close(a.list);
	free(a.buf);
	return rc;
}

/* ---- without a daemon ---- */

static int write_volume(void *arg, uint64_t off, uint64_t len, const void *buf)
{
	struct volume_req r = {.kind = buf ? VOLUME_WRITE : VOLUME_DISCARD, .off = off, .len = len, .buf = buf};

	return volume_write(arg, &r, 1);
}

static int check_alone(const struct repl_meta *m, const char *volume, struct err *e)
{
	if (m->role == ROLE_STANDALONE && !m->has_peer && (m->state == STATE_NONE || m->state == STATE_DONE))
		return 0;
	return store_refuse(e, ERR_STATE, "import", volume,
			    "its group %s is %s, or has a peer, which has to be told what changes; start repfs on the "
			    "store and apply it then",
			    m->group, role_name(m->role));
}

int store_apply(struct store *st, const char *volume, const char *file, store_progress_fn fn, void *arg,
		struct extentlist_head *ret_head, struct err *e)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	struct volume *v = NULL;
	struct err why = {0};
	uint32_t i = 0;
	int rc = store_find_volume(st, volume, &m, &i, &why);

	if (rc < 0)
		return rc == -ERR_NOENT
			   ? store_refuse(
				 e, ERR_NOENT, "import", volume,
				 "there is no such volume to apply it to; restore its base first, without --apply")
			   : store_refuse(e, -rc, "import", volume, "%s", why.text);
	POST(m != NULL);
	rc = check_alone(m, volume, e);
	if (rc < 0)
		return rc;
	/* As an import does: a peer must never take it for a fresh one. */
	if (m->lineage.current == 0) {
		m->lineage.current = random_u64_nonzero();
		m->alone = true;
		rc = store_save_group(st, m, e);
		if (rc < 0)
			return rc;
	}
	rc = store_open_volume(st, m, i, &v, &why);
	if (rc == 0)
		rc = apply_backup(file, m->volumes[i].size, write_volume, v, fn, arg, ret_head, &why);
	if (rc == 0 && (rc = volume_sync(v)) < 0)
		rc = err_set(&why, -rc, "syncing the disk: %s", err_short(rc));
	volume_close(v);
	return rc < 0 ? store_refuse(e, -rc, "import", volume, "%s", why.text) : 0;
}
