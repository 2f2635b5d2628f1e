"""`ssah-fast transfer`: which units changed their category between two units files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click

from ssah_fast.cli.common import Command, console, echo_json, json_option, note, process_number
from ssah_fast.errors import SsahError


@click.command(cls=Command)
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Write the flow to this JSON file.")
@json_option
def transfer(before: str, after: str, output: str | None, as_json: bool) -> None:
    """Show how the units of BEFORE, a units file, went from category to category until AFTER, another.

    BEFORE is usually of the aligned model and AFTER of the fine-tuned one, scored on the same data. Rows are the
    categories before, columns those after, in percent of all units and of all their parameters.
    """
    if process_number():  # a recipe's launcher may start several, and one can do it
        return
    from ssah_fast import attribute_transfer, files
    from ssah_fast.partition import Units

    if output is not None:
        if os.path.realpath(output) in map(os.path.realpath, (before, after)):
            raise SsahError(f"--output {output} would overwrite one of the units files; choose another name")
        files.check_writable(output)
    document = attribute_transfer.transfer(Units.load(before), Units.load(after))
    for name, path in (("before", before), ("after", after)):
        document[name] = {"file": path, **document[name]}
    for line in document["notes"]:
        note(f"note: more than the weights differs: {line}")
    if output is not None:
        files.write_json(output, document)
        note(f"wrote {output}")
    if as_json:
        echo_json(document)
    else:
        print_transfer(document)


def print_transfer(document: Mapping[str, Any]) -> None:
    """Print the flow by units and by parameters, and what has stayed in every layer, on stdout."""
    for name in ("units", "parameters"):
        console().print(_flow_table(f"% of {name}", document["categories"], document[f"{name}_percent"]))
    console().print(_layer_table(document))


def _flow_table(title: str, names: Sequence[str], percent: Sequence[Sequence[float]]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("before")
    for name in (*(f"to {name.upper()}" for name in names), "all"):
        table.add_column(name, justify="right")
    for name, row in zip(names, percent, strict=True):
        table.add_row(name.upper(), *(f"{value:.2f}" for value in (*row, sum(row))))
    table.add_section()
    sums = [sum(column) for column in zip(*percent, strict=True)]
    table.add_row("after", *(f"{value:.2f}" for value in (*sums, sum(sums))))
    return table


def _layer_table(document: Mapping[str, Any]) -> Any:
    """Per layer the part of its units that kept their category, of all and of each category."""
    from rich.table import Table

    names = document["categories"]
    table = Table(title="% of units that kept their category")
    for title in ("layer", "all", *(f"of {name.upper()}" for name in names)):
        table.add_column(title, justify="right")
    parts = [*((str(row["layer"]), row) for row in document["layers"]), *document["kinds"].items(), ("all", document)]
    for i, (title, part) in enumerate(parts):
        if i in (len(document["layers"]), len(parts) - 1):
            table.add_section()
        kept = [_kept(row, k) for k, row in enumerate(part["units"])]
        table.add_row(title, f"{part['unchanged_units_percent']:.2f}", *kept)
    return table


def _kept(row: Sequence[int], diagonal: int) -> str:
    return f"{100 * row[diagonal] / sum(row):.2f}" if sum(row) else "-"
