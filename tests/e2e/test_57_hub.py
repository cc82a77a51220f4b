#!/usr/bin/env python3
"""Hub messages (SPEC 10): a second implementation of the protocol (tests/lib/repfs_hub.py, from docs/protocol.md alone) asks
daemons, is the secondary of one, comes back after an abrupt end, and misbehaves; and `repctl read|write|report`."""

import ctypes
import os
import random
import socket
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
import repfs_hub as hub  # noqa: E402
from repfs_e2e import BLOCK, KIB, MIB, BadIo, Host, Pair, check, check_eq, wait_for  # noqa: E402

SIZE = 4 * MIB
REGION = 64 * KIB


class HubHost(hub.Hub):
    """Closed by the runner; an error of a host's in the protocol fails the test."""

    def __init__(self, folder=None, **kw):
        super().__init__(folder or e2e.tmp(), peer_timeout=5.0 * e2e.SLOW, **kw)
        e2e.track(self)

    def close(self):
        if not self.stopping:
            self.drop()
        if self.errors:
            raise e2e.TestError("the hub saw: %r" % self.errors)


class Client(hub.HostClient):
    def __init__(self, host):
        super().__init__(host.listen)
        e2e.track(self)


def refused(code, says, fn, *args, **kw):
    try:
        got = fn(*args, **kw)
    except hub.Refused as e:
        check_eq(e.code, code, "the code of %r" % e.text)
        check(says in e.text, "%r does not say %r" % (e.text, says))
        return
    raise e2e.TestError("not refused: %r" % (got,))


def synced(h, host, group="vm1"):
    """The hub's session, once both say that they are in sync and the hub holds a checkpoint."""
    host.wait_synced(group)
    s = wait_for(lambda: h.session() and h.session().synced.is_set() and h.session(), "the hub's session in sync")
    wait_for(lambda: host.status(group)["checkpoint"] and h.groups[group].state == hub.RUNNING, "a checkpoint on the hub")
    return s


def settle(host, h, group="vm1"):
    """A checkpoint: everything before it is on the hub."""
    n = int(host.repctl("checkpoint", group).out)
    check_eq(h.groups[group].last_stream, n, "the hub's newest checkpoint")
    return n


def content(path):
    with open(path, "rb") as f:
        return f.read()


def same(host, h, names, group="vm1"):
    """Each of the hub's copies, and its newest checkpoint, is the volume byte for byte."""
    n = settle(host, h, group)
    for c in h.groups[group].copies.values():
        want = content(host.volume(c.name))
        check(c.image(n) == want, "the hub's checkpoint %d of %s differs" % (n, c.name))
        check(c.read(0, c.size) == want, "the hub's copy of %s differs" % c.name)
    check_eq({c.name for c in h.groups[group].copies.values()}, set(names), "the hub's copies")


# ---- reports -------------------------------------------------------------------------------------------------------------


def test_reports():
    """The report is what `list` says, is sent again when volumes come, go and change, and `repctl report` prints it."""
    a = Host("a").start()
    a.create("vm1", SIZE)
    a.create("vm1-data", MIB, "vm1")
    c = Client(a)
    names = lambda r: {v.name: (v.group, v.size, v.role, v.state) for v in r}
    listed = {v["name"]: (v["group"], v["size"], v["role"], v["state"]) for v in a.ctl("list")["volumes"]}
    check_eq(names(c.report()), listed, "the report")
    check_eq(names(c.wait_report(lambda r: True)), listed, "the report that came unasked")
    a.create("other", 512)
    r = c.wait_report(lambda r: any(v.name == "other" for v in r))
    check_eq(names(r)["other"], ("other", 512, "standalone", "NONE"), "a new volume")
    a.repctl("delete", "other", "-y")
    c.wait_report(lambda r: len(r) == 2 and r is c.reports[-1])
    b = Host("b", folder=a.dir).start()
    a.repctl("protect", "vm1", "--peer", b.listen, "--id", "vm1=4294967295", "--id", "vm1-data=7", "--wait")
    r = c.wait_report(lambda r: all((v.role, v.state) == ("primary", "RUNNING") for v in r))
    check_eq({v.name: v.id for v in r}, {"vm1": 4294967295, "vm1-data": 7}, "ids")
    cb = Client(b)
    check_eq({(v.name, v.id, v.role) for v in cb.report()}, {("vm1", 4294967295, "secondary"), ("vm1-data", 7, "secondary")},
             "the other host's report")
    uuid = {v.name: v.uuid for v in c.report()}
    doc = a.repctl("report", json=True)
    check_eq({v["name"]: v["uuid"].replace("-", "") for v in doc["volumes"]}, uuid, "uuids of repctl report")
    check_eq(doc["store"].replace("-", ""), c.conn.peer_store.hex(), "the store of repctl report")
    far = a.repctl("report", "--remote", json=True)["peers"]
    check_eq([(p["store"].replace("-", ""), {v["name"]: (v["id"], v["role"]) for v in p["volumes"]}) for p in far],
             [(cb.conn.peer_store.hex(), {"vm1": (4294967295, "secondary"), "vm1-data": (7, "secondary")})], "report --remote")
    b.repctl("report", "--remote").says("vm1-data", "primary", "4294967295")
    a.repctl("report").says("NAME", "ROLE", "standalone|primary")
    # A role that changes is told.
    b.repctl("failover", "vm1", "-y", "--wait")
    cb.wait_report(lambda r: all((v.role, v.state) == ("standalone", "DONE") for v in r))
    c.wait_report(lambda r: all(v.role == "secondary" for v in r))
    # Many at once, and goodbye each way.
    tokens = [c.ask(hub.REPORT_WANT) for _ in range(20)]
    check(all(len(c.answer(t)) == 2 for t in tokens), "reports")
    c.goodbye()
    wait_for(lambda: c.ended, "the host to close after a goodbye")
    b.stop()
    wait_for(lambda: cb.ended, "the ending host's connection to end")
    check("goodbye" in str(cb.ended), "the ending host said %r" % cb.ended)
    a.repctl("report", "--remote", code=6).says("no peer is connected")


def test_both_decide_alike():
    """Who is the source: the document's rules, as the hub has them, and the program's, over JOINs of all kinds."""
    if e2e.sanitizer_runtimes():
        return  # the library can't be loaded into a program that has none
    lib = ctypes.CDLL(os.path.join(e2e.bin_dir(), "libdecide.so"))
    lib.decide.argtypes = [ctypes.c_char_p, ctypes.c_size_t] * 2
    names = ["equal", "detached", "partial", "full", "split brain", "unrelated", "shut out", "no source", "take over"]
    states = {0: (0, 2, 3, 4), 1: (0, 1, 4), 2: (0, 1, 4)}
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    bits = [hub.J_PROTECT, hub.J_ADOPT, hub.J_INCONSISTENT, hub.J_SPLIT, hub.J_FRESH, hub.J_DISCARD_MINE, hub.J_DISCARD_YOURS,
            hub.J_BROKEN, hub.J_HANDED]

    def join():
        pool = list(range(1, 7))
        rng.shuffle(pool)
        lineage = hub.Lineage(rng.choice(pool + [0]), rng.choice([0, pool[1]]), pool[2:2 + rng.randrange(4)])
        role = rng.choice([1, 1, 2, 2, 0])
        flags = sum(b for b in bits if rng.random() < 0.12)
        last = rng.randrange(3)
        return hub.Join(group="g", uuid=bytes(16), flags=flags, role=role, state=rng.choice(states[role]), lineage=lineage,
                        sync_from=rng.choice(pool + [0]) if flags & hub.J_INCONSISTENT else 0, ckpt_max=5, last_stream=last,
                        failover_generation=0, start=0, number=0, settings=b"\0\0",
                        volumes=[hub.Volume("v", bytes(16), 1, 512, rng.choice([0, 0, 0, 1, 4]))])

    seen = {}
    for i in range(12000):
        a, b = join(), join()
        if rng.random() < 0.05:  # as after a switchover that was cut, which chance alone makes too seldom
            for j in (a, b):
                j.role, j.state, j.last_stream, j.lineage.current = 2, rng.choice([1, 1, 1, 0]), rng.choice([1, 1, 0]), rng.choice([1, 1, 2])
            a.flags ^= hub.J_HANDED
        da, db = a.encode(), b.encode()
        got = lib.decide(da, len(da), db, len(db))
        check(got >= 0, "a JOIN does not decode: %d" % got)
        want, source = hub.decide(hub.Join.decode(da), hub.Join.decode(db))
        how = names[got & 255]
        seen[how] = seen.get(how, 0) + 1
        check(how == want, "seed %d, case %d: the program says %s, the document %s; %r; %r" % (seed, i, how, want, vars(a), vars(b)))
        if source is not None:
            check((got >> 8 == 0) == (source.encode() == da or da == db), "seed %d, case %d: %s, the source differs" % (seed, i, how))
    check_eq(sorted(seen), sorted(names), "the decisions that came up: %r" % seen)


# ---- the hub as a secondary ----------------------------------------------------------------------------------------------


def test_protect_to_a_hub():
    """START_PROTECT with ids of the hub's; a guest's writes with their status; checkpoints; an abrupt end, after which dirty
    regions alone travel, also into a hub that was started anew; a clean stop; a graceful end."""
    a = Host("a").start()
    names = ["vm1", "vm1-data"]
    vols = {n: a.create(n, SIZE, "vm1") for n in names}
    e2e.pwrite(vols["vm1"], 0, b"\x11" * MIB, sync=True)
    held = os.open(vols["vm1"], os.O_RDWR)  # a VM that runs: ids are given all the same
    a.repctl("set", "vm1", "checkpoint_interval=0", "peer_timeout=%ds" % (5 * e2e.SLOW))
    h = HubHost()
    c = Client(a)
    ids = {"vm1": 70001, "vm1-data": 4000000000}
    c.start_protect(h.address, ids)
    s = synced(h, a)
    check_eq({x.name: i for i, x in h.groups["vm1"].copies.items()}, ids, "ids on the hub")
    check_eq({v["name"]: v["id"] for v in a.status("vm1")["volumes"]}, ids, "ids in status")
    check_eq(s.decision, "full", "the first decision")
    check(all(v.role == "primary" for v in c.report()), "the host reports itself as primary")
    check_eq(sum(n for v, o, n in s.resynced if v == "vm1" and o < MIB), MIB, "the data that travelled")
    wait_for(lambda: [r for r in s.reports if {(v.name, v.id, v.role, v.state) for v in r} ==
                      {(n, ids[n], "primary", "RUNNING") for n in names}], "the report again, on the connection that carries the group")
    (far,) = a.repctl("report", "--remote", json=True)["peers"]
    check_eq((far["program"], {(v["name"], v["id"], v["role"]) for v in far["volumes"]}),
             ("hub 1.0", {(n, ids[n], "secondary") for n in names}), "the hub's own report")

    log = e2e.Log({n: SIZE for n in names})
    w = e2e.Writer(log, vols, threads=3, max_units=8, pace=0.002).start()
    w.wait_ops(150)
    first = settle(a, h)
    w.pause()
    e2e.fsync(vols["vm1"])
    same(a, h, names)
    check(all(status == 0 for _, _, _, status in s.status) and len(s.status) >= 150, "%d writes with status" % len(s.status))
    # A checkpoint is the disk as it was, whatever comes after it.
    before = {n: content(vols[n]) for n in names}
    second = settle(a, h)
    check(second > first, "numbers grow")
    w.resume()
    w.wait_ops(60)
    w.pause()
    e2e.fsync(vols["vm1"])
    wait_for(lambda: a.status("vm1")["queue_bytes"] == 0, "the queue to drain")
    for x in h.groups["vm1"].copies.values():
        check(x.image(second) == before[x.name], "checkpoint %d of %s" % (second, x.name))
    same(a, h, names)

    # The hub's copy, from the host's own repctl, over the connection that replicates.
    got = a.repctl("read", "vm1", "100", "70000", "--remote", text=False).out
    check(got == content(vols["vm1"])[100:70100], "read --remote of the hub's checkpoint")
    a.repctl("write", "vm1", "0", "--remote", input="x", code=1).says("written from outside")
    a.repctl("read", "vm1", SIZE, "1", "--remote", code=2).says("the peer: behind the end")

    # An abrupt end. What is written meanwhile is all that travels, and the host never stops.
    wait_for(lambda: a.status("vm1")["dirty_bytes"] == 0, "nothing to be dirty")
    h.drop()
    a.wait_status("vm1", link="DOWN")
    rng = random.Random(5)
    dirty = set()
    for _ in range(5):
        off = rng.randrange(SIZE // BLOCK) * BLOCK
        e2e.pwrite(vols["vm1-data"], off, rng.randbytes(BLOCK), sync=True)
        dirty.add(off // REGION)
    h2 = HubHost(h.folder, port=h.port)  # as a program that was started anew: from its files alone
    s = synced(h2, a)
    check_eq(s.decision, "partial", "the decision after the abrupt end")
    moved = {(v, r) for v, o, n in s.resynced for r in range(o // REGION, (o + n - 1) // REGION + 1)}
    check_eq(moved, {("vm1-data", r) for r in dirty}, "the regions that travelled")
    same(a, h2, names)

    # In the middle of a resync: what it had is kept, and it goes on where it was.
    w.resume()
    a.repctl("set", "vm1", "resync_rate=256K")
    h2.drop()
    w.wait_ops(100)
    w.stop()
    h3 = HubHost(h.folder, port=h.port)
    s = wait_for(lambda: h3.session() and h3.session().resynced and h3.session(), "a resync to begin")
    check(h3.groups["vm1"].inconsistent, "an unfinished target says so")
    h3.drop()
    a.repctl("set", "vm1", "resync_rate=0")
    h4 = HubHost(h.folder, port=h.port)
    s = synced(h4, a)
    check_eq(s.decision, "partial", "the decision after an unfinished resync")
    same(a, h4, names)

    # It takes nothing over, and says so.
    a.repctl("switchover", "vm1", code=(1, 5), timeout=30)
    check_eq(a.status("vm1")["role"], "primary", "the role after a switchover that was refused")
    same(a, h4, names)

    # A graceful end: the host goes on alone, and comes back to the next one with nothing to do.
    os.close(held)
    wait_for(lambda: a.status("vm1")["dirty_bytes"] == 0, "nothing to be dirty")
    h4.goodbye()
    a.wait_status("vm1", link="DOWN")
    h5 = HubHost(h.folder, port=h.port)
    s = synced(h5, a)
    check_eq((s.decision, s.resynced, s.begun), ("equal", [], 0), "after a goodbye and no write")
    # A clean stop, asked for by the hub.
    s.stop()
    a.wait_status("vm1", state="DONE")
    wait_for(lambda: s.ended, "the session to end after a stop")
    check_eq((h5.groups["vm1"].state, s.checkpoints[-1][1] & 4, s.goodbyes), (hub.STATE_DONE, 4, [1]), "the stop")
    for x in h5.groups["vm1"].copies.values():
        check(x.read(0, x.size) == content(vols[x.name]), "the hub's copy of %s after the stop" % x.name)
    # And on again.
    e2e.pwrite(vols["vm1"], 0, b"\x77" * BLOCK, sync=True)
    a.repctl("start", "vm1")
    s = synced(h5, a)
    same(a, h5, names)
    # The host ends gracefully.
    a.stop()
    wait_for(lambda: s.ended, "the session to end with the host")
    check_eq(s.goodbyes, [0], "the host's goodbye")


def test_hashes_and_verify():
    """A copy that the hub has already is adopted at the cost of hashes and what differs; `verify` finds what was turned over on
    the hub, in its copy and in its undo layers, and mends it."""
    a = Host("a").start()
    vol = a.create("vm1", SIZE)
    rng = random.Random(8)
    e2e.pwrite(vol, 0, rng.randbytes(MIB), sync=True)
    a.repctl("set", "vm1", "checkpoint_interval=0")
    h = HubHost()
    c = Client(a)
    c.start_protect(h.address, {"vm1": 5})
    s = synced(h, a)
    settle(a, h)
    e2e.pwrite(vol, 0, rng.randbytes(100 * BLOCK), sync=True)
    same(a, h, ["vm1"])
    a.repctl("verify", "vm1", timeout=60)
    check(s.verified > 0, "the hub was not asked")
    copy = h.groups["vm1"].copies[5]
    byte = os.pread(copy.fd, 1, 70 * BLOCK + 9)
    os.pwrite(copy.fd, bytes([byte[0] ^ 1]), 70 * BLOCK + 9)
    a.repctl("verify", "vm1", code=9, timeout=60).says(str(70 * BLOCK))
    a.repctl("verify", "vm1", "--repair", "-y", code=(0, 9), timeout=60)
    a.repctl("verify", "vm1", timeout=60)
    same(a, h, ["vm1"])
    number, _, fd = next(x for x in copy.layers if x[1])
    os.pwrite(fd, bytes([os.pread(fd, 1, 500)[0] ^ 1]), 500)
    a.repctl("verify", "vm1", code=9, timeout=60).says("checkpoint %d|undo|overlay" % number)
    os.pwrite(fd, bytes([os.pread(fd, 1, 500)[0] ^ 1]), 500)
    # Protect afresh, with hashes: what the hub holds does not travel again.
    a.repctl("stop", "vm1")
    a.repctl("unprotect", "vm1")
    wait_for(lambda: h.session() is None, "the session to end")
    g = h.groups["vm1"]
    g.state, g.inconsistent, g.fresh, g.sync_from, g.lineage = hub.NONE, True, False, 0, hub.Lineage()
    e2e.pwrite(vol, 3 * REGION + 1024 * 3, b"\x55" * 512, sync=True)
    c.start_protect(h.address, {"vm1": 6}, adopt=True, hash=True)
    s = synced(h, a)
    check(s.hashed >= MIB // REGION, "%d regions were hashed" % s.hashed)
    check(("vm1", 3 * REGION, REGION) in s.resynced, "what differed did not travel: %r" % s.resynced)
    check_eq(s.moved, REGION, "the bytes that travelled besides hashes")
    same(a, h, ["vm1"])


def test_status_of_a_failed_write():
    """A write that fails at the host reaches the hub as its error, and the range is mended by the resync that follows."""
    bad = BadIo()
    a = Host("a", env=bad.env).start()
    vol = a.create("vm1", MIB)
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    a.repctl("set", "vm1", "checkpoint_interval=0", "on_io_error=pass")
    h = HubHost()
    c = Client(a)
    c.start_protect(h.address, {"vm1": 9})
    s = synced(h, a)
    bad.fail("w", "*/disk.raw")
    e2e.check_errno(5, "a write with a bad disk", e2e.pwrite, vol, 8 * BLOCK, b"\x22" * BLOCK)
    refused(hub.ERR_IO, "vm1", c.write, "vm1", 16 * BLOCK, b"\x33" * 100)
    bad.mend()
    wait_for(lambda: [x for x in s.status if x[3]], "the status of the failed write")
    check_eq(s.status[0], ("vm1", 8 * BLOCK, BLOCK, hub.ERR_IO), "what the hub was told of the first")
    a.wait_synced("vm1")
    e2e.pwrite(vol, 8 * BLOCK, b"\x44" * BLOCK, sync=True)
    same(a, h, ["vm1"])
    # With detach the guest goes on through the hub, and so does another hub; then the disk is rebuilt from the hub's copy.
    a.repctl("set", "vm1", "on_io_error=detach")
    bad.fail("w", "*/disk.raw")
    e2e.pwrite(vol, 20 * BLOCK, b"\x66" * BLOCK, sync=True)
    check(a.status("vm1")["volumes"][0]["detached"], "not detached")
    c.write("vm1", 21 * BLOCK + 100, b"hub's")
    check_eq(c.read("vm1", 21 * BLOCK - 1, 106), b"\x66" + b"\x11" * 100 + b"hub's", "a read through the other hub")
    check_eq(h.groups["vm1"].detached, {9}, "what the hub remembers")
    bad.mend()
    a.repctl("resync", "vm1", "--wait")
    check_eq(h.groups["vm1"].detached, set(), "after the rebuild")
    same(a, h, ["vm1"])


# ---- ranges --------------------------------------------------------------------------------------------------------------


def test_ranges_of_protected_and_recovery_volumes():
    p = Pair()
    (vol,) = p.protect(size=2 * MIB)
    a, b = Client(p.a), Client(p.b)
    rng = random.Random(3)
    image = bytearray(2 * MIB)
    for _ in range(25):
        off = rng.randrange(2 * MIB - 1)
        data = rng.randbytes(rng.choice([1, 7, 512, 4096, 70001]))[:2 * MIB - off]
        a.write("vm1", off, data, flush=rng.random() < 0.5)
        image[off:off + len(data)] = data
    big = rng.randbytes(MIB + MIB // 2)
    a.write("vm1", 4099, big)  # two messages
    image[4099:4099 + len(big)] = big
    check(content(vol) == bytes(image), "what the hub wrote, in the mount")
    for _ in range(15):
        off = rng.randrange(2 * MIB - 1)
        n = min(rng.choice([1, 511, 4096, 66000]), 2 * MIB - off)
        check(a.read("vm1", off, n) == bytes(image[off:off + n]), "read of %d at %d" % (n, off))
    check(a.read("vm1", 0, 2 * MIB) == bytes(image), "read of the whole")
    # The recovery volume is its view: the last checkpoint, and what is written there, which the next one drops.
    check(b.read("vm1", 0, 2 * MIB) == bytes(2 * MIB), "the view before the checkpoint")
    n = p.checkpoint()
    check(b.read("vm1", 0, 2 * MIB) == bytes(image), "the view after checkpoint %d" % n)
    b.write("vm1", 5000, b"hub" * 1000)
    check_eq(b.read("vm1", 4990, 40), bytes(image[4990:5000]) + (b"hub" * 10), "the view with its own write")
    check(content(vol) == bytes(image), "the primary does not see it")
    check(e2e.allocated(p.b.active("vm1")) > 0, "it is in the active overlay")
    p.checkpoint()
    check(b.read("vm1", 0, 2 * MIB) == bytes(image), "the next checkpoint dropped it")
    p.same()
    # A reader of the mount that goes through the page cache sees a hub's write at once.
    with open(vol, "rb", buffering=0) as f:
        check_eq(os.pread(f.fileno(), 10, 70000), bytes(image[70000:70010]), "cached read")
        a.write("vm1", 70000, b"0123456789")
        check_eq(os.pread(f.fileno(), 10, 70000), b"0123456789", "cached read after a hub's write")
    # What can't be.
    refused(hub.ERR_NOENT, "no volume nope", a.read, "nope", 0, 1)
    refused(hub.ERR_RANGE, "behind the end", a.read, "vm1", 2 * MIB, 1)
    refused(hub.ERR_RANGE, "behind the end", a.write, "vm1", 2 * MIB - 1, b"12")
    refused(hub.ERR_RANGE, "behind the end", a.write, "vm1", (1 << 46) - 4096, b"1")
    refused(hub.ERR_STATE, "primary for it already", a.start_protect, "127.0.0.1:1", {"vm1": 5})
    refused(hub.ERR_NOENT, "no volume nope", a.start_protect, "127.0.0.1:1", {"nope": 5})
    refused(hub.ERR_STATE, "secondary", b.start_protect, "127.0.0.1:1", {"vm1": 5})
    p.a.create("free", MIB)
    p.a.create("free2", MIB)
    refused(9, "not loopback", a.start_protect, "192.0.2.1:7790", {"free": 5})
    refused(hub.ERR_NOENT, "no volume free2", a.start_protect, "127.0.0.1:1", {"free": 5, "free2": 6})
    refused(19, "", a.start_protect, "127.0.0.1:%d" % e2e.free_port(), {"free": 5})
    check_eq([(v.id, v.role) for v in a.report() if v.name == "free"], [(5, "standalone")], "the id stays, nothing else")
    # Too many at once: the rest is refused, none is lost.
    tokens = [a.ask(hub.VOLUME_READ, hub.string("vm1"), offset=0, length=MIB) for _ in range(60)]
    good = bad = 0
    for t in tokens:
        try:
            check_eq(len(a.answer(t).payload), MIB, "a read among many")
            good += 1
        except hub.Refused as e:
            check_eq(e.code, 8, e.text)
            bad += 1
    check(good >= 16 and good + bad == 60, "%d answered, %d refused" % (good, bad))


def test_beside_role_changes():
    """Reads and writes while the roles change: each is answered, in time, and what was answered well is there."""
    p = Pair()
    p.protect(size=MIB, peer_timeout="2s")
    worst, failed, stop, hung = [0.0], [0], threading.Event(), []

    def hammer(host):
        c = Client(host)
        i = 0
        while not stop.is_set():
            i += 1
            t = time.monotonic()
            try:
                if i % 2:
                    c.write("vm1", i % 200 * BLOCK, struct.pack("<Q", i) * 512)
                else:
                    c.read("vm1", 0, 65536)
            except hub.Refused:
                failed[0] += 1
            except (hub.Closed, TimeoutError) as e:
                hung.append(e)
                return
            worst[0] = max(worst[0], time.monotonic() - t)

    threads = [threading.Thread(target=hammer, args=(h,), daemon=True) for h in (p.a, p.b)]
    for t in threads:
        t.start()
    p.checkpoint()
    p.a.repctl("pause", "vm1")
    p.a.repctl("resume", "vm1")
    p.a.wait_synced("vm1")
    p.b.repctl("failover", "vm1", "-y", "--to", "latest", "--discard-active", "--wait")
    p.a.wait_status("vm1", role=("secondary", "primary"), link="DOWN")
    stop.set()
    for t in threads:
        t.join(30 * e2e.SLOW)
    check(not any(t.is_alive() for t in threads) and not hung, "a request hangs: %r" % hung)
    check(worst[0] < 10 * e2e.SLOW, "the slowest took %.1f s" % worst[0])


def test_a_frozen_group_answers_in_time():
    """on_disconnect=freeze: a guest's write waits for the peer; a hub's is answered with a time-out, and goes on."""
    p = Pair()
    (vol,) = p.protect(size=MIB, on_disconnect="freeze", peer_timeout="0.5s")
    c = Client(p.a)
    c.write("vm1", 0, b"before")
    p.b.kill9()
    p.a.wait_status("vm1", link="DOWN")
    t = time.monotonic()
    refused(23, "it goes on", c.write, "vm1", 0, b"frozen")
    check(time.monotonic() - t < 5 * e2e.SLOW, "the answer took %.1f s" % (time.monotonic() - t))
    p.a.repctl("write", "vm1", "6", input="!", code=124).says("it goes on")
    check_eq(c.read("vm1", 4096, 1), b"\0", "reads go on")
    p.b.start()
    p.a.wait_synced("vm1")
    wait_for(lambda: c.read("vm1", 0, 7) == b"frozen!", "the writes to have been done")
    c.write("vm1", 0, b"after")
    p.checkpoint()
    p.same()


# ---- bad peers -----------------------------------------------------------------------------------------------------------


def ends(conn, what):
    """The host closes the connection at once, perhaps with a REFUSE: not as one from which it heard nothing for long."""
    end = time.monotonic() + 5 * e2e.SLOW
    try:
        while True:
            f = conn.recv(end - time.monotonic())
            if f.type == hub.REFUSE:
                return hub.decode_refuse(f.payload)
    except TimeoutError:  # an OSError too
        raise e2e.TestError("%s: the host does not end the connection" % what)
    except (hub.Closed, OSError):
        return None


def test_bad_hubs():
    """What breaks the protocol ends the connection, applies nothing, and leaves the rest of the host alone."""
    a = Host("a").start()
    vol = a.create("vm1", MIB)
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    good = Client(a)
    name = hub.string("vm1")

    def dial():
        host, port = a.listen.rsplit(":", 1)
        s = socket.create_connection((host, int(port)), 5)
        c = hub.Connection(s, True, os.urandom(16))
        e2e.track(s)
        return c

    def frame(c, type, payload=b"", session=None, number=None, **kw):
        data = hub.encode_frame(type, c.session if session is None else session, c.sent if number is None else number, payload, **kw)
        c.sent += 1
        return data

    def broken(what, *datas):
        c = dial()
        try:
            for d in datas:
                c.raw(d(c))
        except OSError:
            pass
        ends(c, what)
        check_eq(good.read("vm1", 0, 1), b"\x11", what + ": the next hub")

    def flipped(c):
        d = bytearray(frame(c, hub.VOLUME_WRITE, name + b"x" * BLOCK, seq=1, offset=0, length=BLOCK))
        d[-1] ^= 1
        return bytes(d)

    want = lambda c: frame(c, hub.REPORT_WANT, seq=1)
    write = lambda **kw: lambda c: frame(c, hub.VOLUME_WRITE, name + b"x" * BLOCK, **dict(dict(seq=1, offset=0, length=BLOCK), **kw))
    broken("a payload's checksum", flipped)
    broken("another session", write(session=1))
    broken("a number that was left out", write(number=5))
    broken("a number twice", want, write(number=1))
    broken("token 0", write(seq=0))
    broken("an unknown flag", write(flags=4))
    broken("a length that is not its payload's", write(length=BLOCK + 100))
    broken("a range beyond all volumes", write(offset=1 << 62))
    broken("a name that is none", lambda c: frame(c, hub.VOLUME_WRITE, b"\x03\0../" + b"x" * 512, seq=1, length=512))
    broken("an empty read", lambda c: frame(c, hub.VOLUME_READ, name, seq=1, offset=0, length=0))
    broken("a read that is too long", lambda c: frame(c, hub.VOLUME_READ, name, seq=1, offset=0, length=(1 << 20) + 1))
    broken("an answer to nothing", want, lambda c: frame(c, hub.DONE, seq=1))
    broken("data for nothing", lambda c: frame(c, hub.VOLUME_DATA, seq=1, offset=0, length=BLOCK, flags=1))
    broken("a stream's frame", want, lambda c: frame(c, hub.WRITE, b"x", seq=1, offset=0, length=1, volume=1))
    broken("a stream's frame at once", lambda c: frame(c, hub.WRITE, b"x", seq=1, offset=0, length=1, volume=1))
    broken("START_PROTECT that lies about its count", lambda c: frame(c, hub.START_PROTECT, hub.string("127.0.0.1:1") +
                                                                       struct.pack("<I", 64) + name + struct.pack("<I", 1), seq=1))
    broken("START_PROTECT with id 0", lambda c: frame(c, hub.START_PROTECT, hub.string("127.0.0.1:1") + struct.pack("<I", 1) + name +
                                                       struct.pack("<I", 0), seq=1))
    broken("a report of more than there is", want, lambda c: frame(c, hub.REPORT, struct.pack("<I", 1024), flags=1))
    broken("a report that was not asked for", lambda c: frame(c, hub.REPORT, struct.pack("<I", 0), flags=1, seq=77))
    join = hub.Join(group="vm1", uuid=bytes(16), flags=hub.J_PROTECT, role=1, state=0, lineage=hub.Lineage(), sync_from=0, ckpt_max=0,
                    last_stream=0, failover_generation=0, start=0, number=0, settings=b"\0\0", volumes=[]).encode()
    broken("JOIN after a hub's message", want, lambda c: frame(c, hub.JOIN, join))
    broken("a type that is none", lambda c: frame(c, 79, seq=1))
    check(content(vol) == b"\x11" * MIB, "nothing was applied")
    # One that does not read its answers costs itself alone.
    deaf = dial()
    for i in range(16):
        deaf.raw(frame(deaf, hub.VOLUME_READ, name, seq=i + 1, offset=0, length=MIB))
    check(good.read("vm1", 0, MIB) == b"\x11" * MIB, "the other hub is served")
    a.repctl("delete", "vm1", "-y", timeout=20)
    good.wait_report(lambda r: r == [])
    flood = b"".join(frame(deaf, hub.VOLUME_READ, name, seq=i + 17, offset=0, length=1) for i in range(300))
    try:
        deaf.raw(flood)
    except OSError:
        pass
    wait_for(lambda: "does not read the answers" in a.log_text(), "the one that only asks to be closed")
    check_eq(good.report(), [], "the other hub's report")


def test_bad_secondaries():
    """A hub that breaks the protocol as a secondary: the host says so in its status, goes on alone, and a right one is taken."""
    a = Host("a").start()
    vol = a.create("vm1", MIB)
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    a.repctl("set", "vm1", "checkpoint_interval=0")
    h = HubHost()
    bad = {}

    class Bad(hub.Session):
        def on_join(self, theirs):
            send = self.conn.send

            def with_a_strange_id(type, *payload, **fields):
                if type == hub.DIRTY_END:
                    send(hub.DIRTY, struct.pack("<QQ", 0, 4096), volume=99)
                send(type, *payload, **fields)

            if "id" in bad:
                self.conn.send = with_a_strange_id
            super().on_join(theirs)
            self.conn.send = send

        def after_barrier(self, f):
            if f.type == hub.RESYNC_BEGIN and "ready" in bad:
                self.conn.send(hub.RESYNC_ACK, seq=f.seq)  # before the sync was done
            elif f.type == hub.RESYNC_BEGIN and "number" in bad:
                self.conn.send(hub.RESYNC_READY, seq=f.seq, offset=(1 << 61) + 1)
            else:
                super().after_barrier(f)

        def ack(self):
            if "ack" in bad and self.seq:
                self.conn.send(hub.ACK, struct.pack("<QQQ", self.seq + 1000, self.seq, self.flushed))
            elif "crc" in bad and self.seq:
                d = bytearray(hub.encode_frame(hub.ACK, self.conn.session, self.conn.sent, struct.pack("<QQQ", 1, 1, 0)))
                d[60] ^= 1
                self.conn.raw(bytes(d))
                self.conn.sent += 1
            else:
                super().ack()

    h.session_class = Bad
    c = Client(a)
    c.start_protect(h.address, {"vm1": 3})
    synced(h, a)
    for what in ("id", "ack", "crc", "ready", "number"):
        bad[what] = True
        n = len(h.sessions)
        h.sessions[-1].dropped = True
        h.sessions[-1].conn.close(abruptly=True)
        e2e.pwrite(vol, 5 * BLOCK, os.urandom(BLOCK), sync=True)  # there is something to do
        wait_for(lambda: len(h.sessions) > n + 1 and h.sessions[n].over.is_set(), "the host to end the %s session and dial again" % what)
        st = a.status("vm1")
        check(st["role"] == "primary" and st["state"] == "RUNNING", "%s: %s" % (what, st))
        e2e.pwrite(vol, 6 * BLOCK, os.urandom(BLOCK), sync=True)
        bad.clear()
        h.errors.clear()
        synced(h, a)
    same(a, h, ["vm1"])
    h.errors.clear()


# ---- repctl --------------------------------------------------------------------------------------------------------------


def test_repctl_read_and_write():
    p = Pair()
    (vol,) = p.protect(size=2 * MIB)
    data = random.Random(9).randbytes(MIB + 12345)
    out = p.a.repctl("write", "vm1", "4K", json=True, input=data, text=False)
    check_eq((out["volume"], out["offset"], out["length"]), ("vm1", 4096, len(data)), "write --json")
    check(p.a.repctl("read", "vm1", "4096", len(data), text=False).out == data, "read of several pieces")
    check(content(vol)[4096:4096 + len(data)] == data, "in the mount")
    p.checkpoint()
    check(p.a.repctl("read", "vm1", "4K", len(data), "--remote", text=False).out == data, "the peer's view")
    check(p.b.repctl("read", "vm1", "4K", len(data), "--remote", text=False).out == data, "the primary's, from the secondary")
    p.b.repctl("write", "vm1", "0", "--remote", input=b"from b", text=False)
    check_eq(p.a.repctl("read", "vm1", "0", "8", text=False).out, b"from b\0\0", "a guest's write, from the other host")
    p.a.repctl("write", "vm1", "0", "--remote", input=b"view only", text=False)
    check_eq(p.b.repctl("read", "vm1", "0", "9", text=False).out, b"view only", "the view")
    check_eq(p.a.repctl("read", "vm1", "0", "9", text=False).out, b"from b\0\0\0", "and not the primary")
    p.a.repctl("write", "vm1", "0", input="", code=2).says("nothing on standard input")
    p.a.repctl("write", "vm1", "2M", input="x", code=2).says("behind the end of volume vm1")
    p.a.repctl("read", "vm1", "2097151", "2", code=2).says("read vm1: 2 bytes at 2097151 reach behind the end")
    r = p.a.repctl("read", "vm1", "0", "3M", code=2)
    check_eq(r.out, "", "nothing is printed of a range that reaches too far")
    p.a.repctl("read", "nope", "0", "1", code=4).says("no volume nope")
    p.a.repctl("read", "vm1", "x", "1", code=2).says("OFFSET")
    p.a.repctl("read", "vm1", "0", "0", code=2).says("LENGTH")
    p.a.repctl("read", "vm1", "0", "1", "--json", code=2).says("--json")
    p.b.stop()
    p.a.repctl("read", "vm1", "0", "1", "--remote", code=6).says("the peer is not connected")
    p.a.repctl("create", "alone", "--size", "1M")
    p.a.repctl("read", "alone", "0", "1", "--remote", code=5).says("standalone")


if __name__ == "__main__":
    e2e.main()
