/* check: everything in a store that can be checked without reading whole disks. Each group's record, each volume's
 * files by that record, and the checksum of every block that an overlay holds. It goes on after a problem, so that one
 * run lists all of them. The cost follows what the overlays hold.
 *
 * It works on a store that no daemon uses, under its lock, and repairs nothing.
 */
#include "cli/cli.h"

#include <stdlib.h>
#include <string.h>

#include "core/os/cleanup.h"
#include "image/intent.h"

#define CHECK_CHUNK (1U << 20)
/* One overlay with everything wrong must not fill the report. */
#define CHECK_BLOCKS_TOLD 8U

struct check {
	struct cli *c;
	struct store *st;
	json_t *problems;
	uint64_t groups, volumes, overlays, bytes, bases;
	void *buf;
	const char *group, *volume;
};

static void problem(struct check *k, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void problem(struct check *k, const char *fmt, ...)
{
	char text[ERR_TEXT_MAX + 128];
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	json_t *o = json_pack("{s:s?, s:s?, s:s}", "group", k->group, "volume", k->volume, "message", text);
	(void)json_array_append_new(k->problems, o ? o : json_null());
	if (!k->c->json)
		(void)printf("%s%s%s: %s\n", k->group ? k->group : "store", k->volume ? " " : "",
			     k->volume ? k->volume : "", text);
}

/* [off, off + len) is data of the overlay: every block's checksum is looked at by reading it. */
static void check_run(struct check *k, struct volume *v, enum volume_layer layer, uint64_t ckpt, uint64_t off,
		      uint64_t len, unsigned *bad)
{
	char name[48];
	if (layer == LAYER_ACTIVE)
		(void)snprintf(name, sizeof(name), "the active overlay");
	else
		(void)snprintf(name, sizeof(name), "the overlay of checkpoint %llu", (unsigned long long)ckpt);
	if (volume_read_overlay(v, layer, ckpt, off, len, k->buf) == 0)
		return;
	for (uint64_t at = off; at < off + len; at += BLOCK_SIZE) {
		uint64_t n = min_u64(BLOCK_SIZE, off + len - at);
		int rc = volume_read_overlay(v, layer, ckpt, at, n, k->buf);
		if (rc == 0)
			continue;
		if ((*bad)++ < CHECK_BLOCKS_TOLD)
			problem(k, "%s: the block at %llu %s", name, (unsigned long long)at, err_short(rc));
		else if (*bad == CHECK_BLOCKS_TOLD + 1)
			problem(k, "%s: and more blocks", name);
	}
}

static void check_overlay(struct check *k, struct volume *v, enum volume_layer layer, uint64_t ckpt)
{
	uint64_t size = volume_size(v);
	unsigned bad = 0;
	k->overlays++;
	for (uint64_t off = 0; off < size && !cli_interrupted();) {
		struct extent x;
		int rc = volume_extent(v, layer, ckpt, off, &x);
		if (rc < 0 || x.len == 0 || x.off > off || x.off + x.len <= off) {
			problem(k, "the extents of checkpoint %llu can't be read: %s", (unsigned long long)ckpt,
				err_short(rc));
			return;
		}
		uint64_t end = min_u64(x.off + x.len, size);
		for (; x.data && off < end && !cli_interrupted(); off += CHECK_CHUNK) {
			uint64_t n = min_u64(CHECK_CHUNK, end - off);
			check_run(k, v, layer, ckpt, off, n, &bad);
			k->bytes += n;
		}
		off = end;
	}
}

static void check_intent(struct check *k, const struct repl_volume *rv)
{
	struct storage *s = store_storage(k->st);
	struct intent *t = NULL;
	struct disk *d = NULL;
	struct err e = {0};
	char path[STORAGE_PATH_MAX];
	(void)snprintf(path, sizeof(path), "volumes/%s/intent", rv->name);
	int rc = storage_open(s, path, STORAGE_RDONLY, &d);
	/* One that was never written to by a daemon has none yet. */
	if (rc == -ERR_NOENT)
		return;
	if (rc < 0) {
		problem(k, "%s: %s", path, err_short(rc));
		return;
	}
	disk_close(d);
	rc = intent_open(s, rv->name, rv->size, 0, &t, &e);
	if (rc < 0)
		problem(k, "%s", e.text[0] ? e.text : err_short(rc));
	intent_close(t);
}

static void check_volume(struct check *k, const struct repl_meta *m, uint32_t i)
{
	struct volume *v = NULL;
	struct err e = {0};
	k->volume = m->volumes[i].name;
	k->volumes++;
	int rc = store_open_volume(k->st, m, i, &v, &e);
	if (rc < 0) {
		problem(k, "%s", e.text[0] ? e.text : err_short(rc));
	} else {
		const char *format, *base = volume_base(v, &format);
		k->bases += base != NULL;
		if (volume_check_base(v, &e) < 0)
			problem(k, "base image %s: %s", base ? base : "?", e.text);
		for (uint32_t n = 0; n < m->n_ckpts && !cli_interrupted(); n++)
			check_overlay(k, v, LAYER_UNDO, m->ckpts[n].number);
		if (m->active_id)
			check_overlay(k, v, LAYER_ACTIVE, 0);
		struct volume_clone clones[GROUP_CLONES_MAX];
		uint32_t n_clones = store_clones_of(m, i, clones);
		for (uint32_t n = 0; n < n_clones && !cli_interrupted(); n++)
			if (repl_meta_find_ckpt(m, clones[n].ckpt) >= 0)
				check_overlay(k, v, LAYER_CLONE, clones[n].id);
		volume_close(v);
	}
	check_intent(k, &m->volumes[i]);
	k->volume = NULL;
}

static int check_group(void *arg, const char *group)
{
	struct check *k = arg;
	_cleanup_free_ struct repl_meta *m = NULL;
	struct err e = {0};
	k->group = group;
	k->groups++;
	int rc = store_load_group(k->st, group, &m, &e);
	if (rc < 0)
		problem(k, "%s", e.text[0] ? e.text : err_short(rc));
	for (uint32_t i = 0; rc == 0 && i < m->n_volumes && !cli_interrupted(); i++)
		check_volume(k, m, i);
	k->group = NULL;
	return cli_interrupted() ? -ERR_INTR : 0;
}

int cmd_check(struct cli *c)
{
	struct check k = {.c = c};
	int rc = cli_offline(c, 0, &k.st);
	if (rc)
		return rc;
	if (!k.st)
		return cli_fail(c, ERR_BUSY, "a daemon uses the store %.1000s; end it first: repctl shutdown",
				c->store_path);
	cli_defer_signals(true);
	k.problems = json_array();
	k.buf = malloc(CHECK_CHUNK);
	rc = k.problems && k.buf ? store_list_groups(k.st, check_group, &k) : -ERR_NOMEM;
	if (rc < 0 && rc != -ERR_INTR && rc != -ERR_NOMEM)
		problem(&k, "the groups can't be listed: %s", err_short(rc));
	store_close(k.st);
	free(k.buf);
	cli_defer_signals(false);
	if (rc == -ERR_NOMEM || cli_interrupted()) {
		json_decref(k.problems);
		return rc == -ERR_NOMEM
			   ? cli_fail(c, ERR_NOMEM, "out of memory")
			   : cli_fail_text(c, 128 + cli_interrupted(), "interrupted; the rest was not checked");
	}
	size_t n = json_array_size(k.problems);
	char text[FORMAT_SIZE];
	format_bytes(k.bytes, text);
	char bases[64] = "";
	if (k.bases)
		(void)snprintf(bases, sizeof(bases), ", %llu base image%s", (unsigned long long)k.bases,
			       k.bases == 1 ? "" : "s");
	cli_note(c, "%llu groups, %llu volumes%s, %llu overlays with %s checked: %zu problem%s",
		 (unsigned long long)k.groups, (unsigned long long)k.volumes, bases, (unsigned long long)k.overlays,
		 text, n, n == 1 ? "" : "s");
	json_t *doc = json_pack("{s:i, s:I, s:I, s:I, s:I, s:I, s:o}", "schema", 1, "bases", (json_int_t)k.bases,
				"groups", (json_int_t)k.groups, "volumes", (json_int_t)k.volumes, "overlays",
				(json_int_t)k.overlays, "overlay_bytes", (json_int_t)k.bytes, "problems", k.problems);
	if (!doc)
		return cli_fail(c, ERR_NOMEM, "out of memory");
	rc = cli_finish(c, doc);
	return n ? 1 : rc;
}
