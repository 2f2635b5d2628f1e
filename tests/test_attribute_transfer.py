"""The flow of units between categories."""

import collections
import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from tiny_units import tiny_units

from ssah_fast.attribute_transfer import transfer
from ssah_fast.categories import Category
from ssah_fast.errors import SsahError


def two(model_type: str = "llama", **overrides):
    model = tiny_model(model_type, **overrides)
    return tiny_units(model), tiny_units(model, seed=1)


def counted(before, after, wanted=lambda layout: True) -> dict[str, collections.Counter]:
    """One unit at a time: how many units, and parameters, went from which category to which."""
    found = {"units": collections.Counter(), "parameters": collections.Counter()}
    for name, values in before.category.items():
        layout = before.layouts[name]
        if wanted(layout):
            for old, new in zip(values.tolist(), after.category[name].tolist(), strict=True):
                names = Category(old).name.lower(), Category(new).name.lower()
                found["units"][names] += 1
                found["parameters"][names] += layout.cost
    return found


def check(part: dict, expected: dict[str, collections.Counter], names: list[str]) -> None:
    for key, counts in expected.items():
        total = sum(counts.values())
        for i, old in enumerate(names):
            for j, new in enumerate(names):
                assert part[key][i][j] == counts[old, new]
                assert part[f"{key}_percent"][i][j] == pytest.approx(100 * counts[old, new] / total)
        kept = sum(counts[name, name] for name in names)
        assert part[f"unchanged_{key}_percent"] == pytest.approx(100 * kept / total)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_the_flow_is_what_counting_gives_in_all_per_layer_and_per_kind(model_type):
    before, after = two(model_type)
    document = transfer(before, after)
    names = document["categories"]
    assert names == ["scu", "ucu", "cu", "ru"]
    check(document, counted(before, after), names)
    assert [part["layer"] for part in document["layers"]] == [0, 1]
    for part in document["layers"]:
        check(part, counted(before, after, lambda layout, i=part["layer"]: layout.layer == i), names)
    assert document["kinds"].keys() == {"attention", "mlp"}
    for kind, part in document["kinds"].items():
        check(part, counted(before, after, lambda layout, kind=kind: layout.kind == kind), names)


def test_rows_sum_to_before_and_columns_to_after():
    before, after = two()
    document = transfer(before, after)
    for i, name in enumerate(document["categories"]):
        assert sum(document["units"][i]) == before.count(name)
        assert sum(row[i] for row in document["units"]) == after.count(name)
        assert sum(document["parameters"][i]) == before.parameters(name)
        assert sum(row[i] for row in document["parameters"]) == after.parameters(name)


def test_nothing_flows_between_a_file_and_itself():
    units, _ = two()
    document = transfer(units, units)
    assert document["unchanged_units_percent"] == document["unchanged_parameters_percent"] == 100
    assert document["notes"] == []


def test_unobserved_is_a_category_where_a_unit_is():
    before, after = two("qwen2_moe")
    name = next(name for name, layout in after.layouts.items() if layout.expert == 2)
    after.category[name] = torch.full_like(after.category[name], Category.UNOBSERVED)
    document = transfer(before, after)
    assert document["categories"][-1] == "unobserved"
    assert document["units"][-1] == [0] * 5
    assert sum(row[-1] for row in document["units"]) == after.layouts[name].units
    assert transfer(after, before)["categories"] == document["categories"]


def provenance(sha: str) -> dict:
    data = {"safety": {"sha256": sha, "prompts": ["a" * 16]}, "utility": {"sha256": "u", "prompts": []}}
    return {"scores": {"data": data, "settings": {"tokens": "response"}}, "scores_sha256": "x"}


def test_what_differs_besides_the_weights_is_noted_and_prompt_hashes_are_left_out():
    before, after = two()
    before, after = replace(before, settings={"scu": 0.06}), replace(after, settings={"scu": 0.02})
    before.provenance, after.provenance = provenance("s"), provenance("t")
    document = transfer(before, after)
    assert len(document["notes"]) == 2
    assert document["notes"][0] == "identify.scu is 0.06 before and 0.02 after"
    assert document["notes"][1] == "data.safety is ['s'] before and ['t'] after"
    assert document["before"]["scores"]["data"]["safety"] == {"sha256": "s"}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_merged_scores_are_compared_part_by_part():
    before, after = two()
    before.provenance = {"scores": {"parts": [provenance("s")["scores"], provenance("t")["scores"]]}}
    after.provenance = copy.deepcopy(before.provenance)
    assert transfer(before, after)["notes"] == []
    after.provenance["scores"]["parts"].reverse()
    assert transfer(before, after)["notes"] != []
    assert "prompts" not in transfer(before, after)["before"]["scores"]["parts"][0]["data"]["safety"]


def test_units_of_other_models_are_refused():
    before, _ = two()
    for overrides, module in (({"intermediate_size": 60}, "layers.0.mlp"), ({"num_hidden_layers": 3}, "layers.2.self")):
        other, _ = two(**overrides)
        for pair in ((before, other), (other, before)):
            with pytest.raises(SsahError, match=rf"units of different models: the units of model\.{module}"):
                transfer(*pair)
