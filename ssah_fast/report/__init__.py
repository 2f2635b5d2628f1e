"""A folder of results -> one page: words, tables and figures in a single HTML file that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ssah_fast import files
from ssah_fast.errors import SsahError
from ssah_fast.report.collect import collect
from ssah_fast.report.figures import FORMATS, Figure, save_figures
from ssah_fast.report.page import plotly_script, render
from ssah_fast.report.sections import sections

__all__ = ["write_report"]


def write_report(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    figures: str | os.PathLike[str] | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> Path:
    """Collect what commands of this package left in a folder, and write it as one self-contained HTML file.

    Recognised by content, wherever they lie: scores, units and mask files, eval.json, ablation.json, probe.json,
    transfer and landscape documents, freeze certificates, the manifests of fine-tuned models, and run.json with the
    published figures of a recipe. What is missing is left out.

    Args:
        directory: The folder; its subfolders are searched, links are not followed.
        output: The page; None means report.html in the folder.
        figures: A folder for every figure as a file of its own, made if missing; None writes none.
        formats: Of those files: "png", "svg" or both.

    Returns:
        The path of the page.

    Raises:
        SsahError: The folder is missing or holds nothing to report, the page or a figure cannot be written, plotly is
            not installed, or figures were asked for and kaleido or a Chrome is missing.
    """
    target = Path(output) if output is not None else Path(directory) / "report.html"
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise SsahError(f"formats={','.join(formats)!r}: use {' and '.join(FORMATS)}")
    evidence = collect(directory)
    script = plotly_script()
    files.check_writable(target)
    found = sections(evidence)
    if figures is not None:
        drawn: list[Figure] = [figure for section in found for figure in section.figures]
        save_figures(drawn, Path(figures), formats)
    html = render(evidence, found, script)
    with files.atomic_writer(target) as file:
        file.write(html.encode())
    return target
