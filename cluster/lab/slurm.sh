#!/usr/bin/env bash
# slurm.sh: a real Slurm cluster on one machine, for tests: slurmctld on the head of a hosts.sh lab, a slurmd on each of its hosts. Needs root and
# Debian's slurm-wlm and munge; without them it ends with 77. No database, no cgroups, nothing outside its folder.
#
#   slurm.sh up NODES [CPUS]       nodes n1..nNODES of CPUS (2) each, idle; prints the lab's folder, LAB, which hosts.sh knows too
#   slurm.sh exec LAB CMD...       sbatch, scontrol, ... on head, in this folder
#   slurm.sh wait LAB JOB SECONDS WORDS   until `scontrol show job` has these WORDS (a regular expression); prints the job either way
#   slurm.sh crash|boot LAB NODE   power off; power on
#   slurm.sh down LAB              ends everything and removes LAB
#
# Partitions: main; low, which high preempts after GraceTime (GRACE_TIME, 20 s). A job that leaves with REQUEUE_EXIT (75; none: "") runs again.
# A silent node is given up after SLURMD_TIMEOUT (10) seconds and up to two sweeps more.
set -euo pipefail
hosts=$(dirname "$(readlink -f "$0")")/hosts.sh

on() { local host=$1; shift; "$hosts" exec "$LAB" "$host" env SLURM_CONF="$LAB/slurm/slurm.conf" "$@"; }

start_node() { install -d -m 1777 "$LAB/slurm/spool/$1" "$LAB/slurm/tmp/$1"; on "$1" slurmd -N "$1"; }

# Why the less common lines are there: cred_expire is how long a requeued job waits; TmpFS keeps the PMIx folders of the nodes apart;
# config_overrides lets a node claim more CPUs than the machine has; preempt_send_user_signal warns a job before it is preempted.
configure() {  # NODES CPUS
  cat <<END
ClusterName=lab
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$LAB/slurm/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$LAB/slurm/state
SlurmctldPidFile=$LAB/slurm/slurmctld.pid
SlurmctldLogFile=$LAB/slurm/slurmctld.log
SlurmdSpoolDir=$LAB/slurm/spool/%n
SlurmdPidFile=$LAB/slurm/slurmd-%n.pid
SlurmdLogFile=$LAB/slurm/slurmd-%n.log
TmpFS=$LAB/slurm/tmp/%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
ReturnToService=2
KillWait=${KILL_WAIT:-30}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${REQUEUE_EXIT-RequeueExit=75}
NodeName=n[1-$1] CPUs=$2 Sockets=1 CoresPerSocket=$2 ThreadsPerCore=1 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES PriorityTier=2 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE_TIME:-20}
PartitionName=high Nodes=ALL PriorityTier=3 PreemptMode=OFF
END
}

up() {  # NODES [CPUS]
  local nodes=$1 i
  for i in slurmctld slurmd munged; do command -v $i >/dev/null || { echo "slurm.sh: no $i: apt-get install slurm-wlm munge" >&2; exit 77; }; done
  LAB=$("$hosts" up "$nodes")
  trap 'tail -n 20 "$LAB"/slurm/*.log >&2; "$hosts" down "$LAB"' EXIT
  mkdir -p "$LAB"/slurm/{munge,state}; chmod 711 "$LAB/slurm/munge"
  (umask 077; head -c 1024 /dev/urandom >"$LAB/slurm/munge/key")
  configure "$nodes" "${2:-2}" >"$LAB/slurm/slurm.conf"
  {
    cd "$LAB/slurm/munge"
    on head munged --socket="$PWD/socket" --key-file="$PWD/key" --pid-file="$PWD/pid" --log-file="$PWD/log" --seed-file="$PWD/seed"
    on head slurmctld -c
    for i in $(seq -f n%g "$nodes"); do start_node "$i"; done
  } >>"$LAB/slurm/start.log" 2>&1 </dev/null
  for ((i = 0; i < 600; ++i)); do
    [ "$(on head sinfo -hN -p main -t idle 2>/dev/null | wc -l)" != "$nodes" ] || { trap - EXIT; echo "$LAB"; return; }
    sleep 0.1
  done
  echo "slurm.sh: after a minute the nodes are not idle" >&2; exit 1
}

wait_for() {  # JOB SECONDS WORDS
  local end=$((SECONDS + $2)) said
  until said=$(on head scontrol show job "$1" 2>&1) && [[ $said =~ $3 ]]; do
    [ $SECONDS -lt $end ] || { echo "$said"; exit 1; }
    sleep 0.2
  done
  echo "$said"
}

verb=${1:-}; shift || true
case $verb in
  up) up "$@"; exit ;;
  exec|wait|crash|boot|down) LAB=${1:?which lab?}; shift ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
case $verb in
  exec) exec "$hosts" exec "$LAB" head env SLURM_CONF="$LAB/slurm/slurm.conf" "$@" ;;
  wait) wait_for "$@" ;;
  boot) "$hosts" boot "$LAB" "$1"; start_node "$1" >>"$LAB/slurm/start.log" 2>&1 ;;
  crash|down) "$hosts" "$verb" "$LAB" "$@" ;;
esac
