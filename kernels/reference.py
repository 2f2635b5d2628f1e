"""Every op in plain torch: the specification that each backend is compared with."""

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


OPS = {"channel_moments_": channel_moments_, "gated_moments_": gated_moments_, "column_norms": column_norms}
