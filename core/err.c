/* The tables behind core/err.h, all made from ERR_CODES, and the one place that fills a struct err.
 * errno.h is used for its constants only: nothing here touches errno. */
#include "core/err.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "core/check.h"

struct err_info {
	const char *name;
	const char *text;
	int sys;
	int exit;
};

static const struct err_info err_table[ERR_CODES_END] = {[ERR_OK] = {"ERR_OK", "ok", 0, 0},
#define ERR_INFO(code, sys_, exit_, text_) [code] = {#code, text_, sys_, exit_},
							 ERR_CODES(ERR_INFO)
#undef ERR_INFO
};

static int err_normal(int code)
{
	if (code < 0 && code > -ERR_CODES_END)
		code = -code;
	return code >= 0 && code < ERR_CODES_END ? code : ERR_FAILED;
}

/* Of a character that was cut: no JSON takes a part of one. */
static void cut_at_character(char *text)
{
	size_t len = strlen(text), at = len, follow = 0;
	while (at > 0 && follow < 3 && ((unsigned char)text[at - 1] & 0xc0) == 0x80) {
		at--;
		follow++;
	}
	unsigned char first = at > 0 ? (unsigned char)text[at - 1] : 0;
	size_t want = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : first >= 0xc0 ? 1 : 0;
	if (want > follow)
		text[at - 1] = '\0';
}

int err_setv(struct err *e, int code, const char *fmt, va_list ap)
{
	PRE(code != ERR_OK);
	code = err_normal(code);
	if (e != NULL) {
		/* fmt's arguments may point into e->text: a caller that puts a prefix before what is there. */
		char text[ERR_TEXT_MAX];

		int n = vsnprintf(text, sizeof(text), fmt, ap);
		if (n < 0)
			text[0] = '\0';
		else if ((size_t)n >= sizeof(text))
			cut_at_character(text);
		(void)snprintf(e->text, sizeof(e->text), "%s", text);
		e->code = code;
	}
	return -code;
}

int err_set(struct err *e, int code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	int r = err_setv(e, code, fmt, ap);
	va_end(ap);
	return r;
}

const char *err_name(int code)
{
	return err_table[err_normal(code)].name;
}

const char *err_short(int code)
{
	return err_table[err_normal(code)].text;
}

int err_errno(int code)
{
	return err_table[err_normal(code)].sys;
}

int err_exit(int code)
{
	return err_table[err_normal(code)].exit;
}

int err_from_errno(int sys)
{
	switch (sys) {
	case ENOSPC:
	case EDQUOT:
		return -ERR_NOSPC;
	case ENOENT:
		return -ERR_NOENT;
	case ENOMEM:
		return -ERR_NOMEM;
	case EEXIST:
		return -ERR_EXIST;
	case EACCES:
	case EPERM:
	case EROFS:
		return -ERR_PERM;
	default:
		return -ERR_IO;
	}
}
