/* The replication core alone: events in, whole action traces out. A fake shell records what is emitted and holds each
 * request and save until the test ends it, so every order of things can be had. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/repl.h"

#define SIZE (UINT64_C(8) << 20)
#define SEC UINT64_C(1000000000)
#define IOS 256
#define VOLUMES_MAX 2

struct host {
	struct repl *r;
	void *mem[VOLUMES_MAX], *metas[2];
	uint64_t now, session, random;
	uint64_t peer_start, peer_joins; /* of the JOINs that it hears */
	char trace[8192];
	struct repl_io *submitted[IOS];
	unsigned n_submitted;
	bool saving;
	struct repl_meta saved; /* as last asked to be saved */
	struct repl_io io[IOS]; /* by name */
	struct repl_command cmd;
	int cmd_error, cmd_count;
	unsigned warnings;
	unsigned sent_flags; /* of the last frame */
	uint64_t dial;	     /* the last one's number */
};

static void note(struct host *h, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void note(struct host *h, const char *fmt, ...)
{
	size_t n = strlen(h->trace);
	if (n)
		h->trace[n++] = ' ';
	va_list ap;
	va_start(ap, fmt);
	(void)vsnprintf(h->trace + n, sizeof(h->trace) - n, fmt, ap);
	va_end(ap);
}

static const char *name_of(const struct repl_io *io)
{
	static const char *const kinds[] = {"write",  "zero",	 "discard", "sync",  "ckpt",   "rbegin", "hash",
					    "rdone",  "verify",	 "scan",    "read",  "rhash",  "mark",	 "commit",
					    "iclear", "intents", "merge",   "gread", "detach", "attach", "rebuild",
					    "resize", "grow",	 "scrub",   "reopen"};
	static char letter[2];
	if (io->internal)
		return kinds[io->kind];
	letter[0] = (char)io->owner;
	return letter;
}

static void emit(void *arg, const struct repl_action *a)
{
	static const char *const targets[] = {"disk", "active", "intent", "ckpt", "own"};
	struct host *h = arg;
	switch (a->type) {
	case ACT_SUBMIT:
		note(h, "do:%s/%s", name_of(a->io), targets[a->io->target]);
		h->submitted[h->n_submitted++] = a->io;
		cr_assert_lt(h->n_submitted, IOS);
		break;
	case ACT_COMPLETE:
		note(h, a->error ? "done:%s=%s" : "done:%s", name_of(a->io), err_name(a->error));
		memset(a->io, 0xdd, sizeof(*a->io)); /* the owner's again: the core must not look at it */
		break;
	case ACT_SEND:
		if (a->frame.type == WIRE_PING)
			break;
		h->sent_flags = a->frame.flags;
		if (a->frame.seq)
			note(h, "send:%s#%d", wire_type_name(a->frame.type), (int)a->frame.seq);
		else
			note(h, "send:%s", wire_type_name(a->frame.type));
		break;
	case ACT_SAVE_META:
		cr_assert_not(h->saving, "one save at a time");
		h->saving = true;
		h->saved = *a->meta;
		note(h, "save:%s/%s", role_name(a->meta->role), state_name(a->meta->state));
		if (a->ckpt)
			note(h, "+%d", (int)a->ckpt);
		if (a->drop)
			note(h, "-%d", (int)a->drop);
		if (a->drop_through)
			note(h, a->drop_through == UINT64_MAX ? "-all" : "<%d", (int)a->drop_through + 1);
		cr_assert_eq(repl_meta_validate(a->meta, NULL), 0);
		break;
	case ACT_DIAL:
		note(h, "dial");
		h->dial = a->dial;
		break;
	case ACT_CLOSE:
		note(h, "close");
		break;
	case ACT_CMD_DONE:
		h->cmd_count++;
		h->cmd_error = a->error;
		note(h, a->error ? "cmd=%s" : "cmd", err_name(a->error));
		break;
	case ACT_LOG:
		h->warnings += a->level == 1;
		break;
	case ACT_SERVING:
		break;
	case ACT_CHANGED:
		note(h, "changed");
		break;
	}
}

static void step(struct host *h, struct repl_event ev)
{
	ev.now_ns = h->now;
	ev.wall_ns = h->now;
	repl_step(h->r, &ev);
}

static void expect(struct host *h, const char *trace, int line)
{
	cr_assert_str_eq(h->trace, trace, "line %d:\n  got  \"%s\"\n  want \"%s\"", line, h->trace, trace);
	h->trace[0] = 0;
}
#define EXPECT(h, t) expect(h, t, __LINE__)

static void forget(struct host *h)
{
	h->trace[0] = 0;
}

/* A guest's request, by a letter. */
static void guest(struct host *h, char name, enum repl_kind kind, uint64_t off, uint64_t len)
{
	struct repl_io *io = &h->io[(unsigned char)name];
	*io = (struct repl_io){.kind = kind, .off = off, .len = len, .owner = (uint8_t)name};
	step(h, (struct repl_event){.type = EV_IO, .io = io});
}

static void fin_full(struct host *h, const char *name, int error, bool hole, uint64_t ext_len, bool save_failed)
{
	for (unsigned i = 0; i < h->n_submitted; i++) {
		struct repl_io *io = h->submitted[i];
		if (strcmp(name_of(io), name) != 0)
			continue;
		memmove(&h->submitted[i], &h->submitted[i + 1], (h->n_submitted - i - 1) * sizeof(h->submitted[0]));
		h->n_submitted--;
		io->hole = hole;
		io->ext_len = ext_len;
		io->save_failed = save_failed;
		step(h, (struct repl_event){.type = EV_IO_DONE, .io = io, .error = error});
		return;
	}
	cr_assert_fail("%s was not submitted", name);
}

static void fin(struct host *h, const char *name)
{
	fin_full(h, name, 0, false, 0, false);
}

static void saved(struct host *h)
{
	cr_assert(h->saving);
	h->saving = false;
	step(h, (struct repl_event){.type = EV_META_SAVED});
}

static void save_fails(struct host *h, int error)
{
	cr_assert(h->saving);
	h->saving = false;
	step(h, (struct repl_event){.type = EV_META_SAVED, .error = error});
}

/* A block in each epoch, and all the room there is. */
static const struct repl_usage *usage_of(struct host *h)
{
	static struct repl_usage u;
	const struct repl_meta *m = repl_meta(h->r);
	u.free_bytes = UINT64_MAX;
	u.n = m->n_ckpts;
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		u.numbers[i] = m->ckpts[i].number;
		u.bytes[i] = 4096;
	}
	return &u;
}

static void tick(struct host *h, uint64_t after_ns)
{
	h->now += after_ns;
	step(h, (struct repl_event){.type = EV_TICK, .heard_ns = h->now, .usage = usage_of(h)});
}

/* Time goes by, with a tick as often as there is one; nothing is heard but what `heard_ns` says. */
static void ticks_hearing(struct host *h, uint64_t ns, uint64_t heard_ns)
{
	const uint64_t each = UINT64_C(100000000);
	for (uint64_t end = h->now + ns; h->now < end;) {
		h->now += end - h->now < each ? end - h->now : each;
		step(h, (struct repl_event){.type = EV_TICK, .heard_ns = heard_ns ? heard_ns : h->now});
	}
}

static void ticks(struct host *h, uint64_t ns)
{
	ticks_hearing(h, ns, 0);
}

static void frame(struct host *h, unsigned type, uint64_t seq, uint64_t off, uint64_t len, const void *data,
		  uint32_t data_len)
{
	struct wire_frame f = {
	    .type = (uint16_t)type, .seq = seq, .offset = off, .length = len, .length_payload = data_len};
	step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .payload = data});
}

/* A frame of the stream, for a secondary. */
static void stream(struct host *h, char name, unsigned type, enum repl_kind kind, uint64_t seq, uint64_t off,
		   uint64_t len)
{
	struct repl_io *io = &h->io[(unsigned char)name];
	*io = (struct repl_io){.kind = kind, .off = off, .len = len, .seq = seq, .owner = (uint8_t)name};
	io->resync = type == WIRE_RESYNC_WRITE || type == WIRE_RESYNC_ZERO;
	if (kind == REPL_CHECKPOINT || kind == REPL_RESYNC_BEGIN)
		io->arg = off;
	io->lineage.current = 100;
	struct wire_frame f = {.type = (uint16_t)type, .seq = seq, .offset = off, .length = len};
	step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .io = io});
}

static void dirty_frame(struct host *h, uint64_t off, uint64_t len)
{
	uint8_t buf[16];
	struct wbuf w = {.data = buf, .size = sizeof(buf)};
	wbuf_u64(&w, off);
	wbuf_u64(&w, len);
	frame(h, WIRE_DIRTY, 0, 0, 0, buf, sizeof(buf));
}

static void ack(struct host *h, uint64_t received, uint64_t applied, uint64_t flushed)
{
	uint8_t buf[64];
	struct wire_ack a = {received, applied, flushed};
	int n = wire_ack_encode(&a, buf, sizeof(buf));
	frame(h, WIRE_ACK, 0, 0, 0, buf, (uint32_t)n);
}

static void link_down(struct host *h)
{
	step(h, (struct repl_event){.type = EV_LINK_DOWN, .session = h->session});
}

static void dial_fails(struct host *h, uint64_t dial)
{
	step(h, (struct repl_event){.type = EV_LINK_DOWN, .dial = dial, .error = -ERR_PEER});
}

static void command(struct host *h, enum repl_cmd cmd, uint64_t number)
{
	h->cmd = (struct repl_command){.cmd = cmd, .number = number};
	h->cmd_count = 0;
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
}

/* on_io_error=pass */
static void pass(struct host *h)
{
	h->cmd.settings = repl_meta(h->r)->settings;
	struct settings s = h->cmd.settings;
	s.on_io_error = ON_IO_ERROR_PASS;
	h->cmd = (struct repl_command){.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = s};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	saved(h);
	frame(h, WIRE_SETTINGS_ACK, 1, 0, 0, NULL, 0);
	forget(h);
}

static bool dirty(struct host *h, uint64_t off)
{
	return bitmap_test(&repl_volume_state(h->r, 0)->dirty, off >> REGION_SHIFT);
}

/* ---- hosts ---- */

static void meta_of(struct repl_meta *m, enum role role, enum state state)
{
	repl_meta_init(m, "vm");
	m->role = (uint8_t)role;
	m->state = (uint8_t)state;
	m->has_peer = true;
	m->lineage.current = 100;
	m->settings.checkpoint_interval_ms = 0;
	m->n_volumes = 1;
	(void)snprintf(m->volumes[0].name, sizeof(m->volumes[0].name), "vm");
	m->volumes[0].size = SIZE;
	m->ckpt_max = m->last_stream = 1;
	if (role == ROLE_PRIMARY)
		(void)snprintf(m->peer, sizeof(m->peer), "peer:1");
	if (role == ROLE_SECONDARY) {
		m->n_ckpts = 1;
		m->ckpts[0] = (struct repl_ckpt){.number = 1, .generation = 100};
		m->base = 1;
		m->active_id = 1;
	}
}

static bool store_is_power; /* of the hosts to be made */

static struct host *host_new(const struct repl_meta *m)
{
	static const uint8_t store[16] = {7};
	struct host *h = calloc(1, sizeof(*h));
	struct repl_init_args a = {.store = store, .random_seed = 5, .now_ns = SEC, .emit = emit, .emit_arg = h};
	a.power = store_is_power;
	h->now = SEC;
	h->r = malloc(repl_size());
	h->metas[0] = a.meta = malloc(sizeof(*m));
	h->metas[1] = a.next = malloc(sizeof(*m));
	*a.meta = *m;
	for (uint32_t i = 0; i < m->n_volumes; i++)
		a.volume_memory[i] = h->mem[i] = calloc(1, repl_volume_bytes(m->volumes[i].size));
	repl_init(h->r, &a);
	return h;
}

static void join_frame(struct host *h, const struct repl_meta *peer, uint32_t flags)
{
	static struct wire_join j;
	static uint8_t buf[WIRE_JOIN_ENCODED_MAX];
	memset(&j, 0, sizeof(j));
	memcpy(j.group, peer->group, sizeof(j.group));
	j.role = peer->role;
	j.state = peer->state;
	j.lineage = peer->lineage;
	j.sync_from = peer->sync_from;
	j.ckpt_max = peer->ckpt_max;
	j.last_stream = peer->last_stream;
	j.start = h->peer_start;
	j.number = h->peer_joins;
	j.settings = peer->settings;
	j.n_volumes = peer->n_volumes;
	memcpy(j.volumes, peer->volumes, peer->n_volumes * sizeof(j.volumes[0]));
	j.flags = flags | (peer->alone ? WIRE_JOIN_ALONE : 0U) | (peer->inconsistent ? WIRE_JOIN_INCONSISTENT : 0U);
	int n = wire_join_encode(&j, buf, sizeof(buf));
	cr_assert_gt(n, 0);
	frame(h, WIRE_JOIN, 0, 0, 0, buf, (uint32_t)n);
}

static void link_up(struct host *h, bool dialer)
{
	h->session++;
	step(h, (struct repl_event){.type = EV_LINK_UP, .session = h->session, .dialer = dialer});
}

/* From the primary's dial to its session as source with nothing to do, one frame (RESYNC_DONE, 1) sent. */
static void connect(struct host *h, struct repl_meta *peer)
{
	tick(h, 3 * SEC);
	forget(h);
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	join_frame(h, peer, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "do:intents/own");
	fin(h, "intents");
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
}

static struct repl_meta peer_meta;

/* A primary in sync under `protocol`: RESYNC_DONE is 1, the first checkpoint 2 was frame 2. */
static struct host *primary(enum protocol protocol)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	m.settings.protocol = protocol;
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	connect(h, &peer_meta);
	EXPECT(h, "send:RESYNC_DONE#1");
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	EXPECT(h, "send:CHECKPOINT#2 save:primary/RUNNING");
	saved(h);
	ack(h, 2, 2, 1);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 2, 0, NULL, 0);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	EXPECT(h, "");
	return h;
}

/* A write that has had its intent bit set before. */
static void warm(struct host *h)
{
	guest(h, 'z', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:z/intent");
	fin(h, "z");
	EXPECT(h, "do:z/disk");
	fin(h, "z");
	forget(h);
	ack(h, 3, 3, 1);
	forget(h);
}

/* In sync, and with a write acknowledged, so that the first unit's intent bit is set: 3 was sent. */
static struct host *warm_primary(enum protocol protocol)
{
	struct host *h = primary(protocol);
	warm(h);
	return h;
}

/* The peer goes, and the guest writes a region that was clean: a generation is begun. */
static void write_alone(struct host *h, uint64_t off)
{
	link_down(h);
	guest(h, 'a', REPL_WRITE, off, 4096);
	saved(h);
	fin(h, "a");
	fin(h, "a");
	forget(h);
}

/* In sync with a primary that is at the same numbers and settings; RESYNC_DONE was 1. */
static struct host *secondary_of(const struct repl_meta *m)
{
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	peer_meta.ckpt_max = m->ckpt_max;
	peer_meta.settings = m->settings;
	struct host *h = host_new(m);
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN send:DIRTY_END");
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 1, 0, 0);
	EXPECT(h, "do:d/disk");
	fin(h, "d");
	EXPECT(h, "save:secondary/RUNNING");
	saved(h);
	EXPECT(h, "send:RESYNC_ACK#1 send:ACK done:d");
	return h;
}

static struct host *secondary(void)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	return secondary_of(&m);
}

static void host_free(struct host *h)
{
	repl_check(h->r);
	free(h->metas[0]);
	free(h->metas[1]);
	for (unsigned i = 0; i < VOLUMES_MAX; i++)
		free(h->mem[i]);
	free(h->r);
	free(h);
}

/* ---- a guest's write, by protocol ---- */

Test(repl, protocol_f_completes_a_write_when_it_is_queued)
{
	struct host *h = primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:a/intent"); /* a clean region: its durable bit first */
	cr_assert_not(dirty(h, 0));
	fin(h, "a");
	EXPECT(h, "do:a/disk");
	cr_assert(dirty(h, 0), "before the write");
	fin(h, "a");
	EXPECT(h, "send:WRITE#3 done:a");
	guest(h, 'b', REPL_WRITE, 65536, 4096); /* the same MiB: no second intent */
	EXPECT(h, "do:b/disk");
	fin(h, "b");
	EXPECT(h, "send:WRITE#4 done:b");
	host_free(h);
}

Test(repl, protocol_b_waits_for_received_and_c_for_applied)
{
	struct host *h = warm_primary(PROTOCOL_B);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/disk send:WRITE#4");
	ack(h, 4, 3, 1);
	EXPECT(h, "done:a");
	host_free(h);
	h = primary(PROTOCOL_C);
	warm(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/disk send:WRITE#4");
	ack(h, 4, 3, 1);
	EXPECT(h, "");
	ack(h, 4, 4, 1);
	EXPECT(h, "done:a");
	host_free(h);
}

Test(repl, a_flush_under_f_waits_for_both)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "send:FLUSH#4 do:f/disk");
	fin(h, "f");
	EXPECT(h, "");
	ack(h, 4, 4, 3);
	EXPECT(h, "");
	ack(h, 4, 4, 4);
	EXPECT(h, "done:f");
	host_free(h);
}

Test(repl, overlapping_writes_leave_in_order)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 0, 8192);
	guest(h, 'b', REPL_WRITE, 4096 + 512, 512); /* another part of a block of a's */
	guest(h, 'c', REPL_WRITE, 16384, 4096);
	EXPECT(h, "do:a/disk do:c/disk");
	fin(h, "c");
	EXPECT(h, "send:WRITE#4 done:c");
	fin(h, "a");
	EXPECT(h, "send:WRITE#5 do:b/disk done:a");
	fin(h, "b");
	EXPECT(h, "send:WRITE#6 done:b");
	host_free(h);
}

/* ---- without the peer ---- */

Test(repl, what_waits_under_c_begins_a_generation_when_the_link_is_lost)
{
	struct host *h = warm_primary(PROTOCOL_C);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	forget(h);
	link_down(h);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert(h->saved.alone);
	cr_assert_eq(h->saved.lineage.bitmap, 100);
	saved(h);
	EXPECT(h, "done:a");
	host_free(h);
}

Test(repl, alone_generation_then_intent_then_disk)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "save:primary/RUNNING");
	guest(h, 'b', REPL_WRITE, 4096, 4096); /* waits for the same generation */
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "do:a/intent do:b/intent");
	fin(h, "a");
	EXPECT(h, "do:a/disk");
	fin(h, "a");
	EXPECT(h, "done:a");
	fin(h, "b");
	fin(h, "b");
	EXPECT(h, "do:b/disk done:b");
	guest(h, 'f', REPL_FLUSH, 0, 0); /* alone already: no other */
	fin(h, "f");
	EXPECT(h, "do:f/disk done:f");
	host_free(h);
}

/* A flush that ends while the start of a session is being saved waits for a generation; the session has begun when its
 * turn comes. A generation begun then would leave `alone` set in a live session, and the next write alone would begin
 * none. */
Test(repl, no_generation_begins_inside_a_session)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "do:f/disk");
	tick(h, 0);
	EXPECT(h, "dial");
	link_up(h, true);
	join_frame(h, &peer_meta, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	EXPECT(h, "send:JOIN do:intents/own save:primary/RUNNING");
	fin(h, "f");
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "send:RESYNC_DONE#1 done:f");
	cr_assert_not(repl_meta(h->r)->alone);
	cr_assert_eq(repl_meta(h->r)->lineage.current, 100);
	host_free(h);
}

Test(repl, freeze_holds_and_a_stop_or_a_shutdown_ends_it)
{
	for (int end = 0; end < 2; end++) {
		struct host *h = primary(PROTOCOL_C);
		warm(h);
		struct settings s = repl_meta(h->r)->settings;
		s.on_disconnect = ON_DISCONNECT_FREEZE;
		h->cmd = (struct repl_command){.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = s};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
		saved(h);
		guest(h, 'a', REPL_WRITE, 0, 4096);
		guest(h, 'b', REPL_WRITE, 8192, 4096);
		fin(h, "a");
		fin(h, "b");
		forget(h);
		link_down(h);
		EXPECT(h, "cmd");
		guest(h, 'c', REPL_WRITE, 0, 4096);
		EXPECT(h, "");
		if (end == 0) {
			command(h, CMD_STOP, 0);
			saved(h);
			forget(h);
			tick(h, 1000);
			EXPECT(h, ""); /* c's generation is being saved: a and b wait for it too */
			saved(h);
			EXPECT(h, "do:c/disk done:a done:b");
			fin(h, "c");
			EXPECT(h, "done:c");
		} else {
			step(h, (struct repl_event){.type = EV_SHUTDOWN});
			EXPECT(h, "done:c=ERR_IO done:a=ERR_IO done:b=ERR_IO");
		}
		host_free(h);
	}
}

/* ---- what is dirty ---- */

Test(repl, a_clear_cycle_leaves_what_a_newer_write_touched)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin(h, "a");
	forget(h);
	tick(h, 2 * SEC);
	EXPECT(h, "send:FLUSH#5 do:sync/disk");
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	fin(h, "b");
	forget(h);
	ack(h, 6, 6, 5);
	cr_assert(dirty(h, 0), "this host's own disk is not flushed yet");
	fin(h, "sync");
	cr_assert_not(dirty(h, 0));
	cr_assert(dirty(h, 65536));
	host_free(h);
}

Test(repl, a_write_that_spans_a_clear_cycle_and_the_end_of_its_session_is_dirty)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	tick(h, 2 * SEC);
	EXPECT(h, "do:a/disk send:FLUSH#4 do:sync/disk");
	fin(h, "sync");
	ack(h, 4, 4, 4);
	link_down(h);
	fin(h, "a");
	EXPECT(h, "save:primary/RUNNING");
	cr_assert(dirty(h, 65536), "nobody has sent it");
	saved(h);
	EXPECT(h, "done:a");
	host_free(h);
}

Test(repl, a_write_that_failed_here_stays_dirty)
{
	struct repl_status s;
	struct host *h = primary(PROTOCOL_F);
	pass(h);
	warm(h);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	EXPECT(h, "do:a/disk send:WRITE_FAILED send:FLUSH#4 do:sync/disk send:BEHIND done:a=ERR_IO");
	repl_status(h->r, h->now, &s);
	cr_assert_neq(s.link, LINK_SYNCED, "a range was not sent");
	cr_assert(dirty(h, 65536), "what the disk holds of it is not known");
	/* The resync that follows reads it, and as long as that fails the pair is not in sync. */
	fin(h, "sync");
	ack(h, 4, 4, 4);
	tick(h, SEC / 10);
	EXPECT(h, "send:RESYNC_BEGIN#5");
	frame(h, WIRE_RESYNC_READY, 5, 2, 0, NULL, 0);
	EXPECT(h, "do:scan/own");
	fin_full(h, "scan", 0, false, 2 * 65536, false);
	EXPECT(h, "do:read/own");
	fin_full(h, "read", -ERR_IO, false, 0, false);
	EXPECT(h, "");
	tick(h, SEC);
	EXPECT(h, "");
	tick(h, SEC);
	EXPECT(h, "do:read/own");
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.link, LINK_RESYNC);
	fin(h, "read");
	EXPECT(h, "send:RESYNC_WRITE#6 send:RESYNC_DONE#7");
	host_free(h);
}

/* ---- write-intent ---- */

static bool intent(struct host *h, uint64_t unit)
{
	return bitmap_test(&repl_volume_state(h->r, 0)->intent, unit);
}

/* One look at what may be cleared, and before it time for nothing to be hot any more. */
static void look(struct host *h)
{
	tick(h, 11 * SEC);
	if (h->cmd_count == 0 && strstr(h->trace, "iclear"))
		fin(h, "iclear");
	forget(h);
}

/* Its regions are found clean by a cycle that began after it did, and its unit is not hot at the second look: without
 * its bit it would land on the disk with nobody knowing, should the host die before it ends. */
Test(repl, a_slow_write_keeps_its_intent_bit)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, UINT64_C(1) << INTENT_SHIFT, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/intent do:a/disk");
	tick(h, 2 * SEC);
	EXPECT(h, "send:FLUSH#4 do:sync/disk");
	fin(h, "sync");
	ack(h, 4, 4, 4);
	cr_assert_not(dirty(h, UINT64_C(1) << INTENT_SHIFT));
	for (int i = 0; i < 3; i++)
		look(h);
	cr_assert(intent(h, 1), "cleared under the write");
	cr_assert_not(intent(h, 0), "the other's bit goes");
	fin(h, "a");
	cr_assert(dirty(h, UINT64_C(1) << INTENT_SHIFT));
	look(h);
	look(h);
	cr_assert(intent(h, 1));
	host_free(h);
}

Test(repl, a_set_and_a_clear_of_a_unit_are_never_both_under_way)
{
	struct host *h = warm_primary(PROTOCOL_F);
	tick(h, 2 * SEC);
	fin(h, "sync");
	ack(h, 4, 4, 4);
	look(h);
	/* A set is under way, of another unit: the look waits for it. */
	guest(h, 'a', REPL_WRITE, UINT64_C(1) << INTENT_SHIFT, 4096);
	EXPECT(h, "do:a/intent");
	tick(h, 11 * SEC);
	EXPECT(h, "");
	fin(h, "a");
	EXPECT(h, "do:a/disk");
	tick(h, 0);
	EXPECT(h, "do:iclear/own do:sync/disk");
	cr_assert_not(intent(h, 0));
	cr_assert(bitmap_test(&repl_volume_state(h->r, 0)->clearing, 0));
	/* The clear is under way: a set of its unit waits, one of another does not. */
	guest(h, 'b', REPL_WRITE, 8192, 4096);
	EXPECT(h, "");
	guest(h, 'c', REPL_WRITE, UINT64_C(2) << INTENT_SHIFT, 4096);
	EXPECT(h, "do:c/intent");
	fin_full(h, "iclear", -ERR_IO, false, 0, false); /* in the file or not: it is set again */
	EXPECT(h, "do:b/intent");
	fin(h, "b");
	EXPECT(h, "do:b/disk");
	host_free(h);
}

Test(repl, a_failed_set_is_not_relied_on)
{
	struct host *h = primary(PROTOCOL_F);
	pass(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin_full(h, "a", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "do:a/intent done:a=ERR_NOSPC"); /* the disk was not touched */
	cr_assert_not(dirty(h, 0));
	guest(h, 'b', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:b/intent");
	fin(h, "b");
	EXPECT(h, "do:b/disk");
	host_free(h);
}

/* The bits of a union are in the map when their write has ended, and not before. */
Test(repl, a_write_beside_the_union_sets_its_own_bit)
{
	for (int failed = 0; failed < 2; failed++) {
		struct host *h = primary(PROTOCOL_F);
		link_down(h);
		guest(h, 'a', REPL_WRITE, 0, 4096);
		saved(h);
		fin(h, "a");
		fin(h, "a");
		tick(h, SEC);
		link_up(h, true);
		join_frame(h, &peer_meta, 0);
		uint8_t range[16] = {0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0}; /* 4 KiB at 2 MiB */
		frame(h, WIRE_DIRTY, 0, 0, 0, range, sizeof(range));
		frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
		forget(h);
		cr_assert(dirty(h, UINT64_C(2) << INTENT_SHIFT));
		guest(h, 'b', REPL_WRITE, UINT64_C(2) << INTENT_SHIFT, 4096);
		EXPECT(h, "do:b/intent");
		fin_full(h, "intents", failed ? -ERR_IO : 0, false, 0, false);
		cr_assert_eq(intent(h, 2), !failed);
		fin(h, "b");
		cr_assert(strstr(h->trace, "do:b/disk"));
		cr_assert(intent(h, 2));
		host_free(h);
	}
}

/* How many intent writes n first writes in clean units cost, 1 ms apart, spread like a hash over `units` units; in *ret
 * how many bits they leave. */
static unsigned marks_of(bool power, unsigned n, uint64_t units, uint64_t apart_ns, uint64_t *ret)
{
	static struct repl_meta m;
	unsigned marks = 0;
	meta_of(&m, ROLE_PRIMARY, STATE_DONE);
	m.alone = true;
	m.volumes[0].size = units << INTENT_SHIFT;
	store_is_power = power;
	struct host *h = host_new(&m);
	for (unsigned i = 0; i < n; i++) {
		uint64_t x = (i + 1) * UINT64_C(0x9E3779B97F4A7C15);
		h->now += apart_ns;
		guest(h, 'a', REPL_WRITE, ((x >> 20) % (units << 8)) << BLOCK_SHIFT, 4096);
		if (strstr(h->trace, "intent")) {
			marks++;
			fin(h, "a");
		}
		fin(h, "a");
		forget(h);
	}
	*ret = repl_volume_state(h->r, 0)->intent.count;
	host_free(h);
	return marks;
}

Test(repl, first_writes_under_pressure_mark_runs)
{
	uint64_t bits;
	/* 4,000 random writes over 4 GiB: far fewer syncs than writes. */
	cr_assert_lt(marks_of(true, 4000, 4096, SEC / 1000, &bits), 4000 / 20);
	cr_assert_eq(bits, 4096);
	/* Light use marks what it touches. */
	cr_assert_eq(marks_of(true, 8, 4096, SEC / 1000, &bits), 8);
	cr_assert_eq(bits, 8);
	cr_assert_eq(marks_of(true, 100, 4096, SEC / 2, &bits), bits);
	cr_assert_leq(bits, 100);
	/* Without a sync to save, always. */
	cr_assert_eq(marks_of(false, 4000, 4096, SEC / 1000, &bits), bits);
	cr_assert_lt(bits, 3000);
	/* Ends that are no multiple of the run. */
	(void)marks_of(true, 500, 100, SEC / 1000, &bits);
	cr_assert_eq(bits, 100);
}

/* A run leaves out what a clear under way may undo. */
Test(repl, a_run_and_a_clear_share_no_unit)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_DONE);
	m.alone = true;
	m.volumes[0].size = UINT64_C(256) << INTENT_SHIFT;
	store_is_power = true;
	struct host *h = host_new(&m);
	for (uint64_t unit = 0; unit < 17; unit++) { /* the last sets a run of two */
		guest(h, 'a', REPL_WRITE, unit * 4 << INTENT_SHIFT, 4096);
		fin(h, "a");
		fin(h, "a");
	}
	cr_assert(intent(h, 64) && intent(h, 65) && !intent(h, 61));
	forget(h);
	for (int i = 0; i < 2; i++)
		tick(h, 11 * SEC);
	EXPECT(h, "do:iclear/own"); /* of the spare one */
	cr_assert(bitmap_test(&repl_volume_state(h->r, 0)->clearing, 65));
	for (uint64_t unit = 20; unit < 50; unit++) { /* pressure again */
		guest(h, 'a', REPL_WRITE, (unit * 4 + 2) << INTENT_SHIFT, 4096);
		fin(h, "a");
		fin(h, "a");
	}
	cr_assert_eq(h->io['a'].owner, 0xdd);
	forget(h);
	guest(h, 'b', REPL_WRITE, UINT64_C(66) << INTENT_SHIFT, 4096); /* its run of four has unit 65 in it */
	EXPECT(h, "do:b/intent");
	cr_assert_eq(h->io['b'].mark_first, 66);
	cr_assert_eq(h->io['b'].mark_units, 1);
	fin(h, "iclear");
	fin(h, "b");
	cr_assert_not(intent(h, 65));
	host_free(h);
}

/* After a clean end the regions that were dirty, else whole units. */
Test(repl, a_fine_map_is_taken_as_it_is)
{
	for (int fine = 0; fine < 2; fine++) {
		static struct repl_meta m;
		meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
		struct host *h = host_new(&m);
		struct bitmap b;
		void *mem = calloc(1, bitmap_bytes(SIZE >> INTENT_SHIFT));
		bitmap_init(&b, SIZE >> INTENT_SHIFT, mem);
		bitmap_set(&b, 1);
		bitmap_set(&b, 3);
		if (fine)
			bitmap_set(&repl_volume_state(h->r, 0)->dirty, 17);
		repl_load_intent(h->r, 0, &b, fine);
		cr_assert_eq(repl_volume_state(h->r, 0)->dirty.count, fine ? 1 : 32);
		cr_assert(intent(h, 1) && intent(h, 3));
		free(mem);
		host_free(h);
	}
}

/* ---- resync ---- */

Test(repl, a_resync_read_and_a_write_exclude_each_other)
{
	struct host *h = primary(PROTOCOL_F);
	write_alone(h, 0);
	connect(h, &peer_meta);
	EXPECT(h, "send:RESYNC_BEGIN#1");
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	EXPECT(h, "do:scan/own");
	fin_full(h, "scan", 0, false, 65536, false);
	EXPECT(h, "do:read/own");
	guest(h, 'b', REPL_WRITE, 4096, 4096);
	EXPECT(h, ""); /* waits for the read */
	fin(h, "read");
	EXPECT(h, "send:RESYNC_WRITE#2 do:b/disk send:RESYNC_DONE#3");
	fin(h, "b");
	EXPECT(h, "send:WRITE#4 done:b"); /* forwarded: its region is done */
	host_free(h);
}

Test(repl, a_write_to_a_region_still_to_be_sent_is_not_forwarded)
{
	struct host *h = primary(PROTOCOL_F);
	write_alone(h, 0);
	connect(h, &peer_meta);
	EXPECT(h, "send:RESYNC_BEGIN#1");
	guest(h, 'b', REPL_WRITE, 4096, 4096);
	fin(h, "b");
	EXPECT(h, "do:b/disk done:b");
	guest(h, 'c', REPL_WRITE, 65536, 4096);
	fin(h, "c");
	EXPECT(h, "do:c/disk send:WRITE#2 done:c");
	host_free(h);
}

/* Found by the simulator: in sync was said with the range unsent, and what the guest wrote there later was unsent too.
 */
Test(repl, a_write_that_fails_behind_the_end_of_a_resync_keeps_it_from_being_in_sync)
{
	struct repl_status s;
	struct host *h = primary(PROTOCOL_F);
	pass(h);
	write_alone(h, 0);
	connect(h, &peer_meta);
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	fin_full(h, "scan", 0, false, 65536, false);
	forget(h);
	fin(h, "read");
	EXPECT(h, "send:RESYNC_WRITE#2 send:RESYNC_DONE#3");
	guest(h, 'b', REPL_WRITE, 0, 4096);
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "do:b/disk send:WRITE_FAILED send:FLUSH#4 do:sync/disk send:BEHIND done:b=ERR_IO");
	frame(h, WIRE_RESYNC_ACK, 3, 0, 0, NULL, 0);
	repl_status(h->r, h->now, &s);
	cr_assert_neq(s.link, LINK_SYNCED, "a range was not sent");
	host_free(h);
}

Test(repl, a_peer_that_never_gets_ready_is_given_up)
{
	struct host *h = primary(PROTOCOL_F);
	write_alone(h, 0);
	connect(h, &peer_meta);
	forget(h);
	ticks(h, 20 * SEC);
	EXPECT(h, "");
	ticks(h, SEC);
	EXPECT(h, "close dial");
	host_free(h);
}

/* ---- behind ---- */

static void pause_now(struct host *h)
{
	command(h, CMD_PAUSE, 0);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert(h->saved.paused);
	saved(h);
}

static enum link_state link_of(struct host *h)
{
	struct repl_status s;
	repl_status(h->r, h->now, &s);
	return s.link;
}

/* From the pause on nothing is forwarded, and nothing completes before a generation is durable [BUMPFIRST]. */
Test(repl, a_pause_is_durable_then_writes_are_alone_and_the_resume_resyncs_them)
{
	struct host *h = warm_primary(PROTOCOL_F);
	pause_now(h);
	EXPECT(h, "send:FLUSH#4 do:sync/disk send:BEHIND cmd"); /* what was sent may still become clean */
	cr_assert_eq(link_of(h), LINK_RESYNC);
	fin(h, "sync");
	ack(h, 4, 4, 4);
	cr_assert_not(dirty(h, 0));
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert(h->saved.alone);
	cr_assert_eq(h->saved.lineage.bitmap, 100);
	saved(h);
	fin(h, "a");
	EXPECT(h, "do:a/disk done:a");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	fin(h, "f");
	EXPECT(h, "do:f/disk done:f");
	tick(h, 2 * SEC);
	EXPECT(h, "");
	cr_assert(dirty(h, 65536));
	repl_check(h->r);

	command(h, CMD_RESUME, 0);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_not(h->saved.paused);
	saved(h);
	EXPECT(h, "cmd save:primary/RUNNING"); /* alone no longer, before anything is told to the peer [BUMPAGAIN] */
	cr_assert_not(h->saved.alone);
	guest(h, 'b', REPL_WRITE, 131072, 4096);
	EXPECT(h, ""); /* waits for the save: what is in the resync and what is forwarded are cut at one point */
	saved(h);
	EXPECT(h, "send:RESYNC_BEGIN#5 do:b/disk");
	cr_assert_eq(link_of(h), LINK_RESYNC);
	fin(h, "b");
	EXPECT(h, "send:WRITE#6 done:b");
	frame(h, WIRE_RESYNC_READY, 5, 4, 0, NULL, 0);
	EXPECT(h, "do:scan/own");
	fin_full(h, "scan", 0, false, 65536, false);
	fin(h, "read");
	EXPECT(h, "do:read/own send:RESYNC_WRITE#7 send:RESYNC_DONE#8");
	cr_assert_eq(link_of(h), LINK_RESYNC);
	frame(h, WIRE_RESYNC_ACK, 8, 0, 0, NULL, 0);
	EXPECT(h, "send:FLUSH#9 do:sync/disk send:CHECKPOINT#10 save:primary/RUNNING");
	cr_assert_eq(link_of(h), LINK_SYNCED);
	cr_assert_eq(h->saved.lineage.bitmap, 0);
	host_free(h);
}

Test(repl, what_waits_for_the_peer_when_it_is_paused_begins_a_generation)
{
	struct host *h = warm_primary(PROTOCOL_C);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	fin(h, "f");
	EXPECT(h, "do:a/disk send:WRITE#4 send:FLUSH#5 do:f/disk");
	pause_now(h);
	EXPECT(h, "do:sync/disk send:BEHIND save:primary/RUNNING cmd");
	cr_assert(h->saved.alone);
	ack(h, 5, 5, 5); /* late, and one save too late to complete them */
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "done:a done:f");
	host_free(h);
}

Test(repl, a_paused_primary_stays_so_over_a_restart_and_a_new_session)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	m.paused = true;
	struct host *h = host_new(&m);
	connect(h, &peer_meta);
	EXPECT(h, "");
	cr_assert_eq(link_of(h), LINK_RESYNC);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	fin(h, "a");
	fin(h, "a");
	EXPECT(h, "do:a/intent do:a/disk done:a");
	command(h, CMD_CHECKPOINT, 0);
	EXPECT(h, "cmd=ERR_STATE");
	command(h, CMD_STOP, 0);
	EXPECT(h, "cmd=ERR_STATE");
	command(h, CMD_RESUME, 0);
	saved(h);
	saved(h);
	EXPECT(h, "save:primary/RUNNING cmd save:primary/RUNNING send:RESYNC_BEGIN#1");
	host_free(h);
}

/* A resync that is paused: what was read for it is not sent, and the next one begins with all that is still dirty. */
Test(repl, a_resync_can_be_paused_and_its_reads_are_not_sent)
{
	struct host *h = primary(PROTOCOL_F);
	write_alone(h, 0);
	connect(h, &peer_meta);
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	fin_full(h, "scan", 0, false, 65536, false);
	EXPECT(h, "send:RESYNC_BEGIN#1 do:scan/own do:read/own");
	pause_now(h);
	EXPECT(h, "send:BEHIND cmd");
	fin(h, "read");
	EXPECT(h, "");
	cr_assert(dirty(h, 0));
	command(h, CMD_RESUME, 0);
	saved(h);
	EXPECT(h, "save:primary/RUNNING cmd send:RESYNC_BEGIN#2"); /* nothing was written alone: nothing to save */
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);		   /* the first one's: late */
	EXPECT(h, "");
	frame(h, WIRE_RESYNC_READY, 2, 2, 0, NULL, 0);
	EXPECT(h, "do:scan/own");
	host_free(h);
}

/* The target adopted, and says so when the source has fallen behind again and begun a generation: that is no sync, but
 * what is dirty counts from the adopted generation, or the next handshake would find it in the past: a full sync. */
Test(repl, an_end_of_a_resync_that_is_heard_too_late_moves_the_bitmap_generation)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	saved(h);
	fin(h, "a");
	fin(h, "a");
	uint64_t told = repl_meta(h->r)->lineage.current;
	forget(h);
	connect(h, &peer_meta);
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	fin_full(h, "scan", 0, true, 65536, false);
	EXPECT(h, "send:RESYNC_BEGIN#1 do:scan/own send:RESYNC_ZERO#2 send:RESYNC_DONE#3");
	pause_now(h);
	guest(h, 'b', REPL_WRITE, 0, 4096);
	EXPECT(h, "send:FLUSH#4 do:sync/disk send:BEHIND cmd save:primary/RUNNING");
	saved(h);
	fin(h, "b");
	EXPECT(h, "do:b/disk done:b");
	frame(h, WIRE_RESYNC_ACK, 3, 0, 0, NULL, 0);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	cr_assert_eq(link_of(h), LINK_RESYNC);
	const struct lineage *l = &repl_meta(h->r)->lineage;
	cr_assert_eq(l->bitmap, told);
	cr_assert_neq(l->current, told);
	cr_assert_eq(l->history[0], 100);
	frame(h, WIRE_RESYNC_ACK, 3, 0, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* Each session that comes to nothing, with a write after it, begins a generation. */
static void sessions_that_come_to_nothing(struct host *h, struct repl_meta *target, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		connect(h, target);
		cr_assert_not(repl_meta(h->r)->split_brain);
		forget(h);
		link_down(h);
		guest(h, 'a', REPL_WRITE, 0, 4096);
		saved(h);
		fin(h, "a");
		EXPECT(h, "save:primary/RUNNING do:a/disk done:a");
	}
}

/* The disks of the target can't be synced, say: neither the mark of its next sync nor the end of one is ever there. */
Test(repl, a_target_that_can_record_nothing_is_no_split_brain)
{
	struct host *h = primary(PROTOCOL_F);
	write_alone(h, 0);
	struct repl_meta target = peer_meta;
	uint64_t first = repl_meta(h->r)->lineage.current;
	target.inconsistent = true;
	target.sync_from = first;
	sessions_that_come_to_nothing(h, &target, GENERATIONS_MAX);
	cr_assert(lineage_has(&repl_meta(h->r)->lineage, first));
	cr_assert_not(dirty(h, 1 << 20), "partial");
	sessions_that_come_to_nothing(h, &target, 2);
	cr_assert_not(lineage_has(&repl_meta(h->r)->lineage, first));
	cr_assert(dirty(h, 1 << 20), "everything");
	host_free(h);

	/* It had adopted what it was sent, which was not heard. */
	h = primary(PROTOCOL_F);
	write_alone(h, 0);
	target = peer_meta;
	lineage_adopt(&target.lineage, &repl_meta(h->r)->lineage);
	link_up(h, true);
	link_down(h);
	sessions_that_come_to_nothing(h, &target, 1);
	sessions_that_come_to_nothing(h, &target, 2 * GENERATIONS_MAX);
	cr_assert_not(dirty(h, 1 << 20), "partial");
	host_free(h);
}

static void set_now(struct host *h, struct settings s)
{
	h->cmd = (struct repl_command){.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = s};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	saved(h);
}

Test(repl, a_full_queue_delays_or_falls_behind_until_it_has_drained)
{
	for (int ahead = 0; ahead < 2; ahead++) {
		struct host *h = primary(PROTOCOL_F);
		warm(h);
		struct settings s = repl_meta(h->r)->settings;
		s.queue_max_bytes = 4 << 20;
		s.on_congestion = ahead ? ON_CONGESTION_AHEAD : ON_CONGESTION_BLOCK;
		set_now(h, s);
		step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 1 << 20});
		forget(h);
		for (int i = 0; i < 4; i++) {
			forget(h);
			guest(h, 'a', REPL_WRITE, 0, 1 << 20);
			fin(h, "a");
		}
		EXPECT(h, ahead ? "do:a/disk send:WRITE#7 done:a send:FLUSH#8 do:sync/disk send:BEHIND"
				: "do:a/disk send:WRITE#7 done:a");
		guest(h, 'b', REPL_WRITE, 65536, 4096);
		if (!ahead) {
			EXPECT(h, "");
			step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 1000});
			EXPECT(h, "do:b/disk");
			host_free(h);
			continue;
		}
		EXPECT(h, "save:primary/RUNNING"); /* the generation; it waits for nothing else */
		cr_assert_eq(link_of(h), LINK_RESYNC);
		saved(h);
		fin(h, "b");
		EXPECT(h, "do:b/disk done:b");
		step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 1000});
		EXPECT(h, ""); /* not drained */
		step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 8 << 20});
		EXPECT(h, ""); /* what of it arrived is not known yet */
		fin(h, "sync");
		ack(h, 8, 8, 8);
		tick(h, SEC - 1);
		EXPECT(h, ""); /* one try a second */
		tick(h, 1);
		step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 1000}); /* a PING */
		EXPECT(h, "save:primary/RUNNING");
		cr_assert(dirty(h, 65536));
		cr_assert_not(dirty(h, 0), "it arrived: only what was not sent is resynced");
		saved(h);
		EXPECT(h, "send:RESYNC_BEGIN#9");
		host_free(h);
	}
}

/* A guest that is faster than the link: each resync fills the queue again. Said once, until it is in sync again. */
Test(repl, a_queue_that_is_full_again_and_again_is_said_once)
{
	struct host *h = warm_primary(PROTOCOL_F);
	struct settings s = repl_meta(h->r)->settings;
	s.queue_max_bytes = 4 << 20;
	s.on_congestion = ON_CONGESTION_AHEAD;
	set_now(h, s);
	uint64_t seq = 3; /* of the last frame of the stream */
	h->warnings = 0;
	for (int round = 0; round < 3; round++) {
		step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 8 << 20});
		for (int i = 0; i < 4; i++) {
			guest(h, 'a', REPL_WRITE, 0, 1 << 20);
			fin(h, "a");
		}
		cr_assert_eq(link_of(h), LINK_RESYNC);
		cr_assert_eq(h->warnings, 1);
		cr_assert(strstr(h->trace, "send:BEHIND"));
		fin(h, "sync");
		forget(h);
		guest(h, 'b', REPL_WRITE, 65536, 4096);
		if (h->saving)
			saved(h);
		fin(h, "b");
		seq += round ? 6 : 5; /* four writes, a FLUSH; a RESYNC_BEGIN */
		ack(h, seq, seq, seq);
		step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 8 << 20});
		forget(h);
		tick(h, SEC);
		step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 1000});
		saved(h);
		cr_assert(strstr(h->trace, "send:RESYNC_BEGIN"), "%s", h->trace);
		forget(h);
	}
	host_free(h);
}

/* ---- hashes ---- */

/* A first sync that compares, at its first data extent: two regions are dirty, the second differs. */
static struct host *hashing(void)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	m.hash_sync = true;
	struct host *h = host_new(&m);
	ticks(h, 6 * SEC);
	link_up(h, true);
	guest(h, 'a', REPL_WRITE, 0, 65536 + 4096);
	saved(h);
	fin(h, "a");
	fin(h, "a");
	join_frame(h, &peer_meta, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	saved(h);
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	forget(h);
	fin_full(h, "scan", 0, false, 131072, false);
	EXPECT(h, "do:rhash/own");
	return h;
}

Test(repl, a_hash_counts_as_sent_and_what_differs_is_read_anew)
{
	struct host *h = hashing();
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	EXPECT(h, ""); /* waits for the hash */
	fin(h, "rhash");
	EXPECT(h, "send:HASH#2 do:b/disk"); /* not the end: the answer is not there */
	fin(h, "b");
	EXPECT(h, "send:WRITE#3 done:b"); /* behind the hash, in order */
	frame(h, WIRE_HASH_ANSWER, 2, 2, 0, NULL, 0);
	EXPECT(h, "do:read/own"); /* the second region alone */
	cr_assert_eq(h->submitted[0]->off, 65536);
	cr_assert_eq(h->submitted[0]->len, 65536);
	guest(h, 'c', REPL_WRITE, 0, 4096);
	fin(h, "c");
	EXPECT(h, "do:c/disk send:WRITE#4 done:c");
	fin(h, "read");
	EXPECT(h, "send:RESYNC_WRITE#5 send:RESYNC_DONE#6");
	cr_assert(repl_meta(h->r)->hash_sync);
	frame(h, WIRE_RESYNC_ACK, 6, 0, 0, NULL, 0);
	cr_assert_not(h->saved.hash_sync, "in sync once: from now on dirty regions travel as they are");
	host_free(h);
}

/* No answer comes to what was not sent: the range is hashed anew when the disk can be read. */
Test(repl, a_hash_that_cannot_be_made_holds_the_resync_up_no_longer_than_its_disk)
{
	struct host *h = hashing();
	fin_full(h, "rhash", -ERR_IO, false, 0, false);
	EXPECT(h, "");
	ticks(h, 3 * SEC);
	EXPECT(h, "do:rhash/own");
	fin(h, "rhash");
	EXPECT(h, "send:HASH#2");
	frame(h, WIRE_HASH_ANSWER, 2, 0, 0, NULL, 0);
	EXPECT(h, "send:RESYNC_DONE#3");
	host_free(h);
}

Test(repl, equal_hashes_send_nothing)
{
	struct host *h = hashing();
	fin(h, "rhash");
	frame(h, WIRE_HASH_ANSWER, 2, 0, 0, NULL, 0);
	EXPECT(h, "send:HASH#2 send:RESYNC_DONE#3");
	frame(h, WIRE_HASH_ANSWER, 2, 0, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

Test(repl, answers_about_more_than_was_hashed_are_refused)
{
	struct host *h = hashing();
	fin(h, "rhash");
	forget(h);
	frame(h, WIRE_HASH_ANSWER, 2, 4, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* Paused while an answer is on its way: the clear cycle must not take a region for clean that the answer says differs.
 */
Test(repl, an_answer_that_comes_while_behind_keeps_its_regions_dirty)
{
	struct host *h = hashing();
	fin(h, "rhash");
	EXPECT(h, "send:HASH#2");
	pause_now(h);
	EXPECT(h, "send:FLUSH#3 do:sync/disk send:BEHIND cmd");
	fin(h, "sync");
	frame(h, WIRE_HASH_ANSWER, 2, 2, 0, NULL, 0);
	ack(h, 3, 3, 3);
	EXPECT(h, "");
	cr_assert_not(dirty(h, 0));
	cr_assert(dirty(h, 65536));
	command(h, CMD_RESUME, 0);
	saved(h);
	forget(h);
	frame(h, WIRE_RESYNC_READY, 4, 2, 0, NULL, 0);
	EXPECT(h, "do:scan/own");
	fin_full(h, "scan", 0, false, 65536, false);
	EXPECT(h, "do:rhash/own"); /* it still compares */
	host_free(h);
}

Test(repl, a_target_answers_a_hash_before_it_acknowledges_it)
{
	struct host *h = secondary();
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 2, 100, 0);
	fin(h, "r");
	saved(h);
	forget(h);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 3, 0, 4096);
	stream(h, 'h', WIRE_HASH, REPL_HASH, 4, 0, 65536);
	stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 5, 0, 0);
	EXPECT(h, "do:w/disk"); /* at its place in the order */
	fin(h, "w");
	EXPECT(h, "do:h/disk done:w");
	fin_full(h, "h", 0, false, 1, false);
	EXPECT(h, "send:HASH_ANSWER#4 done:h do:f/disk");
	fin(h, "f");
	EXPECT(h, "send:ACK done:f");
	host_free(h);
}

/* ---- rate ---- */

/* Steps that start in the `ms` to come, each done at once. */
static uint64_t steps(struct host *h, unsigned ms)
{
	uint64_t bytes = 0;
	for (unsigned t = 0; t < ms; t += 50) {
		tick(h, SEC / 20);
		while (h->n_submitted) {
			struct repl_io *io = h->submitted[0];
			const char *name = name_of(io);
			if (strcmp(name, "read") == 0)
				bytes += io->len;
			fin_full(h, name, 0, false, SIZE, false);
		}
		forget(h);
	}
	return bytes;
}

Test(repl, a_resync_keeps_to_its_rate_and_follows_a_change_at_once)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	for (unsigned i = 0; i < 8; i++) {
		guest(h, 'a', REPL_WRITE, (uint64_t)i << 20, 1 << 20);
		if (h->saving)
			saved(h);
		fin(h, "a");
		fin(h, "a");
	}
	struct settings s = repl_meta(h->r)->settings;
	s.resync_rate = 1 << 20;
	set_now(h, s);
	connect(h, &peer_meta);
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	(void)steps(h, 500);
	uint64_t got = steps(h, 2000);
	cr_assert(got >= 1800 << 10 && got <= 2400 << 10, "%lu bytes in 2 s at 1 MiB/s", (unsigned long)got);
	struct repl_status st;
	repl_status(h->r, h->now, &st);
	cr_assert_eq(st.resync_total, SIZE);
	cr_assert(st.resync_rate >= 800 << 10 && st.resync_rate <= 1300 << 10, "%lu", (unsigned long)st.resync_rate);
	s.resync_rate = 1024; /* a step of 64 KiB takes a minute */
	set_now(h, s);
	frame(h, WIRE_SETTINGS_ACK, 1, 0, 0, NULL, 0);
	(void)steps(h, 100);
	cr_assert_eq(steps(h, 2000), 0);
	s.resync_rate = 0;
	set_now(h, s);
	cr_assert_gt(steps(h, 50), 2 << 20);
	host_free(h);
}

/* ---- the known suspects of completion ---- */

Test(repl, a_flush_begun_in_a_resync_waits_if_it_ends_in_sync)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	connect(h, &peer_meta);
	EXPECT(h, "send:RESYNC_DONE#1");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "send:FLUSH#2 do:f/disk");
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	forget(h);
	fin(h, "f");
	EXPECT(h, "");
	ack(h, 2, 2, 1);
	EXPECT(h, "");
	ack(h, 2, 2, 2);
	EXPECT(h, "done:f");
	host_free(h);
}

Test(repl, a_flush_begun_in_a_resync_that_ends_in_it_is_a_barrier_and_does_not_wait)
{
	struct host *h = primary(PROTOCOL_C);
	link_down(h);
	connect(h, &peer_meta);
	forget(h);
	guest(h, 'f', REPL_FLUSH, 0, 0);
	fin(h, "f");
	EXPECT(h, "send:FLUSH#2 do:f/disk done:f");
	cr_assert_not(repl_meta(h->r)->alone);
	host_free(h);
}

Test(repl, requests_that_wait_follow_a_change_of_the_protocol)
{
	struct host *h = warm_primary(PROTOCOL_C);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	fin(h, "f");
	forget(h);
	struct settings s = repl_meta(h->r)->settings;
	s.protocol = PROTOCOL_F; /* its writes wait for nobody, its flushes do */
	set_now(h, s);
	EXPECT(h, "save:primary/RUNNING send:SETTINGS#1 done:a");
	frame(h, WIRE_SETTINGS_ACK, 1, 0, 0, NULL, 0);
	s.protocol = PROTOCOL_B;
	set_now(h, s);
	forget(h);
	ack(h, 5, 3, 1);
	EXPECT(h, "done:f");
	frame(h, WIRE_SETTINGS_ACK, 2, 0, 0, NULL, 0);
	guest(h, 'b', REPL_WRITE, 0, 4096);
	fin(h, "b");
	s.protocol = PROTOCOL_C; /* a stronger one: what waits waits for more */
	set_now(h, s);
	forget(h);
	ack(h, 6, 5, 1);
	EXPECT(h, "");
	ack(h, 6, 6, 1);
	EXPECT(h, "done:b");
	host_free(h);
}

/* From the moment on which the session is being closed nothing is known of the peer. */
Test(repl, a_session_that_is_being_closed_freezes_and_is_not_in_sync)
{
	struct host *h = warm_primary(PROTOCOL_F);
	struct settings s = repl_meta(h->r)->settings;
	s.on_disconnect = ON_DISCONNECT_FREEZE;
	set_now(h, s);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	forget(h);
	frame(h, WIRE_GOODBYE, 0, 0, 0, NULL, 0);
	EXPECT(h, "close");
	cr_assert_eq(link_of(h), LINK_DOWN);
	fin(h, "a");
	guest(h, 'b', REPL_WRITE, 4096, 4096);
	EXPECT(h, "");
	link_down(h);
	EXPECT(h, "cmd");
	s.on_disconnect = ON_DISCONNECT_CONTINUE;
	set_now(h, s);
	EXPECT(h, "save:primary/RUNNING cmd save:primary/RUNNING"); /* the setting; the generation */
	tick(h, 1);
	saved(h);
	forget(h);
	fin(h, "b");
	EXPECT(h, "done:b");
	host_free(h);
}

Test(repl, a_peer_that_is_silent_is_not_in_sync)
{
	struct host *h = primary(PROTOCOL_F);
	cr_assert_eq(link_of(h), LINK_SYNCED);
	h->now += 5 * SEC + 1; /* no tick has seen it yet */
	cr_assert_eq(link_of(h), LINK_DOWN);
	host_free(h);
}

Test(repl, a_host_that_was_held_up_does_not_take_its_peer_for_silent)
{
	for (int outstanding = 0; outstanding < 2; outstanding++) {
		struct host *h = primary(PROTOCOL_F);
		if (outstanding) { /* sent, and no ACK of it */
			guest(h, 'a', REPL_WRITE, 0, 4096);
			fin(h, "a");
			fin(h, "a");
		}
		ticks(h, SEC);
		forget(h);
		uint64_t heard = h->now;
		h->now += 300 * SEC; /* suspended */
		ticks_hearing(h, 1, heard);
		EXPECT(h, "");
		cr_assert_eq(link_of(h), LINK_DOWN, "nothing has been heard since");
		ticks_hearing(h, UINT64_C(4700000000), heard); /* and TICK_MAX_NS of the pause */
		EXPECT(h, "");
		ticks_hearing(h, UINT64_C(200000000), heard);
		EXPECT(h, "close");
		host_free(h);
	}
}

Test(repl, no_progress_is_not_that_of_a_host_that_was_held_up)
{
	struct host *h = primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	fin(h, "a");
	ticks(h, 10 * SEC);
	forget(h);
	tick(h, 300 * SEC);
	ticks(h, 9 * SEC);
	cr_assert(!strstr(h->trace, "close"));
	forget(h);
	ticks(h, SEC);
	EXPECT(h, "close dial");
	host_free(h);
}

/* ---- handshake ---- */

Test(repl, a_peers_dirty_set_may_come_while_a_generation_is_being_saved)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	tick(h, 0);
	link_up(h, true);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "dial send:JOIN save:primary/RUNNING");
	join_frame(h, &peer_meta, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "do:a/intent do:intents/own");
	fin(h, "intents");
	EXPECT(h, "save:primary/RUNNING");
	host_free(h);
}

Test(repl, a_restarted_primary_holds_until_the_handshake_or_peer_timeout)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	tick(h, 300 * SEC); /* held up on its start: the peer has had no time to answer */
	EXPECT(h, "dial");
	dial_fails(h, h->dial);
	EXPECT(h, "");
	ticks(h, UINT64_C(4700000000));
	EXPECT(h, "dial");
	ticks(h, UINT64_C(200000000));
	EXPECT(h, "save:primary/RUNNING"); /* alone from here on */
	saved(h);
	EXPECT(h, "do:a/intent");
	host_free(h);
}

Test(repl, dials_again_at_once_and_backs_off_to_two_seconds)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	const uint64_t tick_ns = SEC / 10;
	tick(h, 0);
	EXPECT(h, "dial");
	for (int i = 0; i < 20; i++) {
		uint64_t waited = 0;
		forget(h);
		dial_fails(h, h->dial);
		while (strstr(h->trace, "dial") == NULL && waited < 3 * SEC) {
			waited += tick_ns;
			tick(h, tick_ns);
			if (h->saving)
				saved(h);
		}
		cr_assert_leq(waited, 2 * SEC, "dial %d", i);
		cr_assert(i < 7 || waited >= SEC - tick_ns, "dial %d after %llu ns", i, (unsigned long long)waited);
	}
	host_free(h);
}

Test(repl, a_primary_whose_peer_failed_over_steps_down_unless_it_wrote_meanwhile)
{
	for (int wrote = 0; wrote < 2; wrote++) {
		struct host *h = primary(PROTOCOL_F);
		static struct repl_meta survivor;
		meta_of(&survivor, ROLE_STANDALONE, STATE_DONE);
		survivor.lineage = (struct lineage){.current = 200, .bitmap = 100};
		survivor.alone = true;
		link_down(h);
		tick(h, 0);
		link_up(h, true);
		EXPECT(h, "dial send:JOIN");
		if (wrote)
			guest(h, 'a', REPL_WRITE, 0, 4096);
		join_frame(h, &survivor, 0);
		if (wrote) {
			EXPECT(h, "save:primary/RUNNING"); /* the generation */
			saved(h);
			EXPECT(h, "do:a/intent close");
			cr_assert_eq(repl_meta(h->r)->role, ROLE_PRIMARY);
		} else {
			EXPECT(h, "save:secondary/NONE");
			guest(h, 'a', REPL_WRITE, 0, 4096); /* while it steps down */
			saved(h);
			EXPECT(h, "close done:a=ERR_IO");
			cr_assert_not(repl_meta(h->r)->alone);
		}
		host_free(h);
	}
}

Test(repl, a_stop_while_a_dial_is_under_way_stays_stopped)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	tick(h, 0);
	EXPECT(h, "dial");
	command(h, CMD_STOP, 0);
	EXPECT(h, "save:primary/DONE");
	saved(h);
	EXPECT(h, "cmd");
	link_up(h, true);
	EXPECT(h, "close");
	host_free(h);
}

Test(repl, a_stop_whose_answer_was_lost_is_completed)
{
	static struct repl_meta m;
	struct host *h = primary(PROTOCOL_F);
	command(h, CMD_STOP, 0);
	EXPECT(h, "send:CHECKPOINT#3");
	link_down(h);
	EXPECT(h, "cmd=ERR_PEER");
	tick(h, 0);
	link_up(h, true);
	meta_of(&m, ROLE_SECONDARY, STATE_DONE);
	join_frame(h, &m, 0);
	EXPECT(h, "dial send:JOIN save:primary/DONE");
	saved(h);
	EXPECT(h, "send:GOODBYE close");
	host_free(h);
	h = host_new(&m);
	link_up(h, false);
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN");
	link_down(h);
	link_up(h, false);
	peer_meta.state = STATE_DONE;
	join_frame(h, &peer_meta, WIRE_JOIN_START);
	EXPECT(h, "save:secondary/NONE");
	saved(h);
	EXPECT(h, "send:JOIN send:DIRTY_END");
	host_free(h);
}

Test(repl, a_lost_stop_is_completed_where_its_number_was_lost_too)
{
	static struct repl_meta m, stopped;
	/* Its power went before the number of the stop's checkpoint was in the record. The secondary dials. */
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	m.peer[0] = 0;
	meta_of(&stopped, ROLE_SECONDARY, STATE_DONE);
	stopped.ckpt_max = stopped.last_stream = 2;
	struct host *h = host_new(&m);
	link_up(h, false);
	join_frame(h, &stopped, 0);
	EXPECT(h, "save:primary/DONE");
	cr_assert_eq(h->saved.last_stream, 2);
	cr_assert_eq(h->saved.ckpt_max, 2);
	saved(h);
	EXPECT(h, "send:GOODBYE close");
	host_free(h);
}

Test(repl, a_start_into_a_split_brain_says_so_though_the_peer_hangs_up_first)
{
	static struct repl_meta m, wrote;
	meta_of(&m, ROLE_PRIMARY, STATE_DONE);
	struct host *h = host_new(&m);
	command(h, CMD_START, 0);
	link_up(h, true);
	meta_of(&wrote, ROLE_SECONDARY, STATE_DONE);
	wrote.lineage = (struct lineage){.current = 200, .bitmap = 100};
	wrote.alone = true;
	join_frame(h, &wrote, 0);
	EXPECT(h, "dial send:JOIN save:primary/DONE");
	link_down(h);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "cmd=ERR_SPLIT");
	host_free(h);
}

Test(repl, a_target_made_for_a_sync_that_never_began_gets_everything)
{
	static struct wire_join p, t;
	int source = -1;
	p.role = ROLE_PRIMARY;
	p.state = STATE_RUNNING;
	p.lineage.current = 100;
	t.role = ROLE_SECONDARY;
	t.flags = WIRE_JOIN_FRESH | WIRE_JOIN_INCONSISTENT;
	cr_assert_eq(lineage_decide(&p, &t, &source), LINEAGE_FULL);
	cr_assert_eq(source, 0);
	t.lineage.current = 100; /* unfinished from elsewhere: dirty bits are not enough */
	t.sync_from = 300;
	t.flags = WIRE_JOIN_INCONSISTENT;
	cr_assert_eq(lineage_decide(&t, &p, &source), LINEAGE_FULL);
	cr_assert_eq(source, 1);
}

/* ---- roles and lineage ---- */

/* A halted pair: this host a primary that dials, or the survivor that listens; both wrote alone since 100. */
static struct host *halted(bool dialer)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_STANDALONE, STATE_DONE);
	m.lineage = (struct lineage){.current = 200, .bitmap = 100};
	peer_meta.lineage = (struct lineage){.current = 300, .bitmap = 100};
	if (!dialer) {
		struct repl_meta other = m;
		m = peer_meta;
		peer_meta = other;
		m.last_stream = 0;
		m.failover_generation = 300;
	}
	m.alone = peer_meta.alone = m.split_brain = true;
	m.diverged_ns = 7 * SEC;
	return host_new(&m);
}

/* The peer's volume is smaller in its JOIN, and it grows to this host's size before it goes on: what it says then is in
 * that. */
Test(lineage_core, a_peer_that_grows_in_the_handshake_tells_of_all_of_it)
{
	struct host *h = halted(true);
	peer_meta.volumes[0].size = SIZE - 65536;
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	EXPECT(h, "dial send:JOIN send:DIRTY_END");
	dirty_frame(h, SIZE - 131072, 131072);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "close");
	cr_assert(bitmap_test(&repl_volume_state(h->r, 0)->theirs, (SIZE >> REGION_SHIFT) - 1));
	link_down(h);
	link_up(h, true);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	forget(h);
	dirty_frame(h, SIZE - 65536, 131072);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* Else `resolve --discard peer` on the primary would be "so it is already". */
Test(lineage_core, a_resolve_while_the_split_brain_is_being_recorded_is_refused)
{
	struct host *h = halted(true);
	static struct repl_meta m;
	m = *repl_meta(h->r);
	host_free(h);
	m.split_brain = false;
	h = host_new(&m);
	tick(h, 0);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "save:primary/RUNNING");
	command(h, CMD_RESOLVE, DISCARD_PEER);
	EXPECT(h, "cmd=ERR_BUSY");
	saved(h);
	cr_assert(repl_meta(h->r)->split_brain);
	forget(h);
	command(h, CMD_RESOLVE, DISCARD_PEER);
	cr_assert_null(strstr(h->trace, "cmd"), "%s", h->trace);
	host_free(h);
}

Test(lineage_core, a_halted_pair_goes_on_telling_each_other)
{
	struct host *h = halted(true);
	struct repl_diverged d;
	tick(h, 0);
	EXPECT(h, "dial");
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	join_frame(h, &peer_meta, 0); /* it was killed before it recorded it: the flag of one is enough */
	EXPECT(h, "send:DIRTY_END");
	repl_diverged(h->r, &d);
	cr_assert_not(d.peer_known);
	cr_assert_eq(d.since_ns, 7 * SEC);
	dirty_frame(h, 65536, 4096);
	frame(h, WIRE_DIRTY_END, 0, 9 * SEC, 0, NULL, 0);
	EXPECT(h, "close");
	repl_diverged(h->r, &d);
	cr_assert(d.peer_known);
	cr_assert_eq(d.peer_since_ns, 9 * SEC);
	cr_assert(bitmap_test(&repl_volume_state(h->r, 0)->theirs, 1));
	cr_assert_not(dirty(h, 65536), "the peer's part is not this host's");
	link_down(h);
	tick(h, SEC);
	EXPECT(h, "");
	tick(h, SEC);
	EXPECT(h, "dial");
	dial_fails(h, h->dial);
	repl_diverged(h->r, &d);
	cr_assert(d.peer_known, "what it told stays");
	guest(h, 'a', REPL_WRITE, 0, 4096); /* and it goes on serving */
	EXPECT(h, "do:a/intent");
	host_free(h);
}

Test(lineage_core, a_split_brain_is_saved_before_it_is_told)
{
	static struct repl_meta m;
	struct host *h = halted(true);
	m = *repl_meta(h->r);
	host_free(h);
	m.split_brain = false;
	peer_meta.split_brain = true;
	h = host_new(&m);
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	EXPECT(h, "dial send:JOIN save:primary/RUNNING");
	cr_assert(h->saved.split_brain);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "send:DIRTY_END close");
	host_free(h);
}

/* The pair was stopped and both wrote. One of the two was killed before it recorded that it is a split brain: whichever
 * it is, what it says of a stop is of no account any more. */
Test(lineage_core, a_stopped_pair_of_which_one_is_halted_is_halted_on_both)
{
	static struct repl_meta m;
	for (unsigned mine = 0; mine < 2; mine++) {
		for (unsigned state = 0; state < 2; state++) {
			meta_of(&m, ROLE_SECONDARY, STATE_DONE);
			meta_of(&peer_meta, ROLE_PRIMARY, state ? STATE_RUNNING : STATE_DONE);
			m.lineage = (struct lineage){.current = 200, .bitmap = 100};
			peer_meta.lineage = (struct lineage){.current = 300, .bitmap = 100};
			m.alone = peer_meta.alone = true;
			m.split_brain = mine;
			struct host *h = host_new(&m);
			link_up(h, false);
			join_frame(h, &peer_meta, mine ? 0 : WIRE_JOIN_SPLIT);
			if (!mine) {
				EXPECT(h, "send:JOIN save:secondary/DONE");
				cr_assert(h->saved.split_brain);
				saved(h);
				EXPECT(h, "send:DIRTY_END");
			} else {
				EXPECT(h, "send:JOIN send:DIRTY_END");
			}
			frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
			EXPECT(h, "close");
			host_free(h);
			/* And on the primary, which dials. */
			peer_meta.split_brain = !mine;
			h = host_new(&peer_meta);
			tick(h, 0);
			forget(h);
			link_up(h, true);
			if (repl_meta(h->r)->state == STATE_DONE && mine) { /* it has nothing to say before `start` */
				EXPECT(h, "close");
				host_free(h);
				continue;
			}
			EXPECT(h, "send:JOIN");
			join_frame(h, &m, mine ? WIRE_JOIN_SPLIT : 0);
			if (mine) {
				EXPECT(h, "save:primary/RUNNING");
				cr_assert(h->saved.split_brain);
				saved(h);
			}
			EXPECT(h, "send:DIRTY_END");
			host_free(h);
		}
	}
}

/* Given after this host's JOIN had gone out, it had no say: the peer's, which discards this copy, is carried out. */
Test(lineage_core, a_resolve_that_came_too_late_is_told_so)
{
	struct host *h = halted(true);
	tick(h, 3 * SEC);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	command(h, CMD_RESOLVE, DISCARD_PEER);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT | WIRE_JOIN_DISCARD_YOURS);
	EXPECT(h, "send:DIRTY_END");
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 300, 0);
	fin(h, "r");
	saved(h);
	EXPECT(h, "do:r/ckpt save:secondary/NONE +2 cmd=ERR_STATE send:RESYNC_READY#1 done:r");
	cr_assert(strstr(h->cmd.err.text, "the opposite"), "%s", h->cmd.err.text);
	host_free(h);
}

Test(lineage_core, the_loser_yields_keeps_and_follows)
{
	struct host *h = halted(true);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/intent do:a/disk");
	command(h, CMD_RESOLVE, DISCARD_LOCAL);
	tick(h, 0);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	guest(h, 'b', REPL_WRITE, 0, 4096);
	EXPECT(h, ""); /* a is under way, b is not let in */
	fin(h, "a");
	EXPECT(h, "done:a send:DIRTY send:DIRTY_END");
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 300, 0);
	EXPECT(h, "do:r/ckpt");
	fin(h, "r");
	EXPECT(h, "save:secondary/NONE +2");
	cr_assert(h->saved.inconsistent && !h->saved.split_brain && h->saved.own_dirty);
	cr_assert_eq(h->saved.sync_from, 300);
	cr_assert_eq(h->saved.kept, 2);
	cr_assert_eq(h->saved.last_stream, 0, "no default target [LASTLIN]");
	cr_assert(h->saved.ckpts[0].flags & CKPT_PINNED);
	cr_assert_str_eq(h->saved.peer, "peer:1", "it goes on dialling");
	cr_assert_eq(h->cmd_count, 0);
	saved(h);
	EXPECT(h, "cmd send:RESYNC_READY#1 done:r done:b=ERR_IO");
	cr_assert_eq(h->cmd.result, 2);
	/* cut: it dials as a secondary, and needs no new decision [SYNCFROM] */
	link_down(h);
	tick(h, 3 * SEC);
	EXPECT(h, "dial");
	link_up(h, true);
	peer_meta.role = ROLE_PRIMARY;
	peer_meta.state = STATE_RUNNING;
	peer_meta.lineage = (struct lineage){.current = 400, .bitmap = 100, .history = {300}};
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN send:DIRTY send:DIRTY_END");
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	EXPECT(h, "cmd=ERR_STATE");
	cr_assert(strstr(h->cmd.err.text, "checkpoint 2"), "%s", h->cmd.err.text);
	host_free(h);
}

Test(lineage_core, a_resolve_that_is_cut_before_the_mark_changes_nothing)
{
	for (int when = 0; when < 3; when++) {
		struct host *h = halted(true);
		command(h, CMD_RESOLVE, DISCARD_LOCAL);
		tick(h, 0);
		link_up(h, true);
		join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
		EXPECT(h, "dial send:JOIN send:DIRTY_END");
		stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 300, 0);
		EXPECT(h, "do:r/ckpt");
		guest(h, 'a', REPL_WRITE, 0, 4096);
		if (when > 0) {
			fin(h, "r");
			EXPECT(h, "save:secondary/NONE +2");
		}
		forget(h);
		link_down(h);
		if (when == 0) {
			EXPECT(h, "do:a/intent");
			fin(h, "r");
			EXPECT(h, "done:r=ERR_CANCELED");
			cr_assert_eq(repl_meta(h->r)->role, ROLE_PRIMARY);
			cr_assert(repl_meta(h->r)->split_brain);
		} else if (when == 1) { /* the save that was under way decides */
			EXPECT(h, "");
			saved(h);
			EXPECT(h, "cmd done:r done:a=ERR_IO");
			cr_assert_eq(repl_meta(h->r)->role, ROLE_SECONDARY);
		} else { /* it fails: the record as it was is saved again, and the guest goes on */
			h->saving = false;
			step(h, (struct repl_event){.type = EV_META_SAVED, .error = -ERR_IO});
			saved(h);
			cr_assert(repl_meta(h->r)->split_brain);
			cr_assert(strstr(h->trace, "do:a/intent"), "%s", h->trace);
		}
		host_free(h);
	}
}

/* The winner is activated, the loser dies before its mark: halted again, and a resolve the other way is still free. */
Test(lineage_core, the_winner_answers_when_the_loser_has_it_durably)
{
	struct host *h = halted(false);
	command(h, CMD_RESOLVE, DISCARD_PEER);
	EXPECT(h, ""); /* the peer dials */
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	EXPECT(h, "send:JOIN");
	dirty_frame(h, 131072, 4096);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "do:intents/own");
	cr_assert(dirty(h, 131072), "the union");
	fin(h, "intents");
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_not(h->saved.split_brain);
	cr_assert_eq(h->saved.failover_generation, 0);
	saved(h);
	EXPECT(h, "send:RESYNC_BEGIN#1");
	cr_assert_eq(h->cmd_count, 0);
	link_down(h);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	EXPECT(h, "send:JOIN"); /* the command still stands: again */
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	saved(h);
	forget(h);
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	cr_assert(strncmp(h->trace, "cmd do:scan", 11) == 0, "%s", h->trace);
	host_free(h);
}

/* Unprotected, it finds that its former secondary has written too: what that says of a `resolve` it can do. */
Test(lineage_core, a_split_brain_that_a_protect_finds_can_be_resolved)
{
	for (int dials = 0; dials < 2; dials++) { /* the peer, too */
		static struct repl_meta m;
		meta_of(&m, ROLE_STANDALONE, STATE_DONE);
		m.has_peer = false;
		m.alone = true;
		m.lineage = (struct lineage){.current = 300, .history = {100}};
		m.last_stream = 0;
		struct host *h = host_new(&m);
		h->cmd = (struct repl_command){.cmd = CMD_PROTECT, .text = "old:1"};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
		link_up(h, true);
		meta_of(&peer_meta, ROLE_SECONDARY, STATE_DONE);
		peer_meta.lineage = (struct lineage){.current = 200, .bitmap = 100};
		join_frame(h, &peer_meta, 0);
		EXPECT(h, "dial send:JOIN save:standalone/DONE");
		cr_assert(h->saved.split_brain);
		cr_assert_str_eq(h->saved.peer, "old:1"); /* who was given an address dials */
		saved(h);
		EXPECT(h, "cmd=ERR_SPLIT send:DIRTY_END");
		frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
		EXPECT(h, "close");
		link_down(h);
		tick(h, 2 * SEC);
		EXPECT(h, "dial");
		command(h, CMD_RESOLVE, DISCARD_PEER);
		link_up(h, !dials);
		join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
		EXPECT(h, "send:JOIN");
		frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
		fin(h, "intents");
		EXPECT(h, "do:intents/own save:primary/RUNNING");
		cr_assert(dirty(h, 0) && dirty(h, SIZE - 1), "nothing was tracked");
		cr_assert(h->saved.has_peer && !h->saved.split_brain);
		saved(h);
		EXPECT(h, "send:RESYNC_BEGIN#1");
		frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
		cr_assert(strncmp(h->trace, "cmd do:scan", 11) == 0, "%s", h->trace);
		host_free(h);
	}
}

Test(lineage_core, a_resolve_gives_up_when_the_peer_does_not_come)
{
	struct host *h = halted(false);
	command(h, CMD_RESOLVE, DISCARD_PEER);
	tick(h, 9 * SEC);
	EXPECT(h, "");
	tick(h, SEC);
	EXPECT(h, "cmd=ERR_PEER");
	command(h, CMD_RESOLVE, DISCARD_LOCAL);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT | WIRE_JOIN_DISCARD_MINE); /* the other way round over there */
	EXPECT(h, "send:JOIN cmd=ERR_STATE send:DIRTY_END");
	host_free(h);
}

Test(lineage_core, a_write_alone_after_the_join_ends_what_was_decided)
{
	static struct repl_meta m;
	struct host *h = halted(true);
	m = *repl_meta(h->r);
	host_free(h);
	m.alone = false; /* its next write alone begins a generation */
	h = host_new(&m);
	command(h, CMD_RESOLVE, DISCARD_LOCAL);
	tick(h, 0);
	link_up(h, true);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "dial send:JOIN save:primary/RUNNING");
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "do:a/intent");
	fin(h, "a");
	fin(h, "a");
	EXPECT(h, "do:a/disk done:a close");
	link_down(h);
	tick(h, 0);
	EXPECT(h, "dial"); /* at once: the command still stands */
	host_free(h);
}

Test(lineage_core, a_failback_finds_a_primary_that_has_not_heard)
{
	static struct repl_meta survivor;
	struct host *h = primary(PROTOCOL_F);
	meta_of(&survivor, ROLE_PRIMARY, STATE_DONE);
	survivor.lineage = (struct lineage){.current = 200, .bitmap = 100};
	link_down(h);
	tick(h, 0);
	EXPECT(h, "dial"); /* crosses */
	cr_assert(repl_takes_link(h->r, &(struct wire_join){0}, 0));
	link_up(h, false);
	cr_assert_not(repl_takes_link(h->r, NULL, h->dial), "its own dial is not worth the survivor's command");
	join_frame(h, &survivor, WIRE_JOIN_FAILBACK);
	EXPECT(h, "save:secondary/NONE");
	cr_assert(h->saved.shut_out);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	saved(h);
	EXPECT(h, "send:JOIN done:a=ERR_IO send:DIRTY_END"); /* nothing is received before that */
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 200, 0);
	fin(h, "r");
	EXPECT(h, "do:r/ckpt save:secondary/NONE +3");
	cr_assert_str_eq(h->saved.peer, "", "the survivor dials from now on");
	cr_assert_not(h->saved.own_dirty);
	host_free(h);
}

/* A clear cycle found its region clean under it, or its bits are not set yet: what it leaves on the disk would be in no
 * dirty set, the sync would end without it, and the two copies differ for good. */
Test(lineage_core, a_target_says_what_is_dirty_when_its_last_write_has_ended)
{
	for (int early = 0; early < 2; early++) {
		static struct repl_meta survivor;
		struct host *h = primary(PROTOCOL_F);
		meta_of(&survivor, ROLE_PRIMARY, STATE_DONE);
		survivor.lineage = (struct lineage){.current = 200, .bitmap = 100};
		warm(h);
		uint64_t off = early ? UINT64_C(4) << 20 : 65536; /* another unit: its bit is to be set */
		guest(h, 'a', REPL_WRITE, off, 4096);
		EXPECT(h, early ? "do:a/intent" : "do:a/disk");
		tick(h, 2 * SEC);
		EXPECT(h, "send:FLUSH#4 do:sync/disk");
		fin(h, "sync");
		ack(h, 4, 4, 4);
		cr_assert_not(dirty(h, off));
		link_down(h);
		link_up(h, false);
		join_frame(h, &survivor, WIRE_JOIN_FAILBACK);
		EXPECT(h, "save:secondary/NONE");
		saved(h);
		EXPECT(h, "send:JOIN");
		fin(h, "a");
		if (early) {
			EXPECT(h, "do:a/disk");
			fin(h, "a");
		}
		cr_assert(dirty(h, off));
		EXPECT(h, "done:a=ERR_IO send:DIRTY send:DIRTY_END");
		host_free(h);
	}
}

Test(lineage_core, while_a_command_dials_nothing_else_is_taken)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.lineage = (struct lineage){.current = 200, .bitmap = 100};
	m.failover_generation = 200;
	struct host *h = host_new(&m);
	link_up(h, false); /* the old primary, about to say its JOIN */
	h->cmd = (struct repl_command){.cmd = CMD_FAILBACK, .text = "old:1"};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	EXPECT(h, "close dial");
	cr_assert_not(repl_takes_link(h->r, &(struct wire_join){0}, 0));
	cr_assert(repl_takes_link(h->r, NULL, h->dial));
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_NONE);
	join_frame(h, &peer_meta, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	EXPECT(h, "do:intents/own save:primary/RUNNING");
	cr_assert_str_eq(h->saved.peer, "old:1");
	cr_assert_eq(h->saved.failover_generation, 0);
	cr_assert_eq(h->saved.last_stream, 0);
	saved(h);
	EXPECT(h, "send:RESYNC_BEGIN#1 cmd");
	host_free(h);
}

/* What a JOIN said before the record was saved is not what is here after it. */
Test(lineage_core, while_a_change_of_role_is_saved_no_other_is_begun)
{
	static struct repl_meta m;
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	/* A survivor that is being adopted. */
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.lineage = (struct lineage){.current = 200, .bitmap = 100};
	m.failover_generation = 200;
	struct host *h = host_new(&m);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_PROTECT | WIRE_JOIN_ADOPT);
	fin(h, "sync");
	EXPECT(h, "do:sync/ckpt save:secondary/NONE +2");
	link_down(h);
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	saved(h);
	command(h, CMD_UNPROTECT, 0); /* incomplete by now */
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);

	/* What is written between an unprotect and a failback would stand in no dirty set. */
	h = host_new(&m);
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "save:standalone/DONE");
	struct repl_command failback = {.cmd = CMD_FAILBACK, .text = "old:1"};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &failback});
	EXPECT(h, "cmd=ERR_BUSY");
	saved(h);
	EXPECT(h, "cmd");
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &failback});
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
}

Test(lineage_core, unprotect_stops_first_and_ends_all_partial_syncs)
{
	struct host *h = primary(PROTOCOL_F);
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "send:CHECKPOINT#3");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "save:primary/DONE");
	saved(h);
	EXPECT(h, "send:GOODBYE close save:standalone/DONE");
	cr_assert_not(h->saved.has_peer);
	cr_assert_eq(h->saved.lineage.bitmap, 0);
	cr_assert_neq(h->saved.lineage.current, 100);
	cr_assert_eq(h->saved.lineage.history[0], 100);
	cr_assert_str_eq(h->saved.peer, "");
	cr_assert_eq(h->cmd_count, 0);
	saved(h);
	EXPECT(h, "cmd");
	guest(h, 'a', REPL_WRITE, 0, 4096); /* nothing is tracked: no intent, no generation */
	EXPECT(h, "do:a/disk");
	cr_assert_not(dirty(h, 0));
	link_down(h);
	tick(h, 10 * SEC);
	EXPECT(h, "");
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "cmd=ERR_STATE");
	link_up(h, false); /* its former secondary is another's business now */
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* Found by the simulator: unprotected, it protected again into a copy that had written too; then that one was
 * unprotected. Nothing could end the split brain here. */
Test(lineage_core, unprotect_ends_a_split_brain_where_there_is_no_peer)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.has_peer = false;
	m.split_brain = m.alone = true;
	struct host *h = host_new(&m);
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "save:standalone/DONE");
	cr_assert_not(h->saved.split_brain);
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

Test(lineage_core, an_incomplete_copy_is_not_unprotected)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_NONE);
	m.inconsistent = true;
	m.sync_from = 100;
	struct host *h = host_new(&m);
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
}

/* Found by the simulator: between the end of its sync and its first checkpoint a copy is consistent and in NONE. The
 * checkpoint that stood in the stream was then taken of a disk that was its host's own; a RESYNC_BEGIN would have given
 * that up, and the writes behind it changed it. */
Test(lineage_core, a_copy_that_is_being_synced_is_not_unprotected)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_NONE);
	m.base = m.last_stream = m.n_ckpts = 0;
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	peer_meta.settings = m.settings;
	for (int cut = 0; cut < 2; cut++) {
		struct host *h = host_new(&m);
		link_up(h, false);
		join_frame(h, &peer_meta, 0);
		EXPECT(h, "send:JOIN send:DIRTY_END");
		command(h, CMD_UNPROTECT, 0);
		EXPECT(h, "cmd=ERR_BUSY");
		stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 1, 0, 0);
		fin(h, "d");
		saved(h);
		stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
		stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 3, 2, 0);
		forget(h);
		if (cut) /* what was received is applied all the same */
			link_down(h);
		command(h, CMD_UNPROTECT, 0);
		EXPECT(h, "cmd=ERR_BUSY");
		fin(h, "a");
		fin(h, "c");
		EXPECT(h, "done:a do:c/ckpt save:secondary/RUNNING +2");
		saved(h);
		host_free(h);
	}
	/* Between sessions nothing stands in its way. */
	struct host *h = host_new(&m);
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "save:standalone/DONE");
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

/* After a resolve the secondary may be the one that dials: a start on the primary reaches it by its next dial. */
Test(lineage_core, start_and_stop_where_the_secondary_dials)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_DONE);
	(void)snprintf(m.peer, sizeof(m.peer), "peer:1");
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_DONE);
	struct host *h = host_new(&m);
	tick(h, 0);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	join_frame(h, &peer_meta, WIRE_JOIN_START);
	EXPECT(h, "save:secondary/NONE");
	saved(h);
	EXPECT(h, "send:DIRTY_END");
	host_free(h);

	struct repl_meta p = peer_meta;
	p.peer[0] = 0;
	h = host_new(&p);
	link_up(h, false);
	join_frame(h, &m, 0);
	EXPECT(h, "send:REFUSE close"); /* stopped */
	command(h, CMD_START, 0);
	EXPECT(h, "");
	link_down(h);
	EXPECT(h, ""); /* the end of that connection is not the start's */
	link_up(h, false);
	join_frame(h, &m, 0);
	EXPECT(h, "send:JOIN");
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	EXPECT(h, "do:intents/own save:primary/RUNNING");
	saved(h);
	EXPECT(h, "send:RESYNC_DONE#1 cmd");
	link_down(h);
	forget(h);
	link_up(h, false); /* it has completed a stop that this side has not heard of */
	join_frame(h, &m, 0);
	EXPECT(h, "save:primary/DONE");
	saved(h);
	EXPECT(h, "send:GOODBYE close");
	link_down(h);
	forget(h);
	command(h, CMD_START, 0);
	tick(h, 10 * SEC);
	EXPECT(h, "cmd=ERR_PEER");
	host_free(h);
}

/* It would go on to protect with a copy that is nobody's source: the mark of an unfinished target is on its way. */
Test(lineage_core, a_host_that_is_being_made_a_secondary_protects_nothing)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_NONE);
	m.has_peer = false;
	m.lineage = (struct lineage){0};
	m.last_stream = 0;
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_NONE);
	for (int cut = 0; cut < 2; cut++) {
		struct host *h = host_new(&m);
		link_up(h, false);
		join_frame(h, &peer_meta, WIRE_JOIN_PROTECT);
		EXPECT(h, "save:secondary/NONE");
		if (cut)
			link_down(h);
		h->cmd = (struct repl_command){.cmd = CMD_PROTECT, .text = "peer:1"};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
		EXPECT(h, "cmd=ERR_BUSY");
		saved(h);
		EXPECT(h, cut ? "" : "send:JOIN send:DIRTY_END");
		cr_assert(repl_meta(h->r)->inconsistent);
		host_free(h);
	}
}

Test(lineage_core, an_adopted_copy_is_kept_in_the_write_that_makes_it_follow)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.has_peer = false;
	m.alone = true;
	m.lineage = (struct lineage){.current = 900};
	m.last_stream = 0;
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_NONE);
	peer_meta.ckpt_max = 5; /* the kept one's number is above it: none names two */
	struct host *h = host_new(&m);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:a/disk");
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_PROTECT);
	EXPECT(h, "send:REFUSE close");
	link_down(h);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_PROTECT | WIRE_JOIN_ADOPT);
	EXPECT(h, "");
	fin(h, "a");
	EXPECT(h, "done:a do:sync/ckpt");
	guest(h, 'b', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	link_down(h); /* nothing is given up yet: its guests go on, at full speed */
	EXPECT(h, "do:b/disk");
	fin(h, "b");
	fin_full(h, "sync", -ERR_IO, false, 0, false);
	EXPECT(h, "done:b");
	for (char c = 'c'; c < 'i'; c++)
		guest(h, c, REPL_WRITE, 65536 * (uint64_t)c, 4096);
	cr_assert_eq(h->n_submitted, 6);
	for (char c[2] = "c"; c[0] < 'i'; c[0]++)
		fin(h, c);
	forget(h);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_PROTECT | WIRE_JOIN_ADOPT);
	EXPECT(h, "do:sync/ckpt");
	fin(h, "sync");
	EXPECT(h, "save:secondary/NONE +6");
	cr_assert(h->saved.inconsistent && h->saved.own_dirty && !h->saved.fresh);
	cr_assert_eq(h->saved.kept, 6);
	cr_assert_eq(h->saved.sync_from, 0);
	cr_assert(h->saved.ckpts[0].flags & CKPT_PINNED);
	link_down(h); /* before its first block: everything, whoever asks then */
	saved(h);
	EXPECT(h, "");
	link_up(h, false);
	peer_meta.state = STATE_RUNNING;
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN send:DIRTY_END");
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 100, 0);
	fin(h, "r");
	EXPECT(h, "do:r/ckpt save:secondary/NONE"); /* [PREONCE] */
	cr_assert_eq(h->saved.sync_from, 100);
	host_free(h);
}

/* Its record waits for another's save, and its connection ends meanwhile: nothing is given up. */
Test(lineage_core, an_adoption_that_is_cut_while_its_record_waits_changes_nothing)
{
	for (unsigned again = 0; again < 2; again++) {
		static struct repl_meta m;
		meta_of(&m, ROLE_STANDALONE, STATE_DONE);
		m.has_peer = false;
		m.alone = true;
		m.lineage = (struct lineage){.current = 900};
		m.last_stream = 0;
		meta_of(&peer_meta, ROLE_PRIMARY, STATE_NONE);
		struct host *h = host_new(&m);
		link_up(h, false);
		join_frame(h, &peer_meta, WIRE_JOIN_PROTECT | WIRE_JOIN_ADOPT);
		EXPECT(h, "do:sync/ckpt");
		guest(h, 'b', REPL_WRITE, 0, 4096);
		h->cmd = (struct repl_command){.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = m.settings};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
		EXPECT(h, "save:standalone/DONE");
		fin(h, "sync");
		EXPECT(h, "");
		link_down(h);
		EXPECT(h, "");
		if (again) { /* the next one's JOIN is looked at when that has ended */
			link_up(h, false);
			join_frame(h, &peer_meta, WIRE_JOIN_PROTECT);
		}
		saved(h);
		EXPECT(h, again ? "cmd do:b/disk send:REFUSE close" : "cmd do:b/disk");
		cr_assert_eq(repl_meta(h->r)->role, ROLE_STANDALONE);
		cr_assert_eq(repl_meta(h->r)->n_ckpts, 0);
		host_free(h);
	}
}

/* What a former primary fails over to is a view over a checkpoint: writes to it need an active overlay. */
Test(lineage_core, a_loser_that_fails_over_has_an_active_overlay)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_NONE);
	m.active_id = 0;
	m.inconsistent = m.own_dirty = true;
	m.sync_from = 300;
	m.kept = 1;
	m.base = m.last_stream = 0;
	m.ckpts[0].kind = CKPT_LOCAL;
	struct host *h = host_new(&m);
	h->cmd = (struct repl_command){.cmd = CMD_FAILOVER, .flags = FAILOVER_FORCE};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	EXPECT(h, "do:mark/own");
	fin(h, "mark");
	fin(h, "sync");
	EXPECT(h, "do:sync/disk save:standalone/FAILOVER +2");
	cr_assert_eq(h->saved.target, 1);
	cr_assert_neq(h->saved.active_id, 0);
	cr_assert_eq(h->saved.ckpts[1].kind, CKPT_PARTIAL);
	host_free(h);
}

/* A survivor that dials (the secondary of a resolve) tells its old primary, then waits for the failback. */
Test(lineage_core, a_survivor_that_dials_says_so_until_it_is_heard)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	(void)snprintf(m.peer, sizeof(m.peer), "peer:1");
	m.lineage = (struct lineage){.current = 200, .bitmap = 100};
	m.failover_generation = 200;
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "dial send:JOIN close");
	link_down(h);
	tick(h, 3 * SEC);
	link_up(h, true);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_NONE);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "dial send:JOIN close");
	link_down(h);
	tick(h, 10 * SEC);
	EXPECT(h, "");
	host_free(h);
}

/* After a failback what this host kept as a secondary goes, once its new secondary has a checkpoint of its own. */
Test(lineage_core, a_new_primary_lets_its_old_checkpoints_go)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	m.ckpt_max = 9;
	m.n_ckpts = 3;
	m.ckpts[0] = (struct repl_ckpt){.number = 7};
	m.ckpts[1] = (struct repl_ckpt){.number = 8, .flags = CKPT_PINNED};
	m.ckpts[2] = (struct repl_ckpt){.number = 9, .flags = CKPT_PINNED};
	m.last_stream = 0;
	struct host *h = host_new(&m);
	dial_fails(h, h->dial);
	tick(h, 10 * SEC);
	cr_assert_null(strstr(h->trace, "merge"));
	host_free(h);
	m.last_stream = m.ckpt_max = 10;
	h = host_new(&m);
	tick(h, 0);
	EXPECT(h, "dial save:primary/RUNNING <8");
	saved(h);
	tick(h, SEC);
	EXPECT(h, "");
	host_free(h);
}

/* Found by a host that was killed and came back while `failback` was given: what it had heard on its own connection was
 * still being saved when the survivor's came up, and the end of that save closed it. */
Test(lineage_core, a_failback_that_comes_while_a_step_down_is_saved_is_answered)
{
	static struct repl_meta survivor;
	struct host *h = primary(PROTOCOL_F);
	meta_of(&survivor, ROLE_STANDALONE, STATE_DONE);
	survivor.lineage = (struct lineage){.current = 200, .bitmap = 100};
	survivor.alone = true;
	link_down(h);
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &survivor, 0);
	EXPECT(h, "dial send:JOIN save:secondary/NONE");
	link_up(h, false);
	survivor.role = ROLE_PRIMARY;
	join_frame(h, &survivor, WIRE_JOIN_FAILBACK);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "send:JOIN send:DIRTY_END");
	host_free(h);
}

/* ---- switchover ---- */

static const struct repl_meta *held_by(const struct host *h)
{
	return repl_meta(h->r);
}

/* In sync, with a write acknowledged; nothing more comes of the last clear cycle. Frames up to 4 were sent. */
static struct host *clean_primary(enum protocol protocol)
{
	struct host *h = warm_primary(protocol);
	tick(h, 2 * SEC);
	EXPECT(h, "send:FLUSH#4 do:sync/disk");
	fin(h, "sync");
	ack(h, 4, 4, 4);
	cr_assert_not(dirty(h, 0));
	forget(h);
	return h;
}

/* Up to the save that makes it secondary; the checkpoint is 3. */
static struct host *handing_over(void)
{
	struct host *h = clean_primary(PROTOCOL_F);
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "send:CHECKPOINT#5");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "save:secondary/RUNNING +3");
	return h;
}

/* Secondary, told the peer to take over. */
static struct host *handed_over(void)
{
	struct host *h = handing_over();
	saved(h);
	EXPECT(h, "send:TAKE_OVER");
	return h;
}

Test(switchover, drains_then_steps_down_then_tells)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "do:a/disk");
	guest(h, 'b', REPL_WRITE, 0, 4096); /* none starts any more */
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "");
	fin(h, "a"); /* one that was under way ends, and one clear cycle goes over all */
	EXPECT(h, "send:WRITE#4 done:a send:FLUSH#5 do:sync/disk");
	ack(h, 5, 5, 5);
	EXPECT(h, "");
	fin(h, "sync");
	EXPECT(h, "send:CHECKPOINT#6");
	cr_assert_eq(held_by(h)->role, ROLE_PRIMARY);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "save:secondary/RUNNING +3");
	cr_assert(h->saved.handed && h->saved.switched && h->saved.base == 3 && h->saved.last_stream == 3);
	cr_assert(h->saved.lineage.current == 100 && h->saved.lineage.bitmap == 0, "no generation begins");
	cr_assert(h->saved.ckpts[0].number == 3 && h->saved.ckpts[0].kind == CKPT_STREAM);
	guest(h, 'c', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "done:b=ERR_IO done:f=ERR_IO done:c=ERR_IO send:TAKE_OVER");
	frame(h, WIRE_TOOK_OVER, 0, 3, 0, NULL, 0);
	EXPECT(h, "cmd close dial"); /* at once: the peer's guests wait */
	cr_assert_eq(h->cmd_error, 0);
	cr_assert_eq(h->cmd.result, 3);
	/* The next session goes the other way; it says that it has handed over until it has followed. */
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	peer_meta.ckpt_max = peer_meta.last_stream = 3;
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:DIRTY_END");
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 1, 0, 0);
	fin(h, "d");
	EXPECT(h, "do:d/disk save:secondary/RUNNING");
	cr_assert(!h->saved.handed && h->saved.switched);
	saved(h);
	EXPECT(h, "send:RESYNC_ACK#1 send:ACK done:d");
	command(h, CMD_SWITCHOVER, 0); /* the same again */
	EXPECT(h, "cmd");
	cr_assert_eq(h->cmd.result, 0);
	host_free(h);
}

Test(switchover, waits_for_what_the_guest_was_promised)
{
	struct host *h = clean_primary(PROTOCOL_C);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/disk send:WRITE#5");
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "send:FLUSH#6 do:sync/disk");
	fin(h, "sync");
	EXPECT(h, "");
	ack(h, 6, 6, 6);
	EXPECT(h, "done:a send:CHECKPOINT#7");
	host_free(h);
}

/* A guest's flush that is under way locally: its write is durable on both, but this host says nothing any more. */
Test(switchover, a_flush_that_ends_after_it_is_not_answered_ok)
{
	struct host *h = clean_primary(PROTOCOL_F);
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "do:f/disk");
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "send:CHECKPOINT#5");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	saved(h);
	forget(h);
	fin(h, "f");
	EXPECT(h, "done:f=ERR_IO");
	host_free(h);
}

Test(switchover, is_refused_and_says_why)
{
	struct host *h = primary(PROTOCOL_F);
	link_down(h);
	forget(h);
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);

	h = warm_primary(PROTOCOL_F);
	command(h, CMD_PAUSE, 0);
	saved(h);
	forget(h);
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "cmd=ERR_STATE");
	cr_assert(strstr(h->cmd.err.text, "resume"), "%s", h->cmd.err.text);
	host_free(h);

	h = primary(PROTOCOL_F);
	struct repl_command grow = {.cmd = CMD_RESIZE, .number = 2 * SIZE};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &grow});
	forget(h);
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	host_free(h);

	h = secondary();
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "cmd=ERR_STATE");
	cr_assert(strstr(h->cmd.err.text, "run it on the primary"), "%s", h->cmd.err.text);
	host_free(h);

	/* Nor are others taken while it is under way. */
	h = clean_primary(PROTOCOL_F);
	command(h, CMD_SWITCHOVER, 0);
	forget(h);
	static const enum repl_cmd others[] = {CMD_STOP, CMD_PAUSE, CMD_UNPROTECT};
	for (unsigned i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		struct repl_command c = {.cmd = others[i]};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &c});
		EXPECT(h, "cmd=ERR_BUSY");
	}
	struct repl_command c = {.cmd = CMD_SWITCHOVER}; /* the same one waits with it */
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &c});
	EXPECT(h, "");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, WIRE_VOID_ERROR, NULL, 0);
	EXPECT(h, "cmd=ERR_STATE cmd=ERR_STATE");
	host_free(h);
}

Test(switchover, an_active_overlay_that_is_not_empty_ends_it)
{
	struct host *h = clean_primary(PROTOCOL_F);
	command(h, CMD_SWITCHOVER, 0);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "send:CHECKPOINT#5");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, WIRE_VOID_ACTIVE, NULL, 0);
	EXPECT(h, "cmd=ERR_STATE do:a/disk");
	cr_assert(strstr(h->cmd.err.text, "`discard` it there"), "%s", h->cmd.err.text);
	cr_assert_eq(held_by(h)->role, ROLE_PRIMARY);
	host_free(h);
}

/* A cut before the primary's save begins: it goes on as such, and the answer of the old session changes nothing. */
Test(switchover, a_cut_before_the_first_write_changes_nothing)
{
	struct host *h = clean_primary(PROTOCOL_F);
	command(h, CMD_SWITCHOVER, 0);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	forget(h);
	link_down(h);
	EXPECT(h, "cmd=ERR_PEER save:primary/RUNNING");
	saved(h);
	EXPECT(h, "do:a/disk");
	cr_assert_eq(held_by(h)->role, ROLE_PRIMARY);
	host_free(h);
}

/* A cut while it is being saved: it decides. What waits is held meanwhile, and nothing completes alone. */
Test(switchover, a_cut_while_it_is_saved_goes_on)
{
	struct host *h = handing_over();
	guest(h, 'a', REPL_WRITE, 0, 4096);
	link_down(h);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "done:a=ERR_IO");
	cr_assert(held_by(h)->handed);
	/* The peer has not taken over: it will, of this JOIN. */
	tick(h, SEC);
	EXPECT(h, "dial");
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	peer_meta.ckpt_max = peer_meta.last_stream = 3;
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "cmd send:DIRTY_END");
	cr_assert_eq(h->cmd_error, 0);
	host_free(h);
}

/* The next connection stands before the record does: its JOIN says what that says. */
Test(switchover, a_connection_that_comes_while_it_is_saved_waits_for_it)
{
	struct host *h = handing_over();
	link_down(h);
	tick(h, SEC);
	link_up(h, true);
	EXPECT(h, "dial");
	tick(h, SEC);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "send:JOIN");
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	peer_meta.ckpt_max = peer_meta.last_stream = 3;
	join_frame(h, &peer_meta, 0);
	EXPECT(h, ""); /* it is the peer that takes over */
	cr_assert_eq(held_by(h)->role, ROLE_SECONDARY);
	host_free(h);
}

/* Nor is anything of the old session's still to be applied when a secondary that dials says what it holds. */
Test(repl, a_join_is_said_when_the_old_sessions_work_has_ended)
{
	struct host *h = secondary();
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 3, 2, 0);
	h->io['c'].flags = WIRE_CKPT_STOP;
	EXPECT(h, "do:a/disk");
	link_down(h);
	link_up(h, true);
	EXPECT(h, "close"); /* the primary dials this one */
	host_free(h);
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	(void)snprintf(m.peer, sizeof(m.peer), "peer:1");
	h = secondary_of(&m);
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 3, 2, 0);
	h->io['c'].flags = WIRE_CKPT_STOP;
	link_down(h);
	tick(h, 1);
	link_up(h, true);
	EXPECT(h, "do:a/disk dial");
	fin(h, "a");
	EXPECT(h, "done:a do:c/ckpt");
	fin(h, "c");
	EXPECT(h, "save:secondary/DONE +2");
	saved(h);
	EXPECT(h, "done:c send:JOIN");
	host_free(h);
}

/* The write of its record fails: the record as it was is saved again before a guest is served. The peer hears that the
 * primary goes on, as the writers of its view wait. */
Test(switchover, a_step_down_that_cannot_be_saved_is_taken_back)
{
	struct host *h = handing_over();
	guest(h, 'a', REPL_WRITE, 0, 4096);
	save_fails(h, -ERR_IO);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	EXPECT(h, "cmd=ERR_IO send:FLUSH#6 do:a/disk");
	cr_assert_eq(held_by(h)->role, ROLE_PRIMARY);
	host_free(h);
}

/* A job's own checkpoint has the next number: that of the switchover can't be this host's any more. */
Test(switchover, a_job_that_takes_a_checkpoint_in_between_ends_it)
{
	struct host *h = clean_primary(PROTOCOL_F);
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "send:CHECKPOINT#5");
	struct repl_command c = {.cmd = CMD_HOLD, .text = "job 1"};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &c});
	EXPECT(h, "save:primary/RUNNING +4");
	saved(h);
	EXPECT(h, "cmd");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "cmd=ERR_BUSY send:FLUSH#6");
	cr_assert_eq(held_by(h)->role, ROLE_PRIMARY);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:a/disk");
	host_free(h);
}

/* The peer is lost when it should have taken over: two secondaries. The command gives up, nothing is served but the
 * view, and a failover here is what it always is. */
Test(switchover, a_peer_that_is_lost_leaves_a_secondary_that_can_fail_over)
{
	struct host *h = handed_over();
	link_down(h);
	forget(h);
	ticks(h, 11 * SEC);
	cr_assert(strstr(h->trace, "cmd=ERR_PEER"), "%s", h->trace);
	cr_assert(strstr(h->cmd.err.text, "`failover` here"), "%s", h->cmd.err.text);
	struct repl_status st;
	repl_status(h->r, h->now, &st);
	cr_assert(st.degraded && strstr(st.reasons[0], "handed over"), "%s", st.reasons[0]);
	forget(h);
	command(h, CMD_SWITCHOVER, 0); /* waits again */
	EXPECT(h, "");
	struct repl_command f = {.cmd = CMD_FAILOVER};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &f});
	fin(h, "mark");
	fin(h, "sync");
	cr_assert(strstr(h->trace, "save:standalone/FAILOVER +4"), "%s", h->trace);
	cr_assert(!h->saved.handed && !h->saved.switched && h->saved.target == 3);
	forget(h);
	saved(h);
	cr_assert(strstr(h->trace, "cmd do:") && strstr(h->trace, "cmd=ERR_STATE"), "%s", h->trace);
	host_free(h);
}

/* It hangs: its session is given up, so that the next handshake asks again. */
Test(switchover, a_peer_that_does_not_take_over_is_asked_again)
{
	struct host *h = handed_over();
	ticks(h, 11 * SEC);
	cr_assert(strstr(h->trace, "close") && strstr(h->trace, "cmd=ERR_PEER") && strstr(h->trace, "dial"), "%s",
		  h->trace);
	host_free(h);
}

Test(switchover, a_restarted_host_remembers_that_it_has_handed_over)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	m.handed = m.switched = true;
	(void)snprintf(m.peer, sizeof(m.peer), "peer:1");
	struct host *h = host_new(&m);
	cr_assert_not(repl_holding(h->r));
	cr_assert_eq(repl_serving(held_by(h), false), SERVING_VIEW);
	static struct wire_join j;
	repl_join(h->r, &j);
	cr_assert(j.flags & WIRE_JOIN_HANDED);
	/* It listens, and the peer that dials has not taken over: it waits for that. */
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN");
	command(h, CMD_SWITCHOVER, 0);
	link_down(h);
	peer_meta.role = ROLE_PRIMARY;
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN cmd send:DIRTY_END");
	host_free(h);
}

/* ---- the other side of it ---- */

/* Checkpoint 2 is taken, and TAKE_OVER can come. */
static struct host *armed(void)
{
	struct host *h = secondary();
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
	h->io['c'].flags = WIRE_CKPT_HAND_OVER;
	fin(h, "c");
	EXPECT(h, "do:c/ckpt save:secondary/RUNNING +2");
	cr_assert_eq(h->saved.role, ROLE_SECONDARY);
	saved(h);
	EXPECT(h, "send:CHECKPOINT_ACK done:c");
	return h;
}

Test(switchover, the_secondary_takes_over_in_one_write)
{
	struct host *h = armed();
	guest(h, 'a', REPL_WRITE, 0, 4096); /* to the view: it waits */
	EXPECT(h, "");
	frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0);
	EXPECT(h, "do:sync/ckpt");
	fin(h, "sync");
	EXPECT(h, "save:primary/RUNNING");
	cr_assert(h->saved.base == 0 && h->saved.last_stream == 2 && h->saved.lineage.current == 100);
	saved(h);
	EXPECT(h, "send:TOOK_OVER close");
	cr_assert(repl_holding(h->r)); /* until the handshake, so that a needs no generation */
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	peer_meta.n_ckpts = 1;
	peer_meta.ckpts[0].number = peer_meta.base = peer_meta.ckpt_max = peer_meta.last_stream = 2;
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
	EXPECT(h, "send:JOIN");
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	saved(h);
	EXPECT(h, "do:intents/own save:primary/RUNNING send:RESYNC_DONE#1 do:a/intent");
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	EXPECT(h, "send:CHECKPOINT#2 save:primary/RUNNING");
	cr_assert_eq(h->saved.lineage.current, 100);
	host_free(h);
}

/* A connection that comes while the disk is synced, or view's writes end, for a take-over that the last one asked for:
 * what this host's JOIN says of it has to hold when both are looked at. */
Test(switchover, a_join_waits_for_a_take_over)
{
	for (unsigned dials = 0; dials < 2; dials++) {
		static struct repl_meta m;
		meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
		if (dials)
			(void)snprintf(m.peer, sizeof(m.peer), "peer:1");
		struct host *h = secondary_of(&m);
		stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
		h->io['c'].flags = WIRE_CKPT_HAND_OVER;
		fin(h, "c");
		saved(h);
		frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0);
		EXPECT(h, "do:c/ckpt save:secondary/RUNNING +2 send:CHECKPOINT_ACK done:c do:sync/ckpt");
		link_down(h);
		meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
		peer_meta.n_ckpts = 1;
		peer_meta.ckpts[0].number = peer_meta.base = peer_meta.ckpt_max = peer_meta.last_stream = 2;
		link_up(h, dials);
		if (!dials)
			join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
		EXPECT(h, "");
		fin(h, "sync");
		EXPECT(h, "save:primary/RUNNING");
		saved(h);
		EXPECT(h, "send:JOIN");
		if (dials)
			join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
		frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
		EXPECT(h, "do:intents/own"); /* it is the source */
		host_free(h);
	}
}

/* Its peer goes on as the primary, and has said so before the checkpoint was taken: the view is not held up. */
Test(switchover, a_frame_behind_its_checkpoint_ends_it)
{
	struct host *h = secondary();
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
	h->io['c'].flags = WIRE_CKPT_HAND_OVER;
	stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 3, 0, 0);
	fin(h, "c");
	saved(h);
	EXPECT(h, "do:c/ckpt save:secondary/RUNNING +2 send:CHECKPOINT_ACK done:c do:f/disk");
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:a/active");
	frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* What came behind it would be in the disk that becomes this host's own, and in no checkpoint of the peer's. */
Test(switchover, nothing_comes_behind_take_over)
{
	for (unsigned when = 0; when < 2; when++) {
		struct host *h = armed();
		frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0);
		EXPECT(h, "do:sync/ckpt");
		if (when) {
			fin(h, "sync");
			EXPECT(h, "save:primary/RUNNING");
		}
		stream(h, 'w', WIRE_WRITE, REPL_WRITE, 3, 0, 4096);
		EXPECT(h, "send:REFUSE close done:w=ERR_CANCELED");
		if (!when) {
			fin(h, "sync");
			EXPECT(h, "save:primary/RUNNING");
		}
		saved(h);
		EXPECT(h, ""); /* it has taken over; the next handshake says so */
		cr_assert_eq(held_by(h)->role, ROLE_PRIMARY);
		host_free(h);
	}
}

Test(switchover, a_peer_that_does_not_come_is_not_waited_for)
{
	struct host *h = armed();
	guest(h, 'a', REPL_WRITE, 0, 4096);
	frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0);
	fin(h, "sync");
	saved(h);
	forget(h);
	ticks(h, 6 * SEC);
	cr_assert(strstr(h->trace, "save:primary/RUNNING"), "%s", h->trace); /* the generation of writing alone */
	cr_assert(h->saved.alone && h->saved.lineage.bitmap == 100);
	host_free(h);
}

/* What would empty an active overlay that a guest has written: nobody decides that but its owner. */
Test(switchover, the_secondarys_own_writes_are_never_thrown_away)
{
	struct host *h = secondary();
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
	h->io['c'].flags = WIRE_CKPT_HAND_OVER;
	fin_full(h, "c", 0, false, 4096, false);
	EXPECT(h, "do:c/ckpt send:CHECKPOINT_ACK done:c");
	cr_assert_eq(held_by(h)->last_stream, 1);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:a/active");
	frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);

	/* The same of one that hears of it in the handshake, by its peer's JOIN. */
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	h = host_new(&m);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
	EXPECT(h, "do:a/active");
	fin(h, "a");
	EXPECT(h, "done:a do:sync/ckpt");
	fin_full(h, "sync", 0, false, 4096, false);
	EXPECT(h, "send:REFUSE close");
	cr_assert_eq(held_by(h)->role, ROLE_SECONDARY);
	link_down(h);
	/* After a `discard` it takes over by itself. */
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
	fin(h, "sync");
	EXPECT(h, "do:sync/ckpt save:primary/RUNNING");
	saved(h);
	EXPECT(h, "send:JOIN");
	host_free(h);
}

/* One that dials comes again as what it is then. */
Test(switchover, a_dialler_that_takes_over_dials_again)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	(void)snprintf(m.peer, sizeof(m.peer), "peer:1");
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	tick(h, SEC);
	EXPECT(h, "dial");
	link_up(h, true);
	join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
	fin(h, "sync");
	EXPECT(h, "send:JOIN do:sync/ckpt save:primary/RUNNING");
	saved(h);
	EXPECT(h, "close dial");
	host_free(h);
}

/* The primary goes on as such, or its session ends: the view's writers wait no longer. */
Test(switchover, the_view_is_let_go_where_it_comes_to_nothing)
{
	struct host *h = armed();
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 3, 0, 0);
	EXPECT(h, "do:a/active do:f/disk");
	frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0); /* too late */
	EXPECT(h, "send:REFUSE close");
	host_free(h);

	h = armed();
	guest(h, 'a', REPL_WRITE, 0, 4096);
	link_down(h);
	EXPECT(h, "do:a/active");
	host_free(h);
}

/* Nothing is said of a take-over that may be found by the next start and may not, but the record as it was. */
Test(switchover, a_take_over_that_cannot_be_saved_is_tried_again_with_the_next_join)
{
	struct host *h = armed();
	frame(h, WIRE_TAKE_OVER, 0, 2, 0, NULL, 0);
	fin(h, "sync");
	EXPECT(h, "do:sync/ckpt save:primary/RUNNING");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:secondary/RUNNING");
	saved(h);
	EXPECT(h, "send:REFUSE close");
	link_down(h);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	peer_meta.ckpt_max = peer_meta.last_stream = 2;
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
	fin(h, "sync");
	EXPECT(h, "do:sync/ckpt save:primary/RUNNING");
	saved(h);
	EXPECT(h, "send:JOIN");
	host_free(h);
}

/* It is not at the checkpoint that was handed over (restored from a backup, say), or has a copy that is not whole. */
Test(switchover, a_copy_that_is_not_the_same_does_not_take_over)
{
	static struct repl_meta m;
	for (int i = 0; i < 3; i++) {
		meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
		meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
		if (i == 0)
			peer_meta.ckpt_max = peer_meta.last_stream = 2;
		else if (i == 1)
			m.handed = m.switched = true;
		else
			m.lineage.current = 99, m.lineage.history[0] = 100;
		struct host *h = host_new(&m);
		link_up(h, false);
		join_frame(h, &peer_meta, WIRE_JOIN_HANDED);
		EXPECT(h, "send:JOIN send:REFUSE close");
		host_free(h);
	}
}

/* ---- checkpoints, stop, settings ---- */

Test(repl, a_checkpoint_is_answered_when_its_number_is_durable_here_too)
{
	struct host *h = primary(PROTOCOL_F);
	command(h, CMD_CHECKPOINT, 0);
	EXPECT(h, "send:CHECKPOINT#3");
	ack(h, 3, 3, 1);
	EXPECT(h, "");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.last_stream, 3);
	saved(h);
	EXPECT(h, "cmd");
	cr_assert_eq(h->cmd.result, 3);
	host_free(h);
}

Test(repl, answers_that_nobody_asked_for_are_refused)
{
	struct host *h = primary(PROTOCOL_F);
	for (int i = 0; i < 100; i++)
		frame(h, WIRE_CHECKPOINT_ACK, 0, 2, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

Test(repl, many_checkpoints_and_settings_on_a_slow_disk_fit)
{
	struct host *h = primary(PROTOCOL_F);
	static struct repl_command c[100];
	for (int i = 0; i < 100; i++) {
		c[i] = (struct repl_command){.cmd = CMD_CHECKPOINT};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &c[i]});
	}
	for (int i = 0; i < 100; i++)
		frame(h, WIRE_CHECKPOINT_ACK, 0, (uint64_t)i + 3, 0, NULL, 0);
	saved(h);
	saved(h);
	cr_assert_eq(h->cmd_count, 100);
	cr_assert_eq(repl_meta(h->r)->last_stream, 102);
	host_free(h);
	h = secondary();
	uint8_t buf[4096];
	struct wbuf w = {.data = buf, .size = sizeof(buf)};
	settings_encode(&repl_meta(h->r)->settings, &w);
	for (uint64_t i = 1; i <= 100; i++)
		frame(h, WIRE_SETTINGS, i, 0, 0, buf, (uint32_t)w.len);
	EXPECT(h, "save:secondary/RUNNING");
	saved(h);
	EXPECT(h, "send:SETTINGS_ACK#1 save:secondary/RUNNING");
	saved(h);
	EXPECT(h, "send:SETTINGS_ACK#100");
	host_free(h);
}

Test(repl, numbers_near_the_wires_limit_are_refused)
{
	struct host *h = secondary();
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, WIRE_CKPT_NUMBER_MAX, 0);
	EXPECT(h, "send:REFUSE close done:c=ERR_CANCELED");
	host_free(h);
}

Test(repl, a_clean_stop_clears_then_checkpoints_then_ends)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	forget(h);
	command(h, CMD_STOP, 0);
	EXPECT(h, ""); /* a is under way */
	guest(h, 'b', REPL_WRITE, 4096, 4096);
	fin(h, "a");
	EXPECT(h, "send:WRITE#4 done:a send:FLUSH#5 do:sync/disk");
	fin(h, "sync");
	ack(h, 5, 5, 5);
	EXPECT(h, "send:CHECKPOINT#6");
	cr_assert_not(dirty(h, 0));
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "save:primary/DONE");
	saved(h);
	EXPECT(h, "send:GOODBYE close cmd save:primary/DONE"); /* b begins a generation */
	saved(h);
	EXPECT(h, "do:b/disk");
	host_free(h);
}

/* What is written while a connection is being closed was sent to nobody: no clear cycle may find it clean, though the
 * last barrier was acknowledged and nothing was sent behind it. */
Test(repl, a_stop_beside_the_end_of_a_session_leaves_what_was_written_alone_dirty)
{
	for (int begun = 0; begun < 2; begun++) { /* the stop, before the peer says goodbye */
		struct host *h = warm_primary(PROTOCOL_F);
		guest(h, 'f', REPL_FLUSH, 0, 0);
		fin(h, "f");
		ack(h, 4, 4, 4);
		EXPECT(h, "send:FLUSH#4 do:f/disk done:f");
		guest(h, 'a', REPL_WRITE, 3 * 65536, 4096);
		EXPECT(h, "do:a/disk");
		if (begun)
			command(h, CMD_STOP, 0);
		frame(h, WIRE_GOODBYE, 0, 0, 0, NULL, 0);
		EXPECT(h, "close");
		fin(h, "a");
		EXPECT(h, "save:primary/RUNNING"); /* its generation */
		saved(h);
		EXPECT(h, "done:a");
		if (!begun) {
			command(h, CMD_STOP, 0); /* of this side only: the link is down */
			EXPECT(h, "save:primary/DONE");
			saved(h);
			EXPECT(h, "cmd");
		}
		tick(h, 2 * SEC);
		cr_assert(dirty(h, 3 * 65536));
		link_down(h);
		EXPECT(h, begun ? "cmd=ERR_PEER" : "");
		cr_assert(dirty(h, 3 * 65536));
		host_free(h);
	}
	/* A secondary's goes nowhere. */
	struct host *h = secondary();
	forget(h);
	frame(h, WIRE_GOODBYE, 0, 0, 0, NULL, 0);
	command(h, CMD_STOP, 0);
	EXPECT(h, "close cmd=ERR_STATE");
	host_free(h);
}

/* A survivor with checkpoints 1 (pinned), 2, 3 (what its failover went back to), 4 and 5 (live), out of room. */
static struct host *survivor_out_of_room(void)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.alone = true;
	m.n_ckpts = 5;
	m.ckpt_max = 5;
	for (unsigned i = 0; i < 5; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100};
	m.ckpts[0].flags = CKPT_PINNED;
	m.target = 3;
	m.settings.keep_last = 100;
	struct host *h = host_new(&m);
	char name[2] = "";
	for (int i = 0; i < 60; i++) {
		guest(h, (char)('A' + i), REPL_WRITE, (uint64_t)i * 4096, 4096);
		if (i == 0) /* the intent bit of them all */
			fin(h, "A");
	}
	forget(h);
	for (int i = 0; i < 60; i++) {
		name[0] = (char)('A' + i);
		fin_full(h, name, -ERR_NOSPC, false, 0, true);
	}
	EXPECT(h, "do:merge/own"); /* one for all of them */
	return h;
}

Test(repl, writes_without_room_share_one_drop)
{
	struct host *h = survivor_out_of_room();
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -2"); /* unpinned ones go first */
	saved(h);
	cr_assert_eq(h->n_submitted, 60);
	forget(h);
	fin(h, "A");
	EXPECT(h, "done:A");
	host_free(h);
}

Test(repl, the_dearest_checkpoint_goes_last_and_one_that_frees_nothing_is_passed_over)
{
	struct host *h = survivor_out_of_room();
	fin_full(h, "merge", -ERR_NOSPC, false, 0, false); /* 2: its room would not come free */
	EXPECT(h, "do:merge/own");
	fin_full(h, "merge", -ERR_NOSPC, false, 0, false); /* 4: nor this one's */
	EXPECT(h, "save:standalone/DONE <2");		   /* 1, pinned, is the oldest: its blocks go with it */
	saved(h);
	cr_assert_eq(h->n_submitted, 60);
	forget(h);
	const char *const next[] = {"save:standalone/DONE <3", "do:merge/own", "save:standalone/DONE -4",
				    "save:standalone/DONE <4", "save:standalone/DONE <6"};
	for (unsigned i = 0; i < sizeof(next) / sizeof(next[0]); i++) { /* 2, 4 by a merge, the target, the live one */
		if (i != 2)
			fin_full(h, "A", -ERR_NOSPC, false, 0, true);
		EXPECT(h, next[i]);
		if (i == 1) {
			fin(h, "merge");
			continue;
		}
		saved(h);
		EXPECT(h, "do:A/disk");
	}
	fin_full(h, "A", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "done:A=ERR_NOSPC");
	host_free(h);
}

Test(repl, a_merge_that_fails_keeps_its_checkpoint_and_is_not_tried_all_the_time)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.n_ckpts = 3;
	m.ckpt_max = 3;
	for (unsigned i = 0; i < 3; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100};
	m.ckpts[0].flags = CKPT_PINNED;
	m.settings.keep_last = 1;
	struct host *h = host_new(&m);
	tick(h, SEC);
	EXPECT(h, "do:merge/own");
	fin_full(h, "merge", -ERR_NOSPC, false, 0, false);
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 3);
	for (unsigned i = 0; i < 9; i++)
		tick(h, SEC);
	EXPECT(h, "");
	command(h, CMD_DROP, 2); /* a command is tried at once, and says what to do */
	EXPECT(h, "do:merge/own");
	fin_full(h, "merge", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "cmd=ERR_NOSPC");
	cr_assert(strstr(h->cmd.err.text, "the oldest one (1) takes no room"), "%s", h->cmd.err.text);
	tick(h, 11 * SEC);
	EXPECT(h, "do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -2");
	saved(h);
	host_free(h);
}

/* A tick with this usage: checkpoint i + 1 holds bytes[i]. */
static void tick_used(struct host *h, const uint64_t *bytes, uint64_t free_bytes)
{
	static struct repl_usage u;
	const struct repl_meta *m = repl_meta(h->r);
	u.free_bytes = free_bytes;
	u.n = m->n_ckpts;
	for (uint32_t i = 0; i < m->n_ckpts; i++) {
		u.numbers[i] = m->ckpts[i].number;
		u.bytes[i] = bytes[u.numbers[i] - 1];
	}
	h->now += SEC / 10;
	step(h, (struct repl_event){.type = EV_TICK, .heard_ns = h->now, .usage = &u});
}

/* In sync, with checkpoints 1 to n, those of the mask `pinned`; the last is the base. */
static struct host *secondary_keeping(unsigned n, unsigned pinned, uint64_t keep_last, uint64_t history_max)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	m.n_ckpts = n;
	m.ckpt_max = m.base = m.last_stream = n;
	for (unsigned i = 0; i < n; i++) {
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100, .time_ns = (i + 1) * 60 * SEC};
		if (pinned >> (i + 1) & 1)
			m.ckpts[i].flags = CKPT_PINNED;
	}
	m.settings.keep_last = keep_last;
	m.settings.history_max_bytes = history_max;
	return secondary_of(&m);
}

static const uint64_t each_block[] = {4096, 4096, 4096, 4096, 4096, 4096, 4096, 4096};

Test(repl, retention_drops_the_oldest_at_once_and_merges_one_at_a_time)
{
	struct host *h = secondary_keeping(8, 1U << 4, 2, 0);		   /* 7 and 8 stay, and 4 */
	step(h, (struct repl_event){.type = EV_TICK, .heard_ns = h->now}); /* nothing is known yet */
	EXPECT(h, "");
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "save:secondary/RUNNING <4"); /* 1, 2, 3: no merge */
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "");
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "do:merge/own");
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "");
	fin(h, "merge");
	EXPECT(h, "save:secondary/RUNNING -5");
	saved(h);
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:secondary/RUNNING -6");
	saved(h);
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "");
	host_free(h);
}

Test(repl, retention_keeps_what_its_settings_say_over_periods)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.ckpt_max = m.n_ckpts = 8;
	m.last_stream = 0;
	for (unsigned i = 0; i < 8; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .time_ns = (i + 1) * 30 * SEC, .generation = 100};
	m.settings.keep_last = 1;
	m.settings.keep_minutely = 3;
	m.settings.keep_hourly = 1;
	struct host *h = host_new(&m);
	tick_used(h, each_block, UINT64_MAX); /* 8 (04:00), 7 (03:30) and 5 (02:30) are the newest of their minutes */
	EXPECT(h, "save:standalone/DONE <5");
	saved(h);
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -6");
	saved(h);
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "");
	host_free(h);
}

Test(repl, retention_waits_for_a_usage_that_knows_all_checkpoints)
{
	static const struct repl_usage old = {UINT64_MAX, 3, {1, 2, 3}, {4096, 4096, 4096}};
	struct host *h = secondary_keeping(4, 0, 2, 0);
	step(h, (struct repl_event){.type = EV_TICK, .heard_ns = h->now, .usage = &old});
	EXPECT(h, "");
	static const uint64_t empty_since_2[] = {4096, 4096, 0, 0};
	tick_used(h, empty_since_2, UINT64_MAX); /* 3 and 4 are the newest; 2 and 3 differ from the one before */
	EXPECT(h, "save:secondary/RUNNING <2");
	host_free(h);
}

Test(repl, retention_waits_for_a_save_and_a_drop_for_retention)
{
	struct host *h = secondary_keeping(4, 0, 1, 0);
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 5, 0);
	fin(h, "c"); /* its save is under way: retention waits */
	EXPECT(h, "do:c/ckpt save:secondary/RUNNING +5");
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "send:ACK");
	saved(h);
	forget(h);
	tick_used(h, each_block, UINT64_MAX);
	EXPECT(h, "send:ACK save:secondary/RUNNING <5");
	command(h, CMD_DROP, 3); /* waits for it, and finds it gone */
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "cmd=ERR_NOENT");
	host_free(h);
}

#define MIB4 (UINT64_C(4) << 20)

Test(repl, history_max_bytes_thins_the_oldest_down_to_80_percent)
{
	static const uint64_t used[] = {MIB4, MIB4, MIB4, MIB4, MIB4, 0};
	struct host *h = secondary_keeping(6, 1U << 2, 100, 20 << 20); /* 16 MiB are 80 % */
	tick_used(h, used, UINT64_MAX);
	EXPECT(h, "save:secondary/RUNNING <2");
	cr_assert_eq(h->warnings, 1);
	saved(h);
	tick_used(h, used, UINT64_MAX); /* 16 MiB left; 3 is above the pinned one */
	EXPECT(h, "do:merge/own");
	fin_full(h, "merge", -ERR_NOSPC, false, 0, false); /* frees nothing: it stays, for now */
	EXPECT(h, "");
	tick_used(h, used, UINT64_MAX);
	EXPECT(h, "do:merge/own"); /* 4 */
	fin(h, "merge");
	EXPECT(h, "save:secondary/RUNNING -4");
	saved(h);
	tick_used(h, used, UINT64_MAX); /* 12 MiB */
	EXPECT(h, "");
	cr_assert_eq(h->warnings, 1, "said once");
	host_free(h);
}

Test(repl, the_free_space_thins_history_too)
{
	static const uint64_t used[] = {MIB4, MIB4, MIB4, 0};
	struct host *h = secondary_keeping(4, 0, 100, 0);
	tick_used(h, used, (3 << 20) + 1); /* of 15 MiB and a byte 12 are not 80 % */
	EXPECT(h, "");
	tick_used(h, used, 3 << 20);
	EXPECT(h, "save:secondary/RUNNING <2");
	saved(h);
	tick_used(h, used, 1 << 20);
	EXPECT(h, "save:secondary/RUNNING <3");
	saved(h);
	tick_used(h, used, 0);
	EXPECT(h, "save:secondary/RUNNING <4");
	saved(h);
	tick_used(h, used, 0); /* nothing of ours is in the way */
	EXPECT(h, "");
	host_free(h);
}

Test(repl, a_live_epoch_that_fills_the_room_becomes_history)
{
	uint64_t used[] = {MIB4, 3 * MIB4, 0};
	struct host *h = secondary_keeping(2, 1U << 1, 100, 20 << 20);
	tick_used(h, used, UINT64_MAX); /* 1 is pinned: nothing to thin */
	EXPECT(h, "send:CHECKPOINT_WANT");
	for (unsigned i = 0; i < 99; i++) /* it is not taken: not asked for again at once */
		tick_used(h, used, UINT64_MAX);
	EXPECT(h, "");
	tick_used(h, used, UINT64_MAX);
	EXPECT(h, "send:CHECKPOINT_WANT");
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 3, 0);
	fin(h, "c");
	saved(h);
	forget(h);
	tick_used(h, used, UINT64_MAX); /* what it made history of goes */
	EXPECT(h, "send:ACK do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:secondary/RUNNING -2");
	saved(h);
	used[2] = 3 * MIB4; /* and again, not within a second */
	for (unsigned i = 0; i < 8; i++)
		tick_used(h, used, UINT64_MAX);
	EXPECT(h, "");
	tick_used(h, used, UINT64_MAX);
	tick_used(h, used, UINT64_MAX);
	EXPECT(h, "send:CHECKPOINT_WANT");
	host_free(h);
}

/* A large live epoch beside more history: the history goes first. */
Test(repl, an_early_checkpoint_waits_until_the_live_epoch_is_half_of_all)
{
	static const uint64_t used[] = {MIB4, MIB4, MIB4};
	struct host *h = secondary_keeping(3, 0, 100, 15 << 20);
	tick_used(h, used, UINT64_MAX);
	EXPECT(h, "save:secondary/RUNNING <2");
	saved(h);
	tick_used(h, used, UINT64_MAX);
	EXPECT(h, "");
	host_free(h);
}

/* A survivor with checkpoints 1 (pinned), 2, 3 and 4, of which retention is merging 2. */
static struct host *survivor_merging(void)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.n_ckpts = 4;
	m.ckpt_max = 4;
	for (unsigned i = 0; i < 4; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100};
	m.ckpts[0].flags = CKPT_PINNED;
	m.settings.keep_last = 2;
	struct host *h = host_new(&m);
	tick(h, SEC);
	EXPECT(h, "do:merge/own");
	return h;
}

Test(repl, a_drop_waits_for_retentions_merge)
{
	struct host *h = survivor_merging();
	command(h, CMD_DROP, 3);
	EXPECT(h, "");
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -2");
	saved(h);
	EXPECT(h, "do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -3");
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

Test(repl, a_drop_that_waited_finds_what_has_become_of_its_checkpoint)
{
	struct host *h = survivor_merging();
	command(h, CMD_DROP, 2);
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -2");
	saved(h);
	EXPECT(h, "cmd=ERR_NOENT");
	host_free(h);

	h = survivor_merging(); /* the merge fails: the one that asked is not told so, but tries itself */
	command(h, CMD_DROP, 2);
	fin_full(h, "merge", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -2");
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

Test(repl, a_drop_that_waits_ends_with_the_daemon)
{
	struct host *h = survivor_merging();
	command(h, CMD_DROP, 3);
	step(h, (struct repl_event){.type = EV_SHUTDOWN});
	EXPECT(h, "cmd=ERR_CANCELED");
	fin(h, "merge");
	saved(h);
	host_free(h);
}

Test(repl, a_write_without_room_waits_for_retentions_merge)
{
	struct host *h = survivor_out_of_room();
	fin(h, "merge");
	saved(h);
	forget(h);
	command(h, CMD_DROP, 4);
	EXPECT(h, "do:merge/own");
	for (char c = 'A'; c < 'A' + 60; c++) {
		char name[2] = {c, 0};
		if (c != 'B')
			fin(h, name);
	}
	forget(h);
	fin_full(h, "B", -ERR_NOSPC, false, 0, true);
	EXPECT(h, ""); /* 4 is being merged; then it looks again */
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -4");
	saved(h);
	EXPECT(h, "cmd save:standalone/DONE <2");
	saved(h);
	EXPECT(h, "do:B/disk");
	host_free(h);
}

/* ---- held checkpoints ---- */

static void hold(struct host *h, enum repl_cmd cmd, uint64_t number, const char *who)
{
	h->cmd = (struct repl_command){.cmd = cmd, .number = number};
	(void)snprintf(h->cmd.text, sizeof(h->cmd.text), "%s", who);
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
}

/* A survivor with checkpoints 1 to 4; 2 is under a clone. One is kept for good measure. */
static struct host *survivor_with_a_clone(void)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.n_ckpts = 4;
	m.ckpt_max = m.last_stream = 4;
	for (unsigned i = 0; i < 4; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100};
	m.settings.keep_last = 1;
	m.n_clones = 1;
	m.clone_max = 1;
	m.clones[0] = (struct repl_clone){.name = "test", .volume = "vm", .ckpt = 2, .id = 1};
	m.alone = true;
	return host_new(&m);
}

Test(repl, retention_leaves_what_a_clone_or_a_job_holds)
{
	struct host *h = survivor_with_a_clone();
	char buf[HOLDER_SIZE];
	hold(h, CMD_HOLD, 1, "job 7");
	EXPECT(h, "cmd");
	cr_assert_eq(h->cmd.result, 1);
	hold(h, CMD_HOLD, 1, "job 8");
	EXPECT(h, "cmd");
	cr_assert_str_eq(repl_holder(h->r, 2, 0, buf), "clone test");
	cr_assert_null(repl_holder(h->r, 2, 1, buf));
	cr_assert_str_eq(repl_holder(h->r, 1, 1, buf), "job 8");
	cr_assert_null(repl_holder(h->r, 3, 0, buf));
	tick(h, SEC);
	EXPECT(h, "do:merge/own"); /* 3, not 1 or 2 */
	fin(h, "merge");
	EXPECT(h, "save:standalone/DONE -3");
	saved(h);
	tick(h, SEC);
	EXPECT(h, ""); /* of those not held only 4 is left: as many as are kept */
	hold(h, CMD_UNHOLD, 1, "job 7");
	EXPECT(h, "cmd");
	hold(h, CMD_UNHOLD, 1, "job 7");
	EXPECT(h, "cmd=ERR_NOENT");
	tick(h, SEC);
	EXPECT(h, "");
	hold(h, CMD_UNHOLD, 1, "job 8");
	EXPECT(h, "cmd");
	tick(h, SEC);
	EXPECT(h, "save:standalone/DONE <2");
	saved(h);
	hold(h, CMD_HOLD, 1, "job 9");
	EXPECT(h, "cmd=ERR_NOENT");
	host_free(h);
}

Test(repl, a_drop_of_a_held_checkpoint_is_refused_with_the_holders_name)
{
	struct host *h = survivor_with_a_clone();
	command(h, CMD_DROP, 2);
	EXPECT(h, "cmd=ERR_BUSY");
	cr_assert(strstr(h->cmd.err.text, "clone test holds it"), "%s", h->cmd.err.text);
	hold(h, CMD_HOLD, 3, "job 7");
	forget(h);
	command(h, CMD_DROP, 3);
	EXPECT(h, "cmd=ERR_BUSY");
	cr_assert(strstr(h->cmd.err.text, "job 7 holds it"), "%s", h->cmd.err.text);
	host_free(h);
}

/* A hold that comes while its checkpoint is being dropped: until the record is being saved it wins. */
Test(repl, a_hold_beside_a_drop)
{
	struct host *h = survivor_with_a_clone();
	struct repl_command drop = {.cmd = CMD_DROP, .number = 3};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &drop});
	EXPECT(h, "do:merge/own");
	hold(h, CMD_HOLD, 3, "job 7");
	EXPECT(h, "cmd");
	fin(h, "merge");
	EXPECT(h, "cmd=ERR_BUSY");
	cr_assert(strstr(drop.err.text, "job 7 holds it"), "%s", drop.err.text);
	hold(h, CMD_UNHOLD, 3, "job 7");
	tick(h, SEC);
	saved(h); /* retention's, of 1 */
	forget(h);
	drop = (struct repl_command){.cmd = CMD_DROP, .number = 3};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &drop});
	fin(h, "merge");
	EXPECT(h, "do:merge/own save:standalone/DONE -3");
	hold(h, CMD_HOLD, 3, "job 7");
	EXPECT(h, "cmd=ERR_NOENT");
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

/* Unpinned, pinned, held, protected, live. */
Test(repl, want_of_room_takes_held_checkpoints_behind_the_pinned_ones)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.alone = true;
	m.n_ckpts = 5;
	m.ckpt_max = 5;
	for (unsigned i = 0; i < 5; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100, .flags = CKPT_PINNED};
	m.ckpts[3].flags = 0;
	m.n_clones = 1;
	m.clone_max = 1;
	m.clones[0] = (struct repl_clone){.name = "test", .volume = "vm", .ckpt = 1, .id = 1};
	m.target = 2;
	struct host *h = host_new(&m);
	hold(h, CMD_HOLD, 4, "job 7");
	forget(h);
	guest(h, 'A', REPL_WRITE, 0, 4096);
	fin(h, "A"); /* its intent bit */
	forget(h);
	/* 3 by a merge; 1 and 4, which are held; 2, which is protected; 5, the live one */
	const char *const saves[] = {"do:merge/own save:standalone/DONE -3", "save:standalone/DONE <2",
				     "do:merge/own save:standalone/DONE -4", "save:standalone/DONE <3",
				     "save:standalone/DONE <6"};
	for (unsigned i = 0; i < 5; i++) {
		fin_full(h, "A", -ERR_NOSPC, false, 0, true);
		if (i == 0 || i == 2)
			fin(h, "merge");
		EXPECT(h, saves[i]);
		saved(h);
		EXPECT(h, "do:A/disk");
	}
	cr_assert_eq(repl_meta(h->r)->n_clones, 1, "it is there to be removed");
	fin(h, "A");
	EXPECT(h, "done:A");
	host_free(h);
}

/* A primary has no checkpoint of its own: one is taken for the job, and goes with it. */
Test(repl, a_job_on_a_primary_opens_an_epoch_that_goes_with_it)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_DONE);
	struct host *h = host_new(&m);
	struct repl_command other = {.cmd = CMD_HOLD, .text = "job 2"};
	hold(h, CMD_HOLD, 0, "job 1");
	EXPECT(h, "save:primary/DONE +2");
	cr_assert_eq(h->saved.ckpts[0].kind, CKPT_LOCAL);
	cr_assert_eq(h->saved.ckpts[0].flags, CKPT_JOB);
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &other}); /* too late to share it */
	saved(h);
	EXPECT(h, "cmd save:primary/DONE +3");
	cr_assert_eq(h->cmd.result, 2);
	cr_assert_eq(h->cmd.result_time_ns, h->now);
	saved(h);
	EXPECT(h, "cmd");
	cr_assert_eq(other.result, 3);
	/* The newer ends first: it is the live one and stays, for what is saved there belongs to 2 too. */
	hold(h, CMD_UNHOLD, 3, "job 2");
	tick(h, SEC);
	EXPECT(h, "cmd");
	hold(h, CMD_UNHOLD, 2, "job 1");
	EXPECT(h, "cmd do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:primary/DONE -2");
	saved(h);
	tick(h, SEC);
	EXPECT(h, "save:primary/DONE -3"); /* the last one: nothing is saved any more */
	saved(h);
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 0);
	cr_assert_eq(repl_meta(h->r)->ckpt_max, 3);
	host_free(h);
}

Test(repl, jobs_that_come_together_share_an_epoch)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	struct host *h = host_new(&m);
	struct repl_command c[3];
	h->cmd = (struct repl_command){.cmd = CMD_SETTINGS, .settings = m.settings};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd}); /* a save is under way */
	forget(h);
	for (unsigned i = 0; i < 3; i++) {
		c[i] = (struct repl_command){.cmd = CMD_HOLD};
		(void)snprintf(c[i].text, sizeof(c[i].text), "job %u", i);
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &c[i]});
	}
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "cmd save:standalone/DONE +2");
	saved(h);
	EXPECT(h, "cmd cmd cmd");
	for (unsigned i = 0; i < 3; i++)
		cr_assert_eq(c[i].result, 2);
	host_free(h);
}

Test(repl, what_a_dead_job_had_opened_is_let_go_of_at_the_start)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_DONE);
	m.n_ckpts = 3;
	m.ckpt_max = 9;
	m.ckpts[0] = (struct repl_ckpt){.number = 4, .generation = 100, .kind = CKPT_LOCAL, .flags = CKPT_JOB};
	m.ckpts[1] = (struct repl_ckpt){.number = 5, .generation = 100, .kind = CKPT_LOCAL, .flags = CKPT_JOB};
	m.ckpts[2] = (struct repl_ckpt){.number = 9, .generation = 100, .kind = CKPT_LOCAL, .flags = CKPT_PINNED};
	m.n_clones = 1; /* made over it while the job ran */
	m.clone_max = 1;
	m.clones[0] = (struct repl_clone){.name = "test", .volume = "vm", .ckpt = 4, .id = 1};
	struct host *h = host_new(&m);
	tick(h, SEC);
	EXPECT(h, "do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:primary/DONE -5");
	saved(h);
	tick(h, SEC);
	EXPECT(h, "");
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 2);
	cr_assert(repl_shows_ckpt(h->r, 0) && repl_shows_ckpt(h->r, 1));
	host_free(h);

	m.n_clones = 0;
	m.n_ckpts = 3;
	m.ckpts[1].flags = CKPT_PINNED;
	m.ckpts[2].flags = CKPT_JOB; /* the live one can't go */
	h = host_new(&m);
	cr_assert(!repl_shows_ckpt(h->r, 0) && repl_shows_ckpt(h->r, 1) && !repl_shows_ckpt(h->r, 2));
	hold(h, CMD_HOLD, 9, "job 1");
	EXPECT(h, "cmd=ERR_NOENT");
	command(h, CMD_DROP, 9);
	EXPECT(h, "cmd=ERR_NOENT");
	tick(h, SEC);
	EXPECT(h, "do:merge/own");
	fin(h, "merge");
	EXPECT(h, "save:primary/DONE -4");
	saved(h);
	tick(h, SEC);
	EXPECT(h, "");
	host_free(h);
}

Test(repl, a_job_gets_no_epoch_where_the_disk_is_not_served)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	hold(h, CMD_HOLD, 0, "job 1");
	EXPECT(h, "cmd=ERR_STATE");
	hold(h, CMD_HOLD, 1, "job 1"); /* its base */
	EXPECT(h, "cmd");
	for (unsigned i = 2; i <= 64; i++)
		hold(h, CMD_HOLD, 1, "job");
	forget(h);
	hold(h, CMD_HOLD, 1, "job 65");
	EXPECT(h, "cmd=ERR_LIMIT");
	host_free(h);
}

Test(repl, a_hold_whose_record_cannot_be_saved)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	struct host *h = host_new(&m);
	hold(h, CMD_HOLD, 0, "job 1");
	EXPECT(h, "save:standalone/DONE +2");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:standalone/DONE");
	saved(h);
	EXPECT(h, "cmd=ERR_NOSPC");
	hold(h, CMD_HOLD, 0, "job 1");
	EXPECT(h, "save:standalone/DONE +3");
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

/* ---- clones ---- */

static void clone_cmd(struct host *h, struct repl_command *c, enum repl_cmd cmd, const char *name, uint64_t ckpt)
{
	*c = (struct repl_command){.cmd = cmd, .number = ckpt};
	(void)snprintf(c->text, sizeof(c->text), "%s", name);
	step(h, (struct repl_event){.type = EV_COMMAND, .command = c});
}

Test(repl, a_clone_is_there_from_its_record_to_its_record)
{
	struct host *h = survivor_with_a_clone();
	struct repl_command c;
	clone_cmd(h, &c, CMD_CLONE, "again", 3);
	EXPECT(h, "save:standalone/DONE");
	cr_assert_eq(h->saved.n_clones, 2);
	cr_assert_str_eq(h->saved.clones[1].name, "again");
	cr_assert_str_eq(h->saved.clones[1].volume, "vm");
	cr_assert_eq(h->saved.clones[1].ckpt, 3);
	cr_assert_eq(h->saved.clones[1].id, 2);
	cr_assert_eq(h->saved.clones[1].time_ns, h->now);
	cr_assert_eq(repl_meta(h->r)->n_clones, 1, "not before it is durable");
	saved(h);
	EXPECT(h, "cmd");
	clone_cmd(h, &c, CMD_CLONE, "again", 4);
	EXPECT(h, "cmd=ERR_EXIST");
	clone_cmd(h, &c, CMD_CLONE, "more", 7);
	EXPECT(h, "cmd=ERR_NOENT");
	clone_cmd(h, &c, CMD_UNCLONE, "nothing", 0);
	EXPECT(h, "cmd=ERR_NOENT");
	clone_cmd(h, &c, CMD_UNCLONE, "test", 0);
	EXPECT(h, "save:standalone/DONE");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:standalone/DONE");
	cr_assert_eq(h->saved.n_clones, 2, "it stays");
	saved(h);
	EXPECT(h, "cmd=ERR_NOSPC");
	clone_cmd(h, &c, CMD_UNCLONE, "test", 0);
	cr_assert_eq(h->saved.n_clones, 1);
	cr_assert_str_eq(h->saved.clones[0].name, "again");
	saved(h);
	EXPECT(h, "save:standalone/DONE cmd");
	tick(h, SEC);
	EXPECT(h, "save:standalone/DONE <3"); /* 2 too, which nothing holds any more */
	saved(h);
	host_free(h);
}

/* One after another; the next is not looked at before the one before it has ended. */
Test(repl, clones_that_come_together)
{
	struct host *h = survivor_with_a_clone();
	struct repl_command c[5];
	clone_cmd(h, &c[0], CMD_CLONE, "a", 1);
	clone_cmd(h, &c[1], CMD_CLONE, "a", 3);
	clone_cmd(h, &c[2], CMD_UNCLONE, "a", 0);
	clone_cmd(h, &c[3], CMD_CLONE, "a", 3);
	clone_cmd(h, &c[4], CMD_CLONE, "b", 3);
	EXPECT(h, "save:standalone/DONE");
	saved(h);
	EXPECT(h, "cmd cmd=ERR_EXIST save:standalone/DONE");
	saved(h);
	EXPECT(h, "cmd save:standalone/DONE");
	cr_assert_eq(h->saved.clones[1].ckpt, 3);
	cr_assert_eq(h->saved.clones[1].id, 3, "no id is used again");
	step(h, (struct repl_event){.type = EV_SHUTDOWN});
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "cmd cmd=ERR_CANCELED");
	host_free(h);
}

/* A job's epoch was opened without a sync of the disks: its clone has to outlive a crash. */
Test(repl, a_clone_over_a_jobs_checkpoint_syncs_the_disks_first)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.alone = true;
	struct host *h = host_new(&m);
	struct repl_command c;
	hold(h, CMD_HOLD, 0, "job 1");
	saved(h);
	EXPECT(h, "save:standalone/DONE +2 cmd");
	clone_cmd(h, &c, CMD_CLONE, "a", 2);
	EXPECT(h, "do:sync/ckpt");
	hold(h, CMD_UNHOLD, 2, "job 1"); /* the command holds it meanwhile */
	tick(h, SEC);
	EXPECT(h, "cmd");
	fin_full(h, "sync", -ERR_IO, false, 0, false);
	EXPECT(h, "cmd=ERR_IO");
	tick(h, SEC);
	EXPECT(h, "save:standalone/DONE -2");
	saved(h);
	hold(h, CMD_HOLD, 0, "job 1");
	saved(h);
	clone_cmd(h, &c, CMD_CLONE, "a", 3);
	hold(h, CMD_UNHOLD, 3, "job 1");
	forget(h);
	fin(h, "sync");
	EXPECT(h, "save:standalone/DONE");
	saved(h);
	tick(h, SEC);
	EXPECT(h, "cmd");
	clone_cmd(h, &c, CMD_UNCLONE, "a", 0);
	saved(h);
	tick(h, SEC);
	EXPECT(h, "save:standalone/DONE cmd save:standalone/DONE -3");
	saved(h);
	host_free(h);
}

Test(repl, what_no_clone_can_be_made_of)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.n_ckpts = 1;
	m.ckpts[0] = (struct repl_ckpt){.number = 1, .generation = 100, .kind = CKPT_PARTIAL};
	m.n_clones = 0;
	m.clone_max = 0;
	struct host *h = host_new(&m);
	struct repl_command c;
	clone_cmd(h, &c, CMD_CLONE, "a", 1);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
	m.ckpts[0].kind = CKPT_STREAM;
	for (m.n_clones = 0; m.n_clones < GROUP_CLONES_MAX; m.n_clones++) {
		struct repl_clone *k = &m.clones[m.n_clones];
		*k = (struct repl_clone){.volume = "vm", .ckpt = 1, .id = m.n_clones + 1};
		(void)snprintf(k->name, sizeof(k->name), "c%u", m.n_clones);
	}
	m.clone_max = m.n_clones;
	h = host_new(&m);
	clone_cmd(h, &c, CMD_CLONE, "a", 1);
	EXPECT(h, "cmd=ERR_LIMIT");
	host_free(h);
}

Test(repl, a_guests_write_goes_on_when_history_cannot_be_written_at_all)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.alone = true;
	m.n_ckpts = 2;
	m.ckpts[0] = (struct repl_ckpt){.number = 1, .generation = 100, .flags = CKPT_PINNED};
	m.ckpts[1] = (struct repl_ckpt){.number = 2, .generation = 100};
	m.ckpt_max = m.target = 2;
	struct host *h = host_new(&m);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/intent do:a/disk");
	fin_full(h, "a", -ERR_IO, false, 0, true); /* dropping some would not mend the overlay that is written to */
	EXPECT(h, "save:standalone/DONE -all");
	saved(h);
	EXPECT(h, "do:a/disk");
	fin_full(h, "a", -ERR_IO, false, 0, false); /* its own disk is bad: nothing is left to give up */
	EXPECT(h, "done:a=ERR_IO");
	host_free(h);
}

Test(repl, a_guests_write_to_a_full_disk_gets_the_room_of_history)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.alone = true;
	m.n_ckpts = 1;
	m.ckpts[0] = (struct repl_ckpt){.number = 1, .generation = 100};
	struct host *h = host_new(&m);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:a/intent");
	fin_full(h, "a", -ERR_NOSPC, false, 0, false); /* the intent map's room */
	EXPECT(h, "save:standalone/DONE <2");
	saved(h);
	EXPECT(h, "do:a/intent");
	fin(h, "a");
	EXPECT(h, "do:a/disk");
	fin_full(h, "a", -ERR_NOSPC, false, 0, false); /* no history is left: full is full */
	EXPECT(h, "done:a=ERR_NOSPC");
	host_free(h);
}

/* ---- the secondary ---- */

Test(repl, nothing_passes_a_barrier)
{
	struct host *h = secondary();
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	stream(h, 'b', WIRE_WRITE, REPL_WRITE, 3, 4096, 4096);
	stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 4, 0, 0);
	stream(h, 'c', WIRE_WRITE, REPL_WRITE, 5, 65536, 4096);
	EXPECT(h, "do:a/disk do:b/disk");
	fin(h, "b");
	EXPECT(h, "done:b");
	fin(h, "a");
	EXPECT(h, "done:a do:f/disk");
	fin(h, "f");
	EXPECT(h, "send:ACK done:f do:c/disk");
	host_free(h);
}

Test(repl, what_was_received_is_applied_before_a_new_join_is_answered)
{
	struct host *h = secondary();
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 3, 0, 0);
	stream(h, 'b', WIRE_WRITE, REPL_WRITE, 4, 0, 4096);
	EXPECT(h, "do:a/disk");
	link_down(h);
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "");
	fin(h, "a");
	fin(h, "f");
	EXPECT(h, "done:a do:f/disk done:f do:b/disk");
	fin(h, "b");
	EXPECT(h, "done:b send:JOIN send:DIRTY_END");
	host_free(h);
}

/* Found by the simulator: the new session was told of it, in the middle of its handshake. */
Test(repl, what_an_old_session_fails_to_apply_is_no_matter_of_the_new_one)
{
	struct host *h = secondary();
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	EXPECT(h, "do:a/disk");
	link_down(h);
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "");
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "done:a=ERR_NOSPC send:JOIN send:DIRTY_END");
	host_free(h);
}

Test(repl, a_resync_that_is_cut_while_the_disk_syncs_is_begun_again)
{
	struct host *h = secondary();
	link_down(h);
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 100, 0);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	EXPECT(h, "send:JOIN send:DIRTY_END do:r/ckpt");
	link_down(h);
	EXPECT(h, "done:w=ERR_CANCELED");
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, ""); /* the old session's work first */
	fin(h, "r");
	EXPECT(h, "done:r=ERR_CANCELED send:JOIN send:DIRTY_END");
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 100, 0);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	fin(h, "r");
	EXPECT(h, "do:r/ckpt save:secondary/RUNNING +2");
	cr_assert(h->saved.inconsistent);
	saved(h);
	EXPECT(h, "send:RESYNC_READY#1 done:r do:w/disk");
	host_free(h);
}

/* The mark's record waits for another's save, and the connection ends: this copy stays consistent, and a host that was
 * to be given up goes on. */
Test(repl, a_resync_that_is_cut_while_its_record_waits_is_begun_again)
{
	struct host *h = secondary();
	struct repl_command clone = {.cmd = CMD_CLONE, .number = 1, .text = "test"};
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 2, 100, 0);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 3, 0, 4096);
	EXPECT(h, "do:r/ckpt");
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &clone});
	EXPECT(h, "save:secondary/RUNNING");
	fin(h, "r");
	EXPECT(h, "");
	link_down(h);
	link_up(h, false);
	peer_meta.settings.keep_last++; /* of the next session: nothing of this one goes by it */
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "cmd done:r=ERR_CANCELED done:w=ERR_CANCELED send:JOIN send:DIRTY_END save:secondary/RUNNING");
	cr_assert_not(repl_meta(h->r)->inconsistent);
	saved(h);
	EXPECT(h, "");
	host_free(h);

	h = halted(true);
	command(h, CMD_RESOLVE, DISCARD_LOCAL);
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 300, 0);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	struct repl_command set = {.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = peer_meta.settings};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &set});
	fin(h, "r");
	EXPECT(h, "dial send:JOIN send:DIRTY_END do:r/ckpt save:primary/RUNNING");
	link_down(h);
	EXPECT(h, "");
	saved(h);
	cr_assert(strstr(h->trace, "done:r=ERR_CANCELED do:a/intent"), "%s", h->trace);
	cr_assert_eq(repl_meta(h->r)->role, ROLE_PRIMARY);
	host_free(h);
}

Test(repl, a_stop_whose_checkpoint_fails_is_answered)
{
	struct host *h = secondary();
	command(h, CMD_STOP, 0);
	EXPECT(h, "send:STOP_WANT");
	struct repl_io *io = &h->io['c'];
	*io = (struct repl_io){.kind = REPL_CHECKPOINT, .seq = 2, .arg = 2, .owner = 'c'};
	io->flags = WIRE_CKPT_COMMAND | WIRE_CKPT_STOP;
	struct wire_frame f = {.type = WIRE_CHECKPOINT, .seq = 2, .offset = 2};
	step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .io = io});
	fin(h, "c");
	EXPECT(h, "do:c/ckpt save:secondary/DONE +2");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:secondary/RUNNING");
	saved(h);
	EXPECT(h, "send:CHECKPOINT_ACK cmd=ERR_STATE done:c");
	host_free(h);
}

/* It is carried out whatever becomes of its session, and that is what is answered. */
Test(repl, a_stop_whose_checkpoint_has_come_is_answered_by_it)
{
	for (unsigned when = 0; when < 5; when++) {
		struct host *h = secondary();
		command(h, CMD_STOP, 0);
		EXPECT(h, "send:STOP_WANT");
		stream(h, 'w', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
		EXPECT(h, "do:w/disk");
		if (when == 4) { /* it has not come */
			link_down(h);
			EXPECT(h, "cmd=ERR_PEER");
			host_free(h);
			continue;
		}
		struct repl_io *io = &h->io['c'];
		*io = (struct repl_io){.kind = REPL_CHECKPOINT, .seq = 3, .arg = 2, .owner = 'c'};
		io->flags = WIRE_CKPT_COMMAND | WIRE_CKPT_STOP;
		struct wire_frame f = {.type = WIRE_CHECKPOINT, .seq = 3, .offset = 2};
		step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .io = io});
		EXPECT(h, "");
		if (when == 0 || when == 3) { /* behind a write that is under way */
			link_down(h);
			EXPECT(h, "");
		}
		fin_full(h, "w", when == 3 ? -ERR_IO : 0, false, 0, false);
		if (when == 3) {
			EXPECT(h, "done:w=ERR_IO done:c=ERR_CANCELED cmd=ERR_PEER");
			host_free(h);
			continue;
		}
		EXPECT(h, "done:w do:c/ckpt");
		if (when == 1) { /* while the disk is synced */
			link_down(h);
			EXPECT(h, "");
		}
		fin(h, "c");
		EXPECT(h, "save:secondary/DONE +2");
		if (when == 2) {
			link_down(h);
			EXPECT(h, "");
		}
		saved(h);
		EXPECT(h, "cmd done:c");
		cr_assert_eq(repl_meta(h->r)->state, STATE_DONE);
		host_free(h);
	}
}

/* The primary drops a STOP_WANT that finds it behind, or with a detached disk. */
Test(repl, a_stop_that_the_primary_overtakes_is_answered)
{
	struct host *h = secondary();
	command(h, CMD_STOP, 0);
	EXPECT(h, "send:STOP_WANT");
	frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
	EXPECT(h, "cmd=ERR_STATE");
	cr_assert_eq(link_of(h), LINK_RESYNC);
	host_free(h);

	h = secondary();
	command(h, CMD_STOP, 0);
	EXPECT(h, "send:STOP_WANT");
	struct repl_io *io = &h->io['d'];
	*io = (struct repl_io){
	    .kind = REPL_DETACH, .seq = 2, .owner = 'd', .lineage = {.current = 300, .history = {100}}};
	struct wire_frame f = {.type = WIRE_DETACH, .seq = 2};
	step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .io = io});
	fin(h, "d");
	forget(h);
	saved(h);
	EXPECT(h, "cmd=ERR_STATE send:ACK done:d");
	host_free(h);
}

/* ---- a record whose save failed, and may be found all the same ---- */

static void checkpoint_that_fails(struct host *h)
{
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 3, 0, 4096);
	fin(h, "c");
	EXPECT(h, "do:c/ckpt save:secondary/RUNNING +2");
	cr_assert_eq(h->saved.base, 2);
	save_fails(h, -ERR_IO);
	/* The switch may be found: nothing behind the barrier is written before the old record stands again. */
	EXPECT(h, "save:secondary/RUNNING");
	cr_assert_eq(h->saved.base, 1);
	cr_assert_eq(h->saved.n_ckpts, 1);
}

Test(repl, a_failed_switch_is_taken_back_before_anything_is_applied_on_top)
{
	struct host *h = secondary();
	checkpoint_that_fails(h);
	guest(h, 'g', REPL_WRITE, 65536, 4096); /* to active, which the other record has emptied */
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "send:CHECKPOINT_ACK done:c do:w/disk do:g/active");
	fin(h, "w");
	fin(h, "g");
	EXPECT(h, "done:w done:g");
	host_free(h);
}

Test(repl, while_the_record_cannot_be_saved_nothing_is_applied_or_answered)
{
	struct host *h = secondary();
	struct repl_status s;
	checkpoint_that_fails(h);
	guest(h, 'g', REPL_WRITE, 65536, 4096);
	save_fails(h, -ERR_IO);
	EXPECT(h, "send:CHECKPOINT_ACK done:c send:IO_ERROR close done:w=ERR_CANCELED done:g=ERR_IO");
	guest(h, 'g', REPL_WRITE, 0, 4096);
	EXPECT(h, "done:g=ERR_IO");
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.error.code, ERR_IO);
	cr_assert_str_eq(s.error.operation, "metadata");
	/* It is tried again by itself, and all goes on when it stands. */
	tick(h, SEC / 2);
	EXPECT(h, "");
	tick(h, SEC / 2);
	EXPECT(h, "save:secondary/RUNNING");
	guest(h, 'g', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "do:g/active");
	host_free(h);
}

/* What was received stands behind a record that can't be saved, so a failover can't come about either. */
Test(repl, a_failover_is_answered_while_the_record_cannot_be_saved)
{
	for (unsigned late = 0; late < 2; late++) {
		struct host *h = secondary();
		stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
		stream(h, 'w', WIRE_WRITE, REPL_WRITE, 3, 0, 4096);
		fin(h, "c");
		EXPECT(h, "do:c/ckpt save:secondary/RUNNING +2");
		if (late)
			link_down(h);
		else
			command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
		EXPECT(h, late ? "" : "send:GOODBYE close");
		save_fails(h, -ERR_IO);
		EXPECT(h, "save:secondary/RUNNING");
		save_fails(h, -ERR_IO);
		EXPECT(h, late ? "done:c" : "done:c cmd=ERR_IO");
		if (late) {
			command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
			EXPECT(h, "");
			tick(h, SEC);
			EXPECT(h, "save:secondary/RUNNING");
			save_fails(h, -ERR_IO);
			EXPECT(h, "cmd=ERR_IO");
		}
		/* As soon as it can be, all goes on. */
		tick(h, SEC);
		EXPECT(h, "save:secondary/RUNNING");
		saved(h);
		EXPECT(h, "do:w/disk");
		command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
		fin(h, "w");
		EXPECT(h, "done:w do:mark/own");
		host_free(h);
	}
}

/* The source may not have begun yet: in the handshake an IO_ERROR is out of order. */
Test(repl, a_record_that_cannot_be_saved_before_the_first_frame_refuses_the_session)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN send:DIRTY_END");
	command(h, CMD_DISCARD, 0);
	save_fails(h, -ERR_IO);
	EXPECT(h, "save:secondary/RUNNING save:secondary/RUNNING");
	save_fails(h, -ERR_IO);
	EXPECT(h, "cmd=ERR_IO send:REFUSE close");
	host_free(h);
}

Test(repl, a_failed_discard_is_taken_back_before_active_is_written)
{
	struct host *h = secondary();
	command(h, CMD_DISCARD, 0);
	EXPECT(h, "save:secondary/RUNNING");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:secondary/RUNNING");
	guest(h, 'g', REPL_WRITE, 0, 4096);
	cr_assert_eq(h->cmd_count, 0, "not before it is certain that nothing was discarded");
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "cmd=ERR_NOSPC do:g/active");
	host_free(h);
}

Test(repl, a_generation_that_could_not_be_saved_is_begun_on_the_record_as_it_was)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	struct host *h = host_new(&m);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "save:standalone/DONE");
	uint64_t first = h->saved.lineage.current;
	cr_assert_neq(first, 100);
	save_fails(h, -ERR_IO);
	EXPECT(h, "save:standalone/DONE");
	cr_assert_eq(h->saved.lineage.current, 100);
	guest(h, 'b', REPL_WRITE, 8192, 4096); /* waits for its own, behind that */
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "done:a=ERR_IO done:b=ERR_IO");
	guest(h, 'b', REPL_WRITE, 8192, 4096);
	EXPECT(h, "save:standalone/DONE");
	cr_assert_neq(h->saved.lineage.current, first);
	saved(h);
	EXPECT(h, "do:b/intent");
	host_free(h);
}

/* ---- no room on the secondary: on_cow_error ---- */

/* Checkpoints 1 to n, those in `pinned` (a mask) pinned; the view stands on the last. */
static struct host *secondary_with(enum on_cow_error policy, unsigned n, unsigned pinned)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	m.settings.on_cow_error = policy;
	m.n_ckpts = n;
	for (unsigned i = 0; i < n; i++)
		m.ckpts[i] =
		    (struct repl_ckpt){.number = i + 1, .generation = 100, .flags = pinned >> i & 1 ? CKPT_PINNED : 0};
	m.base = m.last_stream = m.ckpt_max = n;
	struct host *h = secondary_of(&m);
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	stream(h, 'b', WIRE_WRITE, REPL_WRITE, 3, 8192, 4096);
	stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 4, 0, 0);
	EXPECT(h, "do:a/disk do:b/disk");
	return h;
}

Test(repl, a_failover_whose_dirty_map_cannot_be_written_changes_nothing)
{
	struct host *h = secondary();
	command(h, CMD_FAILOVER, FAILOVER_LATEST);
	EXPECT(h, "send:GOODBYE close do:mark/own");
	fin_full(h, "mark", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "cmd=ERR_NOSPC");
	cr_assert(strstr(h->cmd.err.text, "nothing was changed"), "%s", h->cmd.err.text);
	cr_assert_eq(repl_meta(h->r)->role, ROLE_SECONDARY);
	command(h, CMD_FAILOVER, FAILOVER_LATEST); /* the same again */
	EXPECT(h, "do:mark/own");
	host_free(h);
}

/* The record that stops it is on its way: it runs, but not for long. */
Test(repl, a_failback_that_was_is_not_answered_while_a_stop_is_being_saved)
{
	struct host *h = primary(PROTOCOL_F);
	struct repl_command again = {.cmd = CMD_FAILBACK, .text = "peer:1"};
	link_down(h);
	forget(h);
	command(h, CMD_STOP, 0);
	EXPECT(h, "save:primary/DONE");
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &again});
	EXPECT(h, "cmd=ERR_BUSY");
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

/* The view's overlay is empty, but a write to it had failed: over the new base it is another. */
Test(repl, a_checkpoint_leaves_behind_what_a_failed_write_to_the_view_left)
{
	for (unsigned unsure = 0; unsure < 2; unsure++) {
		struct host *h = secondary();
		uint64_t was = repl_meta(h->r)->active_id;
		stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
		EXPECT(h, "do:c/ckpt");
		fin_full(h, "c", 0, unsure, 0, false);
		EXPECT(h, "save:secondary/RUNNING +2");
		cr_assert_eq(h->saved.active_id, was + unsure);
		host_free(h);
	}
}

/* The same where a failover goes to another checkpoint. */
Test(repl, a_failover_to_another_checkpoint_begins_an_active_overlay)
{
	for (uint64_t to = 1; to <= 2; to++) {
		struct host *h = secondary_keeping(2, 0, 8, 0);
		uint64_t was = repl_meta(h->r)->active_id;
		command(h, CMD_FAILOVER, to);
		fin(h, "mark");
		fin(h, "sync");
		EXPECT(h, "send:GOODBYE close do:mark/own do:sync/disk save:standalone/FAILOVER +3");
		cr_assert_eq(h->saved.active_id, was + (to == 1));
		host_free(h);
	}
}

/* ---- as many checkpoints as a record can hold ---- */

/* Checkpoints 1 to n, all of which a rule keeps: the newest 2000, one a minute before those, one an hour at the
 * beginning. `first` are the flags of the oldest. */
static void full_of(struct repl_meta *m, unsigned n, unsigned first)
{
	const uint64_t minute = 60 * SEC;
	m->n_ckpts = n;
	m->ckpt_max = m->last_stream = n;
	for (unsigned i = 0; i < n; i++) {
		uint64_t age = n - 1 - i, minutes = age < 2000 ? 0 : age < 3999 ? age - 1999 : 2000 + 60 * (age - 3998);
		m->ckpts[i] =
		    (struct repl_ckpt){.number = i + 1, .generation = 100, .time_ns = (10000000 - minutes) * minute};
	}
	m->ckpts[0].flags = (uint8_t)first;
	m->settings.keep_last = m->settings.keep_minutely = m->settings.keep_hourly = 2000;
}

/* In sync; the last is the base. */
static struct host *secondary_full(unsigned n, unsigned first)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	full_of(&m, n, first);
	m.base = n;
	return secondary_of(&m);
}

/* What was received is kept whatever it takes; the last room there is is for that. */
Test(repl, a_failover_keeps_what_was_received_though_there_are_as_many_checkpoints_as_can_be)
{
	struct host *h = secondary_full(4095, 0);
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	fin(h, "mark");
	fin(h, "sync");
	EXPECT(h, "send:GOODBYE close do:mark/own do:sync/disk save:standalone/FAILOVER +4096 <2");
	cr_assert_eq(h->saved.received, 4096);
	saved(h);
	host_free(h);

	h = secondary_full(4095, CKPT_PINNED);
	command(h, CMD_FAILOVER, 7);
	fin(h, "mark");
	fin(h, "sync");
	EXPECT(h, "send:GOODBYE close do:mark/own do:sync/disk cmd=ERR_LIMIT");
	cr_assert_eq(repl_meta(h->r)->role, ROLE_SECONDARY);
	cr_assert_eq(repl_volume_state(h->r, 0)->todo.count, 0);
	command(h, CMD_FAILOVER, FAILOVER_LATEST); /* it is all on the disk */
	fin(h, "mark");
	fin(h, "sync");
	EXPECT(h, "do:mark/own do:sync/disk save:standalone/DONE");
	cr_assert_eq(h->saved.n_ckpts, 4095);
	host_free(h);
}

Test(repl, a_checkpoint_for_which_none_may_go_is_not_taken)
{
	for (unsigned held = 0; held < 3; held++) {
		struct host *h = secondary_full(4079, held == 1 ? CKPT_PINNED : 0);
		if (held == 2) {
			hold(h, CMD_HOLD, 1, "job 1");
			EXPECT(h, "cmd");
		}
		command(h, CMD_CHECKPOINT, 0);
		EXPECT(h, "send:CHECKPOINT_WANT");
		stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 4080, 0);
		h->io['c'].flags = WIRE_CKPT_COMMAND;
		fin(h, "c");
		if (!held) {
			EXPECT(h, "do:c/ckpt save:secondary/RUNNING +4080 <2");
			host_free(h);
			continue;
		}
		EXPECT(h, "do:c/ckpt send:CHECKPOINT_ACK cmd=ERR_LIMIT done:c");
		cr_assert(repl_meta(h->r)->n_ckpts == 4079 && repl_meta(h->r)->base == 4079);
		/* Room is made out of the middle, though the rules keep all. */
		tick(h, SEC);
		EXPECT(h, "send:ACK do:merge/own");
		fin(h, "merge");
		EXPECT(h, "save:secondary/RUNNING -2");
		saved(h);
		stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 3, 4081, 0);
		fin(h, "c");
		EXPECT(h, "do:c/ckpt save:secondary/RUNNING +4081");
		saved(h);
		/* A stop's is not refused for want of room among those that may be. */
		stream(h, 's', WIRE_CHECKPOINT, REPL_CHECKPOINT, 4, 4082, 0);
		forget(h);
		h->io['s'].flags = WIRE_CKPT_COMMAND | WIRE_CKPT_STOP;
		fin(h, "s");
		EXPECT(h, "save:secondary/DONE +4082");
		host_free(h);
	}
}

Test(repl, a_resync_that_can_keep_nothing_changes_nothing)
{
	struct host *h = secondary_full(4095, CKPT_PINNED);
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 2, 100, 0);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 3, 0, 4096);
	fin(h, "r");
	EXPECT(h, "do:r/ckpt send:IO_ERROR#2 close done:r=ERR_LIMIT done:w=ERR_CANCELED");
	cr_assert_not(repl_meta(h->r)->inconsistent);
	host_free(h);

	h = secondary_full(4094, CKPT_PINNED); /* one of the last is for it */
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 2, 100, 0);
	fin(h, "r");
	EXPECT(h, "do:r/ckpt save:secondary/RUNNING +4095");
	host_free(h);
}

Test(repl, a_job_for_whose_epoch_none_may_go_is_told_so)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	full_of(&m, 4079, CKPT_PINNED);
	m.alone = true;
	struct host *h = host_new(&m);
	hold(h, CMD_HOLD, 0, "job 1");
	EXPECT(h, "cmd=ERR_LIMIT");
	cr_assert(strstr(h->cmd.err.text, "as many checkpoints"), "%s", h->cmd.err.text);
	host_free(h);
}

/* The dirty map of the one that was chosen is being written: from there on it is there. */
Test(repl, a_checkpoint_that_a_failover_has_chosen_is_not_dropped)
{
	struct host *h = secondary_keeping(4, 0, 8, 0);
	command(h, CMD_FAILOVER, 2);
	EXPECT(h, "send:GOODBYE close do:mark/own");
	struct repl_command drop = {.cmd = CMD_DROP, .number = 2};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &drop});
	EXPECT(h, "cmd=ERR_BUSY");
	fin(h, "mark");
	EXPECT(h, "do:sync/disk");
	fin(h, "sync");
	EXPECT(h, "save:standalone/FAILOVER +5");
	saved(h);
	cr_assert_eq(repl_meta(h->r)->target, 2);
	host_free(h);
}

static void settings_frame(struct host *h, const struct settings *s)
{
	uint8_t buf[WIRE_SETTINGS_MAX];
	struct wbuf w = {.data = buf, .size = sizeof(buf)};
	settings_encode(s, &w);
	frame(h, WIRE_SETTINGS, 7, 0, 0, buf, (uint32_t)w.len);
}

Test(repl, settings_that_the_secondary_cannot_save_are_answered)
{
	struct host *h = secondary();
	settings_frame(h, &repl_meta(h->r)->settings);
	EXPECT(h, "save:secondary/RUNNING");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:secondary/RUNNING");
	saved(h);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* The record that begins a resync takes the source's settings: its newest, not those of its JOIN. */
Test(repl, a_resync_that_begins_leaves_newer_settings)
{
	struct host *h = secondary();
	struct settings s = repl_meta(h->r)->settings;
	s.keep_last = 77;
	frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 2, 100, 0);
	settings_frame(h, &s);
	EXPECT(h, "do:r/ckpt save:secondary/RUNNING");
	saved(h);
	fin(h, "r");
	saved(h);
	cr_assert_eq(repl_meta(h->r)->inconsistent, true);
	cr_assert_eq(repl_meta(h->r)->settings.keep_last, 77);
	host_free(h);
}

Test(repl, settings_of_the_join_that_cannot_be_saved_end_the_session)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	peer_meta.settings.keep_last = 77;
	struct host *h = host_new(&m);
	link_up(h, false);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN send:DIRTY_END save:secondary/RUNNING");
	save_fails(h, -ERR_IO);
	saved(h);
	EXPECT(h, "save:secondary/RUNNING send:REFUSE close");
	host_free(h);
}

Test(repl, settings_changed_during_the_handshake_follow_it)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	struct settings s = m.settings;
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	s.keep_last = 77;
	set_now(h, s);
	EXPECT(h, "save:primary/RUNNING cmd");
	join_frame(h, &peer_meta, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	saved(h);
	EXPECT(h, "do:intents/own save:primary/RUNNING send:SETTINGS#1 send:RESYNC_DONE#1");
	host_free(h);
}

/* Two that were asked for at the same time saw the same ones: neither takes the other's back. */
Test(repl, a_change_of_settings_leaves_the_others)
{
	struct host *h = primary(PROTOCOL_F);
	struct settings a = repl_meta(h->r)->settings, b = a;
	a.keep_last = 77;
	b.resync_rate = 1 << 20;
	h->cmd = (struct repl_command){.cmd = CMD_SETTINGS, .number = UINT64_C(1) << SETTING_keep_last, .settings = a};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	saved(h);
	frame(h, WIRE_SETTINGS_ACK, 1, 0, 0, NULL, 0);
	EXPECT(h, "save:primary/RUNNING send:SETTINGS#1 cmd");
	h->cmd =
	    (struct repl_command){.cmd = CMD_SETTINGS, .number = UINT64_C(1) << SETTING_resync_rate, .settings = b};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	saved(h);
	cr_assert_eq(repl_meta(h->r)->settings.keep_last, 77);
	cr_assert_eq(repl_meta(h->r)->settings.resync_rate, 1 << 20);
	host_free(h);
}

Test(repl, settings_are_the_primarys)
{
	struct host *h = secondary();
	struct settings s = repl_meta(h->r)->settings;
	h->cmd = (struct repl_command){.cmd = CMD_SETTINGS, .number = SETTINGS_ALL, .settings = s};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	EXPECT(h, "cmd=ERR_STATE");
	cr_assert(strstr(h->cmd.err.text, "set it on the primary"), "%s", h->cmd.err.text);
	host_free(h);
}

Test(repl, on_cow_error_stop_stops_and_keeps_all)
{
	struct host *h = secondary_with(ON_COW_ERROR_STOP, 3, 0);
	struct repl_status s;
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.link, LINK_DOWN, "a session that is being closed is not in sync");
	cr_assert_eq(s.error.code, ERR_NOSPC);
	cr_assert_str_eq(s.error.operation, "cow");
	cr_assert_eq(s.checkpoint, 3);
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_NOSPC done:f=ERR_CANCELED");
	fin(h, "b");
	EXPECT(h, "done:b");
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 3);
	host_free(h);
}

/* What B calls received is in this host's memory. Where applying stops it is dropped, behind a barrier or not: a guest
 * was told that it is here, so until the primary has synced it again it is safe there alone (docs/FAILURES.md). */
Test(repl, under_b_what_was_received_is_dropped_where_applying_stops)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	m.settings.protocol = PROTOCOL_B;
	struct host *h = secondary_of(&m);
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 3, 0, 0);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 4, 65536, 4096);
	step(h, (struct repl_event){.type = EV_BATCH});
	EXPECT(h, "do:a/disk send:ACK"); /* received: 4 */
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_NOSPC done:f=ERR_CANCELED done:w=ERR_CANCELED");
	host_free(h);
}

Test(repl, under_b_what_the_peer_dropped_is_dirty_here_and_sent_again)
{
	struct host *h = warm_primary(PROTOCOL_B);
	tick(h, 2 * SEC); /* a clear cycle: what was written before is clean */
	ack(h, 4, 4, 4);
	fin(h, "sync");
	cr_assert_not(dirty(h, 0));
	forget(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/disk send:WRITE#5");
	ack(h, 5, 4, 4);
	EXPECT(h, "done:a"); /* received is all that B asks for */
	uint8_t buf[64];
	struct wire_refuse x = {.code = ERR_NOSPC, .text = "cow"};
	int n = wire_refuse_encode(&x, buf, sizeof(buf));
	frame(h, WIRE_IO_ERROR, 5, 0, 4096, buf, (uint32_t)n);
	EXPECT(h, "close");
	cr_assert(dirty(h, 0));
	cr_assert_eq(repl_volume_state(h->r, 0)->dirty.count, 1);
	connect(h, &peer_meta);
	EXPECT(h, "send:RESYNC_BEGIN#1");
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	fin_full(h, "scan", 0, false, 65536, false);
	fin(h, "read");
	EXPECT(h, "do:scan/own do:read/own send:RESYNC_WRITE#2 send:RESYNC_DONE#3");
	host_free(h);
}

Test(repl, on_cow_error_drop_history_drops_the_oldest_that_nothing_needs_then_stops)
{
	struct host *h = secondary_with(ON_COW_ERROR_DROP_HISTORY, 3, 0);
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "save:secondary/RUNNING <2");
	fin_full(h, "b", -ERR_NOSPC, false, 0, true); /* shares it */
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "do:a/disk do:b/disk"); /* no barrier passed meanwhile */
	fin(h, "b");
	EXPECT(h, "done:b");
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "save:secondary/RUNNING <3");
	saved(h);
	EXPECT(h, "do:a/disk");
	fin_full(h, "a", -ERR_NOSPC, false, 0, true); /* the base is left: never that */
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_NOSPC done:f=ERR_CANCELED");
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 1);
	cr_assert_eq(repl_meta(h->r)->base, 3);
	host_free(h);
}

Test(repl, on_cow_error_drop_history_leaves_pinned_ones_and_keeps_all_when_it_cannot_help)
{
	struct host *h = secondary_with(ON_COW_ERROR_DROP_HISTORY, 3, 1);
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "do:merge/own"); /* 2, above the pinned one */
	fin_full(h, "merge", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_NOSPC done:f=ERR_CANCELED");
	host_free(h);
	h = secondary_with(ON_COW_ERROR_DROP_HISTORY, 3, 0);
	fin_full(h, "a", -ERR_IO, false, 0, true); /* no drop mends a disk */
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_IO done:f=ERR_CANCELED");
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 3);
	host_free(h);
}

Test(repl, on_cow_error_break_gives_all_up_durably_before_it_overwrites)
{
	struct host *h = secondary_with(ON_COW_ERROR_BREAK, 3, 7);
	struct repl_status s;
	fin_full(h, "a", -ERR_IO, false, 0, true);
	EXPECT(h, "save:secondary/RUNNING -all");
	cr_assert(h->saved.broken);
	cr_assert_eq(h->saved.n_ckpts, 0);
	cr_assert_eq(h->saved.last_stream, 0);
	fin_full(h, "b", -ERR_IO, false, 0, true);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "send:HISTORY_LOST do:a/disk do:b/disk");
	fin(h, "a");
	fin(h, "b");
	fin(h, "f");
	EXPECT(h, "done:a done:b do:f/disk send:ACK done:f");
	cr_assert_eq(repl_serving(repl_meta(h->r), false), SERVING_EIO);
	guest(h, 'g', REPL_WRITE, 0, 4096);
	EXPECT(h, "done:g=ERR_IO");
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.checkpoint, 0);
	cr_assert_eq(s.error.code, ERR_IO);
	cr_assert_str_eq(s.error.operation, "cow");
	cr_assert(s.degraded);
	/* The next checkpoint makes it valid again. */
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 5, 4, 0);
	fin(h, "c");
	EXPECT(h, "do:c/ckpt save:secondary/RUNNING +4");
	saved(h);
	cr_assert_not(repl_meta(h->r)->broken);
	cr_assert_eq(repl_serving(repl_meta(h->r), false), SERVING_VIEW);
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.checkpoint, 4);
	cr_assert_not(s.degraded);
	host_free(h);
}

Test(repl, a_primary_knows_that_its_peers_checkpoints_are_given_up_until_the_next)
{
	struct host *h = primary(PROTOCOL_F);
	struct repl_status s;
	uint8_t buf[WIRE_TEXT_MAX + 8];
	struct wire_refuse x = {.code = ERR_NOSPC, .text = "all given up"};
	int n = wire_refuse_encode(&x, buf, sizeof(buf));
	frame(h, WIRE_HISTORY_LOST, 0, 0, 0, buf, (uint32_t)n);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert(h->saved.broken);
	saved(h);
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.error.code, ERR_NOSPC);
	cr_assert(s.degraded);
	cr_assert_eq(s.link, LINK_SYNCED);
	command(h, CMD_CHECKPOINT, 0);
	EXPECT(h, "send:CHECKPOINT#3");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_not(h->saved.broken);
	saved(h);
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.error.code, 0);
	cr_assert_not(s.degraded);
	host_free(h);
}

Test(repl, on_cow_error_break_whose_record_cannot_be_saved_stops)
{
	struct host *h = secondary_with(ON_COW_ERROR_BREAK, 1, 0);
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:secondary/RUNNING -all save:secondary/RUNNING");
	fin(h, "b");
	EXPECT(h, "done:b");
	saved(h);
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_NOSPC done:f=ERR_CANCELED");
	cr_assert_not(repl_meta(h->r)->broken);
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 1);
	host_free(h);
}

/* It may be found by the next start, with no view and no base for what a guest has written to that: until the record as
 * it is stands again, nothing is answered that would be lost by it. */
Test(repl, while_a_break_may_be_in_the_record_the_view_answers_nothing)
{
	struct host *h = secondary_with(ON_COW_ERROR_BREAK, 1, 0);
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	save_fails(h, -ERR_NOSPC);
	guest(h, 'g', REPL_WRITE, 65536, 4096);
	EXPECT(h, "save:secondary/RUNNING -all save:secondary/RUNNING");
	save_fails(h, -ERR_IO);
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_NOSPC done:f=ERR_CANCELED done:g=ERR_IO");
	guest(h, 'g', REPL_FLUSH, 0, 0);
	EXPECT(h, "done:g=ERR_IO");
	fin(h, "b");
	EXPECT(h, "done:b");
	tick(h, SEC);
	EXPECT(h, "save:secondary/RUNNING");
	saved(h);
	guest(h, 'g', REPL_WRITE, 65536, 4096);
	EXPECT(h, "do:g/active");
	host_free(h);
}

Test(repl, on_cow_error_break_acts_as_stop_while_the_disk_is_inconsistent)
{
	struct host *h = secondary_with(ON_COW_ERROR_BREAK, 3, 0);
	struct repl_meta *m = h->metas[0] == repl_meta(h->r) ? h->metas[0] : h->metas[1];
	m->inconsistent = true;
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_NOSPC done:f=ERR_CANCELED");
	host_free(h);
}

Test(repl, a_failover_from_a_broken_secondary_needs_latest)
{
	struct host *h = secondary_with(ON_COW_ERROR_BREAK, 1, 0);
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	saved(h);
	fin(h, "a");
	fin(h, "b");
	fin(h, "f");
	forget(h);
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	EXPECT(h, "cmd=ERR_STATE");
	cr_assert(strstr(h->cmd.err.text, "--to latest"), "%s", h->cmd.err.text);
	command(h, CMD_FAILOVER, FAILOVER_LATEST);
	EXPECT(h, "send:GOODBYE close do:mark/own");
	fin(h, "mark");
	fin(h, "sync");
	EXPECT(h, "do:sync/disk save:standalone/DONE");
	cr_assert_not(h->saved.broken);
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

/* What went through the peer stands in nobody's dirty set, and the disk here lacks it: whatever is synced after a
 * failover to it, everything has to be looked at. */
Test(repl, a_failover_by_force_to_a_disk_that_was_detached_counts_all_of_it_as_dirty)
{
	for (int fails = 0; fails < 2; fails++) {
		static struct repl_meta m;
		meta_of(&m, ROLE_SECONDARY, STATE_NONE);
		m.shut_out = true;
		m.n_ckpts = 0;
		m.base = m.last_stream = 0;
		m.volumes[0].flags = VOLUME_STALE;
		struct host *h = host_new(&m);
		command(h, CMD_FAILOVER, FAILOVER_LATEST);
		EXPECT(h, "cmd=ERR_STATE");
		h->cmd = (struct repl_command){.cmd = CMD_FAILOVER, .number = FAILOVER_LATEST, .flags = FAILOVER_FORCE};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
		EXPECT(h, "do:mark/own");
		struct repl_volume_state *v = repl_volume_state(h->r, 0);
		cr_assert_eq(v->marking.count, v->marking.nbits);
		cr_assert_eq(v->todo.count, 0);
		fin_full(h, "mark", fails ? -ERR_IO : 0, false, 0, false);
		cr_assert_eq(v->dirty.count, v->dirty.nbits);
		if (fails) {
			EXPECT(h, "cmd=ERR_IO");
			cr_assert_eq(v->intent.count, 0);
		} else {
			cr_assert_eq(v->intent.count, v->intent.nbits);
			fin(h, "sync");
			EXPECT(h, "do:sync/disk save:standalone/DONE");
			cr_assert_eq(h->saved.volumes[0].flags, 0);
			saved(h);
			EXPECT(h, "cmd");
			cr_assert_eq(v->dirty.count, v->dirty.nbits);
		}
		host_free(h);
	}
}

/* ---- resync as target ---- */

Test(repl, a_resync_begins_behind_what_was_in_sync_and_may_begin_again)
{
	struct host *h = secondary();
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	frame(h, WIRE_BEHIND, 0, WIRE_BEHIND_PAUSED, 0, NULL, 0);
	cr_assert_eq(link_of(h), LINK_RESYNC);
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 3, 200, 0);
	stream(h, 'b', WIRE_RESYNC_WRITE, REPL_WRITE, 4, 65536, 4096);
	EXPECT(h, "do:a/disk");
	fin(h, "a");
	EXPECT(h, "done:a do:r/ckpt");
	fin(h, "r");
	EXPECT(h, "save:secondary/RUNNING +2"); /* what it had, with a in it [PREKEEP] */
	cr_assert(h->saved.inconsistent);
	cr_assert_not(h->saved.own_dirty);
	cr_assert_eq(h->saved.sync_from, 200);
	cr_assert_eq(h->saved.last_stream, 1);
	saved(h);
	EXPECT(h, "send:RESYNC_READY#3 done:r do:b/disk");
	fin(h, "b");
	frame(h, WIRE_BEHIND, 0, WIRE_BEHIND_CONGESTED, 0, NULL, 0);
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 5, 300, 0);
	fin(h, "r");
	EXPECT(h, "done:b do:r/ckpt save:secondary/RUNNING"); /* no second checkpoint [PREONCE] */
	cr_assert_eq(h->saved.sync_from, 300);
	saved(h);
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 6, 0, 0);
	fin(h, "d");
	EXPECT(h, "send:RESYNC_READY#5 done:r do:d/disk save:secondary/RUNNING");
	cr_assert_not(h->saved.inconsistent);
	cr_assert_eq(h->saved.last_stream, 1, "the last good one until the resync has taken its own");
	cr_assert_eq(h->saved.kept, 2);
	saved(h);
	cr_assert_eq(link_of(h), LINK_SYNCED);
	forget(h);
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 7, 3, 0);
	fin(h, "c");
	cr_assert_eq(h->saved.last_stream, 3);
	cr_assert_eq(h->saved.kept, 0);
	cr_assert_eq(h->saved.ckpts[1].flags, 0, "pinned until then");
	host_free(h);
}

Test(repl, a_primary_whose_queue_is_full_again_and_again_is_said_once)
{
	struct host *h = secondary();
	bitmap_set_range(&repl_volume_state(h->r, 0)->dirty, 0, 1); /* of its own: kept for good */
	uint64_t seq = 2;
	h->warnings = 0;
	for (int round = 0; round < 3; round++) {
		frame(h, WIRE_BEHIND, 0, WIRE_BEHIND_CONGESTED, 0, NULL, 0);
		stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, seq++, 200, 0);
		fin(h, "r");
		saved(h);
		cr_assert_eq(h->warnings, 2, "that it falls behind, and what is kept");
	}
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, seq++, 0, 0);
	fin(h, "d");
	saved(h);
	cr_assert_eq(link_of(h), LINK_SYNCED);
	frame(h, WIRE_BEHIND, 0, WIRE_BEHIND_CONGESTED, 0, NULL, 0);
	cr_assert_eq(h->warnings, 3);
	host_free(h);
}

Test(repl, what_a_stream_may_not_hold)
{
	static const struct {
		unsigned type;
		enum repl_kind kind;
		bool behind;
	} bad[] = {{WIRE_RESYNC_WRITE, REPL_WRITE, false},
		   {WIRE_RESYNC_DONE, REPL_RESYNC_DONE, false},
		   {WIRE_WRITE, REPL_WRITE, true},
		   {WIRE_FLUSH, REPL_FLUSH, true},
		   {WIRE_RESYNC_WRITE, REPL_WRITE, true}};
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct host *h = secondary();
		if (bad[i].behind)
			frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
		stream(h, 'x', bad[i].type, bad[i].kind, 2, 0, 4096);
		EXPECT(h, "done:x=ERR_CANCELED send:REFUSE close");
		host_free(h);
	}
	struct host *h = secondary();
	frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
	frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* What was received is applied when the link goes, but an end of a resync that nobody heard makes nothing in sync. */
Test(repl, an_adoption_after_the_link_has_gone_is_not_in_sync)
{
	struct host *h = secondary();
	frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 2, 0, 0);
	EXPECT(h, "do:d/disk");
	link_down(h);
	fin(h, "d");
	saved(h);
	EXPECT(h, "save:secondary/RUNNING done:d");
	cr_assert_eq(link_of(h), LINK_DOWN);
	host_free(h);
}

Test(repl, an_end_of_a_resync_that_is_behind_again_is_not_in_sync)
{
	struct host *h = secondary();
	frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 2, 0, 0);
	frame(h, WIRE_BEHIND, 0, 0, 0, NULL, 0);
	fin(h, "d");
	saved(h);
	cr_assert_eq(link_of(h), LINK_RESYNC);
	host_free(h);
}

/* ---- failover ---- */

Test(repl, a_failover_applies_marks_saves_answers_and_commits_racing_writes)
{
	struct host *h = secondary();
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	forget(h);
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	EXPECT(h, "send:GOODBYE close");
	stream(h, 'x', WIRE_WRITE, REPL_WRITE, 3, 0, 4096); /* of the ended session */
	EXPECT(h, "done:x=ERR_CANCELED");
	fin(h, "a");
	EXPECT(h, "done:a do:mark/own");
	guest(h, 'g', REPL_WRITE, 4096, 4096);
	EXPECT(h, "");
	repl_mark(h->r, 0, 0, 4096);
	fin(h, "mark");
	EXPECT(h, "do:sync/disk"); /* the checkpoint as received is not in the record before it is on the disk */
	fin(h, "sync");
	EXPECT(h, "save:standalone/FAILOVER +2");
	cr_assert_eq(h->saved.target, 1);
	cr_assert_eq(h->saved.base, 1);
	cr_assert_eq(h->saved.lineage.bitmap, 100);
	cr_assert(h->saved.alone);
	saved(h);
	EXPECT(h, "cmd do:commit/own"); /* g waits for the commit's claim */
	fin(h, "commit");
	EXPECT(h, "do:g/active do:sync/disk"); /* guests go on during the first sync */
	guest(h, 'i', REPL_WRITE, 65536, 4096);
	EXPECT(h, "do:i/active");
	fin(h, "g");
	EXPECT(h, "done:g do:commit/own"); /* picked up */
	fin(h, "commit");
	fin(h, "sync");
	guest(h, 'j', REPL_WRITE, 131072, 4096);
	EXPECT(h, ""); /* j waits, i ends */
	fin(h, "i");
	EXPECT(h, "done:i do:commit/own");
	fin(h, "commit");
	EXPECT(h, "do:sync/disk");
	fin(h, "sync");
	EXPECT(h, "save:standalone/DONE");
	saved(h);
	EXPECT(h, "do:j/disk");
	host_free(h);
}

/* Found by the simulator: it may have changed active in part, which the view shows and the disk has to. */
Test(repl, a_write_to_active_that_failed_is_committed_too)
{
	struct host *h = secondary();
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	repl_mark(h->r, 0, 0, 4096);
	fin(h, "mark");
	fin(h, "sync");
	saved(h);
	fin(h, "commit");
	forget(h);
	guest(h, 'i', REPL_WRITE, 65536, 4096);
	EXPECT(h, "do:i/active");
	fin_full(h, "i", -ERR_IO, false, 0, false);
	EXPECT(h, "done:i=ERR_IO do:commit/own");
	host_free(h);
}

/* One that waited for room and failed leaves nothing behind by which the next in its slot would be taken for waiting.
 */
Test(repl, a_commit_is_submitted_again_only_where_it_waits_for_room)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_FAILOVER);
	m.n_ckpts = 3;
	for (unsigned i = 0; i < 3; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100};
	m.ckpt_max = m.received = 3;
	m.base = m.target = m.last_stream = 2;
	m.failover_generation = 100;
	m.alone = true;
	m.active_id = 1;
	m.settings.on_cow_error = ON_COW_ERROR_DROP_HISTORY;
	struct host *h = host_new(&m);
	repl_mark(h->r, 0, 0, 4096);
	repl_mark(h->r, 0, 3 * 65536, 4096);
	fin(h, "mark");
	EXPECT(h, "do:mark/own do:commit/own do:commit/own");
	fin_full(h, "commit", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "save:standalone/FAILOVER <2");
	save_fails(h, -ERR_IO);
	saved(h); /* as it was */
	EXPECT(h, "save:standalone/FAILOVER save:standalone/FAILOVER_FAILED");
	saved(h);
	fin(h, "commit");
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	EXPECT(h, "save:standalone/FAILOVER");
	repl_mark(h->r, 0, 3 * 65536, 4096);
	saved(h);
	EXPECT(h, "do:commit/own do:commit/own cmd");
	struct repl_io *first = h->submitted[0];
	h->submitted[0] = h->submitted[1]; /* the other one fails */
	h->submitted[1] = first;
	fin_full(h, "commit", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "save:standalone/FAILOVER <2");
	saved(h);
	EXPECT(h, "do:commit/own");
	cr_assert_eq(h->n_submitted, 2);
	fin(h, "commit");
	fin(h, "commit");
	EXPECT(h, "do:sync/disk");
	host_free(h);
}

/* A guest that never pauses must not keep a commit from its end. */
Test(repl, a_commit_ends_under_a_steady_load)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_FAILOVER);
	m.n_ckpts = 2;
	m.ckpts[0] = (struct repl_ckpt){.number = 1, .generation = 100};
	m.ckpts[1] = (struct repl_ckpt){.number = 2, .generation = 100};
	m.ckpt_max = m.received = 2;
	m.base = m.target = 1;
	m.alone = true;
	m.active_id = 1;
	struct host *h = host_new(&m);
	repl_mark(h->r, 0, 0, SIZE);
	fin(h, "mark");
	bool busy[64] = {false};
	uint64_t x = 1;
	int rounds = 0;
	for (; rounds < 20000 && repl_meta(h->r)->state != STATE_DONE; rounds++) {
		for (unsigned i = 0; i < 8; i++) { /* eight requests at any time */
			struct repl_io *io = &h->io['A' + i];
			if (busy[i] && io->owner != 0xdd)
				continue;
			busy[i] = true;
			x = x * UINT64_C(6364136223846793005) + 1;
			guest(h, (char)('A' + i), REPL_WRITE, ((x >> 33) % (SIZE / 4096)) * 4096, 4096);
		}
		if (h->saving)
			saved(h);
		else if (h->n_submitted)
			fin(h, name_of(h->submitted[x % h->n_submitted]));
		forget(h);
	}
	cr_assert_eq(repl_meta(h->r)->state, STATE_DONE, "not after %d rounds", rounds);
	host_free(h);
}

Test(repl, a_checkpoint_that_was_received_is_what_a_failover_goes_back_to)
{
	struct host *h = secondary();
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
	EXPECT(h, "do:c/ckpt");
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	EXPECT(h, "send:GOODBYE close");
	fin(h, "c");
	EXPECT(h, "save:secondary/RUNNING +2");
	saved(h);
	EXPECT(h, "done:c do:mark/own");
	fin(h, "mark");
	EXPECT(h, "do:sync/disk");
	fin(h, "sync");
	EXPECT(h, "save:standalone/FAILOVER +3");
	cr_assert_eq(h->saved.target, 2);
	host_free(h);
}

/* Whatever the outcome: what is listed, or made the disk of a new lineage, is on the disk. One that can't be is
 * refused, and the host stays what it was. */
Test(repl, a_failover_whose_disk_is_not_synced_is_none)
{
	for (int latest = 0; latest < 2; latest++) {
		struct host *h = secondary();
		command(h, CMD_FAILOVER, latest ? FAILOVER_LATEST : FAILOVER_DEFAULT);
		EXPECT(h, "send:GOODBYE close do:mark/own");
		repl_mark(h->r, 0, 0, 4096);
		fin(h, "mark");
		EXPECT(h, "do:sync/disk");
		guest(h, 'g', REPL_WRITE, 4096, 4096);
		EXPECT(h, "");
		fin_full(h, "sync", -ERR_IO, false, 0, false);
		EXPECT(h, "cmd=ERR_IO do:g/active"); /* goes on as it was */
		cr_assert(strstr(h->cmd.err.text, "nothing was changed"), "%s", h->cmd.err.text);
		cr_assert_eq(repl_meta(h->r)->state, STATE_RUNNING);
		cr_assert_eq(repl_volume_state(h->r, 0)->todo.count, 0);
		fin(h, "g");
		forget(h);
		h->cmd = (struct repl_command){.cmd = CMD_FAILOVER, .number = latest ? FAILOVER_LATEST : 0};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
		fin(h, "mark");
		fin(h, "sync");
		EXPECT(h, latest ? "do:mark/own do:sync/disk save:standalone/DONE +2"
				 : "do:mark/own do:sync/disk save:standalone/FAILOVER +2");
		host_free(h);
	}
}

Test(repl, a_discard_does_not_cross_a_failover)
{
	struct host *h = secondary();
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	forget(h);
	struct repl_command c = {.cmd = CMD_DISCARD};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &c});
	EXPECT(h, "cmd=ERR_BUSY");
	host_free(h);
}

/* ---- local disk errors ---- */

static void read_reply(struct host *h, uint64_t token, uint64_t off, uint64_t len, unsigned flags)
{
	static uint8_t bytes[1 << 20];
	static const uint8_t refuse[] = {ERR_IO, 0, 0, 0};
	struct wire_frame f = {
	    .type = WIRE_READ_REPLY, .flags = (uint16_t)flags, .seq = token, .offset = off, .length = len};
	f.length_payload = flags & WIRE_READ_ZERO ? 0 : flags & WIRE_READ_ERROR ? sizeof(refuse) : (uint32_t)len;
	step(h, (struct repl_event){.type = EV_FRAME,
				    .session = h->session,
				    .frame = &f,
				    .payload = flags & WIRE_READ_ERROR ? refuse : bytes});
}

static void fail_sync(struct host *h, const char *name)
{
	for (unsigned i = 0; i < h->n_submitted; i++)
		if (strcmp(name_of(h->submitted[i]), name) == 0)
			h->submitted[i]->failed = 1;
	fin_full(h, name, -ERR_IO, false, 0, false);
}

/* In sync, then a write of region 1 fails, the peer confirms, the record is saved: the write is sent as 5. */
static struct host *detached_primary(void)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	EXPECT(h, "do:a/disk send:DETACH#4");
	ack(h, 4, 4, 4);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	EXPECT(h, "send:WRITE#5");
	return h;
}

/* What the disk that has failed holds may go with the system's cache. */
Test(repl, a_job_holds_nothing_of_a_disk_whose_detach_is_on_its_way)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	EXPECT(h, "do:a/disk send:DETACH#4");
	hold(h, CMD_HOLD, 0, "job 7");
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
}

Test(repl, nothing_is_answered_before_the_peer_has_the_detach)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	EXPECT(h, "do:a/disk send:DETACH#4");
	struct repl_status st;
	repl_status(h->r, h->now, &st);
	cr_assert(st.error.code == ERR_IO && st.error.off == 65536 && st.error.len == 4096);
	cr_assert_str_eq(st.error.operation, "write");
	cr_assert_str_eq(st.error.volume, "vm");
	/* What comes meanwhile waits, in order; what overlaps behind the claim. */
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	guest(h, 'c', REPL_WRITE, 0, 512);
	guest(h, 'd', REPL_READ, 0, 512);
	guest(h, 'e', REPL_FLUSH, 0, 0);
	EXPECT(h, "");
	ack(h, 4, 4, 3);
	EXPECT(h, "");
	ack(h, 4, 4, 4);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert(h->saved.volumes[0].flags & VOLUME_STALE);
	cr_assert_neq(h->saved.lineage.current, 100);
	cr_assert(h->saved.lineage.bitmap == 0 && lineage_has(&h->saved.lineage, 100));
	cr_assert_eq(repl_volume_state(h->r, 0)->dirty.count, 0, "the peer has it all");
	cr_assert_eq(repl_unsynced(h->r), 1);
	saved(h);
	EXPECT(h, "send:WRITE#5 send:WRITE#6 send:WRITE#7 send:READ_REQ#1 send:FLUSH#8 do:e/disk");
	fin(h, "e"); /* the other disks of the group */
	ack(h, 8, 4, 4);
	EXPECT(h, ""); /* F would have completed the writes */
	ack(h, 8, 7, 4);
	EXPECT(h, "done:b done:a done:c");
	read_reply(h, 1, 0, 512, 0);
	EXPECT(h, "done:d");
	ack(h, 8, 8, 8);
	EXPECT(h, "done:e");
	host_free(h);
}

Test(repl, a_detach_that_cannot_be_recorded_here_goes_on)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 4 << 20, 4096);
	EXPECT(h, "do:a/intent");
	fin_full(h, "a", -ERR_IO, false, 0, false); /* the map lies on the same disk */
	EXPECT(h, "send:DETACH#4");
	ack(h, 4, 4, 4);
	EXPECT(h, "save:primary/RUNNING");
	for (int i = 0; i < 2; i++) {
		h->saving = false;
		step(h, (struct repl_event){.type = EV_META_SAVED, .error = -ERR_IO});
	}
	EXPECT(h, "save:primary/RUNNING send:WRITE#5");
	ack(h, 5, 5, 4);
	EXPECT(h, "done:a");
	/* Until it can: a restart without the peer must not serve a disk that is not current. */
	tick(h, SEC);
	EXPECT(h, "save:primary/RUNNING"); /* as it was */
	saved(h);
	tick(h, SEC);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_STALE);
	cr_assert(h->saved.lineage.current != 100 && lineage_has(&h->saved.lineage, 100));
	save_fails(h, -ERR_IO);
	saved(h); /* as it was */
	link_down(h);
	forget(h);
	command(h, CMD_STOP, 0);
	EXPECT(h, "save:primary/DONE");
	saved(h);
	forget(h);
	tick(h, SEC);
	EXPECT(h, "save:primary/DONE");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_STALE);
	saved(h);
	tick(h, SEC);
	EXPECT(h, "");
	host_free(h);
}

Test(repl, a_session_that_ends_before_the_word_undoes_the_detach)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	guest(h, 'b', REPL_WRITE, 0, 4096);
	EXPECT(h, "do:a/disk send:DETACH#4");
	link_down(h);
	EXPECT(h, "done:a=ERR_IO save:primary/RUNNING");
	cr_assert(dirty(h, 65536));
	/* Its generation may be the peer's: what is begun here lies above it, with the dirty set since 100. */
	cr_assert_eq(h->saved.lineage.bitmap, 100);
	cr_assert_neq(h->saved.lineage.history[0], 0);
	cr_assert_eq(h->saved.volumes[0].flags, 0);
	saved(h);
	EXPECT(h, "do:b/disk");
	fin(h, "b");
	EXPECT(h, "done:b");
	host_free(h);
}

Test(repl, a_failed_sync_detaches_and_the_flush_is_the_peers)
{
	struct host *h = primary(PROTOCOL_A);
	guest(h, 'a', REPL_FLUSH, 0, 0);
	EXPECT(h, "send:FLUSH#3 do:a/disk");
	fail_sync(h, "a");
	EXPECT(h, "send:DETACH#4");
	ack(h, 4, 4, 4);
	saved(h);
	EXPECT(h, "save:primary/RUNNING send:FLUSH#5 do:a/disk");
	fin(h, "a");
	EXPECT(h, "");
	ack(h, 5, 5, 5);
	EXPECT(h, "done:a");
	host_free(h);
}

Test(repl, a_lost_peer_of_a_detached_disk_is_an_error)
{
	struct host *h = detached_primary();
	guest(h, 'r', REPL_READ, 0, 4096);
	EXPECT(h, "send:READ_REQ#1");
	link_down(h);
	EXPECT(h, "done:a=ERR_IO"); /* it was sent; whether it arrived is not known */
	guest(h, 'w', REPL_WRITE, 0, 4096);
	guest(h, 'f', REPL_FLUSH, 0, 0);
	tick(h, SEC);
	EXPECT(h, "dial");
	tick(h, 4 * SEC); /* peer_timeout in all, for the read since it came */
	EXPECT(h, "done:r=ERR_IO done:f=ERR_IO");
	tick(h, SEC / 10); /* it stood behind the read */
	EXPECT(h, "done:w=ERR_IO");
	host_free(h);
}

static void fail_read(struct host *h, char name, uint64_t off)
{
	const char text[] = {name, 0};
	guest(h, name, REPL_READ, off, 4096);
	fin_full(h, text, -ERR_IO, false, 0, false);
}

/* The disk is not detached before the pair is in sync: what the peer lacks could only be read here. But of what it has
 * already, a read that fails here is the peer's to answer. */
Test(repl, a_read_that_fails_in_a_resync_is_answered_by_the_peer_where_it_has_the_range)
{
	struct host *h = primary(PROTOCOL_F);
	write_alone(h, 0);
	guest(h, 'b', REPL_WRITE, 131072, 4096);
	fin(h, "b");
	forget(h);
	connect(h, &peer_meta);
	EXPECT(h, "send:RESYNC_BEGIN#1");
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	EXPECT(h, "do:scan/own");
	fail_read(h, 'r', 65536);
	EXPECT(h, "do:r/disk send:READ_REQ#1"); /* behind RESYNC_BEGIN and all that was forwarded */
	fail_read(h, 's', 131072 - 2048);
	EXPECT(h, "do:s/disk done:s=ERR_IO"); /* half of it is still to be sent */
	read_reply(h, 1, 65536, 4096, 0);
	EXPECT(h, "done:r");
	struct repl_status st;
	repl_status(h->r, h->now, &st);
	cr_assert(st.error.code == ERR_IO && st.error.off == 65536 && st.error.len == 4096);
	cr_assert_str_eq(st.error.operation, "read");
	cr_assert_eq(repl_detached(h->r), 0);
	fin_full(h, "scan", 0, false, 65536, false);
	fin(h, "read");
	EXPECT(h, "do:read/own do:scan/own send:RESYNC_WRITE#2");
	fail_read(h, 't', 0);
	EXPECT(h, "do:t/disk send:READ_REQ#2"); /* that has been sent now */
	guest(h, 'u', REPL_READ, 0, 4096);
	link_down(h);
	EXPECT(h, "do:u/disk do:t/disk"); /* asked here again: there is nobody else */
	fin_full(h, "t", -ERR_IO, false, 0, false);
	fin_full(h, "u", -ERR_IO, false, 0, false);
	EXPECT(h, "done:t=ERR_IO done:u=ERR_IO");
	host_free(h);
}

Test(repl, a_read_that_fails_in_a_resync_is_an_error_where_a_hash_is_not_answered)
{
	struct host *h = hashing();
	fin(h, "rhash");
	EXPECT(h, "send:HASH#2");
	fail_read(h, 'r', 65536);
	EXPECT(h, "do:r/disk done:r=ERR_IO"); /* it counts as sent, but may differ */
	fail_read(h, 's', 131072);
	EXPECT(h, "do:s/disk send:READ_REQ#1");
	host_free(h);
}

Test(repl, a_read_that_fails_while_behind_is_answered_by_the_peer_where_nothing_is_dirty)
{
	struct host *h = warm_primary(PROTOCOL_F);
	pause_now(h);
	EXPECT(h, "send:FLUSH#4 do:sync/disk send:BEHIND cmd");
	fail_read(h, 'r', 0); /* it was sent, and the word that it is durable there is not here */
	EXPECT(h, "do:r/disk done:r=ERR_IO");
	fin(h, "sync");
	ack(h, 4, 4, 4);
	fail_read(h, 's', 0);
	EXPECT(h, "do:s/disk send:READ_REQ#1");
	guest(h, 'a', REPL_WRITE, 0, 4096);
	saved(h);
	fin(h, "a");
	forget(h);
	fail_read(h, 't', 8192);
	EXPECT(h, "do:t/disk done:t=ERR_IO");
	host_free(h);
}

Test(repl, under_pass_no_read_is_the_peers)
{
	struct host *h = warm_primary(PROTOCOL_F);
	pass(h);
	fail_read(h, 'r', 65536);
	EXPECT(h, "do:r/disk done:r=ERR_IO");
	host_free(h);
}

/* Not in sync, a write that fails is the guest's error: of its region the peer may lack the rest. */
Test(repl, a_write_that_fails_before_the_pair_is_in_sync_is_an_error_and_stays_dirty)
{
	struct host *h = primary(PROTOCOL_F);
	write_alone(h, 0);
	connect(h, &peer_meta);
	EXPECT(h, "send:RESYNC_BEGIN#1");
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "do:b/disk send:WRITE_FAILED done:b=ERR_IO");
	cr_assert(dirty(h, 65536));
	cr_assert_eq(repl_detached(h->r), 0);
	fail_read(h, 'r', 65536);
	EXPECT(h, "do:r/disk done:r=ERR_IO"); /* what it holds now is here alone */
	host_free(h);
	/* The same while paused, and while there is no peer. */
	h = warm_primary(PROTOCOL_F);
	pause_now(h);
	forget(h);
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	saved(h);
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "save:primary/RUNNING do:b/disk send:WRITE_FAILED done:b=ERR_IO");
	cr_assert(dirty(h, 65536));
	link_down(h);
	forget(h);
	guest(h, 'c', REPL_WRITE, 131072, 4096);
	fin_full(h, "c", -ERR_IO, false, 0, false);
	EXPECT(h, "do:c/disk done:c=ERR_IO");
	cr_assert(dirty(h, 131072));
	fail_read(h, 'r', 262144);
	EXPECT(h, "do:r/disk done:r=ERR_IO");
	cr_assert_eq(repl_detached(h->r), 0);
	host_free(h);
}

/* A write was answered when the peer had applied it. If the peer has lost power since, it is nowhere: no flush may say
 * that it is durable. */
Test(repl, flushes_say_that_a_lost_peer_had_not_flushed_what_only_it_has)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 4);
	EXPECT(h, "done:a");
	h->now++;
	guest(h, 'f', REPL_FLUSH, 0, 0);
	guest(h, 'g', REPL_FLUSH, 0, 0);
	fin(h, "f"); /* waits for the peer; the other one for the disks that are not detached */
	EXPECT(h, "send:FLUSH#6 do:f/disk do:g/disk");
	link_down(h);
	EXPECT(h, "done:f=ERR_IO");
	fin(h, "g");
	EXPECT(h, "done:g=ERR_IO");
	tick(h, 1);
	EXPECT(h, "dial");
	guest(h, 'f', REPL_FLUSH, 0, 0); /* of what came after */
	EXPECT(h, "");
	host_free(h);
	/* The one under way came before the write was answered: who wrote it has not heard. */
	h = detached_primary();
	guest(h, 'f', REPL_FLUSH, 0, 0);
	fin(h, "f");
	forget(h);
	h->now++;
	ack(h, 5, 5, 4);
	EXPECT(h, "done:a");
	h->now++;
	link_down(h);
	EXPECT(h, "done:f=ERR_IO");
	tick(h, 1);
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "dial done:f=ERR_IO");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "");
	host_free(h);
	/* Those that wait at the gate as the peer is lost were under way too, all of them. */
	h = detached_primary();
	ack(h, 5, 5, 4);
	EXPECT(h, "done:a");
	struct settings s = repl_meta(h->r)->settings;
	s.on_disconnect = ON_DISCONNECT_FREEZE;
	set_now(h, s);
	frame(h, WIRE_SETTINGS_ACK, 1, 0, 0, NULL, 0);
	forget(h);
	frame(h, WIRE_GOODBYE, 0, 0, 0, NULL, 0);
	h->now++;
	guest(h, 'f', REPL_FLUSH, 0, 0);
	guest(h, 'g', REPL_FLUSH, 0, 0);
	EXPECT(h, "close");
	link_down(h);
	tick(h, 3 * SEC);
	EXPECT(h, "dial");
	link_up(h, true);
	peer_meta.lineage = repl_meta(h->r)->lineage;
	peer_meta.settings = s;
	peer_meta.volumes[0].flags = VOLUME_PEER_STALE;
	join_frame(h, &peer_meta, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	saved(h);
	EXPECT(h, "send:JOIN do:intents/own save:primary/RUNNING send:RESYNC_DONE#1 done:f=ERR_IO done:g=ERR_IO");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "send:FLUSH#2 do:f/disk");
	host_free(h);
	/* None was under way: the next one. */
	h = detached_primary();
	ack(h, 5, 5, 4);
	link_down(h);
	EXPECT(h, "done:a");
	tick(h, 1);
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "dial done:f=ERR_IO");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "");
	host_free(h);
	/* It had flushed all that was answered. */
	h = detached_primary();
	ack(h, 5, 5, 5);
	link_down(h);
	EXPECT(h, "done:a");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	EXPECT(h, "");
	host_free(h);
}

static void unprotect_by_force(struct host *h)
{
	h->cmd = (struct repl_command){.cmd = CMD_UNPROTECT, .flags = UNPROTECT_FORCE};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
}

/* Standalone, and nothing in the record says that its disk is newer than what went through the peer. */
static void is_unprotected(struct host *h)
{
	cr_assert_eq(h->saved.volumes[0].flags, 0);
	cr_assert_not(h->saved.has_peer);
	const struct lineage *l = &h->saved.lineage;
	cr_assert(l->current != 0 && l->current != 100 && l->bitmap == 0);
	for (unsigned i = 0; i < GENERATIONS_MAX; i++)
		cr_assert_eq(l->history[i], 0);
}

/* Its peer has failed over and forgotten it: without --force a disk that lacks what went through the peer would pass
 * for current, and nobody can rebuild it. */
Test(repl, a_detached_disk_is_unprotected_by_force_where_the_peer_is_lost)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 4);
	EXPECT(h, "done:a");
	unprotect_by_force(h);
	EXPECT(h, "cmd=ERR_STATE"); /* connected: it holds what is lacking here */
	link_down(h);
	guest(h, 'r', REPL_READ, 0, 4096); /* waits for the peer */
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "cmd=ERR_STATE");
	tick(h, 3 * SEC);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	unprotect_by_force(h); /* also while the peer is about to refuse it */
	EXPECT(h, "close save:primary/DONE");
	saved(h);
	EXPECT(h, "save:standalone/DONE");
	is_unprotected(h);
	unsigned warnings = h->warnings;
	saved(h);
	EXPECT(h, "done:r=ERR_IO cmd");
	cr_assert_eq(h->warnings, warnings + 1);
	cr_assert_eq(repl_detached(h->r), 0);
	guest(h, 's', REPL_READ, 0, 4096);
	guest(h, 'w', REPL_WRITE, 8192, 4096);
	EXPECT(h, "do:s/disk do:w/disk");
	fin(h, "s");
	fin(h, "w");
	guest(h, 'f', REPL_FLUSH, 0, 0); /* no promise of the old peer's stands */
	fin(h, "f");
	EXPECT(h, "done:s done:w do:f/disk done:f");
	tick(h, 10 * SEC);
	EXPECT(h, "");
	host_free(h);
}

/* A primary that learned that it was shut out, before its peer forgot it. */
Test(repl, a_shut_out_detached_disk_is_unprotected_by_force)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_NONE);
	m.base = m.last_stream = m.n_ckpts = 0;
	m.shut_out = true;
	m.volumes[0].flags = VOLUME_STALE;
	struct host *h = host_new(&m);
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "cmd=ERR_STATE");
	unprotect_by_force(h);
	EXPECT(h, "save:standalone/DONE");
	is_unprotected(h);
	saved(h);
	EXPECT(h, "cmd");
	host_free(h);
}

Test(repl, a_read_that_was_on_its_way_is_asked_again_after_a_reconnect)
{
	struct host *h = detached_primary();
	guest(h, 'r', REPL_READ, 0, 4096);
	link_down(h);
	forget(h);
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	peer_meta.lineage = repl_meta(h->r)->lineage;
	peer_meta.volumes[0].flags = VOLUME_PEER_STALE;
	join_frame(h, &peer_meta, 0);
	uint64_t range[2] = {0, 4096};
	frame(h, WIRE_DIRTY, 0, 0, 0, range,
	      sizeof(range)); /* an old bit of the peer's says nothing of its only copy */
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "do:intents/own");
	fin(h, "intents");
	saved(h);
	EXPECT(h, "save:primary/RUNNING send:RESYNC_DONE#1 send:READ_REQ#2");
	read_reply(h, 2, 0, 4096, WIRE_READ_ZERO);
	EXPECT(h, "done:r");
	guest(h, 's', REPL_READ, 0, 4096);
	read_reply(h, 3, 0, 4096, WIRE_READ_ERROR);
	EXPECT(h, "send:READ_REQ#3 done:s=ERR_IO");
	read_reply(h, 3, 0, 4096, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* It stood behind a write that waited for the peer: when that has failed over, the disk here is neither current nor
 * served. */
Test(repl, a_read_that_waits_for_its_place_is_not_answered_by_a_host_that_steps_down)
{
	static struct repl_meta survivor;
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	link_down(h);
	forget(h);
	guest(h, 'w', REPL_WRITE, 0, 4096);
	guest(h, 'r', REPL_READ, 0, 4096);
	EXPECT(h, "");
	meta_of(&survivor, ROLE_PRIMARY, STATE_DONE);
	survivor.lineage = (struct lineage){.current = 300, .bitmap = repl_meta(h->r)->lineage.current};
	link_up(h, false);
	join_frame(h, &survivor, WIRE_JOIN_FAILBACK);
	EXPECT(h, "save:secondary/NONE");
	saved(h);
	EXPECT(h, "done:r=ERR_IO done:w=ERR_IO send:JOIN send:DIRTY_END");
	host_free(h);
}

/* The record here could not be saved: the peer's newest generation was begun for a detach, and has this host's below.
 */
Test(repl, a_restarted_primary_is_told_by_its_peer)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	peer_meta.lineage = (struct lineage){.current = 200, .history = {100}};
	peer_meta.volumes[0].flags = VOLUME_PEER_STALE;
	struct host *h = host_new(&m);
	guest(h, 'a', REPL_WRITE, 0, 4096); /* held: nothing is served before the handshake */
	connect(h, &peer_meta);
	cr_assert_eq(h->saved.lineage.current, 200);
	cr_assert(h->saved.volumes[0].flags & VOLUME_STALE);
	EXPECT(h, "send:RESYNC_DONE#1 send:WRITE#2");
	host_free(h);
}

/* Under `freeze` its guest's write waits for the peer, which remembers a detach that this host did not hear confirmed:
 * it goes there, and so does the flush. */
Test(repl, a_frozen_write_to_a_disk_that_was_detached_goes_to_the_peer)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	m.settings.on_disconnect = ON_DISCONNECT_FREEZE;
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	connect(h, &peer_meta);
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	saved(h);
	ack(h, 2, 2, 1);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 2, 0, NULL, 0);
	saved(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	guest(h, 'f', REPL_FLUSH, 0, 0);
	forget(h);
	link_down(h);
	fin(h, "a");
	fin(h, "f");
	EXPECT(h, "");
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	peer_meta.lineage = (struct lineage){.current = 200, .history = {100}};
	peer_meta.volumes[0].flags = VOLUME_PEER_STALE;
	peer_meta.ckpt_max = 2;
	join_frame(h, &peer_meta, 0);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	forget(h);
	saved(h);
	EXPECT(h, "send:RESYNC_DONE#1 send:WRITE#2 send:FLUSH#3 do:f/disk");
	fin(h, "f");
	ack(h, 2, 2, 1);
	EXPECT(h, "done:a");
	ack(h, 3, 3, 3);
	EXPECT(h, "done:f");
	host_free(h);
}

/* It gave up waiting for the answer to its JOIN, and wrote alone: on a disk that was not current. */
Test(repl, a_primary_that_wrote_since_its_join_is_not_told_of_a_detach)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	peer_meta.lineage = (struct lineage){.current = 200, .history = {100}};
	peer_meta.volumes[0].flags = VOLUME_PEER_STALE;
	struct host *h = host_new(&m);
	tick(h, 0);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	ticks(h, 5 * SEC);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	EXPECT(h, "do:a/intent");
	fin(h, "a");
	fin(h, "a");
	EXPECT(h, "do:a/disk done:a");
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "close");
	cr_assert_eq(repl_detached(h->r), 0);
	link_down(h);
	host_free(h);
}

Test(repl, an_old_primarys_stale_disk_gets_everything_and_its_bits_first)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_NONE);
	peer_meta.volumes[0].flags = VOLUME_STALE;
	struct host *h = host_new(&m);
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &peer_meta, 0);
	cr_assert(dirty(h, SIZE - 1));
	repl_check(h->r); /* before the peer has told its own: no bit is set yet */
	forget(h);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "do:intents/own");
	fin(h, "intents");
	EXPECT(h, "save:primary/RUNNING");
	host_free(h);
}

Test(repl, a_rebuild_copies_each_region_and_writes_go_to_both)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	EXPECT(h, "done:a");
	command(h, CMD_STOP, 0);
	EXPECT(h, "cmd=ERR_STATE");
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "do:reopen/own");
	fin(h, "reopen");
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_STALE | VOLUME_REBUILD);
	saved(h);
	EXPECT(h, "cmd send:READ_REQ#1 send:READ_REQ#2 send:READ_REQ#3 send:READ_REQ#4");
	/* to a region that was not copied: the peer only, and it waits for the read that is on its way */
	guest(h, 'b', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	read_reply(h, 1, 0, 512 << 10, 0);
	EXPECT(h, "do:rebuild/own");
	fin(h, "rebuild");
	/* it is done now: to both, and it completes on the peer's word */
	EXPECT(h, "do:b/disk send:READ_REQ#5");
	fin(h, "b");
	EXPECT(h, "send:WRITE#6");
	guest(h, 'c', REPL_WRITE, 7 << 20, 4096);
	EXPECT(h, "send:WRITE#7");
	ack(h, 7, 7, 5);
	EXPECT(h, "done:b done:c");
	for (uint64_t i = 1; i < 16; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, i % 2 ? WIRE_READ_ZERO : 0);
		fin(h, "rebuild");
	}
	cr_assert_eq(repl_volume_state(h->r, 0)->todo.count, 0);
	forget(h);
	cr_assert_eq(repl_unsynced(h->r), 0);
	fin(h, "sync");
	EXPECT(h, "send:ATTACH#8");
	ack(h, 8, 8, 8);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, 0);
	cr_assert_eq(repl_detached(h->r), 1);
	saved(h);
	cr_assert_eq(repl_detached(h->r), 0);
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
}

/* What was copied from the peer's cache goes with its power: what it has not flushed is copied again after a session,
 * and what it had not when the rebuild began is flushed first. */
Test(repl, a_rebuild_copies_what_the_peer_has_durably)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 4);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	forget(h);
	saved(h);
	EXPECT(h, "cmd send:FLUSH#6");
	guest(h, 'b', REPL_WRITE, 7 << 20, 4096);
	EXPECT(h, "send:WRITE#7");
	ack(h, 6, 6, 5);
	EXPECT(h, "");
	ack(h, 7, 7, 6);
	EXPECT(h, "done:b send:READ_REQ#1 send:READ_REQ#2 send:READ_REQ#3 send:READ_REQ#4");
	for (uint64_t i = 0; i < 16; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, 0);
		fin(h, "rebuild");
	}
	cr_assert_eq(repl_volume_state(h->r, 0)->todo.count, 0);
	link_down(h);
	cr_assert(bitmap_test(&repl_volume_state(h->r, 0)->todo, (7 << 20) >> 16));
	cr_assert_eq(repl_volume_state(h->r, 0)->todo.count, 1);
	host_free(h);
}

/* This host's record and its peer's are of a group of two. */
static void two_disks(struct repl_meta *m)
{
	struct repl_meta *both[] = {m, &peer_meta};
	for (unsigned i = 0; i < 2; i++) {
		both[i]->n_volumes = 2;
		both[i]->volumes[1] = both[i]->volumes[0];
		(void)snprintf(both[i]->volumes[1].name, sizeof(both[i]->volumes[1].name), "vm2");
		both[i]->volumes[1].id = both[i]->volumes[0].id + 1;
	}
}

/* Both disks of a group were detached; that of the first is rebuilt already. */
static struct host *one_of_two_rebuilt(unsigned regions)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	two_disks(&m);
	m.volumes[0].flags = VOLUME_STALE | VOLUME_REBUILD;
	m.volumes[1].flags = VOLUME_STALE;
	peer_meta.volumes[0].flags = peer_meta.volumes[1].flags = VOLUME_PEER_STALE;
	struct host *h = host_new(&m);
	connect(h, &peer_meta);
	ack(h, 1, 1, 1);
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	saved(h);
	ack(h, 2, 2, 2);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 2, 0, NULL, 0);
	saved(h);
	tick(h, SEC / 10);
	for (uint64_t i = 0; i < regions; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, WIRE_READ_ZERO);
		fin(h, "rebuild");
	}
	forget(h);
	return h;
}

/* One disk is whole, the other is being rebuilt at 1 MiB/s; its first `done` bytes are. Nothing is under way. */
static struct host *rebuilding_beside_a_whole_one(uint64_t done)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	two_disks(&m);
	m.volumes[0].flags = VOLUME_STALE | VOLUME_REBUILD;
	peer_meta.volumes[0].flags = VOLUME_PEER_STALE;
	m.settings.resync_rate = peer_meta.settings.resync_rate = 1 << 20;
	struct host *h = host_new(&m);
	connect(h, &peer_meta);
	ack(h, 1, 1, 1);
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	saved(h);
	ack(h, 2, 2, 2);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 2, 0, NULL, 0);
	saved(h);
	for (uint64_t off = 0, token = 0; off < done; off += 512 << 10) {
		if (off)
			tick(h, SEC);
		read_reply(h, ++token, off, 512 << 10, WIRE_READ_ZERO);
		fin(h, "rebuild");
	}
	forget(h);
	return h;
}

/* What a rebuilding disk has dirty went to both hosts, and is clean once both have it durably: no resync sends it, and
 * a switchover wants nothing dirty. */
Test(repl, what_a_rebuilding_disk_has_dirty_becomes_clean)
{
	/* The other disk makes the pair fall behind while a clear cycle is yet to look at it. */
	struct host *h = rebuilding_beside_a_whole_one(2 << 20);
	pass(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	fin(h, "a");
	EXPECT(h, "do:a/intent do:a/disk send:WRITE#3");
	ack(h, 3, 3, 2);
	EXPECT(h, "done:a send:READ_REQ#5");
	cr_assert(dirty(h, 0));
	h->io['b'] = (struct repl_io){.kind = REPL_WRITE, .volume = 1, .len = 4096, .owner = 'b'};
	step(h, (struct repl_event){.type = EV_IO, .io = &h->io['b']});
	fin(h, "b");
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "do:b/intent do:b/disk send:WRITE_FAILED send:FLUSH#4 do:sync/disk send:BEHIND done:b=ERR_IO");
	fin_full(h, "sync", -ERR_IO, false, 0, false); /* that cycle comes to nothing */
	tick(h, SEC / 10);
	EXPECT(h, "send:RESYNC_BEGIN#5 send:FLUSH#6 do:sync/disk");
	fin(h, "sync");
	ack(h, 6, 6, 6);
	cr_assert_not(dirty(h, 0));
	host_free(h);

	/* A write over it and the part that is still to be copied lets that take it along, beside a clear cycle. */
	h = rebuilding_beside_a_whole_one(2 << 20);
	guest(h, 'a', REPL_WRITE, (2 << 20) - 4096, 4096);
	fin(h, "a");
	fin(h, "a");
	EXPECT(h, "do:a/intent do:a/disk send:WRITE#3");
	ack(h, 3, 3, 2);
	guest(h, 'b', REPL_WRITE, (2 << 20) - 4096, 8192);
	EXPECT(h, "done:a send:WRITE#4");
	tick(h, 2 * SEC);
	EXPECT(h, "send:FLUSH#5 do:sync/disk send:READ_REQ#5");
	fin(h, "sync");
	ack(h, 5, 5, 5);
	EXPECT(h, "done:b");
	for (uint64_t token = 5, off = 2 << 20; token < 18; token++, off += 512 << 10) {
		bool last = off == SIZE; /* then the regions that b had */
		read_reply(h, token, last ? (2 << 20) - 65536 : off, last ? 65536 : 512 << 10, WIRE_READ_ZERO);
		forget(h);
		fin(h, "rebuild");
		if (last)
			break;
		tick(h, SEC);
	}
	cr_assert(dirty(h, (2 << 20) - 4096));
	forget(h);
	tick(h, SEC);
	EXPECT(h, "do:sync/disk do:sync/disk"); /* of the cycle, behind FLUSH#5 too, and of the rebuild */
	fin(h, "sync");
	fin(h, "sync");
	EXPECT(h, "send:ATTACH#6");
	cr_assert_not(dirty(h, (2 << 20) - 4096));
	host_free(h);
}

/* What the peer was told, and the record is about to say, is of the first one alone. */
Test(repl, a_disk_joins_no_rebuild_whose_end_is_being_recorded)
{
	struct host *h = one_of_two_rebuilt(16);
	fin(h, "sync");
	EXPECT(h, "send:ATTACH#3");
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	ack(h, 3, 3, 3);
	EXPECT(h, "save:primary/RUNNING");
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	saved(h);
	cr_assert_eq(repl_detached(h->r), 2);
	cr_assert_eq(h->saved.volumes[0].flags, 0);
	cr_assert_eq(h->saved.volumes[1].flags, VOLUME_STALE);
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "do:reopen/own");
	host_free(h);
}

Test(repl, a_rebuild_that_another_disk_is_about_to_join_does_not_end)
{
	struct host *h = one_of_two_rebuilt(15);
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "do:reopen/own");
	read_reply(h, 16, UINT64_C(15) << 19, 512 << 10, WIRE_READ_ZERO);
	fin(h, "rebuild");
	EXPECT(h, "do:rebuild/own");
	fin(h, "reopen");
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[1].flags, VOLUME_STALE | VOLUME_REBUILD);
	saved(h);
	EXPECT(h, "cmd send:READ_REQ#17 send:READ_REQ#18 send:READ_REQ#19 send:READ_REQ#20");
	cr_assert_eq(repl_detached(h->r), 3);
	host_free(h);
}

Test(repl, a_rebuild_that_meets_an_error_leaves_the_disk_detached)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	saved(h);
	forget(h);
	read_reply(h, 1, 0, 512 << 10, 0);
	fin_full(h, "rebuild", -ERR_IO, false, 0, false);
	EXPECT(h, "do:rebuild/own");
	struct repl_status s;
	repl_status(h->r, h->now, &s);
	cr_assert_str_eq(s.error.operation, "resync", "not the error that had detached it: %s", s.error.text);
	cr_assert_eq(repl_unsynced(h->r), 1);
	for (uint64_t i = 2; i < 5; i++)
		read_reply(h, i, (i - 1) << 19, 512 << 10, 0);
	EXPECT(h, "");
	guest(h, 'b', REPL_WRITE, 0, 4096);
	EXPECT(h, "send:WRITE#6");
	cr_assert_eq(repl_volume_state(h->r, 0)->dirty.count, 0);
	host_free(h);
}

/* What went to both before the link was lost may not have reached the peer: copied again. */
Test(repl, a_rebuild_copies_again_what_a_cut_left_open)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	saved(h);
	for (uint64_t i = 0; i < 16; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, 0);
		fin(h, "rebuild");
	}
	forget(h);
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	EXPECT(h, "do:b/disk");
	fin(h, "b");
	EXPECT(h, "send:WRITE#6");
	link_down(h);
	EXPECT(h, "done:b=ERR_IO");
	cr_assert(bitmap_test(&repl_volume_state(h->r, 0)->todo, 1));
	cr_assert_eq(repl_volume_state(h->r, 0)->todo.count, 1);
	host_free(h);
}

/* Behind the ATTACH it went to both, and the disk is whole when the link is lost. */
Test(repl, a_write_to_a_disk_that_is_whole_again_completes_without_the_peer)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	saved(h);
	for (uint64_t i = 0; i < 16; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, 0);
		fin(h, "rebuild");
	}
	forget(h);
	fin(h, "sync");
	EXPECT(h, "send:ATTACH#6");
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	EXPECT(h, "do:b/disk");
	fin(h, "b");
	guest(h, 'c', REPL_WRITE, 131072, 4096);
	fin(h, "c");
	guest(h, 'd', REPL_WRITE, 196608, 4096);
	fin(h, "d");
	EXPECT(h, "send:WRITE#7 do:c/disk send:WRITE#8 do:d/disk send:WRITE#9");
	ack(h, 7, 7, 6);
	EXPECT(h, "done:b save:primary/RUNNING");
	saved(h);
	cr_assert_eq(repl_detached(h->r), 0);
	ack(h, 8, 8, 6);
	EXPECT(h, "done:c");
	link_down(h);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	EXPECT(h, "done:d");
	cr_assert(dirty(h, 196608));
	/* What the peer had not flushed is here, too. */
	guest(h, 'e', REPL_FLUSH, 0, 0);
	fin(h, "e");
	EXPECT(h, "do:e/disk done:e");
	host_free(h);
}

Test(repl, a_secondary_syncs_and_records_a_detach_before_it_says_so)
{
	struct host *h = secondary();
	uint64_t n = 2;
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, n, 0, 4096);
	stream(h, 'b', WIRE_DETACH, REPL_DETACH, n + 1, 0, 0);
	stream(h, 'c', WIRE_WRITE, REPL_WRITE, n + 2, 0, 4096);
	stream(h, 'd', WIRE_READ_REQ, REPL_READ, 77, 0, 4096);
	EXPECT(h, "do:a/disk");
	fin(h, "a");
	EXPECT(h, "done:a do:b/disk");
	fin(h, "b");
	EXPECT(h, "save:secondary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_PEER_STALE);
	saved(h);
	EXPECT(h, "send:ACK done:b do:c/disk");
	fin(h, "c"); /* the read overlaps it, and comes after it */
	EXPECT(h, "do:d/disk done:c");
	step(h, (struct repl_event){.type = EV_BATCH, .session = h->session});
	EXPECT(h, "send:ACK"); /* under F too: the primary waits for each write */
	fin_full(h, "d", -ERR_IO, false, 0, false);
	EXPECT(h, "send:READ_REPLY#77 done:d=ERR_IO");
	host_free(h);
}

/* The same where the disk is taken as it is. */
Test(repl, what_waits_for_its_place_fails_as_a_detached_disk_is_unprotected_by_force)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	link_down(h);
	forget(h);
	guest(h, 'w', REPL_WRITE, 0, 4096);
	guest(h, 'r', REPL_READ, 0, 4096);
	guest(h, 'x', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	h->cmd = (struct repl_command){.cmd = CMD_UNPROTECT, .flags = UNPROTECT_FORCE};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	EXPECT(h, "save:primary/DONE");
	saved(h);
	EXPECT(h, "save:standalone/DONE");
	saved(h);
	EXPECT(h, "done:x=ERR_IO done:r=ERR_IO done:w=ERR_IO cmd");
	host_free(h);
}

/* The write has its number after the read, and ends before it: when the read ends, nothing is left. (A guest's write to
 * a detached disk waited for that word, till the session was given up.) */
Test(repl, a_read_of_the_stream_that_ends_last_holds_no_write_back)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_RUNNING);
	m.volumes[0].flags = VOLUME_PEER_STALE;
	struct host *h = secondary_of(&m);
	stream(h, 'r', WIRE_READ_REQ, REPL_READ, 77, 0, 4096);
	stream(h, 'w', WIRE_WRITE, REPL_WRITE, 2, 65536, 4096);
	EXPECT(h, "do:r/disk do:w/disk");
	fin(h, "w");
	step(h, (struct repl_event){.type = EV_BATCH, .session = h->session});
	forget(h);
	fin_full(h, "r", -ERR_IO, false, 0, false);
	step(h, (struct repl_event){.type = EV_BATCH, .session = h->session});
	EXPECT(h, "send:READ_REPLY#77 done:r=ERR_IO send:ACK");
	host_free(h);
}

/* ---- status ---- */

static struct repl_status status_of(struct host *h)
{
	struct repl_status s;
	repl_status(h->r, h->now, &s);
	return s;
}

Test(repl, the_queue_is_all_that_was_sent_and_has_not_left)
{
	struct host *h = primary(PROTOCOL_F);
	warm(h);
	tick(h, SEC);
	step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = 1 << 20});
	cr_assert_eq(status_of(h).queue_bytes, 0);
	forget(h);
	tick(h, SEC); /* a PING */
	guest(h, 'a', REPL_WRITE, 0, 4096);
	fin(h, "a");
	EXPECT(h, "do:a/disk send:WRITE#5 done:a");
	cr_assert_eq(status_of(h).queue_bytes, 2 * WIRE_HEADER_SIZE + 4096);
	step(h, (struct repl_event){.type = EV_SENT, .session = h->session, .bytes = WIRE_HEADER_SIZE});
	cr_assert_eq(status_of(h).queue_bytes, WIRE_HEADER_SIZE + 4096, "the write is whole in it");
	host_free(h);
}

/* How old what the peer lacks is, a host that has just started can't know. */
Test(repl, a_primary_that_has_restarted_knows_no_rpo_until_it_is_in_sync)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	m.alone = true;
	struct host *h = host_new(&m);
	cr_assert(status_of(h).rpo_known, "nothing is dirty");
	static uint64_t bits[64];
	struct bitmap b;
	cr_assert_leq(bitmap_bytes(units_of(SIZE, INTENT_SHIFT)), sizeof(bits));
	bitmap_init(&b, units_of(SIZE, INTENT_SHIFT), bits);
	bitmap_set(&b, 0);
	repl_load_intent(h->r, 0, &b, false);
	tick(h, SEC);
	cr_assert_not(status_of(h).rpo_known);
	host_free(h);
	h = primary(PROTOCOL_F);
	warm(h);
	ack(h, 3, 3, 3);
	link_down(h);
	tick(h, SEC);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	cr_assert(status_of(h).rpo_known);
	host_free(h);
}

/* It went back to a checkpoint, perhaps, and has less than it had applied once. */
Test(repl, the_rpo_is_not_known_beside_a_peer_that_began_a_generation)
{
	struct host *h = primary(PROTOCOL_F);
	warm(h);
	ack(h, 3, 3, 3);
	link_down(h);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	saved(h);
	cr_assert(status_of(h).rpo_known);
	static struct repl_meta survivor;
	meta_of(&survivor, ROLE_STANDALONE, STATE_DONE);
	survivor.lineage = (struct lineage){.current = 200, .bitmap = 100};
	survivor.alone = true;
	tick(h, 3 * SEC);
	link_up(h, true);
	join_frame(h, &survivor, 0);
	cr_assert_not(status_of(h).rpo_known);
	host_free(h);
}

Test(repl, a_commits_progress_never_passes_its_end)
{
	struct host *h = secondary();
	command(h, CMD_FAILOVER, FAILOVER_DEFAULT);
	repl_mark(h->r, 0, 0, 4096);
	fin(h, "mark");
	fin(h, "sync");
	saved(h);
	cr_assert_eq(status_of(h).commit_total, REGION_SIZE);
	cr_assert_eq(status_of(h).commit_done, 0, "it is under way");
	fin(h, "commit");
	cr_assert_eq(status_of(h).commit_done, REGION_SIZE);
	guest(h, 'i', REPL_WRITE, 65536, 4096);
	fin(h, "i");
	cr_assert_eq(status_of(h).commit_done, 0);
	fin(h, "commit");
	cr_assert_eq(status_of(h).commit_done, REGION_SIZE);
	host_free(h);
}

/* What frames call a volume is durable before the protection that uses it may begin, and stays while a peer knows it.
 */
Test(repl, ids_change_only_while_there_is_no_peer)
{
	static struct repl_meta m;
	repl_meta_init(&m, "vm");
	m.n_volumes = 1;
	(void)snprintf(m.volumes[0].name, sizeof(m.volumes[0].name), "vm");
	m.volumes[0].size = SIZE;
	m.volumes[0].id = 1;
	struct host *h = host_new(&m);
	h->cmd = (struct repl_command){.cmd = CMD_IDS, .ids = {77}};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	EXPECT(h, "save:standalone/NONE");
	cr_assert_eq(h->saved.volumes[0].id, 77);
	cr_assert_eq(repl_meta(h->r)->volumes[0].id, 1);
	struct repl_command second = {.cmd = CMD_IDS, .ids = {78}};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &second});
	saved(h);
	EXPECT(h, "cmd=ERR_BUSY cmd");
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &second});
	EXPECT(h, "save:standalone/NONE");
	save_fails(h, -ERR_IO);
	saved(h); /* the record as it was */
	forget(h);
	cr_assert_eq(repl_meta(h->r)->volumes[0].id, 77);
	cr_assert_eq(h->cmd_error, -ERR_IO);
	command(h, CMD_PROTECT, 0);
	EXPECT(h, "dial");
	struct repl_command late = {.cmd = CMD_IDS, .ids = {79}};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &late});
	EXPECT(h, "cmd=ERR_BUSY");
	host_free(h);

	h = primary(PROTOCOL_F);
	h->cmd = (struct repl_command){.cmd = CMD_IDS, .ids = {80}};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);

	/* A connection that ends is in nobody's way; one on which a JOIN comes before the save is, and its ids stand.
	 */
	for (int late_join = 0; late_join < 2; late_join++) {
		h = host_new(&m);
		link_up(h, false);
		meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
		peer_meta.volumes[0].id = 90;
		join_frame(h, &peer_meta, 0);
		EXPECT(h, "send:REFUSE close");
		h->cmd = (struct repl_command){.cmd = CMD_IDS, .ids = {81}};
		step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
		EXPECT(h, "save:standalone/NONE");
		if (late_join) {
			link_up(h, false);
			join_frame(h, &peer_meta, WIRE_JOIN_PROTECT);
			EXPECT(h, "");
			saved(h);
			EXPECT(h, "cmd save:secondary/NONE");
			saved(h);
			cr_assert_eq(repl_meta(h->r)->volumes[0].id, 90);
		} else {
			saved(h);
			EXPECT(h, "cmd");
			cr_assert_eq(repl_meta(h->r)->volumes[0].id, 81);
			command(h, CMD_PROTECT, 0);
			EXPECT(h, "dial");
		}
		host_free(h);
	}
}

/* ---- verify ---- */

static struct repl_verify verified;

static void verify(struct host *h, enum repl_repair repair)
{
	memset(&verified, 0, sizeof(verified));
	h->cmd = (struct repl_command){.cmd = CMD_VERIFY, .flags = repair, .verify = &verified};
	h->cmd_count = 0;
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
}

/* The step of the scrub that is under way here was the last, with what it found. */
static void fin_scrub(struct host *h, const struct wire_scrubbed *found)
{
	for (unsigned i = 0; i < h->n_submitted; i++) {
		if (h->submitted[i]->kind != REPL_SCRUB)
			continue;
		h->submitted[i]->scrub_end = true;
		*h->submitted[i]->scrub = *found;
	}
	fin(h, "scrub");
}

static void scrubbed(struct host *h, uint64_t token, bool end, const struct wire_scrubbed *s)
{
	uint8_t buf[WIRE_SCRUBBED_HEAD + WIRE_SCRUBBED_ENTRY * WIRE_SCRUBBED_MAX];
	int n = wire_scrubbed_encode(s, buf, sizeof(buf));
	struct wire_frame f = {.type = WIRE_SCRUBBED, .seq = token, .length_payload = (uint32_t)n};
	f.flags = end ? WIRE_SCRUBBED_END : 0;
	step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .payload = buf});
}

static void answer(struct host *h, uint64_t seq, uint64_t off, uint64_t len, uint64_t problem)
{
	uint8_t buf[WIRE_VERIFY_RANGE_SIZE];
	wire_verify_range_put(buf, &(struct wire_verify_range){off, len, problem});
	frame(h, WIRE_VERIFY_ANSWER, seq, 0, 0, buf, len ? sizeof(buf) : 0);
}

/* In sync under A, 64 KiB of data at the disk's start and nothing behind them, the overlays of both hosts looked at:
 * the data is being hashed, the hole's frame is out. */
static struct host *verifying(enum repl_repair repair)
{
	static const struct wire_scrubbed nothing;
	struct host *h = warm_primary(PROTOCOL_A);
	verify(h, repair);
	EXPECT(h, "do:scrub/own send:SCRUB#1 do:scan/own");
	scrubbed(h, 1, true, &nothing);
	fin_scrub(h, &nothing);
	fin_full(h, "scan", 0, false, 65536, false);
	EXPECT(h, "do:verify/own do:scan/own");
	cr_assert_eq(h->submitted[0]->len, 65536);
	fin_full(h, "scan", 0, true, SIZE - 65536, false);
	return h;
}

Test(repl, a_verify_reads_between_a_guests_writes_and_its_frame_is_between_theirs)
{
	struct host *h = verifying(REPAIR_NONE);
	EXPECT(h, "send:VERIFY#4");
	guest(h, 'w', REPL_WRITE, 4096, 4096);
	guest(h, 'x', REPL_WRITE, 131072, 4096);
	EXPECT(h, "do:x/disk"); /* the hole's claim has ended with its frame, the other write waits for the hash */
	fin(h, "verify");
	EXPECT(h, "send:VERIFY#5 do:w/disk");
	fin(h, "w");
	EXPECT(h, "send:WRITE#6 done:w");
	fin(h, "x");
	EXPECT(h, "send:WRITE#7 done:x");
	answer(h, 4, 0, 0, 0);
	EXPECT(h, "");
	answer(h, 5, 0, 0, 0);
	EXPECT(h, "cmd");
	cr_assert_eq(verified.bytes, SIZE);
	cr_assert_eq(verified.done, SIZE);
	cr_assert_eq(verified.total, SIZE);
	cr_assert_eq(verified.n + verified.found + verified.more, 0);
	host_free(h);
}

Test(repl, a_verify_names_what_differs_and_what_neither_host_can_read)
{
	struct host *h = verifying(REPAIR_NONE);
	h->submitted[0]->bad[0] = 6; /* the second and third block, here */
	fin(h, "verify");
	answer(h, 4, 1 << 20, 8192, WIRE_VERIFY_UNREADABLE);
	answer(h, 5, 0, 16384, WIRE_VERIFY_DIFFERS); /* the two of them by what they were said to be only */
	EXPECT(h, "send:VERIFY#4 send:VERIFY#5 cmd");
	static const struct repl_difference want[] = {
	    {.problem = PROBLEM_UNREADABLE, .where = WHERE_SECONDARY, .off = 1 << 20, .len = 8192},
	    {.problem = PROBLEM_UNREADABLE, .where = WHERE_PRIMARY, .off = 4096, .len = 8192},
	    {.problem = PROBLEM_DIFFERS, .where = WHERE_BOTH, .off = 0, .len = 4096},
	    {.problem = PROBLEM_DIFFERS, .where = WHERE_BOTH, .off = 12288, .len = 4096},
	};
	cr_assert_eq(verified.n, 4);
	for (unsigned i = 0; i < 4; i++)
		cr_assert_eq(memcmp(&verified.list[i], &want[i], sizeof(want[i])), 0, "%u", i);
	cr_assert_eq(verified.found, 8192 + 8192 + 8192);
	host_free(h);
}

Test(repl, overlays_of_both_hosts_are_named_by_their_checkpoint)
{
	struct wire_scrubbed s = {.bytes = 8192, .n = 1, .bad = {{.layer = 7, .off = 4096, .len = 4096}}};
	struct host *h = warm_primary(PROTOCOL_A);
	verify(h, REPAIR_NONE);
	fin_scrub(h, &s);
	s.next_layer = 9;
	s.bad[0].layer = WIRE_SCRUB_ACTIVE;
	s.bad[0].unreadable = 1;
	scrubbed(h, 1, false, &s);
	EXPECT(h, "do:scrub/own send:SCRUB#1 do:scan/own send:SCRUB#2");
	s.n = 0;
	scrubbed(h, 2, true, &s);
	fin_full(h, "scan", 0, true, SIZE, false);
	answer(h, 4, 0, 0, 0);
	EXPECT(h, "send:VERIFY#4 cmd");
	cr_assert_eq(verified.n, 2);
	cr_assert(verified.list[0].overlay && verified.list[0].where == WHERE_PRIMARY && verified.list[0].layer == 7 &&
		  verified.list[0].problem == PROBLEM_CHECKSUM && verified.list[0].off == 4096);
	cr_assert(verified.list[1].overlay && verified.list[1].where == WHERE_SECONDARY &&
		  verified.list[1].layer == WIRE_SCRUB_ACTIVE && verified.list[1].problem == PROBLEM_UNREADABLE);
	cr_assert_eq(verified.done, SIZE + 3 * 8192);
	host_free(h);
}

/* The intent map is clean at 1 MiB: the bit is durable before the block is sent, the checkpoint before that. */
Test(repl, a_repair_waits_for_its_checkpoint_and_its_dirty_bit)
{
	struct host *h = verifying(REPAIR_PEER);
	fin(h, "verify");
	forget(h);
	answer(h, 5, 0, 0, 0);
	answer(h, 4, 2 << 20, 4096, WIRE_VERIFY_DIFFERS);
	EXPECT(h, "send:CHECKPOINT#6");
	tick(h, SEC / 10);
	cr_assert_not(dirty(h, 2 << 20));
	forget(h);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	EXPECT(h, "do:gread/intent save:primary/RUNNING");
	saved(h);
	guest(h, 'w', REPL_WRITE, 2 << 20, 4096);
	EXPECT(h, ""); /* behind it */
	cr_assert_not(dirty(h, 2 << 20));
	fin(h, "gread");
	EXPECT(h, "do:gread/disk");
	cr_assert(dirty(h, 2 << 20));
	fin(h, "gread");
	EXPECT(h, "send:WRITE#8 do:w/disk"); /* #7: a clear cycle */
	fin(h, "w");
	EXPECT(h, "send:WRITE#9 do:verify/own done:w"); /* compared again behind what came meanwhile */
	fin(h, "verify");
	answer(h, 10, 0, 0, 0);
	EXPECT(h, "send:VERIFY#10 cmd");
	cr_assert_eq(verified.ckpt, 3);
	cr_assert_eq(verified.repaired, 4096);
	cr_assert(verified.list[0].repaired);
	host_free(h);
}

Test(repl, a_repair_from_the_peer_reads_behind_all_that_was_sent_and_writes_under_its_claim)
{
	struct host *h = verifying(REPAIR_FROM_PEER);
	uint8_t data[4096] = {1};
	fin(h, "verify");
	answer(h, 4, 0, 0, 0);
	answer(h, 5, 8192, 4096, WIRE_VERIFY_DIFFERS);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	saved(h);
	EXPECT(h, "send:VERIFY#4 send:VERIFY#5 send:CHECKPOINT#6 send:READ_REQ#1 save:primary/RUNNING");
	cr_assert(dirty(h, 8192));
	guest(h, 'w', REPL_WRITE, 8192, 4096);
	EXPECT(h, "");
	frame(h, WIRE_READ_REPLY, 1, 8192, 4096, data, sizeof(data));
	EXPECT(h, "do:rebuild/own");
	fin(h, "rebuild");
	EXPECT(h, "do:w/disk");
	fin(h, "w");
	fin(h, "verify");
	answer(h, 8, 0, 0, 0);
	EXPECT(h, "send:WRITE#7 do:verify/own done:w send:VERIFY#8 changed cmd");
	cr_assert(verified.wrote_here);
	cr_assert_eq(verified.repaired, 4096);
	host_free(h);
}

Test(repl, a_repair_without_its_checkpoint_repairs_nothing)
{
	struct host *h = verifying(REPAIR_PEER);
	fin(h, "verify");
	answer(h, 5, 0, 4096, WIRE_VERIFY_DIFFERS);
	forget(h);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, WIRE_VOID_ACTIVE, NULL, 0);
	EXPECT(h, "cmd=ERR_STATE");
	answer(h, 4, 0, 0, 0); /* too late: nobody asks any more */
	EXPECT(h, "");
	cr_assert_eq(verified.n, 1);
	host_free(h);
}

/* What the secondary can't read it can't save either: a write to it would stop its applying. */
Test(repl, what_the_secondary_cannot_read_is_left_alone)
{
	struct host *h = verifying(REPAIR_PEER);
	fin(h, "verify");
	answer(h, 4, 0, 0, 0);
	forget(h);
	answer(h, 5, 0, 4096, WIRE_VERIFY_UNREADABLE);
	EXPECT(h, "cmd");
	cr_assert_eq(verified.found, 4096);
	cr_assert_eq(verified.repaired + verified.ckpt, 0);
	host_free(h);
}

Test(repl, a_verify_ends_with_the_connection_with_sync_and_with_its_client)
{
	struct host *h = verifying(REPAIR_NONE);
	forget(h);
	link_down(h);
	EXPECT(h, "cmd=ERR_PEER");
	fin(h, "verify"); /* what was under way ends its claim */
	guest(h, 'w', REPL_WRITE, 0, 4096);
	saved(h);
	EXPECT(h, "save:primary/RUNNING do:w/disk");
	host_free(h);

	h = verifying(REPAIR_NONE);
	forget(h);
	struct repl_command pause = {.cmd = CMD_PAUSE};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &pause});
	saved(h);
	EXPECT(h, "save:primary/RUNNING cmd=ERR_STATE send:FLUSH#5 do:sync/disk send:BEHIND cmd");
	host_free(h);

	h = verifying(REPAIR_NONE);
	forget(h);
	struct repl_command cancel = {.cmd = CMD_VERIFY_CANCEL};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &cancel});
	EXPECT(h, "cmd"); /* of another one */
	cancel.verify = &verified;
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &cancel});
	EXPECT(h, "cmd=ERR_INTR cmd");
	verify(h, REPAIR_NONE); /* the next one, while a request of the last is under way */
	EXPECT(h, "do:scrub/own send:SCRUB#2 do:scan/own");
	fin(h, "verify");
	EXPECT(h, "");
	host_free(h);
}

Test(repl, a_verify_keeps_resync_rate)
{
	struct host *h = warm_primary(PROTOCOL_A);
	static const struct wire_scrubbed nothing;
	struct repl_command set = {.cmd = CMD_SETTINGS, .number = SETTINGS_ALL};
	set.settings = repl_meta(h->r)->settings;
	set.settings.resync_rate = 1 << 20;
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &set});
	saved(h);
	frame(h, WIRE_SETTINGS_ACK, 1, 0, 0, NULL, 0);
	verify(h, REPAIR_NONE);
	scrubbed(h, 1, true, &nothing);
	fin_scrub(h, &nothing);
	fin_full(h, "scan", 0, false, SIZE, false);
	uint64_t began = h->now, read = 0;
	unsigned seq = 0;
	for (unsigned i = 0; i < 200 && h->cmd_count == 0; i++) {
		for (unsigned k = 0; k < h->n_submitted; k++) {
			if (h->submitted[k]->kind != REPL_VERIFY)
				continue;
			read += h->submitted[k]->len;
			forget(h);
			fin(h, "verify");
			const char *at = strstr(h->trace, "send:VERIFY#");
			cr_assert_neq(at, NULL);
			seq = (unsigned)atoi(at + strlen("send:VERIFY#"));
			answer(h, seq, 0, 0, 0);
			break;
		}
		if (seq)
			ack(h, seq, seq, seq);
		tick(h, SEC / 10);
	}
	cr_assert_eq(h->cmd_error, 0, "%s", h->cmd.err.text);
	cr_assert_eq(read, SIZE);
	cr_assert_geq(h->now - began, 6 * SEC, "%f s", (double)(h->now - began) / 1e9);
	host_free(h);
}

Test(repl, a_verify_is_refused_where_there_is_nothing_to_compare)
{
	struct host *h = secondary();
	verify(h, REPAIR_NONE);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
	h = warm_primary(PROTOCOL_A);
	link_down(h);
	forget(h);
	verify(h, REPAIR_NONE);
	EXPECT(h, "cmd=ERR_PEER");
	host_free(h);
	h = verifying(REPAIR_NONE);
	struct repl_command second = {.cmd = CMD_VERIFY, .verify = calloc(1, sizeof(struct repl_verify))};
	forget(h);
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &second});
	EXPECT(h, "cmd=ERR_BUSY");
	free(second.verify);
	host_free(h);
}

/* The target's side: its place is among overlapping writes, and the answer goes out before the ACK. */
Test(repl, a_target_compares_at_the_frames_place_and_looks_at_its_overlays)
{
	struct host *h = secondary();
	forget(h);
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	stream(h, 'v', WIRE_VERIFY, REPL_VERIFY, 3, 0, 65536);
	stream(h, 'b', WIRE_WRITE, REPL_WRITE, 4, 4096, 4096);
	stream(h, 'u', WIRE_VERIFY, REPL_VERIFY, 5, 65536, 65536);
	EXPECT(h, "do:a/disk do:u/disk");
	fin(h, "a");
	EXPECT(h, "do:v/disk done:a");
	fin_full(h, "v", 0, false, WIRE_VERIFY_RANGE_SIZE, false);
	EXPECT(h, "do:b/disk send:VERIFY_ANSWER#3 done:v");
	fin(h, "u");
	EXPECT(h, "send:VERIFY_ANSWER#5 done:u");
	fin(h, "b");
	EXPECT(h, "done:b");

	frame(h, WIRE_SCRUB, 1, 4096, 3, NULL, 0);
	EXPECT(h, "do:scrub/own");
	cr_assert_eq(h->submitted[0]->scrub->next_layer, 3);
	cr_assert_eq(h->submitted[0]->scrub->next_off, 4096);
	fin_scrub(h, &(struct wire_scrubbed){.bytes = 4096});
	EXPECT(h, "send:SCRUBBED#1");
	frame(h, WIRE_SCRUB, 2, 0, 0, NULL, 0);
	forget(h);
	frame(h, WIRE_SCRUB, 3, 0, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	host_free(h);
}

/* ---- resize ---- */

/* A save that makes the volume larger. */
static void saved_larger(struct host *h)
{
	cr_assert(h->saving);
	h->saving = false;
	void *maps[GROUP_VOLUMES_MAX] = {calloc(1, repl_volume_bytes(h->saved.volumes[0].size))};
	step(h, (struct repl_event){.type = EV_META_SAVED, .maps = maps});
	free(h->mem[0]);
	h->mem[0] = maps[0];
}

static void resize(struct host *h, uint64_t size)
{
	command(h, CMD_RESIZE, size);
}

static void refuse_resize(struct host *h, uint64_t seq, enum err_code code)
{
	uint8_t buf[64];
	struct wire_refuse x = {.code = (uint16_t)code, .text = "no"};
	int n = wire_refuse_encode(&x, buf, sizeof(buf));
	frame(h, WIRE_RESIZE_ACK, seq, code, 0, buf, (uint32_t)n);
}

Test(repl, a_resize_is_shown_when_both_hosts_have_it)
{
	struct host *h = warm_primary(PROTOCOL_A);
	resize(h, SIZE + 65536);
	EXPECT(h, "do:grow/own");
	fin(h, "grow");
	EXPECT(h, "send:RESIZE#4");
	cr_assert_eq(repl_meta(h->r)->volumes[0].size, SIZE);
	guest(h, 'w', REPL_WRITE, 0, 4096);
	fin(h, "w");
	forget(h);
	frame(h, WIRE_RESIZE_ACK, 4, 0, 0, NULL, 0);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].size, SIZE + 65536);
	cr_assert(dirty(h, 0));
	saved_larger(h);
	EXPECT(h, "cmd");
	cr_assert_eq(h->cmd.result, SIZE);
	cr_assert(dirty(h, 0), "what was dirty is dirty still");
	guest(h, 'x', REPL_WRITE, SIZE, 65536);
	fin(h, "x"); /* its intent bit: a unit that was not there */
	fin(h, "x");
	EXPECT(h, "do:x/intent do:x/disk send:WRITE#6 done:x");
	cr_assert(dirty(h, SIZE));
	tick(h, SEC / 10);
	cr_assert(strstr(h->trace, "send:CHECKPOINT#") != NULL, "%s", h->trace);
	host_free(h);
}

Test(repl, a_peer_that_can_not_grow_stops_a_resize_before_anything_is_changed)
{
	struct host *h = warm_primary(PROTOCOL_A);
	resize(h, SIZE + 512);
	fin(h, "grow");
	forget(h);
	refuse_resize(h, 4, ERR_NOSPC);
	EXPECT(h, "do:grow/own");
	cr_assert_eq(h->submitted[0]->arg, SIZE, "its own file gets its old length");
	fin(h, "grow");
	EXPECT(h, "cmd=ERR_NOSPC");
	cr_assert(strstr(h->cmd.err.text, "nothing was changed"), "%s", h->cmd.err.text);
	cr_assert_eq(repl_meta(h->r)->volumes[0].size, SIZE);
	/* and this host's own file */
	resize(h, SIZE + 512);
	fin_full(h, "grow", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "do:grow/own cmd=ERR_NOSPC");
	host_free(h);
}

Test(repl, a_resize_whose_connection_is_lost_says_so)
{
	struct host *h = warm_primary(PROTOCOL_A);
	resize(h, SIZE + 512);
	fin(h, "grow");
	forget(h);
	link_down(h);
	EXPECT(h, "cmd=ERR_PEER");
	host_free(h);
	h = warm_primary(PROTOCOL_A);
	resize(h, SIZE + 512);
	link_down(h);
	forget(h);
	fin(h, "grow");
	EXPECT(h, "do:grow/own");
	fin(h, "grow");
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
}

/* The clear's job looks at the bitmaps that the record's save replaces. */
Test(repl, a_resize_is_not_saved_while_intent_bits_are_being_cleared)
{
	struct host *h = warm_primary(PROTOCOL_A);
	ack(h, 3, 3, 3);
	ticks(h, 2 * SEC);
	fin(h, "sync");
	ack(h, 4, 4, 4);
	ticks(h, 25 * SEC);
	cr_assert(strstr(h->trace, "do:iclear/own") != NULL, "%s", h->trace);
	resize(h, SIZE + 512);
	fin(h, "grow");
	const char *at = strstr(h->trace, "send:RESIZE#");
	cr_assert(at != NULL);
	uint64_t seq = (uint64_t)atoi(at + strlen("send:RESIZE#"));
	forget(h);
	frame(h, WIRE_RESIZE_ACK, seq, 0, 0, NULL, 0);
	EXPECT(h, "");
	fin(h, "iclear");
	EXPECT(h, "save:primary/RUNNING");
	ack(h, seq, seq, seq);
	ticks(h, 25 * SEC); /* none begins meanwhile */
	cr_assert(strstr(h->trace, "do:iclear") == NULL, "%s", h->trace);
	saved_larger(h);
	host_free(h);
}

Test(repl, a_resize_is_refused_by_reason)
{
	struct host *h = warm_primary(PROTOCOL_A);
	resize(h, SIZE);
	EXPECT(h, "cmd");
	resize(h, SIZE - 512);
	EXPECT(h, "cmd=ERR_RANGE");
	resize(h, SIZE + 1);
	EXPECT(h, "cmd=ERR_RANGE");
	resize(h, VOLUME_SIZE_MAX + 512);
	EXPECT(h, "cmd=ERR_RANGE");
	frame(h, WIRE_RESIZE_ACK, 1, 0, 0, NULL, 0);
	EXPECT(h, "send:REFUSE close");
	resize(h, SIZE + 512);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
	h = secondary();
	resize(h, SIZE + 512);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);
}

static void resize_frame(struct host *h, uint64_t seq, uint64_t size)
{
	struct repl_io *io = &h->io['r'];
	*io = (struct repl_io){.kind = REPL_RESIZE, .seq = seq, .arg = size, .owner = 'r'};
	struct wire_frame f = {.type = WIRE_RESIZE, .seq = seq, .offset = size};
	step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .io = io});
}

Test(repl, a_target_grows_at_the_barrier_and_its_checkpoints_do_not)
{
	struct host *h = secondary();
	forget(h);
	stream(h, 'a', WIRE_WRITE, REPL_WRITE, 2, 0, 4096);
	resize_frame(h, 3, SIZE + 4096);
	stream(h, 'b', WIRE_WRITE, REPL_WRITE, 4, 0, 4096);
	EXPECT(h, "do:a/disk");
	fin(h, "a");
	EXPECT(h, "done:a do:r/disk");
	fin(h, "r");
	EXPECT(h, "save:secondary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].size, SIZE + 4096);
	cr_assert_eq(repl_meta_size_at(&h->saved, 0, 1), SIZE);
	saved_larger(h);
	EXPECT(h, "send:RESIZE_ACK#3 send:ACK done:r do:b/disk");
	fin(h, "b");
	forget(h);
	resize_frame(h, 5, SIZE + 4096); /* the same again */
	fin(h, "r");
	EXPECT(h, "do:r/disk send:RESIZE_ACK#5 send:ACK done:r");
	resize_frame(h, 6, SIZE + 8192); /* no room: it is an ordinary flush, and nothing stops */
	fin_full(h, "r", 0, false, ERR_NOSPC, false);
	EXPECT(h, "do:r/disk send:RESIZE_ACK#6 send:ACK done:r");
	cr_assert_eq(repl_meta(h->r)->volumes[0].size, SIZE + 4096);
	stream(h, 'c', WIRE_WRITE, REPL_WRITE, 7, 0, 4096);
	EXPECT(h, "do:c/disk");
	host_free(h);
}

/* Halted, both keep their sizes; but not where a `resolve` makes one of them the other's source. */
Test(repl, a_resolve_between_sizes_grows_the_smaller)
{
	for (int dialer = 0; dialer < 2; dialer++) {
		for (int wins = 0; wins < 2; wins++) {
			struct host *h = halted(dialer);
			peer_meta.volumes[0].size = SIZE + (3 << 20);
			tick(h, 0);
			link_up(h, dialer);
			join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
			EXPECT(h, dialer ? "dial send:JOIN send:DIRTY_END" : "send:JOIN send:DIRTY_END");
			link_down(h);
			command(h, CMD_RESOLVE, wins ? DISCARD_PEER : DISCARD_LOCAL);
			link_up(h, dialer);
			forget(h);
			join_frame(h, &peer_meta, WIRE_JOIN_SPLIT);
			EXPECT(h, "do:grow/own");
			fin(h, "grow");
			forget(h);
			saved_larger(h);
			if (wins)
				frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
			EXPECT(h, wins	   ? dialer ? "do:intents/own" : "send:JOIN do:intents/own"
				  : dialer ? "send:DIRTY_END"
					   : "send:JOIN send:DIRTY_END");
			cr_assert_eq(repl_meta(h->r)->volumes[0].size, SIZE + (3 << 20));
			host_free(h);
		}
	}
}

/* A cut between the two records: the smaller grows before anything is decided, and says nothing before. */
Test(repl, the_smaller_of_two_grows_in_the_handshake)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	peer_meta.volumes[0].size = SIZE + (3 << 20);
	struct host *h = host_new(&m);
	tick(h, 1);
	link_up(h, true);
	forget(h);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "do:grow/own");
	dirty_frame(h, SIZE - 65536, 131072); /* it may have said what it holds by now: also of what is not here yet */
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "");
	fin(h, "grow");
	EXPECT(h, "save:primary/RUNNING");
	saved_larger(h);
	EXPECT(h, "do:intents/own");
	cr_assert(dirty(h, SIZE - 65536) && dirty(h, SIZE));
	cr_assert_eq(repl_meta(h->r)->volumes[0].size, SIZE + (3 << 20));
	fin(h, "intents");
	saved(h);
	cr_assert(strstr(h->trace, "send:RESYNC_BEGIN#1") != NULL, "%s", h->trace);
	host_free(h);

	h = host_new(&m); /* one that can't says why, and again at the next try */
	tick(h, 1);
	link_up(h, true);
	join_frame(h, &peer_meta, 0);
	forget(h);
	fin_full(h, "grow", -ERR_NOSPC, false, 0, false);
	EXPECT(h, "send:REFUSE close");
	host_free(h);

	h = host_new(&m); /* a smaller peer grows by itself */
	peer_meta.volumes[0].size = SIZE - 512;
	tick(h, 1);
	link_up(h, true);
	forget(h);
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "");
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "do:intents/own");
	fin(h, "intents");
	saved(h);
	host_free(h);
}

/* ---- what comes between the steps of something else ---- */

/* What a command of a lost session wanted is no wish of the next session's: it would empty an active overlay. */
Test(repl, a_checkpoint_that_was_wanted_by_a_command_dies_with_its_session)
{
	struct host *h = primary(PROTOCOL_F);
	frame(h, WIRE_CHECKPOINT_WANT, 0, WIRE_CKPT_COMMAND | WIRE_CKPT_PIN, 0, NULL, 0);
	link_down(h);
	connect(h, &peer_meta);
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	saved(h);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	saved(h);
	forget(h);
	frame(h, WIRE_CHECKPOINT_WANT, 0, 0, 0, NULL, 0);
	h->sent_flags = 0xffff;
	tick(h, SEC / 10);
	EXPECT(h, "send:CHECKPOINT#3");
	cr_assert_eq(h->sent_flags, 0);
	host_free(h);
}

/* The number that the resync's own checkpoint gets would lie above it. */
Test(repl, a_checkpoint_before_the_end_of_a_resync_breaks_the_protocol)
{
	struct host *h = secondary();
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 2, 100, 0);
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 3, 0, 0);
	EXPECT(h, "do:r/ckpt");
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 4, 7, 0);
	EXPECT(h, "done:c=ERR_CANCELED send:REFUSE close");
	fin(h, "r");
	saved(h);
	fin(h, "d");
	saved(h);
	host_free(h);
}

/* The record that ends the role is on its way. */
Test(repl, a_stop_that_a_step_down_overtakes_is_none)
{
	struct host *h = primary(PROTOCOL_F);
	static struct repl_meta survivor;
	meta_of(&survivor, ROLE_STANDALONE, STATE_DONE);
	survivor.lineage = (struct lineage){.current = 200, .bitmap = 100};
	survivor.alone = true;
	link_down(h);
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &survivor, 0);
	EXPECT(h, "dial send:JOIN save:secondary/NONE");
	link_down(h);
	command(h, CMD_STOP, 0);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "cmd=ERR_STATE");
	cr_assert_eq(repl_meta(h->r)->state, STATE_NONE);
	guest(h, 'a', REPL_WRITE, 0, 4096);
	EXPECT(h, "done:a=ERR_IO");
	host_free(h);
}

static struct host *two_volumes(void)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_SECONDARY, STATE_RUNNING);
	two_disks(&m);
	struct host *h = host_new(&m);
	connect(h, &peer_meta);
	ack(h, 1, 1, 1);
	frame(h, WIRE_RESYNC_ACK, 1, 0, 0, NULL, 0);
	saved(h);
	ack(h, 2, 2, 2);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 2, 0, NULL, 0);
	saved(h);
	forget(h);
	return h;
}

static void guest2(struct host *h, char name, enum repl_kind kind, uint64_t off, uint64_t len)
{
	struct repl_io *io = &h->io[(unsigned char)name];
	*io = (struct repl_io){.kind = kind, .volume = 1, .off = off, .len = len, .owner = (uint8_t)name};
	step(h, (struct repl_event){.type = EV_IO, .io = io});
}

/* Its write waits for the peer; one to the second disk is under way. */
static struct host *first_of_two_detached(void)
{
	struct host *h = two_volumes();
	guest(h, 'a', REPL_WRITE, 0, 4096);
	guest2(h, 'b', REPL_WRITE, 0, 4096);
	fin(h, "a");
	fin(h, "b");
	fin_full(h, "a", -ERR_IO, false, 0, false);
	ack(h, 3, 3, 3);
	saved(h);
	return h;
}

/* The record of the first one is on its way. */
Test(repl, nothing_of_a_second_disk_is_answered_before_its_detach_is_recorded)
{
	struct host *h = two_volumes();
	guest(h, 'a', REPL_WRITE, 0, 4096);
	guest2(h, 'b', REPL_WRITE, 0, 4096);
	fin(h, "a");
	fin(h, "b");
	EXPECT(h, "do:a/intent do:b/intent do:a/disk do:b/disk");
	fin_full(h, "a", -ERR_IO, false, 0, false);
	EXPECT(h, "send:DETACH#3");
	ack(h, 3, 3, 3);
	EXPECT(h, "save:primary/RUNNING");
	uint64_t first = h->saved.lineage.current;
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "send:DETACH#4");
	ack(h, 4, 4, 4);
	EXPECT(h, "");
	cr_assert_eq(h->saved.volumes[1].flags, 0);
	saved(h);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[1].flags, VOLUME_STALE);
	cr_assert(h->saved.lineage.current != first && lineage_has(&h->saved.lineage, first));
	saved(h);
	EXPECT(h, "send:WRITE#5 send:WRITE#6");
	host_free(h);
}

/* It was not opened anew. */
Test(repl, a_disk_that_fails_beside_a_rebuilds_begin_is_not_in_it)
{
	struct host *h = first_of_two_detached();
	forget(h);
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "do:reopen/own");
	fin_full(h, "b", -ERR_IO, false, 0, false);
	ack(h, 5, 5, 5);
	saved(h);
	forget(h);
	fin(h, "reopen");
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_STALE | VOLUME_REBUILD);
	cr_assert_eq(h->saved.volumes[1].flags, VOLUME_STALE);
	saved(h);
	cr_assert_eq(repl_unsynced(h->r), 2);
	host_free(h);
}

Test(repl, the_generation_of_a_detach_that_was_undone_ends_with_the_role)
{
	struct host *h = warm_primary(PROTOCOL_F);
	static struct repl_meta survivor;
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	meta_of(&survivor, ROLE_PRIMARY, STATE_DONE);
	survivor.lineage = (struct lineage){.current = 200, .bitmap = 100};
	link_down(h);
	link_up(h, false);
	join_frame(h, &survivor, WIRE_JOIN_FAILBACK);
	forget(h);
	saved(h);
	EXPECT(h, "send:JOIN send:DIRTY send:DIRTY_END");
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 200, 0);
	fin(h, "r");
	saved(h);
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 2, 0, 0);
	h->io['d'].lineage.current = 200;
	fin(h, "d");
	saved(h);
	cr_assert_eq(repl_meta(h->r)->lineage.current, 200);
	command(h, CMD_FAILOVER, FAILOVER_LATEST);
	fin(h, "mark");
	fin(h, "sync");
	cr_assert_eq(h->saved.lineage.bitmap, 200);
	host_free(h);
}

/* Its store could not be written: that the disk is not current is known in memory only. */
Test(repl, a_host_that_steps_down_records_its_detached_disk)
{
	struct host *h = warm_primary(PROTOCOL_F);
	static struct repl_meta survivor;
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	ack(h, 4, 4, 4);
	save_fails(h, -ERR_IO);
	saved(h);
	link_down(h);
	meta_of(&survivor, ROLE_STANDALONE, STATE_DONE);
	survivor.lineage = (struct lineage){.current = 200, .bitmap = 150, .history = {100}};
	survivor.alone = true;
	link_up(h, true);
	forget(h);
	join_frame(h, &survivor, 0);
	EXPECT(h, "save:secondary/NONE");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_STALE);
	tick(h, 2 * SEC);
	saved(h);
	if (h->saving)
		saved(h);
	cr_assert_eq(repl_meta(h->r)->lineage.current, 100);
	cr_assert_eq(repl_meta(h->r)->volumes[0].flags, VOLUME_STALE);
	host_free(h);
}

Test(repl, a_rebuild_begins_when_the_detach_is_recorded)
{
	struct host *h = warm_primary(PROTOCOL_F);
	guest(h, 'a', REPL_WRITE, 65536, 4096);
	fin_full(h, "a", -ERR_IO, false, 0, false);
	ack(h, 4, 4, 4);
	save_fails(h, -ERR_IO);
	saved(h);
	forget(h);
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	tick(h, 2 * SEC);
	saved(h);
	forget(h);
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "do:reopen/own");
	host_free(h);
}

static struct host *attaching(void)
{
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	saved(h);
	for (uint64_t i = 0; i < 16; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, 0);
		fin(h, "rebuild");
	}
	forget(h);
	fin(h, "sync");
	EXPECT(h, "send:ATTACH#6");
	guest(h, 'b', REPL_WRITE, 65536, 4096);
	EXPECT(h, "do:b/disk");
	return h;
}

/* What the peer was told, and the record is about to say, is that it is whole. */
Test(repl, a_disk_that_fails_while_its_end_of_rebuild_is_recorded_is_detached_anew)
{
	struct host *h = attaching();
	ack(h, 6, 6, 6);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, 0);
	uint64_t was = h->saved.lineage.current;
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "send:DETACH#7");
	saved(h);
	EXPECT(h, "");
	ack(h, 7, 7, 7);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_STALE);
	cr_assert_neq(h->saved.lineage.current, was);
	saved(h);
	EXPECT(h, "send:WRITE#8");
	host_free(h);
}

Test(repl, a_disk_whose_end_of_rebuild_cannot_be_recorded_is_detached_anew)
{
	struct host *h = attaching();
	fin(h, "b");
	ack(h, 7, 7, 6);
	EXPECT(h, "send:WRITE#7 done:b save:primary/RUNNING");
	save_fails(h, -ERR_IO);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_eq(h->saved.volumes[0].flags, VOLUME_STALE | VOLUME_REBUILD);
	saved(h);
	EXPECT(h, "send:DETACH#8");
	host_free(h);
}

/* What a write that waits there has put on the peer only, the repair would overwrite. */
Test(repl, a_repair_reads_no_disk_that_is_detached)
{
	struct host *h = verifying(REPAIR_PEER);
	fin(h, "verify");
	answer(h, 4, 0, 0, 0);
	guest(h, 'w', REPL_WRITE, 8192, 4096);
	forget(h);
	answer(h, 5, 8192, 4096, WIRE_VERIFY_DIFFERS);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	saved(h);
	EXPECT(h, "send:CHECKPOINT#6 save:primary/RUNNING");
	fin_full(h, "w", -ERR_IO, false, 0, false);
	EXPECT(h, "cmd=ERR_STATE send:DETACH#7");
	ack(h, 7, 7, 7);
	saved(h);
	EXPECT(h, "save:primary/RUNNING send:WRITE#8");
	host_free(h);
}

Test(repl, a_write_of_a_repair_that_ends_after_its_verify_is_dirty)
{
	struct host *h = verifying(REPAIR_FROM_PEER);
	uint8_t data[4096] = {1};
	fin(h, "verify");
	answer(h, 4, 0, 0, 0);
	answer(h, 5, 8192, 4096, WIRE_VERIFY_DIFFERS);
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
	saved(h);
	frame(h, WIRE_READ_REPLY, 1, 8192, 4096, data, sizeof(data));
	forget(h);
	tick(h, 2 * SEC);
	EXPECT(h, "send:FLUSH#7 do:sync/disk");
	fin(h, "sync");
	ack(h, 7, 7, 7);
	cr_assert_not(dirty(h, 8192));
	struct repl_command cancel = {.cmd = CMD_VERIFY_CANCEL, .verify = &verified};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &cancel});
	fin_full(h, "rebuild", -ERR_IO, false, 0, false);
	cr_assert(dirty(h, 8192));
	host_free(h);
}

/* The peer would take it for a primary that goes on as such. */
Test(switchover, nothing_of_a_verify_follows_its_checkpoint)
{
	struct host *h = clean_primary(PROTOCOL_F);
	struct repl_command over = {.cmd = CMD_SWITCHOVER};
	verify(h, REPAIR_NONE);
	forget(h);
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &over});
	EXPECT(h, "cmd=ERR_STATE send:CHECKPOINT#5");
	fin_full(h, "scan", 0, true, SIZE, false);
	EXPECT(h, "");
	host_free(h);
}

/* Until the region can be read again the pair is not in sync: requests would wait for that. */
Test(repl, a_stop_ends_where_a_write_under_way_fails)
{
	for (int over = 0; over < 2; over++) {
		struct host *h = warm_primary(PROTOCOL_F);
		pass(h);
		guest(h, 'a', REPL_WRITE, 0, 4096);
		command(h, over ? CMD_SWITCHOVER : CMD_STOP, 0);
		guest(h, 'b', REPL_WRITE, 8192, 4096);
		EXPECT(h, "do:a/disk");
		fin_full(h, "a", -ERR_IO, false, 0, false);
		EXPECT(h, "send:WRITE_FAILED cmd=ERR_STATE send:FLUSH#4 do:sync/disk send:BEHIND done:a=ERR_IO "
			  "save:primary/RUNNING");
		saved(h);
		EXPECT(h, "do:b/disk");
		host_free(h);
	}
}

/* Its sender waits for an answer, and the switchover comes to nothing. */
Test(repl, a_stop_that_is_wanted_during_a_switchover_comes_after_it)
{
	struct host *h = clean_primary(PROTOCOL_F);
	command(h, CMD_SWITCHOVER, 0);
	EXPECT(h, "send:CHECKPOINT#5");
	frame(h, WIRE_STOP_WANT, 0, 0, 0, NULL, 0);
	EXPECT(h, "");
	frame(h, WIRE_CHECKPOINT_ACK, 0, 3, WIRE_VOID_ACTIVE, NULL, 0);
	EXPECT(h, "cmd=ERR_STATE");
	tick(h, SEC / 10);
	EXPECT(h, "send:CHECKPOINT#6");
	host_free(h);
}

/* Its sender knows that the disk is whole before this host's record does. */
Test(repl, a_stop_that_is_wanted_while_the_end_of_a_rebuild_is_recorded_comes_after_it)
{
	struct host *h = attaching();
	fin(h, "b");
	EXPECT(h, "send:WRITE#7");
	ack(h, 7, 7, 7);
	EXPECT(h, "done:b save:primary/RUNNING");
	frame(h, WIRE_STOP_WANT, 0, 0, 0, NULL, 0);
	EXPECT(h, "");
	saved(h);
	tick(h, SEC / 10);
	EXPECT(h, "send:FLUSH#8 do:sync/disk");
	fin(h, "sync");
	ack(h, 8, 8, 8);
	EXPECT(h, "send:CHECKPOINT#9");
	host_free(h);
}

Test(lineage_core, a_copy_that_is_started_again_is_not_unprotected)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_DONE);
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_DONE);
	struct host *h = host_new(&m);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_START);
	EXPECT(h, "save:secondary/NONE");
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	saved(h);
	EXPECT(h, "send:JOIN send:DIRTY_END");
	host_free(h);
}

/* The record that forgets the peer is on its way. */
Test(lineage_core, a_join_that_comes_while_its_host_is_unprotected_decides_nothing)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_DONE);
	(void)snprintf(m.peer, sizeof(m.peer), "peer:1");
	m.lineage = (struct lineage){.current = 300, .bitmap = 100};
	m.alone = true;
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_DONE);
	struct host *h = host_new(&m);
	tick(h, 0);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "save:standalone/DONE");
	join_frame(h, &peer_meta, WIRE_JOIN_START);
	saved(h);
	EXPECT(h, "close cmd");
	cr_assert_not(repl_meta(h->r)->split_brain);
	link_down(h);
	host_free(h);
}

Test(repl, a_commit_that_is_tried_again_beside_a_clear_begins)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_FAILOVER);
	m.failover_generation = 100;
	m.n_ckpts = 2;
	m.ckpt_max = 2;
	for (unsigned i = 0; i < 2; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100};
	m.target = m.base = 1;
	m.received = 2;
	m.active_id = 1;
	struct host *h = host_new(&m);
	fin_full(h, "mark", -ERR_IO, false, 0, false);
	EXPECT(h, "do:mark/own save:standalone/FAILOVER_FAILED");
	saved(h);
	repl_volume_state(h->r, 0)->intent.count = 0;
	bitmap_set(&repl_volume_state(h->r, 0)->intent, 3);
	h->now += 20 * SEC;
	tick(h, 0);
	EXPECT(h, "do:iclear/own");
	command(h, CMD_FAILOVER, 0);
	EXPECT(h, "save:standalone/FAILOVER");
	saved(h);
	EXPECT(h, "cmd");
	fin(h, "iclear");
	tick(h, SEC / 10);
	EXPECT(h, "do:mark/own");
	host_free(h);
}

/* The merge takes its time. */
Test(repl, room_leaves_a_checkpoint_that_is_held_since)
{
	struct host *h = secondary_with(ON_COW_ERROR_DROP_HISTORY, 4, 1);
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "do:merge/own"); /* 2, above the pinned one */
	hold(h, CMD_HOLD, 2, "job 7");
	EXPECT(h, "cmd");
	fin(h, "merge");
	EXPECT(h, "do:a/disk");
	fin_full(h, "a", -ERR_NOSPC, false, 0, true);
	EXPECT(h, "do:merge/own"); /* 3 */
	fin(h, "merge");
	EXPECT(h, "save:secondary/RUNNING -3");
	host_free(h);
}

Test(repl, a_failover_under_way_keeps_what_break_was_about_to_give_up)
{
	struct host *h = secondary_with(ON_COW_ERROR_BREAK, 3, 7);
	struct repl_command discard = {.cmd = CMD_DISCARD};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &discard});
	EXPECT(h, "save:secondary/RUNNING");
	fin_full(h, "a", -ERR_IO, false, 0, true);
	EXPECT(h, "");
	command(h, CMD_FAILOVER, 0);
	EXPECT(h, "send:GOODBYE close");
	saved(h);
	EXPECT(h, "cmd do:a/disk");
	fin_full(h, "a", -ERR_IO, false, 0, true);
	fin(h, "b");
	fin(h, "mark");
	fin(h, "sync");
	EXPECT(h, "done:a=ERR_IO done:f=ERR_CANCELED done:b do:mark/own do:sync/disk save:standalone/FAILOVER +4");
	host_free(h);
}

/* Retention has begun to merge it. That may take long, and the failover does not wait for it. */
Test(repl, retention_leaves_what_a_failover_has_chosen_since)
{
	for (uint64_t to = 1; to <= 2; to++) {
		struct host *h = secondary_keeping(4, 2, 2, 0);
		tick(h, SEC);
		EXPECT(h, "do:merge/own"); /* 2, above the pinned one */
		command(h, CMD_FAILOVER, to);
		EXPECT(h, "send:GOODBYE close do:mark/own");
		fin(h, "mark");
		fin(h, "sync");
		EXPECT(h, "do:sync/disk save:standalone/FAILOVER +5");
		cr_assert_eq(h->saved.target, to);
		if (to == 1)
			fin(h, "merge");
		saved(h);
		EXPECT(h, "cmd do:sync/disk");
		if (to == 2)
			fin(h, "merge");
		EXPECT(h, "");
		fin(h, "sync");
		fin(h, "sync");
		saved(h);
		EXPECT(h, "do:sync/disk save:standalone/DONE");
		cr_assert_geq(repl_meta_find_ckpt(repl_meta(h->r), 2), 0);
		h->now += 11 * SEC;
		tick(h, SEC);
		EXPECT(h, to == 1 ? "do:merge/own" : "");
		host_free(h);
	}
}

/* A command that the primary finds out of sync is refused, and not carried out when it is in sync again. */
Test(repl, a_checkpoint_that_is_wanted_of_a_primary_that_falls_behind_is_none)
{
	struct host *h = secondary();
	command(h, CMD_CHECKPOINT, 0);
	EXPECT(h, "send:CHECKPOINT_WANT");
	frame(h, WIRE_BEHIND, 0, WIRE_BEHIND_PAUSED, 0, NULL, 0);
	EXPECT(h, "cmd=ERR_STATE");
	host_free(h);

	for (int before = 0; before < 2; before++) {
		h = primary(PROTOCOL_F);
		if (before)
			frame(h, WIRE_CHECKPOINT_WANT, 0, WIRE_CKPT_COMMAND, 0, NULL, 0);
		pause_now(h);
		if (!before)
			frame(h, WIRE_CHECKPOINT_WANT, 0, WIRE_CKPT_COMMAND, 0, NULL, 0);
		command(h, CMD_RESUME, 0);
		saved(h);
		forget(h);
		frame(h, WIRE_RESYNC_ACK, 3, 0, 0, NULL, 0);
		frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0);
		forget(h);
		tick(h, SEC / 10);
		EXPECT(h, "");
		host_free(h);
	}
}

/* A resolve on the peer has decided that its copy is given up. */
/* What the peer dials with. */
static bool taken(struct host *h, uint64_t start, uint64_t number)
{
	return repl_takes_link(h->r, &(struct wire_join){.start = start, .number = number}, 0);
}

Test(lineage_core, a_join_that_its_dialler_has_given_up_is_not_heard)
{
	static struct wire_join said;
	struct host *h = primary(PROTOCOL_F);
	cr_assert(taken(h, 7, 1));
	cr_assert(taken(h, 0, 0));
	link_down(h);
	tick(h, 3 * SEC);
	forget(h);
	link_up(h, true);
	EXPECT(h, "send:JOIN");
	repl_join(h->r, &said);
	uint64_t start = said.start, number = said.number;
	cr_assert_neq(start, 0);
	cr_assert_eq(number, 2);
	h->peer_start = 7;
	h->peer_joins = 5;
	join_frame(h, &peer_meta, 0);
	for (uint64_t n = 0; n < 8; n++)
		cr_assert_eq(taken(h, 7, n), n > 5, "number %d", (int)n);
	cr_assert(taken(h, 0, 0), "one that does not number them");
	cr_assert(taken(h, 8, 1), "it has been started anew");
	cr_assert(repl_takes_link(h->r, NULL, h->dial));
	link_down(h);
	cr_assert_not(taken(h, 7, 5), "whatever has become of the one that it heard");
	link_up(h, false);
	h->peer_start = 8;
	h->peer_joins = 1;
	join_frame(h, &peer_meta, 0);
	EXPECT(h, "send:JOIN");
	repl_join(h->r, &said);
	cr_assert_eq(said.start, start);
	cr_assert_eq(said.number, number + 1);
	cr_assert_not(taken(h, 8, 1));
	cr_assert(taken(h, 8, 2));
	cr_assert_not(taken(h, 7, 6), "from before the peer's restart");
	host_free(h);
}

Test(lineage_core, a_copy_that_is_being_given_up_is_not_stopped)
{
	struct host *h = halted(true);
	tick(h, 0);
	link_up(h, true);
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT | WIRE_JOIN_DISCARD_YOURS);
	EXPECT(h, "dial send:JOIN send:DIRTY_END");
	stream(h, 'r', WIRE_RESYNC_BEGIN, REPL_RESYNC_BEGIN, 1, 300, 0);
	EXPECT(h, "do:r/ckpt");
	command(h, CMD_UNPROTECT, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	fin(h, "r");
	EXPECT(h, "save:secondary/NONE +2");
	saved(h);
	EXPECT(h, "send:RESYNC_READY#1 done:r");
	host_free(h);
}

/* Another disk's error has taken the pair out of sync meanwhile, and a pause may keep it there. */
Test(repl, what_waits_for_a_detached_disk_goes_on_when_it_is_whole)
{
	struct host *h = first_of_two_detached();
	ack(h, 4, 4, 4);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	saved(h);
	for (uint64_t i = 0; i < 16; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, 0);
		fin(h, "rebuild");
	}
	pass(h);
	fin(h, "sync");
	EXPECT(h, "send:ATTACH#5");
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "send:WRITE_FAILED send:FLUSH#6 do:sync/disk send:BEHIND done:b=ERR_IO");
	guest(h, 'c', REPL_WRITE, 0, 4096);
	EXPECT(h, "");
	ack(h, 5, 5, 5);
	EXPECT(h, "save:primary/RUNNING");
	command(h, CMD_PAUSE, 0);
	EXPECT(h, "cmd=ERR_STATE");
	saved(h);
	EXPECT(h, "save:primary/RUNNING"); /* alone, as any write while behind */
	saved(h);
	EXPECT(h, "do:c/disk");
	host_free(h);
}

Test(repl, break_that_is_no_setting_any_more_gives_nothing_up)
{
	struct host *h = secondary_with(ON_COW_ERROR_BREAK, 3, 7);
	struct settings s = repl_meta(h->r)->settings;
	s.on_cow_error = ON_COW_ERROR_STOP;
	settings_frame(h, &s);
	EXPECT(h, "save:secondary/RUNNING");
	fin_full(h, "a", -ERR_IO, false, 0, true);
	EXPECT(h, "");
	saved(h);
	EXPECT(h, "send:SETTINGS_ACK#7 do:a/disk");
	fin_full(h, "a", -ERR_IO, false, 0, true);
	EXPECT(h, "send:IO_ERROR#2 close done:a=ERR_IO done:f=ERR_CANCELED");
	cr_assert_eq(repl_meta(h->r)->n_ckpts, 3);
	host_free(h);
}

/* Of a group of two the one disk was detached, the other was written alone: the first one's content is the peer's, with
 * what that wrote since. */
Test(lineage_core, a_copy_with_a_detached_disk_is_not_what_a_resolve_keeps)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_PRIMARY, STATE_RUNNING);
	meta_of(&peer_meta, ROLE_STANDALONE, STATE_DONE);
	two_disks(&m);
	m.volumes[0].flags = VOLUME_STALE;
	m.lineage = (struct lineage){.current = 200, .bitmap = 100};
	peer_meta.lineage = (struct lineage){.current = 300, .bitmap = 100};
	m.alone = peer_meta.alone = m.split_brain = true;
	struct host *h = host_new(&m);
	command(h, CMD_RESOLVE, DISCARD_PEER);
	EXPECT(h, "cmd=ERR_STATE");
	tick(h, 0);
	link_up(h, true);
	EXPECT(h, "dial send:JOIN");
	join_frame(h, &peer_meta, WIRE_JOIN_SPLIT | WIRE_JOIN_DISCARD_MINE); /* it was given there */
	EXPECT(h, "send:DIRTY_END");
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	EXPECT(h, "close");
	cr_assert(repl_meta(h->r)->split_brain);
	host_free(h);
}

/* They wait for a slow disk. The order of the two words counts, not that of the records. */
Test(repl, what_a_peer_says_of_its_checkpoints_stands_as_it_was_said_last)
{
	uint8_t buf[WIRE_TEXT_MAX + 8];
	struct wire_refuse x = {.code = ERR_NOSPC, .text = "all given up"};
	int n = wire_refuse_encode(&x, buf, sizeof(buf));
	for (int lost_last = 0; lost_last < 2; lost_last++) {
		struct host *h = primary(PROTOCOL_F);
		struct repl_command c[3] = {{.cmd = CMD_CHECKPOINT}, {.cmd = CMD_CHECKPOINT}, {.cmd = CMD_CHECKPOINT}};
		for (int i = 0; i < 3; i++)
			step(h, (struct repl_event){.type = EV_COMMAND, .command = &c[i]});
		frame(h, WIRE_CHECKPOINT_ACK, 0, 3, 0, NULL, 0); /* being saved */
		frame(h, WIRE_CHECKPOINT_ACK, 0, 4, 0, NULL, 0);
		frame(h, WIRE_HISTORY_LOST, 0, 0, 0, buf, (uint32_t)n);
		frame(h, WIRE_CHECKPOINT_ACK, 0, 5, 0, NULL, 0); /* shares the record of 4 */
		if (lost_last)
			frame(h, WIRE_HISTORY_LOST, 0, 0, 0, buf, (uint32_t)n);
		while (h->saving)
			saved(h);
		cr_assert_eq(repl_meta(h->r)->last_stream, 5);
		cr_assert_eq(repl_meta(h->r)->broken, lost_last);
		host_free(h);
	}
}

/* Its sync hangs while the host is unprotected, and protects the group again. */
Test(repl, no_rebuild_begins_before_the_sync_of_the_last_one_has_ended)
{
	static struct repl_meta fresh;
	struct host *h = detached_primary();
	ack(h, 5, 5, 5);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	saved(h);
	for (uint64_t i = 0; i < 16; i++) {
		read_reply(h, i + 1, i << 19, 512 << 10, 0);
		fin(h, "rebuild");
	}
	cr_assert_eq(h->n_submitted, 1); /* the sync before the ATTACH */
	link_down(h);
	unprotect_by_force(h);
	while (h->saving)
		saved(h);
	forget(h);
	h->cmd = (struct repl_command){.cmd = CMD_PROTECT, .text = "peer:1"};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	meta_of(&fresh, ROLE_SECONDARY, STATE_NONE);
	fresh.lineage = (struct lineage){0};
	fresh.n_ckpts = 0;
	fresh.base = fresh.last_stream = 0;
	fresh.inconsistent = true;
	link_up(h, true);
	join_frame(h, &fresh, WIRE_JOIN_FRESH);
	frame(h, WIRE_DIRTY_END, 0, 0, 0, NULL, 0);
	fin(h, "intents");
	saved(h);
	forget(h);
	frame(h, WIRE_RESYNC_READY, 1, 2, 0, NULL, 0);
	fin_full(h, "scan", 0, true, SIZE, false);
	frame(h, WIRE_RESYNC_ACK, 3, 0, 0, NULL, 0);
	while (h->saving)
		saved(h);
	forget(h);
	guest(h, 'b', REPL_WRITE, 0, 4096);
	fin_full(h, "b", -ERR_IO, false, 0, false);
	EXPECT(h, "do:b/disk send:DETACH#6");
	ack(h, 6, 6, 6);
	saved(h);
	EXPECT(h, "save:primary/RUNNING send:WRITE#7");
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "cmd=ERR_BUSY");
	fin(h, "sync");
	command(h, CMD_RESYNC, 0);
	EXPECT(h, "do:reopen/own");
	host_free(h);
}

/* One sync is asked for both disks. What the second has is durable, so its dirty regions become clean: a crash would
 * send them again, and a switchover wants nothing dirty. */
Test(repl, a_sync_that_fails_on_one_disk_leaves_nothing_dirty_on_the_other)
{
	for (int detach = 0; detach < 2; detach++) {
		struct host *h = two_volumes();
		if (!detach)
			pass(h);
		guest(h, 'a', REPL_WRITE, 0, 4096);
		guest2(h, 'b', REPL_WRITE, 0, 4096);
		fin(h, "a");
		fin(h, "b");
		fin(h, "a");
		fin(h, "b");
		forget(h);
		tick(h, 2 * SEC);
		EXPECT(h, "send:FLUSH#5 do:sync/disk");
		ack(h, 5, 5, 5);
		h->submitted[0]->failed = 1;
		fin_full(h, "sync", -ERR_IO, false, 0, false);
		EXPECT(h, detach ? "send:DETACH#6" : "");
		cr_assert(dirty(h, 0));
		cr_assert_eq(repl_volume_state(h->r, 1)->dirty.count, 0);
		if (detach) {
			ack(h, 6, 6, 6);
			saved(h);
			forget(h);
		}
		guest2(h, 'b', REPL_WRITE, 0, 4096);
		fin(h, "b");
		forget(h);
		tick(h, 20 * SEC);
		EXPECT(h, detach ? "send:FLUSH#8 do:sync/disk" : "send:FLUSH#7 do:sync/disk");
		fin(h, "sync");
		ack(h, 7 + (unsigned)detach, 7 + (unsigned)detach, 7 + (unsigned)detach);
		cr_assert_eq(repl_volume_state(h->r, 1)->dirty.count, 0);
		cr_assert_eq(dirty(h, 0), !detach, "what a failed sync stood for is not clean by the next one");
		host_free(h);
	}
}

/* Its checkpoint waits behind a record that can't be saved, and the primary is gone. */
Test(repl, a_stop_is_answered_while_the_record_cannot_be_saved)
{
	struct host *h = secondary();
	forget(h);
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
	fin(h, "c");
	EXPECT(h, "do:c/ckpt save:secondary/RUNNING +2");
	command(h, CMD_STOP, 0);
	EXPECT(h, "send:STOP_WANT");
	struct repl_io *io = &h->io['s'];
	*io = (struct repl_io){
	    .kind = REPL_CHECKPOINT, .seq = 3, .arg = 3, .flags = WIRE_CKPT_COMMAND | WIRE_CKPT_STOP, .owner = 's'};
	struct wire_frame f = {.type = WIRE_CHECKPOINT, .seq = 3, .offset = 3};
	step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .io = io});
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:secondary/RUNNING");
	link_down(h);
	EXPECT(h, "");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "done:c cmd=ERR_NOSPC");
	ticks(h, 2 * SEC);
	EXPECT(h, "save:secondary/RUNNING");
	saved(h);
	EXPECT(h, "do:s/ckpt");
	fin(h, "s");
	saved(h);
	EXPECT(h, "save:secondary/DONE +3 done:s");
	host_free(h);
}

/* A survivor dials its old primary, which is gone for good: that takes long to fail. Its command dials another host. */
Test(lineage_core, an_older_dial_is_no_matter_of_a_commands)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_DONE);
	m.lineage = (struct lineage){.current = 200, .bitmap = 100};
	m.failover_generation = 200;
	(void)snprintf(m.peer, sizeof(m.peer), "old:1");
	struct host *h = host_new(&m);
	tick(h, 0);
	EXPECT(h, "dial");
	uint64_t older = h->dial;
	h->cmd = (struct repl_command){.cmd = CMD_FAILBACK, .text = "new:1"};
	step(h, (struct repl_event){.type = EV_COMMAND, .command = &h->cmd});
	EXPECT(h, "dial");
	cr_assert_not(repl_takes_link(h->r, NULL, older), "it is not where the command dials");
	cr_assert(repl_takes_link(h->r, NULL, h->dial));
	dial_fails(h, older);
	EXPECT(h, "");
	dial_fails(h, h->dial);
	EXPECT(h, "cmd=ERR_PEER");
	host_free(h);
}

Test(repl, that_a_peers_checkpoints_are_given_up_is_saved_once_it_can_be)
{
	uint8_t buf[WIRE_TEXT_MAX + 8];
	struct wire_refuse x = {.code = ERR_NOSPC, .text = "all given up"};
	int n = wire_refuse_encode(&x, buf, sizeof(buf));
	struct host *h = primary(PROTOCOL_F);
	frame(h, WIRE_HISTORY_LOST, 0, 0, 0, buf, (uint32_t)n);
	EXPECT(h, "save:primary/RUNNING");
	save_fails(h, -ERR_NOSPC);
	EXPECT(h, "save:primary/RUNNING"); /* as it was */
	tick(h, SEC / 10);
	EXPECT(h, "");
	save_fails(h, -ERR_NOSPC);
	tick(h, SEC);
	EXPECT(h, "save:primary/RUNNING");
	cr_assert_not(h->saved.broken);
	saved(h);
	EXPECT(h, "");
	tick(h, SEC / 10);
	EXPECT(h, "save:primary/RUNNING");
	saved(h);
	cr_assert(repl_meta(h->r)->broken);
	tick(h, SEC / 10);
	EXPECT(h, "");
	host_free(h);
}

/* The first one is rebuilt in part when the second is detached too, and given back. */
Test(repl, a_disk_that_joins_a_rebuild_leaves_the_others_where_it_was)
{
	struct host *h = rebuilding_beside_a_whole_one(2 << 20);
	struct repl_status s;
	struct repl_volume_state *first = repl_volume_state(h->r, 0), *second = repl_volume_state(h->r, 1);
	uint64_t todo = first->todo.count, regions = SIZE >> REGION_SHIFT;
	cr_assert_eq(todo, regions - ((2 << 20) >> REGION_SHIFT));
	guest2(h, 'b', REPL_WRITE, 0, 4096);
	fin(h, "b");
	fin_full(h, "b", -ERR_IO, false, 0, false);
	ack(h, 3, 3, 3);
	saved(h);
	forget(h);
	command(h, CMD_RESYNC, 0);
	fin(h, "reopen");
	saved(h);
	cr_assert_eq(h->cmd_error, 0);
	cr_assert_eq(first->todo.count, todo);
	cr_assert_eq(second->todo.count, regions);
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.rebuilding, 3);
	cr_assert_eq(s.resync_total, 2 * SIZE);
	cr_assert_eq(s.resync_done, 2 << 20);
	ack(h, 5, 5, 5);
	tick(h, SEC);
	read_reply(h, 5, 2 << 20, 512 << 10, WIRE_READ_ERROR);
	repl_status(h->r, h->now, &s);
	cr_assert_eq(s.rebuilding, 2);
	cr_assert_eq(s.resync_total, SIZE);
	cr_assert_eq(s.resync_done, 0);
	host_free(h);
}

/* A primary sends nothing but barriers behind a stop's last checkpoint: from there on the disk is this host's own. */
Test(repl, nothing_of_the_stream_is_taken_behind_a_stops_checkpoint)
{
	for (int cut = 0; cut < 2; cut++) {
		struct host *h = secondary();
		struct repl_io *io = &h->io['s'];
		*io = (struct repl_io){.kind = REPL_CHECKPOINT, .seq = 2, .arg = 2, .owner = 's'};
		io->flags = WIRE_CKPT_COMMAND | WIRE_CKPT_STOP;
		struct wire_frame f = {.type = WIRE_CHECKPOINT, .seq = 2, .offset = 2};
		step(h, (struct repl_event){.type = EV_FRAME, .session = h->session, .frame = &f, .io = io});
		stream(h, 'f', WIRE_FLUSH, REPL_FLUSH, 3, 0, 0);
		stream(h, 'w', WIRE_WRITE, REPL_WRITE, 4, 0, 4096);
		stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 5, 3, 0);
		fin(h, "s");
		EXPECT(h, "do:s/ckpt save:secondary/DONE +2");
		if (cut)
			link_down(h);
		saved(h);
		EXPECT(h, cut ? "done:f=ERR_CANCELED done:w=ERR_CANCELED done:c=ERR_CANCELED done:s"
			      : "send:CHECKPOINT_ACK close done:f=ERR_CANCELED done:w=ERR_CANCELED "
				"done:c=ERR_CANCELED done:s");
		cr_assert_eq(repl_meta(h->r)->state, STATE_DONE);
		host_free(h);
	}
}

/* One that says so of a host that has stopped, and knows its generation. */
Test(repl, a_checkpoint_for_a_copy_that_is_stopped_is_void)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_SECONDARY, STATE_DONE);
	m.alone = true;
	meta_of(&peer_meta, ROLE_PRIMARY, STATE_RUNNING);
	struct host *h = host_new(&m);
	link_up(h, false);
	join_frame(h, &peer_meta, WIRE_JOIN_START);
	EXPECT(h, "send:JOIN send:DIRTY_END");
	stream(h, 'd', WIRE_RESYNC_DONE, REPL_RESYNC_DONE, 1, 0, 0);
	fin(h, "d");
	while (h->saving)
		saved(h);
	forget(h);
	stream(h, 'c', WIRE_CHECKPOINT, REPL_CHECKPOINT, 2, 2, 0);
	fin(h, "c");
	EXPECT(h, "do:c/ckpt send:CHECKPOINT_ACK done:c");
	cr_assert_eq(repl_meta(h->r)->state, STATE_DONE);
	host_free(h);
}

/* What has failed for want of room is given some. */
Test(repl, a_checkpoint_is_dropped_beside_a_failover_that_has_failed)
{
	static struct repl_meta m;
	meta_of(&m, ROLE_STANDALONE, STATE_FAILOVER_FAILED);
	m.alone = true;
	m.active_id = 1;
	m.n_ckpts = 4;
	m.ckpt_max = m.received = 4;
	m.base = m.target = m.last_stream = 2;
	m.failover_generation = 100;
	for (unsigned i = 0; i < 4; i++)
		m.ckpts[i] = (struct repl_ckpt){.number = i + 1, .generation = 100, .flags = CKPT_PINNED};
	struct host *h = host_new(&m);
	for (uint64_t i = 1; i <= 4; i++) {
		command(h, CMD_DROP, i);
		if (i == 1 || i == 3) {
			EXPECT(h, "do:merge/own");
			fin(h, "merge");
			EXPECT(h, i == 1 ? "save:standalone/FAILOVER_FAILED -1" : "save:standalone/FAILOVER_FAILED -3");
			saved(h);
			EXPECT(h, "cmd");
		} else {
			EXPECT(h, "cmd=ERR_STATE");
		}
	}
	host_free(h);
}

/* The peer's daemon lives and its disk hangs: it never says its JOIN, and the link is never DOWN. */
Test(repl, a_primary_is_stopped_beside_a_handshake_that_does_not_end)
{
	for (int late = 0; late < 2; late++) {
		struct host *h = primary(PROTOCOL_F);
		link_down(h);
		tick(h, 0);
		link_up(h, true);
		EXPECT(h, "dial send:JOIN");
		ticks(h, late ? 6 * SEC : SEC);
		struct repl_status s;
		repl_status(h->r, h->now, &s);
		cr_assert_eq(s.link, LINK_HANDSHAKE);
		forget(h);
		command(h, CMD_STOP, 0);
		if (!late) {
			EXPECT(h, "cmd=ERR_STATE");
			host_free(h);
			continue;
		}
		EXPECT(h, "close save:primary/DONE");
		saved(h);
		EXPECT(h, "cmd");
		ticks(h, 6 * SEC);
		EXPECT(h, "");
		host_free(h);
	}
}
