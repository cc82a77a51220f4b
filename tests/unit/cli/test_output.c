/* Numbers, colours, tables and the progress line as people see them. */
#include "cli/output.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

Test(output, bytes)
{
	static const struct {
		uint64_t v;
		const char *text;
	} rows[] = {
	    {0, "0 B"},
	    {1, "1 B"},
	    {1023, "1023 B"},
	    {1024, "1.0 KiB"},
	    {1536, "1.5 KiB"},
	    {UINT64_C(20) << 30, "20.0 GiB"},
	    {13002342, "12.4 MiB"},
	    {(UINT64_C(1) << 20) - 1, "1.0 MiB"}, /* not 1024.0 KiB */
	    {(UINT64_C(1) << 20) - 100, "1023.9 KiB"},
	    {UINT64_C(64) << 40, "64.0 TiB"},
	    {UINT64_MAX, "16.0 EiB"},
	};
	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		char buf[FORMAT_SIZE];
		memset(buf, 'x', sizeof(buf));
		format_bytes(rows[i].v, buf);
		cr_assert_str_eq(buf, rows[i].text, "%llu: '%s'", (unsigned long long)rows[i].v, buf);
	}
}

Test(output, durations)
{
	static const struct {
		double v;
		const char *text;
	} rows[] = {
	    {0, "0.0 s"},	 {3.24, "3.2 s"},	{59.94, "59.9 s"},   {59.96, "1 min 0 s"},
	    {245, "4 min 5 s"},	 {3599.6, "1 h 0 min"}, {7380, "2 h 3 min"}, {86399.9, "1 d 0 h"},
	    {273600, "3 d 4 h"}, {-5, "0.0 s"},		{INFINITY, "0.0 s"}, {1e30, "11574074 d 1 h"},
	};
	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		char buf[FORMAT_SIZE];
		memset(buf, 'x', sizeof(buf));
		format_duration(rows[i].v, buf);
		cr_assert_str_eq(buf, rows[i].text, "%f: '%s'", rows[i].v, buf);
	}
}

Test(output, when_there_is_colour)
{
	cr_assert(color_wanted(COLOR_AUTO, true, NULL, "xterm"));
	cr_assert(color_wanted(COLOR_AUTO, true, "", "xterm"));
	cr_assert(!color_wanted(COLOR_AUTO, true, "1", "xterm"));
	cr_assert(!color_wanted(COLOR_AUTO, true, NULL, "dumb"));
	cr_assert(!color_wanted(COLOR_AUTO, false, NULL, "xterm"));
	cr_assert(color_wanted(COLOR_ALWAYS, false, "1", "dumb"));
	cr_assert(!color_wanted(COLOR_NEVER, true, NULL, "xterm"));
	cr_assert_str_eq(color_on(false, COLOR_RED), "");
	cr_assert_str_eq(color_off(false, COLOR_RED), "");
	cr_assert_str_eq(color_off(true, COLOR_PLAIN), "");
}

Test(output, progress_line)
{
	const struct progress_info half = {
	    .done = UINT64_C(1) << 30, .total = UINT64_C(2) << 30, .rate = 1048576, .eta_s = 1024};
	char buf[256];
	progress_format(&half, "import vm1", 200, buf, sizeof(buf));
	cr_assert_str_eq(
	    buf, "import vm1  [####################....................]   50.0 %  1.0 GiB of 2.0 GiB  1.0 MiB/s"
		 "  ETA 17 min 4 s");
	/* Narrow: the bar goes, the facts stay. */
	progress_format(&half, "import vm1", 78, buf, sizeof(buf));
	cr_assert_str_eq(buf, "import vm1   50.0 %  1.0 GiB of 2.0 GiB  1.0 MiB/s  ETA 17 min 4 s");
	progress_format(&half, "import vm1", 20, buf, sizeof(buf));
	cr_assert_str_eq(buf, "import vm1   50.0 % ");
}

Test(output, progress_line_never_wider_than_asked)
{
	for (unsigned columns = 1; columns < 200; columns++) {
		const struct progress_info p = {.done = 999, .total = 1000, .rate = 1e12, .eta_s = 1e7};
		char buf[512];
		memset(buf, 'x', sizeof(buf));
		progress_format(&p, "a-rather-long-label", columns, buf, sizeof(buf));
		cr_assert_leq(strlen(buf), columns);
	}
}

Test(output, progress_line_is_honest)
{
	struct progress_info p = {.done = 9999, .total = 10000, .rate = -1, .eta_s = -1};
	char buf[256];
	progress_format(&p, "x", 30, buf, sizeof(buf));
	cr_assert_str_eq(buf, "x   99.9 %  9.8 KiB of 9.8 KiB"); /* not 100 % before the end */
	p.done = 10000;
	progress_format(&p, "x", 30, buf, sizeof(buf));
	cr_assert_str_eq(buf, "x  100.0 %  9.8 KiB of 9.8 KiB");
	p.done = 20000; /* a source that grew */
	progress_format(&p, "x", 100, buf, sizeof(buf));
	cr_assert(strstr(buf, "[########################################]  100.0 %"));
	p.total = 0;
	progress_format(&p, "x", 100, buf, sizeof(buf));
	cr_assert_str_eq(buf, "x  19.5 KiB");
	p = (struct progress_info){.done = 1, .total = 2, .rate = NAN, .eta_s = INFINITY};
	progress_format(&p, "x", 20, buf, sizeof(buf));
	cr_assert_str_eq(buf, "x   50.0 %  1 B of 2");
}

static char *run_progress(enum progress_mode mode, const char *const *objects)
{
	char *text = NULL;
	size_t size = 0;
	FILE *f = open_memstream(&text, &size);
	struct progress p;
	progress_init(&p, mode, f, "wait vm1");
	for (; *objects; objects++) {
		json_t *o = json_loads(*objects, 0, NULL);
		cr_assert_not_null(o);
		progress_object(&p, o);
		json_decref(o);
	}
	progress_end(&p);
	(void)fclose(f);
	return text;
}

Test(output, progress_as_json_lines)
{
	static const char *const objects[] = {"{\"done\":1,\"total\":4,\"rate\":2,\"eta_s\":1.5}",
					      "{\"done\":4,\"total\":4}", NULL};
	char *text = run_progress(PROGRESS_JSON, objects);
	cr_assert_str_eq(text, "{\"done\":1,\"total\":4,\"rate\":2,\"eta_s\":1.5}\n{\"done\":4,\"total\":4}\n");
	free(text);
	text = run_progress(PROGRESS_NONE, objects);
	cr_assert_str_eq(text, "");
	free(text);
}

Test(output, progress_bar_is_taken_off)
{
	static const char *const objects[] = {"{\"done\":1,\"total\":4}", "{\"done\":\"x\",\"total\":-4}",
					      "{\"done\":4,\"total\":4}", NULL};
	char *text = run_progress(PROGRESS_BAR, objects);
	/* The second comes too soon, the last one is always drawn. */
	cr_assert(strstr(text, "\rwait vm1  [") == text, "%s", text);
	cr_assert(strstr(text, " 25.0 %"));
	cr_assert(strstr(text, "100.0 %"));
	cr_assert_str_eq(text + strlen(text) - 4, "\r\033[K");
	cr_assert_null(strchr(text, '\n'));
	free(text);
	static const char *const nothing[] = {NULL};
	text = run_progress(PROGRESS_BAR, nothing);
	cr_assert_str_eq(text, "");
	free(text);
}

Test(output, own_progress_has_a_last_line)
{
	char *text = NULL;
	size_t size = 0;
	FILE *f = open_memstream(&text, &size);
	struct progress p;
	progress_init(&p, PROGRESS_JSON, f, "x");
	for (uint64_t i = 0; i <= 1000; i++)
		progress_step(&p, i, 1000);
	progress_end(&p);
	(void)fclose(f);
	size_t lines = 0;
	char *save = NULL;
	json_t *last = NULL;
	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		json_decref(last);
		last = json_loads(line, 0, NULL);
		cr_assert(json_is_integer(json_object_get(last, "done")), "%s", line);
		lines++;
	}
	cr_assert_geq(lines, 2);
	cr_assert_lt(lines, 100); /* not one for each step */
	cr_assert_eq(json_integer_value(json_object_get(last, "done")), 1000);
	cr_assert_eq(json_integer_value(json_object_get(last, "total")), 1000);
	json_decref(last);
	free(text);
}

Test(output, tables)
{
	static const struct table_column columns[] = {
	    {"NAME", TABLE_LEFT}, {"SIZE", TABLE_RIGHT}, {"ROLE", TABLE_LEFT}};
	char *text = NULL;
	size_t size = 0;
	FILE *f = open_memstream(&text, &size);
	struct table *t = table_new(columns, 3, false);
	const char *a[] = {"vm1", "20.0 GiB", "primary"};
	const char *b[] = {"a-name-that-is-longer-than-any-terminal-would-like-it-to-be-0123456789", "1 B", NULL};
	table_row(t, a);
	table_row(t, b);
	cr_assert_eq(table_finish(t, f), 0);
	(void)fclose(f);
	char *line = strtok(text, "\n");
	cr_assert(strncmp(line, "NAME  ", 6) == 0 && strstr(line, "SIZE  ROLE"), "%s", line);
	line = strtok(NULL, "\n");
	cr_assert(strncmp(line, "vm1  ", 5) == 0 && strstr(line, "  20.0 GiB  primary"), "%s", line);
	line = strtok(NULL, "\n");
	cr_assert_str_eq(line, "a-name-that-is-longer-than-any-terminal-would-like-it-to-be-0123456789       1 B  -");
	cr_assert_null(strtok(NULL, "\n"));
	free(text);
	/* Nothing to show: nothing is printed. Out of memory is taken. */
	f = open_memstream(&text, &size);
	cr_assert_eq(table_finish(table_new(columns, 3, false), f), 0);
	table_row(NULL, a);
	cr_assert_lt(table_finish(NULL, f), 0);
	(void)fclose(f);
	cr_assert_str_eq(text, "");
	free(text);
}

Test(output, json_is_one_line_in_order)
{
	char *text = NULL;
	size_t size = 0;
	FILE *f = open_memstream(&text, &size);
	json_t *doc = json_pack("{s:i, s:s, s:f, s:n}", "schema", 1, "b", "x\ny", "a", 3.2, "none");
	cr_assert_eq(json_print(f, doc), 0);
	(void)fclose(f);
	cr_assert_str_eq(text, "{\"schema\":1,\"b\":\"x\\ny\",\"a\":3.2,\"none\":null}\n");
	json_decref(doc);
	free(text);
}
