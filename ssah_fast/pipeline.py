"""Runs the steps of a recipe: skips what is done and unchanged, goes on after a kill, and keeps a summary in run.json.

A step is done when its record (`<folder>/.steps/<name>.json`) says so and what the record was made from is unchanged:
the command line, the contents of the local files that it reads, the version of this package, and the output's contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import ssah_fast
from ssah_fast.errors import RunError, SsahError
from ssah_fast.files import sha256, write_json
from ssah_fast.fingerprints import versions
from ssah_fast.recipe import FOLDER, PROGRAM, RECORDS, SUMMARY, Recipe, Step, place

SCHEMA = 1
# What commands keep beside an output until it is finished: `finetune` and `score`.
_LEFTOVERS = (".unfinished", ".progress")
_RESUME = ("--resume-from-checkpoint", "latest")

Report = Callable[[Step, str, bool], None]
"""Called before each step with the step, its command line for a shell, and whether it is skipped."""


class StepError(RunError):
    """A step ended with an exit code that its recipe does not allow.

    Attributes:
        exit_code: The step's.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def choose(recipe: Recipe, only: Sequence[str] = (), start: str | None = None) -> tuple[str, ...]:
    """The names of the steps that a run is about.

    Args:
        recipe: The recipe.
        only: These alone; empty: all.
        start: This one and all that follow.

    Raises:
        SsahError: There is no such step.
    """
    names = [step.name for step in recipe.steps]
    for option, given in [*(("--only", name) for name in only), *([("--from", start)] if start else [])]:
        if given not in names:
            raise SsahError(f"{option} {given}: no such step; there are {', '.join(names)}")
    late = names[names.index(start) :] if start else names
    return tuple(name for name in late if not only or name in only)


class Pipeline:
    """A recipe in its run folder.

    Args:
        recipe: From `load_recipe`, with the same folder.
        folder: The run folder; made by `run`.
        commands: The group that has the commands.

    Raises:
        SsahError: The folder cannot be made, or is a file.
    """

    def __init__(self, recipe: Recipe, folder: str | os.PathLike[str], commands: click.Group) -> None:
        self._recipe, self._folder, self._commands = recipe, Path(folder), commands
        self._hashes = _Hashes()
        parent = Path(os.path.abspath(folder)).parent
        if not parent.is_dir():
            raise SsahError(f"--output {folder}: the folder {parent} does not exist; create it first")
        if self._folder.exists() and not self._folder.is_dir():
            raise SsahError(f"--output {folder} is a file; choose another name")

    def line(self, step: Step) -> str:
        """The command line of a step as a shell takes it."""
        return shlex.join([*step.launcher, PROGRAM, *self._words(step)])

    def plan(self, chosen: Sequence[str], *, force: bool = False) -> list[tuple[Step, bool]]:
        """The chosen steps, and for each whether it would be skipped; one whose inputs are to be made is not."""
        made: list[tuple[Step, bool]] = []
        to_run: set[str] = set()
        for step in self._recipe.steps:
            if step.name in chosen:
                skipped = not force and not to_run.intersection(step.needs) and self._is_done(step)
                made.append((step, skipped))
                to_run |= set() if skipped else {step.name}
        return made

    def run(self, chosen: Sequence[str], *, force: bool = False, report: Report | None = None) -> dict[str, Any]:
        """Run the chosen steps in order, but those that are done.

        Args:
            chosen: From `choose`; the other steps are left as they are.
            force: Run them from their beginning, done or not.
            report: Called before each.

        Returns:
            The document that is then in run.json.

        Raises:
            SsahError: A step failed (the command's own error, with the step's name in front), the output of a step that
                was not chosen is missing, or another run is going on in the folder.
            StepError: A step ended with another exit code.
        """
        self._check_made(chosen)
        (self._folder / RECORDS).mkdir(parents=True, exist_ok=True)
        with self._locked():
            skipped: dict[str, bool] = {}
            for step in self._recipe.steps:
                if step.name not in chosen:
                    continue
                skipped[step.name] = not force and self._is_done(step)
                if report is not None:
                    report(step, self.line(step), skipped[step.name])
                if not skipped[step.name]:
                    self._write_summary(skipped)  # the step may be the one that reads it
                    self._do(step, force)
                self._write_summary(skipped)
            return self._summary(skipped)

    def _do(self, step: Step, force: bool) -> None:
        key, record = self._key(step), self._record(step)
        resumed = not force and record is not None and record["key"] == key and record["exit"] is None
        output = None if step.output is None else self._folder / step.output
        if output is not None:
            if record is not None and not resumed:
                _remove(output)
            output.parent.mkdir(parents=True, exist_ok=True)
        self._write_record(step, {"key": key, "exit": None})
        began = time.monotonic()
        code = self._call(step, [*self._words(step), *(_RESUME if resumed and step.resumable else ())])
        seconds = round(time.monotonic() - began, 3)
        made = None if output is None else self._hashes.of(output)
        self._write_record(step, {"key": key, "exit": code, "seconds": seconds, "output": made})

    def _call(self, step: Step, words: Sequence[str]) -> int:
        """Run one command line; return its exit code if that is 0 or allowed."""
        try:
            if step.launcher:
                code = _launch([*step.launcher, PROGRAM, *words])
            else:
                result = self._commands.main(args=list(words), prog_name=PROGRAM, standalone_mode=False)
                code = result if isinstance(result, int) else 0
        except SsahError as error:
            if error.exit_code not in step.allow:
                raise type(error)(f"step {step.name}: {error}") from error
            code = error.exit_code
        except click.ClickException as error:
            raise SsahError(f"step {step.name}: {error.format_message()}") from error
        if code and code not in step.allow:
            raise StepError(f"step {step.name} ended with exit code {code}", code)
        return code

    def _words(self, step: Step) -> list[str]:
        return [word.replace(FOLDER, os.fspath(self._folder)) for word in step.words]

    def _check_made(self, chosen: Sequence[str]) -> None:
        for step in self._recipe.steps:
            # A step that reads the whole run folder takes what there is.
            needs = step.needs if step.name in chosen and FOLDER not in step.inputs else ()
            for need in needs:
                output = self._folder / str(self._recipe.step(need).output)
                if need not in chosen and not output.exists():
                    raise SsahError(f"step {step.name} needs {output}, and step {need} has not run; choose it too")

    # records

    def _is_done(self, step: Step) -> bool:
        record = self._record(step)
        if record is None or record["exit"] is None or record["key"] != self._key(step):
            return False
        return step.output is None or record["output"] == self._hashes.of(self._folder / step.output)

    def _key(self, step: Step) -> dict[str, Any]:
        """What decides the result of a step, as JSON gives it back."""
        return {
            "line": [*step.launcher, *step.words],
            "version": ssah_fast.__version__,
            "inputs": {path: self._digest(step, path) for path in step.inputs},
        }

    def _digest(self, step: Step, path: str) -> Any:
        """The contents of an input; of the run folder, which changes all the time, the outputs of the steps before."""
        if os.path.normpath(path) != FOLDER:
            return self._hashes.of(place(path, self._folder))
        records = {name: self._record(self._recipe.step(name)) for name in step.needs}
        made = {name: record and record.get("output") for name, record in records.items()}
        return {"title": self._recipe.title, "published": self._recipe.published, "outputs": made}

    def _record(self, step: Step) -> dict[str, Any] | None:
        try:
            record = json.loads(self._record_path(step).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # none, or not one of ours: the step runs
        return record if isinstance(record, dict) and {"key", "exit"} <= record.keys() else None

    def _write_record(self, step: Step, record: Mapping[str, Any]) -> None:
        write_json(self._record_path(step), record)

    def _record_path(self, step: Step) -> Path:
        return self._folder / RECORDS / f"{step.name}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep a second run out of the folder; the system gives the lock back however this process ends."""
        with open(self._folder / RECORDS / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SsahError(
                    f"--output {self._folder}: another run is going on in this folder; wait for it"
                ) from error
            yield

    # run.json

    def _summary(self, skipped: Mapping[str, bool]) -> dict[str, Any]:
        return {
            "kind": "run",
            "schema": SCHEMA,
            "title": self._recipe.title,
            "recipe": self._recipe.path,
            "published": self._recipe.published,
            "steps": [self._entry(step, skipped.get(step.name, True)) for step in self._recipe.steps],
            "versions": versions(),
        }

    def _entry(self, step: Step, skipped: bool) -> dict[str, Any]:
        record = self._record(step) or {}
        return {
            "name": step.name,
            "title": step.title,
            "command": step.command,
            "line": self.line(step),
            "output": step.output,
            "seconds": record.get("seconds"),
            "skipped": skipped,
            "exit": record.get("exit"),
        }

    def _write_summary(self, skipped: Mapping[str, bool]) -> None:
        write_json(self._folder / SUMMARY, self._summary(skipped))


class _Hashes:
    """SHA-256 of files and folders; a file whose size and time are the same is read once per run."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], str] = {}

    def of(self, path: Path) -> str | None:
        """The hash of a file, or of the names and hashes of all files in a folder; None: there is nothing."""
        if path.is_file():
            return self._file(path)
        if not path.is_dir():
            return None
        files = sorted(item for item in path.rglob("*") if item.is_file())
        listing = [[item.relative_to(path).as_posix(), self._file(item)] for item in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def _file(self, path: Path) -> str:
        status = path.stat()
        key = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
        if key not in self._known:
            self._known[key] = sha256(path)
        return self._known[key]


def _launch(words: Sequence[str]) -> int:
    """Run a program to its end; Ctrl-C reaches it by itself, and SIGTERM is handed on."""
    with _handing_on() as children:
        try:
            children.append(subprocess.Popen(words))
        except OSError as error:
            raise RunError(f"cannot start {words[0]}: {error.strerror}") from error
        while True:
            try:
                code = children[0].wait()
            except KeyboardInterrupt:
                continue  # it decides how it ends: `score`, for example, saves its progress first
            return 128 - code if code < 0 else code  # as shells report a signal


@contextlib.contextmanager
def _handing_on() -> Iterator[list[subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []
    if threading.current_thread() is not threading.main_thread():
        yield children
        return

    def hand_on(*_: object) -> None:
        for child in children:
            child.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield children
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove(output: Path) -> None:
    """Remove an output that its step is about to make anew, and what is left of an unfinished one."""
    for path in (output, *(output.with_name(output.name + ending) for ending in _LEFTOVERS)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
