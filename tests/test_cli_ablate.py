"""`ssah-fast ablate`: the way through the command line, and what a user can get wrong."""

import json
import shlex

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ssah_fast.cli.main import main
from ssah_fast.partition import Units, identify
from ssah_fast.scoring import score

ABLATE = ["ablate", "model", "--units", "units.safetensors", "--asr-data", "asr.jsonl", "--utility-data", "text.jsonl"]
SHORT = ["--max-new-tokens", "4", "--draws", "1", "--device", "cpu", "-o", "out"]


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A model, its scores and units, and data; tests write to out alone."""
    folder = tmp_path_factory.mktemp("ablate")
    network = tiny_model("llama")
    network.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    calibration = [{"prompt": f"w{i} w{2 * i}", "response": f"w{i} w3 w{i + 7}"} for i in range(20, 26)]
    scores = score(network, tiny_tokenizer(), safety=calibration, utility=calibration[::-1])
    scores.save(folder / "scores.safetensors")
    identify(scores, 0.1, 0.2, 0.15).save(folder / "units.safetensors")
    sets = {
        "asr": [{"prompt": f"w{i} w{i + 40}"} for i in range(3)],
        "text": [{"prompt": f"w{i}", "response": f"w{i + 1} w{i + 2} w3"} for i in range(50, 53)],
        "seen": calibration,
    }
    for name, records in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "empty.jsonl").write_text("")
    return folder


@pytest.fixture
def folder(master, working_in):
    return working_in(master)


def test_a_table_and_the_same_in_json(folder, capsys):
    assert main([*ABLATE, *SHORT]) == 0
    printed = capsys.readouterr()
    rows = [line.split("│")[1].strip() for line in printed.out.splitlines() if line.startswith("│")]
    names = [name for own in ("scu 10%", "ucu 20%", "ru 15%") for name in (own, f"random of {own}, draw 0")]
    assert rows == ["dense", *names]
    assert printed.err == "wrote out/ablation.json\n"
    document = json.loads((folder / "out" / "ablation.json").read_text())
    assert main([*ABLATE, *SHORT, "--json"]) == 0  # nothing is generated again
    assert json.loads(capsys.readouterr().out) == document
    assert [row["category"] for row in document["rows"]] == ["dense", "scu", "random", "ucu", "random", "ru", "random"]
    assert document["kind"] == "ablation"
    assert document["model"]["name"] == "model"


def test_a_scan_ends_with_a_command_that_gives_its_units(folder, capsys):
    generous = ["--scu-utility-drop", "999", "--scu-asr-gain", "-999", "--scan-ratios", "5%,2%"]
    more = ["--scores", "scores.safetensors", "--controls", "none", "--categories", "scu", "--scan", *generous]
    assert main([*ABLATE, *SHORT, *more, "--ratios", "3%", "--seqlen", "64"]) == 0
    out = capsys.readouterr().out
    line = out.splitlines()[-1]
    assert line.startswith("ssah-fast identify scores.safetensors --scu 5% --ucu")
    assert "No ratio qualifies for UCU" in out or "ucu 5%" in out
    document = json.loads((folder / "out" / "ablation.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["dense", "scu 10%", "scu 3%"]
    assert main([*shlex.split(line.replace("FILE", "found.safetensors"))[1:]]) == 0
    assert Units.load("found.safetensors").count("scu") == document["scan"]["tried"][0]["units"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--units", "none.safetensors"], "cannot read none.safetensors: it does not exist"),
        (["--units", "scores.safetensors"], "a scores file where a units file is needed"),
        (["--scores", "units.safetensors"], "a units file where a scores file is needed"),
        (["--asr-data", "empty.jsonl"], "--asr-data: empty.jsonl holds no text"),
        (["--asr-data", "seen.jsonl"], "6 of 6 prompts are in the calibration data"),
        (["--judge", "oracle"], "--judge 'oracle' is no judge"),
        (["--judge", "keyword,wei"], "--judge keyword,wei: an ablation has one judge"),
        (["--controls", "norm"], "the control 'norm' needs the scores"),
        (["--controls", "luck"], "control 'luck' is unknown"),
        (["--categories", "scv"], "category 'scv' is unknown"),
        (["--ratios", "many"], "--ratios: 'many' is not a number or a percentage"),
        (["--ratios", "150%", "--scores", "scores.safetensors"], "is not a ratio; give a number from 0 to 1"),
        (["--scan"], "a scan needs the scores"),
        (["--scan", "--scan-ratios", "2"], "scan ratios: 2.0 is out of range"),
        (["--max-new-tokens", "200"], "use max_new_tokens="),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_result(folder, capsys, change, message):
    assert main([*ABLATE, *SHORT, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "out" / "ablation.json").exists()


def test_under_torchrun_the_first_process_does_it_all(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main([*ABLATE, *SHORT]) == 0
    assert not (folder / "out").exists()


def test_the_options_survive_a_config_file(folder, capsys):
    asked = [*ABLATE, *SHORT, "--ratios", "3%,6%", "--controls", "none"]
    assert main([*asked, "--dump-config"]) == 0
    text = capsys.readouterr().out
    (folder / "run.yaml").write_text(text)
    assert main(["ablate", "model", "--config", "run.yaml", "--dump-config"]) == 0
    assert capsys.readouterr().out == text
