"""MaskedAdamW without a mask is a torch.optim.AdamW: PyTorch's own optimizer inputs and checks, rewritten for it.

The configurations, error cases and comparison tools are those of torch.testing._internal.common_optimizers (they ship
with torch and need expecttest); the checks are named as in PyTorch's test/test_optim.py.
"""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytest.importorskip("expecttest")

from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from ssah_fast.errors import SsahError
from ssah_fast.optim import MaskedAdamW

INFO = OptimizerInfo(
    MaskedAdamW,
    optim_inputs_func=optim_inputs_func_adamw,
    optim_error_inputs_func=optim_error_inputs_func_adamw,
    scheduler_inputs=(
        [lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9)],
        [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4)],
        [
            lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
            lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
        ],
    ),
    supported_impls=("foreach", "fused"),
    supports_fused_on=("cpu",),
    supports_complex=False,
)
BOTH = (MaskedAdamW, AdamW)


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Sigmoid(), nn.Linear(5, 3), nn.Sigmoid()).to(dtype)


def fill_grads(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def kwargs_of_all_inputs(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, INFO)
    return [{"foreach": None, "fused": None, **config.kwargs} for config in inputs]


class TestMaskedAdamW(TestCase):
    @optims([INFO])
    def test_errors(self, device, dtype, optim_info):
        for case in optim_info.optim_error_inputs_func(device, dtype):
            self.assertEqual(case.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            params = case.optimizer_error_input.params
            if params is None:
                params = [nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))]
            if case.error_type is UserWarning:
                with self.assertWarnsRegex(UserWarning, case.error_regex):
                    optim_info.optim_cls(params, **case.optimizer_error_input.kwargs)
                continue
            with self.assertRaisesRegex(case.error_type, case.error_regex):
                optim_info.optim_cls(params, **case.optimizer_error_input.kwargs)

    def test_further_errors(self):
        parameter = nn.Parameter(torch.ones(2))
        for message, arguments in {
            "Invalid learning rate: -1": {"lr": -1},
            "Invalid learning rate: nan": {"lr": float("nan")},
            "Invalid epsilon value: -1": {"eps": -1},
            "Invalid beta parameter at index 1: 1.5": {"betas": (0.9, 1.5)},
            "must be 1-element": {"betas": (torch.tensor([0.9, 0.8]), torch.tensor(0.9))},
            "differentiable=True is not supported": {"differentiable": True},
            "`fused` and `foreach` cannot be `True` together": {"fused": True, "foreach": True},
            "rounding='up' is unknown; choose one of stochastic, kahan, master, nearest": {"rounding": "up"},
        }.items():
            with self.assertRaisesRegex(SsahError, message):
                MaskedAdamW([parameter], **arguments)
        with self.assertRaisesRegex(ValueError, "empty parameter list"):
            MaskedAdamW([])
        with self.assertRaisesRegex(ValueError, "non-leaf"):
            MaskedAdamW([parameter * 2])

    @optims([INFO])
    def test_forloop_goes_right_direction(self, device, dtype, optim_info):
        """The loss goes down for each configuration and scheduler, for contiguous and other weights."""
        for schedulers in ([], *optim_info.scheduler_inputs):
            for contiguous in (True, False):
                for kwargs in kwargs_of_all_inputs(device, dtype):
                    self._check_direction(device, dtype, {"lr": 1e-2, **kwargs}, schedulers, contiguous)

    def _check_direction(self, device, dtype, kwargs, schedulers, contiguous):
        torch.manual_seed(1)
        if contiguous:
            weight = nn.Parameter(torch.randn(10, 5, device=device, dtype=dtype))
            bias = nn.Parameter(torch.randn(10, device=device, dtype=dtype))
        else:
            weight = nn.Parameter(torch.randn(10, 5, 2, device=device, dtype=dtype)[..., 0])
            bias = nn.Parameter(torch.randn(10, 2, device=device, dtype=dtype)[..., 0])
        x = torch.randn(5, device=device, dtype=dtype)
        optimizer = MaskedAdamW([weight, bias], **kwargs)
        steppers = [make(optimizer) for make in schedulers]

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (weight.mv(x) + bias).square().sum()
            value.backward()
            if not contiguous:  # strided gradients, too
                weight.grad = torch.stack([weight.grad] * 2, -1)[..., 0]
            return value

        first = loss().item()
        for _ in range(20):
            value = optimizer.step(loss).item()
            for scheduler in steppers:
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(value) if plateau else scheduler.step()
        last = loss().item()
        if kwargs.get("maximize"):
            self.assertGreater(last, first)
        else:
            self.assertLess(last, first)

    @optims([INFO])
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for schedulers in optim_info.scheduler_inputs:
            weight, bias = (nn.Parameter(torch.ones(4, device=device, dtype=dtype)) for _ in range(2))
            optimizer = MaskedAdamW([{"params": [weight]}, {"params": [bias], "lr": 0.05}], lr=0.02)
            steppers = [make(optimizer) for make in schedulers]
            before = (weight + bias).sum().item()
            for _ in range(10):
                optimizer.zero_grad()
                (weight + bias).square().sum().backward()
                optimizer.step()
                for scheduler in steppers:
                    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(1.0) if plateau else scheduler.step()
            self.assertLess((weight + bias).sum().item(), before)
            self.assertLess(bias.sum().item(), weight.sum().item())

    @optims([INFO])
    def test_tensor_lr(self, device, dtype, optim_info):
        for lr in (torch.tensor(1e-2), torch.tensor([1e-2]), torch.tensor(1e-2, dtype=torch.float64)):
            for kwargs in kwargs_of_all_inputs(device, dtype):
                if kwargs["foreach"]:
                    continue
                a, b = make_model(), make_model()
                given = lr.clone()
                optimizers = (
                    MaskedAdamW(a.parameters(), **{**kwargs, "lr": given}),
                    MaskedAdamW(b.parameters(), **{**kwargs, "lr": lr.item()}),
                )
                schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
                for seed in range(4):
                    for model, optimizer, scheduler in zip((a, b), optimizers, schedulers, strict=True):
                        fill_grads(model, seed)
                        optimizer.step()
                        scheduler.step()
                self.assertIs(optimizers[0].param_groups[0]["lr"], given)
                self.assertEqual(weights(a), weights(b))

    def test_tensor_betas(self):
        a, b = make_model(), make_model()
        optimizers = (
            MaskedAdamW(a.parameters(), betas=(torch.tensor(0.5), torch.tensor([[0.75]]))),
            MaskedAdamW(b.parameters(), betas=(0.5, 0.75)),
        )
        for model, optimizer in zip((a, b), optimizers, strict=True):
            fill_grads(model, 0)
            optimizer.step()
        self.assertEqual(weights(a), weights(b), rtol=0, atol=0)

    @optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_foreach_and_fused_match_forloop(self, device, dtype, optim_info):
        """The flags change nothing; a layer is frozen and thawed and a gradient is missing on the way."""
        for config in optim_info.optim_inputs_func(device):
            for flags in ({"foreach": True}, {"foreach": False}, {"fused": True}):
                tracker = TensorTracker({"rtol": 0, "atol": 0})
                for value in self._run(dtype, config.kwargs):
                    tracker.add(value)
                for value in self._run(dtype, {**config.kwargs, **flags}):
                    tracker.pop_check_set(value, self)
                self.assertTrue(tracker.all_popped())

    def _run(self, dtype, kwargs):
        model = make_model(dtype)
        optimizer = MaskedAdamW(model.parameters(), **kwargs)
        for step in range(7):
            model[0].requires_grad_(step not in (2, 3))
            optimizer.zero_grad()
            model(torch.full((2, 7), 0.1 * (step + 1), dtype=dtype)).sum().backward()
            if step == 5:
                model[2].bias.grad = None
            optimizer.step()
            for parameter in model.parameters():
                yield parameter
                yield from optimizer.state[parameter].values()

    @optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_matches_torch_over_50_steps(self, device, dtype, optim_info):
        """All of torch's configurations, with gradients of a real model; moments, too."""
        for kwargs in kwargs_of_all_inputs(device, dtype):
            models, optimizers = [], []
            for kind in BOTH:
                models.append(make_model(dtype))
                optimizers.append(kind(models[-1].parameters(), **kwargs))
            tracker = TensorTracker({"rtol": 1e-6, "atol": 1e-6})
            for optimizer, model in zip(reversed(optimizers), reversed(models), strict=True):
                for step in range(50):
                    optimizer.zero_grad()
                    x = torch.randn(4, 7, dtype=dtype, generator=torch.Generator().manual_seed(step))
                    model(x).square().sum().backward()
                    optimizer.step()
                    for parameter in model.parameters():
                        for value in (
                            parameter,
                            *(optimizer.state[parameter][k] for k in sorted(optimizer.state[parameter])),
                        ):
                            tracker.add(value) if optimizer is optimizers[1] else tracker.pop_check_set(value, self)
            self.assertTrue(tracker.all_popped())

    def test_mixed_dtypes_in_a_group(self):
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        parameters = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in dtypes]
        optimizer = MaskedAdamW(parameters, lr=0.1, rounding="nearest")
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for parameter in parameters:
            self.assertEqual(
                parameter.detach().double(), torch.full((3, 2), 0.899, dtype=torch.float64), rtol=0, atol=2e-3
            )
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            self.assertEqual(optimizer.state[parameter]["exp_avg"].dtype, wide)

    def test_does_not_step_if_foundinf(self):
        for found_inf in (1.0, 0.0):
            model = make_model()
            optimizer = MaskedAdamW(model.parameters())
            before = weights(model)
            fill_grads(model, 0)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)
            optimizer.step()
            steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
            self.assertEqual(steps, [1.0 - found_inf] * 4)
            self.assertEqual(all(map(torch.equal, before, weights(model))), bool(found_inf))

    def test_param_groups_weight_decay_and_lr(self):
        model = make_model()
        groups = [{"params": model[0].parameters(), "weight_decay": 0.5, "lr": 0.1}, {"params": model[2].parameters()}]
        optimizer = MaskedAdamW(groups, lr=0.0, weight_decay=0.0)
        before = weights(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        after = weights(model)
        self.assertEqual(after[:2], [0.95 * x for x in before[:2]])
        self.assertEqual(after[2:], before[2:], rtol=0, atol=0)

    def test_empty_groups_and_missing_gradients_are_noops(self):
        model = make_model()
        optimizer = MaskedAdamW([{"params": []}, {"params": list(model.parameters())}], weight_decay=0.1)
        before = weights(model)
        optimizer.step()
        self.assertEqual(weights(model), before, rtol=0, atol=0)
        self.assertEqual(len(optimizer.state), 0)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)

    def test_step_is_noop_for_zero_grads(self):
        model = make_model()
        optimizer = MaskedAdamW(model.parameters(), weight_decay=0.0)
        before = weights(model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        self.assertEqual(weights(model), before, rtol=0, atol=0)

    def test_parameters_without_elements_and_without_axes(self):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in ((), (0,), (0, 3), (2, 0, 3))]
        optimizer = MaskedAdamW(parameters, lr=0.1)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        self.assertEqual(parameters[0].item(), 0.899, rtol=0, atol=1e-6)
        optimizer.load_state_dict(optimizer.state_dict())

    @optims([INFO])
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for kwargs in kwargs_of_all_inputs(device, dtype):
            text = repr(MaskedAdamW([nn.Parameter(torch.ones(2))], **kwargs))
            self.assertIn("MaskedAdamW", text)
            self.assertIn("rounding: stochastic", text)

    @optims([INFO])
    def test_state_dict_deterministic(self, device, dtype, optim_info):
        """A run that goes on from a state dict ends with the same bits; with names, without, and across."""
        for kwargs in kwargs_of_all_inputs(device, dtype):
            for named, other_named in ((False, False), (True, True), (True, False), (False, True)):
                model, other = make_model(), make_model()
                optimizer = MaskedAdamW(model.named_parameters() if named else model.parameters(), **kwargs)
                for seed in range(3):
                    fill_grads(model, seed)
                    optimizer.step()
                other.load_state_dict(model.state_dict())
                resumed = MaskedAdamW(other.named_parameters() if other_named else other.parameters(), **kwargs)
                resumed.load_state_dict(optimizer.state_dict())
                for seed in range(3, 6):
                    for m, o in ((model, optimizer), (other, resumed)):
                        fill_grads(m, seed)
                        o.step()
                self.assertEqual(weights(model), weights(other), rtol=0, atol=0)
                self.assertEqual("param_names" in resumed.param_groups[0], named or other_named)

    @optims([INFO])
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for kwargs in [*kwargs_of_all_inputs(device, dtype), {"lr": torch.tensor(0.01)}]:
            model = make_model(torch.bfloat16)
            optimizer = MaskedAdamW(model.parameters(), **kwargs)
            fill_grads(model, 0)
            optimizer.step()
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            self.assertEqual(loaded, optimizer.state_dict(), rtol=0, atol=0)
            other = MaskedAdamW(model.parameters())
            other.load_state_dict(loaded)
            self.assertEqual(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
            self.assertEqual(other.state[model[0].weight]["exp_avg"].dtype, torch.float32)

    def test_can_load_older_state_dict(self):
        """Flags that the file lacks are this optimizer's own; a step that is a number becomes a tensor."""
        model = make_model()
        optimizer = MaskedAdamW(model.parameters(), rounding="kahan", seed=7)
        fill_grads(model, 0)
        optimizer.step()
        saved = optimizer.state_dict()
        for key in ("rounding", "seed", "check_grads", "maximize", "mask", "fused"):
            del saved["param_groups"][0][key]
        for state in saved["state"].values():
            state["step"] = state["step"].item()
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        self.assertEqual((group["rounding"], group["seed"], group["maximize"]), ("kahan", 7, False))
        optimizer.step()
        step = optimizer.state[model[0].weight]["step"]
        self.assertEqual((step.item(), step.dtype, step.shape), (2.0, torch.float32, torch.Size([])))

    @optims([INFO])
    def test_loads_from_and_into_torch_adamw(self, device, dtype, optim_info):
        for kwargs in kwargs_of_all_inputs(device, dtype):
            for source, target in (BOTH, BOTH[::-1]):
                models = make_model(), make_model()
                first = source(models[0].parameters(), **kwargs)
                fill_grads(models[0], 0)
                first.step()
                models[1].load_state_dict(models[0].state_dict())
                second = target(models[1].parameters(), **kwargs)
                second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch keeps the tensors
                for model, optimizer in zip(models, (first, second), strict=True):
                    fill_grads(model, 1)
                    optimizer.step()
                self.assertEqual(weights(models[0]), weights(models[1]), rtol=1e-6, atol=1e-7)

    def test_load_state_dict_refuses_other_groups(self):
        model = make_model()
        optimizer = MaskedAdamW(model.parameters())
        fill_grads(model, 0)
        optimizer.step()
        for groups, message in (
            ([{"params": list(model.parameters())[:3]}], "doesn't match the size"),
            ([{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}], "different number"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                MaskedAdamW(groups).load_state_dict(optimizer.state_dict())

    def test_state_dict_hooks(self):
        model = make_model()
        optimizer = MaskedAdamW(model.parameters())
        fill_grads(model, 0)
        optimizer.step()
        calls = []
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("first"), prepend=True)
        handle = optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "test": True})
        self.assertTrue(optimizer.state_dict()["test"])
        self.assertEqual(calls, ["first", "pre"])
        handle.remove()
        self.assertNotIn("test", optimizer.state_dict())

    def test_load_state_dict_hooks(self):
        model = make_model()
        optimizer = MaskedAdamW(model.parameters())
        fill_grads(model, 0)
        optimizer.step()
        saved = optimizer.state_dict()
        calls = []

        def in_place(_, state_dict):
            calls.append("in place")
            state_dict["param_groups"] = [{**state_dict["param_groups"][0], "lr": 0.25}]

        def returned(_, state_dict):
            calls.append("returned")
            state = {k: {**v, "exp_avg_sq": v["exp_avg_sq"] * 2} for k, v in state_dict["state"].items()}
            return {**state_dict, "state": state}

        other = MaskedAdamW(model.parameters())
        other.register_load_state_dict_pre_hook(in_place)
        other.register_load_state_dict_pre_hook(returned, prepend=True)
        other.register_load_state_dict_post_hook(lambda o: calls.append(len(o.state)))
        other.load_state_dict(saved)
        self.assertEqual(calls, ["returned", "in place", 4])
        self.assertEqual(other.param_groups[0]["lr"], 0.25)
        weight = model[0].weight
        self.assertEqual(other.state[weight]["exp_avg_sq"], 2 * optimizer.state[weight]["exp_avg_sq"])
        self.assertEqual(saved["param_groups"][0]["lr"], 1e-3)

    def test_step_hooks(self):
        model = make_model()
        optimizer = MaskedAdamW(model.parameters())
        fill_grads(model, 0)
        calls = []
        every = register_optimizer_step_pre_hook(lambda o, a, k: calls.append("every"))
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
        optimizer.register_step_post_hook(lambda o, a, k: calls.append(len(o.state)))
        optimizer.step()
        optimizer.step(None)
        every.remove()
        optimizer.step(closure=lambda: calls.append("closure"))
        self.assertEqual(calls, ["every", "pre", 4] * 2 + ["pre", "closure", 4])

    def test_deepcopy_copies_all_public_attrs(self):
        optimizer = MaskedAdamW(make_model().parameters(), rounding="master")
        copied = copy.deepcopy(optimizer)
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        self.assertEqual(public, {name for name in vars(copied) if not name.startswith("_")})
        self.assertEqual(copied.defaults, optimizer.defaults)

    def test_non_empty_state(self):
        """State of parameters that are not in any group is kept as it is."""
        model = make_model()
        optimizer = MaskedAdamW(model.parameters())
        fill_grads(model, 0)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"]["extra"] = {"note": torch.ones(1)}
        saved["state"][0]["own"] = torch.arange(3)
        optimizer.load_state_dict(saved)
        self.assertEqual(optimizer.state["extra"], {"note": torch.ones(1)})
        self.assertEqual(optimizer.state[model[0].weight]["own"], torch.arange(3))

    def test_writes_are_seen_by_autograd(self):
        """A step between forward and backward is an error, not a wrong gradient."""
        model = make_model()
        optimizer = MaskedAdamW(model.parameters())
        fill_grads(model, 0)
        loss = model(torch.ones(1, 7)).sum()
        optimizer.step()
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            loss.backward()


instantiate_device_type_tests(TestMaskedAdamW, globals(), only_for="cpu")

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.95**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [10, 30]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=100),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 100),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=60),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=10), lr_scheduler.ExponentialLR(o, 0.9)], [10]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_it_as_it_drives_torchs(name):
    models = make_model(), make_model()
    runs = []
    for kind, model in zip(BOTH, models, strict=True):
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs.append((model, optimizer, SCHEDULERS[name](optimizer)))
    for step in range(50):
        for model, optimizer, scheduler in runs:
            fill_grads(model, step)
            optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    (_, ours, _), (_, theirs, _) = runs
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_at_most_twice_as_far_from_float64_as_torchs(dtype, rounding, amsgrad):
    """Over 50 steps with weight decay; root mean square over 4,096 weights."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=generator)
    gradients = [torch.randn(64, 64, generator=generator).to(dtype) for _ in range(50)]
    options = {"lr": 1e-3, "weight_decay": 0.1, "amsgrad": amsgrad, "eps": 1e-4}
    finals = {}
    for key, kind, kept, extra in (
        ("ours", MaskedAdamW, dtype, {"rounding": rounding}),
        ("theirs", AdamW, dtype, {}),
        ("exact", AdamW, torch.float64, {}),
    ):
        parameter = nn.Parameter(start.to(dtype).to(kept))
        optimizer = kind([parameter], **options, **extra)
        for gradient in gradients:
            parameter.grad = gradient.to(kept)
            optimizer.step()
        finals[key] = parameter.detach().double()
    errors = {key: (finals[key] - finals["exact"]).square().mean().sqrt().item() for key in ("ours", "theirs")}
    assert errors["ours"] <= 2 * errors["theirs"]


def test_parameters_replaced_between_steps_are_looked_at_again():
    """A model cast after the optimizer was made keeps its Parameter objects; their dtype and storage are others."""
    model = torch.nn.Linear(5, 3)
    optimizer = MaskedAdamW(model.named_parameters(), lr=0.1, rounding="kahan")
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
        model.to(dtype)
        before = model.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert model.weight.dtype == dtype and not torch.equal(before, model.weight)
