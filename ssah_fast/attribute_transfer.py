"""What fine-tuning made of the units: the flow between categories from one units file to another.

The attribute transfer of SSAH (Li & Kim, arXiv 2410.10862, Figure 5): the model is scored and partitioned before and
after fine-tuning, and every unit is counted by the category that it had and the one that it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ssah_fast import fingerprints
from ssah_fast.categories import REPORTED, Category
from ssah_fast.errors import SsahError, first_difference
from ssah_fast.partition import Units
from ssah_fast.scores import SETS

KIND = "transfer"
SCHEMA = 1


def check_same_layout(before: Units, after: Units) -> None:
    """Refuse to compare units that are not the same parts of the same architecture.

    Raises:
        SsahError: They are not; the message names the first module that differs.
    """
    layouts = [{name: layout.to_json() for name, layout in units.layouts.items()} for units in (before, after)]
    for name in {**layouts[0], **layouts[1]}:
        if layouts[0].get(name) != layouts[1].get(name):
            raise SsahError(f"units of different models: the units of {name} are not the same in both files")


def module_flows(before: Units, after: Units) -> dict[str, torch.Tensor]:
    """How many units of each module went from which category to which.

    Args:
        before: The units of one model.
        after: The units of another of its architecture.

    Returns:
        Per module, in forward order, int64 [5, 5]: the row is the category before, the column the one after, both in
        the order of `categories.REPORTED`.

    Raises:
        SsahError: The two are of different architectures or kinds of units.
    """
    check_same_layout(before, after)
    return {name: _members(before.category[name]) @ _members(after.category[name]).T for name in before.category}


def transfer(before: Units, after: Units) -> dict[str, Any]:
    """The category flow between two units files of one architecture.

    Args:
        before: Usually of the aligned model.
        after: Usually of the fine-tuned model; best scored on the same data and partitioned with the same settings.

    Returns:
        A JSON document: "categories" names the rows and columns of every matrix (UNOBSERVED only where a unit is).
        "units" and "parameters" are counts, and their rows sum to BEFORE, their columns to AFTER; "units_percent" and
        "parameters_percent" are the same in percent of all; "unchanged_units_percent" and
        "unchanged_parameters_percent" are what lies on the diagonal. "layers" and "kinds" ("mlp", "attention") have the
        same entries, in percent of the layer or kind. "notes" lists what besides the weights differs in the two.

    Raises:
        SsahError: The two are of different architectures or kinds of units.
    """
    flows = module_flows(before, after)
    layouts = before.layouts
    seen = sum(flows.values(), torch.zeros(len(REPORTED), len(REPORTED), dtype=torch.int64))
    kept = [i for i, c in enumerate(REPORTED) if c is not Category.UNOBSERVED or seen[i].any() or seen[:, i].any()]

    def part(names: Sequence[str]) -> dict[str, Any]:
        units = sum(flows[name][kept][:, kept] for name in names)
        parameters = sum(flows[name][kept][:, kept] * layouts[name].cost for name in names)
        return {**_figures("units", units), **_figures("parameters", parameters)}

    layers: dict[int, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for name in flows:
        layers.setdefault(layouts[name].layer, []).append(name)
        kinds.setdefault(layouts[name].kind, []).append(name)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "before": _origin(before),
        "after": _origin(after),
        "notes": _differences(before, after),
        "categories": [REPORTED[i].name.lower() for i in kept],
        **part(list(flows)),
        "layers": [{"layer": layer, **part(names)} for layer, names in sorted(layers.items())],
        "kinds": {kind: part(names) for kind, names in kinds.items()},
        "versions": fingerprints.versions(),
    }


def _members(category: torch.Tensor) -> torch.Tensor:
    """Which units are in each category, int64 [5, units]."""
    return torch.stack([category == wanted for wanted in REPORTED]).to(torch.int64)


def _figures(name: str, flow: Any) -> dict[str, Any]:
    percent = 100 * flow.double() / flow.sum()
    return {
        name: flow.tolist(),
        f"{name}_percent": percent.tolist(),
        f"unchanged_{name}_percent": float(percent.diagonal().sum()),
    }


def _origin(units: Units) -> dict[str, Any]:
    """Where a units file comes from, without the hashes of the calibration prompts."""
    return {
        "settings": units.settings,
        "scores_sha256": units.provenance.get("scores_sha256"),
        "scores": _without_prompts(units.provenance.get("scores", {})),
    }


def _without_prompts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_prompts(inner) for key, inner in value.items() if key != "prompts"}
    return [_without_prompts(inner) for inner in value] if isinstance(value, list) else value


def _differences(before: Units, after: Units) -> list[str]:
    """What decides the categories beside the weights and is not the same: the first difference of each kind."""
    old, new = _decisive(before), _decisive(after)
    found = (first_difference(old[name], new[name], name) for name in old)
    return [f"{name} is {a!r} before and {b!r} after" for name, a, b in filter(None, found)]


def _decisive(units: Units) -> dict[str, Any]:
    scores = units.provenance.get("scores", {})
    parts = scores.get("parts", [scores])  # merged scores have several
    return {
        "identify": units.settings,
        "score": scores.get("settings"),
        "data": {name: [part.get("data", {}).get(name, {}).get("sha256") for part in parts] for name in SETS},
        "model": {key: scores.get("model", {}).get(key) for key in ("architecture", "config_sha256")},
    }
