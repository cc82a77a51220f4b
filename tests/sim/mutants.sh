#!/bin/bash
# Planted bugs that the simulator has to find: tests/sim/mutants/*.patch, each a rule of the contract broken once.
#
#   mutants.sh --check           every patch applies to the tree (quick)
#   mutants.sh [NAME...]         builds each in a copy of the tree and runs seeds until something is found; a table
#     --seeds N                  at most so many seeds (2000)
#     --jobs N                   so many mutants at a time (2)
#
# A mutant that is not found means that the model or the mix of operations is too weak. Exit 1 then.
set -u

root=$(cd "$(dirname "$0")/../.." && pwd)
dir=$root/tests/sim/mutants
seeds=2000 jobs=2 check=
names=()
while [ $# -gt 0 ]; do
	case $1 in
	--check) check=1 ;;
	--seeds) seeds=$2; shift ;;
	--jobs) jobs=$2; shift ;;
	*) names+=("$1") ;;
	esac
	shift
done
if [ ${#names[@]} -eq 0 ]; then
	for p in "$dir"/*.patch; do
		names+=("$(basename "$p" .patch)")
	done
fi

field() # PATCH KEY
{
	sed -n "s/^$2: //p;/^--- /q" "$1"
}

if [ -n "$check" ]; then
	bad=0
	for name in "${names[@]}"; do
		patch -p1 -s -f --dry-run -F2 -d "$root" <"$dir/$name.patch" >/dev/null ||
			{ echo "tests/sim/mutants/$name.patch does not apply any more: make it fit what it breaks now"; bad=1; }
	done
	echo "${#names[@]} mutants"
	exit $bad
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/repfs-mutants-XXXXXX")
trap 'rm -rf "$work"' EXIT
cp -r "$dir" "$work/mutants" && dir=$work/mutants # the tree may change meanwhile
export CCACHE_NOHASHDIR=1
launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_C_COMPILER_LAUNCHER=ccache)

# Copies of the tree, one a job, kept over its mutants: only what a patch touches is built again.
for ((j = 0; j < jobs; j++)); do
	mkdir -p "$work/$j"
	(cd "$root" && git ls-files -z | tar --null -T - -cf -) | tar -xf - -C "$work/$j"
	(cd "$work/$j" && cmake --preset dev -DREPFS_WERROR=OFF "${launcher[@]}") >"$work/$j.log" 2>&1 || { cat "$work/$j.log"; exit 2; }
done

# The drivers of the tree as it is: what they find too was not planted.
(
	export CCACHE_BASEDIR=$work/0
	cmake --build "$work/0/build/dev" --target sim sim_image && cp "$work/0/build/dev/sim" "$work/0/build/dev/sim_image" "$work"
) >"$work/base.log" 2>&1 || { cat "$work/base.log"; exit 2; }

fails_anyway() # DRIVER SEED
{
	case $1 in
	sim) ! timeout 600 "$work/sim" --seed "$2" ;;
	sim_image) ! timeout 600 "$work/sim_image" --replay "seed:$2" ;;
	esac >/dev/null 2>&1
}

# One mutant in copy $2: a line of the table.
run() # NAME COPY
{
	export CCACHE_BASEDIR=$work/$2
	local name=$1 tree=$work/$2 patch=$dir/$1.patch driver rule out n=- said=
	driver=$(field "$patch" Driver) rule=$(field "$patch" Rule)
	if ! patch -p1 -s -f -F2 -d "$tree" <"$patch" >/dev/null; then
		said="DOES NOT APPLY"
	elif ! cmake --build "$tree/build/dev" --target "$driver" -j2 >"$work/$name.log" 2>&1; then
		said="DOES NOT BUILD: $(grep -m1 error "$work/$name.log")"
	else
		out=$(timeout 3600 "$tree/build/dev/$driver" --seeds "$seeds" 2>&1)
		if [ $? -eq 0 ]; then
			said="NOT FOUND in $seeds seeds"
		else
			n=$(sed -n 's/.*seed[: ]\([0-9]*\).*/\1/p' <<<"$out" | head -1)
			fails_anyway "$driver" "$n" && said="NOT FOUND before seed $n, which fails without it"
			[ -n "${said-}" ] || said=$(grep -m1 -E 'seed [0-9]+|^  ' <<<"$out" | sed 's/^sim: seed [0-9]*,* *//;s/^ *//' | cut -c1-150)
		fi
	fi
	patch -p1 -s -f -F2 -R -d "$tree" <"$patch" >/dev/null 2>&1
	printf '%-26s %-20s %6s  %s\n' "$name" "$rule" "$n" "$said" | tee -a "$work/table.$2"
}

printf '%-26s %-20s %6s  %s\n' mutant rule seeds "what was said"
for ((j = 0; j < jobs; j++)); do
	(for ((i = j; i < ${#names[@]}; i += jobs)); do run "${names[i]}" "$j"; done) &
done
wait
missed=$(cat "$work"/table.* | grep -cE 'NOT FOUND|DOES NOT')
echo "${#names[@]} mutants, $missed not found"
[ "$missed" -eq 0 ]
