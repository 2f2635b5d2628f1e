"""Prompts and responses -> token sequences -> batches in which every token knows the group it is counted in.

Three steps, each usable alone: `load_pairs` reads a source and draws from it, `encode` turns pairs into token ids and
marks which positions count, `make_batches` packs the sequences of all sets and gives each counted token its group id.
`load_conversations` and `encode_conversations` are the first two steps for training, where whole chats are learned.

Prompt and response are tokenised apart and their ids concatenated, without a system prompt, as in Wei et al. (ICML
2024, arXiv 2402.05162): the statistics are then taken over exactly the tokens of the response.
"""

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch

from ssah_fast.errors import SsahError, spelled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = ("response", "prompt", "all")
SEPARATOR = "\n"  # ends the prompt where no chat template does it


class Pair(NamedTuple):
    """One prompt and its response. A plain text is a response without a prompt."""

    prompt: str
    response: str


@dataclass(frozen=True)
class PairSet:
    """The pairs drawn from one or more sources.

    Attributes:
        pairs: The pairs, in the order in which they were drawn.
        sources: The sources as the user named them.
        available: How many pairs the sources held before the draw.
        sha256: Hash of `pairs` (one JSON object per line), for provenance.
        argument: What the error messages call the source, e.g. "--safety-data".
    """

    pairs: list[Pair]
    sources: list[str]
    available: int
    sha256: str
    argument: str = "source"


class Turn(NamedTuple):
    """One message of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


# A plain text is one assistant turn, alone.
Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class ConversationSet:
    """The conversations drawn from one or more sources; the other attributes are those of `PairSet`."""

    conversations: list[Conversation]
    sources: list[str]
    available: int
    sha256: str
    argument: str = "source"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence and, for each of them, whether the statistics count it."""

    ids: list[int]
    counted: list[bool]


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to the longest of them.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] int64, or None when nothing is padded.
        group: [B, T] int8: 2 * set + half for a counted token, -1 for every other (padding, BOS, tokens not asked for).
        sequences: (set, index in the set) of each row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    group: torch.Tensor
    sequences: list[tuple[int, int]]


# reading


def _read_json(path: Path) -> Iterable[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not valid JSON ({error.msg})") from error
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError('it must hold a list of records or {"data": [...]}')
    return records


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not valid JSON ({error.msg})") from error


def _read_csv(path: Path) -> Iterator[Any]:
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than one long document
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    raise ValueError(f"line {reader.line_num} has not as many fields as the header")
                yield record
    except csv.Error as error:
        raise ValueError(f"it is not valid CSV after line {reader.line_num} ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _read_txt(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from (line.rstrip("\n") for line in lines)


def _read_parquet(path: Path) -> Iterable[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A bare path string would be looked up as a folder of partitions; an open file is read as what it is.
        with path.open("rb") as file:
            return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is not a readable parquet file ({_one_line(error)})") from error


_READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _read_file(path: Path, argument: str) -> list[Any]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SsahError(f"{argument}: {path} has an unsupported file type; use {', '.join(_READERS)}")
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise SsahError(f"{argument}: {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (ValueError, OSError) as error:
        raise SsahError(f"{argument}: cannot read {path}: {_one_line(error)}") from error


def _read_hub(source: str, name: str, parts: list[str], argument: str) -> list[Any]:
    """Read a hub id, or a folder of data files, through `datasets`; `parts` are [config[, split[, N]]]."""
    try:
        import datasets
    except ImportError as error:
        advice = f"install it with: pip install {error.name}"
        raise SsahError(f"{argument}: reading {source!r} needs {error.name}; {advice}") from error

    config, split, limit, *rest = [*parts, "", "", ""]
    if any(rest) or (limit and not (limit.isascii() and limit.isdigit() and int(limit))):
        raise SsahError(f"{argument}: {source!r} is not name:config:split:N with a positive number N")
    try:
        dataset = datasets.load_dataset(name, name=config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # "An error occurred while generating the dataset" says nothing; what caused it does.
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise SsahError(
            f"{argument}: cannot load {source!r}: {_one_line(reason or error)}; "
            "give a local file, or a hub id name:config:split that is cached or can be reached"
        ) from error
    return list(dataset.select(range(min(int(limit), len(dataset)))) if limit else dataset)


def _read(source: str, argument: str) -> list[Any]:
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, argument)
    name, *parts = re.split(r":(?![^\[]*\])", source)  # the colon of a slice, `train[:100]`, is part of the split
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _read_hub(source, str(folder), parts, argument)
    if folder.suffix.lower() in _READERS or not _HUB_NAME.fullmatch(name):
        raise SsahError(f"{argument}: file not found: {source}")
    return _read_hub(source, name, parts, argument)


def _split_sources(source: str | Path, argument: str) -> list[str]:
    if source and Path(source).expanduser().exists():  # as it stands, commas included
        return [str(source)]
    if isinstance(source, Path):
        raise SsahError(f"{argument}: file not found: {source}")
    sources = [part.strip() for part in source.split(",") if part.strip()]
    if not sources:
        raise SsahError(f"{argument} is empty; give a file or a hub id")
    return sources


# columns


@dataclass(frozen=True)
class _Columns:
    """Which columns hold the texts: a prompt (with an optional input) and a response, or messages, or one text."""

    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None
    system: str | None = None


_PAIRS = (
    ("prompt", "response"),
    ("goal", "target"),  # AdvBench
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("question", "answer"),
    ("prompt", "completion"),  # trl
    ("prompt", "chosen"),  # preference data
)
_INPUTS = {"output": "input", "response": "context"}  # what goes with an instruction, by the name of its response
_PROMPTS = tuple(dict.fromkeys(prompt for prompt, _ in _PAIRS))
_RESPONSES = tuple(dict.fromkeys(response for _, response in _PAIRS))
_SURROGATE = re.compile("[\ud800-\udfff]")
_USER = ("user", "human", "prompter")
_ASSISTANT = ("assistant", "gpt", "model", "bot")


def _by_plain_name(columns: list[str]) -> dict[str, str]:
    return {
        column.strip().lower(): column for column in reversed(columns)
    }  # reversed: of two that clash the first wins


def _recognise(columns: list[str]) -> _Columns | None:
    """The first convention that the columns fulfil, letter case aside (JailbreakBench writes `Goal,Target`)."""
    known = _by_plain_name(columns)
    for prompt, response in _PAIRS:
        if prompt in known and response in known:
            extra = known.get(_INPUTS[response]) if prompt == "instruction" else None
            return _Columns(prompt=known[prompt], input=extra, response=known[response])
    for name in ("messages", "conversations"):
        if name in known:
            return _Columns(messages=known[name])
    for name in ("text", "content"):
        if name in known:
            return _Columns(text=known[name])
    for name in _PROMPTS:
        if name in known:
            return _Columns(prompt=known[name], input=known.get("input") if name == "instruction" else None)
    return None


def _choose_columns(columns: list[str], options: Mapping[str, str | None], name: str, argument: str) -> _Columns:
    """The columns that the options name; those they leave open, or all, by convention."""
    given = {option: column for option, column in options.items() if column is not None}
    kinds = {option if option in ("text_column", "messages_column") else "pair" for option in given}
    if len(kinds) > 1:
        flags = " and ".join(spelled(option, argument) for option in given)
        raise SsahError(f"{argument}: {flags} exclude each other; give prompt and response, or messages, or text")
    for option, column in given.items():
        if column not in columns:
            flag = spelled(option, argument)
            raise SsahError(f"{argument}: {name} has no column {column!r} ({flag}); it has {', '.join(columns)}")
    if not given:
        found = _recognise(columns)
    elif kinds == {"pair"}:
        known = _by_plain_name(columns)
        prompt = given.get("prompt_column") or next((known[n] for n in _PROMPTS if n in known), None)
        response = given.get("response_column") or next((known[n] for n in _RESPONSES if n in known), None)
        found = _Columns(prompt=prompt, response=response) if prompt else None
    else:
        found = _Columns(text=given.get("text_column"), messages=given.get("messages_column"))
    if found is None:
        flags = ", ".join(spelled(option, argument) for option in options)
        raise SsahError(f"{argument}: no known columns in {name}; it has {', '.join(columns)}; name yours with {flags}")
    return replace(found, system=_by_plain_name(columns).get("system"))


def _text(record: Mapping[str, Any], column: str | None, roles: tuple[str, ...] = ()) -> str:
    """The text of a column ("" for null); of a list of messages (as trl has them) the last turn in `roles`."""
    if column is None:
        return ""
    if column not in record:
        raise ValueError(f"it has no column {column!r}")
    value = record[column]
    if roles and isinstance(value, list):
        value = next((text for role, text in reversed(_turns(value)) if role in roles), "")
    return _checked("" if value is None else value, column)


def _checked(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds a {type(value).__name__}, not a text")
    if _SURROGATE.search(value):  # JSON can spell one: "\ud83d" without its second half
        raise ValueError(f"column {column!r} holds half of a surrogate pair, which no tokenizer takes")
    return value


def _turns(messages: list[Any]) -> list[tuple[str, Any]]:
    """(role, text) of each message in either of the two usual forms."""
    if not all(isinstance(message, Mapping) for message in messages):
        raise ValueError('a message must be {"role", "content"} or {"from", "value"}')
    return [(str(m.get("role") or m.get("from")), m.get("content") or m.get("value") or "") for m in messages]


def _last_exchange(record: Mapping[str, Any], column: str) -> Pair:
    """The last user turn that was answered, and its answer; with no answer at all the last user turn."""
    if not isinstance(record.get(column), list):
        raise ValueError(f"column {column!r} holds no list of messages")
    turns = [(role, text) for role, text in _turns(record[column]) if role in _USER + _ASSISTANT]
    asked = [i for i, (role, _) in enumerate(turns) if role in _USER]
    if not asked:
        raise ValueError(f"column {column!r} holds no user turn")
    answered = [i for i in asked if i + 1 < len(turns) and turns[i + 1][0] in _ASSISTANT]
    last = (answered or asked)[-1]
    return Pair(_checked(turns[last][1], column), _checked(turns[last + 1][1], column) if answered else "")


def _to_pair(record: Mapping[str, Any], columns: _Columns) -> Pair | None:
    """The pair of one record; None for a blank text, of which corpora such as WikiText are full."""
    if columns.messages is not None:
        pair = _last_exchange(record, columns.messages)
    elif columns.text is not None:
        pair = Pair("", _text(record, columns.text))
        if not pair.response.strip():
            return None
    else:
        parts = [_text(record, columns.prompt, _USER)]
        if columns.input in record:  # where a row leaves it out there is none
            parts.append(_text(record, columns.input))
        pair = Pair("\n".join(part for part in parts if part.strip()), _text(record, columns.response, _ASSISTANT))
    if not pair.prompt.strip() and not pair.response.strip():
        raise ValueError("both its prompt and its response are empty")
    return pair


def _conversation(turns: list[tuple[str, Any]], column: str) -> Conversation | None:
    """The turns up to the last answer, which is where learning ends; None where nothing is answered."""
    known = {**dict.fromkeys(_USER, "user"), **dict.fromkeys(_ASSISTANT, "assistant"), "system": "system"}
    odd = next((role for role, _ in turns if role not in known), None)
    if odd is not None:
        raise ValueError(f"column {column!r} has a turn of {odd!r}; use the roles system, user and assistant")
    chat = tuple(Turn(known[role], _checked(text, column)) for role, text in turns)
    answers = [i for i, turn in enumerate(chat) if turn.role == "assistant" and turn.content.strip()]
    return chat[: answers[-1] + 1] if answers else None


def _to_conversation(record: Mapping[str, Any], columns: _Columns) -> Conversation | None:
    """The conversation of one record; None where it has no answer to learn."""
    instruction = record.get(columns.system) if columns.system else None
    system = [("system", instruction)] if instruction else []
    if columns.messages is not None:
        if not isinstance(record.get(columns.messages), list):
            raise ValueError(f"column {columns.messages!r} holds no list of messages")
        return _conversation(system + _turns(record[columns.messages]), columns.messages)
    if columns.prompt is not None and isinstance(record.get(columns.prompt), list):
        answer = record.get(columns.response) if columns.response else None
        turns = _turns(answer) if isinstance(answer, list) else [("assistant", answer or "")]
        return _conversation(system + _turns(record[columns.prompt]) + turns, columns.prompt)
    pair = _to_pair(record, columns)
    if pair is None:
        return None
    question = [*system, ("user", pair.prompt)] if pair.prompt.strip() else []
    return _conversation([*question, ("assistant", pair.response)], columns.system or "system")


_Item = TypeVar("_Item")


def _convert_rows(
    records: list[Any],
    name: str,
    options: Mapping[str, str | None],
    argument: str,
    convert: Callable[[Mapping[str, Any], _Columns], _Item | None],
) -> list[_Item]:
    rows = [{"text": record} if isinstance(record, str) else record for record in records]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise SsahError(f"{argument}: row {number} of {name} is a {type(row).__name__}, not a record or a text")
    items = []
    if rows:
        columns = _choose_columns(list(dict.fromkeys(str(key) for row in rows for key in row)), options, name, argument)
        for number, row in enumerate(rows, start=1):
            try:
                items.append(convert(row, columns))
            except ValueError as error:
                raise SsahError(f"{argument}: row {number} of {name}: {error}") from error
    found = [item for item in items if item is not None]
    if not found:
        missing = "text" if convert is _to_pair else "response to learn from"
        raise SsahError(f"{argument}: {name} holds no {missing}")
    return found


def _draw(
    source: str | Path | Sequence[Mapping[str, Any]],
    nsamples: int | None,
    seed: int,
    options: Mapping[str, str | None],
    argument: str,
    convert: Callable[[Mapping[str, Any], _Columns], _Item | None],
) -> tuple[list[_Item], list[str], int]:
    """The items drawn from all sources, the sources' names, and how many items they hold."""
    if nsamples is not None and nsamples < 1:
        raise SsahError(f"{spelled('nsamples', argument)} is {nsamples}; it must be 1 or more")
    if isinstance(source, (str, Path)):
        sources = _split_sources(source, argument)
        tables = [_read(name, argument) for name in sources]
    else:
        sources, tables = ["a list in memory"], [list(source)]
        if any(isinstance(record, str) for record in tables[0]):
            raise SsahError(f"{argument}: a list must hold records; separate several files by commas in one string")
    found = [
        item
        for name, table in zip(sources, tables, strict=True)
        for item in _convert_rows(table, name, options, argument, convert)
    ]
    if nsamples is None:
        return found, sources, len(found)
    order = list(range(len(found)))
    random.Random(seed).shuffle(order)
    return [found[i] for i in order[:nsamples]], sources, len(found)


def prompt_digest(prompt: str) -> str:
    """A short hash (16 hex digits) by which a prompt is recognised again, whatever its spaces and line breaks."""
    return hashlib.sha256(" ".join(prompt.split()).encode()).hexdigest()[:16]


def _hash(records: Iterable[Any]) -> str:
    return hashlib.sha256("".join(json.dumps(record) + "\n" for record in records).encode()).hexdigest()


# the three steps


def load_pairs(
    source: str | Path | Sequence[Mapping[str, Any]],
    *,
    nsamples: int | None = 128,
    seed: int = 0,
    prompt_column: str | None = None,
    response_column: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    argument: str = "source",
) -> PairSet:
    """Read prompts and responses and draw some of them.

    Columns are recognised in this order, letter case aside: prompt/response, goal/target, instruction[/input]/output
    and instruction[/context]/response (instruction and input joined by a line break), question/answer,
    prompt/completion, prompt/chosen, messages or conversations, text or content (a response without a prompt), and at
    last a prompt, goal, instruction or question without a response. Of a conversation the last user turn that was
    answered is the prompt and that answer the response; earlier turns and the system prompt are left out. Blank texts
    are skipped.

    Args:
        source: A .jsonl, .json, .csv, .txt or .parquet file; a hub id `name[:config[:split[:N]]]` (split "train" unless
            given, N = its first N rows only; a folder of data files may stand for the name); several of these,
            separated by commas; or a list of records.
        nsamples: How many pairs to draw, without replacement; all there are if there are fewer. None takes all, in the
            order of the file.
        seed: Seed of the draw.
        prompt_column: Column of the prompt, where it is none of the above; likewise the next three.
        response_column: Column of the response.
        text_column: Column of a text without a prompt.
        messages_column: Column of a list of {"role", "content"} or {"from", "value"}.
        argument: What the error messages call `source`, e.g. "--safety-data".

    Returns:
        The drawn pairs with their origin and hash.

    Raises:
        SsahError: For a source that is missing, malformed or without text, an unknown column, or a row without text.
    """
    options = {
        "prompt_column": prompt_column,
        "response_column": response_column,
        "text_column": text_column,
        "messages_column": messages_column,
    }
    pairs, sources, available = _draw(source, nsamples, seed, options, argument, _to_pair)
    return PairSet(pairs, sources, available, _hash(pair._asdict() for pair in pairs), argument)


def load_conversations(
    source: str | Path | Sequence[Mapping[str, Any]],
    *,
    nsamples: int | None = None,
    seed: int = 0,
    prompt_column: str | None = None,
    response_column: str | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    argument: str = "source",
) -> ConversationSet:
    """Read conversations to train on: sources and columns of `load_pairs`, but chats whole, system prompts included.

    A `system` column opens the conversation. Turns after the last answer are cut; records without any answer are
    skipped, because there is nothing in them to learn.

    Args:
        source: As in `load_pairs`; so are the options below.
        nsamples: How many conversations to draw; None takes all, in the order of the file.
        seed: Seed of the draw.
        prompt_column: Column of the prompt: a text, or a list of messages.
        response_column: Column of the response: a text, or a list of messages.
        text_column: Column of a text without a prompt.
        messages_column: Column of a list of {"role", "content"} or {"from", "value"}.
        argument: What the error messages call `source`.

    Returns:
        The drawn conversations with their origin and hash.

    Raises:
        SsahError: As `load_pairs`; also for a role that is none of system, user and assistant.
    """
    options = {
        "prompt_column": prompt_column,
        "response_column": response_column,
        "text_column": text_column,
        "messages_column": messages_column,
    }
    chats, sources, available = _draw(source, nsamples, seed, options, argument, _to_conversation)
    return ConversationSet(chats, sources, available, _hash(chats), argument)


def encode(
    pairs: Sequence[Pair],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tokens: str = "response",
    seqlen: int = 512,
    chat_template: bool = True,
    argument: str = "source",
) -> list[Encoded]:
    """Tokenise pairs and mark the positions that the statistics count.

    With the chat template the prompt is one user turn with the generation prompt after it; without, it is the prompt
    and a line break, after the tokens that the tokenizer puts in front by itself. The ids of the response, tokenised
    apart without special tokens, follow; no end-of-sequence is added. A pair without a prompt is a plain text and never
    gets the template. Which positions count is decided by position alone, so that a pad token equal to EOS changes
    nothing; a BOS in front never counts.

    Args:
        pairs: What to tokenise.
        tokenizer: The model's tokenizer.
        tokens: What counts: "response", "prompt" (the template's own tokens included) or "all".
        seqlen: Longer sequences are cut on the right.
        chat_template: Whether to put the prompt in the tokenizer's chat template.
        argument: What the error messages call the source of the pairs.

    Returns:
        The sequences in order. Those without a counted token are left out: len(pairs) less the length is their number.

    Raises:
        SsahError: If the tokenizer has no chat template, or nothing is left to count.
    """
    if tokens not in TOKENS:
        raise SsahError(f"{spelled('tokens', argument)} is {tokens!r}; use {', '.join(TOKENS)}")
    if seqlen < 2:
        raise SsahError(f"{spelled('seqlen', argument)} is {seqlen}; it must be 2 or more")
    front = _front_ids(tokenizer, pairs)
    prompts = [pair.prompt for pair in pairs if pair.prompt]
    heads = iter(encode_prompts(prompts, tokenizer, chat_template=chat_template, argument=argument))
    whole = []
    for pair, tail in zip(pairs, _plain_ids([pair.response for pair in pairs], tokenizer), strict=True):
        head = next(heads) if pair.prompt else _missing(front, tail)
        whole.append(_mark(head, tail, tokens, tokenizer.bos_token_id))
    cut = [Encoded(sequence.ids[:seqlen], sequence.counted[:seqlen]) for sequence in whole]
    kept = [sequence for sequence in cut if any(sequence.counted)]
    if not kept:
        raise SsahError(_nothing_counted(any(any(s.counted) for s in whole), tokens, seqlen, argument))
    return kept


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    system: str | None = None,
    chat_template: bool = True,
    argument: str = "source",
) -> list[list[int]]:
    """Tokenise prompts up to where the model answers, as `encode` does with the prompts of pairs.

    Args:
        prompts: The user's messages.
        tokenizer: The model's tokenizer.
        system: A system prompt before each of them; without the chat template, a line of its own in front.
        chat_template: Whether to use the tokenizer's chat template, generation prompt included.
        argument: What the error messages call the source of the prompts.

    Returns:
        The token ids of each.

    Raises:
        SsahError: The tokenizer has no chat template, or its template takes no system prompt.
    """
    if chat_template and prompts:
        opening = () if system is None else (Turn("system", system),)
        return _apply_template([(*opening, Turn("user", prompt)) for prompt in prompts], tokenizer, argument)
    texts = [(prompt if system is None else system + SEPARATOR + prompt) + SEPARATOR for prompt in prompts]
    front = _front_ids(tokenizer, [Pair(prompt, "") for prompt in prompts])
    return [_missing(front, ids) + ids for ids in _plain_ids(texts, tokenizer)]


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_seq_length: int = 1024,
    chat_template: bool = True,
    argument: str = "source",
) -> list[Encoded]:
    """Tokenise conversations for training and mark the tokens of every answer, its end-of-turn token included.

    A chat is rendered whole by the tokenizer's template. An answer is what that rendering has beyond the rendering of
    the turns before it with the generation prompt; where the template writes earlier turns differently later on (some
    drop the reasoning), only the part that both renderings share counts, so that a prompt token never does. Without
    the template, turns end with a line break and answers with EOS, as does a plain text.

    Args:
        conversations: From `load_conversations`.
        tokenizer: The model's tokenizer.
        max_seq_length: Longer sequences are cut on the right.
        chat_template: Whether to use the tokenizer's chat template.
        argument: What the error messages call the source.

    Returns:
        The sequences in order; those without a counted token are left out.

    Raises:
        SsahError: If the tokenizer has no chat template, or nothing is left to learn.
    """
    if max_seq_length < 2:
        raise SsahError(f"{spelled('max_seq_length', argument)} is {max_seq_length}; it must be 2 or more")
    chats = [chat for chat in conversations if chat_template and len(chat) > 1]
    rendered = iter(_render_chats(chats, tokenizer, argument) if chats else [])
    front = _front_ids(tokenizer, [Pair("", turn.content) for chat in conversations for turn in chat])
    whole = [
        next(rendered) if chat_template and len(chat) > 1 else _join_turns(chat, front, tokenizer)
        for chat in conversations
    ]
    kept = [Encoded(sequence.ids[:max_seq_length], sequence.counted[:max_seq_length]) for sequence in whole]
    kept = [sequence for sequence in kept if any(sequence.counted)]
    if not kept:
        flag = spelled("max_seq_length", argument)
        raise SsahError(f"{argument}: {flag} {max_seq_length} leaves no token of a response to learn; raise it")
    return kept


def _render_chats(
    chats: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", argument: str
) -> Iterator[Encoded]:
    # An opening turn of the assistant (a greeting) is context: nothing before it says where it starts.
    answers = [[k for k, turn in enumerate(chat) if k and turn.role == "assistant"] for chat in chats]
    before = [chat[:k] for chat, places in zip(chats, answers, strict=True) for k in places]
    until = [chat[: k + 1] for chat, places in zip(chats, answers, strict=True) for k in places]
    heads = iter(_apply_template(before, tokenizer, argument))
    ends = iter(_apply_template(until, tokenizer, argument, generation_prompt=False))
    for places, ids in zip(answers, _apply_template(chats, tokenizer, argument, generation_prompt=False), strict=True):
        counted = [False] * len(ids)
        for _ in places:
            start, stop = _shared(next(heads), ids), _shared(next(ends), ids)
            counted[start:stop] = [True] * max(0, stop - start)
        yield Encoded(ids, counted)


def _shared(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _join_turns(chat: Conversation, front: list[int], tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    counted: list[bool] = []
    for turn in chat:
        answer = turn.role == "assistant"
        part = _plain_ids([turn.content if answer else turn.content + SEPARATOR], tokenizer)[0] + end * answer
        ids += part
        counted += [answer] * len(part)
    missing = _missing(front, ids)
    sequence = Encoded(missing + ids, [False] * len(missing) + counted)
    if sequence.ids and sequence.ids[0] == tokenizer.bos_token_id:
        sequence.counted[0] = False
    return sequence


def _nothing_counted(was_cut: bool, tokens: str, seqlen: int, argument: str) -> str:
    if was_cut:
        what = "token" if tokens == "all" else tokens
        return f"{argument}: {spelled('seqlen', argument)} {seqlen} cuts off every {what}; raise it"
    if tokens == "all":
        return f"{argument}: no text in it gives a token to count"
    other = "prompt" if tokens == "response" else "response"
    remedy = (
        f"name its column with {spelled(f'{tokens}_column', argument)}, or use {spelled('tokens', argument)} {other}"
    )
    return f"{argument}: no pair in it has a {tokens} to count; {remedy}"


def _plain_ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # verbose=False: a text longer than the model's context is cut later and needs no warning.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _front_ids(tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Pair]) -> list[int]:
    """What the tokenizer puts in front of a text by itself (BOS); what it appends (EOS) is not wanted mid-sequence."""
    for pair in pairs:
        text = pair.response or pair.prompt
        bare = _plain_ids([text], tokenizer)[0]
        if bare:  # a word-level tokenizer may know no word of a text
            full = tokenizer(text, verbose=False)["input_ids"]
            starts = (k for k in range(len(full)) if full[k : k + len(bare)] == bare)
            return full[: next(starts, 0)]
    return []


def _missing(front: list[int], ids: list[int]) -> list[int]:
    """`front`, or nothing where the text spells it (its own BOS) already."""
    return [] if ids[: len(front)] == front else front


def _apply_template(
    chats: Sequence[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    argument: str,
    *,
    generation_prompt: bool = True,
) -> list[list[int]]:
    import jinja2

    remedy = f"use {spelled('no_chat_template', argument)}" if argument.startswith("--") else "use chat_template=False"
    if not tokenizer.chat_template:
        raise SsahError(f"{argument}: the tokenizer has no chat template; {remedy}")
    try:
        ids = tokenizer.apply_chat_template(
            [[turn._asdict() for turn in chat] for chat in chats],
            add_generation_prompt=generation_prompt,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
    except jinja2.TemplateError as error:
        if any(chat[0].role == "system" for chat in chats):
            remedy = f"leave the system prompt out, or {remedy}"
        raise SsahError(f"{argument}: the tokenizer's chat template failed ({_one_line(error)}); {remedy}") from error
    return cast(list[list[int]], ids)


def _mark(head: list[int], tail: list[int], tokens: str, bos: int | None) -> Encoded:
    counted = [tokens != "response"] * len(head) + [tokens != "prompt"] * len(tail)
    ids = head + tail
    if ids and bos is not None and ids[0] == bos:
        counted[0] = False
    return Encoded(ids, counted)


def pad_id(tokenizer: "PreTrainedTokenizerBase", embeddings: int | None = None) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS, else 0 (padding is masked and never counted).

    Args:
        tokenizer: The model's tokenizer.
        embeddings: How many tokens the model has embeddings of (`vocabulary`); a pad token that was added to the
            tokenizer alone has none, and any other is as good.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    found = next((candidate for candidate in candidates if candidate is not None), 0)
    return found if embeddings is None or found < embeddings else 0


def positions(model: "PreTrainedModel") -> int | None:
    """The longest sequence that a model can take, in tokens; None: there is no bound."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def vocabulary(model: "PreTrainedModel") -> int:
    """How many tokens a model has embeddings of."""
    embedding: Any = model.get_input_embeddings()
    return embedding.num_embeddings


def make_batches(
    sets: Sequence[Sequence[Encoded]], *, batch_size: int | None, max_tokens: int, pad_id: int
) -> list[Batch]:
    """Pack the sequences of all sets together, longest first.

    Longest first shows at once whether the memory suffices, and wastes the least padding. Each set is split in halves
    (even and odd index), whose statistics stay apart, so that the stability of a ranking can be measured. The same
    input always gives the same batches.

    Args:
        sets: The encoded sequences of each set, at most 64 sets.
        batch_size: Sequences per batch; None: as many as keep rows * longest row <= max_tokens, but at least one.
        max_tokens: The bound, padding included, used where batch_size is None.
        pad_id: Token id of the padding.

    Returns:
        The batches; each sequence is in exactly one.

    Raises:
        SsahError: If batch_size is less than 1.
    """
    if batch_size is not None and batch_size < 1:
        raise SsahError(f"batch_size is {batch_size}; it must be 1 or more")
    order = sorted(
        ((s, i) for s, members in enumerate(sets) for i in range(len(members))),
        key=lambda at: (-len(sets[at[0]][at[1]].ids), at),
    )
    lengths = [len(sets[s][i].ids) for s, i in order]
    parts = cut(lengths, batch_size, max_tokens)
    return [_make_batch(sets, order[part], lengths[part.start], pad_id) for part in parts]


def cut(lengths: Sequence[int], batch_size: int | None, max_tokens: int) -> Iterator[slice]:
    """Which sequences make a batch, as `make_batches` packs them.

    Args:
        lengths: Tokens of the sequences, longest first.
        batch_size: See there.
        max_tokens: See there.
    """
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + (batch_size or max(1, max_tokens // lengths[start])))
        yield slice(start, stop)
        start = stop


def _make_batch(sets: Sequence[Sequence[Encoded]], rows: list[tuple[int, int]], width: int, pad_id: int) -> Batch:
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    group = torch.full((len(rows), width), -1, dtype=torch.int8)
    for row, (s, i) in enumerate(rows):
        sequence = sets[s][i]
        length = len(sequence.ids)
        input_ids[row, :length] = torch.tensor(sequence.ids)
        attention_mask[row, :length] = 1
        group[row, :length][torch.tensor(sequence.counted)] = 2 * s + i % 2
    return Batch(input_ids, None if bool(attention_mask.all()) else attention_mask, group, rows)
