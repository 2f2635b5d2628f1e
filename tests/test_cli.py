"""The command line: lazy imports, one-line errors with exit codes, config files, identify and inspect."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from ssah_fast.cli import main as cli_main
from ssah_fast.cli.common import Command, OrNone, Ratio, list_option
from ssah_fast.cli.main import COMMANDS, main
from ssah_fast.errors import NonFiniteError, OutOfMemoryError, RunError, SsahError
from ssah_fast.partition import Category, Units
from ssah_fast.scores import ModuleScores, Scores
from ssah_fast.units import Slice, UnitModule

HEAVY = ("torch", "numpy", "triton", "transformers", "datasets", "rich", "yaml", "safetensors")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssah_fast.cli.main", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def make_scores() -> Scores:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for layer in range(3):
        name, units = f"model.layers.{layer}.mlp", 50
        weight = Slice(f"{name}.down_proj.weight", 1, 8)
        layout = UnitModule(name, "mlp", layer, units, f"{name}.down_proj", weight, (weight,))
        m2 = torch.rand(2, 2, units, generator=generator, dtype=torch.float64)
        count, norm = torch.full((2, 2), 300), torch.ones(units, dtype=torch.float64)
        modules[name] = ModuleScores.from_moments(layout, count, torch.zeros_like(m2), m2, norm, "variance")
    provenance = {"model": {"id": "tiny"}, "data": {"safety": {"source": "[b]s.jsonl[/b]"}}, "tokens": "response"}
    return Scores(modules, provenance, "variance")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_scores().save(tmp_path / "scores.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


# start-up


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from ssah_fast.cli.main import main; code = main(['--help']); "
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "LOADED [] 0" in done.stdout, done.stdout + done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_no_torch(name, tmp_path):
    code = (
        f"import sys; from ssah_fast.cli.main import main; code = main([{name!r}, '--help']); "
        "print('LOADED', [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "LOADED [] 0" in done.stdout, done.stdout + done.stderr
    assert "--config" in done.stdout


def test_help_takes_less_than_a_third_of_a_second(tmp_path):
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help", cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # Processor time, so that a busy machine does not fail the test.
    assert min(seconds() for _ in range(3)) < 0.3


def test_version(capsys):
    assert main(["-v"]) == 0
    assert re.fullmatch(r"ssah-fast, version \d+\.\d+\.\d+\n", capsys.readouterr().out)


# errors and exit codes


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.startswith("ssah-fast: error: ")
    return text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["identify", "none", "-o", "u"], "cannot read none: it does not exist"),
        (["identify", "scores.safetensors", "-o", "none/u"], "create it first"),
        (["identify", "scores.safetensors", "-o", "./scores.safetensors"], "would overwrite the scores"),
        (["identify", "scores.safetensors", "-o", "u", "--scu", "90%", "--ucu", "0.2"], "sum to 1.248"),
        (["identify", "scores.safetensors", "-o", "u", "--scu", "nan"], "scu=nan is not a ratio"),
        (["identify", "scores.safetensors", "-o", "u", "--scu", "-1%"], "scu=-0.01 is not a ratio"),
        (["identify", "scores.safetensors", "-o", "u", "--contrast", "ratio", "--normalize", "zscore"], "negative"),
        (["inspect", "cut"], "truncated or not a safetensors file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, folder, capsys):
    (folder / "cut").write_bytes((folder / "scores.safetensors").read_bytes()[:200])
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in one_line(captured.err)
    assert captured.out == ""
    assert not (folder / "u").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["identify"], "Missing argument 'SCORES'"),
        (["identify", "scores.safetensors"], "Missing option '-o'"),
        (["identify", "scores.safetensors", "-o", "u", "--scu", "x"], "'x' is not a number or a percentage"),
        (["identify", "scores.safetensors", "-o", "u", "--wrong", "1"], "No such option"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments, message, folder, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SsahError("two\nlines"), 2, "error: two lines\n"),
        (NonFiniteError("x"), 2, "error: x\n"),
        (RunError("x"), 1, "error: x\n"),
        (OutOfMemoryError("use --batch-size"), 5, "error: use --batch-size\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 5, "smaller --batch-size"),
        (MemoryError(), 5, "smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5, "smaller --batch-size"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no space left on the disk"),
        (KeyError("odd"), 1, "internal error: KeyError: 'odd' (set SSAH_FAST_LOG_LEVEL=debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
    ],
)
def test_errors_inside_a_command(error, code, message, monkeypatch, capsys):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: click.Command("fail", callback=fail))
    assert main(["fail"]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    if code in (1, 5):
        monkeypatch.setenv("SSAH_FAST_LOG_LEVEL", "debug")
        assert main(["fail"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_exit_codes_of_the_process(folder):
    assert run("--version", cwd=folder).returncode == 0
    done = run("identify", "scores.safetensors", "-o", "u", "--scu", "2", cwd=folder)
    assert done.returncode == 2
    assert "scu=2.0 is not a ratio" in one_line(done.stderr)
    assert done.stdout == ""


def test_ctrl_c_is_130(tmp_path):
    code = (
        "import os, signal, sys, click; from ssah_fast.cli import main as m\n"
        "stop = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "m.LazyGroup.get_command = lambda *_: click.Command('x', callback=stop)\n"
        "sys.exit(m.main(['x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(folder):
    pipe = f"{sys.executable} -m ssah_fast.cli.main inspect scores.safetensors --json | head -c 1"
    done = subprocess.run(["bash", "-c", pipe], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")


# options shared by all commands


@click.command(cls=Command)
@click.argument("model")
@click.option("--nsamples", type=OrNone(click.INT), default=128)
@click.option("--revision")
@click.option("--learning-rate", type=float, default=0.5)
@click.option("--ratio", type=Ratio(), default=0.1)
@click.option("--chat-template/--no-chat-template", default=True)
@list_option("--safety-data")
def sample(**options) -> None:
    """A command with every kind of option."""
    click.echo(json.dumps(options))


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda *_: sample)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, code: int = 0) -> str:
        assert main(["sample", *arguments]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return invoke


def test_underscores_commas_repeats_and_none(call):
    options = json.loads(
        call("m", "--learning_rate", "2", "--safety_data", "a,b", "--safety-data", "c", "--nsamples=none")
    )
    assert options == {
        "model": "m",
        "nsamples": None,
        "revision": None,
        "learning_rate": 2.0,
        "ratio": 0.1,
        "chat_template": True,
        "safety_data": ["a", "b", "c"],
    }
    assert json.loads(call("m", "--nsamples", "NULL"))["nsamples"] is None


@pytest.mark.parametrize(("text", "value"), [("1.3%", 0.013), ("0.013", 0.013), ("100 %", 1.0), ("1e-1%", 0.001)])
def test_ratios(text, value, call):
    assert json.loads(call("m", "--ratio", text))["ratio"] == value


YAML = """
model: tiny
nsamples: null
revision: null
learning_rate: 0.25
ratio: 5%
chat-template: false
safety-data: [a, b]
"""
TOML = """
model = "tiny"
nsamples = "none"
learning-rate = 0.25
ratio = "5%"
chat_template = false
safety_data = "a,b"
"""


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.toml", TOML)])
def test_config_files_and_flags_that_override_them(name, text, call):
    Path(name).write_text(text)
    expected = {
        "model": "tiny",
        "nsamples": None,
        "revision": None,
        "learning_rate": 0.25,
        "ratio": 0.05,
        "chat_template": False,
        "safety_data": ["a", "b"],
    }
    assert json.loads(call("--config", name)) == expected
    flags = ["other", "--nsamples", "3", "--chat-template", "--safety-data", "c", "--config", name]
    changes = {"model": "other", "nsamples": 3, "chat_template": True, "safety_data": ["c"]}
    assert json.loads(call(*flags)) == {**expected, **changes}


def test_a_dumped_config_reads_back(call):
    Path("c.yaml").write_text(YAML)
    dumped = call("--config", "c.yaml", "--dump-config", "--ratio", "7%")
    Path("d.yaml").write_text(dumped)
    assert json.loads(call("--config", "d.yaml")) == json.loads(call("--config", "c.yaml", "--ratio", "7%"))
    assert "chat-template: false" in dumped


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "lerning-rate: 1", "unknown option 'lerning-rate'"),
        ("c.yaml", "config: x", "unknown option 'config'"),
        ("c.yaml", "a: [", "not valid YAML"),
        ("c.yaml", "- a", "one mapping"),
        ("c.yaml", "1: 2", "one mapping"),
        ("c.toml", "a = ", "not valid TOML"),
        ("c.yaml", "learning-rate: [1, 2]", "learning-rate takes one value"),
        ("c.yaml", "ratio: {a: 1}", "not nested"),
        ("c.json", "{}", "must end in .yaml, .yml or .toml"),
        ("c.yaml", None, "No such file"),
    ],
)
def test_a_bad_config_is_one_line(name, text, message, call):
    if text is not None:
        Path(name).write_text(text)
    assert message in one_line(call("m", "--config", name, code=2))


def test_a_bad_value_in_a_config_is_named(call):
    Path("c.yaml").write_text("learning-rate: fast")
    assert "Invalid value for '--learning-rate'" in call("m", "--config", "c.yaml", code=2)


# identify and inspect


def test_identify_writes_units_and_prints_a_table(folder, capsys):
    assert main(["identify", "scores.safetensors", "-o", "u.safetensors", "--scu", "10%", "--ucu", "0.2"]) == 0
    captured = capsys.readouterr()
    units = Units.load("u.safetensors")
    assert [units.count(name) for name in ("scu", "ucu", "ru")] == [15, 30, 22]
    assert re.search(r"SCU\W+15\W+10\.00%\W+120\W+10\.00%", captured.out)
    assert "UNOBSERVED" not in captured.out
    assert captured.err == "wrote u.safetensors\n"


def test_identify_json_is_all_of_stdout(folder, capsys):
    arguments = ["identify", "scores.safetensors", "-o", "u.safetensors", "--json", "--basis", "parameters"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == "u.safetensors"
    assert document["settings"]["basis"] == "parameters"
    assert document["units"] == 150
    assert set(document["categories"]) == {"scu", "ucu", "cu", "ru", "unobserved"}
    row = document["categories"]["ucu"]
    assert set(row) == {"units", "units_fraction", "parameters", "parameters_fraction", "jaccard", "chance", "overlap"}
    assert 0 <= row["jaccard"] <= 1
    assert 0 < document["agreement"] <= 1


def test_identify_without_a_second_half_says_so(folder, capsys):
    scores = make_scores()
    for module in scores.modules.values():
        module.count[0, 1] = 0
    scores.save("one.safetensors")
    assert main(["identify", "one.safetensors", "-o", "u.safetensors"]) == 0
    assert "not known: half 1 of the safety set has no tokens" in capsys.readouterr().out


def test_inspect_scores(folder, capsys):
    assert main(["inspect", "scores.safetensors"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"model\.id +tiny", out)
    assert "[b]s.jsonl[/b]" in out
    assert re.search(r"2 │ mlp +│ model\.layers\.2\.mlp │ +50 │ +600 │ +600 │", out)
    assert main(["inspect", "scores.safetensors", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    module, importance = document["modules"][1], make_scores().modules["model.layers.1.mlp"].importance
    assert (document["kind"], document["estimator"], module["safety"]["tokens"]) == ("scores", "variance", 600)
    assert module["utility"]["mean"] == pytest.approx(float(importance[1].mean()))
    assert module["safety"]["concentration"] == pytest.approx(float(importance[0].max() / importance[0].sum()))


def test_inspect_units(folder, capsys):
    assert main(["identify", "scores.safetensors", "-o", "u.safetensors"]) == 0
    capsys.readouterr()
    assert main(["inspect", "u.safetensors"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"settings\.normalize +share", out)
    assert re.search(r"2 │ mlp +│ model\.layers\.2\.mlp │", out)
    assert main(["inspect", "u.safetensors", "--json"]) == 0
    document, units = json.loads(capsys.readouterr().out), Units.load("u.safetensors")
    assert document["provenance"]["scores"]["model"] == {"id": "tiny"}
    for row in document["modules"]:
        for category in Category:
            assert row[category.name.lower()] == int((units.category[row["module"]] == category).sum())


def test_inspect_shows_damage_without_failing(folder, capsys):
    scores = make_scores()
    scores.modules["model.layers.0.mlp"].importance[0, 3] = float("nan")
    scores.modules["model.layers.1.mlp"].importance[:] = 0
    scores.save("nan.safetensors")
    assert main(["inspect", "nan.safetensors"]) == 0
    assert main(["inspect", "nan.safetensors", "--json"]) == 0
    assert main(["identify", "nan.safetensors", "-o", "u"]) == 2
    assert "safety importance of unit 3 of model.layers.0.mlp is nan" in capsys.readouterr().err
