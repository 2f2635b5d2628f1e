"""Every op in plain torch: the specification that each backend is compared with."""

import math
from collections.abc import Sequence
from typing import Any

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


def power(base: float, exponent: int) -> float:
    """base^exponent by squaring, from the lowest bit of the exponent on: the same bits wherever it is computed."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


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
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    rounding: str,
    seed: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    cache: dict[str, Any],
) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on one region of each weight.

    Every operation is rounded once to float32 (float64 for float64 weights), in the order written here and with none of
    them fused: the kernels give the same bits. (In float64 only nearly, as torch's square root is not exact there.) The
    host reads the scalars, so that on a GPU every call waits.
    """
    lr = float(lr)
    if lr == 0 or (found_inf is not None and bool(found_inf != 0)):
        return
    for weight, grad, m, v, step, axis, index, v_max, extra, copy, id, offset in zip(
        *(weights, grads, exp_avgs, exp_avg_sqs, steps, axes, indices, max_exp_avg_sqs, extras, copies, ids, offsets),
        strict=True,
    ):
        step += 1
        t = int(step)
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
        delta = m * (lr / (1 - power(beta1, t))) / (root * (1 / math.sqrt(1 - power(beta2, t))) + eps)

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
                bits = random_bits(seed, t, id, offset, w.numel(), w.device)
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


DIRECTION = 1 << 63  # in the place of random_bits' step, which never gets there: keeps the two kinds of noise apart
PIECE = 1 << 20  # elements of a direction made at once: each needs some 100 bytes on the way


def fused(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Return a * b + c of float32 numbers, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd (an inexact one becomes that neighbour whose last
    bit is 1), so that rounding it again, to float32, gives what rounding the exact sum would (Boldo & Melquiond 2008).
    """
    product = a.double() * b
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)  # Knuth's exact remainder
    bits, too_large = total.view(torch.int64), (lost > 0) != (total > 0)
    odd = torch.where(lost.abs() > 0, bits - too_large.long() | 1, bits)  # not where the remainder is NaN, of Inf
    return odd.view(torch.float64).float()


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluate a polynomial in float32 by Horner's rule with fused multiply-adds, from the highest coefficient on."""
    first, *rest = torch.tensor(coefficients).tolist()  # as float32
    value = torch.full_like(x, first)
    for coefficient in rest:
        value = fused(x, value, coefficient)
    return value


# csrc/common/normal.inl tells where they come from: -2 ln(1 + f) / f, sin(pi t) / t and cos(pi t) in t^2.
LOGARITHM = (-0.23792218, 0.37335715, -0.40992660, 0.49819487, -0.66629016, 1.00002229, -2.00000191)
SINE = (-0.55463618, 2.5418990, -5.1671429, 3.1415820)
COSINE = (0.21969679, -1.3318802, 4.0584121, -4.9347930, 0.99999994)
MINUS_TWO_LN_2 = -1.3862943649291992 * 2**-23  # for an exponent in its place in a float32


def normals(seed: int, id: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Return a direction's elements at positions offset, ..., offset + count - 1: float32 [count], standard normal.

    Positions 2p and 2p + 1 are sqrt(-2 ln u) (cos(pi t), sin(pi t)), t in (-1/2, 1/2), the cosine with a random sign
    (Box & Muller 1958). t comes from the random bits x of p and u from 2^32 / phi x, phi the golden ratio: over all x
    the points (t, u) form the Fibonacci lattice, the most even one in the plane. The functions are polynomials and
    every operation rounds once, so that all backends give the same bits.
    """
    x = random_bits(seed, DIRECTION, id, offset >> 1, (offset + count + 1 >> 1) - (offset >> 1), device)
    signed = (x * 0x9E3779B9).int().bitwise_or_(1).float()
    size = signed.abs().view(torch.int32)  # u = size / 2^31 = m 2^e, m from sqrt(1/2) to sqrt(2)
    exponent = (size - 0x4EB504F3) & -0x800000
    f = (size - exponent - 0x0F800000).view(torch.float32) - (1 + 2**-23)
    minus_two_ln_u = fused(exponent.float(), MINUS_TWO_LN_2, f * polynomial(f, LOGARITHM))
    radius = minus_two_ln_u.double().sqrt().float()  # torch's own float32 square root is not exact, see masked_adamw_
    t = (x >> 9 | 0x3F800001).int().view(torch.float32) - 1.5
    cosine = polynomial(t * t, COSINE).copysign(signed)
    sine = polynomial(t * t, SINE) * t
    return torch.stack([radius * cosine, radius * sine], 1).view(-1)[offset & 1 :][:count]


def direction_scales(base: Tensor, directions: Sequence[int], id: int, offset: int) -> Tensor:
    """Divide the tensor's norm by each direction's, all sums in float64."""
    squares = torch.zeros(len(directions), dtype=torch.float64, device=base.device)
    for start, piece in zip(range(0, base.numel(), PIECE), base.view(-1).split(PIECE), strict=True):
        for k, seed in enumerate(directions):
            squares[k] += normals(seed, id, offset + start, piece.numel(), base.device).double().square().sum()
    total = sum(piece.double().square().sum() for piece in base.view(-1).split(PIECE))
    return (total / squares).sqrt()


def perturb_(out: Tensor, base: Tensor, directions: Sequence[int], factors: Tensor, id: int, offset: int) -> None:
    """Add the directions one after another in float32, each with one rounding, and round the sum to the dtype.

    Args:
        out: Contiguous; base itself or memory of its own.
        base: Contiguous, out's shape and dtype.
        directions: Seeds.
        factors: float64 [directions], what each direction is multiplied with.
        id: Of the tensor.
        offset: Position of its first element.
    """
    computing = torch.promote_types(base.dtype, torch.float32)
    for start, piece, target in zip(
        range(0, base.numel(), PIECE), base.view(-1).split(PIECE), out.view(-1).split(PIECE), strict=True
    ):
        total = piece.to(computing)
        for seed, factor in zip(directions, factors.to(computing), strict=True):
            direction = normals(seed, id, offset + start, piece.numel(), base.device)
            if computing == torch.float64:
                total = total + factor * direction.double()
            else:
                total = fused(direction, factor, total)
        target.copy_(total)


OPS = {
    "channel_moments_": channel_moments_,
    "gated_moments_": gated_moments_,
    "column_norms": column_norms,
    "masked_adamw_": masked_adamw_,
    "perturb_": perturb_,
    "direction_scales": direction_scales,
}
