"""What a landscape needs before anything heavy is done: points, answers, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ssah_fast import machine
from ssah_fast.evaluation.generation import Decoding, Request, cache_bytes
from ssah_fast.neighbourhood import PIECE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SECONDS = 0.3  # how long each rate is measured
_PROMPT_ROWS = 512  # tokens of a product that reads prompts
_LINE = 5  # bytes per token of an answer in a line of points-<rank>.jsonl, its quotes and counts included


@dataclass(frozen=True)
class LandscapePlan:
    """What a landscape needs.

    Attributes:
        points: To be measured, at most; the adaptive search needs fewer.
        answers: Answers in all.
        new_tokens: At most so many are generated.
        weights: Bytes of the model.
        cache: Bytes of keys and values of a batch of answers.
        piece: Bytes of weights that are moved at a time, in float64 at most.
        disk: Bytes of points-*.jsonl, at most.
        seconds: At most, by `rate`, without `tasks`; all processes together need as much, each its share.
        rate: Measured floating-point operations per second: (one batch's products, a prompt's products).
    """

    points: int
    answers: int
    new_tokens: int
    weights: int
    cache: int
    piece: int
    disk: int
    seconds: float
    rate: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """The attributes, and "memory", the sum of what is in memory at once."""
        return {**asdict(self), "memory": self.weights + self.cache + self.piece}


def plan(
    model: PreTrainedModel,
    requests: Sequence[Request],
    texts: Sequence[int],
    points: int,
    decoding: Decoding,
    batch_size: int,
    device: torch.device,
    *,
    preview: bool = False,
) -> LandscapePlan:
    """Plan a landscape from shapes and lengths alone; two products are measured.

    Args:
        model: On the meta device.
        requests: What every point answers.
        texts: Lengths in tokens of what perplexity is measured on.
        points: How many.
        decoding: How answers are made; all are taken to be as long as they may be.
        batch_size: Answers generated together.
        device: Where it will run.
        preview: Only the centre is answered.
    """
    config = model.config.get_text_config(decoder=True)
    parameters = sum(p.numel() for p in model.parameters())
    shape = (getattr(config, "intermediate_size", None) or 4 * config.hidden_size, config.hidden_size)
    rows = max(1, min(batch_size, len(requests)))
    decode, read = (
        machine.product_rate(n, *shape, model.dtype, device, _SECONDS) for n in (rows, max(rows, _PROMPT_ROWS))
    )
    answered = (1 if preview else points) * len(requests)
    new = answered * decoding.max_new_tokens
    prompts = points * sum(len(request.ids) for request in requests)
    # The answers are read once more by the unmoved model, which says how probable they are.
    flops_read = 2 * parameters * (2 * prompts + new + points * sum(texts))
    return LandscapePlan(
        points,
        answered,
        new,
        sum(p.numel() * p.element_size() for p in model.parameters()),
        rows * cache_bytes(model, requests, decoding) if requests else 0,
        8 * PIECE,
        _LINE * new + 2048 * points,
        2 * parameters * new / decode + flops_read / read,
        (decode, read),
    )
