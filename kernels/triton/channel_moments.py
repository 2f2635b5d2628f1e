"""Per-channel moments of rows, per group: n, mean = sum x / n, M2 = sum (x - mean)^2, merged into a float64 state.

chunks.py has the numerics. Each row is read once: by the pass of its group over its chunk.
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
from ssah_fast.kernels.triton.convert import widen

ROWS = 8  # of a tile: 8 loads of 16 bytes in flight per lane. Not measured yet
OPTIONS = {"num_warps": 1, "maxnreg": 136, "enable_fp_fusion": True}  # 15 warps per multiprocessor, no spills


@triton.jit(do_not_specialize=SIZES)
def _channel_moments_kernel(
    # data ptrs
    x,
    group,
    count,
    counts,
    means,
    m2s,
    # strides
    stride: tl.int64,
    # shapes
    rows,
    channels,
    blocks,
    chunks,
    first,
    groups,
    # constexpr
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write means and m2s [groups, chunks, channels] of the ids first, ..., first + groups - 1."""
    block, chunk = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    start = chunk * CHUNK
    ids = chunk_ids(group, first, start, rows, CHUNK, ROWS)
    if block == 0:
        store_counts(count, counts, ids, chunk, chunks, groups)

    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    row = start + tl.arange(0, ROWS)
    at = x + row[:, None] * stride + channel[None, :]
    g = next_group(ids, -1, groups)
    while g < groups:
        ids = chunk_ids(group, first, start, rows, CHUNK, ROWS)  # again: to keep them would cost registers
        inverse = 1.0 / count_rows(ids, g).to(tl.float64)
        best, following = fullest_tile(ids, g) * ROWS, next_group(ids, g, groups)
        hit = tile_ids(group, first, row + best, rows) == g
        shift = tile_mean(widen(tl.load(at + best * stride, hit[:, None] & inside[None, :], 0.0)), hit)
        total, square = tl.zeros([COLUMNS], tl.float64), tl.zeros([COLUMNS], tl.float64)
        for t in range(0, CHUNK, ROWS):
            hit = tile_ids(group, first, row + t, rows) == g
            if tl.sum(hit.to(tl.int32)) > 0:
                values = widen(tl.load(at + t * stride, hit[:, None] & inside[None, :], 0.0))
                total, square = add_tile(total, square, values, hit, shift, WIDE=x.dtype.element_ty == tl.float32)
        store_moments(means, m2s, (g * chunks + chunk) * channels + channel, inside, inverse, shift, total, square)
        g = following


def channel_moments_(x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """See ops.channel_moments_."""

    def launch(
        grid: tuple[int], partial: tuple[Tensor, ...], sizes: tuple[int, ...], constants: dict[str, int]
    ) -> None:
        _channel_moments_kernel[grid](
            x, group, *partial, x.stride(0), *x.shape, *sizes, ROWS=ROWS, **constants, **OPTIONS
        )

    merge_rows(launch, x, count, mean, m2)


COMPILED = compiled(_channel_moments_kernel, ["x"], ["stride"], OPTIONS, ROWS=ROWS)
