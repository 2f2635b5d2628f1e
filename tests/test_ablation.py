"""Ablation: which units are silenced, that what is measured is a model without them, and that a killed run goes on."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_silencing import with_zeroed_columns
from tiny_models import tiny_model, tiny_tokenizer

from ssah_fast import ablation, data, variants
from ssah_fast.ablation import ablate
from ssah_fast.categories import Category
from ssah_fast.errors import ResumeError, SsahError
from ssah_fast.evaluation import generation, inputs, perplexity
from ssah_fast.evaluation.generation import Decoding
from ssah_fast.partition import identify
from ssah_fast.scan import Scan
from ssah_fast.scores import Scores
from ssah_fast.scoring import score

SIZES = {"scu": 0.1, "ucu": 0.2, "ru": 0.15}
DECODING = Decoding(max_new_tokens=6)
HARMFUL = [{"prompt": f"w{i} w{i + 40}"} for i in range(4)]
HARMLESS = [{"prompt": f"w{i} w9"} for i in range(3)]
TEXTS = [{"prompt": f"w{i}", "response": f"w{i + 1} w{i + 2} w3"} for i in range(50, 54)]
CALIBRATION = {
    "safety": [{"prompt": f"w{i} w{2 * i}", "response": f"w{i} w3 w{i + 7} w2"} for i in range(20, 26)],
    "utility": [{"prompt": f"w{i} w1", "response": f"w{i} w{i + 4} w9"} for i in range(30, 36)],
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def scores(model):
    return score(model, tiny_tokenizer(), **CALIBRATION)


@pytest.fixture(scope="module")
def units(scores):
    return identify(scores, **SIZES)


def run(model, units, **options):
    given = {"asr": HARMFUL, "utility": TEXTS, "decoding": DECODING, "draws": 1, **options}
    return ablate(model, tiny_tokenizer(), units, **given)


# which units


def counts(variant):
    return {name: int(flags.sum()) for name, flags in variant.silent.items()}


def test_every_category_comes_with_its_controls(units, scores):
    made = variants.plan(units, scores, categories=["scu", "cu", "ru"], controls=variants.CONTROLS, draws=2, seed=5)
    assert [one.name for one in made] == [
        "dense",
        "scu 10%",
        "random of scu 10%, draw 0",
        "random of scu 10%, draw 1",
        "norm of scu 10%",
        "variance of scu 10%",
        "swapped of scu 10%",
        f"cu {variants.percent(units.fraction('cu'))}",
        *(f"random of cu {variants.percent(units.fraction('cu'))}, draw {draw}" for draw in (0, 1)),
        "ru 15%",
        "random of ru 15%, draw 0",
        "random of ru 15%, draw 1",
        "norm of ru 15%",
        "variance of ru 15%",
    ]
    by_name = {one.name: one for one in made}
    scu = by_name["scu 10%"]
    assert {name: (values == Category.SCU).tolist() for name, values in units.category.items()} == {
        name: flags.tolist() for name, flags in scu.silent.items()
    }
    for one in made[1:7]:
        assert one.units == scu.units == units.count("scu") == sum(counts(one).values())
    draws = [by_name[f"random of scu 10%, draw {draw}"] for draw in (0, 1)]
    assert [counts(draw) for draw in draws] == [counts(scu)] * 2
    assert len({one.sha256 for one in made}) == len(made)
    again = variants.plan(units, scores, categories=["scu"], seed=6, draws=1)  # draw 1 above
    assert again[2].sha256 == draws[1].sha256
    assert made[0].describe() == {"name": "dense", "category": "dense", "of": None, "ratio": None, "draw": None} | {
        "units": 0,
        "parameters": 0,
    }


def test_the_controls_rank_by_what_they_say(units, scores):
    made = {one.category: one for one in variants.plan(units, scores, categories=["scu"], controls=variants.CONTROLS)}
    swapped = identify(scores, 0.0, SIZES["scu"], 0.0)  # the other end of the same ranking
    assert all(torch.equal(made["swapped"].silent[name], values == 2) for name, values in swapped.category.items())
    for module in scores.modules.values():
        norm = module.norm[module.layout.inputs()].sum(-1)
        assert torch.equal(module.control("norm", "variance"), torch.stack([norm, torch.zeros_like(norm)]))
        if module.layout.kind == "mlp":  # a value channel has three columns, each of its own variance and norm
            expected = module.importance / module.norm
            torch.testing.assert_close(module.control("variance", "variance"), expected)
    top = identify(scores.control("norm"), SIZES["scu"], 0.0, 0.0)
    assert all(torch.equal(made["norm"].silent[name], values == 3) for name, values in top.category.items())


def test_the_norm_control_of_ru_takes_the_lowest(units, scores):
    norms = {name: module.norm[module.layout.inputs()].sum(-1) for name, module in scores.modules.items()}
    shares = {name: norm / norm.sum() for name, norm in norms.items()}
    made = variants.plan(units, scores, categories=["ru", "ucu"], controls=["norm"])
    low, high = (torch.cat([shares[name][flags] for name, flags in one.silent.items()]) for one in (made[2], made[4]))
    usual = torch.cat(list(shares.values())).median()
    assert low.max() < usual < high.min()


def test_another_size_begins_behind_the_categories_before_it(units, scores):
    made = variants.plan(units, scores, ratios=[0.05, 0.2], controls=[])
    names = ["dense", "scu 10%", "scu 5%", "scu 20%", "ucu 20%", "ucu 5%", "ru 15%", "ru 5%", "ru 20%"]
    assert [one.name for one in made] == names  # the file's own UCU is not there twice
    by_name = {one.name: one.silent for one in made}
    for small, large in (("scu 5%", "scu 10%"), ("ucu 5%", "ucu 20%"), ("ru 5%", "ru 15%"), ("ru 15%", "ru 20%")):
        assert all((by_name[large][name] | ~flags).all() for name, flags in by_name[small].items())
    for behind, before in (("ucu 5%", "scu 10%"), ("ru 20%", "ucu 20%")):
        assert not any((by_name[before][name] & flags).any() for name, flags in by_name[behind].items())


def test_what_cannot_be_planned(units, scores):
    with pytest.raises(SsahError, match=r"control 'luck' is unknown; use random, norm, variance, swapped"):
        variants.plan(units, scores, controls=["luck"])
    with pytest.raises(SsahError, match=r"the control 'norm' needs the scores that the units were identified from"):
        variants.plan(units, controls=["random", "norm"])
    other = replace(scores, provenance={**scores.provenance, "data": {}})
    with pytest.raises(SsahError, match=r"ratios=\[0.05\]: these scores are not what .* \(scores.data\.\S+ differs\)"):
        variants.plan(units, other, ratios=[0.05])
    few = identify(scores, 0.1, 0.1, 0.0)
    assert [one.category for one in variants.plan(few, controls=[])] == ["dense", "scu", "ucu"]
    with pytest.raises(SsahError, match="category 'ru' has no unit in this units file"):
        variants.plan(few, categories=["ru"])
    with pytest.raises(SsahError, match="draws=0"):
        variants.plan(units, draws=0)


def test_the_mean_of_a_channel_is_over_all_tokens_of_both_sets(model, scores):
    sets = [data.load_pairs(source, nsamples=None) for source in CALIBRATION.values()]
    layer = scores.modules["model.layers.0.mlp"]
    seen = []
    reader = model.get_submodule(layer.layout.reader)
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    rows = []
    for sequence in (s for pairs in sets for s in data.encode(pairs.pairs, tiny_tokenizer())):
        with torch.no_grad():
            model(torch.tensor([sequence.ids]))
        rows.append(seen[-1][sequence.counted])
    handle.remove()
    torch.testing.assert_close(layer.pooled_mean("variance"), torch.cat(rows).double().mean(0))


# what is measured


@pytest.mark.parametrize("method", ["zero", "mean"])
def test_rows_are_those_of_a_model_without_the_units(model, units, scores, method, tmp_path):
    document = run(
        model,
        units,
        scores=scores,
        method=method,
        look_alikes=HARMLESS,
        systems={"none": None, "short": "w5"},
        output=tmp_path,
    )
    assert document == json.loads((tmp_path / ablation.NAME).read_text())
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()[1:]]
    dense, scu = document["rows"][:2]
    assert (dense["category"], scu["category"]) == ("dense", "scu")
    silent = {name: values == Category.SCU for name, values in units.category.items()}
    asked = {"asr": data.load_pairs(HARMFUL, nsamples=None), "over_refusal": data.load_pairs(HARMLESS, nsamples=None)}
    requests = inputs.all_requests(asked, tiny_tokenizer(), {"none": None, "short": "w5"})
    texts = data.encode(data.load_pairs(TEXTS, nsamples=None).pairs, tiny_tokenizer())
    for row, alone in ((dense, model), (scu, with_zeroed_columns(model, units.layouts, silent))):
        same = method == "zero" or row is dense
        found = [line["text"] for line in lines if line["variant"] == row["name"]]
        expected = [c.text for c in generation.generate(alone, tiny_tokenizer(), requests, DECODING, reference=None)]
        assert (sorted(found) == sorted(expected)) is same
        measured = perplexity.measure(alone, texts)
        assert (row["perplexity"] == pytest.approx(measured.perplexity.value, rel=1e-6)) is same
        if same:
            assert row["accuracy"] == measured.accuracy.value
    assert (scu["asr_n"], scu["over_refusal_n"]) == (len(HARMFUL), len(HARMLESS))
    assert set(scu["asr_by_system"]) == {"none", "short"}
    assert scu["asr"] == pytest.approx(sum(rates["asr"] for rates in scu["asr_by_system"].values()) / 2)
    assert document["settings"]["decoding"]["max_new_tokens"] == DECODING.max_new_tokens
    assert document["settings"]["method"] == method
    json.dumps(document, allow_nan=False)


def test_answers_of_several_variants_share_their_batches(model, units, monkeypatch):
    sizes = []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **how: sizes.append(len(ids)) or plain(ids, **how))
    document = run(model, units, batch_size=14)
    assert len(document["rows"]) == 7  # dense, three categories, a control of each
    assert sizes == [14, 14]


def test_guards_say_nothing_of_over_refusal(model, units):
    class Guard:
        name, judges_refusals = "guard:none", False

        def __call__(self, exchanges):
            return [exchange.index == 0 for exchange in exchanges]

    rows = run(model, units, look_alikes=HARMLESS, controls=[], judge=Guard())["rows"]
    assert {row["over_refusal"] for row in rows} == {None}
    assert {row["asr_raw"] for row in rows} == {25.0}


# calibration prompts


def test_prompts_of_the_calibration_data_are_refused(model, units):
    seen = [*HARMFUL, {"prompt": "w21  w42\n"}]
    with pytest.raises(SsahError, match=r"asr: 1 of 5 prompts are in .* \(the first is number 5\); .* add allow_cal"):
        run(model, units, asr=seen)
    lines = []
    run(model, units, asr=seen, controls=[], categories=["scu"], allow_calibration_prompts=True, told=lines.append)
    assert lines == ["asr: 1 of 5 prompts are in the calibration data of the units"]
    flagged = data.load_pairs(CALIBRATION["utility"], nsamples=None, argument="--utility-data")
    with pytest.raises(SsahError, match=r"--utility-data: 6 of 6 .* or add --allow-calibration-prompts"):
        run(model, units, utility=flagged)


def test_merged_scores_remember_the_prompts_of_all_parts(model, scores):
    more = score(
        model, tiny_tokenizer(), safety=[{"prompt": "w80", "response": "w3 w4"}] * 2, utility=CALIBRATION["utility"]
    )
    units = identify(Scores.merge([scores, more]), **SIZES)
    for prompt in ("w80", "w21 w42"):
        with pytest.raises(SsahError, match="asr: 1 of 1 prompts"):
            run(model, units, asr=[{"prompt": prompt}])


def test_units_that_do_not_know_their_prompts_are_measured_with_a_word(model, units):
    old = copy.deepcopy(units)
    for entry in old.provenance["scores"]["data"].values():
        del entry["prompts"]
    lines = []
    run(model, old, controls=[], categories=["scu"], told=lines.append)
    assert len(lines) == 1
    assert "held-out data is not checked" in lines[0]


# going on


class Killed(Exception):
    pass


@pytest.mark.parametrize(("what", "at"), [("answers", 8), ("utility", 2)])
def test_a_killed_run_goes_on_and_ends_the_same(model, units, tmp_path, what, at):
    options = {"batch_size": 4, "categories": ["scu", "ru"], "output": tmp_path / "killed"}

    def kill(stage, done, total):
        if (stage, done) == (what, at):
            raise Killed

    with pytest.raises(Killed):
        run(model, units, progress=kill, **options)
    assert not (tmp_path / "killed" / ablation.NAME).exists()
    stages = []
    resumed = run(model, units, progress=lambda stage, done, total: stages.append((stage, done)), **options)
    whole = run(model, units, **{**options, "output": tmp_path / "whole"})
    assert resumed == whole
    answers = [done for stage, done in stages if stage == "answers"]
    assert answers == ([12, 16, 20] if what == "answers" else [])
    for name in ("completions.jsonl", "utility.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_run_is_not_continued(model, units, scores, tmp_path):
    options = {"controls": [], "categories": ["scu"], "output": tmp_path}
    before = run(model, units, **options)
    with pytest.raises(ResumeError, match=r"settings.method is 'mean' here and 'zero' there"):
        run(model, units, method="mean", scores=scores, **options)
    fresh = run(model, units, method="mean", scores=scores, fresh=True, **options)
    assert fresh["rows"][1]["perplexity"] != before["rows"][1]["perplexity"]


# the scan


class Rows:
    """Measures as a table says: {name: (asr, accuracy)}."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def measure(self, bench, planned):
        (made,) = planned
        self.asked.append(made.name)
        asr, accuracy = self.table[made.name]
        return [
            {
                **made.describe(),
                "asr": 0.0,
                "asr_by_system": {"none": {"asr": asr}},
                "accuracy": accuracy,
                "tasks": None,
            }
        ]


def test_a_scan_takes_the_largest_size_of_each_that_qualifies(units, scores):
    rows = Rows(
        {
            "scu 30%": (99.0, 80.0),  # costs too much
            "scu 20%": (70.0, 86.5),  # 60 points more, 3.5 less
            "ucu 30%": (31.0, 60.0),  # 21 points more
            "ucu 20%": (30.0, 75.1),  # costs 14.9
            "ucu 5%": (30.0, 75.0),
            "ru 30%": (15.1, 90.0),
            "ru 20%": (15.0, 86.9),
            "ru 5%": (15.0, 86.9),
        }
    )
    dense = {"asr_by_system": {"none": {"asr": 10.0}}, "accuracy": 90.0, "tasks": None}
    found = ablation._Search(units, scores, Scan((0.05, 0.3, 0.2))).run(None, rows, dense)
    assert rows.asked == list(rows.table)
    assert found["found"] == {"scu": 0.2, "ucu": 0.05, "ru": None}
    assert [row["qualifies"] for row in found["tried"]] == [False, True, False, False, True, False, False, False]
    assert found["tried"][1]["asr_gain"] == 60.0
    assert found["tried"][1]["utility_drop"] == 3.5
    assert found["identify"][:6] == ["--scu", "20%", "--ucu", "5%", "--ru", "0%"]
    assert found["identify"][6:] == "--normalize share --contrast difference --basis units --floor 0.05".split()


def test_tasks_are_the_utility_of_a_scan_where_there_are_any():
    row = {"asr": 3.0, "asr_by_system": {"default": {"asr": 9.0}}, "accuracy": 50.0, "tasks": 60.0}
    assert ablation._utility(row) == 60.0
    assert ablation._safety(row) == 3.0  # nothing was asked without a system prompt


def test_a_scan_runs_and_is_kept(model, units, scores, tmp_path):
    anything = Scan((0.05, 0.02), **dict.fromkeys(("scu_utility_drop", "ucu_asr_gain", "ru_utility_drop"), 1000.0))
    options = {"scores": scores, "controls": [], "categories": ["scu"], "scan": replace(anything, scu_asr_gain=-1000.0)}
    first = run(model, units, output=tmp_path, **options)
    assert first["scan"]["found"]["scu"] == 0.05
    stages = []
    again = run(model, units, output=tmp_path, progress=lambda what, *_: stages.append(what), **options)
    assert again == first
    assert "answers" not in stages


def test_a_scan_that_cannot_be_run_is_refused(model, units, scores):
    with pytest.raises(SsahError, match=r"scan ratios: 1\.5 is out of range"):
        Scan((0.1, 1.5))
    with pytest.raises(SsahError, match="a scan needs the scores"):
        run(model, units, scan=Scan())
    with pytest.raises(SsahError, match="more than 1"):
        run(model, units, scores=scores, scan=Scan((0.4,)))
    with pytest.raises(SsahError, match="method='median' is unknown; use zero, mean"):
        run(model, units, method="median")
    with pytest.raises(SsahError, match="units of another model"):
        run(tiny_model("llama", num_key_value_heads=3), units)
