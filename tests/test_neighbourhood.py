"""Neighbourhood: places around a checkpoint and the way back, against what is computed in memory without it.

That directions have each tensor's norm and are the same on every backend, and their statistics (moments, tails,
correlation between elements, seeds and names), is in test_perturb.py.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_units import frozen_elements, tiny_units
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ssah_fast import neighbourhood, ops
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.masks import Mask
from ssah_fast.neighbourhood import Neighbourhood, RandomAxis, TowardsAxis
from ssah_fast.progress import stopping

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SEED = 123


def load(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, tied ones once."""
    kept = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {
        name: tensor.detach().cpu().clone() for name, tensor in {**dict(model.named_parameters()), **buffers}.items()
    }


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(bits(a[k]), bits(b[k])) for k in a)


def is_norm(name: str) -> bool:
    return "norm" in name


def at_random(base: dict[str, Tensor], seeds: Sequence[int], steps: Sequence[float]) -> dict[str, Tensor]:
    """base + the steps along random axes, each tensor on its own."""
    found = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in found.items():
        if not is_norm(name):
            ops.perturb_(tensor, base[name], seeds, steps, name=name)
    return found


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in fp32."""
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights, except for the embedding's."""
    path, model, base = tmp_path_factory.mktemp("tuned"), tiny_model("llama", seed=1), load(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(base.get_input_embeddings().weight)
    model.save_pretrained(path)
    return path


# ---- where the weights are


def test_a_random_axis_has_the_norms_of_the_tensors(folder: Path) -> None:
    model = load(folder)
    base = weights(model)
    with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(folder)) as around:
        with around.at([1.0]):
            moved = weights(model)
        assert same(weights(model), base)
    for name, tensor in base.items():
        if is_norm(name):
            assert torch.equal(bits(moved[name]), bits(tensor))
        else:
            far = (moved[name].double() - tensor.double()).norm() / tensor.double().norm()
            assert far.item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("source", ["checkpoint", "shards", "memory", "other dtype"])
@pytest.mark.parametrize("piece", [100, 1 << 18])
@dtypes
def test_every_source_of_the_base_gives_the_same_weights(
    dtype: torch.dtype, piece: int, source: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbourhood, "PIECE", piece)
    model = load(folder, dtype)
    if source in ("checkpoint", "shards"):
        model.save_pretrained(tmp_path, max_shard_size="20KB" if source == "shards" else "1GB")
        assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (source == "shards")
    checkpoint = {"memory": None, "other dtype": str(folder)}.get(source, str(tmp_path))
    base, lines = weights(model), list[str]()
    with Neighbourhood(model, [RandomAxis(SEED), RandomAxis(-1)], checkpoint=checkpoint, told=lines.append) as around:
        for steps in ([0.5, 0.0], [-0.3, 0.1], [0.0, 2.0]):  # the second and third without going back between
            around.move(steps)
            assert same(weights(model), at_random(base, [SEED, -1], steps))
        around.move([0.0, 0.0])
        assert same(weights(model), base)
        around.move([0.5, 0.5])
    assert same(weights(model), base) and not lines


def test_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    assert any("experts.1." in name for name in load_file(tmp_path / "model.safetensors"))
    model, lines = load(tmp_path), list[str]()
    base = weights(model)
    with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(tmp_path), told=lines.append) as around:
        around.move([0.5])
        assert same(weights(model), at_random(base, [SEED], [0.5]))
    assert same(weights(model), base) and not lines


def test_weights_that_the_checkpoint_does_not_have_are_copied(folder: Path, tmp_path: Path) -> None:
    model, lines = load(folder), list[str]()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1.0
    base = weights(model)
    with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(folder), told=lines.append) as around:
        around.move([0.5])
        assert same(weights(model), at_random(base, [SEED], [0.5]))
    assert same(weights(model), base)
    assert lines == [f"0.0 MiB of the weights are not in {folder} as they are in memory; a copy is kept"]
    lines.clear()
    with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(tmp_path), told=lines.append) as around:
        around.move([0.5])
    assert same(weights(model), base)
    assert "has no config.json" in lines[0] and "copy is kept" in lines[1]


def test_tied_tensors_move_once(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    base = weights(model)
    with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(tmp_path)) as around, around.at([0.5]):
        assert "lm_head.weight" not in base and same(weights(model), at_random(base, [SEED], [0.5]))
    for pattern in ("*embed_tokens*", "LM_head.*"):  # either name excludes the one tensor
        with Neighbourhood(model, [RandomAxis(SEED)], exclude=[pattern, "*norm*"]) as around, around.at([0.5]):
            moved = [name for name, tensor in weights(model).items() if not torch.equal(tensor, base[name])]
        assert len(moved) == len(base) - 1 - sum(map(is_norm, base)) and "model.embed_tokens.weight" not in moved


def test_buffers_that_are_saved_move(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    model = load(tmp_path)
    base, rotary = weights(model), model.model.rotary_emb.inv_freq.clone()
    (bias,) = (name for name in base if name.endswith("e_score_correction_bias"))
    with Neighbourhood(model, [RandomAxis(SEED)], exclude=(), checkpoint=str(tmp_path)) as around, around.at([0.5]):
        moved = weights(model)
        assert all(not torch.equal(moved[name], base[name]) for name in (bias, "model.norm.weight"))
        assert torch.equal(model.model.rotary_emb.inv_freq, rotary)
    assert same(weights(model), base)


# ---- towards checkpoints


@dtypes
@pytest.mark.parametrize("piece", [100, 1 << 18])
def test_a_step_of_one_is_the_other_checkpoint(
    dtype: torch.dtype, piece: int, folder: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbourhood, "PIECE", piece)
    model, expected = load(folder, dtype), weights(load(tuned, dtype))
    base = weights(model)
    with Neighbourhood(model, [RandomAxis(SEED), TowardsAxis(str(tuned))], checkpoint=str(folder)) as around:
        with around.at([0, 1]):
            assert same(weights(model), expected)
        assert same(weights(model), base)


@dtypes
@pytest.mark.parametrize("steps", [(-0.25, 0.0, 0.0), (1.25, 0.5, 0.0), (0.5, 0.0, 0.1), (1.0, 0.0, 0.1)], ids=str)
def test_between_checkpoints_and_beyond(
    dtype: torch.dtype, steps: tuple[float, ...], folder: Path, tuned: Path, tmp_path: Path
) -> None:
    third = changed(folder, tmp_path / "third", lambda tensors: tensors["lm_head.weight"].mul_(3))
    model = load(folder, dtype)
    base, others = weights(model), [weights(load(path, dtype)) for path in (tuned, third)]
    noise = at_random({name: tensor.double() for name, tensor in base.items()}, [SEED], [steps[2]])
    axes = [TowardsAxis(str(tuned)), TowardsAxis(str(third)), RandomAxis(SEED)]
    with Neighbourhood(model, axes, checkpoint=str(folder)) as around, around.at(steps):
        moved = weights(model)
    for name, tensor in base.items():
        exact = noise[name].clone()
        for step, other in zip(steps, others, strict=False):
            exact += step * (other[name].double() - tensor.double())
        rounding = torch.finfo(dtype).eps / 2
        slack = 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        error = (moved[name].double() - exact).abs()
        assert (error <= rounding * exact.abs() * 1.01 + slack).all(), name
        if not steps[2] and torch.equal(tensor, others[0][name]) and torch.equal(tensor, others[1][name]):
            assert torch.equal(bits(moved[name]), bits(tensor))


@dtypes
def test_the_size_of_pieces_does_not_matter(
    dtype: torch.dtype, folder: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = load(folder, dtype), []
    for piece in (1, 100, 1 << 18):
        monkeypatch.setattr(neighbourhood, "PIECE", piece)
        with Neighbourhood(model, [TowardsAxis(str(tuned)), RandomAxis(SEED)], checkpoint=str(folder)) as around:
            for steps in ([0.37, 0.0], [-0.2, 0.1]):
                around.move(steps)
                found.append(weights(model))
    assert all(same(place, found[k % 2]) for k, place in enumerate(found)) and not same(*found[:2])


def test_an_axis_towards_the_base_moves_nothing(folder: Path) -> None:
    model = load(folder)
    base = weights(model)
    with Neighbourhood(model, [TowardsAxis(str(folder))], checkpoint=str(folder)) as around, around.at([0.7]):
        assert same(weights(model), base) and not around.gram().any()


# ---- some units alone


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "phi3", "deepseek_v3"])
@pytest.mark.parametrize("piece", [100, 1 << 18])
def test_a_region(model_type: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbourhood, "PIECE", piece)
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    tiny_model(model_type, seed=1).save_pretrained(tmp_path / "tuned")
    model = load(tmp_path / "base")
    base, mask = weights(model), tiny_units(model).mask(model, train="scu")
    axes = [RandomAxis(SEED), TowardsAxis(str(tmp_path / "tuned"))]
    parameters = {name for name, _ in model.named_parameters()}
    for steps in ([0.5, 0.0], [0.0, 1.0], [0.2, -0.5]):
        with Neighbourhood(model, axes, exclude=()) as around, around.at(steps):
            everywhere = weights(model)
        with Neighbourhood(model, axes, exclude=(), region=mask, checkpoint=str(tmp_path / "base")) as around:
            around.move(steps)
            moved = weights(model)
            assert around.describe()[0]["region"] == mask.sha256
        assert same(weights(model), base)
        count = 0
        for name, tensor in base.items():
            frozen = frozen_elements(mask, name, tensor.shape) if name in parameters else torch.ones(tensor.shape) > 0
            assert torch.equal(bits(moved[name]), bits(torch.where(frozen, tensor, everywhere[name]))), name
            count += int((moved[name] != tensor).sum())
        assert 0 < count < sum(tensor.numel() for tensor in base.values()) / 2


# ---- inner products


def displacements(model: PreTrainedModel, around: Neighbourhood) -> Tensor:
    """Every axis as one vector: [axes, weights] float64."""
    base, ways = weights(model), []
    for k in range(len(around.axes)):
        with around.at([float(k == j) for j in range(len(around.axes))]):
            moved = weights(model)
        ways.append(torch.cat([(moved[name].double() - base[name].double()).flatten() for name in base]))
    return torch.stack(ways)


@pytest.mark.parametrize("region", [False, True])
def test_gram(region: bool, folder: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbourhood, "PIECE", 500)
    model = load(folder, torch.float64)
    mask = tiny_units(model).mask(model, train=["scu", "cu"]) if region else None
    axes = [RandomAxis(SEED), TowardsAxis(str(tuned)), RandomAxis(5)]
    with Neighbourhood(model, axes, checkpoint=str(folder), region=mask) as around:
        expected = displacements(model, around)
        around.move([0.5, 0.5, 0.5])
        torch.testing.assert_close(around.gram(), expected @ expected.T, rtol=1e-12, atol=1e-10)


def test_orthogonal_axes(folder: Path) -> None:
    model = load(folder, torch.float64)
    base, axes = weights(model), [RandomAxis(SEED), RandomAxis(5)]
    moved = []
    for orthogonal in (False, True):
        with Neighbourhood(model, axes, checkpoint=str(folder), orthogonal=orthogonal) as around:
            for steps in ([1.0, 0.0], [0.0, 1.0]):
                with around.at(steps):
                    moved.append(weights(model))
            described = [axis["orthogonal_to"] for axis in around.describe()]
    first, skew, same_first, second = moved
    assert same(first, same_first) and described == [None, SEED]
    for name, tensor in base.items():
        if is_norm(name):
            continue
        one, two, three = ((x[name] - tensor).flatten() for x in (first, skew, second))
        square = tensor.square().sum().item()
        assert abs(one @ three) < 1e-12 * square < 1e-6 * abs(one @ two)
        assert three.norm().item() == pytest.approx(math.sqrt(square), rel=1e-12)
        assert three @ two > 0.9 * square


# ---- the way back


def test_after_an_error(folder: Path) -> None:
    model = load(folder)
    base, digest = weights(model), hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match="half way"):
        with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(folder)) as around, around.at([0.5]):
            assert not same(weights(model), base)
            raise RuntimeError("half way")
    assert same(weights(model), base)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_ctrl_c_while_it_moves(checkpoint: bool, inside: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    base, calls, perturb = weights(model), list[str](), ops.perturb_

    def interrupted(out: Tensor, *args: Any, **options: Any) -> None:
        perturb(out, *args, **options)
        calls.append(options["name"])
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(folder) if checkpoint else None) as around:
            monkeypatch.setattr(ops, "perturb_", interrupted)
            if inside:
                with around.at([0.5]):
                    pass
            around.move([0.5])
    assert len(calls) == 5 and same(weights(model), base)


def interrupt_restoring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Send SIGINT after the third tensor that is restored; returns the names of those that are."""
    done, restore = list[str](), neighbourhood._Weight.restore

    def interrupted(weight: Any) -> None:
        restore(weight)
        done.append(weight.name)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(neighbourhood._Weight, "restore", interrupted)
    return done


def test_ctrl_c_while_it_is_restored_is_heard_afterwards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    base = weights(model)
    with Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(folder)) as around:
        around.move([0.5])
        done = interrupt_restoring(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            around.restore()
        assert len(done) == len(base) and same(weights(model), base)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_stops_at_the_next_save_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    with stopping() as stop, Neighbourhood(model, [RandomAxis(SEED)], checkpoint=str(folder)) as around:
        around.move([0.5])
        interrupt_restoring(monkeypatch)
        around.restore()
        assert stop.requested == "SIGINT"


# ---- memory

MEMORY = """
import sys, torch
from transformers import AutoModelForCausalLM
from ssah_fast.neighbourhood import Neighbourhood, RandomAxis, TowardsAxis

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
base, tuned = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
for parameter in model.parameters():  # in memory of its own, not that of a mapped file
    parameter.data = parameter.data.clone()
small = torch.nn.Linear(2, 2)
with Neighbourhood(small, [RandomAxis(1)]) as around, around.at([0.5]):
    around.gram()  # what libraries need once
open("/proc/self/clear_refs", "w").write("5")
before = peak()
with Neighbourhood(model, [RandomAxis(1), TowardsAxis(tuned)], checkpoint=base) as around:
    for steps in ([0.5, 0], [0, 1], [0.1, 0.5]):
        with around.at(steps):
            pass
    moves = peak() - before
    around.gram()
print(moves, peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


def test_memory(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    for seed, name in enumerate(("base", "tuned")):
        tiny_model("llama", seed=seed, **shape, num_key_value_heads=8).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "base"), str(tmp_path / "tuned")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    moves, gram, total = (int(size) / 2**20 for size in done.stdout.split())
    # Measured: 3 to 6 for moves, where the largest tensor has 4 and a piece 1; 16 to 32 for eight pieces in float64.
    assert total > 190 and moves < 12 and gram < 64


# ---- what identifies an axis


def test_describe(folder: Path, tuned: Path, tmp_path: Path) -> None:
    model = load(folder)
    moved = Path(shutil.copytree(tuned, tmp_path / "elsewhere"))
    other = changed(tuned, tmp_path / "other", lambda tensors: tensors["lm_head.weight"].mul_(1.0001))
    axes = [RandomAxis(SEED), *(TowardsAxis(str(path)) for path in (tuned, moved, other))]
    with Neighbourhood(model, axes, checkpoint=str(folder)) as around:
        random, *towards = around.describe()
    assert random == {
        "kind": "random",
        "name": "random 123",
        "region": None,
        "seed": 123,
        "exclude": ["*norm*"],
        "orthogonal_to": None,
    }
    assert [entry.pop("name") for entry in towards] == [f"towards {path.name}" for path in (tuned, moved, other)]
    assert towards[0] == towards[1] != towards[2] and towards[0].keys() == {"kind", "region", "weights_sha256"}


# ---- what a user can get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["*norm*", "*nrom*"]}, r"exclude='\*nrom\*' matches no tensor"),
        ({"exclude": ["*"]}, r"exclude=\* leaves nothing to move"),
        ({"orthogonal": True}, "orthogonal=True is for two random axes, not for 1"),
        ({"region": Mask({"lm_head.bias": ("rows", [0])})}, "mask of another model: it names lm_head.bias"),
        ({"axes": [TowardsAxis("/nowhere/at all")]}, "'/nowhere/at all' does not exist"),
    ],
    ids=str,
)
def test_mistakes(options: dict[str, Any], message: str, folder: Path) -> None:
    model = load(folder)
    base = weights(model)
    with pytest.raises(SsahError, match=message) as error:
        Neighbourhood(model, **{"axes": [RandomAxis(SEED)], "checkpoint": str(folder)} | options)
    assert "\n" not in str(error.value) and same(weights(model), base)


@pytest.mark.parametrize("steps", [[], [0.1, 0.2], [math.nan], [math.inf]], ids=str)
def test_steps_that_are_none(steps: list[float], folder: Path) -> None:
    model = load(folder)
    with Neighbourhood(model, [RandomAxis(SEED)]) as around, pytest.raises(SsahError, match="not 1 finite numbers"):
        around.move(steps)


def test_checkpoints_of_other_models(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    tiny_model("llama", intermediate_size=56).save_pretrained(tmp_path / "wider")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    cases = {
        "wider": r"mlp.gate_proj.weight is \[56, 48\] in .*wider and \[52, 48\] here",
        "shallow": r"shallow has no model.layers.1.self_attn.q_proj.weight, which is \[48, 48\] here",
        "deep": "deep has model.layers.2.* which this model lacks",
    }
    for name, message in cases.items():
        with pytest.raises(SsahError, match=message):
            Neighbourhood(model, [TowardsAxis(str(tmp_path / name))], checkpoint=str(folder))


def test_a_tied_model_has_no_way_to_an_untied_one(folder: Path, tmp_path: Path) -> None:
    tied = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(SsahError, match=r"embed_tokens.weight and lm_head.weight are one tensor here, but not in"):
        Neighbourhood(tied, [TowardsAxis(str(folder))])
    tied.save_pretrained(tmp_path)
    model = load(folder)
    with Neighbourhood(model, [TowardsAxis(str(tmp_path))], checkpoint=str(folder)) as around, around.at([1]):
        assert torch.equal(model.lm_head.weight, tied.lm_head.weight)
        assert torch.equal(model.model.embed_tokens.weight, tied.lm_head.weight)


def test_weights_that_cannot_move(folder: Path) -> None:
    model = load(folder)
    projection = model.model.layers[1].mlp.up_proj
    whole = projection.weight
    with torch.no_grad():
        whole[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"model.layers.1.mlp.up_proj.weight cannot be moved at random"):
        Neighbourhood(model, [RandomAxis(SEED)])
    projection.weight = torch.nn.Parameter(whole.to(torch.int8), requires_grad=False)
    with pytest.raises(SsahError, match=r"up_proj.weight is torch.int8, and quantised weights cannot move"):
        Neighbourhood(model, [RandomAxis(SEED)])
    projection.weight = torch.nn.Parameter(whole.to("meta"))
    with pytest.raises(SsahError, match=r"up_proj.weight is not in memory"):
        Neighbourhood(model, [RandomAxis(SEED)])


# ---- on a GPU


@pytest.mark.gpu
@dtypes
def test_a_gpu_has_the_weights_of_the_cpu(dtype: torch.dtype, folder: Path, tuned: Path) -> None:
    places = ([0.5, 0.0], [0.0, 1.0], [0.0, 0.3])
    found = []
    for device in ("cpu", "cuda"):
        model = load(folder, dtype).to(device)
        base = weights(model)
        with Neighbourhood(model, [RandomAxis(SEED), TowardsAxis(str(tuned))], checkpoint=str(folder)) as around:
            for steps in places:
                around.move(steps)
                found.append(weights(model))
            gram = around.gram()
        assert same(weights(model), base) and gram[0, 0] > 0
    for on_cpu, on_gpu in zip(found[: len(places)], found[len(places) :], strict=True):
        for name in on_cpu:  # scales are sums in another order
            torch.testing.assert_close(on_gpu[name], on_cpu[name], rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert same(found[1], found[len(places) + 1])
