"""`ssah-fast bench`: what it prints and writes, and its exit codes. No time is ever asserted."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ssah_fast.bench import clock, moments, picture, records, stream
from ssah_fast.cli import bench
from ssah_fast.cli.main import main
from ssah_fast.errors import SsahError

CASE = ("moments", "--shapes", "2048x48", "--only", "column_norms", "--device", "cpu")
OPS = {"moments", "adamw", "perturb", "score", "train", "stream"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(clock, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(clock, "PRODUCT", {"cpu": 16})
    monkeypatch.setattr(stream, "run_apart", run_here)
    monkeypatch.delenv(stream.VARIABLE, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_here(arguments: Sequence[str]) -> str:
    """Instead of a process of its own, which takes seconds to start."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stream.work(arguments)
    return printed.getvalue()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def change_row(path: Path, backend: str, **fields: str) -> None:
    """Write other values into the rows of a backend."""
    rows = rows_of(path)
    for row in rows:
        row.update(fields if row["backend"] == backend else {})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, records.FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def test_it_prints_tables_and_appends_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", *CASE[:3], "--rounds", "2", "--threads", "1", "--csv", str(tmp_path / "new")]
    assert main([*arguments, "--only", "moments_ bf16"]) == 0
    out, err = capfd.readouterr()
    labels = [line for line in err.splitlines() if "moments_ bf16" in line]
    assert labels == [
        *(f"channel_moments_ bf16 2048x48 {setting}" for setting in ("one group", "sequences")),
        *(f"gated_moments_ bf16 2048x48 {setting}" for setting in ("silu", "gelu_tanh")),
    ]
    for word in (
        "flap_torch",
        "stream_copy",
        "Targets",
        "cpp / flap_torch",
        "Not measured: liger_swiglu: liger_kernel",
    ):
        assert word in out
    rows = rows_of(tmp_path / "new" / "moments.csv")
    assert {row["rounds"] for row in rows} == {"2"} and {row["threads"] for row in rows} == {"1"}
    assert main([*arguments, "--only", "column_norms"]) == 0
    more = rows_of(tmp_path / "new" / "moments.csv")
    assert more[: len(rows)] == rows and {row["op"] for row in more[len(rows) :]} == {"column_norms"}


def test_all_ops_go_to_one_file_or_to_one_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shapes", "tiny", "--dtype", "fp32", "--rounds", "1", "--json", "--csv"]
    assert main([*arguments, str(tmp_path / "all.csv")]) == 0
    document = json.loads(capfd.readouterr().out)
    assert len(document["rows"]) == len(rows_of(tmp_path / "all.csv"))
    measured = {row["op"] for row in document["rows"]}
    assert measured >= {"channel_moments_", "masked_adamw_", "MaskedAdamW", "perturb_", "score", "train", "stream"}
    assert main([*arguments, str(tmp_path), "--only", "masked_adamw_"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"all.csv", "adamw.csv"}


def test_json_is_the_only_thing_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *CASE, "--rounds", "1", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert set(document) == {"machine", "rows", "targets", "absent"}
    assert {row["backend"] for row in document["rows"]} == {"cpp", "square_sum", "stream_read", "stream_copy"}
    assert document["machine"]["torch"] == torch.__version__
    assert (
        main(["bench", "moments", "--shapes", "2048x48", "--only", "bf16 2048x48 silu", "--rounds", "1", "--json"]) == 0
    )
    document = json.loads(capfd.readouterr().out)
    assert {target["against"] for target in document["targets"]} == {"act_mul"}
    assert isinstance(document["targets"][0]["measured"], float)
    assert "liger_kernel" in document["absent"][0]["absent"]["liger_swiglu"]


def compared(older: Path, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    code = main(["bench", *CASE, "--rounds", "3", "--compare", str(older), *more])
    return code, *capfd.readouterr()


def test_a_regression_gives_exit_code_3(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    older = tmp_path / "moments.csv"
    assert main(["bench", *CASE, "--rounds", "3", "--csv", str(older)]) == 0
    change_row(older, "cpp", median="1e6", p20="1e6", p80="1e6")
    code, out, _ = compared(tmp_path, capfd)  # the folder
    assert code == 0 and "0 of 2 rows became slower" in out
    change_row(older, "cpp", median="1e-6", p20="1e-6", p80="1e-6")
    change_row(older, "stream_read", median="1e6")  # no slower machine
    code, out, _ = compared(older, capfd)
    assert code == 3 and "2 of 2 rows became slower" in out
    code, out, _ = compared(older, capfd, "--json")
    changes = json.loads(out)["changes"]
    assert code == 3 and [change["slower"] for change in changes] == [True, True]
    change_row(older, "cpp", threads="999")
    code, out, _ = compared(older, capfd)
    assert code == 0 and f"Nothing to compare: {older}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype int8 is unknown"),
        (["--shapes", "8b"], "--shapes 8b is unknown"),
        (["--only", "nothing"], "no case matches (--only 'nothing'); labels are column_norms"),
        (["--dtype", "fp32"], "it has none of these dtypes and shapes"),
        (["--compare", "gone.csv"], "gone.csv cannot be read"),
        (["--csv", "other.csv"], "other.csv has the columns a,b"),
        (["--csv", "other.csv/folder"], "other.csv"),
        (["--plot", "no/such/folder.html"], "the folder"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picture, "require", lambda: None)
    monkeypatch.setattr(moments, "CASES", [case for case in moments.CASES if case[0] == "column_norms"])
    monkeypatch.setattr("ssah_fast.bench.harness.measure", lambda *args: pytest.fail("measured"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["bench", "moments", *arguments]) == SsahError.exit_code
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_a_picture_needs_plotly(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    assert main(["bench", *CASE, "--plot", "x.html"]) == SsahError.exit_code
    out, err = capfd.readouterr()
    assert out == "" and "pip install 'ssah_fast[report]'" in err and err.count("\n") == 1


def test_a_picture_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    monkeypatch.setattr(picture, "require", lambda: None)
    monkeypatch.setattr(picture, "draw", lambda *args: drawn.append(args))
    assert main(["bench", *CASE, "--rounds", "1", "--plot", str(tmp_path / "roof.html")]) == 0
    ((rows, rates, _, path),) = drawn
    assert path == tmp_path / "roof.html" and set(rates) == {"bf16", "fp32"} and rows
    assert f"wrote {path}" in capfd.readouterr().err


def test_what_is_compiled() -> None:
    assert bench.why_not_compiled(None, gpu=True) == bench.why_not_compiled(True, gpu=False) == ""
    assert "--compile" in bench.why_not_compiled(None, gpu=False)
    assert bench.why_not_compiled(False, gpu=True) == "off"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from ssah_fast.cli.main import main; main(['bench', '--help']); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and "--compare" in done.stdout, done.stderr
    assert set(bench.OPS) == OPS
