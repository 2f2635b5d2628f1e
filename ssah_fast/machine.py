"""What this machine has: memory that is left, and how fast it reads, multiplies and attends."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

from ssah_fast import matmul
from ssah_fast.errors import RunError

PIECE = 16 << 20  # bytes per read of weights
READS = 4  # in flight
SAMPLE = 256 << 20  # bytes of the temporary file that is read where the weights are not here
_DIRECT = getattr(os, "O_DIRECT", 0)  # past the page cache; Linux only
_UNLIMITED = 1 << 60  # a control group without a limit says this or more


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * mmap.PAGESIZE


def memory_left(device: torch.device) -> int:
    """Bytes that this process can still take on a device; on a CPU the least of what system and control groups allow.

    Args:
        device: A CPU or a CUDA device; of the latter's memory, what torch has cached counts as left.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_memory(), *_group_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), _UNLIMITED)


def _system_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _group_memory(membership: Path, mount: Path) -> Iterator[int]:
    """What is left in each control group around this process; the page cache counts as left."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            root, limit, used, cache = mount / "memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"
        elif not controllers:
            root, limit, used, cache = mount, "max", "current", "inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most = (folder / f"memory.{limit}").read_text(encoding="ascii").strip()
                now = int((folder / f"memory.{used}").read_text(encoding="ascii"))
                stat = dict(s.split() for s in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            except OSError:  # the root has no limit; a container sees no groups above its own
                continue
            if most != "max" and int(most) < _UNLIMITED:
                yield int(most) - now + int(stat.get(cache, 0))


def read_rate(files: Sequence[Path], seconds: float) -> float:
    """Measure how fast new bytes come from the disk.

    Args:
        files: Files to read pieces of, spread over all of them; none: a temporary one is written, which takes longer.
        seconds: How long to read.

    Returns:
        Bytes per second. Reads go past the page cache where the file system lets them, else the pages are dropped
        before.

    Raises:
        RunError: A file cannot be read or written.
    """
    try:
        if files:
            return _read_rate(files, seconds)
        with tempfile.NamedTemporaryFile() as file:
            for _ in range(SAMPLE // PIECE):
                file.write(os.urandom(PIECE))
            file.flush()
            os.fsync(file.fileno())
            return _read_rate([Path(file.name)], seconds)
    except OSError as error:
        raise RunError(f"cannot measure the disk: {error.filename or 'a temporary file'}: {error.strerror}") from error


def _read_rate(files: Sequence[Path], seconds: float) -> float:
    places = [(file, offset) for file in files for offset in range(0, file.stat().st_size, PIECE)]
    # Strides through all files, so that a short measurement sees every part of them.
    stride = max(1, len(places) // 64)
    order = iter([place for first in range(stride) for place in places[first::stride]])
    start = time.perf_counter()

    def read_some(_: int) -> int:
        done = 0
        with mmap.mmap(-1, PIECE) as buffer:  # O_DIRECT wants whole pages
            for place in order:
                done += _read(*place, buffer)
                if time.perf_counter() - start > seconds:
                    break
        return done

    with ThreadPoolExecutor(READS) as pool:
        done = sum(pool.map(read_some, range(READS)))
    return done / (time.perf_counter() - start)


def _read(file: Path, offset: int, buffer: mmap.mmap) -> int:
    for flag in (_DIRECT, 0):
        try:
            descriptor = os.open(file, os.O_RDONLY | flag)
        except OSError:
            if not flag:
                raise
            continue  # a file system without O_DIRECT
        try:
            if not flag and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, offset, PIECE, os.POSIX_FADV_DONTNEED)
            return os.preadv(descriptor, [buffer], offset)
        finally:
            os.close(descriptor)
    return 0


def product_rate(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    """Measure x @ weight.T as the layers compute it (`matmul.linear`), in floating-point operations per second.

    Args:
        rows: Of x.
        outputs: Rows of the weight.
        inputs: Columns of both.
        dtype: Of both.
        device: Where.
        seconds: How long to measure.
    """
    # One line of noise repeated: noise of the size of a weight takes longer than the measurement.
    x, weight = (torch.randn(inputs, device=device).to(dtype).repeat(size, 1) for size in (rows, outputs))
    return 2 * rows * outputs * inputs * _calls(lambda: matmul.linear(x, weight), device, seconds)


def attention_rate(
    tokens: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, eager: bool, seconds: float
) -> float:
    """Measure causal attention of one sequence, in useful floating-point operations per second: half of all pairs.

    Args:
        tokens: Of the sequence.
        heads: Number of heads.
        width: Of a head.
        dtype: Of queries, keys and values.
        device: Where.
        eager: Whether the model multiplies, adds a mask and takes the softmax by itself instead of torch's attention.
        seconds: How long to measure.
    """
    q, k, v = (torch.randn(1, heads, tokens, width, device=device).to(dtype) for _ in range(3))

    def attend() -> torch.Tensor:
        if not eager:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (q @ k.transpose(2, 3)).softmax(-1, dtype=torch.float32).to(dtype) @ v

    return 2 * heads * width * tokens**2 * _calls(attend, device, seconds)


def _calls(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls per second, the first one, which may be slow, apart."""

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with torch.inference_mode():
        call()
        start, number = finished(), 0
        while number == 0 or finished() - start < seconds:
            call()
            number += 1
        return number / (finished() - start)
