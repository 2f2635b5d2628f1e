"""Whole pieces of the product on a GPU: scoring, masked training, fine-tuning. The CPU runs the same tests."""

import copy

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy

import ssah_fast
from ssah_fast import ops
from ssah_fast.compaction import CompactLinear
from ssah_fast.evaluation.generation import Decoding
from ssah_fast.masks import Mask
from ssah_fast.optim import MaskedAdamW, clip_grad_norm_
from ssah_fast.silencing import silenced
from ssah_fast.units import find_units

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GATE, DOWN, HEAD = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"
MASK = Mask(
    {
        GATE: ("rows", [*range(40), 51]),  # 11 of 52 train: compact
        DOWN: ("columns", [*range(3, 45)]),  # 10 of 52 train: compact
        "model.layers.0.self_attn.q_proj.weight": ("rows", None),
        "model.layers.0.self_attn.o_proj.weight": ("rows", [1, 5]),  # mostly trainable: dense
        HEAD: ("rows", [*range(10)]),
    }
)
PAIRS = [{"prompt": f"w{i} w{i + 3}", "response": f"w{2 * i} w5 w{i}"} for i in range(24)]
IN_ALL = 1 << 31  # elements of the large tensors; indices beyond do not fit into 32 bits


def batch(device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (4, 19), generator=generator).to(device)


def backward(model, tokens, scaler=None):
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


def frozen_parts(model):
    """The bits of what the mask freezes; those of a compact layer are in its weight."""
    state = model.state_dict()
    parts = {}
    for name, region in MASK.items():
        whole = region.frozen is None
        part = state[name] if whole else state[name].index_select(region.axis, region.frozen.to(state[name].device))
        parts[name] = part.cpu().clone()
    return parts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", ["variance", "norm", "flap"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "mixtral"])
def test_scores_are_those_of_the_cpu(model_type, estimator, device):
    def scores(model, **options):
        return ssah_fast.score(
            model, tiny_tokenizer(), safety=PAIRS[:12], utility=PAIRS[12:], estimator=estimator, **options
        )

    expected = scores(tiny_model(model_type, torch.float64))
    found = scores(tiny_model(model_type).to(device), batch_size=3)
    assert found.modules.keys() == expected.modules.keys()
    for name in expected.modules:
        for one_set in ("safety", "utility"):
            mine, theirs = getattr(found, one_set)[name], getattr(expected, one_set)[name]
            assert mine.device.type == "cpu"
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6 * float(theirs.max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_streamed_checkpoint_scores_as_in_memory(model_type, device, tmp_path):
    tiny_model(model_type, torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = {"safety": PAIRS[:12], "utility": PAIRS[12:], "batch_size": 3, "device": device}
    kept = [ssah_fast.score_checkpoint(str(tmp_path / "model"), stream=s, **options) for s in ("never", "always")]
    for name, one in kept[0].modules.items():
        for figure in ("count", "mean", "m2", "norm", "importance"):
            assert torch.equal(getattr(one, figure), getattr(kept[1].modules[name], figure)), (name, figure)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_silencing_is_zeroing_the_columns(model_type, device):
    model = tiny_model(model_type).to(device)
    layouts = {layout.name: layout for layout in find_units(model)}
    chosen = {name: torch.arange(layout.units) % 3 == 0 for name, layout in layouts.items()}
    with torch.no_grad(), silenced(model, layouts, [chosen]):
        silent = model(batch(device, 0), use_cache=False).logits
    with torch.no_grad():
        for name, layout in layouts.items():
            weight, columns = model.get_parameter(layout.channels.parameter), layout.inputs()[chosen[name]].flatten()
            (weight if layout.expert is None else weight[layout.expert]).index_fill_(1, columns.to(device), 0)
        edited = model(batch(device, 0), use_cache=False).logits
    torch.testing.assert_close(silent, edited, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_is_evaluated(device, tmp_path):
    model, how = tiny_model("llama").to(device), {"decoding": Decoding(6), "batch_size": 5, "seqlen": 32}
    data = {"asr": PAIRS[:12], "look_alikes": PAIRS[12:], "utility": PAIRS}
    found = ssah_fast.evaluate(model, tiny_tokenizer(), **data, **how, output=tmp_path)
    again = ssah_fast.evaluate(model, tiny_tokenizer(), **data, **how)
    assert found["utility"] == again["utility"] and found["attack"] == again["attack"]
    sampled = Decoding(6, samples=2, temperature=1.0)
    draws = [ssah_fast.evaluate(model, tiny_tokenizer(), asr=PAIRS, decoding=sampled) for _ in range(2)]
    assert draws[0]["attack"] == draws[1]["attack"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_in_the_activations_is_found(device):
    model = tiny_model("llama", torch.float16).to(device)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = 60000.0
        model.model.layers[1].mlp.gate_proj.weight[7] = 60000.0
    with pytest.raises(ssah_fast.SsahError, match=r"NaN or Inf in the activations of .*down_proj"):
        ssah_fast.score(model, tiny_tokenizer(), safety=PAIRS[:4], utility=PAIRS[4:8])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "kahan"), (torch.bfloat16, "master")],
    ids=["fp32", "bf16-stochastic", "bf16-kahan", "bf16-master"],
)
def test_training_moves_what_trains_and_nothing_else(dtype, rounding, compact, device):
    model = tiny_model("llama", dtype).to(device).train()
    before, frozen = copy.deepcopy(model.state_dict()), frozen_parts(model)
    if compact:
        ssah_fast.compact(model, MASK)
        assert isinstance(model.get_submodule(GATE.removesuffix(".weight")), CompactLinear)
    optimizer = MaskedAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, mask=MASK, rounding=rounding)
    losses = []
    for step in range(6):
        losses.append(float(backward(model, batch(device, step % 2))))
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[4] < losses[0] and losses[5] < losses[1]
    assert all(torch.equal(part, frozen[name]) for name, part in frozen_parts(model).items())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name in (GATE, DOWN, HEAD, "model.norm.weight"):
        assert not torch.equal(after[name], before[name])
    assert {x.device.type for state in optimizer.state.values() for x in state.values()} == {torch.device(device).type}


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_goes_on_from_its_state_dict(device):
    """Saved on the device, loaded on the CPU, moved and loaded there: the next step has the same bits."""

    def start():
        model = tiny_model("llama", torch.bfloat16)
        ssah_fast.compact(model, MASK)
        model = model.to(device).train()
        return model, MaskedAdamW(model.named_parameters(), lr=1e-2, mask=MASK)

    def step(model, optimizer, gradients):
        for (_, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()

    first, optimizer = start()
    backward(first, batch(device, 0))
    gradients = [parameter.grad for parameter in first.parameters()]
    step(first, optimizer, gradients)
    second, other = start()
    second.load_state_dict({name: x.cpu() for name, x in first.state_dict().items()})
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.update({name: x.cpu() for name, x in state.items()})
    other.load_state_dict(saved)
    for model, its in ((first, optimizer), (second, other)):
        step(model, its, gradients)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_scaler_skips_and_goes_on(device):
    model = tiny_model("llama").to(device).train()
    optimizer, scaler = MaskedAdamW(model.named_parameters(), lr=1e-2, mask=MASK), torch.GradScaler(device, 2.0**10)
    frozen, start = frozen_parts(model), copy.deepcopy(model.state_dict())
    for step in range(3):
        with torch.autocast(device, torch.bfloat16):
            backward(model, batch(device, step), scaler)
        if step == 0:
            next(iter(model.parameters())).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 0:
            assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items())
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(part, frozen[name]) for name, part in frozen_parts(model).items())
    assert not torch.equal(model.get_parameter(HEAD), start[HEAD])


@pytest.mark.gpu
def test_parameters_on_both_devices():
    torch.manual_seed(0)
    both = {"cpu": torch.nn.Linear(9, 7), "cuda": torch.nn.Linear(9, 7, device="cuda")}
    both["cuda"].load_state_dict(both["cpu"].state_dict())
    pairs = [(f"{kind}.{name}", p) for kind, module in both.items() for name, p in module.named_parameters()]
    optimizer = MaskedAdamW(pairs, lr=1e-2)
    for _ in range(3):
        for _, parameter in pairs:
            generator = torch.Generator().manual_seed(parameter.ndim)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        clip_grad_norm_(optimizer, 0.1)
        optimizer.step()
    torch.testing.assert_close(both["cuda"].weight.cpu(), both["cpu"].weight)


@pytest.fixture
def no_waiting():
    """Any wait for the device is an error in this context."""
    mode = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_no_part_of_a_step_waits_for_the_device(compact, no_waiting):
    model = tiny_model("llama", torch.bfloat16).to("cuda").train()
    if compact:
        ssah_fast.compact(model, MASK)
    optimizer = MaskedAdamW(model.named_parameters(), lr=1e-2, mask=MASK)
    tokens = batch("cuda", 0)
    for warm in (True, False):
        backward(model, tokens)
        if not warm:
            no_waiting()
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.gpu
def test_another_stream():
    """What is queued on a stream runs on it: a long wait in front of the step holds the step back, too."""
    weight = torch.nn.Parameter(torch.ones(1 << 20, device="cuda"))
    optimizer = MaskedAdamW([weight], lr=1e-2)
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    expected = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e-3
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second at 2 GHz
        optimizer.step()
    assert not stream.query()
    assert torch.equal(weight, expected)  # read by the default stream while the other one still sleeps
    stream.synchronize()
    assert not torch.equal(weight, expected)


@pytest.mark.gpu
def test_finetune_end_to_end(tmp_path):
    pytest.importorskip("trl")
    from ssah_fast import training

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} <a> {{ m['content'] }} </s>"
        "{% else %} <u> {{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} <a>{% endif %}"
    )
    model = tiny_model("llama", torch.bfloat16)
    frozen = frozen_parts(model)
    result = training.finetune(
        *(model, tokenizer, PAIRS, tmp_path / "out"),
        mask=MASK,
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 0, "max_steps": 4},
    )
    assert model.device.type == "cuda"
    assert result.manifest["steps"] == 4
    assert all(torch.equal(part, frozen[name]) for name, part in frozen_parts(model).items())


@pytest.fixture
def room_for():
    """A function that skips the test where a GPU has less than so many GiB to spare; the memory is given back."""

    def look(gigabytes):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes << 30:
            pytest.skip(f"needs {gigabytes} GiB of free GPU memory")

    yield look
    torch.cuda.empty_cache()


def large(test):
    """One process runs all of these, so that two never share the memory (pytest-xdist, --dist loadgroup)."""
    return pytest.mark.gpu(pytest.mark.xdist_group("large")(test))


@large
def test_moments_beyond_2_to_the_31(room_for):
    room_for(14)
    channels = 1 << 15
    x = torch.zeros(IN_ALL // channels + 5, channels, dtype=torch.bfloat16, device="cuda")
    x[-7:] = torch.randn(7, channels, device="cuda")
    group = torch.full((len(x),), -1, dtype=torch.int8, device="cuda")
    group[-7:] = 0
    for op in ("channel", "gated"):
        count = torch.zeros(1, dtype=torch.int64, device="cuda")
        mean, m2 = torch.zeros(2, 1, channels, dtype=torch.float64, device="cuda")
        if op == "channel":
            rows = x[-7:].double()
            ops.channel_moments_(x, group, count, mean, m2)
        else:
            rows = (x[-7:].relu() * x[-7:]).double()
            ops.gated_moments_(x, x, group, count, mean, m2, "relu", x)
        torch.testing.assert_close(mean[0], rows.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(m2[0], rows.var(0, correction=0) * 7, rtol=1e-5, atol=1e-6)
        assert count.item() == 7
        assert torch.equal(x[-7:].double(), rows)


@large
def test_norms_beyond_2_to_the_31(room_for):
    room_for(14)
    rows, columns = (1 << 16) + 3, 1 << 15
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    weight[-1] = torch.randn(columns, device="cuda")
    torch.testing.assert_close(ops.column_norms(weight, 1), weight[-1].double().square(), rtol=1e-12, atol=0)
    assert ops.column_norms(weight, 0)[-1].item() == pytest.approx(weight[-1].double().square().sum().item())


@large
def test_a_step_beyond_2_to_the_31(room_for):
    """The last elements of one large tensor get the bits that they get as a tensor of their own."""
    room_for(40)
    tail = 1000
    weight = torch.full((IN_ALL + tail,), 0.5, dtype=torch.bfloat16, device="cuda")
    grad = torch.full_like(weight, 1e-3)
    grad[-tail:] = torch.randn(tail, device="cuda")
    small = weight[-tail:].clone(), grad[-tail:].clone()
    for whole, (w, g), offset in ((True, (weight, grad), 0), (False, small, IN_ALL)):
        m, v = (torch.zeros_like(w, dtype=torch.float32) for _ in range(2))
        step = torch.zeros((), device="cuda")
        ops.masked_adamw_(
            *([w], [g], [m], [v], [step], [0], [None]),
            **{"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1},
            ids=[7],
            offsets=[offset],
        )
        if whole:
            kept = m[-tail:].clone(), v[-tail:].clone()
            del m, v
    assert torch.equal(kept[0], m) and torch.equal(kept[1], v)
    assert torch.equal(weight[-tail:], small[0])


@large
def test_directions_beyond_2_to_the_31(room_for):
    room_for(14)
    tail = 1001
    base = torch.full((IN_ALL + tail,), 0.5, dtype=torch.bfloat16, device="cuda")
    scales = torch.tensor([0.25, 0.5], dtype=torch.float64, device="cuda")
    end = base[-tail:].clone()
    ops.perturb_(base, base, [3, 4], [1.0, -1.0], name="w", scales=scales)
    ops.perturb_(end, end, [3, 4], [1.0, -1.0], name="w", scales=scales, offset=IN_ALL)
    assert torch.equal(base[-tail:], end)
