"""Squared L2 norms of a matrix's columns or rows: norms[j] = sum_i w[i, j]^2, in float64.

The other axis is cut into chunks, whose sums a second kernel adds in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssah_fast.kernels.triton.convert import widen

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
CHUNK = 512  # entries of the summed axis per program: 8 chunks of 4096 rows. Not measured yet
TILE = ({"ROWS": 8, "COLUMNS": 256}, {"ROWS": 16, "COLUMNS": 128})  # by the axis that is kept; 16 bytes per lane
BLOCK = 128


@triton.jit
def _column_norms_kernel(
    # data ptrs
    weight,
    sums,
    # strides
    stride: tl.int64,
    # shapes
    rows,
    columns,
    # constexpr
    AXIS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write sums [chunks, weight.shape[AXIS]]: of the squares in each chunk of the other axis."""
    kept, chunk = tl.program_id(0), tl.program_id(1)
    row = (kept if AXIS == 0 else chunk * (CHUNK // ROWS)) * ROWS + tl.arange(0, ROWS)
    column = (chunk * (CHUNK // COLUMNS) if AXIS == 0 else kept) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for _ in range(CHUNK // (COLUMNS if AXIS == 0 else ROWS)):
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        w = widen(tl.load(weight + row[:, None] * stride + column[None, :], inside, 0.0)).to(tl.float64)
        total += w * w
        if AXIS == 0:
            column += COLUMNS
        else:
            row += ROWS
    if AXIS == 0:
        tl.store(sums + chunk.to(tl.int64) * rows + row, tl.sum(total, 1), row < rows)
    else:
        tl.store(sums + chunk.to(tl.int64) * columns + column, tl.sum(total, 0), column < columns)


@triton.jit(do_not_specialize=["chunks"])
def _add_chunks_kernel(
    # data ptrs
    sums,
    norms,
    # shapes
    chunks,
    size,
    # constexpr
    BLOCK: tl.constexpr,
):
    """Write norms [size]: the sum over the chunks."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for _ in range(chunks):
        total += tl.load(sums + at, at < size, 0.0)
        sums += size
    tl.store(norms + at, total, at < size)


def column_norms(weight: Tensor, axis: int) -> Tensor:
    """See ops.column_norms."""
    kept, summed = weight.shape[axis], weight.shape[1 - axis]
    chunks = max(1, triton.cdiv(summed, CHUNK))
    blocks = triton.cdiv(kept, TILE[axis]["COLUMNS" if axis else "ROWS"])
    sums = weight.new_empty((chunks, kept), dtype=torch.float64)
    if kept == 0:
        return sums[0]
    with torch.cuda.device_of(weight):
        _column_norms_kernel[blocks, chunks](
            weight, sums, weight.stride(0), *weight.shape, AXIS=axis, CHUNK=CHUNK, **TILE[axis], **OPTIONS
        )
        if chunks == 1:
            return sums[0]
        norms = sums.new_empty(kept)
        _add_chunks_kernel[(triton.cdiv(kept, BLOCK),)](sums, norms, chunks, kept, BLOCK=BLOCK, **OPTIONS)
    return norms


_SHAPE = {"rows": "i32:16", "columns": "i32:16"}
COMPILED = [
    (
        _column_norms_kernel,
        {"weight": f"*{dtype}:16", "sums": "*fp64:16", "stride": "i64:16"} | _SHAPE,
        {"AXIS": axis, "CHUNK": CHUNK, **TILE[axis]},
        OPTIONS,
    )
    for dtype in ("bf16", "fp16", "fp32", "fp64")
    for axis in (0, 1)
] + [
    (
        _add_chunks_kernel,
        {"sums": "*fp64:16", "norms": "*fp64:16", "chunks": "i32", "size": "i32:16"},
        {"BLOCK": BLOCK},
        OPTIONS,
    )
]
