"""Calls every op on every GPU backend, on small odd shapes: what `bench/device.sh sanitize` runs.

python every_gpu_op.py [cuda|cpu]; cpu is for machines without a GPU: interpreted Triton, emulated CUDA.
"""

import os
import sys

import torch
from torch import Tensor

from ssah_fast import ops
from ssah_fast.kernels import registry

BACKENDS = ("cuda", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run_all(backend: str, device: str) -> list[str]:
    """Call the ops that a backend has, and name them; what is wrong ends in an exception."""
    os.environ[registry.VARIABLE] = backend
    (entry,) = [entry for entry in registry.BACKENDS if entry.name == backend]
    kernels, _, missing = registry.load(entry)
    if missing is not None:
        raise RuntimeError(f"{backend}: {missing}")
    for op in kernels:
        generator = torch.Generator().manual_seed(0)
        for dtype in FLOATS:
            CALLS[op](Maker(generator, dtype, device))
    if device == "cuda":
        torch.cuda.synchronize()
    return sorted(kernels)


class Maker:
    """Makes tensors on the CPU and copies them, so that hardly any kernel but ours runs."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> None:
        self.generator, self.dtype, self.device = generator, dtype, torch.device(device)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype).to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype).to(self.device)

    def rows(self, rows: int, channels: int) -> Tensor:
        """Part of a wider tensor: its rows start at odd addresses."""
        return self.random(rows, channels + 3)[:, 1 : channels + 1]

    def state(self, rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        group = (torch.arange(rows) % 4 - 1).to(torch.int8).to(self.device)
        moments = (self.zeros(3, channels, dtype=torch.float64) for _ in range(2))
        return group, self.zeros(3, dtype=torch.int64), *moments


def channel_moments(make: Maker) -> None:
    for x in (make.random(37, 136), make.rows(19, 29)):
        ops.channel_moments_(x, *make.state(*x.shape))


def gated_moments(make: Maker) -> None:
    for activation in ops.ACTIVATIONS:
        gate, up = make.random(21, 72), make.rows(21, 72)
        ops.gated_moments_(gate, up, *make.state(21, 72), activation, gate)


def column_norms(make: Maker) -> None:
    for axis in (0, 1):
        ops.column_norms(make.random(33, 136), axis)
        ops.column_norms(make.rows(7, 29), axis)


def masked_adamw(make: Maker) -> None:
    index = torch.tensor([0, 3, 4, 6]).to(make.device)
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    for rounding in ops.ROUNDINGS:
        regions = ((0, None), (0, index), (1, index))
        weights = [make.random(9, 40), make.random(9, 40), make.random(9, 7)]
        shapes = [(9, 40), (4, 40), (9, 4)]
        extras = {"kahan": make.dtype, "master": torch.float32}.get(rounding)
        cache: dict = {}
        states = [[make.zeros(*shape, dtype=wide) for shape in shapes] for _ in range(2)]
        steps = [make.zeros(dtype=torch.float32) for _ in weights]
        kept = [] if extras is None else [make.random(*shape, dtype=extras) for shape in shapes]
        for shape_of_grads in ([weight.shape for weight in weights], shapes):
            grads = [make.random(*shape) for shape in shape_of_grads]
            ops.masked_adamw_(
                *(weights, grads, *states, steps, [axis for axis, _ in regions], [index for _, index in regions]),
                **{"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "cache": cache},
                rounding=rounding,
                extras=kept,
            )


def direction_scales(make: Maker) -> None:
    ops.direction_scales(make.random(13, 77), [1, 2, 3], name="w")


def perturb(make: Maker) -> None:
    base = make.random(13, 77)
    for out, offset in ((base, 0), (base.clone(), 5)):
        ops.perturb_(out, base, [1, 2], [0.5, -1.0], name="w", offset=offset)


CALLS = {
    "channel_moments_": channel_moments,
    "gated_moments_": gated_moments,
    "column_norms": column_norms,
    "masked_adamw_": masked_adamw,
    "direction_scales": direction_scales,
    "perturb_": perturb,
}


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    for name in BACKENDS:
        print(f"{name}: {', '.join(run_all(name, place))}")  # noqa: T201
