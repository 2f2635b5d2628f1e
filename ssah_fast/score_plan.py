"""How a checkpoint is scored on this machine: in memory or layer by layer, and how many tokens at a time.

Everything follows from a model on the meta device and the lengths of the sequences: no weight is read. `choose` decides
for every run, `plan` forecasts one (memory, bytes read, arithmetic, time), `fit` proposes flags for a given memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ssah_fast import data, machine, matmul
from ssah_fast.errors import OutOfMemoryError, SsahError
from ssah_fast.loading import stored_quantization
from ssah_fast.sizes import parse_size
from ssah_fast.units import UnitModule, decoder_layers, find_units, text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssah_fast.data import Encoded

# Tokens per batch for batch_size=None: rows enough for the matrix products, few enough to keep their activations small.
CPU_TOKENS, GPU_TOKENS = 2048, 16384
STREAM = ("auto", "always", "never")
# Of what the machine has left: other programs and the page cache get the rest. A bound that is given is taken whole.
_USABLE = 0.9
# Bytes that a CPU's process takes after the choice, beside what is counted: pages of libraries that are touched first
# when products run, their own buffers, the loader. Four models of 0.2 to 1.3 GB took 23 to 78 MiB.
_LATER = 48 << 20
_STATE_BYTES = {"flap": 96}  # per channel and estimator: mean and m2 in float64 of four groups, of six for FLAP
_USUAL_STATE_BYTES = 64
_UNEVEN = 2  # how many times its even share of the tokens the busiest expert gets
_SHORTEST = 64  # tokens that `fit` cuts sequences to at most
_CPU_ROWS, _CPU_OUTPUTS = 1024, 4096  # of the product that is measured, at most: some tenths of a second
_SECONDS = {"disk": 1.0, "product": 0.6, "attention": 0.4}  # of measurement

Batches = Sequence[tuple[int, int]]  # rows and tokens per row of each


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, in the memory of the device that computes.

    Attributes:
        process: What is there before: interpreter and libraries, on a CPU.
        weights: Of the model, or of the layers that are there at a time and of what is read ahead.
        activations: Of one batch in the layer that takes most; with them the buffers of bf16 products through fp32.
        moments: What was measured so far.
        hidden: Hidden states of all batches between two layers.
    """

    process: int = 0
    weights: int = 0
    activations: int = 0
    moments: int = 0
    hidden: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, part.name) for part in fields(self))

    def to_json(self) -> dict[str, int]:
        """The parts and "total"."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Choice:
    """How a run is done.

    Attributes:
        stream: Layer by layer, each read from the disk once; else the whole model is in memory.
        batch_tokens: For data.make_batches, padding included.
        hidden: Where streamed hidden states are kept (hidden_states.PLACES).
        memory: What that takes at its peak, where it is known.
    """

    stream: bool
    batch_tokens: int
    hidden: str = "device"
    memory: Memory = field(default=Memory(), compare=False)


def default_tokens(device: torch.device) -> int:
    """Tokens per batch where memory is no matter."""
    return GPU_TOKENS if device.type == "cuda" else CPU_TOKENS


def choose(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[Encoded]],
    *,
    device: torch.device,
    stream: str = "auto",
    max_memory: int | None = None,
    batch_size: int | None = None,
    estimator: str = "variance",
    ranks: int = 1,
) -> Choice:
    """Decide how to score: in memory where the model fits, with the usual number of tokens per batch where that fits.

    A GPU computes faster than a disk reads: there smaller batches come before streaming, on a CPU after it. Hidden
    states move to the host's memory or to a file before batches are made smaller, because only the latter changes bits.

    Args:
        model: On the meta device (loading.empty_model), in the dtype to run in.
        encoded: The sequences of each set.
        device: Where to run.
        stream: "auto", "always" or "never".
        max_memory: Bytes of the device's memory that this process may take in all; None: what is left of it.
        batch_size: Sequences per batch; None: chosen here.
        estimator: "variance", "norm" or "flap".
        ranks: How many processes share this machine and the batches.

    Returns:
        The first way that fits.

    Raises:
        SsahError: max_memory is too small.
        OutOfMemoryError: The machine's memory is too small.
    """
    lengths = [len(sequence.ids) for one_set in encoded for sequence in one_set]
    return _Job(model, lengths, device, stream, max_memory, batch_size, estimator, ranks).choice()


# ---- what a model needs


@dataclass(frozen=True)
class _MLP:
    """An MLP, or the experts of a layer.

    Attributes:
        written: Channels that gate and up projections write.
        units: Channels that the down projection reads.
        fused: Whether the product of gate and up overwrites one of them (collector.Collector).
        experts: How many there are; 0 where it is an ordinary MLP.
        per_token: How many of them a token goes to.
    """

    written: int
    units: int
    fused: bool
    experts: int = 0
    per_token: int = 1

    def elements(self, tokens: int, hidden: int) -> int:
        """Most elements that are alive at a time."""
        middle = self.written + (0 if self.fused else 2 * self.units)
        if not self.experts:
            return tokens * middle
        busiest = min(tokens, -(-_UNEVEN * tokens * self.per_token // self.experts))
        return tokens * self.per_token * hidden + busiest * (middle + 2 * hidden)


@dataclass(frozen=True)
class _Layer:
    """What matters of a decoder layer.

    Attributes:
        projected: Channels that queries, keys and values are projected to, on all ways there.
        attended: Channels that attention writes.
        heads: Of the queries.
        grouped: Whether keys and values have fewer heads.
        mlps: Its MLPs.
        products: Multiplications per token of all matrix products.
    """

    projected: int
    attended: int
    heads: int
    grouped: bool
    mlps: tuple[_MLP, ...]
    products: int


class _Needs:
    """Bytes and arithmetic of a model."""

    def __init__(self, model: PreTrainedModel, device: torch.device, estimator: str) -> None:
        self.model, self._device = model, device
        config = text_decoder(model).config.get_text_config()
        self.config, self.dtype = config, model.dtype
        self.eager = config._attn_implementation == "eager"
        self.width: int = config.hidden_size
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        _, layers = decoder_layers(model)
        self.layer_bytes = [_bytes_of(layer) for layer in layers]
        self.embeddings = _bytes_of(embedding)
        self.whole = _bytes_of(model)
        tied = head is None or head.weight is embedding.weight
        self.rest = self.whole - sum(self.layer_bytes) - self.embeddings - (0 if tied else _bytes_of(head))
        self.stored = _stored_part(model, self.whole)
        layouts = find_units(model)
        self.layers = [
            _describe(layer, [layout for layout in layouts if layout.layer == i], config, estimator)
            for i, layer in enumerate(layers)
        ]
        last = layouts[-1]
        share = self.layers[-1].mlps[-1].per_token if last.expert is not None else 1
        self.unused = last.units * last.channels.width * share  # multiplications of the last down projection
        channels = sum(layout.inputs().numel() for layout in layouts)
        self.moments = channels * _STATE_BYTES.get(estimator, _USUAL_STATE_BYTES)
        self._shapes = set(_products(layers))
        self._quantized = stored_quantization(model.config) is not None
        self.copied = self.stored != 1 or any(parameter.ndim > 2 for parameter in layers.parameters())

    @cached_property
    def raw(self) -> list[int]:
        """Bytes of each layer in the file."""
        return [round(size * self.stored) for size in self.layer_bytes]

    def streamed_weights(self, layers: int, embeddings: bool) -> int:
        """Most bytes of weights on the device while the first layers pass, with the token embedding or without.

        Two buffers are read into (layer_loader.LayerLoader), in host memory. On a CPU parameters are views of them,
        unless they are converted to another dtype; dequantising takes about one layer more for a moment.
        """
        gpu = self._device.type == "cuda"
        copies = (1 if gpu or self.stored != 1 else 0) + (1 if self._quantized else 0)
        buffers = 0 if gpu else sum(sorted(self.raw[:layers])[-2:])
        made = copies * max(self.layer_bytes[:layers])
        return self.rest + (self.embeddings if embeddings else 0) + buffers + made

    def hidden_states(self, batches: Batches) -> int:
        """Bytes of the hidden states of all batches."""
        return sum(rows * tokens for rows, tokens in batches) * self.width * self.dtype.itemsize

    def activations(self, batches: Batches) -> int:
        """Most bytes of one batch's activations, with masks and the buffers of products."""
        lengths = {tokens for _, tokens in batches}
        kinds = set(self.layers)
        return max(
            self._activations(layer, rows, tokens, len(lengths) > 1) for rows, tokens in set(batches) for layer in kinds
        )

    def _activations(self, layer: _Layer, rows: int, tokens: int, padded: bool) -> int:
        number, size = rows * tokens, self.dtype.itemsize
        stream = 3 * number * self.width * size  # the residual, what a block reads and what it writes
        repeated = 2 * layer.attended if layer.grouped else 0
        attention = number * (2 * layer.projected + layer.attended + repeated) * size
        if self.eager:  # scores and their softmax in fp32, to which 16-bit scores are copied before
            attention += rows * layer.heads * tokens**2 * (size + (8 if size < 4 else size))
        if padded or self.eager:
            attention += rows * tokens**2 * (1 + size)
        mlp = max((mlp.elements(number, self.width) for mlp in layer.mlps), default=0) * size
        norm = 8 * number * self.width  # in fp32, and its square
        return stream + max(attention, mlp, norm) + self._buffers(number)

    def _buffers(self, tokens: int) -> int:
        emulated = self._device.type == "cpu" and self.dtype == torch.bfloat16 and matmul.emulates_bf16()
        return matmul.buffer_bytes(tokens, self._shapes) if emulated else 0

    def flops(self, batches: Batches) -> list[tuple[float, float]]:
        """Floating-point operations of each layer: of matrix products, of attention (the causal half)."""
        number = sum(rows * tokens for rows, tokens in batches)
        pairs = sum(rows * tokens**2 for rows, tokens in batches)
        made = [(2.0 * number * layer.products, 2.0 * pairs * layer.attended) for layer in self.layers]
        made[-1] = (made[-1][0] - 2.0 * number * self.unused, made[-1][1])
        return made

    def largest_product(self) -> tuple[int, int]:
        """[out, in] of the largest weight of a layer."""
        return max(self._shapes, key=lambda shape: shape[0] * shape[1])


def _bytes_of(module: nn.Module) -> int:
    tensors = [*module.parameters(), *(b for _, b in module.named_buffers() if b.ndim)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _products(module: nn.Module) -> Iterator[tuple[int, int]]:
    """[out, in] of every weight that rows are multiplied with."""
    for part in module.modules():
        if isinstance(part, Conv1D):
            yield part.weight.shape[1], part.weight.shape[0]
        elif isinstance(part, nn.Linear):
            yield part.weight.shape[0], part.weight.shape[1]
        else:
            for parameter in part.parameters(recurse=False):
                if parameter.ndim == 3:
                    yield parameter.shape[1], parameter.shape[2]


def _describe(layer: nn.Module, layouts: list[UnitModule], config: Any, estimator: str) -> _Layer:
    modules = dict(layer.named_modules())
    prefix = _common_prefix(layouts)
    attention = [layout for layout in layouts if layout.kind == "attention"]
    projected = attended = 0
    for layout in attention:
        reader = layout.reader.removeprefix(prefix)
        own = modules[reader.rpartition(".")[0]]
        projected += sum(out for out, _ in _products(own)) - next(_products(modules[reader]))[0]
        attended += layout.inputs().numel()
    per_token = getattr(config, "num_experts_per_tok", None) or 1
    mlps: dict[str, _MLP] = {}
    for layout in layouts:
        if layout.kind == "mlp":
            written = sum(part.repeat for part in layout.slices if part.width > 1) - layout.channels.repeat
            fused = layout.gated is not None and layout.gated.up is not None and estimator != "flap"
            experts = 0 if layout.expert is None else layout.expert + 1
            mlps[layout.pool] = _MLP(written * layout.units, layout.units, fused, experts, per_token)
    heads = config.num_attention_heads
    products = sum(out * inputs for part in modules.values() for out, inputs in _own_products(part, per_token))
    grouped = (getattr(config, "num_key_value_heads", None) or heads) < heads
    return _Layer(projected, attended, heads, grouped, tuple(mlps.values()), products)


def _common_prefix(layouts: list[UnitModule]) -> str:
    """The name of the layer that these modules are in, with its dot."""
    name, number = layouts[0].name, str(layouts[0].layer)
    parts = name.split(".")
    return ".".join(parts[: parts.index(number) + 1]) + "."


def _own_products(module: nn.Module, per_token: int) -> Iterator[tuple[int, int]]:
    """[out, in] of a module's own weights, as often as a token is multiplied with them."""
    if isinstance(module, (nn.Linear, Conv1D)):
        yield next(_products(module))
    else:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:
                yield per_token * parameter.shape[1], parameter.shape[2]


def _stored_part(model: PreTrainedModel, whole: int) -> float:
    """Bytes of a checkpoint per byte of the model in the dtype to run in: 1 where nothing is converted."""
    sizes = [file.stat().st_size for file in _weight_files(model)]
    if not sizes:
        return 1.0
    part = sum(sizes) / whole
    return 1.0 if abs(part - 1) < 0.05 else part  # headers, a head stored beside tied embeddings


def _weight_files(model: PreTrainedModel) -> list[Path]:
    """The weights of a model that was made from a folder; none where it was not."""
    name = model.config.name_or_path
    return sorted(Path(name).glob("*.safetensors")) if name and Path(name).is_dir() else []


# ---- deciding


@dataclass(frozen=True)
class _Job:
    """What is to be run; `choose` says what the fields are."""

    model: PreTrainedModel
    lengths: Sequence[int]
    device: torch.device
    stream: str = "auto"
    max_memory: int | None = None
    batch_size: int | None = None
    estimator: str = "variance"
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.stream not in STREAM:
            raise SsahError(f"--stream {self.stream} is unknown; choose one of {', '.join(STREAM)}")
        if self.max_memory is not None and self.max_memory <= 0:
            raise SsahError(f"--max-memory {self.max_memory} is no amount of memory; give one such as 8GiB")

    @cached_property
    def needs(self) -> _Needs:
        return _Needs(self.model, self.device, self.estimator)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def process(self) -> int:
        gpu = self.device.type == "cuda"
        return torch.cuda.memory_allocated(self.device) if gpu else machine.resident() + _LATER

    @cached_property
    def limit(self) -> int:
        """Bytes that this process may take in all."""
        if self.max_memory is not None:
            return self.max_memory
        sharing = 1 if self.device.type == "cuda" else self.ranks  # torchrun gives each process a GPU of its own
        return self.process + round(_USABLE * machine.memory_left(self.device) / sharing)

    def choice(self) -> Choice:
        """The first way that fits.

        Raises:
            SsahError: None does.
        """
        found = next((way for way in self._ways() if self._fits(way)), None)
        if found is None:
            raise self._too_small()
        return found

    def _ways(self) -> Iterator[Choice]:
        gpu = self.device.type == "cuda"
        full, *smaller = self._sizes()
        places = ("device", "host", "file") if gpu else ("device", "file")
        memory = [self.in_memory(size) for size in (full, *smaller)] if self.stream != "always" else []
        streamed = [self.streamed(size, place) for size in (full, *smaller) for place in places]
        if self.stream == "never":
            streamed = []
        first = memory if gpu or not streamed else memory[:1]
        yield from (*first, *streamed)

    def _sizes(self) -> Iterator[int]:
        """Tokens per batch, from the usual number down to one sequence."""
        if self.batch_size is not None or self.estimator == "flap":
            yield self.longest * (1 if self.estimator == "flap" else self.batch_size or 1)
            return
        size = default_tokens(self.device)
        yield size
        while size > self.longest:
            size = max(size // 2, self.longest)
            yield size

    def batches(self, batch_tokens: int) -> Batches:
        """Rows and tokens of this process's batches, as data.make_batches packs them."""
        rows, lengths = 1 if self.estimator == "flap" else self.batch_size, sorted(self.lengths, reverse=True)
        batches = [(part.stop - part.start, lengths[part.start]) for part in data.cut(lengths, rows, batch_tokens)]
        return batches[:: self.ranks]

    def in_memory(self, batch_tokens: int) -> Choice:
        needs, batches = self.needs, self.batches(batch_tokens)
        # transformers maps the files. Where it makes other tensors of them, their pages are resident beside these: the
        # system would take them back, but they count for a bound that is given.
        mapped = self.device.type == "cpu" and self.max_memory is not None and needs.copied
        weights = needs.whole + (round(needs.whole * needs.stored) if mapped else 0)
        memory = Memory(self.process, weights, needs.activations(batches), needs.moments)
        return Choice(False, batch_tokens, "device", memory)

    def streamed(self, batch_tokens: int, place: str) -> Choice:
        return Choice(True, batch_tokens, place, max(self.streamed_phases(batch_tokens, place), key=lambda m: m.total))

    def streamed_phases(self, batch_tokens: int, place: str) -> tuple[Memory, Memory]:
        """The peak in the first layer, when the token embedding is there, and the peak behind it."""
        needs, batches = self.needs, self.batches(batch_tokens)
        hidden = needs.hidden_states(batches) if place == "device" else 0
        rest = (needs.activations(batches), needs.moments, hidden)
        first, later = needs.streamed_weights(2, True), needs.streamed_weights(len(needs.raw), False)
        return Memory(self.process, first, *rest), Memory(self.process, later, *rest)

    def _fits(self, way: Choice) -> bool:
        if way.memory.total > self.limit:
            return False
        if self.device.type == "cpu" or not way.stream:
            return True
        host = sum(sorted(self.needs.raw)[-2:])  # two buffers that are read into
        if way.hidden == "host":
            host += self.needs.hidden_states(self.batches(way.batch_tokens))
        return host <= _USABLE * machine.memory_left(torch.device("cpu")) / self.ranks

    def _too_small(self) -> SsahError:
        least = min(self._ways(), key=lambda way: way.memory.total)
        streaming = " or --stream auto" if self.stream == "never" else ""
        smaller = "a smaller --batch-size" if self.batch_size not in (None, 1) else "a smaller --seqlen"
        if self.max_memory is not None:
            return SsahError(
                f"--max-memory {gib(self.limit)} is too small: scoring takes at least {gib(least.memory.total)} here; "
                f"give that much or {smaller}{streaming}"
            )
        return OutOfMemoryError(
            f"scoring takes at least {gib(least.memory.total)} on {self.device}, which has {gib(self.limit)} for it; "
            f"use {smaller}{streaming}, or --max-memory {gib(least.memory.total)} to try it all the same"
        )


# ---- forecasting


@dataclass(frozen=True)
class Rates:
    """What was measured of this machine; the processes on it share its disk and, on CPUs, its cores.

    Attributes:
        read: Bytes per second from the disk.
        source: What was read.
        product: Floating-point operations per second of matrix products.
        attention: Likewise of attention.
    """

    read: float
    source: str
    product: float
    attention: float


@dataclass(frozen=True)
class Phase:
    """A part of a run, of one process.

    Attributes:
        name: What happens.
        memory: Its peak.
        read: Bytes from the disk.
        flops: Floating-point operations.
        seconds: Expected time.
    """

    name: str
    memory: Memory
    read: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class ScorePlan:
    """What each process of a run needs.

    Attributes:
        choice: How it is done.
        tokens: That it runs, padding included.
        phases: In their order.
        rates: That the times follow from.
        processes: How many share the machine and the tokens.
    """

    choice: Choice
    tokens: int
    phases: tuple[Phase, ...]
    rates: Rates
    processes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data: bytes, seconds, floating-point operations."""
        return {
            "stream": self.choice.stream,
            "batch_tokens": self.choice.batch_tokens,
            "hidden": self.choice.hidden,
            "processes": self.processes,
            "tokens": self.tokens,
            "memory": self.choice.memory.to_json(),
            "read": sum(phase.read for phase in self.phases),
            "flops": sum(phase.flops for phase in self.phases),
            "seconds": sum(phase.seconds for phase in self.phases),
            "phases": [{**vars(phase), "memory": phase.memory.to_json()} for phase in self.phases],
            "rates": asdict(self.rates),
        }


def plan(
    model: PreTrainedModel,
    lengths: Sequence[int],
    *,
    device: torch.device,
    stream: str = "auto",
    max_memory: int | None = None,
    batch_size: int | None = None,
    estimator: str = "variance",
    ranks: int = 1,
    rates: Rates | None = None,
) -> ScorePlan:
    """Forecast a run.

    Args:
        model: As for `choose`.
        lengths: Tokens of every sequence of both sets; where the data is not read, nsamples times seqlen.
        device: As for `choose`. Likewise:
        stream: See there.
        max_memory: See there.
        batch_size: See there.
        estimator: See there.
        ranks: See there.
        rates: None: measured, which takes two seconds.

    Returns:
        Memory, bytes and time per phase.

    Raises:
        SsahError: As `choose`.
        RunError: The disk cannot be measured.
    """
    job = _Job(model, lengths, device, stream, max_memory, batch_size, estimator, ranks)
    choice = job.choice()
    batches = job.batches(choice.batch_tokens)
    rates = rates or _measure(job, choice.batch_tokens)
    phases = _streamed_phases(job, choice, rates) if choice.stream else _whole_phases(job, choice, rates)
    return ScorePlan(choice, sum(rows * tokens for rows, tokens in batches), phases, rates, ranks)


def _measure(job: _Job, batch_tokens: int) -> Rates:
    needs, layer, files = job.needs, job.needs.layers[0], _weight_files(job.model)
    rows, tokens = max(job.batches(batch_tokens))
    outputs, inputs = needs.largest_product()
    number = rows * tokens
    if job.device.type == "cpu":
        number, outputs = min(number, _CPU_ROWS), min(outputs, _CPU_OUTPUTS)
    kind, head = (needs.dtype, job.device), layer.attended // layer.heads
    return Rates(
        machine.read_rate(files, _SECONDS["disk"]),
        str(files[0].parent) if files else "a temporary file",
        machine.product_rate(number, outputs, inputs, *kind, _SECONDS["product"]),
        machine.attention_rate(tokens, layer.heads, head, *kind, needs.eager, _SECONDS["attention"]),
    )


def _layer_seconds(job: _Job, choice: Choice, rates: Rates) -> tuple[list[float], list[float], float]:
    """Floating-point operations and seconds of each layer, and bytes per second that this process reads."""
    sharing = job.ranks if job.device.type == "cpu" else 1
    work = job.needs.flops(job.batches(choice.batch_tokens))
    seconds = [sharing * (products / rates.product + pairs / rates.attention) for products, pairs in work]
    return [products + pairs for products, pairs in work], seconds, rates.read / job.ranks


def _whole_phases(job: _Job, choice: Choice, rates: Rates) -> tuple[Phase, ...]:
    flops, seconds, rate = _layer_seconds(job, choice, rates)
    read = round(job.needs.whole * job.needs.stored)
    weights = Memory(job.process, job.needs.whole)
    return (
        Phase("load", weights, read, 0.0, read / rate),
        Phase("score", choice.memory, 0, sum(flops), sum(seconds)),
    )


def _streamed_phases(job: _Job, choice: Choice, rates: Rates) -> tuple[Phase, ...]:
    """While a layer runs the next one is read: each takes the longer of the two."""
    flops, seconds, rate = _layer_seconds(job, choice, rates)
    needs = job.needs
    begin = round((needs.rest + needs.embeddings) * needs.stored) + needs.raw[0]
    ahead = [read / rate for read in (*needs.raw[1:], 0)]
    layers = [max(pair) for pair in zip(seconds, ahead, strict=True)]
    first, later = job.streamed_phases(choice.batch_tokens, choice.hidden)
    return (
        Phase("embeddings and first layer", first, begin, flops[0], begin / rate + layers[0]),
        Phase("other layers", later, sum(needs.raw[1:]), sum(flops[1:]), sum(layers[1:])),
    )


@dataclass(frozen=True)
class Fit:
    """Flags with which a run fits.

    Attributes:
        flags: For the command line; what is not there stays as it was.
        choice: What they lead to.
    """

    flags: tuple[str, ...]
    choice: Choice

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"flags": list(self.flags), **asdict(self.choice), "memory": self.choice.memory.to_json()}


def fit(
    model: PreTrainedModel,
    lengths: Sequence[int],
    limit: int,
    *,
    device: torch.device,
    stream: str = "auto",
    batch_size: int | None = None,
    estimator: str = "variance",
    ranks: int = 1,
) -> Fit:
    """Find the flags with which each process stays below a limit: as few changes as will do.

    Args:
        model: As for `plan`.
        lengths: Likewise.
        limit: Bytes of the device's memory.
        device: As for `choose`. Likewise:
        stream: See there; "never" is given up first,
        batch_size: then this; sequences are cut last, to no less than 64 tokens.
        estimator: See there.
        ranks: See there.

    Raises:
        SsahError: Nothing fits; the message says what takes how much.
    """
    longest = max(lengths)
    cuts = [longest]
    while cuts[-1] > _SHORTEST:
        cuts.append(max(cuts[-1] // 2, _SHORTEST))
    tries = [
        (way, size, cut)
        for cut in cuts
        for way, size in dict.fromkeys(((stream, batch_size), ("auto", batch_size), ("auto", None)))
    ]
    for way, size, cut in tries:
        job = _Job(model, [min(n, cut) for n in lengths], device, way, limit, size, estimator, ranks)
        with contextlib.suppress(SsahError):
            choice = job.choice()
            flags = [
                "--max-memory",
                gib(limit) if parse_size(gib(limit)) == limit else str(limit),
                "--stream",
                "always" if choice.stream else "never",
            ]
            flags += ["--batch-size", "auto"] if size != batch_size else []
            flags += ["--seqlen", str(cut)] if cut != longest else []
            return Fit(tuple(flags), choice)
    least = job.streamed(cut, "file").memory
    raise SsahError(
        f"nothing fits in --fit {gib(limit)}: even layer by layer, with sequences of {cut} tokens, weights take "
        f"{gib(least.weights)}, activations {gib(least.activations)}, moments {gib(least.moments)} and the process "
        f"itself {gib(least.process)}; {gib(least.total)} would do"
    )


def gib(size: float) -> str:
    """Bytes as --max-memory takes them, rounded up."""
    hundredths = -(-int(size) * 100 // 2**30)
    return f"{hundredths / 100:g}GiB"
