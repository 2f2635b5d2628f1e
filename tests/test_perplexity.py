import math

import pytest
import torch
from scipy import stats
from tiny_models import VOCABULARY, tiny_model

from ssah_fast.data import Encoded
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.evaluation import perplexity
from ssah_fast.evaluation.perplexity import measure


def sequences(*lengths: int, seed: int = 0) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        found.append(Encoded(ids, [i % 3 != 1 for i in range(length)]))
    return found


def by_hand(model, sequence):
    """Negative log-likelihoods and hits of the counted tokens, one sequence alone, in float64."""
    logits = model(input_ids=torch.tensor([sequence.ids])).logits[0].double()
    nll, hits = [], []
    for t in range(1, len(sequence.ids)):
        if sequence.counted[t]:
            nll.append(-torch.log_softmax(logits[t - 1], -1)[sequence.ids[t]].item())
            hits.append(logits[t - 1].argmax().item() == sequence.ids[t])
    return nll, hits


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_figures_equal_those_of_each_sequence_alone(kind, batch_size):
    model = tiny_model(kind, torch.float64)
    data = sequences(9, 4, 17, 5, 2)
    with torch.inference_mode():
        expected = [by_hand(model, sequence) for sequence in data]
    found = measure(model, data, batch_size=batch_size)
    kept = [pair for pair in expected if pair[0]]
    assert len(kept) == 4 == found.perplexity.n  # of the last, the only counted token is the first
    assert found.tokens == [len(nll) for nll, _ in kept]
    assert found.nll == pytest.approx([math.fsum(nll) for nll, _ in kept], rel=1e-12)
    assert found.correct == [sum(hits) for _, hits in kept]
    mean = sum(found.nll) / sum(found.tokens)
    assert found.perplexity.value == pytest.approx(math.exp(mean), rel=1e-12)
    assert found.accuracy.value == pytest.approx(100 * sum(found.correct) / sum(found.tokens))


def test_a_model_that_knows_the_answer_is_right_every_time():
    model, (sequence,) = tiny_model("llama", torch.float64), sequences(2)
    with torch.inference_mode():
        best = model(input_ids=torch.tensor([sequence.ids[:1]])).logits[0, 0].argmax().item()
    right = Encoded([sequence.ids[0], best], [False, True])
    wrong = Encoded([sequence.ids[0], (best + 1) % VOCABULARY], [False, True])
    assert measure(model, [right, right]).accuracy.value == 100
    assert measure(model, [right, wrong]).accuracy.value == 50


def test_the_softmax_of_16_bit_logits_is_in_fp32_and_a_few_rows_at_a_time(monkeypatch):
    model, data = tiny_model("llama", torch.bfloat16), sequences(9, 4, 17, 5)
    whole = measure(model, data, batch_size=1)
    with torch.inference_mode():
        exact = [math.fsum(by_hand(model, sequence)[0]) for sequence in data]
    assert whole.nll == pytest.approx(exact, rel=1e-6)
    monkeypatch.setattr(perplexity, "_CHUNK", 2 * VOCABULARY)
    assert measure(model, data, batch_size=1).nll == pytest.approx(exact, rel=1e-6)


def test_batches_are_as_large_as_their_logits_may_be(monkeypatch):
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 18 * VOCABULARY * 4)
    calls = []
    measure(tiny_model("llama"), sequences(9, 4, 17, 5), progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (3, 4), (4, 4)]  # 17, then 9 and 5 padded to it, then 4


def test_the_interval_takes_sequences_for_draws():
    data = sequences(*[6 + i % 5 for i in range(30)])
    found = measure(tiny_model("llama"), data)
    low, high = found.perplexity.low, found.perplexity.high
    assert low < found.perplexity.value < high
    rates = [nll / tokens for nll, tokens in zip(found.nll, found.tokens, strict=True)]
    half = stats.t.ppf(0.975, 29) * stats.sem(rates)  # of nearly equal lengths, the plain mean over sequences
    assert math.log(high / low) / 2 == pytest.approx(half, rel=0.15)


def test_nan_is_located():
    model, data = tiny_model("llama"), sequences(5, 6, 7)
    lost = next(token for token in data[1].ids if token not in data[0].ids + data[2].ids)
    with torch.no_grad():
        model.get_input_embeddings().weight[lost] = torch.nan
    with pytest.raises(NonFiniteError, match="sequence 2 of 3"):
        measure(model, data, batch_size=1)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(SsahError, match="no token to predict"):
        measure(tiny_model("llama"), [Encoded([5], [True])])


def test_progress_counts_sequences():
    calls = []
    measure(tiny_model("llama"), sequences(9, 4, 5), batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(2, 3), (3, 3)]
