#!/usr/bin/env bash
# Everything that wants a GPU, in at most 8 minutes on one H100 or H200: the most important first, each step with its own
# limit, its record written as it ends, and a table of the steps last.
#
#     bash benchmarks/on_gpu.sh                   # records in benchmarks/results/gpu/
#     TRIAL=1 OUT=/tmp/gpu bash benchmarks/on_gpu.sh    # tiny sizes on the CPU: whether the commands still work
#
# PYTHON is the interpreter (python), OUT the folder of the records, WORKERS the processes that fetch images (8), STEPS
# the names of the steps to take (all).
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-benchmarks/results/gpu} WORKERS=${WORKERS:-8} TRIAL=${TRIAL:-}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$PYTHON" - <<'PY' || { echo "Install the package first: pip install -c constraints.txt -e '.[dev]'" >&2; exit 1; }
import importlib.util, torch
has = importlib.util.find_spec
print("torch", torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU")
for name, what in (("pytest", "the tests"), ("kornia", "tests of its augmentations"), ("triton", "compiled layers")):
    if has(name) is None:
        print(f"{name} is not installed: {what} are left out")
for name in ("torch", "transformers", "peft", "accelerate", "datasets", "peft_cl"):
    if has(name) is None:
        raise SystemExit(f"{name} is not installed")
PY
if [ -z "$TRIAL" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "There is no CUDA device. TRIAL=1 tries the commands at tiny sizes on the CPU." >&2
    exit 1
fi

SUMMARY=()
step() {  # NAME LIMIT_IN_SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS state
    shift 2
    [[ -z "${STEPS:-}" || " $STEPS " == *" $name "* ]] || return 0
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    case $? in
        0) state=done ;;
        124 | 137) state="cut off after $limit s" ;;
        *) state="failed: $(grep -v '^ *$' "$OUT/$name.log" | tail -n 1 | cut -c1-100)" ;;
    esac
    grep -E '^\||passed|failed|(train|eval) .* (yes|no) ' "$OUT/$name.log"
    SUMMARY+=("| $name | $((SECONDS - began)) s | $state |")
}

if [ -n "$TRIAL" ]; then
    TINY=(--layers 1 --image-size 32) STEP=(--device cpu --batch-size 2 --repeats 1 --dtype float32) ONE=(--device cpu --turns 1 --batch-size 2)
    SEQUENCE=(--backbone vit-tiny-64 --tasks 2 --images 1 --pixels 32 --batch-size 8) SHARE=(--device cpu --batch-size 2 --steps 2)
    FLOAT=() LONG=1
    TESTS=(-m pytest -q tests/test_registration.py)
else
    TINY=() STEP=(--device cuda --threads 8 --batch-size 128 --repeats 5) ONE=(--device cuda)
    SEQUENCE=(--batch-size 128 --workers "$WORKERS" --pixels 32) SHARE=(--backbone vit-b16 --device cuda --batch-size 128 --workers "$WORKERS")
    FLOAT=(--dtype bfloat16 float32) LONG=20
    TESTS=(-m pytest -q -m gpu tests/test_gpu.py)
fi
B="$PYTHON benchmarks"
step tests 120 "$PYTHON" "${TESTS[@]}"
step sequence_best 75 $B/sequence_time.py "${SEQUENCE[@]}" --methods best --json "$OUT/sequence_best.json"
step step_cost 70 $B/step_cost.py "${STEP[@]}" "${FLOAT[@]}" "${TINY[@]}" --json "$OUT/step_cost.json"
step latency 35 $B/latency.py "${ONE[@]}" "${TINY[@]}" --json "$OUT/latency.json"
step trainer_share 40 $B/trainer_share.py "${SHARE[@]}" --json "$OUT/trainer_share.json"
# Last, as it is the longest: what is done of it before it is cut off says nothing.
step sequence_coda_20 $((480 - SECONDS > 60 ? 480 - SECONDS : 60)) \
    $B/sequence_time.py "${SEQUENCE[@]}" --methods coda --epochs $LONG --json "$OUT/sequence_coda_20.json"
echo
echo "| Step | Time | State |"
echo "|---|---:|---|"
printf '%s\n' "${SUMMARY[@]}"
! printf '%s\n' "${SUMMARY[@]}" | grep -qv '| done |$'
