/* The verbs that work on a store without a daemon: what they print, and what check finds in a store that was damaged.
 */
#include "cli/cli.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE (UINT64_C(1) << 20)

static char dir[256], store_dir[300];

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st;
	(void)type;
	(void)ftw;
	return remove(path);
}

static void setup(void)
{
	const char *tmp = getenv("TMPDIR");
	(void)snprintf(dir, sizeof(dir), "%s/repfs-cli.XXXXXX", tmp && tmp[0] ? tmp : "/tmp");
	cr_assert_not_null(mkdtemp(dir));
	(void)snprintf(store_dir, sizeof(store_dir), "%s/store", dir);
}

static void teardown(void)
{
	(void)nftw(dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

/* Runs "VERB ARGS..." and returns the exit code, with stdout in *out (owned). */
static int run(char **out, const char *line)
{
	static char text[1024];
	char *argv[32] = {0};
	int argc = 0;
	static struct cli c;
	struct err e = {0};
	char path[320];

	(void)snprintf(text, sizeof(text), "repctl -q --store %s %s", store_dir, line);
	for (char *p = strtok(text, " "); p && argc < 31; p = strtok(NULL, " "))
		argv[argc++] = p;
	cr_assert_eq(cli_parse(argc, argv, &c, &e), 0, "%s", e.text);
	cr_assert_eq(cli_resolve(&c, &e), 0);

	(void)snprintf(path, sizeof(path), "%s/stdout", dir);
	(void)fflush(stdout);
	int keep = dup(STDOUT_FILENO), fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	cr_assert(keep >= 0 && fd >= 0);
	cr_assert_eq(dup2(fd, STDOUT_FILENO), STDOUT_FILENO);
	int code = c.verb->run(&c);
	(void)fflush(stdout);
	cr_assert_eq(dup2(keep, STDOUT_FILENO), STDOUT_FILENO);
	(void)close(keep);
	off_t len = lseek(fd, 0, SEEK_END);
	cr_assert_geq(len, 0);
	*out = calloc(1, (size_t)len + 1);
	cr_assert_not_null(*out);
	cr_assert_eq(pread(fd, *out, (size_t)len, 0), len);
	(void)close(fd);
	return code;
}

static void runs(const char *line, int code, const char *words)
{
	char *out;
	int got = run(&out, line);
	cr_assert_eq(got, code, "%s: exit code %d, output: %s", line, got, out);
	cr_assert(strstr(out, words), "%s: '%s' lacks '%s'", line, out, words);
	free(out);
}

static void write_volume(struct volume *v, uint64_t off, uint64_t len, int fill)
{
	char *buf = malloc(len);
	cr_assert_not_null(buf);
	memset(buf, fill, len);
	struct volume_req req = {.kind = VOLUME_WRITE, .off = off, .len = len, .buf = buf};
	cr_assert_eq(volume_write(v, &req, 1), 0);
	free(buf);
}

/* vm1: 0x11 in [0, 64K) as of checkpoint 1, then 0x22 in [0, 16K). */
static void make_volume_with_checkpoint(void)
{
	struct store *st;
	struct repl_meta *m;
	struct volume *v;
	struct err e = {0};
	cr_assert_eq(store_open(store_dir, STORE_CREATE, DURABILITY_PROCESS, &st, &e), 0, "%s", e.text);
	cr_assert_eq(store_create_volume(st, "vm1", SIZE, NULL, &e), 0, "%s", e.text);
	cr_assert_eq(store_load_group(st, "vm1", &m, &e), 0, "%s", e.text);
	cr_assert_eq(store_open_volume(st, m, 0, &v, &e), 0, "%s", e.text);
	write_volume(v, 0, 65536, 0x11);
	cr_assert_eq(volume_prepare(v, 1, 0, &e), 0, "%s", e.text);
	m->n_ckpts = 1;
	m->ckpts[0] = (struct repl_ckpt){.number = 1, .generation = 7, .time_ns = 1, .kind = CKPT_LOCAL};
	m->ckpt_max = 1;
	cr_assert_eq(store_save_group(st, m, &e), 0, "%s", e.text);
	volume_switch(v, 1, 0);
	write_volume(v, 0, 16384, 0x22);
	cr_assert_eq(volume_sync(v), 0);
	volume_close(v);
	free(m);
	store_close(st);
}

static void damage(const char *name, off_t at)
{
	char path[400];
	uint8_t byte;
	(void)snprintf(path, sizeof(path), "%s/%s", store_dir, name);
	int fd = open(path, O_RDWR);
	cr_assert_geq(fd, 0, "%s", path);
	cr_assert_eq(pread(fd, &byte, 1, at), 1, "%s", path);
	byte ^= 0x40;
	cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
	(void)close(fd);
}

static void check_file(const char *name, uint64_t off, uint64_t len, int fill)
{
	char path[400];
	uint8_t buf[4096];
	(void)snprintf(path, sizeof(path), "%s/%s", dir, name);
	int fd = open(path, O_RDONLY);
	cr_assert_geq(fd, 0, "%s", path);
	for (uint64_t at = off; at < off + len; at += sizeof(buf)) {
		memset(buf, 0xa5, sizeof(buf));
		cr_assert_eq(pread(fd, buf, sizeof(buf), (off_t)at), (ssize_t)sizeof(buf));
		for (size_t i = 0; i < sizeof(buf); i++)
			cr_assert_eq(buf[i], fill, "%s at %llu", name, (unsigned long long)at + i);
	}
	(void)close(fd);
}

Test(offline, a_store_is_made_by_create_only, .init = setup, .fini = teardown)
{
	runs("list", 3, "");
	runs("check", 3, "");
	cr_assert_neq(access(store_dir, F_OK), 0);
	runs("--json create vm1 --size 8M", 0,
	     "{\"schema\":1,\"volume\":\"vm1\",\"group\":\"vm1\",\"size\":8388608}\n");
	runs("create vm1 --size 8M", 1, "");
	runs("create vm2 --size 8M --group g", 0, "");
	runs("--json list", 0,
	     "{\"schema\":1,\"volumes\":[{\"name\":\"vm2\",\"group\":\"g\",\"size\":8388608,\"id\":1,\"role\":"
	     "\"standalone\","
	     "\"state\":\"NONE\",\"allocated\":");
	runs("list --names", 0, "vm2\nvm1\n");
	runs("show vm1", 0, "checkpoints   none\n");
	runs("show vm3", 4, "");
	runs("check", 0, "");
	runs("delete vm1", 3, "");
}

Test(offline, export_of_volume_and_checkpoint, .init = setup, .fini = teardown)
{
	char line[600];
	make_volume_with_checkpoint();
	(void)snprintf(line, sizeof(line), "export vm1 %s/now", dir);
	runs(line, 0, "");
	check_file("now", 0, 16384, 0x22);
	check_file("now", 16384, 65536 - 16384, 0x11);
	check_file("now", 65536, SIZE - 65536, 0);
	runs(line, 1, ""); /* it exists */
	(void)snprintf(line, sizeof(line), "export vm1@1 %s/then", dir);
	runs(line, 0, "");
	check_file("then", 0, 65536, 0x11);
	check_file("then", 65536, SIZE - 65536, 0);
	(void)snprintf(line, sizeof(line), "export vm1@2 %s/never", dir);
	runs(line, 4, "");
	runs("--json show vm1", 0, "\"checkpoints\":[1]");
}

Test(offline, what_a_secondary_exports, .init = setup, .fini = teardown)
{
	struct store *st;
	struct repl_meta *m;
	struct err e = {0};
	char line[600];
	make_volume_with_checkpoint();
	cr_assert_eq(store_open(store_dir, 0, -1, &st, &e), 0, "%s", e.text);
	cr_assert_eq(store_load_group(st, "vm1", &m, &e), 0, "%s", e.text);
	m->role = ROLE_SECONDARY;
	m->state = STATE_RUNNING;
	m->base = 1;
	m->last_stream = 0;
	cr_assert_eq(store_save_group(st, m, &e), 0, "%s", e.text);
	store_close(st);
	/* The view stands at its base, whatever the disk has become. */
	(void)snprintf(line, sizeof(line), "export vm1 %s/view", dir);
	runs(line, 0, "");
	check_file("view", 0, 65536, 0x11);

	cr_assert_eq(store_open(store_dir, 0, -1, &st, &e), 0, "%s", e.text);
	m->state = STATE_NONE;
	m->base = 0;
	m->inconsistent = true;
	cr_assert_eq(store_save_group(st, m, &e), 0, "%s", e.text);
	store_close(st);
	free(m);
	(void)snprintf(line, sizeof(line), "export vm1 %s/half", dir);
	runs(line, 5, "");
	(void)snprintf(line, sizeof(line), "%s/half", dir);
	cr_assert_neq(access(line, F_OK), 0);
}

Test(offline, check_finds_nothing_in_a_sound_store, .init = setup, .fini = teardown)
{
	make_volume_with_checkpoint();
	runs("--json check", 0, "\"overlays\":1,\"overlay_bytes\":16384,\"problems\":[]");
}

Test(offline, check_finds_a_flipped_bit_in_an_overlay, .init = setup, .fini = teardown)
{
	make_volume_with_checkpoint();
	damage("volumes/vm1/undo-1.data", 8192 + 77);
	char *out;
	cr_assert_eq(run(&out, "check"), 1);
	cr_assert_str_eq(out, "vm1 vm1: the overlay of checkpoint 1: the block at 8192 does not check out\n");
	free(out);
	damage("volumes/vm1/undo-1.data", 0);
	cr_assert_eq(run(&out, "--json check"), 1);
	json_t *doc = json_loads(out, 0, NULL);
	cr_assert_eq(json_array_size(json_object_get(doc, "problems")), 2, "%s", out);
	json_decref(doc);
	free(out);
}

Test(offline, check_finds_damaged_records_and_goes_on, .init = setup, .fini = teardown)
{
	char path[400];
	make_volume_with_checkpoint();
	runs("create other --size 1M", 0, "");
	damage("volumes/vm1/undo-1.data", 5);
	/* One copy of a record is enough. */
	damage("groups/other.a", 40);
	runs("check", 1, "the block at 0 ");
	damage("groups/other.a", 40);
	damage("groups/other.b", 40);
	damage("groups/other.a", 41);
	char *out;
	cr_assert_eq(run(&out, "check"), 1);
	cr_assert(strstr(out, "other: "), "%s", out);
	cr_assert(strstr(out, "the block at 0 "), "%s", out);
	free(out);
	/* list shows what it can, and fails. */
	runs("list --names", 1, "vm1\n");
	/* A disk that is gone. */
	(void)snprintf(path, sizeof(path), "%s/volumes/vm1/disk.raw", store_dir);
	cr_assert_eq(unlink(path), 0);
	runs("check", 1, "vm1 vm1: ");
}

Test(offline, a_store_in_use_is_not_touched, .init = setup, .fini = teardown)
{
	struct store *st;
	struct err e = {0};
	runs("create vm1 --size 1M", 0, "");
	cr_assert_eq(store_open(store_dir, 0, -1, &st, &e), 0, "%s", e.text);
	runs("--timeout 0.2 create vm2 --size 1M", 3, "");
	runs("--timeout 0.2 check", 3, "");
	store_close(st);
	runs("list --names", 0, "vm1\n");
}
