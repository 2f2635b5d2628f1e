"""Cases of scoring end to end, against a plain forward pass and one with FLAP's statistics in torch hooks.

The model is a random Llama; half of the sequences are of each set, and all tokens count. Scoring skips the last layer's
down_proj, which serves nobody: 11 % of the matrix products of two layers, but 0.7 % of 32. So on the CPU the parts of
the time are reported too. A CPU without bf16 instructions multiplies bf16 matrices so slowly that nothing else shows;
there, see fp32 too.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah_fast import data, find_units, matmul, ops
from ssah_fast.bench import models
from ssah_fast.bench.clock import peak_mib, reset_peak
from ssah_fast.bench.harness import (
    DTYPES,
    Alternative,
    Case,
    Extra,
    Plan,
    Request,
    Target,
    backends,
    missing_backends,
)
from ssah_fast.bench.models import Size
from ssah_fast.collector import Collector
from ssah_fast.data import Batch, Encoded
from ssah_fast.score_plan import GPU_TOKENS
from ssah_fast.scores import SETS

SHAPES = {
    "tiny": Size(2, 32, 48, 2, 16),
    "cpu": Size(2, 4096, 11008, 2, 256),
    "llama-3-8b": Size(32, 4096, 14336, 16, 2048, 8, 128256),
}
OP = "gated_moments_"
WARMUP_TOKENS = 8
PLAIN, HOOKS = "plain_forward", "flap_hooks"
CPU_TARGETS = ((0.90, PLAIN), (0.60, HOOKS))
READERS = ("o_proj", "down_proj")

# part of the time -> the functions it is spent in, as the model and the collector look them up
PARTS: dict[str, tuple[tuple[ModuleType, str], ...]] = {
    "matmul": (
        (nn.functional, "linear"),
        (matmul, "linear"),
    ),  # the second only on bf16, where it does not call the first
    "attention": ((nn.functional, "scaled_dot_product_attention"),),
    "moments": ((ops, "channel_moments_"), (ops, "gated_moments_")),
    "column norms": ((ops, "column_norms"),),
}


class FlapStatistics:
    """FLAP's forward hook (arXiv 2312.11983, lib/layerwrapper.py, BiasGPT with WIFV), in float32.

    Attributes:
        mean: [H], FLAP's baseline_inp.
        fluctuation: [H], FLAP's fluc_inp.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.mean, self.fluctuation = (torch.zeros(channels, device=device) for _ in range(2))
        self.sequences = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Update the statistics with the input [B, T, H] of a reader."""
        x = args[0].float()
        n, added = self.sequences, x.shape[0]
        x = x.reshape(-1, x.shape[-1]).t()
        old_mean = self.mean  # as released: the same tensor as the new one
        self.mean *= n / (n + added)
        self.mean += x.mean(1) / (n + added)
        if n > 0:
            self.fluctuation *= (n - 1) / (n + added - 1)
            self.fluctuation += ((x - self.mean[:, None]) * (x - old_mean[:, None])).sum(1) / (n + added)
        self.sequences += added


class Watch:
    """Runs a call and keeps, for every run, where the time went and how much memory came on top.

    Attributes:
        parts: Seconds of every run in each part; "rest" is what no part covers. Empty on a GPU, which runs behind.
        extra_mib: Growth of the memory in use at its peak, of every run; empty where the system does not tell.
    """

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self._call, self._device = call, device
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.extra_mib: list[float] = []

    def __call__(self, round_: int) -> None:
        """Run the call."""
        before = reset_peak(self._device)
        if self._device.type == "cpu":
            self._run_in_parts()
        else:
            self._call()
        if before is not None:
            self.extra_mib.append(peak_mib(self._device) - before)

    def _run_in_parts(self) -> None:
        seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        start = perf_counter()
        with _timed_parts(seconds):
            self._call()
        seconds["rest"] = perf_counter() - start - sum(seconds.values())
        for part, taken in seconds.items():
            self.parts[part].append(taken)


@contextlib.contextmanager
def _timed_parts(seconds: dict[str, float]) -> Iterator[None]:
    """Add to ``seconds`` the time spent in each part's functions: two clock reads per call, a dozen calls per layer."""
    with contextlib.ExitStack() as undo:
        for part, places in PARTS.items():
            for place, name in places:
                original = getattr(place, name)
                setattr(place, name, _timed(original, part, seconds))
                undo.callback(setattr, place, name, original)
        yield


def _timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        result = function(*args, **kwargs)
        seconds[part] += perf_counter() - start
        return result

    return timed


def batches(size: Size, batch_tokens: int) -> list[Batch]:
    """Return batches of sequences that are of the sets in turn, every token counted."""
    encoded = [Encoded(row, [True] * len(row)) for row in models.random_tokens(size).tolist()]
    sets = [encoded[i :: len(SETS)] for i in range(len(SETS))]
    return data.make_batches(sets, batch_size=None, max_tokens=batch_tokens, pad_id=0)


def forward(model: PreTrainedModel, inputs: Sequence[Batch]) -> None:
    """Run the backbone, as transformers does it."""
    with torch.no_grad():
        for batch in inputs:
            mask = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
            model.get_decoder()(input_ids=batch.input_ids.to(model.device), attention_mask=mask, use_cache=False)


def hooked_forward(model: PreTrainedModel, inputs: Sequence[Batch], statistics: dict[str, FlapStatistics]) -> None:
    """Run the backbone with FLAP's hooks on the readers."""
    with contextlib.ExitStack() as undo:
        for name, module in model.named_modules():
            if name.endswith(READERS):
                state = statistics.setdefault(name, FlapStatistics(module.in_features, module.weight.device))
                undo.callback(module.register_forward_hook(state).remove)
        forward(model, inputs)


def score(collector: Collector, inputs: Sequence[Batch]) -> None:
    """Run scoring, column norms and importance included."""
    collector.run(inputs)
    collector.finish()


def score_case(request: Request, dtype: str, size: Size) -> Case:
    """Scoring beside the plain forward pass and FLAP's hooks: time, its parts, memory."""
    model = models.build(size, DTYPES[dtype], request.device)
    layouts = find_units(model)
    collector = Collector(model, layouts, "variance")
    statistics: dict[str, FlapStatistics] = {}
    ours = backends(OP, request.device)[0]
    calls: dict[str, Callable[[list[Batch]], None]] = {
        ours: functools.partial(score, collector),
        PLAIN: functools.partial(forward, model),
        HOOKS: lambda inputs: hooked_forward(model, inputs, statistics),
    }
    inputs = batches(size, GPU_TOKENS if request.gpu else size.sequences * size.tokens)
    watches = {name: Watch(functools.partial(call, inputs), request.device) for name, call in calls.items()}
    few = size._replace(tokens=min(WARMUP_TOKENS, size.tokens))
    for call in calls.values():  # FLAP's arithmetic starts with the second batch
        call(batches(few, few.sequences * few.tokens))
    bounds = ((1.0, PLAIN),) if request.gpu else CPU_TARGETS
    targets = [Target(ours, bound, against) for bound, against in bounds] if dtype == "bf16" else []
    state = collector.state_bytes() / sum(layout.units for layout in layouts) / len(SETS)

    def extras() -> Iterator[Extra]:
        for part in (*PARTS, "rest"):
            seconds = {name: np.array(watch.parts[part]) for name, watch in watches.items() if any(watch.parts[part])}
            if seconds:
                yield Extra(part, seconds)
        peaks = {name: np.array(watch.extra_mib) for name, watch in watches.items() if watch.extra_mib}
        if peaks:
            yield Extra("extra peak memory", peaks, "MiB", 1.0)
        yield Extra("state per unit and set", {ours: np.array([state])}, "bytes", 1.0)

    return Case(
        "score",
        dtype,
        size.shape,
        "end to end",
        None,
        [Alternative(name, watch, ours=name == ours) for name, watch in watches.items()],
        targets,
        flops=float(size.products()),
        products=True,
        host=True,
        absent=missing_backends(OP, request.device),
        extras=extras,
        warmup=int(request.gpu),
    )


def plan(request: Request) -> Plan:
    """Return what makes each case, by label."""
    dtypes = [dtype for dtype in DTYPES if dtype in (request.dtypes or ("bf16",))]
    return {
        f"score {dtype} {'x'.join(map(str, shape[:5]))}": functools.partial(score_case, request, dtype, Size(*shape))
        for shape in request.pick(SHAPES, 5)
        for dtype in dtypes
    }
