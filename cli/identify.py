"""`ssah-fast identify`: scores -> units."""

import os
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import Command, Ratio, console, echo_json, json_option, note
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from ssah_fast.partition import Units


@click.command(cls=Command)
@click.argument("scores", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="The units file to write.")
@click.option(
    "--scu", type=Ratio(), default=0.013, show_default=True, help="Part of all units to call safety-critical."
)
@click.option("--ucu", type=Ratio(), default=0.133, show_default=True, help="Part to call UCU.")
@click.option("--ru", type=Ratio(), default=0.148, show_default=True, help="Part to call RU.")
@click.option(
    "--normalize",
    type=click.Choice(["share", "raw", "zscore"]),
    default="share",
    show_default=True,
    help="How importances are made comparable, per module and set.",
)
@click.option(
    "--contrast",
    type=click.Choice(["difference", "ratio"]),
    default="difference",
    show_default=True,
    help="Rank by S - U or by (S - U) / (S + U).",
)
@click.option(
    "--basis",
    type=click.Choice(["units", "parameters"]),
    default="units",
    show_default=True,
    help="What the ratios are parts of.",
)
@click.option(
    "--floor",
    type=Ratio(),
    default=0.05,
    show_default=True,
    help="Part of every module that stays outside each of SCU, UCU and RU.",
)
@click.option(
    "--shuffle",
    type=click.IntRange(min=0),
    metavar="SEED",
    help="A control: draw the units of every category at random, as many in every module.",
)
@json_option
def identify(scores: str, output: str, shuffle: int | None, as_json: bool, **settings: Any) -> None:
    """Turn SCORES (a file written by `ssah-fast score`) into categories.

    SCU: safety-critical units, UCU: utility-critical, CU: complex (both), RU: redundant. Ratios may be written 0.013 or
    1.3%. The table shows, per category, its units and parameters, how well two halves of the calibration data agree on
    it (Jaccard, and what chance would give), and how many of its units a category before it took away.
    """
    from ssah_fast import files, partition
    from ssah_fast.scores import Scores

    loaded = Scores.load(scores)
    if os.path.realpath(output) == os.path.realpath(scores):
        raise SsahError(f"--output {output} would overwrite the scores; choose another name")
    files.check_writable(output)
    units = partition.identify(loaded, **settings)
    if shuffle is not None:
        units = units.shuffled(shuffle)
    units.save(output)
    note(f"wrote {output}")
    if as_json:
        echo_json({"output": output, **summary(units)})
    else:
        print_categories(units)


def summary(units: "Units") -> dict[str, Any]:
    """What a units file says as a whole, JSON-able."""
    unobserved, experts = units.unobserved_experts()
    return {
        "settings": units.settings,
        "units": sum(layout.units for layout in units.layouts.values()),
        "parameters": sum(layout.units * layout.cost for layout in units.layouts.values()),
        "experts": experts,
        "unobserved_experts": unobserved,
        "categories": units.summary(),
        "agreement": units.stability.get("agreement"),
        "reason": units.stability.get("reason"),
    }


def print_categories(units: "Units") -> None:
    """Print one row per category on stdout, and the agreement of the halves below it."""
    from rich.table import Table

    table = Table()
    table.add_column("category")
    for title in ("units", "% of units", "parameters", "% of parameters", "Jaccard", "by chance", "overlap"):
        table.add_column(title, justify="right")
    for name, row in units.summary().items():
        if name == "unobserved" and not row["units"]:
            continue
        table.add_row(
            name.upper(),
            f"{row['units']:,}",
            f"{row['units_fraction']:.2%}",
            f"{row['parameters']:,}",
            f"{row['parameters_fraction']:.2%}",
            *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("jaccard", "chance")),
            "-" if row["overlap"] is None else f"{row['overlap']:,}",
        )
    out, agreement = console(), units.stability.get("agreement")
    out.print(table)
    unobserved, experts = units.unobserved_experts()
    if unobserved:
        out.print(
            f"No token of one of the sets reached {unobserved:,} of {experts:,} experts; score more tokens for them."
        )
    if agreement is None:
        out.print(f"Split-half stability is not known: {units.stability.get('reason')}", markup=False)
    else:
        out.print(f"{agreement:.1%} of all units get the same category from either half of the calibration data.")
