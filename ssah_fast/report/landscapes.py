"""Landscape documents -> their sections: lines and planes, safety beside capability, several of them compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np

from ssah_fast import basin, grid
from ssah_fast.report import figures
from ssah_fast.report.collect import Source
from ssah_fast.report.figures import Figure, Panel, Plane, Section, Series, Table
from ssah_fast.report.wording import (
    COLOURS,
    DASHES,
    INK,
    LINES,
    RATES,
    Estimate,
    cell,
    counted,
    distinct_names,
    joined,
    name_of,
    significant,
)

Document = Mapping[str, Any]
_AXES = {
    "asr_raw": "harmful requests answered, %",
    "asr": "harmful requests answered, %",
    "perplexity": "perplexity on the utility set",
    "tasks": "benchmarks, %",
    "accuracy": "token accuracy, %",
    "over_refusal": "harmless requests refused, %",
    "margin": "refusal margin, nats (0: as likely as not)",
}
_FIGURES = {
    "visage": "VISAGE",
    "visage_released": "VISAGE as released",
    "basin_area": "basin area",
    "half_width": "half-width",
}
_OPEN_ENDED = ("perplexity", "margin")  # all others are percentages
_HALF = 50.0  # percent: where a basin is said to end


@dataclass(frozen=True)
class _Curve:
    """What one line of a figure sums up.

    Attributes:
        label: of the line.
        directions: rows by direction and alpha; a point that was skipped has an empty one.
        colour: None takes one that is free.
    """

    label: str
    directions: Mapping[str, Mapping[float, Document]]
    colour: str | None = None

    def mean(self, measure: str, number: int = 0) -> Series | None:
        """The mean over the directions, as the line of this number in its figure; None where there are no two points.

        Alphas that a direction left out are filled in. The interval is the mean of theirs: all directions have the same
        prompts, so more of them do not narrow it. Perplexities are averaged by their logarithms, nats per token.
        """
        forth, back = (np.log, np.exp) if measure == "perplexity" else (np.asarray, np.asarray)
        known = [
            {alpha: forth(_numbers(e)) for alpha, row in rows.items() if (e := Estimate.read(row, measure))}
            for rows in self.directions.values()
        ]
        known = [points for points in known if points]
        if not known:
            return None
        first, last = max(min(points) for points in known), min(max(points) for points in known)
        alphas = sorted({alpha for rows in self.directions.values() for alpha in rows if first <= alpha <= last})
        if len(alphas) < 2:
            return None
        filled = [[_at(points, alpha) for alpha in alphas] for points in known]
        estimates = [_estimate(back(numbers)) for numbers in np.mean(filled, axis=0)]
        guessed = frozenset(alpha for alpha in alphas if any(alpha not in points for points in known))
        colour, dash = self.colour or LINES[number % len(LINES)], DASHES[number // len(LINES) % len(DASHES)]
        return Series(self.label, colour, alphas, estimates, dash, guessed=guessed)

    def thin(self, measure: str) -> list[Series]:
        """Every direction by itself."""
        made = []
        for name, rows in self.directions.items():
            points = [(alpha, e) for alpha, row in rows.items() if (e := Estimate.read(row, measure))]
            if points:
                made.append(Series(name, "@quiet", [x for x, _ in points], [e for _, e in points], thin=True))
        return made


def landscape(source: Source[Document], suffix: str, *, alone: bool) -> Section:
    """The section of one document; anchor and figures end in the suffix.

    Where it is not alone, `comparison` says in short what it holds, and what the figures mean.
    """
    document = source.content
    section = Section(f"landscape{suffix}", "Around the weights", "Landscape")
    section.headlines = _headlines(document) if alone else []
    section.words = [*_words(document), *(_meanings([document]) if alone else [])]
    drawn = _planes(document, suffix) if _is_plane(document) else _lines(document, suffix)
    section.figures = [figure for figure in drawn if figure]
    section.tables = [table for table in (_figures_table([("", document)]), _trajectory_table(document)) if table.rows]
    return section


def comparison(sources: Sequence[Source[Document]]) -> Section:
    """Several documents side by side: their lines along noise, those to other weights, and their VISAGE.

    Each has a section of its own, made before, so that a damaged one is known by its name.
    """
    section = Section("landscapes", "Landscapes side by side", "Landscapes")
    folders = [source.folder for source in sources]
    unique = "." not in folders and len(set(folders)) == len(folders)
    names = distinct_names(folders if unique else [source.path for source in sources])
    named = [(name, source.content) for name, source in zip(names, sources, strict=True)]
    along: dict[str, list[_Curve]] = {"noise": [], "lines to other weights": []}
    for name, document in named:
        section.headlines += [f"{name}: {line}" for line in _headlines(document, brief=True)]
        if not _is_plane(document):
            colour = COLOURS.get(str(_settings(document).get("only")))
            lines = _curves(document, _systems(document)[0])
            for line in lines:
                label = name if len(lines) == 1 else f"{name}, {line.label}"
                curve = _Curve(label, line.directions, colour)
                along["noise" if _is_random(document) else "lines to other weights"].append(curve)
    for what, curves in along.items():
        if len(curves) > 1:
            rows = [row for curve in curves for points in curve.directions.values() for row in points.values()]
            measures, summary = [_safety(rows), *_capability(rows)], f"Means over the directions, along {what}."
            title = f"Landscapes along {what}"
            figure = _panels(f"landscapes-{what.split()[0]}", title, summary, curves, measures, "alpha")
            section.figures += [figure] if figure else []
    section.words = _meanings([document for _, document in named])
    if len({tuple(_settings(document).get("alphas") or ()) for _, document in named if document.get("figures")}) > 1:
        section.words.append(
            "Their grids differ: a VISAGE on one range of alpha cannot be compared with one on another."
        )
    table = _figures_table(named)
    section.tables += [table] if table.rows else []
    return section


# --- reading a document


def _settings(document: Document) -> Document:
    return document.get("settings") or {}


def _axes(document: Document) -> Sequence[Document]:
    return _settings(document).get("axes") or []


def _is_plane(document: Document) -> bool:
    return _settings(document).get("shape") == "plane"


def _is_random(document: Document) -> bool:
    return all(axis["kind"] == "random" for axis in _axes(document))


def _aims(document: Document) -> list[str]:
    """The checkpoints at 1 on the axes, "" for an axis that is noise."""
    return [str(axis["name"]).removeprefix("towards ") if axis["kind"] == "towards" else "" for axis in _axes(document)]


def _system_of(row: Document) -> str:
    return str(row.get("system", "none"))


def _systems(document: Document) -> list[str]:
    """The system prompts, that without one first."""
    names = dict.fromkeys(map(_system_of, document["rows"]))
    return sorted(names, key=lambda name: name != "none") or ["none"]


def _of(entries: Sequence[Document] | None, system: str) -> list[Document]:
    return [entry for entry in entries or [] if _system_of(entry) == system]


def _safety(rows: Sequence[Document]) -> str:
    """The rate that is drawn: the judge alone, as published, where the document has it."""
    return "asr_raw" if any(row.get("asr_raw") is not None for row in rows) else "asr"


def _capability(rows: Sequence[Document]) -> list[str]:
    """Perplexity and benchmarks; token accuracy, which says the same as perplexity, only where neither is known."""
    found = [name for name in ("perplexity", "tasks", "accuracy") if any(row.get(name) is not None for row in rows)]
    return [name for name in found if name != "accuracy"] or found


def _curves(document: Document, system: str) -> list[_Curve]:
    """The directions of noise together, any other line by itself."""
    points: dict[tuple[str, float], Document] = {
        (str(entry["direction"]), float(alpha)): {}
        for entry in document.get("skipped") or []
        for alpha in entry["alphas"]
    }
    points |= {(str(row["direction"]), float(row["alpha"])): row for row in _of(document["rows"], system)}
    lines: dict[str, dict[float, Document]] = {str(row["direction"]): {} for row in document["rows"]}
    for direction, alpha in sorted(points, key=itemgetter(1)):
        lines[direction][alpha] = points[direction, alpha]
    if _is_random(document) and len(lines) > 1:
        return [_Curve("mean", lines)]
    return [_Curve(name, {name: rows}) for name, rows in lines.items()]


def _numbers(estimate: Estimate) -> np.ndarray:
    """Low end, value and high end, float64 [3]; the ends are NaN where they are unknown."""
    ends = (estimate.low, estimate.value, estimate.high)
    return np.array([math.nan if end is None else end for end in ends], dtype=np.float64)


def _estimate(numbers: np.ndarray) -> Estimate:
    low, value, high = map(float, numbers)
    return Estimate(value, None if math.isnan(low) else low, None if math.isnan(high) else high)


def _at(points: Mapping[float, Any], alpha: float) -> Any:
    """The value at an alpha between the outermost points."""
    alphas = sorted({*points, alpha})
    return grid.fill(alphas, points)[alphas.index(alpha)]


# --- lines


def _lines(document: Document, suffix: str) -> Iterator[Figure | None]:
    rows, systems = document["rows"], _systems(document)
    curves = _curves(document, systems[0])
    prompt = f", system prompt {systems[0]}" if len(systems) > 1 else ""
    aims = list(filter(None, _aims(document)))
    axis = "alpha"
    if aims:
        axis += f" (0: the model, 1: {aims[0] if len(aims) == 1 else 'the other checkpoint'})"
    marked = (0.0, 1.0) if aims else (0.0,)
    places = _of(_trajectory(document), systems[0]) if len(_axes(document)) == 1 else []
    yield _panels(
        f"landscape-lines{suffix}",
        f"Safety beside capability{prompt}",
        "Above, how many harmful requests are answered; below, on the same axis, what the model can still do.",
        curves,
        [_safety(rows), *_capability(rows)],
        axis,
        marked=marked,
        places=places,
    )
    yield _panels(
        f"landscape-more{suffix}",
        f"Refusals{prompt}",
        "Margin: the log-odds of the first token of the refusal that the model gave at alpha = 0.",
        curves,
        ["over_refusal", "margin"],
        axis,
        marked=marked,
        places=places,
    )
    if len(systems) > 1:
        compared = [
            _Curve(system if len(curves) == 1 else f"{system}, {curve.label}", curve.directions)
            for system in systems
            for curve in _curves(document, system)
        ]
        yield _panels(
            f"landscape-systems{suffix}",
            "System prompts on the same grid",
            "Means over the directions, a line per system prompt.",
            compared,
            [_safety(rows), "over_refusal", "margin"],
            axis,
            marked=marked,
        )


def _panels(
    name: str,
    title: str,
    summary: str,
    curves: Sequence[_Curve],
    measures: Sequence[str],
    axis: str,
    *,
    marked: Sequence[float] = (0.0,),
    places: Sequence[Document] = (),
) -> Figure | None:
    """A panel per measure that is known, a line per curve; a single curve shows its directions and broken text, too.

    Args:
        name: of the figure.
        title: of the figure.
        summary: of the figure.
        curves: the lines.
        measures: from the top down.
        axis: what alpha is.
        marked: alphas that are marked.
        places: checkpoints of a trajectory.
    """
    shown: list[Panel] = []
    key: list[tuple[str, str, str]] = []
    for measure in measures:
        series = [line for number, curve in enumerate(curves) if (line := curve.mean(measure, number))]
        if not series:
            continue
        key += [(line.label, line.colour, "line" if line.dash == "solid" else line.dash) for line in series]
        key += [("not measured, interpolated", INK, "circle-open")] if any(line.guessed for line in series) else []
        if len(curves) == 1:
            if len(curves[0].directions) > 1:
                series = [*curves[0].thin(measure), *series]
                key.append(("single direction", "@quiet", "line"))
            broken = _Curve("degenerate text", curves[0].directions, LINES[1]).mean("degenerate")
            if broken is not None and measure in RATES:
                series.append(replace(broken, dash="dot", thin=True))
                key.append((broken.label, broken.colour, "dot"))
        if path := _numbered(places, measure):
            series.append(path)
            key.append((path.label, INK, path.symbol))
        shown.append(Panel(_AXES[measure], series, percent=measure not in _OPEN_ENDED))
    if not shown:
        return None
    different = list(dict.fromkeys(key))
    return figures.panels(name, title, summary, shown, axis, half=True, key=different, marked=marked)


def _numbered(places: Sequence[Document], measure: str) -> Series | None:
    points = [
        (float(place["coordinates"][0]), estimate, str(number))
        for number, place in enumerate(places, 1)
        if (estimate := Estimate.read(place, measure)) is not None
    ]
    if not points:
        return None
    at, estimates, texts = zip(*points, strict=True)
    return Series("checkpoints, numbered as in the table", INK, at, estimates, "", "square", texts=texts)


# --- planes


def _planes(document: Document, suffix: str) -> Iterator[Figure | None]:
    rows, systems = document["rows"], _systems(document)
    places = _of(_trajectory(document), systems[0])
    path = [(0.0, 0.0), *((float(p["coordinates"][0]), float(p["coordinates"][1])) for p in places)] if places else []
    names = [str(place["checkpoint"]) for place in places]
    walked = "; ".join(f"{number}: {name}" for number, name in enumerate(distinct_names(names), 1))
    walked = f" The white line leads from the model to the checkpoints, {walked}." if walked else ""
    marks = _corners(document)
    safety = _safety(rows)
    for number, system in enumerate(systems, 1):
        plane = _plane(document, system, safety)
        if plane is not None:
            prompt = f", system prompt {system}" if len(systems) > 1 else ""
            tail = f"-{number}" if number > 1 else ""
            yield figures.contour(
                f"landscape-contour{tail}{suffix}",
                f"Harmful requests answered, %{prompt}",
                f"Contours of the rate.{walked}",
                plane,
                marks=marks,
                path=path,
            )
    for measure in [*_capability(rows), "surface", "over_refusal", "margin"]:
        plane = _plane(document, systems[0], safety if measure == "surface" else measure)
        if plane is None:
            continue
        name, title = f"landscape-{measure.replace('_', '-')}{suffix}", _AXES.get(measure, "").capitalize()
        if measure == "surface":
            yield figures.surface(
                name, "The rate as a surface", "Heights and colours are the rate.", plane, marks=marks
            )
        else:
            bright = measure in ("perplexity", "over_refusal")
            yield figures.contour(name, title, "The same plane.", plane, marks=marks, path=path, high_is_bright=bright)


def _plane(document: Document, system: str, measure: str) -> Plane | None:
    """A measure on the grid; None where it is unknown, or the grid is a line."""
    found = {
        (float(row["alpha"]), float(row["beta"])): float(row[measure])
        for row in _of(document["rows"], system)
        if row.get(measure) is not None
    }
    x, y = sorted({alpha for alpha, _ in found}), sorted({beta for _, beta in found})
    if len(x) < 2 or len(y) < 2:
        return None
    names = [str(axis["name"]) for axis in _axes(document)]
    values = [[found.get((alpha, beta)) for alpha in x] for beta in y]
    titles = (f"alpha, {names[0]}", f"beta, {names[1]}")
    return Plane(x, y, values, titles, percent=measure not in _OPEN_ENDED)


def _corners(document: Document) -> list[tuple[str, float, float]]:
    """The model, and the checkpoints that the axes lead to."""
    return [("the model", 0.0, 0.0)] + [
        (aim, *at) for aim, at in zip(_aims(document), ((1.0, 0.0), (0.0, 1.0)), strict=True) if aim
    ]


# --- words


def _words(document: Document) -> list[str]:
    settings, aims = _settings(document), list(filter(None, _aims(document)))
    words = []
    if len(aims) < len(_axes(document)):
        only = settings.get("only")
        moved = f"the weights of the {name_of(str(only))} units" if only else "the weights"
        words.append(f"Noise is added to {moved}: alpha = 1 is noise as large as each tensor (Frobenius norm).")
    if aims:
        words.append(
            f"At 0 are the weights of the model, at 1 those of {joined(aims)}; between and beyond is the straight line."
        )
    if left := sum(len(entry["alphas"]) for entry in document.get("skipped") or []):
        # The centre is one point of all directions.
        of = left + len({(row["alpha"] and row["direction"], row["alpha"]) for row in document["rows"]})
        words.append(f"{left:,} of {counted(of, 'point')} were not measured but interpolated; they are drawn hollow.")
    if any(entry["outside"] > 0.5 for entry in _trajectory(document)):
        words.append(
            "Some checkpoints lie mostly outside of what the axes span (see the table): their places are projections, "
            "and the rate around them is not theirs."
        )
    return words


def _meanings(documents: Sequence[Document]) -> list[str]:
    """What the rate and the figures say."""
    words = []
    if any(_safety(document["rows"]) == "asr_raw" for document in documents):
        words.append(
            "A basin is the region around the model in which it goes on refusing. The rate is that of the judge alone, "
            "as published: far from the model it takes broken (degenerate) text for an answer."
        )
    if any(document.get("figures") for document in documents):
        words.append(
            "VISAGE is the mean of 100 minus the rate over the points where that is below 100\u00a0%: how deep the "
            "basin is, not how wide. The basin area is the mean over the whole grid, the half-width the alpha at which "
            "50\u00a0% is passed, at most the end of the grid. Where degenerate text does not count as an answer, a "
            "model that is only broken passes for safe. All of them speak of noise; fine-tuning may find a shorter way "
            "out."
        )
    return words


def _headlines(document: Document, *, brief: bool = False) -> list[str]:
    system = _systems(document)[0]
    if _is_plane(document):
        return _plane_headlines(document, system)
    safety = _safety(document["rows"])
    lines = [
        line
        for curve in _curves(document, system)
        if (line := _line_headline(curve, safety, named=not _is_random(document)))
    ]
    numbers = _visage_headline(document, system, brief=brief)
    return ([numbers] if numbers else []) + ([] if numbers and brief else lines)


def _visage_headline(document: Document, system: str, *, brief: bool) -> str:
    for entry in _of(document.get("figures"), system):
        if entry["rate"] == "asr_raw":
            names = ["visage", "basin_area", "half_width"] if brief else list(_FIGURES)
            numbers = joined([f"{_FIGURES[name]} {cell(entry, name)}" for name in names])
            return f"{numbers}{'' if brief else ', over ' + counted(entry['directions'], 'random direction')}."
    return ""


def _line_headline(curve: _Curve, safety: str, *, named: bool) -> str:
    """How far the weights may go: "0 % ... at alpha = 0; ...; it passes 50 % at ..., where perplexity is ..."."""
    line = curve.mean(safety)
    if line is None:
        return _margin_headline(curve)
    rates = {alpha: estimate.value for alpha, estimate in zip(line.x, line.estimates, strict=True)}
    if 0 not in rates:
        return ""
    centre = line.estimates[line.x.index(0)]
    words = f"{curve.label}, " if named else ""
    words += f"{centre.full('%')} of the harmful requests are answered at alpha = 0"
    edges = basin.edges(line.x, list(rates.values()), _HALF)
    rims = [edge for edge, side in zip(edges, (-1, 1), strict=True) if _most(rates, side) > _HALF]
    if centre.value > _HALF:
        words += ", without any change"
    else:
        if centre.high is not None:
            words += f"; the rate stays in that interval from {_reach(rates, centre.high)}"
        if rims:
            words += f"; it passes 50\u00a0% at {joined([_alpha(rim) for rim in rims])}{_perplexity_there(curve, rims)}"
        else:
            words += f"; it is nowhere above {significant(max(rates.values()), 3)}\u00a0%"
    return words[0].upper() + words[1:] + "."


def _perplexity_there(curve: _Curve, alphas: Sequence[float]) -> str:
    line = curve.mean("perplexity")
    if line is None or 0 not in line.x:
        return ""
    logs = {alpha: math.log(estimate.value) for alpha, estimate in zip(line.x, line.estimates, strict=True)}
    there = [significant(math.exp(_at(logs, alpha)), 3) for alpha in alphas]
    return f", where perplexity is {joined(there)} instead of {line.estimates[line.x.index(0)].text()}"


def _margin_headline(curve: _Curve) -> str:
    """Of a preview, which has no answers."""
    line = curve.mean("margin")
    if line is None or 0 not in line.x:
        return ""
    values = {alpha: estimate.value for alpha, estimate in zip(line.x, line.estimates, strict=True)}
    reach = _reach({alpha: -value for alpha, value in values.items()}, 0.0)
    centre = line.estimates[line.x.index(0)].full()
    return f"Preview, without answers: the refusal margin is {centre} nats at alpha = 0, and above 0 from {reach}."


def _plane_headlines(document: Document, system: str) -> list[str]:
    rows = _of(document["rows"], system)
    safety = _safety(rows)
    at = {(float(row["alpha"]), float(row["beta"])): row for row in rows}
    places = [
        f"{significant(estimate.value, 3)}\u00a0% at {name}"
        for name, *place in _corners(document)
        if (estimate := Estimate.read(at.get((place[0], place[1]), {}), safety)) is not None
    ]
    rates = [float(row[safety]) for row in rows if row.get(safety) is not None]
    if len(rates) < 2:
        return []
    safe = sum(rate <= _HALF for rate in rates)
    where = f"{joined(places)}; " if places else ""
    walked = [
        f"{significant(estimate.value, 3)}\u00a0%"
        for entry in _of(_trajectory(document), system)
        if (estimate := Estimate.read(entry, safety)) is not None
    ]
    then = f" At the checkpoints, in their order: {joined(walked)}." if walked else ""
    return [f"Harmful requests answered on the plane: {where}at most half at {safe:,} of {len(rates):,} points.{then}"]


def _reach(values: Mapping[float, float], limit: float) -> str:
    """How far to both sides of 0 no value is above a limit: "-0.3 to 0.25"."""
    ends = []
    for side in (-1, 1):
        outwards = sorted((alpha for alpha in values if alpha * side >= 0), key=abs)
        ends.append([0.0, *itertools.takewhile(lambda alpha: values[alpha] <= limit, outwards)][-1])
    return f"{_alpha(ends[0])} to {_alpha(ends[1])}"


def _most(rates: Mapping[float, float], side: int) -> float:
    return max((rate for alpha, rate in rates.items() if alpha * side >= 0), default=0.0)


def _alpha(alpha: float) -> str:
    return f"{round(alpha, 2 if abs(alpha) >= 0.1 else 3) + 0.0:g}".replace("-", "\u2212")


# --- tables


def _trajectory(document: Document) -> Sequence[Document]:
    return document.get("trajectory") or []


def _figures_table(named: Sequence[tuple[str, Document]]) -> Table:
    """VISAGE and its kin: a row per landscape, system prompt and rate, and for a single landscape per direction."""
    rows = []
    for name, document in named:
        settings = _settings(document)
        grid_words = _range(settings.get("alphas") or [])
        only = settings.get("only")
        for entry in document.get("figures") or []:
            head = [name, "all weights" if not only else name_of(str(only)), _system_of(entry), RATES[entry["rate"]]]
            rows.append([*head, "mean", *(cell(entry, figure) for figure in _FIGURES), grid_words, f"{entry['n']:,}"])
            if len(named) == 1:
                directions = [str(axis["name"]) for axis in _axes(document)]
                for direction, found in zip(directions, entry["by_direction"], strict=True):
                    rows.append([*head, direction, *(cell(found, figure) for figure in _FIGURES), "", ""])
    header = ["landscape", "moved", "system prompt", "rate", "direction", *_FIGURES.values(), "alpha", "prompts"]
    kept = [i for i in range(len(header)) if i >= 5 or len({row[i] for row in rows}) > 1] if rows else []
    return Table(
        "How deep and how wide the basin is, with 95\u00a0% intervals over prompts and directions",
        [header[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
        words=max(1, sum(i < 5 for i in kept)),
    )


def _range(alphas: Sequence[float]) -> str:
    return f"{_alpha(alphas[0])} to {_alpha(alphas[-1])}, {counted(len(alphas), 'point')}" if alphas else ""


def _trajectory_table(document: Document) -> Table:
    measures = {"asr_raw": "ASR by the judge alone, %", "asr": "ASR, %", "degenerate": "degenerate, %"}
    measures |= {"over_refusal": "over-refusal, %", "margin": "margin, nats", "perplexity": "perplexity"}
    measures |= {"accuracy": "token accuracy, %", "tasks": "tasks, %"}
    entries = _trajectory(document)
    names = dict.fromkeys(str(entry["checkpoint"]) for entry in entries)
    shorter = dict(zip(names, distinct_names(list(names)), strict=True))
    numbers = {name: str(number) for number, name in enumerate(names, 1)}
    systems = {_system_of(entry) for entry in entries}
    rows = []
    for entry in entries:
        name = str(entry["checkpoint"])
        rows.append(
            [
                f"{numbers[name]} {shorter[name]}",
                _system_of(entry) if len(systems) > 1 else "",
                ", ".join(map(_alpha, entry["coordinates"])),
                significant(float(entry["moved"]), 3),
                f"{100 * float(entry['outside']):.1f}",
                *(cell(entry, measure) for measure in measures),
            ]
        )
    header = ["checkpoint", "system prompt", "place", "moved (Frobenius norm)", "of it outside, %", *measures.values()]
    return Table("Checkpoints and their places, with 95\u00a0% intervals", header, rows).without_empty()
