#!/bin/bash
# Includes point down only (docs/ARCHITECTURE.md), and project headers are spelt from the root. Prints every offender.
#
#   check_includes.sh [ROOT]        checks the tree
#   check_includes.sh --self-test   plants bad includes in copies and sees each one found, and good ones left alone
set -u

here=$(cd "$(dirname "$0")/.." && pwd)
rooms="core image net fs cli tests"

# Offenders of the tree in the current folder, one a line; nothing if there are none.
offenders()
{
	local present=()
	for room in $rooms; do
		[ -d "$room" ] && present+=("$room")
	done
	[ ${#present[@]} -gt 0 ] || return 0
	find "${present[@]}" -type f -name '*.[ch]' | LC_ALL=C sort | xargs -r -d '\n' awk '
	function room_of(path) {
		if (path ~ /^core\/os\//)
			return "core/os"
		sub(/\/.*/, "", path)
		return path
	}
	BEGIN {
		may["core"] = " core "
		may["core/os"] = " core core/os "
		may["image"] = " core core/os image "
		may["net"] = " core core/os net "
		may["fs"] = " core core/os image net fs "
		may["cli"] = " core core/os image cli "
		may["tests"] = " core core/os image net fs cli tests "
		# Tests of a room see what the room sees.
		may["tests/unit/core"] = " core core/os tests "
		may["tests/unit/image"] = " core core/os image tests "
		may["tests/unit/net"] = " core core/os net tests "
	}
	FNR == 1 {
		from = room_of(FILENAME)
		if (FILENAME ~ /^tests\/unit\/(core|image|net)\//) {
			split(FILENAME, part, "/")
			from = "tests/unit/" part[3]
		}
	}
	/^[ \t]*#[ \t]*include[ \t]*["<]/ {
		quoted = $0 ~ /^[ \t]*#[ \t]*include[ \t]*"/
		name = $0
		sub(/^[ \t]*#[ \t]*include[ \t]*["<]/, "", name)
		sub(/[">].*/, "", name)
		ours = name ~ /^(core|image|net|fs|cli|tests)\// && (getline line < name) >= 0
		close(name)
		why = ""
		if (!quoted && ours)
			why = "a header of the project is included with quotes"
		else if (quoted && !ours)
			why = "not the path of a file from the root of the project"
		else if (quoted && name ~ /(^|\/)\.\.?(\/|$)/)
			why = "spell it from the root, without . and .."
		else if (quoted) {
			to = room_of(name)
			if (index(may[from], " " to " ") == 0 && !(from == "cli" && name == "net/ctl.h"))
				why = from " must not include " to
		}
		if (why != "")
			printf "%s:%d: %s: %s\n", FILENAME, FNR, name, why
	}'
}

check()
{
	local found
	found=$(cd "$1" && offenders) || return 2
	[ -z "$found" ] && return 0
	printf '%s\n' "$found"
	return 1
}

self_test()
{
	local bad=0 file text want found
	copy=$(mktemp -d) || exit 2
	trap 'rm -rf "$copy"' EXIT
	mkdir -p "$copy"/{core/os,image,net,fs,cli,tests/unit/core,tests/unit/image}
	touch "$copy"/{core/err,core/os/log,image/meta,net/ctl,net/link,fs/daemon,cli/output}.h

	# file, include, found?
	while read -r file text want; do
		printf '#include <stdio.h>\n/* a comment */\n %s\n' "#include $text" >"$copy/$file"
		found=$(check "$copy")
		if [ "$want" = bad ] && ! grep -q "^$file:3: " <<<"$found"; then
			echo "self-test: not found: $file with $text"
			bad=1
		elif [ "$want" = good ] && [ -n "$found" ]; then
			echo "self-test: found wrongly: $found"
			bad=1
		fi
		rm "$copy/$file"
	done <<-'CASES'
		core/planted.c "core/err.h" good
		core/planted.c "core/os/log.h" bad
		core/planted.c "image/meta.h" bad
		core/planted.c "err.h" bad
		core/planted.c <core/err.h> bad
		core/planted.c "core/../core/err.h" bad
		core/planted.c "core/missing.h" bad
		core/os/planted.c "core/err.h" good
		core/os/planted.h "net/link.h" bad
		image/planted.c "core/os/log.h" good
		image/planted.c "net/link.h" bad
		image/planted.h "fs/daemon.h" bad
		net/planted.c "image/meta.h" bad
		net/planted.c "net/link.h" good
		net/planted.c "./net/link.h" bad
		fs/planted.c "net/link.h" good
		fs/planted.c "image/meta.h" good
		fs/planted.c "cli/output.h" bad
		cli/planted.c "net/ctl.h" good
		cli/planted.c "net/link.h" bad
		cli/planted.c "image/meta.h" good
		cli/planted.c "fs/daemon.h" bad
		tests/unit/core/planted.c "core/os/log.h" good
		tests/unit/core/planted.c "image/meta.h" bad
		tests/unit/image/planted.c "net/link.h" bad
		tests/planted.c "fs/daemon.h" good
	CASES

	# And in a copy of the real tree: one more offender than before, the planted one.
	rm -rf "${copy:?}"/*
	for room in $rooms; do
		[ -d "$here/$room" ] && cp -r "$here/$room" "$copy/"
	done
	mkdir -p "$copy/image"
	printf '#include "net/ctl.h"\n' >"$copy/image/planted.c"
	check "$copy" | grep -q '^image/planted.c:1: net/ctl.h: ' || {
		echo "self-test: not found in a copy of the tree"
		bad=1
	}
	return $bad
}

case ${1-} in
--self-test) self_test ;;
*) check "${1:-$here}" ;;
esac
