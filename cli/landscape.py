"""`ssah-fast landscape`: safety and utility of a model everywhere around its weights, and VISAGE."""

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import (
    SOURCE,
    Command,
    console,
    duration,
    echo_json,
    json_option,
    list_option,
    note,
    option_group,
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

if TYPE_CHECKING:
    from ssah_fast.terrain import Terrain

NONE = "none"
_ASKED = ("preview", "batch_size", "chat_template", "limit", "seqlen", "tasks")
_MOVING = ("only", "orthogonal", "adaptive", "tolerance")
_TERRAIN = ("dimensions", "directions", "direction_seed", "alphas", "betas")
_WHERE = option_group(
    (
        click.option("--to", metavar="MODEL", help="Interpolate from MODEL to this one, and beyond both."),
        click.option("--and", "and_to", metavar="MODEL", help="With --to: the plane of both ways."),
        click.option(
            "--dimensions",
            type=click.IntRange(1, 2),
            help="1: lines; 2: a plane, of two random directions, or of --to and a random one.  [default: 1, with "
            "--and 2]",
        ),
        click.option(
            "--directions",
            type=click.IntRange(min=1),
            help="Random directions to go along.  [default: 3, as published]",
        ),
        click.option(
            "--direction-seed", type=int, default=123, show_default=True, help="Of the first; the next are counted up."
        ),
        click.option(
            "--alphas",
            metavar="FROM:TO:POINTS|A,B,...",
            help="Steps along the first axis: the ratio of noise to weight, or the part of the way to --to.  [default: "
            "-0.5:0.5:21, with --to -0.25:1.25:31]",
        ),
        click.option("--betas", metavar="FROM:TO:POINTS|A,B,...", help="Likewise along the second axis of a plane."),
        list_option(
            "--trajectory", metavar="MODEL,...", help="Checkpoints to measure and place on the line or plane, in order."
        ),
        list_option(
            "--exclude",
            default=["*norm*"],
            show_default=True,
            metavar="PATTERN,...|none",
            help="Tensors that random directions leave out, by their names in lower case.",
        ),
        click.option("--orthogonal", is_flag=True, help="Make the second random axis orthogonal to the first."),
        click.option("--units", type=click.Path(), metavar="FILE", help="Units, for --only."),
        click.option(
            "--only",
            type=click.Choice(["scu", "ucu", "cu", "ru", "random"], case_sensitive=False),
            help="Move the units of one category alone; random: as many random units as there are SCU.",
        ),
    )
)
_HOW = option_group(
    (
        click.option(
            "--preview", is_flag=True, help="Answer at the centre alone; elsewhere measure the margin of its refusals."
        ),
        click.option(
            "--adaptive",
            is_flag=True,
            help="Find the basin's edges by bisection, and leave out what VISAGE can do without.",
        ),
        click.option(
            "--tolerance",
            type=float,
            default=2.0,
            show_default=True,
            metavar="POINTS",
            help="How far off VISAGE may be with --adaptive; half of its interval, where that is less.",
        ),
        click.option("--plan", is_flag=True, help="Print points, memory, disk and time, and exit; reads no weights."),
        click.option("--fresh", is_flag=True, help="Start over, whatever points DIR holds."),
    )
)


@click.command(cls=Command)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(), metavar="DIR", help="Folder for points and landscape.json.")
@click.option("--asr-data", metavar="DATA", help="Harmful requests, for the attack success rate.")
@click.option("--over-refusal-data", metavar="DATA", help="Harmless requests that look harmful.")
@click.option("--utility-data", metavar="DATA", help="Texts, or requests with answers, for perplexity.")
@_WHERE
@_HOW
@prompt_options
@decoding_options
@judge_options
@task_options
@source_options
@json_option
def landscape(
    model: str,
    output: str | None,
    asr_data: str | None,
    over_refusal_data: str | None,
    utility_data: str | None,
    to: str | None,
    and_to: str | None,
    trajectory: Sequence[str],
    exclude: Sequence[str],
    units: str | None,
    plan: bool,
    judge: Sequence[str],
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure MODEL (a folder or a hub id) around its weights, in memory: where it stays safe, and what that costs.

    The published landscape is the default: 21 steps along each of 3 random directions, each tensor with its own norm;
    VISAGE says how deep the basin around MODEL is. With --to, the way to another checkpoint is measured. Weights are
    moved in place and put back bit for bit; nothing but points and figures is written. A killed run goes on where it
    was, and runs in one DIR share the points that they have in common; so do the processes of torchrun. Rates are in
    percent. docs/landscape.md says more.
    """
    if and_to is not None and to is None:
        raise click.UsageError(f"--and {and_to} is for the plane of two ways; give --to as well")
    if len(judge) != 1:
        raise SsahError(f"--judge {','.join(judge)}: a landscape has one judge; run it again with another, into DIR")
    suffix = "" if settings["suffix"] is None else read_text(settings["suffix"], "--suffix").rstrip("\n")
    questions = {
        "asr": load_data(asr_data, "--asr-data", settings),
        "look_alikes": load_data(over_refusal_data, "--over-refusal-data", settings),
        "utility": load_data(utility_data, "--utility-data", settings),
        "systems": system_prompts(settings["system_prompt"]),
        "suffix": suffix,
        "decoding": make_decoding(settings),
        "task_options": {
            "num_fewshot": settings["num_fewshot"],
            "use_cache": settings["use_cache"],
            "include_path": [*settings["include_path"]],
        },
        **{name: settings[name] for name in _ASKED},
    }
    source = {name: settings[name] for name in SOURCE}
    from ssah_fast import landscapes
    from ssah_fast.terrain import make_terrain

    terrain = make_terrain(
        to=[name for name in (to, and_to) if name is not None],
        trajectory=trajectory,
        **{name: settings[name] for name in _TERRAIN},
    )
    checked = {"answered": asr_data is not None, "preview": settings["preview"], "units": units is not None}
    moving = {name: settings[name] for name in _MOVING}
    landscapes.check(terrain, **checked, **moving)
    if plan:
        _show_plan(model, terrain, questions, source, as_json)
        return
    if output is None:
        raise click.UsageError("Missing option '-o'.")
    moving["exclude"] = () if [name.lower() for name in exclude] == [NONE] else tuple(exclude)
    document = _run(model, output, terrain, judge[0], units, settings["fresh"], {**questions, **moving}, source)
    if process_number():
        return
    note(f"wrote {output}/{landscapes.NAME}")
    if all(row.get("degenerate") == 100 for row in document["rows"]):
        note("WARNING: every answer is degenerate; the rates say nothing of safety")
    if as_json:
        echo_json(document)
    else:
        _print(document)


def _run(
    model: str,
    output: str,
    terrain: "Terrain",
    judge: str,
    units: str | None,
    fresh: bool,
    how: Mapping[str, Any],
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Check what needs no model, load it, and measure; processes of torchrun share the points."""
    from ssah_fast import checkpoints, files, landscapes, loading, ranks
    from ssah_fast.evaluation.judges import make_judge
    from ssah_fast.evaluation.tasks import check
    from ssah_fast.partition import Units

    loaded = None if units is None else Units.load(units)
    files.check_folder(output)
    if how["tasks"]:
        check(how["tasks"], how["task_options"]["include_path"])
    with ranks.join("landscape") as processes:
        place = {**source, "device": processes.device(source["device"])}
        chosen = make_judge(judge, device=place["device"])
        network, tokenizer = loading.load_model(model, **place)
        folder = checkpoints.checkpoint_folder("MODEL", model, source["revision"])
        with progress_bar() as progress:
            return landscapes.landscape(
                network,
                tokenizer,
                terrain,
                **how,
                units=loaded,
                judge=chosen,
                checkpoint=os.fspath(folder),
                output=output,
                fresh=fresh,
                ranks=processes,
                told=note,
                progress=progress,
            )


def _show_plan(
    model: str, terrain: "Terrain", questions: Mapping[str, Any], source: Mapping[str, Any], as_json: bool
) -> None:
    """Print what the run needs; of the checkpoint, config and tokenizer are read."""
    from ssah_fast import landscape_plan, loading
    from ssah_fast.survey import make_questions

    common = {name: source[name] for name in ("revision", "trust_remote_code")}
    skeleton = loading.empty_model(model, dtype=source["dtype"], **common)
    asked = make_questions(skeleton, loading.load_tokenizer(model, common), judge=None, **questions)
    points = len(terrain.points()) + len(terrain.ends())
    made = landscape_plan.plan(asked, points, loading.torch_device(source["device"]))
    if process_number():
        return
    if as_json:
        echo_json(made.to_json())
        return
    memory = made.to_json()["memory"]
    lines = (
        f"{made.points:,} points, {made.answers:,} answers of at most {asked.decoding.max_new_tokens} tokens",
        f"memory {memory / 2**30:.2f} GiB: weights {made.weights / 2**30:.2f}, keys and values of a batch of answers "
        f"{made.cache / 2**30:.2f}, moved weights {made.piece / 2**30:.2f}",
        f"disk at most {made.disk / 2**20:,.1f} MiB",
        f"time at most {duration(made.seconds)} of one process, at {made.rate[0] / 1e9:,.0f} GFLOP/s for answers and "
        f"{made.rate[1] / 1e9:,.0f} for prompts, measured now" + (", tasks not counted" if asked.tasks else ""),
    )
    out = console()
    for line in lines:
        out.print(line, markup=False)


_FIGURES = {
    "VISAGE": "visage",
    "released rule": "visage_released",
    "basin area": "basin_area",
    "half-width at 50 %": "half_width",
}
_MEANS = {
    "degenerate": "degenerate %",
    "over_refusal": "over-refusal %",
    "margin": "margin, nats",
    "perplexity": "perplexity",
    "tasks": "tasks %",
}


def _print(document: Mapping[str, Any]) -> None:
    if document["settings"]["shape"] == "lines":
        _print_lines(document["rows"])
    else:
        note("the plane is drawn by `ssah-fast report DIR`")
    if document["figures"]:
        _print_figures(document["figures"])
    if document["trajectory"]:
        _print_trajectory(document["trajectory"])
    for entry in document["skipped"]:
        left = ", ".join(f"{alpha:g}" for alpha in entry["alphas"])
        note(f"{entry['direction']}: left out {len(entry['alphas'])} points, {left}")


def _print_lines(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table per system prompt: by alpha the ASR of every line, and the means over lines of what else was measured."""
    from rich.table import Table

    lines = list(dict.fromkeys(row["direction"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    for system in systems:
        own = [row for row in rows if row["system"] == system]
        by_alpha = {alpha: [row for row in own if row["alpha"] == alpha] for alpha in sorted({r["alpha"] for r in own})}
        others = {name: title for name, title in _MEANS.items() if any(row.get(name) is not None for row in own)}
        table = Table(
            title=f"System prompt: {system}" if len(systems) > 1 else None,
            caption="the columns behind the ASR are means over directions" if len(lines) > 1 and others else None,
        )
        answered = any(row.get("asr_raw") is not None for row in own)
        titles = [f"ASR %\n{line}" for line in lines] if answered else []
        for title in ("alpha", *titles, *others.values()):
            table.add_column(title, justify="right")
        for alpha, found in by_alpha.items():
            by_line = {row["direction"]: row for row in found}
            cells = [_cell(by_line.get(line, {}), "asr_raw") for line in lines] if answered else []
            table.add_row(f"{alpha:g}", *cells, *(_mean(found, name) for name in others))
        console().print(table)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The mean over lines; of perplexities the geometric one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return "-"
    if name == "perplexity":
        return f"{statistics.geometric_mean(values):.4g}"
    return f"{statistics.fmean(values):.1f}"


def _print_figures(figures: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from ssah_fast.report.wording import RATES

    table = Table(caption="in brackets: 95 % intervals over prompts and directions")
    for title in ("system prompt", "rate"):
        table.add_column(title)
    for title in _FIGURES:
        table.add_column(title, justify="right")
    for row in figures:
        cells = [_cell(row, name, 3 if name == "half_width" else 1) for name in _FIGURES.values()]
        table.add_row(row["system"], RATES[row["rate"]], *cells)
    console().print(table)


def _print_trajectory(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="Checkpoints, projected on the axes")
    table.add_column("checkpoint", overflow="fold")
    for title in ("place", "moved", "outside", "ASR", "perplexity"):
        table.add_column(title, justify="right")
    for row in rows:
        at = ", ".join(f"{step:.2f}" for step in row["coordinates"])
        cells = (at, f"{row['moved']:.3g}", f"{100 * row['outside']:.0f} %")
        table.add_row(row["checkpoint"], *cells, _cell(row, "asr_raw"), _cell(row, "perplexity"))
    console().print(table)


def _cell(row: Mapping[str, Any], name: str, digits: int = 1) -> str:
    """A figure with its interval, if figures are what has one here; "-" where it is not known."""
    value = row.get(name)
    if value is None:
        return "-"
    if name not in _FIGURES.values():
        return f"{value:.4g}" if name == "perplexity" else f"{value:.{digits}f}"
    low, high = row[f"{name}_interval"]
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
