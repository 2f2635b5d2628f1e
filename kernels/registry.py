"""Which backends exist on this machine, which one runs an op, and why another is missing."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ssah_fast.errors import SsahError


@dataclass(frozen=True)
class Backend:
    """One way to run ops.

    Attributes:
        name: What a user types in SSAH_FAST_BACKEND.
        devices: Device types it runs on; empty means any.
        module: Module with ``OPS``, a dict from op name to function. None while this version has no kernels for it.
    """

    name: str
    devices: tuple[str, ...]
    module: str | None


# In the order in which `auto` prefers them.
BACKENDS = (
    Backend("cuda", ("cuda",), None),
    Backend("triton", ("cuda",), None),
    Backend("cpp", ("cpu",), "ssah_fast.kernels.cpp"),
    Backend("torch", (), "ssah_fast.kernels.reference"),
)
NAMES = ("auto", *(b.name for b in BACKENDS))
VARIABLE = "SSAH_FAST_BACKEND"


@cache
def load(backend: Backend) -> tuple[dict[str, Callable[..., Any]], str | None]:
    """Return the backend's ops and None, or no ops and the reason why it is missing."""
    if backend.module is None:
        return {}, "this version has no kernels for it"
    try:
        return importlib.import_module(backend.module).OPS, None
    except ImportError as error:
        return {}, str(error)


def missing() -> dict[str, str | None]:
    """Return, for every backend, None when it is present or the reason why it is missing."""
    return {backend.name: load(backend)[1] for backend in BACKENDS}


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
        ops, reason = load(backend)
        if reason is None and backend.devices and device.type not in backend.devices:
            reason = f"it runs on {' and '.join(backend.devices)}, not on {device.type}"
        if reason is None and op not in ops:
            reason = f"it has no {op}; its ops: {', '.join(ops)}"
        if reason is None:
            return ops[op]
        reasons.append(f"{backend.name}: {reason}")
    raise SsahError(
        f"{VARIABLE}={name} cannot run {op} on {device.type} ({'; '.join(reasons)}); unset it to choose automatically"
    )
