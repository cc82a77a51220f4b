/* Which checkpoints the retention settings keep (core/retention.h): exact sets, over clock jumps too. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "core/retention.h"

#define SEC UINT64_C(1000000000)
#define MINUTE (60 * SEC)
#define HOUR (60 * MINUTE)
#define DAY (24 * HOUR)
#define CKPTS_MAX 4096

static struct settings settings;
static struct repl_ckpt ckpts[CKPTS_MAX];
static uint64_t bytes[CKPTS_MAX];
static uint8_t rules[CKPTS_MAX + 1];
static bool apart[CKPTS_MAX];
static uint32_t n;

static void begin(uint64_t keep_last)
{
	memset(ckpts, 0, sizeof(ckpts));
	n = 0;
	settings_default(&settings);
	settings.keep_last = keep_last;
}

/* The next one, at that time; its epoch holds a block. */
static struct repl_ckpt *at(uint64_t time_ns)
{
	ckpts[n] = (struct repl_ckpt){.number = n + 1, .time_ns = time_ns};
	bytes[n] = 4096;
	return &ckpts[n++];
}

/* The numbers that are kept, each with its rules' letters. */
static const char *kept(void)
{
	static char text[65536];
	size_t len = 0;
	text[0] = 0;
	memset(rules, 0xa5, sizeof(rules));
	for (uint32_t i = 0; i < n; i++)
		apart[i] = (ckpts[i].flags & CKPT_PINNED) != 0;
	retention_rules(&settings, ckpts, n, apart, bytes, rules);
	cr_assert_eq(rules[n], 0xa5);
	for (uint32_t i = 0; i < n; i++) {
		cr_assert_eq(rules[i] & ~15U, 0);
		if (rules[i])
			len += (size_t)snprintf(
			    text + len, sizeof(text) - len, "%s%llu%s%s%s%s", len ? " " : "",
			    (unsigned long long)ckpts[i].number, rules[i] & RETENTION_LAST ? "l" : "",
			    rules[i] & RETENTION_MINUTELY ? "m" : "", rules[i] & RETENTION_HOURLY ? "h" : "",
			    rules[i] & RETENTION_DAILY ? "d" : "");
	}
	return text;
}

Test(retention, keeps_the_last)
{
	begin(3);
	cr_assert_str_eq(kept(), "");
	for (unsigned i = 0; i < 5; i++)
		at(i * SEC);
	cr_assert_str_eq(kept(), "3l 4l 5l");
	settings.keep_last = 2000;
	cr_assert_str_eq(kept(), "1l 2l 3l 4l 5l");
}

Test(retention, neither_counts_nor_keeps_pinned_ones)
{
	begin(2);
	settings.keep_hourly = 2;
	for (unsigned i = 0; i < 6; i++)
		at(i * HOUR)->flags = i == 3 || i == 5 ? CKPT_PINNED : 0;
	cr_assert_str_eq(kept(), "3lh 5lh");
}

Test(retention, empty_epochs_do_not_count_for_keep_last)
{
	begin(2);
	for (unsigned i = 0; i < 10; i++)
		at(i * SEC);
	/* 2 is as 1, 4 is as 3, and nothing was written since 5. */
	bytes[0] = bytes[2] = 0;
	for (unsigned i = 4; i < 10; i++)
		bytes[i] = 0;
	cr_assert_str_eq(kept(), "3l 5l 9l 10l");
	bytes[3] = 0; /* 5 is as 4, which differs from 3 */
	bytes[2] = 4096;
	cr_assert_str_eq(kept(), "3l 4l 9l 10l");
	for (unsigned i = 0; i < 10; i++)
		bytes[i] = 0;
	cr_assert_str_eq(kept(), "1l 9l 10l"); /* the oldest there is counts */
}

/* However long a guest is idle: the two counts bound what is kept. */
Test(retention, an_idle_guest_keeps_what_differs_and_is_bounded)
{
	begin(10);
	for (unsigned i = 0; i < 4000; i++) {
		at(i * 5 * SEC);
		bytes[i] = i < 20 ? 4096 : 0;
	}
	cr_assert_str_eq(kept(), "12l 13l 14l 15l 16l 17l 18l 19l 20l 21l 3991l 3992l 3993l 3994l 3995l 3996l 3997l "
				 "3998l 3999l 4000l");
}

Test(retention, keeps_the_newest_of_each_period_that_has_any)
{
	begin(1);
	settings.keep_minutely = 2;
	settings.keep_hourly = 3;
	settings.keep_daily = 2;
	at(0);					    /* 1: day 0, 00:00 */
	at(DAY - 1);				    /* 2: day 0, its last nanosecond */
	at(DAY);				    /* 3: day 1, 00:00 */
	at(DAY + 59 * MINUTE);			    /* 4: 00:59 */
	at(DAY + HOUR);				    /* 5: 01:00 */
	at(DAY + 5 * HOUR);			    /* 6: 05:00; hours without any don't count */
	at(DAY + 5 * HOUR + SEC);		    /* 7: the same minute */
	at(DAY + 5 * HOUR + 2 * MINUTE);	    /* 8: 05:02 */
	at(DAY + 5 * HOUR + 2 * MINUTE + 59 * SEC); /* 9: the same minute */
	cr_assert_str_eq(kept(), "2d 4h 5h 7m 9lmhd");
	settings.keep_daily = 1;
	settings.keep_hourly = 1;
	settings.keep_minutely = 2000;
	cr_assert_str_eq(kept(), "1m 2m 3m 4m 5m 7m 9lmhd");
}

Test(retention, nothing_is_kept_by_a_period_that_is_not_asked_for)
{
	begin(1);
	at(0);
	at(DAY);
	at(2 * DAY);
	cr_assert_str_eq(kept(), "3l");
}

/* An hour at a time, then the clock stands in 2099 for two checkpoints, then it is right again. */
Test(retention, a_clock_that_was_ahead_costs_one_period)
{
	begin(1);
	settings.keep_hourly = 4;
	for (unsigned i = 1; i <= 4; i++)
		at(20000 * DAY + i * HOUR);
	at(47000 * DAY);
	at(47000 * DAY + MINUTE);
	at(20000 * DAY + 5 * HOUR);
	at(20000 * DAY + 6 * HOUR);
	cr_assert_str_eq(kept(), "4h 6h 7h 8lh");
	at(20000 * DAY + 7 * HOUR);
	at(20000 * DAY + 8 * HOUR);
	cr_assert_str_eq(kept(), "7h 8h 9h 10lh"); /* it has aged out */
}

Test(retention, a_clock_in_1970_costs_one_period)
{
	begin(1);
	settings.keep_daily = 3;
	at(20000 * DAY);
	at(20001 * DAY);
	at(1);
	at(2 * SEC);
	at(20001 * DAY + HOUR);
	cr_assert_str_eq(kept(), "2d 4d 5ld");
}

/* Set back by three hours: the hours that come twice are periods twice. */
Test(retention, a_clock_set_back_begins_new_periods)
{
	begin(1);
	settings.keep_hourly = 5;
	for (unsigned i = 5; i <= 7; i++)
		at(i * HOUR);
	for (unsigned i = 5; i <= 7; i++)
		at(i * HOUR + MINUTE);
	cr_assert_str_eq(kept(), "2h 3h 4h 5h 6lh");
	/* Within one hour no clock that goes back and forth makes any difference. */
	begin(1);
	settings.keep_hourly = 5;
	for (unsigned i = 0; i < 9; i++)
		at(7 * HOUR + (i * 7 % 9) * MINUTE);
	cr_assert_str_eq(kept(), "9lh");
}

/* What is dropped changes nothing of what is kept: it was not the newest of its stretch, nor among the last. */
Test(retention, dropping_what_is_not_kept_keeps_the_rest)
{
	static const uint64_t step[] = {SEC, 7 * SEC, 59 * SEC, 13 * MINUTE, 5 * HOUR};
	uint64_t random = 42;
	for (unsigned run = 0; run < 500; run++) {
		uint64_t now = 20000 * DAY;
		begin(1 + run % 7);
		settings.keep_minutely = run % 11;
		settings.keep_hourly = run % 5;
		settings.keep_daily = run % 3;
		for (unsigned i = 0; i < 200; i++) {
			random = random * UINT64_C(6364136223846793005) + 1;
			now += step[random >> 33 & 3] + (random >> 40 & 31 ? 0 : step[4]);
			at(now)->flags = (random >> 50 & 15) == 0 ? CKPT_PINNED : 0;
			bytes[i] = random >> 55 & 3 ? 4096 : 0;
		}
		(void)kept();
		static uint64_t before[200];
		uint32_t k = 0, m = 0;
		for (uint32_t i = 0; i < n; i++)
			if (rules[i])
				before[k++] = ckpts[i].number;
		/* Oldest first, one at a time, its bytes going to its older neighbour. */
		for (uint32_t i = 0; i < n; i++) {
			if (rules[i] || ckpts[i].flags & CKPT_PINNED) {
				ckpts[m] = ckpts[i];
				bytes[m++] = bytes[i];
			} else if (m) {
				bytes[m - 1] += bytes[i];
			}
		}
		n = m;
		(void)kept();
		m = 0;
		for (uint32_t i = 0; i < n; i++)
			if (rules[i]) {
				cr_assert_lt(m, k);
				cr_assert_eq(ckpts[i].number, before[m++], "run %u", run);
			}
		cr_assert_eq(m, k, "run %u: %u of %u", run, m, k);
	}
}
