/* The store: its lock, its own record, the groups' records, and what a crash may have left (image/store.h).
 *
 * Order of store_open: look, lock, look again, then write. Nothing is written into a folder before it is known to be
 * a store or fit to become one, and nothing at all without the lock but the lock file.
 *
 * A new store's record is written last, so a folder without it that holds nothing but what is written before it is
 * an interrupted beginning and is gone on with.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/bytes.h"
#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "core/os/io.h"
#include "core/range.h"
#include "image/meta.h"
#include "image/store.h"
#include "image/store_internal.h"

#define STORE_KIND "STOR"
#define STORE_VERSION 1
#define STORE_RECORD_SIZE 20
#define GROUP_KIND "GRUP"
#define ORPHAN_TRIES 1000
#define REWRITE_CHUNK (1U << 20)
/* "volumes/NAME/disk.raw" and the like */
#define STORE_SUBPATH_SIZE (NAME_SIZE + 64)

/* ---- messages ---- */

int store_refuse(struct err *e, int code, const char *verb, const char *name, const char *fmt, ...)
{
	char matter[ERR_TEXT_MAX];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(matter, sizeof(matter), fmt, ap);
	va_end(ap);
	return err_set(e, code, "%s %s: %s", verb, name, matter);
}

/* Says which store the report is about; the modules below know paths inside it only. */
static int in_store(const struct store *st, int rc, struct err *e)
{
	if (rc < 0 && e)
		err_set(e, -rc, "store %s: %s", st->path, e->text);
	return rc;
}

int store_check_name(struct err *e, const char *verb, const char *what, const char *name)
{
	if (name_valid(name))
		return 0;
	return store_refuse(
	    e, ERR_USAGE, verb, name,
	    "not a valid %s name; use 1 to %d letters, digits, '.', '_' and '-', the first a letter or digit", what,
	    NAME_MAX_LEN);
}

bool store_name_valid(const char *name)
{
	return name_valid(name);
}

int store_check_size(uint64_t size, struct err *e)
{
	if (size == 0)
		return err_set(e, ERR_USAGE, "a volume's size can't be 0; give at least %u bytes", SECTOR_SIZE);
	if (size % SECTOR_SIZE != 0)
		return err_set(e, ERR_USAGE, "a volume's size must be a multiple of %u bytes; the next one is %llu",
			       SECTOR_SIZE, (unsigned long long)round_up_u64(size, SECTOR_SIZE));
	if (size > VOLUME_SIZE_MAX)
		return err_set(e, ERR_USAGE, "a volume's size can be 64T at most");
	return 0;
}

/* ---- lists of names ---- */

struct names {
	char (*list)[NAME_SIZE];
	size_t n, room;
};

static void names_free(struct names *l)
{
	free(l->list);
}

static int names_add(struct names *l, const char *name, size_t len)
{
	if (l->n == l->room) {
		size_t room = l->room ? l->room * 2 : 64;
		void *more = realloc(l->list, room * NAME_SIZE);

		if (!more)
			return -ERR_NOMEM;
		l->list = more;
		l->room = room;
	}
	PRE(len < NAME_SIZE);
	memcpy(l->list[l->n], name, len);
	l->list[l->n][len] = '\0';
	l->n++;
	return 0;
}

static int names_compare(const void *a, const void *b)
{
	return strcmp(a, b);
}

static void names_sort(struct names *l)
{
	size_t kept = 0;

	if (l->n > 0)
		qsort(l->list, l->n, NAME_SIZE, names_compare);
	for (size_t i = 0; i < l->n; i++) {
		if (kept > 0 && strcmp(l->list[kept - 1], l->list[i]) == 0)
			continue;
		if (kept != i)
			memcpy(l->list[kept], l->list[i], NAME_SIZE);
		kept++;
	}
	l->n = kept;
}

static bool names_have(const struct names *l, const char *name)
{
	char key[NAME_SIZE];

	snprintf(key, sizeof(key), "%s", name);
	return l->n > 0 && bsearch(key, l->list, l->n, NAME_SIZE, names_compare) != NULL;
}

static int collect_valid(void *arg, const char *name)
{
	return name_valid(name) ? names_add(arg, name, strlen(name)) : 0;
}

/* groups/G.a and groups/G.b stand for G. */
static int collect_group(void *arg, const char *name)
{
	size_t n = strlen(name);
	char group[NAME_SIZE];

	if (n < 3 || n - 2 > NAME_MAX_LEN || name[n - 2] != '.' || (name[n - 1] != 'a' && name[n - 1] != 'b'))
		return 0;
	memcpy(group, name, n - 2);
	group[n - 2] = '\0';
	return name_valid(group) ? names_add(arg, group, n - 2) : 0;
}

static int list_groups(struct store *st, struct names *l)
{
	int rc = storage_list(st->storage, "groups", collect_group, l);

	names_sort(l);
	return rc;
}

/* ---- the groups' records ---- */

static bool durable(const struct store *st)
{
	return st->info.durability == DURABILITY_POWER;
}

/* The lock of the group's record. */
static struct mutex *record_lock(struct store *st, const char *group)
{
	return &st->records[crc32c(0, group, strlen(group)) % STORE_RECORD_LOCKS];
}

static void group_path(char out[static STORE_SUBPATH_SIZE], const char *group)
{
	snprintf(out, STORE_SUBPATH_SIZE, "groups/%s", group);
}

int store_list_groups(struct store *st, int (*fn)(void *arg, const char *group), void *arg)
{
	struct names l = {0};
	int rc = list_groups(st, &l);

	for (size_t i = 0; rc == 0 && i < l.n; i++)
		rc = fn(arg, l.list[i]);
	names_free(&l);
	return rc;
}

static int decode_group(struct store *st, const char *group, const void *payload, size_t len, uint32_t version,
			struct repl_meta *m, struct err *e)
{
	struct err why = {0};
	int rc = repl_meta_decode(m, payload, len, version, &why);

	if (rc < 0)
		return err_set(
		    e, -rc,
		    "store %s: groups/%s.a and .b check out, but what they hold does not (%s); put them back from "
		    "a backup, or use the program that wrote them",
		    st->path, group, why.text);
	if (strcmp(m->group, group) != 0)
		return err_set(e, ERR_CORRUPT,
			       "store %s: groups/%s.a and .b hold the record of group %s; put the right ones back",
			       st->path, group, m->group);
	return 0;
}

int store_load_group(struct store *st, const char *group, struct repl_meta **ret, struct err *e)
{
	_cleanup_free_ struct repl_meta *m = NULL;
	_cleanup_free_ void *payload = NULL;
	char path[STORE_SUBPATH_SIZE];
	uint32_t version;
	size_t len;
	int rc = store_check_name(e, "load", "group", group);

	if (rc < 0)
		return rc;
	group_path(path, group);
	struct mutex *lock = record_lock(st, group);
	mutex_lock(lock);
	rc = meta_load(st->storage, path, GROUP_KIND, REPL_META_VERSION, &version, &payload, &len, e);
	mutex_unlock(lock);
	if (rc == -ERR_NOENT)
		return err_set(e, ERR_NOENT, "%s: there is no such group in store %s; repctl list shows what there is",
			       group, st->path);
	if (rc < 0)
		return in_store(st, rc, e);
	m = malloc(sizeof(*m));
	if (!m)
		return err_set(e, ERR_NOMEM, "load group %s: out of memory", group);
	rc = decode_group(st, group, payload, len, version, m, e);
	if (rc == 0)
		*ret = TAKE_PTR(m);
	return rc;
}

/* A peer may make groups here: their number has a limit. */
static int check_room(struct store *st, const char *group, struct err *e)
{
	struct names l = {0};
	int rc = list_groups(st, &l);

	if (rc < 0)
		err_set(e, -rc, "store %s: listing groups: %s", st->path, err_short(rc));
	else if (!names_have(&l, group) && l.n >= STORE_GROUPS_MAX)
		rc = store_refuse(e, ERR_LIMIT, "make group", group,
				  "store %s holds %u groups, the limit; use another store", st->path, STORE_GROUPS_MAX);
	names_free(&l);
	return rc;
}

static int encode_and_save(struct store *st, const struct repl_meta *m, uint8_t *buf, struct err *e)
{
	char path[STORE_SUBPATH_SIZE];
	int n = repl_meta_encode(m, buf, REPL_META_ENCODED_MAX);

	if (n < 0)
		return err_set(e, -n, "save group %s: its record is above %u bytes; drop some of its checkpoints",
			       m->group, REPL_META_ENCODED_MAX);
	group_path(path, m->group);
	struct mutex *lock = record_lock(st, m->group);
	mutex_lock(lock);
	n = meta_save(st->storage, "groups", path, GROUP_KIND, REPL_META_VERSION, buf, (size_t)n, durable(st), e);
	mutex_unlock(lock);
	return in_store(st, n, e);
}

int store_save_group(struct store *st, const struct repl_meta *m, struct err *e)
{
	uint8_t *buf;
	int rc;

	PRE(name_valid(m->group));
	rc = check_room(st, m->group, e);
	if (rc < 0)
		return rc;
	buf = malloc(REPL_META_ENCODED_MAX);
	if (!buf)
		return err_set(e, ERR_NOMEM, "save group %s: out of memory", m->group);
	rc = encode_and_save(st, m, buf, e);
	free(buf);
	return rc;
}

int store_delete_group(struct store *st, const char *group, struct err *e)
{
	struct names l = {0};
	char path[STORE_SUBPATH_SIZE];
	bool there;
	int rc = store_check_name(e, "delete", "group", group);

	if (rc < 0)
		return rc;
	rc = list_groups(st, &l);
	there = names_have(&l, group);
	names_free(&l);
	group_path(path, group);
	/* One that is not there, too: a save of it that failed may have left a name. */
	if (rc == 0) {
		struct mutex *lock = record_lock(st, group);

		mutex_lock(lock);
		rc = meta_delete(st->storage, "groups", path, GROUP_KIND, durable(st), NULL);
		mutex_unlock(lock);
	}
	if (rc == 0 && !there)
		rc = -ERR_NOENT;
	if (rc < 0)
		return err_set(e, -rc, "delete group %s in store %s: %s", group, st->path, err_short(rc));
	return 0;
}

int store_sync_groups(struct store *st)
{
	return durable(st) ? storage_sync_dir(st->storage, "groups") : 0;
}

/* ---- what a crash left ---- */

static void pending_path(char out[static STORE_SUBPATH_SIZE], const char *volume)
{
	snprintf(out, STORE_SUBPATH_SIZE, "pending/%s", volume);
}

int store_pending_add(struct store *st, const char *volume)
{
	char path[STORE_SUBPATH_SIZE];
	struct disk *d = NULL;
	int rc = storage_mkdir(st->storage, "pending");

	pending_path(path, volume);
	if (rc == 0)
		rc = storage_open(st->storage, path, STORAGE_CREATE, &d);
	if (rc < 0)
		return rc;
	disk_close(d);
	if (!durable(st))
		return 0;
	rc = storage_sync_dir(st->storage, "pending");
	return rc < 0 ? rc : storage_sync_dir(st->storage, "");
}

void store_pending_remove(struct store *st, const char *volume)
{
	char path[STORE_SUBPATH_SIZE];

	/* One that stays, or that a power cut brings back, is settled by the next store_open; but until then a record
	 * that is lost costs the disk. */
	pending_path(path, volume);
	if (storage_unlink(st->storage, path) == 0 && durable(st))
		(void)storage_sync_dir(st->storage, "pending");
}

int store_remove_folder(struct store *st, const char *volume, struct err *e)
{
	int rc = volume_delete(st->storage, volume, e);

	if (rc == 0 && durable(st) && (rc = storage_sync_dir(st->storage, "volumes")) < 0)
		rc = err_set(e, -rc, "delete volume %s: syncing volumes/: %s", volume, err_short(rc));
	return rc;
}

static int is_any(void *arg, const char *name)
{
	(void)arg;
	(void)name;
	return 1;
}

/* Whether the folder is there (and, with any, whether it has an entry). Negative: can't be told. */
static int has_folder(struct storage *s, const char *path, bool any)
{
	int rc = storage_list(s, path, is_any, NULL);

	if (rc == -ERR_NOENT)
		return 0;
	return rc < 0 ? rc : any ? rc : 1;
}

static int is_not_plain(void *arg, const char *name)
{
	static const char *const plain[] = {"disk.raw", "intent", "intent.tmp"};

	(void)arg;
	for (size_t i = 0; i < ARRAY_LEN(plain); i++) {
		if (strcmp(name, plain[i]) == 0)
			return 0;
	}
	return 1;
}

/* Whether the folder may hold anything that was ever written to the volume; in doubt, yes. */
static bool folder_has_data(struct store *st, const char *volume)
{
	char path[STORE_SUBPATH_SIZE];
	struct extent x = {0};
	struct disk *d;
	uint64_t size;
	int rc;

	snprintf(path, sizeof(path), "volumes/%s", volume);
	if (storage_list(st->storage, path, is_not_plain, NULL) != 0)
		return true;
	snprintf(path, sizeof(path), "volumes/%s/disk.raw", volume);
	rc = storage_open(st->storage, path, STORAGE_RDONLY, &d);
	if (rc < 0)
		return rc != -ERR_NOENT;
	rc = disk_get_size(d, &size);
	if (rc == 0 && size > 0)
		rc = disk_extent(d, 0, size, &x);
	disk_close(d);
	return rc < 0 || x.data || x.len < size;
}

static bool is_pending(struct store *st, const char *volume)
{
	char path[STORE_SUBPATH_SIZE];
	struct disk *d;

	pending_path(path, volume);
	if (storage_open(st->storage, path, STORAGE_RDONLY, &d) < 0)
		return false;
	disk_close(d);
	return true;
}

int store_settle_folder(struct store *st, const char *volume)
{
	char path[STORE_SUBPATH_SIZE];
	int rc;

	snprintf(path, sizeof(path), "volumes/%s", volume);
	rc = has_folder(st->storage, path, false);
	if (rc <= 0)
		return rc;
	for (const struct store_making *m = st->making; m; m = m->next)
		if (strcmp(m->volume, volume) == 0)
			return 1;
	if (!is_pending(st, volume) && folder_has_data(st, volume))
		return 1;
	/* That none names it is durable first: see settle_leftovers. */
	rc = store_sync_groups(st);
	if (rc == 0)
		rc = store_remove_folder(st, volume, NULL);
	if (rc == 0)
		store_pending_remove(st, volume);
	return rc;
}

/* `power`: orphans/ itself is durable before it holds a disk, and what it holds before volumes/ may be synced for
 * something else. */
static void move_to_orphans(struct store *st, const char *volume)
{
	char from[STORE_SUBPATH_SIZE], to[STORE_SUBPATH_SIZE];

	if (storage_mkdir(st->storage, "orphans") < 0 || (durable(st) && storage_sync_dir(st->storage, "") < 0))
		return;
	snprintf(from, sizeof(from), "volumes/%s", volume);
	snprintf(to, sizeof(to), "orphans/%s", volume);
	for (int i = 1; i < ORPHAN_TRIES && has_folder(st->storage, to, false) != 0; i++)
		snprintf(to, sizeof(to), "orphans/%s.%d", volume, i);
	if (storage_rename(st->storage, from, to) == 0 && durable(st))
		(void)storage_sync_dir(st->storage, "orphans");
}

/* The names of all volumes; a record that can't be read: its error. */
static int collect_volumes(struct store *st, struct names *l)
{
	struct names groups = {0};
	int rc = list_groups(st, &groups);

	for (size_t i = 0; rc == 0 && i < groups.n; i++) {
		_cleanup_free_ struct repl_meta *m = NULL;

		rc = store_load_group(st, groups.list[i], &m, NULL);
		for (uint32_t v = 0; rc == 0 && m && v < m->n_volumes; v++)
			rc = names_add(l, m->volumes[v].name, strlen(m->volumes[v].name));
	}
	names_free(&groups);
	names_sort(l);
	return rc;
}

/* Failing is no error: what could not be settled is looked at again by the next store_open.
 *
 * What is found lies in the cache, perhaps: a process was killed, and a power cut may come now. So in `power` nothing
 * is settled by it before it is durable: that no record names a folder, before that goes (the record would come back
 * without it, and the store could not be used); that a folder is gone, before its mark is (it would come back as one
 * with data that nobody deleted). */
static void settle_leftovers(struct store *st)
{
	struct names volumes = {0}, folders = {0}, pending = {0};
	int rc = collect_volumes(st, &volumes);

	if (rc == 0)
		rc = storage_list(st->storage, "volumes", collect_valid, &folders);
	if (rc == 0) {
		rc = storage_list(st->storage, "pending", collect_valid, &pending);
		rc = rc == -ERR_NOENT ? 0 : rc;
	}
	names_sort(&pending);
	if (rc == 0)
		rc = store_sync_groups(st);
	for (size_t i = 0; rc == 0 && i < folders.n; i++) {
		const char *name = folders.list[i];

		if (names_have(&volumes, name))
			continue;
		if (names_have(&pending, name) || !folder_has_data(st, name))
			rc = volume_delete(st->storage, name, NULL);
		else
			move_to_orphans(st, name);
	}
	if (rc == 0 && pending.n && durable(st))
		rc = storage_sync_dir(st->storage, "volumes");
	for (size_t i = 0; rc == 0 && i < pending.n; i++)
		store_pending_remove(st, pending.list[i]);
	names_free(&volumes);
	names_free(&folders);
	names_free(&pending);
}

/* ---- opening ---- */

struct survey {
	bool record;
	char foreign[256]; /* an entry that no store has, "" if none */
};

static int survey_entry(void *arg, const char *name)
{
	static const char *const known[] = {"lock",    "store.tmp", "control.sock", "groups",
					    "volumes", "pending",   "orphans",	    "lost+found"};
	struct survey *v = arg;

	if (strcmp(name, "store.a") == 0 || strcmp(name, "store.b") == 0) {
		v->record = true;
		return 0;
	}
	for (size_t i = 0; i < ARRAY_LEN(known); i++) {
		if (strcmp(name, known[i]) == 0)
			return 0;
	}
	snprintf(v->foreign, sizeof(v->foreign), "%s", name);
	return 0;
}

/* 1: a store; 0: fit to become one. */
static int look_at_folder(struct store *st, unsigned flags, struct err *e)
{
	static const char *const kept[] = {"groups", "volumes", "orphans"};
	struct survey v = {0};
	int rc = storage_list(st->storage, "", survey_entry, &v);

	if (rc < 0)
		return store_refuse(e, -rc, "open store", st->path, "reading the folder: %s", err_short(rc));
	if (v.record)
		return 1;
	for (size_t i = 0; i < ARRAY_LEN(kept); i++) {
		rc = has_folder(st->storage, kept[i], true);
		if (rc != 0)
			return store_refuse(
			    e, ERR_CORRUPT, "open store", st->path,
			    "store.a and store.b are missing, but %s/ is not empty; put one of them back from a "
			    "backup",
			    kept[i]);
	}
	if (!(flags & STORE_CREATE))
		return store_refuse(e, ERR_NOENT, "open store", st->path,
				    "there is no store in this folder; start repfs on it, which makes one");
	if (v.foreign[0])
		return store_refuse(e, ERR_EXIST, "make store", st->path,
				    "the folder is not a store and not empty (it has %s); give a new or an empty one",
				    v.foreign);
	return 0;
}

static int take_lock(struct store *st, struct err *e)
{
	_cleanup_free_ char *path = NULL;
	char pid[32] = {0};
	ssize_t n;

	if (asprintf(&path, "%s/lock", st->path) < 0) {
		path = NULL;
		return store_refuse(e, ERR_NOMEM, "open store", st->path, "out of memory");
	}
	st->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
	if (st->lock_fd < 0)
		return store_refuse(e, -err_from_errno(errno), "open store", st->path, "%s: %s", path, strerror(errno));
	if (flock(st->lock_fd, LOCK_EX | LOCK_NB) < 0) {
		if (errno != EWOULDBLOCK)
			return store_refuse(e, -err_from_errno(errno), "open store", st->path, "locking %s: %s", path,
					    strerror(errno));
		n = pread(st->lock_fd, pid, sizeof(pid) - 1, 0);
		pid[n > 0 ? strspn(pid, "0123456789") : 0] = '\0';
		return store_refuse(e, ERR_BUSY, "open store", st->path,
				    "in use by process %s; use it through that daemon's socket, or stop it first",
				    pid[0] ? pid : "(unknown)");
	}
	snprintf(pid, sizeof(pid), "%ld\n", (long)getpid());
	/* The pid is for messages: a full disk must not keep the store from being opened. */
	if (ftruncate(st->lock_fd, 0) == 0)
		(void)io_pwrite(st->lock_fd, pid, strlen(pid), 0);
	return 0;
}

static int save_record(struct store *st, const struct store_info *info, struct err *e)
{
	uint8_t record[STORE_RECORD_SIZE];

	memcpy(record, info->uuid, 16);
	put_u32(record + 16, (uint32_t)info->durability);
	return in_store(
	    st, meta_save(st->storage, "", "store", STORE_KIND, STORE_VERSION, record, sizeof(record), true, e), e);
}

static int make_store(struct store *st, int durability, struct err *e)
{
	static const char *const folders[] = {"groups", "volumes"};
	struct store_info info = {.durability = durability < 0 ? DURABILITY_POWER : (enum volume_durability)durability};
	int rc = 0;

	for (size_t i = 0; rc == 0 && i < ARRAY_LEN(folders); i++)
		rc = storage_mkdir(st->storage, folders[i]);
	if (rc == 0)
		rc = storage_sync_dir(st->storage, "");
	if (rc < 0)
		return store_refuse(e, -rc, "make store", st->path, "making its folders: %s", err_short(rc));
	random_bytes(info.uuid, sizeof(info.uuid));
	return save_record(st, &info, e);
}

static int load_record(struct store *st, struct err *e)
{
	_cleanup_free_ uint8_t *record = NULL;
	void *payload;
	uint32_t version;
	size_t len;
	int rc = meta_load(st->storage, "store", STORE_KIND, STORE_VERSION, &version, &payload, &len, e);

	if (rc < 0)
		return in_store(st, rc, e);
	record = payload;
	if (version != STORE_VERSION || len != STORE_RECORD_SIZE || get_u32(record + 16) > DURABILITY_POWER)
		return store_refuse(
		    e, ERR_CORRUPT, "open store", st->path,
		    "store.a and store.b check out, but hold no store record; put them back from a backup");
	memcpy(st->info.uuid, record, 16);
	st->info.durability = (enum volume_durability)get_u32(record + 16);
	return 0;
}

/* Volumes' contents are nobody else's to read (SPEC 13). */
static int make_private(struct store *st, struct err *e)
{
	struct stat sb;

	if (stat(st->path, &sb) == 0 && ((sb.st_mode & 077) == 0 || chmod(st->path, 0700) == 0))
		return 0;
	return store_refuse(e, -err_from_errno(errno), "open store", st->path,
			    "its mode can't be made 0700: %s; chown it to the user that runs repfs", strerror(errno));
}

static int open_folder(struct store *st, unsigned flags, struct err *e)
{
	struct stat sb;
	int rc;

	if ((flags & STORE_CREATE) && mkdir(st->path, 0700) < 0 && errno != EEXIST)
		return store_refuse(e, -err_from_errno(errno), "make store", st->path, "%s", strerror(errno));
	if (stat(st->path, &sb) < 0)
		return store_refuse(e, -err_from_errno(errno), "open store", st->path,
				    "%s; give the folder of a store%s", strerror(errno),
				    errno == ENOENT ? ", or start repfs on it, which makes one" : "");
	if (!S_ISDIR(sb.st_mode))
		return store_refuse(e, ERR_USAGE, "open store", st->path, "not a folder; give the folder of a store");
	rc = storage_posix_open(st->path, &st->storage);
	if (rc < 0)
		return store_refuse(e, -rc, "open store", st->path, "%s", err_short(rc));
	return 0;
}

/* Before a folder becomes a store its name is durable, whoever made it: a process that was killed behind that, too. One
 * whose parent is not for this user to open was made by somebody else. */
static int sync_parent(struct store *st, struct err *e)
{
	struct stat mine, its;
	char parent[4096];
	int rc;

	io_dirname(st->path, parent, sizeof(parent));
	/* A filesystem's root has no name there. */
	if (stat(st->path, &mine) == 0 && stat(parent, &its) == 0 && mine.st_dev != its.st_dev)
		return 0;
	rc = io_fsync_dir(parent);
	if (rc < 0 && rc != -ERR_PERM)
		return store_refuse(e, -rc, "make store", st->path, "syncing %s: %s", parent, err_short(rc));
	return 0;
}

/* What is done on the storage alone, the lock being held. */
static int open_contents(struct store *st, unsigned flags, int durability, struct err *e)
{
	int rc = look_at_folder(st, flags, e);

	if (rc < 0 || (rc == 0 && (rc = make_store(st, durability, e)) < 0))
		return rc;
	rc = load_record(st, e);
	if (rc == 0)
		settle_leftovers(st);
	return rc;
}

static int open_store(struct store *st, unsigned flags, int durability, struct err *e)
{
	int rc;

	if ((rc = open_folder(st, flags, e)) < 0 || (rc = look_at_folder(st, flags, e)) < 0 ||
	    (rc == 0 && (rc = sync_parent(st, e)) < 0) || (rc = take_lock(st, e)) < 0 || (rc = make_private(st, e)) < 0)
		return rc;
	return open_contents(st, flags, durability, e);
}

static int store_new(const char *path, struct store **ret, struct err *e)
{
	struct store *st = calloc(1, sizeof(*st));

	if (!st)
		return store_refuse(e, ERR_NOMEM, "open store", path, "out of memory");
	st->lock_fd = -1;
	mutex_init(&st->names);
	for (size_t i = 0; i < STORE_RECORD_LOCKS; i++)
		mutex_init(&st->records[i]);
	st->path = strdup(path);
	if (!st->path) {
		store_close(st);
		return store_refuse(e, ERR_NOMEM, "open store", path, "out of memory");
	}
	*ret = st;
	return 0;
}

int store_open_on(struct storage *s, const char *name, int durability, struct store **ret, struct err *e)
{
	struct store *st;
	int rc = store_new(name, &st, e);

	if (rc < 0)
		return rc;
	st->storage = s;
	rc = open_contents(st, STORE_CREATE, durability, e);
	if (rc < 0) {
		store_close(st);
		return rc;
	}
	*ret = st;
	return 0;
}

int store_open(const char *path, unsigned flags, int durability, struct store **ret, struct err *e)
{
	struct store *st;
	int rc;

	PRE(durability >= -1 && durability <= DURABILITY_POWER);
	rc = store_new(path, &st, e);
	if (rc < 0)
		return rc;
	rc = open_store(st, flags, durability, e);
	if (rc < 0) {
		store_close(st);
		return rc;
	}
	*ret = st;
	return 0;
}

void store_close(struct store *st)
{
	if (!st)
		return;
	storage_close(st->storage);
	if (st->lock_fd >= 0)
		(void)close(st->lock_fd);
	mutex_destroy(&st->names);
	for (size_t i = 0; i < STORE_RECORD_LOCKS; i++)
		mutex_destroy(&st->records[i]);
	free(st->path);
	free(st);
}

const struct store_info *store_info(const struct store *st)
{
	return &st->info;
}

struct storage *store_storage(struct store *st)
{
	return st->storage;
}

const char *store_path(const struct store *st)
{
	return st->path;
}

/* ---- durability ---- */

struct sync_walk {
	struct store *st;
	const char *dir;
};

/* Content is the guest's, and what of it is lost the next open finds so (STORAGE_FRESH). */
static bool is_content(const char *name)
{
	const char *suffix = strrchr(name, '.');

	return strcmp(name, "disk.raw") == 0 || (suffix && strcmp(suffix, ".data") == 0);
}

/* Writes over a file what it holds. */
static int rewrite(struct disk *d)
{
	uint64_t off = 0, size = 0;
	uint8_t *buf = malloc(REWRITE_CHUNK);
	int rc = buf ? disk_get_size(d, &size) : -ERR_NOMEM;

	while (rc == 0 && off < size) {
		struct extent x;

		rc = disk_extent(d, off, size, &x);
		if (rc == 0 && x.data) {
			x.len = min_u64(x.len, REWRITE_CHUNK);
			rc = disk_read(d, off, buf, (size_t)x.len);
			rc = rc < 0 ? rc : disk_write(d, off, buf, (size_t)x.len);
		}
		off += x.len;
	}
	free(buf);
	return rc;
}

static int sync_entry(void *arg, const char *name)
{
	const struct sync_walk *w = arg;
	char path[STORAGE_PATH_MAX + 1];
	struct disk *d;
	int rc, n = snprintf(path, sizeof(path), "%s/%s", w->dir, name);

	if (n < 0 || n > STORAGE_PATH_MAX)
		return 0; /* too long to be one of ours */
	rc = storage_open(w->st->storage, path, 0, &d);
	if (rc == -ERR_NOTSUP)
		return 0;
	if (rc < 0)
		return rc;
	rc = is_content(name) ? 0 : rewrite(d);
	if (rc == 0)
		rc = disk_sync(d);
	disk_close(d);
	return rc;
}

static int sync_folder(struct store *st, const char *dir)
{
	struct sync_walk w = {st, dir};
	int rc = storage_list(st->storage, dir, sync_entry, &w);

	return rc < 0 ? rc : storage_sync_dir(st->storage, dir);
}

/* What was written while durability was `process` has never been synced. What the system failed to write out meanwhile,
 * or in an earlier try of this, looks written and no sync tells: what is ours, all but the content, is written again.
 */
static int sync_all(struct store *st)
{
	struct names folders = {0};
	char path[STORE_SUBPATH_SIZE];
	int rc = storage_list(st->storage, "volumes", collect_valid, &folders);

	for (size_t i = 0; rc == 0 && i < folders.n; i++) {
		snprintf(path, sizeof(path), "volumes/%s", folders.list[i]);
		rc = sync_folder(st, path);
	}
	names_free(&folders);
	if (rc == 0)
		rc = storage_sync_dir(st->storage, "volumes");
	if (rc == 0)
		rc = sync_folder(st, "groups");
	return rc < 0 ? rc : storage_sync_dir(st->storage, "");
}

int store_set_durability(struct store *st, enum volume_durability dur, struct err *e)
{
	struct store_info info = st->info;
	int rc;

	if (dur == info.durability)
		return 0;
	if (dur == DURABILITY_POWER && (rc = sync_all(st)) < 0)
		return store_refuse(e, -rc, "set durability of store", st->path,
				    "syncing what is there: %s; look at the disk under it", err_short(rc));
	info.durability = dur;
	rc = save_record(st, &info, e);
	if (rc == 0)
		st->info = info;
	return rc;
}
