/* The group record: its rules, and its encoding (docs/format-group.md, byte by byte).
 *
 * Decoding runs in two steps. Parsing only takes bytes apart: it bounds every count before it loops, and remembers
 * the first field that the record was too short for. Validation then looks at the struct alone: enumerations, names,
 * order, and what fields say of each other. Encoding asserts the same validation, so that a record which the next
 * start would refuse is never written.
 */
#include "core/repl_meta.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/check.h"
#include "core/range.h"

#define CKPT_FLAGS_ALL (CKPT_PINNED | CKPT_FOREIGN | CKPT_JOB)
#define VOLUME_FLAGS_ALL (VOLUME_STALE | VOLUME_REBUILD | VOLUME_PEER_STALE)

/* The booleans of the record, as bits of one u32. */
#define META_FLAGS(X)                                                                                                  \
	X(has_peer, 0)                                                                                                 \
	X(alone, 1)                                                                                                    \
	X(inconsistent, 2)                                                                                             \
	X(fresh, 3)                                                                                                    \
	X(split_brain, 4)                                                                                              \
	X(shut_out, 5)                                                                                                 \
	X(broken, 6)                                                                                                   \
	X(own_dirty, 7)                                                                                                \
	X(paused, 12)                                                                                                  \
	X(hash_sync, 13)                                                                                               \
	X(switched, 14)                                                                                                \
	X(handed, 15)
#define META_FLAG_BIT(field, bit) | UINT32_C(1) << (bit)
#define META_FLAGS_ALL (0 META_FLAGS(META_FLAG_BIT))
#define META_FLAGS_VERSION_1 0xffU
#define META_FLAGS_VERSION_2 0x30ffU

/* ---- names ---- */

static bool name_char(char c, bool first)
{
	if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'))
		return true;
	return !first && (c == '.' || c == '_' || c == '-');
}

bool name_valid(const char *name)
{
	size_t n = strnlen(name, NAME_SIZE);

	if (n == 0 || n > NAME_MAX_LEN)
		return false;
	for (size_t i = 0; i < n; i++) {
		if (!name_char(name[i], i == 0))
			return false;
	}
	return true;
}

const char *role_name(unsigned role)
{
	static const char *const names[] = {"standalone", "primary", "secondary"};
	return role < ARRAY_LEN(names) ? names[role] : "unknown";
}

const char *state_name(unsigned state)
{
	static const char *const names[] = {"NONE", "RUNNING", "FAILOVER", "FAILOVER_FAILED", "DONE"};
	return state < ARRAY_LEN(names) ? names[state] : "UNKNOWN";
}

const char *ckpt_kind_name(unsigned kind)
{
	static const char *const names[] = {"stream", "local", "partial"};
	return kind < ARRAY_LEN(names) ? names[kind] : "unknown";
}

bool repl_meta_role_state_valid(unsigned role, unsigned state)
{
	switch (role) {
	case ROLE_STANDALONE:
		return state == STATE_NONE || state == STATE_FAILOVER || state == STATE_FAILOVER_FAILED ||
		       state == STATE_DONE;
	case ROLE_PRIMARY:
	case ROLE_SECONDARY:
		return state == STATE_NONE || state == STATE_RUNNING || state == STATE_DONE;
	default:
		return false;
	}
}

/* ---- the parts shared with the wire ---- */

void repl_meta_lineage_encode(const struct lineage *l, struct wbuf *w)
{
	wbuf_u64(w, l->current);
	wbuf_u64(w, l->bitmap);
	for (unsigned i = 0; i < GENERATIONS_MAX; i++)
		wbuf_u64(w, l->history[i]);
}

void repl_meta_lineage_decode(struct lineage *l, struct rbuf *r)
{
	struct lineage out;
	bool ended = false;

	out.current = rbuf_u64(r);
	out.bitmap = rbuf_u64(r);
	for (unsigned i = 0; i < GENERATIONS_MAX; i++) {
		out.history[i] = rbuf_u64(r);
		if (out.history[i] != 0 && ended)
			r->failed = true;
		ended = out.history[i] == 0;
	}
	if (!r->failed)
		*l = out;
}

void repl_meta_volume_encode(const struct repl_volume *v, struct wbuf *w)
{
	wbuf_str(w, v->name);
	wbuf_raw(w, v->uuid, sizeof(v->uuid));
	wbuf_u32(w, v->id);
	wbuf_u64(w, v->size);
	wbuf_u8(w, v->flags);
}

void repl_meta_volume_decode(struct repl_volume *v, struct rbuf *r, uint32_t version)
{
	struct repl_volume out;

	memset(&out, 0, sizeof(out));
	rbuf_str(r, out.name, sizeof(out.name));
	rbuf_raw(r, out.uuid, sizeof(out.uuid));
	out.id = rbuf_u32(r);
	out.size = rbuf_u64(r);
	if (version >= 2)
		out.flags = rbuf_u8(r);
	if (!r->failed)
		*v = out;
}

static const char *volume_fault(const struct repl_volume *v, uint32_t i)
{
	if (!name_valid(v[i].name))
		return "its name is not a valid one";
	if (v[i].size == 0 || v[i].size % SECTOR_SIZE != 0)
		return "its size is not a multiple of 512 above 0";
	if (v[i].size > VOLUME_SIZE_MAX)
		return "its size is above 64 TiB";
	if ((v[i].flags & ~VOLUME_FLAGS_ALL) != 0)
		return "its flags hold unknown bits";
	if ((v[i].flags & (VOLUME_REBUILD | VOLUME_STALE)) == VOLUME_REBUILD)
		return "it is being rebuilt and not stale";
	for (uint32_t k = 0; k < i; k++) {
		if (strcmp(v[k].name, v[i].name) == 0)
			return "its name stands twice";
		if (v[k].id == v[i].id)
			return "its id stands twice";
	}
	return NULL;
}

const char *repl_meta_volumes_fault(const struct repl_volume *v, uint32_t n, uint32_t *ret_index)
{
	PRE(n <= GROUP_VOLUMES_MAX);
	for (uint32_t i = 0; i < n; i++) {
		const char *fault = volume_fault(v, i);
		if (fault != NULL) {
			*ret_index = i;
			return fault;
		}
	}
	return NULL;
}

/* ---- validation ---- */

static int field_bad(struct err *e, const char *field, const char *matter)
{
	return err_set(e, ERR_CORRUPT, "group record, field %s: %s", field, matter);
}

/* "" or printable ASCII without blanks: it is dialled and shown, nothing else is asked of it here. */
static bool peer_valid(const char *peer, size_t size)
{
	size_t n = strnlen(peer, size);

	if (n == size)
		return false;
	for (size_t i = 0; i < n; i++) {
		if (peer[i] <= 0x20 || peer[i] >= 0x7f)
			return false;
	}
	return true;
}

static bool lineage_valid(const struct lineage *l)
{
	for (unsigned i = 1; i < GENERATIONS_MAX; i++) {
		if (l->history[i] != 0 && l->history[i - 1] == 0)
			return false;
	}
	return true;
}

static int validate_volumes(const struct repl_meta *m, struct err *e)
{
	uint32_t i;

	if (m->n_volumes > GROUP_VOLUMES_MAX)
		return field_bad(e, "n_volumes", "above 64");
	const char *fault = repl_meta_volumes_fault(m->volumes, m->n_volumes, &i);
	if (fault != NULL)
		return err_set(e, ERR_CORRUPT, "group record, field volumes[%" PRIu32 "]: %s", i, fault);
	return 0;
}

static int ckpt_bad(struct err *e, uint32_t i, const char *field, const char *matter)
{
	return err_set(e, ERR_CORRUPT, "group record, field checkpoints[%" PRIu32 "].%s: %s", i, field, matter);
}

static int validate_ckpts(const struct repl_meta *m, struct err *e)
{
	if (m->n_ckpts > GROUP_CKPTS_MAX)
		return field_bad(e, "n_checkpoints", "above 4096");
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		const struct repl_ckpt *c = &m->ckpts[i];
		if (c->number == 0)
			return ckpt_bad(e, i, "number", "is 0");
		if (i > 0 && c->number <= m->ckpts[i - 1].number)
			return ckpt_bad(e, i, "number", "not above the one before it");
		if (c->number > m->ckpt_max)
			return ckpt_bad(e, i, "number", "above ckpt_max");
		if (c->kind > CKPT_PARTIAL)
			return ckpt_bad(e, i, "kind", "not a known one");
		if ((c->flags & ~CKPT_FLAGS_ALL) != 0)
			return ckpt_bad(e, i, "flags", "holds unknown bits");
	}
	return 0;
}

static int clone_bad(struct err *e, uint32_t i, const char *field, const char *matter)
{
	return err_set(e, ERR_CORRUPT, "group record, field clones[%" PRIu32 "].%s: %s", i, field, matter);
}

static int validate_clones(const struct repl_meta *m, struct err *e)
{
	if (m->n_clones > GROUP_CLONES_MAX)
		return field_bad(e, "n_clones", "above 64");
	for (uint32_t i = 0; i < m->n_clones; i++) {
		const struct repl_clone *c = &m->clones[i];
		if (!name_valid(c->name))
			return clone_bad(e, i, "name", "not a valid one");
		if (!name_valid(c->volume) || repl_meta_find_volume(m, c->volume) < 0)
			return clone_bad(e, i, "volume", "not one of the group's");
		if (c->ckpt == 0 || c->ckpt > m->ckpt_max)
			return clone_bad(e, i, "checkpoint", "0 or above ckpt_max");
		if (c->id == 0 || c->id > m->clone_max)
			return clone_bad(e, i, "id", "0 or above clone_max");
		for (uint32_t k = 0; k < i; k++) {
			if (strcmp(m->clones[k].name, c->name) == 0)
				return clone_bad(e, i, "name", "stands twice");
			if (m->clones[k].id == c->id)
				return clone_bad(e, i, "id", "stands twice");
		}
	}
	return 0;
}

static int reference_check(const struct repl_meta *m, const char *field, uint64_t number, bool listed, struct err *e)
{
	if (number > m->ckpt_max)
		return field_bad(e, field, "above ckpt_max");
	if (number != 0 && listed && repl_meta_find_ckpt(m, number) < 0)
		return err_set(e, ERR_CORRUPT,
			       "group record, field %s: checkpoint %" PRIu64 " is not among those listed", field,
			       number);
	return 0;
}

/* The fields that name a checkpoint: 0, or a number once used; and listed where the record would mean nothing else.
 * A primary's last_stream names one that its peer holds, and stays when it is a primary no more. */
static int validate_references(const struct repl_meta *m, struct err *e)
{
	bool follows = m->role == ROLE_SECONDARY && m->state == STATE_RUNNING;
	bool failing_over = m->state == STATE_FAILOVER || m->state == STATE_FAILOVER_FAILED;
	int rc;

	if ((rc = reference_check(m, "base", m->base, true, e)) < 0 ||
	    (rc = reference_check(m, "last_stream", m->last_stream, follows, e)) < 0 ||
	    (rc = reference_check(m, "kept", m->kept, true, e)) < 0 ||
	    (rc = reference_check(m, "target", m->target, failing_over, e)) < 0)
		return rc;
	return reference_check(m, "received", m->received, false, e);
}

static int growth_bad(struct err *e, uint32_t i, const char *field, const char *matter)
{
	return err_set(e, ERR_CORRUPT, "group record, field growths[%" PRIu32 "].%s: %s", i, field, matter);
}

static int validate_growths(const struct repl_meta *m, struct err *e)
{
	if (m->n_growths > GROUP_GROWTHS_MAX)
		return field_bad(e, "n_growths", "above 256");
	for (uint32_t i = 0; i < m->n_growths; i++) {
		const struct repl_growth *g = &m->growths[i];
		int v = name_valid(g->volume) ? repl_meta_find_volume(m, g->volume) : -1;
		if (v < 0)
			return growth_bad(e, i, "volume", "not one of the group's");
		if (g->last == 0 || g->last > m->ckpt_max)
			return growth_bad(e, i, "last", "0 or above ckpt_max");
		if (g->size == 0 || g->size % SECTOR_SIZE != 0 || g->size >= m->volumes[v].size)
			return growth_bad(e, i, "size", "not a smaller size of its volume");
		for (uint32_t k = 0; k < i; k++)
			if (strcmp(m->growths[k].volume, g->volume) == 0 &&
			    (m->growths[k].last >= g->last || m->growths[k].size >= g->size))
				return growth_bad(e, i, "last", "not above that of the one before");
	}
	return 0;
}

int repl_meta_validate(const struct repl_meta *m, struct err *e)
{
	int rc;

	if (!name_valid(m->group))
		return field_bad(e, "group", "not a valid name");
	if (m->role > ROLE_SECONDARY)
		return field_bad(e, "role", "not a known one");
	if (m->state > STATE_DONE)
		return field_bad(e, "state", "not a known one");
	if (!repl_meta_role_state_valid(m->role, m->state))
		return err_set(e, ERR_CORRUPT, "group record, field state: a %s is never in %s", role_name(m->role),
			       state_name(m->state));
	if (!lineage_valid(&m->lineage))
		return field_bad(e, "lineage", "its history has a gap");
	if (!peer_valid(m->peer, sizeof(m->peer)))
		return field_bad(e, "peer", "not an address");
	if (!settings_valid(&m->settings))
		return field_bad(e, "settings", "a value is out of bounds");
	if (m->switched && m->role != ROLE_SECONDARY)
		return field_bad(e, "flags", "switched, and not a secondary");
	if (m->handed && (m->role != ROLE_SECONDARY || m->state != STATE_RUNNING || m->inconsistent))
		return field_bad(e, "flags", "handed, and not a whole secondary in RUNNING");
	if ((rc = validate_volumes(m, e)) < 0 || (rc = validate_ckpts(m, e)) < 0 || (rc = validate_clones(m, e)) < 0 ||
	    (rc = validate_growths(m, e)) < 0)
		return rc;
	return validate_references(m, e);
}

/* ---- encoding ---- */

static uint32_t flags_pack(const struct repl_meta *m)
{
	uint32_t flags = 0;
#define FLAG_PACK(field, bit) flags |= m->field ? UINT32_C(1) << (bit) : 0;
	META_FLAGS(FLAG_PACK)
#undef FLAG_PACK
	return flags;
}

static void flags_unpack(struct repl_meta *m, uint32_t flags)
{
#define FLAG_UNPACK(field, bit) m->field = (flags >> (bit)&1) != 0;
	META_FLAGS(FLAG_UNPACK)
#undef FLAG_UNPACK
}

/* The numbers behind the lineage, in the order of the format. */
#define META_NUMBERS(X)                                                                                                \
	X(sync_from)                                                                                                   \
	X(ckpt_max)                                                                                                    \
	X(base)                                                                                                        \
	X(last_stream)                                                                                                 \
	X(kept)                                                                                                        \
	X(target)                                                                                                      \
	X(received)                                                                                                    \
	X(received_bytes)                                                                                              \
	X(failover_generation)                                                                                         \
	X(active_id)

/* Those that version 2 added behind them. */
#define META_NUMBERS_2(X) X(diverged_ns)

static void ckpt_encode(const struct repl_ckpt *c, struct wbuf *w)
{
	wbuf_u64(w, c->number);
	wbuf_u64(w, c->generation);
	wbuf_u64(w, c->time_ns);
	wbuf_u8(w, c->kind);
	wbuf_u8(w, c->flags);
}

static void clone_encode(const struct repl_clone *c, struct wbuf *w)
{
	wbuf_str(w, c->name);
	wbuf_str(w, c->volume);
	wbuf_u64(w, c->ckpt);
	wbuf_u64(w, c->id);
	wbuf_u64(w, c->time_ns);
}

int repl_meta_encode(const struct repl_meta *m, void *buf, size_t size)
{
	struct wbuf w = {.data = buf, .size = size};

	INVARIANT(repl_meta_validate(m, NULL) == 0);
	wbuf_str(&w, m->group);
	wbuf_raw(&w, m->uuid, sizeof(m->uuid));
	wbuf_u8(&w, m->role);
	wbuf_u8(&w, m->state);
	wbuf_u32(&w, flags_pack(m));
	repl_meta_lineage_encode(&m->lineage, &w);
#define NUMBER_ENCODE(field) wbuf_u64(&w, m->field);
	META_NUMBERS(NUMBER_ENCODE)
	META_NUMBERS_2(NUMBER_ENCODE)
#undef NUMBER_ENCODE
	wbuf_str(&w, m->peer);
	wbuf_raw(&w, m->peer_store, sizeof(m->peer_store));
	settings_encode(&m->settings, &w);
	wbuf_u32(&w, m->n_volumes);
	for (uint32_t i = 0; i < m->n_volumes; i++)
		repl_meta_volume_encode(&m->volumes[i], &w);
	wbuf_u32(&w, m->n_ckpts);
	for (uint32_t i = 0; i < m->n_ckpts; i++)
		ckpt_encode(&m->ckpts[i], &w);
	wbuf_u64(&w, m->clone_max);
	wbuf_u32(&w, m->n_clones);
	for (uint32_t i = 0; i < m->n_clones; i++)
		clone_encode(&m->clones[i], &w);
	wbuf_u32(&w, m->n_growths);
	for (uint32_t i = 0; i < m->n_growths; i++) {
		wbuf_str(&w, m->growths[i].volume);
		wbuf_u64(&w, m->growths[i].last);
		wbuf_u64(&w, m->growths[i].size);
	}
	return w.failed ? -ERR_LIMIT : (int)w.len;
}

/* A reader that remembers the first field it failed at. */
struct field_reader {
	struct rbuf r;
	const char *bad;
};

static void field_end(struct field_reader *f, const char *field)
{
	if (f->r.failed && f->bad == NULL)
		f->bad = field;
}

static void ckpt_decode(struct repl_ckpt *c, struct rbuf *r)
{
	c->number = rbuf_u64(r);
	c->generation = rbuf_u64(r);
	c->time_ns = rbuf_u64(r);
	c->kind = rbuf_u8(r);
	c->flags = rbuf_u8(r);
}

static void clone_decode(struct repl_clone *c, struct rbuf *r)
{
	rbuf_str(r, c->name, sizeof(c->name));
	rbuf_str(r, c->volume, sizeof(c->volume));
	c->ckpt = rbuf_u64(r);
	c->id = rbuf_u64(r);
	c->time_ns = rbuf_u64(r);
}

static void parse_head(struct field_reader *f, struct repl_meta *m, uint32_t version)
{
	rbuf_str(&f->r, m->group, sizeof(m->group));
	field_end(f, "group");
	rbuf_raw(&f->r, m->uuid, sizeof(m->uuid));
	field_end(f, "uuid");
	m->role = rbuf_u8(&f->r);
	field_end(f, "role");
	m->state = rbuf_u8(&f->r);
	field_end(f, "state");
	uint32_t flags = rbuf_u32(&f->r);
	uint32_t known = version == 1 ? META_FLAGS_VERSION_1 : version == 2 ? META_FLAGS_VERSION_2 : META_FLAGS_ALL;
	if ((flags & ~known) != 0)
		f->r.failed = true;
	flags_unpack(m, flags);
	field_end(f, "flags");
	repl_meta_lineage_decode(&m->lineage, &f->r);
	field_end(f, "lineage");
#define NUMBER_DECODE(field)                                                                                           \
	m->field = rbuf_u64(&f->r);                                                                                    \
	field_end(f, #field);
	META_NUMBERS(NUMBER_DECODE)
	if (version >= 2) {
		META_NUMBERS_2(NUMBER_DECODE)
	}
#undef NUMBER_DECODE
	rbuf_str(&f->r, m->peer, sizeof(m->peer));
	field_end(f, "peer");
	rbuf_raw(&f->r, m->peer_store, sizeof(m->peer_store));
	field_end(f, "peer_store");
	settings_decode(&m->settings, &f->r);
	field_end(f, "settings");
}

static void parse_lists(struct field_reader *f, struct repl_meta *m, uint32_t version)
{
	m->n_volumes = rbuf_u32(&f->r);
	if (m->n_volumes > GROUP_VOLUMES_MAX)
		f->r.failed = true;
	field_end(f, "n_volumes");
	for (uint32_t i = 0; i < m->n_volumes && !f->r.failed; i++)
		repl_meta_volume_decode(&m->volumes[i], &f->r, version);
	field_end(f, "volumes");
	m->n_ckpts = rbuf_u32(&f->r);
	if (m->n_ckpts > GROUP_CKPTS_MAX)
		f->r.failed = true;
	field_end(f, "n_checkpoints");
	for (uint32_t i = 0; i < m->n_ckpts && !f->r.failed; i++)
		ckpt_decode(&m->ckpts[i], &f->r);
	field_end(f, "checkpoints");
	if (version < 3)
		return;
	m->clone_max = rbuf_u64(&f->r);
	field_end(f, "clone_max");
	m->n_clones = rbuf_u32(&f->r);
	if (m->n_clones > GROUP_CLONES_MAX)
		f->r.failed = true;
	field_end(f, "n_clones");
	for (uint32_t i = 0; i < m->n_clones && !f->r.failed; i++)
		clone_decode(&m->clones[i], &f->r);
	field_end(f, "clones");
	m->n_growths = rbuf_u32(&f->r);
	if (m->n_growths > GROUP_GROWTHS_MAX)
		f->r.failed = true;
	field_end(f, "n_growths");
	for (uint32_t i = 0; i < m->n_growths && !f->r.failed; i++) {
		rbuf_str(&f->r, m->growths[i].volume, sizeof(m->growths[i].volume));
		m->growths[i].last = rbuf_u64(&f->r);
		m->growths[i].size = rbuf_u64(&f->r);
	}
	field_end(f, "growths");
}

int repl_meta_decode(struct repl_meta *m, const void *buf, size_t len, uint32_t version, struct err *e)
{
	struct field_reader f = {.r = {.data = buf, .size = len}};

	if (version < REPL_META_VERSION_MIN || version > REPL_META_VERSION)
		return err_set(e, ERR_VERSION,
			       "group record: format version %" PRIu32 ", and this program reads %d to %d", version,
			       REPL_META_VERSION_MIN, REPL_META_VERSION);
	memset(m, 0, sizeof(*m));
	parse_head(&f, m, version);
	parse_lists(&f, m, version);
	if (f.bad != NULL)
		return field_bad(e, f.bad, "cut short or out of bounds");
	if (f.r.pos != len)
		return err_set(e, ERR_CORRUPT, "group record: %zu bytes too many behind the last field", len - f.r.pos);
	return repl_meta_validate(m, e);
}

/* ---- the record in memory ---- */

void repl_meta_init(struct repl_meta *m, const char *group)
{
	PRE(name_valid(group));
	memset(m, 0, sizeof(*m));
	memcpy(m->group, group, strlen(group));
	settings_default(&m->settings);
}

void repl_meta_copy(struct repl_meta *to, const struct repl_meta *from)
{
	memcpy(to, from, offsetof(struct repl_meta, ckpts) + from->n_ckpts * sizeof(from->ckpts[0]));
}

bool repl_meta_flagged(const struct repl_meta *m, unsigned flag)
{
	for (uint32_t i = 0; i < m->n_volumes; i++)
		if (m->volumes[i].flags & flag)
			return true;
	return false;
}

int repl_meta_volume_by_id(const struct repl_meta *m, uint32_t id)
{
	for (uint32_t i = 0; i < m->n_volumes; i++)
		if (m->volumes[i].id == id)
			return (int)i;
	return -ERR_NOENT;
}

int repl_meta_find_volume(const struct repl_meta *m, const char *name)
{
	for (uint32_t i = 0; i < m->n_volumes; i++) {
		if (strcmp(m->volumes[i].name, name) == 0)
			return (int)i;
	}
	return -ERR_NOENT;
}

int repl_meta_find_clone(const struct repl_meta *m, const char *name)
{
	for (uint32_t i = 0; i < m->n_clones; i++) {
		if (strcmp(m->clones[i].name, name) == 0)
			return (int)i;
	}
	return -ERR_NOENT;
}

int repl_meta_find_ckpt(const struct repl_meta *m, uint64_t number)
{
	uint32_t low = 0, high = m->n_ckpts;

	while (low < high) {
		uint32_t mid = low + (high - low) / 2;
		if (m->ckpts[mid].number < number)
			low = mid + 1;
		else
			high = mid;
	}
	return low < m->n_ckpts && m->ckpts[low].number == number ? (int)low : -ERR_NOENT;
}

/* ---- sizes ---- */

uint64_t repl_meta_size_at(const struct repl_meta *m, uint32_t volume, uint64_t number)
{
	const struct repl_volume *v = &m->volumes[volume];

	for (uint32_t i = 0; number && i < m->n_growths; i++)
		if (number <= m->growths[i].last && strcmp(m->growths[i].volume, v->name) == 0)
			return m->growths[i].size;
	return v->size;
}

void repl_meta_forget_growths(struct repl_meta *m, const char *volume)
{
	uint64_t oldest = m->n_ckpts ? m->ckpts[0].number : UINT64_MAX;
	uint32_t n = 0;

	for (uint32_t i = 0; i < m->n_growths; i++) {
		const struct repl_growth *g = &m->growths[i];
		if (volume ? strcmp(g->volume, volume) == 0 : g->last < oldest)
			continue;
		if (n != i)
			m->growths[n] = *g;
		n++;
	}
	m->n_growths = n;
}

int repl_meta_grow(struct repl_meta *m, uint32_t volume, uint64_t size)
{
	struct repl_volume *v = &m->volumes[volume];
	uint64_t last = m->n_ckpts ? m->ckpts[m->n_ckpts - 1].number : 0;

	PRE(size > v->size && size % SECTOR_SIZE == 0 && size <= VOLUME_SIZE_MAX);
	repl_meta_forget_growths(m, NULL);
	/* With no checkpoint since it grew last the entry of then says it. */
	for (uint32_t i = 0; i < m->n_growths; i++)
		if (m->growths[i].last == last && strcmp(m->growths[i].volume, v->name) == 0)
			last = 0;
	if (last && m->n_growths == GROUP_GROWTHS_MAX)
		return -ERR_LIMIT;
	if (last) {
		struct repl_growth *g = &m->growths[m->n_growths++];
		memset(g, 0, sizeof(*g));
		memcpy(g->volume, v->name, sizeof(g->volume));
		g->last = last;
		g->size = v->size;
	}
	v->size = size;
	return 0;
}
