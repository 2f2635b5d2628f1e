"""Where there is no GPU: tests marked gpu are skipped, Triton kernels are interpreted and CUDA kernels emulated.

The interpreter is chosen when triton is imported, the emulation when ssah_fast.kernels.cuda is.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator

import cuda_on_cpu
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    cuda_on_cpu.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is no GPU: skip what needs one, and keep about a dozen cases of each interpreted test of the ops."""
    if GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    interpreted: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if item.path.name == "test_ops.py" and ("triton", "cpu") in parameters.values():
            interpreted[item.originalname].append(item)
    # Strides prime to the numbers of dtypes, shapes and groupings, so that each of these comes up.
    left_out = {
        item for cases in interpreted.values() for i, item in enumerate(cases) if i % (1 + 4 * (len(cases) // 50))
    }
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, and puts it back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
