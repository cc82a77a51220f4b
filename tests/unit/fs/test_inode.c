/* fs/inode: numbers and what they stand for, both ways. */
#include <criterion/criterion.h>
#include <string.h>

#include "fs/inode.h"

static const uint32_t ids[] = {1, 2, 255, 65536, INODE_ID_MAX - 1, INODE_ID_MAX};
static const uint64_t ckpts[] = {1, 2, 41, UINT64_C(1) << 32, INODE_CKPT_MAX - 1, INODE_CKPT_MAX};

static void check_both_ways(enum inode_kind kind, uint32_t id, uint64_t ckpt)
{
	struct inode_id got;
	memset(&got, 0xa5, sizeof(got));
	uint64_t ino = inode_make(kind, id, ckpt);
	cr_assert_neq(ino, 0, "kind %d id %u ckpt %lu", kind, id, (unsigned long)ckpt);
	cr_assert_eq(ino >> 63, 0, "the top bit is clear");
	cr_assert(inode_parse(ino, &got));
	cr_assert_eq(got.kind, kind);
	cr_assert_eq(got.id, id);
	cr_assert_eq(got.ckpt, ckpt);
}

Test(inode, fixed_folders_have_small_numbers)
{
	cr_assert_eq(inode_make(INODE_ROOT, 0, 0), 1, "FUSE's root");
	for (enum inode_kind k = INODE_ROOT; k <= INODE_STATUS; k++) {
		check_both_ways(k, 0, 0);
		cr_assert_eq(inode_make(k, 1, 0), 0);
		cr_assert_eq(inode_make(k, 0, 1), 0);
	}
}

Test(inode, every_kind_both_ways)
{
	for (enum inode_kind k = INODE_VOLUME; k < INODE_KINDS; k++)
		for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
			if (k != INODE_CKPT) {
				check_both_ways(k, ids[i], 0);
				continue;
			}
			for (size_t j = 0; j < sizeof(ckpts) / sizeof(ckpts[0]); j++)
				check_both_ways(k, ids[i], ckpts[j]);
		}
	check_both_ways(INODE_STATUS_FILE, 0, 0);
	check_both_ways(INODE_CLONE, 1, 0);
	check_both_ways(INODE_CLONE, INODE_ID_MAX, 0);
}

Test(inode, numbers_differ)
{
	uint64_t seen[INODE_KINDS * 6 * 6];
	size_t n = 0;
	for (enum inode_kind k = INODE_VOLUME; k < INODE_KINDS; k++)
		for (size_t i = 0; i < 6; i++)
			for (size_t j = 0; j < (k == INODE_CKPT ? 6 : 1); j++) {
				uint64_t ino = inode_make(k, ids[i], k == INODE_CKPT ? ckpts[j] : 0);
				for (size_t s = 0; s < n; s++)
					cr_assert_neq(seen[s], ino);
				seen[n++] = ino;
			}
}

Test(inode, what_does_not_fit_has_no_number)
{
	cr_assert_eq(inode_make(INODE_VOLUME, 0, 0), 0);
	cr_assert_eq(inode_make(INODE_VOLUME, INODE_ID_MAX + 1, 0), 0);
	cr_assert_eq(inode_make(INODE_VOLUME, UINT32_MAX, 0), 0);
	cr_assert_eq(inode_make(INODE_VOLUME, 1, 1), 0, "only a checkpoint's file has a checkpoint");
	cr_assert_eq(inode_make(INODE_CKPT, 1, 0), 0);
	cr_assert_eq(inode_make(INODE_CKPT, 1, INODE_CKPT_MAX + 1), 0);
	cr_assert_eq(inode_make(INODE_CKPT, 1, UINT64_MAX), 0);
}

Test(inode, foreign_numbers_are_refused_and_leave_the_result)
{
	const uint64_t foreign[] = {0,
				    INODE_VOLUME, /* small, but of no fixed folder */
				    1000,
				    UINT64_C(1) << 63,
				    UINT64_MAX,
				    (uint64_t)INODE_VOLUME << 59,		 /* id 0 */
				    inode_make(INODE_VOLUME, 1, 0) | 1,		 /* a checkpoint where none belongs */
				    inode_make(INODE_CKPT, 1, 1) & ~UINT64_C(1), /* checkpoint 0 */
				    (uint64_t)INODE_ROOT << 59 | UINT64_C(1) << 37, /* a fixed folder with an id */
				    (uint64_t)INODE_KINDS << 59 | UINT64_C(1) << 37};
	struct inode_id got, poison;
	memset(&poison, 0xa5, sizeof(poison));
	for (size_t i = 0; i < sizeof(foreign) / sizeof(foreign[0]); i++) {
		got = poison;
		cr_assert_not(inode_parse(foreign[i], &got), "%zu", i);
		cr_assert_eq(memcmp(&got, &poison, sizeof(got)), 0);
	}
}

Test(inode, every_number_parsed_is_the_one_made)
{
	/* A walk over numbers near every field's edge: what parse accepts, make gives back. */
	uint64_t accepted = 0, refused = 0;
	for (uint64_t kind = 0; kind < 32; kind++)
		for (unsigned a = 0; a < 59; a++)
			for (unsigned b = 0; b <= a; b++) {
				uint64_t ino = kind << 59 | UINT64_C(1) << a | UINT64_C(1) << b;
				struct inode_id id;
				if (!inode_parse(ino, &id)) {
					refused++;
					continue;
				}
				accepted++;
				cr_assert_eq(inode_make(id.kind, id.id, id.ckpt), ino);
			}
	cr_assert_gt(accepted, 1000);
	cr_assert_gt(refused, 1000);
}

Test(inode, folders_and_parents)
{
	const struct {
		struct inode_id id;
		bool dir;
		uint64_t parent;
	} t[] = {
	    {{INODE_ROOT, 0, 0}, true, INODE_ROOT},
	    {{INODE_VOLUMES, 0, 0}, true, INODE_ROOT},
	    {{INODE_CLONES, 0, 0}, true, INODE_ROOT},
	    {{INODE_VOLUME, 7, 0}, false, INODE_VOLUMES},
	    {{INODE_OVERLAY_DIR, 7, 0}, true, INODE_OVERLAYS},
	    {{INODE_ACTIVE, 7, 0}, false, inode_make(INODE_OVERLAY_DIR, 7, 0)},
	    {{INODE_HIDDEN, 7, 0}, false, inode_make(INODE_OVERLAY_DIR, 7, 0)},
	    {{INODE_CKPT_DIR, 7, 0}, true, INODE_CHECKPOINTS},
	    {{INODE_CKPT, 7, 41}, false, inode_make(INODE_CKPT_DIR, 7, 0)},
	    {{INODE_LATEST, 7, 0}, false, inode_make(INODE_CKPT_DIR, 7, 0)},
	    {{INODE_STATUS_FILE, 0, 0}, false, INODE_STATUS},
	    {{INODE_CLONE, 7, 0}, false, INODE_CLONES},
	};
	for (size_t i = 0; i < sizeof(t) / sizeof(t[0]); i++) {
		cr_assert_eq(inode_is_dir(t[i].id.kind), t[i].dir, "%zu", i);
		cr_assert_eq(inode_parent(&t[i].id), t[i].parent, "%zu", i);
	}
}

Test(inode, checkpoint_names_are_plain_decimal)
{
	uint64_t n = 77;
	cr_assert(inode_parse_ckpt("1", &n));
	cr_assert_eq(n, 1);
	cr_assert(inode_parse_ckpt("137438953471", &n));
	cr_assert_eq(n, INODE_CKPT_MAX);
	n = 77;
	const char *bad[] = {"",
			     "0",
			     "01",
			     "+1",
			     "-1",
			     " 1",
			     "1 ",
			     "1a",
			     "0x1",
			     "latest",
			     "137438953472",
			     "18446744073709551617",
			     "99999999999999999999999999"};
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		cr_assert_not(inode_parse_ckpt(bad[i], &n), "%s", bad[i]);
		cr_assert_eq(n, 77);
	}
}
