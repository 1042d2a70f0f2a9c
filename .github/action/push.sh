#!/usr/bin/env bash
# Push the result, and write where it is into the outputs and the job summary.
set -eo pipefail
source "$(dirname "$0")/common.sh"

split "$ARGS"
pushed=$(mktemp)
push() { dsd-refine push "$OUT" "$REPO" "${words[@]}" --json > "$pushed"; }

code=0
safely push || code=$?
if [ "$code" != 0 ]; then
  annotate error "$(message)"
  printf '\nNot pushed to %s: see the annotations of this job.\n' "$REPO" >> "$GITHUB_STEP_SUMMARY"
  exit "$code"
fi
url=$(python -c 'import json, sys; print((json.load(open(sys.argv[1], encoding="utf-8"))["url"] or "").split("\n")[0])' "$pushed")
echo "url=$url" >> "$GITHUB_OUTPUT"
printf '\nPushed: <%s>\n' "$url" >> "$GITHUB_STEP_SUMMARY"
