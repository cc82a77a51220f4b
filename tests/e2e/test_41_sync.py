#!/usr/bin/env python3
"""Falling behind and catching up: pause and resume, on_congestion=ahead, resyncs that are cut on either side, rate,
hashes, failover in the middle of one (SPEC 5, 6, 8: I1 to I5, I12, I16, I17)."""

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
    check(p.a.status("vm1")["checkpoint"] > first, "the resync takes its own checkpoint")
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
    p.proxy.stall()
    data = os.urandom(MIB)
    for i in range(100):  # more than sockets, the proxy and the queue hold
        e2e.pwrite(vol, i * MIB, data[i:] + data[:i])
    p.a.wait_status("vm1", WAIT, link="RESYNC")
    e2e.fsync(vol)
    s = p.a.status("vm1")
    check("queue" in " ".join(s["reasons"]), "reasons: %r" % s["reasons"])
    check(s["queue_bytes"] <= 8 * MIB, "the queue holds %d bytes" % s["queue_bytes"])
    p.a.repctl("checkpoint", "vm1", code=5)
    p.proxy.unstall()
    p.a.repctl("wait", "vm1", "--for=in-sync")
    moved = counter(p.a, "resync_bytes")
    check(moved <= 60 * MIB, "%d bytes were sent again although most had arrived" % moved)
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
    p.a.wait_status("vm1", 1, link="SYNCED")
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


if __name__ == "__main__":
    e2e.main()
