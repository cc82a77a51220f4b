"""End-to-end test helpers: hosts, pairs of them, a TCP proxy with faults, a write log and its checker, a test runner.

Only the standard library. A test file imports this module, defines functions test_NAME(), and ends with
`repfs_e2e.main()`. Each test gets its hosts from host() or Pair(); the runner closes whatever a test left open,
whatever happened: processes are killed, mounts detached, files removed.

Two rules keep these tests honest: nothing is synchronised by sleeping (wait_for polls a real condition with a
deadline), and every wait is bounded: a watchdog aborts the FUSE connections of a test that overruns, so that even a
request stuck in the kernel comes back and the test fails with a message.

Environment: REPFS_BIN (folder of repfs and repctl; default build/dev, then build), TMPDIR, REPFS_E2E_KEEP=1 (leave
the files), REPFS_E2E_STRICT=1 (a skipped test is a failure), REPFS_E2E_SLOW (factor for all time limits, for
sanitizer builds and slow machines; above 1 memory is not measured).
"""

import atexit
import collections
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
SLOW = float(os.environ.get("REPFS_E2E_SLOW", "1"))
KIB = 1024
MIB = 1024 * 1024
GIB = 1024 * MIB
TIB = 1024 * GIB
BLOCK = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class Skip(Exception):
    """The machine cannot run this test; the text says why."""


class TestError(AssertionError):
    pass


def check(cond, what, *details):
    """An assertion with a message; details (shown on failure) may be functions."""
    if not cond:
        text = what
        for d in details:
            text += "\n    " + str(d() if callable(d) else d)
        raise TestError(text)


def check_eq(got, want, what):
    check(got == want, "%s: got %r, expected %r" % (what, got, want))


def wait_for(fn, what, timeout=60.0, interval=0.02, ignore=()):
    """Polls fn until it is true; returns its value."""
    timeout *= SLOW
    end = time.monotonic() + timeout
    last = None
    while True:
        try:
            value = fn()
            if value:
                return value
            last = value
        except ignore as e:
            last = e
        if time.monotonic() > end:
            raise TestError("waited %.1f s for %s; last seen: %r" % (timeout, what, last))
        time.sleep(interval)


# ---- programs and folders --------------------------------------------------------------------------------------------


def bin_dir():
    for d in (os.environ.get("REPFS_BIN"), os.path.join(ROOT, "build", "dev"), os.path.join(ROOT, "build")):
        if d and os.access(os.path.join(d, "repfs"), os.X_OK):
            return os.path.abspath(d)
    raise SystemExit("repfs is not built: build/dev/repfs is missing (or set REPFS_BIN)")


def program(name):
    return os.path.join(bin_dir(), name)


def sanitizer_runtimes():
    """The shared libraries of the sanitizers that the daemon is built with."""
    return re.findall(r"=> (/\S*/lib[at]san\.so\S*)", run(["ldd", program("repfs")]).stdout)


def build_dir(name):
    """A folder for things that are made once and kept: the VM's kernel."""
    d = os.path.join(os.environ.get("REPFS_BUILD", os.path.join(ROOT, "build")), name)
    os.makedirs(d, exist_ok=True)
    return d


def need(*tools):
    for t in tools:
        if shutil.which(t) is None:
            raise Skip("%s is not installed" % t)


def need_root():
    if os.geteuid() != 0:
        raise Skip("needs root")


_base = None
_base_lock = threading.Lock()


def tmp(name=None):
    """A fresh folder; short, for a control socket's path has 107 characters at most."""
    global _base
    with _base_lock:
        if _base is None:
            _base = tempfile.mkdtemp(prefix="repfs-e2e.")
            atexit.register(_remove_base)
    if name is None:
        return tempfile.mkdtemp(dir=_base, prefix="t")
    d = os.path.join(_base, name)
    os.makedirs(d, exist_ok=True)
    return d


def _remove_base():
    if _base is None:
        return
    close_all()
    for m in mounts_below(_base):
        _umount(m)
    if os.environ.get("REPFS_E2E_KEEP"):
        print("files kept in %s" % _base)
    elif not mounts_below(_base):
        shutil.rmtree(_base, ignore_errors=True)


_resources = []


def track(resource):
    """resource.close() is called at the end of the test, last made first."""
    _resources.append(resource)
    return resource


def close_all():
    problems = []
    while _resources:
        r = _resources.pop()
        try:
            r.close()
        except Exception as e:  # noqa: the others must be closed too
            problems.append("%s: %s" % (type(r).__name__, e))
    return problems


def close_or_fail():
    """In the middle of a test: ends what it has made so far, and fails if one of it did not end well."""
    problems = close_all()
    if problems:
        raise TestError("; ".join(problems))


def mountinfo():
    """[(mount point, minor device, type, source)]"""
    out = []
    with open("/proc/self/mountinfo") as f:
        for line in f:
            left, _, right = line.partition(" - ")
            fields = left.split()
            point = fields[4].encode().decode("unicode_escape")
            right = right.split()
            out.append((point, int(fields[2].split(":")[1]), right[0], right[1]))
    return out


def mounts_below(path):
    path = os.path.abspath(path)
    return [m[0] for m in mountinfo() if m[0] == path or m[0].startswith(path + "/")][::-1]


def is_mounted(path):
    path = os.path.abspath(path)
    return any(m[0] == path for m in mountinfo())


def _umount(path):
    if os.geteuid() == 0:
        subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL, timeout=30)
    else:
        subprocess.run(["fusermount3", "-u", "-z", path], stderr=subprocess.DEVNULL, timeout=30)


def fuse_abort(path):
    """Ends every request of a FUSE mount with an error; what a hung daemon leaves waiting comes back."""
    for point, minor, kind, _ in mountinfo():
        if point == os.path.abspath(path) and kind.startswith("fuse"):
            control = "/sys/fs/fuse/connections/%d/abort" % minor
            with contextlib.suppress(OSError):
                if not os.path.exists(control):
                    subprocess.run(["mount", "-t", "fusectl", "none", "/sys/fs/fuse/connections"],
                                   stderr=subprocess.DEVNULL, timeout=10)
                with open(control, "w") as f:
                    f.write("1")


_ports_given = set()


def free_port():
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port not in _ports_given:
            _ports_given.add(port)
            return port


def run(cmd, code=0, timeout=60.0, **kw):
    """subprocess.run with a limit; the exit code must be `code` (None: any)."""
    kw.setdefault("stdout", subprocess.PIPE)
    kw.setdefault("stderr", subprocess.PIPE)
    kw.setdefault("text", True)
    kw.setdefault("stdin", subprocess.DEVNULL if "input" not in kw else None)
    if "input" in kw:
        kw.pop("stdin")
    r = subprocess.run(cmd, timeout=timeout * SLOW, **kw)
    if code is not None and r.returncode != code:
        raise TestError("%s: exit %d, expected %d\n    stdout: %s\n    stderr: %s"
                        % (" ".join(map(str, cmd)), r.returncode, code, r.stdout, r.stderr))
    return r


# ---- a host ----------------------------------------------------------------------------------------------------------

TWICE = re.compile(r"^repctl: (\S+ \S+: )\1", re.M)
CRASH = re.compile(r"AddressSanitizer|LeakSanitizer|ThreadSanitizer|runtime error:|(PRE|POST|INVARIANT|UNREACHABLE)\b.*fail"
                   r"|Assertion .* failed|stack smashing|double free|corrupted size|malloc\(\)|free\(\): ")


class Answer:
    """What repctl printed."""

    def __init__(self, args, r):
        self.args, self.code, self.out, self.err = args, r.returncode, r.stdout, r.stderr

    def __str__(self):
        return "repctl %s: exit %d\n    stdout: %s\n    stderr: %s" % (" ".join(self.args), self.code, self.out, self.err)

    @property
    def json(self):
        try:
            doc = json.loads(self.out)
        except ValueError as e:
            raise TestError("%s\n    is not one JSON document: %s" % (self, e))
        check_eq(doc.get("schema"), 1, "schema of %s" % self)
        return doc

    def says(self, *words):
        text = self.out + self.err
        for w in words:
            check(re.search(w, text, re.I), "%s\n    does not say /%s/" % (self, w))
        return self


class CtlError(Exception):
    def __init__(self, doc):
        super().__init__("%s (exit %s): %s" % (doc.get("code"), doc.get("exit"), doc.get("message")))
        self.exit, self.message = doc.get("exit"), doc.get("message")


class Host:
    """One daemon with its store and mount."""

    def __init__(self, name="a", listen=True, durability="process", netns=None, addr="127.0.0.1", insecure=False,
                 store=None, options=(), folder=None, env=None):
        self.name = name
        self.dir = folder or tmp()
        self.store = store or os.path.join(self.dir, name)
        self.mnt = os.path.join(self.dir, "m" + name)
        self.log = os.path.join(self.dir, name + ".log")
        os.makedirs(self.mnt, exist_ok=True)
        self.netns, self.addr, self.durability, self.insecure = netns, addr, durability, insecure
        self.port = free_port() if listen else None
        self.options = list(options)
        self.env = dict(os.environ, **(env or {}))
        self.proc = None
        self.expect_dead = True
        self.errors = []
        track(self)

    # -- life

    def prefix(self):
        return ["nsenter", "--net=/run/netns/" + self.netns] if self.netns else []

    @property
    def listen(self):
        return "%s:%d" % (self.addr, self.port)

    def command(self, *extra):
        cmd = self.prefix() + [program("repfs"), self.store, self.mnt]
        if self.port is not None:
            cmd += ["--listen", self.listen]
        if self.durability:
            cmd += ["--durability", self.durability]
        if self.insecure:
            cmd += ["--insecure"]
        return cmd + self.options + list(extra)

    def start(self, wait=True, timeout=60.0):
        check(self.proc is None, "host %s runs already" % self.name)
        self.logf = open(self.log, "ab")
        self.logf.write(b"---- start\n")
        self.logf.flush()
        # In the test's own thread the daemon dies with it, even if it is killed.
        pre = ["setpriv", "--pdeathsig", "KILL"] if threading.current_thread() is threading.main_thread() else []
        self.proc = subprocess.Popen(pre + self.command("-f"), stdin=subprocess.DEVNULL, stdout=self.logf,
                                     stderr=self.logf, cwd="/", env=self.env)
        self.expect_dead = False
        if wait:
            self.wait_ready(timeout)
        return self

    def wait_ready(self, timeout=60.0):
        def ready():
            if self.proc is not None and self.proc.poll() is not None:
                raise TestError("host %s: repfs ended with %d at its start\n%s" % (self.name, self.proc.returncode, self.log_tail()))
            return self.ctl("ping")

        wait_for(ready, "host %s to answer" % self.name, timeout, ignore=(OSError, CtlError))
        check(is_mounted(self.mnt), "host %s answers before its mount is there" % self.name)

    def running(self):
        return self.proc is not None and self.proc.poll() is None

    def pid(self):
        return self.proc.pid

    def _gone(self):
        self.proc = None
        self.expect_dead = True
        self.logf.close()

    def wait_exit(self, code=0, timeout=60.0):
        try:
            got = self.proc.wait(timeout * SLOW)
        except subprocess.TimeoutExpired:
            raise TestError("host %s does not end\n%s" % (self.name, self.log_tail()))
        self._gone()
        if code is not None:
            check(got == code, "host %s ended with %d, expected %d" % (self.name, got, code), self.log_tail)
        return got

    def stop(self, timeout=60.0):
        """SIGTERM; must end cleanly, the mount gone."""
        self.expect_dead = True
        self.proc.terminate()
        self.wait_exit(0, timeout)
        check(not is_mounted(self.mnt), "host %s: still mounted after a clean end" % self.name)

    def kill9(self):
        self.expect_dead = True
        self.proc.kill()
        self.proc.wait(30)
        check_eq(self.proc.returncode, -signal.SIGKILL, "host %s was to be killed; how it ended" % self.name)
        self._gone()

    def restart(self):
        self.stop()
        return self.start()

    def close(self):
        died = None
        if self.proc is not None:
            code = self.proc.poll()
            if code is not None:
                died = None if self.expect_dead else code
            else:
                self.expect_dead = True
                self.proc.terminate()
                try:
                    self.proc.wait(60 * SLOW)
                    if self.proc.returncode != 0:
                        died = self.proc.returncode
                except subprocess.TimeoutExpired:
                    died = "no end within 60 s of SIGTERM"
                    fuse_abort(self.mnt)
                    self.proc.kill()
                    self.proc.wait(10)
            self._gone()
        if is_mounted(self.mnt):
            fuse_abort(self.mnt)
            _umount(self.mnt)
        crash = CRASH.search(self.log_text())
        if crash:
            raise TestError("host %s: its log says '%s'\n%s" % (self.name, crash.group(0), self.log_tail()))
        if died is not None:
            raise TestError("host %s: repfs ended by itself or badly: %s\n%s" % (self.name, died, self.log_tail()))

    def log_text(self):
        try:
            with open(self.log, errors="replace") as f:
                return f.read()
        except OSError:
            return ""

    def log_tail(self, n=25):
        lines = self.log_text().splitlines()
        return "    log of host %s:\n      " % self.name + "\n      ".join(lines[-n:])

    # -- control

    def repctl(self, *args, code=0, json=False, timeout=60.0, input=None, text=True):
        """Runs repctl; the exit code must be `code` (None: any; or a tuple). With json: the document."""
        args = [str(a) for a in args]
        cmd = [program("repctl"), "--store", self.store] + (["--json"] if json else []) + args
        kw = {"input": input} if input is not None else {}
        r = Answer(args, run(cmd, code=None, timeout=timeout, text=text, **kw))
        err = r.err if text else r.err.decode(errors="replace")
        check(not CRASH.search(err), "repctl itself fails: %s" % r)
        check(not TWICE.search(err), "what was asked stands twice in: %s" % r)
        codes = code if isinstance(code, tuple) else (code,)
        check(code is None or r.code in codes, "on host %s: exit code is not %s: %s" % (self.name, code, r), self.log_tail)
        return r.json if json and r.code == 0 else r

    def ctl(self, verb, timeout=60.0, **args):
        """The control socket itself (docs/control.md): quick, for polling. Raises CtlError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(timeout * SLOW)
            s.connect(os.path.join(self.store, "control.sock"))
            s.sendall(json.dumps({"verb": verb, "args": args}).encode() + b"\n")
            buf = b""
            while True:
                while b"\n" not in buf:
                    part = s.recv(65536)
                    if not part:
                        raise ConnectionError("control socket of %s: closed without an answer" % self.name)
                    buf += part
                line, _, buf = buf.partition(b"\n")
                doc = json.loads(line)
                if "ok" in doc:
                    if not doc["ok"]:
                        raise CtlError(doc)
                    return doc["result"]

    def status(self, group):
        return self.ctl("status", name=group)["groups"][0]

    def wait_status(self, group, timeout=60.0, **want):
        """Waits until the group's status has these values (a value may be a tuple of choices)."""
        seen = {}

        def right():
            st = self.status(group)
            seen.update({k: st[k] for k in list(want) + ["role", "state", "link", "reasons", "error"]})
            return all(st[k] in v if isinstance(v, tuple) else st[k] == v for k, v in want.items()) and st

        try:
            return wait_for(right, "host %s, group %s: %s" % (self.name, group, want), timeout,
                            ignore=(OSError, CtlError))
        except TestError as e:
            raise TestError("%s\n    status: %s\n%s" % (e, seen, self.log_tail()))

    def wait_synced(self, group, timeout=60.0):
        return self.wait_status(group, timeout, link="SYNCED", state="RUNNING")

    # -- files

    def volume(self, name):
        return os.path.join(self.mnt, "volumes", name)

    def active(self, name):
        return os.path.join(self.mnt, "overlays", name, "active")

    def hidden(self, name):
        return os.path.join(self.mnt, "overlays", name, "hidden")

    def checkpoint_file(self, name, n="latest"):
        return os.path.join(self.mnt, "checkpoints", name, str(n))

    def disk(self, name):
        return os.path.join(self.store, "volumes", name, "disk.raw")

    def create(self, name, size, group=None):
        self.repctl("create", name, "--size", size, *(["--group", group] if group else []))
        return self.volume(name)

    def rss_bytes(self):
        with open("/proc/%d/status" % self.pid()) as f:
            for line in f:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        return 0


class Pair:
    """Two hosts, a (dials) and b (listens), with a proxy between them when asked for. a is meant to be the primary."""

    def __init__(self, proxy=False, durability="process", start=True, folder=None, **kw):
        self.dir = folder or tmp()
        self.a = Host("a", listen=True, durability=durability, folder=self.dir, **kw)
        self.b = Host("b", listen=True, durability=durability, folder=self.dir, **kw)
        self.proxy = Proxy(("127.0.0.1", self.b.port)) if proxy else None
        if start:
            self.a.start()
            self.b.start()

    @property
    def peer(self):
        return self.proxy.address if self.proxy else self.b.listen

    def protect(self, *volumes, group="vm1", size=16 * MIB, protocol="F", interval=0, wait=True, **settings):
        """Creates the volumes on a, protects the group, sets the settings. Returns the primary's paths."""
        volumes = volumes or ("vm1",)
        have = {v["name"] for v in self.a.ctl("list")["volumes"]}
        for v in volumes:
            if v not in have:
                self.a.create(v, size, group)
        self.a.repctl("protect", group, "--peer", self.peer, "--protocol", protocol, *(["--wait"] if wait else []))
        kv = ["checkpoint_interval=%s" % interval] + ["%s=%s" % i for i in settings.items()]
        self.a.repctl("set", group, *kv)
        if wait:
            self.a.wait_synced(group)
            self.b.wait_synced(group)
        return [self.a.volume(v) for v in volumes]

    def checkpoint(self, group="vm1"):
        return int(self.a.repctl("checkpoint", group).out)

    def same(self, *volumes):
        """Both disks are equal, byte for byte, as the stores hold them."""
        for v in volumes or ("vm1",):
            check_same(self.a.disk(v), self.b.disk(v), "the disks of %s on both hosts" % v)


class Tmpfs:
    """A small filesystem of its own."""

    def __init__(self, size):
        need_root()
        self.path = tmp()
        run(["mount", "-t", "tmpfs", "-o", "size=%d,mode=0755" % size, "none", self.path])
        track(self)

    def fill(self, leave=0):
        """Takes all space but `leave` bytes; returns the ballast's path."""
        path = os.path.join(self.path, "ballast")
        with open(path, "ab", buffering=0) as f:
            while True:
                st = os.statvfs(self.path)
                n = max(0, st.f_bavail * st.f_frsize - leave)
                try:
                    if n:
                        os.posix_fallocate(f.fileno(), os.fstat(f.fileno()).st_size, n)
                    return path
                except OSError as e:  # somebody else has taken some of it meanwhile
                    if e.errno != errno.ENOSPC:
                        raise

    def close(self):
        for m in mounts_below(self.path):
            run(["umount", "-l", m], code=None)


class LoopFs:
    """A small ext4 of its own; freeze(): whoever writes to it waits, in the kernel, until thaw()."""

    def __init__(self, size):
        need_root()
        need("mkfs.ext4", "fsfreeze", "losetup")
        d = tmp()
        self.path = os.path.join(d, "fs")
        os.mkdir(self.path)
        image = os.path.join(d, "image")
        with open(image, "wb") as f:
            f.truncate(size)
        run(["mkfs.ext4", "-q", "-F", image])
        if run(["mount", "-o", "loop", image, self.path], code=None).returncode != 0:
            raise Skip("loop devices cannot be had here")
        self.frozen = False
        track(self)

    def freeze(self):
        run(["fsfreeze", "-f", self.path])
        self.frozen = True

    def thaw(self):
        if self.frozen:
            run(["fsfreeze", "-u", self.path])
            self.frozen = False

    def close(self):
        self.thaw()
        run(["umount", "-l", self.path], code=None)


class BadIo:
    """Makes file operations of the daemons that get its env fail (tests/preload/badio.c)."""

    def __init__(self):
        lib = os.path.join(bin_dir(), "libbadio.so")
        check(os.path.exists(lib), "%s is not built" % lib)
        self.rules = os.path.join(tmp(), "rules")
        # A sanitizer's runtime has to come first; what it intercepts goes on to the library then.
        self.env = {"LD_PRELOAD": " ".join(sanitizer_runtimes() + [lib]), "REPFS_BADIO": self.rules}

    def fail(self, ops, pattern, code=errno.EIO):
        with open(self.rules + ".new", "w") as f:
            f.write("%s %d %s\n" % (ops, code, pattern))
        os.rename(self.rules + ".new", self.rules)

    def mend(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.rules)


# ---- a proxy with faults ---------------------------------------------------------------------------------------------


class _Pipe:
    """One direction of one connection: a reader fills a bounded queue, a writer empties it after the delay."""

    LIMIT = 64 * MIB

    def __init__(self, conn, src, dst):
        self.conn, self.src, self.dst = conn, src, dst
        self.queue = collections.deque()
        self.bytes = 0
        self.eof = False
        self.cond = threading.Condition()

    def start(self):
        for fn in (self._read, self._write):
            threading.Thread(target=fn, daemon=True).start()

    def _read(self):
        try:
            while True:
                data = self.src.recv(256 * KIB)
                with self.cond:
                    if not data:
                        self.eof = True
                        self.cond.notify_all()
                        return
                    while (self.bytes > self.LIMIT or self.conn.proxy.stalled.is_set()) and not self.conn.dead:
                        self.cond.wait(0.1)
                    self.queue.append((time.monotonic(), data))
                    self.bytes += len(data)
                    self.cond.notify_all()
                if self.conn.dead:
                    return
        except OSError:
            self.conn.reset()

    def _write(self):
        proxy = self.conn.proxy
        try:
            while not self.conn.dead:
                with self.cond:
                    if not self.queue:
                        if self.eof:
                            break
                        self.cond.wait(0.1)
                        continue
                    due = self.queue[0][0] + proxy.delay
                    wait = due - time.monotonic()
                    if proxy.stalled.is_set() or wait > 0:
                        self.cond.wait(min(0.05, max(wait, 0.002)))
                        continue
                    _, data = self.queue.popleft()
                if proxy.mangle is not None:
                    data = proxy.mangle(self.src is self.conn.client, data)
                self.dst.sendall(data)
                with self.cond:
                    self.bytes -= len(data)
                    self.cond.notify_all()
                proxy.forwarded += len(data)
            if not self.conn.dead:
                self.dst.shutdown(socket.SHUT_WR)
        except OSError:
            self.conn.reset()


class _Conn:
    def __init__(self, proxy, client):
        self.proxy, self.client, self.dead = proxy, client, False
        self.server = socket.create_connection(proxy.target, timeout=5)
        for s in (client, self.server):
            s.settimeout(None)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pipes = (_Pipe(self, client, self.server), _Pipe(self, self.server, client))

    def reset(self):
        """RST to both ends; what was not delivered is gone."""
        self.dead = True
        for s in (self.client, self.server):
            with contextlib.suppress(OSError):
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RD)
            with contextlib.suppress(OSError):
                s.close()


class Proxy:
    """Forwards TCP to `target`.

    cut(): resets what is connected; new connections are taken. down(): the same, and new ones are refused until up().
    lose(): the host on the far side is gone: nothing undelivered arrives any more, connections are reset, new ones refused.
    stall()/unstall(): nothing is taken or forwarded in either direction, nothing is closed. delay: seconds, each way.
    mangle: None or a function (from_client, bytes) -> bytes.
    """

    def __init__(self, target):
        self.target = target
        self.delay = 0.0
        self.stalled = threading.Event()
        self.mangle = None
        self.forwarded = 0
        self.conns = []
        self.lock = threading.Lock()
        self.port = free_port()
        self.listener = None
        self.closed = False
        self.up()
        track(self)

    @property
    def address(self):
        return "127.0.0.1:%d" % self.port

    def up(self):
        with self.lock:
            if self.listener is not None:
                return
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", self.port))
            s.listen(64)
            self.listener = s
        threading.Thread(target=self._accept, args=(s,), daemon=True).start()

    def _accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                conn = _Conn(self, client)
            except OSError:
                client.close()
                continue
            with self.lock:
                if self.listener is not listener:
                    conn.reset()
                    return
                self.conns = [c for c in self.conns if not c.dead] + [conn]
            for pipe in conn.pipes:  # not before a cut() finds it: what has been forwarded was connected
                pipe.start()

    def cut(self):
        with self.lock:
            conns, self.conns = self.conns, []
        for c in conns:
            c.reset()

    def down(self):
        with self.lock:
            listener, self.listener = self.listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    lose = down

    def stall(self):
        self.stalled.set()

    def unstall(self):
        self.stalled.clear()

    def connections(self):
        with self.lock:
            return sum(not c.dead for c in self.conns)

    def close(self):
        self.down()


# ---- plain I/O -------------------------------------------------------------------------------------------------------


def aligned(data):
    """The bytes in memory that O_DIRECT takes."""
    m = mmap.mmap(-1, max(len(data), 1))
    m[:len(data)] = data
    return m


@contextlib.contextmanager
def opened(path, flags, direct):
    """The first error counts: that of close() (at the end of a mount: ECONNABORTED) hides none."""
    fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)


def pwrite(path, off, data, direct=True, sync=False):
    with opened(path, os.O_WRONLY, direct) as fd:
        m = aligned(data)
        done = 0
        with memoryview(m) as view:
            while done < len(data):
                done += os.pwrite(fd, view[done:done + min(len(data) - done, 4 * MIB)], off + done)
        if sync:
            os.fsync(fd)


def pread(path, off, length, direct=True):
    with opened(path, os.O_RDONLY, direct) as fd:
        m = mmap.mmap(-1, max(length, 1))
        done = 0
        with memoryview(m) as view:
            while done < length:
                n = os.preadv(fd, [view[done:length]], off + done)
                if n == 0:
                    break
                done += n
        return m[:done]


def fsync(path):
    with opened(path, os.O_WRONLY, False) as fd:
        os.fsync(fd)


FALLOC_KEEP, FALLOC_PUNCH, FALLOC_ZERO = 1, 2, 16


def fallocate(path_or_fd, mode, off, length):
    given = contextlib.nullcontext(path_or_fd) if isinstance(path_or_fd, int) else opened(path_or_fd, os.O_WRONLY, False)
    with given as fd:
        r = _libc.fallocate(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_long(off), ctypes.c_long(length))
        if r != 0:
            e = ctypes.get_errno()
            raise OSError(e, os.strerror(e))


def punch(path, off, length):
    fallocate(path, FALLOC_PUNCH | FALLOC_KEEP, off, length)


def zero_range(path, off, length):
    fallocate(path, FALLOC_ZERO | FALLOC_KEEP, off, length)


def errno_of(fn, *args, **kw):
    """The errno that fn raises; 0 if it does not."""
    try:
        fn(*args, **kw)
    except OSError as e:
        return e.errno
    return 0


def check_errno(want, what, fn, *args, **kw):
    got = errno_of(fn, *args, **kw)
    names = [errno.errorcode.get(e, str(e)) for e in (got, want)]
    check(got == want, "%s: got %s, expected %s" % (what, names[0] if got else "success", names[1]))


def data_extents(path):
    """[(offset, length)] by SEEK_DATA and SEEK_HOLE."""
    out = []
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        pos = 0
        while pos < size:
            try:
                pos = os.lseek(fd, pos, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:
                    break
                raise
            end = os.lseek(fd, pos, os.SEEK_HOLE)
            check(end > pos, "%s: SEEK_HOLE from data at %d gives %d" % (path, pos, end))
            out.append((pos, end - pos))
            pos = end
    finally:
        os.close(fd)
    return merge_extents(out)


def merge_extents(extents):
    out = []
    for off, length in sorted(extents):
        if out and out[-1][0] + out[-1][1] >= off:
            out[-1] = (out[-1][0], max(out[-1][0] + out[-1][1], off + length) - out[-1][0])
        elif length:
            out.append((off, length))
    return out


def allocated(path):
    return os.stat(path).st_blocks * 512


def sha(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while True:
            part = f.read(MIB)
            if not part:
                return h.hexdigest()
            h.update(part)


def check_same(path_a, path_b, what, direct=False):
    """Both files are equal; the first difference is told."""
    with open(path_a, "rb", buffering=0) as a, open(path_b, "rb", buffering=0) as b:
        check_eq(os.fstat(a.fileno()).st_size, os.fstat(b.fileno()).st_size, what + ": sizes")
        off = 0
        while True:
            x, y = a.read(MIB), b.read(MIB)
            if x != y:
                n = min(len(x), len(y))
                i = next((i for i in range(n) if x[i] != y[i]), n)
                sectors = sum(x[j:j + 512] != y[j:j + 512] for j in range(0, n, 512))
                raise TestError("%s differ at %d (block %d); %d sectors of this MiB differ\n    %s: %s\n    %s: %s"
                                % (what, off + i, (off + i) // BLOCK, sectors, path_a, x[i:i + 24].hex(), path_b, y[i:i + 24].hex()))
            if not x:
                return
            off += len(x)


def check_bytes(path, off, length, byte, what, direct=True):
    got = pread(path, off, length, direct)
    check_eq(len(got), length, what + ": bytes read")
    want = bytes([byte]) * length
    if got != want:
        i = next(i for i in range(length) if got[i] != byte)
        raise TestError("%s: at %d there is 0x%02x, expected 0x%02x" % (what, off + i, got[i], byte))


def expect_file(path, image, what):
    """The whole file equals the bytes."""
    got = pread(path, 0, len(image), direct=False)
    check_eq(len(got), len(image), what + ": size")
    if got != bytes(image):
        i = next(i for i in range(len(image)) if got[i] != image[i])
        raise TestError("%s: differs first at %d (block %d): 0x%02x, expected 0x%02x" % (what, i, i // BLOCK, got[i], image[i]))


# ---- a log of writes, and what an image may hold ---------------------------------------------------------------------

_HEAD = struct.Struct("<8sIIQQ")
_MAGIC = b"rfs-blk\n"
_NOISE = random.Random(20240229).randbytes(MIB + 8192)


def pattern(volume, unit, counter, size):
    """What write `counter` puts into unit `unit` of volume `volume`: no two of these are equal."""
    key = (volume * 0x9E3779B1 + unit * 0x85EBCA77 + counter * 0xC2B2AE3D) & 0xFFFFFFFF
    at = (key ^ (key >> 13)) % MIB
    return _HEAD.pack(_MAGIC, volume, size, unit, counter) + _NOISE[at:at + size - _HEAD.size]


class Write:
    __slots__ = ("id", "vol", "unit", "n", "zero", "start", "done", "ok")

    def __init__(self, id_, vol, unit, n, zero):
        self.id, self.vol, self.unit, self.n, self.zero = id_, vol, unit, n, zero
        self.start = time.monotonic_ns()
        self.done = None
        self.ok = False


class Flush:
    __slots__ = ("start", "done", "ok")

    def __init__(self):
        self.start = time.monotonic_ns()
        self.done = None
        self.ok = False


class Log:
    """Every write and flush of one group, with the times between which it took effect.

    Times are the log's only claims: a write that ended before another began came before it. A write that failed may
    or may not have happened, but nothing of it happens after its failure was reported and another write answered.
    """

    def __init__(self, sizes, unit=BLOCK):
        self.sizes = dict(sizes)  # volume name: bytes
        self.unit = unit
        self.index = {v: i + 1 for i, v in enumerate(sorted(self.sizes))}
        self.lock = threading.Lock()
        self.writes, self.flushes = [], []
        self.by_unit = {}  # (volume, unit): [Write]

    def begin(self, vol, unit, n, zero=False):
        with self.lock:
            w = Write(len(self.writes) + 1, vol, unit, n, zero)
            self.writes.append(w)
            for u in range(unit, unit + n):
                self.by_unit.setdefault((vol, u), []).append(w)
        return w

    def content(self, w):
        if w.zero:
            return bytes(w.n * self.unit)
        return b"".join(pattern(self.index[w.vol], u, w.id, self.unit) for u in range(w.unit, w.unit + w.n))

    @staticmethod
    def end(x, ok=True):
        x.done = time.monotonic_ns()
        x.ok = ok

    def begin_flush(self):
        with self.lock:
            f = Flush()
            self.flushes.append(f)
        return f

    # -- what has to be there

    def completed_before(self, t):
        """Writes that had ended by t."""
        return lambda w: w.ok and w.done < t

    def flushed_before(self, t):
        """Writes that had ended when a flush began that had ended by t."""
        with self.lock:
            last = max((f.start for f in self.flushes if f.ok and f.done < t), default=-1)
        return lambda w: w.ok and w.done < last

    # -- reading an image

    def found(self, path, vol):
        """{unit: Write or None (zeroes)} for the whole file; a unit that is no write's content is an error."""
        out = {}
        vi, size, unit = self.index[vol], self.sizes[vol], self.unit
        zero = bytes(unit)
        step = MIB
        with open(path, "rb", buffering=0) as f:
            check_eq(os.fstat(f.fileno()).st_size, size, path + ": size")
            for base in range(0, size, step):
                want = min(step, size - base)
                data = b""
                while len(data) < want:
                    part = f.read(want - len(data))
                    check(part, "%s: ends early" % path)
                    data += part
                if data == bytes(len(data)):
                    for u in range(base // unit, (base + len(data)) // unit):
                        out[u] = None
                    continue
                for o in range(0, len(data), unit):
                    u = (base + o) // unit
                    got = data[o:o + unit]
                    if got == zero:
                        out[u] = None
                        continue
                    magic, v, s, n, counter = _HEAD.unpack_from(got)
                    check(magic == _MAGIC, "%s: unit %d holds foreign bytes: %s" % (path, u, got[:32].hex()))
                    check((v, s, n) == (vi, unit, u), "%s: unit %d holds what was written to unit %d of volume %d" % (path, u, n, v))
                    check(0 < counter <= len(self.writes), "%s: unit %d holds an unknown write %d" % (path, u, counter))
                    check(got == pattern(vi, u, counter, unit), "%s: unit %d is torn (write %d)" % (path, u, counter))
                    w = self.writes[counter - 1]
                    check(w.vol == vol and w.unit <= u < w.unit + w.n and not w.zero,
                          "%s: unit %d holds write %d, which did not go there" % (path, u, counter))
                    out[u] = w
        return out

    def verify(self, images, required=None, newest=None, prefix=None, what="image"):
        """images: {volume: path}. Every unit holds one of its writes, such that
        required(write): no write that has to be there is missing or undone by an older one;
        newest: nothing that began after this time is there;
        prefix "stream": all of it together is one prefix of the stream; "barrier": everything up to a flush, and any of
        what came after it."""
        found = {v: self.found(p, v) for v, p in images.items()}
        horizon = -1
        for units in found.values():
            for w in units.values():
                if w is not None:
                    check(newest is None or w.start <= newest,
                          "%s: write %d is there and began %.3f s too late" % (what, w.id, (w.start - (newest or 0)) / 1e9))
                    horizon = max(horizon, w.start)
        if prefix == "barrier":
            horizon = max((f.start for f in self.flushes if f.ok and f.done < horizon), default=-1)
        elif prefix is None:
            horizon = -1
        with self.lock:  # the writer may be at work
            by_unit = [(k, list(v)) for k, v in self.by_unit.items() if k[0] in found]
        for (vol, u), writes in by_unit:
            w = found[vol][u]
            must = [x for x in writes if x.ok and ((required is not None and required(x)) or x.done < horizon)]
            if not must:
                continue
            if w is not None:
                choices = [w]
            else:  # zeroes: as made, or one of the zero writes
                choices = [None] + [x for x in writes if x.zero and (newest is None or x.start <= newest)]
            for c in choices:
                done = -1 if c is None else (c.done if c.done is not None else 1 << 62)
                if not any(x.start > done for x in must):
                    break
            else:
                m = max(must, key=lambda x: x.start)
                why = "has to be there" if required is not None and required(m) else "came before others that are there"
                raise TestError("%s: %s, unit %d holds %s; write %d (zero=%s, ended %.3f s before the end of the log) %s"
                                % (what, vol, u, "zeroes" if w is None else "write %d" % w.id, m.id, m.zero,
                                   (self._end() - m.done) / 1e9, why))
        return found

    def _end(self):
        return max([w.done for w in self.writes if w.done] + [f.done for f in self.flushes if f.done] + [0])


class Writer:
    """Threads that write, punch and flush random places of volumes through O_DIRECT and log it.

    Without overlap each thread has places of its own, so the last write to a unit is always known."""

    def __init__(self, log, paths, threads=4, max_units=8, fsync_every=25, zero_ratio=0.04, overlap=False, seed=None,
                 direct=True, pace=0.0, span=None):
        self.log, self.paths = log, dict(paths)
        self.threads_n, self.max_units, self.fsync_every, self.zero_ratio = threads, max_units, fsync_every, zero_ratio
        self.overlap, self.direct, self.pace = overlap, direct, pace
        self.span = span
        self.seed = seed if seed is not None else random.randrange(1 << 30)
        self.stop_flag = threading.Event()
        self.paused = threading.Event()
        self.threads, self.errors = [], []
        self.idle = threading.Semaphore(0)
        self.slowest_write = self.slowest_flush = 0.0
        self.ops = 0
        self.current = {}
        self.lock = threading.Lock()
        track(self)

    def start(self):
        self.stop_flag.clear()
        self.paused.clear()
        self.errors = []
        self.threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(self.threads_n)]
        for t in self.threads:
            t.start()
        return self

    def _op(self, rng, fds, i):
        log = self.log
        vol = rng.choice(sorted(fds))
        units = min(self.span or log.sizes[vol], log.sizes[vol]) // log.unit
        group = 16
        if self.overlap:
            unit = rng.randrange(units)
            n = min(rng.randint(1, self.max_units), units - unit)
        else:
            slots = units // group
            slot = rng.randrange(slots // self.threads_n) * self.threads_n + i
            at = rng.randrange(group)
            n = min(rng.randint(1, self.max_units), group - at)
            unit = slot * group + at
        zero = rng.random() < self.zero_ratio
        w = log.begin(vol, unit, n, zero)
        t = time.monotonic()
        self.current[i] = t
        try:
            if zero:
                mode = FALLOC_PUNCH if rng.random() < 0.5 else FALLOC_ZERO
                fallocate(fds[vol], mode | FALLOC_KEEP, unit * log.unit, n * log.unit)
            else:
                data = log.content(w)
                got = os.pwrite(fds[vol], memoryview(aligned(data)), unit * log.unit)
                check(got == len(data), "a short write: %d of %d" % (got, len(data)))
        except BaseException:
            log.end(w, False)
            raise
        finally:
            self.current.pop(i, None)
        log.end(w)
        self.slowest_write = max(self.slowest_write, time.monotonic() - t)

    def _flush(self, rng, fds, i):
        f = self.log.begin_flush()
        t = time.monotonic()
        self.current[i] = t
        try:
            fd = fds[rng.choice(sorted(fds))]
            (os.fsync if rng.random() < 0.5 else os.fdatasync)(fd)
        except BaseException:
            self.log.end(f, False)
            raise
        finally:
            self.current.pop(i, None)
        self.log.end(f)
        self.slowest_flush = max(self.slowest_flush, time.monotonic() - t)

    def _run(self, i):
        rng = random.Random(self.seed * 1000 + i)
        fds = {}
        try:
            for v, p in self.paths.items():
                fds[v] = os.open(p, os.O_RDWR | (os.O_DIRECT if self.direct else 0))
            while not self.stop_flag.is_set():
                if self.paused.is_set():
                    self.idle.release()
                    while self.paused.is_set() and not self.stop_flag.is_set():
                        time.sleep(0.002)
                    continue
                self._op(rng, fds, i)
                if self.fsync_every and rng.randrange(self.fsync_every) == 0:
                    self._flush(rng, fds, i)
                with self.lock:
                    self.ops += 1
                if self.pace:
                    time.sleep(self.pace)
        except Exception as e:  # an I/O error ends this thread; the test asks for it
            self.errors.append(e)
        finally:
            for fd in fds.values():
                with contextlib.suppress(OSError):
                    os.close(fd)

    def alive(self):
        return any(t.is_alive() for t in self.threads)

    def wait_ops(self, n, timeout=60.0):
        """Waits until n more operations have ended."""
        target = self.ops + n
        wait_for(lambda: self.ops >= target or self.errors, "%d writes to go through (seed %d)" % (n, self.seed), timeout)
        self.check_errors()

    def check_errors(self):
        if self.errors:
            raise TestError("the writer met an error: %r" % self.errors[0])

    def pause(self, timeout=60.0):
        """Returns when no operation is under way."""
        while self.idle.acquire(blocking=False):
            pass
        self.paused.set()
        for t in self.threads:
            if not self.idle.acquire(timeout=timeout * SLOW):
                self.check_errors()
                raise TestError("a write or flush of the writer hangs for %.0f s" % (timeout * SLOW))
        self.check_errors()

    def resume(self):
        self.paused.clear()

    def stop(self, errors_ok=False, timeout=60.0):
        self.stop_flag.set()
        end = time.monotonic() + timeout * SLOW
        for t in self.threads:
            t.join(max(0.0, end - time.monotonic()))
        hung = [t for t in self.threads if t.is_alive()]
        check(not hung, "%d writer threads hang in I/O for %.0f s" % (len(hung), timeout * SLOW))
        self.threads = []
        if not errors_ok:
            self.check_errors()
        return self

    def stuck(self):
        """Seconds that the longest operation under way has taken."""
        now = time.monotonic()
        return max((now - t for t in list(self.current.values())), default=0.0)

    def close(self):
        self.stop_flag.set()


# ---- runner ----------------------------------------------------------------------------------------------------------


class _Watchdog:
    """Makes a test that overruns fail: its FUSE requests are aborted and its daemons killed, so every wait ends."""

    def __init__(self, name, limit):
        self.name, self.limit = name, limit
        self.fired = False
        self.done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        if self.done.wait(self.limit):
            return
        self.fired = True
        print("  watchdog: %s runs for %.0f s, ending its daemons" % (self.name, self.limit), flush=True)
        for t, frame in sys._current_frames().items():
            if t == threading.main_thread().ident:
                print("".join(traceback.format_stack(frame)[-6:]), flush=True)
        for r in list(_resources):
            if isinstance(r, Host):
                print(r.log_tail(), flush=True)
                fuse_abort(r.mnt)
                if r.running():
                    r.expect_dead = True
                    r.proc.kill()
        if not self.done.wait(45 * SLOW):
            print("FAIL %s: hangs even so" % self.name, flush=True)
            close_all()
            os._exit(1)


def _terminated(signum, _frame):
    raise KeyboardInterrupt("signal %d" % signum)


def main(limit=240.0, tests=None):
    """Runs the calling file's tests: all, or those whose name contains one of the arguments."""
    scope = sys.modules["__main__"].__dict__
    if tests is None:
        tests = [(n[5:], f) for n, f in scope.items() if n.startswith("test_") and callable(f)]
    args = [a for a in sys.argv[1:] if not a.startswith("-")]
    if "--list" in sys.argv:
        print("\n".join(n for n, _ in tests))
        return
    if args:
        tests = [t for t in tests if any(a in t[0] for a in args)]
        if not tests:
            print("no test matches %s" % " ".join(args))
            sys.exit(2)
    signal.signal(signal.SIGTERM, _terminated)
    os.environ.pop("REPFS_STORE", None)
    failed, skipped, begun = [], [], time.monotonic()
    file = os.path.basename(sys.argv[0])
    for name, fn in tests:
        t = time.monotonic()
        dog = _Watchdog(name, getattr(fn, "limit", limit) * SLOW)
        problem = None
        try:
            fn()
        except Skip as e:
            skipped.append(name)
            print("skip %s: %s" % (name, e), flush=True)
        except KeyboardInterrupt:
            print("interrupted in %s" % name)
            close_all()
            sys.exit(130)
        except (TestError, subprocess.TimeoutExpired) as e:
            where = traceback.extract_tb(e.__traceback__)
            lines = [f for f in where if os.path.basename(f.filename) != os.path.basename(__file__)]
            problem = "%s\n    at %s" % (e, "; ".join("%s:%d" % (os.path.basename(f.filename), f.lineno) for f in lines))
        except BaseException:
            problem = traceback.format_exc()
        # What a failed test's hosts said is worth seeing.
        tails = [r.log_tail(12) for r in _resources if isinstance(r, Host)] if problem else []
        left = close_all()
        if left:  # a daemon that ended by itself is most often why the test failed
            problem = "\n    ".join(([problem] if problem else []) + left)
        if dog.fired and not problem:
            problem = "took longer than %.0f s" % dog.limit
        dog.done.set()
        if problem:
            failed.append(name)
            print("FAIL %s (%.1f s): %s" % (name, time.monotonic() - t, problem), flush=True)
            for tail in tails:
                if tail not in problem:
                    print(tail, flush=True)
        elif name not in skipped:
            print("ok %s (%.1f s)" % (name, time.monotonic() - t), flush=True)
    if skipped and os.environ.get("REPFS_E2E_STRICT"):
        failed += skipped
    print("%s: %d tests, %d failed, %d skipped, %.1f s" % (file, len(tests), len(failed), len(skipped), time.monotonic() - begun),
          flush=True)
    sys.exit(1 if failed else 0)


def limit(seconds):
    """Decorator: this test's own time limit."""
    def deco(fn):
        fn.limit = seconds
        return fn
    return deco
