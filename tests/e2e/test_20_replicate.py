#!/usr/bin/env python3
"""Two hosts: protection, the write protocols, checkpoints, the secondary's view, failover, stop and start, and every
refusal's message and exit code (SPEC 5, 6, 7, 14)."""

import errno
import json
import mmap
import os
import random
import re
import shutil
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, GIB, KIB, MIB, Host, Pair, check, check_eq, check_errno, wait_for  # noqa: E402

GROUP_KEYS = {"group", "role", "state", "link", "protocol", "health", "reasons", "peer", "generation", "checkpoint",
              "checkpoint_age_s", "checkpoint_valid", "split_brain", "rpo_s", "dirty_bytes", "queue_bytes", "resync", "commit",
              "error", "counters", "volumes", "jobs", "clones"}
COUNTER_KEYS = {"writes", "write_bytes", "flushes", "sent_bytes", "received_bytes", "resync_bytes", "cow_bytes", "checkpoints",
                "reconnects"}
VOLUME_KEYS = {"name", "id", "size", "path", "detached", "active_bytes", "hidden_bytes", "history_bytes", "checkpoints",
               "base"}
RFC3339 = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")

SIZE = 4 * MIB
HALF = SIZE // 2


def extents(host, layer):
    doc = host.repctl("extents", layer, json=True)
    return e2e.merge_extents([(x["offset"], x["length"]) for x in doc["extents"]])


def overlay_bytes(host, group="vm1"):
    v = host.status(group)["volumes"]
    return sum(x["active_bytes"] for x in v), sum(x["hidden_bytes"] for x in v)


def started(fill=0x11, **kw):
    """A pair in sync; the primary holds `fill` everywhere, and a checkpoint has been taken of that."""
    p = Pair()
    (vol,) = p.protect(size=SIZE, **kw)
    e2e.pwrite(vol, 0, bytes([fill]) * SIZE, sync=True)
    n = p.checkpoint()
    return p, vol, p.b.volume("vm1"), n


# ---- the cases of the replication unit test, by meaning ----------------------------------------------------------------


def test_unstarted():
    h = Host("a").start()
    vol = h.create("vm1", SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE)
    e2e.check_bytes(vol, 0, SIZE, 0x11, "a standalone volume")
    for verb in ("stop", "checkpoint", "error"):
        h.repctl(verb, "vm1", code=5).says("vm1")
    h.repctl("-y", "failover", "vm1", code=5).says("vm1")
    h.repctl("start", "vm1", code=5).says("protect")
    h.repctl("discard", "vm1", code=5)
    h.repctl("wait", "vm1", "--for=in-sync", "--timeout", "0.3", code=(5, 124))


def test_primary_operations():
    p, vol, _, n = started()
    e2e.check_bytes(vol, 0, SIZE, 0x11, "the primary")
    e2e.pwrite(vol, HALF, b"\x22" * HALF, sync=True)
    e2e.check_bytes(vol, HALF, HALF, 0x22, "the primary's write")
    check_eq(p.checkpoint() > n, True, "checkpoint numbers grow")
    p.a.repctl("error", "vm1").says("clean")
    p.a.repctl("stop", "vm1")
    for h in (p.a, p.b):
        check_eq(h.status("vm1")["state"], "DONE", "state after stop on " + h.name)
    e2e.pwrite(vol, 0, b"\x33" * BLOCK)
    e2e.check_bytes(vol, 0, BLOCK, 0x33, "a stopped primary goes on")


def test_secondary_view_and_failover():
    p, vol, view, n = started()
    e2e.check_bytes(view, 0, SIZE, 0x11, "the view at the checkpoint")
    e2e.pwrite(vol, HALF, b"\x22" * HALF, sync=True)
    e2e.check_bytes(p.b.disk("vm1"), HALF, HALF, 0x22, "the secondary disk after the primary's write")
    e2e.check_bytes(view, 0, SIZE, 0x11, "the view after the primary's write")
    e2e.pwrite(view, 0, b"\x33" * HALF)
    e2e.check_bytes(view, 0, HALF, 0x33, "the secondary's own write")
    e2e.check_bytes(view, HALF, HALF, 0x11, "the rest of the view")
    e2e.check_bytes(p.b.disk("vm1"), 0, HALF, 0x11, "the secondary disk under the own write")
    check_eq(overlay_bytes(p.b), (HALF, HALF), "active and hidden bytes")
    t = time.monotonic()
    doc = p.b.repctl("-y", "failover", "vm1", json=True)
    check(time.monotonic() - t < 20.0, "failover took %.2f s" % (time.monotonic() - t))
    check_eq((doc["group"], doc["checkpoint"]), ("vm1", n), "what failover --json says")
    check(doc["received_checkpoint"] > n and doc["received_bytes"] >= HALF and doc["age_s"] >= 0, "failover says %r" % doc)
    # at once, whether the commit has ended or not
    e2e.check_bytes(view, 0, HALF, 0x33, "lower half right after failover")
    e2e.check_bytes(view, HALF, HALF, 0x11, "upper half right after failover")
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "20")
    e2e.check_bytes(view, 0, HALF, 0x33, "lower half after the commit")
    e2e.check_bytes(view, HALF, HALF, 0x11, "upper half after the commit")
    e2e.check_bytes(p.b.disk("vm1"), 0, HALF, 0x33, "lower half of the disk")
    e2e.check_bytes(p.b.disk("vm1"), HALF, HALF, 0x11, "upper half of the disk")
    st = p.b.status("vm1")
    check_eq((st["role"], st["state"], st["commit"]), ("standalone", "DONE", None), "the survivor")
    # all that was received is kept
    got = p.b.checkpoint_file("vm1", doc["received_checkpoint"])
    e2e.check_bytes(got, HALF, HALF, 0x22, "upper half of the checkpoint as received")
    e2e.check_bytes(got, 0, HALF, 0x11, "lower half of the checkpoint as received")
    again = p.b.repctl("-y", "failover", "vm1", json=True)
    check_eq((again["checkpoint"], again["received_checkpoint"]), (n, doc["received_checkpoint"]), "the same failover again")
    p.b.repctl("-y", "failover", "vm1", "--to", "latest", code=5)
    e2e.pwrite(view, 0, b"\x44" * SIZE, sync=True)
    e2e.check_bytes(view, 0, SIZE, 0x44, "the survivor writes")
    e2e.check_bytes(got, HALF, HALF, 0x22, "the checkpoint after the survivor's write")


def test_secondary_checkpoint():
    p, vol, view, n = started()
    e2e.pwrite(vol, HALF, b"\x22" * HALF, sync=True)
    e2e.pwrite(view, 0, b"\x33" * HALF)
    m = p.checkpoint()
    check(m > n, "numbers grow: %d, %d" % (n, m))
    e2e.check_bytes(view, 0, HALF, 0x11, "lower half: the own write is discarded")
    e2e.check_bytes(view, HALF, HALF, 0x22, "upper half: the primary's write is in")
    check_eq(overlay_bytes(p.b), (0, 0), "active and hidden bytes after a checkpoint")
    check_eq((extents(p.b, "overlays/vm1/active"), extents(p.b, "overlays/vm1/hidden")), ([], []), "extents")
    e2e.check_bytes(p.b.checkpoint_file("vm1", n), 0, SIZE, 0x11, "the older checkpoint")
    e2e.check_bytes(p.b.checkpoint_file("vm1"), HALF, HALF, 0x22, "checkpoints/vm1/latest")
    check_eq(os.readlink(p.b.checkpoint_file("vm1")), str(m), "latest")
    for h in (p.a, p.b):
        wait_for(lambda: h.status("vm1")["checkpoint"] == m, "checkpoint %d in the status of %s" % (m, h.name), 5)


def test_continuous_replication():
    """After a failover the survivor protects itself again, to a third host."""
    p, vol, view, _ = started()
    e2e.pwrite(view, 0, b"\x33" * HALF)
    p.b.repctl("-y", "failover", "vm1", "--wait")
    c = Host("c", folder=p.dir).start()
    p.b.repctl("protect", "vm1", "--peer", c.listen, "--wait")
    p.b.repctl("set", "vm1", "checkpoint_interval=0")
    e2e.check_bytes(c.volume("vm1"), 0, HALF, 0x33, "lower half on the new secondary")
    e2e.check_bytes(c.volume("vm1"), HALF, HALF, 0x11, "upper half on the new secondary")
    e2e.pwrite(view, HALF, b"\x55" * HALF, sync=True)
    p.b.repctl("checkpoint", "vm1")
    e2e.check_bytes(c.volume("vm1"), HALF, HALF, 0x55, "upper half after the checkpoint")
    c.repctl("-y", "failover", "vm1", "--wait")
    # b's mount answers EIO once it has heard of that; its disk stays what it was
    e2e.check_same(p.b.disk("vm1"), c.volume("vm1"), "the two survivors")


def test_failover_to_latest_and_number():
    p, vol, view, n = started()
    e2e.pwrite(vol, HALF, b"\x22" * HALF, sync=True)
    e2e.pwrite(view, 0, b"\x33" * BLOCK)
    p.b.repctl("-y", "failover", "vm1", "--to", "latest", code=5).says("discard-active")
    p.b.repctl("-y", "failover", "vm1", "--to", str(n), code=5).says("discard-active")
    check_eq(p.b.status("vm1")["state"], "RUNNING", "state after a refused failover")
    p.b.repctl("-y", "failover", "vm1", "--to", "9999", "--discard-active", code=4).says("9999")
    doc = p.b.repctl("-y", "failover", "vm1", "--to", "latest", "--discard-active", "--wait", json=True)
    check(doc["received_checkpoint"] >= n, "failover --to latest says %r" % doc)
    e2e.check_bytes(view, 0, HALF, 0x11, "lower half")
    e2e.check_bytes(view, HALF, HALF, 0x22, "upper half")

    p, vol, view, n = started()
    e2e.pwrite(vol, 0, b"\x22" * SIZE, sync=True)
    m = p.checkpoint()
    e2e.pwrite(vol, 0, b"\x55" * SIZE, sync=True)
    p.checkpoint()
    e2e.pwrite(vol, 0, b"\x66" * BLOCK, sync=True)
    doc = p.b.repctl("-y", "failover", "vm1", "--to", str(m), "--wait", json=True)
    check_eq(doc["checkpoint"], m, "failover --to N says")
    e2e.check_bytes(view, 0, SIZE, 0x22, "the view at checkpoint N")
    e2e.check_bytes(p.b.checkpoint_file("vm1", n), 0, SIZE, 0x11, "an older checkpoint, still kept")
    e2e.check_bytes(p.b.checkpoint_file("vm1", doc["received_checkpoint"]), 0, BLOCK, 0x66, "the checkpoint as received")
    check_eq(p.b.repctl("get", "vm1", json=True)["settings"]["failover_to"], "checkpoint", "failover_to")


def test_failover_to_setting_and_exclusive():
    p, vol, view, n = started()
    p.a.repctl("set", "vm1", "failover_to=latest")
    wait_for(lambda: p.b.ctl("get", name="vm1")["settings"]["failover_to"] == "latest", "the setting on the peer", 5)
    e2e.pwrite(vol, 0, b"\x22" * BLOCK, sync=True)
    p.b.repctl("-y", "failover", "vm1", "--wait")
    e2e.check_bytes(view, 0, BLOCK, 0x22, "with failover_to=latest")
    # the old primary, still connected, is shut out
    p.a.wait_status("vm1", 15, role=("secondary", "primary"), link="DOWN")
    wait_for(lambda: e2e.errno_of(e2e.pwrite, vol, 0, b"\x77" * BLOCK) != 0 or p.a.status("vm1")["health"] != "ok",
             "the old primary to notice")
    e2e.check_bytes(view, 0, BLOCK, 0x22, "the survivor after writes of the old primary")


# ---- overlays --------------------------------------------------------------------------------------------------------


def test_overlay_files():
    p = Pair()
    size = 64 * MIB
    (vol,) = p.protect(size=size)
    rng = random.Random(1)
    base = bytearray(size)
    for off in range(0, size, 4 * MIB):
        base[off:off + MIB] = rng.randbytes(MIB)
    e2e.pwrite(vol, 0, bytes(base), sync=True)
    p.checkpoint()
    view = p.b.volume("vm1")
    # sub-block, block-crossing, zeroes over data, data over holes
    want_hidden, want_active = set(), set()
    prim, own = bytearray(base), bytearray(base)
    for _ in range(120):
        off, n = rng.randrange(size // 512 - 64) * 512, rng.randrange(1, 60) * 512
        kind = rng.randrange(4)
        blocks = range(off // BLOCK, (off + n - 1) // BLOCK + 1)
        if kind == 0:
            data = bytes(n)
            e2e.zero_range(vol, off, n)
        else:
            data = rng.randbytes(n)
            e2e.pwrite(vol, off, data)
        prim[off:off + n] = data
        want_hidden.update(blocks)
    for _ in range(60):
        off, n = rng.randrange(size - 100000), rng.choice((1, 100, 4096, 50000))
        data = rng.randbytes(n) if rng.random() < 0.8 else bytes(n)
        e2e.pwrite(view, off // 512 * 512, bytes(own[off // 512 * 512:off]) + data +
                   bytes(own[off + n:-(-(off + n) // 512) * 512]))
        own[off:off + n] = data
        lo, hi = off // 512 * 512, -(-(off + n) // 512) * 512
        want_active.update(range(lo // BLOCK, (hi - 1) // BLOCK + 1))
    e2e.fsync(vol)
    e2e.expect_file(vol, prim, "the primary")
    e2e.expect_file(p.b.disk("vm1"), prim, "the secondary disk")
    e2e.expect_file(view, own, "the view")

    def to_extents(blocks):
        return e2e.merge_extents([(b * BLOCK, BLOCK) for b in blocks])

    hidden = extents(p.b, "overlays/vm1/hidden")
    # A zero over a hole changes nothing and need not be saved; what is saved must have been touched.
    got = {b for off, n in hidden for b in range(off // BLOCK, (off + n) // BLOCK)}
    check(got <= want_hidden, "hidden holds blocks that nobody wrote")
    changed = {b for b in want_hidden if prim[b * BLOCK:(b + 1) * BLOCK] != base[b * BLOCK:(b + 1) * BLOCK]}
    check(changed <= got, "hidden lacks blocks that changed")
    for b in sorted(got)[::5]:
        check(e2e.pread(p.b.hidden("vm1"), b * BLOCK, BLOCK) == bytes(base[b * BLOCK:(b + 1) * BLOCK]), "block %d of hidden" % b)
    check_eq(extents(p.b, "overlays/vm1/active"), to_extents(want_active), "extents of active")
    for b in sorted(want_active)[::3]:
        check(e2e.pread(p.b.active("vm1"), b * BLOCK, BLOCK) == bytes(own[b * BLOCK:(b + 1) * BLOCK]), "block %d of active" % b)
    for layer, path in (("hidden", p.b.hidden("vm1")), ("active", p.b.active("vm1"))):
        ext = extents(p.b, "overlays/vm1/" + layer)
        total = sum(n for _, n in ext)
        check_eq(e2e.data_extents(path), ext, "SEEK_DATA of %s and repctl extents" % layer)
        check_eq(os.stat(path).st_size, size, "size of " + layer)
        check_eq(e2e.allocated(path), total, "st_blocks of " + layer)
        st = p.b.status("vm1")["volumes"][0]
        check_eq(st[layer + "_bytes"], total, "%s_bytes" % layer)
        if shutil.which("qemu-img"):
            m = json.loads(e2e.run(["qemu-img", "map", "--output=json", "-f", "raw", "-U", path]).stdout)
            check_eq(e2e.merge_extents([(x["start"], x["length"]) for x in m if x["data"]]), ext, "qemu-img map of " + layer)
        copy = os.path.join(p.dir, "copy")
        e2e.run(["cp", "--sparse=auto", path, copy])
        e2e.check_same(path, copy, "cp of " + layer)
        check(e2e.allocated(copy) <= total + 64 * KIB, "cp of %s takes %d bytes for %d" % (layer, e2e.allocated(copy), total))
        os.unlink(copy)
    line = p.b.repctl("extents", "overlays/vm1/active").out.splitlines()
    check(line, "extents prints nothing")
    p.b.repctl("extents", "overlays/nope/active", code=4)
    p.b.repctl("extents", "overlays/vm1/other", code=2)
    # text output of discard, and what is left
    p.b.repctl("discard", "vm1").says("discarded")
    e2e.expect_file(view, base, "the view after discard")
    check_eq(extents(p.b, "overlays/vm1/active"), [], "active after discard")
    n = p.checkpoint()
    e2e.expect_file(view, prim, "the view after a checkpoint")
    e2e.expect_file(p.b.checkpoint_file("vm1", n), prim, "the checkpoint")


def test_view_is_stable_while_primary_writes():
    """I8: a reader of the view never sees a write of the primary since the checkpoint, nor a torn block."""
    p = Pair()
    size = 8 * MIB
    (vol,) = p.protect(size=size)
    log = e2e.Log({"vm1": size})
    w = e2e.Writer(log, {"vm1": vol}, threads=4)
    view = p.b.volume("vm1")
    for round_ in range(3):
        w.start()
        w.wait_ops(300)
        w.pause()
        p.checkpoint()
        at = e2e.sha(view)
        e2e.check_same(vol, view, "the view and the quiet primary")
        ckpt_time = time.monotonic_ns()
        w.resume()
        t, n = time.monotonic(), 0
        cached = open(view, "rb", buffering=0)
        ops = w.ops
        while n < 2 or w.ops < ops + 50 or time.monotonic() - t < 1.0:  # two reads, with writes between them
            w.check_errors()
            got = e2e.pread(view, 0, size)
            check(e2e.hashlib.sha256(got).hexdigest() == at, "a direct read of the view changed in round %d" % round_)
            cached.seek(0)
            data = b"".join(iter(lambda: cached.read(MIB), b""))
            check(e2e.hashlib.sha256(data).hexdigest() == at, "a cached read of the view changed in round %d" % round_)
            n += 1
        cached.close()
        w.stop()
        log.verify({"vm1": view}, newest=ckpt_time)


def test_view_writes_while_primary_writes():
    """The secondary's guest writes (and reads back) while the primary's does; then fail over: I1 exactly."""
    p = Pair()
    size = 8 * MIB
    (vol,) = p.protect(size=size)
    prim = e2e.Log({"vm1": size})
    w = e2e.Writer(prim, {"vm1": vol}, threads=3).start()
    w.wait_ops(300)
    w.pause()
    p.checkpoint()
    view = p.b.volume("vm1")
    image = bytearray(e2e.pread(view, 0, size))
    w.resume()
    rng = random.Random(3)
    for i in range(150):
        n = rng.randrange(1, 24) * 512
        off = rng.randrange((size - n) // 512) * 512
        kind = rng.randrange(5)
        data = bytes(n) if kind == 0 else rng.randbytes(n)
        e2e.zero_range(view, off, n) if kind == 0 else e2e.pwrite(view, off, data)
        image[off:off + n] = data
        o = rng.randrange(size // BLOCK) * BLOCK
        check(e2e.pread(view, o, 4 * BLOCK) == bytes(image[o:o + 4 * BLOCK]), "the view at %d after %d own writes" % (o, i))
    e2e.fsync(view)
    w.wait_ops(100)
    p.b.repctl("-y", "failover", "vm1")
    e2e.expect_file(view, image, "the volume right after failover")
    w.stop(errors_ok=True)
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "30")
    e2e.expect_file(view, image, "the volume after the commit")
    e2e.expect_file(p.b.disk("vm1"), image, "the disk after the commit")


def test_secondary_mmap_and_direct():
    p, vol, view, _ = started()
    fd = os.open(view, os.O_RDWR)
    check_errno(errno.ENODEV, "MAP_SHARED for writing on a secondary", mmap.mmap, fd, BLOCK, mmap.MAP_SHARED)
    os.close(fd)
    with open(view, "rb") as f:
        m = mmap.mmap(f.fileno(), SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        check_eq(m[HALF], 0x11, "a shared mapping for reading")
        e2e.pwrite(vol, 0, b"\x22" * SIZE, sync=True)
        check_eq(m[HALF], 0x11, "the mapping before the checkpoint")
        p.checkpoint()
        check_eq(m[HALF], 0x22, "the mapping after the checkpoint")
        check_eq(os.pread(f.fileno(), 1, 5), b"\x22", "a cached read after the checkpoint")
        e2e.pwrite(vol, 0, b"\x55" * SIZE, sync=True)
        e2e.pwrite(view, 0, b"\x33" * BLOCK)
        check_eq(os.pread(f.fileno(), 1, 5), b"\x33", "a cached read after an own direct write")
        p.b.repctl("discard", "vm1")
        check_eq((m[0], os.pread(f.fileno(), 1, 5)), (0x22, b"\x22"), "cached after discard")
        p.b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
        check_eq((m[0], m[SIZE - 1], os.pread(f.fileno(), 1, 9)), (0x55, 0x55, b"\x55"), "cached after failover")
        m.close()


# ---- protocols, flushes, discards ------------------------------------------------------------------------------------


def took(fn, *args):
    t = time.monotonic()
    fn(*args)
    return time.monotonic() - t


def test_protocols():
    p = Pair(proxy=True)
    (vol,) = p.protect(size=SIZE)
    block = e2e.aligned(b"p" * BLOCK)
    fd = os.open(vol, os.O_RDWR | os.O_DIRECT)
    delay = 0.2
    for proto, write_waits, flush_waits in (("A", 0, 0), ("B", 1, 1), ("C", 1, 1), ("F", 0, 1)):
        p.a.repctl("set", "vm1", "protocol=" + proto)
        check_eq(p.a.status("vm1")["protocol"], proto, "protocol")
        os.fsync(fd)
        p.proxy.delay = delay
        try:
            w, f = [], []
            for _ in range(2 if write_waits else 5):
                w.append(took(os.pwrite, fd, memoryview(block), 0))
                f.append(took(os.fsync, fd))
            what = "under %s, over a link of 2 x %.2f s, writes took %r, flushes %r s" % (proto, delay, w, f)
            # What waits does so each time, what does not is slow at most when the machine is.
            check(min(w) >= 2 * delay if write_waits else min(w) < delay, what)
            # A flush may ride on a barrier that was under way already, so the whole round trip need not be seen.
            check(min(f) >= delay / 3 if flush_waits else min(f) < delay / 3, what)
        finally:
            p.proxy.delay = 0
    os.close(fd)
    p.checkpoint()
    e2e.check_same(vol, p.b.volume("vm1"), "primary and view")
    # depth: waiting writes go in parallel
    p.a.repctl("set", "vm1", "protocol=C")
    p.proxy.delay = 0.05

    def parallel():
        threads = [threading.Thread(target=e2e.pwrite, args=(vol, i * BLOCK, b"d" * BLOCK)) for i in range(16)]
        for x in threads:
            x.start()
        for x in threads:
            x.join(60)

    dt = [took(parallel) for _ in range(5)]
    p.proxy.delay = 0
    check(min(dt) < 0.8, "16 parallel writes under C took %r s, one takes 0.1 s" % dt)


def test_o_dsync_waits_like_a_flush():
    p = Pair(proxy=True)
    (vol,) = p.protect(size=SIZE)
    e2e.fsync(vol)
    p.proxy.delay = 0.1
    for flags in (os.O_DSYNC, os.O_SYNC, os.O_DSYNC | os.O_DIRECT):
        fd = os.open(vol, os.O_RDWR | flags)
        t = time.monotonic()
        os.pwrite(fd, memoryview(e2e.aligned(b"s" * BLOCK)), 0)
        dt = time.monotonic() - t
        os.close(fd)
        check(dt >= 0.2, "a write with flags %o under F took %.3f s" % (flags, dt))
    p.proxy.delay = 0


def test_discards_travel():
    p, vol, view, _ = started()
    e2e.punch(vol, 0, MIB)
    e2e.zero_range(vol, MIB + 100, 200000)
    e2e.pwrite(vol, HALF, b"\x22" * BLOCK)
    e2e.punch(vol, HALF + 100, 1000)
    e2e.fsync(vol)
    p.same()
    check(e2e.allocated(p.b.disk("vm1")) <= SIZE - MIB + 64 * KIB, "a discard freed nothing on the peer")
    e2e.check_bytes(view, 0, SIZE, 0x11, "the view after discards")
    p.checkpoint()
    e2e.check_same(vol, view, "the view after the checkpoint")
    before = p.a.status("vm1")["counters"]["sent_bytes"]
    e2e.zero_range(vol, 0, SIZE)
    e2e.fsync(vol)
    sent = p.a.status("vm1")["counters"]["sent_bytes"] - before
    check(sent < 64 * KIB, "zeroing 4 MiB sent %d bytes" % sent)
    p.same()


def test_overlapping_writes():
    """I6: overlapping writes in flight land in the same order on both."""
    p = Pair()
    size = 2 * MIB
    (vol,) = p.protect(size=size, protocol="A")
    log = e2e.Log({"vm1": size}, unit=512)
    w = e2e.Writer(log, {"vm1": vol}, threads=12, overlap=True, max_units=40, span=64 * KIB, zero_ratio=0.2).start()
    for _ in range(3):
        w.wait_ops(600)
        w.pause()
        p.checkpoint()
        p.same()
        e2e.check_same(vol, p.b.volume("vm1"), "primary and view")
        w.resume()
    w.stop()
    e2e.fsync(vol)
    p.same()


def test_buffered_and_mmap_writes_replicate():
    p, vol, view, _ = started()
    with open(vol, "r+b", buffering=0) as f:
        f.write(b"\x22" * 100000)
        m = mmap.mmap(f.fileno(), SIZE, mmap.MAP_SHARED)
        m[HALF:HALF + 5] = b"mmap!"
        m.flush()
        os.fsync(f.fileno())
        p.same()
        m.close()
    p.checkpoint()
    check_eq(e2e.pread(view, HALF, 5, direct=False), b"mmap!", "a mapped store on the view")
    e2e.check_bytes(view, 0, 100000, 0x22, "buffered writes on the view", direct=False)


# ---- initial sync ----------------------------------------------------------------------------------------------------


def test_initial_sync_under_load():
    p = Pair()
    size = 128 * MIB
    vol = p.a.create("vm1", size)
    log = e2e.Log({"vm1": size})
    w = e2e.Writer(log, {"vm1": vol}, threads=4, max_units=16).start()
    w.wait_ops(1500)
    p.a.repctl("protect", "vm1", "--peer", p.peer)
    check_eq(p.a.status("vm1")["state"], "RUNNING", "the primary's state when protect returns")
    p.a.repctl("wait", "vm1", "--for=in-sync", "--timeout", "60")
    w.wait_ops(300)
    w.pause()
    n = p.checkpoint()
    now = time.monotonic_ns()
    e2e.check_same(vol, p.b.volume("vm1"), "primary and view")
    log.verify({"vm1": p.b.checkpoint_file("vm1", n)}, required=log.completed_before(now))
    w.resume()
    w.wait_ops(50)
    w.stop()
    check(p.a.status("vm1")["counters"]["resync_bytes"] > 0, "no resync_bytes")


def test_initial_sync_skips_holes():
    p = Pair()
    vol = p.a.create("vm1", 8 * GIB)
    e2e.pwrite(vol, 5 * GIB, b"x" * MIB)
    t = time.monotonic()
    p.a.repctl("protect", "vm1", "--peer", p.peer, "--wait", timeout=60)
    check(time.monotonic() - t < 60, "the initial sync of 1 MiB in 8 GiB took %.1f s" % (time.monotonic() - t))
    c = p.a.status("vm1")["counters"]
    check(MIB <= c["resync_bytes"] <= 2 * MIB, "the sync sent %d bytes for 1 MiB of data" % c["resync_bytes"])
    e2e.check_bytes(p.b.volume("vm1"), 5 * GIB, MIB, ord("x"), "the data on the view")
    check(e2e.allocated(p.b.disk("vm1")) <= 2 * MIB, "holes were filled on the peer")
    check_eq(overlay_bytes(p.b)[1], 0, "a fresh volume's sync saved something in hidden")


def test_progress_and_rate():
    p = Pair()
    vol = p.a.create("vm1", 64 * MIB)
    e2e.pwrite(vol, 0, b"\x11" * 32 * MIB)
    p.a.repctl("set", "vm1", "resync_rate=8M")
    p.a.repctl("protect", "vm1", "--peer", p.peer)
    st = wait_for(lambda: (lambda s: s["resync"] and s["resync"]["done"] > 0 and s)(p.a.status("vm1")), "progress of the sync", 10)
    r = st["resync"]
    check_eq(set(r), {"done", "total", "rate", "eta_s"}, "keys of resync")
    check(0 < r["done"] <= r["total"] <= 64 * MIB, "progress: %r" % r)
    check_eq(st["link"], "RESYNC", "link during the sync")
    check_eq(p.b.status("vm1")["state"], "NONE", "the secondary's state during the initial sync")
    check_errno(errno.EIO, "reading a secondary's view during the initial sync", e2e.pread, p.b.volume("vm1"), 0, BLOCK)
    p.a.repctl("checkpoint", "vm1", code=5)
    p.a.repctl("error", "vm1", code=7)
    p.a.repctl("status", "vm1", "--exit-code", code=7)
    p.a.repctl("wait", "vm1", "--for=in-sync", "--timeout", "0.2", code=124)
    p.a.repctl("set", "vm1", "resync_rate=0")
    p.a.repctl("wait", "vm1", "--for=in-sync", "--timeout", "30")
    p.a.repctl("status", "vm1", "--exit-code")
    check_eq(p.a.status("vm1")["resync"], None, "resync when in sync")


# ---- stop, start -----------------------------------------------------------------------------------------------------


def test_stop_and_start():
    for side in ("a", "b"):
        p, vol, view, _ = started()
        e2e.pwrite(vol, HALF, b"\x22" * HALF)
        e2e.pwrite(view, 0, b"\x33" * BLOCK)
        getattr(p, side).repctl("stop", "vm1").says("4.0 KiB")
        for h, role in ((p.a, "primary"), (p.b, "secondary")):
            h.wait_status("vm1", 5, state="DONE", role=role)
        p.same()
        check_eq(overlay_bytes(p.b), (0, 0), "active and hidden bytes after stop")
        e2e.check_bytes(view, 0, HALF, 0x11, "lower half on the stopped secondary")
        e2e.check_bytes(view, HALF, HALF, 0x22, "upper half on the stopped secondary")
        p.a.repctl("stop", "vm1", code=5)
        p.a.repctl("checkpoint", "vm1", code=5)
        e2e.pwrite(vol, 0, b"\x55" * BLOCK, sync=True)  # alone: travels with the start
        before = p.a.status("vm1")["counters"]["resync_bytes"]
        e2e.check_bytes(view, 0, BLOCK, 0x11, "the stopped secondary")
        p.a.repctl("start", "vm1")
        p.a.repctl("wait", "vm1", "--for=in-sync", "--timeout", "20")
        p.b.wait_synced("vm1")
        p.same()
        sent = p.a.status("vm1")["counters"]["resync_bytes"] - before
        check(0 < sent <= 256 * KIB, "start sent %d bytes for 4 KiB of change" % sent)
        p.checkpoint()
        e2e.check_bytes(view, 0, BLOCK, 0x55, "the view after start")
        p.a.repctl("start", "vm1", code=5)
        p.b.repctl("start", "vm1", code=5)


def test_secondary_written_in_done_is_split_brain():
    p, vol, view, _ = started()
    p.a.repctl("stop", "vm1")
    p.b.wait_status("vm1", 5, state="DONE")
    e2e.pwrite(view, 0, b"\x33" * BLOCK, sync=True)
    p.a.repctl("start", "vm1", code=8).says("resolve")
    e2e.check_bytes(view, 0, BLOCK, 0x33, "the secondary's own data")
    e2e.check_bytes(vol, 0, BLOCK, 0x11, "the primary's data")
    for h in (p.a, p.b):
        h.wait_status("vm1", 60, split_brain=True, link="DOWN", health="split_brain")
        h.repctl("status", "vm1", "--exit-code", code=8)
    check_errno(0, "the primary still serves", e2e.pwrite, vol, 0, b"\x11" * BLOCK)


def test_shutdown_and_groups_that_run():
    p, vol, view, _ = started()
    p.a.repctl("create", "more", "--size", "1M", "--group", "vm1", code=5).says("vm1")
    p.a.repctl("-y", "delete", "vm1", code=5).says("vm1")
    p.b.repctl("-y", "delete", "vm1", code=5)
    p.a.repctl("shutdown")
    p.a.expect_dead = True
    p.a.wait_exit(0)
    st = p.b.wait_status("vm1", 60, link="DOWN")
    check_eq((st["role"], st["state"]), ("secondary", "RUNNING"), "the secondary without its peer")
    e2e.check_bytes(view, 0, SIZE, 0x11, "the view without the peer")
    p.a.start()
    p.a.wait_synced("vm1")
    p.b.wait_synced("vm1")


# ---- status and messages ---------------------------------------------------------------------------------------------


def check_status_shape(st):
    check_eq(set(st), GROUP_KEYS, "keys of a group's status")
    check_eq(set(st["counters"]), COUNTER_KEYS, "keys of counters")
    for v in st["volumes"]:
        check_eq(set(v), VOLUME_KEYS, "keys of a volume's status")
    for k in ("dirty_bytes", "queue_bytes"):
        check(st[k] is None or isinstance(st[k], int), "%s is %r" % (k, st[k]))
    for k in ("split_brain", "checkpoint_valid"):
        check(isinstance(st[k], bool), "%s is %r" % (k, st[k]))
    check(st["role"] in ("standalone", "primary", "secondary"), "role is %r" % st["role"])
    check(st["state"] in ("NONE", "RUNNING", "FAILOVER", "FAILOVER_FAILED", "DONE"), "state is %r" % st["state"])
    check(st["link"] in ("DOWN", "HANDSHAKE", "RESYNC", "SYNCED"), "link is %r" % st["link"])
    check(st["health"] in ("ok", "degraded", "split_brain"), "health is %r" % st["health"])
    check(isinstance(st["reasons"], list), "reasons")
    if st["error"] is not None:
        check_eq(set(st["error"]), {"code", "operation", "volume", "offset", "length", "time"}, "keys of error")
        check(RFC3339.match(st["error"]["time"]), "time of the error: %r" % st["error"]["time"])


def test_status():
    p = Pair()
    p.a.create("vm1", SIZE)
    p.a.create("other", MIB)
    st = p.a.repctl("status", "vm1", json=True)["groups"]
    check_eq(len(st), 1, "groups of one")
    check_status_shape(st[0])
    check_eq(st[0]["checkpoint"], None, "checkpoint before any")
    check_eq(len(p.a.repctl("status", json=True)["groups"]), 2, "groups of all")
    (vol,) = p.protect(size=SIZE)
    e2e.pwrite(vol, 0, b"x" * 64 * KIB, sync=True)
    n = p.checkpoint()
    check_eq(p.a.repctl("checkpoint", "vm1", json=True), {"schema": 1, "group": "vm1", "checkpoint": n + 1}, "checkpoint --json")
    check_eq(p.a.repctl("checkpoint", "vm1", "--no-wait").out, "", "output of checkpoint --no-wait")
    wait_for(lambda: p.a.status("vm1")["checkpoint"] == n + 2, "the checkpoint asked for without waiting")
    for h, role in ((p.a, "primary"), (p.b, "secondary")):
        st = h.wait_status("vm1", 60, link="SYNCED", checkpoint=n + 2)
        check_status_shape(st)
        check_eq((st["role"], st["state"], st["health"], st["split_brain"], st["checkpoint_valid"], st["reasons"], st["error"]),
                 (role, "RUNNING", "ok", False, True, [], None), "facts on " + h.name)
        check(0 <= st["checkpoint_age_s"] < 30, "checkpoint_age_s: %r" % st["checkpoint_age_s"])
        check_eq(st["volumes"][0]["path"], h.volume("vm1"), "path")
        with open(os.path.join(h.mnt, "status", "vm1.json")) as f:
            doc = json.load(f)
        check_eq(doc["schema"], 1, "schema of the status file")
        check_status_shape(doc["groups"][0])
    a, b = p.a.status("vm1"), p.b.status("vm1")
    check_eq(a["generation"], b["generation"], "generation on both")
    check_eq(a["peer"], p.peer, "peer")
    c = a["counters"]
    check(c["writes"] >= 1 and c["write_bytes"] >= 64 * KIB and c["flushes"] >= 1 and c["sent_bytes"] >= 64 * KIB, "counters: %r" % c)
    check(b["counters"]["received_bytes"] >= 64 * KIB and b["counters"]["checkpoints"] >= 3, "counters: %r" % b["counters"])
    wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty bits to clear after a flush", 15)
    check_eq(p.a.status("vm1")["queue_bytes"], 0, "queue_bytes at rest")
    text = p.a.repctl("status", "vm1").out
    first = text.splitlines()[0]
    check(re.match(r"^vm1  primary  RUNNING  SYNCED  ok  protocol F  peer %s$" % re.escape(p.peer), first), "first line: %r" % first)
    check(re.search(r"^  checkpoint %d, \S+ s ago   rpo \S+ s   queue 0 B   dirty 0 B$" % (n + 2), text, re.M), "second line: %r" % text)
    check(re.search(r"^  vm1 +4\.0 MiB +%s$" % re.escape(vol), text, re.M), "third line: %r" % text)
    check("\x1b" not in text, "colour into a pipe")
    check("\x1b" in p.a.repctl("--color=always", "status", "vm1").out, "no colour when asked for")
    p.a.repctl("status", "nope", code=4).says("nope")
    p.a.repctl("error", "vm1").says("clean")
    p.b.repctl("error", "vm1")
    lst = p.b.repctl("checkpoints", "vm1", json=True)
    nums = [x["number"] for x in lst["checkpoints"]]
    check(nums == sorted(nums) and {n, n + 1, n + 2} <= set(nums), "checkpoints listed: %r" % nums)
    check(all(RFC3339.match(x["time"]) for x in lst["checkpoints"]), "times: %r" % lst)
    check_eq(sorted(int(x) for x in os.listdir(os.path.join(p.b.mnt, "checkpoints", "vm1")) if x != "latest"), nums, "files in checkpoints/")
    mtime = os.stat(p.b.checkpoint_file("vm1", n)).st_mtime
    check(abs(mtime - time.time()) < 60, "mtime of a checkpoint is %.0f s off" % (mtime - time.time()))
    check_errno(errno.EACCES, "opening a checkpoint for writing", os.open, p.b.checkpoint_file("vm1", n), os.O_RDWR) if os.geteuid() else None


def test_settings():
    p = Pair()
    p.protect(size=SIZE)
    s = p.a.repctl("get", "vm1", json=True)["settings"]
    for key, value in (("protocol", "F"), ("on_disconnect", "continue"), ("on_congestion", "block"), ("on_io_error", "detach"),
                       ("on_cow_error", "stop"), ("failover_to", "checkpoint"), ("peer_timeout", "5s"), ("keep_last", "10")):
        check_eq(s.get(key), value, "default of " + key)
    p.a.repctl("set", "vm1", "checkpoint_interval=1.5", "peer_timeout=2s", "keep_last=3")
    check_eq(p.a.ctl("get", name="vm1")["settings"]["checkpoint_interval"], "1.5s", "checkpoint_interval")
    wait_for(lambda: p.b.ctl("get", name="vm1")["settings"]["peer_timeout"] == "2s", "the setting on the peer", 5)
    for bad in ("nonsense=1", "protocol=X", "protocol", "keep_last=0", "peer_timeout=1ms", "checkpoint_interval=-1", "=x"):
        p.a.repctl("set", "vm1", bad, code=2)
    p.a.repctl("set", "vm1", "keep_last=4", "protocol=Z", code=2)
    check_eq(p.a.ctl("get", name="vm1")["settings"]["keep_last"], "3", "a set that is refused in part changes nothing")
    n = p.a.status("vm1")["checkpoint"]
    e2e.pwrite(p.a.volume("vm1"), 0, b"a" * BLOCK)
    wait_for(lambda: (p.a.status("vm1")["checkpoint"] or 0) >= n + 2, "checkpoints by interval", 10)
    p.a.restart()
    p.a.wait_synced("vm1")
    check_eq(p.a.ctl("get", name="vm1")["settings"]["keep_last"], "3", "keep_last after a restart")


def test_interval_checkpoint_waits_for_active():
    """An automatic checkpoint never pulls the disk from under a guest on the secondary's view."""
    p, vol, view, n = started()
    e2e.pwrite(view, 0, b"\x33" * BLOCK)
    p.a.repctl("set", "vm1", "checkpoint_interval=0.3")
    e2e.pwrite(vol, HALF, b"\x22" * BLOCK, sync=True)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        check_eq(p.b.status("vm1")["checkpoint"], n, "the checkpoint while active is not empty")
        e2e.check_bytes(view, 0, BLOCK, 0x33, "the view while active is not empty")
        time.sleep(0.1)
    check_eq(p.b.status("vm1")["link"], "SYNCED", "link meanwhile")
    p.b.repctl("discard", "vm1")
    wait_for(lambda: p.b.status("vm1")["checkpoint"] > n, "automatic checkpoints after discard", 60)
    e2e.check_bytes(view, HALF, BLOCK, 0x22, "the view after it")


def test_retention_and_pins():
    p, vol, view, n = started(keep_last=3)
    e2e.pwrite(vol, 0, b"\xaa" * BLOCK, sync=True)
    pinned = int(p.a.repctl("checkpoint", "vm1", "--keep").out)
    for i in range(8):
        e2e.pwrite(vol, i * BLOCK, bytes([0x40 + i]) * BLOCK, sync=True)
        last = p.checkpoint()

    def kept():
        return [x["number"] for x in p.b.ctl("checkpoints", name="vm1")["checkpoints"]]

    wait_for(lambda: len(kept()) <= 5 and pinned in kept(), "old checkpoints to go, the pinned one to stay", 10)
    check_eq(kept()[-1], last, "the newest")
    e2e.check_bytes(p.b.checkpoint_file("vm1", pinned), 0, BLOCK, 0xaa, "the pinned checkpoint")
    e2e.check_bytes(p.b.checkpoint_file("vm1", pinned), BLOCK, SIZE - BLOCK, 0x11, "the pinned checkpoint")
    e2e.check_bytes(p.b.checkpoint_file("vm1", last - 1), 6 * BLOCK, BLOCK, 0x46, "the last but one")
    e2e.check_bytes(p.b.checkpoint_file("vm1", last - 1), 7 * BLOCK, BLOCK, 0x11, "the last but one")
    p.b.repctl("-y", "checkpoints", "vm1", "--drop", str(last), code=5)  # the base stays
    p.b.repctl("-y", "checkpoints", "vm1", "--drop", str(last - 1))
    check(last - 1 not in kept(), "a dropped checkpoint is still listed")
    e2e.check_bytes(p.b.checkpoint_file("vm1", pinned), 0, BLOCK, 0xaa, "the pinned checkpoint after a drop")
    p.b.repctl("-y", "checkpoints", "vm1", "--drop", "9999", code=4)
    e2e.check_same(vol, view, "the view")


def test_protect_refusals():
    p = Pair()
    p.a.create("vm1", SIZE)
    p.a.repctl("protect", "nope", "--peer", p.peer, code=4).says("nope")
    p.a.repctl("protect", "vm1", code=2).says("peer")
    p.a.repctl("protect", "vm1", "--peer", p.peer, "--protocol", "X", code=2)
    for bad in ("nonsense", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999", ":7790", "127.0.0.1:"):
        p.a.repctl("protect", "vm1", "--peer", bad, code=2, timeout=60)
    dead = "127.0.0.1:%d" % e2e.free_port()
    t = time.monotonic()
    p.a.repctl("protect", "vm1", "--peer", dead, code=6, timeout=60).says("127.0.0.1")
    check(time.monotonic() - t < 50, "protect to a dead peer takes %.0f s" % (time.monotonic() - t))
    p.a.repctl("protect", "vm1", "--peer", p.a.listen, code=None).says(".")  # itself
    check(p.a.status("vm1")["state"] != "RUNNING", "protected by itself")
    st = p.a.status("vm1")
    check_eq((st["role"], st["state"]), ("standalone", "NONE"), "role and state after refusals")
    # the peer's volume differs in size
    p.b.create("vm1", 2 * SIZE)
    p.a.repctl("protect", "vm1", "--peer", p.peer, code=5).says("size|bytes|MiB")
    p.b.repctl("-y", "delete", "vm1")
    # ... was written
    p.b.create("vm1", SIZE)
    e2e.pwrite(p.b.volume("vm1"), 0, b"precious".ljust(512))
    p.a.repctl("protect", "vm1", "--peer", p.peer, code=5).says("adopt")
    check_eq(e2e.pread(p.b.volume("vm1"), 0, 8, direct=False), b"precious", "the peer's data after a refused protect")
    check_eq(p.b.status("vm1")["role"], "standalone", "the peer's role after a refused protect")
    # ... is open
    fd = os.open(p.b.volume("vm1"), os.O_RDWR)
    p.a.repctl("protect", "vm1", "--peer", p.peer, "--adopt", code=5).says("open|use")
    os.close(fd)
    e2e.pwrite(p.a.volume("vm1"), MIB, b"\x22" * MIB)
    wait_for(lambda: p.a.repctl("protect", "vm1", "--peer", p.peer, "--adopt", "--wait", code=None).code == 0,
             "protect --adopt after the close", 10)
    e2e.check_same(p.a.volume("vm1"), p.b.volume("vm1"), "the adopted volume")
    check_eq(e2e.pread(p.b.volume("vm1"), 0, 8, direct=False), bytes(8), "a hole of the primary in an adopted volume")
    pins = [x for x in p.b.ctl("checkpoints", name="vm1")["checkpoints"] if x["pinned"]]
    check(pins, "what an adopted volume held is not kept")
    check_eq(e2e.pread(p.b.checkpoint_file("vm1", pins[0]["number"]), 0, 8, direct=False), b"precious", "the kept checkpoint")
    p.a.repctl("protect", "vm1", "--peer", p.peer, code=5)


def test_wrong_role():
    p, vol, view, n = started()
    r = p.a.repctl("-y", "failover", "vm1", code=5)
    r.says("primary", "peer", re.escape(p.peer))
    check(r.err.startswith("repctl: failover vm1: "), "message: %r" % r.err)
    p.b.repctl("checkpoint", "vm1", code=(0, 5))  # it may ask the primary for one
    p.b.repctl("protect", "vm1", "--peer", p.a.listen, code=5)
    p.a.repctl("discard", "vm1", code=5)
    p.b.repctl("start", "vm1", code=5)
    for h in (p.a, p.b):
        check_eq(h.status("vm1")["state"], "RUNNING", "state on %s after refused commands" % h.name)
    e2e.pwrite(vol, 0, b"\x22" * BLOCK, sync=True)
    p.checkpoint()
    e2e.check_bytes(view, 0, BLOCK, 0x22, "replication after refused commands")


def test_confirmation_only_on_a_terminal():
    p, vol, view, _ = started()
    p.b.repctl("failover", "vm1")  # stdin is no terminal: not asked
    wait_for(lambda: p.b.status("vm1")["state"] == "DONE", "the failover")


# ---- several -----------------------------------------------------------------------------------------------------------


def test_two_volumes_one_group():
    """I7 and I12 over two volumes: checkpoints are one cut through both, whatever is being written."""
    p = Pair()
    size = 4 * MIB
    p.protect("vm1-root", "vm1-data", group="vm1", size=size)
    sizes = {"vm1-root": size, "vm1-data": size}
    log = e2e.Log(sizes)
    w = e2e.Writer(log, {v: p.a.volume(v) for v in sizes}, threads=4, fsync_every=15).start()
    for _ in range(6):
        w.wait_ops(120)
        t0 = time.monotonic_ns()
        n = p.checkpoint()
        t1 = time.monotonic_ns()
        log.verify({v: p.b.checkpoint_file(v, n) for v in sizes}, required=log.completed_before(t0), newest=t1, prefix="stream",
                   what="checkpoint %d" % n)
        check_eq({v["name"] for v in p.b.status("vm1")["volumes"]}, set(sizes), "volumes")
    # one order over both: a flag in one volume is written only after its data in the other was answered
    w.stop()
    n = p.checkpoint()
    doc = p.b.repctl("-y", "failover", "vm1", "--wait", json=True)
    check_eq(doc["checkpoint"], n, "failover says")
    for v in sizes:
        e2e.check_same(p.a.disk(v), p.b.volume(v), v)


def test_opposite_directions():
    p = Pair()
    p.a.create("left", SIZE)
    p.b.create("right", SIZE)
    p.a.repctl("protect", "left", "--peer", p.b.listen, "--wait")
    p.b.repctl("protect", "right", "--peer", p.a.listen, "--wait")
    e2e.pwrite(p.a.volume("left"), 0, b"\x11" * SIZE, sync=True)
    e2e.pwrite(p.b.volume("right"), 0, b"\x22" * SIZE, sync=True)
    p.a.repctl("checkpoint", "left")
    p.b.repctl("checkpoint", "right")
    e2e.check_bytes(p.b.volume("left"), 0, SIZE, 0x11, "left on b")
    e2e.check_bytes(p.a.volume("right"), 0, SIZE, 0x22, "right on a")
    roles = {g["group"]: g["role"] for g in p.a.ctl("status")["groups"]}
    check_eq(roles, {"left": "primary", "right": "secondary"}, "roles on a")
    p.b.repctl("-y", "failover", "left", "--wait")
    e2e.pwrite(p.b.volume("left"), 0, b"\x33" * BLOCK)
    check_eq(p.b.status("right")["link"], "SYNCED", "the other group after one's failover")
    e2e.pwrite(p.b.volume("right"), 0, b"\x55" * BLOCK, sync=True)
    p.b.repctl("checkpoint", "right")
    e2e.check_bytes(p.a.volume("right"), 0, BLOCK, 0x55, "right on a after left's failover")


def test_several_primaries_one_secondary():
    d = e2e.tmp()
    s = Host("s", folder=d).start()
    prims = [Host("p%d" % i, listen=False, folder=d).start() for i in range(3)]
    logs, writers = [], []
    for i, h in enumerate(prims):
        v = "vm%d" % i
        h.create(v, SIZE)
        h.repctl("protect", v, "--peer", s.listen, "--wait")
        h.repctl("set", v, "checkpoint_interval=0.5")
        log = e2e.Log({v: SIZE})
        logs.append(log)
        writers.append(e2e.Writer(log, {v: h.volume(v)}, threads=2).start())
    check_eq(len(s.ctl("status")["groups"]), 3, "groups on the secondary")
    for w in writers:
        w.wait_ops(200)
    prims[0].kill9()
    writers[0].stop(errors_ok=True)
    s.wait_status("vm0", 15, link="DOWN")
    s.repctl("-y", "failover", "vm0", "--to", "latest", "--wait")
    now = time.monotonic_ns()
    logs[0].verify({"vm0": s.volume("vm0")}, required=logs[0].flushed_before(now), prefix="stream")
    for i in (1, 2):
        v = "vm%d" % i
        writers[i].wait_ops(50)
        writers[i].stop()
        prims[i].wait_synced(v)
        n = int(prims[i].repctl("checkpoint", v).out)
        e2e.check_same(prims[i].volume(v), s.checkpoint_file(v, n), v)
    # a name that another host's group has already
    x = Host("x", listen=False, folder=d).start()
    x.create("vm1", SIZE)
    x.repctl("protect", "vm1", "--peer", s.listen, code=(5, 8), timeout=60)
    writers[1].start()
    writers[1].wait_ops(30)
    writers[1].stop()
    check_eq(prims[1].wait_synced("vm1")["link"], "SYNCED", "the group that was there first")


if __name__ == "__main__":
    e2e.main()
