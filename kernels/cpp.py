"""The C++ CPU kernels: hands data pointers to ssah_fast._C. Arguments were checked in ops.py."""

import math
from collections.abc import Sequence

# torch first: _C then shares its OpenMP threads instead of starting a second pool that competes with them.
import torch
from torch import Tensor

from ssah_fast import _C
from ssah_fast.errors import SsahError

try:
    _C.isa()  # reads SSAH_FAST_CPU_ISA once and for all
except RuntimeError as error:
    # Not an ImportError: `auto` would fall back to plain torch, and the wish for an instruction set would pass unheard.
    raise SsahError(str(error)) from None

DTYPES = {
    torch.float32: _C.DType.f32,
    torch.bfloat16: _C.DType.bf16,
    torch.float16: _C.DType.f16,
    torch.float64: _C.DType.f64,
}
ACTIVATIONS = _C.Activation.__members__
ROUNDINGS = _C.Rounding.__members__
NUMBERS = {dtype: int(kind) for dtype, kind in DTYPES.items()}


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


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _region(weight: Tensor, axis: int, index: Tensor | None) -> tuple[int, int, int, int, int]:
    """Return the address of the indices, and outer, size, count and inner of the region."""
    if index is None or index.numel() == weight.shape[axis]:
        return 0, 1, 1, 1, weight.numel()
    before, after = weight.shape[:axis], weight.shape[axis + 1 :]
    return index.data_ptr(), math.prod(before), weight.shape[axis], index.numel(), math.prod(after)


def masked_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor | None],
    max_exp_avg_sqs: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    ids: Sequence[int],
    offsets: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    rounding: str,
    seed: int,
    grad_scale: Tensor | None,
) -> None:
    """See ops.masked_adamw_."""
    types = [NUMBERS[weight.dtype] for weight in weights]
    columns = (
        *map(_addresses, (weights, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, extras, copies, steps)),
        *map(list, zip(*map(_region, weights, axes, indices), strict=True)),
        types,
        [NUMBERS[grad.dtype] for grad in grads],
        [number if copy is None else NUMBERS[copy.dtype] for number, copy in zip(types, copies, strict=True)],
        [i is not None and g.shape != w.shape for w, g, i in zip(weights, grads, indices, strict=True)],
        ids,
        offsets,
    )
    divisor = 1.0 if grad_scale is None else float(grad_scale)
    _C.masked_adamw(
        columns,
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


OPS = {
    "channel_moments_": channel_moments_,
    "gated_moments_": gated_moments_,
    "column_norms": column_norms,
    "masked_adamw_": masked_adamw_,
}
