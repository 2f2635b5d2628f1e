"""Where there is no GPU: tests marked gpu are skipped, Triton kernels are interpreted and CUDA kernels emulated.

The interpreter is chosen when triton is imported, the emulation when ssah_fast.kernels.cuda is.
"""

import fcntl
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import cuda_on_cpu
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    cuda_on_cpu.install()


# Parameters that say which numbers a kernel meets, not which memory it touches.
VALUES = {"value", "row", "channel", "mistake"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests of a GPU where there is none; leave out cases that only repeat others, if they are slow there."""
    left_out: set[pytest.Item] = set()
    cases = [item for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    if os.environ.get("SSAH_FAST_SANITIZE"):
        left_out.update(differ_in_values_alone(cases))
        left_out.update(item for item in items if "draws" in getattr(item, "fixturenames", ()))  # statistics of noise
    if not GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        interpreted: dict[str, list[pytest.Function]] = defaultdict(list)
        for case in cases:
            if case.path.name == "test_ops.py" and ("triton", "cpu") in case.callspec.params.values():
                interpreted[case.originalname].append(case)
        left_out.update(case for test in interpreted.values() for case in set(test) - a_few(test))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def differ_in_values_alone(cases: list[pytest.Function]) -> set[pytest.Function]:
    """All but one of the cases that are the same to a sanitizer; which one is kept changes from dtype to dtype."""
    alike: dict[str, dict[tuple[str, ...], list[pytest.Function]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        parameters = case.callspec.params
        # Where there are shapes, activations too: test_every_gate_value goes through each with every number.
        unseen = VALUES | {"activation"} if "shape" in parameters else VALUES
        if unseen & parameters.keys():
            seen = tuple(f"{name}={value!r}" for name, value in parameters.items() if name not in unseen)
            alike[case.nodeid.partition("[")[0]][seen].append(case)
    return {
        case
        for test in alike.values()
        for turn, same in enumerate(test.values())
        for i, case in enumerate(same)
        if i != (turn + turn // len(same)) % len(same)
    }


def a_few(cases: list[pytest.Function]) -> set[pytest.Function]:
    """About a dozen cases of many, among them one with each value of each parameter."""
    # Strides prime to the numbers of dtypes, shapes and groupings, so that their values meet in turn.
    kept = set(cases[:: 1 + 4 * max(len(cases) // 50, len(cases) > 20)])
    seen = {value for case in kept for value in values(case)}
    for case in cases:
        if not seen.issuperset(values(case)):
            kept.add(case)
            seen.update(values(case))
    return kept


def values(case: pytest.Function) -> set[str]:
    return {f"{name}={value!r}" for name, value in case.callspec.params.items()}


@pytest.fixture(scope="session")
def once_per_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function from a name and from what fills a folder to that folder: xdist's workers share one, filled once."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        path = base / name
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                unfinished = Path(tempfile.mkdtemp(dir=base))
                fill(unfinished)
                unfinished.rename(path)
        return path

    return folder


@pytest.fixture
def working_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """A function that makes a folder of links to all that another holds, and goes there; commands print no colours."""

    def go(master: Path) -> Path:
        monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
        for path in master.iterdir():
            (tmp_path / path.name).symlink_to(path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NO_COLOR", "1")
        return tmp_path

    return go


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, and puts it back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
