"""Scores -> categories: which units carry safety (SCU), utility (UCU), both (CU) or nothing that was seen (RU).

SSAH (Li & Kim, arXiv 2410.10862) ranks by I_S - I_U and I_S + I_U; what the paper leaves open (scale between sets and
layers, precedence, floors) is a setting here, and every setting is recorded in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ssah_fast import files, masks
from ssah_fast.categories import REPORTED, Category, Selected, parse_selection
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.scores import SETS, Scores
from ssah_fast.units import UnitModule

NORMALIZE = ("share", "raw", "zscore")
CONTRAST = ("difference", "ratio")
BASIS = ("units", "parameters")
# Under contrast="ratio" a unit that does next to nothing can have |D| = 1: to be ranked, its S + U must reach this part
# of its module's mean.
RATIO_FLOOR = 0.1
# 1.3 % + 13.3 % + 85.4 % is 1 + 2e-16 in float64.
_ROUNDING = 1e-9


RANKED = (Category.SCU, Category.UCU, Category.RU)  # in order of precedence; CU is what remains


@dataclass(frozen=True)
class Settings:
    """The arguments of `identify`, checked."""

    scu: float
    ucu: float
    ru: float
    normalize: str
    contrast: str
    basis: str
    floor: float

    def __post_init__(self) -> None:
        for name in ("scu", "ucu", "ru"):
            if not 0 <= getattr(self, name) <= 1:
                raise SsahError(f"{name}={getattr(self, name)} is not a ratio; give a number from 0 to 1")
        total = self.scu + self.ucu + self.ru
        if total > 1 + _ROUNDING:
            raise SsahError(
                f"scu={self.scu}, ucu={self.ucu} and ru={self.ru} sum to {total:.6g}, more than 1; lower one of them"
            )
        if not 0 <= self.floor < 1:
            raise SsahError(f"floor={self.floor} is not a part of a module; give a number from 0 to below 1")
        for name, choices in (("normalize", NORMALIZE), ("contrast", CONTRAST), ("basis", BASIS)):
            if getattr(self, name) not in choices:
                raise SsahError(f"{name}={getattr(self, name)!r} is unknown; use {', '.join(choices)}")
        if self.contrast == "ratio" and self.normalize == "zscore":
            raise SsahError(
                "contrast='ratio' makes no sense of negative values; use normalize='share' or 'raw' with it"
            )

    def ratio(self, category: Category) -> float:
        """The asked ratio of SCU, UCU or RU."""
        return getattr(self, category.name.lower())


@dataclass
class Units:
    """The category of every unit.

    Attributes:
        category: int8 [units] per module, values of `Category`, in forward order.
        layouts: per module, which parameters a unit is made of.
        settings: the arguments of `identify`.
        provenance: {"scores": provenance of the scores, "scores_sha256": hash of it as canonical JSON, "estimator"}.
        stability: split-half agreement, see `identify`.
        overlap: {"ucu": n, "ru": n}, units that the category would also have taken had no other come first.
        safety: the normalised I_S of every unit, float64 [units] per module; {} from a file that lacks it.
    """

    category: dict[str, torch.Tensor]
    layouts: dict[str, UnitModule]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    stability: dict[str, Any]
    overlap: dict[str, int]
    safety: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """Module names in forward order."""
        return list(self.category)

    def count(self, category: str | Category) -> int:
        """Number of units of a category."""
        wanted = Category.parse(category)
        return int((torch.cat(list(self.category.values())) == wanted).sum())

    def parameters(self, category: str | Category) -> int:
        """Number of parameters that the units of a category are made of."""
        wanted = Category.parse(category)
        return sum(int((values == wanted).sum()) * self.layouts[name].cost for name, values in self.category.items())

    def fraction(self, category: str | Category, of: str = "units") -> float:
        """Part that a category has in all units, or in the parameters of all units.

        Parameters that belong to no unit (embeddings, norms; q and k where the unit is a value channel) do not count.

        Args:
            category: a `Category` or its name.
            of: "units" or "parameters".

        Raises:
            SsahError: unknown category or `of`.
        """
        if of not in BASIS:
            raise SsahError(f"of={of!r} is unknown; use {', '.join(BASIS)}")
        if of == "units":
            return self.count(category) / sum(values.numel() for values in self.category.values())
        return self.parameters(category) / sum(layout.units * layout.cost for layout in self.layouts.values())

    def unobserved_experts(self) -> tuple[int, int]:
        """How many experts no token of one of the sets reached, and how many experts there are."""
        experts = [self.category[name] for name, layout in self.layouts.items() if layout.expert is not None]
        return sum(bool((values == Category.UNOBSERVED).all()) for values in experts), len(experts)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per category, in lower case: units, parameters, their fractions, jaccard, chance, overlap (None: unknown)."""
        return {category.name.lower(): self._summary_of(category) for category in REPORTED}

    def _summary_of(self, category: Category) -> dict[str, Any]:
        name = category.name.lower()
        stability = self.stability.get(name) or {}
        return {
            "units": self.count(category),
            "units_fraction": self.fraction(category),
            "parameters": self.parameters(category),
            "parameters_fraction": self.fraction(category, of="parameters"),
            "jaccard": stability.get("jaccard"),
            "chance": stability.get("chance"),
            "overlap": self.overlap.get(name),
        }

    def shuffled(self, seed: int) -> Units:
        """A control: the same number of units of every category in every module, drawn at random.

        Categories and I_S move together, so that "cu:6%" takes as many units of every module, too. UNOBSERVED units
        stay where they are.

        Args:
            seed: Decides the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        category = {name: values.clone() for name, values in self.category.items()}
        safety = {name: values.clone() for name, values in self.safety.items()}
        for name, values in self.category.items():
            observed = (values != Category.UNOBSERVED).nonzero().squeeze(1)
            drawn = observed[torch.randperm(observed.numel(), generator=generator)]
            for shuffled, original in ((category, self.category), (safety, self.safety)):
                if name in shuffled:
                    shuffled[name][observed] = original[name][drawn]
        return replace(
            self,
            category=category,
            safety=safety,
            settings={**self.settings, "shuffle": seed},
            stability={"reason": "the categories were shuffled"},
            overlap={},
        )

    def mask(
        self,
        model: nn.Module,
        freeze: str | Category | Sequence[str | Category] | None = None,
        train: str | Category | Sequence[str | Category] | None = None,
        policy: Mapping[str, str] | None = None,
    ) -> masks.Mask:
        """The mask that freezes some categories, or trains only some.

        Args:
            model: the scored model or one of its architecture; only names and shapes are read, so it may be on the meta
                device or wrapped (DDP, torch.compile, ...).
            freeze: categories to freeze, such as "scu,cu:6%"; everything else trains, except what `policy` says.
                "cu:6%" takes those CUs with the highest I_S, as many as 6 % of ALL units (ties: earlier module, lower
                index); so does every other category.
            train: categories to train, such as "ru"; everything else is frozen. Give either `freeze` or `train`.
            policy: overrides for what belongs to no unit: embeddings, lm_head, norms, biases, qk, other -> "train" or
                "freeze", and for biases and qk also "follow"; see `ssah_fast.masks.full_policy`.

        Returns:
            The mask. It names every parameter that holds units, and those frozen as a whole.

        Raises:
            SsahError: both or none of `freeze` and `train`, a selection that cannot be read or that the units cannot
                fill, a policy that is unknown or contradicts itself, another model, or nothing left to train.
        """
        if (freeze is None) == (train is None):
            raise SsahError("give either freeze (what to keep, for example 'scu,cu:6%') or train (for example 'ru')")
        argument, given = ("freeze", freeze) if train is None else ("train", train)
        selection = parse_selection(given, argument) if given is not None else []
        selected, training = self._select(selection, argument), argument == "train"
        provenance = {
            "freeze": None if training else ",".join(map(str, selection)),
            "train": ",".join(map(str, selection)) if training else None,
            "units_sha256": self._sha256(),
            "model": self.provenance.get("scores", {}).get("model"),
        }
        frozen = {name: ~chosen if training else chosen for name, chosen in selected.items()}
        return masks.build(model, self.layouts, self.category, frozen, policy, training=training, provenance=provenance)

    def _select(self, selection: Sequence[Selected], argument: str) -> dict[str, torch.Tensor]:
        """Which units a selection names, bool [units] per module."""
        categories = torch.cat([self.category[name] for name in self.modules])
        chosen = torch.zeros(categories.numel(), dtype=torch.bool)
        for selected in selection:
            members = (categories == selected.category).nonzero().squeeze(1)
            if selected.ratio is not None:
                members = self._safest(members, round(selected.ratio * categories.numel()), f"{argument}='{selected}'")
            chosen[members] = True
        if not chosen.any():
            raise SsahError(f"{argument}='{','.join(map(str, selection))}' names no unit of this units file")
        sizes = [self.category[name].numel() for name in self.modules]
        return dict(zip(self.modules, chosen.split(sizes), strict=True))

    def _safest(self, members: torch.Tensor, wanted: int, asked: str) -> torch.Tensor:
        """Those of some units (flat indices) with the highest I_S."""
        if not self.safety:
            raise SsahError(f"{asked} needs I_S, which this units file lacks; run identify again")
        if wanted > members.numel():
            raise SsahError(f"{asked} asks for {wanted} units, but the category has {members.numel()}; lower the ratio")
        safety = torch.cat([self.safety[name] for name in self.modules])
        return members[torch.argsort(safety[members], descending=True, stable=True)[:wanted]]

    def _sha256(self) -> str:
        """Hash of the categories alone."""
        digest = hashlib.sha256()
        for name, values in self.category.items():
            digest.update(f"{name} {values.numel()} ".encode() + values.numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: the file.

        Raises:
            SsahError: the path cannot be written.
            RunError: the write failed, for example on a full disk.
        """
        header = {
            "layouts": [self.layouts[name].to_json() for name in self.category],
            "settings": self.settings,
            "provenance": self.provenance,
            "stability": self.stability,
            "overlap": self.overlap,
        }
        safety = {f"{name}.safety": values for name, values in self.safety.items()}
        files.save_tensors(path, "units", header, {**self.category, **safety})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Units:
        """Read a units file.

        Args:
            path: the file.

        Returns:
            The units, on the CPU.

        Raises:
            SsahError: the file is missing, truncated, not a units file, of a newer schema, or inconsistent.
        """
        header, tensors = files.load_tensors(path, "units")
        layouts = {layout.name: layout for layout in files.read_layouts(path, header)}
        category = {name: _load_category(path, layout, tensors.get(name)) for name, layout in layouts.items()}
        rest = {key: header.get(key, {}) for key in ("settings", "provenance", "stability", "overlap")}
        return cls(category, layouts, **rest, safety=_load_safety(path, layouts, tensors))


def identify(
    scores: Scores,
    scu: float = 0.013,
    ucu: float = 0.133,
    ru: float = 0.148,
    *,
    normalize: str = "share",
    contrast: str = "difference",
    basis: str = "units",
    floor: float = 0.05,
) -> Units:
    """Give every unit a category by one global ranking of MLP and attention units together.

    With S and U the normalised I_S and I_U: SCU is the top of the contrast, UCU its bottom among the rest, RU the
    lowest S + U among the rest, CU what remains (SSAH, arXiv 2410.10862; the default ratios are the paper's for
    Llama-2-7B-chat). Ties go to the earlier module, then to the lower unit index. A module that saw no token of one of
    the sets is UNOBSERVED as a whole and never ranked. The experts of one layer together count as one module where
    importances are made comparable, or each would weigh as much as a whole MLP. Those that are UNOBSERVED take no part.

    Args:
        scores: from `score`.
        scu: part of all units that becomes SCU, 0 to 1.
        ucu: part that becomes UCU.
        ru: part that becomes RU.
        normalize: per module (the experts of a layer together) and set: "share" I / sum I (blind to the scale of the
            sets), "raw", or "zscore".
        contrast: "difference" S - U (the paper), or "ratio" (S - U) / (S + U), where units below 10 % of their module's
            mean S + U (that of all experts of a layer) cannot become SCU or UCU.
        basis: what the ratios count: "units", exactly round(ratio * units), or "parameters", as near as whole units
            come.
        floor: in every module, every expert among them, max(1, ceil(floor * units)) units stay outside each of SCU,
            UCU and RU.

    Returns:
        The units. Their `stability` holds, for scu, ucu, cu and ru, {"jaccard", "chance"}: the intersection over union
        of the category as found from either half of the calibration sequences, and f / (2 - f), what two random sets of
        that size (f of all units) would reach; "agreement" is the part of units with the same category in both. Where
        this cannot be computed the values are None and "reason" says why.

    Raises:
        SsahError: a ratio, setting or floor is out of range, the ratios sum to more than 1 or cannot be reached under
            the floor.
        NonFiniteError: an importance is NaN or infinite; the message names the module and the unit.
    """
    settings = Settings(scu, ucu, ru, normalize, contrast, basis, floor)
    table = _Table([module.layout for module in scores.modules.values()])
    observed = {name: bool((count > 0).all()) for name, count in scores.count.items()}
    importance = {name: module.importance for name, module in scores.modules.items()}
    categories, overlap = table.rank(importance, observed, settings)
    document = json.dumps(scores.provenance, sort_keys=True, separators=(",", ":"))
    return Units(
        category=table.split(categories),
        layouts={layout.name: layout for layout in table.layouts},
        settings=asdict(settings),
        provenance={
            "scores": scores.provenance,
            "scores_sha256": hashlib.sha256(document.encode()).hexdigest(),
            "estimator": scores.estimator,
        },
        stability=_stability(scores, table, settings),
        overlap=overlap,
        safety=table.split(table.normalise(importance, observed, normalize)[0][0]),
    )


class _Table:
    """All units of a model as flat vectors, module after module."""

    def __init__(self, layouts: list[UnitModule]) -> None:
        self.layouts = layouts
        self.sizes = torch.tensor([layout.units for layout in layouts])
        self.module = torch.repeat_interleave(torch.arange(len(layouts)), self.sizes)
        self.cost = torch.tensor([layout.cost for layout in layouts])[self.module]
        self.pools: dict[str, list[int]] = {}  # modules that share one total
        for index, layout in enumerate(layouts):
            self.pools.setdefault(layout.pool, []).append(index)

    def split(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector by module."""
        parts = values.split(self.sizes.tolist())
        return {layout.name: part.clone() for layout, part in zip(self.layouts, parts, strict=True)}

    def rank(
        self, importance: Mapping[str, torch.Tensor], observed: Mapping[str, bool], settings: Settings
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """Categories, int8 [all units], and the overlap of UCU and RU with those before them."""
        _check_finite(importance)
        if not any(observed.values()):
            raise SsahError("no module saw tokens of both sets; score a safety set and a utility set together")
        seen = torch.tensor([observed[layout.name] for layout in self.layouts])[self.module]
        contrast, total, eligible = self._columns(importance, observed, settings)
        ranked = {
            Category.SCU: (-contrast, seen & eligible),
            Category.UCU: (contrast, seen & eligible),
            Category.RU: (total, seen),
        }
        result = torch.where(seen, Category.CU, Category.UNOBSERVED).to(torch.int8)
        overlap = {}
        for category, (key, candidates) in ranked.items():
            order, free = _order(key, candidates), result == Category.CU
            chosen = self._take(order[free[order]], category, settings)
            if category != Category.SCU:
                alone = self._take(order, category, settings)
                overlap[category.name.lower()] = int((~free[alone]).sum())
            result[chosen] = category
        return result, overlap

    def normalise(
        self, importance: Mapping[str, torch.Tensor], observed: Mapping[str, bool], mode: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """S and U, float64 [2, all units], and the mean of S + U over the module's pool, float64 [modules].

        Of a pool that was observed in part, only that part counts for totals and means.
        """
        parts: list[torch.Tensor] = [torch.empty(0)] * len(self.layouts)
        means = torch.empty(len(self.layouts), dtype=torch.float64)
        for members in self.pools.values():
            names = [self.layouts[i].name for i in members]
            counted = [importance[name] for name in names if observed[name]] or [importance[name] for name in names]
            pool = torch.cat(counted, dim=1) if len(counted) > 1 else counted[0]
            scale = _scale(pool, mode)
            normalised = scale(pool)
            means[members] = normalised.sum() / normalised.shape[1]
            for i, name in zip(members, names, strict=True):
                parts[i] = scale(importance[name])
        return torch.cat(parts, dim=1), means

    def _columns(
        self, importance: Mapping[str, torch.Tensor], observed: Mapping[str, bool], settings: Settings
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Contrast and S + U, float64 [all units], and which units may become SCU or UCU, bool."""
        (safety, utility), means = self.normalise(importance, observed, settings.normalize)
        contrast, total = safety - utility, safety + utility
        if settings.contrast == "difference":
            return contrast, total, torch.ones_like(total, dtype=torch.bool)
        eligible = (total > 0) & (total >= RATIO_FLOOR * means[self.module])
        return torch.where(eligible, contrast / total, 0.0), total, eligible

    def _take(self, order: torch.Tensor, category: Category, settings: Settings) -> torch.Tensor:
        """The head of a ranking, as much as the ratio asks for and the floor lets through; flat indices."""
        head, capacity = self._head(order, category, settings), self._capacity(settings.floor)
        # The floor seldom binds, and finding whom to skip costs a sort of all units.
        if (torch.bincount(self.module[head], minlength=len(self.layouts)) <= capacity).all():
            return head
        return self._head(order[self._rank_in_module(order) < capacity[self.module[order]]], category, settings)

    def _head(self, order: torch.Tensor, category: Category, settings: Settings) -> torch.Tensor:
        """The head of a ranking, as much as the ratio asks for."""
        ratio = settings.ratio(category)
        if settings.basis == "units":
            wanted, available = float(round(ratio * self.module.numel())), order.numel()
            taken, tolerance = int(wanted), 1
        else:
            sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.cost[order].cumsum(0)])
            wanted, available = ratio * int(self.cost.sum()), int(sums[-1])
            taken, tolerance = _nearest(sums, wanted), int(self.cost.max())
        if wanted - available >= tolerance:
            asked = f"{category.name.lower()}={ratio:g} asks for {wanted:.0f} {settings.basis}"
            raise SsahError(
                f"{asked}, but only {available} are left by "
                f"floor={settings.floor:g}, other categories and unobserved modules; lower the ratio or the floor"
            )
        return order[:taken]

    def _rank_in_module(self, order: torch.Tensor) -> torch.Tensor:
        """For a ranking of units, how many earlier entries belong to the same module."""
        module = self.module[order]
        by_module = torch.argsort(module, stable=True)
        sizes = torch.bincount(module, minlength=len(self.layouts))
        first = sizes.cumsum(0) - sizes
        rank = torch.empty_like(order)
        rank[by_module] = torch.arange(order.numel()) - first[module[by_module]]
        return rank

    def _capacity(self, floor: float) -> torch.Tensor:
        """How many units of each module one category may take, int64 [modules]."""
        return torch.tensor([n - max(1, math.ceil(floor * n - _ROUNDING)) for n in self.sizes.tolist()])


def _order(key: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The flat indices of the candidates by rising key, ties by index."""
    index = candidates.nonzero().squeeze(1)
    return index[torch.argsort(key[index], stable=True)]


def _nearest(sums: torch.Tensor, wanted: float) -> int:
    """Index of the rising cumulative sum that is nearest to a value; the smaller one where two are equally near."""
    above = min(int(torch.searchsorted(sums.double(), wanted)), sums.numel() - 1)
    below = max(above - 1, 0)
    return above if int(sums[above]) - wanted < wanted - int(sums[below]) else below


def _scale(pool: torch.Tensor, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes S and U of a part of a pool comparable; pool and parts are float64 [2, units]."""
    if mode == "raw":
        return lambda part: part
    if mode == "share":
        total = pool.sum(1, keepdim=True)
        return lambda part: torch.where(total > 0, part / total, 0.0)
    mean = pool.mean(1, keepdim=True)
    variance = (pool - mean).square().sum(1, keepdim=True) / max(pool.shape[1] - 1, 1)
    # Equal values leave a deviation of rounding errors, which must not be blown up to z-scores of one.
    spread = variance.sqrt() > 1e-12 * pool.abs().amax(1, keepdim=True)
    return lambda part: torch.where(spread, (part - mean) / variance.sqrt(), 0.0)


def _check_finite(importance: Mapping[str, torch.Tensor]) -> None:
    for name, values in importance.items():
        if not torch.isfinite(values).all():
            row, unit = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise NonFiniteError(
                f"the {SETS[row]} importance of unit {unit} of {name} is {float(values[row, unit])}; "
                "the scores are damaged, score again"
            )


def _stability(scores: Scores, table: _Table, settings: Settings) -> dict[str, Any]:
    compared = {category.name.lower(): category for category in REPORTED if category != Category.UNOBSERVED}
    halves = []
    try:
        for h in (0, 1):
            observed = {name: bool((module.count[:, h] > 0).all()) for name, module in scores.modules.items()}
            halves.append(table.rank(scores.half(h), observed, settings)[0])
    except SsahError as error:
        return {**dict.fromkeys(compared), "agreement": None, "reason": str(error)}
    first, second = halves
    figures = {name: _jaccard(first == category, second == category) for name, category in compared.items()}
    return {**figures, "agreement": float((first == second).double().mean())}


def _jaccard(a: torch.Tensor, b: torch.Tensor) -> dict[str, float] | None:
    """Intersection over union, and its expectation for two random sets of the same size; None for two empty sets."""
    union = int((a | b).sum())
    if union == 0:
        return None
    fraction = float(a.double().mean() + b.double().mean()) / 2
    return {"jaccard": int((a & b).sum()) / union, "chance": fraction / (2 - fraction)}


def _load_category(path: str | os.PathLike[str], layout: UnitModule, tensor: torch.Tensor | None) -> torch.Tensor:
    values = files.check_tensor(path, layout.name, tensor, torch.int8, (layout.units,))
    if not set(values.unique().tolist()) <= set(Category):
        raise SsahError(f"cannot read {path}: {layout.name} holds values that are no category")
    return values


def _load_safety(
    path: str | os.PathLike[str], layouts: Mapping[str, UnitModule], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """I_S by module; {} where the file has none."""
    stored = {name: tensors.get(f"{name}.safety") for name in layouts}
    if all(tensor is None for tensor in stored.values()):
        return {}
    return {
        name: files.check_tensor(path, f"{name}.safety", tensor, torch.float64, (layouts[name].units,))
        for name, tensor in stored.items()
    }
