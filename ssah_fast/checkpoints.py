"""Checkpoint folders: their safetensors files, and the tensors in them by the names that they have in the model.

Files are read with pread and not mapped: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from ssah_fast.errors import RunError, SsahError
from ssah_fast.loading import empty_model, explained, silent

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files of a hub repository that say what its weights are; others (consolidated.safetensors, pickles) are not loaded.
_HUB_FILES = ["config.json", "adapter_config.json", "model*.safetensors", INDEX]
_PICKLED = "pytorch_model*.bin"
# Where numpy has no such type, unsigned integers of its width.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Checkpoint:
    """The tensors of a folder, by the names that the model's parameters have. A context manager: it keeps files open.

    Args:
        argument: what errors call it.
        name: a folder in Hugging Face format or a hub id.

    Attributes:
        folder: where its files are.
        model: the model on the meta device: names and shapes without weights.
        metadata: the bytes of config.json and, where that is what counts, of the index, by file name.
        files: the safetensors files.
        tensors: the stored tensors by the name of the parameter, in the order of the files. A parameter that is stored
            in pieces, such as one matrix per expert, is one tensor.
        tied: per parameter that shares its tensor, the names of all that do.

    Raises:
        SsahError: the folder is missing, incomplete, pickled, damaged or an adapter.
    """

    def __init__(self, argument: str, name: str) -> None:
        self.name = name
        self.folder = checkpoint_folder(argument, name)
        self.model = empty_model(os.fspath(self.folder), any_architecture=True)
        self.metadata, self.files = open_weights(self.folder)
        try:
            self.tensors = self._tensors()
        except SsahError:
            self.close()
            raise
        groups: dict[str, set[str]] = {}
        for target, source in self.model.all_tied_weights_keys.items():
            groups.setdefault(source, {source}).add(target)
        self.tied = {member: sorted(group) for group in groups.values() for member in group}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def aliases(self, name: str) -> list[str]:
        """A name and those of parameters that are the same tensor."""
        return [name, *(other for other in self.tied.get(name, ()) if other != name)]

    def get(self, name: str) -> AnyTensor | None:
        """The tensor that is loaded under a name: its own, or one that it is tied to."""
        return next((self.tensors[alias] for alias in self.aliases(name) if alias in self.tensors), None)

    def names(self) -> list[str]:
        """Every name under which a stored tensor is loaded, those in the files first and in their order."""
        return list(dict.fromkeys([*self.tensors, *(name for name in self.tied if self.get(name) is not None)]))

    def sources(self, buffer: np.ndarray) -> dict[str, Any]:
        """Where it came from, and size and SHA-256 of every file that was read."""
        hashed = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in self.metadata.items()
        }
        for file in self.files:
            hashed[file.path.name] = {"bytes": file.size, "sha256": file.sha256(buffer)}
        commit = self.folder.name if self.folder.parent.name == "snapshots" else None
        return {"source": self.name, "commit": commit, "files": hashed}

    def _tensors(self) -> dict[str, AnyTensor]:
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter) and _joins(rule)]
        pieces: dict[str, dict[str, dict[str, StoredTensor]]] = {}  # parameter, pattern of its source, key
        tensors: dict[str, AnyTensor] = {}
        for file in self.files:
            for key in file.header:
                name, pattern = rename_source_key(key, renamings, converters, prefix, state)
                if pattern is None or name not in state:
                    name, pattern = rename_source_key(key, renamings, [], prefix, state)[0], None
                found = tensors if pattern is None else pieces.setdefault(name, {}).setdefault(pattern, {})
                known = name if pattern is None else key
                if known in found:
                    raise held_twice(self.folder, known, found[known].file, file)
                found[known] = file.tensor(key)
        rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        for name, sources in pieces.items():
            if name in tensors:
                raise SsahError(
                    f"{self.name} holds {name} twice, whole and in pieces; save it again into an empty folder"
                )
            joined = _join(name, rule_of[next(iter(sources))], sources)
            if joined.shape != tuple(state[name].shape):
                raise SsahError(
                    f"{self.name} is incomplete: what it holds of {name} makes {list(joined.shape)}, its config.json "
                    f"implies {list(state[name].shape)}; download it again"
                )
            tensors[name] = joined
        return tensors


class _Elements:
    """What a dtype and a shape imply."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, eq=False)
class StoredTensor(_Elements):
    """A tensor in a file.

    Attributes:
        file: the file, open as long as its checkpoint is.
        dtype: its name in safetensors, one of `NUMPY_DTYPES`.
        shape: as stored; () for a scalar.
        offset: of its first byte, from the start of the file.
        size: in bytes.
    """

    file: SafetensorsFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def starts(self) -> tuple[int, ...]:
        """The elements at which a piece begins."""
        return (0,)

    def place(self, element: int) -> tuple[str, int]:
        """Where an element lies: the name of the file, and the place in it."""
        return self.file.path.name, self.offset + element * self.itemsize

    def read(self, element: int, buffer: np.ndarray) -> None:
        """Fill `buffer`, uint8, with the bytes from an element on.

        Raises:
            RunError: the file cannot be read, or became shorter.
        """
        self.file.read(self.offset + element * self.itemsize, buffer)


@dataclass(frozen=True, eq=False)
class JoinedTensor(_Elements):
    """A parameter that is stored in pieces; they follow one another in the order of its elements.

    Attributes:
        dtype: as for `StoredTensor`, of all pieces.
        shape: of the parameter.
        pieces: stored tensors, each with its first element that is meant and their number.
        starts: the elements of the parameter at which the pieces begin.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[StoredTensor, int, int], ...]
    starts: tuple[int, ...]

    @property
    def file(self) -> SafetensorsFile:
        """The file of the first piece."""
        return self.pieces[0][0].file

    @property
    def size(self) -> int:
        """In bytes."""
        return self.numel * self.itemsize

    def place(self, element: int) -> tuple[str, int]:
        """As for `StoredTensor`."""
        piece = bisect.bisect_right(self.starts, element) - 1
        stored, first, _ = self.pieces[piece]
        return stored.place(first + element - self.starts[piece])

    def read(self, element: int, buffer: np.ndarray) -> None:
        """As for `StoredTensor`."""
        piece = bisect.bisect_right(self.starts, element) - 1
        skipped, filled = element - self.starts[piece], 0
        while filled < buffer.nbytes:
            stored, first, count = self.pieces[piece]
            size = min((count - skipped) * self.itemsize, buffer.nbytes - filled)
            stored.read(first + skipped, buffer[filled : filled + size])
            piece, skipped, filled = piece + 1, 0, filled + size


AnyTensor = StoredTensor | JoinedTensor


class SafetensorsFile:
    """An open safetensors file, and its SHA-256 from the same reads as far as they come in order.

    Attributes:
        path: where it is.
        size: in bytes.
        start: where the data begin, behind the header.
        header: per stored name, in the order of the file, its "dtype", "shape" and "data_offsets" (from `start` on).
        header_sha256: of everything before the data.

    Raises:
        SsahError: it is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="np"):  # checks that the header is sound and covers the file without holes
                pass
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except SafetensorError as error:
            raise SsahError(f"{path} is truncated or not a safetensors file ({error}); download it again") from error
        except OSError as error:
            raise SsahError(f"cannot read {path}: {error.strerror or error}") from error
        self.size = os.fstat(self._descriptor).st_size
        self._hash, self._hashed = hashlib.sha256(), 0
        length = np.zeros(8, np.uint8)
        self.read(0, length)
        self.start = 8 + int(length.view("<u8")[0])
        header = np.zeros(self.start - 8, np.uint8)
        self.read(8, header)
        stored = json.loads(header.tobytes())
        stored.pop("__metadata__", None)
        self.header = dict(sorted(stored.items(), key=lambda item: item[1]["data_offsets"]))
        self.header_sha256 = self._hash.hexdigest()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def tensor(self, key: str) -> StoredTensor:
        """Where a tensor of the header lies.

        Raises:
            SsahError: it is of a type that is not read here.
        """
        entry = self.header[key]
        if entry["dtype"] not in NUMPY_DTYPES:
            raise SsahError(
                f"{self.path}: {key} is stored as {entry['dtype']}, which is not read here; "
                f"save the model as one of {', '.join(NUMPY_DTYPES)}"
            )
        start, end = entry["data_offsets"]
        return StoredTensor(self, entry["dtype"], tuple(entry["shape"]), self.start + start, end - start)

    def read(self, offset: int, buffer: np.ndarray) -> None:
        """As `fill`, for reads that come one after another and that the hash is to include."""
        self.fill(offset, buffer)
        if offset == self._hashed:
            self._hash.update(buffer.data)
            self._hashed += buffer.nbytes

    def fill(self, offset: int, buffer: np.ndarray) -> None:
        """Fill `buffer`, uint8, with the bytes from `offset` on; several threads may at once.

        Raises:
            RunError: the file cannot be read, or became shorter.
        """
        view, filled = buffer.data, 0
        while filled < buffer.nbytes:
            try:
                count = os.preadv(self._descriptor, [view[filled:]], offset + filled)
            except OSError as error:
                raise RunError(f"cannot read {self.path}: {error.strerror or error}") from error
            if count == 0:
                raise RunError(f"cannot read {self.path}: it became shorter while it was read")
            filled += count

    def sha256(self, buffer: np.ndarray) -> str:
        """The hash of the whole file; reads, through `buffer` (uint8), what was not read in order."""
        while self._hashed < self.size:
            self.read(self._hashed, buffer[: min(buffer.nbytes, self.size - self._hashed)])
        return self._hash.hexdigest()


def checkpoint_folder(argument: str, name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded where `name` is a hub id; it has a config and safetensors weights.

    Args:
        argument: what errors call it.
        name: a folder in Hugging Face format or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        SsahError: it is missing, a file, an adapter, or without config or safetensors weights.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise SsahError(f"{argument} {name} is a file; give a folder in Hugging Face format or a hub id")
    if not path.exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise SsahError(f"{argument} {name!r} does not exist; give a folder in Hugging Face format or a hub id")
        with silent(), explained(name):
            path = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    if (path / "adapter_config.json").is_file():
        raise SsahError(
            f"{argument} {name} is a PEFT adapter; merge it into its base model (peft's merge_and_unload, then "
            "save_pretrained) and give the merged folder"
        )
    if not (path / "config.json").is_file():
        raise SsahError(f"{argument} {name} has no config.json; give a folder in Hugging Face format or a hub id")
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        pickled = next((file.name for file in sorted(path.glob("*.bin"))), None)
        found = f"pickled weights ({pickled}), which are not read" if pickled else f"neither {SINGLE} nor {INDEX}"
        raise SsahError(f"{argument} {name} has {found}; write safetensors with transformers' save_pretrained")
    return path


def pickled_weights(name: str, revision: str | None = None) -> list[Path]:
    """Find the pickled weights of a checkpoint that has no others; those of a hub id are downloaded.

    Args:
        name: a folder in Hugging Face format or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        SsahError: the hub cannot be reached.
    """
    folder = Path(name)
    if not folder.is_dir():
        with silent(), explained(name):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
            if not any(folder.glob("model*.safetensors")):
                snapshot_download(name, revision=revision, allow_patterns=_PICKLED)
    return [] if any(folder.glob("model*.safetensors")) else sorted(folder.glob(_PICKLED))


def open_weights(folder: Path) -> tuple[dict[str, bytes], list[SafetensorsFile]]:
    """Open what transformers loads from a folder.

    Args:
        folder: as `checkpoint_folder` returns it.

    Returns:
        The bytes of config.json and, where that is what counts, of the index, by file name; the safetensors files.

    Raises:
        SsahError: a file is missing or damaged, or the index names a tensor that no file holds.
    """
    # transformers takes the single file where there are both, so it is what a user of the folder gets.
    sharded = not (folder / SINGLE).is_file()
    metadata = {file: (folder / file).read_bytes() for file in ("config.json", *([INDEX] if sharded else []))}
    shards = _shards(folder / INDEX, metadata[INDEX]) if sharded else {}
    files: list[SafetensorsFile] = []
    try:
        for file in sorted(set(shards.values())) or [SINGLE]:
            files.append(SafetensorsFile(folder / file))
        held: dict[str, SafetensorsFile] = {}
        for opened in files:
            if twice := held.keys() & opened.header.keys():
                raise held_twice(folder, min(twice), held[min(twice)], opened)
            held.update(dict.fromkeys(opened.header, opened))
        absent = shards.keys() - held.keys()
        if absent:
            raise SsahError(f"{folder} is incomplete: its index names {min(absent)}, which no shard holds")
    except SsahError:
        for opened in files:
            opened.close()
        raise
    return metadata, files


def held_twice(folder: Path, name: str, first: SafetensorsFile, second: SafetensorsFile) -> SsahError:
    """The error of a folder with two tensors of one name."""
    return SsahError(
        f"{folder} holds {name} twice, in {first.path.name} and {second.path.name}; "
        "save it again with save_pretrained into an empty folder"
    )


def _shards(index: Path, content: bytes) -> dict[str, str]:
    """The shard of every tensor."""
    try:
        shards = dict(json.loads(content)["weight_map"])
        # A name that leads out of the folder would be hashed under a name that says nothing of where it lies.
        sound = bool(shards) and all(Path(shard).name == shard for shard in shards.values())
    except (ValueError, KeyError, TypeError) as error:
        raise SsahError(f"{index} is not a safetensors index; download the checkpoint again") from error
    if not sound:
        raise SsahError(f"{index} names no file of its folder; download the checkpoint again")
    return shards


def _joins(rule: WeightConverter) -> bool:
    """Whether a rule of transformers puts stored tensors one after another into one parameter."""
    return len(rule.target_patterns) == 1 and all(
        isinstance(step, Concatenate) or (isinstance(step, MergeModulelist) and step.dim == 0)
        for step in rule.operations
    )


# A tensor in the making: its shape, and per piece the stored tensor, its first element and the number of elements.
_Parts = tuple[tuple[int, ...], list[tuple[StoredTensor, int, int]]]


def _join(name: str, rule: WeightConverter, sources: Mapping[str, Mapping[str, StoredTensor]]) -> JoinedTensor:
    """What transformers makes of stored tensors, by source pattern and name, as the pieces that follow one another."""
    try:
        parts = {
            pattern: [_whole(found[key]) for key in sorted(found, key=_natural)] for pattern, found in sources.items()
        }
        for step in rule.operations:
            if isinstance(step, MergeModulelist):
                parts = {pattern: [_stacked(found)] for pattern, found in parts.items()}
            else:
                ordered = [found for pattern in rule.source_patterns for found in parts.get(pattern, [])]
                parts = {"": [_concatenated(ordered, cast(Concatenate, step).dim)]}
        ((shape, pieces),) = itertools.chain.from_iterable(parts.values())
        (dtype,) = {stored.dtype for stored, _, _ in pieces}
    except (ValueError, IndexError) as error:
        raise SsahError(
            f"{name} is incomplete or damaged: the shapes or dtypes of the {sum(map(len, sources.values()))} tensors "
            "that it is stored in do not go together; download the checkpoint again"
        ) from error
    starts = itertools.accumulate((count for _, _, count in pieces[:-1]), initial=0)
    return JoinedTensor(dtype, shape, tuple(pieces), tuple(starts))


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts numbers in a name by value, as transformers does: experts.2 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _whole(stored: StoredTensor) -> _Parts:
    return stored.shape, [(stored, 0, stored.numel)]


def _stacked(found: Sequence[_Parts]) -> _Parts:
    """torch.stack along the first axis."""
    (shape,) = {shape for shape, _ in found}
    return (len(found), *shape), [piece for _, pieces in found for piece in pieces]


def _concatenated(found: Sequence[_Parts], axis: int) -> _Parts:
    """torch.cat."""
    ((before, after),) = {(shape[:axis], shape[axis:][1:]) for shape, _ in found}
    outer = math.prod(before)
    blocks = [_split(pieces, math.prod(shape) // max(outer, 1)) for shape, pieces in found]
    pieces = [piece for block in zip(*blocks, strict=True) for part in block for piece in part]
    return (*before, sum(shape[axis] for shape, _ in found), *after), pieces


def _split(pieces: Iterable[tuple[StoredTensor, int, int]], size: int) -> list[list[tuple[StoredTensor, int, int]]]:
    """Cut pieces that follow one another into blocks of `size` elements."""
    blocks: list[list[tuple[StoredTensor, int, int]]] = []
    room = 0
    for stored, first, count in pieces:
        while count:
            if not room:
                blocks.append([])
                room = size
            taken = min(room, count)
            blocks[-1].append((stored, first, taken))
            first, count, room = first + taken, count - taken, room - taken
    return blocks
