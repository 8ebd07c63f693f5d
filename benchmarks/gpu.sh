#!/usr/bin/env bash
# All that is to be measured on a GPU, in one go and resumable; see studies/gpu.py. Run it in the repository's root,
# where the package is installed (or on PYTHONPATH): benchmarks/gpu.sh [--size sd15] [--backends onnxruntime,tensorrt]
exec "${PYTHON:-python3}" "$(dirname "$0")/../studies/gpu.py" all "$@"
