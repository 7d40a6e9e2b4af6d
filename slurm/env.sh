# Environment of every job; sourced by the scripts beside it, on the first node, in the repository's root. srun hands it
# to all nodes. Lines marked SITE are those that a cluster may want changed. What a run *is* stands in its YAML, not here.

# SITE: Python with Restill in it, on a disk that all nodes see; `module load cuda` or conda belong here too. A virtual
# environment that is active when the job is submitted stays, since sbatch hands its variables over.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# Processes on each node: one for each GPU that SLURM gave, one on the CPU.
export PROCS_PER_NODE=${PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# CPU threads of each process: its share of the task's cores. Loader workers use one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( (${SLURM_CPUS_PER_TASK:-1} + PROCS_PER_NODE - 1) / PROCS_PER_NODE ))}

# Cores of each task. srun no longer takes --cpus-per-task over from sbatch (since SLURM 22.05), and would give one.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# SITE: network interface between nodes (see `ip -br addr`), for NCCL and gloo, where the wrong one is picked.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# SITE: address of the first node, where the one that SLURM itself uses does not lead there from the other nodes.
#export HEAD_ADDRESS=

# What NCCL says of itself: WARN, or INFO to see which interface and protocol it picked.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Seconds that the launcher gives ranks to save after SIGTERM. Above SLURM's KillWait (`scontrol show config`) it does
# nothing more.
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-60}

# Output as it comes, also where stdout is a file.
export PYTHONUNBUFFERED=1

# How often a job may start again, for whatever reason: time limits and preemptions are no mishap.
export MAX_REQUEUES=${MAX_REQUEUES:-100}

# How often it may die (a rank is killed, a node's disk is full) before it stays down.
export MAX_FAILURES=${MAX_FAILURES:-3}
