/* The human form of status, its exit code, and failover's sentence. */
#include "cli/cli.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static json_t *load(const char *text)
{
	json_error_t at;
	json_t *doc = json_loads(text, 0, &at);
	cr_assert_not_null(doc, "%s", at.text);
	return doc;
}

static void shows(const char *json, bool color, const char *want)
{
	char *text = NULL;
	size_t size = 0;
	json_t *doc = load(json);
	FILE *f = open_memstream(&text, &size);
	status_print(f, doc, color);
	(void)fclose(f);
	cr_assert_str_eq(text, want, "got:\n%s\nwant:\n%s", text, want);
	json_decref(doc);
	free(text);
}

Test(status, primary_in_sync)
{
	shows(
	    "{\"schema\":1,\"groups\":[{\"group\":\"vm1\",\"role\":\"primary\",\"state\":\"RUNNING\",\"link\":"
	    "\"SYNCED\","
	    "\"health\":\"ok\",\"reasons\":[],\"protocol\":\"F\",\"peer\":\"10.0.0.2:7790\",\"checkpoint\":41,"
	    "\"checkpoint_age_s\":3.21,\"checkpoint_valid\":true,\"split_brain\":false,\"rpo_s\":0.1,\"dirty_bytes\":0,"
	    "\"queue_bytes\":0,\"resync\":null,\"commit\":null,\"error\":null,\"volumes\":[{\"name\":\"vm1\","
	    "\"size\":21474836480,\"path\":\"/mnt/repfs/volumes/vm1\",\"active_bytes\":0,\"checkpoints\":3}]}]}",
	    false,
	    "vm1  primary  RUNNING  SYNCED  ok  protocol F  peer 10.0.0.2:7790\n"
	    "  checkpoint 41, 3.2 s ago   rpo 0.1 s   queue 0 B   dirty 0 B\n"
	    "  vm1    20.0 GiB   /mnt/repfs/volumes/vm1\n");
}

Test(status, what_is_not_known_is_not_made_up)
{
	shows(
	    "{\"groups\":[{\"group\":\"g\",\"role\":\"standalone\",\"state\":\"NONE\",\"link\":\"DOWN\",\"health\":"
	    "\"ok\","
	    "\"protocol\":\"F\",\"peer\":null,\"checkpoint\":null,\"checkpoint_age_s\":null,\"checkpoint_valid\":false,"
	    "\"rpo_s\":null,\"dirty_bytes\":null,\"queue_bytes\":null,\"volumes\":[{\"name\":\"v\",\"size\":512,"
	    "\"path\":null}]}]}",
	    false,
	    "g  standalone  NONE  DOWN  ok  protocol F\n"
	    "  no checkpoint   rpo -   queue -   dirty -\n"
	    "  v    512 B   -\n");
	/* An answer that lacks everything or has it wrong must not end in a crash. */
	shows("{\"groups\":[{}, {\"group\":3,\"volumes\":7,\"reasons\":\"x\",\"resync\":[],\"error\":1}]}", false,
	      "-  -  -  -  -  protocol -\n  no checkpoint   rpo -   queue -   dirty -\n\n"
	      "-  -  -  -  -  protocol -\n  no checkpoint   rpo -   queue -   dirty -\n");
	shows("{}", false, "");
}

Test(status, resync_error_and_several_volumes)
{
	shows(
	    "{\"groups\":[{\"group\":\"db\",\"role\":\"primary\",\"state\":\"RUNNING\",\"link\":\"RESYNC\","
	    "\"health\":\"degraded\",\"reasons\":[\"the peer is not in sync\",\"an error stands\"],\"protocol\":\"C\","
	    "\"peer\":\"b:1\",\"checkpoint\":4,\"checkpoint_age_s\":125,\"checkpoint_valid\":false,\"rpo_s\":12,"
	    "\"dirty_bytes\":1048576,\"queue_bytes\":10,\"resync\":{\"done\":256,\"total\":1024,\"rate\":2048,\"eta_"
	    "s\":90},"
	    "\"commit\":null,\"error\":{\"code\":\"ERR_IO\",\"operation\":\"write\",\"volume\":\"log\",\"offset\":4096,"
	    "\"length\":512,\"time\":\"2026-01-02T03:04:05.678Z\",\"text\":\"bad sector\"},\"volumes\":["
	    "{\"name\":\"log\",\"size\":1073741824,\"path\":\"/m/volumes/log\"},"
	    "{\"name\":\"database\",\"size\":107374182400,\"path\":\"/m/volumes/database\"}]}]}",
	    false,
	    "db  primary  RUNNING  RESYNC  degraded  protocol C  peer b:1\n"
	    "  checkpoint 4, 2 min 5 s ago, not valid   rpo 12.0 s   queue 10 B   dirty 1.0 MiB\n"
	    "  degraded: the peer is not in sync\n"
	    "  degraded: an error stands\n"
	    "  resync 25.0 %, 256 B of 1.0 KiB   2.0 KiB/s   1 min 30 s left\n"
	    "  error ERR_IO: write of log, 512 bytes at 4096, 2026-01-02T03:04:05.678Z\n"
	    "    bad sector\n"
	    "  log           1.0 GiB   /m/volumes/log\n"
	    "  database    100.0 GiB   /m/volumes/database\n");
}

Test(status, secondary_shows_its_overlays)
{
	shows("{\"groups\":[{\"group\":\"v\",\"role\":\"secondary\",\"state\":\"FAILOVER\",\"link\":\"DOWN\","
	      "\"health\":\"ok\","
	      "\"protocol\":\"F\",\"peer\":\"a:1\",\"checkpoint\":2,\"checkpoint_age_s\":0,\"checkpoint_valid\":true,"
	      "\"rpo_s\":0,\"dirty_bytes\":0,\"queue_bytes\":0,\"commit\":{\"done\":1,\"total\":2},\"volumes\":["
	      "{\"name\":\"v\",\"size\":512,\"path\":\"/"
	      "p\",\"active_bytes\":4096,\"hidden_bytes\":8192,\"history_bytes\":0,"
	      "\"checkpoints\":2}]}]}",
	      false,
	      "v  secondary  FAILOVER  DOWN  ok  protocol F  peer a:1\n"
	      "  checkpoint 2, 0.0 s ago   rpo 0.0 s   queue 0 B   dirty 0 B\n"
	      "  commit 50.0 %, 1 B of 2 B\n"
	      "  v    512 B   /p   active 4.0 KiB   hidden 8.0 KiB   history 0 B   checkpoints 2\n");
}

Test(status, colour_changes_no_text)
{
	char *text = NULL;
	size_t size = 0;
	json_t *doc = load("{\"groups\":[{\"group\":\"v\",\"link\":\"DOWN\",\"health\":\"split_brain\"}]}");
	FILE *f = open_memstream(&text, &size);
	status_print(f, doc, true);
	(void)fclose(f);
	cr_assert(strstr(text, "\033[31msplit_brain\033[0m"), "%s", text);
	json_decref(doc);
	free(text);
}

Test(status, exit_codes)
{
	static const struct {
		const char *json;
		int code;
	} rows[] = {
	    {"{\"groups\":[]}", 0},
	    {"{\"groups\":[{\"health\":\"ok\"}]}", 0},
	    {"{\"groups\":[{\"health\":\"ok\"},{\"health\":\"degraded\"},{\"health\":\"ok\"}]}", 7},
	    {"{\"groups\":[{\"health\":\"degraded\"},{\"health\":\"split_brain\"}]}", 8},
	    {"{\"groups\":[{\"health\":\"degraded\",\"split_brain\":true}]}", 8},
	    {"{\"groups\":[{}]}", 7},
	};
	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		json_t *doc = load(rows[i].json);
		cr_assert_eq(status_exit(doc), rows[i].code, "%s", rows[i].json);
		json_decref(doc);
	}
}

Test(failover, sentence)
{
	static const struct {
		const char *json, *text;
	} rows[] = {
	    {"{\"group\":\"vm1\",\"checkpoint\":41,\"age_s\":3.2,\"received_checkpoint\":42,\"received_bytes\":"
	     "13002342}",
	     "vm1: at checkpoint 41, 3.2 s old; all received is kept as checkpoint 42 (12.4 MiB more)"},
	    {"{\"group\":\"vm1\",\"checkpoint\":41,\"age_s\":null,\"received_checkpoint\":42,\"received_bytes\":null}",
	     "vm1: at checkpoint 41; all received is kept as checkpoint 42"},
	    {"{\"group\":\"vm1\",\"checkpoint\":42,\"age_s\":0,\"received_checkpoint\":42,\"received_bytes\":0}",
	     "vm1: at all that was received, which is checkpoint 42"},
	    {"{\"group\":\"vm1\",\"checkpoint\":null,\"age_s\":null,\"received_checkpoint\":42,\"received_bytes\":0}",
	     "vm1: at all that was received, which is checkpoint 42"},
	    {"{\"group\":\"vm1\",\"checkpoint\":41,\"age_s\":3.2,\"received_checkpoint\":null,\"received_bytes\":null}",
	     "vm1: at checkpoint 41, 3.2 s old"},
	    {"{\"group\":\"vm1\",\"checkpoint\":null,\"received_checkpoint\":null}", "vm1: at all that was received"},
	};
	for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
		char buf[512];
		json_t *doc = load(rows[i].json);
		memset(buf, 'x', sizeof(buf));
		failover_sentence(doc, buf, sizeof(buf));
		cr_assert_str_eq(buf, rows[i].text);
		json_decref(doc);
	}
}
