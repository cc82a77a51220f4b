#!/usr/bin/env python3
"""Falling behind and catching up: pause and resume, on_congestion=ahead, resyncs that are cut on either side, rate,
hashes, failover in the middle of one (SPEC 5, 6, 8: I1 to I5, I12, I16, I17)."""

import errno
import json
import os
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, KIB, MIB, Pair, check, check_eq, wait_for  # noqa: E402

SIZE = 16 * MIB
WAIT = 60


def counter(h, name):
    return h.status("vm1")["counters"][name]


def clean(p):
    wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty bits to clear", WAIT)


def same_and_checkpoint(p):
    n = p.checkpoint()
    p.same()
    e2e.check_same(p.a.volume("vm1"), p.b.checkpoint_file("vm1", n), "primary and checkpoint %d" % n)
    e2e.check_same(p.a.volume("vm1"), p.b.volume("vm1"), "primary and view")


def test_pause_and_resume():
    """Nothing leaves while paused, over a restart of either side too; then only what changed."""
    p = Pair()
    (vol,) = p.protect(size=SIZE, peer_timeout="2s")
    e2e.pwrite(vol, 0, os.urandom(SIZE), sync=True)
    first = p.checkpoint()
    clean(p)
    before_disk = e2e.sha(p.b.disk("vm1"))
    p.a.repctl("pause", "vm1")
    p.a.repctl("pause", "vm1")  # again: it is
    p.a.wait_status("vm1", WAIT, link="RESYNC", health="degraded")
    p.b.wait_status("vm1", WAIT, link="RESYNC")
    check("paused" in " ".join(p.a.status("vm1")["reasons"]), "reasons: %r" % p.a.status("vm1")["reasons"])
    p.a.repctl("checkpoint", "vm1", code=5).says("paused", "resume")
    p.b.repctl("checkpoint", "vm1", code=5)
    p.a.repctl("stop", "vm1", code=5).says("resume")
    p.a.repctl("error", "vm1", code=7)
    p.b.repctl("pause", "vm1", code=5).says("secondary", "primary")
    for i in range(10):
        e2e.pwrite(vol, i * MIB, bytes([i + 1]) * BLOCK, sync=True)
    e2e.punch(vol, 12 * MIB, 2 * BLOCK)
    check_eq(e2e.sha(p.b.disk("vm1")), before_disk, "the peer's disk while paused")
    dirty = p.a.status("vm1")["dirty_bytes"]
    check(10 * 64 * KIB <= dirty <= 12 * 64 * KIB, "dirty: %d" % dirty)
    p.b.restart()
    p.a.wait_status("vm1", WAIT, link="RESYNC")
    p.b.wait_status("vm1", WAIT, link="RESYNC")
    sent = counter(p.a, "resync_bytes")
    p.a.repctl("resume", "vm1")
    p.a.repctl("wait", "vm1", "--for=in-sync")
    moved = counter(p.a, "resync_bytes") - sent
    check(10 * BLOCK <= moved <= 12 * 64 * KIB, "the resync moved %d bytes" % moved)
    wait_for(lambda: p.a.status("vm1")["checkpoint"] > first, "the checkpoint that the resync takes", WAIT)
    same_and_checkpoint(p)
    # over a restart of the primary
    clean(p)
    p.a.repctl("pause", "vm1")
    e2e.pwrite(vol, 5 * MIB, b"r" * BLOCK, sync=True)
    p.a.kill9()
    p.a.start()
    p.a.wait_status("vm1", WAIT, link="RESYNC")
    e2e.pwrite(vol, 6 * MIB, b"s" * BLOCK, sync=True)
    e2e.check_bytes(p.b.disk("vm1"), 5 * MIB, BLOCK, 6, "the peer while paused", direct=False)
    p.a.repctl("resume", "vm1")
    p.a.repctl("wait", "vm1", "--for=in-sync")
    same_and_checkpoint(p)
    p.a.repctl("error", "vm1")


def test_ahead():
    """A peer that takes nothing: with on_congestion=ahead the guest is not delayed; all is there in the end."""
    p = Pair(proxy=True)
    size = 128 * MIB
    (vol,) = p.protect(size=size, protocol="A", queue_max="4M", on_congestion="ahead", peer_timeout="60s")
    def forwarded():
        s = p.a.status("vm1")
        return s["counters"]["sent_bytes"] + s["queue_bytes"]

    before = forwarded()
    p.proxy.stall()
    data = os.urandom(MIB)
    n, end = 0, size // MIB
    while n < end:
        e2e.pwrite(vol, n * MIB, data[n:] + data[:n])
        n += 1
        if end == size // MIB and p.a.status("vm1")["link"] == "RESYNC":
            end = n + 20
    check(end < size // MIB, "%d MiB went into the sockets and the queue, and it was never full" % n)
    e2e.fsync(vol)
    s = p.a.status("vm1")
    check_eq(s["link"], "RESYNC", "link")
    check("queue" in " ".join(s["reasons"]), "reasons: %r" % s["reasons"])
    check(s["queue_bytes"] <= 8 * MIB, "the queue holds %d bytes" % s["queue_bytes"])
    p.a.repctl("checkpoint", "vm1", code=5)
    # What had been queued before it fell behind arrives in the end, however much that was. The resync sends the rest.
    queued = forwarded() - before
    p.proxy.unstall()
    p.a.repctl("wait", "vm1", "--for=in-sync")
    check_eq(counter(p.a, "resync_bytes"), (n - queued // MIB) * MIB, "resynced, %d bytes of %d MiB having been queued before" % (queued, n))
    same_and_checkpoint(p)


def test_block():
    """The other setting: new writes wait until there is room, and none is lost."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=128 * MIB, protocol="A", queue_max="4M", peer_timeout="60s")
    p.proxy.stall()
    data = os.urandom(MIB)
    done = []

    def fill():
        for i in range(100):
            e2e.pwrite(vol, i * MIB, data[i:] + data[:i])
            done.append(i)

    t = threading.Thread(target=fill)
    t.start()
    wait_for(lambda: p.a.status("vm1")["queue_bytes"] >= 4 * MIB, "the queue to be full", WAIT)
    check(t.is_alive() and len(done) < 100, "%d writes went through" % len(done))
    p.proxy.unstall()
    t.join(WAIT)
    check_eq(len(done), 100, "writes")
    p.a.wait_status("vm1", WAIT, link="SYNCED")
    same_and_checkpoint(p)


def test_pause_under_load_by_protocol():
    """Requests under way when it is paused complete, none is lost, whatever they waited for; protocols change meanwhile."""
    p = Pair()
    (vol,) = p.protect(size=SIZE, protocol="C")
    log = e2e.Log({"vm1": SIZE})
    w = e2e.Writer(log, {"vm1": vol}, threads=4).start()
    for protocol in ("C", "F", "B", "A", "C"):
        p.a.repctl("set", "vm1", "protocol=%s" % protocol)
        w.wait_ops(60)
        p.a.repctl("pause", "vm1")
        w.wait_ops(60)
        p.a.repctl("resume", "vm1")
        p.a.wait_synced("vm1", WAIT)
        w.wait_ops(60)
    check(not w.errors, "the guest saw an error: %r" % w.errors)
    w.pause()
    n = p.checkpoint()
    now = time.monotonic_ns()
    log.verify({"vm1": p.b.checkpoint_file("vm1", n)}, required=log.completed_before(now), what="checkpoint %d" % n)
    w.stop()
    p.same()


def resync(p):
    return p.a.status("vm1")["resync"]


def half_done(p, at_most):
    """The initial sync has so much behind it that at most `at_most` bytes are not known to be durable on both."""
    def there():
        s = p.a.status("vm1")
        check(s["link"] == "RESYNC", "the resync ended too soon: %r" % s)
        return s["resync"]["done"] > 0 and s["dirty_bytes"] <= at_most
    wait_for(there, "half of the sync", WAIT)


def test_killed_on_either_side_it_goes_on():
    """A resync that is cut by kill -9 of the target, then of the source, sends again only what was not known to be durable."""
    p = Pair()
    size = 48 * MIB
    vol = p.a.create("vm1", size)
    e2e.pwrite(vol, 0, os.urandom(size), sync=True)
    p.a.repctl("set", "vm1", "resync_rate=%dK" % (8192 / e2e.SLOW), "checkpoint_interval=0")
    p.a.repctl("protect", "vm1", "--peer", p.peer)
    half_done(p, 32 * MIB)
    p.b.kill9()
    p.a.wait_status("vm1", WAIT, link="DOWN")
    left, sent = p.a.status("vm1")["dirty_bytes"], counter(p.a, "resync_bytes")
    check(left <= 32 * MIB, "dirty after the target was killed: %d" % left)
    p.b.start()
    p.a.wait_status("vm1", WAIT, link="RESYNC")
    check_eq(resync(p)["total"], left, "bytes to do when the target is back")
    half_done(p, 16 * MIB)
    e2e.pwrite(vol, 0, b"w" * BLOCK, sync=True)  # the guest goes on
    check(counter(p.a, "resync_bytes") - sent <= left, "sent after the target was back: %d of %d" % (counter(p.a, "resync_bytes") - sent, left))
    p.a.kill9()
    p.a.start()
    p.a.wait_status("vm1", WAIT, link="RESYNC")
    again = resync(p)["total"]
    check(again <= 32 * MIB, "bytes to do after kill -9 of the source: %d" % again)
    p.b.repctl("failover", "vm1", code=5).says("--force")  # an unfinished first sync has nothing to go back to
    p.a.repctl("set", "vm1", "resync_rate=0")
    p.a.repctl("wait", "vm1", "--for=in-sync")
    check(counter(p.a, "resync_bytes") <= again + MIB, "sent after kill -9 of the source: %d" % counter(p.a, "resync_bytes"))
    same_and_checkpoint(p)


def test_rate_and_progress():
    p = Pair()
    size = 64 * MIB
    vol = p.a.create("vm1", size)
    e2e.pwrite(vol, 0, os.urandom(size), sync=True)
    p.a.repctl("set", "vm1", "resync_rate=4M", "checkpoint_interval=0")
    p.a.repctl("protect", "vm1", "--peer", p.peer)
    begun = time.monotonic()
    wait_for(lambda: resync(p)["done"] >= 8 * MIB, "8 MiB", WAIT)
    check(time.monotonic() - begun >= 1.5, "8 MiB at 4 MiB/s took %.1f s" % (time.monotonic() - begun))
    r = resync(p)
    check(r["rate"] <= 6 * MIB, "rate: %r" % r)
    check(r["rate"] > 0 and abs(r["eta_s"] - (r["total"] - r["done"]) / r["rate"]) < 0.01 * r["eta_s"] + 0.1, "eta: %r" % r)
    check_eq(r["total"], size, "total")
    check("resync" in p.a.repctl("status", "vm1").out and "left" in p.a.repctl("status", "vm1").out, "status text")
    answers = []
    t = threading.Thread(target=lambda: answers.append(p.a.repctl("--json", "wait", "vm1", "--for=in-sync")))
    t.start()
    wait_for(lambda: resync(p)["done"] >= 14 * MIB, "14 MiB", WAIT)
    p.a.repctl("set", "vm1", "resync_rate=0")
    t.join(WAIT)
    lines = [json.loads(x) for x in answers[0].err.splitlines()]
    check(lines and all(0 <= x["done"] <= x["total"] and "rate" in x and "eta_s" in x for x in lines), "progress of wait: %r" % lines)
    p.a.wait_status("vm1", WAIT, link="SYNCED")
    check_eq(resync(p), None, "resync when in sync")
    same_and_checkpoint(p)


def test_hash():
    """A copy that is there already costs hashes, not data; what differs, and only that, is sent and kept; cut in the middle too."""
    p = Pair()
    size = 32 * MIB
    va, vb = p.a.create("vm1", size), p.b.create("vm1", size)
    data = bytearray(os.urandom(20 * MIB))
    e2e.pwrite(va, 0, bytes(data), sync=True)
    old = bytearray(data)
    old[5 * MIB:5 * MIB + BLOCK] = b"o" * BLOCK
    e2e.pwrite(vb, 0, bytes(old))
    e2e.pwrite(vb, 24 * MIB, b"h" * 2 * BLOCK)  # a hole on the source
    e2e.pwrite(vb, 28 * MIB, bytes(MIB), sync=True)  # zeroes there, a hole here: equal
    p.a.repctl("set", "vm1", "resync_rate=8M", "checkpoint_interval=0")
    p.a.repctl("protect", "vm1", "--peer", p.peer, "--hash", code=5).says("--adopt")
    p.a.repctl("protect", "vm1", "--peer", p.peer, "--adopt", "--hash")
    wait_for(lambda: (resync(p) or {"done": size})["done"] >= 6 * MIB, "some of it", WAIT)
    sent = counter(p.a, "resync_bytes")
    p.a.kill9()
    p.a.start()
    p.a.repctl("set", "vm1", "resync_rate=0")
    p.a.repctl("wait", "vm1", "--for=in-sync")
    sent += counter(p.a, "resync_bytes")
    check(sent <= 192 * KIB, "%d bytes were sent for one block" % sent)
    check(counter(p.b, "cow_bytes") <= 256 * KIB, "%d bytes of old content were saved" % counter(p.b, "cow_bytes"))
    same_and_checkpoint(p)
    kept = [c["number"] for c in p.b.ctl("checkpoints", name="vm1")["checkpoints"] if c["kind"] == "local" and c["pinned"]]
    check_eq(len(kept), 1, "pinned checkpoints of what was there")
    e2e.check_bytes(p.b.checkpoint_file("vm1", kept[0]), 5 * MIB, BLOCK, ord("o"), "what was there", direct=False)
    e2e.check_bytes(p.b.checkpoint_file("vm1", kept[0]), 24 * MIB, 2 * BLOCK, ord("h"), "what was there", direct=False)
    # later resyncs send what is dirty as it is
    p.a.repctl("pause", "vm1")
    e2e.pwrite(va, 0, bytes(data[:MIB]), sync=True)
    before = counter(p.a, "resync_bytes")
    p.a.repctl("resume", "vm1")
    p.a.repctl("wait", "vm1", "--for=in-sync")
    check(counter(p.a, "resync_bytes") - before >= MIB, "a resync of dirty regions compared hashes")


def mid_resync(restart):
    """b: checkpoint of 0x11, then 0x22 in its first half; then, in a resync that has not ended, 0x33 over the first MiBs."""
    p = Pair()
    (vol,) = p.protect(size=SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    n = p.checkpoint()
    e2e.pwrite(vol, 0, b"\x22" * (SIZE // 2), sync=True)
    clean(p)
    p.a.repctl("pause", "vm1")
    e2e.pwrite(vol, 0, b"\x33" * SIZE, sync=True)
    p.a.repctl("set", "vm1", "resync_rate=1M")
    p.a.repctl("resume", "vm1")
    wait_for(lambda: e2e.pread(p.b.disk("vm1"), MIB, BLOCK, direct=False) == b"\x33" * BLOCK, "the resync to write", WAIT)
    e2e.check_bytes(p.b.volume("vm1"), 0, SIZE, 0x11, "the view during a resync")
    p.a.wait_status("vm1", WAIT, link="RESYNC")
    p.b.repctl("checkpoint", "vm1", code=5)
    p.a.kill9()
    p.b.wait_status("vm1", WAIT, link="DOWN")
    if restart:
        p.b.kill9()
        p.b.start()
    return p, n


def test_failover_in_a_resync_goes_back_to_the_last_checkpoint():
    p, n = mid_resync(restart=True)
    r = p.b.ctl("failover", name="vm1", wait=True)
    check_eq(r["checkpoint"], n, "the outcome")
    e2e.check_bytes(p.b.volume("vm1"), 0, SIZE, 0x11, "after the failover")
    e2e.check_bytes(p.b.disk("vm1"), 0, SIZE, 0x11, "the disk after the commit", direct=False)


def test_failover_to_latest_in_a_resync_is_the_disk_as_it_began():
    p, n = mid_resync(restart=False)
    p.b.repctl("failover", "vm1", "--to", "latest", "--wait")
    for path, direct in ((p.b.volume("vm1"), True), (p.b.disk("vm1"), False)):
        e2e.check_bytes(path, 0, SIZE // 2, 0x22, "what was flushed in sync", direct=direct)
        e2e.check_bytes(path, SIZE // 2, SIZE // 2, 0x11, "what was there before", direct=direct)


def test_a_frozen_group_that_is_paused_or_ended():
    """freeze holds what the peer's loss holds; a pause is no loss; a shutdown answers EIO."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=MIB, on_disconnect="freeze", peer_timeout="1s")
    p.a.repctl("pause", "vm1")
    e2e.pwrite(vol, 0, b"p" * BLOCK, sync=True)
    p.a.repctl("resume", "vm1")
    p.a.wait_synced("vm1", WAIT)
    p.proxy.down()
    p.a.wait_status("vm1", WAIT, link="DOWN")
    done = []
    t = threading.Thread(target=lambda: done.append(e2e.errno_of(e2e.pwrite, vol, 0, b"f" * BLOCK)))
    t.start()
    t.join(1.0)
    check(t.is_alive(), "a write went through a frozen group (%r)" % done)
    p.a.stop()
    t.join(WAIT)
    check(done == [errno.EIO], "the frozen write at the end: %r" % done)


def test_reads_and_writes_that_are_held_end_with_the_daemon():
    """A restarted primary holds its I/O until it knows what became of the peer: a shutdown does not wait for that."""
    p = Pair()
    (vol,) = p.protect(size=MIB, peer_timeout="60s")
    p.a.kill9()
    p.b.kill9()
    p.a.start()
    done = {}
    threads = [threading.Thread(target=lambda k=k, f=f: done.update({k: e2e.errno_of(f)}))
               for k, f in (("read", lambda: e2e.pread(vol, 0, BLOCK)), ("write", lambda: e2e.pwrite(vol, 0, b"h" * BLOCK)))]
    for t in threads:
        t.start()
    threads[0].join(1.0)
    check(not done, "nothing was held: %r" % done)
    p.a.stop(timeout=60)
    for t in threads:
        t.join(WAIT)
    check_eq(done, {"read": errno.EIO, "write": errno.EIO}, "what was held at the end")


if __name__ == "__main__":
    e2e.main()
