/* The simulated storage. tests/sim/simstore.h says what it does; here is how.
 *
 * A node is a file or a folder. A file has two images: the cache, which is what reads see, and the durable one, which
 * is what a power cut leaves at the least. What lies between them is the list of its unsynced changes, in order; a sync
 * carries them over. A failed sync throws the list away, which is just what makes cache and durable image differ for
 * good. A folder's entry likewise has a node as seen now and a durable one, and what lies between them is one list of
 * changes of names for the whole storage: a rename over two folders is one change.
 *
 * An image is a two-level table of 4 KiB pages, so that sparse files of any size cost what they hold. A page that is
 * there counts as allocated; one of zeroes that nobody wrote into is the shared zero_page.
 */
#include "tests/sim/simstore.h"

#include <fnmatch.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/check.h"
#include "core/err.h"
#include "core/range.h"
#include "tests/sim/simalloc.h"

#define PAGE_SIZE BLOCK_SIZE
#define LEAF_PAGES 512U
#define NO_LIMIT_BYTES (UINT64_C(1) << 50) /* what free_bytes says without a limit */

struct leaf {
	uint8_t *page[LEAF_PAGES];
};

struct image {
	struct leaf **leaves;
	uint64_t n_leaves, size;
	uint64_t *pages; /* where to count: of the whole storage for caches, of nobody's for durable ones */
};

enum change_kind { CHANGE_WRITE, CHANGE_ZERO, CHANGE_PUNCH, CHANGE_SIZE };

/* An unsynced change of a file's content. */
struct change {
	enum change_kind kind;
	uint64_t off, len; /* SIZE: off is the new size */
	uint8_t *data;
};

struct node;

struct entry {
	char *name;
	struct node *seen, *durable; /* each holds a reference; NULL: not there */
};

struct handle {
	struct disk disk;
	struct simstore *ss;
	struct node *node;
	struct handle *next; /* of the node */
	bool read_only;
	bool owed;	/* a sync through another handle failed: this one's next sync says so */
	int sync_error; /* of the first sync that failed, and of all after it */
};

struct node {
	unsigned refs; /* handles, entries, changes of names */
	bool folder;
	char *path; /* where it was last linked */
	/* A file. */
	struct image cache, durable;
	struct change *changes;
	size_t n_changes, room_changes;
	bool lost; /* a failed sync dropped changes: the cache has more than durable image and changes say */
	struct handle *handles;
	/* The rules that match its path, as bits; of which set of rules. */
	uint32_t rules, rules_version;
	/* A folder. */
	struct entry *entries;
	size_t n_entries;
};

struct link {
	struct node *folder;
	char *name;
	struct node *node; /* NULL: removed */
};

/* A change of names that is not durable yet: all its links at once or none. */
struct renaming {
	struct link link[2];
	unsigned n;
	bool gone; /* scratch of a power cut */
};

struct rule {
	struct simstore_rule r;
	uint64_t seen, hits;
};

struct simstore {
	struct storage storage;
	struct node *root;
	struct renaming *renamings;
	size_t n_renamings, room_renamings;
	struct rule rules[SIMSTORE_RULES_MAX];
	unsigned n_rules, rules_version;
	uint64_t random;
	uint64_t space, pages, durable_pages;
	uint64_t stop_in; /* changes until the crash point, 0: none */
	enum simstore_stop stop_how;
	bool stopped, looking;
	unsigned n_handles;
	struct simstore_counters counters;
	char fault[STORAGE_PATH_MAX + 64];
};

static uint8_t zero_page[PAGE_SIZE];

/* --- chance
 * ---------------------------------------------------------------------------------------------------------*/

static uint64_t chance(struct simstore *ss, uint64_t below)
{
	uint64_t z = ss->random += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return (z ^ (z >> 31)) % below;
}

void simstore_reseed(struct simstore *ss, uint64_t seed)
{
	ss->random = seed;
}

/* --- images
 * ---------------------------------------------------------------------------------------------------------*/

static uint8_t **image_slot(const struct image *im, uint64_t page)
{
	struct leaf *leaf = page / LEAF_PAGES < im->n_leaves ? im->leaves[page / LEAF_PAGES] : NULL;

	return leaf ? &leaf->page[page % LEAF_PAGES] : NULL;
}

static const uint8_t *image_page(const struct image *im, uint64_t page)
{
	uint8_t **slot = image_slot(im, page);

	return slot ? *slot : NULL;
}

/* The slot of a page, made if need be; counted as allocated with zeroes. */
static uint8_t **image_make_slot(struct image *im, uint64_t page)
{
	uint64_t at = page / LEAF_PAGES;
	uint8_t **slot;

	if (at >= im->n_leaves) {
		im->leaves = simrealloc(im->leaves, (at + 1) * sizeof(*im->leaves));
		memset(im->leaves + im->n_leaves, 0, (at + 1 - im->n_leaves) * sizeof(*im->leaves));
		im->n_leaves = at + 1;
	}
	if (!im->leaves[at])
		im->leaves[at] = simalloc(sizeof(struct leaf));
	slot = &im->leaves[at]->page[page % LEAF_PAGES];
	if (!*slot) {
		*slot = zero_page;
		++*im->pages;
	}
	return slot;
}

static uint8_t *image_page_to_write(struct image *im, uint64_t page)
{
	uint8_t **slot = image_make_slot(im, page);

	if (*slot == zero_page)
		*slot = simalloc(PAGE_SIZE);
	return *slot;
}

static void image_drop_page(struct image *im, uint64_t page)
{
	uint8_t **slot = image_slot(im, page);

	if (!slot || !*slot)
		return;
	if (*slot != zero_page)
		simfree(*slot);
	*slot = NULL;
	--*im->pages;
}

/* The first page from `page` on, below `end`, that is (not) there; end if none. */
static uint64_t image_next(const struct image *im, uint64_t page, uint64_t end, bool there)
{
	while (page < end) {
		if (!image_slot(im, page)) {
			if (!there)
				return page;
			page = round_down_u64(page, LEAF_PAGES) + LEAF_PAGES;
		} else if ((image_page(im, page) != NULL) == there) {
			return page;
		} else {
			page++;
		}
	}
	return end;
}

static void image_read(const struct image *im, uint64_t off, uint8_t *buf, uint64_t len)
{
	while (len > 0) {
		uint64_t in = off % PAGE_SIZE, n = min_u64(len, PAGE_SIZE - in);
		const uint8_t *page = image_page(im, off / PAGE_SIZE);

		if (page)
			memcpy(buf, page + in, n);
		else
			memset(buf, 0, n);
		off += n;
		buf += n;
		len -= n;
	}
}

static void image_write(struct image *im, uint64_t off, const uint8_t *buf, uint64_t len)
{
	if (len > 0)
		im->size = max_u64(im->size, off + len);
	while (len > 0) {
		uint64_t in = off % PAGE_SIZE, n = min_u64(len, PAGE_SIZE - in);

		memcpy(image_page_to_write(im, off / PAGE_SIZE) + in, buf, n);
		off += n;
		buf += n;
		len -= n;
	}
}

/* Below the size only. Whole pages become holes (punch) or allocated zeroes. */
static void image_zero(struct image *im, uint64_t off, uint64_t len, bool punch)
{
	uint64_t end = min_u64(off + len, im->size);

	while (off < end) {
		uint64_t page = off / PAGE_SIZE, in = off % PAGE_SIZE, n = min_u64(end - off, PAGE_SIZE - in);

		if (punch && !image_page(im, page)) {
			off = min_u64(end, image_next(im, page, units_of(end, BLOCK_SHIFT), true) * PAGE_SIZE);
			continue;
		}
		if (n == PAGE_SIZE) {
			image_drop_page(im, page);
			if (!punch)
				(void)image_make_slot(im, page);
		} else if (*image_make_slot(im, page) != zero_page) {
			memset(image_page_to_write(im, page) + in, 0, n);
		}
		off += n;
	}
}

/* What lies past the size is never there: pages beyond it are dropped, the rest of the last one is zeroes. */
static void image_resize(struct image *im, uint64_t size)
{
	if (size < im->size) {
		uint64_t page = units_of(size, BLOCK_SHIFT), end = units_of(im->size, BLOCK_SHIFT);

		image_zero(im, size, page * PAGE_SIZE - size, true);
		while ((page = image_next(im, page, end, true)) < end)
			image_drop_page(im, page);
	}
	im->size = size;
}

static void image_clear(struct image *im)
{
	image_resize(im, 0);
	for (uint64_t i = 0; i < im->n_leaves; i++)
		simfree(im->leaves[i]);
	simfree(im->leaves);
	im->leaves = NULL;
	im->n_leaves = 0;
}

static void image_copy(struct image *to, const struct image *from)
{
	uint64_t end = units_of(from->size, BLOCK_SHIFT);

	image_clear(to);
	for (uint64_t page = 0; (page = image_next(from, page, end, true)) < end; page++) {
		const uint8_t *data = image_page(from, page);

		if (data == zero_page)
			(void)image_make_slot(to, page);
		else
			memcpy(image_page_to_write(to, page), data, PAGE_SIZE);
	}
	to->size = from->size;
}

/* --- unsynced changes of a file
 * -------------------------------------------------------------------------------------*/

static void change_apply(struct image *im, const struct change *c)
{
	if (c->kind == CHANGE_WRITE)
		image_write(im, c->off, c->data, c->len);
	else if (c->kind == CHANGE_SIZE)
		image_resize(im, c->off);
	else
		image_zero(im, c->off, c->len, c->kind == CHANGE_PUNCH);
}

/* Some of its sectors. A large zero would have too many: one run of them. */
static void change_apply_torn(struct simstore *ss, struct image *im, const struct change *c)
{
	uint64_t end = c->off + c->len;

	if (c->kind == CHANGE_SIZE) {
		if (chance(ss, 2))
			change_apply(im, c);
		return;
	}
	if (c->kind != CHANGE_WRITE) {
		uint64_t sectors = units_of(c->len, 9), first = chance(ss, sectors + 1);
		uint64_t n = chance(ss, sectors - first + 1);

		/* Cut at the disk's sectors, not at the request's. */
		uint64_t from = first ? round_down_u64(c->off + first * SECTOR_SIZE, SECTOR_SIZE) : c->off;
		uint64_t to = min_u64(end, round_down_u64(from + n * SECTOR_SIZE, SECTOR_SIZE));

		if (from < to)
			image_zero(im, from, to - from, c->kind == CHANGE_PUNCH);
		return;
	}
	for (uint64_t at = c->off, stop; at < end; at = stop) {
		stop = min_u64(round_down_u64(at, SECTOR_SIZE) + SECTOR_SIZE, end);
		if (chance(ss, 2))
			image_write(im, at, c->data + (at - c->off), stop - at);
	}
}

static void change_queue(struct node *f, enum change_kind kind, uint64_t off, uint64_t len, const void *data)
{
	struct change *c;

	if (f->n_changes == f->room_changes) {
		f->room_changes = f->room_changes ? 2 * f->room_changes : 16;
		f->changes = simrealloc(f->changes, f->room_changes * sizeof(*f->changes));
	}
	c = &f->changes[f->n_changes++];
	*c = (struct change){kind, off, len, NULL};
	if (data)
		c->data = simdup(data, len);
	change_apply(&f->cache, c);
}

static void changes_forget(struct node *f)
{
	for (size_t i = 0; i < f->n_changes; i++)
		simfree(f->changes[i].data);
	f->n_changes = 0;
}

static void changes_keep(struct simstore *ss, struct node *f, enum simstore_keep keep)
{
	for (size_t i = 0; i < f->n_changes; i++) {
		uint64_t part = keep == SIMSTORE_KEEP_RANDOM ? chance(ss, 3) : 0;

		if (keep == SIMSTORE_KEEP_NONE || part == 1)
			continue;
		if (part == 2)
			change_apply_torn(ss, &f->durable, &f->changes[i]);
		else
			change_apply(&f->durable, &f->changes[i]);
	}
}

/* What the cache has beyond them was lost by a failed sync: it goes. */
static void node_evict(struct simstore *ss, struct node *n)
{
	(void)ss;
	if (!n->lost)
		return;
	image_copy(&n->cache, &n->durable);
	for (size_t i = 0; i < n->n_changes; i++)
		change_apply(&n->cache, &n->changes[i]);
	n->lost = false;
}

/* --- nodes and names
 * ------------------------------------------------------------------------------------------------*/

static struct node *node_new(struct simstore *ss, bool folder, const char *path)
{
	struct node *n = simalloc(sizeof(*n));

	n->folder = folder;
	n->path = simstrdup(path);
	n->cache.pages = &ss->pages;
	n->durable.pages = &ss->durable_pages;
	return n;
}

static struct node *node_ref(struct node *n)
{
	if (n)
		n->refs++;
	return n;
}

static void node_unref(struct node *n)
{
	if (!n || --n->refs > 0)
		return;
	PRE(!n->handles);
	for (size_t i = 0; i < n->n_entries; i++) {
		node_unref(n->entries[i].seen);
		node_unref(n->entries[i].durable);
		simfree(n->entries[i].name);
	}
	simfree(n->entries);
	changes_forget(n);
	simfree(n->changes);
	image_clear(&n->cache);
	image_clear(&n->durable);
	simfree(n->path);
	simfree(n);
}

static void node_set(struct node **at, struct node *n)
{
	struct node *was = *at;

	*at = node_ref(n);
	node_unref(was);
}

static struct entry *entry_find(const struct node *folder, const char *name, size_t len)
{
	for (size_t i = 0; i < folder->n_entries; i++) {
		struct entry *e = &folder->entries[i];

		if (strncmp(e->name, name, len) == 0 && !e->name[len])
			return e;
	}
	return NULL;
}

static struct entry *entry_make(struct node *folder, const char *name)
{
	struct entry *e = entry_find(folder, name, strlen(name));

	if (e)
		return e;
	folder->entries = simrealloc(folder->entries, (folder->n_entries + 1) * sizeof(*folder->entries));
	e = &folder->entries[folder->n_entries++];
	*e = (struct entry){.name = simstrdup(name)};
	return e;
}

/* Takes out the entries that are nowhere any more. */
static void folder_prune(struct node *folder)
{
	size_t kept = 0;

	for (size_t i = 0; i < folder->n_entries; i++) {
		struct entry *e = &folder->entries[i];

		if (e->seen || e->durable)
			folder->entries[kept++] = *e;
		else
			simfree(e->name);
	}
	folder->n_entries = kept;
}

static bool folder_empty(const struct node *folder)
{
	for (size_t i = 0; i < folder->n_entries; i++) {
		if (folder->entries[i].seen)
			return false;
	}
	return true;
}

/* Where a path leads: the folder of its last part, that part, and what is there (or NULL). "" is the root itself. */
struct place {
	struct node *folder;
	const char *name;
	struct node *node;
};

static int place_find(struct simstore *ss, const char *path, bool durable, struct place *ret)
{
	struct place p = {NULL, path, ss->root};

	if (path[0] == '/' || strlen(path) > STORAGE_PATH_MAX)
		return -ERR_RANGE;
	while (*path) {
		size_t n = strcspn(path, "/");
		struct entry *e;

		if (n == 2 && path[0] == '.' && path[1] == '.')
			return -ERR_RANGE;
		if (!p.node)
			return -ERR_NOENT;
		if (!p.node->folder)
			return -ERR_IO; /* ENOTDIR */
		e = entry_find(p.node, path, n);
		p = (struct place){p.node, path, !e ? NULL : durable ? e->durable : e->seen};
		path += n;
		if (*path == '/')
			path++;
	}
	*ret = p;
	return 0;
}

static void link_apply(const struct link *l, bool durable)
{
	struct entry *e = entry_make(l->folder, l->name);

	node_set(durable ? &e->durable : &e->seen, l->node);
	if (!durable && l->node) {
		/* Rules see a file under its new name. */
		const char *at = l->folder->path;
		size_t n = strlen(at) + strlen(l->name) + 2;
		char *path = simalloc(n);

		snprintf(path, n, "%s%s%s", at, *at ? "/" : "", l->name);
		simfree(l->node->path);
		l->node->path = path;
		l->node->rules_version = 0;
	}
}

static void renaming_apply(const struct renaming *r, bool durable)
{
	for (unsigned i = 0; i < r->n; i++)
		link_apply(&r->link[i], durable);
}

static void renaming_free(struct renaming *r)
{
	for (unsigned i = 0; i < r->n; i++) {
		node_unref(r->link[i].folder);
		node_unref(r->link[i].node);
		simfree(r->link[i].name);
	}
}

static struct renaming *renaming_begin(struct simstore *ss)
{
	if (ss->n_renamings == ss->room_renamings) {
		ss->room_renamings = ss->room_renamings ? 2 * ss->room_renamings : 16;
		ss->renamings = simrealloc(ss->renamings, ss->room_renamings * sizeof(*ss->renamings));
	}
	ss->renamings[ss->n_renamings] = (struct renaming){.n = 0};
	return &ss->renamings[ss->n_renamings++];
}

static void renaming_link(struct renaming *r, const struct place *at, struct node *n)
{
	r->link[r->n++] = (struct link){node_ref(at->folder), simstrdup(at->name), node_ref(n)};
}

/* The name at a place becomes n (NULL: goes away), not durably. */
static void relink(struct simstore *ss, const struct place *at, struct node *n)
{
	struct renaming *r = renaming_begin(ss);

	renaming_link(r, at, n);
	renaming_apply(r, false);
}

/* Whether b builds on a: it is about the same name or the same node. (A name in a folder that is lost is out of reach.)
 */
static bool renaming_depends(const struct renaming *b, const struct renaming *a)
{
	for (unsigned i = 0; i < a->n; i++) {
		for (unsigned k = 0; k < b->n; k++) {
			const struct link *x = &a->link[i], *y = &b->link[k];

			if (x->folder == y->folder && strcmp(x->name, y->name) == 0)
				return true;
			if (x->node && x->node == y->node)
				return true;
		}
	}
	return false;
}

static bool renaming_touches(const struct renaming *r, const struct node *folder)
{
	for (unsigned i = 0; i < r->n; i++) {
		if (r->link[i].folder == folder)
			return true;
	}
	return false;
}

/* Ends those with `gone` unset by making them durable, in order; with all, those that are gone are forgotten. */
static void renamings_settle(struct simstore *ss, bool all)
{
	size_t kept = 0;

	for (size_t i = 0; i < ss->n_renamings; i++) {
		struct renaming *r = &ss->renamings[i];

		if (r->gone && !all) {
			ss->renamings[kept++] = *r;
			continue;
		}
		if (!r->gone)
			renaming_apply(r, true);
		renaming_free(r);
	}
	ss->n_renamings = kept;
}

/* A folder's names become durable, with what they build on. */
static void renamings_sync(struct simstore *ss, const struct node *folder)
{
	for (size_t i = ss->n_renamings; i-- > 0;) {
		struct renaming *r = &ss->renamings[i];

		r->gone = !renaming_touches(r, folder);
		for (size_t k = i + 1; r->gone && k < ss->n_renamings; k++) {
			if (!ss->renamings[k].gone && renaming_depends(&ss->renamings[k], r))
				r->gone = false;
		}
	}
	renamings_settle(ss, false);
}

/* Which of them a power cut leaves: a journal keeps the first few; without one it is any that build on nothing lost. */
static void renamings_keep(struct simstore *ss, enum simstore_keep keep)
{
	bool journal = chance(ss, 2) == 0;
	size_t first = chance(ss, ss->n_renamings + 1);

	for (size_t i = 0; i < ss->n_renamings; i++) {
		struct renaming *r = &ss->renamings[i];

		r->gone = keep == SIMSTORE_KEEP_NONE;
		if (keep == SIMSTORE_KEEP_RANDOM)
			r->gone = journal ? i >= first : chance(ss, 2) == 0;
		for (size_t k = 0; !r->gone && k < i; k++)
			r->gone = ss->renamings[k].gone && renaming_depends(r, &ss->renamings[k]);
	}
	renamings_settle(ss, true);
}

/* --- calls and their faults
 * -----------------------------------------------------------------------------------------*/

static const char *const call_names[SIMSTORE_CALLS] = {
    [SIMSTORE_CREATE] = "create",     [SIMSTORE_WRITE] = "write",	[SIMSTORE_ZERO] = "zero",
    [SIMSTORE_SYNC] = "sync",	      [SIMSTORE_SET_SIZE] = "set_size", [SIMSTORE_UNLINK] = "unlink",
    [SIMSTORE_RENAME] = "rename",     [SIMSTORE_MKDIR] = "mkdir",	[SIMSTORE_RMDIR] = "rmdir",
    [SIMSTORE_SYNC_DIR] = "sync_dir", [SIMSTORE_OPEN] = "open",		[SIMSTORE_READ] = "read",
    [SIMSTORE_EXTENT] = "extent",     [SIMSTORE_STAT] = "stat",		[SIMSTORE_LIST] = "list",
};

const char *simstore_call_name(enum simstore_call call)
{
	return call_names[call];
}

/* How a call goes: all of it and 0, or an error after none, some or all of it. */
struct verdict {
	int rc;
	enum simstore_stop done;
};

static void fault_note(struct simstore *ss, enum simstore_call call, const char *path, uint64_t off, uint64_t len)
{
	int n = snprintf(ss->fault, sizeof(ss->fault), "%s %s", call_names[call], *path ? path : ".");

	if (len && n > 0 && (size_t)n < sizeof(ss->fault))
		snprintf(ss->fault + n, sizeof(ss->fault) - (size_t)n, " %" PRIu64 "+%" PRIu64, off, len);
}

static bool rule_path_matches(const struct rule *r, const char *path, const char *path2)
{
	return !r->r.path || fnmatch(r->r.path, path, 0) == 0 || (path2 && fnmatch(r->r.path, path2, 0) == 0);
}

static bool rule_hits(struct simstore *ss, struct rule *r)
{
	r->seen++;
	if (r->r.nth && r->seen >= r->r.nth && (!r->r.times || r->seen < r->r.nth + r->r.times))
		return true;
	return r->r.one_in && chance(ss, r->r.one_in) == 0;
}

/* matches: the rules whose path fits, as bits. Every rule counts the call, the first that hits decides. */
static int rules_ask(struct simstore *ss, enum simstore_call call, uint32_t matches)
{
	int rc = 0;

	for (unsigned i = 0; i < ss->n_rules; i++) {
		struct rule *r = &ss->rules[i];

		if (!(r->r.calls & SIMSTORE_BIT(call)) || !(matches & (UINT32_C(1) << i)))
			continue;
		if (rule_hits(ss, r) && rc == 0) {
			r->hits++;
			rc = -r->r.error;
		}
	}
	return rc;
}

static uint32_t rules_matching(struct simstore *ss, const char *path, const char *path2)
{
	uint32_t matches = 0;

	for (unsigned i = 0; i < ss->n_rules; i++) {
		if (rule_path_matches(&ss->rules[i], path, path2))
			matches |= UINT32_C(1) << i;
	}
	return matches;
}

static struct verdict call_begin(struct simstore *ss, enum simstore_call call, uint32_t matches)
{
	int rc;

	if (ss->stopped)
		return (struct verdict){-ERR_IO, SIMSTORE_NOT_DONE};
	if (ss->looking)
		return (struct verdict){0, SIMSTORE_DONE};
	ss->counters.calls[call]++;
	if (call < SIMSTORE_OPEN) {
		ss->counters.changes++;
		if (ss->stop_in && --ss->stop_in == 0) {
			ss->stopped = true;
			return (struct verdict){-ERR_IO, ss->stop_how};
		}
	}
	rc = rules_ask(ss, call, matches);
	if (rc == 0)
		return (struct verdict){0, SIMSTORE_DONE};
	ss->counters.failed[call]++;
	return (struct verdict){rc, call == SIMSTORE_WRITE || call == SIMSTORE_ZERO ? SIMSTORE_HALF_DONE
										    : SIMSTORE_NOT_DONE};
}

static struct verdict file_call(struct handle *h, enum simstore_call call, uint64_t off, uint64_t len)
{
	struct simstore *ss = h->ss;
	struct node *f = h->node;
	bool was_stopped = ss->stopped;
	struct verdict v;

	if (f->rules_version != ss->rules_version) {
		f->rules = rules_matching(ss, f->path, NULL);
		f->rules_version = ss->rules_version;
	}
	v = call_begin(ss, call, f->rules);
	if (v.rc < 0 && !was_stopped)
		fault_note(ss, call, f->path, off, len);
	return v;
}

/* For names there is no half: done or not. */
static struct verdict name_call(struct simstore *ss, enum simstore_call call, const char *path, const char *path2)
{
	bool was_stopped = ss->stopped;
	struct verdict v = call_begin(ss, call, ss->n_rules ? rules_matching(ss, path, path2) : 0);

	if (v.rc < 0 && !was_stopped)
		fault_note(ss, call, path, 0, 0);
	if (v.done == SIMSTORE_HALF_DONE)
		v.done = chance(ss, 2) ? SIMSTORE_DONE : SIMSTORE_NOT_DONE;
	return v;
}

unsigned simstore_rule_add(struct simstore *ss, const struct simstore_rule *rule)
{
	PRE(ss->n_rules < SIMSTORE_RULES_MAX);
	PRE(rule->error > 0 && rule->calls);
	ss->rules[ss->n_rules] = (struct rule){.r = *rule};
	ss->rules_version++;
	return ss->n_rules++;
}

uint64_t simstore_rule_hits(const struct simstore *ss, unsigned rule)
{
	PRE(rule < ss->n_rules);
	return ss->rules[rule].hits;
}

void simstore_rules_clear(struct simstore *ss)
{
	ss->n_rules = 0;
	ss->rules_version++;
}

void simstore_set_space(struct simstore *ss, uint64_t bytes)
{
	ss->space = bytes;
}

/* --- a file
 * ---------------------------------------------------------------------------------------------------------*/

static struct handle *handle(struct disk *d)
{
	return CONTAINER_OF(d, struct handle, disk);
}

static uint64_t pages_free(const struct simstore *ss)
{
	uint64_t limit = ss->space / PAGE_SIZE;

	return ss->space == UINT64_MAX ? UINT64_MAX : limit - min_u64(limit, ss->pages);
}

/* How far a write comes before there is no room. */
static uint64_t room_until(const struct handle *h, uint64_t off, uint64_t end)
{
	uint64_t left = pages_free(h->ss), page = off / PAGE_SIZE, last = units_of(end, BLOCK_SHIFT);

	if (left == UINT64_MAX)
		return end;
	for (; page < last; page++) {
		if (image_page(&h->node->cache, page))
			continue;
		if (left-- == 0)
			return max_u64(off, page * PAGE_SIZE);
	}
	return end;
}

static uint64_t cut_at(struct simstore *ss, uint64_t off, uint64_t len)
{
	uint64_t at = off + chance(ss, len + 1);

	return at < off + len ? max_u64(off, round_down_u64(at, SECTOR_SIZE)) - off : len;
}

static int sim_write(struct disk *d, uint64_t off, const void *buf, size_t len)
{
	struct handle *h = handle(d);
	struct verdict v = file_call(h, SIMSTORE_WRITE, off, len);
	uint64_t n = v.done == SIMSTORE_DONE ? len : 0;

	if (v.done == SIMSTORE_HALF_DONE)
		n = cut_at(h->ss, off, len);
	if (h->read_only)
		return -ERR_IO;
	if (off > VOLUME_SIZE_MAX || len > VOLUME_SIZE_MAX)
		return -ERR_RANGE;
	if (v.done != SIMSTORE_NOT_DONE && room_until(h, off, off + n) < off + n) {
		n = room_until(h, off, off + n) - off;
		if (v.rc == 0) {
			v.rc = -ERR_NOSPC;
			h->ss->counters.failed[SIMSTORE_WRITE]++;
		}
	}
	if (n > 0)
		change_queue(h->node, CHANGE_WRITE, off, n, buf);
	h->ss->counters.written_bytes += n;
	return v.rc;
}

static int sim_zero(struct disk *d, uint64_t off, uint64_t len, bool punch)
{
	struct handle *h = handle(d);
	struct verdict v = file_call(h, SIMSTORE_ZERO, off, len);
	uint64_t size = h->node->cache.size, n;

	if (h->read_only)
		return -ERR_IO;
	if (off > VOLUME_SIZE_MAX || len > VOLUME_SIZE_MAX)
		return -ERR_RANGE;
	n = off < size ? min_u64(len, size - off) : 0;
	if (v.done == SIMSTORE_HALF_DONE)
		n = cut_at(h->ss, off, n);
	if (v.done == SIMSTORE_NOT_DONE || n == 0)
		return v.rc;
	/* Without room for allocated zeroes a hole still reads right. */
	if (!punch && room_until(h, off, off + n) < off + n)
		punch = true;
	change_queue(h->node, punch ? CHANGE_PUNCH : CHANGE_ZERO, off, n, NULL);
	return v.rc;
}

static int sim_set_size(struct disk *d, uint64_t size)
{
	struct handle *h = handle(d);
	struct verdict v = file_call(h, SIMSTORE_SET_SIZE, size, 0);

	if (h->read_only)
		return -ERR_IO;
	if (size > VOLUME_SIZE_MAX)
		return -ERR_RANGE;
	if (v.done == SIMSTORE_DONE || (v.done == SIMSTORE_HALF_DONE && chance(h->ss, 2)))
		change_queue(h->node, CHANGE_SIZE, size, 0, NULL);
	return v.rc;
}

static int sim_read(struct disk *d, uint64_t off, void *buf, size_t len)
{
	struct handle *h = handle(d);
	struct verdict v = file_call(h, SIMSTORE_READ, off, len);

	if (v.rc == 0)
		image_read(&h->node->cache, off, buf, len);
	return v.rc;
}

static int sim_extent(struct disk *d, uint64_t off, uint64_t end, struct extent *ret)
{
	struct handle *h = handle(d);
	const struct image *im = &h->node->cache;
	struct verdict v = file_call(h, SIMSTORE_EXTENT, off, end - off);
	uint64_t page = off / PAGE_SIZE, stop;
	bool data;

	PRE(off < end);
	if (v.rc < 0)
		return v.rc;
	if (off >= im->size) {
		*ret = (struct extent){off, end - off, false};
		return 0;
	}
	end = min_u64(end, im->size);
	data = image_page(im, page) != NULL;
	stop = image_next(im, page, units_of(end, BLOCK_SHIFT), !data) * PAGE_SIZE;
	*ret = (struct extent){off, min_u64(stop, end) - off, data};
	return 0;
}

/* A part of what was written may have reached the disk; none of the rest ever will, though it can be read. */
static void sync_fails(struct handle *h)
{
	struct node *f = h->node;

	f->lost = f->lost || f->n_changes > 0;
	changes_keep(h->ss, f, SIMSTORE_KEEP_RANDOM);
	changes_forget(f);
	for (struct handle *o = f->handles; o; o = o->next)
		o->owed = o != h;
}

static int sim_sync(struct disk *d)
{
	struct handle *h = handle(d);
	struct verdict v = file_call(h, SIMSTORE_SYNC, 0, 0);

	if (h->sync_error)
		return h->sync_error;
	if (v.rc < 0 && !h->ss->stopped) {
		sync_fails(h);
		h->sync_error = v.rc;
		return v.rc;
	}
	if (v.done == SIMSTORE_HALF_DONE) {
		changes_keep(h->ss, h->node, SIMSTORE_KEEP_RANDOM);
	} else if (v.done == SIMSTORE_DONE) {
		changes_keep(h->ss, h->node, SIMSTORE_KEEP_ALL);
		changes_forget(h->node);
	}
	if (v.rc == 0 && h->owed)
		v.rc = h->sync_error = -ERR_IO;
	return v.rc;
}

static int sim_get_size(struct disk *d, uint64_t *ret)
{
	struct handle *h = handle(d);
	struct verdict v = file_call(h, SIMSTORE_STAT, 0, 0);

	if (v.rc == 0)
		*ret = h->node->cache.size;
	return v.rc;
}

static uint64_t image_pages(const struct image *im)
{
	uint64_t end = units_of(im->size, BLOCK_SHIFT), n = 0;

	for (uint64_t page = 0; (page = image_next(im, page, end, true)) < end; page++)
		n++;
	return n;
}

static int sim_allocated(struct disk *d, uint64_t *ret)
{
	struct handle *h = handle(d);
	struct verdict v = file_call(h, SIMSTORE_STAT, 0, 0);

	if (v.rc == 0)
		*ret = image_pages(&h->node->cache) * PAGE_SIZE;
	return v.rc;
}

static void sim_disk_close(struct disk *d)
{
	struct handle *h = handle(d), **at = &h->node->handles;

	while (*at != h)
		at = &(*at)->next;
	*at = h->next;
	h->ss->n_handles--;
	node_unref(h->node);
	simfree(h);
}

static const struct disk_ops sim_disk_ops = {
    .read = sim_read,
    .write = sim_write,
    .zero = sim_zero,
    .extent = sim_extent,
    .sync = sim_sync,
    .set_size = sim_set_size,
    .get_size = sim_get_size,
    .allocated = sim_allocated,
    .close = sim_disk_close,
};

/* --- names
 * ----------------------------------------------------------------------------------------------------------*/

static struct simstore *simstore(struct storage *s)
{
	return CONTAINER_OF(s, struct simstore, storage);
}

static int file_open(struct simstore *ss, struct node *f, unsigned flags, struct disk **ret)
{
	struct handle *h;

	if (f->folder)
		return -ERR_IO; /* EISDIR */
	h = simalloc(sizeof(*h));
	*h = (struct handle){.disk.ops = &sim_disk_ops, .ss = ss, .node = node_ref(f), .next = f->handles};
	h->read_only = flags & STORAGE_RDONLY;
	f->handles = h;
	ss->n_handles++;
	*ret = &h->disk;
	return 0;
}

static int sim_open(struct storage *s, const char *path, unsigned flags, struct disk **ret)
{
	struct simstore *ss = simstore(s);
	struct place at = {0};
	int rc = *path ? place_find(ss, path, false, &at) : -ERR_RANGE;
	bool makes = rc == 0 && !at.node && (flags & STORAGE_CREATE);
	bool cuts = rc == 0 && at.node && (flags & STORAGE_TRUNC) && !(flags & STORAGE_EXCL);
	struct verdict v = name_call(ss, makes || cuts ? SIMSTORE_CREATE : SIMSTORE_OPEN, path, NULL);

	PRE(!((flags & STORAGE_RDONLY) && (flags & (STORAGE_CREATE | STORAGE_TRUNC))));
	if (v.rc < 0 && v.done == SIMSTORE_NOT_DONE)
		return v.rc;
	if (rc < 0)
		return rc;
	if (!at.node && !makes)
		return -ERR_NOENT;
	if (at.node && (flags & STORAGE_EXCL))
		return -ERR_EXIST;
	if (makes) {
		at.node = node_new(ss, false, path);
		relink(ss, &at, at.node);
	} else if (cuts && !at.node->folder) {
		change_queue(at.node, CHANGE_SIZE, 0, 0, NULL);
	}
	if (flags & STORAGE_FRESH)
		node_evict(ss, at.node);
	return v.rc < 0 ? v.rc : file_open(ss, at.node, flags, ret);
}

static int sim_unlink(struct storage *s, const char *path)
{
	struct simstore *ss = simstore(s);
	struct place at = {0};
	struct verdict v = name_call(ss, SIMSTORE_UNLINK, path, NULL);
	int rc = *path ? place_find(ss, path, false, &at) : -ERR_RANGE;

	if (v.done == SIMSTORE_NOT_DONE)
		return v.rc;
	if (rc < 0 || !at.node)
		return rc < 0 ? rc : -ERR_NOENT;
	if (at.node->folder)
		return -ERR_IO; /* EISDIR */
	relink(ss, &at, NULL);
	return v.rc;
}

static int rename_allowed(const struct place *from, const struct place *to)
{
	if (!from->node)
		return -ERR_NOENT;
	if (!to->node)
		return 0;
	if (from->node->folder != to->node->folder)
		return -ERR_IO; /* EISDIR, ENOTDIR */
	return to->node->folder && !folder_empty(to->node) ? -ERR_IO : 0;
}

static int sim_rename(struct storage *s, const char *path_from, const char *path_to)
{
	struct simstore *ss = simstore(s);
	struct place from = {0}, to = {0};
	struct verdict v = name_call(ss, SIMSTORE_RENAME, path_from, path_to);
	int rc = *path_from && *path_to ? place_find(ss, path_from, false, &from) : -ERR_RANGE;
	struct renaming *r;

	if (v.done == SIMSTORE_NOT_DONE)
		return v.rc;
	if (rc == 0)
		rc = place_find(ss, path_to, false, &to);
	if (rc == 0)
		rc = rename_allowed(&from, &to);
	if (rc < 0 || from.node == to.node)
		return rc < 0 ? rc : v.rc;
	r = renaming_begin(ss);
	renaming_link(r, &from, NULL);
	renaming_link(r, &to, from.node);
	renaming_apply(r, false);
	return v.rc;
}

static int sim_mkdir(struct storage *s, const char *path)
{
	struct simstore *ss = simstore(s);
	struct place at = {0};
	struct verdict v = name_call(ss, SIMSTORE_MKDIR, path, NULL);
	int rc = *path ? place_find(ss, path, false, &at) : -ERR_RANGE;

	if (v.done == SIMSTORE_NOT_DONE)
		return v.rc;
	if (rc < 0 || at.node)
		return rc < 0 ? rc : at.node->folder ? v.rc : -ERR_EXIST;
	at.node = node_new(ss, true, path);
	relink(ss, &at, at.node);
	return v.rc;
}

static int sim_rmdir(struct storage *s, const char *path)
{
	struct simstore *ss = simstore(s);
	struct place at = {0};
	struct verdict v = name_call(ss, SIMSTORE_RMDIR, path, NULL);
	int rc = *path ? place_find(ss, path, false, &at) : -ERR_RANGE;

	if (v.done == SIMSTORE_NOT_DONE)
		return v.rc;
	if (rc < 0 || !at.node)
		return rc < 0 ? rc : -ERR_NOENT;
	if (!at.node->folder || !folder_empty(at.node))
		return -ERR_IO; /* ENOTDIR, ENOTEMPTY */
	relink(ss, &at, NULL);
	return v.rc;
}

static int sim_sync_dir(struct storage *s, const char *path)
{
	struct simstore *ss = simstore(s);
	struct place at = {0};
	struct verdict v = name_call(ss, SIMSTORE_SYNC_DIR, path, NULL);
	int rc = place_find(ss, path, false, &at);

	if (v.done == SIMSTORE_NOT_DONE)
		return v.rc;
	if (rc < 0 || !at.node)
		return rc < 0 ? rc : -ERR_NOENT;
	if (!at.node->folder)
		return -ERR_IO; /* ENOTDIR */
	renamings_sync(ss, at.node);
	folder_prune(at.node);
	return v.rc;
}

/* fn may unlink what it is shown: the names are copied first. */
static int sim_list(struct storage *s, const char *path, int (*fn)(void *arg, const char *name), void *arg)
{
	struct simstore *ss = simstore(s);
	struct place at = {0};
	struct verdict v = name_call(ss, SIMSTORE_LIST, path, NULL);
	int rc = v.rc == 0 ? place_find(ss, path, false, &at) : v.rc;
	char **names;
	size_t n = 0;

	if (rc < 0 || !at.node)
		return rc < 0 ? rc : -ERR_NOENT;
	if (!at.node->folder)
		return -ERR_IO; /* ENOTDIR */
	names = simalloc((at.node->n_entries + 1) * sizeof(*names));
	for (size_t i = 0; i < at.node->n_entries; i++) {
		if (at.node->entries[i].seen)
			names[n++] = simstrdup(at.node->entries[i].name);
	}
	for (size_t i = 0; i < n; i++) {
		if (rc == 0)
			rc = fn(arg, names[i]);
		simfree(names[i]);
	}
	simfree(names);
	return rc;
}

static int sim_free_bytes(struct storage *s, uint64_t *ret_free, uint64_t *ret_total)
{
	struct simstore *ss = simstore(s);
	struct verdict v = name_call(ss, SIMSTORE_STAT, "", NULL);
	uint64_t left = pages_free(ss);

	if (v.rc < 0)
		return v.rc;
	*ret_free = left == UINT64_MAX ? NO_LIMIT_BYTES : left * PAGE_SIZE;
	*ret_total = left == UINT64_MAX ? NO_LIMIT_BYTES : ss->space;
	return 0;
}

static void sim_close(struct storage *s)
{
	(void)s;
}

static const struct storage_ops sim_storage_ops = {
    .open = sim_open,
    .unlink = sim_unlink,
    .rename = sim_rename,
    .mkdir = sim_mkdir,
    .rmdir = sim_rmdir,
    .sync_dir = sim_sync_dir,
    .list = sim_list,
    .free_bytes = sim_free_bytes,
    .close = sim_close,
};

struct simstore *simstore_new(uint64_t seed)
{
	struct simstore *ss = simalloc(sizeof(*ss));

	ss->storage.ops = &sim_storage_ops;
	ss->random = seed;
	ss->space = UINT64_MAX;
	ss->rules_version = 1;
	ss->root = node_ref(node_new(ss, true, ""));
	return ss;
}

void simstore_free(struct simstore *ss)
{
	if (!ss)
		return;
	PRE(ss->n_handles == 0);
	for (size_t i = 0; i < ss->n_renamings; i++)
		renaming_free(&ss->renamings[i]);
	simfree(ss->renamings);
	node_unref(ss->root);
	INVARIANT(ss->pages == 0 && ss->durable_pages == 0);
	simfree(ss);
}

struct storage *simstore_storage(struct simstore *ss)
{
	return &ss->storage;
}

/* --- crashes
 * --------------------------------------------------------------------------------------------------------*/

void simstore_stop_at(struct simstore *ss, uint64_t nth, enum simstore_stop how)
{
	ss->stop_in = nth;
	ss->stop_how = how;
}

void simstore_stop(struct simstore *ss)
{
	if (!ss->stopped)
		ss->fault[0] = 0;
	ss->stopped = true;
}

bool simstore_stop_pending(const struct simstore *ss)
{
	return ss->stop_in > 0;
}

bool simstore_stopped(const struct simstore *ss)
{
	return ss->stopped;
}

/* Calls fn for every node that a path leads to. */
static void tree_walk(struct simstore *ss, struct node *at, void (*fn)(struct simstore *, struct node *))
{
	fn(ss, at);
	for (size_t i = 0; i < at->n_entries; i++) {
		if (at->entries[i].seen)
			tree_walk(ss, at->entries[i].seen, fn);
	}
}

static void names_settled(struct simstore *ss, struct node *n)
{
	(void)ss;
	for (size_t i = 0; i < n->n_entries; i++)
		node_set(&n->entries[i].seen, n->entries[i].durable);
	folder_prune(n);
}

static void cut_none(struct simstore *ss, struct node *n)
{
	changes_keep(ss, n, SIMSTORE_KEEP_NONE);
}

static void cut_random(struct simstore *ss, struct node *n)
{
	changes_keep(ss, n, SIMSTORE_KEEP_RANDOM);
}

static void cut_all(struct simstore *ss, struct node *n)
{
	changes_keep(ss, n, SIMSTORE_KEEP_ALL);
}

static void cache_dropped(struct simstore *ss, struct node *n)
{
	(void)ss;
	if (n->n_changes > 0 || n->lost)
		image_copy(&n->cache, &n->durable);
	changes_forget(n);
	n->lost = false;
}

static void comes_back(struct simstore *ss)
{
	PRE(ss->n_handles == 0);
	ss->stopped = false;
}

void simstore_power_cut(struct simstore *ss, enum simstore_keep keep)
{
	void (*const cut[])(struct simstore *, struct node *) = {
	    [SIMSTORE_KEEP_NONE] = cut_none, [SIMSTORE_KEEP_RANDOM] = cut_random, [SIMSTORE_KEEP_ALL] = cut_all};

	comes_back(ss);
	renamings_keep(ss, keep);
	tree_walk(ss, ss->root, names_settled);
	tree_walk(ss, ss->root, cut[keep]);
	tree_walk(ss, ss->root, cache_dropped);
	ss->counters.power_cuts++;
}

void simstore_restart(struct simstore *ss)
{
	comes_back(ss);
	ss->counters.restarts++;
}

void simstore_evict(struct simstore *ss)
{
	tree_walk(ss, ss->root, node_evict);
}

/* --- looking
 * --------------------------------------------------------------------------------------------------------*/

void simstore_look(struct simstore *ss, bool on)
{
	ss->looking = on;
}

const struct simstore_counters *simstore_counters(const struct simstore *ss)
{
	return &ss->counters;
}

const char *simstore_fault_text(const struct simstore *ss)
{
	return ss->fault;
}

static int file_find(struct simstore *ss, const char *path, bool durable, struct node **ret)
{
	struct place at = {0};
	int rc = place_find(ss, path, durable, &at);

	if (rc < 0)
		return rc;
	if (!at.node || at.node->folder)
		return -ERR_NOENT;
	*ret = at.node;
	return 0;
}

int simstore_peek(struct simstore *ss, const char *path, bool durable, uint64_t off, void *buf, size_t len)
{
	struct node *f = NULL;
	int rc = file_find(ss, path, durable, &f);

	if (rc == 0)
		image_read(durable ? &f->durable : &f->cache, off, buf, len);
	return rc;
}

int simstore_peek_blocks(struct simstore *ss, const char *path, const uint8_t **ret_blocks, uint64_t n)
{
	struct node *f = NULL;
	int rc = file_find(ss, path, false, &f);

	for (uint64_t i = 0; rc == 0 && i < n; i++)
		ret_blocks[i] = image_page(&f->cache, i);
	return rc;
}

int simstore_peek_size(struct simstore *ss, const char *path, bool durable, uint64_t *ret)
{
	struct node *f = NULL;
	int rc = file_find(ss, path, durable, &f);

	if (rc == 0)
		*ret = durable ? f->durable.size : f->cache.size;
	return rc;
}

static void image_flip(struct image *im, uint64_t off, uint64_t len)
{
	for (; len > 0 && off < im->size; off++, len--)
		image_page_to_write(im, off / PAGE_SIZE)[off % PAGE_SIZE] ^= 0xff;
}

int simstore_corrupt(struct simstore *ss, const char *path, uint64_t off, size_t len)
{
	struct node *f = NULL;
	int rc = file_find(ss, path, false, &f);

	if (rc == 0) {
		image_flip(&f->cache, off, len);
		image_flip(&f->durable, off, len);
	}
	return rc;
}

static bool tree_clean(const struct node *at)
{
	if (at->n_changes > 0 || at->lost)
		return false;
	for (size_t i = 0; i < at->n_entries; i++) {
		if (at->entries[i].seen && !tree_clean(at->entries[i].seen))
			return false;
	}
	return true;
}

bool simstore_clean(const struct simstore *ss)
{
	return ss->n_renamings == 0 && tree_clean(ss->root);
}

/* Past the size there is nothing, and the two levels agree with the count. */
static void image_check(const struct image *im)
{
	uint64_t last = im->size / PAGE_SIZE, in = im->size % PAGE_SIZE;
	const uint8_t *page = image_page(im, last);

	INVARIANT(!in || !page || memcmp(page + in, zero_page, PAGE_SIZE - in) == 0);
	last = units_of(im->size, BLOCK_SHIFT);
	INVARIANT(image_next(im, last, im->n_leaves * LEAF_PAGES, true) >= im->n_leaves * LEAF_PAGES);
}

static void node_check(const struct node *n)
{
	INVARIANT(n->refs > 0);
	INVARIANT(n->folder ? n->cache.size == 0 && !n->handles : n->n_entries == 0);
	image_check(&n->cache);
	image_check(&n->durable);
	/* Nothing unsynced: what a cut leaves is what is read. */
	if (n->n_changes == 0 && !n->lost)
		INVARIANT(n->cache.size == n->durable.size && image_pages(&n->cache) == image_pages(&n->durable));
	for (size_t i = 0; i < n->n_entries; i++) {
		if (n->entries[i].seen)
			node_check(n->entries[i].seen);
	}
}

void simstore_check(const struct simstore *ss)
{
	for (unsigned i = 0; i < sizeof(zero_page); i++)
		INVARIANT(zero_page[i] == 0);
	node_check(ss->root);
}
