#!/usr/bin/env python3
"""One host alone: the volume verbs, with and without a daemon, and the mount as a filesystem (SPEC 4, 12, 14)."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import repfs_e2e as e2e  # noqa: E402
from repfs_e2e import BLOCK, GIB, KIB, MIB, TIB, Host, check, check_eq, check_errno, wait_for  # noqa: E402


def one(size=16 * MIB, name="vm1", **kw):
    h = Host("a", **kw).start()
    return h, h.create(name, size)


# ---- volumes ---------------------------------------------------------------------------------------------------------


def test_create_list_show_delete():
    h = Host("a").start()
    check_eq(h.repctl("list", json=True)["volumes"], [], "volumes of a new store")
    h.repctl("create", "vm1", "--size", "20G")
    h.repctl("create", "data.0_x-1", "--size", "512", "--group", "db")
    doc = h.repctl("create", "data2", "--size", "1.5M", "--group", "db", json=True)
    check_eq((doc["volume"], doc["group"], doc["size"]), ("data2", "db", 1536 * KIB), "what create --json says")
    vols = {v["name"]: v for v in h.repctl("list", json=True)["volumes"]}
    check_eq(sorted(vols), ["data.0_x-1", "data2", "vm1"], "names listed")
    check_eq((vols["vm1"]["size"], vols["vm1"]["group"]), (20 * GIB, "vm1"), "vm1")
    check_eq((vols["data2"]["group"], vols["data.0_x-1"]["group"]), ("db", "db"), "groups")
    check_eq((vols["vm1"]["role"], vols["vm1"]["state"]), ("standalone", "NONE"), "role and state of a new volume")
    h.repctl("list").says("vm1", "20.0 GiB", "standalone")
    show = h.repctl("show", "vm1", json=True)
    for key in ("name", "group", "size", "id", "role", "state", "uuid", "path", "store_path", "checkpoints"):
        check(key in show, "show has no %s: %r" % (key, show))
    check_eq(show["path"], h.volume("vm1"), "path")
    check(os.path.samefile(show["store_path"], h.disk("vm1")) or os.path.dirname(h.disk("vm1")) == show["store_path"].rstrip("/"),
          "store_path is %s" % show["store_path"])
    check_eq(sorted(os.listdir(os.path.join(h.mnt, "volumes"))), ["data.0_x-1", "data2", "vm1"], "files in volumes/")
    check_eq(os.stat(h.volume("vm1")).st_size, 20 * GIB, "size of the file")
    check_eq(os.stat(h.disk("vm1")).st_size, 20 * GIB, "size of the disk in the store")
    check(e2e.allocated(h.disk("vm1")) < MIB, "a new volume takes space")

    # in use: refused
    fd = os.open(h.volume("data2"), os.O_RDWR)
    h.repctl("-y", "delete", "data2", code=(1, 5)).says("open|use")
    os.close(fd)
    wait_for(lambda: h.repctl("-y", "delete", "data2", code=None).code == 0, "the delete after the close", 5)
    check(not os.path.exists(h.volume("data2")), "a deleted volume's file is still shown")
    check(not os.path.exists(os.path.dirname(h.disk("data2"))), "a deleted volume's folder is still there")
    h.repctl("show", "data2", code=4).says("data2")
    h.repctl("-y", "delete", "data2", code=4)
    h.restart()
    check_eq(sorted(v["name"] for v in h.repctl("list", json=True)["volumes"]), ["data.0_x-1", "vm1"], "after a restart")


def test_create_refusals():
    h = Host("a").start()
    h.create("vm1", MIB)
    h.repctl("create", "vm1", "--size", "1M", code=1).says("vm1", "exist")
    for name in (".x", "-x", "", "a/b", "a b", "x" * 64, "ü", "..", "a\n"):
        h.repctl("create", "--size", "1M", "--", name, code=2)
    h.repctl("create", "x" * 63, "--size", "1M")
    for size in ("0", "511", "513", "1.0001K", "-1", "", "1X", "G", "9999999999999T", "1e6", "0x200"):
        h.repctl("create", "v", "--size=" + size, code=2)
    h.repctl("create", "v", code=2).says("size")
    h.repctl("create", "v", "--size", "1M", "--group", "../x", code=2)
    h.repctl("create", code=2)
    h.repctl("nonsense", code=2)
    h.repctl("list", "--nonsense", code=2)
    h.repctl("show", "nope", code=4).says("nope")
    for verb in ("start", "stop", "checkpoint", "failover", "error", "discard", "status", "get", "checkpoints"):
        h.repctl("-y", verb, "nope", code=4).says("nope")
    check(not os.path.exists(os.path.join(e2e.tmp(), "..", "x")), "a name left the store")
    check_eq(sorted(v["name"] for v in h.ctl("list")["volumes"]), ["vm1", "x" * 63], "only good ones were made")


def test_import_export():
    h = Host("a").start()
    d = e2e.tmp()
    src = os.path.join(d, "src.raw")
    rng = random.Random(1)
    with open(src, "wb") as f:
        f.truncate(64 * MIB)
        for off in (0, 7 * MIB + 4096, 63 * MIB):
            f.seek(off)
            f.write(rng.randbytes(300 * KIB))
        f.seek(40 * MIB)
        f.write(bytes(MIB))  # written zeroes need no room in the volume
    h.repctl("import", "vm1", src, timeout=60)
    e2e.check_same(src, h.volume("vm1"), "the imported volume")
    check(e2e.allocated(h.volume("vm1")) <= MIB + 256 * KIB, "holes were not kept: %d bytes" % e2e.allocated(h.volume("vm1")))
    out = os.path.join(d, "out.raw")
    h.repctl("export", "vm1", out)
    e2e.check_same(src, out, "the exported file")
    check(e2e.allocated(out) <= MIB + 256 * KIB, "the exported file is not sparse")
    h.repctl("export", "vm1", out, code=1).says("exist")
    h.repctl("import", "vm1", src, code=1).says("exist")
    h.repctl("import", "vm2", os.path.join(d, "nope"), code=(1, 4)).says("nope")
    odd = os.path.join(d, "odd.raw")
    with open(odd, "wb") as f:
        f.write(b"x" * 1000)
    h.repctl("import", "vm2", odd, code=(1, 2)).says("512|size")
    h.repctl("export", "nope", os.path.join(d, "x"), code=4)
    h.repctl("export", "vm1@7", os.path.join(d, "x"), code=4).says("7")
    check_eq(sorted(os.listdir(d)), ["odd.raw", "out.raw", "src.raw"], "files left behind")
    check_eq([v["name"] for v in h.ctl("list")["volumes"]], ["vm1"], "volumes left behind")
    if shutil.which("qemu-img"):
        qcow = os.path.join(d, "q.qcow2")
        e2e.run(["qemu-img", "convert", "-O", "qcow2", src, qcow])
        r = h.repctl("import", "vm3", qcow, code=None)
        if r.code == 0:  # once qcow is there it has to be right
            e2e.check_same(src, h.volume("vm3"), "the volume imported from qcow2")
        else:
            check_eq(r.code, 1, "exit code of import of a qcow2")
            r.says("qcow2")
            check_eq([v["name"] for v in h.ctl("list")["volumes"]], ["vm1"], "volumes left behind")
        h.repctl("import", "vm4", qcow, "--format", "raw")
        e2e.check_same(qcow, h.volume("vm4"), "a qcow2 taken as raw") if os.path.getsize(qcow) % 512 == 0 else None


def test_offline_verbs():
    h = Host("a")
    h.repctl("list", code=(1, 3, 4))
    check(not os.path.exists(h.store), "list made a store")
    h.repctl("create", "vm1", "--size", "8M")
    check_eq(stat.S_IMODE(os.stat(h.store).st_mode), 0o700, "mode of the store")
    h.repctl("create", "vm2", "--size", "4M", "--group", "vm1")
    check_eq(os.stat(h.disk("vm1")).st_size, 8 * MIB, "the disk")
    with open(h.disk("vm1"), "r+b") as f:
        f.seek(MIB)
        f.write(b"offline")
    out = os.path.join(h.dir, "out")
    h.repctl("export", "vm1", out)
    e2e.check_same(h.disk("vm1"), out, "export without a daemon")
    h.repctl("import", "vm3", out)
    check_eq(sorted(v["name"] for v in h.repctl("list", json=True)["volumes"]), ["vm1", "vm2", "vm3"], "list without a daemon")
    check_eq(h.repctl("show", "vm2", json=True)["group"], "vm1", "show without a daemon")
    h.repctl("check")
    h.repctl("show", "nope", code=4)
    for verb in (["status"], ["ping"], ["-y", "delete", "vm1"], ["checkpoint", "vm1"], ["shutdown"]):
        h.repctl(*verb, code=3).says("repfs|daemon|running|socket")
    h.start()
    check_eq(e2e.pread(h.volume("vm1"), MIB, 7, direct=False), b"offline", "written to the plain file, read through the mount")
    h.repctl("ping")
    h.repctl("check", code=(1, 5)).says("use|running|daemon")
    e2e.pwrite(h.volume("vm1"), MIB, b"online!" + bytes(505), direct=False, sync=True)
    h.stop()
    with open(h.disk("vm1"), "rb") as f:
        f.seek(MIB)
        check_eq(f.read(7), b"online!", "written through the mount, read from the plain file")


def test_store_lock_and_mount_point():
    h, _ = one()
    other = Host("b", store=h.store)
    r = e2e.run(other.command("-f"), code=None, timeout=60)
    check(r.returncode not in (0, None), "a second daemon on one store")
    check(str(h.pid()) in r.stderr or "use" in r.stderr, "message of the second daemon: %s" % r.stderr)
    check(h.store in r.stderr, "the message does not name the store: %s" % r.stderr)
    h.repctl("ping")
    r = e2e.run([e2e.program("repfs"), os.path.join(h.dir, "s2"), h.mnt, "-f"], code=None, timeout=60)
    check(r.returncode != 0, "a second mount on a mount point in use")
    full = os.path.join(h.dir, "full")
    os.mkdir(full)
    open(os.path.join(full, "x"), "w").close()
    r = e2e.run([e2e.program("repfs"), os.path.join(h.dir, "s3"), full, "-f"], code=None, timeout=60)
    check(r.returncode != 0 and "empty" in r.stderr, "a mount point that is not empty: %d %s" % (r.returncode, r.stderr))
    notstore = os.path.join(h.dir, "notstore")
    os.mkdir(notstore)
    open(os.path.join(notstore, "precious"), "w").close()
    os.mkdir(os.path.join(h.dir, "m3"))
    r = e2e.run([e2e.program("repfs"), notstore, os.path.join(h.dir, "m3"), "-f"], code=None, timeout=60)
    check(r.returncode != 0 and notstore in r.stderr, "a folder that is no store: %d %s" % (r.returncode, r.stderr))
    check_eq(os.listdir(notstore), ["precious"], "what is in it now")
    r = e2e.run([e2e.program("repfs"), os.path.join(h.dir, "s4"), os.path.join(h.dir, "no-such-folder"), "-f"], code=None, timeout=60)
    check(r.returncode != 0 and "no-such-folder" in r.stderr, "a mount point that is not there: %s" % r.stderr)
    for bad in (["--nonsense"], ["--listen", "nonsense"], ["--durability", "maybe"], ["--threads", "x"]):
        r = e2e.run([e2e.program("repfs"), os.path.join(h.dir, "s5"), os.path.join(h.dir, "m3"), "-f"] + bad, code=None, timeout=60)
        check_eq(r.returncode, 2, "exit code of repfs %s (%s)" % (bad, r.stderr.strip()))


def test_background_mode_and_shutdown():
    h = Host("a")
    r = e2e.run(h.command(), timeout=20, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    check_eq(r.returncode, 0, "exit code in the background mode")
    try:
        # It said that the mount serves: no waiting here.
        check(e2e.is_mounted(h.mnt), "it returned before the mount was there")
        pid = h.repctl("ping", json=True)["pid"]
        h.create("vm1", MIB)
        e2e.pwrite(h.volume("vm1"), 0, b"x" * 4096)
        check_eq(stat.S_IMODE(os.stat(os.path.join(h.store, "control.sock")).st_mode), 0o600, "mode of the control socket")
    finally:
        h.repctl("shutdown", code=None)
        wait_for(lambda: not e2e.is_mounted(h.mnt), "the mount to go after shutdown")
    wait_for(lambda: not os.path.exists("/proc/%d" % pid), "the daemon to end")
    h.repctl("ping", code=3)
    bad = Host("b", options=["--listen", "300.1.1.1:1"], listen=False)
    r = e2e.run(bad.command(), code=None, timeout=60)
    check(r.returncode != 0, "the background mode says 0 for a daemon that could not start")
    check(not e2e.is_mounted(bad.mnt), "a mount is left")


def test_listen_port_zero_and_version():
    h = Host("a", listen=False, options=["--listen", "127.0.0.1:0"]).start()
    doc = h.repctl("status", json=True)
    port = int(doc["listen"].rsplit(":", 1)[1])
    check(port > 0, "listen: %r" % doc["listen"])
    h.repctl("status").says("127.0.0.1:%d" % port)
    v = h.repctl("version", json=True)
    check(v["version"], "version")
    r = e2e.run([e2e.program("repfs"), "-V"])
    check(v["version"] in r.stdout, "repfs -V says %r" % r.stdout)
    e2e.run([e2e.program("repfs"), "-h"])
    h.repctl("--help")
    busy = Host("b", listen=False, options=["--listen", "127.0.0.1:%d" % port])
    r = e2e.run(busy.command("-f"), code=None, timeout=60)
    check(r.returncode != 0 and str(port) in r.stderr, "a port in use: %d %s" % (r.returncode, r.stderr))


def test_mount_helper():
    e2e.need_root()
    helper = shutil.which("mount.fuse3", path="/usr/sbin:/sbin")
    if not helper:
        raise e2e.Skip("no mount.fuse3")
    h = Host("a")
    h.repctl("create", "vm1", "--size", "1M")
    env = dict(os.environ, PATH=e2e.bin_dir() + ":" + os.environ["PATH"])
    # What mount(8) calls; itself it drops PATH, and repfs need not be installed here.
    e2e.run([helper, h.store, h.mnt, "-o", "rw,nosuid,nodev,durability=process,noatime", "-t", "fuse.repfs"], env=env,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        check_eq(os.stat(h.volume("vm1")).st_size, MIB, "size of the volume")
        pid = h.repctl("ping", json=True)["pid"]
    finally:
        e2e.run(["umount", h.mnt], code=None)
    wait_for(lambda: not os.path.exists("/proc/%d" % pid), "the daemon to end after umount")


# ---- the mount -------------------------------------------------------------------------------------------------------


def test_tree_and_modes():
    h, vol = one()
    check_eq(sorted(os.listdir(h.mnt)), ["checkpoints", "clones", "overlays", "status", "volumes"], "the mount's root")
    check_eq(sorted(os.listdir(os.path.join(h.mnt, "overlays", "vm1"))), ["active", "hidden"], "overlays/vm1")
    for f in (h.active("vm1"), h.hidden("vm1")):
        check_eq(os.stat(f).st_size, 16 * MIB, f + ": size")
        check_eq(e2e.allocated(f), 0, f + ": allocated")
        check_eq(e2e.data_extents(f), [], f + ": data")
        check(e2e.errno_of(os.open, f, os.O_RDWR) in (errno.EACCES, errno.EPERM, errno.EROFS), f + " opens for writing")
    with open(os.path.join(h.mnt, "status", "vm1.json")) as f:
        st = json.load(f)
    check_eq(st["schema"], 1, "schema of status/vm1.json")
    g = st["groups"][0] if "groups" in st else st
    check_eq((g["group"], g["role"], g["state"]), ("vm1", "standalone", "NONE"), "status/vm1.json")
    root = os.path.join(h.mnt, "volumes")
    bad = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS, errno.ENOTSUP)
    for what, fn in (("creating", lambda: os.open(root + "/new", os.O_CREAT | os.O_RDWR)), ("unlink", lambda: os.unlink(vol)),
                     ("rename", lambda: os.rename(vol, root + "/x")), ("mkdir", lambda: os.mkdir(root + "/d"))):
        check(e2e.errno_of(fn) in bad, "%s in volumes/ gives %s" % (what, errno.errorcode.get(e2e.errno_of(fn))))
    check_errno(errno.ENOENT, "a name that is not there", os.stat, root + "/nope")
    h.create("vm2", MIB)
    check_eq(os.stat(h.volume("vm2")).st_size, MIB, "a volume just made")
    h.repctl("-y", "delete", "vm2")
    check_errno(errno.ENOENT, "a volume just deleted", os.stat, h.volume("vm2"))
    os.statvfs(h.mnt)


def test_sparse():
    h, vol = one(64 * MIB)
    check_eq(e2e.allocated(vol), 0, "allocated, new")
    check_eq(e2e.data_extents(vol), [], "data, new")
    e2e.pwrite(vol, 10 * MIB, b"x" * MIB)
    e2e.pwrite(vol, 40 * MIB, b"y" * BLOCK, sync=True)
    check_eq(e2e.data_extents(vol), [(10 * MIB, MIB), (40 * MIB, BLOCK)], "data after two writes")
    a = e2e.allocated(vol)
    check(MIB + BLOCK <= a <= MIB + 128 * KIB, "allocated after two writes: %d" % a)
    fd = os.open(vol, os.O_RDONLY)
    check_eq(os.lseek(fd, 0, os.SEEK_HOLE), 0, "SEEK_HOLE at 0")
    check_eq(os.lseek(fd, 10 * MIB + 5, os.SEEK_DATA), 10 * MIB + 5, "SEEK_DATA within data")
    check_eq(os.lseek(fd, 10 * MIB + 5, os.SEEK_HOLE), 11 * MIB, "SEEK_HOLE within data")
    check_errno(errno.ENXIO, "SEEK_DATA behind the last data", os.lseek, fd, 41 * MIB, os.SEEK_DATA)
    check_errno(errno.ENXIO, "SEEK_DATA at the end", os.lseek, fd, 64 * MIB, os.SEEK_DATA)
    os.close(fd)
    copy = os.path.join(h.dir, "copy")
    e2e.run(["cp", "--sparse=auto", vol, copy])
    e2e.check_same(vol, copy, "cp of a sparse volume")
    check(e2e.allocated(copy) <= 2 * MIB, "cp --sparse=auto made %d bytes" % e2e.allocated(copy))
    if shutil.which("qemu-img"):
        m = json.loads(e2e.run(["qemu-img", "map", "--output=json", "-f", "raw", "-U", vol]).stdout)
        got = e2e.merge_extents([(x["start"], x["length"]) for x in m if x["data"]])
        check_eq(got, [(10 * MIB, MIB), (40 * MIB, BLOCK)], "qemu-img map")
    e2e.punch(vol, 10 * MIB, 512 * KIB)
    check_eq(e2e.data_extents(vol), [(10 * MIB + 512 * KIB, 512 * KIB), (40 * MIB, BLOCK)], "data after a punch")
    check(e2e.allocated(vol) <= a - 500 * KIB, "a punch freed nothing")
    check(e2e.allocated(h.disk("vm1")) <= a - 500 * KIB, "a punch freed nothing in the store")


def test_punch_and_zero():
    h, vol = one(8 * MIB)
    image = bytearray(random.Random(2).randbytes(8 * MIB))
    e2e.pwrite(vol, 0, bytes(image))
    rng = random.Random(3)
    for i in range(60):
        off = rng.randrange(8 * MIB - 1)
        n = min(rng.choice((1, 511, 512, 4096, 10000, 70000, MIB)), 8 * MIB - off)
        if i % 3 == 0:
            off -= off % BLOCK
        (e2e.punch if i % 2 else e2e.zero_range)(vol, off, n)
        image[off:off + n] = bytes(n)
        if i % 10 == 9:
            e2e.expect_file(vol, image, "after %d punches and zeroes" % (i + 1))
    fd = os.open(vol, os.O_RDWR)
    check_errno(errno.EOPNOTSUPP, "an unknown fallocate mode", e2e.fallocate, fd, 8, 0, BLOCK)
    got = e2e.errno_of(e2e.fallocate, fd, 0, 0, MIB)
    check(got in (0, errno.EOPNOTSUPP, errno.ENOTSUP), "plain fallocate within the size: %d" % got)
    check(e2e.errno_of(e2e.fallocate, fd, 0, 8 * MIB - 512, MIB) in (errno.EFBIG, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSPC),
          "fallocate grew a volume")
    e2e.errno_of(e2e.punch, vol, 7 * MIB, 4 * MIB)  # over the end: must not grow nor harm
    os.close(fd)
    check_eq(os.stat(vol).st_size, 8 * MIB, "size")


def test_one_punch_over_a_large_volume():
    """It goes out in some fifteen thousand pieces, one after another."""
    size = 15 << 40
    h, vol = one(size)
    e2e.pwrite(vol, size - BLOCK, b"x" * BLOCK)
    for f in (e2e.punch, e2e.zero_range):
        f(vol, 0, size)
        check_eq(e2e.pread(vol, size - BLOCK, BLOCK), bytes(BLOCK), "the last block")
    check_eq(os.stat(vol).st_size, size, "size")


def test_write_forms():
    """Every kind of open sees the same bytes; sub-block and block-crossing writes."""
    h, vol = one(4 * MIB)
    image = bytearray(4 * MIB)
    rng = random.Random(4)
    fds = [os.open(vol, os.O_RDWR), os.open(vol, os.O_RDWR | os.O_DSYNC), os.open(vol, os.O_RDWR | os.O_SYNC)]
    direct = os.open(vol, os.O_RDWR | os.O_DIRECT)
    for i in range(400):
        if i % 4 == 0:
            n = rng.randrange(1, 40) * 512
            off = rng.randrange((4 * MIB - n) // 512) * 512
            data = rng.randbytes(n)
            check_eq(os.pwrite(direct, memoryview(e2e.aligned(data)), off), n, "bytes written")
        else:
            n = rng.choice((1, 7, 512, 1000, 4096, 5000, 40000))
            off = rng.randrange(4 * MIB - n)
            data = rng.randbytes(n)
            check_eq(os.pwrite(rng.choice(fds), data, off), n, "bytes written")
        image[off:off + n] = data
        # read back at once, by another way
        check_eq(os.pread(rng.choice(fds), n, off), data, "a buffered read right after write %d" % i)
        lo, hi = off // 512 * 512, -(-(off + n) // 512) * 512
        m = mmap.mmap(-1, hi - lo)
        os.preadv(direct, [m], lo)
        check(m[:] == bytes(image[lo:hi]), "a direct read right after write %d at %d+%d is old" % (i, off, n))
    for fd in fds + [direct]:
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)
    e2e.expect_file(vol, image, "the volume")
    e2e.expect_file(h.disk("vm1"), image, "the disk in the store")


def test_size_is_fixed():
    h, vol = one(4 * MIB)
    e2e.pwrite(vol, 0, b"A" * 4 * MIB)
    fd = os.open(vol, os.O_RDWR)
    check_errno(errno.EFBIG, "a write at the end", os.pwrite, fd, b"x", 4 * MIB)
    check_errno(errno.EFBIG, "a write behind the end", os.pwrite, fd, b"x" * 100, 5 * MIB)
    e2e.errno_of(os.pwrite, fd, b"A" * 1024, 4 * MIB - 512)  # cut short or refused
    check_eq(os.stat(vol).st_size, 4 * MIB, "size")
    check_eq(os.pread(fd, 100, 4 * MIB), b"", "a read at the end")
    check_eq(len(os.pread(fd, 8192, 4 * MIB - 512)), 512, "a read over the end")
    check_errno(errno.EPERM, "ftruncate to less", os.ftruncate, fd, MIB)
    check_errno(errno.EPERM, "ftruncate to more", os.ftruncate, fd, 8 * MIB)
    check(e2e.errno_of(os.truncate, vol, 8 * MIB) in (errno.EPERM, errno.EFBIG), "truncate grew a volume")
    wait_for(lambda: "resize" in h.log_text(), "a log line that names repctl resize", 5)
    os.close(fd)
    os.close(os.open(vol, os.O_RDWR | os.O_TRUNC))
    check_eq(os.stat(vol).st_size, 4 * MIB, "size after O_TRUNC")
    e2e.check_bytes(vol, 0, 4 * MIB, ord("A"), "content after O_TRUNC")
    fd = os.open(vol, os.O_RDWR | os.O_DIRECT)
    check(e2e.errno_of(os.pwrite, fd, memoryview(e2e.aligned(b"z" * 4096)), 4 * MIB) == errno.EFBIG, "a direct write at the end")
    os.close(fd)
    fd = os.open(vol, os.O_WRONLY | os.O_APPEND)
    check_errno(errno.EFBIG, "an append", os.write, fd, b"x")
    os.close(fd)
    check_eq(os.stat(vol).st_size, 4 * MIB, "size")
    src = os.path.join(h.dir, "image")
    with open(src, "wb") as f:
        f.write(random.Random(5).randbytes(4 * MIB))
    e2e.run(["dd", "if=" + src, "of=" + vol, "bs=64k"])
    e2e.check_same(src, vol, "after dd of=")
    e2e.run(["cp", src, vol])
    e2e.check_same(src, vol, "after cp")
    e2e.run(["dd", "if=/dev/zero", "of=" + vol, "bs=1M", "oflag=direct", "conv=notrunc,fsync", "count=4"])
    e2e.check_bytes(vol, 0, 4 * MIB, 0, "after dd oflag=direct")


def test_mmap_and_coherence():
    h, vol = one(4 * MIB)
    fd = os.open(vol, os.O_RDWR)
    m = mmap.mmap(fd, MIB, mmap.MAP_SHARED)
    m[0:5] = b"first"
    m[500000:500004] = b"deep"
    m.flush()
    check_eq(e2e.pread(vol, 0, 512)[:5], b"first", "a direct read after msync")
    check_eq(e2e.pread(h.disk("vm1"), 500000, 4, direct=False), b"deep", "the store after msync")
    e2e.pwrite(vol, 0, b"direct".ljust(512, b"."))
    check_eq(m[0:6], b"direct", "the mapping after a direct write")
    check_eq(os.pread(fd, 6, 0), b"direct", "a buffered read after a direct write")
    os.pwrite(fd, b"buffered", 8192)
    check_eq(m[8192:8200], b"buffered", "the mapping after a buffered write")
    e2e.punch(vol, 0, 4096)
    check_eq(m[0:8], bytes(8), "the mapping after a punch")
    check_eq(m[500000:500004], b"deep", "the rest of the mapping")
    p = mmap.mmap(fd, BLOCK, mmap.MAP_PRIVATE)
    p[0:3] = b"own"
    check_eq(os.pread(fd, 3, 0), bytes(3), "a private mapping was written back")
    p.close()
    m.close()
    os.close(fd)
    # A direct writer against a buffered reader, who must never see what is older than the last completed write
    stop, wrong, done = threading.Event(), [], [0]

    def reader():
        with open(vol, "rb", buffering=0) as f:
            while not stop.is_set():
                low = done[0]
                v = struct.unpack("<Q", os.pread(f.fileno(), 8, 64 * KIB))[0]
                if v < low:
                    wrong.append((v, low))
                    return

    t = threading.Thread(target=reader)
    t.start()
    dfd = os.open(vol, os.O_RDWR | os.O_DIRECT)
    buf = mmap.mmap(-1, 512)
    end = time.monotonic() + 1.5
    i = 0
    while time.monotonic() < end and not wrong:
        i += 1
        buf[:8] = struct.pack("<Q", i)
        os.pwrite(dfd, buf, 64 * KIB)
        done[0] = i
    stop.set()
    t.join(60)
    os.close(dfd)
    check(not wrong, "a cached read gave write %d after write %d had completed" % (wrong or [(0, 0)])[0])


def test_locks():
    h, vol = one(MIB)
    code = """
import fcntl,os,struct,sys
fd=os.open(sys.argv[1],os.O_RDWR)
l=struct.pack('hhqqi4x',fcntl.F_WRLCK,0,%s,100,0)
try:
    fcntl.fcntl(fd, int(sys.argv[2]), l)
except OSError as e:
    sys.exit(1 if e.errno in (11,13) else 2)
"""
    fd = os.open(vol, os.O_RDWR)
    for kind in (fcntl.F_SETLK, 37):  # POSIX and open file description locks
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 100, 0)
        fcntl.fcntl(fd, kind, lock)
        e2e.run([sys.executable, "-c", code % 50, vol, str(kind)], code=1)
        e2e.run([sys.executable, "-c", code % 200, vol, str(kind)], code=0)
        fcntl.fcntl(fd, kind, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 100, 0))
        e2e.run([sys.executable, "-c", code % 50, vol, str(kind)], code=0)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other = os.open(vol, os.O_RDWR)
    check(e2e.errno_of(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) == errno.EWOULDBLOCK, "flock is not exclusive")
    os.close(other)
    os.close(fd)


def test_copy_file_range():
    h, vol = one(8 * MIB)
    h.create("vm2", 8 * MIB)
    data = random.Random(6).randbytes(2 * MIB)
    e2e.pwrite(vol, MIB, data)

    def copy(src, dst, soff, doff, n):
        a, b = os.open(src, os.O_RDONLY), os.open(dst, os.O_WRONLY)
        try:
            while n:
                got = os.copy_file_range(a, b, n, soff, doff)
                check(got > 0, "copy_file_range copies nothing")
                soff, doff, n = soff + got, doff + got, n - got
        finally:
            os.close(a)
            os.close(b)

    copy(vol, h.volume("vm2"), MIB, 3 * MIB + 100, 2 * MIB)
    check_eq(e2e.pread(h.volume("vm2"), 3 * MIB + 100, 2 * MIB, direct=False), data, "copied between volumes")
    copy(vol, vol, MIB, 5 * MIB, MIB)
    check_eq(e2e.pread(vol, 5 * MIB, MIB), data[:MIB], "copied within a volume")


def test_parallel_direct_writes():
    """64 writers at once, each its own place: all of it there, none elsewhere."""
    h, vol = one(32 * MIB)
    log = e2e.Log({"vm1": 32 * MIB}, unit=512)
    w = e2e.Writer(log, {"vm1": vol}, threads=32, max_units=16, fsync_every=50).start()
    w.wait_ops(1500)
    w.stop()
    log.verify({"vm1": vol}, required=lambda x: x.ok, prefix="stream")
    h.restart()
    log.verify({"vm1": h.volume("vm1")}, required=lambda x: x.ok)
    log.verify({"vm1": h.disk("vm1")}, required=lambda x: x.ok)


def test_fio_verify():
    e2e.need("fio")
    h, vol = one(64 * MIB)
    for engine, direct, depth in (("libaio", 1, 16), ("psync", 0, 1)):
        e2e.run(["fio", "--name=v", "--filename=" + vol, "--size=64M", "--ioengine=" + engine, "--direct=%d" % direct, "--bs=4k",
                 "--iodepth=%d" % depth, "--rw=randwrite", "--io_size=24M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
                 "--output-format=json"], timeout=60, cwd=h.dir)


def test_large_requests_and_many_opens():
    h, vol = one(64 * MIB)
    data = random.Random(7).randbytes(16 * MIB)
    e2e.pwrite(vol, 3 * MIB + 512, data)
    check(e2e.pread(vol, 3 * MIB + 512, 16 * MIB) == data, "16 MiB written and read direct")
    fds = [os.open(vol, os.O_RDONLY) for _ in range(500)]
    for i, fd in enumerate(fds[::50]):
        check(os.pread(fd, 1000, 4 * MIB + i) == data[MIB - 512 + i:][:1000], "one of many opens")
    for fd in fds:
        os.close(fd)


def test_kill9_leaves_enotconn_and_remounts():
    h, vol = one(4 * MIB)
    e2e.pwrite(vol, 0, b"B" * 8192, sync=True)
    fd = os.open(vol, os.O_RDWR | os.O_DIRECT)
    h.kill9()
    check_errno(errno.ENOTCONN, "a write after the daemon's end", os.pwrite, fd, memoryview(e2e.aligned(bytes(512))), 0)
    check_errno(errno.ENOTCONN, "stat after the daemon's end", os.stat, vol)
    h.start()  # over its dead mount, with a handle of the old one still open
    e2e.check_bytes(vol, 0, 8192, ord("B"), "content after kill -9")
    check(e2e.errno_of(os.pread, fd, 512, 0) != 0, "a handle of the dead mount reads")
    e2e.errno_of(os.close, fd)
    # written, not synced: kill -9 of the daemon loses nothing that was answered
    e2e.pwrite(vol, 8192, b"C" * 8192)
    h.kill9()
    h.start()
    e2e.check_bytes(vol, 8192, 8192, ord("C"), "unsynced content after kill -9")


def test_sigterm_with_open_files():
    h, vol = one(4 * MIB)
    fd = os.open(vol, os.O_RDWR)
    h.proc.send_signal(signal.SIGTERM)
    h.expect_dead = True
    h.wait_exit(0, 30)  # it waits for the file at most
    e2e.errno_of(os.close, fd)
    h.start()


def test_corrupt_metadata():
    h, vol = one(MIB)
    h.stop()
    files = [os.path.join(h.store, "groups", f) for f in sorted(os.listdir(os.path.join(h.store, "groups")))]
    files += [os.path.join(h.store, f) for f in sorted(os.listdir(h.store)) if f.startswith("store.")]
    check_eq(len(files), 4, "metadata files: %r" % files)
    good = {f: open(f, "rb").read() for f in files}
    rng = random.Random(8)

    def restore():
        for f, data in good.items():
            with open(f, "wb") as o:
                o.write(data)

    for f in files:  # one copy: repaired from the other
        for damage in ("flip", "empty", "cut", "gone"):
            restore()
            if damage == "gone":
                os.unlink(f)
            else:
                data = bytearray(good[f])
                if damage == "flip":
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                with open(f, "wb") as o:
                    o.write(b"" if damage == "empty" else data if damage == "flip" else data[:len(data) // 2])
            h.repctl("list")
    restore()
    h.start()
    h.stop()
    for name in ("groups/vm1", "store"):
        base = os.path.join(h.store, name)
        restore()
        for copy in (".a", ".b"):
            data = bytearray(open(base + copy, "rb").read())
            data[len(data) // 2] ^= 0x10
            with open(base + copy, "wb") as o:
                o.write(data)
        before = {f: open(f, "rb").read() for f in files}
        if name == "store":
            r = e2e.run(h.command("-f"), code=None, timeout=60)
            check(r.returncode not in (0, None), "a daemon started on corrupt metadata")
            check(h.store in r.stderr and name + ".a" in r.stderr, "the message does not name %s.a: %s" % (base, r.stderr))
        else:  # the store's other groups are served
            h.start()
            unserved = h.repctl("status", "--json").json["unserved"]
            check_eq([(u["group"], u["volumes"]) for u in unserved], [("vm1", [])], "what is not served")
            why = unserved[0]["why"]
            check(h.store in why and name + ".a" in why, "it does not name %s.a: %s" % (base, why))
            h.repctl("create", "vm1", "--size", "1M", code=5).says(name + "[.]a")
            h.repctl("status", "vm1", code=5).says(name + "[.]a")
            h.stop()
        check(not e2e.is_mounted(h.mnt), "a mount is left")
        h.repctl("list", code=1).says(name + "[.]a")
        h.repctl("check", code=1).says(name + "[.]a")
        check_eq({f: open(f, "rb").read() for f in files}, before, "metadata after it was refused")
    restore()
    with open(h.disk("vm1"), "r+b") as f:
        f.truncate(MIB - 512)
    h.start()
    h.repctl("status", "vm1", code=5).says("not served", "backup")
    check(not os.path.exists(h.volume("vm1")), "a disk that lost its tail is served")
    h.stop()
    with open(h.disk("vm1"), "r+b") as f:
        f.truncate(MIB)
    h.start()


def test_terabyte():
    h = Host("a").start()
    h.create("big", 8 * TIB)
    vol = h.volume("big")
    e2e.pwrite(vol, 8 * TIB - BLOCK, b"E" * BLOCK, sync=True)
    fd = os.open(vol, os.O_RDONLY)
    t = time.monotonic()
    check_eq(os.lseek(fd, 0, os.SEEK_DATA), 8 * TIB - BLOCK, "SEEK_DATA over 8 TiB")
    check(time.monotonic() - t < 10, "SEEK_DATA over a hole is slow")
    os.close(fd)
    t = time.monotonic()
    h.kill9()
    h.start()
    check(time.monotonic() - t < 30, "the start with an 8 TiB volume takes %.1f s" % (time.monotonic() - t))
    e2e.check_bytes(vol, 8 * TIB - BLOCK, BLOCK, ord("E"), "the last block")
    check(e2e.SLOW > 1 or h.rss_bytes() < 300 * MIB, "the daemon takes %d MiB" % (h.rss_bytes() / MIB))


if __name__ == "__main__":
    e2e.main()
