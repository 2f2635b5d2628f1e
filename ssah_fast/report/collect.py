"""Which files of a folder are results of this package; they are told by their content, not by their names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from ssah_fast import files
from ssah_fast.errors import SsahError
from ssah_fast.partition import Units
from ssah_fast.scores import Scores

# What "kind" says in a JSON document -> what it is called here, and the newest schema that this version reads.
DOCUMENTS = {
    "evaluation": ("evaluations", 1),
    "ablation": ("ablations", 1),
    "probe": ("probes", 1),
    "transfer": ("transfers", 1),
    "landscape": ("landscapes", 1),
    "ssah_fast freeze certificate": ("certificates", 1),
    "finetune": ("tunings", 1),
    "run": ("runs", 1),
}
# A tokenizer.json can have 20 MB and none of ours a tenth of it, units by layer included.
_LARGEST_DOCUMENT = 1 << 26

Content = TypeVar("Content")


@dataclass(frozen=True)
class Source(Generic[Content]):
    """A file and what it holds.

    Attributes:
        path: relative to the folder of the report.
        sha256: of the file's bytes.
        content: the parsed file.
    """

    path: str
    sha256: str
    content: Content

    @property
    def folder(self) -> str:
        """The folder of the file, relative to that of the report; "." for the folder itself."""
        return os.path.dirname(self.path) or "."


@dataclass
class Evidence:
    """Everything found, each list in the order of the paths."""

    directory: Path
    scores: list[Source[Scores]] = field(default_factory=list)
    units: list[Source[Units]] = field(default_factory=list)
    masks: list[Source[dict[str, Any]]] = field(default_factory=list)
    evaluations: list[Source[dict[str, Any]]] = field(default_factory=list)
    ablations: list[Source[dict[str, Any]]] = field(default_factory=list)
    probes: list[Source[dict[str, Any]]] = field(default_factory=list)
    transfers: list[Source[dict[str, Any]]] = field(default_factory=list)
    landscapes: list[Source[dict[str, Any]]] = field(default_factory=list)
    certificates: list[Source[dict[str, Any]]] = field(default_factory=list)
    tunings: list[Source[dict[str, Any]]] = field(default_factory=list)
    runs: list[Source[dict[str, Any]]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def documents(self) -> list[Source[Any]]:
        """All files that were found, in the order of their paths."""
        lists = (self.scores, self.units, self.masks, *(getattr(self, name) for name, _ in DOCUMENTS.values()))
        return sorted((source for found in lists for source in found), key=lambda source: source.path)


def collect(directory: str | os.PathLike[str]) -> Evidence:
    """Read every result in a folder and its subfolders.

    Hidden files and folders are passed over, and links are not followed. A file of ours that is damaged or of a newer
    version is listed in `unreadable` with the reason; every other file is none of ours and is not mentioned.

    Args:
        directory: The folder.

    Returns:
        What was found.

    Raises:
        SsahError: No such folder, or nothing in it to report.
    """
    root = Path(directory)
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise SsahError(f"cannot report on {directory}: it {state}; give the folder with the results")
    evidence = Evidence(root)
    for path in _files(root):
        relative = path.relative_to(root).as_posix()
        try:
            _read(path, relative, evidence)
        except SsahError as error:
            evidence.unreadable.append((relative, str(error)))
    if not evidence.documents():
        damaged = f" that can be read ({evidence.unreadable[0][1]})" if evidence.unreadable else ""
        raise SsahError(
            f"{directory} holds nothing to report{damaged}; put the output of score, identify, eval, ablate, probe, "
            f"transfer, landscape, finetune or verify there"
        )
    return evidence


@contextmanager
def reading(source: Source[Any]) -> Iterator[None]:
    """Name the file where a document turns out not to have the shape that its kind promises.

    Raises:
        SsahError: An entry is missing or of another type.
    """
    try:
        yield
    except SsahError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise SsahError(
            f"cannot report {source.path}: its entries are not those of a {source.content.get('kind')} document "
            f"({type(error).__name__}: {error}); write it again, or move it away"
        ) from error


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.startswith("checkpoint-"))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield path


def _read(path: Path, relative: str, evidence: Evidence) -> None:
    if path.suffix == ".safetensors":
        _read_tensors(path, relative, evidence)
    elif path.suffix == ".json" and path.stat().st_size <= _LARGEST_DOCUMENT:
        _read_document(path, relative, evidence)


def _read_tensors(path: Path, relative: str, evidence: Evidence) -> None:
    if not _is_ours(path):
        return
    header = files.read_header(path)
    digest = files.sha256(path)
    if header["kind"] == "scores":
        evidence.scores.append(Source(relative, digest, Scores.load(path)))
    elif header["kind"] == "units":
        evidence.units.append(Source(relative, digest, Units.load(path)))
    else:
        evidence.masks.append(Source(relative, digest, header))


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            return files.HEADER_KEY in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise SsahError(f"truncated, or not a safetensors file ({error})") from error


def _read_document(path: Path, relative: str, evidence: Evidence) -> None:
    try:
        data = path.read_bytes()
        document = json.loads(data)
    except (OSError, ValueError):
        return
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in DOCUMENTS:
        return
    name, newest = DOCUMENTS[kind]
    schema = document.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= newest:
        raise SsahError(f"its schema is {schema!r}, this ssah_fast reads up to {newest}; upgrade ssah_fast")
    getattr(evidence, name).append(Source(relative, hashlib.sha256(data).hexdigest(), document))
