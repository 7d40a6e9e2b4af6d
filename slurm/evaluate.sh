#!/usr/bin/env bash
# Score weights or a run's newest checkpoint on all nodes of a job; the pictures are shared out. From the repository's
# root:
#
#   sbatch slurm/evaluate.sh WEIGHTS_OR_RUN SHARDS [--protocol rgb rain200 --json FILE ...]
#
#SBATCH --job-name=restill-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=restill-evaluate-%j.out
# SITE: take one # away.
##SBATCH --gpus-per-node=1
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail
[ -f slurm/env.sh ] || { echo "error: submit from the repository's root" >&2; exit 2; }
source slurm/env.sh
source slurm/nodes.sh
exec_on_all_nodes launch.evaluate "$@"
