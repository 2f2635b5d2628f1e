"""Cases of streamed scoring: a checkpoint run layer by layer, beside what bounds it and what it replaces.

Each alternative runs in a process of its own, so that nothing else counts in its memory; the page cache has dropped the
checkpoint before (as far as that goes without root). The rows of the case are whole processes; the extras say what the
work alone took, without starting Python, importing torch and, in memory, loading.

- `streamed`: LayerLoader and LayerRunner, every layer read once.
- `read`: all bytes of the checkpoint, once.
- `in_memory`: the same layers on the same batches, with the model loaded and copied out of the mapped files before.
- `accelerate_disk`: accelerate's disk offload of the decoder's layers, in batches of OFFLOAD_TOKENS: it reads the model
  anew for every batch. Of many batches only the first OFFLOAD_BATCHES run, and their time and bytes are multiplied.

The checkpoint is a random one that `make_checkpoint` writes to a temporary folder, or the one in the folder that
SSAH_FAST_BENCH_CHECKPOINT names.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ssah_fast import loading, machine
from ssah_fast.bench import make_checkpoint, models, score
from ssah_fast.bench.clock import peak_mib, reset_peak
from ssah_fast.bench.harness import DTYPES, Alternative, Case, Extra, Plan, Request, Target
from ssah_fast.bench.models import Size
from ssah_fast.collector import Collector
from ssah_fast.data import Batch
from ssah_fast.errors import RunError
from ssah_fast.hidden_states import HiddenStates
from ssah_fast.layer_loader import LayerLoader
from ssah_fast.score_plan import default_tokens
from ssah_fast.streaming import LayerRunner
from ssah_fast.units import decoder_layers, find_units

VARIABLE = "SSAH_FAST_BENCH_CHECKPOINT"
SHAPES = {
    "tiny": Size(2, 32, 48, 4, 16),
    "cpu": Size(4, 2048, 5632, 2, 256),
    "llama-3-8b": Size(4, 4096, 14336, 16, 512, 8),
}
GIVEN = (8, 512)  # sequences and tokens of each, for a checkpoint that is given
STREAMED, READ_ALL, MEMORY, OFFLOAD = "streamed", "read", "in_memory", "accelerate_disk"
LARGER = "larger_of_both"  # of reading all bytes and computing in memory
OFFLOAD_TOKENS, OFFLOAD_BATCHES = 512, 2
# Of issue D: time against the larger of both and against accelerate, bytes, milliseconds of overhead per layer, and
# the peak in MiB by layers and hidden size.
TIME_BOUND, OFFLOAD_BOUND, BYTES_BOUND, OVERHEAD_MS = 1.15, 1 / 1.5, 1.01, 20
PEAK_MIB = {(32, 4096): 2560, (40, 5120): 3072}
LARGE = 10**9  # bytes of a checkpoint from which on time has a target: below, headers and configs are most of it
IN_MEMORY = 1.15  # times its bytes: what a checkpoint takes in memory with a batch


# ---- in a process of its own


def work(arguments: Sequence[str] | None = None) -> None:
    """Run one alternative and print what it took as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("device", type=torch.device)
    for name in ("sequences", "tokens", "vocabulary", "threads"):
        parser.add_argument(name, type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    size = Size(0, 0, 0, given.sequences, given.tokens, 0, given.vocabulary)
    drop_cache(given.folder)
    reset_peak(given.device)
    taken = WAYS[given.way](given.folder, size, given.device)
    print(json.dumps({"peak_mib": peak_mib(given.device), **taken}))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights."""
    return sorted(folder.glob("*.safetensors"))


def drop_cache(folder: Path) -> None:
    """Have the page cache forget a checkpoint, but for pages that somebody has mapped."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in weight_files(folder):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def measured(taken: dict[str, Any], factor: float = 1.0) -> Iterator[None]:
    """Add what the block takes, times a factor: seconds, and bytes that the disk delivered."""
    before, start = disk_bytes(), time.perf_counter()
    yield
    taken["seconds"] = factor * (time.perf_counter() - start)
    taken["bytes"] = factor * (disk_bytes() - before)


def disk_bytes() -> int:
    """Return the bytes that disks have delivered to this process so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def read_all(folder: Path, size: Size, device: torch.device) -> dict[str, Any]:
    """Read every byte of the weights, in pieces and as many at a time as the layers' are."""
    taken: dict[str, Any] = {}
    places = [
        (file, offset) for file in weight_files(folder) for offset in range(0, file.stat().st_size, machine.PIECE)
    ]

    def read(some: list[tuple[Path, int]]) -> None:
        buffer = bytearray(machine.PIECE)
        for file, offset in some:
            with file.open("rb", buffering=0) as opened:
                os.preadv(opened.fileno(), [buffer], offset)

    with measured(taken), ThreadPoolExecutor(machine.READS) as pool:
        list(pool.map(read, [places[i :: machine.READS] for i in range(machine.READS)]))
    return taken


def in_memory(folder: Path, size: Size, device: torch.device) -> dict[str, Any]:
    """Score with the whole model in memory."""
    model, _ = loading.load_model(str(folder), device=str(device))
    for parameter in model.parameters():  # out of the mapped file, whose pages would be read while the layers run
        parameter.data = parameter.data.clone()
    reset_peak(device)
    collector = Collector(model, find_units(model), "variance")
    taken: dict[str, Any] = {}
    with measured(taken):
        collector.check_weights()
        score.score(collector, score.batches(size, default_tokens(device)))
    return taken


def streamed(folder: Path, size: Size, device: torch.device) -> dict[str, Any]:
    """Score layer by layer; the overhead is what neither waiting for the disk nor arithmetic explains."""
    taken: dict[str, Any] = {}
    arithmetic = Timer()
    with measured(taken), LayerLoader(str(folder), device=device) as loader, HiddenStates("device", device) as hidden:
        layouts = find_units(loader.model)
        collector = Collector(loader.model, layouts, "variance", device)
        for owner, names in ((collector, ("check_weights", "check_moments", "take_norms")), *_forwards(loader)):
            for name in names:
                setattr(owner, name, arithmetic.timing(getattr(owner, name)))
        start = time.perf_counter()
        LayerRunner(loader, collector, layouts, hidden).run(score.batches(size, default_tokens(device)))
        rest = time.perf_counter() - start - arithmetic.seconds - loader.waited
        collector.finish()
    return {**taken, "overhead": rest / loader.layers, "prepared": loader.prepared / loader.layers}


def _forwards(loader: LayerLoader) -> Iterator[tuple[Any, tuple[str, ...]]]:
    for module in (*decoder_layers(loader.model)[1], loader.model.get_input_embeddings()):
        yield module, ("forward",)


class Timer:
    """Adds up the seconds of some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def offloaded(folder: Path, size: Size, device: torch.device) -> dict[str, Any]:
    """Run the decoder, without any statistics, with its layers on accelerate's "disk"."""
    skeleton = loading.empty_model(str(folder))
    prefix, layers = decoder_layers(skeleton)
    owner = prefix.rpartition(".")[0]
    parts = [f"{owner}.{name}" for name, _ in skeleton.get_submodule(owner).named_children()]
    parts += [name for name, _ in skeleton.named_children() if name != owner]
    places: dict[str, Any] = {name: str(device) for name in parts if name != prefix}
    places |= {f"{prefix}.{i}": "disk" for i in range(len(layers))}
    batches: list[Batch] = score.batches(size, OFFLOAD_TOKENS)
    some = batches[:OFFLOAD_BATCHES]
    taken: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as offload, loading.silent():
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=offload).eval()
        with measured(taken, len(batches) / len(some)), torch.no_grad():
            for batch in some:
                model.get_decoder()(input_ids=batch.input_ids.to(device), use_cache=False)
    return taken


WAYS: dict[str, Callable[[Path, Size, torch.device], dict[str, Any]]] = {
    STREAMED: streamed,
    READ_ALL: read_all,
    MEMORY: in_memory,
    OFFLOAD: offloaded,
}


# ---- the cases


def run_apart(arguments: Sequence[str]) -> str:
    """Return what `work` prints in a process of its own.

    Raises:
        RunError: It failed.
    """
    command = [sys.executable, "-c", "from ssah_fast.bench.stream import work; work()", *arguments]
    with tempfile.TemporaryDirectory() as elsewhere:  # `python -c` would import a folder named ssah_fast
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{arguments[0]} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return done.stdout


class Worker:
    """An alternative; a call runs it in a new process.

    Attributes:
        taken: What every run took.
    """

    def __init__(self, way: str, folder: Path, size: Size, device: torch.device) -> None:
        """Prepare the command."""
        numbers = (size.sequences, size.tokens, size.vocabulary, torch.get_num_threads())
        self._arguments = [way, str(folder), str(device), *map(str, numbers)]
        self.taken: list[dict[str, Any]] = []

    def __call__(self, round_: int) -> None:
        """Run it.

        Raises:
            RunError: It failed.
        """
        self.taken.append(json.loads(run_apart(self._arguments).splitlines()[-1]))

    def values(self, key: str) -> np.ndarray:
        """Return a figure of every run."""
        return np.array([taken[key] for taken in self.taken], dtype=float)


def stream_case(request: Request, dtype: str, size: Size, folder: Path | None, held: Any = None) -> Case:
    """Streamed scoring of a checkpoint, which is written first where there is none."""
    if folder is None:
        held = tempfile.TemporaryDirectory()
        folder = Path(held.name)
        make_checkpoint.write(models.config(size), folder, dtype=DTYPES[dtype])
    stored = sum(file.stat().st_size for file in weight_files(folder))
    ways, absent = [STREAMED, READ_ALL, MEMORY, OFFLOAD], {}
    if importlib.util.find_spec("accelerate") is None:
        ways.remove(OFFLOAD)
        absent[OFFLOAD] = "accelerate is not installed"
    if IN_MEMORY * stored > machine.memory_left(request.device):
        ways.remove(MEMORY)
        absent[MEMORY] = "does not fit in the memory that is left"
    workers = {way: Worker(way, folder.resolve(), size, request.device) for way in ways}

    def extras(held: Any = held) -> Iterator[Extra]:  # the folder lives as long as the case
        yield _times(workers, stored)
        yield _bytes(workers, stored)
        yield _peaks(workers, size)
        own = workers[STREAMED]
        overhead = {STREAMED: own.values("overhead"), "prepared": own.values("prepared")}
        yield Extra("overhead per layer", overhead, targets=[Target(STREAMED, OVERHEAD_MS)])

    return Case(
        "stream",
        dtype,
        size.shape,
        "whole process",
        None,
        [Alternative(way, worker, ours=way == STREAMED) for way, worker in workers.items()],
        host=True,
        absent=absent,
        extras=extras,
        warmup=0,
    )


def _times(workers: dict[str, Worker], stored: int) -> Extra:
    values = {way: worker.values("seconds") for way, worker in workers.items()}
    bounds = [values[way] for way in (READ_ALL, MEMORY) if way in values]
    targets = [Target(STREAMED, OFFLOAD_BOUND, OFFLOAD)]
    if len(bounds) == 2:
        values[LARGER] = np.maximum(*bounds)
        targets.insert(0, Target(STREAMED, TIME_BOUND, LARGER))
    return Extra("alone", values, targets=targets if stored > LARGE else ())


def _bytes(workers: dict[str, Worker], stored: int) -> Extra:
    """What came from the disk, beside the size of the checkpoint."""
    values = {way: worker.values("bytes") for way, worker in workers.items()}
    values["checkpoint"] = np.full(len(values[STREAMED]), float(stored))
    return Extra("read from the disk", values, "bytes", 1.0, [Target(STREAMED, BYTES_BOUND, "checkpoint")])


def _peaks(workers: dict[str, Worker], size: Size) -> Extra:
    values = {way: worker.values("peak_mib") for way, worker in workers.items()}
    bound = PEAK_MIB.get((size.layers, size.hidden))
    targets = [] if bound is None else [Target(STREAMED, bound)]
    return Extra("peak memory", values, "MiB", 1.0, targets)


def given_size(folder: Path) -> Size:
    """Return the shape of a checkpoint, and what it is given."""
    config = loading.empty_model(str(folder)).config.get_text_config(decoder=True)
    widths = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    return Size(*widths, *GIVEN, config.num_key_value_heads, config.vocab_size)


def given_dtype(folder: Path) -> str:
    """Return the name of a checkpoint's dtype."""
    dtype = loading.empty_model(str(folder)).dtype
    return next((name for name, known in DTYPES.items() if known is dtype), str(dtype))


def plan(request: Request) -> Plan:
    """Return what makes each case, by label."""
    folder = os.environ.get(VARIABLE)
    if folder:
        size = given_size(Path(folder))
        cases: list[tuple[str, Size, Path | None]] = [(given_dtype(Path(folder)), size, Path(folder))]
    else:
        sizes = [Size(*shape) for shape in request.pick(SHAPES, 5)]
        cases = [(dtype, size, None) for size in sizes for dtype in DTYPES if dtype in (request.dtypes or ("bf16",))]
    return {
        f"stream {dtype} {'x'.join(map(str, size.shape))}": functools.partial(stream_case, request, dtype, size, path)
        for dtype, size, path in cases
    }


if __name__ == "__main__":
    work()
