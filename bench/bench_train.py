"""Measures a whole training step under a mask against what people do with torch's fused AdamW.

The model is a random Llama of two layers with a vocabulary of 256, so that the embeddings do not matter; the tokens are
one sequence. Two cases: 20 % of the units train and everything else is frozen (compact layers, against training of all
weights), and 7.5 % of the units are frozen (against training of all weights, with the gradients of frozen lines set to
zero before the step and their values restored after it). Frozen units are random ones of every module.

The parts of the step are reported too, and the bytes of gradients and optimizer state. torch keeps the moments of bf16
weights in bf16, MaskedAdamW in fp32; the third alternative of that row is what dense training would hold with those.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import harness
import numpy as np
import torch
from harness import Alternative, Case, Row, Target
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ssah_fast.compaction import compact
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW
from ssah_fast.units import find_units

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINED, FROZEN = 0.2, 0.075  # parts of the units
STEP_BOUND, BYTES_BOUND = 1 / 1.6, 0.2  # of issue B
DENSE, RESTORED, WIDE = "torch_fused", "torch_fused_restored", "dense_fp32_moments"
VOCABULARY = 256


class Run:
    """A model and its optimizer; a call is one training step.

    Attributes:
        parts: Seconds of every step's forward, backward and update.
    """

    def __init__(self, model: PreTrainedModel, optimizer: Optimizer, tokens: Tensor) -> None:
        self.model, self.optimizer, self._tokens = model, optimizer, tokens
        self.parts: dict[str, list[float]] = defaultdict(list)

    def __call__(self, round_: int) -> None:
        """Do a step."""
        start = perf_counter()
        loss = self.model(input_ids=self._tokens, labels=self._tokens, use_cache=False).loss
        forward = perf_counter()
        loss.backward()
        backward = perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        step = perf_counter()
        for part, seconds in (
            ("forward", forward - start),
            ("backward", backward - forward),
            ("step", step - backward),
        ):
            self.parts[part].append(seconds)

    def held(self) -> int:
        """Return the bytes of gradients and optimizer state together."""
        self.model(input_ids=self._tokens, labels=self._tokens, use_cache=False).loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in (*gradients, *state))


def build(args: argparse.Namespace) -> PreTrainedModel:
    """Return a random Llama in training mode, and always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
    )
    return LlamaForCausalLM._from_config(config, dtype=DTYPES[args.dtype]).train()


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


def masked(model: PreTrainedModel, mask: Mask, tokens: Tensor, *, make_compact: bool) -> Run:
    """Return training with MaskedAdamW."""
    if make_compact:
        compact(model, mask)
    return Run(model, MaskedAdamW(model.named_parameters(), lr=1e-5, mask=mask), tokens)


def dense(model: PreTrainedModel, tokens: Tensor) -> Run:
    """Return training of all weights with torch's fused AdamW."""
    return Run(model, AdamW(model.parameters(), lr=1e-5, fused=True), tokens)


def restored(model: PreTrainedModel, mask: Mask, tokens: Tensor) -> Run:
    """Return the same, with the gradients of frozen lines set to zero and their values put back."""
    regions = [(parameter, mask[name]) for name, parameter in model.named_parameters() if name in mask]
    kept = [parameter.detach().index_select(region.axis, region.frozen) for parameter, region in regions]

    @torch.no_grad()
    def zero_gradients(*_: Any) -> None:
        for parameter, region in regions:
            parameter.grad.index_fill_(region.axis, region.frozen, 0)

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for (parameter, region), values in zip(regions, kept, strict=True):
            parameter.index_copy_(region.axis, region.frozen, values)

    run = dense(model, tokens)
    run.optimizer.register_step_pre_hook(zero_gradients)
    run.optimizer.register_step_post_hook(restore)
    return run


def train_units(args: argparse.Namespace, tokens: Tensor) -> Iterator[tuple[Case, list[Row]]]:
    """20 % of the units train."""
    model = build(args)
    size = sum(parameter.numel() for parameter in model.parameters())
    ours = masked(model, unit_mask(model, TRAINED, freeze=False), tokens, make_compact=True)
    runs = {"compact": ours, DENSE: dense(build(args), tokens)}
    results = list(measure(args, f"train {TRAINED:.0%}", runs, [Target("compact", STEP_BOUND, DENSE)]))
    yield from results
    mib = {name: np.array([run.held() / 2**20]) for name, run in runs.items()}
    mib[WIDE] = np.array([size * (DTYPES[args.dtype].itemsize + 2 * 4) / 2**20])
    target = Target("compact", BYTES_BOUND, DENSE if args.dtype == "fp32" else WIDE)
    case = replace(results[0][0], setting=f"train {TRAINED:.0%}, gradients and state", targets=[target])
    yield case, harness.summarise(case, mib, unit="MiB", scale=1.0)


def freeze_units(args: argparse.Namespace, tokens: Tensor) -> Iterator[tuple[Case, list[Row]]]:
    """7.5 % of the units are frozen."""
    models = [build(args) for _ in range(2)]
    mask = unit_mask(models[0], FROZEN, freeze=True)
    runs = {"masked": masked(models[0], mask, tokens, make_compact=False), RESTORED: restored(models[1], mask, tokens)}
    yield from measure(args, f"freeze {FROZEN:.1%}", runs, ())


def measure(
    args: argparse.Namespace, setting: str, runs: dict[str, Run], targets: Sequence[Target]
) -> Iterator[tuple[Case, list[Row]]]:
    """Time the runs in interleaved rounds, and then their parts."""
    shape = (args.layers, args.hidden, args.intermediate, args.tokens)
    alternatives = [Alternative(name, run) for name, run in runs.items()]
    case = Case("train", args.dtype, shape, setting, None, alternatives, targets)
    yield case, harness.measure(case, harness.Memory(), args.rounds, warmup=1)
    for part in ("forward", "backward", "step"):
        seconds = {name: np.array(run.parts[part][1:]) for name, run in runs.items()}
        case = replace(case, setting=f"{setting}, {part}", targets=())
        yield case, harness.summarise(case, seconds)


CASES = {"train": train_units, "freeze": freeze_units}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, append to results/train.csv, and print."""
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES), help="default: %(default)s")
    sizes = (("layers", 2), ("hidden", 2048), ("intermediate", 5632), ("heads", 16), ("tokens", 512))
    for name, size in sizes:
        parser.add_argument(f"--{name}", type=int, default=size, help="default: %(default)s")
    args = harness.parse(parser, argv)
    tokens = torch.randint(VOCABULARY, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    results = []
    for name, measure_case in CASES.items():
        for dtype in args.dtypes:
            if args.only in f"{name} {dtype}":
                args.dtype = dtype
                found = list(measure_case(args, tokens))
                harness.append(args.out / "train.csv", [row for _, rows in found for row in rows])
                results += [(replace(case, alternatives=()), rows) for case, rows in found]
    harness.show(results)


if __name__ == "__main__":
    main()
