/* What a hub does, from the command line: read, write, report. */
#include "cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/bytes.h"
#include "core/os/cleanup.h"
#include "core/settings.h"
#include "net/ctl.h"

static int number(const struct cli *c, unsigned i, const char *what, uint64_t *ret)
{
	struct err e = {0};
	if (parse_size(c->args[i], ret, &e) == 0 && *ret <= VOLUME_SIZE_MAX)
		return 0;
	return cli_fail(c, ERR_USAGE, "%s '%.60s': a number of bytes, or one with K, M, G or T, of at most 64T", what,
			c->args[i]);
}

static json_t *range_args(const struct cli *c, uint64_t off)
{
	json_t *args = json_pack("{s:s, s:I}", "name", c->args[0], "offset", (json_int_t)off);
	if (args && cli_has(c, "remote") && json_object_set_new(args, "remote", json_true()) != 0) {
		json_decref(args);
		args = NULL;
	}
	return args;
}

static int no_memory(const struct cli *c)
{
	return cli_fail(c, ERR_NOMEM, "out of memory, or an argument is not valid UTF-8");
}

/* One piece into buf[len]. */
static int read_piece(struct cli *c, uint64_t off, uint64_t len, void *buf)
{
	json_t *args = range_args(c, off), *r = NULL;
	if (!args || json_object_set_new(args, "length", json_integer((json_int_t)len)) != 0) {
		json_decref(args);
		return no_memory(c);
	}
	int rc = cli_call_timed(c, "read", args, &r);
	if (rc)
		return rc;
	const json_t *data = json_object_get(r, "data");
	int64_t n =
	    json_is_string(data) ? base64_decode(json_string_value(data), json_string_length(data), buf, len) : -1;
	json_decref(r);
	return n == (int64_t)len ? 0 : cli_fail(c, ERR_FAILED, "the daemon's answer is not what was asked for");
}

static int write_all(const struct cli *c, const uint8_t *buf, size_t len)
{
	while (len) {
		ssize_t n = write(STDOUT_FILENO, buf, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return cli_fail(c, ERR_FAILED, "standard output: %s", strerror(errno));
		buf += n;
		len -= (size_t)n;
	}
	return 0;
}

int cmd_read(struct cli *c)
{
	uint64_t off, len;
	int rc = number(c, 1, "OFFSET", &off);
	if (!rc)
		rc = number(c, 2, "LENGTH", &len);
	if (rc)
		return rc;
	if (c->json)
		return cli_fail(c, ERR_USAGE, "it prints the bytes themselves; leave --json out");
	if (len == 0 || len > VOLUME_SIZE_MAX - off)
		return cli_fail(c, ERR_USAGE, "LENGTH is at least 1, and no volume reaches beyond 64T");
	_cleanup_free_ uint8_t *buf = malloc(CTL_PIECE_MAX);
	if (!buf)
		return no_memory(c);
	/* The last byte first: a range that reaches too far is refused before anything is printed. */
	rc = len > CTL_PIECE_MAX ? read_piece(c, off + len - 1, 1, buf) : 0;
	while (len && !rc) {
		uint64_t n = len < CTL_PIECE_MAX ? len : CTL_PIECE_MAX;
		rc = read_piece(c, off, n, buf);
		if (!rc)
			rc = write_all(c, buf, (size_t)n);
		off += n;
		len -= n;
	}
	return rc;
}

/* Up to a piece; the end of the input gives less. */
static int fill(const struct cli *c, uint8_t *buf, size_t *ret_len)
{
	size_t len = 0;
	while (len < CTL_PIECE_MAX) {
		ssize_t n = read(STDIN_FILENO, buf + len, CTL_PIECE_MAX - len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return cli_fail(c, ERR_FAILED, "standard input: %s", strerror(errno));
		if (n == 0)
			break;
		len += (size_t)n;
	}
	*ret_len = len;
	return 0;
}

static int write_piece(struct cli *c, uint64_t off, const uint8_t *buf, size_t len, bool flush)
{
	_cleanup_free_ char *text = malloc(BASE64_LEN(len) + 1);
	json_t *args = text ? range_args(c, off) : NULL, *r = NULL;
	if (!args)
		return no_memory(c);
	base64_encode(buf, len, text);
	if (json_object_set_new(args, "data", json_string(text)) != 0 ||
	    json_object_set_new(args, "flush", json_boolean(flush)) != 0) {
		json_decref(args);
		return no_memory(c);
	}
	int rc = cli_call_timed(c, "write", args, &r);
	json_decref(r);
	return rc;
}

int cmd_write(struct cli *c)
{
	uint64_t off, done = 0;
	size_t len = 0;
	int rc = number(c, 1, "OFFSET", &off);
	if (rc)
		return rc;
	_cleanup_free_ uint8_t *buf = malloc(CTL_PIECE_MAX);
	if (!buf)
		return no_memory(c);
	do {
		rc = fill(c, buf, &len);
		if (!rc && done == 0 && len == 0)
			return cli_fail(c, ERR_USAGE, "there is nothing on standard input");
		/* Durable when it returns: the last piece is followed by a flush. */
		if (!rc)
			rc = write_piece(c, off + done, buf, len, len < CTL_PIECE_MAX);
		if (!rc)
			done += len;
	} while (!rc && len == CTL_PIECE_MAX);
	if (rc && done)
		cli_note(c, "%s: the first %llu bytes were written", c->args[0], (unsigned long long)done);
	if (rc)
		return rc;
	return cli_finish(c, json_pack("{s:i, s:s, s:I, s:I}", "schema", 1, "volume", c->args[0], "offset",
				       (json_int_t)off, "length", (json_int_t)done));
}

static void report_row(struct table *t, const char *host, const json_t *v)
{
	char size[FORMAT_SIZE] = "-", id[24] = "-";
	uint64_t n;
	if (js_u64(v, "size", &n))
		format_bytes(n, size);
	if (js_u64(v, "id", &n))
		(void)snprintf(id, sizeof(id), "%llu", (unsigned long long)n);
	const char *cells[] = {js_str(v, "name", NULL),	 js_str(v, "group", NULL), id,	size, js_str(v, "role", NULL),
			       js_str(v, "state", NULL), js_str(v, "uuid", NULL),  host};
	table_row(t, cells);
}

int cmd_report(struct cli *c)
{
	static const struct table_column columns[] = {
	    {"NAME", TABLE_LEFT}, {"GROUP", TABLE_LEFT}, {"ID", TABLE_RIGHT},  {"SIZE", TABLE_RIGHT},
	    {"ROLE", TABLE_LEFT}, {"STATE", TABLE_LEFT}, {"UUID", TABLE_LEFT}, {"HOST", TABLE_LEFT},
	};
	bool remote = cli_has(c, "remote");
	json_t *args = json_pack("{s:b}", "remote", (int)remote), *r = NULL;
	int rc = cli_call_timed(c, "report", args, &r);
	if (rc)
		return rc;
	if (c->json)
		return cli_finish(c, r);
	struct table *t = table_new(columns, remote ? 8 : 7, c->out.color);
	size_t i, k;
	json_t *v, *peer;
	json_array_foreach(json_object_get(r, "volumes"), i, v) report_row(t, NULL, v);
	json_array_foreach(json_object_get(r, "peers"), k, peer)
	{
		json_array_foreach(json_object_get(peer, "volumes"), i, v)
		    report_row(t, js_str(peer, "address", NULL), v);
	}
	rc = table_finish(t, stdout) < 0 ? cli_fail(c, ERR_NOMEM, "out of memory") : 0;
	json_decref(r);
	return rc;
}
