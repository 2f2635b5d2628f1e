"""Every op in plain torch: the specification that each backend is compared with."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def channel_moments_(x: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """Merge each group's rows into its state, in float64 (Chan, Golub & LeVeque 1979: pairwise update)."""
    for g in range(count.numel()):
        rows = x[group == g].double()
        n, before = rows.shape[0], int(count[g])
        if n == 0:
            continue
        batch_mean = rows.mean(0)
        batch_m2 = (rows - batch_mean).square().sum(0)
        delta = batch_mean - mean[g]
        total = before + n
        mean[g] += delta * (n / total)
        m2[g] += batch_m2 + delta.square() * (before * n / total)
        count[g] = total


def gated_moments_(
    gate: Tensor, up: Tensor, group: Tensor, count: Tensor, mean: Tensor, m2: Tensor, activation: str, out: Tensor
) -> None:
    """Write act(gate) * up to out, each of the two operations rounded to the tensors' dtype, and merge its moments."""
    torch.mul(ACTIVATIONS[activation](gate), up, out=out)
    channel_moments_(out, group, count, mean, m2)


def column_norms(weight: Tensor, axis: int) -> Tensor:
    """Sum the squares over the other axis, in float64."""
    return weight.double().square().sum(1 - axis)


MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def splitmix64(x: int) -> int:
    """Mix 64 bits (Steele, Lea & Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def random_bits(seed: int, step: int, id: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Return the 32 random bits of the positions offset, ..., offset + count - 1: int64 [count].

    A permutation of 32-bit words (Wellons 2018: "triple32") keyed by a hash of (seed, step, id, position >> 32): the
    bits depend on nothing but those three and the position, in whatever order and pieces the positions come.
    """
    stem = splitmix64(splitmix64(splitmix64(seed & MASK64) ^ step) ^ (id & MASK64))
    pieces = []
    for high in range(offset >> 32, (offset + count - 1 >> 32) + 1):
        key = splitmix64(stem ^ high)
        first, last = max(offset, high << 32), min(offset + count, (high + 1) << 32)
        x = (torch.arange(first, last, device=device) & MASK32) ^ (key & MASK32)
        x = ((x ^ (x >> 17)) * 0xED5AD4BB + (key >> 32)) & MASK32
        x = ((x ^ (x >> 11)) * 0xAC4C1B51) & MASK32
        x = ((x ^ (x >> 15)) * 0x31848BAB) & MASK32
        pieces.append(x ^ (x >> 14))
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device=device)


def round_stochastic(w: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to one of its two neighbours in bfloat16 or float16, with probabilities that keep the mean.

    Args:
        w: float32.
        bits: [w.numel()] int64 from random_bits.
        dtype: bfloat16 or float16. Inf and NaN stay what they are.
    """
    bits = bits.view(w.shape)
    kept = 16 if dtype == torch.bfloat16 else 13  # low bits of float32 that the result has no room for
    raised = w.view(torch.int32) + (bits & (1 << kept) - 1).int() & -(1 << kept)
    rounded = torch.where(w.isfinite(), raised.view(torch.float32), w)
    if dtype == torch.float16:  # its subnormal numbers are the multiples of 2^-24
        q = w.abs() * 2.0**24
        small = (q.floor() + (q.frac() > (bits >> 8) * 2.0**-24)) * 2.0**-24
        rounded = torch.where(w.abs() < 2.0**-14, small.copysign(w), rounded)
    return rounded.to(dtype)


def masked_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor | None],
    max_exp_avg_sqs: Sequence[Tensor | None],
    extras: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    ids: Sequence[int],
    offsets: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    rounding: str,
    seed: int,
    grad_scale: Tensor | None,
) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on one region of each weight.

    Every operation is rounded once to float32 (float64 for float64 weights), in the order written here and with none of
    them fused: the kernels give the same bits. (In float64 only nearly, as torch's square root is not exact there.)
    """
    for weight, grad, m, v, step, axis, index, v_max, extra, copy, id, offset in zip(
        *(weights, grads, exp_avgs, exp_avg_sqs, steps, axes, indices, max_exp_avg_sqs, extras, copies, ids, offsets),
        strict=True,
    ):
        step += 1
        t = float(step)
        region = weight if index is None else weight.index_select(axis, index)
        if index is not None and grad.shape == weight.shape:
            grad = grad.index_select(axis, index)
        g = grad.to(m.dtype)
        if grad_scale is not None:
            g = g / grad_scale.to(g.dtype)
        if maximize:
            g = -g
        m += (g - m) * (1 - beta1)
        v.mul_(beta2).add_(g * (1 - beta2) * g)
        if v_max is not None:
            torch.maximum(v_max, v, out=v_max)
        # Through float64: torch's own float32 square root (MKL) is off by one rounding in 0.6 % of cases.
        root = (v if v_max is None else v_max).double().sqrt().to(v.dtype)
        delta = m * (lr / (1 - beta1**t)) / (root * (1 / math.sqrt(1 - beta2**t)) + eps)

        narrow = weight.dtype in (torch.bfloat16, torch.float16)
        master = next((x for x in (copy, extra) if narrow and x is not None and x.dtype == torch.float32), None)
        source = copy if copy is not None else region
        w = (source if master is None else master).to(m.dtype)
        if master is None and narrow and rounding == "kahan":
            change = w * (-lr * weight_decay) - delta + extra
            new = (w + change).to(weight.dtype)
            extra.copy_(change - (new.float() - w))
        else:
            w = w * (1 - lr * weight_decay) - delta
            if master is None and narrow and rounding == "stochastic":
                bits = random_bits(seed, int(t), id, offset, w.numel(), w.device)
                new = round_stochastic(w, bits, weight.dtype)
            else:
                new = w.to(weight.dtype)
            if master is not None:
                master.copy_(w)
        if copy is not None and copy is not master:
            copy.copy_(new)
        if index is None:
            weight.copy_(new)
        else:
            weight.index_copy_(axis, index, new)


OPS = {
    "channel_moments_": channel_moments_,
    "gated_moments_": gated_moments_,
    "column_norms": column_norms,
    "masked_adamw_": masked_adamw_,
}
