"""What importing costs: no torch for the package and the command's help, and no change of the process's arithmetic."""

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "numpy", "transformers", "datasets", "ssah_fast._C", "ssah_fast._cuda")
LIGHT = {
    "package": "import ssah_fast; dir(ssah_fast)",
    "errors": "import ssah_fast.errors; ssah_fast.SsahError",
    "command": "import ssah_fast.cli.main",
    "help": "from ssah_fast.cli.main import main; main(['--help'])",
    "version": "from ssah_fast.cli.main import main; main(['--version'])",
}

# 1e-40 is subnormal: flushed to zero it is gone, alone or as the result of 1e-20 * 1e-20.
SUBNORMALS = """
import numpy, torch
from concurrent.futures import ThreadPoolExecutor

def subnormals():
    wide = torch.full((100_000,), 1e-20)  # enough for torch to share among its threads
    small = numpy.full(8, 1e-20, numpy.float32)
    return [
        float(numpy.float32(1e-40) * numpy.float32(1)),
        float((small * small).min()),
        float((wide * wide).min()),
        float(torch.tensor(1e-40) * 1),
        float(torch.tensor([1e-160], dtype=torch.float64) * 1e-160),
    ]

def in_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(subnormals).result()

before = subnormals()
assert min(before) > 0, before
from ssah_fast import _C
assert subnormals() == in_a_new_thread() == before, "after the import"
from ssah_fast import ops
torch.set_num_threads(2)
count, mean, m2 = torch.zeros(1, dtype=torch.int64), *torch.zeros(2, 1, 300, dtype=torch.float64)
rows = torch.full((40, 300), 1e-40)
h = ops.gated_moments_(rows, torch.ones_like(rows), torch.zeros(40, dtype=torch.int8), count, mean, m2, "relu")
assert torch.equal(h, rows), "in the kernels"
assert subnormals() == in_a_new_thread() == before, "after a call"
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ.copy(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", LIGHT)
def test_nothing_heavy_is_imported(name: str) -> None:
    code = f"import sys; {LIGHT[name]}; print(); print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code).splitlines()[-1] == "[]"


def test_the_kernels_leave_subnormal_numbers_alone() -> None:
    """A library linked with -ffast-math flushes them to zero in the whole process when it is loaded."""
    run_python(SUBNORMALS)
