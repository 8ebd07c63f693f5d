#!/usr/bin/env bash
# All that is to be measured on a GPU, in one go. Run it in the repository's root, where the package is installed:
#
#     benchmarks/gpu.sh                              # random weights of Stable Diffusion 1.5's size, every backend
#     benchmarks/gpu.sh tiny onnxruntime inductor    # another size, some backends; without a GPU it runs on the CPU
#
# Results go to benchmarks/results/<date>-<GPU>/: versions, the gpu tests, and for each backend raw samples (JSON) and a
# page with plots. A backend that is missing or fails is noted there, and the next one goes on.
set -uo pipefail
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
size=${1:-sd15}
shift
backends=("$@")
[ ${#backends[@]} -gt 0 ] || backends=(onnxruntime inductor tensorrt tensorrt-rtx)
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr ' /' '--')
device=cuda precision=fp16
[ -n "$gpu" ] || { gpu=CPU device=cpu precision=fp32; }
out=${OUT:-benchmarks/results}/$(date +%F)-$gpu
work=${WORK:-$(mktemp -d)}
mkdir -p "$out"
run() { "$python" -c 'import sys; from handiffuser import commands; getattr(commands, sys.argv.pop(1))()' "$@"; }

{
    nvidia-smi 2>/dev/null
    "$python" -c '
import importlib.metadata as m
names = "torch diffusers onnxruntime onnxruntime-gpu tensorrt tensorrt-rtx cuda-bindings numpy handiffuser".split()
known = {d.metadata["Name"]: d.version for d in m.distributions()}
print(*(f"{n} {known[n]}" for n in names if n in known), sep="\n")'
} >"$out/machine.txt"

"$python" -m pytest -q -m gpu tests >"$out/gpu-tests.txt" 2>&1
tail -3 "$out/gpu-tests.txt"

checkpoint=$work/$size-checkpoint
[ -e "$checkpoint/model_index.json" ] || "$python" -c '
import sys
from handiffuser import demo
from handiffuser.models.checkpoint import random_checkpoint
from handiffuser.models.configs import CONFIGS
random_checkpoint(CONFIGS[sys.argv[1]], body=demo.checkpoint_path() / "body" / "smplh.npz").save(sys.argv[2])' \
    "$size" "$checkpoint" || exit 1

first=1
for backend in "${backends[@]}"; do
    echo "== $backend"
    {
        run hd_export "$checkpoint" "$work/$backend" --backend "$backend" --precision $precision --fidelity never \
            --batch-sizes 1,4,8 --guidance-free &&
            run hd_bench "$work/$backend" --checkpoint "$checkpoint" --backend "$backend" --device $device \
                --batch-sizes 1,4,8 --steps 20,50 ${QUICK:+--repeats 1} \
                --output "$out/$backend.json" --report "$out/$backend.html" \
                $([ $first ] && echo --peers) # the peers are the same for every backend
    } >"$out/$backend.txt" 2>&1 && first= || echo "$backend failed; see $out/$backend.txt"
    grep -v '^{' "$out/$backend.txt" | tail -40
done
echo "Results are in $out."
