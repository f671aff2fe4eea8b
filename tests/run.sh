#!/usr/bin/env bash
# Runs every test of build/release, and under ASan+UBSan and TSan those without torch; with LOCKSTEP_DEEP=1 collectives and data too. Prints the
# time of each stage and, at the end, every skipped test with its reason and what each failed test said last: nothing is skipped or fails silently.
set -uo pipefail
cd "$(dirname "$0")/.."
jobs=$(nproc)
failed=0
logs=build/test-logs; mkdir -p "$logs"

stage() {  # stage NAME COMMAND...
  local name=$1 start=$SECONDS; shift
  echo "=== $name"
  "$@" || { failed=1; echo "=== $name FAILED"; }
  echo "=== $name took $((SECONDS - start)) s"
}

sanitizer() {  # sanitizer PRESET LABELS
  cmake --preset "$1" -DLOCKSTEP_DEEP="${LOCKSTEP_DEEP:-0}" > "$logs/$1-configure.log" 2>&1 || { cat "$logs/$1-configure.log"; return 1; }
  cmake --build "build/$1" -j "$jobs" --target sanitized_tests > "$logs/$1-build.log" 2>&1 || { tail -n 40 "$logs/$1-build.log"; return 1; }
  ctest --test-dir "build/$1" -L "$2" -j "$jobs" --output-on-failure --no-tests=error --output-log "$logs/$1.log"
}

export UBSAN_OPTIONS=print_stacktrace=1 LSAN_OPTIONS=suppressions=$PWD/tests/support/lsan.supp TSAN_OPTIONS="suppressions=$PWD/tests/support/tsan.supp halt_on_error=1"
[ "${LOCKSTEP_DEEP:-0}" = 0 ] || export ASAN_OPTIONS=fast_unwind_on_malloc=0  # slow, but tells whose a leak is: of Open MPI's many
stage "address sanitizer and fuzzers" sanitizer asan 'sanitized|parser_fuzzer'
stage "thread sanitizer" sanitizer tsan sanitized
stage "all tests" ctest --test-dir build/release -j "$jobs" --output-on-failure --no-tests=error --output-log "$logs/release.log" -V -Q
tail -n 30 "$logs/release.log" | grep -E "tests passed|Test time|FAILED|Failed" || true

# GoogleTest prints "[  SKIPPED ] Name" after the reason; scripts and CMake print "SKIPPED: name: reason".
grep -hE "SKIPPED: " "$logs"/*.log | sed 's/^[0-9]*: //; s/^-- //' | sort -u > "$logs/skipped" || true
grep -hB1 -E "\[  SKIPPED \] .*\(" "$logs/release.log" | sed 's/^[0-9]*: //' | grep -v '^--' | paste - - | sort -u >> "$logs/skipped" || true
# Tests that were not even built.
if [ -e build/release-configure.log ]; then sed -n 's/^-- CUDA plug-in: left out/SKIPPED: collectives_nccl, collectives_nccl_double: left out/p' build/release-configure.log >> "$logs/skipped"; fi
echo "skipped: $(wc -l < "$logs/skipped")"
cat "$logs/skipped"
# "68: what test 68 said": the end of it for each that failed.
grep -ohP '^\s+\K\d+(?= - .*\((Failed|Timeout|.*Exception.*|Not Run)\))' "$logs/release.log" | while read -r number; do
  echo "=== the end of test $number"
  grep "^$number: " "$logs/release.log" | tail -n 25 | cut -c 1-400
done
grep -hE "^[0-9]+% tests passed" "$logs"/{asan,tsan,release}.log
exit $failed
