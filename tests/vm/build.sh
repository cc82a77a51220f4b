#!/bin/bash
# build.sh [OUT]: makes OUT/vmlinuz and OUT/initrd.gz (default build/vm) for the tests that boot a guest. The kernel is
# Debian's linux-image-cloud-amd64, unpacked, not installed; the initramfs holds busybox-static, the virtio modules, and
# this machine's mke2fs, e2fsck and dumpe2fs with the libraries they need. Made once; -f makes it again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
force=
if [ "${1:-}" = -f ]; then force=1; shift; fi
out=${1:-$here/../../build/vm}
mkdir -p "$out"
out=$(cd "$out" && pwd)

exec 9>"$out/.lock"
flock 9
if [ -z "$force" ] && [ -s "$out/vmlinuz" ] && [ "$out/initrd.gz" -nt "$here/init" ] && [ "$out/initrd.gz" -nt "$here/build.sh" ]; then
	exit 0
fi

fail() {
	echo "build.sh: $*" >&2
	exit 1
}
for tool in apt-get dpkg-deb cpio gzip ldd; do
	command -v "$tool" >/dev/null || fail "$tool is missing; tests/deps.sh installs what the tests need"
done
PATH=$PATH:/usr/sbin:/sbin
busybox=$(command -v busybox) || fail "busybox is missing: apt-get install busybox-static"
if ldd "$busybox" 2>/dev/null | grep -q '=>'; then
	fail "$busybox is not static: apt-get install busybox-static"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ ! -d "$out/kernel/boot" ]; then
	package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
	[ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64: apt-get update"
	(cd "$work" && timeout 300 apt-get -q download -o APT::Sandbox::User=root "$package" >&2) || fail "cannot download $package"
	dpkg-deb -x "$work"/*.deb "$work/kernel"
	rm -rf "$out/kernel"
	mkdir -p "$out/kernel"
	mv "$work/kernel/boot" "$work/kernel/lib" "$out/kernel/"
fi
modules=$(echo "$out"/kernel/lib/modules/*/kernel)

root=$work/root
mkdir -p "$root"/{bin,e2fs,dev,proc,sys,tmp,etc,lib/mod,a,b}
cp "$busybox" "$root/bin/busybox"
install -m 755 "$here/init" "$root/init"
: >"$root/etc/mtab"

# A module and, before it, what it depends on; /lib/mod/order says in which order to load them.
add_module() {
	local name=$1 file dep
	grep -qx "$name" "$root/lib/mod/order" 2>/dev/null && return
	file=$(find "$modules" \( -name "$name.ko" -o -name "${name//_/-}.ko" \) -print -quit)
	[ -n "$file" ] || return 0 # built into the kernel
	for dep in $(grep -aoz 'depends=[^[:cntrl:]]*' "$file" | tr '\0' '\n' | sed -n 's/^depends=//p' | tr ',' ' '); do
		add_module "$dep"
	done
	cp "$file" "$root/lib/mod/$name.ko"
	echo "$name" >>"$root/lib/mod/order"
}
for m in virtio_pci virtio_blk ext4 crc32c_generic crc32c; do
	add_module "$m"
done

# This machine's e2fsprogs with their libraries at the same paths; called by path, as busybox prefers applets of its own.
for tool in mke2fs e2fsck dumpe2fs; do
	file=$(command -v "$tool") || fail "$tool is missing: apt-get install e2fsprogs"
	cp -L "$file" "$root/e2fs/$tool"
	ldd "$file" | awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\/.*ld-/ { print $1 }' >>"$work/libs"
done
sort -u "$work/libs" | while read -r lib; do
	mkdir -p "$root$(dirname "$lib")"
	cp -L "$lib" "$root$lib"
done
if [ -f /etc/mke2fs.conf ]; then cp /etc/mke2fs.conf "$root/etc/"; fi

(cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc --quiet -R 0:0 | gzip -1) >"$out/initrd.gz.new"
cp "$out"/kernel/boot/vmlinuz-* "$out/vmlinuz.new"
mv "$out/vmlinuz.new" "$out/vmlinuz"
mv "$out/initrd.gz.new" "$out/initrd.gz"
