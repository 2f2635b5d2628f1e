"""Runs that end before their time: by kills, signals and dead processes; the same command ends with the same bits.

Most runs are children forked from here, because a new interpreter takes seconds to import torch.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ssah_fast.cli import score as cli_score
from ssah_fast.cli.main import main
from ssah_fast.scores import Scores

LAYERS, BATCHES = 4, 8
STEPS = LAYERS * BATCHES
OUT = "out.safetensors"
COMMAND = [
    *("score", "model", "--safety-data", "s.jsonl", "--utility-data", "u.jsonl", "-o", OUT),
    *("--device", "cpu", "--stream", "always", "--batch-size", "2", "--save-every", "0"),
]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A model, another one of the same shape, and 16 sequences of different lengths."""
    folder = tmp_path_factory.mktemp("resume")
    for name, seed in (("model", 0), ("other", 1)):
        tiny_model("llama", seed=seed, num_hidden_layers=LAYERS).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    for name, first in (("s", 1), ("u", 40)):
        pairs = [{"prompt": f"w{i}", "response": " ".join(f"w{first + i + j}" for j in range(2 + i))} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def folder(master, tmp_path, monkeypatch):
    copy = shutil.copytree(master, tmp_path / "here")
    monkeypatch.chdir(copy)
    for name, value in {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return copy


def start(step: Callable[[int], None], *more: str, rank: int = 0, world: int = 1, port: int = 0) -> int:
    """Fork a process that runs the command and calls `step` with 1, 2, ... after every (layer, batch).

    What it prints is in the file "said.RANK".
    """
    child = os.fork()
    if child:
        return child
    status = 77
    try:
        signal.alarm(120)  # processes that wait for each other would wait for days
        torch.set_num_threads(1)
        if world > 1:
            values = (rank, world, rank, world, "127.0.0.1", port)
            os.environ.update({name: str(value) for name, value in zip(TORCHRUN, values, strict=True)})
        steps = iter(range(1, STEPS + 1))
        callback = contextlib.nullcontext(lambda done, total: step(next(steps)))
        cli_score._progress = lambda: callback
        with open(f"said.{rank}", "w") as said, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = main([*COMMAND, *more])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(step: Callable[[int], None] = lambda number: None, *more: str) -> int:
    return status_of(start(step, *more))


def run_both() -> list[int]:
    """As torchrun with two processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [start(lambda number: None, rank=rank, world=2, port=port) for rank in range(2)]
    return [status_of(child) for child in children]


def said(rank: int = 0) -> str:
    return Path(f"said.{rank}").read_text()


def result() -> bytes:
    """The scores file; and nothing else may be left of the run."""
    assert not Path(f"{OUT}.progress").exists()
    return Path(OUT).read_bytes()


@pytest.fixture(scope="module")
def whole(master, tmp_path_factory):
    """The scores of a run that nothing interrupts, and its seconds from the first step to the end."""
    before, times = os.getcwd(), tmp_path_factory.mktemp("times") / "times"
    os.chdir(master)
    try:
        with times.open("ab", buffering=0) as file:
            assert run(lambda number: file.write(f"{time.monotonic()}\n".encode()) and None) == 0, said()
        moments = [float(line) for line in times.read_text().split()]
        assert len(moments) == STEPS
        scores = result()
        Path(OUT).unlink()
    finally:
        os.chdir(before)
    return scores, moments[-1] - moments[0]


def test_ten_sigkills(folder, whole):
    """The process ends itself from a thread at a random moment, which may be inside a step, a save or the end."""
    scores, seconds = whole
    rng, kills = random.Random(0), 0

    def dying(last: int, delay: float) -> Callable[[int], None]:
        def step(number: int) -> None:
            if number == last:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

        return step

    while kills < 10 and run(dying(rng.randint(1, 3), rng.uniform(0, seconds / STEPS))) == -signal.SIGKILL:
        kills += 1
        assert not Path(OUT).exists() or Path(OUT).read_bytes() == scores
    assert run() == 0, said()
    assert kills >= 5 and result() == scores


@pytest.mark.parametrize(
    "number, status, message",
    [(signal.SIGINT, 130, "stopped by SIGINT"), (signal.SIGTERM, 143, "error: stopped by SIGTERM")],
    ids=["ctrl-c", "sigterm"],
)
@pytest.mark.parametrize("mode", ["streamed", "in memory"])
def test_a_signal_saves_and_the_same_command_continues(folder, whole, number, status, message, mode):
    more = ("--save-every", "1000", *(("--stream", "never") if mode == "in memory" else ()))
    last = BATCHES if mode == "in memory" else STEPS
    stop_at = last // 2 + 1
    assert run(lambda step: os.kill(os.getpid(), number) if step == stop_at else None, *more) == status
    assert said().splitlines()[-1] == (
        f"ssah-fast: {message}; the progress is in {OUT}.progress, and the same command continues from there"
    )
    assert not Path(OUT).exists()
    seen = Path("steps")
    assert run(lambda step: seen.write_text(str(step)) and None, *more) == 0, said()
    assert int(seen.read_text()) == last - stop_at
    if mode == "streamed":
        assert result() == whole[0]


@pytest.fixture
def killed(folder):
    """A run that was killed in its third layer."""
    assert run(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 2 * BATCHES + 3 else None) == -9


def other_model():
    shutil.rmtree("model")
    os.rename("other", "model")


def other_data():
    Path("s.jsonl").write_text(Path("s.jsonl").read_text().replace("w5", "w6"))


@pytest.mark.parametrize(
    "change, more, difference",
    [
        (other_model, (), "model."),
        (other_data, (), "data"),
        (None, ("--seqlen", "256"), "settings.seqlen is 512 in the saved run and 256 now"),
        (None, ("--dtype", "fp64"), 'dtype is "auto" in the saved run and "fp64" now'),
    ],
    ids=["model", "data", "seqlen", "dtype"],
)
def test_another_run_is_refused_until_fresh(killed, capsys, change, more, difference):
    if change:
        change()
    assert main([*COMMAND, *more]) == 4
    error = capsys.readouterr().err
    assert error.startswith(f"ssah-fast: error: cannot continue from {OUT}.progress: {difference}"), error
    assert error.count("\n") == 1 and "--fresh" in error and not Path(OUT).exists()


def test_fresh_starts_over(killed, folder, whole):
    seen = Path("steps")
    assert run(lambda step: seen.write_text(str(step)) and None, "--fresh") == 0
    assert int(seen.read_text()) == STEPS and result() == whole[0]


def test_damaged_progress_is_one_line(killed, capsys):
    state = Path(f"{OUT}.progress", "rank-0-of-1", "state")
    state.write_bytes(state.read_bytes()[:-100])
    assert main(COMMAND) == 1
    assert "is damaged; add --fresh to start over" in capsys.readouterr().err


def assert_close(a: Scores, b: Scores) -> None:
    assert a.modules.keys() == b.modules.keys()
    for name, module in a.modules.items():
        for key in ("count", "mean", "m2", "norm", "importance"):
            value, expected = getattr(module, key), getattr(b.modules[name], key)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_two_processes_equal_one_and_repeat(folder, whole):
    results = []
    for _ in range(2):
        assert run_both() == [0, 0], said(0) + said(1)
        results.append(result())
        os.rename(OUT, "two.safetensors")
    assert results[0] == results[1]
    Path(OUT).write_bytes(whole[0])
    assert_close(Scores.load("two.safetensors"), Scores.load(OUT))


SCRIPT = """
import contextlib, os, signal, sys, time
from ssah_fast.cli import score
from ssah_fast.cli.main import main
steps = iter(range(99))
def step(done, total):
    if os.environ["RANK"] == "1" and next(steps) == 9:
        while not os.path.exists("out.safetensors.progress/rank-0-of-2/state"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
score._progress = lambda: contextlib.nullcontext(step)
sys.exit(main(sys.argv[1:]))
"""


def test_torchrun_with_a_killed_process(folder, whole):
    """It ends with an error, all progress is there, and two other processes end the run with the bits of two."""
    Path("script.py").write_text(SCRIPT)
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", "--standalone", "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*map(str, command), *COMMAND], env=environment, text=True, stderr=subprocess.PIPE)
    try:
        _, error = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        process.terminate()  # upon which torchrun ends its processes
        process.communicate()
        raise
    lines = [line for line in error.splitlines() if line.startswith("ssah-fast:")]
    assert process.returncode == 1 and len(lines) == 1, error
    assert "the same command continues" in lines[0]
    assert not Path(OUT).exists() and len(list(Path(f"{OUT}.progress").glob("rank-*-of-2/state"))) == 2
    assert run_both() == [0, 0], said(0) + said(1)
    os.rename(OUT, "resumed.safetensors")
    assert run_both() == [0, 0], said(0) + said(1)
    assert result() == Path("resumed.safetensors").read_bytes()
