"""The command line around masks: shared options, `inspect` and `diff`."""

import itertools
import json
import re

import click
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_units import tiny_units
from transformers import AutoModelForCausalLM

from ssah_fast.cli import main as cli_main
from ssah_fast.cli.common import Command
from ssah_fast.cli.main import main
from ssah_fast.cli.masking import load_mask, mask_options, print_mask
from ssah_fast.masks import Mask, Region
from ssah_fast.partition import Category, Units


def on_meta(model_type: str = "llama", **overrides):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))


@click.command(cls=Command)
@mask_options
def sample(**options) -> None:
    """A command that takes a mask."""
    model = on_meta()
    mask = load_mask(model, **options)
    if mask is None:
        click.echo("no mask")
    else:
        print_mask(mask, model)
        click.echo(mask.sha256)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    units = tiny_units(on_meta())
    units.save("u.safetensors")
    units.mask(on_meta(), "scu").save("scu.safetensors")
    units.mask(on_meta(), train="ru").save("ru.safetensors")
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch, capsys):
    find = cli_main.LazyGroup.get_command

    def get_command(group, ctx, name):
        return sample if name == "sample" else find(group, ctx, name)

    monkeypatch.setattr(cli_main.LazyGroup, "get_command", get_command)

    def invoke(*arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        captured = capsys.readouterr()
        assert code == 0 or (captured.err.count("\n") == 1 and captured.out == "")
        return captured.out if code == 0 else captured.err

    return invoke


# options


@pytest.mark.parametrize(
    ("arguments", "selection"),
    [
        (["--freeze", "scu,cu:6%"], {"freeze": "scu,cu:6%"}),
        (["--freeze", "scu", "--freeze", "cu:0.06"], {"freeze": "scu,cu:6%"}),
        (["--train", "ru"], {"train": "ru"}),
        (
            ["--freeze", "esu", "--policy", "norms=freeze,QK = train"],
            {"freeze": "scu", "policy": {"norms": "freeze", "qk": "train"}},
        ),
    ],
)
def test_options_make_the_mask(arguments, selection, call):
    out = call("sample", "--units", "u.safetensors", *arguments)
    assert out.splitlines()[-1] == Units.load("u.safetensors").mask(on_meta(), **selection).sha256


def test_a_saved_mask_or_none(call):
    assert call("sample", "--mask", "ru.safetensors").splitlines()[-1] == Mask.load("ru.safetensors").sha256
    assert call("sample") == "no mask\n"


def test_the_table_has_exact_totals(call):
    out = call("sample", "--units", "u.safetensors", "--train", "ru")
    model, units = on_meta(), Units.load("u.safetensors")
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = units.parameters("ru")
    assert re.search(rf"all +│ +│ +{trained:,} │ +{total - trained:,} │ +{1 - trained / total:.2%}", out)
    assert re.search(r"mlp +│ RU +│ +[\d,]+ │ +0 │ +0\.00%", out)
    assert re.search(r"embeddings +│ - +│ +0 │ +4,608 │ +100\.00%", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze", "scu"], "--freeze needs --units FILE, from `ssah-fast identify`"),
        (["--policy", "norms=train"], "--policy needs --units FILE"),
        (["--units", "u.safetensors"], "--units u.safetensors needs either --freeze (such as scu,cu:6%) or --train"),
        (["--units", "u.safetensors", "--freeze", "scu", "--train", "ru"], "needs either --freeze"),
        (
            ["--units", "u.safetensors", "--mask", "ru.safetensors"],
            "--mask ru.safetensors and --units cannot be combined",
        ),
        (["--mask", "ru.safetensors", "--freeze", "scu"], "--mask ru.safetensors and --freeze cannot be combined"),
        (["--mask", "u.safetensors"], "--mask u.safetensors: cannot read u.safetensors: a units file where a mask"),
        (["--mask", "none"], "--mask none: cannot read none: it does not exist"),
        (["--units", "none", "--freeze", "scu"], "--units none: cannot read none: it does not exist"),
        (
            ["--units", "u.safetensors", "--freeze", "xcu"],
            "--units u.safetensors: freeze='xcu': category 'xcu' is unknown",
        ),
        (["--units", "u.safetensors", "--train", "ru:99%"], "train='ru:99%' asks for"),
        (["--units", "u.safetensors", "--freeze", "scu", "--policy", "norms"], "--policy norms is not NAME=VALUE"),
        (["--units", "u.safetensors", "--freeze", "scu", "--policy", "qk=train,qk=train"], "qk is given twice"),
        (
            ["--units", "u.safetensors", "--freeze", "scu", "--policy", "x=train"],
            "policy: 'x' is unknown; use embeddings",
        ),
        (["--mask", "other.safetensors"], "--mask other.safetensors: mask of another model"),
        (
            ["--units", "other_units.safetensors", "--freeze", "scu"],
            "--units other_units.safetensors: mask of another model",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, call):
    other = on_meta(intermediate_size=60)
    tiny_units(other).save("other_units.safetensors")
    tiny_units(other).mask(other, "scu").save("other.safetensors")
    assert message in call("sample", *arguments, code=2)


# inspect


def test_inspect_a_mask(call):
    out = call("inspect", "scu.safetensors")
    mask, path = Mask.load("scu.safetensors"), "model.layers.1.mlp.down_proj.weight"
    assert re.search(rf"sha256 +{mask.sha256}", out)
    assert re.search(r"policy\.qk +follow", out)
    frozen = mask[path].frozen.numel()
    assert re.search(rf"1 │ mlp +│ {re.escape(path)} +│ columns │ +{frozen} │ +52 │", out)
    document = json.loads(call("inspect", "scu.safetensors", "--json"))
    assert (document["kind"], document["sha256"]) == ("mask", mask.sha256)
    assert document["provenance"]["freeze"] == "scu"
    rows = {row["parameter"]: row for row in document["parameters"]}
    assert list(rows) == list(mask)
    assert rows[path] == {
        "parameter": path, "layer": 1, "kind": "mlp", "axis": 1, "stacked": False,
        "whole": False, "frozen": frozen, "of": 52,
    }  # fmt: skip
    for row in document["kinds"]:
        parts = [part for part in rows.values() if part["kind"] == row["kind"]]
        assert row["parameters"] == len(parts)
        assert row["frozen"] == sum(part["frozen"] for part in parts)
        assert row["of"] == sum(part["of"] for part in parts)


def test_inspect_a_mask_made_by_hand(call):
    Mask({"a.b": ("rows", None), "c": ("columns", [1]), "d": Region(2, [0], 3)}).save("hand.safetensors")
    out = call("inspect", "hand.safetensors")
    assert re.search(r"- │ other │ a\.b +│ whole +│ +- │ +- │", out)
    assert re.search(r"- │ other │ c +│ columns │ +1 │ +- │", out)
    assert re.search(r"- │ other │ d +│ 2 +│ +1 │ +3 │", out)
    document = json.loads(call("inspect", "hand.safetensors", "--json"))
    assert document["kinds"] == [{"kind": "other", "parameters": 3, "frozen": None, "of": None}]


# diff


def jaccard(a: set, b: set) -> float | None:
    return len(a & b) / len(a | b) if a | b else None


def test_diff_of_units(call):
    model = on_meta()
    first, second = tiny_units(model), tiny_units(model, seed=1)
    second.save("v.safetensors")
    document = json.loads(call("diff", "u.safetensors", "v.safetensors", "--json"))
    assert (document["a"], document["b"], document["kind"]) == ("u.safetensors", "v.safetensors", "units")
    rows = {(row["layer"], row["of"]): row for row in document["rows"]}
    for layer, category in itertools.product((0, 1, "all"), Category):
        sets = [
            {
                (name, i)
                for name, values in units.category.items()
                if layer in ("all", units.layouts[name].layer)
                for i in (values == category).nonzero().flatten().tolist()
            }
            for units in (first, second)
        ]
        row = rows[layer, category.name.lower()]
        assert (row["a"], row["b"], row["both"]) == (len(sets[0]), len(sets[1]), len(sets[0] & sets[1]))
        assert row["jaccard"] == jaccard(*sets)
    same = [bool(x) for name in first.modules for x in first.category[name] == second.category[name]]
    assert document["agreement"] == pytest.approx(sum(same) / len(same))
    out = call("diff", "u.safetensors", "v.safetensors")
    assert re.search(rf"1 │ {rows[1, 'scu']['jaccard']:.3f} │", out)
    assert f"{document['agreement']:.1%} of all units have the same category" in out
    assert "unobserved" not in out


def test_diff_of_masks(call):
    document = json.loads(call("diff", "scu.safetensors", "ru.safetensors", "--json"))
    masks = [Mask.load(name) for name in ("scu.safetensors", "ru.safetensors")]
    layers = {None: "model.embed_tokens lm_head model.norm", 0: "model.layers.0.", 1: "model.layers.1."}
    rows = {(row["layer"], row["of"]): row for row in document["rows"]}
    for layer, prefixes in layers.items():
        sets = [
            {
                (name, i)
                for name, region in mask.items()
                if name.startswith(tuple(prefixes.split()))
                for i in region.as_bool().nonzero().flatten().tolist()
            }
            for mask in masks
        ]
        assert rows[layer, "all"]["jaccard"] == jaccard(*sets)
    assert rows["all", "norms"] == {
        "layer": "all", "of": "norms", "a": 0, "b": 5 * 48, "both": 0, "jaccard": 0.0
    }  # fmt: skip
    assert rows["all", "all"]["both"] == sum(rows[layer, "all"]["both"] for layer in (None, 0, 1))
    assert re.search(r"all │ +0\.000 │ +0\.000 │ +0\.000", call("diff", "scu.safetensors", "ru.safetensors"))


def test_a_file_is_equal_to_itself(call):
    for name in ("u.safetensors", "ru.safetensors"):
        document = json.loads(call("diff", name, name, "--json"))
        assert {row["jaccard"] for row in document["rows"]} <= {1.0, None}


def test_masks_made_by_hand_can_be_compared(call):
    Mask({"layers.3.mlp.w": ("rows", [1, 2]), "b": Region(0, None, 4)}).save("a")
    Mask({"layers.3.mlp.w": ("rows", [2, 3, 4]), "b": Region(0, [1])}).save("b")
    rows = {(row["layer"], row["of"]): row for row in json.loads(call("diff", "a", "b", "--json"))["rows"]}
    assert rows[3, "mlp"]["jaccard"] == 0.25
    assert (rows[None, "other"]["a"], rows[None, "other"]["jaccard"]) == (4, 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("u.safetensors", "ru.safetensors"), "u.safetensors is a units file and ru.safetensors a mask file; give two"),
        (("u.safetensors", "none"), "cannot read none: it does not exist"),
        (
            ("u.safetensors", "wide_units"),
            "units of different models: the units of model.layers.0.mlp are not the same",
        ),
        (("u.safetensors", "deep_units"), "units of different models: the units of model.layers.2.self_attn are not"),
        (
            ("ru.safetensors", "wide"),
            "masks: model.layers.0.mlp.gate_proj.weight: the axis has the size 52 in one and 60",
        ),
        (("ru.safetensors", "deep"), "masks of different models: model.layers.2.mlp.down_proj.weight is only in one"),
        (("ru.safetensors", "hand"), "masks of different models: a is only in one of them"),
        (("hand", "hand"), "a is frozen as a whole and its size is unknown; give it: Region(axis, frozen, size)"),
    ],
)
def test_files_that_cannot_be_compared_are_named(arguments, message, call):
    for name, overrides in (("wide", {"intermediate_size": 60}), ("deep", {"num_hidden_layers": 3})):
        model = on_meta(**overrides)
        tiny_units(model).save(f"{name}_units")
        tiny_units(model).mask(model, train="ru").save(name)
    Mask({"a": ("rows", None)}).save("hand")
    assert message in call("diff", *arguments, code=2)


def test_a_model_with_weights_has_the_same_mask(folder):
    assert load_mask(tiny_model("llama"), "u.safetensors", ("scu",), (), (), None) == Mask.load("scu.safetensors")
