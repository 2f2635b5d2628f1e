"""Steps along random directions: the formula stands in ops.perturb_, the arithmetic in kernels/reference.py.

A program works on one block of consecutive elements and draws every direction for it, in one pass over the tensor.
Nothing is fused (enable_fp_fusion=False) but what is written fma: the same bits as the reference.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssah_fast.kernels import reference
from ssah_fast.kernels.reference import MASK32, MASK64, splitmix64
from ssah_fast.kernels.triton.convert import INTERPRETED, narrow, widen
from ssah_fast.kernels.triton.random import random_bits

# Of 128 threads with 8 elements each, 16 bytes of 16-bit data: not measured yet.
BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# As float32: the interpreter computes in float64.
LOGARITHM, SINE, COSINE = (
    tl.constexpr(tuple(torch.tensor(c).tolist())) for c in (reference.LOGARITHM, reference.SINE, reference.COSINE)
)
MINUS_TWO_LN_2 = tl.constexpr(reference.MINUS_TWO_LN_2)


@triton.jit
def _fma(x, y, z):
    """One rounding of x * y + z; triton 3.6's interpreter rounds to float32 twice, here first to float64."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.math.fma(x, y, z)


@triton.jit
def _polynomial(x, coefficients: tl.constexpr, DEGREE: tl.constexpr):
    """As reference.polynomial."""
    value = _fma(x, coefficients[0], tl.full(x.shape, coefficients[1], tl.float32))
    for i in tl.static_range(2, DEGREE + 1):
        value = _fma(x, value, coefficients[i])
    return value


@triton.jit
def _square_root(x):
    """Correctly rounded for normal numbers; tl.math.sqrt_rn would test for others and branch."""
    inverse = tl.math.rsqrt(x)
    root = x * inverse
    return _fma(_fma(-root, root, x), inverse * 0.5, root)


@triton.jit
def _normal_pairs(pair, key):
    """Two standard normal numbers for each uint32 pair, as reference.normals."""
    x = random_bits(pair, key)
    signed = ((x * 0x9E3779B9) | 1).to(tl.int32, bitcast=True).to(tl.float32).to(tl.uint32, bitcast=True)
    size = signed & 0x7FFFFFFF
    exponent = (size - 0x4EB504F3) & 0xFF800000
    f = (size - exponent - 0x0F800000).to(tl.float32, bitcast=True) - (1 + 2**-23)
    whole = exponent.to(tl.int32, bitcast=True).to(tl.float32)
    radius = _square_root(_fma(whole, MINUS_TWO_LN_2, f * _polynomial(f, LOGARITHM, 6)))
    t = ((x >> 9) | 0x3F800001).to(tl.float32, bitcast=True) - 1.5
    s, c = _polynomial(t * t, SINE, 3), _polynomial(t * t, COSINE, 4)
    c = (c.to(tl.uint32, bitcast=True) ^ (signed & 0x80000000)).to(tl.float32, bitcast=True)
    return radius * c, radius * (s * t)


@triton.jit
def _add(total, factor, noise):
    if total.dtype == tl.float64:
        return total + factor * noise.to(tl.float64)
    else:
        return _fma(noise, factor, total)


@triton.jit
def _elements(count, LEAD: tl.constexpr, BLOCK: tl.constexpr):
    """This program's elements, and whether they exist; an odd position comes first where LEAD is 1."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) - LEAD
    return i, (i >= 0) & (i < count)


@triton.jit
def _halves(x, BLOCK: tl.constexpr):
    """Split into the elements at even positions and those at odd ones."""
    return tl.split(tl.reshape(x, [BLOCK // 2, 2]))


@triton.jit
def _pairs(first, BLOCK: tl.constexpr):
    """The lower halves of this program's pairs, each in the thread that has its elements."""
    even, _ = _halves(tl.arange(0, BLOCK), BLOCK)
    return (first + tl.program_id(0).to(tl.int64) * (BLOCK // 2)).to(tl.uint32) + (even // 2).to(tl.uint32)


@triton.jit(do_not_specialize=["first"])
def _perturb_kernel(
    # data ptrs
    out,
    base,
    keys,
    factors,
    # shapes
    count: tl.int64,
    directions,
    # scalars
    first: tl.int64,
    # constexpr
    LEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements of one segment, whose pairs start at `first` and share their keys."""
    i, inside = _elements(count, LEAD, BLOCK)
    even, odd = _halves(widen(tl.load(base + i, inside, 0.0)), BLOCK)
    pair = _pairs(first, BLOCK)
    for k in range(directions):
        factor = tl.load(factors + k)
        noise_even, noise_odd = _normal_pairs(pair, tl.load(keys + k).to(tl.uint64, bitcast=True))
        even = _add(even, factor, noise_even)
        odd = _add(odd, factor, noise_odd)
    tl.store(out + i, narrow(tl.interleave(even, odd), out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["first"])
def _squares_kernel(
    # data ptrs
    squares,
    base,
    keys,
    # shapes
    count: tl.int64,
    directions,
    # scalars
    first: tl.int64,
    # constexpr
    LEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store in squares [programs, 1 + directions] the sums of the tensor's squares and of each direction's."""
    i, inside = _elements(count, LEAD, BLOCK)
    squares += tl.program_id(0).to(tl.int64) * (1 + directions)
    x = widen(tl.load(base + i, inside, 0.0)).to(tl.float64)
    tl.store(squares, tl.sum(x * x))
    even_inside, odd_inside = _halves(inside, BLOCK)
    pair = _pairs(first, BLOCK)
    for k in range(directions):
        even, odd = _normal_pairs(pair, tl.load(keys + k).to(tl.uint64, bitcast=True))
        even = tl.where(even_inside, even, 0.0).to(tl.float64)
        odd = tl.where(odd_inside, odd, 0.0).to(tl.float64)
        tl.store(squares + 1 + k, tl.sum(even * even + odd * odd))


def _segments(count: int, offset: int) -> Iterator[tuple[slice, int, int]]:
    """Cut a tensor where the pairs' keys change, every 2^33 positions: (elements, first pair, 1 after an odd start)."""
    end = offset + count
    for start in (offset, *range(-(-(offset + 1) // 2**33) * 2**33, end, 2**33)):
        stop = min(end, (start // 2**33 + 1) * 2**33)
        yield slice(start - offset, stop - offset), start >> 1, start & 1


def _keys(directions: Sequence[int], id: int, first: int, device: torch.device) -> Tensor:
    """The keys of a segment's directions: int64 [directions], copied without waiting for the device."""
    keys = []
    for seed in directions:
        stem = splitmix64(splitmix64(splitmix64(seed & MASK64) ^ reference.DIRECTION) ^ (id & MASK64))
        keys.append((splitmix64(stem ^ (first >> 32)) + 2**63) % 2**64 - 2**63)
    return torch.tensor(keys, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def perturb_(out: Tensor, base: Tensor, directions: Sequence[int], factors: Tensor, id: int, offset: int) -> None:
    """See ops.perturb_."""
    factors = factors.to(torch.promote_types(base.dtype, torch.float32))
    with torch.cuda.device_of(base):
        for part, first, lead in _segments(base.numel(), offset):
            target, source = out.view(-1)[part], base.view(-1)[part]
            keys = _keys(directions, id, first, base.device)
            _perturb_kernel[(triton.cdiv(lead + len(source), BLOCK),)](
                *(target, source, keys, factors, len(source), len(directions), first & MASK32),
                LEAD=lead,
                BLOCK=BLOCK,
                **OPTIONS,
            )


def direction_scales(base: Tensor, directions: Sequence[int], id: int, offset: int) -> Tensor:
    """See ops.direction_scales."""
    squares = torch.zeros(1 + len(directions), dtype=torch.float64, device=base.device)
    with torch.cuda.device_of(base):
        for part, first, lead in _segments(base.numel(), offset):
            source = base.view(-1)[part]
            programs = triton.cdiv(lead + len(source), BLOCK)
            sums = squares.new_empty(programs, len(squares))
            keys = _keys(directions, id, first, base.device)
            _squares_kernel[(programs,)](
                *(sums, source, keys, len(source), len(directions), first & MASK32), LEAD=lead, BLOCK=BLOCK, **OPTIONS
            )
            squares += sums.sum(0)
    return (squares[0] / squares[1:]).sqrt()


def _compiled(
    dtype: str, lead: int = 0, one: bool = True
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    factors = "*fp64:16" if dtype == "fp64" else "*fp32:16"
    signature = {"out": f"*{dtype}:16", "base": f"*{dtype}:16", "keys": "*i64:16", "factors": factors}
    signature |= {"count": "i64:16", "first": "i64"} | ({} if one else {"directions": "i32"})
    return _perturb_kernel, signature, ({"directions": 1} if one else {}) | {"LEAD": lead, "BLOCK": BLOCK}, OPTIONS


# What users run, for tests/test_compiled.py: kernel, signature, constexprs, options.
COMPILED = [
    *(_compiled(dtype) for dtype in ("fp32", "bf16", "fp16", "fp64")),
    _compiled("bf16", one=False),
    _compiled("bf16", lead=1),
    *(
        (
            _squares_kernel,
            {"squares": "*fp64:16", "base": f"*{dtype}:16", "keys": "*i64:16", "count": "i64:16"}
            | {"directions": "i32", "first": "i64"},
            {"LEAD": 0, "BLOCK": BLOCK},
            OPTIONS,
        )
        for dtype in ("fp32", "bf16", "fp16", "fp64")
    ),
]
