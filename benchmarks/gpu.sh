#!/usr/bin/env bash
# Everything that needs a GPU, on all GPUs of this machine: the tests marked gpu, then each recipe's speed and memory on 1, 2,
# 4 and 8 GPUs, and with each `train.compile`; at most 25 minutes on one. Writes docs/gpu.md. Not yet run on a GPU.
#
#   benchmarks/gpu.sh [PYTHON]        # in an environment with distgan[dev]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
nvidia-smi --query-gpu=name,memory.total,power.limit --format=csv
timeout 480 "$python" -m pytest -q -m gpu || echo "some tests failed: see above"
timeout 1020 "$python" benchmarks/gpu.py --out docs/gpu.md
