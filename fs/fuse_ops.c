/* The FUSE operations; see fs/fuse_ops.h.
 *
 * Nothing is remembered between requests but open files: inode numbers say what they stand for (fs/inode.h), names and
 * attributes are asked of the daemon each time, and the kernel is told to keep neither (timeouts of 0), except for the
 * fixed folders. So there is nothing to invalidate when volumes and checkpoints come and go.
 *
 * A volume's data. Reads run in the worker's thread into a buffer of its own. Everything that changes goes through
 * gvol_submit and is answered from its completion, so that a write that waits (for the peer, for its range, for a full
 * queue) holds no worker. The object of a request (struct op) comes from a cache.
 *
 * Coherence. A file opened with O_DIRECT is served past the kernel's page cache, any other through it, and both may be
 * open at once. A direct write is therefore, while a cached open exists: written, then the pages of its range dropped
 * (by the mount's notification thread), then answered. The order matters: a reader that fetched the old bytes into a
 * page while the write was under way has its page dropped before the writer is told. A cached open that begins after
 * the look at gvol_cached_opens finds an empty cache, for the kernel drops it at open, and reads what was written.
 *
 * A volume behaves as a block device in a fixed folder does: its size does not follow writes, O_TRUNC changes nothing,
 * it can't be removed, renamed or chmod'ed. Times can be set, and are forgotten. A clone is the same, but that unlink
 * removes it.
 */
#define FUSE_USE_VERSION 312
#include "fs/fuse_ops.h"

#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "core/check.h"
#include "core/os/cleanup.h"
#include "core/os/clock.h"
#include "core/os/log.h"
#include "core/os/thread.h"
#include "fs/daemon.h"
#include "fs/inode.h"
#include "fs/mount.h"

#define TIMEOUT_FIXED_S 3600.0 /* the fixed folders never change */
#define TIMEOUT_NONE_S 0.0
#define OPS_CACHED_MAX 512   /* request objects kept for the next ones */
#define NAMES_MAX (1U << 20) /* entries of one folder */
#define STATUS_SUFFIX ".json"
#define LATEST "latest"
#define REFUSAL_INTERVAL_NS NS_PER_SEC /* between two log lines about refused requests */

struct fuse_ops {
	struct fuse_ops_config cfg;
	struct daemon *daemon;
	struct mount *mount;
	struct timespec started;
	pthread_key_t read_buffer; /* MOUNT_REQUEST_MAX bytes a thread */
	struct mutex lock;	   /* guards what follows but refusal_ns */
	struct op *free_ops;
	unsigned n_free_ops;
	unsigned n_under_way; /* request objects in use, until they are answered */
	struct cond idle;     /* none is */
	struct file *files;   /* all open ones */
	_Atomic uint64_t refusal_ns;
};

/* An open file or folder; fi->fh. */
struct file {
	enum inode_kind kind;
	struct gvol *v;
	struct gvol_handle *h; /* INODE_VOLUME, INODE_CLONE */
	uint64_t ckpt, ckpt_size;
	bool direct;
	char *text; /* INODE_STATUS_FILE: the snapshot */
	size_t text_len;
	struct dir *dir;	   /* a folder */
	struct file *next, **link; /* fuse_ops.files */
};

/* One request that changes a volume, from its submission to its answer. */
struct op {
	struct gio g;
	struct mount_job job;
	struct fuse_ops *f;
	fuse_req_t req;
	uint64_t ino;
	uint64_t off, len; /* WRITE: the range written; else what is left to do */
	bool drop_cache;   /* WRITE: other opens may have its pages */
	bool flush_after;  /* WRITE: O_DSYNC */
	int error;	   /* ZERO: of the piece that has ended */
	_Atomic int turn;  /* ZERO: of its end and its submitter's return, how many there were */
	struct op *next;
};

static struct fuse_ops *ops_of(fuse_req_t req)
{
	return fuse_req_userdata(req);
}

static struct file *file_of(const struct fuse_file_info *fi)
{
	return (struct file *)(uintptr_t)fi->fh; // NOLINT(performance-no-int-to-ptr)
}

/* ---- errors --------------------------------------------------------------------------------------------------------
 */

/* Of reads and writes of a volume: what a program does with anything but these two is what it does with EIO. */
static int errno_io(int code)
{
	int sys = err_errno(code);
	return sys == ENOSPC || sys == ENOMEM ? sys : EIO;
}

static int errno_open(int code)
{
	return code == -ERR_STATE ? EIO : err_errno(code);
}

/* A person may wonder why; at most one line a second. */
static bool refusal_logged(struct fuse_ops *f)
{
	uint64_t now = clock_mono_ns(), last = atomic_load(&f->refusal_ns);
	return (last == 0 || now - last >= REFUSAL_INTERVAL_NS) &&
	       atomic_compare_exchange_strong(&f->refusal_ns, &last, now);
}

/* ---- attributes ----------------------------------------------------------------------------------------------------
 */

static enum gvol_file gvol_file_of(enum inode_kind kind)
{
	switch (kind) {
	case INODE_VOLUME:
		return GVOL_VOLUME;
	case INODE_ACTIVE:
		return GVOL_ACTIVE;
	case INODE_HIDDEN:
		return GVOL_HIDDEN;
	case INODE_CKPT:
		return GVOL_CKPT;
	case INODE_CLONE:
		return GVOL_CLONE;
	default:
		UNREACHABLE();
	}
}

/* A file that is written to: a volume, a clone. */
static bool is_disk(enum inode_kind kind)
{
	return kind == INODE_VOLUME || kind == INODE_CLONE;
}

static mode_t mode_of(const struct fuse_ops *f, enum inode_kind kind)
{
	if (kind == INODE_LATEST)
		return S_IFLNK | 0777;
	if (inode_is_dir(kind))
		return S_IFDIR | (f->cfg.umask_given ? 0777 & ~f->cfg.umask : 0755);
	mode_t most = is_disk(kind) ? 0666 : 0444;
	return S_IFREG | (most & (f->cfg.umask_given ? ~f->cfg.umask : (mode_t)0600));
}

static struct timespec timespec_of(uint64_t ns)
{
	return (struct timespec){.tv_sec = (time_t)(ns / NS_PER_SEC), .tv_nsec = (long)(ns % NS_PER_SEC)};
}

static char *status_text(struct fuse_ops *f, uint32_t group, size_t *ret_len)
{
	char name[NAME_SIZE];
	if (!daemon_group_name(f->daemon, group, name))
		return NULL;
	json_t *status = daemon_status(f->daemon, name);
	if (!status)
		return NULL;
	_cleanup_free_ char *dump = json_dumps(status, JSON_INDENT(2));
	json_decref(status);
	char *text = NULL;
	int n = dump ? asprintf(&text, "%s\n", dump) : -1;
	if (n < 0)
		return NULL;
	*ret_len = (size_t)n;
	return text;
}

/* Size, blocks and times of a file; 0 or an errno. */
static int attr_fill_file(struct fuse_ops *f, const struct inode_id *id, struct stat *st)
{
	struct gvol_attr a;
	struct gvol *v = gvol_by_id(f->daemon, id->id);
	if (!v)
		return ENOENT;
	int r = gvol_attr(v, gvol_file_of(id->kind), id->ckpt, &a);
	gvol_unref(v);
	if (r < 0)
		return err_errno(r);
	st->st_size = (off_t)a.size;
	st->st_blocks = (blkcnt_t)(a.allocated / 512);
	st->st_mtim = st->st_ctim = st->st_atim = timespec_of(a.mtime_ns);
	return 0;
}

/* The target's length, 0: there is no such link now. */
static int latest_format(struct fuse_ops *f, uint32_t gvol, char *buf, size_t size)
{
	uint64_t latest = 0;
	struct gvol *v = gvol_by_id(f->daemon, gvol);
	if (!v)
		return 0;
	(void)gvol_ckpts(v, NULL, 0, &latest);
	gvol_unref(v);
	return latest ? snprintf(buf, size, "%llu", (unsigned long long)latest) : 0;
}

static int attr_fill(struct fuse_ops *f, const struct inode_id *id, struct stat *st)
{
	char target[24];
	struct gvol *v;
	size_t len = 0;
	int r = 0;

	memset(st, 0, sizeof(*st));
	st->st_ino = inode_make(id->kind, id->id, id->ckpt);
	st->st_mode = mode_of(f, id->kind);
	st->st_nlink = inode_is_dir(id->kind) ? 2 : 1;
	st->st_uid = f->cfg.uid;
	st->st_gid = f->cfg.gid;
	st->st_blksize = 4096;
	st->st_mtim = st->st_ctim = st->st_atim = f->started;
	switch (id->kind) {
	case INODE_VOLUME:
	case INODE_ACTIVE:
	case INODE_HIDDEN:
	case INODE_CKPT:
	case INODE_CLONE:
		return attr_fill_file(f, id, st);
	case INODE_OVERLAY_DIR:
	case INODE_CKPT_DIR:
		v = gvol_by_id(f->daemon, id->id);
		gvol_unref(v);
		return v ? 0 : ENOENT;
	case INODE_LATEST:
		r = latest_format(f, id->id, target, sizeof(target));
		st->st_size = r;
		return r > 0 ? 0 : ENOENT;
	case INODE_STATUS_FILE:
		free(status_text(f, id->id, &len));
		st->st_size = (off_t)len;
		st->st_mtim = st->st_ctim = st->st_atim = timespec_of(clock_wall_ns());
		return len ? 0 : ENOENT;
	default:
		return 0;
	}
}

static double timeout_of(enum inode_kind kind)
{
	return kind <= INODE_STATUS ? TIMEOUT_FIXED_S : TIMEOUT_NONE_S;
}

static void op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct fuse_ops *f = ops_of(req);
	struct inode_id id;
	struct stat st;
	(void)fi;
	int r = inode_parse(ino, &id) ? attr_fill(f, &id, &st) : ENOENT;
	if (r)
		(void)fuse_reply_err(req, r);
	else
		(void)fuse_reply_attr(req, &st, timeout_of(id.kind));
}

/* ---- names ---------------------------------------------------------------------------------------------------------
 */

static const struct {
	const char *name;
	enum inode_kind kind;
} fixed_names[] = {
    {"volumes", INODE_VOLUMES}, {"overlays", INODE_OVERLAYS}, {"checkpoints", INODE_CHECKPOINTS},
    {"clones", INODE_CLONES},	{"status", INODE_STATUS},
};

static bool lookup_volume(struct fuse_ops *f, enum inode_kind kind, const char *name, struct inode_id *ret)
{
	struct gvol *v = gvol_find(f->daemon, name);
	if (!v)
		return false;
	*ret = (struct inode_id){.kind = kind, .id = gvol_id(v)};
	gvol_unref(v);
	return true;
}

static bool lookup_clone(struct fuse_ops *f, const char *name, struct inode_id *ret)
{
	struct gvol *v = gvol_find_clone(f->daemon, name);
	if (!v)
		return false;
	*ret = (struct inode_id){.kind = INODE_CLONE, .id = gvol_id(v)};
	gvol_unref(v);
	return true;
}

static bool lookup_status(struct fuse_ops *f, const char *name, struct inode_id *ret)
{
	char group[NAME_SIZE];
	size_t len = strlen(name), suffix = sizeof(STATUS_SUFFIX) - 1;
	if (len <= suffix || len - suffix >= sizeof(group) || strcmp(name + len - suffix, STATUS_SUFFIX) != 0)
		return false;
	memcpy(group, name, len - suffix);
	group[len - suffix] = '\0';
	*ret = (struct inode_id){.kind = INODE_STATUS_FILE};
	return daemon_has_group(f->daemon, group, &ret->id);
}

static bool lookup(struct fuse_ops *f, const struct inode_id *parent, const char *name, struct inode_id *ret)
{
	*ret = (struct inode_id){.id = parent->id};
	switch (parent->kind) {
	case INODE_ROOT:
		for (size_t i = 0; i < ARRAY_LEN(fixed_names); i++)
			if (strcmp(fixed_names[i].name, name) == 0) {
				ret->kind = fixed_names[i].kind;
				return true;
			}
		return false;
	case INODE_VOLUMES:
		return lookup_volume(f, INODE_VOLUME, name, ret);
	case INODE_OVERLAYS:
		return lookup_volume(f, INODE_OVERLAY_DIR, name, ret);
	case INODE_CHECKPOINTS:
		return lookup_volume(f, INODE_CKPT_DIR, name, ret);
	case INODE_CLONES:
		return lookup_clone(f, name, ret);
	case INODE_STATUS:
		return lookup_status(f, name, ret);
	case INODE_OVERLAY_DIR:
		ret->kind = strcmp(name, "active") == 0 ? INODE_ACTIVE : INODE_HIDDEN;
		return ret->kind == INODE_ACTIVE || strcmp(name, "hidden") == 0;
	case INODE_CKPT_DIR:
		ret->kind = strcmp(name, LATEST) == 0 ? INODE_LATEST : INODE_CKPT;
		return ret->kind == INODE_LATEST || inode_parse_ckpt(name, &ret->ckpt);
	default:
		return false;
	}
}

/* 0 or an errno. */
static int entry_fill(struct fuse_ops *f, const struct inode_id *id, struct fuse_entry_param *ret)
{
	*ret = (struct fuse_entry_param){.ino = inode_make(id->kind, id->id, id->ckpt)};
	if (ret->ino == 0)
		return EOVERFLOW;
	ret->attr_timeout = ret->entry_timeout = timeout_of(id->kind);
	return attr_fill(f, id, &ret->attr);
}

static void op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_ops *f = ops_of(req);
	struct inode_id dir, id;
	struct fuse_entry_param entry;
	int r = ENOENT;
	if (inode_parse(parent, &dir) && lookup(f, &dir, name, &id))
		r = entry_fill(f, &id, &entry);
	if (r)
		(void)fuse_reply_err(req, r);
	else
		(void)fuse_reply_entry(req, &entry);
}

static void op_readlink(fuse_req_t req, fuse_ino_t ino)
{
	struct inode_id id;
	char target[24];
	if (!inode_parse(ino, &id) || id.kind != INODE_LATEST)
		(void)fuse_reply_err(req, EINVAL);
	else if (latest_format(ops_of(req), id.id, target, sizeof(target)) <= 0)
		(void)fuse_reply_err(req, ENOENT);
	else
		(void)fuse_reply_readlink(req, target);
}

/* ---- folders -------------------------------------------------------------------------------------------------------
 */

struct name {
	char text[NAME_SIZE + sizeof(STATUS_SUFFIX)];
	struct inode_id id;
};

/* An open folder: the names as of the opening, or of the last rewind. */
struct dir {
	struct inode_id id;
	struct name *names;
	size_t n, room;
	bool failed; /* out of memory, or of NAMES_MAX */
	enum inode_kind child;
};

static void dir_add(struct dir *d, struct inode_id id, const char *text, const char *suffix)
{
	if (d->n == d->room) {
		size_t room = d->room ? d->room * 2 : 16;
		struct name *more = room <= NAMES_MAX ? reallocarray(d->names, room, sizeof(*more)) : NULL;
		if (!more) {
			d->failed = true;
			return;
		}
		d->names = more;
		d->room = room;
	}
	INVARIANT(d->names);
	struct name *n = &d->names[d->n++];
	n->id = id;
	(void)snprintf(n->text, sizeof(n->text), "%s%s", text, suffix);
}

static void dir_add_each(void *arg, const char *name, uint32_t id)
{
	struct dir *d = arg;
	dir_add(d, (struct inode_id){.kind = d->child, .id = id}, name,
		d->child == INODE_STATUS_FILE ? STATUS_SUFFIX : "");
}

static void dir_add_ckpts(struct fuse_ops *f, struct dir *d)
{
	static const uint32_t step = 64;
	struct gvol *v = gvol_by_id(f->daemon, d->id.id);
	uint64_t *numbers = NULL, latest = 0;
	uint32_t n = 0, room = step;
	if (!v)
		return;
	do {
		free(numbers);
		room = n > room ? n + step : room;
		numbers = calloc(room, sizeof(*numbers));
		if (!numbers) {
			d->failed = true;
			break;
		}
		n = gvol_ckpts(v, numbers, room, &latest);
	} while (n > room);
	for (uint32_t i = 0; numbers && i < n; i++) {
		char text[24];
		(void)snprintf(text, sizeof(text), "%llu", (unsigned long long)numbers[i]);
		dir_add(d, (struct inode_id){.kind = INODE_CKPT, .id = d->id.id, .ckpt = numbers[i]}, text, "");
	}
	if (numbers && latest)
		dir_add(d, (struct inode_id){.kind = INODE_LATEST, .id = d->id.id}, LATEST, "");
	free(numbers);
	gvol_unref(v);
}

static void dir_add_overlays(struct fuse_ops *f, struct dir *d)
{
	static const struct {
		enum inode_kind kind;
		const char *name;
	} overlays[] = {{INODE_ACTIVE, "active"}, {INODE_HIDDEN, "hidden"}};
	for (size_t i = 0; i < ARRAY_LEN(overlays); i++) {
		struct inode_id id = {.kind = overlays[i].kind, .id = d->id.id};
		struct stat st;
		if (attr_fill(f, &id, &st) == 0)
			dir_add(d, id, overlays[i].name, "");
	}
}

static int dir_fill(struct fuse_ops *f, struct dir *d)
{
	struct inode_id self = d->id, parent;
	d->n = 0;
	d->failed = false;
	if (!inode_parse(inode_parent(&self), &parent))
		parent = self;
	dir_add(d, self, ".", "");
	dir_add(d, parent, "..", "");
	switch (self.kind) {
	case INODE_ROOT:
		for (size_t i = 0; i < ARRAY_LEN(fixed_names); i++)
			dir_add(d, (struct inode_id){.kind = fixed_names[i].kind}, fixed_names[i].name, "");
		break;
	case INODE_VOLUMES:
	case INODE_OVERLAYS:
	case INODE_CHECKPOINTS:
		d->child = self.kind == INODE_VOLUMES	 ? INODE_VOLUME
			   : self.kind == INODE_OVERLAYS ? INODE_OVERLAY_DIR
							 : INODE_CKPT_DIR;
		daemon_each_volume(f->daemon, dir_add_each, d);
		break;
	case INODE_CLONES:
		d->child = INODE_CLONE;
		daemon_each_clone(f->daemon, dir_add_each, d);
		break;
	case INODE_STATUS:
		d->child = INODE_STATUS_FILE;
		daemon_each_group(f->daemon, dir_add_each, d);
		break;
	case INODE_OVERLAY_DIR:
		dir_add_overlays(f, d);
		break;
	case INODE_CKPT_DIR:
		dir_add_ckpts(f, d);
		break;
	default:
		break;
	}
	return d->failed ? ENOMEM : 0;
}

static void file_free(struct file *file)
{
	gvol_release(file->h);
	gvol_unref(file->v);
	free(file->text);
	if (file->dir)
		free(file->dir->names);
	free(file->dir);
	free(file);
}

static void file_link(struct fuse_ops *f, struct file *file)
{
	mutex_lock(&f->lock);
	file->next = f->files;
	file->link = &f->files;
	if (file->next)
		file->next->link = &file->next;
	f->files = file;
	mutex_unlock(&f->lock);
}

static void file_close(struct fuse_ops *f, struct file *file)
{
	mutex_lock(&f->lock);
	*file->link = file->next;
	if (file->next)
		file->next->link = file->link;
	mutex_unlock(&f->lock);
	file_free(file);
}

/* Answers OPEN. A direct file's writes run in parallel; libfuse before 3.15 has no name for that, so the answer is
 * written by hand there. */
static int reply_open(fuse_req_t req, struct fuse_file_info *fi, bool direct)
{
#ifdef HAVE_FUSE_PARALLEL_DIRECT_WRITES
	fi->direct_io = direct;
	fi->parallel_direct_writes = direct;
	return fuse_reply_open(req, fi);
#else
	struct fuse_open_out out = {.fh = fi->fh};
	if (direct)
		out.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
	return fuse_reply_buf(req, (const char *)&out, sizeof(out));
#endif
}

/* The file, or folder, is open from here on. */
static void file_reply(fuse_req_t req, struct fuse_file_info *fi, struct file *file)
{
	fi->fh = (uintptr_t)file;
	file_link(ops_of(req), file);
	/* -ENOENT: the opener was killed meanwhile, and no release will come. */
	if (reply_open(req, fi, file->direct) == -ENOENT)
		file_close(ops_of(req), file);
}

static void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct inode_id id;
	if (!inode_parse(ino, &id) || !inode_is_dir(id.kind)) {
		(void)fuse_reply_err(req, ENOTDIR);
		return;
	}
	struct file *file = calloc(1, sizeof(*file));
	if (file)
		file->dir = calloc(1, sizeof(*file->dir));
	if (!file || !file->dir) {
		free(file);
		(void)fuse_reply_err(req, ENOMEM);
		return;
	}
	file->kind = id.kind;
	file->dir->id = id;
	file_reply(req, fi, file);
}

/* One entry into buf; its length, also when that is more than size (then nothing was written). */
static size_t dir_entry(fuse_req_t req, const struct name *n, bool plus, char *buf, size_t size, off_t next)
{
	struct fuse_ops *f = ops_of(req);
	struct fuse_entry_param entry = {0};
	struct stat st = {.st_ino = inode_make(n->id.kind, n->id.id, n->id.ckpt), .st_mode = mode_of(f, n->id.kind)};

	if (!plus)
		return fuse_add_direntry(req, buf, size, n->text, &st, next);
	/* Without attributes (gone meanwhile, or a dot entry, which must not count as a lookup) only the name goes out.
	 */
	bool dots = n->text[0] == '.' && (n->text[1] == '\0' || strcmp(n->text, "..") == 0);
	if (dots || entry_fill(f, &n->id, &entry) != 0)
		entry = (struct fuse_entry_param){.attr = st};
	return fuse_add_direntry_plus(req, buf, size, n->text, &entry, next);
}

static void readdir_reply(fuse_req_t req, size_t size, off_t off, const struct fuse_file_info *fi, bool plus)
{
	struct dir *d = file_of(fi)->dir;
	int r = off == 0 || !d->names ? dir_fill(ops_of(req), d) : 0;
	char *buf = r ? NULL : malloc(size);
	if (!buf) {
		(void)fuse_reply_err(req, r ? r : ENOMEM);
		return;
	}
	size_t used = 0;
	for (size_t i = off < 0 ? d->n : (size_t)off; i < d->n; i++) {
		size_t n = dir_entry(req, &d->names[i], plus, buf + used, size - used, (off_t)(i + 1));
		if (n > size - used)
			break;
		used += n;
	}
	(void)fuse_reply_buf(req, buf, used);
	free(buf);
}

static void op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	(void)ino;
	readdir_reply(req, size, off, fi, false);
}

static void op_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	(void)ino;
	readdir_reply(req, size, off, fi, true);
}

/* ---- open files ----------------------------------------------------------------------------------------------------
 */

void fuse_ops_wait_answered(struct fuse_ops *f, unsigned ms)
{
	uint64_t deadline = clock_mono_ns() + ms * NS_PER_MS;
	bool in_time = true;
	mutex_lock(&f->lock);
	while (f->n_under_way && in_time)
		in_time = cond_wait_until(&f->idle, &f->lock, deadline);
	unsigned left = f->n_under_way;
	mutex_unlock(&f->lock);
	if (left)
		log_warn("", "%u requests that change volumes have no answer yet; they fail now", left);
}

void fuse_ops_close_files(struct fuse_ops *f)
{
	mutex_lock(&f->lock);
	bool quiet = f->n_under_way == 0;
	struct file *file = quiet ? f->files : NULL;
	if (quiet)
		f->files = NULL;
	mutex_unlock(&f->lock);
	while (file) {
		struct file *next = file->next;
		file_free(file);
		file = next;
	}
}

static int file_open_volume(struct file *file, int flags)
{
	bool o_direct = (flags & O_DIRECT) != 0, forced = false;
	int r = gvol_open(file->v, (flags & O_ACCMODE) != O_RDONLY, o_direct, &file->h, &forced);
	if (r < 0)
		return errno_open(r);
	file->direct = o_direct || forced;
	return 0;
}

/* Overlays change with every block that is saved and are never cached; a checkpoint never changes. */
static int file_open_readonly(struct file *file, int flags)
{
	struct gvol_attr a;
	if ((flags & O_ACCMODE) != O_RDONLY)
		return EACCES;
	int r = gvol_attr(file->v, gvol_file_of(file->kind), file->ckpt, &a);
	if (r < 0)
		return errno_open(r);
	file->ckpt_size = a.size;
	file->direct = file->kind != INODE_CKPT || (flags & O_DIRECT);
	return 0;
}

static int file_open(struct fuse_ops *f, const struct inode_id *id, int flags, struct file *file)
{
	file->kind = id->kind;
	file->ckpt = id->ckpt;
	switch (id->kind) {
	case INODE_VOLUME:
	case INODE_ACTIVE:
	case INODE_HIDDEN:
	case INODE_CKPT:
	case INODE_CLONE:
		file->v = gvol_by_id(f->daemon, id->id);
		if (!file->v)
			return ENOENT;
		return is_disk(id->kind) ? file_open_volume(file, flags) : file_open_readonly(file, flags);
	case INODE_STATUS_FILE:
		if ((flags & O_ACCMODE) != O_RDONLY)
			return EACCES;
		file->direct = true;
		file->text = status_text(f, id->id, &file->text_len);
		return file->text ? 0 : ENOENT;
	default:
		return inode_is_dir(id->kind) ? EISDIR : EINVAL;
	}
}

static void op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct inode_id id;
	if (!inode_parse(ino, &id)) {
		(void)fuse_reply_err(req, ENOENT);
		return;
	}
	struct fuse_ops *f = ops_of(req);
	struct file *file = calloc(1, sizeof(*file));
	int r = file ? file_open(f, &id, fi->flags, file) : ENOMEM;
	if (r) {
		if (file)
			file_free(file);
		(void)fuse_reply_err(req, r);
		return;
	}
	file_reply(req, fi, file);
}

static void op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	file_close(ops_of(req), file_of(fi));
	(void)fuse_reply_err(req, 0);
}

/* close(2) promises nothing about stable storage. */
static void op_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	(void)fuse_reply_err(req, 0);
}

/* ---- reading -------------------------------------------------------------------------------------------------------
 */

static uint64_t file_size(const struct file *file)
{
	return file->kind == INODE_CKPT ? file->ckpt_size : gvol_size(file->v);
}

static void *read_buffer(struct fuse_ops *f)
{
	void *buf = pthread_getspecific(f->read_buffer);
	if (buf)
		return buf;
	if (posix_memalign(&buf, 4096, MOUNT_REQUEST_MAX) != 0)
		return NULL;
	if (pthread_setspecific(f->read_buffer, buf) != 0) {
		free(buf);
		return NULL;
	}
	return buf;
}

static void op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct fuse_ops *f = ops_of(req);
	const struct file *file = file_of(fi);
	uint64_t at = (uint64_t)off;
	(void)ino;

	uint64_t end = file->text ? file->text_len : file_size(file);
	uint64_t len = off < 0 || at >= end ? 0 : min_u64(min_u64(size, MOUNT_REQUEST_MAX), end - at);
	if (len == 0) {
		(void)fuse_reply_buf(req, NULL, 0);
		return;
	}
	/* The answer comes from this thread's own buffer: who has it may close the file, which another thread then
	 * frees, before this one is back from giving it. */
	void *buf = read_buffer(f);
	int r = buf ? 0 : -ERR_NOMEM;
	if (buf && file->text)
		memcpy(buf, file->text + at, (size_t)len);
	else if (buf)
		r = gvol_read(file->v, file->h, gvol_file_of(file->kind), file->ckpt, at, len, buf);
	if (r < 0)
		(void)fuse_reply_err(req, errno_io(r));
	else
		(void)fuse_reply_buf(req, buf, (size_t)len);
}

/* The next data (hole) at or after off; the end counts as a hole. 0 or an errno. */
static int seek(const struct file *file, uint64_t off, bool want_data, uint64_t *ret)
{
	uint64_t end = file_size(file);
	if (off >= end)
		return ENXIO;
	while (off < end) {
		struct extent x;
		int r = gvol_extent(file->v, gvol_file_of(file->kind), file->ckpt, off, &x);
		if (r < 0)
			return errno_io(r);
		if (x.data == want_data) {
			*ret = off;
			return 0;
		}
		if (x.off + x.len <= off)
			return EIO; /* no progress: never loop on it */
		off = x.off + x.len;
	}
	*ret = end;
	return want_data ? ENXIO : 0;
}

static void op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
	const struct file *file = file_of(fi);
	uint64_t found = 0;
	int r = EINVAL;
	(void)ino;
	if (off >= 0 && file->v && (whence == SEEK_DATA || whence == SEEK_HOLE))
		r = seek(file, (uint64_t)off, whence == SEEK_DATA, &found);
	if (r)
		(void)fuse_reply_err(req, r);
	else
		(void)fuse_reply_lseek(req, (off_t)found);
}

/* ---- changing ------------------------------------------------------------------------------------------------------
 */

static struct op *op_get(fuse_req_t req, fuse_ino_t ino)
{
	struct fuse_ops *f = ops_of(req);
	mutex_lock(&f->lock);
	struct op *op = f->free_ops;
	if (op) {
		f->free_ops = op->next;
		f->n_free_ops--;
	} else {
		op = malloc(sizeof(*op));
	}
	if (op)
		f->n_under_way++;
	mutex_unlock(&f->lock);
	if (!op)
		return NULL;
	op->f = f;
	op->req = req;
	op->ino = ino;
	op->off = op->len = 0;
	op->drop_cache = op->flush_after = false;
	return op;
}

static void op_put(struct op *op)
{
	struct fuse_ops *f = op->f;
	mutex_lock(&f->lock);
	bool keep = f->n_free_ops < OPS_CACHED_MAX;
	if (keep) {
		op->next = f->free_ops;
		f->free_ops = op;
		f->n_free_ops++;
	}
	f->n_under_way--;
	if (f->n_under_way == 0)
		cond_broadcast(&f->idle);
	mutex_unlock(&f->lock);
	if (!keep)
		free(op);
}

/* The answer first: who waits for the last request to be put has the connection closed then. */
static void op_reply_err(struct op *op, int sys)
{
	(void)fuse_reply_err(op->req, sys);
	op_put(op);
}

static void op_submit(struct op *op, const struct file *file, enum repl_kind kind, uint64_t off, uint64_t len,
		      const void *data, void (*done)(struct gio *g, int error))
{
	op->g =
	    (struct gio){.v = file->v, .h = file->h, .kind = kind, .off = off, .len = len, .data = data, .done = done};
	gvol_submit(&op->g);
}

static void flush_done(struct gio *g, int error)
{
	struct op *op = CONTAINER_OF(g, struct op, g);
	op_reply_err(op, error ? errno_io(error) : 0);
}

static void write_answer(struct op *op)
{
	(void)fuse_reply_write(op->req, (size_t)op->len);
	op_put(op);
}

static void write_flush_done(struct gio *g, int error)
{
	struct op *op = CONTAINER_OF(g, struct op, g);
	if (error)
		op_reply_err(op, errno_io(error));
	else
		write_answer(op);
}

/* Written, and the cache knows: sync it if that was asked for, then answer. */
static void write_finish(struct op *op)
{
	if (!op->flush_after) {
		write_answer(op);
		return;
	}
	const struct file file = {.v = op->g.v, .h = (struct gvol_handle *)(uintptr_t)op->g.h};
	op_submit(op, &file, REPL_FLUSH, 0, 0, NULL, write_flush_done);
}

static void write_drop_cache(struct mount *m, struct mount_job *job)
{
	struct op *op = CONTAINER_OF(job, struct op, job);
	mount_drop_cache(m, op->ino, op->off, op->len);
	write_finish(op);
}

static void write_done(struct gio *g, int error)
{
	struct op *op = CONTAINER_OF(g, struct op, g);
	if (error) {
		op_reply_err(op, errno_io(error));
	} else if (op->drop_cache && gvol_cached_opens(g->v) > 0) {
		op->job.fn = write_drop_cache;
		mount_post(op->f->mount, &op->job);
	} else {
		write_finish(op);
	}
}

static void refuse_beyond_end(fuse_req_t req, const struct file *file, const char *what)
{
	if (file->kind == INODE_CLONE && refusal_logged(ops_of(req)))
		log_warn(gvol_name(file->v), "%s beyond the end refused: a clone has the size of its checkpoint", what);
	else if (file->kind != INODE_CLONE && refusal_logged(ops_of(req)))
		log_warn(gvol_name(file->v),
			 "%s beyond the end refused: a volume does not grow by it; use repctl resize %s SIZE", what,
			 gvol_name(file->v));
	(void)fuse_reply_err(req, EFBIG);
}

static void op_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off, struct fuse_file_info *fi)
{
	const struct file *file = file_of(fi);
	if (!is_disk(file->kind) || off < 0 || size > MOUNT_REQUEST_MAX) {
		(void)fuse_reply_err(req, is_disk(file->kind) ? EINVAL : EBADF);
		return;
	}
	if (size == 0) {
		(void)fuse_reply_write(req, 0);
		return;
	}
	uint64_t end = gvol_size(file->v);
	if ((uint64_t)off >= end) {
		refuse_beyond_end(req, file, "write");
		return;
	}
	struct op *op = op_get(req, ino);
	if (!op) {
		(void)fuse_reply_err(req, ENOMEM);
		return;
	}
	op->off = (uint64_t)off;
	op->len = min_u64(size, end - op->off);
	/* A page written back (writepage) is the cache's own. O_DIRECT may have been set by fcntl on a cached file. */
	bool direct = !fi->writepage && (file->direct || (fi->flags & O_DIRECT));
	op->drop_cache = direct;
	/* For a cached file the kernel sends an FSYNC after the write; for a direct one it leaves that to us. */
	op->flush_after = direct && (fi->flags & O_DSYNC);
	op_submit(op, file, REPL_WRITE, op->off, op->len, buf, write_done);
}

static void op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	const struct file *file = file_of(fi);
	(void)datasync;
	if (!is_disk(file->kind)) {
		(void)fuse_reply_err(req, 0);
		return;
	}
	struct op *op = op_get(req, ino);
	if (!op)
		(void)fuse_reply_err(req, ENOMEM);
	else
		op_submit(op, file, REPL_FLUSH, 0, 0, NULL, flush_done);
}

static void op_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	(void)ino;
	(void)datasync;
	(void)fi;
	(void)fuse_reply_err(req, 0);
}

/* A piece has ended. False: that was all, and it is answered. */
static bool zero_goes_on(struct op *op)
{
	int error = op->error;
	op->off += op->g.len;
	op->len -= op->g.len;
	bool more = !error && op->len > 0;
	if (!more)
		op_reply_err(op, error ? errno_io(error) : 0);
	return more;
}

static void zero_done(struct gio *g, int error);

/* A zero or discard goes out in pieces of at most REPL_ZERO_MAX, one after another: who comes second, the thread that
 * submitted a piece, back from that, or the piece's end, goes on with the next. So a piece that ends while it is
 * submitted lies on no stack when the next one begins; a large volume has many. */
static void zero_go_on(struct op *op, const struct file *file, enum repl_kind kind)
{
	do {
		atomic_store(&op->turn, 0);
		op_submit(op, file, kind, op->off, min_u64(op->len, REPL_ZERO_MAX), NULL, zero_done);
		if (atomic_fetch_add(&op->turn, 1) == 0)
			return;
	} while (zero_goes_on(op));
}

static void zero_done(struct gio *g, int error)
{
	struct op *op = CONTAINER_OF(g, struct op, g);
	op->error = error;
	if (atomic_fetch_add(&op->turn, 1) == 0 || !zero_goes_on(op))
		return;
	const struct file file = {.v = g->v, .h = (struct gvol_handle *)(uintptr_t)g->h};
	zero_go_on(op, &file, g->kind);
}

static void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
			 struct fuse_file_info *fi)
{
	const struct file *file = file_of(fi);
	const int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	bool zero = mode == FALLOC_FL_ZERO_RANGE || mode == (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE);
	bool reserve = mode == 0 || mode == FALLOC_FL_KEEP_SIZE;

	if (!is_disk(file->kind) || offset < 0 || length <= 0) {
		(void)fuse_reply_err(req, is_disk(file->kind) ? EINVAL : EBADF);
		return;
	}
	if (mode != punch && !zero && !reserve) {
		(void)fuse_reply_err(req, EOPNOTSUPP);
		return;
	}
	uint64_t end = gvol_size(file->v), off = (uint64_t)offset;
	bool beyond = off > end || (uint64_t)length > end - off;
	if (beyond && (reserve || !(mode & FALLOC_FL_KEEP_SIZE))) {
		refuse_beyond_end(req, file, "fallocate");
		return;
	}
	/* Space is not set aside: what is written takes what it needs, as on any thin disk. */
	uint64_t len = off >= end ? 0 : min_u64((uint64_t)length, end - off);
	if (reserve || len == 0) {
		(void)fuse_reply_err(req, 0);
		return;
	}
	struct op *op = op_get(req, ino);
	if (!op) {
		(void)fuse_reply_err(req, ENOMEM);
		return;
	}
	op->off = off;
	op->len = len;
	/* The opener may close it when it is answered. */
	const struct file copy = {.v = file->v, .h = file->h};
	zero_go_on(op, &copy, zero ? REPL_ZERO : REPL_DISCARD);
}

/* 0 or an errno. Without a handle a size of 0 is what an open with O_TRUNC sends: it changes nothing. */
static int setattr_size(struct fuse_ops *f, const struct inode_id *id, const struct stat *now, off_t size,
			bool by_handle)
{
	char name[NAME_SIZE] = "";
	if (!is_disk(id->kind))
		return EACCES;
	if (size == now->st_size || (size == 0 && !by_handle))
		return 0;
	struct gvol *v = gvol_by_id(f->daemon, id->id);
	if (v && refusal_logged(f)) {
		(void)snprintf(name, sizeof(name), "%s", gvol_name(v));
		if (id->kind == INODE_CLONE)
			log_warn(name, "truncate to %lld bytes refused: a clone has the size of its checkpoint",
				 (long long)size);
		else
			log_warn(name, "truncate to %lld bytes refused: use repctl resize %s SIZE", (long long)size,
				 name);
	}
	gvol_unref(v);
	return !by_handle && size > now->st_size ? EFBIG : EPERM;
}

static void op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi)
{
	struct fuse_ops *f = ops_of(req);
	struct inode_id id;
	struct stat st;
	int r = inode_parse(ino, &id) ? attr_fill(f, &id, &st) : ENOENT;

	if (r == 0 && (to_set & FUSE_SET_ATTR_MODE) && ((attr->st_mode ^ st.st_mode) & 07777))
		r = EPERM;
	if (r == 0 && (to_set & FUSE_SET_ATTR_UID) && attr->st_uid != st.st_uid)
		r = EPERM;
	if (r == 0 && (to_set & FUSE_SET_ATTR_GID) && attr->st_gid != st.st_gid)
		r = EPERM;
	const int times = FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_CTIME | FUSE_SET_ATTR_ATIME_NOW |
			  FUSE_SET_ATTR_MTIME_NOW;
	if (r == 0 && (to_set & times) && !(to_set & FUSE_SET_ATTR_SIZE) && !is_disk(id.kind))
		r = EPERM;
	if (r == 0 && (to_set & FUSE_SET_ATTR_SIZE))
		r = setattr_size(f, &id, &st, attr->st_size, fi != NULL);
	if (r)
		(void)fuse_reply_err(req, r);
	else
		(void)fuse_reply_attr(req, &st, timeout_of(id.kind));
}

/* ---- the namespace is fixed ----------------------------------------------------------------------------------------
 */

static void refuse_name(fuse_req_t req, fuse_ino_t parent, const char *name, const char *verb)
{
	if (parent == INODE_CLONES && refusal_logged(ops_of(req)))
		log_warn(name, "clones are made with repctl clone NAME@N CLONE, and removed with rm");
	else if (parent == INODE_VOLUMES && refusal_logged(ops_of(req)))
		log_warn(name, "volumes are not made or removed in the mount; use repctl %s", verb);
	(void)fuse_reply_err(req, EPERM);
}

static void op_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
	(void)mode;
	(void)fi;
	refuse_name(req, parent, name, "create NAME --size SIZE, or repctl import NAME FILE");
}

static void op_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
	(void)mode;
	(void)rdev;
	refuse_name(req, parent, name, "create NAME --size SIZE, or repctl import NAME FILE");
}

static void op_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	(void)mode;
	refuse_name(req, parent, name, "create NAME --size SIZE");
}

static void op_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
	(void)target;
	refuse_name(req, parent, name, "create NAME --size SIZE");
}

static void op_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
	(void)ino;
	refuse_name(req, parent, name, "create NAME --size SIZE");
}

static void op_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	refuse_name(req, parent, name, "delete NAME");
}

/* A clone is removed by this; nothing else is. */
static void op_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct err e = {0};
	if (parent != INODE_CLONES) {
		refuse_name(req, parent, name, "delete NAME");
		return;
	}
	int r = daemon_remove_clone(ops_of(req)->daemon, name, &e);
	if (r < 0 && r != -ERR_NOENT)
		log_warn(name, "the clone was not removed: %s", e.text);
	(void)fuse_reply_err(req, r == 0 ? 0 : r == -ERR_BUSY || r == -ERR_NOENT ? err_errno(r) : EIO);
}

static void op_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t to, const char *to_name,
		      unsigned flags)
{
	(void)to;
	(void)to_name;
	(void)flags;
	refuse_name(req, parent, name, "create and repctl delete");
}

/* The store's space: what volumes can still take. */
static void op_statfs(fuse_req_t req, fuse_ino_t ino)
{
	struct statvfs s;
	(void)ino;
	if (statvfs(daemon_store_path(ops_of(req)->daemon), &s) < 0) {
		(void)fuse_reply_err(req, errno);
		return;
	}
	s.f_namemax = NAME_MAX_LEN + sizeof(STATUS_SUFFIX) - 1;
	(void)fuse_reply_statfs(req, &s);
}

static void op_init(void *userdata, struct fuse_conn_info *conn)
{
	struct fuse_ops *f = userdata;
	mount_init(f->mount, conn);
}

/* Locks are not there: the kernel keeps fcntl, OFD and flock locks by itself. copy_file_range is not there either: the
 * kernel falls back to reading and writing, through the same paths as everything else. */
static const struct fuse_lowlevel_ops table = {
    .init = op_init,
    .lookup = op_lookup,
    .getattr = op_getattr,
    .setattr = op_setattr,
    .readlink = op_readlink,
    .mknod = op_mknod,
    .mkdir = op_mkdir,
    .unlink = op_unlink,
    .rmdir = op_rmdir,
    .symlink = op_symlink,
    .rename = op_rename,
    .link = op_link,
    .open = op_open,
    .read = op_read,
    .write = op_write,
    .flush = op_flush,
    .release = op_release,
    .fsync = op_fsync,
    .opendir = op_opendir,
    .readdir = op_readdir,
    .releasedir = op_release,
    .fsyncdir = op_fsyncdir,
    .statfs = op_statfs,
    .create = op_create,
    .fallocate = op_fallocate,
    .readdirplus = op_readdirplus,
    .lseek = op_lseek,
};

const struct fuse_lowlevel_ops *fuse_ops_table(void)
{
	return &table;
}

/* ---- life ----------------------------------------------------------------------------------------------------------
 */

int fuse_ops_create(const struct fuse_ops_config *cfg, struct mount *m, struct fuse_ops **ret, struct err *e)
{
	struct fuse_ops *f = calloc(1, sizeof(*f));
	if (!f || pthread_key_create(&f->read_buffer, free) != 0) {
		free(f);
		return err_set(e, ERR_NOMEM, "out of memory");
	}
	f->cfg = *cfg;
	f->mount = m;
	f->started = timespec_of(clock_wall_ns());
	mutex_init(&f->lock);
	cond_init(&f->idle);
	*ret = f;
	return 0;
}

void fuse_ops_set_daemon(struct fuse_ops *f, struct daemon *d)
{
	f->daemon = d;
}

void fuse_ops_free(struct fuse_ops *f)
{
	if (!f)
		return;
	fuse_ops_close_files(f);
	while (f->free_ops) {
		struct op *op = f->free_ops;
		f->free_ops = op->next;
		free(op);
	}
	(void)pthread_key_delete(f->read_buffer);
	cond_destroy(&f->idle);
	mutex_destroy(&f->lock);
	free(f);
}

struct invalidate_job {
	struct mount_job job;
	uint32_t id;
};

/* Overlays are served direct, but a private mapping has pages even so. */
static void invalidate_run(struct mount *m, struct mount_job *job)
{
	static const enum inode_kind kinds[] = {INODE_VOLUME, INODE_ACTIVE, INODE_HIDDEN, INODE_LATEST};
	const struct invalidate_job *j = CONTAINER_OF(job, struct invalidate_job, job);
	for (size_t i = 0; i < ARRAY_LEN(kinds); i++) {
		uint64_t ino = inode_make(kinds[i], j->id, 0);
		if (ino)
			mount_drop_cache(m, ino, 0, 0);
	}
}

void fuse_ops_invalidate(void *arg, uint32_t gvol_id)
{
	struct fuse_ops *f = arg;
	struct invalidate_job job = {.job.fn = invalidate_run, .id = gvol_id};
	mount_post_wait(f->mount, &job.job);
}
