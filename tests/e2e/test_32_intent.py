#!/usr/bin/env python3
"""What dirty tracking costs and what it is worth (SPEC 6, 8, 9: I4, I5): syncs of the write-intent map counted from
outside, what is marked, and what travels after a kill, after a clean end and after a lost link."""

import os
import random
import re
import signal
import struct
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import GIB, KIB, MIB, Pair, check, check_eq, wait_for  # noqa: E402

UNIT = MIB  # of the write-intent map
REGION = 64 * KIB


class Syncs:
    """Counts the fdatasync and fsync calls of a daemon, by the name of the file in the store."""

    def __init__(self, host):
        self.host = host
        self.path = os.path.join(e2e.tmp(), "strace")
        self.proc = subprocess.Popen(["strace", "-f", "-y", "-e", "trace=fdatasync,fsync", "-o", self.path, "-p",
                                      str(host.pid())], stderr=subprocess.PIPE, text=True)
        for line in self.proc.stderr:
            if "attached" in line:
                break
        check(self.proc.poll() is None, "strace could not attach to host %s" % host.name)

    def end(self):
        """{path below the store: number of calls}"""
        self.proc.send_signal(signal.SIGINT)
        self.proc.wait(60)
        found = {}
        with open(self.path) as f:
            for line in f:
                m = re.search(r"f(?:data)?sync\(\d+<([^>]*)>", line)
                if m:
                    name = os.path.relpath(m.group(1), self.host.store)
                    found[name] = found.get(name, 0) + 1
        return found


def marks(host, volume="vm1"):
    """The set bits of the map in the store (docs/format.md)."""
    with open(os.path.join(host.store, "volumes", volume, "intent"), "rb") as f:
        head = f.read(512)
        check(head[:8] == b"repfsint" and struct.unpack_from("<I", head, 8)[0] == 2, "the map's header")
        size = os.stat(host.disk(volume)).st_size
        units, bits = (size + UNIT - 1) // UNIT, set()
        while len(bits) <= units and f.tell() // 512 <= (units + 4063) // 4064:
            first = (f.tell() // 512 - 1) * 4064
            page = f.read(512)
            bits |= {first + i for i in range(4064) if page[i // 8] >> (i % 8) & 1 and first + i < units}
        return bits


def rewrite(fd, off):
    with memoryview(e2e.aligned(os.urandom(4096))) as data:
        check_eq(os.pwrite(fd, data, off), 4096, "a write")


def lose_peer(p):
    p.b.kill9()
    p.a.wait_status("vm1", 60, link="DOWN")


def in_sync_and_clean(p):
    p.a.wait_synced("vm1", 60)
    p.a.wait_status("vm1", 60, dirty_bytes=0)


def unmarked(p):
    """The initial sync has marked all. What is clean loses its mark at the next look, the first of them at the start."""
    in_sync_and_clean(p)
    p.a.restart()
    in_sync_and_clean(p)
    wait_for(lambda: not marks(p.a), "the marks of clean units to go", 60)


def rejoin(p, want, what):
    """The peer comes back: what travels is `want` bytes, and makes the disks equal."""
    before = p.a.status("vm1")["counters"]["resync_bytes"]
    p.b.start()
    p.a.wait_synced("vm1", 60)
    sent = p.a.status("vm1")["counters"]["resync_bytes"] - before
    check(sent == want if isinstance(want, int) else sent in want, "%s: %d bytes travelled" % (what, sent))
    p.checkpoint()
    p.same()


@e2e.limit(300)
def test_random_writes_without_the_peer_cost_few_syncs():
    e2e.need("strace")
    p = Pair(durability="power")
    (vol,) = p.protect(size=4 * GIB)
    unmarked(p)
    lose_peer(p)
    rng = random.Random(32)
    fd = os.open(vol, os.O_WRONLY | os.O_DIRECT)
    rewrite(fd, 0)  # its generation is begun
    syncs = Syncs(p.a)
    offsets = [rng.randrange(4 * GIB // 4096) * 4096 for _ in range(4000)]
    for off in offsets:
        rewrite(fd, off)
    offsets.append(0)
    units = {off // UNIT for off in offsets}
    found = syncs.end()
    os.close(fd)
    of_map = found.pop("volumes/vm1/intent", 0)
    print("4000 writes in %d units: %d syncs of the map, others: %r" % (len(units), of_map, found))
    check(0 < of_map < 4000 * 0.05, "%d syncs of the map" % of_map)
    check(sum(found.values()) <= 8, "syncs of other files: %r" % found)
    check(units <= marks(p.a), "a unit was written to and is not marked")
    check_eq(p.a.status("vm1")["dirty_bytes"], len({o // REGION for o in offsets}) * REGION, "dirty bytes")


@e2e.limit(300)
def test_what_travels_after_each_kind_of_end():
    p = Pair(durability="power")
    (vol,) = p.protect(size=48 * MIB)
    e2e.pwrite(vol, 0, os.urandom(48 * MIB), sync=True)
    unmarked(p)
    check_eq(p.a.status("vm1")["counters"]["resync_bytes"], 0, "bytes that travelled after a clean restart in sync")

    # Light use leaves few marks; a lost link costs regions.
    offsets = [(5 * i + 2) * UNIT + i * REGION for i in range(8)]
    lose_peer(p)
    fd = os.open(vol, os.O_WRONLY | os.O_DIRECT)
    for off in offsets:
        rewrite(fd, off)
    os.close(fd)
    check_eq(marks(p.a), {o // UNIT for o in offsets}, "marks of 8 light writes")
    check_eq(p.a.status("vm1")["dirty_bytes"], 8 * REGION, "dirty bytes")
    rejoin(p, 8 * REGION, "a lost link")
    in_sync_and_clean(p)

    # The primary is killed: what is marked travels.
    lose_peer(p)
    for off in offsets:
        e2e.pwrite(vol, off, os.urandom(4096))
    p.a.kill9()
    marked = marks(p.a)
    check(marked >= {o // UNIT for o in offsets} and len(marked) <= 16, "marks: %r" % marked)
    p.a.start()
    check_eq(p.a.status("vm1")["dirty_bytes"], len(marked) * UNIT, "dirty bytes after a kill")
    rejoin(p, len(marked) * UNIT, "a kill")
    in_sync_and_clean(p)

    # A clean end keeps the regions, once.
    lose_peer(p)
    for off in offsets:
        e2e.pwrite(vol, off, os.urandom(4096))
    p.a.restart()
    check_eq(p.a.status("vm1")["dirty_bytes"], 8 * REGION, "dirty bytes after a clean restart")
    e2e.pwrite(vol, 46 * UNIT, os.urandom(4096))
    p.a.restart()
    check_eq(p.a.status("vm1")["dirty_bytes"], 9 * REGION, "dirty bytes after another")
    rejoin(p, 9 * REGION, "a clean restart")
    lose_peer(p)
    for off in offsets:
        e2e.pwrite(vol, off, os.urandom(4096))
    p.a.restart()
    e2e.pwrite(vol, 44 * UNIT, os.urandom(4096))
    p.a.kill9()
    p.a.start()
    marked = marks(p.a)
    check_eq(p.a.status("vm1")["dirty_bytes"], len(marked) * UNIT, "a fine map of an earlier end was used")
    rejoin(p, len(marked) * UNIT, "a kill after a clean restart")


if __name__ == "__main__":
    e2e.main()
