#!/usr/bin/env python3
"""Clones (SPEC 2, 4, 7): writable scratches over kept checkpoints, while the primary writes, over restarts and kills, and
what is refused."""

import errno
import os
import shutil
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, KIB, MIB, Host, Log, Pair, Tmpfs, Writer, check, check_errno, check_eq, wait_for  # noqa: E402

SIZE = 8 * MIB


def clone_file(host, name):
    return os.path.join(host.mnt, "clones", name)


def clone(host, source, name, **kw):
    return host.repctl("clone", source, name, **kw)


def held_by(host, number, name="vm1"):
    return {c["number"]: c["held_by"] for c in host.ctl("checkpoints", name=name)["checkpoints"]}.get(number)


def pair_with_checkpoint(**kw):
    """Half of the volume has data; a checkpoint of that."""
    p = Pair(**kw)
    (vol,) = p.protect(size=SIZE, keep_last=2)
    e2e.pwrite(vol, 0, b"\x11" * (SIZE // 2), sync=True)
    return p, vol, p.checkpoint()


def test_beside_the_primarys_writes():
    """Two writers, one on the primary, one on a clone of an empty disk: neither sees the other; checkpoints come and go,
    but not the one that the clone holds."""
    p = Pair()
    (vol,) = p.protect(size=SIZE, keep_last=2)
    n = p.checkpoint()
    out = clone(p.b, "vm1@%d" % n, "test").out.strip()
    path = clone_file(p.b, "test")
    check_eq(out, path, "clone prints the path")
    log = Log({"vm1": SIZE, "clone": SIZE})
    guest = Writer(log, {"vm1": vol}, threads=2).start()
    direct = Writer(log, {"clone": path}, threads=3, overlap=True, span=SIZE // 2).start()
    for _ in range(4):
        guest.wait_ops(guest.ops + 30)
        direct.wait_ops(direct.ops + 30)
        p.checkpoint()
    wait_for(lambda: len(p.b.ctl("checkpoints", name="vm1")["checkpoints"]) <= 3, "retention", 30)
    check_eq(held_by(p.b, n), ["clone test"], "who holds checkpoint %d" % n)
    direct.stop()
    log.verify({"clone": path}, required=lambda w: w.ok, what="the clone")
    cached = Writer(log, {"clone": path}, threads=2, direct=False).start()
    cached.wait_ops(40)
    cached.stop()
    guest.stop()
    last = p.checkpoint()
    log.verify({"clone": path, "vm1": p.b.checkpoint_file("vm1", last)}, required=lambda w: w.ok, what="after both")
    e2e.check_bytes(p.b.checkpoint_file("vm1", n), 0, SIZE, 0, "its checkpoint")
    copy = os.path.join(p.dir, "copy.raw")
    e2e.run(["cp", "--sparse=auto", path, copy])
    e2e.check_same(path, copy, "the clone and its copy")
    own = p.b.ctl("show", name="vm1")["clones"][0]
    check(0 < own["bytes"] <= SIZE and own["checkpoint"] == n and not own["lost"], "show: %r" % own)
    os.unlink(path)
    check(not os.path.exists(path) and os.listdir(os.path.join(p.b.mnt, "clones")) == [], "the clone is shown still")
    folder = os.path.join(p.b.store, "volumes", "vm1")
    wait_for(lambda: not [f for f in os.listdir(folder) if f.startswith("clone-")], "its files to go", 20)
    wait_for(lambda: held_by(p.b, n) is None, "retention to take its checkpoint", 30)
    p.a.wait_synced("vm1")
    p.same()


def test_a_file_as_a_volume_is():
    """Sizes, holes, allocation, fallocate, O_TRUNC, O_DIRECT beside a cached handle, a shared mapping."""
    p, vol, n = pair_with_checkpoint()
    clone(p.b, "vm1@%d" % n, "c")
    path = clone_file(p.b, "c")
    st = os.stat(path)
    check_eq((st.st_size, st.st_mode & 0o777, st.st_blocks * 512), (SIZE, 0o600, SIZE // 2), "size, mode, allocated")
    check_eq(e2e.data_extents(path), [(0, SIZE // 2)], "extents")
    want = bytearray(b"\x11" * (SIZE // 2) + bytes(SIZE // 2))

    def wrote(off, data, **kw):
        e2e.pwrite(path, off, data, **kw)
        want[off:off + len(data)] = data

    wrote(SIZE - BLOCK, b"\x77" * BLOCK)
    wrote(1000, b"\x66" * 3000, direct=False)
    wrote(SIZE // 2 - 512, b"\x55" * 1024)
    e2e.punch(path, 64 * KIB, 70000)
    want[64 * KIB:64 * KIB + 70000] = bytes(70000)
    e2e.zero_range(path, MIB + 100, 5000)
    want[MIB + 100:MIB + 5100] = bytes(5000)
    fd = os.open(path, os.O_RDWR)
    other = os.open(path, os.O_RDWR | os.O_DIRECT)
    os.pread(fd, SIZE, 0)
    m = e2e.aligned(b"\x44" * BLOCK)
    os.pwrite(other, memoryview(m), 2 * MIB)
    want[2 * MIB:2 * MIB + BLOCK] = b"\x44" * BLOCK
    check_eq(os.pread(fd, BLOCK, 2 * MIB), b"\x44" * BLOCK, "the cached handle after a direct write")
    import mmap
    with mmap.mmap(fd, BLOCK, offset=3 * MIB) as shared:
        shared[:4] = b"mmap"
        shared.flush()
    want[3 * MIB:3 * MIB + 4] = b"mmap"
    os.fdatasync(fd)
    os.close(other)
    os.close(fd)
    os.close(os.open(path, os.O_RDWR | os.O_TRUNC))
    check(e2e.pread(path, 0, SIZE) == bytes(want), "the clone's bytes")
    check(e2e.pread(path, 0, SIZE, direct=False) == bytes(want), "the clone's bytes, cached")
    check((SIZE - BLOCK, BLOCK) in e2e.data_extents(path), "extents: %r" % e2e.data_extents(path))
    check_errno(errno.EFBIG, "a write beyond the end", e2e.pwrite, path, SIZE, b"x" * BLOCK)
    check_errno(errno.EPERM, "ftruncate", lambda: os.truncate(os.open(path, os.O_RDWR), SIZE // 2))
    check_errno(errno.EPERM, "a file made in clones/", lambda: open(clone_file(p.b, "new"), "w"))
    check_errno(errno.EPERM, "a rename", os.rename, path, clone_file(p.b, "d"))
    e2e.check_same(vol, p.b.checkpoint_file("vm1", n), "the primary and the checkpoint")


def test_refused():
    """Names in use, unknown checkpoints, drops and deletes of what a clone needs, a clone that is open."""
    p, _, n = pair_with_checkpoint()
    later = p.checkpoint()
    clone(p.b, "vm1@%d" % n, "c")
    path = clone_file(p.b, "c")
    clone(p.b, "vm1@%d" % n, "c", code=1).says("there already")
    clone(p.b, "vm1@%d" % (later + 100), "d", code=4).says("no such checkpoint")
    clone(p.b, "vm1", "d", code=2).says("names no checkpoint")
    clone(p.b, "vm1@%d" % n, ".d", code=2).says("not a clone's name|name")
    clone(p.b, "other@1", "d", code=4).says("no such volume")
    clone(p.a, "vm1@%d" % n, "d", code=4).says("no such checkpoint")  # the primary keeps none
    p.b.create("alone", SIZE)
    clone(p.b, "alone@1", "c", code=1).says("there already")  # names are the host's
    p.b.repctl("-y", "checkpoints", "vm1", "--drop", str(n), code=1).says("clone c holds it")
    fd = os.open(path, os.O_RDWR)
    check_errno(errno.EBUSY, "rm of an open clone", os.unlink, path)
    wait_for(lambda: "it is open" in p.b.log_text(), "a line in the log", 10)
    os.pwrite(fd, b"still here", 0)
    os.close(fd)
    p.b.repctl("list").says(r"c +vm1@%d" % n)
    p.b.repctl("status", "vm1").says(r"clone c of vm1@%d" % n)
    p.b.repctl("checkpoints", "vm1").says("clone c")
    check_errno(errno.ENOENT, "rm of what is not there", os.unlink, clone_file(p.b, "nothing"))
    p.b.repctl("unprotect", "vm1", code=None)
    p.a.repctl("unprotect", "vm1", code=None)
    wait_for(lambda: p.b.status("vm1")["role"] == "standalone" or p.b.repctl("unprotect", "vm1", code=None) is None,
             "b to be standalone", 30)
    p.b.repctl("-y", "delete", "vm1", code=1).says("clone c is made of it")
    os.unlink(path)
    wait_for(lambda: p.b.repctl("-y", "checkpoints", "vm1", "--drop", str(n), code=None) and held_by(p.b, n) is None,
             "the drop", 20)
    p.b.repctl("-y", "delete", "vm1")


@e2e.limit(120)
def test_kills_restarts_and_a_failover():
    """What was fsynced is there after kill -9; a restart, a resync, a failover with its commit and writes on the survivor
    change nothing of a clone."""
    p = Pair(durability="power")
    (vol,) = p.protect(size=SIZE)
    n = p.checkpoint()
    clone(p.b, "vm1@%d" % n, "c")
    path = clone_file(p.b, "c")
    log = Log({"vm1": SIZE, "clone": SIZE, "survivor": SIZE})
    guest = Writer(log, {"vm1": vol}, threads=1, pace=0.002).start()
    w = Writer(log, {"clone": path}, threads=2, fsync_every=6, overlap=True).start()
    w.wait_ops(60)
    import time
    p.b.kill9()
    died = time.monotonic_ns()
    w.stop(errors_ok=True)
    p.b.start()
    log.verify({"clone": path}, required=log.flushed_before(died), what="after kill -9")
    p.a.wait_synced("vm1")
    guest.stop()
    # as it is now is what it has to be from here on
    kept = os.path.join(p.dir, "kept.raw")
    shutil.copyfile(path, kept)
    e2e.pwrite(path, 12345 * 512, b"\x77" * 512, sync=True)
    e2e.pwrite(kept, 12345 * 512, b"\x77" * 512)
    p.checkpoint()
    p.b.restart()
    p.a.wait_synced("vm1")
    e2e.check_same(path, kept, "the clone after a restart")
    e2e.pwrite(vol, 0, b"\x22" * MIB, sync=True)
    p.a.kill9()
    p.b.wait_status("vm1", 30, link="DOWN")
    p.b.repctl("-y", "failover", "vm1")
    e2e.check_same(path, kept, "the clone during the commit")
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "30")
    e2e.pwrite(p.b.volume("vm1"), 0, b"\x33" * SIZE, sync=True)
    e2e.check_same(path, kept, "the clone after the survivor has written")
    # one of a checkpoint of the survivor's own
    received = [c["number"] for c in p.b.ctl("checkpoints", name="vm1")["checkpoints"]][-1]
    clone(p.b, "vm1@%d" % received, "d")
    e2e.pwrite(p.b.volume("vm1"), 0, b"\x34" * SIZE, sync=True)
    e2e.check_same(clone_file(p.b, "d"), p.b.checkpoint_file("vm1", received), "a clone on the survivor")
    p.b.restart()
    e2e.check_same(path, kept, "the clone in the end")
    e2e.check_same(clone_file(p.b, "d"), p.b.checkpoint_file("vm1", received), "a clone on the survivor, in the end")
    p.b.stop()
    p.b.repctl("check").says("0 problems")
    p.b.repctl("show", "vm1").says("c@%d" % n)


def test_no_room():
    """A clone's user gets ENOSPC while there is room for replication still; and when there is none at all, a survivor's
    own guest takes it from a clone: that one is lost, says so, and can be removed."""
    disk = Tmpfs(64 * MIB)
    d = e2e.tmp()
    a = Host("a", folder=d).start()
    b = Host("b", folder=d, store=os.path.join(disk.path, "s")).start()
    vol = a.create("vm1", SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0")
    b.wait_synced("vm1")
    n = int(a.repctl("checkpoint", "vm1").out)
    clone(b, "vm1@%d" % n, "c")
    path = clone_file(b, "c")
    e2e.pwrite(path, 0, b"\x22" * MIB, sync=True)
    ballast = disk.fill(leave=5 * MIB)
    check_errno(errno.ENOSPC, "a clone's write without room", e2e.pwrite, path, MIB, b"\x33" * (4 * MIB), sync=True)
    e2e.pwrite(vol, 0, b"\x44" * MIB, sync=True)  # 1 MiB to save there
    a.wait_status("vm1", 20, link="SYNCED", health="ok")
    second = int(a.repctl("checkpoint", "vm1").out)
    check_eq(e2e.pread(path, 0, MIB), b"\x22" * MIB, "what the clone held before")
    a.stop()
    b.repctl("-y", "failover", "vm1", "--wait")
    disk.fill()
    e2e.pwrite(b.volume("vm1"), 0, b"\x55" * SIZE, sync=True)
    check("clone c over it is lost" in b.log_text(), "no line in the log says so")
    check_errno(errno.EIO, "a read of a lost clone", e2e.pread, path, 0, BLOCK)
    check_errno(errno.EIO, "a write to a lost clone", e2e.pwrite, path, 0, b"\x66" * BLOCK)
    check_eq([(c["name"], c["lost"]) for c in b.status("vm1")["clones"]], [("c", True)], "status")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x55, "the survivor's volume")
    os.unlink(ballast)
    b.restart()
    check_errno(errno.EIO, "a read of a lost clone", e2e.pread, path, 0, BLOCK)
    os.unlink(path)
    check(second and b.status("vm1")["clones"] == [], "status after rm")


if __name__ == "__main__":
    e2e.main()
