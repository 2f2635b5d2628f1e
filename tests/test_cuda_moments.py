"""The CUDA moment kernels where rows are many: windows of 512 rows, more segments than the workspace has room for."""

from collections.abc import Iterator

import pytest
import torch
from backends import targets, use
from test_ops import (
    State,
    assert_moments,
    assert_same_state,
    definition,
    dtypes,
    gated,
    misaligned,
    moments,
    new_state,
    ones,
    random_rows,
    same_bits,
)
from tolerances import MOMENTS
from torch import Tensor

from ssah_fast import ops

WINDOW = 512


@pytest.fixture(params=[target for target in targets("channel_moments_") if target.values[0][0] == "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return use(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def memory_that_was_never_written_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with 255 in each byte
    yield
    torch.use_deterministic_algorithms(False)


def of_lengths(*runs: tuple[int, int]) -> Tensor:
    """Runs of (group, rows)."""
    return torch.cat([torch.full((rows,), group, dtype=torch.int8) for group, rows in runs])


PATTERNS = {
    "one window": of_lengths((0, WINDOW)),
    "one row more": of_lengths((0, WINDOW + 1)),
    "many windows": of_lengths((0, 9 * WINDOW + 7)),  # more than are looked back over at once
    "windows that start in a run": of_lengths((1, 100), (0, 3 * WINDOW), (1, 2 * WINDOW - 1), (-1, 3), (0, 700)),
    "runs that start and end a window": of_lengths((0, WINDOW - 1), (1, WINDOW + 1), (-1, WINDOW), (1, 1), (0, 2)),
    "skipped": of_lengths((-1, 2 * WINDOW + 3)),
    "no room": of_lengths((0, 40), *[(i % 3 - 1, 17 + i) for i in range(40)], (0, WINDOW)),
    "every row another": torch.arange(WINDOW + 40).remainder(5).sub(1).to(torch.int8),
}
patterns = pytest.mark.parametrize("pattern", PATTERNS)


def groups_of(group: Tensor) -> int:
    return max(1, int(group.max()) + 1)


@dtypes
@patterns
def test_moments_of_many_rows(device: torch.device, dtype: torch.dtype, pattern: str) -> None:
    group = PATTERNS[pattern]
    x = random_rows(len(group), 24, dtype)
    state = moments(x.to(device), group, groups_of(group))
    assert_moments(state, definition(x, group, groups_of(group)), MOMENTS[dtype])


@dtypes
@patterns
def test_one_by_one_or_16_bytes_at_a_time(device: torch.device, dtype: torch.dtype, pattern: str) -> None:
    group = PATTERNS[pattern]
    x, up = random_rows(len(group), 40, dtype).to(device), random_rows(len(group), 40, dtype, 1).to(device)
    narrow_x, narrow_up = misaligned(x), misaligned(up)
    assert x.data_ptr() % 16 == 0
    assert narrow_x.data_ptr() % 16 != 0 or dtype.itemsize == 16
    count = groups_of(group)
    assert_same_state(moments(narrow_x, group, count), moments(x, group, count))
    h, state = gated(x, up, group, count, "silu")
    narrow_h, narrow_state = gated(narrow_x, narrow_up, group, count, "silu")
    assert same_bits(h, narrow_h)
    assert_same_state(state, narrow_state)
    assert_same_state(state, moments(h, group, count))


@dtypes
@patterns
def test_a_sequence_gives_the_same_bits_alone(device: torch.device, dtype: torch.dtype, pattern: str) -> None:
    """Wherever its windows lie: each run in a call of its own, from group ids at any address."""
    group = PATTERNS[pattern].to(device)
    x = random_rows(len(group), 5, dtype).to(device)
    count = groups_of(group)
    state = new_state(count, 5, device)
    ends = [*(group.diff().nonzero().flatten() + 1).tolist(), len(group)]
    for begin, end in zip([0, *ends], ends, strict=False):
        ops.channel_moments_(x[begin:end], group[begin:end], *state)
    assert_same_state(state, moments(x, group, count))


def test_127_groups(device: torch.device) -> None:
    group = torch.arange(1200).div(9, rounding_mode="floor").remainder(127).to(torch.int8)
    x = random_rows(len(group), 24, torch.bfloat16)
    assert_moments(moments(x.to(device), group, 127), definition(x, group, 127), MOMENTS[torch.bfloat16])


def test_in_place_over_windows(device: torch.device) -> None:
    group = PATTERNS["windows that start in a run"]
    gate, up = random_rows(len(group), 16, torch.bfloat16), random_rows(len(group), 16, torch.bfloat16, 1)
    gate, up = gate.to(device), up.to(device)
    h, state = gated(gate, up, group, 2, "gelu_tanh")
    for place in (0, 1):
        pair = gate.clone(), up.clone()
        _, other = gated(*pair, group, 2, "gelu_tanh", out=pair[place])
        assert same_bits(pair[place], h)
        assert_same_state(other, state)


@dtypes
def test_an_outlier_in_the_first_row_of_many(device: torch.device, dtype: torch.dtype) -> None:
    """The first tile's shift is then far from every other tile."""
    x = torch.randn(3 * WINDOW, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0] = 3e4
    group = ones(len(x))
    assert_moments(moments(x.to(device), group, 1), definition(x, group, 1), MOMENTS[dtype])


@dtypes
def test_the_state_goes_on(device: torch.device, dtype: torch.dtype) -> None:
    group = PATTERNS["windows that start in a run"]
    x = random_rows(2 * len(group), 24, dtype)
    state = State(*new_state(2, 24, device))
    for part in x.to(device).chunk(2):
        ops.channel_moments_(part, group.to(device), *state)
    both = torch.cat([group, group])
    assert_moments(state, definition(x, both, 2), MOMENTS[dtype])
