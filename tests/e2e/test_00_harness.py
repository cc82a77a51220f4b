#!/usr/bin/env python3
"""The harness itself: what the other tests rely on must be able to fail. Needs no repfs."""

import hashlib
import os
import socket
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
import repfs_wire as wire  # noqa: E402
from repfs_e2e import BLOCK, MIB, check, check_eq, wait_for  # noqa: E402

WAIT = 60


def file_of(size, name="f"):
    path = os.path.join(e2e.tmp(), name)
    with open(path, "wb") as f:
        f.truncate(size)
    return path


def must_fail(what, fn, *args, **kw):
    try:
        fn(*args, **kw)
    except e2e.TestError:
        return
    raise e2e.TestError(what + " was not noticed")


def apply(log, path, w):
    with open(path, "r+b") as f:
        f.seek(w.unit * log.unit)
        f.write(log.content(w))


def test_log_accepts_and_refuses():
    log = e2e.Log({"v": MIB})
    path = file_of(MIB)
    images = {"v": path}
    w1 = log.begin("v", 3, 2)
    log.end(w1)
    f = log.begin_flush()
    log.end(f)
    w2 = log.begin("v", 4, 1)
    log.end(w2)
    w3 = log.begin("v", 9, 1)
    log.end(w3)
    middle = time.monotonic_ns()
    w4 = log.begin("v", 9, 1)  # never answered
    now = time.monotonic_ns()

    log.verify(images, prefix="stream")
    must_fail("a missing write", log.verify, images, required=log.completed_before(now))
    must_fail("a missing flushed write", log.verify, images, required=log.flushed_before(now))
    apply(log, path, w1)
    log.verify(images, required=log.flushed_before(now), prefix="stream")
    apply(log, path, w3)
    must_fail("a gap in the stream", log.verify, images, prefix="stream")
    log.verify(images, prefix="barrier")
    apply(log, path, w2)
    log.verify(images, required=log.completed_before(now), prefix="stream")
    apply(log, path, w4)
    log.verify(images, required=log.completed_before(now), prefix="stream")
    must_fail("a write from later", log.verify, images, newest=middle)
    apply(log, path, w1)
    must_fail("an old write over a new one", log.verify, images, required=log.completed_before(now))
    apply(log, path, w2)
    with open(path, "r+b") as f:
        f.seek(9 * BLOCK + 700)
        f.write(b"\xee")
    must_fail("a torn block", log.verify, images)
    with open(path, "r+b") as f:
        f.seek(9 * BLOCK)
        f.write(e2e.pattern(1, 8, w4.id, BLOCK))
    must_fail("a block at another's place", log.verify, images)


def test_log_zeroes():
    log = e2e.Log({"v": MIB})
    path = file_of(MIB)
    w1 = log.begin("v", 0, 1)
    log.end(w1)
    z = log.begin("v", 0, 1, zero=True)
    log.end(z)
    log.verify({"v": path}, required=lambda w: w.ok)
    apply(log, path, w1)
    must_fail("a lost discard", log.verify, {"v": path}, required=lambda w: w.ok)
    w2 = log.begin("v", 0, 1)
    log.end(w2)
    apply(log, path, z)
    must_fail("a write undone by zeroes", log.verify, {"v": path}, required=lambda w: w.ok)


def test_writer_on_a_file():
    for unit, overlap in ((BLOCK, False), (512, True)):
        log = e2e.Log({"v": 4 * MIB}, unit=unit)
        path = file_of(4 * MIB, "w%d" % unit)
        w = e2e.Writer(log, {"v": path}, overlap=overlap, direct=unit == BLOCK).start()
        w.wait_ops(300)
        w.pause()
        t = time.monotonic_ns()
        log.verify({"v": path}, required=log.completed_before(t), newest=t, prefix="stream")
        w.resume()
        w.wait_ops(50)
        w.stop()
        found = log.verify({"v": path}, required=log.completed_before(time.monotonic_ns()))
        check(sum(x is not None for x in found["v"].values()) > 50, "the writer wrote next to nothing")
        check(any(f.ok for f in log.flushes), "the writer never flushed")


def test_same_and_extents():
    a, b = file_of(4 * MIB, "a"), file_of(4 * MIB, "b")
    e2e.pwrite(a, MIB, b"x" * 8192)
    e2e.pwrite(b, MIB, b"x" * 8192)
    e2e.check_same(a, b, "equal files")
    check_eq(e2e.data_extents(a), [(MIB, 8192)], "extents")
    e2e.pwrite(b, MIB + 8192, b"y" * 512, direct=False)
    must_fail("a difference", e2e.check_same, a, b, "files")
    must_fail("a difference", e2e.check_bytes, b, MIB, 9000, ord("x"), "bytes", direct=False)
    e2e.punch(a, MIB, 8192)
    check_eq(e2e.data_extents(a), [], "extents of a punched file")


class Echo:
    """Counts what it receives and sends it back."""

    def __init__(self):
        self.got = 0
        self.ended = threading.Event()
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(8)
        threading.Thread(target=self._run, daemon=True).start()
        e2e.track(self)

    def _run(self):
        while True:
            try:
                s, _ = self.listener.accept()
                with s:
                    while True:
                        data = s.recv(65536)
                        if not data:
                            break
                        self.got += len(data)
                        s.sendall(data)
            except OSError:
                pass
            self.ended.set()
            if self.listener.fileno() < 0:
                return

    def close(self):
        self.listener.close()


def connect(proxy):
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=WAIT)


def test_proxy():
    echo = Echo()
    proxy = e2e.Proxy(echo.listener.getsockname())
    s = connect(proxy)
    s.sendall(b"hello")
    check_eq(wire.read_exactly(s, 5), b"hello", "through the proxy")

    proxy.stall()
    s.sendall(b"wait")
    s.settimeout(0.3)
    try:
        s.recv(4)
        raise e2e.TestError("something came through a stalled proxy")
    except TimeoutError:
        pass
    check_eq(echo.got, 5, "bytes that arrived while stalled")
    proxy.unstall()
    s.settimeout(WAIT)
    check_eq(wire.read_exactly(s, 4), b"wait", "after the stall")

    proxy.delay = 0.2
    t = time.monotonic()
    s.sendall(b"slow")
    wire.read_exactly(s, 4)
    check(time.monotonic() - t >= 0.39, "the delay is not there")
    proxy.delay = 10 * WAIT
    got = echo.got
    s.sendall(b"never arrives")
    wait_for(lambda: any(p.queue for c in proxy.conns for p in c.pipes), "the proxy to hold it", WAIT)
    proxy.lose()
    check(e2e.errno_of(s.recv, 1) in (104, 32), "the connection was not reset")
    check(e2e.errno_of(connect, proxy) != 0, "a lost host takes connections")
    wait_for(echo.ended.is_set, "the far side to notice", WAIT)
    check_eq(echo.got, got, "what was under way got lost")
    proxy.delay = 0.0
    proxy.up()
    s = connect(proxy)
    s.sendall(b"again")
    check_eq(wire.read_exactly(s, 5), b"again", "after the loss")
    proxy.cut()
    wait_for(lambda: e2e.errno_of(s.sendall, b"x") != 0, "the cut to reach the client", WAIT)


def test_proxy_cuts_all_that_it_has_forwarded():
    echo = Echo()
    proxy = e2e.Proxy(echo.listener.getsockname())
    for _ in range(300):
        with connect(proxy) as s:
            s.sendall(b"?")
            wire.read_exactly(s, 1)
            proxy.cut()
            check_eq(e2e.errno_of(s.recv, 1), 104, "after a cut")


def test_proxy_carries_much_both_ways():
    """More than sockets hold, so that neither direction may wait for the other."""
    echo = Echo()
    proxy = e2e.Proxy(echo.listener.getsockname())
    s = connect(proxy)
    size = 64 * MIB
    data = os.urandom(MIB)
    want, got = hashlib.sha256(), hashlib.sha256()

    def reader():
        left = size
        while left:
            part = s.recv(min(left, MIB))
            if not part:
                return
            got.update(part)
            left -= len(part)

    r = threading.Thread(target=reader, daemon=True)
    r.start()
    for _ in range(size // MIB):
        want.update(data)
        s.sendall(data)
    r.join(WAIT)
    check_eq(got.hexdigest(), want.hexdigest(), "what came back")


if __name__ == "__main__":
    e2e.main()
