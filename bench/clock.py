"""Times calls on a device, with nothing of their inputs in its caches, and watches its memory.

On the CPU a time is that of the wall clock. On a GPU it is what lies between two events on the stream, so that the
host's way to the first kernel does not count: before the first event the device gets enough work (reads that sweep its
cache) to be busy until the host has queued the whole call.
"""

import gc
import time
from collections.abc import Callable
from os import sysconf
from pathlib import Path

import torch
from torch import Tensor

from ssah_fast import _C

Call = Callable[[], object]

UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not tell the size of the last-level cache
READ_BYTES = 1 << 30  # on a GPU; on the CPU it is six times the cache
MOST_SWEEPS = 64  # before a timed run on a GPU: after them, a call that still is not queued waits for the device itself
PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices whose product shows the matmul rate


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return normal noise [shape]: zeros would flatter a kernel (one value in every lane, no carries)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def cache_bytes() -> int:
    """Return the size of the CPU's last-level cache."""
    try:
        return sysconf("SC_LEVEL3_CACHE_SIZE") or UNKNOWN_CACHE
    except (ValueError, OSError):
        return UNKNOWN_CACHE


class Clock:
    """Times calls on the CPU.

    Attributes:
        device: What it times.
        rounds: How many rounds a case gets at most, if nothing else is said.
        warmup: How many rounds before them.
        read_bytes: What `read` reads.
        copy_bytes: What `copy` reads and writes together.
    """

    rounds, warmup = 15, 2

    def __init__(self, device: torch.device) -> None:
        """Fill the buffers that are read and copied with noise."""
        self.device = device
        swept, read = self._sizes()
        # Two, so that the sweep leaves nothing of what is read next in the cache.
        self._swept, self._read = (
            torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device) for size in (swept, read)
        )
        self._copy = torch.zeros_like(self._read[: self._read.numel() // 2])
        self._matrices: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self.read_bytes, self.copy_bytes = self._read.nbytes, 2 * self._copy.nbytes

    def _sizes(self) -> tuple[int, int]:
        return 2 * cache_bytes(), 6 * cache_bytes()

    def sweep(self) -> None:
        """Replace the contents of the last-level cache, and write back what in it was dirty."""
        self._read_all(self._swept)

    def _read_all(self, buffer: Tensor) -> None:
        _C.stream_read(buffer.data_ptr(), buffer.nbytes, torch.get_num_threads())

    def read(self) -> None:
        """Read memory: the bandwidth that others are compared with."""
        self._read_all(self._read)

    def copy(self) -> None:
        """Copy memory: as `read`, for what also writes."""
        self._copy.copy_(self._read[: self._copy.numel()])

    def product(self, dtype: torch.dtype) -> tuple[Call, int]:
        """Return a product of two square matrices and its number of floating-point operations."""
        size = PRODUCT[self.device.type]
        if dtype not in self._matrices:
            self._matrices[dtype] = (
                noise((size, size), dtype, 0, self.device),
                noise((size, size), dtype, 1, self.device),
            )
        a, b = self._matrices[dtype]
        return lambda: a @ b, 2 * size**3

    def seconds(self, call: Call, host: bool = False) -> float:
        """Run a call and return how long it took.

        Args:
            call: What to run.
            host: Whether the host's part counts, too: on a GPU, the wall clock until the device is done.
        """
        self.sweep()
        return self._wall(call)

    def release(self) -> None:
        """Free what the case before has left, models in reference cycles among it."""
        gc.collect()

    def _wall(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class DeviceClock(Clock):
    """Times calls on a CUDA device."""

    rounds, warmup = 30, 4

    def __init__(self, device: torch.device) -> None:
        """As for the CPU; a device without index is the current one."""
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_device(index)
        self._sweeps = 1
        super().__init__(torch.device("cuda", index))

    def _sizes(self) -> tuple[int, int]:
        return 4 * torch.cuda.get_device_properties(self.device).L2_cache_size, READ_BYTES

    def _read_all(self, buffer: Tensor) -> None:
        # A sum only reads: what a memset left dirty in the cache would be written back during the timed run.
        buffer.view(torch.float32).sum()

    def seconds(self, call: Call, host: bool = False) -> float:
        """Run a call and return how long the device took, or with ``host`` both together."""
        if host:
            self.sweep()
            torch.cuda.synchronize(self.device)
            return self._wall(lambda: self._finish(call))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._sweeps):
            self.sweep()
        start.record()
        call()
        end.record()
        if start.query():  # the device was there before the host had queued all: more to do for it the next time
            self._sweeps = min(2 * self._sweeps, MOST_SWEEPS)
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _finish(self, call: Call) -> None:
        call()
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """As on the CPU; and memory that torch keeps for sizes that the next case has no use for."""
        super().release()
        torch.cuda.empty_cache()


def make_clock(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return (DeviceClock if device.type == "cuda" else Clock)(device)


def reset_peak(device: torch.device) -> float | None:
    """Let the peak of the memory in use start anew.

    On the CPU that is the process's resident memory, on a GPU what torch has handed out.

    Returns:
        The MiB now in use; None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return None
    return _resident_mib("VmRSS")


def peak_mib(device: torch.device) -> float:
    """Return the most memory in use since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _resident_mib("VmHWM")


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
