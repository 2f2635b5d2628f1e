"""The Triton kernels: one file per op. Arguments were checked in ops.py.

With TRITON_INTERPRET=1 Triton interprets the kernels, slowly, and they also take CPU tensors where this backend is
asked for by name: so the tests need no GPU.
"""

try:
    from triton import knobs
except ImportError:
    raise ImportError("triton is not installed; install it with pip install triton (Linux only)") from None

from ssah_fast.kernels.triton.channel_moments import channel_moments_
from ssah_fast.kernels.triton.column_norms import column_norms
from ssah_fast.kernels.triton.gated_moments import gated_moments_
from ssah_fast.kernels.triton.masked_adamw import masked_adamw_
from ssah_fast.kernels.triton.perturb import direction_scales, perturb_

DEVICES = ("cuda", "cpu") if knobs.runtime.interpret else ("cuda",)

OPS = {
    "channel_moments_": channel_moments_,
    "gated_moments_": gated_moments_,
    "column_norms": column_norms,
    "masked_adamw_": masked_adamw_,
    "perturb_": perturb_,
    "direction_scales": direction_scales,
}
