"""bench/landscape.py: what it reads from a run's folder, and what it says of it."""

import csv
import json
import sys
from pathlib import Path

import pytest

from ssah_fast.bench import embedded, landscape

WIDE = [a / 10 for a in range(-10, 11)]
WAY = [-0.25, 0.0, 0.5, 0.75, 1.0, 1.25]


def rate(alpha):
    """A basin that ends at |alpha| 0.5: 0 %, then a rise to 100 % at 0.7."""
    return min(100.0, max(0.0, 500 * (abs(alpha) - 0.5)))


def row(direction, alpha, asr):
    found = {"direction": direction, "alpha": alpha, "beta": None, "system": "none", "over_refusal": None}
    found |= {"asr_raw": asr, "asr": asr / 2, "degenerate": asr / 2}
    return {**found, "accuracy": 100 - abs(alpha), "perplexity": None if alpha == 1.25 else 1 + alpha**2}


def figure(system="none", **values):
    found = {"visage": 60.0, "visage_released": 50.0, "basin_area": 40.0, "half_width": 0.6, **values}
    bounds = {f"{key}_interval": [value - 3, value + 3] for key, value in found.items()}
    return {"system": system, "rate": "asr_raw", "n": 80, **found, **bounds}


POINT = {"answers": [{}] * 80, "seconds": {"move": 0.01, "answers": 0.9, "restore": 0.02, "judge": 0.03, "write": 0.04}}


@pytest.fixture
def folder(tmp_path):
    """A run in which nearly everything comes out."""
    steps, folder = [], tmp_path / "seed-7"

    def add(place, rows=(), figures=(), *, lengths=None, trajectory=(), points=1, systems=("none",)):
        where = folder / "landscape" / place
        where.mkdir(parents=True)
        document = {"settings": {"systems": dict.fromkeys(systems)}, "rows": [*rows], "figures": [*figures]}
        document |= {"lengths": lengths, "trajectory": [*trajectory]}
        (where / "landscape.json").write_text(json.dumps(document))
        (where / "points-0.jsonl").write_text(f"{json.dumps(POINT)}\n" * points)
        steps.append({"output": f"landscape/{place}", "seconds": 0.1 if place == "around/preview" else 100.0})

    add("around/published", figures=[figure()], points=4)
    add("around/adaptive", figures=[figure(visage=62.0)], points=2)
    # Two directions, whose mean is what counts.
    twice = [row(name, a, rate(a) + off) for a in WIDE for name, off in (("random 1", 1), ("random 2", -1))]
    add("tuning/before", twice, [figure()], points=4)
    add("around/adaptive_wide", figures=[figure(visage=64.0)], points=3)
    add("around/preview", [{"alpha": a, "margin": 10 * (0.6 - abs(a))} for a in WIDE])
    add("around/plane", lengths=[10.0, 10.0])
    for name, end in (("all", 100.0), ("others", 4.0), ("random", 20.0)):
        add(f"ways/{name}", [row(f"towards {name}", t, end * max(0.0, min(t, 1.0))) for t in WAY], lengths=[2.0])
    there = {"checkpoint": "/x/way/checkpoint-16", "coordinates": [0.25, 0.5], "moved": 1.5, "outside": 0.2}
    there |= {"asr_raw": 5.0, "asr_raw_interval": [2.0, 9.0], "asr_raw_n": 80}
    there |= {"perplexity": 1.5, "perplexity_interval": None, "perplexity_n": 80}
    add("ways/plane", lengths=[2.0, 2.0], trajectory=[there])
    add("tuning/all", figures=[figure(basin_area=0.5)])
    add("tuning/others", figures=[figure(basin_area=30.0)])
    prompted = [figure(), figure("system_prompt", visage=66.0, basin_area=44.0)]
    add("around/systems", figures=prompted, systems=("none", "system_prompt"))
    for part, area in (("scu", 38.0), ("random_scu", 41.0), ("ru", 43.0), ("random_ru", 41.0)):
        add(f"parts/{part}", figures=[figure(basin_area=area)])
    (folder / "run.json").write_text(json.dumps({"steps": steps}))
    return folder


def collected(folder):
    return {(row.model, row.measure): row for row in landscape.collect(folder)}


def test_rows_of_a_run(folder):
    found = collected(folder)
    assert found["tuning/before", "asr_raw.visage"][2:] == (60.0, "", 57.0, 63.0, 80)
    assert found["around/systems/system_prompt", "asr_raw.visage"].value == 66.0
    assert [found["tuning/before", f"asr_raw@{a}"].value for a in ("-0.6", "0", "0.6")] == pytest.approx([50, 0, 50])
    assert ("around/published", "asr_raw@0") not in found and ("ways/all", "perplexity@1.25") not in found
    assert found["ways/plane", "length.1"].value == 2.0
    there = {measure: row for (place, measure), row in found.items() if place == "ways/plane/checkpoint-16"}
    assert there["coordinate.1"].value == 0.5 and there["moved"].value == 1.5 and there["outside"].value == 20.0
    assert there["asr_raw"][2:] == (5.0, "%", 2.0, 9.0, 80) and there["perplexity"][2:] == (1.5, "", None, None, 80)
    assert found["around/published", "answers"].value == 320 and found["around/published", "points"].value == 4
    assert found["around/published", "around"].value == pytest.approx(10)
    assert found["around/published", "seconds"].value == 100.0
    assert found["around/preview", "seconds"].value == pytest.approx(1)  # it was killed, and its last part took 0.1


def test_statements_hold_where_they_should(folder):
    said = landscape.statements(collected(folder))
    assert [name for name, (_, holds) in said.items() if not holds] == [
        "work around the model's passes: % of a point",
        "around/adaptive_wide: % of the answers",
        "around/adaptive_wide: VISAGE, minus that of all points",
    ]
    assert said["around/adaptive: % of the answers"][0] == "50"
    assert said["around/adaptive_wide: VISAGE, minus that of all points"][0] == "4"
    assert said["around/preview: half-width, minus that of answers"] == ("0", True)
    assert said["nothing frozen: 50 % ASR at this part of the way"][0] == "0.5"
    assert said["noise goes so many times as far to 50 %"][0] == "6"  # 0.6 of 10, and half of 2
    assert said["their ASR at its end, minus that of random units"][0] == "-16"
    assert said["basin area: noise in SCU, minus in random units"] == ("-3", True)
    assert said["basin area: noise in RU, minus in random units"] == ("2", True)


def test_a_run_is_measured_kept_and_told(folder, monkeypatch, capsys):
    ran, script, kept = [], Path(landscape.__file__), folder.parent / "a.csv"
    monkeypatch.setattr(embedded, "run", lambda *given: ran.append(given))
    monkeypatch.setattr(sys, "argv", ["landscape.py", str(folder.parent), "--seeds", "7", "--csv", str(kept)])
    embedded.measure(script, landscape.collect, landscape.statements)
    assert ran == [(folder, 7, script.with_suffix(".yaml"))]
    with kept.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(landscape.collect(folder)) and {row["seed"] for row in rows} == {"7"}
    out = capsys.readouterr().out
    assert "seed 7" in out and out.count("(NO)") == 3
