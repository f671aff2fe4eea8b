#!/usr/bin/env bash
# mpirun.sh RANKS PROGRAM ARGS...: how tests start ranks on one machine, as root too, more ranks than cores too.
set -euo pipefail
ranks=$1; shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export LOCKSTEP_AGENT=${LOCKSTEP_AGENT:-none}  # what hangs here hangs in a debugger, or is a test of the watchdog
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
root=(); [ "$(id -u)" != 0 ] || root=(--allow-run-as-root)
exec mpirun "${root[@]}" --oversubscribe -n "$ranks" "$@"
