"""The benchmarks: rounds, medians, ratios, clocks, CSV rows, comparisons and the cases. No time is ever asserted."""

import contextlib
import csv
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ssah_fast import ops
from ssah_fast.bench import (
    adamw,
    clock,
    harness,
    make_checkpoint,
    models,
    moments,
    perturb,
    picture,
    records,
    score,
    stream,
    train,
)
from ssah_fast.bench.harness import COPY, PRODUCT, READ, Alternative, Case, Offer, Request, Row, Target
from ssah_fast.errors import SsahError
from ssah_fast.kernels import registry

CPU = torch.device("cpu")
HERE = {"threads": 2, "device": "a CPU", "driver": "d", "python": "3", "torch": "t", "triton": "", "transformers": ""}
HERE |= {"ssah_fast": "0", "git": "abc", "time": "2026-01-01T00:00:00+00:00"}


class OnGpu(Request):
    """A request that takes the ways of a GPU with tensors of the CPU."""

    gpu = True


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(clock, "PRODUCT", {"cpu": 16, "cuda": 16})


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def case(*names: str, alternatives: tuple[Alternative, ...] = (), **fields: Any) -> Case:
    made = [*(Alternative(name, lambda i: None) for name in names), *alternatives]
    return Case(
        **{"op": "op", "dtype": "fp32", "shape": (2, 3), "setting": "s", "bytes": 1000, **fields}, alternatives=made
    )


def peak(name: str, **work: float) -> Alternative:
    return Alternative(name, lambda i: None, **work)


def row(**fields: Any) -> Row:
    usual = {"op": "op", "backend": "cpp", "dtype": "fp32", "shape": "2x3", "setting": "s", "unit": "ms"}
    usual |= {"median": 10.0, "p20": 9.0, "p80": 11.0, "rounds": 5, "ours": True}
    return Row(**{**usual, **fields})


# ---- rounds and their summary


def test_rounds_run_every_alternative_in_turn() -> None:
    calls: list[tuple[str, int]] = []
    alternatives = [
        Alternative("a", lambda i: calls.append(("a", i)), lambda i: calls.append(("restore a", i))),
        Alternative("b", lambda i: calls.append(("b", i))),
    ]
    ticks = iter(range(100))

    def timer(call: Callable[[], object]) -> float:
        call()
        return float(next(ticks))

    seconds = harness.run_rounds(alternatives, 2, warmup=1, timer=timer)
    assert calls == [
        *(("a", 0), ("restore a", 0), ("b", 0)),
        *(("b", 1), ("a", 1), ("restore a", 1)),
        *(("a", 2), ("restore a", 2), ("b", 2)),
    ]
    assert seconds["a"].tolist() == [3, 4]
    assert seconds["b"].tolist() == [2, 5]  # the warm-up's 0 and 1 are gone


def test_rounds_end_with_the_budget_but_not_before_there_are_enough() -> None:
    seconds = harness.run_rounds([peak("a")], 50, warmup=1, timer=lambda call: 0.0, budget=0.0)
    assert len(seconds["a"]) == harness.LEAST_ROUNDS


def test_summary_takes_medians_of_times_and_of_ratios_within_rounds() -> None:
    seconds = {
        "ours": np.array([1.0, 2.0, 9.0]),
        "theirs": np.array([2.0, 20.0, 10.0]),  # ratios 0.5, 0.1, 0.9: their median is not the ratio of the medians
        READ: np.array([4.0, 1.0, 9.0]),
        COPY: np.array([1.0, 2.0, 9.0]),
    }
    about = case("ours", "theirs", alternatives=(peak(READ, bytes=4000), peak(COPY, bytes=2000)))
    ours, theirs, read, copy = harness.summarise(about, seconds)
    assert (ours.backend, ours.median, ours.unit, ours.rounds, ours.shape) == ("ours", 2000, "ms", 3, "2x3")
    assert (ours.p20, ours.p80) == pytest.approx(tuple(np.percentile([1000, 2000, 9000], (20, 80))))
    assert ours.ratios == pytest.approx({"theirs": 0.5, COPY: 2.0})  # in its time, copying moves twice the bytes
    assert theirs.ratios["ours"] == pytest.approx(2.0)
    assert ours.gb_per_s == pytest.approx(1000 / 2 / 1e9)
    # Rounds: 1000 B/s against 1000, 500 against 4000, 111 against 444.
    assert ours.percent_of_read == pytest.approx(25)
    assert ours.percent_of(READ) == pytest.approx(25) and ours.percent_of(COPY) == pytest.approx(50)
    assert (read.percent_of_read, read.bytes, read.ratios) == (pytest.approx(100), 4000, {})
    assert (copy.bytes, copy.ratios) == (2000, {})


def test_an_alternative_may_have_less_to_move() -> None:
    half = Alternative("half", lambda i: None, bytes=500)
    about = case("ours", alternatives=(half, peak(READ, bytes=1000)))
    ours, half_row, _ = harness.summarise(about, {name: np.array([1.0]) for name in ("ours", "half", READ)})
    assert (ours.bytes, half_row.bytes) == (1000, 500)
    assert (ours.percent_of_read, half_row.percent_of_read) == (100, 50)


def test_summary_without_bytes_has_no_bandwidth() -> None:
    values = {"ours": np.array([3.0]), "theirs": np.array([0.0])}
    ours, theirs = harness.summarise(case("ours", "theirs", bytes=None), values, unit="MiB", scale=1.0)
    assert (ours.median, ours.unit, ours.gb_per_s, ours.percent_of_read) == (3, "MiB", None, None)
    assert (ours.ratios, theirs.ratios) == ({}, {"ours": 0})  # nothing is divided by zero


def test_a_case_is_measured_beside_the_machine() -> None:
    watch = clock.make_clock(CPU)
    extra = harness.Extra("part", {"ours": np.array([1.0, 2.0])})
    about = case("ours", flops=8e3, products=True, absent={"x": "why"}, extras=lambda: [extra])
    (main, rows), (rate, rates), (part, parts) = harness.measure(about, watch, rounds=2)
    assert [r.backend for r in rows] == ["ours", READ, COPY, PRODUCT]
    assert (rows[1].bytes, rows[2].bytes, rows[3].flops) == (watch.read_bytes, watch.copy_bytes, 2 * 16**3)
    assert set(rows[0].ratios) == {COPY, PRODUCT} and rows[0].rounds == 2
    assert main.absent == {"x": "why"} and part.absent == {}
    assert (rate.setting, {r.unit for r in rates}) == ("s, rate", {"TFLOP/s"})
    assert [r.backend for r in rates] == ["ours", PRODUCT]
    assert (part.setting, parts[0].median, parts[0].gb_per_s) == ("part", 1500, None)


@pytest.mark.parametrize(
    ("bound", "against", "measured", "met"),
    [
        (0.5, "theirs", 0.4, True),
        (0.3, "theirs", 0.4, False),
        (75, READ, 80, True),
        (85, READ, 80, False),
        (45, COPY, 50, True),
        (2, None, 1, True),
        (0.5, None, 1, False),
    ],
)
def test_targets(bound: float, against: str | None, measured: float, met: bool) -> None:
    ours = row(median=1.0, percent_of_read=80, ratios={"theirs": 0.4, COPY: 2.0})
    assert harness.reached([ours], Target("cpp", bound, against)) == (measured, met)


def test_a_target_may_have_no_value() -> None:
    for target in (Target("gone", 1), Target("cpp", 1, "gone"), Target("cpp", 1, COPY), Target("cpp", 1, READ)):
        assert harness.reached([row()], target) is None


# ---- requests and alternatives


def test_shapes_by_name_and_by_size() -> None:
    table = {"cpu": (1, 2), "llama-3-8b": (3, 4)}
    assert Request(CPU).pick(table, 2) == [(1, 2)]
    assert Request(torch.device("cuda")).pick(table, 2) == [(3, 4)]
    assert Request(CPU, ("512x4096", "2x3x4", "qwen3-32b", "cpu")).pick(table, 2) == [(512, 4096), (1, 2)]
    assert Request(CPU, ("512x4096",)).pick(table, 0) == []
    for wrong in ("8b", "512", "0x3", "3x", "-1x2"):
        with pytest.raises(SsahError, match="--shapes"):
            harness.sizes_of(wrong)


def test_backends_are_those_made_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    assert harness.backends("column_norms", CPU) == ["cpp"]
    assert harness.missing_backends("column_norms", CPU) == {}
    monkeypatch.setenv(registry.VARIABLE, "torch")
    assert harness.backends("column_norms", CPU) == ["torch"]
    monkeypatch.setenv(registry.VARIABLE, "nonsense")
    with pytest.raises(SsahError, match="nonsense"):
        harness.backends("column_norms", CPU)


def test_all_backends_of_a_gpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    loaded = {"cuda": registry.Loaded({}, (), "it is not built"), "triton": registry.Loaded({"op": print}, (), None)}
    monkeypatch.setattr(registry, "load", lambda backend: loaded.get(backend.name, registry.Loaded({}, (), "gone")))
    gpu = torch.device("cuda")
    assert harness.backends("op", gpu) == ["triton"]
    assert harness.missing_backends("op", gpu) == {"cuda": "it is not built"}
    assert harness.backends("other", gpu) == ["torch"]
    assert harness.missing_backends("other", gpu) == {"cuda": "it is not built", "triton": "it has no other"}


@pytest.mark.parametrize("before", [None, "cpp"])
def test_a_run_may_be_tied_to_a_backend(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    if before is None:
        monkeypatch.delenv(registry.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(registry.VARIABLE, before)
    seen = []
    harness.on("torch", lambda i: seen.append((i, os.environ[registry.VARIABLE])))(3)
    assert seen == [(3, "torch")] and os.environ.get(registry.VARIABLE) == before

    def fail(i: int) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        harness.on("torch", fail)(0)
    assert os.environ.get(registry.VARIABLE) == before


def test_offers_that_cannot_be_had_are_named() -> None:
    def fails(error: BaseException) -> Callable[[], harness.Run]:
        def build() -> harness.Run:
            raise error

        return build

    tried = []
    offers = [
        Offer("there", lambda: tried.append, attributes={"bytes": 7}),
        Offer("not_installed", fails(AssertionError()), "no_such_package"),
        Offer("for_gpus", fails(AssertionError()), gpu=True),
        Offer("too_large", fails(torch.OutOfMemoryError("x"))),
        Offer("broken", fails(ImportError("libfoo.so\nis missing"))),
        harness.compiled_offer(Request(CPU, no_compile="off"), "f", abs, lambda f: lambda i: f(i)),
    ]
    found, absent = harness.accept(Request(CPU), offers)
    assert [(a.name, a.bytes) for a in found] == [("there", 7)] and tried == [0]
    assert absent == {
        "not_installed": "no_such_package is not installed",
        "for_gpus": "runs on GPUs only",
        "too_large": "does not fit in the memory that is left",
        "broken": "libfoo.so is missing",
        "f_compiled": "off",
    }


# ---- clocks


def test_cpu_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = clock.make_clock(CPU)
    calls: list[str] = []
    monkeypatch.setattr(watch, "sweep", lambda: calls.append("sweep"))
    assert watch.seconds(lambda: calls.append("call")) > 0
    assert calls == ["sweep", "call"]
    watch.read()
    watch.copy()
    assert torch.equal(watch._copy, watch._read[: watch._copy.numel()])
    product, flops = watch.product(torch.float32)
    assert product().shape == (16, 16) and flops == 2 * 16**3


class Device:
    """A GPU that works off what is queued only when it is waited for, or at once if it is fast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fast: bool = False) -> None:
        self.fast, self.log = fast, []
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("synchronize"))
        self.clock = object.__new__(clock.DeviceClock)
        self.clock.device, self.clock._sweeps = CPU, 1
        monkeypatch.setattr(self.clock, "sweep", lambda: self.log.append("sweep"))

    def event(self, enable_timing: bool) -> Any:
        number = len([x for x in self.log if x == "made"])
        self.log.append("made")
        return SimpleNamespace(
            record=lambda: self.log.append(f"record {number % 2}"),
            query=lambda: self.fast,
            synchronize=lambda: self.log.append("wait"),
            elapsed_time=lambda end: 250.0,
        )


def test_device_clock_lies_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert device.clock.seconds(lambda: device.log.append("call")) == 0.25
    assert device.log == ["made", "made", "sweep", "record 0", "call", "record 1", "wait"]


def test_device_clock_gives_an_idle_device_more_to_do_before(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, fast=True)
    sweeps = []
    for _ in range(8):
        device.log.clear()
        device.clock.seconds(lambda: None)
        sweeps.append(device.log.count("sweep"))
    assert sweeps == [1, 2, 4, 8, 16, 32, 64, 64]
    device.fast = False
    device.clock.seconds(lambda: None)
    assert device.clock._sweeps == clock.MOST_SWEEPS


def test_device_clock_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    assert device.clock.seconds(lambda: device.log.append("call"), host=True) > 0
    assert device.log == ["sweep", "synchronize", "call", "synchronize"]


def test_device_clock_only_reads_to_sweep() -> None:
    watch = object.__new__(clock.DeviceClock)
    watch._swept = torch.arange(64, dtype=torch.int32)
    watch.sweep()
    assert torch.equal(watch._swept, torch.arange(64, dtype=torch.int32))


def test_memory_of_a_gpu_is_what_torch_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 << 20)
    gpu = torch.device("cuda")
    assert (clock.reset_peak(gpu), clock.peak_mib(gpu)) == (3, 5)


def test_kernels_of_a_profile() -> None:
    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    names = [("kernel", cuda), ("Memcpy HtoD", cuda), ("Memset (Device)", cuda), ("Optimizer.step#AdamW.step", cuda)]
    events = [SimpleNamespace(name=name, device_type=where) for name, where in (*names, ("cudaLaunchKernel", host))]
    assert adamw.count_kernels(events) == 1


# ---- rows in files


def test_csv_is_only_ever_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "new" / "op.csv"
    made = row(setting="a, b", median=1.23456789, bytes=1000, gb_per_s=3.0, ratios={"x": 0.123456}, flops=7.0)
    records.append(path, [made], records.machine(CPU))
    before = path.read_bytes()
    records.append(path, [made, made], records.machine(CPU))
    assert path.read_bytes().startswith(before)
    rows = read_rows(path)
    assert len(rows) == 3
    assert tuple(rows[0]) == records.FIELDS
    assert [rows[0][name] for name in ("setting", "median", "bytes", "rounds")] == ["a, b", "1.2346", "1000", "5"]
    assert json.loads(rows[0]["ratios"]) == {"x": 0.12346}
    assert rows[0]["threads"] == str(torch.get_num_threads())
    assert all(rows[0][name] for name in ("device", "driver", "python", "torch", "ssah_fast"))
    assert rows[0]["time"].endswith("+00:00")


def test_committed_rows_are_still_read() -> None:
    folder = Path(__file__).parent.parent / "bench" / "results"
    rows = records.read(folder)
    assert {row["op"] for row in rows} >= {"channel_moments_", "masked_adamw_", "score", "train"}
    assert len(rows) == sum(len(read_rows(path)) for path in folder.glob("*.csv"))


def test_csv_with_other_columns_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "op.csv"
    path.write_text("op,median\nx,1\n")
    with pytest.raises(SsahError, match="op,median"):
        records.append(path, [], HERE)
    assert path.read_text() == "op,median\nx,1\n"
    for wrong in (path, tmp_path / "gone.csv", tmp_path / "gone"):
        with pytest.raises(SsahError, match=str(wrong)):
            records.read(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SsahError, match=r"no \.csv file"):
        records.read(tmp_path / "empty")


def test_machine_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    records._gpu_driver.cache_clear()
    made = records.machine(torch.device("cuda"))
    records._gpu_driver.cache_clear()
    assert (made["device"], made["driver"]) == ("NVIDIA H100", "580.1")


@pytest.fixture
def fresh_git() -> Iterator[None]:
    records.git_state.cache_clear()
    yield
    records.git_state.cache_clear()


def test_git_state_is_dirty_unless_only_results_changed(fresh_git: None, tmp_path: Path) -> None:
    def git(*args: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(("git", *identity, *args), cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    code = tmp_path / "bench" / "code.py"
    code.write_text("1")
    assert records.git_state(code) == ""
    records.git_state.cache_clear()
    git("init")
    assert records.git_state(code) == ""  # another's repository, as around an installed package
    records.git_state.cache_clear()
    git("add", ".")
    git("commit", "-m", "m")
    (results / "op.csv").write_text("row")
    clean = records.git_state(code)
    assert len(clean) == 12 and clean.isalnum()
    code.write_text("2")
    assert records.git_state(code) == clean  # as it was when the command started
    records.git_state.cache_clear()
    assert records.git_state(code) == f"{clean}-dirty"


# ---- comparisons


def older(tmp_path: Path, *rows: Row, **where: Any) -> list[dict[str, str]]:
    path = tmp_path / "old.csv"
    records.append(path, rows, {**HERE, **where})
    return records.read(path)


@pytest.mark.parametrize(
    ("fields", "slower"),
    [
        ({"p20": 11.5}, True),
        ({"p20": 10.9}, False),  # the spreads overlap
        ({"p20": 11.5, "rounds": 2}, False),  # no spread to speak of
        ({"median": 5.0, "p20": 4.0}, False),
    ],
)
def test_slower_is_what_lies_beyond_both_spreads(tmp_path: Path, fields: dict[str, Any], slower: bool) -> None:
    (change,) = records.compare([row(**fields)], older(tmp_path, row()), HERE)
    assert change.slower is slower and change.old == (10, 9, 11) and change.git == "abc"
    assert change.ratio == pytest.approx(fields.get("median", 10) / 10)


def test_a_slower_machine_is_not_a_slower_op(tmp_path: Path) -> None:
    read = row(backend=READ, ours=False, median=100.0)
    before = older(tmp_path, row(), read)
    now = [row(median=14.0, p20=13.0, p80=15.0), row(backend=READ, ours=False, median=130.0)]
    (change,) = records.compare(now, before, HERE)
    assert change.drift == pytest.approx(1.3) and not change.slower
    (change,) = records.compare([row(p20=15.0), now[1]], before, HERE)
    assert change.slower
    # A part of the case has no read of its own: the usual drift.
    part = row(setting="s, part")
    changes = records.compare([*now, row(setting="s, part", p20=13.0)], [*before, *older(tmp_path, part)], HERE)
    assert [c.slower for c in changes] == [False, False]


def test_the_newest_row_of_the_same_machine_counts(tmp_path: Path) -> None:
    older(tmp_path, row(median=1.0, p80=1.0))
    before = older(tmp_path, row(median=20.0, p80=30.0))
    (change,) = records.compare([row()], before, HERE)
    assert change.old[0] == 20
    assert records.compare([row()], before, {**HERE, "device": "another"}) == []
    assert records.compare([row()], before, {**HERE, "threads": 8}) == []
    for other in ({"backend": "torch"}, {"shape": "3x3"}, {"setting": "x"}, {"dtype": "bf16"}, {"unit": "MiB"}):
        assert records.compare([row(**other)], before, HERE) == []


def test_only_ours_are_compared_and_memory_needs_no_rounds(tmp_path: Path) -> None:
    memory = row(unit="MiB", median=10.0, p20=10.0, p80=10.0, rounds=1)
    before = older(tmp_path, memory, row(unit="TFLOP/s"), row(backend="torch_fused"))
    now = [
        row(unit="MiB", median=12.0, p20=12.0, rounds=1),
        row(unit="TFLOP/s"),
        row(backend="torch_fused", ours=False),
    ]
    (change,) = records.compare(now, before, HERE)
    assert change.slower


# ---- cases


def labels(plan: harness.Plan) -> list[str]:
    return list(plan)


def measure_all(plan: harness.Plan) -> dict[tuple[str, str, str, str], Row]:
    watch = clock.make_clock(CPU)
    found = [pair for build in plan.values() for pair in harness.measure(build(), watch, rounds=1)]
    for about, rows in found:
        for target in about.targets:
            harness.reached(rows, target)
    return {(r.op, r.dtype, r.setting, r.backend): r for _, rows in found for r in rows}


def test_moments_cases() -> None:
    plan = moments.plan(Request(CPU, ("2048x48",), no_compile="off"))
    assert "channel_moments_ bf16 2048x48 one group" in plan
    rows = measure_all(plan)
    assert {key[:3] for key in rows} == {
        *(("channel_moments_", dtype, "one group") for dtype in ("bf16", "fp16", "fp32")),
        ("channel_moments_", "bf16", "sequences"),
        *(("gated_moments_", *rest) for rest in (("bf16", "silu"), ("bf16", "gelu_tanh"), ("fp32", "silu"))),
        *(("column_norms", "bf16", f"axis {axis}") for axis in (0, 1)),
    }
    assert {r.shape for r in rows.values()} == {"2048x48"}
    assert rows["channel_moments_", "bf16", "one group", "cpp"].bytes == 2048 * 48 * 2 + 48 * 32 + 2048
    assert rows["gated_moments_", "fp32", "silu", "cpp"].bytes == 3 * 2048 * 48 * 4 + 48 * 32 + 2048
    assert rows["column_norms", "bf16", "axis 0", "cpp"].bytes == 2048 * 48 * 2 + 2048 * 8
    gated = rows["gated_moments_", "bf16", "silu", "cpp"]
    assert set(gated.ratios) == {"cpp_fresh", "act_mul", COPY} and gated.ours
    assert all(r.percent_of_read > 0 for r in rows.values())
    assert labels(moments.plan(Request(CPU, dtypes=("fp16",)))) == ["channel_moments_ fp16 4096x14336 one group"]


def test_sequences_leave_prompts_out() -> None:
    group = moments.sequences(4096)
    assert group.unique().tolist() == [-1, 0, 1, 2, 3]
    assert 0.5 < (group >= 0).float().mean() < 0.8


def test_adamw_cases() -> None:
    rows = measure_all(adamw.plan(Request(CPU, ("tiny",), no_compile="off")))
    assert {key[2] for key in rows} == {
        *("no mask", "7.5 % frozen", "20 % trained", "fractions"),
        "21 tensors, 20% of the rows",
    }
    whole = rows["masked_adamw_", "bf16", "no mask", "cpp"]
    assert whole.bytes == 128 * 96 * 22
    assert {"torch_fused", "torch_foreach", "torch_fused_master"} <= set(whole.ratios)
    tenth = rows["masked_adamw_", "bf16", "fractions", "cpp_columns_10%"]
    assert tenth.bytes == round(128 * 96 * 0.1 * 22) and tenth.ours
    assert rows["MaskedAdamW", "bf16", "21 tensors, 20% of the rows", "torch_fused"]


def test_the_list_is_that_of_a_llama() -> None:
    sizes = [torch.Size(size).numel() for _, size in adamw.parameter_list(*adamw.LISTS["llama-3-8b"])]
    assert (len(sizes), sum(sizes)) == (291, 8_030_261_248)


def test_perturb_cases() -> None:
    rows = measure_all(perturb.plan(Request(CPU, ("7x12",), no_compile="off")))
    assert rows["perturb_", "bf16", "1 direction", "cpp"].bytes == 2 * 7 * 12 * 2
    assert "torch_randn" in rows["perturb_", "bf16", "2 directions", "cpp"].ratios
    assert "torch_randn" in rows["direction_scales", "bf16", "2 directions", "cpp"].ratios


def test_torch_perturb_is_the_same_sum() -> None:
    base = torch.randn(64, 1000)
    out = torch.empty_like(base)
    perturb.torch_perturb(out, base, torch.tensor([3.0, 4.0]))
    assert float((out - base).std()) == pytest.approx(perturb.STEP * 5, rel=0.02)


def test_a_layer_is_perturbed_in_place() -> None:
    rows = measure_all(perturb.plan(Request(CPU, ("tiny",), ("fp32",), no_compile="off")))
    ours = rows["perturb_", "fp32", "layer in place", "cpp"]
    assert ours.bytes == 2 * 4 * (4 * 64 * 64 + 3 * 64 * 96) and "torch_randn" in ours.ratios
    base = torch.randn(64, 1000)
    weight = base.clone()
    perturb.published_step(weight)
    assert float((weight - base).norm() / base.norm()) == pytest.approx(perturb.STEP, rel=1e-4)


def test_score_cases() -> None:
    kernels = (ops.channel_moments_, ops.gated_moments_, ops.column_norms, torch.nn.functional.linear)
    rows = measure_all(score.plan(Request(CPU, ("2x32x48x2x16",))))
    assert kernels == (ops.channel_moments_, ops.gated_moments_, ops.column_norms, torch.nn.functional.linear)
    rows = {(setting, backend): r for (_, _, setting, backend), r in rows.items()}
    ours = rows["end to end", "cpp"]
    assert set(ours.ratios) == {"plain_forward", "flap_hooks", PRODUCT}
    assert ours.shape == "2x32x48x2x16"
    # Per token: two layers of q, k, v, o [32, 32] and gate, up, down [48, 32], and attention to half of 16 tokens.
    assert ours.flops == 2 * 2 * 16 * (2 * (4 * 32 * 32 + 3 * 32 * 48) + 2 * 16 * 32)
    for name in ("cpp", "plain_forward", "flap_hooks"):
        assert {("matmul", name), ("attention", name), ("rest", name), ("end to end, rate", name)} <= set(rows)
    assert {name for setting, name in rows if setting == "moments"} == {"cpp"}
    assert rows["state per unit and set", "cpp"].median == pytest.approx(32, rel=0.05)
    assert labels(score.plan(Request(CPU))) == ["score bf16 2x4096x11008x2x256"]


def test_flap_hooks_follow_the_closed_form() -> None:
    """(N - 1) F_N = sum over m = 2..N of (m - 1) / m times sequence m's spread about the mean of the first m means."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randn(5, 1, 7, 3, generator=generator)
    statistics = score.FlapStatistics(3)
    for sequence in sequences:
        statistics(torch.nn.Identity(), (sequence,), sequence)
    means = sequences.double().mean(2)[:, 0].cumsum(0) / torch.arange(1, 6).view(-1, 1)
    spread = (sequences[:, 0].double() - means[:, None]).square().sum(1)
    weights = torch.arange(1, 5).view(-1, 1) / torch.arange(2, 6).view(-1, 1)
    torch.testing.assert_close(statistics.fluctuation.double() * 4, (weights * spread[1:]).sum(0), rtol=1e-5, atol=1e-6)


def test_train_cases() -> None:
    rows = measure_all(train.plan(Request(CPU, ("2x32x48x1x16",), ("fp32",))))
    rows = {(setting, backend): r for (_, _, setting, backend), r in rows.items()}
    assert rows["train 20%", "compact"].ours and rows["freeze 7.5%", "masked"].ours
    assert rows["train 20%", "torch_fused"].flops > rows["train 20%", "compact"].flops
    for part in ("forward", "backward", "step"):
        assert rows[f"train 20%, {part}", "compact"].rounds == rows[f"train 20%, {part}", "torch_fused"].rounds == 1
    held = rows["train 20%, gradients and state", "compact"]
    assert held.unit == "MiB" and held.ratios["torch_fused"] < 0.2


def test_stream_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, taken = stream.run_apart, []

    def run(arguments: Sequence[str]) -> str:
        """In a process of its own only once: each takes seconds to start."""
        if arguments[0] == stream.STREAMED:
            return apart(arguments)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            stream.work(arguments)
        taken.append(arguments[0])
        return printed.getvalue()

    monkeypatch.setattr(stream, "run_apart", run)
    monkeypatch.setattr(stream, "LARGE", 0)
    monkeypatch.delenv(stream.VARIABLE, raising=False)
    plan = stream.plan(Request(CPU, ("tiny",), ("fp32",)))
    assert labels(plan) == ["stream fp32 2x32x48x4x16"]
    rows = {(setting, backend): r for (_, _, setting, backend), r in measure_all(plan).items()}
    assert sorted(taken) == ["accelerate_disk", "in_memory", "read"]
    alone = rows["alone", "streamed"]
    assert set(alone.ratios) == {"read", "in_memory", "accelerate_disk", "larger_of_both"} and alone.ours
    larger = rows["alone", "larger_of_both"].median
    assert larger == max(rows["alone", way].median for way in ("read", "in_memory"))
    assert rows["peak memory", "streamed"].unit == "MiB" and rows["peak memory", "streamed"].median > 50
    assert rows["overhead per layer", "streamed"].median >= rows["overhead per layer", "prepared"].median > 0
    size = 4 * (2 * 256 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32)
    assert size < rows["read from the disk", "checkpoint"].median < size + 4096  # the header comes on top


def test_stream_takes_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = models.config(models.Size(2, 32, 48, 1, 1))
    make_checkpoint.write(config, tmp_path)
    monkeypatch.setenv(stream.VARIABLE, str(tmp_path))
    plan = stream.plan(Request(CPU))
    assert labels(plan) == ["stream bf16 2x32x48x8x512"]
    monkeypatch.setattr(stream.machine, "memory_left", lambda device: 1)
    made = plan["stream bf16 2x32x48x8x512"]()
    assert set(made.absent) == {"in_memory"} and made.alternatives[0].name == "streamed"
    monkeypatch.setattr(stream.sys, "executable", "false")
    with pytest.raises(SsahError, match="streamed failed: killed"):
        made.alternatives[0].run(0)


def test_the_tiled_loss_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TILE", 7)
    size = train.Size(1, 32, 48, 2, 16)
    model, tokens = train.build(Request(CPU), "fp32", size), train.models.random_tokens(size)
    loss = train.tiled_loss(model, tokens)
    torch.testing.assert_close(loss, model(input_ids=tokens, labels=tokens).loss)


def test_a_gpus_cases_take_their_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "launches", lambda call: 1)
    monkeypatch.setattr(train, "peak_mib", lambda device: 10.0)
    monkeypatch.setattr(train, "reset_peak", lambda device: 2.0)
    rows: dict[tuple[str, str, str, str], Row] = {}
    for module in (moments, adamw, perturb, score, train):
        rows |= measure_all(module.plan(OnGpu(CPU, ("tiny",), ("bf16",), no_compile="off")))
    settings = {(op, setting) for op, _, setting, _ in rows}
    assert ("MaskedAdamW", "21 tensors, 20% of the rows, kernels") in settings
    assert ("train", "freeze 7.5%") not in settings
    peaks = {backend: r.median for (_, _, setting, backend), r in rows.items() if setting == "train 20%, peak memory"}
    assert set(peaks) == {"compact", "torch_fused", "forecast", "dense_forecast"} and peaks["compact"] == 8
    assert 0 < peaks["forecast"] < peaks["dense_forecast"]


# ---- the picture


def test_points_of_the_roofline() -> None:
    rows = [
        row(bytes=1000, flops=4000.0, median=2.0),
        row(backend=READ, bytes=500, gb_per_s=3.0, flops=None),
        row(unit="MiB", bytes=1000, flops=1.0),
        row(bytes=None, flops=1.0),
    ]
    assert picture.points(rows) == {"op cpp": [(4.0, 2e6, "fp32 2x3 s: 2 ms")]}
    assert picture.bandwidth(rows, READ) == 3e9 and picture.bandwidth(rows, COPY) is None


def test_the_picture_is_one_file(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    rows = [row(bytes=1000, flops=4000.0), row(backend=READ, bytes=500, gb_per_s=3.0)]
    path = tmp_path / "roof.html"
    picture.draw(rows, picture.product_rates(clock.make_clock(CPU)), "a CPU", path)
    text = path.read_text(encoding="utf-8")
    assert "stream_read: 3 GB" in text and "matmul bf16" in text and "op cpp" in text
