"""The categories of units, and how a user names some of them: ``scu,cu:6%``."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from enum import IntEnum
from typing import NamedTuple

from ssah_fast.errors import SsahError


class Category(IntEnum):
    """What a unit does; the value is what units and mask files store."""

    UNOBSERVED = -1
    RU = 0
    CU = 1
    UCU = 2
    SCU = 3

    @classmethod
    def parse(cls, name: str | int | Category) -> Category:
        """Read a category from its name (any case; esu and euu, the paper's first names, mean SCU and UCU) or value.

        Raises:
            SsahError: no such category; the message lists them.
        """
        key = str(name).strip().upper() if isinstance(name, str) else name
        try:
            return cls[_ALIASES.get(key, key)] if isinstance(key, str) else cls(key)
        except (KeyError, ValueError) as error:
            names = ", ".join(category.name.lower() for category in REPORTED)
            raise SsahError(f"category {name!r} is unknown; use {names} (esu = scu, euu = ucu)") from error


_ALIASES = {"ESU": "SCU", "EUU": "UCU"}
REPORTED = (Category.SCU, Category.UCU, Category.CU, Category.RU, Category.UNOBSERVED)


class Selected(NamedTuple):
    """A category, or that part of it which has the highest I_S.

    Attributes:
        category: which.
        ratio: how much of it, as a part of ALL units; None takes the whole category.
    """

    category: Category
    ratio: float | None = None

    def __str__(self) -> str:
        name = self.category.name.lower()
        return name if self.ratio is None else f"{name}:{(Decimal(str(self.ratio)) * 100).normalize():f}%"


def parse_selection(selection: str | Category | Sequence[str | Category], argument: str) -> list[Selected]:
    """Read ``"scu"``, ``"scu,cu:6%"``, ``["scu", "cu:0.06"]``, ``Category.SCU``.

    Args:
        selection: names, separated by commas or in a list; ``name:ratio`` takes a part of a category.
        argument: what errors call it, "freeze" or "train".

    Returns:
        At least one category, each at most once.

    Raises:
        SsahError: nothing is named, a name is unknown or named twice, or a ratio is no number from 0 to 1.
    """
    given = [selection] if isinstance(selection, str | Category) else list(selection)
    items = [part for item in given for part in (item.split(",") if isinstance(item, str) else [item])]
    found = [_parse_selected(item, argument) for item in items if not isinstance(item, str) or item.strip()]
    if not found:
        raise SsahError(f"{argument} names no category; write for example {argument}='scu,cu:6%'")
    names = [selected.category for selected in found]
    for category in names:
        if names.count(category) > 1:
            raise SsahError(
                f"{argument}={','.join(map(str, items))!r} names {category.name.lower()} twice; name it once"
            )
    return found


def _parse_selected(item: str | Category, argument: str) -> Selected:
    name, colon, ratio = item.partition(":") if isinstance(item, str) else (item, "", "")
    try:
        category = Category.parse(name)
    except SsahError as error:
        raise SsahError(f"{argument}={str(item).strip()!r}: {error}") from error
    return Selected(category, _parse_ratio(ratio.strip(), str(item).strip(), argument) if colon else None)


def _parse_ratio(text: str, item: str, argument: str) -> float:
    try:
        # Decimal, because 1.3 / 100 is 0.013000000000000001 in binary.
        ratio = float(Decimal(text[:-1].strip()) / 100 if text.endswith("%") else Decimal(text))
    except (InvalidOperation, OverflowError) as error:
        raise SsahError(f"{argument}={item!r}: {text!r} is not a ratio; write cu:6% or cu:0.06") from error
    if not 0 <= ratio <= 1:
        raise SsahError(f"{argument}={item!r}: {text} is out of range; give a part of all units from 0% to 100%")
    return ratio
