"""Measures channel_moments_, gated_moments_ and column_norms against what torch offers for the same job.

The shape is that of 4,096 tokens in Llama-3-8B's down_proj; --rows and --channels change it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import harness
import torch
import torch.nn.functional as F
from harness import Alternative, Case, Target
from torch import Tensor

from ssah_fast import ops

GROUPS = 4  # two sets of two halves, as scoring keeps them
BUFFERS = 2  # inputs in rotation
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATE_BYTES = 2 * 2 * 8  # per group and channel: mean and M2 in float64, read and written

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def state(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return count [G], mean and m2 [G, channels], all zero."""
    count = torch.zeros(GROUPS, dtype=torch.int64)
    return count, *(torch.zeros(GROUPS, channels, dtype=torch.float64) for _ in range(2))


def one_group(rows: int) -> Tensor:
    """Return group ids [rows]: every row counts, all in one group."""
    return torch.zeros(rows, dtype=torch.int8)


def sequences(rows: int) -> Tensor:
    """Return group ids [rows] as scoring has them: sequences of 256 to 512 rows, of which the prompt's do not count.

    The prompt is a fifth to a half of each.
    """
    generator = torch.Generator().manual_seed(1)
    group = torch.full((rows,), -1, dtype=torch.int8)
    start = which = 0
    while start < rows:
        length = int(torch.randint(256, 513, (), generator=generator))
        prompt = int(length * (0.2 + 0.3 * torch.rand((), generator=generator)))
        group[start + prompt : start + length] = which % GROUPS
        start, which = start + length, which + 1
    return group


def flap_arithmetic(x: Tensor, group: Tensor | None = None) -> None:
    """Do FLAP's arithmetic (arXiv 2312.11983, lib/layerwrapper.py): mean, then the summed products of deviations."""
    for rows in (x,) if group is None else (x[group == g] for g in range(GROUPS)):
        values = rows.float()
        mean = values.mean(0)
        ((values - mean) * (values - mean)).sum(0)


def var_mean(x: Tensor, group: Tensor | None = None) -> None:
    """The same with torch.var_mean."""
    for rows in (x,) if group is None else (x[group == g] for g in range(GROUPS)):
        torch.var_mean(rows.float(), 0)


def moments_case(dtype: str, rows: int, channels: int, setting: str, targets: Sequence[Target]) -> Case:
    """channel_moments_ over all rows in one group or over realistic groups; the alternatives treat the same rows."""
    group = {"one group": one_group, "sequences": sequences}[setting](rows)
    torch_group = group if setting == "sequences" else None
    x = [harness.random((rows, channels), DTYPES[dtype], seed) for seed in range(BUFFERS)]
    moments = state(channels)
    groups = len(group[group >= 0].unique())
    counted = int((group >= 0).sum())
    return Case(
        "channel_moments_",
        dtype,
        (rows, channels),
        setting,
        counted * channels * x[0].element_size() + groups * channels * STATE_BYTES + rows,
        (
            Alternative(
                harness.backend_of("channel_moments_"), lambda i: ops.channel_moments_(x[i % BUFFERS], group, *moments)
            ),
            Alternative("flap_torch", lambda i: flap_arithmetic(x[i % BUFFERS], torch_group)),
            Alternative("var_mean", lambda i: var_mean(x[i % BUFFERS], torch_group)),
        ),
        targets,
    )


def gated_case(dtype: str, activation: str, rows: int, channels: int, targets: Sequence[Target]) -> Case:
    """gated_moments_ into gate's memory, as scoring calls it, and into a fresh tensor.

    The alternative is torch's product alone, without any moments.
    """
    pristine = harness.random((rows, channels), DTYPES[dtype], 0)
    gate = [harness.random((rows, channels), DTYPES[dtype], 1 + i) for i in range(BUFFERS)]
    up = [harness.random((rows, channels), DTYPES[dtype], 1 + BUFFERS + i) for i in range(BUFFERS)]
    group, moments, torch_activation = one_group(rows), state(channels), ACTIVATIONS[activation]

    def in_place(i: int) -> None:
        k = i % BUFFERS
        ops.gated_moments_(gate[k], up[k], group, *moments, activation, gate[k])

    backend = harness.backend_of("gated_moments_")
    tensor = pristine.numel() * pristine.element_size()
    return Case(
        "gated_moments_",
        dtype,
        (rows, channels),
        activation,
        3 * tensor + channels * STATE_BYTES + rows,
        (
            Alternative(backend, in_place, lambda i: gate[i % BUFFERS].copy_(pristine)),
            Alternative(
                f"{backend}_fresh",
                lambda i: ops.gated_moments_(gate[i % BUFFERS], up[i % BUFFERS], group, *moments, activation),
            ),
            Alternative("act_mul", lambda i: torch_activation(gate[i % BUFFERS]) * up[i % BUFFERS]),
        ),
        targets,
    )


def norms_case(dtype: str, axis: int, rows: int, channels: int) -> Case:
    """column_norms of a weight [rows, channels]."""
    weight = [harness.random((rows, channels), DTYPES[dtype], seed) for seed in range(BUFFERS)]
    return Case(
        "column_norms",
        dtype,
        (rows, channels),
        f"axis {axis}",
        weight[0].numel() * weight[0].element_size() + 8 * weight[0].shape[axis],
        (
            Alternative(harness.backend_of("column_norms"), lambda i: ops.column_norms(weight[i % BUFFERS], axis)),
            Alternative("square_sum", lambda i: weight[i % BUFFERS].float().square().sum(1 - axis)),
        ),
    )


def plan(rows: int, channels: int) -> dict[str, Callable[[], Case]]:
    """Return what makes each case, by label."""
    moments, gated = harness.backend_of("channel_moments_"), harness.backend_of("gated_moments_")
    targets = {  # of issue A
        "channel_moments_ bf16 one group": (Target(moments, 1 / 35, "flap_torch"), Target(moments, 75)),
        "gated_moments_ bf16 silu": (Target(gated, 0.40, "act_mul"), Target(f"{gated}_fresh", 0.40, "act_mul")),
    }
    cases: dict[str, Callable[[], Case]] = {}
    for dtype, setting in (("bf16", "one group"), ("bf16", "sequences"), ("fp16", "one group"), ("fp32", "one group")):
        label = f"channel_moments_ {dtype} {setting}"
        cases[label] = partial(moments_case, dtype, rows, channels, setting, targets.get(label, ()))
    for dtype, activation in (("bf16", "silu"), ("bf16", "gelu_tanh"), ("fp32", "silu")):
        label = f"gated_moments_ {dtype} {activation}"
        cases[label] = partial(gated_case, dtype, activation, rows, channels, targets.get(label, ()))
    for axis in (1, 0):
        cases[f"column_norms bf16 axis {axis}"] = partial(norms_case, "bf16", axis, rows, channels)
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, append to results/moments.csv, and print."""
    parser = harness.parser(__doc__, rounds=15)
    parser.add_argument("--rows", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--channels", type=int, default=14336, help="default: %(default)s")
    args = harness.parse(parser, argv)
    harness.run("moments", plan(args.rows, args.channels), args)


if __name__ == "__main__":
    main()
