"""h = act(gate) * up, rounded after each of the two operations, and the moments of h as in channel_moments.

chunks.py has the numerics of the moments. Each row of gate and up is read and each row of h written once, by the pass
of its group over its chunk (but for one tile per pass, whose mean is taken beforehand); rows of -1 go with the first.
"""

import triton
import triton.language as tl
from torch import Tensor

from ssah_fast.kernels.triton.chunks import (
    SIZES,
    add_tile,
    chunk_ids,
    compiled,
    count_rows,
    fullest_tile,
    merge_rows,
    next_group,
    store_counts,
    store_moments,
    tile_ids,
    tile_mean,
)
from ssah_fast.kernels.triton.convert import narrow, widen

ROWS = 4  # of a tile: 8 loads of 16 bytes in flight per lane. Not measured yet
OPTIONS = {"num_warps": 1, "maxnreg": 184, "enable_fp_fusion": True}  # 11 warps per multiprocessor, no spills
NO_ID = tl.constexpr(-1000)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) in float32 or float64; where e^-x overflows, the quotient goes to zero."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 = 1 / (1 + e^(-2y)), y = sqrt(2 / pi) (x + 0.044715 x^3)
        return x / (1.0 + tl.exp(x * (x * x * -0.07135481627260025 - 1.5957691216057308)))
    else:
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN


@triton.jit
def gated(gate, up, mask, ACTIVATION: tl.constexpr):
    """A tile of h, in its own dtype; 0 where the mask is not set."""
    dtype = gate.dtype.element_ty
    act = narrow(activate(widen(tl.load(gate, mask, 0.0)), ACTIVATION), dtype)
    return narrow(widen(act) * widen(tl.load(up, mask, 0.0)), dtype)


@triton.jit(do_not_specialize=SIZES)
def _gated_moments_kernel(
    # data ptrs
    gate,
    up,
    out,
    group,
    count,
    counts,
    means,
    m2s,
    # strides
    gate_stride: tl.int64,
    up_stride: tl.int64,
    out_stride: tl.int64,
    # shapes
    rows,
    channels,
    blocks,
    chunks,
    first,
    groups,
    # constexpr
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write out [rows, channels]; means and m2s [groups, chunks, channels] of the groups from first on."""
    block, chunk = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    start = chunk * CHUNK
    ids = chunk_ids(group, first, start, rows, CHUNK, ROWS)
    if block == 0:
        store_counts(count, counts, ids, chunk, chunks, groups)

    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    row = start + tl.arange(0, ROWS)
    gate += row[:, None] * gate_stride + channel[None, :]
    up += row[:, None] * up_stride + channel[None, :]
    out += row[:, None] * out_stride + channel[None, :]
    g = next_group(ids, -1, groups)
    uncounted = tl.where(first == 0, -1, NO_ID)
    while (g < groups) | (uncounted == -1):
        ids = chunk_ids(group, first, start, rows, CHUNK, ROWS)  # again: to keep them would cost registers
        n = count_rows(ids, g)
        inverse = 1.0 / tl.maximum(n, 1).to(tl.float64)
        best, following = fullest_tile(ids, g) * ROWS, next_group(ids, g, groups)
        hit = tile_ids(group, first, row + best, rows) == g
        mask = hit[:, None] & inside[None, :]
        shift = tile_mean(widen(gated(gate + best * gate_stride, up + best * up_stride, mask, ACTIVATION)), hit)
        total, square = tl.zeros([COLUMNS], tl.float64), tl.zeros([COLUMNS], tl.float64)
        for t in range(0, CHUNK, ROWS):
            id = tile_ids(group, first, row + t, rows)
            hit = id == g
            taken = hit | (id == uncounted)
            if tl.sum(taken.to(tl.int32)) > 0:
                mask = taken[:, None] & inside[None, :]
                h = gated(gate + t * gate_stride, up + t * up_stride, mask, ACTIVATION)
                tl.store(out + t * out_stride, h, mask)
                total, square = add_tile(total, square, widen(h), hit, shift, WIDE=gate.dtype.element_ty == tl.float32)
        if n > 0:
            store_moments(means, m2s, (g * chunks + chunk) * channels + channel, inside, inverse, shift, total, square)
        g = following
        uncounted = tl.full([], NO_ID, tl.int32)


def gated_moments_(
    gate: Tensor, up: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor, activation: str, out: Tensor
) -> None:
    """See ops.gated_moments_."""
    strides = gate.stride(0), up.stride(0), out.stride(0)

    def launch(
        grid: tuple[int], partial: tuple[Tensor, ...], sizes: tuple[int, ...], constants: dict[str, int]
    ) -> None:
        _gated_moments_kernel[grid](
            gate,
            up,
            out,
            group,
            *partial,
            *strides,
            *gate.shape,
            *sizes,
            ACTIVATION=activation,
            ROWS=ROWS,
            **constants,
            **OPTIONS,
        )

    merge_rows(launch, gate, count, mean, m2)


COMPILED = [
    entry
    for activation in ("silu", "gelu", "gelu_tanh", "relu")
    for entry in compiled(
        _gated_moments_kernel,
        ["gate", "up", "out"],
        ["gate_stride", "up_stride", "out_stride"],
        OPTIONS,
        ACTIVATION=activation,
        ROWS=ROWS,
    )
]
