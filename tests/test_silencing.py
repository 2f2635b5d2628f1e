"""Silencing units at the reader's input is zeroing its weight's columns, in every architecture and for every row."""

import copy

import pytest
import torch
from test_experts import experts_modules, one_by_one
from tiny_models import KV_HEADS, MODEL_TYPES, VOCABULARY, tiny_model
from tiny_units import tiny_units

from ssah_fast import experts
from ssah_fast.errors import SsahError
from ssah_fast.silencing import check_layouts, silenced
from ssah_fast.units import find_units


def some_units(model, seed=0, attention_unit="channel"):
    units = tiny_units(model, attention_unit, seed)
    return units.layouts, {name: values == 3 for name, values in units.category.items()}


def with_zeroed_columns(model, layouts, variant):
    edited = copy.deepcopy(model)
    parameters = dict(edited.named_parameters())
    with torch.no_grad():
        for name, chosen in variant.items():
            part = layouts[name].channels
            indices = part.indices(layouts[name].units)[chosen].flatten()
            weight = parameters[part.parameter]
            # Of experts [e, ..., i, ...] the index e * size + i along the axis.
            lines = weight.movedim(part.axis, 1).flatten(0, 1) if part.stacked else weight.movedim(part.axis, 0)
            lines = lines.clone()
            lines[indices] = 0
            size = weight.shape[part.axis]
            back = lines.unflatten(0, (-1, size)).movedim(1, part.axis) if part.stacked else lines.movedim(0, part.axis)
            weight.copy_(back)
    return edited


def batch(rows=3, tokens=7):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_silencing_is_zeroing_the_columns(name):
    model = tiny_model(name)
    layouts, variant = some_units(model)
    before = logits(model, batch())
    edited = with_zeroed_columns(model, layouts, variant)
    # gpt-oss's experts, run one by one, sum in another order (see test_experts): there on both sides.
    modules = experts_modules(edited).values() if name == "gpt_oss" else ()
    with experts.replaced({module: one_by_one(module) for module in modules}):
        expected = logits(edited, batch())
    with silenced(model, layouts, [variant]):
        out = logits(model, batch())
    assert torch.equal(out, expected)
    assert not torch.allclose(out, before)
    assert torch.equal(logits(model, batch()), before)  # no hook is left, no weight was touched


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_heads_as_units(name):
    model = tiny_model(name)
    layouts, variant = some_units(model, attention_unit="head")
    variant = {key: torch.arange(layouts[key].units) % 2 == 0 for key in variant}
    expected = logits(with_zeroed_columns(model, layouts, variant), batch())
    with silenced(model, layouts, [variant]):
        assert torch.equal(logits(model, batch()), expected)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_silencing_a_unit_is_zeroing_the_rows_that_write_it(kind):
    """Of a gated MLP, and of values shared by several query heads: nothing else of the module changes."""
    model = tiny_model("llama")
    layouts, variant = some_units(model)
    variant = {name: chosen for name, chosen in variant.items() if layouts[name].kind == kind}
    edited = copy.deepcopy(model)
    parameters = dict(edited.named_parameters())
    with torch.no_grad():
        for name, chosen in variant.items():
            for part in (part for part in layouts[name].slices if part != layouts[name].channels):
                parameters[part.parameter][part.indices(layouts[name].units)[chosen].flatten()] = 0
    with silenced(model, layouts, [variant]):
        assert torch.equal(logits(model, batch()), logits(edited, batch()))


def test_a_value_channel_is_all_its_query_heads_and_no_other():
    model = tiny_model("llama")
    layouts = {layout.name: layout for layout in find_units(model)}
    attention, seen = layouts["model.layers.0.self_attn"], []
    reader = model.get_submodule(attention.reader)
    variant = {attention.name: torch.arange(attention.units) == 1}
    with silenced(model, layouts, [variant]):
        handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        logits(model, batch())
        handle.remove()
    silent = (seen[0] == 0).all(dim=(0, 1)).nonzero().squeeze(1).tolist()
    head_dim, queries = model.config.head_dim, model.config.num_attention_heads
    assert silent == [head * head_dim + 1 for head in range(queries // KV_HEADS)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_each_row_has_its_own_variant(name):
    """Bits for bits where the shapes are the same; of experts, whose products have as many rows as tokens, nearly."""
    model, ids = tiny_model(name), batch(rows=4)
    layouts, first = some_units(model)
    second = some_units(model, seed=1)[1]
    variants, rows = [{}, first, second], [1, 0, 2, 1]
    with silenced(model, layouts, variants, rows):
        together = logits(model, ids)
    for number, variant in enumerate(variants):
        with silenced(model, layouts, [variant]):
            alone = logits(model, ids)
        for row in (i for i, own in enumerate(rows) if own == number):
            if name == "qwen2_moe":
                torch.testing.assert_close(together[row], alone[row])
            else:
                assert torch.equal(together[row], alone[row])


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_the_mean_takes_the_place_of_zero(name):
    model = tiny_model(name, torch.bfloat16)
    layouts, variant = some_units(model)
    zeros = {key: torch.zeros(layout.inputs().numel(), dtype=torch.float64) for key, layout in layouts.items()}
    with silenced(model, layouts, [variant]):
        expected = logits(model, batch())
    with silenced(model, layouts, [variant], means=zeros):
        assert torch.equal(logits(model, batch()), expected)
    ones = {key: torch.ones_like(value) for key, value in zeros.items()}
    layout = next(reversed(layouts.values()))
    inputs = layout.inputs()[variant[layout.name]].flatten()
    with silenced(model, layouts, [variant], means=ones):
        assert not torch.equal(logits(model, batch()), expected)
        if layout.expert is None:
            seen = []
            handle = model.get_submodule(layout.reader).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
            logits(model, batch())
            handle.remove()
            assert (seen[0][..., inputs] == 1).all()


def test_generation_with_a_cache_takes_the_rows_of_the_batch():
    model, ids = tiny_model("mixtral"), batch(rows=2)
    layouts, variant = some_units(model)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with silenced(model, layouts, [{}, variant], [0, 1]):
        together = model.generate(ids, **how)
    with silenced(model, layouts, [variant]):
        assert torch.equal(model.generate(ids, **how)[1], together[1])
    assert torch.equal(model.generate(ids, **how)[0], together[0])


def test_what_does_not_fit_is_refused():
    model = tiny_model("llama")
    layouts, variant = some_units(model)
    with pytest.raises(SsahError, match=r"variants\[1\]: model.layers.9.mlp is torch.bool \[3\], but has 0 units"):
        with silenced(model, layouts, [{}, {"model.layers.9.mlp": torch.ones(3, dtype=torch.bool)}]):
            pass
    with pytest.raises(SsahError, match=r"rows=\[0, 1\] names a variant"), silenced(model, layouts, [variant], [0, 1]):
        pass
    before = logits(model, batch())
    with pytest.raises(SsahError, match="rows has 4 entries, but the batch's 21 tokens"):
        with silenced(model, layouts, [variant], [0, 0, 0, 0]):
            logits(model, batch())
    assert torch.equal(logits(model, batch()), before)


@pytest.mark.parametrize("attention_unit", ["channel", "head"])
def test_units_of_another_model_are_refused(attention_unit):
    layouts = tiny_units(tiny_model("llama"), attention_unit).layouts
    check_layouts(tiny_model("mistral"), layouts)  # the same in all that counts
    with pytest.raises(SsahError, match=r"units of another model: model\.layers\.0\.self_attn is not the same"):
        check_layouts(tiny_model("llama", num_key_value_heads=3), layouts)
    with pytest.raises(SsahError, match=r"model\.layers\.0\.mlp\.experts\.0"):
        check_layouts(tiny_model("mixtral"), layouts)
