"""What a model answered: JSON lines that are appended while a run lasts, and from which a killed run goes on."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssah_fast.errors import ResumeError, RunError, SsahError, first_difference

NAME = "completions.jsonl"
KIND = "completions"
SCHEMA = 1


@dataclass(frozen=True)
class Completion:
    """One answer of a model.

    Attributes:
        set: Which set of prompts it belongs to, such as "asr".
        index: Number of the prompt in its set, from 0.
        sample: Number of the answer to that prompt, from 0.
        system: Name of the system prompt; "none" where there was none.
        variant: "" is the model as it is; an ablation names its own.
        prompt: The request, as in the data.
        text: The answer, without special tokens.
        tokens: New tokens, the end-of-sequence token included.
        finished: Whether the model ended the answer itself, before the limit of new tokens.
        nll: Mean negative log-likelihood in nats of the new tokens under the reference model; None: not measured.
    """

    set: str
    index: int
    sample: int
    system: str
    variant: str
    prompt: str
    text: str
    tokens: int
    finished: bool
    nll: float | None


class CompletionFile:
    """`<directory>/completions.jsonl`: a line with the settings, then a line per completion, in the order made.

    A file of the same settings is continued: `take` hands out what is saved, then `append` adds to it.

    Args:
        directory: An existing folder.
        settings: Everything that decides the completions; JSON.
        fresh: Start over, whatever the file holds.

    Raises:
        ResumeError: The file holds completions of other settings.
        SsahError: The file is not one of ours.
        RunError: It cannot be read or written.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = Path(directory) / NAME
        self.settings = json.loads(json.dumps(settings, allow_nan=False))  # as reading the file would give them
        header = _line({"kind": KIND, "schema": SCHEMA, "settings": self.settings})
        self._saved: list[tuple[Completion, int]] = []  # each with the offset at which its line ends
        if self.path.exists() and not fresh:
            found, self._saved = _read(self.path)
            difference = first_difference(found, self.settings, "settings")
            if self._saved and difference is not None:
                name, before, now = difference
                raise ResumeError(
                    f"{self.path} is of another run: {name} is {now!r} here and {before!r} there; choose another "
                    "folder, or add --fresh to start over"
                )
        self._end = len(header)
        if not self._saved:
            write_at(self.path, 0, header)

    def take(self, sizes: Sequence[int]) -> list[list[Completion]]:
        """The saved completions of the next batches, until one that is not whole; the rest of the file is dropped.

        Args:
            sizes: Completions of each batch.
        """
        batches = []
        for size in sizes:
            if len(self._saved) < size:
                self._saved = []
                break
            batch, self._saved = self._saved[:size], self._saved[size:]
            self._end = batch[-1][1]
            batches.append([completion for completion, _ in batch])
        return batches

    def append(self, completions: Sequence[Completion]) -> None:
        """Add a batch behind what was taken or appended last; it is on the disk when this returns.

        Raises:
            RunError: It cannot be written.
        """
        lines = b"".join(_line(asdict(completion)) for completion in completions)
        write_at(self.path, self._end, lines)
        self._end += len(lines)


def write_at(path: Path, offset: int, lines: bytes) -> None:
    """Write lines in place of all that a file has from an offset on; they are on the disk when this returns.

    Raises:
        RunError: It cannot be written.
    """
    try:
        with open(path, "r+b" if offset else "wb") as file:
            file.seek(offset)
            file.truncate()
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def read_completions(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Completion]]:
    """The settings and completions of a folder, as far as they were written.

    Raises:
        SsahError: There is no completions file, or it is not one of ours.
        RunError: It cannot be read.
    """
    path = Path(directory) / NAME
    if not path.is_file():
        raise SsahError(f"{directory} has no {NAME}; generate first, without --judge-only")
    settings, saved = _read(path)
    return settings, [completion for completion, _ in saved]


def _line(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read(path: Path) -> tuple[dict[str, Any], list[tuple[Completion, int]]]:
    """The settings, and each completion with the offset of its end; a line without its end was torn by a kill."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    if not lines:
        return {}, []
    saved: list[tuple[Completion, int]] = []
    end = len(lines[0]) + 1
    try:
        header = json.loads(lines[0])
        if header["kind"] != KIND or header["schema"] != SCHEMA:
            raise ValueError(f"its first line says {header['kind']!r}, schema {header['schema']!r}")
        for line in lines[1:]:
            end += len(line) + 1
            saved.append((Completion(**json.loads(line)), end))
        return header["settings"], saved
    except (ValueError, TypeError, KeyError) as error:
        where = f"line {len(saved) + 2}" if saved else "its beginning"
        raise SsahError(
            f"{path} is not a completions file of ssah_fast, or damaged at {where} ({error}); move it away, or add "
            "--fresh to start over"
        ) from error
