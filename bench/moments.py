"""Cases of channel_moments_, gated_moments_ and column_norms, against what torch and Liger offer for the same job.

Shapes are rows x channels: tokens and the inputs of a model's down_proj.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ssah_fast import ops
from ssah_fast.bench.harness import (
    COPY,
    DTYPES,
    READ,
    Alternative,
    Case,
    Offer,
    Plan,
    Request,
    Run,
    Target,
    accept,
    backends,
    compiled_offer,
    missing_backends,
    ours,
)

SHAPES = {
    "tiny": (2048, 48),
    "cpu": (4096, 14336),  # half the rows of the next, to keep it short
    "llama-3-8b": (8192, 14336),
    "qwen3-32b": (8192, 25600),
    "llama-3-70b": (8192, 28672),
}
GROUPS = 4  # two sets of two halves, as scoring keeps them
BUFFERS = 2  # inputs in rotation
STATE_BYTES = 2 * 2 * 8  # per group and channel: mean and M2 in float64, read and written
# Per element: x - mean and its square's sum, the sum of x; silu's exp, +, / and two products; a square's sum.
MOMENTS_FLOPS, GATED_FLOPS, NORM_FLOPS = 4, 9, 2
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def state(channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return count [G], mean and m2 [G, channels], all zero."""
    mean, m2 = (torch.zeros(GROUPS, channels, dtype=torch.float64, device=device) for _ in range(2))
    return torch.zeros(GROUPS, dtype=torch.int64, device=device), mean, m2


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
        _deviations(rows)


def _deviations(rows: Tensor) -> Tensor:
    values = rows.float()
    mean = values.mean(0)
    return ((values - mean) * (values - mean)).sum(0)


def var_mean(x: Tensor, group: Tensor | None = None) -> None:
    """The same with torch.var_mean."""
    for rows in (x,) if group is None else (x[group == g] for g in range(GROUPS)):
        torch.var_mean(rows.float(), 0)


def moments_case(request: Request, dtype: str, shape: tuple[int, ...], setting: str) -> Case:
    """channel_moments_ over all rows in one group or over realistic groups; the alternatives treat the same rows."""
    rows, channels = shape
    group = {"one group": one_group, "sequences": sequences}[setting](rows)
    groups, counted = len(group[group >= 0].unique()), int((group >= 0).sum())
    group = group.to(request.device)
    torch_group = group if setting == "sequences" else None
    x = [request.random(shape, DTYPES[dtype], seed) for seed in range(BUFFERS)]
    moments = state(channels, request.device)
    offers = []
    if torch_group is None:  # which rows are of a group is known at run time only, and compiled code stops there
        offers.append(compiled_offer(request, "flap_torch", _deviations, lambda f: lambda i: f(x[i % BUFFERS])))
    others, absent = accept(request, offers)
    return Case(
        "channel_moments_",
        dtype,
        shape,
        setting,
        counted * channels * x[0].element_size() + groups * channels * STATE_BYTES + rows,
        (
            *ours("channel_moments_", request.device, lambda i: ops.channel_moments_(x[i % BUFFERS], group, *moments)),
            Alternative("flap_torch", lambda i: flap_arithmetic(x[i % BUFFERS], torch_group)),
            Alternative("var_mean", lambda i: var_mean(x[i % BUFFERS], torch_group)),
            *others,
        ),
        _moments_targets(request, dtype, setting),
        flops=MOMENTS_FLOPS * counted * channels,
        absent={**missing_backends("channel_moments_", request.device), **absent},
    )


def _moments_targets(request: Request, dtype: str, setting: str) -> Sequence[Target]:
    if (dtype, setting) != ("bf16", "one group"):
        return ()
    if request.gpu:
        return [Target(name, 90, COPY) for name in backends("channel_moments_", request.device)]
    name = backends("channel_moments_", request.device)[0]
    return Target(name, 1 / 35, "flap_torch"), Target(name, 75, READ)


def act_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The product alone, in torch, without any moments."""
    return ACTIVATIONS[activation](gate) * up


def gated_case(request: Request, dtype: str, shape: tuple[int, ...], activation: str) -> Case:
    """gated_moments_ into gate's memory, as scoring calls it, and into a fresh tensor.

    The alternatives compute the product alone, without any moments.
    """
    rows, channels = shape
    device = request.device
    pristine = request.random(shape, DTYPES[dtype], 0)
    gate = [request.random(shape, DTYPES[dtype], 1 + i) for i in range(BUFFERS)]
    up = [request.random(shape, DTYPES[dtype], 1 + BUFFERS + i) for i in range(BUFFERS)]
    group, moments = one_group(rows).to(device), state(channels, device)

    def in_place(i: int) -> None:
        k = i % BUFFERS
        ops.gated_moments_(gate[k], up[k], group, *moments, activation, gate[k])

    def fresh(i: int) -> None:
        ops.gated_moments_(gate[i % BUFFERS], up[i % BUFFERS], group, *moments, activation)

    def theirs(function: Callable[..., Tensor], *rest: str) -> Run:
        return lambda i: function(gate[i % BUFFERS], up[i % BUFFERS], *rest)

    def liger() -> Run:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return theirs(LigerSiLUMulFunction.apply)

    offers = [compiled_offer(request, "act_mul", act_mul, lambda f: theirs(f, activation))]
    if activation == "silu":
        offers.append(Offer("liger_swiglu", liger, "liger_kernel", gpu=True))
    others, absent = accept(request, offers)
    tensor = pristine.numel() * pristine.element_size()
    return Case(
        "gated_moments_",
        dtype,
        shape,
        activation,
        3 * tensor + channels * STATE_BYTES + rows,
        (
            *ours("gated_moments_", device, in_place, restore=lambda i: gate[i % BUFFERS].copy_(pristine)),
            *ours("gated_moments_", device, fresh, "_fresh"),
            Alternative("act_mul", theirs(act_mul, activation)),
            *others,
        ),
        _gated_targets(request, dtype, activation),
        flops=GATED_FLOPS * rows * channels,
        absent={**missing_backends("gated_moments_", device), **absent},
    )


def _gated_targets(request: Request, dtype: str, activation: str) -> Sequence[Target]:
    if (dtype, activation) != ("bf16", "silu"):
        return ()
    names = backends("gated_moments_", request.device)
    if request.gpu:
        return [Target(f"{name}{kind}", 1.03, "liger_swiglu") for name in names for kind in ("", "_fresh")]
    return Target(names[0], 0.40, "act_mul"), Target(f"{names[0]}_fresh", 0.40, "act_mul")


def norms_case(request: Request, dtype: str, shape: tuple[int, ...], axis: int) -> Case:
    """column_norms of a weight of this shape."""
    weight = [request.random(shape, DTYPES[dtype], seed) for seed in range(BUFFERS)]

    def square_sum(weight: Tensor) -> Tensor:
        return weight.float().square().sum(1 - axis)

    return Case(
        "column_norms",
        dtype,
        shape,
        f"axis {axis}",
        weight[0].numel() * weight[0].element_size() + 8 * shape[axis],
        (
            *ours("column_norms", request.device, lambda i: ops.column_norms(weight[i % BUFFERS], axis)),
            Alternative("square_sum", lambda i: square_sum(weight[i % BUFFERS])),
        ),
        flops=NORM_FLOPS * shape[0] * shape[1],
        absent=missing_backends("column_norms", request.device),
    )


CASES: tuple[tuple[str, Callable[..., Case], str, str | int], ...] = (
    ("channel_moments_", moments_case, "bf16", "one group"),
    ("channel_moments_", moments_case, "bf16", "sequences"),
    ("channel_moments_", moments_case, "fp16", "one group"),
    ("channel_moments_", moments_case, "fp32", "one group"),
    ("gated_moments_", gated_case, "bf16", "silu"),
    ("gated_moments_", gated_case, "bf16", "gelu_tanh"),
    ("gated_moments_", gated_case, "fp32", "silu"),
    ("column_norms", norms_case, "bf16", 1),
    ("column_norms", norms_case, "bf16", 0),
)


def plan(request: Request) -> Plan:
    """Return what makes each case, by label."""
    cases = {}
    for number, shape in enumerate(request.pick(SHAPES, 2)):
        for op, case, dtype, setting in CASES:
            if request.takes(dtype):
                about = f"axis {setting}" if isinstance(setting, int) else setting
                cases[f"{op} {dtype} {'x'.join(map(str, shape))} {about}"] = partial(
                    case, request.first(number), dtype, shape, setting
                )
    return cases
