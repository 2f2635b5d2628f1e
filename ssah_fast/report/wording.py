"""Numbers and names as a reader meets them: rounded to what an interval supports, and one colour per category."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito, "Color Universal Design" (2008): told apart with every common form of colour blindness. Half of the
# palette is for categories, the other half for anything else, so that a colour never means two things.
COLOURS = {
    "scu": "#D55E00",
    "ucu": "#0072B2",
    "cu": "#CC79A7",
    "ru": "#999999",
    "unobserved": "#F0E442",
}
LINES = ("#009E73", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot")
RATES = {"asr_raw": "judge alone", "asr": "without degenerate text"}
INK = "@ink"  # the colour of the text: figures.THEME
NAMES = {
    "scu": "SCU",
    "ucu": "UCU",
    "cu": "CU",
    "ru": "RU",
    "unobserved": "unobserved",
    "dense": "nothing zeroed",
    "random": "random",
    "norm": "by norm",
    "variance": "by variance",
    "swapped": "swapped",
}
MEANINGS = {
    "scu": "safety-critical",
    "ucu": "utility-critical",
    "cu": "complex: both",
    "ru": "redundant",
    "unobserved": "no token reached them",
}
_SPACE = "\u00a0"
_MINUS = "\u2212"


@dataclass(frozen=True)
class Estimate:
    """A measured figure with its 95 % interval; `low` and `high` are None where the interval is unknown."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def read(cls, document: Mapping[str, Any], name: str) -> Estimate | None:
        """The figure that a document stores as `name`, `name_interval` and `name_n`; None where it is unknown."""
        value = document.get(name)
        if value is None:
            return None
        low, high = document.get(f"{name}_interval") or (None, None)
        return cls(float(value), low, high, document.get(f"{name}_n"))

    @property
    def known(self) -> bool:
        """Whether both ends of the interval are known."""
        return self.low is not None and self.high is not None

    def text(self, unit: str = "") -> str:
        """The value: "94 %"."""
        return self._rounded(self.value) + _unit(unit)

    def bounds(self) -> str:
        """The interval: "90 to 97"; empty where it is unknown."""
        if self.low is None or self.high is None:
            return ""
        return f"{self._rounded(self.low)} to {self._rounded(self.high)}"

    def full(self, unit: str = "") -> str:
        """Value and interval: "94 % (90 to 97)"."""
        bounds = self.bounds()
        return self.text(unit) + (f" ({bounds})" if bounds else "")

    @staticmethod
    def span(estimates: Sequence[Estimate], unit: str = "") -> str:
        """The smallest and the largest value of some estimates: "3.5 to 5.5 %"."""
        first, last = (pick(estimates, key=lambda estimate: estimate.value).text() for pick in (min, max))
        return (first if first == last else f"{first} to {last}") + _unit(unit)

    def _rounded(self, value: float) -> str:
        # The last digit is worth at most half of what the interval leaves open on either side.
        if self.low is None or self.high is None or self.high <= self.low:
            return significant(value, 3)
        decimals = max(0, math.ceil(-math.log10((self.high - self.low) / 4)))
        return f"{value:,.{min(decimals, 6)}f}".replace("-", _MINUS)


def cell(document: Mapping[str, Any], name: str) -> str:
    """A figure of a document with its interval, for a table; empty where it is unknown."""
    estimate = Estimate.read(document, name)
    return "" if estimate is None else estimate.full()


def significant(value: float, digits: int) -> str:
    """A number with so many significant digits, never as a power of ten below a million."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(decimals, 12))}f}" if abs(value) < 1e6 else f"{value:.{digits - 1}e}"


def percent(part: float, digits: int = 2) -> str:
    """A part of one in percent: 0.0013 -> "0.13 %"; all digits before the point are kept."""
    return significant(100 * part, digits) + _unit("%")


def ratio_name(ratio: float | None) -> str:
    """A ratio as `identify` takes it: 0.06 -> "6 %"."""
    return "" if ratio is None else f"{round(100 * ratio, 6):g}" + _unit("%")


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 unit", "2,304 units"."""
    return f"{number:,}{_SPACE}{noun}{'' if number == 1 else 's'}"


def name_of(category: str) -> str:
    """A category or control as the page writes it."""
    return NAMES.get(category, category)


def colour_of(category: str) -> str:
    """The one colour of a category; what is none has the colour of the text."""
    return COLOURS.get(category, INK)


def distinct_names(names: Sequence[str]) -> list[str]:
    """Model names or paths without the folders that all of them share: "/x/run/a", "/x/run/b" -> "a", "b"."""
    if len(set(names)) < 2 or len({os.path.isabs(name) for name in names}) > 1:
        return [os.path.basename(os.path.normpath(name)) or name for name in names]
    common = os.path.commonpath([os.path.dirname(os.path.normpath(name)) for name in names])
    return [os.path.relpath(name, common) if common else name for name in names]


def joined(items: Sequence[str]) -> str:
    """An enumeration: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def _unit(unit: str) -> str:
    return f"{_SPACE}{unit}" if unit else ""
