"""`ssah-fast verify`: BASE, TUNED and a mask -> freeze certificate."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import Command, console, json_option, note
from ssah_fast.cli.masking import load_mask, mask_options
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from ssah_fast.verification import Certificate, Progress


@click.command(cls=Command)
@click.argument("base")
@click.argument("tuned")
@mask_options
@click.option(
    "--memory", default="1GiB", show_default=True, metavar="SIZE", help="Bound for the memory of the comparison."
)
@click.option("-o", "--output", type=click.Path(), metavar="FILE", help="Write the certificate to this JSON file.")
@json_option
def verify(base: str, tuned: str, memory: str, output: str | None, as_json: bool, **mask_settings: Any) -> None:
    """Prove from the files that what the mask freezes in BASE has the same bits in TUNED.

    BASE and TUNED are folders in Hugging Face format or hub ids, with safetensors weights, sharded in any way. The
    certificate says what was compared, what moved, and the SHA-256 of every file. Exit code 3: something frozen
    changed.
    """
    from ssah_fast import checkpoints, files, loading, sizes, verification

    if output is not None:
        files.check_writable(output)
    sizes.parse_size(memory, "--memory")
    folder = checkpoints.checkpoint_folder("BASE", base)
    mask = load_mask(loading.empty_model(str(folder), any_architecture=True), **mask_settings)
    if mask is None:
        raise SsahError("verify needs a mask: give --mask FILE, or --units FILE with --freeze or --train")
    with _progress() as progress:
        certificate = verification.verify(base, tuned, mask, memory=memory, progress=progress)
    if output is not None:
        certificate.save(output)
        note(f"wrote {output}")
    if as_json:
        click.echo(certificate.to_json(), nl=False)
    else:
        print_certificate(certificate)
    certificate.check()


def print_certificate(certificate: "Certificate") -> None:
    """Print the verdict and one row per category on stdout."""
    from rich.table import Table

    document, table = certificate.document, Table()
    table.add_column("category")
    for title in ("elements", "frozen", "frozen changed", "trainable", "moved", "largest change"):
        table.add_column(title, justify="right")
    for name, group in [*document["categories"].items(), ("all", document["totals"])]:
        counts = ("elements", "frozen", "frozen_changed", "trainable", "trainable_changed")
        table.add_row(
            name if name in ("other", "all") else name.upper(),
            *(f"{group[count]:,}" for count in counts),
            f"{group['largest_change']:.3g}",
        )
    out, totals = console(), document["totals"]
    out.print(table)
    for line in document["notes"]:
        out.print(f"Note: {line}.", markup=False)
    for entry in document["not_compared"]:
        out.print(f"Not compared: {entry['parameter']}: {entry['detail']}.", markup=False)
    for entry in document["violations"]:
        out.print(f"Violation: {entry['parameter']}: {entry['detail']}.", markup=False)
    if certificate.ok:
        out.print(f"OK: all {totals['frozen']:,} frozen elements are bitwise equal.", markup=False)
    else:
        out.print(f"FAILED: {document['violation_count']:,} violations.", markup=False)


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on stderr with the bytes of BASE done; nothing where stderr is not a terminal."""
    from rich import progress

    columns = (
        progress.TextColumn("comparing"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("comparing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
