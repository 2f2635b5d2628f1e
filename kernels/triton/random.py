"""Random bits from a counter, as reference.random_bits."""

import triton
import triton.language as tl


@triton.jit
def random_bits(position, key):
    """Wellons' triple32 (2018), keyed: 32 random bits for uint32 positions and a uint64 key."""
    x = position ^ key.to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB + (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)
