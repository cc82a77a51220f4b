"""A replication hub: a second implementation of the wire protocol, written from docs/protocol.md alone.

Only the standard library, and nothing of this project. What a name here means is said there. Two parts:

  HostClient  dials a host without a group (host-wide): reports, START_PROTECT, reads and writes of ranges.
  Hub         listens, and is the secondary of every group that a host protects to it: it applies the stream to files of
              its own, keeps checkpoints as undo layers, and goes on where it was after it ended anyhow.

The hub applies every frame in the order in which it comes, so it is always ready for the next barrier. Its files are
NAME.img (the secondary disk), NAME.N.undo (what blocks held when checkpoint N's epoch began to change them), and
GROUP.json, the record that decides. It fsyncs where the protocol says durable.
"""

import base64
import collections
import functools
import json
import os
import secrets
import select
import socket
import struct
import threading
import time

# ---- CRC-32C -----------------------------------------------------------------------------------------------------------

_CRC = []
for _n in range(256):
    for _ in range(8):
        _n = _n >> 1 ^ (0x82F63B78 if _n & 1 else 0)
    _CRC.append(_n)


def _crc_bytes(state, data):
    for b in data:
        state = state >> 8 ^ _CRC[(state ^ b) & 255]
    return state


# A loop over bytes is slow. A CRC is linear, so a long text is cut into equal lanes, and one step takes the next byte of
# all of them: the lanes' states are four strings, the table's lookup is bytes.translate. Then the lanes are put together:
# a state goes over a lane's length as if over zeroes.
_PLANES = [bytes(v >> 8 * k & 255 for v in _CRC) for k in range(4)]
_LANE = 64


def _over(tables, x):
    return tables[0][x & 255] ^ tables[1][x >> 8 & 255] ^ tables[2][x >> 16 & 255] ^ tables[3][x >> 24]


_SHIFT = [[_crc_bytes(b << 8 * k, b"\0") for b in range(256)] for k in range(4)]
for _ in range(_LANE.bit_length() - 1):
    _SHIFT = [[_over(_SHIFT, v) for v in t] for t in _SHIFT]


def crc32c(data, crc=0):
    state = crc ^ 0xFFFFFFFF
    lanes = len(data) // _LANE
    if lanes < 8:
        return _crc_bytes(state, data) ^ 0xFFFFFFFF
    whole = lanes * _LANE
    text = int.from_bytes
    b0 = b1 = b2 = b3 = 0
    for i in range(_LANE):
        at = (b0 ^ text(data[i:whole:_LANE], "little")).to_bytes(lanes, "little")
        t0, t1, t2, t3 = (text(at.translate(p), "little") for p in _PLANES)
        b0, b1, b2, b3 = b1 ^ t0, b2 ^ t1, b3 ^ t2, t3
    for lane in zip(*(b.to_bytes(lanes, "little") for b in (b0, b1, b2, b3))):
        state = _over(_SHIFT, state) ^ int.from_bytes(bytes(lane), "little")
    return _crc_bytes(state, data[whole:]) ^ 0xFFFFFFFF


assert all(crc32c(bytes(range(256)) * 9 + b"x" * n) == _crc_bytes(0xFFFFFFFF, bytes(range(256)) * 9 + b"x" * n) ^ 0xFFFFFFFF
           for n in (0, 1, 63))
assert crc32c(b"123456789") == 0xE3069283

# ---- XXH3-128 ------------------------------------------------------------------------------------------------------------

_M64 = (1 << 64) - 1
_P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_P64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6"
    "813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931"
    "c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f"
    "95160428afd7fbcabb4b407e")


@functools.lru_cache(maxsize=64)
def _secret(seed):
    """The default secret under a seed: as bytes, and as 64-bit words from each multiple of 8."""
    words = struct.unpack("<24Q", _SECRET)
    raw = struct.pack("<24Q", *((w - seed if i & 1 else w + seed) & _M64 for i, w in enumerate(words)))
    return raw, [struct.unpack_from("<8Q", raw, 8 * i) for i in range(17)]


def _accumulate(acc, words, key):
    for i in range(8):
        v = words[i]
        acc[i ^ 1] += v
        k = v ^ key[i]
        acc[i] += (k & 0xFFFFFFFF) * (k >> 32)


def _merge(acc, raw, at, start):
    for i in range(4):
        a, b = struct.unpack_from("<QQ", raw, at + 16 * i)
        p = (acc[2 * i] ^ a) * (acc[2 * i + 1] ^ b)
        start += (p & _M64) ^ p >> 64
    h = start & _M64
    h = (h ^ h >> 37) * 0x165667919E3779F9 & _M64
    return h ^ h >> 32


@functools.lru_cache(maxsize=4096)
def xxh3_128(data, seed):
    """Of more than 240 bytes (a volume's pieces are at least 512), in canonical form."""
    n = len(data)
    assert n > 240
    raw, keys = _secret(seed)
    acc = [_P32[2], *_P64[:4], _P32[1], _P64[4], _P32[0]]
    stripes = struct.iter_unpack("<8Q", data[:(n - 1) // 64 * 64])
    for i, words in enumerate(stripes):
        _accumulate(acc, words, keys[i % 16])
        if i % 16 == 15:  # a block of 16 stripes
            for k in range(8):
                a = acc[k] & _M64
                acc[k] = (a ^ a >> 47 ^ keys[16][k]) * _P32[0] & _M64
        else:
            acc = [a & _M64 for a in acc]
    _accumulate(acc, struct.unpack("<8Q", data[-64:]), struct.unpack_from("<8Q", raw, 192 - 64 - 7))
    acc = [a & _M64 for a in acc]
    low = _merge(acc, raw, 11, n * _P64[0] & _M64)
    high = _merge(acc, raw, 192 - 64 - 11, ~(n * _P64[1]) & _M64)
    return struct.pack(">QQ", high, low)


# ---- frames ------------------------------------------------------------------------------------------------------------

HELLO, REPORT, JOIN, REFUSE, PING, PONG, GOODBYE = 1, 2, 3, 4, 5, 6, 7
WRITE, ZERO, DISCARD, FLUSH, CHECKPOINT, RESYNC_WRITE, RESYNC_ZERO, RESYNC_DONE = range(16, 24)
DIRTY, DIRTY_END, RESYNC_BEGIN, RESYNC_READY = 24, 25, 26, 27
ACK, CHECKPOINT_ACK, RESYNC_ACK, IO_ERROR, CHECKPOINT_WANT, SETTINGS, SETTINGS_ACK, STOP_WANT = range(32, 40)
BEHIND, HASH, HASH_ANSWER = 44, 45, 46
DETACH, ATTACH, READ_REQ, READ_REPLY, WRITE_FAILED, HISTORY_LOST, TAKE_OVER, TOOK_OVER = 50, 51, 52, 53, 54, 56, 57, 58
VERIFY, VERIFY_ANSWER, SCRUB, SCRUBBED = range(60, 64)
REPORT_WANT, START_PROTECT, VOLUME_READ, VOLUME_WRITE, VOLUME_DATA, DONE = range(70, 76)

NAMES = {v: k for k, v in list(globals().items()) if k.isupper() and isinstance(v, int) and 0 < v < 76 and k != "_"}
SEQUENCED = {WRITE, ZERO, DISCARD, FLUSH, CHECKPOINT, RESYNC_BEGIN, RESYNC_WRITE, RESYNC_ZERO, HASH, RESYNC_DONE, DETACH, ATTACH, VERIFY}
TOKENED = {SCRUB, SCRUBBED, READ_REQ, READ_REPLY, REPORT_WANT, START_PROTECT, VOLUME_READ, VOLUME_WRITE, VOLUME_DATA, DONE}
FLAGS = {REPORT: 1, CHECKPOINT: 15, READ_REPLY: 3, VERIFY: 1, SCRUBBED: 1,
         START_PROTECT: 3, VOLUME_WRITE: 1, VOLUME_DATA: 3, DONE: 1}
SPAN_MAX = 1 << 30
PAYLOAD_MAX = 2 << 20
RANGE_MAX = 1 << 20
VOLUME_MAX = 1 << 46
# type: (least, most) bytes of payload; who is not here has none
PAYLOADS = {HELLO: (1, 4096), REPORT: (4, 163844), JOIN: (1, 32768), REFUSE: (4, 483), WRITE: (1, PAYLOAD_MAX),
            RESYNC_WRITE: (1, PAYLOAD_MAX), RESYNC_DONE: (144, 144), DIRTY: (0, PAYLOAD_MAX), ACK: (24, 24),
            IO_ERROR: (4, 483), SETTINGS: (2, 4096), HASH: (24, 1032), DETACH: (144, 144), READ_REPLY: (0, PAYLOAD_MAX),
            WRITE_FAILED: (4, 483), HISTORY_LOST: (4, 483), VERIFY: (0, 2056), VERIFY_ANSWER: (0, 3072),
            SCRUBBED: (32, 2080), START_PROTECT: (16, 4693), VOLUME_READ: (3, 65),
            VOLUME_WRITE: (3, RANGE_MAX + 65), VOLUME_DATA: (0, RANGE_MAX), DONE: (0, 483)}

ERR_IO, ERR_VERSION, ERR_PROTO, ERR_NOTSUP, ERR_RANGE, ERR_NOENT, ERR_STATE = 2, 6, 11, 13, 15, 17, 18
VERSION = 2
MAGIC = b"repfs\0\1\0"


class ProtocolError(Exception):
    """The other side broke the protocol."""


class Refused(Exception):
    """The other side said no."""

    def __init__(self, code, text):
        super().__init__("%d: %s" % (code, text))
        self.code, self.text = code, text


class Closed(Exception):
    """The connection has ended."""


Frame = collections.namedtuple("Frame", "type flags number seq offset length volume payload")


def mix(z):
    m = (1 << 64) - 1
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & m
    z = (z ^ z >> 27) * 0x94D049BB133111EB & m
    return z ^ z >> 31


def session_seed(dialer, listener):
    m = (1 << 64) - 1
    return mix(mix(dialer + 0x9E3779B97F4A7C15 & m) + listener & m) or 0x9E3779B97F4A7C15


assert session_seed(0x1122334455667788, 0x99AABBCCDDEEFF00) == 0x6C534F65B94292A8
assert session_seed(0x1122334455667788, 0x8A8517A201DDE457) == 0x9E3779B97F4A7C15


def encode_frame(type, session, number, payload=b"", flags=0, seq=0, offset=0, length=0, volume=0):
    head = struct.pack("<IHHQQQQIII", len(payload), type, flags, number, seq, offset, length, volume,
                       crc32c(payload) if payload else 0, 0)
    return head + struct.pack("<I", crc32c(struct.pack("<Q", session) + head)) + payload


assert encode_frame(WRITE, 0x6C534F65B94292A8, 7, b"123456789", seq=3, offset=65536, length=9, volume=2)[:56] == bytes.fromhex(
    "09000000 10000000 0700000000000000 0300000000000000 0000010000000000 0900000000000000 02000000 8392 06e3 00000000 c3dfb051".replace(" ", ""))


def must(cond, what):
    if not cond:
        raise ProtocolError(what)


def check_header(type, flags, n, seq, offset, length):
    """What the table says of the type's fields."""
    must(type in NAMES, "an unknown type: %d" % type)
    name = NAMES[type]
    must(not flags & ~FLAGS.get(type, 0), "%s: unknown flags %#x" % (name, flags))
    must(seq or type not in SEQUENCED | TOKENED, "%s: seq is 0" % name)
    least, most = PAYLOADS.get(type, (0, 0))
    must(least <= n <= most, "%s: %d bytes of payload" % (name, n))
    if type in (WRITE, RESYNC_WRITE):
        must(length == n, "%s: length" % name)
    if type in (ZERO, DISCARD, RESYNC_ZERO):
        must(1 <= length <= SPAN_MAX, "%s: length" % name)
    if type in (READ_REQ, READ_REPLY):
        must(1 <= length <= PAYLOAD_MAX, "%s: length" % name)
    if type in (VOLUME_READ, VOLUME_DATA):
        must(1 <= length <= RANGE_MAX, "%s: length" % name)
    if type == VOLUME_WRITE:
        must((length or flags) and length <= RANGE_MAX and length + 3 <= n <= length + 65, "%s: length" % name)
    if type == HASH:
        must(1 <= length <= 1 << 22 and n == 8 + 16 * (length + 65535 >> 16), "%s: length" % name)
    if type == VERIFY:
        most, want = (1 << 30, 0) if flags else (1 << 19, 8 + 16 * (length + 4095 >> 12))
        must(1 <= length <= most and n == want and offset % 4096 == 0, "%s: length" % name)
    if type in (READ_REPLY, VOLUME_DATA):
        must(n == length if flags == 0 else n == 0 if flags == 1 else flags == 2 and 4 <= n <= 483, "%s: payload" % name)
    if type == DONE:
        must(n >= 4 if flags else n == 0, "%s: payload" % name)
    if type == DIRTY:
        must(n % 16 == 0, "%s: payload" % name)
    if type in (WRITE, RESYNC_WRITE, ZERO, DISCARD, RESYNC_ZERO, READ_REQ, READ_REPLY, HASH, IO_ERROR, WRITE_FAILED,
                VERIFY, VOLUME_READ, VOLUME_WRITE, VOLUME_DATA):
        must(offset + length <= VOLUME_MAX, "%s: the range's end" % name)
    if type in (CHECKPOINT, CHECKPOINT_ACK, TAKE_OVER, TOOK_OVER):
        must(1 <= offset <= 1 << 62, "%s: number" % name)
    if type == RESYNC_BEGIN:
        must(offset, "%s: generation 0" % name)
    must(type != GOODBYE or offset <= 2, "GOODBYE: reason")
    must(type != BEHIND or offset <= 2, "BEHIND: reason")


class Connection:
    """One TCP stream after its HELLOs. send() from any thread, recv() from one."""

    def __init__(self, sock, dialer, store, program="hub 1.0"):
        self.sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lock = threading.Lock()
        self.buf = b""
        self.session = 0
        self.sent = self.got = 0
        self.store = store
        nonce = secrets.randbits(64)
        p = program.encode()
        hello = MAGIC + struct.pack("<HHI", VERSION, VERSION, 0) + store + struct.pack("<QH", nonce, len(p)) + p
        if dialer:
            self.send(HELLO, hello)
            theirs = self._hello()
            self.session = session_seed(nonce, theirs)
        else:
            theirs = self._hello()
            self.send(HELLO, hello)
            self.session = session_seed(theirs, nonce)

    def _hello(self):
        f = self.recv(2.0)
        if f.type == REFUSE:
            raise Refused(*decode_refuse(f.payload))
        must(f.type == HELLO and f.payload[:8] == MAGIC, "not a HELLO")
        low, high, _ = struct.unpack_from("<HHI", f.payload, 8)
        if not low <= VERSION <= high:
            raise Refused(ERR_VERSION, "this hub speaks version %d, the host %d to %d" % (VERSION, low, high))
        self.peer_store = f.payload[16:32]
        nonce, n = struct.unpack_from("<QH", f.payload, 32)
        self.peer_program = f.payload[42:42 + n].decode("ascii", "replace")
        must(self.peer_store != self.store, "the peer is this very store")
        return nonce

    def send(self, type, payload=b"", **fields):
        with self.lock:
            data = encode_frame(type, self.session, self.sent, payload, **fields)
            self.sent += 1
            try:
                self.sock.sendall(data)
            except OSError as e:
                raise Closed(str(e))

    def raw(self, data):
        self.sock.sendall(data)

    def _fill(self, n, deadline):
        while len(self.buf) < n:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and (left <= 0 or not select.select([self.sock], [], [], left)[0]):
                raise TimeoutError("nothing came in time")
            try:
                part = self.sock.recv(1 << 18)
            except OSError as e:
                raise Closed(str(e))
            if not part:
                raise Closed("the peer closed" + (" in the middle of a frame" if self.buf else ""))
            self.buf += part

    def pending(self):
        """Whether more has come already."""
        return bool(self.buf) or bool(select.select([self.sock], [], [], 0)[0])

    def recv(self, timeout=None):
        """One frame, checked in the document's order."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._fill(56, deadline)
        head = self.buf[:56]
        n, type, flags, number, seq, offset, length, volume, crc_payload, reserved, crc = struct.unpack("<IHHQQQQIIII", head)
        # A REFUSE may stand in place of the HELLO, with seed 0: until the seeds are agreed on, session is 0.
        must(crc == crc32c(struct.pack("<Q", self.session) + head[:52]), "a header's checksum")
        must(reserved == 0, "reserved is not 0")
        check_header(type, flags, n, seq, offset, length)
        must(number == self.got, "frame %d came, %d was to come" % (number, self.got))
        self._fill(56 + n, deadline)
        payload = self.buf[56:56 + n]
        self.buf = self.buf[56 + n:]
        must(crc_payload == (crc32c(payload) if n else 0), "a payload's checksum")
        self.got += 1
        return Frame(type, flags, number, seq, offset, length, volume, payload)

    def refuse(self, code, text):
        self.send(REFUSE, encode_refuse(code, text))

    def close(self, abruptly=False):
        """Ends it, or with `abruptly` resets it: nothing more is said. The socket itself is the receiving thread's, which
        wakes up and closes it."""
        try:
            if abruptly:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.sock.shutdown(socket.SHUT_RD)
            else:
                self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass


# ---- payloads ------------------------------------------------------------------------------------------------------------


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, fmt):
        n = struct.calcsize("<" + fmt)
        must(self.at + n <= len(self.data), "a message is cut short")
        v = struct.unpack_from("<" + fmt, self.data, self.at)
        self.at += n
        return v if len(v) > 1 else v[0]

    def raw(self, n):
        must(self.at + n <= len(self.data), "a message is cut short")
        self.at += n
        return self.data[self.at - n:self.at]

    def string(self):
        return self.raw(self.take("H")).decode("ascii")

    def end(self):
        must(self.at == len(self.data), "a message is too long")


def string(text):
    b = text.encode("ascii")
    return struct.pack("<H", len(b)) + b


def encode_refuse(code, text):
    return struct.pack("<H", code) + string(text[:479])


def decode_refuse(payload):
    r = Reader(payload)
    code = r.take("H")
    text = r.string()
    r.end()
    return code, text


Volume = collections.namedtuple("Volume", "name uuid id size flags")
Report = collections.namedtuple("Report", "name group uuid id size role state")
ROLES = ["standalone", "primary", "secondary"]
STATES = ["NONE", "RUNNING", "FAILOVER", "FAILOVER_FAILED", "DONE"]
STANDALONE, PRIMARY, SECONDARY = range(3)
NONE, RUNNING, FAILOVER, FAILOVER_FAILED, STATE_DONE = range(5)


def decode_report(payload):
    r = Reader(payload)
    out = []
    for _ in range(r.take("I")):
        name, group, uuid = r.string(), r.string(), r.raw(16)
        id, size, role, state = r.take("IQBB")
        must(role <= 2 and state <= 4 and size % 512 == 0, "REPORT: bounds")
        out.append(Report(name, group, uuid.hex(), id, size, ROLES[role], STATES[state]))
    r.end()
    return out


class Lineage:
    def __init__(self, current=0, bitmap=0, history=()):
        self.current, self.bitmap, self.history = current, bitmap, list(history)

    @classmethod
    def decode(cls, data):
        v = struct.unpack("<18Q", data)
        used = [g for g in v[2:] if g]
        must(list(v[2:2 + len(used)]) == used, "a lineage's history has a gap")
        return cls(v[0], v[1], used)

    def encode(self):
        return struct.pack("<18Q", self.current, self.bitmap, *(self.history + [0] * 16)[:16])

    def knows(self, g):
        return g != 0 and (g in (self.current, self.bitmap) or g in self.history)

    def adopted(self):
        """What a target adopts."""
        history = ([self.bitmap] if self.bitmap else []) + self.history
        return Lineage(self.current, 0, history[:16])


J_PROTECT, J_ADOPT, J_START, J_ALONE, J_INCONSISTENT, J_HOLDING, J_SPLIT, J_FRESH, J_DISCARD_MINE, J_DISCARD_YOURS, J_FAILBACK = (
    1 << i for i in range(11))
J_BROKEN, J_HANDED = 1 << 16, 1 << 17


class Join:
    """The fields of the table, by its names; settings stay bytes."""

    FIELDS = ("group", "uuid", "flags", "role", "state", "lineage", "sync_from", "ckpt_max", "last_stream",
              "failover_generation", "start", "number", "settings", "volumes")

    def __init__(self, **kw):
        for f in self.FIELDS:
            setattr(self, f, kw[f])

    @classmethod
    def decode(cls, payload):
        r = Reader(payload)
        j = dict(group=r.string(), uuid=r.raw(16))
        j["flags"], j["role"], j["state"] = r.take("IBB")
        j["lineage"] = Lineage.decode(r.raw(144))
        j["sync_from"], j["ckpt_max"], j["last_stream"], j["failover_generation"] = r.take("QQQQ")
        j["start"], j["number"] = r.take("QQ")
        at = r.at
        for _ in range(r.take("H")):
            r.string()
            r.take("Q")
        j["settings"] = payload[at:r.at]
        j["volumes"] = []
        n = r.take("I")
        must(n <= 64, "JOIN: volumes")
        for _ in range(n):
            name, uuid = r.string(), r.raw(16)
            id, size, flags = r.take("IQB")
            must(512 <= size <= VOLUME_MAX and size % 512 == 0, "JOIN: a size")
            j["volumes"].append(Volume(name, uuid, id, size, flags))
        r.end()
        must(not j["flags"] & ~0x307FF and j["role"] <= 2 and j["state"] <= 4, "JOIN: bounds")
        must(j["ckpt_max"] <= 1 << 61 and j["last_stream"] <= j["ckpt_max"], "JOIN: numbers")
        must(len({v.name for v in j["volumes"]}) == len({v.id for v in j["volumes"]}) == n, "JOIN: a name or id twice")
        return cls(**j)

    def encode(self):
        out = string(self.group) + self.uuid + struct.pack("<IBB", self.flags, self.role, self.state) + self.lineage.encode()
        out += struct.pack("<QQQQ", self.sync_from, self.ckpt_max, self.last_stream, self.failover_generation)
        out += struct.pack("<QQ", self.start, self.number) + self.settings
        out += struct.pack("<I", len(self.volumes))
        for v in self.volumes:
            out += string(v.name) + v.uuid + struct.pack("<IQB", v.id, v.size, v.flags)
        return out


def decide(a, b):
    """("equal", a) and so on: the decision, and the source's JOIN (or None), by "Who is the source"."""

    def unfinished(j):
        return bool(j.flags & J_INCONSISTENT)

    def owns(j):
        if unfinished(j) or any(v.flags & 1 for v in j.volumes):
            return False
        return j.state not in (FAILOVER, FAILOVER_FAILED) and (j.role != SECONDARY or j.state == STATE_DONE)

    def apart():
        lost = [x for x, y in ((a, b), (b, a)) if x.flags & J_DISCARD_MINE or y.flags & J_DISCARD_YOURS]
        if len(lost) != 1:
            return "split brain", None
        loser = lost[0]
        keeper = b if loser is a else a
        if not owns(keeper):
            return "split brain", None
        since = [j.lineage.bitmap or j.lineage.current for j in (a, b)]
        covered = a.lineage.current == b.lineage.current or since[0] == since[1]
        return ("partial" if covered and not unfinished(loser) else "full"), keeper

    def peer_stale(j):
        return j.role == SECONDARY and j.state != STATE_DONE and any(v.flags & 4 for v in j.volumes)

    def apart_by_generations():
        for t, o in ((a, b), (b, a)):
            if t.role == SECONDARY and unfinished(t) and not peer_stale(t) and o.role == PRIMARY and not unfinished(o):
                return "full", o
        return apart()

    if (a.flags | b.flags) & J_SPLIT:
        return apart()
    for t, o in ((a, b), (b, a)):
        if t.flags & J_HANDED and not o.flags & (J_HANDED | J_BROKEN) and t.role == o.role == SECONDARY and \
                t.state == o.state == RUNNING and not unfinished(t) and not unfinished(o) and \
                t.lineage.current == o.lineage.current and t.last_stream == o.last_stream != 0:
            return "take over", o
    for t, o in ((a, b), (b, a)):
        if t.role != SECONDARY or o.role != PRIMARY or unfinished(o):
            continue
        if unfinished(t) and o.lineage.knows(t.sync_from):
            return ("full" if o.flags & J_PROTECT else "partial"), o
        if unfinished(t) and t.sync_from == 0:
            return "full", o
        if o.flags & J_PROTECT and (t.flags & J_FRESH or o.flags & J_ADOPT):
            return "full", o
    la, lb = a.lineage, b.lineage
    if la.current == lb.current:
        if la.current == 0:
            return "unrelated", None
        if a.role == b.role == PRIMARY:
            return apart_by_generations()
        for s, t in ((a, b), (b, a)):
            if s.role == PRIMARY and t.role == SECONDARY and not unfinished(s):
                return ("full" if unfinished(t) else "equal"), s
        return "no source", None
    ahead = None
    for x, y in ((a, b), (b, a)):
        l, m = x.lineage, y.lineage
        if l.bitmap and (l.bitmap == m.current or
                         (m.bitmap == 0 and m.history[:1] == [l.bitmap] and m.current and m.current in l.history)):
            ahead = ahead or ("partial", x, y)
    for x, y in ((a, b), (b, a)):
        if y.lineage.current and y.lineage.current in x.lineage.history:
            ahead = ahead or ("full", x, y)
    if ahead is None:
        if la.knows(lb.bitmap) or lb.knows(la.bitmap) or set(la.history) & set(lb.history):
            return apart_by_generations()
        return "unrelated", None
    how, x, y = ahead
    if y.role == PRIMARY:
        if peer_stale(x) and not unfinished(x):
            return "detached", y
        return apart() if x.role == SECONDARY else ("shut out", x)
    if x.role != PRIMARY or y.role != SECONDARY or unfinished(x):
        return "no source", None
    return ("full" if unfinished(y) else how), x


# ---- host-wide -----------------------------------------------------------------------------------------------------------


class HostClient:
    """Asks one host. Calls may come from several threads; each waits for its own answer."""

    def __init__(self, address, store=None):
        host, port = address.rsplit(":", 1)
        self.conn = Connection(socket.create_connection((host, int(port)), 5), True, store or secrets.token_bytes(16))
        self.cond = threading.Condition()
        self.token = 0
        self.answers = {}  # token: (frame, volumes) or None
        self.reports = []  # unasked ones, as they came
        self._parts = {}
        self.ended = None
        self.heard = time.monotonic()
        threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def _receive(self):
        try:
            while True:
                self._frame(self.conn.recv())
        except (Closed, ProtocolError, OSError) as e:
            why = e
        except Refused as e:
            why = e
        self.conn.sock.close()
        with self.cond:
            self.ended = why
            self.cond.notify_all()

    def _ping(self):
        while self.ended is None:
            time.sleep(2)
            try:
                self.conn.send(PING, offset=1)
            except (Closed, OSError):
                return
            if time.monotonic() - self.heard > 10:
                self.conn.close(abruptly=True)

    def _frame(self, f):
        self.heard = time.monotonic()
        if f.type == PING:
            self.conn.send(PONG, offset=f.offset)
        elif f.type == REPORT:
            part = self._parts.setdefault(f.seq, [])
            part += decode_report(f.payload)
            if f.flags & 1:
                with self.cond:
                    volumes = self._parts.pop(f.seq)
                    if f.seq:
                        must(f.seq in self.answers, "a REPORT that was not asked for")
                        self.answers[f.seq] = (f, volumes)
                    else:
                        self.reports.append(volumes)
                    self.cond.notify_all()
        elif f.type in (VOLUME_DATA, DONE):
            with self.cond:
                must(self.answers.get(f.seq, 0) is None, "an answer to what was not asked")
                self.answers[f.seq] = (f, None)
                self.cond.notify_all()
        elif f.type == REFUSE:
            raise Refused(*decode_refuse(f.payload))
        elif f.type == GOODBYE:
            raise Closed("goodbye")
        else:
            must(f.type == PONG, "%s on a host-wide connection" % NAMES[f.type])

    def ask(self, type, payload=b"", **fields):
        """Sends a request; its token."""
        with self.cond:
            self.token += 1
            token = self.token
            self.answers[token] = None
        self.conn.send(type, payload, seq=token, **fields)
        return token

    def answer(self, token, timeout=60.0):
        deadline = time.monotonic() + timeout
        with self.cond:
            while self.answers[token] is None:
                if self.ended:
                    raise self.ended
                if not self.cond.wait(deadline - time.monotonic()):
                    raise TimeoutError("no answer to request %d" % token)
            f, volumes = self.answers.pop(token)
        if (f.type == DONE and f.flags & 1) or (f.type == VOLUME_DATA and f.flags & 2):
            raise Refused(*decode_refuse(f.payload))
        return volumes if volumes is not None else f

    def report(self):
        return self.answer(self.ask(REPORT_WANT))

    def wait_report(self, cond, timeout=20.0):
        """Until an unasked report fits."""
        deadline = time.monotonic() + timeout
        with self.cond:
            while not any(cond(r) for r in self.reports):
                if self.ended:
                    raise self.ended
                if not self.cond.wait(deadline - time.monotonic()):
                    raise TimeoutError("no such report came; the last: %r" % self.reports[-1:])
            return [r for r in self.reports if cond(r)][-1]

    def start_protect(self, peer, ids, adopt=False, hash=False):
        payload = string(peer) + struct.pack("<I", len(ids))
        for name, id in ids.items():
            payload += string(name) + struct.pack("<I", id)
        self.answer(self.ask(START_PROTECT, payload, flags=adopt | hash << 1))

    def read(self, name, offset, length):
        out = b""
        while len(out) < length:
            n = min(RANGE_MAX, length - len(out))
            f = self.answer(self.ask(VOLUME_READ, string(name), offset=offset + len(out), length=n))
            must(f.type == VOLUME_DATA and (f.offset, f.length) == (offset + len(out), n), "another range")
            out += bytes(n) if f.flags & 1 else f.payload
        return out

    def write(self, name, offset, data, flush=True):
        for at in range(0, max(len(data), 1), RANGE_MAX):
            part = data[at:at + RANGE_MAX]
            last = at + len(part) >= len(data)
            f = self.answer(self.ask(VOLUME_WRITE, string(name) + part, offset=offset + at, length=len(part),
                                     flags=1 if flush and last else 0))
            must(f.type == DONE, "an answer of another kind")

    def goodbye(self):
        self.conn.send(GOODBYE, offset=0)
        self.conn.close()

    def close(self):
        self.ended = self.ended or Closed("closed here")
        self.conn.close(abruptly=True)


# ---- the copies ----------------------------------------------------------------------------------------------------------

BLOCK = 4096


class Copy:
    """One volume: the disk, and undo layers above it, oldest first. A layer is (number, {block: content}): what blocks held
    when its epoch, which began at checkpoint `number`, first changed them."""

    def __init__(self, folder, name, size, numbers, saving=True):
        self.folder, self.name, self.size = folder, name, size
        self.saving = saving
        path = os.path.join(folder, name + ".img")
        new = not os.path.exists(path)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if new:
            os.ftruncate(self.fd, size)
        self.layers = []
        for n in numbers:
            self._open_layer(n)

    def _undo_path(self, number):
        return os.path.join(self.folder, "%s.%d.undo" % (self.name, number))

    def _open_layer(self, number):
        blocks = {}
        fd = os.open(self._undo_path(number), os.O_RDWR | os.O_CREAT, 0o600)
        data = b""
        while True:
            part = os.read(fd, 1 << 20)
            if not part:
                break
            data += part
        entry = 8 + 4 + BLOCK
        for at in range(0, len(data) - entry + 1, entry):
            block, crc = struct.unpack_from("<QI", data, at)
            content = data[at + 12:at + entry]
            if crc32c(content) != crc:
                break  # torn: its block was not changed on the disk
            blocks.setdefault(block, content)
        os.ftruncate(fd, len(blocks) * entry)
        os.lseek(fd, 0, os.SEEK_END)
        self.layers.append((number, blocks, fd))

    def checkpoint(self, number, keep=8):
        self._open_layer(number)
        while len(self.layers) > keep:
            n, _, fd = self.layers.pop(0)
            os.close(fd)
            os.unlink(self._undo_path(n))

    def _save(self, offset, length):
        """The blocks of a range into the live layer: first save wins."""
        if not self.saving or not self.layers:
            return
        _, blocks, fd = self.layers[-1]
        for block in range(offset // BLOCK, (offset + length + BLOCK - 1) // BLOCK):
            if block not in blocks:
                content = os.pread(self.fd, BLOCK, block * BLOCK).ljust(BLOCK, b"\0")
                os.write(fd, struct.pack("<QI", block, crc32c(content)) + content)
                blocks[block] = content

    def write(self, offset, data):
        self._save(offset, len(data))
        at = 0
        while at < len(data):
            at += os.pwrite(self.fd, data[at:], offset + at)

    def zero(self, offset, length):
        while length:
            n = min(length, 1 << 20)
            self.write(offset, bytes(n))
            offset, length = offset + n, length - n

    def read(self, offset, length):
        return os.pread(self.fd, length, offset)

    def sync(self):
        for _, _, fd in self.layers[-1:]:
            os.fdatasync(fd)
        os.fdatasync(self.fd)

    def scrub(self):
        """[(layer's number, blocks, those whose checksum does not fit)], from the files."""
        out = []
        entry = 8 + 4 + BLOCK
        for number, _, fd in self.layers:
            data = os.pread(fd, os.fstat(fd).st_size, 0)
            bad = []
            for at in range(0, len(data) - entry + 1, entry):
                block, crc = struct.unpack_from("<QI", data, at)
                if crc32c(data[at + 12:at + entry]) != crc:
                    bad.append(block)
            out.append((number, len(data) // entry, sorted(bad)))
        return out

    def image(self, number):
        """The whole disk as of a checkpoint."""
        out = bytearray(os.pread(self.fd, self.size, 0))
        for n, blocks, _ in reversed(self.layers):  # the oldest last: it wins
            if n < number:
                break
            for block, content in blocks.items():
                out[block * BLOCK:(block + 1) * BLOCK] = content
        return bytes(out[:self.size])

    def close(self):
        os.close(self.fd)
        for _, _, fd in self.layers:
            os.close(fd)


class Group:
    """What the hub holds of a group, and its record."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.state = NONE
        self.lineage = Lineage()
        self.sync_from = self.ckpt_max = self.last_stream = 0
        self.inconsistent = self.fresh = True
        self.uuid = bytes(16)
        self.settings = b"\0\0"
        self.volumes = []
        self.numbers = []  # of the layers
        self.copies = {}  # by id
        self.detached = set()

    @property
    def path(self):
        return os.path.join(self.folder, self.name + ".json")

    def save(self):
        """The one write that decides."""
        doc = {"state": self.state, "lineage": self.lineage.encode().hex(), "sync_from": self.sync_from,
               "ckpt_max": self.ckpt_max, "last_stream": self.last_stream, "inconsistent": self.inconsistent,
               "fresh": self.fresh, "uuid": self.uuid.hex(), "settings": base64.b64encode(self.settings).decode(),
               "volumes": [[v.name, v.uuid.hex(), v.id, v.size] for v in self.volumes], "numbers": self.numbers,
               "detached": sorted(self.detached)}
        tmp = self.path + ".new"
        with open(tmp, "w") as f:
            json.dump(doc, f)
            f.flush()
            os.fsync(f.fileno())
        os.rename(tmp, self.path)

    @classmethod
    def load(cls, folder, name):
        g = cls(folder, name)
        if not os.path.exists(g.path):
            return None
        with open(g.path) as f:
            d = json.load(f)
        for k in ("state", "sync_from", "ckpt_max", "last_stream", "inconsistent", "fresh", "numbers"):
            setattr(g, k, d[k])
        g.lineage = Lineage.decode(bytes.fromhex(d["lineage"]))
        g.uuid = bytes.fromhex(d["uuid"])
        g.settings = base64.b64decode(d["settings"])
        g.volumes = [Volume(n, bytes.fromhex(u), i, s, 0) for n, u, i, s in d["volumes"]]
        g.detached = set(d["detached"])
        g.open()
        return g

    def open(self):
        self.copies = {v.id: Copy(self.folder, v.name, v.size, self.numbers, saving=not self.fresh) for v in self.volumes}

    def make(self, theirs):
        """For a JOIN with PROTECT: volumes with the ids that it lists."""
        self.uuid, self.settings = theirs.uuid, theirs.settings
        self.volumes = [v._replace(flags=0) for v in theirs.volumes]
        self.save()
        self.open()

    def sync(self):
        for c in self.copies.values():
            c.sync()

    def take(self, number):
        """A checkpoint: the epoch of all volumes switches with the record."""
        self.sync()
        self.ckpt_max = max(self.ckpt_max, number)
        self.numbers = (self.numbers + [number])[-8:]
        for c in self.copies.values():
            c.saving = True
            c.checkpoint(number)

    def join(self):
        flags = (J_INCONSISTENT if self.inconsistent else 0) | (J_FRESH if self.fresh or self.lineage.current == 0 and not self.sync_from else 0)
        return Join(group=self.group_name(), uuid=self.uuid, flags=flags, role=SECONDARY, state=self.state, lineage=self.lineage,
                    sync_from=self.sync_from if self.inconsistent else 0, ckpt_max=self.ckpt_max, last_stream=self.last_stream,
                    failover_generation=0, start=0, number=0, settings=self.settings,
                    volumes=[v._replace(flags=4 if v.id in self.detached else 0) for v in self.volumes])

    def group_name(self):
        return self.name

    def close(self):
        for c in self.copies.values():
            c.close()


class Hub:
    """The listener. `status` collects what came of guests' writes: (volume, offset, length, 0 or the error)."""

    def __init__(self, folder, port=0, peer_timeout=5.0):
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        self.peer_timeout = peer_timeout
        path = os.path.join(folder, "store")
        if not os.path.exists(path):
            with open(path, "wb") as f:
                f.write(secrets.token_bytes(16))
        with open(path, "rb") as f:
            self.store = f.read()
        self.lock = threading.RLock()
        self.groups = {}
        for f in os.listdir(folder):
            if f.endswith(".json"):
                self.groups[f[:-5]] = Group.load(folder, f[:-5])
        self.sessions = []
        self.errors = []
        self.stopping = False
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", port))
        self.listener.listen(16)
        self.port = self.listener.getsockname()[1]
        self.session_class = Session
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self):
        return "127.0.0.1:%d" % self.port

    def _accept(self):
        while True:
            try:
                s, _ = self.listener.accept()
            except OSError:
                return
            if self.stopping:
                s.close()
                return
            threading.Thread(target=self._serve, args=(s,), daemon=True).start()

    def _serve(self, sock):
        session = None
        try:
            conn = Connection(sock, False, self.store)
            session = self.session_class(self, conn)
            with self.lock:
                self.sessions.append(session)
            session.run()
        except (Closed, Refused, TimeoutError) as e:
            if session:
                session.ended = e
        except (ProtocolError, OSError) as e:
            if session:
                session.ended = e
            if not self.stopping and not (session and session.dropped):
                self.errors.append(e)
        finally:
            sock.close()

    def session(self):
        """The newest that stands, or None."""
        with self.lock:
            live = [s for s in self.sessions if s.ended is None]
            return live[-1] if live else None

    def _listen_no_more(self):
        self.stopping = True
        try:
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        except OSError:
            pass
        self.listener.close()

    def drop(self):
        """An abrupt end: resets every connection, and listens no more."""
        self._listen_no_more()
        for s in list(self.sessions):
            s.dropped = True
            s.conn.close(abruptly=True)
        for s in list(self.sessions):  # who holds a session's files has to have let them go before they are opened anew
            s.over.wait(10)
        for g in self.groups.values():
            g.close()

    def goodbye(self):
        """A graceful end: everything durable, then goodbye on each connection."""
        self._listen_no_more()
        for s in list(self.sessions):
            if s.ended is None:
                with self.lock:
                    for g in self.groups.values():
                        g.sync()
                try:
                    s.conn.send(GOODBYE, offset=0)
                except Closed:
                    pass
                s.conn.close()
        for s in list(self.sessions):
            s.over.wait(10)
        for g in self.groups.values():
            g.close()

    close = drop


class Session:
    """One connection that a host dialled, from its JOIN on, as the target."""

    def __init__(self, hub, conn):
        self.hub, self.conn = hub, conn
        self.group = None
        self.ended = None
        self.dropped = False
        self.over = threading.Event()
        self.synced = threading.Event()
        self.decision = None
        self.seq = self.flushed = 0
        self.acked = (0, 0, 0)
        self.open = False
        self.begun = 0
        self.status = []
        self.hashed = self.verified = self.moved = 0  # moved: bytes of RESYNC_WRITE
        self.resynced = []  # (volume name, offset, length) of RESYNC_WRITE and RESYNC_ZERO
        self.checkpoints = []  # (number, flags)
        self.behind = []
        self.goodbyes = []
        self.reports = []
        self._report = []

    def run(self):
        try:
            self._run()
        finally:
            self.over.set()

    def _run(self):
        last_ping = 0.0
        pending_ack = False
        heard = time.monotonic()
        self.conn.send(REPORT, struct.pack("<I", 0), flags=1)
        while True:
            try:
                f = self.conn.recv(0.1)
                heard = time.monotonic()
            except TimeoutError:
                f = None
            if f is not None:
                with self.hub.lock:
                    if self.dropped:
                        raise Closed("dropped")
                    barrier = self.frame(f)
                pending_ack = True
                if barrier or not self.conn.pending():
                    self.ack()
                    pending_ack = False
            elif pending_ack:
                self.ack()
                pending_ack = False
            now = time.monotonic()
            if now - heard > self.hub.peer_timeout:
                raise TimeoutError("the host was silent for peer_timeout")
            if now - last_ping > self.hub.peer_timeout / 5:
                last_ping = now
                self.conn.send(PING, offset=7)

    def ack(self):
        if self.group is None or not self.decision:
            return
        now = (self.seq, self.seq, self.flushed)
        if now != self.acked:
            self.acked = now
            self.conn.send(ACK, struct.pack("<QQQ", *now))

    # -- frames

    def frame(self, f):
        """Applies one. True: a barrier, to be acknowledged at once."""
        if f.type == PING:
            self.conn.send(PONG, offset=f.offset)
            return False
        if f.type == PONG:
            return False
        if f.type == REPORT:
            self._report += decode_report(f.payload)
            if f.flags & 1:
                self.reports.append(self._report)
                self._report = []
            return False
        if f.type == REPORT_WANT:
            self.conn.send(REPORT, self.report(), flags=1, seq=f.seq)
            return False
        if f.type == REFUSE:
            raise Refused(*decode_refuse(f.payload))
        if f.type == GOODBYE:
            self.goodbyes.append(f.offset)
            raise Closed("goodbye %d" % f.offset)
        if f.type == JOIN:
            self.on_join(Join.decode(f.payload))
            return False
        must(self.decision, "%s before the JOINs" % NAMES[f.type])
        if f.type in SEQUENCED:
            must(f.seq == self.seq + 1, "sequence number %d after %d" % (f.seq, self.seq))
            barrier = self.stream(f)
            self.seq = f.seq
            if barrier:
                self.flushed = f.seq
                self.after_barrier(f)
            return barrier
        self.beside(f)
        return False

    def report(self):
        out, n = b"", 0
        for g in self.hub.groups.values():
            for v in g.volumes:
                out += string(v.name) + string(g.name) + v.uuid + struct.pack("<IQBB", v.id, v.size, SECONDARY, g.state)
                n += 1
        return struct.pack("<I", n) + out

    def on_join(self, theirs):
        must(self.group is None, "a second JOIN")
        g = self.hub.groups.get(theirs.group)
        if g is None:
            if not theirs.flags & J_PROTECT:
                self.conn.refuse(ERR_NOENT, "the hub has no group %s; protect it afresh" % theirs.group)
                raise Closed("refused")
            g = self.hub.groups[theirs.group] = Group(self.hub.folder, theirs.group)
            g.make(theirs)
        if [(v.name, v.size) for v in sorted(g.volumes)] != [(v.name, v.size) for v in sorted(theirs.volumes)]:
            self.conn.refuse(ERR_STATE, "the volumes of group %s differ" % theirs.group)
            raise Closed("refused")
        if {v.name: v.id for v in g.volumes} != {v.name: v.id for v in theirs.volumes}:  # the source's ids are right
            ids = {v.name: v.id for v in theirs.volumes}
            old = {v.name: v.id for v in g.volumes}
            g.copies = {ids[n]: g.copies[i] for n, i in old.items()}
            g.volumes = [v._replace(id=ids[v.name]) for v in g.volumes]
        stopped = g.state == STATE_DONE
        if stopped and theirs.role == PRIMARY and theirs.flags & (J_START | J_PROTECT):
            g.state = NONE
        elif stopped and not (theirs.role == PRIMARY and theirs.state == RUNNING):
            self.conn.refuse(ERR_STATE, "replication of that group is stopped; `start` it on the primary")
            raise Closed("refused")
        g.ckpt_max = max(g.ckpt_max, theirs.ckpt_max)
        g.save()
        mine = g.join()
        self.group = g
        self.conn.send(JOIN, mine.encode())
        if g.state == STATE_DONE:  # it has not heard of the stop, and stops too
            return
        self.decision, source = decide(theirs, mine)
        if source is not theirs:
            self.conn.refuse(ERR_STATE, "a hub only follows; the decision is %s" % self.decision)
            raise Closed("refused")
        g.settings = theirs.settings
        g.detached = {v.id for v in theirs.volumes if v.flags & 1} if self.decision != "detached" else g.detached
        self.whole = self.decision in ("equal", "detached") and not g.inconsistent
        self.conn.send(DIRTY_END, offset=0)

    def copy(self, f):
        c = self.group.copies.get(f.volume)
        must(c is not None, "%s names volume %d" % (NAMES[f.type], f.volume))
        must(f.offset + f.length <= c.size, "%s reaches behind volume %s" % (NAMES[f.type], c.name))
        return c

    def stream(self, f):
        """The sequenced frames. True for a barrier, which is durable on return."""
        g = self.group
        if f.type == RESYNC_BEGIN:
            g.sync()
            if not g.inconsistent:
                g.take(g.ckpt_max + 1)  # a local one: what it has now survives the resync
            g.inconsistent, g.sync_from = True, f.offset
            g.save()
            self.begun += 1
            self.open = True
            return True
        if not self.open:
            must(f.type == RESYNC_DONE and (self.whole or self.begun), "%s on a closed stream" % NAMES[f.type])
        if f.type == RESYNC_DONE:
            g.sync()
            g.lineage = Lineage.decode(f.payload).adopted()
            must(g.lineage.current, "RESYNC_DONE: generation 0")
            g.inconsistent, g.sync_from = False, 0
            g.save()
            self.open = self.whole = True
            return True
        if f.type in (WRITE, RESYNC_WRITE):
            self.copy(f).write(f.offset, f.payload)
        elif f.type in (ZERO, DISCARD, RESYNC_ZERO):
            self.copy(f).zero(f.offset, f.length)
        if f.type in (WRITE, ZERO, DISCARD):
            self.status.append((self.copy(f).name, f.offset, f.length, 0))
            return False
        if f.type in (RESYNC_WRITE, RESYNC_ZERO):
            self.resynced.append((self.copy(f).name, f.offset, f.length))
            self.moved += len(f.payload)
            return False
        if f.type == HASH:
            differ = [i for i, same in enumerate(self.compare(f, 65536)) if not same]
            self.conn.send(HASH_ANSWER, seq=f.seq, offset=sum(1 << i for i in differ))
            self.hashed += (f.length + 65535) >> 16
            return False
        if f.type == VERIFY:
            must(not g.inconsistent, "VERIFY out of sync")
            self.verify(f)
            return False
        if f.type == CHECKPOINT and f.flags & 8:  # a switchover: a hub takes nothing over, so the number is void
            g.sync()
            g.ckpt_max = max(g.ckpt_max, f.offset)
            g.save()
            return True
        if f.type == CHECKPOINT:
            must(not g.inconsistent and f.offset > g.ckpt_max, "CHECKPOINT %d, %d was used" % (f.offset, g.ckpt_max))
            g.take(f.offset)
            g.last_stream, g.fresh = f.offset, False
            g.state = STATE_DONE if f.flags & 4 else RUNNING
            g.save()
            self.checkpoints.append((f.offset, f.flags))
            return True
        if f.type == DETACH:
            g.sync()
            g.lineage = Lineage.decode(f.payload).adopted()
            g.detached.add(f.volume)
            g.save()
            return True
        if f.type == ATTACH:
            g.sync()
            g.detached.discard(f.volume)
            g.save()
            return True
        must(f.type == FLUSH, "%s in the stream" % NAMES[f.type])
        g.sync()
        return True

    def compare(self, f, piece):
        """For each piece of the range, whether this disk has what the frame's hash is of (no hashes: zeroes)."""
        data = self.copy(f).read(f.offset, f.length)
        pieces = [data[i:i + piece] for i in range(0, f.length, piece)]
        if not f.payload:
            return [not p.strip(b"\0") for p in pieces]
        seed, = struct.unpack_from("<Q", f.payload)
        return [xxh3_128(p, seed) == f.payload[8 + 16 * i:24 + 16 * i] for i, p in enumerate(pieces)]

    def verify(self, f):
        runs = []
        for i, same in enumerate(self.compare(f, 4096)):
            at, end = f.offset + 4096 * i, min(f.offset + 4096 * (i + 1), f.offset + f.length)
            if not same and runs and (runs[-1][1] == at or len(runs) == 128):
                runs[-1][1] = end
            elif not same:
                runs.append([at, end])
        self.verified += 1
        self.conn.send(VERIFY_ANSWER, b"".join(struct.pack("<QQQ", a, e - a, 1) for a, e in runs), seq=f.seq)

    def scrub(self, f):
        """One undo layer a time."""
        c = self.group.copies.get(f.volume)
        must(c is not None, "SCRUB names volume %d" % f.volume)
        sums = c.scrub()
        at = [k for k, (number, _, _) in enumerate(sums) if number >= f.length]
        if not at:
            self.conn.send(SCRUBBED, struct.pack("<QQQQ", 0, 0, 0, 0), seq=f.seq, flags=1, volume=f.volume)
            return
        number, blocks, bad = sums[at[0]]
        left = sum(n for _, n, _ in sums[at[0] + 1:]) * BLOCK
        out = struct.pack("<QQQQ", number + 1, 0, blocks * BLOCK, left)
        for b in bad[:64]:
            out += struct.pack("<QQQQ", number, b * BLOCK, BLOCK, 0)
        self.conn.send(SCRUBBED, out, seq=f.seq, flags=0 if at[1:] else 1, volume=f.volume)

    def after_barrier(self, f):
        """The answers that a barrier has besides the ACK."""
        if f.type == RESYNC_BEGIN:
            self.conn.send(RESYNC_READY, seq=f.seq, offset=self.group.ckpt_max)
        elif f.type == RESYNC_DONE:
            self.conn.send(RESYNC_ACK, seq=f.seq)
            self.synced.set()
        elif f.type == CHECKPOINT:
            self.conn.send(CHECKPOINT_ACK, offset=f.offset, length=2 if f.flags & 8 else 0)

    def beside(self, f):
        g = self.group
        if f.type == BEHIND:
            self.open = self.whole = False
            self.synced.clear()
            self.behind.append(f.offset)
        elif f.type == SETTINGS:
            g.settings = f.payload
            g.save()
            self.conn.send(SETTINGS_ACK, seq=f.seq)
        elif f.type == WRITE_FAILED:
            code, text = decode_refuse(f.payload)
            self.status.append((self.copy(f).name, f.offset, f.length, code))
        elif f.type == READ_REQ:
            self.conn.send(READ_REPLY, self.copy(f).read(f.offset, f.length), seq=f.seq, offset=f.offset, length=f.length,
                           volume=f.volume)
        elif f.type == SCRUB:
            self.scrub(f)
        elif f.type == VOLUME_READ:
            self.volume_read(f)
        elif f.type == VOLUME_WRITE:
            self.conn.send(DONE, encode_refuse(ERR_NOTSUP, "this hub's copies are not written from outside"), seq=f.seq, flags=1)
        else:
            must(False, "%s out of order" % NAMES[f.type])

    def volume_read(self, f):
        """A recovery volume shows its base: the last checkpoint."""
        r = Reader(f.payload)
        name = r.string()
        r.end()
        at = dict(seq=f.seq, offset=f.offset, length=f.length)
        copies = {c.name: c for c in self.group.copies.values()}
        if name not in copies:
            self.conn.send(VOLUME_DATA, encode_refuse(ERR_NOENT, "there is no volume %s" % name), flags=2, **at)
        elif f.offset + f.length > copies[name].size:
            self.conn.send(VOLUME_DATA, encode_refuse(ERR_RANGE, "behind the end"), flags=2, **at)
        elif self.group.state != RUNNING:
            self.conn.send(VOLUME_DATA, encode_refuse(ERR_IO, "no checkpoint yet"), flags=2, **at)
        else:
            data = copies[name].image(self.group.last_stream)[f.offset:f.offset + f.length]
            if data.strip(b"\0"):
                self.conn.send(VOLUME_DATA, data, **at)
            else:
                self.conn.send(VOLUME_DATA, flags=1, **at)

    def stop(self):
        """Asks for a clean stop."""
        self.conn.send(STOP_WANT)
