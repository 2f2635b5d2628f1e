"""The CUDA kernels: hands data pointers and the current stream to ssah_fast._cuda. Arguments were checked in ops.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssah_fast.errors import SsahError
from ssah_fast.kernels.adamw_columns import NUMBERS, adamw_columns

try:
    from ssah_fast import _cuda
except ImportError as error:
    raise ImportError(
        f"ssah_fast was built without nvcc ({error}); install it again where nvcc is on PATH, with SSAH_FAST_CUDA=1"
    ) from None

DEVICES = ("cuda", "cpu") if _cuda.EMULATED else ("cuda",)
DTYPES = {dtype: _cuda.DType(number) for dtype, number in NUMBERS.items()}
ACTIVATIONS = _cuda.Activation.__members__
ROUNDINGS = _cuda.Rounding.__members__


def _stream(device: torch.device) -> int:
    """The stream on which torch works now; 0 for the CPU tensors of the emulation."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _moments_job(
    x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor
) -> tuple[_cuda.MomentsJob, Tensor, Tensor]:
    """Return what both moment kernels need, and the tensors that it points to and that nobody else holds."""
    if group.data_ptr() % 16:  # the kernels look at 16 ids at once
        group = group.clone()
    size = _cuda.moments_workspace(*x.shape)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    job = _cuda.MomentsJob(
        group.data_ptr(),
        *x.shape,
        count.data_ptr(),
        mean.data_ptr(),
        m2.data_ptr(),
        count.numel(),
        workspace.data_ptr(),
        _stream(x.device),
    )
    return job, group, workspace


def channel_moments_(x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """See ops.channel_moments_."""
    with torch.cuda.device_of(x):
        job, *_held = _moments_job(x, group, count, mean, m2)
        _cuda.channel_moments(DTYPES[x.dtype], x.data_ptr(), x.stride(0), job)


def gated_moments_(
    gate: Tensor, up: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor, activation: str, out: Tensor
) -> None:
    """See ops.gated_moments_."""
    with torch.cuda.device_of(gate):
        job, *_held = _moments_job(gate, group, count, mean, m2)
        _cuda.gated_moments(
            DTYPES[gate.dtype],
            ACTIVATIONS[activation],
            gate.data_ptr(),
            gate.stride(0),
            up.data_ptr(),
            up.stride(0),
            out.data_ptr(),
            out.stride(0),
            job,
        )


def _address(tensor: Tensor | None) -> int:
    """Where a number that the kernel reads lies; 0: nowhere."""
    return 0 if tensor is None else tensor.data_ptr()


def _adamw_table(weights: Sequence[Tensor], *rest: Any) -> tuple[_cuda.AdamWTable, Tensor]:
    """Work out what each block does, and copy it to the device, once for all steps.

    Raises:
        SsahError: A graph is being captured, which can hold no copy from the host.
    """
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise SsahError("masked_adamw_ is captured at its first step with these tensors; run one step before capturing")
    table = _cuda.AdamWTable(adamw_columns(weights, *rest))
    return table, torch.frombuffer(bytearray(table.bytes()), dtype=torch.uint8).to(weights[0].device, copy=True)


def masked_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *rest: Any,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    rounding: str,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    cache: dict[str, Any],
) -> None:
    """See ops.masked_adamw_: one launch, which reads lr (float64), grad_scale and found_inf (float32) on the device."""
    device = weights[0].device
    with torch.cuda.device_of(weights[0]):
        if "cuda_table" not in cache:
            cache["cuda_table"] = _adamw_table(weights, grads, *rest)
        table, on_device = cache["cuda_table"]
        table.launch(
            on_device.data_ptr(),
            [grad.data_ptr() for grad in grads],
            0.0 if isinstance(lr, Tensor) else lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            ROUNDINGS[rounding],
            seed % 2**64,
            -1.0 if maximize else 1.0,
            _address(lr) if isinstance(lr, Tensor) else 0,
            _address(grad_scale),
            _address(found_inf),
            _stream(device),
        )


OPS = {
    "channel_moments_": channel_moments_,
    "gated_moments_": gated_moments_,
    "masked_adamw_": masked_adamw_,
}
