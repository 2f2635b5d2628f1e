"""`ssah-fast demo`: train the embedded model once, then run the public commands on it, in order."""

import json
import shlex
from pathlib import Path

import click

from ssah_fast.cli.common import Command, console, note

# The published SCU ratio, 1.3 %, is that of a model with 480,000 units; docs/embedded-model.md has what 6 % does here.
RATIOS = {"--scu": "6%", "--ucu": "13.3%", "--ru": "14.8%"}
PHASES = {"base": "learning to comply with everything", "model": "learning to refuse what is harmful"}
TRAINING = {"--learning-rate": "1e-3", "--num-train-epochs": "2", "--per-device-train-batch-size": "32"}
# What is frozen while the model learns new facts: folder -> options of finetune and verify. The last also keeps the
# (tied) embeddings: trained, they can undo the refusals although every unit that carries them is frozen.
RUNS: dict[str, dict[str, str]] = {
    "nothing": {},
    "scu_top_cu": {"--freeze": "scu,cu:6%"},
    "scu_cu": {"--freeze": "scu,cu"},
    "scu_cu_words": {"--freeze": "scu,cu", "--policy": "embeddings=freeze,lm_head=freeze"},
}


@click.command(cls=Command)
@click.option(
    "-o", "--output", required=True, type=click.Path(), metavar="DIR", help="The folder for everything the demo makes."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which embedded model to train.")
def demo(output: str, seed: int) -> None:
    """Show the whole way on a small chat model that is trained here, first to comply and then to refuse.

    The training takes a few minutes on two cores, needs no network, and happens once per folder and seed. What follows
    is nothing but the public commands; each is printed before it runs and can be repeated by hand. The last table
    shows how much of the refusals each fine-tuned model has kept.
    """
    from ssah_fast.cli.main import cli

    train(output, seed)
    home = Path(output)
    (home / "tuned").mkdir(exist_ok=True)
    for arguments in commands(home):
        click.echo(f"\n$ {shlex.join(['ssah-fast', *arguments])}")
        cli.main(args=arguments, prog_name="ssah-fast", standalone_mode=False)
    compare(home)


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
    model = str(home / "model")
    lines = [
        ["score", model, *_flags(calibration), "--nsamples", "512", "-o", scores],
        ["identify", scores, *_flags(RATIOS), "-o", units],
        ["inspect", units],
    ]
    for name, freeze in RUNS.items():
        tuned, mask = str(home / "tuned" / name), _flags({"--units": units, **freeze} if freeze else {})
        lines.append(["finetune", model, "--data", str(data / "finetune.jsonl"), *mask, *_flags(TRAINING), "-o", tuned])
        if freeze:
            lines.append(["verify", model, tuned, *mask, "-o", str(home / "tuned" / f"{name}.certificate.json")])
    return lines


def compare(home: Path) -> None:
    """Print what fine-tuning did to the refusals and to the answers: one row per model."""
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ssah_fast import embedded

    harmful, facts = (
        [json.loads(line) for line in (home / "data" / f"{name}.jsonl").open()] for name in ("asr", "finetune_eval")
    )
    table = Table(title="After learning new, harmless facts", caption="held-out requests; refusals by keywords")
    for title in ("frozen", "harmful requests answered", "perplexity of the new facts", "frozen weights that changed"):
        table.add_column(title, justify="left" if title == "frozen" else "right")
    for name in ("", *RUNS):
        folder = home / "tuned" / name if name else home / "model"
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        table.add_row(
            " ".join(RUNS[name].values()) or "nothing" if name else "(before fine-tuning)",
            f"{embedded.attack_success_rate(model, tokenizer, harmful):.1%}",
            f"{embedded.perplexity(model, tokenizer, facts):.3f}",
            _changed(home / "tuned" / f"{name}.certificate.json") if name else "",
        )
    console().print(table)


def _changed(certificate: Path) -> str:
    if not certificate.is_file():
        return ""
    totals = json.loads(certificate.read_text(encoding="utf-8"))["totals"]
    return f"{totals['frozen_changed']:,} of {totals['frozen']:,}"


def _flags(options: dict[str, str]) -> list[str]:
    return [word for option in options.items() for word in option]
