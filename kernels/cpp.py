"""The C++ CPU kernels: hands data pointers to ssah_fast._C. Arguments were checked in ops.py."""

from collections.abc import Sequence
from typing import Any

# torch first: _C then shares its OpenMP threads instead of starting a second pool that competes with them.
import torch
from torch import Tensor

from ssah_fast import _C
from ssah_fast.errors import SsahError
from ssah_fast.kernels.adamw_columns import NUMBERS, adamw_columns

try:
    _C.isa()  # reads SSAH_FAST_CPU_ISA once and for all
except RuntimeError as error:
    # Not an ImportError: `auto` would fall back to plain torch, and the wish for an instruction set would pass unheard.
    raise SsahError(str(error)) from None

DTYPES = {dtype: _C.DType(number) for dtype, number in NUMBERS.items()}
ACTIVATIONS = _C.Activation.__members__
ROUNDINGS = _C.Rounding.__members__


def _state(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[int, int, int]:
    return count.data_ptr(), mean.data_ptr(), m2.data_ptr()


def channel_moments_(x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """See ops.channel_moments_."""
    _C.channel_moments(
        DTYPES[x.dtype],
        x.data_ptr(),
        x.stride(0),
        group.data_ptr(),
        *x.shape,
        *_state(count, mean, m2),
        torch.get_num_threads(),
    )


def gated_moments_(
    gate: Tensor, up: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor, activation: str, out: Tensor
) -> None:
    """See ops.gated_moments_."""
    _C.gated_moments(
        DTYPES[gate.dtype],
        ACTIVATIONS[activation],
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        out.data_ptr(),
        out.stride(0),
        group.data_ptr(),
        *gate.shape,
        *_state(count, mean, m2),
        torch.get_num_threads(),
    )


def column_norms(weight: Tensor, axis: int) -> Tensor:
    """See ops.column_norms."""
    norms = torch.empty(weight.shape[axis], dtype=torch.float64)
    _C.column_norms(
        DTYPES[weight.dtype],
        weight.data_ptr(),
        weight.stride(0),
        *weight.shape,
        axis,
        norms.data_ptr(),
        torch.get_num_threads(),
    )
    return norms


def masked_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *rest: Any,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    rounding: str,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: None,
    cache: dict[str, Any],
) -> None:
    """See ops.masked_adamw_, which looks at found_inf."""
    if "table" not in cache:
        cache["table"] = _C.AdamWTensors(adamw_columns(weights, grads, *rest))
    divisor = 1.0 if grad_scale is None else float(grad_scale)
    _C.masked_adamw(
        cache["table"],
        [grad.data_ptr() for grad in grads],
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        ROUNDINGS[rounding],
        seed % 2**64,
        -divisor if maximize else divisor,
        torch.get_num_threads(),
    )


def _words(seeds: Sequence[int]) -> list[int]:
    return [seed % 2**64 for seed in seeds]


def perturb_(out: Tensor, base: Tensor, directions: Sequence[int], factors: Tensor, id: int, offset: int) -> None:
    """See ops.perturb_."""
    _C.perturb(
        DTYPES[base.dtype],
        out.data_ptr(),
        base.data_ptr(),
        base.numel(),
        _words(directions),
        factors.tolist(),
        id % 2**64,
        offset,
        torch.get_num_threads(),
    )


def direction_scales(base: Tensor, directions: Sequence[int], id: int, offset: int) -> Tensor:
    """See ops.direction_scales."""
    seeds = _words(directions)
    scales = _C.direction_scales(
        *(DTYPES[base.dtype], base.data_ptr(), base.numel(), seeds, id % 2**64, offset, torch.get_num_threads())
    )
    return torch.tensor(scales, dtype=torch.float64)


OPS = {
    "channel_moments_": channel_moments_,
    "gated_moments_": gated_moments_,
    "column_norms": column_norms,
    "masked_adamw_": masked_adamw_,
    "perturb_": perturb_,
    "direction_scales": direction_scales,
}
