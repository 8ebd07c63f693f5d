#!/usr/bin/env bash
# What is to be measured on a GPU, resumable; see studies/gpu.py. Run it in the repository's root, where the package is
# installed (or on PYTHONPATH). Two acts of seven minutes at most, or everything:
#   benchmarks/gpu.sh a | b
#   benchmarks/gpu.sh [--size sd15] [--backends onnxruntime,tensorrt]
case "${1:-}" in
    a | b) set -- act "$@" ;;
    *) set -- all "$@" ;;
esac
exec "${PYTHON:-python3}" "$(dirname "$0")/../studies/gpu.py" "$@"
