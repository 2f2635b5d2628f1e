#!/usr/bin/env bash
# Builds ssah_fast._C with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary folder and runs the op tests
# against it. PYTHON: an interpreter with the development dependencies (default python3). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$root/$python ;; esac
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# A whole package of its own: the sanitized _C beside copies of the Python files.
export SSAH_FAST_SANITIZE=address,undefined SSAH_FAST_CUDA=0
"$python" setup.py --quiet build_ext --build-lib "$out/lib" --build-temp "$out/temp" >"$out/log" 2>&1 || {
    cat "$out/log"
    exit 1
}
cp ssah_fast/*.py "$out/lib/ssah_fast/"
cp -r kernels cli "$out/lib/ssah_fast/"

# libasan must be the process's first library, with libstdc++ there when it looks for __cxa_throw. Python leaks, so leaks
# are not looked for. PYTHONPATH comes before the finder of an editable install; the tests' subprocesses inherit it.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$out/lib PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
cd "$out/lib"

# The tests would pass on any build: first see that it is this one, and that a read of one row too many ends it.
cat >"$out/control.py" <<'EOF'
import sys

import torch

from ssah_fast.kernels.cpp import _C

if not _C.__file__.startswith(sys.argv[1]):
    sys.exit(f"{_C.__file__} is not the sanitized build in {sys.argv[1]}")
print("loaded", flush=True)
weight, norms = torch.ones(3, 5), torch.zeros(5, dtype=torch.float64)
_C.column_norms(_C.DType.f32, weight.data_ptr(), 5, 4, 5, 1, norms.data_ptr(), 1)
EOF
if "$python" "$out/control.py" "$out/lib" >"$out/log" 2>&1 ||
    ! grep -q '^loaded' "$out/log" || ! grep -q 'heap-buffer-overflow' "$out/log"; then
    cat "$out/log"
    echo "sanitize: the sanitizers did not report a read behind the end of a tensor" >&2
    exit 1
fi

"$python" -m pytest -q -n 2 -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" "$root/tests/test_ops.py" \
    "$root/tests/test_masked_adamw.py" "$root/tests/test_perturb.py" -k "not triton and not torch-cpu" "$@"
