"""A Linux guest under QEMU whose serial console takes commands: one line in, its output and its exit code back.

KVM is tried first, with a short limit, once per run; where it does not boot a stock kernel, TCG is used.
"""

import os
import queue
import re
import subprocess
import threading
import time

import repfs_e2e as e2e

KVM_LIMIT_S = 5.0
_accel = None


def image():
    """The folder with vmlinuz and initrd.gz; made when it is not there."""
    out = e2e.build_dir("vm")
    r = subprocess.run([os.path.join(e2e.ROOT, "tests", "vm", "build.sh"), out], stdout=subprocess.DEVNULL,
                       stderr=subprocess.PIPE, text=True, timeout=400)
    if r.returncode != 0:
        raise e2e.Skip("the guest cannot be built: " + r.stderr.strip())
    return out


def accel():
    """"kvm" if a guest boots under it, else "tcg"."""
    global _accel
    if _accel is None:
        _accel = "tcg"
        if os.access("/dev/kvm", os.R_OK | os.W_OK):
            g = Guest([], accel_="kvm", boot_limit=KVM_LIMIT_S)
            try:
                g.wait_up()
                _accel = "kvm"
            except e2e.TestError:
                pass
            finally:
                g.kill()
        print("  guests run under %s" % _accel, flush=True)
    return _accel


class Guest:
    """disks: paths of raw images, /dev/vda and on, opened with cache=none and native AIO as a careful user would."""

    def __init__(self, disks, name="guest", accel_=None, boot_limit=60.0, memory=256, aio="native"):
        e2e.need("qemu-system-x86_64")
        vm = image()
        self.name, self.boot_limit = name, boot_limit
        cmd = ["qemu-system-x86_64", "-accel", accel_ or accel(), "-m", str(memory), "-smp", "1",
               "-kernel", os.path.join(vm, "vmlinuz"), "-initrd", os.path.join(vm, "initrd.gz"),
               "-append", "console=ttyS0 panic=-1 quiet random.trust_cpu=on mitigations=off tsc=unstable",
               "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", "-nic", "none"]
        for d in disks:
            cmd += ["-drive", "file=%s,if=virtio,format=raw,cache=none,aio=%s,discard=unmap,detect-zeroes=off" % (d, aio)]
        self.proc = subprocess.Popen(cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines = queue.Queue()
        self.console = []
        self.up = False
        threading.Thread(target=self._read, daemon=True).start()
        e2e.track(self)

    def _read(self):
        for raw in self.proc.stdout:
            line = raw.decode(errors="replace").rstrip("\r\n")
            self.console.append(line)
            self.lines.put(line)
        self.lines.put(None)

    def tail(self, n=20):
        return "    console of %s:\n      " % self.name + "\n      ".join(self.console[-n:])

    def expect(self, regex, timeout):
        """The lines up to and with the first that matches."""
        out = []
        end = time.monotonic() + timeout * e2e.SLOW
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise e2e.TestError("%s: no line /%s/ within %.0f s\n%s" % (self.name, regex, timeout, self.tail()))
            if line is None:
                raise e2e.TestError("%s: QEMU ended (%s) before a line /%s/\n%s" % (self.name, self.proc.poll(), regex, self.tail()))
            out.append(line)
            if re.search(regex, line):
                return out

    def wait_up(self):
        self.expect(r"^@@ up ", self.boot_limit)
        self.up = True
        return self

    def sh(self, line, code=0, timeout=60.0):
        """Runs one line in the guest's shell; returns what it printed. code None: any."""
        if not self.up:
            self.wait_up()
        self.send(line)
        return self.result(line, code, timeout)

    def send(self, line):
        self.proc.stdin.write(line.encode() + b"\n")
        self.proc.stdin.flush()

    def result(self, line, code=0, timeout=60.0):
        out = self.expect(r"@@ rc=\d+$", timeout)
        m = re.search(r"^(.*)@@ rc=(\d+)$", out[-1])
        out[-1] = m.group(1)
        text = "\n".join(out).strip("\n")
        e2e.check(code is None or int(m.group(2)) == code,
                  "%s: %r ended with %s:\n%s" % (self.name, line, m.group(2), text), self.tail)
        return text

    def sums(self, line, timeout=60.0):
        """{file: checksum} out of the SUM lines that `line` prints."""
        return dict(re.findall(r"^SUM (\S+) ([0-9a-f]{64})$", self.sh(line, timeout=timeout), re.M))

    def mkfs(self, dev, where=None):
        self.sh("/e2fs/mke2fs -q -F -t ext4 %s" % dev)
        if where:
            self.sh("mount -t ext4 %s %s" % (dev, where))

    def put(self, where, name, kib):
        """A file of random bytes, written and fsynced; its checksum."""
        got = self.sums("put %s %s %d" % (where, name, kib))
        e2e.check(list(got) == [name], "%s: put %s gave %r" % (self.name, name, got))
        return got[name]

    def fsck(self, dev):
        """Replays the journal as a mount would, then checks everything: the second run must find nothing."""
        self.sh("/e2fs/e2fsck -p %s" % dev, code=None, timeout=120)
        self.sh("/e2fs/e2fsck -fn %s" % dev, timeout=120)

    def poweroff(self, timeout=40.0):
        self.send("sync; poweroff -f")
        try:
            self.proc.wait(timeout * e2e.SLOW)
        except subprocess.TimeoutExpired:
            raise e2e.TestError("%s does not power off\n%s" % (self.name, self.tail()))

    def kill(self):
        """As when the host dies: at once, no flush."""
        if self.proc.poll() is None:
            self.proc.kill()
        self.proc.wait(60)

    def close(self):
        self.kill()
        for f in (self.proc.stdin, self.proc.stdout):
            try:
                f.close()
            except (OSError, ValueError):
                pass
