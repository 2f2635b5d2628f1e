"""bench/device.sh with everything that it starts replaced: which steps run, and what a failure does."""

import subprocess
from pathlib import Path

import every_gpu_op
import pytest
from backends import targets, use

from ssah_fast.kernels import reference

SCRIPT = Path(__file__).parents[1] / "bench" / "device.sh"


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A function that runs the script; `fakes` are bodies of programs that it starts, by name."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("VENV", str(folder.parent))
    monkeypatch.delenv("OUT", raising=False)

    def run(*arguments: str, script: Path = SCRIPT, **fakes: str) -> subprocess.CompletedProcess[str]:
        programs = {"nvidia-smi": "echo 9.0", "compute-sanitizer": "", "ssah-fast": "", "python3": "", "python": ""}
        for name, body in (programs | fakes).items():
            program = folder / name.replace("_", "-")
            program.write_text(f'#!/bin/sh\necho "{name} $*"\n{body}\n')
            program.chmod(0o755)
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    return run


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    lines = done.stdout.split("== summary\n")[1].splitlines()
    return {line.split()[0]: line[10:23].strip() for line in lines}


def test_all_steps(device, tmp_path):
    done = device("results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(done) == dict.fromkeys(("build", "test", "sanitize", "bench"), "ok")
    assert "python -m pip install --no-index --no-build-isolation --no-deps --editable ." in done.stdout
    assert "pytest tests -q -m gpu" in done.stdout
    for tool in ("memcheck", "racecheck"):
        assert f"compute-sanitizer --tool {tool} " in done.stdout
    for op in ("moments", "adamw", "perturb", "score", "train"):
        assert f"ssah-fast bench {op} --csv " in done.stdout
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == ["device.log", "env.json"]


def test_chosen_steps_and_out(device, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "here"))
    assert summary(device("bench", "test")) == {"bench": "ok", "test": "ok"}
    assert (tmp_path / "here" / "device.log").is_file()


def test_a_failure_does_not_stop_the_rest(device):
    done = device("results", compute_sanitizer='[ "$2" != memcheck ]', python="exit 1")
    assert summary(done) == {"build": "failed (1)", "test": "failed (1)", "sanitize": "failed (1)", "bench": "ok"}
    assert done.returncode == 3
    assert "--tool racecheck" in done.stdout


def test_a_step_that_hangs_runs_out_of_time(device, tmp_path):
    text = SCRIPT.read_text(encoding="utf-8")
    assert "[test]=150" in text
    script = tmp_path / "bench" / "device.sh"
    script.parent.mkdir()
    script.write_text(text.replace("[test]=150", "[test]=1"), encoding="utf-8")
    done = device("results", "test", "bench", script=script, python="exec sleep 50")
    assert summary(done) == {"test": "out of time", "bench": "ok"}
    assert done.returncode == 1


def test_what_is_missing_is_said(device, monkeypatch):
    done = device()
    assert done.returncode == 64
    assert done.stderr == "device.sh: give a folder for the results, or set OUT\n"
    monkeypatch.setenv("PYTHON", "python9")
    done = device("results")
    assert done.returncode == 69
    assert done.stderr == "device.sh: PYTHON=python9 was not found\n"


@pytest.mark.parametrize("target", list(targets("masked_adamw_", reference=False)))
def test_what_the_sanitizer_runs(target, monkeypatch):
    """The driver knows every op; where there is no GPU, emulated CUDA runs it (interpreted, it takes a minute)."""
    assert every_gpu_op.CALLS.keys() == reference.OPS.keys()
    backend, device = target
    if backend not in every_gpu_op.BACKENDS or target == ("triton", "cpu"):
        pytest.skip("not a GPU backend, or slow")
    use(target, monkeypatch)
    assert "masked_adamw_" in every_gpu_op.run_all(backend, device)
