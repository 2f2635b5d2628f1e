"""The refusal margin: which token decides a refusal, and how sure a model is of it."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from ssah_fast.errors import NonFiniteError
from ssah_fast.evaluation.completions import Completion
from ssah_fast.evaluation.generation import Request
from ssah_fast.evaluation.margin import Target, measure, targets

# where a refusal begins


@pytest.fixture(scope="module")
def tokenizer():
    """A token per character but for " I" and ". I"; BOS in front of what is no answer."""
    characters = ["<s>", *map(chr, range(32, 127)), " I", ". I"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(characters)}, [(" ", "I"), (".", " I")]))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def answered(*texts):
    requests = [Request("asr", i, 0, f"system {i % 2}", "", "p", [7, i]) for i in range(len(texts))]
    return requests, [
        Completion("asr", request.index, 0, request.system, "", "p", text, 1, True, None)
        for request, text in zip(requests, texts, strict=True)
    ]


def begins(tokenizer, text):
    """What stands before the deciding token in the answer, and that token."""
    requests, completions = answered(text)
    (found,) = targets(requests, completions, tokenizer)
    assert found.prefix[:2] == requests[0].ids
    before, token = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (found.prefix[2:], [found.token]))
    return before, token


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sorry, no.", ("", "S")),
        ("You want it? Sorry, no.", ("You want it? ", "S")),
        ("No! I cannot.", ("No!", " I")),
        ("You want it. I cannot.", ("You want it", ". I")),
        ("That is illegal. Sorry.", ("That is ", "i")),
        ("I'd say it's unethical. As an AI, Sorry", ("I'd say it's ", "u")),
    ],
)
def test_the_first_phrase_in_the_text_decides_by_its_first_token(tokenizer, text, expected):
    assert begins(tokenizer, text) == expected


def test_answers_without_a_refusal_have_no_target(tokenizer):
    requests, completions = answered("Sure.", "Sorry.", "", "sorry", "I cannot")
    found = targets(requests, completions, tokenizer)
    assert [(target.index, target.system) for target in found] == [(1, "system 1"), (4, "system 0")]
    assert [target.prefix for target in found] == [[7, 1], [7, 4]]
    with pytest.raises(ValueError, match="zip"):
        targets(requests, completions[1:], tokenizer)


# how sure a model is


def made_targets(*lengths):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (length + 1,), generator=generator).tolist() for length in lengths]
    return [Target(i, "none", row[:-1], row[-1]) for i, row in enumerate(ids)]


def by_hand(model, target):
    """ln(p / (1 - p)) of one target alone."""
    with torch.inference_mode():
        p = model(input_ids=torch.tensor([target.prefix])).logits[0, -1].softmax(-1)[target.token].item()
    return math.log(p / (1 - p))


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2"])
def test_margins_equal_those_of_each_target_alone(kind, batch_size):
    model, asked = tiny_model(kind, torch.float64), made_targets(9, 4, 17, 4, 1)
    expected = [by_hand(model, target) for target in asked]
    assert measure(model, asked, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-6
    )  # gemma2 normalises in fp32


def test_only_the_logits_that_count_are_computed_where_the_model_can():
    model, asked, shapes = tiny_model("llama", torch.float64), made_targets(9, 4, 17, 4, 1), []
    handle = model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape[1]))
    expected = measure(model, asked)
    handle.remove()
    forward = model.forward

    def plain(input_ids, attention_mask=None, use_cache=None):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    assert "logits_to_keep" in inspect.signature(forward).parameters
    model.forward = plain
    assert measure(model, asked) == pytest.approx(expected, rel=1e-12)
    assert shapes == [4]  # lengths 1, 4, 9 and 17


def test_a_model_beyond_doubt_has_a_finite_margin():
    model, (target,) = tiny_model("llama"), made_targets(5)
    with torch.inference_mode():
        model.lm_head.weight *= 1e4
        logits = model(input_ids=torch.tensor([target.prefix])).logits[0, -1].double()
    best = logits.argmax().item()
    others = torch.cat([logits[:best], logits[best + 1 :]]).logsumexp(0)
    (found,) = measure(model, [replace(target, token=best)])
    assert found > 100 and found == pytest.approx((logits[best] - others).item(), rel=1e-5)
    (found,) = measure(model, [replace(target, token=logits.argmin().item())])
    assert found == pytest.approx((logits.min() - logits.max()).item(), rel=1e-5)


def test_half_precision_rounds_nothing_but_the_logits():
    model, asked = tiny_model("llama", torch.bfloat16), made_targets(6)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([asked[0].prefix])).logits[0, -1]
    assert logits.dtype is torch.bfloat16
    p = logits.double().softmax(-1)[asked[0].token].item()
    assert measure(model, asked) == pytest.approx([math.log(p / (1 - p))], rel=1e-5)


def test_nan_is_an_error_that_names_the_prompt():
    model, asked = tiny_model("llama"), made_targets(3, 5)
    with torch.no_grad():
        model.get_input_embeddings().weight[asked[1].prefix[-1]] = torch.nan
    with pytest.raises(NonFiniteError, match="the model gives NaN or Inf for prompt 2; try --dtype fp32"):
        measure(model, asked)


def test_nothing_to_measure_is_nothing():
    assert measure(tiny_model("llama"), []) == []
