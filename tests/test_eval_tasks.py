"""lm-evaluation-harness on tasks of our own, offline."""

import json
import math
import sys

import pytest
import torch
from scipy import stats
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")

from ssah_fast.errors import SsahError
from ssah_fast.evaluation import tasks
from ssah_fast.evaluation.tasks import run

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{choices}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
CHOICE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"'
ANSWER = 'doc_to_target: "{{choices[label]}}"\ngeneration_kwargs:\n  max_gen_toks: 4\n  until: ["</s>"]'
GROUP = "group: tiny_group\ntask: [tiny_choice, tiny_answer]\n"
QUESTIONS = [{"question": f"w{i} w{i + 1}", "choices": [f"w{i}", "w40"], "label": i % 2} for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of task files: one of choices, one of answers, a group of both, and one whose data is missing."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    made = {
        "tiny_choice": {"kind": "multiple_choice", "choices": CHOICE, "metric": "acc", "data": data},
        "tiny_answer": {"kind": "generate_until", "choices": ANSWER, "metric": "exact_match", "data": data},
        "tiny_lost": {"kind": "multiple_choice", "choices": CHOICE, "metric": "acc", "data": folder / "lost.jsonl"},
    }
    for name, fields in made.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, **fields))
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # starts pip and git: a second each time
        yield


@pytest.fixture(autouse=True)
def nothing_read_before():
    tasks._manager.cache_clear()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """The thousands of tasks of lm-eval take 19 s to read."""
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: whole(None, include_path, False)
    )


def expected_hits(model, tokenizer):
    """The choice that the model finds more likely, per question."""
    hits = []
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer(question["question"] + " " + choice)["input_ids"]])
            with torch.inference_mode():
                scores.append(model(input_ids=ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item())
        hits.append(scores.index(max(scores)) == question["label"])
    return hits


def test_a_task_of_choices_counts_what_the_model_finds_more_likely(model, folder, capfd):
    tokenizer = tiny_tokenizer()
    hits = expected_hits(model, tokenizer)
    found = run(model, tokenizer, ["tiny_choice"], include_path=[str(folder)], log_samples=True)
    task = found["tasks"]["tiny_choice"]
    assert 0 < sum(hits) < 8 and task["acc"] == found["mean"] == 100 * sum(hits) / 8
    interval = stats.binomtest(sum(hits), 8).proportion_ci(method="wilson")
    assert task["acc_interval"] == pytest.approx([100 * interval.low, 100 * interval.high])
    assert task["acc_n"] == 8 and task["metrics"]["acc,none"] == sum(hits) / 8 and task["num_fewshot"] == 0
    assert [bool(sample["acc"]) for sample in found["samples"]["tiny_choice"]] == hits
    json.dumps(found["tasks"], allow_nan=False)
    assert capfd.readouterr().out == ""


def test_groups_limits_and_examples(model, folder):
    found = run(model, tiny_tokenizer(), ["tiny_group"], include_path=[str(folder)], limit=0.5, num_fewshot=1)
    choice, answer = found["tasks"]["tiny_choice"], found["tasks"]["tiny_answer"]
    assert choice["acc_n"] == answer["acc_n"] == 4 and choice["num_fewshot"] == answer["num_fewshot"] == 1
    assert "exact_match,none" in answer["metrics"] and "samples" not in found
    again = run(model, tiny_tokenizer(), ["tiny_group"], include_path=[str(folder)], limit=0.5)
    assert again["tasks"]["tiny_choice"]["num_fewshot"] == 0  # what one run sets does not stay for the next
    both = run(model, tiny_tokenizer(), ["tiny_choice", "tiny_answer"], include_path=[str(folder)], limit=4)
    assert both["mean"] == (both["tasks"]["tiny_choice"]["acc"] + both["tasks"]["tiny_answer"]["acc"]) / 2


def test_the_tasks_of_lm_eval_are_read_where_one_is_not_in_the_folders(folder, monkeypatch):
    import lm_eval.tasks

    asked = []

    def manager(include_path, include_defaults):
        asked.append(include_defaults)
        return whole(None, include_path, False)

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    for _ in range(2):
        tasks.check(["tiny_choice"], [str(folder)])
    assert asked == [False]
    with pytest.raises(SsahError, match=r"--tasks arc: no such task in lm-eval and .*lm-eval ls tasks"):
        tasks.check(["tiny_choice", "arc"], [str(folder)])
    assert asked == [False, False, True]


@pytest.mark.usefixtures("own_tasks_alone")
def test_a_task_whose_data_is_missing_is_one_line(model, folder):
    with pytest.raises(SsahError, match="--tasks tiny_lost: cannot be run") as caught:
        run(model, tiny_tokenizer(), ["tiny_lost"], include_path=[str(folder)])
    assert "\n" not in str(caught.value)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SsahError, match=r"--tasks needs lm_eval; install it with: pip install 'ssah_fast\[eval\]'"):
        tasks.check(["arc_easy"])


def results(**entries):
    return {
        "results": entries,
        "n-samples": {name: {"original": 10, "effective": 10} for name in entries},
        "group_subtasks": {},
        "versions": {},
        "n-shot": {},
    }


def test_a_mean_over_groups_has_the_standard_error_of_lm_eval_and_unknown_figures_are_null():
    found = tasks._document(
        results(
            macro={"acc,none": 0.123, "acc_stderr,none": 0.01, "alias": "m"},
            words={"word_perplexity,none": math.inf, "word_perplexity_stderr,none": "N/A"},
        ),
        ["macro", "words"],
    )
    assert found["mean"] is None  # one of the two has no accuracy
    macro = found["tasks"]["macro"]
    assert macro["acc"] == 12.3 and macro["acc_interval"] == pytest.approx([12.3 - 1.96, 12.3 + 1.96])
    assert found["tasks"]["words"]["metrics"] == {"word_perplexity,none": None, "word_perplexity_stderr,none": None}
    assert tasks._document(results(macro={"acc,none": 0.123}), ["a_tag"])["mean"] == 12.3
