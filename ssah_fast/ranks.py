"""The processes of one run, as torchrun starts them: who takes which batches, and how their moments become one.

Only moments travel, once, at the end, through gloo: also where the models are on GPUs, because they are small (32 bytes
per channel and set) and merged in float64 on the host, in the order of the ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ssah_fast.errors import RunError, SsahError, first_difference
from ssah_fast.scores import chan_merge

T = TypeVar("T")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_VARIABLES = (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT")
_POLL = 0.1  # seconds between two looks at whether the run should end
# Processes may be hours apart; gloo counts milliseconds in 32 bits, which end after 24.8 days.
_PATIENCE = datetime.timedelta(days=20)


def nothing() -> None:
    """The default for `interrupt`."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that share a run.

    Attributes:
        rank: Its number; 0 writes the result.
        world: How many there are; with 1, nothing here communicates.
        local_rank: Its number on its machine, which is that of its GPU.
        local_world: How many of them share its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    def share(self, items: Sequence[T]) -> list[T]:
        """What this process takes of a list that all of them have: every world-th item, perhaps none."""
        return list(items[self.rank :: self.world])

    def device(self, name: str) -> str:
        """The device of this process: where several would take "the GPU", each takes its own.

        Args:
            name: As the user gave it.

        Raises:
            SsahError: There are more processes on this machine than GPUs.
        """
        if self.world == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        if self.local_rank >= torch.cuda.device_count():
            raise SsahError(
                f"--device {name}: process {self.local_rank} of this machine has no GPU, there are "
                f"{torch.cuda.device_count()}; start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        return f"cuda:{self.local_rank}"

    def agree(self, document: Mapping[str, Any], interrupt: Callable[[], None] = nothing) -> None:
        """Make sure that all processes run the same: another file on one machine would go unnoticed.

        Args:
            document: What decides the result, as nested JSON.
            interrupt: Called while waiting, about ten times a second; may raise to end the wait.

        Raises:
            SsahError: Two processes differ; all of them raise it, and the message names the first difference.
            RunError: Another process has ended.
        """
        content = json.dumps(document, allow_nan=False).encode()
        documents = [json.loads(part) for part in self._wait(lambda: self._exchange(content), interrupt)]
        for rank, other in enumerate(documents):
            if difference := first_difference(other, documents[0]):
                name, theirs, ours = difference
                raise SsahError(
                    f"process {rank} runs something else than process 0: its {name} is {json.dumps(theirs)} and not "
                    f"{json.dumps(ours)}; give all processes the same files, flags and versions"
                )

    def smallest(self, value: int, interrupt: Callable[[], None] = nothing) -> int:
        """The smallest value that any process passes; the same in all of them.

        Args:
            value: This process's.
            interrupt: As in `agree`.

        Raises:
            RunError: Another process has ended.
        """
        content = str(value).encode()
        return min(int(part) for part in self._wait(lambda: self._exchange(content), interrupt))

    def gather(self, state: Mapping[str, Tensor], interrupt: Callable[[], None] = nothing) -> dict[str, Tensor] | None:
        """Merge what all processes measured: always in the order of the ranks, so that the bits repeat.

        Args:
            state: "<module>.count" int64 [G], "<module>.mean" and ".m2" float64 [G, H], "<module>.norm" float64 [H], as
                Collector.state gives them; modules that saw nothing may be missing.
            interrupt: As in `agree`.

        Returns:
            The same of all processes together on rank 0, on the CPU; None on the others.

        Raises:
            SsahError: The weights differ between processes.
            RunError: Another process has ended.
        """
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        if self.rank == 0:
            total = own
            for rank in range(1, self.world):
                total = merge(total, self._wait(functools.partial(_receive, rank), interrupt))
            return total
        self._wait(lambda: _send(own), interrupt)
        return None

    def barrier(self, interrupt: Callable[[], None] = nothing) -> None:
        """Wait until all processes are here.

        Args:
            interrupt: As in `agree`.

        Raises:
            RunError: Another process has ended.
        """
        self._wait(lambda: self._exchange(b""), interrupt)

    def _exchange(self, content: bytes) -> list[bytes]:
        """What every process passed, in the order of the ranks."""
        if self.world == 1:
            return [content]
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        width = max(1, *(int(size) for size in sizes))
        parts = [torch.empty(width, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, _as_tensor(content.ljust(width)))
        return [part.numpy().tobytes()[: int(size)] for part, size in zip(parts, sizes, strict=True)]

    def _wait(self, work: Callable[[], T], interrupt: Callable[[], None]) -> T:
        """Run what may block for hours in a thread: Python handles signals in the main one only while that runs."""
        results: list[T] = []
        errors: list[RuntimeError] = []

        def run() -> None:
            try:
                results.append(work())
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL)
            interrupt()
        if errors:
            raise RunError(
                "another process of this run has ended, its own message says why; the progress of all is kept, and the "
                "same command continues"
            ) from errors[0]
        return results[0]


@contextlib.contextmanager
def join(estimator: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, or with one process, nothing is set up.

    Args:
        estimator: What is to be measured.

    Yields:
        This process among them.

    Raises:
        SsahError: Torchrun's variables are incomplete or wrong, or the estimator cannot be shared.
        RunError: The other processes cannot be reached.
    """
    ranks = _from_environment()
    if ranks.world == 1:
        yield ranks
        return
    if estimator == "flap":
        raise SsahError(
            f"estimator 'flap' depends on the order of the data and cannot be shared by {ranks.world} processes; start "
            "one, or use estimator 'variance'"
        )
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"cannot reach the other processes through {address}: {error}") from error
    yield ranks
    dist.destroy_process_group()  # not after an error: it could wait for a process that has ended


def merge(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up two states (see `Ranks.gather`), exactly.

    Args:
        a: The one.
        b: The other.

    Returns:
        The state of both samples together.

    Raises:
        SsahError: A module's norm differs: other weights.
    """
    total = {**b, **a}
    for key in a.keys() & b.keys():
        name, _, figure = key.rpartition(".")
        if figure == "norm" and not torch.equal(a[key], b[key]):
            raise SsahError(f"the weights of {name} differ between the processes; give all of them the same model")
        if figure == "count":
            keys = [f"{name}.{figure}" for figure in ("count", "mean", "m2")]
            total.update(zip(keys, chan_merge(*(a[k] for k in keys), *(b[k] for k in keys)), strict=True))
    return total


def _from_environment() -> Ranks:
    given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if not given.keys() & set(_NUMBERS):
        return Ranks()
    if missing := [name for name in _VARIABLES if name not in given]:
        raise SsahError(
            f"the environment has {next(iter(given))} but no {missing[0]}; start with torchrun, which sets both, or "
            f"unset {next(iter(given))}"
        )
    for name in _NUMBERS:
        if not given[name].isdecimal():
            raise SsahError(f"{name}={given[name]!r} in the environment is no number; start with torchrun, or unset it")
    ranks = Ranks(*(int(given[name]) for name in _NUMBERS))
    if ranks.rank >= ranks.world:
        raise SsahError(f"RANK={ranks.rank} in the environment is not below WORLD_SIZE={ranks.world}; use torchrun")
    return ranks


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _send(state: Mapping[str, Tensor]) -> None:
    content = _as_tensor(safetensors.torch.save(dict(state)))
    dist.send(torch.tensor([len(content)]), 0)
    dist.send(content, 0)


def _receive(rank: int) -> dict[str, Tensor]:
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, rank)
    content = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(content, rank)
    return safetensors.torch.load(content.numpy().tobytes())
