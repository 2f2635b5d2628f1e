"""Keeps rows in CSV files, which are only ever appended to, and compares rows with older ones."""

import csv
import datetime
import functools
import importlib.metadata
import io
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssah_fast
from ssah_fast import _C
from ssah_fast.bench.harness import LEAST_ROUNDS, PEAKS, Row
from ssah_fast.errors import SsahError

FIELDS = (
    *("op", "backend", "dtype", "shape", "setting", "median", "p20", "p80", "unit"),
    *("bytes", "gb_per_s", "percent_of_read", "ratios", "rounds"),
    *("threads", "device", "driver", "python", "torch", "triton", "transformers", "ssah_fast", "git", "time"),
)
LESS_IS_BETTER = ("ms", "MiB", "bytes", "launches")

Key = tuple[str, ...]


def machine(device: torch.device) -> dict[str, Any]:
    """Return the columns that say where and with what a row was measured."""
    gpu = device.type == "cuda"
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if gpu else f"{cpu_model()} ({_C.isa()})",
        # What lies between a program and the device; of a CPU, the operating system's kernel.
        "driver": _gpu_driver() if gpu else f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "ssah_fast": ssah_fast.__version__,
        "git": git_state(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


@functools.cache
def _gpu_driver() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0] if said else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def git_state(file: Path = Path(__file__)) -> str:
    """Return the commit, with "-dirty" where a file other than a result differs from it.

    Args:
        file: Whose repository is meant; a file that git does not keep, e.g. an installed one, has no state: "".
    """

    def git(*args: str) -> str:
        return subprocess.run(
            ("git", *args), cwd=file.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def append(path: Path, rows: Sequence[Row], where: Mapping[str, Any]) -> None:
    """Append rows to a CSV file, which gets its header when it is new. What it holds already is never changed.

    Args:
        path: The file; missing folders are made.
        rows: What to append.
        where: From `machine`.

    Raises:
        SsahError: The file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        check_columns(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, extrasaction="ignore", lineterminator="\n")
    if new:
        writer.writeheader()
    writer.writerows({**{name: _cell(value) for name, value in vars(row).items()}, **where} for row in rows)
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(text.getvalue())  # in one piece: two runs that end together do not mix their rows


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps({name: float(f"{ratio:.5g}") for name, ratio in value.items()})
    return f"{value:.5g}" if isinstance(value, float) else value


def check_columns(path: Path) -> None:
    """Look at the header of a CSV file.

    Raises:
        SsahError: It is not that of `append`, or the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = tuple(next(csv.reader(file), ()))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise SsahError(f"{path} cannot be read: {reason}") from error
    if header != FIELDS:
        raise SsahError(f"{path} has the columns {','.join(header)[:200]}; give a file that `ssah-fast bench` wrote")


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or of all in a folder.

    Raises:
        SsahError: There is none, or one has other columns.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise SsahError(f"{path} has no .csv file; give a file or folder that `ssah-fast bench --csv` wrote")
    rows: list[dict[str, str]] = []
    for name in files:
        check_columns(name)
        with name.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


# ---- comparing


@dataclass(frozen=True)
class Change:
    """A row beside its older one.

    Attributes:
        row: What was measured now.
        old: Median, 20th and 80th percentile then.
        drift: By how much reading memory, measured beside the row, takes longer now.
        slower: Whether it is worse by more than the spread in both runs and the drift.
        git: The commit of the older row.
    """

    row: Row
    old: tuple[float, float, float]
    drift: float
    slower: bool
    git: str

    @property
    def ratio(self) -> float | None:
        """New median / old median; None where that is 0."""
        return self.row.median / self.old[0] if self.old[0] else None


def compare(rows: Sequence[Row], older: Iterable[Mapping[str, str]], where: Mapping[str, Any]) -> list[Change]:
    """Set our rows beside the newest older ones of the same op, backend, dtype, shape, setting, unit, device, threads.

    A row is slower if its 20th percentile lies above the old one's 80th: by more than the spread over rounds in both
    runs. As the whole machine may be slower than then, the bound moves up with the time that reading memory took in the
    same case in both runs (in cases without it: with the median of those that have it). A row of fewer than
    LEAST_ROUNDS rounds, then or now, has no spread that means anything and is not called slower.

    Args:
        rows: What was measured now; only those of this package are compared.
        older: Rows of CSV files, oldest first.
        where: From `machine`.

    Returns:
        One change for every row that has an older one.
    """
    here = (str(where["device"]), str(where["threads"]))
    newest = {_key(row): row for row in older if (row["device"], row["threads"]) == here}
    drifts = {}
    for row in rows:
        before = newest.get(_row_key(row))
        if row.backend == PEAKS[0] and before is not None:
            drifts[_case(row)] = row.median / float(before["median"])
    usual = float(np.median(list(drifts.values()))) if drifts else 1.0
    changes = []
    for row in rows:
        before = newest.get(_row_key(row))
        if before is None or not row.ours or row.unit not in LESS_IS_BETTER:
            continue
        old = (float(before["median"]), float(before["p20"]), float(before["p80"]))
        drift = max(1.0, drifts.get(_case(row), usual)) if row.unit == "ms" else 1.0
        known = row.unit != "ms" or min(row.rounds, int(before["rounds"])) >= LEAST_ROUNDS
        changes.append(Change(row, old, drift, known and row.p20 > old[2] * drift, before["git"]))
    return changes


def _key(row: Mapping[str, str]) -> Key:
    return tuple(row[name] for name in ("op", "backend", "dtype", "shape", "setting", "unit"))


def _row_key(row: Row) -> Key:
    return (row.op, row.backend, row.dtype, row.shape, row.setting, row.unit)


def _case(row: Row) -> Key:
    return (row.op, row.dtype, row.shape, row.setting)
