#!/usr/bin/env python3
"""Backup jobs (SPEC 11) of a volume under fio, on both hosts: every mode, restored and compared; pause, resume, cancel, wait,
speed; targets without room; what a killed daemon leaves; bar and JSON lines."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import MIB, Pair, Tmpfs, check, check_eq, wait_for  # noqa: E402

SIZE = 24 * MIB


class Fio:
    """Writes with verification until it is stopped; a verification error is its exit code."""

    def __init__(self, path, seconds=60):
        e2e.need("fio")
        self.p = subprocess.Popen(
            ["fio", "--name=w", "--filename=" + path, "--rw=randwrite", "--bsrange=4k-64k", "--direct=1", "--ioengine=libaio",
             "--iodepth=8", "--size=%d" % SIZE, "--verify=crc32c", "--verify_backlog=64", "--time_based",
             "--rate_iops=600", "--runtime=%d" % seconds, "--randrepeat=0", "--verify_fatal=1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=e2e.tmp())
        e2e.track(self)

    def end(self):
        if self.p.poll() is None:
            self.p.send_signal(signal.SIGINT)
        out, _ = self.p.communicate(timeout=60)
        # Interrupted it has an exit code of its own; what it met it says.
        check("err= 0" in out and "verify:" not in out and "error=" not in out, "fio under the backups: %s" % out[-3000:])

    def close(self):
        if self.p.poll() is None:
            self.p.kill()
            self.p.wait()


def compare(a, b, what):
    e2e.need("qemu-img")
    r = e2e.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", a, b], code=None, timeout=120)
    check_eq((r.returncode, r.stdout.strip()), (0, "Images are identical."), "qemu-img compare of %s: %s" % (what, r.stderr))


def at(folder, name):
    return os.path.join(folder, name)


def begin(host, *args):
    return int(host.repctl("backup", *args, "--detach").out)


def job(host, n):
    return [j for j in host.ctl("jobs")["jobs"] if j["id"] == n][0]


def state_is(host, n, state):
    return wait_for(lambda: job(host, n)["state"] == state, "job %d %s: %s" % (n, state, job(host, n)), 30)


def nothing(folder, name):
    left = [f for f in os.listdir(folder) if f.startswith(name)]
    check_eq(left, [], "what is left of %s" % name)


def restored(host, name, *files):
    """A volume of that name out of a full backup and what goes onto it; its path in the mount."""
    host.repctl("import", name, files[0])
    for f in files[1:]:
        host.repctl("import", name, f, "--apply")
    return host.volume(name)


def test_on_a_secondary_under_fio():
    """Full, of the base and of an older checkpoint, and incremental, raw and .zst: each equals the mount's checkpoint."""
    pair = Pair()
    vol, = pair.protect(size=SIZE)
    a, b, d = pair.a, pair.b, e2e.tmp()
    fio = Fio(vol)
    time.sleep(1)
    first = pair.checkpoint()
    b.repctl("backup", "vm1", at(d, "full"), "--sync", "full")
    time.sleep(1)
    second = pair.checkpoint()
    b.repctl("backup", "vm1@%d" % first, at(d, "old.zst"), "--sync", "full")
    for name in ("inc", "inc.zst"):
        doc = b.repctl("backup", "vm1@%d" % second, at(d, name), "--sync", "incremental", "--since", first, json=True)
        check_eq((doc["since"], doc["checkpoint"], doc["state"]), (first, second, "done"), "the job")
        lines = [json.loads(x) for x in open(at(d, name) + ".extents")]
        check_eq((lines[0]["since"], lines[0]["checkpoint"], lines[0]["extents"]), (first, second, len(lines) - 1), "the list")
        extents = b.ctl("extents", name="vm1", layer=second, since=first)["extents"]
        check_eq(lines[1:], extents, "what `extents --since` says")
    check_eq(e2e.data_extents(at(d, "inc"))[:3], [(x["offset"], x["length"]) for x in extents][:3],
             "the data ranges of the raw one")
    view = b.checkpoint_file("vm1", first)
    compare(at(d, "full"), view, "full")
    e2e.run(["zstd", "-dq", at(d, "old.zst"), "-o", at(d, "old.raw")], timeout=120)
    compare(at(d, "old.raw"), view, "full, .zst, by zstd -d")
    view = b.checkpoint_file("vm1", second)
    compare(restored(b, "r1", at(d, "full"), at(d, "inc")), view, "full and incremental")
    compare(restored(b, "r2", at(d, "old.zst"), at(d, "inc.zst")), view, "full and incremental, .zst")
    fio.end()
    n = pair.checkpoint()
    e2e.check_same(vol, b.checkpoint_file("vm1", n), "primary and checkpoint, after the backups")
    b.repctl("backup", "vm1", at(d, "x"), "--sync", "incremental", "--since", n + 100, code=4).says("lacks the bitmap")
    b.repctl("backup", "vm1@%d" % first, at(d, "x"), "--sync", "incremental", "--since", second, code=2).says("is newer than")
    b.repctl("backup", "vm1@%d" % (n + 100), at(d, "x"), "--sync", "full", code=4).says("no checkpoint")
    b.repctl("backup", "vm1", at(d, "full"), "--sync", "full", code=1).says("the file exists")
    nothing(d, "x")


def test_on_a_primary_under_fio():
    """Full, none and stream beside fio and replication: the point in time, what it held, and what was written since."""
    pair = Pair()
    vol, = pair.protect(size=SIZE, interval=0.5)
    a, b, d = pair.a, pair.b, e2e.tmp()
    fio = Fio(vol)
    time.sleep(1)
    none = begin(a, "vm1", at(d, "none"), "--sync", "none")
    view = job(a, none)["view"]
    check_eq(view, a.checkpoint_file("vm1", job(a, none)["checkpoint"]), "the view's path")
    stream = begin(a, "vm1", at(d, "stream"), "--sync", "stream")
    full = begin(a, "vm1", at(d, "full.zst"), "--sync", "full")
    check_eq(a.repctl("job", "wait", full, json=True)["state"], "done", "the full one")
    time.sleep(2)
    e2e.run(["cp", "--sparse=always", view, at(d, "view")])
    a.repctl("job", "cancel", stream)
    a.repctl("job", "wait", stream)
    fio.end()  # nothing is written between the two ends: what `none` saved is what has changed since
    e2e.run(["cp", "--sparse=always", vol, at(d, "now")])
    compare(at(d, "view"), view, "the view, while its job runs")
    a.repctl("job", "cancel", none)
    a.repctl("job", "wait", none)
    wait_for(lambda: not os.path.exists(view), "the view's end with its job")
    compare(restored(a, "back", at(d, "now"), at(d, "none")), at(d, "view"), "none onto what came after")
    check(os.path.getsize(at(d, "stream")) == SIZE, "the stream's size")
    lines = [json.loads(x) for x in open(at(d, "stream.extents"))]
    check(lines[0]["mode"] == "stream" and lines[0]["extents"] == len(lines) - 1 > 10, "the stream's list: %s" % lines[0])
    n = pair.checkpoint()
    e2e.check_same(vol, b.checkpoint_file("vm1", n), "primary and checkpoint, after the backups")
    check_eq(a.ctl("checkpoints", name="vm1")["checkpoints"], [], "checkpoints on the primary")


def test_incremental_on_a_primary():
    """By the primary's own bitmaps, since checkpoints that only the peer keeps: under fio, and after a kill -9 of the primary
    in the middle of writes, which must never lose a change."""
    pair = Pair(durability="power")
    vol, = pair.protect(size=SIZE)
    a, b, d = pair.a, pair.b, e2e.tmp()
    e2e.pwrite(vol, 0, os.urandom(4 * MIB), sync=True)
    first = pair.checkpoint()
    b.repctl("backup", "vm1", at(d, "full.zst"), "--sync", "full")
    fio = Fio(vol)
    time.sleep(0.7)
    second = pair.checkpoint()
    time.sleep(0.7)
    fio.end()
    check(second in a.ctl("show", name="vm1")["changed_since"], "what `show` lists")
    a.repctl("backup", "vm1", at(d, "i1"), "--sync", "incremental", "--since", first)
    compare(restored(a, "r1", at(d, "full.zst"), at(d, "i1")), vol, "full and the primary's incremental")
    wait_for(lambda: os.path.exists(os.path.join(a.store, "volumes", "vm1", "changed-%d" % second)), "the bitmap's file")
    w = e2e.Writer(e2e.Log({"vm1": SIZE}), {"vm1": vol}, threads=4).start()
    w.wait_ops(200)
    a.kill9()
    w.stop(errors_ok=True)
    a.start()
    a.wait_synced("vm1")
    for n, base, name in ((first, "r2", "i2"), (second, "r3", "i3.zst")):
        full = at(d, "full.zst")
        if n == second:
            b.repctl("backup", "vm1@%d" % n, at(d, "full2"), "--sync", "full")
            full = at(d, "full2")
        a.repctl("backup", "vm1", at(d, name), "--sync", "incremental", "--since", n)
        compare(restored(a, base, full, at(d, name)), vol, "since %d, after a kill" % n)
    e2e.check(a.repctl("show", "vm1").out.count("changed_since") == 1, "show for a person")
    a.repctl("backup", "vm1", at(d, "x"), "--sync", "incremental", "--since", second + 1000, code=4).says("lacks the bitmap")
    nothing(d, "x")
    a.stop()
    a.repctl("check")  # the store with its bitmaps, offline
    a.start()
    a.wait_synced("vm1")
    a.repctl("stop", "vm1")
    a.repctl("unprotect", "vm1")
    a.repctl("backup", "vm1", at(d, "x"), "--sync", "incremental", "--since", first, code=4).says("lacks the bitmap")


def test_stream_onto_its_start():
    """A stream applied to what the volume held when it began is what the volume held when it ended."""
    host = e2e.Host("a").start()
    vol, d = host.create("vm1", SIZE), e2e.tmp()
    e2e.pwrite(vol, 0, os.urandom(2 * MIB), sync=True)
    host.repctl("backup", "vm1", at(d, "full"), "--sync", "full")
    stream = begin(host, "vm1", at(d, "stream"), "--sync", "stream")
    fio = Fio(vol)
    time.sleep(2)
    fio.end()
    e2e.punch(vol, MIB, MIB)
    host.repctl("job", "cancel", stream)
    host.repctl("job", "wait", stream)
    compare(restored(host, "r", at(d, "full"), at(d, "stream")), vol, "full and stream")
    host.repctl("backup", "vm1", at(d, "x.zst"), "--sync", "stream", code=2).says(".zst")
    nothing(d, "x")


def test_pause_resume_cancel_wait():
    host = e2e.Host("a").start()
    vol, d = host.create("vm1", SIZE), e2e.tmp()
    e2e.pwrite(vol, 0, os.urandom(8 * MIB), sync=True)
    n = begin(host, "vm1", at(d, "t"), "--sync", "full", "--speed", "2M")
    host.repctl("job", "pause", n)
    before = job(host, n)
    check_eq(before["state"], "paused", "a paused job")
    check("paused" in host.repctl("jobs").out, "the table of jobs")
    r = host.repctl("--timeout", "1", "job", "wait", n, code=124)
    check_eq(job(host, n)["copied"], before["copied"], "copied while paused")
    host.repctl("job", "resume", n)
    t = time.monotonic()
    host.repctl("job", "wait", n)
    left = 8 * MIB - before["copied"]
    check(time.monotonic() - t > left / (2.0 * MIB) - 1.5, "%d bytes at 2 MiB/s took %.1f s" % (left, time.monotonic() - t))
    compare(at(d, "t"), vol, "a job that was paused")
    host.repctl("job", "wait", n)  # its end is remembered
    host.repctl("job", "pause", n, code=5).says("it is done")
    n = begin(host, "vm1", at(d, "c.zst"), "--sync", "full", "--speed", "10K")
    check_eq(host.status("vm1")["jobs"][-1]["id"], n, "the job in status")
    host.repctl("job", "cancel", n)
    host.repctl("job", "wait", n, code=1).says("cancelled")
    nothing(d, "c")
    for op in ("pause", "resume", "cancel", "wait"):
        host.repctl("job", op, 4711, code=4).says("no such job")
    host.repctl("job", "dance", 1, code=2)
    host.repctl("backup", "nobody", at(d, "c"), "--sync", "full", code=4)
    host.repctl("backup", "vm1", at(d, "c"), code=2).says("--sync")


def repctl_popen(host, *args, **kw):
    return subprocess.Popen([e2e.program("repctl"), "--store", host.store, *args], text=True, **kw)


def test_foreground():
    """A hang-up cancels; progress is JSON lines, or a bar on a terminal."""
    host = e2e.Host("a").start()
    vol, d = host.create("vm1", SIZE), e2e.tmp()
    e2e.pwrite(vol, 0, os.urandom(4 * MIB), sync=True)
    p = repctl_popen(host, "backup", "vm1", at(d, "t"), "--sync", "full", "--speed", "100K", stderr=subprocess.PIPE)
    wait_for(lambda: any(j["state"] == "running" and j["copied"] for j in host.ctl("jobs")["jobs"]), "the job")
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=30)
    check(p.returncode != 0, "exit code of a backup that was interrupted")
    state_is(host, 1, "cancelled")
    nothing(d, "t")
    p = repctl_popen(host, "--json", "backup", "vm1", at(d, "t"), "--sync", "full", "--speed", "3M", stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE)
    out, err = p.communicate(timeout=60)
    check_eq(p.returncode, 0, "backup --json: %s" % err)
    check_eq(json.loads(out)["state"], "done", "its document")
    lines = [json.loads(x) for x in err.splitlines()]
    check(len(lines) > 1 and all(x["total"] == SIZE and 0 <= x["done"] <= SIZE for x in lines), "progress lines: %s" % err)
    os.unlink(at(d, "t"))
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(e2e.program("repctl"), ["repctl", "--store", host.store, "backup", "vm1", at(d, "t"), "--sync", "full", "--speed",
                                        "3M"])
    seen = b""
    while True:
        try:
            part = os.read(fd, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    check_eq(os.waitpid(pid, 0)[1], 0, "backup on a terminal")
    os.close(fd)
    # `none` says where the view is; its end by an interrupt is its target.
    p = repctl_popen(host, "backup", "vm1", at(d, "none"), "--sync", "none", stderr=subprocess.PIPE)
    line = p.stderr.readline()
    check("the view is " + host.checkpoint_file("vm1", "") in line, "what `none` says: %r" % line)
    e2e.pwrite(vol, 0, b"\x33" * 65536, sync=True)
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=30)
    wait_for(lambda: os.path.exists(at(d, "none")), "the target of an interrupted `none`", 30)
    check_eq(json.loads(open(at(d, "none.extents")).readline())["bytes"], 65536, "what it holds")
    host.repctl("import", "vm1", at(d, "none"), "--apply")
    check(re.search(rb"backup vm1 .*%", seen), "no bar on a terminal: %r" % seen[-500:])
    compare(at(d, "t"), vol, "the one on a terminal")


def test_target_without_room():
    """ENOSPC on a small tmpfs: report fails, stop and enospc pause until there is room and go on to the right end."""
    host = e2e.Host("a").start()
    vol = host.create("vm1", SIZE)
    e2e.pwrite(vol, 0, os.urandom(6 * MIB), sync=True)
    disk = Tmpfs(8 * MIB)
    ballast = disk.fill(2 * MIB)
    for name, policy in (("r", "report"), ("r.zst", "report")):
        host.repctl("backup", "vm1", at(disk.path, name), "--sync", "full", "--on-target-error", policy, code=1).says(
            "no space left")
        nothing(disk.path, name)
    for policy in ("stop", "enospc"):
        name = policy + (".zst" if policy == "stop" else "")
        n = begin(host, "vm1", at(disk.path, name), "--sync", "full", "--on-target-error", policy)
        state_is(host, n, "paused")
        error = job(host, n)["error"]
        check_eq((error["code"], error["side"]), ("ERR_NOSPC", "target"), "why it is paused")
        host.repctl("job", "resume", n)
        state_is(host, n, "paused")
        check(name not in os.listdir(disk.path), "a paused job's target has its name")
        os.unlink(ballast)
        host.repctl("job", "resume", n)
        host.repctl("job", "wait", n)
        raw = at(disk.path, name)
        if policy == "stop":
            raw = at(e2e.tmp(), "raw")
            e2e.run(["zstd", "-dq", at(disk.path, name), "-o", raw], timeout=120)
        compare(raw, vol, policy)
        os.unlink(at(disk.path, name))
        disk.fill(2 * MIB)
    n = begin(host, "vm1", at(disk.path, "i"), "--sync", "full", "--on-target-error", "ignore")
    wait_for(lambda: job(host, n)["errors"] > 0, "an error that is ignored")
    os.unlink(ballast)
    host.repctl("job", "wait", n)
    compare(at(disk.path, "i"), vol, "ignore")


def test_killed():
    """kill -9 in the middle of jobs of each kind: nothing that looks whole; the volume is right, its epochs go."""
    host = e2e.Host("a").start()
    vol, d = host.create("vm1", SIZE), e2e.tmp()
    data = os.urandom(4 * MIB)
    e2e.pwrite(vol, 0, data, sync=True)
    begin(host, "vm1", at(d, "full"), "--sync", "full", "--speed", "100K")
    begin(host, "vm1", at(d, "full.zst"), "--sync", "full", "--speed", "100K")
    begin(host, "vm1", at(d, "none"), "--sync", "none")
    begin(host, "vm1", at(d, "stream"), "--sync", "stream")
    e2e.pwrite(vol, MIB, b"\x11" * MIB, sync=True)
    wait_for(lambda: all(j["copied"] for j in host.ctl("jobs")["jobs"]), "all four to have copied something")
    host.kill9()
    check_eq([f for f in os.listdir(d) if not f.endswith(".part") and not f.endswith(".extents.part")], [], "targets")
    host.start()
    expect = data[:MIB] + b"\x11" * MIB + data[2 * MIB:]
    check(e2e.pread(vol, 0, 4 * MIB) == expect, "the volume after the kill")
    check_eq(host.ctl("jobs")["jobs"], [], "jobs after the kill")
    wait_for(lambda: host.ctl("checkpoints", name="vm1")["checkpoints"] == [], "the jobs' epochs to go")
    host.repctl("backup", "vm1", at(d, "again"), "--sync", "full")
    compare(at(d, "again"), vol, "a backup after the kill")
    n = begin(host, "vm1", at(d, "end"), "--sync", "full", "--speed", "10K")  # a clean end takes it along too
    host.stop()
    nothing(d, "end")


if __name__ == "__main__":
    e2e.main()
