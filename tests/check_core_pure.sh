#!/bin/bash
# The edge of core/ is the edge of determinism: its objects may ask for nothing from outside but the functions below,
# that is no system call, no thread, no allocation, no clock. For builds without sanitizers.
#
#   check_core_pure.sh LIBFILE              prints every other undefined symbol, with the object that asks for it
#   check_core_pure.sh --self-test LIBFILE  plants a call of time() into a copy and sees it found
set -u

allowed='memcpy|memset|memmove|memcmp|strlen|strnlen|strcmp|strncmp|strchr|snprintf|vsnprintf|crc32_iscsi'
# What compilers add: fortified forms of the same, the stack protector, arithmetic and bit counting of libgcc.
runtime='__(memcpy|memset|memmove|snprintf|vsnprintf)_chk|__stack_chk_fail|_GLOBAL_OFFSET_TABLE_|__[a-z]+[sdt]i[234]'

check()
{
	local lib=$1 defined wanted found
	defined=$(nm --defined-only --extern-only "$lib" | awk 'NF == 3 { print $3 }' | LC_ALL=C sort -u) || return 2
	wanted=$(nm --undefined-only "$lib") || return 2
	[ -n "$defined" ] || {
		echo "$lib: defines nothing: not a library?"
		return 2
	}
	found=$(awk -v allowed="^($allowed|$runtime)$" '
		NR == FNR { defined[$1] = 1; next }
		/:$/ { object = $0; sub(/:$/, "", object) }
		NF == 2 && $1 ~ /^[Uwv]$/ && !($2 in defined) && $2 !~ allowed { print object ": " $2 }
	' <(printf '%s\n' "$defined") <(printf '%s\n' "$wanted"))
	[ -z "$found" ] && return 0
	printf '%s\n' "$found"
	return 1
}

self_test()
{
	dir=$(mktemp -d) || exit 2
	trap 'rm -rf "$dir"' EXIT
	cp "$1" "$dir/lib.a" || exit 2
	printf '#include <time.h>\nlong planted(void);\nlong planted(void)\n{\n\treturn time(NULL);\n}\n' >"$dir/planted.c"
	${CC:-cc} -c "$dir/planted.c" -o "$dir/planted.o" && ar q "$dir/lib.a" "$dir/planted.o" || exit 2
	check "$dir/lib.a" | grep -qx 'planted.o: time' || {
		echo "self-test: the planted call of time() was not found"
		return 1
	}
}

case ${1-} in
--self-test) self_test "${2:?LIBFILE}" ;;
*) check "${1:?LIBFILE}" ;;
esac
