"""MaskedAdamW on a GPU: no wait for the device, CUDA graphs, streams, a GradScaler, several devices.

Without a GPU, the emulated CUDA backend and the interpreted Triton backend run the same steps on CPU tensors, which the
host is kept from reading.
"""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends import targets, use
from torch import Tensor, nn

from ssah_fast import ops, optim
from ssah_fast.compaction import compact
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW, clip_grad_norm_

MASK = Mask({"0.weight": ("rows", [1, 2, 6]), "2.weight": ("columns", [0, 3])})
ROUNDINGS = pytest.mark.parametrize("rounding", ops.ROUNDINGS)
gpu = pytest.mark.gpu
CUDA = torch.device("cuda")


def model(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Three weights and biases; the last layer is float32."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4, bias=False), nn.Linear(4, 5)).to(dtype)
    layers[1].float()
    return layers.to(device)


def fill_gradients(module: nn.Module, seed: int, factor: float = 1.0) -> None:
    """Random gradients, written into the tensors that are there, as a captured backward pass does."""
    random = torch.Generator().manual_seed(seed)
    for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
        grad = (torch.randn(parameter.shape, generator=random) * factor).to(parameter.dtype)
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(grad)


def tensors(module: nn.Module, optimizer: MaskedAdamW) -> list[Tensor]:
    """Everything a step changes."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return [x.detach().cpu().clone() for x in (*module.parameters(), *states)]


def assert_identical(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def steps_of(optimizer: MaskedAdamW) -> set[float]:
    return {float(state["step"]) for state in optimizer.state.values()}


# ---- a device whose values the host does not read


@contextmanager
def unread(device: torch.device) -> Iterator[None]:
    """Any look of the host at a tensor's value raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def look(*args: Any) -> Any:
        raise AssertionError("the host read a tensor")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, look)
        yield


@pytest.fixture(params=[x for x in targets("masked_adamw_", reference=False) if x.values[0][0] in ("cuda", "triton")])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, or the CPU as if it were one."""
    chosen = use(request.param, monkeypatch)
    monkeypatch.setattr(ops, "read_by_host", lambda device: False)
    return chosen


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A context in which the reference computes, with lr and found_inf read by the host."""

    @contextmanager
    def reference() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSAH_FAST_BACKEND", "torch")
            patch.setattr(ops, "read_by_host", lambda device: True)
            yield

    return reference


@ROUNDINGS
def test_a_step_does_not_wait_and_gives_the_bits_of_the_reference(
    device: torch.device, on_host: Callable[[], Any], rounding: str
) -> None:
    """lr and found_inf change in place between the steps; the third is skipped, and so is the one with lr = 0."""
    settings = {"weight_decay": 0.1, "rounding": rounding, "amsgrad": rounding == "kahan", "mask": MASK}
    ours, twin = model(device), model()
    lr, found_inf = torch.tensor(0.1, device=device), torch.zeros(1, device=device)
    captured = MaskedAdamW(ours.named_parameters(), lr, capturable=True, **settings)
    eager = MaskedAdamW(twin.named_parameters(), 0.1, **settings)
    captured.grad_scale, captured.found_inf = torch.tensor(4.0, device=device), found_inf
    eager.grad_scale = torch.tensor(4.0)
    rates, founds = (0.1, 0.02, 0.02, 0.0, 0.3), (0.0, 0.0, 1.0, 0.0, 0.0)
    for i, (rate, found) in enumerate(zip(rates, founds, strict=True)):
        lr.fill_(rate)
        found_inf.fill_(found)
        eager.param_groups[0]["lr"], eager.found_inf = float(lr), torch.tensor([found])
        fill_gradients(ours, i)
        fill_gradients(twin, i)
        if i:  # the first step works out where things are
            with unread(device):
                captured.step()
        else:
            captured.step()
        with on_host():
            eager.step()
        assert_identical(tensors(ours, captured), tensors(twin, eager))
    assert steps_of(captured) == {3.0}
    assert all(state["step"].device == lr.device for state in captured.state.values())


def test_a_skipped_step_leaves_a_leaf_that_was_edited_by_hand_in_the_weight(device: torch.device) -> None:
    module = model(device)
    compact(module, Mask({"0.weight": ("rows", [1, 2, 6])}), max_fraction=1.0)
    layer = module.get_submodule("0")
    optimizer = MaskedAdamW(module.named_parameters(), 0.1)
    fill_gradients(module, 0)
    optimizer.step()
    with torch.no_grad():
        layer.trainable.fill_(7.0)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert (layer.weight.index_select(0, layer.region_index) == 7).all()


def test_check_grads_looks_and_a_skipped_step_is_no_mistake(device: torch.device) -> None:
    module = model(device)
    optimizer = MaskedAdamW(module.parameters(), 0.1, check_grads=True)
    fill_gradients(module, 0)
    module.get_parameter("0.weight").grad[0, 0] = math.inf
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    del optimizer.found_inf
    with pytest.raises(NonFiniteError, match="is inf"):
        optimizer.step()


def test_other_tensors_get_another_cache(device: torch.device, on_host: Callable[[], Any]) -> None:
    """A gradient that is missing for a step, state loaded, storage replaced: what was worked out is not used."""
    ours, twin = model(device), model()
    optimizers = [MaskedAdamW(m.named_parameters(), 0.1, mask=MASK, rounding="kahan") for m in (ours, twin)]

    def step(seed: int) -> None:
        for module, optimizer in zip((ours, twin), optimizers, strict=True):
            fill_gradients(module, seed)
            if seed == 1:
                module.get_parameter("0.bias").grad = None
            if seed == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if seed == 3:
                for parameter in module.parameters():
                    parameter.data = parameter.data.clone()
            if seed == 4:
                for state in optimizer.state.values():
                    state["exp_avg"].data = state["exp_avg"].data.clone()
        optimizers[0].step()
        with on_host():
            optimizers[1].step()
        assert_identical(tensors(ours, optimizers[0]), tensors(twin, optimizers[1]))

    for seed in range(6):
        step(seed)


def test_weights_that_are_not_contiguous(device: torch.device, on_host: Callable[[], Any]) -> None:
    ours, twin = model(device), model()
    optimizers = [MaskedAdamW(m.named_parameters(), 0.1, mask=MASK) for m in (ours, twin)]
    for module in (ours, twin):
        weight = module.get_parameter("0.weight")
        weight.data = weight.data.t().contiguous().t()
    for seed in range(3):
        for module in (ours, twin):
            fill_gradients(module, seed)
        optimizers[0].step()
        with on_host():
            optimizers[1].step()
        assert_identical(tensors(ours, optimizers[0]), tensors(twin, optimizers[1]))


# ---- what capturable accepts and refuses


def test_capturable_needs_a_gpu_as_torchs_does() -> None:
    module = model()
    fill_gradients(module, 0)
    before = copy.deepcopy(list(module.parameters()))
    optimizer = MaskedAdamW(module.named_parameters(), torch.tensor(0.1), capturable=True, foreach=True)
    with pytest.raises(SsahError, match=r"If capturable=True, params must be on a GPU; 0.weight is on cpu"):
        optimizer.step()
    assert_identical([x.detach() for x in module.parameters()], [x.detach() for x in before])
    with pytest.raises(
        AssertionError, match=r"If capturable=True, params and state_steps must be on supported devices"
    ):
        torch.optim.AdamW(module.parameters(), capturable=True).step()
    for kind in (MaskedAdamW, torch.optim.AdamW):
        kind(module.parameters(), fused=True, capturable=True).step()


def test_a_capture_needs_capturable_and_a_step_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    fill_gradients(module, 0)
    optimizer = MaskedAdamW(module.parameters(), capturable=True, fused=True)
    monkeypatch.setattr(optim, "_capturing", lambda device: True)
    with pytest.raises(SsahError, match="parameter 0 has no moments yet; run one step before capturing"):
        optimizer.step()
    monkeypatch.setattr(optim, "_capturing", lambda device: False)
    optimizer.step()
    monkeypatch.setattr(optim, "_capturing", lambda device: True)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    before = tensors(module, optimizer)
    with pytest.raises(SsahError, match="changed since the last step; run one before capturing"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = False
    with pytest.raises(SsahError, match=r"Attempting graph capture of step.* capturable is False"):
        optimizer.step()
    assert_identical(tensors(module, optimizer), before)


def test_what_a_graph_refers_to_outlives_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    optimizer = MaskedAdamW(module.parameters(), capturable=True, fused=True)
    for seed in range(3):
        fill_gradients(module, seed)
        monkeypatch.setattr(optim, "_capturing", lambda device, seed=seed: seed == 1)
        if seed == 2:
            module.get_parameter("0.bias").grad = None
        optimizer.step()
    ((vetted, cache),) = optimizer._captured
    assert cache["table"] is not None and len(vetted.tensors[0]) == len(cache["weights"]) == 5
    assert pickle.loads(pickle.dumps(optimizer))._captured == []


def test_the_choice_is_saved_with_the_group() -> None:
    optimizer = MaskedAdamW([nn.Parameter(torch.ones(2))], capturable=True)
    assert copy.deepcopy(optimizer).param_groups[0]["capturable"]
    assert optimizer.state_dict()["param_groups"][0]["capturable"]
    other = MaskedAdamW([nn.Parameter(torch.ones(2))])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["capturable"]  # as torch.optim.AdamW: groups come from the file


# ---- on a GPU


def captured_step(optimizer: MaskedAdamW) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@ROUNDINGS
def test_replays_of_a_captured_step_give_the_bits_of_eager_steps(
    monkeypatch: pytest.MonkeyPatch, backend: str, rounding: str
) -> None:
    """One whole step: two groups, a mask, clipping, lr as a tensor that changes between replays."""
    monkeypatch.setenv("SSAH_FAST_BACKEND", backend)
    modules, optimizers = [], []
    for _ in range(2):
        module, lr = model(CUDA), torch.tensor(0.1, device=CUDA)
        pairs = list(module.named_parameters())
        groups = [{"params": pairs[:2]}, {"params": pairs[2:], "weight_decay": 0.0}]
        made = MaskedAdamW(groups, lr, weight_decay=0.1, mask=MASK, rounding=rounding, amsgrad=True, capturable=True)
        modules.append(module)
        optimizers.append(made)
        fill_gradients(module, 0)
        made.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clip_grad_norm_(optimizers[0], 0.5)
        optimizers[0].step()
    for seed in range(1, 6):
        for module, optimizer in zip(modules, optimizers, strict=True):
            fill_gradients(module, seed)
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 / seed)
        graph.replay()
        clip_grad_norm_(optimizers[1], 0.5)
        optimizers[1].step()
        assert_identical(*(tensors(m, o) for m, o in zip(modules, optimizers, strict=True)))
        assert steps_of(optimizers[0]) == {1.0 + seed}


@gpu
def test_a_graph_outlives_eager_steps_of_other_tensors() -> None:
    """What the graph refers to stays, although the optimizer has worked out another list in the meantime."""
    module, twin = model(CUDA), model(CUDA)
    optimizers = [MaskedAdamW(m.named_parameters(), 0.1, mask=MASK, capturable=True) for m in (module, twin)]
    for m, optimizer in zip((module, twin), optimizers, strict=True):
        fill_gradients(m, 0)
        optimizer.step()
    graph = captured_step(optimizers[0])
    for m, optimizer in zip((module, twin), optimizers, strict=True):
        kept = m.get_parameter("0.bias").grad
        m.get_parameter("0.bias").grad = None
        optimizer.step()
        m.get_parameter("0.bias").grad = kept
    junk = [torch.randn(1 << k, device=CUDA) for k in range(4, 16)]
    for seed in (1, 2):
        for m in (module, twin):
            fill_gradients(m, seed)
        graph.replay()
        optimizers[1].step()
    assert_identical(tensors(module, optimizers[0]), tensors(twin, optimizers[1]))
    assert len(junk) == 12


@gpu
def test_capture_without_a_step_before_it_is_refused() -> None:
    module = model(CUDA)
    fill_gradients(module, 0)
    with pytest.raises(SsahError, match="run one step before capturing"):
        captured_step(MaskedAdamW(module.parameters(), capturable=True))
    eager = MaskedAdamW(module.parameters())
    eager.step()
    with pytest.raises(SsahError, match="capturable is False"):
        captured_step(eager)


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The step runs on the current stream: work of another stream that it does not wait for cannot reach it."""
    monkeypatch.setenv("SSAH_FAST_BACKEND", backend)
    results = []
    for own in (False, True):
        module, stream = model(CUDA), torch.cuda.Stream() if own else torch.cuda.current_stream()
        optimizer = MaskedAdamW(module.named_parameters(), 0.1, mask=MASK)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for seed in range(3):
                if own:
                    torch.cuda._sleep(10_000_000)
                fill_gradients(module, seed)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        results.append(tensors(module, optimizer))
    assert_identical(*results)


@gpu
def test_a_grad_scaler_skips_without_a_wait() -> None:
    module, twin = model(CUDA, torch.float32), model(CUDA, torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    optimizer, plain = (MaskedAdamW(m.named_parameters(), 0.1, mask=MASK) for m in (module, twin))
    for step, factor in enumerate((1.0, math.inf, 1.0)):
        scaler.scale(sum((p * factor).sum() for p in module.parameters())).backward()
        if step:
            with unread(CUDA):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert steps_of(optimizer) == {2.0} and scaler.get_scale() == 512.0
    for _ in range(2):
        for parameter in twin.parameters():
            parameter.grad = torch.ones_like(parameter)
        plain.step()
    assert_identical(tensors(module, optimizer), tensors(twin, plain))


@gpu
@ROUNDINGS
def test_a_run_moves_between_the_devices(rounding: str) -> None:
    """A state dict and a pickle of the CPU go on on the GPU with the same bits, and back; old step counts follow."""
    home = model()
    optimizer = MaskedAdamW(home.named_parameters(), 0.1, mask=MASK, rounding=rounding)
    fill_gradients(home, 0)
    optimizer.step()
    away = model(CUDA)
    away.load_state_dict(home.state_dict())
    second = MaskedAdamW(away.named_parameters(), 0.1, mask=MASK, rounding=rounding)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert {state["step"].device.type for state in second.state.values()} == {"cuda"}
    for state in second.state.values():
        state["step"] = state["step"].cpu()  # as older versions had it
    second.__setstate__(second.__getstate__())
    assert {state["step"].device.type for state in second.state.values()} == {"cuda"}
    for seed in (1, 2):
        for module, made in ((home, optimizer), (away, second)):
            fill_gradients(module, seed)
            made.step()
    assert_identical(tensors(home, optimizer), tensors(away, second))
    optimizer.load_state_dict(second.state_dict())
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}


@gpu
def test_devices_and_dtypes_in_one_group() -> None:
    parts = [model("cpu"), model(CUDA, torch.float16), model(CUDA, torch.float64), model(CUDA)]
    together = [parameter for part in parts for parameter in part.parameters()]
    alone = copy.deepcopy(parts)
    for part, twin in zip(parts, alone, strict=True):
        fill_gradients(part, 0)
        fill_gradients(twin, 0)
    lr = torch.tensor(0.1, dtype=torch.float64, device=CUDA)
    mixed = MaskedAdamW(together, lr, rounding="nearest")
    mixed.grad_scale, mixed.found_inf = torch.tensor(2.0, device=CUDA), torch.zeros((), device=CUDA)
    separate = [MaskedAdamW(part.parameters(), 0.1, rounding="nearest") for part in alone]
    for _ in range(2):
        mixed.step()
        for optimizer in separate:
            optimizer.grad_scale = torch.tensor(2.0)
            optimizer.step()
    states = [{id(p): s for p, s in o.state.items()} for o in separate]
    for part, twin, own in zip(parts, alone, states, strict=True):
        for parameter, other in zip(part.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, other)
            assert mixed.state[parameter]["step"].device == parameter.device
            assert torch.equal(mixed.state[parameter]["exp_avg"], own[id(other)]["exp_avg"])


@gpu
def test_migrate_mask_on_a_gpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        module = model(device)
        optimizer = MaskedAdamW(module.named_parameters(), 0.1, mask=MASK, rounding="master")
        fill_gradients(module, 0)
        optimizer.step()
        optimizer.migrate_mask(Mask({"0.weight": ("rows", [0, 2]), "2.weight": ("columns", [2])}))
        fill_gradients(module, 1)
        optimizer.step()
        results.append(tensors(module, optimizer))
    assert_identical(*results)
