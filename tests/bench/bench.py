#!/usr/bin/env python3
"""Speed as ratios within one run; README.md says how to read it.

  bench.py [--rounds N] [--seconds S] [--json FILE] [--check] [writes|alone|checkpoint|failover|history|memory]...

--check: exit 1 if a floor is missed.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import GIB, MIB, TIB, Host, Pair, check, wait_for  # noqa: E402

ROUNDS, SECONDS = 5, 4
FILE_SIZE = 512 * MIB


class Minifuse:
    """The least a FUSE server can do: pread and pwrite of one file (tests/bench/minifuse.c)."""

    def __init__(self, size):
        self.dir = e2e.tmp()
        self.mnt = os.path.join(self.dir, "m")
        os.mkdir(self.mnt)
        self.file = os.path.join(self.dir, "plain.raw")
        with open(self.file, "wb") as f:
            f.truncate(size)
        self.proc = subprocess.Popen([e2e.program("minifuse"), self.file, self.mnt], stdin=subprocess.DEVNULL)
        e2e.track(self)
        self.path = wait_for(self._served, "minifuse to serve its file", 10)

    def _served(self):
        check(self.proc.poll() in (None, 0), "minifuse ended with %r" % self.proc.poll())
        if not e2e.is_mounted(self.mnt):
            return None
        names = os.listdir(self.mnt)
        return os.path.join(self.mnt, names[0]) if names else None

    def close(self):
        e2e._umount(self.mnt)
        try:
            self.proc.wait(5)
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.wait(5)


def fio(path, size=FILE_SIZE, seconds=None, engine="libaio"):
    """Random 4 KiB direct writes at depth 16; (IOPS, 99th percentile in us)."""
    e2e.need("fio")
    r = e2e.run(["fio", "--name=w", "--filename=" + path, "--size=%d" % size, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--direct=1",
                 "--ioengine=" + engine, "--time_based", "--runtime=%g" % (seconds or SECONDS), "--randrepeat=0", "--norandommap",
                 "--refill_buffers", "--output-format=json"], timeout=120 + 2 * SECONDS, cwd=e2e.tmp())
    w = json.loads(r.stdout[r.stdout.index("{"):])["jobs"][0]["write"]
    return w["iops"], w["clat_ns"]["percentile"]["99.000000"] / 1000


def fill(path, size):
    """Every block really there, so that no side pays for allocation while it is measured."""
    block = os.urandom(4 * MIB)
    for off in range(0, size, len(block)):
        e2e.pwrite(path, off, block[:min(len(block), size - off)])
    e2e.fsync(path)


def bench_writes():
    """4 KiB random writes at depth 16: F in sync, against the minimal server; the other protocols and a lone volume beside it."""
    p = Pair(durability="power")
    (vol,) = p.protect(size=FILE_SIZE, interval=5)
    mini = Minifuse(FILE_SIZE)
    fill(vol, FILE_SIZE)
    fill(mini.path, FILE_SIZE)
    p.a.wait_synced("vm1", 120)
    fio(vol, seconds=1)
    fio(mini.path, seconds=1)
    rows = []
    for _ in range(ROUNDS):
        a, a99 = fio(mini.path)
        e2e.fsync(mini.path)
        b, b99 = fio(vol)
        e2e.fsync(vol)
        st = p.a.status("vm1")
        check(st["link"] == "SYNCED" and st["protocol"] == "F", "the group was not in sync: %s" % st["link"])
        rows.append((b / a, a, b, a99, b99))
        print("  round: minifuse %.0f, repfs F %.0f IOPS, ratio %.2f" % (a, b, b / a), file=sys.stderr)
    rows.sort()
    ratio = statistics.median(r[0] for r in rows)
    out = {"writes_ratio": ratio, "minifuse_iops": statistics.median(r[1] for r in rows), "repfs_f_iops": statistics.median(r[2] for r in rows),
           "minifuse_p99_us": statistics.median(r[3] for r in rows), "repfs_f_p99_us": statistics.median(r[4] for r in rows),
           "ratios": [round(r[0], 3) for r in rows]}
    for proto in "AC":
        p.a.repctl("set", "vm1", "protocol=" + proto)
        out["repfs_%s_iops" % proto.lower()] = fio(vol)[0]
        # The next one does not pay for what this one has left in the queue.
        p.a.repctl("set", "vm1", "protocol=F")
        e2e.fsync(vol)
    p.a.repctl("stop", "vm1", timeout=120)
    out["repfs_stopped_iops"] = fio(vol)[0]
    return out


def bench_alone():
    """The same writes with the peer gone, against the minimal server: what dirty tracking costs."""
    p = Pair(durability="power")
    (vol,) = p.protect(size=FILE_SIZE, interval=0)
    mini = Minifuse(FILE_SIZE)
    fill(vol, FILE_SIZE)
    fill(mini.path, FILE_SIZE)
    p.a.wait_status("vm1", 120, dirty_bytes=0)
    p.a.restart()  # what is clean loses its marks: the first round pays for them again
    p.a.wait_synced("vm1", 120)
    p.b.kill9()
    p.a.wait_status("vm1", 60, link="DOWN")
    fio(mini.path, seconds=1)
    rows = []
    for _ in range(ROUNDS):
        a = fio(mini.path)[0]
        e2e.fsync(mini.path)
        b = fio(vol)[0]
        e2e.fsync(vol)
        rows.append(b / a)
        print("  round: minifuse %.0f, repfs alone %.0f IOPS, ratio %.2f" % (a, b, b / a), file=sys.stderr)
    return {"alone_ratio": statistics.median(rows), "alone_first_ratio": rows[0], "alone_ratios": [round(r, 3) for r in rows]}


def bench_checkpoint():
    """`checkpoint` with 1 MiB and with 1 GiB dirty since the last one; all of it durable on the peer before."""
    size = 2 * GIB
    p = Pair()
    (vol,) = p.protect(size=size, keep_last=2)
    block = os.urandom(4 * MIB)
    for off in range(0, GIB, len(block)):
        e2e.pwrite(vol, off, block)
    e2e.fsync(vol)
    p.a.wait_synced("vm1", 120)
    p.checkpoint()
    times = {MIB: [], GIB: []}
    for i in range(min(ROUNDS, 5)):
        for dirty in (MIB, GIB) if i % 2 else (GIB, MIB):
            for off in range(0, dirty, len(block)):
                e2e.pwrite(vol, off, block[:min(dirty, len(block))])
            e2e.fsync(vol)
            wait_for(lambda: p.b.status("vm1")["volumes"][0]["hidden_bytes"] >= dirty, "the overlay to hold it", 60)
            os.sync()  # no writeback of what was just written, which is the same disk's business and not the checkpoint's
            t = time.monotonic()
            p.a.ctl("checkpoint", name="vm1", timeout=60)
            times[dirty].append((time.monotonic() - t) * 1000)
            print("  checkpoint with %d MiB dirty: %.1f ms" % (dirty // MIB, times[dirty][-1]), file=sys.stderr)
    small, large = statistics.median(times[MIB]), statistics.median(times[GIB])
    return {"checkpoint_1m_ms": small, "checkpoint_1g_ms": large, "checkpoint_longer_ms": large - small}


def bench_failover():
    """The answer of `failover` with 1 GiB in hidden and 1 GiB in active."""
    size = 2 * GIB
    p = Pair()
    (vol,) = p.protect(size=size)
    block = os.urandom(4 * MIB)
    for off in range(0, GIB, len(block)):
        e2e.pwrite(vol, off, block)
    e2e.fsync(vol)
    p.checkpoint()
    for off in range(0, GIB, len(block)):
        e2e.pwrite(vol, off, block)
        e2e.pwrite(p.b.volume("vm1"), GIB + off, block)
    e2e.fsync(vol)
    t = time.monotonic()
    p.b.ctl("failover", name="vm1", timeout=60)
    answer = time.monotonic() - t
    e2e.pread(p.b.volume("vm1"), GIB, MIB)
    first = time.monotonic() - t
    p.b.repctl("wait", "vm1", "--for=done", "--timeout", "300", timeout=310)
    return {"failover_answer_s": answer, "failover_first_read_s": first, "failover_commit_s": time.monotonic() - t}


def fio_reads(path, size, depth):
    """Random 4 KiB direct reads; IOPS."""
    e2e.need("fio")
    r = e2e.run(["fio", "--name=r", "--filename=" + path, "--size=%d" % size, "--rw=randread", "--bs=4k", "--iodepth=%d" % depth, "--direct=1",
                 "--ioengine=libaio", "--time_based", "--runtime=%g" % SECONDS, "--randrepeat=0", "--norandommap", "--readonly",
                 "--output-format=json"], timeout=120 + 2 * SECONDS, cwd=e2e.tmp())
    return json.loads(r.stdout[r.stdout.index("{"):])["jobs"][0]["read"]["iops"]


HISTORY = {"few": 10, "many": 1000}
HISTORY_WRITES = 50  # 4 KiB each, at random, in each epoch


def timed_checkpoint(p, group):
    t = time.monotonic()
    n = p.a.ctl("checkpoint", name=group, timeout=60)["checkpoint"]
    return n, (time.monotonic() - t) * 1000


def scatter(fd, size, block):
    for off in random.sample(range(0, size, 4096), HISTORY_WRITES):
        os.pwrite(fd, block, off)


def bench_history():
    """Reads of the oldest checkpoint, and `checkpoint` itself, with 1,000 kept against few."""
    size = 128 * MIB
    p = Pair()
    block = e2e.aligned(os.urandom(4096))
    vols, oldest = {}, {}
    for g in list(HISTORY) + ["none"]:
        (vols[g],) = p.protect(g, group=g, size=size, keep_last=2000)
        fill(vols[g], size)
        p.a.wait_synced(g, 120)
    rss = p.b.rss_bytes()
    for g, count in HISTORY.items():
        with e2e.opened(vols[g], os.O_WRONLY, True) as fd:
            oldest[g] = timed_checkpoint(p, g)[0]
            for _ in range(count - 1):
                scatter(fd, size, block)
                timed_checkpoint(p, g)
            scatter(fd, size, block)
        e2e.fsync(vols[g])
        while p.b.ctl("checkpoints", name=g)["checkpoints"][0]["number"] < oldest[g]:  # that of the first sync
            p.b.repctl("-y", "checkpoints", g, "--drop", str(p.b.ctl("checkpoints", name=g)["checkpoints"][0]["number"]))
        kept = len(p.b.ctl("checkpoints", name=g)["checkpoints"])
        check(kept == count, "%d checkpoints are kept of %s, not %d" % (kept, g, count))
    out = {"history_rss_mib": (p.b.rss_bytes() - rss) / MIB}
    for depth in (1, 16):
        rows = []
        for _ in range(ROUNDS):
            a = fio_reads(p.b.checkpoint_file("few", oldest["few"]), size, depth)
            b = fio_reads(p.b.checkpoint_file("many", oldest["many"]), size, depth)
            rows.append((b / a, a, b))
            print("  depth %d: of 10 %.0f, of 1000 %.0f IOPS, ratio %.2f" % (depth, a, b, b / a), file=sys.stderr)
        out["history_read_ratio" if depth == 1 else "history_read16_ratio"] = statistics.median(r[0] for r in rows)
        out["history_read%d_iops" % depth] = statistics.median(r[2] for r in rows)
    times = {"none": [], "many": []}
    for i in range(40):
        for g in ("none", "many") if i % 2 else ("many", "none"):
            with e2e.opened(vols[g], os.O_WRONLY, True) as fd:
                scatter(fd, size, block)
            e2e.fsync(vols[g])
            times[g].append(timed_checkpoint(p, g)[1])
    few, many = statistics.median(times["none"]), statistics.median(times["many"])
    print("  checkpoint: %.2f ms, with 1000 kept %.2f ms" % (few, many), file=sys.stderr)
    out.update(history_checkpoint_ms=many, history_checkpoint_none_ms=few, history_checkpoint_ratio=few / many)
    t = time.monotonic()
    p.b.restart()
    out["history_start_s"] = time.monotonic() - t
    return out


def bench_memory():
    """Resident memory of both daemons with a sparse 1 TiB volume in sync, after scattered writes."""
    p = Pair()
    (vol,) = p.protect(size=TIB, wait=True)
    for i in range(2000):
        e2e.pwrite(vol, (i * 7919 % 262144) * 4 * MIB, b"m" * 4096)
    e2e.fsync(vol)
    p.checkpoint()
    return {"rss_primary_mib": p.a.rss_bytes() / MIB, "rss_secondary_mib": p.b.rss_bytes() / MIB}


FLOORS = [  # key, text, limit, better when
    ("writes_ratio", "4 KiB random writes, depth 16, protocol F in sync / minimal FUSE server", 0.5, "above"),
    ("checkpoint_longer_ms", "checkpoint with 1 GiB dirty takes longer than with 1 MiB by, ms", 20, "below"),
    ("failover_answer_s", "failover with a 1 GiB overlay answers after, s", 1.0, "below"),
    ("history_read_ratio", "4 KiB random read of the oldest of 1,000 checkpoints / of 10", 0.5, "above"),
    ("history_read16_ratio", "the same at depth 16", 0.5, "above"),
    ("history_checkpoint_ratio", "checkpoints a second with 1,000 kept / with none", 0.8, "above"),
    ("rss_primary_mib", "memory of the primary, sparse 1 TiB volume, MiB", 300, "below"),
    ("rss_secondary_mib", "memory of the secondary, MiB", 300, "below"),
]
BENCHES = {"writes": bench_writes, "alone": bench_alone, "checkpoint": bench_checkpoint, "failover": bench_failover, "history": bench_history,
           "memory": bench_memory}


def main():
    global ROUNDS, SECONDS
    args, names, out_file, strict = sys.argv[1:], [], None, False
    while args:
        a = args.pop(0)
        if a == "--rounds":
            ROUNDS = int(args.pop(0))
        elif a == "--seconds":
            SECONDS = float(args.pop(0))
        elif a == "--json":
            out_file = args.pop(0)
        elif a == "--check":
            strict = True
        elif a in BENCHES:
            names.append(a)
        else:
            sys.exit(__doc__)
    free = shutil.disk_usage(e2e.tmp()).free
    if free < 12 * GIB:
        sys.exit("bench: needs 12 GiB free in TMPDIR, there are %.1f" % (free / GIB))
    results, failed = {}, False
    for name in names or BENCHES:
        print("%s: %s" % (name, BENCHES[name].__doc__), file=sys.stderr)
        try:
            results.update(BENCHES[name]())
        except (e2e.TestError, e2e.Skip) as e:
            print("%s: %s" % (name, e), file=sys.stderr)
            failed = True
        for problem in e2e.close_all():
            print("%s: %s" % (name, problem), file=sys.stderr)
            failed = True
    missed = []
    for key, text, limit, better in FLOORS:
        if key in results:
            good = results[key] >= limit if better == "above" else results[key] <= limit
            missed += [] if good else [key]
            print("%-75s %8.3g   floor %-5g %s" % (text, results[key], limit, "ok" if good else "MISSED"))
    for key in sorted(results):
        if key not in [f[0] for f in FLOORS]:
            print("  %-40s %s" % (key, results[key] if isinstance(results[key], list) else "%.4g" % results[key]))
    results["missed"] = missed
    if out_file:
        with open(out_file, "w") as f:
            json.dump(dict(results, schema=1, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())), f, indent=1)
            f.write("\n")
    sys.exit(1 if failed or (strict and missed) else 0)


if __name__ == "__main__":
    main()
