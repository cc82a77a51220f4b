#!/usr/bin/env python3
# timeout: 7200
"""One pair of hosts for an hour: fio with verification and a logged writer on the primary while the link is cut, stalled and
slowed, hosts are killed, checkpoints are taken, settings change, hosts fail over, fail back and part ways.

  long_70_soak.py [--seconds N] [--seed S]      default: 3600 s

The group has two volumes: fio writes `data` and reads back what it wrote, a logged writer writes `root`. Each round is one of

  faults     faults of the link, kill -9 and restarts of the secondary, checkpoints, settings; the guest must not notice:
             no error, fio's verification clean; at the end both disks are equal and the last checkpoint holds all of it
  primary    kill -9 of the primary under fio and the writer, once or twice; all that had been answered to either is there
  failover   the primary's host is lost; the other fails over, to its last checkpoint or to the latest; what has to be there
             is there; the old primary comes back, and follows by `failback`, or by `resolve` where it wrote alone; what it
             had stays readable as a checkpoint. The hosts have then changed places
  switchover the hosts change places by command under fio and the writer, mostly while one of them is killed or the link is cut;
             given until it succeeds; all that had been answered is there

A failure prints its round and the seed; timing decides the rest, so a seed repeats the choices, not the moments.
"""

import os
import random
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import MIB, Pair, Proxy, check, check_eq, wait_for  # noqa: E402

SIZE = 16 * MIB
FALLOC_ZERO_ALL = e2e.FALLOC_PUNCH | e2e.FALLOC_KEEP
PATIENCE = 90


class Fio:
    """fio over a volume, with verification.

    end(): all of it, pass after pass, and fio reads each back.
    With dies=True, for a host that is killed: one pass, by jobs each of which saves how far it came when it meets the error.
    interrupted() waits for that; verify() has fio read all that had been answered to it. What fio saves says only how many
    requests it had made, so a job makes one at a time."""

    JOBS = 4

    def __init__(self, path, seed, passes=1, dies=False):
        self.path, self.dir = path, e2e.tmp()
        size = SIZE // (self.JOBS if dies else 1)
        self.job = ["fio", "--name=soak", "--filename=" + path, "--size=%d" % size, "--rw=randwrite", "--bsrange=512-32k",
                    "--ioengine=libaio", "--direct=1", "--fsync=64", "--verify=crc32c", "--verify_fatal=1",
                    "--randseed=%d" % seed, "--aux-path=" + self.dir, "--output-format=terse", "--group_reporting"]
        if dies:
            self.job += ["--iodepth=1", "--numjobs=%d" % self.JOBS, "--offset_increment=%d" % size, "--rate_iops=150"]
            self.start("--do_verify=0", "--verify_state_save=1")
        else:
            self.job += ["--iodepth=8", "--loops=%d" % passes, "--rate_iops=2500", "--do_verify=1"]
            self.start()
        e2e.track(self)

    def start(self, *options):
        self.proc = subprocess.Popen(self.job + list(options), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True, cwd=self.dir)

    def end(self, timeout=1200):
        out, _ = self.proc.communicate(timeout=timeout)
        check_eq(self.proc.returncode, 0, "fio with verification; it said\n%s\nexit code" % out[-2000:])
        return out

    def interrupted(self):
        out, _ = self.proc.communicate(timeout=PATIENCE)
        for i in range(self.JOBS):
            check(os.path.exists("%s/local-soak-%d-verify.state" % (self.dir, i)), "fio saved no state; it said\n" + out)

    def verify(self):
        self.start("--verify_only", "--verify_state_load=1", "--do_verify=1")
        read = int(self.end(PATIENCE).strip().splitlines()[-1].split(";")[5])
        check(read > 0, "fio verified nothing")
        return read

    def wait_open(self):
        """Its jobs have the file open, all of them: what they do from here on is of these handles."""
        def of_job(pid):
            try:
                with open("/proc/%s/stat" % pid) as f:
                    if int(f.read().rpartition(")")[2].split()[1]) != self.proc.pid:
                        return False
                return any(os.readlink("/proc/%s/fd/%s" % (pid, n)) == self.path for n in os.listdir("/proc/%s/fd" % pid))
            except OSError:
                return False

        wait_for(lambda: sum(of_job(pid) for pid in os.listdir("/proc") if pid.isdigit()) == self.JOBS, "fio to begin", PATIENCE)

    def moved(self, path):
        """The volume is there now."""
        self.job = ["--filename=" + path if a.startswith("--filename=") else a for a in self.job]

    def close(self):
        if self.proc.poll() is None:
            self.proc.kill()
            self.proc.communicate()


class Soak:
    def __init__(self, rng):
        self.rng = rng
        self.pair = Pair(proxy=True, durability=rng.choice(("process", "power")))
        self.pair.protect("root", "data", group="vm1", size=SIZE, keep_last=4, peer_timeout=2)
        self.p, self.s = self.pair.a, self.pair.b  # primary, secondary
        # The loser of a resolve goes on dialling: either may be the way that the connection takes.
        self.proxies = {self.pair.b.name: self.pair.proxy, self.pair.a.name: Proxy(("127.0.0.1", self.pair.a.port))}
        self.count, self.verified = {}, 0
        self.kept = []  # checkpoints pinned by settle
        self.new_log()

    def link(self, what):
        for p in self.proxies.values():
            getattr(p, what)()

    def delay(self, seconds):
        for p in self.proxies.values():
            p.delay = seconds

    def new_log(self):
        """`root` is emptied; a log of its own begins."""
        with open(self.p.volume("root"), "rb+", buffering=0) as f:
            e2e.fallocate(f.fileno(), FALLOC_ZERO_ALL, 0, SIZE)
            os.fsync(f.fileno())
        self.log = e2e.Log({"root": SIZE}, unit=self.rng.choice((512, 4096)))

    def writer(self):
        return e2e.Writer(self.log, {"root": self.p.volume("root")}, threads=3, seed=self.rng.randrange(1 << 30),
                          fsync_every=self.rng.choice((5, 25, 100)), pace=0.002).start()

    def did(self, what):
        self.count[what] = self.count.get(what, 0) + 1

    def settle(self):
        """In sync, quiet, equal; the checkpoint taken now holds all that was answered."""
        self.p.wait_synced("vm1", PATIENCE)
        self.s.wait_synced("vm1", PATIENCE)
        n = int(self.p.repctl("checkpoint", "vm1", "--keep").out)  # retention would drop it under its reader
        for v in ("root", "data"):
            e2e.check_same(self.p.disk(v), self.s.disk(v), "the disks of %s on both hosts" % v)
            e2e.check_same(self.p.volume(v), self.s.checkpoint_file(v, n), "%s and its checkpoint %d" % (v, n))
        now = time.monotonic_ns()
        self.log.verify({"root": self.s.checkpoint_file("root", n)}, required=self.log.completed_before(now),
                        what="checkpoint %d" % n)
        for old in self.kept:
            self.s.repctl("-y", "checkpoints", "root", "--drop", old, code=(0, 4, 5))
        self.kept = [n]

    # ---- faults that a guest must not notice

    def fault(self):
        rng = self.rng
        what = rng.choice(("cut", "cut", "stall", "delay", "kill", "kill", "restart", "checkpoint", "checkpoint", "settings",
                           "pause", "down"))
        self.did(what)
        if what == "cut":
            self.link("cut")
        elif what == "down":
            self.link("down")
            time.sleep(rng.uniform(0, 3))
            self.link("up")
        elif what == "stall":
            self.link("stall")
            time.sleep(rng.choice((0.3, 1, 4)))
            self.link("unstall")
        elif what == "delay":
            self.delay(rng.choice((0, 0, 0.003, 0.02)))
        elif what == "kill":
            self.s.kill9()
            time.sleep(rng.choice((0, 0.1, 1, 3)))
            self.s.start()
        elif what == "restart":
            self.s.restart()
        elif what == "checkpoint":
            self.p.repctl("checkpoint", "vm1", *(["--keep"] if rng.random() < 0.1 else []), code=(0, 5, 6))
        elif what == "settings":
            self.p.repctl("set", "vm1", "protocol=%s" % rng.choice("ABCFF"),
                          "checkpoint_interval=%s" % rng.choice(("0", "0.2", "1")),
                          "on_congestion=%s" % rng.choice(("block", "ahead")),
                          "queue_max=%s" % rng.choice(("4M", "256M")))
        else:
            self.p.repctl("pause", "vm1", code=(0, 5, 6))
            time.sleep(rng.uniform(0, 1))
            self.p.repctl("resume", "vm1")

    def faults(self):
        fio = Fio(self.p.volume("data"), self.rng.randrange(1 << 30), passes=self.rng.randrange(2, 8))
        writer = self.writer()
        while fio.proc.poll() is None:
            self.fault()
            writer.check_errors()
            time.sleep(self.rng.uniform(0, 1.5))
        self.delay(0)
        fio.end()
        writer.stop()
        self.settle()

    # ---- the primary dies and comes back

    def primary(self):
        fio = Fio(self.p.volume("data"), self.rng.randrange(1 << 30), dies=True)
        writer = self.writer()
        fio.wait_open()  # one that has not begun saves no state
        writer.wait_ops(50)
        written = lambda: self.p.status("vm1")["counters"]["write_bytes"]
        enough = written() + self.rng.randrange(1 * MIB, 16 * MIB)
        wait_for(lambda: written() >= enough, "so much to have been written", PATIENCE)
        self.p.kill9()
        writer.stop(errors_ok=True)
        now = time.monotonic_ns()
        fio.interrupted()
        self.p.start()
        if self.rng.random() < 0.3:
            time.sleep(self.rng.uniform(0, 0.3))
            self.p.kill9()
            self.p.start()
        self.log.verify({"root": self.p.volume("root")}, required=self.log.completed_before(now),
                        what="the primary after kill -9")
        self.verified += fio.verify()
        self.settle()

    # ---- the primary's host is lost

    def failover(self):
        self.p.repctl("set", "vm1", "protocol=F", "checkpoint_interval=0")
        self.p.wait_synced("vm1", PATIENCE)
        writer = self.writer()
        writer.wait_ops(50)
        asked = time.monotonic_ns()
        number = int(self.p.repctl("checkpoint", "vm1").out)
        answered = time.monotonic_ns()
        time.sleep(self.rng.uniform(0, 1))
        lost = time.monotonic_ns()
        self.link("lose")
        if self.rng.random() < 0.5:  # it notices, and writes alone
            self.p.wait_status("vm1", PATIENCE, link="DOWN")
            writer.wait_ops(50)
        self.p.kill9()
        writer.stop(errors_ok=True)
        self.s.wait_status("vm1", PATIENCE, link="DOWN")
        latest = self.rng.random() < 0.5
        doc = self.s.repctl("-y", "failover", "vm1", *(["--to", "latest"] if latest else []), "--wait", json=True)
        if latest:
            self.log.verify({"root": self.s.volume("root")}, required=self.log.flushed_before(lost), prefix="stream",
                            what="the survivor, latest")
        else:
            check_eq(doc["checkpoint"], number, "the checkpoint that the failover went back to")
            self.log.verify({"root": self.s.volume("root")}, required=self.log.completed_before(asked), newest=answered,
                            prefix="stream", what="the survivor, checkpoint %d" % number)
        old = self.log
        self.p, self.s = self.s, self.p
        self.new_log()  # the survivor's guest goes on
        self.s.start()
        self.link("up")
        answer = self.p.repctl("failback", "vm1", "--peer", self.proxies[self.s.name].address, code=(0, 8))
        self.did("failback" if answer.code == 0 else "split brain")
        if answer.code == 8:
            for h in (self.p, self.s):
                h.wait_status("vm1", PATIENCE, split_brain=True, link="DOWN")
            before = {c["number"] for c in self.s.ctl("checkpoints", name="root")["checkpoints"]}
            self.p.repctl("-y", "resolve", "vm1", "--discard", "peer")
            self.p.wait_synced("vm1", PATIENCE)
            kept = [c["number"] for c in self.s.ctl("checkpoints", name="root")["checkpoints"]
                    if c["number"] not in before and c["pinned"] and c["kind"] == "local"]
            check_eq(len(kept), 1, "the loser's own blocks are one pinned checkpoint; how many of %s" % kept)
            wait_for(lambda: os.path.exists(self.s.checkpoint_file("root", kept[0])), "the kept checkpoint to be shown")
            old.verify({"root": self.s.checkpoint_file("root", kept[0])}, required=old.flushed_before(lost),
                       what="what the loser had")
            self.s.repctl("-y", "checkpoints", "root", "--drop", kept[0], code=(0, 5))
        self.settle()

    # ---- the roles are swapped

    def switchover(self):
        p, rng = self.p, self.rng
        fio = Fio(p.volume("data"), rng.randrange(1 << 30), dies=True)
        writer = self.writer()
        fio.wait_open()
        p.wait_synced("vm1", PATIENCE)
        writer.wait_ops(rng.randrange(50, 1000))
        cmd = subprocess.Popen([e2e.program("repctl"), "--store", p.store, "switchover", "vm1"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, 0.15))
        fault = rng.choice(("none", "cut", "down", "kill", "kill"))
        victim = rng.choice((self.p, self.s))
        if fault == "cut":
            self.link("cut")
        elif fault == "down":
            self.link("down")
        elif fault == "kill":
            victim.kill9()
        cmd.wait(PATIENCE)
        if fault == "kill":
            victim.start()
        self.link("up")

        def done():
            roles = [h.status("vm1")["role"] for h in (self.p, self.s)]
            check(roles.count("primary") < 2, "two primaries")
            if roles[0] == "primary":
                p.wait_synced("vm1", PATIENCE)
            return p.repctl("switchover", "vm1", code=None).code == 0

        wait_for(done, "the switchover to succeed", PATIENCE)
        now = time.monotonic_ns()
        fio.interrupted()
        wait_for(lambda: not writer.alive(), "the writer's handles to be dead", PATIENCE)
        writer.stop(errors_ok=True)
        self.p, self.s = self.s, self.p
        self.log.verify({"root": self.p.volume("root")}, required=self.log.completed_before(now), what="after the switchover")
        fio.moved(self.p.volume("data"))
        self.verified += fio.verify()
        self.did("switchover, " + fault)
        self.settle()

    def round(self):
        what = self.rng.choices(("faults", "primary", "failover", "switchover"), (6, 2, 2, 2))[0]
        self.did(what)
        getattr(self, what)()


def arguments():
    seconds, seed = 3600, random.randrange(1 << 31)
    args = sys.argv[1:]
    while args:
        a = args.pop(0)
        if a == "--seconds" and args:
            seconds = int(args.pop(0))
        elif a == "--seed" and args:
            seed = int(args.pop(0))
        else:
            sys.exit(__doc__)
    return seconds, seed


def main():
    seconds, seed = arguments()
    print("seed %d" % seed, flush=True)

    def soak():
        e2e.need("fio")
        s = Soak(random.Random(seed))
        end, rounds, said = time.monotonic() + seconds, 0, time.monotonic()
        try:
            while time.monotonic() < end:
                s.round()
                rounds += 1
                if time.monotonic() - said > 300:
                    said = time.monotonic()
                    print("  %d rounds, %d s left" % (rounds, end - said), flush=True)
        except e2e.TestError as e:
            raise e2e.TestError("round %d, --seed %d: %s" % (rounds + 1, seed, e)) from e
        print("  %d rounds: %s; fio found %d MiB again after kills of the primary"
              % (rounds, ", ".join("%d %s" % (n, w) for w, n in sorted(s.count.items())), s.verified >> 10), flush=True)

    soak.limit = seconds + 1800
    sys.argv = sys.argv[:1]
    e2e.main(tests=[("soak", soak)])


if __name__ == "__main__":
    main()
