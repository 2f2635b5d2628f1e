"""One model, measured: attack success, over-refusal, perplexity and benchmarks, in one document."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah_fast import data, files
from ssah_fast.calibration import Source
from ssah_fast.errors import SsahError
from ssah_fast.evaluation import inputs, perplexity
from ssah_fast.evaluation import tasks as harness
from ssah_fast.evaluation.completions import Completion, CompletionFile, read_completions
from ssah_fast.evaluation.generation import Decoding, check_requests, default_batch_size, generate
from ssah_fast.evaluation.inputs import ATTACK, LOOK_ALIKES, UTILITY
from ssah_fast.evaluation.judges import Judge, judge, make_judge
from ssah_fast.evaluation.rates import attack_rates, over_refusal_rates
from ssah_fast.fingerprints import identity, tokenizer_fingerprint, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "eval.json"
KIND = "evaluation"
SCHEMA = 1
Progress = Callable[[str, int, int], None]


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    asr: Source | None = None,
    look_alikes: Source | None = None,
    utility: Source | None = None,
    systems: Mapping[str, str | None] | None = None,
    suffix: str = "",
    judges: Sequence[str | Judge] = ("keyword",),
    decoding: Decoding | None = None,
    batch_size: int | None = None,
    chat_template: bool = True,
    limit: int | float | None = None,
    seqlen: int = 2048,
    reference: "PreTrainedModel | None" = None,
    tasks: Sequence[str] = (),
    task_options: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    predict_only: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure how a model answers harmful and harmless requests, and what it is good for.

    Args:
        model: A causal language model in evaluation mode, on the device to run on.
        tokenizer: Its tokenizer.
        asr: Harmful requests: a source of `data.load_pairs`, or what it returned. Responses are not looked at.
        look_alikes: Harmless requests that look harmful, for over-refusal.
        utility: Texts, or prompts with answers, for perplexity and token accuracy.
        systems: System prompts by name, each of which is tried; None as text is none. By default none alone.
        suffix: Put behind every prompt of `asr`.
        judges: Names as in `make_judge`, or judges.
        decoding: By default greedy, at most 128 new tokens.
        batch_size: Answers generated together; None: by the model's shapes.
        chat_template: Whether to use the tokenizer's chat template.
        limit: At most so many records of each set and task, or below 1 that share of them.
        seqlen: Longest sequence of `utility` in tokens.
        reference: The model that says how probable answers are, of the same tokenizer; None: `model` itself.
        tasks: Tasks of lm-evaluation-harness.
        task_options: Further arguments of `evaluation.tasks.run`; samples go to samples_TASK.jsonl in `output`.
        output: A folder; gets completions.jsonl as answers come, from which a killed run goes on, and eval.json in the
            end.
        fresh: Start over, whatever the folder holds.
        predict_only: Generate the completions and measure nothing; eval.json is not written.
        progress: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        The document of eval.json; docs/evaluation.md lists its entries. Rates are in percent. What was not asked for,
        with `predict_only` everything, is an empty list or None.

    Raises:
        SsahError: An argument is wrong, or there is nothing to measure.
        ResumeError: The folder is of another run.
        NonFiniteError: The model gives NaN or Inf.
        OutOfMemoryError: A batch does not fit on the device.
    """
    decoding, systems, task_options = decoding or Decoding(), systems or {"none": None}, dict(task_options or {})
    sets = inputs.load_sets({ATTACK: asr, LOOK_ALIKES: look_alikes, UTILITY: utility})
    asked: dict[str, Any] = {"suffix": suffix, "chat_template": chat_template, "limit": limit}
    if not sets and not tasks:
        raise SsahError("nothing to measure; give asr, look_alikes, utility or tasks")
    requests = inputs.all_requests(sets, tokenizer, systems, samples=decoding.samples, **asked)
    if predict_only and not requests:
        raise SsahError("nothing to predict; give asr or look_alikes")
    if requests:
        check_requests(model, requests, decoding)
    read: dict[str, Any] = {"chat_template": chat_template, "seqlen": seqlen, "limit": limit}
    texts = inputs.sequences(sets[UTILITY], model, tokenizer, **read) if UTILITY in sets else []
    if tasks:
        harness.check(tasks, task_options.get("include_path", ()))
    heard = [] if predict_only else _judges(judges)
    size = default_batch_size(model, requests, decoding) if requests and batch_size is None else batch_size
    prediction = {
        **_source(model, tokenizer, reference),
        "systems": dict(systems),
        "decoding": asdict(decoding),
        **asked,
        "batch_size": size,
        "data": inputs.describe({name: pairs for name, pairs in sets.items() if name != UTILITY}),
        "requests": len(requests),
    }
    folder = None if output is None else files.make_folder(output)
    completions = generate(
        model,
        tokenizer,
        requests,
        decoding,
        batch_size=size,
        file=CompletionFile(folder, prediction, fresh=fresh) if folder is not None and requests else None,
        reference=reference or "self",
        progress=lambda done, total: progress("answers", done, total),
    )
    document = _document(prediction, heard, completions)
    if predict_only:
        return document
    document["data"] = inputs.describe(sets)
    document["settings"] |= {"seqlen": seqlen, "tasks": {"names": [*tasks], **task_options} if tasks else None}
    if texts:
        document["utility"] = _utility(model, texts, batch_size, progress)
    if tasks:
        progress("tasks", 0, len(tasks))
        more = {"limit": limit, "batch_size": batch_size, "seed": decoding.seed, **task_options}
        document["tasks"] = harness.run(model, tokenizer, tasks, **more)
        _write_samples(folder, document["tasks"].pop("samples", {}))
    if folder is not None:
        files.write_json(folder / NAME, document)
    return document


def rejudge(directory: str | os.PathLike[str], judges: Sequence[str | Judge] = ("keyword",)) -> dict[str, Any]:
    """Judge the completions of a folder again, without their model, and write its eval.json anew.

    Args:
        directory: What `evaluate` wrote. What its eval.json says of utility and tasks is kept.
        judges: As in `evaluate`.

    Returns:
        The document of eval.json.

    Raises:
        SsahError: There are no completions, or not all of them, or a judge cannot be used.
    """
    prediction, completions = read_completions(directory)
    if "requests" not in prediction:
        raise SsahError(f"{directory} holds completions of another command; give a folder that `ssah-fast eval` wrote")
    if len(completions) < prediction["requests"]:
        raise SsahError(
            f"{directory} holds {len(completions)} of {prediction['requests']} completions; finish the run without "
            "--judge-only first"
        )
    document = _document(prediction, _judges(judges), completions)
    path = Path(directory) / NAME
    if path.is_file():
        before = _read(path)
        if before["model"] == document["model"]:
            document |= {key: before[key] for key in ("data", "utility", "tasks")}
            document["settings"] = {**before["settings"], **document["settings"]}
    files.write_json(path, document)
    return document


def check_reference(reference: str, own: "PreTrainedTokenizerBase", its: "PreTrainedTokenizerBase") -> None:
    """Refuse a reference model of another vocabulary, to which the answers' tokens mean something else.

    Raises:
        SsahError: The tokenizers differ.
    """
    if own.get_vocab() != its.get_vocab():
        raise SsahError(f"--reference {reference}: its vocabulary is not that of MODEL; give a model of one tokenizer")


def _source(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", reference: "PreTrainedModel | None"
) -> dict[str, Any]:
    return {
        "model": identity(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "reference": None if reference is None else identity(reference),
        "vocabulary": data.vocabulary(reference or model),
        "versions": versions(),
    }


def _document(
    prediction: Mapping[str, Any], judges: Sequence[Judge], completions: Sequence[Completion]
) -> dict[str, Any]:
    settings = {key: value for key, value in prediction.items() if key not in ("model", "data", "versions")}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "model": prediction["model"],
        "settings": {**settings, "judges": [by.name for by in judges]},
        "versions": prediction["versions"],
        "data": prediction["data"],
        **_rates(judges, completions, prediction["vocabulary"]),
        "utility": None,
        "tasks": None,
    }


def _rates(judges: Sequence[Judge], completions: Sequence[Completion], vocabulary: int) -> dict[str, Any]:
    """The rows "attack" and "over_refusal", by system prompt and judge; a guard knows nothing of over-refusal."""
    rows: dict[str, list[dict[str, Any]]] = {"attack": [], "over_refusal": []}
    groups = dict.fromkeys((completion.set, completion.system) for completion in completions)
    for name, system in groups:
        answers = [completion for completion in completions if (completion.set, completion.system) == (name, system)]
        for by in judges:
            row = {"set": name, "system": system, "judge": by.name}
            if name == ATTACK:
                rows["attack"].append({**row, **attack_rates(answers, judge(answers, by, vocabulary))})
            elif by.judges_refusals:
                rows["over_refusal"].append({**row, **over_refusal_rates(answers, judge(answers, by, vocabulary))})
    return rows


def _utility(
    model: "PreTrainedModel",
    texts: Sequence[data.Encoded],
    batch_size: int | None,
    progress: Progress,
) -> dict[str, Any]:
    measured = perplexity.measure(
        model,
        texts,
        batch_size=batch_size,
        progress=lambda done, total: progress("utility", done, total),
    )
    figures = {**measured.perplexity.flat("perplexity"), **measured.accuracy.flat("accuracy")}
    return {**figures, "tokens": sum(measured.tokens)}


def _judges(judges: Sequence[str | Judge]) -> list[Judge]:
    if not judges:
        raise SsahError("--judge is empty; use keyword, wei or guard:MODEL")
    return [make_judge(by) if isinstance(by, str) else by for by in judges]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SsahError(f"cannot read {path} ({error}); move it away") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise SsahError(f"{path} is not an evaluation of ssah_fast; move it away, or choose another folder")
    return document


def _write_samples(folder: Path | None, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    if folder is None:
        return
    for name, rows in samples.items():
        with files.atomic_writer(folder / f"samples_{name}.jsonl") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
