"""Saved progress: it comes back bit for bit, a kill leaves the older or the newer save, and damage is named."""

import errno
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssah_fast import files
from ssah_fast.errors import ResumeError, RunError
from ssah_fast.progress import Progress, Stopped, stopping

FINGERPRINT = {"model": {"files": {"a.safetensors": [3, "x"]}, "commit": None}, "settings": {"seqlen": 512}}
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "scores.safetensors.progress"


def progress(folder: Path, **options) -> Progress:
    return Progress(folder, options.pop("fingerprint", FINGERPRINT), **options)


def noise(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes, so that NaNs are among the floats."""
    if dtype == torch.bool:
        return torch.randint(2, shape).bool()
    size = torch.empty(shape).numel() * dtype.itemsize
    return torch.randint(256, (size,)).to(torch.uint8).view(dtype).view(shape)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def test_everything_comes_back(folder):
    torch.manual_seed(0)
    odd = [torch.tensor(3.5), torch.empty(0, 5), torch.randn(4, 6).t(), torch.randn(9)[::2], torch.empty(0).bfloat16()]
    hidden = [*(noise((3, 5), dtype) for dtype in DTYPES), *odd]
    moments = {f"model.layers.{i}.mlp.m2": t.clone() for i, t in enumerate(hidden)}
    progress(folder).save(7, 3, moments, iter(hidden), {"done": 12, "text": "\N{SNOWMAN}"})
    state = progress(folder).load()
    assert (state.layer, state.batch, state.extra) == (7, 3, {"done": 12, "text": "\N{SNOWMAN}"})
    assert list(state.moments) == list(moments) and len(state.hidden) == len(hidden)
    for a, b in zip([*moments.values(), *hidden], [*state.moments.values(), *state.hidden], strict=True):
        assert_same(a, b)
    assert_same(state.hidden[2:][-1], odd[-1])


def test_hidden_states_are_made_and_read_one_at_a_time(folder):
    made: list[weakref.ref[Tensor]] = []

    def hidden():
        for i in range(5):
            assert sum(tensor() is not None for tensor in made) <= 1  # the last one, which is replaced by this one
            tensor = torch.full((4,), float(i))
            made.append(weakref.ref(tensor))
            yield tensor

    progress(folder).save(0, 0, {}, hidden())
    state = progress(folder).load()
    assert len(made) == 5 and state.hidden[4].tolist() == [4.0] * 4


def test_in_memory_runs_have_no_hidden_states(folder):
    mine = progress(folder)
    assert mine.load() is None
    mine.save(0, 2, {"a.count": torch.arange(4)})
    state = progress(folder).load()
    assert (state.layer, state.batch, len(state.hidden), state.extra) == (0, 2, 0, {})
    mine.done()
    assert not folder.exists() and progress(folder).load() is None


def save_number(folder: Path, number: int) -> None:
    value = torch.full((3,), float(number))
    progress(folder).save(number, 0, {"x.mean": value}, iter([value, value + 0.5]))


def number_saved(folder: Path) -> int | None:
    """Which save is there; all of it must be."""
    state = progress(folder).load()
    if state is None:
        return None
    assert [t[0].item() - state.layer for t in [*state.moments.values(), *state.hidden]] == [0, 0, 0.5]
    return state.layer


def operations(monkeypatch, act) -> None:
    """Call `act(name)` before every operation on a file that a save makes."""

    def wrapped(name, function):
        def call(*args, **kwargs):
            act(name)
            return function(*args, **kwargs)

        return call

    class File:
        def __init__(self, file) -> None:
            self._file = file

        def __getattr__(self, name):
            found = getattr(self._file, name)
            return wrapped(name, found) if name in ("write", "flush") else found

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    # Unbuffered, so that every write reaches the disk before the next operation.
    opened = wrapped("open", lambda path, mode: File(open(path, mode, buffering=0)))
    monkeypatch.setattr(files, "open", opened, raising=False)
    for name in ("replace", "fsync", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))


def test_killed_between_any_two_operations(folder, monkeypatch):
    """Each save is cut short by the end of its process before its 1st, 2nd, ... operation, until one is whole."""
    seen, allowed = [], 0
    for number in range(100):
        child = os.fork()
        if child == 0:
            left = [allowed]

            def die(name, left=left):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

            operations(monkeypatch, die)
            save_number(folder, number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        seen.append(number_saved(folder))
        assert seen[-1] in (number, *seen[-2:-1], None)
        assert None not in seen or set(seen[: seen.index(None)]) <= {None}
        allowed += 1
        if status == 0:
            break
    assert status == 0 and len(seen) > 10 and seen[0] is None and seen[-1] == number
    assert os.listdir(folder / "rank-0-of-1") == ["state"]  # what the killed ones left is gone


@pytest.mark.parametrize("first", [None, 1], ids=["no save before", "a save before"])
def test_any_failing_operation_is_one_line_or_harmless(folder, monkeypatch, first):
    failures = 0
    for allowed in range(100):
        progress(folder, fresh=True).load()
        if first is not None:
            save_number(folder, first)
        left = [allowed]

        def fail(name, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        expected = 2
        with monkeypatch.context() as patch:
            operations(patch, fail)
            try:
                save_number(folder, 2)
            except RunError as error:
                failures += 1
                expected = first
                assert str(folder) in str(error) and "no space left" in str(error).lower() and "\n" not in str(error)
        assert number_saved(folder) == expected
        if left[0] >= 0:
            break
    assert failures >= 7 and expected == 2  # open, 3 tensors, index, flush, fsync, replace; not the folders' fsync


@pytest.mark.parametrize("damage", ["empty", "short", "head", "moments", "hidden", "index", "trailer", "not ours"])
def test_damage_is_named(folder, damage):
    save_number(folder, 1)
    file = folder / "rank-0-of-1" / "state"
    content = bytearray(file.read_bytes())
    places = {"head": 0, "moments": 5, "hidden": 30, "index": 60, "trailer": -20}
    if damage in places:
        content[places[damage]] ^= 1
    file.write_bytes({"empty": b"", "short": content[:-7], "not ours": b"x" * 500}.get(damage, content))
    with pytest.raises(RunError, match=r"progress in .*state is damaged; add --fresh"):
        number_saved(folder)
    assert progress(folder, fresh=True).load() is None and not folder.exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({**FINGERPRINT, "settings": {"seqlen": 256}}, "settings.seqlen is 512 in the saved run and 256 now"),
        ({**FINGERPRINT, "settings": {}}, "settings.seqlen is 512 in the saved run and null now"),
        ({**FINGERPRINT, "data": "f"}, 'data is null in the saved run and "f" now'),
        (
            {**FINGERPRINT, "model": {"files": {"a.safetensors": (3, "y")}, "commit": None}},
            'model.files.a.safetensors is [3, "x"] in the saved run and [3, "y"] now',
        ),
    ],
    ids=["value", "missing", "new", "nested"],
)
def test_another_run_is_refused(folder, changed, message):
    save_number(folder, 1)
    with pytest.raises(ResumeError) as caught:
        progress(folder, fingerprint=changed).load()
    assert str(caught.value).startswith(f"cannot continue from {folder}: {message};") and "--fresh" in str(caught.value)
    assert number_saved(folder) == 1
    assert progress(folder, fingerprint=changed, fresh=True).load() is None
    assert progress(folder).load() is None


def test_processes_keep_their_own(folder):
    for rank in (0, 1):
        progress(folder, rank=rank, world=2).save(rank, 0, {})
    assert [progress(folder, rank=rank, world=2).load().layer for rank in (0, 1)] == [0, 1]
    for rank, world in ((0, 1), (2, 3)):
        with pytest.raises(ResumeError, match=f"processes is 2 in the saved run and {world} now"):
            progress(folder, rank=rank, world=world).load()
    progress(folder, rank=0, world=2).done()
    assert progress(folder, rank=0, world=2).load() is None
    assert progress(folder, rank=1, world=2).load().layer == 1
    progress(folder, rank=1, world=2).done()
    assert not folder.exists()


def test_fresh_leaves_the_other_processes_alone(folder):
    """They may have begun and saved already."""
    for rank in (0, 1):
        progress(folder, rank=rank, world=2).save(rank, 0, {})
    assert progress(folder, rank=0, world=2, fresh=True).load() is None
    assert progress(folder, rank=1, world=2).load().layer == 1
    assert progress(folder, fresh=True).load() is None and not folder.exists()


def test_the_interval_stretches_where_saving_is_slow(folder, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    mine = progress(folder, interval=60)
    mine.load()

    def slow(seconds):
        now[0] += seconds
        yield torch.zeros(1)

    for cost, wait in ((1, 60), (2, 60), (10, 190), (1, 60)):  # 10 s are 5 % of 200 s
        mine.save(0, 0, {}, slow(cost))
        now[0] += wait - 0.5
        assert not mine.due()
        now[0] += 1
        assert mine.due()
    eager = progress(folder, interval=0)
    eager.save(0, 0, {}, slow(5))
    assert eager.due()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot save the progress in .*: Not a directory"):
        progress(tmp_path / "file").save(0, 0, {})


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_sigint_asks_first_and_acts_the_second_time():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), stopping() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt, match=r"SIGINT; the progress is in here, and the same command continues"):
            stop.leave("here")
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not reached")
    assert handlers() == before


def test_sigterm_is_an_error_of_its_own():
    before = handlers()
    with stopping() as stop:
        stop.leave("here")  # nothing was asked for
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM; the progress is in here"):
            stop.leave("here")
    assert handlers() == before and Stopped.exit_code == 143


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested is None
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_the_handlers_alone():
    seen = []

    def work():
        with stopping() as stop:
            seen.append((handlers(), stop.requested))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
