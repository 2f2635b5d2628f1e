"""Measures scoring end to end against a plain forward pass, and against one with FLAP's statistics in torch hooks.

The model is a random Llama with two layers of Llama-2-7B's size; the tokens are two sequences of 1,024, one per set,
all counted. Scoring skips the last layer's down_proj, which serves nobody: 11 % of the matrix products of two layers,
but 0.7 % of 32. So the parts of the time are reported too.

A CPU without bf16 instructions multiplies bf16 matrices so slowly that nothing else shows; there, see --dtype fp32 too.
"""

import argparse
import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import harness
import numpy as np
import torch
from harness import Alternative, Case, Row, Target
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ssah_fast import data, find_units, matmul, ops
from ssah_fast.collector import Collector
from ssah_fast.data import Batch, Encoded
from ssah_fast.scores import SETS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS = ((0.90, "plain_forward"), (0.60, "flap_hooks"))  # of issue A, for bf16
READERS = ("o_proj", "down_proj")
VOCABULARY = 256  # the embedding must not matter

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

    def __init__(self, channels: int) -> None:
        self.mean, self.fluctuation, self.sequences = torch.zeros(channels), torch.zeros(channels), 0

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
        parts: Seconds of every run in each part; "rest" is what no part covers.
        extra_mib: Growth of the resident memory at its peak, of every run; empty where the system does not tell.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.extra_mib: list[float] = []

    def __call__(self, round_: int) -> None:
        """Run the call."""
        before = reset_peak()
        seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        start = perf_counter()
        with _timed_parts(seconds):
            self._call()
        seconds["rest"] = perf_counter() - start - sum(seconds.values())
        for part, taken in seconds.items():
            self.parts[part].append(taken)
        if before is not None:
            self.extra_mib.append(memory_mib("VmHWM") - before)


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


def memory_mib(field: str) -> float:
    """Return VmRSS or VmHWM (its peak) of this process in MiB, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def reset_peak() -> float | None:
    """Let VmHWM start again from the memory now resident, and return that; None where there is no such file."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return None
    return memory_mib("VmRSS")


def build(layers: int, hidden: int, intermediate: int, heads: int, dtype: torch.dtype) -> PreTrainedModel:
    """Return a random Llama in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def batches(tokens: int) -> list[Batch]:
    """Return one batch of two sequences, one per set, every token counted."""
    generator = torch.Generator().manual_seed(0)
    sets = [
        [Encoded(torch.randint(VOCABULARY, (tokens,), generator=generator).tolist(), [True] * tokens)] for _ in SETS
    ]
    return data.make_batches(sets, batch_size=len(SETS), max_tokens=0, pad_id=0)


def forward(model: PreTrainedModel, inputs: Sequence[Batch]) -> None:
    """Run the backbone, as transformers does it."""
    with torch.no_grad():
        for batch in inputs:
            model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def hooked_forward(model: PreTrainedModel, inputs: Sequence[Batch], statistics: dict[str, FlapStatistics]) -> None:
    """Run the backbone with FLAP's hooks on the readers."""
    with contextlib.ExitStack() as undo:
        for name, module in model.named_modules():
            if name.endswith(READERS):
                state = statistics.setdefault(name, FlapStatistics(module.in_features))
                undo.callback(module.register_forward_hook(state).remove)
        forward(model, inputs)


def score(collector: Collector, inputs: Sequence[Batch]) -> None:
    """Run scoring, column norms and importance included."""
    collector.run(inputs)
    collector.finish()


def run(args: argparse.Namespace) -> list[tuple[Case, list[Row]]]:
    """Measure the three alternatives and return the rows: time, its parts, memory."""
    model = build(args.layers, args.hidden, args.intermediate, args.heads, DTYPES[args.dtype])
    layouts = find_units(model)
    collector = Collector(model, layouts, "variance")
    statistics: dict[str, FlapStatistics] = {}
    ours = harness.backend_of("gated_moments_")
    calls: dict[str, Callable[[list[Batch]], None]] = {
        ours: lambda inputs: score(collector, inputs),
        "plain_forward": lambda inputs: forward(model, inputs),
        "flap_hooks": lambda inputs: hooked_forward(model, inputs, statistics),
    }
    for call in calls.values():  # warm up on few tokens; FLAP's arithmetic starts with the second batch
        call(batches(8))
    inputs = batches(args.tokens)
    watches = {name: Watch(functools.partial(call, inputs)) for name, call in calls.items()}
    case = Case(
        "score",
        args.dtype,
        (args.layers, args.hidden, args.intermediate, len(SETS), args.tokens),
        "end to end",
        None,
        [Alternative(name, watch) for name, watch in watches.items()],
        [Target(ours, bound, against) for bound, against in TARGETS] if args.dtype == "bf16" else (),
    )
    results = [(case, harness.measure(case, harness.Memory(), args.rounds, warmup=0))]
    for part in (*PARTS, "rest"):
        seconds = {name: np.array(watch.parts[part]) for name, watch in watches.items() if any(watch.parts[part])}
        results.append(_extra(case, part, seconds))
    peaks = {name: np.array(watch.extra_mib) for name, watch in watches.items() if watch.extra_mib}
    results.append(_extra(case, "extra peak memory", peaks, unit="MiB", scale=1.0))
    units = sum(layout.units for layout in layouts)
    state = {ours: np.array([collector.state_bytes() / units / len(SETS)])}
    results.append(_extra(case, "state per unit and set", state, unit="bytes", scale=1.0))
    return results


def _extra(case: Case, setting: str, values: dict[str, np.ndarray], **unit: Any) -> tuple[Case, list[Row]]:
    case = replace(case, setting=setting, targets=())
    return case, harness.summarise(case, values, **unit)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, append to results/score.csv, and print."""
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    for name, size in (("layers", 2), ("hidden", 4096), ("intermediate", 11008), ("heads", 32), ("tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=size, help="default: %(default)s")
    args = harness.parse(parser, argv)
    results = run(args)
    harness.append(args.out / "score.csv", [row for _, rows in results for row in rows])
    harness.show(results)


if __name__ == "__main__":
    main()
