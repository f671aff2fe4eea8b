#!/usr/bin/env bash
# setup.sh [runtime|test|lint]: installs what is missing for that purpose, says what it cannot install, does nothing twice.
#   Debian packages, as root; LibTorch from its wheel into build/deps (hash checked, downloads kept in a cache outside the clone);
#   for tests also a Python environment with PyTorch, the oracle and the peer.
set -euo pipefail
purpose=${1:-runtime}
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
deps=$root/build/deps
cache=${LOCKSTEP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lockstep}/wheels

case $purpose in
  runtime) lists=(runtime) ;;
  test) lists=(runtime test) ;;
  lint) lists=(runtime test lint) ;;
  *) echo "setup.sh: '$purpose' is neither runtime, test nor lint" >&2; exit 78 ;;
esac
lists=("${lists[@]/#/$here/packages-}"); lists=("${lists[@]/%/.txt}")

# Nothing to do when this very set was seen complete before.
inputs=("${lists[@]}" "$here/setup.sh" "$here/wheels.txt" "$root/tests/python/requirements.txt")
stamp=$deps/.$purpose-$(cat "${inputs[@]}" | sha256sum | cut -c1-16)
[ ! -e "$stamp" ] || exit 0

install_packages() {
  local wanted missing=()
  wanted=$(cat "${lists[@]}" | sed 's/#.*//' | sort -u)
  for package in $wanted; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    echo "setup.sh: Debian packages are missing. Mend, as root: apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 78
  fi
  echo "setup.sh: installing ${missing[*]}"
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# wheels REQUIREMENTS_FILE: fetches wheels that are not in the cache yet; pip checks the hashes, here and on every later use.
fetch_wheels() {
  mkdir -p "$cache"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --python-version 3.11 --implementation cp --abi cp311 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --find-links "$cache" --dest "$cache" -r "$1"
}

install_libtorch() {
  local mark=$deps/site/.unpacked-$(sha256sum < "$here/wheels.txt" | cut -c1-16)
  [ ! -e "$mark" ] || return 0
  echo "setup.sh: LibTorch 2.11.0 (530 MB, once)"
  fetch_wheels "$here/wheels.txt"
  rm -rf "$deps/site"
  python3 "$here/unpack_wheels.py" "$here/wheels.txt" "$cache" "$deps/site"
  touch "$mark"
}

# The oracle of the tests and the peer of the benchmarks. PyTorch for Python needs the CUDA libraries it links even on a CPU.
install_python() {
  local venv=$deps/venv
  echo "setup.sh: the Python environment of the tests (once)"
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --find-links "$cache" -r "$root/tests/python/requirements.txt"
}

install_packages
install_libtorch
case $purpose in test|lint) install_python ;; esac
mkdir -p "$deps"
touch "$stamp"
