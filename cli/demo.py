"""`ssah-fast demo`: train the embedded model once, then run its recipe, and end with a table and a report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import Command, console, note

if TYPE_CHECKING:
    from ssah_fast.recipe import Recipe

PHASES = {"base": "learning to comply with everything", "model": "learning to refuse what is harmful"}
COLUMNS = (
    "harmful requests answered",
    "harmless requests refused",
    "perplexity of the new facts",
    "weights that moved",
    "frozen weights that changed",
)


@click.command(cls=Command)
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="DIR", help="The folder for everything the demo makes."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which embedded model to train.")
def demo(output: str, seed: int) -> None:
    """Show the whole way on a small chat model that is trained here, first to comply and then to refuse.

    The training takes a few minutes on two cores, needs no network, and happens once per folder and seed. What follows
    is a recipe of the public commands, as `ssah-fast run` runs it; each is printed before it runs and can be repeated
    by hand. The last table shows what each way of fine-tuning did to the refusals, and the report shows the rest.
    """
    from ssah_fast.cli.main import cli
    from ssah_fast.cli.run import begin
    from ssah_fast.pipeline import Pipeline, choose
    from ssah_fast.recipe import load_recipe

    train(output, seed)
    recipe = load_recipe(recipe_path(), output, cli)
    Pipeline(recipe, output, cli).run(choose(recipe), report=begin)
    compare(recipe, Path(output))


def recipe_path() -> Path:
    """Where the recipe of the embedded model lies in the package."""
    import ssah_fast

    return Path(ssah_fast.__file__).parent / "recipes" / "embedded.yaml"


def train(output: str, seed: int) -> None:
    """Make sure that the embedded model lies in the folder, with a progress bar on stderr while it is trained."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers.utils import logging

    from ssah_fast import embedded

    logging.disable_progress_bar()  # one bar per saved file, between the lines of ours
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as bars:
        tasks = {}

        def show(phase: str, step: int, steps: int, loss: float) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(PHASES[phase], total=steps)
            bars.update(tasks[phase], completed=step, description=f"{PHASES[phase]} (loss {loss:.3f})")

        embedded.ensure(output, embedded.Recipe(seed=seed), show)
    note(f"{'trained' if tasks else 'found'} the embedded model in {output}")


def compare(recipe: "Recipe", home: Path) -> None:
    """Print one row per model that the recipe evaluates, with its certificate's counts, and where the report is."""
    from rich.table import Table

    from ssah_fast.recipe import FOLDER, place

    makers = {f"{FOLDER}/{step.output}": step for step in recipe.steps if step.command == "finetune"}
    proofs = {step.words[2]: home / str(step.output) for step in recipe.steps if step.command == "verify"}
    table = Table(
        title="After learning new, harmless facts", caption="held-out requests; in parentheses 95 % intervals"
    )
    table.add_column("model")
    for title in COLUMNS:
        table.add_column(title, justify="right")
    for step in recipe.steps:
        if step.command == "eval":
            model = step.words[1]
            document = json.loads((home / str(step.output) / "eval.json").read_text(encoding="utf-8"))
            title = makers[model].title if model in makers else step.title
            table.add_row(title or str(place(model, home)), *_figures(document), *_counts(proofs.get(model)))
    console().print(table)
    for step in recipe.steps:
        if step.command == "report":
            click.echo(f"The report is {home / (step.output or 'report.html')}; it opens in any browser.")


def _figures(document: Mapping[str, Any]) -> tuple[str, str, str]:
    """Of an evaluation: attack success and over-refusal without a system prompt, and perplexity."""
    attack, refused = (next(iter(document[key]), {}) for key in ("attack", "over_refusal"))
    utility = document["utility"] or {}
    return (
        _figure(attack, "asr", ".1f", " %"),
        _figure(refused, "over_refusal", ".1f", " %"),
        _figure(utility, "perplexity", ".3f", ""),
    )


def _figure(row: Mapping[str, Any], name: str, form: str, unit: str) -> str:
    if row.get(name) is None:
        return "-"
    interval = row.get(f"{name}_interval")
    text = f"{row[name]:{form}}{unit}"
    return text if interval is None else f"{text} ({interval[0]:{form}} to {interval[1]:{form}})"


def _counts(certificate: Path | None) -> tuple[str, str]:
    if certificate is None:
        return "", ""
    totals = json.loads(certificate.read_text(encoding="utf-8"))["totals"]
    return f"{totals['trainable_changed']:,}", f"{totals['frozen_changed']:,} of {totals['frozen']:,}"
