#!/usr/bin/env bash
# slurm_lab_test.sh: cluster/lab/slurm.sh is a Slurm that runs jobs on its nodes and takes them again, here those of cluster/slurm/train.sbatch, and leaves nothing.
set -euo pipefail
slurm=$(cd "$(dirname "$0")/../../cluster/lab" && pwd)/slurm.sh
lab=$("$slurm" up 2) || { [ $? != 77 ] || { echo "SKIPPED: slurm_lab: no Slurm or no namespaces for us here (the line above says why)"; exit 77; }; exit 1; }
trap '"$slurm" down "$lab"' EXIT
template=$(cd "$(dirname "$0")/../../cluster/slurm" && pwd)/train.sbatch
submit() { OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "$slurm" exec "$lab" sbatch --parsable --ntasks-per-node=1 -o "$lab/out.%j" "$template" sh -c "$1"; }

# Each of two ranks waits for the other before it ends: mpirun ends the other of one that fails.
# shellcheck disable=SC2016  # for the ranks' shells
again=$(submit 'start='"$lab"'/start-${SLURM_RESTART_COUNT:-0}; hostname; touch $start.$(hostname); until [ -e $start.n1 ] && [ -e $start.n2 ]; do sleep 0.1; done
                exit $((75 * (${SLURM_RESTART_COUNT:-0} == 0)))')
wrong=$(submit 'exit 3')
"$slurm" wait "$lab" "$wrong" 60 'JobState=FAILED .*ExitCode=3:0'
"$slurm" wait "$lab" "$again" 60 'JobState=COMPLETED .*Restarts=1 '
[ "$(find "$lab" -maxdepth 1 -name 'start-[01].n[12]' | wc -l)" = 4 ] || { ls "$lab"; exit 1; }
[ "$(grep -x 'n[12]' "$lab/out.$again" | sort -u | wc -l)" = 2 ] || { cat "$lab/out.$again"; exit 1; }

"$slurm" down "$lab"; trap - EXIT
[ ! -e "$lab" ]
! grep -lsF "SLURM_CONF=$lab/" /proc/[0-9]*/environ || { echo "the above outlived the lab"; exit 1; }
echo "nothing is left"
