"""The options of a fine-tuning run: their names, defaults and limits, without torch, so that `--help` stays fast."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ssah_fast.errors import SsahError

METHODS = ("full", "lora", "prefix")
ROUNDING = ("stochastic", "kahan", "master", "nearest")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")


@dataclass(frozen=True)
class Options:
    """How to train. Names and meanings are those of Hugging Face's TrainingArguments where it has them.

    Attributes:
        method: "full", or "lora" and "prefix", which train adapters and take no mask.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled, on what trains only.
        adam_beta1: Of AdamW; likewise the next two.
        adam_beta2: Decay of the second moment.
        adam_epsilon: Added to the denominator.
        max_grad_norm: Gradients are scaled down to this norm, which counts what trains only; 0 leaves them.
        num_train_epochs: Passes over the data.
        max_steps: Optimizer steps instead of epochs; -1: by epochs.
        per_device_train_batch_size: Sequences per process and forward pass.
        gradient_accumulation_steps: Forward passes per optimizer step.
        lr_scheduler_type: One of `SCHEDULES`.
        warmup_ratio: Part of the steps in which the learning rate rises.
        max_seq_length: Longer conversations are cut on the right, in tokens.
        chat_template: Whether to use the tokenizer's chat template.
        seed: Of the order of the data, dropout, stochastic rounding and the draw of `nsamples`.
        nsamples: How many conversations to draw; None takes all.
        bf16: Compute in bfloat16 (autocast). None: where the weights are float32 on a GPU that has bfloat16.
        gradient_checkpointing: Compute layers again in backward instead of keeping their activations.
        compact: Keep gradients of the trainable slices alone, where a layer's trainable part is at most a half.
        rounding: How 16-bit weights are updated: "stochastic", "kahan", "master" or "nearest".
        lora_rank: Rank of LoRA, on all linear layers but the head.
        lora_alpha: Its scale is lora_alpha / lora_rank.
        lora_dropout: Dropout in front of LoRA.
        num_virtual_tokens: Length of the prefix.
        logging_steps: Steps between entries of the loss history.
        save_steps: Steps between checkpoints; 0: none.
        save_total_limit: How many checkpoints are kept.
        keep_checkpoints: Leave them in the output folder at the end.
        max_shard_size: Of the weight files.
        report_to: Trackers of TrainingArguments, such as "tensorboard"; "none".
        use_cpu: Stay on the CPU where there is a GPU.

    Raises:
        SsahError: A value is out of range; the message names it.
    """

    method: str = "full"
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.0
    max_seq_length: int = 1024
    chat_template: bool = True
    seed: int = 0
    nsamples: int | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    compact: bool = True
    rounding: str = "stochastic"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    num_virtual_tokens: int = 20
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 2
    keep_checkpoints: bool = False
    max_shard_size: str = "5GB"
    report_to: str = "none"
    use_cpu: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("lr_scheduler_type", SCHEDULES), ("rounding", ROUNDING)):
            if getattr(self, name) not in choices:
                raise SsahError(f"{name}={getattr(self, name)!r} is unknown; use {', '.join(choices)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # a NaN fails, too
                limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"finite and {low:g} or more"
                raise SsahError(f"{name}={value} is out of range; give a number {limits}")
            if value is not None and not math.isfinite(value):
                raise SsahError(f"{name}={value} is not a finite number")
        if self.max_steps == 0 or self.max_steps < -1:
            raise SsahError(f"max_steps={self.max_steps} is out of range; give 1 or more, or -1 to train by epochs")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise SsahError(f"num_train_epochs={self.num_train_epochs} is out of range; give a number above 0")
        if self.method == "prefix" and self.gradient_checkpointing:
            raise SsahError("gradient_checkpointing cannot be combined with method='prefix'; leave it out")

    def deciding(self) -> dict[str, Any]:
        """What decides the weights: all but where they go, what is logged, and how memory is saved."""
        return {name: value for name, value in asdict(self).items() if name not in _INDIFFERENT}


_INF = math.inf
_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, _INF),
    "weight_decay": (0, _INF),
    "adam_beta1": (0, 0.9999999),
    "adam_beta2": (0, 0.9999999),
    "adam_epsilon": (0, _INF),
    "max_grad_norm": (0, _INF),
    "num_train_epochs": (0, _INF),
    "per_device_train_batch_size": (1, _INF),
    "gradient_accumulation_steps": (1, _INF),
    "warmup_ratio": (0, 0.9999999),
    "max_seq_length": (2, _INF),
    "seed": (0, 2**32 - 1),
    "nsamples": (1, _INF),
    "lora_rank": (1, _INF),
    "lora_alpha": (1, _INF),
    "lora_dropout": (0, 0.9999999),
    "num_virtual_tokens": (1, _INF),
    "logging_steps": (1, _INF),
    "save_steps": (0, _INF),
    "save_total_limit": (1, _INF),
}
_INDIFFERENT = (
    "gradient_checkpointing",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "keep_checkpoints",
    "max_shard_size",
    "report_to",
    "use_cpu",
)
