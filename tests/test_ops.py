"""The three ops on every backend of this machine: against float64, against plain torch, and bit against bit."""

import functools
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backends import interpreted, targets, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tolerances import CANCELLED_EPS, HIDDEN_EPS, MERGE, MOMENTS, NORMS, TWICE
from torch import Tensor

from ssah_fast import _C, ops
from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry
from ssah_fast.kernels.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
# 1, primes, about a tile (16 rows), about a vector (4 to 32 channels), several threads' shares (64 channels), nothing.
SHAPES = (
    (1, 1),
    (2, 3),
    (3, 97),
    (13, 2),
    (15, 7),
    (16, 8),
    (17, 16),
    (17, 31),
    (33, 33),
    (101, 61),
    (131, 257),
    (0, 5),
    (35, 0),
    (0, 0),
)
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
sixteen_bit = pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=lambda dtype: str(dtype).removeprefix("torch."))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
activations = pytest.mark.parametrize("activation", ops.ACTIVATIONS)


# ---- backends


@pytest.fixture(params=targets("gated_moments_"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one backend, which is the one in use."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=targets("gated_moments_", reference=False))
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The same without plain torch, for what only kernels promise: bits that do not depend on how the rows come."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=targets("column_norms"))
def norms_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one backend that has column_norms."""
    return use(request.param, monkeypatch)


# ---- data


class State(NamedTuple):
    count: Tensor
    mean: Tensor
    m2: Tensor


def new_state(groups: int, channels: int, device: torch.device | str = "cpu") -> State:
    return State(
        torch.zeros(groups, dtype=torch.int64, device=device),
        torch.zeros(groups, channels, dtype=torch.float64, device=device),
        torch.zeros(groups, channels, dtype=torch.float64, device=device),
    )


def random_rows(rows: int, channels: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal rows; standard deviations and means differ from channel to channel."""
    random = torch.Generator().manual_seed(1000 * seed + 31 * rows + channels)
    unit = torch.randn(rows, channels, generator=random, dtype=torch.float64)
    spread = torch.exp(torch.randn(channels, generator=random, dtype=torch.float64))
    return (unit * spread + torch.randn(channels, generator=random, dtype=torch.float64)).to(dtype)


def runs_of(ids: list[int], length: int) -> Callable[[int], Tensor]:
    """Runs of equal ids, as sequences in a batch make them."""
    return lambda rows: torch.tensor([ids[row // length % len(ids)] for row in range(rows)], dtype=torch.int8)


GROUPINGS = {
    "one": (1, runs_of([0], 1)),
    "skipped": (2, runs_of([-1], 1)),
    "alternating": (2, runs_of([0, 1], 1)),
    "gaps": (1, runs_of([0, -1], 5)),
    "empty": (4, runs_of([2, 2, -1, 0], 7)),
    "four": (4, runs_of([3, 0, 1, 2, -1], 19)),
}
groupings = pytest.mark.parametrize("grouping", GROUPINGS)


def moments(x: Tensor, group: Tensor, groups: int) -> State:
    state = new_state(groups, x.shape[1], x.device)
    ops.channel_moments_(x, group.to(x.device), *state)
    return state


def gated(gate: Tensor, up: Tensor, group: Tensor, groups: int, activation: str, **out: Tensor) -> tuple[Tensor, State]:
    state = new_state(groups, gate.shape[1], gate.device)
    return ops.gated_moments_(gate, up, group.to(gate.device), *state, activation, **out), state


def ones(rows: int) -> Tensor:
    """Group ids of rows that all belong to one state."""
    return torch.zeros(rows, dtype=torch.int8)


# ---- comparisons


def definition(x: Tensor, group: Tensor, groups: int) -> State:
    """float64 in two passes, each group's first row subtracted beforehand: an offset costs no precision here."""
    expected = new_state(groups, x.shape[1])
    for g in range(groups):
        rows = x[group == g].double()
        expected.count[g] = len(rows)
        if len(rows):
            deviations = rows - rows[0]
            expected.mean[g] = rows[0] + deviations.mean(0)
            expected.m2[g] = (deviations - deviations.mean(0)).square().sum(0)
    return expected


def assert_moments(state: State, expected: State, tolerance: float) -> None:
    count, mean, m2 = (tensor.cpu() for tensor in state)
    assert count.tolist() == expected.count.tolist()
    spread = (expected.m2 / expected.count.clamp_min(1)[:, None]).sqrt()
    rounding = 4 * torch.finfo(torch.float64).eps * expected.mean.abs()
    assert ((mean - expected.mean).abs() <= tolerance * spread + rounding).all()
    assert ((m2 - expected.m2).abs() <= tolerance * expected.m2 + expected.count[:, None] * rounding.square()).all()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, except that one NaN is as good as another."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    return a.dtype == b.dtype and bool((equal | (a.isnan() & b.isnan())).all())


def assert_same_state(a: State, b: State) -> None:
    for name, one, other in zip(State._fields, a, b, strict=True):
        assert same_bits(one, other), name


def assert_twice(result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of plain torch in the same precision, in the maximum and on average."""
    error, allowed = (result.double() - exact).abs(), (plain.double() - exact).abs()
    assert error.max() <= TWICE * allowed.max()
    assert error.mean() <= TWICE * allowed.mean()


# ---- channel_moments_


@dtypes
@shapes
@groupings
def test_moments_are_those_of_the_definition(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], grouping: str
) -> None:
    groups, ids = GROUPINGS[grouping]
    x, group = random_rows(*shape, dtype), ids(shape[0])
    assert_moments(moments(x.to(device), group, groups), definition(x, group, groups), MOMENTS[dtype])


def wide_view(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 9), 7.0)
    wide[:, 4:-5] = x
    return wide[:, 4:-5]


def second_half(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, 7.0), x], 1).chunk(2, dim=1)[1]


def every_second_channel(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7.0)], 2).view(x.shape[0], -1)[:, ::2]


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def every_third_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(3, 0)[1::3]


def misaligned(x: Tensor) -> Tensor:
    """Starts one element after an address that is a multiple of 64 bytes."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


LAYOUTS = (wide_view, second_half, every_second_channel, transposed, every_third_row, misaligned)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


@dtypes
@layouts
@pytest.mark.parametrize("shape", [(1, 5), (37, 1), (37, 103)], ids=str)
def test_moments_do_not_depend_on_the_layout(
    kernel_device: torch.device, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    groups, ids = GROUPINGS["four"]
    x, group = random_rows(*shape, dtype).to(kernel_device), ids(shape[0])
    assert_same_state(moments(layout(x), group, groups), moments(x, group, groups))


def test_a_row_may_be_repeated_without_a_copy(device: torch.device) -> None:
    x = random_rows(1, 37, torch.float32).to(device)
    assert_same_state(moments(x.expand(20, -1), ones(20), 1), moments(x.repeat(20, 1), ones(20), 1))


@dtypes
@groupings
def test_state_is_carried_over_calls(device: torch.device, dtype: torch.dtype, grouping: str) -> None:
    groups, ids = GROUPINGS[grouping]
    x, group = random_rows(150, 67, dtype), ids(150)
    state = new_state(groups, 67, device)
    for begin, end in pairwise((0, 1, 17, 17, 80, 150)):
        ops.channel_moments_(x[begin:end].to(device), group[begin:end].to(device), *state)
    assert_moments(state, definition(x, group, groups), MOMENTS[dtype])


@dtypes
def test_a_split_between_sequences_keeps_the_bits(kernel_device: torch.device, dtype: torch.dtype) -> None:
    """Rows of -1 lie between the sequences; a batch of all and a batch of each give the same state."""
    if os.environ[registry.VARIABLE] == "triton":
        pytest.skip("its chunks count from the first row of a call, not of a sequence")
    groups, ids = GROUPINGS["four"]
    x, group = random_rows(190, 67, dtype).to(kernel_device), ids(190).to(kernel_device)
    gaps = [0, *(row for row in range(190) if group[row] == -1), 190]
    assert len(gaps) > 20
    state = new_state(groups, 67, kernel_device)
    for begin, end in pairwise(gaps):
        ops.channel_moments_(x[begin:end], group[begin:end], *state)
    assert_same_state(state, moments(x, group, groups))


@given(part=st.lists(st.integers(0, 4), min_size=2, max_size=60), offset=st.sampled_from([0.0, 1.0, -1e3]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_and_order_merge_to_the_variance(device: torch.device, part: list[int], offset: float) -> None:
    if interpreted():
        pytest.skip("a hundred examples take minutes in the interpreter; test_state_is_carried_over_calls is the same")
    x = random_rows(len(part), 5).to(device) + offset
    state = new_state(1, 5, device)
    for p in range(5):
        rows = x[torch.tensor(part, device=device) == p]
        ops.channel_moments_(rows, ones(len(rows)).to(device), *state)
    torch.testing.assert_close(state.m2[0] / (len(part) - 1), x.var(0), rtol=MERGE, atol=0)
    torch.testing.assert_close(state.mean[0], x.mean(0), rtol=MERGE, atol=MERGE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("ratio", [1e4, 1e6], ids=["1e4", "1e6"])
def test_a_large_offset_costs_no_precision(device: torch.device, dtype: torch.dtype, ratio: float) -> None:
    x = (torch.randn(300, 67, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + ratio).to(dtype)
    # In float64 the mean itself can be stored to ratio * eps of a standard deviation only.
    tolerance = MOMENTS[dtype] + ratio * torch.finfo(torch.float64).eps
    assert_moments(moments(x.to(device), ones(300), 1), definition(x, ones(300), 1), tolerance)


@dtypes
@pytest.mark.parametrize("row", [0, 1, 16, 99])
def test_an_outlier_costs_no_precision(device: torch.device, dtype: torch.dtype, row: int) -> None:
    x = torch.randn(100, 67, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[row] = 50
    assert_moments(moments(x.to(device), ones(100), 1), definition(x, ones(100), 1), MOMENTS[dtype])


@dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1 / 3, -57.25, 6e4, 1e-5, 6e-8])
def test_a_constant_channel_has_no_variance(device: torch.device, dtype: torch.dtype, value: float) -> None:
    x = torch.full((101, 35), value).to(dtype)
    state = moments(x.to(device), ones(101), 1)
    ops.channel_moments_(x.to(device), ones(101).to(device), *state)
    square = x[0].double().square()
    assert (state.mean[0].cpu() - x[0].double()).abs().max() <= 1e-15 * square.max().sqrt()
    assert (state.m2[0].cpu() <= 1e-12 * square).all()
    assert (state.m2 >= 0).all()


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("row", [0, 7, 16, 40])
@pytest.mark.parametrize("channel", [0, 30, 66])
def test_a_value_that_is_not_finite_reaches_the_state(
    device: torch.device, dtype: torch.dtype, value: float, row: int, channel: int
) -> None:
    """It spoils its own channel of its own group and nothing else, and later rows do not heal it."""
    x, group = random_rows(41, 67, dtype), runs_of([0, 1], 5)(41)
    clean = moments(x.to(device), group, 2)
    bad = x.clone()
    bad[row, channel] = value
    state = moments(bad.to(device), group, 2)
    spoilt = torch.zeros(2, 67, dtype=torch.bool)
    spoilt[group[row], channel] = True
    for after in range(2):
        for now, before in ((state.mean, clean.mean), (state.m2, clean.m2)):
            assert torch.equal(~now.isfinite().cpu(), spoilt), after
            assert torch.equal(now.cpu()[~spoilt], before.cpu()[~spoilt])
        for each in (state, clean):
            ops.channel_moments_(x.to(device), group.to(device), *each)


@dtypes
def test_two_runs_and_any_number_of_threads_give_the_same_bits(
    kernel_device: torch.device, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    groups, ids = GROUPINGS["four"]
    channels = 67 if interpreted() else 457
    x, up, group = random_rows(140, channels, dtype), random_rows(140, channels, dtype, seed=1), ids(140)
    x, up = x.to(kernel_device), up.to(kernel_device)
    results = []
    for number in (1, 2) if interpreted() else (1, 1, 2, 3):  # the interpreter takes seconds for each
        threads(number)
        h, state = gated(x, up, group, groups, "gelu")
        results.append([*moments(x, group, groups), h, *state])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("groups", [1, 5, 127])
def test_any_number_of_groups(device: torch.device, groups: int) -> None:
    if interpreted() and groups > 5:
        pytest.skip("half a minute in the interpreter, for 32 rounds of the kernel; 5 groups take two")
    x = random_rows(300, 7, torch.bfloat16)
    group = torch.randint(-1, groups, (300,), generator=torch.Generator().manual_seed(7), dtype=torch.int8)
    assert_moments(moments(x.to(device), group, groups), definition(x, group, groups), MOMENTS[x.dtype])
    _, state = gated(x.to(device), torch.ones_like(x).to(device), group, groups, "relu")
    assert_moments(state, definition(x.relu(), group, groups), MOMENTS[x.dtype])


@pytest.mark.parametrize("rows_of_chunk", [64, 128, 256])
@pytest.mark.parametrize("grouping", ["alternating", "gaps", "four"])
def test_triton_chunks_of_any_length(monkeypatch: pytest.MonkeyPatch, rows_of_chunk: int, grouping: str) -> None:
    """A large call takes long chunks; the chunks of small ones are short, to be many."""
    chunks = pytest.importorskip("ssah_fast.kernels.triton.chunks")
    monkeypatch.setattr(chunks, "CHUNKS", (rows_of_chunk,))
    device = use(("triton", "cuda" if torch.cuda.is_available() else "cpu"), monkeypatch)
    groups, ids = GROUPINGS[grouping]
    x, group = random_rows(301, 67, torch.bfloat16), ids(301)
    expected = definition(x, group, groups)
    assert_moments(moments(x.to(device), group, groups), expected, MOMENTS[x.dtype])
    h, state = gated(x.to(device), torch.ones_like(x).to(device), group, groups, "relu")
    assert same_bits(h.cpu(), x.relu())
    assert_moments(state, definition(x.relu(), group, groups), MOMENTS[x.dtype])


# ---- gated_moments_


@dtypes
@shapes
@activations
def test_gated_is_what_two_torch_operations_give(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], activation: str
) -> None:
    groups, ids = GROUPINGS["four"]
    gate, up, group = random_rows(*shape, dtype).to(device), random_rows(*shape, dtype, 1).to(device), ids(shape[0])
    h, state = gated(gate, up, group, groups, activation)
    assert (h.shape, h.dtype, h.device) == (gate.shape, gate.dtype, gate.device)
    plain = ACTIVATIONS[activation](gate) * up
    numbers, computed = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    cancelled = CANCELLED_EPS * computed.eps * up.abs() * gate.abs().clamp_min(1)
    subnormal = numbers.smallest_normal * numbers.eps * (1 + up.abs())
    allowed = HIDDEN_EPS * numbers.eps * plain.abs() + cancelled + subnormal
    assert ((h - plain).abs() <= allowed).all()
    assert_moments(state, definition(h.cpu(), group, groups), MOMENTS[dtype])
    if os.environ[registry.VARIABLE] != "triton":  # whose two kernels sum tiles of different sizes
        assert_same_state(state, moments(h, group, groups))


@dtypes
@activations
def test_gated_errs_at_most_twice_as_much_as_torch(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    gate = (3 * torch.randn(211, 509, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).to(dtype)
    up = torch.randn(211, 509, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    h, _ = gated(gate.to(device), up.to(device), ones(211), 1, activation)
    act = ACTIVATIONS[activation]
    if dtype == torch.float64:
        torch.testing.assert_close(h.cpu(), act(gate) * up, rtol=MOMENTS[dtype], atol=50 * torch.finfo(dtype).eps)
    else:
        assert_twice(h.cpu(), act(gate) * up, act(gate.double()) * up.double())


@dtypes
@activations
def test_gated_counts_only_rows_with_a_group_but_computes_all(
    device: torch.device, dtype: torch.dtype, activation: str
) -> None:
    gate, up = random_rows(41, 67, dtype).to(device), random_rows(41, 67, dtype, 1).to(device)
    counted, state = gated(gate, up, ones(41), 1, activation)
    skipped, untouched = gated(gate, up, torch.full((41,), -1, dtype=torch.int8), 1, activation)
    assert same_bits(skipped, counted)
    assert state.count.item() == 41
    assert_same_state(untouched, new_state(1, 67, device))


@dtypes
@pytest.mark.parametrize("shape", [(1, 5), (37, 1), (37, 103)], ids=str)
def test_gated_in_place(kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """gate, up, half of a fused tensor, and rows with room between them can all take h; the room stays as it was."""
    group = GROUPINGS["gaps"][1](shape[0])
    gate, up = random_rows(*shape, dtype).to(kernel_device), random_rows(*shape, dtype, 1).to(kernel_device)
    fresh, state = gated(gate, up, group, 1, "silu")

    def check(gate: Tensor, up: Tensor, out: Tensor) -> None:
        result, other = gated(gate, up, group, 1, "silu", out=out)
        assert result is out
        assert same_bits(out, fresh)
        assert_same_state(other, state)

    for place in (0, 1):
        pair = gate.clone(), up.clone()
        check(*pair, pair[place])
        assert same_bits(pair[1 - place], (gate, up)[1 - place])
        halves = torch.cat([gate, up], 1).chunk(2, dim=1)
        check(*halves, halves[place])
        assert same_bits(halves[1 - place], (gate, up)[1 - place])
    room = torch.full((shape[0], shape[1] + 9), 7.0, dtype=dtype, device=kernel_device)
    check(gate, up, room[:, 4:-5])
    assert (room[:, :4] == 7).all()
    assert (room[:, -5:] == 7).all()


@dtypes
@layouts
def test_gated_does_not_depend_on_the_layout(
    kernel_device: torch.device, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    gate, up = random_rows(37, 103, dtype).to(kernel_device), random_rows(37, 103, dtype, 1).to(kernel_device)
    fresh, state = gated(gate, up, ones(37), 1, "gelu_tanh")
    for pair in ((layout(gate), up), (gate, layout(up)), (layout(gate), layout(up))):
        h, other = gated(*pair, ones(37), 1, "gelu_tanh")
        assert same_bits(h, fresh)
        assert_same_state(other, state)


@dtypes
@activations
@pytest.mark.parametrize("where", ["gate", "up"])
def test_gated_passes_a_nan_on(device: torch.device, dtype: torch.dtype, activation: str, where: str) -> None:
    pair = {"gate": random_rows(19, 67, dtype), "up": random_rows(19, 67, dtype, 1)}
    pair[where][17, 33] = float("nan")
    h, state = gated(pair["gate"].to(device), pair["up"].to(device), ones(19), 1, activation)
    assert h.isnan().nonzero().tolist() == [[17, 33]]
    assert (~state.mean.isfinite()).nonzero().tolist() == [[0, 33]]
    assert (~state.m2.isfinite()).nonzero().tolist() == [[0, 33]]


@sixteen_bit
def test_products_are_rounded_as_torch_rounds_them(device: torch.device, dtype: torch.dtype) -> None:
    """A million pairs of any bit patterns: products below the smallest normal number, above the largest, between."""
    rows = 64 if interpreted() else 1024
    patterns = torch.randint(-(2**15), 2**15, (2, rows, 1024), generator=torch.Generator().manual_seed(5))
    gate, up = patterns.to(torch.int16).view(dtype)
    h, _ = gated(gate.to(device), up.to(device), ones(rows), 1, "relu")
    assert same_bits(h.cpu(), gate.relu() * up)


# ---- every 16-bit value, on every instruction set


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their 16-bit type lie between a and b; 0 and -0 are one number."""
    places = (x.view(torch.int16).int() for x in (a, b))
    first, second = (torch.where(place < 0, -(place + 2**15), place) for place in places)
    return (first - second).abs()


def kind(x: Tensor) -> Tensor:
    """0 for finite numbers; NaN, Inf and -Inf have a number each."""
    return x.isnan() + 2 * x.isposinf() + 4 * x.isneginf()


def check_every_gate_value(h: Tensor, dtype: torch.dtype, activation: str) -> None:
    """h = act(every value) * 1: one step from torch's own, or nearer than float32's 1 + erf and 1 + tanh can come."""
    gate, act = every_value(dtype), ACTIVATIONS[activation]
    plain, exact = act(gate), act(gate.double())
    # torch's bf16 gelu makes NaN of Inf and, as it doubles before it halves, Inf of the largest numbers.
    assert ((kind(h) == kind(plain)) | (kind(h) == kind(exact.to(dtype)))).all()
    finite = h.isfinite() & plain.isfinite()
    h, plain, exact = h[finite], plain[finite], exact[finite]
    near = (h.double() - exact).abs() <= CANCELLED_EPS * torch.finfo(torch.float32).eps
    assert ((steps_apart(h, plain) <= 1) | near).all()
    moderate = exact.abs() < 16
    assert_twice(h[moderate], plain[moderate], exact[moderate])


@sixteen_bit
@activations
def test_every_gate_value(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    gate = every_value(dtype).to(device)
    check_every_gate_value(gated(gate, torch.ones_like(gate), ones(256), 1, activation)[0].cpu(), dtype, activation)


def save_every_output(path: str) -> None:
    """Write what each op gives for every dtype; run once per instruction set."""
    groups, ids = GROUPINGS["four"]
    outputs = {}
    for dtype in DTYPES:
        for shape in ((1, 1), (17, 31), (150, 173)):
            key, group = f"{dtype}-{shape[0]}x{shape[1]}", ids(shape[0])
            gate, up = random_rows(*shape, dtype), random_rows(*shape, dtype, 1)
            outputs |= {f"{key}-moments-{name}": t for name, t in moments(gate, group, groups)._asdict().items()}
            outputs |= {f"{key}-norms-{axis}": ops.column_norms(gate, axis) for axis in (0, 1)}
            for activation in ops.ACTIVATIONS:
                h, state = gated(gate, up, group, groups, activation)
                outputs[f"{key}-{activation}-h"] = h
                outputs |= {f"{key}-{activation}-{name}": t for name, t in state._asdict().items()}
    for dtype in SIXTEEN_BIT:
        gate = every_value(dtype)
        for activation in ops.ACTIVATIONS:
            outputs[f"{dtype}-{activation}-all"] = gated(gate, torch.ones_like(gate), ones(256), 1, activation)[0]
    save_file(outputs, path)


def save_on_every_instruction_set(folder: Path) -> None:
    """save_every_output() where this CPU can run it, in processes of their own: the choice is made once."""
    code = "import sys, test_ops; test_ops.save_every_output(sys.argv[1])"
    path, running = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]), []
    for isa in INSTRUCTION_SETS:
        chosen = {"SSAH_FAST_CPU_ISA": isa, registry.VARIABLE: "cpp", "PYTHONPATH": path}
        command = [sys.executable, "-c", code, str(folder / isa)]
        running.append(subprocess.Popen(command, env=os.environ | chosen, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, stderr = process.communicate()
        assert process.returncode == 0 or "this CPU cannot run it" in stderr, stderr


@pytest.fixture(scope="module")
def outputs_of(once_per_run: Callable[[str, Callable[[Path], None]], Path]) -> dict[str, dict[str, Tensor]]:
    """What save_every_output() saved on each instruction set of this CPU, the best first."""
    folder = once_per_run("outputs_of_test_ops", save_on_every_instruction_set)
    return {isa: load_file(folder / isa) for isa in INSTRUCTION_SETS if (folder / isa).exists()}


def require(outputs_of: dict[str, dict[str, Tensor]], isa: str) -> dict[str, Tensor]:
    if isa not in outputs_of:
        pytest.skip(f"this CPU cannot run {isa}")
    return outputs_of[isa]


def test_avx512_and_avx2_give_the_same_bits(outputs_of: dict[str, dict[str, Tensor]]) -> None:
    wide, narrow = (require(outputs_of, isa) for isa in ("avx512", "avx2"))
    assert wide.keys() == narrow.keys()
    assert [name for name in wide if not same_bits(wide[name], narrow[name])] == []


def test_the_best_instruction_set_is_the_default(outputs_of: dict[str, dict[str, Tensor]]) -> None:
    assert os.environ.get("SSAH_FAST_CPU_ISA") or _C.isa() == next(iter(outputs_of))


@sixteen_bit
@activations
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_gate_value_on_every_instruction_set(
    outputs_of: dict[str, dict[str, Tensor]], isa: str, dtype: torch.dtype, activation: str
) -> None:
    h = require(outputs_of, isa)[f"{dtype}-{activation}-all"]
    check_every_gate_value(h, dtype, activation)
    if activation == "relu":  # nothing but the conversions to float32 and back
        assert same_bits(h, every_value(dtype).relu())


@dtypes
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_definition_holds_on_every_instruction_set(
    outputs_of: dict[str, dict[str, Tensor]], isa: str, dtype: torch.dtype
) -> None:
    outputs, (groups, ids) = require(outputs_of, isa), GROUPINGS["four"]
    for rows, channels in ((1, 1), (17, 31), (150, 173)):
        key, group, gate = f"{dtype}-{rows}x{channels}", ids(rows), random_rows(rows, channels, dtype)
        stored = {f"{key}-moments": gate} | {f"{key}-{a}": outputs[f"{key}-{a}-h"] for a in ops.ACTIVATIONS}
        for name, x in stored.items():
            state = State(*(outputs[f"{name}-{field}"] for field in State._fields))
            assert_moments(state, definition(x, group, groups), MOMENTS[dtype])
        for axis in (0, 1):
            expected = gate.double().square().sum(1 - axis)
            torch.testing.assert_close(outputs[f"{key}-norms-{axis}"], expected, rtol=NORMS, atol=0)


# ---- column_norms


@dtypes
@shapes
@pytest.mark.parametrize("axis", [0, 1])
def test_norms_are_sums_of_squares(
    norms_device: torch.device, dtype: torch.dtype, shape: tuple[int, int], axis: int
) -> None:
    weight = random_rows(*shape, dtype)
    norms = ops.column_norms(weight.to(norms_device), axis)
    assert (norms.dtype, norms.device.type, norms.shape) == (torch.float64, norms_device.type, (shape[axis],))
    torch.testing.assert_close(norms.cpu(), weight.double().square().sum(1 - axis), rtol=NORMS, atol=0)


@dtypes
@layouts
@pytest.mark.parametrize("axis", [0, 1])
def test_norms_do_not_depend_on_the_layout(
    norms_device: torch.device, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], axis: int
) -> None:
    weight = random_rows(37, 103, dtype).to(norms_device)
    torch.testing.assert_close(
        ops.column_norms(layout(weight), axis), ops.column_norms(weight, axis), rtol=NORMS, atol=0
    )


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_norms_pass_on_what_is_not_finite(
    norms_device: torch.device, dtype: torch.dtype, value: float, axis: int
) -> None:
    weight = random_rows(19, 67, dtype)
    weight[17, 33] = value
    bad = (~ops.column_norms(weight.to(norms_device), axis).isfinite()).nonzero().tolist()
    assert bad == [[(17, 33)[axis]]]


@dtypes
@pytest.mark.parametrize("axis", [0, 1])
def test_norms_have_the_same_bits_in_every_run(norms_device: torch.device, dtype: torch.dtype, axis: int) -> None:
    weight = random_rows(1100, 23, dtype).to(norms_device)
    assert same_bits(ops.column_norms(weight, axis), ops.column_norms(weight, axis))


@dtypes
def test_norms_of_the_smallest_and_largest_numbers(norms_device: torch.device, dtype: torch.dtype) -> None:
    """Their squares leave float32, not float64."""
    numbers = torch.finfo(dtype)
    pair = [numbers.smallest_normal / 4, numbers.max] if dtype != torch.float64 else [1e-150, 1e150]
    weight = torch.tensor([pair] * 3, dtype=dtype)
    expected = 3 * weight[0].double().square()
    assert (expected > 0).all()
    assert expected.isfinite().all()
    torch.testing.assert_close(ops.column_norms(weight.to(norms_device)).cpu(), expected, rtol=NORMS, atol=0)


# ---- what a user can get wrong


def channel_arguments(**changed: Any) -> dict[str, Any]:
    count, mean, m2 = new_state(2, 5)
    return {"x": torch.ones(6, 5), "group": ones(6), "count": count, "mean": mean, "m2": m2} | changed


def gated_arguments(**changed: Any) -> dict[str, Any]:
    arguments = channel_arguments()
    gate = arguments.pop("x")
    return {"gate": gate, "up": gate.clone(), **arguments} | changed


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


def doubles(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


shared = doubles(2, 5)
buffer = torch.zeros(64)
fused = torch.zeros(6, 10)
MISTAKES = {
    "x-vector": (channel_arguments(x=torch.ones(5)), "x has shape [5]; expected [rows, channels]"),
    "x-int": (channel_arguments(x=torch.ones(6, 5, dtype=torch.int32)), "x has dtype torch.int32; expected one of"),
    "group-dtype": (
        channel_arguments(group=torch.zeros(6)),
        "group is torch.float32 [6]; expected contiguous int8 [6]",
    ),
    "group-length": (channel_arguments(group=ones(7)), "group is torch.int8 [7]; expected contiguous int8 [6]"),
    "group-strided": (channel_arguments(group=ones(12)[::2]), "group is torch.int8 [6]; expected contiguous int8"),
    "group-high": (
        channel_arguments(group=ids(0, 1, 2, 0, 0, 0)),
        "group has ids from 0 to 2; expected -1 (skip) to 1",
    ),
    "group-low": (
        channel_arguments(group=ids(0, 1, -2, 0, 0, 0)),
        "group has ids from -2 to 1; expected -1 (skip) to 1",
    ),
    "count-dtype": (channel_arguments(count=torch.zeros(2)), "count is torch.float32 [2]; expected contiguous int64"),
    "count-shape": (channel_arguments(count=torch.zeros(2, 1, dtype=torch.int64)), "count is torch.int64 [2, 1]"),
    "count-empty": (channel_arguments(count=torch.zeros(0, dtype=torch.int64)), "count is torch.int64 [0]; expected"),
    "count-many": (channel_arguments(count=torch.zeros(128, dtype=torch.int64)), "1 to 127 groups"),
    "count-strided": (channel_arguments(count=torch.zeros(4, dtype=torch.int64)[::2]), "count is torch.int64 [2]"),
    "mean-dtype": (
        channel_arguments(mean=torch.zeros(2, 5)),
        "mean is torch.float32 [2, 5]; expected contiguous float64",
    ),
    "mean-shape": (
        channel_arguments(mean=doubles(2, 4)),
        "mean is torch.float64 [2, 4]; expected contiguous float64 [2, 5]",
    ),
    "mean-strided": (channel_arguments(mean=doubles(5, 2).t()), "mean is torch.float64 [2, 5]; expected contiguous"),
    "m2-dtype": (
        channel_arguments(m2=torch.zeros(2, 5)),
        "m2 is torch.float32 [2, 5]; expected contiguous float64 [2, 5]",
    ),
    "m2-shape": (channel_arguments(m2=doubles(3, 5)), "m2 is torch.float64 [3, 5]; expected contiguous float64 [2, 5]"),
    "m2-mean": (channel_arguments(mean=shared, m2=shared), "mean and m2 share memory; give each its own tensor"),
    "gate-vector": (gated_arguments(gate=torch.ones(5)), "gate has shape [5]; expected [rows, channels]"),
    "up-vector": (gated_arguments(up=torch.ones(5)), "up has shape [5]; expected [rows, channels]"),
    "up-shape": (
        gated_arguments(up=torch.ones(6, 4)),
        "up is torch.float32 [6, 4] on cpu; expected torch.float32 [6, 5]",
    ),
    "up-dtype": (gated_arguments(up=torch.ones(6, 5).bfloat16()), "up is torch.bfloat16 [6, 5] on cpu; expected"),
    "out-shape": (
        gated_arguments(out=torch.ones(5, 6)),
        "out is torch.float32 [5, 6] on cpu; expected torch.float32 [6, 5]",
    ),
    "out-dtype": (gated_arguments(out=torch.ones(6, 5).double()), "out is torch.float64 [6, 5] on cpu; expected"),
    "out-strided": (gated_arguments(out=torch.ones(5, 6).t()), "out has strided channels; give it contiguous rows"),
    "out-expanded": (gated_arguments(out=torch.ones(1, 5).expand(6, 5)), "out has rows 0 elements apart that overlap"),
    "out-gate": (
        gated_arguments(gate=buffer[:30].view(6, 5), out=buffer[5:35].view(6, 5)),
        "out overlaps part of gate; pass gate itself or other memory",
    ),
    "out-up": (
        gated_arguments(up=fused[:, :5], out=fused[:, 4:9]),
        "out overlaps part of up; pass up itself or other memory",
    ),
    "out-stride": (
        gated_arguments(gate=buffer[:30].view(6, 5), out=buffer[:60].view(6, 10)[:, :5]),
        "out overlaps part of gate; pass gate itself or other memory",
    ),
    "activation": (
        gated_arguments(activation="swish"),
        "activation='swish' is unknown; choose one of silu, gelu, gelu_tanh, relu",
    ),
    "gated-group": (gated_arguments(group=ids(0, 1, 2, 0, 0, 0)), "group has ids from 0 to 2; expected -1 (skip) to 1"),
    "weight-vector": ({"weight": torch.ones(5)}, "weight has shape [5]; expected [rows, channels]"),
    "weight-int": ({"weight": torch.ones(5, 5, dtype=torch.int8)}, "weight has dtype torch.int8; expected one of"),
    "axis": ({"weight": torch.ones(5, 5), "axis": 2}, "axis=2 is not an axis of a matrix; choose 0 or 1"),
    "axis-negative": ({"weight": torch.ones(5, 5), "axis": -1}, "axis=-1 is not an axis of a matrix; choose 0 or 1"),
}
OP_OF_FIRST_ARGUMENT = {"x": ops.channel_moments_, "gate": ops.gated_moments_, "weight": ops.column_norms}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_in_one_line(device: torch.device, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    if device.type != "cpu":
        pytest.skip("the messages name the device and the ids are looked at on the CPU only")
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(SsahError) as error:
        OP_OF_FIRST_ARGUMENT[next(iter(arguments))](**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(SsahError, match=r"group is on cpu but the rows are on cuda:0"):
        ops.channel_moments_(**channel_arguments(x=torch.ones(6, 5, device="cuda")))


def test_the_neighbours_of_an_overlap_are_allowed(device: torch.device) -> None:
    """The other half of a fused tensor, the next rows of a buffer, and a part of the row beyond the channels in use."""
    for gate, out in (
        (fused[:, :5], fused[:, 5:]),
        (fused[:3], fused[3:]),
        (fused[3:], fused[:3]),
        (fused[:1, :5], fused[:1, 5:]),
    ):
        gate, up, state = gate.to(device), torch.ones_like(gate).to(device), new_state(1, gate.shape[1], device)
        ops.gated_moments_(gate, up, ones(len(gate)).to(device), *state, out=out.to(device))
        assert state.count.item() == len(gate)


# ---- torch.library


@pytest.mark.parametrize("op", [ops.channel_moments_, ops._gated_moments_into], ids=lambda op: op._name)
@dtypes
def test_opcheck(device: torch.device, op: Any, dtype: torch.dtype) -> None:
    x, group, state = random_rows(7, 5, dtype).to(device), ones(7).to(device), new_state(1, 5, device)
    arguments = {
        ops.channel_moments_: (x, group, *state),
        ops._gated_moments_into: (x, x.clone(), group, *state, "silu", torch.empty_like(x)),
    }
    torch.library.opcheck(op, arguments[op])


@dtypes
def test_opcheck_of_norms(norms_device: torch.device, dtype: torch.dtype) -> None:
    torch.library.opcheck(ops.column_norms, (random_rows(7, 5, dtype).to(norms_device), 0))


def test_compiled_code_calls_the_ops(norms_device: torch.device) -> None:
    def both(x: Tensor, up: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
        ops.channel_moments_(x * 2, group, count, mean, m2)
        h = ops.gated_moments_(x, up, group, count, mean, m2, "gelu")
        return ops.column_norms(h), h + mean[0].to(h.dtype)

    x, up, group = (
        random_rows(37, 19).to(norms_device),
        random_rows(37, 19, seed=1).to(norms_device),
        ones(37).to(norms_device),
    )
    eager, compiled = new_state(1, 19, norms_device), new_state(1, 19, norms_device)
    expected = both(x, up, group, *eager)
    results = torch.compile(both, fullgraph=True, backend="aot_eager")(x, up, group, *compiled)
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    assert_same_state(compiled, eager)


def test_compiled_code_writes_in_place(device: torch.device) -> None:
    def in_place(fused: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
        gate, up = fused.chunk(2, dim=1)
        return ops.gated_moments_(gate, up, group, count, mean, m2, out=gate) + up

    rows, group = random_rows(37, 38).to(device), ones(37).to(device)
    eager, compiled = (rows.clone(), new_state(1, 19, device)), (rows.clone(), new_state(1, 19, device))
    expected = in_place(eager[0], group, *eager[1])
    result = torch.compile(in_place, fullgraph=True, backend="aot_eager")(compiled[0], group, *compiled[1])
    assert same_bits(result, expected)
    assert same_bits(compiled[0], eager[0])
    assert_same_state(compiled[1], eager[1])


@dtypes
def test_meta_tensors_give_shapes(dtype: torch.dtype) -> None:
    x, group = torch.empty(7, 5, dtype=dtype, device="meta"), torch.empty(7, dtype=torch.int8, device="meta")
    state = new_state(2, 5, "meta")
    assert ops.channel_moments_(x, group, *state) is None
    h = ops.gated_moments_(x, x, group, *state)
    assert (h.shape, h.dtype, h.device.type) == (x.shape, dtype, "meta")
    for axis in (0, 1):
        norms = ops.column_norms(x, axis)
        assert (norms.shape, norms.dtype, norms.device.type) == ((x.shape[axis],), torch.float64, "meta")


# ---- the benchmark's ceiling


@pytest.mark.parametrize("blocks", [0, 1, 3, 64, 1001])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_stream_read_is_the_xor_of_all_words(blocks: int, number: int) -> None:
    words = torch.randint(-(2**62), 2**62, (8 * blocks,), generator=torch.Generator().manual_seed(6))
    expected = functools.reduce(operator.xor, words.tolist(), 0) % 2**64
    assert _C.stream_read(words.data_ptr(), 64 * blocks, number) == expected
