"""Unit layouts: indices, costs, and what zeroing a unit does in every supported architecture."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable

import pytest
import tiny_models
import torch
from plain_experts import expert_input
from tiny_models import MODEL_TYPES, tiny_config, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    activations,
)

from ssah_fast.errors import SsahError
from ssah_fast.units import Slice, UnitModule, canonical_name, decoder_layers, find_units, supported_architectures

WITHOUT_HEADS = ("olmo2", "olmo3", "olmoe")
# What the MLP of each of the two layers is: "mlp" is dense, a number is a routed expert.
EXPERTS = (0, 1, 2, 3)
LAYERS_OF_EXPERTS = {
    "mixtral": (EXPERTS, EXPERTS),
    "qwen3_moe": (EXPERTS, EXPERTS),
    "olmoe": (EXPERTS, EXPERTS),
    "gpt_oss": (EXPERTS, EXPERTS),
    "qwen2_moe": (("mlp",), ("shared_expert", *EXPERTS)),
    "deepseek_v3": (("mlp",), (*EXPERTS, "shared_experts")),
}
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


def walked(modules: list[UnitModule]) -> list[UnitModule]:
    """The first module of each sort: attention, dense MLP, shared expert, routed expert; and the last routed expert."""
    sorts = {(m.kind, m.name.rpartition(".")[2] if m.expert is None else "expert"): m for m in reversed(modules)}
    return [*sorts.values(), *[m for m in modules if m.expert is not None][-1:]]


@torch.no_grad()
def run(model: nn.Module, module: UnitModule) -> tuple[torch.Tensor, torch.Tensor]:
    """The reader's input [tokens, channels] and the logits; of an expert that of its own tokens."""
    seen = []

    def see(reader: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0] if module.expert is None else expert_input(reader, module.expert, *args[:2])[1])

    hook = model.get_submodule(module.reader).register_forward_pre_hook(see)
    try:
        logits = model(TOKENS, use_cache=False).logits
    finally:
        hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]), logits


class Zeroed:
    """Unit `unit`'s share of `slices` is zero inside the with block."""

    def __init__(self, model: nn.Module, module: UnitModule, slices: Iterable[Slice], unit: int) -> None:
        parameters = dict(model.named_parameters())
        self.places = [self.place(parameters[s.parameter].data, s, s.indices(module.units)[unit]) for s in slices]

    @staticmethod
    def place(weight: torch.Tensor, part: Slice, index: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        if not part.stacked:
            return weight, part.axis, index
        (expert,) = set((index // weight.shape[part.axis]).tolist())
        return weight[expert], part.axis - 1, index % weight.shape[part.axis]

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
    owners: dict[str, tuple[int, torch.Tensor]] = {}
    modules = find_units(model, unit)
    layers = LAYERS_OF_EXPERTS.get(model_type, (("mlp",), ("mlp",)))
    assert [(m.layer, m.kind, m.expert) for m in modules] == [
        (i, *found)
        for i, mlps in enumerate(layers)
        for found in (("attention", None), *(("mlp", mlp if isinstance(mlp, int) else None) for mlp in mlps))
    ]
    assert len({m.name for m in modules}) == len(modules)
    for module in modules:
        assert module.channels in module.slices
        expert = module.expert is not None
        assert module.channels.parameter == f"{module.reader}.{'down_proj' if expert else 'weight'}"
        assert module.inputs().unique().tolist() == list(range(module.units * module.channels.repeat))
        counted = 0
        for part in module.slices:
            parameter, indices = parameters[part.parameter], part.indices(module.units)
            size = parameter.shape[part.axis] * (len(parameter) if part.stacked else 1)
            assert indices.shape == (module.units, part.repeat)
            assert indices.min() >= 0
            assert indices.max() < size
            assert part.width == parameter.numel() // size
            axis, owner = owners.setdefault(part.parameter, (part.axis, torch.zeros(size, dtype=torch.int32)))
            assert axis == part.axis
            owner.index_add_(0, indices.flatten(), torch.ones(indices.numel(), dtype=torch.int32))
            counted += indices.numel() * part.width
        assert counted == module.cost * module.units
    readers = {module.reader for module in modules}
    writers = {part.parameter.rpartition(".")[0] for module in modules for part in module.slices} - readers
    experts = {module.reader for module in modules if module.expert is not None}
    for name in parameters:
        # Whole projections are covered: all of them by heads and neurons, all but q and k by value channels.
        parent, _, leaf = name.rpartition(".")
        if (
            (unit == "head" and parent in writers)
            or (leaf == "weight" and parent in readers)
            or (leaf != "down_proj_bias" and parent in experts)
        ):
            assert owners[name][1].eq(1).all(), name
        elif name in owners:
            assert owners[name][1].max() <= 1, name


@pytest.mark.parametrize(("model_type", "unit"), CASES)
def test_zeroing_a_units_rows_silences_exactly_its_channels(model_type, unit):
    """method.md oracle 9, with GQA, fused layouts and biases."""
    model = cached_model(model_type)
    for module in walked(find_units(model, unit)):
        before, logits = run(model, module)
        columns = module.inputs()
        assert sorted(columns.flatten().tolist()) == list(range(before.shape[1]))
        writers = [part for part in module.slices if part is not module.channels]
        for u in {0, module.units // 2, module.units - 1}:
            with Zeroed(model, module, writers, u):
                silenced, without_rows = run(model, module)
            with Zeroed(model, module, [module.channels], u):
                same, without_columns = run(model, module)
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
    for module in walked(find_units(model, unit)):
        before, _ = run(model, module)
        columns = module.inputs()
        for u in (0, module.units - 1):
            own = torch.zeros(before.shape[1], dtype=torch.bool).index_fill(0, columns[u], True)
            for part in module.slices:
                with Zeroed(model, module, [part], u):
                    changed = run(model, module)[0].ne(before).any(0)
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
    assert all(m.gated is None for m in find_units(model) if m.expert is not None)  # collected another way
    gated = [m.gated for m in find_units(model) if m.kind == "mlp" and m.expert is None]
    assert [g is None for g in gated] == [model_type in NOT_FUSIBLE] * len(gated)
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


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "phi3", "gpt_oss", "deepseek_v3"])
def test_meta_models_give_the_same_layout(model_type):
    assert find_units(meta_model(model_type)) == find_units(cached_model(model_type))


@pytest.mark.parametrize(
    ("model_type", "overrides", "experts"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, [True, False]),
        ("qwen2_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}, [False, True]),
        ("deepseek_v3", {"first_k_dense_replace": 0}, [True, True]),
        ("deepseek_v3", {"first_k_dense_replace": 2}, [False, False]),
    ],
)
def test_which_layers_have_experts_is_seen_in_the_model(model_type, overrides, experts):
    modules = find_units(meta_model(model_type, **overrides))
    for layer, sparse in enumerate(experts):
        mlps = [m for m in modules if m.kind == "mlp" and m.layer == layer]
        assert [m.expert is not None for m in mlps if "shared" not in m.name] == ([True] * 4 if sparse else [False])
        assert len({m.pool for m in mlps if m.expert is not None}) == int(sparse)
        assert all(m.pool == m.name for m in mlps if m.expert is None)


def test_experts_are_slices_of_3d_parameters():
    first, last = (find_units(cached_model("mixtral"))[i] for i in (1, 4))
    name = "model.layers.0.mlp.experts"
    assert (first.name, first.pool, first.reader, first.expert) == (f"{name}.0", name, name, 0)
    assert [part.indices(24)[5].tolist() for part in first.slices] == [[5, 29], [5]]
    assert [part.indices(24)[5].tolist() for part in last.slices] == [[144 + 5, 144 + 29], [72 + 5]]
    assert [part.parameter for part in last.slices] == [f"{name}.gate_up_proj", f"{name}.down_proj"]
    turns = find_units(cached_model("gpt_oss"))[4]
    assert [part.indices(24)[5].tolist() for part in turns.slices] == [[144 + 10, 144 + 11]] * 2 + [[72 + 5]]
    assert [part.axis for part in turns.slices] == [2, 1, 1]


def test_latent_attention_without_a_query_latent():
    heads = find_units(meta_model("deepseek_v3", q_lora_rank=None), "head")[0]
    assert [part.parameter.rpartition("self_attn.")[2] for part in heads.slices] == [
        "q_proj.weight",
        "kv_b_proj.weight",
        "o_proj.weight",
    ]
    assert heads.cost == (6 + 4) * tiny_models.HIDDEN + (6 + 10) * 16 + 10 * tiny_models.HIDDEN


def test_many_experts_are_found_quickly():
    """DeepSeek-V3 itself: 14,848 experts in 58 layers; 0.3 s on one core."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3"))
    start = time.process_time()
    modules = find_units(model)
    assert time.process_time() - start < 2
    assert sum(m.expert is not None for m in modules) == 58 * 256
    assert sum(m.units * m.cost for m in modules if m.expert is not None) == 58 * 256 * 3 * 2048 * 7168


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
        ("deepseek_v3", "self_attn.kv_b_proj", (60, 16), "kv_b_proj 60 rows, .* not make heads of v_head_dim 10"),
        ("deepseek_v3", "self_attn.q_b_proj", (61, 20), "q_b_proj has 61 rows"),
        ("deepseek_v3", "self_attn.o_proj", (48, 64), "o_proj 64 inputs"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model_type, module, shape, match):
    model = meta_model(model_type)
    decoder_layers(model)[1][0].get_submodule(module).weight = nn.Parameter(torch.empty(shape, device="meta"))
    with pytest.raises(SsahError, match=match) as caught:
        find_units(model)
    one_line(caught)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        pytest.param("mixtral", {"down_proj": (4, 24, 48)}, id="transposed"),
        pytest.param("gpt_oss", {"gate_up_proj": (4, 24, 48)}, id="half"),
        pytest.param("gpt_oss", {"gate_up_proj": None, "gate_up_proj_blocks": (4, 48, 2, 16)}, id="mxfp4"),
        pytest.param("qwen3_moe", {"gate_up_proj_scale_inv": (4, 1, 1)}, id="fp8"),
    ],
)
def test_experts_that_are_kept_in_another_way_are_refused(model_type, change):
    model = meta_model(model_type)
    for name, shape in change.items():
        parameter = None if shape is None else nn.Parameter(torch.empty(shape, device="meta"))
        model.model.layers[1].mlp.experts.register_parameter(name, parameter)
    with pytest.raises(SsahError, match=r"'model\.layers\.1\.mlp\.experts' .*transformers' gate_up_proj") as caught:
        find_units(model)
    one_line(caught)


def test_experts_with_code_of_their_own_are_refused():
    class OwnExperts(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    model = meta_model("mixtral")
    model.model.layers[1].mlp.experts = OwnExperts(model.model.layers[1].mlp.experts)
    with pytest.raises(SsahError, match=r"OwnExperts\) does not hold its experts as transformers'") as caught:
        find_units(model)
    one_line(caught)
