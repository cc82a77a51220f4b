/* Verbs of ranges and reports: read, write, report. The bytes travel as base64, a bounded piece a request. */
#include <stdlib.h>
#include <string.h>

#include "core/bytes.h"
#include "core/os/cleanup.h"
#include "fs/repl_shell.h"
#include "fs/verbs_internal.h"

_Static_assert(CTL_PIECE_MAX <= WIRE_RANGE_MAX, "a piece is one message");
_Static_assert(BASE64_LEN(CTL_PIECE_MAX) + 4096 <= CTL_LINE_MAX, "a piece fits a request");

/* The text of the bytes; NULL (zeroes) too. */
static json_t *bytes_json(const void *p, size_t len)
{
	_cleanup_free_ char *text = malloc(BASE64_LEN(len) + 1);
	_cleanup_free_ void *zeroes = p ? NULL : calloc(1, len);
	if (text == NULL || (p == NULL && zeroes == NULL))
		return NULL;
	base64_encode(p ? p : zeroes, len, text);
	return json_stringn(text, BASE64_LEN(len));
}

int verb_do_read(const struct call *c)
{
	const char *name;
	int err = verb_need_name(c, &name);
	if (err)
		return err;
	uint64_t off = verb_arg_u64(c, "offset", UINT64_MAX), len = verb_arg_u64(c, "length", 0);
	if (off == UINT64_MAX || len == 0 || len > CTL_PIECE_MAX)
		return err_set(c->e, ERR_USAGE, "read %s: it takes an offset, and a length from 1 to %u", name,
			       CTL_PIECE_MAX);
	void *data = NULL;
	err = verb_prefixed(c, name, hub_read(c, name, verb_arg_bool(c, "remote", false), off, len, &data));
	if (err)
		return err;
	json_t *text = bytes_json(data, len);
	free(data);
	if (text == NULL)
		return err_set(c->e, ERR_NOMEM, "read %s: out of memory", name);
	verb_result(c, json_pack("{s:s, s:I, s:I, s:o}", "volume", name, "offset", (json_int_t)off, "length",
				 (json_int_t)len, "data", text));
	return 0;
}

int verb_do_write(const struct call *c)
{
	const char *name;
	int err = verb_need_name(c, &name);
	if (err)
		return err;
	uint64_t off = verb_arg_u64(c, "offset", UINT64_MAX);
	const json_t *text = json_object_get(c->args, "data");
	bool flush = verb_arg_bool(c, "flush", false);
	_cleanup_free_ void *data = malloc(CTL_PIECE_MAX);
	if (data == NULL)
		return err_set(c->e, ERR_NOMEM, "write %s: out of memory", name);
	int64_t len = json_is_string(text)
			  ? base64_decode(json_string_value(text), json_string_length(text), data, CTL_PIECE_MAX)
			  : -1;
	if (off == UINT64_MAX || len < 0 || (len == 0 && !flush))
		return err_set(c->e, ERR_USAGE,
			       "write %s: it takes an offset, and as data 1 to %u bytes in base64 (none with flush)",
			       name, CTL_PIECE_MAX);
	err = hub_write(c, name, verb_arg_bool(c, "remote", false), off, (uint64_t)len, data, flush);
	if (err)
		return verb_prefixed(c, name, err);
	verb_result(c,
		    json_pack("{s:s, s:I, s:I}", "volume", name, "offset", (json_int_t)off, "length", (json_int_t)len));
	return 0;
}

int verb_do_report(const struct call *c)
{
	json_t *j = NULL;
	int err = hub_report(c, verb_arg_bool(c, "remote", false), &j);
	if (err) {
		char text[ERR_TEXT_MAX];
		memcpy(text, c->e->text, sizeof(text));
		return err_set(c->e, -err, "report: %.400s", text);
	}
	verb_result(c, j);
	return 0;
}
