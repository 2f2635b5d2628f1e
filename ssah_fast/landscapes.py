"""The safety landscape: what a model refuses and can do everywhere around its weights, and VISAGE.

"Navigating the Safety Landscape", Peng et al. 2024, arXiv 2405.17374. Weights are moved in memory (`neighbourhood`);
which points there are says `terrain`, what is measured at one says `survey`, and what is done stays in `points`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssah_fast import basin, files
from ssah_fast.calibration import Source
from ssah_fast.errors import SsahError
from ssah_fast.evaluation.generation import Decoding
from ssah_fast.evaluation.judges import Judge
from ssah_fast.fingerprints import identity, tokenizer_fingerprint, versions
from ssah_fast.neighbourhood import NORMS, Neighbourhood, RandomAxis, TowardsAxis
from ssah_fast.partition import Units
from ssah_fast.points import PointStore
from ssah_fast.ranks import Ranks
from ssah_fast.silencing import check_layouts
from ssah_fast.survey import Progress, Questions, Survey, make_questions
from ssah_fast.terrain import Terrain, check_axes, cosines, make_terrain, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah_fast.masks import Mask

NAME = "landscape.json"
KIND = "landscape"
SCHEMA = 1
ONLY = ("scu", "ucu", "cu", "ru", "random")
TOLERANCE = 2.0
RATES = ("asr_raw", "asr")  # what VISAGE is formed of: the judge alone, as in the paper, and without degenerate text


def landscape(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    terrain: Terrain | None = None,
    *,
    asr: Source | None = None,
    look_alikes: Source | None = None,
    utility: Source | None = None,
    checkpoint: str | None = None,
    exclude: Sequence[str] = NORMS,
    orthogonal: bool = False,
    units: Units | None = None,
    only: str | None = None,
    preview: bool = False,
    adaptive: bool = False,
    tolerance: float = TOLERANCE,
    systems: Mapping[str, str | None] | None = None,
    suffix: str = "",
    judge: Judge | None = None,
    decoding: Decoding | None = None,
    batch_size: int | None = None,
    chat_template: bool = True,
    limit: int | float | None = None,
    seqlen: int = 2048,
    tasks: Sequence[str] = (),
    task_options: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    ranks: Ranks | None = None,
    told: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure safety and utility at points around a model's weights, which are the same afterwards, bit for bit.

    Args:
        model: A causal language model in evaluation mode, on the device to run on.
        tokenizer: Its tokenizer.
        terrain: Which points (`terrain.make_terrain`); None: the published ones, 21 along each of 3 random directions.
        asr: Harmful requests: a source of `data.load_pairs`, or what it returned. Responses are not looked at.
        look_alikes: Harmless requests that look harmful, for over-refusal.
        utility: Texts, or prompts with answers, for perplexity and token accuracy.
        checkpoint: The folder or hub id that the weights came from, and from which they are read again; None: a copy of
            them is kept in memory.
        exclude: Random directions leave out tensors whose names, in lower case, match one of these patterns.
        orthogonal: Make the second of two random axes orthogonal to the first, tensor by tensor.
        units: The model's units, for `only`.
        only: Move the units of one category alone, also towards a checkpoint: "scu", "ucu", "cu" or "ru"; "random": as
            many random units as there are SCU, module by module.
        preview: Answer at the centre alone and measure the refusal margin elsewhere.
        adaptive: Find the basin's edges by bisection, and leave out points that should not change VISAGE by more than
            about `tolerance` where the rate rises steadily to both sides (`basin.next_alphas`).
        tolerance: In points of VISAGE; half of its interval, where that is less.
        systems: System prompts by name, each of which is tried at every point; None as text is none. By default none
            alone.
        suffix: Put behind every prompt of `asr`.
        judge: Who tells answers from refusals; by default the keywords.
        decoding: By default greedy, at most 128 new tokens.
        batch_size: Answers generated together; None: by the model's shapes.
        chat_template: Whether to use the tokenizer's chat template.
        limit: At most so many records of each set and task, or below 1 that share of them.
        seqlen: Longest sequence of `utility` in tokens.
        tasks: Tasks of lm-evaluation-harness whose mean accuracy is measured at every point.
        task_options: Further arguments of `evaluation.tasks.run`.
        output: A folder; gets a line in points-<rank>.jsonl for every finished point, from which later runs take those
            that they share with it, and landscape.json in the end.
        fresh: Forget the points that the folder holds.
        ranks: This process among those that share the points, and `output`.
        told: Called with a line that the user should read.
        progress: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        The document of landscape.json; docs/landscape.md lists its entries. Rates are in percent.

    Raises:
        SsahError: An argument is wrong, there is nothing to measure, or checkpoints do not fit together.
        NonFiniteError: The model gives NaN or Inf before anything is moved; where it does later, a point is broken.
        OutOfMemoryError: A batch does not fit on the device.
        RunError: A file cannot be read or written.
    """
    terrain, ranks = terrain or make_terrain(), ranks or Ranks()
    check(
        terrain,
        answered=asr is not None,
        preview=preview,
        adaptive=adaptive,
        tolerance=tolerance,
        orthogonal=orthogonal,
        only=only,
        units=units is not None,
    )
    if ranks.world > 1 and output is None:
        raise SsahError(f"output: {ranks.world} processes share their points through a folder; give one")
    questions = make_questions(
        model,
        tokenizer,
        asr=asr,
        look_alikes=look_alikes,
        utility=utility,
        preview=preview,
        systems=systems,
        suffix=suffix,
        judge=judge,
        decoding=decoding,
        batch_size=batch_size,
        chat_template=chat_template,
        limit=limit,
        seqlen=seqlen,
        tasks=tasks,
        task_options=task_options,
    )
    region = _region(model, units, only)
    folder = None if output is None else files.make_folder(output)
    moved: dict[str, Any] = {"exclude": exclude, "region": region, "orthogonal": orthogonal, "told": told}
    with Neighbourhood(model, terrain.all_axes, checkpoint=checkpoint, **moved) as around:
        axes, number = around.describe(), len(terrain.axes)
        head = {
            "model": identity(model),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "settings": {
                "shape": "lines" if terrain.betas is None else "plane",
                "axes": axes[:number],
                "trajectory": axes[number:],
                "alphas": [*terrain.alphas],
                "betas": None if terrain.betas is None else [*terrain.betas],
                "exclude": [*exclude],
                "orthogonal": orthogonal,
                "only": only,
                "adaptive": adaptive,
                "tolerance": tolerance if adaptive else None,
                **questions.settings,
            },
            "versions": versions(),
            "data": questions.data,
        }
        ranks.agree(head)
        gram = None
        if terrain.betas is not None or any(isinstance(axis, TowardsAxis) for axis in terrain.all_axes):
            gram = around.gram().numpy()
            check_axes(terrain, gram)
        survey = Survey(questions, around, PointStore(folder, ranks.rank), ranks, progress)
        with _continued(folder):
            survey.prepare(fresh)
            if adaptive:
                _bisect(terrain, survey, questions, tolerance)
            else:
                survey.measure(terrain.points())
            survey.measure(terrain.ends())
        document = {
            "kind": KIND,
            "schema": SCHEMA,
            **head,
            "rows": _rows(terrain, survey),
            "figures": _figures(terrain, survey, questions),
            "trajectory": [] if gram is None else _trajectory(terrain, survey, gram),
            "skipped": _skipped(terrain, survey),
            "lengths": None if gram is None else np.sqrt(np.diag(gram))[:number].tolist(),
            "cosines": None if gram is None else cosines(gram[:number, :number]),
        }
    if folder is not None and ranks.rank == 0:
        files.write_json(folder / NAME, document)
    return document


def check(
    terrain: Terrain,
    *,
    answered: bool,
    preview: bool = False,
    adaptive: bool = False,
    tolerance: float = TOLERANCE,
    orthogonal: bool = False,
    only: str | None = None,
    units: bool = False,
) -> None:
    """Refuse arguments of `landscape` that contradict each other; it needs no model.

    Args:
        terrain: As for `landscape`. Likewise:
        answered: Whether there are harmful requests.
        preview: See there.
        adaptive: See there.
        tolerance: See there.
        orthogonal: See there.
        only: See there.
        units: Whether there are units.

    Raises:
        SsahError: Two of them exclude each other, or one is out of range.
    """
    if preview and not answered:
        raise SsahError("--preview measures the margin of refusals; give --asr-data")
    if adaptive:
        if preview:
            raise SsahError("--adaptive goes by answers, and --preview leaves them out; leave out one of the two")
        if not answered:
            raise SsahError("--adaptive goes by the attack success rate; give --asr-data")
        if not terrain.symmetric:
            raise SsahError("--adaptive is for lines along random directions, as far to both sides; leave it out here")
        if not 0 < tolerance < 100:
            raise SsahError(f"--tolerance {tolerance} is out of range; it must be above 0 and below 100")
    random = sum(isinstance(axis, RandomAxis) for axis in terrain.axes)
    if orthogonal and random != 2:
        raise SsahError(f"--orthogonal is for two random directions, not for {random}; leave it out")
    if only is not None and only not in ONLY:
        raise SsahError(f"--only {only} is unknown; use {', '.join(ONLY)}")
    if only is not None and terrain.trajectory:
        raise SsahError(f"--trajectory measures whole checkpoints, not {only} alone; leave out --only or --trajectory")
    if units != (only is not None):
        given, missing = ("--units", "--only") if units else (f"--only {only}", "--units")
        raise SsahError(f"{given} goes with {missing}; give both, or neither")


@contextlib.contextmanager
def _continued(folder: Path | None) -> Iterator[None]:
    """Tell who presses Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if folder is None:
            raise
        raise KeyboardInterrupt(
            f"interrupted; finished points are in {folder}, and the same command continues from there"
        ) from interrupt


def _region(model: PreTrainedModel, units: Units | None, only: str | None) -> Mask | None:
    """What may move; None: everything."""
    if units is None or only is None:
        return None
    check_layouts(model, units.layouts)
    return units.shuffled(0).mask(model, train="scu") if only == "random" else units.mask(model, train=only)


def _bisect(terrain: Terrain, survey: Survey, questions: Questions, tolerance: float) -> None:
    """Measure the points that VISAGE depends on; all lines go on at once, so that processes can share the points.

    Where VISAGE turns out to be known better than to the tolerance, half of its interval takes its place.
    """
    while True:
        wanted = [
            terrain.on_line(axis, alpha)
            for axis in range(len(terrain.axes))
            for alpha in basin.next_alphas(terrain.alphas, _curves(terrain, survey, axis), tolerance)
        ]
        if wanted:
            survey.measure(wanted)
            continue
        published = _figures(terrain, survey, questions, RATES[:1])
        finest = min((high - low) / 2 for low, high in (row["visage_interval"] for row in published))
        if finest >= tolerance:
            return
        tolerance = finest


def _curves(terrain: Terrain, survey: Survey, axis: int) -> list[dict[float, float]]:
    """What is known of a line: for each system prompt, the judge's rate in percent by alpha."""
    curves: dict[str, dict[float, float]] = {}
    for alpha in terrain.alphas:
        if survey.knows(steps := terrain.on_line(axis, alpha)):
            for row in survey.rows(steps):
                curves.setdefault(row["system"], {})[alpha] = row["asr_raw"]
    return list(curves.values())


def _rows(terrain: Terrain, survey: Survey) -> list[dict[str, Any]]:
    """A row per measured point and system prompt; the centre is in every line."""
    if terrain.betas is None:
        places = [
            ({"direction": axis.name, "alpha": alpha, "beta": None}, terrain.on_line(number, alpha))
            for number, axis in enumerate(terrain.axes)
            for alpha in terrain.alphas
        ]
    else:
        places = [
            ({"direction": None, "alpha": alpha, "beta": beta}, terrain.on_plane(alpha, beta))
            for beta in terrain.betas
            for alpha in terrain.alphas
        ]
    return [{**where, **row} for where, steps in places if survey.knows(steps) for row in survey.rows(steps)]


def _figures(
    terrain: Terrain, survey: Survey, questions: Questions, rates: Sequence[str] = RATES
) -> list[dict[str, Any]]:
    """VISAGE and its kin, for every system prompt and rate; none where the points are not those of VISAGE."""
    if not terrain.symmetric or questions.preview or not questions.prompts(questions.systems[0]):
        return []
    found = []
    for system in questions.systems:
        for rate in rates:
            flags = [
                {
                    alpha: survey.flags(steps, system, rate)
                    for alpha in terrain.alphas
                    if survey.knows(steps := terrain.on_line(number, alpha))
                }
                for number in range(len(terrain.axes))
            ]
            made = basin.figures(terrain.alphas, flags, groups=questions.prompts(system))
            found.append({"system": system, "rate": rate, **made})
    return found


def _trajectory(terrain: Terrain, survey: Survey, gram: np.ndarray) -> list[dict[str, Any]]:
    """Where each checkpoint lies, and what was measured there."""
    return [
        {"checkpoint": axis.checkpoint, **place(gram, len(terrain.axes) + number, len(terrain.axes))._asdict(), **row}
        for number, (axis, steps) in enumerate(zip(terrain.trajectory, terrain.ends(), strict=True))
        for row in survey.rows(steps)
    ]


def _skipped(terrain: Terrain, survey: Survey) -> list[dict[str, Any]]:
    """What a bisection has left out, by line."""
    if terrain.betas is not None:
        return []
    left = {
        axis.name: [alpha for alpha in terrain.alphas if not survey.knows(terrain.on_line(number, alpha))]
        for number, axis in enumerate(terrain.axes)
    }
    return [{"direction": name, "alphas": alphas} for name, alphas in left.items() if alphas]
