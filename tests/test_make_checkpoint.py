"""bench/make_checkpoint.py: what it writes is a checkpoint like any other."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssah_fast.bench import make_checkpoint
from ssah_fast.errors import SsahError


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_it_loads_and_is_named_as_save_pretrained_names_it(model_type: str, tmp_path: Path) -> None:
    config = tiny_models.tiny_config(model_type)
    total = make_checkpoint.write(config, tmp_path / "made", shard_size=40_000)
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert all(path.stat().st_size < 60_000 for path in (tmp_path / "made").glob("*.safetensors"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    names = stored_names(tmp_path / "saved")
    assert names == stored_names(tmp_path / "made") == set(index["weight_map"])
    if model_type == "mixtral":
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    weights = dict(model.named_parameters())
    assert all((weights[name] == 1).all() for name in weights if name.endswith("norm.weight"))
    wide = next(weight for name, weight in weights.items() if "down_proj" in name or "c_proj.weight" in name)
    assert wide.float().std().item() == pytest.approx(wide.shape[-1] ** -0.5, rel=0.1)


def test_noise_goes_round_and_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make_checkpoint, "BLOCK", 101)
    config = tiny_models.tiny_config("llama")
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        make_checkpoint.write(config, tmp_path / name, dtype=torch.float32, seed=seed)
    a, again, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "again", "b"))
    weight = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(a[weight], again[weight]) and not torch.equal(a[weight], b[weight])
    flat = a[weight].flatten()
    assert torch.equal(flat[:101], flat[101:202]) and not torch.equal(a[weight][0], a[weight][1])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.tiny_config("llama").save_pretrained(tmp_path)
    arguments = [str(tmp_path / "config.json"), str(tmp_path / "made")]
    make_checkpoint.main([*arguments, "--layers", "1", "--dtype", "fp32", "--shard-size", "1GB", "--seed", "3"])
    assert {path.name for path in (tmp_path / "made").glob("model*")} == {"model.safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.config.num_hidden_layers == 1 and model.dtype == torch.float32
    assert " MB/s" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], return_dict=False)
    assert chat == tokenizer("<turn> w1 w2").input_ids and len(set(chat)) == 4
    with pytest.raises(SystemExit) as stopped:
        make_checkpoint.main(arguments)
    assert stopped.value.code == 2 and "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no-such-model", "mixtral:many", __file__])
def test_what_is_no_config_is_refused(name: str) -> None:
    with pytest.raises(SsahError, match="neither llama-2-7b"):
        make_checkpoint.read_config(name)


def test_known_models_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_checkpoint.read_config("llama-2-13b").intermediate_size == 13824
    assert make_checkpoint.read_config("mixtral:3").num_hidden_layers == 3
    assert [make_checkpoint.size_of(text) for text in ("2GB", "0.5 MiB", "7")] == [2 * 10**9, 2**19, 7]
    usage = make_checkpoint.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(make_checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SsahError, match=r"13\.5 GB, but the disk has 1\.0 GB"):
        make_checkpoint.write(make_checkpoint.read_config("llama-2-7b"), tmp_path)
    assert not list(tmp_path.iterdir())
