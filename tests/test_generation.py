import contextlib
import json
import math

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from ssah_fast import data
from ssah_fast.errors import NonFiniteError, OutOfMemoryError, ResumeError, SsahError
from ssah_fast.evaluation import generation
from ssah_fast.evaluation.completions import NAME, CompletionFile
from ssah_fast.evaluation.generation import Decoding, default_batch_size, generate, limited, make_requests, prompts_of

PROMPTS = [" ".join(f"w{(7 * i + j) % 90}" for j in range(1 + 3 * i)) for i in range(7)]
SHORT = Decoding(max_new_tokens=6)
# Rotary, learned and offset positions, sliding windows, every attention mask, latent attention and experts.
KINDS = ("llama", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "opt", "cohere2", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", torch.float64)


def ask(tokenizer, prompts=PROMPTS, **options):
    return make_requests(prompts, tokenizer, set="asr", **options)


def texts(completions):
    return [completion.text for completion in completions]


def reference_answer(model, ids, new, ends=(2,)):
    """Greedy decoding without a cache, without padding."""
    ids = list(ids)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(new):
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] in ends:
                break
    return ids[start:]


# what is generated


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batches_change_no_greedy_answer(kind, tokenizer):
    model = tiny_model(kind)
    requests = ask(tokenizer, PROMPTS[::2])
    alone = [reference_answer(model, request.ids, 4) for request in requests]
    expected = [(len(ids), tokenizer.decode(ids, skip_special_tokens=True)) for ids in alone]
    for batch_size in (1, 8):
        found = generate(model, tokenizer, requests, Decoding(4), batch_size=batch_size, reference=None)
        assert [(one.tokens, one.text) for one in found] == expected, batch_size


def test_top_p_0_is_greedy_token_for_token(llama, tokenizer):
    def tokens(**options):
        return generation.new_tokens(llama, tokenizer, ask(tokenizer), Decoding(max_new_tokens=24, **options))

    assert tokens(temperature=1.0, top_p=0.0) == tokens()
    assert tokens(temperature=1.0) != tokens()


def test_settings_that_came_with_the_model_count_for_nothing_but_its_ends(llama, tokenizer):
    expected = generate(llama, tokenizer, ask(tokenizer), SHORT)
    before = llama.generation_config
    theirs = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        max_length=3,
        eos_token_id=2,
        bad_words_ids=[[i] for i in range(50)],
    )
    llama.generation_config = theirs
    try:
        assert generate(llama, tokenizer, ask(tokenizer), SHORT) == expected
        assert llama.generation_config is theirs
    finally:
        llama.generation_config = before


def test_every_end_token_of_the_model_ends_an_answer(llama, tokenizer):
    request = ask(tokenizer)[3]
    ids = reference_answer(llama, request.ids, 6)
    assert len(ids) == 6 and len(set(ids)) > 2
    end = ids[2]
    before = llama.generation_config
    llama.generation_config = GenerationConfig(eos_token_id=[2, end])
    try:
        (found,) = generate(llama, tokenizer, [request], SHORT)
    finally:
        llama.generation_config = before
    assert found.finished and found.tokens == ids.index(end) + 1
    (found,) = generate(llama, tokenizer, [request], SHORT)
    assert not found.finished and found.tokens == 6 and found.text == tokenizer.decode(ids)


@pytest.mark.parametrize("special", ["pad is eos", "no pad", "neither"])
def test_pad_tokens_of_any_kind(llama, special):
    tokenizer = tiny_tokenizer()
    expected = generate(llama, tokenizer, ask(tokenizer), SHORT, batch_size=4)
    ends = llama.generation_config.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token if special == "pad is eos" else None
    if special == "neither":
        tokenizer.eos_token = llama.generation_config.eos_token_id = None
    try:
        found = generate(llama, tokenizer, ask(tokenizer), SHORT, batch_size=4)
    finally:
        llama.generation_config.eos_token_id = ends
    assert [one.nll for one in found] == pytest.approx([one.nll for one in expected], rel=1e-9)
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_the_nll_is_that_of_the_new_tokens_under_the_reference(llama, tokenizer):
    requests = ask(tokenizer)
    other = tiny_model("llama", torch.float64, seed=1)
    for reference, model in (("self", llama), (other, other)):
        found = generate(llama, tokenizer, requests, SHORT, batch_size=3, reference=reference)
        for request, completion in zip(requests, found, strict=True):
            new = reference_answer(llama, request.ids, 6)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([request.ids + new])).logits[0, len(request.ids) - 1 : -1]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(new)).item()
            assert completion.tokens == len(new) and completion.nll == pytest.approx(expected, rel=1e-9)
    assert {one.nll for one in generate(llama, tokenizer, requests, SHORT, reference=None)} == {None}


def test_draws_depend_on_the_seed_alone(llama, tokenizer):
    requests = ask(tokenizer, samples=2)
    drawn = Decoding(max_new_tokens=8, samples=2, temperature=1.0, seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(llama, tokenizer, requests, drawn, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert generate(llama, tokenizer, requests, drawn, batch_size=4) == first
    assert first[0].text != first[1].text and (first[0].sample, first[1].sample) == (0, 1)
    other = Decoding(max_new_tokens=8, samples=2, temperature=1.0, seed=4)
    assert generate(llama, tokenizer, requests, other, batch_size=4) != first


def test_around_is_entered_with_the_rows_of_each_batch_and_left_before_the_nll(llama, tokenizer):
    entered, inside = [], []

    @contextlib.contextmanager
    def around(batch):
        entered.append([request.index for request in batch])
        inside.append(True)
        yield
        inside.append(False)

    handle = llama.register_forward_pre_hook(lambda *_: seen.append(inside[-1]))
    seen: list[bool] = []
    try:
        generate(llama, tokenizer, ask(tokenizer), Decoding(2), batch_size=3, around=around)
    finally:
        handle.remove()
    assert entered == [[6, 5, 4], [3, 2, 1], [0]]  # longest first
    assert seen == [True, True, False] * 3


@pytest.mark.parametrize("decoding", [SHORT, Decoding(6, temperature=1.0, seed=1)], ids=["greedy", "sampled"])
def test_both_halves_make_the_answers_of_the_whole_with_one_state_for_all_batches(llama, tokenizer, decoding):
    requests, calls, entered = ask(tokenizer), [], []
    weight = llama.lm_head.weight

    @contextlib.contextmanager
    def moved():
        entered.append(True)
        with torch.no_grad():
            before = weight.clone()
            weight.copy_(before.flip(0))
            yield
            weight.copy_(before)

    expected = generate(llama, tokenizer, requests, decoding, batch_size=3, around=lambda batch: moved())
    assert expected != generate(llama, tokenizer, requests, decoding, batch_size=3)
    entered.clear()
    with moved():
        new = generation.new_tokens(
            llama, tokenizer, requests, decoding, batch_size=3, progress=lambda *call: calls.append(call)
        )
    found = generation.completions(llama, tokenizer, requests, new, decoding, batch_size=3)
    assert found == expected and entered == [True]
    assert calls == [(3, 7), (6, 7), (7, 7)] and [len(ids) for ids in new] == [one.tokens for one in found]
    unjudged = generation.completions(llama, tokenizer, requests, new, decoding, reference=None)
    assert texts(unjudged) == texts(found) and {one.nll for one in unjudged} == {None}


# requests


def test_requests_name_what_they_ask(tokenizer):
    requests = ask(tokenizer, ["w1", "w2 w3"], system_name="s", system_text="w9", suffix=" w7", samples=2, variant="v")
    assert [(r.index, r.sample, r.prompt) for r in requests] == [
        (0, 0, "w1"),
        (0, 1, "w1"),
        (1, 0, "w2 w3"),
        (1, 1, "w2 w3"),
    ]
    assert {(r.set, r.system, r.variant) for r in requests} == {("asr", "s", "v")}
    assert tokenizer.decode(requests[3].ids).split() == ["<s>", "<u>", "w9", "<u>", "w2", "w3", "w7", "<a>"]
    bare = ask(tokenizer, ["w1"], chat_template=False, suffix=" w7")
    assert tokenizer.decode(bare[0].ids).split() == ["<s>", "w1", "w7"]


def test_a_tokenizer_without_a_template_says_what_to_do():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(SsahError, match="--asr-data: the tokenizer has no chat template; use --no-chat-template"):
        ask(tokenizer, argument="--asr-data")


def test_prompts_are_those_of_the_pairs_or_the_lines_of_a_text(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"goal": "a", "target": "x"}\n{"goal": "b", "target": ""}\n')
    (tmp_path / "p.txt").write_text("one\n\ntwo\nthree\n")
    pairs, lines = (data.load_pairs(tmp_path / name, nsamples=None) for name in ("p.jsonl", "p.txt"))
    assert prompts_of(pairs) == ["a", "b"] and prompts_of(lines) == ["one", "two", "three"]
    assert prompts_of(lines, limit=2) == ["one", "two"] and prompts_of(lines, limit=0.34) == ["one"]
    mixed = data.load_pairs([{"prompt": "a", "response": "b"}, {"prompt": "", "response": "c"}], nsamples=None)
    with pytest.raises(SsahError, match="source: record 2 has no prompt"):
        prompts_of(mixed)


@pytest.mark.parametrize(
    ("number", "limit", "kept"), [(10, None, 10), (10, 3, 3), (10, 3.0, 3), (10, 99, 10), (10, 0.25, 2), (10, 0.01, 1)]
)
def test_limits(number, limit, kept):
    assert limited(number, limit) == kept


@pytest.mark.parametrize("limit", [0, -1, 1.5, math.nan])
def test_wrong_limits(limit):
    with pytest.raises(SsahError, match=r"limit=.*is out of range"):
        limited(10, limit)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"samples": 0}, "samples=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"samples": 2}, "samples=2 greedy answers"),
    ],
)
def test_decoding_refuses_what_makes_no_sense(values, message):
    with pytest.raises(SsahError, match=message):
        Decoding(**values)


# limits of the model and the machine


def test_prompts_that_do_not_fit_are_refused_before_anything_is_generated(llama, tokenizer):
    requests = ask(tokenizer, ["w1", "w2 " * 100])
    with pytest.raises(SsahError, match=r"asr: prompt 2 has 103 tokens; with max_new_tokens=26.*use max_new_tokens=25"):
        generate(llama, tokenizer, requests, Decoding(max_new_tokens=26))
    with pytest.raises(SsahError, match="128 positions of the model; leave it out"):
        generate(llama, tokenizer, ask(tokenizer, ["w2 " * 126]), SHORT)


def test_tokens_of_another_models_tokenizer_are_refused(llama):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(SsahError, match=f"token id {VOCABULARY}, but the model has {VOCABULARY} embeddings"):
        generate(llama, tokenizer, ask(tokenizer, ["new"]), SHORT)


def test_the_batch_size_follows_from_the_shapes(llama, tokenizer, monkeypatch):
    requests = ask(tokenizer)
    assert default_batch_size(llama, requests, SHORT) == 64
    row = 2 * 2 * 2 * 8 * 8 * (22 + 6)  # keys and values, layers, KV heads, width, bytes; the longest prompt has 22
    monkeypatch.setattr(generation, "CACHE_BYTES", 3 * row + 1)
    assert default_batch_size(llama, requests, SHORT) == 3
    monkeypatch.setattr(generation, "CACHE_BYTES", 1)
    assert default_batch_size(llama, requests, SHORT) == 1


def test_a_full_device_is_one_line_of_advice(llama, tokenizer):
    with pytest.raises(OutOfMemoryError, match=r"a batch of 7 answers of up to 6 tokens.*smaller --batch-size"):
        generate(llama, tokenizer, ask(tokenizer), SHORT, around=lambda batch: contextlib.closing(Full()))


class Full:
    def close(self):
        raise torch.OutOfMemoryError("CUDA out of memory")


# resuming


class Killed(BaseException):
    """Not caught by anything, like the end of the process."""


def killed_at(number):
    """An `around` that ends the run in the middle of a batch."""
    entered = []

    @contextlib.contextmanager
    def around(batch):
        entered.append(batch)
        yield
        if len(entered) == number:
            raise Killed

    return around


@pytest.mark.parametrize("decoding", [SHORT, Decoding(6, temperature=1.0, seed=1)], ids=["greedy", "sampled"])
def test_a_killed_run_ends_with_the_same_file_and_answers(llama, tokenizer, tmp_path, decoding):
    requests = ask(tokenizer)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = generate(
        llama, tokenizer, requests, decoding, batch_size=2, file=CompletionFile(tmp_path / "whole", {"a": 1})
    )
    killed = tmp_path / "killed" / NAME
    with pytest.raises(Killed):
        file = CompletionFile(killed.parent, {"a": 1})
        generate(llama, tokenizer, requests, decoding, batch_size=2, file=file, around=killed_at(3))
    assert len(killed.read_text().splitlines()) == 1 + 2 * 2
    killed.write_bytes(killed.read_bytes()[:-9])  # a line that was being written
    again, calls = [], []

    @contextlib.contextmanager
    def around(batch):
        again.append([request.index for request in batch])
        yield

    resumed = generate(
        llama,
        tokenizer,
        requests,
        decoding,
        batch_size=2,
        file=CompletionFile(killed.parent, {"a": 1}),
        around=around,
        progress=lambda *call: calls.append(call),
    )
    assert resumed == whole and killed.read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    assert again == [[4, 3], [2, 1], [0]] and calls == [(4, 7), (6, 7), (7, 7)]


def test_a_finished_run_generates_nothing(llama, tokenizer, tmp_path):
    requests = ask(tokenizer)
    first = generate(llama, tokenizer, requests, SHORT, file=CompletionFile(tmp_path, {}))
    file = CompletionFile(tmp_path, {})
    assert generate(llama, tokenizer, requests, SHORT, file=file, around=killed_at(1)) == first
    assert json.loads((tmp_path / NAME).read_text().splitlines()[1])["index"] == 6


def test_saved_completions_of_other_requests_are_refused(llama, tokenizer, tmp_path):
    generate(llama, tokenizer, ask(tokenizer), SHORT, file=CompletionFile(tmp_path, {}))
    with pytest.raises(ResumeError, match=r"system is 'none' where 'other' is asked for.*--fresh"):
        generate(llama, tokenizer, ask(tokenizer, system_name="other"), SHORT, file=CompletionFile(tmp_path, {}))


def test_nan_is_an_error_and_no_answer(tokenizer):
    model = tiny_model("llama")
    lost = tokenizer.convert_tokens_to_ids("w7")
    with torch.no_grad():
        model.get_input_embeddings().weight[lost] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN for 1 of 2 prompts"):
        generate(model, tokenizer, ask(tokenizer, ["w1", "w7"]), SHORT)


def test_no_requests_no_answers(llama, tokenizer):
    assert generate(llama, tokenizer, [], SHORT) == []
    assert generation.new_tokens(llama, tokenizer, [], SHORT) == []
    assert generation.completions(llama, tokenizer, [], [], SHORT) == []
