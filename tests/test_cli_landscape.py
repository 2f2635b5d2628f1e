"""`ssah-fast landscape`: the way through the command line, and what a user can get wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ssah_fast import survey
from ssah_fast.cli.main import main
from ssah_fast.partition import identify
from ssah_fast.scoring import score

ASKED = ["landscape", "model", "--asr-data", "asr.jsonl", "--utility-data", "text.jsonl", "-o", "out"]
SHORT = ["--max-new-tokens", "4", "--device", "cpu", "--directions", "2", "--alphas=-0.4:0.4:3"]


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """Two models, units, and data; tests write to out alone."""
    folder = tmp_path_factory.mktemp("landscape")
    network = tiny_model("llama")
    for name, made in (("model", network), ("other", tiny_model("llama", seed=1))):
        made.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tiny_model("llama", intermediate_size=40).save_pretrained(folder / "wide")
    calibration = [{"prompt": f"w{i} w{2 * i}", "response": f"w{i} w3 w{i + 7}"} for i in range(20, 26)]
    scores = score(network, tiny_tokenizer(), safety=calibration, utility=calibration[::-1])
    identify(scores, 0.1, 0.2, 0.15).save(folder / "units.safetensors")
    sets = {
        "asr": [{"prompt": f"w{i} w{i + 40}"} for i in range(3)],
        "text": [{"prompt": f"w{i}", "response": f"w{i + 1} w{i + 2} w3"} for i in range(50, 53)],
    }
    for name, records in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "empty.jsonl").write_text("")
    (folder / "careful.txt").write_text("w7 w8")
    return folder


@pytest.fixture
def folder(master, working_in):
    return working_in(master)


@pytest.fixture
def measured(monkeypatch):
    """The points that were measured."""
    points, original = [], survey.Survey._measured
    monkeypatch.setattr(survey.Survey, "_measured", lambda self, steps: points.append(steps) or original(self, steps))
    return points


def rows(printed):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def test_tables_and_the_same_in_json(folder, capsys, measured):
    assert main([*ASKED, *SHORT]) == 0
    printed = capsys.readouterr()
    table = rows(printed.out)
    assert [row[0] for row in table] == ["-0.4", "0", "0.4", "none", "none"]
    assert table[0][1:4] == ["100.0", "100.0", "100.0"] and table[3][1:3] == ["judge alone", "0.0 [0.0, 0.0]"]
    assert (
        printed.err
        == "wrote out/landscape.json\nWARNING: every answer is degenerate; the rates say nothing of safety\n"
    )
    assert len(measured) == 5
    document = json.loads((folder / "out" / "landscape.json").read_text())
    assert main([*ASKED, *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert len(measured) == 5  # nothing is measured again
    assert main([*ASKED, *SHORT, "--fresh"]) == 0
    assert len(measured) == 10


def test_a_plane_with_checkpoints_and_system_prompts(folder, capsys, measured):
    where = ["--to", "other", "--dimensions", "2", "--alphas", "0,1", "--betas", "0,0.3", "--trajectory", "other,model"]
    assert main([*ASKED, *SHORT[:4], *where, "--system-prompt", "none,careful.txt"]) == 0
    printed = capsys.readouterr()
    assert "the plane is drawn by `ssah-fast report DIR`" in printed.err
    assert [row[:4] for row in rows(printed.out)] == [
        [name, place, moved, "0 %"]
        for name, place, moved in (("other", "1.00, 0.00", "40.9"), ("model", "0.00, 0.00", "0"))
        for _ in range(2)
    ]
    document = json.loads((folder / "out" / "landscape.json").read_text())
    assert {row["system"] for row in document["rows"]} == {"none", "careful"} and len(document["rows"]) == 8
    assert len(measured) == 5  # the first checkpoint is a point of the plane


def test_the_other_ways_to_measure(folder, capsys, measured):
    short = [*ASKED, *SHORT[:4], "--directions", "1", "--alphas=-0.4:0.4:5"]
    assert main([*short, "--only", "ru", "--units", "units.safetensors", "--exclude", "*norm*,*embed*"]) == 0
    assert json.loads((folder / "out" / "landscape.json").read_text())["settings"]["only"] == "ru"
    assert main([*short, "--preview"]) == 0
    out = capsys.readouterr().out
    assert "margin" not in out and len(measured) == 9  # nothing was refused; the centre is shared
    assert main([*short, "--adaptive"]) == 0
    printed = capsys.readouterr()
    assert "random 123: left out 2 points, -0.2, 0.2" in printed.err and len(measured) == 11


def test_a_plan_reads_no_weights(folder, capsys, monkeypatch):
    monkeypatch.setattr("ssah_fast.loading.load_weights", lambda *_, **__: 1 / 0)
    assert main([*ASKED, "--plan", "--max-new-tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("61 points, 183 answers of at most 100 tokens\nmemory ")
    assert not (folder / "out").exists()
    assert main([*ASKED, "--plan", "--adaptive", "--preview"]) == 2
    assert "leave out one of the two" in capsys.readouterr().err
    assert main([*ASKED, "--plan", "--json", "--preview", "--max-new-tokens", "100"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["points"], plan["answers"], plan["new_tokens"]) == (61, 3, 300)
    assert plan["memory"] == plan["weights"] + plan["cache"] + plan["piece"] and plan["seconds"] > 0
    assert plan["weights"] == sum(p.numel() * 4 for p in tiny_model("llama").parameters())


def test_ctrl_c_tells_that_points_are_kept_and_the_run_goes_on(folder):
    command = [sys.executable, "-m", "ssah_fast.cli.main", *ASKED, *SHORT[:4], "--alphas=-0.4:0.4:401"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    points, deadline = Path("out/points-0.jsonl"), time.monotonic() + 120
    while not (points.exists() and points.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert (
        error.lstrip()
        == "ssah-fast: interrupted; finished points are in out, and the same command continues from there\n"
    )
    done = points.read_bytes().count(b"\n")
    assert main([*ASKED, *SHORT[:4], "--alphas=0,0.4", "--directions", "1"]) == 0
    assert points.read_bytes().count(b"\n") <= done + 1  # the centre is there


@pytest.mark.parametrize(
    "change, message",
    [
        (["--asr-data", "empty.jsonl"], "--asr-data: empty.jsonl holds no text"),
        (["--alphas", "0.1:0.5:5"], "--alphas '0.1:0.5:5' lacks 0"),
        (["--alphas", "0:1"], "--alphas '0:1' is no grid"),
        (["--alphas", "a,b"], "--alphas 'a,b' is no grid"),
        (["--betas", "0,1"], "--betas is for a plane"),
        (["--and", "other"], "--and other is for the plane of two ways; give --to as well"),
        (["--to", "nowhere"], "--directions 2 is for lines along random directions"),
        (["--exclude", "*brain*"], "*brain*"),
        (["--judge", "oracle"], "--judge 'oracle' is no judge"),
        (["--judge", "keyword,wei"], "--judge keyword,wei: a landscape has one judge"),
        (["--only", "scu"], "--only scu goes with --units; give both, or neither"),
        (["--units", "units.safetensors"], "--units goes with --only; give both, or neither"),
        (["--units", "none.safetensors", "--only", "scu"], "cannot read none.safetensors: it does not exist"),
        (["--preview", "--adaptive"], "leave out one of the two"),
        (["--adaptive", "--alphas", "0,0.5"], "--adaptive is for lines along random directions"),
        (["--tolerance", "0", "--adaptive"], "--tolerance 0.0 is out of range"),
        (["--max-new-tokens", "200"], "use max_new_tokens="),
        (["--trajectory", "wide"], "wide"),
        (["--orthogonal", "--directions", "3"], "--orthogonal is for two random directions, not for 3"),
        (["-o", "asr.jsonl"], "it is a file; choose another folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_result(folder, capsys, change, message):
    assert main([*ASKED, *SHORT, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "out" / "landscape.json").exists()
    assert not [*folder.glob("out/points*")]


@pytest.mark.parametrize("name", ["nowhere", "wide"])
def test_a_checkpoint_that_does_not_fit_is_named(folder, capsys, name):
    assert main([*ASKED, *SHORT[:4], "--to", name]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1
    assert not [*folder.glob("out/points*")]


def test_the_options_survive_a_config_file(folder, capsys):
    asked = [*ASKED, *SHORT, "--exclude", "*norm*,*bias*", "--trajectory", "other", "--orthogonal"]
    assert main([*asked, "--dump-config"]) == 0
    text = capsys.readouterr().out
    (folder / "run.yaml").write_text(text)
    assert main(["landscape", "model", "--config", "run.yaml", "--dump-config"]) == 0
    assert capsys.readouterr().out == text
