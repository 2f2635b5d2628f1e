"""`ssah-fast report`: a folder of results -> one HTML page."""

import click

from ssah_fast.cli.common import Command, list_option, note


@click.command(cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="The page; by default report.html in DIR.")
@click.option(
    "--figures",
    type=click.Path(),
    metavar="FOLDER",
    help="Write every figure as a file of its own to this folder, too.",
)
@list_option(
    "--format",
    "formats",
    default=("png", "svg"),
    show_default=True,
    metavar="LIST",
    help="Format of those files: png, svg or both.",
)
def report(directory: str, output: str | None, figures: str | None, formats: tuple[str, ...]) -> None:
    """Put what the other commands left in DIR on one page: words, tables with intervals, and figures.

    DIR is searched with its subfolders for scores, units, evaluations, ablations, probes, transfers, certificates,
    fine-tuned models and the record of `ssah-fast run`; files are recognised by their content, and what is missing is
    left out. The page is one HTML file that opens without a network, on a phone and in print.
    """
    from ssah_fast.report import write_report

    path = write_report(directory, output, figures, formats)
    note(f"wrote {path}" if figures is None else f"wrote {path}, and the figures to {figures}")
    click.echo(str(path))
