#!/usr/bin/env bash
# Make shards, one array task for each line of a list of `python -m shards` commands. From the repository's root:
#
#   sbatch --array=1-2 slurm/shards.sh LIST
#
# with a LIST such as
#   write rain100L --src /data/Rain100L --out data/rain100L/train --select 1-180
#   masks data/rain100L/val --out data/rain100L/val-masks --prior sam --with model=vit_h
#
#SBATCH --job-name=restill-shards
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=restill-shards-%A_%a.out
# SITE: take one # away; a GPU is for `masks` with SAM.
##SBATCH --gpus-per-node=1
##SBATCH --partition=cpu
##SBATCH --account=project
set -euo pipefail
[ -f slurm/env.sh ] || { echo "error: submit from the repository's root" >&2; exit 2; }
source slurm/env.sh
source slurm/list.sh
read_line_of "${1:?LIST}"
exec python -m shards "${words[@]}"
