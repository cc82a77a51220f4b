/* See pair.h. */
#include "tests/lib/pair.h"

#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/os/clock.h"
#include "core/os/io.h"

#define PAIR_WAIT_NS (60 * NS_PER_SEC)

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st;
	(void)type;
	(void)ftw;
	return remove(path);
}

int pair_host_start(struct pair *p, struct pair_host *h)
{
	struct daemon_config cfg = {.store = h->store, .durability = DURABILITY_PROCESS, .hooks = h->hooks};
	if (h == &p->b)
		cfg.listen = p->addr[0] ? p->addr : "127.0.0.1:0";
	if (h->faults && (cfg.storage = faultstore_open(h->store, h->faults)) == NULL)
		return -ERR_IO;
	int err = daemon_open(&cfg, &h->d, &h->err);
	if (!err && h == &p->b)
		(void)snprintf(p->addr, sizeof(p->addr), "%s", daemon_listen_addr(h->d));
	return err;
}

void pair_host_stop(struct pair_host *h)
{
	daemon_close(h->d);
	h->d = NULL;
}

int pair_open_with(struct pair *p, struct faults *a, struct faults *b)
{
	const char *tmp = getenv("TMPDIR");
	memset(p, 0, sizeof(*p));
	p->a.faults = a;
	p->b.faults = b;
	(void)snprintf(p->dir, sizeof(p->dir), "%.90s/repfs-pair-XXXXXX", tmp ? tmp : "/tmp");
	if (mkdtemp(p->dir) == NULL)
		return -ERR_IO;
	(void)snprintf(p->a.store, sizeof(p->a.store), "%s/a", p->dir);
	(void)snprintf(p->b.store, sizeof(p->b.store), "%s/b", p->dir);
	int err = pair_host_start(p, &p->a);
	return err ? err : pair_host_start(p, &p->b);
}

int pair_open(struct pair *p)
{
	return pair_open_with(p, NULL, NULL);
}

void pair_close(struct pair *p)
{
	pair_host_stop(&p->a);
	pair_host_stop(&p->b);
	if (p->dir[0])
		(void)nftw(p->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

int pair_do(struct pair_host *h, const char *verb, json_t *args, json_t **ret)
{
	json_t *result = NULL;
	memset(&h->err, 0, sizeof(h->err));
	int err = daemon_command(h->d, NULL, verb, args, &result, &h->err);
	json_decref(args);
	if (ret && !err)
		*ret = result;
	else
		json_decref(result);
	return err;
}

int pair_create(struct pair_host *h, const char *volume, const char *group, uint64_t size)
{
	return pair_do(h, "create",
		       json_pack("{s:s, s:s, s:I}", "name", volume, "group", group, "size", (json_int_t)size), NULL);
}

int pair_protect(struct pair *p, const char *group)
{
	return pair_do(
	    &p->a, "protect",
	    json_pack("{s:s, s:s, s:b, s:i}", "name", group, "peer", p->addr, "wait", 1, "timeout_ms", 60000), NULL);
}

static json_t *status_of(struct pair_host *h, const char *group)
{
	json_t *all = daemon_status(h->d, group);
	json_t *one = all ? json_incref(json_array_get(json_object_get(all, "groups"), 0)) : NULL;
	json_decref(all);
	return one;
}

void pair_status(struct pair_host *h, const char *group, const char *field, char *buf, size_t size)
{
	json_t *s = status_of(h, group);
	const char *text = json_string_value(json_object_get(s, field));
	(void)snprintf(buf, size, "%s", text ? text : "");
	json_decref(s);
}

int64_t pair_status_int(struct pair_host *h, const char *group, const char *field)
{
	json_t *s = status_of(h, group);
	const json_t *v = json_object_get(s, field);
	int64_t n = json_is_integer(v) ? json_integer_value(v) : json_is_true(v) ? 1 : -1;
	json_decref(s);
	return n;
}

static int wait_field(struct pair_host *h, const char *group, const char *field, const char *want)
{
	for (uint64_t end = clock_mono_ns() + PAIR_WAIT_NS; clock_mono_ns() < end; (void)poll(NULL, 0, 5)) {
		char text[64];
		pair_status(h, group, field, text, sizeof(text));
		if (strcmp(text, want) == 0)
			return 0;
	}
	return -ERR_TIMEOUT;
}

int pair_wait_state(struct pair_host *h, const char *group, const char *state)
{
	return wait_field(h, group, "state", state);
}

int pair_wait_link(struct pair_host *h, const char *group, const char *link)
{
	return wait_field(h, group, "link", link);
}

int pair_write_buf(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, const void *buf)
{
	struct gvol *v = gvol_find(h->d, volume);
	int err = v ? gvol_write(v, NULL, off, len, buf) : -ERR_NOENT;
	gvol_unref(v);
	return err;
}

int pair_write(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, uint8_t byte)
{
	void *buf = malloc(len);
	if (buf == NULL)
		return -ERR_NOMEM;
	memset(buf, byte, len);
	int err = pair_write_buf(h, volume, off, len, buf);
	free(buf);
	return err;
}

int pair_read(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, void *buf)
{
	struct gvol *v = gvol_find(h->d, volume);
	int err = v ? gvol_read(v, NULL, GVOL_VOLUME, 0, off, len, buf) : -ERR_NOENT;
	gvol_unref(v);
	return err;
}

static int all_is(const uint8_t *buf, uint64_t len, uint8_t byte)
{
	for (uint64_t i = 0; i < len; i++)
		if (buf[i] != byte)
			return 1;
	return 0;
}

int pair_is(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, uint8_t byte)
{
	uint8_t *buf = malloc(len);
	if (buf == NULL)
		return -ERR_NOMEM;
	memset(buf, (uint8_t)~byte, len);
	int err = pair_read(h, volume, off, len, buf);
	err = err ? err : all_is(buf, len, byte);
	free(buf);
	return err;
}

static int open_in_store(struct pair_host *h, const char *path)
{
	char full[512];
	(void)snprintf(full, sizeof(full), "%s/%s", h->store, path);
	return open(full, O_RDWR | O_CLOEXEC);
}

int pair_disk_is(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, uint8_t byte)
{
	char path[128];
	(void)snprintf(path, sizeof(path), "volumes/%.63s/disk.raw", volume);
	int fd = open_in_store(h, path);
	uint8_t *buf = malloc(len);
	int err = fd < 0 || buf == NULL ? -ERR_IO : 0;
	if (!err) {
		memset(buf, (uint8_t)~byte, len);
		err = io_pread(fd, buf, len, off);
	}
	err = err ? err : all_is(buf, len, byte);
	free(buf);
	if (fd >= 0)
		(void)close(fd);
	return err;
}

int pair_flip(struct pair_host *h, const char *path, uint64_t off)
{
	uint8_t byte = 0;
	int fd = open_in_store(h, path);
	if (fd < 0)
		return -ERR_IO;
	int err = io_pread(fd, &byte, 1, off);
	byte ^= 0xff;
	err = err ? err : io_pwrite(fd, &byte, 1, off);
	(void)close(fd);
	return err;
}
