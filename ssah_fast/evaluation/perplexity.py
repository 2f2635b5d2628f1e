"""How well a model predicts given texts: perplexity and the share of tokens that it would have chosen itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ssah_fast import data
from ssah_fast.data import Batch, Encoded
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.evaluation import intervals
from ssah_fast.evaluation.intervals import Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BYTES = 2**30  # of one forward pass, where no batch size is given
_CHUNK = 2**26  # logits that are looked at together in fp32: 256 MiB


class Loss(NamedTuple):
    """How a model predicts the counted tokens of one sequence.

    Attributes:
        nll: Sum of their negative log-likelihoods, in nats.
        correct: How many of them are the most likely ones.
        tokens: How many there are; the first token of a sequence is never predicted.
    """

    nll: float
    correct: int
    tokens: int


@dataclass(frozen=True)
class Utility:
    """What `measure` found; the lists have one entry per sequence that has a predicted token.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token, with its 95 % interval over sequences.
        accuracy: Percent of the tokens that the model ranks first, likewise.
        nll: Sum of the negative log-likelihoods of each sequence, in nats.
        correct: Tokens ranked first.
        tokens: Tokens.
    """

    perplexity: Interval
    accuracy: Interval
    nll: list[float]
    correct: list[int]
    tokens: list[int]


def measure(
    model: "PreTrainedModel",
    sequences: Sequence[Encoded],
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Utility:
    """Measure how well a model predicts the counted tokens, given all tokens before them.

    Args:
        model: A causal language model, on the device to run on.
        sequences: From `data.encode`.
        batch_size: Sequences per forward pass; None: as many as keep the logits below 1 GiB.
        progress: Called with (sequences done, sequences in all).

    Raises:
        SsahError: No token is predicted.
        NonFiniteError: The model gives NaN or Inf; the message says for which sequence.
    """
    found = [loss for loss in losses(model, sequences, batch_size=batch_size, progress=progress) if loss.tokens]
    if not found:
        raise SsahError("there is no token to predict: every sequence is a single token; give longer texts")
    nll, correct, tokens = (list(column) for column in zip(*found, strict=True))
    return Utility(intervals.perplexity(nll, tokens), intervals.ratio(correct, tokens), nll, correct, tokens)


def losses(
    model: "PreTrainedModel",
    sequences: Sequence[Encoded],
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Loss]:
    """The loss of each sequence; arguments and errors are those of `measure`."""
    embeddings: Any = model.get_input_embeddings()
    embedding = embeddings.weight  # [V, D]
    fits = max(1, LOGITS_BYTES // (embedding.shape[0] * embedding.element_size()))
    found: dict[int, Loss] = {}
    # Any token pads, as padding is masked and no token sees what follows it; token 0 is in every vocabulary.
    for batch in data.make_batches([sequences], batch_size=batch_size, max_tokens=fits, pad_id=0):
        numbers = [number for _, number in batch.sequences]
        for number, loss in zip(numbers, _batch_losses(model, batch, embedding.device), strict=True):
            if not loss.nll < float("inf"):
                raise NonFiniteError(
                    f"the model gives NaN or Inf for sequence {number + 1} of {len(sequences)}; try --dtype fp32, or "
                    "look for the weight with `ssah-fast score`"
                )
            found[number] = loss
        if progress is not None:
            progress(len(found), len(sequences))
    return [found[number] for number in range(len(sequences))]


@torch.inference_mode()
def _batch_losses(model: "PreTrainedModel", batch: Batch, device: torch.device) -> list[Loss]:
    ids = batch.input_ids.to(device)
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, T, V]
    counted = (batch.group[:, 1:] >= 0).to(logits.device)
    nll, correct = _token_losses(logits[:, :-1], counted, ids[:, 1:].to(logits.device)[counted])
    columns = []
    for values in (nll, correct, torch.ones_like(correct)):
        placed = torch.zeros(counted.shape, dtype=torch.float64, device=logits.device)
        placed[counted] = values.double()  # then a sum in fixed order: index_add_ on a GPU has none
        columns.append(placed.sum(1).tolist())
    return [Loss(nll, int(right), int(tokens)) for nll, right, tokens in zip(*columns, strict=True)]


def _token_losses(
    logits: torch.Tensor, counted: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood, and whether the target is ranked first, of each counted position: [N] each.

    In fp32 or better, a few rows at a time: all logits of a batch in fp32 would take more than the model gave them.
    """
    step = max(1, _CHUNK // logits.shape[-1])
    positions = counted.nonzero()
    nll, correct = [], []
    for (b, t), target in zip((p.T for p in positions.split(step)), targets.split(step), strict=True):
        chunk = logits[b, t]
        chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
        nll.append(chunk.logsumexp(-1) - chunk.gather(-1, target[:, None])[:, 0])
        correct.append(chunk.argmax(-1) == target)
    return torch.cat(nll), torch.cat(correct)
