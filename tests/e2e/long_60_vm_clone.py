#!/usr/bin/env python3
"""A failover test: a VM that has nothing but a clone, beside the primary's guest. That a guest works on a clone at all is looked
at in test_60_vm.py, on the second disk of one that runs anyway."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_vm import Guest  # noqa: E402
from test_60_vm import expect_files, pair  # noqa: E402


@e2e.limit(300)
def test_failover_test_on_a_clone():
    """A guest runs from a clone of the last checkpoint while the primary's guest goes on writing: neither notices the
    other, and the protection is what it was."""
    p = pair()
    g = Guest([p.a.volume("vm1")], "primary")
    g.mkfs("/dev/vda", "/a")
    files = {"one": g.put("/a", "one", 1500)}
    g.sh("sync")
    n = p.checkpoint()
    p.b.repctl("clone", "vm1@%d" % n, "rehearsal")
    g.sh("(while ! [ -e /tmp/stop ]; do dd if=/dev/urandom of=/a/busy bs=64k count=40 conv=fsync 2>/dev/null; done; "
         "touch /tmp/stopped) &")
    c = Guest([os.path.join(p.b.mnt, "clones", "rehearsal")], "rehearsal")
    c.fsck("/dev/vda")
    c.sh("mount -t ext4 /dev/vda /a")
    expect_files(c, "/a", files, gone=("busy",))
    own = {"own": c.put("/a", "own", 2000)}
    c.sh("rm /a/one && sync")
    p.checkpoint()  # others come and go beside it
    c.sh("umount /a && echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /a")
    expect_files(c, "/a", own, gone=("busy", "one"))
    c.sh("umount /a")
    c.fsck("/dev/vda")
    c.poweroff()
    g.sh("touch /tmp/stop; while ! [ -e /tmp/stopped ]; do sleep 0.1; done")
    os.unlink(os.path.join(p.b.mnt, "clones", "rehearsal"))
    expect_files(g, "/a", files, gone=own)
    g.sh("umount /a")
    g.poweroff()
    p.checkpoint()
    e2e.check_same(p.a.volume("vm1"), p.b.volume("vm1"), "the primary and the secondary's view")
    p.same()


if __name__ == "__main__":
    e2e.main()
