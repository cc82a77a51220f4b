#!/bin/bash
# demo.sh: the main job of repfs in a minute, on one machine: two daemons on loopback as two hosts, a volume replicated
# from one to the other, a checkpoint, the overlays growing, the loss of the first host, the failover. Every command is
# printed before it runs, what must hold is checked, and everything is cleaned up.
#
# Debian 12, as root. Builds into build/demo. Exit 0 only if all of it held.
set -u -o pipefail

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
limit_s=120 # for each command that waits for the daemons

if [ "$(id -u)" -ne 0 ]; then
	echo "demo.sh: mounts two filesystems; run it as root" >&2
	exit 2
fi

unset REPFS_STORE CDPATH
work=
daemons=()

fail()
{
	printf '\ndemo.sh: FAILED: %s\n' "$*" >&2
	exit 1
}

cleanup()
{
	local code=$? host pid
	trap - EXIT
	[ -n "$work" ] || exit $code
	cd /
	for pid in "${daemons[@]}"; do
		kill -TERM "$pid" 2>/dev/null
	done
	# Daemons that ended have unmounted; this is for those that could not.
	for pid in "${daemons[@]}"; do
		timeout 15 tail --pid="$pid" -f /dev/null 2>/dev/null || kill -KILL "$pid" 2>/dev/null
	done
	for host in alpha beta; do
		if mountpoint -q "$work/$host/mnt" 2>/dev/null || ! stat "$work/$host/mnt" >/dev/null 2>&1; then
			umount -l "$work/$host/mnt" 2>/dev/null
		fi
	done
	rm -rf --one-file-system "$work"
	exit $code
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say()
{
	echo
	printf '# %s\n' "$@"
}

# run COMMAND: as a user would type it; fails the demo if it fails.
run()
{
	printf '$ %s\n' "$1"
	eval "$1" || fail "'$1' ended with exit code $?"
}

holds()
{
	"${@:2}" || fail "it does not hold that $1"
	printf '  holds: %s\n' "$1"
}

blocks_are()
{
	[ "$(stat -c %b "$1")" = "$2" ]
}

pid_of()
{
	repctl --store "$1" --json ping | sed -n 's/.*"pid": *\([0-9][0-9]*\).*/\1/p'
}

say "Building into $root/build/demo"
"$root/tests/deps.sh" --build-only || fail "what building needs could not be installed"
log=$(mktemp) || exit 1
if ! { cmake -S "$root" -B "$root/build/demo" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBUILD_TESTING=OFF &&
	cmake --build "$root/build/demo" -j "$(nproc)" --target repfs repctl; } >"$log" 2>&1; then
	cat "$log" >&2
	rm -f "$log"
	fail "the build"
fi
rm -f "$log"
export PATH="$root/build/demo:$PATH"

if [ ! -e /dev/fuse ]; then
	modprobe fuse 2>/dev/null
	[ -e /dev/fuse ] || fail "/dev/fuse is missing: the kernel's FUSE is not there"
fi

work=$(mktemp -d /tmp/repfs-demo.XXXXXX) || exit 1
cd "$work" || exit 1
mkdir -p alpha/mnt beta/mnt || exit 1

say "Two hosts. Each has a store and a mount; beta listens, alpha will dial." \
	"(Both are this machine, so the port is picked by the system.)"
run "repfs beta/store beta/mnt --listen 127.0.0.1:0"
beta_pid=$(pid_of beta/store)
daemons+=("${beta_pid:?no daemon}")
run "repfs alpha/store alpha/mnt"
alpha_pid=$(pid_of alpha/store)
daemons+=("${alpha_pid:?no daemon}")
peer=$(repctl --store beta/store status --json | sed -n 's/.*"listen": *"\([^"]*\)".*/\1/p')
[ -n "$peer" ] || fail "the status of beta does not say where it listens"

say "A volume on alpha, replicated to beta. Checkpoints only on command here, so that the demo is the same" \
	"each time; by default there is one every 5 s."
run "repctl --store alpha/store create vm1 --size 64M"
run "repctl --store alpha/store set vm1 checkpoint_interval=0"
run "repctl --store alpha/store --timeout $limit_s protect vm1 --peer $peer --wait"
run "repctl --store alpha/store status vm1"

say "The volume is a file. A VM would be pointed at it; here dd writes 16 MiB."
head -c 16777216 /dev/urandom >first.bin
head -c 8388608 /dev/urandom >second.bin
run "dd if=first.bin of=alpha/mnt/volumes/vm1 bs=1M conv=notrunc,fsync status=none"

say "A checkpoint: from here on beta can go back to this moment."
run "repctl --store alpha/store --timeout $limit_s checkpoint vm1 | tee number"
number=$(cat number)
cp alpha/mnt/volumes/vm1 expected.bin || fail "copying the volume"
run "ls -ls beta/mnt/overlays/vm1"
holds "beta's hidden overlay is empty after the checkpoint" blocks_are beta/mnt/overlays/vm1/hidden 0

say "8 MiB of that is overwritten on alpha. beta follows, and keeps the old blocks in the hidden overlay."
run "dd if=second.bin of=alpha/mnt/volumes/vm1 bs=1M seek=4 conv=notrunc,fsync status=none"
cp alpha/mnt/volumes/vm1 latest.bin || fail "copying the volume"
run "ls -ls beta/mnt/overlays/vm1"
holds "the hidden overlay has grown by exactly 8 MiB" blocks_are beta/mnt/overlays/vm1/hidden 16384
run "repctl --store beta/store extents overlays/vm1/hidden"
run "repctl --store beta/store status vm1"
holds "beta's view is still checkpoint $number" cmp beta/mnt/volumes/vm1 expected.bin

say "alpha is lost, all at once."
run "kill -9 $alpha_pid"
umount -l alpha/mnt 2>/dev/null

say "beta takes over. It goes back to the checkpoint; what came after it is kept as a checkpoint of its own."
run "repctl --store beta/store --timeout $limit_s -y failover vm1 --wait | tee sentence"
holds "the volume on beta is checkpoint $number, byte for byte" cmp beta/mnt/volumes/vm1 expected.bin
received=$(sed -n 's/.*kept as checkpoint \([0-9][0-9]*\).*/\1/p' sentence)
[ -n "$received" ] || fail "failover did not say as which checkpoint all that was received is kept"
holds "checkpoint $received is all that beta had received" cmp "beta/mnt/checkpoints/vm1/$received" latest.bin
run "repctl --store beta/store checkpoints vm1"

say "And it is a live disk."
run "dd if=first.bin of=beta/mnt/volumes/vm1 bs=1M seek=32 conv=notrunc,fsync status=none"
cp expected.bin after.bin && dd if=first.bin of=after.bin bs=1M seek=32 conv=notrunc status=none || exit 1
holds "what is written on beta is there" cmp beta/mnt/volumes/vm1 after.bin
holds "checkpoint $number is untouched by that" cmp "beta/mnt/checkpoints/vm1/$number" expected.bin
run "repctl --store beta/store status vm1"

say "All of it held."
