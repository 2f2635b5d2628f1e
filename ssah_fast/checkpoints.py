"""Checkpoint folders: their safetensors files, and the tensors in them by the names that they have in the model.

Files are read with pread and not mapped: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ssah_fast.errors import RunError, SsahError
from ssah_fast.loading import empty_model, explained, silent

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files of a hub repository that say what its weights are; others (consolidated.safetensors, pickles) are not loaded.
_HUB_FILES = ["config.json", "adapter_config.json", "model*.safetensors", INDEX]
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
        tensors: the stored tensors by the name of the parameter, in the order of the files.
        tied: per parameter that shares its tensor, the names of all that do.

    Raises:
        SsahError: the folder is missing, incomplete, pickled, damaged or an adapter.
    """

    def __init__(self, argument: str, name: str) -> None:
        self.name = name
        self.folder = checkpoint_folder(argument, name)
        self.model = empty_model(os.fspath(self.folder), any_architecture=True)
        # transformers takes the single file where there are both, so it is what a user of the folder gets.
        sharded = not (self.folder / SINGLE).is_file()
        self.metadata = {
            file: (self.folder / file).read_bytes() for file in ("config.json", *([INDEX] if sharded else []))
        }
        shards = _shards(self.folder / INDEX, self.metadata[INDEX]) if sharded else {}
        self.files: list[SafetensorsFile] = []
        try:
            for file in sorted(set(shards.values())) or [SINGLE]:
                self.files.append(SafetensorsFile(self.folder / file))
            self.tensors = self._tensors(set(shards))
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

    def get(self, name: str) -> StoredTensor | None:
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

    def _tensors(self, promised: set[str]) -> dict[str, StoredTensor]:
        state = self.model.state_dict()
        renamings = [rule for rule in get_model_conversion_mapping(self.model) if isinstance(rule, WeightRenaming)]
        tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for key, entry in sorted(file.header.items(), key=lambda item: item[1]["data_offsets"]):
                name = rename_source_key(key, renamings, [], self.model.base_model_prefix, state)[0]
                if name in tensors:
                    raise SsahError(
                        f"{self.name} holds {name} twice, in {tensors[name].file.path.name} and {file.path.name}; "
                        "save it again with save_pretrained into an empty folder"
                    )
                tensors[name] = _stored(file, key, entry)
        absent = promised.difference(*(file.header for file in self.files))
        if absent:
            raise SsahError(f"{self.name} is incomplete: its index names {min(absent)}, which no shard holds")
        return tensors


@dataclass(frozen=True, eq=False)
class StoredTensor:
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
    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return NUMPY_DTYPES[self.dtype].itemsize

    def read(self, element: int, buffer: np.ndarray) -> None:
        """Fill `buffer`, uint8, with the bytes from an element on.

        Raises:
            RunError: the file cannot be read, or became shorter.
        """
        self.file.read(self.offset + element * self.itemsize, buffer)


class SafetensorsFile:
    """An open safetensors file, and its SHA-256 from the same reads as far as they come in order.

    Attributes:
        path: where it is.
        size: in bytes.
        start: where the data begin, behind the header.
        header: per stored name its "dtype", "shape" and "data_offsets" (from `start` on).

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
        self.header = json.loads(header.tobytes())
        self.header.pop("__metadata__", None)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read(self, offset: int, buffer: np.ndarray) -> None:
        """Fill `buffer`, uint8, with the bytes from `offset` on.

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
        if offset == self._hashed:
            self._hash.update(view)
            self._hashed += filled

    def sha256(self, buffer: np.ndarray) -> str:
        """The hash of the whole file; reads, through `buffer` (uint8), what was not read in order."""
        while self._hashed < self.size:
            self.read(self._hashed, buffer[: min(buffer.nbytes, self.size - self._hashed)])
        return self._hash.hexdigest()


def checkpoint_folder(argument: str, name: str) -> Path:
    """The folder of a checkpoint, downloaded where `name` is a hub id; it has a config and safetensors weights.

    Args:
        argument: what errors call it.
        name: a folder in Hugging Face format or a hub id.

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
            path = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
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


def _stored(file: SafetensorsFile, key: str, entry: Mapping[str, Any]) -> StoredTensor:
    if entry["dtype"] not in NUMPY_DTYPES:
        raise SsahError(
            f"{file.path}: {key} is stored as {entry['dtype']}, which is not read here; "
            f"save the model as one of {', '.join(NUMPY_DTYPES)}"
        )
    start, end = entry["data_offsets"]
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), file.start + start, end - start)
