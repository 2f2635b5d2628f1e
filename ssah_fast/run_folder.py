"""Where a fine-tuning run writes: a working folder with checkpoints, which becomes the output folder when all is done.

`DIR` exists only as a finished result. Until then the run lives in `DIR.unfinished`, beside it, so that the last step
is one rename. A checkpoint counts as complete once its fingerprint file, written last, is there.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssah_fast.errors import ResumeError, SsahError, spelled
from ssah_fast.files import sha256, write_json

MANIFEST = "ssah_manifest.json"
FINGERPRINT = "ssah_fingerprint.json"
_MARKER = ".ssah_fast_run"  # in a working folder: what is in it may be removed
MASK = "ssah/mask.safetensors"  # not beside the weights: vLLM reads every .safetensors file that lies there
SCHEMA = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """The folders of one run. Nothing is written before `open`.

    Args:
        output: The folder that will hold the result.
        argument: What the error messages call it.

    Attributes:
        output: The folder with the result, resolved.
        work: The folder until then.

    Raises:
        SsahError: `output` cannot be written, is a file or a mount point, or holds files that are not from here.
    """

    def __init__(self, output: str | os.PathLike[str], argument: str = "output_dir") -> None:
        self.output = Path(os.path.realpath(output))
        self.work = self.output.with_name(f"{self.output.name}.unfinished")
        self._argument = argument
        self._check(os.fspath(output))

    def checkpoints(self, folder: Path | None = None) -> list[Path]:
        """The complete checkpoints in a folder (None: the working folder), oldest first."""
        found = []
        for path in (folder or self.work).glob("checkpoint-*"):
            step = _CHECKPOINT.fullmatch(path.name)
            if step and (path / FINGERPRINT).is_file():
                found.append((int(step[1]), path))
        return [path for _, path in sorted(found)]

    def find(self, resume: str | os.PathLike[str] | None) -> Path | None:
        """The checkpoint to start from.

        Args:
            resume: None, "latest", or a folder: a checkpoint, or one that holds checkpoints.

        Returns:
            The checkpoint, or None to start from the beginning: nothing was asked for, or "latest" and there is none.

        Raises:
            SsahError: There is no complete checkpoint in the folder; or there are some and nothing was asked for.
        """
        if resume is None or resume == "latest":
            found = self.checkpoints()
            if found and resume is None:
                raise SsahError(
                    f"{self._argument}: {self.work} holds {found[-1].name} of an unfinished run; continue it with "
                    f"{spelled('resume_from_checkpoint', self._argument)} latest, or delete that folder"
                )
            return found[-1] if found else None
        folder = Path(resume)
        if (folder / FINGERPRINT).is_file():
            return folder
        found = self.checkpoints(folder)
        if not found:
            raise SsahError(
                f"{spelled('resume_from_checkpoint', self._argument)} {resume} is no complete checkpoint of ssah-fast "
                f"finetune; give one, or latest"
            )
        return found[-1]

    def open(self) -> None:
        """Make the working folder and remove from it what a killed run left half-written."""
        self.work.mkdir(exist_ok=True)
        kept = {self.work / _MARKER, *self.checkpoints()}
        (self.work / _MARKER).touch()
        for path in self.work.iterdir():
            if path not in kept:
                _remove(path)

    def abandon(self) -> None:
        """After a failure: keep complete checkpoints, and nothing else."""
        if self.work.is_dir():
            self.open()
            if not self.checkpoints():
                _remove(self.work)

    def seal(self, checkpoint: Path, fingerprint: Mapping[str, Any], limit: int) -> None:
        """Mark a checkpoint as complete, then delete the oldest ones beyond `limit`."""
        write_json(checkpoint / FINGERPRINT, fingerprint)
        for old in self.checkpoints()[:-limit]:
            _remove(old)

    def publish(self, manifest: Mapping[str, Any], *, keep_checkpoints: bool) -> None:
        """Write the manifest, with the hash of every file, and rename the working folder to the output folder."""
        if not keep_checkpoints:
            for path in self.checkpoints():
                _remove(path)
        (self.work / _MARKER).unlink()
        write_json(self.work / MANIFEST, {**manifest, "files": _hashes(self.work)})
        old = self.output.with_name(f".{self.output.name}.{secrets.token_hex(4)}.old")
        if self.output.exists():
            os.replace(self.output, old)
        os.replace(self.work, self.output)
        shutil.rmtree(old, ignore_errors=True)

    def finished(self) -> dict[str, Any] | None:
        """The manifest of the output folder; None if there is no finished result."""
        path = self.output / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) and manifest.get("kind") == "finetune" else None

    def _check(self, given: str) -> None:
        parent = self.output.parent
        if not parent.is_dir():
            raise SsahError(f"{self._argument} {given}: the folder {parent} does not exist; create it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise SsahError(f"{self._argument} {given}: the folder {parent} is not writable")
        for path in (self.output, self.work):
            if path.exists() and not path.is_dir():
                raise SsahError(f"{self._argument} {given}: {path} is a file; choose another name")
        if os.path.ismount(self.output):
            raise SsahError(f"{self._argument} {given} is a mount point, which cannot be renamed; add a folder inside")
        if self.work.exists() and any(self.work.iterdir()) and not (self.work / _MARKER).is_file():
            raise SsahError(f"{self._argument} {given}: {self.work} holds other files; move them away")
        held = sorted(path.name for path in self.output.iterdir()) if self.output.is_dir() else []
        if held and self.finished() is None:
            raise SsahError(
                f"{self._argument} {given} holds {held[0]!r} and no result of ssah-fast finetune; choose another folder"
            )


def read_fingerprint(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made with.

    Raises:
        SsahError: The file is damaged.
    """
    try:
        return dict(json.loads((checkpoint / FINGERPRINT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SsahError(f"cannot read {checkpoint / FINGERPRINT}: {error}; resume from another checkpoint") from error


def check_fingerprint(checkpoint: Path, expected: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint that this run would not have made.

    Raises:
        ResumeError: Something that decides the result differs; the message names it.
    """
    stored = read_fingerprint(checkpoint)
    for key in dict.fromkeys([*expected, *stored]):
        if stored.get(key) != expected.get(key):
            raise ResumeError(
                f"cannot resume from {checkpoint}: its {key} is {_short(stored.get(key))}, that of this run is "
                f"{_short(expected.get(key))}; resume with the settings of the checkpoint, or start anew elsewhere"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:13]}...{text[-5:]}"


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file outside of checkpoints."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return {name: sha256(folder / name) for name in names if not _CHECKPOINT.match(name)}


def _remove(path: Path) -> None:
    """Remove a file or a folder; of a checkpoint the fingerprint first, so that half of it never counts as whole."""
    if path.is_dir() and not path.is_symlink():
        (path / FINGERPRINT).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink()
