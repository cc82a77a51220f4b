/* Copies a layer of a volume out into a plain sparse file (image/store.h): the engine of backups, driven to its end in
 * the caller's thread.
 */
#include <inttypes.h>

#include "image/backup.h"
#include "image/store.h"

static int copy(struct backup *b, const char *file, store_progress_fn fn, void *arg, struct err *e)
{
	struct backup_step step;
	uint64_t done, total;
	int more;

	do {
		more = backup_step(b, &step);
		if (more < 0)
			return err_set(e, -more, "export to %s: %s at byte %" PRIu64 ": %s", file,
				       step.side == BACKUP_SOURCE ? "reading the volume" : "writing", step.off,
				       err_short(more));
		backup_progress(b, &done, &total);
		if (fn && fn(arg, done, total) != 0)
			return err_set(e, ERR_CANCELED, "export to %s: cancelled; nothing is left of it", file);
	} while (more);
	return backup_finish(b, NULL, e);
}

int volume_export(struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t size, const char *file,
		  store_progress_fn fn, void *arg, struct err *e)
{
	const struct backup_args args = {.what = "export to",
					 .volume = v,
					 .layer = layer,
					 .ckpt = ckpt,
					 .size = size ? size : volume_size(v),
					 .path = file,
					 .format = BACKUP_RAW};
	struct backup *b = NULL;
	int rc = backup_open(&args, &b, e);

	if (rc == 0)
		rc = copy(b, file, fn, arg, e);
	backup_close(b);
	return rc;
}
