"""The page that `ssah-fast report` writes: what it finds, what it says, and what a browser makes of it."""

import functools
import html
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from click.testing import CliRunner

from ssah_fast.cli.report import report
from ssah_fast.errors import SsahError
from ssah_fast.evaluation.intervals import Interval, proportion
from ssah_fast.partition import identify
from ssah_fast.report import figures, write_report
from ssah_fast.report.collect import collect
from ssah_fast.report.figures import Mark, Row
from ssah_fast.report.page import render
from ssah_fast.report.sections import sections
from ssah_fast.report.wording import COLOURS, LINES, Estimate, counted, distinct_names, joined, percent
from ssah_fast.scores import ModuleScores, Scores
from ssah_fast.units import Slice, UnitModule

HOSTILE = '<script>alert("x")</script>&{{ 7 * 7 }}'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MODEL = {"name": "run/model", "architecture": "LlamaForCausalLM"}


def tiny_scores(units=100, layers=2):
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for layer in range(layers):
        for kind, reader in (("attention", "o_proj"), ("mlp", "down_proj")):
            name = f"layers.{layer}.{kind}"
            channels = Slice(f"{name}.{reader}.weight", 1, 8, inner=1, block=units)
            layout = UnitModule(name, kind, layer, units, f"{name}.{reader}", channels, (channels,))
            count = torch.full((2, 2), 50)
            mean, m2 = torch.zeros(2, 2, units).double(), torch.rand(2, 2, units, generator=generator).double()
            m2[:, :, 0] = 0  # a unit without importance has no place on a logarithmic axis
            modules[name] = ModuleScores.from_moments(layout, count, mean, m2, torch.ones(units).double(), "variance")
    return Scores(modules, {"model": {"architecture": "Tiny"}, "versions": {"torch": "1"}}, "variance")


def ablation_row(category, asr, perplexity, of=None, draw=None, ratio=0.06):
    return {
        "category": category,
        "of": of,
        "draw": draw,
        "ratio": None if category == "dense" else ratio,
        "units": 24,
        "parameters": 192,
        **proportion(asr, 200).flat("asr"),
        "asr_by_system": {"none": proportion(asr, 200).flat("asr")},
        **Interval(perplexity, perplexity * 0.99, perplexity * 1.01, 300).flat("perplexity"),
    }


def evaluation(name, asr):
    attack = {"set": "asr", "system": "none", "judge": "keyword", **proportion(asr, 200).flat("asr")}
    harmless = {"system": "none", "judge": "keyword", **proportion(1, 200).flat("over_refusal")}
    utility = {**Interval(1.05, 1.04, 1.06, 300).flat("perplexity"), "tokens": 4000}
    model = {**MODEL, "name": name}
    return {
        "kind": "evaluation",
        "schema": 1,
        "model": model,
        "attack": [attack],
        "over_refusal": [harmless],
        "utility": utility,
    }


def manifest(freeze=None):
    mask = freeze and {"provenance": {"freeze": freeze, "train": None, "policy": {"embeddings": "freeze"}}}
    return {
        "kind": "finetune",
        "schema": 1,
        "method": "full",
        "base": {"id": "elsewhere/run/model"},
        "options": {"learning_rate": 1e-3},
        "mask": mask,
        "steps": 128,
        "train_loss": 0.07,
        "files": {"model.safetensors": f"hash of {freeze}"},
    }


def probe():
    def layers(sign):
        return [
            {
                "layer": layer,
                **Interval(0.1, 0.09, 0.11, 9).flat("refusal"),
                **Interval(0.1 + sign * 0.01 * layer, 0.09, 0.2, 9).flat("compliance"),
                **Interval(sign * 0.01 * layer, -0.1, 0.1, 9).flat("margin"),
                **proportion(8, 9).flat("nearer_refusal"),
            }
            for layer in range(3)
        ]

    models = [
        {"name": name, "sets": [{"set": "harmful", "layers": layers(sign)}]} for name, sign in (("a", 1), ("b", -1))
    ]
    return {"kind": "probe", "schema": 1, "models": models}


DOCUMENTS = {
    "ablation/ablation.json": {
        "kind": "ablation",
        "schema": 1,
        "model": MODEL,
        "settings": {"note": HOSTILE},
        "rows": [
            ablation_row("dense", 0, 1.005),
            ablation_row("scu", 188, 1.023),
            *(ablation_row("random", asr, 1.013, of="scu", draw=draw) for draw, asr in enumerate((7, 11))),
            ablation_row("ru", 0, 1.006, ratio=0.148),
        ],
        "scan": None,
    },
    "before/eval.json": evaluation("run/model", 0),
    "all/eval.json": evaluation("/somewhere/run/tuned/all", 200),
    "scu/eval.json": evaluation("tuned/scu", 3),
    "tuned/all/ssah_manifest.json": manifest(),
    "tuned/scu/ssah_manifest.json": manifest("scu,cu:6%"),
    "certificate.json": {
        "kind": "ssah_fast freeze certificate",
        "schema": 1,
        "verdict": "pass",
        "tuned": {"files": {"config.json": {"sha256": "c"}, "model.safetensors": {"sha256": "hash of scu,cu:6%"}}},
        "totals": {"elements": 200, "frozen": 150, "frozen_changed": 0, "trainable_changed": 50},
    },
    "transfer.json": {
        "kind": "transfer",
        "schema": 1,
        "categories": ["scu", "ucu", "cu", "ru", "unobserved"],
        "units": [[8, 0, 2, 0, 0], [0, 10, 0, 0, 0], [0, 0, 70, 0, 0], [0, 0, 4, 6, 0], [0] * 5],
        "units_percent": [[8.0, 0, 2.0, 0, 0], [0, 10.0, 0, 0, 0], [0, 0, 70.0, 0, 0], [0, 0, 4.0, 6.0, 0], [0.0] * 5],
        "unchanged_units_percent": 94.0,
        "layers": [],
    },
    "probe.json": probe(),
    "landscape.json": {
        "kind": "landscape",
        "schema": 1,
        "rows": [
            {"direction": d, "alpha": a, "asr": abs(a), "perplexity": 1.0 + abs(a)} for d in (0, 1) for a in (-1, 0, 1)
        ],
    },
    "run.json": {
        "kind": "run",
        "schema": 1,
        "title": HOSTILE,
        "steps": [
            {"name": "tune", "title": "everything trained", "output": "tuned/all", "line": f"ssah-fast {HOSTILE}"}
        ],
        "published": {
            "table": {
                "source": "a paper",
                "rows": [{"category": "scu", "ratio": 0.013, "asr": 66.0}, {"run": "x", "score": 1.2}],
            }
        },
    },
    "tokenizer.json": {"kind": "none of ours"},
}


def write(folder, documents):
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("results"), DOCUMENTS)
    scores = tiny_scores()
    scores.save(folder / "scores.safetensors")
    units = identify(scores, 0.06, 0.1, 0.1)
    units.save(folder / "units.safetensors")
    units.shuffled(0).save(folder / "control.safetensors")
    return folder


@pytest.fixture(scope="module")
def page(results):
    return write_report(results).read_text(encoding="utf-8")


def words_of(page):
    """The text of a page without its scripts and style."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", body)))


def test_says_what_the_documents_hold(page):
    words = words_of(page)
    for sentence in (
        "Without the SCU (6 % of the units), 94 % (90 to 97) of the harmful requests are answered instead of "
        "0.0 % (0.0 to 1.9); without as many random units, 4 to 6 % (2 draws)",
        "before fine-tuning: 0.0 % (0.0 to 1.9)",
        "everything trained: 100.0 % (98.1 to 100.0)",
        "scu: 1.5 % (0.5 to 4.3)",
        "1 of 1 freeze certificate pass: 0 of 150 frozen weights changed",
        "SCU, CU 6 % and embeddings frozen",
        "94.0 % of the units have the same category before and after; of the SCU, 80 % stayed SCU",
        "4 have an importance of zero",
    ):
        assert sentence in words


def test_text_of_files_is_escaped(page):
    assert HOSTILE not in page
    assert "49" not in html.unescape(re.search(r"<title>(.*?)</title>", page)[1])
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;") in page


def test_asks_for_nothing_from_outside(page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1])
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    without_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", without_scripts)
    assert "@import" not in without_scripts and "url(" not in without_scripts


def test_every_figure_has_words_and_every_table_a_caption(results):
    found = sections(collect(results))
    drawn = [figure for section in found for figure in section.figures]
    assert len({figure.name for figure in drawn}) == len(drawn) == 12
    assert all(figure.title and figure.summary for figure in drawn)
    assert all(
        table.caption and all(len(row) == len(table.header) for row in table.rows) for s in found for table in s.tables
    )


def test_figures_are_valid_plotly(results):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for section in sections(collect(results)):
        for figure in section.figures:
            graph_objects.Figure(figures._exported(figure))


@pytest.mark.parametrize(
    "name", [name for name in DOCUMENTS if name not in ("tokenizer.json", "run.json", "certificate.json")]
)
def test_what_is_missing_is_left_out(name, tmp_path):
    write(tmp_path, {name: DOCUMENTS[name]})
    found = sections(collect(tmp_path))
    assert len(found) == 2 and found[1].name == "provenance"
    assert 'id="summary"' not in render(collect(tmp_path), found[1:], "")


def test_large_models_are_shown_by_layer_and_thinned_alike_every_time():
    scores = tiny_scores(units=3000)
    units = identify(scores, 0.06, 0.1, 0.1)
    drawn = [figures.scatter(scores, units, "s") for _ in range(2)]
    points = sum(len(trace["x"]) for trace in drawn[0].data if trace["mode"] == "markers")
    assert 1000 < points <= figures.MOST_POINTS and drawn[0] == drawn[1]
    assert f"{points:,} of 12,000 units are drawn" in drawn[0].summary
    shares = figures.composition(units, "c").table.rows
    assert len(shares) == 4 and all(sum(map(float, row[3:])) == pytest.approx(100, abs=0.03) for row in shares)


def test_a_category_has_one_colour_everywhere():
    assert len({*COLOURS.values(), *LINES}) == len(COLOURS) + len(LINES)
    row = Row("SCU", [Mark(Estimate(50.0, 40.0, 60.0), COLOURS["scu"])], "50 %")
    marker = figures.dots("d", "t", "s", [row], "x", percent=True).data[0]
    assert marker["marker"]["color"] == marker["error_x"]["color"] == COLOURS["scu"]
    assert marker["error_x"]["array"] == marker["error_x"]["arrayminus"] == [10.0]


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(94.0, 89.8, 96.6), "94 (90 to 97)"),
        (Estimate(0.0, 0.0, 1.88), "0.0 (0.0 to 1.9)"),
        (Estimate(1.02345, 1.018, 1.029), "1.023 (1.018 to 1.029)"),
        (Estimate(1234.5, 1100.0, 1400.0), "1,234 (1,100 to 1,400)"),
        (Estimate(-0.0413, -0.05, -0.03), "\u22120.041 (\u22120.050 to \u22120.030)"),
        (Estimate(6.4912), "6.49"),
        (Estimate(0.0), "0"),
    ],
)
def test_numbers_are_rounded_to_what_their_interval_supports(estimate, shown):
    assert estimate.full() == shown


def test_wording():
    assert percent(0.0013) == "0.13\u00a0%" and percent(0.7057) == "71\u00a0%"
    assert counted(1, "unit") == "1\u00a0unit" and counted(2304, "unit") == "2,304\u00a0units"
    assert joined(["a", "b", "c"]) == "a, b and c" and joined([]) == ""
    assert distinct_names(["/x/run/a", "/x/run/b"]) == ["a", "b"] and distinct_names(["/x/a"]) == ["a"]


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(SsahError, match="does not exist"):
        write_report(tmp_path / "none")
    with pytest.raises(SsahError, match="nothing to report"):
        write_report(tmp_path)
    write(tmp_path, {"probe.json": {"kind": "probe", "schema": 1}})
    with pytest.raises(SsahError, match=r"cannot report probe\.json: .*'models'"):
        write_report(tmp_path)
    with pytest.raises(SsahError, match="formats='gif'"):
        write_report(tmp_path, formats=["gif"])
    assert not (tmp_path / "report.html").exists()


def test_what_cannot_be_read_is_listed(tmp_path):
    write(tmp_path, {"probe.json": DOCUMENTS["probe.json"], "later.json": {"kind": "transfer", "schema": 99}})
    (tmp_path / "scores.safetensors").write_bytes(b"torn")
    words = words_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "its schema is 99" in words and "not a safetensors file" in words


def test_a_missing_plotly_names_the_extra(results, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SsahError, match=r"pip install 'ssah_fast\[report\]'"):
        write_report(results, tmp_path / "page.html")


def test_command(results, tmp_path):
    done = CliRunner().invoke(report, [str(results), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and str(tmp_path / "page.html") in done.output
    assert (tmp_path / "page.html").stat().st_size > 1_000_000


# Frames are exactly as wide as asked, which a headless window is not below 500 px; what they hold is written where
# --dump-dom shows it.
WATCHER = """<!doctype html><title>watcher</title>
<iframe src="report.html" style="width:1280px;height:900px"></iframe>
<iframe src="report.html" style="width:390px;height:900px"></iframe><pre></pre>
<script>function look() {
  var seen = Array.from(document.querySelectorAll("iframe")).map(function (frame) {
    var page = frame.contentDocument;
    return {
      width: page.documentElement.clientWidth,
      content: page.documentElement.scrollWidth,
      drawn: Array.from(page.querySelectorAll(".plot[data-drawn]")).filter(function (plot) {
        return plot.querySelectorAll("svg.main-svg path, svg.main-svg image").length > 2;
      }).map(function (plot) { return plot.id.slice(5); }),
      widest: Math.max.apply(null, Array.from(page.querySelectorAll(".main-svg")).map(function (svg) {
        return svg.getBoundingClientRect().right;
      }))
    };
  });
  document.querySelector("pre").textContent = JSON.stringify(seen);
}
// A busy machine needs longer than any fixed time; once all is drawn, a scroll bar may have it drawn again.
(function wait() {
  var done = Array.from(document.querySelectorAll("iframe")).every(function (frame) {
    var page = frame.contentDocument, plots = page.querySelectorAll(".plot");
    return page.readyState === "complete" && plots.length &&
      plots.length === page.querySelectorAll(".plot[data-drawn]").length;
  });
  setTimeout(done ? look : wait, done ? 1000 : 200);
})();</script>"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def assert_a_browser_draws(results, tmp_path):
    """Every figure of the folder's page, wide and on a phone, without an error or a request."""
    write_report(results, tmp_path / "report.html")
    (tmp_path / "watcher.html").write_text(WATCHER)
    # Files could not look into each other's frames.
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served = f"http://127.0.0.1:{server.server_port}"
    requests = tmp_path / "requests.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={requests}", "--virtual-time-budget=60000"]
    command = [str(CHROMIUM), *flags, "--dump-dom", f"{served}/watcher.html"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert "CONSOLE" not in done.stderr, done.stderr
    names = [figure.name for section in sections(collect(results)) for figure in section.figures]
    for frame in json.loads(re.search("<pre>(.*)</pre>", done.stdout)[1]):
        assert frame["drawn"] == names
        assert frame["content"] <= frame["width"] and frame["widest"] <= frame["width"]
    # Chromium's own requests, for updates and the like, have no page as their initiator.
    asked = re.findall(r'"initiator":"http[^"]*".*?"url":"(http[^"]+)"', requests.read_text(errors="replace"))
    assert set(asked) == {f"{served}/report.html", f"{served}/favicon.ico"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
def test_a_browser_draws_every_figure_without_an_error_or_a_request(results, tmp_path):
    assert_a_browser_draws(results, tmp_path)
