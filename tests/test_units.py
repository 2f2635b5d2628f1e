"""Unit layouts: indices, costs, and what zeroing a unit does in every supported architecture."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import tiny_models
import torch
from tiny_models import MODEL_TYPES, tiny_config, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel, activations

from ssah_fast.errors import SsahError
from ssah_fast.units import Slice, UnitModule, canonical_name, decoder_layers, find_units, supported_architectures

WITHOUT_HEADS = ("olmo2", "olmo3")
NOT_GATED = ("arcee", "gpt2", "gpt_neox", "nemotron", "opt", "phi", "starcoder2")
NOT_FUSIBLE = (*NOT_GATED, "seed_oss")
CASES = [
    pytest.param(model_type, unit, id=f"{model_type}-{unit}")
    for model_type in MODEL_TYPES
    for unit in ("channel", "head")
    if not (unit == "head" and model_type in WITHOUT_HEADS)
]
TOKENS = torch.arange(3, 23).view(2, 10)
ACTIVATION = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@functools.cache
def cached_model(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type)


def meta_model(model_type: str, **overrides) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides))


@torch.no_grad()
def run(model: nn.Module, reader: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The reader's input [tokens, channels] and the logits."""
    seen = []
    hook = model.get_submodule(reader).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        logits = model(TOKENS, use_cache=False).logits
    finally:
        hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]), logits


class Zeroed:
    """Unit `unit`'s share of `slices` is zero inside the with block."""

    def __init__(self, model: nn.Module, module: UnitModule, slices: Iterable[Slice], unit: int) -> None:
        parameters = dict(model.named_parameters())
        self.places = [(parameters[s.parameter].data, s.axis, s.indices(module.units)[unit]) for s in slices]

    def __enter__(self) -> None:
        self.saved = [weight.index_select(axis, index) for weight, axis, index in self.places]
        for weight, axis, index in self.places:
            weight.index_fill_(axis, index, 0)

    def __exit__(self, *_) -> None:
        for (weight, axis, index), values in zip(self.places, self.saved, strict=True):
            weight.index_copy_(axis, index, values)


def test_tiny_models_cover_every_supported_architecture():
    assert sorted(MODEL_TYPES) == supported_architectures()


def test_slice_indices_follow_the_formula():
    layout = Slice("w", 0, 1, start=5, block=2, outer=10, inner=1, repeat=3, step=4)
    assert layout.indices(4).tolist() == [[5, 9, 13], [6, 10, 14], [15, 19, 23], [16, 20, 24]]
    assert layout.indices(4).dtype == torch.int64


@pytest.mark.parametrize(("model_type", "unit"), CASES)
def test_indices_are_in_range_and_disjoint_and_cost_counts_them(model_type, unit):
    model = cached_model(model_type)
    parameters = dict(model.named_parameters())
    owners = {name: torch.zeros(p.shape, dtype=torch.int32) for name, p in parameters.items()}
    modules = find_units(model, unit)
    assert [(m.layer, m.kind) for m in modules] == [
        (i, kind) for i in range(tiny_models.LAYERS) for kind in ("attention", "mlp")
    ]
    assert len({m.name for m in modules}) == len(modules)
    for module in modules:
        assert module.channels in module.slices
        assert module.channels.parameter == f"{module.reader}.weight"
        counted = 0
        for part in module.slices:
            parameter, indices = parameters[part.parameter], part.indices(module.units)
            assert indices.shape == (module.units, part.repeat)
            assert indices.min() >= 0
            assert indices.max() < parameter.shape[part.axis]
            assert part.width == parameter.numel() // parameter.shape[part.axis]
            ones = torch.ones_like(owners[part.parameter].index_select(part.axis, indices.flatten()))
            owners[part.parameter].index_add_(part.axis, indices.flatten(), ones)
            counted += ones.numel()
        assert counted == module.cost * module.units
    readers = {module.reader for module in modules}
    writers = {part.parameter.rpartition(".")[0] for module in modules for part in module.slices} - readers
    for name, count in owners.items():
        assert count.max() <= 1, name
        # Whole projections are covered: all of them by heads and neurons, all but q and k by value channels.
        parent, _, leaf = name.rpartition(".")
        if (unit == "head" and parent in writers) or (leaf == "weight" and parent in readers):
            assert count.min() == 1, name


@pytest.mark.parametrize(("model_type", "unit"), CASES)
def test_zeroing_a_units_rows_silences_exactly_its_channels(model_type, unit):
    """method.md oracle 9, with GQA, fused layouts and biases."""
    model = cached_model(model_type)
    for module in find_units(model, unit)[:2]:
        before, logits = run(model, module.reader)
        columns = module.channels.indices(module.units)
        assert sorted(columns.flatten().tolist()) == list(range(before.shape[1]))
        writers = [part for part in module.slices if part is not module.channels]
        for u in {0, module.units // 2, module.units - 1}:
            with Zeroed(model, module, writers, u):
                silenced, without_rows = run(model, module.reader)
            with Zeroed(model, module, [module.channels], u):
                same, without_columns = run(model, module.reader)
            others = torch.ones(before.shape[1], dtype=torch.bool).index_fill(0, columns[u], False)
            assert silenced[:, columns[u]].eq(0).all()
            assert before[:, columns[u]].ne(0).any()
            assert torch.equal(silenced[:, others], before[:, others])
            assert torch.equal(same, before)
            assert torch.equal(without_rows, without_columns)
            assert not torch.equal(without_rows, logits)


@pytest.mark.parametrize(("model_type", "unit"), CASES)
def test_each_slice_reaches_the_channels_of_its_own_unit_only(model_type, unit):
    """Also tells apart the q and k rows of a head, which the zeroed v rows hide in the test above."""
    model = cached_model(model_type)
    for module in find_units(model, unit)[:2]:
        before, _ = run(model, module.reader)
        columns = module.channels.indices(module.units)
        for u in (0, module.units - 1):
            own = torch.zeros(before.shape[1], dtype=torch.bool).index_fill(0, columns[u], True)
            for part in module.slices:
                with Zeroed(model, module, [part], u):
                    changed = run(model, module.reader)[0].ne(before).any(0)
                assert not changed[~own].any(), part
                # A bias of k shifts all scores of a query alike where there is no rotation: no change to be seen.
                assert changed[own].any() or part is module.channels or part.parameter.endswith(".bias"), part


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_value_row_serves_the_output_columns_of_its_kv_group(model_type):
    attention = find_units(cached_model(model_type))[0]
    config = cached_model(model_type).config
    group = config.num_attention_heads // config.num_key_value_heads
    head_dim = attention.units * group // config.num_attention_heads
    columns = attention.channels.indices(attention.units)
    for u in range(attention.units):
        kv, c = divmod(u, head_dim)
        assert columns[u].tolist() == [h * head_dim + c for h in range(config.num_attention_heads) if h // group == kv]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "intermediate", "vocabulary", "ratio"),
    [
        pytest.param(32, 8, 14336, 128256, 1280 / 3, id="llama-3-8b"),
        pytest.param(32, 32, 11008, 32000, 512 / 3, id="llama-2-7b"),
    ],
)
def test_a_kv_group_costs_what_method_6_says(heads, kv_heads, intermediate, vocabulary, ratio):
    sizes = {"hidden_size": 4096, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model = meta_model("llama", **sizes, intermediate_size=intermediate, vocab_size=vocabulary, head_dim=128)
    group, neuron = find_units(model, "head")[:2]
    queries = heads // kv_heads
    assert neuron.cost == 3 * 4096
    assert group.cost == (2 * queries + 2) * 4096 * 128
    assert group.cost / neuron.cost == pytest.approx(ratio)
    assert find_units(model)[0].cost == (1 + queries) * 4096
    assert group.units == kv_heads
    assert neuron.units == intermediate


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
def test_head_dim_need_not_be_hidden_over_heads(model_type):
    model = meta_model(model_type, head_dim=20)
    channels, heads = find_units(model)[0], find_units(model, "head")[0]
    assert channels.units == tiny_models.KV_HEADS * 20
    assert channels.channels.indices(channels.units)[20].tolist() == [60, 80, 100]  # (kv 1, c 0): query heads 3, 4, 5
    assert heads.cost == (2 * 3 + 2) * tiny_models.HIDDEN * 20


@pytest.mark.parametrize(("model_type", "unit"), CASES)
def test_json_round_trip(model_type, unit):
    for module in find_units(cached_model(model_type), unit):
        stored = module.to_json()
        assert "gated" not in stored
        again = UnitModule.from_json(stored)
        assert again.to_json() == stored
        assert (again.slices, again.channels, again.cost, again.gated) == (
            module.slices,
            module.channels,
            module.cost,
            None,
        )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gated_names_modules_that_recompute_the_mlp(model_type):
    model = cached_model(model_type)
    gated = [m.gated for m in find_units(model) if m.kind == "mlp"]
    assert [g is None for g in gated] == [model_type in NOT_FUSIBLE] * tiny_models.LAYERS
    x = torch.randn(7, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(0))
    for mlp in filter(None, gated):
        gate = model.get_submodule(mlp.gate)(x)
        gate, up = gate.chunk(2, -1) if mlp.up is None else (gate, model.get_submodule(mlp.up)(x))
        output = model.get_submodule(mlp.down)(ACTIVATION[mlp.activation](gate) * up)
        assert torch.equal(output, model.get_submodule(mlp.module)(x))


@pytest.mark.parametrize("name", sorted(activations.ACT2CLS.keys() - {"prelu", "xielu"}))  # those two have weights
def test_an_activation_is_named_only_if_it_rounds_as_torch_does(name):
    """Every activation of transformers, in bf16, where a formula in several tensor operations rounds several times."""
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=1, hidden_act=name)
    gated = find_units(model)[1].gated
    x = torch.linspace(-20, 20, 4001, dtype=torch.bfloat16)
    y = activations.ACT2FN[name](x)
    equal = {known for known, function in ACTIVATION.items() if torch.equal(function(x), y)}
    assert (gated.activation in equal) if gated else not equal


def test_gated_is_none_where_the_forward_is_not_transformers_own():
    class LlamaMLP(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
                mlp.act_fn,
            )

    model = meta_model("llama")
    model.model.layers[0].mlp = LlamaMLP(model.model.layers[0].mlp)
    patched = model.model.layers[1].mlp
    patched.forward = patched.forward
    assert [m.gated for m in find_units(model)] == [None] * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("module.model.layers.0", "model.layers.0"),
        ("_orig_mod.module.model.layers.0", "model.layers.0"),
        (
            "_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.mlp",
            "model.layers.3.mlp",
        ),
        ("model.layers.0._orig_mod.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        ("model.submodule.modules.0", "model.submodule.modules.0"),
        ("module", ""),
        ("", ""),
    ],
)
def test_canonical_name(name, expected):
    assert canonical_name(name) == expected


def test_wrapped_models_give_the_layout_of_the_bare_one():
    plain = find_units(tiny_model("llama"))
    inner = tiny_model("llama")
    inner.model.layers[0] = checkpoint_wrapper(inner.model.layers[0])
    inner.model.layers[1] = torch.compile(inner.model.layers[1])
    for model in (inner, nn.DataParallel(inner), torch.compile(inner)):
        assert find_units(model) == plain
        name, layers = decoder_layers(model)
        assert name == "model.layers"
        assert layers is inner.model.layers


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("gpt_neox", "gpt_neox.layers"),
        ("opt", "model.decoder.layers"),
    ],
)
def test_decoder_layers(model_type, name):
    found, layers = decoder_layers(cached_model(model_type))
    assert found == name
    assert len(layers) == tiny_models.LAYERS


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "phi3"])
def test_meta_models_give_the_same_layout(model_type):
    assert find_units(meta_model(model_type)) == find_units(cached_model(model_type))


def test_names_of_modules():
    assert [m.name for m in find_units(cached_model("llama"))[:2]] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert [m.name for m in find_units(cached_model("opt"))[:2]] == [
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.fc2",
    ]


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_architecture_lists_the_supported_ones_and_says_how_to_add_one():
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32))
    with pytest.raises(SsahError) as caught:
        find_units(model)
    message = one_line(caught)
    assert "'mamba'" in message
    assert ", ".join(sorted(MODEL_TYPES)) in message
    assert "FAMILIES in ssah_fast/units.py" in message


def test_a_module_that_is_missing_is_named():
    model = meta_model("llama")
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(SsahError, match=r"model\.layers\.1\.mlp\.up_proj") as caught:
        find_units(model)
    assert "'llama'" in one_line(caught)


def test_other_models_and_options_are_refused():
    with pytest.raises(SsahError, match=r"attention_unit: 'neuron' .*channel, head"):
        find_units(meta_model("llama"), "neuron")
    for model_type in WITHOUT_HEADS:
        with pytest.raises(SsahError, match=f"attention_unit: 'head' .*{model_type}.*'channel'"):
            find_units(meta_model(model_type), "head")
    with pytest.raises(SsahError, match="model: Linear is no transformers language model"):
        find_units(nn.Linear(2, 2))
    model = meta_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(SsahError, match="num_hidden_layers = 7"):
        find_units(model)


@pytest.mark.parametrize(
    ("model_type", "module", "shape", "match"),
    [
        ("llama", "mlp.up_proj", (4, 48), "up_proj' has 4 rows, not 1 for each of the 52 inputs"),
        ("llama", "self_attn.v_proj", (4, 48), "v_proj has 4 rows, .* do not make heads of head_dim 8"),
        ("llama", "self_attn.k_proj", (4, 48), "k_proj has 4 rows"),
        ("llama", "self_attn.o_proj", (48, 96), "o_proj 96 inputs"),
        ("phi3", "self_attn.qkv_proj", (81, 48), "qkv_proj has 81 rows"),
        ("phi3", "self_attn.qkv_proj", (8, 48), "qkv_proj has 8 rows"),
        ("gpt_neox", "attention.dense", (1152, 1), "dense 1 inputs"),  # as a 4-bit weight is packed
        ("llama", "mlp.down_proj", (4,), r"no 2-D weight in 'model\.layers\.0\.mlp\.down_proj'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model_type, module, shape, match):
    model = meta_model(model_type)
    decoder_layers(model)[1][0].get_submodule(module).weight = nn.Parameter(torch.empty(shape, device="meta"))
    with pytest.raises(SsahError, match=match) as caught:
        find_units(model)
    one_line(caught)
