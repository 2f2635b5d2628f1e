"""masked_adamw_ on every backend: against float64, against torch.optim.AdamW, and bit against bit.

Kernels and reference do the same roundings in the same order, so that their results are compared bit for bit; what the
reference computes is compared with an independent float64 computation and with torch.
"""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import interpreted, targets, use
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tolerances import ADAMW, TWICE
from torch import Tensor

from ssah_fast import ops
from ssah_fast.errors import SsahError
from ssah_fast.kernels import reference, registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = (torch.bfloat16, torch.float16)
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
HYPERPARAMETERS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}

# NaN and Inf are meant; numpy, which computes for Triton's interpreter, remarks on them.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning:triton")

# Shape, axis, trainable indices (None: whole). Pieces on both sides of a vector's and of a buffer's length.
REGIONS: dict[str, tuple[tuple[int, ...], int, list[int] | None]] = {
    "rows": ((31, 70), 0, [0, 1, 2, 5, 7, 10, 30]),
    "short-rows": ((67, 5), 0, list(range(0, 67, 3))),
    "rows-split": ((9, 3001), 0, [1, 2, 3, 8]),
    "columns": ((33, 257), 1, [i for i in range(257) if i % 3]),
    "few-columns": ((301, 37), 1, [3, 36]),
    "middle": ((5, 9, 67), 1, [1, 2, 8]),
    "short-middle": ((5, 9, 7), 1, [0, 4]),
    "last-of-3": ((3, 5, 61), 2, [0, 59, 60]),
    "vector": ((1031,), 0, list(range(5, 1031, 7))),
    "whole": ((64, 131), 0, None),
    "whole-by-index": ((7, 13), 1, list(range(13))),
    "one": ((1, 1), 0, [0]),
    "scalar": ((), 0, None),
    "nothing": ((4, 5), 0, []),
    "empty": ((0, 5), 0, None),
    "empty-axis": ((0, 5), 0, []),
}


# Few pieces of every kind, for Triton's interpreter, which takes 30 ms for each piece.
FEW = {
    "rows": REGIONS["rows"],
    "some-columns": ((13, 57), 1, [i for i in range(57) if i % 3]),
    "middle": REGIONS["middle"],
    "some": ((7, 131), 0, None),
    "scalar": REGIONS["scalar"],
    "nothing": REGIONS["nothing"],
    "empty": REGIONS["empty"],
}
REGIONS |= FEW


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
narrow = pytest.mark.parametrize("dtype", NARROW, ids=name)
roundings = pytest.mark.parametrize("rounding", ops.ROUNDINGS)
regions = pytest.mark.parametrize("region", REGIONS)


# ---- backends


@pytest.fixture(params=targets("masked_adamw_"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one backend, which is the one in use."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=targets("masked_adamw_", reference=False))
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The same without plain torch."""
    return use(request.param, monkeypatch)


# ---- data


@dataclass
class Problem:
    """The lists of one call's arguments."""

    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    axes: list[int] = field(default_factory=list)
    indices: list[Tensor | None] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor | None] = field(default_factory=list)
    extras: list[Tensor | None] = field(default_factory=list)
    copies: list[Tensor | None] = field(default_factory=list)

    def step(self, **options: Any) -> "Problem":
        """Call the op on it, and return it."""
        lists = {f.name: getattr(self, f.name) for f in fields(self)}
        ops.masked_adamw_(**lists, **(HYPERPARAMETERS | options))
        return self

    def to(self, device: torch.device | str) -> "Problem":
        """A copy on a device."""
        return Problem(
            *(
                [x.to(device, copy=True) if isinstance(x, Tensor) else x for x in getattr(self, f.name)]
                for f in fields(self)
            )
        )

    def tensors(self) -> list[Tensor]:
        values = (x for f in fields(self) for x in getattr(self, f.name))
        return [x.cpu() for x in values if isinstance(x, Tensor)]


def select(weight: Tensor, axis: int, index: Tensor | None) -> Tensor:
    return weight.clone() if index is None else weight.index_select(axis, index)


def problem(
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    *,
    rounding: str = "stochastic",
    grad_dtype: torch.dtype | None = None,
    compact: bool = False,
    amsgrad: bool = False,
    copies: torch.dtype | None = None,
    seed: int = 0,
) -> Problem:
    """Random weights, moments in the middle of a run, and gradients of another scale for each weight."""
    random = torch.Generator().manual_seed(seed)
    state = torch.promote_types(dtype, torch.float32)
    made = Problem()
    if names is None:
        names = list(FEW if interpreted() else REGIONS)
    for number, (shape, axis, entries) in enumerate(REGIONS[name] for name in names):
        index = None if entries is None else torch.tensor(entries, dtype=torch.int64)
        weight = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        region = select(weight, axis, index)
        grad = torch.randn(region.shape if compact else shape, generator=random, dtype=torch.float64)
        extra = None
        if dtype in NARROW and rounding == "kahan":
            extra = (torch.randn(region.shape, generator=random) * 1e-3).to(dtype)
        elif dtype in NARROW and rounding == "master":
            extra = region.float() + 1e-4
        made.weights.append(weight)
        made.grads.append((grad * 10.0 ** (number % 4 - 2)).to(grad_dtype or dtype))
        made.exp_avgs.append(torch.randn(region.shape, generator=random, dtype=state) / 10)
        made.exp_avg_sqs.append(torch.rand(region.shape, generator=random, dtype=state))
        made.steps.append(torch.tensor(float(number)))
        made.axes.append(axis)
        made.indices.append(index)
        made.max_exp_avg_sqs.append(2 * torch.rand(region.shape, generator=random, dtype=state) if amsgrad else None)
        made.extras.append(extra)
        made.copies.append(None if copies is None else (region.double() * 1.5).to(copies))
    return made


# ---- comparisons


def bits(x: Tensor) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, except that one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return not a.is_floating_point() or bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def assert_same(a: Problem, b: Problem) -> None:
    """The same bits; float64 to a few roundings, as torch's own square root is not exact there."""
    for one, other in zip(a.tensors(), b.tensors(), strict=True):
        if one.dtype == torch.float64:
            torch.testing.assert_close(one, other, rtol=ADAMW[torch.float64], atol=1e-14)
        else:
            assert same_bits(one, other)


def assert_identical(a: Problem, b: Problem) -> None:
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def frozen(weight: Tensor, axis: int, index: Tensor | None) -> Tensor:
    """The bits of what must not change."""
    if index is None:
        return bits(weight.flatten()[:0])
    rest = torch.ones(weight.shape[axis], dtype=torch.bool)
    rest[index.cpu()] = False
    return bits(weight.cpu().index_select(axis, rest.nonzero()[:, 0]))


def exact_step(
    before: Problem,
    i: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One tensor's new region, m and v in float64, straight from the paper."""
    axis, index = before.axes[i], before.indices[i]
    g = before.grads[i].double()
    if g.shape != before.exp_avgs[i].shape:
        g = select(g, axis, index)
    g = (-g if maximize else g) / grad_scale
    source = before.copies[i] if before.copies[i] is not None else select(before.weights[i], axis, index)
    w, m, v = source.double(), before.exp_avgs[i].double(), before.exp_avg_sqs[i].double()
    t = before.steps[i].item() + 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g.square()
    second = v if before.max_exp_avg_sqs[i] is None else torch.maximum(before.max_exp_avg_sqs[i].double(), v)
    update = (m / (1 - beta1**t)) / ((second / (1 - beta2**t)).sqrt() + eps)
    return w - lr * (update + weight_decay * w), m, v


# ---- what it computes


@dtypes
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_a_step_is_that_of_the_paper(device: torch.device, dtype: torch.dtype, compact: bool, amsgrad: bool) -> None:
    options = {"maximize": amsgrad, "grad_scale": torch.tensor(8.0, device=device) if compact else None}
    before = problem(dtype, compact=compact, amsgrad=amsgrad)
    after = before.to(device).step(rounding="nearest", **options).to("cpu")
    exact = HYPERPARAMETERS | {"maximize": amsgrad, "grad_scale": 8.0 if compact else 1.0}
    for i, weight in enumerate(after.weights):
        w, m, v = exact_step(before, i, **exact)
        tolerance = {"rtol": ADAMW[torch.promote_types(dtype, torch.float32)], "atol": 1e-6}
        torch.testing.assert_close(after.exp_avgs[i].double(), m, **tolerance)
        torch.testing.assert_close(after.exp_avg_sqs[i].double(), v, **tolerance)
        rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6} if dtype in NARROW else tolerance
        torch.testing.assert_close(select(weight, after.axes[i], after.indices[i]).double(), w, **rounding)
        assert after.steps[i] == before.steps[i] + 1
        assert torch.equal(*(frozen(x.weights[i], x.axes[i], x.indices[i]) for x in (before, after)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
def test_without_a_mask_it_is_torchs_adamw(
    device: torch.device, dtype: torch.dtype, amsgrad: bool, maximize: bool
) -> None:
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(37, 21, generator=random, dtype=dtype).to(device)
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW(
        [parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, amsgrad=amsgrad, maximize=maximize
    )
    ours = Problem([weight], [weight], [torch.zeros_like(weight)], [torch.zeros_like(weight)], [torch.zeros(())], [0])
    ours.indices = [None]
    ours.max_exp_avg_sqs = [torch.zeros_like(weight)] if amsgrad else []
    for _ in range(5 if interpreted() else 50):
        parameter.grad = torch.randn(37, 21, generator=random, dtype=dtype).to(device)
        ours.grads = [parameter.grad]
        ours.step(maximize=maximize)
        theirs.step()
        torch.testing.assert_close(weight, parameter.data, rtol=ADAMW[dtype], atol=ADAMW[dtype])


@narrow
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
def test_low_precision_errs_at_most_twice_as_much_as_torch(
    device: torch.device, dtype: torch.dtype, rounding: str
) -> None:
    """50 steps against the same in float64; torch rounds its weights to nearest and keeps its moments in 16 bits."""
    if interpreted():
        pytest.skip("five seconds in Triton's interpreter for what the bits of the reference say too")
    random = torch.Generator().manual_seed(4)
    start = torch.randn(64, 64, generator=random).to(dtype)
    hyperparameters = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    plain, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    optimizers = [torch.optim.AdamW([p], **hyperparameters) for p in (plain, exact)]
    moments = [torch.zeros(64, 64, device=device) for _ in range(2)]
    extra = {"kahan": torch.zeros_like(start), "master": start.float()}.get(rounding)
    ours = Problem([start.to(device)], [], moments[:1], moments[1:], [torch.zeros(())], [0], [None])
    ours.extras = [None if extra is None else extra.to(device)]
    for _ in range(50):
        grad = torch.randn(64, 64, generator=random).to(dtype)
        plain.grad, exact.grad, ours.grads = grad, grad.double(), [grad.to(device)]
        ours.step(rounding=rounding)
        for optimizer in optimizers:
            optimizer.step()
    error, allowed = ((x.detach().cpu().double() - exact.data).abs() for x in (ours.weights[0], plain))
    assert error.mean() <= TWICE * allowed.mean()
    assert error.max() <= TWICE * allowed.max()


WAYS = [(dtype, "nearest", copies) for dtype in (torch.float32, torch.float64) for copies in (None, dtype)]
WAYS += [(dtype, r, copies) for dtype in NARROW for r in ops.ROUNDINGS for copies in (None, dtype, torch.float32)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{name(way[0])}-{way[1]}-{way[2] and name(way[2])}")
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_kernels_give_the_bits_of_the_reference(
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    way: tuple[torch.dtype, str, torch.dtype | None],
    compact: bool,
) -> None:
    dtype, rounding, kind = way
    for grad_dtype in (DTYPES[WAYS.index(way) % len(DTYPES)],) if interpreted() else DTYPES:
        before = problem(
            dtype,
            rounding=rounding,
            grad_dtype=grad_dtype,
            compact=compact,
            copies=kind,
            amsgrad=grad_dtype == torch.bfloat16,
        )
        options = {
            "rounding": rounding,
            "seed": -5,
            "ids": [2**63 - 1 - i for i in range(len(before.weights))],
            "offsets": [2**32 - 40 + i for i in range(len(before.weights))],  # some regions cross into the next key
            "maximize": grad_dtype == torch.float16,
        }
        scale = torch.tensor(3.0) if grad_dtype == torch.float64 else None
        after = before.to(kernel_device).step(**options, grad_scale=None if scale is None else scale.to(kernel_device))
        with monkeypatch.context() as patch:
            patch.setenv(registry.VARIABLE, "torch")
            assert_same(after, before.to("cpu").step(**options, grad_scale=scale))


def test_any_step_count(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """beta^t by the same products everywhere; from 2^24 on a float32 counter stands still."""
    counts = (0, 1, 2, 6, 99, 1000, 4095, 65535, 2**24 - 2, 2**24)
    before = problem(torch.float32, ["scalar"] * len(counts))
    before.steps = [torch.tensor(float(count)) for count in counts]
    for beta1, beta2 in ((0.9, 0.999), (0.0, 0.95), (0.999999, 0.9999999)):
        after = before.to(kernel_device).step(beta1=beta1, beta2=beta2)
        with monkeypatch.context() as patch:
            patch.setenv(registry.VARIABLE, "torch")
            assert_same(after, before.to("cpu").step(beta1=beta1, beta2=beta2))


def test_power_is_that_of_python() -> None:
    """Squaring doubles the relative error, so that it is at most half a rounding per factor."""
    for base, exponent in ((0.9, 1), (0.9, 7), (0.999, 10**6), (0.0, 0), (0.0, 3), (0.95, 12345)):
        assert math.isclose(reference.power(base, exponent), base**exponent, rel_tol=max(exponent, 1) * 2**-52)


SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, 65519.0, 65520.0, 3.39e38, 5.9e-8, 2.0**-14)


@dtypes
@roundings
def test_frozen_elements_keep_every_bit(device: torch.device, dtype: torch.dtype, rounding: str) -> None:
    """NaNs with a payload, -0.0, subnormals: whatever lies in frozen places stays; NaN and Inf elsewhere are used."""
    before = problem(dtype, rounding=rounding)
    random = torch.Generator().manual_seed(5)
    for weight in before.weights:
        words = bits(weight)
        noise = torch.randint(-(2**15), 2**15, words.shape, generator=random).to(words.dtype)
        words.copy_(noise * (2 ** (8 * words.element_size() - 16)) + 1)
    for grad in before.grads:
        places = torch.rand(grad.shape, generator=random) < 0.2
        special = torch.tensor(SPECIAL).to(grad.dtype)
        grad[places] = special[torch.randint(len(SPECIAL), (int(places.sum()),), generator=random)]
    after = before.to(device)
    for _ in range(3):
        after.step(rounding=rounding)
    for i, (old, new) in enumerate(zip(before.weights, after.weights, strict=True)):
        assert torch.equal(*(frozen(x, before.axes[i], before.indices[i]) for x in (old, new)))


@dtypes
@roundings
def test_frozen_gradients_are_not_looked_at(device: torch.device, dtype: torch.dtype, rounding: str) -> None:
    before = problem(dtype, rounding=rounding)
    after = before.to(device).step(rounding=rounding)
    spoilt = before.to(device)
    for grad, axis, index in zip(spoilt.grads, spoilt.axes, spoilt.indices, strict=True):
        if index is not None:
            kept = select(grad, axis, index)
            grad.fill_(math.nan).index_copy_(axis, index, kept)
    spoilt.step(rounding=rounding)
    spoilt.grads = after.grads
    assert_identical(after, spoilt)


@dtypes
def test_a_gradient_that_is_not_finite_spoils_its_own_element_only(device: torch.device, dtype: torch.dtype) -> None:
    for value in (math.nan, math.inf):
        clean, bad = (problem(dtype, ["some-columns"]).to(device) for _ in range(2))
        bad.grads[0][7, 40] = value
        clean.step()
        bad.step()
        changed = ~((bits(clean.weights[0]) == bits(bad.weights[0])).cpu())
        assert changed.nonzero().tolist() == [[7, 40]]
        assert bad.weights[0][7, 40].isnan()


@dtypes
def test_copies_follow_and_lead(device: torch.device, dtype: torch.dtype) -> None:
    """The copy's values are what is updated, and weight and copy agree afterwards."""
    for kind in {dtype, torch.float32 if dtype in NARROW else dtype}:
        before = problem(dtype, copies=kind)
        after = before.to(device).step(rounding="nearest").to("cpu")
        for i, weight in enumerate(after.weights):
            region = select(weight, after.axes[i], after.indices[i])
            assert torch.equal(after.copies[i].to(dtype), region)
            w, _, _ = exact_step(before, i, **HYPERPARAMETERS)
            tolerance = torch.finfo(kind).eps if kind in NARROW else ADAMW[kind]
            torch.testing.assert_close(after.copies[i].double(), w, rtol=tolerance, atol=1e-6)


# ---- steps that do nothing, and steps of many


@dtypes
@pytest.mark.parametrize("why", ["found_inf", "lr"])
def test_a_skipped_step_changes_nothing(device: torch.device, dtype: torch.dtype, why: str) -> None:
    before = problem(dtype, amsgrad=True, copies=dtype)
    after = before.to(device)
    versions = [x._version for x in after.weights]
    after.step(**({"lr": 0.0} if why == "lr" else {"found_inf": torch.ones(1, device=device)}))
    assert_identical(after, before)
    assert [x._version for x in after.weights] == versions
    after.step(found_inf=torch.zeros((), device=device))
    assert after.steps[0] == before.steps[0] + 1


@dtypes
def test_lr_may_be_a_tensor(device: torch.device, dtype: torch.dtype) -> None:
    before = problem(dtype)
    plain = before.to(device).step(lr=float(torch.tensor(0.03)))
    for lr in (torch.tensor(0.03), torch.tensor([0.03]), torch.tensor(0.03).double()):
        assert_identical(before.to(device).step(lr=lr.to(device)), plain)
    assert_identical(before.to(device).step(lr=torch.zeros((), device=device)), before)


@dtypes
def test_scalars_that_only_the_kernel_reads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """As on a GPU: lr and found_inf reach the backend unread."""
    before = problem(dtype, ["rows", "middle", "scalar", "empty"], amsgrad=True)
    plain = before.to(device).step(lr=float(torch.tensor(0.03)))
    if registry.load(registry.BACKENDS[2]).ops.get("masked_adamw_") is registry.select("masked_adamw_", device):
        pytest.skip("cpp leaves that to the door")
    monkeypatch.setattr(ops, "read_by_host", lambda device: False)
    lr, zero, one = (torch.tensor(value, device=device) for value in (0.03, 0.0, 1.0))
    for skipped in ({"lr": zero}, {"lr": lr, "found_inf": one}, {"found_inf": one.bfloat16()}):
        assert_identical(before.to(device).step(**skipped), before)
    assert_identical(before.to(device).step(lr=lr, found_inf=zero[None], grad_scale=one.half()), plain)


def test_a_cache_serves_other_gradients(device: torch.device) -> None:
    """The same bits with and without it; gradients of another dtype or shape are looked at and empty it."""
    names, cache = ["rows", "middle", "scalar", "empty"], {}
    plain = problem(torch.bfloat16, names).to(device)
    cached = problem(torch.bfloat16, names).to(device)
    strided = cached.weights[0].t().contiguous().t()
    plain.weights[0], cached.weights[0] = strided.clone(), strided
    for seed, grad_dtype, compact in ((1, None, False), (2, None, False), (3, torch.float32, True), (4, None, False)):
        grads = problem(torch.bfloat16, names, grad_dtype=grad_dtype, compact=compact, seed=seed).to(device).grads
        plain.grads = cached.grads = grads
        plain.step()
        cached.step(cache=cache)
        assert_identical(plain, cached)
    cached.grads = [grad[:1] if grad.dim() == 2 else grad for grad in grads]
    with pytest.raises(SsahError, match=r"grads\[0\] has shape"):
        cached.step(cache=cache)
    assert cache == {}


def test_no_tensors_are_fine(device: torch.device) -> None:
    Problem().step()


def test_what_changed_says_so(device: torch.device) -> None:
    """Autograd sees the new version of a weight that a graph still needs."""
    after = problem(torch.bfloat16, ["columns"], rounding="kahan", amsgrad=True, copies=torch.bfloat16).to(device)
    lists = "weights", "exp_avgs", "exp_avg_sqs", "steps", "max_exp_avg_sqs", "extras", "copies"
    versions = {name: getattr(after, name)[0]._version for name in lists}
    after.step(rounding="kahan")
    assert all(getattr(after, name)[0]._version > version for name, version in versions.items())
    leaf = torch.nn.Parameter(after.weights[0])
    loss = (leaf * leaf).sum()
    replace(after, weights=[leaf]).step(rounding="kahan")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@dtypes
@roundings
def test_threads_pieces_and_repetition_give_the_same_bits(
    device: torch.device, threads: Callable[[int], None], dtype: torch.dtype, rounding: str
) -> None:
    before = problem(dtype, rounding=rounding, amsgrad=True)
    if interpreted():
        pytest.skip("Triton has no threads to share out, and its interpreter takes a second per step")
    for shape, axis, entries in (((130, 1100), 0, list(range(0, 130, 2))), ((700, 130), 1, list(range(0, 130, 2)))):
        index, random = torch.tensor(entries), torch.Generator().manual_seed(6)
        weight = torch.randn(shape, generator=random).to(dtype)
        region = select(weight, axis, index)
        state = torch.promote_types(dtype, torch.float32)
        before.weights.append(weight)
        before.grads.append(weight * 2)
        before.exp_avgs.append(torch.zeros(region.shape, dtype=state))
        before.exp_avg_sqs.append(torch.zeros(region.shape, dtype=state))
        before.max_exp_avg_sqs.append(torch.zeros(region.shape, dtype=state))
        before.steps.append(torch.zeros(()))
        before.axes.append(axis)
        before.indices.append(index)
        extra = {"kahan": torch.zeros_like(region), "master": region.float()}.get(rounding)
        before.extras.append(extra if dtype in NARROW else None)
        before.copies.append(None)
    results = []
    for number in (1, 1, 2, 3):
        threads(number)
        results.append(before.to(device).step(rounding=rounding))
    for other in results[1:]:
        assert_identical(results[0], other)
    single = before.to(device)
    for i in range(len(single.weights)):
        part = Problem(*([getattr(single, f.name)[i]] for f in fields(single)))
        part.step(rounding=rounding, ids=[i])
    assert_identical(results[0], single)


@dtypes
@roundings
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 9])
def test_two_shards_give_the_bits_of_the_whole(
    device: torch.device, dtype: torch.dtype, rounding: str, cut: int
) -> None:
    """FSDP cuts rows; the second shard's draws start where the first one's end."""
    if interpreted() and cut != 2:
        pytest.skip("one cut is enough for Triton's interpreter, which takes a second for each")
    trained, before = REGIONS["rows"][2], problem(dtype, ["rows"], rounding=rounding)
    whole = before.to(device).step(rounding=rounding, offsets=[2**32 - 100])
    shards = []
    for low, high in ((0, cut), (cut, 31)):
        inside = [i for i, row in enumerate(trained) if low <= row < high]
        index = before.indices[0][inside] - low
        shard = before.to(device)
        for entry in ("exp_avgs", "exp_avg_sqs", "extras"):
            setattr(shard, entry, [None if x is None else x[inside].clone() for x in getattr(shard, entry)])
        shard.weights, shard.grads = ([x[0][low:high].clone()] for x in (shard.weights, shard.grads))
        shard.indices = [index.to(device)]
        shards.append(shard.step(rounding=rounding, offsets=[2**32 - 100 + 70 * len([r for r in trained if r < low])]))
    for entry in ("weights", "exp_avgs", "exp_avg_sqs"):
        joined = torch.cat([getattr(shard, entry)[0] for shard in shards])
        assert torch.equal(bits(joined), bits(getattr(whole, entry)[0]))


@dtypes
def test_layouts_do_not_matter(device: torch.device, dtype: torch.dtype) -> None:
    """Transposed weights and gradients, and every second index of a tensor of indices."""
    plain = problem(dtype, ["rows", "columns"]).to(device).step()
    strided = problem(dtype, ["rows", "columns"]).to(device)
    strided.weights, strided.grads = (
        [x.t().contiguous().t() for x in tensors] for tensors in (strided.weights, strided.grads)
    )
    strided.indices = [x.repeat_interleave(2)[::2] for x in strided.indices]
    strided.step()
    assert not any(x.is_contiguous() for x in strided.weights)
    strided.grads = plain.grads
    assert_identical(plain, strided)


# ---- stochastic rounding


@narrow
def test_rounding_is_to_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    """Every 16-bit number and 40 numbers between it and the next: numbers that fit are kept, others go up or down."""
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].float()
    step = (every.abs() * torch.finfo(dtype).eps).clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    random = torch.Generator().manual_seed(7)
    for trial in range(40):
        w = every + step * torch.rand(every.shape, generator=random) if trial else every
        draws = reference.random_bits(1, 2, trial, 0, w.numel(), w.device)
        rounded = reference.round_stochastic(w, draws, dtype)
        fits = w.to(dtype).float() == w
        assert torch.equal(rounded[fits].float(), w[fits])
        finite = rounded.isfinite() & w.to(dtype).isfinite()
        up, down = (torch.nextafter(w.to(dtype), torch.tensor(x, dtype=dtype)) for x in (math.inf, -math.inf))
        assert ((rounded >= down) & (rounded <= up))[finite].all()


def test_what_is_not_finite_stays() -> None:
    words = torch.tensor([0x7F800000, -0x800000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int64).to(torch.int32)
    for dtype in NARROW:
        for draws in (0, 2**32 - 1):
            rounded = reference.round_stochastic(words.view(torch.float32), torch.full((5,), draws), dtype)
            assert rounded.isinf().tolist() == [True, True, False, False, False]
            assert rounded.isnan().tolist() == [False, False, True, True, True]


@narrow
def test_rounding_is_unbiased(device: torch.device, dtype: torch.dtype) -> None:
    """The mean of 2^20 draws (2^12 where Triton's interpreter makes them) is the number itself.

    Each draw is one of two neighbours a step s apart, so that the mean of n has a standard deviation of at most
    s / 2 / sqrt(n). Beyond 6 of them: a false alarm in 2e-9 of the comparisons, of which there are 2 x 6.
    """
    count = 2**12 if interpreted() else 2**20
    for value, lr in ((0.5, 1.0), (-3.3e-3, 1.0), (1.7, 4.0), (2.0**-15 + 2.0**-25, 1.0), (3e-7, 1.0), (0.7, 1e3)):
        # From a weight of 0 and without memory, w = lr value / (|value| + eps).
        results = []
        for weight_dtype in (torch.float32, dtype):
            draw = problem(weight_dtype, [])
            draw.weights = [torch.zeros(count, dtype=weight_dtype, device=device)]
            draw.grads = [torch.full((count,), -value, device=device)]
            draw.exp_avgs, draw.exp_avg_sqs = ([torch.zeros(count, device=device)] for _ in range(2))
            draw.steps, draw.axes, draw.indices = [torch.zeros(())], [0], [None]
            draw.step(lr=lr, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0)
            results.append(draw.weights[0].double().cpu())
        exact, rounded = results[0][0], results[1]
        low, high = float(rounded.min()), float(rounded.max())
        assert low < exact < high
        assert (rounded.mean() - exact).abs() <= 6 * (high - low) / 2 / math.sqrt(count)


def test_draws_are_uniform_and_independent() -> None:
    """Each of the 32 bits is 1 half of the time, and agrees half of the time with its neighbours in position, step,
    seed and tensor: 2^18 trials, 6 standard deviations, 160 comparisons; a false alarm in 3e-7 of the runs."""
    count = 2**18
    draw = reference.random_bits(0, 1, 0, 0, count + 1, torch.device("cpu"))
    others = [draw[1:]] + [
        reference.random_bits(seed, step, id, 0, count, draw.device)
        for seed, step, id in ((1, 1, 0), (0, 2, 0), (0, 1, 1))
    ]
    for words in (draw[:-1], *(draw[:-1] ^ other for other in others)):
        ones = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
        assert ((ones - 0.5).abs() <= 6 * 0.5 / math.sqrt(count)).all()


def documented_bits(seed: int, step: int, id: int, position: int) -> int:
    """The generator in scalar arithmetic, as the C++ and CUDA kernels have it."""
    key = seed % 2**64
    for part in (step, id % 2**64, position >> 32):
        key = reference.splitmix64(key) ^ part
    key = reference.splitmix64(key)
    x = position % 2**32 ^ key % 2**32
    for shift, factor, added in ((17, 0xED5AD4BB, key >> 32), (11, 0xAC4C1B51, 0), (15, 0x31848BAB, 0)):
        x = ((x ^ x >> shift) * factor + added) % 2**32
    return x ^ x >> 14


def test_the_generator_is_the_documented_one() -> None:
    """splitmix64 gives its published sequence from 0."""
    sequence = [reference.splitmix64(k * 0x9E3779B97F4A7C15 % 2**64) for k in range(2)]
    assert sequence == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    for seed, step, id, offset in (
        (0, 1, 0, 0),
        (-1, 7, -(2**63), 2**32 - 2),
        (2**63, 2**24, 2**63 - 1, 5 * 2**32 - 3),
    ):
        expected = [documented_bits(seed, step, id, offset + i) for i in range(5)]
        assert reference.random_bits(seed, step, id, offset, 5, torch.device("cpu")).tolist() == expected


@narrow
def test_draws_depend_on_seed_step_and_id_only(device: torch.device, dtype: torch.dtype) -> None:
    before = problem(dtype, ["columns"])
    result = before.to(device).step(seed=3, ids=[5])
    assert_identical(before.to(device).step(seed=3, ids=[5]), result)
    for other in ({"seed": 4, "ids": [5]}, {"seed": 3, "ids": [6]}, {"seed": 3, "ids": [5], "offsets": [1]}):
        assert not torch.equal(before.to(device).step(**other).weights[0], result.weights[0])
    later = before.to(device)
    later.steps = [before.steps[0] + 2**20]
    assert not torch.equal(later.step(seed=3, ids=[5]).weights[0], result.weights[0])


# ---- properties


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, str]:
    """A weight of up to three axes, any region of any axis, any dtypes."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    entries = draw(st.lists(st.booleans(), min_size=shape[axis], max_size=shape[axis]))
    dtype, grad_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    rounding = draw(st.sampled_from(ops.ROUNDINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGIONS, "drawn", (shape, axis, [i for i, kept in enumerate(entries) if kept]))
        made = problem(
            dtype,
            ["drawn"],
            rounding=rounding,
            grad_dtype=grad_dtype,
            compact=draw(st.booleans()),
            amsgrad=draw(st.booleans()),
            seed=draw(st.integers(0, 100)),
        )
    return made, rounding


def check_region(device: torch.device, monkeypatch: pytest.MonkeyPatch, case: tuple[Problem, str]) -> None:
    before, rounding = case
    after = before.to(device).step(rounding=rounding).step(rounding=rounding).to("cpu")
    with monkeypatch.context() as patch:
        patch.setenv(registry.VARIABLE, "torch")
        assert_same(after, before.to("cpu").step(rounding=rounding).step(rounding=rounding))
    old, new = (frozen(x.weights[0], before.axes[0], before.indices[0]) for x in (before, after))
    assert torch.equal(old, new)


def test_any_region_of_any_shape(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    @settings(max_examples=15 if interpreted() else 100, deadline=None)
    @given(case=cases())
    def check(case: tuple[Problem, str]) -> None:
        check_region(device, monkeypatch, case)

    check()


# ---- instruction sets


def save_every_output(path: str) -> None:
    """Write what the op gives for every dtype and rounding; run once per instruction set."""
    outputs = {}
    for dtype in DTYPES:
        for rounding in ops.ROUNDINGS if dtype in NARROW else ("nearest",):
            for compact in (False, True):
                case = problem(dtype, rounding=rounding, compact=compact, amsgrad=compact)
                tensors = case.step(rounding=rounding).step(rounding=rounding).tensors()
                outputs |= {f"{dtype}-{rounding}-{compact}-{i}": x.contiguous() for i, x in enumerate(tensors)}
    save_file(outputs, path)


def save_on_every_instruction_set(folder: Path) -> None:
    """save_every_output() where this CPU can run it and by the reference, in processes of their own."""
    code = "import sys, test_masked_adamw; test_masked_adamw.save_every_output(sys.argv[1])"
    path, running = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]), []
    for isa in (*INSTRUCTION_SETS, "reference"):
        chosen = {"PYTHONPATH": path, registry.VARIABLE: "torch"}
        if isa != "reference":
            chosen |= {"SSAH_FAST_CPU_ISA": isa, registry.VARIABLE: "cpp"}
        command = [sys.executable, "-c", code, str(folder / isa)]
        running.append(subprocess.Popen(command, env=os.environ | chosen, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, stderr = process.communicate()
        assert process.returncode == 0 or "this CPU cannot run it" in stderr, stderr


@pytest.fixture(scope="module")
def outputs_of(once_per_run: Callable[[str, Callable[[Path], None]], Path]) -> dict[str, dict[str, Tensor]]:
    """What save_every_output() saved on each instruction set of this CPU, and by the reference."""
    folder = once_per_run("outputs_of_test_masked_adamw", save_on_every_instruction_set)
    return {isa: load_file(folder / isa) for isa in (*INSTRUCTION_SETS, "reference") if (folder / isa).exists()}


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_gives_the_bits_of_the_reference(
    outputs_of: dict[str, dict[str, Tensor]], isa: str
) -> None:
    if isa not in outputs_of:
        pytest.skip(f"this CPU cannot run {isa}")
    for key, expected in outputs_of["reference"].items():
        if expected.dtype == torch.float64:
            torch.testing.assert_close(outputs_of[isa][key], expected, rtol=ADAMW[torch.float64], atol=1e-14)
        else:
            assert same_bits(outputs_of[isa][key], expected), key


# ---- what a user can get wrong


def mistaken(names: Sequence[str] = ("columns",), dtype: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    made = problem(dtype, names)
    return {f.name: getattr(made, f.name) for f in fields(made)} | HYPERPARAMETERS | changed


def entries(*values: int) -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.int64)]


TWICE_THE_SAME = torch.zeros(66, 257)
MISTAKES = {
    "lengths": (mistaken(grads=[]), "grads has 0 entries and weights 1; give one per weight"),
    "ids": (mistaken(ids=[1, 2]), "ids has 2 entries and weights 1"),
    "weight-dtype": (mistaken(weights=[torch.zeros(33, 257, dtype=torch.int32)]), "weights[0] is torch.int32 on cpu"),
    "weight-complex": (mistaken(weights=[torch.zeros(33, 257, dtype=torch.cfloat)]), "weights[0] is torch.complex64"),
    "weight-meta": (mistaken(weights=[torch.zeros(33, 257, device="meta")]), "weights[0] is on meta and has no data"),
    "axis": (mistaken(axes=[2]), "axes[0] is 2; weights[0] has axes 0 to 1"),
    "axis-negative": (mistaken(axes=[-1]), "axes[0] is -1; weights[0] has axes 0 to 1"),
    "index-dtype": (mistaken(indices=[torch.zeros(171, dtype=torch.int32)]), "indices[0] is torch.int32 [171] on cpu"),
    "index-shape": (mistaken(indices=[torch.zeros(171, 1, dtype=torch.int64)]), "indices[0] is torch.int64 [171, 1]"),
    "index-unsorted": (
        mistaken(["one", "rows"], indices=[*entries(0), *entries(0, 2, 1, 5, 7, 10, 30)]),
        "indices[1] are not sorted or not unique",
    ),
    "index-twice": (
        mistaken(["rows"], indices=entries(0, 1, 1, 5, 7, 10, 30)),
        "indices[0] are not sorted or not unique",
    ),
    "index-high": (
        mistaken(["rows", "rows"], indices=[*entries(0, 1, 2, 5, 7, 10, 30), *entries(0, 1, 2, 5, 7, 10, 31)]),
        "indices[1] run from 0 to 31; axis 0 has 31",
    ),
    "index-low": (mistaken(["rows"], indices=entries(-1, 1, 2, 5, 7, 10, 30)), "indices[0] run from -1 to 30; axis 0"),
    "grad-shape": (
        mistaken(grads=[torch.zeros(33, 256)]),
        "grads[0] has shape [33, 256] on cpu; expected [33, 257] or",
    ),
    "grad-sparse": (mistaken(grads=[torch.zeros(33, 257).to_sparse()]), "grads[0] is torch.float32 (torch.sparse_coo)"),
    "grad-complex": (mistaken(grads=[torch.zeros(33, 257, dtype=torch.cfloat)]), "grads[0] is torch.complex64"),
    "grad-meta": (mistaken(grads=[torch.zeros(33, 257, device="meta")]), "grads[0] has shape [33, 257] on meta"),
    "m-shape": (mistaken(exp_avgs=[torch.zeros(33, 257)]), "exp_avgs[0] is torch.float32 [33, 257] on cpu; expected"),
    "m-dtype": (
        mistaken(dtype=torch.bfloat16, exp_avgs=[torch.zeros(33, 171, dtype=torch.bfloat16)]),
        "exp_avgs[0] is torch.bfloat16 [33, 171] on cpu; expected contiguous torch.float32 [33, 171] on cpu",
    ),
    "v-strided": (mistaken(exp_avg_sqs=[torch.zeros(171, 33).t()]), "exp_avg_sqs[0] is torch.float32 [33, 171] on cpu"),
    "v_max": (mistaken(max_exp_avg_sqs=[torch.zeros(33, 257)]), "max_exp_avg_sqs[0] is torch.float32 [33, 257]"),
    "step-dtype": (mistaken(steps=[torch.zeros((), dtype=torch.int64)]), "steps[0] is torch.int64 [] on cpu; expected"),
    "step-shape": (
        mistaken(steps=[torch.zeros(1)]),
        "steps[0] is torch.float32 [1] on cpu; expected float32 [] on cpu",
    ),
    "step-device": (
        mistaken(steps=[torch.zeros((), device="meta")]),
        "steps[0] is torch.float32 [] on meta; expected float32 [] on cpu",
    ),
    "lr-tensor": (mistaken(lr=torch.ones(2)), "lr is [2] on cpu; expected one element on cpu, as the weights"),
    "lr-tensor-nan": (mistaken(lr=torch.tensor(math.nan)), "lr=nan is out of range"),
    "found_inf": (
        mistaken(found_inf=torch.zeros((), device="meta")),
        "found_inf is [] on meta; expected one element on cpu",
    ),
    "copy-shape": (mistaken(copies=[torch.zeros(33, 257)]), "copies[0] is torch.float32 [33, 257] on cpu; expected"),
    "copy-dtype": (mistaken(copies=[torch.zeros(33, 171).bfloat16()]), "copies[0] is torch.bfloat16 [33, 171] on cpu"),
    "extra-missing": (
        mistaken(dtype=torch.bfloat16, rounding="kahan"),
        "extras[0] is missing; rounding='kahan' keeps a tensor for each weight there",
    ),
    "extra-dtype": (
        mistaken(dtype=torch.float16, rounding="master", extras=[torch.zeros(33, 171).half()]),
        "extras[0] is torch.float16 [33, 171] on cpu; expected contiguous torch.float32",
    ),
    "offset": (mistaken(offsets=[-1]), "offsets[0] is -1; expected 0 or more"),
    "rounding": (mistaken(rounding="up"), "rounding='up' is unknown; choose one of stochastic, kahan, master, nearest"),
    "lr": (mistaken(lr=-1.0), "lr=-1.0 is out of range; expected 0 <= lr < inf"),
    "lr-nan": (mistaken(lr=math.nan), "lr=nan is out of range"),
    "beta": (mistaken(beta2=1.0), "beta2=1.0 is out of range; expected 0 <= beta2 < 1"),
    "eps": (mistaken(eps=-1e-8), "eps=-1e-08 is out of range"),
    "decay": (mistaken(weight_decay=math.inf), "weight_decay=inf is out of range"),
    "same-weight": (
        mistaken(["columns"] * 2, weights=[TWICE_THE_SAME[:33], TWICE_THE_SAME[:33]]),
        "weights[0] and weights[1] share memory; pass each weight once",
    ),
    "overlapping-weights": (
        mistaken(["columns"] * 2, weights=[TWICE_THE_SAME[32:65], TWICE_THE_SAME[:33]]),
        "weights[1] and weights[0] share memory",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_in_one_line(device: torch.device, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    if device.type != "cpu":
        pytest.skip("the messages name the device and the indices are looked at on the CPU only")
    before = copy.deepcopy(arguments)
    with pytest.raises(SsahError) as error:
        ops.masked_adamw_(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    for key in ("weights", "exp_avgs", "exp_avg_sqs", "steps"):
        for one, other in zip(arguments[key], before[key], strict=True):
            assert one.is_meta or torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(SsahError, match=r"grads\[0\] has shape \[33, 257\] on cuda:0; expected"):
        ops.masked_adamw_(**mistaken(grads=[torch.zeros(33, 257, device="cuda")]))


def test_neighbours_in_one_buffer_are_allowed(device: torch.device) -> None:
    buffer = torch.randn(2, 31, 70, generator=torch.Generator().manual_seed(8)).to(device)
    after = problem(torch.float32, ["rows", "rows", "empty", "empty"]).to(device)
    after.weights[:2] = list(buffer)
    assert after.step().steps[0] == 1


# ---- torch.library


@dtypes
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    made = problem(dtype, ["rows", "whole-by-index"], rounding="kahan", amsgrad=True).to(device)
    optional = [x for x in (*made.max_exp_avg_sqs, made.extras[0]) if x is not None]
    places = [0, 1, 2 if dtype in NARROW else -1, -1, -1, -1]
    always = (getattr(made, f.name) for f in fields(made)[:7])
    numbers = (0.01, 0.9, 0.99, 1e-8, 0.1, False, "stochastic", 0, None, None, None)
    torch.library.opcheck(ops._masked_adamw_op, (*always, optional, places, [0, 1], [0, 0], *numbers))


def test_compiled_code_calls_the_op(device: torch.device) -> None:
    def step(lists: dict[str, list[Any]], found_inf: Tensor, lr: float | Tensor) -> Tensor:
        ops.masked_adamw_(**lists, **(HYPERPARAMETERS | {"lr": lr}), rounding="kahan", found_inf=found_inf)
        return lists["weights"][0] * 2

    before = problem(torch.bfloat16, ["rows", "middle", "scalar"], rounding="kahan", amsgrad=True)
    before.copies[1] = select(before.weights[1], 1, before.indices[1])
    found_inf = torch.zeros((), device=device)
    for lr in (0.01, torch.tensor(0.01, device=device)):
        eager, compiled = before.to(device), before.to(device)
        expected = step(dict(vars(eager)), found_inf, lr)
        run = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert same_bits(run(dict(vars(compiled)), found_inf, lr), expected)
        assert_identical(eager, compiled)
        assert all(now == start + 1 for now, start in zip(compiled.steps, before.steps, strict=True))
