#!/usr/bin/env python3
"""A hub (tests/lib/repfs_hub.py) follows for long: reset at random moments, also in the middle of a resync, started anew from its
files, the host killed too; after each the copy is the volume byte for byte, and only dirty regions travelled. And a hub that
says nothing is closed."""

import os
import random
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import repfs_e2e as e2e  # noqa: E402
import repfs_hub as hub  # noqa: E402
from repfs_e2e import MIB, Host, check, check_eq, wait_for  # noqa: E402
from test_57_hub import Client, HubHost, content, settle, synced  # noqa: E402

SIZE = 8 * MIB


@e2e.limit(600)
def test_resets_at_random():
    seed = random.randrange(1 << 30)
    print("seed %d" % seed, flush=True)
    rng = random.Random(seed)
    a = Host("a").start()
    names = ["vm1", "vm1-data"]
    vols = {n: a.create(n, SIZE, "vm1") for n in names}
    a.repctl("set", "vm1", "checkpoint_interval=0.5s", "peer_timeout=%ds" % (5 * e2e.SLOW), "keep_last=4")
    h = HubHost()
    Client(a).start_protect(h.address, {"vm1": 11, "vm1-data": 12})
    synced(h, a)
    log = e2e.Log({n: SIZE for n in names})
    w = e2e.Writer(log, vols, threads=3, seed=seed, pace=0.003).start()
    for round in range(25):
        time.sleep(rng.random() * 0.8)
        if rng.random() < 0.3:  # slow: the next reset is in its middle
            a.repctl("set", "vm1", "resync_rate=%s" % rng.choice(["256K", "1M"]))
        kill = rng.random() < 0.15
        if kill:
            w.stop()
            a.kill9()
        h.drop()
        time.sleep(rng.random() * 0.6)
        h = HubHost(h.folder, port=h.port)
        if kill:
            a.start()
            w = e2e.Writer(log, vols, threads=3, seed=seed + round, pace=0.003).start()
        if rng.random() < 0.5:
            continue
        a.repctl("set", "vm1", "resync_rate=0")
        s = synced(h, a)
        check(s.decision in ("equal", "partial"), "round %d: the decision %s" % (round, s.decision))
        w.pause()
        e2e.fsync(vols["vm1"])
        n = settle(a, h)
        for c in h.groups["vm1"].copies.values():
            want = content(vols[c.name])
            check(c.image(n) == want and c.read(0, c.size) == want, "round %d: the copy of %s differs" % (round, c.name))
        w.resume()
    w.stop()
    a.repctl("set", "vm1", "resync_rate=0")
    synced(h, a)
    settle(a, h)


def test_a_silent_hub_is_closed():
    a = Host("a").start()
    c = hub.Connection(e2e.socket.create_connection(("127.0.0.1", a.port), 5), True, os.urandom(16))
    quiet = hub.Connection(e2e.socket.create_connection(("127.0.0.1", a.port), 5), True, os.urandom(16))
    c.send(hub.REPORT_WANT, seq=1)
    t = time.monotonic()
    for conn, least, most in ((quiet, 4, 8), (c, 9, 14)):
        try:
            while True:
                conn.recv(20)
        except hub.Closed:
            pass
        took = time.monotonic() - t
        check(least < took < most * e2e.SLOW, "closed after %.1f s" % took)


if __name__ == "__main__":
    e2e.main()
