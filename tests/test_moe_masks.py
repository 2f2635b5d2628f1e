"""Experts in 3-D parameters: masks, the optimizer against a loop over plain matrices, identify, verify, finetune."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXPERT_WIDTH, EXPERTS, HIDDEN, tiny_model, tiny_tokenizer
from tiny_units import frozen_elements, tiny_units
from torch import nn

from ssah_fast import memory_plan
from ssah_fast.categories import Category
from ssah_fast.cli.main import main
from ssah_fast.compaction import compact
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.masks import Mask, Region
from ssah_fast.optim import MaskedAdamW, clip_grad_norm_, trainer_kwargs
from ssah_fast.partition import identify
from ssah_fast.scores import ModuleScores, Scores
from ssah_fast.units import Slice, UnitModule
from ssah_fast.verification import verify

E, A, B = 5, 6, 4


def flags(seed: int = 0) -> torch.Tensor:
    """Frozen rows of five experts of six: of one none, of one all, of the others some."""
    chosen = torch.rand(E, A, generator=torch.Generator().manual_seed(seed)) < 0.5
    chosen[1], chosen[3] = True, False
    return chosen


# the optimizer


SHAPES = {"rows": (E, A, B), "columns": (E, B, A), "bias": (E, A)}


def stacks(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def mask_of(chosen: torch.Tensor) -> Mask:
    return Mask({"rows": ("rows", chosen), "columns": ("columns", chosen), "bias": ("rows", chosen)})


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def plain_experts(parameters: dict[str, nn.Parameter], chosen: torch.Tensor):
    """One parameter per expert, and its own mask."""
    each = {f"{name}.{e}": nn.Parameter(p[e].detach().clone()) for name, p in parameters.items() for e in range(E)}
    axes = {"rows": 0, "columns": 1, "bias": 0}
    return each, Mask({f"{name}.{e}": (axis, chosen[e]) for name, axis in axes.items() for e in range(E)})


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"amsgrad": True, "maximize": True}),
        (torch.float64, {}),
        (torch.bfloat16, {"rounding": "nearest"}),
        (torch.bfloat16, {"rounding": "kahan", "amsgrad": True}),
        (torch.float16, {"rounding": "master"}),
    ],
)
def test_the_optimizer_equals_one_over_plain_matrices(dtype, options, contiguous):
    chosen, parameters = flags(), stacks(dtype)
    if not contiguous:
        parameters = {
            name: nn.Parameter(p.detach().mT.contiguous().mT if p.ndim == 3 else p.detach())
            for name, p in parameters.items()
        }
    start = {name: p.detach().clone() for name, p in parameters.items()}
    each, plain_mask = plain_experts(parameters, chosen)
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    ours = MaskedAdamW(parameters.items(), mask=mask_of(chosen), **options)
    plain = MaskedAdamW(each.items(), mask=plain_mask, **options)
    for step in range(4):
        set_gradients(parameters, step)
        for name, parameter in parameters.items():
            for e in range(E):
                each[f"{name}.{e}"].grad = parameter.grad[e].clone()
        norms = [clip_grad_norm_(optimizer, 0.5) for optimizer in (ours, plain)]
        torch.testing.assert_close(*norms)
        for name, parameter in parameters.items():  # the two norms add up in different orders
            parameter.grad = torch.stack([each[f"{name}.{e}"].grad for e in range(E)])
        ours.step(), plain.step()
        if step == 1:  # goes on from its saved state
            state = ours.state_dict()
            ours = MaskedAdamW(parameters.items(), mask=mask_of(chosen), **options)
            ours.load_state_dict(state)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, torch.stack([each[f"{name}.{e}"] for e in range(E)]))
        frozen = frozen_elements(mask_of(chosen), name, parameter.shape)
        assert torch.equal(parameter[frozen], start[name][frozen])
        assert (parameter != start[name])[~frozen].float().mean() > 0.9
        state = ours.state[parameter]
        kept = [
            "exp_avg",
            "exp_avg_sq",
            *(key for key in ("max_exp_avg_sq", "compensation", "master") if key in state),
        ]
        for key in kept:
            assert state[key].shape == (int((~frozen).sum()),)
        assert state["step"].item() == 4


def test_stochastic_rounding_goes_by_the_place_in_the_region():
    """The draws of a stack are those of its trainable part, cut out and laid in a row."""
    chosen, parameters = flags(), stacks(torch.bfloat16)
    del parameters["bias"]
    mask = mask_of(chosen)
    row = {
        name: nn.Parameter(p.detach()[~frozen_elements(mask, name, p.shape)].clone()) for name, p in parameters.items()
    }
    options = {"lr": 1e-3, "weight_decay": 0.1, "seed": 7}
    optimizers = [
        MaskedAdamW(parameters.items(), mask=mask, **options),
        MaskedAdamW(row.items(), mask=Mask({"rows": ("rows", [])}), **options),
    ]
    for step in range(3):
        set_gradients(parameters, step)
        for name, p in parameters.items():
            row[name].grad = p.grad[~frozen_elements(mask, name, p.shape)]
        for optimizer in optimizers:
            optimizer.step()
    for name, p in parameters.items():
        assert torch.equal(p[~frozen_elements(mask, name, p.shape)], row[name])


def test_odd_uses_of_a_stack():
    chosen, parameters = flags(), stacks()
    mask = mask_of(chosen)
    optimizer = MaskedAdamW(parameters.items(), mask=mask, lr=0.01, check_grads=True)
    set_gradients(parameters, 0)
    with torch.no_grad():
        parameters["columns"].grad[0, 2, int((~chosen[0]).nonzero()[-1])] = torch.inf
        parameters["columns"].grad[1] = torch.nan  # frozen
    with pytest.raises(NonFiniteError, match=re.escape(f"columns is inf at [0, 2, {int((~chosen[0]).nonzero()[-1])}]")):
        optimizer.step()
    set_gradients(parameters, 0)
    optimizer.step()
    parameters["rows"].data = parameters["rows"].data.clone()  # other memory
    old, frozen = parameters["rows"].detach().clone(), frozen_elements(mask, "rows", SHAPES["rows"])
    optimizer.step()
    assert torch.equal(parameters["rows"] != old, ~frozen)
    other = flags(seed=5)
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in parameters.items()}
    before = {name: ~frozen_elements(mask, name, shape) for name, shape in SHAPES.items()}
    optimizer.migrate_mask(mask_of(other))
    for name, p in parameters.items():
        dense = torch.zeros(SHAPES[name])
        dense.view(-1)[in_order(before[name], name)] = moments[name]
        now = ~frozen_elements(mask_of(other), name, SHAPES[name])
        assert torch.equal(optimizer.state[p]["exp_avg"], dense.view(-1)[in_order(now, name)])
    optimizer.step()
    dense = torch.optim.AdamW(parameters.items())
    set_gradients(parameters, 0)
    dense.step()
    state = dense.state_dict()
    optimizer = MaskedAdamW(parameters.items(), mask=mask)
    optimizer.load_state_dict(state)
    assert optimizer.state[parameters["columns"]]["exp_avg"].shape == (int(before["columns"].sum()),)
    optimizer.step()


def in_order(chosen: torch.Tensor, name: str) -> torch.Tensor:
    """The places of elements in the order of a region: expert by expert, each as it lies in memory."""
    return chosen.flatten().nonzero().squeeze(1)


# on disk


def fused_copy(model: nn.Module, source, target):
    """The checkpoint with every parameter under its name in the model, in one file."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, target / "model.safetensors")


def trained(model: nn.Module, mask: Mask) -> nn.Module:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter[~frozen_elements(mask, name, parameter.shape)] += 0.25
    return tuned


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "deepseek_v3"])
def checkpoints(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    mask = tiny_units(model).mask(model, freeze="scu,cu")
    tuned = trained(model, mask)
    model.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned", max_shard_size="60KB")
    fused_copy(model, folder / "base", folder / "base-fused")
    fused_copy(tuned, folder / "base", folder / "tuned-fused")
    return folder, model, mask


@pytest.mark.parametrize("base", ["base", "base-fused"])
@pytest.mark.parametrize("tuned", ["tuned", "tuned-fused"])
def test_the_certificate_of_experts(checkpoints, base, tuned):
    folder, model, mask = checkpoints
    certificate = verify(folder / base, folder / tuned, mask, memory="64KiB")
    totals = certificate.document["totals"]
    frozen = sum(int(frozen_elements(mask, name, p.shape).sum()) for name, p in model.named_parameters())
    trainable = sum(p.numel() for p in model.parameters()) - frozen
    assert certificate.ok
    assert totals["frozen"] == frozen
    assert totals["trainable_changed"] == trainable
    rows = {(row["kind"], row["category"]): row["frozen"] for row in mask.summary(model.named_parameters())}
    assert certificate.document["categories"]["scu"]["frozen"] == sum(n for key, n in rows.items() if key[1] == "scu")
    buffers = {name for name, _ in model.named_buffers()}  # are stored, and no part of the copies
    assert {entry["parameter"] for entry in certificate.document["not_compared"]} <= buffers


def test_one_changed_bit_of_an_expert(checkpoints, tmp_path):
    folder, model, mask = checkpoints
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{leaf}"
        tuned = trained(model, mask)
        parameter, region = tuned.get_parameter(name), mask[name]
        place = frozen_elements(mask, name, parameter.shape).nonzero()[-1].tolist()
        with torch.no_grad():
            parameter[tuple(place)] += 1
        tuned.save_pretrained(tmp_path / leaf)
        certificate = verify(folder / "base", tmp_path / leaf, mask)
        (violation,) = certificate.document["violations"]
        assert certificate.changed_frozen == violation["elements"] == 1
        assert violation["parameter"] == name
        assert (violation["expert"], violation["axis"]) == (place[0], region.axis)
        assert violation["index"] == place[region.axis]


def test_an_expert_that_is_not_there(checkpoints, tmp_path):
    folder, model, mask = checkpoints
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    one_by_one = any(".experts.2." in key for key in weights)
    gone = next(key for key in weights if (".experts.2." if one_by_one else ".experts.down_proj") in key)
    save_file({key: value for key, value in weights.items() if key != gone}, tmp_path / "model.safetensors")
    if one_by_one:
        with pytest.raises(SsahError, match="incomplete"):
            verify(folder / "base", tmp_path, mask)
    else:
        violations = verify(folder / "base", tmp_path, mask).document["violations"]
        assert ("missing", gone) in {(violation["reason"], violation["parameter"]) for violation in violations}


# masks


def test_ways_to_write_a_mask_of_a_stack(tmp_path):
    chosen = flags()
    by_flags = Mask({"w": ("columns", chosen)})
    region = Region(2, chosen.flatten().nonzero().squeeze(1), E * A, stacked=True)
    assert by_flags["w"] == region == Region(2, chosen, stacked=True) == Mask({"w": (2, chosen)})["w"]
    assert by_flags != Mask({"w": (2, chosen.flatten())})
    axis, trainable = by_flags.trainable("w", SHAPES["columns"])
    assert axis == 2 and torch.equal(trainable, (~chosen).flatten().nonzero().squeeze(1))
    by_flags.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert loaded == by_flags and loaded["w"].stacked
    whole_experts = Mask({"w": ("rows", [1, 3])})
    assert frozen_elements(whole_experts, "w", SHAPES["columns"])[1].all()
    other = Mask({"w": ("columns", flags(seed=9))})
    for combined, expected in (
        (by_flags | other, chosen | flags(9)),
        (by_flags & other, chosen & flags(9)),
        (by_flags - other, chosen & ~flags(9)),
    ):
        assert combined["w"] == Region(2, expected, stacked=True)
    assert (by_flags | Mask({"w": Region(0, None, E)}))["w"].frozen is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Region(0, [1], 4, stacked=True), "axis 0 of a stack of experts tells them apart"),
        (lambda: Mask({"w": ("columns", flags())}).trainable("w", (E, B, A + 1)), "axis 2 of every expert of size 30"),
        (lambda: Mask({"w": ("columns", flags())}).trainable("w", (E, A)), "mask is for axis 2 of every expert"),
        (lambda: Mask({"w": ("columns", flags())}) | Mask({"w": ("rows", [1])}), "axis 2 of every expert in one and"),
        (lambda: Region(2, torch.zeros(2, 3, 4, dtype=torch.bool)), "not one list of integers"),
    ],
)
def test_wrong_masks_of_a_stack(wrong, message):
    with pytest.raises(SsahError, match=message):
        wrong()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_frozen_experts_compute_the_same(model_type):
    """An expert's frozen neurons have the same activations and columns, whatever its other neurons do."""
    model = tiny_model(model_type)
    units = tiny_units(model)
    mask = units.mask(model, freeze="scu")
    changed = trained(model, mask)
    name = "model.layers.1.mlp.experts"
    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(3))
    for e in range(EXPERTS):
        kept = units.category[f"{name}.{e}"] == 3
        hidden, columns = [], []
        for module in (model.get_submodule(name), changed.get_submodule(name)):
            gate_up, down = module.gate_up_proj[e], module.down_proj[e]
            out = x @ (gate_up if module.is_transposed else gate_up.T)
            out = out + module.gate_up_proj_bias[e] if module.has_bias else out
            hidden.append(module._apply_gate(out))
            columns.append(down.T if not module.is_transposed else down)
        assert torch.equal(hidden[0][:, kept], hidden[1][:, kept])
        assert torch.equal(columns[0][kept], columns[1][kept])
        assert (columns[0] != columns[1])[~kept].all()
        assert kept.any() and kept.numel() == EXPERT_WIDTH


def test_routers_are_no_units_and_follow_the_policy_other():
    model = tiny_model("mixtral")
    units, router = tiny_units(model), "model.layers.0.mlp.gate.weight"
    assert router not in units.mask(model, freeze="scu")
    assert units.mask(model, freeze="scu", policy={"other": "freeze"})[router].frozen is None
    assert units.mask(model, train="ru")[router].frozen is None


def test_the_trainer_silences_frozen_lines_of_experts():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            for name, parameter in stacks().items():
                self.register_parameter(name, parameter)

    model, mask = Holder(), mask_of(flags())
    factory, arguments = trainer_kwargs(mask, lr=1e-2)["optimizer_cls_and_kwargs"]
    factory()(model, **arguments)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad == 0, frozen_elements(mask, name, parameter.shape))


# identify


def scores_of(counts: dict[str, int], width: int = 40) -> Scores:
    """Two layers of experts and an MLP beside them, with random importances; `counts` are tokens by module."""
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for layer in range(2):
        for e in (None, 0, 1, 2):
            parent = f"model.layers.{layer}.mlp.{'shared_expert' if e is None else 'experts'}"
            name = parent if e is None else f"{parent}.{e}"
            stacked = {} if e is None else {"start": e * width, "stacked": True}
            channels = Slice(f"{parent}.down_proj", 2 if stacked else 1, 8, **stacked)
            layout = UnitModule(name, "mlp", layer, width, parent, channels, (channels,), expert=e)
            count = torch.full((2, 2), counts.get(name, 10))
            moments = torch.rand(2, 2, 2, width, generator=generator, dtype=torch.float64)
            norm = torch.rand(width, generator=generator, dtype=torch.float64) * (1 if e is None else 1 + 9 * e)
            modules[name] = ModuleScores.from_moments(layout, count, *moments, norm, "variance")
    return Scores(modules, {}, "variance")


UNSEEN = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize("normalize", ["share", "zscore"])
def test_experts_of_a_layer_share_one_total(normalize):
    scores = scores_of({UNSEEN: 0})
    units = identify(scores, 0.1, 0.1, 0.1, normalize=normalize)
    assert (units.category[UNSEEN] == Category.UNOBSERVED).all()
    assert units.count("unobserved") == 40
    for layer in range(2):
        names = [f"model.layers.{layer}.mlp.experts.{e}" for e in range(3)]
        pool = [name for name in names if name != UNSEEN]
        importance = torch.cat([scores.safety[name] for name in pool])
        found = torch.cat([units.safety[name] for name in pool])
        if normalize == "share":
            torch.testing.assert_close(found, importance / importance.sum())
        else:
            torch.testing.assert_close(found, (importance - importance.mean()) / importance.std())
    dense = "model.layers.0.mlp.shared_expert"
    assert normalize == "zscore" or units.safety[dense].sum() == pytest.approx(1)


def test_the_floor_of_the_ratio_is_that_of_the_pool():
    scores = scores_of({})
    weak, pool = "model.layers.0.mlp.experts.0", [f"model.layers.0.mlp.experts.{e}" for e in range(3)]
    scores.modules[weak].importance[:] *= 1e-4
    units = identify(scores, 0.1, 0.1, 0.1, contrast="ratio")
    assert len(pool) == 3 and not (units.category[weak] >= Category.UCU).any()


def test_a_pool_that_no_token_reached():
    names = [f"model.layers.1.mlp.experts.{e}" for e in range(3)]
    units = identify(scores_of(dict.fromkeys(names, 0)), 0.1, 0.1, 0.1)
    assert all((units.category[name] == Category.UNOBSERVED).all() for name in names)


def test_inspect_shows_one_row_per_layer_of_experts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    scores = scores_of({UNSEEN: 0})
    scores.save("scores.safetensors")
    assert main(["identify", "scores.safetensors", "-o", "units.safetensors"]) == 0
    assert "reached 1 of 6 experts" in capsys.readouterr().out
    identify(scores, 0.2, 0.1, 0.1).save("other.safetensors")
    Mask({"model.layers.1.mlp.experts.down_proj": ("columns", flags())}).save("mask.safetensors")
    for file in ("scores", "units"):
        assert main(["inspect", f"{file}.safetensors"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"1 │ mlp +│ model\.layers\.1\.mlp\.experts +│ +120 │ +3 │ +1 │", out)
        assert re.search(r"1 │ mlp +│ model\.layers\.1\.mlp\.shared_expert +│ +40 │ +- │ +- │", out)
        assert "experts.2" not in out
        assert main(["inspect", f"{file}.safetensors", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["modules"]
        assert [row["module"] for row in rows] == list(scores.modules)
    assert main(["inspect", "mask.safetensors"]) == 0
    assert "columns per expert" in capsys.readouterr().out
    assert main(["diff", "units.safetensors", "other.safetensors"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < 12  # by layer, not by expert


# training


@pytest.mark.parametrize(("model_type", "dtype"), [("mixtral", torch.float32), ("gpt_oss", torch.bfloat16)])
def test_finetune_keeps_frozen_experts(model_type, dtype, tmp_path):
    training = pytest.importorskip("ssah_fast.training")
    model = tiny_model(model_type, dtype)
    model.save_pretrained(tmp_path / "base")
    mask = tiny_units(model).mask(model, freeze="scu,cu")
    data = [{"prompt": "w1 w2 w3", "response": f"w{i} w{i + 1} w4"} for i in range(8)]
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "save_steps": 0,
    }
    result = training.finetune(model, tiny_tokenizer(), data, tmp_path / "tuned", mask=mask, **options)
    totals = verify(tmp_path / "base", tmp_path / "tuned", mask).document["totals"]
    assert totals["frozen_changed"] == totals["frozen_not_compared"] == 0 < totals["frozen"]
    assert totals["frozen"] == result.manifest["counts"]["frozen"]
    experts = verify(tmp_path / "base", tmp_path / "tuned", mask).document["kinds"]["mlp"]
    assert experts["trainable_changed"] > experts["trainable"] / 2


def test_the_memory_plan_counts_trainable_elements_of_experts():
    model = tiny_model("mixtral")
    mask = tiny_units(model).mask(model, freeze="scu,cu")
    plan = memory_plan.plan(model, mask, compact=False, batch_size=2, seq_length=16)
    trainable = sum(row["trainable"] for row in mask.summary(model.named_parameters()))
    assert plan.run.moments == 2 * 4 * trainable
    compacted = compact(copy.deepcopy(model), mask)  # leaves experts as they are
    assert compacted.get_parameter("model.layers.0.mlp.experts.down_proj").requires_grad
