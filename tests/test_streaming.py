"""Streaming: one decoder layer at a time, with the same bits as the whole model in memory."""

import errno
import os
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_scoring import Capture, assert_close, collect, make_batches, make_records, make_sequences
from tiny_models import LAYERS, MODEL_TYPES, tiny_model, tiny_tokenizer

from ssah_fast import loading, scoring
from ssah_fast.collector import Collector
from ssah_fast.errors import NonFiniteError, RunError
from ssah_fast.hidden_states import PLACES, HiddenStates
from ssah_fast.layer_loader import LayerLoader
from ssah_fast.loading import load_model
from ssah_fast.streaming import LayerRunner
from ssah_fast.units import decoder_layers, find_units, text_decoder

CPU = torch.device("cpu")
WINDOW = 6  # tokens; most sequences are longer
MIXED = ["sliding_attention", "full_attention"]
QWEN = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
# Windows that bite, in one layer of two where the architecture mixes them.
WINDOWS = {
    **{name: {"sliding_window": WINDOW} for name in ("mistral", "phi3", "starcoder2", "mixtral", "ministral3")},
    **{name: QWEN for name in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")},
    **{
        name: {"sliding_window": WINDOW, "layer_types": MIXED}
        for name in ("gemma2", "gemma3_text", "cohere2", "exaone4", "ministral", "olmo3", "gpt_oss")
    },
    "smollm3": {**QWEN, "layer_types": MIXED, "no_rope_layers": [0, 1]},
}
SAFETY, UTILITY = make_records((3, 9, 5, 1, 12, 6)), make_records((7, 2, 15, 4), seed=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that saves a tiny model of a type in several shards, once, and returns the folder."""
    made = {}

    def make(name, **overrides):
        key = name, *overrides
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            model = tiny_model(name, **{**WINDOWS.get(name, {}), **overrides})
            model.save_pretrained(made[key], max_shard_size="60KB")
            tiny_tokenizer().save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(autouse=True)
def the_same_tokenizer(monkeypatch):
    """For Qwen2, AutoTokenizer would make a BPE tokenizer out of the vocabulary, which knows none of the words."""
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer())


class Streamed:
    """A loader, its model and what runs them; closed by the caller."""

    def __init__(self, folder, *, estimator="variance", unit="channel", place="device", dtype="auto", device="cpu"):
        device = torch.device(device)
        self.loader = LayerLoader(str(folder), device=device, dtype=dtype)
        self.hidden = HiddenStates(place, device)
        self.model, self.layouts = self.loader.model, find_units(self.loader.model, unit)
        self.collector = Collector(self.model, self.layouts, estimator, device)
        self.run = LayerRunner(self.loader, self.collector, self.layouts, self.hidden).run

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loader.close()
        self.hidden.close()


def stream(folder, batches, **options):
    with Streamed(folder, **options) as streamed:
        streamed.run(batches)
        return streamed.collector.finish()


def in_memory(folder, batches, *, dtype="auto", device="cpu", **options):
    return collect(load_model(str(folder), device=device, dtype=dtype)[0], batches=batches, **options)


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for name, module in expected.items():
        for field in ("importance", "count", "mean", "m2", "norm"):
            assert torch.equal(getattr(actual[name], field), getattr(module, field)), (name, field)


# exactness


def score(folder, output, stream, **options):
    data = {"safety": SAFETY, "utility": UTILITY, "batch_size": 3}
    scoring.score_checkpoint(str(folder), output=output, stream=stream, device="cpu", **data, **options)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_architecture_has_the_bits_of_the_model_in_memory_and_float64_agrees(name, checkpoint):
    folder, batches = checkpoint(name), make_batches(make_sequences())
    assert any(batch.attention_mask is not None for batch in batches)
    model, _ = load_model(str(folder), device="cpu")
    expected = collect(model, batches=batches)
    with Streamed(folder) as streamed, Capture(streamed.model, batches) as seen:
        streamed.collector._stop_early = False
        streamed.run(batches)
        scores = streamed.collector.finish()
    assert_same_bits(scores, expected)
    seen.weights = {layout.name: seen.weight(model, layout) for layout in seen.layouts}
    for layout in seen.layouts:
        for s in range(2):
            assert_close(scores[layout.name].importance[s], seen.importance(layout, s), 1e-6)


@pytest.mark.parametrize("name", sorted(WINDOWS))
def test_the_windows_bite(name):
    """Otherwise the test above would not see whether each layer gets its own mask."""
    batches = make_batches(make_sequences())[:1]
    narrow, wide = (tiny_model(name, **{**WINDOWS[name], "sliding_window": window}) for window in (WINDOW, 64))
    scores, others = collect(narrow, batches=batches), collect(wide, batches=batches)
    assert any(not torch.equal(module.mean, others[layout].mean) for layout, module in scores.items())


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "auto"), ("gemma2", "bf16"), ("gpt2", "bf16"), ("olmoe", "bf16")]
)
def test_the_scores_file_is_the_same_byte_for_byte(name, dtype, checkpoint, tmp_path):
    for way in ("always", "never"):
        score(checkpoint(name), tmp_path / way, way, dtype=dtype)
    assert (tmp_path / "always").read_bytes() == (tmp_path / "never").read_bytes()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "dtype"), [("gemma2", "bf16"), ("gpt2", "fp32")])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_does_not_matter_where_the_hidden_states_are(name, dtype, place, device, checkpoint):
    folder, batches = checkpoint(name, num_hidden_layers=3, layer_types=None), make_batches(make_sequences())
    expected = in_memory(folder, batches, dtype=dtype, device=device)
    assert_same_bits(stream(folder, batches, place=place, dtype=dtype, device=device), expected)


@pytest.mark.parametrize(
    ("name", "estimator", "unit"),
    [
        ("phi3", "norm", "channel"),
        ("phi3", "flap", "head"),
        ("mixtral", "norm", "head"),
        ("mixtral", "flap", "channel"),
    ],
)
def test_every_estimator_and_unit(name, estimator, unit, checkpoint):
    batches = make_batches(make_sequences(), 1 if estimator == "flap" else 3)
    options = {"estimator": estimator, "unit": unit}
    expected = in_memory(checkpoint(name), batches, **options)
    assert_same_bits(stream(checkpoint(name), batches, **options), expected)


@pytest.mark.parametrize(("dtype", "relative"), [("fp64", 1e-9), ("fp32", 1e-4)])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox", "gpt_oss", "deepseek_v3"])
def test_the_batch_size_does_not_matter(name, dtype, relative, checkpoint):
    sets = make_sequences()
    expected = in_memory(checkpoint(name), make_batches(sets, 3), dtype=dtype)
    for layout, module in stream(checkpoint(name), make_batches(sets, 1), dtype=dtype).items():
        assert torch.equal(module.count, expected[layout].count)
        assert_close(module.importance, expected[layout].importance, relative)


# what is read, and when


def test_every_byte_is_read_once(checkpoint):
    folder = checkpoint("gemma2")
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes |= {key: file.get_tensor(key).nbytes for key in file.keys()}
    batches = make_batches(make_sequences(), 1)
    with Streamed(folder) as streamed:
        streamed.run(batches)
        assert streamed.loader.bytes_read == sum(sizes.values())


def test_only_one_layer_is_there_at_a_time_and_the_embedding_only_with_the_first(checkpoint):
    batches = make_batches(make_sequences())
    there = []
    with Streamed(checkpoint("llama", num_hidden_layers=3)) as streamed:
        embedding = text_decoder(streamed.model).get_input_embeddings()
        parts = [embedding, *decoder_layers(streamed.model)[1], streamed.model.lm_head]

        def look(*_):
            there.append([not any(p.is_meta for p in part.parameters()) for part in parts])

        streamed.run(batches, point=look)
    alone = [[i == layer for i in range(3)] for layer in range(3)]
    one_layer = [[layer == 0, *alone[layer], False] for layer in range(3)]
    assert there == [row for row in one_layer for _ in batches]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_can_go_on_from_any_point(place, checkpoint):
    """As after a kill: from what the collector and the hidden states say at the point, in a new process."""
    folder, batches = checkpoint("gpt_oss"), make_batches(make_sequences(), 5)
    saved = {}
    with Streamed(folder, place=place) as streamed:

        def keep(layer, batch):
            state = {name: tensor.clone() for name, tensor in streamed.collector.state().items()}
            hidden = [states.clone() for states in streamed.hidden.on_host(len(batches))]
            saved[layer, batch] = state, hidden

        streamed.run(batches, point=keep)
        expected = streamed.collector.finish()
    assert list(saved) == [(0, 1), (1, 0), (1, 1), (2, 0)]
    for point, (state, hidden) in saved.items():
        with Streamed(folder, place=place) as streamed:
            streamed.collector.restore(state)
            for number, states in enumerate(hidden):
                if states.numel():
                    streamed.hidden.put(number, states)
            streamed.run(batches, start=point)
            assert_same_bits(streamed.collector.finish(), expected)


def test_progress_counts_a_token_once_per_layer(checkpoint):
    batches = make_batches(make_sequences())
    seen = []
    with Streamed(checkpoint("llama")) as streamed:
        streamed.run(batches, lambda *at: seen.append(at))
    total = LAYERS * sum(batch.input_ids.numel() for batch in batches)
    assert len(seen) == LAYERS * len(batches)
    assert seen == sorted(set(seen))
    assert {of for _, of in seen} == {total}
    assert seen[-1] == (total, total)


def test_a_process_without_batches_reads_nothing(checkpoint):
    with Streamed(checkpoint("llama")) as streamed:
        streamed.run([])
        assert streamed.loader.bytes_read == 0
        assert streamed.collector.state() == {}


# afterwards


class Broken(Exception):
    pass


def open_files():
    return sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n.isdecimal() and lives(n))


def lives(descriptor):
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("error", [None, Broken, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nothing_is_left_behind(name, error, checkpoint):
    folder, batches = checkpoint(name), make_batches(make_sequences())
    files, threads = open_files(), threading.enumerate()
    with Streamed(folder, place="file") as streamed:

        def interrupt(layer, batch):
            if error is not None and (layer, batch) == (1, 1):
                raise error

        try:
            streamed.run(batches, point=interrupt)
        except (Broken, KeyboardInterrupt, torch.OutOfMemoryError) as raised:
            assert type(raised) is error
        for module in streamed.model.modules():
            assert "forward" not in vars(module)
            assert not any(hooks for key, hooks in vars(module).items() if key.endswith("_hooks"))
        layers = decoder_layers(streamed.model)[1]
        assert all(p.is_meta for p in layers.parameters())
    assert open_files() == files
    assert threading.enumerate() == threads


# faults


def plant(folder, tmp_path, name, index):
    """A copy of a checkpoint in one file, with a NaN in a weight."""
    weights = {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
    weights[name][tuple(index)] = float("nan")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    for path in folder.glob("*.json"):
        if "index" not in path.name:
            (damaged / path.name).write_bytes(path.read_bytes())
    return damaged


@pytest.mark.parametrize(
    ("name", "weight", "index", "message"),
    [
        ("llama", "model.layers.1.mlp.gate_proj.weight", [7, 3], "model.layers.1.mlp.gate_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias", [100], "transformer.h.1.attn.c_attn.bias"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.2.w2.weight",
            [4, 5],
            "model.layers.1.mlp.experts.down_proj",
        ),
    ],
)
def test_a_nan_in_a_layer_names_it_and_leaves_no_file(name, weight, index, message, checkpoint, tmp_path):
    damaged, output = plant(checkpoint(name), tmp_path, weight, index), tmp_path / "out" / "scores"
    output.parent.mkdir()
    with pytest.raises(NonFiniteError) as caught:
        score(damaged, output, "always")
    at = index if name != "mixtral" else [2, *index]
    assert str(caught.value) == f"the weight {message} has a NaN or Inf at {at}; the checkpoint is damaged"
    assert list(output.parent.iterdir()) == []


def test_a_nan_in_the_embedding_is_named(checkpoint, tmp_path):
    damaged = plant(checkpoint("llama"), tmp_path, "model.embed_tokens.weight", [3, 7])
    with pytest.raises(NonFiniteError) as caught:
        score(damaged, None, "always")
    assert str(caught.value) == (
        "NaN or Inf in the activations of model.layers.0.self_attn.o_proj, input channel 0, on the safety set; "
        "the weight model.embed_tokens.weight has a NaN or Inf at [3, 7]"
    )


# hidden states


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_come_back_as_they_were(place, dtype):
    generator = torch.Generator().manual_seed(0)
    with HiddenStates(place, CPU) as hidden:
        for _ in range(2):  # each round overwrites the one before
            tensors = {n: torch.randn(n + 1, 5, 8, generator=generator).to(dtype) for n in (2, 0)}
            tensors[3] = torch.randn(5, 2, 8, generator=generator).to(dtype).transpose(0, 1)
            for number, tensor in tensors.items():
                hidden.put(number, tensor)
            copies = list(hidden.on_host(4))
            assert copies[1].numel() == 0
            for number, tensor in tensors.items():
                assert torch.equal(copies[number], tensor)
                taken = hidden.take(number)
                assert torch.equal(taken, tensor)
                assert taken.dtype == dtype
                hidden.put(number, tensor)
        hidden.clear()
        assert [copy.numel() for copy in hidden.on_host(4)] == [0] * 4


def test_hidden_states_in_a_file_take_any_number_of_calls(monkeypatch, tmp_path):
    """The system may write and read less than it was asked to."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, view, offset: write(file, view[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: read(file, [views[0][:5]], offset))
    with HiddenStates("file", CPU, tmp_path) as hidden:
        states = torch.arange(24.0).view(2, 3, 4)
        hidden.put(0, states)
        assert torch.equal(hidden.take(0), states)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_run_in_one_line(monkeypatch, checkpoint, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        Streamed(checkpoint("llama"), place="file") as streamed,
        pytest.raises(RunError, match=r"^cannot write the hidden states to a temporary file: the disk is full$"),
    ):
        streamed.run(make_batches(make_sequences()))


def test_a_file_that_became_shorter():
    with HiddenStates("file", CPU) as hidden:
        hidden.put(0, torch.ones(2, 3, 4))
        hidden._file.truncate(5)
        with pytest.raises(RunError, match=r"^cannot read the hidden states back: their file became shorter$"):
            hidden.take(0)
