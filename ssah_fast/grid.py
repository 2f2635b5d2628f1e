"""Where a safety landscape is measured: grids of alpha, and what lies between the points that were."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    import numpy as np

_Rate = TypeVar("_Rate", float, "np.ndarray")


def parse_grid(text: str, argument: str) -> tuple[float, ...]:
    """The alphas of a grid, ascending; 0, the unperturbed model, is one of them.

    Args:
        text: "START:STOP:POINTS" (evenly spaced, both ends included), or alphas in any order with commas between them.
        argument: What the error messages call `text`.

    Raises:
        SsahError: It is neither, an alpha is given twice or not finite, or 0 is missing.
    """
    parts = text.split(":")
    try:
        if len(parts) == 1:
            alphas = [float(part) for part in text.split(",")]
        else:
            start, stop, points = float(parts[0]), float(parts[1]), int(parts[2])
            if len(parts) > 3 or points < 2 or not start < stop:
                raise ValueError
            alphas = [(start * (points - 1 - i) + stop * i) / (points - 1) for i in range(points)]
    except (ValueError, IndexError):
        raise SsahError(
            f"{argument} {text!r} is no grid; use START:STOP:POINTS such as -0.5:0.5:21, or a,b,c"
        ) from None
    return checked(alphas, f"{argument} {text!r}")


def checked(alphas: Iterable[float], what: str) -> tuple[float, ...]:
    """The alphas of a grid, ascending and without roundings of the last digits; 0 is one of them.

    Args:
        alphas: In any order.
        what: What the error messages call them.

    Raises:
        SsahError: An alpha is given twice or not finite, or 0 is missing.
    """
    found = sorted(round(float(alpha), 12) + 0.0 for alpha in alphas)  # -0.0 + 0.0 is 0.0
    if not all(map(math.isfinite, found)) or len(set(found)) < len(found):
        raise SsahError(f"{what} holds an alpha twice, or one that is not finite; leave it out")
    if 0 not in found:
        raise SsahError(f"{what} lacks 0, the unperturbed model; choose a grid that holds it, such as -0.5:0.5:21")
    return tuple(found)


def symmetric(alphas: Sequence[float]) -> bool:
    """Whether a grid is its own mirror image, with 0 in its middle."""
    return len(alphas) % 2 == 1 and all(a == -b for a, b in zip(alphas, reversed(alphas), strict=True))


def fill(alphas: Sequence[float], known: Mapping[float, _Rate]) -> list[_Rate]:
    """What was measured, and on the line between its neighbours what was not.

    Args:
        alphas: The grid, ascending.
        known: Values by alpha, numbers or arrays of one shape; those of the grid's two ends are among them.

    Raises:
        SsahError: An end is missing.
    """
    for end in (alphas[0], alphas[-1]):
        if end not in known:
            raise SsahError(f"alpha {end:g} was not measured; without the ends of the grid nothing can be filled in")
    filled = [known[alphas[0]]]
    for left, right in gaps(alphas, known):
        a, b = alphas[left], alphas[right]
        low, high = known[a], known[b]
        filled += [low + (alpha - a) / (b - a) * (high - low) for alpha in alphas[left + 1 : right]]
        filled.append(high)
    return filled


def gaps(alphas: Sequence[float], known: Collection[float]) -> list[tuple[int, int]]:
    """The places (left, right) of each two known alphas that follow each other on a grid, next neighbours too."""
    places = [place for place, alpha in enumerate(alphas) if alpha in known]
    return list(itertools.pairwise(places))
