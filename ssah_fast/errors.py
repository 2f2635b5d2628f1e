"""The errors a user can cause, each with the exit code that the command line gives it."""

from collections.abc import Mapping
from typing import Any


class SsahError(ValueError):
    """A mistake in what the user passed: the message is one line that names the argument, the value and the remedy."""

    exit_code = 2


class RunError(SsahError):
    """Something outside the arguments failed during a run (a full disk, a file that vanished)."""

    exit_code = 1


class NonFiniteError(SsahError):
    """A NaN or Inf in weights or activations; the message names the module and the channel."""


class FreezeError(SsahError):
    """Something frozen is not what it was; the message says how much and where first."""

    exit_code = 3


class ResumeError(SsahError):
    """A checkpoint was made by another run: other data, another mask or other settings."""

    exit_code = 4


class OutOfMemoryError(SsahError):
    """The device ran out of memory; the message says which flag makes the run smaller."""

    exit_code = 5


def spelled(option: str, argument: str) -> str:
    """The name of an option as the caller of ``argument`` knows it: a flag beside a flag, else a keyword."""
    return "--" + option.replace("_", "-") if argument.startswith("-") else option


def first_difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where two nested JSON documents differ first.

    Args:
        a: The one.
        b: The other, whose order of keys counts; keys that only `a` has come last.
        name: What the documents are called; ".key" is appended per level.

    Returns:
        The name of the entry and its value in each (None where it is missing), or None where all is equal.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = dict.fromkeys([*b, *a])
        found = (first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key) for key in keys)
        return next(filter(None, found), None)
    return None if a == b else (name, a, b)
