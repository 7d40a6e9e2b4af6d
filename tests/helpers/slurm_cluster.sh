#!/usr/bin/env bash
# slurm_cluster.sh NODES FOLDER COMMAND...   A real SLURM of its own for COMMAND, gone when COMMAND ends.
#
#   bash tests/helpers/slurm_cluster.sh 2 /tmp/cluster bash        # a shell with sbatch, squeue, sinfo
#
# Needs root and Debian's slurmctld slurmd slurm-client munge iproute2 util-linux; installs nothing. FOLDER takes
# configuration, state and logs (about 1 MB). munged, slurmctld and a slurmd for each of n1..nN run in the foreground,
# without systemd or cgroups. Every node has a network, host name and process numbers of its own, as machines have, and
# so has the controller: what works by luck on one machine (MASTER_ADDR=127.0.0.1) fails here as on a cluster.
# All of it hangs under one process namespace: when its first process ends, however it ends, the kernel kills the rest
# and takes the network down, so there is nothing to clean up. Nothing appears on the machine's own network.
#
# To pull the plug of a node, from within: pkill -9 -f "slurmd -D -N n2"
set -euo pipefail
if [ "${1:-}" != --inside ]; then
  [ $# -ge 3 ] || { echo "usage: $0 NODES FOLDER COMMAND..." >&2; exit 2; }
  exec unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash "$0" --inside "$@"
fi
num_nodes=$2 folder=$3
shift 3
mkdir -p "$folder"/{state,log,run,spool}
folder=$(cd "$folder" && pwd)
net=10.77.0
export SLURM_CONF=$folder/slurm.conf
hostname ctl
ip link set lo up
ip link add br0 type bridge
ip addr add $net.254/24 dev br0
ip link set br0 up
{
  echo "127.0.0.1 localhost"
  echo "$net.254 ctl"
  for i in $(seq "$num_nodes"); do echo "$net.$i n$i"; done
} > "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts

# The option that sends a job its --signal at preemption has moved between releases.
case $(slurmctld -V) in
  *\ 1?.*|*\ 2[0-2].*) signal_at_preemption="SlurmctldParameters=preempt_send_user_signal" ;;
  *) signal_at_preemption="PreemptParameters=send_user_signal" ;;
esac
memory_mib=$(( $(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512 ))
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=ctl($net.254)
SlurmUser=root
SlurmdUser=root
# cred_expire: a requeued job waits until its credential has expired, by default 120 s.
AuthInfo=socket=$folder/run/munge.sock,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=${KILL_WAIT:-30}
MinJobAge=3600
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$signal_at_preemption
JobRequeue=1
$(for i in $(seq "$num_nodes"); do
  echo "NodeName=n$i NodeAddr=$net.$i CPUs=${CPUS:-4} RealMemory=$memory_mib State=UNKNOWN"
done)
PartitionName=train Nodes=ALL Default=YES MaxTime=1-00:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE_TIME:-60}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF

(umask 077; head -c 128 /dev/urandom > "$folder/munge.key")
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/run/munge.sock" --num-threads=2 \
  --pid-file="$folder/run/munged.pid" --seed-file="$folder/run/munged.seed" > "$folder/log/munged.out" 2>&1 &
until [ -S "$folder/run/munge.sock" ]; do sleep 0.05; kill -0 $!; done
slurmctld -D -c > "$folder/log/slurmctld.out" 2>&1 &
for i in $(seq "$num_nodes"); do
  # slurmd is no first process of a namespace: those must reap orphans, which a shell does.
  unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
    bash -c "hostname n$i; until [ -e /sys/class/net/eth0 ]; do sleep 0.05; done; slurmd -D -N n$i & wait" \
    > "$folder/log/slurmd.n$i.out" 2>&1 &
  until inside=$(cat "/proc/$!/task/$!/children") && [ -n "$inside" ]; do sleep 0.01; done
  inside=${inside%% *}
  ip link add "veth$i" type veth peer name eth0 netns "$inside"
  ip link set "veth$i" master br0 up
  nsenter --net="/proc/$inside/ns/net" bash -c "ip addr add $net.$i/24 dev eth0; ip link set eth0 up; ip link set lo up"
done
idle() { sinfo --noheader --partition train --states idle --format %D 2>/dev/null || true; }
for _ in $(seq 200); do [ "$(idle)" = "$num_nodes" ] && break; sleep 0.1; done
if [ "$(idle)" != "$num_nodes" ]; then
  echo "slurm_cluster: the nodes did not come up" >&2
  sinfo -N -l >&2 || true
  tail -n 5 "$folder"/log/* >&2
  exit 1
fi
"$@"
