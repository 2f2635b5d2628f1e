"""The refusal margin: how sure a model is of the first token of a refusal, without generating an answer.

Where a model refuses, one token of its answer decides it: the first of the refusing phrase, for most chat models the
first of the answer. In the neighbourhood of the weights its log-odds fall before the model stops refusing.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ssah_fast import data
from ssah_fast.data import Batch, Encoded
from ssah_fast.errors import NonFiniteError
from ssah_fast.evaluation import perplexity
from ssah_fast.evaluation.judges import REFUSALS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah_fast.evaluation.completions import Completion
    from ssah_fast.evaluation.generation import Request


@dataclass(frozen=True)
class Target:
    """Where a refusal begins.

    Attributes:
        index: Number of the prompt in its set, from 0.
        system: Name of the system prompt.
        prefix: Tokens before it: the prompt's, and those of the answer before the phrase.
        token: The first token of the phrase.
    """

    index: int
    system: str
    prefix: list[int]
    token: int


def targets(
    requests: "Sequence[Request]", completions: "Sequence[Completion]", tokenizer: "PreTrainedTokenizerBase"
) -> list[Target]:
    """Where the answers refuse: at the first phrase of `judges.REFUSALS` in the text.

    Args:
        requests: What was asked.
        completions: The answers, in the same order.
        tokenizer: The model's tokenizer; the texts are encoded again.

    Returns:
        A target for each answer that has such a phrase, in order.
    """
    found = []
    for request, completion in zip(requests, completions, strict=True):
        text = completion.text
        places = [place for place in map(text.find, REFUSALS) if place >= 0]
        if not places:
            continue
        ids, before = (tokenizer.encode(part, add_special_tokens=False) for part in (text, text[: min(places)]))
        # A token that begins before the phrase and ends in it decides as well: the first that `before` has not.
        start = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
        if start < len(ids):
            found.append(Target(request.index, request.system, request.ids + ids[:start], ids[start]))
    return found


def measure(model: "PreTrainedModel", targets: Sequence[Target], *, batch_size: int | None = None) -> list[float]:
    """How sure a model is of each refusal: the log-odds ln(p / (1 - p)) of its first token after its prefix, in nats.

    Above 0 the token is more likely than all others together.

    Args:
        model: A causal language model in evaluation mode, on the device to run on.
        targets: From `targets`.
        batch_size: Sequences per forward pass; None: as many as keep the logits of all their tokens below 1 GiB.

    Returns:
        A number per target, from logits in fp32 (fp64 for such a model).

    Raises:
        NonFiniteError: The model gives NaN or Inf; the message says for which prompt.
    """
    embeddings: Any = model.get_input_embeddings()
    embedding = embeddings.weight  # [V, D]
    fits = max(1, perplexity.LOGITS_BYTES // (embedding.shape[0] * embedding.element_size()))
    prefixes = [Encoded(target.prefix, [False] * len(target.prefix)) for target in targets]
    found = [0.0] * len(targets)
    for batch in data.make_batches([prefixes], batch_size=batch_size, max_tokens=fits, pad_id=0):
        members = [number for _, number in batch.sequences]
        odds = _log_odds(model, batch, embedding.device, [targets[number] for number in members])
        for number, value in zip(members, odds, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the model gives NaN or Inf for prompt {targets[number].index + 1}; try --dtype fp32, or look for "
                    "the weight with `ssah-fast score`"
                )
            found[number] = value
    return found


@torch.inference_mode()
def _log_odds(model: Any, batch: Batch, device: torch.device, targets: Sequence[Target]) -> list[float]:
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    rows = torch.arange(len(targets), device=device)
    ends = torch.tensor([len(target.prefix) - 1 for target in targets], device=device)
    kept, places = ends.unique(return_inverse=True)
    options: dict[str, Any] = {"logits_to_keep": kept}  # the vocabulary's matrix may be a quarter of a small model
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        options, places = {}, ends
    logits = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False, **options).logits
    last = logits[rows.to(logits.device), places.to(logits.device)]  # [B, V]
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    tokens = torch.tensor([[target.token] for target in targets], device=last.device)
    others = last.scatter(1, tokens, -math.inf).logsumexp(1)
    return (last.gather(1, tokens)[:, 0] - others).tolist()
