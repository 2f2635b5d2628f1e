"""The one door to the kernels: checks the arguments, picks a backend, calls it.

Every op is registered with torch.library under ``ssah_fast::``, with what it mutates and a fake kernel, so that
torch.compile, opcheck and fake tensors know it. The environment variable SSAH_FAST_BACKEND (auto, torch, cpp, triton,
cuda) overrides the choice of backend.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry

__all__ = [
    "ACTIVATIONS",
    "ROUNDINGS",
    "channel_moments_",
    "column_norms",
    "direction_scales",
    "gated_moments_",
    "masked_adamw_",
    "perturb_",
]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROUNDINGS = ("stochastic", "kahan", "master", "nearest")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)


@functools.cache  # of a landscape's tensors each is asked for at every point
def tensor_id(name: str) -> int:
    """Return what a tensor's name is in the keys of random numbers: the first 8 bytes of its SHA-256, as int64."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _into_int64(seeds: Sequence[int]) -> list[int]:
    return [(seed + 2**63) % 2**64 - 2**63 for seed in seeds]  # the only integer that torch.library has


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


def _any(tensors: Sequence[Tensor | None]) -> bool:
    return any(x is not None for x in tensors)


def _check_weights(regions: "_Regions", device: torch.device) -> list[torch.Size]:
    """Return the shape of each region."""
    _require(device.type != "meta", "weights[0] is on meta and has no data; move the model to a real device first")
    shapes = []
    for i, (weight, axis, index) in enumerate(zip(regions.weights, regions.axes, regions.indices, strict=True)):
        if weight.dtype not in _DTYPES or weight.device != device or weight.layout is not torch.strided:
            raise SsahError(
                f"weights[{i}] is {weight.dtype} on {weight.device} ({weight.layout}); expected one of "
                f"{', '.join(map(str, _DTYPES))} on {device}, dense"
            )
        if index is None:
            shapes.append(weight.shape)
            continue
        _require(0 <= axis < weight.dim(), f"axes[{i}] is {axis}; weights[{i}] has axes 0 to {weight.dim() - 1}")
        if index.dtype != torch.int64 or index.dim() != 1 or index.device != device:
            raise SsahError(
                f"indices[{i}] is {index.dtype} {list(index.shape)} on {index.device}; expected int64 [n] on {device}"
            )
        shapes.append(torch.Size((*weight.shape[:axis], index.numel(), *weight.shape[axis + 1 :])))
    return shapes


def _check_grads(regions: "_Regions", shapes: Sequence[torch.Size], device: torch.device) -> None:
    for i, (grad, weight, shape) in enumerate(zip(regions.grads, regions.weights, shapes, strict=True)):
        if grad.dtype not in _DTYPES or grad.layout is not torch.strided:
            raise SsahError(
                f"grads[{i}] is {grad.dtype} ({grad.layout}); expected a dense tensor of {', '.join(map(str, _DTYPES))}"
            )
        if (grad.shape != shape and grad.shape != weight.shape) or grad.device != device:
            either = f"{list(weight.shape)} or, compact, {list(shape)}"
            raise SsahError(f"grads[{i}] has shape {list(grad.shape)} on {grad.device}; expected {either} on {device}")


def _check_compact(
    name: str,
    tensors: Sequence[Tensor | None],
    shapes: Sequence[torch.Size],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    for i, (x, shape, dtype) in enumerate(zip(tensors, shapes, dtypes, strict=True)):
        if x is None or (x.dtype is dtype and x.shape == shape and x.device == device and x.is_contiguous()):
            continue
        raise SsahError(
            f"{name}[{i}] is {x.dtype} {list(x.shape)} on {x.device}; "
            f"expected contiguous {dtype} {list(shape)} on {device}"
        )


def _check_extras(regions: "_Regions", shapes: Sequence[torch.Size], rounding: str, device: torch.device) -> None:
    """What Kahan's sum and a master need, beside the 16-bit weights that have no float32 copy."""
    needed: list[Tensor | None] = []
    for i, (weight, extra, copy) in enumerate(zip(regions.weights, regions.extras, regions.copies, strict=True)):
        applies = weight.dtype in _NARROW and (copy is None or copy.dtype == weight.dtype)
        if applies and extra is None:
            raise SsahError(f"extras[{i}] is missing; rounding={rounding!r} keeps a tensor for each weight there")
        needed.append(extra if applies else None)
    dtypes = [weight.dtype if rounding == "kahan" else torch.float32 for weight in regions.weights]
    _check_compact("extras", needed, shapes, dtypes, device)


def _check_copies(regions: "_Regions", shapes: Sequence[torch.Size], device: torch.device) -> None:
    dtypes = []
    for weight, copy in zip(regions.weights, regions.copies, strict=True):
        master = copy is not None and copy.dtype == torch.float32 and weight.dtype in _NARROW
        dtypes.append(torch.float32 if master else weight.dtype)
    _check_compact("copies", regions.copies, shapes, dtypes, device)


def _check_indices(weights: Sequence[Tensor], axes: Sequence[int], indices: Sequence[Tensor | None]) -> None:
    """Sorted, unique and in range; all lists at once, because one by one the calls would cost more than the looks."""
    lists = {i: index for i, index in enumerate(indices) if index is not None and index.numel()}
    if not lists:
        return
    joined = torch.cat(list(lists.values()))
    sizes = torch.tensor([weights[i].shape[axes[i]] for i in lists])
    ends = torch.tensor([index.numel() for index in lists.values()]).cumsum(0)
    last, first = joined[ends - 1], joined[torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])]
    rising = joined[1:] > joined[:-1]
    rising[ends[:-1] - 1] = True
    if bool(rising.all() & (first >= 0).all() & (last < sizes).all()):
        return
    for (i, index), size in zip(lists.items(), sizes.tolist(), strict=True):
        low, high = (int(v) for v in torch.aminmax(index))
        _require(0 <= low and high < size, f"indices[{i}] run from {low} to {high}; axis {axes[i]} has {size}")
        unsorted = f"indices[{i}] are not sorted or not unique; sort them with torch.unique"
        _require(bool((index[1:] > index[:-1]).all()), unsorted)


def _check_apart(weights: Sequence[Tensor]) -> None:
    spans = sorted([(x.data_ptr(), x.nbytes, i) for i, x in enumerate(weights) if x.numel()])
    for (start, size, i), (other, _, j) in pairwise(spans):
        if start + size > other:
            raise SsahError(f"weights[{i}] and weights[{j}] share memory; pass each weight once")


class _Regions(NamedTuple):
    """The arguments of masked_adamw_ that have one entry per weight; None where a weight has no such tensor."""

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    axes: Sequence[int]
    indices: Sequence[Tensor | None]
    max_exp_avg_sqs: Sequence[Tensor | None]
    extras: Sequence[Tensor | None]
    copies: Sequence[Tensor | None]
    ids: Sequence[int]
    offsets: Sequence[int]


class _Options(NamedTuple):
    """The arguments of masked_adamw_ that a backend gets beside them, and the cache."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    rounding: str
    seed: int
    grad_scale: Tensor | None
    found_inf: Tensor | None


def _check_lengths(regions: _Regions) -> None:
    count = len(regions.weights)
    for name, values in zip(regions._fields, regions, strict=True):
        if len(values) != count:
            raise SsahError(f"{name} has {len(values)} entries and weights {count}; give one per weight")


def _check_regions(regions: _Regions, rounding: str, device: torch.device) -> None:
    shapes = _check_weights(regions, device)
    _check_grads(regions, shapes, device)
    states = [torch.float64 if weight.dtype is torch.float64 else torch.float32 for weight in regions.weights]
    _check_compact("exp_avgs", regions.exp_avgs, shapes, states, device)
    _check_compact("exp_avg_sqs", regions.exp_avg_sqs, shapes, states, device)
    if _any(regions.max_exp_avg_sqs):
        _check_compact("max_exp_avg_sqs", regions.max_exp_avg_sqs, shapes, states, device)
    if rounding in ("kahan", "master"):
        _check_extras(regions, shapes, rounding, device)
    if _any(regions.copies):
        _check_copies(regions, shapes, device)
    for i, (step, offset) in enumerate(zip(regions.steps, regions.offsets, strict=True)):
        if step.dtype is not torch.float32 or step.dim() or step.device != device:
            raise SsahError(
                f"steps[{i}] is {step.dtype} {list(step.shape)} on {step.device}; expected float32 [] on {device}"
            )
        if offset < 0:
            raise SsahError(f"offsets[{i}] is {offset}; expected 0 or more")
    if device.type == "cpu":  # on a GPU the look would wait for the device; there, wrong indices are undefined
        _check_indices(regions.weights, regions.axes, regions.indices)
    _check_apart(regions.weights)


def _check_options(options: _Options) -> None:
    for name, high in (("lr", math.inf), ("eps", math.inf), ("weight_decay", math.inf), ("beta1", 1), ("beta2", 1)):
        value = getattr(options, name)
        if not (isinstance(value, Tensor) or 0 <= value < high):
            raise SsahError(f"{name}={value} is out of range; expected 0 <= {name} < {high}")
    if options.rounding not in ROUNDINGS:
        raise SsahError(f"rounding={options.rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")


def _check_scalars(options: _Options, device: torch.device) -> None:
    for name in ("lr", "grad_scale", "found_inf"):
        x = getattr(options, name)
        if isinstance(x, Tensor) and (x.numel() != 1 or x.device != device):
            raise SsahError(
                f"{name} is {list(x.shape)} on {x.device}; expected one element on {device}, as the weights"
            )


def read_by_host(device: torch.device) -> bool:
    """Whether the host looks at lr and found_inf on a device. At those on a GPU kernels look: the host would wait."""
    return device.type == "cpu"


def _skipped(options: _Options, host: bool) -> bool:
    """Whether the host knows that this step is to change nothing."""
    if not isinstance(options.lr, Tensor) and options.lr == 0:
        return True
    return host and options.found_inf is not None and bool(options.found_inf != 0)


def _for_kernel(options: _Options) -> _Options:
    """The scalars in the dtypes in which a kernel reads them on the device."""
    lr, scale, found = options.lr, options.grad_scale, options.found_inf
    return options._replace(
        lr=lr.double() if isinstance(lr, Tensor) else lr,
        grad_scale=None if scale is None else scale.float(),
        found_inf=None if found is None else found.float(),
    )


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def _pack(regions: _Regions, rounding: str, device: torch.device, cache: dict[str, Any]) -> _Regions:
    """What a backend gets: all contiguous. Checks whatever the cache does not vouch for.

    Copies of weights that are not contiguous stay in the cache, because a captured graph and a backend's table refer to
    them.
    """
    _check_lengths(regions)
    forms = rounding, [(grad.shape, grad.dtype) for grad in regions.grads]
    if cache.get("forms") != forms:
        cache.clear()
        _check_regions(regions, rounding, device)
        cache.update(forms=forms, weights=_contiguous(regions.weights), indices=_contiguous(regions.indices))
    else:
        for weight, packed in zip(regions.weights, cache["weights"], strict=True):
            if packed is not weight:
                packed.copy_(weight)
    return regions._replace(weights=cache["weights"], grads=_contiguous(regions.grads), indices=cache["indices"])


@torch.no_grad()
def _masked_adamw(regions: _Regions, options: _Options, cache: dict[str, Any] | None = None) -> None:
    if not regions.weights:
        return
    device = regions.weights[0].device
    host = read_by_host(device)
    _check_scalars(options, device)
    if host and isinstance(options.lr, Tensor):
        options = options._replace(lr=float(options.lr))
    _check_options(options)
    cache, vouched = {} if cache is None else cache, bool(cache)
    packed = _pack(regions, options.rounding, device, cache)
    if _skipped(options, host):
        return
    options = options._replace(found_inf=None) if host else _for_kernel(options)
    registry.select("masked_adamw_", device)(*packed, **options._asdict(), cache=cache)
    for weight, updated in zip(regions.weights, packed.weights, strict=True):
        if updated is not weight:
            weight.copy_(updated)
    written: list[Sequence[Tensor | None]] = [regions.weights, regions.copies]
    if not vouched:  # an optimizer's own tensors are in no graph, and to count 300 moments on takes 70 us
        written += [regions.exp_avgs, regions.exp_avg_sqs, regions.steps, regions.max_exp_avg_sqs, regions.extras]
    torch.autograd.graph.increment_version([x for entries in written for x in entries if x is not None])


@torch.library.custom_op(
    "ssah_fast::masked_adamw_", mutates_args=("weights", "exp_avgs", "exp_avg_sqs", "steps", "optional")
)
def _masked_adamw_op(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    axes: list[int],
    indices: list[Tensor | None],
    optional: list[Tensor],
    places: list[int],
    ids: list[int],
    offsets: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    rounding: str,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None,
) -> None:
    # torch 2.13 cannot functionalize a list that is written and has None in it: max_exp_avg_sqs, extras and copies come
    # as one list of the tensors that there are and, for every entry of the three, its place in that list or -1.
    entries = [None if place < 0 else optional[place] for place in places]
    max_exp_avg_sqs, extras, copies = (entries[i * len(weights) : (i + 1) * len(weights)] for i in range(3))
    regions = _Regions(
        *(weights, grads, exp_avgs, exp_avg_sqs, steps, axes, indices, max_exp_avg_sqs, extras, copies, ids, offsets)
    )
    rate = lr if lr_tensor is None else lr_tensor
    _masked_adamw(
        regions,
        _Options(rate, beta1, beta2, eps, weight_decay, maximize, rounding, seed, grad_scale, found_inf),
    )


def masked_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    axes: list[int],
    indices: list[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    max_exp_avg_sqs: Sequence[Tensor | None] = (),
    extras: Sequence[Tensor | None] = (),
    copies: Sequence[Tensor | None] = (),
    rounding: str = "stochastic",
    seed: int = 0,
    ids: Sequence[int] = (),
    offsets: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    cache: dict[str, Any] | None = None,
) -> None:
    """Do one step of AdamW on a region of each weight: the entries at given indices along one axis, or all of it.

    Loshchilov & Hutter (2019), algorithm 2, as torch.optim.AdamW does it, in float32 (float64 for float64 weights)
    whatever the dtype of the weight. Elements outside the region are neither changed nor written. All tensors of the
    region are compact: the weight's shape with ``shape[axis]`` replaced by the number of indices. With
    ``t = step + 1``::

        g = grad / grad_scale, negated if maximize
        m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g g;  with amsgrad v_max = max(v_max, v) stands for v below
        w = w (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    How w becomes a bfloat16 or float16 weight:
        "stochastic": up or down, with probabilities that keep the mean. The draw depends on seed, step, id and the
            position in the region only, so that replicas agree and a resumed run repeats it.
        "kahan": to nearest; ``extras`` holds what rounding lost and adds it to the next change.
        "master": to nearest; ``extras`` holds the unrounded weight.
        "nearest": to nearest; small changes are lost.

    With lr = 0 or found_inf nothing changes, the steps neither. An Inf or NaN in a gradient is used as it is. On a GPU
    nothing waits for the device: steps, lr and found_inf are read there, and a CUDA graph can capture a call.

    Args:
        weights: float32, bfloat16, float16 or float64, all on one device. Fastest if contiguous.
        grads: Each has its weight's shape or is compact; any of these dtypes.
        exp_avgs: m, compact, contiguous float32 (float64 for float64 weights).
        exp_avg_sqs: v, as m.
        steps: 0-dim float32, on the weights' device: steps done so far.
        axes: Axis of each region; ignored where its indices are None.
        indices: int64 [n], sorted, unique: what to train along the axis, None for the whole weight. May be empty.
        lr: Learning rate, a float or a tensor with one element on the weights' device (its range is looked at on the
            CPU only).
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        maximize: Ascend instead.
        max_exp_avg_sqs: v_max, as m: amsgrad.
        extras: Compact, what "kahan" (the weight's dtype) and "master" (float32) keep; None for other weights.
        copies: Compact tensors that hold the region's values, or None: read instead of the weight and written with it.
            A float32 copy of a 16-bit weight is its master, whatever the rounding.
        rounding: "stochastic", "kahan", "master" or "nearest"; without effect on float32 and float64 weights.
        seed: Of the stochastic rounding.
        ids: int64 per weight, telling weights apart in the stochastic rounding. Default 0, 1, 2, ...
        offsets: Where this shard's first element lies in the region of the whole parameter. Default 0.
        grad_scale: One element on the weights' device: the gradients are that much too large.
        found_inf: One element on the weights' device: other than 0, the step is skipped.
        cache: A dict, empty at a first call. Passed again it vouches that all but the gradients are the tensors of that
            call, in the same memory and with the same shapes, and so need no second look: of 300 small tensors that
            would take as long as their update. Gradients of other shapes or dtypes, or another rounding, empty it. A
            call that a CUDA graph captures needs the cache of a call before it; it must live as long as the graph.

    Raises:
        SsahError: A list's length, shape, dtype or device is wrong, indices are not sorted, unique and in range (looked
            at on the CPU only), two of the tensors share memory, a number is out of range, or SSAH_FAST_BACKEND cannot
            run the op.
    """
    count = len(weights)
    regions = _Regions(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        axes,
        indices,
        list(max_exp_avg_sqs) or [None] * count,
        list(extras) or [None] * count,
        list(copies) or [None] * count,
        list(ids) or list(range(count)),
        list(offsets) or [0] * count,
    )
    (seed,) = _into_int64([seed])
    options = _Options(lr, beta1, beta2, eps, weight_decay, maximize, rounding, seed, grad_scale, found_inf)
    if not torch.compiler.is_compiling():
        _masked_adamw(regions, options, cache)
        return
    optional: list[Tensor] = []
    places = []
    for entry in chain(regions.max_exp_avg_sqs, regions.extras, regions.copies):
        places.append(-1 if entry is None else len(optional))
        optional += [] if entry is None else [entry]
    lr_tensor = lr if isinstance(lr, Tensor) else None
    numbers = options if lr_tensor is None else options._replace(lr=0.0)
    _masked_adamw_op(*regions[:7], optional, places, regions.ids, regions.offsets, *numbers, lr_tensor)


@_masked_adamw_op.register_fake
def _(*args: Any) -> None:
    return None


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


def _check_base(base: Tensor, offset: int) -> None:
    _require(base.device.type != "meta", "base is on meta and has no data; move the model to a real device first")
    if base.dtype not in _DTYPES or base.layout is not torch.strided:
        raise SsahError(
            f"base is {base.dtype} ({base.layout}); expected a dense tensor of {', '.join(map(str, _DTYPES))}"
        )
    if offset < 0:
        raise SsahError(f"offset is {offset}; expected 0 or more")


def _check_scales(scales: Tensor, count: int, device: torch.device) -> None:
    if scales.dtype != torch.float64 or scales.shape != (count,) or scales.device != device:
        raise SsahError(
            f"scales is {scales.dtype} {list(scales.shape)} on {scales.device}; expected float64 [{count}] on {device}"
        )
    # On a GPU the look would wait for the device; there, such a scale makes every element NaN.
    if device.type == "cpu" and not all(map(math.isfinite, scales.tolist())):
        raise SsahError(f"scales are {scales.tolist()}; a tensor with Inf or NaN has no direction of its norm")


@torch.library.custom_op("ssah_fast::direction_scales", mutates_args=())
def _direction_scales(base: Tensor, directions: Sequence[int], name: str, offset: int) -> Tensor:
    _check_base(base, offset)
    if not base.numel() or not directions:
        return torch.zeros(len(directions), dtype=torch.float64, device=base.device)
    scales: Tensor = registry.select("direction_scales", base.device)(
        base.contiguous(), directions, tensor_id(name), offset
    )
    _check_scales(scales, len(directions), base.device)
    return scales


@torch.no_grad()
def direction_scales(base: Tensor, directions: Sequence[int], *, name: str, offset: int = 0) -> Tensor:
    """Return what makes the norm of each direction the tensor's: ||base|| / ||d_k||, the Frobenius norms.

    Args:
        base: A whole tensor, or a shard of one (whose scale is then that of the shard); any shape; float32, bfloat16,
            float16 or float64.
        directions: Seeds; see perturb_.
        name: Of the tensor.
        offset: Position of base's first element in the whole tensor.

    Returns:
        [len(directions)] float64; zeros for an empty tensor. Summed in float64 in a fixed order: the same bits on every
        run and for every number of threads.

    Raises:
        SsahError: base is not dense, of another dtype, or (looked at on the CPU only) has Inf or NaN, offset is
            negative, or SSAH_FAST_BACKEND cannot run the op.
    """
    return _direction_scales(base, _into_int64(directions), name, offset)


def _check_out(out: Tensor, base: Tensor) -> None:
    if out is base and out.is_contiguous():
        return
    if (out.shape, out.dtype, out.device, out.layout) != (base.shape, base.dtype, base.device, torch.strided):
        raise SsahError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}; "
            f"expected {base.dtype} {list(base.shape)} on {base.device}, as base"
        )
    expanded = any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True))
    _require(not expanded, "out is an expanded tensor whose elements share memory; give each its own")
    shift = abs(out.data_ptr() - base.data_ptr())
    same = shift == 0 and out.stride() == base.stride()
    apart = same or shift >= out.nbytes or not (out.is_contiguous() and base.is_contiguous())
    _require(apart, "out overlaps part of base; pass base itself or other memory")


def _plain(x: Tensor) -> bool:
    """Whether a tensor has data, and is of no class that torch.library must tell from others."""
    return type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not x.is_inference()


def _perturb(
    out: Tensor,
    base: Tensor,
    directions: Sequence[int],
    alphas: Sequence[float],
    scales: Tensor,
    name: str,
    offset: int,
) -> None:
    _check_base(base, offset)
    _check_out(out, base)
    if not directions or not base.numel():
        out.copy_(base)
        return
    factors = scales * torch.tensor(alphas, dtype=torch.float64, pin_memory=scales.is_cuda).to(
        scales.device, non_blocking=True
    )
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    registry.select("perturb_", base.device)(target, base.contiguous(), directions, factors, tensor_id(name), offset)
    if target is not out:
        out.copy_(target)


@torch.library.custom_op("ssah_fast::perturb_", mutates_args=("out",))
def _perturb_op(
    out: Tensor,
    base: Tensor,
    directions: Sequence[int],
    alphas: Sequence[float],
    scales: Tensor,
    name: str,
    offset: int,
) -> None:
    _check_scales(scales, len(directions), base.device)
    _perturb(out, base, directions, alphas, scales, name, offset)


@torch.no_grad()
def perturb_(
    out: Tensor,
    base: Tensor,
    directions: Sequence[int],
    alphas: Sequence[float],
    *,
    name: str,
    scales: Tensor | None = None,
    offset: int = 0,
) -> None:
    """Step along random directions: out = base + sum over k of alphas[k] scales[k] d_k, in one pass.

    Direction d_k has one standard normal number per element, regenerated from (directions[k], name, position of the
    element) wherever it is needed and never stored: Box & Muller (1958) on keyed random bits, by polynomials, so that
    every backend gives the same bits. The default scales give each direction the tensor's own Frobenius norm
    (Peng et al. 2024, arXiv 2405.17374): alpha is then the ratio of noise to weight.

    The sum is taken in float32 (float64 for float64 tensors), direction after direction, and rounded once, to nearest.
    Directions whose alpha is 0 are left out: with none left, out is base bit for bit.

    Args:
        out: Where the result is written: base itself, or a tensor of its shape and dtype that does not overlap it.
        base: Any shape; float32, bfloat16, float16 or float64. Fastest if contiguous, as out.
        directions: Seeds, any integers (modulo 2^64); the same seed and name give the same direction.
        alphas: How far to go along each, one finite number per direction.
        name: Of the tensor: each has directions of its own. Tied tensors share one name, and are perturbed once.
        scales: [len(directions)] float64 on base's device. Default: direction_scales of base, which reads base once
            more and draws the directions twice; compute them once where many alphas are tried.
        offset: Position of base's first element in the whole tensor, so that shards agree with it.

    Raises:
        SsahError: A shape, dtype, device or length is wrong, a number is not finite, out overlaps part of base, or
            SSAH_FAST_BACKEND cannot run the op.
    """
    count = len(directions)
    if len(alphas) != count:
        raise SsahError(f"alphas has {len(alphas)} entries and directions {count}; give one per direction")
    for k, alpha in enumerate(alphas):
        if not math.isfinite(alpha):
            raise SsahError(f"alphas[{k}] is {alpha}; expected a finite number")
    used = [k for k, alpha in enumerate(alphas) if alpha != 0]
    if scales is None:
        scales = direction_scales(base, [directions[k] for k in used], name=name, offset=offset)
    else:
        _check_scales(scales, count, base.device)
        scales = scales if len(used) == count else torch.stack([scales[k] for k in used]) if used else scales[:0]
    seeds, alphas = _into_int64([directions[k] for k in used]), [float(alphas[k]) for k in used]
    # The way through torch.library takes 40 us, as long as a tensor of 100,000 elements: only who must goes there.
    if torch.compiler.is_compiling() or not _plain(out) or not _plain(base):
        _perturb_op(out, base, seeds, alphas, scales, name, offset)
    else:
        _perturb(out, base, seeds, alphas, scales, name, offset)
        torch.autograd.graph.increment_version(out)


@_direction_scales.register_fake
def _(base: Tensor, directions: Sequence[int], name: str, offset: int) -> Tensor:
    return base.new_empty(len(directions), dtype=torch.float64)


@_perturb_op.register_fake
def _(*args: Any) -> None:
    return None
