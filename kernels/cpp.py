"""The C++ CPU kernels: hands data pointers to ssah_fast._C. Arguments were checked in ops.py."""

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


OPS = {"channel_moments_": channel_moments_, "gated_moments_": gated_moments_, "column_norms": column_norms}
