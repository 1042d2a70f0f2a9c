#!/usr/bin/env bash
# Run dsd-refine, write outputs and job summary, annotate what went wrong, and end with the code that the job shall have.
set -eo pipefail
source "$(dirname "$0")/common.sh"

summary=$(mktemp)
split "$ARGS"
command=(dsd-refine run "$MODEL" --output-dir "$OUT" --gate "$GATE" --summary "$summary" --yes)
if [ -n "$DATA" ]; then command+=(--data "$DATA"); fi
if [ -n "$RECIPE" ]; then command+=(--recipe "$RECIPE"); fi
if [ -n "$SPARSITY" ]; then command+=(--sparsity "$SPARSITY"); fi
if [ -n "$PUBLISH" ]; then command+=(--publish "$PUBLISH"); fi
command+=("${words[@]}")
# SIGTERM makes the run save its state and end with exit code 4.
limit=()
if [ -n "$TIME_LIMIT" ]; then limit=(timeout --preserve-status --signal=TERM --kill-after=120 "${TIME_LIMIT}m"); fi

refine() {
  code=0
  safely "${limit[@]}" "${command[@]}" "$@" || code=$?
}

if [ -d "$OUT.partial" ]; then
  refine --resume
  if [ "$code" = 2 ]; then
    annotate notice "the saved state cannot be continued here, so the run starts anew: $(message)"
    rm -rf "$OUT.partial"
    refine
  fi
else
  refine
fi

{
  echo "exit-code=$code"
  if [ -d "$OUT.partial" ]; then echo "saved=true"; else echo "saved=false"; fi
} >> "$GITHUB_OUTPUT"
if [ -s "$summary" ]; then cat "$summary" >> "$GITHUB_STEP_SUMMARY"; fi

if [ "$code" = 0 ] || [ "$code" = 3 ] && [ -f "$OUT/dsd/report.json" ]; then
  # Each value is one of a few words, or a number, so that nothing from outside gets into the outputs.
  python - "$OUT/dsd/report.json" >> "$GITHUB_OUTPUT" <<'PYTHON'
import json, sys
report = json.load(open(sys.argv[1], encoding="utf-8"))
for name, known in (("verdict", "better worse same inconclusive"), ("credit", "mask training unknown none")):
    print(f"{name}={report[name] if report[name] in known.split() else ''}")
print(f"delta={report['comparison']['refined_vs_baseline']['delta']:.6g}")
PYTHON
  echo "report=$OUT/dsd/report.json" >> "$GITHUB_OUTPUT"
fi

case $code in
  0) ;;
  3)
    if [ -f "$OUT/dsd/report.json" ]; then text="the gate $GATE was not met; the job summary says why and what to try"; else text=$(message); fi
    if [ "$FAIL_ON_GATE" = false ] && [ -f "$OUT/dsd/report.json" ]; then
      annotate warning "$text"
      code=0
    else
      annotate error "$text"
    fi
    ;;
  4) annotate error "the run was stopped and its state is saved; run the job again, and it goes on from there" ;;
  1) annotate error "dsd-refine has a bug; the log has a traceback, please report it" ;;
  137) annotate error "the run was killed, perhaps because the memory was full; try a smaller --batch-size" ;;
  *) annotate error "$(message)" ;;
esac
exit "$code"
