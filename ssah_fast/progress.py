"""Progress of a run on disk: after a kill, the same command goes on from the last save and ends with the same bits.

A save is one file, so that one rename makes it valid: the bytes of every tensor, one after the other as they come, then
an index in JSON (fingerprint, position, and dtype, shape, offset and CRC-32 of every tensor), then a trailer that finds
the index. The index comes last because hidden states are made one at a time, and are too large to hold together.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, overload

import torch
from torch import Tensor

from ssah_fast.errors import ResumeError, RunError, first_difference
from ssah_fast.files import atomic_writer

_LOG = logging.getLogger(__name__)

INTERVAL = 60.0  # seconds between saves
SHARE = 0.05  # of the time may go into saving; where a save takes longer than that allows, the interval grows
_STATE = "state"
_MAGIC = b"SSAHPRG1"
_TRAILER = struct.Struct("<QQI8s")  # offset and length of the index, its CRC-32, _MAGIC


class Stopped(RunError):
    """SIGTERM ended the run, after a save."""

    exit_code = 143  # 128 + SIGTERM, as shells report it


class Hidden(Sequence[Tensor]):
    """The hidden states of a save, read from its file one at a time; good until the next save replaces the file."""

    def __init__(self, file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        self._file, self._entries = file, entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, batch: int) -> Tensor: ...
    @overload
    def __getitem__(self, batch: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, batch: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(batch, slice):
            return Hidden(self._file, self._entries[batch])
        return _read_tensor(self._file, self._entries[batch])


@dataclass(frozen=True)
class State:
    """Where a run stands, between two (layer, batch) steps.

    Attributes:
        layer: The layer to go on in; 0 where all layers run together.
        batch: How many batches this layer has seen.
        moments: What was measured so far (Collector.state), on the CPU.
        hidden: What the next layer, or the rest of this one, takes; one tensor per batch, or none.
        extra: What else the caller stored, as JSON gives it back.
    """

    layer: int
    batch: int
    moments: dict[str, Tensor]
    hidden: Sequence[Tensor]
    extra: dict[str, Any]


class Progress:
    """The saved progress of one run, or of one process of it.

    Args:
        folder: Where to keep it, shared by all processes: "<output>.progress". Made by the first save.
        fingerprint: What decides the result (model, data, settings, dtype, device, versions), as nested JSON.
        rank: This process's number.
        world: How many processes share the run.
        interval: Seconds between saves; 0 makes a save due at every step.
        fresh: Forget what an earlier run saved.

    Attributes:
        folder: As given.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Mapping[str, Any],
        *,
        rank: int = 0,
        world: int = 1,
        interval: float = INTERVAL,
        fresh: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self._own = self.folder / f"rank-{rank}-of-{world}"
        self._world, self._interval, self._fresh = world, interval, fresh
        self._fingerprint = json.loads(json.dumps({"processes": world, **fingerprint}, allow_nan=False))
        self._wait = interval
        self._last = time.monotonic()

    def load(self) -> State | None:
        """What the last save holds; None where there is nothing to continue.

        Raises:
            ResumeError: It is of another run; the message names the first difference.
            RunError: It is damaged or cannot be read.
        """
        self._last = time.monotonic()
        if self._fresh:
            self._forget(self.folder.glob("rank-*-of-*"))
            return None
        foreign = (p for p in self.folder.glob(f"rank-*-of-*/{_STATE}") if not self._is_of_this_world(p.parent))
        file = self._own / _STATE
        if not file.exists():
            file = min(foreign, default=file)
        if not file.exists():
            return None
        index = _read_index(file)
        if difference := first_difference(index["fingerprint"], self._fingerprint):
            name, saved, now = difference
            raise ResumeError(
                f"cannot continue from {self.folder}: {name} is {_short(saved)} in the saved run and {_short(now)} now;"
                " repeat the command as it was, or add --fresh to start over"
            )
        moments = {name: _read_tensor(file, entry) for name, entry in index["moments"].items()}
        return State(index["layer"], index["batch"], moments, Hidden(file, index["hidden"]), index["extra"])

    def due(self) -> bool:
        """Whether it is time for the next save."""
        return time.monotonic() - self._last >= self._wait

    def save(
        self,
        layer: int,
        batch: int,
        moments: Mapping[str, Tensor],
        hidden: Iterable[Tensor] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the last save by this one, which is on the disk when the call returns; until then the last is valid.

        Args:
            layer: See `State`, as the other arguments; nothing is changed or kept.
            batch: How many batches the layer has seen.
            moments: Tensors of any dtype on any device.
            hidden: One tensor per batch; an iterator may make each when it is asked for.
            extra: Anything that JSON holds.

        Raises:
            RunError: The operating system refused it (a full disk, for example).
        """
        start = time.monotonic()
        self._prepare()
        index = {"fingerprint": self._fingerprint, "layer": layer, "batch": batch, "extra": dict(extra or {})}
        with atomic_writer(self._own / _STATE) as file:
            index["moments"] = {name: _write_tensor(file, tensor) for name, tensor in moments.items()}
            index["hidden"] = [_write_tensor(file, tensor) for tensor in hidden]
            document = json.dumps(index, allow_nan=False).encode()
            trailer = _TRAILER.pack(file.tell(), len(document), zlib.crc32(document), _MAGIC)
            file.write(document + trailer)
        _sync_folder(self._own)
        self._last = time.monotonic()
        if self._interval > 0:
            self._wait = max(self._interval, (self._last - start) * (1 - SHARE) / SHARE)

    def done(self) -> None:
        """Remove the progress of this process; call it when the result is on the disk."""
        self._forget([self._own])

    def _is_of_this_world(self, folder: Path) -> bool:
        return folder.name.endswith(f"-of-{self._world}")

    def _forget(self, folders: Iterable[Path]) -> None:
        """Remove folders of processes: this one's, and those that no process of this run has."""
        for folder in folders:
            if folder == self._own or not self._is_of_this_world(folder):
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or other processes' progress is in it
            self.folder.rmdir()

    def _prepare(self) -> None:
        """Make this process's folder, and remove from it what killed saves left."""
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            for path in self._own.iterdir():
                if path.name != _STATE:
                    path.unlink()
        except OSError as error:
            raise RunError(f"cannot save the progress in {self._own}: {error.strerror}") from error
        for folder in (self.folder.parent, self.folder):
            _sync_folder(folder)


class Stop:
    """Whether a signal asked the run to end.

    Attributes:
        requested: The signal's name, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None

    def leave(self, saved: str | os.PathLike[str]) -> None:
        """End the run if a signal asked for it; call it after the save.

        Args:
            saved: Where the progress is, for the message.

        Raises:
            KeyboardInterrupt: After SIGINT; its argument is the message.
            Stopped: After SIGTERM.
        """
        if self.requested is None:
            return
        message = f"stopped by {self.requested}; the progress is in {saved}, and the same command continues from there"
        raise KeyboardInterrupt(message) if self.requested == "SIGINT" else Stopped(message)


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request, which the run polls; a later SIGINT acts at once.

    Signals that the process ignores (under nohup, for example) stay ignored. Other threads than the main one cannot
    handle signals: there nothing is ever requested.

    Yields:
        The request.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested is not None and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        stop.requested = signal.Signals(number).name
        _LOG.warning("%s: the run ends after this batch, and a save; Ctrl-C now ends it at once", stop.requested)

    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    signal.signal(number, handle)
                    # None: a handler that was not set from Python, and which Python cannot set again.
                    undo.callback(signal.signal, number, signal.SIG_DFL if before is None else before)
        yield stop


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-30:]}"


def _write_tensor(file: BinaryIO, tensor: Tensor) -> dict[str, Any]:
    """Append a tensor's bytes to a file, and return where and what they are."""
    values = tensor.detach().cpu().contiguous()
    content = values.reshape(-1).view(torch.uint8).numpy().data
    entry = {
        "dtype": str(values.dtype).removeprefix("torch."),
        "shape": list(values.shape),
        "offset": file.tell(),
        "crc32": zlib.crc32(content),
    }
    file.write(content)
    return entry


def _read_tensor(path: Path, entry: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, entry["dtype"])
    content = torch.empty(math.prod(entry["shape"]) * dtype.itemsize, dtype=torch.uint8)
    with _opened(path) as file:
        file.seek(entry["offset"])
        length = file.readinto(content.numpy().data)
    if length != len(content) or zlib.crc32(content.numpy().data) != entry["crc32"]:
        raise _damaged(path)
    return content.view(dtype).view(entry["shape"])


def _read_index(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TRAILER.size))
        trailer = file.read()
        if len(trailer) != _TRAILER.size:
            raise _damaged(path)
        offset, length, crc32, magic = _TRAILER.unpack(trailer)
        if magic != _MAGIC or offset + length + _TRAILER.size != size:
            raise _damaged(path)
        file.seek(offset)
        document = file.read(length)
    if zlib.crc32(document) != crc32:
        raise _damaged(path)
    return json.loads(document)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise RunError(f"cannot read the progress in {path}: {error.strerror}") from error


def _damaged(path: Path) -> RunError:
    return RunError(f"the progress in {path} is damaged; add --fresh to start over")


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power; some network file systems cannot, and the save is whole."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
