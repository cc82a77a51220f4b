#!/bin/bash
# deps.sh [--build-only]: installs what building (and, without the option, testing) needs. Debian 12, as root; quick
# when everything is there.
set -u

build="gcc cmake ninja-build pkg-config libc6-dev libfuse3-dev libjansson-dev libisal-dev libxxhash-dev libzstd-dev zlib1g-dev
	libinih-dev libsmartcols-dev scdoc"
test="clang-14 clang-format clang-tidy libclang-rt-14-dev fuse3 libcriterion-dev fio qemu-system-x86 qemu-utils
	busybox-static cpio iproute2 python3 e2fsprogs psmisc attr procps util-linux
	strace zstd"

case ${1-} in
'') packages="$build $test" ;;
--build-only) packages=$build ;;
*)
	echo "usage: deps.sh [--build-only]" >&2
	exit 2
	;;
esac

missing=()
for package in $packages; do
	dpkg -s "$package" 2>/dev/null | grep -q '^Status: install ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ]; then
	echo "deps.sh: missing: ${missing[*]}; run it as root, or: apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "deps.sh: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
options=(-q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
apt-get "${options[@]}" update && apt-get "${options[@]}" install --no-install-recommends "${missing[@]}" || {
	echo "deps.sh: apt-get could not install ${missing[*]}" >&2
	exit 1
}
