"""Which backends a test of an op runs on, and how it makes one of them the one in use."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ssah_fast.kernels import registry


def targets(op: str | None = None, *, reference: bool = True) -> Iterator[Any]:
    """Every backend that is present (and has the op), on every device that it runs on; with or without plain torch."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for backend in registry.BACKENDS if reference else registry.BACKENDS[:-1]:
        kernels, runs_on, missing = registry.load(backend)
        if missing is not None or (op is not None and op not in kernels):
            continue
        for device in devices:
            if not runs_on or device in runs_on:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                yield pytest.param((backend.name, device), id=f"{backend.name}-{device}", marks=marks)


def use(target: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Make a target's backend the one in use, and return its device."""
    backend, device = target
    monkeypatch.setenv(registry.VARIABLE, backend)
    return torch.device(device)


def interpreted() -> bool:
    """Whether the backend in use is Triton's interpreter, a thousand times slower than what it stands for."""
    return os.environ.get(registry.VARIABLE) == "triton" and not torch.cuda.is_available()
