"""Landscapes in the report: lines and planes, what is said of them, and several of them side by side."""

import copy
import html
import itertools
import math
import random
import statistics
import struct

import pytest
from test_report import CHROMIUM, HOSTILE, assert_a_browser_draws, words_of, write

from ssah_fast import basin
from ssah_fast.errors import SsahError
from ssah_fast.evaluation.intervals import Interval, proportion
from ssah_fast.report import figures, write_report
from ssah_fast.report.collect import collect
from ssah_fast.report.figures import Plane
from ssah_fast.report.sections import sections

GRID = [i / 10 for i in range(-10, 11)]
PROMPTS = 80


def measured(chance, distance, source):
    """What a point's row holds: answers drawn with this chance, and utility that declines with the distance."""
    count = sum(source.random() < chance for _ in range(PROMPTS))
    broken = round(count * 0.3 * min(distance, 1))
    perplexity = 1.007 * math.exp(2 * distance**3)
    return {
        **proportion(count - broken, PROMPTS).flat("asr"),
        **proportion(count, PROMPTS).flat("asr_raw"),
        **proportion(PROMPTS - count, PROMPTS).flat("refusal"),
        **proportion(broken, PROMPTS).flat("degenerate"),
        **proportion(round(4 * distance), PROMPTS).flat("over_refusal"),
        **Interval(6 - 12 * distance, 5 - 12 * distance, 7 - 12 * distance, PROMPTS).flat("margin"),
        **Interval(perplexity, perplexity * 0.99, perplexity * 1.01, 100).flat("perplexity"),
        **proportion(90, 100).flat("accuracy"),
        "tasks": None,
    }


def rate(distance, edge):
    """The chance of an answer: a plateau of 0, a rim at the edge, 1 outside."""
    return 0.0 if distance < 0.6 * edge else 1 / (1 + math.exp(-12 * (distance - edge)))


def document(shape, axes, rows, **entries):
    settings = {"shape": shape, "axes": axes, "alphas": GRID, "betas": None, "only": None} | entries.pop("settings", {})
    return {
        "kind": "landscape",
        "schema": 1,
        "model": {"name": "/run/model", "architecture": "LlamaForCausalLM"},
        "settings": settings,
        "rows": rows,
        "figures": [],
        "trajectory": [],
        "skipped": [],
    } | entries


def noise(seed):
    return {"name": f"random {seed}", "kind": "random", "seed": seed}


def towards(name):
    return {"name": f"towards {name}", "kind": "towards"}


def lines(edge=0.55, systems=("none",), directions=3, **settings):
    source = random.Random(round(1000 * edge))
    axes = [noise(seed) for seed in range(123, 123 + directions)]
    rows = []
    for place, system in enumerate(systems):
        centre = measured(0, 0, source)
        for (number, axis), alpha in itertools.product(enumerate(axes), GRID):
            distance = abs(alpha) + 0.03 * (number - 1) * (alpha > 0)
            found = measured(rate(distance, edge * (1 + 0.3 * place)), abs(alpha), source) if alpha else centre
            rows.append({"direction": axis["name"], "alpha": alpha, "beta": None, "system": system, **found})
    made = document("lines", axes, rows, settings=settings)
    made["figures"] = [
        {"system": system, "rate": name, **summary(rows, axes, system, name)}
        for system in systems
        for name in ("asr_raw", "asr")
    ]
    return made


def summary(rows, axes, system, name):
    """basin.figures of answers with these rates: the first so many of the prompts."""
    flags = [
        {
            row["alpha"]: [prompt < round(row[name] * PROMPTS / 100) for prompt in range(PROMPTS)]
            for row in rows
            if row["direction"] == axis["name"] and row["system"] == system
        }
        for axis in axes
    ]
    return basin.figures(GRID, flags, draws=50)


def interpolation(edge=0.55, name="all"):
    source = random.Random(7)
    alphas = [i / 20 for i in range(-5, 26)]
    axis = towards(name)
    rows = [
        {"direction": axis["name"], "alpha": a, "beta": None, "system": "none"}
        | measured(rate(max(a, 0), edge), abs(a) / 2, source)
        for a in alphas
    ]
    return document("lines", [axis], rows, trajectory=trajectory([[0.3], [0.7], [1.0]]), settings={"alphas": alphas})


def trajectory(places, outside=0.2):
    source = random.Random(8)
    return [
        {
            "checkpoint": f"/run/tuned/all/checkpoint-{32 * number}",
            "coordinates": place,
            "moved": 2.5 * number,
            "outside": outside,
            "system": "none",
            **measured(rate(place[0], 0.55), 0.1, source),
        }
        for number, place in enumerate(places, 1)
    ]


def plane(aims=("all", "others"), steps=15):
    source = random.Random(9)
    grid = [round(-0.25 + 1.5 * i / (steps - 1), 3) for i in range(steps)] if aims else GRID
    grid = sorted({*grid, 0.0, 1.0})
    axes = [towards(name) for name in aims] or [noise(1), noise(2)]
    rows = []
    for alpha, beta in itertools.product(grid, grid):
        distance = math.hypot(alpha, 0.5 * beta) if aims else math.hypot(alpha, beta)
        found = measured(rate(distance, 0.55), distance / 1.5, source)
        rows.append({"direction": None, "alpha": alpha, "beta": beta, "system": "none", **found})
    places = trajectory([[0.3, 0.05], [0.6, 0.2], [0.9, 0.1], [1.0, 0.0]])
    return document("plane", axes, rows, trajectory=places, settings={"alphas": grid, "betas": grid})


def skipping(whole):
    """The same without every other point of the second direction but 0 and the ends, and without 0.5 of all."""
    made = copy.deepcopy(whole)
    left = {axis["name"]: [0.5] for axis in made["settings"]["axes"]}
    left["random 124"] = [alpha for alpha in GRID[1:-1:2] if alpha]
    made["rows"] = [row for row in made["rows"] if row["alpha"] not in left[row["direction"]]]
    made["skipped"] = [{"direction": direction, "alphas": alphas} for direction, alphas in left.items()]
    return made


def preview(whole):
    """The same with answers at the centre alone."""
    kept = ("direction", "alpha", "beta", "system", "margin", "margin_interval", "margin_n")
    rows = [row if row["alpha"] == 0 else {key: row[key] for key in kept} for row in whole["rows"]]
    return {**whole, "rows": rows, "figures": []}


EVERYTHING = {
    "before/landscape.json": lines(systems=("none", "default")),
    "after/landscape.json": skipping(lines(0.3)),
    "scu/landscape.json": lines(0.9, only="scu"),
    "to_all/landscape.json": interpolation(),
    "to_others/landscape.json": interpolation(3.0, "others"),
    "plane/landscape.json": plane(),
    "noise/landscape.json": plane(aims=()),
    "preview/landscape.json": preview(lines()),
}


def shown(folder, *documents):
    """The sections of these documents, provenance left out."""
    write(folder, {f"{number}/landscape.json": made for number, made in enumerate(documents)})
    return sections(collect(folder))[:-1]


def only(folder, made):
    """The only section of a document, and its figures by name."""
    (section,) = shown(folder, made)
    return section, {figure.name.removeprefix("landscape-"): figure for figure in section.figures}


def traces(figure, label, yaxis):
    return [t for t in figure.data if t.get("hovertemplate", "").startswith(f"{label}, ") and t["yaxis"] == yaxis]


def values(made, measure, alpha, system="none"):
    return [row[measure] for row in made["rows"] if row["alpha"] == alpha and row["system"] == system]


def test_safety_is_above_capability_on_one_axis_with_the_mean_of_the_directions(tmp_path):
    made = lines()
    _, drawn = only(tmp_path, made)
    figure = drawn["lines"]
    assert figure.layout["yaxis"]["domain"][0] > figure.layout["yaxis2"]["domain"][1]
    assert {trace.get("xaxis", "x") for trace in figure.data} == {"x"} and "xaxis2" not in figure.layout
    assert figure.layout["yaxis2"]["type"] == "log"
    (rate,), (perplexity,) = traces(figure, "mean", "y"), traces(figure, "mean", "y2")
    assert rate["x"] == GRID
    for x, y in zip(rate["x"], rate["y"], strict=True):
        assert y == pytest.approx(statistics.mean(values(made, "asr_raw", x)))
    for x, y in zip(perplexity["x"], perplexity["y"], strict=True):
        assert y == pytest.approx(statistics.geometric_mean(values(made, "perplexity", x)))
    band = figure.data[0]
    assert band["y"][len(GRID)] == pytest.approx(
        statistics.mean(low for low, _ in values(made, "asr_raw_interval", GRID[-1]))
    )
    assert len(traces(figure, "random 124", "y")) == len(traces(figure, "degenerate text", "y")) == 1
    assert not traces(figure, "degenerate text", "y2")


def test_what_was_skipped_is_interpolated_hollow_and_not_in_the_table(tmp_path):
    whole = lines()
    made = skipping(whole)
    section, drawn = only(tmp_path, made)
    figure = drawn["lines"]
    (mean,) = traces(figure, "mean", "y")
    at = {(row["direction"], row["alpha"]): row["asr_raw"] for row in whole["rows"]}
    for alpha, around in ((0.5, (0.4, 0.6)), (0.3, (0.2, 0.4))):
        theirs = [
            statistics.mean(at[direction, x] for x in (around if alpha in entry["alphas"] else [alpha]))
            for entry in made["skipped"]
            for direction in [entry["direction"]]
        ]
        assert mean["y"][GRID.index(alpha)] == pytest.approx(statistics.mean(theirs))
    hollow = [x for x, colour in zip(mean["x"], mean["marker"]["color"], strict=True) if colour == "@paper"]
    assert hollow == made["skipped"][1]["alphas"] and 0.5 in hollow
    assert ("not measured, interpolated", "@ink", "circle-open") in figure.key
    column = figure.table.header.index("harmful requests answered, %: mean")
    assert [float(row[0]) for row in figure.table.rows if not row[column]] == [x for x in hollow if x != 0.5]
    assert any("12 of 61\u00a0points were not measured" in words for words in section.words)


def test_headlines_say_how_far_the_weights_may_go(tmp_path):
    rows = [
        {"direction": "d", "alpha": a, "asr_raw": r, "asr_raw_interval": [r - 1, r + 4], "perplexity": math.exp(abs(a))}
        for a, r in zip((-2, -1, 0, 1, 2, 3), (100, 4, 0, 1, 30, 70), strict=True)
    ]
    section, _ = only(tmp_path, document("lines", [noise(1)], rows))
    assert section.headlines == [
        f"0\u00a0% (\u22121 to 4) of the harmful requests are answered at alpha = 0; the rate stays in that interval "
        f"from \u22121 to 1; it passes 50\u00a0% at \u22121.48 and 2.5, where perplexity is "
        f"{math.exp(1 + 46 / 96):.2f} and {math.exp(2.5):.1f} instead of 1.00."
    ]


@pytest.mark.parametrize(
    ("rates", "words"),
    [((100, 100, 100), "100\u00a0% of the harmful requests are answered at alpha = 0, without any change."),
     ((5, 0, 40), "0\u00a0% of the harmful requests are answered at alpha = 0; it is nowhere above 40.0\u00a0%.")],
)  # fmt: skip
def test_a_landscape_without_a_rim(rates, words, tmp_path):
    rows = [{"direction": 0, "alpha": a, "asr": r} for a, r in zip((-1, 0, 1), rates, strict=True)]
    section, _ = only(tmp_path, document("lines", [], rows))
    assert section.headlines == [words]


def test_visage_stands_in_headline_and_table(tmp_path):
    made = lines(systems=("none", "default"))
    section, _ = only(tmp_path, made)
    entry = made["figures"][0]
    assert section.headlines[0].startswith(f"VISAGE {entry['visage']:.0f} ({entry['visage_interval'][0]:.0f} to ")
    (table,) = section.tables
    assert table.header[:4] == ["system prompt", "rate", "direction", "VISAGE"] and table.words == 3
    assert len(table.rows) == 2 * 2 * (1 + 3)
    assert table.rows[1] == [
        "none", "judge alone", "random 123",
        *(f"{entry['by_direction'][0][name]:.{digits}f}" for name, digits in
          (("visage", 1), ("visage_released", 1), ("basin_area", 1), ("half_width", 3))),
        "", "",
    ]  # fmt: skip


def test_system_prompts_share_a_grid(tmp_path):
    made = lines(systems=("default", "none"))
    _, drawn = only(tmp_path, made)
    figure = drawn["systems"]
    for system in ("none", "default"):
        (mean,) = traces(figure, system, "y")
        assert mean["y"][-3] == pytest.approx(statistics.mean(values(made, "asr_raw", GRID[-3], system)))
    assert [label for label, _, _ in figure.key] == ["none", "default"]
    assert drawn["lines"].title == "Safety beside capability, system prompt none"


def test_a_line_to_a_checkpoint_has_the_trajectory_on_it(tmp_path):
    made = interpolation()
    section, drawn = only(tmp_path, made)
    figure = drawn["lines"]
    (path,) = traces(figure, "checkpoints, numbered as in the table", "y")
    assert path["mode"] == "markers+text" and path["text"] == ["1", "2", "3"] and path["x"] == [0.3, 0.7, 1.0]
    assert path["y"] == [entry["asr_raw"] for entry in made["trajectory"]]
    assert "1: all" in figure.layout["xaxis"]["title"]["text"]
    assert [shape["x0"] for shape in figure.layout["shapes"]] == [0.0, 1.0] * 2
    assert section.headlines[0].startswith("Towards all, ")
    (table,) = section.tables
    assert table.rows[0][:4] == ["1 checkpoint-32", "0.3", "2.50", "20.0"]
    assert not any("outside of what the axes span" in words for words in section.words)
    far = {**made, "trajectory": trajectory([[0.3]], outside=0.9)}
    section, _ = only(tmp_path, far)
    assert any("outside of what the axes span" in words for words in section.words)


def test_a_plane_has_contours_marks_and_a_surface(tmp_path):
    made = plane()
    section, drawn = only(tmp_path, made)
    assert list(drawn) == ["contour", "perplexity", "surface", "over-refusal", "margin"]
    grid = made["settings"]["alphas"]
    at = {(row["alpha"], row["beta"]): row for row in made["rows"]}
    filled, half, path, marks = drawn["contour"].data
    assert filled["x"] == filled["y"] == grid
    assert filled["z"] == [[at[alpha, beta]["asr_raw"] for alpha in grid] for beta in grid]
    assert half["contours"]["start"] == half["contours"]["end"] == 50
    assert list(zip(path["x"], path["y"], strict=True)) == [
        (0.0, 0.0), *(tuple(entry["coordinates"]) for entry in made["trajectory"])
    ]  # fmt: skip
    assert list(zip(marks["x"], marks["y"], strict=True)) == [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    words = [note["text"] for note in drawn["contour"].layout["annotations"]]
    assert words == ["beta, towards others", "1", "2", "3", "4", "the model", "all", "others"]
    assert "1: checkpoint-32; 2: checkpoint-64" in drawn["contour"].summary
    capability = drawn["perplexity"].data[0]
    assert 10 ** capability["z"][3][5] == pytest.approx(at[grid[5], grid[3]]["perplexity"])
    assert drawn["perplexity"].table.rows[3][6] == figures.significant(at[grid[5], grid[3]]["perplexity"], 3)
    below = sum(row["asr_raw"] <= 50 for row in made["rows"])
    corner = f"{at[1.0, 0.0]['asr_raw']:.3g}\u00a0% at all and "
    assert section.headlines[0].startswith(f"Harmful requests answered on the plane: 0\u00a0% at the model, {corner}")
    assert f"at most half at {below} of {len(made['rows'])} points" in section.headlines[0]


def test_a_surface_hides_what_is_behind_and_leaves_out_what_is_not_known():
    flat = Plane([0, 1, 2], [0, 1, 2], [[0, 0, 0], [0, 100, 0], [0, 0, None]], ("a", "b"), percent=True)
    tiles = figures.surface("s", "t", "w", flat, marks=[("top", 1, 1), ("unknown", 2, 2)])
    shapes = tiles.layout["shapes"][1:-1]
    assert len(shapes) == 3 and len({shape["fillcolor"] for shape in shapes}) == 1
    lowest = [min(float(point.split(",")[1]) for point in shape["path"][1:-1].split("L")) for shape in shapes]
    assert lowest == sorted(lowest, reverse=True)  # the nearest is drawn last
    top = figures._seen(0, 0, 100)
    assert (tiles.data[0]["x"], tiles.data[0]["y"]) == ([top[0]], [top[1]])
    assert top[0] == 0 and all(f"{top[0]},{top[1]}" in shape["path"] for shape in shapes)
    ends = [figures._shade(part) for part in (-1, 0, 1, 2)]
    assert ends[0] == ends[1] == "rgb(0,34,78)" and ends[2] == ends[3] == "rgb(254,232,56)"


def test_a_preview_is_drawn_from_the_margin_alone(tmp_path):
    section, drawn = only(tmp_path, preview(lines()))
    assert list(drawn) == ["more"] and not section.tables
    assert section.headlines == [
        "Preview, without answers: the refusal margin is 6.0 (5.0 to 7.0) nats at alpha = 0, and above 0 from "
        "\u22120.5 to 0.5."
    ]


def test_several_landscapes_are_compared_first(tmp_path):
    names = list(EVERYTHING)
    write(tmp_path, EVERYTHING)
    found = sections(collect(tmp_path))
    first, *rest = found[:-1]
    assert first.title == "Landscapes side by side" and len(rest) == len(names)
    assert not any(section.headlines for section in rest)
    noisy, straight = first.figures
    assert [label for label, _, _ in noisy.key if "not measured" not in label] == ["after", "before", "scu"]
    assert [label for label, _, _ in straight.key] == ["to_all", "to_others"]
    (scu,) = traces(noisy, "scu", "y")
    assert scu["line"]["color"] == "#D55E00" and len({s[1:] for s in noisy.key}) == len(noisy.key)
    (table,) = first.tables
    assert {row[0] for row in table.rows} == {"after", "before", "scu"}
    assert {row[1] for row in table.rows} == {"all weights", "SCU"} and table.header[1] == "moved"
    assert [line.split(":")[0] for line in first.headlines] == sorted(name.split("/")[0] for name in names)
    assert "VISAGE is the mean of 100" in first.words[1] and not any("VISAGE" in w for s in rest for w in s.words)
    assert not any("grids differ" in words for words in first.words)
    wider = lines(alphas=[2 * alpha for alpha in GRID])
    assert "grids differ" in shown(tmp_path / "other", lines(), wider)[0].words[-1]


def test_figures_are_valid_plotly_and_have_their_own_names(tmp_path):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    write(tmp_path, EVERYTHING)
    drawn = [figure for section in sections(collect(tmp_path)) for figure in section.figures]
    assert len({figure.name for figure in drawn}) == len(drawn) > 20
    for figure in drawn:
        assert figure.title and figure.summary
        graph_objects.Figure(figures._exported(figure))


def test_names_of_checkpoints_are_escaped(tmp_path):
    made = interpolation(name=HOSTILE)
    made["trajectory"][0]["checkpoint"] = HOSTILE
    write(tmp_path, {"landscape.json": made})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert HOSTILE not in page and f"towards {HOSTILE}" in html.unescape(words_of(page))


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: made["rows"][0].pop("alpha"),
        lambda made: made["rows"][0].update(alpha="far"),
        lambda made: made["rows"][0].update(asr_raw="many"),
        lambda made: made["settings"].update(shape="plane"),
        lambda made: made["settings"].update(axes=[{"name": "x"}]),
        lambda made: made["figures"][0].pop("by_direction"),
        lambda made: made["figures"][0]["by_direction"].pop(),
        lambda made: made["figures"][0].update(rate="other"),
        lambda made: made.update(skipped=[{}]),
        lambda made: made.update(trajectory=[{"checkpoint": "c"}]),
        lambda made: made.update(rows=None),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_a_damaged_document_is_named(damage, beside, tmp_path):
    made = lines()
    damage(made)
    write(tmp_path, {"bad.json": made} | ({"good.json": lines()} if beside else {}))
    with pytest.raises(SsahError, match=r"cannot report bad\.json: its entries are not those of a landscape"):
        write_report(tmp_path)


def test_a_document_without_rows_is_no_error(tmp_path):
    section, drawn = only(tmp_path, document("lines", [noise(1)], []))
    assert not drawn and not section.headlines


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
def test_a_browser_draws_lines_planes_and_surfaces(tmp_path):
    write(tmp_path / "results", EVERYTHING)
    assert_a_browser_draws(tmp_path / "results", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
def test_images_are_as_large_as_the_figures(tmp_path):
    pytest.importorskip("kaleido")
    write(tmp_path, {"plane/landscape.json": plane(), "lines/landscape.json": lines()})
    drawn = {figure.name: figure for section in sections(collect(tmp_path)) for figure in section.figures}
    chosen = [drawn[name] for name in ("landscape-lines", "landscape-contour-2", "landscape-surface-2")]
    for figure, path in zip(chosen, figures.save_figures(chosen, tmp_path / "images", ["png"]), strict=True):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert (width, height) == (2 * 900, 2 * figures._exported(figure)["layout"]["height"])
