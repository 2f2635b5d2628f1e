"""The hidden states between two decoder layers, one tensor per batch: on the device, in host memory or in a file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssah_fast.errors import RunError

PLACES = ("device", "host", "file")


class _Slot(NamedTuple):
    """Where one batch's tensor lies in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class HiddenStates:
    """What the batches carry from one layer to the next. A context manager: it holds memory or a file.

    Every batch's tensor is replaced by one of the same shape and dtype, layer after layer.

    Args:
        place: "device"; "host" (pinned where the device is a GPU); or "file", written and read as a whole and not
            mapped, because mapped pages would count as memory of the process.
        device: where the tensors are used.
        folder: of the file, which has no name there; None: the system's folder for temporary files.
    """

    def __init__(self, place: str, device: torch.device, folder: Path | None = None) -> None:
        self._place, self._device = place, device
        self._tensors: dict[int, Tensor] = {}
        self._slots: dict[int, _Slot] = {}
        self._end = 0
        self._file = tempfile.TemporaryFile(dir=folder) if place == "file" else None

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and disk back."""
        self.clear()
        if self._file is not None:
            self._file.close()

    def clear(self) -> None:
        """Keep nothing; batches may have other shapes from now on."""
        self._tensors.clear()
        self._slots.clear()
        self._end = 0

    def put(self, batch: int, states: Tensor) -> None:
        """Keep the hidden states of a batch.

        Args:
            batch: its number.
            states: [B, T, H]; may be overwritten later, never while it is kept.

        Raises:
            RunError: the file cannot be written, for example because the disk is full.
        """
        if self._place == "device":
            self._tensors[batch] = states
        elif self._place == "host":
            if batch not in self._tensors:
                pinned = self._device.type == "cuda"
                self._tensors[batch] = torch.empty(states.shape, dtype=states.dtype, pin_memory=pinned)
            self._tensors[batch].copy_(states, non_blocking=True)
        else:
            self._write(batch, states.cpu().contiguous())

    def take(self, batch: int) -> Tensor:
        """The hidden states of a batch, on the device; they may be gone from here until they are put again."""
        if self._place == "device":
            return self._tensors.pop(batch)
        if self._place == "host":
            return self._tensors[batch].to(self._device, non_blocking=True)
        return self._read(batch).to(self._device)

    def on_host(self, batches: int) -> Iterator[Tensor]:
        """The hidden states of batch 0, 1, ..., on the CPU, one at a time; an empty tensor for one that is not here."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        nothing = torch.empty(0)
        for batch in range(batches):
            if self._place == "file":
                yield self._read(batch) if batch in self._slots else nothing
            else:
                yield self._tensors.get(batch, nothing).cpu()

    def _write(self, batch: int, states: Tensor) -> None:
        if batch not in self._slots:
            self._slots[batch] = _Slot(self._end, states.shape, states.dtype)
            self._end += states.numel() * states.element_size()
        view, offset = _bytes_of(states), self._slots[batch].offset
        while view:
            try:
                written = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
                raise RunError(f"cannot write the hidden states to a temporary file: {reason}") from error
            view, offset = view[written:], offset + written

    def _read(self, batch: int) -> Tensor:
        slot = self._slots[batch]
        states = torch.empty(slot.shape, dtype=slot.dtype)
        view, offset = _bytes_of(states), slot.offset
        while view:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise RunError(f"cannot read the hidden states back: {error.strerror}") from error
            if count == 0:
                raise RunError("cannot read the hidden states back: their file became shorter")
            view, offset = view[count:], offset + count
        return states

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise RunError("the hidden states are not in a file")
        return self._file.fileno()


def _bytes_of(x: Tensor) -> memoryview:
    return x.reshape(-1).view(torch.uint8).numpy().data
