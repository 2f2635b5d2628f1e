"""Loading a model: every way in which a checkpoint can be unfit is one clear line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ssah_fast.errors import SsahError
from ssah_fast.layer_loader import LayerLoader
from ssah_fast.loading import empty_model, load_model, torch_device
from ssah_fast.units import supported_architectures

LIST = ", ".join(supported_architectures())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint, tmp_path):
    """A copy that the test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) == 4
    return folder


def refused(name, **options):
    with pytest.raises(SsahError) as caught:
        load_model(str(name), **{"device": "cpu", **options})
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder, **changes):
    path = folder / "config.json"
    stored = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in stored.items() if value is not ...}))


def edit_weights(folder, **changes):
    path = folder / "model.safetensors"
    stored = {**load_file(path), **changes}
    save_file({key: value for key, value in stored.items() if value is not ...}, path, {"format": "pt"})


# what loads


def test_a_folder_loads_whole(checkpoint, sharded, capfd):
    expected = tiny_model("llama").state_dict()
    for folder in (checkpoint, sharded):
        model, tokenizer = load_model(str(folder), device="cpu")
        assert not any(module.training for module in model.modules())
        assert tokenizer.chat_template == tiny_tokenizer().chat_template
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("fp32", torch.float32),
        ("fp64", torch.float64),
    ],
)
def test_dtypes(dtype, expected, tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_embeddings_are_not_missing_weights(tmp_path):
    tiny_model("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), device="cpu")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_empty_model_has_names_and_shapes_alone(model):
    (model / "model.safetensors").unlink()
    empty, full = empty_model(str(model)), tiny_model("llama")
    shapes = [[(name, p.shape, p.dtype) for name, p in m.named_parameters()] for m in (empty, full)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {p.dtype for p in empty_model(str(model), dtype="bf16").parameters()} == {torch.bfloat16}
    assert next(torch.nn.Linear(1, 1).parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "MODEL is empty"),
        ("./none", "./none does not exist; MODEL must be a folder in Hugging Face format or a hub id"),
        (".", ". has no config.json; MODEL must be a folder in Hugging Face format or a hub id"),
    ],
)
def test_an_empty_model_of_nothing_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SsahError) as caught:
        empty_model(name)
    assert message in str(caught.value)


def test_an_empty_model_is_of_a_supported_architecture(model):
    edit_config(model, model_type="bloom")
    with pytest.raises(SsahError, match="'bloom' is not supported"):
        empty_model(str(model))
    with pytest.raises(SsahError, match="--dtype int8 is unknown"):
        empty_model(str(model), dtype="int8")


@pytest.mark.parametrize("damaged", [False, True])
def test_the_logging_of_transformers_is_left_as_it_was(model, damaged):
    if damaged:
        (model / "config.json").write_text("{")
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.enable_progress_bar()  # another test may have run a command that turns them off
        for verbosity in (transformers_logging.INFO, transformers_logging.WARNING):
            transformers_logging.set_verbosity(verbosity)
            if damaged:
                refused(model)
            else:
                load_model(str(model), device="cpu")
            assert transformers_logging.get_verbosity() == verbosity
            assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(before)
        if not bars:
            transformers_logging.disable_progress_bar()


# MODEL


def test_a_model_that_is_not_there(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    remedy = "MODEL must be a folder in Hugging Face format or a hub id"
    assert refused("nothing") == f"nothing does not exist; {remedy} (owner/name)"
    assert refused("./no/thing") == f"./no/thing does not exist; {remedy} (owner/name)"
    assert refused(tmp_path / "nothing") == f"{tmp_path}/nothing does not exist; {remedy} (owner/name)"
    assert refused("file") == f"file is a file; {remedy}"
    assert refused(checkpoint / "model.safetensors") == f"{checkpoint}/model.safetensors is a file; {remedy}"
    assert refused("empty") == f"empty has no config.json; {remedy}"
    assert refused("") == "MODEL is empty; give a folder in Hugging Face format or a hub id"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("We couldn't connect to 'https://huggingface.co' to load the files"),
            "it is neither a folder here nor in the local hub cache, and the hub was not reached",
        ),
        (
            OSError("You are trying to access a gated repo.\nMake sure to have access to it"),
            "the repository is gated or private; accept its terms on the hub and set HF_TOKEN",
        ),
        (OSError("a b\n c"), "a b c"),
        (ImportError("needs `x`: run `pip install x`"), "needs `x`: run `pip install x`"),
    ],
)
def test_what_the_hub_says_becomes_one_line(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", lambda *_, **__: ({"model_type": "llama"}, {}))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert refused("owner/name") == f"cannot load owner/name: {message}"


# config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type"', "is not a valid JSON file"),
        ("[]", "its config.json has no model_type"),
        ("{}", "its config.json has no model_type"),
    ],
)
def test_a_config_that_is_none(model, text, message):
    (model / "config.json").write_text(text)
    assert message in refused(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5, "head_dim": ...}, "not a multiple of the number of attention heads"),
    ],
)
def test_a_config_that_makes_no_model(model, change, message):
    edit_config(model, **change)
    found = refused(model)
    assert found.startswith(f"cannot load {model}: ")
    assert message in found


@pytest.mark.parametrize("name", ["mystery", "bert", "custom"])
def test_an_unknown_architecture_lists_those_that_are_known(model, name):
    remote = {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}} if name == "custom" else {}
    edit_config(model, model_type=name, **remote)
    assert refused(model) == (
        f"model: architecture {name!r} is not supported (supported: {LIST}); "
        "to add one, add an entry to FAMILIES in ssah_fast/units.py"
    )


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_real_models_of_other_architectures(name, tmp_path):
    config = AutoConfig.for_model(name, vocab_size=96, hidden_size=32, n_layer=1, num_hidden_layers=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert f"architecture {name!r} is not supported (supported: {LIST})" in refused(tmp_path)


def test_remote_code_is_not_run_unless_allowed(model):
    """A checkpoint that names code of its own for a known architecture is loaded with transformers' class."""
    edit_config(model, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (model / "code.py").write_text("raise SystemExit('ran')")
    loaded, _ = load_model(str(model), device="cpu")
    assert type(loaded).__module__.startswith("transformers.")


# weights


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights(model, size):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    found = refused(model)
    assert found.startswith(f"{path} is truncated or not a safetensors file (")
    assert found.endswith("; download it again")


def test_a_git_lfs_pointer_instead_of_weights(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "model.safetensors is truncated or not a safetensors file" in refused(model)


def test_a_truncated_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(sharded).startswith(f"{shard} is truncated or not a safetensors file (")


def test_a_missing_shard_is_named(sharded):
    for number in (2, 4):
        (sharded / f"model-0000{number}-of-00004.safetensors").unlink()
    index = sharded / "model.safetensors.index.json"
    assert refused(sharded) == (
        f"{index} names model-00002-of-00004.safetensors, which is missing (2 of 4 shards); download it again"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_an_index_that_is_none(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    assert refused(sharded) == f"{index} is not a safetensors index; download the checkpoint again"


def test_an_index_that_forgets_a_shard(sharded):
    index = sharded / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    kept = {key: shard for key, shard in document["weight_map"].items() if "00003" not in shard}
    index.write_text(json.dumps({**document, "weight_map": kept}))
    assert f"{sharded} is incomplete: the weight model." in refused(sharded)


@pytest.mark.parametrize(
    ("names", "more"),
    [(["model.norm.weight"], ""), (["model.norm.weight", "model.layers.1.mlp.up_proj.weight"], ", and 1 more")],
)
def test_missing_weights(model, names, more):
    edit_weights(model, **dict.fromkeys(names, ...))
    assert refused(model) == (
        f"{model} is incomplete: the weight {min(names)} is missing{more}; download or save it again"
    )


def test_weights_of_another_shape(model):
    name = "model.layers.0.mlp.gate_proj.weight"
    edit_weights(model, **{name: torch.zeros(10, 48)})
    message = f"{model}: the weight {name} is [10, 48], but config.json implies [52, 48]; the two are not of one model"
    assert refused(model) == message


def test_shards_of_another_shape(sharded):
    edit_config(sharded, vocab_size=97)
    assert "is [96, 48], but config.json implies [97, 48]" in refused(sharded)


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (["model.layers.2.mlp.up_proj.weight"], ""),
        (["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight"], ", and 1 more"),
    ],
)
def test_weights_that_the_config_has_no_place_for(model, names, more):
    edit_weights(model, **{name: torch.zeros(48) for name in names})
    message = f"{model} holds the weight {names[0]}{more}, for which its config.json has no place; "
    assert refused(model) == message + "the two are not of one model"


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "value_head.weight"),
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
    ],
)
def test_what_old_checkpoints_hold_beside_weights_is_left_out(name, extra, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    edit_weights(tmp_path, **{extra: torch.ones(3)})
    loaded, _ = load_model(str(tmp_path), device="cpu")
    assert extra not in loaded.state_dict()
    with LayerLoader(str(tmp_path), device=torch.device("cpu")) as loader:
        assert loader.layers == 2


def test_pickled_weights_are_not_read(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert refused(model) == (
        f"{model} has no .safetensors weights; convert them with save_pretrained (pickled weights are not read)"
    )


def test_pickled_weights_that_are_asked_for(model):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    loaded, _ = load_model(str(model), device="cpu", pickled=True)
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    (model / "pytorch_model.bin").write_bytes(b"none")
    damaged = f"cannot load {model}: its pickled weights are damaged, or hold more than tensors"
    assert refused(model, pickled=True) == damaged


# tokenizer


def test_no_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    expected = f"{model} has no tokenizer; copy it from the base model with tokenizer.save_pretrained"
    assert refused(model) == expected
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert refused(model) == expected


def test_a_tokenizer_without_vocabulary(monkeypatch, model):
    """What transformers 5 makes of a tokenizer class whose files are missing."""
    from transformers import LlamaTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: LlamaTokenizer())
    assert refused(model) == f"{model}: its tokenizer has no vocabulary; copy the base model's tokenizer files there"


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_a_damaged_tokenizer(model, text):
    (model / "tokenizer.json").write_text(text)
    assert refused(model).startswith(f"cannot load the tokenizer of {model}: ")


# options


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("abc", "--device 'abc' is not a device; use auto, cpu, cuda or cuda:N"),
        ("", "--device '' is not a device; use auto, cpu, cuda or cuda:N"),
        ("meta", "--device meta: scoring runs on CPUs and CUDA devices; use auto, cpu, cuda or cuda:N"),
        ("mps", "--device mps: scoring runs on CPUs and CUDA devices; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_none(device, message):
    with pytest.raises(SsahError) as caught:
        torch_device(device)
    assert str(caught.value) == message


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device("cuda") == torch.device("cuda")
    assert torch_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(SsahError, match=r"^--device cuda:2: there are 2 CUDA devices here; use --device cpu or auto$"):
        torch_device("cuda:2")


def test_auto_device(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert torch_device("auto").type == expected


def test_a_dtype_that_is_none(checkpoint):
    assert refused(checkpoint, dtype="int8") == "--dtype int8 is unknown; choose one of auto, bf16, fp16, fp32, fp64"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_a_full_device_is_not_called_a_broken_checkpoint(checkpoint, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load_model(str(checkpoint), device="cpu")
    assert caught.value is error


def test_a_config_is_checked_before_the_weights_are_read(model, monkeypatch):
    edit_config(model, model_type="bert")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read the weights"))
    refused(model)
