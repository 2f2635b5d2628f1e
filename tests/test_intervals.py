"""Figures and their intervals, against scipy and by simulation."""

import json
import math
import random

import numpy
import pytest
from scipy import stats

from ssah_fast.errors import SsahError
from ssah_fast.evaluation import intervals
from ssah_fast.evaluation.intervals import Interval, bootstrap, difference, mean, perplexity, proportion, ratio


@pytest.mark.parametrize(("count", "n"), [(0, 1), (0, 200), (1, 200), (19, 100), (100, 200), (520, 520), (7, 10**6)])
def test_proportion_is_wilsons_interval(count, n):
    found = proportion(count, n)
    expected = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert found.value == 100 * count / n
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-10)
    assert 0 <= found.low <= found.value <= found.high <= 100
    assert found.n == n


@pytest.mark.parametrize("n", [2, 3, 8, 9, 1001])
def test_mean_is_students_interval(n):
    values = numpy.random.default_rng(n).normal(0.3, 2.0, n)
    found = mean(values.tolist())
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-10)
    assert (found.value, found.n) == (pytest.approx(values.mean(), rel=1e-12), n)


def test_mean_of_large_equal_values_has_no_width():
    found = mean([1e15 + 1] * 5)
    assert (found.low, found.value, found.high) == (1e15 + 1,) * 3


def test_perplexity_of_equally_long_sequences_is_the_mean_put_through_exp():
    per_token = [1.5, 2.0, 2.25, 3.0]
    found, exponent = perplexity([7 * x for x in per_token], [7] * 4), mean(per_token)
    expected = map(math.exp, (exponent.value, exponent.low, exponent.high))
    assert (found.value, found.low, found.high) == pytest.approx(tuple(expected), rel=1e-12)
    assert found.n == 4


def _linear(numerators, denominators):
    """The ratio of sums and its standard error, from the covariance matrix of the two means."""
    a, b = numpy.asarray(numerators, float), numpy.asarray(denominators, float)
    share = a.mean() / b.mean()
    gradient = numpy.array([1 / b.mean(), -share / b.mean()])
    return share, math.sqrt(gradient @ numpy.cov(a, b) @ gradient / len(a))


def test_perplexity_of_unequal_sequences_follows_the_delta_method():
    generator = numpy.random.default_rng(0)
    tokens = generator.integers(3, 90, 50)
    nll = tokens * generator.gamma(4.0, 0.5, 50)
    share, error = _linear(nll, tokens)
    half = stats.t.ppf(0.975, 49) * error
    found = perplexity(nll.tolist(), tokens.tolist())
    assert (found.value, found.low, found.high) == pytest.approx(
        (math.exp(share), math.exp(share - half), math.exp(share + half)), rel=1e-10
    )


def test_ratio_is_wilsons_interval_of_the_effective_number_of_draws():
    generator = numpy.random.default_rng(1)
    tokens = generator.integers(5, 60, 80)
    right = generator.binomial(tokens, generator.beta(6, 4, 80))
    share, error = _linear(right, tokens)
    found = ratio(right.tolist(), tokens.tolist())
    # Wilson's bounds are where the score statistic equals the quantile.
    draws, quantile = share * (1 - share) / error**2, stats.t.ppf(0.975, 79)
    for bound in (found.low / 100, found.high / 100):
        assert abs(share - bound) / math.sqrt(bound * (1 - bound) / draws) == pytest.approx(quantile, rel=1e-9)
    assert found.low < found.value < found.high
    assert (found.value, found.n) == (pytest.approx(100 * share), 80)


@pytest.mark.parametrize(("right", "value"), [(4, 100.0), (0, 0.0)])
def test_ratio_of_unanimous_sequences_keeps_a_width(right, value):
    found = ratio([right] * 30, [4] * 30)
    assert found.value == value
    assert 8 < found.high - found.low < 16  # 30 draws, not 120, and not none
    assert 0 <= found.low <= found.high <= 100


def test_sequences_and_not_tokens_are_the_draws():
    """Sequences whose tokens all agree: 400 tokens say no more than 20 draws do."""
    alone, repeated = ratio([1, 0] * 10, [1] * 20), ratio([20, 0] * 10, [20] * 20)
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high))


@pytest.mark.parametrize("figure", [perplexity, ratio])
def test_95_of_100_intervals_hold_the_truth(figure):
    generator = numpy.random.default_rng(2)
    truth, held, trials = 0.6, 0, 400
    for _ in range(trials):
        tokens = generator.integers(5, 40, 40)
        shares = generator.beta(6, 4, 40)  # mean 0.6, independent of the lengths
        found = figure(generator.binomial(tokens, shares).tolist(), tokens.tolist())
        held += found.low <= (math.exp(truth) if figure is perplexity else 100 * truth) <= found.high
    assert 0.92 < held / trials < 0.98  # 2.7 standard errors either way


def test_difference_is_newcombes_method_10():
    # Newcombe (Stat. Med. 17, 1998), table II: 56/70 - 48/80.
    found = difference(proportion(56, 70), proportion(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((20.0, 5.24, 33.39), abs=0.005)
    assert found.n == 150
    assert difference(proportion(10, 10), proportion(0, 10)).high == 100


@pytest.mark.parametrize("statistic", [lambda rows: sum(rows) / len(rows), max])
def test_bootstrap_agrees_with_scipy(statistic):
    rows = numpy.random.default_rng(3).exponential(1.0, 60).tolist()
    found = bootstrap(rows, statistic, draws=4000, seed=5)
    expected = stats.bootstrap(
        (rows,), statistic, vectorized=False, method="percentile", n_resamples=4000, rng=numpy.random.default_rng(6)
    ).confidence_interval
    spread = max(rows) - min(rows)
    assert found == pytest.approx(tuple(expected), abs=0.02 * spread)


def test_bootstrap_takes_rows_of_any_kind_and_repeats_itself():
    rows = [("refused", 3), ("answered", 5), ("answered", 2)]

    def share(drawn):
        return sum(verdict == "answered" for verdict, _ in drawn) / len(drawn)

    assert bootstrap(rows, share, seed=1) == bootstrap(rows, share, seed=1)
    low, high = bootstrap(rows, share)
    assert (low, high) == (0.0, 1.0)


def test_student_quantile_against_scipy():
    for freedom in (*range(1, 40), 99, 100, 519, 5000):
        assert intervals._student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


@pytest.mark.parametrize("found", [mean([2.5]), perplexity([10 * math.log(2.5)], [10]), ratio([25], [1000])])
def test_a_single_draw_has_no_interval(found):
    assert found.value == pytest.approx(2.5)
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.flat("x") == {"x": found.value, "x_interval": None, "x_n": 1}


def test_flat_gives_plain_json():
    assert proportion(188, 200).flat("asr") == {
        "asr": 94.0,
        "asr_interval": [pytest.approx(89.8, abs=0.05), pytest.approx(96.5, abs=0.05)],
        "asr_n": 200,
    }
    for broken in (perplexity([1e6, 2e6], [10, 10]), perplexity([7090.0, 1.0], [10, 1]), mean([math.nan, 1.0])):
        json.dumps(broken.flat("x"), allow_nan=False)
    assert perplexity([1e6, 2e6], [10, 10]).flat("x") == {"x": None, "x_interval": None, "x_n": 2}
    assert Interval(1.0, 0.5, math.inf, 3).flat("x") == {"x": 1.0, "x_interval": None, "x_n": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion(0, 0), "proportion: there is nothing"),
        (lambda: proportion(3, 2), "proportion: 3 of 2"),
        (lambda: proportion(-1, 2), "proportion: -1 of 2"),
        (lambda: mean([]), "mean: there is nothing"),
        (lambda: perplexity([], []), "perplexity: there is nothing"),
        (lambda: perplexity([0.0], [0]), "perplexity: there is nothing"),
        (lambda: ratio([], []), "ratio: there is nothing"),
        (lambda: bootstrap([], max), "bootstrap: there is nothing"),
    ],
)
def test_nothing_to_average_is_an_error(call, message):
    with pytest.raises(SsahError, match=message):
        call()


def test_any_order_gives_the_same_bits():
    source = random.Random(0)
    pairs = [(source.gauss(50, 30), source.randint(1, 90)) for _ in range(200)]
    found = perplexity(*map(list, zip(*pairs, strict=True)))
    source.shuffle(pairs)
    assert perplexity(*map(list, zip(*pairs, strict=True))) == found
