"""Routed experts: each scored on its own tokens, by the model's own arithmetic, and the model left as it was."""

import pytest
import torch
from plain_experts import experts_output
from test_scoring import Capture, collect, flap, make_batches, make_sequences
from tiny_models import tiny_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ssah_fast import experts, ops
from ssah_fast.categories import Category
from ssah_fast.collector import Collector
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.partition import identify
from ssah_fast.scores import Scores
from ssah_fast.units import find_units

TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
TOP_K = 2


def experts_modules(model):
    return {name: module for name, module in model.named_modules() if name.endswith("mlp.experts")}


def one_by_one(module):
    return lambda *args: experts.run(module, *args, lambda expert, gate_up, rows: module._apply_gate(gate_up))


def decoded(model):
    (batch,) = make_batches(make_sequences()[:1], 5)
    with torch.no_grad():
        return model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TYPES)
def test_the_outputs_are_those_of_transformers(name, dtype, monkeypatch):
    monkeypatch.setattr(experts.matmul, "emulates_bf16", lambda: False)
    model = tiny_model(name, dtype)
    expected = decoded(model)
    with experts.replaced({module: one_by_one(module) for module in experts_modules(model).values()}):
        out = decoded(model)
    if name == "gpt_oss":  # its weights are [in, out], where torch's product of a group sums in another order
        torch.testing.assert_close(out, expected)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", TYPES)
def test_the_outputs_are_those_of_a_plain_loop(name):
    model = tiny_model(name, torch.float64)
    seen = []
    for module in experts_modules(model).values():
        module.register_forward_hook(lambda module, args, out: seen.append((experts_output(module, *args), out)))
    with experts.replaced({module: one_by_one(module) for module in experts_modules(model).values()}):
        decoded(model)
    assert len(seen) == len(experts_modules(model))
    for plain, out in seen:
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TYPES)
def test_counted_are_the_routed_tokens_and_no_padding(name):
    model, sets = tiny_model(name), make_sequences()
    scores = collect(model, batches=make_batches(sets))
    counted = [sum(sum(sequence.counted) for sequence in sequences) for sequences in sets]
    pools = {}
    for module in scores.values():
        pools.setdefault(module.layout.pool, []).append(module)
    for modules in pools.values():
        routed = TOP_K if modules[0].layout.expert is not None else 1
        assert sum(module.total_count() for module in modules).tolist() == [routed * n for n in counted]


def test_the_batch_size_does_not_matter():
    model = tiny_model("qwen2_moe", torch.float64)
    alone, *others = (collect(model, batches=make_batches(make_sequences(), size)) for size in (1, 3, 8))
    for other in others:
        for name, module in alone.items():
            assert torch.equal(module.count, other[name].count)
            torch.testing.assert_close(other[name].importance, module.importance, rtol=1e-9, atol=0)


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_half_precision_is_close_to_the_captures_of_the_same_run(name, emulated, monkeypatch):
    monkeypatch.setattr(experts.matmul, "emulates_bf16", lambda: emulated)
    model, batches = tiny_model(name, torch.bfloat16), make_batches(make_sequences())
    with Capture(model, batches) as seen:
        scores = collect(model, batches=batches, stop_early=False)
    for layout in seen.layouts:
        for s in range(2):
            expected = seen.importance(layout, s)
            error = (scores[layout.name].importance[s] - expected).norm() / expected.norm().clamp(min=1e-9)
            assert error < 0.01, (layout.name, error)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_known_gates_run_fused(name, monkeypatch):
    """And the model's own gate where it is another function, as gpt-oss's."""
    fused, plain = [], []
    gated_moments, channel_moments = ops.gated_moments_, ops.channel_moments_
    monkeypatch.setattr(ops, "gated_moments_", lambda *args: fused.append(args[6]) or gated_moments(*args))
    monkeypatch.setattr(ops, "channel_moments_", lambda *args: plain.append(1) or channel_moments(*args))
    model, batches = tiny_model(name), make_batches(make_sequences())
    collect(model, batches=batches)
    layers = len(model.model.layers)
    runs = sum(layout.expert is not None for layout in find_units(model)) * len(batches)
    attention = layers * len(batches)
    if name == "gpt_oss":
        assert not fused
        assert attention < len(plain) <= attention + runs
    else:
        assert len(plain) == attention
        assert set(fused) == {"silu"}
        dense = 2 * len(batches) if name == "deepseek_v3" else 0  # a dense layer and the shared experts of the other
        assert dense < len(fused) <= dense + runs


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_the_forward_ends_when_the_last_module_was_seen(name):
    model = tiny_model(name)
    last = find_units(model)[-1]
    model.model.norm.register_forward_pre_hook(lambda *_: pytest.fail("the final norm ran"))
    if last.expert is None:
        model.get_submodule(last.reader).register_forward_hook(lambda *_: pytest.fail("the last reader ran"))
    assert set(collect(model)) == {layout.name for layout in find_units(model)}


def without(model, expert):
    """No token is routed to the expert."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("router.bias", "e_score_correction_bias")):
            tensor.data[expert] = -1e4
    return model


# DeepSeek-V3 chooses a group of experts first: the other one of the pair has no tokens either.
@pytest.mark.parametrize(("name", "experts_left"), [("gpt_oss", {0, 1, 2}), ("deepseek_v3", {0, 1})])
@pytest.mark.parametrize("estimator", ["variance", "norm", "flap"])
def test_an_expert_without_tokens_is_unobserved(name, experts_left, estimator, tmp_path):
    model, sets = without(tiny_model(name), 3), make_sequences()
    batches = sorted(make_batches(sets, 1), key=lambda batch: batch.sequences)
    modules = collect(model, estimator=estimator, batches=batches)
    Scores(modules, {}, estimator).save(tmp_path / "scores")
    scores = Scores.load(tmp_path / "scores")
    units = identify(scores, scu=0.1, ucu=0.1, ru=0.1)
    unseen = [layout for layout in find_units(model) if layout.expert not in {None, *experts_left}]
    assert unseen
    for layout in unseen:
        assert scores.count[layout.name].tolist() == [0, 0]
        assert scores.safety[layout.name].eq(0).all()
        assert units.category[layout.name].eq(Category.UNOBSERVED).all()
    assert units.count("unobserved") == sum(layout.units for layout in unseen)


def test_flap_takes_the_sequences_that_reached_the_expert():
    model, sets = tiny_model("mixtral", torch.float64), make_sequences()
    batches = sorted(make_batches(sets, 1), key=lambda batch: batch.sequences)
    with Capture(model, batches) as seen:
        scores = collect(model, estimator="flap", batches=batches, stop_early=False)
    for layout in (layout for layout in seen.layouts if layout.expert is not None):
        parts = iter(zip(seen.inputs[layout.name], seen.groups[layout.name], strict=True))
        for s, sequences in enumerate(sets):
            reached = [x[group >= 0] for x, group in (next(parts) for _ in sequences)]
            reached = [x for x in reached if len(x)]
            assert len(reached) > 1
            spread, mean = flap(reached)
            module = scores[layout.name]
            torch.testing.assert_close(module.m2[s, 2], spread, rtol=1e-12, atol=0)
            torch.testing.assert_close(module.mean[s, 2], mean, rtol=1e-12, atol=1e-14)


class Broken(Exception):
    pass


@pytest.mark.parametrize("fault", [None, Broken, "nan"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_the_model_is_left_as_it_was(fault, implementation):
    model = tiny_model("mixtral").train()
    model.set_experts_implementation(implementation)
    calls = []

    def fail(*_):
        calls.append(model.config._experts_implementation)
        if len(calls) == 3 and fault is Broken:
            raise Broken

    if fault == "nan":
        with torch.no_grad():
            model.model.embed_tokens.weight[:] = float("nan")
    model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    config = dict(vars(model.config))
    parameters = [(p, p.data_ptr(), p._version) for p in model.parameters()]
    expected = {Broken: Broken, "nan": NonFiniteError}.get(fault)
    if expected is None:
        collect(model)
    else:
        with pytest.raises(expected):
            collect(model)
    assert set(calls) == {experts.IMPLEMENTATION}
    assert vars(model.config) == config
    assert model.config._experts_implementation == implementation
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert all(module.training for module in model.modules())
    for p, (same, pointer, version) in zip(model.parameters(), parameters, strict=True):
        assert p is same
        assert (p.data_ptr(), p._version) == (pointer, version)
    assert not experts._FORWARDS


def test_a_nan_names_the_expert():
    model = tiny_model("gpt_oss")
    first = next(iter(experts_modules(model).values()))
    first.register_forward_pre_hook(lambda _, args: (args[0] * float("nan"), *args[1:]))
    with pytest.raises(NonFiniteError, match=r"activations of expert \d of model\.layers\.0\.mlp\.experts, input chan"):
        collect(model)


def test_experts_that_do_not_run_are_an_error():
    model = tiny_model("gpt_oss")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: (x, None)  # as a kernel from the hub replaces the whole block
    collector = Collector(model, find_units(model), "variance")
    with pytest.raises(SsahError, match=r"^model: model\.layers\.1\.mlp\.experts did not run; .* kernels") as caught:
        collector.run(make_batches(make_sequences()))
    assert "\n" not in str(caught.value)
    assert model.config._experts_implementation == "grouped_mm"


def test_weights_are_looked_up_when_the_experts_run():
    """As streaming needs it: they come after the watching began, and are others in the end."""
    model = tiny_model("mixtral")
    modules = experts_modules(model)
    with experts.replaced({module: one_by_one(module) for module in modules.values()}):
        first = decoded(model)
        for module in modules.values():
            module.down_proj = torch.nn.Parameter(2 * module.down_proj.detach())
        assert not torch.allclose(decoded(model), first)
    assert experts.IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS
