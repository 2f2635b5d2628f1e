"""Which points around a model's weights a landscape has, and where other checkpoints lie among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ssah_fast import grid
from ssah_fast.errors import SsahError
from ssah_fast.neighbourhood import Axis, RandomAxis, TowardsAxis

# Published grids (Peng et al. 2024, arXiv 2405.17374, released code): 20 steps of 0.05 to both sides of a model, and 20
# between two models with 5 beyond each.
AROUND = "-0.5:0.5:21"
BETWEEN = "-0.25:1.25:31"
DIRECTIONS = 3
SEED = 123
Steps = tuple[float, ...]
_ALIKE = 1e-9  # 1 - |cosine| below which two axes are one


@dataclass(frozen=True)
class Terrain:
    """The points of a landscape: on lines, one per axis, or on a plane of two axes; and checkpoints beside them.

    A point is a step along each of `all_axes`.

    Attributes:
        axes: A step of 1 along one is a random direction of the weights' own norm, or another checkpoint.
        alphas: Steps along every line, or along the plane's first axis; 0 among them.
        betas: Steps along the plane's second axis, 0 among them; None: lines.
        trajectory: Checkpoints to be measured where they are.
    """

    axes: tuple[Axis, ...]
    alphas: tuple[float, ...]
    betas: tuple[float, ...] | None = None
    trajectory: tuple[TowardsAxis, ...] = ()

    @property
    def all_axes(self) -> tuple[Axis, ...]:
        """The axes, and behind them those that lead to the checkpoints of the trajectory."""
        return (*self.axes, *self.trajectory)

    @property
    def symmetric(self) -> bool:
        """Whether these are lines through the model that go as far to the one side as to the other."""
        return self.betas is None and all(isinstance(a, RandomAxis) for a in self.axes) and grid.symmetric(self.alphas)

    def on_line(self, axis: int, alpha: float) -> Steps:
        """The point at `alpha` along one axis."""
        return tuple(alpha if k == axis else 0.0 for k in range(len(self.all_axes)))

    def on_plane(self, alpha: float, beta: float) -> Steps:
        """The point at (alpha, beta)."""
        return (alpha, beta, *(0.0 for _ in self.trajectory))

    def points(self) -> list[Steps]:
        """Every point on the lines or the plane once, the centre first."""
        if self.betas is None:
            found = [self.on_line(axis, alpha) for axis in range(len(self.axes)) for alpha in self.alphas]
        else:
            found = [self.on_plane(alpha, beta) for beta in self.betas for alpha in self.alphas]
        return list(dict.fromkeys([self.on_line(0, 0.0), *found]))

    def ends(self) -> list[Steps]:
        """The points of the trajectory."""
        return [self.on_line(axis, 1.0) for axis in range(len(self.axes), len(self.all_axes))]


def make_terrain(
    *,
    to: Sequence[str] = (),
    dimensions: int | None = None,
    directions: int | None = None,
    direction_seed: int = SEED,
    alphas: str | Sequence[float] | None = None,
    betas: str | Sequence[float] | None = None,
    trajectory: Sequence[str] = (),
) -> Terrain:
    """The landscape that some checkpoints and a number of dimensions ask for.

    Args:
        to: Checkpoints: with none, directions are random; one is the first axis; two span a plane.
        dimensions: 1: lines; 2: a plane, whose second axis is random where `to` has one checkpoint. None: 2 where `to`
            has two, else 1.
        directions: Lines along random directions; None: 3, as published.
        direction_seed: Of the first random direction; the next have the numbers after it.
        alphas: "START:STOP:POINTS" or the steps themselves; None: the published grid of the first axis.
        betas: Likewise along the second axis of a plane.
        trajectory: Checkpoints, folders or hub ids.

    Raises:
        SsahError: The arguments contradict each other, or a grid is wrong or lacks 0.
    """
    if len(to) > 2:
        raise SsahError(f"--to and --and name {len(to)} checkpoints; a plane has two axes")
    plane = dimensions == 2 if dimensions is not None else len(to) == 2
    if len(to) == 2 and not plane:
        raise SsahError("--dimensions 1: --to and --and span a plane; leave one of them out, or use --dimensions 2")
    if directions is not None and (plane or to):
        raise SsahError(f"--directions {directions} is for lines along random directions; leave it out here")
    if directions is not None and directions < 1:
        raise SsahError(f"--directions {directions} is out of range; it must be 1 or more")
    if betas is not None and not plane:
        raise SsahError("--betas is for a plane; add --dimensions 2 or --and")
    number = max(0, 2 - len(to)) if plane else 0 if to else DIRECTIONS if directions is None else directions
    axes: tuple[Axis, ...] = (*map(TowardsAxis, to), *(RandomAxis(direction_seed + k) for k in range(number)))
    second = _grid(betas, axes[1], "--betas") if plane else None
    return Terrain(axes, _grid(alphas, axes[0], "--alphas"), second, tuple(map(TowardsAxis, trajectory)))


def _grid(given: str | Sequence[float] | None, axis: Axis, argument: str) -> tuple[float, ...]:
    if given is None:
        given = AROUND if isinstance(axis, RandomAxis) else BETWEEN
    return grid.parse_grid(given, argument) if isinstance(given, str) else grid.checked(given, f"{argument} {[*given]}")


class Place(NamedTuple):
    """Where a checkpoint lies in the space of some axes.

    Attributes:
        coordinates: A step per axis: the nearest point of their space.
        moved: How far the checkpoint is from the model, Frobenius norm over all weights.
        outside: The part of that way, 0 to 1, that leads out of the space: distance to the nearest point / `moved`.
    """

    coordinates: list[float]
    moved: float
    outside: float


def place(gram: np.ndarray, axis: int, onto: int) -> Place:
    """Where the end of an axis lies in the space of the first ones.

    Args:
        gram: Inner products of all axes, float64 [n, n].
        axis: Number of the axis.
        onto: The space is that of axes 0 to `onto` - 1, which are independent.
    """
    moved = float(np.sqrt(gram[axis, axis]))
    if moved == 0:
        return Place([0.0] * onto, 0.0, 0.0)
    coordinates = np.linalg.solve(gram[:onto, :onto], gram[:onto, axis])
    inside = float(coordinates @ gram[:onto, axis]) / gram[axis, axis]
    return Place(coordinates.tolist(), moved, float(np.sqrt(max(0.0, 1 - inside))))


def cosines(gram: np.ndarray) -> list[list[float]]:
    """The cosines between axes, from their inner products."""
    norms = np.sqrt(np.diag(gram))
    return (gram / np.outer(norms, norms)).tolist()


def check_axes(terrain: Terrain, gram: np.ndarray) -> None:
    """Refuse axes that lead nowhere, or span no plane.

    Args:
        terrain: Which points.
        gram: Inner products of all its axes, float64 [n, n].

    Raises:
        SsahError: A checkpoint of an axis is the model itself, or the two axes of a plane are one.
    """
    for number, axis in enumerate(terrain.axes):
        if gram[number, number] == 0:
            raise SsahError(f"{axis.name}: its weights are those of MODEL; give another checkpoint")
    if terrain.betas is not None and 1 - abs(cosines(gram[:2, :2])[0][1]) < _ALIKE:
        raise SsahError(f"{terrain.axes[0].name} and {terrain.axes[1].name} are one direction; a plane needs two")
