#!/usr/bin/env python3
"""verify and its repairs, and resize, with real mounts (SPEC 8). Bits are turned over in the files under the daemons."""

import os
import random
import resource
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, MIB, Pair, check, check_eq, wait_for  # noqa: E402

SIZE = 16 * MIB


def flip(path, off):
    with open(path, "r+b", buffering=0) as f:
        f.seek(off)
        byte = f.read(1) or b"\0"
        f.seek(off)
        f.write(bytes([byte[0] ^ 0xff]))


def pair(**kw):
    p = Pair(**kw)
    p.protect("vm1", size=SIZE, keep_last="5")
    e2e.pwrite(p.a.volume("vm1"), 0, os.urandom(4 * MIB), sync=True)
    return p, p.a, p.b


def undo(host, n):
    return os.path.join(host.store, "volumes/vm1/undo-%d.data" % n)


def test_under_fio():
    """No difference while fio writes and verifies what it reads, with checkpoints beside it; then one of each kind is named."""
    e2e.need("fio")
    p, a, b = pair()
    vol = a.volume("vm1")
    a.repctl("set", "vm1", "checkpoint_interval=200ms", "keep_last=2")
    fio = subprocess.Popen(["fio", "--name=v", "--filename=" + vol, "--size=%d" % SIZE, "--direct=1", "--ioengine=psync", "--numjobs=1",
                            "--rw=randwrite", "--bs=4k-64k", "--fsync=50", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64",
                            "--loops=1000", "--runtime=4", "--time_based", "--output-format=terse"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           cwd=e2e.tmp())
    try:
        n = 0
        while fio.poll() is None:
            r = a.repctl("verify", "vm1", json=True)
            check_eq([r["clean"], r["differences"], r["bytes"]], [True, [], SIZE], "a verify beside fio")
            n += 1
        check(n >= 3, "only %d verifies while fio ran" % n)
        # repairs too: the guest's content stays right
        out = fio.communicate()[0].decode()
        check_eq(fio.returncode, 0, "fio: " + out)
    finally:
        fio.kill()
    a.repctl("set", "vm1", "checkpoint_interval=0", "keep_last=5")
    p.same("vm1")


def test_flips():
    p, a, b = pair()
    n = p.checkpoint()
    e2e.pwrite(a.volume("vm1"), 3 * BLOCK, b"\x21" * BLOCK, sync=True)
    p.checkpoint()
    whole = e2e.sha(a.volume("vm1"))

    out = a.repctl("verify", "vm1")
    check_eq(out.out, "", "differences of equal disks")
    out.says("all fits")

    # the secondary's disk
    flip(b.disk("vm1"), 5 * BLOCK + 100)
    r = a.repctl("verify", "vm1", code=9, json=True).json
    want = {"host": "both", "what": "disk", "volume": "vm1", "checkpoint": None, "problem": "differs", "offset": 5 * BLOCK, "length": BLOCK, "repaired": False}
    check_eq(r["differences"], [want], "what a byte of the secondary's disk is called")
    out = a.repctl("verify", "vm1", code=9)
    check(" %d " % (5 * BLOCK) in out.out and "differs" in out.out, "the table", out)
    out.says("--repair")
    out = a.repctl("verify", "vm1", "--repair")
    check("yes" in out.out, "the table after a repair", out)
    out.says("pinned checkpoint")
    check_eq(a.repctl("verify", "vm1", json=True)["differences"], [], "after the repair")
    kept = b.repctl("checkpoints", "vm1", json=True)["checkpoints"][-1]
    check(kept["pinned"], "the checkpoint before a repair is not pinned", kept)
    old = e2e.pread(b.checkpoint_file("vm1", kept["number"]), 5 * BLOCK, BLOCK)
    new = e2e.pread(a.volume("vm1"), 5 * BLOCK, BLOCK)
    check_eq([i for i in range(BLOCK) if old[i] != new[i]], [100], "what the kept checkpoint holds")
    check_eq(e2e.sha(a.volume("vm1")), whole, "the primary's content after the repair of the secondary")
    e2e.fsync(a.volume("vm1"))
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")

    # the primary's, with its pages in the kernel's cache
    with open(a.volume("vm1"), "rb") as cached:
        cached.read(MIB)
        flip(a.disk("vm1"), 9 * BLOCK)
        r = a.repctl("verify", "vm1", code=9, json=True).json
        check_eq([(d["offset"], d["what"]) for d in r["differences"]], [(9 * BLOCK, "disk")], "a byte of the primary's disk")
        out = a.repctl("verify", "vm1", "--repair=from-peer", json=True)
        check_eq([out["repaired_bytes"], out["clean"]], [BLOCK, True], "repair from the peer")
        check(out["checkpoint"] is not None, "no checkpoint before a repair from the peer")
        check_eq(e2e.sha(a.volume("vm1")), whole, "the primary's content after the repair from the peer")
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")

    # an overlay of the secondary
    flip(undo(b, n), 3 * BLOCK + 7)
    r = a.repctl("verify", "vm1", code=9, json=True).json
    check_eq([(d["host"], d["what"], d["checkpoint"], d["problem"], d["offset"], d["length"]) for d in r["differences"]],
             [("secondary", "overlay", n, "checksum", 3 * BLOCK, BLOCK)], "a byte of an overlay")
    a.repctl("verify", "vm1", "--repair", code=9).says("checkpoint %d" % n, "--drop")
    # what it says to do
    for c in [c["number"] for c in b.repctl("checkpoints", "vm1", json=True)["checkpoints"]]:
        if c <= n:
            b.repctl("checkpoints", "vm1", "--drop", str(c), "-y")
    check_eq(a.repctl("verify", "vm1", json=True)["differences"], [], "after the damaged checkpoint was dropped")


def test_ends():
    """By its client, by the lost peer; and by whom it is refused. Its pace is resync_rate's."""
    p, a, b = pair(proxy=True)
    a.repctl("set", "vm1", "resync_rate=1M", "peer_timeout=2s")
    b.repctl("verify", "vm1", code=5).says("primary")
    child = subprocess.Popen([e2e.program("repctl"), "--store", a.store, "--json", "verify", "vm1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    progress = child.stderr.readline()
    check(b'"done"' in progress and b'"total"' in progress, "progress", progress)
    a.repctl("verify", "vm1", code=1).says("another verify")
    child.send_signal(2)
    child.wait(30)
    a.repctl("set", "vm1", "resync_rate=0")
    wait_for(lambda: a.repctl("verify", "vm1", code=None).code == 0, "the verify that was interrupted to end", 30)
    a.repctl("set", "vm1", "resync_rate=1M")
    started = time.monotonic()
    a.repctl("--timeout", "1", "verify", "vm1", code=124)
    check(time.monotonic() - started < 4, "a time limit")
    child = subprocess.Popen([e2e.program("repctl"), "--store", a.store, "--json", "verify", "vm1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stderr.readline()
    p.proxy.down()
    check_eq(child.wait(30), 6, "a verify whose peer is lost")
    check(b"connection" in child.stderr.read(), "its message")
    a.wait_status("vm1", 30, link="DOWN")
    a.repctl("verify", "vm1", code=6)
    p.proxy.up()
    a.repctl("set", "vm1", "resync_rate=0")
    a.wait_synced("vm1")
    a.repctl("verify", "vm1")


def test_resize():
    """Both hosts grow under fio; open handles see it, older checkpoints do not change."""
    e2e.need("fio")
    p, a, b = pair()
    vol = a.volume("vm1")
    n = p.checkpoint()
    old = e2e.sha(vol)
    fio = subprocess.Popen(["fio", "--name=v", "--filename=" + vol, "--size=%d" % SIZE, "--direct=1", "--ioengine=psync", "--numjobs=1",
                            "--rw=randwrite", "--bs=4k-64k", "--fsync=50", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64",
                            "--loops=1000", "--runtime=4", "--time_based", "--output-format=terse"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           cwd=e2e.tmp())
    try:
        with open(vol, "r+b", buffering=0) as f, open(b.volume("vm1"), "rb", buffering=0) as g:
            for i in range(1, 5):
                size = SIZE + i * (MIB + 512)
                a.repctl("resize", "vm1", str(size)).says("blockresize")
                for h, what in ((f, "primary"), (g, "secondary")):
                    check_eq(os.fstat(h.fileno()).st_size, size, "the size by an open handle of the " + what)
                    check_eq(h.seek(0, os.SEEK_END), size, "the end by an open handle of the " + what)
                f.seek(size - 512)
                f.write(b"\x44" * 512)
                e2e.check_errno(27, "a write past the new end", os.pwrite, f.fileno(), b"x" * 512, size)
            os.ftruncate(f.fileno(), size)  # what QEMU does for a block_resize
            e2e.check_errno(1, "ftruncate to another size", os.ftruncate, f.fileno(), size + 512)
        out = fio.communicate()[0].decode()
        check_eq(fio.returncode, 0, "fio: " + out)
    finally:
        fio.kill()
    check_eq([h.status("vm1")["volumes"][0]["size"] for h in (a, b)], [size] * 2, "the size by both status")
    check_eq(e2e.pread(vol, SIZE, MIB - 512), bytes(MIB - 512), "the new part")
    new = p.checkpoint()
    check_eq(os.stat(b.checkpoint_file("vm1", n)).st_size, SIZE, "an older checkpoint's size")
    check_eq(e2e.sha(b.checkpoint_file("vm1", n)), old, "an older checkpoint")
    check_eq(os.stat(b.checkpoint_file("vm1", new)).st_size, size, "a newer checkpoint's size")
    out = os.path.join(e2e.tmp(), "out")
    b.repctl("export", "vm1@%d" % n, out)
    check_eq(e2e.sha(out), old, "an export of the older checkpoint")
    p.same("vm1")
    a.repctl("verify", "vm1")
    a.repctl("resize", "vm1", str(SIZE), code=2).says("never shrinks")
    b.repctl("resize", "vm1", "1G", code=5).says("primary")
    a.repctl("resize", "vm2", "1G", code=4)
    e2e.fsync(vol)
    a.kill9()
    b.wait_status("vm1", 30, link="DOWN")
    b.repctl("-y", "failover", "vm1", "--to", str(n), "--wait")
    with open(b.volume("vm1"), "rb") as f:
        data = f.read()
    check_eq(len(data), size, "the size after a failover to a smaller checkpoint")
    check(data[SIZE:] == bytes(size - SIZE), "past the checkpoint's end it is not zeroes")
    import hashlib
    check_eq(hashlib.sha256(data[:SIZE]).hexdigest(), old, "the content after a failover to a smaller checkpoint")


def test_resize_refused():
    """A secondary that can't have a file of that size stops it before anything has changed, on either host."""
    p, a, b = pair()
    resource.prlimit(b.pid(), resource.RLIMIT_FSIZE, (2 * SIZE, 2 * SIZE))
    a.repctl("resize", "vm1", str(4 * SIZE), code=1).says("peer", "no space", "nothing was changed")
    for h in (a, b):
        check_eq(os.stat(h.volume("vm1")).st_size, SIZE, "the size after a refusal")
        check_eq(os.stat(h.disk("vm1")).st_size, SIZE, "the file's size after a refusal")
    a.repctl("resize", "vm1", str(2 * SIZE))
    e2e.pwrite(a.volume("vm1"), 2 * SIZE - BLOCK, b"\x31" * BLOCK, sync=True)
    p.same("vm1")
    # more than the filesystem under the store is large
    ram = e2e.Tmpfs(64 * MIB)
    c = e2e.Host("c", store=os.path.join(ram.path, "s")).start()
    c.create("vm3", 16 * MIB)
    c.repctl("resize", "vm3", "65M", code=1).says("no space")
    c.repctl("resize", "vm3", "48M")
    check_eq(os.stat(c.volume("vm3")).st_size, 48 * MIB, "a standalone volume's size")


def test_resize_killed():
    """Either host is killed while it grows: the pair comes back with one size, and all bytes."""
    p, a, b = pair()
    vol, size, rng = a.volume("vm1"), SIZE, random.Random(55)
    a.repctl("set", "vm1", "peer_timeout=1s")
    kept = SIZE - 2 * BLOCK  # not where the rounds write: one whose resize is killed early leaves the size as it is
    e2e.pwrite(vol, kept, b"\x41" * BLOCK, sync=True)
    for i in range(8):
        want = size + MIB
        child = subprocess.Popen([e2e.program("repctl"), "--store", a.store, "resize", "vm1", str(want)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(rng.random() * 0.012)
        victim = (a, b)[i % 2]
        victim.kill9()
        child.wait(30)
        victim.start()
        a.wait_synced("vm1")
        b.wait_status("vm1", 30, state="RUNNING")
        sizes = [os.stat(h.volume("vm1")).st_size for h in (a, b)]
        check(sizes[0] == sizes[1] and sizes[0] in (size, want), "sizes after a kill", size, want, sizes)
        size = sizes[0]
        e2e.pwrite(vol, size - BLOCK, bytes([0x60 + i]) * BLOCK, sync=True)
    a.repctl("resize", "vm1", str(size + MIB))
    p.same("vm1")
    e2e.check_bytes(vol, kept, BLOCK, 0x41, "what was there before")


if __name__ == "__main__":
    e2e.main()
