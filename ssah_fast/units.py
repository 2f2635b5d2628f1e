"""What a unit is in each architecture: which slices of which parameters.

A unit is index j of a depth-2 module f(X) = B sigma(A X) (SSAH, Li & Kim, arXiv 2410.10862): the rows of A that
produce channel j and the column of B that reads it. Two kinds:

- MLP neuron: gate row j, up row j (and their biases), down column j.
- attention, ``channel`` (default): one value row (kv, c) with its bias, and the output columns it feeds. With grouped
  queries one value row serves g = query heads / KV heads of them: ``{h * head_dim + c : h // g == kv}``.
- attention, ``head``: one whole KV group: g query heads, one key head, one value head, and their output columns.

A routed expert is an MLP of its own, whose weights are one slice of 3-D parameters that all experts of a layer share.
Multi-head latent attention (DeepSeek) has one value head per query head, expanded from a latent that all heads share:
the rows of the expansion belong to units, those that write the latent to none.

``FAMILIES`` says where each family of architectures keeps these weights; every size comes from the modules themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ssah_fast.errors import SsahError

ATTENTION_UNITS = ("channel", "head")
# What DDP and DataParallel, torch.compile, FSDP1 and activation checkpointing insert into module names.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Slice:
    """Which indices of one parameter's axis belong to unit u.

    They are ``start + (u // block) * outer + (u % block) * inner + r * step`` for r = 0 .. repeat - 1.

    Attributes:
        parameter: Canonical name, as in ``model.named_parameters()``.
        axis: The axis that is indexed.
        width: Parameters per index (numel / number of indices).
        start: First index of unit 0.
        block: Units per block: ``head_dim`` for value channels, else 1.
        outer: Distance between blocks.
        inner: Distance between units of one block.
        repeat: Indices per unit.
        step: Distance between the indices of one unit.
        stacked: The parameter is a stack of one tensor per expert along its first axis; index ``e * size + i`` means
            index i along ``axis`` (1 or more, of that size) in expert e.
    """

    parameter: str
    axis: int
    width: int
    start: int = 0
    block: int = 1
    outer: int = 1
    inner: int = 0
    repeat: int = 1
    step: int = 1
    stacked: bool = False

    def indices(self, units: int) -> torch.Tensor:
        """All indices along ``axis``, int64 [units, repeat]; row u belongs to unit u."""
        unit = torch.arange(units).unsqueeze(1)
        return (
            self.start
            + unit // self.block * self.outer
            + unit % self.block * self.inner
            + torch.arange(self.repeat) * self.step
        )


@dataclass(frozen=True)
class GatedMLP:
    """A gated MLP known to compute exactly ``down(act(gate(x)) * up(x))``, so that scoring may fuse its middle.

    Attributes:
        module: Name of the MLP module.
        activation: "silu", "gelu" (exact), "gelu_tanh" or "relu", rounded as torch.nn.functional rounds it.
        gate: Name of the gate projection, or of the fused one.
        up: Name of the up projection; None where ``gate`` is fused, with rows [gate; up].
        down: Name of the down projection.
    """

    module: str
    activation: str
    gate: str
    up: str | None
    down: str


@dataclass(frozen=True)
class UnitModule:
    """The units of one depth-2 module.

    Attributes:
        name: Key in scores and unit files: the reader's parent module ("model.layers.0.mlp",
            "model.layers.0.self_attn"), or the reader itself where it hangs directly on the decoder layer
            ("model.decoder.layers.0.fc2"); for an expert the module of all experts and its number
            ("model.layers.0.mlp.experts.5").
        kind: "mlp" or "attention".
        layer: Index of the decoder layer.
        units: Number of units.
        reader: The module B, whose INPUT channels carry the units ("model.layers.0.mlp.down_proj"); for an expert the
            module of all experts ("model.layers.0.mlp.experts"), whose ``down_proj`` is a parameter.
        channels: The slice of the reader's weight, also one of ``slices``. Its indices ARE the reader's input channels
            (see ``inputs`` for experts).
        slices: Every parameter slice of a unit. The reader's own bias belongs to no unit.
        gated: How to run the middle of the module fused; None where that is not known to be right.
        expert: Number of the expert; None for a module that is none.
    """

    name: str
    kind: str
    layer: int
    units: int
    reader: str
    channels: Slice
    slices: tuple[Slice, ...]
    gated: GatedMLP | None = None
    expert: int | None = None

    @property
    def pool(self) -> str:
        """What the module competes in: the experts of one layer share a name, any other module has its own."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]

    def inputs(self) -> torch.Tensor:
        """The input channels of B that belong to each unit, int64 [units, repeat]; each expert's count from 0."""
        indices = self.channels.indices(self.units)
        return indices if self.expert is None else indices - self.expert * self.units

    @property
    def cost(self) -> int:
        """Parameters per unit; without biases 3d (gated MLP), (1 + g)d (channel), (2g + 2) * d * head_dim (head)."""
        return sum(part.width * part.repeat for part in self.slices)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file's header; ``gated`` is left out, as it describes code and not parameters."""
        stored = asdict(self)
        del stored["gated"]
        return stored

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> UnitModule:
        """The inverse of ``to_json``, with ``gated`` None.

        Raises:
            KeyError, TypeError: ``stored`` does not come from ``to_json``; the caller knows which file to name.
        """
        channels, slices = Slice(**stored["channels"]), tuple(Slice(**part) for part in stored["slices"])
        return cls(**{**stored, "channels": channels, "slices": slices})


@dataclass(frozen=True)
class Attention:
    """Where a family keeps its attention weights.

    Value channel c of a head must reach its input channel of the reader unmixed: no norm and no gate in between.

    Attributes:
        module: Name inside the decoder layer.
        qkv: The three projections, or the single fused one, with rows [all queries; all keys; all values].
        interleaved: The fused one has rows [its queries; key; value] per KV group instead.
        reader: The output projection.
        separable: False where q and k are normalised across all heads (OLMo 2), so that removing the rows of one
            head would rescale the others.
        per_head: Parameters of the module itself with one element per query head.
    """

    module: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    interleaved: bool = False
    reader: str = "o_proj"
    separable: bool = True
    per_head: tuple[str, ...] = ()


@dataclass(frozen=True)
class LatentAttention:
    """Where a family keeps the weights of multi-head latent attention.

    Attributes:
        module: Name inside the decoder layer.
        queries: The projection with one block of rows per head: the first of these that is there.
        values: The expansion of the latent, rows [key without rotation; value] per head.
        reader: The output projection.
        separable: As for ``Attention``.
    """

    module: str = "self_attn"
    queries: tuple[str, ...] = ("q_b_proj", "q_proj")
    values: str = "kv_b_proj"
    reader: str = "o_proj"
    separable: bool = True


@dataclass(frozen=True)
class MLP:
    """Where a family keeps its MLP weights.

    Attributes:
        module: Name inside the decoder layer; "" where the projections hang directly on the layer.
        writers: The projections that produce the hidden channels, gate before up.
        fused: How many rows of each writer a unit has, one per block of rows: 2 where one writer holds [gate; up].
        reader: The down projection.
        activation: Name of the activation module inside ``module``.
    """

    module: str = "mlp"
    writers: tuple[str, ...] = ("gate_proj", "up_proj")
    fused: int = 1
    reader: str = "down_proj"
    activation: str = "act_fn"


@dataclass(frozen=True)
class Experts:
    """Where a family keeps its routed experts: transformers' ``gate_up_proj`` and ``down_proj``, 3-D parameters.

    Attributes:
        module: Name inside the decoder layer; a layer that has no such module is dense.
        interleaved: ``gate_up_proj`` holds gate and up in turn, instead of all gates before all ups.
        transposed: One expert's weights are [in, out] instead of [out, in].
    """

    module: str = "mlp.experts"
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One entry of ``FAMILIES``.

    Attributes:
        mlp_class: config.model_type -> the class in transformers whose forward is exactly
            ``down(act(gate(x)) * up(x))`` (see ``GatedMLP``), or None: always right, only slower to score.
        attention: Where the attention weights are.
        mlp: Where the MLP weights of a dense layer are.
        sparse: What a layer with experts has instead of it, in the order in which it runs: the routed experts, and
            where there are shared ones, which every token passes, those as an MLP.
        transposed: Weights are [in, out] (transformers' Conv1D) instead of [out, in].
    """

    mlp_class: Mapping[str, str | None]
    attention: Attention | LatentAttention = Attention()
    mlp: MLP = MLP()
    sparse: tuple[MLP | Experts, ...] = ()
    transposed: bool = False


_CANONICAL = {
    "cohere": "CohereMLP",
    "cohere2": "Cohere2MLP",
    "ernie4_5": "Ernie4_5MLP",
    "exaone4": "Exaone4MLP",
    "gemma": "GemmaMLP",
    "gemma2": "Gemma2MLP",
    "gemma3_text": "Gemma3MLP",
    "granite": "GraniteMLP",
    "helium": "HeliumMLP",
    "llama": "LlamaMLP",
    "ministral": "MinistralMLP",
    "ministral3": "Ministral3MLP",
    "mistral": "MistralMLP",
    "olmo": "OlmoMLP",
    "qwen2": "Qwen2MLP",
    "qwen3": "Qwen3MLP",
    "seed_oss": None,  # applies a dropout of its own after down_proj
    "smollm3": "SmolLM3MLP",
    "stablelm": "StableLmMLP",
}
_FUSED_MLP = MLP(writers=("gate_up_proj",), fused=2, activation="activation_fn")

FAMILIES: tuple[Family, ...] = (
    Family(_CANONICAL),
    Family({"olmo2": "Olmo2MLP", "olmo3": "Olmo3MLP"}, Attention(separable=False)),
    Family({"arcee": None, "nemotron": None}, mlp=MLP(writers=("up_proj",))),
    Family({"starcoder2": None}, mlp=MLP(writers=("c_fc",), reader="c_proj")),
    Family({"phi": None}, Attention(reader="dense"), MLP(writers=("fc1",), reader="fc2")),
    Family({"glm": "GlmMLP", "glm4": "Glm4MLP"}, mlp=_FUSED_MLP),
    Family({"phi3": "Phi3MLP"}, Attention(qkv=("qkv_proj",)), _FUSED_MLP),
    Family(
        {"gpt_neox": None},
        Attention(module="attention", qkv=("query_key_value",), interleaved=True, reader="dense"),
        MLP(writers=("dense_h_to_4h",), reader="dense_4h_to_h"),
    ),
    Family(
        {"gpt2": None},
        Attention(module="attn", qkv=("c_attn",), reader="c_proj"),
        MLP(writers=("c_fc",), reader="c_proj"),
        transposed=True,
    ),
    Family({"opt": None}, Attention(reader="out_proj"), MLP(module="", writers=("fc1",), reader="fc2")),
    Family({"mixtral": None, "qwen3_moe": "Qwen3MoeMLP"}, sparse=(Experts(),)),
    Family({"olmoe": None}, Attention(separable=False), sparse=(Experts(),)),
    Family({"qwen2_moe": "Qwen2MoeMLP"}, sparse=(MLP(module="mlp.shared_expert"), Experts())),
    Family({"gpt_oss": None}, Attention(per_head=("sinks",)), sparse=(Experts(interleaved=True, transposed=True),)),
    Family(
        {"deepseek_v3": "DeepseekV3MLP"},
        LatentAttention(),
        sparse=(Experts(), MLP(module="mlp.shared_experts")),
    ),
)


def canonical_name(name: str) -> str:
    """A name without what wrappers insert (``module.``, ``_orig_mod.``, ...), anywhere in the dotted path."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's decoder layers and their canonical name, e.g. ("model.layers", ModuleList).

    The layers are the outermost ModuleList of the decoder that has config.num_hidden_layers entries.

    Raises:
        SsahError: ``model`` has no decoder, or its decoder has no such list.
    """
    decoder = text_decoder(model)
    depth = getattr(decoder.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise SsahError(
            f"model: {type(decoder).__name__} has no ModuleList with num_hidden_layers = {depth} entries; "
            "pass a decoder-only transformers model"
        )
    layers = min(lists, key=lambda found: canonical_name(found[0]).count("."))[1]
    return next(canonical_name(name) for name, module in model.named_modules() if module is layers), layers


def supported_architectures() -> list[str]:
    """Every config.model_type that ``FAMILIES`` covers, sorted."""
    return sorted(model_type for family in FAMILIES for model_type in family.mlp_class)


def check_architecture(model_type: str) -> None:
    """Refuse an architecture that ``FAMILIES`` does not cover, before its weights are read.

    Args:
        model_type: Of the text decoder's config.

    Raises:
        SsahError: It is not supported; the message lists those that are and says how to add one.
    """
    _family(model_type)


def find_units(model: nn.Module, attention_unit: str = "channel") -> list[UnitModule]:
    """The units of every attention and MLP module, in forward order: layer 0 attention, layer 0 MLP, layer 1 ...

    A layer with experts has one module per routed expert, and one for its shared experts, instead of one MLP.

    Only shapes are read, so a model on the meta device will do. A wrapped model (DataParallel, torch.compile,
    activation checkpointing) gives the same layout as the bare one.

    Args:
        model: A transformers causal language model, or the text decoder inside a larger one.
        attention_unit: "channel" (a value channel) or "head" (a whole KV group).

    Raises:
        SsahError: ``attention_unit`` or the architecture is unknown, or a module is not what its entry says.
    """
    if attention_unit not in ATTENTION_UNITS:
        raise SsahError(f"attention_unit: {attention_unit!r} is not known; use one of {', '.join(ATTENTION_UNITS)}")
    config = text_decoder(model).config.get_text_config()
    family = _family(config.model_type)
    if attention_unit == "head" and not family.attention.separable:
        raise SsahError(
            f"attention_unit: 'head' is not possible for {config.model_type!r}, whose q and k are normalised across "
            "all heads; use 'channel'"
        )
    prefix, layers = decoder_layers(model)
    # A wrapped module is listed after its wrapper, so that it takes their common name.
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    resolver = _Resolver(modules, family, config)
    return [
        found for layer in range(len(layers)) for found in _layer(resolver, f"{prefix}.{layer}", layer, attention_unit)
    ]


@dataclass(frozen=True)
class _Projection:
    """One linear module: ``outputs`` rows and ``inputs`` columns, wherever its weight keeps them."""

    name: str
    outputs: int
    inputs: int
    bias: bool
    transposed: bool

    def rows(self, **where: Any) -> tuple[Slice, ...]:
        """Slices of output rows: of the weight and, if there is one, of the bias."""
        weight = Slice(f"{self.name}.weight", int(self.transposed), self.inputs, **where)
        return (weight, Slice(f"{self.name}.bias", 0, 1, **where)) if self.bias else (weight,)

    def columns(self, **where: Any) -> Slice:
        """Slice of the weight's input columns."""
        return Slice(f"{self.name}.weight", 1 - int(self.transposed), self.outputs, **where)


def text_decoder(model: nn.Module) -> Any:
    """The text decoder of a transformers model, wrapped or not.

    Raises:
        SsahError: It has none.
    """
    for module in model.modules():  # DataParallel and DDP hide the attributes of the model inside
        get_decoder = getattr(module, "get_decoder", None)
        if callable(get_decoder):
            return get_decoder()
    raise SsahError(
        f"model: {type(model).__name__} is no transformers language model; load it with AutoModelForCausalLM"
    )


def _family(model_type: str) -> Family:
    for family in FAMILIES:
        if model_type in family.mlp_class:
            return family
    raise SsahError(
        f"model: architecture {model_type!r} is not supported (supported: {', '.join(supported_architectures())}); "
        "to add one, add an entry to FAMILIES in ssah_fast/units.py"
    )


@dataclass(frozen=True)
class _Resolver:
    """Looks up what an entry of ``FAMILIES`` names in one model."""

    modules: Mapping[str, nn.Module]  # by canonical name
    family: Family
    config: Any

    @property
    def expected(self) -> str:
        return f"which the entry of {self.config.model_type!r} in FAMILIES (ssah_fast/units.py) expects"

    def projection(self, name: str) -> _Projection:
        if name not in self.modules:
            raise SsahError(
                f"model: no module {name!r}, {self.expected}; give this variant its own model_type and entry"
            )
        parameters = dict(self.modules[name].named_parameters(recurse=False))
        weight = parameters.get("weight")
        if weight is None or weight.ndim != 2:
            raise SsahError(
                f"model: no 2-D weight in {name!r}, {self.expected}; merge adapters, load without quantisation"
            )
        outputs, inputs = reversed(weight.shape) if self.family.transposed else weight.shape
        return _Projection(name, outputs, inputs, "bias" in parameters, self.family.transposed)

    def head_dim(self, name: str, reader: _Projection) -> int:
        """The attention module's own head_dim; where it has none (GPT-NeoX), the reader's share of one query head."""
        own = getattr(self.modules[name], "head_dim", None)
        return own or max(reader.inputs // self.config.num_attention_heads, 1)

    def gated(self, name: str, spec: MLP, reader: _Projection, writers: list[_Projection]) -> GatedMLP | None:
        """How to fuse the middle of MLP ``name``; None if the arithmetic of its class or activation is not known."""
        module = self.modules[name]
        known = (
            type(module).__name__ == self.family.mlp_class[self.config.model_type]
            and type(module).__module__.startswith("transformers.")  # remote code reuses the names
            and "forward" not in vars(module)  # replaced: by accelerate to move inputs, by Liger to run another kernel
        )
        activation = activation_name(getattr(module, spec.activation, None)) if known else None
        if activation is None:
            return None
        gate, *up = (writer.name for writer in writers)
        return GatedMLP(name, activation, gate, up[0] if up else None, reader.name)


def _layer(resolver: _Resolver, prefix: str, layer: int, unit: str) -> Iterator[UnitModule]:
    attention, sparse = resolver.family.attention, resolver.family.sparse
    if isinstance(attention, LatentAttention):
        yield _latent_attention(resolver, attention, prefix, layer, unit)
    else:
        yield _attention(resolver, attention, prefix, layer, unit)
    if not any(isinstance(spec, Experts) and f"{prefix}.{spec.module}" in resolver.modules for spec in sparse):
        sparse = (resolver.family.mlp,)
    for spec in sparse:
        if isinstance(spec, Experts):
            yield from _experts(resolver, spec, prefix, layer)
        else:
            yield _mlp(resolver, spec, prefix, layer)


def _attention(resolver: _Resolver, spec: Attention, prefix: str, layer: int, unit: str) -> UnitModule:
    name = f"{prefix}.{spec.module}"
    reader = resolver.projection(f"{name}.{spec.reader}")
    sources = [resolver.projection(f"{name}.{source}") for source in spec.qkv]
    head_dim = resolver.head_dim(name, reader)
    groups, sizes = _kv_groups(reader, sources, head_dim)
    group = sizes[0]  # as many columns of the reader as query rows
    strides, starts = sizes, (0, 0, 0)
    if len(sources) == 1:
        sources = sources * 3
        starts = (0, groups * group, groups * (group + head_dim))
        if spec.interleaved:
            strides, starts = (sum(sizes),) * 3, (0, group, group + head_dim)
    if unit == "channel":
        units = groups * head_dim
        rows = sources[2].rows(start=starts[2], block=head_dim, outer=strides[2], inner=1)
        channels = reader.columns(block=head_dim, outer=group, inner=1, repeat=group // head_dim, step=head_dim)
    else:
        units = groups
        heads = zip(sources, starts, strides, sizes, strict=True)
        rows = tuple(
            part for p, start, stride, size in heads for part in p.rows(start=start, outer=stride, repeat=size)
        )
        queries = group // head_dim
        rows += tuple(Slice(f"{name}.{own}", 0, 1, outer=queries, repeat=queries) for own in spec.per_head)
        channels = reader.columns(outer=group, repeat=group)
    return UnitModule(name, "attention", layer, units, reader.name, channels, (*rows, channels))


def _kv_groups(reader: _Projection, sources: list[_Projection], head_dim: int) -> tuple[int, tuple[int, int, int]]:
    """The number of KV groups, and the rows of q, k and v that one group has."""
    groups = (sum(source.outputs for source in sources) - reader.inputs) // (2 * head_dim)
    sizes = (reader.inputs // groups if groups > 0 else 0, head_dim, head_dim)
    outputs = [groups * sum(sizes)] if len(sources) == 1 else [groups * size for size in sizes]
    if [source.outputs for source in sources] != outputs or sizes[0] % head_dim or groups * sizes[0] != reader.inputs:
        shapes = ", ".join(f"{source.name} has {source.outputs} rows" for source in sources)
        raise SsahError(
            f"model: {shapes}, and {reader.name} {reader.inputs} inputs, which do not make heads of head_dim {head_dim}"
            "; load the model without quantisation, or correct head_dim in its config"
        )
    return groups, sizes


def _latent_attention(resolver: _Resolver, spec: LatentAttention, prefix: str, layer: int, unit: str) -> UnitModule:
    name = f"{prefix}.{spec.module}"
    writer = next((part for part in spec.queries if f"{name}.{part}" in resolver.modules), spec.queries[0])
    queries, values, reader = (resolver.projection(f"{name}.{part}") for part in (writer, spec.values, spec.reader))
    width = getattr(resolver.modules[name], "v_head_dim", 0)
    heads = reader.inputs // max(width, 1)
    sizes = [source.outputs // max(heads, 1) for source in (queries, values)]  # rows per head
    fits = [heads * size for size in (*sizes, width)] == [queries.outputs, values.outputs, reader.inputs]
    if not (heads and fits and sizes[1] > width):
        raise SsahError(
            f"model: {queries.name} has {queries.outputs} rows, {values.name} {values.outputs} rows, and {reader.name} "
            f"{reader.inputs} inputs, which do not make heads of v_head_dim {width}; load the model without "
            "quantisation, or correct v_head_dim in its config"
        )
    if unit == "channel":
        units = heads * width
        rows = values.rows(start=sizes[1] - width, block=width, outer=sizes[1], inner=1)
        channels = reader.columns()
    else:
        units = heads
        sources = zip((queries, values), sizes, strict=True)
        rows = tuple(part for source, size in sources for part in source.rows(outer=size, repeat=size))
        channels = reader.columns(outer=width, repeat=width)
    return UnitModule(name, "attention", layer, units, reader.name, channels, (*rows, channels))


def _mlp(resolver: _Resolver, spec: MLP, prefix: str, layer: int) -> UnitModule:
    parent = f"{prefix}.{spec.module}" if spec.module else prefix
    reader = resolver.projection(f"{parent}.{spec.reader}")
    writers = [resolver.projection(f"{parent}.{writer}") for writer in spec.writers]
    units = reader.inputs
    for writer in writers:
        if writer.outputs != spec.fused * units:
            raise SsahError(
                f"model: {writer.name!r} has {writer.outputs} rows, not {spec.fused} for each of the {units} inputs of "
                f"{reader.name!r}; load the model without quantisation"
            )
    written = [part for writer in writers for block in range(spec.fused) for part in writer.rows(start=block * units)]
    channels = reader.columns()
    name = parent if spec.module else reader.name
    gated = resolver.gated(parent, spec, reader, writers)
    return UnitModule(name, "mlp", layer, units, reader.name, channels, (*written, channels), gated)


def _experts(resolver: _Resolver, spec: Experts, prefix: str, layer: int) -> Iterator[UnitModule]:
    name = f"{prefix}.{spec.module}"
    module = resolver.modules[name]
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
    experts, hidden, units = _expert_sizes(shapes, spec)
    if not experts or not hasattr(module, "is_transposed"):  # which transformers' decorator of such modules sets
        raise SsahError(
            f"model: {name!r} ({type(module).__name__}) does not hold its experts as transformers' gate_up_proj and "
            f"down_proj, {resolver.expected}; load without quantisation and without kernels of its own"
        )
    writers = [(f"{name}.gate_up_proj", 2 if spec.transposed else 1, hidden)]
    if "gate_up_proj_bias" in shapes:
        writers.append((f"{name}.gate_up_proj_bias", 1, 1))
    reader, axis = f"{name}.down_proj", 1 if spec.transposed else 2
    outer, step = (2, 1) if spec.interleaved else (1, units)
    for expert in range(experts):
        written = (
            Slice(parameter, axis, width, start=2 * units * expert, outer=outer, repeat=2, step=step, stacked=True)
            for parameter, axis, width in writers
        )
        channels = Slice(reader, axis, hidden, start=units * expert, stacked=True)
        yield UnitModule(f"{name}.{expert}", "mlp", layer, units, name, channels, (*written, channels), expert=expert)


def _expert_sizes(shapes: Mapping[str, tuple[int, ...]], spec: Experts) -> tuple[int, int, int]:
    """Experts, hidden size and units per expert; zeros where the shapes are not those of the entry."""
    down = shapes.get("down_proj", ())
    if len(down) != 3:
        return 0, 0, 0
    experts, hidden, units = (down[0], down[2], down[1]) if spec.transposed else down
    gate_up = (hidden, 2 * units) if spec.transposed else (2 * units, hidden)
    biases = {"gate_up_proj_bias": (experts, 2 * units), "down_proj_bias": (experts, hidden)}
    weights = {"gate_up_proj": (experts, *gate_up), "down_proj": down}
    return (experts, hidden, units) if shapes in (weights, {**weights, **biases}) else (0, 0, 0)


def activation_name(module: nn.Module | None) -> str | None:
    """The name of an activation whose rounding is torch's own in every dtype; None for every other.

    transformers' NewGELUActivation and the "python" variants of its GELUs are left out: the same formula, but in
    several tensor operations, each of which rounds to bf16.
    """
    name, function = type(module).__name__, getattr(module, "act", None)
    if name in ("SiLU", "SiLUActivation"):
        return "silu"
    if name == "ReLU":
        return "relu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if name == "GELUActivation" and function is F.gelu:
        return "gelu"
    if name == "GELUTanh" and isinstance(function, functools.partial):
        return "gelu_tanh"
    return None
