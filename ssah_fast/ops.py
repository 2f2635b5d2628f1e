"""The one door to the kernels: checks the arguments, picks a backend, calls it.

Every op is registered with torch.library under ``ssah_fast::``, with what it mutates and a fake kernel, so that
torch.compile, opcheck and fake tensors know it. The environment variable SSAH_FAST_BACKEND (auto, torch, cpp, triton,
cuda) overrides the choice of backend.
"""

import torch
from torch import Tensor

from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry

__all__ = ["ACTIVATIONS", "channel_moments_", "column_norms", "gated_moments_"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SsahError(message)


def _check_rows(name: str, x: Tensor) -> Tensor:
    """Return x with adjacent channels (a copy only where a row is not contiguous)."""
    _require(x.dim() == 2, f"{name} has shape {list(x.shape)}; expected [rows, channels]")
    _require(x.dtype in _DTYPES, f"{name} has dtype {x.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _check_state(x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    rows, channels = x.shape
    _require(
        group.dtype == torch.int8 and group.shape == (rows,) and group.is_contiguous(),
        f"group is {group.dtype} {list(group.shape)}; expected contiguous int8 [{rows}], one id per row",
    )
    groups = count.numel()
    _require(
        count.dtype == torch.int64 and count.dim() == 1 and 1 <= groups <= 127 and count.is_contiguous(),
        f"count is {count.dtype} {list(count.shape)}; expected contiguous int64 [groups], 1 to 127 groups",
    )
    for name, state in (("mean", mean), ("m2", m2)):
        _require(
            state.dtype == torch.float64 and state.shape == (groups, channels) and state.is_contiguous(),
            f"{name} is {state.dtype} {list(state.shape)}; expected contiguous float64 [{groups}, {channels}]",
        )
    for name, tensor in (("group", group), ("count", count), ("mean", mean), ("m2", m2)):
        _require(tensor.device == x.device, f"{name} is on {tensor.device} but the rows are on {x.device}")
    _require(channels == 0 or mean.data_ptr() != m2.data_ptr(), "mean and m2 share memory; give each its own tensor")
    if rows and x.device.type == "cpu":  # on a GPU the look would wait for the device; there, other ids are undefined
        low, high = (int(v) for v in torch.aminmax(group))
        _require(-1 <= low and high < groups, f"group has ids from {low} to {high}; expected -1 (skip) to {groups - 1}")


def _overlap_in_part(out: Tensor, source: Tensor) -> bool:
    """Whether writing one element of out changes another one of source; out == source is fine."""
    rows, channels = out.shape
    shift = (out.data_ptr() - source.data_ptr()) // out.element_size()
    if rows > 1 and out.stride(0) != source.stride(0):
        return -((rows - 1) * out.stride(0) + channels) < shift < (rows - 1) * source.stride(0) + channels
    stride = max(out.stride(0), channels)  # of a single row it can be anything
    nearest = (shift // stride, shift // stride + 1)  # the rows of source around out's first row
    return shift != 0 and any(abs(shift - k * stride) < channels for k in nearest if abs(k) < rows)


@torch.library.custom_op("ssah_fast::channel_moments_", mutates_args=("count", "mean", "m2"))
def channel_moments_(x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """Merge the per-channel moments of rows into running states, one state per group.

    Chan, Golub & LeVeque (1979): for disjoint sets a and b with counts n, means mu and sums of squared deviations M2,
    and delta = mu_b - mu_a: mu = mu_a + delta n_b / n, M2 = M2_a + M2_b + delta^2 n_a n_b / n. Reads x once. The order
    of the arithmetic is fixed: the same rows give the same bits on every run and for every number of threads.

    Args:
        x: [N, H] float32, bfloat16, float16 or float64; rows may be strided. |x - mean| must stay
            below 1e19, or M2 overflows to Inf.
        group: [N] int8: the state that each row belongs to, -1 = skip the row.
        count: [G] int64: rows in each state; updated in place.
        mean: [G, H] float64: updated in place.
        m2: [G, H] float64: sums of squared deviations from the mean; updated in place.

    Raises:
        SsahError: A shape, dtype or device is wrong, a group id is out of range, or SSAH_FAST_BACKEND cannot
            run the op.
    """
    x = _check_rows("x", x)
    _check_state(x, group, count, mean, m2)
    registry.select("channel_moments_", x.device)(x, group, count, mean, m2)


@torch.library.custom_op("ssah_fast::gated_moments_", mutates_args=("out", "count", "mean", "m2"))
def _gated_moments_into(
    gate: Tensor, up: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor, activation: str, out: Tensor
) -> None:
    gate, up = _check_rows("gate", gate), _check_rows("up", up)
    for name, tensor in (("up", up), ("out", out)):
        _require(
            (tensor.shape, tensor.dtype, tensor.device) == (gate.shape, gate.dtype, gate.device),
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"expected {gate.dtype} {list(gate.shape)} on {gate.device}, as gate",
        )
    _require(out.stride(1) == 1 or out.shape[1] <= 1, "out has strided channels; give it contiguous rows")
    if out.numel():
        spread = out.shape[0] == 1 or out.stride(0) >= out.shape[1]
        _require(spread, f"out has rows {out.stride(0)} elements apart that overlap; give each row its own memory")
        for name, tensor in (("gate", gate), ("up", up)):
            apart = not _overlap_in_part(out, tensor)
            _require(apart, f"out overlaps part of {name}; pass {name} itself or other memory")
    _require(activation in ACTIVATIONS, f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    _check_state(gate, group, count, mean, m2)
    registry.select("gated_moments_", gate.device)(gate, up, group, count, mean, m2, activation, out)


def gated_moments_(
    gate: Tensor,
    up: Tensor,
    group: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    activation: str = "silu",
    out: Tensor | None = None,
) -> Tensor:
    """Compute h = act(gate) * up and merge the per-channel moments of h, in one pass.

    h is rounded as two torch operations would round it: to the dtype after the activation and again after the product.

    Args:
        gate: [N, H] float32, bfloat16, float16 or float64; rows may be strided.
        up: [N, H], as gate.
        group: [N] int8: the state that each row belongs to; h is computed for rows of -1 too, but not counted.
        count: [G] int64; updated in place.
        mean: [G, H] float64; updated in place.
        m2: [G, H] float64; updated in place.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
        out: [N, H]: where to write h; gate or up itself is allowed and saves the memory traffic of a fresh tensor.
            Default: a new tensor.

    Returns:
        h [N, H], in gate's dtype (``out`` if it was given).

    Raises:
        SsahError: As for channel_moments_, or the activation is unknown.
    """
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated_moments_into(gate, up, group, count, mean, m2, activation, out)
    return out


@torch.library.custom_op("ssah_fast::column_norms", mutates_args=())
def column_norms(weight: Tensor, axis: int = 1) -> Tensor:
    """Return the squared L2 norm of each column (axis 1) or row (axis 0) of a matrix.

    Args:
        weight: [out, in] float32, bfloat16, float16 or float64.
        axis: The axis that is kept: 1 for the input channels of nn.Linear [out, in], 0 for those of GPT-2's
            Conv1D [in, out].

    Returns:
        [weight.shape[axis]] float64, summed in float64 in a fixed order.

    Raises:
        SsahError: The weight is not a floating-point matrix, or axis is not 0 or 1.
    """
    weight = _check_rows("weight", weight)
    _require(axis in (0, 1), f"axis={axis} is not an axis of a matrix; choose 0 or 1")
    return registry.select("column_norms", weight.device)(weight, axis)


@channel_moments_.register_fake
def _(x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    return None


@_gated_moments_into.register_fake
def _(
    gate: Tensor, up: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor, activation: str, out: Tensor
) -> None:
    return None


@column_norms.register_fake
def _(weight: Tensor, axis: int = 1) -> Tensor:
    return weight.new_empty(weight.shape[axis], dtype=torch.float64)
