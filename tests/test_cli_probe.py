"""`ssah-fast probe` and `ssah-fast transfer`."""

import json
import re

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from tiny_units import tiny_units

from ssah_fast import loading, probing
from ssah_fast.attribute_transfer import transfer
from ssah_fast.cli.main import main
from ssah_fast.cli.probe import probe
from ssah_fast.partition import Units

TEXTS = ("--refusal", "w40 w41", "--compliance", "w50")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    for name, overrides in (("model", {}), ("deep", {"num_hidden_layers": 3})):
        tiny_model("llama", seed=len(name), **overrides).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "harmful.jsonl").write_text("".join(f'{{"prompt": "w{i} w{i + 1}"}}\n' for i in range(8)))
    (folder / "harmless.txt").write_text("w20 w21\nw22\n")
    for seed in (0, 1):
        tiny_units(tiny_model("llama"), seed=seed).save(folder / f"{seed}.units")
    return folder


@pytest.fixture
def call(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setenv("NO_COLOR", "1")

    def invoke(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert main(arguments) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return invoke


# probe


def test_models_are_probed_side_by_side(call, home, tmp_path):
    data = ("--data", "harmful.jsonl", "--harmless-data", "harmless.txt", "--limit", "5")
    models = ("model", "--unaligned", "deep", "--compare", "again=model")
    out, err = call("probe", *models, *data, *TEXTS, "-o", f"{tmp_path}/out", "--json")
    document = json.loads(out)
    assert document == json.loads((tmp_path / "out" / "probe.json").read_text())
    assert list(document)[:2] == ["kind", "schema"]
    assert document["kind"] == "probe"
    assert f"wrote {tmp_path}/out/probe.json" in err
    assert [model["name"] for model in document["models"]] == ["aligned", "unaligned", "again"]
    aligned, unaligned, again = document["models"]
    assert aligned["model"]["name"] == "model"
    assert aligned["sets"] == again["sets"]
    assert [(one["set"], one["n"]) for one in aligned["sets"]] == [("harmful", 5), ("harmless", 2)]
    assert [len(model["sets"][0]["layers"]) for model in (aligned, unaligned)] == [2, 3]
    assert document["data"]["harmless"]["n"] == 2
    network, tokenizer = loading.load_model("deep")
    prompts = {"harmful": [f"w{i} w{i + 1}" for i in range(5)], "harmless": ["w20 w21", "w22"]}
    direct = probing.probe(network, tokenizer, prompts, refusal="w40 w41", compliance="w50")
    assert unaligned["sets"] == direct["sets"]


def test_the_table_has_a_row_per_layer_and_a_dash_where_a_model_has_none(call, tmp_path):
    arguments = ("probe", "model", "--compare", "deep=deep", "--data", "harmful.jsonl", *TEXTS, "-o", f"{tmp_path}/o")
    out, _ = call(*arguments, "--baseline", "--system-prompt", "default", "--batch-size", "2")
    document = json.loads((tmp_path / "o" / "probe.json").read_text())
    assert document["settings"]["baseline"] is True
    assert document["settings"]["system_prompt"]["name"] == "default"
    assert [model["name"] for model in document["models"]] == ["model", "deep"]
    first = document["models"][0]["sets"][0]["layers"][0]
    assert re.search(rf"0 │ +{re.escape(format(first['refusal'], '.3f'))} │", out)
    assert re.search(r"2 │ +- │ +- │ +- │ +- │ +-?\d\.\d{3} │", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "deep"), "--compare deep is not NAME=MODEL; write for example --compare tuned=DIR"),
        (("--compare", "model=deep"), "another model is called 'model'; choose another name"),
        (("--unaligned", "nowhere"), "nowhere does not exist; MODEL must be a folder"),
        (("--harmless-data", "empty.jsonl"), "--harmless-data: empty.jsonl holds no text"),
        (("--refusal", "w50"), "--refusal and --compliance are both 'w50'"),
        (("--limit", "0"), "limit=0.0 is out of range"),
        (("-o", "harmless.txt"), "harmless.txt"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, message, call, home, tmp_path):
    (home / "empty.jsonl").write_text("")
    _, err = call("probe", "model", "--data", "harmful.jsonl", *TEXTS, "-o", f"{tmp_path}/o", *arguments, code=2)
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o" / "probe.json").exists()


def test_the_openings_in_the_help_are_those_of_the_function():
    defaults = {option.name: option.default for option in probe.params}
    assert (defaults["refusal"], defaults["compliance"]) == (probing.REFUSAL, probing.COMPLIANCE)


# transfer


def test_transfer_writes_prints_and_gives_json(call, tmp_path):
    out, err = call("transfer", "0.units", "1.units", "-o", f"{tmp_path}/t.json", "--json")
    document = json.loads(out)
    assert document == json.loads((tmp_path / "t.json").read_text())
    expected = transfer(Units.load("0.units"), Units.load("1.units"))
    assert document.pop("before") == {"file": "0.units", **expected.pop("before")}
    assert document.pop("after") == {"file": "1.units", **expected.pop("after")}
    assert document == expected
    assert f"wrote {tmp_path}/t.json" in err
    table, _ = call("transfer", "0.units", "1.units")
    scu = expected["units_percent"][0]
    cells = " │ +".join(re.escape(f"{value:.2f}") for value in (*scu, sum(scu)))
    assert re.search(rf"SCU +│ +{cells} │", table)
    assert re.search(rf"all │ +{expected['unchanged_units_percent']:.2f} │", table)


def test_transfer_overwrites_no_input_and_names_a_wrong_file(call, home):
    _, err = call("transfer", "0.units", "1.units", "-o", "./1.units", code=2)
    assert "--output ./1.units would overwrite one of the units files" in err
    _, err = call("transfer", "0.units", "harmful.jsonl", code=2)
    assert "harmful.jsonl: truncated or not a safetensors file" in err
