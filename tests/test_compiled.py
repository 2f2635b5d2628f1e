"""Every Triton kernel as users run it, compiled ahead of time to machine code: nothing spills, and accesses are wide.

Each kernels/triton/<op>.py lists in COMPILED what stands for its users' calls.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import forks
import pytest
from compiler_report import Kernel, cuobjdump, read

from ssah_fast.kernels import registry

HERE = Path(__file__).parent
TRITON = "ssah_fast.kernels.triton."
SECONDS = 600  # of one module on a busy machine; it takes a minute on a quiet core

# (kernel, constants that an entry has): the accesses that must be of 16 bytes there; the first match counts. Elsewhere
# a kernel reads and writes whole rows.
WIDE: list[tuple[str, dict, tuple[str, ...]]] = [
    ("_scalars_kernel", {}, ()),  # a few numbers per weight
    ("_masked_adamw_kernel", {"LAYOUT": 2}, ()),  # columns: indices that need not be neighbours
    ("_perturb_kernel", {"LEAD": 1}, ()),  # pairs that begin at odd addresses
    ("_merge_chunks_kernel", {}, ("LDG",)),  # writes a few rows of float64
    ("_squares_kernel", {}, ("LDG",)),  # writes one sum per program
    ("_column_norms_kernel", {}, ("LDG",)),
    ("_add_chunks_kernel", {}, ()),  # one float64 per thread
]

pytestmark = pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither on PATH nor in triton's wheel")


def op_modules() -> set[str]:
    """The module of each op that Triton runs."""
    (backend,) = [backend for backend in registry.BACKENDS if backend.name == "triton"]
    return {kernel.__module__ for kernel in registry.load(backend).ops.values()}


def modules() -> list[str]:
    """The modules with a list of what to compile: ops, and what several of them share."""
    return sorted(name for name in sys.modules if name.startswith(TRITON) and hasattr(sys.modules[name], "COMPILED"))


@pytest.fixture
def compiled(tmp_path, pytestconfig):
    """A function from a module to its entries with their machine code; what did not change since is compiled once."""

    def run(module: str) -> list[tuple[dict, Kernel]]:
        variables = {"TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
        code = (
            f"import sys, pathlib; sys.path.insert(0, {str(HERE)!r})\n"
            f"import compile_triton; compile_triton.main(pathlib.Path({str(tmp_path)!r}), [{module!r}])"
        )
        done = forks.run(code, environment, SECONDS)
        assert done.returncode == 0, done.stderr
        entries = [json.loads(line) for line in done.stdout.splitlines()]
        return [(entry, kernel) for entry in entries for kernel in read(Path(entry["file"]))]

    return run


def problems(entry: dict, kernel: Kernel) -> list[str]:
    found = (wide for name, has, wide in WIDE if name == entry["kernel"] and has.items() <= entry["constants"].items())
    return [f"{problem}: {entry}" for problem in kernel.problems(next(found, ("LDG", "STG")))]


def test_there_is_something_to_compile() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert op_modules() and op_modules() <= set(modules())


@pytest.mark.slow
@pytest.mark.parametrize("module", modules() if op_modules() else [])
def test_no_spills_and_wide_accesses(module, compiled) -> None:
    found = compiled(module)
    assert {kernel.arch.rstrip("a") for _, kernel in found} == {"sm_80", "sm_90"}
    assert [line for entry, kernel in found for line in problems(entry, kernel)] == []


def test_a_spilling_or_narrow_kernel_is_found(compiled) -> None:
    outcomes = [problems(entry, kernel) for entry, kernel in compiled("spilling_kernel")]
    wide, _, narrow, _, spilling, _ = outcomes
    assert wide == []
    for instruction, problem in zip(("LDG", "STG"), narrow, strict=True):
        assert f"has no {instruction} of 128 bits, only {{32: 8}}" in problem
    assert "uses local memory: stack" in spilling[0]
