"""Measures alternatives side by side.

A shared machine's clock drifts by a factor of two within seconds, so a number alone says little. Every round runs each
alternative once, in turn, and the machine's own rates (reading, copying, multiplying) among them; what is reported is
the median over rounds of each time and of each ratio within a round.
"""

import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ssah_fast.bench.clock import Clock
from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry

# Alternatives that stand for the machine's own rates.
READ, COPY, PRODUCT = "stream_read", "stream_copy", "matmul"
PEAKS = (READ, COPY, PRODUCT)
TIME, RATE = "ms", "TFLOP/s"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What --shapes knows, beside sizes like 512x4096. Every op has a table of its own of what they mean.
MODELS = ("llama-3-8b", "qwen3-32b", "llama-3-70b")
SHAPES = ("tiny", "cpu", *MODELS)
SECONDS = 10.0  # after which a case gets no more rounds than LEAST_ROUNDS
LEAST_ROUNDS = 3

Timer = Callable[[Callable[[], object]], float]
Run = Callable[[int], object]


@dataclass(frozen=True)
class Alternative:
    """One way to do an op.

    Attributes:
        name: Column ``backend`` of its row.
        run: The timed call; it gets the round's number, to rotate its buffers.
        restore: Called after every run, outside the timed region, e.g. to refill a buffer that was overwritten.
        ours: Whether it is this package's.
        bytes: The least that it must move, and
        flops: the arithmetic that it must do, where these are not the case's.
    """

    name: str
    run: Run
    restore: Run | None = None
    ours: bool = False
    bytes: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Target:
    """What an alternative must reach.

    Attributes:
        name: The alternative.
        bound: Against another alternative: the largest fraction of its value. Against one of PEAKS: the least
            percentage of its rate. Otherwise: the largest value, in the unit of the row.
        against: The other.
    """

    name: str
    bound: float
    against: str | None = None


@dataclass(frozen=True)
class Extra:
    """What else is known once the rounds are over, e.g. where the time went or how much memory was used.

    Attributes:
        setting: Column of its rows.
        values: [rounds] of each alternative.
        unit: Of the values times ``scale``.
    """

    setting: str
    values: Mapping[str, np.ndarray]
    unit: str = TIME
    scale: float = 1e3
    targets: Sequence[Target] = ()


@dataclass(frozen=True)
class Case:
    """One op at one dtype and shape, with all its alternatives; the first is ours.

    Attributes:
        setting: What else distinguishes the case, e.g. the groups of the rows.
        bytes: The least that the op must move; None where that means nothing.
        flops: The least floating-point operations; None likewise.
        products: Whether matrix products dominate: their rate is measured beside it.
        host: Whether the host's part of the time counts on a GPU, as it does in a training step.
        absent: Why an alternative is not there.
        extras: Called after the rounds.
        warmup: Rounds before those that count; default: the clock's.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    setting: str
    bytes: int | None
    alternatives: Sequence[Alternative]
    targets: Sequence[Target] = ()
    flops: float | None = None
    products: bool = False
    host: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)
    extras: Callable[[], Iterable[Extra]] | None = None
    warmup: int | None = None


Plan = Mapping[str, Callable[[], Case]]


@dataclass(frozen=True)
class Row:
    """One alternative's numbers in one case: a row of the CSV, less what the machine adds.

    Attributes:
        median: Over rounds, in ``unit``; so are p20 and p80.
        percent_of_read: Median over rounds of its bandwidth as a percentage of stream_read's in the same round.
        ratios: For every other alternative, the median over rounds of this one's value as a fraction of that one's. For
            stream_copy and matmul, of the time that these would take to move as many bytes or do as much arithmetic.
        rounds: How many rounds counted.
        ours: Whether it is this package's.
        flops: Arithmetic of a run.
    """

    op: str
    backend: str
    dtype: str
    shape: str
    setting: str
    median: float
    p20: float
    p80: float
    unit: str
    bytes: int | None = None
    gb_per_s: float | None = None
    percent_of_read: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 1
    ours: bool = False
    flops: float | None = None

    def percent_of(self, peak: str) -> float | None:
        """Return its rate as a percentage of a peak's; None where that is not known."""
        if peak == READ:
            return self.percent_of_read
        return 100 / self.ratios[peak] if self.ratios.get(peak) else None


@dataclass(frozen=True)
class Request:
    """What is asked of a plan.

    Attributes:
        device: Where to run.
        shapes: Names or sizes; empty: those that suit the device.
        dtypes: Names; empty: all that the op has.
        no_compile: Why torch.compile is left out; empty: it is measured.
    """

    device: torch.device
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    no_compile: str = ""

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def takes(self, dtype: str) -> bool:
        """Whether a dtype is asked for."""
        return not self.dtypes or dtype in self.dtypes

    def pick(self, table: Mapping[str, tuple[int, ...]], dims: int) -> list[tuple[int, ...]]:
        """Return the shapes of an op.

        Args:
            table: What the names mean for it.
            dims: How many numbers a size must have to be one of this op's; 0: it takes names only.
        """
        names = self.shapes or (MODELS if self.gpu else ("cpu",))
        written = [() if name in table else sizes_of(name) for name in names]
        return [
            table[n] if n in table else size
            for n, size in zip(names, written, strict=True)
            if n in table or (size and len(size) == dims)
        ]

    def first(self, number: int) -> "Request":
        """Return the request for an op's shape of this number: torch.compile takes its time with the first only."""
        return replace(self, no_compile=self.no_compile or "measured with the first shape only") if number else self

    def random(self, shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
        """Return noise on the device."""
        from ssah_fast.bench.clock import noise

        return noise(tuple(shape), dtype, seed, self.device)


def sizes_of(text: str) -> tuple[int, ...]:
    """Read a size like 512x4096, as in the column ``shape``; a name of a shape has none: ().

    Raises:
        SsahError: It is neither.
    """
    if text in SHAPES:
        return ()
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        raise SsahError(f"--shapes {text} is unknown; choose from {', '.join(SHAPES)} or write a size like 512x4096")
    return tuple(map(int, text.split("x")))


# ---- alternatives


def backends(op: str, device: torch.device) -> list[str]:
    """Return the backends to measure: all that have kernels for the op here, the one that `auto` takes first.

    SSAH_FAST_BACKEND leaves only the one that it names.
    """
    asked = os.environ.get(registry.VARIABLE, "auto")
    if asked != "auto":
        registry.select(op, device)
        return [asked]
    made = [b for b in registry.BACKENDS if device.type in b.devices and op in registry.load(b).ops]
    return [b.name for b in made] or ["torch"]


def missing_backends(op: str, device: torch.device) -> dict[str, str]:
    """Return why a backend that is made for this kind of device is not measured."""
    meant = [b for b in registry.BACKENDS if device.type in b.devices]
    reasons = {b.name: registry.load(b).missing or f"it has no {op}" for b in meant}
    return {name: reason for name, reason in reasons.items() if name not in backends(op, device)}


def on(backend: str, run: Run) -> Run:
    """Return a run whose ops go to a backend."""

    def chosen(i: int) -> None:
        before = os.environ.get(registry.VARIABLE)
        os.environ[registry.VARIABLE] = backend
        try:
            run(i)
        finally:
            if before is None:
                del os.environ[registry.VARIABLE]
            else:
                os.environ[registry.VARIABLE] = before

    return chosen


def ours(op: str, device: torch.device, run: Run, suffix: str = "", **attributes: Any) -> list[Alternative]:
    """Return one alternative per backend that is to be measured."""
    names = backends(op, device)
    return [Alternative(f"{name}{suffix}", on(name, run), ours=True, **attributes) for name in names]


@dataclass(frozen=True)
class Offer:
    """An alternative that is there only where its package is, and what it needs fits in memory.

    Attributes:
        build: Makes the alternative's run.
        package: The module that it needs.
        gpu: Whether it runs on GPUs only.
        attributes: Of the alternative.
    """

    name: str
    build: Callable[[], Run]
    package: str = "torch"
    gpu: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)


def compiled_offer(request: Request, name: str, function: Callable[..., Any], run: Callable[[Any], Run]) -> Offer:
    """Return the offer of a function under torch.compile; run makes the timed call from the compiled function."""

    def build() -> Run:
        if request.no_compile:
            raise RuntimeError(request.no_compile)
        return run(torch.compile(function))

    return Offer(f"{name}_compiled", build)


def accept(request: Request, offers: Sequence[Offer]) -> tuple[list[Alternative], dict[str, str]]:
    """Return the alternatives that are to be had here, and why the others are not."""
    found, absent = [], {}
    for offer in offers:
        if importlib.util.find_spec(offer.package) is None:
            absent[offer.name] = f"{offer.package} is not installed"
        elif offer.gpu and not request.gpu:
            absent[offer.name] = "runs on GPUs only"
        else:
            try:
                run = offer.build()
                run(0)  # here, because what does not work or fit may show at the first call only
                found.append(Alternative(offer.name, run, **offer.attributes))
            except torch.OutOfMemoryError:
                absent[offer.name] = "does not fit in the memory that is left"
            except (ImportError, OSError, RuntimeError, AttributeError, TypeError, SsahError) as error:
                absent[offer.name] = (" ".join(str(error).split()) or type(error).__name__)[:200]
    return found, absent


# ---- measuring


def run_rounds(
    alternatives: Sequence[Alternative],
    rounds: int,
    *,
    timer: Timer,
    warmup: int = 2,
    budget: float = float("inf"),
) -> dict[str, np.ndarray]:
    """Run every alternative once per round, each round starting with the next one.

    Args:
        alternatives: What to run.
        rounds: How many rounds count, at most.
        timer: Runs a call and returns its seconds.
        warmup: Rounds before them.
        budget: Seconds after which LEAST_ROUNDS are enough.

    Returns:
        Seconds [rounds] of each alternative.
    """
    seconds: dict[str, list[float]] = {alternative.name: [] for alternative in alternatives}
    start = time.perf_counter()
    for i in range(warmup + rounds):
        if i - warmup >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        first = i % len(alternatives)
        for alternative in (*alternatives[first:], *alternatives[:first]):
            taken = timer(functools.partial(alternative.run, i))
            if alternative.restore is not None:
                alternative.restore(i)
            if i >= warmup:
                seconds[alternative.name].append(taken)
    return {name: np.array(times) for name, times in seconds.items()}


def peaks(case: Case, clock: Clock) -> Iterator[Alternative]:
    """Return the machine's own rates that a case is set beside."""
    yield Alternative(READ, lambda _: clock.read(), bytes=clock.read_bytes)
    if case.bytes is not None:
        yield Alternative(COPY, lambda _: clock.copy(), bytes=clock.copy_bytes)
    if case.products:
        product, flops = clock.product(DTYPES[case.dtype])
        yield Alternative(PRODUCT, lambda _: product(), flops=flops)


def _work(case: Case) -> dict[str, tuple[int | None, float | None]]:
    """Bytes and floating-point operations of each alternative."""
    work = {}
    for a in case.alternatives:
        peak = a.name in PEAKS
        work[a.name] = (a.bytes or (None if peak else case.bytes), a.flops or (None if peak else case.flops))
    return work


def _ratio(own: np.ndarray, theirs: np.ndarray, work: tuple, their_work: tuple, peak: str) -> float | None:
    """The median over rounds of own / theirs, theirs brought to the same work if it is a peak."""
    scale = 1.0
    if peak in PEAKS:
        kind = 1 if peak == PRODUCT else 0
        if not work[kind] or not their_work[kind]:
            return None
        scale = their_work[kind] / work[kind]
    return float(np.median(own / theirs)) * scale if theirs.all() else None


def summarise(case: Case, values: Mapping[str, np.ndarray], unit: str = TIME, scale: float = 1e3) -> list[Row]:
    """Turn what every round gave into rows, one per alternative.

    Args:
        case: What was measured, the peaks among its alternatives.
        values: [rounds] of each alternative, e.g. from run_rounds.
        unit: Of the rows.
        scale: From the values' unit to it.
    """
    work = _work(case) if unit == TIME else {}
    is_ours = {a.name: a.ours for a in case.alternatives}
    nothing = (None, None)
    rows = []
    for name, own in values.items():
        p20, median, p80 = (float(v) for v in np.percentile(own * scale, (20, 50, 80)))
        moved, flops = work.get(name, nothing)
        ratios = {}
        for other, theirs in values.items():
            if name in PEAKS or other in (name, READ):
                continue
            ratio = _ratio(own, theirs, (moved, flops), work.get(other, nothing), other)
            if ratio is not None:
                ratios[other] = ratio
        read = _ratio(own, values[READ], (moved, flops), work.get(READ, nothing), READ) if READ in values else None
        rows.append(
            Row(
                op=case.op,
                backend=name,
                dtype=case.dtype,
                shape="x".join(map(str, case.shape)),
                setting=case.setting,
                median=median,
                p20=p20,
                p80=p80,
                unit=unit,
                bytes=moved,
                gb_per_s=float(np.median(moved / own)) / 1e9 if moved else None,
                percent_of_read=100 / read if read else None,
                ratios=ratios,
                rounds=len(own),
                ours=is_ours.get(name, False),
                flops=flops,
            )
        )
    return rows


def measure(case: Case, clock: Clock, rounds: int | None = None) -> list[tuple[Case, list[Row]]]:
    """Measure a case, and the machine's rates beside it.

    Args:
        case: What to measure.
        clock: Of its device.
        rounds: How many rounds; default: the clock's number, or fewer if they take longer than SECONDS.

    Returns:
        The case and its rows, and likewise each of its extras.
    """
    case = replace(case, alternatives=(*case.alternatives, *peaks(case, clock)))
    seconds = run_rounds(
        case.alternatives,
        rounds or clock.rounds,
        timer=functools.partial(clock.seconds, host=case.host),
        warmup=clock.warmup if case.warmup is None else case.warmup,
        budget=float("inf") if rounds else SECONDS,
    )
    results = [(case, summarise(case, seconds))]
    extras = [_rates(case, seconds)] if case.products else []
    for extra in (*extras, *(case.extras() if case.extras else ())):
        about = replace(case, setting=extra.setting, targets=extra.targets, absent={})
        bare = replace(
            about, bytes=None, flops=None, alternatives=[replace(a, bytes=None, flops=None) for a in case.alternatives]
        )
        results.append((about, summarise(bare, extra.values, extra.unit, extra.scale)))
    return [(replace(about, alternatives=(), extras=None), rows) for about, rows in results]


def _rates(case: Case, seconds: Mapping[str, np.ndarray]) -> Extra:
    flops = {name: flops for name, (_, flops) in _work(case).items() if flops}
    return Extra(f"{case.setting}, rate", {name: flops[name] / seconds[name] for name in flops}, RATE, 1e-12)


def reached(rows: Sequence[Row], target: Target) -> tuple[float, bool] | None:
    """Return what was measured for a target and whether that meets it; None if one of the two is not there."""
    row = next((row for row in rows if row.backend == target.name), None)
    if row is None:
        return None
    if target.against is None:
        return row.median, row.median <= target.bound
    if target.against in PEAKS:
        percent = row.percent_of(target.against)
        return None if percent is None else (percent, percent >= target.bound)
    ratio = row.ratios.get(target.against)
    return None if ratio is None else (ratio, ratio <= target.bound)
