#!/usr/bin/env bash
# run.sh TARGET SEEDS CORPUS: fuzzes for LOCKSTEP_FUZZ_SECONDS (10; an hour with LOCKSTEP_DEEP=1). The corpus grows from run to run; an input
# that fails lies in CORPUS.findings and belongs into SEEDS once mended.
set -euo pipefail
target=$1 seeds=$2 corpus=$3
seconds=${LOCKSTEP_FUZZ_SECONDS:-$([ "${LOCKSTEP_DEEP:-}" = 1 ] && echo 3600 || echo 10)}
mkdir -p "$corpus" "$corpus.findings"
# AddressSanitizer keeps freed memory for a while, 256 MB by default: as much as a target may use in all.
export ASAN_OPTIONS=quarantine_size_mb=8
"$target" -max_total_time="$seconds" -rss_limit_mb=256 -malloc_limit_mb=128 -timeout=1 -max_len=8192 -entropic=0 -print_final_stats=1 -verbosity=1 \
  -artifact_prefix="$corpus.findings/" "$corpus" "$seeds" 2>&1 | grep -vE "^#[0-9]+.*(NEW|REDUCE|pulse)"
