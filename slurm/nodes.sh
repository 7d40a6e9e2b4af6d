# Sourced by train.sh and evaluate.sh: runs a module on all nodes of the job.

# The first node's address as SLURM itself reaches it: the name alone may not resolve on the other nodes.
head_address() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# exec_on_all_nodes MODULE ARGUMENTS...   Becomes srun, so call it in a subshell.
# One task a node, each an `accelerate launch` of that node's processes. Ranks follow SLURM_NODEID, which only a task
# knows: hence the inner shell, which is given all else as arguments and has nothing to interpret.
# --kill-on-bad-exit: when a node's launcher fails, the others end at once instead of waiting for it in a collective.
exec_on_all_nodes() {
  # Two jobs may share a node; a requeued one keeps its number. From 32768 on the system gives ports to anybody.
  local port=$(( 20000 + SLURM_JOB_ID % 12000 ))
  exec srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --label \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' accelerate \
    --config_file launch/accelerate/slurm.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $(( SLURM_NNODES * PROCS_PER_NODE )) \
    --main_process_ip "${HEAD_ADDRESS:-$(head_address)}" --main_process_port "$port" \
    -m "$@"
}
