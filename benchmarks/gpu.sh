#!/bin/sh
# Everything that needs a GPU: its tests, then the figures, into benchmarks/results/gpu-CARD.txt.
#   benchmarks/gpu.sh [PYTHON of the project's environment]
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -c 'A-Za-z0-9\n' '-')
mkdir -p benchmarks/results
result=benchmarks/results/gpu-$card
PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} "$python" -m pytest -n 0 -p no:cacheprovider tests/test_gpu.py
PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} "$python" benchmarks/gpu.py > "$result.part" || { cat "$result.part"; exit 1; }
if [ "$(nvidia-smi --list-gpus | wc -l)" -gt 1 ]; then
  PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} "$python" benchmarks/sharded.py >> "$result.part" || { cat "$result.part"; exit 1; }
fi
mv "$result.part" "$result.txt"
cat "$result.txt"
