"""Units with random categories for the tiny models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ssah_fast.masks import Mask
from ssah_fast.partition import Category, Units
from ssah_fast.units import find_units


def tiny_units(model: nn.Module, attention_unit: str = "channel", seed: int = 0) -> Units:
    """Every category but UNOBSERVED about equally often, and a random I_S; the same arguments give the same units."""
    generator = torch.Generator().manual_seed(seed)
    layouts = {layout.name: layout for layout in find_units(model, attention_unit)}
    category = {
        name: torch.randint(Category.RU, Category.SCU + 1, (layout.units,), generator=generator).to(torch.int8)
        for name, layout in layouts.items()
    }
    safety = {
        name: torch.rand(layout.units, generator=generator, dtype=torch.float64) for name, layout in layouts.items()
    }
    provenance = {"scores": {"model": {"id": "tiny"}}}
    return Units(category, layouts, {}, provenance, {}, {}, safety)


def frozen_elements(mask: Mask, name: str, shape: Sequence[int]) -> torch.Tensor:
    """True where a mask freezes an element of a parameter, bool of its shape."""
    region = mask.get(name)
    if region is None:
        return torch.zeros(shape, dtype=torch.bool)
    kept = {region.axis, 0} if region.stacked else {region.axis}
    lines = region.as_bool(region.indices_of(shape))
    return lines.view([n if i in kept else 1 for i, n in enumerate(shape)]).expand(shape).clone()
