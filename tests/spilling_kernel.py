"""Triton kernels that must not pass tests/test_compiled.py, and one that must."""

import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < size, 0.0), at < size)


@triton.jit
def _scan_kernel(x, out, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value, total = tl.load(x + at), tl.zeros([BLOCK], tl.float32)
    for i in range(size):
        total += value * i
    tl.store(out + at, total + value)


COPY = {"x": "*fp32:16", "out": "*fp32:16", "size": "i32:16"}
ODD = {**COPY, "size": "i32"}  # a size that is no multiple of 16 ends the mask inside of 16 bytes
NARROW = {"x": "*fp32", "out": "*fp32", "size": "i32"}

COMPILED = [
    (_copy_kernel, COPY, {"BLOCK": 1024}, {"num_warps": 4}),
    (_copy_kernel, ODD, {"BLOCK": 1024}, {"num_warps": 4}),
    (_scan_kernel, NARROW, {"BLOCK": 4096}, {"num_warps": 1}),
]
