"""Files on disk: written whole or not at all, and safetensors that say what they are in their header."""

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ssah_fast.errors import RunError, SsahError
from ssah_fast.units import UnitModule

HEADER_KEY = "ssah_fast"
SCHEMA = 1
# kind -> what writes it, for the error of a file of another kind
KINDS = {
    "scores": "`ssah-fast score`",
    "units": "`ssah-fast identify`",
    "mask": "`mask.save(path)`",
}


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse an output path that cannot be written; call it before a long run, not after.

    Args:
        path: where the file will be written.

    Returns:
        The path with symbolic links resolved, so that replacing it keeps the link.

    Raises:
        SsahError: the folder is missing or not writable, or the path is a folder, a device or a pipe.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise SsahError(f"cannot write {path}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise SsahError(f"cannot write {path}: the folder {target.parent} is not writable")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise SsahError(f"cannot write {path}: it exists and is not a regular file; choose another name")
    return target


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error.

    The bytes go to a temporary name in the same folder (a rename is atomic only within one file system), are flushed
    to the disk and then renamed. On any failure, Ctrl-C included, the temporary file is removed and an older file
    stays as it was.

    Args:
        path: where the finished file appears.

    Yields:
        The open temporary file.

    Raises:
        SsahError: see `check_writable`.
        RunError: the operating system refused the write (a full disk, for example); the message names the path.
    """
    target = check_writable(path)
    temporary = target.with_name(f".ssah_fast-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {_reason(error)}") from error
        raise


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Refuse an output folder that cannot be made or written into; call it before a long run, not after.

    Raises:
        SsahError: the path is a file, its parent does not exist, or it is not writable.
    """
    target = Path(path)
    if not target.is_dir():
        try:
            check_writable(path)
        except SsahError:
            if not target.is_dir():  # another process of the run may have made it since
                raise
        if target.is_file():
            raise SsahError(f"cannot write into {path}: it is a file; choose another folder")
    elif not os.access(target, os.W_OK | os.X_OK):
        raise SsahError(f"cannot write into {path}: the folder is not writable; choose another one")
    return target


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder that a command writes into, unless it is there.

    Raises:
        SsahError: see `check_folder`.
    """
    target = check_folder(path)
    target.mkdir(exist_ok=True)
    return target


def write_json(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write a JSON document atomically; NaN and Inf are refused.

    Raises:
        SsahError: the path cannot be written.
        RunError: the write failed.
    """
    with atomic_writer(path) as file:
        file.write(json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):  # Python 3.11
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write one safetensors file atomically, with `header` as JSON under the metadata key "ssah_fast".

    Args:
        path: the file to write.
        kind: one of `KINDS`, stored in the header.
        header: further JSON-able fields of the header.
        tensors: what to store; copied to contiguous CPU memory (safetensors refuses tensors that share storage).

    Raises:
        SsahError: the path cannot be written.
        RunError: the write failed.
    """
    document = json.dumps({"kind": kind, "schema": SCHEMA, **header}, allow_nan=False)
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with atomic_writer(path) as file:
        file.write(safetensors.torch.save(stored, metadata={HEADER_KEY: document}))


def read_header(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Read the JSON header of a file of ours without reading its tensors.

    Args:
        path: the file.
        kind: what the caller needs, one of `KINDS`; None takes any.

    Returns:
        The header.

    Raises:
        SsahError: the file is missing, truncated, not safetensors, not ours, of another kind or of a newer schema.
    """
    with _opened(path) as file:
        return _header(path, file.metadata() or {}, kind)


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a file written by `save_tensors`.

    Args:
        path: the file.
        kind: one of `KINDS`.

    Returns:
        The header and the tensors by name, on the CPU.

    Raises:
        SsahError: as `read_header`.
    """
    with _opened(path) as file:
        header = _header(path, file.metadata() or {}, kind)
        return header, {name: file.get_tensor(name) for name in file.keys()}


def read_layouts(path: str | os.PathLike[str], header: Mapping[str, Any]) -> list[UnitModule]:
    """The unit layouts stored in a header, in forward order.

    Args:
        path: named in errors.
        header: from `load_tensors`.

    Raises:
        SsahError: there are none, or they do not parse.
    """
    try:
        layouts = [UnitModule.from_json(stored) for stored in header["layouts"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise SsahError(
            f"cannot read {path}: its unit layouts are damaged ({type(error).__name__}: {error})"
        ) from error
    if not layouts:
        raise SsahError(f"cannot read {path}: it holds no modules")
    return layouts


def check_tensor(
    path: str | os.PathLike[str], name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return a tensor of a file if it is there with the dtype and shape that the header promises.

    Raises:
        SsahError: it is missing or different.
    """
    if tensor is None:
        raise SsahError(f"cannot read {path}: tensor {name} is missing")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise SsahError(
            f"cannot read {path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
        )
    return tensor


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not os.path.isfile(path):
        state = "is not a regular file" if os.path.exists(path) else "does not exist"
        raise SsahError(f"cannot read {path}: it {state}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise SsahError(f"cannot read {path}: truncated or not a safetensors file ({error})") from error
    except OSError as error:
        raise SsahError(f"cannot read {path}: {_reason(error)}") from error


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str], kind: str | None) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get(HEADER_KEY, "null"))
    except json.JSONDecodeError as error:
        raise SsahError(f"cannot read {path}: its ssah_fast header is not valid JSON ({error})") from error
    found = header.get("kind") if isinstance(header, dict) else None
    if found not in KINDS:
        raise SsahError(f"cannot read {path}: a safetensors file, but not one written by ssah_fast")
    if kind is not None and found != kind:
        raise SsahError(f"cannot read {path}: a {found} file where a {kind} file is needed; {KINDS[kind]} writes one")
    schema = header.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise SsahError(
            f"cannot read {path}: its schema is {schema!r}, this ssah_fast reads up to {SCHEMA}; upgrade ssah_fast"
        )
    return header


def _reason(error: OSError) -> str:
    return "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
