/* core/repl_meta: the group record survives its encoding, has exactly the documented bytes, and whatever does not
 * check out is refused with the field's name: every cut, every bound, every fact between fields. */
#include <criterion/criterion.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/range.h"
#include "core/repl_meta.h"

/* The numbers behind the lineage. */
#define NUMBERS_SIZE 88
/* What version 3 has behind the checkpoints of meta_full. */
#define CLONES_SIZE (8 + 4 + 2 * 37)
#define GROWTHS_SIZE (4 + 2 * 21)
#define BEHIND_CKPTS (CLONES_SIZE + GROWTHS_SIZE)

static uint8_t enc[REPL_META_ENCODED_MAX];

static struct repl_meta *meta_new(const char *group)
{
	struct repl_meta *m = malloc(sizeof(*m));

	cr_assert(m != NULL);
	memset(m, 0xa5, sizeof(*m));
	repl_meta_init(m, group);
	return m;
}

static void volume_put(struct repl_meta *m, const char *name, uint32_t id, uint64_t size)
{
	struct repl_volume *v = &m->volumes[m->n_volumes++];

	memset(v, 0, sizeof(*v));
	snprintf(v->name, sizeof(v->name), "%s", name);
	memset(v->uuid, (int)id + 1, sizeof(v->uuid));
	v->id = id;
	v->size = size;
}

static void ckpt_put(struct repl_meta *m, uint64_t number, uint8_t kind, uint8_t flags)
{
	struct repl_ckpt *c = &m->ckpts[m->n_ckpts++];

	c->number = number;
	c->generation = 0x1111 + number;
	c->time_ns = 0x2222 + number;
	c->kind = kind;
	c->flags = flags;
}

static void clone_put(struct repl_meta *m, const char *name, const char *volume, uint64_t ckpt, uint64_t id)
{
	struct repl_clone *c = &m->clones[m->n_clones++];

	snprintf(c->name, sizeof(c->name), "%s", name);
	snprintf(c->volume, sizeof(c->volume), "%s", volume);
	c->ckpt = ckpt;
	c->id = id;
	c->time_ns = 0x3333 + id;
}

static void growth_put(struct repl_meta *m, uint64_t last, uint64_t size)
{
	struct repl_growth *g = &m->growths[m->n_growths++];

	snprintf(g->volume, sizeof(g->volume), "vm1");
	g->last = last;
	g->size = size;
}

/* A secondary with something in every field. */
static struct repl_meta *meta_full(void)
{
	struct repl_meta *m = meta_new("vm1");

	memset(m->uuid, 0x77, sizeof(m->uuid));
	m->role = ROLE_SECONDARY;
	m->state = STATE_RUNNING;
	m->has_peer = m->inconsistent = m->own_dirty = true;
	m->lineage.current = 0xc0;
	m->lineage.bitmap = 0xb0;
	for (unsigned i = 0; i < 5; i++)
		m->lineage.history[i] = 0x100 + i;
	m->sync_from = 0x51;
	m->ckpt_max = 50;
	m->base = 41;
	m->last_stream = 41;
	m->kept = 42;
	m->target = 17;
	m->received = 18;
	m->received_bytes = 4096;
	m->failover_generation = 0xf0;
	m->active_id = 9;
	m->diverged_ns = 77;
	snprintf(m->peer, sizeof(m->peer), "10.0.0.2:7790");
	memset(m->peer_store, 0x33, sizeof(m->peer_store));
	m->settings.protocol = PROTOCOL_C;
	volume_put(m, "vm1", 0, UINT64_C(20) << 30);
	volume_put(m, "vm1-data", 7, VOLUME_SIZE_MAX);
	m->volumes[1].flags = VOLUME_PEER_STALE;
	ckpt_put(m, 7, CKPT_STREAM, CKPT_PINNED);
	ckpt_put(m, 41, CKPT_STREAM, 0);
	ckpt_put(m, 42, CKPT_LOCAL, CKPT_PINNED | CKPT_FOREIGN);
	ckpt_put(m, 50, CKPT_PARTIAL, 0);
	m->clone_max = 6;
	clone_put(m, "test-a", "vm1", 41, 5);
	clone_put(m, "b", "vm1-data", 8, 2); /* 8 is not listed: this one is lost */
	growth_put(m, 9, 512);
	growth_put(m, 41, UINT64_C(10) << 30);
	return m;
}

static int encode(const struct repl_meta *m)
{
	memset(enc, 0xee, sizeof(enc));
	int len = repl_meta_encode(m, enc, sizeof(enc));

	cr_assert_gt(len, 0);
	return len;
}

/* Decodes enc[len] into a poisoned record; equal to *m byte for byte, unused entries zeroed. */
static void assert_decodes_to(const struct repl_meta *m, int len)
{
	struct repl_meta *back = malloc(sizeof(*back));
	struct err e = {0};

	memset(back, 0x5a, sizeof(*back));
	cr_assert_eq(repl_meta_decode(back, enc, (size_t)len, REPL_META_VERSION, &e), 0, "%s", e.text);
	cr_assert_eq(memcmp(back, m, sizeof(*m)), 0);
	free(back);
}

Test(repl_meta, init_is_standalone_and_default)
{
	struct repl_meta *m = meta_new("g");
	struct settings s;

	settings_default(&s);
	cr_assert_str_eq(m->group, "g");
	cr_assert_eq(m->role, ROLE_STANDALONE);
	cr_assert_eq(m->state, STATE_NONE);
	cr_assert_eq(memcmp(&m->settings, &s, sizeof(s)), 0);
	cr_assert_eq(m->n_volumes + m->n_ckpts, 0);
	cr_assert_eq(m->lineage.current, 0);
	cr_assert_eq(m->ckpts[GROUP_CKPTS_MAX - 1].number, 0);
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	assert_decodes_to(m, encode(m));
	free(m);
}

Test(repl_meta, round_trip)
{
	struct repl_meta *m = meta_full();

	assert_decodes_to(m, encode(m));
	/* each boolean by itself: none may stand for another */
	bool *flags[] = {&m->has_peer, &m->alone,     &m->inconsistent, &m->fresh,     &m->split_brain, &m->shut_out,
			 &m->broken,   &m->own_dirty, &m->paused,	&m->hash_sync, &m->switched,	&m->handed};
	const unsigned n = sizeof(flags) / sizeof(flags[0]);
	for (unsigned i = 0; i < n; i++) {
		for (unsigned k = 0; k < n; k++)
			*flags[k] = i == k;
		assert_decodes_to(m, encode(m));
	}
	free(m);
}

Test(repl_meta, round_trip_at_the_limits)
{
	char name[NAME_SIZE];
	memset(name, 'n', NAME_MAX_LEN);
	name[NAME_MAX_LEN] = '\0';
	struct repl_meta *m = meta_new(name);

	for (uint32_t i = 0; i < GROUP_VOLUMES_MAX; i++) {
		snprintf(name, sizeof(name), "%063u", i);
		volume_put(m, name, UINT32_MAX - i, 512);
	}
	m->ckpt_max = UINT64_MAX;
	for (uint64_t i = 0; i < GROUP_CKPTS_MAX; i++)
		ckpt_put(m, UINT64_MAX - GROUP_CKPTS_MAX + 1 + i, (uint8_t)(i % 3), (uint8_t)(i % 8));
	m->clone_max = UINT64_MAX;
	for (uint64_t i = 0; i < GROUP_CLONES_MAX; i++) {
		snprintf(name, sizeof(name), "c%062u", (unsigned)i);
		clone_put(m, name, m->volumes[i].name, UINT64_MAX - i, UINT64_MAX - i);
	}
	for (unsigned i = 0; i < GENERATIONS_MAX; i++)
		m->lineage.history[i] = UINT64_MAX - i;
	memset(m->peer, 'p', sizeof(m->peer) - 1);
	int len = encode(m);
	assert_decodes_to(m, len);
	cr_assert_eq(repl_meta_find_ckpt(m, UINT64_MAX), GROUP_CKPTS_MAX - 1);
	/* it fits its buffer exactly, and one byte less is -ERR_LIMIT with nothing written behind */
	uint8_t *exact = malloc((size_t)len + 1);
	memset(exact, 0xee, (size_t)len + 1);
	cr_assert_eq(repl_meta_encode(m, exact, (size_t)len), len);
	cr_assert_eq(exact[len], 0xee);
	cr_assert_eq(memcmp(exact, enc, (size_t)len), 0);
	exact[len - 1] = 0xee;
	cr_assert_eq(repl_meta_encode(m, exact, (size_t)len - 1), -ERR_LIMIT);
	cr_assert_eq(exact[len - 1], 0xee);
	free(exact);
	free(m);
}

/* The bytes that docs/format-group.md promises. */
Test(repl_meta, documented_bytes)
{
	struct repl_meta *m = meta_full();
	int len = encode(m);
	const uint8_t *p = enc;

	cr_assert_arr_eq(p, "\x03\0vm1", 5);
	p += 5;
	for (unsigned i = 0; i < 16; i++)
		cr_assert_eq(p[i], 0x77);
	p += 16;
	cr_assert_eq(p[0], ROLE_SECONDARY);
	cr_assert_eq(p[1], STATE_RUNNING);
	cr_assert_eq(get_u32(p + 2), 1U << 0 | 1U << 2 | 1U << 7);
	p += 6;
	cr_assert_eq(get_u64(p), 0xc0);
	cr_assert_eq(get_u64(p + 8), 0xb0);
	cr_assert_eq(get_u64(p + 16), 0x100);
	cr_assert_eq(get_u64(p + 48), 0x104);
	cr_assert_eq(get_u64(p + 56), 0);
	p += 144;
	static const uint64_t numbers[] = {0x51, 50, 41, 41, 42, 17, 18, 4096, 0xf0, 9, 77};
	for (unsigned i = 0; i < sizeof(numbers) / 8; i++)
		cr_assert_eq(get_u64(p + 8 * i), numbers[i], "%u", i);
	cr_assert_eq(sizeof(numbers), NUMBERS_SIZE);
	p += NUMBERS_SIZE;
	cr_assert_arr_eq(p,
			 "\x0d\0"
			 "10.0.0.2:7790",
			 15);
	p += 15;
	cr_assert_eq(p[0], 0x33);
	cr_assert_eq(p[15], 0x33);
	p += 16;
	struct wbuf w = {.data = malloc(2048), .size = 2048};
	settings_encode(&m->settings, &w);
	cr_assert_arr_eq(p, w.data, w.len);
	p += w.len;
	free(w.data);
	cr_assert_eq(get_u32(p), 2);
	cr_assert_arr_eq(p + 4, "\x03\0vm1", 5);
	cr_assert_eq(p[9], 1);
	cr_assert_eq(get_u32(p + 25), 0);
	cr_assert_eq(get_u64(p + 29), UINT64_C(20) << 30);
	cr_assert_eq(p[37], 0);
	p += 4 + 34;
	cr_assert_arr_eq(p, "\x08\0vm1-data", 10);
	cr_assert_eq(get_u32(p + 26), 7);
	cr_assert_eq(p[38], VOLUME_PEER_STALE);
	p += 39;
	cr_assert_eq(get_u32(p), 4);
	p += 4;
	cr_assert_eq(get_u64(p), 7);
	cr_assert_eq(get_u64(p + 8), 0x1111 + 7);
	cr_assert_eq(get_u64(p + 16), 0x2222 + 7);
	cr_assert_eq(p[24], CKPT_STREAM);
	cr_assert_eq(p[25], CKPT_PINNED);
	p += 2 * 26;
	cr_assert_eq(get_u64(p), 42);
	cr_assert_eq(p[24], CKPT_LOCAL);
	cr_assert_eq(p[25], 3);
	p += 2 * 26;
	cr_assert_eq(get_u64(p), 6);
	cr_assert_eq(get_u32(p + 8), 2);
	cr_assert_arr_eq(p + 12, "\x06\0test-a\x03\0vm1", 13);
	cr_assert_eq(get_u64(p + 25), 41);
	cr_assert_eq(get_u64(p + 33), 5);
	cr_assert_eq(get_u64(p + 41), 0x3333 + 5);
	p += 12 + 37;
	cr_assert_arr_eq(p, "\x01\0b\x08\0vm1-data", 13);
	cr_assert_eq(get_u64(p + 13), 8);
	p += 37;
	cr_assert_eq(get_u32(p), 2);
	cr_assert_arr_eq(p + 4, "\x03\0vm1", 5);
	cr_assert_eq(get_u64(p + 9), 9);
	cr_assert_eq(get_u64(p + 17), 512);
	p += 4 + 21;
	cr_assert_eq(get_u64(p + 5), 41);
	cr_assert_eq(get_u64(p + 13), UINT64_C(10) << 30);
	cr_assert_eq(p + 21 - enc, len);
	cr_assert_eq(enc[len], 0xee);
	free(m);
}

static void assert_refused(const void *buf, size_t len, const char *says)
{
	static struct repl_meta back;
	struct err e = {0};

	cr_assert_eq(repl_meta_decode(&back, buf, len, REPL_META_VERSION, &e), -ERR_CORRUPT, "accepted; wanted '%s'",
		     says);
	cr_assert_eq(e.code, ERR_CORRUPT);
	cr_assert(strstr(e.text, says) != NULL, "'%s' lacks '%s'", e.text, says);
	cr_assert_eq(repl_meta_decode(&back, buf, len, REPL_META_VERSION, NULL), -ERR_CORRUPT);
}

Test(repl_meta, every_cut_and_any_excess_is_refused)
{
	struct repl_meta *m = meta_full();
	int len = encode(m);

	for (size_t cut = 0; cut < (size_t)len; cut++) {
		uint8_t *exact = malloc(cut + 1); /* its own block: a read behind the end is seen */
		memcpy(exact, enc, cut);
		uint8_t *tight = realloc(exact, cut > 0 ? cut : 1);
		assert_refused(tight, cut, "field ");
		free(tight);
	}
	assert_refused(enc, 4, "field group:");
	assert_refused(enc, 20, "field uuid:");
	assert_refused(enc, (size_t)len - 1, "field growths:");
	assert_refused(enc, (size_t)len - GROWTHS_SIZE - 1, "field clones:");
	assert_refused(enc, (size_t)len - BEHIND_CKPTS - 1, "field checkpoints:");
	assert_refused(enc, (size_t)len + 1, "1 bytes too many");
	free(m);
}

Test(repl_meta, versions_it_does_not_know)
{
	struct repl_meta *m = meta_full();
	int len = encode(m);

	for (unsigned n = 0; n < 3; n++) {
		static const uint32_t versions[] = {0, REPL_META_VERSION + 1, UINT32_MAX};
		static struct repl_meta back;
		struct err e = {0};
		cr_assert_eq(repl_meta_decode(&back, enc, (size_t)len, versions[n], &e), -ERR_VERSION);
		cr_assert(strstr(e.text, "version") != NULL);
	}
	free(m);
}

/* Version 2 ended with its checkpoints. */
Test(repl_meta, version_2_is_read)
{
	struct repl_meta *m = meta_full(), *back = malloc(sizeof(*back));
	struct err e = {0};
	size_t len = (size_t)encode(m) - BEHIND_CKPTS;

	memset(back, 0x5a, sizeof(*back));
	cr_assert_eq(repl_meta_decode(back, enc, len, 2, &e), 0, "%s", e.text);
	memset(m->clones, 0, sizeof(m->clones));
	m->n_clones = 0;
	memset(m->growths, 0, sizeof(m->growths));
	m->n_growths = 0;
	m->clone_max = 0;
	cr_assert_eq(memcmp(back, m, sizeof(*m)), 0);
	cr_assert_eq(repl_meta_decode(back, enc, len, REPL_META_VERSION, NULL), -ERR_CORRUPT);
	cr_assert_eq(repl_meta_decode(back, enc, len + BEHIND_CKPTS, 2, NULL), -ERR_CORRUPT);
	free(back);
	free(m);
}

/* Version 1 ended its numbers with active_id and its volumes with their sizes: what it lacks is 0. */
Test(repl_meta, version_1_is_read)
{
	struct repl_meta *m = meta_full(), *back = malloc(sizeof(*back));
	struct err e = {0};
	int len = encode(m) - BEHIND_CKPTS;
	size_t at = 2 + strlen(m->group) + 16 + 1 + 1 + 4 + 144 + 10 * 8;

	size_t behind = 4 + 4 * 26, flags[] = {(size_t)len - behind - 1, (size_t)len - behind - 39 - 1};
	cr_assert_eq(get_u64(enc + at), 77);
	for (unsigned i = 0; i < 2; i++) { /* the last volume's first */
		cr_assert_eq(enc[flags[i]], i ? 0 : VOLUME_PEER_STALE);
		memmove(enc + flags[i], enc + flags[i] + 1, (size_t)len - flags[i] - 1);
	}
	len -= 2;
	memmove(enc + at, enc + at + 8, (size_t)len - at - 8);
	memset(back, 0x5a, sizeof(*back));
	cr_assert_eq(repl_meta_decode(back, enc, (size_t)len - 8, 1, &e), 0, "%s", e.text);
	m->diverged_ns = 0;
	m->volumes[1].flags = 0;
	memset(m->clones, 0, sizeof(m->clones));
	m->n_clones = 0;
	memset(m->growths, 0, sizeof(m->growths));
	m->n_growths = 0;
	m->clone_max = 0;
	cr_assert_eq(memcmp(back, m, sizeof(*m)), 0);
	cr_assert_eq(repl_meta_decode(back, enc, (size_t)len - 8, REPL_META_VERSION, NULL), -ERR_CORRUPT);
	enc[2 + strlen(m->group) + 16 + 1 + 1 + 1] |= 1 << 4; /* `paused`: bit 12 of the flags, which came later */
	cr_assert_eq(repl_meta_decode(back, enc, (size_t)len - 8, 1, &e), -ERR_CORRUPT);
	cr_assert(strstr(e.text, "field flags:") != NULL, "%s", e.text);
	free(back);
	free(m);
}

/* One fact broken at a time, in memory: validation names the field. */
static void assert_invalid(struct repl_meta *m, const char *says)
{
	struct err e = {0};

	cr_assert_eq(repl_meta_validate(m, &e), -ERR_CORRUPT, "accepted; wanted '%s'", says);
	cr_assert_eq(e.code, ERR_CORRUPT);
	cr_assert(strstr(e.text, says) != NULL, "'%s' lacks '%s'", e.text, says);
	cr_assert_eq(repl_meta_validate(m, NULL), -ERR_CORRUPT);
	free(m);
}

#define BREAK(says, ...)                                                                                               \
	do {                                                                                                           \
		struct repl_meta *m = meta_full();                                                                     \
		cr_assert_eq(repl_meta_validate(m, NULL), 0);                                                          \
		__VA_ARGS__;                                                                                           \
		assert_invalid(m, says);                                                                               \
	} while (0)

Test(repl_meta, single_fields)
{
	BREAK("field group:", m->group[0] = '\0');
	BREAK("field group:", m->group[0] = '.');
	BREAK("field group:", m->group[1] = '/');
	BREAK("field group:", memset(m->group, 'x', sizeof(m->group)));
	BREAK("field role:", m->role = ROLE_SECONDARY + 1);
	BREAK("field state:", m->state = STATE_DONE + 1);
	BREAK("field flags: switched", m->role = ROLE_STANDALONE, m->state = STATE_DONE, m->switched = true);
	BREAK("field flags: handed", m->handed = true); /* and inconsistent */
	BREAK("field flags: handed", m->handed = true, m->inconsistent = false, m->state = STATE_DONE);
	BREAK("field lineage:", m->lineage.history[3] = 0);
	BREAK("field lineage:", m->lineage.history[GENERATIONS_MAX - 1] = 1);
	BREAK("field peer:", m->peer[3] = '\n');
	BREAK("field peer:", m->peer[3] = ' ');
	BREAK("field peer:", m->peer[3] = '\x80');
	BREAK("field peer:", memset(m->peer, 'x', sizeof(m->peer)));
	BREAK("field settings:", m->settings.keep_last = 0);
	BREAK("field n_volumes:", m->n_volumes = GROUP_VOLUMES_MAX + 1);
	BREAK("field volumes[1]: its name", m->volumes[1].name[0] = '-');
	BREAK("field volumes[1]: its name", m->volumes[1].name[0] = '\0');
	BREAK("field volumes[1]: its name", memset(m->volumes[1].name, 'x', NAME_SIZE));
	BREAK("field volumes[1]: its name stands twice", strcpy(m->volumes[1].name, "vm1"));
	BREAK("field volumes[1]: its id stands twice", m->volumes[1].id = 0);
	BREAK("field volumes[0]: its size", m->volumes[0].size = 0);
	BREAK("field volumes[0]: its size", m->volumes[0].size += 256);
	BREAK("field volumes[1]: its size", m->volumes[1].size = VOLUME_SIZE_MAX + 512);
	BREAK("field n_checkpoints:", m->n_ckpts = GROUP_CKPTS_MAX + 1);
	BREAK("field checkpoints[0].number: is 0", m->ckpts[0].number = 0);
	BREAK("field checkpoints[2].number: not above", m->ckpts[2].number = 41);
	BREAK("field checkpoints[1].number: not above", m->ckpts[1].number = 6);
	BREAK("field checkpoints[3].number: above ckpt_max", m->ckpt_max = 49);
	BREAK("field checkpoints[2].kind:", m->ckpts[2].kind = CKPT_PARTIAL + 1);
	BREAK("field checkpoints[2].flags:", m->ckpts[2].flags = 8);
	BREAK("field n_clones:", m->n_clones = GROUP_CLONES_MAX + 1);
	BREAK("field clones[1].name: not", m->clones[1].name[0] = '.');
	BREAK("field clones[1].name: stands twice", strcpy(m->clones[1].name, "test-a"));
	BREAK("field clones[0].volume:", strcpy(m->clones[0].volume, "vm2"));
	BREAK("field clones[0].volume:", memset(m->clones[0].volume, 'x', NAME_SIZE));
	BREAK("field clones[0].checkpoint:", m->clones[0].ckpt = 0);
	BREAK("field clones[0].checkpoint:", m->clones[0].ckpt = 51);
	BREAK("field clones[1].id: stands twice", m->clones[1].id = 5);
	BREAK("field clones[1].id: 0", m->clones[1].id = 0);
	BREAK("field clones[1].id: 0 or above", m->clones[1].id = 7);
	BREAK("field n_growths:", m->n_growths = GROUP_GROWTHS_MAX + 1);
	BREAK("field growths[0].volume:", strcpy(m->growths[0].volume, "vm2"));
	BREAK("field growths[1].last: not", m->growths[1].last = 9);
	BREAK("field growths[0].last: 0", m->growths[0].last = 0);
	BREAK("field growths[1].last: 0 or above", m->growths[1].last = 51);
	BREAK("field growths[0].size:", m->growths[0].size = 513);
	BREAK("field growths[1].size:", m->growths[1].size = m->volumes[0].size);
	BREAK("field growths[1].last: not", m->growths[1].size = 512);
}

Test(repl_meta, references_between_fields)
{
	BREAK("field base: checkpoint 40 is not", m->base = 40);
	BREAK("field base: above ckpt_max", m->base = 51);
	BREAK("field last_stream: checkpoint 40 is not", m->last_stream = 40);
	BREAK("field last_stream: above ckpt_max", m->last_stream = UINT64_MAX);
	BREAK("field kept: checkpoint 43 is not", m->kept = 43);
	BREAK("field kept: above ckpt_max", m->kept = 51);
	BREAK("field target: above ckpt_max", m->target = 51);
	BREAK("field received: above ckpt_max", m->received = 51);
	for (unsigned s = STATE_FAILOVER; s <= STATE_FAILOVER_FAILED; s++) {
		BREAK("field target: checkpoint 17 is not", m->role = ROLE_STANDALONE; m->state = (uint8_t)s);
		struct repl_meta *m = meta_full();
		m->role = ROLE_STANDALONE;
		m->state = (uint8_t)s;
		m->target = 0; /* latest */
		cr_assert_eq(repl_meta_validate(m, NULL), 0);
		m->target = 7;
		cr_assert_eq(repl_meta_validate(m, NULL), 0);
		assert_decodes_to(m, encode(m));
		free(m);
	}
	struct repl_meta *m = meta_full();
	m->base = m->last_stream = m->kept = m->target = m->received = 0;
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	/* a primary's last_stream is among its peer's, also after it was shut out */
	m->last_stream = 40;
	cr_assert_eq(repl_meta_validate(m, NULL), -ERR_CORRUPT);
	m->role = ROLE_PRIMARY;
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	m->role = ROLE_SECONDARY;
	m->state = STATE_NONE;
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	/* in DONE the last failover's target may have been dropped since */
	m->role = ROLE_STANDALONE;
	m->state = STATE_DONE;
	m->target = 17;
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	m->peer[0] = '\0';
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	free(m);
}

Test(repl_meta, roles_and_states)
{
	/* rows standalone, primary, secondary; columns NONE RUNNING FAILOVER FAILOVER_FAILED DONE */
	static const char *const legal[] = {"10111", "11001", "11001"};

	for (unsigned role = 0; role < 4; role++) {
		for (unsigned state = 0; state < 7; state++) {
			bool want = role < 3 && state < 5 && legal[role][state] == '1';
			cr_assert_eq(repl_meta_role_state_valid(role, state), want, "%u %u", role, state);
			struct repl_meta *m = meta_full();
			m->target = 0;
			m->role = (uint8_t)role;
			m->state = (uint8_t)state;
			cr_assert_eq(repl_meta_validate(m, NULL), want ? 0 : -ERR_CORRUPT);
			free(m);
		}
	}
	struct repl_meta *m = meta_full();
	m->role = ROLE_PRIMARY;
	m->state = STATE_FAILOVER;
	assert_invalid(m, "a primary is never in FAILOVER");
}

/* The same facts broken in the bytes: what decoding reads is what validation sees. */
Test(repl_meta, bytes_broken)
{
	struct repl_meta *m = meta_full();
	size_t len = (size_t)encode(m);
	static const struct {
		size_t at;
		uint8_t byte;
		const char *says;
	} cases[] = {
	    {1, 0xff, "field group:"},
	    {0, 64, "field group:"},
	    {2, 0, "field group:"},
	    {21, 3, "field role:"},
	    {22, 5, "field state:"},
	    {22, STATE_FAILOVER, "field state:"},
	    {24, 1, "field flags:"},
	    {26, 0x80, "field flags:"},
	    {27 + 144 - 1, 1, "field lineage:"},
	    {27 + 144 + 2 * 8, 40, "field base:"},
	    {27 + 144 + 3 * 8 + 7, 1, "field last_stream:"},
	    {27 + 144 + NUMBERS_SIZE + 1, 2, "field peer:"},
	    {27 + 144 + NUMBERS_SIZE + 15 + 16, 0xff, "field settings:"},
	};

	for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
		encode(m);
		cr_assert_neq(enc[cases[n].at], cases[n].byte);
		enc[cases[n].at] = cases[n].byte;
		assert_refused(enc, len, cases[n].says);
	}
	encode(m);
	put_u64(enc + 27 + 3 * 8, 0); /* history[1] of 5 */
	assert_refused(enc, len, "field lineage:");
	/* counts that promise more than there is, or more than there may be */
	size_t n_growths = len - GROWTHS_SIZE, n_clones = n_growths - 2 * 37 - 4;
	size_t n_ckpts = len - BEHIND_CKPTS - 4 * 26 - 4, n_volumes = n_ckpts - 39 - 34 - 4;
	encode(m);
	cr_assert_eq(get_u32(enc + n_ckpts), 4);
	put_u32(enc + n_ckpts, 4000);
	assert_refused(enc, len, "field checkpoints:");
	put_u32(enc + n_ckpts, UINT32_MAX);
	assert_refused(enc, len, "field n_checkpoints:");
	encode(m);
	cr_assert_eq(get_u32(enc + n_clones), 2);
	put_u32(enc + n_clones, 3);
	assert_refused(enc, len, "field clones:");
	put_u32(enc + n_clones, GROUP_CLONES_MAX + 1);
	assert_refused(enc, len, "field n_clones:");
	encode(m);
	cr_assert_eq(get_u32(enc + n_growths), 2);
	put_u32(enc + n_growths, 3);
	assert_refused(enc, len, "field growths:");
	put_u32(enc + n_growths, GROUP_GROWTHS_MAX + 1);
	assert_refused(enc, len, "field n_growths:");
	put_u32(enc + n_growths, 1);
	assert_refused(enc, len, "21 bytes too many");
	encode(m);
	cr_assert_eq(get_u32(enc + n_volumes), 2);
	put_u32(enc + n_volumes, GROUP_VOLUMES_MAX + 1);
	assert_refused(enc, len, "field n_volumes:");
	put_u32(enc + n_volumes, 64);
	assert_refused(enc, len, "field volumes:");
	free(m);
}

/* A record that the next start would refuse never reaches the disk. */
Test(repl_meta, encoding_an_invalid_record_traps, .signal = SIGILL)
{
	struct repl_meta *m = meta_full();

	m->base = 40;
	repl_meta_encode(m, enc, sizeof(enc));
	free(m);
}

Test(repl_meta, find)
{
	struct repl_meta *m = meta_full();

	cr_assert_eq(repl_meta_find_volume(m, "vm1"), 0);
	cr_assert_eq(repl_meta_find_volume(m, "vm1-data"), 1);
	cr_assert_eq(repl_meta_find_volume(m, "vm1-dat"), -ERR_NOENT);
	cr_assert_eq(repl_meta_find_volume(m, ""), -ERR_NOENT);
	for (uint64_t n = 0; n < 60; n++) {
		int want = n == 7 ? 0 : n == 41 ? 1 : n == 42 ? 2 : n == 50 ? 3 : -ERR_NOENT;
		cr_assert_eq(repl_meta_find_ckpt(m, n), want, "%" PRIu64, n);
	}
	cr_assert_eq(repl_meta_find_clone(m, "test-a"), 0);
	cr_assert_eq(repl_meta_find_clone(m, "b"), 1);
	cr_assert_eq(repl_meta_find_clone(m, "test"), -ERR_NOENT);
	m->n_ckpts = 0;
	cr_assert_eq(repl_meta_find_ckpt(m, 7), -ERR_NOENT);
	cr_assert_eq(repl_meta_find_ckpt(m, 0), -ERR_NOENT);
	free(m);
}

Test(repl_meta, names)
{
	static const char *const good[] = {"a", "0", "Z9", "vm1", "a.b_c-d", "a..", "A-"};
	static const char *const bad[] = {"",	 ".",  "..",  "-a", "_a",  ".a",       "a/b",	"a b",
					  "a\n", "a:", "a@1", "a%", "a\\", "\xc3\xa4", "a\xff", "a\x7f"};
	char name[NAME_SIZE + 8];

	for (unsigned i = 0; i < sizeof(good) / sizeof(good[0]); i++)
		cr_assert(name_valid(good[i]), "%s", good[i]);
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		cr_assert(!name_valid(bad[i]), "%s", bad[i]);
	memset(name, 'n', sizeof(name));
	name[NAME_MAX_LEN] = '\0';
	cr_assert(name_valid(name));
	name[NAME_MAX_LEN] = 'n';
	name[NAME_MAX_LEN + 1] = '\0';
	cr_assert(!name_valid(name));
}

Test(repl_meta, words)
{
	cr_assert_str_eq(role_name(ROLE_STANDALONE), "standalone");
	cr_assert_str_eq(role_name(ROLE_PRIMARY), "primary");
	cr_assert_str_eq(role_name(ROLE_SECONDARY), "secondary");
	cr_assert_str_eq(role_name(3), "unknown");
	cr_assert_str_eq(state_name(STATE_NONE), "NONE");
	cr_assert_str_eq(state_name(STATE_RUNNING), "RUNNING");
	cr_assert_str_eq(state_name(STATE_FAILOVER), "FAILOVER");
	cr_assert_str_eq(state_name(STATE_FAILOVER_FAILED), "FAILOVER_FAILED");
	cr_assert_str_eq(state_name(STATE_DONE), "DONE");
	cr_assert_str_eq(state_name(UINT32_MAX), "UNKNOWN");
	cr_assert_str_eq(ckpt_kind_name(CKPT_STREAM), "stream");
	cr_assert_str_eq(ckpt_kind_name(CKPT_LOCAL), "local");
	cr_assert_str_eq(ckpt_kind_name(CKPT_PARTIAL), "partial");
	cr_assert_str_eq(ckpt_kind_name(3), "unknown");
}

/* Any byte changed to any value: refused, or a record that survives its own encoding. */
Test(repl_meta, every_byte_every_value)
{
	static struct repl_meta back, twice;
	static uint8_t again[REPL_META_ENCODED_MAX];
	struct repl_meta *m = meta_full();
	int len = encode(m);
	unsigned refused = 0, taken = 0;

	for (int i = 0; i < len; i++) {
		for (unsigned flip = 1; flip < 256; flip += 2) {
			enc[i] ^= (uint8_t)flip;
			if (repl_meta_decode(&back, enc, (size_t)len, REPL_META_VERSION, NULL) < 0) {
				refused++;
			} else {
				int n = repl_meta_encode(&back, again, sizeof(again));
				cr_assert_gt(n, 0);
				cr_assert_eq(repl_meta_decode(&twice, again, (size_t)n, REPL_META_VERSION, NULL), 0);
				cr_assert_eq(memcmp(&back, &twice, sizeof(back)), 0, "byte %d flip %02x", i, flip);
				taken++;
			}
			enc[i] ^= (uint8_t)flip;
		}
	}
	cr_assert_gt(refused, 10000);
	cr_assert_gt(taken, 10000);
	free(m);
}

/* ---- sizes ---- */

Test(repl_meta, checkpoints_keep_the_size_that_their_volume_had)
{
	struct repl_meta *m = meta_new("vm1");

	m->n_volumes = 2;
	snprintf(m->volumes[0].name, NAME_SIZE, "vm1");
	snprintf(m->volumes[1].name, NAME_SIZE, "vm2");
	m->volumes[0].size = m->volumes[1].size = 4096;
	m->volumes[1].id = 1;
	m->ckpt_max = 100;
	cr_assert_eq(repl_meta_grow(m, 0, 8192), 0); /* no checkpoint: nothing to remember */
	cr_assert_eq(m->n_growths, 0);
	ckpt_put(m, 3, CKPT_STREAM, 0);
	cr_assert_eq(repl_meta_grow(m, 0, 12288), 0);
	cr_assert_eq(repl_meta_grow(m, 0, 16384), 0); /* none between the two */
	ckpt_put(m, 5, CKPT_STREAM, 0);
	ckpt_put(m, 9, CKPT_STREAM, 0);
	cr_assert_eq(repl_meta_grow(m, 0, 20480), 0);
	cr_assert_eq(repl_meta_grow(m, 1, 8192), 0);
	ckpt_put(m, 10, CKPT_STREAM, 0);
	cr_assert_eq(m->n_growths, 3);
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	static const uint64_t want[][3] = {
	    {3, 8192, 4096}, {5, 16384, 4096}, {9, 16384, 4096}, {10, 20480, 8192}, {0, 20480, 8192}};
	for (unsigned i = 0; i < 5; i++)
		for (unsigned v = 0; v < 2; v++)
			cr_assert_eq(repl_meta_size_at(m, v, want[i][0]), want[i][1 + v], "%u %u", i, v);
	/* What no checkpoint needs any more is forgotten. */
	memmove(&m->ckpts[0], &m->ckpts[1], 3 * sizeof(m->ckpts[0]));
	m->n_ckpts = 3;
	repl_meta_forget_growths(m, NULL);
	cr_assert_eq(m->n_growths, 2);
	cr_assert_eq(repl_meta_size_at(m, 0, 5), 16384);
	repl_meta_forget_growths(m, "vm1");
	cr_assert_eq(m->n_growths, 1);
	cr_assert_str_eq(m->growths[0].volume, "vm2");
	/* More than can be remembered. */
	for (uint64_t n = 11; n < 11 + GROUP_GROWTHS_MAX - 1; n++) {
		m->ckpt_max = n;
		cr_assert_eq(repl_meta_grow(m, 0, m->volumes[0].size + 512), 0);
		ckpt_put(m, n, CKPT_STREAM, 0);
	}
	cr_assert_eq(m->n_growths, GROUP_GROWTHS_MAX);
	uint64_t size = m->volumes[0].size;
	cr_assert_eq(repl_meta_grow(m, 0, size + 512), -ERR_LIMIT);
	cr_assert_eq(m->volumes[0].size, size);
	cr_assert_eq(repl_meta_validate(m, NULL), 0);
	free(m);
}
