"""Cases of masked_adamw_ and MaskedAdamW, against other optimizers and what people add to them to freeze rows.

Shapes are those of one weight; the last case is a model's whole list of parameters. torch keeps bfloat16 moments for
bfloat16 weights, ours are float32: what is compared is what users have and get.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ssah_fast import ops
from ssah_fast.bench.harness import (
    COPY,
    DTYPES,
    Alternative,
    Case,
    Extra,
    Offer,
    Plan,
    Request,
    Run,
    Target,
    accept,
    backends,
    compiled_offer,
    missing_backends,
    on,
)
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW

OP = "masked_adamw_"
SHAPES = {
    "tiny": (128, 96),
    "cpu": (7168, 4096),  # half of the next
    "llama-3-8b": (14336, 4096),
    "qwen3-32b": (25600, 5120),
    "llama-3-70b": (28672, 8192),
}
# layers x hidden x intermediate x width of k and v x vocabulary
LISTS = {"tiny": (2, 64, 96, 32, 256), "cpu": (4, 1024, 2816, 1024, 256), "llama-3-8b": (32, 4096, 14336, 1024, 128256)}
LR, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.999), 1e-8, 0.01
SETTINGS: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
SMALL = (300, 256)  # tensors, elements of each
FRACTIONS = (0.5, 0.2, 0.1)
LIST_FRACTION = 0.2
FLOPS = 14  # per element, of algorithm 2: 3 for m, 4 for v, 7 for the weight


class Problem:
    """One weight with its gradient, and the ways to update it."""

    def __init__(self, request: Request, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Make the weight and the gradient."""
        self.request = request
        self.weight = nn.Parameter(request.random(shape, dtype, 0))
        self.weight.grad = self.grad = request.random(shape, dtype, 1)

    def some(self, axis: int, fraction: float) -> Tensor:
        """Return a random fraction of the indices along an axis, sorted."""
        size = self.weight.shape[axis]
        generator = torch.Generator().manual_seed(axis)
        return torch.randperm(size, generator=generator)[: round(fraction * size)].sort().values.to(self.weight.device)

    def ours(
        self, suffix: str = "", axis: int = 0, index: Tensor | None = None, *, compact: bool = False, **attributes: Any
    ) -> list[Alternative]:
        """masked_adamw_ on a region; compact: with a gradient that has only the region, as compact layers compute."""
        grad = self.grad
        region = grad if index is None else grad.index_select(axis, index)
        given = region if compact else grad
        runs = {name: on(name, self._run(axis, index, given, region)) for name in backends(OP, self.weight.device)}
        return [Alternative(f"{name}{suffix}", run, ours=True, **attributes) for name, run in runs.items()]

    def _run(self, axis: int, index: Tensor | None, grad: Tensor, region: Tensor) -> Run:
        """One backend's step: a cache is its own."""
        weight = self.weight.detach()
        m, v = (torch.zeros(region.shape, device=weight.device) for _ in range(2))
        step = torch.zeros((), device=weight.device)
        cache: dict[str, Any] = {}
        numbers: dict[str, Any] = {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY}
        return lambda _: ops.masked_adamw_(
            [weight], [grad], [m], [v], [step], [axis], [index], lr=LR, **numbers, cache=cache
        )

    def torch_step(self, **implementation: Any) -> Run:
        """Torch's AdamW on the whole weight."""
        return _step(AdamW([self.weight], **SETTINGS, **implementation))

    def master(self) -> Run:
        """The same with float32 moments for bfloat16 weights, as mixed-precision training does it: a float32 copy."""
        master = nn.Parameter(self.weight.detach().float())
        master.grad = grad = torch.empty_like(master)
        optimizer = AdamW([master], **SETTINGS, fused=True)

        def run(_: int) -> None:
            grad.copy_(self.grad)
            optimizer.step()
            self.weight.detach().copy_(master.detach())

        return run

    def bitsandbytes(self, name: str) -> Run:
        """An optimizer of bitsandbytes."""
        import bitsandbytes

        return _step(getattr(bitsandbytes.optim, name)([self.weight], **SETTINGS))

    def apex(self) -> Run:
        """Apex's FusedAdam, with decoupled weight decay."""
        from apex.optimizers import FusedAdam

        return _step(FusedAdam([self.weight], **SETTINGS, adam_w_mode=True))

    def rivals(self) -> tuple[list[Alternative], dict[str, str]]:
        """Return every other optimizer that is to be had here, on the whole weight."""
        single = AdamW([self.weight], **{**SETTINGS, "lr": torch.tensor(LR)}, foreach=False)  # a float is compiled in
        offers = [
            Offer("torch_fused", lambda: self.torch_step(fused=True)),
            Offer("torch_foreach", lambda: self.torch_step(foreach=True)),
            compiled_offer(self.request, "torch", single.step, lambda step: lambda _: step()),
            Offer("bnb_adamw", lambda: self.bitsandbytes("AdamW"), "bitsandbytes", gpu=True),
            Offer("bnb_adamw8bit", lambda: self.bitsandbytes("AdamW8bit"), "bitsandbytes", gpu=True),
            Offer("apex_fused", self.apex, "apex", gpu=True),
        ]
        if self.weight.dtype is not torch.float32:
            offers.append(Offer("torch_fused_master", self.master))
        return accept(self.request, offers)

    def index_restore(self, frozen: Tensor) -> Alternative:
        """torch, with the frozen rows' gradients zeroed before the step and their values put back after it."""
        weight, grad, saved = self.weight.detach(), self.grad, self.weight.detach()[frozen]
        step = self.torch_step(fused=True)

        def run(i: int) -> None:
            grad[frozen] = 0
            step(i)
            weight[frozen] = saved

        return Alternative("index_restore", run)

    def mask_restore(self, frozen: Tensor) -> Alternative:
        """The same with a mask and a copy of the weight's shape, as code for masks of any form has them."""
        weight, grad, saved = self.weight.detach(), self.grad, self.weight.detach().clone()
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        mask[frozen] = True
        step = self.torch_step(fused=True)

        def run(i: int) -> None:
            grad.masked_fill_(mask, 0)
            step(i)
            weight.copy_(torch.where(mask, saved, weight))

        return Alternative("mask_restore", run)

    def case(
        self, setting: str, fraction: float, alternatives: Iterable[Alternative], targets: Iterable[Target], **more: Any
    ) -> Case:
        """Return the case: what a step must move is weight and moments read and written, the gradient read."""
        trained = self.weight.numel() * fraction
        return Case(
            OP,
            next(name for name, dtype in DTYPES.items() if dtype is self.weight.dtype),
            tuple(self.weight.shape),
            setting,
            round(trained * self.step_bytes),
            tuple(alternatives),
            tuple(targets),
            flops=FLOPS * trained,
            **more,
        )

    @property
    def step_bytes(self) -> int:
        """Bytes that a step must move per trained element."""
        return 3 * self.weight.element_size() + 4 * 4


def whole_case(request: Request, dtype: str, shape: tuple[int, ...]) -> Case:
    """No mask."""
    problem = Problem(request, DTYPES[dtype], shape)
    names = backends(OP, request.device)
    others, absent = problem.rivals()
    targets = [Target(names[0], 1 / 0.95, "torch_fused")] if dtype == "fp32" and not request.gpu else []
    if request.gpu and dtype == "bf16":
        targets = [Target(name, 90, COPY) for name in names]
        targets += [Target(name, 1.0, other) for name in names for other in ("torch_fused", "torch_fused_master")]
    absent = {**missing_backends(OP, request.device), **absent}
    return problem.case("no mask", 1, (*problem.ours(), *others), targets, absent=absent)


def frozen_case(request: Request, dtype: str, shape: tuple[int, ...]) -> Case:
    """7.5 % of the rows frozen, and beside it of the columns."""
    problem = Problem(request, DTYPES[dtype], shape)
    frozen, name = problem.some(0, 0.075), backends(OP, request.device)[0]
    targets = []
    if not request.gpu:
        bound = {"fp32": 1 / 3, "bf16": 1 / 2}[dtype]
        targets = [Target(name, bound, "index_restore"), Target(name, bound, "mask_restore")]
        targets.append(Target(f"{name}_columns", 1.5, name))
    alternatives = (
        *problem.ours("", 0, problem.some(0, 0.925)),
        *problem.ours("_columns", 1, problem.some(1, 0.925)),
        Alternative("torch_fused", problem.torch_step(fused=True)),
        problem.index_restore(frozen),
        problem.mask_restore(frozen),
    )
    return problem.case("7.5 % frozen", 0.925, alternatives, targets)


def trained_case(request: Request, dtype: str, shape: tuple[int, ...]) -> Case:
    """20 % of the rows trained, and beside it of the columns, from dense and from compact gradients."""
    problem = Problem(request, DTYPES[dtype], shape)
    name = backends(OP, request.device)[0]
    by_row, by_column = problem.some(0, 0.2), problem.some(1, 0.2)
    targets = []
    if dtype == "fp32" and not request.gpu:
        targets = [Target(name, 1 / 7, "torch_fused"), Target(f"{name}_columns", 1.5, name)]
    alternatives = (
        *problem.ours("", 0, by_row),
        *problem.ours("_compact", 0, by_row, compact=True),
        *problem.ours("_columns", 1, by_column),
        *problem.ours("_columns_compact", 1, by_column, compact=True),
        Alternative("torch_fused", problem.torch_step(fused=True)),
    )
    return problem.case("20 % trained", 0.2, alternatives, targets)


def fractions_case(request: Request, dtype: str, shape: tuple[int, ...]) -> Case:
    """From the whole weight down to a tenth of its rows or columns: the time should follow."""
    problem = Problem(request, DTYPES[dtype], shape)
    alternatives, targets = problem.ours(), []
    for axis, kind, slack in ((0, "rows", 1.15), (1, "columns", 1.4)):
        for fraction in FRACTIONS:
            index, suffix = problem.some(axis, fraction), f"_{kind}_{fraction:.0%}"
            moved = round(problem.weight.numel() * fraction * problem.step_bytes)
            flops = FLOPS * problem.weight.numel() * fraction
            alternatives += problem.ours(suffix, axis, index, bytes=moved, flops=flops)
            if request.gpu:
                targets += [Target(f"{n}{suffix}", slack * fraction, n) for n in backends(OP, request.device)]
    return problem.case("fractions", 1, alternatives, targets)


def small_case(request: Request) -> Case:
    """Many small tensors through the optimizers: what a step costs beside the arithmetic."""
    number, size = SMALL

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(request.random((size,), torch.float32, i)) for i in range(number)]
        for parameter in made:
            parameter.grad = parameter.detach().clone()
        return made

    def fused() -> Run:
        return _step(AdamW(parameters(), **SETTINGS, fused=True))

    mine = {name: MaskedAdamW(parameters(), **SETTINGS) for name in backends(OP, request.device)}
    offers = [Offer("torch_fused", fused)]
    if request.gpu:
        graph = {"capturable": True, **SETTINGS}
        offers.append(
            Offer("cuda_graph", lambda: captured(MaskedAdamW(parameters(), **graph)), attributes={"ours": True})
        )
        offers.append(Offer("torch_fused_graph", lambda: captured(AdamW(parameters(), **graph, fused=True))))
    others, absent = accept(request, offers)
    name = next(iter(mine))
    return Case(
        "MaskedAdamW",
        "fp32",
        SMALL,
        "no mask",
        None,
        (*_steps(mine), *others),
        (Target(name, 1.0, "torch_fused"),),
        host=True,
        absent=absent,
    )


def _steps(optimizers: Mapping[str, Optimizer]) -> list[Alternative]:
    return [Alternative(name, on(name, _step(optimizer)), ours=True) for name, optimizer in optimizers.items()]


def _step(optimizer: Optimizer) -> Run:
    def run(_: int) -> None:
        optimizer.step()

    return run


def captured(optimizer: Optimizer) -> Run:
    """Return the replay of an optimizer's step from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(_: int, held: Optimizer = optimizer) -> None:  # the graph writes its tensors, which nothing else holds
        graph.replay()

    return replay


def list_case(request: Request, dtype: str, shape: tuple[int, ...]) -> Case:
    """A model's whole list of parameters, of which a fifth of the rows train."""
    parameters = {name: nn.Parameter(request.random(size, DTYPES[dtype], 0)) for name, size in parameter_list(*shape)}
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = request.random(parameter.shape, parameter.dtype, i)
    mask = Mask({name: (0, _frozen(p.shape[0])) for name, p in parameters.items()})
    mine = {name: MaskedAdamW(parameters.items(), **SETTINGS, mask=mask) for name in backends(OP, request.device)}

    def fused() -> Run:
        return _step(AdamW(parameters.values(), **SETTINGS, fused=True))

    alternatives = _steps(mine)
    others, absent = accept(request, [Offer("torch_fused", fused)])
    trained = LIST_FRACTION * sum(parameter.numel() for parameter in parameters.values())

    setting = f"{len(parameters)} tensors, {LIST_FRACTION:.0%} of the rows"

    def launched() -> Iterable[Extra]:
        if request.gpu:
            counts = {a.name: np.array([float(launches(partial(a.run, 0)))]) for a in (*alternatives, *others)}
            yield Extra(f"{setting}, kernels", counts, "launches", 1.0, [Target("cuda", 1)])

    return Case(
        "MaskedAdamW",
        dtype,
        shape,
        setting,
        round(trained * (3 * DTYPES[dtype].itemsize + 4 * 4)),
        (*alternatives, *others),
        flops=FLOPS * trained,
        absent=absent,
        extras=launched,
    )


def parameter_list(
    layers: int, hidden: int, intermediate: int, narrow: int, vocabulary: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of a Llama's parameters."""
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return [
        ("model.embed_tokens.weight", (vocabulary, hidden)),
        *((f"model.layers.{i}.{name}", size) for i in range(layers) for name, size in layer.items()),
        ("model.norm.weight", (hidden,)),
        ("lm_head.weight", (vocabulary, hidden)),
    ]


def _frozen(size: int) -> Tensor:
    frozen = torch.ones(size, dtype=torch.bool)
    frozen[torch.randperm(size, generator=torch.Generator().manual_seed(0))[: round(LIST_FRACTION * size)]] = False
    return frozen


def launches(call: Callable[[], object]) -> int:
    """Count the kernels that a call puts on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return count_kernels(profile.events())


def count_kernels(events: Sequence[Any]) -> int:
    """Count a profile's kernels; copies, memsets and the ranges that torch marks are none."""
    device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    marked = ("Memcpy", "Memset", "Optimizer.")
    return sum(not event.name.startswith(marked) for event in device)


def plan(request: Request) -> Plan:
    """Return what makes each case, by label."""
    cases: dict[str, Callable[[], Case]] = {}
    for number, shape in enumerate(request.pick(SHAPES, 2)):
        for setting, case, dtypes in (
            ("no mask", whole_case, ("bf16", "fp32")),
            ("7.5 % frozen", frozen_case, ("bf16", "fp32")),
            ("20 % trained", trained_case, ("bf16", "fp32")),
            ("fractions", fractions_case, ("bf16",)),
        ):
            for dtype in dtypes:
                # Of a second model the whole weight and the fractions say enough.
                if request.takes(dtype) and (number == 0 or (dtype == "bf16" and setting in ("no mask", "fractions"))):
                    label = f"{OP} {dtype} {'x'.join(map(str, shape))} {setting}"
                    cases[label] = partial(case, request.first(number), dtype, shape)
    if request.takes("fp32"):
        cases["MaskedAdamW fp32 small tensors"] = partial(small_case, request)
    for shape in request.pick(LISTS, 0):
        if request.takes("bf16"):
            label = f"MaskedAdamW bf16 {'x'.join(map(str, shape))} parameter list"
            cases[label] = partial(list_case, request, "bf16", shape)
    return cases
