#!/usr/bin/env bash
# Trains the demo of people from nothing to a bundle, and measures it. Run the same command again to go on anywhere.
#
#     benchmarks/people.sh OUT [RECIPE] [SCENES] [HELD_OUT_SCENES]
#
# RECIPE: human on CPUs (the default), human-gpu on one large GPU, or a .toml file.
#
# The checkpoint knows two people. One scene in seven shows two people who touch, others two who do not.
#
# Scenes need CPUs alone (0.35 to 0.6 CPU seconds each): for a GPU that is rented by the minute, run the first command
# elsewhere before.
set -euo pipefail
out=${1:?"Give the folder to work in."} recipe=${2:-human} scenes=${3:-50000} count=${4:-480}
processes=$(nproc)
world=$out/people runs=$out/runs

hd-data demo "$world" --world human --scenes "$scenes" --pairs 0.15 --processes "$processes"
hd-train vae --recipe "$recipe" --data "$world" --run "$runs/autoencoder" --output "$out/autoencoder"
[ -f "$out/start/model_index.json" ] || hd-train grow "$out/autoencoder" demo "$out/start" --data "$world"
hd-train all --recipe "$recipe" --data "$world" --start "$out/start" --run "$runs/teacher" --output "$out/teacher"
hd-train distill --recipe "$recipe" --data "$world" --start "$out/teacher" --run "$runs/painter" --output "$out/painter"
hd-train distill-hands --recipe "$recipe" --data "$world" --start "$out/painter" --run "$runs/student" \
  --output "$out/student" --half
[ -f "$out/bundle/manifest.json" ] || hd-export "$out/student" "$out/bundle"
"${PYTHON:-python3}" "$(dirname "$0")/../studies/people.py" "$out/report" --checkpoint "$out/student" \
  --count "$count" -o "$out/report.json"
