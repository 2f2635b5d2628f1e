"""Which units an ablation silences: categories of a units file, the same at other sizes, and the controls of each.

What a category is said to carry, units that were chosen otherwise should not carry (method.md, section 5.3: required
controls): as many units of every module at random, and rankings by what the method adds nothing to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ssah_fast import scores as scores_file
from ssah_fast.categories import Category
from ssah_fast.errors import SsahError, first_difference
from ssah_fast.partition import RANKED, Units, identify
from ssah_fast.scores import Scores
from ssah_fast.silencing import Silent

RANDOM = "random"
CONTROLS = (RANDOM, *scores_file.CONTROLS)
# Of `identify`: what a ratio is a ratio of, and among which units; the three ratios themselves are given anew.
SETTINGS = ("normalize", "contrast", "basis", "floor")


@dataclass(frozen=True)
class Variant:
    """One way of having the model.

    Attributes:
        category: "dense" (nothing is silent), a category, or a control.
        of: The category that a control is a control of; None for every other.
        ratio: The part of all units that was asked for, or that the category has; None for "dense".
        draw: Number of a random control, from 0; None for every other.
        silent: By module, bool [units].
        units: How many are silent.
        parameters: How many parameters these are made of.
    """

    category: str
    of: str | None
    ratio: float | None
    draw: int | None
    silent: Silent
    units: int
    parameters: int

    @property
    def name(self) -> str:
        """Unique in a plan: "dense", "scu 6%", "random of scu 6%, draw 0"."""
        if self.ratio is None:
            return self.category
        control = "" if self.of is None else f"{self.category} of "
        draw = "" if self.draw is None else f", draw {self.draw}"
        return f"{control}{self.of or self.category} {percent(self.ratio)}{draw}"

    def describe(self) -> dict[str, Any]:
        """The variant as the row of a result, JSON-able."""
        keys = ("name", "category", "of", "ratio", "draw", "units", "parameters")
        return {key: getattr(self, key) for key in keys}

    @property
    def sha256(self) -> str:
        """Hash of which units are silent."""
        digest = hashlib.sha256()
        for name, flags in self.silent.items():
            digest.update(f"{name} {flags.numel()} ".encode() + flags.numpy().tobytes())
        return digest.hexdigest()


DENSE = Variant("dense", None, None, None, {}, 0, 0)


def percent(ratio: float) -> str:
    """A part of one as a percentage, without the noise of binary fractions: 0.013 -> "1.3%"."""
    return f"{(Decimal(f'{ratio:.4g}') * 100).normalize():f}%"


def plan(
    units: Units,
    scores: Scores | None = None,
    *,
    categories: Sequence[str] | None = None,
    ratios: Sequence[float] = (),
    controls: Sequence[str] = (RANDOM,),
    draws: int = 3,
    seed: int = 0,
) -> list[Variant]:
    """The variants of an ablation: the dense model, every category at every size, and each one's controls.

    A category comes as it is in the units file, and at each of `ratios` as `identify` finds it with the file's other
    settings; UCU then begins behind the file's SCU, and RU behind both, so that the file's own ratio gives the file's
    own units. Controls: "random" draws as many units of every module (`Units.shuffled`); "norm" takes as many units
    with the highest share of their module's squared column norms (RU: the lowest); "variance" ranks as if all columns
    had the same norm; "swapped" exchanges I_S and I_U (SCU and UCU; RU does not tell the two apart). CU is what the
    others leave, so it has no other sizes and only the random control.

    Args:
        units: The units.
        scores: What they were identified from; needed for all but the file's own sizes and "random".
        categories: Names of SCU, UCU, CU and RU; None: SCU, UCU and RU as far as the file has them.
        ratios: Further sizes of SCU, UCU and RU, as parts of one.
        controls: Of `CONTROLS`.
        draws: How many random controls each gets.
        seed: Of the first draw; the others count up from it.

    Returns:
        "dense" first; no two with the same name.

    Raises:
        SsahError: A category is unknown or empty, a control unknown, the scores are missing or of other units, or a
            ratio cannot be reached.
    """
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise SsahError(f"control {unknown[0]!r} is unknown; use {', '.join(CONTROLS)}")
    if draws < 1 and RANDOM in controls:
        raise SsahError(f"draws={draws} leaves no random control; give 1 or more, or leave the control out")
    ranked = [name for name in controls if name != RANDOM]
    needing = f"ratios={list(ratios)}" if ratios else f"the control {ranked[0]!r}" if ranked else ""
    if needing:
        check_scores(units, scores, needing)
    found = {DENSE.name: DENSE}
    named = RANKED if categories is None else map(Category.parse, categories)
    for category in dict.fromkeys(name for name in named if categories is not None or units.count(name)):
        if category is Category.UNOBSERVED or not units.count(category):
            raise SsahError(f"category {category.name.lower()!r} has no unit in this units file; leave it out")
        for ratio in (own_ratio(units, category), *(ratios if category in RANKED else ())):
            for made in _with_controls(units, scores, category, ratio, controls, range(seed, seed + draws)):
                found.setdefault(made.name, made)
    return list(found.values())


def own_ratio(units: Units, category: Category) -> float:
    """The ratio that a category was identified with, or the part of all units that it has."""
    asked = units.settings.get(category.name.lower())
    return units.fraction(category) if asked is None else asked


def identified(units: Units, scores: Scores, sizes: Mapping[str, float], control: str | None = None) -> Units:
    """The units that the same settings give at other sizes, or from a control's scores.

    Args:
        units: Whose settings.
        scores: What they were identified from (`check_scores`).
        sizes: Ratios of "scu", "ucu" and "ru"; what is not named has none.
        control: Of `scores.CONTROLS`.

    Raises:
        SsahError: A ratio cannot be reached.
    """
    settings: dict[str, Any] = {key: units.settings[key] for key in SETTINGS}
    if control == "norm":  # with nothing to contrast it with
        settings |= {"normalize": "share", "contrast": "difference"}
    scu, ucu, ru = (sizes.get(category.name.lower(), 0.0) for category in RANKED)
    return identify(scores if control is None else scores.control(control), scu, ucu, ru, **settings)


def check_scores(units: Units, scores: Scores | None, needing: str) -> Scores:
    """The scores, if they are those that the units were identified from.

    Args:
        units: The units.
        scores: What the caller has.
        needing: What needs them, for the message.

    Raises:
        SsahError: There are none, or they are others.
    """
    if scores is None:
        raise SsahError(f"{needing} needs the scores that the units were identified from; give scores (--scores FILE)")
    stored = units.provenance.get("scores", {})
    difference = first_difference(stored, json.loads(json.dumps(scores.provenance)), "scores")
    if difference is not None or units.provenance.get("estimator") != scores.estimator:
        entry = difference[0] if difference else "estimator"
        raise SsahError(f"{needing}: these scores are not what the units were identified from ({entry} differs)")
    return scores


def _with_controls(
    units: Units, scores: Scores | None, category: Category, ratio: float, controls: Sequence[str], seeds: range
) -> Iterator[Variant]:
    source = units
    if scores is not None and ratio != own_ratio(units, category):
        before = {name.name.lower(): own_ratio(units, name) for name in RANKED[: RANKED.index(category)]}
        source = identified(units, scores, {**before, category.name.lower(): ratio})
    yield variant(source, category, ratio)
    for kind in controls:
        if kind == RANDOM:
            for draw, seed in enumerate(seeds):
                yield variant(source.shuffled(seed), category, ratio, RANDOM, draw)
        elif category in RANKED and not (kind == "swapped" and category is Category.RU) and scores is not None:
            # The norm alone gives one ranking, of which SCU and UCU both take the top.
            top = Category.SCU if kind == "norm" and category is Category.UCU else category
            ranked = identified(units, scores, {top.name.lower(): ratio}, kind)
            yield variant(ranked, top, ratio, kind, of=category)


def variant(
    units: Units,
    category: Category,
    ratio: float,
    control: str | None = None,
    draw: int | None = None,
    of: Category | None = None,
) -> Variant:
    """The variant in which a category of some units is silent.

    Args:
        units: The units.
        category: Which of theirs.
        ratio: Its size, for the name.
        control: The control that these units are of.
        draw: Number of a random control.
        of: What it is a control of, where that is another category than the one that is silent.
    """
    name = (of or category).name.lower()
    return Variant(
        category=control or name,
        of=name if control else None,
        ratio=ratio,
        draw=draw,
        silent={module: values == category for module, values in units.category.items()},
        units=units.count(category),
        parameters=units.parameters(category),
    )
