#!/usr/bin/env bash
# lint.sh BUILD JOBS: clang-tidy over every source, several at a time. A file that passes is not looked at again until it, a header of
# ours that it includes or the rules change.
set -uo pipefail
build=$1 jobs=$2
cache=$build/lint; mkdir -p "$cache"
export cache
check() {  # check SOURCE KEY
  [ ! -e "$cache/$2" ] || return 0
  if clang-tidy-14 --quiet -p "$cache" "$1" 2> "$cache/$(basename "$1").err"; then touch "$cache/$2"; else echo "clang-tidy: $1"; return 1; fi
}
export -f check
# gcc's precompiled header and gcc-only flags mean nothing to clang. Prints each source with the digest of all that its verdict hangs on.
python3 - "$build" "$cache" <<'P' | xargs -P "$jobs" -L 1 bash -c 'check "$@"' check
import hashlib, json, os, re, subprocess, sys
build, cache = sys.argv[1:]
root = os.getcwd()
commands = {}
for entry in json.load(open(f"{build}/compile_commands.json")):
    entry["command"] = re.sub(r"-include \S*cmake_pch\.hxx|-Winvalid-pch|-Wno-missing-field-initializers|-Wno-subobject-linkage|--param=\S+", "", re.sub(r"^.*?(?=/\S*c\+\+ )", "", entry["command"]))
    is_unity = entry["file"].endswith("_cxx.cxx") and "/Unity/" in entry["file"]  # of several sources: each is looked at alone
    for source in re.findall(r'#include "(\S+\.cc)"', open(entry["file"]).read()) if is_unity else [entry["file"]]:
        commands[source] = {**entry, "command": entry["command"].replace(entry["file"], source), "file": source}  # once, whoever compiles it
json.dump(list(commands.values()), open(f"{cache}/compile_commands.json", "w"))
ours = subprocess.run(["git", "ls-files", "*.cc", "*.h"], capture_output=True, text=True, check=True).stdout.split()
def included(file, seen):  # what of ours it includes, and what that does
    for name in re.findall(r'#include ["<](\S+)[">]', open(file).read()):
        beside = os.path.normpath(os.path.join(os.path.dirname(file), name))
        for found in [beside] if beside in ours else [header for header in ours if header.endswith("/" + name)]:
            if found in seen: continue
            seen.add(found)
            included(found, seen)
    return seen
for source in ours:
    if not source.endswith(".cc") or source.endswith("cmake/empty.cc"): continue
    key = hashlib.sha256()
    for file in [".clang-tidy", source, *sorted(included(source, {source}))]: key.update(open(file, "rb").read())
    print(source, key.hexdigest()[:24])
P
