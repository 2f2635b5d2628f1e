"""How far results may lie from their float64 definition: the one table of the op tests.

Where a result is rounded to a low precision, the rule is relative instead: at most TWICE the error that plain torch has
in that precision (flash-attention's rule), so that no number here has to follow the dtype.
"""

import torch

# M2 relative to itself, and the mean relative to the standard deviation. float32 deviations are rounded once and summed
# in float64; 16-bit data is summed in float32 over tiles of 16 rows.
MOMENTS = {torch.float32: 3e-7, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-12}

# Sums of squares in float64 of exactly converted values.
NORMS = 1e-13

# AdamW: moments and weights relative to themselves, over 50 steps too.
ADAMW = {torch.float32: 1e-6, torch.float64: 1e-13}

# Merging in any order, all in float64 (method.md, oracle 5).
MERGE = 1e-9

# Error against float64 over plain torch's own error.
TWICE = 2.0

# act(gate) * up, element by element, against torch's own: the roundings of both operations in units of the dtype's eps.
HIDDEN_EPS = 4.0

# What 1 + erf and 1 + tanh leave where they cancel, in units of the computing type's eps (float32 for 16-bit data);
# torch's own error there reaches 4.
CANCELLED_EPS = 8.0
