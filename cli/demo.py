"""`ssah-fast demo`: train the embedded model once, then run the public commands on it, in order."""

import shlex
from pathlib import Path

import click

from ssah_fast.cli.common import Command, console, note

# The published SCU ratio, 1.3 %, is that of a model with 480,000 units; docs/embedded-model.md has what 6 % does here.
RATIOS = {"--scu": "6%", "--ucu": "13.3%", "--ru": "14.8%"}
PHASES = {"base": "learning to comply with everything", "model": "learning to refuse what is harmful"}


@click.command(cls=Command)
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="DIR", help="The folder for everything the demo makes."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which embedded model to train.")
def demo(output: str, seed: int) -> None:
    """Show the whole way on a small chat model that is trained here, first to comply and then to refuse.

    The training takes a few minutes on two cores, needs no network, and happens once per folder and seed. What follows
    is nothing but the public commands; each is printed before it runs and can be repeated by hand.
    """
    from ssah_fast.cli.main import cli

    train(output, seed)
    for arguments in commands(Path(output)):
        click.echo(f"\n$ {shlex.join(['ssah-fast', *arguments])}")
        cli.main(args=arguments, prog_name="ssah-fast", standalone_mode=False)


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


def commands(home: Path) -> list[list[str]]:
    """The command lines that the demo runs after the training, without the program's name."""
    data, scores, units = home / "data", str(home / "scores.safetensors"), str(home / "units.safetensors")
    calibration = {"--safety-data": str(data / "safety.jsonl"), "--utility-data": str(data / "utility.jsonl")}
    return [
        ["score", str(home / "model"), *_flags(calibration), "--nsamples", "512", "-o", scores],
        ["identify", scores, *_flags(RATIOS), "-o", units],
        ["inspect", units],
    ]


def _flags(options: dict[str, str]) -> list[str]:
    return [word for option in options.items() for word in option]
