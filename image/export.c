/* Copies a layer of a volume out into a plain sparse file (image/store.h).
 *
 * The copy is made as FILE.part, which must not exist, synced, and then renamed to FILE without replacing anything,
 * so that FILE is whole or absent. On failure FILE.part is removed.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/io.h"
#include "image/store.h"
#include "image/zero.h"

/* Bytes copied at a time. */
#define COPY_CHUNK (1U << 20)

struct export_job {
	struct volume *v;
	enum volume_layer layer;
	uint64_t ckpt;
	const char *file;
	struct disk *target;
	store_progress_fn progress;
	void *arg;
};

static int read_layer(const struct export_job *x, uint64_t off, uint64_t len, void *buf)
{
	switch (x->layer) {
	case LAYER_DISK:
		return volume_read_disk(x->v, off, len, buf);
	case LAYER_VIEW:
		return volume_read_view(x->v, x->ckpt, off, len, buf);
	case LAYER_IMAGE:
		return volume_read_ckpt(x->v, x->ckpt, off, len, buf);
	case LAYER_ACTIVE:
	case LAYER_UNDO:
		return volume_read_overlay(x->v, x->layer, x->ckpt, off, len, buf);
	}
	UNREACHABLE();
}

static int write_part(const struct export_job *x, uint64_t off, const uint8_t *buf, size_t len)
{
	/* An overlay's data ranges are its blocks (SPEC 4): a block of zeroes there is data. */
	bool keep_zeroes = x->layer == LAYER_ACTIVE || x->layer == LAYER_UNDO;

	while (len > 0) {
		bool zero = false;
		size_t n = keep_zeroes ? len : zero_run(buf, len, BLOCK_SIZE, &zero);
		int rc = zero ? 0 : disk_write(x->target, off, buf, n);

		if (rc < 0)
			return rc;
		off += n;
		buf += n;
		len -= n;
	}
	return 0;
}

static int copy_layer(const struct export_job *x, uint8_t *buf, struct err *e)
{
	uint64_t off = 0, size = volume_size(x->v);
	int rc = disk_set_size(x->target, size);

	if (rc < 0)
		return err_set(e, -rc, "export to %s: making it %" PRIu64 " bytes large: %s", x->file, size,
			       err_short(rc));
	while (off < size) {
		struct extent at;

		rc = volume_extent(x->v, x->layer, x->ckpt, off, &at);
		if (rc == 0 && at.data) {
			at.len = min_u64(at.len, COPY_CHUNK);
			rc = read_layer(x, off, at.len, buf);
		}
		if (rc < 0)
			return err_set(e, -rc, "export to %s: reading the volume at byte %" PRIu64 ": %s", x->file, off,
				       err_short(rc));
		rc = at.data ? write_part(x, off, buf, (size_t)at.len) : 0;
		if (rc < 0)
			return err_set(e, -rc, "export to %s: writing at byte %" PRIu64 ": %s", x->file, off,
				       err_short(rc));
		off += at.len;
		if (x->progress && x->progress(x->arg, off, size) != 0)
			return err_set(e, ERR_CANCELED, "export to %s: cancelled; nothing is left of it", x->file);
	}
	rc = disk_sync(x->target);
	if (rc < 0)
		return err_set(e, -rc, "export to %s: syncing it: %s", x->file, err_short(rc));
	return 0;
}

/* 0 or a positive errno. */
static int rename_new(const char *from, const char *to)
{
	struct stat st;

	if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0)
		return 0;
	if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP)
		return errno;
	/* A filesystem without that flag: a hard link does not replace either. */
	if (link(from, to) == 0) {
		(void)unlink(from);
		return 0;
	}
	if (errno == EEXIST)
		return errno;
	/* One without hard links too. */
	if (lstat(to, &st) == 0)
		return EEXIST;
	return rename(from, to) == 0 ? 0 : errno;
}

static int finish(const struct export_job *x, const char *part, struct err *e)
{
	char dir[4096];
	int rc, sys = rename_new(part, x->file);

	if (sys == EEXIST)
		return err_set(e, ERR_EXIST, "export to %s: the file exists by now; choose another name", x->file);
	if (sys)
		return err_set(e, -err_from_errno(sys), "export to %s: renaming %s: %s", x->file, part, strerror(sys));
	io_dirname(x->file, dir, sizeof(dir));
	rc = io_fsync_dir(dir);
	if (rc < 0) {
		(void)unlink(x->file);
		return err_set(e, -rc, "export to %s: syncing folder %s: %s", x->file, dir, err_short(rc));
	}
	return 0;
}

static int open_target(struct export_job *x, const char *part, struct err *e)
{
	struct stat st;
	int rc;

	if (lstat(x->file, &st) == 0)
		return err_set(e, ERR_EXIST, "export to %s: the file exists; choose another name or remove it",
			       x->file);
	rc = disk_posix_open(part, STORAGE_CREATE | STORAGE_EXCL, &x->target);
	if (rc == -ERR_EXIST)
		return err_set(
		    e, ERR_EXIST,
		    "export to %s: %s is in the way; another export is writing it, or one was cut off: then remove it",
		    x->file, part);
	if (rc < 0)
		return err_set(e, rc == -ERR_NOENT ? ERR_FAILED : -rc,
			       "export to %s: making %s: %s; its folder must exist and be writable", x->file, part,
			       err_short(rc));
	return 0;
}

static int export_whole(struct export_job *x, const char *part, uint8_t *buf, struct err *e)
{
	int rc = open_target(x, part, e);

	if (rc < 0)
		return rc;
	rc = copy_layer(x, buf, e);
	disk_close(x->target);
	if (rc == 0)
		rc = finish(x, part, e);
	if (rc < 0)
		(void)unlink(part);
	return rc;
}

int volume_export(struct volume *v, enum volume_layer layer, uint64_t ckpt, const char *file, store_progress_fn fn,
		  void *arg, struct err *e)
{
	struct export_job x = {.v = v, .layer = layer, .ckpt = ckpt, .file = file, .progress = fn, .arg = arg};
	uint8_t *buf = malloc(COPY_CHUNK);
	char *part = NULL;
	int rc;

	if (!buf || asprintf(&part, "%s.part", file) < 0) {
		part = NULL;
		rc = err_set(e, ERR_NOMEM, "export to %s: out of memory", file);
	} else {
		rc = export_whole(&x, part, buf, e);
	}
	free(part);
	free(buf);
	return rc;
}
