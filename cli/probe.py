"""`ssah-fast probe`: where hidden states point, refusal or compliance, in one model or several side by side."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import click

from ssah_fast.cli.common import (
    COLUMNS,
    Command,
    OrNone,
    Ratio,
    column_options,
    console,
    echo_json,
    json_option,
    note,
    process_number,
    source_options,
)
from ssah_fast.cli.evaluating import Auto, load_data, progress_bar, system_prompts
from ssah_fast.errors import SsahError

NAME = "probe.json"
SETS = {"harmful": "--data", "harmless": "--harmless-data"}


@click.command(cls=Command)
@click.argument("model")
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help=f"Write {NAME} to this folder.")
@click.option("--data", "harmful", required=True, metavar="DATA", help="Harmful requests.")
@click.option("--harmless-data", "harmless", metavar="DATA", help="Harmless requests, as a set of their own.")
@click.option("--unaligned", metavar="MODEL", help="Probe this model, too; MODEL is then called aligned.")
@click.option("--compare", multiple=True, metavar="NAME=MODEL", help="Probe this model, too; may be repeated.")
@click.option("--refusal", default="Sorry, I can't", show_default=True, metavar="TEXT", help="What begins a refusal.")
@click.option("--compliance", default="Here's how", show_default=True, metavar="TEXT", help="What begins an answer.")
@click.option(
    "--baseline", is_flag=True, help="Subtract the mean distance between different queries from both distances."
)
@click.option(
    "--system-prompt", default="none", show_default=True, metavar="none|default|FILE", help="Put before every query."
)
@click.option(
    "--chat-template/--no-chat-template",
    default=True,
    show_default=True,
    help="Put prompts in the tokenizer's chat template.",
)
@click.option(
    "--limit", type=OrNone(Ratio()), metavar="N|0.1", help="Take the first N prompts of every set, or that share."
)
@click.option(
    "--batch-size",
    type=Auto(click.IntRange(min=1)),
    default="auto",
    show_default=True,
    help="Prompts per forward pass, each as two sequences.",
)
@column_options
@source_options
@json_option
def probe(
    model: str,
    output: str,
    harmful: str,
    harmless: str | None,
    unaligned: str | None,
    compare: Sequence[str],
    system_prompt: str,
    limit: float | None,
    revision: str | None,
    dtype: str,
    device: str,
    device_map: str | None,
    trust_remote_code: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compare MODEL's hidden states at the end of a request, and with a refusal or an answer begun behind it.

    Distances are 1 - cosine at the last token, per decoder layer; margin: distance to the answer less that to the
    refusal, so that above 0 is nearer to refusing. Models are loaded one after the other; --revision is MODEL's.
    """
    if process_number():  # a recipe's launcher may start several, and one can do it
        return
    models = _models(model, unaligned, compare)
    ((system_name, system),) = system_prompts((system_prompt,)).items()
    from ssah_fast import files, fingerprints, loading, probing
    from ssah_fast.evaluation.generation import prompts_of

    columns = {name: settings.pop(name) for name in COLUMNS}
    sources = {"harmful": harmful, "harmless": harmless}
    pairs = {name: load_data(source, SETS[name], columns) for name, source in sources.items() if source is not None}
    prompts = {name: prompts_of(drawn, limit=limit) for name, drawn in pairs.items()}
    for source in models.values():
        loading.check_folder(source)
    files.check_folder(output)
    where = {"dtype": dtype, "device": device, "device_map": device_map, "trust_remote_code": trust_remote_code}
    measured = []
    with progress_bar() as progress:
        for number, (name, source) in enumerate(models.items()):
            network, tokenizer = loading.load_model(source, revision=None if number else revision, **where)
            report = functools.partial(progress, f"probing {name}")
            found = probing.probe(
                network, tokenizer, prompts, system=system, progress=report, argument="--data", **settings
            )
            measured.append({"name": name, "model": found["model"], "sets": found["sets"]})
            del network, tokenizer  # before the next one takes as much memory
    document = {
        "kind": probing.KIND,
        "schema": probing.SCHEMA,
        "models": measured,
        "settings": {**settings, **where, "limit": limit, "system_prompt": {"name": system_name, "text": system}},
        "versions": fingerprints.versions(),
        "data": {
            name: {"sources": drawn.sources, "sha256": drawn.sha256, "n": len(prompts[name])}
            for name, drawn in pairs.items()
        },
    }
    written = files.make_folder(output) / NAME
    files.write_json(written, document)
    note(f"wrote {written}")
    if as_json:
        echo_json(document)
    else:
        print_probe(document)


def print_probe(document: Mapping[str, Any]) -> None:
    """Print one table per set: layers down, models side by side."""
    from rich.table import Table

    models = document["models"]
    for i, name in enumerate(one["set"] for one in models[0]["sets"]):
        n = models[0]["sets"][i]["n"]
        table = Table(
            title=f"{n:,} {name} prompts", caption="margin > 0: nearer to the refusal; +- half of its 95 % interval"
        )
        table.add_column("layer", justify="right")
        columns = [one["sets"][i]["layers"] for one in models]
        for model in models:
            for title in ("refusal", "answer", "margin", "% nearer to refusal"):
                table.add_column(f"{model['name']}\n{title}", justify="right")
        for layer, rows in enumerate(itertools.zip_longest(*columns)):
            table.add_row(str(layer), *(cell for row in rows for cell in _cells(row)))
        console().print(table)


def _cells(row: Mapping[str, Any] | None) -> tuple[str, ...]:
    if row is None:  # the model has fewer layers
        return ("-",) * 4
    interval = row["margin_interval"]
    margin = f"{row['margin']:+.3f}" + (f" +-{(interval[1] - interval[0]) / 2:.3f}" if interval else "")
    return f"{row['refusal']:.3f}", f"{row['compliance']:.3f}", margin, f"{row['nearer_refusal']:.1f}"


def _models(model: str, unaligned: str | None, compare: Sequence[str]) -> dict[str, str]:
    """What to probe, by the names in the results; the first is MODEL."""
    models = {"model": model} if unaligned is None else {"aligned": model, "unaligned": unaligned}
    for item in compare:
        name, equals, source = item.partition("=")
        if not (name and equals and source):
            raise SsahError(f"--compare {item} is not NAME=MODEL; write for example --compare tuned=DIR")
        if name in models:
            raise SsahError(f"--compare {item}: another model is called {name!r}; choose another name")
        models[name] = source
    return models
