#!/usr/bin/env python3
"""Bad peers, dead peers, full disks (SPEC 6, 7, 9: I14, I16, I19, and the bad input of the commands)."""

import errno
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
import repfs_wire as wire  # noqa: E402
from repfs_e2e import BLOCK, KIB, MIB, Host, Pair, Tmpfs, check, check_eq, check_errno, wait_for  # noqa: E402

SIZE = 16 * MIB


# ---- peers that misbehave ----------------------------------------------------------------------------------------------


def quick_io(vol, within, what):
    """A write and a flush are answered in time."""
    t = time.monotonic()
    e2e.pwrite(vol, 0, b"q" * BLOCK, sync=True)
    dt = time.monotonic() - t
    check(dt < within * e2e.SLOW, "%s: a write and a flush took %.1f s" % (what, dt))


def test_protect_to_impostors():
    """What is dialled is no repfs, or a repfs gone mad: exit 6 (or 1) in bounded time, nothing changed here."""
    def silent(peer, s):
        peer.stopped.wait(15)

    def hangs_up(peer, s):
        pass

    def http(peer, s):
        s.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b"x" * 4000)

    def rubbish_after_hello(peer, s):
        wire.shake_as_listener(s)
        s.sendall(random.Random(1).randbytes(100000))
        peer.stopped.wait(2)

    def huge_frame(peer, s):
        session = wire.shake_as_listener(s)
        s.sendall(wire.frame(wire.WRITE, session=session, number=1, seq=1, length=1 << 30, length_payload=0xFFFFFFF0))
        peer.stopped.wait(2)

    def other_version(peer, s):
        wire.read_frame(s)
        s.sendall(wire.frame(wire.HELLO, wire.hello(77, low=200, high=201, program="repfs 99.0")))
        peer.stopped.wait(2)

    def hello_cut_short(peer, s):
        wire.read_frame(s)
        s.sendall(wire.frame(wire.HELLO, wire.hello(77))[:50])

    def flipped_bit(peer, s):
        wire.read_frame(s)
        f = bytearray(wire.frame(wire.HELLO, wire.hello(77)))
        f[70] ^= 4
        s.sendall(f)
        peer.stopped.wait(2)

    def silent_after_hello(peer, s):
        wire.shake_as_listener(s)
        peer.stopped.wait(15)

    h = Host("a").start()
    vol = h.create("vm1", MIB)
    for behave in (silent, hangs_up, http, rubbish_after_hello, huge_frame, other_version, hello_cut_short, flipped_bit, silent_after_hello):
        peer = wire.FakePeer(behave)
        t = time.monotonic()
        r = h.repctl("protect", "vm1", "--peer", peer.address, code=(1, 6), timeout=60)
        check(time.monotonic() - t < 30 * e2e.SLOW, "protect to a peer that is %s took %.0f s" % (behave.__name__, time.monotonic() - t))
        check(len(r.err.strip().splitlines()) == 1, "%s: one line of message, not %r" % (behave.__name__, r.err))
        if behave is other_version:
            r.says("version", "200|201")
        st = h.status("vm1")
        check(st["state"] != "RUNNING" and st["role"] != "primary", "%s: role %s, state %s" % (behave.__name__, st["role"], st["state"]))
        quick_io(vol, 1, behave.__name__)
        peer.close()
    # and a real one still works
    b = Host("b", folder=h.dir).start()
    h.repctl("protect", "vm1", "--peer", b.listen, "--wait")


def test_garbage_to_the_listener():
    """Whatever connects to --listen: the daemon stays, memory stays, the real peer's replication goes on."""
    p = Pair()
    (vol,) = p.protect(size=SIZE)
    log = e2e.Log({"vm1": SIZE})
    w = e2e.Writer(log, {"vm1": vol}, threads=2).start()
    w.wait_ops(50)
    rss = p.b.rss_bytes()
    rng = random.Random(2)

    def raw():
        return socket.create_connection(("127.0.0.1", p.b.port), timeout=5)

    def say(s, data):
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed already

    def expect_closed(s, what):
        s.settimeout(8 * e2e.SLOW)
        try:
            while s.recv(65536):
                pass
        except ConnectionError:
            pass
        except TimeoutError:
            raise e2e.TestError(what + ": the connection is still open")
        finally:
            s.close()

    for i in range(30):  # rubbish from the first byte
        s = raw()
        say(s, rng.randbytes(rng.choice((1, 8, 56, 100, 5000, 100000))))
        expect_closed(s, "rubbish")
    hello = wire.frame(wire.HELLO, wire.hello(99))
    for i in range(60):  # every kind of small damage to a HELLO
        f = bytearray(hello)
        f[rng.randrange(len(f))] ^= 1 << rng.randrange(8)
        s = raw()
        say(s, f)
        expect_closed(s, "a damaged hello")
    s = raw()  # half a hello, then silence
    s.sendall(hello[:30])
    expect_closed(s, "half a hello")
    for i in range(40):  # a right hello, then frames with right checksums and mad contents
        s, session = wire.shake_as_dialler("127.0.0.1:%d" % p.b.port)
        payload = rng.randbytes(rng.choice((0, 1, 24, 200, 4096)))
        say(s, wire.frame(rng.randrange(0, 45), payload, session, number=rng.choice((1, 1, 1, 7)), flags=rng.choice((0, 0, 0xFFFF)),
                          seq=rng.getrandbits(rng.choice((1, 64))), offset=rng.getrandbits(64),
                          length=rng.choice((len(payload), rng.getrandbits(64))), volume=rng.getrandbits(32),
                          length_payload=rng.choice((None, None, 0xFFFFFFFF))))
        expect_closed(s, "a mad frame")
    for i in range(10):  # a JOIN for the real group, full of noise
        s, session = wire.shake_as_dialler("127.0.0.1:%d" % p.b.port)
        name = b"vm1"
        say(s, wire.frame(wire.JOIN, struct.pack("<H", len(name)) + name + rng.randbytes(600), session, number=1))
        expect_closed(s, "a mad join")
    held = [raw() for _ in range(40)]  # more than may wait for their handshake
    w.wait_ops(30)
    for s in held:
        s.close()
    check(p.b.running(), "the daemon ended")
    check(e2e.SLOW > 1 or p.b.rss_bytes() < rss + 64 * MIB, "the daemon grew from %d to %d MiB" % (rss / MIB, p.b.rss_bytes() / MIB))
    p.a.wait_synced("vm1")
    w.stop()
    p.checkpoint()
    p.same()


def test_damage_on_the_wire():
    """I14: a flipped bit, a lost or doubled chunk costs a reconnect, never wrong data."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=SIZE)
    log = e2e.Log({"vm1": SIZE})
    w = e2e.Writer(log, {"vm1": vol}, threads=3).start()
    rng = random.Random(3)
    state = {"left": 0}

    def mangle(from_client, data):
        if state["left"] <= 0 or rng.random() < 0.7:
            return data
        state["left"] -= 1
        kind = rng.randrange(3)
        if kind == 0:
            out = bytearray(data)
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            return bytes(out)
        cut = rng.randrange(len(data) + 1)
        return data[:cut] if kind == 1 else data + data[cut:]

    p.proxy.mangle = mangle
    for i in range(5):
        before = p.a.status("vm1")["counters"]["reconnects"]
        state["left"] = 1
        wait_for(lambda: state["left"] == 0, "damage to be done")
        wait_for(lambda: w.errors or p.a.status("vm1")["counters"]["reconnects"] > before, "the damage to be noticed", 20)
        p.a.wait_synced("vm1")
        w.wait_ops(20)
        w.pause()
        n = p.checkpoint()
        p.same()
        e2e.check_same(vol, p.b.checkpoint_file("vm1", n), "primary and checkpoint")
        w.resume()
    w.stop()


def test_ctl_socket_abuse():
    h = Host("a").start()
    h.create("vm1", MIB)
    path = os.path.join(h.store, "control.sock")
    rng = random.Random(4)
    for data in (b"", b"\n", b"{}\n", b"[]\n", b"nonsense\n", b'{"verb":7}\n', b'{"verb":"status","args":[]}\n', b'{"verb":"create","args":{}}\n',
                 b'{"verb":"create","args":{"name":"x","size":-1}}\n', b'{"verb":"create","args":{"name":"../x","size":512}}\n',
                 b'{"verb":"create","args":{"name":"x","size":1e30}}\n', b'{"verb":"status","args":{"name":null}}\n', b"\xff\xfe\n",
                 b'{"verb":"' + b"x" * 100000 + b'"}\n', b"[" * 50000 + b"\n", b"x" * (1200 * KIB), rng.randbytes(5000) + b"\n"):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(10)
            s.connect(path)
            try:
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                while s.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass
        h.ctl("ping")
    check_eq([v["name"] for v in h.ctl("list")["volumes"]], ["vm1"], "volumes")
    idle = []
    for _ in range(30):
        s = socket.socket(socket.AF_UNIX)
        s.connect(path)
        idle.append(s)
    h.repctl("status", timeout=60)
    for s in idle:
        s.close()


# ---- a dead or stalled peer never hangs the guest ------------------------------------------------------------------------


def test_stalled_peer():
    """The peer is there and silent: under A nothing waits; under B, C, F at most peer_timeout, then on alone."""
    for proto in "ABCF":
        p = Pair(proxy=True)
        (vol,) = p.protect(size=MIB, protocol=proto, peer_timeout="1.5s")
        e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
        p.checkpoint()
        if proto in "AF":
            p.a.repctl("set", "vm1", "peer_timeout=10m")
        p.proxy.stall()
        t = time.monotonic()
        e2e.pwrite(vol, 0, b"\x22" * BLOCK)  # under A and F it would wait for ever
        if proto == "A":
            e2e.fsync(vol)
        set_back = threading.Thread(target=p.a.repctl, args=("set", "vm1", "peer_timeout=1.5s"))
        set_back.start()
        e2e.fsync(vol)
        both = time.monotonic() - t
        check(both < 20 * e2e.SLOW, "protocol %s: a write and a flush took %.2f s with a stalled peer" % (proto, both))
        p.a.wait_status("vm1", 60, link=("DOWN", "HANDSHAKE"), health="degraded")
        quick_io(vol, 20, "alone")
        set_back.join(60)
        p.proxy.unstall()
        p.a.wait_synced("vm1")
        p.checkpoint()
        p.same()


def test_dead_peer():
    for proto in "ABCF":
        p = Pair()
        (vol,) = p.protect(size=MIB, protocol=proto, peer_timeout="10m")
        p.b.kill9()  # its kernel says so at once
        quick_io(vol, 30, "protocol %s, peer killed" % proto)
        # a stopped process: TCP goes on, the peer does not
        p.b.start()
        p.a.wait_synced("vm1")
        p.a.repctl("set", "vm1", "peer_timeout=1.5s")
        os.kill(p.b.pid(), 19)
        try:
            quick_io(vol, 20, "protocol %s, peer stopped" % proto)
        finally:
            os.kill(p.b.pid(), 18)
        p.a.wait_synced("vm1")
        p.checkpoint()
        p.same()


def test_stalled_peer_under_load_and_shutdown():
    """Many waiting writes all come back; a SIGTERM ends in time whatever the peer does."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=SIZE, protocol="C", peer_timeout="2s")
    log = e2e.Log({"vm1": SIZE})
    w = e2e.Writer(log, {"vm1": vol}, threads=16).start()
    w.wait_ops(100)
    p.proxy.stall()
    wait_for(lambda: p.a.status("vm1")["link"] != "SYNCED", "the primary to notice", 60)
    w.wait_ops(100)
    check(w.slowest_write < 20 * e2e.SLOW, "a write took %.1f s" % w.slowest_write)
    p.proxy.unstall()
    p.a.wait_synced("vm1")
    w.wait_ops(50)
    p.proxy.stall()
    t = time.monotonic()
    p.a.expect_dead = True
    p.a.proc.terminate()
    p.a.wait_exit(0, 60)
    check(time.monotonic() - t < 20 * e2e.SLOW, "SIGTERM with a stalled peer took %.1f s" % (time.monotonic() - t))
    w.stop(errors_ok=True)
    p.proxy.unstall()
    done = time.monotonic_ns()
    p.a.start()
    p.a.wait_synced("vm1")
    p.checkpoint()
    p.same()
    log.verify({"vm1": p.a.volume("vm1")}, required=log.completed_before(done))


def test_congestion():
    """A slow link: `block` delays writes, memory stays bounded."""
    p = Pair(proxy=True)
    (vol,) = p.protect(size=64 * MIB, protocol="A", queue_max="4M", peer_timeout="30s")
    rss = p.a.rss_bytes()
    p.proxy.stall()
    done = threading.Event()

    def writer():
        for i in range(160):
            e2e.pwrite(vol, i % 60 * MIB, bytes([i + 1]) * MIB)
        done.set()

    t = threading.Thread(target=writer)
    t.start()
    # The proxy itself takes some 64 MiB, the sockets a few more.
    check(not done.wait(3), "160 MiB went into a queue of 4 MiB")
    check(e2e.SLOW > 1 or p.a.rss_bytes() < rss + 64 * MIB, "the primary grew by %d MiB" % ((p.a.rss_bytes() - rss) / MIB))
    p.proxy.unstall()
    check(done.wait(60), "writes do not go on")
    t.join()
    e2e.fsync(vol)
    p.checkpoint()
    p.same()


# ---- full disks ----------------------------------------------------------------------------------------------------------


def test_full_secondary():
    """No room to save old blocks: applying stops, the last checkpoint stays good, the primary goes on and tracks."""
    disk = Tmpfs(40 * MIB)
    d = e2e.tmp()
    a = Host("a", folder=d).start()
    b = Host("b", folder=d, store=os.path.join(disk.path, "s")).start()
    vol = a.create("vm1", SIZE)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0")
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    n = int(a.repctl("checkpoint", "vm1").out)
    ballast = disk.fill(leave=2 * MIB)
    t = time.monotonic()
    e2e.pwrite(vol, 0, b"\x22" * SIZE, sync=True)
    check(time.monotonic() - t < 60 * e2e.SLOW, "writes of the primary took %.1f s" % (time.monotonic() - t))
    a.wait_status("vm1", 60, health="degraded", link=("RESYNC", "DOWN", "HANDSHAKE"))
    a.repctl("error", "vm1", code=7).says("space|NOSPC")
    check(a.status("vm1")["reasons"], "no reason given")
    e2e.check_bytes(vol, 0, SIZE, 0x22, "the primary")
    quick_io(vol, 2, "the primary of a full secondary")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the view of a full secondary")
    e2e.check_bytes(b.checkpoint_file("vm1", n), 0, SIZE, 0x11, "the checkpoint of a full secondary")
    check_eq(b.status("vm1")["checkpoint_valid"], True, "checkpoint_valid")
    b.kill9()
    b.start()
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the view after kill -9")
    os.unlink(ballast)
    a.wait_synced("vm1", 40)
    wait_for(lambda: a.repctl("checkpoint", "vm1", code=None).code == 0, "a checkpoint once there is room", 20)
    e2e.check_same(a.disk("vm1"), b.disk("vm1"), "both disks")
    e2e.check_same(vol, b.volume("vm1"), "primary and view")
    a.repctl("error", "vm1")


def test_full_secondary_fails_over():
    disk = Tmpfs(40 * MIB)
    d = e2e.tmp()
    a = Host("a", folder=d).start()
    b = Host("b", folder=d, store=os.path.join(disk.path, "s")).start()
    vol = a.create("vm1", SIZE)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0")
    e2e.pwrite(vol, 0, b"\x11" * SIZE, sync=True)
    n = int(a.repctl("checkpoint", "vm1").out)
    disk.fill(leave=3 * MIB)
    e2e.pwrite(vol, 0, b"\x22" * SIZE, sync=True)
    a.kill9()
    doc = b.repctl("-y", "failover", "vm1", json=True)
    check_eq(doc["checkpoint"], n, "failover of a full secondary")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the survivor")
    # Room for history never holds up the way back: it ends, or it fails, is said, and the retry after making room ends it.
    st = b.wait_status("vm1", 60, state=("DONE", "FAILOVER_FAILED"))
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the survivor")
    if st["state"] == "FAILOVER_FAILED":
        b.repctl("error", "vm1", code=7)
        os.unlink(os.path.join(disk.path, "ballast"))
        b.repctl("-y", "failover", "vm1", "--wait")
    e2e.check_bytes(b.volume("vm1"), 0, SIZE, 0x11, "the survivor after the commit")
    check_eq(b.status("vm1")["state"], "DONE", "state")


def test_failed_commit_serves_and_retries():
    """FAILOVER_FAILED: reads and writes as before, the retry writes it all."""
    disk = Tmpfs(60 * MIB)
    d = e2e.tmp()
    a = Host("a", folder=d).start()
    b = Host("b", folder=d, store=os.path.join(disk.path, "s")).start()
    vol = a.create("vm1", SIZE)
    a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
    a.repctl("set", "vm1", "checkpoint_interval=0")
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)  # the rest are holes
    a.repctl("checkpoint", "vm1")
    own = os.urandom(12 * MIB)
    e2e.pwrite(b.volume("vm1"), 4 * MIB, own, sync=True)
    ballast = disk.fill(leave=4 * MIB)  # active goes to holes of the disk: not enough room
    b.repctl("-y", "failover", "vm1")
    b.wait_status("vm1", 60, state="FAILOVER_FAILED", health="degraded")
    r = b.repctl("error", "vm1", code=7)
    r.says("space|NOSPC")
    view = b.volume("vm1")
    check(e2e.pread(view, 4 * MIB, 12 * MIB) == own, "the view in FAILOVER_FAILED")
    e2e.pwrite(view, 4 * MIB, b"\x77" * BLOCK, sync=True)
    e2e.check_bytes(view, 4 * MIB, BLOCK, 0x77, "a write in FAILOVER_FAILED")
    e2e.check_bytes(view, 0, MIB, 0x11, "the rest of the view")
    b.kill9()
    b.start()
    check(b.status("vm1")["state"] in ("FAILOVER", "FAILOVER_FAILED"), "state after a restart: %s" % b.status("vm1")["state"])
    e2e.check_bytes(view, 4 * MIB, BLOCK, 0x77, "the write after a restart")
    os.unlink(ballast)
    b.repctl("-y", "failover", "vm1", "--wait", timeout=60)
    check_eq(b.status("vm1")["state"], "DONE", "state after the retry")
    e2e.check_bytes(b.disk("vm1"), 4 * MIB, BLOCK, 0x77, "the write on the disk")
    check(e2e.pread(b.disk("vm1"), 4 * MIB + BLOCK, 12 * MIB - BLOCK) == own[BLOCK:], "the own data on the disk")
    e2e.check_bytes(view, 0, MIB, 0x11, "the rest")
    check_eq(b.status("vm1")["error"], None, "the error after the retry")


def test_full_primary():
    """ENOSPC on the primary's own store: nothing that was answered is lost, on either host."""
    for pol in ("pass", "detach"):
        disk = Tmpfs(12 * MIB)
        d = e2e.tmp()
        a = Host("a", folder=d, store=os.path.join(disk.path, "s")).start()
        b = Host("b", folder=d).start()
        vol = a.create("vm1", SIZE)
        a.repctl("set", "vm1", "on_io_error=" + pol)
        a.repctl("protect", "vm1", "--peer", b.listen, "--wait")
        a.repctl("set", "vm1", "checkpoint_interval=0")
        image = bytearray(SIZE)
        fd = os.open(vol, os.O_RDWR | os.O_DIRECT)
        failed = []
        for i in range(64):  # 16 MiB of data into 12 MiB
            data = random.Random(i).randbytes(256 * KIB)
            e = e2e.errno_of(os.pwrite, fd, memoryview(e2e.aligned(data)), i * 256 * KIB)
            if e:
                failed.append((i, e))
            else:
                image[i * 256 * KIB:(i + 1) * 256 * KIB] = data
        if pol == "pass":
            check(failed and all(e in (errno.ENOSPC, errno.EIO) for _, e in failed), "writes to a full disk: %r" % failed)
            check("a local write to vm1 failed" in a.log_text(), "the log does not say so", a.log_tail)
            a.wait_status("vm1", 60, link="SYNCED", error=None)  # what the disk holds of those ranges was read and sent
        else:
            check(all(e in (errno.ENOSPC, errno.EIO) for _, e in failed), "writes to a full disk: %r" % failed)
        bad = {i for i, _ in failed}
        for i in range(64):
            if i not in bad:
                got = e2e.pread(vol, i * 256 * KIB, 256 * KIB)
                check(got == bytes(image[i * 256 * KIB:(i + 1) * 256 * KIB]), "%s: an answered write is lost at %d" % (pol, i))
        os.close(fd)
        b.repctl("-y", "failover", "vm1", "--to", "latest", "--wait", code=None)
        for i in range(64):
            if i not in bad:
                got = e2e.pread(b.volume("vm1"), i * 256 * KIB, 256 * KIB)
                check(got == bytes(image[i * 256 * KIB:(i + 1) * 256 * KIB]), "%s: an answered write is lost on the peer at %d" % (pol, i))
        e2e.close_or_fail()


def test_full_store_refuses_new_volumes():
    disk = Tmpfs(4 * MIB)
    h = Host("a", store=os.path.join(disk.path, "s")).start()
    vol = h.create("vm1", MIB)
    disk.fill()
    h.repctl("create", "vm2", "--size", "1M", code=1).says("space")
    check_eq([v["name"] for v in h.ctl("list")["volumes"]], ["vm1"], "volumes")
    check_errno(errno.ENOSPC, "a write to a full store", e2e.pwrite, vol, 0, b"x" * BLOCK)
    src = os.path.join(e2e.tmp(), "src")
    with open(src, "wb") as f:
        f.write(os.urandom(MIB))
    h.repctl("import", "vm3", src, code=1).says("space")
    os.unlink(os.path.join(disk.path, "ballast"))
    e2e.pwrite(vol, 0, b"x" * BLOCK, sync=True)
    h.repctl("import", "vm3", src)
    e2e.check_same(src, h.volume("vm3"), "imported once there was room")
    h.restart()
    check_eq(sorted(v["name"] for v in h.ctl("list")["volumes"]), ["vm1", "vm3"], "volumes")


# ---- a bad disk --------------------------------------------------------------------------------------------------------


def test_flipped_bit_in_an_overlay():
    """Every block of an undo overlay carries a checksum, checked whenever it is read."""
    p = Pair()
    (vol,) = p.protect(size=MIB)
    e2e.pwrite(vol, 0, b"\x11" * MIB, sync=True)
    n = p.checkpoint()
    e2e.pwrite(vol, 0, b"\x22" * MIB, sync=True)
    p.b.stop()
    folder = os.path.dirname(p.b.disk("vm1"))
    data = [f for f in os.listdir(folder) if f.startswith("undo-%d." % n) and f.endswith("data")]
    check_eq(len(data), 1, "data file of undo overlay %d in %r" % (n, os.listdir(folder)))
    with open(os.path.join(folder, data[0]), "r+b") as f:
        f.seek(10 * BLOCK + 77)
        f.write(b"\x13")
    p.b.start()
    # of that checkpoint: the view moves on with the one that ends the reconnect
    view = p.b.checkpoint_file("vm1", n)
    e2e.check_bytes(view, 0, 10 * BLOCK, 0x11, "blocks that are whole")
    check_errno(errno.EIO, "a block that does not check out", e2e.pread, view, 10 * BLOCK, BLOCK)
    e2e.check_bytes(view, 11 * BLOCK, BLOCK, 0x11, "the block behind it")
    p.b.stop()
    p.b.repctl("check", code=(1, 9)).says("vm1")


if __name__ == "__main__":
    e2e.main()
