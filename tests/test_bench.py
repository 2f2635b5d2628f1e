"""The benchmark harness: its rounds, medians, ratios and CSV rows. No time is ever asserted."""

import csv
import importlib
import json
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ssah_fast import ops
from ssah_fast.errors import SsahError

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    module = importlib.import_module("harness")
    monkeypatch.setattr(module, "cache_bytes", lambda: 1 << 16)
    return module


@pytest.fixture
def threads() -> None:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def case(harness: ModuleType, *names: str, **fields: object) -> object:
    alternatives = [harness.Alternative(name, lambda i: None) for name in names]
    return harness.Case(
        **{"op": "op", "dtype": "fp32", "shape": (2, 3), "setting": "s", "bytes": 1000, **fields},
        alternatives=alternatives,
    )


def test_rounds_run_every_alternative_in_turn(harness: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    alternatives = [
        harness.Alternative("a", lambda i: calls.append(("a", i)), lambda i: calls.append(("restore a", i))),
        harness.Alternative("b", lambda i: calls.append(("b", i))),
    ]
    ticks = iter(range(100))

    def timer(call: object) -> float:
        call()
        return float(next(ticks))

    seconds = harness.run_rounds(alternatives, 2, warmup=1, sweep=lambda: calls.append(("sweep", -1)), timer=timer)
    assert [c for c in calls if c[0] != "sweep"] == [
        *(("a", 0), ("restore a", 0), ("b", 0)),
        *(("b", 1), ("a", 1), ("restore a", 1)),
        *(("a", 2), ("restore a", 2), ("b", 2)),
    ]
    assert [i for i, c in enumerate(calls) if c[0] == "sweep"] == [i - 1 for i, c in enumerate(calls) if c[0] in "ab"]
    assert seconds["a"].tolist() == [3, 4]
    assert seconds["b"].tolist() == [2, 5]  # the warm-up's 0 and 1 are gone


def test_summary_takes_medians_of_times_and_of_ratios_within_rounds(harness: ModuleType) -> None:
    seconds = {
        "ours": np.array([1.0, 2.0, 9.0]),
        "theirs": np.array([2.0, 20.0, 10.0]),  # ratios 0.5, 0.1, 0.9: their median is not the ratio of the medians
        harness.READ: np.array([4.0, 1.0, 9.0]),
    }
    ours, theirs, read = harness.summarise(case(harness, "ours", "theirs"), seconds, read_bytes=4000)
    assert (ours.backend, ours.median, ours.unit, ours.rounds, ours.shape) == ("ours", 2000, "ms", 3, "2x3")
    assert (ours.p20, ours.p80) == pytest.approx(tuple(np.percentile([1000, 2000, 9000], (20, 80))))
    assert ours.ratios == pytest.approx({"theirs": 0.5})
    assert theirs.ratios == pytest.approx({"ours": 2.0})
    assert ours.gb_per_s == pytest.approx(1000 / 2 / 1e9)
    # Rounds: 1000 B/s against 1000, 500 against 4000, 111 against 444.
    assert ours.percent_of_read == pytest.approx(25)
    assert (read.percent_of_read, read.bytes, read.ratios) == (pytest.approx(100), 4000, {})


def test_summary_without_bytes_has_no_bandwidth(harness: ModuleType) -> None:
    values = {"ours": np.array([3.0]), "theirs": np.array([0.0])}
    ours, theirs = harness.summarise(case(harness, "ours", "theirs", bytes=None), values, unit="MiB", scale=1.0)
    assert (ours.median, ours.unit, ours.gb_per_s, ours.percent_of_read) == (3, "MiB", None, None)
    assert (ours.ratios, theirs.ratios) == ({}, {"ours": 0})  # nothing is divided by zero


@pytest.mark.parametrize(
    ("bound", "against", "measured", "met"),
    [(0.5, "theirs", 0.4, True), (0.3, "theirs", 0.4, False), (75, None, 80, True), (85, None, 80, False)],
)
def test_targets(harness: ModuleType, bound: float, against: str | None, measured: float, met: bool) -> None:
    row = harness.Row("op", "ours", "fp32", "2x3", "s", 1, 1, 1, "ms", percent_of_read=80, ratios={"theirs": 0.4})
    assert harness.reached([row], harness.Target("ours", bound, against)) == (measured, met)


def test_csv_is_only_ever_appended_to(harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "op.csv"
    row = harness.Row("op", "ours", "fp32", "2x3", "a, b", 1.23456789, 1, 2, "ms", 1000, 3.0, 50.0, {"x": 0.123456}, 7)
    harness.append(path, [row])
    before = path.read_bytes()
    harness.append(path, [row, row])
    assert path.read_bytes().startswith(before)
    rows = read_rows(path)
    assert len(rows) == 3
    assert tuple(rows[0]) == harness.FIELDS
    assert (rows[0]["setting"], rows[0]["median"], rows[0]["bytes"], rows[0]["rounds"]) == (
        "a, b",
        "1.2346",
        "1000",
        "7",
    )
    assert json.loads(rows[0]["ratios"]) == {"x": 0.12346}
    assert rows[0]["threads"] == str(torch.get_num_threads())
    assert all(rows[0][name] for name in ("device", "driver", "python", "torch", "ssah_fast"))
    assert rows[0]["time"].endswith("+00:00")


def test_csv_with_other_columns_is_refused_and_kept(harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "op.csv"
    path.write_text("op,median\nx,1\n")
    with pytest.raises(SsahError, match="op,median"):
        harness.append(path, [])
    assert path.read_text() == "op,median\nx,1\n"


def test_git_state_is_dirty_unless_only_results_changed(harness: ModuleType, tmp_path: Path) -> None:
    def git(*args: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(("git", *identity, *args), cwd=tmp_path, check=True, capture_output=True)

    assert harness.git_state(tmp_path) == ""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "code").write_text("1")
    git("init")
    git("add", "code")
    git("commit", "-m", "m")
    (results / "op.csv").write_text("row")
    harness.git_state.cache_clear()
    clean = harness.git_state(results.parent)
    assert len(clean) == 12 and clean.isalnum()
    (tmp_path / "code").write_text("2")
    assert harness.git_state(results.parent) == clean  # as it was when the script started
    harness.git_state.cache_clear()
    assert harness.git_state(results.parent) == f"{clean}-dirty"


def test_moments_script(harness: ModuleType, threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = importlib.import_module("bench_moments")
    sizes = ("--rows", "2048", "--channels", "48")
    bench.main([*sizes, "--rounds", "2", "--threads", "1", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "moments.csv")
    assert {(r["op"], r["dtype"], r["setting"]) for r in rows} == {
        *(("channel_moments_", dtype, "one group") for dtype in ("bf16", "fp16", "fp32")),
        ("channel_moments_", "bf16", "sequences"),
        *(("gated_moments_", *rest) for rest in (("bf16", "silu"), ("bf16", "gelu_tanh"), ("fp32", "silu"))),
        *(("column_norms", "bf16", f"axis {axis}") for axis in (0, 1)),
    }
    assert {r["shape"] for r in rows} == {"2048x48"}
    by_name = {(r["op"], r["dtype"], r["setting"], r["backend"]): r for r in rows}
    assert by_name["channel_moments_", "bf16", "one group", "cpp"]["bytes"] == str(2048 * 48 * 2 + 48 * 32 + 2048)
    assert by_name["gated_moments_", "fp32", "silu", "cpp"]["bytes"] == str(3 * 2048 * 48 * 4 + 48 * 32 + 2048)
    assert by_name["column_norms", "bf16", "axis 0", "cpp"]["bytes"] == str(2048 * 48 * 2 + 2048 * 8)
    gated = json.loads(by_name["gated_moments_", "bf16", "silu", "cpp"]["ratios"])
    assert set(gated) == {"cpp_fresh", "act_mul"}
    assert all(float(r["percent_of_read"]) > 0 for r in rows)
    out = capsys.readouterr().out
    assert "Targets" in out and "flap_torch" in out

    bench.main([*sizes, "--rounds", "1", "--only", "column_norms", "--out", str(tmp_path)])
    more = read_rows(tmp_path / "moments.csv")
    assert more[: len(rows)] == rows
    assert {r["op"] for r in more[len(rows) :]} == {"column_norms"}


def test_sequences_leave_prompts_out(harness: ModuleType) -> None:
    group = importlib.import_module("bench_moments").sequences(4096)
    assert group.unique().tolist() == [-1, 0, 1, 2, 3]
    assert 0.5 < (group >= 0).float().mean() < 0.8


def test_score_script(harness: ModuleType, threads: None, tmp_path: Path) -> None:
    bench = importlib.import_module("bench_score")
    sizes = ("--hidden", "32", "--intermediate", "48", "--heads", "2", "--tokens", "16")
    kernels = (ops.channel_moments_, ops.gated_moments_, ops.column_norms, torch.nn.functional.linear)
    bench.main([*sizes, "--rounds", "2", "--threads", "1", "--out", str(tmp_path)])
    assert kernels == (ops.channel_moments_, ops.gated_moments_, ops.column_norms, torch.nn.functional.linear)
    rows = {(r["setting"], r["backend"]): r for r in read_rows(tmp_path / "score.csv")}
    assert set(json.loads(rows["end to end", "cpp"]["ratios"])) == {"plain_forward", "flap_hooks"}
    assert rows["end to end", "cpp"]["shape"] == "2x32x48x2x16"
    for name in ("cpp", "plain_forward", "flap_hooks"):
        assert {("matmul", name), ("attention", name), ("rest", name)} <= set(rows)
    assert {name for setting, name in rows if setting == "moments"} == {"cpp"}
    assert float(rows["state per unit and set", "cpp"]["median"]) == pytest.approx(32, rel=0.05)


def test_flap_hooks_follow_the_closed_form(harness: ModuleType) -> None:
    """(N - 1) F_N = sum over m = 2..N of (m - 1) / m times sequence m's spread about the mean of the first m means."""
    bench = importlib.import_module("bench_score")
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randn(5, 1, 7, 3, generator=generator)
    statistics = bench.FlapStatistics(3)
    for sequence in sequences:
        statistics(torch.nn.Identity(), (sequence,), sequence)
    means = sequences.double().mean(2)[:, 0].cumsum(0) / torch.arange(1, 6).view(-1, 1)
    spread = (sequences[:, 0].double() - means[:, None]).square().sum(1)
    weights = torch.arange(1, 5).view(-1, 1) / torch.arange(2, 6).view(-1, 1)
    torch.testing.assert_close(statistics.fluctuation.double() * 4, (weights * spread[1:]).sum(0), rtol=1e-5, atol=1e-6)
