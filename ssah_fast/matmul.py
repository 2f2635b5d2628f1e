"""Matrix products as torch has them, except where torch emulates bf16.

On an x86 CPU without bf16 matrix instructions torch multiplies bf16 matrices at a quarter of its fp32 rate. There the
factors are cast to fp32 block by block and the result is rounded: bf16 factors multiply exactly in fp32, so only the
order of the sums differs. The casts go into buffers that each thread keeps, because a fresh tensor of this size costs
more than the cast itself (a [5632, 2048] weight, 2 threads: 15 ms against 3 ms, beside a product of 46 ms on 512 rows).
"""

import functools
import math
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of a weight that are cast at a time: 16 MiB in fp32, which stays in a large cache. Of 2 to 64 MiB, products
# with 512 rows were up to 2 times slower below 8 MiB and equal above (48 MiB of L3 cache, 2 threads).
_WEIGHT_BLOCK = 4 << 20
# Elements of an activation that are cast at a time, which bounds what the buffers keep: 64 MiB each.
_ROWS_BLOCK = 16 << 20


@functools.cache
def emulates_bf16() -> bool:
    """Whether this CPU has no bf16 matrix instructions: there, torch multiplies bf16 at a quarter of its fp32 rate."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("architecture") == "x86_64" and not (
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = True) -> Tensor:
    """Multiply rows with a weight, without recording a gradient.

    Args:
        x: [..., in].
        weight: [out, in] (transposed, as nn.Linear stores it) or [in, out]; rounded to x's dtype if it has another.
        bias: [out], in x's dtype.
        transposed: Which of the two.

    Returns:
        x @ weight.T + bias or x @ weight + bias, [..., out], in x's dtype.
    """
    if not _emulated(x):
        weight = weight.to(x.dtype)
        if transposed:
            return F.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        product = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        return product.view(*x.shape[:-1], weight.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(len(rows), weight.shape[0 if transposed else 1], dtype=x.dtype)
    step = max(1, _ROWS_BLOCK // max(1, *weight.shape))
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        (_times_transposed if transposed else _times)(rows[piece], weight, bias, out[piece])
    return out.view(*x.shape[:-1], out.shape[1])


def weight_gradient(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the outer products of rows.

    Args:
        a: [rows, m].
        b: [rows, n], in a's dtype.
        dtype: Of the result; float32 for bf16 factors saves a rounding where bf16 is emulated.

    Returns:
        a.T @ b, [m, n].
    """
    if not _emulated(a):
        return (a.t() @ b).to(dtype)
    shape = (a.shape[1], b.shape[1])
    wide = a.new_empty(shape, dtype=dtype) if dtype == torch.float32 else _buffer("product", shape)
    step = max(1, _ROWS_BLOCK // max(1, *shape))
    for start in range(0, len(a), step):
        left, right = (_widen(slot, t[start : start + step]) for slot, t in (("a", a), ("b", b)))
        torch.addmm(wide, left.t(), right, beta=int(start > 0), out=wide)
    return wide.to(dtype)


def buffer_bytes(rows: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Bytes of the buffers that `linear` keeps where bf16 is emulated, once it has multiplied with all these weights.

    Args:
        rows: Of x.
        shapes: [out, in] of each weight.
    """
    wide = weight = product = 0
    for outputs, inputs in shapes:
        piece = min(rows, max(1, _ROWS_BLOCK // max(1, outputs, inputs)))
        block = min(outputs, max(1, _WEIGHT_BLOCK // max(1, inputs)))
        wide, weight, product = max(wide, piece * inputs), max(weight, block * inputs), max(product, piece * block)
    return 4 * (wide + weight + product)


def _emulated(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.numel() == 0:
        return False
    # A compiler plans its own buffers, and would take these for constants.
    return not torch.compiler.is_compiling() and emulates_bf16()


class _Buffers(threading.local):
    """One flat fp32 buffer per purpose and thread."""

    def __init__(self) -> None:
        self.flat: dict[str, Tensor] = {}


_BUFFERS = _Buffers()


def _buffer(slot: str, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape)
    kept = _BUFFERS.flat.get(slot)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # or it could not be written outside of that mode
            kept = _BUFFERS.flat[slot] = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept[:size].view(shape)


def _widen(slot: str, values: Tensor) -> Tensor:
    """Values in fp32, rounded to bf16 before if they are wider."""
    return _buffer(slot, tuple(values.shape)).copy_(values.to(torch.bfloat16))


def _blocks(weight: Tensor) -> list[slice]:
    step = max(1, _WEIGHT_BLOCK // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    wide = _widen("x", x)
    for block in _blocks(weight):
        factor = _widen("weight", weight[block])
        product = torch.mm(wide, factor.t(), out=_buffer("product", (len(x), len(factor))))
        out[:, block] = product if bias is None else product.add_(bias[block])


def _times(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    wide, product = _widen("x", x), _buffer("product", (len(x), weight.shape[1]))
    for number, block in enumerate(_blocks(weight)):
        factor = _widen("weight", weight[block])
        torch.addmm(product, wide[:, block], factor, beta=int(number > 0), out=product)
    out.copy_(product if bias is None else product.add_(bias))
