"""Which backend runs an op: `auto` falls back, a backend asked for by name works or raises, and one line says why."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import forks
import pytest
import torch

from ssah_fast import ops
from ssah_fast.errors import SsahError
from ssah_fast.kernels import reference, registry
from ssah_fast.kernels.registry import Backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = ("channel_moments_", "gated_moments_", "column_norms")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.VARIABLE, raising=False)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fast one for one op on GPUs, one that can be interpreted, one without a module, and a slow one for all."""
    fast, interpreted, slow = (ModuleType(f"{name}_backend") for name in ("fast", "interpreted", "slow"))
    fast.OPS = {"add": lambda: "fast add"}
    interpreted.OPS, interpreted.DEVICES = {"add": lambda: "interpreted add"}, ("cuda", "cpu")
    slow.OPS = {"add": lambda: "slow add", "norm": lambda: "slow norm"}
    for module in (fast, interpreted, slow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    table = (
        Backend("fast", ("cuda",), "fast_backend"),
        Backend("interpreted", ("cuda",), "interpreted_backend"),
        Backend("broken", ("cpu", "cuda"), "no_such_backend"),
        Backend("slow", (), "slow_backend"),
    )
    monkeypatch.setattr(registry, "BACKENDS", table)
    monkeypatch.setattr(registry, "NAMES", ("auto", *(backend.name for backend in table)))
    registry.load.cache_clear()
    yield
    registry.load.cache_clear()


@pytest.mark.parametrize(
    ("device", "op", "result"),
    [(CUDA, "add", "fast add"), (CUDA, "norm", "slow norm"), (CPU, "add", "slow add"), (CPU, "norm", "slow norm")],
    ids=["cuda-add", "cuda-norm", "cpu-add", "cpu-norm"],
)
@pytest.mark.parametrize("name", [None, "", "auto"])
def test_auto_takes_the_first_that_can(
    backends: None, monkeypatch: pytest.MonkeyPatch, device: torch.device, op: str, result: str, name: str | None
) -> None:
    if name is not None:
        monkeypatch.setenv(registry.VARIABLE, name)
    assert registry.select(op, device)() == result
    assert registry.select(op, device, name)() == result


def test_a_name_overrides_the_order(backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.VARIABLE, "slow")
    assert registry.select("add", CUDA)() == "slow add"
    assert registry.select("add", CUDA, "fast")() == "fast add"


def test_a_device_that_only_the_name_unlocks(backends: None) -> None:
    """What interprets or emulates GPU kernels on the CPU never runs unasked."""
    assert registry.select("add", CPU)() == "slow add"
    assert registry.select("add", CPU, "interpreted")() == "interpreted add"


def test_what_cannot_run_is_not_imported(backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_backend", None)
    assert registry.select("add", CPU)() == "slow add"
    assert registry.load.cache_info().currsize == 2  # broken and slow


@pytest.mark.parametrize(
    ("name", "op", "device", "reason"),
    [
        ("broken", "add", CPU, "broken: No module named 'no_such_backend'"),
        ("fast", "add", CPU, "fast: it runs on cuda, not on cpu"),
        ("fast", "norm", CUDA, "fast: it has no norm; its ops: add"),
    ],
    ids=["import-fails", "other-device", "op-missing"],
)
def test_a_name_works_or_raises(
    backends: None, monkeypatch: pytest.MonkeyPatch, name: str, op: str, device: torch.device, reason: str
) -> None:
    monkeypatch.setenv(registry.VARIABLE, name)
    with pytest.raises(SsahError) as error:
        registry.select(op, device)
    expected = f"SSAH_FAST_BACKEND={name} cannot run {op} on {device.type} ({reason}); unset it to choose automatically"
    assert str(error.value) == expected


def test_when_none_can_every_reason_is_given(backends: None) -> None:
    with pytest.raises(SsahError) as error:
        registry.select("sort", CPU)
    for reason in (
        "fast: it runs on cuda, not on cpu",
        "interpreted: it runs on cuda, not on cpu",
        "broken: No module",
        "slow: it has no sort; its ops: add, norm",
    ):
        assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.VARIABLE, "fastest")
    with pytest.raises(SsahError) as error:
        ops.column_norms(torch.ones(2, 2))
    assert str(error.value) == "SSAH_FAST_BACKEND=fastest is unknown; choose one of auto, cuda, triton, cpp, torch"


@pytest.mark.parametrize("available", [False, True])
def test_missing_gives_the_reasons(backends: None, monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert registry.missing() == {
        "fast": None if available else "torch finds no CUDA device",
        "interpreted": None,
        "broken": "No module named 'no_such_backend'",
        "slow": None,
    }


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("import sys; sys.modules['triton'] = None", "triton is not installed; install it with pip install triton"),
        ("import torch; torch.cuda.is_available = lambda: False", "torch finds no CUDA device"),
    ],
    ids=["no-triton", "no-device"],
)
def test_why_triton_is_missing(code: str, printed: str) -> None:
    done = run_python(
        f"{code}; from ssah_fast.kernels import registry; print(registry.missing())", TRITON_INTERPRET="0"
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_the_triton_backend_does_not_hide_triton() -> None:
    """kernels/triton/ is ssah_fast.kernels.triton, and what it imports as triton is the real one."""
    code = "import triton, ssah_fast.kernels.triton as ours; print(triton.__version__, len(ours.OPS))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == str(len(reference.OPS))


def test_this_build_has_the_cpu_kernels() -> None:
    """Without them `auto` would run everything on the reference and every other test would still pass."""
    missing = registry.missing()
    assert missing["cpp"] is None
    assert missing["torch"] is None
    for op in OPS:
        assert registry.select(op, CPU).__module__ == "ssah_fast.kernels.cpp"


@pytest.mark.parametrize("op", OPS)
def test_the_reference_defines_every_op_on_every_device(op: str) -> None:
    for backend in registry.BACKENDS:
        assert registry.load(backend)[0].keys() <= reference.OPS.keys()
    for device in (CPU, CUDA, torch.device("xpu")):
        assert registry.select(op, device, "torch") is reference.OPS[op]


def test_gpu_tensors_are_not_given_to_the_cpu_kernels() -> None:
    with pytest.raises(SsahError, match=r"cpp: it runs on cpu, not on cuda"):
        registry.select("column_norms", CUDA, "cpp")


# ---- the instruction set of the C++ kernels


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return forks.run(code, env=os.environ | variables)


CALL = "import torch; from ssah_fast import ops; print(ops.column_norms(torch.ones(2, 2)))"
TWICE = """
import torch
from ssah_fast import ops
from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry
for _ in range(2):
    try:
        ops.column_norms(torch.ones(2, 2))
    except SsahError as error:
        print(error)
"""


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_an_unknown_instruction_set_is_one_clear_line(backend: str) -> None:
    """Not a crash, not a silent fall back to plain torch, and the same at the second call."""
    done = run_python(TWICE, SSAH_FAST_CPU_ISA="sse9", SSAH_FAST_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["SSAH_FAST_CPU_ISA=sse9 is not one of avx512, avx2, baseline"] * 2


@pytest.mark.parametrize(
    ("isa", "backend"), [("sse9", "torch"), ("", "auto"), ("baseline", "auto")], ids=["unused", "empty", "baseline"]
)
def test_an_instruction_set_that_does_no_harm(isa: str, backend: str) -> None:
    done = run_python(CALL, SSAH_FAST_CPU_ISA=isa, SSAH_FAST_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert "2." in done.stdout
