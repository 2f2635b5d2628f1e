"""Measures alternatives side by side and appends what it found to a CSV file.

A shared machine's clock drifts by a factor of two within seconds, so a number alone says little. Every round runs each
alternative once, in turn, and a read of memory among them; what is reported is the median over rounds of each time and
of each ratio within a round. Before every timed run the last-level cache is swept, which also writes back what the
previous alternative left dirty.
"""

import argparse
import csv
import datetime
import functools
import importlib.metadata
import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import sysconf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import ssah_fast
from ssah_fast import _C
from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry

RESULTS = Path(__file__).parent / "results"
READ = "stream_read"  # the alternative that stands for the memory's read bandwidth
FIELDS = (
    *("op", "backend", "dtype", "shape", "setting", "median", "p20", "p80", "unit"),
    *("bytes", "gb_per_s", "percent_of_read", "ratios", "rounds"),
    *("threads", "device", "driver", "python", "torch", "triton", "transformers", "ssah_fast", "git", "time"),
)

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Alternative:
    """One way to do an op.

    Attributes:
        name: Column ``backend`` of its row.
        run: The timed call; it gets the round's number, to rotate its buffers.
        restore: Called after every run, outside the timed region, e.g. to refill a buffer that was overwritten.
    """

    name: str
    run: Callable[[int], object]
    restore: Callable[[int], object] | None = None


@dataclass(frozen=True)
class Target:
    """What an alternative must reach.

    Attributes:
        name: The alternative.
        bound: The largest fraction of the other's time or, without another, the least percentage of the read bandwidth.
        against: The other alternative.
    """

    name: str
    bound: float
    against: str | None = None


@dataclass(frozen=True)
class Case:
    """One op at one dtype and shape, with all its alternatives; the first is ours.

    Attributes:
        setting: What else distinguishes the case, e.g. the groups of the rows.
        bytes: The least that the op must move; None where that means nothing.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    setting: str
    bytes: int | None
    alternatives: Sequence[Alternative]
    targets: Sequence[Target] = ()


@dataclass(frozen=True)
class Row:
    """One alternative's numbers in one case: a row of the CSV, less what the machine adds.

    Attributes:
        median: Over rounds, in ``unit``; so are p20 and p80.
        percent_of_read: Median over rounds of its bandwidth as a percentage of stream_read's in the same round.
        ratios: For every other alternative, the median over rounds of this one's time as a fraction of that one's.
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


def wall_seconds(call: Callable[[], object]) -> float:
    """Time a call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def random(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return normal noise [shape]: zeros would flatter a kernel (one value in every lane, no carries)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def cache_bytes() -> int:
    """Return the size of the last-level cache; 64 MiB where the system does not tell."""
    try:
        return sysconf("SC_LEVEL3_CACHE_SIZE") or 64 << 20
    except (ValueError, OSError):
        return 64 << 20


class Memory:
    """Reads memory: to sweep the cache, and as the alternative that the bandwidths are compared with."""

    def __init__(self, size: int | None = None) -> None:
        """Fill two buffers with noise.

        Args:
            size: Bytes that ``stream_read`` reads; default: six times the last-level cache.
        """
        size = size or 6 * cache_bytes()
        # Two, so that the sweep leaves nothing of what is read next in the cache.
        self._swept, self._read = (torch.randint(2**62, (n // 8,), dtype=torch.int64) for n in (size // 3, size))
        self.bytes = self._read.numel() * 8

    def sweep(self) -> None:
        """Replace the contents of the last-level cache."""
        _C.stream_read(self._swept.data_ptr(), self._swept.numel() * 8, torch.get_num_threads())

    def alternative(self) -> Alternative:
        """Return the read of the large buffer."""
        return Alternative(READ, lambda _: _C.stream_read(self._read.data_ptr(), self.bytes, torch.get_num_threads()))


def run_rounds(
    alternatives: Sequence[Alternative],
    rounds: int,
    *,
    warmup: int = 2,
    sweep: Callable[[], object] | None = None,
    timer: Timer = wall_seconds,
) -> dict[str, np.ndarray]:
    """Run every alternative once per round, each round starting with the next one.

    Args:
        alternatives: What to run.
        rounds: How many rounds count.
        warmup: Rounds before them.
        sweep: Called before each timed run.
        timer: Runs a call and returns its seconds.

    Returns:
        Seconds [rounds] of each alternative.
    """
    seconds: dict[str, list[float]] = {alternative.name: [] for alternative in alternatives}
    for i in range(warmup + rounds):
        first = i % len(alternatives)
        for alternative in (*alternatives[first:], *alternatives[:first]):
            if sweep is not None:
                sweep()
            taken = timer(functools.partial(alternative.run, i))
            if alternative.restore is not None:
                alternative.restore(i)
            if i >= warmup:
                seconds[alternative.name].append(taken)
    return {name: np.array(times) for name, times in seconds.items()}


def summarise(
    case: Case, values: Mapping[str, np.ndarray], read_bytes: int | None = None, unit: str = "ms", scale: float = 1e3
) -> list[Row]:
    """Turn what every round gave into rows, one per alternative.

    Args:
        case: What was measured.
        values: [rounds] of each alternative, e.g. from run_rounds; stream_read's is needed for percentages of it.
        read_bytes: Bytes that stream_read read.
        unit: Of the rows.
        scale: From the values' unit to it.
    """
    read = values.get(READ)
    rows = []
    for name, own in values.items():
        p20, median, p80 = (float(v) for v in np.percentile(own * scale, (20, 50, 80)))
        moved = read_bytes if name == READ else case.bytes
        bandwidth, percent = None, None
        if moved is not None:
            bandwidth = float(np.median(moved / own)) / 1e9
        if moved is not None and read is not None and read_bytes is not None:
            percent = 100 * float(np.median(moved / own * read / read_bytes))
        others = {} if name == READ else {k: theirs for k, theirs in values.items() if k not in (name, READ)}
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
                gb_per_s=bandwidth,
                percent_of_read=percent,
                ratios={other: float(np.median(own / theirs)) for other, theirs in others.items() if theirs.all()},
                rounds=len(own),
            )
        )
    return rows


def measure(case: Case, memory: Memory, rounds: int, warmup: int = 2) -> list[Row]:
    """Measure a case, and the read bandwidth beside it."""
    alternatives = (*case.alternatives, memory.alternative())
    return summarise(case, run_rounds(alternatives, rounds, warmup=warmup, sweep=memory.sweep), memory.bytes)


def backend_of(op: str, device: str = "cpu") -> str:
    """Name the backend that runs an op here."""
    module = registry.select(op, torch.device(device)).__module__
    return next(backend.name for backend in registry.BACKENDS if backend.module == module)


def machine() -> dict[str, Any]:
    """Return the columns that say where and with what a row was measured."""
    return {
        "threads": torch.get_num_threads(),
        "device": f"{_cpu_model()} ({_C.isa()})",
        "driver": f"{platform.system()} {platform.release()}",  # what lies between a program and the CPU
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "ssah_fast": ssah_fast.__version__,
        "git": git_state(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def git_state(folder: Path = RESULTS.parent) -> str:
    """Return the commit, with "-dirty" where a file other than a result differs from it; "" outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(("git", *args), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV file, which gets its header when it is new. What it holds already is never changed.

    Raises:
        SsahError: The file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            header = tuple(next(csv.reader(file)))
        if header != FIELDS:
            raise SsahError(f"{path} has the columns {','.join(header)}; move it away to start a new one")
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    if new:
        writer.writeheader()
    where = machine()
    writer.writerows({**{name: _cell(value) for name, value in vars(row).items()}, **where} for row in rows)
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(text.getvalue())  # in one piece: two runs that end together do not mix their rows


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps({name: float(f"{ratio:.5g}") for name, ratio in value.items()})
    return f"{value:.5g}" if isinstance(value, float) else value


def show(results: Sequence[tuple[Case, Sequence[Row]]]) -> None:
    """Print what was measured, and each target beside the measured value."""
    console = Console(width=None if Console().is_terminal else 150)
    table = Table(title=f"{_cpu_model()}, {torch.get_num_threads()} threads; medians of rounds")
    for column in ("op", "dtype", "shape", "setting", "alternative"):
        table.add_column(column, no_wrap=column != "setting")
    for column in ("median", "p20 - p80", "GB/s", "% of read", "ours / it"):
        table.add_column(column, justify="right", no_wrap=True)
    for _, rows in results:
        ours = rows[0]
        for row in rows:
            ratio = ours.ratios.get(row.backend) if row.unit == ours.unit else None
            table.add_row(
                *(row.op, row.dtype, row.shape, row.setting, row.backend, f"{_amount(row.median)} {row.unit}"),
                f"{_amount(row.p20)} - {_amount(row.p80)}" if row.rounds > 1 else "",
                *(_number(row.gb_per_s, ".1f"), _number(row.percent_of_read, ".0f"), _number(ratio, ".3f")),
                end_section=row is rows[-1],
            )
    console.print(table)
    targets = [(case, rows, target) for case, rows in results for target in case.targets]
    if targets:
        console.print(_target_table(targets))


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _target_table(targets: Sequence[tuple[Case, Sequence[Row], Target]]) -> Table:
    table = Table(title="Targets (nothing depends on them)")
    for column in ("op", "dtype", "setting", "what", "target", "measured", ""):
        table.add_column(column)
    for case, rows, target in targets:
        measured, met = reached(rows, target)
        if target.against is None:
            what, sign, form = f"{target.name}, % of read bandwidth", ">=", ".0f"
        else:
            what, sign, form = f"{target.name}, time / {target.against}", "<=", ".3f"
        verdict = "[green]met[/]" if met else "[red]missed[/]"
        table.add_row(
            case.op, case.dtype, case.setting, what, f"{sign} {target.bound:{form}}", f"{measured:{form}}", verdict
        )
    return table


def reached(rows: Sequence[Row], target: Target) -> tuple[float, bool]:
    """Return what was measured for a target, and whether that meets it."""
    row = next(row for row in rows if row.backend == target.name)
    if target.against is None:
        percent = row.percent_of_read or 0.0
        return percent, percent >= target.bound
    ratio = row.ratios[target.against]
    return ratio, ratio <= target.bound


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return the command line that every script has; ``rounds`` is its default."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--rounds", type=int, default=rounds, help="rounds that count (default: %(default)s)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains TEXT")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files (default: bench/results)")
    return options


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and set the number of threads."""
    args = options.parse_args(argv)
    git_state()  # now, and kept: a commit made during the run is not what ran
    torch.set_num_threads(args.threads)
    return args


def run(name: str, plan: Mapping[str, Callable[[], Case]], args: argparse.Namespace) -> None:
    """Measure cases one by one, append each one's rows to <out>/<name>.csv, and print the tables.

    Args:
        name: Of the CSV file.
        plan: What makes each case, by label; a case's buffers are gone before the next case's are made.
        args: From parse.
    """
    memory = Memory()
    results = []
    for label, build in plan.items():
        if args.only in label:
            results.append(_run_case(build(), memory, args.rounds))
            append(args.out / f"{name}.csv", results[-1][1])
    show(results)


def _run_case(case: Case, memory: Memory, rounds: int) -> tuple[Case, list[Row]]:
    return replace(case, alternatives=()), measure(case, memory, rounds)
