"""Freeze certificate: proof, from the files alone, that what a mask freezes is bit for bit what it was.

Both checkpoints are read once, in slices, and the bytes that are hashed are the very bytes that are compared. Equality
is equality of bytes: NaN payloads count, and -0.0 is not 0.0.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from ssah_fast import files
from ssah_fast.categories import REPORTED
from ssah_fast.checkpoints import NUMPY_DTYPES, TORCH_DTYPES, AnyTensor, Checkpoint
from ssah_fast.errors import FreezeError, SsahError
from ssah_fast.loading import stored_quantization
from ssah_fast.masks import KINDS, OTHER, Mask, Region, tensor_kind, tensor_layer
from ssah_fast.sizes import parse_size

SCHEMA = 1
OUTSIDE = "outside"
MAX_VIOLATIONS = 100
# Fields of config.json that change with every save and mean nothing for what the model computes.
_BOOKKEEPING = {"transformers_version", "_name_or_path", "use_cache"}
# A slice needs four read buffers (two checkpoints, one slice ahead), a byte per element that differs, and both sides
# widened to float32: 13 times its bytes for 8-bit weights, 15 where values are not finite.
_MEMORY_PER_SLICE = 16
_SMALLEST_SLICE = 4096
_LARGEST_SLICE = 1 << 19
_FLOATS = ("F64", "F32", "F16", "BF16")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Certificate:
    """What was compared, and the outcome.

    Attributes:
        document: the certificate as JSON-able data; docs/verify.md explains every field.
    """

    document: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every frozen element is there with the same bits."""
        return self.document["verdict"] == "pass"

    @property
    def changed_frozen(self) -> int:
        """Number of frozen elements whose bits differ; those of tensors that could not be compared are not in it."""
        return self.document["totals"]["frozen_changed"]

    @property
    def moved_by_category(self) -> dict[str, int]:
        """Per category ("scu", ..., "other" for what belongs to no unit): elements whose bits differ, frozen or not."""
        groups = self.document["categories"]
        return {name: group["frozen_changed"] + group["trainable_changed"] for name, group in groups.items()}

    def check(self) -> None:
        """Do nothing if all is well.

        Raises:
            FreezeError: a frozen element changed or could not be compared.
        """
        if self.ok:
            return
        totals, first = self.document["totals"], self.document["violations"][0]
        where = f"{first['parameter']}: {first['detail']}"
        raise FreezeError(
            f"the freeze was broken: of {totals['frozen']:,} frozen elements {totals['frozen_changed']:,} changed and "
            f"{totals['frozen_not_compared']:,} could not be compared (first: {where}); train again with "
            "MaskedAdamW and this mask, or verify with the mask of the run"
        )

    def to_json(self) -> str:
        """The certificate as JSON text."""
        return json.dumps(self.document, indent=2, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the certificate, whole or not at all.

        Raises:
            SsahError: the path cannot be written.
            RunError: the write failed, for example on a full disk.
        """
        with files.atomic_writer(path) as file:
            file.write(self.to_json().encode())


def verify(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    mask: Mask,
    *,
    memory: str | int = "1GiB",
    progress: Progress | None = None,
) -> Certificate:
    """Compare two checkpoints byte by byte, and say whether everything that `mask` freezes is the same.

    Args:
        base: the checkpoint before training: a folder in Hugging Face format or a hub id.
        tuned: the one after it; its tensors may be distributed over other files.
        mask: what is frozen; a parameter that it does not name is trainable.
        memory: bound for the buffers, "512MiB" or bytes. A sixteenth of it makes one slice, but never less than 4 KiB
            nor more than 512 KiB: larger slices were not faster.
        progress: called with the bytes of `base` done and to do.

    Returns:
        The certificate, whatever the verdict.

    Raises:
        SsahError: a folder is missing, incomplete, pickled, damaged or an adapter, or the mask is of another model.
        RunError: a file could not be read to its end.
    """
    slice_bytes = _slice_bytes(parse_size(memory))
    with ExitStack() as stack:
        before = stack.enter_context(Checkpoint("BASE", os.fspath(base)))
        after = stack.enter_context(Checkpoint("TUNED", os.fspath(tuned)))
        _check_mask(mask, before)
        report = _Report()
        pairs = [part for pair in _pairs(before, after, mask) if report.admits(pair) for part in _parts(pair)]
        pairs.sort(key=lambda part: part.before.place(part.start))  # in file order, so that a file is read once
        total, done = sum(pair.bytes for pair in pairs), 0
        scratch = _Scratch(slice_bytes)
        for pair, slices in itertools.groupby(_stream(pairs, slice_bytes), key=lambda item: item[0]):
            tally = _Tally(pair)
            for _, place, old, new in slices:
                tally.add(place, old, new, scratch)
                done += old.nbytes
                if progress is not None:
                    progress(done, total)
            report.add(pair, tally)
        return Certificate(_document(before, after, mask, report, slice_bytes))


@dataclass(frozen=True, eq=False)
class _Pair:
    """One parameter in both checkpoints, or a part of it, and its region of the mask.

    Attributes:
        name: of the parameter.
        before: the whole parameter in BASE.
        after: and in TUNED, if it is there.
        region: of the mask; None: it trains as a whole.
        start: first element of the part.
        shape: of the part, as (outer, number of the region's indices, inner).
        first: the first of these indices.
    """

    name: str
    before: AnyTensor
    after: AnyTensor | None
    region: Region | None
    start: int
    shape: tuple[int, int, int]
    first: int

    @property
    def bytes(self) -> int:
        """Size of the part in BASE."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.before.itemsize

    @property
    def frozen(self) -> np.ndarray:
        """Which indices are frozen, bool [size]."""
        size = self.shape[1]
        if self.region is None or self.region.frozen is None:
            return np.full(size, self.region is not None)
        indices = self.region.frozen
        begin, end = torch.searchsorted(indices, torch.tensor([self.first, self.first + size])).tolist()
        return torch.zeros(size, dtype=torch.bool).index_fill_(0, indices[begin:end] - self.first, True).numpy()

    @property
    def category(self) -> np.ndarray:
        """The category of every index, int8 [size]."""
        known, size = None if self.region is None else self.region.category, self.shape[1]
        return np.full(size, OTHER, np.int8) if known is None else known[self.first : self.first + size].numpy()

    def where(self, index: int) -> tuple[dict[str, int], str]:
        """The place of an index of the part, as fields of a violation and in words."""
        index, region = index + self.first, self.region
        if region is None or not region.stacked:
            axis = 0 if region is None else region.axis
            return {"axis": axis, "index": index}, f"index {index} of axis {axis}"
        expert, index = divmod(index, self.before.shape[region.axis])
        place = {"axis": region.axis, "index": index, "expert": expert}
        return place, f"index {index} of axis {region.axis} of expert {expert}"

    def kind(self, category: int) -> str:
        """One of `KINDS`; as in `Mask.summary`, what belongs to no unit in a fused projection is q and k."""
        kind = tensor_kind(self.name)
        known = self.region is not None and self.region.category is not None
        return "qk" if kind == "attention" and known and category == OTHER else kind

    @property
    def unequal(self) -> tuple[str, str] | None:
        """Why the two cannot be compared, as a word and a text; None if they can."""
        if self.after is None:
            return "missing", "it is not in TUNED"
        for word in ("dtype", "shape"):
            old, new = getattr(self.before, word), getattr(self.after, word)
            if old != new:
                return word, f"{word} {_text(old)} in BASE, {_text(new)} in TUNED"
        return None


@dataclass(frozen=True)
class _Place:
    """A slice of a pair: `shape` elements (outer, indices, inner) from `start` on, its indices from `index` on."""

    start: int
    shape: tuple[int, int, int]
    index: int


class _Scratch:
    """Memory for the comparison of one slice: 1.1 ns per byte of bf16 with it, 3.1 where every slice allocates."""

    def __init__(self, slice_bytes: int) -> None:
        self.differs = np.empty(slice_bytes, bool)
        self.old, self.new = np.empty((2, 4 * slice_bytes), np.uint8)


class _Tally:
    """What differs in one pair, per index of the region's axis."""

    def __init__(self, pair: _Pair) -> None:
        self.dtype = pair.before.dtype
        self.changed = np.zeros(pair.shape[1], np.int64)
        self.largest = np.zeros(pair.shape[1], np.float64)
        self.non_finite = np.zeros(pair.shape[1], np.int64)

    def add(self, place: _Place, old: np.ndarray, new: np.ndarray, scratch: _Scratch) -> None:
        """Count one slice; `old` and `new` are its bytes, uint8."""
        words = f"u{NUMPY_DTYPES[self.dtype].itemsize}"
        count = int(np.prod(place.shape))
        differs = np.not_equal(old.view(words), new.view(words), out=scratch.differs[:count])
        if not differs.any():
            return
        here, differs = slice(place.index, place.index + place.shape[1]), differs.reshape(place.shape)
        self.changed[here] += np.add.reduce(differs, axis=(0, 2), dtype=np.int32)
        change = _widened(new, self.dtype, scratch.new)
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(change, _widened(old, self.dtype, scratch.old), out=change)
        change = np.abs(change, out=change).reshape(place.shape)
        largest = change.max(axis=(0, 2))
        if not np.isfinite(largest).all():
            odd = ~np.isfinite(change)
            change[odd] = 0
            largest = change.max(axis=(0, 2))
            self.non_finite[here] += np.add.reduce(odd & differs, axis=(0, 2), dtype=np.int32)
        np.maximum(self.largest[here], largest, out=self.largest[here])

    def sums(self, frozen: np.ndarray, trainable: np.ndarray) -> Group:
        """Sums over some frozen and some trainable indices, each bool [size]."""
        return {
            "frozen_changed": int(self.changed[frozen].sum()),
            "trainable_changed": int(self.changed[trainable].sum()),
            "non_finite": int(self.non_finite[trainable].sum()),
            "largest_change": float(self.largest[trainable].max(initial=0.0)),
        }


_COUNTS = (
    "elements",
    "frozen",
    "frozen_changed",
    "frozen_not_compared",
    "trainable",
    "trainable_changed",
    "non_finite",
)
Group = dict[str, Any]  # the counts above and "largest_change", over a part of the model; see docs/verify.md


def _merged(groups: Iterable[Group]) -> Group:
    total: Group = {**dict.fromkeys(_COUNTS, 0), "largest_change": 0.0}
    for group in groups:
        for name, value in group.items():
            total[name] = max(total[name], value) if name == "largest_change" else total[name] + value
    return total


class _Report:
    """Sums per (layer, kind, category), violations, and what was not compared."""

    def __init__(self) -> None:
        self.groups: dict[tuple[int | None, str, int], Group] = {}
        self.violations: list[dict[str, Any]] = []
        self.violation_count = 0
        self.not_compared: list[dict[str, str]] = []

    def admits(self, pair: _Pair) -> bool:
        """Whether a pair can be compared; if not, this notes it, as a violation if anything of it is frozen."""
        found = pair.unequal
        if found is None:
            return True
        reason, detail = found
        self.not_compared.append({"parameter": pair.name, "reason": reason, "detail": detail})
        frozen = int(pair.frozen.sum()) * pair.shape[0] * pair.shape[2]
        if frozen:
            self._violate(pair, reason, detail, frozen)
        self._sum(pair, None)
        return False

    def add(self, pair: _Pair, tally: _Tally) -> None:
        """Count a pair that was compared."""
        self._sum(pair, tally)
        broken = (pair.frozen & (tally.changed > 0)).nonzero()[0]
        self.violation_count += len(broken)
        for index in broken[: MAX_VIOLATIONS - len(self.violations)].tolist():
            (place, words), count = pair.where(index), int(tally.changed[index])
            self._list(pair, "changed", f"{count:,} changed at {words}", count, **place)

    def grouped(self, by: Callable[[int | None, str, int], str], order: Iterable[str]) -> dict[str, Group]:
        """Sums by one property, in a given order; what does not occur is left out."""
        members: dict[str, list[Group]] = {}
        for key, group in self.groups.items():
            members.setdefault(by(*key), []).append(group)
        return {name: _merged(members[name]) for name in order if name in members}

    def _sum(self, pair: _Pair, tally: _Tally | None) -> None:
        frozen, category, width = pair.frozen, pair.category, pair.shape[0] * pair.shape[2]
        layer = tensor_layer(pair.name)
        for value in np.unique(category).tolist():
            held, free = (category == value) & frozen, (category == value) & ~frozen
            group = {"frozen": int(held.sum()) * width, "trainable": int(free.sum()) * width}
            group["elements"] = group["frozen"] + group["trainable"]
            group |= {"frozen_not_compared": group["frozen"]} if tally is None else tally.sums(held, free)
            key = layer, pair.kind(value), value
            self.groups[key] = _merged([self.groups.get(key, {}), group])

    def _violate(self, pair: _Pair, reason: str, detail: str, count: int) -> None:
        self.violation_count += 1
        if len(self.violations) < MAX_VIOLATIONS:
            self._list(pair, reason, detail, count)

    def _list(self, pair: _Pair, reason: str, detail: str, count: int, **where: int) -> None:
        self.violations.append({"parameter": pair.name, "reason": reason, **where, "elements": count, "detail": detail})


def _document(before: Checkpoint, after: Checkpoint, mask: Mask, report: _Report, slice_bytes: int) -> dict[str, Any]:
    buffer = np.empty(slice_bytes, np.uint8)
    base, tuned = before.sources(buffer), after.sources(buffer)
    layers = sorted({layer for layer, _, _ in report.groups if layer is not None})
    categories = {int(category): category.name.lower() for category in REPORTED} | {OTHER: "other"}
    totals = report.grouped(lambda *_: "all", ["all"]).get("all", _merged([]))
    return {
        "kind": "ssah_fast freeze certificate",
        "schema": SCHEMA,
        "verdict": "fail" if report.violation_count else "pass",
        "tool": {"name": "ssah_fast", "version": version("ssah_fast")},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "base": base,
        "tuned": tuned,
        "mask": {"sha256": mask.sha256, "provenance": mask.provenance},
        "totals": totals,
        "categories": report.grouped(lambda layer, kind, category: categories[category], categories.values()),
        "kinds": report.grouped(lambda layer, kind, category: kind, KINDS),
        "layers": report.grouped(
            lambda layer, kind, category: OUTSIDE if layer is None else str(layer), [*map(str, layers), OUTSIDE]
        ),
        "violation_count": report.violation_count,
        "violations": report.violations,
        "not_compared": report.not_compared,
        "only_in_tuned": [name for name in after.names() if before.get(name) is None],
        "config_changes": _config_changes(before, after),
        "notes": _notes(base, tuned, totals),
    }


def _config_changes(before: Checkpoint, after: Checkpoint) -> list[str]:
    """Fields of config.json that differ."""
    old, new = (json.loads(side.metadata["config.json"]) for side in (before, after))
    return sorted(key for key in {*old, *new} - _BOOKKEEPING if old.get(key) != new.get(key))


def _notes(base: Mapping[str, Any], tuned: Mapping[str, Any], totals: Mapping[str, Any]) -> list[str]:
    notes = []
    if base["files"] == tuned["files"]:
        notes.append("BASE and TUNED are the same files")
    if not totals["frozen_changed"] + totals["trainable_changed"]:
        notes.append("nothing moved: every element that was compared has the same bits")
    if not totals["frozen"]:
        notes.append("the mask freezes nothing, so there was nothing to prove")
    return notes


def _pairs(before: Checkpoint, after: Checkpoint, mask: Mask) -> Iterator[_Pair]:
    """Every parameter of BASE with its counterpart, in the order of BASE's files; tied names of one tensor once."""
    seen = set()
    for name in dict.fromkeys([*before.names(), *after.names()]):
        old, new = before.get(name), after.get(name)
        region = next((mask[alias] for alias in before.aliases(name) if alias in mask), None)
        key = (id(old), id(new), id(region))
        if old is not None and key not in seen:
            seen.add(key)
            lines = 1 if region is None else region.indices_of(old.shape)
            outer = 1 if region is None or region.stacked else math.prod(old.shape[: region.axis])
            yield _Pair(name, old, new, region, 0, (outer, lines, old.numel // max(outer * lines, 1)), 0)


def _parts(pair: _Pair) -> Iterator[_Pair]:
    """A pair in parts that lie in one piece in BASE and, of a stack, in one expert; in the order of the elements.

    Only then do the elements of an index have the distances that `_Pair.shape` says.
    """
    region, shape = pair.region, pair.before.shape
    if len(pair.before.starts) == 1 and (region is None or not region.stacked):
        yield pair
        return
    lines, inner = (
        (1, pair.before.numel) if region is None else (shape[region.axis], math.prod(shape[region.axis :][1:]))
    )
    matrix = pair.before.numel // shape[0] if region is not None and region.stacked else pair.before.numel
    stops = sorted({*pair.before.starts, *range(0, pair.before.numel, max(matrix, 1)), pair.before.numel})
    for begin, end in itertools.pairwise(stops):
        skipped = begin // matrix * matrix
        for start, part, first in _blocks(begin - skipped, end - skipped, lines, inner):
            yield replace(pair, start=start + skipped, shape=part, first=first + begin // matrix * lines)


def _blocks(begin: int, end: int, lines: int, inner: int) -> Iterator[tuple[int, tuple[int, int, int], int]]:
    """Elements begin to end of a tensor [..., lines, inner], as start, shape [outer, lines, inner] and first line."""
    block = lines * inner
    while begin < end:
        line = begin // inner % lines
        if begin % block == 0 and end - begin >= block:
            part = ((end - begin) // block, lines, inner)
        elif begin % inner == 0 and end - begin >= inner:
            part = (1, min((end - begin) // inner, lines - line), inner)
        else:
            part = (1, 1, min(end - begin, inner - begin % inner))
        yield begin, part, line
        begin += math.prod(part)


def _check_mask(mask: Mask, before: Checkpoint) -> None:
    """Refuse a mask that names what BASE does not hold, or holds in another shape or quantised."""
    known = before.model.state_dict()
    quantised = stored_quantization(before.model.config) is not None
    for name in mask:
        stored = before.get(name)
        if stored is None and name in known:
            raise SsahError(
                f"mask: {name} is not in the files of {before.name} under this name; quantised weights are stored in "
                "another form, which verify cannot compare: load the model dequantised and save it"
            )
        if stored is None:
            raise SsahError(
                f"mask of another model: it names {name}, which {before.name} lacks; use the mask of this model"
            )
        mask.trainable(name, stored.shape or (1,))
        if quantised and stored.dtype not in _FLOATS:
            raise SsahError(
                f"mask: {name} is stored as {stored.dtype} with scales beside it in {before.name}; equal bytes would "
                "prove nothing: load the model dequantised, save it, and verify against that"
            )


def _slice_bytes(memory: int) -> int:
    """Bytes per slice, a multiple of the largest element."""
    return min(max(memory // _MEMORY_PER_SLICE, _SMALLEST_SLICE), _LARGEST_SLICE) // 8 * 8


def _stream(pairs: Sequence[_Pair], slice_bytes: int) -> Iterator[tuple[_Pair, _Place, np.ndarray, np.ndarray]]:
    """The bytes of every slice of both sides; the next slice is read and hashed while one is worked on.

    One thread per side, so that the reads of a file stay in order.
    """
    buffers = np.empty((2, 2, slice_bytes), np.uint8)
    waiting: deque[tuple[_Pair, _Place, list[np.ndarray], list[Future[None]]]] = deque()
    slices = ((pair, place) for pair in pairs for place in _places(pair, slice_bytes))
    with ThreadPoolExecutor(1) as left, ThreadPoolExecutor(1) as right:
        for (pair, place), halves in zip(slices, itertools.cycle(buffers)):
            views = [half[: int(np.prod(place.shape)) * pair.before.itemsize] for half in halves]
            sides = zip((left, right), (pair.before, pair.after), views, strict=True)
            reads = [
                pool.submit(side.read, pair.start + place.start, view) for pool, side, view in sides if side is not None
            ]
            waiting.append((pair, place, views, reads))
            if len(waiting) == 2:
                yield _arrived(*waiting.popleft())
        while waiting:
            yield _arrived(*waiting.popleft())


def _arrived(
    pair: _Pair, place: _Place, views: list[np.ndarray], reads: list[Future[None]]
) -> tuple[_Pair, _Place, np.ndarray, np.ndarray]:
    for read in reads:
        read.result()
    return pair, place, views[0], views[1]


def _places(pair: _Pair, slice_bytes: int) -> Iterator[_Place]:
    """Cut a tensor into slices: several outer blocks, or several indices of one, or a part of one index."""
    outer, size, inner = pair.shape
    limit = max(slice_bytes // pair.before.itemsize, 1)
    if 0 < size * inner <= limit:
        step = limit // (size * inner)
        for block in range(0, outer, step):
            yield _Place(block * size * inner, (min(step, outer - block), size, inner), 0)
    elif inner <= limit:
        step = limit // max(inner, 1)
        for block, index in itertools.product(range(outer), range(0, size, step)):
            yield _Place((block * size + index) * inner, (1, min(step, size - index), inner), index)
    else:
        for block, index, start in itertools.product(range(outer), range(size), range(0, inner, limit)):
            yield _Place((block * size + index) * inner + start, (1, 1, min(limit, inner - start)), index)


def _widened(raw: np.ndarray, dtype: str, scratch: np.ndarray) -> np.ndarray:
    """Bytes as float32 where that holds every value, else as float64; in `scratch`. Both `raw` and it are uint8."""
    values = raw.view(NUMPY_DTYPES[dtype])
    narrow = values.itemsize <= 2 or dtype == "F32"
    result = scratch.view(np.float32 if narrow else np.float64)[: values.size]
    if dtype == "BF16":
        np.left_shift(values, 16, out=result.view(np.uint32), dtype=np.uint32)
    elif dtype.startswith("F8_"):
        table = torch.arange(256, dtype=torch.uint8).view(TORCH_DTYPES[dtype]).float().numpy()
        np.take(table, values, out=result, mode="clip")
    else:
        np.copyto(result, values)
    return result


def _text(value: str | tuple[int, ...]) -> str:
    return value if isinstance(value, str) else str(list(value))
