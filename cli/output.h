/* How repctl prints: numbers for people, tables (libsmartcols), JSON documents, colour, progress.
 */
#ifndef REPFS_CLI_OUTPUT_H
#define REPFS_CLI_OUTPUT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum color_mode { COLOR_AUTO, COLOR_ALWAYS, COLOR_NEVER };

enum progress_mode { PROGRESS_NONE, PROGRESS_BAR, PROGRESS_JSON };

struct output {
	bool color;		     /* of stdout */
	enum progress_mode progress; /* on stderr */
};

/* Room for any of the formats below. */
#define FORMAT_SIZE 64

/* "0 B", "512 B", "12.4 MiB"; one decimal above 1 KiB. */
void format_bytes(uint64_t bytes, char buf[FORMAT_SIZE]);
/* "3.2 s", "4 min 5 s", "2 h 3 min", "3 d 4 h". Negative and odd values read "0.0 s". */
void format_duration(double seconds, char buf[FORMAT_SIZE]);

/* NO_COLOR (not empty) and a stream that is no terminal switch AUTO off. */
bool color_wanted(enum color_mode mode, bool is_terminal, const char *no_color, const char *term);
enum color { COLOR_PLAIN, COLOR_BOLD, COLOR_RED, COLOR_GREEN, COLOR_YELLOW };
const char *color_on(bool wanted, enum color c); /* "" if not wanted */
const char *color_off(bool wanted, enum color c);

/* ---- tables ---- */
#define TABLE_COLUMNS_MAX 12
struct table;
enum table_align { TABLE_LEFT, TABLE_RIGHT };
struct table_column {
	const char *title;
	enum table_align align;
};
/* NULL: out of memory, which every other function takes and remembers. */
struct table *table_new(const struct table_column *columns, unsigned n, bool color);
/* One cell of each column; they are copied. NULL reads "-". */
void table_row(struct table *t, const char *const *cells);
/* Prints to f and frees. 0 or -ERR_NOMEM. A table without rows prints nothing. */
int table_finish(struct table *t, FILE *f);

/* One line of JSON. 0 or -ERR_NOMEM or -ERR_IO. */
int json_print(FILE *f, const json_t *doc);

/* ---- progress ---- */
struct progress_info {
	uint64_t done, total; /* bytes; total 0: not known */
	double rate;	      /* bytes a second; < 0: not known */
	double eta_s;	      /* < 0: not known */
};

/* The line of a bar, at most `columns` wide, into buf: what does not fit is left out, the bar first. */
void progress_format(const struct progress_info *p, const char *label, unsigned columns, char *buf, size_t size);

struct progress {
	enum progress_mode mode;
	FILE *f;
	char label[128];
	uint64_t started_ns, drawn_ns; /* monotonic */
	bool drawn;
};
void progress_init(struct progress *p, enum progress_mode mode, FILE *f, const char *label);
/* An object of the daemon's: done, total, rate, eta_s. */
void progress_object(struct progress *p, const json_t *o);
/* Work done in this process: rate and time left are computed. */
void progress_step(struct progress *p, uint64_t done, uint64_t total);
/* Takes the bar off the screen. */
void progress_end(struct progress *p);

#endif
