"""Answers of a model to many prompts: batched, padded on the left, greedy unless asked otherwise, resumable."""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessor

from ssah_fast import data, loading
from ssah_fast.calibration import check_sequences
from ssah_fast.data import Encoded, PairSet
from ssah_fast.errors import NonFiniteError, OutOfMemoryError, ResumeError, SsahError
from ssah_fast.evaluation import perplexity
from ssah_fast.evaluation.completions import Completion, CompletionFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_T = TypeVar("_T")

CACHE_BYTES = 4 * 2**30  # of keys and values of one batch, where no batch size is given
MOST_ROWS = 64  # likewise; a killed run loses one batch, so that batches should not be too large


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        samples: Answers to each prompt.
        temperature: 0 is greedy: always the most likely token. Otherwise logits are divided by it and drawn from.
        top_p: Draw from the most likely tokens that together have this probability; 0 is greedy, too.
        seed: Of the draws.

    Raises:
        SsahError: A value is out of range, or greedy answers are asked for several times.
    """

    max_new_tokens: int = 128
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("samples", self.samples)):
            if value < 1:
                raise SsahError(f"{name}={value} is out of range; it must be 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise SsahError(f"temperature={self.temperature} is out of range; it must be 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise SsahError(f"top_p={self.top_p} is out of range; it must be between 0 and 1")
        if self.samples > 1 and self.temperature == 0:
            raise SsahError(
                f"samples={self.samples} greedy answers would all be the same; give a temperature above 0, or 1 sample"
            )


@dataclass(frozen=True)
class Request:
    """One answer to be made; the fields are those of `Completion`, `ids` are the tokens that the model reads."""

    set: str
    index: int
    sample: int
    system: str
    variant: str
    prompt: str
    ids: list[int]


Around = Callable[[Sequence[Request]], AbstractContextManager[None]]


def prompts_of(pairs: PairSet, *, limit: int | float | None = None) -> list[str]:
    """The prompts of a set; where no record has one (a file of plain lines), the texts themselves.

    Args:
        pairs: From `data.load_pairs`.
        limit: At most so many, from the beginning; a number below 1 is a share of them.

    Raises:
        SsahError: A record has no prompt, or the limit is out of range.
    """
    texts = [pair.prompt for pair in pairs.pairs]
    if not any(texts):
        texts = [pair.response for pair in pairs.pairs]
    empty = next((number for number, text in enumerate(texts, start=1) if not text.strip()), None)
    if empty is not None:
        raise SsahError(f"{pairs.argument}: record {empty} has no prompt; every record needs one")
    return texts[: limited(len(texts), limit)]


def limited(number: int, limit: int | float | None) -> int:
    """How many of `number` records a limit leaves: all, so many, or below 1 that share of them, at least one.

    Raises:
        SsahError: The limit is 0 or less, or above 1 and no whole number.
    """
    if limit is None:
        return number
    if not limit > 0 or (limit >= 1 and limit != int(limit)):
        raise SsahError(f"limit={limit} is out of range; give a number of records, or a share between 0 and 1")
    return min(number, int(limit)) if limit >= 1 else max(1, round(number * limit))


def make_requests(
    prompts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    set: str,
    system_name: str = "none",
    system_text: str | None = None,
    chat_template: bool = True,
    samples: int = 1,
    variant: str = "",
    suffix: str = "",
    argument: str = "prompts",
) -> list[Request]:
    """Turn prompts into requests, those of one prompt one after the other.

    Args:
        prompts: What to ask.
        tokenizer: The model's tokenizer.
        set: Name of the set.
        system_name: Name of the system prompt.
        system_text: Its text; None: no system prompt.
        chat_template: Whether to use the tokenizer's chat template.
        samples: Answers to each prompt.
        variant: Name of the state that the model is to be in.
        suffix: Put behind every prompt, such as an adversarial suffix.
        argument: What the error messages call the source of the prompts.

    Raises:
        SsahError: The tokenizer has no chat template, or its template takes no system prompt.
    """
    encoded = data.encode_prompts(
        [prompt + suffix for prompt in prompts],
        tokenizer,
        system=system_text,
        chat_template=chat_template,
        argument=argument,
    )
    return [
        Request(set, index, sample, system_name, variant, prompt, ids)
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True))
        for sample in range(samples)
    ]


def check_requests(model: "PreTrainedModel", requests: Sequence[Request], decoding: Decoding) -> None:
    """Refuse, before anything is written, what would be an index error deep inside the model.

    Raises:
        SsahError: A prompt is too long for the model, or its tokens are not the model's.
    """
    longest = max(requests, key=lambda request: len(request.ids))
    positions = data.positions(model)
    room = math.inf if positions is None else positions - len(longest.ids)
    if decoding.max_new_tokens > room:
        remedy = f"use max_new_tokens={room}" if room > 0 else "leave it out"
        raise SsahError(
            f"{longest.set}: prompt {longest.index + 1} has {len(longest.ids)} tokens; with "
            f"max_new_tokens={decoding.max_new_tokens} it exceeds the {positions} positions of the model; {remedy}"
        )
    check_sequences(model, [Encoded(request.ids, []) for request in requests], longest.set)


def default_batch_size(model: "PreTrainedModel", requests: Sequence[Request], decoding: Decoding) -> int:
    """Rows whose keys and values, at full length, stay below 4 GiB, from 1 to 64.

    It depends on the shapes alone, not on the memory that is free, so that a run resumes with the same batches.
    """
    return min(MOST_ROWS, max(1, CACHE_BYTES // cache_bytes(model, requests, decoding)))


def cache_bytes(model: "PreTrainedModel", requests: Sequence[Request], decoding: Decoding) -> int:
    """Bytes of the keys and values of the longest answer with its prompt."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    length = max(len(request.ids) for request in requests) + decoding.max_new_tokens
    return values * model.dtype.itemsize * length


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int | None = None,
    file: CompletionFile | None = None,
    around: Around = lambda batch: contextlib.nullcontext(),
    reference: "PreTrainedModel | Literal['self'] | None" = "self",
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Answer requests in batches, longest prompts first.

    Batches are cut from the whole list, whatever is done already, and a batch is saved as a whole: a killed run ends
    with the same bits as one that was not. The model's own generation settings count for nothing but what ends an
    answer.

    Args:
        model: A causal language model in evaluation mode, on the device to run on.
        tokenizer: Its tokenizer.
        requests: From `make_requests`; prompts of any length and sets may be mixed.
        decoding: How.
        batch_size: Rows per batch; None: `default_batch_size`.
        file: Gets every batch when it is done, and gives back those that it has. Calls that share a file must come in
            the same order in every run.
        around: Entered around the generation of each batch, with its requests in the order of the rows; puts the model
            into the state that they ask for.
        reference: The model that judges how probable the answers are; "self": `model`, outside of `around`; None: none.
        progress: Called with (requests done, requests in all).

    Returns:
        The completions, in the order of the requests.

    Raises:
        SsahError: A prompt is too long for the model, or its tokens are not the model's.
        ResumeError: The file holds other requests.
        NonFiniteError: The model or the reference gives NaN.
        OutOfMemoryError: A batch does not fit on the device.
    """
    if not requests:
        return []
    check_requests(model, requests, decoding)
    cut = _cut(model, requests, decoding, batch_size)
    batches = [[requests[i] for i in rows] for rows in cut]
    done: list[Completion] = []
    saved = file.take([len(batch) for batch in batches]) if file else []
    for batch, found in zip(batches, saved, strict=False):
        _check_saved(batch, found)
        done += found
    generator = _Generator(model, tokenizer, decoding, reference)
    for number in range(len(saved), len(batches)):
        answered = generator.answer(number, batches[number], around(batches[number]))
        if file is not None:
            file.append(answered)
        done += answered
        if progress is not None:
            progress(len(done), len(requests))
    return _as_asked(cut, done)


def new_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The first half of `generate`, for a model that is in one state for all batches: the tokens of each answer.

    Arguments and errors are those of `generate`. `completions` makes the same answers of them, bit for bit, when the
    model that judges is no longer in that state.

    Returns:
        New tokens, with the one that ends the answer, in the order of the requests.
    """
    if not requests:
        return []
    check_requests(model, requests, decoding)
    cut = _cut(model, requests, decoding, batch_size)
    generator = _Generator(model, tokenizer, decoding, None)
    done: list[list[int]] = []
    for number, rows in enumerate(cut):
        done += generator.new_tokens(number, [requests[i] for i in rows])
        if progress is not None:
            progress(len(done), len(requests))
    return _as_asked(cut, done)


def completions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[Request],
    tokens: Sequence[list[int]],
    decoding: Decoding,
    *,
    batch_size: int | None = None,
    reference: "PreTrainedModel | Literal['self'] | None" = "self",
) -> list[Completion]:
    """The second half of `generate`: texts, and how probable the reference finds them.

    Arguments and errors are those of `generate`, `tokens` is what `new_tokens` returned; `batch_size` must be the same.
    """
    cut = _cut(model, requests, decoding, batch_size) if requests else []
    generator = _Generator(model, tokenizer, decoding, reference)
    done: list[Completion] = []
    for rows in cut:
        done += generator.completions([requests[i] for i in rows], [tokens[i] for i in rows])
    return _as_asked(cut, done)


def _cut(
    model: "PreTrainedModel", requests: Sequence[Request], decoding: Decoding, batch_size: int | None
) -> list[list[int]]:
    """The requests of each batch, longest prompts first."""
    size = batch_size or default_batch_size(model, requests, decoding)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _as_asked(cut: Sequence[Sequence[int]], done: Sequence[_T]) -> list[_T]:
    """What was done batch by batch, in the order of the requests."""
    order = itertools.chain.from_iterable(cut)
    return [one for _, one in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]


def _check_saved(batch: Sequence[Request], saved: Sequence[Completion]) -> None:
    fields = ("set", "index", "sample", "system", "variant", "prompt")
    for request, completion in zip(batch, saved, strict=True):
        for name in fields:
            if getattr(request, name) != getattr(completion, name):
                raise ResumeError(
                    f"the saved completions are of other requests: {name} is {getattr(completion, name)!r} where "
                    f"{getattr(request, name)!r} is asked for; add --fresh to start over"
                )


class _Generator:
    """Answers batches: one model, one way of decoding."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        decoding: Decoding,
        reference: "PreTrainedModel | Literal['self'] | None",
    ) -> None:
        self.model: Any = model  # the type of `generate` is not known to checkers
        self.tokenizer, self.decoding = tokenizer, decoding
        self.judge = model if reference == "self" else reference
        embedding: Any = model.get_input_embeddings()
        self.pad, self.device = data.pad_id(tokenizer, data.vocabulary(model)), embedding.weight.device
        self.ends = _end_tokens(model, tokenizer)

    def answer(self, number: int, batch: Sequence[Request], state: AbstractContextManager[None]) -> list[Completion]:
        """The completions of one batch; `state` is entered while the model generates."""
        with self._fits(batch), state:  # leaving the state may run out of memory, too
            new = self.new_tokens(number, batch)
        return self.completions(batch, new)

    def new_tokens(self, number: int, batch: Sequence[Request]) -> list[list[int]]:
        """The tokens of each answer of one batch; its number seeds the draws."""
        with self._fits(batch):
            return self._new_tokens(number, [request.ids for request in batch])

    def completions(self, batch: Sequence[Request], new: list[list[int]]) -> list[Completion]:
        """The completions that have these tokens."""
        with self._fits(batch):
            nll = self._nll(batch, new)
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Completion(
                set=request.set,
                index=request.index,
                sample=request.sample,
                system=request.system,
                variant=request.variant,
                prompt=request.prompt,
                text=text,
                tokens=len(ids),
                finished=ids[-1] in self.ends,
                nll=value,
            )
            for request, text, ids, value in zip(batch, texts, new, nll, strict=True)
        ]

    @contextlib.contextmanager
    def _fits(self, batch: Sequence[Request]) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"a batch of {len(batch)} answers of up to {self.decoding.max_new_tokens} tokens does not fit on the "
                "device; use a smaller --batch-size or --max-new-tokens"
            ) from error

    @torch.inference_mode()
    def _new_tokens(self, number: int, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + [*prompt] for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = self._config()
        with _settings(self.model, config), _seeded(self.decoding.seed, number, self.device), loading.silent():
            ids, mask = ids.to(self.device), mask.to(self.device)
            output = self.model.generate(
                ids, attention_mask=mask, generation_config=config, logits_processor=[_NoNan()]
            )
        return [_until_end(row, self.ends) for row in output[:, width:].tolist()]

    def _config(self) -> GenerationConfig:
        how: dict[str, Any] = {"do_sample": False}
        if self.decoding.temperature > 0:
            temperature, top_p = self.decoding.temperature, self.decoding.top_p
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.decoding.max_new_tokens,
            num_beams=1,
            use_cache=True,
            pad_token_id=self.pad,
            eos_token_id=self.ends or None,
            **how,
        )

    def _nll(self, batch: Sequence[Request], new: Sequence[list[int]]) -> Sequence[float | None]:
        if self.judge is None:
            return [None] * len(batch)
        whole = [
            Encoded(request.ids + ids, [False] * len(request.ids) + [True] * len(ids))
            for request, ids in zip(batch, new, strict=True)
        ]
        return [loss.nll / loss.tokens for loss in perplexity.losses(self.judge, whole)]


class _NoNan(LogitsProcessor):
    """Stops where the model gives NaN: its largest logit would silently be token 0."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits [rows, V] as they are.

        Raises:
            NonFiniteError: One is NaN.
        """
        rows = scores.isnan().any(-1)
        if rows.any():
            raise NonFiniteError(
                f"the model gives NaN for {int(rows.sum())} of {len(rows)} prompts of a batch; use another --dtype, or "
                "look for the weight with `ssah-fast score`"
            )
        return scores


def _end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token that ends an answer: a chat model may have several, and its tokenizer name only one of them."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = own if isinstance(own, list) else [own]
    return [token for token in dict.fromkeys([*several, tokenizer.eos_token_id]) if token is not None]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends an answer; behind it there is padding."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]


@contextlib.contextmanager
def _settings(model: "PreTrainedModel", config: GenerationConfig) -> Iterator[None]:
    """Replace the settings that came with the model: from them `generate` fills what a config leaves open."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


@contextlib.contextmanager
def _seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for one batch, and put them back; each batch has its own seed, whatever ran before it."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
