"""Zeroes the units that `ssah-fast demo` found, category by category, and measures what the embedded model then does.

    ssah-fast demo -o demo && python bench/embedded_ablation.py demo

Channels are zeroed by hooks at the readers' inputs, in memory. Attack success rate: share of the held-out harmful
requests that are not refused (greedy, case-sensitive keywords). Perplexity: of the held-out utility answers.
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssah_fast import Category, Units, embedded

DRAWS = 3


@contextlib.contextmanager
def zeroed(model, units, chosen):
    """Zero the reader channels of the chosen units (a bool mask per module)."""
    handles = []
    for name, mask in chosen.items():
        layout = units.layouts[name]
        channels = layout.inputs()[mask].flatten()
        reader = model.get_submodule(layout.reader)
        handles.append(
            reader.register_forward_pre_hook(lambda _, args, channels=channels: (args[0].index_fill(-1, channels, 0),))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_random(chosen, seed):
    """Draw as many units of every module."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, mask in chosen.items():
        drawn[name] = torch.zeros_like(mask)
        drawn[name][torch.randperm(len(mask), generator=generator)[: int(mask.sum())]] = True
    return drawn


@torch.no_grad()
def main():
    """Print one row per category and control."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="the folder that ssah-fast demo wrote")
    demo = parser.parse_args().demo
    units, tokenizer = Units.load(demo / "units.safetensors"), AutoTokenizer.from_pretrained(demo / "model")
    harmful, utility = (
        [json.loads(line) for line in (demo / "data" / f"{name}.jsonl").open()] for name in ("asr", "utility_eval")
    )
    table = Table("model", "units zeroed", "attack success rate", "perplexity")

    def row(title, model, chosen):
        with zeroed(model, units, chosen):
            rate = embedded.attack_success_rate(model, tokenizer, harmful)
            spread = embedded.perplexity(model, tokenizer, utility)
        table.add_row(title, f"{sum(int(m.sum()) for m in chosen.values())}", f"{rate:.1%}", f"{spread:.3f}")

    row("base (before alignment)", AutoModelForCausalLM.from_pretrained(demo / "base").eval(), {})
    model = AutoModelForCausalLM.from_pretrained(demo / "model").eval()
    row("aligned", model, {})
    for category in (Category.SCU, Category.UCU, Category.RU):
        chosen = {name: mask == category for name, mask in units.category.items()}
        row(category.name, model, chosen)
        for seed in range(DRAWS):
            row(f"random, as many per module as {category.name}, draw {seed}", model, at_random(chosen, seed))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
