#!/usr/bin/env bash
# lint.sh BUILD JOBS: clang-tidy over every source, several at a time. Files that pass are not looked at again until they, a header or
# the rules change.
set -uo pipefail
build=$1 jobs=$2
cache=$build/lint; mkdir -p "$cache"
rules=$(cat .clang-tidy $(git ls-files '*.h') | sha256sum | cut -c1-16)
export build cache rules
check() {
  mark=$cache/$(cat "$1" | sha256sum | cut -c1-16)-$rules
  [ ! -e "$mark" ] || return 0
  # gcc's precompiled header and gcc-only flags mean nothing to clang.
  if clang-tidy-14 --quiet -p "$cache" "$1" 2> "$cache/$(basename "$1").err"; then touch "$mark"; else echo "clang-tidy: $1"; return 1; fi
}
export -f check
python3 - "$build/compile_commands.json" "$cache/compile_commands.json" <<'P'
import json, re, sys
commands = json.load(open(sys.argv[1]))
for entry in commands:
    entry["command"] = re.sub(r"-include \S*cmake_pch\.hxx|-Winvalid-pch|-Wno-missing-field-initializers", "", re.sub(r"^.*?(?=/\S*c\+\+ )", "", entry["command"]))
json.dump(commands, open(sys.argv[2], "w"))
P
git ls-files '*.cc' | grep -v torch_pch.cc | xargs -P "$jobs" -I{} bash -c 'check {}'
