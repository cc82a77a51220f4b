#!/usr/bin/env python3
"""A peer that is there and does nothing: a disk that hangs, a half-open connection (SPEC 6, 9: I16; docs/FAILURES.md)."""

import os
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, MIB, Host, LoopFs, check, check_eq, wait_for  # noqa: E402

SIZE = 4 * MIB


def pair(store_b=None, **settings):
    d = e2e.tmp()
    a = Host("a", folder=d).start()
    b = Host("b", folder=d, store=store_b).start()
    vol = a.create("vm1", SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0", "peer_timeout=2s", *("%s=%s" % i for i in settings.items()))
    return a, b, vol


def timed_write(vol, off, data, within=20):
    t = time.monotonic()
    e = e2e.errno_of(e2e.pwrite, vol, off, data, sync=True)
    check(time.monotonic() - t < within * e2e.SLOW, "a write took %.1f s" % (time.monotonic() - t))
    return e


def in_sync_again(a, b, vol):
    a.wait_status("vm1", 60, link="SYNCED", health="ok", error=None)
    n = int(wait_for(lambda: a.repctl("checkpoint", "vm1", code=None).out.strip(), "a checkpoint", 60))
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")
    e2e.check_same(vol, b.checkpoint_file("vm1", n), "primary and checkpoint")


def test_peer_whose_disk_hangs():
    """A live daemon behind a hung disk: no guest waits longer than four times peer_timeout; freeze waits; then all is well again."""
    fs = LoopFs(96 * MIB)
    a, b, vol = pair(os.path.join(fs.path, "s"), protocol="C")
    for policy in ("continue", "freeze"):
        a.repctl("set", "vm1", "on_disconnect=" + policy, "peer_timeout=1s")
        a.wait_synced("vm1", 60)
        done = []
        fs.freeze()
        try:
            t0 = time.monotonic()
            t = threading.Thread(target=lambda: done.append(e2e.errno_of(e2e.pwrite, vol, MIB, b"\x55" * BLOCK, sync=True)))
            t.start()
            a.wait_status("vm1", 60, link=("DOWN", "HANDSHAKE"))
            if policy == "continue":
                t.join(60 * e2e.SLOW)
                check_eq(done, [0], "the write")
                check(time.monotonic() - t0 < (4 + 20) * e2e.SLOW, "it took %.1f s" % (time.monotonic() - t0))
                check_eq(timed_write(vol, 0, b"\x56" * BLOCK), 0, "a write without the peer")
                a.repctl("error", "vm1", code=7).says("progress")
            else:
                check_eq(done, [], "a write that waits under freeze")
                check_eq(a.status("vm1")["health"], "degraded", "health")
        finally:
            fs.thaw()
        t.join(60 * e2e.SLOW)
        check_eq(done, [0], "the write, once the peer is back (%s)" % policy)
        in_sync_again(a, b, vol)


def test_freeze_is_ended_by_continue():
    a, b, vol = pair(protocol="F", on_disconnect="freeze")
    os.kill(b.pid(), signal.SIGSTOP)  # half-open: the kernel acknowledges, the peer does not
    try:
        done = []
        t = threading.Thread(target=lambda: done.append(e2e.errno_of(e2e.pwrite, vol, 0, b"\x66" * BLOCK, sync=True)))
        t.start()
        a.wait_status("vm1", 60, link=("DOWN", "HANDSHAKE"))
        check_eq(done, [], "a flush that waits under freeze")
        a.repctl("set", "vm1", "on_disconnect=continue", timeout=60)
        t.join(60 * e2e.SLOW)
        check_eq(done, [0], "the flush")
    finally:
        os.kill(b.pid(), signal.SIGCONT)
    in_sync_again(a, b, vol)


if __name__ == "__main__":
    e2e.main()
