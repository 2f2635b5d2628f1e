"""`ssah-fast score`: model and calibration data -> scores."""

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import COLUMNS, Command, OrNone, column_options, console, echo_json, json_option, note
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ssah_fast.collector import Progress
    from ssah_fast.scores import Scores

SETS = ("safety", "utility")


class BatchSize(click.ParamType):
    """A number of sequences, or auto."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return the number, or None for auto."""
        if value is None or str(value).strip().lower() == "auto":
            return None
        from ssah_fast.scoring import MAX_SEQUENCES

        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= number <= MAX_SEQUENCES:
            self.fail(f"{value!r} is neither auto nor a number from 1 to {MAX_SEQUENCES}", param, ctx)
        return number


@click.command(cls=Command)
@click.argument("model", nargs=-1, required=True, metavar="MODEL")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="The scores file to write.")
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
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "fp32", "fp64"]),
    default="auto",
    show_default=True,
    help="Precision to run in; auto is the checkpoint's.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."
)
@click.option("--device-map", help="Spread the model over several GPUs (accelerate), for example auto.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint.")
@json_option
def score(
    model: tuple[str, ...],
    output: str,
    safety_data: str | None,
    utility_data: str | None,
    merge: bool,
    revision: str | None,
    dtype: str,
    device: str,
    device_map: str | None,
    trust_remote_code: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure the importance of every unit of MODEL (a folder or a hub id) on two calibration sets.

    DATA is a .jsonl, .json, .csv, .parquet or .txt file, a hub id (name:config:split[:N]), or several of them separated
    by commas. Columns such as prompt/response, goal/target and instruction/input/output are recognised.
    """
    if merge:
        if safety_data is not None or utility_data is not None:
            raise click.UsageError("--merge takes score files alone; leave --safety-data and --utility-data out")
        _merge(model, output, as_json)
        return
    if len(model) != 1:
        raise click.UsageError(f"score takes one MODEL, got {len(model)}; to merge score files add --merge")
    for name, value in (("--safety-data", safety_data), ("--utility-data", utility_data)):
        if value is None:
            raise click.UsageError(f"Missing option '{name}'.")
    from ssah_fast import data, files, loading, scoring

    files.check_writable(output)
    columns = {name: settings[name] for name in COLUMNS}
    draw = {"nsamples": settings["nsamples"], "seed": settings["seed"], **columns}
    # Before the weights, so that a mistake in the data shows at once.
    safety = data.load_pairs(safety_data, argument="--safety-data", **draw)
    utility = data.load_pairs(utility_data, argument="--utility-data", **draw)
    start = time.perf_counter()
    network, tokenizer = loading.load_model(
        model[0],
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    loaded = time.perf_counter()
    with _progress() as progress:
        scores = scoring.score(network, tokenizer, safety=safety, utility=utility, progress=progress, **settings)
    scores.save(output)
    note(f"loaded in {loaded - start:.1f} s, scored in {time.perf_counter() - loaded:.1f} s")
    _report(scores, output, as_json)


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
def _progress() -> "Iterator[Progress]":
    """A bar on stderr with the tokens done; nothing where stderr is not a terminal."""
    from rich import progress

    columns = (
        progress.TextColumn("scoring"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("tokens"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(scores: "Scores", output: str, as_json: bool) -> None:
    note(f"wrote {output}")
    tokens = dict(zip(SETS, next(iter(scores.count.values())).tolist(), strict=True))
    units = sum(module.layout.units for module in scores.modules.values())
    if as_json:
        echo_json({"output": output, "modules": len(scores.modules), "units": units, "tokens": tokens})
        return
    counted = ", ".join(f"{n:,} {name} tokens" for name, n in tokens.items())
    console().print(f"{units:,} units in {len(scores.modules)} modules scored on {counted}", markup=False)
