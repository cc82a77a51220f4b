#!/bin/bash
# run.sh [NAME...]: runs the end-to-end tests (all tests/e2e/test_*.py, or those whose name contains a NAME), one after the
# other, and says at the end which failed. The binaries come from REPFS_BIN, else build/dev.
cd "$(dirname "$0")" || exit 1
export PYTHONDONTWRITEBYTECODE=1
failed=()
begun=$SECONDS
for file in test_*.py; do
	if [ $# -gt 0 ]; then
		for name in "$@"; do [[ $file == *$name* ]] && break; done
		[[ $file == *$name* ]] || continue
	fi
	echo "== $file"
	# Bounded even if the file's own watchdog fails.
	timeout -k 20 "${REPFS_E2E_FILE_LIMIT:-1200}" python3 "$file" || failed+=("$file")
done
echo "== end-to-end tests: ${#failed[@]} files failed${failed[*]:+: ${failed[*]}}, $((SECONDS - begun)) s"
[ ${#failed[@]} -eq 0 ]
