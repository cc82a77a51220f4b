#!/usr/bin/env python3
"""EIO and ENOSPC from each kind of file of a store, on either host (SPEC 5 to 7, 9: I10, I11; docs/FAILURES.md)."""

import errno
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, MIB, BadIo, Host, check, check_eq, check_errno, wait_for  # noqa: E402

SIZE = 4 * MIB


def pair(bad_host, durability="process", store_b=None, **settings):
    """A protected volume of 4 MiB, all 0x11, checkpointed; the host named meets what the returned BadIo is told."""
    bad = BadIo() if bad_host else None
    d = e2e.tmp()
    hosts = {n: Host(n, folder=d, durability=durability, env=bad.env if n == bad_host else None,
                     store=store_b if n == "b" else None).start() for n in "ab"}
    a, b = hosts["a"], hosts["b"]
    vol = a.create("vm1", SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0", "peer_timeout=2s", *("%s=%s" % i for i in settings.items()))
    b.wait_synced("vm1")
    n = int(a.repctl("checkpoint", "vm1").out)
    return bad, a, b, vol, n


def timed_write(vol, off, data, within=20, sync=True):
    t = time.monotonic()
    e = e2e.errno_of(e2e.pwrite, vol, off, data, sync=sync)
    check(time.monotonic() - t < within * e2e.SLOW, "a write took %.1f s" % (time.monotonic() - t))
    return e


def in_sync_again(a, b, vol):
    a.wait_status("vm1", 60, link="SYNCED", health="ok", error=None)
    b.wait_status("vm1", 60, link="SYNCED")
    n = int(wait_for(lambda: a.repctl("checkpoint", "vm1", code=None).out.strip(), "a checkpoint", 60))
    check_eq(b.status("vm1")["checkpoint_valid"], True, "checkpoint_valid")
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")
    e2e.check_same(vol, b.checkpoint_file("vm1", n), "primary and checkpoint")
    e2e.check_same(vol, b.volume("vm1"), "primary and view")


# ---- the secondary's store --------------------------------------------------------------------------------------------


def secondary(cases, durability):
    bad, a, b, vol, n = pair("b", durability)
    for i, (what, ops, pattern, code) in enumerate(cases):
        old, new = 0x11 + i, 0x12 + i
        bad.fail(ops, "*" + pattern, code)
        check_eq(timed_write(vol, 0, bytes([new]) * SIZE), 0, what + ": the guest's write")
        st = a.wait_status("vm1", 60, health="degraded")
        check_eq(st["error"]["code"], {errno.EIO: "ERR_IO", errno.ENOSPC: "ERR_NOSPC"}[code], what + ": the error")
        check(st["error"]["operation"] == "peer" and st["reasons"], what + ": status %r" % st)
        a.repctl("error", "vm1", code=7)
        e2e.check_bytes(b.volume("vm1"), 0, SIZE, old, what + ": the view")
        e2e.check_bytes(b.checkpoint_file("vm1", n), 0, SIZE, old, what + ": the last checkpoint")
        b.kill9()
        bad.mend()  # a host whose disk does not work does not start on it
        b.start()
        e2e.check_bytes(b.checkpoint_file("vm1", n), 0, SIZE, old, what + ": the last checkpoint after kill -9")
        in_sync_again(a, b, vol)
        n = b.status("vm1")["checkpoint"]


def test_secondary_cannot_apply():
    """Its disk or its overlay fails: applying stops, the primary goes on and tracks, the last checkpoint stays."""
    secondary([("disk, EIO", "w", "/disk.raw", errno.EIO), ("disk, ENOSPC", "w", "/disk.raw", errno.ENOSPC),
               ("overlay data, EIO", "w", "/undo-*.data", errno.EIO), ("overlay map, EIO", "w", "/undo-*.map", errno.EIO),
               ("overlay map, ENOSPC", "w", "/undo-*.map", errno.ENOSPC)], "process")


def test_secondary_cannot_sync():
    secondary([("disk, sync", "s", "/disk.raw", errno.EIO), ("overlay data, sync", "s", "/undo-*.data", errno.EIO),
               ("overlay map, sync", "s", "/undo-*.map", errno.EIO)], "power")


def test_secondary_goes_on_by_itself():
    """What is no failed sync needs no restart: the primary comes again until it works."""
    bad, a, b, vol, n = pair("b")
    bad.fail("w", "*/undo-*.data", errno.ENOSPC)
    check_eq(timed_write(vol, 0, b"\x22" * SIZE), 0, "the guest's write")
    a.wait_status("vm1", 60, health="degraded")
    bad.mend()
    in_sync_again(a, b, vol)


def test_secondary_cannot_take_a_checkpoint():
    """The record or the new epoch's files cannot be made: the number is void, the last checkpoint stays and so does the stream."""
    bad, a, b, vol, n = pair("b")
    byte = 0x22
    for what, ops, pattern, code in (("the new overlay", "o", "*/undo-*", errno.ENOSPC), ("record, both copies", "w", "*/groups/vm1.*", errno.EIO),
                                     ("record, both copies", "w", "*/groups/vm1.*", errno.ENOSPC)):
        check_eq(timed_write(vol, 0, bytes([byte]) * SIZE), 0, what + ": a write before")
        bad.fail(ops, pattern, code)
        a.repctl("checkpoint", "vm1", code=(1, 5, 6), timeout=60).says("checkpoint")
        check_eq(timed_write(vol, 0, bytes([byte + 1]) * BLOCK), 0, what + ": a write after")
        e2e.check_bytes(b.checkpoint_file("vm1", n), 0, SIZE, 0x11 if byte == 0x22 else byte - 0x10 + 0x0f, what + ": the last checkpoint")
        bad.mend()
        in_sync_again(a, b, vol)
        n = b.status("vm1")["checkpoint"]
        byte += 0x10
        check_eq(timed_write(vol, 0, bytes([byte - 1]) * SIZE), 0, what + ": a write that ends it")
        n = int(a.repctl("checkpoint", "vm1").out)


def test_one_copy_of_the_record():
    """One copy that cannot be written fails a save at the latest with the second one; what was answered is found again."""
    bad, a, b, vol, n = pair("b")
    for copy in "ab":
        bad.fail("w", "*/groups/vm1." + copy, errno.EIO)
        made = []
        for _ in range(2):
            check_eq(timed_write(vol, 0, b"\x33" * BLOCK), 0, "a write")
            r = a.repctl("checkpoint", "vm1", code=None)
            made += [int(r.out)] if r.code == 0 else []
        check(len(made) < 2, "two checkpoints in a row with copy %s failing" % copy)
        b.kill9()
        bad.mend()
        b.start()
        check_eq(b.status("vm1")["checkpoint"], made[-1] if made else n, "the newest checkpoint after kill -9")
        in_sync_again(a, b, vol)
        n = b.status("vm1")["checkpoint"]


def test_failover_that_cannot_be_saved():
    """Nothing is changed, and said; the same command again once it works."""
    bad, a, b, vol, n = pair("b")
    check_eq(timed_write(vol, 0, b"\x22" * MIB), 0, "a write")
    bad.fail("w", "*/groups/vm1.*", errno.ENOSPC)
    a.kill9()
    b.wait_status("vm1", 60, link="DOWN")
    b.repctl("-y", "failover", "vm1", code=1).says("space", "nothing was changed")
    st = b.status("vm1")
    check_eq((st["role"], st["state"]), ("secondary", "RUNNING"), "role and state")
    e2e.check_bytes(b.checkpoint_file("vm1", n), 0, SIZE, 0x11, "the checkpoint")
    bad.mend()
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the view")
    b.repctl("-y", "failover", "vm1", "--wait")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the survivor")
    b.restart()
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the survivor after a restart")


def test_commit_that_cannot_be_written():
    """FAILOVER_FAILED with the error, reads and writes as before, and the same command again ends it."""
    for code, word in ((errno.EIO, "ERR_IO"), (errno.ENOSPC, "ERR_NOSPC")):
        bad, a, b, vol, n = pair("b")
        check_eq(timed_write(vol, 0, b"\x22" * SIZE), 0, "a write")
        a.kill9()
        bad.fail("w", "*/disk.raw", code)
        b.repctl("-y", "failover", "vm1")
        st = b.wait_status("vm1", 60, state="FAILOVER_FAILED", health="degraded")
        check_eq((st["error"]["code"], st["error"]["operation"]), (word, "commit"), "the error")
        view = b.volume("vm1")
        e2e.check_bytes(view, 0, SIZE, 0x11, "the view")
        e2e.pwrite(view, 0, b"\x77" * BLOCK, sync=True)
        b.repctl("error", "vm1", code=7).says("failover")
        b.kill9()
        b.start()
        e2e.check_bytes(view, 0, BLOCK, 0x77, "a write in FAILOVER_FAILED, after kill -9")
        bad.mend()
        b.repctl("-y", "failover", "vm1", "--wait")
        e2e.check_bytes(view, 0, BLOCK, 0x77, "the write in FAILOVER_FAILED")
        e2e.check_bytes(view, BLOCK, SIZE - BLOCK, 0x11, "the rest")
        check_eq(b.status("vm1")["error"], None, "the error after the retry")
        e2e.close_or_fail()


# ---- the primary's store ----------------------------------------------------------------------------------------------


def test_primary_intent_map():
    """A write that cannot be recorded as dirty first is not done: EIO or ENOSPC to the guest, and the next one succeeds."""
    bad, a, b, vol, n = pair("a", on_io_error="pass")
    for code in (errno.EIO, errno.ENOSPC):
        a.stop()
        a.start()
        in_sync_again(a, b, vol)
        wait_for(lambda: a.status("vm1")["dirty_bytes"] == 0, "all to be clean", 60)
        bad.fail("w", "*/intent*", code)
        got = [timed_write(vol, i * MIB, b"\x44" * BLOCK) for i in range(4)]
        check(all(e in (0, code) for e in got), "writes: %r" % got)
        bad.mend()
        check_eq(timed_write(vol, 0, b"\x45" * SIZE), 0, "a write after")
    in_sync_again(a, b, vol)


def test_primary_record():
    """In sync a guest notices nothing; alone it cannot begin a generation: EIO until the record can be saved."""
    bad, a, b, vol, n = pair("a")
    bad.fail("w", "*/groups/vm1.*", errno.EIO)
    check_eq(timed_write(vol, 0, b"\x22" * BLOCK), 0, "a write in sync")
    a.repctl("checkpoint", "vm1", code=1).says("could not be saved")
    st = a.status("vm1")
    check_eq((st["health"], st["error"]["operation"], st["error"]["code"]), ("degraded", "metadata", "ERR_IO"), "status")
    check_eq(timed_write(vol, 0, b"\x23" * BLOCK), 0, "a write in sync, after")
    b.kill9()
    a.wait_status("vm1", 60, link=("DOWN", "HANDSHAKE"))
    check_eq(timed_write(vol, 0, b"\x24" * BLOCK), errno.EIO, "a write alone")
    bad.mend()
    check_eq(timed_write(vol, 0, b"\x25" * BLOCK), 0, "a write alone, after")
    b.start()
    in_sync_again(a, b, vol)
    e2e.check_bytes(vol, 0, BLOCK, 0x25, "the primary")


def test_survivors_history():
    """A host in DONE whose overlays cannot be written: all checkpoints go, the guest's write succeeds."""
    bad, a, b, vol, n = pair("b")
    check_eq(timed_write(vol, 0, b"\x22" * SIZE), 0, "a write")
    a.kill9()
    b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    view = b.volume("vm1")
    bad.fail("w", "*/undo-*", errno.EIO)
    check_eq(timed_write(view, 0, b"\x33" * SIZE), 0, "the guest's write")
    check_eq(b.ctl("checkpoints", name="vm1")["checkpoints"], [], "checkpoints")
    check("all checkpoints here were dropped" in b.log_text(), "nothing in the log says so")
    bad.mend()
    b.restart()
    e2e.check_bytes(view, 0, SIZE, 0x33, "the guest's write after a restart")


def test_new_volume():
    """create with a store that fails: refused, nothing left, and it works when the disk does; a store record likewise."""
    bad = BadIo()
    h = Host("a", env=bad.env).start()
    for ops, pattern in (("w", "*/groups/*"), ("o", "*/disk.raw"), ("s", "*/volumes*")):
        for code in (errno.EIO, errno.ENOSPC):
            bad.fail(ops, pattern, code)
            r = h.repctl("create", "vm1", "--size", "1M", code=None)
            bad.mend()
            if r.code:
                check_eq(h.ctl("list")["volumes"], [], "volumes after a failed create (%s)" % pattern)
                h.repctl("create", "vm1", "--size", "1M")
            h.restart()
            check_eq([v["name"] for v in h.ctl("list")["volumes"]], ["vm1"], "volumes")
            h.repctl("-y", "delete", "vm1")
    h.stop()
    d = e2e.tmp()
    bad.fail("w", "*/store.*", errno.ENOSPC)
    n = Host("n", folder=d, env=bad.env).start(wait=False)
    n.expect_dead = True
    check(n.wait_exit(None) != 0, "a store whose record cannot be written was opened")
    check("space" in n.log_text(), "it does not say why", n.log_tail)
    bad.mend()
    n.start()
    n.create("vm1", MIB)


if __name__ == "__main__":
    e2e.main()
