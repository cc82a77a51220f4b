/* Checkpoints that a job holds (core/repl_hold.c), in real daemons under guests' writes: the point in time of several
 * volumes, the image that stays, and what becomes of the epoch. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "fs/repl_shell.h"
#include "tests/unit/fs/pairtest.h"

#define SIZE (UINT64_C(1) << 20)

static void setup(void)
{
	OK(pair_open(&p));
	OK(pair_create(&p.a, "vm", "vm", SIZE));
	OK(pair_create(&p.a, "vm-data", "vm", SIZE));
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x11));
	OK(pair_write(&p.a, "vm-data", 0, SIZE, 0x11));
}

TestSuite(hold, .init = setup, .fini = teardown, .timeout = 120);

static int hold(struct pair_host *h, enum repl_cmd cmd, uint64_t number, uint64_t *ret)
{
	struct group *g = daemon_group(h->d, "vm");
	struct shell_command *c = shell_command_new(cmd);
	c->c.number = number;
	strcpy(c->c.text, "job 1");
	int err = group_command(g, c, NULL, 0, &h->err);
	if (!err && ret)
		*ret = c->c.result;
	shell_command_unref(c);
	group_unref(g);
	return err;
}

static size_t n_checkpoints(struct pair_host *h)
{
	json_t *r = NULL;
	OK(pair_do(h, "checkpoints", named(), &r));
	size_t n = json_array_size(json_object_get(r, "checkpoints"));
	json_decref(r);
	return n;
}

static _Atomic bool stop;
static int writer_error;

/* Counts on: each number to a place of the one volume, and when that is done to the same place of the other. */
static void *writer(void *arg)
{
	uint64_t lane = *(const uint64_t *)arg;
	struct gvol *v[] = {gvol_find(p.a.d, "vm"), gvol_find(p.a.d, "vm-data")};
	for (uint64_t n = 1; !atomic_load(&stop) && !writer_error; n++) {
		uint64_t block[512];
		for (unsigned i = 0; i < 512; i++)
			block[i] = n;
		for (unsigned k = 0; k < 2 && !writer_error; k++)
			writer_error = gvol_write(v[k], NULL, lane << 12, sizeof(block), block);
	}
	gvol_unref(v[0]);
	gvol_unref(v[1]);
	return NULL;
}

static void read_image(const char *name, uint64_t number, uint8_t *buf)
{
	struct gvol *v = gvol_find(p.a.d, name);
	memset(buf, 0xee, SIZE);
	OK(gvol_read(v, NULL, GVOL_CKPT, number, 0, SIZE, buf));
	gvol_unref(v);
}

Test(hold, a_point_in_time_of_two_volumes_between_a_guests_writes)
{
	enum { LANES = 4, ROUNDS = 20 };
	pthread_t t[LANES];
	uint64_t lanes[LANES], number = 0;
	uint8_t *a = malloc(SIZE), *b = malloc(SIZE), *again = malloc(SIZE);
	for (uint64_t i = 0; i < LANES; i++) {
		lanes[i] = i;
		cr_assert_eq(pthread_create(&t[i], NULL, writer, &lanes[i]), 0);
	}
	for (unsigned round = 0; round < ROUNDS; round++) {
		OK(hold(&p.a, CMD_HOLD, 0, &number));
		read_image("vm", number, a);
		read_image("vm-data", number, b);
		for (unsigned lane = 0; lane < LANES; lane++) {
			uint64_t x[512], y[512];
			memcpy(x, a + (lane << 12), sizeof(x));
			memcpy(y, b + (lane << 12), sizeof(y));
			for (unsigned i = 1; i < 512; i++)
				cr_assert(x[i] == x[0] && y[i] == y[0], "a torn block");
			bool fresh = x[0] == UINT64_C(0x1111111111111111), behind = y[0] == x[0] || y[0] + 1 == x[0];
			cr_assert(fresh || behind || (x[0] == 1 && y[0] == UINT64_C(0x1111111111111111)),
				  "round %u: %lu, then %lu", round, (unsigned long)x[0], (unsigned long)y[0]);
		}
		for (uint64_t i = LANES << 12; i < SIZE; i++)
			cr_assert(a[i] == 0x11 && b[i] == 0x11);
		read_image("vm", number, again); /* it stays what it was */
		cr_assert_eq(memcmp(a, again, SIZE), 0);
		read_image("vm-data", number, again);
		cr_assert_eq(memcmp(b, again, SIZE), 0);
		OK(hold(&p.a, CMD_UNHOLD, number, NULL));
	}
	atomic_store(&stop, true);
	for (unsigned i = 0; i < LANES; i++)
		pthread_join(t[i], NULL);
	cr_assert_eq(writer_error, 0);
	WAIT_FOR(n_checkpoints(&p.a) == 0);
	free(a);
	free(b);
	free(again);
}

Test(hold, a_dead_jobs_epoch_goes_at_the_next_start)
{
	uint64_t number = 0, other = 0;
	OK(hold(&p.a, CMD_HOLD, 0, &number));
	OK(pair_write(&p.a, "vm", 0, SIZE, 0x22));
	OK(hold(&p.a, CMD_HOLD, 0, &other));
	cr_assert_gt(other, number);
	json_t *args = named(), *r = NULL;
	json_object_set_new(args, "drop", json_integer((json_int_t)number));
	cr_assert_eq(pair_do(&p.a, "checkpoints", args, NULL), -ERR_BUSY);
	cr_assert(strstr(p.a.err.text, "job 1 holds it"), "%s", p.a.err.text);
	OK(pair_do(&p.a, "checkpoints", named(), &r));
	json_t *first = json_array_get(json_object_get(r, "checkpoints"), 0);
	cr_assert_str_eq(json_string_value(json_array_get(json_object_get(first, "held_by"), 0)), "job 1");
	json_decref(r);
	pair_host_stop(&p.a);
	OK(pair_host_start(&p, &p.a));
	WAIT_FOR(n_checkpoints(&p.a) == 0);
	cr_assert_eq(pair_is(&p.a, "vm", 0, SIZE, 0x22), 0);
}

Test(hold, beside_replication_on_both_hosts)
{
	uint64_t on_a = 0, on_b = 0;
	protect();
	json_t *r = NULL;
	OK(pair_do(&p.a, "checkpoint", named(), &r));
	on_b = (uint64_t)json_integer_value(json_object_get(r, "checkpoint"));
	json_decref(r);
	OK(hold(&p.b, CMD_HOLD, on_b, NULL));
	cr_assert_eq(hold(&p.b, CMD_HOLD, 0, NULL), -ERR_STATE);
	OK(hold(&p.a, CMD_HOLD, 0, &on_a));
	set("keep_last", "1");
	for (int i = 0; i < 4; i++) {
		OK(pair_write(&p.a, "vm", 0, SIZE, (uint8_t)(0x30 + i)));
		OK(pair_do(&p.a, "checkpoint", named(), NULL));
	}
	WAIT_FOR(n_checkpoints(&p.b) == 2); /* the newest and the held one */
	for (int i = 0; i < 2; i++) {
		struct gvol *v = gvol_find(i ? p.b.d : p.a.d, "vm");
		uint8_t buf[4096];
		memset(buf, 0xee, sizeof(buf));
		OK(gvol_read(v, NULL, GVOL_CKPT, i ? on_b : on_a, SIZE / 2, sizeof(buf), buf));
		for (unsigned k = 0; k < sizeof(buf); k++)
			cr_assert_eq(buf[k], 0x11);
		gvol_unref(v);
	}
	OK(hold(&p.b, CMD_UNHOLD, on_b, NULL));
	OK(hold(&p.a, CMD_UNHOLD, on_a, NULL));
	WAIT_FOR(n_checkpoints(&p.b) == 1 && n_checkpoints(&p.a) == 0);
	cr_assert_eq(pair_disk_is(&p.b, "vm", 0, SIZE, 0x33), 0);
}
