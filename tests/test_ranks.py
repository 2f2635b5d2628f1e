"""Processes of one run: the moments of all become those of one process, whatever happens to one of them is said.

Processes are forked from here, which takes milliseconds; tests/test_resume.py starts some through torchrun.
"""

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssah_fast import ranks
from ssah_fast.errors import RunError, SsahError
from ssah_fast.progress import Stopped, stopping
from ssah_fast.ranks import Ranks, join, merge
from ssah_fast.scores import chan_merge

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GROUPS, CHANNELS = 4, 7


def sample(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(GROUPS, 5 + seed, CHANNELS, generator=generator, dtype=torch.float64) * 3 + 100


def state_of(x: Tensor) -> dict[str, Tensor]:
    mean = x.mean(1)
    m2 = (x - mean[:, None]).square().sum(1)
    count = torch.full((GROUPS,), x.shape[1])
    return {"a.mlp.count": count, "a.mlp.mean": mean, "a.mlp.m2": m2, "a.mlp.norm": torch.arange(7.0).double()}


def fork(world: int, work: Callable[[Ranks], None], estimator: str = "variance") -> list[int]:
    """Run `work` in processes that join each other, in this order of ranks.

    Returns:
        The exit status of each (os.waitstatus_to_exitcode); 77 is an exception, whose traceback is on stderr.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 77
            try:
                signal.alarm(60)  # two that wait for each other would wait for days
                torch.set_num_threads(1)
                values = (rank, world, rank, world, "127.0.0.1", port)
                os.environ.update({name: str(value) for name, value in zip(TORCHRUN, values, strict=True)})
                with join(estimator) as mine:
                    work(mine)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def variables(**changes: str) -> dict[str, str]:
    """What torchrun sets for the first of two processes."""
    return {**dict(zip(TORCHRUN, ("0", "2", "0", "2", "127.0.0.1", "1"), strict=True)), **changes}


@pytest.fixture
def environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize("world", [2, 3])
def test_gather_equals_one_process_and_repeats(tmp_path, world):
    """Rank 1 has seen nothing of b, rank 0 nothing of c; rank 2 nothing at all."""
    states: list[dict[str, Tensor]] = []
    for rank in range(2):
        extra = state_of(sample(10 + rank))
        other = {f"{'b' if rank == 0 else 'c'}{key[1:]}": value for key, value in extra.items()}
        states.append({**state_of(sample(rank)), **other})
    states.append({})

    def work(mine: Ranks) -> None:
        mine.agree({"data": {"sha256": "x"}})
        assert mine.smallest(7 - mine.rank) == 8 - world
        for repeat in range(2):
            total = mine.gather(states[mine.rank])
            assert (total is None) == (mine.rank > 0)
            if total is not None:
                torch.save(total, tmp_path / str(repeat))
        mine.barrier()
        assert (tmp_path / "1").exists()

    assert fork(world, work) == [0] * world
    first, second = (torch.load(tmp_path / str(repeat)) for repeat in range(2))
    whole = state_of(torch.cat([sample(0), sample(1)], 1))
    expected = {**states[0], **states[1], **whole}
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-13, atol=0)
        if not key.startswith("a"):
            assert torch.equal(first[key], value)
    keys = ("a.mlp.count", "a.mlp.mean", "a.mlp.m2")
    exact = chan_merge(*(states[0][key] for key in keys), *(states[1][key] for key in keys))
    assert all(torch.equal(first[key], value) for key, value in zip(keys, exact, strict=True))


def test_one_process_needs_no_other(environment):
    environment(**variables(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="nowhere"))
    for estimator in ("variance", "flap"):
        with join(estimator) as mine:
            assert mine == Ranks(0, 1, 0, 1) and mine.share(range(3)) == [0, 1, 2] and mine.device("auto") == "auto"
            mine.agree({"a": 1})
            mine.barrier()
            state = state_of(sample(0))
            assert mine.smallest(5) == 5 and mine.gather(state).keys() == state.keys()
    assert not torch.distributed.is_initialized()


def test_batches_are_dealt_out():
    shares = [Ranks(rank, 3, rank).share("abcdefg") for rank in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert Ranks(2, 3, 2).share("ab") == []


@pytest.mark.parametrize(
    "given, message",
    [
        ({"RANK": "0"}, "the environment has RANK but no WORLD_SIZE; start with torchrun"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, "the environment has WORLD_SIZE but no RANK"),
        (variables(WORLD_SIZE="two"), "WORLD_SIZE='two' in the environment is no number"),
        (variables(RANK="2"), "RANK=2 in the environment is not below WORLD_SIZE=2"),
    ],
    ids=["rank alone", "no rank", "no number", "rank too large"],
)
def test_wrong_variables(environment, given, message):
    environment(**given)
    with pytest.raises(SsahError, match=message), join("variance"):
        pass


def test_flap_is_not_shared(environment):
    environment(**variables())
    with pytest.raises(SsahError, match=r"'flap' depends on the order .* shared by 2 processes"), join("flap"):
        pass


def test_other_variables_of_a_cluster_mean_nothing(environment):
    environment(MASTER_ADDR="10.0.0.1", MASTER_PORT="1")
    with join("variance") as mine:
        assert mine == Ranks()


def test_each_process_takes_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    mine = Ranks(rank=5, world=8, local_rank=1)
    assert [mine.device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    with pytest.raises(SsahError, match=r"process 2 of this machine has no GPU, there are 2; start .*-per-node 2"):
        Ranks(2, 3, 2).device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mine.device("auto") == "auto"


def test_different_runs_are_refused_by_all():
    def work(mine: Ranks) -> None:
        with pytest.raises(SsahError, match=r"process 1 runs something else .* its data\.n is 1 and not 0"):
            mine.agree({"data": {"n": mine.rank, "long": "x" * 1000 * mine.rank}})

    assert fork(2, work) == [0, 0]


def test_different_weights_are_refused():
    state = state_of(sample(0))
    with pytest.raises(SsahError, match=r"weights of a\.mlp differ between the processes"):
        merge(state, {**state, "a.mlp.norm": state["a.mlp.norm"] + 1})


@pytest.mark.parametrize("waiting", ["agree", "gather", "barrier"])
def test_a_dead_process_is_noticed(waiting):
    def work(mine: Ranks) -> None:
        if mine.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        arguments = {"agree": [{}], "gather": [state_of(sample(0))], "barrier": []}
        with pytest.raises(RunError, match=r"another process of this run has ended.* the same command continues"):
            getattr(mine, waiting)(*arguments[waiting])
        os._exit(3)

    assert fork(2, work) == [3, -signal.SIGKILL]


@pytest.mark.parametrize("number, error", [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_wait_for_a_slow_process(tmp_path: Path, number, error):
    def work(mine: Ranks) -> None:
        if mine.rank == 1:
            pid = int(wait_for(tmp_path / "0").read_text())
            os.kill(pid, number)
            wait_for(tmp_path / "stopped")
            os._exit(4)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stopping())
            (tmp_path / "new").write_text(str(os.getpid()))
            os.replace(tmp_path / "new", tmp_path / "0")
            start = time.monotonic()
            with pytest.raises(error, match="the same command continues"):
                mine.gather(state_of(sample(0)), lambda: stop.leave("x.progress"))
            assert time.monotonic() - start < 30
            (tmp_path / "stopped").touch()
            os._exit(5)

    assert fork(2, work) == [5, 4]


def wait_for(path: Path) -> Path:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path


def test_patience_fits_gloo():
    """Its timeouts are 32-bit numbers of milliseconds; a smaller patience would end a run whose ranks are unequal."""
    assert 2**30 < ranks._PATIENCE.total_seconds() * 1000 < 2**31
