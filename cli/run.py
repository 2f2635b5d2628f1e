"""`ssah-fast run`: a recipe -> a run folder, step by step, each a public command line."""

import gc
from typing import TYPE_CHECKING

import click

from ssah_fast.cli.common import Command, list_option, note
from ssah_fast.errors import SsahError

if TYPE_CHECKING:
    from ssah_fast.recipe import Step


@click.command(cls=Command)
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), metavar="DIR", help="The folder of the run.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Give a variable of the recipe a value.")
@list_option("--only", metavar="STEP", help="Run these steps alone.")
@click.option("--from", "start", metavar="STEP", help="Run this step and those after it.")
@click.option("--force", is_flag=True, help="Run steps again that are done and unchanged.")
@click.option("--plan", is_flag=True, help="Check the recipe, print its command lines and what would be skipped, exit.")
def run(
    recipe: str,
    output: str,
    settings: tuple[str, ...],
    only: tuple[str, ...],
    start: str | None,
    force: bool,
    plan: bool,
) -> None:
    """Run the steps of RECIPE (a .yaml file) in order: each is a public command, printed before it runs.

    All of the recipe is checked first. Steps are skipped while their command line, what they read and what they wrote
    are unchanged, so the same command goes on after a kill. A step that fails ends the run with its exit code.
    docs/recipes.md says how recipes are written; docs/recipes/ has those of the paper.
    """
    from ssah_fast.cli.main import cli
    from ssah_fast.recipe import load_recipe

    loaded = load_recipe(recipe, output, cli, dict(_pair(setting) for setting in settings))
    from ssah_fast.pipeline import Pipeline, choose  # with torch: mistakes in the recipe are known before

    chosen = choose(loaded, only, start)
    pipeline = Pipeline(loaded, output, cli)
    if plan:
        for step, skipped in pipeline.plan(chosen, force=force):
            click.echo(f"{'# unchanged: ' if skipped else ''}{pipeline.line(step)}")
        return
    pipeline.run(chosen, force=force, report=begin)
    note(f"all steps are done; {output} holds their results")


def begin(step: "Step", line: str, skipped: bool) -> None:
    """Print a step before it runs: its command line on stdout, or on stderr that it is skipped."""
    if skipped:
        note(f"{step.name}: unchanged, skipped")
        return
    gc.collect()  # a model of the step before, in a reference cycle, would hold its memory while the next is loaded
    click.echo(f"\n$ {line}")


def _pair(setting: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if not equals:
        raise SsahError(f"--set {setting} is not NAME=VALUE")
    return name.strip(), value
