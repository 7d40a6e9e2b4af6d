#!/usr/bin/env bash
# Train many runs, one array task for each line of a list; each is a job of slurm/train.sh, requeues included. From the
# repository's root:
#
#   sbatch --array=1-3 slurm/ablate.sh LIST      # --array=1-3%2: two at a time
#
# with a LIST such as
#   configs/derain_rain100l_nafnet.yaml name=plain-0 task=plain
#   configs/derain_rain100l_nafnet.yaml name=distilled-0
#   configs/derain_rain100l_nafnet.yaml name=distilled-1 seed=1 'prior={name: regions, num_masks: 8}'
# or the one that `python -m launch.ablate CONFIG --ladder --seeds 0 1 2 --list > LIST` writes; when its runs are done, the
# same command with --table in the place of --list compares them.
#
#SBATCH --job-name=restill-ablate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=restill-%A_%a.out
# SITE: take one # away.
##SBATCH --gpus-per-node=8
##SBATCH --partition=gpu
##SBATCH --account=project
set -euo pipefail
[ -f slurm/env.sh ] || { echo "error: submit from the repository's root" >&2; exit 2; }
source slurm/list.sh
read_line_of "${1:?LIST}"
exec bash slurm/train.sh "${words[@]}"  # in this shell's place, so that it gets the signals
