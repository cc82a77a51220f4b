/* How repctl prints. Everything that decides on a text is a function of its arguments alone, so that it can be tested
 * without a terminal; only progress_* look at the clock and the window's width.
 *
 * A bar is redrawn at most ten times a second; progress as JSON that this process makes itself, five times, always with
 * a last line for the end. What the daemon reports is passed on as it comes: it sets its own pace.
 */
#include "cli/output.h"

#include <errno.h>
#include <libsmartcols/libsmartcols.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "core/check.h"
#include "core/err.h"
#include "core/os/clock.h"

#define BAR_REDRAW_NS (100 * NS_PER_MS)
#define JSON_STEP_NS (200 * NS_PER_MS)
#define BAR_CELLS_MAX 40
#define BAR_CELLS_MIN 10
#define WINDOW_COLUMNS 80 /* when the terminal does not say */
#define WINDOW_COLUMNS_MAX 512

void format_bytes(uint64_t bytes, char buf[FORMAT_SIZE])
{
	static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
	if (bytes < 1024) {
		(void)snprintf(buf, FORMAT_SIZE, "%u B", (unsigned)bytes);
		return;
	}
	double v = (double)bytes / 1024;
	size_t u = 0;
	/* 1023.95 would be shown as 1024.0 */
	while (v >= 1023.95 && u + 1 < ARRAY_LEN(units)) {
		v /= 1024;
		u++;
	}
	(void)snprintf(buf, FORMAT_SIZE, "%.1f %s", v, units[u]);
}

void format_duration(double seconds, char buf[FORMAT_SIZE])
{
	if (!isfinite(seconds) || seconds < 0)
		seconds = 0;
	if (seconds < 59.95) {
		(void)snprintf(buf, FORMAT_SIZE, "%.1f s", seconds);
		return;
	}
	if (seconds > 1e12)
		seconds = 1e12;
	uint64_t s = (uint64_t)(seconds + 0.5);
	if (s < 3600)
		(void)snprintf(buf, FORMAT_SIZE, "%u min %u s", (unsigned)(s / 60), (unsigned)(s % 60));
	else if (s < 86400)
		(void)snprintf(buf, FORMAT_SIZE, "%u h %u min", (unsigned)(s / 3600), (unsigned)(s / 60 % 60));
	else
		(void)snprintf(buf, FORMAT_SIZE, "%llu d %u h", (unsigned long long)(s / 86400),
			       (unsigned)(s / 3600 % 24));
}

bool color_wanted(enum color_mode mode, bool is_terminal, const char *no_color, const char *term)
{
	if (mode != COLOR_AUTO)
		return mode == COLOR_ALWAYS;
	if (no_color && no_color[0])
		return false;
	if (term && strcmp(term, "dumb") == 0)
		return false;
	return is_terminal;
}

const char *color_on(bool wanted, enum color c)
{
	static const char *const codes[] = {"", "\033[1m", "\033[31m", "\033[32m", "\033[33m"};
	return wanted ? codes[c] : "";
}

const char *color_off(bool wanted, enum color c)
{
	return wanted && c != COLOR_PLAIN ? "\033[0m" : "";
}

/* ---- tables ---- */

struct table {
	struct libscols_table *tb;
	unsigned n;
	unsigned rows;
	bool failed;
};

struct table *table_new(const struct table_column *columns, unsigned n, bool color)
{
	PRE(n > 0 && n <= TABLE_COLUMNS_MAX);
	struct table *t = calloc(1, sizeof(*t));
	if (!t)
		return NULL;
	t->n = n;
	t->tb = scols_new_table();
	if (!t->tb) {
		free(t);
		return NULL;
	}
	/* Never cut or wrap a cell: a name or a number that is not whole is of no use. */
	t->failed |= scols_table_set_termforce(t->tb, SCOLS_TERMFORCE_NEVER) != 0;
	t->failed |= scols_table_set_column_separator(t->tb, "  ") != 0;
	t->failed |= scols_table_enable_colors(t->tb, color) != 0;
	for (unsigned i = 0; i < n; i++) {
		int flags = columns[i].align == TABLE_RIGHT ? SCOLS_FL_RIGHT : 0;
		struct libscols_column *col = scols_table_new_column(t->tb, columns[i].title, 0, flags);
		if (!col)
			t->failed = true;
		else if (color)
			t->failed |= scols_cell_set_color(scols_column_get_header(col), "bold") != 0;
	}
	return t;
}

void table_row(struct table *t, const char *const *cells)
{
	if (!t || t->failed)
		return;
	struct libscols_line *line = scols_table_new_line(t->tb, NULL);
	if (!line) {
		t->failed = true;
		return;
	}
	for (unsigned i = 0; i < t->n; i++)
		t->failed |= scols_line_set_data(line, i, cells[i] ? cells[i] : "-") != 0;
	t->rows++;
}

int table_finish(struct table *t, FILE *f)
{
	if (!t)
		return -ERR_NOMEM;
	int rc = t->failed ? -ERR_NOMEM : 0;
	if (rc == 0 && t->rows > 0) {
		if (scols_table_set_stream(t->tb, f) != 0 || scols_print_table(t->tb) != 0)
			rc = -ERR_NOMEM;
	}
	scols_unref_table(t->tb);
	free(t);
	return rc;
}

int json_print(FILE *f, const json_t *doc)
{
	char *text = json_dumps(doc, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(12));
	if (!text)
		return -ERR_NOMEM;
	int rc = fprintf(f, "%s\n", text) < 0 ? -ERR_IO : 0;
	free(text);
	return rc;
}

/* ---- progress ---- */

void progress_format(const struct progress_info *p, const char *label, unsigned columns, char *buf, size_t size)
{
	char done[FORMAT_SIZE], total[FORMAT_SIZE], rate[FORMAT_SIZE + 16] = "", eta[FORMAT_SIZE + 16] = "";
	char share[16] = "", amount[2 * FORMAT_SIZE + 16];
	double part = 0;

	format_bytes(p->done, done);
	if (p->total > 0) {
		part = p->done >= p->total ? 1 : (double)p->done / (double)p->total;
		/* 100 % is for the end alone. */
		double percent = p->done < p->total && part > 0.999 ? 99.9 : part * 100;
		(void)snprintf(share, sizeof(share), "%5.1f %%  ", percent);
		format_bytes(p->total, total);
		(void)snprintf(amount, sizeof(amount), "%s of %s", done, total);
	} else {
		(void)snprintf(amount, sizeof(amount), "%s", done);
	}
	if (p->rate >= 0 && isfinite(p->rate)) {
		char r[FORMAT_SIZE];
		format_bytes(p->rate < 1e18 ? (uint64_t)p->rate : UINT64_C(1000000000000000000), r);
		(void)snprintf(rate, sizeof(rate), "  %s/s", r);
	}
	if (p->eta_s >= 0 && isfinite(p->eta_s) && p->total > p->done) {
		char d[FORMAT_SIZE];
		format_duration(p->eta_s, d);
		(void)snprintf(eta, sizeof(eta), "  ETA %s", d);
	}

	char tail[512];
	(void)snprintf(tail, sizeof(tail), "%s%s%s%s", share, amount, rate, eta);
	size_t fixed = strlen(label) + 2 + strlen(tail);
	size_t room = columns > fixed + 4 ? columns - fixed - 4 : 0; /* "[", "]", two blanks */
	size_t cells = room > BAR_CELLS_MAX ? BAR_CELLS_MAX : room;
	char bar[BAR_CELLS_MAX + 8] = "";
	if (p->total > 0 && cells >= BAR_CELLS_MIN) {
		size_t full = (size_t)(part * (double)cells);
		bar[0] = '[';
		for (size_t i = 0; i < cells; i++)
			bar[1 + i] = i < full ? '#' : '.';
		memcpy(bar + 1 + cells, "]  ", 4);
	}
	(void)snprintf(buf, size, "%s  %s%s", label, bar, tail);
	if (strlen(buf) > columns)
		buf[columns] = '\0';
}

static unsigned window_columns(FILE *f)
{
	struct winsize w;
	int fd = fileno(f);
	if (fd < 0 || ioctl(fd, TIOCGWINSZ, &w) != 0 || w.ws_col == 0)
		return WINDOW_COLUMNS;
	return w.ws_col > WINDOW_COLUMNS_MAX ? WINDOW_COLUMNS_MAX : w.ws_col;
}

void progress_init(struct progress *p, enum progress_mode mode, FILE *f, const char *label)
{
	*p = (struct progress){.mode = mode, .f = f, .started_ns = clock_mono_ns()};
	(void)snprintf(p->label, sizeof(p->label), "%s", label);
}

static void progress_draw(struct progress *p, const struct progress_info *info)
{
	uint64_t now = clock_mono_ns();
	bool last = info->total > 0 && info->done >= info->total;
	if (p->drawn && !last && now - p->drawn_ns < BAR_REDRAW_NS)
		return;
	char line[WINDOW_COLUMNS_MAX + 1];
	/* A full last column would wrap on some terminals. */
	progress_format(info, p->label, window_columns(p->f) - 1, line, sizeof(line));
	(void)fprintf(p->f, "\r%s\033[K", line);
	(void)fflush(p->f);
	p->drawn = true;
	p->drawn_ns = now;
}

static double number_or(const json_t *o, const char *key, double otherwise)
{
	const json_t *v = json_object_get(o, key);
	return json_is_number(v) ? json_number_value(v) : otherwise;
}

void progress_object(struct progress *p, const json_t *o)
{
	if (p->mode == PROGRESS_JSON) {
		(void)json_print(p->f, o);
		(void)fflush(p->f);
		return;
	}
	if (p->mode != PROGRESS_BAR)
		return;
	double done = number_or(o, "done", 0), total = number_or(o, "total", 0);
	struct progress_info info = {
	    .done = done > 0 && done < 1e19 ? (uint64_t)done : 0,
	    .total = total > 0 && total < 1e19 ? (uint64_t)total : 0,
	    .rate = number_or(o, "rate", -1),
	    .eta_s = number_or(o, "eta_s", -1),
	};
	progress_draw(p, &info);
}

void progress_step(struct progress *p, uint64_t done, uint64_t total)
{
	if (p->mode == PROGRESS_NONE)
		return;
	uint64_t now = clock_mono_ns();
	double passed = (double)(now - p->started_ns) / 1e9;
	struct progress_info info = {.done = done, .total = total, .rate = -1, .eta_s = -1};
	if (passed > 0.2) {
		info.rate = (double)done / passed;
		if (info.rate > 0 && total >= done)
			info.eta_s = (double)(total - done) / info.rate;
	}
	if (p->mode == PROGRESS_BAR) {
		progress_draw(p, &info);
		return;
	}
	if (p->drawn && done < total && now - p->drawn_ns < JSON_STEP_NS)
		return;
	p->drawn = true;
	p->drawn_ns = now;
	json_t *o = json_pack("{s:I, s:I, s:o, s:o}", "done", (json_int_t)done, "total", (json_int_t)total, "rate",
			      info.rate < 0 ? json_null() : json_integer((json_int_t)info.rate), "eta_s",
			      info.eta_s < 0 ? json_null() : json_real(info.eta_s));
	if (o)
		(void)json_print(p->f, o);
	(void)fflush(p->f);
	json_decref(o);
}

void progress_end(struct progress *p)
{
	if (p->mode == PROGRESS_BAR && p->drawn) {
		(void)fputs("\r\033[K", p->f);
		(void)fflush(p->f);
	}
	p->drawn = false;
}
