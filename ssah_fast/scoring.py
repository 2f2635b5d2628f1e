"""Scores a model: one forward pass of the model's own code over both calibration sets, with the readers watched.

Nothing is kept of an activation but its channels' moments: 32 bytes per channel and set (two halves of mean and M2 in
float64).
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

import ssah_fast
from ssah_fast import data
from ssah_fast.collector import Collector, Progress
from ssah_fast.data import PairSet
from ssah_fast.errors import OutOfMemoryError, SsahError, spelled
from ssah_fast.scores import ESTIMATORS, SETS, Scores
from ssah_fast.units import find_units

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | Path | Sequence[Mapping[str, Any]] | PairSet

# Tokens per batch for batch_size=None: rows enough for the matrix products, few enough to keep their activations small.
CPU_TOKENS, GPU_TOKENS = 2048, 16384
MAX_SEQUENCES = 127

# Fields of a config that saving, or the way of loading, changes. "architectures" is set by save_pretrained.
_VOLATILE = frozenset(
    (
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
        "use_cache",
    )
)


def score(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    safety: Source,
    utility: Source,
    tokens: str = "response",
    estimator: str = "variance",
    attention_unit: str = "channel",
    nsamples: int | None = 128,
    seqlen: int = 512,
    seed: int = 0,
    batch_size: int | None = None,
    chat_template: bool = True,
    prompt_column: str | None = None,
    response_column: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Measure the importance of every unit on a safety set and a utility set.

    I = Var(input channel) x squared norm of its output column (SSAH, arXiv 2410.10862), over tokens: the exact pooled
    variance of all counted tokens. The model runs as it is, without lm_head and cache; it is left as it was, also after
    an error.

    Args:
        model: A causal language model of a supported architecture, wrapped (DataParallel, torch.compile) or not, on
            the device to run on.
        tokenizer: Its tokenizer.
        safety: Path, hub id (``name:config:split``), several of them separated by commas, a list of
            {"prompt", "response"}, or what data.load_pairs returned.
        utility: As ``safety``.
        tokens: Which tokens count: "response", "prompt" or "all". Padding and BOS never do.
        estimator: "variance"; "norm" (mean square, after Wanda); "flap" (the recurrence as released with FLAP, one
            sequence at a time whatever ``batch_size``).
        attention_unit: "channel" (a value channel) or "head" (a whole KV group).
        nsamples: Pairs drawn from each set; None takes all.
        seqlen: Longest sequence in tokens; the rest is cut.
        seed: Of the draw.
        batch_size: Sequences per forward pass; None chooses by length.
        chat_template: Wrap prompts in the tokenizer's chat template.
        prompt_column: Column of the prompts, where it is not recognised. Likewise:
        response_column: Column of the responses.
        text_column: Column of plain texts.
        messages_column: Column of conversations.
        progress: Called with (tokens done, tokens in all) after every batch.

    Returns:
        Scores of every attention and MLP module.

    Raises:
        SsahError: An argument is wrong, the architecture is unknown, or the data cannot be used.
        NonFiniteError: A NaN or Inf in the weights or activations.
        OutOfMemoryError: One sequence does not fit on the device.
    """
    if estimator not in ESTIMATORS:
        raise SsahError(f"estimator={estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
    if batch_size is not None and not 1 <= batch_size <= MAX_SEQUENCES:
        raise SsahError(
            f"batch_size={batch_size} is out of range; choose 1 to {MAX_SEQUENCES}, or None to have it chosen"
        )
    collector = Collector(model, find_units(model, attention_unit), estimator)
    columns = {
        "prompt_column": prompt_column,
        "response_column": response_column,
        "text_column": text_column,
        "messages_column": messages_column,
    }
    pair_sets = [
        source
        if isinstance(source, PairSet)
        else data.load_pairs(source, nsamples=nsamples, seed=seed, argument=name, **columns)
        for name, source in zip(SETS, (safety, utility), strict=True)
    ]
    encoded = [
        data.encode(
            pairs.pairs, tokenizer, tokens=tokens, seqlen=seqlen, chat_template=chat_template, argument=pairs.argument
        )
        for pairs in pair_sets
    ]
    network: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    for pairs, sequences in zip(pair_sets, encoded, strict=True):
        check_sequences(network, sequences, pairs.argument)
    pad_id = data.pad_id(tokenizer)
    if pad_id >= _vocabulary(network):  # a pad token that was added to the tokenizer alone; any other is as good
        pad_id = 0
    _run_fitting(collector, encoded, batch_size, pad_id, progress)
    settings = {
        "tokens": tokens,
        "estimator": estimator,
        "attention_unit": attention_unit,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "batch_size": batch_size,
        "chat_template": chat_template,
        **columns,
    }
    provenance = {
        "model": model_fingerprint(network),
        "model_id": network.config.name_or_path,
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "data": {
            name: _describe(pairs, sequences) for name, pairs, sequences in zip(SETS, pair_sets, encoded, strict=True)
        },
        "settings": settings,
        "versions": {
            "ssah_fast": ssah_fast.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    return Scores(collector.finish(), provenance, estimator)


def model_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What two score files of one model have in common, wherever it lies: architecture, config, size and dtype."""
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    return {
        "architecture": type(model).__name__,
        "config_sha256": _sha256(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "commit": getattr(model.config, "_commit_hash", None),
    }


def _lasting(config: Any) -> Any:
    """A config without what differs between two loads of one model; configs may be nested."""
    if not isinstance(config, Mapping):
        return config
    return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE}


def _tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = tokenizer.chat_template
    return {
        "class": type(tokenizer).__name__,
        "sha256": _sha256(vocabulary),
        "template_sha256": None if template is None else _sha256(json.dumps(template)),
    }


def _describe(pairs: PairSet, sequences: list[data.Encoded]) -> dict[str, Any]:
    return {
        "sources": pairs.sources,
        "available": pairs.available,
        "used": len(sequences),
        "without_counted_token": len(pairs.pairs) - len(sequences),
        "tokens": sum(sum(s.counted) for s in sequences),
        "sha256": pairs.sha256,
    }


def _vocabulary(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def check_sequences(
    model: PreTrainedModel,
    sequences: Sequence[data.Encoded],
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
    vocabulary = _vocabulary(model)
    largest = max(max(s.ids) for s in sequences)
    if largest >= vocabulary:
        raise SsahError(
            f"{argument}: the tokenizer gives token id {largest}, but the model has {vocabulary} embeddings; "
            "use the tokenizer that belongs to the model"
        )
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(len(s.ids) for s in sequences)
    if positions is not None and longest > positions:
        option = spelled(limit, argument)
        remedy = f"{option}{' ' if option.startswith('-') else '='}{positions}"
        raise SsahError(
            f"{argument}: a {what} has {longest} tokens, but the model has {positions} positions; use {remedy}"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _run_fitting(
    collector: Collector,
    encoded: list[list[data.Encoded]],
    batch_size: int | None,
    pad_id: int,
    progress: Progress | None,
) -> None:
    """Run all batches; where the size is ours to choose, halve it until the largest batch, which comes first, fits."""
    if collector.in_order:
        batch_size = 1
    max_tokens = GPU_TOKENS if collector.device.type == "cuda" else CPU_TOKENS
    while True:
        try:
            batches = data.make_batches(encoded, batch_size=batch_size, max_tokens=max_tokens, pad_id=pad_id)
            if collector.in_order:
                batches.sort(key=lambda batch: batch.sequences)
            collector.run(batches, progress)
            return
        except torch.OutOfMemoryError as error:
            if batch_size is not None or max_tokens < 2 * max(len(e.ids) for one_set in encoded for e in one_set):
                what = "one sequence" if batch_size in (None, 1) else f"a batch of {batch_size} sequences"
                remedy = "--seqlen" if batch_size in (None, 1) else "--batch-size or --seqlen"
                raise OutOfMemoryError(f"{what} does not fit on {collector.device}; use a smaller {remedy}") from error
        max_tokens //= 2
        torch.cuda.empty_cache()
