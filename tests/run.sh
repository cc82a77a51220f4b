#!/bin/bash
# run.sh [--fast] [--long]: installs what is needed, builds, runs every test, and says what failed.
#
#   (plain)  preset dev with its ctest tests, the unit tests under AddressSanitizer and UBSan, tests/e2e/test_*
#   --fast   preset dev with its ctest tests, no more
#   --long   200,000 seeds in the simulator instead of 2,000, also some under AddressSanitizer and UBSan, the stress
#            programs and tests/e2e/test_* with daemons under AddressSanitizer and UBSan and under ThreadSanitizer, and
#            tests/e2e/long_*
#
# Two tests run at a time. One line a test, when it has ended: PASS, FAIL or SKIP, its name, its seconds. The last line is `N passed, N failed`, with `, N skipped`
# behind if there were any; exit 0 only if none failed. Each test's output is in build/log. An end-to-end test is an
# executable .sh or .py file: exit 0 passed, 77 skipped (and says why), else failed. It may raise its time limit by a line
# `# timeout: SECONDS` among its first 20. REPFS_TEST_FILTER (a regular expression) picks tests by name.
set -u
set -o pipefail

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
cd "$root" || exit 2
fast=0 long=0
for arg in "$@"; do
	case $arg in
	--fast) fast=1 ;;
	--long) long=1 ;;
	*)
		echo "usage: run.sh [--fast] [--long]" >&2
		exit 2
		;;
	esac
done

[ $long -eq 1 ] && export REPFS_SIM_SEEDS=${REPFS_SIM_SEEDS-200000}

log_dir=$root/build/log
build_timeout_s=3600
ctest_timeout_s=1800
[ $long -eq 1 ] && ctest_timeout_s=36000
e2e_timeout_s=1200
long_timeout_s=7200
tail_lines=40
slots=2
filter=${REPFS_TEST_FILTER-}
passed=0 failed=0 skipped=0
failures=()

rm -rf "$log_dir"
mkdir -p "$log_dir" || exit 2

# For a test that makes the terminal or the environment matter.
export LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
unset REPFS_STORE NO_COLOR CDPATH

# seconds_since START [NOW]
seconds_since()
{
	local now=${2-$EPOCHREALTIME} us
	us=$((${now/[.,]/} - ${1/[.,]/}))
	printf '%d.%d' $((us / 1000000)) $((us / 100000 % 10))
}

# report RESULT NAME START LOG [END]
report()
{
	printf '%s %s %s s\n' "$1" "$2" "$(seconds_since "$3" "${5-$EPOCHREALTIME}")"
	case $1 in
	PASS) passed=$((passed + 1)) ;;
	SKIP)
		skipped=$((skipped + 1))
		grep -v '^[[:space:]]*$' "$4" | tail -n 1 | sed 's/^/    /'
		;;
	FAIL)
		failed=$((failed + 1))
		failures+=("$2")
		# What failed may lie far above the end in a log of many tests.
		grep -nE '\[(FAIL|----)\]|ERROR: |runtime error:|WARNING: ThreadSanitizer|does not hold at' "$4" |
			head -n $tail_lines | cut -c 1-300 | sed 's/^/    line /'
		echo "    ---- the end of $4"
		sed '/^[0-9]*% tests passed/,$d' "$4" | tail -n $tail_lines | sed 's/^/    /'
		echo "    ----"
		;;
	esac
}

finish()
{
	if [ $failed -gt 0 ]; then
		echo "failed: ${failures[*]}"
	fi
	local line="$passed passed, $failed failed"
	[ $skipped -gt 0 ] && line="$line, $skipped skipped"
	echo "$line"
	[ $failed -eq 0 ] && [ $passed -gt 0 ]
	exit
}

wanted()
{
	[ -z "$filter" ] || [[ $1 =~ $filter ]]
}

# step NAME COMMAND...: a step that the rest needs. Silent unless it fails.
step()
{
	local name=$1 start=$EPOCHREALTIME log=$log_dir/$1.log
	shift
	if timeout -k 10 $build_timeout_s "$@" </dev/null >"$log" 2>&1; then
		printf 'done %s %s s\n' "$name" "$(seconds_since "$start")"
		return 0
	fi
	report FAIL "$name" "$start" "$log"
	return 1
}

build_preset()
{
	step "configure-$1" cmake --preset "$1" && step "build-$1" cmake --build --preset "$1"
}

# Tests run `slots` at a time: most of an end-to-end test is waiting, and a unit test uses one core.
running=()
trap 'kill $(jobs -p) 2>/dev/null' EXIT

# collect: reports those of the running tests that have ended, in the order of their start.
collect()
{
	local entry name log start code end left=()
	for entry in "${running[@]}"; do
		IFS=$'\t' read -r name start log <<<"$entry"
		if [ ! -e "$log.end" ]; then
			left+=("$entry")
			continue
		fi
		read -r code end <"$log.end"
		rm -f "$log.end"
		case $code in
		0)
			local result=PASS
			grep -q '\*\*\*Skipped' "$log" && result=SKIP
			report $result "$name" "$start" "$log" "$end"
			;;
		77) report SKIP "$name" "$start" "$log" "$end" ;;
		*)
			case $code in
			124 | 137) echo "run.sh: stopped: its time limit is over" >>"$log" ;;
			*) echo "run.sh: exit code $code" >>"$log" ;;
			esac
			report FAIL "$name" "$start" "$log" "$end"
			;;
		esac
	done
	running=("${left[@]}")
}

# spawn NAME LIMIT COMMAND...: a test, beside those that run; it waits for a slot.
spawn()
{
	local name=$1 limit=$2 log=$log_dir/$1.log
	shift 2
	while [ ${#running[@]} -ge "$slots" ]; do
		wait -n
		collect
	done
	running+=("$name"$'\t'"$EPOCHREALTIME"$'\t'"$log")
	{
		timeout -k 20 "$limit" "$@" </dev/null >"$log" 2>&1 &
		trap "kill $! 2>/dev/null; exit 1" TERM
		wait $!
		echo "$? $EPOCHREALTIME" >"$log.tmp"
		mv "$log.tmp" "$log.end"
	} &
}

drain()
{
	wait
	collect
}

# run_ctest PRESET PREFIX CTEST_ARGS...: each ctest test by itself, with a log of its own.
run_ctest()
{
	local dir=$root/build/$1 prefix=$2 names name
	shift 2
	names=$(ctest --test-dir "$dir" -N "$@" | sed -n 's/^ *Test *#[0-9]*: //p')
	if [ -z "$names" ]; then
		echo "no tests in $dir" >"$log_dir/ctest.log"
		report FAIL "${prefix}ctest" "$EPOCHREALTIME" "$log_dir/ctest.log"
		return
	fi
	while read -r name; do
		wanted "$prefix$name" || continue
		spawn "$prefix$name" $ctest_timeout_s \
			ctest --test-dir "$dir" --output-on-failure --no-tests=error -R "^$name\$"
	done <<<"$names"
	drain
}

# Each end-to-end test gets a mount and a process namespace of its own where that is allowed: what it leaves behind,
# daemons and mounts, ends with it, and a name it looks up in /proc is its own. bash as the namespace's first process
# reaps orphans.
isolate=()
if unshare --mount --pid --fork --kill-child --mount-proc true 2>/dev/null; then
	isolate=(unshare --mount --pid --fork --kill-child --mount-proc bash -c '"$@"; exit $?' e2e)
fi

# run_e2e TEST LIMIT PREFIX
run_e2e()
{
	local test=$1 limit=$2 name own
	name=$3$(basename "$test")
	wanted "$name" || return
	own=$(sed -n '1,20s/^# timeout: *\([0-9][0-9]*\) *$/\1/p' "$test" | head -n 1)
	spawn "$name" "${own:-$limit}" "${isolate[@]}" "$test"
}

# run_e2e_all KIND LIMIT [PREFIX]: tests/e2e/KIND_*
run_e2e_all()
{
	local test prefix=${3-}
	for test in tests/e2e/"$1"_*.sh tests/e2e/"$1"_*.py; do
		[ -f "$test" ] && printf '%s\n' "$test"
	done | LC_ALL=C sort >"$log_dir/e2e-$1.list"
	while read -r test <&3; do
		if [ ! -x "$test" ]; then
			echo "$test is not executable: chmod +x" >"$log_dir/$(basename "$test").log"
			report FAIL "$(basename "$test")" "$EPOCHREALTIME" "$log_dir/$(basename "$test").log"
			continue
		fi
		run_e2e "$root/$test" "$2" "$prefix"
	done 3<"$log_dir/e2e-$1.list"
	drain
}

step deps tests/deps.sh || finish
build_preset dev || finish
export REPFS_BUILD=$root/build REPFS_BIN=$root/build/dev
run_ctest dev ""
[ $fast -eq 1 ] && finish

if build_preset asan; then
	run_ctest asan asan- -L unit
	[ $long -eq 1 ] && run_ctest asan asan- -R '^(stress_.*|sim_(quick|points))$'
fi
if [ $long -eq 1 ] && build_preset tsan; then
	run_ctest tsan tsan- -L stress
fi
run_e2e_all test $e2e_timeout_s
if [ $long -eq 1 ]; then
	# A sanitizer's report fails the test whose daemon it came from: the harness reads the daemons' logs.
	for sanitizer in asan tsan; do
		REPFS_BIN=$root/build/$sanitizer REPFS_E2E_SLOW=4 \
			run_e2e_all test $((4 * e2e_timeout_s)) $sanitizer-
	done
	run_e2e_all long $long_timeout_s
fi
finish
