"""Grids of alpha: how they are written, and what is filled in between measured points."""

import numpy as np
import pytest

from ssah_fast.errors import SsahError
from ssah_fast.grid import fill, gaps, parse_grid, symmetric

PUBLISHED = parse_grid("-0.5:0.5:21", "--alphas")


def test_alphas_are_the_numbers_that_one_would_write():
    assert PUBLISHED == tuple(float(f"{i / 20:.2f}") for i in range(-10, 11))
    assert repr(PUBLISHED[10]) == "0.0" and 0.3 in PUBLISHED and -0.15 in PUBLISHED
    assert parse_grid("-0.25:1.25:31", "--alphas") == tuple(float(f"{i / 20:.2f}") for i in range(-5, 26))
    assert parse_grid("0:1:2", "--alphas") == (0.0, 1.0)


def test_a_list_comes_in_any_order():
    found = parse_grid("0.3, -0.0,-1e-1", "--alphas")
    assert found == (-0.1, 0.0, 0.3) and repr(found[1]) == "0.0"


@pytest.mark.parametrize(
    "text", ["", "a", "0,", "0:1", "0:1:2:3", "0:1:1", "1:0:3", "0:1:2.5", "-0.5:0.5:x", "nan:1:3"]
)
def test_what_is_no_grid_says_how_one_is_written(text):
    with pytest.raises(SsahError, match=r"^--betas '.*' is no grid; use START:STOP:POINTS such as -0.5:0.5:21, or a,b"):
        parse_grid(text, "--betas")


def test_a_grid_without_the_unperturbed_model_or_with_one_twice_is_refused():
    for text in ("0.1,0.2", "-0.5:0.5:20"):
        with pytest.raises(SsahError, match=f"^--alphas '{text}' lacks 0, the unperturbed model; choose a grid that"):
            parse_grid(text, "--alphas")
    for text in ("0,0.1,0.1000000000000001", "0,-0.0", "0,inf", "0,nan", "0:inf:3"):
        with pytest.raises(SsahError, match=f"^--alphas '{text}' holds an alpha twice, or one that is not finite"):
            parse_grid(text, "--alphas")


@pytest.mark.parametrize("alphas", [PUBLISHED, [0.0], [-0.2, -0.1, 0.0, 0.1, 0.2]])
def test_a_symmetric_grid_is_its_own_mirror_image(alphas):
    assert symmetric(alphas)


@pytest.mark.parametrize("alphas", [[-0.2, 0.0, 0.1], [-0.1, 0.1], [-0.1, 0.05, 0.1], [0.0, 0.5, 1.0], PUBLISHED[1:]])
def test_other_grids_are_not(alphas):
    assert not symmetric(alphas)


def test_filled_values_lie_on_the_line_between_their_neighbours():
    alphas = [-1.0, -0.5, 0.0, 0.25, 1.0]
    assert fill(alphas, {-1.0: 80.0, 0.0: 0.0, 1.0: 100.0}) == [80, 40, 0, 25, 100]
    everything = dict(zip(alphas, [3.0, 1.0, 4.0, 1.0, 5.0], strict=True))
    assert fill(alphas, everything) == [*everything.values()]
    known = {-1.0: np.array([0.0, 100.0]), 0.25: np.array([50.0, 100.0]), 1.0: np.array([50.0, 0.0])}
    assert np.allclose(fill(alphas, known), [[0, 100], [20, 100], [40, 100], [50, 100], [50, 0]], rtol=1e-15)


def test_nothing_is_made_up_beyond_the_measured_points():
    for known, end in (({0.0: 1.0, 1.0: 1.0}, -1), ({-1.0: 1.0, 0.0: 1.0}, 1)):
        with pytest.raises(SsahError, match=f"alpha {end} was not measured; without the ends"):
            fill([-1.0, 0.0, 1.0], known)


def test_gaps_are_between_known_points_that_follow_each_other():
    assert gaps([-1.0, -0.5, 0.0, 1.0], {1.0, -1.0, 0.0}) == [(0, 2), (2, 3)]
