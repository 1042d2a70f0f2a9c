#!/usr/bin/env bash
# Any other CI: refine, then push only if the gate was met. Usage: refine.sh MODEL DATA REPO [OPTIONS]
set -euo pipefail
model=$1 data=$2 repo=$3
shift 3

code=0
dsd-refine run "$model" --data "$data" --gate better --output-dir out --resume --yes --summary summary.md --junit junit.xml "$@" || code=$?
case $code in
  0) dsd-refine push out "$repo" ;;
  3) echo "not proven better: nothing is pushed; see summary.md" ;;
  4) echo "stopped with its state saved in out.partial/: run this again" ;;
esac
exit "$code"
