/* The store: making and opening it, its lock, the rules for volumes and groups, what a crash leaves, import, export. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/os/cleanup.h"
#include "core/range.h"
#include "image/store.h"
#include "tests/unit/image/tmpdir.h"

#define MIB (UINT64_C(1) << 20)

static struct tmpdir dir; /* holds s/ */
static struct err e;

static void setup(void)
{
	tmpdir_make(&dir);
}

static void teardown(void)
{
	tmpdir_remove(&dir);
}

TestSuite(store, .init = setup, .fini = teardown);

static struct store *open_it(void)
{
	struct store *st = NULL;

	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), STORE_CREATE, DURABILITY_PROCESS, &st, &e), 0, "%s", e.text);
	return st;
}

static void says(const char *part)
{
	cr_assert_not_null(strstr(e.text, part), "'%s' is not in '%s'", part, e.text);
}

static struct repl_meta *group_of(struct store *st, const char *group)
{
	struct repl_meta *m = NULL;

	cr_assert_eq(store_load_group(st, group, &m, &e), 0, "%s", e.text);
	return m;
}

static void set_role(struct store *st, const char *group, enum role role, enum state state)
{
	struct repl_meta *m = group_of(st, group);

	m->role = (uint8_t)role;
	m->state = (uint8_t)state;
	cr_assert_eq(store_save_group(st, m, &e), 0, "%s", e.text);
	free(m);
}

static bool volume_there(struct store *st, const char *name)
{
	struct repl_meta *m = NULL;
	uint32_t i;
	int rc = store_find_volume(st, name, &m, &i, &e);

	if (rc == 0)
		cr_assert_str_eq(m->volumes[i].name, name);
	free(m);
	return rc == 0;
}

/* ---- opening ---- */

Test(store, is_made_private_and_found_again)
{
	struct store *st;
	uint8_t uuid[16], zero[16] = {0};
	struct stat sb;

	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), 0, -1, &st, &e), -ERR_NOENT);
	says("start repfs on it");
	cr_assert_not(tmpdir_has(&dir, "s"));
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), STORE_CREATE, -1, &st, &e), 0, "%s", e.text);
	cr_assert_eq(stat(tmpdir_at(&dir, "s"), &sb), 0);
	cr_assert_eq(sb.st_mode & 0777, 0700);
	cr_assert_eq(store_info(st)->durability, DURABILITY_POWER);
	memcpy(uuid, store_info(st)->uuid, 16);
	cr_assert_neq(memcmp(uuid, zero, 16), 0);
	cr_assert_str_eq(store_path(st), tmpdir_at(&dir, "s"));
	store_close(st);
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), 0, DURABILITY_PROCESS, &st, &e), 0, "%s", e.text);
	cr_assert_arr_eq(store_info(st)->uuid, uuid, 16);
	cr_assert_eq(store_info(st)->durability, DURABILITY_POWER);
	cr_assert_eq(store_set_durability(st, DURABILITY_PROCESS, &e), 0);
	store_close(st);
	cr_assert_eq(chmod(tmpdir_at(&dir, "s"), 0755), 0);
	st = open_it();
	cr_assert_eq(store_info(st)->durability, DURABILITY_PROCESS);
	cr_assert_eq(stat(tmpdir_at(&dir, "s"), &sb), 0);
	cr_assert_eq(sb.st_mode & 0777, 0700);
	cr_assert_eq(store_create_volume(st, "v", MIB, NULL, &e), 0);
	cr_assert_eq(store_set_durability(st, DURABILITY_POWER, &e), 0, "%s", e.text);
	store_close(st);
	store_close(NULL);
}

static struct stat watched;
static unsigned watched_syncs;

/* In place of the system's, for all of this program. */
int fsync(int fd)
{
	struct stat sb;

	if (watched.st_ino && fstat(fd, &sb) == 0 && sb.st_ino == watched.st_ino && sb.st_dev == watched.st_dev)
		watched_syncs++;
	return (int)syscall(SYS_fsync, fd);
}

/* The folder was made, and the process killed before its name was durable. */
Test(store, the_name_of_a_folder_that_is_there_is_made_durable_too)
{
	cr_assert_eq(mkdir(tmpdir_at(&dir, "s"), 0700), 0);
	cr_assert_eq(stat(dir.path, &watched), 0);
	store_close(open_it());
	cr_assert_eq(watched_syncs, 1);
	/* Once it is a store it is for good. */
	store_close(open_it());
	cr_assert_eq(watched_syncs, 1);
	memset(&watched, 0, sizeof(watched));
}

Test(store, one_process_holds_it)
{
	struct store *st = open_it(), *other;
	char pid[32];

	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), STORE_CREATE, -1, &other, &e), -ERR_BUSY);
	snprintf(pid, sizeof(pid), "process %ld;", (long)getpid());
	says(pid);
	store_close(st);
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), 0, -1, &other, &e), 0);
	store_close(other);
}

Test(store, foreign_folders_are_left_alone)
{
	struct store *st;

	cr_assert_eq(mkdir(tmpdir_at(&dir, "s"), 0700), 0);
	tmpdir_write(&dir, "s/thesis.txt", "x", 1, 0);
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), STORE_CREATE, -1, &st, &e), -ERR_EXIST);
	says("thesis.txt");
	cr_assert_not(tmpdir_has(&dir, "s/lock"));
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), 0, -1, &st, &e), -ERR_NOENT);
	cr_assert_not(tmpdir_has(&dir, "s/lock"));
	cr_assert_eq(store_open(tmpdir_at(&dir, "s/thesis.txt"), STORE_CREATE, -1, &st, &e), -ERR_USAGE);
	cr_assert_eq(unlink(tmpdir_at(&dir, "s/thesis.txt")), 0);
	/* A fresh filesystem, and what an interrupted making leaves. */
	cr_assert_eq(mkdir(tmpdir_at(&dir, "s/lost+found"), 0700), 0);
	cr_assert_eq(mkdir(tmpdir_at(&dir, "s/groups"), 0700), 0);
	tmpdir_write(&dir, "s/store.tmp", "half", 4, 0);
	store_close(open_it());
}

Test(store, a_lost_or_bad_store_record_is_refused)
{
	struct store *st = open_it();

	cr_assert_eq(store_create_volume(st, "v", MIB, NULL, &e), 0);
	store_close(st);
	cr_assert_eq(rename(tmpdir_at(&dir, "s/store.a"), tmpdir_at(&dir, "a")), 0);
	store_close(open_it()); /* one copy is enough, and the other comes back */
	cr_assert(tmpdir_has(&dir, "s/store.a"));
	cr_assert_eq(unlink(tmpdir_at(&dir, "s/store.a")), 0);
	cr_assert_eq(unlink(tmpdir_at(&dir, "s/store.b")), 0);
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), STORE_CREATE, -1, &st, &e), -ERR_CORRUPT);
	says("groups/ is not empty");
	cr_assert(tmpdir_has(&dir, "s/volumes/v/disk.raw"));
	tmpdir_write(&dir, "s/store.a", "garbage", 7, 0);
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), STORE_CREATE, -1, &st, &e), -ERR_CORRUPT);
	says("store.a");
}

/* ---- volumes ---- */

Test(store, create_list_delete)
{
	struct store *st = open_it();
	struct repl_meta *m;
	uint8_t zero[16] = {0};

	cr_assert_eq(store_create_volume(st, "vm1", 20 * MIB, NULL, &e), 0, "%s", e.text);
	cr_assert_eq(store_create_volume(st, "vm1-data", 512, "vm1", &e), 0, "%s", e.text);
	cr_assert_eq(tmpdir_size(&dir, "s/volumes/vm1/disk.raw"), 20 * MIB);
	cr_assert_eq(tmpdir_allocated(&dir, "s/volumes/vm1/disk.raw"), 0);
	store_close(st);
	st = open_it();
	m = group_of(st, "vm1");
	cr_assert_eq(m->n_volumes, 2);
	cr_assert_str_eq(m->volumes[0].name, "vm1");
	cr_assert_str_eq(m->volumes[1].name, "vm1-data");
	cr_assert_eq(m->volumes[0].id, 1);
	cr_assert_eq(m->volumes[1].id, 2);
	cr_assert_eq(m->volumes[1].size, 512);
	cr_assert_neq(memcmp(m->volumes[0].uuid, zero, 16), 0);
	cr_assert_neq(memcmp(m->volumes[0].uuid, m->volumes[1].uuid, 16), 0);
	cr_assert_neq(memcmp(m->uuid, zero, 16), 0);
	cr_assert_eq(m->role, ROLE_STANDALONE);
	free(m);
	cr_assert_eq(store_delete_volume(st, "vm1", &e), 0, "%s", e.text);
	cr_assert_not(tmpdir_has(&dir, "s/volumes/vm1"));
	cr_assert(tmpdir_has(&dir, "s/volumes/vm1-data"));
	cr_assert_eq(store_create_volume(st, "c", 512, "vm1", &e), 0, "%s", e.text);
	m = group_of(st, "vm1");
	cr_assert_eq(m->n_volumes, 2);
	cr_assert_eq(m->volumes[1].id, 3); /* never that of a volume that is there */
	free(m);
	cr_assert_eq(store_delete_volume(st, "vm1-data", &e), 0);
	cr_assert_eq(store_delete_volume(st, "c", &e), 0);
	cr_assert_eq(store_load_group(st, "vm1", &m, &e), -ERR_NOENT);
	cr_assert_not(tmpdir_has(&dir, "s/groups/vm1.a"));
	cr_assert_not(tmpdir_has(&dir, "s/groups/vm1.b"));
	cr_assert_eq(store_delete_volume(st, "c", &e), -ERR_NOENT);
	says("delete c: there is no such volume");
	store_close(st);
}

Test(store, names_and_sizes_are_checked)
{
	static const char *const bad[] = {
	    "",	  ".",	 "..",	"../x",	    "-a",
	    ".a", "a/b", "a b", "\xc3\xa4", "01234567890123456789012345678901234567890123456789012345678901234"};
	static const uint64_t sizes[] = {0, 1, 511, 513, (UINT64_C(64) << 40) + 512, UINT64_MAX};
	struct store *st = open_it();
	struct repl_meta *m;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		cr_assert_not(store_name_valid(bad[i]));
		cr_assert_eq(store_create_volume(st, bad[i], MIB, NULL, &e), -ERR_USAGE, "%s", bad[i]);
		cr_assert_eq(store_create_volume(st, "v", MIB, bad[i], &e), -ERR_USAGE, "%s", bad[i]);
		cr_assert_eq(store_delete_volume(st, bad[i], &e), -ERR_USAGE, "%s", bad[i]);
		cr_assert_eq(store_load_group(st, bad[i], &m, &e), -ERR_USAGE, "%s", bad[i]);
		cr_assert_eq(store_delete_group(st, bad[i], &e), -ERR_USAGE, "%s", bad[i]);
	}
	cr_assert(store_name_valid("0.a_b-C"));
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		cr_assert_eq(store_check_size(sizes[i], &e), -ERR_USAGE);
		cr_assert_eq(store_create_volume(st, "v", sizes[i], NULL, &e), -ERR_USAGE);
		says("create v: ");
	}
	cr_assert_eq(store_check_size(512, &e), 0);
	cr_assert_eq(store_check_size(VOLUME_SIZE_MAX, &e), 0);
	cr_assert_not(tmpdir_has(&dir, "s/volumes/v"));
	cr_assert_not(volume_there(st, "v"));
	store_close(st);
}

Test(store, names_are_unique)
{
	struct store *st = open_it();

	cr_assert_eq(store_create_volume(st, "a", MIB, NULL, &e), 0);
	cr_assert_eq(store_create_volume(st, "a", MIB, NULL, &e), -ERR_EXIST);
	cr_assert_eq(store_create_volume(st, "a", MIB, "other", &e), -ERR_EXIST);
	says("in group a");
	cr_assert_eq(store_create_volume(st, "x", MIB, "g", &e), 0);
	/* A name of a volume in one group that is the name of another group. */
	cr_assert_eq(store_create_volume(st, "g", MIB, "a", &e), -ERR_EXIST);
	cr_assert_eq(store_create_volume(st, "y", MIB, "x", &e), -ERR_EXIST);
	cr_assert_eq(store_create_volume(st, "g", MIB, "g", &e), 0, "%s", e.text);
	cr_assert(volume_there(st, "x") && volume_there(st, "g") && !volume_there(st, "y"));
	store_close(st);
}

Test(store, a_group_in_use_is_refused)
{
	static const struct {
		enum role role;
		enum state state;
		const char *hint;
	} in_use[] = {
	    {ROLE_PRIMARY, STATE_RUNNING, "primary"},
	    {ROLE_PRIMARY, STATE_DONE, "repctl unprotect g"},
	    {ROLE_SECONDARY, STATE_NONE, "secondary"},
	    {ROLE_STANDALONE, STATE_FAILOVER, "FAILOVER"},
	    {ROLE_STANDALONE, STATE_FAILOVER_FAILED, "FAILOVER_FAILED"},
	};
	struct store *st = open_it();

	cr_assert_eq(store_create_volume(st, "v", MIB, "g", &e), 0);
	for (size_t i = 0; i < sizeof(in_use) / sizeof(in_use[0]); i++) {
		set_role(st, "g", in_use[i].role, in_use[i].state);
		cr_assert_eq(store_create_volume(st, "w", MIB, "g", &e), -ERR_STATE);
		says(in_use[i].hint);
		cr_assert_eq(store_delete_volume(st, "v", &e), -ERR_STATE);
		says(in_use[i].hint);
		cr_assert_not(tmpdir_has(&dir, "s/volumes/w"));
		cr_assert(tmpdir_has(&dir, "s/volumes/v/disk.raw"));
	}
	set_role(st, "g", ROLE_STANDALONE, STATE_DONE);
	cr_assert_eq(store_create_volume(st, "w", MIB, "g", &e), 0);
	cr_assert_eq(store_delete_volume(st, "v", &e), 0);
	store_close(st);
}

/* A volume that joins a group with checkpoints has an overlay for each, so that the group opens. */
Test(store, a_volume_joins_the_groups_checkpoints)
{
	static const uint64_t numbers[] = {3, 7};
	struct store *st = open_it();
	struct repl_meta *m;
	struct volume *v;
	uint8_t got[4096], want[4096];

	cr_assert_eq(store_create_volume(st, "v", MIB, "g", &e), 0);
	m = group_of(st, "g");
	m->ckpt_max = 7;
	m->n_ckpts = 2;
	for (int i = 0; i < 2; i++)
		m->ckpts[i] =
		    (struct repl_ckpt){.number = numbers[i], .generation = 1, .time_ns = 1, .kind = CKPT_LOCAL};
	m->active_id = 2;
	cr_assert_eq(store_save_group(st, m, &e), 0, "%s", e.text);
	free(m);
	cr_assert_eq(store_create_volume(st, "w", MIB, "g", &e), 0, "%s", e.text);
	const struct volume_open_args args = {
	    .name = "w", .size = MIB, .durability = DURABILITY_PROCESS, .ckpts = numbers, .n_ckpts = 2, .active_id = 2};
	cr_assert_eq(volume_open(store_storage(st), &args, &v, &e), 0, "%s", e.text);
	memset(want, 0x77, sizeof(want));
	struct volume_req req = {.kind = VOLUME_WRITE, .off = 8192, .len = 4096, .buf = want};
	cr_assert_eq(volume_write(v, &req, 1), 0);
	cr_assert_eq(volume_read_disk(v, 8192, 4096, got), 0);
	cr_assert_arr_eq(got, want, 4096);
	memset(want, 0, sizeof(want));
	cr_assert_eq(volume_read_ckpt(v, 3, 8192, 4096, got), 0);
	cr_assert_arr_eq(got, want, 4096);
	volume_close(v);
	store_close(st);
}

struct saver {
	struct store *st;
	struct repl_meta *m;
	_Atomic bool over;
	bool failed;
};

static void *save_on(void *arg)
{
	struct saver *s = arg;

	for (int i = 0; i < 200 && !s->failed; i++) {
		s->m->ckpt_max++;
		s->failed = store_save_group(s->st, s->m, NULL) < 0;
	}
	atomic_store(&s->over, true);
	return NULL;
}

/* As a daemon does: a group saves, and a volume of another is made, for which all records are looked through. A load
 * that finds a save half done must not mend what is just being written. */
Test(store, a_look_at_a_record_takes_no_save_back, .timeout = 60)
{
	struct store *st = open_it();

	cr_assert_eq(store_create_volume(st, "v", MIB, "g", &e), 0, "%s", e.text);
	struct saver s = {.st = st, .m = group_of(st, "g")};
	for (int round = 0; round < 60; round++) {
		pthread_t t;

		atomic_store(&s.over, false);
		cr_assert_eq(pthread_create(&t, NULL, save_on, &s), 0);
		while (!atomic_load(&s.over)) {
			cr_assert(volume_there(st, "v"), "%s", e.text);
			cr_assert_not(volume_there(st, "w"));
		}
		cr_assert_eq(pthread_join(t, NULL), 0);
		cr_assert_not(s.failed);
		struct repl_meta *m = group_of(st, "g");
		cr_assert_eq(m->ckpt_max, s.m->ckpt_max, "round %d", round);
		free(m);
	}
	free(s.m);
	store_close(st);
}

Test(store, limits)
{
	struct store *st = open_it();
	struct repl_meta *m = malloc(sizeof(*m));
	char name[NAME_SIZE];

	for (unsigned i = 0; i < GROUP_VOLUMES_MAX; i++) {
		snprintf(name, sizeof(name), "v%u", i);
		cr_assert_eq(store_create_volume(st, name, MIB, "g", &e), 0, "%s", e.text);
	}
	cr_assert_eq(store_create_volume(st, "more", MIB, "g", &e), -ERR_LIMIT);
	cr_assert_not(tmpdir_has(&dir, "s/volumes/more"));
	for (unsigned i = 1; i < STORE_GROUPS_MAX; i++) {
		snprintf(name, sizeof(name), "g%u", i);
		repl_meta_init(m, name);
		cr_assert_eq(store_save_group(st, m, &e), 0, "%s", e.text);
	}
	cr_assert_eq(store_save_group(st, m, &e), 0); /* one that is there */
	repl_meta_init(m, "overflow");
	cr_assert_eq(store_save_group(st, m, &e), -ERR_LIMIT);
	cr_assert_eq(store_create_volume(st, "overflow", MIB, NULL, &e), -ERR_LIMIT);
	cr_assert_not(tmpdir_has(&dir, "s/volumes/overflow"));
	cr_assert_not(tmpdir_has(&dir, "s/pending/overflow"));
	free(m);
	store_close(st);
}

/* ---- groups ---- */

struct listed {
	char text[256];
};

static int add_name(void *arg, const char *name)
{
	struct listed *l = arg;

	snprintf(l->text + strlen(l->text), sizeof(l->text) - strlen(l->text), "%s ", name);
	return strcmp(name, "stop") == 0 ? 42 : 0;
}

Test(store, groups_are_listed_in_order)
{
	static const char *const names[] = {"vm.a", "b", "stop", "a", "vm", "zz"};
	struct store *st = open_it();
	struct listed l = {""};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		cr_assert_eq(store_create_volume(st, names[i], MIB, NULL, &e), 0);
	tmpdir_write(&dir, "s/groups/vm.tmp", "x", 1, 0);
	tmpdir_write(&dir, "s/groups/.hidden.a", "x", 1, 0);
	cr_assert_eq(store_list_groups(st, add_name, &l), 42);
	cr_assert_str_eq(l.text, "a b stop ");
	cr_assert_eq(store_delete_group(st, "stop", &e), 0);
	cr_assert_eq(store_delete_group(st, "stop", &e), -ERR_NOENT);
	l.text[0] = '\0';
	cr_assert_eq(store_list_groups(st, add_name, &l), 0);
	cr_assert_str_eq(l.text, "a b vm vm.a zz ");
	store_close(st);
}

/* Two copies of one group's record under another group's name. */
static void copy_record(const char *from, const char *to)
{
	static char buf[1 << 16];

	for (const char *suffix = "ab"; *suffix; suffix++) {
		char path[64];
		size_t n;

		snprintf(path, sizeof(path), "s/groups/%s.%c", from, *suffix);
		n = tmpdir_read(&dir, path, buf, sizeof(buf), 0);
		snprintf(path, sizeof(path), "s/groups/%s.%c", to, *suffix);
		tmpdir_write(&dir, path, buf, n, 0);
	}
}

Test(store, a_record_under_another_name_is_refused)
{
	struct store *st = open_it();
	struct repl_meta *m = (struct repl_meta *)1;

	cr_assert_eq(store_create_volume(st, "v", MIB, NULL, &e), 0);
	copy_record("v", "w");
	cr_assert_eq(store_load_group(st, "w", &m, &e), -ERR_CORRUPT);
	says("hold the record of group v");
	cr_assert_eq(m, (struct repl_meta *)1);
	store_close(st);
}

/* ---- what a crash leaves ---- */

static void damage(const char *group)
{
	for (const char *suffix = "ab"; *suffix; suffix++) {
		char path[64];

		snprintf(path, sizeof(path), "s/groups/%s.%c", group, *suffix);
		tmpdir_write(&dir, path, "XXXX", 4, 60);
	}
}

Test(store, a_damaged_group_costs_nothing_else)
{
	struct store *st = open_it();
	struct repl_meta *m;
	uint32_t i;

	cr_assert_eq(store_create_volume(st, "good", MIB, NULL, &e), 0);
	cr_assert_eq(store_create_volume(st, "bad", MIB, NULL, &e), 0);
	tmpdir_write(&dir, "s/volumes/bad/disk.raw", "precious", 8, 0);
	store_close(st);
	damage("bad");
	st = open_it();
	cr_assert_eq(store_load_group(st, "bad", &m, &e), -ERR_CORRUPT);
	says("groups/bad.a");
	says("store ");
	cr_assert(volume_there(st, "good"));
	cr_assert_eq(store_find_volume(st, "bad", &m, &i, &e), -ERR_CORRUPT);
	/* Its folder stays where it is, and nothing takes its place. */
	cr_assert(tmpdir_has(&dir, "s/volumes/bad/disk.raw"));
	cr_assert_eq(store_create_volume(st, "bad", MIB, NULL, &e), -ERR_CORRUPT);
	cr_assert_eq(store_create_volume(st, "new", MIB, NULL, &e), -ERR_CORRUPT);
	cr_assert_not(tmpdir_has(&dir, "s/volumes/new"));
	store_close(st);
}

Test(store, leftovers_are_settled)
{
	struct store *st = open_it();
	char byte;

	cr_assert_eq(store_create_volume(st, "named", MIB, NULL, &e), 0);
	cr_assert_eq(store_create_volume(st, "marked", MIB, NULL, &e), 0);
	cr_assert_eq(store_create_volume(st, "empty", MIB, NULL, &e), 0);
	cr_assert_eq(store_create_volume(st, "full", MIB, NULL, &e), 0);
	tmpdir_write(&dir, "s/volumes/named/disk.raw", "N", 1, 0);
	tmpdir_write(&dir, "s/volumes/marked/disk.raw", "M", 1, 0);
	tmpdir_write(&dir, "s/volumes/full/disk.raw", "F", 1, 4096);
	cr_assert_eq(store_delete_group(st, "marked", &e), 0);
	cr_assert_eq(store_delete_group(st, "empty", &e), 0);
	cr_assert_eq(store_delete_group(st, "full", &e), 0);
	store_close(st);
	/* As a kill leaves it in the middle of an import or a delete; a mark on a named volume means nothing. */
	tmpdir_write(&dir, "s/pending/marked", "", 0, 0);
	tmpdir_write(&dir, "s/pending/named", "", 0, 0);
	cr_assert_eq(mkdir(tmpdir_at(&dir, "s/orphans"), 0700), 0);
	cr_assert_eq(mkdir(tmpdir_at(&dir, "s/orphans/full"), 0700), 0);
	tmpdir_write(&dir, "s/orphans/full/disk.raw", "old", 3, 0);
	cr_assert_eq(mkdir(tmpdir_at(&dir, "s/volumes/not a name"), 0700), 0);
	st = open_it();
	cr_assert(tmpdir_has(&dir, "s/volumes/named/disk.raw"));
	cr_assert_not(tmpdir_has(&dir, "s/volumes/marked"));
	cr_assert_not(tmpdir_has(&dir, "s/volumes/empty"));
	cr_assert_not(tmpdir_has(&dir, "s/volumes/full"));
	cr_assert(tmpdir_has(&dir, "s/volumes/not a name"));
	/* A disk with data that no record names is kept, beside an older one of its name. */
	cr_assert_eq(tmpdir_read(&dir, "s/orphans/full.1/disk.raw", &byte, 1, 4096), 1);
	cr_assert_eq(byte, 'F');
	cr_assert(tmpdir_has(&dir, "s/orphans/full/disk.raw"));
	cr_assert_not(tmpdir_has(&dir, "s/pending/marked"));
	cr_assert_not(tmpdir_has(&dir, "s/pending/named"));
	cr_assert_eq(store_create_volume(st, "full", MIB, NULL, &e), 0, "%s", e.text);
	store_close(st);
}

/* ---- import and export ---- */

static uint8_t image[4 * MIB];

/* Data, holes, and blocks of written zeroes; the tail is no whole block. */
static void make_image(const char *name, size_t size)
{
	memset(image, 0, sizeof(image));
	for (size_t i = 0; i < 20000; i++)
		image[i] = (uint8_t)(i % 250 + 1);
	for (size_t i = MIB + 4096; i < MIB + 3 * 4096; i++)
		image[i] = 0x5a;
	image[size - 1] = 0x77;
	tmpdir_write(&dir, name, image, MIB * 2, 0);
	tmpdir_write(&dir, name, image + size - 512, 512, (off_t)(size - 512));
}

static void expect_file(const char *name, size_t size)
{
	static uint8_t got[sizeof(image)];

	memset(got, 0xaa, sizeof(got));
	cr_assert_eq(tmpdir_size(&dir, name), (off_t)size);
	cr_assert_eq(tmpdir_read(&dir, name, got, size, 0), size);
	cr_assert_arr_eq(got, image, size);
}

static int import(struct store *st, const char *file, const char *format, const char *group, store_progress_fn fn,
		  void *arg, struct err *why)
{
	struct store_import_args args = {.volume = "v", .file = file, .format = format, .group = group};

	return store_import(st, &args, fn, arg, NULL, why);
}

struct progress {
	unsigned calls, cancel_at;
	uint64_t done, total;
	const char *grow; /* written to once the copy is under way */
};

static int on_progress(void *arg, uint64_t done, uint64_t total)
{
	struct progress *p = arg;

	cr_assert(done > p->done || p->calls == 0);
	cr_assert(done <= total);
	p->done = done;
	p->total = total;
	if (p->grow)
		tmpdir_write(&dir, p->grow, "x", 1, (off_t)total);
	return ++p->calls == p->cancel_at;
}

Test(store, import_copies_and_stays_sparse)
{
	const size_t size = 3 * MIB + 512;
	struct store *st = open_it();
	struct progress p = {0};
	struct repl_meta *m;

	make_image("in.raw", size);
	cr_assert_eq(import(st, tmpdir_at(&dir, "in.raw"), NULL, "g", on_progress, &p, &e), 0, "%s", e.text);
	expect_file("s/volumes/v/disk.raw", size);
	/* 20,000 bytes, two blocks, the tail: 8 blocks of data, and no more than a few for the filesystem's own. */
	cr_assert_leq(tmpdir_allocated(&dir, "s/volumes/v/disk.raw"), 16 * 4096);
	cr_assert_eq(p.done, size);
	cr_assert_eq(p.total, size);
	cr_assert_geq(p.calls, 3);
	m = group_of(st, "g");
	cr_assert_str_eq(m->volumes[0].name, "v");
	cr_assert_eq(m->volumes[0].size, size);
	free(m);
	cr_assert_eq(import(st, tmpdir_at(&dir, "in.raw"), NULL, NULL, NULL, NULL, &e), -ERR_EXIST);
	expect_file("s/volumes/v/disk.raw", size);
	cr_assert_not(tmpdir_has(&dir, "s/pending/v"));
	store_close(st);
}

static void nothing_left(struct store *st, const char *volume)
{
	char path[64];

	snprintf(path, sizeof(path), "s/volumes/%s", volume);
	cr_assert_not(tmpdir_has(&dir, path));
	snprintf(path, sizeof(path), "s/pending/%s", volume);
	cr_assert_not(tmpdir_has(&dir, path));
	cr_assert_not(volume_there(st, volume));
}

Test(store, a_failed_import_leaves_nothing)
{
	struct store *st = open_it();
	struct progress p = {.cancel_at = 2};

	make_image("in.raw", 3 * MIB);
	cr_assert_eq(import(st, tmpdir_at(&dir, "in.raw"), NULL, NULL, on_progress, &p, &e), -ERR_CANCELED);
	cr_assert_eq(p.calls, 2);
	nothing_left(st, "v");
	p = (struct progress){.grow = "in.raw"};
	cr_assert_eq(import(st, tmpdir_at(&dir, "in.raw"), NULL, NULL, on_progress, &p, &e), -ERR_FAILED);
	says("changed while it was read");
	nothing_left(st, "v");
	/* It has 3 MiB and one byte now. */
	cr_assert_eq(import(st, tmpdir_at(&dir, "in.raw"), NULL, NULL, NULL, NULL, &e), -ERR_USAGE);
	says("qemu-img resize -f raw");
	says("in.raw 3146240");
	tmpdir_write(&dir, "empty", "", 0, 0);
	cr_assert_eq(import(st, tmpdir_at(&dir, "empty"), NULL, NULL, NULL, NULL, &e), -ERR_USAGE);
	cr_assert_eq(import(st, tmpdir_at(&dir, "none"), NULL, NULL, NULL, NULL, &e), -ERR_FAILED);
	says("there is no file");
	cr_assert_eq(import(st, dir.path, NULL, NULL, NULL, NULL, &e), -ERR_USAGE);
	nothing_left(st, "v");
	store_close(st);
}

Test(store, what_is_no_whole_qcow_is_refused)
{
	static const uint8_t qcow2[8] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 3}, qcow[8] = {'Q', 'F', 'I', 0xfb, 0, 0, 0, 1};
	struct store *st = open_it();
	uint8_t magic[8];

	tmpdir_write(&dir, "q2", qcow2, 8, 0);
	tmpdir_write(&dir, "q1", qcow, 8, 0);
	cr_assert_eq(truncate(tmpdir_at(&dir, "q2"), 65536), 0);
	cr_assert_eq(truncate(tmpdir_at(&dir, "q1"), 65536), 0);
	cr_assert_eq(import(st, tmpdir_at(&dir, "q2"), NULL, NULL, NULL, NULL, &e), -ERR_CORRUPT);
	says("cluster size");
	cr_assert_eq(import(st, tmpdir_at(&dir, "q1"), NULL, NULL, NULL, NULL, &e), -ERR_CORRUPT);
	cr_assert_eq(import(st, tmpdir_at(&dir, "q2"), "qcow", NULL, NULL, NULL, &e), -ERR_NOTSUP);
	says("by its first bytes it is qcow2");
	cr_assert_eq(import(st, tmpdir_at(&dir, "q2"), "vmdk", NULL, NULL, NULL, &e), -ERR_USAGE);
	nothing_left(st, "v");
	cr_assert_eq(import(st, tmpdir_at(&dir, "q2"), "raw", NULL, NULL, NULL, &e), 0, "%s", e.text);
	tmpdir_read(&dir, "s/volumes/v/disk.raw", magic, 8, 0);
	cr_assert_arr_eq(magic, qcow2, 8);
	store_close(st);
}

static int die(void *arg, uint64_t done, uint64_t total)
{
	unsigned *left = arg;

	(void)done;
	(void)total;
	if (--*left == 0)
		_exit(3);
	return 0;
}

/* Killed in the middle of the copy: the next opening clears it away, and the same import then works. */
Test(store, import_killed)
{
	make_image("in.raw", 3 * MIB);
	for (unsigned at = 1; at <= 3; at++) {
		struct store *st;
		int status;
		pid_t pid = fork();

		if (pid == 0) {
			unsigned left = at;

			if (store_open(tmpdir_at(&dir, "s"), STORE_CREATE, DURABILITY_POWER, &st, NULL) == 0)
				(void)import(st, tmpdir_at(&dir, "in.raw"), NULL, NULL, die, &left, NULL);
			_exit(1);
		}
		cr_assert_eq(waitpid(pid, &status, 0), pid);
		cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 3);
		cr_assert(tmpdir_has(&dir, "s/volumes/v"));
		st = open_it();
		nothing_left(st, "v");
		cr_assert_not(tmpdir_has(&dir, "s/orphans"));
		cr_assert_eq(import(st, tmpdir_at(&dir, "in.raw"), NULL, NULL, NULL, NULL, &e), 0, "%s", e.text);
		expect_file("s/volumes/v/disk.raw", 3 * MIB);
		cr_assert_eq(store_delete_volume(st, "v", &e), 0, "%s", e.text);
		nothing_left(st, "v");
		store_close(st);
	}
}

static struct volume *open_raw(struct store *st, const char *name, uint64_t size)
{
	const struct volume_open_args args = {.name = name, .size = size, .durability = DURABILITY_PROCESS};
	struct volume *v;

	cr_assert_eq(volume_open(store_storage(st), &args, &v, &e), 0, "%s", e.text);
	return v;
}

Test(store, export_copies_and_replaces_nothing)
{
	const size_t size = 3 * MIB + 512;
	struct store *st = open_it();
	struct progress p = {0};
	struct volume *v;

	make_image("in.raw", size);
	cr_assert_eq(import(st, tmpdir_at(&dir, "in.raw"), NULL, NULL, NULL, NULL, &e), 0);
	v = open_raw(st, "v", size);
	cr_assert_eq(volume_export(v, LAYER_DISK, 0, 0, tmpdir_at(&dir, "out"), on_progress, &p, &e), 0, "%s", e.text);
	expect_file("out", size);
	cr_assert_leq(tmpdir_allocated(&dir, "out"), 16 * 4096);
	cr_assert_eq(p.done, size);
	cr_assert_not(tmpdir_has(&dir, "out.part"));
	cr_assert_eq(volume_export(v, LAYER_DISK, 0, 0, tmpdir_at(&dir, "out"), NULL, NULL, &e), -ERR_EXIST);
	says("exists");
	cr_assert_eq(volume_export(v, LAYER_DISK, 0, 0, tmpdir_at(&dir, "none/new"), NULL, NULL, &e), -ERR_FAILED);
	p = (struct progress){.cancel_at = 2};
	cr_assert_eq(volume_export(v, LAYER_DISK, 0, 0, tmpdir_at(&dir, "c"), on_progress, &p, &e), -ERR_CANCELED);
	cr_assert_not(tmpdir_has(&dir, "c"));
	cr_assert_not(tmpdir_has(&dir, "c.part"));
	cr_assert_eq(volume_export(v, LAYER_IMAGE, 9, 0, tmpdir_at(&dir, "k"), NULL, NULL, &e), -ERR_NOENT);
	cr_assert_not(tmpdir_has(&dir, "k.part"));
	volume_close(v);
	store_close(st);
}

/* The file that appears while the copy is made is not replaced. */
static int make_rival(void *arg, uint64_t done, uint64_t total)
{
	(void)arg;
	(void)done;
	(void)total;
	tmpdir_write(&dir, "out", "rival", 5, 0);
	return 0;
}

Test(store, export_of_layers)
{
	static const uint64_t numbers[] = {1};
	const size_t size = MIB;
	struct store *st = open_it();
	struct volume *v;
	uint8_t block[4096] = {0};

	cr_assert_eq(store_create_volume(st, "v", size, NULL, &e), 0);
	make_image("in.raw", size);
	tmpdir_write(&dir, "s/volumes/v/disk.raw", image, 8192, 0);
	v = open_raw(st, "v", size);
	cr_assert_eq(volume_prepare(v, 1, 0, &e), 0, "%s", e.text);
	volume_switch(v, numbers[0], 0);
	memset(block, 0x99, sizeof(block));
	struct volume_req reqs[] = {{.kind = VOLUME_WRITE, .off = 4096, .len = 4096, .buf = block},
				    {.kind = VOLUME_WRITE, .off = 65536, .len = 4096, .buf = block}};
	cr_assert_eq(volume_write(v, reqs, 2), 0);
	memset(image + 8192, 0, sizeof(image) - 8192);
	cr_assert_eq(volume_export(v, LAYER_IMAGE, 1, 0, tmpdir_at(&dir, "k"), NULL, NULL, &e), 0, "%s", e.text);
	expect_file("k", size);
	/* The undo overlay: two blocks, one of zeroes, which is data. */
	cr_assert_eq(volume_export(v, LAYER_UNDO, 1, 0, tmpdir_at(&dir, "u"), NULL, NULL, &e), 0, "%s", e.text);
	memset(image, 0, 4096);
	expect_file("u", size);
	cr_assert_eq(tmpdir_allocated(&dir, "u"), 8192);
	cr_assert_eq(volume_export(v, LAYER_DISK, 0, 0, tmpdir_at(&dir, "out"), make_rival, NULL, &e), -ERR_EXIST);
	cr_assert_eq(tmpdir_size(&dir, "out"), 5);
	cr_assert_not(tmpdir_has(&dir, "out.part"));
	volume_close(v);
	store_close(st);
}
