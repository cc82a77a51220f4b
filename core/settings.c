/* The settings of a group: parsing, formatting, encoding, all driven by the one table made from SETTINGS.
 *
 * Invariant: every value of a struct settings lies within its row's bounds; settings_set and settings_decode refuse
 * what does not, so nobody else checks again. What settings_format writes, settings_set reads back as the same value.
 * Numbers are parsed by hand and exactly: a decimal that is not a whole number of bytes or milliseconds is refused,
 * never rounded.
 */
#include "core/settings.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/check.h"

#define QUOTE_MAX 40U	    /* characters of a user's text that a message repeats */
#define FRACTION_DIGITS 18U /* significant digits behind the point; 10^18 fits 64 bits */

enum setting_kind { KIND_CHOICE, KIND_BYTES, KIND_MSEC, KIND_COUNT };

struct setting {
	const char *key;
	enum setting_kind kind;
	uint64_t def, min, max;
	const char *choices;
	size_t offset;
};

static const struct setting settings_table[SETTINGS_COUNT] = {
#define SETTINGS_ROW(field, key, kind, def, min, max, choices)                                                         \
	{key, KIND_##kind, def, min, max, choices, offsetof(struct settings, field)},
    SETTINGS(SETTINGS_ROW)
#undef SETTINGS_ROW
};

static uint64_t value_get(const struct settings *s, const struct setting *t)
{
	uint64_t v;
	memcpy(&v, (const char *)s + t->offset, sizeof(v));
	return v;
}

static void value_put(struct settings *s, const struct setting *t, uint64_t v)
{
	memcpy((char *)s + t->offset, &v, sizeof(v));
}

/* A user's text for a message: cut to QUOTE_MAX, and what is not printable ASCII shown as '?'. */
static const char *quote(const char *text, char buf[QUOTE_MAX + 4])
{
	size_t n = strnlen(text, QUOTE_MAX + 1);
	bool cut = n > QUOTE_MAX;
	if (cut)
		n = QUOTE_MAX;
	for (size_t i = 0; i < n; i++)
		buf[i] = text[i] >= 0x20 && text[i] < 0x7f ? text[i] : '?';
	memcpy(buf + n, cut ? "..." : "", cut ? 4 : 1);
	return buf;
}

/* ---- numbers ---- */

/* whole + frac / scale; frac < scale, scale a power of ten, frac without trailing zeroes. */
struct decimal {
	uint64_t whole, frac, scale;
};

enum decimal_fault { DECIMAL_OK, DECIMAL_SYNTAX, DECIMAL_RANGE, DECIMAL_FINE };

static bool is_digit(char c)
{
	return c >= '0' && c <= '9';
}

static enum decimal_fault fraction_parse(const char **text, struct decimal *d)
{
	const char *p = *text;
	unsigned digits = 0;
	unsigned zeroes = 0; /* seen, and dropped unless another digit follows */

	if (!is_digit(*p))
		return DECIMAL_SYNTAX;
	for (; is_digit(*p); p++) {
		if (*p == '0') {
			zeroes++;
			continue;
		}
		if (zeroes >= FRACTION_DIGITS || digits + zeroes >= FRACTION_DIGITS)
			return DECIMAL_FINE;
		for (digits += zeroes + 1; zeroes > 0; zeroes--) {
			d->frac *= 10;
			d->scale *= 10;
		}
		d->frac = d->frac * 10 + (uint64_t)(*p - '0');
		d->scale *= 10;
	}
	*text = p;
	return DECIMAL_OK;
}

/* DIGITS[.DIGITS] at *text, which then points behind it. */
static enum decimal_fault decimal_parse(const char **text, struct decimal *ret)
{
	struct decimal d = {.scale = 1};
	const char *p = *text;

	if (!is_digit(*p))
		return DECIMAL_SYNTAX;
	for (; is_digit(*p); p++) {
		uint64_t digit = (uint64_t)(*p - '0');
		if (d.whole > (UINT64_MAX - digit) / 10)
			return DECIMAL_RANGE;
		d.whole = d.whole * 10 + digit;
	}
	if (*p == '.') {
		p++;
		enum decimal_fault fault = fraction_parse(&p, &d);
		if (fault != DECIMAL_OK)
			return fault;
	}
	*text = p;
	*ret = d;
	return DECIMAL_OK;
}

/* d times unit, exactly. frac * unit / scale is whole only if scale / gcd divides frac; then it is below unit. */
static enum decimal_fault decimal_scale(const struct decimal *d, uint64_t unit, uint64_t *ret)
{
	uint64_t a = unit, b = d->scale;

	while (b != 0) {
		uint64_t rest = a % b;
		a = b;
		b = rest;
	}
	uint64_t divisor = d->scale / a;
	if (d->frac % divisor != 0)
		return DECIMAL_FINE;
	uint64_t part = d->frac / divisor * (unit / a);
	if (d->whole > (UINT64_MAX - part) / unit)
		return DECIMAL_RANGE;
	*ret = d->whole * unit + part;
	return DECIMAL_OK;
}

static enum decimal_fault count_parse(const char *text, uint64_t *ret)
{
	struct decimal d;
	enum decimal_fault fault = decimal_parse(&text, &d);

	if (fault == DECIMAL_OK && *text != '\0')
		fault = DECIMAL_SYNTAX;
	return fault == DECIMAL_OK ? decimal_scale(&d, 1, ret) : fault;
}

static enum decimal_fault size_parse(const char *text, uint64_t *ret)
{
	static const char units[] = "KMGT";
	struct decimal d;
	unsigned shift = 0;
	enum decimal_fault fault = decimal_parse(&text, &d);

	if (fault != DECIMAL_OK)
		return fault;
	for (unsigned i = 0; units[i] != '\0'; i++) {
		if (*text == units[i] || *text == units[i] + ('a' - 'A'))
			shift = 10 * (i + 1);
	}
	if (shift > 0)
		text++;
	if (shift > 0 && text[0] == 'i' && text[1] == 'B')
		text++;
	if (*text == 'B')
		text++;
	if (*text != '\0')
		return DECIMAL_SYNTAX;
	return decimal_scale(&d, UINT64_C(1) << shift, ret);
}

static enum decimal_fault msec_parse(const char *text, uint64_t *ret)
{
	static const struct {
		const char *suffix;
		uint64_t ms;
	} units[] = {{"", 1000}, {"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}};
	struct decimal d;
	enum decimal_fault fault = decimal_parse(&text, &d);

	if (fault != DECIMAL_OK)
		return fault;
	for (unsigned i = 0; i < ARRAY_LEN(units); i++) {
		if (strcmp(text, units[i].suffix) == 0)
			return decimal_scale(&d, units[i].ms, ret);
	}
	return DECIMAL_SYNTAX;
}

int parse_size(const char *text, uint64_t *ret, struct err *e)
{
	char q[QUOTE_MAX + 4];

	switch (size_parse(text, ret)) {
	case DECIMAL_OK:
		return 0;
	case DECIMAL_RANGE:
		return err_set(e, ERR_USAGE, "size '%s': too large, it does not fit 64 bits", quote(text, q));
	case DECIMAL_FINE:
		return err_set(e, ERR_USAGE, "size '%s': not a whole number of bytes; write it in a smaller unit",
			       quote(text, q));
	case DECIMAL_SYNTAX:
	default:
		return err_set(e, ERR_USAGE,
			       "size '%s': not a size; write a number of bytes, or one with K, M, G or T (1.5G)",
			       quote(text, q));
	}
}

/* ---- text ---- */

static enum decimal_fault choice_parse(const char *choices, const char *text, uint64_t *ret)
{
	size_t len = strlen(text);
	uint64_t index = 0;

	for (const char *p = choices;; index++) {
		size_t n = 0;
		while (p[n] != '|' && p[n] != '\0')
			n++;
		if (n == len && memcmp(p, text, n) == 0) {
			*ret = index;
			return DECIMAL_OK;
		}
		if (p[n] == '\0')
			return DECIMAL_SYNTAX;
		p += n + 1;
	}
}

static void choice_format(const char *choices, uint64_t v, char *buf, size_t size)
{
	const char *p = choices;
	size_t n = 0;

	for (; v > 0; p++) {
		INVARIANT(*p != '\0');
		if (*p == '|')
			v--;
	}
	while (p[n] != '|' && p[n] != '\0')
		n++;
	snprintf(buf, size, "%.*s", (int)n, p);
}

static void bytes_format(uint64_t v, char *buf, size_t size)
{
	static const char *const units[] = {"", "K", "M", "G", "T"};
	unsigned i = 0;

	while (v != 0 && v % 1024 == 0 && i + 1 < ARRAY_LEN(units)) {
		v /= 1024;
		i++;
	}
	snprintf(buf, size, "%" PRIu64 "%s", v, units[i]);
}

static void msec_format(uint64_t v, char *buf, size_t size)
{
	unsigned ms = (unsigned)(v % 1000);

	if (v == 0)
		snprintf(buf, size, "0");
	else if (ms == 0)
		snprintf(buf, size, "%" PRIu64 "s", v / 1000);
	else if (v < 1000)
		snprintf(buf, size, "%ums", ms);
	else if (ms % 100 == 0)
		snprintf(buf, size, "%" PRIu64 ".%us", v / 1000, ms / 100);
	else if (ms % 10 == 0)
		snprintf(buf, size, "%" PRIu64 ".%02us", v / 1000, ms / 10);
	else
		snprintf(buf, size, "%" PRIu64 ".%03us", v / 1000, ms);
}

static void value_format(const struct setting *t, uint64_t v, char *buf, size_t size)
{
	switch (t->kind) {
	case KIND_CHOICE:
		choice_format(t->choices, v, buf, size);
		return;
	case KIND_BYTES:
		bytes_format(v, buf, size);
		return;
	case KIND_MSEC:
		msec_format(v, buf, size);
		return;
	case KIND_COUNT:
		snprintf(buf, size, "%" PRIu64, v);
		return;
	}
	UNREACHABLE();
}

static enum decimal_fault value_parse(const struct setting *t, const char *text, uint64_t *ret)
{
	switch (t->kind) {
	case KIND_CHOICE:
		return choice_parse(t->choices, text, ret);
	case KIND_BYTES:
		return size_parse(text, ret);
	case KIND_MSEC:
		return msec_parse(text, ret);
	case KIND_COUNT:
		return count_parse(text, ret);
	}
	UNREACHABLE();
}

/* "KEY=VALUE: what is the matter; what is allowed". */
static int value_refuse(const struct setting *t, const char *value, enum decimal_fault fault, struct err *e)
{
	static const char *const forms[] = {
	    [KIND_BYTES] = "a number of bytes, or one with K, M, G or T,",
	    [KIND_MSEC] = "a number of seconds (1.5), or one with ms, s, m or h,",
	    [KIND_COUNT] = "a whole number",
	};
	char q[QUOTE_MAX + 4], min[32], max[32];

	quote(value, q);
	if (t->kind == KIND_CHOICE)
		return err_set(e, ERR_USAGE, "%s=%s: no such choice; it takes one of %s", t->key, q, t->choices);
	value_format(t, t->min, min, sizeof(min));
	value_format(t, t->max, max, sizeof(max));
	const char *matter = "not understood";
	if (fault == DECIMAL_RANGE)
		matter = "out of range";
	else if (fault == DECIMAL_FINE)
		matter = t->kind == KIND_MSEC ? "finer than a millisecond" : "not a whole number";
	return err_set(e, ERR_USAGE, "%s=%s: %s; it takes %s from %s to %s", t->key, q, matter, forms[t->kind], min,
		       max);
}

static int key_refuse(const char *key, struct err *e)
{
	char q[QUOTE_MAX + 4], keys[ERR_TEXT_MAX];
	size_t len = 0;

	keys[0] = '\0';
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		size_t n = strlen(settings_table[i].key);
		if (len + n + 3 > sizeof(keys))
			break;
		snprintf(keys + len, sizeof(keys) - len, "%s%s", len > 0 ? ", " : "", settings_table[i].key);
		len = strlen(keys);
	}
	return err_set(e, ERR_USAGE, "no setting is called '%s'; there are: %s", quote(key, q), keys);
}

/* ---- the interface ---- */

void settings_default(struct settings *s)
{
	for (unsigned i = 0; i < SETTINGS_COUNT; i++)
		value_put(s, &settings_table[i], settings_table[i].def);
}

static const struct setting *setting_find(const char *key)
{
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		if (strcmp(key, settings_table[i].key) == 0)
			return &settings_table[i];
	}
	return NULL;
}

int settings_set(struct settings *s, const char *key, const char *value, struct err *e)
{
	const struct setting *t = setting_find(key);
	uint64_t v;

	if (t == NULL)
		return key_refuse(key, e);
	enum decimal_fault fault = value_parse(t, value, &v);
	if (fault == DECIMAL_OK && (v < t->min || v > t->max))
		fault = DECIMAL_RANGE;
	if (fault != DECIMAL_OK)
		return value_refuse(t, value, fault, e);
	value_put(s, t, v);
	return 0;
}

void settings_take(struct settings *s, const struct settings *from, uint64_t which)
{
	for (unsigned i = 0; i < SETTINGS_COUNT; i++)
		if (which >> i & 1)
			value_put(s, &settings_table[i], value_get(from, &settings_table[i]));
}

const char *settings_key(unsigned i)
{
	PRE(i < SETTINGS_COUNT);
	return settings_table[i].key;
}

void settings_format(const struct settings *s, unsigned i, char *buf, size_t size)
{
	PRE(i < SETTINGS_COUNT);
	PRE(size > 0);
	value_format(&settings_table[i], value_get(s, &settings_table[i]), buf, size);
}

bool settings_valid(const struct settings *s)
{
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		uint64_t v = value_get(s, &settings_table[i]);
		if (v < settings_table[i].min || v > settings_table[i].max)
			return false;
	}
	return true;
}

void settings_encode(const struct settings *s, struct wbuf *w)
{
	wbuf_u16(w, SETTINGS_COUNT);
	for (unsigned i = 0; i < SETTINGS_COUNT; i++) {
		wbuf_str(w, settings_table[i].key);
		wbuf_u64(w, value_get(s, &settings_table[i]));
	}
}

void settings_decode(struct settings *s, struct rbuf *r)
{
	struct settings out;
	bool seen[SETTINGS_COUNT] = {false};
	unsigned n = rbuf_u16(r);

	settings_default(&out);
	if (n > SETTINGS_KEYS_MAX)
		r->failed = true;
	for (unsigned i = 0; i < n && !r->failed; i++) {
		char key[SETTINGS_KEY_SIZE];
		rbuf_str(r, key, sizeof(key));
		uint64_t v = rbuf_u64(r);
		if (r->failed)
			return;
		const struct setting *t = setting_find(key);
		if (t == NULL)
			continue;
		if (v < t->min || v > t->max || seen[t - settings_table])
			r->failed = true;
		seen[t - settings_table] = true;
		value_put(&out, t, v);
	}
	if (!r->failed)
		*s = out;
}
