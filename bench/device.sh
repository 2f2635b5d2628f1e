#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds from sources without network, runs the GPU tests, compute-sanitizer and every
# bench, and writes device.log, env.json and bench.csv to a folder. All of it takes less than 9 minutes.
#
#   bench/device.sh [FOLDER] [build|test|sanitize|bench ...]      default: all four, in this order
#
# FOLDER may be left out where $OUT names it. The other steps need what `build` left in $VENV (/tmp/ssah_fast_device). A
# step that fails or runs out of time does not stop the next; the exit code is the number of such steps. $PYTHON
# (python3) must have pip, torch, triton, transformers, pytest, pytest-xdist, hypothesis, pybind11, ninja and setuptools.
set -uo pipefail

SECONDS_IN_ALL=520
# What a step may take; what one leaves over is for the bench.
declare -A LIMIT=([build]=150 [test]=150 [sanitize]=120 [bench]=400)

steps=()
for word in "$@"; do
    if [[ -n "${LIMIT[$word]:-}" ]]; then steps+=("$word"); else OUT=$word; fi
done
[[ ${#steps[@]} -gt 0 ]] || steps=(build test sanitize bench)
[[ -n "${OUT:-}" ]] || {
    echo "device.sh: give a folder for the results, or set OUT" >&2
    exit 64
}
host_python=$(command -v "${PYTHON:-python3}") || {
    echo "device.sh: PYTHON=${PYTHON:-python3} was not found" >&2
    exit 69
}
mkdir -p "$OUT" && OUT=$(realpath "$OUT") && cd "$(dirname "$0")/.." || exit 73
VENV=${VENV:-/tmp/ssah_fast_device}
python=$VENV/bin/python
cores=$(nproc)
workers=$((cores < 8 ? cores : 8))
# Hugging Face must not wait for a network; `python -m` must not import the source folder in place of the package.
export HF_HUB_OFFLINE=1 PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 NO_COLOR=1 TRITON_CACHE_DIR=$VENV/triton
command -v nvcc >/dev/null || export PATH=$PATH:/usr/local/cuda/bin

make_venv() {
    # A venv made by a venv's python does not see that one's packages; this .pth file shows them.
    "$host_python" -m venv --without-pip "$VENV" || return
    "$host_python" -c 'import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")' \
        >"$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/host.pth"
}

step_build() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader) || return
    capability=${capability%%$'\n'*} # of the first GPU
    [[ -x $python ]] || make_venv || return
    SSAH_FAST_CUDA=1 SSAH_FAST_CUDA_ARCHS=${SSAH_FAST_CUDA_ARCHS:-${capability//./}} \
        "$python" -m pip install --no-index --no-build-isolation --no-deps --editable . || return
    "$VENV/bin/ssah-fast" env --json >"$OUT/env.json" && "$VENV/bin/ssah-fast" env
}

step_test() {
    OMP_NUM_THREADS=2 "$python" -m pytest tests -q -m gpu -n "$workers" --dist loadgroup -p no:cacheprovider \
        --durations=10 --maxfail=40
}

step_sanitize() {
    # Without torch's cache every tensor is an allocation of its own, so that an access just outside is seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1
    sanitizer() {
        compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "$python" tests/every_gpu_op.py
    }
    each sanitizer memcheck racecheck
}

step_bench() {
    # One by one, so that the tables of the others are there when one fails; rows are written as they are measured.
    measure() {
        "$VENV/bin/ssah-fast" bench "$1" --csv "$OUT/bench.csv"
    }
    each measure moments adamw perturb score train stream
}

each() { # function, arguments: calls it with one after another; the time left is shared among those to come
    local call=$1 failed=0 share
    export -f "$call"
    shift
    while (($#)); do
        share=$(((STEP_SECONDS - SECONDS - 5) / $#))
        echo "-- $1 (at most $share s)"
        if ((share > 0)); then
            timeout --signal=INT --kill-after=4 "$share" bash -c "$call $1" || failed=$?
        else
            failed=124
        fi
        shift
    done
    return "$failed"
}

run_steps() {
    local step limit left start code outcome failures=0 summary=()
    for step in "${steps[@]}"; do
        left=$((SECONDS_IN_ALL - SECONDS)) start=$SECONDS code=124
        limit=$((LIMIT[$step] < left ? LIMIT[$step] : left))
        echo "== $step (at most $limit s)"
        # By timeout in a process group of its own, which is ended as a whole.
        ((limit <= 0)) ||
            STEP_SECONDS=$limit timeout --signal=INT --kill-after=10 "$limit" bash -uo pipefail -c "step_$step"
        code=$((limit <= 0 ? 124 : $?))
        case $code in
            0) outcome=ok ;;
            124 | 137) outcome="out of time" ;;
            *) outcome="failed ($code)" ;;
        esac
        ((code == 0)) || failures=$((failures + 1))
        summary+=("$(printf '%-9s %-12s %4d s' "$step" "$outcome" $((SECONDS - start)))")
    done
    printf '%s\n' "== summary" "${summary[@]}"
    return "$failures"
}

export OUT VENV host_python python workers
export -f make_venv each step_build step_test step_sanitize step_bench
run_steps 2>&1 | tee "$OUT/device.log"
exit "${PIPESTATUS[0]}"
