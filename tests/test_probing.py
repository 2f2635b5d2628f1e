"""The probe: distances between the hidden states of queries and of queries with an opening behind them."""

import json

import pytest
import torch
from tiny_models import MODEL_TYPES, tiny_model, tiny_tokenizer

from ssah_fast import data, probing
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.evaluation.intervals import mean, proportion
from ssah_fast.units import decoder_layers

PROMPTS = ["w5 w6 w7 w8 w9 w10 w11", "w12", "w3 w4 w30 w2"]
TEXTS = {"refusal": "w40 w41 w42", "compliance": "w50"}


def states(model, ids: list[int]) -> torch.Tensor:
    """The state at the last token behind every layer, of one sequence without padding, float64 [layers, H]."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder_layers(model)[1]
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack([hidden[0, -1] for hidden in seen]).double()


def by_definition(model, queries: list[list[int]]) -> torch.Tensor:
    """Cosine distances from each query to itself with each opening, every sequence run alone, [2, layers, prompts]."""
    tokenizer = tiny_tokenizer()
    openings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS.values()]
    return torch.stack(
        [
            torch.stack([1 - torch.cosine_similarity(states(model, q), states(model, q + o)) for q in queries], 1)
            for o in openings
        ]
    )


def values(layers: list[dict], key: str) -> torch.Tensor:
    return torch.tensor([layer[key] for layer in layers], dtype=torch.float64)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_distances_are_those_of_the_sequences_run_alone(model_type):
    model = tiny_model(model_type)
    expected = by_definition(model, data.encode_prompts(PROMPTS, tiny_tokenizer()))
    for size in (1, 3):
        (found,) = probing.probe(model, tiny_tokenizer(), PROMPTS, batch_size=size, **TEXTS)["sets"]
        assert (found["set"], found["n"]) == ("harmful", 3)
        assert [layer["layer"] for layer in found["layers"]] == [0, 1]
        for name, distance in zip(TEXTS, expected, strict=True):
            torch.testing.assert_close(values(found["layers"], name), distance.mean(1), atol=2e-5, rtol=0)
        torch.testing.assert_close(
            values(found["layers"], "margin"), (expected[1] - expected[0]).mean(1), atol=2e-5, rtol=0
        )


def test_every_figure_has_its_interval():
    model, queries = tiny_model("llama"), data.encode_prompts(PROMPTS, tiny_tokenizer())
    refusal, compliance = by_definition(model, queries)
    (found,) = probing.probe(model, tiny_tokenizer(), {"harmless": PROMPTS}, **TEXTS)["sets"]
    assert found["set"] == "harmless"
    for layer, row in enumerate(found["layers"]):
        margin = mean((compliance - refusal)[layer].tolist())
        assert row["margin_interval"] == pytest.approx([margin.low, margin.high], abs=1e-4)
        nearer = proportion(int((refusal < compliance)[layer].sum()), 3)
        assert row["nearer_refusal"] == nearer.value
        assert row["nearer_refusal_interval"] == [nearer.low, nearer.high]
        assert row["refusal_n"] == row["nearer_refusal_n"] == 3


def test_the_baseline_is_the_mean_distance_between_queries_and_moves_no_margin():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    own = torch.stack([states(model, ids) for ids in data.encode_prompts(PROMPTS, tokenizer)])
    pairs = [1 - torch.cosine_similarity(own[i], own[j], dim=-1) for i, j in ((0, 1), (0, 2), (1, 2))]
    expected = torch.stack(pairs).mean(0)
    (plain,) = probing.probe(model, tokenizer, PROMPTS, **TEXTS)["sets"]
    (less,) = probing.probe(model, tokenizer, PROMPTS, baseline=True, **TEXTS)["sets"]
    for one in (plain, less):
        torch.testing.assert_close(values(one["layers"], "baseline"), expected, atol=1e-5, rtol=0)
    for before, after in zip(plain["layers"], less["layers"], strict=True):
        for name in TEXTS:
            assert after[name] == pytest.approx(before[name] - before["baseline"])
            assert after[f"{name}_interval"] == pytest.approx(
                [bound - before["baseline"] for bound in before[f"{name}_interval"]]
            )
        for name in ("margin", "nearer_refusal"):
            assert after[name] == pytest.approx(before[name])


def test_one_prompt_has_neither_interval_nor_baseline_and_is_still_json():
    document = probing.probe(tiny_model("gpt2"), tiny_tokenizer(), ["w1 w2"], **TEXTS)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    for row in document["sets"][0]["layers"]:
        assert row["margin_interval"] is None
        assert row["baseline"] is None
        assert row["nearer_refusal_n"] == 1


def test_system_prompt_and_template_are_in_front_of_every_query():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for how in ({"system": "w60 w61"}, {"chat_template": False}):
        expected = by_definition(model, data.encode_prompts(PROMPTS, tokenizer, **how))[0].mean(1)
        (found,) = probing.probe(model, tokenizer, PROMPTS, **TEXTS, **how)["sets"]
        torch.testing.assert_close(values(found["layers"], "refusal"), expected, atol=2e-5, rtol=0)


def test_sets_are_apart_and_progress_counts_all_prompts():
    calls = []
    document = probing.probe(
        tiny_model("llama"),
        tiny_tokenizer(),
        {"harmful": PROMPTS, "harmless": PROMPTS[:2]},
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
        **TEXTS,
    )
    assert calls == [(2, 5), (3, 5), (5, 5)]
    alone = probing.probe(tiny_model("llama"), tiny_tokenizer(), {"harmless": PROMPTS[:2]}, **TEXTS)
    assert document["sets"][1] == alone["sets"][0]
    assert document["model"]["architecture"] == "LlamaForCausalLM"


def untemplated():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts: the set 'harmful' has 0; give at least one prompt"),
        ({"prompts": ["w1"], "baseline": True}, "has 1; give at least two prompts for a baseline"),
        ({"refusal": "w50"}, "refusal and compliance are both 'w50'"),
        ({"refusal": " "}, "refusal ' ' gives no token"),
        ({"compliance": "w1 nowhere"}, "compliance 'w1 nowhere' has words that the tokenizer does not know"),
        ({"prompts": [" "], "chat_template": False}, "prompt 1 gives no token; leave it out"),
        ({"tokenizer": untemplated()}, "has no chat template; use chat_template=False"),
        ({"prompts": ["w1", "w1 " * 130]}, "prompt 2 has 136 tokens with its opening, but the model has 128 positions"),
        ({"model": tiny_model("llama", vocab_size=50)}, "use the tokenizer that belongs to the model"),
    ],
)
def test_what_cannot_be_probed_is_said_before_the_model_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(probing._Distances, "measure", None)
    given = {"model": tiny_model("llama"), "tokenizer": tiny_tokenizer(), "prompts": PROMPTS, **TEXTS, **arguments}
    with pytest.raises(SsahError, match=message.replace("(", r"\(")):
        probing.probe(given.pop("model"), given.pop("tokenizer"), given.pop("prompts"), **given)


def test_a_state_that_is_not_finite_is_located_and_no_hook_stays():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("w12")] = torch.nan
    with pytest.raises(NonFiniteError, match="behind layer 0 is NaN, infinite or zero for prompt 2"):
        probing.probe(model, tokenizer, PROMPTS, **TEXTS)
    assert not any(layer._forward_hooks for layer in decoder_layers(model)[1])
