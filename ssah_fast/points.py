"""Points of a landscape that are done: JSON lines, appended while a run lasts, from which every later run takes.

A point is known by what decides its figures (`key_of`), not by the run that measured it: a run with a finer grid, more
directions or another shape finds the points that it shares with those before it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssah_fast.errors import RunError, SsahError
from ssah_fast.evaluation.completions import write_at

_FILES = "points-*.jsonl"


def key_of(document: Any) -> str:
    """The SHA-256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


class PointStore:
    """The points in a folder, from all processes and all runs; without a folder they last as long as this object.

    Args:
        folder: An existing one; None: nothing is kept.
        rank: This process's number; it writes `points-<rank>.jsonl`, after a call of `read`, which reads those of all.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, rank: int = 0) -> None:
        self._folder = None if folder is None else Path(folder)
        self._own = None if folder is None else Path(folder) / _FILES.replace("*", str(rank))
        self._end = 0  # where this process's next line goes; behind it there may be one that was torn by a kill
        self._points: dict[str, dict[str, Any]] = {}
        self._answered: dict[str, dict[str, Any]] = {}

    def forget(self) -> None:
        """Remove the files of all processes; call it before `read`.

        Raises:
            RunError: A file cannot be removed.
        """
        for path in self._paths():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"cannot remove {path}: {error.strerror or error}") from error

    def read(self) -> None:
        """Take in what the processes, and earlier runs, have written so far.

        Raises:
            SsahError: A file is not one of ours.
            RunError: A file cannot be read.
        """
        for path in self._paths():
            end = self._read(path)
            if path == self._own:
                self._end = end

    def get(self, key: str) -> dict[str, Any] | None:
        """The point of a key, as it was added."""
        return self._points.get(key)

    def answers(self, key: str) -> list[dict[str, Any]] | None:
        """The answers that any point with this "answers_key" was judged by."""
        found = self._answered.get(key)
        return None if found is None else found["answers"]

    def add(self, point: Mapping[str, Any]) -> None:
        """Keep a point; its line is on the disk when this returns.

        Args:
            point: JSON, with "key"; with "answers" also "answers_key".

        Raises:
            RunError: The file cannot be written.
        """
        line = json.dumps(point, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self._own is not None:
            write_at(self._own, self._end, line)
            self._end += len(line)
        self._take(json.loads(line))

    def _paths(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob(_FILES))

    def _read(self, path: Path) -> int:
        """Take in the whole lines of a file; where they end."""
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from error
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise SsahError(
                    f"{path} is damaged or not of ssah_fast, line {number} ({error}); move it away, or add --fresh"
                ) from error
        return sum(len(line) + 1 for line in lines)

    def _take(self, point: dict[str, Any]) -> None:
        self._points[point["key"]] = point
        if point.get("answers"):
            self._answered[point["answers_key"]] = point
