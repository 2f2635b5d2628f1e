"""The Scores file: per-channel moments of two calibration sets, and the importance of every unit computed from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ssah_fast import files
from ssah_fast.errors import SsahError, first_difference
from ssah_fast.units import UnitModule

SETS = ("safety", "utility")
ESTIMATORS = ("variance", "norm", "flap")
CONTROLS = ("norm", "variance", "swapped")
_TENSORS = ("count", "mean", "m2", "norm", "importance")


def chan_merge(
    count_a: torch.Tensor,
    mean_a: torch.Tensor,
    m2_a: torch.Tensor,
    count_b: torch.Tensor,
    mean_b: torch.Tensor,
    m2_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the moments of two disjoint samples (Chan, Golub and LeVeque 1979).

    Merging with an empty sample (count 0, mean 0, m2 0) returns the other one bit for bit.

    Args:
        count_a: int64 [...], number of values.
        mean_a: float64 [..., H].
        m2_a: float64 [..., H], sum of squared deviations from the mean.
        count_b: as `count_a`.
        mean_b: as `mean_a`.
        m2_b: as `m2_a`.

    Returns:
        count int64 [...], mean and m2 float64 [..., H] of both samples together.
    """
    count = count_a + count_b
    share_b = (count_b.double() / count.clamp(min=1)).unsqueeze(-1)
    delta = mean_b - mean_a
    mean = mean_a + delta * share_b
    m2 = m2_a + m2_b + delta * delta * share_b * count_a.double().unsqueeze(-1)
    return count, mean, m2


def importance(
    layout: UnitModule, count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor, norm: torch.Tensor, estimator: str
) -> torch.Tensor:
    """Importance of every unit of one module.

    A reader channel scores the spread of its activations times the squared L2 norm of its weight column; a unit scores
    the sum over its channels (one for an MLP neuron, one per query head of the group for a value channel). The spread:

    - variance: m2 / (n - 1), 0 for n < 2; SSAH, arXiv 2410.10862, equation for I, over tokens instead of sequences;
    - norm: (m2 + n mean^2) / n, the mean square; the square of Wanda's metric (arXiv 2306.11695) summed over a column;
    - flap: m2 as it is, because there it already holds FLAP's recurrence F (arXiv 2312.11983, WIFV).

    Args:
        layout: whose `channels` map units to reader channels.
        count: int64 [...], tokens seen.
        mean: float64 [..., H].
        m2: float64 [..., H].
        norm: float64 [H].
        estimator: "variance", "norm" or "flap".

    Returns:
        float64 [..., units].

    Raises:
        SsahError: unknown estimator.
    """
    n = count.double().unsqueeze(-1)
    if estimator == "variance":
        spread = torch.where(n >= 2, m2 / (n - 1).clamp(min=1), 0.0)
    elif estimator == "norm":
        spread = torch.where(n >= 1, m2 / n.clamp(min=1) + mean * mean, 0.0)
    elif estimator == "flap":
        spread = m2
    else:
        raise SsahError(f"estimator={estimator!r} is unknown; use {', '.join(ESTIMATORS)}")
    return (spread * norm)[..., layout.inputs()].sum(-1)


@dataclass
class ModuleScores:
    """Moments and importance of one module.

    The second axis of count, mean and m2 is the half of the calibration sequences, for the split-half stability of
    `identify`. FLAP's recurrence depends on the order of its input and cannot be merged, so the flap estimator keeps a
    third slot with the recurrence over everything: P below is 3 for flap and 2 otherwise.

    Attributes:
        layout: the module's units.
        count: int64 [2, P], tokens seen, by set (safety, utility) and half.
        mean: float64 [2, P, H], mean of each reader channel.
        m2: float64 [2, P, H], sum of squared deviations (flap: the recurrence F).
        norm: float64 [H], squared L2 norm of the reader's column.
        importance: float64 [2, units], I_S and I_U.
    """

    layout: UnitModule
    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor
    norm: torch.Tensor
    importance: torch.Tensor

    @classmethod
    def from_moments(
        cls,
        layout: UnitModule,
        count: torch.Tensor,
        mean: torch.Tensor,
        m2: torch.Tensor,
        norm: torch.Tensor,
        estimator: str,
    ) -> ModuleScores:
        """Compute the importance from the moments; shapes as in the class."""
        totals = _totals(count, mean, m2, estimator)
        return cls(layout, count, mean, m2, norm, importance(layout, *totals, norm, estimator))

    def total_count(self) -> torch.Tensor:
        """Tokens seen per set, int64 [2]."""
        return self.count[:, 2] if self.count.shape[1] == 3 else self.count.sum(1)

    def pooled_mean(self, estimator: str) -> torch.Tensor:
        """Mean of each reader channel over all tokens of both sets, float64 [H]; 0 where there were none."""
        count, mean, _ = _totals(self.count, self.mean, self.m2, estimator)
        return (count.double().unsqueeze(1) * mean).sum(0) / max(int(count.sum()), 1)

    def control(self, kind: str, estimator: str) -> torch.Tensor:
        """Another importance of every unit, float64 [2, units]; see `Scores.control`."""
        if kind == "swapped":
            return self.importance.flip(0)
        if kind == "norm":
            norm = self.norm[self.layout.inputs()].sum(-1)
            return torch.stack([norm, torch.zeros_like(norm)])
        totals = _totals(self.count, self.mean, self.m2, estimator)
        return importance(self.layout, *totals, torch.ones_like(self.norm), estimator)


class _PerModule(Mapping[str, torch.Tensor]):
    """A view on one figure of every module, in forward order."""

    def __init__(self, modules: dict[str, ModuleScores], pick: Callable[[ModuleScores], torch.Tensor]) -> None:
        self._modules, self._pick = modules, pick

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._pick(self._modules[name])

    def __iter__(self) -> Any:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@dataclass
class Scores:
    """What `score` measured.

    Attributes:
        modules: by name, in forward order.
        provenance: JSON-able: model, data, tokens, settings, versions; provenance["model"] is the model's fingerprint.
        estimator: "variance", "norm" or "flap".
    """

    modules: dict[str, ModuleScores]
    provenance: dict[str, Any]
    estimator: str

    @property
    def safety(self) -> Mapping[str, torch.Tensor]:
        """I_S of every module, float64 [units]."""
        return _PerModule(self.modules, lambda module: module.importance[0])

    @property
    def utility(self) -> Mapping[str, torch.Tensor]:
        """I_U of every module, float64 [units]."""
        return _PerModule(self.modules, lambda module: module.importance[1])

    @property
    def count(self) -> Mapping[str, torch.Tensor]:
        """Tokens that every module saw, int64 [2] (safety, utility)."""
        return _PerModule(self.modules, ModuleScores.total_count)

    def half(self, h: int) -> dict[str, torch.Tensor]:
        """Importance computed from one half of the calibration sequences alone.

        Args:
            h: 0 or 1.

        Returns:
            float64 [2, units] per module.

        Raises:
            SsahError: in this half a set has no tokens at all.
        """
        if h not in (0, 1):
            raise SsahError(f"h={h!r} is not a half; use 0 or 1")
        for index, name in enumerate(SETS):
            if not any(module.count[index, h] for module in self.modules.values()):
                raise SsahError(f"half {h} of the {name} set has no tokens; score at least two sequences per set")
        return {
            name: importance(m.layout, m.count[:, h], m.mean[:, h], m.m2[:, h], m.norm, self.estimator)
            for name, m in self.modules.items()
        }

    def control(self, kind: str) -> Scores:
        """These scores with another importance of every unit, to rank by something that should find nothing.

        Args:
            kind: "norm" (I_S is the squared norm of the unit's reader columns alone, I_U is 0), "variance" (the spread
                of the activations alone, as if all columns had the norm 1) or "swapped" (I_S and I_U exchanged).

        Raises:
            SsahError: unknown kind.
        """
        if kind not in CONTROLS:
            raise SsahError(f"control {kind!r} is unknown; use {', '.join(CONTROLS)}")
        modules = {
            name: replace(module, importance=module.control(kind, self.estimator))
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: the file.

        Raises:
            SsahError: the path cannot be written.
            RunError: the write failed, for example on a full disk.
        """
        header = {
            "estimator": self.estimator,
            "layouts": [module.layout.to_json() for module in self.modules.values()],
            "provenance": self.provenance,
        }
        tensors = {f"{name}.{key}": getattr(module, key) for name, module in self.modules.items() for key in _TENSORS}
        files.save_tensors(path, "scores", header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a scores file.

        Args:
            path: the file.

        Returns:
            The scores, on the CPU.

        Raises:
            SsahError: the file is missing, truncated, not a scores file, of a newer schema, or inconsistent.
        """
        header, tensors = files.load_tensors(path, "scores")
        estimator, layouts = header.get("estimator"), files.read_layouts(path, header)
        if estimator not in ESTIMATORS:
            raise SsahError(f"cannot read {path}: its estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
        modules = {layout.name: _load_module(path, layout, tensors, estimator) for layout in layouts}
        return cls(modules, header.get("provenance", {}), estimator)

    @staticmethod
    def merge(parts: Sequence[Scores]) -> Scores:
        """Add up scores of the same model on different calibration data, exactly, in argument order.

        Half h of the result is half h of the parts. Whether two parts share calibration data is not checked.

        Args:
            parts: one or more scores with the same model fingerprint, estimator, units and weights.

        Returns:
            The scores of all data together. Provenance entries on which all parts agree are kept, and "parts" lists the
            provenance of each part.

        Raises:
            SsahError: nothing to merge, the flap estimator, or parts that differ; the message names the difference.
        """
        if not parts:
            raise SsahError("merge needs at least one Scores")
        if any(part.estimator == "flap" for part in parts):
            raise SsahError(
                "scores with estimator 'flap' cannot be merged, its recurrence depends on the order of the data; "
                "score all data in one run or use estimator 'variance'"
            )
        for number, part in enumerate(parts[1:], 2):
            _check_mergeable(parts[0], part, f"part {number}")
        estimator = parts[0].estimator
        modules = {name: _merge_module([part.modules[name] for part in parts], estimator) for name in parts[0].modules}
        return Scores(modules, _merge_provenance([part.provenance for part in parts]), estimator)


def _totals(
    count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor, estimator: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if estimator == "flap":
        return count[:, 2], mean[:, 2], m2[:, 2]
    return chan_merge(count[:, 0], mean[:, 0], m2[:, 0], count[:, 1], mean[:, 1], m2[:, 1])


def _load_module(
    path: str | os.PathLike[str], layout: UnitModule, tensors: Mapping[str, torch.Tensor], estimator: str
) -> ModuleScores:
    slots, norm = 3 if estimator == "flap" else 2, tensors.get(f"{layout.name}.norm")
    channels = 0 if norm is None else norm.numel()
    expected = {
        "count": (torch.int64, (2, slots)),
        "mean": (torch.float64, (2, slots, channels)),
        "m2": (torch.float64, (2, slots, channels)),
        "norm": (torch.float64, (channels,)),
        "importance": (torch.float64, (2, layout.units)),
    }
    found = {}
    for key, (dtype, shape) in expected.items():
        name = f"{layout.name}.{key}"
        found[key] = files.check_tensor(path, name, tensors.get(name), dtype, shape)
    if int(layout.inputs().max()) >= channels:
        raise SsahError(f"cannot read {path}: {layout.name} has {channels} channels, fewer than its units need")
    return ModuleScores(layout, **found)


def _check_mergeable(first: Scores, other: Scores, label: str) -> None:
    if difference := first_difference(first.provenance.get("model"), other.provenance.get("model"), "model"):
        entry, a, b = difference
        raise SsahError(f"cannot merge scores of different models: {entry} is {a!r} and {b!r} in part 1 and {label}")
    if first.estimator != other.estimator:
        raise SsahError(f"cannot merge estimator {first.estimator!r} of part 1 with {other.estimator!r} of {label}")
    if list(first.modules) != list(other.modules):
        odd = sorted(set(first.modules) ^ set(other.modules)) or ["their order"]
        raise SsahError(f"cannot merge: part 1 and {label} differ in their modules ({odd[0]})")
    for name, module in first.modules.items():
        twin = other.modules[name]
        if module.layout.to_json() != twin.layout.to_json():
            raise SsahError(f"cannot merge: the units of {name} differ in part 1 and {label} (another attention unit?)")
        if not torch.equal(module.norm, twin.norm):
            raise SsahError(f"cannot merge: the weights of {module.layout.reader} differ in part 1 and {label}")


def _merge_module(parts: Sequence[ModuleScores], estimator: str) -> ModuleScores:
    state = parts[0].count, parts[0].mean, parts[0].m2
    for part in parts[1:]:
        state = chan_merge(*state, part.count, part.mean, part.m2)
    return ModuleScores.from_moments(parts[0].layout, *state, parts[0].norm, estimator)


def _merge_provenance(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    common = {key: value for key, value in parts[0].items() if all(part.get(key) == value for part in parts)}
    flat = [piece for part in parts for piece in part.get("parts", [part])]
    return {**{key: value for key, value in common.items() if key != "parts"}, "parts": flat}
