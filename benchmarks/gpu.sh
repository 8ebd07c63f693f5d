#!/usr/bin/env bash
# All that is to be measured on a GPU, in one go and resumable; see benchmarks/gpu.py. Run it in the repository's root,
# where the package is installed (or on PYTHONPATH): benchmarks/gpu.sh [--size sd15] [--backends onnxruntime,tensorrt]
exec "${PYTHON:-python3}" -m handiffuser.benchmarks.gpu all "$@"
