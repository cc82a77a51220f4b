#!/bin/bash
# timeout: 3000
# long_56_fuzz_qcow.sh [SECONDS]: fuzzes the reader of qcow images (tests/fuzz/fuzz_qcow.c) under AddressSanitizer and UBSan for ten
# minutes, from small images of each kind that qemu-img makes.
set -eu
cd "$(dirname "$0")/../.."
seconds=${1-600}

command -v clang-14 >/dev/null && command -v qemu-img >/dev/null || {
	echo "needs clang-14 and qemu-img"
	exit 77
}
cmake --preset fuzz >/dev/null
cmake --build build/fuzz --target fuzz_qcow >/dev/null

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
seeds=$dir/seeds
mkdir "$seeds" "$dir/corpus"
{ head -c 1500 /dev/zero; seq 2000; head -c 3000 /dev/zero; } | head -c 12288 >"$dir/src.raw"
qemu-img convert -O qcow "$dir/src.raw" "$seeds/v1"
qemu-img convert -c -O qcow "$dir/src.raw" "$seeds/v1c" || true # fails at its last, empty write
for compat in 0.10 1.1; do
	for cluster in 512 4096; do
		qemu-img convert -O qcow2 -o compat=$compat,cluster_size=$cluster "$dir/src.raw" "$seeds/$compat-$cluster"
		qemu-img convert -c -O qcow2 -o compat=$compat,cluster_size=$cluster "$dir/src.raw" "$seeds/$compat-${cluster}c"
	done
	qemu-img create -q -f qcow2 -b "$dir/src.raw" -F raw -o compat=$compat,cluster_size=512 "$seeds/$compat-over"
	qemu-io -f qcow2 -c 'write -P 3 1k 3k' -c 'discard 2k 512' -c 'write -z 3k 1k' -c 'write -z -u 8k 1k' \
		"$seeds/$compat-over" >/dev/null
	qemu-img snapshot -c one "$seeds/$compat-over"
done
qemu-img create -q -f qcow2 -o lazy_refcounts=on,cluster_size=512,preallocation=metadata "$seeds/pre" 8k
for option in extended_l2=on compression_type=zstd,cluster_size=4096; do
	qemu-img create -q -f qcow2 -o $option "$seeds/$option" 8k
done
find "$seeds" -size +64k -exec truncate -s 64k {} +

chrt -i 0 build/fuzz/fuzz_qcow -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1 \
	-artifact_prefix="$dir/" "$dir/corpus" "$seeds" >"$dir/log" 2>&1 || {
	tail -60 "$dir/log"
	for f in "$dir"/crash-* "$dir"/timeout-* "$dir"/oom-* "$dir"/leak-*; do
		[ -f "$f" ] && mkdir -p build/log && cp "$f" build/log/ && echo "kept: build/log/$(basename "$f")"
	done
	exit 1
}
tail -12 "$dir/log"
