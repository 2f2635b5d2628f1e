"""The CUDA kernels as nvcc compiled them for this install: nothing spills, and memory moves 16 bytes at a time."""

import os
import re
from pathlib import Path

import pytest
from compiler_report import Kernel, cuobjdump, read

import ssah_fast

LIBRARY = next(Path(ssah_fast.__file__).parent.glob("_cuda.*"), None)
ARCHITECTURES = {f"sm_{number}" for number in os.environ.get("SSAH_FAST_CUDA_ARCHS", "80;90").split(";")}

# Kernels by their mangled names, how many of each there are (dtypes, activations, aligned or not), and the accesses
# that must be of 16 bytes. Li1E: one element at a time, for rows that are not aligned.
KERNELS: list[tuple[str, int, tuple[str, ...]]] = [
    (r"segment_moments.*Rows.*Li[248]E", 4, ("LDG",)),
    (r"segment_moments.*Rows.*Li1E", 4, ()),
    (r"segment_moments.*Gated.*Li[248]EE", 16, ("LDG", "STG")),
    (r"segment_moments.*Gated.*Li1EE", 16, ()),
    (r"merge_kernel", 4, ()),  # neighbouring threads read neighbouring numbers of 8 bytes
    (r"masked_adamw_kernel", 2, ("LDG", "STG")),
]

pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="ssah_fast was built without nvcc"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither on PATH nor in triton's wheel"),
]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return read(LIBRARY)


def test_every_kernel_is_there_for_every_architecture(kernels: list[Kernel]) -> None:
    assert {kernel.arch for kernel in kernels} == ARCHITECTURES
    for pattern, number, _ in KERNELS:
        assert sum(re.search(pattern, kernel.name) is not None for kernel in kernels) == number * len(ARCHITECTURES)
    assert len(kernels) == sum(number for _, number, _ in KERNELS) * len(ARCHITECTURES)


def test_no_spills_and_wide_accesses(kernels: list[Kernel]) -> None:
    found = []
    for kernel in kernels:
        wide = next(wide for pattern, _, wide in KERNELS if re.search(pattern, kernel.name))
        found += kernel.problems(wide)
    assert found == []
