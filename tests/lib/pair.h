/* Two daemons in one process, each with a store of its own, joined over loopback TCP: everything but the mount. For
 * tests of what replication does, without FUSE in between. Nothing here asserts: functions return 0 or -ERR_x, so they
 * can be used under any test runner. */
#ifndef REPFS_TESTS_LIB_PAIR_H
#define REPFS_TESTS_LIB_PAIR_H

#include <jansson.h>
#include <stdint.h>

#include "fs/daemon.h"
#include "tests/lib/faultstore.h"

struct pair_host {
	char store[256];
	struct daemon *d;
	struct daemon_hooks hooks; /* from the next start on */
	struct faults *faults;	   /* from the next start on; NULL: none */
	struct err err;		   /* of the last call */
};

struct pair {
	char dir[128];
	struct pair_host a, b; /* b listens */
	char addr[64];
};

int pair_open(struct pair *p);
int pair_open_with(struct pair *p, struct faults *a, struct faults *b); /* NULL: no faults on that host */
void pair_close(struct pair *p);					/* stops both, removes everything */
int pair_host_start(struct pair *p, struct pair_host *h);
void pair_host_stop(struct pair_host *h);
/* One verb; args as json_pack arguments, stolen. The result is dropped unless ret is given. */
int pair_do(struct pair_host *h, const char *verb, json_t *args, json_t **ret);
int pair_create(struct pair_host *h, const char *volume, const char *group, uint64_t size);
int pair_protect(struct pair *p, const char *group); /* and waits for sync */
/* Each waits 60 s at most. */
int pair_wait_state(struct pair_host *h, const char *group, const char *state);
int pair_wait_link(struct pair_host *h, const char *group, const char *link);
/* A status field as text; "" if it is not a string. */
void pair_status(struct pair_host *h, const char *group, const char *field, char *buf, size_t size);
int64_t pair_status_int(struct pair_host *h, const char *group, const char *field);
int pair_write(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, uint8_t byte);
int pair_write_buf(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, const void *buf);
/* 0 if all of the range is `byte`; 1 if not; -ERR_x. The buffer is poisoned before. */
int pair_is(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, uint8_t byte);
int pair_read(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, void *buf);
/* The same of the disk in the store, past the daemon. */
int pair_disk_is(struct pair_host *h, const char *volume, uint64_t off, uint64_t len, uint8_t byte);
/* Turns over one byte of a file of the store (path below it). */
int pair_flip(struct pair_host *h, const char *path, uint64_t off);

#endif
