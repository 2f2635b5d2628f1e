"""Sizes of memory as people write them."""

import re

from ssah_fast.errors import SsahError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{prefix}I": 2 ** (10 * power) for power, prefix in enumerate("KMGT", start=1)}


def parse_size(size: str | int, argument: str = "memory") -> int:
    """Bytes from "1GiB", "512 MiB", "2GB", "1e6" or a number.

    Args:
        size: The size.
        argument: What errors call it.

    Raises:
        SsahError: It is none of these, or not positive.
    """
    found = re.fullmatch(r"([\d.]+(?:[eE]\+?\d+)?)\s*(?:([KMGT]I?)?B?)", str(size).strip(), re.IGNORECASE)
    try:
        number = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise SsahError(f"{argument}={size!r} is not a size; write for example 512MiB or 2GB")
    return number
