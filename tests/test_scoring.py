"""Scoring: what the collector sees, what it leaves behind, and what `score` makes of it."""

import copy
import functools
import json
import random

import pytest
import torch
from plain_experts import expert_input
from tiny_models import MODEL_TYPES, VOCABULARY, tiny_model, tiny_tokenizer
from torch import nn

import ssah_fast
from ssah_fast import data, fingerprints, ops, score_plan
from ssah_fast.collector import Collector
from ssah_fast.data import Encoded
from ssah_fast.errors import NonFiniteError, OutOfMemoryError, SsahError
from ssah_fast.scores import Scores
from ssah_fast.units import find_units

# One per layout: grouped queries, wide heads, fused projections, interleaved heads, Conv1D, no module around the MLP.
NAMED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2", "opt")
UNITS = [(name, unit) for name in MODEL_TYPES for unit in ("channel", "head") if (name[:4], unit) != ("olmo", "head")]
UNITS.append(("olmo", "head"))  # OLMo 2 and 3 and OLMoE normalise q and k across heads; the first OLMo does not


def make_sequences(seed=0):
    """Two sets of sequences of many lengths; the first three tokens are not counted, and one in five of the rest."""
    rng = random.Random(seed)
    return [
        [
            Encoded([rng.randrange(3, VOCABULARY) for _ in range(n)], [i >= 3 and i % 5 != 0 for i in range(n)])
            for n in lengths
        ]
        for lengths in ((5, 9, 17, 23, 4), (11, 23, 6, 8))
    ]


def make_batches(sets, batch_size=3):
    return data.make_batches(sets, batch_size=batch_size, max_tokens=0, pad_id=0)


def collect(model, *, estimator="variance", unit="channel", batches=None, stop_early=True):
    collector = Collector(model, find_units(model, unit), estimator)
    collector._stop_early &= stop_early
    collector.run(make_batches(make_sequences()) if batches is None else batches)
    return collector.finish()


def variance(x):
    """Over rows; 0 of fewer than two, as some expert may have."""
    return x.var(0) if len(x) > 1 else x.new_zeros(x.shape[1])


class Capture:
    """Everything that the readers read, in float64, with the group of every row."""

    def __init__(self, model, batches, unit="channel"):
        self.layouts = find_units(model, unit)
        self.batches = batches
        self.weights = {layout.name: self.weight(model, layout) for layout in self.layouts}
        self.inputs = {layout.name: [] for layout in self.layouts}
        self.groups = {layout.name: [] for layout in self.layouts}
        self.hooks = [
            model.get_submodule(layout.reader).register_forward_pre_hook(functools.partial(self.see, layout))
            for layout in self.layouts
        ]

    def see(self, layout, module, args):
        group = self.batches[len(self.inputs[layout.name])].group.reshape(-1)
        x = args[0].flatten(0, -2)
        if layout.expert is not None:
            rows, x = expert_input(module, layout.expert, *args[:2])
            group = group[rows]
        self.inputs[layout.name].append(x.double())
        self.groups[layout.name].append(group)

    @staticmethod
    def weight(model, layout):
        weight, axis = model.get_parameter(layout.channels.parameter).double(), layout.channels.axis
        return weight.movedim(axis, 1) if layout.expert is None else weight[layout.expert].movedim(axis - 1, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def rows(self, layout, *groups):
        counted = torch.isin(torch.cat(self.groups[layout.name]), torch.tensor(groups, dtype=torch.int8))
        return torch.cat(self.inputs[layout.name])[counted]

    def importance(self, layout, s, spread=variance):
        channels = spread(self.rows(layout, 2 * s, 2 * s + 1)) * self.weights[layout.name].square().sum(0)
        return channels[layout.inputs()].sum(1)


def assert_close(actual, expected, relative):
    torch.testing.assert_close(actual, expected, rtol=relative, atol=0)


# exactness


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("name", "unit"), UNITS)
def test_scores_equal_float64_from_the_activations_of_the_same_run(name, unit, dtype, relative):
    model, batches = tiny_model(name, dtype=dtype), make_batches(make_sequences())
    assert [len(batch.sequences) for batch in batches] == [3, 3, 3]
    assert any(batch.attention_mask is not None for batch in batches)
    with Capture(model, batches, unit) as seen:
        scores = collect(model, unit=unit, batches=batches, stop_early=False)
    assert list(scores) == [layout.name for layout in seen.layouts]
    for layout in seen.layouts:
        module = scores[layout.name]
        for s in range(2):
            assert_close(module.importance[s], seen.importance(layout, s), relative)
            for half in range(2):
                x = seen.rows(layout, 2 * s + half)
                assert module.count[s, half] == len(x)
                mean, m2 = x.sum(0) / max(len(x), 1), variance(x) * (len(x) - 1)
                torch.testing.assert_close(module.mean[s, half], mean, rtol=relative, atol=relative)
                torch.testing.assert_close(module.m2[s, half], m2, rtol=relative, atol=relative)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_scores_equal_those_of_a_plain_forward(name):
    """The fused product, the early stop and the missing lm_head change nothing."""
    model, batches = tiny_model(name), make_batches(make_sequences())
    scores = collect(model, batches=batches)
    with Capture(model, batches) as seen, torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for layout in seen.layouts:
        relative = 3e-6 if layout.expert is None else 3e-5  # a few tokens, which may hardly differ
        for s in range(2):
            assert_close(scores[layout.name].importance[s], seen.importance(layout, s), relative)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", NAMED)
def test_the_batch_size_does_not_matter(name, dtype, relative):
    if name == "gemma2" and dtype == torch.float64:
        relative = 1e-6  # its own attention takes the softmax in fp32: a plain forward differs by 1e-7 with the padding
    model, sets = tiny_model(name, dtype=dtype), make_sequences()
    alone, *others = (collect(model, batches=make_batches(sets, size)) for size in (1, 3, 8))
    for other in others:
        for layout_name, module in alone.items():
            assert torch.equal(module.count, other[layout_name].count)
            assert_close(other[layout_name].importance, module.importance, relative)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_known_gated_mlps_run_fused(name, monkeypatch):
    calls = []
    fused = ops.gated_moments_
    monkeypatch.setattr(ops, "gated_moments_", lambda *args: calls.append(args[6]) or fused(*args))
    collect(tiny_model(name))
    assert calls == [{"gemma2": "gelu_tanh"}.get(name, "silu")] * 2 * 3  # layers x batches


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_the_forward_ends_with_the_last_reader(name):
    """Neither the last down projection nor lm_head runs: nobody reads what they write."""
    model = tiny_model(name)
    reader = model.get_submodule(find_units(model)[-1].reader)
    reader.register_forward_hook(lambda *_: pytest.fail("the last reader ran"))
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("lm_head ran"))
    collect(model)


def test_every_backend_gives_the_same_scores(monkeypatch):
    model = tiny_model("llama")
    fast = collect(model)
    monkeypatch.setenv("SSAH_FAST_BACKEND", "torch")
    for name, module in collect(model).items():
        assert_close(fast[name].importance, module.importance, 1e-5)


def test_a_half_precision_model_is_close_to_the_same_weights_in_fp32():
    for dtype, relative in ((torch.bfloat16, 0.1), (torch.float16, 0.01)):
        model = tiny_model("llama").to(dtype)
        narrow, wide = collect(model), collect(copy.deepcopy(model).float())
        for name, module in narrow.items():
            assert torch.isfinite(module.importance).all()
            error = (module.importance - wide[name].importance).norm() / wide[name].importance.norm()
            assert error < relative, (dtype, name, error)


# same bits


def test_threads_do_not_change_a_bit_of_the_moments():
    """Fed with the same activations: torch's own matrix products may differ with the number of threads."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3000, 700, generator=generator) for _ in range(2))
    group = torch.randint(-1, 4, (3000,), generator=generator, dtype=torch.int8)

    def moments(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            states = []
            for run in (ops.channel_moments_, lambda x, *rest: ops.gated_moments_(x, up, *rest)):
                state = torch.zeros(4, dtype=torch.int64), *torch.zeros(2, 4, 700, dtype=torch.float64)
                run(gate, group, *state)
                states += [*state, ops.column_norms(gate)]
            return states
        finally:
            torch.set_num_threads(before)

    for one, two in zip(moments(1), moments(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("estimator", ["variance", "norm", "flap"])
def test_two_runs_write_the_same_file(estimator, tmp_path):
    for name in "ab":
        run("llama", estimator=estimator).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# the model afterwards


def snapshot(model):
    """Everything about a model that scoring might leave behind."""
    modules = {
        name: (
            module.training,
            sorted(vars(module)),
            *(list(hooks.items()) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")),
        )
        for name, module in model.named_modules()
    }
    parameters = {
        name: (p.detach().clone().view(torch.int32), p.requires_grad, p.grad, p.data_ptr())
        for name, p in model.named_parameters()
    }
    return modules, parameters


def assert_untouched(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert all("forward" not in vars(module) for module in model.modules())
    for name, (values, *rest) in parameters.items():
        assert torch.equal(values, before[1][name][0])
        assert rest == list(before[1][name][1:])
        assert rest[1] is None


@pytest.mark.parametrize("estimator", ["variance", "flap"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_the_model_is_left_as_it_was(name, estimator):
    model = tiny_model(name).train()
    find = model.get_submodule(find_units(model)[1].reader)
    find.eval()  # one module apart from the others
    next(model.parameters()).requires_grad_(False)
    seen = []
    find.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    before = snapshot(model)
    run(model, estimator=estimator)
    assert_untouched(model, before)
    assert seen and not any(seen)


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("estimator", ["variance", "flap"])
def test_the_model_is_left_as_it_was_after_an_exception(name, estimator):
    model = tiny_model(name).train()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Broken

    model.get_submodule(find_units(model)[2].reader).register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(Broken):
        run(model, estimator=estimator, batch_size=2)
    assert len(calls) == 3
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_the_model_is_left_as_it_was_after_an_interruption(error):
    model = tiny_model("llama").train()
    before = snapshot(model)

    def interrupt(*_):
        raise error

    with pytest.raises((error, OutOfMemoryError)):
        run(model, progress=interrupt)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was_after_a_nan(name):
    model = tiny_model(name).train()
    with torch.no_grad():
        next(iter(model.parameters()))[:] = float("nan")
    before = snapshot(model)
    with pytest.raises(NonFiniteError):
        run(model)
    assert_untouched(model, before)


def test_a_model_in_training_mode_scores_as_in_evaluation_mode():
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = collect(model)
    for name, module in collect(model.train()).items():
        assert torch.equal(module.importance, expected[name].importance)


class Wrapper(nn.Module):
    """What torch.compile, FSDP and checkpointing do to names."""

    def __init__(self, name, inner):
        super().__init__()
        setattr(self, name, inner)


def test_wrappers_change_nothing():
    expected, model = run("llama"), tiny_model("llama")
    model.model.layers[0] = Wrap(model.model.layers[0])
    for wrapped in (nn.DataParallel(tiny_model("llama")), Wrapper("_orig_mod", tiny_model("llama")), model):
        scores = run(wrapped)
        assert list(scores.modules) == list(expected.modules)
        assert scores.provenance["model"] == expected.provenance["model"]
        for name, importance in scores.safety.items():
            assert torch.equal(importance, expected.safety[name])


class Wrap(nn.Module):
    """A wrapper that runs, as activation checkpointing's."""

    def __init__(self, inner):
        super().__init__()
        self._checkpoint_wrapped_module = inner

    def forward(self, *args, **kwargs):
        return self._checkpoint_wrapped_module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._checkpoint_wrapped_module, name)


def test_state_is_32_bytes_per_channel_and_set_and_8_per_count():
    model = tiny_model("llama")
    collector = Collector(model, find_units(model), "variance")
    assert collector.state_bytes() == 0
    collector.run(make_batches(make_sequences()))
    channels = sum(module.norm.numel() for module in collector.finish().values())
    assert collector.state_bytes() == 32 * 2 * channels + 8 * 4 * len(find_units(model))


# what counts


def words(n, rng):
    return " ".join(f"w{rng.randrange(90)}" for _ in range(n))


def make_records(lengths, seed=0):
    rng = random.Random(seed)
    return [{"prompt": words(n % 4 + 1, rng), "response": words(n, rng)} for n in lengths]


SAFETY, UTILITY = make_records((3, 9, 5, 1, 12, 6)), make_records((7, 2, 15, 4), seed=1)


def run(model, *, safety=SAFETY, utility=UTILITY, **options):
    model = tiny_model(model) if isinstance(model, str) else model
    return ssah_fast.score(model, tiny_tokenizer(), safety=safety, utility=utility, **options)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("tokens", ["response", "prompt", "all"])
def test_counted_tokens_are_those_of_the_tokenizer(tokens, batch_size):
    """The template adds <s> <u> ... <a>; the <s>, and the padding of a batch, never count."""

    def expected(records):
        prompt = sum(len(tiny_tokenizer().tokenize(r["prompt"])) + 2 for r in records)
        response = sum(len(tiny_tokenizer().tokenize(r["response"])) for r in records)
        return {"response": response, "prompt": prompt, "all": prompt + response}[tokens]

    scores = run("llama", tokens=tokens, batch_size=batch_size)
    for count in scores.count.values():
        assert count.tolist() == [expected(SAFETY), expected(UTILITY)]
    assert [scores.provenance["data"][name]["tokens"] for name in ("safety", "utility")] == count.tolist()


def test_what_is_counted_is_what_the_readers_read_there():
    """End to end, against a plain forward over each sequence alone, written out by hand."""
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer()
    scores = run(model)
    layout = find_units(model)[2]
    seen = []
    hook = model.get_submodule(layout.reader).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    responses = []
    for record in SAFETY:
        ids = tokenizer(f"<u> {record['prompt']} <a> {record['response']}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(input_ids=ids)
        responses.append(seen[-1][-len(record["response"].split()) :])
    hook.remove()
    norm = model.get_parameter(layout.channels.parameter).square().sum(0)
    channels = torch.cat(responses).var(0) * norm
    assert_close(scores.safety[layout.name], channels[layout.channels.indices(layout.units)].sum(1), 1e-9)


def test_a_pad_token_outside_the_embeddings_is_not_used():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == VOCABULARY
    scores = ssah_fast.score(tiny_model("llama"), tokenizer, safety=SAFETY, utility=UTILITY, batch_size=4)
    expected = run("llama", batch_size=4)
    for name, importance in scores.safety.items():
        assert torch.equal(importance, expected.safety[name])


# estimators


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_norm_is_mean_square_times_norm(name):
    model, batches = tiny_model(name, dtype=torch.float64), make_batches(make_sequences())
    with Capture(model, batches) as seen:
        scores = collect(model, estimator="norm", batches=batches, stop_early=False)
    for layout in seen.layouts:
        for s in range(2):
            expected = seen.importance(layout, s, lambda x: x.square().mean(0))
            assert_close(scores[layout.name].importance[s], expected, 1e-12)


def flap(sequences):
    """method.md 3.1 in closed form: (N-1) F = sum over m >= 2 of (m-1)/m sum_t (x_mt - mu_m)^2."""
    means = torch.stack([x.mean(0) for x in sequences])
    total = sum(
        (m - 1) / m * (sequences[m - 1] - means[:m].mean(0)).square().sum(0) for m in range(2, len(sequences) + 1)
    )
    return total / (len(sequences) - 1), means.mean(0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_flap_is_the_closed_form_in_the_order_of_the_data(name):
    model, sets = tiny_model(name, dtype=torch.float64), make_sequences()
    in_order = sorted(make_batches(sets, 1), key=lambda batch: batch.sequences)
    with Capture(model, in_order) as seen:
        scores = collect(model, estimator="flap", batches=in_order, stop_early=False)
    for layout in seen.layouts:
        module, inputs = scores[layout.name], iter(seen.inputs[layout.name])
        for s, sequences in enumerate(sets):
            counted = [next(inputs)[torch.tensor(sequence.counted)] for sequence in sequences]
            for slot, part in enumerate((counted[0::2], counted[1::2], counted)):
                spread, mean = flap(part)
                assert module.count[s, slot] == sum(map(len, part))
                assert_close(module.m2[s, slot], spread, 1e-12)
                torch.testing.assert_close(module.mean[s, slot], mean, rtol=1e-12, atol=1e-14)
            norm = seen.weights[layout.name].square().sum(0)
            expected = (flap(counted)[0] * norm)[layout.channels.indices(layout.units)].sum(1)
            assert_close(module.importance[s], expected, 1e-12)
            longest_first = sorted(counted, key=len, reverse=True)
            assert not torch.allclose(module.m2[s, 2], flap(longest_first)[0], rtol=1e-6)


def test_score_runs_flap_in_the_order_of_the_data(monkeypatch):
    order = []
    forward = Collector.forward

    def note(self, batch, awaited):
        order.extend(batch.sequences)
        forward(self, batch, awaited)

    monkeypatch.setattr(Collector, "forward", note)
    run("llama", estimator="flap", batch_size=4, nsamples=None)
    assert order == [(0, i) for i in range(len(SAFETY))] + [(1, i) for i in range(len(UTILITY))]


def test_flap_of_one_sequence_is_zero():
    scores = run("llama", safety=SAFETY[:1], estimator="flap")
    assert all(not importance.any() for importance in scores.safety.values())
    assert all(importance.all() for importance in scores.utility.values())


# merging


@pytest.mark.parametrize("estimator", ["variance", "norm"])
def test_merged_halves_equal_the_whole(estimator, tmp_path):
    model = tiny_model("qwen2", dtype=torch.float64)
    options = {"estimator": estimator, "batch_size": 1, "nsamples": None}
    whole = run(model, **options)
    first = run(model, safety=SAFETY[:2], utility=UTILITY[:3], **options)
    second = run(model, safety=SAFETY[2:], utility=UTILITY[3:], **options)
    second.save(tmp_path / "second")
    merged = Scores.merge([first, Scores.load(tmp_path / "second")])
    for name, module in whole.modules.items():
        assert_close(merged.modules[name].importance, module.importance, 1e-12)
        assert torch.equal(merged.count[name], whole.count[name])


# NaN and Inf


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "weight", "index"),
    [
        ("llama", "model.layers.0.mlp.gate_proj.weight", [7, 3]),
        ("llama", "model.layers.1.mlp.down_proj.weight", [5, 11]),
        ("llama", "model.layers.0.self_attn.q_proj.weight", [0, 5]),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", [3]),
        ("gpt2", "transformer.h.1.attn.c_attn.bias", [100]),
        ("opt", "model.decoder.layers.0.fc1.weight", [51, 47]),
    ],
)
def test_a_weight_that_is_not_finite_is_named(name, weight, index, value):
    model = tiny_model(name)
    with torch.no_grad():
        model.get_parameter(weight)[tuple(index)] = value
    with pytest.raises(NonFiniteError) as caught:
        run(model)
    assert str(caught.value) == f"the weight {weight} has a NaN or Inf at {index}; the checkpoint is damaged"


def test_a_nan_that_attention_would_swallow_is_named():
    """The sequences are shorter than 16, where torch's attention on the CPU makes 0 of a NaN in q."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[9, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight has a NaN or Inf at \[9, 3\]"):
        run(model, safety=SAFETY[:1], utility=UTILITY[:1])


def test_an_embedding_that_is_not_finite_is_named():
    """Only where a token uses it: an unused row, and lm_head, may hold anything."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
        model.model.embed_tokens.weight[4 + 90, 7] = float("nan")
    unused = [{"prompt": "w1", "response": "w2 w3"}] * 3
    assert run(model, safety=unused, utility=unused).count
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 7] = float("nan")  # <u>, which the chat template writes
    with pytest.raises(NonFiniteError) as caught:
        run(model, safety=unused, utility=unused)
    assert str(caught.value) == (
        "NaN or Inf in the activations of model.layers.0.self_attn.o_proj, input channel 0, on the safety set; "
        "the weight model.embed_tokens.weight has a NaN or Inf at [3, 7]"
    )


def test_weights_that_are_not_in_memory_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(SsahError, match=r"^model: model\.layers\.1\.mlp\.gate_proj\.weight is not in memory; load"):
        run(model)


@pytest.mark.parametrize("estimator", ["variance", "norm", "flap"])
def test_the_set_is_named_where_only_one_meets_the_nan(estimator):
    model = tiny_model("gpt2")
    utility = [{"prompt": "w1", "response": "w2 w88"}]
    safety = [{"prompt": "w1", "response": "w2 w3"}]
    with torch.no_grad():
        model.transformer.wte.weight[6 + 88] = float("nan")
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.0\.attn\.c_proj, input channel 0, on the utility set"):
        run(model, safety=safety, utility=utility, estimator=estimator)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu"])
def test_no_fused_activation_swallows_a_nan(activation):
    model = tiny_model("llama", hidden_act=activation)
    assert find_units(model)[1].gated.activation == activation

    def plant(_, __, output):
        output[..., 4] = float("nan")

    model.model.layers[1].mlp.gate_proj.register_forward_hook(plant)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj, input channel 4,"):
        run(model)


@pytest.mark.parametrize(
    ("dtype", "scale", "end"),
    [(torch.float16, 3e4, ": try --dtype fp32"), (torch.float32, 1e37, "it arises in the arithmetic")],
    ids=["fp16", "fp32"],
)
def test_an_overflow_is_named_with_a_remedy(dtype, scale, end):
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[13] = scale
        model.model.layers[1].mlp.gate_proj.weight[13] = scale
    message = r"model\.layers\.1\.mlp\.down_proj, input channel 13, on the .* set; all weights are finite"
    with pytest.raises(NonFiniteError, match=message) as caught:
        run(model)
    assert str(caught.value).endswith(end)


def test_a_nan_ends_the_run_at_its_batch():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    done = []
    with pytest.raises(NonFiniteError):
        run(model, batch_size=1, progress=lambda *at: done.append(at))
    assert done == []


# arguments and provenance


def test_sources_in_memory_from_a_file_and_drawn_before_are_the_same(tmp_path):
    expected = run("llama", nsamples=3, seed=5)
    (tmp_path / "s.json").write_text(json.dumps(SAFETY))
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(record) + "\n" for record in UTILITY))
    drawn = [data.load_pairs(source, nsamples=3, seed=5) for source in (SAFETY, UTILITY)]
    files = [tmp_path / "s.json", str(tmp_path / "u.jsonl")]
    for safety, utility in (drawn, files, (SAFETY, drawn[1])):
        scores = run("llama", safety=safety, utility=utility, nsamples=3, seed=5)
        for name, module in expected.modules.items():
            assert torch.equal(scores.modules[name].importance, module.importance)
        for name in ("safety", "utility"):
            hashes = {s.provenance["data"][name]["sha256"] for s in (scores, expected)}
            assert len(hashes) == 1


def test_provenance_is_complete(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m")
    model = type(model).from_pretrained(tmp_path / "m")
    unanswered = [*SAFETY, {"prompt": "w1", "response": ""}]
    scores = run(model, safety=unanswered, seqlen=40, batch_size=2)
    scores.save(tmp_path / "s")
    found = Scores.load(tmp_path / "s").provenance
    assert found == scores.provenance == json.loads(json.dumps(scores.provenance))
    fingerprint = found["model"]
    assert fingerprint["architecture"] == "LlamaForCausalLM"
    assert fingerprint["parameters"] == sum(p.numel() for p in model.parameters())
    assert fingerprint["dtype"] == "float32"
    assert len(fingerprint["config_sha256"]) == 64
    assert found["model_id"] == str(tmp_path / "m")
    assert set(found["tokenizer"]) == {"class", "sha256", "template_sha256"}
    assert found["data"]["safety"] == {
        "sources": ["a list in memory"],
        "available": 7,
        "used": 6,
        "without_counted_token": 1,
        "tokens": 36,
        "sha256": data.load_pairs(unanswered).sha256,
        "prompts": sorted(data.prompt_digest(record["prompt"]) for record in unanswered),
    }
    assert found["settings"] == {
        "tokens": "response",
        "estimator": "variance",
        "attention_unit": "channel",
        "nsamples": 128,
        "seqlen": 40,
        "seed": 0,
        "batch_size": 2,
        "chat_template": True,
        "prompt_column": None,
        "response_column": None,
        "text_column": None,
        "messages_column": None,
    }
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["ssah_fast"] == ssah_fast.__version__


@pytest.mark.parametrize("name", NAMED)
def test_the_fingerprint_of_a_model_outlives_saving_and_loading(name, tmp_path):
    model = tiny_model(name)
    fingerprint = fingerprints.model_fingerprint(model)
    model.save_pretrained(tmp_path / "m")
    load = type(model).from_pretrained
    assert fingerprints.model_fingerprint(load(tmp_path / "m")) == fingerprint
    assert fingerprints.model_fingerprint(load(tmp_path / "m", attn_implementation="eager")) == fingerprint
    half = fingerprints.model_fingerprint(load(tmp_path / "m", dtype=torch.bfloat16))
    assert half == {**fingerprint, "dtype": "bfloat16"}
    other = fingerprints.model_fingerprint(tiny_model(name, num_hidden_layers=3))
    assert other["config_sha256"] != fingerprint["config_sha256"]


def test_the_fingerprint_of_a_tokenizer_knows_its_template():
    other = tiny_tokenizer()
    other.chat_template += " "
    prints = [fingerprints.tokenizer_fingerprint(t) for t in (tiny_tokenizer(), tiny_tokenizer(), other)]
    assert prints[0] == prints[1]
    assert prints[0] == {**prints[2], "template_sha256": prints[0]["template_sha256"]} != prints[2]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_progress_counts_all_tokens(batch_size):
    seen = []
    run("llama", batch_size=batch_size, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == seen[0][1]
    assert len(seen) == (1 if batch_size is None else 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mean"}, "estimator='mean' is unknown; choose one of variance, norm, flap"),
        ({"batch_size": 0}, "batch_size=0 is out of range; choose 1 to 127"),
        ({"batch_size": 128}, "batch_size=128 is out of range; choose 1 to 127"),
        ({"attention_unit": "row"}, "attention_unit: 'row' is not known"),
        ({"tokens": "last"}, "tokens is 'last'; use response, prompt, all"),
        ({"seqlen": 1}, "seqlen is 1; it must be 2 or more"),
        ({"nsamples": 0}, "nsamples is 0; it must be 1 or more"),
        ({"safety": []}, "safety: a list in memory holds no text"),
        ({"safety": "none.jsonl"}, "safety: file not found: none.jsonl"),
        ({"utility": [{"prompt": "w1"}]}, "utility: no pair in it has a response to count"),
        ({"seqlen": 3}, "safety: seqlen 3 cuts off every response; raise it"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(SsahError) as caught:
        run("llama", **options)
    assert str(caught.value).startswith(message), caught.value
    assert "\n" not in str(caught.value)


def test_what_would_be_an_index_error_inside_the_model():
    message = r"^safety: the tokenizer gives token id \d+, but the model has 20 embeddings; use the tokenizer that"
    with pytest.raises(SsahError, match=message):
        run(tiny_model("llama", vocab_size=20))
    long = make_records((200,))
    message = r"a sequence has 20\d tokens, but the model has 128 positions; use "
    for name in ("gpt2", "opt", "llama"):
        with pytest.raises(SsahError, match=rf"^utility: {message}seqlen=128$"):
            run(name, utility=long)
        drawn = data.load_pairs(long, argument="--utility-data")
        with pytest.raises(SsahError, match=rf"^--utility-data: {message}--seqlen 128$"):
            run(name, utility=drawn)
        assert run(name, utility=long, seqlen=128).count


@pytest.mark.parametrize("estimator", ["variance", "flap"])
def test_a_full_device(monkeypatch, estimator):
    """A size of ours is halved until it fits; a size that was asked for is an error."""
    runs = []
    fits = Collector.run

    def full(self, batches, progress=None, **rest):
        runs.append(max(batch.input_ids.numel() for batch in batches))
        if runs[-1] > limit:
            raise torch.OutOfMemoryError("full")
        fits(self, batches, progress, **rest)

    monkeypatch.setattr(Collector, "run", full)
    monkeypatch.setattr(score_plan, "CPU_TOKENS", 128)
    limit = 64
    expected_runs = [20] if estimator == "flap" else [120, 60]
    scores = run("llama", estimator=estimator)
    assert runs[-1] <= limit
    assert len(runs) == len(expected_runs)
    assert scores.count
    limit = 0
    with pytest.raises(OutOfMemoryError, match=r"^one sequence does not fit on cpu; use a smaller --seqlen$"):
        run("llama", estimator=estimator)
    if estimator == "variance":
        message = r"^a batch of 5 sequences does not fit on cpu; use a smaller --batch-size or --seqlen$"
        with pytest.raises(OutOfMemoryError, match=message):
            run("llama", batch_size=5)
