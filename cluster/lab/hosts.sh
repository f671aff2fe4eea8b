#!/usr/bin/env bash
# hosts.sh: several hosts on one Linux machine, for tests. Needs root, util-linux and iproute2; without them it ends with 77.
#
#   hosts.sh up N                  head and n1..nN, joined by a bridge without uplink; prints the lab's folder, LAB
#   hosts.sh exec LAB HOST CMD...  CMD on HOST, in this folder (head alone passes on signals: it has no processes of its own)
#   hosts.sh cut|heal LAB HOST     HOST's packets vanish without a word; come through again
#   hosts.sh split LAB HOST...     these hosts reach each other only, and the rest the rest
#   hosts.sh join LAB              undoes it
#   hosts.sh crash|boot LAB HOST   power off: silence, then nothing is left; power on, empty
#   hosts.sh down LAB              ends everything and removes LAB
#
# LAB/hostfile has n1..nN with SLOTS (2) slots each; LAB/rsh stands in for ssh on head (mpirun 4: --mca plm_rsh_agent LAB/rsh, 5: --prtemca
# plm_ssh_agent LAB/rsh) and fails as ssh does where no packet gets through. Files are shared, as on NFS; a host's own are hostname, address
# (10.77.0.I), processes, /dev/shm and TMPDIR. A lab that nobody takes down ends after LAB_TTL (3600) seconds.
set -euo pipefail

refuse() { echo "hosts.sh: $*" >&2; exit 77; }
address() { if [ "$1" = head ]; then echo 10.77.0.254; else echo "10.77.0.${1#n}"; fi; }
pid_of() { cat "$LAB/pid/$1" 2>/dev/null || { echo "hosts.sh: $LAB has no host $1" >&2; exit 2; }; }
net() { local host=$1; shift; nsenter -t "$(pid_of "$host")" -n ip "$@"; }

boot() {  # HOST: its namespaces live as long as the sleeping process that its pid file names
  local host=$1 own=(--pid --fork --kill-child --mount-proc) pipe pid
  [ "$host" != head ] || own=()  # head sees the other hosts' processes: that is how LAB/rsh gets there
  install -d -m 1777 "$LAB/tmp/$host"
  # shellcheck disable=SC2016  # the inner bash expands
  exec {pipe}< <(exec setsid unshare --net --uts --ipc --mount "${own[@]}" bash -ec '
    hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; ip link set lo up
    echo; exec >&-; trap "exit 0" TERM; sleep "$3" & wait' _ "$host" "$LAB" "${LAB_TTL:-3600}" 2>>"$LAB/log" </dev/null)
  pid=$!
  echo "$pid" >"$LAB/pid/$host"
  read -r _ <&"$pipe" || { cat "$LAB/log" >&2; refuse "namespaces are not allowed here"; }
  exec {pipe}<&-
  [ "$host" = head ] || { read -r pid _ < <(cat "/proc/$pid/task/$pid/children"; echo); echo "$pid" >"$LAB/pid/$host"; }
  if [ "$host" = head ]; then
    net head link add bridge type bridge && net head link add island type bridge
    net head addr add "$(address head)/24" dev bridge
    net head link set bridge up && net head link set island up
  else
    net head link add "to-$host" type veth peer name eth0 netns "$pid"
    net head link set "to-$host" master bridge up
    net "$host" addr add "$(address "$host")/24" dev eth0
    net "$host" link set eth0 up
  fi
}

crash() {  # HOST
  local pid; pid=$(pid_of "$1")
  net head link set "to-$1" down
  kill -KILL "$pid" 2>/dev/null || true  # process 1 of its namespace: the kernel ends the rest
  while [ -e "/proc/$pid/ns/pid" ]; do sleep 0.01; done
  net head link del "to-$1" 2>/dev/null || true  # the kernel removes it too, some time
  rm -rf "$LAB/pid/$1" "$LAB/tmp/$1"
}

enter() {  # HOST CMD...
  local host=$1 pid own=(-p); shift
  pid=$(pid_of "$host")
  [ "$host" != head ] || own=()
  # Each host believes that this machine's cores are its own, so a waiting rank must give way.
  exec env TMPDIR="$LAB/tmp/$host" OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}" \
    nsenter -t "$pid" -n -u -i -m "${own[@]}" --wdns="$PWD" -- "$@"
}

rsh() {  # HOST WORDS...: as ssh does
  while [[ $1 == -* ]]; do shift; done
  local host=$1 code=0; shift
  [[ $(ip -o link show up master bridge) == *" to-$host@"* ]] || { echo "rsh: no route to host $host" >&2; exit 255; }
  cd / && (enter "$host" env -i PATH="$PATH" HOME="$HOME" USER="${USER:-root}" TMPDIR="$LAB/tmp/$host" sh -c "$*") || code=$?
  exit $((code > 128 ? 255 : code))  # a far side that died
}

up() {  # COUNT
  local i why
  [ "$(id -u)" = 0 ] || refuse "only root may make hosts"
  for i in ip unshare nsenter; do command -v $i >/dev/null || refuse "no $i: apt-get install iproute2 util-linux"; done
  why=$(unshare --net --uts --ipc --mount true 2>&1) || refuse "no namespaces for hosts, as in a chroot whose / is no mount point: $why"
  LAB=$(mktemp -d "${TMPDIR:-/tmp}/hosts.XXXXXX"); chmod 755 "$LAB"; mkdir "$LAB/pid"
  trap 'code=$?; down; exit $code' EXIT
  { echo "127.0.0.1 localhost"; for i in head $(seq -f n%g "$1"); do echo "$(address "$i") $i"; done; } >"$LAB/hosts"
  seq -f "n%g slots=${SLOTS:-2}" "$1" >"$LAB/hostfile"
  printf '#!/bin/sh\nexec "%s" rsh "%s" "$@"\n' "$(readlink -f "$0")" "$LAB" >"$LAB/rsh"; chmod 755 "$LAB/rsh"
  for i in head $(seq -f n%g "$1"); do boot "$i"; done
  trap - EXIT
  echo "$LAB"
}

down() {
  local host pid net found=1
  for host in "$LAB"/pid/n*; do [ ! -e "$host" ] || crash "${host##*/}"; done
  if [ -e "$LAB/pid/head" ]; then
    pid=$(pid_of head)
    exec {net}<"/proc/$pid/ns/net"
    kill -KILL "$pid"  # nobody can enter any more
    while [ -n "$found" ]; do
      found=
      for host in /proc/[0-9]*/ns/net; do
        [ ! "$host" -ef "/proc/self/fd/$net" ] || { found=${host#/proc/}; kill -KILL "${found%%/*}" 2>/dev/null || true; }
      done
    done
  fi
  rm -rf "$LAB"
}

verb=${1:-}; shift || true
case $verb in
  up) up "${1:?how many?}"; exit ;;
  exec|cut|heal|split|join|crash|boot|down|rsh) LAB=${1:?which lab?}; shift ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
[ -d "$LAB/pid" ] || { echo "hosts.sh: $LAB is no lab" >&2; exit 2; }
case $verb in
  exec) enter "$@" ;;
  cut) net head link set "to-$1" down ;;
  heal) net head link set "to-$1" up ;;
  split) for host in "$@"; do net head link set "to-$host" master island; done ;;
  join) for host in "$LAB"/pid/n*; do net head link set "to-${host##*/}" master bridge; done ;;
  boot) [ ! -e "$LAB/pid/$1" ] || { echo "hosts.sh: $1 is up" >&2; exit 2; }; boot "$1" ;;
  crash | down | rsh) "$verb" "$@" ;;
esac
