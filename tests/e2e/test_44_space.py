#!/usr/bin/env python3
"""Filesystems that are really full: on_cow_error, room for history, the records (SPEC 3, 5, 7; docs/FAILURES.md)."""

import errno
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, MIB, Host, Tmpfs, check, check_eq, check_errno, wait_for  # noqa: E402

SIZE = 8 * MIB


def pair_on(disk, host="b", **settings):
    """A protected volume of 8 MiB, all 0x11, in sync, checkpoints on command; the host named has its store on `disk`."""
    d = e2e.tmp()
    hosts = {n: Host(n, folder=d, store=os.path.join(disk.path, "s") if n == host else None).start() for n in "ab"}
    a, b = hosts["a"], hosts["b"]
    vol = a.create("vm1", SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0", *("%s=%s" % i for i in settings.items()))
    b.wait_synced("vm1")
    return a, b, vol


def checkpoint(a):
    return int(a.repctl("checkpoint", "vm1").out)


def numbers(h):
    return [c["number"] for c in h.ctl("checkpoints", name="vm1")["checkpoints"]]


def fill(vol, byte, off=0, length=SIZE):
    e2e.pwrite(vol, off, bytes([byte]) * length, sync=True)


def in_sync_again(a, b, vol):
    """By itself, once the condition has gone: connected, in sync, no error, both copies equal, a checkpoint can be had."""
    a.wait_status("vm1", 60, link="SYNCED", health="ok")
    b.wait_status("vm1", 60, link="SYNCED")
    n = wait_for(lambda: a.repctl("checkpoint", "vm1", code=None).out.strip(), "a checkpoint", 60)
    check_eq(a.status("vm1")["error"], None, "the error that stands")
    check_eq(b.status("vm1")["checkpoint_valid"], True, "checkpoint_valid")
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")
    e2e.check_same(vol, b.checkpoint_file("vm1", int(n)), "primary and checkpoint")


# ---- the secondary's history ------------------------------------------------------------------------------------------


def test_drop_history():
    """The oldest go, one at a time, as room is needed; the base, and what is pinned, never; then applying stops."""
    disk = Tmpfs(64 * MIB)
    a, b, vol = pair_on(disk, on_cow_error="drop-history")
    made = []
    for i in range(4):  # each epoch saves all: 8 MiB of history apiece
        made.append(checkpoint(a))
        fill(vol, 0x20 + i)
    first = numbers(b)
    check(set(made) <= set(first), "checkpoints %r among %r" % (made, first))
    made.append(checkpoint(a))
    ballast = disk.fill(leave=2 * MIB)
    fill(vol, 0x30)  # 8 MiB to save, 2 MiB of room
    a.wait_status("vm1", 60, link="SYNCED", health="ok")
    left = numbers(b)
    check(left and left == first[-len(left):] or left == made[-len(left):], "not the oldest went: %r of %r" % (left, first))
    check(made[0] not in left and made[-1] in left, "left: %r of %r" % (left, made))
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x23, "the view")
    e2e.check_bytes(b.checkpoint_file("vm1", made[-1]), 0, SIZE, 0x23, "the base")
    check("was dropped so that mirroring goes on" in b.log_text(), "no line in the log says so")
    check_eq(b.status("vm1")["checkpoint_valid"], True, "checkpoint_valid")
    disk.fill()
    pinned = []
    while a.status("vm1")["link"] == "SYNCED" and len(pinned) < 9:  # with every round less is left to drop, then it stops
        pinned.append(int(a.repctl("checkpoint", "vm1", "--keep").out))
        fill(vol, 0x40 + len(pinned))
        disk.fill()
    check(1 <= len(pinned) < 9, "%d pinned checkpoints found room in a full filesystem" % len(pinned))
    a.wait_status("vm1", 60, health="degraded")
    a.repctl("error", "vm1", code=7).says("space|NOSPC")
    kept = numbers(b)
    check(set(pinned) <= set(kept), "pinned %r, left %r" % (pinned, kept))
    e2e.check_bytes(b.checkpoint_file("vm1", pinned[-1]), 0, SIZE, 0x40 + len(pinned) - 1 if len(pinned) > 1 else 0x30, "the base when applying stopped")
    os.unlink(ballast)
    in_sync_again(a, b, vol)


def test_break():
    """Mirroring goes on without a checkpoint; the view is gone until the next one; failover only to the latest."""
    disk = Tmpfs(48 * MIB)
    a, b, vol = pair_on(disk, on_cow_error="break")
    n = checkpoint(a)
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the view")
    fd = os.open(b.volume("vm1"), os.O_RDONLY | os.O_DIRECT)
    ballast = disk.fill(leave=MIB)
    fill(vol, 0x22)
    st = b.wait_status("vm1", 60, link="SYNCED", checkpoint_valid=False)
    check_eq(st["health"], "degraded", "health")
    st = a.wait_status("vm1", 60, link="SYNCED", health="degraded", checkpoint_valid=False)
    check_eq((st["error"]["operation"], st["error"]["code"]), ("peer", "ERR_NOSPC"), "the primary's error")
    check(any("on_cow_error=break" in r for r in st["reasons"]), "reasons: %r" % st["reasons"])
    check_eq(numbers(b), [], "checkpoints")
    check(not os.path.exists(b.checkpoint_file("vm1", n)), "checkpoint %d is still shown" % n)
    buf = e2e.aligned(b"\xee" * BLOCK)
    check_errno(errno.EIO, "the view, an open handle", os.preadv, fd, [buf], 0)
    check(bytes(buf) == b"\xee" * BLOCK, "EIO came with data")
    os.close(fd)
    check_errno(errno.EIO, "the view", e2e.pread, b.volume("vm1"), 0, BLOCK)
    b.kill9()  # it was durable before the first unsaved overwrite
    b.start()
    check_eq(b.status("vm1")["checkpoint_valid"], False, "checkpoint_valid after a restart")
    # The resync that follows takes a checkpoint of its own first, and there is no room for it: now `break` acts as `stop`.
    a.wait_status("vm1", 60, health="degraded", link="DOWN")
    os.unlink(ballast)
    in_sync_again(a, b, vol)
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x22, "the view")


def test_break_then_failover():
    disk = Tmpfs(48 * MIB)
    a, b, vol = pair_on(disk, on_cow_error="break")
    checkpoint(a)
    disk.fill(leave=MIB)
    fill(vol, 0x22)
    b.wait_status("vm1", 60, link="SYNCED", checkpoint_valid=False)
    a.kill9()
    b.repctl("-y", "failover", "vm1", code=5).says("--to latest", "break")
    b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x22, "what was received")
    check_eq(b.status("vm1")["state"], "DONE", "state")


# ---- a host that owns its disk ----------------------------------------------------------------------------------------


def test_guests_write_where_history_is_full():
    """After a failover the survivor keeps history; when there is no room for it, it goes, and the guest's writes succeed."""
    disk = Tmpfs(64 * MIB)
    a, b, vol = pair_on(disk)
    for i in range(3):
        checkpoint(a)
        fill(vol, 0x20 + i)
    a.kill9()
    b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    before = numbers(b)
    disk.fill(leave=MIB)
    view = b.volume("vm1")
    fill(view, 0x44)  # 8 MiB to save, 1 MiB of room
    e2e.check_bytes(view, 0, SIZE, 0x44, "what the guest wrote")
    left = numbers(b)
    check(len(left) < len(before) and left == before[-len(left):] if left else True, "left: %r of %r" % (left, before))
    check("so that guests' writes succeed" in b.log_text(), "no line in the log says what went")
    for n in left:
        e2e.pread(b.checkpoint_file("vm1", n), 0, SIZE)
    b.restart()
    e2e.check_bytes(view, 0, SIZE, 0x44, "what the guest wrote, after a restart")


def test_unpinned_history_goes_before_what_was_pinned():
    """The pinned one is the oldest; those above it, of the same blocks, go first: merged away, their room comes free."""
    disk = Tmpfs(96 * MIB)
    a, b, vol = pair_on(disk)
    pinned = int(a.repctl("checkpoint", "vm1", "--keep").out)
    for i in range(4):
        fill(vol, 0x20 + i)
        checkpoint(a)
    a.kill9()
    b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait")
    before = numbers(b)
    oldest = before.index(pinned)
    disk.fill(leave=MIB)
    view = b.volume("vm1")
    fill(view, 0x44)
    e2e.check_bytes(view, 0, SIZE, 0x44, "what the guest wrote")
    left = numbers(b)
    check(pinned in left, "the pinned checkpoint %d went: %r of %r" % (pinned, left, before))
    check(len(left) < len(before), "nothing was dropped: %r" % left)
    check(oldest == 0 or before[0] not in left, "an unpinned one older than the pinned stayed: %r of %r" % (left, before))
    e2e.check_bytes(b.checkpoint_file("vm1", pinned), 0, SIZE, 0x11, "the pinned checkpoint")
    b.restart()
    e2e.check_bytes(b.checkpoint_file("vm1", pinned), 0, SIZE, 0x11, "the pinned checkpoint after a restart")
    e2e.check_bytes(view, 0, SIZE, 0x44, "what the guest wrote after a restart")


def test_commit_without_room_goes_on_when_a_checkpoint_is_dropped():
    """FAILOVER_FAILED says what to do: room can be made by dropping what neither the way back nor the view needs."""
    disk = Tmpfs(64 * MIB)
    a, b, vol = pair_on(disk)
    for i in range(3):
        fill(vol, 0x20 + i)
        checkpoint(a)
    fill(vol, 0x30)
    a.kill9()
    oldest = numbers(b)[0]
    disk.fill(leave=MIB // 2)
    b.repctl("-y", "failover", "vm1")  # what was received is saved before it goes back: 8 MiB
    st = b.wait_status("vm1", 60, state="FAILOVER_FAILED")
    check_eq(st["error"]["code"], "ERR_NOSPC", "the error")
    b.repctl("error", "vm1", code=7).says("space", "failover")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x22, "the view")
    base = numbers(b)[-2]
    b.repctl("-y", "checkpoints", "vm1", "--drop", base, code=5).says("in use")
    b.repctl("-y", "checkpoints", "vm1", "--drop", oldest)
    b.repctl("-y", "failover", "vm1", "--wait")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x22, "the survivor")
    e2e.check_bytes(b.disk("vm1"), 0, SIZE, 0x22, "its disk")
    e2e.check_bytes(b.checkpoint_file("vm1", numbers(b)[-1]), 0, SIZE, 0x30, "all that was received")


if __name__ == "__main__":
    e2e.main()
