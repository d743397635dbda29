#!/usr/bin/env bash
# Run a real Slurm on this one machine, to try and test sslx: munged, slurmctld and a slurmd for each virtual node.
#   bash slurm/local_cluster.sh start [--nodes 2] [--netns] [--user-signal]     as root; installs Debian's packages
#   eval "$(bash slurm/local_cluster.sh env)"                                   then sinfo, sbatch, sslx submit ...
#   bash slurm/local_cluster.sh status | stop | install
#   bash slurm/local_cluster.sh cut n2 | heal n2 | throttle 200mbit | throttle off      (--netns: a network per node)
# Partitions: debug (default), low, and high, which preempts low.  --user-signal: Slurm preempts with a job's --signal.
# Everything is under $SSLX_CLUSTER (default /tmp/sslx-cluster), except lines in /etc/hosts, which `stop` removes.
# $SSLX_CLUSTER_PORT (default 16900) is the first of its ports.
set -euo pipefail
dir=${SSLX_CLUSTER:-/tmp/sslx-cluster}
port=${SSLX_CLUSTER_PORT:-16900}
nodes=2 netns=0 user_signal=0
bridge=sslxbr network=10.78.0 mark="# sslx local cluster"
export SLURM_CONF=$dir/slurm.conf
if [[ -f $dir/settings ]]; then . "$dir/settings"; fi

die() { echo "error: $*" >&2; exit 1; }
names() { seq -f 'n%g' "$nodes"; }
address() { if ((netns)); then echo "$network.$((10 + ${1#n}))"; else echo 127.0.0.1; fi; }

install_packages() {
  for program in slurmctld slurmd sinfo munged; do
    command -v "$program" >/dev/null && continue
    echo "installing slurmctld, slurmd, slurm-client and munge" >&2
    apt-get update -qq >&2 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      slurmctld slurmd slurm-client munge >/dev/null || die "apt-get could not install Slurm: install it by hand"
    return
  done
}

write_configuration() {
  local controller=127.0.0.1
  if ((netns)); then controller=$network.1; fi
  cat <<CONF
ClusterName=sslx
SlurmctldHost=$(hostname -s)($controller)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired: 120 s by default, at least 5 s.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
# No cgroups are set up, although slurmd needs /sys/fs/cgroup to be mounted.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
SlurmdTimeout=15
SlurmctldTimeout=5
ReturnToService=2
MinJobAge=600
BatchStartTimeout=10
# A virtual node may have more CPUs and memory than the machine.
SlurmdParameters=config_overrides
CONF
  # In SchedulerParameters it would be ignored silently.
  if ((user_signal)); then echo SlurmctldParameters=preempt_send_user_signal; fi
  local name
  for name in $(names); do
    echo "NodeName=$name NodeHostname=$name NodeAddr=$(address "$name") Port=$((port + ${name#n})) CPUs=4 RealMemory=8000"
  done
  cat <<CONF
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

# Print the pid in a file if that process is still one of this cluster's daemons.
pid_in() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [[ -n $pid ]] || return 1
  tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" && echo "$pid"
}

# Not kill -0: if pid 1 does not reap children, a daemon that has ended remains a zombie.
is_running() { case "$(sed -n 's/^State:\s*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null)" in "" | Z | X) return 1 ;; esac; }

end_process() {
  kill "$1" 2>/dev/null || true
  for _ in $(seq 100); do is_running "$1" || return 0; sleep 0.1; done
  kill -9 "$1" 2>/dev/null || true
}

make_network() {
  ip link add "$bridge" type bridge
  ip addr add "$network.1/24" dev "$bridge"
  ip link set "$bridge" up
  local name
  for name in $(names); do
    ip netns add "$name"
    ip link add "sslx-$name" type veth peer name eth0 netns "$name"
    ip link set "sslx-$name" master "$bridge" up
    ip -n "$name" addr add "$(address "$name")/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
  done
}

remove_network() {
  local name
  for name in $(names); do
    ip netns del "$name" 2>/dev/null || true
    ip link del "sslx-$name" 2>/dev/null || true
  done
  ip link del "$bridge" 2>/dev/null || true
}

# Make the nodes' names resolve.  Remove old lines of this cluster and of clusters that no longer run (a killed machine may
# have left their folders), because a node would otherwise have two addresses.
write_hosts() {
  local line name other
  exec {lock}</etc/hosts
  flock "$lock"
  {
    while IFS= read -r line || [[ -n $line ]]; do
      other=${line##*"$mark "}
      [[ $line == *"$mark "* && ( $other == "$dir" || -z $(SLURM_CONF=$other/slurm.conf pid_in "$other/run/slurmctld.pid") ) ]] ||
        echo "$line"
    done </etc/hosts
    for name in "$@"; do echo "$(address "$name") $name $mark $dir"; done
  } >"$dir/hosts"
  cat "$dir/hosts" >/etc/hosts # not mv, because /etc/hosts is a mount in a container
  exec {lock}<&-
}

start() {
  [[ $(id -u) == 0 ]] || die "the local cluster runs as root: use sudo"
  if pid_in "$dir/run/slurmctld.pid" >/dev/null; then echo "already up: $dir" >&2; return; fi
  while (($#)); do
    case $1 in
      --nodes) nodes=${2:?number of nodes}; shift ;;
      --netns) netns=1 ;;
      --user-signal) user_signal=1 ;;
      *) die "start takes --nodes N, --netns and --user-signal, not $1" ;;
    esac
    shift
  done
  install_packages
  trap stop EXIT # if the start fails midway
  mkdir -p "$dir"/{munge,state,run,log}
  local name
  for name in $(names); do mkdir -p "$dir/spool/$name"; done
  chmod 755 "$dir" "$dir/munge"
  echo "nodes=$nodes netns=$netns user_signal=$user_signal port=$port" >"$dir/settings"
  [[ -s $dir/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
  # shellcheck disable=SC2046
  write_hosts $(names)
  if ((netns)); then remove_network; make_network; fi
  write_configuration >"$SLURM_CONF"
  munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
  slurmctld -c
  for name in $(names); do
    local inside=()
    if ((netns)); then inside=(nsenter "--net=/run/netns/$name"); fi # `ip netns exec` hides /sys/fs/cgroup
    # Each slurmd runs in its own UTS namespace, so that a task's hostname is its node's name.
    "${inside[@]}" unshare --uts -- sh -c "hostname $name; exec slurmd -N $name" ||
      die "slurmd of $name did not start: $(tail -n 1 "$dir/log/slurmd-$name.log")"
  done
  for _ in $(seq 150); do # idle, not idle*, which marks a node that has not answered: the first srun would wait
    if [[ $(sinfo -h -N -p debug -o %T 2>/dev/null | grep -cx idle) == "$nodes" ]]; then
      trap - EXIT
      echo "up: $(names | tr '\n' ' ')in $dir; for this shell: eval \"\$(bash slurm/local_cluster.sh env)\"" >&2
      return
    fi
    sleep 0.1
  done
  sinfo -N -l >&2 || true
  die "the nodes are not idle after 15 s: $(tail -n 1 "$dir/log/slurmctld.log")"
}

stop() {
  [[ -f $dir/settings ]] || { echo "not up: $dir" >&2; return; }
  local name pid process
  if pid_in "$dir/run/slurmctld.pid" >/dev/null; then
    scancel --quiet $(squeue -h -o %A | sort -u) 2>/dev/null || true
    for _ in $(seq 100); do [[ -z $(squeue -h 2>/dev/null) ]] && break; sleep 0.1; done
  fi
  trap - EXIT
  for name in $(names | sed 's/^/slurmd-/') slurmctld munged; do
    if pid=$(pid_in "$dir/run/$name.pid"); then end_process "$pid"; fi
  done
  # End this cluster's slurmstepd and their tasks, which a node that was cut off or killed may have left behind.
  for process in /proc/[0-9]*; do
    if tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" &&
      { grep -qa '^slurmstepd' "$process/cmdline" || tr '\0' '\n' <"$process/environ" | grep -q '^SLURM_JOB_ID='; } 2>/dev/null; then
      kill -9 "${process#/proc/}" 2>/dev/null || true
    fi
  done
  write_hosts
  if ((netns)); then remove_network; fi
  rm -rf "$dir"/{munge,state,run,log,spool,hosts,settings,slurm.conf} # not $dir itself: it is the user's
  rmdir --ignore-fail-on-non-empty "$dir"
  echo "down" >&2
}

status() {
  [[ -f $SLURM_CONF ]] || { echo "not up: $dir"; return; }
  local name
  for name in munged slurmctld $(names | sed 's/^/slurmd-/'); do
    echo "$name: $(pid_in "$dir/run/$name.pid" || echo "not running")"
  done
  sinfo -N -l
  squeue
}

link() { # cut and heal
  ((netns)) || die "expected a cluster started with --netns, which gives each node a network"
  ip link set "sslx-$1" "$2"
}

throttle() {
  ((netns)) || die "expected a cluster started with --netns, which gives each node a network"
  local name
  for name in $(names); do
    tc qdisc del dev "sslx-$name" root 2>/dev/null || true
    nsenter "--net=/run/netns/$name" tc qdisc del dev eth0 root 2>/dev/null || true
    if [[ $1 != off ]]; then
      tc qdisc add dev "sslx-$name" root tbf rate "$1" burst 256k latency 50ms
      nsenter "--net=/run/netns/$name" tc qdisc add dev eth0 root tbf rate "$1" burst 256k latency 50ms
    fi
  done
}

case ${1:-} in
  install) install_packages ;;
  start) shift; start "$@" ;;
  stop) stop ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  cut) link "${2:?node}" down ;;
  heal) link "${2:?node}" up; scontrol update nodename="$2" state=resume 2>/dev/null || true ;;
  throttle) throttle "${2:?rate, such as 200mbit, or off}" ;;
  *) sed -n '2,9s/^# //p' "$0" >&2; exit 64 ;;
esac
