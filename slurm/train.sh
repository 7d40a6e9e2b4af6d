#!/usr/bin/env bash
# Train a run on any number of nodes and GPUs. From the repository's root:
#
#   sbatch [--nodes=N --gpus-per-node=G ...] slurm/train.sh CONFIG [key=value ...]
#
# Before its time limit, or when preempted, the run saves, and the job queues again by itself; it goes on from there on
# whatever size it gets. So does a job whose rank or node died. See slurm/README.md.
#
#SBATCH --job-name=restill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=restill-%j.out
# SITE: take one # away.
##SBATCH --gpus-per-node=8
##SBATCH --partition=gpu
##SBATCH --account=project
#
# B: in --signal means this shell alone. USR1 to the processes would kill the launcher and the loaders, so the shell
# turns it into a file, RUN/stop, which the ranks see and agree on. 300 s must hold a step, a validation and a save.
set -uo pipefail
[ -f slurm/env.sh ] || { echo "error: submit from the repository's root" >&2; exit 2; }
source slurm/env.sh
source slurm/nodes.sh

# In an array SLURM_JOB_ID may be that of the whole array, and requeueing it would restart every task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start=${SLURM_RESTART_COUNT:-0}
run_dir='' usr1='' term=''
say() { echo "[$(date +%T) job $job start $start] $*"; }

# SLURM's controller may be away for a while, and a job that cannot queue again now would be lost.
patiently() {
  local tries
  for tries in {1..20}; do
    "$@" && return
    say "attempt $tries of 20: $1 fails" >&2
    sleep "${PATIENCE_S:-10}"
  done
  return 1
}

# Not if SLURM is ending the job already: of a cancelled one that would be a resurrection, and what is preempted or has
# lost a node is requeued by SLURM itself. Only what runs into its time limit is not.
requeue() {
  local state
  state=$(patiently squeue --noheader --jobs="$job" --format='%T %r')
  case $state in
    RUNNING* | 'COMPLETING TimeLimit') ;;
    *) say "is being ended by SLURM"; exit 1 ;;
  esac
  if (( start >= MAX_REQUEUES )); then say "was started $(( start + 1 )) times; MAX_REQUEUES stops it here"; exit 1; fi
  say "queues again"
  trap - USR1 TERM
  patiently scontrol requeue "$job" || exit 1
  sleep 300  # until SLURM ends this shell; an exit code of its own would end the job
}

# USR1: the time limit is near, or a preemption. TERM: `scancel`, `scontrol requeue`, a preemption without USR1, the end
# of the time limit.
on_signal() {
  say "got $1"
  [ -z "$run_dir" ] || echo "$1 from SLURM to job $job" > "$run_dir/stop"
}
trap 'usr1=yes; on_signal USR1' USR1
trap 'term=yes; on_signal TERM' TERM

# What is wrong with the configuration ends the job here, before any rank is started.
kept=$(python -m launch.job --start "$job.$start" --world $(( SLURM_NNODES * PROCS_PER_NODE )) "$@") || exit
run_dir=$(dirname "$(dirname "$kept")")
export RESTILL_OUTCOME=$kept/outcome
rm -f "$run_dir/stop" "$RESTILL_OUTCOME"  # of an earlier start that ended before it looked, or had this number
[ -z "$usr1" ] || requeue

# What is needed to know, or do again, what this start did; launch.job has put the resolved configuration there.
{
  printf 'sbatch --nodes=%s --partition=%s slurm/train.sh' "$SLURM_NNODES" "$SLURM_JOB_PARTITION"
  printf ' %q' "$@"
  printf '\n\n'
  scontrol show job "$SLURM_JOB_ID"
} > "$kept/sbatch.txt"
tar -czf "$kept/code.tar.gz" --exclude=__pycache__ shards dist_train launch slurm

say "$SLURM_NNODES nodes ($SLURM_JOB_NODELIST) x $PROCS_PER_NODE processes, run $run_dir"
( exec_on_all_nodes launch.train "$@" ) &
srun_pid=$!
while kill -0 $srun_pid 2> /dev/null; do wait $srun_pid; done  # a signal ends wait early
wait $srun_pid
code=$?

# At TERM srun ends at once, while the ranks have SLURM's KillWait to save and tell their outcome.
if [ -n "$term" ] && ! grep -qs ^finished "$RESTILL_OUTCOME"; then requeue; fi
[ -f "$RESTILL_OUTCOME" ] || echo "died: srun's exit code is $code" > "$RESTILL_OUTCOME"
outcome=$(head -n 1 "$RESTILL_OUTCOME")
say "$outcome"
case $outcome in
  finished*) exit 0 ;;
  refused*) exit 2 ;;  # a person must mend it
  interrupted*) ;;  # by a SIGTERM that this shell was not sent, as preemption without USR1 does
  stopped*) [ -n "$usr1" ] || exit 0 ;;  # a person wrote RUN/stop
  *)
    num_died=$(cat "$run_dir/jobs/$job".*/outcome | grep -c ^died)
    if (( num_died >= MAX_FAILURES )); then say "died $num_died times; MAX_FAILURES stops it here"; exit 1; fi
    ;;
esac
requeue
