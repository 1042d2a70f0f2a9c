#!/bin/sh
# Everything that needs a GPU, into benchmarks/results/gpu-CARD.txt: benchmarks/gpu.sh [PYTHON of the project's environment].
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' '-')
mkdir -p benchmarks/results
PYTHONPATH=. "$python" benchmarks/gpu.py | tee "benchmarks/results/gpu-$card.txt"
