#!/usr/bin/env bash
# The main job from nothing, on a CPU: shards, two ranks of training with all terms, evaluation, export, restoring.
# Run again, each step says what is already there; the training goes on from its newest checkpoint. Another method needs
# another name: NAME=demo_sam bash launch/demo.sh prior.name=sam prior.model=vit_b prior.download=true
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
NAME=${NAME:-demo}
out=runs/$NAME
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + 1) / 2 ))}  # two ranks share this machine's cores
say() { printf '\n== %s\n' "$*"; }

say "1/6 WebDataset shards of real photographs (scikit-image's) under synthetic rain"
python -m shards synth rain_light --out runs/demo_shards --seed 7

say "2/6 training student and teacher on two CPU ranks: accelerate launch, DeepSpeed ZeRO-2, gloo"
echo "The masks come from 'regions', a classical over-segmentation: this is NOT SAM, and the features of SGR are random."
echo "With SAM and VGG-19:  NAME=demo_sam bash launch/demo.sh prior.name=sam prior.model=vit_b prior.download=true \\"
echo "                          features.arch=vgg19 features.weights=download"
accelerate launch --config_file launch/accelerate/cpu_2rank.yaml -m launch.train configs/demo.yaml name="$NAME" "$@"

say "3/6 the student alone, exported: no SAM, VGG, teacher or DeepSpeed in it"
python -m launch.export "$out" "$out/student.safetensors"

say "4/6 scores on held-out photographs"
python -m launch.evaluate "$out/student.safetensors" runs/demo_shards/val --json "$out/scores.json"

say "5/6 restoring pictures (taken out of a shard, which is a plain tar)"
mkdir -p "$out/degraded"
tar -xf runs/demo_shards/val/000000.tar -C "$out/degraded" --wildcards '*.lq.png'
python -m launch.restore --overwrite "$out/student.safetensors" "$out/degraded" "$out/restored"

say "6/6 before and after, and a page of the run"
python -m launch.before_after "$out/student.safetensors" runs/demo_shards/val "$out/before_after.png"
python -m launch.report "$out" --out "$out/report.html"
echo "Look at $out/before_after.png, at $out/report.html in a browser, at $out/pictures/ (student, teacher, masks as training"
echo "went on), $out/metrics.jsonl"
