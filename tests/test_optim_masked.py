"""MaskedAdamW under a mask: what is frozen keeps its bits, what trains trains as without a mask, and runs resume."""

import copy
import io
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ssah_fast.compaction import CompactLinear, compact
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.masks import Mask, Region
from ssah_fast.optim import MaskedAdamW, clip_grad_norm_, trainer_kwargs

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


class Layers(nn.Module):
    """One layer per layout: rows, columns, the value rows of a fused projection, and a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.qkv = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 18)
        self.conv = Conv1D(6, 18)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(torch.tanh(self.qkv(x + self.down(torch.relu(self.up(x)))))))


LAYERS_MASK = Mask(
    {
        "up.weight": ("rows", [0, 3, 9]),
        "up.bias": ("rows", [0, 3, 9]),
        "down.weight": ("columns", [0, 3, 9]),
        "qkv.weight": ("rows", range(12, 18)),
        "conv.weight": ("rows", [1, 2]),
        "conv.bias": ("rows", None),
        "norm.weight": ("rows", [5]),
    }
)


def llama_mask() -> Mask:
    return Mask({UP: ("rows", [1, 5, 7]), DOWN: ("columns", [1, 5, 7]), NORM: ("rows", None)})


def frozen_part(name: str, tensor: Tensor, mask: Mask) -> Tensor:
    region = mask[name]
    return tensor if region.frozen is None else tensor.index_select(region.axis, region.frozen)


def assert_frozen(model: nn.Module, before: dict[str, Tensor], mask: Mask) -> None:
    for name in mask:
        now, then = (frozen_part(name, x, mask) for x in (model.get_parameter(name).detach(), before[name]))
        assert torch.equal(now.view(torch.uint8), then.view(torch.uint8)), name


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def random_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = scale * torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter.dtype) if parameter.requires_grad else None


def through_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal_models(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_bits_survive_2000_steps_and_a_resume(dtype):
    """Weight decay 0.1, momentum, two micro-batches per step, and a fresh optimizer from a file in the middle."""
    model = Layers().to(dtype)
    before = weights(model)
    options = {"lr": 1e-2, "weight_decay": 0.1, "mask": LAYERS_MASK}
    optimizer = MaskedAdamW(model.named_parameters(), **options)
    data = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    for step in range(2000):
        if step == 1000:
            saved = through_file(optimizer.state_dict())
            optimizer = MaskedAdamW(model.named_parameters(), **options)
            optimizer.load_state_dict(saved)
        for micro_batch in (data[step % 8], data[(step + 1) % 8]):
            model(micro_batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_frozen(model, before, LAYERS_MASK)
    assert all(not torch.equal(before[n], x) for n, x in model.state_dict().items() if n != "conv.bias")


@st.composite
def problems(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    frozen = draw(st.lists(st.integers(0, shape[axis] - 1), unique=True, max_size=shape[axis]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    rounding = draw(st.sampled_from(["stochastic", "kahan", "master", "nearest"]))
    options = {"amsgrad": draw(st.booleans()), "maximize": draw(st.booleans()), "rounding": rounding}
    return shape, axis, frozen, dtype, options, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_rest_trains_as_if_it_were_alone(problem):
    """The trainable slice ends with the same bits as the same numbers in a parameter of their own."""
    shape, axis, frozen, dtype, options, contiguous = problem
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator).to(dtype)
    whole = nn.Parameter((start if contiguous else start.mT.contiguous().mT if start.dim() > 1 else start).clone())
    mask = Mask({"w": (axis, frozen), "other": ("rows", [0])})
    trainable = mask["w"].trainable(shape[axis])
    alone = nn.Parameter(start.index_select(axis, trainable))
    optimizers = [
        MaskedAdamW([("w", whole), ("b", nn.Parameter(torch.ones(1)))], 0.1, weight_decay=0.1, mask=mask, **options),
        MaskedAdamW([("w", alone)], 0.1, weight_decay=0.1, **options),
    ]
    for _ in range(3):
        grad = torch.randn(shape, generator=generator).to(dtype)
        whole.grad, alone.grad = grad, grad.index_select(axis, trainable)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole.detach().index_select(axis, trainable), alone.detach())
    index = torch.tensor(sorted(frozen), dtype=torch.int64)
    assert torch.equal(whole.detach().index_select(axis, index), start.index_select(axis, index))
    for key, value in optimizers[0].state[whole].items() if len(trainable) else ():
        assert torch.equal(value, optimizers[1].state[alone][key])


def test_state_holds_trainable_elements_only():
    model = tiny_model("llama", torch.bfloat16)
    optimizer = MaskedAdamW(model.named_parameters(), mask=llama_mask(), amsgrad=True, rounding="master")
    assert not optimizer.state
    random_gradients(model, 0)
    optimizer.step()
    state = optimizer.state[model.get_parameter(DOWN)]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"}
    assert state["step"].dtype == torch.float32 and state["step"].shape == () and state["step"] == 1
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"):
        assert state[key].shape == (48, 49) and state[key].dtype == torch.float32
    assert optimizer.state[model.get_parameter(UP)]["exp_avg"].shape == (49, 48)
    assert set(optimizer.state[model.get_parameter(NORM)]) == {"step"}
    assert optimizer.state[model.get_parameter(EMBEDDING)]["exp_avg"].shape == (96, 48)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master", "nearest"])
def test_a_resumed_run_ends_with_the_same_bits(rounding):
    options = {"lr": 1e-2, "mask": llama_mask(), "rounding": rounding, "seed": 5}
    straight = tiny_model("llama", torch.bfloat16)
    optimizer = MaskedAdamW(straight.named_parameters(), **options)
    resumed = None
    for step in range(4):
        if step == 2:
            resumed = copy.deepcopy(straight)
            second = MaskedAdamW(resumed.named_parameters(), **options)
            second.load_state_dict(through_file(optimizer.state_dict()))
        random_gradients(straight, step)
        optimizer.step()
        if resumed is not None:
            random_gradients(resumed, step)
            second.step()
    assert equal_models(straight, resumed)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        for key, value in optimizer.state.get(a, {}).items():
            assert value.dtype == second.state[b][key].dtype and torch.equal(value, second.state[b][key])


def test_loading_shares_no_memory_and_runs_the_hooks():
    model = tiny_model("llama", torch.bfloat16)
    optimizer = MaskedAdamW(model.named_parameters(), mask=llama_mask())
    random_gradients(model, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    other = MaskedAdamW(model.named_parameters(), mask=llama_mask())
    seen = []

    def halve(_, state_dict):
        state = {k: {**v, "exp_avg": v.get("exp_avg", torch.ones(())) / 2} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[model.get_parameter(UP)]["exp_avg"].clone()))
    other.load_state_dict(saved)
    expected = optimizer.state[model.get_parameter(UP)]["exp_avg"] / 2
    assert torch.equal(seen[0], expected)
    other.step()
    assert torch.equal(optimizer.state[model.get_parameter(UP)]["exp_avg"], 2 * expected)


def test_deepcopy_and_pickle_keep_the_mask():
    model = Layers()
    optimizer = MaskedAdamW(model.named_parameters(), mask=LAYERS_MASK, rounding="kahan")
    random_gradients(model, 0)
    optimizer.step()
    both = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    random_gradients(model, 1)
    optimizer.step()
    for other, second in both:
        assert second.mask == LAYERS_MASK
        before = weights(other)
        random_gradients(other, 1)
        second.step()
        assert_frozen(other, before, LAYERS_MASK)
        assert equal_models(model, other)


def test_state_of_torch_adamw_is_cut_to_the_mask():
    model = tiny_model("llama")
    theirs = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    random_gradients(model, 0)
    theirs.step()
    optimizer = MaskedAdamW(model.named_parameters(), mask=llama_mask())
    optimizer.load_state_dict(theirs.state_dict())
    down = model.get_parameter(DOWN)
    trainable = llama_mask()[DOWN].trainable(52)
    expected = theirs.state[down]["exp_avg"].index_select(1, trainable)
    assert torch.equal(optimizer.state[down]["exp_avg"], expected)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["mask"] == llama_mask().sha256
    before = weights(model)
    random_gradients(model, 1)
    optimizer.step()
    assert_frozen(model, before, llama_mask())


def test_loading_refuses_another_mask_and_other_parameters():
    model = Layers()
    optimizer = MaskedAdamW(model.named_parameters(), mask=LAYERS_MASK)
    random_gradients(model, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    for mask in (None, LAYERS_MASK - Mask({"up.weight": ("rows", [0])})):
        other = MaskedAdamW(model.named_parameters(), mask=mask)
        with pytest.raises(SsahError, match=r"saved with mask .* has (no )?mask.* call migrate_mask$"):
            other.load_state_dict(saved)
        assert not other.state
    reordered = MaskedAdamW(reversed(list(model.named_parameters())), mask=LAYERS_MASK)
    with pytest.raises(SsahError, match=r"it has up.weight where this optimizer has norm.bias; build it from the same"):
        reordered.load_state_dict(saved)
    saved["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(SsahError, match=r"exp_avg of up.weight has shape \[3\]; expected \[7, 6\] or.* \[10, 6\]$"):
        MaskedAdamW(model.named_parameters(), mask=LAYERS_MASK).load_state_dict(saved)


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_migrate_mask_keeps_the_moments_of_what_stays_trainable(rounding):
    old, new = Mask({"w": ("rows", [0, 1])}), Mask({"w": ("columns", [2])})
    parameter = nn.Parameter(torch.randn(4, 3).bfloat16())
    optimizer = MaskedAdamW([("w", parameter)], 0.1, mask=old, rounding=rounding)
    parameter.grad = torch.randn(4, 3).bfloat16()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    weight = parameter.detach().clone()
    optimizer.migrate_mask(new)
    after = optimizer.state[parameter]
    assert after["step"] == 1 and optimizer.mask is new
    assert torch.equal(after["exp_avg"][2:], before["exp_avg"][:, :2]) and not after["exp_avg"][:2].any()
    if rounding == "master":
        assert torch.equal(after["master"][2:], before["master"][:, :2])
        assert torch.equal(after["master"][:2], weight[:2, :2].float())
    optimizer.step()
    assert torch.equal(parameter[:, 2], weight[:, 2]) and not torch.equal(parameter[:2, :2], weight[:2, :2])
    MaskedAdamW([("w", parameter)], mask=new, rounding=rounding).load_state_dict(optimizer.state_dict())
    optimizer.migrate_mask(None)
    assert optimizer.state[parameter]["exp_avg"].shape == (4, 3)
    assert optimizer.param_groups[0]["mask"] == ""


def test_migrate_mask_to_frozen_drops_the_state():
    parameters = [("w", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(2)))]
    optimizer = MaskedAdamW(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.migrate_mask(Mask({"w": ("rows", None)}))
    assert set(optimizer.state[parameters[0][1]]) == {"step"} and "exp_avg" in optimizer.state[parameters[1][1]]
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(SsahError, match="nothing is left to train"):
        optimizer.migrate_mask(Mask({"w": ("rows", None), "b": ("rows", None)}))
    assert optimizer.mask == Mask({"w": ("rows", None)})
    with pytest.raises(SsahError, match="needs the names"):
        MaskedAdamW([parameters[0][1]]).migrate_mask(Mask({"w": ("rows", [0])}))


def test_one_clear_error_for_a_mask_that_does_not_fit():
    model = Layers()
    with pytest.raises(SsahError, match=r"pass model.named_parameters\(\)"):
        MaskedAdamW(model.parameters(), mask=LAYERS_MASK)
    with pytest.raises(SsahError, match="mask is a dict"):
        MaskedAdamW(model.named_parameters(), mask={"up.weight": ("rows", [0])})
    with pytest.raises(SsahError, match="mask of another model"):
        MaskedAdamW(model.named_parameters(), mask=Mask({"elsewhere": ("rows", [0])}))
    for entry in (("rows", [10]), ("columns", [6]), (2, [0]), Region(0, torch.tensor([0]), 11)):
        with pytest.raises(SsahError, match=r"up.weight has the shape \[10, 6\]"):
            MaskedAdamW(model.named_parameters(), mask=Mask({"up.weight": entry}))
    with pytest.raises(SsahError, match="nothing is left to train"):
        MaskedAdamW(model.named_parameters(), mask=Mask({n: ("rows", None) for n, _ in model.named_parameters()}))


def test_a_compact_layer_of_another_mask_is_refused():
    model = compact(tiny_model("llama"), llama_mask(), max_fraction=1.0)
    MaskedAdamW(model.named_parameters(), mask=llama_mask())
    for other in (Mask({DOWN: ("columns", [1, 5])}), Mask({DOWN: ("rows", [1, 5, 7])}), Mask({NORM: ("rows", [1])})):
        with pytest.raises(SsahError, match="was made compact for another mask; give compact the same one"):
            MaskedAdamW(model.named_parameters(), mask=other)


def test_absent_parameters_are_fine_and_wrappers_do_not_matter():
    model = Layers()
    for parameter in model.up.parameters():
        parameter.requires_grad_(False)
    named = [(f"module.{n}", p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = MaskedAdamW(named, mask=LAYERS_MASK, lr=0.1)
    before = weights(model)
    random_gradients(model, 0)
    optimizer.step()
    assert_frozen(model, before, LAYERS_MASK)
    assert torch.equal(model.up.weight, before["up.weight"]) and not torch.equal(
        model.down.weight, before["down.weight"]
    )


def test_a_later_group_is_masked_too():
    model = Layers()
    optimizer = MaskedAdamW(model.qkv.named_parameters(prefix="qkv"), mask=LAYERS_MASK, lr=0.1)
    optimizer.add_param_group({"params": list(model.up.named_parameters(prefix="up")), "lr": 0.2})
    with pytest.raises(SsahError, match=r"conv.weight has the shape \[1, 4\]"):
        optimizer.add_param_group({"params": [("conv.weight", nn.Parameter(torch.ones(1, 4)))]})
    assert len(optimizer.param_groups) == 2
    before = weights(model)
    random_gradients(model, 0)
    optimizer.step()
    assert_frozen(model, before, LAYERS_MASK)
    assert not torch.equal(model.up.weight, before["up.weight"])


def test_what_cannot_be_trained_is_refused_before_anything_changes():
    fine = nn.Parameter(torch.ones(2, 2))
    fine.grad = torch.ones(2, 2)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    complex_, meta = nn.Parameter(torch.ones(2, dtype=torch.complex64)), nn.Parameter(torch.ones(2, device="meta"))
    complex_.grad, meta.grad = torch.ones_like(complex_), torch.ones_like(meta)
    for bad, message in (
        (embedding.weight, "w has a sparse gradient; make it dense"),
        (complex_, "w has dtype torch.complex64; MaskedAdamW trains float32"),
        (meta, "w is on meta and has no data"),
    ):
        with pytest.raises(SsahError, match=message):
            MaskedAdamW([("fine", fine), ("w", bad)]).step()
        assert torch.equal(fine, torch.ones(2, 2))


def test_check_grads_names_the_place_and_ignores_what_is_frozen():
    model = Layers()
    optimizer = MaskedAdamW(model.named_parameters(), mask=LAYERS_MASK, check_grads=True, lr=0.1)
    random_gradients(model, 0)
    model.down.weight.grad[2, 3] = math.nan  # frozen
    optimizer.step()
    before = weights(model)
    model.down.weight.grad[2, 4] = math.inf
    with pytest.raises(NonFiniteError, match=r"gradient of down.weight is inf at \[2, 4\]"):
        optimizer.step()
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert optimizer.state[model.up.weight]["step"] == 1


def test_check_grads_of_a_compact_layer_speaks_of_the_weight():
    model = tiny_model("llama")
    mask = Mask({DOWN: ("columns", range(2, 50)), UP: ("rows", range(2, 50))})
    compact(model, mask)
    optimizer = MaskedAdamW(model.named_parameters(), mask=mask, check_grads=True)
    random_gradients(model, 0)
    model.get_parameter(DOWN.replace("weight", "trainable")).grad[7, 3] = math.nan
    with pytest.raises(NonFiniteError, match=rf"gradient of {DOWN} is nan at \[7, 51\]"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_training_equals_dense_training(dtype):
    """The same bits, with stochastic rounding too: a leaf draws the numbers of its weight's region."""
    mask = Mask({DOWN: ("columns", range(30)), UP: ("rows", range(40)), NORM: ("rows", None)})
    dense, small = tiny_model("llama", dtype), compact(tiny_model("llama", dtype), mask)
    optimizers = [MaskedAdamW(model.named_parameters(), 1e-2, mask=mask, seed=3) for model in (dense, small)]
    assert isinstance(small.model.layers[0].mlp.down_proj, CompactLinear)
    before = weights(dense)
    for step in range(4):
        if step == 2:
            saved = through_file(optimizers[1].state_dict())
            optimizers[1] = MaskedAdamW(small.named_parameters(), 1e-2, mask=mask, seed=3)
            optimizers[1].load_state_dict(saved)
        random_gradients(dense, step)
        grads = {name: parameter.grad for name, parameter in dense.named_parameters()}
        for name, parameter in small.named_parameters():
            if name.endswith(".trainable"):
                name = name.replace("trainable", "weight")
                parameter.grad = grads[name].index_select(mask[name].axis, mask[name].trainable(52))
            elif parameter.requires_grad:
                parameter.grad = grads[name].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert equal_models(dense, small)
    assert_frozen(small, before, mask)
    leaf = small.get_parameter(DOWN.replace("weight", "trainable"))
    assert torch.equal(leaf, small.get_parameter(DOWN)[:, 30:])
    with pytest.raises(SsahError, match="uncompact"):
        optimizers[1].migrate_mask(None)


def test_nothing_advances_at_lr_0_or_on_a_skipped_step():
    model = Layers()
    optimizer = MaskedAdamW(model.named_parameters(), lr=0.0, weight_decay=0.1)
    before = weights(model)
    random_gradients(model, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    state = optimizer.state[model.up.weight]
    assert state["step"] == 0 and not state["exp_avg"].any()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(4.0)
    for parameter in model.parameters():
        parameter.grad *= 4
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    plain = Layers()
    random_gradients(plain, 0)
    MaskedAdamW(plain.named_parameters(), lr=0.1, weight_decay=0.1).step()
    assert equal_models(model, plain)


def test_grad_scaler_unscales_and_skips_inside_the_step():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float32))
    optimizer = MaskedAdamW([parameter], lr=0.1)
    for factor, steps in ((1.0, 1), (math.inf, 1), (1.0, 2)):
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.state[parameter]["step"] == steps
    assert scaler.get_scale() == 512.0
    twin = nn.Parameter(torch.ones(3))
    reference = torch.optim.AdamW([twin], lr=0.1)
    for _ in range(2):
        twin.grad = torch.ones(3)
        reference.step()
    assert torch.allclose(parameter, twin, rtol=1e-6)


def test_parameters_swapped_in_place_are_found_by_position():
    """What accelerate does when it shards: the names stay, the parameters are other ones."""
    model = Layers()
    optimizer = MaskedAdamW(model.named_parameters(), mask=LAYERS_MASK, lr=0.1)
    other = copy.deepcopy(model)
    before = weights(other)
    optimizer.param_groups[0]["params"][:] = list(other.parameters())
    random_gradients(other, 0)
    optimizer.step()
    assert_frozen(other, before, LAYERS_MASK)
    assert not torch.equal(other.up.weight, before["up.weight"])


def test_step_inside_torch_compile():
    models = [Layers(), Layers()]
    optimizers = [MaskedAdamW(model.named_parameters(), 0.1, mask=LAYERS_MASK) for model in models]

    def train(model, optimizer, x):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(train, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        train(models[0], optimizers[0], x)
        compiled(models[1], optimizers[1], x)
    for name, expected in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], expected, rtol=1e-5, atol=1e-6)


def gradient_vector(model: nn.Module, mask: Mask) -> Tensor:
    parts = []
    for name, parameter in model.named_parameters():
        region = mask.get(name)
        grad = parameter.grad.float()
        if region is not None:
            grad = grad.index_select(region.axis, region.trainable(grad.shape[region.axis]))
        parts.append(grad.flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("copied", [0, 1 << 17], ids=["line by line", "copied"])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, math.inf])
def test_clipping_counts_and_scales_trainable_elements_only(monkeypatch, norm_type, copied):
    monkeypatch.setattr("ssah_fast.optim._COPIED", copied)
    model = Layers()
    inputs = {
        "model": (model, LAYERS_MASK),
        "names": (model.named_parameters(), LAYERS_MASK),
        "optimizer": (MaskedAdamW(model.named_parameters(), mask=LAYERS_MASK), None),
    }
    for parameters, mask in inputs.values():
        random_gradients(model, 0)
        model.down.weight.grad[:, 3] = math.nan  # frozen
        expected = torch.linalg.vector_norm(gradient_vector(model, LAYERS_MASK), norm_type)
        frozen = {n: frozen_part(n, model.get_parameter(n).grad, LAYERS_MASK).clone() for n in LAYERS_MASK}
        norm = clip_grad_norm_(parameters, 0.5, norm_type, mask=mask)
        torch.testing.assert_close(norm, expected)
        after = torch.linalg.vector_norm(gradient_vector(model, LAYERS_MASK), norm_type)
        torch.testing.assert_close(after, torch.tensor(0.5))
        for name, then in frozen.items():
            now = frozen_part(name, model.get_parameter(name).grad, LAYERS_MASK)
            assert torch.equal(now.nan_to_num(), then.nan_to_num())


def test_clipping_without_a_mask_is_torchs():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        models = [Layers().to(dtype), Layers().to(dtype)]
        for model in models:
            random_gradients(model, 0)
        ours = clip_grad_norm_(models[0].parameters(), 1.0)
        theirs = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        torch.testing.assert_close(ours.to(dtype), theirs)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert clip_grad_norm_(nn.Parameter(torch.ones(2)), 1.0) == 0.0


def test_clipping_errors():
    model = Layers()
    random_gradients(model, 0)
    with pytest.raises(SsahError, match="needs the names"):
        clip_grad_norm_(model.parameters(), 1.0, mask=LAYERS_MASK)
    with pytest.raises(SsahError, match="norm_type=0"):
        clip_grad_norm_(model, 1.0, 0)
    with pytest.raises(SsahError, match="leave it out"):
        clip_grad_norm_(MaskedAdamW(model.parameters()), 1.0, mask=LAYERS_MASK)
    model.up.weight.grad[1, 0] = math.inf
    before = model.down.weight.grad.clone()
    with pytest.raises(NonFiniteError, match="is inf"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    assert torch.equal(model.down.weight.grad, before)


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(6, 90, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def train(folder: Path, dtype: torch.dtype, *, resume: bool = False, **options) -> tuple[nn.Module, Trainer]:
    """Four steps, or the last two from the checkpoint of a run before."""
    mask = Mask({DOWN: ("columns", range(30)), UP: ("rows", range(40)), NORM: ("rows", None), EMBEDDING: ("rows", [3])})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        warmup_steps=2,
        max_grad_norm=0.05,
        logging_steps=1,
    )
    model = tiny_model("llama", dtype).train()
    wanted = trainer_kwargs(mask, lr=1e-2, weight_decay=0.1, **options)
    trainer = Trainer(model, arguments, train_dataset=Tokens(), **wanted)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    assert_frozen(model, weights(tiny_model("llama", dtype)), mask)
    return model, trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_compact", [True, False])
def test_trainer_resumes_to_the_same_bits(tmp_path, dtype, is_compact):
    straight, _ = train(tmp_path, dtype, compact=is_compact)
    resumed, trainer = train(tmp_path, dtype, resume=True, compact=is_compact)
    assert equal_models(straight, resumed)
    assert not equal_models(straight, tiny_model("llama", dtype))
    assert isinstance(trainer.optimizer.optimizer, MaskedAdamW)
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [0.1, 0.0]
    undecayed = trainer.optimizer.param_groups[1]["param_names"]
    assert all("norm" in name for name in undecayed) and undecayed


def test_trainer_clips_trainable_elements_only(tmp_path):
    """The norm that the Trainer logs is the same for compact and dense training, and smaller than the whole one."""
    logged = []
    for is_compact in (True, False):
        _, trainer = train(tmp_path / str(is_compact), torch.float32, compact=is_compact)
        logged.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_trainer_kwargs_decay_what_the_trainer_decays():
    for model_type in ("llama", "opt", "gpt2", "gemma3_text"):
        model = tiny_model(model_type)
        expected = set(Trainer.get_decay_parameter_names(None, model))
        factory, arguments = trainer_kwargs(None, lr=1e-2, weight_decay=0.1)["optimizer_cls_and_kwargs"]
        groups = factory()(model, **arguments).param_groups
        decayed = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
        assert decayed == expected & {name for name, _ in model.named_parameters()}
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_trainer_kwargs_need_a_learning_rate():
    with pytest.raises(SsahError, match=r"needs lr=args.learning_rate"):
        trainer_kwargs(LAYERS_MASK)
