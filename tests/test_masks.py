"""Masks: what is frozen, against brute force and against what the models compute; set operations; files; bad input."""

import copy
import operator
import pickle
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, MODEL_TYPES, tiny_config, tiny_model
from tiny_units import frozen_elements, tiny_units
from torch import nn
from transformers import AutoModelForCausalLM

from ssah_fast import files
from ssah_fast.categories import Category, parse_selection
from ssah_fast.errors import SsahError
from ssah_fast.masks import KINDS, OTHER, Mask, Region, full_policy, tensor_kind, tensor_layer
from ssah_fast.partition import Units
from ssah_fast.units import canonical_name, find_units

HEAD_DIM = HIDDEN // HEADS
GROUP = HEADS // KV_HEADS


def on_meta(model_type: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))


def all_frozen_elements(mask: Mask, model: nn.Module) -> dict[str, torch.Tensor]:
    """True where an element is frozen, per parameter."""
    return {name: frozen_elements(mask, name, parameter.shape) for name, parameter in model.named_parameters()}


def perturb(model: nn.Module, mask: Mask) -> nn.Module:
    """A copy of the model with every trainable element changed."""
    changed = copy.deepcopy(model)
    flags = all_frozen_elements(mask, model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5
            parameter.add_(torch.where(flags[name], 0.0, noise.to(parameter.dtype)))
    return changed


def reader_inputs(model: nn.Module, reader: str) -> torch.Tensor:
    seen = []
    module = model.get_submodule(reader)
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        model(torch.arange(3, 12).unsqueeze(0))
    return seen[0].flatten(0, -2)


# by hand


def test_regions_are_normalised():
    mask = Mask(
        {
            "a": ("rows", [3, 1, 3]),
            "b": ("columns", torch.tensor([True, False, True])),
            "c": (2, None),
            "d": ("rows", range(2)),
            "e": ("rows", []),
        }
    )
    assert [(region.axis, region.size) for region in mask.values()] == [
        (0, None),
        (1, 3),
        (2, None),
        (0, None),
        (0, None),
    ]
    assert mask["a"].frozen.tolist() == [1, 3]
    assert mask["a"].frozen.dtype == torch.int64
    assert mask["b"].frozen.tolist() == [0, 2]
    assert mask["c"].frozen is None
    assert mask["e"].empty
    assert Region(0, [0, 1, 2], 3).frozen is None


def test_trainable_is_the_complement():
    mask = Mask({"a": ("rows", [3, 1]), "b": ("columns", [0]), "c": ("rows", None), "d": ("rows", [])})
    for name, shape, axis, expected in (
        ("a", (5, 2), 0, [0, 2, 4]),
        ("b", (4, 3), 1, [1, 2]),
        ("c", (4, 3), 0, []),
        ("c", (), 0, []),
        ("d", (2,), 0, [0, 1]),
    ):
        found = mask.trainable(name, shape)
        assert (found[0], found[1].tolist(), found[1].dtype) == (axis, expected, torch.int64)
    assert mask.trainable("other", (3,)) is None


def test_names_are_canonical():
    mask = Mask({"module._orig_mod.a.weight": ("rows", [1])})
    assert list(mask) == ["a.weight"]
    assert mask["_fsdp_wrapped_module.a.weight"] is mask["a.weight"]
    assert "module.a.weight" in mask
    assert "b" not in mask


def test_the_hash_is_of_what_is_frozen():
    mask = Mask({"a": ("rows", [1, 2]), "b": ("columns", None)}, {"by": "x"})
    assert mask == Mask({"b": ("rows", None), "a": ("rows", [2, 1]), "c": ("rows", [])})
    assert hash(mask) == hash(Mask({"b": ("rows", None), "a": ("rows", [2, 1])}))
    assert re.fullmatch("[0-9a-f]{64}", mask.sha256)
    for other in (
        {"a": ("columns", [1, 2]), "b": ("rows", None)},
        {"a": ("rows", [1]), "b": ("rows", None)},
        {"a": ("rows", None), "b": ("rows", None)},
        {"x": ("rows", [1, 2]), "b": ("rows", None)},
        {"a": ("rows", [1, 2])},
    ):
        assert mask != Mask(other)
    assert Mask({"a": Region(1, None)})["a"] == Region(0, None)
    assert Region(0, [1]) != "a"
    assert mask != "a"


def test_the_hash_never_changes():
    # Checkpoints carry it: one written by an older version must still be recognised.
    mask = Mask({"a": ("rows", [1, 2]), "b": ("columns", None)})
    assert mask.sha256 == "55a0c19c65772a17c435d821f1c5b3cec4b06bdaabd4dda19a654224bab13dc0"


def test_copies_keep_the_mask():
    mask = Mask({"a": ("rows", [1, 2]), "b": Region(1, [0], 3, torch.zeros(3, dtype=torch.int8))}, {"by": "x"})
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask
        assert other.provenance == mask.provenance
        assert torch.equal(other["b"].category, mask["b"].category)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("rows", [-1]), r"mask: a: index -1 is out of range; give 0 or more"),
        (("row", [1]), r"mask: a: axis 'row' is none; use 'rows', 'columns' or the number of an axis"),
        ((-1, [1]), "axis -1 is none"),
        (("rows", [0.5]), r"mask: a: frozen is torch\.float32 \[1\], not one list of integers"),
        (("rows", [[1]]), r"frozen is torch\.int64 \[1, 1\]"),
        (("rows", "abc"), "frozen='abc' is no list of indices"),
        (("rows", {1}), "is no list of indices"),
        (3, r"mask: a: 3 is not \('rows' or 'columns', frozen indices\)"),
        (("rows",), "is not"),
    ],
)
def test_a_malformed_entry_is_named(entry, message):
    with pytest.raises(SsahError, match=message):
        Mask({"a": entry})


def test_a_malformed_region_is_named():
    with pytest.raises(SsahError, match="index 3 is out of range; give from 0 to 2"):
        Region(0, [3], 3)
    with pytest.raises(SsahError, match=r"frozen has 2 entries, but the axis has the size 3"):
        Region(0, torch.tensor([True, False]), 3)
    with pytest.raises(SsahError, match=r"category is torch\.int8 \[2\], expected torch\.int8 \[3\]"):
        Region(0, [0], 3, torch.zeros(2, dtype=torch.int8))
    with pytest.raises(SsahError, match="no category"):
        Region(0, [0], 1, torch.full((1,), 7, dtype=torch.int8))
    with pytest.raises(SsahError, match="size of the axis is unknown"):
        Region(0, [0]).as_bool()
    with pytest.raises(SsahError, match="axis 0 has the size 4, the mask was made for 3"):
        Region(0, [0], 3).trainable(4)
    with pytest.raises(SsahError, match="index 5 is out of range, axis 0 has the size 4"):
        Region(0, [5]).trainable(4)


def test_two_entries_for_one_parameter_overlap():
    with pytest.raises(SsahError, match=r"module\.a overlaps with another entry for a"):
        Mask({"a": ("rows", [1]), "module.a": ("columns", [1])})


# check


def parameters(**shapes) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.empty(shape, device="meta")) for name, shape in shapes.items()]


def test_a_fitting_mask_passes():
    mask = Mask({"a": ("rows", [1]), "b": ("columns", None)})
    mask.check(parameters(a=(2, 3), b=(2, 3), c=(4,)))
    mask.check(parameters(a=(2, 3)), complete=False)
    Mask({}).check(parameters(a=(2,)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x": ("rows", [0])}, r"mask of another model: it names x, which this model lacks \(1 of 1 names\)"),
        ({"a": ("rows", [2])}, r"mask of another model: a has the shape \[2, 3\], the mask is for axis 0 and index 2"),
        ({"a": (2, [0])}, "the mask is for axis 2 and index 0"),
        ({"a": Region(0, [0], 3)}, "the mask is for axis 0 of size 3"),
        ({"a": Region(1, None, 4)}, "the mask is for axis 1 of size 4"),
        ({"a": ("rows", None), "b": ("rows", [0, 1, 2, 3])}, "freezes every parameter; nothing is left to train"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(entries, message):
    with pytest.raises(SsahError, match=message):
        Mask(entries).check(parameters(a=(2, 3), b=(4,)))


def test_a_mask_of_none_of_the_given_parameters_is_refused():
    with pytest.raises(SsahError, match="mask of another model: it names x"):
        Mask({"x": ("rows", [0])}).check(parameters(a=(2, 3)), complete=False)


def test_two_names_of_one_tensor_must_agree():
    shared = torch.empty(4, 2)
    tied = [("embed.weight", shared), ("lm_head.weight", shared), ("w", torch.empty(2))]
    Mask({"embed.weight": ("rows", [1]), "lm_head.weight": ("rows", [1])}).check(tied)
    Mask({"embed.weight": ("rows", [1])}).check(tied)
    with pytest.raises(SsahError, match="nothing is left to train"):
        Mask({"embed.weight": ("rows", None), "w": ("rows", None)}).check(tied)
    for entries in (
        {"lm_head.weight": ("rows", [1])},
        {"embed.weight": ("rows", [0]), "lm_head.weight": ("rows", [1])},
    ):
        with pytest.raises(SsahError, match=r"overlapping regions, embed\.weight and lm_head\.weight are one tensor"):
            Mask(entries).check(tied)


# set operations

SIZES = {"a": 7, "b": 5, "c": 3}
SETS = st.fixed_dictionaries(
    {}, optional={name: st.one_of(st.none(), st.sets(st.integers(0, n - 1))) for name, n in SIZES.items()}
)


def as_mask(sets: dict[str, set[int] | None]) -> Mask:
    return Mask({name: Region(0, None if s is None else sorted(s), SIZES[name]) for name, s in sets.items()})


def as_sets(sets: dict[str, set[int] | None]) -> dict[str, set[int]]:
    everything = {name: set(range(n)) for name, n in SIZES.items()}
    return {name: everything[name] if sets.get(name, set()) is None else sets.get(name, set()) for name in SIZES}


@settings(max_examples=150, deadline=None)
@given(SETS, SETS)
def test_set_operations_are_those_of_sets(first, second):
    a, b, x, y = as_mask(first), as_mask(second), as_sets(first), as_sets(second)
    for result, expected in (
        (a | b, {name: x[name] | y[name] for name in SIZES}),
        (a & b, {name: x[name] & y[name] for name in SIZES}),
        (a - b, {name: x[name] - y[name] for name in SIZES}),
    ):
        assert result == as_mask(expected)
        shapes = {name: (n, 2) for name, n in SIZES.items()}
        for name in result:
            assert set(range(SIZES[name])) - set(result.trainable(name, shapes[name])[1].tolist()) == expected[name]
    assert a | b == b | a
    assert (a - b) & b == Mask({})
    assert (a & b) | (a - b) == a
    assert a - (a - b) == a & b


@settings(max_examples=60, deadline=None)
@given(SETS, st.booleans(), st.booleans())
def test_a_saved_mask_reads_back(tmp_path_factory, sets, sized, categories):
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    regions = {}
    for name, frozen in sets.items():
        category = torch.arange(SIZES[name]).remainder(6).sub(2).to(torch.int8) if sized and categories else None
        regions[name] = Region(0, None if frozen is None else sorted(frozen), SIZES[name] if sized else None, category)
    mask = Mask(regions, {"freeze": "scu", "policy": {"norms": "train"}})
    mask.save(path)
    loaded = Mask.load(path)
    assert loaded == mask
    assert loaded.sha256 == mask.sha256
    assert loaded.provenance == mask.provenance
    assert list(loaded) == list(mask)
    for name, region in mask.items():
        assert loaded[name].size == region.size
        assert (loaded[name].frozen is None) == (region.frozen is None)
        if region.category is not None:
            assert torch.equal(loaded[name].category, region.category)


def test_sizes_are_needed_only_where_unavoidable():
    whole, part = Mask({"a": ("rows", None)}), Mask({"a": ("columns", [1])})
    assert whole | part == whole
    assert whole & part == part
    assert part - whole == Mask({})
    assert whole - Mask({}) == whole
    with pytest.raises(SsahError, match="masks: a: frozen as a whole in one and in part in the other, of unknown size"):
        whole - part
    assert whole - Mask({"a": Region(1, [1], 3)}) == Mask({"a": ("columns", [0, 2])})


@pytest.mark.parametrize("operation", [operator.or_, operator.and_, operator.sub])
def test_masks_that_cannot_be_combined_are_refused(operation):
    rows = Mask({"a": Region(0, [1], 4)})
    with pytest.raises(SsahError, match="masks: a: frozen along axis 0 in one and along axis 1 in the other"):
        operation(rows, Mask({"a": ("columns", [1])}))
    with pytest.raises(SsahError, match="masks: a: the axis has the size 4 in one and 5 in the other"):
        operation(rows, Mask({"a": Region(0, [1], 5)}))
    with pytest.raises(TypeError):
        operation(rows, {"a": [1]})


def test_results_keep_categories_and_say_where_they_come_from():
    category = torch.tensor([3, 1, -2], dtype=torch.int8)
    known, hand = Mask({"a": Region(0, [0], 3, category)}, {"freeze": "scu"}), Mask({"a": ("rows", [1])})
    for result in (known | hand, hand | known, hand & known, hand - known, known - Mask({})):
        assert torch.equal(result["a"].category, category)
        assert result["a"].size == 3
    assert (known | hand).provenance == {"operation": "|", "operands": [{"freeze": "scu"}, {}]}


# files


def test_a_damaged_mask_file_is_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    mask = Mask({"a": Region(0, [1], 3), "b": ("rows", None)})
    mask.save(path)
    header, tensors = files.load_tensors(path, "mask")
    assert tensors["a.frozen"].dtype == torch.int32
    body = {key: header[key] for key in ("regions", "provenance", "sha256")}
    for change, message in (
        ({"tensors": {"a.frozen": torch.tensor([2], dtype=torch.int32)}}, "does not match its own sha256"),
        ({"tensors": {"a.frozen": torch.tensor([3], dtype=torch.int32)}}, "regions are damaged .*index 3"),
        ({"tensors": {}}, "regions are damaged"),
        ({"header": {**body, "regions": [{"parameter": "a"}]}}, "regions are damaged"),
        ({"header": {"regions": body["regions"]}}, "regions are damaged"),
    ):
        files.save_tensors(path, "mask", change.get("header", body), change.get("tensors", tensors))
        with pytest.raises(SsahError, match=f"cannot read .*{message}"):
            Mask.load(path)


def test_an_index_beyond_int32_survives(tmp_path):
    mask = Mask({"a": ("rows", [5, 2**31])})
    mask.save(tmp_path / "mask")
    assert Mask.load(tmp_path / "mask") == mask


def test_another_kind_of_file_is_refused(tmp_path):
    Mask({"a": ("rows", [1])}).save(tmp_path / "mask")
    with pytest.raises(SsahError, match=r"a mask file where a units file is needed; `ssah-fast identify` writes one"):
        Units.load(tmp_path / "mask")
    tiny_units(on_meta("llama")).save(tmp_path / "units")
    with pytest.raises(SsahError, match=r"a units file where a mask file is needed; `mask\.save\(path\)` writes one"):
        Mask.load(tmp_path / "units")


# selections


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("scu", ["scu"]),
        ("SCU, cu:6%", ["scu", "cu:6%"]),
        (["scu", "cu:0.06"], ["scu", "cu:6%"]),
        (["esu,euu", "unobserved"], ["scu", "ucu", "unobserved"]),
        (Category.RU, ["ru"]),
        ([Category.RU, "cu : 1.3 %"], ["ru", "cu:1.3%"]),
        ("cu:0%,scu,", ["cu:0%", "scu"]),
        ("cu:1", ["cu:100%"]),
    ],
)
def test_selections(selection, expected):
    assert [str(selected) for selected in parse_selection(selection, "freeze")] == expected


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("", "freeze names no category; write for example freeze='scu,cu:6%'"),
        ([], "freeze names no category"),
        ("xcu", r"freeze='xcu': category 'xcu' is unknown; use scu, ucu, cu, ru, unobserved"),
        ("scu,esu", "freeze='scu,esu' names scu twice"),
        ("cu:1%,cu:2%", "names cu twice"),
        ("cu:x", "freeze='cu:x': 'x' is not a ratio; write cu:6% or cu:0.06"),
        ("cu:", "'' is not a ratio"),
        ("cu:%", "'%' is not a ratio"),
        ("cu:101%", "freeze='cu:101%': 101% is out of range"),
        ("cu:-1%", "-1% is out of range"),
        ("cu:nan", "nan is out of range"),
        ("cu:6", "6 is out of range"),
    ],
)
def test_a_selection_that_cannot_be_read_is_named(selection, message):
    with pytest.raises(SsahError, match=message):
        parse_selection(selection, "freeze")


def flat(units: Units, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values[name] for name in units.modules])


def frozen_units(mask: Mask, units: Units) -> torch.Tensor:
    """Which units have all their slices in the mask."""
    flags = []
    for layout in units.layouts.values():
        found = [mask[part.parameter].as_bool()[part.indices(layout.units)].all(1) for part in layout.slices]
        flags.append(torch.stack(found).all(0))
    return torch.cat(flags)


def test_a_ratio_takes_the_safest_of_a_category():
    model = on_meta("llama")
    units = tiny_units(model)
    categories, safety = flat(units, units.category), flat(units, units.safety)
    wanted = round(0.06 * categories.numel())
    members = [i for i in range(categories.numel()) if categories[i] == Category.CU]
    expected = set(sorted(members, key=lambda i: (-float(safety[i]), i))[:wanted])
    frozen = frozen_units(units.mask(model, "cu:6%"), units)
    assert set(frozen.nonzero().flatten().tolist()) == expected
    both = frozen_units(units.mask(model, ["scu", "cu:6%"]), units)
    assert torch.equal(both, frozen | (categories == Category.SCU))


def test_ties_go_to_the_earlier_module_and_the_lower_index():
    model = on_meta("llama")
    units = tiny_units(model)
    for name in units.modules:
        units.safety[name].fill_(0.5)
        units.category[name].fill_(Category.RU)
    frozen = frozen_units(units.mask(model, freeze="ru:5%"), units)
    assert frozen.nonzero().flatten().tolist() == list(range(round(0.05 * frozen.numel())))


def test_a_ratio_beyond_the_category_is_refused():
    units = tiny_units(on_meta("llama"))
    with pytest.raises(SsahError, match=r"freeze='scu:90%' asks for 122 units, but the category has \d+; lower the"):
        units.mask(on_meta("llama"), "scu:90%")


def test_a_units_file_without_safety_still_loads(tmp_path):
    model = on_meta("llama")
    units = tiny_units(model)
    whole = units.mask(model, "cu")
    units.safety = {}
    units.save(tmp_path / "units")
    loaded = Units.load(tmp_path / "units")
    assert loaded.safety == {}
    assert loaded.mask(model, "cu") == whole
    with pytest.raises(SsahError, match=r"freeze='cu:6%' needs I_S, which this units file lacks; run identify again"):
        loaded.mask(model, "cu:6%")


def test_unobserved_can_be_named():
    model = on_meta("llama")
    units = tiny_units(model)
    units.category[units.modules[0]].fill_(Category.UNOBSERVED)
    frozen = frozen_units(units.mask(model, "unobserved"), units)
    assert torch.equal(frozen, flat(units, units.category) == Category.UNOBSERVED)


# from units, against a brute force that knows each architecture


def llama_frozen(prefix: str, keep: dict[str, list[bool]], groups: bool) -> set[tuple[str, int, int]]:
    """(parameter, axis, index) of everything frozen in one layer, for separate projections."""
    frozen = set()
    for j in range(INTERMEDIATE):
        if keep["mlp"][j]:
            frozen |= {(f"{prefix}.mlp.{name}_proj.weight", 0, j) for name in ("gate", "up")}
            frozen.add((f"{prefix}.mlp.down_proj.weight", 1, j))
    for kv in range(KV_HEADS):
        channels = [keep["self_attn"][kv * HEAD_DIM + c] for c in range(HEAD_DIM)]
        for c, held in enumerate(channels):
            if held:
                frozen.add((f"{prefix}.self_attn.v_proj.weight", 0, kv * HEAD_DIM + c))
                for h in range(kv * GROUP, (kv + 1) * GROUP):
                    frozen.add((f"{prefix}.self_attn.o_proj.weight", 1, h * HEAD_DIM + c))
        if groups and all(channels):
            frozen |= {(f"{prefix}.self_attn.k_proj.weight", 0, kv * HEAD_DIM + c) for c in range(HEAD_DIM)}
            heads = range(kv * GROUP, (kv + 1) * GROUP)
            frozen |= {
                (f"{prefix}.self_attn.q_proj.weight", 0, h * HEAD_DIM + c) for h in heads for c in range(HEAD_DIM)
            }
    return frozen


def phi3_frozen(prefix: str, keep: dict[str, list[bool]], groups: bool) -> set[tuple[str, int, int]]:
    """The same with [q; k; v] and [gate; up] in one weight."""
    shift = {
        "q_proj": ("self_attn.qkv_proj", 0),
        "k_proj": ("self_attn.qkv_proj", HEADS * HEAD_DIM),
        "v_proj": ("self_attn.qkv_proj", (HEADS + KV_HEADS) * HEAD_DIM),
        "gate_proj": ("mlp.gate_up_proj", 0),
        "up_proj": ("mlp.gate_up_proj", INTERMEDIATE),
    }
    frozen = set()
    for name, axis, index in llama_frozen(prefix, keep, groups):
        projection = name.split(".")[-2]
        fused, start = shift.get(projection, (None, 0))
        frozen.add((f"{prefix}.{fused}.weight" if fused else name, axis, start + index))
    return frozen


def neox_frozen(prefix: str, keep: dict[str, list[bool]], groups: bool) -> set[tuple[str, int, int]]:
    """Rows [q; k; v] per head, every projection with a bias, no grouped queries."""
    frozen = set()
    for j in range(INTERMEDIATE):
        if keep["mlp"][j]:
            frozen |= {(f"{prefix}.mlp.dense_h_to_4h.{leaf}", 0, j) for leaf in ("weight", "bias")}
            frozen.add((f"{prefix}.mlp.dense_4h_to_h.weight", 1, j))
    for head in range(HEADS):
        channels = [keep["attention"][head * HEAD_DIM + c] for c in range(HEAD_DIM)]
        for c, held in enumerate(channels):
            rows = [(3 * head + 2) * HEAD_DIM + c] if held else []
            rows += [(3 * head + part) * HEAD_DIM + c for part in (0, 1) if groups and all(channels)]
            for row in rows:
                frozen |= {(f"{prefix}.attention.query_key_value.{leaf}", 0, row) for leaf in ("weight", "bias")}
            if held:
                frozen.add((f"{prefix}.attention.dense.weight", 1, head * HEAD_DIM + c))
    return frozen


def gpt2_frozen(prefix: str, keep: dict[str, list[bool]], groups: bool) -> set[tuple[str, int, int]]:
    """Conv1D: weights are [in, out], with columns [q | k | v]."""
    frozen = set()
    for j in range(INTERMEDIATE):
        if keep["mlp"][j]:
            frozen |= {(f"{prefix}.mlp.c_fc.weight", 1, j), (f"{prefix}.mlp.c_fc.bias", 0, j)}
            frozen.add((f"{prefix}.mlp.c_proj.weight", 0, j))
    for head in range(HEADS):
        channels = [keep["attn"][head * HEAD_DIM + c] for c in range(HEAD_DIM)]
        for c, held in enumerate(channels):
            channel = head * HEAD_DIM + c
            columns = [2 * HIDDEN + channel] if held else []
            columns += [channel, HIDDEN + channel] if groups and all(channels) else []
            for column in columns:
                frozen |= {(f"{prefix}.attn.c_attn.weight", 1, column), (f"{prefix}.attn.c_attn.bias", 0, column)}
            if held:
                frozen.add((f"{prefix}.attn.c_proj.weight", 0, channel))
    return frozen


BRUTE = {
    "llama": ("model.layers", llama_frozen),
    "phi3": ("model.layers", phi3_frozen),
    "gpt_neox": ("gpt_neox.layers", neox_frozen),
    "gpt2": ("transformer.h", gpt2_frozen),
}


def units_with_whole_groups(model: nn.Module, seed: int) -> Units:
    """Random categories, but the first and the last KV group of layer 0 wholly SCU, and of layer 1 wholly RU."""
    units = tiny_units(model, seed=seed)
    for name, values in units.category.items():
        if units.layouts[name].kind == "attention":
            values[:HEAD_DIM] = values[-HEAD_DIM:] = Category.RU if units.layouts[name].layer else Category.SCU
    return units


def listed(mask: Mask, names: set[str]) -> set[tuple[str, int, int]]:
    return {(name, mask[name].axis, i) for name in names for i in mask[name].as_bool().nonzero().flatten().tolist()}


@pytest.mark.parametrize("model_type", BRUTE)
@pytest.mark.parametrize(
    "selection", [{"freeze": "scu"}, {"freeze": "scu,ucu,ru"}, {"train": "ru"}, {"train": "cu,scu"}]
)
def test_equals_brute_force(model_type, selection):
    model = on_meta(model_type)
    units = units_with_whole_groups(model, seed=1)
    mask = units.mask(model, **selection)
    chosen = {Category.parse(name) for name in next(iter(selection.values())).split(",")}
    prefix, brute = BRUTE[model_type]
    expected = set()
    for layer in (0, 1):
        keep = {
            name.split(".")[-1]: [(Category(v) in chosen) != ("train" in selection) for v in values.tolist()]
            for name, values in units.category.items()
            if units.layouts[name].layer == layer
        }
        expected |= brute(f"{prefix}.{layer}", keep, groups="freeze" in selection)
    cut = {part.parameter for layout in units.layouts.values() for part in layout.slices}
    qk = {name for name in mask if name not in cut}
    if "freeze" in selection:
        assert all(tensor_kind(name) == "qk" for name in qk)
        assert listed(mask, set(mask)) == expected
        return
    others = {name for name, _ in model.named_parameters()} - cut
    assert others == qk
    assert all(mask[name].frozen is None for name in qk)
    fused = {entry for entry in listed(mask, cut) - expected}
    assert expected <= listed(mask, cut)
    for name, axis, index in fused:  # queries and keys in a fused projection
        assert mask[name].axis == axis
        assert mask[name].category[index] == OTHER


AROUND = {"embeddings": "freeze", "lm_head": "freeze", "norms": "freeze", "other": "freeze"}
EXPERTS_FIRST = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")  # in layer 0, where these tests look for an MLP


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in ("olmo2", "olmo3", "olmoe")])
def test_frozen_value_channels_compute_the_same(model_type):
    """With everything before it frozen, a whole frozen KV group of layer 0 has the same activations bit for bit."""
    model = tiny_model(model_type)
    units = tiny_units(model)
    attention = next(iter(units.layouts.values()))
    for values in units.category.values():
        values.fill_(Category.CU)
    half = attention.units // 2  # every model here has an even number of KV groups
    units.category[attention.name][:half] = Category.SCU
    changed = perturb(model, units.mask(model, freeze="scu", policy=AROUND))
    same = (reader_inputs(model, attention.reader) == reader_inputs(changed, attention.reader)).all(0)
    channels = attention.channels.indices(attention.units)
    assert same[channels[:half]].all()
    assert not same[channels[half:]].any()


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in EXPERTS_FIRST])
def test_frozen_neurons_compute_the_same(model_type):
    """With everything before it frozen, a frozen neuron of layer 0 has the same activation, and keeps its column."""
    model = tiny_model(model_type)
    units = tiny_units(model)
    attention, mlp = list(units.layouts.values())[:2]
    for values in units.category.values():
        values.fill_(Category.CU)
    units.category[attention.name][:] = units.category[mlp.name][::2] = Category.SCU
    changed = perturb(model, units.mask(model, "scu", policy={**AROUND, "biases": "freeze", "qk": "freeze"}))
    same = (reader_inputs(model, mlp.reader) == reader_inputs(changed, mlp.reader)).all(0)
    assert same[::2].all()
    assert not same[1::2].all()  # not none: an activation may be 0 before and after
    weight, tuned = (m.get_submodule(mlp.reader).weight for m in (model, changed))
    kept = (weight == tuned).all(1 - mlp.channels.axis)
    assert kept[::2].all()
    assert not kept[1::2].any()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_train_only_leaves_every_other_unit_alone(model_type):
    model = tiny_model(model_type)
    units = tiny_units(model)
    mask = units.mask(model, train="ru")
    flags = all_frozen_elements(mask, model)
    expected = {name: torch.ones(parameter.shape, dtype=torch.bool) for name, parameter in model.named_parameters()}
    for name, layout in units.layouts.items():
        trained = (units.category[name] == Category.RU).nonzero().flatten()
        for part in layout.slices:
            flags_of = expected[part.parameter].movedim(part.axis, 1) if part.stacked else expected[part.parameter]
            indices = part.indices(layout.units)[trained].flatten()
            if part.stacked:
                flags_of[indices // flags_of.shape[1], indices % flags_of.shape[1]] = False
            else:
                flags_of.index_fill_(part.axis, indices, False)
    assert all(torch.equal(flags[name], expected[name]) for name in expected)
    attention = next(iter(units.layouts.values()))
    before, after = (reader_inputs(m, attention.reader) for m in (model, perturb(model, mask)))
    same, channels = (before == after).all(0), attention.channels.indices(attention.units)
    ru = units.category[attention.name] == Category.RU
    assert same[channels[~ru]].all()
    assert not same[channels[ru]].any()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_names_tell_the_kind_of_every_tensor(model_type):
    model = on_meta(model_type)
    slices = [part for layout in find_units(model) for part in layout.slices]
    cut = {part.parameter for part in slices}
    modules = dict(model.named_modules())
    for name, _ in model.named_parameters():
        owner, kind = modules[name.rpartition(".")[0]], tensor_kind(name)
        if "Norm" in type(owner).__name__:
            assert kind == "norms"
        elif isinstance(owner, nn.Embedding):
            assert kind == "embeddings"
        elif owner is model.get_output_embeddings():
            assert kind == "lm_head"
        elif name.endswith("bias"):
            assert kind == "biases"
        elif name not in cut:
            assert kind == ("qk" if re.search("query|[qk]_proj|q_b_proj|sinks", name) else "other")
        else:
            layout = next(found for found in find_units(model) if name in {part.parameter for part in found.slices})
            assert kind == layout.kind
        assert tensor_layer(name) == (int(re.search(r"\.(\d+)\.", name)[1]) if re.search(r"\.\d+\.", name) else None)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("selection", [{"freeze": "scu,cu:6%"}, {"train": "ru"}])
def test_the_summary_counts_every_element_once(model_type, selection):
    model = on_meta(model_type)
    units = tiny_units(model)
    mask = units.mask(model, **selection)
    rows = mask.summary(model.named_parameters())
    flags = all_frozen_elements(mask, tiny_model(model_type))
    assert sum(row["frozen"] for row in rows) == sum(int(flag.sum()) for flag in flags.values())
    assert sum(row["trainable"] for row in rows) == sum(int((~flag).sum()) for flag in flags.values())
    for category in ("scu", "ucu", "cu", "ru"):
        counted = sum(row["trainable"] + row["frozen"] for row in rows if row["category"] == category)
        assert counted == units.parameters(category)
    without = {row["kind"]: row["trainable"] + row["frozen"] for row in rows if row["category"] is None}
    assert set(without) <= set(KINDS) - {"attention", "mlp"}
    config = model.config
    head_dim = getattr(config, "head_dim", None) or HIDDEN // HEADS
    rows_of_heads = (HEADS + config.num_key_value_heads) * head_dim * HIDDEN
    if model_type == "gpt_oss":
        rows_of_heads += HEADS  # attention sinks
    elif model_type == "deepseek_v3":  # queries, and keys without rotation, from their latents
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
        rows_of_heads = HEADS * (width * config.q_lora_rank + config.qk_nope_head_dim * config.kv_lora_rank)
    assert without["qk"] == config.num_hidden_layers * rows_of_heads


def test_a_summary_of_a_mask_by_hand():
    mask = Mask({"a": ("rows", [1]), "lm_head.weight": ("rows", None)})
    rows = mask.summary(parameters(**{"a": (2, 3), "lm_head.weight": (5, 2), "model.norm.weight": (4,)}))
    assert rows == [
        {"kind": "lm_head", "category": None, "trainable": 0, "frozen": 10},
        {"kind": "norms", "category": None, "trainable": 4, "frozen": 0},
        {"kind": "other", "category": None, "trainable": 3, "frozen": 3},
    ]


# policy


def kinds(mask: Mask, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Per kind: trainable and frozen elements."""
    total: dict[str, tuple[int, int]] = {}
    for row in mask.summary(model.named_parameters()):
        old = total.get(row["kind"], (0, 0))
        total[row["kind"]] = (old[0] + row["trainable"], old[1] + row["frozen"])
    return total


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt", "gpt_neox", "olmo2", "qwen2", "gpt2"])
@pytest.mark.parametrize("selection", [{"freeze": "scu"}, {"train": "ru"}])
@pytest.mark.parametrize("name", ["embeddings", "lm_head", "norms", "biases", "qk"])
@pytest.mark.parametrize("value", ["train", "freeze"])
def test_the_policy_decides(model_type, selection, name, value):
    model = on_meta(model_type)
    tied = {key: value for key in ("embeddings", "lm_head")} if model_type in ("opt", "gpt2") else {}
    policy = {name: value, **(tied if name in tied else {})}
    trainable, frozen = kinds(tiny_units(model).mask(model, policy=policy, **selection), model).get(name, (0, 0))
    assert (trainable if value == "freeze" else frozen) == 0


def test_queries_and_keys_that_cannot_be_separated_take_the_default():
    model = on_meta("olmo2")
    units = tiny_units(model)
    assert kinds(units.mask(model, "scu,ucu,cu,ru"), model)["qk"][1] == 0
    assert kinds(units.mask(model, train="scu,ucu,cu,ru", policy={"qk": "follow"}), model)["qk"][0] == 0


def test_defaults_of_the_policy():
    assert full_policy(None, training=False)["qk"] == "follow"
    assert full_policy({"norms": "freeze"}, training=False)["norms"] == "freeze"
    assert full_policy({}, training=True) == {
        **dict.fromkeys(full_policy({}, training=True), "freeze"),
        "biases": "follow",
    }
    model = on_meta("opt")
    units = tiny_units(model)
    assert kinds(units.mask(model, "scu"), model)["norms"][1] == 0
    mask = units.mask(model, train="ru")
    rows = {(row["kind"], row["category"]): row for row in mask.summary(model.named_parameters())}
    assert rows["biases", "ru"]["frozen"] == 0
    assert rows["biases", None]["trainable"] == 0
    assert mask.provenance["policy"] == full_policy({}, training=True)


def test_biases_of_queries_and_keys_go_with_them():
    model = on_meta("qwen2")
    units = units_with_whole_groups(model, seed=0)
    for selection in ({"freeze": "scu"}, {"train": "ru"}, {"train": "ru", "policy": {"qk": "follow"}}):
        mask = units.mask(model, **selection)
        for layer in (0, 1):
            for name in ("q_proj", "k_proj"):
                path = f"model.layers.{layer}.self_attn.{name}"
                assert mask[f"{path}.bias"] == mask[f"{path}.weight"]
    assert not mask["model.layers.1.self_attn.k_proj.bias"].as_bool()[:HEAD_DIM].any()


def test_queries_and_keys_belong_to_whole_heads():
    model = on_meta("llama")
    units = tiny_units(model, attention_unit="head")
    mask = units.mask(model, freeze="scu,ucu")
    chosen = flat(units, units.category) >= Category.UCU
    assert torch.equal(frozen_units(mask, units), chosen)
    assert mask["model.layers.0.self_attn.q_proj.weight"].category.max() >= 0
    assert units.mask(model, freeze="scu,ucu", policy={"qk": "follow"}) == mask
    with pytest.raises(SsahError, match="policy: qk='freeze' is not possible, queries and keys belong to the units"):
        units.mask(model, freeze="scu", policy={"qk": "freeze"})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"norm": "train"}, "policy: 'norm' is unknown; use embeddings, lm_head, norms, biases, qk, other"),
        ({"norms": "follow"}, "policy: norms='follow' is unknown; use train or freeze"),
        ({"qk": "maybe"}, "policy: qk='maybe' is unknown; use train or freeze or follow"),
    ],
)
def test_an_unknown_policy_is_named(policy, message):
    model = on_meta("llama")
    with pytest.raises(SsahError, match=message):
        tiny_units(model).mask(model, "scu", policy=policy)


def test_tied_embeddings_need_one_policy():
    model = on_meta("gemma")
    units = tiny_units(model)
    with pytest.raises(
        SsahError, match=r"overlapping policies: embeddings=freeze and lm_head=train, but model\.embed_to"
    ):
        units.mask(model, "scu", policy={"embeddings": "freeze"})
    mask = units.mask(model, "scu", policy={"embeddings": "freeze", "lm_head": "freeze"})
    assert mask["model.embed_tokens.weight"].frozen is None
    assert "lm_head.weight" not in mask
    mask.check(model.named_parameters(remove_duplicate=False))
    untied = on_meta("gemma", tie_word_embeddings=False)
    assert "lm_head.weight" not in tiny_units(untied).mask(untied, "scu", policy={"embeddings": "freeze"})


# the model


def test_both_or_neither_of_freeze_and_train_is_refused():
    model = on_meta("llama")
    units = tiny_units(model)
    for arguments in ({}, {"freeze": "scu", "train": "ru"}):
        with pytest.raises(SsahError, match="give either freeze"):
            units.mask(model, **arguments)


def test_a_selection_without_units_is_refused():
    model = on_meta("llama")
    with pytest.raises(SsahError, match="freeze='unobserved' names no unit of this units file"):
        tiny_units(model).mask(model, "unobserved")


def test_all_frozen_is_refused():
    model = on_meta("llama")
    freeze = dict.fromkeys(full_policy({}, training=False), "freeze")
    with pytest.raises(SsahError, match="the mask freezes every parameter; nothing is left to train"):
        tiny_units(model).mask(model, "scu,ucu,cu,ru", policy=freeze)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("llama", {"intermediate_size": 60}), r"layers\.0\.mlp has 52 units in the units file and 60 in the model"),
        (("llama", {"num_hidden_layers": 3}), r"model\.layers\.2\.self_attn is only in the model"),
        (("llama", {"num_hidden_layers": 1}), r"model\.layers\.1\.self_attn is only in the units"),
        (("llama", {"num_attention_heads": 12}), r"self_attn has 16 units"),
        (("llama", {"hidden_size": 96}), "mask of another model"),
        (("phi3", {}), "has 16 units in the units file and 16 in the model, or keeps them elsewhere"),
        (("gpt2", {}), r"is only in the model"),
    ],
)
def test_units_of_another_model_are_refused(other, message):
    model_type, overrides = other
    with pytest.raises(SsahError, match=f"mask of another model: .*{message}|{message}"):
        tiny_units(on_meta("llama")).mask(on_meta(model_type, **overrides), "scu")


def test_wrapped_models_give_the_same_mask():
    model = tiny_model("llama")
    units = tiny_units(model)
    mask = units.mask(model, "scu")
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert units.mask(wrapped, "scu") == mask
        mask.check(wrapped.named_parameters())
        assert {canonical_name(name) for name, _ in wrapped.named_parameters()} >= set(mask)


def test_provenance_says_how_the_mask_was_made():
    model = on_meta("llama")
    units = tiny_units(model)
    provenance = units.mask(model, ["esu", "cu:0.06"], policy={"norms": "freeze"}).provenance
    assert (provenance["freeze"], provenance["train"]) == ("scu,cu:6%", None)
    assert provenance["policy"] == full_policy({"norms": "freeze"}, training=False)
    assert provenance["model"] == {"id": "tiny"}
    other = tiny_units(model, seed=1).mask(model, train="ru").provenance
    assert (other["freeze"], other["train"]) == (None, "ru")
    assert other["units_sha256"] != provenance["units_sha256"]


def test_regions_know_size_and_category():
    model = on_meta("phi3")
    units = tiny_units(model)
    mask = units.mask(model, "scu")
    gate_up, qkv = mask["model.layers.0.mlp.gate_up_proj.weight"], mask["model.layers.0.self_attn.qkv_proj.weight"]
    assert gate_up.category.tolist() == units.category["model.layers.0.mlp"].tolist() * 2
    assert gate_up.category.dtype == torch.int8
    values = units.category["model.layers.0.self_attn"].tolist()
    assert qkv.category.tolist() == [OTHER] * (HIDDEN + KV_HEADS * HEAD_DIM) + values
    assert all(region.size == dict(model.named_parameters())[name].shape[region.axis] for name, region in mask.items())


def test_a_70b_mask_takes_seconds():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    model = on_meta("llama", num_attention_heads=64, num_key_value_heads=8, **sizes)
    units = tiny_units(model)
    start = time.process_time()
    units.mask(model, "scu,cu:6%")
    # 0.5 s here; a loop over the 2.4 million units would take minutes.
    assert time.process_time() - start < 10
