"""The emulation of CUDA on the CPU: what is right passes there, and what is left to chance does not."""

from types import ModuleType

import cuda_on_cpu
import pytest
import torch

THREADS, BLOCKS = 96, 20


@pytest.fixture(scope="module")
def trials() -> ModuleType:
    return cuda_on_cpu.load("_trials", [cuda_on_cpu.HERE / "trials.cu"])


@pytest.fixture
def data() -> torch.Tensor:
    return torch.arange(BLOCKS * THREADS, dtype=torch.int32)


def test_blocks_exchange_through_shared_memory(trials: ModuleType, data: torch.Tensor) -> None:
    expected = data.view(BLOCKS, THREADS).flip(1).reshape(-1)
    trials.reverse(data.data_ptr(), BLOCKS)
    assert torch.equal(data, expected)


def test_a_missing_barrier_shows(trials: ModuleType, data: torch.Tensor) -> None:
    expected = data.view(BLOCKS, THREADS).flip(1).clone()
    trials.reverse_without_barrier(data.data_ptr(), BLOCKS)
    assert (data.view(BLOCKS, THREADS) != expected).any(1).all()


def test_warps_exchange(trials: ModuleType) -> None:
    values = torch.randint(-100, 100, (THREADS,), generator=torch.Generator().manual_seed(0)).double()
    expected = values.view(-1, 32).sum(1, keepdim=True).expand(-1, 32).reshape(-1)
    trials.warp_sums(values.data_ptr())
    assert torch.equal(values, expected)


def test_lanes_vote_in_turn(trials: ModuleType) -> None:
    values = torch.randint(-2, 3, (THREADS,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    positive, negative = torch.zeros(2, THREADS, dtype=torch.int32)
    trials.votes(values.data_ptr(), positive.data_ptr(), negative.data_ptr())
    for result, lanes in ((positive, values > 0), (negative, values < 0)):
        words = (lanes.view(-1, 32).long() << torch.arange(32)).sum(1, keepdim=True)
        assert torch.equal(result.view(-1, 32).long() % 2**32, words.expand(-1, 32))


def test_atomics_and_the_last_block(trials: ModuleType) -> None:
    counter, total, result = numbers = torch.zeros(3, dtype=torch.int32)
    trials.count_blocks(*(number.data_ptr() for number in (counter, total, result)), BLOCKS)
    assert numbers.tolist() == [BLOCKS, *2 * [BLOCKS * THREADS * (THREADS + 1) // 2]]


def test_threads_may_leave_before_a_barrier(trials: ModuleType) -> None:
    data = torch.zeros(40, dtype=torch.int32)
    trials.some_leave(data.data_ptr())
    assert data.tolist() == list(range(39, -1, -1))


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("half_waits", "some threads of a block wait for others that never come"),
        ("half_exchanges", "an exchange of part of a warp is not emulated"),
        ("too_many_threads", "CUDA: invalid configuration argument"),
    ],
)
def test_an_error_is_raised_and_the_next_kernel_runs(
    trials: ModuleType, data: torch.Tensor, kernel: str, error: str
) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=error):
            getattr(trials, kernel)()
        test_blocks_exchange_through_shared_memory(trials, torch.arange(BLOCKS * THREADS, dtype=torch.int32))


def test_what_does_not_compile_is_said() -> None:
    with pytest.raises(RuntimeError, match="does not compile"):
        cuda_on_cpu.build("_nothing", [cuda_on_cpu.HERE / "no_such_file.cu"])
