"""What a routed expert's down projection reads, written out apart from the package and from transformers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def expert_input(
    module: nn.Module, expert: int, hidden: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `hidden` [rows, H] that `index` [rows, k] routes to an expert, and what its down_proj reads there."""
    rows = (index == expert).any(1).nonzero().squeeze(1)
    if hasattr(module, "limit"):  # gpt-oss: transposed, biased, gate and up in turn
        both = hidden[rows] @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[:, 0::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
        return rows, (up + 1) * (gate * torch.sigmoid(gate * module.alpha))
    gate, up = F.linear(hidden[rows], module.gate_up_proj[expert]).chunk(2, 1)
    return rows, F.silu(gate) * up


def experts_output(module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the whole module returns; `weights` [rows, k]."""
    out = torch.zeros_like(hidden)
    for expert in range(len(module.down_proj)):
        rows, h = expert_input(module, expert, hidden, index)
        down = module.down_proj[expert]
        y = h @ down + module.down_proj_bias[expert] if hasattr(module, "limit") else F.linear(h, down)
        out[rows] += (y * weights[rows][index[rows] == expert].unsqueeze(1)).to(out.dtype)
    return out
