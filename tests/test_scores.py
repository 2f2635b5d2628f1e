"""Moments, importance and the Scores file: merging is exact, files are whole or absent, damage is named."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ssah_fast import files
from ssah_fast.errors import RunError, SsahError
from ssah_fast.partition import identify
from ssah_fast.scores import ModuleScores, Scores, chan_merge, importance
from ssah_fast.units import Slice, UnitModule

HEAD_DIM, GROUP, KV_HEADS, NEURONS, WIDTH = 3, 2, 2, 7, 5


def mlp(layer: int = 0, units: int = NEURONS) -> UnitModule:
    name = f"model.layers.{layer}.mlp"
    down = Slice(f"{name}.down_proj.weight", 1, WIDTH)
    rows = tuple(Slice(f"{name}.{part}_proj.weight", 0, WIDTH) for part in ("gate", "up"))
    return UnitModule(name, "mlp", layer, units, f"{name}.down_proj", down, (*rows, down))


def attention(layer: int = 0) -> UnitModule:
    """Value channels of a grouped-query attention: each feeds GROUP columns of o_proj."""
    name = f"model.layers.{layer}.self_attn"
    value = Slice(f"{name}.v_proj.weight", 0, WIDTH)
    columns = Slice(
        f"{name}.o_proj.weight",
        1,
        WIDTH,
        block=HEAD_DIM,
        outer=GROUP * HEAD_DIM,
        inner=1,
        repeat=GROUP,
        step=HEAD_DIM,
    )
    return UnitModule(name, "attention", layer, KV_HEADS * HEAD_DIM, f"{name}.o_proj", columns, (value, columns))


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = x.mean(0) if len(x) else torch.zeros(x.shape[1], dtype=x.dtype)
    return torch.tensor(len(x)), mean, ((x - mean) ** 2).sum(0)


def channels(layout: UnitModule) -> int:
    return int(layout.channels.indices(layout.units).max()) + 1


def make_scores(data: list[list[torch.Tensor]], layouts: list[UnitModule], estimator: str = "variance") -> Scores:
    """Scores of given activations: data[set][half] is float64 [tokens, channels of the widest module]."""
    modules = {}
    for layout in layouts:
        width = channels(layout)
        parts = [[moments(x[:, :width]) for x in halves] for halves in data]
        count, mean, m2 = (
            torch.stack([torch.stack([half[i] for half in halves]) for halves in parts]) for i in range(3)
        )
        norm = torch.linspace(0.5, 2.0, width, dtype=torch.float64)
        modules[layout.name] = ModuleScores.from_moments(layout, count, mean, m2, norm, estimator)
    return Scores(modules, {"model": {"id": "tiny", "config_sha256": "ab"}, "seed": 0}, estimator)


def draw(seed: int, *tokens: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(n, 12, generator=generator, dtype=torch.float64) * 3 + 10 for n in tokens]
    return [x[:2], x[2:]]


LAYOUTS = [attention(0), mlp(0), attention(1), mlp(1)]


@pytest.fixture
def scores() -> Scores:
    return make_scores(draw(0, 20, 21, 30, 31), LAYOUTS)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.sampled_from([0.0, 1.0, 1e4]),
    st.randoms(use_true_random=False),
)
def test_chan_merge_in_any_split_and_order_equals_the_variance(seed, sizes, offset, random):
    x = torch.randn(sum(sizes) + 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    parts = [moments(part) for part in x.split([*sizes, 2])]
    random.shuffle(parts)
    state = parts[0]
    for part in parts[1:]:
        state = chan_merge(*state, *part)
    assert int(state[0]) == len(x)
    torch.testing.assert_close(state[1], x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state[2] / (len(x) - 1), x.var(0), rtol=1e-9, atol=0)


def test_chan_merge_with_an_empty_sample_returns_the_other_bit_for_bit():
    full, empty = moments(draw(1, 9, 0, 0, 0)[0][0]), moments(torch.zeros(0, 12, dtype=torch.float64))
    for merged in (chan_merge(*full, *empty), chan_merge(*empty, *full)):
        assert all(torch.equal(a, b) for a, b in zip(merged, full, strict=True))
    assert all((part == 0).all() for part in chan_merge(*empty, *empty))


def test_importance_sums_the_columns_of_a_group():
    layout, x = attention(), draw(2, 25, 0, 0, 0)[0][0]
    norm = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    count, mean, m2 = moments(x)
    expected = {"variance": x.var(0) * norm, "norm": (x**2).mean(0) * norm, "flap": m2 * norm}
    for estimator, channel in expected.items():
        by_head = channel.reshape(KV_HEADS, GROUP, HEAD_DIM).sum(1).flatten()
        torch.testing.assert_close(importance(layout, count, mean, m2, norm, estimator), by_head, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("tokens", "estimator"), [(0, "variance"), (1, "variance"), (0, "norm")])
def test_importance_of_too_few_tokens_is_zero(tokens, estimator):
    state = moments(torch.ones(tokens, NEURONS, dtype=torch.float64))
    assert not importance(mlp(), *state, torch.ones(NEURONS, dtype=torch.float64), estimator).any()


def test_unknown_estimator_is_named():
    state = moments(torch.ones(3, NEURONS, dtype=torch.float64))
    with pytest.raises(SsahError, match=r"'median'.*variance, norm, flap"):
        importance(mlp(), *state, torch.ones(NEURONS, dtype=torch.float64), "median")


def test_views(scores):
    assert list(scores.modules) == list(scores.safety) == [layout.name for layout in LAYOUTS]
    name = LAYOUTS[1].name
    assert torch.equal(scores.safety[name], scores.modules[name].importance[0])
    assert torch.equal(scores.utility[name], scores.modules[name].importance[1])
    assert scores.count[name].tolist() == [41, 61]


def test_half_uses_one_half_only(scores):
    data = draw(0, 20, 21, 30, 31)
    halved = scores.half(1)["model.layers.0.mlp"]
    norm = scores.modules["model.layers.0.mlp"].norm
    for index in (0, 1):
        torch.testing.assert_close(halved[index], data[index][1][:, :NEURONS].var(0) * norm, rtol=1e-12, atol=0)


def test_an_empty_half_and_a_wrong_half_are_refused():
    scores = make_scores(draw(0, 20, 21, 30, 0), LAYOUTS)
    with pytest.raises(SsahError, match="half 1 of the utility set has no tokens"):
        scores.half(1)
    with pytest.raises(SsahError, match="h=2"):
        scores.half(2)


def as_flap(scores: Scores) -> Scores:
    """The same numbers with the third slot that the flap estimator has."""
    modules = {}
    for name, m in scores.modules.items():
        count = torch.cat([m.count, m.count.sum(1, keepdim=True)], 1)
        mean, m2 = (torch.cat([part, 2 * part.sum(1, keepdim=True)], 1) for part in (m.mean, m.m2))
        modules[name] = ModuleScores.from_moments(m.layout, count, mean, m2, m.norm, "flap")
    return Scores(modules, scores.provenance, "flap")


def test_flap_keeps_a_third_slot(scores, tmp_path):
    flap = as_flap(scores)
    module = flap.modules["model.layers.0.mlp"]
    assert module.total_count().tolist() == [41, 61]
    torch.testing.assert_close(module.importance, module.m2[:, 2] * module.norm)
    torch.testing.assert_close(flap.half(0)["model.layers.0.mlp"], module.m2[:, 0] * module.norm)
    flap.save(tmp_path / "flap.safetensors")
    assert Scores.load(tmp_path / "flap.safetensors").modules["model.layers.0.mlp"].m2.shape[1] == 3
    with pytest.raises(SsahError, match="'flap' cannot be merged"):
        Scores.merge([flap, flap])


def test_save_and_load_return_the_same_bits(scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    loaded = Scores.load(path)
    assert (loaded.estimator, loaded.provenance, list(loaded.modules)) == (
        scores.estimator,
        scores.provenance,
        list(scores.modules),
    )
    for name, module in scores.modules.items():
        assert loaded.modules[name].layout == module.layout
        for key in ("count", "mean", "m2", "norm", "importance"):
            assert torch.equal(getattr(loaded.modules[name], key), getattr(module, key))
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.safetensors"]


def test_saving_twice_gives_the_same_file(scores, tmp_path):
    for name in "ab":
        scores.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("cut", [(9, 20, 13, 30), (0, 21, 30, 0), (20, 21, 30, 31)])
def test_merged_files_equal_scoring_together(cut, scores, tmp_path):
    data = draw(0, 20, 21, 30, 31)
    flat = [x for halves in data for x in halves]
    first = [x[:n] for x, n in zip(flat, cut, strict=True)]
    second = [x[n:] for x, n in zip(flat, cut, strict=True)]
    for name, part in (("a", first), ("b", second)):
        make_scores([part[:2], part[2:]], LAYOUTS).save(tmp_path / name)
    merged = Scores.merge([Scores.load(tmp_path / "a"), Scores.load(tmp_path / "b")])
    for name, module in scores.modules.items():
        twin = merged.modules[name]
        assert torch.equal(twin.count, module.count)
        torch.testing.assert_close(twin.importance, module.importance, rtol=1e-12, atol=0)
        torch.testing.assert_close(twin.m2, module.m2, rtol=1e-12, atol=1e-12)
    assert merged.provenance["model"] == scores.provenance["model"]
    assert merged.provenance["parts"] == [scores.provenance] * 2
    assert len(Scores.merge([merged, scores]).provenance["parts"]) == 3


def other_model(scores: Scores) -> None:
    scores.provenance["model"] = {"id": "tiny", "config_sha256": "cd"}


def other_estimator(scores: Scores) -> None:
    scores.estimator = "norm"


def other_modules(scores: Scores) -> None:
    del scores.modules["model.layers.1.mlp"]


def other_layout(scores: Scores) -> None:
    scores.modules["model.layers.1.mlp"].layout = mlp(1, units=3)


def other_weights(scores: Scores) -> None:
    scores.modules["model.layers.1.mlp"].norm[0] += 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_model, r"model\.config_sha256 is 'ab' and 'cd'.*part 2"),
        (other_estimator, "estimator 'variance' of part 1 with 'norm' of part 2"),
        (other_modules, r"modules \(model\.layers\.1\.mlp\)"),
        (other_layout, r"units of model\.layers\.1\.mlp differ"),
        (other_weights, r"weights of model\.layers\.1\.mlp\.down_proj differ"),
    ],
)
def test_merge_names_the_difference(change, message, scores):
    other = make_scores(draw(5, 4, 5, 6, 7), LAYOUTS)
    change(other)
    with pytest.raises(SsahError, match=message):
        Scores.merge([scores, other])


def test_merge_of_nothing_is_refused():
    with pytest.raises(SsahError, match="at least one"):
        Scores.merge([])


# files


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("older", [None, b"older"])
def test_a_full_disk_leaves_no_partial_file(older, scores, tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    if older:
        path.write_bytes(older)
    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(RunError, match=rf"cannot write {path}: no space left") as caught:
        scores.save(path)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([older] if older else [])


def test_an_interrupt_leaves_no_partial_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.atomic_writer(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_refused(tmp_path, scores):
    with pytest.raises(SsahError, match=r"folder .*nowhere does not exist"):
        scores.save(tmp_path / "nowhere" / "x")
    with pytest.raises(SsahError, match="not a regular file"):
        scores.save(tmp_path)
    with pytest.raises(SsahError, match="not a regular file"):
        scores.save("/dev/null")
    with pytest.raises(SsahError, match="cannot write /proc/x"):
        scores.save("/proc/x")


def test_a_link_is_kept_and_its_target_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with files.atomic_writer(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def rewrite(path: Path, change) -> None:
    """Change the header and the tensors of a file of ours."""
    header, tensors = files.load_tensors(path, "scores")
    change(header, tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={files.HEADER_KEY: json.dumps(header)})


def newer(header, tensors):
    header["schema"] = files.SCHEMA + 1


def no_layouts(header, tensors):
    del header["layouts"]


def odd_layouts(header, tensors):
    header["layouts"][0]["channels"] = {"parameter": "x"}


def empty_layouts(header, tensors):
    header["layouts"] = []


def odd_estimator(header, tensors):
    header["estimator"] = "median"


def missing_tensor(header, tensors):
    del tensors["model.layers.0.mlp.m2"]


def odd_dtype(header, tensors):
    tensors["model.layers.0.mlp.mean"] = tensors["model.layers.0.mlp.mean"].float()


def odd_shape(header, tensors):
    tensors["model.layers.0.mlp.importance"] = tensors["model.layers.0.mlp.importance"][:, 1:]


def few_channels(header, tensors):
    for key in ("norm", "mean", "m2"):
        tensors[f"model.layers.0.self_attn.{key}"] = tensors[f"model.layers.0.self_attn.{key}"][..., 1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, "schema is 2.*upgrade"),
        (no_layouts, "layouts are damaged"),
        (odd_layouts, "layouts are damaged"),
        (empty_layouts, "holds no modules"),
        (odd_estimator, "'median'"),
        (missing_tensor, r"model\.layers\.0\.mlp\.m2 is missing"),
        (odd_dtype, r"mlp\.mean is torch\.float32"),
        (odd_shape, r"mlp\.importance is .*\[2, 6\], expected .*\[2, 7\]"),
        (few_channels, "11 channels"),
    ],
)
def test_a_damaged_file_is_named(change, message, scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    rewrite(path, change)
    with pytest.raises(SsahError, match=message) as caught:
        Scores.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_named(size, scores, tmp_path):
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SsahError, match="truncated or not a safetensors file"):
        Scores.load(path)


def test_files_of_others_are_refused(scores, tmp_path):
    with pytest.raises(SsahError, match="does not exist"):
        Scores.load(tmp_path / "none")
    with pytest.raises(SsahError, match="not a regular file"):
        Scores.load(tmp_path)
    for number, metadata in enumerate([None, {"format": "pt"}, {files.HEADER_KEY: "[]"}, {files.HEADER_KEY: "{}"}]):
        save_file({"x": torch.zeros(1)}, tmp_path / str(number), metadata=metadata)
        with pytest.raises(SsahError, match="not one written by ssah_fast"):
            Scores.load(tmp_path / str(number))
    save_file({"x": torch.zeros(1)}, tmp_path / "json", metadata={files.HEADER_KEY: "{"})
    with pytest.raises(SsahError, match="not valid JSON"):
        Scores.load(tmp_path / "json")
    identify(scores).save(tmp_path / "units")
    with pytest.raises(SsahError, match=r"a units file where a scores file is needed; `ssah-fast score`"):
        Scores.load(tmp_path / "units")
