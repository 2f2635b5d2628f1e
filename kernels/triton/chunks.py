"""What channel_moments and gated_moments share: moments of chunks of rows, and their merge into the state.

A program is one warp. It takes the moments of one chunk of rows and one block of channels, one group after the other
and tile by tile; a lane has all rows of its channels, so that no sum crosses lanes. The rows are summed as deviations
from a shift K (Chan, Golub & LeVeque 1983): with d = x - K, mean = K + sum(d) / n and M2 = sum(d^2) - sum(d)^2 / n.
K is the mean of the tile that has the most rows of the group, so that M2 is at least sum(d^2) times the share of the
rows that this tile has, however far out one of them lies. The sums of a tile are float32 for 16-bit data and float64
for the rest, all others float64.

A second kernel merges the chunks and the state by the pairwise update (Chan, Golub & LeVeque 1979). The order of the
arithmetic depends on the shapes and the ids alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

GROUPS_AT_ONCE = 4  # bounds the partial results to an eighth of 16-bit data; more groups take several rounds
COLUMNS = {2: 256, 4: 128, 8: 64}  # by the bytes of an element: 16 bytes per lane
CHUNKS = (256, 128, 64)  # rows; fewer only where there were too few programs. Not measured yet
ENOUGH_PROGRAMS = 1584  # 12 warps on each of an H100's 132 multiprocessors: 48 KB in flight on each
NOWHERE = tl.constexpr(-128)  # id of a row outside the tensor; below -1 even after the first group is subtracted
SIZES = ["blocks", "chunks", "first", "groups"]  # no new machine code for another batch
MERGE = {"CHUNKS": 32, "COLUMNS": 64}  # 8192 rows in one step
MERGE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def tile_ids(group, first, row, rows):
    """Group ids of some rows, less the first of the groups of this round."""
    return tl.load(group + row, row < rows, NOWHERE).to(tl.int32) - first


@triton.jit
def chunk_ids(group, first, start, rows, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """The same for all rows of a chunk: [tiles, ROWS]."""
    return tile_ids(
        group, first, start + tl.arange(0, CHUNK // ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :], rows
    )


@triton.jit
def count_rows(ids, g):
    """Return how many rows of a chunk belong to a group."""
    return tl.sum(tl.sum((ids == g).to(tl.int32), 1), 0)


@triton.jit
def store_counts(count, counts, ids, chunk, chunks, groups):
    """Write counts [groups, 1 + chunks]: the state's count, which the merge would race for, then each chunk's."""
    for g in range(groups):
        at = counts + g * (1 + chunks)
        if chunk == 0:
            tl.store(at, tl.load(count + g))
        tl.store(at + 1 + chunk, count_rows(ids, g).to(tl.int64))


@triton.jit
def next_group(ids, g, groups):
    """Return the lowest of this round's groups above g that a chunk has rows of, or `groups`."""
    return tl.min(tl.where((ids > g) & (ids < groups), ids, groups))


@triton.jit
def fullest_tile(ids, g):
    """Return which of the tiles has the most rows of a group; ids [tiles, ROWS]."""
    return tl.argmax(tl.sum((ids == g).to(tl.int32), 1), 0)


@triton.jit
def tile_mean(x, hit):
    """Mean [COLUMNS] of the rows of x [ROWS, COLUMNS] that are hit; x is 0 in the others."""
    return tl.sum(x * (1.0 / tl.sum(hit.to(tl.int32)).to(x.dtype)), 0)  # divides first, so that no sum overflows


@triton.jit
def add_tile(total, square, x, hit, shift, WIDE: tl.constexpr):
    """Add the deviations of the rows that are hit, and their squares, to the sums [COLUMNS]."""
    d = tl.where(hit[:, None], x - shift[None, :], 0.0)
    if WIDE:
        d = d.to(tl.float64)
    return total + tl.sum(d, 0).to(tl.float64), square + tl.sum(d * d, 0).to(tl.float64)


@triton.jit
def store_moments(means, m2s, at, inside, inverse, shift, total, square):
    """Finish and store the mean and M2 of 1 / inverse rows of one group in one chunk."""
    offset = total * inverse
    within = square - total * offset
    within = tl.where(within < 0, 0.0, within)  # rounding of a constant channel; NaN passes through
    tl.store(means + at, shift.to(tl.float64) + offset, inside)
    tl.store(m2s + at, within, inside)


@triton.jit(do_not_specialize=["chunks"])
def _merge_chunks_kernel(
    # data ptrs
    counts,
    means,
    m2s,
    count,
    mean,
    m2,
    # shapes
    chunks,
    channels,
    # constexpr
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge means and m2s [groups, chunks, channels] of counts [groups, 1 + chunks] rows into the state."""
    g = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    counts += g * (1 + chunks)
    before = tl.load(counts)
    total = before
    state_mean = tl.load(mean + g * channels + channel, inside, 0.0)
    state_m2 = tl.load(m2 + g * channels + channel, inside, 0.0)
    for first in range(0, chunks, CHUNKS):
        chunk = (first + tl.arange(0, CHUNKS))[:, None]
        n = tl.load(counts + 1 + chunk, chunk < chunks, 0)
        at = (g * chunks + chunk) * channels + channel[None, :]
        filled = n > 0
        chunk_mean = tl.load(means + at, filled & inside[None, :], 0.0)
        chunk_m2 = tl.load(m2s + at, filled & inside[None, :], 0.0)
        new = tl.sum(tl.sum(n, 1), 0)
        weight, inverse = n.to(tl.float64), 1.0 / tl.maximum(new, 1).to(tl.float64)
        pivot = tl.sum(weight * chunk_mean, 0) * inverse
        d = tl.where(filled, chunk_mean - pivot[None, :], 0.0)
        new_mean = pivot + tl.sum(weight * d, 0) * inverse  # what the pivot lost in rounding
        new_m2 = tl.sum(chunk_m2 + weight * d * d, 0)
        if new > 0:
            delta = new_mean - state_mean
            share = new.to(tl.float64) / (total + new).to(tl.float64)
            state_mean += delta * share
            state_m2 += new_m2 + delta * delta * (total.to(tl.float64) * share)
            total += new
    if total > before:
        tl.store(mean + g * channels + channel, state_mean, inside)
        tl.store(m2 + g * channels + channel, state_m2, inside)
        if tl.program_id(0) == 0:
            tl.store(count + g, total)


def merge_rows(launch: Callable[..., None], x: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """Take the moments of all chunks and merge them into the state, a few groups at a time.

    Args:
        launch: Runs an op's kernel; takes the grid, the tensors (count, counts, means, m2s), the sizes (blocks, chunks,
            first, groups) and the constants of a chunk.
        x: [N, H]: a tensor like the rows.
        count: [G] int64.
        mean: [G, H] float64.
        m2: [G, H] float64.
    """
    rows, channels = x.shape
    if rows == 0:
        return
    columns = COLUMNS[x.element_size()]
    blocks = max(1, triton.cdiv(channels, columns))  # without channels there still are rows to count
    chunk = next((c for c in CHUNKS if triton.cdiv(rows, c) * blocks >= ENOUGH_PROGRAMS), CHUNKS[-1])
    chunks = triton.cdiv(rows, chunk)
    at_once = min(GROUPS_AT_ONCE, count.numel())
    counts = count.new_empty(at_once, 1 + chunks)
    means, m2s = mean.new_empty(2, at_once, chunks, channels)
    merges = max(1, triton.cdiv(channels, MERGE["COLUMNS"]))
    constants = {"CHUNK": chunk, "COLUMNS": columns}
    with torch.cuda.device_of(x):
        for first in range(0, count.numel(), at_once):
            state = [tensor[first : first + at_once] for tensor in (count, mean, m2)]
            sizes = (blocks, chunks, first, len(state[0]))
            launch((blocks * chunks,), (state[0], counts, means, m2s), sizes, constants)
            _merge_chunks_kernel[merges, len(state[0])](
                counts, means, m2s, *state, chunks, channels, **MERGE, **MERGE_OPTIONS
            )


def compiled(
    kernel: JITFunction, pointers: Sequence[str], strides: Sequence[str], options: dict[str, Any], **flags: Any
) -> list[Any]:
    """What users run of an op's kernel, for each dtype: long rows, at 16-byte addresses."""
    rest = {"group": "*i8:16", "count": "*i64:16", "counts": "*i64:16", "means": "*fp64:16", "m2s": "*fp64:16"}
    rest |= dict.fromkeys(strides, "i64:16") | {"rows": "i32:16", "channels": "i32:16"} | dict.fromkeys(SIZES, "i32")
    constants = {"CHUNK": CHUNKS[0]} | flags
    return [
        (kernel, dict.fromkeys(pointers, f"*{dtype}:16") | rest, constants | {"COLUMNS": COLUMNS[size]}, options)
        for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4), ("fp64", 8))
    ]


_MERGED = {"counts": "*i64:16", "means": "*fp64:16", "m2s": "*fp64:16", "count": "*i64:16", "mean": "*fp64:16"}
COMPILED = [
    (_merge_chunks_kernel, _MERGED | {"m2": "*fp64:16", "chunks": "i32", "channels": "i32:16"}, MERGE, MERGE_OPTIONS)
]
