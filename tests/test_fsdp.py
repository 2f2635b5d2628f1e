"""MaskedAdamW under FSDP2: two gloo processes do what one process does, and checkpoints come back exact.

Starting the processes takes most of the time, so all checks share one launch and one test, which names what failed.
"""

import contextlib
import copy
import functools
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_models import tiny_model
from tiny_units import frozen_elements
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException, spawn

from ssah_fast.compaction import compact
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW, clip_grad_norm_, trainer_kwargs

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
VALUE, EMBEDDING = "model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"


def llama(dtype: torch.dtype) -> nn.Module:
    """Odd sizes, so that the shards are uneven."""
    return tiny_model("llama", dtype, vocab_size=97, intermediate_size=51).train()


LLAMA_MASK = Mask(
    {
        UP: ("rows", range(3, 40)),
        DOWN: ("columns", range(3, 40)),
        VALUE: ("rows", range(9, 16)),  # nothing of it trains on rank 1
        EMBEDDING: ("rows", [0, 50, 96]),
        "model.norm.weight": ("rows", None),
        "model.layers.0.input_layernorm.weight": ("rows", [0, 47]),
    }
)


class Narrow(nn.Module):
    """Parameters of one row, of which one rank holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


NARROW_MASK = Mask({"first.weight": ("columns", [1]), "first.bias": ("rows", [0, 1]), "last.weight": ("columns", [2])})


class Experts(nn.Module):
    """Three stacks of five experts: rank 0 holds three, rank 1 two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.bias, self.down = (nn.Parameter(torch.randn(5, *shape)) for shape in ((6, 4), (6,), (4, 6)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("nh,eih->nei", x, self.up) + self.bias)
        return torch.einsum("nei,ehi->nh", hidden, self.down)


ROWS = torch.rand(5, 6, generator=torch.Generator().manual_seed(2)) < 0.4
ROWS[1] = True
COLUMNS = torch.cat([ROWS[:3], torch.ones(2, 6, dtype=torch.bool)])  # nothing of it trains on rank 1
EXPERTS_MASK = Mask({"up": ("rows", ROWS), "bias": ("rows", ROWS), "down": ("columns", COLUMNS)})


def experts_loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def llama_loss(model: nn.Module, step: int) -> Tensor:
    ids = torch.randint(6, 90, (2, 8), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids).loss


def narrow_loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def shard(model: nn.Module) -> nn.Module:
    for layer in getattr(getattr(model, "model", None), "layers", []):
        fully_shard(layer)
    return fully_shard(model)


def optimizer_of(model: nn.Module, mask: Mask, **options) -> MaskedAdamW:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return MaskedAdamW(named, lr=1e-2, weight_decay=0.1, mask=mask, seed=4, **options)


def train(model: nn.Module, optimizer: MaskedAdamW, loss: Callable, steps: range, clip: float | None = None) -> list:
    norms = []
    for step in steps:
        loss(model, step).backward()
        if clip is not None:
            norms.append(clip_grad_norm_(optimizer, clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, x in model.state_dict().items():
        assert torch.equal(whole(x), expected[name]), name


def assert_same_state(a: MaskedAdamW, b: MaskedAdamW) -> None:
    first, second = a.state_dict()["state"], b.state_dict()["state"]
    assert first.keys() == second.keys()
    for key, state in first.items():
        for name, value in state.items():
            assert torch.equal(whole(value), whole(second[key][name])), (key, name)


def assert_frozen(model: nn.Module, before: dict[str, Tensor], mask: Mask) -> None:
    for name in mask:
        now, then = whole(model.state_dict()[name]), before[name]
        frozen = frozen_elements(mask, name, then.shape)
        assert torch.equal(now[frozen], then[frozen]), name


PROBLEMS = {
    "llama": (llama, llama_loss, LLAMA_MASK),
    "narrow": (lambda dtype: Narrow().to(dtype), narrow_loss, NARROW_MASK),
    "experts": (lambda dtype: Experts().to(dtype), experts_loss, EXPERTS_MASK),
}


def equals_one_process(rank: int, folder: Path) -> None:
    """Both ranks see the same data, so that the mean of the gradients is exact: every bit must agree."""
    for make, loss, mask in PROBLEMS.values():
        for dtype, options in (
            (torch.float32, {"amsgrad": True}),
            (torch.bfloat16, {}),
            (torch.bfloat16, {"rounding": "kahan"}),
            (torch.bfloat16, {"rounding": "master"}),
        ):
            single = make(dtype)
            before = copy.deepcopy(single.state_dict())
            sharded = shard(copy.deepcopy(single))
            optimizers = [optimizer_of(model, mask, **options) for model in (single, sharded)]
            for model, optimizer in zip((single, sharded), optimizers, strict=True):
                train(model, optimizer, loss, range(4))
            assert_same_weights(sharded, single.state_dict())
            assert_frozen(sharded, before, mask)
            assert not torch.equal(next(iter(before.values())), next(iter(single.state_dict().values())))
            state = (optimizers[1].state[parameter].values() for parameter in sharded.parameters())
            assert not any(isinstance(x, DTensor) for values in state for x in values)


def clips_as_one_process(rank: int, folder: Path) -> None:
    for make, loss, mask in PROBLEMS.values():
        single = make(torch.float32)
        sharded = shard(copy.deepcopy(single))
        for norm_type in (2.0, float("inf")):
            norms = []
            for model in (single, sharded):
                loss(model, 0).backward()
                norms.append(clip_grad_norm_(model, 1e-3, norm_type, mask=mask).item())
                norms.append(clip_grad_norm_(optimizer_of(model, mask), 1e-3, norm_type).item())
            assert norms[0] == pytest.approx(norms[2], rel=1e-5) and norms[1] == pytest.approx(1e-3, rel=1e-3), norms
            assert norms[3] == pytest.approx(1e-3, rel=1e-3)
            for a, b in zip(single.parameters(), sharded.parameters(), strict=True):
                torch.testing.assert_close(whole(b.grad), a.grad, rtol=1e-4, atol=1e-8)
                a.grad = b.grad = None


def silences_frozen_gradients(rank: int, folder: Path) -> None:
    """trainer_kwargs on a model that is sharded already."""
    for make, loss, mask in (PROBLEMS["llama"], PROBLEMS["experts"]):
        model = shard(make(torch.float32))
        factory, arguments = trainer_kwargs(mask, lr=1e-2, compact=False)["optimizer_cls_and_kwargs"]
        optimizer = factory()(model, **arguments)
        loss(model, 0).backward()
        for name, region in mask.items():
            grad = model.get_parameter(name).grad
            if region.frozen is None:
                assert grad is None
            else:
                assert not whole(grad)[frozen_elements(mask, name, grad.shape)].any()
                assert whole(grad).any()
        optimizer.step()


def different_data_per_rank(rank: int, folder: Path) -> None:
    """The mean over ranks is that over both batches; the frozen part is exact all the same."""
    single = llama(torch.float32)
    before = copy.deepcopy(single.state_dict())
    sharded = shard(copy.deepcopy(single))
    mask = LLAMA_MASK
    one, two = (optimizer_of(model, mask, rounding="nearest") for model in (single, sharded))
    for step in range(3):
        for part in range(2):
            (llama_loss(single, 2 * step + part) / 2).backward()
        llama_loss(sharded, 2 * step + rank).backward()
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
    assert_frozen(sharded, before, mask)
    expected = single.state_dict()
    for name, x in sharded.state_dict().items():
        torch.testing.assert_close(whole(x), expected[name], rtol=1e-3, atol=2e-4)


def checkpoint(rank: int, folder: Path, build: Callable, loss: Callable, mask: Mask, **options) -> None:
    """Sharded and full, through torch.distributed.checkpoint: the same state, and the same run after it."""
    model, full = shard(build()), StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = optimizer_of(model, mask, **options)
    train(model, optimizer, loss, range(2))
    saved = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=str(folder))
    whole_model, whole_state = copy.deepcopy(
        (get_model_state_dict(model, options=full), get_optimizer_state_dict(model, optimizer, options=full))
    )

    sharded = shard(build())
    second = optimizer_of(sharded, mask, **options)
    target = {"model": get_model_state_dict(sharded), "optim": get_optimizer_state_dict(sharded, second)}
    dcp.load(target, checkpoint_id=str(folder))
    set_model_state_dict(sharded, target["model"])
    set_optimizer_state_dict(sharded, second, target["optim"])
    assert_same_state(optimizer, second)

    broadcast = shard(build())
    third = optimizer_of(broadcast, mask, **options)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(broadcast, copy.deepcopy(whole_model), options=from_rank_0)
    set_optimizer_state_dict(broadcast, third, copy.deepcopy(whole_state), options=from_rank_0)
    assert_same_state(optimizer, third)

    for m, o in ((model, optimizer), (sharded, second), (broadcast, third)):
        train(m, o, loss, range(2, 4))
    expected = {name: whole(x) for name, x in model.state_dict().items()}
    assert_same_weights(sharded, expected)
    assert_same_weights(broadcast, expected)
    if rank == 0:  # one process goes on where two stopped
        single = build()
        single.load_state_dict(whole_model)
        alone = optimizer_of(single, mask, **options)
        set_optimizer_state_dict(single, alone, whole_state, options=StateDictOptions(full_state_dict=True))
        train(single, alone, loss, range(2, 4))
        assert_same_weights(single, expected)


def state_dict_round_trips(rank: int, folder: Path) -> None:
    for label, (make, loss, mask) in PROBLEMS.items():
        for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"rounding": "kahan"}), (torch.bfloat16, {})):
            path = folder / f"{label}-{dtype}-{len(options)}"
            checkpoint(rank, path, functools.partial(make, dtype), loss, mask, **options)


def from_one_process_to_two(rank: int, folder: Path) -> None:
    """The compact state of one process is cut to the shards."""
    for make, loss, mask in PROBLEMS.values():
        single = make(torch.bfloat16)
        one = optimizer_of(single, mask)
        train(single, one, loss, range(2))
        saved = copy.deepcopy(get_optimizer_state_dict(single, one))
        sharded = shard(copy.deepcopy(single))
        two = optimizer_of(sharded, mask)
        set_optimizer_state_dict(sharded, two, saved, options=StateDictOptions(full_state_dict=True))
        for model, optimizer in ((single, one), (sharded, two)):
            train(model, optimizer, loss, range(2, 4))
        assert_same_weights(sharded, single.state_dict())


def compact_layers(rank: int, folder: Path) -> None:
    """A compact, sharded model ends with the bits of a compact one in one process."""
    for dtype in (torch.float32, torch.bfloat16):
        single = compact(llama(dtype), LLAMA_MASK)
        before = copy.deepcopy(single.state_dict())
        sharded = shard(compact(llama(dtype), LLAMA_MASK))
        for model in (single, sharded):
            train(model, optimizer_of(model, LLAMA_MASK), llama_loss, range(3))
        assert_same_weights(sharded, single.state_dict())
        assert_frozen(sharded, before, LLAMA_MASK)


def compact_checkpoints(rank: int, folder: Path) -> None:
    checkpoint(rank, folder / "compact", lambda: compact(llama(torch.bfloat16), LLAMA_MASK), llama_loss, LLAMA_MASK)


def swapped_parameters(rank: int, folder: Path) -> None:
    """accelerate builds the optimizer before it shards and then replaces the parameters in the groups."""
    single, model = llama(torch.float32), llama(torch.float32)
    one, two = optimizer_of(single, LLAMA_MASK), optimizer_of(model, LLAMA_MASK)
    shard(model)
    now = dict(model.named_parameters())
    group = two.param_groups[0]
    group["params"][:] = [now[name] for name in group["param_names"]]
    for m, o in ((single, one), (model, two)):
        train(m, o, llama_loss, range(2))
    assert_same_weights(model, single.state_dict())


CHECKS = (
    equals_one_process,
    clips_as_one_process,
    silences_frozen_gradients,
    different_data_per_rank,
    state_dict_round_trips,
    from_one_process_to_two,
    compact_layers,
    compact_checkpoints,
    swapped_parameters,
)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for check in CHECKS:
        report = Path(folder, f"{check.__name__}.{rank}")
        report.write_text("never finished")
        try:
            check(rank, Path(folder))
        except BaseException:
            report.write_text(traceback.format_exc())
            raise
        report.write_text("")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    # The reports say what failed; a rank whose peer is gone only aborts.
    with contextlib.suppress(ProcessException):
        spawn(worker, (str(tmp_path),), nprocs=2)
    reports = {f"{check.__name__}.{rank}": tmp_path / f"{check.__name__}.{rank}" for check in CHECKS for rank in (0, 1)}
    texts = {name: path.read_text() if path.exists() else "never started" for name, path in reports.items()}
    assert not any(texts.values()), "\n".join(f"{name}: {text}" for name, text in texts.items() if text)
