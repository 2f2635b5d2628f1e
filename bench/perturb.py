"""Cases of perturb_ and direction_scales, against torch's normal numbers, scaled and added.

Shapes are those of one weight; the last case is a decoder layer, hidden x intermediate size. The alternatives draw one
direction after the other and hold it in memory.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ssah_fast import ops
from ssah_fast.bench.clock import peak_mib, reset_peak
from ssah_fast.bench.harness import (
    COPY,
    DTYPES,
    Alternative,
    Case,
    Extra,
    Plan,
    Request,
    Target,
    accept,
    backends,
    compiled_offer,
    missing_backends,
    ours,
)

SHAPES = {
    "tiny": (128, 96),
    "cpu": (2048, 4096),
    "llama-3-8b": (14336, 4096),
    "qwen3-32b": (25600, 5120),
    "llama-3-70b": (28672, 8192),
}
LAYERS = {"tiny": (64, 96), "cpu": (4096, 11008)}  # the second is Llama-2-7B's: seven matrices, 772 MiB in fp32
NAME = "model.layers.0.mlp.gate_proj.weight"
STEP = 0.1
LAYER_MIB = 1.0  # what a step of a layer may take beside it: no tensor of its size
FLOPS = 2  # per element and direction: one product and one sum; the generator's are not counted


def torch_perturb(out: Tensor, base: Tensor, scales: Tensor) -> None:
    """The same with torch: draw, scale, add."""
    torch.add(base, torch.randn_like(base).mul_(scales[0]), alpha=STEP, out=out)
    for scale in scales[1:]:
        out.add_(torch.randn_like(base).mul_(scale), alpha=STEP)


def _compilable(base: Tensor, scales: Tensor) -> Tensor:
    for scale in scales.unbind():
        base = base + STEP * scale * torch.randn_like(base)
    return base


def perturb_case(request: Request, dtype: str, shape: tuple[int, ...], count: int) -> Case:
    """perturb_ into another tensor, as a walk over a grid of points calls it: the scales are known."""
    base = request.random(shape, DTYPES[dtype], 0)
    out, seeds = torch.empty_like(base), list(range(count))
    scales = ops.direction_scales(base, seeds, name=NAME)
    torch_scales = scales.to(base.dtype)

    def run(i: int) -> None:
        ops.perturb_(out, base, seeds, [STEP] * count, name=NAME, scales=scales)

    offer = compiled_offer(request, "torch_randn", _compilable, lambda f: lambda _: f(base, torch_scales))
    others, absent = accept(request, [offer])
    names = backends("perturb_", request.device) if request.gpu and (dtype, count) == ("bf16", 1) else []
    return Case(
        "perturb_",
        dtype,
        shape,
        f"{count} direction{'s' * (count > 1)}",
        2 * base.nbytes,
        (
            *ours("perturb_", request.device, run),
            Alternative("torch_randn", lambda _: torch_perturb(out, base, torch_scales)),
            *others,
        ),
        [target for name in names for target in (Target(name, 80, COPY), Target(name, 1 / 5, "torch_randn"))],
        flops=FLOPS * count * base.numel(),
        absent={**missing_backends("perturb_", request.device), **absent},
    )


def published_step(weight: Tensor) -> None:
    """A step along a direction of the tensor's norm as the published code makes it: randn, norms, scale, add."""
    direction = torch.randn_like(weight)
    weight.add_(direction.mul_(weight.norm() / direction.norm()), alpha=STEP)


def layer_case(request: Request, size: tuple[int, ...]) -> Case:
    """perturb_ in place on the matrices of a layer, as a landscape moves a model: the scales are known."""
    hidden, intermediate = size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
    shapes |= {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    weights = {name: request.random(shape, torch.float32, seed) for seed, (name, shape) in enumerate(shapes.items())}
    scales = {name: ops.direction_scales(weight, [0], name=name) for name, weight in weights.items()}

    def move(i: int) -> None:
        for name, weight in weights.items():  # there and back, so that weights do not grow from round to round
            ops.perturb_(weight, weight, [0], [STEP * (-1) ** i], name=name, scales=scales[name])

    def published(_: int) -> None:
        for weight in weights.values():
            published_step(weight)

    alternatives = (*ours("perturb_", request.device, move), Alternative("torch_randn", published))

    def memory() -> Iterator[Extra]:
        mib = {}
        for alternative in alternatives:
            before = reset_peak(request.device)
            if before is None:
                return
            alternative.run(0)
            mib[alternative.name] = np.array([peak_mib(request.device) - before])
        targets = [Target(alternative.name, LAYER_MIB) for alternative in alternatives if alternative.ours]
        yield Extra("layer in place, memory beside it", mib, "MiB", 1.0, targets)

    return Case(
        "perturb_",
        "fp32",
        size,
        "layer in place",
        2 * sum(weight.nbytes for weight in weights.values()),
        alternatives,
        () if request.gpu else [Target(backends("perturb_", request.device)[0], 1 / 3, "torch_randn")],
        flops=FLOPS * sum(weight.numel() for weight in weights.values()),
        absent=missing_backends("perturb_", request.device),
        extras=memory,
    )


def scales_case(request: Request, dtype: str, shape: tuple[int, ...], count: int) -> Case:
    """direction_scales: the tensor is read, the directions are drawn and only their norms kept."""
    base = request.random(shape, DTYPES[dtype], 0)
    seeds = list(range(count))

    def norms(_: int) -> None:
        norm = torch.linalg.vector_norm(base, dtype=torch.float32)
        for _ in seeds:
            norm / torch.linalg.vector_norm(torch.randn_like(base), dtype=torch.float32)

    return Case(
        "direction_scales",
        dtype,
        shape,
        f"{count} direction{'s' * (count > 1)}",
        base.nbytes,
        (
            *ours("direction_scales", request.device, lambda _: ops.direction_scales(base, seeds, name=NAME)),
            Alternative("torch_randn", norms),
        ),
        flops=FLOPS * (count + 1) * base.numel(),
        absent=missing_backends("direction_scales", request.device),
    )


def plan(request: Request) -> Plan:
    """Return what makes each case, by label."""
    cases: dict[str, Callable[[], Case]] = {}
    for number, shape in enumerate(request.pick(SHAPES, 2)):
        for op, case, dtype, count in (
            ("perturb_", perturb_case, "bf16", 1),
            ("perturb_", perturb_case, "bf16", 2),
            ("perturb_", perturb_case, "fp16", 1),
            ("perturb_", perturb_case, "fp32", 1),
            ("direction_scales", scales_case, "bf16", 2),
        ):
            if request.takes(dtype) and (number == 0 or dtype == "bf16"):
                label = f"{op} {dtype} {'x'.join(map(str, shape))} {count}"
                cases[label] = partial(case, request.first(number), dtype, shape, count)
    for size in request.pick(LAYERS, 0) if request.takes("fp32") else ():
        cases[f"perturb_ fp32 {'x'.join(map(str, size))} layer"] = partial(layer_case, request, size)
    return cases
