"""Landscapes: each point is the model with those weights, points are measured once, and the model is left as it was."""

import copy
import json
import os
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_ranks import fork
from tiny_models import TOKENS, tiny_model, tiny_tokenizer

from ssah_fast import basin, data, landscapes, ops, ranks, survey, terrain
from ssah_fast.errors import NonFiniteError, RunError, SsahError
from ssah_fast.evaluation import generation, judges, margin
from ssah_fast.evaluation.evaluate import evaluate
from ssah_fast.evaluation.generation import Decoding
from ssah_fast.landscapes import landscape
from ssah_fast.partition import identify
from ssah_fast.points import PointStore
from ssah_fast.scoring import score
from ssah_fast.terrain import make_terrain

DECODING = Decoding(max_new_tokens=4)
HARMFUL = [{"prompt": f"w{i} w{i + 40}"} for i in range(6)]
HARMLESS = [{"prompt": f"w{i} w9"} for i in range(3)]
TEXTS = [{"prompt": f"w{i}", "response": f"w{i + 1} w{i + 2} w3"} for i in range(50, 54)]
GRID = "-0.4:0.4:5"


@dataclass(frozen=True)
class Odd:
    """Takes an answer whose first word has an odd number for a refusal: a tiny model does not know the phrases."""

    name: str = "odd"
    judges_refusals: bool = True

    def __call__(self, exchanges):
        return [exchange.text.split()[0][-1] not in "13579" if exchange.text else True for exchange in exchanges]


@pytest.fixture(autouse=True)
def refusals(monkeypatch):
    monkeypatch.setattr(margin, "REFUSALS", ("w",))


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A model and two others of its shape, as folders."""
    folder = tmp_path_factory.mktemp("landscape")
    for seed, name in enumerate(("model", "one", "two")):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def generated(monkeypatch):
    """How often answers were generated."""
    calls, original = [], generation.new_tokens
    monkeypatch.setattr(generation, "new_tokens", lambda **given: calls.append(1) or original(**given))
    return calls


def run(model, where=None, **options):
    where = where or make_terrain(alphas=GRID, directions=2)
    given = {"asr": HARMFUL, "utility": TEXTS, "decoding": DECODING, "judge": Odd(), **options}
    return landscape(model, tiny_tokenizer(), where, **given)


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# one point


def test_a_point_is_the_model_with_those_weights(model):
    document = run(model, look_alikes=HARMLESS)
    rows = {(row["direction"], row["alpha"]): row for row in document["rows"]}
    assert len(document["rows"]) == len(rows) == 10
    for direction, alpha in (("random 123", 0.0), ("random 124", 0.0), ("random 123", 0.2), ("random 124", -0.4)):
        moved = copy.deepcopy(model)
        for name, p in moved.named_parameters():
            if "norm" not in name:
                ops.perturb_(p, p.clone(), [int(direction.split()[1])], [alpha], name=name)
        alone = evaluate(
            moved,
            tiny_tokenizer(),
            asr=HARMFUL,
            look_alikes=HARMLESS,
            utility=TEXTS,
            judges=[Odd()],
            decoding=DECODING,
            reference=model,
        )
        row = rows[direction, alpha]
        for name in ("asr", "asr_interval", "asr_n", "asr_raw", "refusal", "degenerate"):
            assert row[name] == alone["attack"][0][name]
        assert row["over_refusal"] == alone["over_refusal"][0]["over_refusal"]
        for name in ("perplexity", "perplexity_interval", "accuracy", "accuracy_n"):
            assert row[name] == alone["utility"][name]
    assert len({rows["random 123", alpha]["perplexity"] for alpha in (-0.4, 0, 0.2, 0.4)}) == 4
    assert document["kind"] == "landscape" and document["settings"]["axes"][1]["seed"] == 124


def test_the_model_is_left_as_it_was(model, master):
    before, stored = bits(model), {p.name: p.read_bytes() for p in (master / "model").iterdir()}
    run(model, checkpoint=str(master / "model"))
    assert same(before, bits(model))
    assert stored == {p.name: p.read_bytes() for p in (master / "model").iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, NonFiniteError])
def test_also_after_an_error(model, master, monkeypatch, tmp_path, error):
    before = bits(model)

    def fail(**given):
        assert not same(before, bits(model)) or error is NonFiniteError
        raise error("stop")

    run(model, make_terrain(alphas="0,0.1,0.2", directions=1), output=tmp_path)  # the centre is known
    if error is NonFiniteError:
        (tmp_path / "points-0.jsonl").unlink()
    monkeypatch.setattr(generation, "new_tokens", fail)
    with pytest.raises(error, match="the same command continues" if error is KeyboardInterrupt else "stop"):
        run(model, checkpoint=str(master / "model"), output=tmp_path)
    assert same(before, bits(model))


def test_weights_beyond_all_numbers_make_a_broken_point(model):
    before = bits(model)
    document = run(model, make_terrain(alphas="0,1e40", directions=1), exclude=())
    centre, broken = document["rows"]
    assert (broken["asr_raw"], broken["asr"], broken["degenerate"]) == (100, 0, 100)
    assert broken["perplexity"] is None and broken["margin"] is None and centre["perplexity"] > 1
    assert same(before, bits(model))
    json.dumps(document, allow_nan=False)


def test_a_model_that_is_broken_itself_is_an_error(model):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"lm_head.weight"):
        run(model)


def test_the_margin_is_that_of_the_centres_refusals(model):
    """With any word for a refusal, it is of the first token of every greedy answer."""
    rows = {row["alpha"]: row for row in run(model, preview=True)["rows"] if row["direction"] == "random 123"}
    assert len({row["margin"] for row in rows.values()}) == 5 and rows[0]["margin_n"] == 6
    odds = []
    for record in HARMFUL:
        ids = torch.tensor([data.encode_prompts([record["prompt"]], tiny_tokenizer())[0]])
        p = model(input_ids=ids).logits[0, -1].double().softmax(-1).max()
        odds.append(torch.logit(p).item())
    assert rows[0]["margin"] == pytest.approx(np.mean(odds), rel=1e-5)
    assert rows[0]["margin"] > max(rows[alpha]["margin"] for alpha in (-0.4, 0.4))


def test_a_preview_answers_at_the_centre_alone(model, generated, tmp_path):
    document = run(model, preview=True, output=tmp_path)
    assert len(generated) == 1 and document["figures"] == []
    assert [row["asr"] is not None for row in document["rows"] if "asr" in row] == [True, True]
    whole = run(model, output=tmp_path)
    assert len(generated) == 9  # the centre counts for both
    again = run(model, preview=True, output=tmp_path)
    assert len(generated) == 9 and [r["margin"] for r in again["rows"]] == [r["margin"] for r in whole["rows"]]


def test_benchmarks_are_run_with_the_moved_weights(model, monkeypatch, tmp_path):
    seen = []

    def accuracy(model, tokenizer, tasks, **options):
        seen.append(options["use_cache"])
        return {"mean": model.lm_head.weight.norm().item()}

    monkeypatch.setattr(survey.harness, "run", accuracy)
    monkeypatch.setattr(survey.harness, "check", lambda *_: None)
    options = {"tasks": ["some"], "task_options": {"use_cache": "answers"}, "asr": None, "utility": None}
    document = run(model, make_terrain(alphas="0,0.4", directions=1), output=tmp_path, **options)
    norms = [row["tasks"] for row in document["rows"]]
    assert norms[0] == model.lm_head.weight.norm().item() != norms[1]
    assert len(set(seen)) == 2 and all(name.startswith("answers-") for name in seen)  # it would know the question again


@pytest.mark.gpu
def test_a_landscape_on_a_gpu_leaves_the_model_as_it_was(master, tmp_path):
    model = tiny_model("llama").to("cuda")
    before = bits(model)
    found = run(model, checkpoint=str(master / "model"), output=tmp_path)
    assert same(before, bits(model)) and found["model"]["device"] == "cuda"
    on_cpu = run(tiny_model("llama"))
    for a, b in zip(found["rows"], on_cpu["rows"], strict=True):
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-3)


# figures


def test_visage_is_that_of_the_rows(model):
    document = run(model)
    figures = {row["rate"]: row for row in document["figures"]}
    for rate in ("asr_raw", "asr"):
        curves = [
            [r[rate] for r in document["rows"] if r["direction"] == name] for name in ("random 123", "random 124")
        ]
        assert figures[rate]["visage"] == pytest.approx(basin.visage(curves))
        assert figures[rate]["basin_area"] == pytest.approx(basin.visage(curves, "area"))
        assert figures[rate]["n"] == 6 and figures[rate]["directions"] == 2
    assert run(model, make_terrain(alphas="-0.2,0,0.4", directions=1))["figures"] == []


def test_every_system_prompt_is_asked_on_the_same_grid(model):
    systems = {"none": None, "care": "w7 w8"}
    document = run(model, systems=systems)
    assert [row["system"] for row in document["rows"]] == ["none", "care"] * 10
    assert [(row["system"], row["rate"]) for row in document["figures"]] == [
        (system, rate) for system in systems for rate in ("asr_raw", "asr")
    ]
    alone = run(model, systems={"care": "w7 w8"})
    assert [row["asr"] for row in document["rows"] if row["system"] == "care"] == [r["asr"] for r in alone["rows"]]


def test_several_answers_to_a_prompt_are_one_draw(model):
    decoding = Decoding(max_new_tokens=4, samples=3, temperature=1.0)
    document = run(model, decoding=decoding, batch_size=18)
    assert document["rows"][0]["asr_n"] == 6 and document["figures"][0]["n"] == 6


def noise(model, base):
    """How far the model is along a random direction."""
    name = "model.layers.0.mlp.up_proj.weight"
    moved = dict(model.named_parameters())[name].detach().double() - base[name].double()
    sign = float(torch.sign((moved * DIRECTION).sum()))
    return sign * float(moved.norm() / base[name].double().norm())


DIRECTION = torch.zeros(1)


@pytest.fixture
def basin_shaped(model, monkeypatch):
    """A model that refuses fewer requests the further it is: all up to 0.3, then 5 of 6, ... none from 0.5 on."""
    global DIRECTION
    base, name = bits(model), "model.layers.0.mlp.up_proj.weight"
    DIRECTION = torch.zeros_like(base[name])
    ops.perturb_(DIRECTION, DIRECTION.clone(), [123], [1.0], name=name, scales=torch.ones(1, dtype=torch.float64))
    refusal, answer = TOKENS.index("w1"), TOKENS.index("w2")
    calls = []

    def answers(model, requests, **_):
        alpha = abs(noise(model, base))
        refused = round(6 * min(1.0, max(0.0, (0.5 - alpha) / 0.2)))
        calls.append(alpha)
        return [[refusal if request.index < refused else answer] for request in requests]

    monkeypatch.setattr(generation, "new_tokens", answers)
    return calls


def test_the_adaptive_way_finds_the_same_with_half_the_answers(model, basin_shaped):
    where = make_terrain(alphas="-1:1:41", directions=2)
    whole = run(model, where)
    full = len(basin_shaped)
    assert full == 81
    short = run(model, where, adaptive=True, tolerance=2.0)
    assert len(basin_shaped) - full <= full / 2
    for a, b in zip(whole["figures"], short["figures"], strict=True):
        if a["rate"] == "asr_raw":
            assert 0 < a["visage"] < 100
            assert abs(a["visage"] - b["visage"]) <= 2.0
            assert abs(a["basin_area"] - b["basin_area"]) <= 2.0
            assert abs(a["half_width"] - b["half_width"]) <= 0.05
    left = {entry["direction"]: entry["alphas"] for entry in short["skipped"]}
    measured = {(row["direction"], row["alpha"]) for row in short["rows"]}
    assert sum(map(len, left.values())) + len(measured) == 82
    assert not any((name, alpha) in measured for name, alphas in left.items() for alpha in alphas)
    assert whole["skipped"] == []


def test_bisection_goes_on_until_it_is_as_sure_as_the_interval(model, basin_shaped):
    where = make_terrain(alphas="-1:1:41", directions=2)
    (whole,) = (row for row in run(model, where)["figures"] if row["rate"] == "asr_raw")
    low, high = whole["visage_interval"]
    del basin_shaped[:]
    (short,) = (row for row in run(model, where, adaptive=True, tolerance=90)["figures"] if row["rate"] == "asr_raw")
    assert 5 < len(basin_shaped) <= 40  # the ends and the centre are 5
    assert low <= short["visage"] <= high


# checkpoints


def test_a_line_ends_at_the_other_checkpoint(model, master):
    where = make_terrain(to=[str(master / "one")], alphas="0,0.5,1,1.25")
    document = run(model, where)
    rows = {row["alpha"]: row for row in document["rows"]}
    other = tiny_model("llama", seed=1)
    alone = evaluate(other, tiny_tokenizer(), utility=TEXTS, decoding=DECODING)
    assert rows[1]["perplexity"] == alone["utility"]["perplexity"]
    half = copy.deepcopy(model)
    for p, q in zip(half.parameters(), other.parameters(), strict=True):
        p.data += 0.5 * (q.data - p.data)
    alone = evaluate(half, tiny_tokenizer(), utility=TEXTS, decoding=DECODING)
    assert rows[0.5]["perplexity"] == alone["utility"]["perplexity"]
    assert document["figures"] == [] and document["rows"][0]["direction"] == "towards one"


def test_a_plane_shares_its_points_with_lines_and_places_checkpoints(model, master, tmp_path, generated):
    one, two = str(master / "one"), str(master / "two")
    run(model, make_terrain(to=[one], alphas="0,0.5,1"), output=tmp_path)
    assert len(generated) == 3
    where = make_terrain(to=[one, two], alphas="0,0.5,1", betas="0,1", trajectory=[two, one])
    document = run(model, where, output=tmp_path)
    assert len(generated) == 6  # (0,1), (0.5,1), (1,1): the rest lies on the line or is an end
    assert [(row["alpha"], row["beta"]) for row in document["rows"]] == [
        (alpha, beta) for beta in (0, 1) for alpha in (0, 0.5, 1)
    ]
    (second, first) = document["trajectory"]
    np.testing.assert_allclose(second["coordinates"], [0, 1], atol=1e-9)
    np.testing.assert_allclose(first["coordinates"], [1, 0], atol=1e-9)
    assert second["outside"] < 1e-6 and second["checkpoint"] == two
    assert first["perplexity"] == document["rows"][2]["perplexity"]
    away = [(q - p).detach() for p, q in zip(model.parameters(), tiny_model("llama", seed=1).parameters(), strict=True)]
    assert first["moved"] == pytest.approx(float(torch.cat([w.flatten() for w in away]).norm()), rel=1e-6)
    assert -1 < document["cosines"][0][1] < 1


def test_what_lies_outside_the_plane_is_told():
    gram = np.diag([4.0, 1.0, 0.0])
    gram[2] = gram[:, 2] = [4.0, 0.0, 4.0 + 9.0]  # the first axis and 3 at a right angle
    found = terrain.place(gram, 2, 2)
    np.testing.assert_allclose(found.coordinates, [1, 0])
    assert found.moved == pytest.approx(np.sqrt(13)) and found.outside == pytest.approx(3 / np.sqrt(13))
    assert terrain.place(np.zeros((2, 2)), 1, 1) == ([0.0], 0.0, 0.0)


def test_one_category_alone(model, tmp_path, generated):
    pairs = [{"prompt": f"w{i} w{2 * i}", "response": f"w{i} w3 w{i + 7} w2"} for i in range(20, 26)]
    units = identify(score(model, tiny_tokenizer(), safety=pairs, utility=pairs[::-1]), 0.2, 0.2, 0.2)
    where = make_terrain(alphas="0,0.4", directions=1)
    found = {
        only: run(model, where, units=units, only=only, output=tmp_path)["rows"][1]["perplexity"]
        for only in ("scu", "ru", "random")
    }
    assert len(set(found.values())) == 3 and len(generated) == 4
    assert len({row["perplexity"] for row in run(model, where, output=tmp_path)["rows"]} - set(found.values())) == 2


# points are kept


def test_a_killed_run_goes_on(model, tmp_path, generated):
    whole = run(copy.deepcopy(model), output=tmp_path / "whole")
    assert len(generated) == 9
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        original = generation.new_tokens
        left = iter(range(4))
        generation.new_tokens = lambda **given: (
            original(**given) if next(left, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
        )
        run(model, output=tmp_path / "cut")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    path = tmp_path / "cut" / "points-0.jsonl"
    assert path.read_bytes().count(b"\n") == 4 and not (tmp_path / "cut" / "landscape.json").exists()
    with open(path, "ab") as file:
        file.write(b'{"key": "torn')
    del generated[:]
    assert run(model, output=tmp_path / "cut") == whole
    assert len(generated) == 5
    files = [(tmp_path / name / "landscape.json").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 9


def test_a_finer_grid_finds_the_points_of_the_coarser(model, tmp_path, generated):
    run(model, make_terrain(alphas="-0.4:0.4:3", directions=1), output=tmp_path)
    assert len(generated) == 3
    run(model, make_terrain(alphas="-0.4:0.4:5", directions=2), output=tmp_path)
    assert len(generated) == 9
    run(model, make_terrain(dimensions=2, alphas="-0.4:0.4:5", betas="0,0.4"), output=tmp_path)
    assert len(generated) == 13  # only where both axes moved
    run(model, make_terrain(alphas="-0.4:0.4:3", directions=1), output=tmp_path, fresh=True)
    assert len(generated) == 16


def test_another_judge_hears_the_saved_answers(model, tmp_path, generated):
    run(model, output=tmp_path)
    document = run(model, output=tmp_path, judge=judges.make_judge("keyword"))
    assert len(generated) == 9
    assert {row["asr_raw"] for row in document["rows"]} == {100.0}
    run(model, output=tmp_path, asr=HARMFUL[:5])
    assert len(generated) == 18


def test_without_a_folder_nothing_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(model)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("adaptive", [False, True])
def test_processes_share_the_points(model, tmp_path, adaptive):
    where = make_terrain(alphas="-0.4:0.4:9", directions=2)
    whole = run(copy.deepcopy(model), where, output=tmp_path / "one", adaptive=adaptive)

    run(copy.deepcopy(model), make_terrain(alphas="0,0.1", directions=1), output=tmp_path / "two")

    def work(mine):  # rank 1 must not go by points that rank 0 forgets
        run(model, where, output=tmp_path / "two", ranks=mine, adaptive=adaptive, fresh=True)

    assert fork(2, work) == [0, 0]
    assert (tmp_path / "two" / "landscape.json").read_bytes() == (tmp_path / "one" / "landscape.json").read_bytes()
    written = [(tmp_path / "two" / f"points-{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    keys = [json.loads(line)["key"] for lines in written for line in lines]
    assert len(set(keys)) == len(keys) and abs(len(written[0]) - len(written[1])) <= (3 if adaptive else 1)
    assert whole["rows"][0]["asr_n"] == 6
    with pytest.raises(SsahError, match="output: 2 processes share their points"):
        run(model, ranks=ranks.Ranks(0, 2))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "points-3.jsonl").write_text('{"key": "a"}\n[1]\n')
    with pytest.raises(SsahError, match=r"points-3.jsonl is damaged or not of ssah_fast, line 2"):
        PointStore(tmp_path).read()
    (tmp_path / "points-3.jsonl").unlink()
    store = PointStore(tmp_path)
    (tmp_path / "points-0.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*points-0.jsonl"):
        store.add({"key": "a", "answers": []})


# mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": ["a", "b", "c"]}, "--to and --and name 3 checkpoints"),
        ({"to": ["a", "b"], "dimensions": 1}, "--dimensions 1: --to and --and span a plane"),
        ({"to": ["a"], "directions": 2}, "--directions 2 is for lines along random directions"),
        ({"dimensions": 2, "directions": 2}, "--directions 2 is for lines along random directions"),
        ({"directions": 0}, "--directions 0 is out of range"),
        ({"betas": "0,1"}, "--betas is for a plane"),
        ({"alphas": "0.1:0.5:5"}, "--alphas"),
        ({"alphas": [0.1, 0.2]}, "--alphas"),
        ({"dimensions": 2, "betas": "1,2"}, "--betas"),
    ],
)
def test_a_terrain_that_is_none(options, message):
    with pytest.raises(SsahError, match=message):
        make_terrain(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preview": True, "asr": None}, "--preview measures the margin of refusals; give --asr-data"),
        ({"adaptive": True, "asr": None}, "--adaptive goes by the attack success rate; give --asr-data"),
        ({"adaptive": True, "preview": True}, "--preview leaves them out"),
        ({"adaptive": True, "where": "one-sided"}, "--adaptive is for lines along random directions"),
        ({"adaptive": True, "tolerance": 0}, "--tolerance 0 is out of range"),
        ({"only": "scu", "where": "along"}, "--trajectory measures whole checkpoints, not scu alone"),
        ({"only": "scu"}, "--only scu goes with --units"),
        ({"only": "best"}, "--only best is unknown; use scu, ucu, cu, ru, random"),
        ({"asr": None, "utility": None}, "nothing to measure"),
        ({"asr": []}, "asr: "),
        ({"where": "home"}, "towards model: its weights are those of MODEL"),
        ({"where": "twice"}, "towards one and towards one are one direction"),
        ({"exclude": ("*norm*", "*brain*")}, "brain"),
        ({"orthogonal": True, "where": "one-sided"}, "orthogonal"),
    ],
)
def test_a_mistake_is_told_before_anything_moves(model, master, options, message, tmp_path):
    one = str(master / "one")
    made = {
        "one-sided": {"alphas": "0,0.2", "directions": 1},
        "home": {"to": [str(master / "model")]},
        "along": {"trajectory": [one]},
        "twice": {"to": [one, one], "alphas": "0,1", "betas": "0,1"},
    }
    where = make_terrain(**made.get(options.get("where"), {"alphas": GRID}))
    before = bits(model)
    with pytest.raises(SsahError, match=message):
        run(model, where, output=tmp_path, **{key: value for key, value in options.items() if key != "where"})
    assert same(before, bits(model))
    assert not [*tmp_path.glob("points*")]


def test_another_shape_is_no_end_of_a_line(model, tmp_path):
    tiny_model("llama", intermediate_size=40).save_pretrained(tmp_path / "wide")
    with pytest.raises(SsahError, match=r"mlp\.\w+_proj\.weight"):
        run(model, make_terrain(to=[str(tmp_path / "wide")]))


def test_the_only_categories_are_those_of_the_command_line():
    assert landscapes.ONLY == ("scu", "ucu", "cu", "ru", "random")
