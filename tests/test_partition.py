"""The partition into SCU, UCU, CU and RU (method.md section 6, oracles 6 and 12)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.partition import Category, Units, identify
from ssah_fast.scores import ModuleScores, Scores
from ssah_fast.units import Slice, UnitModule

RATIOS = {"scu": 0.05, "ucu": 0.2, "ru": 0.3}


def layout(name: str, units: int, cost: int) -> UnitModule:
    weight = Slice(f"{name}.down_proj.weight", 1, cost)
    return UnitModule(name, "mlp", 0, units, f"{name}.down_proj", weight, (weight,))


def make(importance: dict[str, torch.Tensor], counts: dict[str, list[int]] | None = None, costs=None) -> Scores:
    """Scores with a given importance [2, units] per module; the halves see the same."""
    modules = {}
    for name, values in importance.items():
        values = values.double()
        units = values.shape[1]
        count = torch.tensor((counts or {}).get(name, [10, 10])).unsqueeze(1).expand(2, 2).contiguous()
        m2 = (values * 9).unsqueeze(1).expand(2, 2, units).contiguous()
        ones = torch.ones(units, dtype=torch.float64)
        modules[name] = ModuleScores(
            layout(name, units, (costs or {}).get(name, 3)), count, torch.zeros_like(m2), m2, ones, values
        )
    return Scores(modules, {"model": {"id": "tiny"}}, "variance")


def random_importance(seed: int, sizes: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"m{i}": torch.randn(2, n, generator=generator, dtype=torch.float64).exp() for i, n in enumerate(sizes)}


def flat(units: Units) -> torch.Tensor:
    return torch.cat([units.category[name] for name in units.modules])


SIZES = st.lists(st.integers(20, 60), min_size=1, max_size=5)
MODES = st.sampled_from([("share", "difference"), ("share", "ratio"), ("raw", "difference"), ("zscore", "difference")])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), SIZES, MODES, st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.3))
def test_categories_are_exact_disjoint_and_cover_everything(seed, sizes, modes, scu, ucu, ru):
    normalize, contrast = modes
    units = identify(make(random_importance(seed, sizes)), scu, ucu, ru, normalize=normalize, contrast=contrast)
    total = sum(sizes)
    counts = {category: units.count(category) for category in Category}
    assert sum(counts.values()) == total
    assert counts[Category.SCU] == round(scu * total)
    assert counts[Category.UCU] == round(ucu * total)
    assert counts[Category.RU] == round(ru * total)
    assert counts[Category.UNOBSERVED] == 0
    assert sum(units.fraction(category) for category in Category) == pytest.approx(1)
    assert sum(units.fraction(category, of="parameters") for category in Category) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), SIZES, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_share_is_blind_to_the_scale_of_a_set(seed, sizes, safety, utility):
    values = random_importance(seed, sizes)
    scale = torch.tensor([[safety], [utility]], dtype=torch.float64)
    scaled = {name: part * scale for name, part in values.items()}
    assert torch.equal(flat(identify(make(values), **RATIOS)), flat(identify(make(scaled), **RATIOS)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), SIZES, MODES, st.randoms(use_true_random=False))
def test_the_order_of_modules_changes_nothing_but_ties(seed, sizes, modes, random):
    values = random_importance(seed, sizes)
    names = list(values)
    random.shuffle(names)
    options = {"normalize": modes[0], "contrast": modes[1], **RATIOS}
    straight = identify(make(values), **options)
    shuffled = identify(make({name: values[name] for name in names}), **options)
    assert all(torch.equal(straight.category[name], shuffled.category[name]) for name in names)


def by_hand(values: dict[str, torch.Tensor], scu: int, ucu: int, ru: int, floor: float) -> dict[str, list[int]]:
    """The definition, one unit at a time: share, difference, greedy with a floor."""
    share = {name: part / part.sum(1, keepdim=True) for name, part in values.items()}
    keys = [(name, unit) for name, part in values.items() for unit in range(part.shape[1])]
    result = {name: [int(Category.CU)] * part.shape[1] for name, part in values.items()}
    contrast = {(n, u): float(share[n][0, u] - share[n][1, u]) for n, u in keys}
    total = {(n, u): float(share[n][0, u] + share[n][1, u]) for n, u in keys}
    for category, wanted, rank in (
        (Category.SCU, scu, lambda key: -contrast[key]),
        (Category.UCU, ucu, lambda key: contrast[key]),
        (Category.RU, ru, lambda key: total[key]),
    ):
        taken = dict.fromkeys(values, 0)
        for name, unit in sorted(keys, key=rank):
            size = len(result[name])
            capacity = size - max(1, math.ceil(floor * size))
            if sum(taken.values()) < wanted and result[name][unit] == Category.CU and taken[name] < capacity:
                result[name][unit] = int(category)
                taken[name] += 1
    return result


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.61])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_unit_by_unit(seed, floor):
    values = random_importance(seed, [30, 7, 25, 1])
    values["m1"] *= torch.tensor([[5.0], [1.0]])
    # One module so much more peaked than the rest that the floor binds.
    values["m2"][:, 5:] *= 1e-6
    units = identify(make(values), 10 / 63, 16 / 63, 20 / 63, floor=floor)
    assert {name: part.tolist() for name, part in units.category.items()} == by_hand(values, 10, 16, 20, floor)


def test_the_floor_keeps_units_in_every_module():
    values = {"loud": torch.tensor([[9.0] * 20, [1.0] * 20]), "quiet": torch.tensor([[1.0] * 80, [1.0] * 80])}
    units = identify(make(values), 0.3, 0.1, 0.1, normalize="raw", floor=0.5)
    per_module = [(part == Category.SCU).sum().item() for part in units.category.values()]
    assert per_module == [10, 20]


def test_a_ratio_that_the_floor_makes_unreachable_is_named():
    with pytest.raises(SsahError, match=r"scu=0\.9 asks for 90 units, but only 50 are left by floor=0\.5"):
        identify(make(random_importance(0, [50, 50])), 0.9, 0.0, 0.0, floor=0.5)


def test_ties_go_to_the_earlier_module_and_unit():
    values = {name: torch.ones(2, 10) for name in ("b", "a")}
    units = identify(make(values), 0.2, 0.2, 0.2, floor=0.0)
    assert units.category["b"].tolist() == [3, 3, 3, 3, 2, 2, 2, 2, 0, 0]
    assert units.category["a"].tolist() == [0, 0] + [1] * 8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratios", [(0.1, 0.2, 0.3), (0.013, 0.133, 0.148), (0.0, 0.0, 1 / 3)])
def test_parameters_are_met_within_one_unit(seed, ratios):
    values = random_importance(seed, [40, 300, 40, 300])
    costs = {"m0": 512, "m1": 3, "m2": 512, "m3": 3}
    units = identify(make(values, costs=costs), *ratios, basis="parameters")
    total = 2 * (40 * 512 + 300 * 3)
    for category, ratio in zip((Category.SCU, Category.UCU, Category.RU), ratios, strict=True):
        assert abs(units.parameters(category) - ratio * total) < 512
        assert units.fraction(category, of="parameters") == pytest.approx(units.parameters(category) / total)
    assert units.count(Category.SCU) == 0 if ratios[0] == 0 else units.count(Category.SCU) > 0


def test_parameters_that_cannot_be_reached_are_named():
    with pytest.raises(SsahError, match=r"ru=0\.98 asks for 294 parameters, but only 285 are left"):
        identify(make(random_importance(0, [100])), 0, 0, 0.98, basis="parameters")


def test_unobserved_modules_are_never_ranked():
    values = random_importance(0, [30, 30, 30])
    values["m1"][0] = 0
    units = identify(make(values, counts={"m1": [0, 10]}), **RATIOS)
    assert (units.category["m1"] == Category.UNOBSERVED).all()
    assert units.count("unobserved") == 30
    assert units.count("ru") == round(0.3 * 90)
    for name in ("m0", "m2"):
        assert not (units.category[name] == Category.UNOBSERVED).any()


def test_a_single_set_is_refused():
    with pytest.raises(SsahError, match="no module saw tokens of both sets"):
        identify(make(random_importance(0, [30]), counts={"m0": [10, 0]}))


def test_ratio_contrast_leaves_out_units_that_do_next_to_nothing():
    safety = torch.tensor([[100.0] * 9 + [1e-6]])
    values = {"m0": torch.cat([safety, safety.clone()])}
    values["m0"][1, 9] = 0
    assert identify(make(values), 0.1, 0, 0, contrast="ratio").category["m0"][9] != Category.SCU
    assert identify(make(values), 0.1, 0, 0).category["m0"][9] == Category.SCU


def test_a_module_without_signal_does_not_disturb():
    values = {"dead": torch.zeros(2, 30), "same": torch.full((2, 30), 0.1), **random_importance(0, [40])}
    for modes in (("share", "difference"), ("share", "ratio"), ("zscore", "difference"), ("raw", "ratio")):
        units = identify(make(values), 0.05, 0.05, 0.3, normalize=modes[0], contrast=modes[1])
        assert not (units.category["dead"] > Category.CU).any()
        assert not (units.category["same"] > Category.CU).any()


def test_zscore_equals_its_definition():
    values = random_importance(3, [30])["m0"]
    z = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)
    units = identify(make({"m0": values}), 0.1, 0, 0, normalize="zscore")
    assert set((units.category["m0"] == Category.SCU).nonzero().flatten().tolist()) == set(
        (z[0] - z[1]).topk(3).indices.tolist()
    )


def test_overlap_counts_what_precedence_took():
    # S - U is highest exactly where S + U is lowest, so SCU takes what RU would have taken.
    values = {"m0": torch.stack([torch.zeros(100), torch.linspace(1, 2, 100)])}
    units = identify(make(values), 0.1, 0.1, 0.15, normalize="raw")
    assert units.overlap == {"ucu": 0, "ru": 10}
    assert units.category["m0"][10:25].tolist() == [Category.RU] * 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scu": -0.1}, r"scu=-0\.1 is not a ratio"),
        ({"ucu": 1.1}, r"ucu=1\.1 is not a ratio"),
        ({"ru": math.nan}, "ru=nan is not a ratio"),
        ({"scu": 0.5, "ucu": 0.3, "ru": 0.3}, r"scu=0\.5, ucu=0\.3 and ru=0\.3 sum to 1\.1"),
        ({"floor": 1.0}, r"floor=1\.0"),
        ({"floor": math.nan}, "floor=nan"),
        ({"normalize": "log"}, "normalize='log' is unknown; use share, raw, zscore"),
        ({"contrast": "log"}, "contrast='log'"),
        ({"basis": "bytes"}, "basis='bytes'"),
        ({"contrast": "ratio", "normalize": "zscore"}, "use normalize='share' or 'raw'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(SsahError, match=message):
        identify(make(random_importance(0, [30])), **options)


def test_ratios_may_sum_to_one():
    units = identify(make(random_importance(0, [100])), 0.1, 0.2, 0.7)
    assert units.count("cu") == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_importance_is_named(value):
    values = random_importance(0, [30, 30])
    values["m1"][1, 7] = value
    with pytest.raises(NonFiniteError, match=rf"utility importance of unit 7 of m1 is {value}"):
        identify(make(values))


def test_equal_halves_are_perfectly_stable():
    units = identify(make(random_importance(0, [100, 100])), **RATIOS)
    for name, ratio in (("scu", 0.05), ("ucu", 0.2), ("ru", 0.3), ("cu", 0.45)):
        assert units.stability[name] == {"jaccard": 1.0, "chance": pytest.approx(ratio / (2 - ratio))}
    assert units.stability["agreement"] == 1.0


def test_unrelated_halves_are_as_stable_as_chance():
    scores = make(random_importance(0, [4000]))
    scores.modules["m0"].m2[:, 1] = random_importance(1, [4000])["m0"]
    units = identify(scores, 0.2, 0.2, 0.2)
    for name in ("scu", "ucu", "ru"):
        assert units.stability[name]["jaccard"] == pytest.approx(units.stability[name]["chance"], abs=0.03)


def test_stability_without_a_second_half_says_why():
    scores = make(random_importance(0, [100]))
    scores.modules["m0"].count[1, 1] = 0
    stability = identify(scores).stability
    assert stability["scu"] is None
    assert stability["agreement"] is None
    assert "half 1 of the utility set" in stability["reason"]


def test_an_empty_category_has_no_stability():
    assert identify(make(random_importance(0, [100])), 0, 0.1, 0.1).stability["scu"] is None


def test_save_and_load(tmp_path):
    units = identify(make(random_importance(0, [30, 40]), costs={"m0": 7, "m1": 3}), **RATIOS)
    units.save(tmp_path / "units.safetensors")
    loaded = Units.load(tmp_path / "units.safetensors")
    assert loaded.modules == units.modules == ["m0", "m1"]
    assert all(torch.equal(loaded.category[name], units.category[name]) for name in units.modules)
    assert loaded.category["m0"].dtype == torch.int8
    for key in ("layouts", "settings", "provenance", "stability", "overlap"):
        assert getattr(loaded, key) == getattr(units, key)
    assert loaded.summary() == units.summary()
    assert loaded.settings == {
        **RATIOS,
        "normalize": "share",
        "contrast": "difference",
        "basis": "units",
        "floor": 0.05,
    }
    assert len(loaded.provenance["scores_sha256"]) == 64


@pytest.mark.parametrize("normalize", ["share", "raw", "zscore"])
def test_safety_is_the_normalised_importance_that_was_ranked(normalize, tmp_path):
    values = random_importance(0, [30, 40])
    units = identify(make(values), **RATIOS, normalize=normalize)
    for name, (safety, _) in values.items():
        z = (safety - safety.mean()) / safety.std()
        expected = {"share": safety / safety.sum(), "raw": safety, "zscore": z}[normalize]
        torch.testing.assert_close(units.safety[name], expected)
    units.save(tmp_path / "units")
    loaded = Units.load(tmp_path / "units").safety
    assert list(loaded) == units.modules
    assert all(torch.equal(loaded[name], units.safety[name]) for name in units.modules)


def test_safety_of_only_some_modules_is_damage(tmp_path):
    units = identify(make(random_importance(0, [30, 40])), **RATIOS)
    del units.safety["m1"]
    units.save(tmp_path / "units")
    with pytest.raises(SsahError, match=r"tensor m1\.safety is missing"):
        Units.load(tmp_path / "units")


def test_values_that_are_no_category_are_refused(tmp_path):
    units = identify(make(random_importance(0, [30])), **RATIOS)
    units.category["m0"][3] = 9
    units.save(tmp_path / "units.safetensors")
    with pytest.raises(SsahError, match="m0 holds values that are no category"):
        Units.load(tmp_path / "units.safetensors")


def test_saving_equals_byte_for_byte_in_two_runs(tmp_path):
    for name in "ab":
        identify(make(random_importance(0, [30, 40])), **RATIOS).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("scu", "SCU"),
        ("SCU", "SCU"),
        ("esu", "SCU"),
        ("EUU", "UCU"),
        ("unobserved", "UNOBSERVED"),
        (0, "RU"),
        (3, "SCU"),
    ],
)
def test_category_names(name, category):
    assert Category.parse(name) is Category[category]
    assert Category.parse(Category[category]) is Category[category]


@pytest.mark.parametrize("name", ["xcu", "", 7, None])
def test_an_unknown_category_lists_the_names(name):
    with pytest.raises(SsahError, match="use scu, ucu, cu, ru, unobserved"):
        Category.parse(name)


def test_fraction_of_something_else_is_refused():
    with pytest.raises(SsahError, match="of='bytes'"):
        identify(make(random_importance(0, [30]))).fraction("scu", of="bytes")


def test_shuffled_units_are_as_many_in_every_module_and_the_same_for_the_same_seed():
    units = identify(make(random_importance(0, [60, 40, 50]), {"m1": [10, 0]}), **RATIOS)
    shuffled = units.shuffled(1)
    for name, values in units.category.items():
        assert torch.equal(values.sort().values, shuffled.category[name].sort().values)
        before, after = (
            sorted(zip(u.category[name].tolist(), u.safety[name].tolist(), strict=True)) for u in (units, shuffled)
        )
        assert before == after  # a unit's I_S goes where its category goes
    assert torch.equal(flat(shuffled), flat(units.shuffled(1)))
    assert not torch.equal(flat(shuffled), flat(units.shuffled(2)))
    assert not torch.equal(flat(shuffled), flat(units))
    assert torch.equal(shuffled.category["m1"], units.category["m1"])  # unobserved
    assert shuffled.stability.get("agreement") is None and shuffled.settings["shuffle"] == 1
