"""Freeze certificates: every changed bit in a frozen place is found, nothing else is, and memory stays bounded."""

import hashlib
import json
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, VOCABULARY, tiny_config, tiny_model

from ssah_fast import checkpoints, verification
from ssah_fast.categories import Category
from ssah_fast.cli.main import main
from ssah_fast.errors import FreezeError, SsahError
from ssah_fast.masks import OTHER, Mask, Region
from ssah_fast.partition import Units
from ssah_fast.sizes import parse_size
from ssah_fast.units import find_units
from ssah_fast.verification import verify

DOWN = "model.layers.0.mlp.down_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
LAYOUTS = ("llama", "phi3", "gpt_neox", "gpt2", "gemma2")  # gpt2: columns are [in, out]; gpt2 and gemma2 are tied


def mask_of(model_type):
    """Every third index of all weights, along both axes in turn; every bias and norm whole or not at all."""
    entries = {}
    for number, (name, parameter) in enumerate(tiny_model(model_type).named_parameters()):
        if parameter.ndim == 2:
            axis = number % 2
            entries[name] = (axis, range(number % 3, parameter.shape[axis], 3))
        elif number % 4:
            entries[name] = ("rows", None if number % 4 == 1 else [0, 5])
    return Mask(entries)


def trained(model_type, mask, dtype=torch.float32):
    """The tiny model with every trainable element moved."""
    model = tiny_model(model_type, dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = parameter + 0.5 + torch.rand(parameter.shape, generator=generator)
            found = mask.trainable(name, parameter.shape)
            if found is None:
                parameter.copy_(moved)
            else:
                axis, indices = found
                parameter.index_copy_(axis, indices, moved.index_select(axis, indices).to(dtype))
    return model


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    """Per model type: BASE, TUNED in one file, TUNED in shards; made once, and copied by tests that damage them."""
    made = {}

    def get(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            tiny_model(model_type).save_pretrained(folder / "base")
            tuned = trained(model_type, mask_of(model_type))
            tuned.save_pretrained(folder / "tuned")
            tuned.save_pretrained(folder / "sharded", max_shard_size="30KB")
            made[model_type] = folder
        return made[model_type]

    return get


@pytest.fixture
def llama(masters, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(masters("llama"), tmp_path / "llama")


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), 8 + length


def flip(folder, key, element, bit=0):
    """Flip one bit of one element of the tensor that is stored as `key`."""
    for path in sorted(folder.glob("*.safetensors")):
        header, start = header_of(path)
        if key in header:
            offsets, shape = header[key]["data_offsets"], header[key]["shape"]
            size = (offsets[1] - offsets[0]) // int(np.prod(shape))
            content = bytearray(path.read_bytes())
            content[start + offsets[0] + element * size + bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            return
    raise KeyError(key)


def edit(folder, **changes):
    """Replace, add or (...) remove tensors of a single-file checkpoint; dots of names are written as __."""
    path = folder / "model.safetensors"
    stored = {**load_file(path), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file({key: value for key, value in stored.items() if value is not ...}, path, {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(*arguments, **options):
    with pytest.raises(SsahError) as caught:
        verify(*arguments, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what holds and what does not


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("memory", ["1GiB", 1])
def test_a_kept_freeze_passes_in_any_layout_and_sharding(model_type, memory, masters):
    folder, mask = masters(model_type), mask_of(model_type)
    certificates = [verify(folder / "base", folder / name, mask, memory=memory) for name in ("tuned", "sharded")]
    parameters = dict(tiny_model(model_type).named_parameters())
    frozen = sum(
        parameter.numel() - (found[1].numel() * parameter.numel() // parameter.shape[found[0]])
        for name, parameter in parameters.items()
        if (found := mask.trainable(name, parameter.shape)) is not None
    )
    elements = sum(parameter.numel() for parameter in parameters.values())
    for certificate in certificates:
        totals = certificate.document["totals"]
        assert certificate.ok and certificate.changed_frozen == 0
        assert (totals["elements"], totals["frozen"], totals["trainable"]) == (elements, frozen, elements - frozen)
        assert totals["trainable_changed"] == elements - frozen
        assert 1.4 < totals["largest_change"] < 1.6
        assert certificate.document["not_compared"] == certificate.document["violations"] == []
        assert sum(certificate.moved_by_category.values()) == elements - frozen
        for group in ("categories", "kinds", "layers"):
            assert sum(part["elements"] for part in certificate.document[group].values()) == elements
        certificate.check()
    assert certificates[0].document["layers"] == certificates[1].document["layers"]
    assert set(certificates[0].document["layers"]) == {"0", "1", "outside"}


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("name", ["tuned", "sharded"])
def test_one_flipped_bit_is_found_where_frozen_and_counted_where_not(model_type, name, masters, tmp_path):
    folder, mask = shutil.copytree(masters(model_type), tmp_path / "m"), mask_of(model_type)
    mlp = {
        "llama": ("model.layers.1.mlp.down_proj.weight", HIDDEN),
        "phi3": ("model.layers.1.mlp.gate_up_proj.weight", 104),
        "gpt_neox": ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", HIDDEN),
        "gpt2": ("transformer.h.1.mlp.c_proj.weight", 52),
        "gemma2": ("model.layers.1.mlp.up_proj.weight", 52),
    }
    parameter, rows = mlp[model_type]
    size = dict(tiny_model(model_type).named_parameters())[parameter].shape
    axis, trainable = mask.trainable(parameter, size)
    frozen = sorted(set(range(size[axis])) - set(trainable.tolist()))
    assert size[0] == rows
    stride = 1 if axis else size[1]
    before = verify(folder / "base", folder / name, mask).document["totals"]["trainable_changed"]
    # the lowest bit of a trainable element: it had moved anyway, and has still
    flip(folder / name, parameter, int(trainable[-1]) * stride)
    certificate = verify(folder / "base", folder / name, mask)
    assert certificate.ok
    assert certificate.document["totals"]["trainable_changed"] == before
    flip(folder / name, parameter, frozen[-1] * stride)
    certificate = verify(folder / "base", folder / name, mask)
    assert not certificate.ok
    assert certificate.changed_frozen == 1
    (violation,) = certificate.document["violations"]
    assert violation == {
        "parameter": parameter,
        "reason": "changed",
        "axis": axis,
        "index": frozen[-1],
        "elements": 1,
        "detail": f"1 changed at index {frozen[-1]} of axis {axis}",
    }
    with pytest.raises(FreezeError, match=r"frozen elements 1 changed .*index") as caught:
        certificate.check()
    assert caught.value.exit_code == 3


def test_bits_count_and_not_values(llama):
    values = torch.randn(HIDDEN, 52)
    values[0, 0], values[1, 0] = 0.0, float("nan")
    same = values.clone()
    edit(llama / "base", **{DOWN: values})
    edit(llama / "tuned", **{DOWN: same})
    mask = Mask({DOWN: ("columns", [0])})
    assert verify(llama / "base", llama / "tuned", mask).ok  # the same NaN is the same bits
    same[0, 0] = -0.0
    edit(llama / "tuned", **{DOWN: same})
    assert verify(llama / "base", llama / "tuned", mask).changed_frozen == 1
    same[0, 0] = 0.0
    edit(llama / "tuned", **{DOWN: same})
    flip(llama / "tuned", DOWN, 52)  # another payload of the NaN
    assert torch.equal(torch.isnan(load_file(llama / "tuned" / "model.safetensors")[DOWN]), torch.isnan(values))
    certificate = verify(llama / "base", llama / "tuned", mask)
    assert [violation["index"] for violation in certificate.document["violations"]] == [0]


def test_trainable_values_that_become_nan_or_infinite_are_counted_apart(llama):
    values = torch.zeros(HIDDEN, 52)
    values[3] = float("inf")
    moved = values.clone()
    moved[0, :3] = torch.tensor([float("nan"), float("inf"), -0.25])
    edit(llama / "base", **{DOWN: values})
    edit(llama / "tuned", **{DOWN: moved})
    mask = Mask({DOWN: ("rows", range(1, HIDDEN)), **{name: ("rows", None) for name in others(DOWN)}})
    certificate = verify(llama / "base", llama / "base", mask)
    assert certificate.document["notes"] == [
        "BASE and TUNED are the same files",
        "nothing moved: every element that was compared has the same bits",
    ]
    mask = Mask({DOWN: ("rows", range(1, HIDDEN))})
    shutil.copy(llama / "base" / "model.safetensors", llama / "tuned" / "model.safetensors")
    edit(llama / "tuned", **{DOWN: moved})
    totals = verify(llama / "base", llama / "tuned", mask).document["totals"]
    assert (totals["trainable_changed"], totals["non_finite"], totals["largest_change"]) == (3, 2, 0.25)


def others(name):
    return [other for other, _ in tiny_model("llama").named_parameters() if other != name]


CONFIG = tiny_config("llama").to_json_string()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e5m2)


@st.composite
def cases(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    frozen = draw(st.none() | st.sets(st.integers(0, shape[axis] - 1)).map(sorted))
    count = int(np.prod(shape))
    flips = draw(st.sets(st.integers(0, count - 1), max_size=6))
    return (
        shape,
        axis,
        frozen,
        sorted(flips),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 8).map(lambda words: 8 * words)),
    )


@given(case=cases())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_what_differs_is_reported(case, tmp_path_factory):
    shape, axis, frozen, flips, dtype, slice_bytes = case
    folder = tmp_path_factory.mktemp("case")
    generator = torch.Generator().manual_seed(0)
    old = torch.randint(0, 2, shape, generator=generator).to(dtype)
    new = old.clone()
    raw = new.flatten().view(torch.uint8).view(-1, new.element_size())
    for element in flips:
        raw[element, 0] ^= 1
    new = raw.flatten().view(dtype).view(shape)
    for name, tensor in (("base", old), ("tuned", new)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(CONFIG)
        # the extra tensor moves it to another place in the file
        extra = {} if name == "base" else {"a": torch.ones(3, dtype=torch.float64)}
        save_file({"w": tensor, **extra}, folder / name / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_SMALLEST_SLICE", slice_bytes)
        certificate = verify(folder / "base", folder / "tuned", Mask({"w": (axis, frozen)}), memory=1)
    differs = np.zeros(int(np.prod(shape)), bool)
    differs[flips] = True
    per_index = np.moveaxis(differs.reshape(shape), axis, 0).reshape(shape[axis], -1).sum(1)
    held = np.zeros(shape[axis], bool)
    held[slice(None) if frozen is None else frozen] = True
    totals = certificate.document["totals"]
    assert totals["frozen_changed"] == per_index[held].sum()
    assert totals["trainable_changed"] == per_index[~held].sum()
    found = {violation["index"]: violation["elements"] for violation in certificate.document["violations"]}
    assert found == {int(index): int(per_index[index]) for index in (held & (per_index > 0)).nonzero()[0]}
    assert certificate.ok == (not found)
    for side in ("base", "tuned"):
        recorded = certificate.document[side]["files"]["model.safetensors"]["sha256"]
        assert recorded == hashlib.sha256((folder / side / "model.safetensors").read_bytes()).hexdigest()


def test_categories_kinds_and_layers(llama):
    category = torch.tensor([Category.SCU, Category.RU] * 26, dtype=torch.int8)
    queries = torch.tensor([Category.CU] * 4 + [OTHER] * (HIDDEN - 4), dtype=torch.int8)
    mask = Mask(
        {
            DOWN: Region(1, range(0, 52, 2), 52, category),
            "model.layers.1.self_attn.o_proj.weight": Region(1, [], HIDDEN, queries),
        }
    )
    flip(llama / "base", "model.norm.weight", 0)
    shutil.copytree(llama / "base", llama / "new")
    for element, key in ((1, DOWN), (53, DOWN), (2, "model.layers.1.self_attn.o_proj.weight"), (1, "lm_head.weight")):
        flip(llama / "new", key, element, bit=22)
    certificate = verify(llama / "base", llama / "new", mask)
    assert certificate.ok
    assert certificate.moved_by_category == {"scu": 0, "cu": 1, "ru": 2, "other": 1}
    document = certificate.document
    assert document["categories"]["scu"]["frozen"] == HIDDEN * 26
    assert document["categories"]["cu"]["elements"] == HIDDEN * 4
    moved = {name: part["trainable_changed"] for name, part in document["kinds"].items() if part["trainable_changed"]}
    assert moved == {"lm_head": 1, "mlp": 2, "attention": 1}
    assert [document["layers"][name]["trainable_changed"] for name in ("0", "1", "outside")] == [2, 1, 1]
    flip(llama / "new", DOWN, 2)
    assert verify(llama / "base", llama / "new", mask).moved_by_category["scu"] == 1


def test_violations_are_capped_and_their_number_is_exact(llama):
    mask = Mask({name: ("rows", None) for name, _ in tiny_model("llama").named_parameters()})
    certificate = verify(llama / "base", llama / "tuned", mask)
    rows = sum(len(parameter) for _, parameter in tiny_model("llama").named_parameters())
    assert len(certificate.document["violations"]) == verification.MAX_VIOLATIONS
    assert rows * 0.6 < certificate.document["violation_count"] <= rows
    assert (
        certificate.changed_frozen
        == verify(llama / "base", llama / "tuned", Mask({})).document["totals"]["trainable_changed"]
    )


# names


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_tied_embeddings_saved_once_twice_or_under_the_other_name(model_type, masters, tmp_path):
    folder = shutil.copytree(masters(model_type), tmp_path / "m")
    name = {"gpt2": "transformer.wte.weight", "gemma2": "model.embed_tokens.weight"}[model_type]
    table = load_file(folder / "base" / "model.safetensors")[name]
    for alias in (name, "lm_head.weight"):  # a mask may use either name
        mask = Mask({alias: ("rows", range(VOCABULARY))})
        for changes in ({}, {"lm_head.weight": table.clone()}, {name: ..., "lm_head.weight": table.clone()}):
            shutil.copytree(folder / "base", folder / "new", dirs_exist_ok=True)
            edit(folder / "new", **changes)
            for pair in (("base", "new"), ("new", "base")):
                certificate = verify(folder / pair[0], folder / pair[1], mask)
                assert certificate.ok, (alias, list(changes), pair)
                assert certificate.document["totals"]["frozen"] >= table.numel()
                assert certificate.document["not_compared"] == certificate.document["only_in_tuned"] == []
    # a second copy that differs is loaded as the head
    edit(folder / "new", **{name: table, "lm_head.weight": table + 1})
    assert not verify(folder / "base", folder / "new", mask).ok
    # with the tie gone from the config and no copy, the head would be random
    edit(folder / "new", **{name: table, "lm_head.weight": ...})
    edit_config(folder / "new", tie_word_embeddings=False)
    certificate = verify(folder / "base", folder / "new", mask)
    assert [entry["reason"] for entry in certificate.document["violations"]] == ["missing"]
    assert "tie_word_embeddings" in certificate.document["config_changes"]


def test_a_checkpoint_of_the_bare_decoder(masters, tmp_path):
    """The GPT-2 of the hub is stored without the prefix `transformer.`, as is what AutoModel saves."""
    folder = shutil.copytree(masters("gpt2"), tmp_path / "m")
    path = folder / "base" / "model.safetensors"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(stored, path)
    assert verify(folder / "base", folder / "tuned", mask_of("gpt2")).ok


def test_names_that_differ_on_disk(masters):
    """GPT-NeoX stores its head as embed_out; the model calls it lm_head."""
    folder = masters("gpt_neox")
    assert "embed_out.weight" in load_file(folder / "base" / "model.safetensors")
    certificate = verify(folder / "base", folder / "tuned", Mask({"lm_head.weight": ("rows", [1])}))
    assert {entry["parameter"] for entry in certificate.document["violations"]} <= {"lm_head.weight"}
    assert certificate.document["kinds"]["lm_head"]["frozen"] == HIDDEN


def test_missing_and_extra_tensors(llama):
    mask = Mask({DOWN: ("columns", [0, 1]), GATE: ("rows", [2])})
    shutil.copytree(llama / "base", llama / "new")
    edit(llama / "new", **{DOWN: ..., "model.norm.weight": ..., "extra": torch.ones(3)})
    certificate = verify(llama / "base", llama / "new", mask)
    document = certificate.document
    assert document["only_in_tuned"] == ["extra"]
    assert {entry["parameter"]: entry["reason"] for entry in document["not_compared"]} == {
        DOWN: "missing",
        "model.norm.weight": "missing",
    }
    assert not certificate.ok
    assert document["violations"] == [
        {"parameter": DOWN, "reason": "missing", "elements": 2 * HIDDEN, "detail": "it is not in TUNED"}
    ]
    assert document["totals"]["frozen_not_compared"] == 2 * HIDDEN
    assert certificate.changed_frozen == 0


def test_another_dtype_or_shape(llama):
    stored = load_file(llama / "base" / "model.safetensors")
    mask = Mask({DOWN: ("columns", [0]), "lm_head.weight": ("rows", [0])})
    shutil.copytree(llama / "base", llama / "new")
    edit(llama / "new", **{DOWN: stored[DOWN].double(), GATE: stored[GATE].bfloat16()})
    longer = {name: torch.cat([stored[name], torch.ones(4, HIDDEN)]) for name in ("lm_head.weight",)}
    edit(llama / "new", **longer)
    document = verify(llama / "base", llama / "new", mask).document
    assert {entry["parameter"]: entry["reason"] for entry in document["violations"]} == {
        DOWN: "dtype",
        "lm_head.weight": "shape",
    }
    assert {entry["parameter"]: entry["detail"] for entry in document["not_compared"]} == {
        DOWN: "dtype F32 in BASE, F64 in TUNED",
        GATE: "dtype F32 in BASE, BF16 in TUNED",
        "lm_head.weight": f"shape [{VOCABULARY}, {HIDDEN}] in BASE, [{VOCABULARY + 4}, {HIDDEN}] in TUNED",
    }


def test_masks_of_other_models(llama, masters, tmp_path):
    base, tuned = llama / "base", llama / "tuned"
    assert "mask of another model: it names x.weight" in refused(base, tuned, Mask({"x.weight": ("rows", [0])}))
    assert "mask of another model" in refused(base, tuned, Mask({DOWN: ("rows", [HIDDEN])}))
    assert "mask of another model" in refused(base, tuned, Mask({DOWN: (2, [0])}))
    assert "mask of another model" in refused(base, tuned, Mask({DOWN: Region(0, [0], HIDDEN + 1)}))


def test_weights_that_are_stored_in_another_form(llama):
    weights = load_file(llama / "base" / "model.safetensors")
    edit(llama / "base", **{DOWN: ..., f"{DOWN}_packed": weights[DOWN]})
    assert "quantised weights" in refused(llama / "base", llama / "tuned", Mask({DOWN: ("rows", [0])}))
    # the rest can be verified
    assert verify(llama / "base", llama / "tuned", Mask({"lm_head.weight": ("rows", [])})).ok


def test_quantised_weights_prove_nothing(llama):
    weights = load_file(llama / "base" / "model.safetensors")
    edit(llama / "base", **{DOWN: weights[DOWN].to(torch.float8_e4m3fn)})
    assert not verify(llama / "base", llama / "tuned", Mask({DOWN: ("rows", [0])})).ok
    edit_config(llama / "base", quantization_config={"quant_method": "fp8"})
    assert "stored as F8_E4M3 with scales beside it" in refused(
        llama / "base", llama / "tuned", Mask({DOWN: ("rows", [0])})
    )


def test_an_empty_mask_is_noted(llama):
    certificate = verify(llama / "base", llama / "tuned", Mask({}))
    assert certificate.ok
    assert certificate.document["notes"] == ["the mask freezes nothing, so there was nothing to prove"]


# folders


def test_what_is_no_checkpoint_is_refused(llama, monkeypatch):
    base, mask = llama / "base", Mask({DOWN: ("rows", [0])})
    monkeypatch.chdir(llama)
    assert refused("nothing", base, mask).startswith("BASE 'nothing' does not exist")
    assert refused(base, "./no/thing", mask).startswith("TUNED './no/thing' does not exist")
    assert "is a file" in refused(base, "base/config.json", mask)
    (llama / "adapter").mkdir()
    (llama / "adapter" / "adapter_config.json").write_text("{}")
    assert "is a PEFT adapter; merge it" in refused(base, "adapter", mask)
    (llama / "adapter" / "adapter_config.json").unlink()
    assert "has no config.json" in refused(base, "adapter", mask)
    (llama / "adapter" / "config.json").write_text("{")
    assert "neither model.safetensors nor" in refused(base, "adapter", mask)
    (llama / "adapter" / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pickled weights (pytorch_model.bin)" in refused(base, "adapter", mask)
    shutil.copy(base / "model.safetensors", llama / "adapter" / "model.safetensors")
    assert "cannot load adapter" in refused(base, "adapter", mask)


def test_damaged_files_are_refused(llama):
    base, tuned, mask = llama / "base", llama / "sharded", Mask({DOWN: ("rows", [0])})
    index = tuned / "model.safetensors.index.json"
    shard = sorted(tuned.glob("*.safetensors"))[1]
    content, listed = shard.read_bytes(), json.loads(index.read_text())
    shard.write_bytes(content[:-1])
    assert "truncated or not a safetensors file" in refused(base, tuned, mask)
    shard.write_bytes(b"x" * 20)
    assert "truncated or not a safetensors file" in refused(base, tuned, mask)
    shard.unlink()
    assert f"cannot read {shard}: No such file" in refused(base, tuned, mask)
    shard.write_bytes(sorted(tuned.glob("*.safetensors"))[0].read_bytes())
    assert "twice, in model-0000" in refused(base, tuned, mask)
    shard.write_bytes(content)
    for text in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {}}'):
        index.write_text(text)
        assert "download the checkpoint again" in refused(base, tuned, mask)
    listed["weight_map"]["ghost"] = shard.name
    index.write_text(json.dumps(listed))
    assert "its index names ghost, which no shard holds" in refused(base, tuned, mask)


def test_the_single_file_counts_where_there_are_shards_too(llama):
    """As in transformers: a leftover index with the old shards must not prove anything."""
    for path in (llama / "base").glob("*.safetensors"):
        path.rename(path.with_name("old.safetensors"))
    shutil.copy(llama / "tuned" / "model.safetensors", llama / "base" / "model.safetensors")
    names = load_file(llama / "tuned" / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "old.safetensors")}
    (llama / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    certificate = verify(llama / "base", llama / "tuned", Mask({DOWN: ("rows", None)}))
    assert certificate.ok
    assert set(certificate.document["base"]["files"]) == {"config.json", "model.safetensors"}


def test_hub_ids(llama, monkeypatch):
    asked = []
    snapshot = llama / "snapshots" / "abc123"
    shutil.copytree(llama / "base", snapshot)

    def download(name, revision, allow_patterns):
        asked.append(name)
        if name != "owner/model":
            raise OSError("We couldn't connect to 'https://huggingface.co'")
        return str(snapshot)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    certificate = verify("owner/model", llama / "tuned", mask_of("llama"))
    assert certificate.ok and asked == ["owner/model"]
    assert certificate.document["base"]["source"] == "owner/model"
    assert certificate.document["base"]["commit"] == "abc123"
    assert "neither a folder here nor in the local hub cache" in refused("owner/none", "x", Mask({}))


def test_hashes_of_every_file(llama):
    document = verify(llama / "base", llama / "sharded", mask_of("llama")).document
    for name, side in (("base", "base"), ("sharded", "tuned")):
        expected = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in (llama / name).iterdir()
            if path.name != "generation_config.json"
        }
        assert document[side]["files"] == expected
    assert document["mask"]["sha256"] == mask_of("llama").sha256


def test_a_file_that_shrinks_while_it_is_read(llama, monkeypatch):
    original = verification._stream

    def cut(pairs, slice_bytes):
        path = llama / "tuned" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:3000])
        return original(pairs, slice_bytes)

    monkeypatch.setattr(verification, "_stream", cut)
    with pytest.raises(SsahError, match="became shorter") as caught:
        verify(llama / "base", llama / "tuned", Mask({}))
    assert caught.value.exit_code == 1


# memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("512 MiB", 2**29),
        ("2GB", 2 * 10**9),
        ("1e6", 10**6),
        ("4k", 4000),
        (7, 7),
        ("1.5M", 1_500_000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "1XB", "1.2.3", "1e999"])
def test_what_is_no_size(text):
    with pytest.raises(SsahError, match="is not a size"):
        parse_size(text)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """64 MB of bf16 weights, trained in all rows but every tenth."""
    folder = tmp_path_factory.mktemp("large")
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1, hidden_size=192, intermediate_size=55_000)
    model.save_pretrained(folder / "base")
    frozen = torch.arange(0, 55_000, 10)
    mask = Mask(
        {
            f"model.layers.0.mlp.{name}_proj.weight": (axis, frozen)
            for name, axis in (("gate", "rows"), ("up", "rows"), ("down", "columns"))
        }
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in mask:
                axis, indices = mask.trainable(name, parameter.shape)
                parameter.index_add_(axis, indices, torch.ones_like(parameter.index_select(axis, indices)))
    model.save_pretrained(folder / "tuned")
    mask.save(folder / "mask.safetensors")
    return folder


@pytest.mark.parametrize("memory", [1, 65_537, 1_000_003])
def test_odd_bounds(memory, masters):
    assert verify(masters("llama") / "base", masters("llama") / "tuned", mask_of("llama"), memory=memory).ok


def test_memory_is_bounded(large):
    bound, mask = 4 * 2**20, Mask.load(large / "mask.safetensors")
    assert (large / "base" / "model.safetensors").stat().st_size > 60e6
    verify(large / "base", large / "base", Mask({}), memory=bound)  # imports the model's code
    tracemalloc.start()  # numpy reports its buffers to it
    certificate = verify(large / "base", large / "tuned", mask, memory=bound)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert certificate.ok
    assert certificate.document["totals"]["trainable_changed"] > 25e6
    # besides the slices: the two skeletons, the mask as bool, and counts per index, 24 bytes each
    assert peak < bound + 3 * 2**20, peak


def peak_resident():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_not_mapped(large):
    """Mapped pages, which tracemalloc does not see, would show as resident memory: each file has 63 MB."""
    mask = Mask.load(large / "mask.safetensors")
    verify(large / "base", large / "base", Mask({}), memory="4MiB")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = peak_resident()
    assert verify(large / "base", large / "tuned", mask, memory="4MiB").ok
    assert peak_resident() - before < 12 * 2**20


# the command


@pytest.fixture
def folder(llama, monkeypatch):
    monkeypatch.chdir(llama)
    monkeypatch.setenv("NO_COLOR", "1")
    mask_of("llama").save("mask.safetensors")
    return llama


def test_the_command_passes(folder, capsys):
    arguments = ["verify", "base", "sharded", "--mask", "mask.safetensors", "--memory", "8MiB", "-o", "c.json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    frozen = json.loads(Path("c.json").read_text())["totals"]["frozen"]
    assert f"OK: all {frozen:,} frozen elements are bitwise equal." in captured.out
    assert captured.err == "wrote c.json\n"
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("c.json").read_text())
    assert (printed["verdict"], printed["schema"]) == ("pass", 1)


def test_the_command_fails_with_3_and_still_writes(folder, capsys):
    # BASE itself with the mask of everything, against TUNED
    mask = Mask({DOWN: ("rows", None)})
    mask.save("all.safetensors")
    assert main(["verify", "base", "tuned", "--mask", "all.safetensors", "-o", "c.json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(Path("c.json").read_text())["verdict"] == "fail"
    assert "FAILED: " in captured.out
    wrote, error = captured.err.splitlines()
    assert wrote == "wrote c.json"
    assert error.startswith("ssah-fast: error: the freeze was broken: of ")
    assert main(["verify", "base", "tuned", "--mask", "all.safetensors", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["violation_count"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "none", "--mask", "mask.safetensors"], "TUNED 'none' does not exist"),
        (["base", "tuned", "--mask", "none"], "cannot read none: it does not exist"),
        (["base", "tuned", "--mask", "mask.safetensors", "--memory", "lots"], "memory='lots' is not a size"),
        (["base", "tuned", "--mask", "mask.safetensors", "-o", "no/c.json"], "the folder"),
        (["base", "--mask", "mask.safetensors"], "Missing argument 'TUNED'"),
        (["base", "tuned"], "verify needs a mask: give --mask FILE"),
    ],
)
def test_wrong_use_is_2(arguments, message, folder, capsys):
    assert main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_with_units(folder, capsys):
    model = tiny_model("llama")
    layouts = {layout.name: layout for layout in find_units(model)}
    category = {}
    for name, layout in layouts.items():
        values = torch.full((layout.units,), int(Category.CU), dtype=torch.int8)
        values[:5] = int(Category.SCU)
        category[name] = values
    units = Units(category, layouts, {}, {}, {}, {})
    units.save("units.safetensors")
    mask = units.mask(model, freeze="scu")
    trained("llama", mask).save_pretrained("new")
    arguments = ["verify", "base", "new", "--units", "units.safetensors", "--freeze"]
    assert main([*arguments, "scu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["categories"]["scu"]["trainable_changed"] == 0
    assert document["categories"]["cu"]["trainable_changed"] == document["categories"]["cu"]["elements"]
    assert main([*arguments, "scu,cu", "--json"]) == 3
