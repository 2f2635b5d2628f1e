"""`ssah-fast score`: the whole way through the command line, and everything that a user can get wrong."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer

import ssah_fast
from ssah_fast import checkpoints, loading
from ssah_fast.cli.main import main
from ssah_fast.collector import Collector
from ssah_fast.partition import Units
from ssah_fast.scores import Scores

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
SCRIPT = Path(sys.executable).with_name("ssah-fast")
DATA = ("--safety-data", "s.jsonl", "--utility-data", "u.csv")
SCORE = ("score", "model", *DATA, "--device", "cpu", "-o", "out.safetensors")


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A folder with two models and their data: a copy for each test, so that it may damage them."""
    folder = tmp_path_factory.mktemp("score")
    for name, model_type in (("model", "llama"), ("gpt2", "gpt2")):
        tiny_model(model_type).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tiny_model("llama").save_pretrained(folder / "sharded", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder / "sharded")
    safety = [{"prompt": f"w{i} w{2 * i}", "response": f"w{i} w3 w{i + 7}"} for i in range(6)]
    utility = [(f"w{i}", f"w{i} w{i + 4} w9 w{3 * i}") for i in range(5)]
    (folder / "s.jsonl").write_text("".join(json.dumps(record) + "\n" for record in safety))
    (folder / "u.csv").write_text("goal,target\n" + "".join(f"{goal},{target}\n" for goal, target in utility))
    (folder / "prompts.txt").write_text("w1 w2\nw3\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "w1", "response": "w2 " * 200}) + "\n")
    (folder / "empty.jsonl").write_text("")
    return folder


@pytest.fixture
def folder(master, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # save_pretrained would draw on stderr
    copy = shutil.copytree(master, tmp_path / "here")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("NO_COLOR", "1")
    return copy


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def refuse(folder, capfd):
    """Run a command that must fail: returns its one line; nothing on stdout, no file written or left behind."""

    def invoke(*arguments, code=2):
        before = files(folder)
        found = main(arguments)
        captured = capfd.readouterr()
        assert captured.out == ""
        assert found == code, captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("ssah-fast: error: ")
        assert files(folder) == before
        return captured.err.removeprefix("ssah-fast: error: ").rstrip("\n")

    return invoke


@pytest.fixture
def misuse(folder, capfd):
    """Run a command with a wrong option: returns the one line, without the hint at its end."""

    def invoke(*arguments):
        before = files(folder)
        assert main(arguments) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("ssah-fast: error: ")
        assert files(folder) == before
        return line.removeprefix("ssah-fast: error: ").removesuffix(" (see ssah-fast score --help)")

    return invoke


def changed(*options, base=SCORE):
    """SCORE with some options replaced or added; a value of None takes the option out."""
    words = list(base)
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name in words:
            at = words.index(name)
            words[at : at + 2] = [] if value is None else [name, value]
        else:
            words += [name, value]
    return words


def on(model, *options):
    return ["score", model, *changed(*options)[2:]]


def edit_weights(name, **changes):
    path = Path(name) / "model.safetensors"
    stored = {**load_file(path), **changes}
    save_file({key: value for key, value in stored.items() if value is not ...}, path, {"format": "pt"})


# success


def test_score_identify_and_inspect(folder, capsys):
    assert main(SCORE) == 0
    captured = capsys.readouterr()
    # K V groups of 2 x 8 channels and 52 neurons in each of two layers; 6 responses of 3 tokens and 5 of 4
    assert captured.out == "136 units in 4 modules scored on 18 safety tokens, 20 utility tokens\n"
    *_, timing, wrote = captured.err.splitlines()
    assert timing.startswith("scored in ")
    assert wrote == "wrote out.safetensors"
    scores = Scores.load("out.safetensors")
    assert scores.provenance["model_id"] == "model"
    assert scores.provenance["data"]["safety"]["sources"] == ["s.jsonl"]
    assert main(["identify", "out.safetensors", "-o", "units.safetensors", "--scu", "10%", "--ucu", "10%"]) == 0
    units = Units.load("units.safetensors")
    assert units.count("scu") == 14
    for name in ("out.safetensors", "units.safetensors"):
        capsys.readouterr()
        assert main(["inspect", name]) == 0
        assert "model.layers.1.mlp" in capsys.readouterr().out
        assert main(["inspect", name, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["modules"]) == 4


def test_the_command_line_scores_as_the_library(folder):
    assert main(changed("--seed", "3", "--nsamples", "4", "--tokens", "all", "--estimator", "norm")) == 0
    found = Scores.load("out.safetensors")
    model, tokenizer = loading.load_model("model", device="cpu")
    options = {"seed": 3, "nsamples": 4, "tokens": "all", "estimator": "norm"}
    expected = ssah_fast.score(model, tokenizer, safety="s.jsonl", utility="u.csv", **options)
    assert found.provenance == expected.provenance
    for name, module in expected.modules.items():
        assert torch.equal(found.modules[name].importance, module.importance)


def test_every_option_arrives(folder, capsys):
    (folder / "odd.json").write_text(json.dumps([{"q": "w1 w2", "a": "w3 w4"}, {"q": "w5", "a": "w6"}]))
    odd = ("--safety-data", "odd.json", "--utility-data", "odd.json", "--prompt-column", "q", "--response-column", "a")
    options = (
        "--seqlen",
        "7",
        "--nsamples",
        "none",
        "--batch-size",
        "2",
        "--attention-unit",
        "head",
        "--dtype",
        "fp64",
    )
    assert main([*changed(*odd, *options), "--no-chat-template", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "output": "out.safetensors",
        "modules": 4,
        "units": 108,
        "tokens": {"safety": 3, "utility": 3},
        "unobserved_modules": 0,
    }
    provenance = Scores.load("out.safetensors").provenance
    assert provenance["model"]["dtype"] == "float64"
    assert provenance["settings"] == {
        "tokens": "response",
        "estimator": "variance",
        "attention_unit": "head",
        "nsamples": None,
        "seqlen": 7,
        "seed": 0,
        "batch_size": 2,
        "chat_template": False,
        "prompt_column": "q",
        "response_column": "a",
        "text_column": None,
        "messages_column": None,
    }


def test_plain_texts_need_no_chat_template(folder):
    assert main(changed("--safety-data", "prompts.txt", "--utility-data", "prompts.txt,prompts.txt")) == 0
    assert next(iter(Scores.load("out.safetensors").count.values())).tolist() == [3, 6]


def test_a_config_file_repeats_a_run(folder, capsys):
    arguments = changed("--nsamples", "none", "--batch-size", "3")
    assert main([*arguments, "--dump-config"]) == 0
    (folder / "run.yaml").write_text(capsys.readouterr().out)
    assert main(arguments) == 0
    first = Path("out.safetensors").read_bytes()
    assert main(["score", "--config", "run.yaml", "-o", "again.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() == first


def test_the_script_works_from_another_folder(folder, tmp_path, capsys):
    """As a user runs it: two lines on stderr, one on stdout, and the same bytes as in this process."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = [str(folder / word) if (folder / word).exists() else word for word in SCORE]
    done = subprocess.run([SCRIPT, *words], cwd=elsewhere, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["scored", "wrote"]
    assert [path.name for path in elsewhere.iterdir()] == ["out.safetensors"]
    assert main(words) == 0
    assert capsys.readouterr().out == done.stdout
    assert Path("out.safetensors").read_bytes() == (elsewhere / "out.safetensors").read_bytes()


# merge


def halves(folder, *options):
    lines = (folder / "s.jsonl").read_text().splitlines(keepends=True)
    (folder / "s1.jsonl").write_text("".join(lines[:2]))
    (folder / "s2.jsonl").write_text("".join(lines[2:]))
    common = ("--batch-size", "1", "--nsamples", "none", "--dtype", "fp64", *options)
    for safety, output in (("s1.jsonl", "a"), ("s2.jsonl", "b"), ("s.jsonl", "whole")):
        assert main(changed("--safety-data", safety, "-o", output, *common)) == 0


def test_merge_adds_up_exactly(folder, capsys):
    halves(folder)
    shutil.copy("whole", "twice")
    assert main(["score", "--merge", "a", "b", "-o", "merged"]) == 0
    assert capsys.readouterr().out.endswith("136 units in 4 modules scored on 18 safety tokens, 40 utility tokens\n")
    merged, whole = Scores.load("merged"), Scores.load("whole")
    for name, importance in whole.safety.items():
        torch.testing.assert_close(merged.safety[name], importance, rtol=1e-12, atol=0)
    assert len(merged.provenance["parts"]) == 2
    assert main(["inspect", "merged"]) == 0
    assert main(["identify", "merged", "-o", "units"]) == 0
    assert main(["score", "--merge", "merged", "whole", "-o", "more", "--json"]) == 0
    assert len(Scores.load("more").provenance["parts"]) == 3


def test_what_cannot_be_merged(folder, refuse, misuse, capfd):
    halves(folder)
    assert main(on("gpt2", "-o", "other")) == 0
    assert main(changed("--estimator", "norm", "--dtype", "fp64", "-o", "norm")) == 0
    assert main(changed("--estimator", "flap", "--dtype", "fp64", "-o", "flap")) == 0
    assert main(changed("--attention-unit", "head", "--dtype", "fp64", "-o", "head")) == 0
    edit_weights("model", **{"model.layers.0.mlp.down_proj.weight": torch.ones(48, 52)})
    assert main(changed("--dtype", "fp64", "-o", "tuned")) == 0
    capfd.readouterr()

    def merge(*parts, output="merged"):
        return refuse("score", "--merge", *parts, "-o", output)

    assert merge("a") == "--merge takes at least two score files, got 1"
    assert merge("a", "nothing") == "cannot read nothing: it does not exist"
    assert "truncated or not a safetensors file" in merge("a", "s.jsonl")
    assert "a safetensors file, but not one written by ssah_fast" in merge("a", "model/model.safetensors")
    assert "cannot merge scores of different models: model.architecture is 'Llama" in merge("a", "b", "other")
    assert merge("a", "norm") == "cannot merge estimator 'variance' of part 1 with 'norm' of part 2"
    assert "scores with estimator 'flap' cannot be merged" in merge("flap", "flap")
    assert "another attention unit?" in merge("a", "head")
    assert "the weights of model.layers.0.mlp.down_proj differ in part 1 and part 2" in merge("a", "tuned")
    assert merge("a", "b", output="no/merged").endswith("create it first")
    assert (
        merge("a", "b", output="./b") == "--output ./b would overwrite one of the files to merge; choose another name"
    )
    message = "--merge takes score files alone; leave --safety-data and --utility-data out"
    assert misuse("score", "--merge", "a", "b", *DATA, "-o", "merged") == message
    assert misuse("score", "a", "b", *DATA, "-o", "merged").endswith("to merge score files add --merge")


# MODEL


def test_the_model_is_refused_in_one_line(folder, refuse, tmp_path):
    remedy = "MODEL must be a folder in Hugging Face format or a hub id"
    assert refuse(*on("nothing")) == f"nothing does not exist; {remedy} (owner/name)"
    assert refuse(*on("s.jsonl")) == f"s.jsonl is a file; {remedy}"
    assert refuse(*on(".")) == f". has no config.json; {remedy}"
    edit_weights("gpt2", **{"transformer.h.1.attn.c_proj.bias": ...})
    assert refuse(*on("gpt2")).startswith("gpt2 is incomplete: the weight transformer.h.1.attn.c_proj.bias is missing")
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert refuse(*SCORE).startswith("model/model.safetensors is truncated or not a safetensors file")
    weights.unlink()
    assert refuse(*SCORE).startswith("MODEL model has neither model.safetensors nor model.safetensors.index.json; ")
    weights.write_bytes((folder / "gpt2" / "model.safetensors").read_bytes())
    (folder / "model" / "config.json").write_text('{"model_type": "bloom"}')
    assert refuse(*SCORE).startswith("model: architecture 'bloom' is not supported (supported: arcee, ")


def test_a_mistake_in_a_process(folder):
    """The same as in-process, warnings of the libraries included."""
    (folder / "model" / "tokenizer.json").unlink()
    done = subprocess.run([SCRIPT, *SCORE], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ssah-fast: error: model has no tokenizer; ")
    assert done.stderr.count("\n") == 1


# faults of a checkpoint: the same line whether it is streamed or not, and nothing is written

LAYER = "model.layers.1.mlp.up_proj.weight"
SHARD = "sharded/model-00002-of-00004.safetensors"


def cut(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def flip(path, at):
    content = bytearray(Path(path).read_bytes())
    content[at] ^= 0xFF
    Path(path).write_bytes(content)


def edit_json(path, change):
    document = json.loads(Path(path).read_text())
    change(document)
    Path(path).write_text(json.dumps(document))


def plant_nan(name, index):
    values = load_file("model/model.safetensors")[name]
    values[tuple(index)] = float("nan")
    edit_weights("model", **{name: values})


FAULTS = {
    "truncated shard": (lambda: cut(SHARD, -1), "sharded", f"{SHARD} is truncated or not a safetensors file ("),
    "empty shard": (lambda: cut(SHARD, 0), "sharded", f"{SHARD} is truncated or not a safetensors file ("),
    "flipped length": (lambda: flip(SHARD, 0), "sharded", f"{SHARD} is truncated or not a safetensors file ("),
    "flipped header": (lambda: flip(SHARD, 20), "sharded", f"{SHARD} is truncated or not a safetensors file ("),
    "missing shard": (
        lambda: os.unlink(SHARD),
        "sharded",
        "sharded/model.safetensors.index.json names model-00002-of-00004.safetensors, which is missing (1 of 4 shards)",
    ),
    "index": (
        lambda: edit_json(
            "sharded/model.safetensors.index.json", lambda index: index["weight_map"].update(odd=Path(SHARD).name)
        ),
        "sharded",
        "sharded is incomplete: its index names odd, which no shard holds",
    ),
    "missing weight": (
        lambda: edit_weights("model", **{LAYER: ...}),
        "model",
        f"model is incomplete: the weight {LAYER} is missing; download or save it again",
    ),
    "integers": (
        lambda: edit_weights("model", **{LAYER: torch.zeros(52, 48, dtype=torch.int32)}),
        "model",
        f"model: the weight {LAYER} is stored as I32, but the model has torch.float32; the checkpoint is damaged, or ",
    ),
    "floats of 8 bits": (
        lambda: edit_weights("model", **{LAYER: torch.zeros(52, 48).to(torch.float8_e4m3fn)}),
        "model",
        f"model: the weight {LAYER} is stored as F8_E4M3, but the model has torch.float32; the checkpoint is damaged, ",
    ),
    "shape": (
        lambda: edit_weights("model", **{LAYER: torch.zeros(50, 48)}),
        "model",
        f"model: the weight {LAYER} is [50, 48], but config.json implies [52, 48]; the two are not of one model",
    ),
    "heads": (
        lambda: edit_json("model/config.json", lambda config: config.update(num_key_value_heads=3)),
        "model",
        "model: the weight model.layers.0.self_attn.k_proj.weight is [16, 48], but config.json implies [24, 48]; ",
    ),
    "more layers": (
        lambda: edit_json("model/config.json", lambda config: config.update(num_hidden_layers=3)),
        "model",
        "model is incomplete: the weight model.layers.2.input_layernorm.weight is missing, and 8 more; ",
    ),
    "fewer layers": (
        lambda: edit_json("model/config.json", lambda config: config.update(num_hidden_layers=1)),
        "model",
        "model holds the weight model.layers.1.input_layernorm.weight, and 8 more, for which its config.json has no ",
    ),
    "bias": (
        lambda: edit_weights("model", **{LAYER.replace("weight", "bias"): torch.zeros(52)}),
        "model",
        "model holds the weight model.layers.1.mlp.up_proj.bias, for which its config.json has no place; ",
    ),
    "quantised": (
        lambda: edit_json("model/config.json", lambda config: config.update(quantization_config=GPTQ)),
        "model",
        "model is quantised with gptq; only fp8 and mxfp4 checkpoints are dequantised while they are loaded, ",
    ),
    "NaN": (
        lambda: plant_nan(LAYER, [7, 3]),
        "model",
        f"the weight {LAYER} has a NaN or Inf at [7, 3]; the checkpoint is damaged",
    ),
    "NaN in the embedding": (
        lambda: plant_nan("model.embed_tokens.weight", [3, 5]),
        "model",
        "NaN or Inf in the activations of model.layers.0.self_attn.o_proj, input channel 0, on the safety set; the "
        "weight model.embed_tokens.weight has a NaN or Inf at [3, 5]",
    ),
}
GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint(fault, folder, capfd):
    damage, name, message = FAULTS[fault]
    damage()
    before = files(folder)
    for stream in ("always", "never"):
        assert main(on(name, "--stream", stream)) == 2
        captured = capfd.readouterr()
        *notes, line = captured.err.splitlines()
        assert line.startswith(f"ssah-fast: error: {message}")
        assert captured.out == ""
        assert len(notes) == ("NaN" in fault and stream == "always")  # the way it is done, told before the first layer
        assert files(folder) == before


# the hub: a local cache, laid out as huggingface_hub does it, and no network

COMMITS = {"v1": "1" * 40, "main": "2" * 40}


def publish(cache, repository, name, commit, *references):
    """Put a folder into the cache: blobs, and a snapshot of links to them."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for part in (place / "blobs", place / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for path in Path(name).iterdir():
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    for reference in references:
        (place / "refs" / reference).write_text(commit)
    return snapshot


@pytest.fixture
def hub(folder, monkeypatch):
    """A cache with owner/llama, single in v1 and sharded in main, and owner/pickled."""
    cache = folder / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pickle_weights(Path(shutil.copytree("model", "pickled")))
    publish(cache, "owner/pickled", "pickled", "3" * 40, "main")
    tiny_model("llama", seed=1).save_pretrained("model")
    publish(cache, "owner/llama", "model", COMMITS["v1"], "v1")
    publish(cache, "owner/llama", "sharded", COMMITS["main"], "main")
    return cache


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("stream", ["always", "never"])
def test_a_hub_id_and_its_revisions(hub, stream):
    runs = {"main": [], "v1": ["--revision", "v1"], "commit": ["--revision", COMMITS["v1"]]}
    for output, revision in runs.items():
        assert main([*on("owner/llama", "-o", output, "--stream", stream), *revision]) == 0
    for output, name in (("main.local", "sharded"), ("v1.local", "model")):
        assert main(on(name, "-o", output, "--stream", stream)) == 0
    assert Path("v1").read_bytes() == Path("commit").read_bytes()
    for revision in COMMITS:
        scores, local = Scores.load(revision), Scores.load(f"{revision}.local")
        assert scores.provenance["model_id"] == "owner/llama"
        assert scores.provenance["model"] == {**local.provenance["model"], "commit": COMMITS[revision]}
        for module, importance in local.safety.items():
            assert torch.equal(scores.safety[module], importance)
    assert any(not torch.equal(scores.safety[name], Scores.load("v1").safety[name]) for name in scores.safety)


@pytest.mark.parametrize("stream", ["always", "never"])
def test_what_is_not_in_the_cache_while_the_hub_is_not_reached(hub, refuse, stream):
    offline = (
        "it is neither a folder here nor in the local hub cache, and the hub was not reached (HF_HUB_OFFLINE is set)"
    )
    for name, *revision in (("owner/other",), ("owner/llama", "--revision", "v3")):
        assert refuse(*on(name, *revision, "--stream", stream)) == f"cannot load {name}: {offline}"
    snapshot = hub / "models--owner--llama" / "snapshots" / COMMITS["main"]
    (snapshot / Path(SHARD).name).unlink()
    message = f"{snapshot}/model.safetensors.index.json names {Path(SHARD).name}, which is missing (1 of 4 shards); "
    assert refuse(*on("owner/llama", "--stream", stream)).startswith(message)


def test_a_gated_model(hub, refuse, monkeypatch):
    """Its config may be read by anybody, its weights not."""

    def gated(*_, **__):
        raise OSError("403 Client Error.\nCannot access gated repo for url https://huggingface.co/owner/llama")

    monkeypatch.setattr(checkpoints, "snapshot_download", gated)
    message = (
        "cannot load owner/llama: the repository is gated or private; accept its terms on the hub and set HF_TOKEN"
    )
    assert refuse(*on("owner/llama")) == message


# pickled weights


def test_pickled_weights_are_read_where_they_are_allowed(hub, refuse):
    convert = "pickled weights (pytorch_model.bin)"
    assert refuse(*on("pickled")) == (
        f"pickled has {convert} and no others; convert them with save_pretrained, or add --allow-pickle to read them"
    )
    assert refuse(*on("owner/pickled")).startswith(f"MODEL owner/pickled has {convert}, which are not read; ")
    for name in ("pickled", "owner/pickled"):
        assert refuse(*on(name, "--stream", "always"), "--allow-pickle") == (
            f"--stream always: {name} has pickled weights, which cannot be read one layer at a time; leave it out, or "
            "convert them with save_pretrained"
        )
    shutil.copytree("sharded", "whole")  # the same weights
    for name in ("pickled", "owner/pickled", "whole"):
        assert main([*on(name, "-o", f"{Path(name).parent.name}{Path(name).name}.out"), "--allow-pickle"]) == 0
    plain = Scores.load("whole.out")
    for name, commit in (("pickled", None), ("ownerpickled", "3" * 40)):
        scores = Scores.load(f"{name}.out")
        assert scores.provenance["model"] == {**plain.provenance["model"], "commit": commit}
        for module, importance in plain.safety.items():
            assert torch.equal(scores.safety[module], importance)


def test_pickled_weights_in_parts(folder):
    """And what other programs keep in .bin files beside safetensors is nobody's weights."""
    assert main(on("model", "-o", "plain")) == 0
    weights, index = load_file("model/model.safetensors"), {}
    (folder / "model" / "model.safetensors").unlink()
    for i in range(2):
        part = dict(list(weights.items())[i::2])
        torch.save(part, f"model/pytorch_model-{i}.bin")
        index |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    Path("model/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    Path("sharded/training_args.bin").write_bytes(b"")
    for name in ("model", "sharded"):
        assert main([*on(name, "-o", name + ".out"), "--allow-pickle"]) == 0
        assert Scores.load(name + ".out").safety.keys() == Scores.load("plain").safety.keys()


class Command:
    """Unpickled, it would run."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickled_weights_run_no_code(folder, refuse):
    pickle_weights(folder / "model")
    torch.save({"model.norm.weight": Command()}, "model/pytorch_model.bin")
    message = "cannot load model: its pickled weights are damaged, or hold more than tensors"
    assert refuse(*SCORE, "--allow-pickle") == message
    assert not Path("ran").exists()


# devices


def test_a_device_map(folder, refuse, capfd):
    """On this machine accelerate puts all of it on the CPU, or on its GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert main(changed("-o", "plain", "--device", device)) == 0
    assert main(changed("-o", "spread", "--device-map", "auto")) == 0
    spread, plain = Scores.load("spread"), Scores.load("plain")
    for module, importance in plain.safety.items():
        assert torch.equal(spread.safety[module], importance)
    capfd.readouterr()
    assert refuse(*changed("--device-map", "auto", "--stream", "always")) == (
        "--stream always has one layer in memory at a time, --device-map auto has all of them; leave one of the two out"
    )
    assert "'auto', 'balanced'" in refuse(*changed("--device-map", "everywhere"))


# going on


@pytest.mark.parametrize(("stream", "where"), [("always", "layer 1, batch 0"), ("never", "batch 3")])
def test_a_run_that_was_cut_short_says_where_it_goes_on(stream, where, folder, capfd, monkeypatch):
    command = changed("--stream", stream, "--batch-size", "2" if stream == "never" else "4", "--save-every", "0")
    forward, calls = Collector.forward, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        forward(self, *arguments)

    monkeypatch.setattr(Collector, "forward", interrupted)
    assert main(command) == 130
    assert main([*command, "--seqlen", "100"]) == 4
    message = capfd.readouterr().err.splitlines()[-1].removeprefix("ssah-fast: error: ")
    assert message == (
        "cannot continue from out.safetensors.progress: settings.seqlen is 512 in the saved run and 100 now; "
        "repeat the command as it was, or add --fresh to start over"
    )
    assert main(command) == 0
    assert f"continues the saved run at {where}" in capfd.readouterr().err.splitlines()
    assert not Path("out.safetensors.progress").exists()


# tokenizer


def test_no_chat_template_names_the_flag(folder, refuse):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    shutil.rmtree(folder / "model")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    assert refuse(*SCORE) == "--safety-data: the tokenizer has no chat template; use --no-chat-template"
    assert main([*SCORE, "--no-chat-template"]) == 0


def test_a_tokenizer_of_another_model(folder, refuse):
    shutil.rmtree(folder / "model")
    tiny_model("llama", vocab_size=8).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    assert refuse(*SCORE) == (
        "--safety-data: the tokenizer gives token id 18, but the model has 8 embeddings; "
        "use the tokenizer that belongs to the model"
    )


# data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--safety-data", "no.jsonl"), "--safety-data: file not found: no.jsonl"),
        (("--utility-data", "s.jsonl,no.csv"), "--utility-data: file not found: no.csv"),
        (("--utility-data", "model/config.json"), "--utility-data: cannot read model/config.json: it must hold a list"),
        (("--safety-data", ""), "--safety-data is empty; give a file or a hub id"),
        (("--safety-data", "empty.jsonl"), "--safety-data: empty.jsonl holds no text"),
        (
            ("--prompt-column", "question"),
            "--safety-data: s.jsonl has no column 'question' (--prompt-column); it has prompt, response",
        ),
        (
            ("--utility-data", "prompts.jsonl"),
            "--utility-data: no pair in it has a response to count; name its column with --response-column, "
            "or use --tokens prompt",
        ),
        (
            ("--safety-data", "prompts.txt", "--tokens", "prompt"),
            "--safety-data: no pair in it has a prompt to count; name its column with --prompt-column, "
            "or use --tokens response",
        ),
        (("--seqlen", "5"), "--safety-data: --seqlen 5 cuts off every response; raise it"),
        (
            ("--text-column", "prompt", "--messages-column", "response"),
            "--safety-data: --text-column and --messages-column exclude each other",
        ),
    ],
)
def test_the_data_is_refused_in_one_line(options, message, refuse):
    assert refuse(*changed(*options)).startswith(message)


@pytest.mark.parametrize("model", ["model", "gpt2"])
def test_more_tokens_than_positions(model, refuse):
    assert refuse(*on(model, "--utility-data", "long.jsonl")) == (
        "--utility-data: a sequence has 204 tokens, but the model has 128 positions; use --seqlen 128"
    )
    assert main(on(model, "--utility-data", "long.jsonl", "--seqlen", "128")) == 0


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "0"), "Invalid value for '--batch-size': '0' is neither auto nor a number from 1 to 127"),
        (
            ("--batch-size", "1000"),
            "Invalid value for '--batch-size': '1000' is neither auto nor a number from 1 to 127",
        ),
        (("--batch-size", "abc"), "Invalid value for '--batch-size': 'abc' is neither auto nor a number from 1 to 127"),
        (("--batch-size", "2.5"), "Invalid value for '--batch-size': '2.5' is neither auto nor a number from 1 to 127"),
        (("--nsamples", "0"), "Invalid value for '--nsamples': 0 is not in the range x>=1."),
        (("--seqlen", "1"), "Invalid value for '--seqlen': 1 is not in the range x>=2."),
        (("--tokens", "last"), "Invalid value for '--tokens': 'last' is not one of"),
        (("--estimator", "mean"), "Invalid value for '--estimator': 'mean' is not one of"),
        (("--dtype", "int8"), "Invalid value for '--dtype': 'int8' is not one of"),
        (("--safety-data", None), "Missing option '--safety-data'."),
        (("--utility-data", None), "Missing option '--utility-data'."),
        (("-o", None), "Missing option '-o'."),
        (("--stream", "maybe"), "Invalid value for '--stream': 'maybe' is not one of"),
        (("--save-every", "-1"), "Invalid value for '--save-every': -1.0 is not in the range x>=0."),
    ],
)
def test_wrong_options(options, message, misuse):
    assert misuse(*changed(*options)).startswith(message)


def test_an_option_that_only_a_model_can_refuse(folder, refuse):
    shutil.rmtree(folder / "model")
    tiny_model("olmo2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    assert "'head' is not possible for 'olmo2'" in refuse(*changed("--attention-unit", "head"))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("abc", "--device 'abc' is not a device; use auto, cpu, cuda or cuda:N"),
        ("cuda:99", "--device cuda:99: there are "),
        ("meta", "--device meta: scoring runs on CPUs and CUDA devices; "),
    ],
)
def test_a_device_that_is_not_there(device, message, refuse):
    assert refuse(*changed("--device", device)).startswith(message)


@pytest.mark.parametrize("backend", ["cuda", "fast"])
def test_a_backend_that_is_not_there(backend, refuse, monkeypatch):
    monkeypatch.setenv("SSAH_FAST_BACKEND", backend)
    assert refuse(*SCORE).startswith(f"SSAH_FAST_BACKEND={backend} ")


# the output


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(folder, refuse, monkeypatch):
    monkeypatch.setattr(loading, "load_weights", lambda *_, **__: pytest.fail("loaded the model"))
    missing = f"cannot write no/out: the folder {folder}/no does not exist; create it first"
    assert refuse(*changed("-o", "no/out")) == missing
    assert refuse(*changed("-o", "model")).startswith("cannot write model: it exists and is not a regular file")


@pytest.mark.parametrize("stream", ["always", "never"])
def test_a_full_disk(stream, folder, capfd, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = files(folder)
    state = "out.safetensors.progress/rank-0-of-1/state"
    for every, path in (("60", "out.safetensors"), ("0", state)):
        assert main(changed("--stream", stream, "--save-every", every)) == 1
        line = capfd.readouterr().err.splitlines()[-1]
        assert line == f"ssah-fast: error: cannot write {path}: no space left on the disk"
        assert files(folder) == before


def test_an_old_file_survives_a_failure(folder, monkeypatch):
    Path("out.safetensors").write_text("old")
    edit_weights(
        "model", **{"model.norm.weight": torch.ones(48), "model.embed_tokens.weight": torch.full((96, 48), 1e38)}
    )
    assert main(changed("--dtype", "fp16")) == 2
    assert Path("out.safetensors").read_text() == "old"
    assert main(on("gpt2")) == 0
    assert Scores.load("out.safetensors")


# NaN and memory


@pytest.mark.parametrize(
    ("weight", "index"),
    [
        ("model.layers.0.mlp.gate_proj.weight", [7, 3]),
        ("model.layers.1.self_attn.q_proj.weight", [9, 3]),
        ("model.layers.1.mlp.down_proj.weight", [7, 3]),
        ("model.embed_tokens.weight", [3, 5]),
    ],
)
def test_a_nan_in_a_weight(weight, index, refuse):
    values = load_file("model/model.safetensors")[weight]
    values[tuple(index)] = float("nan")
    edit_weights("model", **{weight: values})
    message = refuse(*SCORE)
    assert f"the weight {weight} has a NaN or Inf at {index}" in message
    if "embed" in weight:
        assert message.startswith(
            "NaN or Inf in the activations of model.layers.0.self_attn.o_proj, input channel 0, on"
        )


def test_an_overflow_in_half_precision(refuse):
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    weights = load_file("model/model.safetensors")
    for name in (up, gate):
        weights[name][3] = 3e4
    edit_weights("model", **{up: weights[up], gate: weights[gate]})
    message = refuse(*changed("--dtype", "fp16"))
    assert message.startswith("NaN or Inf in the activations of model.layers.0.mlp.down_proj, input channel 3, on the ")
    assert message.endswith("all weights are finite, so it arises in the arithmetic: try --dtype fp32")
    assert main(changed("--dtype", "fp32")) == 0


def test_out_of_memory(refuse, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Collector, "run", full)
    message = "a batch of 4 sequences does not fit on cpu; use a smaller --batch-size or --seqlen"
    assert refuse(*changed("--batch-size", "4"), code=5) == message
    assert refuse(*SCORE, code=5) == "one sequence does not fit on cpu; use a smaller --seqlen"
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", full)
    assert refuse(*SCORE, code=5).startswith("out of memory: use a smaller --batch-size")
