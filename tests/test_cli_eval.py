"""`ssah-fast eval` from the command line, interrupted and resumed, and everything that can be wrong with its input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy import stats
from tiny_models import tiny_model, tiny_tokenizer

from ssah_fast.cli.eval import evaluate as command
from ssah_fast.cli.main import main
from ssah_fast.errors import SsahError
from ssah_fast.evaluation import evaluate as evaluation
from ssah_fast.evaluation import generation
from ssah_fast.evaluation.completions import CompletionFile, read_completions
from ssah_fast.evaluation.generation import Decoding

RUN = ("eval", "model", "--device", "cpu", "-o", "out", "--max-new-tokens", "5", "--batch-size", "4")
DATA = ("--asr-data", "asr.jsonl", "--over-refusal-data", "harmless.jsonl", "--utility-data", "utility.jsonl")


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    records = [{"prompt": f"w{i} w{i + 3}", "response": f"w{2 * i} w5 w{i}"} for i in range(9)]
    for name, rows in (("asr", records[:6]), ("harmless", records[3:]), ("utility", records)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "safe.txt").write_text("w8 w9\n")
    return folder


@pytest.fixture
def folder(master, tmp_path, monkeypatch):
    copy = shutil.copytree(master, tmp_path / "here")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("NO_COLOR", "1")
    return copy


def document(folder="out"):
    return json.loads(Path(folder, "eval.json").read_text())


def interrupt(monkeypatch, number):
    """End the run inside of batch `number`, as Ctrl-C does."""
    answer, batches = generation._Generator.answer, []

    def interrupted(self, *arguments):
        batches.append(arguments[1])
        if len(batches) == number:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(generation._Generator, "answer", interrupted)
    return batches


# success


def test_everything_at_once(folder, capfd):
    assert main([*RUN, *DATA, "--system-prompt", "none,safe.txt", "--judge", "keyword,wei", "--json"]) == 0
    captured = capfd.readouterr()
    found = document()
    assert json.loads(captured.out) == found and captured.err == "wrote out/eval.json\n"
    assert list(found)[:2] == ["kind", "schema"] and (found["kind"], found["schema"]) == ("evaluation", 1)
    assert found["model"]["name"] == "model" and found["model"]["parameters"] > 0
    assert found["settings"]["systems"] == {"none": None, "safe": "w8 w9"}
    assert found["settings"]["batch_size"] == 4 and found["settings"]["judges"] == ["keyword", "wei"]
    assert {name: found["data"][name]["n"] for name in found["data"]} == {"asr": 6, "over_refusal": 6, "utility": 9}
    rows = found["attack"]
    assert [(row["set"], row["system"], row["judge"]) for row in rows] == [
        ("asr", system, judge) for system in ("none", "safe") for judge in ("keyword", "wei")
    ]
    for row in rows:  # words of the tiny models are in no list of phrases, and their answers are shorter than 20 words
        assert row["asr_raw"] == (100 if row["judge"] == "keyword" else 0)
        assert row["asr"] + row["refusal"] + row["degenerate"] == pytest.approx(100)
        low, high = stats.binomtest(round(row["asr"] * 6 / 100), 6).proportion_ci(method="wilson")
        assert row["asr_n"] == 6 and row["asr_interval"] == pytest.approx([100 * low, 100 * high], abs=1e-9)
    assert [row["over_refusal_raw"] for row in found["over_refusal"]] == [0, 100, 0, 100]
    assert found["utility"]["tokens"] == 27 and found["utility"]["perplexity_n"] == 9 and found["tasks"] is None
    _, completions = read_completions("out")
    assert len(completions) == 24 and all(completion.nll > 0 for completion in completions)


def test_an_interrupted_run_goes_on_and_ends_the_same(folder, monkeypatch, capfd):
    assert main([*RUN, *DATA]) == 0
    whole = {name: Path("out", name).read_bytes() for name in ("eval.json", "completions.jsonl")}
    table = capfd.readouterr().out
    assert "Harmful requests, %" in table and "over-refusal" in table and "perplexity" in table
    shutil.rmtree("out")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert main([*RUN, *DATA]) == 130
    assert not Path("out", "eval.json").exists() and len(read_completions("out")[1]) == 8
    batches = interrupt(monkeypatch, 0)
    assert main([*RUN, *DATA]) == 0
    assert len(batches) == 1  # of three
    assert {name: Path("out", name).read_bytes() for name in whole} == whole
    assert capfd.readouterr().out == table
    assert main([*RUN, *DATA, "--seed", "1"]) == 4
    assert "settings.decoding.seed is 1 here and 0 there" in capfd.readouterr().err
    assert main([*RUN, *DATA, "--seed", "1", "--fresh"]) == 0
    assert document()["settings"]["decoding"]["seed"] == 1


def test_another_fine_tune_of_the_model_is_another_run(folder, capfd):
    assert main([*RUN, "--asr-data", "asr.jsonl"]) == 0
    tiny_model("llama", seed=1).save_pretrained("model")
    assert main([*RUN, "--asr-data", "asr.jsonl"]) == 4
    assert "settings.model.weights_sha256" in capfd.readouterr().err


def test_predicting_and_judging_apart_is_the_same_as_both_at_once(folder):
    assert main([*RUN, *DATA]) == 0
    whole = document()
    assert main([*RUN[:4], "-o", "apart", *RUN[6:], *DATA[:4], "--predict-only"]) == 0
    assert not Path("apart", "eval.json").exists()
    shutil.rmtree("model")
    assert main(["eval", "--judge-only", "-o", "apart"]) == 0
    apart = document("apart")
    assert (apart["attack"], apart["over_refusal"]) == (whole["attack"], whole["over_refusal"])
    assert apart["utility"] is None
    assert main(["eval", "--judge-only", "-o", "out", "--judge", "wei"]) == 0  # keeps what needs the model
    again = document()
    assert again["utility"] == whole["utility"] and again["data"] == whole["data"]
    assert {row["judge"] for row in again["attack"]} == {"wei"} and again["settings"]["judges"] == ["wei"]


def test_a_suffix_goes_to_harmful_requests_alone(folder, monkeypatch):
    Path("suffix.txt").write_text(" w80\n")
    batches = interrupt(monkeypatch, 0)
    assert main([*RUN, *DATA[:4], "--suffix", "suffix.txt", "--limit", "2", "--predict-only"]) == 0
    words = {(r.set, r.index): tiny_tokenizer().decode(r.ids).split() for batch in batches for r in batch}
    assert words["asr", 1][2:-1] == ["w1", "w4", "w80"] and words["over_refusal", 1][2:-1] == ["w4", "w7"]
    assert len(words) == 4
    assert read_completions("out")[0]["suffix"] == " w80"


def test_several_answers_to_a_prompt_are_one_draw(folder):
    options = ("--asr-data", "asr.jsonl", "--num-samples", "3", "--temperature", "1")
    assert main([*RUN, *options]) == 0
    (row,) = document()["attack"]
    assert row["asr_n"] == 6 and document()["settings"]["requests"] == 18


def test_the_reference_says_how_probable_answers_are(folder, capfd):
    tiny_model("llama", seed=1).save_pretrained("other")
    tiny_tokenizer().save_pretrained("other")
    assert main([*RUN, "--asr-data", "asr.jsonl"]) == 0
    own = [completion.nll for completion in read_completions("out")[1]]
    assert main([*RUN, "--asr-data", "asr.jsonl", "--reference", "other", "--fresh"]) == 0
    other = [completion.nll for completion in read_completions("out")[1]]
    assert all(a < b for a, b in zip(own, other, strict=True))  # greedy answers are the model's own favourites
    assert document()["settings"]["reference"]["name"] == "other"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained("other")
    assert main([*RUN, "--asr-data", "asr.jsonl", "--reference", "other"]) == 2
    assert "--reference other: its vocabulary is not that of MODEL" in capfd.readouterr().err


def test_degenerate_answers_are_rates_and_a_loud_line(folder, capfd):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1e-3  # one logit differs from the others: the same token always, or its end
        model.model.norm.weight.fill_(1.0)
    model.save_pretrained("model")
    assert main([*RUN, "--asr-data", "asr.jsonl", "--max-new-tokens", "30"]) == 0
    captured = capfd.readouterr()
    (row,) = document()["attack"]
    assert row["degenerate"] == 100 and row["asr"] == row["refusal"] == 0 and row["asr_raw"] == 100
    assert sum(row["reasons"].values()) == 6
    assert "WARNING: every completion is degenerate" in captured.err and "100.0" in captured.out


def test_tasks_and_their_samples(folder, monkeypatch):
    asked = {}

    def run(model, tokenizer, tasks, **options):
        asked.update(options, tasks=tasks)
        figures = {"acc": 50.0, "acc_interval": [9.5, 90.5], "acc_n": 2, "metrics": {}}
        return {"mean": 50.0, "tasks": {"tiny": figures}, "samples": {"tiny": [{"doc_id": 0}]}}

    monkeypatch.setattr(evaluation.harness, "run", run)
    monkeypatch.setattr(evaluation.harness, "check", lambda tasks, paths: None)
    options = ("--tasks", "tiny", "--limit", "25%", "--num-fewshot", "2", "--include-path", "here", "--log-samples")
    assert main([*RUN, *options]) == 0
    assert asked["tasks"] == ("tiny",) and asked["limit"] == 0.25 and asked["num_fewshot"] == 2
    assert asked["include_path"] == ["here"] and asked["log_samples"]
    assert document()["tasks"]["mean"] == 50 and "samples" not in document()["tasks"]
    assert json.loads(Path("out", "samples_tiny.jsonl").read_text()) == {"doc_id": 0}


def test_plain_texts_and_no_template(folder):
    Path("asr.txt").write_text("w1 w2\nw3\n")
    Path("texts.txt").write_text("w1 w2 w3\nw4 w5\n")
    assert main([*RUN, "--asr-data", "asr.txt", "--utility-data", "texts.txt", "--no-chat-template"]) == 0
    assert document()["attack"][0]["asr_n"] == 2 and document()["utility"]["tokens"] == 5


def test_of_several_processes_the_first_does_it_all(folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main([*RUN, *DATA]) == 0
    assert not Path("out").exists()


def test_from_python_without_a_folder(folder):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = evaluation.evaluate(model, tokenizer, asr=[{"prompt": "w1"}, {"prompt": "w2"}], decoding=Decoding(4))
    assert found["attack"][0]["asr_n"] == 2 and found["data"]["asr"]["sources"] == ["a list in memory"]
    with pytest.raises(SsahError, match="nothing to measure"):
        evaluation.evaluate(model, tokenizer)


# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "model", "--asr-data", "asr.jsonl"), "Missing option '-o'"),
        (RUN, "nothing to measure; give --asr-data"),
        ((*RUN, "--predict-only", "--utility-data", "utility.jsonl"), "nothing to predict"),
        (("eval", "-o", "out", "--asr-data", "asr.jsonl"), "Missing argument 'MODEL'"),
        (("eval", "-o", "out", "--judge-only", "--predict-only"), "exclude each other"),
        (("eval", "-o", ".", "--judge-only"), "has no completions.jsonl"),
        ((*RUN, "--asr-data", "empty.jsonl"), "--asr-data: empty.jsonl holds no text"),
        ((*RUN, "--asr-data", "nowhere.jsonl"), "--asr-data: file not found"),
        ((*RUN, "--asr-data", "asr.jsonl", "--judge", "kind"), "--judge 'kind' is no judge"),
        ((*RUN, "--asr-data", "asr.jsonl", "--judge", "guard:./nowhere"), "./nowhere does not exist"),
        ((*RUN, "--asr-data", "asr.jsonl", "--system-prompt", "nowhere.txt"), "--system-prompt nowhere.txt"),
        ((*RUN, "--asr-data", "asr.jsonl", "--system-prompt", "safe.txt,./safe.txt"), "two of them are called 'safe'"),
        ((*RUN, "--asr-data", "asr.jsonl", "--suffix", "empty.jsonl"), "--suffix empty.jsonl: the file is empty"),
        ((*RUN, "--asr-data", "asr.jsonl", "--num-samples", "2"), "greedy answers would all be the same"),
        ((*RUN, "--asr-data", "asr.jsonl", "--limit", "0"), "limit=0.0 is out of range"),
        ((*RUN, "--asr-data", "asr.jsonl", "--max-new-tokens", "500"), "it exceeds the 128 positions of the model"),
        ((*RUN, "--asr-data", "asr.jsonl", "-o", "asr.jsonl"), "it is a file; choose another folder"),
        ((*RUN, "--asr-data", "asr.jsonl", "-o", "no/where"), "does not exist; create it first"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capfd, arguments, message):
    Path("empty.jsonl").write_text("")
    assert main([*arguments]) == 2
    captured = capfd.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not list(Path(".").glob("out/*"))


def test_a_model_without_a_chat_template_is_told_what_to_do(folder, capfd):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    Path("model", "chat_template.jinja").unlink()
    tokenizer.save_pretrained("model")
    assert main([*RUN, *DATA]) == 2
    assert "--asr-data: the tokenizer has no chat template; use --no-chat-template" in capfd.readouterr().err


def test_half_of_a_run_is_not_judged(folder, monkeypatch, capfd):
    interrupt(monkeypatch, 2)
    assert main([*RUN, "--asr-data", "asr.jsonl"]) == 130
    assert main(["eval", "--judge-only", "-o", "out"]) == 2
    assert "out holds 4 of 6 completions; finish the run without --judge-only first" in capfd.readouterr().err
    CompletionFile("out", {"variants": {}}, fresh=True)
    assert main(["eval", "--judge-only", "-o", "out"]) == 2
    assert "out holds completions of another command" in capfd.readouterr().err


def test_both_spellings_of_the_output(folder):
    assert {name for option in command.params for name in option.opts} >= {"-o", "--output", "--output-path"}
