"""perturb_ and direction_scales on every backend: bit against bit, against exact Box-Muller, and the noise as noise."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import targets, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tolerances import NORMS
from torch import Tensor

from ssah_fast import ops
from ssah_fast.errors import SsahError
from ssah_fast.kernels import reference, registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
# Sizes and offsets; keys change every 2^33 positions.
PLACES = [(1, 0), (1, 1), (2, 31), (31, 1), (33, 2**33 - 1), (1000, 0), (1025, 8190), (2500, 2**33 - 37)]
SEEDS, ALPHAS = [123, -5, 2**64 - 1], [0.3, -0.01, 2.0]
SCALES = torch.tensor([0.5, 2.0, 0.01], dtype=torch.float64)
DRAWS = 1 << 20  # of the statistics: their standard errors are stated as multiples of 1 / sqrt(DRAWS)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture(params=targets("perturb_"))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of one backend, which is the one in use."""
    return use(request.param, monkeypatch)


@pytest.fixture(params=targets("perturb_", reference=False))
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The same without plain torch."""
    return use(request.param, monkeypatch)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def perturbed(base: Tensor, directions: list[int], alphas: list[float], **options: Any) -> Tensor:
    out = torch.full_like(base, math.nan)
    ops.perturb_(out, base, directions, alphas, **({"name": "w"} | options))
    return out


def direction(count: int, seed: int = 123, name: str = "w", offset: int = 0) -> Tensor:
    """The first elements of a direction, as float64."""
    ones = torch.ones(1, dtype=torch.float64)
    return perturbed(torch.zeros(count), [seed], [1.0], name=name, scales=ones, offset=offset).double()


# ---- bits


@dtypes
def test_every_backend_gives_the_bits_of_the_reference(kernel_device: torch.device, dtype: torch.dtype) -> None:
    id = ops.tensor_id("w")
    for count, offset in PLACES:
        base, expected = tensor(count, dtype=dtype), torch.empty(count, dtype=dtype)
        factors = torch.tensor(ALPHAS, dtype=torch.float64) * SCALES
        reference.perturb_(expected, base, SEEDS, factors, id, offset)
        options = {"scales": SCALES.to(kernel_device), "offset": offset}
        assert same_bits(perturbed(base.to(kernel_device), SEEDS, ALPHAS, **options), expected), (count, offset)


def test_the_noise_stays_what_it_is(device: torch.device) -> None:
    # Pinned when the generator was written: published landscapes must be drawn again by later versions.
    ones = torch.ones(1, dtype=torch.float64, device=device)
    drawn = perturbed(torch.zeros(4, device=device), [123], [1.0], name="model.embed_tokens.weight", scales=ones)
    assert bits(drawn).tolist() == [1063352776, 1059400992, -1104399996, 1065490416]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_gives_the_bits_of_the_reference(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = {str(dtype): tensor(20_011, dtype=dtype) for dtype in DTYPES}
    for base in bases.values():
        base[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    save_file(bases, tmp_path / "bases")
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file; from ssah_fast import ops\n"
        "bases = load_file(sys.argv[1])\n"
        "options = {'name': 'w', 'offset': 2**33 - 9001}\n"
        "scales = {key: ops.direction_scales(base[3:], [1, 2], **options) for key, base in bases.items()}\n"
        "for base in bases.values():\n"
        "    ops.perturb_(base, base, [1, 2], [0.1, 2], **options, scales=torch.full((2,), 0.7, dtype=torch.float64))\n"
        "save_file(bases | {'scales ' + key: x for key, x in scales.items()}, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bases"), str(tmp_path / "outputs")]
    environment = os.environ | {"SSAH_FAST_CPU_ISA": isa, registry.VARIABLE: "cpp"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "this CPU cannot run it" in done.stderr:
        pytest.skip(f"this CPU cannot run {isa}")
    assert done.returncode == 0, done.stderr
    outputs = load_file(tmp_path / "outputs")
    monkeypatch.setenv(registry.VARIABLE, "torch")
    scales = torch.full((2,), 0.7, dtype=torch.float64)
    for key, base in bases.items():
        expected = perturbed(base, [1, 2], [0.1, 2], scales=scales, offset=2**33 - 9001)
        assert same_bits(outputs[key].nan_to_num(7), expected.nan_to_num(7)), key
        expected = ops.direction_scales(base[3:], [1, 2], name="w", offset=2**33 - 9001)
        torch.testing.assert_close(outputs[f"scales {key}"], expected, rtol=NORMS, atol=0)


def test_any_number_of_threads_gives_the_same_bits(threads: Callable[[int], None]) -> None:
    base, results = tensor(50_021), []
    for count in (1, 2, 5):
        threads(count)
        scales = ops.direction_scales(base, SEEDS, name="w", offset=77)
        results.append((scales, perturbed(base, SEEDS, ALPHAS, scales=scales, offset=77)))
    assert all(same_bits(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 400), cut=st.integers(0, 400), offset=st.integers(0, 2**40), seed=st.integers(-(2**63), 2**64)
)
def test_shards_agree_with_the_whole(device: torch.device, count: int, cut: int, offset: int, seed: int) -> None:
    base, scales = tensor(count, dtype=torch.bfloat16).to(device), SCALES[:1].to(device)
    whole, cut = perturbed(base, [seed], [0.5], scales=scales, offset=offset), min(cut, count)
    parts = [
        perturbed(base[part], [seed], [0.5], scales=scales, offset=offset + part.start)
        for part in (slice(0, cut), slice(cut, count))
    ]
    assert same_bits(torch.cat(parts), whole)


# ---- what the op promises


@dtypes
def test_alpha_zero_is_the_base(device: torch.device, dtype: torch.dtype) -> None:
    base = tensor(301, dtype=dtype).to(device)
    base[:2] = torch.tensor([-0.0, 0.0])
    assert same_bits(perturbed(base, [1, 2], [0.0, -0.0]), base)
    assert same_bits(perturbed(base, [], []), base)
    in_place = base.clone()
    ops.perturb_(in_place, in_place, [1], [0], name="w")
    assert same_bits(in_place, base)


@dtypes
def test_in_place_and_back(device: torch.device, dtype: torch.dtype) -> None:
    base = tensor(37, 41, dtype=dtype).to(device)
    weight = base.clone()
    for alpha in (-0.5, 0.25, 0.0):  # always from the base: alpha 0 restores it
        ops.perturb_(weight, base, [3, 4], [alpha, 0.1 * alpha], name="w")
    assert same_bits(weight, base)
    expected = perturbed(base, [3], [0.5])
    ops.perturb_(weight, weight, [3], [0.5], name="w")
    assert same_bits(weight, expected)


@dtypes
@pytest.mark.parametrize("shape", [(1,), (7,), (40, 50), (3, 5, 64)], ids=str)
def test_a_direction_has_the_norm_of_the_tensor(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    base = (tensor(*shape, dtype=torch.float64) * 3).to(dtype).to(device)
    scale = ops.direction_scales(base, SEEDS, name="w", offset=5)
    for k, seed in enumerate(SEEDS):
        wide = torch.zeros(base.shape, device=device, dtype=torch.float32)
        ops.perturb_(wide, wide.clone(), [seed], [1.0], name="w", scales=scale[k : k + 1], offset=5)
        torch.testing.assert_close(wide.double().norm(), base.double().norm(), rtol=1e-6, atol=0)


def test_alpha_is_the_ratio_of_noise_to_weight(device: torch.device) -> None:
    base = tensor(60, 70).to(device)
    moved = perturbed(base, [5], [0.25]) - base
    assert (moved.norm() / base.norm()).item() == pytest.approx(0.25, rel=1e-5)


@dtypes
def test_scales_are_close_to_float64(kernel_device: torch.device, dtype: torch.dtype) -> None:
    base = tensor(11_003, dtype=dtype)
    expected = reference.direction_scales(base, SEEDS, ops.tensor_id("w"), 3)
    scales = ops.direction_scales(base.to(kernel_device), SEEDS, name="w", offset=3)
    assert scales.dtype == torch.float64
    torch.testing.assert_close(scales.cpu(), expected, rtol=NORMS, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_sixteen_bits_are_rounded_once_from_float32(device: torch.device, dtype: torch.dtype) -> None:
    base, scales = tensor(999, dtype=dtype).to(device), SCALES.to(device)
    wide = perturbed(base.float(), SEEDS, ALPHAS, scales=scales)
    assert same_bits(perturbed(base, SEEDS, ALPHAS, scales=scales), wide.to(dtype))


def test_directions_add_up(device: torch.device) -> None:
    base, scales = tensor(500, dtype=torch.float64).to(device), SCALES.to(device)
    together = perturbed(base, SEEDS, ALPHAS, scales=scales)
    one_by_one = base
    for k in range(3):
        one_by_one = perturbed(one_by_one, [SEEDS[k]], [ALPHAS[k]], scales=scales[k : k + 1])
    torch.testing.assert_close(together, one_by_one, rtol=1e-14, atol=1e-14)
    without = perturbed(base, SEEDS, [ALPHAS[0], 0.0, ALPHAS[2]], scales=scales)
    assert same_bits(without, perturbed(base, SEEDS[::2], ALPHAS[::2], scales=scales[::2]))


def test_inf_and_nan_stay(device: torch.device) -> None:
    for dtype in DTYPES:
        base = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=dtype, device=device)
        out = perturbed(base, [1], [0.5], scales=SCALES[:1].to(device))
        assert torch.equal(out[:2], base[:2]) and out[2].isnan() and out[3].isfinite()


def test_empty_and_zero_tensors(device: torch.device) -> None:
    empty = torch.empty(0, 5, device=device)
    assert perturbed(empty, [1], [0.5]).shape == (0, 5)
    assert ops.direction_scales(empty, [1, 2], name="w").tolist() == [0, 0]
    assert not perturbed(torch.zeros(40, device=device), [1], [0.5]).any()


def test_strides_do_not_matter(device: torch.device) -> None:
    base = tensor(33, 20).to(device)
    expected = perturbed(base, [1], [0.5])
    assert same_bits(perturbed(base.T.contiguous().T, [1], [0.5]), expected)
    wide = torch.zeros(33, 30, device=device)
    ops.perturb_(wide[:, 5:25], base, [1], [0.5], name="w")
    assert same_bits(wide[:, 5:25], expected) and not wide[:, :5].any() and not wide[:, 25:].any()


def test_a_parameter_of_a_model(device: torch.device) -> None:
    model = torch.nn.Linear(20, 30).to(device)
    base, version = model.weight.detach().clone(), model.weight._version
    ops.perturb_(model.weight, base, [1], [0.5], name="weight")
    assert model.weight._version > version and model.weight.requires_grad and model.weight.grad_fn is None
    assert same_bits(model.weight.detach(), perturbed(base, [1], [0.5], name="weight"))


@dtypes
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    base, scales = tensor(7, 5, dtype=dtype).to(device), SCALES.to(device)
    torch.library.opcheck(ops._perturb_op, (torch.empty_like(base), base, [1, 2, 3], ALPHAS, scales, "w", 1))
    torch.library.opcheck(ops._direction_scales, (base, [1, 2], "w", 1))


def test_compiled_code_calls_the_op(device: torch.device) -> None:
    def step(out: Tensor, base: Tensor) -> Tensor:
        ops.perturb_(out, base, [1, 2], [0.5, 0.1], name="w")
        return out * 2

    base = tensor(19, 7).to(device)
    eager, compiled = torch.empty_like(base), torch.empty_like(base)
    expected = step(eager, base)
    assert same_bits(torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, base), expected)
    assert same_bits(compiled, eager)


# ---- the noise as noise


@pytest.fixture(scope="module")
def draws() -> Tensor:
    return direction(DRAWS)


def exact_normals(count: int) -> Tensor:
    """Box & Muller's formula in float64, from the same random bits."""
    x = reference.random_bits(123, reference.DIRECTION, ops.tensor_id("w"), 0, count // 2, torch.device("cpu"))
    signed = (x * 0x9E3779B9).int() | 1
    radius = (-2 * (signed.double().abs() / 2**31).log()).sqrt()
    t = ((x >> 9 | 1).double() - 2**22) / 2**23
    return torch.stack([radius * (math.pi * t).cos() * signed.sign(), radius * (math.pi * t).sin()], 1).view(-1)


def test_polynomials_give_the_functions(draws: Tensor) -> None:
    # From u near 1, where the radius is small, the 2^-23 that keeps it above 0 is 5e-4 of the radius' range at most.
    exact = exact_normals(DRAWS)
    far = exact.view(-1, 2).norm(dim=1).repeat_interleave(2) > 0.05
    assert (draws - exact).abs()[far].max() < 4e-6
    assert (draws - exact).abs().max() < 5e-4


def test_moments(draws: Tensor) -> None:
    error = DRAWS**-0.5
    assert abs(draws.mean().item()) < 4 * error
    assert abs(draws.square().mean().item() - 1) < 4 * math.sqrt(2) * error
    assert abs(draws.pow(3).mean().item()) < 4 * math.sqrt(15) * error
    assert abs(draws.pow(4).mean().item() - 3) < 4 * math.sqrt(96) * error
    assert abs(draws.pow(6).mean().item() - 15) < 4 * math.sqrt(10_170) * error


@pytest.mark.parametrize("part", ["all", "even", "odd"])
def test_distribution(draws: Tensor, part: str) -> None:
    x = {"all": draws, "even": draws[::2], "odd": draws[1::2]}[part].sort().values
    below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    distance = (below - (torch.arange(len(x)) + 0.5) / len(x)).abs().max()
    assert distance * math.sqrt(len(x)) < 1.95  # Kolmogorov-Smirnov: exceeded by chance once in a thousand


@pytest.mark.parametrize("bound", [2, 3, 4, 4.5])
def test_tails(draws: Tensor, bound: float) -> None:
    expected = DRAWS * math.erfc(bound / math.sqrt(2))
    assert abs((draws.abs() > bound).sum().item() - expected) < 4 * math.sqrt(expected)


def test_elements_are_uncorrelated(draws: Tensor) -> None:
    for lag in (*range(1, 33), *(2**k for k in range(6, 20))):
        for values, variance in ((draws, 1), (draws.square() - 1, 4)):
            count = DRAWS - lag
            assert abs((values[lag:] * values[:-lag]).mean().item()) < 5 * math.sqrt(variance / count), lag


def test_pairs_are_round(draws: Tensor) -> None:
    even, odd = draws[::2], draws[1::2]
    sectors = torch.histc(torch.atan2(odd, even), 64, -math.pi, math.pi)
    rings = torch.histc(torch.exp(-(even.square() + odd.square()) / 2), 64, 0, 1)
    for counts in (sectors, rings):
        expected = DRAWS / 2 / 64
        assert ((counts - expected).square() / expected).sum() < 63 + 4 * math.sqrt(2 * 63)  # chi-squared


@pytest.mark.parametrize(
    "other",
    [{"seed": 124}, {"seed": 123 + 2**32}, {"name": "x"}, {"offset": DRAWS}, {"offset": 2**33}, {"offset": 1}],
    ids=str,
)
def test_other_directions_are_uncorrelated(draws: Tensor, other: dict[str, Any]) -> None:
    assert abs((draws * direction(DRAWS, **other)).mean().item()) < 4 / math.sqrt(DRAWS)


def test_rounding_noise_is_another(draws: Tensor) -> None:
    rounding = reference.random_bits(123, 1, ops.tensor_id("w"), 0, DRAWS, torch.device("cpu")).double()
    assert abs(torch.corrcoef(torch.stack([draws, rounding]))[0, 1].item()) < 4 / math.sqrt(DRAWS)


# ---- what a user can get wrong

BASE = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alphas": [0.1]}, "alphas has 1 entries and directions 2"),
        ({"alphas": [0.1, math.nan]}, r"alphas\[1\] is nan; expected a finite number"),
        ({"alphas": [math.inf, 0.0]}, r"alphas\[0\] is inf"),
        ({"offset": -1}, "offset is -1; expected 0 or more"),
        ({"base": torch.ones(4, 6, dtype=torch.int32)}, r"base is torch.int32 .*; expected a dense tensor of"),
        ({"base": torch.eye(4).to_sparse()}, r"base is torch.float32 \(torch.sparse_coo\)"),
        ({"out": torch.ones(6, 4)}, r"out is torch.float32 \[6, 4\] on cpu; expected torch.float32 \[4, 6\]"),
        ({"out": torch.ones(4, 6).half()}, "out is torch.float16"),
        ({"out": torch.ones(4, 1).expand(4, 6)}, "out is an expanded tensor"),
        ({"base": torch.full((4, 6), math.inf)}, "a tensor with Inf or NaN has no direction of its norm"),
        (
            {"scales": torch.ones(1, dtype=torch.float64)},
            r"scales is torch.float64 \[1\] on cpu; expected float64 \[2\]",
        ),
        ({"scales": torch.ones(2)}, "scales is torch.float32"),
        ({"scales": torch.tensor([1, math.nan], dtype=torch.float64)}, r"scales are \[1.0, nan\]"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_mistakes(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"out": torch.empty(4, 6), "base": BASE, "directions": [1, 2], "alphas": [0.1, 0.2]}
    with pytest.raises(SsahError, match=message) as error:
        ops.perturb_(**arguments | {"name": "w"} | changed)
    assert "\n" not in str(error.value)


def test_out_must_not_overlap_part_of_base() -> None:
    memory = torch.ones(100)
    with pytest.raises(SsahError, match="out overlaps part of base; pass base itself or other memory"):
        ops.perturb_(memory[1:51], memory[:50], [1], [0.1], name="w")
    ops.perturb_(memory[50:], memory[:50], [1], [0.1], name="w")


def test_meta_tensors() -> None:
    x = torch.empty(4, 5, device="meta", dtype=torch.bfloat16)
    assert ops.direction_scales(x, [1, 2], name="w").shape == (2,)
    ops.perturb_(x, x, [1, 2], [0.1, 0.2], name="w")
