/* What a peer's JOIN makes in the store (fs/repl_exec.h). */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "fs/repl_exec.h"
#include "tests/unit/image/tmpdir.h"

#define DISK_SIZE (UINT64_C(1) << 20)

static struct tmpdir dir;
static struct store *st;
static struct repl_meta made;

static void setup(void)
{
	struct err e = {0};
	tmpdir_make(&dir);
	cr_assert_eq(store_open(tmpdir_at(&dir, "s"), STORE_CREATE, DURABILITY_PROCESS, &st, &e), 0, "%s", e.text);
}

static void teardown(void)
{
	store_close(st);
	tmpdir_remove(&dir);
}

TestSuite(repl_exec, .init = setup, .fini = teardown);

static int make(const char *first, const char *second, struct err *e)
{
	static struct wire_join j;
	memset(&j, 0, sizeof(j));
	(void)snprintf(j.group, sizeof(j.group), "vm");
	memset(j.group_uuid, 0x5a, sizeof(j.group_uuid));
	settings_default(&j.settings);
	j.n_volumes = 2;
	(void)snprintf(j.volumes[0].name, NAME_SIZE, "%s", first);
	(void)snprintf(j.volumes[1].name, NAME_SIZE, "%s", second);
	j.volumes[0].id = 1;
	j.volumes[1].id = 2;
	j.volumes[0].size = j.volumes[1].size = DISK_SIZE;
	return repl_exec_make(st, &j, &made, e);
}

static bool has_group(void)
{
	struct repl_meta *m = NULL;
	int err = store_load_group(st, "vm", &m, NULL);
	free(m);
	return err == 0;
}

Test(repl_exec, makes_the_volumes_and_their_record)
{
	struct err e = {0};
	cr_assert_eq(make("a", "b", &e), 0, "%s", e.text);
	cr_assert(has_group());
	cr_assert(made.fresh && made.inconsistent && made.has_peer && made.role == ROLE_SECONDARY);
	cr_assert(tmpdir_has(&dir, "s/volumes/a/disk.raw") && tmpdir_has(&dir, "s/volumes/b/disk.raw"));
}

Test(repl_exec, a_making_that_fails_leaves_nothing)
{
	struct err e = {0};
	cr_assert_eq(volume_create(store_storage(st), "b", DISK_SIZE, DURABILITY_PROCESS, &e), 0, "%s", e.text);
	tmpdir_write(&dir, "s/volumes/b/disk.raw", "data", 4, 0);
	cr_assert_eq(make("a", "b", &e), -ERR_EXIST);
	cr_assert_not(has_group());
	cr_assert_not(tmpdir_has(&dir, "s/volumes/a"));
	cr_assert(tmpdir_has(&dir, "s/volumes/b/disk.raw"), "it was not made here");
}

/* One that failed, and whose folder could not be removed either, keeps none of the peer's tries from coming to
 * something. */
Test(repl_exec, what_a_failed_making_left_is_not_in_the_way)
{
	struct err e = {0};
	cr_assert_eq(volume_create(store_storage(st), "b", DISK_SIZE / 2, DURABILITY_PROCESS, &e), 0, "%s", e.text);
	cr_assert_eq(make("a", "b", &e), 0, "%s", e.text);
	cr_assert_eq(tmpdir_size(&dir, "s/volumes/b/disk.raw"), DISK_SIZE);
}

/* A group that the daemon has out, and could not take up again. With volumes of its names the making fails at the first
 * folder, and what it undoes then is not that group; with others nothing else would stop it. */
Test(repl_exec, a_group_that_is_there_is_not_made_over)
{
	struct err e = {0};
	cr_assert_eq(store_create_volume(st, "a", DISK_SIZE, "vm", &e), 0, "%s", e.text);
	cr_assert_eq(make("a", "b", &e), -ERR_EXIST);
	cr_assert(has_group(), "its record is deleted");
	cr_assert_eq(make("c", "d", &e), -ERR_EXIST);
	cr_assert_not(tmpdir_has(&dir, "s/volumes/c"));
	struct repl_meta *m = NULL;
	cr_assert_eq(store_load_group(st, "vm", &m, &e), 0, "%s", e.text);
	cr_assert(m->role == ROLE_STANDALONE && m->n_volumes == 1 && strcmp(m->volumes[0].name, "a") == 0);
	free(m);
	cr_assert(tmpdir_has(&dir, "s/volumes/a/disk.raw"));
}

Test(repl_exec, a_record_that_does_not_check_out_is_not_made_over)
{
	struct err e = {0};
	tmpdir_write(&dir, "s/groups/vm.a", "torn", 4, 0);
	cr_assert_eq(make("a", "b", &e), -ERR_CORRUPT);
	cr_assert(tmpdir_has(&dir, "s/groups/vm.a"));
	cr_assert_not(tmpdir_has(&dir, "s/volumes/a"));
}
