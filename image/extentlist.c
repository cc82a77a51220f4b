/* Lists of extents as JSON lines. Only what this page of docs/format.md says is written; what is read is parsed as JSON
 * and validated in full before anything is done with it, since a list that ends early or goes past the volume would put
 * half a backup, or none, onto a disk.
 */
#include "image/extentlist.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "core/check.h"

#define FORMAT_NAME "repfs-extents"
/* A line, its newline included. */
#define LINE_MAX_BYTES 1024
/* An extent of each block of the largest volume. */
#define COUNT_MAX (VOLUME_SIZE_MAX / BLOCK_SIZE)

char *extentlist_path(const char *target)
{
	char *path;

	return asprintf(&path, "%s" EXTENTLIST_SUFFIX, target) < 0 ? NULL : path;
}

/* ---- writing ---- */

static void uuid_text(const uint8_t u[16], char out[33])
{
	for (unsigned i = 0; i < 16; i++)
		(void)snprintf(out + 2 * i, 3, "%02x", u[i]);
}

int extentlist_put_head(FILE *f, const struct extentlist_head *h)
{
	char uuid[33];

	uuid_text(h->uuid, uuid);
	/* Names have no character that JSON would escape (SPEC 13). */
	int n =
	    fprintf(f,
		    "{\"format\":\"" FORMAT_NAME "\",\"version\":%d,\"volume\":\"%s\",\"uuid\":\"%s\",\"size\":%" PRIu64
		    ",\"mode\":\"%s\",\"target\":\"%s\",\"since\":%" PRIu64 ",\"checkpoint\":%" PRIu64
		    ",\"extents\":%" PRIu64 ",\"bytes\":%" PRIu64 "}\n",
		    EXTENTLIST_VERSION, h->volume, uuid, h->size, h->mode, h->target, h->since, h->checkpoint, h->count,
		    h->bytes);
	return n < 0 ? err_from_errno(errno) : 0;
}

int extentlist_put(FILE *f, uint64_t off, uint64_t len)
{
	return fprintf(f, "{\"offset\":%" PRIu64 ",\"length\":%" PRIu64 "}\n", off, len) < 0 ? err_from_errno(errno)
											     : 0;
}

/* ---- reading ---- */

struct extentlist {
	FILE *f;
	char *path;
	const char *what;
	struct extentlist_head head;
	uint64_t at, line; /* the end of the last extent; lines read */
	uint64_t left;	   /* extents to come */
};

static int bad(const struct extentlist *l, struct err *e, const char *why)
{
	return err_set(e, ERR_CORRUPT, "%s: %s, line %" PRIu64 ": %s; use another copy of the backup", l->what, l->path,
		       l->line, why);
}

/* The next line as an object, owned; NULL with *ret_rc 0 at the end of the file. */
static json_t *read_line(struct extentlist *l, int *ret_rc, struct err *e)
{
	char line[LINE_MAX_BYTES];

	*ret_rc = 0;
	l->line++;
	if (!fgets(line, sizeof(line), l->f)) {
		if (ferror(l->f))
			*ret_rc = err_set(e, ERR_IO, "%s: reading %s: %s", l->what, l->path, strerror(errno));
		return NULL;
	}
	json_t *j = strchr(line, '\n') ? json_loads(line, JSON_REJECT_DUPLICATES, NULL) : NULL;
	if (!json_is_object(j)) {
		json_decref(j);
		*ret_rc = bad(l, e, "it is cut off, or no JSON object");
		return NULL;
	}
	return j;
}

static bool number(const json_t *j, const char *key, uint64_t max, uint64_t *ret)
{
	const json_t *v = json_object_get(j, key);

	if (!json_is_integer(v) || json_integer_value(v) < 0 || (uint64_t)json_integer_value(v) > max)
		return false;
	*ret = (uint64_t)json_integer_value(v);
	return true;
}

static bool text(const json_t *j, const char *key, char *out, size_t size)
{
	const char *s = json_string_value(json_object_get(j, key));

	if (!s || strlen(s) >= size)
		return false;
	(void)snprintf(out, size, "%s", s);
	return true;
}

static bool parse_uuid(const json_t *j, uint8_t out[16])
{
	char s[33];

	if (!text(j, "uuid", s, sizeof(s)) || strspn(s, "0123456789abcdef") != 32)
		return false;
	for (unsigned i = 0; i < 16; i++) {
		char pair[3] = {s[2 * i], s[2 * i + 1], 0};

		out[i] = (uint8_t)strtoul(pair, NULL, 16);
	}
	return true;
}

static int parse_head(struct extentlist *l, const json_t *j, struct err *e)
{
	struct extentlist_head *h = &l->head;
	uint64_t version = 0;
	char format[32] = "";

	if (!text(j, "format", format, sizeof(format)) || strcmp(format, FORMAT_NAME) != 0)
		return bad(l, e, "it is no list of extents of repfs");
	if (!number(j, "version", UINT32_MAX, &version) || version != EXTENTLIST_VERSION)
		return err_set(e, ERR_VERSION, "%s: %s is of version %" PRIu64 ", and this program reads %d", l->what,
			       l->path, version, EXTENTLIST_VERSION);
	if (!text(j, "volume", h->volume, sizeof(h->volume)) || !parse_uuid(j, h->uuid) ||
	    !text(j, "mode", h->mode, sizeof(h->mode)) || !text(j, "target", h->target, sizeof(h->target)) ||
	    (strcmp(h->target, "raw") != 0 && strcmp(h->target, "zst") != 0) ||
	    !number(j, "size", VOLUME_SIZE_MAX, &h->size) || !number(j, "since", INT64_MAX, &h->since) ||
	    !number(j, "checkpoint", INT64_MAX, &h->checkpoint) || !number(j, "extents", COUNT_MAX, &h->count) ||
	    !number(j, "bytes", h->size, &h->bytes))
		return bad(l, e, "a field is missing or not what it has to be");
	return 0;
}

static int read_head(struct extentlist *l, struct err *e)
{
	int rc;
	json_t *j = read_line(l, &rc, e);

	if (rc < 0)
		return rc;
	rc = j ? parse_head(l, j, e) : bad(l, e, "it is empty");
	json_decref(j);
	l->left = l->head.count;
	l->at = 0;
	return rc;
}

int extentlist_next(struct extentlist *l, struct range *ret, struct err *e)
{
	struct range r = {0};
	int rc;
	json_t *j = read_line(l, &rc, e);

	if (rc < 0)
		return rc;
	if (!j)
		return l->left ? bad(l, e, "it ends too early") : 0;
	bool good = l->left > 0 && number(j, "offset", l->head.size, &r.off) &&
		    number(j, "length", l->head.size - r.off, &r.len) && r.len > 0 && r.off >= l->at;
	json_decref(j);
	if (!good)
		return bad(l, e, "it is not an extent behind those before it, within the volume");
	l->left--;
	l->at = range_end(r);
	*ret = r;
	return 1;
}

int extentlist_rewind(struct extentlist *l, struct err *e)
{
	rewind(l->f);
	l->line = 0;
	return read_head(l, e);
}

static int validate(struct extentlist *l, struct err *e)
{
	uint64_t bytes = 0;
	struct range r = {0};
	int rc = read_head(l, e);

	while (rc == 0) {
		rc = extentlist_next(l, &r, e);
		if (rc <= 0)
			break;
		bytes += r.len;
		rc = 0;
	}
	if (rc == 0 && bytes != l->head.bytes)
		rc = bad(l, e, "the extents do not add up to what its head says");
	return rc == 0 ? extentlist_rewind(l, e) : rc;
}

int extentlist_open(const char *what, const char *target, struct extentlist **ret, struct err *e)
{
	struct extentlist *l = calloc(1, sizeof(*l));
	int rc;

	if (l)
		l->path = extentlist_path(target);
	if (!l || !l->path) {
		free(l);
		return err_set(e, ERR_NOMEM, "%s: out of memory", what);
	}
	l->what = what;
	l->f = fopen(l->path, "re");
	if (l->f)
		rc = validate(l, e);
	else if (errno == ENOENT)
		rc = err_set(e, ERR_NOENT, "%s: there is no %s: a backup of changed blocks has its extents there", what,
			     l->path);
	else
		rc = err_set(e, -err_from_errno(errno), "%s: opening %s: %s", what, l->path, strerror(errno));
	if (rc < 0) {
		extentlist_close(l);
		return rc;
	}
	*ret = l;
	return 0;
}

const struct extentlist_head *extentlist_head(const struct extentlist *l)
{
	return &l->head;
}

void extentlist_close(struct extentlist *l)
{
	if (!l)
		return;
	if (l->f)
		(void)fclose(l->f);
	free(l->path);
	free(l);
}
