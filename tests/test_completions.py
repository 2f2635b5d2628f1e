import json
from dataclasses import replace

import pytest

from ssah_fast.errors import ResumeError, SsahError
from ssah_fast.evaluation.completions import NAME, Completion, CompletionFile, read_completions

SETTINGS = {"model": {"name": "m"}, "seed": 0, "pair": (1, 2)}


def completion(index: int, text: str = "an answer, with a line\nbreak and an umlaut: ä") -> Completion:
    return Completion("asr", index, 0, "none", "", f"prompt {index}", text, 7, True, 0.1 + index)


def batches(*sizes: int) -> list[list[Completion]]:
    numbers = iter(range(100))
    return [[completion(next(numbers)) for _ in range(size)] for size in sizes]


def filled(folder, *sizes):
    file = CompletionFile(folder, SETTINGS)
    for batch in batches(*sizes):
        file.append(batch)
    return folder / NAME


def test_what_is_appended_is_read_and_taken_again(tmp_path):
    path = filled(tmp_path, 3, 3, 1)
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"kind": "completions", "schema": 1, "settings": {**SETTINGS, "pair": [1, 2]}}
    assert len(lines) == 7 and lines[4]["prompt"] == "prompt 4" and "ä" in lines[4]["text"]
    settings, saved = read_completions(tmp_path)
    assert settings == header["settings"] and saved == batches(7)[0]
    assert CompletionFile(tmp_path, SETTINGS).take([3, 3, 1]) == batches(3, 3, 1)


@pytest.mark.parametrize("lost", [1, 40, 200], ids=["the last byte", "part of a line", "more than a line"])
def test_a_torn_line_and_its_batch_are_dropped_and_the_file_ends_the_same(tmp_path, lost):
    path = filled(tmp_path, 3, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    file = CompletionFile(tmp_path, SETTINGS)
    assert file.take([3, 3]) == batches(3, 3)[:1]
    file.append(batches(3, 3)[1])
    assert path.read_bytes() == whole


def test_calls_that_share_a_file_take_their_own_parts(tmp_path):
    path = filled(tmp_path, 2, 2)
    file = CompletionFile(tmp_path, SETTINGS)
    assert file.take([2]) == batches(2)
    assert file.take([2, 1]) == [batches(2, 2)[1]]
    file.append([completion(4)])
    assert len(path.read_text().splitlines()) == 6


def test_completions_of_other_settings_are_refused_by_the_first_difference(tmp_path):
    filled(tmp_path, 1)
    with pytest.raises(ResumeError, match=r"settings\.model\.name is 'other' here and 'm' there.*--fresh") as caught:
        CompletionFile(tmp_path, {**SETTINGS, "model": {"name": "other"}, "seed": 1})
    assert caught.value.exit_code == 4
    CompletionFile(tmp_path, {"seed": 1}, fresh=True)
    assert read_completions(tmp_path) == ({"seed": 1}, [])


def test_a_file_without_completions_may_have_had_other_settings(tmp_path):
    CompletionFile(tmp_path, SETTINGS)
    CompletionFile(tmp_path, {"seed": 1}).append([completion(0)])
    assert read_completions(tmp_path) == ({"seed": 1}, [completion(0)])


def test_a_torn_header_is_begun_anew(tmp_path):
    (tmp_path / NAME).write_text('{"kind": "comp')
    CompletionFile(tmp_path, SETTINGS).append([completion(0)])
    assert read_completions(tmp_path)[1] == [completion(0)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"kind": "units", "schema": 1, "settings": {}}\n', "its beginning.*units"),
        ('{"kind": "completions", "schema": 2, "settings": {}}\n', "schema 2"),
        ('{"kind": "completions", "schema": 1, "settings": {}}\n{"set": "asr"}\n', "its beginning"),
        ("not json\n", "its beginning"),
        ("[]\n", "its beginning"),
    ],
)
def test_other_files_are_not_taken_for_ours(tmp_path, text, reason):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(SsahError, match=f"is not a completions file.*{reason}.*--fresh"):
        CompletionFile(tmp_path, SETTINGS)
    assert (tmp_path / NAME).read_text() == text
    CompletionFile(tmp_path, SETTINGS, fresh=True)


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = filled(tmp_path, 3)
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:10]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SsahError, match="damaged at line 3"):
        read_completions(tmp_path)


def test_a_folder_without_completions_says_what_to_do(tmp_path):
    with pytest.raises(SsahError, match=r"no completions\.jsonl; generate first"):
        read_completions(tmp_path)


def test_nan_is_never_written(tmp_path):
    path = filled(tmp_path, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        CompletionFile(tmp_path, SETTINGS).append([replace(completion(1), nll=float("nan"))])
    assert path.read_bytes() == before
