#!/usr/bin/env python3
"""Clean stops, kill -9 and cut links at chosen moments: the mount comes back, the group reconnects by itself and is in
sync again; and a failover after each (SPEC 9: I1, I3 to I5, I7, I12, I15)."""

import errno
import os
import random
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, KIB, MIB, Host, Pair, check, check_eq, wait_for  # noqa: E402

SIZE = 16 * MIB


def loaded(p, threads=3, **kw):
    (vol,) = p.protect(size=SIZE, **kw)
    log = e2e.Log({"vm1": SIZE})
    w = e2e.Writer(log, {"vm1": vol}, threads=threads).start()
    w.wait_ops(150)
    return log, w


def settled(p, log, w):
    """In sync again; quiet; everything answered is there, on both; a checkpoint shows it."""
    p.a.wait_synced("vm1")
    p.b.wait_synced("vm1")
    w.wait_ops(60)
    w.pause()
    n = p.checkpoint()
    now = time.monotonic_ns()
    p.same()
    log.verify({"vm1": p.a.volume("vm1")}, required=log.completed_before(now), what="the primary")
    e2e.check_same(p.a.volume("vm1"), p.b.checkpoint_file("vm1", n), "primary and checkpoint %d" % n)
    e2e.check_same(p.a.volume("vm1"), p.b.volume("vm1"), "primary and view")
    w.resume()


def test_clean_restarts():
    p = Pair()
    log, w = loaded(p)
    for _ in range(2):
        p.b.restart()
        settled(p, log, w)
        check(not w.errors, "the guest saw an error: %r" % w.errors)
        w.stop()
        p.a.restart()
        w.start()
        settled(p, log, w)
    w.stop()
    check(p.b.status("vm1")["counters"]["reconnects"] >= 0, "reconnects")


def test_kill9_of_the_secondary():
    p = Pair()
    log, w = loaded(p)
    for i in range(3):
        p.b.kill9()
        p.a.wait_status("vm1", 60, link="DOWN", health="degraded")
        w.wait_ops(80)  # a primary that lost its peer keeps serving
        p.a.repctl("error", "vm1", code=7)
        p.a.repctl("checkpoint", "vm1", code=6)
        p.b.start()
        settled(p, log, w)
    w.stop()
    p.a.repctl("error", "vm1")


def test_kill9_of_the_primary():
    p = Pair()
    log, w = loaded(p)
    for i in range(3):
        p.a.kill9()
        w.stop(errors_ok=True)
        check(all(getattr(e, "errno", 0) in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO) for e in w.errors),
              "what the guest saw: %r" % w.errors)
        before = time.monotonic_ns()
        p.b.wait_status("vm1", 60, link="DOWN")
        p.a.start()
        log.verify({"vm1": p.a.volume("vm1")}, required=log.completed_before(before), what="the primary after kill -9")
        w.start()
        settled(p, log, w)
    w.stop()


def test_kill9_of_both():
    p = Pair()
    log, w = loaded(p, peer_timeout="2s")
    p.b.kill9()
    p.a.kill9()
    w.stop(errors_ok=True)
    before = time.monotonic_ns()
    p.a.start()
    log.verify({"vm1": p.a.volume("vm1")}, required=log.completed_before(before))
    p.b.start()
    w.start()
    settled(p, log, w)
    w.stop()


def test_only_dirty_regions_travel():
    """I5: reconnecting after a lost link moves only what changed, in regions of at most 64 KiB."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=64 * MIB)
    e2e.pwrite(vol, 0, os.urandom(32 * MIB), sync=True)
    wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty bits to clear", 20)
    p.proxy.down()
    p.a.wait_status("vm1", 60, link="DOWN")
    before = p.a.status("vm1")["counters"]["resync_bytes"]
    for i in range(10):
        e2e.pwrite(vol, i * 3 * MIB, b"z" * BLOCK)
    e2e.punch(vol, 31 * MIB, BLOCK)
    check(10 * BLOCK <= p.a.status("vm1")["dirty_bytes"] <= 11 * 64 * KIB, "dirty bytes: %d" % p.a.status("vm1")["dirty_bytes"])
    p.proxy.up()
    p.a.wait_synced("vm1")
    moved = p.a.status("vm1")["counters"]["resync_bytes"] - before
    check(10 * BLOCK <= moved <= 11 * 64 * KIB, "the resync moved %d bytes for 11 blocks" % moved)
    p.checkpoint()
    p.same()
    # kill -9 of the primary: what was written counts as dirty, in larger regions; what never was does not
    e2e.pwrite(vol, 5 * MIB, b"k" * BLOCK, sync=True)
    p.a.kill9()
    p.a.start()
    p.a.wait_synced("vm1")
    moved = p.a.status("vm1")["counters"]["resync_bytes"]
    check(moved <= 33 * MIB, "the resync after kill -9 of the primary moved %d bytes" % moved)
    p.checkpoint()
    p.same()


def test_what_was_under_way_is_dirty():
    """I4: what the peer has not acknowledged stays dirty, however long ago it was flushed here; cut, it travels again."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=SIZE, protocol="A", peer_timeout="60s")
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty bits to clear", 20)
    p.proxy.stall()
    for i in range(40):
        e2e.pwrite(vol, i * 300 * KIB // 4096 * 4096, b"\x22" * BLOCK)
    e2e.punch(vol, 15 * MIB, 100 * KIB)
    e2e.fsync(vol)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:  # long enough for bits to be cleared, if they were
        check(p.a.status("vm1")["dirty_bytes"] >= 40 * BLOCK, "dirty bits are gone before the peer has it")
        time.sleep(0.1)
    before = p.a.status("vm1")["counters"]["reconnects"]
    p.proxy.cut()
    p.proxy.unstall()
    wait_for(lambda: p.a.status("vm1")["counters"]["reconnects"] > before, "the primary to connect again")
    p.a.wait_synced("vm1")
    p.checkpoint()
    p.same()


def test_link_cuts():
    p = Pair(proxy=True)
    log, w = loaded(p)
    rng = random.Random(5)
    for i in range(6):
        wait_for(p.proxy.connections, "the primary to dial again")
        p.proxy.cut()
        w.wait_ops(rng.randrange(1, 120))
        if i % 3 == 2:
            settled(p, log, w)
    settled(p, log, w)
    w.stop()
    check(p.a.status("vm1")["counters"]["reconnects"] >= 3, "reconnects: %r" % p.a.status("vm1")["counters"])


def test_failover_after_secondary_kill9():
    """I3: the secondary is killed, restarted and failed over; the outcome is the last checkpoint plus own writes."""
    p = Pair(proxy=True)
    log, w = loaded(p)
    w.pause()
    n = p.checkpoint()
    image = bytearray(e2e.pread(p.b.volume("vm1"), 0, SIZE))
    w.resume()
    own = os.urandom(40 * KIB)
    e2e.pwrite(p.b.volume("vm1"), 512 * 7, own, sync=True)
    image[512 * 7:512 * 7 + len(own)] = own
    w.wait_ops(100)
    p.b.kill9()
    p.proxy.lose()
    w.stop()
    p.b.start()
    st = p.b.status("vm1")
    check_eq((st["role"], st["state"], st["checkpoint"]), ("secondary", "RUNNING", n), "the secondary after kill -9")
    e2e.expect_file(p.b.volume("vm1"), image, "the view after kill -9")
    doc = p.b.repctl("-y", "failover", "vm1", json=True)
    check_eq(doc["checkpoint"], n, "failover says")
    e2e.expect_file(p.b.volume("vm1"), image, "right after failover")
    p.b.kill9()  # in or after the commit: goes on at the next start
    p.b.start()
    e2e.expect_file(p.b.volume("vm1"), image, "after kill -9 in the commit")
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "30")
    e2e.expect_file(p.b.disk("vm1"), image, "the disk after the commit")
    again = p.b.repctl("-y", "failover", "vm1", json=True)
    check_eq(again["checkpoint"], n, "the same failover after a restart")


def test_failover_to_latest_after_host_loss():
    """I2: what was flushed under F while in sync survives the loss of the primary; all of it one prefix (I12)."""
    for proto in ("F", "C"):
        p = Pair(proxy=True)
        log, w = loaded(p, protocol=proto)
        p.checkpoint()
        w.wait_ops(150)
        lost = time.monotonic_ns()  # before: once it notices, the primary goes on alone
        p.proxy.lose()
        p.a.kill9()
        w.stop(errors_ok=True)
        p.b.wait_status("vm1", 60, link="DOWN")
        p.b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
        required = log.flushed_before(lost) if proto == "F" else log.completed_before(lost)
        log.verify({"vm1": p.b.volume("vm1")}, required=required, prefix="stream", what="the survivor, protocol " + proto)
        e2e.check_same(p.b.volume("vm1"), p.b.disk("vm1"), "mount and disk")


def test_old_primary_comes_back():
    """After a failover the old primary, back again with writes of its own, is kept apart: a split brain, nothing lost."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=MIB)
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    p.checkpoint()
    p.proxy.down()
    p.a.wait_status("vm1", 60, link="DOWN")
    e2e.pwrite(vol, 0, b"\x22" * BLOCK, sync=True)
    p.b.repctl("-y", "failover", "vm1", "--wait")
    e2e.pwrite(p.b.volume("vm1"), BLOCK, b"\x33" * BLOCK, sync=True)
    p.proxy.up()
    for h in (p.a, p.b):
        h.wait_status("vm1", 15, split_brain=True, health="split_brain", link="DOWN")
        h.repctl("status", "vm1", "--exit-code", code=8)
    e2e.check_bytes(vol, 0, BLOCK, 0x22, "the old primary's own write")
    e2e.check_bytes(vol, BLOCK, BLOCK, 0x11, "the old primary")
    e2e.check_bytes(p.b.volume("vm1"), 0, BLOCK, 0x11, "the survivor")
    e2e.check_bytes(p.b.volume("vm1"), BLOCK, BLOCK, 0x33, "the survivor's own write")
    for h in (p.a, p.b):
        h.restart()
    for h in (p.a, p.b):
        h.wait_status("vm1", 15, split_brain=True, link="DOWN")


def test_shut_out_primary_that_wrote_nothing():
    p = Pair(proxy=True)
    (vol,) = p.protect(size=MIB)
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    p.checkpoint()
    fd = os.open(vol, os.O_RDWR | os.O_DIRECT)
    p.proxy.down()
    p.a.wait_status("vm1", 60, link="DOWN")
    p.b.repctl("-y", "failover", "vm1", "--wait")
    p.proxy.up()
    p.a.wait_status("vm1", 15, role="secondary", state="NONE", split_brain=False)
    check_eq(e2e.errno_of(os.pwrite, fd, memoryview(e2e.aligned(bytes(512))), 0), errno.EIO, "a handle from before")
    os.close(fd)
    check_eq(p.b.status("vm1")["role"], "standalone", "the survivor")
    p.a.restart()
    check_eq(p.a.status("vm1")["role"], "secondary", "after a restart")


def test_interrupted_resync_keeps_the_checkpoint():
    """The last good checkpoint survives a resync that never finishes (SPEC 3)."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    n = p.checkpoint()
    p.proxy.down()
    p.a.wait_status("vm1", 60, link="DOWN")
    e2e.pwrite(vol, 0, b"\x22" * SIZE, sync=True)
    p.a.repctl("set", "vm1", "resync_rate=1M")
    p.proxy.up()
    wait_for(lambda: (lambda r: r and r["done"] > 0)(p.a.status("vm1")["resync"]), "the resync to move something")
    p.b.kill9()
    p.proxy.lose()
    p.b.start()
    e2e.check_bytes(p.b.checkpoint_file("vm1", n), 0, SIZE, 0x11, "the checkpoint before the resync")
    doc = p.b.repctl("-y", "failover", "vm1", "--wait", json=True)
    check_eq(doc["checkpoint"], n, "failover in an unfinished resync")
    e2e.check_bytes(p.b.volume("vm1"), 0, SIZE, 0x11, "the survivor")


def test_restart_during_initial_sync():
    p = Pair()
    vol = p.a.create("vm1", 48 * MIB)
    e2e.pwrite(vol, 0, os.urandom(48 * MIB), sync=True)
    p.a.repctl("set", "vm1", "resync_rate=16M")
    p.a.repctl("protect", "vm1", "--peer", p.peer)
    for h in (p.b, p.a):
        wait_for(lambda: (lambda s: s["link"] == "RESYNC" and s["resync"] and s["resync"]["done"] > MIB)(p.a.status("vm1")),
                 "the sync to get going")
        h.kill9()
        h.start()
    p.a.repctl("set", "vm1", "resync_rate=0")
    p.a.wait_synced("vm1", 40)
    p.b.wait_synced("vm1", 60)
    p.a.repctl("set", "vm1", "checkpoint_interval=0")
    p.checkpoint()
    p.same()


def test_freeze():
    p = Pair(proxy=True)
    (vol,) = p.protect(size=MIB, on_disconnect="freeze", peer_timeout="1s")
    p.proxy.down()
    p.a.wait_status("vm1", 60, link="DOWN")
    done = []
    t = threading.Thread(target=lambda: done.append(e2e.errno_of(e2e.pwrite, vol, 0, b"f" * BLOCK)))
    t.start()
    t.join(2.5)
    check(t.is_alive(), "a write went through a frozen group (%r)" % done)
    p.proxy.up()
    t.join(60)
    check_eq(done, [0], "the write after the peer is back")
    p.a.wait_synced("vm1")
    e2e.fsync(vol)
    p.same()
    p.proxy.down()
    p.a.wait_status("vm1", 60, link="DOWN")
    t = threading.Thread(target=lambda: done.append(e2e.errno_of(e2e.pwrite, vol, 0, b"g" * BLOCK)))
    t.start()
    p.a.repctl("set", "vm1", "on_disconnect=continue")
    t.join(60)
    check_eq(done, [0, 0], "the write after set on_disconnect=continue")


def test_restarted_primary_without_its_peer():
    """It holds its I/O until the handshake, at most peer_timeout, then goes on."""
    p = Pair()
    (vol,) = p.protect(size=MIB, peer_timeout="2s")
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    p.a.kill9()
    p.b.stop()
    t = time.monotonic()
    p.a.start()
    e2e.check_bytes(vol, 0, MIB, 0x11, "the restarted primary")
    e2e.pwrite(vol, 0, b"\x22" * BLOCK, sync=True)
    check(time.monotonic() - t < 20 * e2e.SLOW, "the restarted primary held its I/O for %.1f s" % (time.monotonic() - t))
    p.b.start()
    p.a.wait_synced("vm1")
    p.checkpoint()
    p.same()


if __name__ == "__main__":
    e2e.main()
