"""What a run measures on what: the settings, and both calibration sets as token sequences and as batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ssah_fast import data
from ssah_fast.data import Batch, Encoded, PairSet
from ssah_fast.errors import SsahError, spelled
from ssah_fast.scores import ESTIMATORS, SETS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | Path | Sequence[Mapping[str, Any]] | PairSet

MAX_SEQUENCES = 127
COLUMNS = ("prompt_column", "response_column", "text_column", "messages_column")


@dataclass(frozen=True)
class Settings:
    """What decides the numbers; the arguments of `ssah_fast.score` say what each means.

    Raises:
        SsahError: A value is unknown or out of range.
    """

    tokens: str = "response"
    estimator: str = "variance"
    attention_unit: str = "channel"
    nsamples: int | None = 128
    seqlen: int = 512
    seed: int = 0
    batch_size: int | None = None
    chat_template: bool = True
    prompt_column: str | None = None
    response_column: str | None = None
    text_column: str | None = None
    messages_column: str | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise SsahError(f"estimator={self.estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
        if self.batch_size is not None and not 1 <= self.batch_size <= MAX_SEQUENCES:
            raise SsahError(
                f"batch_size={self.batch_size} is out of range; choose 1 to {MAX_SEQUENCES}, or None to have it chosen"
            )

    def load(self, safety: Source, utility: Source) -> list[PairSet]:
        """Read and draw the pairs of both sets; a PairSet was read already.

        Raises:
            SsahError: A source cannot be used.
        """
        columns = {name: getattr(self, name) for name in COLUMNS}
        return [
            source
            if isinstance(source, PairSet)
            else data.load_pairs(source, nsamples=self.nsamples, seed=self.seed, argument=name, **columns)
            for name, source in zip(SETS, (safety, utility), strict=True)
        ]


@dataclass(frozen=True)
class Calibration:
    """Both sets, ready for one model.

    Attributes:
        sets: The pairs of the safety and of the utility set.
        encoded: The token sequences of each.
        pad_id: Token id of the padding.
    """

    sets: Sequence[PairSet]
    encoded: Sequence[Sequence[Encoded]]
    pad_id: int

    @classmethod
    def encode(
        cls,
        sets: Sequence[PairSet],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
    ) -> Calibration:
        """Turn pairs into token sequences that the model can take.

        Args:
            sets: From `Settings.load`.
            model: Only its shapes are read, so it may be on the meta device.
            tokenizer: Its tokenizer.
            settings: Which tokens count, and how long a sequence may be.

        Raises:
            SsahError: The tokenizer is another model's, a sequence is too long, or nothing is left to count.
        """
        how: dict[str, Any] = {
            "tokens": settings.tokens,
            "seqlen": settings.seqlen,
            "chat_template": settings.chat_template,
        }
        encoded = [data.encode(pairs.pairs, tokenizer, argument=pairs.argument, **how) for pairs in sets]
        for pairs, sequences in zip(sets, encoded, strict=True):
            check_sequences(model, sequences, pairs.argument)
        return cls(sets, encoded, data.pad_id(tokenizer, data.vocabulary(model)))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.ids) for sequences in self.encoded for sequence in sequences)

    @property
    def sha256(self) -> str:
        """Hash of all token ids and of which of them count."""
        digest = hashlib.sha256()
        for sequences in self.encoded:
            digest.update(f"{len(sequences)} ".encode())
            for sequence in sequences:
                digest.update(json.dumps([sequence.ids, list(map(int, sequence.counted))]).encode())
        return digest.hexdigest()

    def batches(self, settings: Settings, max_tokens: int) -> list[Batch]:
        """All sequences as batches, the same ones for the same arguments.

        Args:
            settings: Its batch_size, if there is one, counts instead of `max_tokens`; FLAP takes sequences one by one.
            max_tokens: Tokens per batch, padding included.
        """
        in_order = settings.estimator == "flap"
        size = 1 if in_order else settings.batch_size
        batches = data.make_batches(self.encoded, batch_size=size, max_tokens=max_tokens, pad_id=self.pad_id)
        return sorted(batches, key=lambda batch: batch.sequences) if in_order else batches

    def describe(self) -> dict[str, Any]:
        """The provenance of the data, by set."""
        return {
            name: {
                "sources": pairs.sources,
                "available": pairs.available,
                "used": len(sequences),
                "without_counted_token": len(pairs.pairs) - len(sequences),
                "tokens": sum(sum(s.counted) for s in sequences),
                "sha256": pairs.sha256,
                "prompts": sorted({data.prompt_digest(pair.prompt) for pair in pairs.pairs if pair.prompt}),
            }
            for name, pairs, sequences in zip(SETS, self.sets, self.encoded, strict=True)
        }


def check_sequences(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    argument: str,
    *,
    what: str = "sequence",
    limit: str = "seqlen",
) -> None:
    """Refuse what would be an index error deep inside the model.

    Args:
        model: That will run the sequences.
        sequences: Token ids.
        argument: Where they come from, for the message.
        what: What the message calls one.
        limit: The option that makes them shorter.

    Raises:
        SsahError: A token id has no embedding, or a sequence has more tokens than the model has positions.
    """
    vocabulary = data.vocabulary(model)
    largest = max(max(s.ids) for s in sequences)
    if largest >= vocabulary:
        raise SsahError(
            f"{argument}: the tokenizer gives token id {largest}, but the model has {vocabulary} embeddings; "
            "use the tokenizer that belongs to the model"
        )
    positions = data.positions(model)
    longest = max(len(s.ids) for s in sequences)
    if positions is not None and longest > positions:
        option = spelled(limit, argument)
        remedy = f"{option}{' ' if option.startswith('-') else '='}{positions}"
        raise SsahError(
            f"{argument}: a {what} has {longest} tokens, but the model has {positions} positions; use {remedy}"
        )
