#!/usr/bin/env python3
"""Two hosts as network namespaces joined by a veth pair; the link is cut and restored (no loopback: --insecure)."""

import os
import shutil
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, MIB, Host, check, check_eq  # noqa: E402


def ip(*args, ns=None, code=0):
    return e2e.run(["ip"] + (["-n", ns] if ns else []) + list(args), code=code, timeout=60)


class Network:
    """rfsa-PID and rfsb-PID, 10.77.0.1 and 10.77.0.2."""

    def __init__(self):
        e2e.need_root()
        e2e.need("ip", "nsenter")
        self.a, self.b = "rfsa-%d" % os.getpid(), "rfsb-%d" % os.getpid()
        e2e.track(self)
        if e2e.run(["ip", "netns", "add", self.a], code=None).returncode != 0:
            raise e2e.Skip("network namespaces cannot be made here")
        ip("netns", "add", self.b)
        va, vb = "va%d" % (os.getpid() % 100000), "vb%d" % (os.getpid() % 100000)
        if e2e.run(["ip", "link", "add", va, "type", "veth", "peer", "name", vb], code=None).returncode != 0:
            raise e2e.Skip("veth pairs cannot be made here")
        ip("link", "set", va, "netns", self.a, "name", "eth0")
        ip("link", "set", vb, "netns", self.b, "name", "eth0")
        for ns, addr in ((self.a, "10.77.0.1"), (self.b, "10.77.0.2")):
            ip("addr", "add", addr + "/24", "dev", "eth0", ns=ns)
            ip("link", "set", "lo", "up", ns=ns)
            ip("link", "set", "eth0", "up", ns=ns)

    def cut(self):
        ip("link", "set", "eth0", "down", ns=self.b)

    def restore(self):
        ip("link", "set", "eth0", "up", ns=self.b)

    def close(self):
        for ns in (self.a, self.b):
            e2e.run(["ip", "netns", "del", ns], code=None)


def two_hosts(insecure=True):
    net = Network()
    d = e2e.tmp()
    a = Host("a", folder=d, netns=net.a, addr="10.77.0.1", insecure=insecure).start()
    b = Host("b", folder=d, netns=net.b, addr="10.77.0.2", insecure=insecure).start()
    return net, a, b


def same(a, b, vol="vm1"):
    n = int(a.repctl("checkpoint", "vm1").out)
    e2e.check_same(a.disk(vol), b.disk(vol), "both disks")
    e2e.check_same(a.volume(vol), b.checkpoint_file(vol, n), "primary and checkpoint")


def test_cut_and_restored():
    net, a, b = two_hosts()
    size = 16 * MIB
    vol = a.create("vm1", size)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "peer_timeout=1.5s", "checkpoint_interval=0.5")
    log = e2e.Log({"vm1": size})
    w = e2e.Writer(log, {"vm1": vol}, threads=4).start()
    for i in range(3):
        w.wait_ops(100)
        net.cut()
        a.wait_status("vm1", 15, link=("DOWN", "HANDSHAKE"))
        b.wait_status("vm1", 15, link="DOWN")
        w.wait_ops(100)
        check(w.slowest_write < 6 * e2e.SLOW and w.slowest_flush < 6 * e2e.SLOW,
              "I/O waited %.1f and %.1f s for a cut link" % (w.slowest_write, w.slowest_flush))
        e2e.check_eq(b.status("vm1")["state"], "RUNNING", "the secondary without its link")
        net.restore()
        a.wait_synced("vm1", 60)
    w.pause()
    same(a, b)
    w.resume()
    w.wait_ops(30)
    w.stop()


def test_short_cut_is_survived():
    """Shorter than peer_timeout: TCP delivers what was sent, nothing is lost, no resync is needed."""
    net, a, b = two_hosts()
    vol = a.create("vm1", 4 * MIB)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "peer_timeout=8s", "checkpoint_interval=0", "protocol=C")
    e2e.pwrite(vol, 0, b"\x11" * BLOCK, sync=True)
    before = a.status("vm1")["counters"]["reconnects"]
    net.cut()
    done = []
    t = threading.Thread(target=lambda: done.append(e2e.errno_of(e2e.pwrite, vol, 0, b"\x22" * BLOCK, sync=True)))
    t.start()
    t.join(1.0)
    check(t.is_alive(), "a write under C completed with the link cut")
    net.restore()
    t.join(60)
    check_eq(done, [0], "the write after the link was restored")
    check_eq(a.status("vm1")["counters"]["reconnects"], before, "reconnects")
    same(a, b)


def test_failover_while_cut():
    net, a, b = two_hosts()
    size = 4 * MIB
    vol = a.create("vm1", size)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "peer_timeout=1.5s", "checkpoint_interval=0")
    log = e2e.Log({"vm1": size})
    w = e2e.Writer(log, {"vm1": vol}, threads=4, fsync_every=5).start()
    w.wait_ops(200)
    lost = time.monotonic_ns()
    net.cut()
    flushed = log.flushed_before(lost)  # while it was in sync
    b.wait_status("vm1", 15, link="DOWN")
    b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    log.verify({"vm1": b.volume("vm1")}, required=flushed, prefix="stream", what="the survivor")
    a.wait_status("vm1", 15, link=("DOWN", "HANDSHAKE"))
    w.wait_ops(20)
    w.stop()
    net.restore()
    for h in (a, b):
        h.wait_status("vm1", 60, split_brain=True, link="DOWN")
    log.verify({"vm1": b.volume("vm1")}, required=flushed, prefix="stream", what="the survivor after the old primary is back")
    log.verify({"vm1": vol}, required=log.completed_before(time.monotonic_ns()), what="the old primary")


def test_refused_without_insecure():
    """Without a key only loopback peers are accepted, and that is said."""
    net = Network()
    d = e2e.tmp()
    a = Host("a", folder=d, netns=net.a, addr="10.77.0.1").start(wait=False)
    code = None
    try:
        code = a.proc.wait(3)  # may refuse to listen on such an address at all
    except Exception:
        pass
    if code is not None:
        check(code != 0 and "insecure" in a.log_text(), "how it ended: %r\n%s" % (code, a.log_tail()))
        a.expect_dead = True
        a._gone()
        a.port = None
        a.start()
    else:
        a.wait_ready()
    b = Host("b", folder=d, netns=net.b, addr="10.77.0.2", insecure=True).start()
    vol = a.create("vm1", MIB)
    a.repctl("protect", "vm1", "--peer", b.listen, code=(1, 5, 6), timeout=60).says("insecure|TLS|key")
    e2e.pwrite(vol, 0, b"x" * BLOCK)
    if a.port is not None:
        b.create("vm2", MIB)
        b.repctl("protect", "vm2", "--peer", a.listen, code=(1, 5, 6), timeout=60).says("insecure|loopback|TLS|key|refused")


if __name__ == "__main__":
    e2e.main()
