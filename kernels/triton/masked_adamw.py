"""AdamW on a region of each weight: the formula stands in ops.masked_adamw_, its roundings in kernels/reference.py.

One small kernel turns steps, lr and scales, which may live on the device, into the constants of every tensor, in
float64; then one launch per tensor updates it. Nothing is fused (enable_fp_fusion=False), divisions and square roots
are rounded to nearest: the same bits as the reference.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssah_fast.kernels.triton.convert import narrow, widen
from ssah_fast.kernels.triton.random import random_bits

# Elements of a tile: 8 per thread of 4 warps, 16 bytes of a 16-bit weight. Not measured yet.
BLOCK = tl.constexpr(1024)
SCALARS_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
ROUNDINGS = ("stochastic", "kahan", "master", "nearest")

# A row of the table of constants, float64.
SHRINK, BLEND1, KEEP2, BLEND2, STEP_SIZE, INVERSE_ROOT, EPS, DIVISOR, STEP, LIVE = map(tl.constexpr, range(10))
ROW = tl.constexpr(16)

# How a region [lines, width] lies in its weight.
WHOLE, ROWS, COLUMNS = map(tl.constexpr, range(3))
WARPS = {WHOLE.value: 4, ROWS.value: 4, COLUMNS.value: 8}  # addresses of columns fill up to 152 registers of 4 warps

NARROW = (torch.bfloat16, torch.float16)


@triton.jit
def _double(bits):
    """A float64 from its bits: a kernel's float argument would be rounded to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """By squaring, from the lowest bit on, as reference.power."""
    result = base * 0 + 1
    while exponent > 0:
        if exponent % 2 == 1:
            result *= base
        base *= base
        exponent //= 2
    return result


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def _scalars_kernel(
    # data ptrs
    steps,
    scalars,
    device_lr,
    grad_scale,
    found_inf,
    # scalars: bits of float64
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    # constexpr
    MAXIMIZE: tl.constexpr,
):
    """Scalars [tensors, ROW]: the constants of each tensor's step. With lr = 0 or found_inf no step is LIVE."""
    row = tl.program_id(0)
    step = tl.load(steps + row).to(tl.int64) + 1
    rate, first, second = _double(lr), _double(beta1), _double(beta2)
    if device_lr is not None:
        rate = tl.load(device_lr)
    live = rate != 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    divisor = first * 0 + 1
    if grad_scale is not None:
        divisor = tl.load(grad_scale).to(tl.float64)
    if MAXIMIZE:
        divisor = -divisor
    out = scalars + row * ROW
    tl.store(out + SHRINK, rate * _double(weight_decay))
    tl.store(out + BLEND1, 1 - first)
    tl.store(out + KEEP2, second)
    tl.store(out + BLEND2, 1 - second)
    tl.store(out + STEP_SIZE, rate / (1 - _power(first, step)))
    tl.store(out + INVERSE_ROOT, 1 / tl.sqrt(1 - _power(second, step)))
    tl.store(out + EPS, _double(eps))
    tl.store(out + DIVISOR, divisor)
    tl.store(out + STEP, step.to(tl.float64))
    tl.store(out + LIVE, live.to(tl.float64))


@triton.jit
def _splitmix64(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _random_bits(seed, step, id, first, position):
    """As reference.random_bits. first: the smallest position of the tile, which spans less than 2^32."""
    stem = _splitmix64(_splitmix64(_splitmix64(seed.to(tl.uint64)) ^ step.to(tl.uint64)) ^ id.to(tl.uint64))
    high = first >> 32
    key = tl.where(
        position >> 32 == high,
        _splitmix64(stem ^ high.to(tl.uint64)),
        _splitmix64(stem ^ (high + 1).to(tl.uint64)),
    )
    return random_bits(position.to(tl.uint32), key)


@triton.jit
def _unless_special(rounded, bits):
    """The rounded bits or, of Inf and NaN, their own."""
    magnitude = bits & 0x7FFFFFFF
    special = tl.where(magnitude > 0x7F800000, bits | 0x00400000, bits)
    return tl.where(magnitude < 0x7F800000, rounded, special)


@triton.jit
def _upper(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _round_stochastic(w, random, dtype: tl.constexpr):
    """As reference.round_stochastic."""
    bits = w.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        return _upper(_unless_special(bits + (random & 0xFFFF), bits))
    else:
        size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        normal = _unless_special((bits + (random & 0x1FFF)) & 0xFFFFE000, bits).to(tl.float32, bitcast=True)
        tiny = size < 2.0**-14
        q = tl.where(tiny, size, 0.0) * 2.0**24
        down = q.to(tl.int32).to(tl.float32)
        up = tl.where(q - down > (random >> 8).to(tl.int32).to(tl.float32) * 2.0**-24, 1.0, 0.0)
        small = ((down + up) * 2.0**-24).to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        return tl.where(tiny, small.to(tl.float32, bitcast=True), normal).to(tl.float16)


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.math.div_rn(x, y)


@triton.jit
def _square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.math.sqrt_rn(x)


@triton.jit(do_not_specialize=["row", "seed", "id", "offset"])
def _masked_adamw_kernel(
    # data ptrs
    weight,
    grad,
    m,
    v,
    v_max,
    extra,
    copy,
    index,
    scalars,
    # shapes
    lines: tl.int64,
    width: tl.int64,
    count: tl.int64,
    size: tl.int64,
    # scalars
    row,
    seed: tl.int64,
    id: tl.int64,
    offset: tl.int64,
    # constexpr
    LAYOUT: tl.constexpr,
    COMPACT: tl.constexpr,
    SCALED: tl.constexpr,
    ROUNDING: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile [LINES, WIDTH] of the region [lines, width]; index [count] are entries of a weight's axis [size]."""
    across = tl.cdiv(width, WIDTH)
    tile = tl.program_id(0).to(tl.int64)
    line = (tile // across * LINES + tl.arange(0, LINES))[:, None]
    column = (tile % across * WIDTH + tl.arange(0, WIDTH))[None, :]
    if LAYOUT == COLUMNS:  # neighbours in threads next to each other, so that what they scatter shares sectors
        column = tl.max_contiguous(column, [1, 1])
    inside = (line < lines) & (column < width)
    if LAYOUT == WHOLE:
        position = column
        place = column
    else:
        position = line * width + column
        if LAYOUT == ROWS:
            entry = tl.load(index + line % count, line < lines)
            place = (line // count * size + entry) * width + column
        else:
            place = line * size + tl.load(index + column, column < width)

    table = scalars + row * ROW
    C: tl.constexpr = m.dtype.element_ty
    dtype: tl.constexpr = weight.dtype.element_ty
    g = widen(tl.load(grad + (position if COMPACT else place), inside)).to(C)
    first_moment = tl.load(m + position, inside)
    second_moment = tl.load(v + position, inside)
    if ROUNDING == "master":
        w = tl.load(extra + position, inside)
    elif copy is not None:
        w = widen(tl.load(copy + position, inside))
    else:
        w = widen(tl.load(weight + place, inside))
    # The loads need not wait for the look whether this step is live; only what is stored does.
    kept = inside & (tl.broadcast_to(tl.load(table + LIVE), inside.shape) != 0)

    if SCALED:
        g = _divide(g, tl.load(table + DIVISOR).to(C))
    first_moment = first_moment + (g - first_moment) * tl.load(table + BLEND1).to(C)
    second_moment = second_moment * tl.load(table + KEEP2).to(C) + g * tl.load(table + BLEND2).to(C) * g
    tl.store(m + position, first_moment, kept)
    tl.store(v + position, second_moment, kept)
    if v_max is not None:
        highest = tl.load(v_max + position, inside)
        second_moment = tl.where(highest >= second_moment, highest, second_moment)
        second_moment = tl.where(highest == highest, second_moment, highest)  # NaN stays
        tl.store(v_max + position, second_moment, kept)
    shrink = tl.load(table + SHRINK)
    decay = (-shrink if ROUNDING == "kahan" else 1 - shrink).to(C)
    root = _square_root(second_moment) * tl.load(table + INVERSE_ROOT).to(C) + tl.load(table + EPS).to(C)
    result = w * decay - _divide(first_moment * tl.load(table + STEP_SIZE).to(C), root)

    if dtype == C:
        new = result
    elif ROUNDING == "stochastic":
        start = offset + tile // across * LINES * width + tile % across * WIDTH
        step = tl.load(table + STEP).to(tl.int64)
        random = _random_bits(seed.to(tl.int64), step, id.to(tl.int64), start, offset + position)
        new = _round_stochastic(result, random, dtype)
    elif ROUNDING == "kahan":
        change = result + widen(tl.load(extra + position, inside))
        new = narrow(w + change, dtype)
        tl.store(extra + position, narrow(change - (widen(new) - w), dtype), kept)
    else:
        new = narrow(result, dtype)
        if ROUNDING == "master":
            tl.store(extra + position, result, kept)
    tl.store(weight + place, new, kept)
    if copy is not None:
        tl.store(copy + position, new, kept)


def _bits(x: float) -> int:
    return int.from_bytes(struct.pack("<d", x), "little", signed=True)


def _scalars(
    steps: Sequence[Tensor],
    lr: float | Tensor,
    numbers: Sequence[float],
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """The table of constants, [tensors, ROW] float64."""
    before = torch.stack(list(steps))
    table = before.new_empty((len(steps), ROW.value), dtype=torch.float64)
    device_lr, host_lr = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    _scalars_kernel[(len(steps),)](
        *(before, table, device_lr, grad_scale, found_inf),
        *map(_bits, (host_lr, *numbers)),
        MAXIMIZE=maximize,
        **SCALARS_OPTIONS,
    )
    return table


def _layout(weight: Tensor, axis: int, index: Tensor | None) -> tuple[int, tuple[int, int, int, int]]:
    """How the region lies in the weight, and lines, width, count and size."""
    if index is None or index.numel() == weight.shape[axis]:
        return WHOLE.value, (1, weight.numel(), 1, 1)
    outer, inner = math.prod(weight.shape[:axis]), math.prod(weight.shape[axis + 1 :])
    count, size = index.numel(), weight.shape[axis]
    if inner == 1:
        return COLUMNS.value, (outer, count, count, size)
    return ROWS.value, (outer * count, inner, count, size)


def _options(layout: int) -> dict[str, Any]:
    return {"num_warps": WARPS[layout], "enable_fp_fusion": False}


def _tile(lines: int, width: int) -> tuple[int, int]:
    """LINES and WIDTH; a tile of several lines is as wide as they are, or nearly so, and BLOCK in all."""
    across = min(BLOCK.value, triton.next_power_of_2(width))
    return (BLOCK.value // across if lines > 1 else 1), across


def _update(
    row: int,
    table: Tensor,
    rounding: str,
    seed: int,
    scaled: bool,
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    axis: int,
    index: Tensor | None,
    v_max: Tensor | None,
    extra: Tensor | None,
    copy: Tensor | None,
    id: int,
    offset: int,
) -> None:
    if m.numel() == 0:
        return
    if weight.dtype not in NARROW:
        rounding = "nearest"
    elif copy is not None and copy.dtype == torch.float32:
        rounding, extra, copy = "master", copy, None
    layout, shapes = _layout(weight, axis, index)
    lines, width = _tile(*shapes[:2])
    tiles = triton.cdiv(shapes[0], lines) * triton.cdiv(shapes[1], width)
    _masked_adamw_kernel[(tiles,)](
        *(weight, grad, m, v, v_max, extra if rounding in ("kahan", "master") else None, copy),
        *(None if layout == WHOLE.value else index, table),
        *shapes,
        *(row, seed, id, offset),
        LAYOUT=layout,
        COMPACT=grad.shape == m.shape,
        SCALED=scaled,
        ROUNDING=rounding,
        LINES=lines,
        WIDTH=width,
        **_options(layout),
    )


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
    """See ops.masked_adamw_."""
    scaled = maximize or grad_scale is not None
    with torch.cuda.device_of(weights[0]):
        table = _scalars(steps, lr, (beta1, beta2, eps, weight_decay), maximize, grad_scale, found_inf)
        columns = weights, grads, exp_avgs, exp_avg_sqs, axes, indices, max_exp_avg_sqs, extras, copies, ids, offsets
        for row, tensors in enumerate(zip(*columns, strict=True)):
            _update(row, table, rounding, seed, scaled, *tensors)
        torch._foreach_add_(list(steps), table[0, LIVE.value].float())


def _compiled(
    dtype: str,
    rounding: str = "nearest",
    *,
    grad: str | None = None,
    layout: int = WHOLE.value,
    compact: bool = True,
    lines: int = 1,
    amsgrad: bool = False,
    scaled: bool = False,
    copy: bool = False,
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    state = "fp64" if dtype == "fp64" else "fp32"
    extra = {"kahan": dtype, "master": "fp32"}.get(rounding)
    pointers = {"weight": dtype, "grad": grad or dtype, "m": state, "v": state, "scalars": "fp64"}
    pointers |= {"v_max": state} if amsgrad else {}
    pointers |= {"extra": extra} if extra else {}
    pointers |= {"copy": dtype} if copy else {}
    pointers |= {"index": "i64"} if layout != WHOLE.value else {}
    absent = [name for name in ("v_max", "extra", "copy", "index") if name not in pointers]
    signature = {name: f"*{kind}:16" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("lines", "count", "size", "seed", "id", "offset"), "i64")
    signature |= {"width": "i64:16", "row": "i32"}
    flags = {"LAYOUT": layout, "COMPACT": compact, "SCALED": scaled, "ROUNDING": rounding}
    tile = {"LINES": lines, "WIDTH": BLOCK.value // lines}
    return _masked_adamw_kernel, signature, dict.fromkeys(absent) | flags | tile, _options(layout)


_DOUBLES = dict.fromkeys(("lr", "beta1", "beta2", "eps", "weight_decay"), "i64")
_TABLES = {"steps": "*fp32:16", "scalars": "*fp64:16"}
_ON_DEVICE = {"device_lr": "*fp64:16", "grad_scale": "*fp32:16", "found_inf": "*fp32:16"}

# What users run, for tests/test_compiled.py: kernel, signature, constexprs, options.
COMPILED = [
    (_scalars_kernel, _TABLES | _DOUBLES, dict.fromkeys(_ON_DEVICE) | {"MAXIMIZE": False}, SCALARS_OPTIONS),
    (_scalars_kernel, _TABLES | _ON_DEVICE | _DOUBLES, {"MAXIMIZE": True}, SCALARS_OPTIONS),
    *(_compiled(dtype) for dtype in ("fp32", "fp64")),
    *(_compiled(dtype, rounding) for dtype in ("bf16", "fp16") for rounding in ROUNDINGS),
    _compiled("bf16", "stochastic", grad="fp32", scaled=True, amsgrad=True),
    *(_compiled("bf16", "stochastic", layout=layout, compact=False) for layout in (ROWS.value, COLUMNS.value)),
    *(_compiled("bf16", "stochastic", layout=layout, copy=True) for layout in (ROWS.value, COLUMNS.value)),
    *(_compiled("fp32", layout=layout, compact=False, lines=8) for layout in (ROWS.value, COLUMNS.value)),
]
