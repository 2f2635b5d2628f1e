"""Data files -> what a model is asked, and the texts that it is measured on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssah_fast import data
from ssah_fast.calibration import Source, check_sequences
from ssah_fast.data import Encoded, PairSet
from ssah_fast.evaluation.generation import Request, limited, make_requests, prompts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ATTACK = "asr"  # the sets of completions
LOOK_ALIKES = "over_refusal"
UTILITY = "utility"


def load_sets(sources: Mapping[str, Source | None]) -> dict[str, PairSet]:
    """All records of each source that is given, by the name of its set; a PairSet was read already.

    Raises:
        SsahError: A source cannot be used.
    """
    return {
        name: source if isinstance(source, PairSet) else data.load_pairs(source, nsamples=None, argument=name)
        for name, source in sources.items()
        if source is not None
    }


def describe(sets: Mapping[str, PairSet]) -> dict[str, Any]:
    """The provenance of the data, by set."""
    return {
        name: {"sources": pairs.sources, "sha256": pairs.sha256, "n": len(pairs.pairs)} for name, pairs in sets.items()
    }


def all_requests(
    sets: Mapping[str, PairSet],
    tokenizer: "PreTrainedTokenizerBase",
    systems: Mapping[str, str | None],
    *,
    suffix: str = "",
    chat_template: bool = True,
    samples: int = 1,
    limit: int | float | None = None,
) -> list[Request]:
    """Every prompt of the sets `ATTACK` and `LOOK_ALIKES` under every system prompt.

    Args:
        sets: From `load_sets`.
        tokenizer: The model's tokenizer.
        systems: System prompts by name; None as text is none.
        suffix: Put behind every prompt of `ATTACK`.
        chat_template: Whether to use the tokenizer's chat template.
        samples: Answers to each prompt.
        limit: See `generation.limited`.

    Raises:
        SsahError: A record has no prompt, or the tokenizer's chat template is missing or takes no system prompt.
    """
    return [
        request
        for name in (ATTACK, LOOK_ALIKES)
        if name in sets
        for system, text in systems.items()
        for request in make_requests(
            prompts_of(sets[name], limit=limit),
            tokenizer,
            set=name,
            system_name=system,
            system_text=text,
            chat_template=chat_template,
            samples=samples,
            suffix=suffix if name == ATTACK else "",
            argument=sets[name].argument,
        )
    ]


def sequences(
    pairs: PairSet,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: bool = True,
    seqlen: int = 2048,
    limit: int | float | None = None,
) -> list[Encoded]:
    """The texts of a set as tokens for `perplexity.measure`: of pairs the responses count, of plain texts all.

    Args:
        pairs: The set.
        model: Only its shapes are read.
        tokenizer: Its tokenizer.
        chat_template: Whether to use the tokenizer's chat template.
        seqlen: Longer sequences are cut.
        limit: See `generation.limited`.

    Raises:
        SsahError: Nothing is left to count, or the tokens are not the model's.
    """
    positions = data.positions(model)
    found = data.encode(
        pairs.pairs[: limited(len(pairs.pairs), limit)],
        tokenizer,
        seqlen=min(seqlen, positions or seqlen),
        chat_template=chat_template,
        argument=pairs.argument,
    )
    check_sequences(model, found, pairs.argument)
    return found
