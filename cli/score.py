"""`ssah-fast score`: model and calibration data -> scores."""

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import (
    COLUMNS,
    Command,
    OrNone,
    column_options,
    console,
    duration,
    echo_json,
    json_option,
    note,
    process_number,
    source_options,
)
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ssah_fast.calibration import Settings
    from ssah_fast.collector import Report
    from ssah_fast.progress import State
    from ssah_fast.score_plan import Choice, Fit, ScorePlan
    from ssah_fast.scores import Scores

SETS = ("safety", "utility")


class BatchSize(click.ParamType):
    """A number of sequences, or auto."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number, or None for auto."""
        if value is None or str(value).strip().lower() == "auto":
            return None
        from ssah_fast.calibration import MAX_SEQUENCES

        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= number <= MAX_SEQUENCES:
            self.fail(f"{value!r} is neither auto nor a number from 1 to {MAX_SEQUENCES}", param, ctx)
        return number


class Size(click.ParamType):
    """A size of memory, such as 8GiB; gives bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        from ssah_fast.sizes import parse_size

        return parse_size(value, "--" + str(param.name).replace("_", "-") if param else "size")


@click.command(cls=Command)
@click.argument("model", nargs=-1, required=True, metavar="MODEL")
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="The scores file to write.")
@click.option("--safety-data", metavar="DATA", help="Requests to refuse, with the refusals.")
@click.option("--utility-data", metavar="DATA", help="Ordinary requests, with helpful answers.")
@click.option(
    "--merge", is_flag=True, help="Merge score files of one model exactly, instead of scoring: --merge A B C -o FILE."
)
@click.option(
    "--tokens",
    type=click.Choice(["response", "prompt", "all"]),
    default="response",
    show_default=True,
    help="Which tokens count.",
)
@click.option(
    "--estimator",
    type=click.Choice(["variance", "norm", "flap"]),
    default="variance",
    show_default=True,
    help="Spread of a channel: exact variance, mean square (Wanda), or FLAP's recurrence as released.",
)
@click.option(
    "--attention-unit",
    type=click.Choice(["channel", "head"]),
    default="channel",
    show_default=True,
    help="Unit of attention: a value channel or a whole KV group.",
)
@click.option(
    "--nsamples",
    type=OrNone(click.IntRange(min=1)),
    default=128,
    show_default=True,
    help="Pairs drawn from each set; none takes all.",
)
@click.option(
    "--seqlen", type=click.IntRange(min=2), default=512, show_default=True, help="Longest sequence in tokens."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--batch-size", type=BatchSize(), default="auto", show_default=True, help="Sequences per forward pass.")
@click.option(
    "--chat-template/--no-chat-template",
    default=True,
    show_default=True,
    help="Wrap prompts in the tokenizer's chat template.",
)
@column_options
@source_options
@click.option(
    "--stream",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Run the checkpoint one layer at a time; auto does so where it does not fit.",
)
@click.option(
    "--max-memory",
    type=OrNone(Size()),
    metavar="SIZE",
    help="Stay below this much of the device's memory, for example 8GiB; by default what the machine has.",
)
@click.option("--plan", is_flag=True, help="Print memory, disk reads and time, and exit; reads no weights.")
@click.option("--fit", type=OrNone(Size()), metavar="SIZE", help="Print the flags with which it fits, and exit.")
@click.option("--fresh", is_flag=True, help="Start over, whatever an earlier run has saved in FILE.progress.")
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How often the progress is saved, from which the same command goes on.",
)
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights (.bin) where there are no others.")
@json_option
def score(
    model: tuple[str, ...],
    output: str | None,
    safety_data: str | None,
    utility_data: str | None,
    merge: bool,
    revision: str | None,
    dtype: str,
    device: str,
    device_map: str | None,
    trust_remote_code: bool,
    stream: str,
    max_memory: int | None,
    plan: bool,
    fit: int | None,
    fresh: bool,
    save_every: float,
    allow_pickle: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure the importance of every unit of MODEL (a folder or a hub id) on two calibration sets.

    DATA is a .jsonl, .json, .csv, .parquet or .txt file, a hub id (name:config:split[:N]), or several of them separated
    by commas. Columns such as prompt/response, goal/target and instruction/input/output are recognised.

    A MODEL that does not fit in memory is streamed, layer by layer. Under torchrun the processes share the data.
    After a kill or Ctrl-C the same command goes on where it was.
    """
    if merge:
        if safety_data is not None or utility_data is not None:
            raise click.UsageError("--merge takes score files alone; leave --safety-data and --utility-data out")
        _merge(model, _given(output, "-o"), as_json)
        return
    if len(model) != 1:
        raise click.UsageError(f"score takes one MODEL, got {len(model)}; to merge score files add --merge")
    source = {"revision": revision, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    from ssah_fast.calibration import Settings

    chosen = Settings(**settings)
    if plan or fit is not None:
        _plan(model[0], chosen, fit, as_json, stream=stream, max_memory=max_memory, **source)
        return
    safety_data, utility_data = _given(safety_data, "--safety-data"), _given(utility_data, "--utility-data")
    output = _given(output, "-o")
    from ssah_fast import data, files, scoring

    files.check_writable(output)
    columns = {name: settings[name] for name in COLUMNS}
    draw = {"nsamples": settings["nsamples"], "seed": settings["seed"], **columns}
    start = time.perf_counter()
    with _progress() as progress:
        scores = scoring.score_checkpoint(
            model[0],
            safety=data.load_pairs(safety_data, argument="--safety-data", **draw),
            utility=data.load_pairs(utility_data, argument="--utility-data", **draw),
            output=output,
            fresh=fresh,
            save_every=save_every,
            stream=stream,
            max_memory=max_memory,
            device_map=device_map,
            allow_pickle=allow_pickle,
            progress=progress,
            told=_tell,
            **source,
            **settings,
        )
    if scores is not None:
        note(f"scored in {time.perf_counter() - start:.1f} s")
        _report(scores, output, as_json)


def _tell(choice: "Choice", state: "State | None" = None) -> None:
    """Say how the run is done where that is not the plain way, and where it continues."""
    if process_number() != 0:
        return
    if choice.stream:
        place = {"device": "memory", "host": "the host's memory", "file": "a file"}[choice.hidden]
        note(f"one layer at a time, up to {choice.batch_tokens:,} tokens per batch, hidden states in {place}")
    if state is not None:
        layer = f"layer {state.layer}, " if choice.stream else ""
        note(f"continues the saved run at {layer}batch {state.batch}")


def _plan(
    model: str,
    settings: "Settings",
    limit: int | None,
    as_json: bool,
    *,
    device: str,
    stream: str,
    max_memory: int | None,
    **source: Any,
) -> None:
    """Print what a run needs, or with a limit the flags with which it fits; of the data, the most that it can be."""
    from ssah_fast import loading, score_plan

    if settings.nsamples is None:
        raise click.UsageError("--plan and --fit do not read the data; give a number for --nsamples")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = {
        "device": loading.torch_device(device),
        "stream": stream,
        "batch_size": settings.batch_size,
        "estimator": settings.estimator,
        "ranks": processes,
    }
    skeleton = loading.empty_model(model, **source)
    lengths = [settings.seqlen] * (len(SETS) * settings.nsamples)
    made: ScorePlan | Fit
    if limit is None:
        made = score_plan.plan(skeleton, lengths, max_memory=max_memory, **shared)
    else:
        made = score_plan.fit(skeleton, lengths, limit, **shared)
    if process_number() != 0:
        return
    if as_json:
        echo_json(made.to_json())
    elif isinstance(made, score_plan.Fit):
        console().print(" ".join(made.flags), markup=False)
        _tell(made.choice)
    else:
        _print_plan(made)


def _print_plan(plan: "ScorePlan") -> None:
    from rich.table import Table

    per_process = f" of each of {plan.processes} processes" if plan.processes > 1 else ""
    table = Table(title=f"At most {plan.tokens:,} tokens{per_process}")
    for title in ("", "peak GiB", "GB read", "TFLOP", "time"):
        table.add_column(title, justify="right" if title else "left")
    for phase in plan.phases:
        table.add_row(
            phase.name,
            f"{phase.memory.total / 2**30:.2f}",
            f"{phase.read / 1e9:.2f}",
            f"{phase.flops / 1e12:.1f}",
            duration(phase.seconds),
        )
    whole = plan.to_json()
    row = (f"{plan.choice.memory.total / 2**30:.2f}", f"{whole['read'] / 1e9:.2f}", f"{whole['flops'] / 1e12:.1f}")
    table.add_section()
    table.add_row("in all", *row, duration(whole["seconds"]))
    out = console()
    out.print(table)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in plan.choice.memory.to_json().items() if size)
    rates = plan.rates
    out.print(f"Peak in GiB: {parts}", markup=False)
    out.print(
        f"Measured: {rates.read / 1e6:,.0f} MB/s from {rates.source}, products {rates.product / 1e9:,.0f} GFLOP/s, "
        f"attention {rates.attention / 1e9:,.0f} GFLOP/s",
        markup=False,
    )
    _tell(plan.choice)


def _given(value: str | None, option: str) -> str:
    if value is None:
        raise click.UsageError(f"Missing option '{option}'.")
    return value


def _merge(parts: tuple[str, ...], output: str, as_json: bool) -> None:
    from ssah_fast import files
    from ssah_fast.scores import Scores

    if len(parts) < 2:
        raise SsahError(f"--merge takes at least two score files, got {len(parts)}")
    if os.path.realpath(output) in map(os.path.realpath, parts):
        raise SsahError(f"--output {output} would overwrite one of the files to merge; choose another name")
    files.check_writable(output)
    scores = Scores.merge([Scores.load(part) for part in parts])
    scores.save(output)
    _report(scores, output, as_json)


@contextlib.contextmanager
def _progress() -> "Iterator[Report]":
    """A bar on stderr with the tokens done; nothing where stderr is not a terminal."""
    from rich import progress

    columns = (
        progress.TextColumn("scoring"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("tokens"),
        progress.TimeRemainingColumn(),
    )
    shown = sys.stderr.isatty() and process_number() == 0
    with progress.Progress(*columns, console=console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(scores: "Scores", output: str, as_json: bool) -> None:
    note(f"wrote {output}")
    tokens = dict(zip(SETS, next(iter(scores.count.values())).tolist(), strict=True))
    modules = scores.modules.values()
    units = sum(module.layout.units for module in modules)
    unreached = sum(not bool((module.total_count() > 0).all()) for module in modules)
    if as_json:
        document = {"output": output, "modules": len(modules), "units": units, "tokens": tokens}
        echo_json({**document, "unobserved_modules": unreached})
        return
    counted = ", ".join(f"{n:,} {name} tokens" for name, n in tokens.items())
    console().print(f"{units:,} units in {len(modules)} modules scored on {counted}", markup=False)
    if unreached:
        experts = sum(module.layout.expert is not None for module in modules)
        note(f"{unreached} of {experts} experts got no token of one of the sets: their units are UNOBSERVED")
