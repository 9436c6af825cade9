#!/usr/bin/env bash
# Build, test and measure on a GPU with the python that is there; downloads nothing and ends within nine minutes, with
# --quick within three; --sanitize runs the CUDA C++ kernels under compute-sanitizer instead of measuring. Other
# arguments go to the measurement of whole models. Leaves in $OUT (default build/gpu):
# build.log tests.log ops.log models.log rows.csv profile.txt tuning.txt tuning.json, or build.log sanitize.log
# Fails when a step fails; a later step still runs, because its log is what explains the failure. Correctness comes
# first, and what is left of the time goes to the tuner.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
quick='' sanitize='' seconds=525
case "${1:-}" in
--quick)
  quick=yes seconds=165
  shift
  ;;
--sanitize)
  sanitize=yes seconds=580
  shift
  ;;
esac

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu.sh: $(command -v "$PYTHON" || echo "$PYTHON (not found)") has no torch that finds a usable GPU" >&2
  exit 1
fi

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
rm -f "$OUT"/{build,tests,ops,models,sanitize}.log "$OUT"/{profile,tuning}.txt "$OUT"/tuning.json "$OUT"/rows.csv
end=$((SECONDS + seconds))

failed=()
step() { # name, most seconds, log, command...; a step gets no more than what is left of the whole time
  local name=$1 seconds=$2 log=$3 start=$SECONDS left=$((end - SECONDS)) code
  shift 3
  [ "$seconds" -lt "$left" ] || seconds=$left
  if [ "$seconds" -lt 10 ]; then
    echo "$name: no time left"
    failed+=("$name")
    return
  fi
  timeout --kill-after=5 "$seconds" "$@" >>"$OUT/$log" 2>&1
  code=$?
  [ "$code" -eq 124 ] && echo "stopped after $seconds s" >>"$OUT/$log"
  echo "$name: exit $code after $((SECONDS - start)) s ($OUT/$log)"
  if [ "$code" -ne 0 ]; then
    failed+=("$name")
    tail -n 25 "$OUT/$log"
  fi
}

# The kernels' own tests, and in full those of everything built on them. Compiling is most of a test's time, hence
# several processes where pytest-xdist is installed; a new torch's warnings must not cost a run.
parallel=()
processes=$("$PYTHON" -c 'import os, xdist; print(min(8, os.cpu_count()))' 2>/dev/null) && parallel=(-n "$processes")
read -ra more <<<"${PYTEST_ARGS:-}"
pytest=("$PYTHON" -m pytest -q -W default --durations=10 -k "not emulated" "${parallel[@]}" "${more[@]}")
ops=("$PYTHON" -m fastvit bench-ops --device cuda --backend triton,cuda --csv "$OUT/rows.csv")
models=("$PYTHON" -m fastvit bench --device cuda --backend triton,cuda --csv "$OUT/rows.csv")
profile=("$PYTHON" -m fastvit profile --device cuda --batch 256 --dtype bfloat16 --depth 1 --backend eager,triton,cuda)
S=vit_small_patch16_224 B=vit_base_patch16_224 L=vit_large_patch16_224

step build 120 build.log env FASTVIT_BUILD=cuda "$PYTHON" setup.py build_ext --inplace
step info 20 build.log "$PYTHON" -m fastvit info
if [ "$sanitize" ]; then
  # Our kernels alone, what torch launches between them takes most of the time; but initcheck must see all who write.
  # Without torch's cache of memory, allocations end where tensors do.
  for tool in memcheck racecheck initcheck synccheck; do
    only=(--kernel-name kns=fastvit)
    [ "$tool" != initcheck ] || only=()
    step "$tool" 140 sanitize.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${only[@]}" \
      --error-exitcode 9 "$PYTHON" tests/cuda_smoke.py
  done
elif [ "$quick" ]; then
  step tests 60 tests.log "${pytest[@]}" tests/test_kernels*.py tests/test_cuda_*.py
  step ops 40 ops.log "${ops[@]}" --model "$B" --batch 256 --tokens 197 --direction forward,backward
  step models 25 models.log "${models[@]}" --model "$B" --batch 256 --dtype bfloat16 --repeats 10 "$@"
  step profile 20 profile.txt "${profile[@]}" --model "$B"
else
  step tests 190 tests.log "${pytest[@]}" tests/test_kernels*.py tests/test_cuda_*.py \
    tests/test_attention_options.py tests/test_{attention,layer_norm,linear,norm_mlp,patch_embed,contract,backends,model,drop_in}.py
  # Rows are written case by case: what was measured before a time-out is kept. The most important come first.
  step ops 90 ops.log "${ops[@]}" --model "$B" --batch 256 --direction forward,backward,forward+backward --peers
  step models 70 models.log "${models[@]}" --grid gpu --seconds 3 "$@"
  step profile 30 profile.txt "${profile[@]}" --model "$B" --direction forward,training
  step peers 60 models.log "${models[@]}" --model "$B" --batch 256 --dtype bfloat16 --seconds 3 --compile --peers
  step compile 40 ops.log "${ops[@]}" --model "$B" --batch 256 --tokens 197 --direction forward --compile
  step shapes 30 ops.log "${ops[@]}" --model "$S,$L" --batch 256 --tokens 197
  left=$((end - SECONDS - 15))
  step tune $((left + 10)) tuning.txt "$PYTHON" -m fastvit.benchmarks.tune \
    --op attention layer_norm linear_fc1 --budget "$left" --json "$OUT/tuning.json"
fi

[ ! -f "$OUT/rows.csv" ] || timeout 20 "$PYTHON" -m fastvit.benchmarks.table "$OUT/rows.csv"
if [ "${#failed[@]}" -gt 0 ]; then
  echo "gpu.sh: failed: ${failed[*]}" >&2
  exit 1
fi
