"""`ssah-fast ablate`: categories of units silenced in memory, beside controls, and what the model then does."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import click

from ssah_fast.cli.common import (
    SOURCE,
    Command,
    Ratio,
    console,
    echo_json,
    json_option,
    list_option,
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
from ssah_fast.errors import SsahError
from ssah_fast.scan import Scan

NONE = "none"


# name of the field of ablation.Scan -> help
_SCAN = {
    "scu_utility_drop": "SCU cost at most so much utility",
    "scu_asr_gain": "and raise the ASR by at least this.",
    "ucu_asr_gain": "UCU raise the ASR by at most this",
    "ucu_utility_drop": "and cost at least so much utility.",
    "ru_utility_drop": "RU cost at most so much utility",
    "ru_asr_gain": "and raise the ASR by at most this.",
}


def _scan_options(function: Any) -> Any:
    """The fields of `Scan`, with its defaults."""
    for name, text in reversed(_SCAN.items()):
        flag, default = "--" + name.replace("_", "-"), getattr(Scan, name)
        function = click.option(flag, type=float, default=default, show_default=True, metavar="POINTS", help=text)(
            function
        )
    tried = [f"{100 * ratio:g}%" for ratio in Scan.ratios]
    return list_option("--scan-ratios", default=tried, show_default=True, metavar="LIST", help="What --scan tries.")(
        function
    )


@click.command(cls=Command)
@click.argument("model")
@click.option("--units", required=True, type=click.Path(), metavar="FILE", help="Units, from `ssah-fast identify`.")
@click.option("--asr-data", required=True, metavar="DATA", help="Harmful requests that the scores have not seen.")
@click.option("--utility-data", required=True, metavar="DATA", help="Texts, or requests with answers, for perplexity.")
@click.option("--over-refusal-data", metavar="DATA", help="Harmless requests that look harmful.")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help="Folder for answers and results.")
@click.option(
    "--scores",
    type=click.Path(),
    metavar="FILE",
    help="The scores that the units come from; --ratios, --scan, --method mean and all controls but random need them.",
)
@list_option("--categories", metavar="LIST", help="Of scu, ucu, cu and ru; by default scu, ucu and ru.")
@list_option("--ratios", metavar="3%,6%", help="Further sizes of SCU, UCU and RU.")
@list_option(
    "--controls",
    default=["random"],
    show_default=True,
    metavar="random,norm,variance,swapped|none",
    help="Beside every category as many units: at random in every module, by column norms alone, by variance alone, "
    "with safety and utility exchanged.",
)
@click.option(
    "--draws", type=click.IntRange(min=1), default=3, show_default=True, help="Random controls of each; see --seed."
)
@click.option(
    "--method",
    type=click.Choice(["zero", "mean"]),
    default="zero",
    show_default=True,
    help="What silenced channels are: zero, or their mean over the calibration tokens.",
)
@click.option("--scan", is_flag=True, help="Also search for the sizes of the categories, from large to small.")
@_scan_options
@click.option(
    "--allow-calibration-prompts", is_flag=True, help="Measure on prompts that the scores were computed from, too."
)
@click.option("--fresh", is_flag=True, help="Start over, whatever an earlier run has left in DIR.")
@prompt_options
@decoding_options
@judge_options
@task_options
@source_options
@json_option
def ablate(
    model: str,
    units: str,
    asr_data: str,
    utility_data: str,
    over_refusal_data: str | None,
    output: str,
    scores: str | None,
    controls: Sequence[str],
    categories: Sequence[str],
    ratios: Sequence[str],
    scan: bool,
    scan_ratios: Sequence[str],
    judge: Sequence[str],
    system_prompt: Sequence[str],
    suffix: str | None,
    tasks: Sequence[str],
    as_json: bool,
    **settings: Any,
) -> None:
    """Silence the units of MODEL, category by category, in memory, and measure what it refuses and can still do.

    Channels are zeroed where they are read; no weight is changed or written. Every category stands beside controls: as
    many units, chosen otherwise. A killed run goes on where it was. Rates are in percent. docs/ablation.md says more.
    """
    if process_number():
        return  # under torchrun, as a recipe may start every step, the first process does it all
    wanted = [name for name in controls if name.lower() != NONE]
    thresholds = {name: settings.pop(name) for name in _SCAN}
    search = Scan(_ratios(scan_ratios, "--scan-ratios"), **thresholds) if scan else None
    sizes = _ratios(ratios, "--ratios")
    if len(judge) != 1:
        raise SsahError(f"--judge {','.join(judge)}: an ablation has one judge; run it again with another, into DIR")
    systems, text = system_prompts(system_prompt), "" if suffix is None else read_text(suffix, "--suffix").rstrip("\n")
    from ssah_fast import files, loading
    from ssah_fast.ablation import NAME
    from ssah_fast.ablation import ablate as run
    from ssah_fast.evaluation.judges import make_judge
    from ssah_fast.partition import Units
    from ssah_fast.scores import Scores

    how = {
        "asr": load_data(asr_data, "--asr-data", settings),
        "utility": load_data(utility_data, "--utility-data", settings),
        "look_alikes": load_data(over_refusal_data, "--over-refusal-data", settings),
        "decoding": make_decoding(settings),
    }
    loaded, measured = Units.load(units), None if scores is None else Scores.load(scores)
    benchmark = {key: settings[key] for key in ("num_fewshot", "use_cache")}
    files.check_folder(output)
    chosen = make_judge(judge[0], device=settings["device"])
    network, tokenizer = loading.load_model(model, **{key: settings[key] for key in SOURCE})
    same = ("draws", "method", "batch_size", "chat_template", "limit", "seqlen", "fresh")
    with progress_bar() as progress:
        document = run(
            network,
            tokenizer,
            loaded,
            **how,
            scores=measured,
            categories=categories or None,
            ratios=sizes,
            controls=wanted,
            scan=search,
            systems=systems,
            suffix=text,
            judge=chosen,
            tasks=tasks,
            task_options={**benchmark, "include_path": [*settings["include_path"]]},
            output=output,
            allow_calibration_prompts=settings["allow_calibration_prompts"],
            told=note,
            progress=progress,
            **{key: settings[key] for key in same},
        )
    note(f"wrote {output}/{NAME}")
    if as_json:
        echo_json(document)
        return
    _print_rows(document["rows"])
    if document["scan"]:
        _print_scan(document["scan"], scores)


def _ratios(items: Sequence[str], option: str) -> tuple[float, ...]:
    try:
        return tuple(Ratio().convert(item, None, None) for item in items)
    except click.BadParameter as error:
        raise SsahError(f"{option}: {error.message}") from error


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    columns = {
        "ASR %": "asr",
        "degenerate %": "degenerate",
        "over-refusal %": "over_refusal",
        "perplexity": "perplexity",
        "accuracy %": "accuracy",
        "tasks %": "tasks",
    }
    shown = {title: key for title, key in columns.items() if any(row[key] is not None for row in rows)}
    table = Table(caption="in brackets: 95 % intervals")
    table.add_column("silent")
    for title in ("units", *shown):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row["name"], f"{row['units']:,}", *(_figure(row, key) for key in shown.values()))
    console().print(table)


def _figure(row: Mapping[str, Any], key: str) -> str:
    digits = 3 if key == "perplexity" else 1
    if row[key] is None:
        return "-"
    interval = row.get(f"{key}_interval")
    bounds = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{row[key]:.{digits}f}{bounds}"


def _print_scan(scan: Mapping[str, Any], scores: str | None) -> None:
    from rich.table import Table

    table = Table(title="Scan, against the dense model")
    for title in ("silent", "ASR gain", "utility drop", "qualifies"):
        table.add_column(title, justify="left" if title == "silent" else "right")
    for row in scan["tried"]:
        qualifies = "yes" if row["qualifies"] else "no"
        table.add_row(row["name"], f"{row['asr_gain']:+.1f}", f"{row['utility_drop']:+.1f}", qualifies)
    out = console()
    out.print(table)
    missing = [name.upper() for name, ratio in scan["found"].items() if ratio is None]
    if missing:
        out.print(f"No ratio qualifies for {', '.join(missing)}; see --scan-ratios and the thresholds in --help.")
    command = ["ssah-fast", "identify", str(scores), *scan["identify"], "-o", "FILE"]
    out.print(shlex.join(command), markup=False, soft_wrap=True)
