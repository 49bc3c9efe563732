#!/usr/bin/env bash
# What there is to see on a machine with a GPU, by stages of under nine minutes each; a table comes last.
#
#   benchmarks/gpu_check.sh [--dry] [selftest] [build] [sanitize] [instrument] [test] [method] [tune] [tune_steps] [ops]
#                          [train] [tuned] [whole]
#
# What is wrong on this GPU shows first: `selftest` takes a minute and needs no build, and names each operation that
# crashes, hangs or is not near float64. Then the sanitizers, over what `build` has built too: `sanitize` looks for access
# past memory and for races in shared memory, `instrument` for memory that is read before it is written and, by Triton's
# own sanitizer, for copies that nobody waits for. The marks come last.
# Without a name it takes all stages, but for those that ended well with these sources under this $OUT: called again after
# an interruption, it goes on. Stages that are named run again. The tests run once, on all cores where pytest-xdist is
# installed: those of the kernels in `test`, those of training steps in `method`. What is timed after them in `ops`,
# `train` and `tuned` is not tested again.
# No stage reads a tuned table but `tuned`: it times again what `tune` (operations) and `tune_steps` (whole steps) wrote
# entries for. `unfused` is timed beside `ours` both times, so a larger speed-up there says that tuning pays. Its rows go to
# rows/tuned/.
# Needs the repository, torch with triton, nvcc, compute-sanitizer, pytest, transformers and peft; no network, no data.
# Python packages that are missing can lie as wheels in the folder $WHEELS. Everything goes under $OUT
# (benchmarks/results/gpu): a log a stage, rows of measurements in rows/, the same packed in rows.tar.gz, tuned tables in
# tables/, summary.txt.
# --dry runs the stages on a CPU with tiny sizes and does not verify what it times. Other variables: PYTHON (python3),
# MODELS, RANKS and TOKENS of the operations, ROWS (another folder for rows), STAGE_SECONDS (530), WORKERS of the tests (8).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAGES=(selftest build sanitize instrument test method tune tune_steps ops train tuned whole)
READ_TABLES=('linear_*' 'swiglu_*' 'qkv_*')
OPERATIONS=("${READ_TABLES[@]}" 'group_*' compact '*rms_norm' rotary_embedding cross_entropy)
dry=0 chosen=()
for argument in "$@"; do
  case " ${STAGES[*]} " in
    *" $argument "*) chosen+=("$argument") ;;
    *) [[ $argument == --dry ]] || { echo "unknown stage '$argument': use some of ${STAGES[*]}, or --dry" >&2; exit 2; }
       dry=1 ;;
  esac
done
named=${#chosen[@]}
((named)) || chosen=("${STAGES[@]}")

export PYTHON=${PYTHON:-python3} STAGE_SECONDS=${STAGE_SECONDS:-530}
export OUT=${OUT:-$PWD/benchmarks/results/gpu}
export ROWS=${ROWS:-$OUT/rows}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Here the self-test keeps what it found, for the runs of other stages. No tuned table comes here.
export ATP_KERNELS_TABLES=$OUT/untuned
unset TRITON_INTERPRET
# shellcheck disable=SC2206  # MODELS and RANKS are lists of words
if ((dry)); then
  device=cpu dtype=float32 tests=(tests/atp_kernels/test_dispatch.py) limits=(--threads 1 --rounds 2 --dtype float32 --no-verify)
  method=(tests/atp/decide/test_budget.py)
  sizes=(--model ${MODELS:-tiny} --rank ${RANKS:-8} --tokens "${TOKENS:-64}")
  trained=("--model tiny --length 32 --batch 2 --rounds 2 --threads 1 --no-verify")
  steps=("--model tiny --rank 8 --tokens 64")
  runs="--model tiny --steps 3 --length 32 --batch 2 --dtype float32 --threads 1"
else
  device=cuda dtype=bfloat16 tests=(tests/atp_kernels) limits=()
  method=(tests/atp/lora tests/atp/decide tests/atp/removal tests/atp/training/{test_trainer,test_offload}.py)
  sizes=(--model ${MODELS:-llama2-7b} --rank ${RANKS:-16} --tokens "${TOKENS:-8192}")
  trained=("--model 1b --batch 8" "--model 7b --batch 2 --checkpointing --rounds 3")
  steps=("--model 1b --rank 8 --tokens 8192" "--model 7b --rank 8 --tokens 2048")
  runs="--device cuda --model 1b --steps 30 --length 1024 --dtype bfloat16"
fi

# Of what the stages run, so that neither git nor a commit is needed to see that it changed.
SOURCES=$(find atp_kernels atp csrc benchmarks tests setup.py pyproject.toml -type f \
  -regex '.*\.\(py\|cpp\|cu\|h\|sh\|toml\)' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
STAMP="$device ${SOURCES%% *}"

prepare() {
  mkdir -p "$OUT" "$ROWS" || return 1
  PYTHONPATH=$PWD
  if [[ -n ${WHEELS:-} ]]; then
    local site
    site=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || return 1
    PYTHONPATH=$site:$PWD
  fi
  export PYTHONPATH
  "$PYTHON" - "$device" <<'END'
import importlib.util
import sys

needed = "torch triton numpy pytest hypothesis expecttest transformers peft accelerate yaml".split()
needed += "pydantic pydantic_core annotated_types typing_inspection".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing Python packages: {', '.join(missing)}; put their wheels into a folder and name it in WHEELS")
import torch

if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no GPU here; --dry runs the stages on the CPU")
END
}

# The variants of every operation on the device against its unfused form; $1 goes before the command, the rest are sizes.
agree() {
  local before=$1
  shift
  # shellcheck disable=SC2086  # words of a command
  $before "$PYTHON" -m benchmarks check --device "$device" --op "${OPERATIONS[@]}" --dtype float32 bfloat16 \
    --variants addmm ours ours_dense ours:reference ours:triton ours:native "$@"
}

# A hanging operation costs a minute: the stage ends in time with up to seven of them.
run_selftest() {
  "$PYTHON" -m atp_kernels.selftest --device "$device" --fresh --timeout 60
}

run_build() {
  local arch
  arch=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
print(f"{major}.{minor}" + "a" * (major > 8))')
  ATP_BUILD=1 ATP_BUILD_CUDA=$((1 - dry)) TORCH_CUDA_ARCH_LIST=$arch "$PYTHON" setup.py build_ext --inplace || return 1
  "$PYTHON" -c '
import sys
from atp_kernels import extension
print(extension.build_info())
sys.exit(sys.argv[1] == "cuda" and not extension.build_info()["cuda_archs"])' "$device"
}

tested() {
  local parallel=()
  "$PYTHON" -c 'import xdist' 2> /dev/null && ((!dry)) && parallel=(-n "${WORKERS:-8}" --dist worksteal)
  "$PYTHON" -m pytest -q "${parallel[@]}" "$@"
}

run_method() {
  tested "${method[@]}"
}

run_test() {
  tested "${tests[@]}" || return 1
  agree "" --model tiny --tokens 1 37 --rank 8 64 || return 1
  ((dry)) || agree "" --model smollm2-135m --tokens 777 --rank 16
}

SANITIZER="compute-sanitizer --error-exitcode 1 --print-limit 20 --tool"

# Each in half a stage. $@: commands that the check of all variants runs under.
sanitized() {
  local sanitizer status=0
  # Without torch's cache every tensor is an allocation of its own, whose end memcheck knows.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for sanitizer in "$@"; do
    ((dry)) && { echo "not run on a CPU: $sanitizer"; sanitizer=; }
    agree "timeout --foreground $((STAGE_SECONDS / 2)) $sanitizer" --model tiny --tokens 37 --rank 8 || status=1
  done
  return $status
}

run_sanitize() {
  sanitized "$SANITIZER memcheck" "$SANITIZER racecheck"
}

run_instrument() {
  sanitized "$SANITIZER initcheck" "env TRITON_INSTRUMENTATION_MODE=consan"
}

tune() {
  "$PYTHON" -m atp_kernels.tune --device "$device" --folder "$OUT/tables" --dtype "$dtype" "$@"
}

run_tune() {
  local model status=0
  # shellcheck disable=SC2086  # lists of words
  for model in ${MODELS:-$( ((dry)) && echo tiny || echo llama2-7b)}; do
    tune --model "$model" --tokens "${sizes[@]: -1}" --rank ${RANKS:-$( ((dry)) && echo 8 || echo 16)} || status=1
  done
  return $status
}

# After the cut a linear has a width that no entry is about, so that only steps before it are tuned.
run_tune_steps() {
  local options status=0
  for options in "${steps[@]}"; do
    # shellcheck disable=SC2086  # words of a command
    tune --regime decision first_out first_in $options || status=1
  done
  return $status
}

# Tests what is timed next, once, unless the stage $1 has; the rest are operations. A dry run does without.
verify() {
  local stage=$1
  shift
  ((dry)) || is_done "$stage" || "$PYTHON" -m benchmarks verify --op "$@" || return 1
  export ATP_BENCHMARKS_VERIFIED=1
}

run_ops() {
  local status=0 pattern
  verify test "${OPERATIONS[@]}" || return 1
  for pattern in "${OPERATIONS[@]}"; do
    "$PYTHON" -m benchmarks run --op "$pattern" --device "$device" --out "$ROWS" "${sizes[@]}" "${limits[@]}" || status=1
  done
  "$PYTHON" -m benchmarks plot --op "${OPERATIONS[@]}" --out "$ROWS" || status=1
  return $status
}

run_train() {
  local options status=0
  verify method 'train_*' || return 1
  for options in "${trained[@]}"; do
    # shellcheck disable=SC2086  # words of a command
    "$PYTHON" -m benchmarks.training --lenient --device "$device" --out "$ROWS" $options || status=1
  done
  return $status
}

run_tuned() {
  local options status=0
  compgen -G "$OUT/tables/*.json" > /dev/null || { echo "no tuned table: run the stage tune first"; return 1; }
  verify test "${READ_TABLES[@]}" && verify method train_decision train_search || return 1
  export ATP_KERNELS_TABLES=$OUT/tables
  "$PYTHON" -m benchmarks run --op "${READ_TABLES[@]}" --variants unfused ours ours_plain ours_kept_first \
    --device "$device" --out "$ROWS/tuned" "${sizes[@]}" "${limits[@]}" || status=1
  for options in "${trained[@]}"; do
    # shellcheck disable=SC2086  # words of a command
    "$PYTHON" -m benchmarks.training --op train_decision train_search --variants unfused ours \
      --device "$device" --out "$ROWS/tuned" $options || status=1
  done
  return $status
}

run_whole() {
  # shellcheck disable=SC2086  # words of a command
  "$PYTHON" -m benchmarks.whole_run --lenient --out "$ROWS" $runs
}

# Whether a stage ended well, on this device and with these sources.
is_done() {
  [[ $(cat "$OUT/done/$1" 2> /dev/null) == "$STAMP" ]]
}

# A stage runs in a process of its own, so that it can be stopped as a whole.
if [[ -n ${GPU_CHECK_STAGE:-} ]]; then
  "run_$GPU_CHECK_STAGE"
  exit
fi

prepare || exit 1
mkdir -p "$OUT/done"
failed=0 told=() summary=$OUT/summary.txt
"$PYTHON" -c '
import sys
from benchmarks.records import environment
print(*(f"{name} {value}" for name, value in environment(sys.argv[1]).items()), sep=", ")' "$device" > "$summary"
for stage in "${chosen[@]}"; do
  if ((!named)) && is_done "$stage"; then
    told+=("$(printf '%-10s %4s    %s' "$stage" "" "done before")")
    continue
  fi
  rm -f "$OUT/done/$stage"
  started=$SECONDS
  GPU_CHECK_STAGE=$stage timeout "$STAGE_SECONDS" bash benchmarks/gpu_check.sh "$@" 2>&1 | tee "$OUT/$stage.log"
  case ${PIPESTATUS[0]} in
    0) result=ok; echo "$STAMP" > "$OUT/done/$stage" ;;
    124) result="stopped after $STAGE_SECONDS s" failed=1 ;;
    *) result=FAILED failed=1 ;;
  esac
  told+=("$(printf '%-10s %4d s  %s' "$stage" $((SECONDS - started)) "$result")")
done
"$PYTHON" -m benchmarks table --out "$ROWS" >> "$summary" || failed=1
if [[ -d $ROWS/tuned ]]; then
  echo "with tuned tables:" >> "$summary"
  "$PYTHON" -m benchmarks table --out "$ROWS/tuned" >> "$summary" || failed=1
fi
printf '%s\n' "${told[@]}" >> "$summary"
tar -czf "$OUT/rows.tar.gz" -C "$ROWS" .
printf '\n'
cat "$summary"
exit $failed
