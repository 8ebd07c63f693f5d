#!/usr/bin/env bash
# Train both stages on a folder of yours, then make a picture with the result.
#
#     examples/train.sh FOLDER CHECKPOINT OUTPUT [OPTION OF hd-train]...
#
# FOLDER is a dataset (docs/data.md); what hd-run writes is one. CHECKPOINT comes from `hd-train init`, or is the word
# demo. With "--steps 20 --batch 2" it takes minutes and learns little: it shows whether your data is readable.
set -euo pipefail
if (($# < 3)); then
  echo "Usage: $0 FOLDER CHECKPOINT OUTPUT [OPTION OF hd-train]..." >&2
  exit 2
fi
data=$1 start=$2 out=$3
shift 3

hd-data check "$data"
hd-train hand-prior --data "$data" --start "$start" --output "$out/stage1" --run "$out/runs/stage1" "$@"
hd-train pictures --data "$data" --start "$out/stage1" --output "$out/trained" --run "$out/runs/trained" "$@"
hd-export "$out/trained" "$out/bundle"
hd-run "$out/bundle" "a left hand making a fist" --output "$out/pictures"
