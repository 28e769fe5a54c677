#!/usr/bin/env bash
# Tests of the GPU paths, then what is measured on a GPU, in under 8 minutes: benchmarks/gpu.sh [FILE.json]
set -euo pipefail
file=$(realpath -m "${1:-gpu.json}")
cd "$(dirname "$0")/.."
python -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_triton_attention.py || status=$?
python benchmarks/gpu.py --json "$file"
exit "${status:-0}"
