#!/usr/bin/env python3
"""A real VM on a protected volume: ext4, files with fsync, checkpoints, the loss of the primary's host, a failover, and a
guest on the survivor that runs fsck and finds what has to be there. And a guest over a compressed qcow2 image."""

import hashlib
import os
import random
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
import repfs_vm as vm  # noqa: E402
from repfs_e2e import MIB, Host, Pair, check, check_eq  # noqa: E402
from repfs_vm import Guest  # noqa: E402

SIZE = 64 * MIB


def pair(*volumes, **kw):
    e2e.need("qemu-system-x86_64")
    vm.image()
    p = Pair(proxy=True)
    p.protect(*volumes, size=SIZE, **kw)
    return p


def lose_primary(p, guest):
    """The host is gone at one instant: nothing that was under way arrives, the guest and the daemon are no more."""
    p.proxy.lose()
    guest.kill()
    p.a.kill9()
    p.b.wait_status("vm1", 15, link="DOWN")


def survivor(p, *volumes, mount=True):
    """A guest on the survivor's files; fsck has been through them, /a (and /b) are mounted."""
    g = Guest([p.b.volume(v) for v in volumes or ("vm1",)], "survivor")
    for dev, where in list(zip(("/dev/vda", "/dev/vdb"), ("/a", "/b")))[:len(volumes or ("vm1",))]:
        g.fsck(dev)
        g.sh("mount -t ext4 %s %s" % (dev, where))
    return g


def expect_files(guest, where, want, gone=()):
    got = guest.sums("sum %s/*" % where)
    for name, s in want.items():
        check_eq(got.get(name), s, "checksum of %s/%s on %s" % (where, name, guest.name))
    for name in gone:
        check(name not in got, "%s/%s is there on %s" % (where, name, guest.name))


@e2e.limit(300)
def test_failover_to_the_checkpoint():
    p = pair()
    g = Guest([p.a.volume("vm1")], "primary")
    g.mkfs("/dev/vda", "/a")
    old = {"one": g.put("/a", "one", 700), "two": g.put("/a", "two", 3000)}
    changed = g.put("/a", "three", 300)
    g.sh("sync")  # the checkpoint is of the disk: what the guest has not written out is not on it
    n = p.checkpoint()
    after = {"four": g.put("/a", "four", 2000)}
    check(g.put("/a", "three", 300) != changed, "random files are equal")
    g.sh("rm /a/one && sync")
    lose_primary(p, g)
    doc = p.b.repctl("-y", "failover", "vm1", json=True)  # the commit goes on while the guest boots
    check_eq(doc["checkpoint"], n, "failover says")
    s = survivor(p)
    expect_files(s, "/a", dict(old, three=changed), gone=after)
    more = s.put("/a", "five", 500)
    s.sh("umount /a")
    s.poweroff()
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "30")
    # nothing received was thrown away: the checkpoint as received holds the rest
    received = os.path.join(p.dir, "received.raw")
    p.b.repctl("export", "vm1@%d" % doc["received_checkpoint"], received)
    r = Guest([received, p.b.volume("vm1")], "received")
    r.fsck("/dev/vda")
    r.sh("mount -t ext4 /dev/vda /a && mount -t ext4 /dev/vdb /b")
    expect_files(r, "/a", dict(after, two=old["two"]), gone=("one", "five"))
    expect_files(r, "/b", dict(old, three=changed, five=more), gone=after)
    r.poweroff()


@e2e.limit(300)
def test_failover_to_latest():
    """Protocol F: everything the guest saw fsynced is there."""
    p = pair(protocol="F", interval="1")
    g = Guest([p.a.volume("vm1")], "primary")
    g.mkfs("/dev/vda", "/a")
    files = {}
    for i in range(5):
        files["f%d" % i] = g.put("/a", "f%d" % i, 100 + 400 * i)
    p.proxy.delay = 0.02  # so that something is under way
    for i in range(5, 8):
        files["f%d" % i] = g.put("/a", "f%d" % i, 700)
    # and more that nobody was told of
    g.send("dd if=/dev/urandom of=/a/unsynced bs=64k count=200")
    lose_primary(p, g)
    p.b.repctl("-y", "failover", "vm1", "--to", "latest")
    s = survivor(p)
    expect_files(s, "/a", files)
    s.put("/a", "after", 300)
    s.sh("umount /a")
    s.poweroff()


@e2e.limit(300)
def test_guest_on_the_secondary_view():
    """COLO use: a guest runs on the secondary's view and writes there; a failover leaves it running, with what it wrote. Its
    second disk is a clone of the same checkpoint, which goes its own way."""
    p = pair()
    g = Guest([p.a.volume("vm1")], "primary")
    g.mkfs("/dev/vda", "/a")
    base = {"base": g.put("/a", "base", 1000)}
    g.sh("umount /a")
    n = p.checkpoint()
    p.b.repctl("clone", "vm1@%d" % n, "scratch")
    c = Guest([p.b.volume("vm1"), os.path.join(p.b.mnt, "clones", "scratch")], "secondary")
    c.sh("mount -t ext4 /dev/vda /a && mount -t ext4 /dev/vdb /b")
    expect_files(c, "/a", base)
    expect_files(c, "/b", base)
    scratch = {"scratch": c.put("/b", "scratch", 1200)}
    own = {"own": c.put("/a", "own", 1500)}
    g.sh("mount -t ext4 /dev/vda /a")
    theirs = {"theirs": g.put("/a", "theirs", 2500)}
    st = p.b.status("vm1")["volumes"][0]
    check(st["active_bytes"] >= 1500 * 1024 and st["hidden_bytes"] > 0, "overlays: %r" % st)
    c.sh("echo 3 > /proc/sys/vm/drop_caches")
    expect_files(c, "/a", dict(base, **own), gone=theirs)
    expect_files(c, "/b", dict(base, **scratch), gone=("own", "theirs"))
    lose_primary(p, g)
    doc = p.b.repctl("-y", "failover", "vm1", json=True)
    check_eq(doc["checkpoint"], n, "failover says")
    own["later"] = c.put("/a", "later", 800)  # the same guest, never stopped
    c.sh("echo 3 > /proc/sys/vm/drop_caches")
    expect_files(c, "/a", dict(base, **own), gone=theirs)
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "30")
    c.sh("umount /a /b")
    c.fsck("/dev/vda")
    c.fsck("/dev/vdb")
    c.sh("mount -t ext4 /dev/vda /a && mount -t ext4 /dev/vdb /b")
    expect_files(c, "/a", dict(base, **own), gone=theirs)
    expect_files(c, "/b", dict(base, **scratch), gone=("own", "later", "theirs"))
    c.sh("umount /a /b")
    c.poweroff()
    os.unlink(os.path.join(p.b.mnt, "clones", "scratch"))
    e2e.check_same(p.b.volume("vm1"), p.b.disk("vm1"), "mount and disk")


@e2e.limit(300)
def test_two_volumes():
    """Two disks in one group: a file on the second is written after its twin on the first; the checkpoint cuts both at once."""
    p = pair("vm1-root", "vm1-data", interval="0.4")
    g = Guest([p.a.volume("vm1-root"), p.a.volume("vm1-data")], "primary")
    g.mkfs("/dev/vda", "/a")
    g.mkfs("/dev/vdb", "/b")
    g.sh("sync")
    first = p.checkpoint()
    sums = {}
    for i in range(12):
        sums["n%02d" % i] = g.put("/a", "n%02d" % i, 60)
        g.sh("cp /a/n%02d /tmp/x && dd if=/tmp/x of=/b/n%02d bs=64k conv=fsync 2>/dev/null" % (i, i))
    lose_primary(p, g)
    doc = p.b.repctl("-y", "failover", "vm1", json=True)
    check(doc["checkpoint"] >= first, "failover says %r" % doc)
    s = survivor(p, "vm1-root", "vm1-data")
    a, b = s.sums("sum /a/*"), s.sums("sum /b/*")
    for name in b:
        # Fsynced on the first disk before it was made on the second; the newest may be there in part only.
        check(name in a, "%s is on the second disk and not on the first" % name)
    whole = [n for n in sorted(b) if b[n] == sums[n]]
    for name in whole:
        check_eq(a[name], sums[name], "%s on the first disk, whole on the second" % name)
    check(len(b) - len(whole) <= 1, "files on the second disk that are not whole: %r" % sorted(set(b) - set(whole)))
    check(whole, "the checkpoint holds none of the files; too early to tell anything")
    s.sh("umount /a /b")
    s.poweroff()


@e2e.limit(200)
def test_vm_over_a_compressed_base():
    """A guest whose filesystem, programs included, is a compressed image that nothing was copied of."""
    e2e.need("mkfs.ext4", "busybox", "qemu-img")
    d, h, rng = e2e.tmp(), Host("a"), random.Random(60)
    base, raw, root = (os.path.join(d, name) for name in ("base.qcow2", "base.raw", "root"))
    os.makedirs(os.path.join(root, "bin"))
    os.mkdir(os.path.join(root, "data"))
    e2e.run(["cp", shutil.which("busybox"), os.path.join(root, "bin", "busybox")])
    files = {}
    for name in ("one", "two", "three"):
        data = rng.randbytes(1000) * rng.randrange(200, 600)
        with open(os.path.join(root, "data", name), "wb") as f:
            f.write(data)
        files[name] = hashlib.sha256(data).hexdigest()
    with open(raw, "wb") as f:
        f.truncate(48 * MIB)
    e2e.run(["mkfs.ext4", "-q", "-F", "-d", root, raw])
    e2e.run(["qemu-img", "convert", "-c", "-O", "qcow2", raw, base])
    check(os.path.getsize(base) < 4 * MIB, "the image is not compressed")
    before = e2e.sha(base)
    h.repctl("create", "vm1", "--base", base)
    h.start()
    g = Guest([h.volume("vm1")])
    g.sh("mount -t ext4 /dev/vda /a")
    in_guest = "chroot /a /bin/busybox "

    def sums():
        out = g.sh(in_guest + "sh -c '/bin/busybox sha256sum /data/*'")
        return {f[6:]: s for s, f in (line.split() for line in out.splitlines())}

    check_eq(sums(), files, "files out of the image")
    g.sh(in_guest + "sh -c '/bin/busybox seq 200000 > /data/new; /bin/busybox rm /data/two; /bin/busybox sync'")
    files["new"] = hashlib.sha256("".join("%d\n" % i for i in range(1, 200001)).encode()).hexdigest()
    del files["two"]
    g.sh("umount /a")
    g.fsck("/dev/vda")
    g.sh("mount -t ext4 /dev/vda /a")
    check_eq(sums(), files, "files over the image")
    g.sh("umount /a")
    g.poweroff()
    h.stop()
    check(e2e.allocated(h.disk("vm1").replace("disk.raw", "own.data")) < 16 * MIB, "more than what was written is in the store")
    out = os.path.join(d, "out.raw")
    h.repctl("export", "vm1", out)
    e2e.run(["e2fsck", "-fn", out])
    check_eq(e2e.sha(base), before, "checksum of the base")


if __name__ == "__main__":
    e2e.main()
