#!/usr/bin/env bash
# slurm_lab_test.sh: cluster/lab/slurm.sh is a Slurm that starts, preempts nothing by itself, requeues on 75, and leaves nothing.
set -euo pipefail
slurm=$(cd "$(dirname "$0")/../../cluster/lab" && pwd)/slurm.sh
lab=$("$slurm" up 2) || { [ $? != 77 ] || { echo "SKIPPED: slurm_lab: no Slurm or no namespaces for us here (the line above says why)"; exit 77; }; exit 1; }
trap '"$slurm" down "$lab"' EXIT
submit() { "$slurm" exec "$lab" sbatch --parsable --requeue --open-mode=append -N2 -o "$lab/out.%j" --wrap "$1"; }

# shellcheck disable=SC2016  # for the job's shell
again=$(submit 'srun hostname; exit $((75 * (${SLURM_RESTART_COUNT:-0} == 0)))')
wrong=$(submit 'exit 3')
"$slurm" wait "$lab" "$wrong" 60 'JobState=FAILED .*ExitCode=3:0'
"$slurm" wait "$lab" "$again" 60 'JobState=COMPLETED .*Restarts=1 '
[ "$(sort "$lab/out.$again" | tr '\n' ' ')" = "n1 n1 n2 n2 " ]

"$slurm" down "$lab"; trap - EXIT
[ ! -e "$lab" ]
! grep -lsF "SLURM_CONF=$lab/" /proc/[0-9]*/environ || { echo "the above outlived the lab"; exit 1; }
echo "nothing is left"
