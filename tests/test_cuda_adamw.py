"""masked_adamw_ in CUDA C++: what its table, its tiles and its launches add to tests/test_masked_adamw.py.

Without a GPU the kernel runs on tests/cuda_on_cpu. Every comparison is with the reference, bit for bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import pytest
import torch
from backends import targets, use
from test_masked_adamw import REGIONS, Problem, assert_identical, assert_same, problem
from torch import Tensor

from ssah_fast import ops
from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry

TARGETS = [target for target in targets("masked_adamw_") if target.values[0][0] == "cuda"]
pytestmark = pytest.mark.skipif(not TARGETS, reason="no CUDA kernels here")

# As in csrc/cuda/masked_adamw.cu: the fewest elements of a tile, and its columns where rows are cut short.
TILE, COLUMNS = 4096, 256


@pytest.fixture(params=TARGETS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return use(request.param, monkeypatch)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Problem]:
    """Do a step in plain torch on the CPU."""

    def step(before: Problem, **options: Any) -> Problem:
        with monkeypatch.context() as patch:
            patch.setenv(registry.VARIABLE, "torch")
            return before.to("cpu").step(**options)

    return step


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[str]]:
    """Give names to regions, each (shape, axis, trainable indices or None)."""

    def add(entries: dict[str, Any]) -> list[str]:
        for name, entry in entries.items():
            monkeypatch.setitem(REGIONS, name, entry)
        return list(entries)

    return add


def joined(parts: Iterable[Problem]) -> Problem:
    """The tensors of several problems in one call."""
    parts = list(parts)
    return Problem(*([x for part in parts for x in getattr(part, f.name)] for f in fields(Problem)))


def on_device(cache: dict[str, Any]) -> Tensor:
    """The table's copy on the device; it begins with the count of started blocks."""
    return cache["cuda_table"][1]


# ---- tiles


def every(step: int, end: int) -> list[int]:
    return list(range(0, end, step))


WHOLE = {f"whole-{n}": ((n,), 0, None) for n in (1, 3, 4, 7, TILE - 1, TILE, TILE + 1, 2 * TILE + 5)}
ROWS = {f"rows-{n}": ((7, n), 0, [0, 2, 3, 6]) for n in (4, 60, 63, 64, 1020, 1024, TILE // 2 + 4)}
EDGES = {f"columns-{n}": ((18, 2 * n), 1, every(2, 2 * n)) for n in (1, COLUMNS - 1, COLUMNS, COLUMNS + 1)}
TALL = {"two-columns": ((2 * TILE + 3, 5), 1, [1, 4]), "short-pieces": ((67, 9, 8), 1, [1, 2, 4, 8])}
DEEP = {"long-pieces": ((3, 5, 132), 1, [0, 3, 4]), "odd-pieces": ((3, 5, 131), 1, [0, 3, 4])}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("kind", [WHOLE, ROWS, EDGES, TALL, DEEP], ids=["whole", "rows", "columns", "tall", "deep"])
def test_tiles_meet_without_gap_or_overlap(
    device: torch.device,
    regions: Callable[..., list[str]],
    reference: Callable[..., Problem],
    kind: dict[str, Any],
    compact: bool,
    dtype: torch.dtype,
) -> None:
    before = problem(dtype, regions(kind), compact=compact)
    assert_same(before.to(device).step().to("cpu"), reference(before))


@pytest.mark.parametrize("offset", [2**32 - TILE - 6, 2**32 - 4, 2**32, 5])
def test_a_tile_may_need_two_keys(
    device: torch.device, regions: Callable[..., list[str]], reference: Callable[..., Problem], offset: int
) -> None:
    names = regions({"long": ((2 * TILE,), 0, None), "wide": ((20, 2 * COLUMNS), 1, every(2, 2 * COLUMNS))})
    before = problem(torch.bfloat16, names)
    options = {"offsets": [offset, offset]}
    assert_same(before.to(device).step(**options).to("cpu"), reference(before, **options))


LLAMA_3_8B = [(128256, 4096)] * 2 + [(4096,)] * 65
LLAMA_3_8B += ([(14336, 4096)] * 2 + [(4096, 14336)] + [(4096, 4096)] * 2 + [(1024, 4096)] * 2) * 32


def test_a_table_of_8_billion_elements_stays_small(device: torch.device) -> None:
    """The 291 tensors of Llama-3-8B: 2^15 tiles of 8 bytes, a fraction of one norm's moments."""
    from ssah_fast import _cuda

    count, sizes = len(LLAMA_3_8B), [torch.Size(shape).numel() for shape in LLAMA_3_8B]
    assert (count, sum(sizes)) == (291, 8_030_261_248)
    zeros, ones = [0] * count, [1] * count
    columns = [*[zeros] * 8, ones, ones, ones, sizes, ones, ones, ones, zeros, zeros, zeros]
    length = len(_cuda.AdamWTable(columns).bytes())
    assert 2**15 * 8 <= length <= 2**15 * 8 + count * 256


# ---- where tensors lie


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "moved", ["weights", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "extras", "copies"]
)
def test_tensors_may_begin_anywhere(
    device: torch.device, reference: Callable[..., Problem], moved: str, shift: int
) -> None:
    """Each list on its own: a view into a larger buffer, so that 16-byte accesses are wrong for it."""
    copies = torch.bfloat16 if moved == "copies" else None
    before = problem(torch.bfloat16, ["whole", "rows-split"], rounding="kahan", amsgrad=True, copies=copies)
    after = before.to(device)
    views = []
    for x in getattr(after, moved):
        buffer = torch.zeros(x.numel() + 2 * shift, dtype=x.dtype, device=device)
        views.append(buffer[shift : shift + x.numel()].view(x.shape).copy_(x))
    setattr(after, moved, views)
    assert_same(after.step(rounding="kahan").to("cpu"), reference(before, rounding="kahan"))
    for view, x in zip(views, getattr(after, moved), strict=True):
        rest = view.as_strided((x.numel() + 2 * shift,), (1,), 0)
        assert not rest[:shift].any() and not rest[shift + x.numel() :].any()


# ---- launches


MIXED = [
    {"dtype": torch.bfloat16, "grad_dtype": torch.float32},
    {"dtype": torch.float32, "amsgrad": True},
    {"dtype": torch.float64, "grad_dtype": torch.float16},
    {"dtype": torch.float16, "copies": torch.float32},
    {"dtype": torch.bfloat16, "compact": True, "grad_dtype": torch.float64},
    {"dtype": torch.float16, "copies": torch.float16},
]


def test_any_dtypes_in_one_launch(device: torch.device, reference: Callable[..., Problem]) -> None:
    names = ["rows", "columns", "whole", "short-middle", "nothing"]
    before = joined(problem(names=names, seed=seed, **options) for seed, options in enumerate(MIXED))
    assert_same(before.to(device).step().to("cpu"), reference(before))


def test_the_table_is_built_once_and_gradients_may_move(
    device: torch.device, reference: Callable[..., Problem]
) -> None:
    before = problem(torch.bfloat16, ["rows", "columns", "whole"])
    after, expected, cache = before.to(device), before, {}
    for seed in range(3):
        grads = problem(torch.bfloat16, ["rows", "columns", "whole"], seed=seed).grads
        expected.grads, after.grads = grads, [x.to(device, copy=True) for x in grads]
        after.step(cache=cache)
        table = cache.setdefault("first table", on_device(cache))
        assert on_device(cache) is table
        assert not table[:4].any()
        expected = reference(expected)
        assert_same(after.to("cpu"), expected)
    another = before.to(device)
    again: dict[str, Any] = {}
    another.step(cache=again)
    assert on_device(again) is not on_device(cache)


@pytest.mark.parametrize("count", [496, 497, 4079, 4080, 4100])
def test_more_tensors_than_a_launch_takes(device: torch.device, count: int) -> None:
    """Parameters of 4 KB hold 496 gradients' addresses, those of 32 KB 4079; each step is counted once."""
    before = problem(torch.float32, [])
    values = torch.arange(1.0, count + 1).to(device)
    for name in ("weights", "grads", "exp_avgs", "exp_avg_sqs"):
        setattr(before, name, list(values.clone().view(count, 1)))
    before.steps = list(torch.zeros(count, device=device))
    before.axes, before.indices = [0] * count, [None] * count
    one = Problem([values.clone()], [values], [values.clone()], [values.clone()], [torch.zeros((), device=device)], [0])
    one.indices = [None]
    cache: dict[str, Any] = {}
    for _ in range(2):
        one.step()
        before.step(cache=cache)
    assert torch.equal(torch.cat(before.weights), one.weights[0])
    assert all(step == 2 for step in before.steps)
    assert not on_device(cache)[:4].any()


def test_steps_count_where_nothing_is_trained(device: torch.device) -> None:
    after = problem(torch.bfloat16, ["nothing", "empty", "empty-axis"]).to(device).step().step()
    assert [float(step) for step in after.steps] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("skipped", [{"found_inf": 1.0}, {"lr": 0.0}], ids=["found_inf", "lr"])
def test_numbers_on_the_device_are_read_there(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    reference: Callable[..., Problem],
    skipped: dict[str, float],
) -> None:
    """lr, grad_scale and found_inf as tensors; a skipped launch changes nothing, and the next one does."""
    monkeypatch.setattr(ops, "read_by_host", lambda device: False)
    before = problem(torch.bfloat16, ["rows", "columns", "whole"], rounding="kahan")
    after, cache = before.to(device), {}
    scale = torch.tensor(4.0, device=device)
    numbers = {"lr": torch.tensor(0.02, dtype=torch.float64, device=device), "found_inf": torch.zeros(1, device=device)}
    after.step(rounding="kahan", cache=cache, grad_scale=scale, **numbers)
    expected = reference(before, rounding="kahan", lr=0.02, grad_scale=scale.cpu())
    assert_same(after.to("cpu"), expected)
    changed = {name: torch.full_like(numbers[name], value) for name, value in skipped.items()}
    after.step(rounding="kahan", cache=cache, grad_scale=scale, **(numbers | changed))
    assert_identical(after.to("cpu"), expected)
    after.step(rounding="kahan", cache=cache, grad_scale=scale, **numbers)
    assert_same(after.to("cpu"), reference(expected, rounding="kahan", lr=0.02, grad_scale=scale.cpu()))


# ---- graphs and streams


@pytest.mark.gpu
def test_a_captured_step_replays(device: torch.device) -> None:
    before = problem(torch.bfloat16, amsgrad=True)
    eager, captured, cache = before.to(device), before.to(device), {}
    numbers = {"lr": torch.tensor(0.02, device=device), "found_inf": torch.zeros((), device=device)}
    captured.step(cache=cache, **numbers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(cache=cache, **numbers)
    for _ in range(2):
        graph.replay()
    numbers["found_inf"].fill_(1)
    graph.replay()
    numbers["found_inf"].zero_()
    numbers["lr"].fill_(0.01)
    graph.replay()
    for lr in (0.02, 0.02, 0.02, 0.01):
        eager.step(lr=torch.tensor(lr, device=device))
    assert_identical(eager, captured)


@pytest.mark.gpu
def test_a_first_step_cannot_be_captured(device: torch.device) -> None:
    after = problem(torch.bfloat16, ["rows"]).to(device)
    with pytest.raises(SsahError, match="run one step before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        after.step(cache={})
    assert_identical(after, problem(torch.bfloat16, ["rows"]).to(device))


@pytest.mark.gpu
def test_the_current_stream_is_used(device: torch.device, reference: Callable[..., Problem]) -> None:
    before = problem(torch.bfloat16, ["rows", "columns", "whole"])
    after, stream = before.to(device), torch.cuda.Stream()
    late = [torch.zeros_like(x) for x in after.grads]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the gradients come late, and the step waits for them
        for grad, value in zip(late, after.grads, strict=True):
            grad.copy_(value)
        after.grads = late
        after.step()
    stream.synchronize()
    assert_same(after.to("cpu"), reference(before))
