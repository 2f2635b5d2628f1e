"""Cases of a whole training step under a mask, against what people do with torch's fused AdamW.

The model is a random Llama. Two cases: 20 % of the units train and everything else is frozen (compact layers, against
training of all weights), and, on the CPU, 7.5 % of the units are frozen (against training of all weights, with the
gradients of frozen lines set to zero before the step and their values restored after it). Frozen units are random ones
of every module. On a GPU the layers are computed again in backward (activation checkpointing), and the peak memory
stands beside what memory_plan forecasts.

The parts of the step are reported too, and the bytes of gradients and optimizer state. torch keeps the moments of bf16
weights in bf16, MaskedAdamW in fp32; "dense_fp32_moments" is what dense training would hold with those.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ssah_fast import memory_plan
from ssah_fast.bench import models
from ssah_fast.bench.clock import peak_mib, reset_peak
from ssah_fast.bench.harness import (
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
    missing_backends,
)
from ssah_fast.bench.models import Size
from ssah_fast.compaction import compact
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW
from ssah_fast.units import find_units

SHAPES = {
    "tiny": Size(2, 32, 48, 1, 16),
    "cpu": Size(2, 2048, 5632, 1, 512),
    "llama-3-8b": Size(32, 4096, 14336, 4, 2048, 8, 128256),
}
TRAINED, FROZEN = 0.2, 0.075  # parts of the units
STEP_BOUND, BYTES_BOUND = 1 / 1.6, 0.2  # of issue B, on the CPU
FORECAST_BOUND, CARD_MIB = 0.1, 80e9 / 2**20  # of issue C: how far off the forecast may be; one 80 GB card
OURS, MASKED = "compact", "masked"
DENSE, RESTORED, WIDE = "torch_fused", "torch_fused_restored", "dense_fp32_moments"
FORECAST, DENSE_FORECAST = "forecast", "dense_forecast"
TILE = 1024  # tokens whose logits are in memory at a time, as in TRL's loss, which the forecast assumes


class Step:
    """A model and its optimizer; a call is one training step.

    Attributes:
        parts: Seconds of every step's forward, backward and update.
    """

    def __init__(self, model: PreTrainedModel, optimizer: Optimizer, tokens: Tensor) -> None:
        self.model, self.optimizer = model, optimizer
        self._tokens = tokens.to(model.device)
        self.parts: dict[str, list[float]] = defaultdict(list)

    def __call__(self, round_: int) -> None:
        """Do a step."""
        start = self._now()
        loss = tiled_loss(self.model, self._tokens)
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        step = self._now()
        for part, seconds in (
            ("forward", forward - start),
            ("backward", backward - forward),
            ("step", step - backward),
        ):
            self.parts[part].append(seconds)

    def _now(self) -> float:
        if self._tokens.is_cuda:
            torch.cuda.synchronize(self._tokens.device)
        return perf_counter()

    def held(self) -> int:
        """Return the bytes of gradients and optimizer state together."""
        tiled_loss(self.model, self._tokens).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        size = sum(t.numel() * t.element_size() for t in (*gradients, *state))
        self.optimizer.zero_grad()
        return size


def tiled_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token; the logits exist for one tile of tokens at a time."""
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    rows, next_tokens = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()

    def tile_loss(rows: Tensor, next_tokens: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(rows).float(), next_tokens, reduction="sum")

    tiles = zip(rows.split(TILE), next_tokens.split(TILE), strict=True)
    losses = [checkpoint(tile_loss, *tile, use_reentrant=False) for tile in tiles]
    return torch.stack(losses).sum() / next_tokens.numel()


def build(request: Request, dtype: str, size: Size) -> PreTrainedModel:
    """Return a random Llama in training mode, and always the same."""
    model = models.build(size, DTYPES[dtype], request.device).train()
    if request.gpu:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def unit_mask(model: PreTrainedModel, part: float, freeze: bool) -> Mask:
    """Freeze a random part of every module's units, or all but that part and everything that belongs to no unit."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    entries: dict[str, Any] = {} if freeze else {name: (0, None) for name in shapes}
    for layout in find_units(model):
        chosen = torch.rand(layout.units, generator=generator) < part
        for piece in layout.slices:  # a Llama's parameters have one slice each
            frozen = torch.ones(shapes[piece.parameter][piece.axis], dtype=torch.bool)
            frozen[piece.indices(layout.units)[chosen != freeze]] = False
            entries[piece.parameter] = (piece.axis, frozen)
    return Mask(entries)


def masked(model: PreTrainedModel, mask: Mask, tokens: Tensor, *, make_compact: bool) -> Step:
    """Return training with MaskedAdamW."""
    if make_compact:
        compact(model, mask)
    return Step(model, MaskedAdamW(model.named_parameters(), lr=1e-5, mask=mask), tokens)


def dense(model: PreTrainedModel, tokens: Tensor) -> Step:
    """Return training of all weights with torch's fused AdamW."""
    return Step(model, AdamW(model.parameters(), lr=1e-5, fused=True), tokens)


def restored(model: PreTrainedModel, mask: Mask, tokens: Tensor) -> Step:
    """Return the same, with the gradients of frozen lines set to zero and their values put back."""
    regions = [(parameter, mask[name]) for name, parameter in model.named_parameters() if name in mask]
    lines = [(p, region.axis, region.frozen.to(p.device)) for p, region in regions if region.frozen is not None]
    kept = [parameter.detach().index_select(axis, frozen) for parameter, axis, frozen in lines]

    @torch.no_grad()
    def zero_gradients(*_: Any) -> None:
        for parameter, axis, frozen in lines:
            if parameter.grad is not None:
                parameter.grad.index_fill_(axis, frozen, 0)

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for (parameter, axis, frozen), values in zip(lines, kept, strict=True):
            parameter.index_copy_(axis, frozen, values)

    run = dense(model, tokens)
    run.optimizer.register_step_pre_hook(zero_gradients)
    run.optimizer.register_step_post_hook(restore)
    return run


def train_case(request: Request, dtype: str, size: Size) -> Case:
    """20 % of the units train."""
    tokens = models.random_tokens(size)
    before = reset_peak(request.device)
    model = build(request, dtype, size)
    count = sum(parameter.numel() for parameter in model.parameters())
    mask = unit_mask(model, TRAINED, freeze=False)
    memory = memory_plan.plan(
        model, mask, batch_size=size.sequences, seq_length=size.tokens, gradient_checkpointing=request.gpu
    )
    steps = {OURS: masked(model, mask, tokens, make_compact=True)}
    peaks = {OURS: _peak(request, steps[OURS], before)}

    def fused() -> Run:
        before = reset_peak(request.device)
        step = dense(build(request, dtype, size), tokens)
        peaks[DENSE] = _peak(request, step, before)
        steps[DENSE] = step
        return step

    others, absent = accept(request, [Offer(DENSE, fused, attributes={"flops": 3.0 * size.products()})])
    setting = f"train {TRAINED:.0%}"

    def extras() -> Iterator[Extra]:
        yield from _parts(setting, steps)
        mib = {name: np.array([step.held() / 2**20]) for name, step in steps.items()}
        mib[WIDE] = np.array([count * (DTYPES[dtype].itemsize + 2 * 4) / 2**20])
        yield Extra(
            f"{setting}, gradients and state",
            mib,
            "MiB",
            1.0,
            [] if request.gpu else [Target(OURS, BYTES_BOUND, DENSE if dtype == "fp32" else WIDE)],
        )
        if request.gpu:
            yield _memory(setting, peaks, memory)

    return Case(
        "train",
        dtype,
        size.shape,
        setting,
        None,
        (Alternative(OURS, steps[OURS], ours=True), *others),
        () if request.gpu else (Target(OURS, STEP_BOUND, DENSE),),
        flops=(2 + TRAINED) * size.products(),  # all of forward and of the inputs' gradients, a part of the weights'
        products=True,
        host=True,
        absent={**missing_backends("masked_adamw_", request.device), **absent},
        extras=extras,
        warmup=1,
    )


def _peak(request: Request, step: Step, before: float | None) -> float:
    """Do two steps, the second with all state in place, and return the MiB that came on top of those before."""
    if not request.gpu:
        return 0.0  # the system knows what is resident, not what torch handed out
    step(0)
    reset_peak(request.device)
    step(0)
    step.parts.clear()
    return peak_mib(request.device) - (before or 0.0)


def _memory(setting: str, peaks: dict[str, float], memory: memory_plan.MemoryPlan) -> Extra:
    """The peaks beside the forecasts; that of dense training has fp32 moments, as ours."""
    mib = {**peaks, FORECAST: memory.run.total / 2**20, DENSE_FORECAST: memory.dense.total / 2**20}
    targets = [
        Target(OURS, 1 + FORECAST_BOUND, FORECAST),
        Target(FORECAST, 1 / (1 - FORECAST_BOUND), OURS),
        Target(OURS, CARD_MIB),
    ]
    values = {name: np.array([value]) for name, value in mib.items()}
    return Extra(f"{setting}, peak memory", values, "MiB", 1.0, targets)


def _parts(setting: str, steps: dict[str, Step]) -> Iterator[Extra]:
    # The warm-up, and trials before it, do not count.
    rounds = min(len(step.parts["step"]) for step in steps.values()) - 1
    for part in ("forward", "backward", "step"):
        values = {name: np.array(step.parts[part][-rounds:]) for name, step in steps.items()}
        yield Extra(f"{setting}, {part}", values)


def freeze_case(request: Request, dtype: str, size: Size) -> Case:
    """7.5 % of the units are frozen."""
    tokens = models.random_tokens(size)
    first, second = (build(request, dtype, size) for _ in range(2))
    mask = unit_mask(first, FROZEN, freeze=True)
    steps = {MASKED: masked(first, mask, tokens, make_compact=False), RESTORED: restored(second, mask, tokens)}
    setting = f"freeze {FROZEN:.1%}"
    return Case(
        "train",
        dtype,
        size.shape,
        setting,
        None,
        [Alternative(name, step, ours=name == MASKED) for name, step in steps.items()],
        flops=3.0 * size.products(),
        products=True,
        host=True,
        extras=partial(_parts, setting, steps),
        warmup=1,
    )


def plan(request: Request) -> Plan:
    """Return what makes each case, by label."""
    # Two dense models of the size for GPUs do not fit on one.
    kinds: Sequence[tuple[str, Callable[..., Case]]] = [("train", train_case), ("freeze", freeze_case)]
    dtypes = [
        d for d in ("fp32", "bf16") if (d in request.dtypes if request.dtypes else d == "bf16" or not request.gpu)
    ]
    return {
        f"{name} {dtype} {'x'.join(map(str, shape[:5]))}": partial(case, request, dtype, Size(*shape))
        for name, case in (kinds[:1] if request.gpu else kinds)
        for shape in request.pick(SHAPES, 5)
        for dtype in dtypes
    }
