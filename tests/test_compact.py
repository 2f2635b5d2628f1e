"""Compact layers compute what plain ones do, never hold a stale weight, and leave no trace in checkpoints."""

import copy
import io
from functools import partial

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ssah_fast import matmul
from ssah_fast.compaction import LEAF, CompactConv1D, CompactLinear, compact, owner, sync, uncompact
from ssah_fast.errors import SsahError
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW
from ssah_fast.units import find_units

LAYOUTS = ("llama", "phi3", "gpt_neox", "gpt2", "opt", "qwen2", "gemma2")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The same random numbers in every order of tests, and products of bf16 as torch has them."""
    torch.manual_seed(0)
    monkeypatch.setattr(matmul, "emulates_bf16", lambda: False)


@pytest.fixture
def emulated(monkeypatch, fresh):
    """The products of a CPU without bf16 instructions, in blocks small enough that there are several."""
    monkeypatch.setattr(matmul, "emulates_bf16", lambda: True)
    monkeypatch.setattr(matmul, "_WEIGHT_BLOCK", 300)
    monkeypatch.setattr(matmul, "_ROWS_BLOCK", 500)


def some_units(model, part=0.2, rest="train"):
    """A mask that trains a random part of each module's units; ``rest`` is for everything that is in no unit."""
    trainable = {}
    for layout in find_units(model):
        chosen = torch.randperm(layout.units)[: max(1, int(part * layout.units))]
        for piece in layout.slices:
            indices = piece.indices(layout.units)[chosen].flatten()
            trainable.setdefault((piece.parameter, piece.axis), []).append(indices)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    entries = {}
    for (name, axis), indices in trainable.items():
        frozen = torch.ones(shapes[name][axis], dtype=torch.bool)
        frozen[torch.cat(indices)] = False
        entries[name] = (axis, frozen)
    if rest == "freeze":
        entries |= {name: (0, None) for name in shapes if name not in entries}
    return Mask(entries)


def batch(seed=0, rows=2):
    return torch.randint(3, 90, (rows, 11), generator=torch.Generator().manual_seed(seed))


def backward(model, seed=0):
    torch.manual_seed(seed)  # of dropout
    loss = model(input_ids=batch(seed), labels=batch(seed), use_cache=False).loss
    loss.backward()
    return loss.detach()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, CompactLinear | CompactConv1D)}


def assert_same_gradients(compacted, plain):
    reference = dict(plain.named_parameters())
    own = layers(compacted)
    assert own
    for name, parameter in compacted.named_parameters():
        if name.endswith(f".{LEAF}"):
            layer = own[name.removesuffix(f".{LEAF}")]
            whole = reference[name.removesuffix(LEAF) + "weight"].grad
            assert torch.equal(parameter.grad, whole.index_select(layer.region_axis, layer.region_index)), name
        elif parameter.requires_grad:
            assert torch.equal(parameter.grad, reference[name].grad), name


def assert_frozen(model, before, mask):
    for name, value in model.state_dict().items():
        if name in mask:
            region, old = mask[name], before[name]
            if region.frozen is not None:
                old, value = (t.index_select(region.axis, region.frozen) for t in (old, value))
            assert torch.equal(old, value), name


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def pair(model_type="llama", dtype=torch.float32):
    """A compact model, its plain copy and the mask."""
    plain = tiny_model(model_type, dtype)
    mask = some_units(plain)
    return compact(copy.deepcopy(plain), mask), plain, mask


# ---- outputs and gradients


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_plain_model(model_type, checkpointing):
    compacted, plain, _ = pair(model_type)
    for model in (compacted, plain):
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert torch.equal(backward(compacted), backward(plain))
    assert_same_gradients(compacted, plain)


def test_gradients_accumulate():
    compacted, plain, _ = pair("gpt2")
    for seed in range(3):
        backward(compacted, seed), backward(plain, seed)
    assert_same_gradients(compacted, plain)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_autocast(model_type, checkpointing):
    compacted, plain, _ = pair(model_type)
    losses = []
    for model in (compacted, plain):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(backward(model))
    assert torch.equal(*losses)
    assert_same_gradients(compacted, plain)


def layer_pair(kind, axis, dtype=torch.float32, leaf=None):
    """One layer, 13 to 17 channels, of which 4 lines train; compact and plain."""
    plain = nn.Linear(13, 17) if kind is nn.Linear else Conv1D(17, 13)
    nn.init.normal_(plain.bias)
    root = nn.Sequential(plain.to(dtype))
    frozen = torch.ones(plain.weight.shape[axis], dtype=torch.bool)
    frozen[[0, 3, 4, -1]] = False
    return compact(copy.deepcopy(root), Mask({"0.weight": (axis, frozen)}), dtype=leaf)[0], plain


LAYERS = pytest.mark.parametrize(
    ("kind", "axis"),
    [(nn.Linear, 0), (nn.Linear, 1), (Conv1D, 0), (Conv1D, 1)],
    ids=["linear_rows", "linear_columns", "conv1d_rows", "conv1d_columns"],
)


@LAYERS
def test_emulated_autocast(kind, axis, emulated):
    layer, plain = layer_pair(kind, axis)
    x = torch.randn(3, 40, 13)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        (y.float() ** 2).sum().backward()
        expected = F.linear(x, plain.weight if kind is nn.Linear else plain.weight.t(), plain.bias)
        (expected.float() ** 2).sum().backward()
    assert y.dtype == torch.bfloat16 and layer.trainable.grad.dtype == layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
    exact = plain.weight.grad.index_select(axis, layer.region_index)
    torch.testing.assert_close(layer.trainable.grad, exact, rtol=2**-7, atol=2**-6 * exact.abs().max().item())


@LAYERS
@pytest.mark.parametrize("shape", [(13,), (5, 13), (2, 3, 13), (0, 13)], ids=str)
def test_one_layer(kind, axis, shape):
    layer, plain = layer_pair(kind, axis)
    x = [torch.randn(shape).requires_grad_() for _ in range(2)]
    x[1].data.copy_(x[0].data)
    y, expected = layer(x[0]), plain(x[1])
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad), expected.backward(grad)
    assert torch.equal(x[0].grad, x[1].grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)
    assert torch.equal(layer.trainable.grad, plain.weight.grad.index_select(axis, layer.region_index))
    assert layer.weight.grad is None


@LAYERS
@pytest.mark.parametrize("leaf", [None, torch.float32], ids=["bf16_leaf", "fp32_leaf"])
def test_emulated_bf16_rounds_once(kind, axis, leaf, emulated):
    layer, plain = layer_pair(kind, axis, torch.bfloat16, leaf)
    plain = plain.double()
    x = torch.randn(3, 40, 13).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    grad = torch.randn(3, 40, 17).bfloat16()
    y, expected = layer(x), plain(wide)
    y.backward(grad), expected.backward(grad.double())
    found = (y, x.grad, layer.trainable.grad)
    exact = (expected, wide.grad, plain.weight.grad.index_select(axis, layer.region_index))
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, leaf or torch.bfloat16]
    for ours, reference in zip(found, exact, strict=True):
        relative = 1e-5 if ours.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(ours.double(), reference, rtol=relative, atol=1e-4)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_emulated_product_rounds_a_wide_weight_first(transposed, bias, emulated):
    x, weight = torch.randn(2, 30, 21).bfloat16(), torch.randn(21, 40)
    b = torch.randn(40).bfloat16() if bias else None
    y = matmul.linear(x, weight.t() if transposed else weight, b, transposed=transposed)
    exact = x.double() @ weight.bfloat16().double() + (0 if b is None else b.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


def test_buffers_made_in_inference_mode_serve_outside(emulated, monkeypatch):
    monkeypatch.setattr(matmul, "_BUFFERS", matmul._Buffers())
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    with torch.inference_mode():
        inside = matmul.linear(x, weight)
    assert torch.equal(matmul.linear(x, weight), inside)


def test_scratch_is_fp32_on_the_cpu_whatever_the_defaults(emulated, monkeypatch):
    monkeypatch.setattr(matmul, "_BUFFERS", matmul._Buffers())
    x, weight = torch.randn(4, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    with torch.device("meta"):
        matmul.linear(x, weight)
    assert {(t.device.type, t.dtype) for t in matmul._BUFFERS.flat.values()} == {("cpu", torch.float32)}


@LAYERS
def test_only_selected_activations_are_saved(kind, axis):
    layer, _ = layer_pair(kind, axis)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(torch.randn(6, 13).requires_grad_())
    reads_all = (axis == 0) == (kind is nn.Linear)
    assert ((6, 13) in saved) == reads_all
    assert ((6, 4) in saved) != reads_all


def test_nothing_is_saved_or_selected_without_gradients(monkeypatch):
    layer, plain = layer_pair(nn.Linear, 1)
    x = torch.randn(6, 13)
    monkeypatch.setattr(torch.Tensor, "index_select", None)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))


def test_an_input_that_needs_no_gradient_gets_none():
    layer, _ = layer_pair(nn.Linear, 0)
    layer(torch.randn(6, 13)).sum().backward()
    assert layer.trainable.grad is not None


def test_second_derivatives_are_refused():
    layer, _ = layer_pair(nn.Linear, 0)
    x = torch.randn(6, 13, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_leaves_float64_alone():
    layer, plain = layer_pair(nn.Linear, 0, torch.float64)
    x = torch.randn(6, 13, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))


def test_shapes_without_data():
    layer, _ = layer_pair(nn.Linear, 1)
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty(6, 13, device="meta")).shape == (6, 17)


def test_another_dtype_is_refused_as_the_plain_layer_does():
    layer, plain = layer_pair(nn.Linear, 0, torch.bfloat16)
    with pytest.raises(SsahError, match=r"x is torch\.float32, but the layer's weight is torch\.bfloat16"):
        layer(torch.randn(6, 13))
    with pytest.raises(RuntimeError):
        plain(torch.randn(6, 13))


def test_compiled():
    compacted, plain, mask = pair()
    optimizers = [MaskedAdamW(m.named_parameters(), mask=mask, lr=1e-2) for m in (compacted, plain)]
    compiled = torch.compile(compacted, backend="aot_eager")
    for seed in range(3):
        torch.testing.assert_close(backward(compiled, seed), backward(plain, seed), rtol=1e-6, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in plain.state_dict().items():
        torch.testing.assert_close(compacted.state_dict()[name], parameter, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_compiled_step_and_forward_see_the_new_weight():
    layer, _ = layer_pair(nn.Linear, 0)
    optimizer = torch.optim.SGD([layer.trainable], lr=1.0)
    compiled, step = (torch.compile(f, backend="aot_eager") for f in (layer, optimizer.step))
    for _ in range(2):
        compiled(torch.ones(2, 13)).sum().backward()
        step()
        optimizer.zero_grad()
        assert torch.equal(layer.weight[layer.region_index], layer.trainable)
    torch.compiler.reset()


def test_a_step_compiled_as_a_whole_is_refused_with_the_reason():
    layer, _ = layer_pair(nn.Linear, 0)
    optimizer = torch.optim.SGD([layer.trainable], lr=1.0)
    layer(torch.ones(2, 13)).sum().backward()
    with pytest.raises(RuntimeError, match="compact leaves; leave fullgraph out"):
        torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    torch.compiler.reset()


# ---- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16_stochastic"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_training_equals_masked_training_of_the_plain_model(model_type, dtype):
    compacted, plain, mask = pair(model_type, dtype)
    before = snapshot(plain)
    for model in (compacted, plain):
        optimizer = MaskedAdamW(model.named_parameters(), mask=mask, lr=1e-2, weight_decay=0.1, seed=3)
        for seed in range(4):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
    assert_frozen(compacted, before, mask)
    after = plain.state_dict()
    assert compacted.state_dict().keys() == after.keys()
    for name, value in compacted.state_dict().items():
        assert torch.equal(value, after[name]), name
    moved = [name for name in mask if not torch.equal(after[name], before[name])]
    assert len(moved) == len([name for name in mask if mask[name].frozen is not None])


def train(model, optimizer, seeds):
    for seed in seeds:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def test_resume_in_the_middle():
    def start(model):
        return model, MaskedAdamW(model.named_parameters(), mask=mask, lr=1e-2)

    whole, plain, mask = pair()
    whole, optimizer = start(whole)
    train(whole, optimizer, range(4))
    first, optimizer = start(compact(copy.deepcopy(plain), mask))
    train(first, optimizer, range(2))
    saved = [io.BytesIO(), io.BytesIO()]
    for file, state in zip(saved, (first.state_dict(), optimizer.state_dict()), strict=True):
        torch.save(state, file)
        file.seek(0)
    second, optimizer = start(compact(copy.deepcopy(plain), mask))
    second.load_state_dict(torch.load(saved[0], weights_only=True))
    optimizer.load_state_dict(torch.load(saved[1], weights_only=True))
    train(second, optimizer, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_fp32_leaves_beside_bf16_weights_keep_small_steps():
    plain = tiny_model("llama", torch.bfloat16)
    mask = some_units(plain)
    compacted = compact(copy.deepcopy(plain), mask, dtype=torch.float32)
    before = snapshot(plain)
    optimizer = MaskedAdamW(compacted.named_parameters(), mask=mask, lr=1e-5)
    train(compacted, optimizer, range(3))
    for layer in layers(compacted).values():
        assert layer.trainable.dtype == torch.float32 and layer.trainable.grad is None
        region = layer.weight.index_select(layer.region_axis, layer.region_index)
        assert torch.equal(region, layer.trainable.bfloat16())
        assert not torch.equal(region.float(), layer.trainable)
    assert_frozen(compacted, before, mask)


def test_fp32_model_has_no_use_for_masters():
    plain = tiny_model("llama", torch.float64)
    compacted = compact(plain, some_units(plain), dtype=torch.float32)
    assert {layer.trainable.dtype for layer in layers(compacted).values()} == {torch.float64}


# ---- never stale


class DataSGD(torch.optim.Optimizer):
    """Writes in a way that no version counter shows, as some optimizers do."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad)


STEPS = {
    "sgd": partial(torch.optim.SGD, lr=1.0),
    "adamw_fused": partial(torch.optim.AdamW, lr=1.0, fused=True),
    "adamw_foreach": partial(torch.optim.AdamW, lr=1.0, foreach=True),
    "through_data": DataSGD,
    "masked": partial(MaskedAdamW, lr=1.0),
}


def fresh_weight(layer):
    """What the weight must be."""
    return layer.weight.detach().clone().index_copy_(layer.region_axis, layer.region_index, layer.trainable.detach())


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_any_optimizer_s_step_reaches_the_weight_at_once(make):
    layer, _ = layer_pair(nn.Linear, 0)
    before = layer.weight.clone()
    optimizer = make([("trainable", layer.trainable)] if make is STEPS["masked"] else [layer.trainable])
    layer(torch.randn(6, 13)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, fresh_weight(layer))
    assert not torch.equal(layer.weight, before)


def change_by_hand(layer):
    with torch.no_grad():
        layer.trainable.add_(1.0)


@pytest.mark.parametrize("grad", [True, False])
def test_a_change_by_hand_is_seen_by_the_next_forward(grad):
    layer, _ = layer_pair(nn.Linear, 1)
    change_by_hand(layer)
    x = torch.randn(6, 13)
    expected = F.linear(x, fresh_weight(layer), layer.bias)
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        change_by_hand(layer)
        assert torch.equal(layer(x), F.linear(x, fresh_weight(layer), layer.bias))


def test_a_change_by_hand_is_seen_by_state_dict():
    layer, _ = layer_pair(nn.Linear, 1)
    change_by_hand(layer)
    assert torch.equal(layer.state_dict()["weight"], fresh_weight(layer))


def test_state_dict_between_forward_and_backward():
    layer, _ = layer_pair(nn.Linear, 1)
    y = layer(torch.randn(6, 13, requires_grad=True))
    layer.state_dict()
    y.sum().backward()


def test_a_closure_sees_every_change():
    layer, _ = layer_pair(nn.Linear, 1)
    optimizer = torch.optim.LBFGS([layer.trainable], max_iter=3)
    x, target = torch.randn(30, 13), torch.randn(30, 17)

    def closure():
        optimizer.zero_grad()
        y = layer(x)
        assert torch.equal(y, F.linear(x, fresh_weight(layer), layer.bias))
        loss = (y - target).square().mean()
        loss.backward()
        return loss

    before = optimizer.step(closure)
    assert closure() < before
    assert torch.equal(layer.weight, fresh_weight(layer))


def test_an_invisible_change_is_seen_by_state_dict_and_sync():
    layer, _ = layer_pair(nn.Linear, 1)
    layer.trainable.data.add_(1.0)
    assert torch.equal(layer.state_dict()["weight"], fresh_weight(layer))
    layer.trainable.data.add_(1.0)
    sync(layer)
    assert torch.equal(layer.weight, fresh_weight(layer))


def test_copies_are_in_sync_and_apart():
    layer, _ = layer_pair(nn.Linear, 0)
    change_by_hand(layer)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, fresh_weight(twin))
    assert owner(twin.trainable) is twin and owner(layer.trainable) is layer
    before = layer.weight.clone()
    optimizer = torch.optim.SGD([twin.trainable], lr=1.0)
    twin(torch.randn(6, 13)).sum().backward()
    optimizer.step()
    assert torch.equal(twin.weight, fresh_weight(twin))
    assert torch.equal(layer.weight, before)


def test_pickled():
    layer, _ = layer_pair(Conv1D, 0)
    change_by_hand(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.weight, fresh_weight(layer))
    assert owner(loaded.trainable) is loaded


def test_a_step_inside_the_backward_pass():
    compacted, plain, mask = pair()
    before = snapshot(plain)
    for layer in layers(compacted).values():
        optimizer = torch.optim.SGD([layer.trainable], lr=0.1)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        layer.trainable.register_post_accumulate_grad_hook(step)
    backward(compacted)
    for layer in layers(compacted).values():
        assert torch.equal(layer.weight, fresh_weight(layer))
    assert_frozen(compacted, before, mask)


def test_recomputation_does_not_write_the_weight():
    compacted, _, _ = pair()
    compacted.train().gradient_checkpointing_enable({"use_reentrant": False})
    versions = [layer.weight._version for layer in layers(compacted).values()]
    backward(compacted)
    assert [layer.weight._version for layer in layers(compacted).values()] == versions


def test_moving_keeps_the_weight_in_step():
    layer, _ = layer_pair(nn.Linear, 0)
    change_by_hand(layer)
    layer.to(torch.float64)
    x = torch.randn(6, 13, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, fresh_weight(layer), layer.bias))


# ---- checkpoints


def test_save_and_load_pretrained(tmp_path):
    for model_type in ("llama", "gpt2"):
        compacted, plain, mask = pair(model_type)
        train(compacted, MaskedAdamW(compacted.named_parameters(), mask=mask, lr=1e-2), range(2))
        compacted.save_pretrained(tmp_path / model_type)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / model_type, output_loading_info=True)
        assert not any(info.values()), info
        assert type(loaded.get_decoder()) is type(plain.get_decoder())
        assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in plain.named_parameters()}
        for name, value in compacted.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
        assert torch.equal(loaded(input_ids=batch()).logits, compacted(input_ids=batch()).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_an_ordinary_checkpoint_loads(assign):
    compacted, _, _ = pair()
    other = tiny_model("llama", seed=1)
    state = other.state_dict()
    assert compacted.state_dict().keys() == state.keys()
    result = compacted.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert state.keys() == other.state_dict().keys()  # what the caller passed is unchanged
    for layer in layers(compacted).values():
        assert torch.equal(layer.trainable, layer.weight.index_select(layer.region_axis, layer.region_index))
        assert layer.trainable.requires_grad and not layer.weight.requires_grad
    assert torch.equal(compacted(input_ids=batch()).logits, other(input_ids=batch()).logits)


def test_missing_and_unexpected_keys_are_those_of_the_plain_model():
    compacted, plain, _ = pair()
    state = plain.state_dict()
    dropped = next(iter(layers(compacted))) + ".weight"
    value = state.pop(dropped)
    assert compacted.load_state_dict({**state, "x": value}, strict=False) == ([dropped], ["x"])


# ---- what becomes compact, and back


def test_tied_embeddings_stay_tied():
    plain = tiny_model("llama", tie_word_embeddings=True)
    mask = Mask({**some_units(plain), "model.embed_tokens.weight": ("rows", range(60))})
    compacted = compact(copy.deepcopy(plain), mask)
    assert compacted.lm_head.weight is compacted.get_input_embeddings().weight
    assert type(compacted.lm_head) is nn.Linear and compacted.lm_head.weight.requires_grad
    assert torch.equal(backward(compacted), backward(plain))
    assert_same_gradients(compacted, plain)


def describe(model):
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


def test_uncompact_leaves_no_trace():
    model = tiny_model("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    mask = some_units(model, rest="freeze")
    described, flags = describe(model), {name: p.requires_grad for name, p in model.named_parameters()}
    compact(model, mask)
    train(model, MaskedAdamW(model.named_parameters(), mask=mask, lr=1e-2), range(2))
    leaf = next(iter(layers(model).values())).trainable
    after = snapshot(model)
    assert uncompact(model) is model
    assert owner(leaf) is None
    assert describe(model) == described
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert uncompact(model) is model
    assert layers(compact(model, mask))


def test_uncompact_from_outside_a_wrapper():
    model = tiny_model("llama")
    wrapped = nn.DataParallel(compact(model, some_units(model, rest="freeze")))
    uncompact(wrapped)
    assert not layers(model) and all(p.requires_grad for p in model.parameters())
    assert layers(compact(wrapped, some_units(model, rest="freeze")))


def test_wholly_frozen_parameters_ask_for_no_gradient():
    model = tiny_model("llama")
    mask = some_units(model, rest="freeze")
    compact(model, mask)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {LEAF}
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize(("part", "expected"), [(0.5, True), (0.52, False)])
def test_max_fraction(part, expected):
    root = nn.Sequential(nn.Linear(4, 100))
    mask = Mask({"0.weight": ("rows", range(int(100 * part), 100))})
    assert bool(layers(compact(root, mask))) == expected
    assert root[0].weight.requires_grad != expected


def test_max_fraction_zero_only_freezes():
    model = tiny_model("llama")
    mask = Mask({**some_units(model), "model.norm.weight": ("rows", None)})
    compact(model, mask, max_fraction=0.0)
    assert not layers(model) and not model.model.norm.weight.requires_grad
    assert uncompact(model).model.norm.weight.requires_grad


class OtherLinear(nn.Linear):
    pass


def test_what_stays_dense():
    model = nn.ModuleDict({name: nn.Linear(6, 10) for name in ("good", "hooked", "tied", "twin", "frozen", "unmasked")})
    model["other"], model["conv"] = OtherLinear(6, 10), nn.Conv1d(6, 10, 3)
    model["hooked"].forward = model["hooked"].forward
    model["twin"].weight = model["tied"].weight
    model["frozen"].weight.requires_grad_(False)
    mask = Mask({f"{name}.weight": ("rows", range(8)) for name in model if name not in ("unmasked", "twin")})
    compact(model, mask)
    assert list(layers(model)) == ["good"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["good.weight", "frozen.weight"]


def test_experts_with_three_axes_stay_dense():
    config = tiny_config("llama")
    model = nn.ModuleDict({"experts": nn.Module(), "gate": nn.Linear(config.hidden_size, 8)})
    model["experts"].down_proj = nn.Parameter(torch.randn(4, 6, 5))
    compact(model, Mask({"experts.down_proj": (2, range(4)), "gate.weight": (0, range(6))}))
    assert list(layers(model)) == ["gate"]
    assert model["experts"].down_proj.requires_grad


def test_adapters_stay_dense():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    names = [name for name, p in model.named_parameters() if "lora_A" in name]
    mask = Mask({names[0]: ("rows", [0])})
    compact(model, mask)
    assert type(model.get_submodule(names[0].removesuffix(".weight"))) is CompactLinear
    backward(model)


def test_layers_keep_looking_like_their_plain_kind():
    compacted, _, _ = pair("gpt2")
    layer = compacted.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D) and "trainable columns: 10" in repr(layer) and "nf=52, nx=48" in repr(layer)
    linear, _ = layer_pair(nn.Linear, 0)
    assert isinstance(linear, nn.Linear)
    assert repr(linear) == "CompactLinear(in_features=13, out_features=17, bias=True, trainable rows: 4)"


# ---- bad input


def test_bad_arguments_are_refused_and_nothing_changes():
    model = tiny_model("llama")
    described = describe(model)
    mask = some_units(model)
    cases = [
        ({"max_fraction": 1.5}, r"max_fraction=1\.5 is no fraction"),
        ({"dtype": torch.float16}, r"dtype=torch\.float16 is no dtype for leaves"),
        ({"mask": Mask({"x.weight": ("rows", [0])})}, "mask of another model"),
        ({"mask": Mask({name: ("rows", None) for name, _ in model.named_parameters()})}, "freezes every parameter"),
    ]
    for arguments, message in cases:
        with pytest.raises(SsahError, match=message):
            compact(model, **{"mask": mask, **arguments})
        assert describe(model) == described
        assert all(p.requires_grad for p in model.parameters())


def test_compact_twice_is_refused():
    compacted, _, mask = pair()
    for again in (compacted, nn.Sequential(compacted)):
        with pytest.raises(SsahError, match=r"it is compact already; call uncompact"):
            compact(again, mask)


def test_meta_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(SsahError, match=r"embed_tokens\.weight is on the meta device; load its weights first"):
        compact(model, some_units(model))
