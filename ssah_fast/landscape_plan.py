"""What a landscape needs before anything heavy is done: points, answers, memory and time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssah_fast import machine
from ssah_fast.evaluation.generation import cache_bytes
from ssah_fast.neighbourhood import PIECE
from ssah_fast.survey import Questions

_SECONDS = 0.3  # how long each rate is measured
_PROMPT_ROWS = 512  # tokens of a product that reads prompts
_LINE = 5  # bytes per token of an answer in a line of points-<rank>.jsonl
_POINT = 2048  # bytes of the rest of a line


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


def plan(questions: Questions, points: int, device: torch.device) -> LandscapePlan:
    """Plan a landscape from shapes and lengths alone; two products are measured.

    Args:
        questions: What every point is asked, of a model that may be on the meta device. All answers are taken to be as
            long as they may be.
        points: How many there are.
        device: Where it will run.
    """
    model, requests = questions.model, questions.requests
    config = model.config.get_text_config(decoder=True)
    parameters = sum(p.numel() for p in model.parameters())
    shape = (getattr(config, "intermediate_size", None) or 4 * config.hidden_size, config.hidden_size)
    rows = max(1, min(questions.batch_size or 1, len(requests)))
    decode, read = (
        machine.product_rate(n, *shape, model.dtype, device, _SECONDS) for n in (rows, max(rows, _PROMPT_ROWS))
    )
    answers = (1 if questions.preview else points) * len(requests)
    new = answers * questions.decoding.max_new_tokens
    prompts = points * sum(len(request.ids) for request in requests)
    texts = points * sum(len(text.ids) for text in questions.texts)
    # The answers are read once more by the unmoved model, which says how probable they are.
    flops_read = 2 * parameters * (2 * prompts + new + texts)
    return LandscapePlan(
        points=points,
        answers=answers,
        new_tokens=new,
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        cache=rows * cache_bytes(model, requests, questions.decoding) if requests else 0,
        piece=8 * PIECE,
        disk=_LINE * new + _POINT * points,
        seconds=2 * parameters * new / decode + flops_read / read,
        rate=(decode, read),
    )
