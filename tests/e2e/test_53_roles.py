#!/usr/bin/env python3
"""Roles (SPEC 5, 7): switchover under load both ways, what refuses it, kill -9 of either daemon anywhere in it; the circle
A -> B -> A by failover, failback and switchover; unprotect and protect again. Byte for byte against the log of writes."""

import errno
import os
import random
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, KIB, MIB, Pair, check, check_eq, wait_for  # noqa: E402

SIZE = 4 * MIB
BALLAST = 48 * MIB  # a third volume, which nobody writes
VOLUMES = ("root", "data")
LONG = 60
KILLS = 8


class Rig:
    """A pair whose group is written to on its primary, wherever that is, and the log of all that."""

    def __init__(self, rng, durability="power", ballast=False, **settings):
        self.rng = rng
        self.pair = p = Pair(durability=durability)
        if ballast:
            e2e.pwrite(p.a.create("ballast", BALLAST, "vm1"), 0, b"\x5a" * BALLAST, sync=True)
        p.protect(*VOLUMES, group="vm1", size=SIZE, **settings)
        if ballast:  # and after a crash it does not count as in flight any more
            wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty regions to clear", LONG)
            p.a.restart()
            p.a.wait_synced("vm1", LONG)
        self.primary, self.secondary = p.a, p.b
        self.log = e2e.Log({v: SIZE for v in VOLUMES})
        self.writer = None
        self.since = 0  # what is older than this may have been lost, rightly
        self.tick()

    def tick(self):
        self.writer = e2e.Writer(self.log, {v: self.primary.volume(v) for v in VOLUMES}, threads=4,
                                 seed=self.rng.randrange(1 << 30))

    def load(self, ops=60):
        self.tick()
        self.writer.start()
        self.writer.wait_ops(ops)

    def swap(self):
        self.primary, self.secondary = self.secondary, self.primary

    def sync(self):
        self.primary.wait_status("vm1", LONG, role="primary", state="RUNNING", link="SYNCED")
        self.secondary.wait_status("vm1", LONG, role="secondary", state="RUNNING", link="SYNCED")

    def verify(self, host, before, what):
        self.log.verify({v: host.volume(v) for v in VOLUMES}, what=what,
                        required=lambda w: w.ok and w.start > self.since and w.done < before)

    def equal(self, what):
        """Both have everything, once nobody writes."""
        self.sync()
        self.primary.repctl("checkpoint", "vm1")
        for v in VOLUMES:
            e2e.check_same(self.primary.volume(v), self.secondary.volume(v), "%s: %s and its view" % (what, v))
        wait_for(lambda: self.primary.status("vm1")["dirty_bytes"] == 0, "dirty regions to clear", LONG)
        self.pair.same(*VOLUMES)

    def moved(self, host):
        return host.status("vm1")["counters"]["resync_bytes"]

    def ended(self):
        """The writer was stopped by errors, all of them EIO: the handles that were open are dead."""
        wait_for(lambda: not self.writer.alive(), "the writer to be stopped", 20)
        self.writer.stop(errors_ok=True)
        check_eq([e.errno for e in self.writer.errors], [errno.EIO] * 4, "the writer's errors")


def test_switchover_under_load_both_ways():
    rig = Rig(random.Random(53), interval="300ms")
    took = []
    for i in range(4):
        old, new = rig.primary, rig.secondary
        rig.load()
        fd = os.open(old.volume("root"), os.O_RDWR | os.O_DIRECT)
        sent = rig.moved(new)
        begun = time.monotonic()
        doc = old.repctl("switchover", "vm1", json=True)
        took.append(time.monotonic() - begun)
        now = time.monotonic_ns()
        check_eq(old.status("vm1")["role"], "secondary", "the old side, when it is answered")
        check_eq(new.status("vm1")["role"], "primary", "the new side, when it is answered")
        rig.ended()
        rig.swap()
        rig.sync()
        rig.verify(new, now, "the new primary")
        check_eq(new.status("vm1")["state"], "RUNNING", "the new primary")
        check(new.status("vm1")["checkpoint"] >= doc["checkpoint"], "the checkpoint: %r" % doc)
        check_eq(rig.moved(new), sent, "bytes that were synced by it")
        for how, fn in (("a write", lambda: os.pwrite(fd, memoryview(e2e.aligned(bytes(BLOCK))), 0)), ("a flush", lambda: os.fsync(fd)),
                        ("a read", lambda: os.preadv(fd, [e2e.aligned(bytes(BLOCK))], 0))):
            check_eq(e2e.errno_of(fn), errno.EIO, how + " through a handle from before")
        os.close(fd)
        e2e.pread(old.volume("root"), 0, BLOCK)  # opened again it is a secondary's view
        check_eq(old.repctl("switchover", "vm1", json=True)["checkpoint"], None, "the same again: its checkpoint")
        old.repctl("switchover", "vm1").says("already")
        check_eq(new.status("vm1")["role"], "primary", "after the same again")
    rig.equal("in the end")
    print("  switchover under load: %s s" % ", ".join("%.2f" % t for t in took))
    check(max(took) < 2.0 * e2e.SLOW, "a switchover took %.2f s" % max(took))


def test_refusals_change_nothing():
    p = Pair()
    (vol,) = p.protect(size=4 * MIB, peer_timeout="1s")
    e2e.pwrite(vol, 0, b"\x11" * (4 * MIB), sync=True)
    fd = os.open(vol, os.O_RDWR | os.O_DIRECT)

    def refused(*words, on=p.a):
        on.repctl("switchover", "vm1", code=5).says(*words)
        check_eq(p.a.status("vm1")["role"], "primary", "the role after a refusal")
        os.pwrite(fd, memoryview(e2e.aligned(b"\x11" * BLOCK)), 0)  # and its guest goes on

    refused("secondary", "run it on the primary", on=p.b)
    e2e.pwrite(p.b.volume("vm1"), MIB, b"\x22" * BLOCK)
    refused("active overlay", "discard")
    e2e.check_bytes(p.b.volume("vm1"), MIB, BLOCK, 0x22, "what the secondary's guest wrote")
    p.b.repctl("discard", "vm1")
    p.a.repctl("pause", "vm1")
    refused("paused", "resume")
    p.a.repctl("resume", "vm1")
    p.a.wait_synced("vm1")
    p.b.kill9()
    p.a.wait_status("vm1", LONG, link="DOWN")
    refused("DOWN")
    p.b.start()
    p.a.wait_synced("vm1")
    os.close(fd)
    p.a.repctl("switchover", "nosuch", code=4)
    p.a.repctl("switchover", "vm1").says("peer is primary")
    p.b.wait_synced("vm1")
    e2e.check_bytes(p.b.volume("vm1"), 0, 4 * MIB, 0x11, "the new primary")
    p.a.repctl("stop", "vm1")  # from either side, as before
    p.b.wait_status("vm1", LONG, state="DONE", role="primary")
    p.b.repctl("switchover", "vm1", code=5).says("start")
    p.b.repctl("start", "vm1")
    p.b.wait_synced("vm1")
    p.b.repctl("switchover", "vm1")
    p.a.wait_synced("vm1")


def one_primary(rig):
    roles = []
    for h in (rig.pair.a, rig.pair.b):
        try:
            st = h.status("vm1")
        except (OSError, e2e.CtlError):
            continue
        check(not st["split_brain"], "a split brain")
        roles.append(st["role"])
    check(roles.count("primary") < 2, "two primaries")


def switch_killed(rig, victim, most):
    """The switchover is given, a daemon dies at a random moment of it and is started again; the same command is given until it
    succeeds."""
    old, new = rig.primary, rig.secondary
    cmd = subprocess.Popen([e2e.program("repctl"), "--store", old.store, "switchover", "vm1"], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    time.sleep(rig.rng.uniform(0, most))  # the moment of the kill
    victim.kill9()
    now = time.monotonic_ns()
    cmd.wait(60 * e2e.SLOW)
    one_primary(rig)
    victim.start()
    one_primary(rig)

    def done():
        one_primary(rig)
        if old.status("vm1")["role"] == "primary":
            old.wait_synced("vm1")
        return old.repctl("switchover", "vm1", code=None).code == 0

    wait_for(done, "the switchover to succeed", LONG)
    rig.writer.stop(errors_ok=True)
    rig.swap()
    rig.sync()
    rig.verify(new, now, "the new primary after kill -9 of %s" % victim.name)


def test_switchover_with_kills():
    rng = random.Random()
    seed = rng.randrange(1 << 31)
    rig = Rig(random.Random(seed), durability="process", interval="500ms")
    try:
        for i in range(KILLS):
            rig.load(30)
            switch_killed(rig, rig.rng.choice((rig.primary, rig.secondary)), 0.12)
        rig.equal("after %d kills" % KILLS)
    except e2e.TestError as e:
        raise e2e.TestError("seed %d: %s" % (seed, e)) from e


def failover_and_back(rig):
    """The primary's daemon is killed under load, its peer takes over with all it received, and the old one follows again."""
    old, new = rig.primary, rig.secondary
    rig.load(40)
    time.sleep(rig.rng.uniform(0, 0.3))
    lost = time.monotonic_ns()
    old.kill9()
    rig.writer.stop(errors_ok=True)
    new.wait_status("vm1", LONG, link="DOWN")
    new.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    rig.swap()
    flushed = rig.log.flushed_before(lost)
    since = rig.since
    rig.log.verify({v: new.volume(v) for v in VOLUMES}, required=lambda w: w.start > since and flushed(w), prefix="barrier" if not since
                   else None, what="the survivor")
    rig.since = time.monotonic_ns()  # F promised no more
    rig.load(40)
    old.start()
    old.wait_status("vm1", LONG, role=("primary", "secondary"))
    before = rig.moved(new)
    new.repctl("failback", "vm1", "--peer", old.listen)
    if rig.rng.random() < 0.7:  # and dies of it, one of them
        time.sleep(rig.rng.uniform(0, 0.1))
        victim = rig.rng.choice((old, new))
        victim.kill9()
        if victim is new:
            rig.writer.stop(errors_ok=True)
            before = 0
        victim.start()
    rig.sync()
    moved = rig.moved(new) - before
    check(moved <= 2 * SIZE * len(VOLUMES), "the failback moved %d bytes; what differs lies in %d, and it began anew once at the most"
          % (moved, SIZE * len(VOLUMES)))
    if not rig.writer.alive():
        rig.load(20)
    rig.writer.stop()
    rig.verify(new, time.monotonic_ns(), "the survivor, its guest going on")
    rig.equal("after the failback")
    return moved


def test_the_circle_with_kills():
    rng = random.Random()
    seed = rng.randrange(1 << 31)
    rig = Rig(random.Random(seed), durability="process", ballast=True, interval="500ms", peer_timeout="1s")
    try:
        moved = []
        for lap in range(2):  # A -> B by failover, B -> A by switchover; then the same from B's side
            moved.append(failover_and_back(rig))
            rig.load(30)
            switch_killed(rig, rig.rng.choice((rig.primary, rig.secondary)), 0.1)
            rig.equal("lap %d" % lap)
        for h in (rig.pair.a, rig.pair.b):
            e2e.check_bytes(h.volume("ballast"), 0, BALLAST, 0x5a, "the ballast on " + h.name, direct=False)
        print("  failbacks moved %s of %.0f MiB" % (", ".join("%.1f" % (m / MIB) for m in moved), (2 * SIZE + BALLAST) / MIB))
    except e2e.TestError as e:
        raise e2e.TestError("seed %d: %s" % (seed, e)) from e


def test_unprotect_and_protect_after_a_switchover():
    """The roles are those of the moment: the host that was made primary by a switchover ends the protection, and begins another."""
    p = Pair()
    (vol,) = p.protect(size=4 * MIB)
    e2e.pwrite(vol, 0, b"\x11" * (4 * MIB), sync=True)
    p.a.repctl("switchover", "vm1")
    p.b.wait_synced("vm1")
    e2e.pwrite(p.b.volume("vm1"), MIB, b"\x22" * MIB, sync=True)
    p.b.repctl("unprotect", "vm1")
    p.a.wait_status("vm1", LONG, role="secondary", state="DONE")
    p.a.repctl("unprotect", "vm1")
    for h in (p.a, p.b):
        check_eq(h.status("vm1")["role"], "standalone", "after unprotect, on " + h.name)
        e2e.check_bytes(h.volume("vm1"), 0, MIB, 0x11, "the first MiB on " + h.name)
        e2e.check_bytes(h.volume("vm1"), MIB, MIB, 0x22, "the second MiB on " + h.name)
    p.a.repctl("switchover", "vm1", code=5).says("protect")
    e2e.pwrite(p.b.volume("vm1"), 2 * MIB, b"\x33" * MIB, sync=True)
    e2e.pwrite(p.a.volume("vm1"), 3 * MIB, b"\x44" * MIB, sync=True)
    p.b.repctl("protect", "vm1", "--peer", p.a.listen, code=5).says("--adopt")
    before = p.b.status("vm1")["counters"]["resync_bytes"]
    p.b.repctl("protect", "vm1", "--peer", p.a.listen, "--adopt", "--hash", "--wait")
    moved = p.b.status("vm1")["counters"]["resync_bytes"] - before
    check(2 * MIB <= moved <= 2 * MIB + 256 * KIB, "protect --adopt --hash moved %d bytes for 2 MiB" % moved)
    p.b.repctl("checkpoint", "vm1")
    e2e.check_same(p.a.disk("vm1"), p.b.disk("vm1"), "the disks")
    kept = [c["number"] for c in p.a.repctl("checkpoints", "vm1", json=True)["checkpoints"] if c["pinned"]]
    e2e.check_bytes(p.a.checkpoint_file("vm1", kept[-1]), 3 * MIB, MIB, 0x44, "what the adopted copy held")
    p.b.repctl("switchover", "vm1")
    p.a.wait_synced("vm1")
    e2e.check_bytes(p.a.volume("vm1"), 3 * MIB, MIB, 0x11, "the fourth MiB, now primary again")


if __name__ == "__main__":
    e2e.main(limit=120)
