"""`ssah-fast finetune`: the whole way through the command line, killed and resumed, and with several processes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("trl")

from ssah_fast import embedded
from ssah_fast.cli.finetune import finetune
from ssah_fast.cli.main import main
from ssah_fast.embedded import Recipe
from ssah_fast.masks import Mask
from ssah_fast.run_folder import FINGERPRINT, MANIFEST, MASK
from ssah_fast.training_options import Options

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
BIN = Path(sys.executable).parent
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} <a> {{ m['content'] }} </s>"
    "{% else %} <u> {{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} <a>{% endif %}"
)
FREEZE = ("--units", "units.safetensors", "--freeze", "scu,cu:20%")
TUNE = ("finetune", "model", "--data", "d.jsonl", "--device", "cpu", "-o", "out", "--learning-rate", "1e-2")


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A folder with a model, its units and data: a copy for each test."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    records = [{"prompt": f"w{i} w{i + 3}", "response": f"w{2 * i} w5 w{i}"} for i in range(24)]
    (folder / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "u.jsonl").write_text("".join(json.dumps({**r, "response": "w8 w9"}) + "\n" for r in records))
    scores, units = str(folder / "scores.safetensors"), str(folder / "units.safetensors")
    data = ["--safety-data", str(folder / "d.jsonl"), "--utility-data", str(folder / "u.jsonl"), "--device", "cpu"]
    assert main(["score", str(folder / "model"), *data, "-o", scores]) == 0
    assert main(["identify", scores, "--scu", "10%", "--ucu", "10%", "-o", units]) == 0
    return folder


@pytest.fixture
def folder(master, tmp_path, monkeypatch):
    copy = shutil.copytree(master, tmp_path / "here")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("NO_COLOR", "1")
    return copy


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_frozen(mask, before, after):
    for name, region in mask.items():
        old, new = before[name], after[name]
        if region.frozen is not None:
            old, new = old.index_select(region.axis, region.frozen), new.index_select(region.axis, region.frozen)
        assert torch.equal(old, new), name


# success


def test_finetune_then_verify(folder, capfd):
    assert main([*TUNE, *FREEZE, "--weight-decay", "0.1", "--num-train-epochs", "2"]) == 0
    captured = capfd.readouterr()
    assert "6 steps" in captured.out and captured.out.count("\n") == 1
    assert captured.err.endswith("wrote out\n")
    rows = [line.split("│")[1:-1] for line in captured.err.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[0][:2]] == ["embeddings", "-"]
    assert {"mlp", "attention", "qk", "norms"} <= {row[0].strip() for row in rows}
    assert {"SCU", "CU", "UCU"} <= {row[1].strip() for row in rows}
    manifest = json.loads(Path("out", MANIFEST).read_text())
    mask = Mask.load(Path("out", MASK))
    assert manifest["mask"]["provenance"]["freeze"]
    assert_frozen(mask, weights("model"), weights("out"))
    assert main(["verify", "model", "out", "--mask", str(Path("out", MASK)), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["totals"]["frozen"] == manifest["counts"]["frozen"]
    other = Mask({name: ("rows", None) for name in mask})
    other.save("all.safetensors")
    assert main(["verify", "model", "out", "--mask", "all.safetensors"]) == 3


def test_json_is_all_of_stdout(folder, capfd):
    assert main([*TUNE, "--train", "ru", "--units", "units.safetensors", "--max-steps", "2", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["steps"] == 2 and document["output"] == "out" and document["adapter"] == 0
    assert 0 < document["trainable"] < document["frozen"]
    assert document["mask_sha256"] == Mask.load(Path("out", MASK)).sha256


def test_without_a_mask_all_weights_train(folder, capfd):
    assert main([*TUNE, "--max-steps", "1", "--no-compact", "--gradient_checkpointing"]) == 0
    assert "0 frozen" in capfd.readouterr().out
    before, after = weights("model"), weights("out")
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_lora_and_prefix(folder, capfd):
    assert main([*TUNE, "--method", "lora", "--lora-rank", "2", "--max-steps", "2"]) == 0
    assert weights("out").keys() == weights("model").keys()
    assert main([*TUNE, "-o", "prefix", "--method", "prefix", "--max-steps", "1"]) == 0
    assert "a prefix cannot be merged into the weights: the folder holds an adapter" in capfd.readouterr().err
    assert Path("prefix", "adapter_model.safetensors").is_file()


def test_a_dumped_config_repeats_the_run(folder, capfd):
    options = [*TUNE, *FREEZE, "--max-steps", "2", "--policy", "norms=freeze"]
    assert main([*options, "--dump-config"]) == 0
    Path("c.yaml").write_text(capfd.readouterr().out.replace("output: out", "output: again"))
    assert main(options) == main(["finetune", "model", "--config", "c.yaml"]) == 0
    first, again = (json.loads(Path(name, MANIFEST).read_text()) for name in ("out", "again"))
    assert first["files"]["model.safetensors"] == again["files"]["model.safetensors"]
    assert first["fingerprint"] == again["fingerprint"]


def test_every_option_is_a_flag_with_the_same_default():
    context = finetune.make_context("finetune", ["model"])
    for field in fields(Options):
        if field.name != "use_cpu":
            assert context.params[field.name] == field.default, field.name


# the plan


def test_plan_reads_no_weights(folder, capfd):
    Path("model", "model.safetensors").unlink()
    options = ["finetune", "model", "--units", "units.safetensors", "--train", "ru", "--plan"]
    assert main(options) == 0
    out = capfd.readouterr().out
    assert all(word in out for word in ("GiB", "gradients", "moments", "activations", "all weights", "total"))
    assert main([*options, "--json", "--per-device-train-batch-size", "2", "--max-seq-length", "64"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["run"]["weights"] == plan["dense"]["weights"]
    assert plan["run"]["moments"] < plan["dense"]["moments"] == 2 * plan["dense"]["gradients"]
    assert plan["run"]["gradients"] < plan["dense"]["gradients"]
    assert plan["run"]["total"] == sum(size for name, size in plan["run"].items() if name != "total")


def test_plan_per_process(folder, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["finetune", "model", "--plan"]) == 0
    assert "GiB per process (4)" in (out := capfd.readouterr().out) and "buckets" in out
    monkeypatch.setenv("RANK", "1")
    assert main(["finetune", "model", "--plan"]) == 0
    assert capfd.readouterr().out == ""


# mistakes


@pytest.fixture
def refuse(folder, capfd):
    """Run a command that must fail: returns its one line; nothing on stdout, nothing written."""

    def invoke(*arguments, code=2):
        before = sorted(folder.rglob("*"))
        assert main([*arguments]) == code
        captured = capfd.readouterr()
        assert captured.out == ""
        *table, line = captured.err.splitlines()
        assert line.startswith("ssah-fast: error: ") and not any("error" in row for row in table)
        assert sorted(folder.rglob("*")) == before
        return line.removeprefix("ssah-fast: error: ")

    return invoke


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning-rate", "nan"], "learning_rate=nan is out of range"),
        (["--learning-rate", "fast"], "Invalid value for '--learning-rate'"),
        (["--max-steps", "0"], "max_steps=0 is out of range"),
        (["--rounding", "up"], "Invalid value for '--rounding'"),
        (["--data", "none.jsonl"], "--data: file not found: none.jsonl"),
        (["--data", "odd.jsonl"], "--data: no known columns in odd.jsonl; it has x; name yours with --prompt-column"),
        (["--data", "empty.jsonl"], "--data: empty.jsonl holds no response to learn from"),
        (["--max-seq-length", "3"], "--data: --max-seq-length 3 leaves no token of a response to learn; raise it"),
        (["-o", "none/out"], "--output none/out: the folder"),
        (["-o", "model"], "--output model holds 'chat_template.jinja' and no result of ssah-fast finetune"),
        (["--units", "none", "--freeze", "scu"], "--units none: cannot read none: it does not exist"),
        (["--freeze", "scu"], "--freeze needs --units FILE"),
        (["--mask", "other.safetensors"], "--mask other.safetensors: mask of another model"),
        (["--mask", "all.safetensors"], "--mask all.safetensors: the mask freezes every parameter"),
        (
            ["--units", "units.safetensors", "--freeze", "scu", "--method", "lora"],
            "method='lora' trains an adapter and",
        ),
        (["--method", "lora", "--plan"], "--plan knows --method full, not lora"),
        (["--resume-from-checkpoint", "model"], "--resume-from-checkpoint model is no complete checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(options, message, folder, refuse):
    Path("odd.jsonl").write_text('{"x": "w1"}\n')
    Path("empty.jsonl").write_text('{"prompt": "w1", "response": ""}\n')
    Mask({"other.weight": ("rows", [0])}).save("other.safetensors")
    Mask({name: ("rows", None) for name, _ in tiny_model("llama").named_parameters()}).save("all.safetensors")
    assert message in refuse(*TUNE, *options)


def test_what_is_missing_is_said(refuse):
    assert "Missing option '--data'" in refuse("finetune", "model")
    assert "Missing option '-o'" in refuse("finetune", "model", "--data", "d.jsonl")
    assert "no-model does not exist" in refuse("finetune", "no-model", "--data", "d.jsonl", "-o", "out")


def test_a_broken_weight_stops_the_run(folder, refuse):
    broken = weights("model")
    broken["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    from safetensors.torch import save_file

    save_file(broken, "model/model.safetensors", {"format": "pt"})
    assert "not finite" in (line := refuse(*TUNE)) and "model." in line


def test_trl_is_an_extra(folder, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "ssah_fast.training", raising=False)
    monkeypatch.delattr("ssah_fast.training", raising=False)
    assert refuse(*TUNE).endswith("fine-tuning needs trl; install it with: pip install 'ssah_fast[train]'")


def test_a_folder_that_cannot_be_written(folder, refuse, monkeypatch):
    monkeypatch.setattr("ssah_fast.run_folder.os.access", lambda *_: False)
    assert "is not writable" in refuse(*TUNE)


# killed and resumed

LONG = ("--max-steps", "40", "--save-steps", "4", "--per-device-train-batch-size", "4", "--logging-steps", "4")


def wait_for(path, process, seconds=90):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.002)


def test_killed_in_the_middle_and_resumed_gives_the_same_bits(folder, refuse, capfd):
    command = [BIN / "ssah-fast", *TUNE, *FREEZE, *LONG]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(folder / "out.unfinished" / "checkpoint-8" / FINGERPRINT, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not Path("out").exists()
    assert "holds checkpoint-" in refuse(*TUNE, *FREEZE, *LONG)
    resume = ("--resume-from-checkpoint", "latest")
    scu = (*FREEZE[:2], "--freeze", "scu")
    for change in (scu, ("--learning-rate", "3e-2"), ("--data", "u.jsonl"), ("--seed", "5")):
        line = refuse(*TUNE, *(() if change is scu else FREEZE), *LONG, *resume, *change, code=4)
        assert "resume with the settings of the checkpoint" in line
    assert main([*TUNE, *FREEZE, *LONG, *resume]) == 0
    assert "resumed from" in capfd.readouterr().err
    assert not list(Path("out").glob("checkpoint-*")) and not Path("out.unfinished").exists()
    assert main([*TUNE, *FREEZE, *LONG, "-o", "whole"]) == 0
    killed, whole = (json.loads(Path(name, MANIFEST).read_text()) for name in ("out", "whole"))
    assert killed["files"]["model.safetensors"] == whole["files"]["model.safetensors"]
    assert killed["history"] == whole["history"] and killed["steps"] == 40
    assert_frozen(Mask.load(Path("out", MASK)), weights("model"), weights("out"))
    assert main([*TUNE, *FREEZE, *LONG, *resume]) == 0  # a job that is restarted once more has nothing to do


# several processes

SCRIPT = """
import hashlib, sys
from ssah_fast import loading, training
from ssah_fast.masks import Mask
model, tokenizer = loading.load_model("model", device="cpu")
mask = Mask.load("mask.safetensors")
training.finetune(model, tokenizer, "d.jsonl", "out", mask=mask, max_steps=3, per_device_train_batch_size=4,
                  learning_rate=1e-2, save_steps=2, keep_checkpoints=True, logging_steps=1, use_cpu=True)
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
rank = training.accelerate.PartialState().process_index
open(f"rank{rank}", "x").write(digest)
"""


def launch(*command):
    """Run a launcher; where it hangs, end it by SIGTERM, upon which it ends its workers (SIGKILL would orphan them)."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*map(str, command)], env=ENVIRONMENT, text=True, **streams)
    try:
        out, err = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise
    assert process.returncode == 0, err[-3000:]
    return out, err


def test_torchrun_two_processes_end_with_the_same_weights(folder):
    """Rank 0 alone writes; the result is that of one process with batches twice as large."""
    from ssah_fast import loading, training

    mask = Mask({"model.layers.0.mlp.gate_proj.weight": ("rows", [*range(40)]), "model.norm.weight": ("rows", None)})
    mask.save("mask.safetensors")
    Path("script.py").write_text(SCRIPT)
    launch(BIN / "torchrun", "--nproc-per-node", "2", "--standalone", "script.py")
    stored = weights("out")
    model, tokenizer = loading.load_model("out", device="cpu")
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    assert Path("rank0").read_text() == Path("rank1").read_text() == digest
    assert_frozen(mask, weights("model"), stored)
    manifest = json.loads(Path("out", MANIFEST).read_text())
    assert manifest["processes"] == 2 and manifest["steps"] == 3
    states = [path.name for path in Path("out").glob("checkpoint-*/rng*")]
    assert sorted(states) == ["rng_state_0.pth"] * 2 + ["rng_state_1.pth"] * 2
    single, tokenizer = loading.load_model("model", device="cpu")
    options = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    training.finetune(single, tokenizer, "d.jsonl", "single", mask=mask, **options)
    for name, tensor in weights("single").items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_accelerate_launch_on_the_embedded_model(folder):
    """On CPUs, too, it is --multi_gpu that makes accelerate start several processes."""
    small = Recipe(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48, examples=64, base_steps=1, align_steps=1)
    home = embedded.ensure("embedded", small)
    Mask({"model.layers.1.mlp.down_proj.weight": ("columns", [*range(40)])}).save("mask.safetensors")
    tune = ["finetune", str(home.model), "--data", str(home.data["finetune"]), "--mask", "mask.safetensors"]
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    module = ("--main_process_port", "0", "-m", "ssah_fast.cli.main")
    tune += ["--device", "cpu", "-o", "out", "--max-steps", "2"]
    out, err = launch(BIN / "accelerate", "launch", *options.split(), *module, *tune)
    assert out.count("2 steps") == 1 and err.count("wrote out") == 1
    assert json.loads(Path("out", MANIFEST).read_text())["processes"] == 2
    assert_frozen(Mask.load(Path("out", MASK)), weights(home.model), weights("out"))
