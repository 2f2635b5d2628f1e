"""What fits is chosen, what is forecast is what happens, and the machine is measured. No time is asserted."""

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssah_fast import loading, machine, matmul, score_plan, scoring
from ssah_fast.bench import make_checkpoint
from ssah_fast.bench.clock import peak_mib, reset_peak
from ssah_fast.cli.main import main
from ssah_fast.data import Encoded, make_batches
from ssah_fast.errors import OutOfMemoryError, SsahError
from ssah_fast.score_plan import Memory, Rates, choose, fit, plan

CPU = torch.device("cpu")
GIB = 2**30
RATES = Rates(read=1e9, source="a test", product=1e12, attention=1e12)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 1 MB on a machine that multiplies bf16 itself."""
    monkeypatch.setattr(machine, "resident", lambda: 10**6)
    monkeypatch.setattr(score_plan, "_LATER", 0)
    monkeypatch.setattr(matmul, "emulates_bf16", lambda: False)


def meta(model_type: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_models.tiny_config(model_type, **overrides), dtype=dtype)


def large() -> PreTrainedModel:
    """Llama-2-7B."""
    config = make_checkpoint.read_config("llama-2-7b")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def sequences(*lengths: int) -> list[list[Encoded]]:
    encoded = [Encoded([1] * length, [True] * length) for length in lengths]
    return [encoded[::2], encoded[1::2]]


def test_what_fits_is_in_memory_and_what_does_not_is_streamed() -> None:
    model, data = large(), sequences(*[512] * 8)
    roomy = choose(model, data, device=CPU, max_memory=20 * GIB)
    assert (roomy.stream, roomy.batch_tokens, roomy.hidden) == (False, score_plan.CPU_TOKENS, "device")
    tight = choose(model, data, device=CPU, max_memory=3 * GIB)
    assert (tight.stream, tight.batch_tokens, tight.hidden) == (True, score_plan.CPU_TOKENS, "device")
    assert tight.memory.total < 1.5 * GIB < 12.5 * GIB < roomy.memory.total
    assert choose(model, data, device=CPU, max_memory=20 * GIB, stream="always").stream


def test_hidden_states_go_to_a_file_before_batches_get_smaller() -> None:
    model, data = large(), sequences(*[512] * 256)  # 1 GiB of hidden states
    streamed = choose(model, data, device=CPU, max_memory=20 * GIB, stream="always").memory
    assert streamed.hidden == GIB
    bound = streamed.total - 1
    filed = choose(model, data, device=CPU, max_memory=bound)
    assert (filed.stream, filed.batch_tokens, filed.hidden) == (True, score_plan.CPU_TOKENS, "file")
    smaller = choose(model, data, device=CPU, max_memory=filed.memory.total - 1)
    assert (smaller.batch_tokens, smaller.hidden) == (score_plan.CPU_TOKENS // 2, "file")
    alone = choose(model, data, device=CPU, max_memory=filed.memory.total - 1, batch_size=1)
    assert alone.batch_tokens == 512 and alone.memory.total < smaller.memory.total


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_memory": GIB}, SsahError, ("--max-memory 1GiB is too small", "at least 1.07GiB", "--seqlen")),
        ({"max_memory": 9 * GIB, "stream": "never"}, SsahError, ("at least 12.6", "--stream auto")),
        ({"max_memory": GIB, "batch_size": 8}, SsahError, ("a smaller --batch-size",)),
        ({}, OutOfMemoryError, ("on cpu, which has 0.", "--max-memory 1.07GiB to try")),
        ({"stream": "sometimes"}, SsahError, ("--stream sometimes is unknown",)),
        ({"max_memory": 0}, SsahError, ("--max-memory 0",)),
    ],
)
def test_nothing_fits(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[SsahError], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(machine, "memory_left", lambda device: GIB)
    with pytest.raises(SsahError) as caught:
        choose(large(), sequences(*[512] * 8), device=CPU, **arguments)
    assert type(caught.value) is error and all(word in str(caught.value) for word in words)


def test_the_machines_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_left", lambda device: 20 * GIB)
    data = sequences(*[512] * 64)
    alone, shared = (choose(large(), data, device=CPU, ranks=ranks) for ranks in (1, 2))
    assert not alone.stream and shared.stream
    streamed = choose(large(), data, device=CPU, stream="always")
    assert shared.memory.hidden == streamed.memory.hidden // 2


def test_a_gpu_takes_smaller_batches_before_it_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    left = {"cuda": 15 * GIB, "cpu": 10 * GIB}
    monkeypatch.setattr(machine, "memory_left", lambda device: left[device.type])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    model, data = large(), sequences(*[512] * 256)
    choice = choose(model, data, device=gpu)
    assert not choice.stream and 512 <= choice.batch_tokens < score_plan.GPU_TOKENS
    left["cuda"] = 3 * GIB  # one layer at a time, with 1.8 GiB of activations and 1 GiB of hidden states
    choice = choose(model, data, device=gpu)
    assert (choice.stream, choice.batch_tokens, choice.hidden) == (True, score_plan.GPU_TOKENS, "host")
    left["cpu"] = GIB  # room for what is read ahead
    assert choose(model, data, device=gpu).hidden == "file"


def test_mapped_files_count_for_a_bound_that_is_given() -> None:
    data = sequences(20, 20)
    for model_type, times in (("llama", 1), ("mixtral", 2)):
        model = meta(model_type)
        whole = score_plan._Needs(model, CPU, "variance").whole
        assert choose(model, data, device=CPU, stream="never").memory.weights == whole
        assert choose(model, data, device=CPU, stream="never", max_memory=GIB).memory.weights == times * whole


@pytest.mark.parametrize(("batch_size", "estimator"), [(None, "variance"), (3, "variance"), (None, "flap")])
def test_batches_are_those_of_the_run(batch_size: int | None, estimator: str) -> None:
    lengths = [7, 30, 12, 12, 3, 25, 9]
    data = sequences(*lengths)
    job = score_plan._Job(meta(), lengths, CPU, batch_size=batch_size, estimator=estimator)
    size = 1 if estimator == "flap" else batch_size
    made = make_batches(data, batch_size=size, max_tokens=64, pad_id=0)
    assert job.batches(64) == [tuple(batch.input_ids.shape) for batch in made]


@pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)
def test_every_architecture_is_forecast(model_type: str) -> None:
    model = meta(model_type)
    forecast = plan(model, [20, 20, 9], device=CPU, stream="always", rates=RATES)
    needs = score_plan._Needs(model, CPU, "variance")
    inside = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name or ".h." in name)
    assert sum(needs.layer_bytes) == pytest.approx(inside, rel=0.01)  # buffers come on top
    assert 0 < forecast.choice.memory.weights <= needs.whole  # it has two layers
    assert forecast.choice.memory.moments > 0 and forecast.choice.memory.activations > 0
    read = sum(phase.read for phase in forecast.phases)
    assert 0 < read <= needs.whole
    assert forecast.tokens == 3 * 20


def test_the_arithmetic_of_a_llama() -> None:
    phases = plan(meta(), [16] * 4, device=CPU, stream="always", rates=RATES).phases
    hidden, wide, kv = tiny_models.HIDDEN, tiny_models.INTERMEDIATE, tiny_models.HIDDEN // 3
    weights = 2 * hidden * (hidden + kv) + 3 * hidden * wide
    attention = 2 * 16 * hidden  # per token: q k and p v, to half of 16 tokens each
    assert phases[0].flops == 64 * (2 * weights + attention)
    assert phases[1].flops == 64 * (2 * (weights - hidden * wide) + attention)  # the last down projection never runs


def test_time_is_the_longer_of_reading_and_computing() -> None:
    model, lengths = large(), [512] * 8
    layer = 404766720  # bytes
    slow, fast = (
        plan(model, lengths, device=CPU, stream="always", rates=rates)
        for rates in (Rates(1e8, "a test", 1e15, 1e15), Rates(1e15, "a test", 1e11, 1e11))
    )
    read = sum(phase.read for phase in slow.phases)
    assert read == pytest.approx(32 * layer + 32000 * 4096 * 2, rel=0.001)
    assert slow.to_json()["seconds"] == pytest.approx(read / 1e8, rel=0.01)
    assert fast.to_json()["seconds"] == pytest.approx(fast.to_json()["flops"] / 1e11, rel=0.01)
    document = fast.to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["memory"]["total"] == max(phase["memory"]["total"] for phase in document["phases"])
    whole = plan(model, lengths, device=CPU, stream="never", max_memory=20 * GIB, rates=RATES)
    assert [phase.name for phase in whole.phases] == ["load", "score"]
    assert whole.phases[0].read == score_plan._Needs(model, CPU, "variance").whole


def test_fit_changes_as_little_as_will_do() -> None:
    model, lengths = large(), [4096] * 16
    assert fit(model, lengths, 20 * GIB, device=CPU).flags == ("--max-memory", "20GiB", "--stream", "never")
    assert fit(model, lengths, 3 * GIB, device=CPU).flags == ("--max-memory", "3GiB", "--stream", "always")
    given = fit(model, lengths, 3 * GIB, device=CPU, stream="never", batch_size=64)
    assert given.flags == ("--max-memory", "3GiB", "--stream", "always", "--batch-size", "auto")
    cut = fit(model, lengths, 1181116007, device=CPU)  # 1.1 GiB, a byte more
    assert cut.flags == ("--max-memory", "1181116007", "--stream", "always", "--seqlen", "512")
    assert cut.to_json()["memory"]["total"] <= 1.1 * GIB
    with pytest.raises(SsahError, match=r"nothing fits in --fit 0.5GiB.* weights take 1GiB"):
        fit(model, lengths, GIB // 2, device=CPU)


def test_a_checkpoint_in_another_dtype_is_held_twice(tmp_path: Path) -> None:
    make_checkpoint.write(tiny_models.tiny_config("llama", hidden_size=192), tmp_path, dtype=torch.bfloat16)
    same, wider = (
        score_plan._Needs(loading.empty_model(str(tmp_path), dtype=d), CPU, "variance") for d in ("auto", "fp32")
    )
    assert same.stored == 1 and wider.stored == pytest.approx(0.5, rel=0.05)
    assert same.streamed_weights(2, False) == same.rest + sum(same.layer_bytes)
    assert wider.streamed_weights(2, False) == pytest.approx(wider.rest + 2 * wider.layer_bytes[0], rel=0.05)


def test_the_forecast_is_what_a_run_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model large enough to be seen beside the process: 54 MB of weights per layer, 25 MB of activations."""
    config = tiny_models.tiny_config(
        "llama", hidden_size=1056, intermediate_size=3072, num_hidden_layers=3, vocab_size=4096
    )
    make_checkpoint.write(config, tmp_path, dtype=torch.float32)
    words = [{"prompt": "w1 w2", "response": " ".join(f"w{i * k % 90}" for i in range(100))} for k in range(1, 9)]
    monkeypatch.undo()  # the process as it is
    if reset_peak(CPU) is None:
        pytest.skip("the system does not tell the peak of memory")
    told: list[tuple[score_plan.Choice, int]] = []

    def tell(choice: score_plan.Choice, _: object) -> None:
        gc.collect()
        if hasattr(ctypes.CDLL(None), "malloc_trim"):  # freed memory that glibc holds would be taken again, unseen
            ctypes.CDLL(None).malloc_trim(0)
        reset_peak(CPU)
        told.append((choice, machine.resident()))

    scoring.score_checkpoint(
        str(tmp_path),
        safety=words,
        utility=words,
        seqlen=104,
        stream="always",
        device="cpu",
        told=tell,
    )
    ((choice, before),) = told
    forecast, taken = choice.memory, peak_mib(CPU) * 2**20 - before
    # What the process loads late (_LATER) may have come before, with another test.
    low, high = forecast.total - forecast.process, forecast.total - before
    assert 0.75 * low <= taken <= 1.25 * high


def test_memory_adds_up() -> None:
    memory = Memory(1, 2, 3, 4, 5)
    assert memory.total == 15 and memory.to_json()["total"] == 15
    assert [score_plan.gib(size) for size in (GIB, GIB + 1, 8 * GIB)] == ["1GiB", "1.01GiB", "8GiB"]


# ---- the machine


def group(folder: Path, limit: str, now: int, cache: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{names[0]}").write_text(limit)
    (folder / f"memory.{names[1]}").write_text(str(now))
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


def test_memory_of_control_groups(tmp_path: Path) -> None:
    one, two = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), ("max", "current", "inactive_file")
    group(tmp_path / "memory" / "a" / "b", "1000", 300, 100, one)
    group(tmp_path / "memory" / "a", str(2**63 - 4096), 300, 100, one)
    group(tmp_path / "c", "max", 300, 100, two)
    group(tmp_path / "c" / "d", "5000", 300, 0, two)
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/a/b\n2:cpu,cpuacct:/\n0::/c/d/e\n")  # a container sees no e
    assert sorted(machine._group_memory(membership, tmp_path)) == [800, 4700]
    assert list(machine._group_memory(tmp_path / "nothing", tmp_path)) == []


def test_the_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 10**7 < machine.resident() and 0 < machine.memory_left(CPU)
    monkeypatch.setattr(machine, "SAMPLE", 2 * machine.PIECE)
    (tmp_path / "weights").write_bytes(bytes(100_000))
    assert machine.read_rate([tmp_path / "weights"], 0.01) > 0 and machine.read_rate([], 0.01) > 0
    with pytest.raises(SsahError, match="cannot measure the disk"):
        machine.read_rate([tmp_path / "nothing"], 0.01)
    assert machine.product_rate(4, 8, 16, torch.bfloat16, CPU, 0.01) > 0
    for eager in (False, True):
        assert machine.attention_rate(8, 2, 4, torch.float32, CPU, eager, 0.01) > 0


# ---- the command


def test_plan_and_fit_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_models.tiny_config("llama").save_pretrained(tmp_path)  # no weights
    monkeypatch.setattr(score_plan, "_SECONDS", dict.fromkeys(score_plan._SECONDS, 0.01))
    monkeypatch.setattr(machine, "SAMPLE", machine.PIECE)
    command = ["score", str(tmp_path), "--device", "cpu", "--nsamples", "4", "--seqlen", "32"]
    assert main([*command, "--plan", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["tokens"] == 2 * 4 * 32 and document["rates"]["source"] == "a temporary file"
    assert main([*command, "--plan", "--stream", "always"]) == 0
    out, err = capfd.readouterr()
    assert "other layers" in out and "GFLOP/s" in out and "one layer at a time" in err
    assert main([*command, "--fit", "8GiB"]) == 0
    assert capfd.readouterr().out.strip() == "--max-memory 8GiB --stream never"
    assert main([*command, "--fit", "8GiB", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["flags"][:2] == ["--max-memory", "8GiB"]
    assert main([*command, "--fit", "1MiB"]) == 2
    assert "nothing fits in --fit 0.01GiB" in capfd.readouterr().err
    assert main([*command, "--plan", "--nsamples", "none"]) == 2
