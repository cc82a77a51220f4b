"""The wire protocol's frames (docs/protocol.md) from outside: for peers that misbehave on purpose."""

import os
import random
import socket
import struct
import threading

import repfs_e2e as e2e

HELLO, REPORT, JOIN, REFUSE, PING, PONG, GOODBYE = range(1, 8)
WRITE, ZERO, DISCARD, FLUSH, CHECKPOINT = range(16, 21)
ACK = 32
DETACH, ATTACH, READ_REQ, READ_REPLY, WRITE_FAILED = range(50, 55)
HEADER = 56
_M64 = (1 << 64) - 1

_table = []
for _i in range(256):
    _c = _i
    for _ in range(8):
        _c = (_c >> 1) ^ (0x82F63B78 if _c & 1 else 0)
    _table.append(_c)


def crc32c(data, crc=0):
    crc ^= 0xFFFFFFFF
    for b in data:
        crc = (crc >> 8) ^ _table[(crc ^ b) & 0xFF]
    return crc ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283


def _mix(z):
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _M64
    return z ^ z >> 31


def session_of(dialer_nonce, listener_nonce):
    step = 0x9E3779B97F4A7C15
    return _mix((_mix((dialer_nonce + step) & _M64) + listener_nonce) & _M64) or step


def frame(type_, payload=b"", session=0, number=0, flags=0, seq=0, offset=0, length=0, volume=0, crc=None, length_payload=None):
    head = struct.pack("<IHHQQQQIII", len(payload) if length_payload is None else length_payload, type_, flags, number, seq,
                       offset, length, volume, (crc32c(payload) if payload else 0) if crc is None else crc, 0)
    return head + struct.pack("<I", crc32c(struct.pack("<Q", session) + head)) + payload


def hello(nonce, low=2, high=2, program="impostor 1.0", magic=b"repfs\0\1\0"):
    p = program.encode()
    return magic + struct.pack("<HHI", low, high, 0) + os.urandom(16) + struct.pack("<Q", nonce) + struct.pack("<H", len(p)) + p


def read_exactly(s, n):
    out = b""
    while len(out) < n:
        part = s.recv(n - len(out))
        if not part:
            raise ConnectionError("closed after %d of %d bytes" % (len(out), n))
        out += part
    return out


def read_frame(s):
    """(type, payload, header fields)"""
    head = read_exactly(s, HEADER)
    n, type_, flags, number, seq, offset, length, volume, _, _, _ = struct.unpack("<IHHQQQQIIII", head)
    return type_, read_exactly(s, n), {"number": number, "seq": seq, "offset": offset, "length": length, "volume": volume}


def hello_nonce(payload):
    return struct.unpack_from("<Q", payload, 8 + 8 + 16)[0]


def shake_as_listener(s):
    """Answers a dialler's HELLO; the session."""
    type_, payload, _ = read_frame(s)
    e2e.check_eq(type_, HELLO, "the dialler's first frame")
    mine = random.getrandbits(63) | 1
    s.sendall(frame(HELLO, hello(mine)))
    return session_of(hello_nonce(payload), mine)


def shake_as_dialler(address):
    """(socket, session) after a right HELLO to a listening daemon."""
    host, port = address.rsplit(":", 1)
    s = socket.create_connection((host, int(port)), timeout=5)
    mine = random.getrandbits(63) | 1
    s.sendall(frame(HELLO, hello(mine)))
    type_, payload, _ = read_frame(s)
    e2e.check_eq(type_, HELLO, "the listener's first frame (2 = %r)" % payload[:80])
    return s, session_of(mine, hello_nonce(payload))


class FakePeer:
    """Listens; calls behave(socket) in a thread for each connection, which is closed after it."""

    def __init__(self, behave):
        self.behave = behave
        self.connections = 0
        self.seen = []
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(32)
        self.stopped = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()
        e2e.track(self)

    @property
    def address(self):
        return "127.0.0.1:%d" % self.listener.getsockname()[1]

    def _accept(self):
        while True:
            try:
                s, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(s,), daemon=True).start()

    def _serve(self, s):
        try:
            s.settimeout(20)
            self.behave(self, s)
        except (OSError, e2e.TestError) as e:
            self.seen.append(repr(e))
        finally:
            s.close()

    def close(self):
        self.stopped.set()
        self.listener.close()
