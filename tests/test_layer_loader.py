"""Loading one layer at a time: the bits of from_pretrained, every byte read once, and each fault one line."""

import itertools
import json
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODEL_TYPES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from ssah_fast import layer_loader
from ssah_fast.errors import RunError, SsahError
from ssah_fast.layer_loader import LayerLoader
from ssah_fast.loading import load_model

CPU = torch.device("cpu")
BLOCK = 4  # of the fp8 checkpoints; divides every size of the tiny models


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def save(tokenizer, tmp_path):
    """Saves a model with a tokenizer."""

    def saved(model, name="model", **options):
        folder = shutil.copytree(tokenizer, tmp_path / name)
        model.save_pretrained(folder, **options)
        return folder

    return saved


@pytest.fixture
def reads(monkeypatch):
    """Every (inode, offset, bytes) that is read."""
    done, read = [], os.preadv

    def counted(descriptor, buffers, offset):
        count = read(descriptor, buffers, offset)
        done.append((os.fstat(descriptor).st_ino, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return done


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(loader, expected):
    """Compare what is loaded, bit for bit; returns its names."""
    loaded = {name: tensor for name, tensor in tensors(loader.model).items() if not tensor.is_meta}
    for name, tensor in loaded.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
        assert not tensor.requires_grad
    return loaded.keys()


def check(folder, expected, **options):
    """Compare all that the decoder needs, layer by layer, with what ``from_pretrained`` loads."""
    with LayerLoader(str(folder), device=CPU, **options) as loader:
        loader.load_rest()
        rest = set(same(loader, expected))
        seen = set(rest)
        for i in range(loader.layers):
            with loader.layer(i):
                loaded = same(loader, expected) - rest
            assert loaded
            assert not seen & loaded
            seen |= loaded
            assert same(loader, expected) == rest
        assert loader.bytes_read == loader.rest_bytes + sum(map(loader.layer_bytes, range(loader.layers)))
    assert all(name.startswith("lm_head.") for name in expected.keys() - seen)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ssah_fast-reader")]


def edit_weights(folder, **changes):
    path = folder / "model.safetensors"
    stored = {**load_file(path), **changes}
    save_file({key: value for key, value in stored.items() if value is not ...}, path, {"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, **options):
    with pytest.raises(SsahError) as caught:
        LayerLoader(str(folder), **{"device": CPU, **options})
    message = str(caught.value)
    assert "\n" not in message
    return message


# what is loaded


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_bits_are_those_of_from_pretrained(model_type, save):
    folder = save(tiny_model(model_type))
    check(folder, tensors(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)), dtype="bf16")


@pytest.mark.parametrize("dtype", ["auto", "fp16", "fp64"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_shards_and_dtypes(model_type, dtype, save):
    folder = save(tiny_model(model_type, torch.bfloat16), max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    check(folder, tensors(load_model(str(folder), device="cpu", dtype=dtype)[0]), dtype=dtype)


def test_a_config_without_dtype_and_a_checkpoint_of_the_bare_decoder(save):
    folder = save(tiny_model("gpt2", torch.float16).base_model)
    edit_json(folder / "config.json", dtype=None, architectures=["GPT2LMHeadModel"])
    assert "h.0.attn.c_attn.weight" in load_file(folder / "model.safetensors")
    expected = tensors(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    assert expected["transformer.wte.weight"].dtype == torch.float16
    check(folder, expected)


def test_an_embedding_that_is_stored_only_as_the_head(save):
    folder = save(tiny_model("gemma2"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, **{"model.embed_tokens.weight": ..., "lm_head.weight": embedding})
    check(folder, tensors(AutoModelForCausalLM.from_pretrained(folder)))


def test_experts_of_several_dtypes(save):
    folder = save(tiny_model("mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    edit_weights(folder, **{name: load_file(folder / "model.safetensors")[name].half()})
    check(folder, tensors(AutoModelForCausalLM.from_pretrained(folder)))


def test_what_the_hub_cache_holds(save, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tiny_model("llama")
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--owner--tiny"
    save(model, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "v1").write_text(commit)
    check("owner/tiny", tensors(model), revision="v1")
    with LayerLoader("owner/tiny", revision="v1", device=CPU) as loader:
        assert loader.identity()["commit"] == commit
    assert "neither a folder here nor in the local hub cache" in refused("owner/tiny", revision="v2")


# quantised checkpoints


def quantise_fp8(folder):
    """As DeepSeek stores them: a scale per block of a weight."""
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if "_proj" in name]:
        rows, columns = stored[name].shape
        blocks = stored[name].float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        stored[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    edit_weights(folder, **stored)
    quantization = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", quantization_config=quantization)


def quantise_mxfp4(folder):
    """As gpt-oss stores its experts: two values per byte and a power of two per 32, rows by [columns / 32, 16]."""
    generator = torch.Generator().manual_seed(0)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj")]:
        experts, columns, rows = stored[name].shape
        size = (experts, rows, columns // 32)
        stored[f"{name}_blocks"] = torch.randint(256, (*size, 16), dtype=torch.uint8, generator=generator)
        stored[f"{name}_scales"] = torch.randint(118, 124, size, dtype=torch.uint8, generator=generator)
        stored[name] = ...
    edit_weights(folder, **stored)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt_oss"])
def test_quantised_weights_are_dequantised(model_type, save):
    mxfp4 = model_type == "gpt_oss"
    sizes = {"hidden_size": 64, "intermediate_size": 32} if mxfp4 else {}
    folder = save(tiny_model(model_type, torch.bfloat16, **sizes))
    (quantise_mxfp4 if mxfp4 else quantise_fp8)(folder)
    expected = tensors(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))  # a CPU dequantises by itself
    assert torch.float8_e4m3fn not in {tensor.dtype for tensor in expected.values()}
    check(folder, expected)
    full = load_model(str(folder), device="cpu", dtype="fp32")[0]
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}
    check(folder, tensors(full), dtype="fp32")
    assert full(torch.arange(1, 9)[None]).logits.isfinite().all()


def test_blocks_that_stand_out_of_a_weight(save):
    """As in DeepSeek-V3, whose rows are no multiple of the block; from_pretrained refuses them."""
    folder = save(tiny_model("llama", torch.bfloat16))
    quantise_fp8(folder)
    block, name = 32, "model.layers.1.mlp.up_proj.weight"
    stored = load_file(folder / "model.safetensors")
    for key, weight in [(key, stored[key]) for key in stored if "_proj" in key and not key.endswith("_inv")]:
        stored[f"{key}_scale_inv"] = torch.rand([-(-size // block) for size in weight.shape])
    edit_weights(folder, **stored)
    quantization = {"quant_method": "fp8", "weight_block_size": [block, block]}
    edit_json(folder / "config.json", quantization_config=quantization)
    scale = stored[f"{name}_scale_inv"].repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert scale.shape == (64, 64)
    with LayerLoader(str(folder), device=CPU) as loader, loader.layer(1):
        found = loader.model.model.layers[1].mlp.up_proj.weight
        assert torch.equal(found, (stored[name].float() * scale[:52, :48]).bfloat16())


def test_other_quantisation_is_refused(save):
    folder = save(tiny_model("llama"))
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(folder) == (
        f"{folder} is quantised with gptq; only fp8 and mxfp4 checkpoints are dequantised while they are loaded, so "
        "give the checkpoint that it was made from"
    )


def test_a_missing_scale(save):
    folder = save(tiny_model("llama"))
    quantise_fp8(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(folder, **{f"{name}_scale_inv": ...})
    assert refused(folder) == f"{folder} is incomplete: the scale of {name} is missing; download it again"
    edit_weights(folder, **{f"{name}_scale_inv": torch.ones(5, 5)})
    assert f"{folder}: the weights that make {name} do not fit together (" in refused(folder)


# how it is read


@pytest.fixture
def llama(save):
    return save(tiny_model("llama", num_hidden_layers=4), max_shard_size="60KB")


def test_every_byte_is_read_once(llama, reads, monkeypatch):
    monkeypatch.setattr(layer_loader, "PIECE", 1000)
    with LayerLoader(str(llama), device=CPU) as loader:
        headers = len(reads)
        loader.load_rest()
        for i in range(loader.layers):
            with loader.layer(i):
                pass
        data = sorted(reads[headers:])
        assert sum(count for _, _, count in data) == loader.bytes_read
        assert all(count <= 1000 for _, _, count in data)
    for (file, offset, count), (following, start, _) in itertools.pairwise(data):
        assert file != following or offset + count <= start
    # all but headers and lm_head
    stored = sum(path.stat().st_size for path in loader.files) - sum(count for _, _, count in reads[:headers])
    assert loader.bytes_read == stored - 96 * 48 * 4


def test_the_next_layer_is_read_meanwhile_into_two_buffers(llama):
    with LayerLoader(str(llama), device=CPU) as loader:
        addresses = set()
        for i in range(loader.layers):
            with loader.layer(i):
                parameters = list(loader.model.model.layers[i].parameters())
                addresses.add(parameters[0].untyped_storage().data_ptr())
                assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
                assert not any(parameter.data_ptr() % 64 for parameter in parameters)
                if i + 1 < loader.layers:
                    loader.start(i + 1)  # has begun: nothing is read twice
                    loader._readings[i + 1].wait()
        assert len(addresses) == 2
        assert loader.bytes_read == sum(map(loader.layer_bytes, range(4)))
        assert loader.prepared > 0
        assert loader.waited > 0


def test_layers_in_any_order(llama):
    expected = tensors(AutoModelForCausalLM.from_pretrained(llama))
    with LayerLoader(str(llama), device=CPU) as loader:
        loader.load_rest(embeddings=False)
        assert "model.embed_tokens.weight" not in same(loader, expected)
        loader.start(3)
        for i in (2, 2, 0, 3, 1, 0):
            with loader.layer(i):
                assert f"model.layers.{i}.mlp.up_proj.weight" in same(loader, expected)
        assert len(loader._buffers) == 2


def test_nothing_is_read_ahead_unless_it_is_asked_for(llama):
    with LayerLoader(str(llama), device=CPU, prefetch=False) as loader:
        for i in (0, 1):
            with loader.layer(i):
                assert not loader._readings
        assert len(loader._buffers) == 1


def test_the_embedding_is_freed(llama):
    with LayerLoader(str(llama), device=CPU) as loader:
        loader.load_rest()
        assert not loader.model.model.embed_tokens.weight.is_meta
        loader.free_embeddings()
        assert loader.model.model.embed_tokens.weight.is_meta
        assert not loader.model.model.norm.weight.is_meta


def test_no_thread_stays(llama):
    with pytest.raises(KeyboardInterrupt), LayerLoader(str(llama), device=CPU) as loader, loader.layer(0):
        assert readers()
        raise KeyboardInterrupt
    assert not readers()
    assert all(parameter.is_meta for parameter in loader.model.parameters())


def test_a_shard_that_shrinks_while_it_is_read(llama):
    with LayerLoader(str(llama), device=CPU) as loader:
        path = loader._layers[2].items[0].stored[0].file.path
        with loader.layer(0):
            pass
        os.truncate(path, 2000)
        loader._readings.pop(1).cancel()
        loader.start(2)
        with pytest.raises(RunError) as caught, loader.layer(2):
            pass
        assert str(caught.value) == f"cannot read {path}: it became shorter while it was read"
    assert not readers()


@pytest.mark.gpu
def test_on_a_gpu(llama):
    expected = tensors(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).to("cuda"))
    with LayerLoader(str(llama), device=torch.device("cuda"), dtype="bf16") as loader:
        loader.load_rest()
        for i in (0, 1, 2, 3, 0, 1, 2, 3):
            with loader.layer(i):
                assert all(buffer.memory.is_pinned() for buffer in loader._buffers)
                assert f"model.layers.{i}.mlp.up_proj.weight" in same(loader, expected)


# faults


def test_faults_of_single_files_are_found_before_any_weight_is_read(save, reads):
    folder = save(tiny_model("llama"))
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    content, config = path.read_bytes(), (folder / "config.json").read_text()
    start = 8 + int.from_bytes(content[:8], "little")

    def header(old, new):
        assert len(old) == len(new)
        assert old in content[:start]
        path.write_bytes(content[:start].replace(old, new, 1) + content[start:])
        return refused(folder)

    damaged = f"{path} is truncated or not a safetensors file ("
    assert header(b'"dtype":"F32"', b'"dtype":"F64"').startswith(damaged)  # contradicts the size
    assert header(b'"dtype":"F32"', b'"dtype":"F99"').startswith(damaged)
    assert header(b"[52,48]", b"[52,49]").startswith(damaged)
    assert header(b"data_offsets", b"data_0ffsets").startswith(damaged)
    assert header(b'"shape":[48]', b'"shape":[48}').startswith(damaged)
    assert header(b"[52,48]", b"[48,52]").endswith("implies [52, 48]; the two are not of one model")
    assert "but the model has torch.float32; the checkpoint is damaged" in header(b'"dtype":"F32"', b'"dtype":"I32"')
    assert "model.layers.1.mlp.up_proj.weight is missing" in header(b"1.mlp.up_proj", b"1.mlp.vp_proj")
    begin = content.index(b'"data_offsets":[') + 16
    overlapping = content[:begin] + b"4" + content[begin + 1 :]
    path.write_bytes(overlapping)
    assert refused(folder).startswith(damaged)
    path.write_bytes(content[:-1])
    assert refused(folder).startswith(damaged)
    path.write_bytes(content)
    edit_weights(folder, **{name: torch.zeros(52, 48, dtype=torch.int8)})
    assert refused(folder) == (
        f"{folder}: the weight {name} is stored as I8, but the model has torch.float32; the checkpoint is damaged, or "
        "quantised without a quantization_config in its config.json"
    )
    edit_weights(folder, **{name: torch.zeros(52, 48, dtype=torch.float8_e4m3fn)})
    assert f"the weight {name} is stored as F8_E4M3, but the model has torch.float32" in refused(folder)
    edit_weights(folder, **{name: ...})
    assert refused(folder) == f"{folder} is incomplete: the weight {name} is missing; download or save it again"
    edit_weights(folder, **{name: torch.zeros(52, 48), name.removeprefix("model."): torch.zeros(52, 48)})
    assert f"{folder} holds {name} twice, in model.safetensors and model.safetensors" in refused(folder)
    path.write_bytes(content)
    edit_json(folder / "config.json", intermediate_size=64)
    assert "is [48, 52], but config.json implies [48, 64]; the two are not of one model" in refused(folder)
    (folder / "config.json").write_text(config)
    path.rename(folder / "pytorch_model.bin")
    assert "pickled weights" in refused(folder)
    inode = (folder / "pytorch_model.bin").stat().st_ino
    assert all(offset < start for file, offset, _ in reads if file == inode)


def test_faults_of_shards(llama):
    index, shards = llama / "model.safetensors.index.json", sorted(llama.glob("model-*"))
    listed = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**listed, "model.layers.9.mlp.up_proj.weight": shards[1].name})
    assert refused(llama) == (
        f"{llama} is incomplete: its index names model.layers.9.mlp.up_proj.weight, which no shard holds"
    )
    edit_json(index, weight_map=listed)
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    assert refused(llama).startswith(f"{shards[2]} is truncated or not a safetensors file (")
    shutil.copy(shards[1], shards[2])
    assert f"twice, in {shards[1].name} and {shards[2].name}" in refused(llama)
    shards[2].unlink()
    assert refused(llama).startswith(f"{index} names {shards[2].name}, which is missing (1 of ")


def test_an_expert_of_another_shape(save):
    folder = save(tiny_model("mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    edit_weights(folder, **{name: torch.zeros(3, 48)})
    assert f"{folder}: the weights that make model.layers.1.mlp.experts.gate_up_proj do not fit" in refused(folder)
    edit_weights(folder, **{name: ...})
    assert f"{folder}" in refused(folder)


# identity


def test_identity(llama):
    with LayerLoader(str(llama), device=CPU) as loader:
        first = loader.identity()
    assert json.loads(json.dumps(first)) == first
    assert first["files"].keys() == {path.name for path in loader.files}
    path = loader.files[1]
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the first byte behind the header
    path.write_bytes(content)
    with LayerLoader(str(llama), device=CPU) as loader:
        changed = loader.identity()
    assert {name for name in first["files"] if first["files"][name] != changed["files"][name]} == {path.name}
    assert {**first, "files": None} == {**changed, "files": None}
