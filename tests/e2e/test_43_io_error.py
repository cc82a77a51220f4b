#!/usr/bin/env python3
"""Local disk errors on the primary: on_io_error=detach and pass, `resync` (SPEC 6, 8; docs/adr/0009-detach.md).

The errors are those of tests/preload/badio.c, preloaded into the daemon, as no device-mapper can be had everywhere; the
last test has a loop device whose medium is full, where the kernel itself answers EIO to fsync."""

import errno
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, MIB, BadIo, Host, check, check_eq, check_errno, wait_for  # noqa: E402

SIZE = 8 * MIB
REGION = 64 << 10  # what is dirty is known by these


def pair(store=None, **settings):
    """vm1, all 0x11, in sync; a's daemon meets what the returned BadIo is told."""
    bad = BadIo()
    d = e2e.tmp()
    a = Host("a", folder=d, env=bad.env, store=store).start()
    b = Host("b", folder=d).start()
    vol = a.create("vm1", SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0", "peer_timeout=2s", *("%s=%s" % i for i in settings.items()))
    b.wait_synced("vm1")
    return bad, a, b, vol


def detached(a):
    return a.status("vm1")["volumes"][0]["detached"]


def whole_again(a, b, vol):
    check(not detached(a), "it is detached after resync --wait")
    a.wait_status("vm1", 60, link="SYNCED", health="ok", error=None)
    check_eq(a.status("vm1")["generation"], b.status("vm1")["generation"], "generations")
    a.repctl("checkpoint", "vm1")
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")
    e2e.check_same(vol, b.volume("vm1"), "primary and view")


def test_guest_runs_on():
    """A guest that verifies what it reads notices neither the detach nor the rebuild."""
    e2e.need("fio")
    bad, a, b, vol = pair()
    fio = subprocess.Popen(["fio", "--name=v", "--filename=" + vol, "--size=%d" % SIZE, "--direct=1", "--ioengine=psync", "--numjobs=1",
                            "--rw=randwrite", "--bs=4k-32k", "--fsync=20", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=50",
                            "--loops=1000", "--runtime=8", "--time_based", "--output-format=terse"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           cwd=e2e.tmp())  # fio leaves a file there
    try:
        wait_for(lambda: a.status("vm1")["counters"]["writes"] > 200, "fio to write", 60)
        bad.fail("w", "*/disk.raw")
        wait_for(lambda: detached(a), "the disk to be detached", 60)
        st = a.status("vm1")
        check_eq(st["health"], "degraded", "health")
        check(any("vm1" in r and "detached" in r for r in st["reasons"]), "reasons: %r" % st["reasons"])
        before = st["counters"]["writes"]
        wait_for(lambda: a.status("vm1")["counters"]["writes"] > before + 100, "writes through the peer", 60)
        a.repctl("error", "vm1", code=7).says("detached")
        a.repctl("stop", "vm1", code=5).says("detached")
        a.repctl("pause", "vm1", code=5).says("detached")
        bad.mend()
        a.repctl("resync", "vm1", "--wait")
        out, _ = fio.communicate(timeout=120)
        check_eq(fio.returncode, 0, "fio: " + out.decode()[-2000:])
    finally:
        fio.kill()
        fio.wait()
    e2e.fsync(vol)
    whole_again(a, b, vol)
    a.repctl("resync", "vm1", code=5).says("no disk of it is detached")


def test_failover_has_all():
    """The peer can take over at any time: every completed write is there, flushed or not."""
    bad, a, b, vol = pair(protocol="A")
    bad.fail("ws", "*/disk.raw")
    fd = os.open(vol, os.O_RDWR | os.O_DIRECT)
    for i in range(64):
        os.pwrite(fd, memoryview(e2e.aligned(bytes([0x20 + i]) * BLOCK)), i * 3 * BLOCK)
    a.kill9()
    b.wait_status("vm1", 60, link="DOWN")
    b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    for i in range(64):
        e2e.check_bytes(b.volume("vm1"), i * 3 * BLOCK, BLOCK, 0x20 + i, "a completed write")
    # its old primary learns that, and the survivor makes it follow, with all that its disk lacks
    bad.mend()
    a.start()
    a.wait_status("vm1", 60, role="secondary")
    b.repctl("failback", "vm1", "--peer", a.listen, "--wait")
    wait_for(lambda: b.repctl("checkpoint", "vm1", code=None).out.strip(), "a checkpoint", 60)
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")


def test_fsync_error():
    """A failed fsync of the local disk is neither the guest's nor repeated into success: the peer has flushed it."""
    bad, a, b, vol = pair()
    e2e.pwrite(vol, 0, b"\x31" * BLOCK)
    bad.fail("s", "*/disk.raw")
    e2e.fsync(vol)
    check(detached(a), "the disk goes on being used after a failed fsync")
    bad.mend()
    e2e.pwrite(vol, BLOCK, b"\x32" * BLOCK, sync=True)
    check(detached(a), "it came back by itself")
    e2e.check_bytes(b.disk("vm1"), 0, BLOCK, 0x31, "the peer's disk", direct=False)
    e2e.check_bytes(b.disk("vm1"), BLOCK, BLOCK, 0x32, "the peer's disk", direct=False)
    check(e2e.pread(a.disk("vm1"), BLOCK, BLOCK, direct=False) != b"\x32" * BLOCK, "the local disk was written")
    a.repctl("resync", "vm1", "--wait")
    whole_again(a, b, vol)


def test_restart_and_lost_peer():
    """Over restarts of either side it stays detached; without the peer its I/O is an error, at once or within peer_timeout."""
    bad, a, b, vol = pair()
    bad.fail("w", "*/disk.raw")
    e2e.pwrite(vol, 0, b"\x41" * BLOCK, sync=True)
    check(detached(a), "not detached")
    bad.mend()
    a.restart()
    e2e.check_bytes(vol, 0, BLOCK, 0x41, "after a restart of the primary")
    check(detached(a), "a restart forgot it")
    b.kill9()
    t = time.monotonic()
    check_errno(errno.EIO, "a read without the peer", e2e.pread, vol, 0, BLOCK)
    check_errno(errno.EIO, "a write without the peer", e2e.pwrite, vol, 0, b"\x42" * BLOCK)
    check(time.monotonic() - t < 30 * e2e.SLOW, "an error took %.1f s" % (time.monotonic() - t))
    a.restart()
    check_errno(errno.EIO, "a stale disk passes for current", e2e.pread, vol, 0, BLOCK)
    b.start()
    a.wait_status("vm1", 60, link="SYNCED")
    check(detached(a), "the peer's restart forgot it")
    e2e.check_bytes(vol, 0, BLOCK, 0x41, "through the peer again")
    a.repctl("set", "vm1", "resync_rate=2M")
    a.repctl("resync", "vm1")
    wait_for(lambda: (a.status("vm1")["resync"] or {}).get("done", 0) > 0, "progress", 60)
    a.restart()
    a.repctl("set", "vm1", "resync_rate=0")
    a.repctl("wait", "vm1", "--for=in-sync")
    whole_again(a, b, vol)


def test_pass():
    """The error is the guest's; the pair is not in sync before the range could be read and sent again."""
    bad, a, b, vol = pair(on_io_error="pass")
    bad.fail("w", "*/disk.raw")
    check_errno(errno.EIO, "a write", e2e.pwrite, vol, 0, b"\x51" * BLOCK)
    check(not detached(a), "detached under pass")
    bad.mend()
    a.wait_status("vm1", 60, link="SYNCED", health="ok", error=None)
    e2e.pwrite(vol, 0, b"\x52" * BLOCK, sync=True)
    whole_again(a, b, vol)


def dead_disk_is_seen(vol, a):
    """The region at 64 KiB differs from the peer's, nothing else does, and the disk can neither be read nor written."""
    e2e.check_bytes(vol, 0, REGION, 0x11, "a range that the peer has")
    check_errno(errno.EIO, "a range that the peer lacks", e2e.pread, vol, REGION, REGION)
    check_errno(errno.EIO, "a range that the peer lacks a part of", e2e.pread, vol, REGION - BLOCK, 2 * BLOCK)
    check_errno(errno.EIO, "a write", e2e.pwrite, vol, 4 * MIB, b"\x72" * BLOCK)
    check_errno(errno.EIO, "what was written where it failed", e2e.pread, vol, 4 * MIB, BLOCK)
    e2e.check_bytes(vol, 5 * MIB, MIB, 0x11, "more that the peer has")
    check(not detached(a), "detached, though the peer lacks a range")


def test_not_in_sync():
    """Paused, in a resync, without the peer: nothing is detached. Reads are the peer's where it has the range, all else is EIO;
    mended, the disk is still the one that the peer is synced from."""
    bad, a, b, vol = pair()
    a.wait_status("vm1", 60, dirty_bytes=0)
    a.repctl("pause", "vm1")
    e2e.pwrite(vol, REGION, b"\x71" * REGION, sync=True)
    bad.fail("rw", "*/disk.raw")
    dead_disk_is_seen(vol, a)
    a.repctl("resume", "vm1")
    a.wait_status("vm1", 60, link="RESYNC")
    dead_disk_is_seen(vol, a)
    b.kill9()
    a.wait_status("vm1", 60, link="DOWN")
    check_errno(errno.EIO, "a read without the peer", e2e.pread, vol, 0, REGION)
    check_errno(errno.EIO, "a write without the peer", e2e.pwrite, vol, 0, b"\x73" * BLOCK)
    bad.mend()
    e2e.check_bytes(vol, 0, REGION, 0x11, "a write that failed has written nothing")
    b.start()
    a.wait_status("vm1", 60, link="SYNCED", health="ok", error=None)
    e2e.check_bytes(vol, REGION, REGION, 0x71, "what was written while paused")
    e2e.check_bytes(vol, 4 * MIB, BLOCK, 0x11, "a write that failed has written nothing")
    whole_again(a, b, vol)


def test_survivor_has_forgotten_it():
    """The peer took over and was unprotected: the old primary, whose disk lacks what went through the peer, is told by nobody.
    `unprotect --force` takes that disk as it is; what the survivor holds is not written over by it."""
    bad, a, b, vol = pair()
    bad.fail("w", "*/disk.raw")
    e2e.pwrite(vol, 0, b"\x81" * MIB, sync=True)
    check(detached(a), "not detached")
    a.repctl("unprotect", "vm1", "--force", code=5).says("connected")
    a.stop()
    bad.mend()
    b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    b.repctl("unprotect", "vm1")
    a.start()
    check_errno(errno.EIO, "a read of what only the survivor has", e2e.pread, vol, 0, BLOCK)
    a.repctl("unprotect", "vm1", code=5).says("--force")
    a.repctl("unprotect", "vm1", "--force")
    st = a.status("vm1")
    check_eq((st["role"], st["state"], detached(a)), ("standalone", "DONE", False), "after unprotect --force")
    e2e.check_bytes(vol, 0, MIB, 0x11, "the disk as it is")
    e2e.check_bytes(b.volume("vm1"), 0, MIB, 0x81, "the survivor's")
    a.repctl("protect", "vm1", "--peer", b.listen, code=5).says("--adopt")
    e2e.check_bytes(b.volume("vm1"), 0, MIB, 0x81, "the survivor's")


def test_full_medium():
    """Real EIO: a filesystem on a loop device whose backing file cannot grow any more."""
    e2e.need_root()
    e2e.need("mkfs.ext4", "losetup")
    ram = e2e.Tmpfs(24 * MIB)
    image, folder = os.path.join(ram.path, "image"), e2e.tmp("fs")
    os.makedirs(folder, exist_ok=True)
    with open(image, "wb") as f:
        f.truncate(64 * MIB)
    e2e.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard", "-O", "^has_journal", image])
    if e2e.run(["mount", "-o", "loop", image, folder], code=None).returncode != 0:
        raise e2e.Skip("loop devices cannot be had here")
    try:
        d = e2e.tmp()
        a = Host("a", folder=d, store=os.path.join(folder, "s")).start()
        b = Host("b", folder=d).start()
        vol = a.create("vm1", SIZE)
        a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
        a.repctl("set", "vm1", "checkpoint_interval=0")
        b.wait_synced("vm1")
        ram.fill()
        for i in range(8):
            e2e.pwrite(vol, i * MIB, bytes([0x61 + i]) * MIB, sync=True)
        check(detached(a), "the kernel reported no error: is the medium full?")
        for i in range(8):
            e2e.check_bytes(vol, i * MIB, MIB, 0x61 + i, "through the peer")
        a.kill9()
        b.wait_status("vm1", 60, link="DOWN")
        b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
        for i in range(8):
            e2e.check_bytes(b.volume("vm1"), i * MIB, MIB, 0x61 + i, "flushed before the medium's end")
    finally:
        e2e.close_all()
        e2e.run(["umount", "-l", folder], code=None)


if __name__ == "__main__":
    e2e.main()
