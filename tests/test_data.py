"""Reading sources, marking tokens and packing batches."""

import csv
import json
import random
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ssah_fast.data import Encoded, Pair, encode, encode_prompts, load_pairs, make_batches, pad_id, prompt_digest
from ssah_fast.errors import SsahError

PAIRS = [Pair(f"ask {i}", f"tell {i}") for i in range(5)]
RECORDS = [pair._asdict() for pair in PAIRS]


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def read(source, **options):
    return load_pairs(source, nsamples=None, **options).pairs


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_json(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def write_json_data(path, records):
    return write_json(path, {"version": 1, "data": records})


def write_csv(path, records):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def write_parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


WRITERS = {
    "jsonl": (write_jsonl, "a.jsonl"),
    "json": (write_json, "a.json"),
    "json-data": (write_json_data, "b.json"),
    "csv": (write_csv, "a.csv"),
    "parquet": (write_parquet, "a.parquet"),
}


# sources


@pytest.mark.parametrize(("write", "name"), WRITERS.values(), ids=WRITERS)
def test_every_format_gives_the_same_pairs(tmp_path, write, name):
    path = write(tmp_path / name, RECORDS)
    found = load_pairs(path, nsamples=None)
    assert found.pairs == PAIRS
    assert found.sources == [str(path)]
    assert found.available == 5
    assert found.sha256 == load_pairs(RECORDS, nsamples=None).sha256


def test_txt_and_lists_of_strings_are_texts_without_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone line\r\n\n  \nanother\n".encode())
    write_json(tmp_path / "a.json", ["one line", "", "another"])
    expected = [Pair("", "one line"), Pair("", "another")]
    assert read(tmp_path / "a.txt") == expected
    assert read(tmp_path / "a.json") == expected


def test_csv_with_byte_order_mark_quotes_line_breaks_and_a_large_field(tmp_path):
    large = "word " * 40_000  # 200 kB, past the limit of the csv module
    path = tmp_path / "a.csv"
    path.write_text(f'\ufeffgoal,target\n"say ""a"", b","one\ntwo"\nlong,{large}\n', encoding="utf-8")
    before = csv.field_size_limit()
    assert read(path) == [Pair('say "a", b', "one\ntwo"), Pair("long", large)]
    assert csv.field_size_limit() == before


def test_unicode_line_separators_do_not_split_a_jsonl_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path) == [Pair("", "one\u2028two")]


def test_several_sources_are_concatenated_and_drawn_together(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", RECORDS[:3])
    second = write_csv(tmp_path / "b.csv", RECORDS[3:])
    both = load_pairs(f"{first}, {second}", nsamples=4, seed=1)
    assert both.sources == [str(first), str(second)]
    assert both.available == 5
    assert both.pairs == load_pairs(RECORDS, nsamples=4, seed=1).pairs
    assert read(f"{first},{second}") == PAIRS


def test_a_file_name_with_a_comma_is_one_file(tmp_path):
    path = write_jsonl(tmp_path / "a,b.jsonl", RECORDS)
    assert read(str(path)) == PAIRS
    assert read(path) == PAIRS


HUB_CASES = {
    "org/name": ("org/name", None, "train", 5),
    "name": ("name", None, "train", 5),
    "org/name:cfg": ("org/name", "cfg", "train", 5),
    "org/name:cfg:test": ("org/name", "cfg", "test", 5),
    "org/name::test": ("org/name", None, "test", 5),
    "org/name:cfg:test:2": ("org/name", "cfg", "test", 2),
    "org/name:::99": ("org/name", None, "train", 5),
    "org/name::test[1:3]:2": ("org/name", None, "test[1:3]", 2),
}


@pytest.mark.parametrize("source", HUB_CASES)
def test_hub_id(datasets, monkeypatch, source):
    calls = []

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    path, name, split, count = HUB_CASES[source]
    assert read(source) == PAIRS[:count]
    assert calls == [(path, name, split)]


def test_folder_of_data_files(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set" / "train.parquet", RECORDS)
    assert read(str(tmp_path / "set")) == PAIRS
    assert read(f"{tmp_path / 'set'}::train:2") == PAIRS[:2]
    with pytest.raises(SsahError, match=r"--safety-data: cannot load .*Unknown split \"nope\""):
        read(f"{tmp_path / 'set'}::nope", argument="--safety-data")


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, "DatasetNotFoundError"], ids=str)
def test_hub_error_is_one_line(datasets, monkeypatch, kind):
    def load_dataset(*args, **kwargs):
        raise (getattr(datasets.exceptions, kind) if isinstance(kind, str) else kind)("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SsahError, match="cannot load 'org/name:cfg': no route; give a local file") as caught:
        read("org/name:cfg")
    assert "\n" not in str(caught.value)


def test_without_datasets_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        SsahError, match="--safety-data: reading 'org/name' needs datasets; install it with: pip install"
    ):
        read("org/name", argument="--safety-data")


def test_a_failed_dataset_build_names_its_cause(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"a": 1}\n{broken\n')
    with pytest.raises(SsahError, match="JSON parse error"):
        read(str(tmp_path / "set"))


# columns

TURNS = [
    {"role": "system", "content": "rules"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "tell"},
]
SHAREGPT = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]
CONVENTIONS = {
    "prompt-response": {"prompt": "ask", "response": "tell", "text": "no", "index": "no"},
    "advbench": {"goal": "ask", "target": "tell"},
    "jailbreakbench": {"Index": "no", "Goal": "ask", "Target": "tell"},
    "alpaca": {"instruction": "ask", "input": "", "output": "tell", "text": "no"},
    "alpaca-without-input": {"instruction": "ask", "output": "tell"},
    "dolly": {"instruction": "ask", "context": "", "response": "tell", "category": "no"},
    "question-answer": {"question": "ask", "answer": "tell"},
    "prompt-completion": {"prompt": "ask", "completion": "tell"},
    "prompt-chosen": {"prompt": "ask", "chosen": "tell", "rejected": "no"},
    "prompt-chosen-turns": {"prompt": "ask", "chosen": TURNS[3:], "rejected": []},
    "conversational": {"prompt": TURNS[3:4], "completion": TURNS[4:]},
    "messages": {"messages": TURNS, "text": "no"},
    "messages-open-end": {"messages": [*TURNS, {"role": "user", "content": "no"}]},
    "conversations": {"conversations": SHAREGPT},
}


@pytest.mark.parametrize("record", CONVENTIONS.values(), ids=CONVENTIONS)
def test_convention(record):
    assert read([record]) == [Pair("ask", "tell")]


@pytest.mark.parametrize(
    "record", [{"text": "tell"}, {"content": "tell", "url": "no"}, {"text": "tell", "prompt": "no"}]
)
def test_text_column_is_a_response_without_a_prompt(record):
    assert read([record]) == [Pair("", "tell")]


def test_first_convention_wins():
    record = {"prompt": "ask", "response": "tell", "goal": "no", "target": "no", "completion": "no"}
    assert read([record]) == [Pair("ask", "tell")]


@pytest.mark.parametrize("extra, answer", [("input", "output"), ("context", "response")])
def test_an_input_follows_the_instruction_on_a_new_line(extra, answer):
    records = [{"instruction": "sort", extra: "b a", answer: "a b"}, {"instruction": "wait", answer: "ok"}]
    assert read(records) == [Pair("sort\nb a", "a b"), Pair("wait", "ok")]


@pytest.mark.parametrize("record", [{"goal": "ask"}, {"messages": TURNS[3:4]}, {"prompt": "ask", "response": None}])
def test_a_prompt_alone_is_loaded(record):
    assert read([record]) == [Pair("ask", "")]


def test_parquet_messages(tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet", [{"messages": TURNS}])) == [Pair("ask", "tell")]


OPTIONS = {
    "both": {"prompt_column": "x", "response_column": "y"},
    "prompt-only": {"prompt_column": "x"},
    "response-only": {"response_column": "y"},
    "text": {"text_column": "y"},
    "messages": {"messages_column": "z"},
}
EXPECTED = {
    "both": Pair("ask", "tell"),
    "prompt-only": Pair("ask", "known response"),
    "response-only": Pair("known prompt", "tell"),
    "text": Pair("", "tell"),
    "messages": Pair("ask", "tell"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_column_options_override_the_conventions(case):
    record = {"prompt": "known prompt", "response": "known response", "x": "ask", "y": "tell", "z": SHAREGPT}
    assert read([record], **OPTIONS[case]) == [EXPECTED[case]]


# errors a user can cause


def raises_one_line(match):
    return pytest.raises(SsahError, match=rf"(?s)\A{match}[^\n]*\Z")


@pytest.mark.parametrize("name", ["none.jsonl", "/no/such/place", "./none", "a/b/c", "none.txt,other.txt"])
def test_missing_file(name):
    with raises_one_line(f"--safety-data: file not found: {name.split(',')[0]}"):
        load_pairs(name, argument="--safety-data")


def test_missing_path_object(tmp_path):
    with raises_one_line("source: file not found"):
        load_pairs(tmp_path / "none")


BROKEN = {
    "jsonl": ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "line 3 is not valid JSON"),
    "json": ("a.json", b'[{"text": "x"},\n oops]', "line 2 is not valid JSON"),
    "json-no-list": ("a.json", b'{"rows": []}', "must hold a list"),
    "csv-quote": ("a.csv", b'prompt,response\n"a"b,c\n', "it is not valid CSV after line 1"),
    "csv-short": ("a.csv", b"prompt,response\na,b\nc\n", "line 3 has not as many fields"),
    "csv-long": ("a.csv", b"prompt,response\na,b,c\n", "line 2 has not as many fields"),
    "parquet": ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
    "parquet-empty": ("a.parquet", b"", "not a readable parquet file"),
    "latin-1": ("a.txt", "caf\xe9".encode("latin-1"), "not UTF-8 text"),
    "suffix": ("a.tsv", b"prompt\tresponse\n", "unsupported file type; use .jsonl, .json, .csv, .txt, .parquet"),
    "empty-jsonl": ("a.jsonl", b"", "holds no text"),
    "empty-json": ("a.json", b"[]", "holds no text"),
    "empty-csv": ("a.csv", b"prompt,response\n", "holds no text"),
    "empty-txt": ("a.txt", b"\n \n", "holds no text"),
    "scalar-row": ("a.json", b'[{"text": "x"}, 3]', "row 2 of .* is a int"),
    "number": ("a.jsonl", b'{"prompt": "x", "response": 3}\n', "row 1 of .* column 'response' holds a int"),
    "both-empty": ("a.csv", b"prompt,response\na,b\n , \n", "row 2 of .* both its prompt and its response are empty"),
    "row-without-column": ("a.jsonl", b'{"prompt": "x", "response": "y"}\n{"prompt": "x"}\n', "row 2 of .* no column"),
    "surrogate": ("a.jsonl", b'{"text": "x\\ud83d"}\n', "row 1 of .* half of a surrogate pair"),
    "unknown-columns": ("a.csv", b"x,y\n1,2\n", "no known columns in .* it has x, y; name yours with --prompt-column"),
    "messages-text": ("a.jsonl", b'{"messages": "x"}\n', "row 1 of .* no list of messages"),
    "messages-strings": ("a.jsonl", b'{"messages": ["x"]}\n', "row 1 of .* a message must be"),
    "messages-no-user": ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "no user turn"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with raises_one_line(f"--utility-data: .*{message}"):
        load_pairs(tmp_path / name, argument="--utility-data")


def test_wrong_column_lists_those_that_exist(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"goal": "ask", "target": "tell"}])
    with raises_one_line(r"--safety-data: .* has no column 'goals' \(--prompt-column\); it has goal, target"):
        load_pairs(path, prompt_column="goals", argument="--safety-data")
    with raises_one_line(r"source: .* has no column 'x' \(text_column\); it has goal, target"):
        load_pairs(path, text_column="x")


def test_bad_arguments():
    with raises_one_line("--nsamples is 0; it must be 1 or more"):
        load_pairs(RECORDS, nsamples=0, argument="--safety-data")
    with raises_one_line("source: text_column and messages_column exclude each other"):
        load_pairs(RECORDS, text_column="prompt", messages_column="response")
    with raises_one_line("source: a list must hold records"):
        load_pairs(["a.jsonl", "b.jsonl"])
    with raises_one_line("source: a list in memory holds no text"):
        load_pairs([])
    for empty in ("", " , "):
        with raises_one_line("source is empty"):
            load_pairs(empty)
    for source in ("org/name:cfg:test:0", "org/name:cfg:test:x", "org/name:cfg:test:1:2"):
        with raises_one_line(f"source: '{source}' is not name:config:split:N"):
            load_pairs(source)


# the draw


def test_draw_is_a_seeded_shuffle():
    order = list(range(5))
    random.Random(3).shuffle(order)
    drawn = load_pairs(RECORDS, nsamples=2, seed=3)
    assert drawn.pairs == [PAIRS[i] for i in order[:2]]
    assert drawn.available == 5
    assert load_pairs(RECORDS, nsamples=99, seed=3).pairs == [PAIRS[i] for i in order]


def test_hash_depends_on_content_and_order_alone():
    assert load_pairs(RECORDS, nsamples=3).sha256 == load_pairs(RECORDS, nsamples=3).sha256
    assert load_pairs(RECORDS, nsamples=3).sha256 != load_pairs(RECORDS, nsamples=3, seed=1).sha256
    moved = [{"prompt": "ask 0tell", "response": " 0"}]
    assert load_pairs(moved).sha256 != load_pairs(RECORDS[:1]).sha256


# encoding

VOCAB = ["<pad>", "<s>", "</s>", "<u>", "<a>", "<unk>", *"abcdefghij"]
ID = {token: i for i, token in enumerate(VOCAB)}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <u> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <a>{% endif %}"
)


def make_tokenizer(front=True, back=False, template=TEMPLATE, unk="<unk>", **special):
    # Without an unknown token a text of unknown words has no token at all; WordLevel always wants one.
    core = Tokenizer(models.WordLevel(ID, unk_token=unk) if unk else models.BPE(ID, []))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = f"{'<s> ' if front else ''}$A{' </s>' if back else ''}"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": unk} | special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **special, extra_special_tokens=["<u>", "<a>"], model_max_length=4
    )
    tokenizer.chat_template = template
    return tokenizer


def ids(text):
    return [ID[token] for token in text.split()]


def marks(text):
    return [mark == "1" for mark in text.replace(" ", "")]


CHAT = "<s> <u> a b <a> c d e"
COUNTED = {"response": "00000 111", "prompt": "01111 000", "all": "01111 111"}


@pytest.mark.parametrize("tokens", COUNTED)
@pytest.mark.parametrize("front", [True, False], ids=["adds-bos", "adds-none"])
@pytest.mark.parametrize("back", [True, False], ids=["adds-eos", "no-eos"])
def test_chat_counts_exactly_what_was_asked(tokens, front, back):
    """The template writes the BOS; a tokenizer that adds one by itself must not double it."""
    encoded = encode([Pair("a b", "c d e")], make_tokenizer(front, back), tokens=tokens)
    assert encoded == [Encoded(ids(CHAT), marks(COUNTED[tokens]))]


@pytest.mark.parametrize("tokens", COUNTED)
@pytest.mark.parametrize("back", [True, False], ids=["adds-eos", "no-eos"])
def test_without_template(tokens, back):
    encoded = encode([Pair("a b", "c")], make_tokenizer(back=back), tokens=tokens, chat_template=False)
    assert encoded == [Encoded(ids("<s> a b c"), marks({"response": "0001", "prompt": "0110", "all": "0111"}[tokens]))]


def test_prompt_ends_with_a_line_break_without_template():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "\n": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert encode([Pair("a", "b")], tokenizer, chat_template=False) == [Encoded([1, 2, 3], [False, False, True])]


@pytest.mark.parametrize("chat_template", [True, False])
def test_text_without_prompt_gets_no_template(chat_template):
    encoded = encode([Pair("", "a b c")], make_tokenizer(back=True), chat_template=chat_template)
    assert encoded == [Encoded(ids("<s> a b c"), marks("0111"))]


def test_bos_spelled_in_the_text_is_not_doubled_and_not_counted():
    tokenizer = make_tokenizer()
    assert encode([Pair("", "<s> a b")], tokenizer) == [Encoded(ids("<s> a b"), marks("011"))]
    plain = encode([Pair("<s> a", "b")], tokenizer, tokens="all", chat_template=False)
    assert plain == [Encoded(ids("<s> a b"), marks("011"))]


def test_tokenizer_without_bos():
    tokenizer = make_tokenizer(front=False, bos_token=None, template=TEMPLATE.replace("{{ bos_token }}", ""))
    assert tokenizer.bos_token_id is None
    assert encode([Pair("a", "b")], tokenizer, tokens="all") == [Encoded(ids("<u> a <a> b"), marks("1111"))]
    assert encode([Pair("", "a b")], tokenizer) == [Encoded(ids("a b"), marks("11"))]


def test_mixed_pairs_keep_their_order():
    encoded = encode([Pair("a", "b"), Pair("", "c"), Pair("d", "e f")], make_tokenizer())
    assert [sequence.ids for sequence in encoded] == [ids("<s> <u> a <a> b"), ids("<s> c"), ids("<s> <u> d <a> e f")]


def test_pad_equal_to_eos_changes_nothing():
    pairs = [Pair("a </s> b", "c </s>"), Pair("a", "b")]
    same = make_tokenizer(pad_token="</s>")
    assert same.pad_token_id == same.eos_token_id
    assert encode(pairs, same) == encode(pairs, make_tokenizer())
    (batch,) = make_batches([encode(pairs, same)], batch_size=None, max_tokens=99, pad_id=pad_id(same))
    assert batch.group.tolist() == [[-1] * 6 + [0, 0], [-1] * 4 + [1, -1, -1, -1]]
    assert batch.attention_mask.tolist() == [[1] * 8, [1] * 5 + [0] * 3]


def test_unknown_first_text_does_not_hide_the_bos():
    tokenizer = make_tokenizer(unk=None)
    encoded = encode([Pair("", "zzz"), Pair("", "a b")], tokenizer)
    assert encoded == [Encoded(ids("<s> a b"), marks("011"))]


def test_truncation_cuts_on_the_right():
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "left"
    pairs = [Pair("a b", "c d e"), Pair("a b c d", "e")]
    encoded = encode(pairs, tokenizer, seqlen=6)
    assert encoded == [Encoded(ids("<s> <u> a b <a> c"), marks("000001"))]
    assert len(pairs) - len(encoded) == 1


def test_long_text_gives_no_warning(caplog):
    with caplog.at_level("WARNING"):
        encode([Pair("a b c d e f", "g h i j")], make_tokenizer())
    assert not caplog.records


def test_encode_errors():
    pairs = [Pair("a", "b")]
    with raises_one_line("--safety-data: --seqlen 4 cuts off every response; raise it"):
        encode(pairs, make_tokenizer(), seqlen=4, argument="--safety-data")
    with raises_one_line("--safety-data: no pair in it has a response .*--response-column, or use --tokens prompt"):
        encode([Pair("a", "")], make_tokenizer(), argument="--safety-data")
    with raises_one_line("source: no pair in it has a prompt .*prompt_column, or use tokens response"):
        encode([Pair("", "a")], make_tokenizer(), tokens="prompt")
    with raises_one_line("source: no text in it gives a token"):
        encode([Pair("", "zzz")], make_tokenizer(unk=None), tokens="all")
    with raises_one_line("--safety-data: the tokenizer has no chat template; use --no-chat-template"):
        encode(pairs, make_tokenizer(template=None), argument="--safety-data")
    with raises_one_line("source: the tokenizer has no chat template; use chat_template=False"):
        encode(pairs, make_tokenizer(template=None))
    with raises_one_line(r"source: the tokenizer's chat template failed \(no roles\); use chat_template=False"):
        encode(pairs, make_tokenizer(template="{{ raise_exception('no roles') }}"))
    with raises_one_line("seqlen is 1; it must be 2 or more"):
        encode(pairs, make_tokenizer(), seqlen=1)
    with raises_one_line("tokens is 'last'; use response, prompt, all"):
        encode(pairs, make_tokenizer(), tokens="last")
    assert encode([Pair("", "a")], make_tokenizer(template=None)) == [Encoded(ids("<s> a"), marks("01"))]
    assert encode([Pair("a", "")], make_tokenizer(), tokens="prompt") == [Encoded(ids("<s> <u> a <a>"), marks("0111"))]


def test_pad_id():
    assert pad_id(make_tokenizer()) == 0
    assert pad_id(make_tokenizer(pad_token=None)) == ID["</s>"]
    assert pad_id(make_tokenizer(pad_token=None, eos_token=None)) == 0


# batches


def sequence(length, uncounted=1, start=10):
    return Encoded(list(range(start, start + length)), [i >= uncounted for i in range(length)])


def test_batches_go_from_long_to_short_and_ties_by_position():
    sets = [[sequence(2), sequence(5), sequence(3)], [sequence(3), sequence(5)]]
    batches = make_batches(sets, batch_size=2, max_tokens=1, pad_id=0)
    assert [batch.sequences for batch in batches] == [[(0, 1), (1, 1)], [(0, 2), (1, 0)], [(0, 0)]]
    assert all(batch.attention_mask is None for batch in batches)
    assert batches[0].group.tolist() == [[-1, 1, 1, 1, 1], [-1, 3, 3, 3, 3]]
    assert batches[1].group.tolist() == [[-1, 0, 0], [-1, 2, 2]]


def test_padding_is_on_the_right_masked_and_uncounted():
    (batch,) = make_batches([[sequence(2), sequence(4, uncounted=2)]], batch_size=None, max_tokens=8, pad_id=7)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13], [10, 11, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.group.tolist() == [[-1, -1, 1, 1], [-1, 0, -1, -1]]
    assert (batch.input_ids.dtype, batch.group.dtype) == (torch.int64, torch.int8)


def test_max_tokens_bounds_the_padded_size_but_keeps_one_sequence():
    sets = [[sequence(n) for n in (9, 4, 4, 3, 2)]]
    batches = make_batches(sets, batch_size=None, max_tokens=8, pad_id=0)
    assert [batch.sequences for batch in batches] == [[(0, 0)], [(0, 1), (0, 2)], [(0, 3), (0, 4)]]


def test_no_sequences_and_bad_batch_size():
    assert make_batches([[], []], batch_size=2, max_tokens=8, pad_id=0) == []
    with raises_one_line("batch_size is 0; it must be 1 or more"):
        make_batches([[sequence(2)]], batch_size=0, max_tokens=8, pad_id=0)


@st.composite
def encoded_sets(draw):
    """Up to three sets; every token id is unique, so that each can be followed into its batch."""
    lengths = draw(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=3))
    fresh = iter(range(1, 1000))
    return [
        [Encoded([next(fresh) for _ in range(n)], draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in row]
        for row in lengths
    ]


@settings(max_examples=100, deadline=None)
@given(encoded_sets(), st.one_of(st.none(), st.integers(1, 4)), st.integers(1, 30))
def test_each_counted_token_is_in_exactly_one_batch_with_its_group(sets, batch_size, max_tokens):
    batches = make_batches(sets, batch_size=batch_size, max_tokens=max_tokens, pad_id=0)
    expected = {
        token: 2 * s + i % 2
        for s, members in enumerate(sets)
        for i, member in enumerate(members)
        for token, counted in zip(member.ids, member.counted, strict=True)
        if counted
    }
    found = []
    widths = []
    for batch in batches:
        rows, width = batch.input_ids.shape
        at = batch.group >= 0
        found += zip(batch.input_ids[at].tolist(), batch.group[at].tolist(), strict=True)
        widths.append(width)
        assert rows == len(batch.sequences)
        assert rows <= batch_size if batch_size else rows == 1 or rows * width <= max_tokens
        mask = batch.input_ids > 0
        assert batch.attention_mask is None if mask.all() else torch.equal(batch.attention_mask, mask.long())
    assert len(found) == len(expected)
    assert dict(found) == expected
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("chat_template", [True, False])
def test_prompts_are_encoded_as_those_of_pairs(chat_template):
    tokenizer = make_tokenizer(back=True)
    (whole,) = encode([Pair("a b", "c d")], tokenizer, chat_template=chat_template)
    assert encode_prompts(["a b"], tokenizer, chat_template=chat_template)[0] == whole.ids[:-2]
    system = "<s> <u> c <u> a b <a>" if chat_template else "<s> c a b"
    assert encode_prompts(["a b"], tokenizer, system="c", chat_template=chat_template) == [ids(system)]
    assert encode_prompts([], tokenizer, chat_template=chat_template) == []


def test_a_template_without_a_system_role_is_named_as_the_reason():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    with raises_one_line(r".*failed \(no system role\); leave the system prompt out, or use chat_template=False"):
        encode_prompts(["a"], make_tokenizer(template=template), system="c")


def test_a_prompt_is_recognised_whatever_its_spaces():
    assert prompt_digest("a  b\n") == prompt_digest(" a b")
    assert prompt_digest("a b") != prompt_digest("ab")
