#!/bin/bash
# check_format.sh [CLANG_FORMAT] [--fix]: all .c and .h files are as .clang-format says. Prints every place that is not.
set -u

cd "$(dirname "$0")/.." || exit 2
tool=${1:-clang-format}
files=$(for room in core image net fs cli tests; do
	[ -d "$room" ] && find "$room" -type f -name '*.[ch]'
done | LC_ALL=C sort)
[ -n "$files" ] || exit 0
if [ "${2-}" = --fix ]; then
	xargs -r -d '\n' "$tool" -i <<<"$files"
	exit
fi
output=$(xargs -r -d '\n' "$tool" --dry-run -Werror <<<"$files" 2>&1) && exit 0
# The places without the source lines; all of it if there are no places (the tool itself failed).
grep -oE '^[^ :]+:[0-9]+:[0-9]+: error' <<<"$output" | sed 's/: error//' || printf '%s\n' "$output"
echo "to put it right: tests/check_format.sh $tool --fix"
exit 1
