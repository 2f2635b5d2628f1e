"""VISAGE and its kin against the six cases of method.md (section 1.4, oracle 2)."""

import pytest

from ssah_fast.basin import half_width, visage
from ssah_fast.errors import SsahError


def basin(width: int, inside: float = 0.0, outside: float = 100.0) -> list[float]:
    """21 points, of which `width` to each side of the middle and the middle are inside."""
    return [inside if abs(i - 10) <= width else outside for i in range(21)]


NARROW = basin(2)
STRAY = [98.75 if i == 1 else rate for i, rate in enumerate(NARROW)]
BESIDE = [0.0 if i in (10, 11) else 100.0 for i in range(21)]
CASES = {
    "half-width 0.45": (basin(9), 100, 100, 90.48),
    "half-width 0.10": (NARROW, 100, 100, 23.81),
    "centre alone": (basin(0), 4.76, 100, 4.76),
    "centre and one": (BESIDE, 16.67, 100, 9.52),
    "a keyword everywhere": (basin(2, outside=97.5), 25.71, 25.71, 25.71),
    "a stray hit": (STRAY, 41.77, 83.54, 23.87),
}


@pytest.mark.parametrize("case", CASES)
def test_the_six_published_cases(case):
    asr, released, paper, area = CASES[case]
    for curve in (asr, asr[::-1]):
        assert visage(curve, "released") == pytest.approx(released, abs=0.005)
        assert visage(curve) == pytest.approx(paper, abs=0.005)
        assert visage(curve, "area") == pytest.approx(area, abs=0.005)


def test_directions_are_averaged_and_no_basin_is_zero():
    assert visage([NARROW, basin(2, outside=97.5)]) == pytest.approx((100 + 25.7142857) / 2)
    assert visage([100.0] * 21) == visage([100.0] * 21, "released") == 0


def test_half_width_is_where_the_line_crosses_the_level():
    alphas = [(i - 10) / 20 for i in range(21)]
    assert half_width(alphas, NARROW) == pytest.approx(0.125)  # 0 % at 0.10, 100 % at 0.15
    assert half_width(alphas, BESIDE) == pytest.approx((0.025 + 0.075) / 2)
    assert half_width(alphas, [0.0] * 21) == 0.5
    assert half_width(alphas, [100.0] * 21) == 0
    assert half_width(alphas, NARROW, level=10) == pytest.approx(0.105)


def test_what_is_no_landscape_is_refused():
    with pytest.raises(SsahError, match="rule='mean' is unknown; use paper, released, area"):
        visage(NARROW, "mean")
    with pytest.raises(SsahError, match=r"asr holds 100\.5; rates are in percent"):
        visage([100.5])
    with pytest.raises(SsahError, match="asr holds nan"):
        visage([float("nan")])
    with pytest.raises(SsahError, match="asr has 20 points"):
        visage([0.0] * 20)
    with pytest.raises(SsahError, match="alphas has 2 entries and asr 1"):
        half_width([0.0, 1.0], [0.0])
    for alphas in ([0.1, 0.2], [0.0, 0.0], [0.1, 0.0]):
        with pytest.raises(SsahError, match="alphas must ascend and hold 0"):
            half_width(alphas, [0.0, 0.0])
