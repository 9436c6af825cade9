#!/usr/bin/env bash
# Build, test and measure on a GPU with the python that is there; downloads nothing and ends within nine minutes.
# Leaves in $OUT (default build/gpu): build.log tests.log bench.log info.json rows.csv rows.png
# Fails when a step fails; a later step still runs, because its log is what explains the failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu.sh: $(command -v "$PYTHON" || echo "$PYTHON (not found)") has no torch that finds a usable GPU" >&2
  exit 1
fi

failed=()
step() { # name, seconds, log, command...
  local name=$1 seconds=$2 log=$3 start=$SECONDS code
  shift 3
  timeout --kill-after=5 "$seconds" "$@" >"$OUT/$log" 2>&1
  code=$?
  [ "$code" -eq 124 ] && echo "stopped after $seconds s" >>"$OUT/$log"
  echo "$name: exit $code after $((SECONDS - start)) s ($OUT/$log)"
  if [ "$code" -ne 0 ]; then
    failed+=("$name")
    tail -n 25 "$OUT/$log"
  fi
}

rm -f "$OUT"/{build,tests,bench}.log "$OUT"/info.json "$OUT"/rows.{csv,png}
# Tests that concern no GPU stay away, and a new torch's warnings must not cost a run. Compiling kernels is most of a
# test's time, hence several processes where pytest-xdist is installed.
parallel=$("$PYTHON" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
elsewhere=(--ignore=tests/test_aot.py --ignore=tests/test_install.py --ignore=tests/test_architecture.py)
step build 100 build.log "$PYTHON" setup.py build_ext --inplace
step info 20 info.json "$PYTHON" -m fastvit info --json
step tests 240 tests.log "$PYTHON" -m pytest tests -q -W default --durations=10 "${elsewhere[@]}" $parallel ${PYTEST_ARGS:-}
# The rows are written case by case: what was measured before a time-out is kept and drawn.
step bench 160 bench.log "$PYTHON" -m fastvit bench --device cuda --repeats 20 --dtype bfloat16,float16 \
  --model vit_small_patch16_224,vit_base_patch16_224,vit_large_patch16_224 --batch 1,64,256 --csv "$OUT/rows.csv" "$@"
if [ -f "$OUT/rows.csv" ]; then
  cat "$OUT/bench.log"
  timeout 20 "$PYTHON" -m fastvit.benchmarks.plot "$OUT/rows.csv" -o "$OUT/rows.png" || failed+=(plot)
fi

if [ "${#failed[@]}" -gt 0 ]; then
  echo "gpu.sh: failed: ${failed[*]}" >&2
  exit 1
fi
