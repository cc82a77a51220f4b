/* status and error. The human form shows the facts of the JSON document; what is not known (null) is left out or
 * reads "-". Facts that are there only sometimes (a resync, a commit, an error) have lines of their own, so that the
 * first two lines of a group always look the same.
 */
#include "cli/cli.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/os/clock.h"

#define WATCH_MS 1000U

static enum color health_color(const char *health)
{
	if (strcmp(health, "ok") == 0)
		return COLOR_GREEN;
	return strcmp(health, "split_brain") == 0 ? COLOR_RED : COLOR_YELLOW;
}

static void put_colored(FILE *f, bool color, enum color c, const char *text)
{
	(void)fprintf(f, "  %s%s%s", color_on(color, c), text, color_off(color, c));
}

static void put_bytes(FILE *f, const json_t *g, const char *key, const char *label)
{
	uint64_t v;
	char text[FORMAT_SIZE] = "-";
	if (js_u64(g, key, &v))
		format_bytes(v, text);
	(void)fprintf(f, "   %s %s", label, text);
}

static void checkpoint_line(FILE *f, const json_t *g)
{
	uint64_t number;
	double age, rpo;
	char text[FORMAT_SIZE];
	if (js_u64(g, "checkpoint", &number) && number > 0) {
		(void)fprintf(f, "  checkpoint %llu", (unsigned long long)number);
		if (js_real(g, "checkpoint_age_s", &age)) {
			format_duration(age, text);
			(void)fprintf(f, ", %s ago", text);
		}
		if (json_is_false(json_object_get(g, "checkpoint_valid")))
			(void)fputs(", not valid", f);
	} else {
		(void)fputs("  no checkpoint", f);
	}
	if (js_real(g, "rpo_s", &rpo)) {
		format_duration(rpo, text);
		(void)fprintf(f, "   rpo %s", text);
	} else {
		(void)fputs("   rpo -", f);
	}
	put_bytes(f, g, "queue_bytes", "queue");
	put_bytes(f, g, "dirty_bytes", "dirty");
	(void)fputc('\n', f);
}

static void copying_line(FILE *f, const json_t *o, const char *what)
{
	uint64_t done, total;
	double v;
	char a[FORMAT_SIZE], b[FORMAT_SIZE];
	if (!json_is_object(o) || !js_u64(o, "done", &done) || !js_u64(o, "total", &total))
		return;
	format_bytes(done, a);
	format_bytes(total, b);
	double percent = total == 0 || done >= total ? 100 : (double)done / (double)total * 100;
	(void)fprintf(f, "  %s %.1f %%, %s of %s", what, percent, a, b);
	if (js_real(o, "rate", &v) && v >= 0 && v < 1e18) {
		format_bytes((uint64_t)v, a);
		(void)fprintf(f, "   %s/s", a);
	}
	if (js_real(o, "eta_s", &v)) {
		format_duration(v, a);
		(void)fprintf(f, "   %s left", a);
	}
	(void)fputc('\n', f);
}

static void error_line(FILE *f, const json_t *o)
{
	uint64_t offset, length;
	if (!json_is_object(o))
		return;
	(void)fprintf(f, "  error %s", js_str(o, "code", "-"));
	const char *operation = js_str(o, "operation", NULL), *volume = js_str(o, "volume", NULL);
	if (operation)
		(void)fprintf(f, ": %s", operation);
	if (volume && volume[0])
		(void)fprintf(f, " of %s", volume);
	if (js_u64(o, "length", &length) && length > 0 && js_u64(o, "offset", &offset))
		(void)fprintf(f, ", %llu bytes at %llu", (unsigned long long)length, (unsigned long long)offset);
	const char *when = js_str(o, "time", NULL);
	if (when)
		(void)fprintf(f, ", %s", when);
	const char *text = js_str(o, "text", NULL);
	if (text && text[0])
		(void)fprintf(f, "\n    %s", text);
	(void)fputc('\n', f);
}

static void reason_lines(FILE *f, const json_t *g, const char *health)
{
	size_t i;
	json_t *reason;
	json_array_foreach(json_object_get(g, "reasons"), i, reason)
	{
		if (json_is_string(reason))
			(void)fprintf(f, "  %s: %s\n", health, json_string_value(reason));
	}
}

static void volume_lines(FILE *f, const json_t *g)
{
	const json_t *volumes = json_object_get(g, "volumes");
	bool secondary = strcmp(js_str(g, "role", ""), "secondary") == 0;
	int name_width = 0, size_width = 0;
	size_t i;
	json_t *v;
	for (int pass = 0; pass < 2; pass++) {
		json_array_foreach(volumes, i, v)
		{
			const char *name = js_str(v, "name", "-");
			uint64_t size, bytes;
			char text[FORMAT_SIZE] = "-";
			if (js_u64(v, "size", &size))
				format_bytes(size, text);
			if (pass == 0) {
				int n = (int)strlen(name), s = (int)strlen(text);
				name_width = n > name_width ? n : name_width;
				size_width = s > size_width ? s : size_width;
				continue;
			}
			(void)fprintf(f, "  %-*s    %*s   %s", name_width, name, size_width, text,
				      js_str(v, "path", "-"));
			if (secondary) {
				put_bytes(f, v, "active_bytes", "active");
				put_bytes(f, v, "hidden_bytes", "hidden");
				put_bytes(f, v, "history_bytes", "history");
				if (js_u64(v, "checkpoints", &bytes))
					(void)fprintf(f, "   checkpoints %llu", (unsigned long long)bytes);
			}
			const char *base = js_str(v, "base", NULL);
			if (base)
				(void)fprintf(f, "   over %s", base);
			(void)fputc('\n', f);
		}
	}
}

static void clone_lines(FILE *f, const json_t *g)
{
	size_t i;
	json_t *k;
	json_array_foreach(json_object_get(g, "clones"), i, k)
	{
		uint64_t number = 0;
		(void)js_u64(k, "checkpoint", &number);
		(void)fprintf(f, "  clone %s of %s@%llu", js_str(k, "name", "-"), js_str(k, "volume", "-"),
			      (unsigned long long)number);
		put_bytes(f, k, "bytes", "own");
		(void)fprintf(f, "%s\n", js_bool(k, "lost") ? "   lost: its checkpoint was given up; remove it" : "");
	}
}

static void group_print(FILE *f, const json_t *g, bool color)
{
	const char *link = js_str(g, "link", "-"), *health = js_str(g, "health", "-");
	const char *peer = js_str(g, "peer", NULL), *name = js_str(g, "group", "-");
	(void)fprintf(f, "%s%s%s", color_on(color, COLOR_BOLD), name, color_off(color, COLOR_BOLD));
	(void)fprintf(f, "  %s  %s", js_str(g, "role", "-"), js_str(g, "state", "-"));
	put_colored(f, color, strcmp(link, "SYNCED") == 0 ? COLOR_GREEN : COLOR_PLAIN, link);
	put_colored(f, color, health_color(health), health);
	(void)fprintf(f, "  protocol %s", js_str(g, "protocol", "-"));
	if (peer && peer[0])
		(void)fprintf(f, "  peer %s", peer);
	(void)fputc('\n', f);
	checkpoint_line(f, g);
	reason_lines(f, g, health);
	copying_line(f, json_object_get(g, "resync"), "resync");
	copying_line(f, json_object_get(g, "commit"), "commit");
	error_line(f, json_object_get(g, "error"));
	volume_lines(f, g);
	clone_lines(f, g);
}

void status_print(FILE *f, const json_t *doc, bool color)
{
	size_t i;
	json_t *g;
	json_array_foreach(json_object_get(doc, "groups"), i, g)
	{
		if (i > 0)
			(void)fputc('\n', f);
		group_print(f, g, color);
	}
	json_array_foreach(json_object_get(doc, "unserved"), i, g)
	{
		(void)fprintf(f, "%s  not served: %s\n", js_str(g, "group", "?"), js_str(g, "why", "?"));
	}
}

int status_exit(const json_t *doc)
{
	int code = 0;
	size_t i;
	json_t *g;
	json_array_foreach(json_object_get(doc, "groups"), i, g)
	{
		const char *health = js_str(g, "health", "");
		if (strcmp(health, "split_brain") == 0 || js_bool(g, "split_brain"))
			return err_exit(ERR_SPLIT);
		if (strcmp(health, "ok") != 0)
			code = err_exit(ERR_DEGRADED);
	}
	return json_array_size(json_object_get(doc, "unserved")) ? err_exit(ERR_DEGRADED) : code;
}

static int status_once(struct cli *c, int *ret_exit)
{
	json_t *args = c->n_args ? cli_name_args(c->args[0]) : NULL, *r;
	int rc = cli_call(c, "status", args, &r);
	if (rc)
		return rc;
	*ret_exit = status_exit(r);
	if (c->json)
		return cli_finish(c, r);
	const char *listen = js_str(r, "listen", NULL);
	status_print(stdout, r, c->out.color);
	if (!c->n_args && listen && listen[0])
		(void)printf("%slistening on %s\n", json_array_size(json_object_get(r, "groups")) ? "\n" : "", listen);
	else if (!c->n_args && json_array_size(json_object_get(r, "groups")) == 0)
		cli_note(c, "no groups; repctl create NAME --size SIZE makes one");
	json_decref(r);
	return 0;
}

int cmd_status(struct cli *c)
{
	int health = 0;
	bool exit_code = cli_has(c, "exit-code");
	if (!cli_has(c, "watch")) {
		int rc = status_once(c, &health);
		return rc ? rc : exit_code ? health : 0;
	}
	if (exit_code)
		return cli_fail(c, ERR_USAGE, "--exit-code needs an end that --watch does not have; give one of them");
	uint64_t end = c->timeout_ms ? clock_mono_ns() + c->timeout_ms * NS_PER_MS : 0;
	bool clear = !c->json && isatty(STDOUT_FILENO) == 1;
	for (unsigned turn = 0;; turn++) {
		if (clear)
			(void)fputs("\033[H\033[2J", stdout);
		else if (turn > 0 && !c->json)
			(void)putchar('\n');
		int rc = status_once(c, &health);
		if (rc)
			return rc;
		/* Nobody reads any more: the end. */
		if (fflush(stdout) != 0)
			return 1;
		if (end && clock_mono_ns() + WATCH_MS * NS_PER_MS > end)
			return err_exit(ERR_TIMEOUT);
		const struct timespec pause = {.tv_sec = WATCH_MS / 1000};
		(void)nanosleep(&pause, NULL);
	}
}

int cmd_error(struct cli *c)
{
	json_t *r;
	int rc = cli_call(c, "error", cli_name_args(c->args[0]), &r);
	if (rc)
		return rc;
	bool clean = js_bool(r, "clean");
	int standing = err_exit(js_bool(r, "split_brain") ? ERR_SPLIT : ERR_DEGRADED);
	if (c->json) {
		rc = cli_finish(c, r);
		return rc ? rc : clean ? 0 : standing;
	}
	(void)printf("%s  %s\n", js_str(r, "group", c->args[0]), clean ? "clean" : "not clean");
	reason_lines(stdout, r, "reason");
	error_line(stdout, json_object_get(r, "error"));
	json_decref(r);
	return clean ? 0 : standing;
}
