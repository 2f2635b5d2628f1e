"""Which backends exist on this machine, which one runs an op, and why another is missing."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from ssah_fast.errors import SsahError


@dataclass(frozen=True)
class Backend:
    """One way to run ops.

    Attributes:
        name: What a user types in SSAH_FAST_BACKEND.
        devices: Device types for which `auto` takes it; empty means any.
        module: Module with ``OPS``, a dict from op name to function. It may have ``DEVICES``, the device types that it
            takes when asked for by name, where these are more: Triton's interpreter computes on the CPU.
    """

    name: str
    devices: tuple[str, ...]
    module: str


class Loaded(NamedTuple):
    """A backend's ops and the device types that they run on (empty: any), or the reason why it is missing."""

    ops: dict[str, Callable[..., Any]]
    devices: tuple[str, ...]
    missing: str | None


# In the order in which `auto` prefers them.
BACKENDS = (
    Backend("cuda", ("cuda",), "ssah_fast.kernels.cuda"),
    Backend("triton", ("cuda",), "ssah_fast.kernels.triton"),
    Backend("cpp", ("cpu",), "ssah_fast.kernels.cpp"),
    Backend("torch", (), "ssah_fast.kernels.reference"),
)
NAMES = ("auto", *(b.name for b in BACKENDS))
VARIABLE = "SSAH_FAST_BACKEND"


@cache
def load(backend: Backend) -> Loaded:
    """Import a backend's module."""
    try:
        module = importlib.import_module(backend.module)
    except ImportError as error:
        return Loaded({}, (), str(error))
    except AttributeError as error:  # an extension that is older than the module that uses it
        raise SsahError(
            f"backend {backend.name}: {error}; it was built from older sources, install ssah_fast again"
        ) from error
    return Loaded(module.OPS, getattr(module, "DEVICES", backend.devices), None)


def missing() -> dict[str, str | None]:
    """Return, for every backend, None when this machine can run it or the reason why it is missing."""
    return {backend.name: _missing(backend) for backend in BACKENDS}


def _missing(backend: Backend) -> str | None:
    try:
        loaded = load(backend)
    except SsahError as error:  # SSAH_FAST_CPU_ISA names no instruction set, or the extension is too old
        return str(error)
    if loaded.missing is None and loaded.devices == ("cuda",) and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return loaded.missing


def select(op: str, device: torch.device, name: str | None = None) -> Callable[..., Any]:
    """Return the function that runs an op on a device.

    Args:
        op: Name of the op, the same in every backend.
        device: Device of its tensors.
        name: Backend asked for; default: the environment variable SSAH_FAST_BACKEND, or "auto".

    Raises:
        SsahError: The name is unknown, or the backend asked for cannot run this op here. Only "auto" falls back.
    """
    name = name or os.environ.get(VARIABLE) or "auto"
    if name not in NAMES:
        raise SsahError(f"{VARIABLE}={name} is unknown; choose one of {', '.join(NAMES)}")
    reasons = []
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        if name == "auto" and backend.devices and device.type not in backend.devices:
            reasons.append(f"{backend.name}: {_other_device(backend.devices, device)}")  # not even imported
            continue
        ops, devices, reason = load(backend)
        if reason is None and devices and device.type not in devices:
            reason = _other_device(devices, device)
        if reason is None and op not in ops:
            reason = f"it has no {op}; its ops: {', '.join(ops)}"
        if reason is None:
            return ops[op]
        reasons.append(f"{backend.name}: {reason}")
    raise SsahError(
        f"{VARIABLE}={name} cannot run {op} on {device.type} ({'; '.join(reasons)}); unset it to choose automatically"
    )


def _other_device(devices: tuple[str, ...], device: torch.device) -> str:
    return f"it runs on {' and '.join(devices)}, not on {device.type}"
