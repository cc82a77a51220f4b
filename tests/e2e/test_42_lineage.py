#!/usr/bin/env python3
"""Lineage and roles (SPEC 5, 8): split brain recorded on both hosts whenever one dies, resolved both ways from either
host with the loser's content kept, failback that moves only what differs, unprotect, an old primary that comes back."""

import errno
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, KIB, MIB, Pair, check, check_eq, wait_for  # noqa: E402

SIZE = 4 * MIB
LONG = 60


def apart(p, resync=None):
    """In sync with 0x11; then cut, the survivor failed over. A wrote 0x22 at 0 and 1 MiB, B 0x33 at 0 and 2 MiB."""
    (vol,) = p.protect(size=SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    p.checkpoint()
    wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty bits to clear", LONG)
    p.proxy.down()
    p.a.wait_status("vm1", LONG, link="DOWN")
    p.b.repctl("-y", "failover", "vm1", "--wait")
    e2e.pwrite(vol, 0, b"\x22" * BLOCK, sync=True)
    e2e.pwrite(vol, MIB, b"\x22" * BLOCK, sync=True)
    e2e.pwrite(p.b.volume("vm1"), 0, b"\x33" * BLOCK, sync=True)
    e2e.pwrite(p.b.volume("vm1"), 2 * MIB, b"\x33" * BLOCK, sync=True)


def image(byte, at):
    m = bytearray(b"\x11" * SIZE)
    for off in (0, at):
        m[off:off + BLOCK] = bytes([byte]) * BLOCK
    return m


IMAGE_A, IMAGE_B = image(0x22, MIB), image(0x33, 2 * MIB)


def both_split(p):
    for h in (p.a, p.b):
        h.wait_status("vm1", LONG, split_brain=True, health="split_brain", link="DOWN")


def known(h):
    wait_for(lambda: h.repctl("diverged", "vm1", json=True)["peer"] is not None, "the peer's part to be known", LONG)
    return h.repctl("diverged", "vm1", json=True)


def check_diverged(doc, local, peer):
    check_eq(doc["split_brain"], True, "split_brain")
    for side, at in ((doc["local"], local), (doc["peer"], peer)):
        check(side["since"] and side["since"].startswith("20"), "since: %r" % side["since"])
        x = side["volumes"][0]["extents"]
        for off in (0, at):
            check(any(e["offset"] <= off < e["offset"] + e["length"] for e in x), "%d is not among %r" % (off, x))
        check_eq(sum(e["length"] for e in x), side["bytes"], "bytes")


def in_sync(p, primary, secondary, content):
    primary.wait_synced("vm1", LONG)
    primary.wait_status("vm1", LONG, role="primary", state="RUNNING", split_brain=False, health="ok")
    secondary.wait_status("vm1", LONG, role="secondary", state="RUNNING", split_brain=False)
    primary.repctl("checkpoint", "vm1")
    e2e.expect_file(primary.volume("vm1"), content, "the primary")
    e2e.expect_file(secondary.volume("vm1"), content, "the secondary's view")
    e2e.check_same(primary.disk("vm1"), secondary.disk("vm1"), "the disks")


def test_split_brain_is_durable_on_both_and_refuses():
    p = Pair(proxy=True)
    apart(p)
    p.b.kill9()  # it never sees the first handshake
    p.proxy.up()
    p.b.start()
    both_split(p)
    for h in (p.a, p.b):
        h.repctl("status", "vm1", "--exit-code", code=8)
        h.repctl("error", "vm1", code=8)
    p.a.repctl("start", "vm1", code=8)
    p.b.repctl("failback", "vm1", "--peer", p.a.listen, code=8).says("resolve")
    p.b.repctl("protect", "vm1", "--peer", p.a.listen, code=8)
    p.a.repctl("wait", "vm1", "--for=in-sync", code=8)
    # both go on serving
    e2e.pwrite(p.a.volume("vm1"), 3 * MIB, b"\x11" * BLOCK, sync=True)
    e2e.pwrite(p.b.volume("vm1"), 3 * MIB, b"\x11" * BLOCK, sync=True)
    check_diverged(known(p.a), MIB, 2 * MIB)
    check_diverged(known(p.b), 2 * MIB, MIB)
    p.a.repctl("diverged", "vm1").says("split brain", "this host: ", "the peer: ")
    # each forgets and is told again: also who was killed right at the moment
    for h in (p.b, p.a):
        h.kill9()
        h.start()
        both_split(p)
    p.proxy.down()
    p.b.restart()
    check_eq(p.b.repctl("diverged", "vm1", json=True)["peer"], None, "the peer's part before it was reached")
    p.b.repctl("diverged", "vm1").says("not been reached")
    both_split(p)


def test_one_killed_before_it_could_record_it():
    """Whoever of the two dies at the moment of the detection is told by the other later."""
    for victim in "ab":
        p = Pair(proxy=True)
        apart(p)
        h, other = (p.a, p.b) if victim == "a" else (p.b, p.a)
        p.proxy.up()
        deadline = time.monotonic() + LONG
        while not other.status("vm1")["split_brain"]:
            check(time.monotonic() < deadline, "no split brain found")
        h.kill9()
        h.start()
        both_split(p)


def resolve_case(where, discard):
    p = Pair(proxy=True)
    apart(p)
    p.proxy.up()
    both_split(p)
    host = p.a if where == "a" else p.b
    loser = host if discard == "local" else (p.b if host is p.a else p.a)
    winner = p.b if loser is p.a else p.a
    mine, its = (IMAGE_A, IMAGE_B) if winner is p.a else (IMAGE_B, IMAGE_A)
    fd = os.open(loser.volume("vm1"), os.O_RDWR | os.O_DIRECT)
    before = winner.status("vm1")["counters"]["resync_bytes"]
    doc = host.repctl("-y", "resolve", "vm1", "--discard", discard, json=True)
    check_eq(doc["discarded"], discard, "the answer")
    check((doc["checkpoint"] is not None) == (discard == "local"), "the answer: %r" % doc)
    in_sync(p, winner, loser, mine)
    check_eq(e2e.errno_of(os.pwrite, fd, memoryview(e2e.aligned(bytes(BLOCK))), 0), errno.EIO, "the loser's open handle")
    os.close(fd)
    kept = [c for c in loser.repctl("checkpoints", "vm1", json=True)["checkpoints"] if c["kind"] == "local" and c["pinned"]]
    if doc["checkpoint"]:
        check_eq(kept[-1]["number"], doc["checkpoint"], "the kept checkpoint")
    e2e.expect_file(loser.checkpoint_file("vm1", kept[-1]["number"]), its, "what the loser had")
    moved = winner.status("vm1")["counters"]["resync_bytes"] - before
    check(3 * BLOCK <= moved <= 3 * MIB, "the resync moved %d bytes" % moved)
    host.repctl("-y", "resolve", "vm1", "--discard", discard)  # the same again
    host.repctl("-y", "resolve", "vm1", "--discard", "peer" if discard == "local" else "local", code=5)
    # the pair lives on, through restarts of either, whoever dials
    for h in (loser, winner):
        h.restart()
        winner.wait_synced("vm1", LONG)
    e2e.pwrite(winner.volume("vm1"), 3 * MIB, b"\x44" * BLOCK, sync=True)
    more = bytearray(mine)
    more[3 * MIB:3 * MIB + BLOCK] = b"\x44" * BLOCK
    in_sync(p, winner, loser, more)
    # and stops and starts again
    winner.repctl("stop", "vm1")
    loser.wait_status("vm1", LONG, state="DONE")
    e2e.pwrite(winner.volume("vm1"), 3 * MIB, b"\x55" * BLOCK, sync=True)
    more[3 * MIB:3 * MIB + BLOCK] = b"\x55" * BLOCK
    winner.repctl("start", "vm1")
    in_sync(p, winner, loser, more)
    e2e.expect_file(loser.checkpoint_file("vm1", kept[-1]["number"]), its, "what the loser had, later")
    return p


def test_resolve_on_the_dialler_discarding_itself():
    p = resolve_case("a", "local")
    # the secondary is the one that dials now: its failover reaches the primary all the same
    p.a.repctl("-y", "failover", "vm1", "--wait")
    p.b.wait_status("vm1", LONG, role="secondary", state="NONE", split_brain=False)
    p.a.repctl("failback", "vm1", "--peer", p.b.listen, "--wait")
    p.a.repctl("checkpoint", "vm1")
    e2e.check_same(p.a.disk("vm1"), p.b.disk("vm1"), "the disks after a failback")


def test_resolve_on_the_dialler_discarding_the_peer():
    resolve_case("a", "peer")


def test_resolve_on_the_survivor_discarding_itself():
    resolve_case("b", "local")


def test_resolve_on_the_survivor_discarding_the_peer():
    resolve_case("b", "peer")


def test_resolve_is_killed_and_goes_on():
    """I15: the loser dies in the resync; it goes on without a new decision, and what it had can be read meanwhile."""
    p = Pair(proxy=True)
    apart(p)
    p.proxy.up()
    both_split(p)
    p.b.repctl("set", "vm1", "resync_rate=64K")
    p.a.repctl("-y", "resolve", "vm1", "--discard", "local")
    wait_for(lambda: (lambda r: r and r["done"] > 0)(p.b.status("vm1")["resync"]), "the resync to move something", LONG)
    p.a.kill9()
    p.a.start()
    st = p.a.status("vm1")
    check_eq((st["role"], st["state"]), ("secondary", "NONE"), "the loser after kill -9")
    kept = [c["number"] for c in p.a.repctl("checkpoints", "vm1", json=True)["checkpoints"] if c["pinned"]]
    e2e.expect_file(p.a.checkpoint_file("vm1", kept[-1]), IMAGE_A, "what the loser had, in the resync")
    p.a.repctl("-y", "failover", "vm1", code=5)  # it has no default target [LASTLIN]
    p.b.kill9()
    p.b.start()
    p.b.repctl("set", "vm1", "resync_rate=0")
    in_sync(p, p.b, p.a, IMAGE_B)
    e2e.expect_file(p.a.checkpoint_file("vm1", kept[-1]), IMAGE_A, "what the loser had")


def test_failback_moves_only_what_differs():
    p = Pair(proxy=True)
    (vol,) = p.protect(size=16 * MIB)
    e2e.pwrite(vol, 0, b"\x11" * (16 * MIB), sync=True)
    p.checkpoint()
    wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty bits to clear", LONG)
    fd = os.open(vol, os.O_RDWR | os.O_DIRECT)
    p.proxy.down()
    p.a.wait_status("vm1", LONG, link="DOWN")
    p.b.repctl("-y", "failover", "vm1", "--wait")
    survivor = p.b.volume("vm1")
    for i in range(5):
        e2e.pwrite(survivor, i * 3 * MIB, b"\x33" * BLOCK, sync=True)
    p.b.repctl("failback", "vm1", "--peer", "127.0.0.1:1", code=6)
    check_eq(p.b.status("vm1")["role"], "standalone", "after a failback that reached nobody")
    p.b.repctl("failback", "vm1", "--peer", p.a.listen, "--wait")
    check_eq(e2e.errno_of(os.pwrite, fd, memoryview(e2e.aligned(bytes(BLOCK))), 0), errno.EIO, "a handle from before")
    os.close(fd)
    moved = p.b.status("vm1")["counters"]["resync_bytes"]
    check(5 * BLOCK <= moved <= 5 * 64 * KIB, "the failback moved %d bytes for 5 blocks" % moved)
    st = p.a.status("vm1")
    check_eq((st["role"], st["state"]), ("secondary", "RUNNING"), "the old primary")
    p.b.repctl("failback", "vm1", "--peer", p.a.listen)  # the same again
    p.b.repctl("checkpoint", "vm1")
    e2e.check_same(p.b.disk("vm1"), p.a.disk("vm1"), "the disks")
    # what the survivor kept of its time as a secondary goes, what is pinned stays
    wait_for(lambda: all(c["pinned"] for c in p.b.repctl("checkpoints", "vm1", json=True)["checkpoints"]),
             "unpinned checkpoints of the now primary to go", LONG)
    # and back: a failover on the old primary
    p.a.repctl("-y", "failover", "vm1", "--wait")
    e2e.pwrite(p.a.volume("vm1"), 0, b"\x77" * BLOCK, sync=True)
    p.b.wait_status("vm1", LONG, role="secondary", state="NONE")
    p.proxy.up()
    p.a.repctl("failback", "vm1", "--peer", p.peer, "--wait")
    p.a.repctl("checkpoint", "vm1")
    e2e.check_same(p.a.disk("vm1"), p.b.disk("vm1"), "the disks, back again")
    e2e.check_bytes(p.b.volume("vm1"), 0, BLOCK, 0x77, "the secondary's view")


def failback_killed(victim, before_restart):
    """I15: a host dies in the resync of a failback. Started again it goes on by itself, with no second command; what the survivor
    wrote is on both, and it has not begun anew."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    p.checkpoint()
    wait_for(lambda: p.a.status("vm1")["dirty_bytes"] == 0, "dirty bits to clear", LONG)
    p.a.restart()  # and what it wrote does not count as in flight any more
    p.a.wait_synced("vm1", LONG)
    p.proxy.down()
    p.a.wait_status("vm1", LONG, link="DOWN")
    p.b.repctl("-y", "failover", "vm1", "--wait")
    want = bytearray(b"\x11" * SIZE)
    for i in range(16):  # the first MiB, a part of each region
        want[i * 64 * KIB:i * 64 * KIB + BLOCK] = bytes([0x30 + i]) * BLOCK
        e2e.pwrite(p.b.volume("vm1"), i * 64 * KIB, bytes([0x30 + i]) * BLOCK, sync=True)
    p.b.repctl("set", "vm1", "resync_rate=64K")
    p.b.repctl("failback", "vm1", "--peer", p.a.listen)
    wait_for(lambda: (lambda r: r and r["done"] > 0)(p.b.status("vm1")["resync"]), "the resync to move something", LONG)
    st = p.a.status("vm1")
    check_eq((st["role"], st["state"]), ("secondary", "NONE"), "the old primary in the resync")
    host = getattr(p, victim)
    host.kill9()
    before_restart(p)
    host.start()
    e2e.pwrite(p.b.volume("vm1"), 3 * MIB, b"\x55" * BLOCK, sync=True)  # a guest goes on
    want[3 * MIB:3 * MIB + BLOCK] = b"\x55" * BLOCK
    p.b.repctl("set", "vm1", "resync_rate=0")
    in_sync(p, p.b, p.a, want)
    moved = p.b.status("vm1")["counters"]["resync_bytes"]
    check(moved <= 3 * MIB, "the failback moved %d bytes for 1 MiB and a block" % moved)
    check_eq(p.a.repctl("-y", "failover", "vm1", json=True)["checkpoint"], p.b.status("vm1")["checkpoint"],
             "the default target is the last checkpoint of the new lineage")


def test_failback_whose_target_is_killed():
    failback_killed("a", lambda p: p.b.wait_status("vm1", LONG, role="primary", state="RUNNING", link="DOWN"))


def test_failback_whose_source_is_killed():
    def target_alone(p):
        p.a.wait_status("vm1", LONG, link="DOWN")
        p.a.repctl("-y", "failover", "vm1", code=5)  # of what it follows now it has no checkpoint [LASTLIN]
        p.a.repctl("unprotect", "vm1", code=5).says("incomplete")
    failback_killed("b", target_alone)


def test_old_primary_without_own_writes_waits_for_the_failback():
    p = Pair(proxy=True)
    (vol,) = p.protect(size=MIB)
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    p.checkpoint()
    p.proxy.down()
    p.a.wait_status("vm1", LONG, link="DOWN")
    p.b.repctl("-y", "failover", "vm1", "--wait")
    p.a.kill9()
    p.proxy.up()
    p.a.start()
    p.a.wait_status("vm1", LONG, role="secondary", state="NONE", split_brain=False)
    check_eq(e2e.errno_of(e2e.pwrite, vol, 0, b"x" * BLOCK), errno.EIO, "a write to what was shut out")
    p.a.repctl("-y", "failover", "vm1", code=5).says("failback")
    p.a.repctl("failback", "vm1", "--peer", p.b.listen, code=5)
    p.b.repctl("failback", "vm1", "--peer", p.a.listen, "--wait")
    p.b.repctl("checkpoint", "vm1")
    e2e.check_same(p.b.disk("vm1"), p.a.disk("vm1"), "the disks")


def test_unprotect_and_protect_again():
    """What is written in between is recorded nowhere: the next protection sends everything."""
    p = Pair()
    (vol,) = p.protect(size=SIZE)
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    n = p.checkpoint()
    p.a.repctl("unprotect", "vm1")
    for h, role in ((p.a, "standalone"), (p.b, "secondary")):
        h.wait_status("vm1", LONG, role=role, state="DONE")
    p.a.repctl("unprotect", "vm1", code=5)
    p.a.repctl("error", "vm1", code=5)
    e2e.pwrite(vol, MIB, b"\x22" * MIB, sync=True)
    p.b.repctl("unprotect", "vm1")
    p.b.wait_status("vm1", LONG, role="standalone", state="DONE")
    e2e.pwrite(p.b.volume("vm1"), 0, b"\x33" * MIB, sync=True)
    e2e.check_bytes(p.b.checkpoint_file("vm1", n), 0, SIZE, 0x11, "a checkpoint under new writes")
    p.a.repctl("protect", "vm1", "--peer", p.peer, code=5).says("--adopt")
    p.a.repctl("protect", "vm1", "--peer", p.peer, "--adopt", "--wait")
    p.checkpoint()
    p.same()
    e2e.check_bytes(p.b.volume("vm1"), MIB, MIB, 0x22, "the secondary's view")
    kept = [c["number"] for c in p.b.repctl("checkpoints", "vm1", json=True)["checkpoints"] if c["pinned"]]
    e2e.check_bytes(p.b.checkpoint_file("vm1", kept[-1]), 0, MIB, 0x33, "what the adopted copy had")
    e2e.check_bytes(p.b.checkpoint_file("vm1", n), 0, SIZE, 0x11, "the old checkpoint")
    # the secondary's side: both stop, it alone is free
    p.b.repctl("unprotect", "vm1")
    p.a.wait_status("vm1", LONG, role="primary", state="DONE")
    p.b.wait_status("vm1", LONG, role="standalone", state="DONE")
    p.a.repctl("start", "vm1", code=5)


def test_adoption_cut_before_its_first_block():
    p = Pair(proxy=True)
    e2e.pwrite(p.a.create("vm1", SIZE), 0, b"\x11" * SIZE, sync=True)
    e2e.pwrite(p.b.create("vm1", SIZE), 0, b"\x99" * SIZE, sync=True)
    p.a.repctl("set", "vm1", "resync_rate=64K")
    p.a.repctl("protect", "vm1", "--peer", p.peer, "--adopt")
    p.b.wait_status("vm1", LONG, role="secondary")
    p.b.kill9()
    p.b.start()
    p.a.repctl("set", "vm1", "resync_rate=0")
    in_sync(p, p.a, p.b, bytearray(b"\x11" * SIZE))
    kept = [c["number"] for c in p.b.repctl("checkpoints", "vm1", json=True)["checkpoints"] if c["pinned"]]
    e2e.check_bytes(p.b.checkpoint_file("vm1", kept[-1]), 0, SIZE, 0x99, "what the adopted copy had")


if __name__ == "__main__":
    e2e.main()
