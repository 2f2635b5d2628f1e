"""Measures masked_adamw_ against torch.optim.AdamW(fused=True), alone and with what people add to it to freeze rows.

The shape is half a weight of Llama-3-8B's MLP; --rows and --columns change it.

torch keeps bfloat16 moments for bfloat16 weights, ours are float32: what is compared is what users have and get.
"""

from collections.abc import Callable, Sequence
from functools import partial

import harness
import torch
from harness import Alternative, Case, Target
from torch import Tensor

from ssah_fast import ops
from ssah_fast.optim import MaskedAdamW

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LR, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.999), 1e-8, 0.01
SMALL = (300, 256)  # tensors, elements of each


class Problem:
    """One weight with its gradient, and the ways to update it."""

    def __init__(self, dtype: torch.dtype, rows: int, columns: int) -> None:
        """Make the weight and the gradient, and torch's optimizer with its moments."""
        self.weight = torch.nn.Parameter(harness.random((rows, columns), dtype, 0))
        self.weight.grad = harness.random((rows, columns), dtype, 1)
        self.optimizer = torch.optim.AdamW([self.weight], LR, BETAS, EPS, WEIGHT_DECAY, fused=True)

    def some(self, axis: int, fraction: float) -> Tensor:
        """Return a random fraction of the indices along an axis, sorted."""
        size = self.weight.shape[axis]
        generator = torch.Generator().manual_seed(axis)
        return torch.randperm(size, generator=generator)[: round(fraction * size)].sort().values

    def ours(self, name: str, axis: int = 0, index: Tensor | None = None, *, compact: bool = False) -> Alternative:
        """masked_adamw_ on a region; compact: with a gradient that has only the region, as compact layers compute."""
        weight, grad = self.weight.detach(), self.weight.grad
        region = grad if index is None else grad.index_select(axis, index)
        moments = [[torch.zeros(region.shape)] for _ in range(2)]
        step = torch.zeros(())

        def run(_: int) -> None:
            ops.masked_adamw_(
                *([weight], [region if compact else grad], *moments, [step], [axis], [index]),
                **{"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY},
            )

        return Alternative(name, run)

    def fused(self) -> Alternative:
        """Torch on the whole weight."""
        return Alternative("torch_fused", lambda _: self.optimizer.step())

    def index_restore(self, frozen: Tensor) -> Alternative:
        """torch, with the frozen rows' gradients zeroed before the step and their values put back after it."""
        weight, grad, saved = self.weight.detach(), self.weight.grad, self.weight.detach()[frozen]

        def run(_: int) -> None:
            grad[frozen] = 0
            self.optimizer.step()
            weight[frozen] = saved

        return Alternative("index_restore", run)

    def mask_restore(self, frozen: Tensor) -> Alternative:
        """The same with a mask and a copy of the weight's shape, as code for masks of any form has them."""
        weight, grad, saved = self.weight.detach(), self.weight.grad, self.weight.detach().clone()
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask[frozen] = True

        def run(_: int) -> None:
            grad.masked_fill_(mask, 0)
            self.optimizer.step()
            weight.copy_(torch.where(mask, saved, weight))

        return Alternative("mask_restore", run)


def least_bytes(weight: Tensor, fraction: float) -> int:
    """Return what a step must move: weight and moments read and written, the gradient read."""
    return round(weight.numel() * fraction * (3 * weight.element_size() + 4 * 4))


def whole_case(dtype: str, rows: int, columns: int, targets: Sequence[Target]) -> Case:
    """No mask."""
    problem = Problem(DTYPES[dtype], rows, columns)
    return Case(
        "masked_adamw_",
        dtype,
        (rows, columns),
        "no mask",
        least_bytes(problem.weight, 1),
        (problem.ours(harness.backend_of("masked_adamw_")), problem.fused()),
        targets,
    )


def frozen_case(dtype: str, rows: int, columns: int, targets: Sequence[Target]) -> Case:
    """7.5 % of the rows frozen, and beside it of the columns."""
    problem = Problem(DTYPES[dtype], rows, columns)
    frozen = problem.some(0, 0.075)
    backend = harness.backend_of("masked_adamw_")
    return Case(
        "masked_adamw_",
        dtype,
        (rows, columns),
        "7.5 % frozen",
        least_bytes(problem.weight, 0.925),
        (
            problem.ours(backend, 0, problem.some(0, 0.925)),
            problem.ours(f"{backend}_columns", 1, problem.some(1, 0.925)),
            problem.fused(),
            problem.index_restore(frozen),
            problem.mask_restore(frozen),
        ),
        targets,
    )


def trained_case(dtype: str, rows: int, columns: int, targets: Sequence[Target]) -> Case:
    """20 % of the rows trained, and beside it of the columns, from dense and from compact gradients."""
    problem = Problem(DTYPES[dtype], rows, columns)
    backend = harness.backend_of("masked_adamw_")
    by_row, by_column = problem.some(0, 0.2), problem.some(1, 0.2)
    return Case(
        "masked_adamw_",
        dtype,
        (rows, columns),
        "20 % trained",
        least_bytes(problem.weight, 0.2),
        (
            problem.ours(backend, 0, by_row),
            problem.ours(f"{backend}_compact", 0, by_row, compact=True),
            problem.ours(f"{backend}_columns", 1, by_column),
            problem.ours(f"{backend}_columns_compact", 1, by_column, compact=True),
            problem.fused(),
        ),
        targets,
    )


def small_case(targets: Sequence[Target]) -> Case:
    """Many small tensors through the optimizers: what a step costs beside the arithmetic."""
    number, size = SMALL

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(harness.random((size,), torch.float32, i)) for i in range(number)]
        for parameter in made:
            parameter.grad = parameter.detach().clone()
        return made

    ours = MaskedAdamW(parameters(), LR, BETAS, EPS, WEIGHT_DECAY)
    theirs = torch.optim.AdamW(parameters(), LR, BETAS, EPS, WEIGHT_DECAY, fused=True)
    return Case(
        "MaskedAdamW",
        "fp32",
        SMALL,
        "no mask",
        None,
        (
            Alternative(harness.backend_of("masked_adamw_"), lambda _: ours.step()),
            Alternative("torch_fused", lambda _: theirs.step()),
        ),
        targets,
    )


def plan(rows: int, columns: int) -> dict[str, Callable[[], Case]]:
    """Return what makes each case, by label."""
    ours = harness.backend_of("masked_adamw_")

    def restored(bound: float) -> tuple[Target, ...]:
        return Target(ours, bound, "index_restore"), Target(ours, bound, "mask_restore")

    targets = {  # of issue B; columns against rows: how much longer rows take is 1 / 1.5
        "fp32 no mask": (Target(ours, 1 / 0.95, "torch_fused"),),
        "fp32 7.5 % frozen": (*restored(1 / 3), Target(f"{ours}_columns", 1.5, ours)),
        "bf16 7.5 % frozen": (*restored(1 / 2), Target(f"{ours}_columns", 1.5, ours)),
        "fp32 20 % trained": (Target(ours, 1 / 7, "torch_fused"), Target(f"{ours}_columns", 1.5, ours)),
    }
    cases: dict[str, Callable[[], Case]] = {}
    for setting, case in (("no mask", whole_case), ("7.5 % frozen", frozen_case), ("20 % trained", trained_case)):
        for dtype in DTYPES:
            label = f"{dtype} {setting}"
            cases[label] = partial(case, dtype, rows, columns, targets.get(label, ()))
    cases["small"] = partial(small_case, (Target(ours, 1.0, "torch_fused"),))
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, append to results/adamw.csv, and print."""
    parser = harness.parser(__doc__, rounds=15)
    parser.add_argument("--rows", type=int, default=7168, help="default: %(default)s")
    parser.add_argument("--columns", type=int, default=4096, help="default: %(default)s")
    args = harness.parse(parser, argv)
    harness.run("adamw", plan(args.rows, args.columns), args)


if __name__ == "__main__":
    main()
