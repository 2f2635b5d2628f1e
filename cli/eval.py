"""`ssah-fast eval`: what a model answers to harmful and harmless requests, and what it is good for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import (
    SOURCE,
    Command,
    console,
    echo_json,
    json_option,
    note,
    process_number,
    source_options,
)
from ssah_fast.cli.evaluating import (
    decoding_options,
    judge_options,
    load_data,
    make_decoding,
    progress_bar,
    prompt_options,
    read_text,
    system_prompts,
    task_options,
)

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANSWERED = ("asr", "asr_raw", "refusal", "degenerate")
_REFUSED = ("over_refusal", "over_refusal_raw", "degenerate")
_TITLES = {
    "asr_raw": "asr, judge alone",
    "over_refusal": "over-refusal",
    "over_refusal_raw": "over-refusal, judge alone",
}


@click.command(cls=Command, name="eval")
@click.argument("model", required=False)
@click.option("--asr-data", metavar="DATA", help="Harmful requests, for the attack success rate.")
@click.option("--over-refusal-data", metavar="DATA", help="Harmless requests that look harmful.")
@click.option("--utility-data", metavar="DATA", help="Texts, or requests with answers, for perplexity.")
@click.option(
    "-o", "--output", "--output-path", type=click.Path(), metavar="DIR", help="Folder of completions and eval.json."
)
@task_options
@judge_options
@prompt_options
@decoding_options
@click.option("--predict-only", is_flag=True, help="Generate the completions; judge and measure nothing.")
@click.option("--judge-only", is_flag=True, help="Judge the completions in -o again, without MODEL.")
@click.option("--log-samples", is_flag=True, help="Keep questions and answers of --tasks; completions are always kept.")
@click.option("--reference", help="Model that says how probable answers are, instead of MODEL.", metavar="MODEL")
@click.option("--fresh", is_flag=True, help="Start over, whatever -o holds.")
@source_options
@json_option
def evaluate(
    model: str | None,
    asr_data: str | None,
    over_refusal_data: str | None,
    utility_data: str | None,
    output: str | None,
    judge: tuple[str, ...],
    predict_only: bool,
    judge_only: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure MODEL (a folder or a hub id): attack success, over-refusal, perplexity, benchmarks.

    DATA is a .jsonl, .json, .csv, .parquet or .txt file (one prompt per line), a hub id (name:config:split[:N]), or
    several of them separated by commas; all their records are taken. Rates are in percent, with 95 % intervals.
    Completions are kept in -o as they come: after a kill the same command goes on where it was.
    """
    if process_number():
        return  # under torchrun, as a recipe may start every step, the first process does it all
    if output is None:
        raise click.UsageError("Missing option '-o'.")
    if judge_only and predict_only:
        raise click.UsageError("--predict-only and --judge-only exclude each other; leave one of them out")
    if judge_only:
        from ssah_fast.evaluation import evaluate as evaluation

        document = evaluation.rejudge(output, judge)
    else:
        if model is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        data = {"asr": asr_data, "over_refusal": over_refusal_data, "utility": utility_data}
        document = _run(model, data, output, judge, predict_only, settings)
    note(f"wrote {output}/{'completions.jsonl' if predict_only else 'eval.json'}")
    if as_json:
        echo_json(document)
    elif not predict_only:
        _print(document)
    _warn(document)


def _run(
    model: str,
    sources: dict[str, str | None],
    output: str,
    judges: tuple[str, ...],
    predict_only: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Check everything that needs no model, load it, and measure."""
    if not any(sources.values()) and not settings["tasks"]:
        raise click.UsageError("nothing to measure; give --asr-data, --over-refusal-data, --utility-data or --tasks")
    flags = {name: f"--{name.replace('_', '-')}-data" for name in sources}
    sets = {name: load_data(source, flags[name], settings) for name, source in sources.items()}
    systems = system_prompts(settings["system_prompt"])
    suffix = "" if settings["suffix"] is None else read_text(settings["suffix"], "--suffix").rstrip("\n")
    decoding = make_decoding(settings)
    from ssah_fast import files, loading
    from ssah_fast.evaluation import evaluate as evaluation
    from ssah_fast.evaluation.judges import make_judge
    from ssah_fast.evaluation.tasks import check

    files.check_folder(output)
    # An unknown task, or a guard that cannot be loaded, is known before the model is read.
    if settings["tasks"]:
        check(settings["tasks"], settings["include_path"])
    source = {name: settings[name] for name in SOURCE}
    heard = [] if predict_only else [make_judge(name, device=source["device"]) for name in judges]
    network, tokenizer = loading.load_model(model, **source)
    reference = None
    if settings["reference"] is not None:
        reference = _reference(settings["reference"], tokenizer, source)
    options = ("num_fewshot", "use_cache", "log_samples")
    with progress_bar() as progress:
        return evaluation.evaluate(
            network,
            tokenizer,
            asr=sets["asr"],
            look_alikes=sets["over_refusal"],
            utility=sets["utility"],
            systems=systems,
            suffix=suffix,
            judges=heard,
            decoding=decoding,
            batch_size=settings["batch_size"],
            chat_template=settings["chat_template"],
            limit=settings["limit"],
            seqlen=settings["seqlen"],
            reference=reference,
            tasks=settings["tasks"],
            task_options={**{name: settings[name] for name in options}, "include_path": [*settings["include_path"]]},
            output=output,
            fresh=settings["fresh"],
            predict_only=predict_only,
            progress=progress,
        )


def _reference(name: str, tokenizer: "PreTrainedTokenizerBase", source: dict[str, Any]) -> "PreTrainedModel":
    from ssah_fast import loading
    from ssah_fast.evaluation import evaluate as evaluation

    model, its = loading.load_model(name, **{**source, "revision": None})
    evaluation.check_reference(name, tokenizer, its)
    return model


def _warn(document: dict[str, Any]) -> None:
    """Say loudly what no rate says: that a model writes nothing but broken text."""
    rows = [*document["attack"], *document["over_refusal"]]
    if rows and all(row["degenerate"] == 100 for row in rows):
        reasons = {reason for row in rows for reason in row["reasons"]}
        note(f"WARNING: every completion is degenerate ({', '.join(sorted(reasons))}); the rates say nothing of safety")


def _print(document: dict[str, Any]) -> None:
    out = console()
    for key, title, figures in (
        ("attack", "Harmful requests, %", _ANSWERED),
        ("over_refusal", "Harmless requests, %", _REFUSED),
    ):
        if document[key]:
            out.print(_table(title, document[key], figures))
    utility, tasks = document["utility"], document["tasks"]
    if utility is not None:
        right = f"{_figure(utility, 'accuracy', 2)} % of {utility['tokens']:,} tokens right"
        line = f"perplexity {_figure(utility, 'perplexity', 3)}, {right}, {utility['perplexity_n']:,} sequences"
        out.print(line, markup=False)
    if tasks is not None:
        for name, task in tasks["tasks"].items():
            figure = f"{_figure(task, 'acc')} %, {task['acc_n']:,} questions" if "acc" in task else str(task["metrics"])
            out.print(f"{name}: {figure}", markup=False)
        if tasks["mean"] is not None and len(tasks["tasks"]) > 1:
            out.print(f"mean of the tasks: {tasks['mean']:.1f} %", markup=False)


def _table(title: str, rows: Sequence[dict[str, Any]], figures: Sequence[str]) -> "Table":
    from rich.table import Table

    table = Table(title=title)
    for name in ("system prompt", "judge", "n", *figures):
        right = name == "n" or name in figures
        table.add_column(_TITLES.get(name, name), justify="right" if right else "left")
    for row in rows:
        n = f"{row[f'{figures[0]}_n']:,}"
        table.add_row(row["system"], row["judge"], n, *(_figure(row, name) for name in figures))
    return table


def _figure(row: dict[str, Any], name: str, digits: int = 1) -> str:
    """A figure with its interval, as far as they are known."""
    value, bounds = row[name], row[f"{name}_interval"]
    text = "-" if value is None else f"{value:.{digits}f}"
    return text if bounds is None else f"{text} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
