"""Figures as plotly specifications: plain data, so that only writing a page or an image needs plotly itself.

Colours that depend on light, dark or paper are the names of `THEME`, which the page and `save_figures` fill in.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ssah_fast import files
from ssah_fast.categories import REPORTED, Category
from ssah_fast.errors import SsahError
from ssah_fast.partition import Units
from ssah_fast.report.wording import COLOURS, NAMES, Estimate, significant
from ssah_fast.scores import Scores

FORMATS = ("png", "svg")
THEME = {"@ink": "#1b1b1b", "@quiet": "#5c5c5c", "@grid": "#e2e2e2", "@paper": "#ffffff"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# A map of single units is read square by square up to here; larger models are shown as shares of each layer.
LARGEST_MAP = 8192
_MAP_COLUMNS = 64
# Points of a scatter that an SVG draws without delay on a phone.
MOST_POINTS = 4000
_LOG_FROM = 4.0  # a logarithmic axis where the largest value is this many times the smallest
PUBLISHED = "diamond-open"  # the symbol of a figure that was not measured here
_PERCENT: dict[str, Any] = {"range": [-2, 102], "tickvals": [0, 25, 50, 75, 100], "tickangle": 0}
# Cividis (Nunez, Anderton and Renslow 2018): rises evenly in lightness, with and without colour blindness.
_SHADES = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
_AZIMUTH, _ELEVATION = math.radians(-35), math.radians(52)  # from where a surface is seen
_LABEL_HEIGHT = 17  # px from one direct label to the next


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row.

    Attributes:
        caption: what the rows are.
        header: one title per column, with the unit.
        rows: texts, as many per row as there are titles.
        words: how many leading columns are words, and not figures, which are set to the right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def without_empty(self) -> Table:
        """The table without the columns in which no row has anything."""
        kept = [i for i in range(len(self.header)) if i < self.words or any(row[i] for row in self.rows)]
        header, rows = [self.header[i] for i in kept], [[row[i] for i in kept] for row in self.rows]
        return Table(self.caption, header, rows, self.words)


@dataclass(frozen=True)
class Figure:
    """A figure, what it shows in words, and the figures that it draws.

    Attributes:
        name: unique on the page, and the name of its file.
        title: what is drawn.
        summary: the text alternative: what there is to see.
        data: plotly traces.
        layout: plotly layout.
        key: label, colour and symbol ("square", "circle", "circle-open", "diamond-open", "line", "dash", "dot") of what
            is not labelled where it is drawn.
        narrow: entries of the layout, by their dotted path, that are different on a phone.
        table: the drawn figures; None where a table of the section has them.
        half: two of these have room beside each other.
    """

    name: str
    title: str
    summary: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    key: Sequence[tuple[str, str, str]] = ()
    narrow: Mapping[str, Any] = field(default_factory=dict)
    table: Table | None = None
    half: bool = False

    def json(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {"name": self.name, "data": self.data, "layout": self.layout, "narrow": dict(self.narrow)}


@dataclass
class Section:
    """A part of the page; what is empty is not shown.

    Attributes:
        name: the anchor.
        title: the heading.
        short: the same in one word.
        headlines: what the summary at the top of the page says of it.
        words: how to read it.
        figures: in order.
        tables: behind the figures.
        folded: tables of detail, not open at first.
        listings: title and text of what is shown as it is, folded.
    """

    name: str
    title: str
    short: str
    headlines: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    listings: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A point with its interval."""

    estimate: Estimate
    colour: str
    symbol: str = "circle"


@dataclass(frozen=True)
class Row:
    """A row of `dots`.

    Attributes:
        label: at the left.
        marks: one point, or several that are drawn below each other.
        shown: the value in words, at the right.
    """

    label: str
    marks: Sequence[Mark]
    shown: str


@dataclass(frozen=True)
class Series:
    """A line of `lines` or `panels`.

    Attributes:
        label: at its right end where lines are labelled, and in the table.
        colour: of the line.
        x: of the points.
        estimates: one per point.
        dash: "solid", "dash" or "dot"; "" draws the points alone.
        symbol: of the points.
        thin: a hair line without points and band, for what another line sums up.
        guessed: those of x at which nothing was measured; their points are hollow and not in the table.
        texts: written above the points; empty for none.
    """

    label: str
    colour: str
    x: Sequence[float]
    estimates: Sequence[Estimate]
    dash: str = "solid"
    symbol: str = "circle"
    thin: bool = False
    guessed: frozenset[float] = frozenset()
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One of the y axes of `panels`, and its lines.

    Attributes:
        title: what y is, with its unit.
        series: the lines.
        percent: y runs from 0 to 100.
        scale: what y runs from and to otherwise; None fits it to the values.
        zero: what a line at y = 0 separates; "" draws none.
    """

    title: str
    series: Sequence[Series]
    percent: bool = False
    scale: tuple[float, float] | None = None
    zero: str = ""


@dataclass(frozen=True)
class Plane:
    """Values on a grid, for `contour` and `surface`.

    Attributes:
        x: ascending.
        y: ascending.
        values: by y, then x; None where there is none.
        axes: what x and y are.
        percent: values run from 0 to 100; otherwise the scale fits them.
    """

    x: Sequence[float]
    y: Sequence[float]
    values: Sequence[Sequence[float | None]]
    axes: tuple[str, str]
    percent: bool = False


def unit_map(units: Units, name: str) -> Figure:
    """Every unit as a cell in the colour of its category, module after module."""
    shown = _present(units)
    grid: list[list[int | None]] = []
    hover: list[list[str]] = []
    ticks: dict[float, str] = {}
    for module, values in units.category.items():
        parts = units.layouts[module]
        numbers = values.tolist()
        chunks = [
            range(start, min(start + _MAP_COLUMNS, len(numbers))) for start in range(0, len(numbers), _MAP_COLUMNS)
        ]
        ticks[len(grid) + (len(chunks) - 1) / 2] = f"{parts.layer} {_kind(parts.kind)}" + (
            "" if parts.expert is None else f" {parts.expert}"
        )
        for chunk in chunks:
            blank = _MAP_COLUMNS - len(chunk)
            grid.append([*(shown.index(Category(numbers[unit])) for unit in chunk), *[None] * blank])
            hover.append([*(f"{module}, unit {unit}: {_name(numbers[unit])}" for unit in chunk), *[""] * blank])
        grid.append([None] * _MAP_COLUMNS)
        hover.append([""] * _MAP_COLUMNS)
    steps = [[edge / len(shown), _colour(category)] for i, category in enumerate(shown) for edge in (i, i + 1)]
    trace = {
        "type": "heatmap",
        "z": grid[:-1],
        "text": hover[:-1],
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": steps,
        "zmin": -0.5,
        "zmax": len(shown) - 0.5,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }
    rows = len(grid) - 1
    layout = _layout(
        max(160, 11 * rows) + 38,
        margin={"l": 8, "r": 8, "t": 30, "b": 8},
        xaxis=_axis("", visible=False),
        yaxis=_axis(
            "", autorange="reversed", showgrid=False, ticks="", tickvals=list(ticks), ticktext=list(ticks.values())
        ),
        annotations=[{**_title("layer and module"), "x": 0, "xshift": -8}],
    )
    sizes = ", ".join(f"{_name(category)} {units.count(category):,}" for category in shown)
    return Figure(
        name,
        "Every unit, by layer and module",
        f"A cell per unit, {_MAP_COLUMNS} to a row, in the order of their indices. Units of each category: {sizes}.",
        [trace],
        layout,
        key=[(_name(category), _colour(category), "square") for category in shown],
    )


def composition(units: Units, name: str) -> Figure:
    """Of what every layer consists: a bar per layer and kind of module, its experts together."""
    shown, shares = _present(units), _shares(units)
    kinds = [kind for kind in ("mlp", "attention") if any(key[1] == kind for key in shares)]
    traces = []
    for column, kind in enumerate(kinds, 1):
        layers = [layer for layer, of in shares if of == kind]
        for category in shown:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [100 * shares[layer, kind].get(category, 0.0) for layer in layers],
                    "y": layers,
                    "xaxis": f"x{_axis_number(column)}",
                    "yaxis": f"y{_axis_number(column)}",
                    "marker": {"color": _colour(category), "line": {"width": 0}},
                    "hovertemplate": f"layer %{{y}}, {_name(category)}: %{{x:.2f}} %<extra></extra>",
                }
            )
    height = max(220, 14 * len({layer for layer, _ in shares}) + 70)
    layout = _layout(height, barmode="stack", bargap=0.12, annotations=[])
    for column, kind in enumerate(kinds, 1):
        domain = [(column - 1) / len(kinds) + 0.06 * (column - 1), column / len(kinds) - 0.02 * (len(kinds) - column)]
        layout[f"xaxis{_axis_number(column)}"] = _axis(
            "% of the units", domain=domain, anchor=f"y{_axis_number(column)}", range=[0, 100], dtick=25
        )
        layout[f"yaxis{_axis_number(column)}"] = _axis(
            "", anchor=f"x{_axis_number(column)}", autorange="reversed", showgrid=False
        )
        layout["annotations"].append(
            _title(f"<b>{_kind(kind)}</b>, layer", f"x{_axis_number(column)} domain", f"y{_axis_number(column)} domain")
        )
    return Figure(
        name,
        "Categories within every layer",
        "A bar per layer and kind of module, divided into the shares of the categories.",
        traces,
        layout,
        key=[(_name(category), _colour(category), "square") for category in shown],
        table=_share_table(units, shares, shown),
    )


def shares_by_layer(units: Units, name: str, *, half: bool) -> Figure:
    """How large each category is from layer to layer: a panel per category."""
    shown, shares = _present(units), _shares(units)
    kinds = [kind for kind in ("mlp", "attention") if any(key[1] == kind for key in shares)]
    symbols = {"mlp": ("circle", "solid"), "attention": ("circle-open", "dot")}
    layout, traces = _layout(300, annotations=[]), []
    narrow: dict[str, Any] = {}
    for panel, category in enumerate(shown, 1):
        top = 0.0
        for kind in kinds:
            layers = [layer for layer, of in shares if of == kind]
            values = [100 * shares[layer, kind].get(category, 0.0) for layer in layers]
            top = max(top, *values)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": layers,
                    "y": values,
                    "xaxis": f"x{_axis_number(panel)}",
                    "yaxis": f"y{_axis_number(panel)}",
                    "line": {"color": _colour(category), "width": 2, "dash": symbols[kind][1]},
                    "marker": _marker(_colour(category), symbols[kind][0], 7),
                    "cliponaxis": False,
                    "hovertemplate": f"layer %{{x}}, {_kind(kind)}: %{{y:.2f}} % {_name(category)}<extra></extra>",
                }
            )
        width = 1 / len(shown)
        start = (panel - 1) * width
        layout[f"xaxis{_axis_number(panel)}"] = _axis(
            "layer",
            anchor=f"y{_axis_number(panel)}",
            domain=[start + 0.03, start + width - 0.015],
            showgrid=False,
            dtick=_whole_step(layers, 5),
        )
        layout[f"yaxis{_axis_number(panel)}"] = _axis(
            "",
            anchor=f"x{_axis_number(panel)}",
            domain=[0, 0.88],
            range=[0, max(top * 1.08, 0.1)],
            nticks=4,
            automargin=False,
        )
        layout["annotations"].append(
            _title(
                f"<b>{_name(category)}</b>, % of the units",
                f"x{_axis_number(panel)} domain",
                f"y{_axis_number(panel)} domain",
            )
        )
        column, row = (panel - 1) % 2, (panel - 1) // 2
        rows = math.ceil(len(shown) / 2)
        bottom = 1 - (row + 1) / rows
        narrow[f"xaxis{_axis_number(panel)}.domain"] = [0.08 + 0.53 * column, 0.47 + 0.53 * column]
        narrow[f"yaxis{_axis_number(panel)}.domain"] = [bottom + 0.3 / rows * (row < rows - 1), bottom + 0.87 / rows]
    layout["margin"]["l"] = 28
    narrow["height"] = 210 * math.ceil(len(shown) / 2) + 40
    return Figure(
        name,
        "Each category from layer to layer",
        "A panel per category with its own scale: the share of the units of every layer that belong to it.",
        traces,
        layout,
        key=[(_kind(kind), "@ink", symbols[kind][0]) for kind in kinds],
        narrow=narrow,
        table=_share_table(units, shares, shown),
        half=half,
    )


def scatter(scores: Scores, units: Units | None, name: str) -> Figure:
    """Both importances of every unit, as shares of their module's total (experts: their layer's), on log axes."""
    safety, utility = _share_of_pool(scores, 0), _share_of_pool(scores, 1)
    if units is None:
        groups = {"units": (torch.ones_like(safety, dtype=torch.bool), "@quiet")}
    else:
        category = torch.cat([units.category[module] for module in scores.modules])
        order = [Category.CU, Category.RU, Category.UNOBSERVED, Category.UCU, Category.SCU]
        groups = {_name(one): (category == one, _colour(one)) for one in order if (category == one).any()}
    positive = (safety > 0) & (utility > 0)
    traces, rows, drawn = [], [], 0
    # The few get as many points as the many: SCU must not vanish in the crowd.
    quota = MOST_POINTS // len(groups)
    for label, (members, colour) in groups.items():
        found = (members & positive).nonzero().squeeze(1)
        if not len(found):
            continue
        kept = found[torch.linspace(0, len(found) - 1, min(quota, len(found)), dtype=torch.float64).round().long()]
        drawn += len(kept)
        rows.append(
            [label, f"{int(members.sum()):,}", f"{len(kept):,}"]
            + [significant(float(values[members].median()), 2) for values in (safety, utility)]
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": _digits(utility[kept]),
                "y": _digits(safety[kept]),
                "name": label,
                "marker": {"color": colour, "size": 5, "opacity": 0.65, "line": {"width": 0}},
                "hovertemplate": f"{label}<br>I<sub>S</sub> %{{y:.2g}} %<br>I<sub>U</sub> %{{x:.2g}} %<extra></extra>",
            }
        )
    both = torch.cat([safety[positive], utility[positive]])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.1, 1.0)
    equal = {"type": "scatter", "mode": "lines", "x": [low, high], "y": [low, high], "hoverinfo": "skip"}
    traces.insert(0, {**equal, "line": {"color": "@quiet", "width": 1}})
    axis = {"type": "log", "dtick": 1, "tickformat": "~g", "range": [math.log10(low) - 0.1, math.log10(high) + 0.1]}
    words = {
        "x": math.log10(high),
        "y": math.log10(high),
        "text": "equal shares",
        "xanchor": "right",
        "yanchor": "bottom",
    }
    layout = _layout(
        460,
        xaxis=_axis("I<sub>U</sub>, % of the module's total", **axis),
        yaxis=_axis("", **axis),
        annotations=[
            _title("I<sub>S</sub>, % of the module's total"),
            {**words, "showarrow": False, "font": {"color": "@quiet", "size": 12}},
        ],
    )
    thinned, hidden = len(safety) - int((~positive).sum()) - drawn, int((~positive).sum())
    notes = [f"{drawn:,} of {len(safety):,} units are drawn"]
    if thinned:
        notes.append(f"{thinned:,} were left out evenly, at most {quota:,} per category being drawn")
    if hidden:
        notes.append(f"{hidden:,} have an importance of zero, which a logarithmic axis does not have")
    return Figure(
        name,
        "What units matter for",
        "Each point is a unit: its importance on the safety set (I_S) against that on the utility set (I_U). Above the "
        "line it matters more for safety, below it more for utility. " + "; ".join(notes) + ".",
        traces,
        layout,
        key=[(label, colour, "circle") for label, (_, colour) in reversed(groups.items())] if units is not None else [],
        table=Table(
            "Medians of the importances by category",
            ["category", "units", "drawn", "median I_S, % of the module", "median I_U, % of the module"],
            rows[::-1],
        ),
        half=True,
    )


def dots(
    name: str,
    title: str,
    summary: str,
    rows: Sequence[Row],
    axis: str,
    *,
    percent: bool,
    key: Sequence[tuple[str, str, str]] = (),
) -> Figure:
    """A point with its interval per row; percentages on a scale from 0 to 100, anything else on one that fits."""
    values = [value for row in rows for mark in row.marks for value in _extent(mark.estimate)]
    scale, _ = (_PERCENT, False) if percent else _scale(values)
    traces: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        draws = [mark for mark in row.marks if mark.symbol != PUBLISHED]
        spread = 0.52 / max(len(draws) - 1, 1)
        for i, mark in enumerate(draws):
            traces.append(_dot(mark, place + spread * (i - (len(draws) - 1) / 2), row.label))
        traces += [_dot(mark, place, f"{row.label}, published") for mark in row.marks if mark.symbol == PUBLISHED]
        edge = max(value for mark in row.marks for value in _extent(mark.estimate))
        traces.append(
            {
                "type": "scatter",
                "mode": "text",
                "x": [edge],
                "y": [place],
                "text": ["  " + row.shown],
                "textposition": "middle right",
                "textfont": {"color": "@ink", "size": 13},
                "cliponaxis": False,
                "hoverinfo": "skip",
            }
        )
    labels = [textwrap.wrap(row.label, 20) for row in rows]
    layout = _layout(
        max(36, 17 * max(len(label) for label in labels) + 6) * len(rows) + 60,
        xaxis=_axis(axis, **scale),
        yaxis=_axis(
            "",
            tickvals=list(range(len(rows))),
            ticktext=["<br>".join(label) for label in labels],
            range=[len(rows) - 0.45, -0.55],
            ticks="",
            showgrid=False,
        ),
    )
    layout["margin"] |= {"r": _label_room(rows, scale), "t": 8}
    return Figure(
        name,
        title,
        summary,
        traces,
        layout,
        key=key,
        half=True,
        narrow={"xaxis.tickvals": [0, 50, 100]} if percent else {"xaxis.nticks": 4},
    )


def lines(
    name: str,
    title: str,
    summary: str,
    series: Sequence[Series],
    axes: tuple[str, str],
    *,
    percent: bool,
    scale: tuple[float, float] | None = None,
    half: bool = False,
    log_x: bool = False,
    zero: str = "",
    key: Sequence[tuple[str, str, str]] = (),
) -> Figure:
    """A line per series with its interval as a band, labelled where it ends.

    Args:
        name: of the figure.
        title: of the figure.
        summary: of the figure.
        series: the lines.
        axes: what x and y are, with their units.
        percent: as in `Panel`.
        scale: as in `Panel`.
        half: as in `Figure`.
        log_x: a logarithmic x axis.
        zero: as in `Panel`.
        key: as in `Figure`.
    """
    panel = Panel(axes[1], series, percent, scale, zero)
    return panels(name, title, summary, [panel], axes[0], half=half, log_x=log_x, labelled=True, key=key)


def panels(
    name: str,
    title: str,
    summary: str,
    shown: Sequence[Panel],
    axis: str,
    *,
    half: bool = False,
    log_x: bool = False,
    labelled: bool = False,
    key: Sequence[tuple[str, str, str]] = (),
    marked: Sequence[float] = (),
) -> Figure:
    """Panels below each other on one x axis, each as `lines` draws it.

    Args:
        name: of the figure.
        title: of the figure.
        summary: of the figure.
        shown: the panels from the top down.
        axis: what x is, with its unit.
        half: as in `Figure`.
        log_x: a logarithmic x axis.
        labelled: lines are labelled where they end; otherwise the key tells them apart.
        key: as in `Figure`.
        marked: where an upright line crosses all panels.
    """
    bottom, top = 48, 34
    tall, gap = (258, 0) if len(shown) == 1 else (190, 44)
    drawn = len(shown) * (tall + gap) - gap
    every = [line for panel in shown for line in panel.series]
    layout = _layout(
        drawn + bottom + top,
        xaxis=_axis(axis, **_ticks(every, log_x), showgrid=False, anchor=f"y{_axis_number(len(shown))}"),
        annotations=[],
        shapes=[],
    )
    traces: list[dict[str, Any]] = []
    for number, panel in enumerate(shown, 1):
        yref = f"y{_axis_number(number)}"
        values = [value for line in panel.series for estimate in line.estimates for value in _extent(estimate)]
        vertical, log = (_PERCENT, False) if panel.percent else _scale(values)
        if panel.scale is not None:
            vertical, log = {"range": list(panel.scale), "nticks": 5}, False
        edge = 1 - (number - 1) * (tall + gap) / drawn
        domain = [max(0.0, edge - tall / drawn), edge]
        layout[f"yaxis{_axis_number(number)}"] = _axis("", **vertical, domain=domain, anchor="x")
        layers = [trace for line in panel.series for trace in _band(line)] + [_line(line) for line in panel.series]
        traces += [{**trace, "yaxis": yref} for trace in layers]
        layout["annotations"].append(_title(panel.title, yref=f"{yref} domain"))
        if labelled:
            layout["annotations"] += _end_labels(panel.series, vertical["range"], log, tall, yref)
        layout["shapes"] += [{**_rule("x", f"{yref} domain"), "x0": x, "x1": x, "layer": "below"} for x in marked]
        if panel.zero:
            layout["shapes"].append({**_rule("paper", yref), "y0": 0, "y1": 0})
            words = {"xref": "paper", "yref": yref, "x": 0.99, "y": 0, "xanchor": "right", "yanchor": "bottom"}
            style = {"showarrow": False, "font": {"size": 12, "color": "@quiet"}}
            layout["annotations"].append({**words, "text": panel.zero, **style})
    widest = max(len(part) for line in every for part in _wrapped(line.label))
    layout["margin"] |= {"t": top, "b": bottom, "r": 36 + 7 * widest if labelled else 16}
    return Figure(name, title, summary, traces, layout, key=key, half=half, table=_panel_table(shown, axis))


def contour(
    name: str,
    title: str,
    summary: str,
    plane: Plane,
    *,
    marks: Sequence[tuple[str, float, float]] = (),
    path: Sequence[tuple[float, float]] = (),
    high_is_bright: bool = True,
) -> Figure:
    """Values on a plane as filled contours; percentages have a black line at 50.

    Args:
        name: of the figure.
        title: of the figure.
        summary: of the figure.
        plane: what is drawn.
        marks: label, x and y of points of the plane.
        path: points that a line joins, numbered from 1 behind the first.
        high_is_bright: the other end of the colours is for the low values otherwise.
    """
    known = [value for row in plane.values for value in row if value is not None]
    scale, log = (_PERCENT | {"range": [0, 100]}, False) if plane.percent else _scale(known)
    drawn = [[None if v is None else math.log10(v) if log else v for v in row] for row in plane.values]
    bar = {"thickness": 12, "outlinewidth": 0, "len": 1, "lenmode": "fraction", "x": 1.01, "xpad": 4, "ypad": 0}
    if "tickvals" in scale:
        places = [math.log10(tick) if log else tick for tick in scale["tickvals"]]
        bar |= {"tickvals": places, "ticktext": [f"{tick:g}" for tick in scale["tickvals"]]}
    low, high = scale["range"]
    step = (high - low) / 10 if log else _round_step((high - low) / 10)
    trace = {
        "type": "contour",
        "x": list(plane.x),
        "y": list(plane.y),
        "z": drawn,
        "text": [["" if v is None else significant(v, 3) for v in row] for row in plane.values],
        "hovertemplate": "%{x:.3~f}, %{y:.3~f}: %{text}<extra></extra>",
        "colorscale": [[i / (len(_SHADES) - 1), shade] for i, shade in enumerate(_SHADES)],
        "reversescale": not high_is_bright,
        "zmin": low,
        "zmax": high,
        "contours": {"start": low if log else step * math.ceil(low / step), "end": high, "size": step},
        "line": {"width": 0},
        "colorbar": bar,
    }
    traces = [trace]
    if plane.percent and min(known) < 50 < max(known):
        summary += " The black line is at 50 %."
        half = {"start": 50, "end": 50, "size": 1, "coloring": "none"}
        line = {"color": "#000000", "width": 2}
        traces.append({**trace, "contours": half, "line": line, "showscale": False, "hoverinfo": "skip"})
        del traces[-1]["hovertemplate"]
    labels = [(str(number), *place) for number, place in enumerate(path[1:], 1)]
    for spots, style in ((path, "lines+markers"), ([(x, y) for _, x, y in marks], "markers")):
        traces.append(
            {
                "type": "scatter",
                "mode": style,
                "x": [x for x, _ in spots],
                "y": [y for _, y in spots],
                "line": {"color": "#ffffff", "width": 2},
                "marker": {"color": "#ffffff", "size": 9, "line": {"color": "#000000", "width": 1.5}},
                "hoverinfo": "skip",
            }
        )
    layout = _layout(
        400,
        xaxis=_axis(plane.axes[0], showgrid=False, range=_reach(plane.x, [x for _, x, _ in labels]), tickformat="~g"),
        yaxis=_axis("", showgrid=False, range=_reach(plane.y, [y for *_, y in labels]), tickformat="~g"),
        annotations=[_title(plane.axes[1]), *(_flag(*mark) for mark in labels)]
        + [_flag(*mark, below=True) for mark in marks],
    )
    head = [f"{plane.axes[1]} \\ {plane.axes[0]}", *map(_signed, plane.x)]
    rows = [
        [_signed(y), *("" if v is None else significant(v, 3) for v in row)]
        for y, row in zip(plane.y, plane.values, strict=True)
    ]
    return Figure(name, title, summary, traces, layout, half=True, table=Table(title, head, rows))


def surface(name: str, title: str, summary: str, plane: Plane, *, marks: Sequence[tuple[str, float, float]]) -> Figure:
    """Percentages on a plane as a surface, drawn as plain shapes: it prints, and no browser needs WebGL for it.

    Args:
        name: of the figure.
        title: of the figure.
        summary: of the figure.
        plane: what is drawn, in percent.
        marks: label, x and y of points of the grid.
    """
    across, along = [_from_middle(plane.x), _from_middle(plane.y)]
    tiles = []
    for j, i in itertools.product(range(len(plane.y) - 1), range(len(plane.x) - 1)):
        corners = [(i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)]
        heights = [plane.values[b][a] for a, b in corners]
        known = [height for height in heights if height is not None]
        if len(known) == len(heights):
            ends = [_seen(across(plane.x[a]), along(plane.y[b]), h) for (a, b), h in zip(corners, known, strict=True)]
            distance = _distance(across(plane.x[i]), along(plane.y[j]))
            tiles.append((-distance, _polygon(ends, _shade(math.fsum(known) / 4 / 100))))
    # The far tiles first: what is nearer covers them.
    shapes = [shape for _, shape in sorted(tiles, key=operator.itemgetter(0))]
    floor = [_seen(u, v, 0) for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    pole = [_seen(-1, -1, 0), _seen(-1, -1, 100)]
    words = [(f"{tick}\u00a0%", *_seen(-1, -1, tick), "right") for tick in (0, 50, 100)]
    words += [(_signed(x), *_seen(across(x), -1.25, 0), "center") for x in (plane.x[0], plane.x[-1])]
    words += [(_signed(y), *_seen(1.1, along(y), 0), "left") for y in (plane.y[0], plane.y[-1])]
    words += [(f"\u2198 {plane.axes[0]}", -1.75, -1.4, "left"), (f"{plane.axes[1]} \u2197", 1.75, -1.4, "right")]
    at = {(x, y): v for y, row in zip(plane.y, plane.values, strict=True) for x, v in zip(plane.x, row, strict=True)}
    spots = [(label, *_seen(across(x), along(y), h)) for label, x, y in marks if (h := at.get((x, y))) is not None]
    marker = {"color": "#ffffff", "size": 9, "line": {"color": "#000000", "width": 1.5}}
    trace = {"type": "scatter", "mode": "markers", "x": [x for _, x, _ in spots], "y": [y for *_, y in spots]}
    text = {"showarrow": False, "font": {"size": 12}}
    layout = _layout(
        400,
        xaxis=_axis("", visible=False, range=[-1.75, 1.75]),
        yaxis=_axis("", visible=False, range=[-1.55, 1.65]),
        shapes=[_polygon(floor, "rgba(0,0,0,0)", "@quiet"), *shapes, _polygon(pole, "rgba(0,0,0,0)", "@quiet")],
        annotations=[{**text, "text": f"{word} ", "x": x, "y": y, "xanchor": side} for word, x, y, side in words]
        + [_flag(*spot) for spot in spots],
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
    )
    return Figure(name, title, summary, [{**trace, "marker": marker, "hoverinfo": "skip"}], layout, half=True)


def flow(
    categories: Sequence[str], matrix: Sequence[Sequence[float]], percents: Sequence[Sequence[float]], name: str
) -> Figure:
    """Which category became which: from the left (before) to the right (after), widths by number of units.

    Args:
        categories: of rows and columns.
        matrix: units that were of the row's category and are now of the column's.
        percents: the same in percent of all units.
        name: of the figure.
    """
    links = [(i, j) for i in range(len(categories)) for j in range(len(categories)) if matrix[i][j]]
    before = [i for i in range(len(categories)) if any(matrix[i])]
    after = [j for j in range(len(categories)) if any(row[j] for row in matrix)]
    left = {i: place for place, i in enumerate(before)}
    right = {j: len(before) + place for place, j in enumerate(after)}
    sums = [sum(percents[i]) for i in before] + [sum(row[j] for row in percents) for j in after]
    nodes = [categories[i] for i in (*before, *after)]
    trace = {
        "type": "sankey",
        "arrangement": "fixed",
        "node": {
            "label": [f"{NAMES[node]} {_points(total)}" for node, total in zip(nodes, sums, strict=True)],
            "color": [COLOURS[node] for node in nodes],
            "x": [0.001] * len(before) + [0.999] * len(after),
            "y": [*_places(sums[: len(before)]), *_places(sums[len(before) :])],
            "pad": 26,
            "thickness": 18,
            "line": {"width": 0},
            "hovertemplate": "%{label}<extra></extra>",
        },
        "link": {
            "source": [left[i] for i, _ in links],
            "target": [right[j] for _, j in links],
            "value": [matrix[i][j] for i, j in links],
            "color": [_faded(COLOURS[categories[i]], 0.45) for i, _ in links],
            "customdata": [
                f"{NAMES[categories[i]]} to {NAMES[categories[j]]}: {_points(percents[i][j])}" for i, j in links
            ],
            "hovertemplate": "%{customdata}, %{value:,} units<extra></extra>",
        },
        "textfont": {"color": "@ink", "size": 13},
    }
    layout = _layout(400)
    layout["margin"] |= {"t": 30, "b": 18, "l": 8, "r": 8}
    layout["annotations"] = [
        {**_title("<b>before</b>"), "yshift": 8},
        {**_title("<b>after</b>"), "x": 1, "xanchor": "right", "yshift": 8},
    ]
    summary = "; ".join(
        f"of {NAMES[categories[i]]}, {_points(100 * matrix[i][i] / sum(matrix[i]))} stayed" for i in before
    )
    return Figure(
        name, "Where the units went", f"Flows between categories in percent of all units: {summary}.", [trace], layout
    )


def save_figures(drawn: Sequence[Figure], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write figures as images, 900 px wide (PNG at twice that), with their titles and keys.

    Args:
        drawn: the figures.
        folder: made if missing.
        formats: "png", "svg" or both.

    Returns:
        The paths, in the order of the figures.

    Raises:
        SsahError: the folder cannot be written, or kaleido or a Chrome is missing.
    """
    io = _plotly_io()
    files.make_folder(folder)
    written = [folder / f"{figure.name}.{name}" for figure in drawn for name in formats]
    for path in written:
        files.check_writable(path)
    with tempfile.TemporaryDirectory(prefix=".ssah_fast-", dir=folder) as place:
        made = [Path(place, path.name) for path in written]
        try:
            # All at once: one start of Chrome takes longer than all the figures of a page.
            exported = [_exported(figure) for figure in drawn for _ in formats]
            # Sizes are said twice: what a layout says, plotly's defaults override.
            sizes = {name: [figure["layout"][name] for figure in exported] for name in ("width", "height")}
            io.write_images(exported, made, scale=2, **sizes)
        except (ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SsahError(
                f"cannot draw the figures as images: {reason}; install kaleido (pip install 'ssah_fast[report]') and "
                f"Chrome or Chromium, or leave --figures out"
            ) from error
        for new, path in zip(made, written, strict=True):
            os.replace(new, path)
    return written


def _plotly_io() -> Any:
    try:
        import plotly.io
    except ImportError as error:
        raise SsahError("a report needs plotly; install it with: pip install 'ssah_fast[report]'") from error
    return plotly.io


def _exported(figure: Figure) -> dict[str, Any]:
    """The figure for paper, with what the page writes around it."""
    spec = json.dumps({"data": figure.data, "layout": figure.layout})
    for name, colour in THEME.items():
        spec = spec.replace(name, colour)
    document = json.loads(spec)
    layout = document["layout"]
    head = 72 if figure.key else 44
    layout |= {"width": 900, "paper_bgcolor": "#ffffff", "height": layout["height"] + head}
    layout["title"] = {
        "text": figure.title,
        "x": 0,
        "xref": "container",
        "pad": {"l": 12, "t": 12},
        "yanchor": "top",
        "y": 1,
    }
    layout["margin"] = {**layout["margin"], "t": layout["margin"]["t"] + head, "l": layout["margin"]["l"] + 8}
    for label, colour, symbol in figure.key:
        document["data"].append(_key_trace(label, THEME.get(colour, colour), symbol))
    layout["showlegend"] = bool(figure.key)
    layout["legend"] = {
        "orientation": "h",
        "x": 0,
        "xref": "container",
        "yref": "container",
        "y": 1 - 40 / layout["height"],
    }
    layout["legend"] |= {"yanchor": "top", "itemclick": False}
    for trace in document["data"][: len(figure.data)]:
        trace["showlegend"] = False
        if trace["type"] in ("heatmap", "sankey"):
            del trace["showlegend"]
    return document


def _key_trace(label: str, colour: str, symbol: str) -> dict[str, Any]:
    trace: dict[str, Any] = {"type": "scatter", "x": [None], "y": [None], "name": label, "showlegend": True}
    if symbol in ("line", "dash", "dot"):
        style = {"line": "solid"}.get(symbol, symbol)
        return {**trace, "mode": "lines", "line": {"color": colour, "dash": style, "width": 2}}
    return {**trace, "mode": "markers", "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2}}}


def _layout(height: int, **entries: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 30, "b": 46},
        "font": {"family": FONT, "size": 13, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "dragmode": False,  # a finger that scrolls the page must not zoom the figure
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "@paper", "bordercolor": "@quiet", "font": {"color": "@ink"}},
        **entries,
    }


def _axis(title: str, **entries: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 13}},
        "gridcolor": "@grid",
        "linecolor": "@quiet",
        "tickcolor": "@quiet",
        "ticks": "outside",
        "ticklen": 4,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        **entries,
    }


def _axis_number(panel: int) -> str:
    """What plotly puts behind "xaxis" and "x" for the n-th panel."""
    return "" if panel == 1 else str(panel)


def _title(text: str, xref: str = "paper", yref: str = "paper") -> dict[str, Any]:
    """The title of a y axis, upright above it: turned by 90 degrees it is hard to read and costs width."""
    place = {"xref": xref, "yref": yref, "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "yshift": 6}
    return {**place, "text": text, "showarrow": False, "align": "left", "font": {"size": 13}}


def _flag(label: str, x: float, y: float, *, below: bool = False) -> dict[str, Any]:
    """The label of a point, legible on any colour."""
    style = {"bgcolor": "@paper", "opacity": 0.85, "borderpad": 1, "font": {"size": 12}, "showarrow": False}
    side = {"yanchor": "top", "yshift": -7} if below else {"yanchor": "bottom", "yshift": 7}
    return {"text": label, "x": x, "y": y, **side, **style}


def _signed(x: float) -> str:
    return f"{x:g}".replace("-", "\u2212")


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if step <= times * power * (1 + 1e-9))


def _reach(grid: Sequence[float], others: Sequence[float]) -> list[float]:
    """The range of an axis on which a grid and some points beside it can be seen."""
    room = 0.05 * (grid[-1] - grid[0])
    return [min([grid[0], *(x - room for x in others)]), max([grid[-1], *(x + room for x in others)])]


def _from_middle(grid: Sequence[float]) -> Callable[[float], float]:
    """Takes the ends of a grid to -1 and 1."""
    return lambda x: (2 * x - grid[0] - grid[-1]) / (grid[-1] - grid[0])


def _seen(u: float, v: float, height: float) -> tuple[float, float]:
    """Where a point of the box u, v in -1 .. 1, height in 0 .. 100 is in the picture.

    One looks down at 52 degrees, so that a rim of 100 at the front does not hide a basin behind it.
    """
    turned = u * math.cos(_AZIMUTH) - v * math.sin(_AZIMUTH)
    raised = 0.7 * height / 100 * math.cos(_ELEVATION) + _distance(u, v) * math.sin(_ELEVATION)
    return round(turned, 4), round(raised, 4)


def _distance(u: float, v: float) -> float:
    return u * math.sin(_AZIMUTH) + v * math.cos(_AZIMUTH)


def _polygon(corners: Sequence[tuple[float, float]], colour: str, edge: str = "rgba(0,0,0,0.25)") -> dict[str, Any]:
    path = "M" + "L".join(f"{x},{y}" for x, y in corners) + "Z"
    return {"type": "path", "layer": "below", "path": path, "fillcolor": colour, "line": {"color": edge, "width": 0.6}}


def _shade(part: float) -> str:
    """The colour of a part of one, between the two shades next to it."""
    place = min(max(part, 0.0), 1.0) * (len(_SHADES) - 1)
    first = min(int(place), len(_SHADES) - 2)
    pair = zip(_rgb(_SHADES[first]), _rgb(_SHADES[first + 1]), strict=True)
    return f"rgb({','.join(str(round(a + (place - first) * (b - a))) for a, b in pair)})"


def _rule(xref: str, yref: str) -> dict[str, Any]:
    """A thin line from one end of an axis to the other; where it crosses the other axis is to be set."""
    across = {"x0": 0, "x1": 1, "y0": 0, "y1": 1}
    return {"type": "line", "xref": xref, "yref": yref, **across, "line": {"color": "@quiet", "width": 1}}


def _marker(colour: str, symbol: str, size: int) -> dict[str, Any]:
    if symbol.endswith("-open"):  # filled with the paper, so that the line of the interval does not show through
        return {
            "symbol": symbol.removesuffix("-open"),
            "color": "@paper",
            "size": size,
            "line": {"color": colour, "width": 2},
        }
    return {"symbol": symbol, "color": colour, "size": size, "line": {"width": 0}}


def _dot(mark: Mark, place: float, label: str) -> dict[str, Any]:
    estimate = mark.estimate
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [estimate.value],
        "y": [place],
        "marker": _marker(mark.colour, mark.symbol, 11 if mark.symbol == "circle" else 9),
        "cliponaxis": False,
        "hovertemplate": f"{label}: {estimate.full()}<extra></extra>",
    }
    if estimate.low is not None and estimate.high is not None:
        ends = {"array": [estimate.high - estimate.value], "arrayminus": [estimate.value - estimate.low]}
        style = {"symmetric": False, "color": mark.colour, "thickness": 2, "width": 0}
        trace["error_x"] = {"type": "data", **ends, **style}
    return trace


def _line(series: Series) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "+".join(
            ["lines"] * bool(series.dash) + ["markers"] * (not series.thin) + ["text"] * bool(series.texts)
        ),
        "x": list(series.x),
        "y": [estimate.value for estimate in series.estimates],
        "line": {"color": series.colour, "width": 1 if series.thin else 2, "dash": series.dash or "solid"},
        "marker": _marker(series.colour, series.symbol, 6 if len(series.x) > 20 else 8),
        "cliponaxis": False,
        "customdata": [estimate.full() for estimate in series.estimates],
        "hovertemplate": f"{series.label}, %{{x}}: %{{customdata}}<extra></extra>",
    }
    if series.guessed:
        hollow = ["@paper" if x in series.guessed else series.colour for x in series.x]
        trace["marker"] |= {"color": hollow, "line": {"color": series.colour, "width": 1.5}}
    if series.texts:
        trace |= {"text": list(series.texts), "textposition": "top center", "textfont": {"color": "@ink", "size": 13}}
    return trace


def _whole_step(places: Sequence[float], most: int) -> int:
    """The distance of ticks at whole numbers, at most so many of them and one more."""
    return max(1, math.ceil((max(places) - min(places)) / most))


def _ticks(series: Sequence[Series], log: bool) -> dict[str, Any]:
    places = [x for line in series for x in line.x]
    if log:
        return {"type": "log", "tickvals": sorted(set(places)), "ticktext": [f"{x:g}" for x in sorted(set(places))]}
    if all(float(x).is_integer() for x in places):
        return {"dtick": _whole_step(places, 8)}
    return {"nticks": 8, "tickformat": "~g"}


def _label_room(rows: Sequence[Row], scale: Mapping[str, Any]) -> int:
    """The right margin that the labels of `dots` need, in px, where the axis is as short as on a phone (200 px)."""
    low, high = scale["range"]
    edges = [max(value for mark in row.marks for value in _extent(mark.estimate)) for row in rows]
    places = [(math.log10(edge) if scale.get("type") == "log" else edge) for edge in edges]
    needed = [22 + 7 * len(row.shown) - 200 * (high - x) / (high - low) for row, x in zip(rows, places, strict=True)]
    return max(16, round(max(needed)))


def _band(series: Series) -> list[dict[str, Any]]:
    if series.thin or not series.dash or series.colour.startswith("@"):
        return []
    if not all(estimate.known for estimate in series.estimates):
        return []
    ends = [[estimate.low for estimate in series.estimates], [estimate.high for estimate in series.estimates]]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [*series.x, *reversed(series.x)],
            "y": [*ends[1], *reversed(ends[0])],
            "fill": "toself",
            "fillcolor": _faded(series.colour, 0.18),
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
    ]


def _end_labels(
    series: Sequence[Series], span: Sequence[float], log: bool, height: int, yref: str
) -> list[dict[str, Any]]:
    """A label at the right end of every line; labels that would overlap are moved apart."""
    ends = [math.log10(line.estimates[-1].value) if log else line.estimates[-1].value for line in series]
    pixel = height / (span[1] - span[0])
    order = sorted(range(len(series)), key=lambda i: ends[i])
    heights: dict[int, float] = {}
    floor = -math.inf
    for i in order:
        room = _LABEL_HEIGHT * len(_wrapped(series[i].label))
        heights[i] = max((ends[i] - span[0]) * pixel, floor + room / 2)
        floor = heights[i] + room / 2
    excess = max(0.0, floor - height - 10)
    return [
        {
            "xref": "paper",
            "yref": yref,
            "x": 1,
            "y": end,
            "xanchor": "left",
            "xshift": 8,
            "yshift": heights[i] - excess - (end - span[0]) * pixel,
            "align": "left",
            "text": f'<span style="color:{series[i].colour}">\u25cf</span> ' + "<br>".join(_wrapped(series[i].label)),
            "showarrow": False,
            "font": {"size": 13},
        }
        for i, end in enumerate(ends)
    ]


def _panel_table(shown: Sequence[Panel], axis: str) -> Table:
    columns: list[tuple[str, dict[float, str]]] = []
    for panel in shown:
        for line in panel.series:
            title = ": ".join(part for part in (panel.title if len(shown) > 1 else "", line.label) if part)
            points = zip(line.x, line.estimates, strict=True)
            columns.append((title, {x: estimate.full() for x, estimate in points if x not in line.guessed}))
    places = sorted({x for _, cells in columns for x in cells})
    caption = shown[0].title if len(shown) == 1 else "All panels"
    rows = [[f"{x:g}", *(cells.get(x, "") for _, cells in columns)] for x in places]
    return Table(f"{caption} (95 % interval)", [axis, *(title for title, _ in columns)], rows)


def _scale(values: Sequence[float]) -> tuple[dict[str, Any], bool]:
    """The range of an axis for some values, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        room = 0.06 * math.log10(high / low)
        ends = math.log10(low) - room, math.log10(high) + room
        decades = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
        steps = (1, 2, 5) if high / low < 30 else (1,)
        ticks = [m * 10.0**d for d in decades for m in steps if ends[0] <= math.log10(m * 10.0**d) <= ends[1]]
        return {
            "type": "log",
            "range": list(ends),
            "tickvals": ticks,
            "ticktext": [f"{t:g}" for t in ticks],
            "tickangle": 0,
        }, True
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return {"range": [low - room, high + room], "nticks": 5}, False


def _extent(estimate: Estimate) -> list[float]:
    return [value for value in (estimate.low, estimate.value, estimate.high) if value is not None]


def _share_of_pool(scores: Scores, index: int) -> torch.Tensor:
    """Importance on one set in percent of its module's (experts: of their layer's) total, float64 [all units]."""
    totals: dict[str, float] = {}
    for module in scores.modules.values():
        pool = module.layout.pool
        totals[pool] = totals.get(pool, 0.0) + float(module.importance[index].sum())
    return torch.cat([100 * m.importance[index] / (totals[m.layout.pool] or 1.0) for m in scores.modules.values()])


def _shares(units: Units) -> dict[tuple[int, str], dict[Category, float]]:
    """By layer and kind: the part of its units that each category has."""
    counts: dict[tuple[int, str], torch.Tensor] = {}
    for module, values in units.category.items():
        key = (units.layouts[module].layer, units.layouts[module].kind)
        found = torch.bincount(values.long() + 1, minlength=len(Category))
        counts[key] = counts[key] + found if key in counts else found
    return {key: {c: float(found[c + 1] / found.sum()) for c in Category} for key, found in sorted(counts.items())}


def _share_table(
    units: Units, shares: Mapping[tuple[int, str], Mapping[Category, float]], shown: Sequence[Category]
) -> Table:
    sizes: dict[tuple[int, str], int] = {}
    for layout in units.layouts.values():
        sizes[layout.layer, layout.kind] = sizes.get((layout.layer, layout.kind), 0) + layout.units
    return Table(
        "Share of the units of every layer, in percent",
        ["layer", "module", "units", *(_name(category) for category in shown)],
        [
            [str(key[0]), _kind(key[1]), f"{sizes[key]:,}", *(f"{100 * part[category]:.2f}" for category in shown)]
            for key, part in shares.items()
        ],
        words=2,
    )


def _present(units: Units) -> list[Category]:
    return [category for category in REPORTED if units.count(category)]


def _name(category: int) -> str:
    return NAMES[Category(category).name.lower()]


def _colour(category: int) -> str:
    return COLOURS[Category(category).name.lower()]


def _kind(kind: str) -> str:
    return {"mlp": "MLP"}.get(kind, kind)


def _digits(values: torch.Tensor) -> list[float]:
    # Four digits are more than a screen has pixels, and a third of the bytes.
    return [float(f"{value:.4g}") for value in values.tolist()]


def _points(percent: float) -> str:
    return f"{significant(percent, 3 if percent >= 10 else 2)}\u00a0%"


def _places(sums: Sequence[float]) -> list[float]:
    """Where nodes of these sizes have their middle when they are stacked with gaps, from 0 (top) to 1."""
    gap = 0.07
    room = 1 - gap * (len(sums) - 1)
    places, top = [], 0.0
    for part in sums:
        height = room * part / sum(sums)
        places.append(min(max(top + height / 2, 0.001), 0.999))
        top += height + gap
    return places


def _wrapped(label: str) -> list[str]:
    return textwrap.wrap(label, 15) or [""]


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _faded(colour: str, alpha: float) -> str:
    return f"rgba({','.join(map(str, _rgb(colour)))},{alpha})"
