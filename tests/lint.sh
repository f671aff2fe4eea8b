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
commands = json.load(open(f"{build}/compile_commands.json"))
for entry in commands:
    entry["command"] = re.sub(r"-include \S*cmake_pch\.hxx|-Winvalid-pch|-Wno-missing-field-initializers", "", re.sub(r"^.*?(?=/\S*c\+\+ )", "", entry["command"]))
commands = list({entry["file"]: entry for entry in commands}.values())  # a file that several targets compile is looked at once
json.dump(commands, open(f"{cache}/compile_commands.json", "w"))
includes = {}
for block in subprocess.run(["ninja", "-C", build, "-t", "deps"], capture_output=True, text=True, check=True).stdout.split("\n\n"):
    files = [os.path.relpath(os.path.join(build, line.strip()), root) for line in block.splitlines()[1:]]
    ours = [file for file in files if not file.startswith(("build/", ".."))]
    if ours: includes[next((file for file in ours if file.endswith(".cc")), ours[0])] = ours
for source in subprocess.run(["git", "ls-files", "*.cc"], capture_output=True, text=True, check=True).stdout.split():
    if source.endswith("cmake/empty.cc"): continue
    key = hashlib.sha256()
    for file in [".clang-tidy", source, *sorted(includes.get(source, []))]: key.update(open(file, "rb").read())
    print(source, key.hexdigest()[:24])
P
