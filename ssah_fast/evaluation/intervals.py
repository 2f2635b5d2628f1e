"""Figures with their 95 % confidence intervals. Rates are in percent."""

import functools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ssah_fast.errors import SsahError

LEVEL = 0.95
_NORMAL = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Interval:
    """A figure, its 95 % interval, and how many independent draws both come from.

    Attributes:
        value: The figure.
        low: Lower bound; NaN where it is unknown, as it is for the mean of a single value.
        high: Upper bound; NaN likewise.
        n: Number of draws: prompts, completions or sequences, never tokens.
    """

    value: float
    low: float
    high: float
    n: int

    def flat(self, name: str) -> dict[str, Any]:
        """The entries of a JSON document: `name`, `name_interval` ([low, high]) and `name_n`.

        JSON knows neither NaN nor Inf: a figure that is not finite is None, an interval with such a bound is None.
        """
        bounds = [self.low, self.high]
        return {
            name: self.value if math.isfinite(self.value) else None,
            f"{name}_interval": bounds if all(map(math.isfinite, bounds)) else None,
            f"{name}_n": self.n,
        }


def proportion(count: int, n: int) -> Interval:
    """How many percent `count` of `n` are, with Wilson's score interval (1927), which holds at 0 and 100 % too.

    Args:
        count: Successes.
        n: Draws.

    Raises:
        SsahError: There is no draw, or count is not in 0 .. n.
    """
    _check_draws(n, "proportion")
    if not 0 <= count <= n:
        raise SsahError(f"proportion: {count} of {n} is no proportion; count must be 0 to {n}")
    low, high = _wilson(count / n, n, _NORMAL)
    return Interval(100 * count / n, 100 * low, 100 * high, n)


def mean(values: Sequence[float]) -> Interval:
    """The mean with Student's t interval; of one value the bounds are unknown (NaN).

    Raises:
        SsahError: There is no value.
    """
    n = len(values)
    _check_draws(n, "mean")
    centre = math.fsum(values) / n
    half = _half_width([value - centre for value in values], n)
    return Interval(centre, centre - half, centre + half, n)


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> Interval:
    """The perplexity exp(sum(nll) / sum(tokens)).

    Sequences are the independent draws, not tokens. The bounds are those of the exponent, a ratio of two sums over
    sequences (delta method, Student's t), put through exp; of one sequence they are unknown (NaN).

    Args:
        nll: Negative log-likelihood of each sequence, in nats.
        tokens: How many tokens of each sequence were counted.

    Raises:
        SsahError: There is no token.
    """
    exponent, half = _ratio_of_sums(nll, tokens, "perplexity")
    return Interval(_exp(exponent), _exp(exponent - half), _exp(exponent + half), len(nll))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """How many percent of sum(denominators) sum(numerators) is, such as tokens predicted right of all tokens.

    Sequences are the independent draws. Wilson's interval with Student's t and the effective number of draws, that
    which gives a plain proportion the variance of this ratio (delta method), at most sum(denominators); so it stays in
    0 .. 100 % (Dean and Pagano, J. Surv. Stat. Methodol. 3, 2015). Where every sequence is all right or all wrong
    alike, its number of draws is that of the sequences. Of one sequence the bounds are unknown (NaN).

    Args:
        numerators: Per sequence, at most its denominator.
        denominators: Per sequence.

    Raises:
        SsahError: The denominators are empty or sum to 0.
    """
    n = len(denominators)
    share, half = _ratio_of_sums(numerators, denominators, "ratio")
    if math.isnan(half):
        return Interval(100 * share, math.nan, math.nan, n)
    variance = (half / _student(n - 1)) ** 2
    draws = min(share * (1 - share) / variance, math.fsum(denominators)) if variance else n
    low, high = _wilson(share, draws, _student(n - 1))
    return Interval(100 * share, 100 * low, 100 * high, n)


def difference(a: Interval, b: Interval) -> Interval:
    """The difference a - b of two proportions, in points.

    Newcombe's method 10 (Stat. Med. 17, 1998) for independent samples. For two models on the same prompts, whose
    outcomes tend to agree, it is wider than it need be. n is the number of draws in both.
    """
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, low, high, a.n + b.n)


def bootstrap(
    rows: Sequence[_Row], statistic: Callable[[Sequence[_Row]], float], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of any statistic.

    Args:
        rows: The independent draws.
        statistic: Figure of as many rows, drawn with replacement.
        draws: How many times it is computed; 2 or more.
        seed: The same seed draws the same rows.

    Raises:
        SsahError: There is no row.
    """
    _check_draws(len(rows), "bootstrap")
    source = random.Random(seed)
    found = [statistic(source.choices(rows, k=len(rows))) for _ in range(draws)]
    steps = statistics.quantiles(found, n=round(2 / (1 - LEVEL)), method="inclusive")  # steps of 2.5 %
    return steps[0], steps[-1]


def _check_draws(n: int, name: str) -> None:
    if n < 1:
        raise SsahError(f"{name}: there is nothing to average; give one value or more")


def _wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Bounds in 0 .. 1."""
    square = quantile * quantile
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = quantile / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding alone leaves 0 .. 1


def _half_width(residuals: Sequence[float], total: float) -> float:
    """Student's t times the standard error of a sum of the residuals over `total`; NaN for a single one."""
    n = len(residuals)
    if n == 1:
        return math.nan
    scatter = math.fsum(residual * residual for residual in residuals)
    return _student(n - 1) * math.sqrt(n / (n - 1) * scatter) / total


def _ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float], name: str) -> tuple[float, float]:
    """The ratio of the sums, and half the width of its interval by the delta method."""
    total = math.fsum(denominators)
    _check_draws(math.ceil(total), name)
    share = math.fsum(numerators) / total
    residuals = [a - share * b for a, b in zip(numerators, denominators, strict=True)]
    return share, _half_width(residuals, total)


def _exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)  # e^709.8 is the largest double


@functools.cache
def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t.

    Newton's method from the normal quantile; P(|t| < x) is concave for x > 0, so it rises to the root from below.
    """
    norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    x, step = _NORMAL, 1.0
    while step > 1e-12 * x:
        density = math.exp(norm - (freedom + 1) / 2 * math.log1p(x * x / freedom))
        step = (LEVEL - _student_within(x, freedom)) / (2 * density)
        x += step
    return x


def _student_within(x: float, freedom: int) -> float:
    """P(|t| < x) by the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(x, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    terms = []
    for k in range(freedom // 2):
        terms.append(term)
        term *= cosine * cosine * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    series = sine * math.fsum(terms)
    return 2 / math.pi * (angle + series) if odd else series
