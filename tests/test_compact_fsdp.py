"""Compact training under FSDP2 on two gloo processes: what one process gives, bit by bit.

Both processes are this file, started once for all tests; each test looks at what one scenario left.
"""

import copy
import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_models import tiny_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ssah_fast.compaction import CompactConv1D, CompactLinear, compact, sync, uncompact
from ssah_fast.errors import SsahError
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW

WORLD = 2
FULL = StateDictOptions(full_state_dict=True)
# Lines that train, per weight of [48, 48], [53, 48] and so on: shards of 5 and 4 rows, 1 and 0 rows, columns.
LINES = {"gate_proj": ("rows", 9), "up_proj": ("rows", 1), "down_proj": ("columns", 9), "o_proj": ("columns", 1)}
GPT2_LINES = {"mlp.c_fc": ("columns", 9), "mlp.c_proj": ("rows", 9), "attn.c_proj": ("rows", 1)}


def make(model_type="llama", lines=LINES, seed=0, **options):
    """A compact tiny model and its mask; query, key and value weights are frozen as a whole in the first layer."""
    model = tiny_model(model_type, seed=seed, **({"intermediate_size": 53} if model_type == "llama" else {}))
    generator = torch.Generator().manual_seed(7)
    entries = {}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in lines if name.endswith(f"{kind}.weight")), None)
        if kind is not None:
            axis, count = lines[kind]
            entries[name] = (axis, torch.randperm(parameter.shape[axis == "columns"], generator=generator)[count:])
        elif "q_proj" in name or "layers.0.self_attn.v" in name:
            entries[name] = ("rows", None)
    mask = Mask(entries)
    return compact(model, mask, **options), mask


def shard(model, **options):
    mesh = init_device_mesh("cpu", (WORLD,))
    stack = model.model.layers if hasattr(model, "model") else model.transformer.h
    for layer in stack:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def optimizer_of(model, mask, kind):
    if kind == "masked":
        return MaskedAdamW(model.named_parameters(), mask=mask, lr=1e-2, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model, optimizer, seeds, rank=None):
    """Train on the same batch everywhere (the mean of two equal gradients is exact), or on one of each rank's own."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed if rank is None else 100 * rank + seed)
        ids = torch.randint(3, 90, (2, 11), generator=generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layers(model):
    return [module for module in model.modules() if isinstance(module, CompactLinear | CompactConv1D)]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_frozen(found, before, mask):
    for name, region in mask.items():
        old, new = before[name], found[name]
        if region.frozen is not None:
            old, new = (t.index_select(region.axis, region.frozen) for t in (old, new))
        assert torch.equal(old, new), name


def assert_in_step(model):
    for layer in layers(model):
        weight, leaf = layer.weight.full_tensor(), layer.trainable.full_tensor()
        assert torch.equal(weight.index_select(layer.region_axis, layer.region_index), leaf.to(weight.dtype))


def equal_to_one_process(model_type, lines, kind):
    model, mask = make(model_type, lines)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = copy.deepcopy(model)
    train(alone, optimizer_of(alone, mask, kind), range(3))
    shard(model)
    train(model, optimizer_of(model, mask, kind), range(3))
    found = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        assert_equal(found, alone.state_dict())
        assert_frozen(found, before, mask)
    assert_in_step(model)


def stock_optimizer(folder):
    equal_to_one_process("llama", LINES, "stock")


def masked_optimizer(folder):
    equal_to_one_process("llama", LINES, "masked")


def conv1d(folder):
    for kind in ("stock", "masked"):
        equal_to_one_process("gpt2", GPT2_LINES, kind)


def sharded_checkpoint(folder):
    for kind in ("stock", "masked"):
        whole, mask = make()
        shard(whole)
        optimizer = optimizer_of(whole, mask, kind)
        train(whole, optimizer, range(2), dist.get_rank())
        state = dict(zip(("model", "optimizer"), get_state_dict(whole, optimizer), strict=True))
        dcp.save(state, checkpoint_id=folder / kind)
        train(whole, optimizer, range(2, 4), dist.get_rank())

        resumed, _ = make(seed=1)
        shard(resumed)
        optimizer = optimizer_of(resumed, mask, kind)
        state = dict(zip(("model", "optimizer"), get_state_dict(resumed, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder / kind)
        set_state_dict(resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert_in_step(resumed)
        train(resumed, optimizer, range(2, 4), dist.get_rank())
        both = [get_model_state_dict(model, options=FULL) for model in (resumed, whole)]
        assert_equal(*both)


def full_checkpoint_of_a_plain_model(folder):
    model, _ = make()
    shard(model)
    other = tiny_model("llama", seed=1, intermediate_size=53).state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(other) if dist.get_rank() == 0 else {}, options=options)
    assert_in_step(model)
    found = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        assert_equal(found, other)


def mixed_precision_and_checkpointing(folder):
    model, mask = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    train(model, optimizer_of(model, mask, "masked"), range(3), dist.get_rank())
    assert_in_step(model)
    found = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        assert_frozen(found, before, mask)
        assert not torch.equal(
            found["model.layers.1.mlp.gate_proj.weight"], before["model.layers.1.mlp.gate_proj.weight"]
        )


def change_by_hand(folder):
    model, _ = make()
    shard(model)
    with torch.no_grad():
        for layer in layers(model):
            layer.trainable.to_local().add_(1.0)
    sync(model)
    assert_in_step(model)


def wrong_order(folder):
    model, mask = make()
    shard(model)
    assert isinstance(layers(model)[0].trainable, DTensor)
    with pytest.raises(SsahError, match="sharded by fully_shard; save its state_dict"):
        uncompact(model)
    plain = tiny_model("llama", intermediate_size=53)
    shard(plain)
    with pytest.raises(SsahError, match="is sharded; call compact before fully_shard"):
        compact(plain, mask)


SCENARIOS = (
    stock_optimizer,
    masked_optimizer,
    conv1d,
    sharded_checkpoint,
    full_checkpoint_of_a_plain_model,
    mixed_precision_and_checkpointing,
    change_by_hand,
    wrong_order,
)


def work(folder: Path, rank: int) -> None:
    """Run every scenario and write down what went wrong."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    failures = {}
    for scenario in SCENARIOS:
        try:
            scenario(folder / scenario.__name__)
            failures[scenario.__name__] = ""
        except Exception:  # goes to the test
            failures[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What each scenario raised, on each rank."""
    folder = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    if not all(file.exists() for file in files):
        pytest.fail("\n".join(errors))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_two_processes(scenario, failures):
    for rank, found in enumerate(failures):
        assert not found[scenario], f"rank {rank}: {found[scenario]}"


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
