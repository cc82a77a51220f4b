#!/usr/bin/env python3
"""kill -9 of each daemon at random moments under load, byte for byte against the log of what was written and answered.

  long_31_kill9.py [--rounds N] [--seed S] [KIND...]      default: 50 rounds of each kind

  secondary  the secondary is killed while writes, flushes, discards and checkpoints go on, and started again
  primary    the primary is killed, its guest's writes fail, it is started again
  failover   the secondary is killed, the primary's host is lost, the secondary is started and failed over: it must be
             the last checkpoint, exactly one cut through the stream (I1, I3, I7)
  latest     the primary's host is lost: what was flushed under F survives, as one prefix (I2, I12); in every second
             round the secondary is killed first, started again and failed over: a prefix up to a barrier, and some of what
             follows
  commit     the secondary is killed right after it was told to fail over, again and again (I15)

A failing round prints its seed; --rounds 1 --seed S KIND repeats it as far as timing allows.
"""

import os
import random
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import MIB, Pair, check, check_eq, wait_for  # noqa: E402

SIZE = 8 * MIB
VOLUMES = ("root", "data")


class Checkpointer:
    """Takes checkpoints at random moments; remembers between which times each was taken."""

    def __init__(self, pair, rng):
        self.pair, self.rng = pair, rng
        self.windows = {}  # number: (asked, answered)
        self.asked = None  # the one under way
        self.stop_flag = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        e2e.track(self)

    def _run(self):
        while not self.stop_flag.wait(self.rng.uniform(0.02, 0.3)):
            try:
                self.asked = time.monotonic_ns()
                n = self.pair.a.ctl("checkpoint", name="vm1")["checkpoint"]
                self.windows[n] = (self.asked, time.monotonic_ns())
                self.asked = None
            except (OSError, e2e.CtlError, ValueError):
                continue

    def stop(self):
        self.stop_flag.set()
        self.thread.join(30 * e2e.SLOW)
        check(not self.thread.is_alive(), "a checkpoint command hangs")

    def window(self, n):
        """Between which times checkpoint n was taken, as far as known."""
        if n in self.windows:
            return self.windows[n]
        older = [w for k, w in self.windows.items() if k < n]
        newer = [w for k, w in self.windows.items() if k > n]
        return (max((w[0] for w in older), default=0), min((w[1] for w in newer), default=time.monotonic_ns()))

    close = stop


class Rig:
    def __init__(self, rng, proxy=True, protocol="F"):
        self.rng = rng
        # With `power` the secondary syncs between saving and writing: more is under way whenever it is killed.
        self.pair = Pair(proxy=proxy, durability=rng.choice(("process", "power")))
        self.pair.protect(*VOLUMES, group="vm1", size=SIZE, protocol=protocol, keep_last=5)
        self.log = e2e.Log({v: SIZE for v in VOLUMES}, unit=rng.choice((512, 4096)))
        self.writer = e2e.Writer(self.log, {v: self.pair.a.volume(v) for v in VOLUMES}, threads=4, seed=rng.randrange(1 << 30),
                                 fsync_every=rng.choice((5, 25, 100)))
        self.ckpt = None
        self.kept = None  # the checkpoint that settle has pinned

    def load(self):
        self.writer.start()
        self.writer.wait_ops(20)
        self.ckpt = Checkpointer(self.pair, self.rng)

    def random_moment(self, most=0.8):
        # The only sleep: it chooses the moment of the kill.
        time.sleep(self.rng.uniform(0, most))

    def view(self, host):
        return {v: host.volume(v) for v in VOLUMES}

    def settle(self):
        """In sync, quiet, equal, and all that was answered is there."""
        p = self.pair
        p.a.wait_synced("vm1", 40)
        p.b.wait_synced("vm1", 20)
        self.writer.pause()
        n = int(p.a.repctl("checkpoint", "vm1", "--keep").out)  # retention would drop it under a slow reader
        now = time.monotonic_ns()
        p.same(*VOLUMES)
        self.log.verify({v: p.b.checkpoint_file(v, n) for v in VOLUMES}, required=self.log.completed_before(now),
                        what="checkpoint %d" % n)
        for v in VOLUMES:
            e2e.check_same(p.a.volume(v), p.b.volume(v), "primary and view of " + v)
        if self.kept:
            p.b.repctl("-y", "checkpoints", "vm1", "--drop", self.kept, code=(0, 5))
        self.kept = n
        self.writer.resume()


def rounds_secondary(rng, rounds, report):
    rig = Rig(rng, proxy=False)
    rig.load()
    for i in range(rounds):
        report(i)
        rig.random_moment()
        rig.pair.b.kill9()
        if rng.random() < 0.5:
            rig.random_moment(0.3)
        rig.pair.b.start()
        if rng.random() < 0.3:  # again before it is in sync
            rig.random_moment(0.2)
            rig.pair.b.kill9()
            rig.pair.b.start()
        rig.settle()
        rig.writer.check_errors()
    rig.ckpt.stop()
    rig.writer.stop()


def rounds_primary(rng, rounds, report):
    rig = Rig(rng, proxy=False)
    rig.load()
    for i in range(rounds):
        report(i)
        rig.random_moment()
        rig.pair.a.kill9()
        rig.writer.stop(errors_ok=True)
        before = time.monotonic_ns()
        rig.pair.a.start()
        if rng.random() < 0.3:
            rig.random_moment(0.2)
            rig.pair.a.kill9()
            rig.pair.a.start()
        rig.log.verify(rig.view(rig.pair.a), required=rig.log.completed_before(before), what="the primary after kill -9")
        rig.writer.start()
        rig.settle()
    rig.ckpt.stop()
    rig.writer.stop()


def survivor_is_checkpoint(rig, doc, what):
    """I1: the volumes are the checkpoint that the failover names, which is one cut through what was written."""
    b = rig.pair.b
    n = doc["checkpoint"]
    asked, answered = rig.ckpt.window(n)
    known = max(rig.ckpt.windows, default=0)
    check(n >= known, "%s: went back to checkpoint %d; %d had been answered" % (what, n, known))
    rig.log.verify(rig.view(b), required=rig.log.completed_before(asked), newest=answered, prefix="stream", what=what)


def rounds_failover(rng, rounds, report):
    for i in range(rounds):
        report(i)
        rig = Rig(rng)
        rig.load()
        wait_for(lambda: rig.ckpt.windows, "the first checkpoint")
        rig.random_moment()
        rig.pair.b.kill9()
        rig.pair.proxy.lose()
        rig.ckpt.stop()
        rig.writer.stop()
        b = rig.pair.b
        b.start()
        doc = b.repctl("-y", "failover", "vm1", json=True)
        survivor_is_checkpoint(rig, doc, "right after failover")
        b.repctl("wait", "vm1", "--for=done", "--timeout", "30")
        survivor_is_checkpoint(rig, doc, "after the commit")
        for v in VOLUMES:
            e2e.check_same(b.volume(v), b.disk(v), "mount and disk")
        rig.log.verify({v: b.checkpoint_file(v, doc["received_checkpoint"]) for v in VOLUMES}, prefix="barrier",
                       what="the checkpoint as received")
        e2e.close_or_fail()


def rounds_latest(rng, rounds, report):
    for i in range(rounds):
        report(i)
        proto = rng.choice("FC")
        rig = Rig(rng, protocol=proto)
        rig.load()
        rig.pair.proxy.delay = rng.choice((0, 0.005, 0.03))
        rig.random_moment()
        b = rig.pair.b
        lost = time.monotonic_ns()  # before: once it notices, the primary goes on alone
        if i % 2:
            b.kill9()
        rig.pair.proxy.lose()
        rig.pair.a.kill9()
        rig.ckpt.stop()
        rig.writer.stop(errors_ok=True)
        if i % 2:
            b.start()
        b.wait_status("vm1", 10, link="DOWN")
        b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait", timeout=60)
        required = rig.log.flushed_before(lost) if proto == "F" else rig.log.completed_before(lost)
        rig.log.verify(rig.view(b), required=required, prefix="barrier" if i % 2 else "stream", what="the survivor (%s)" % proto)
        e2e.close_or_fail()


def rounds_commit(rng, rounds, report):
    for i in range(rounds):
        report(i)
        rig = Rig(rng)
        rig.load()
        wait_for(lambda: rig.ckpt.windows, "the first checkpoint")
        rig.random_moment(0.4)
        b = rig.pair.b
        rig.pair.proxy.lose()
        rig.ckpt.stop()
        rig.writer.stop()
        killer = threading.Timer(rng.uniform(0, 0.06), b.proc.kill)
        b.expect_dead = True
        killer.start()
        b.repctl("-y", "failover", "vm1", code=None)
        killer.join()
        b.proc.wait(20)
        b._gone()
        for _ in range(rng.randrange(3)):
            b.start()
            rig.random_moment(0.05)
            b.kill9()
        b.start()
        doc = b.repctl("-y", "failover", "vm1", "--wait", json=True)
        survivor_is_checkpoint(rig, doc, "after a commit that was killed")
        check_eq(b.status("vm1")["state"], "DONE", "state")
        for v in VOLUMES:
            e2e.check_same(b.volume(v), b.disk(v), "mount and disk")
        e2e.close_or_fail()


KINDS = {"secondary": rounds_secondary, "primary": rounds_primary, "failover": rounds_failover, "latest": rounds_latest,
         "commit": rounds_commit}


def run(kind, rounds, seed, report=lambda i: None):
    """`rounds` rounds; a failure names kind, round and seed."""
    at = [0]

    def mark(i):
        at[0] = i
        report(i)

    try:
        KINDS[kind](random.Random(seed), rounds, mark)
    except e2e.TestError as e:
        raise e2e.TestError("%s, round %d, --seed %d: %s" % (kind, at[0] + 1, seed, e)) from e


def main():
    rounds, seed, kinds = 50, random.randrange(1 << 31), []
    args = sys.argv[1:]
    while args:
        a = args.pop(0)
        if a == "--rounds":
            rounds = int(args.pop(0))
        elif a == "--seed":
            seed = int(args.pop(0))
        elif a in KINDS:
            kinds.append(a)
        else:
            sys.exit(__doc__)
    begun = time.monotonic()

    def test(kind):
        def fn():
            run(kind, rounds, seed, lambda i: i % 10 == 9 and print("  %s: round %d of %d" % (kind, i + 1, rounds), flush=True))
        fn.limit = 60 + rounds * 20
        return fn

    sys.argv = sys.argv[:1]
    print("seed %d" % seed)
    try:
        e2e.main(tests=[(k, test(k)) for k in kinds or KINDS])
    finally:
        print("%d rounds of each, %.0f s" % (rounds, time.monotonic() - begun))


if __name__ == "__main__":
    main()
