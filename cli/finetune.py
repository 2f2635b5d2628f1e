"""`ssah-fast finetune`: model, mask and conversations -> a fine-tuned model folder."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import (
    COLUMNS,
    Command,
    OrNone,
    column_options,
    console,
    echo_json,
    json_option,
    note,
    process_number,
)
from ssah_fast.cli.masking import load_mask, mask_options, print_mask
from ssah_fast.training_options import METHODS, ROUNDING, SCHEDULES, Options

if TYPE_CHECKING:
    from ssah_fast.masks import Mask
    from ssah_fast.memory_plan import MemoryPlan
    from ssah_fast.training import Progress, Result

_DEFAULTS = {field.name: field.default for field in fields(Options)}
_TYPES = {"nsamples": OrNone(click.INT), "report_to": click.STRING}
_CHOICES = {"method": METHODS, "lr_scheduler_type": SCHEDULES, "rounding": ROUNDING}
_SWITCHES = ("chat_template", "bf16", "compact")
_HELP = {
    "method": "full trains the weights; lora and prefix train adapters, without a mask.",
    "learning_rate": "Peak learning rate.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, instead of epochs.",
    "per_device_train_batch_size": "Sequences per process and forward pass.",
    "gradient_accumulation_steps": "Forward passes per optimizer step.",
    "max_seq_length": "Cut conversations to this many tokens.",
    "lr_scheduler_type": "Course of the learning rate.",
    "warmup_ratio": "Part of the steps in which the learning rate rises.",
    "weight_decay": "Decoupled weight decay, on what trains only.",
    "adam_beta1": "Decay of the first moment.",
    "adam_beta2": "Decay of the second moment.",
    "adam_epsilon": "Added to AdamW's denominator.",
    "max_grad_norm": "Scale gradients down to this norm, which counts what trains only; 0: never.",
    "seed": "Of the order of the data, of dropout and of stochastic rounding.",
    "nsamples": "Conversations to draw; none takes all.",
    "chat_template": "Put conversations in the tokenizer's chat template.",
    "bf16": "Compute in bfloat16; unless given, where the weights are fp32 and the GPU has it.",
    "gradient_checkpointing": "Compute layers again in backward: less memory, more time.",
    "compact": "Keep gradients of the trainable slices alone.",
    "rounding": "How 16-bit weights are updated.",
    "lora_rank": "Rank of LoRA.",
    "lora_alpha": "Scale of LoRA, times its rank.",
    "lora_dropout": "Dropout in front of LoRA.",
    "num_virtual_tokens": "Length of the prefix.",
    "logging_steps": "Steps between entries of the loss history.",
    "save_steps": "Steps between checkpoints; 0: none.",
    "save_total_limit": "Checkpoints to keep.",
    "keep_checkpoints": "Leave checkpoints in the output folder.",
    "max_shard_size": "Size of the weight files.",
    "report_to": "Trackers, such as tensorboard.",
}


def training_options(function: Any) -> Any:
    """One option per entry of `_HELP`, with the defaults of `Options`."""
    for name, text in reversed(_HELP.items()):
        function = _option(name, text)(function)
    return function


def _option(name: str, text: str) -> Callable[[Any], Any]:
    flag, default = "--" + name.replace("_", "-"), _DEFAULTS[name]
    if name in _SWITCHES:
        return click.option(f"{flag}/--no-{flag[2:]}", default=default, show_default=default is not None, help=text)
    if default is False:
        return click.option(flag, is_flag=True, help=text)
    kind = click.Choice(_CHOICES[name]) if name in _CHOICES else _TYPES.get(name, type(default))
    return click.option(flag, type=kind, default=default, show_default=True, help=text)


@click.command(cls=Command)
@click.argument("model")
@click.option("--data", metavar="DATA", help="Conversations to train on.")
@click.option("-o", "--output", type=click.Path(), metavar="DIR", help="The folder to write.")
@mask_options
@training_options
@column_options
@click.option(
    "--resume-from-checkpoint",
    metavar="latest|DIR",
    help="Go on from a checkpoint; exit code 4 if it is of another run.",
)
@click.option("--plan", is_flag=True, help="Print what the run needs in memory and exit; reads no weights.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="Precision of the weights; auto is the checkpoint's.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto takes a GPU where there is one; with several, torchrun gives one to each process.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint.")
@json_option
def finetune(
    model: str,
    data: str | None,
    output: str | None,
    units: str | None,
    freeze: tuple[str, ...],
    train: tuple[str, ...],
    policy: tuple[str, ...],
    mask: str | None,
    resume_from_checkpoint: str | None,
    plan: bool,
    revision: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train MODEL (a folder or a hub id) on the answers in DATA; what the mask freezes stays bit-identical.

    DATA is a .jsonl, .json, .csv, .parquet or .txt file, a hub id (name:config:split[:N]), or several of them separated
    by commas: messages or conversations (all turns), prompt/response, instruction/input/output, text. Without a mask
    everything trains. Runs unchanged under torchrun and accelerate launch. docs/finetuning.md says more.
    """
    from ssah_fast import loading
    from ssah_fast.data import load_conversations
    from ssah_fast.run_folder import RunFolder

    columns = {name: settings.pop(name) for name in COLUMNS}
    options = Options(**settings, use_cpu=device == "cpu")
    source = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
    skeleton = loading.empty_model(model, **source)
    chosen = load_mask(skeleton, units, freeze, train, policy, mask)
    if plan:
        _print_plan(_plan(skeleton, chosen, options), as_json)
        return
    if data is None or output is None:
        raise click.UsageError(f"Missing option '{'--data' if data is None else '-o'}'.")
    RunFolder(output, "--output")
    conversations = load_conversations(
        data,
        nsamples=options.nsamples,
        seed=options.seed,
        **columns,
        argument="--data",
    )
    from ssah_fast import training

    if device == "cuda":
        loading.torch_device(device)
    if process_number() == 0:
        _print_counts(chosen, skeleton, options)
    # On the CPU: the trainer moves it to the device of its process.
    network, tokenizer = loading.load_model(model, device="cpu", **source)
    with _progress() as progress:
        result = training.finetune(
            network,
            tokenizer,
            conversations,
            output,
            mask=chosen,
            resume_from_checkpoint=resume_from_checkpoint,
            progress=progress,
            **settings,
            use_cpu=options.use_cpu,
        )
    if process_number() == 0:
        _report(result, output, options, as_json)


def _print_counts(mask: "Mask | None", model: Any, options: Options) -> None:
    from ssah_fast.masks import Mask

    if options.method == "full":
        print_mask(mask or Mask({}), model, stderr=True)
    else:
        note(f"{options.method}: all {sum(p.numel() for p in model.parameters()):,} weights are frozen")


def _plan(model: Any, mask: "Mask | None", options: Options) -> "MemoryPlan":
    from ssah_fast import memory_plan

    if options.method != "full":
        raise click.UsageError(f"--plan knows --method full, not {options.method}; leave one of them out")
    return memory_plan.plan(
        model,
        mask,
        compact=options.compact,
        rounding=options.rounding,
        batch_size=options.per_device_train_batch_size,
        seq_length=options.max_seq_length,
        gradient_checkpointing=options.gradient_checkpointing,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def _print_plan(plan: "MemoryPlan", as_json: bool) -> None:
    from rich.table import Table

    if process_number():
        return
    if as_json:
        echo_json(plan.to_json())
        return
    table = Table(title=f"GiB per process ({plan.processes})" if plan.processes > 1 else "GiB")
    for title in ("", "this run", "all weights"):
        table.add_column(title, justify="right" if title else "left")
    dense = plan.dense.to_json()
    for name, size in plan.run.to_json().items():
        if size or dense[name]:
            table.add_row(name, f"{size / 2**30:.3f}", f"{dense[name] / 2**30:.3f}")
    console().print(table)


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on stderr with the steps done and the last loss; nothing where stderr is no terminal, or in other ranks."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("steps"),
        progress.TimeRemainingColumn(),
    )
    shown = sys.stderr.isatty() and process_number() == 0
    with progress.Progress(*columns, console=console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("training", total=None)

        def show(step: int, steps: int, logs: Mapping[str, float]) -> None:
            loss = f" (loss {logs['loss']:.4f})" if "loss" in logs else ""
            bar.update(task, completed=step, total=steps, description=f"training{loss}")

        yield show


def _report(result: "Result", output: str, options: Options, as_json: bool) -> None:
    manifest = result.manifest
    if result.resumed_from is not None:
        note(f"resumed from {result.resumed_from}")
    if options.method == "prefix":
        note("a prefix cannot be merged into the weights: the folder holds an adapter, to be loaded with peft")
    note(f"wrote {output}")
    counts = {name: manifest["counts"][name] for name in ("trainable", "frozen", "adapter")}
    if as_json:
        keys = ("method", "steps", "train_loss", "seconds")
        sha256 = manifest["mask"] and manifest["mask"]["sha256"]
        echo_json({"output": output, **{key: manifest[key] for key in keys}, "mask_sha256": sha256, **counts})
        return
    trained = f"{counts['adapter'] or counts['trainable']:,}"
    loss = "-" if manifest["train_loss"] is None else f"{manifest['train_loss']:.4f}"
    console().print(
        f"{manifest['steps']:,} steps, last loss {loss}, {trained} elements trained, {counts['frozen']:,} frozen",
        markup=False,
    )
