#!/usr/bin/env python3
"""History: every kept checkpoint is a disk image, byte for byte, whatever goes on beside it (SPEC 3, 4, 7); retention, copies,
extents, going back to an old one."""

import os
import random
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, MIB, Pair, TestError, Tmpfs, check, check_eq, wait_for  # noqa: E402

SIZE = 4 * MIB
FILES = 160
VOLUMES = ("root", "data")
LONG = float(os.environ.get("REPFS_HISTORY_SECONDS", "0"))  # of long_51_history.sh


class Model:
    """What both volumes of group vm1 hold, and held at each checkpoint; one lock makes a write and its place one step."""

    def __init__(self, paths, seed):
        self.paths, self.lock = dict(zip(VOLUMES, paths)), threading.Lock()
        self.now = {v: bytearray(SIZE) for v in VOLUMES}
        self.at = {}  # number -> {volume: bytes}
        self.written = {}  # number -> {volume: blocks written since the checkpoint before}
        self.touched = {v: set() for v in VOLUMES}
        self.rng, self.end, self.error, self.writes = random.Random(seed), False, None, 0

    def write(self):
        r = self.rng
        v, off = r.choice(VOLUMES), r.randrange(SIZE // 512) * 512
        n = min(SIZE - off, 512 * (1 + r.randrange(r.choice((1, 8, 64, 300)))))
        what = r.randrange(20)
        data = bytes(n) if what < 2 else r.randbytes(n)
        with self.lock:
            (e2e.punch if what == 0 else e2e.zero_range if what == 1 else lambda p, o, _: e2e.pwrite(p, o, data))(self.paths[v], off, n)
            self.now[v][off:off + n] = data
            self.touched[v].update(range(off // BLOCK, (off + n + BLOCK - 1) // BLOCK))
        self.writes += 1

    def _run(self):
        try:
            while not self.end:
                self.write()
        except Exception as e:  # told by stop()
            self.error = e

    def start(self):
        self.end = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def stop(self):
        self.end = True
        self.thread.join()
        if self.error:
            raise TestError("the writer: %s" % self.error)

    def checkpoint(self, p, **flags):
        with self.lock:
            n = p.a.ctl("checkpoint", name="vm1", **flags)["checkpoint"]
            self.at[n] = {v: bytes(self.now[v]) for v in VOLUMES}
            self.written[n], self.touched = self.touched, {v: set() for v in VOLUMES}
        return n


def kept(host):
    return [c["number"] for c in host.ctl("checkpoints", name="vm1")["checkpoints"]]


def compare(host, model, n):
    """Whether checkpoint n is what it was, or has been dropped meanwhile."""
    for v in VOLUMES:
        try:
            with open(host.checkpoint_file(v, n), "rb", buffering=0) as f:
                got = f.read(SIZE)
        except OSError:
            if n in kept(host):
                raise
            return False
        if got != model.at[n][v] and n in kept(host):
            bad = [i // BLOCK for i in range(0, SIZE, BLOCK) if got[i:i + BLOCK] != model.at[n][v][i:i + BLOCK]]
            raise TestError("checkpoint %d of %s differs in blocks %r" % (n, v, bad[:20]))
    return True


class Reader:
    """Compares kept checkpoints, at random, until it is stopped."""

    def __init__(self, host, model, seed):
        self.host, self.model, self.rng, self.end, self.error, self.reads = host, model, random.Random(seed), False, None, 0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            while not self.end:
                known = [n for n in kept(self.host) if n in self.model.at]
                if known:
                    self.reads += compare(self.host, self.model, self.rng.choice(known))
        except Exception as e:
            self.error = e

    def stop(self):
        self.end = True
        self.thread.join()
        if self.error:
            raise TestError("the reader: %s" % self.error)


def all_right(host, model, want=1):
    numbers = [n for n in kept(host) if n in model.at]
    check(len(numbers) >= want, "only %d known checkpoints are kept: %r" % (len(numbers), kept(host)))
    for n in numbers:
        compare(host, model, n)
    return numbers


def started(seed, **kw):
    p = Pair()
    paths = p.protect(*VOLUMES, group="vm1", size=SIZE, **kw)
    m = Model(paths, seed)
    for _ in range(30):
        m.write()
    m.checkpoint(p)
    return p, m


def test_right_beside_everything():
    """Writes, checkpoints, merges by retention and by command, a resync, kill -9, a failover and its commit, and the survivor."""
    p, m = started(1, keep_last=8)
    pinned = m.checkpoint(p, keep=True)
    m.start()
    reader, rng = Reader(p.b, m, 2), random.Random(3)
    end = time.monotonic() + (LONG or 6)
    rounds = 0
    while time.monotonic() < end or rounds < 12:
        rounds += 1
        m.checkpoint(p)
        middle = kept(p.b)[1:-1]
        if rng.random() < 0.4 and middle:  # it may be retention's already, or needed
            n = rng.choice(middle)
            if n != pinned:
                p.b.repctl("-y", "checkpoints", "vm1", "--drop", str(n), code=(0, 4, 5))
        if rounds % 9 == 5:  # what was written meanwhile is resynced, through the live epoch
            p.a.repctl("pause", "vm1")
            time.sleep(0.1)
            p.a.repctl("resume", "vm1")
            p.a.wait_synced("vm1")
    reader.stop()
    check(reader.reads >= 5, "only %d checkpoints were read beside it" % reader.reads)
    all_right(p.b, m)
    p.b.kill9()
    p.b.start()
    all_right(p.b, m)
    p.a.wait_synced("vm1")
    m.checkpoint(p)
    reader = Reader(p.b, m, 4)
    wait_for(lambda: reader.reads or reader.error, "a read")
    m.stop()
    p.a.kill9()
    last = kept(p.b)[-1]
    doc = p.b.repctl("-y", "failover", "vm1", json=True)
    check_eq(doc["checkpoint"], last, "what the failover went back to")
    m.now = {v: bytearray(m.at[last][v]) for v in VOLUMES}
    m.paths = {v: p.b.volume(v) for v in VOLUMES}
    m.start()  # the survivor writes beside its commit
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "60", timeout=70)
    writes = m.writes
    wait_for(lambda: m.writes >= writes + 50 or m.error, "writes of the survivor")
    m.stop()
    reader.stop()
    numbers = all_right(p.b, m)
    check(pinned in numbers, "the pinned checkpoint is gone: %r" % numbers)
    for v in VOLUMES:
        e2e.expect_file(p.b.volume(v), bytes(m.now[v]), "the survivor's " + v)
    p.b.restart()
    check_eq([n for n in kept(p.b) if n in m.at][-1], last, "the newest known one after a restart")
    all_right(p.b, m)


test_right_beside_everything.limit = 240 + LONG


def test_back_to_one_of_hundreds():
    """Under a limit of open files that is a fifth of what they have."""
    p, m = started(5, keep_last=2000)
    first = kept(p.b)[-1]
    for _ in range(150):
        m.write()
        m.checkpoint(p)
    e2e.need("prlimit")
    p.b.prefix = lambda: ["prlimit", "--nofile=%d:%d" % (FILES, FILES)]
    p.b.restart()
    p.a.wait_synced("vm1")
    m.checkpoint(p)
    e2e.pwrite(p.b.volume("root"), 0, b"\x77" * BLOCK)  # active, and discarded
    check_eq(p.b.repctl("discard", "vm1", json=True)["discarded_bytes"], BLOCK, "what discard says")
    for v in VOLUMES:
        e2e.expect_file(p.b.volume(v), bytes(m.now[v]), "the view of %s after the discard" % v)
    with m.lock:
        for v in VOLUMES:  # received and in no checkpoint
            e2e.pwrite(m.paths[v], 0, b"\x55" * BLOCK, sync=True)
            m.now[v][:BLOCK] = b"\x55" * BLOCK
    numbers = kept(p.b)
    check(len(numbers) >= 150, "%d are kept" % len(numbers))
    to = numbers[numbers.index(first) + 37]
    p.b.repctl("-y", "failover", "vm1", "--to", str(to + 100000), code=4).says(str(to + 100000))
    t = time.monotonic()
    doc = p.b.repctl("-y", "failover", "vm1", "--to", str(to), json=True)
    check(time.monotonic() - t < 1 * e2e.SLOW + 1, "failover to one of %d answers after %.1f s" % (len(numbers), time.monotonic() - t))
    check_eq(doc["checkpoint"], to, "failover --to N says")
    for v in VOLUMES:
        e2e.expect_file(p.b.volume(v), m.at[to][v], "%s right after the failover" % v)
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "60", timeout=70)
    for v in VOLUMES:
        e2e.expect_file(p.b.volume(v), m.at[to][v], "%s after the commit" % v)
        e2e.expect_file(p.b.checkpoint_file(v, doc["received_checkpoint"]), bytes(m.now[v]), "%s as received" % v)
    check_eq(kept(p.b), numbers + [doc["received_checkpoint"]], "what is kept")
    check_eq(all_right(p.b, m, 150)[0], first, "the oldest")
    files = len(os.listdir("/proc/%d/fd" % p.b.pid()))
    check(FILES // 2 <= files <= FILES, "%d files are open" % files)
    p.b.repctl("-y", "checkpoints", "vm1", "--drop", str(to), code=5)  # the last failover's target
    p.b.repctl("set", "vm1", "keep_last=90", "keep_hourly=1")
    wait_for(lambda: len(kept(p.b)) <= 115, "retention to thin hundreds", 60)
    left = kept(p.b)
    check({to, doc["received_checkpoint"]} <= set(left), "left: %r" % left)
    for n in left[:12]:  # into these the dropped ones were merged; retention still goes on, but not beyond `to`
        check(n not in m.at or compare(p.b, m, n) or (n != to and n not in kept(p.b)), "checkpoint %d can't be read" % n)


def test_copies_and_extents():
    p, m = started(7, keep_last=100)
    numbers = [kept(p.b)[-1]]
    for k in range(5):
        for _ in range(k * 4):  # the first is like the one before it
            m.write()
        numbers.append(m.checkpoint(p))
    d = e2e.tmp()
    for v in VOLUMES:
        for n in numbers:
            src, copy, out = p.b.checkpoint_file(v, n), os.path.join(d, "%s-%d" % (v, n)), os.path.join(d, "%s-%d.raw" % (v, n))
            e2e.run(["cp", "--sparse=auto", src, copy])
            e2e.expect_file(copy, m.at[n][v], "a cp of %s@%d" % (v, n))
            check_eq(os.stat(src).st_size, SIZE, "the size of a checkpoint's file")
            p.b.repctl("export", "%s@%d" % (v, n), out)
            e2e.expect_file(out, m.at[n][v], "an export of %s@%d" % (v, n))
            check(e2e.allocated(out) <= SIZE, "%d bytes are allocated for an export" % e2e.allocated(out))
        for i, since in enumerate(numbers):
            for n in numbers[i + 1:]:
                doc = p.b.repctl("extents", "%s@%d" % (v, n), "--since", str(since), json=True)
                got = set()
                for x in doc["extents"]:
                    check(x["offset"] % BLOCK == 0 and x["offset"] + x["length"] <= SIZE, "extent %r" % x)
                    got.update(range(x["offset"] // BLOCK, (x["offset"] + x["length"] + BLOCK - 1) // BLOCK))
                a, b = m.at[since][v], m.at[n][v]
                differ = {i // BLOCK for i in range(0, SIZE, BLOCK) if a[i:i + BLOCK] != b[i:i + BLOCK]}
                written = set().union(*(m.written[k][v] for k in numbers if since < k <= n))
                check(differ <= got <= written, "changed from %d to %d: %d blocks differ, %d are told, %d were written"
                      % (since, n, len(differ), len(got), len(written)))
    # bad input leaves nothing behind
    n, b = numbers[-1], p.b
    out = os.path.join(d, "root-%d.raw" % n)
    b.repctl("export", "root@%d" % n, out, code=(1, 2)).says("exists")
    e2e.expect_file(out, m.at[n]["root"], "a target that existed")
    b.repctl("-y", "checkpoints", "vm1", "--drop", str(numbers[1]))
    for args in (("export", "root@99999", os.path.join(d, "x")), ("extents", "root@99999"),
                 ("extents", "root@%d" % n, "--since", str(numbers[1])), ("failover", "vm1", "--to", str(numbers[1])),
                 ("checkpoints", "vm1", "--drop", "99999"), ("export", "nope@1", os.path.join(d, "x"))):
        b.repctl("-y", *args, code=4)
    b.repctl("extents", "root@%d" % numbers[0], "--since", str(n), code=2).says("newer")
    b.repctl("extents", "root@%d" % n, "--since", str(n), code=2)
    b.repctl("extents", "root@%d" % n, "--since", "99999", code=2).says("newer")
    b.repctl("export", "root@0", os.path.join(d, "x"), code=(2, 4))
    b.repctl("export", "root@x", os.path.join(d, "x"), code=(2, 4))
    check(not os.path.exists(os.path.join(d, "x")), "a refused export left a file")
    e2e.check_errno(2, "a checkpoint that is not", os.stat, b.checkpoint_file("root", 99999))
    check_eq(os.readlink(b.checkpoint_file("root")), str(n), "latest")


def test_export_without_room():
    p, m = started(9)
    disk = Tmpfs(2 * MIB)
    m.now["root"][:] = m.rng.randbytes(SIZE)
    e2e.pwrite(m.paths["root"], 0, bytes(m.now["root"]), sync=True)
    n = m.checkpoint(p)
    p.b.repctl("export", "root@%d" % n, os.path.join(disk.path, "copy"), code=1).says("space")
    check_eq(os.listdir(disk.path), [], "what an export without room left")
    compare(p.b, m, n)


def test_settings_of_retention():
    p, m = started(11, keep_last=3)
    p.a.repctl("set", "vm1", "keep_minutely=5", "keep_hourly=24", "keep_daily=7")
    check_eq([p.b.ctl("get", name="vm1")["settings"]["keep_" + k] for k in ("minutely", "hourly", "daily")], ["5", "24", "7"], "settings")
    p.a.repctl("set", "vm1", "keep_daily=2001", code=2)
    numbers = []
    for _ in range(8):
        m.write()
        numbers.append(m.checkpoint(p))
    wait_for(lambda: len(kept(p.b)) <= 3 + 2 and kept(p.b)[-3:] == numbers[-3:], "three and the newest of each minute", 10)
    for _ in range(6):  # nothing is written: what differs stays, the newest three too
        last = m.checkpoint(p)
    wait_for(lambda: kept(p.b)[-3:] == [last - 2, last - 1, last] and last - 3 not in kept(p.b), "empty ones to go", 10)
    check(set(numbers[-3:]) <= set(kept(p.b)), "an idle guest has pushed out %r: %r" % (numbers[-3:], kept(p.b)))
    all_right(p.b, m, 6)


def test_history_max_bytes():
    """80 % of it thins history, and asks for a checkpoint where the live epoch is most of it."""
    p = Pair()
    (vol,) = p.protect(size=16 * MIB, keep_last=100)
    e2e.pwrite(vol, 0, b"\x11" * 16 * MIB, sync=True)
    first = p.checkpoint()
    p.a.repctl("set", "vm1", "history_max_bytes=10M")

    def held():
        v = p.b.status("vm1")["volumes"][0]
        return v["history_bytes"] + v["hidden_bytes"]

    for i in range(5):
        e2e.pwrite(vol, i * 3 * MIB, b"\x22" * 3 * MIB, sync=True)
        p.checkpoint()
    wait_for(lambda: held() < 8 * MIB, "history to be thinned", 20)
    check(first not in kept(p.b) and len(kept(p.b)) >= 2, "left: %r" % kept(p.b))
    before = kept(p.b)[-1]
    e2e.pwrite(vol, 0, b"\x33" * 9 * MIB, sync=True)  # checkpoint_interval is 0
    wait_for(lambda: kept(p.b)[-1] > before, "an early checkpoint", 20)
    wait_for(lambda: held() < 8 * MIB, "the epoch that it closed to go", 20)
    e2e.check_same(vol, p.b.volume("vm1"), "the view at the early checkpoint")
    check_eq(p.a.status("vm1")["link"], "SYNCED", "link")


if __name__ == "__main__":
    e2e.main()
