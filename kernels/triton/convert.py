"""Conversions between the tensors' dtypes and the computing type, the same on a device and in the interpreter."""

import triton
import triton.language as tl
from triton import knobs

# triton 3.6's and 3.9's interpreters truncate float32 to bfloat16 and lose bfloat16's subnormal numbers; there the
# conversions go through the bits. A device has one instruction for them.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def widen(x):
    """Return x in its computing type: float32, or float64 for float64. Exact."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round x from its computing type to the nearest number of a dtype, ties to even."""
    if dtype == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
