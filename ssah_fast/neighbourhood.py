"""The weights of a model in memory, anywhere around its checkpoint (Peng et al. 2024, arXiv 2405.17374).

Every place is computed from the pristine base, which is read again from the checkpoint: no direction and no second copy
of the model is kept, and nothing adds up on the way.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssah_fast import ops
from ssah_fast.checkpoints import TORCH_DTYPES, AnyTensor, Checkpoint
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.masks import Mask
from ssah_fast.units import canonical_name

NORMS = ("*norm*",)  # what the published landscapes leave out
_FLOATS = {name: TORCH_DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
# Elements that are worked on at once: 1 MiB in fp32, which stays in the cache. Of whole rows: one may have more.
PIECE = 1 << 18


@dataclass(frozen=True)
class RandomAxis:
    """A random direction that has each tensor's own Frobenius norm (`ops.perturb_`), so a step is noise to weight.

    Attributes:
        seed: any integer.
    """

    seed: int

    @property
    def name(self) -> str:
        """What people call it."""
        return f"random {self.seed}"


@dataclass(frozen=True)
class TowardsAxis:
    """The way from the base to another checkpoint of the same shape, which lies at a step of 1.

    Attributes:
        checkpoint: a folder in Hugging Face format or a hub id, in safetensors.
    """

    checkpoint: str

    @property
    def name(self) -> str:
        """What people call it."""
        return f"towards {Path(self.checkpoint).name}"


Axis = RandomAxis | TowardsAxis
_Term = tuple[int, float]  # the seed of a random direction, and how far along it


class Neighbourhood:
    """Moves the weights of a model along axes, and back. A context manager: when it is left, the model is the base.

    What moves: parameters, tied ones once, and floating-point buffers that checkpoints hold. Between two calls the
    model is computed with as any other, but must stay on its device and in its dtype, and not be edited.

    Args:
        model: its weights now are the base.
        axes: the directions.
        checkpoint: the folder or hub id that the model was loaded from: tensors that have the same bits there are read
            again from its files, which must not change meanwhile. The others, and without a checkpoint all, are copied
            to host memory.
        exclude: patterns (fnmatch) of lower-cased names; what matches one stays as it is along random axes.
        region: what it freezes stays as it is along every axis. The noise of the rest is that of the whole tensor.
        orthogonal: make the second of the two random axes orthogonal to the first, tensor by tensor (Gram-Schmidt),
            again with each tensor's norm.
        told: called with a line that the user should read.

    Attributes:
        axes: the directions.

    Raises:
        SsahError: a checkpoint cannot be read or is of another shape, a pattern matches no tensor, the region is of
            another model, nothing is left to move, or weights are quantised or not in memory.
        NonFiniteError: a tensor has Inf or NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Sequence[Axis],
        *,
        checkpoint: str | None = None,
        exclude: Sequence[str] = NORMS,
        region: Mask | None = None,
        orthogonal: bool = False,
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.axes = tuple(axes)
        self._seeds = {k: axis.seed for k, axis in enumerate(self.axes) if isinstance(axis, RandomAxis)}
        self._exclude, self._region, self._orthogonal = tuple(exclude), region, orthogonal
        if orthogonal and len(self._seeds) != 2:
            raise SsahError(f"orthogonal={orthogonal} is for two random axes, not for {len(self._seeds)}; leave it out")
        self._weights = _weights(model)
        if region is not None:
            region.check(model.named_parameters())
            for weight in self._weights:
                weight.flags = _moving(weight, region)
        pinned = any(weight.tensor.is_cuda for weight in self._weights)
        longest = max((piece.numel() for weight in self._weights for piece, _ in weight.pieces()), default=0)
        self._staging = torch.empty(longest * 8, dtype=torch.uint8, pin_memory=pinned)  # of float64 at most
        self._digests: dict[Axis, str] = {}
        with contextlib.ExitStack() as files:
            self._find_noise()
            self._find_targets(files)
            self._find_base(files, checkpoint, told)
            self._files = files.pop_all()

    def __enter__(self) -> Neighbourhood:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.restore()
        finally:
            self._files.close()

    def move(self, steps: Sequence[float]) -> None:
        """Set the weights to base + the sum of steps[k] axes[k], computed in float32 (float64) and rounded once.

        A step of 0 leaves its axis out; with a step of 1 towards a checkpoint, and 0 elsewhere, the weights have the
        checkpoint's bits, converted to their dtype.

        Args:
            steps: a finite number per axis.

        Raises:
            SsahError: another number of steps, or one that is not finite.
            RunError: a file cannot be read.
        """
        if len(steps) != len(self.axes) or not all(map(math.isfinite, steps)):
            raise SsahError(f"steps={list(steps)} are not {len(self.axes)} finite numbers; give one per axis")
        for weight in self._weights:
            weight.restore()
            noise = [(seed, a * far) for a, way in zip(steps, weight.noise, strict=True) if a for seed, far in way]
            targets = [(a, to) for a, to in zip(steps, weight.targets, strict=True) if a and to is not None]
            if noise or targets:
                self._move(weight, noise, targets)

    def restore(self) -> None:
        """Set the weights to the base, bit for bit; a Ctrl-C is heard when that is done.

        Raises:
            RunError: a file cannot be read.
        """
        with _uninterrupted():
            for weight in self._weights:
                weight.restore()

    @contextlib.contextmanager
    def at(self, steps: Sequence[float]) -> Iterator[None]:
        """Have the model at a place while the context lasts, and at the base afterwards.

        Args:
            steps: as for `move`, which see for the errors.
        """
        try:
            self.move(steps)
            yield
        finally:
            self.restore()

    def gram(self) -> Tensor:
        """The inner products of the axes over all weights, as far as they move: [axes, axes] float64, on the CPU.

        Reads every tensor once, and leaves the model at the base.
        """
        self.restore()
        total = torch.zeros(len(self.axes), len(self.axes), dtype=torch.float64)
        for weight in self._weights:
            if not weight.moves:
                continue
            for piece, first in weight.pieces():
                ways = self._ways(weight, piece, first)
                total += (ways @ ways.T).cpu()
        return total

    def describe(self) -> list[dict[str, Any]]:
        """What decides the weights, as JSON per axis; "name" is for people, and two of one name may differ."""
        region = None if self._region is None else self._region.sha256
        found: list[dict[str, Any]] = []
        for k, axis in enumerate(self.axes):
            entry: dict[str, Any] = {"name": axis.name, "region": region}
            if isinstance(axis, TowardsAxis):
                entry |= {"kind": "towards", "weights_sha256": self._digests[axis]}
            else:
                first, *others = self._seeds
                other = self._seeds[first] if self._orthogonal and k in others else None
                entry |= {"kind": "random", "seed": axis.seed, "exclude": [*self._exclude], "orthogonal_to": other}
            found.append(entry)
        return found

    def _find_base(self, files: contextlib.ExitStack, name: str | None, told: Callable[[str], None]) -> None:
        """Where each tensor that moves is read again from."""
        base = None
        if name is not None:
            try:
                base = files.enter_context(Checkpoint("checkpoint", name))
            except SsahError as error:  # pickled weights, for example, from which a model can be loaded all the same
                told(f"the weights cannot be read again: {error}")
        kept = 0
        for weight in self._weights:
            if not weight.moves:
                continue
            stored = [] if base is None else _stored(weight, base)
            if not stored or not self._equal(weight, stored[0]):
                copy = weight.tensor.to("cpu", copy=True)
                weight.again = functools.partial(weight.tensor.copy_, copy)
                kept += copy.nbytes
            elif (memory := _memory(weight.tensor, stored[0])) is not None:
                weight.again = functools.partial(stored[0].read, 0, memory)
            else:
                weight.again = functools.partial(self._read_all, weight, stored[0])
        if kept and name is not None:
            told(f"{kept / 2**20:,.1f} MiB of the weights are not in {name} as they are in memory; a copy is kept")

    def _find_noise(self) -> None:
        """How far the random axes go along random directions in each tensor."""
        seeds = list(self._seeds.values())
        for weight in self._weights:
            weight.noise = [[] for _ in self.axes]
        for weight in _not_excluded(self._weights, self._exclude) if seeds else ():
            if weight.still:
                continue
            try:
                scales = ops.direction_scales(weight.tensor, seeds, name=weight.name).tolist()
            except SsahError as error:
                raise NonFiniteError(f"{weight.name} cannot be moved at random: {error}") from error
            if not any(scales):  # a tensor of zeros, or of nothing
                continue
            ways = [[(seed, scale)] for seed, scale in zip(seeds, scales, strict=True)]
            if self._orthogonal:
                ways[1] = _second(weight, *ways[0][0], seeds[1])
            for k, way in zip(self._seeds, ways, strict=True):
                weight.noise[k] = way
        if seeds and not any(weight.moves for weight in self._weights):
            raise SsahError(f"exclude={','.join(self._exclude)} leaves nothing to move; exclude less")

    def _find_targets(self, files: contextlib.ExitStack) -> None:
        """What the axes towards checkpoints lead to in each tensor; None where that is the base."""
        nowhere: list[AnyTensor | None] = [None] * len(self._weights)
        found: dict[Axis, list[AnyTensor | None]] = {}
        for axis in self.axes:
            if isinstance(axis, TowardsAxis) and axis not in found:
                found[axis] = self._open(files, axis)
        for k, weight in enumerate(self._weights):
            weight.targets = tuple(found.get(axis, nowhere)[k] for axis in self.axes)

    def _open(self, files: contextlib.ExitStack, axis: TowardsAxis) -> list[AnyTensor | None]:
        """The tensors of a checkpoint, one per weight; None where nothing is to move, or it has the same bits."""
        other = files.enter_context(Checkpoint("towards", axis.checkpoint))
        stored = _counterparts(self._weights, other)
        found: list[AnyTensor | None] = [None] * len(stored)
        # In the order of the files, so that their hashes come from the same reads.
        for k in sorted(range(len(stored)), key=lambda k: stored[k].place(0)):
            if not self._weights[k].still and not self._equal(self._weights[k], stored[k]):
                found[k] = stored[k]
        hashes = [file.sha256(self._staging.numpy()) for file in other.files]
        self._digests[axis] = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        return found

    def _equal(self, weight: _Weight, stored: AnyTensor) -> bool:
        """Whether a stored tensor, converted to the dtype of the weights, has their bits."""
        if stored.dtype not in _FLOATS or _shape(stored) != list(weight.tensor.shape):
            return False
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.tensor.element_size()]
        return all(
            torch.equal(self._read(stored, piece, first).view(words), piece.contiguous().view(words))
            for piece, first in weight.pieces()
        )

    def _read(self, stored: AnyTensor, piece: Tensor, first: int) -> Tensor:
        """As many elements of a stored tensor as a piece has, from `first` on; of its shape, dtype and device.

        They may lie in the staging buffer, and are good until the next read.
        """
        buffer = self._staging[: piece.numel() * stored.itemsize]
        stored.read(first, buffer.numpy())
        return buffer.view(TORCH_DTYPES[stored.dtype]).view(piece.shape).to(piece.device, piece.dtype)

    def _read_all(self, weight: _Weight, stored: AnyTensor) -> None:
        for piece, first in weight.pieces():
            piece.copy_(self._read(stored, piece, first))

    def _move(self, weight: _Weight, noise: Sequence[_Term], targets: Sequence[tuple[float, AnyTensor]]) -> None:
        """Move a tensor from the base: so far along random directions, so far towards others."""
        weight.pristine = False
        if not targets and weight.flags is None:
            weight.add_noise(weight.tensor, noise)
            return
        for piece, first in weight.pieces():
            if not noise and [step for step, _ in targets] == [1]:
                moved = self._read(targets[0][1], piece, first)
            else:
                moved = piece.to(torch.promote_types(piece.dtype, torch.float32), copy=True)
                for step, to in targets:
                    # A product and a sum: fused in some lanes of a vector, they would round by the place in the piece.
                    moved += (self._read(to, piece, first).to(moved.dtype) - piece).mul_(step)
                weight.add_noise(moved, noise, first)
            flags = weight.flags_of(first, len(piece))
            piece.copy_(moved if flags is None else torch.where(flags, moved, piece))

    def _ways(self, weight: _Weight, piece: Tensor, first: int) -> Tensor:
        """The axes in a piece of a tensor: [axes, elements] float64."""
        ways = torch.zeros(len(self.axes), *piece.shape, dtype=torch.float64, device=piece.device)
        for way, noise, to in zip(ways, weight.noise, weight.targets, strict=True):
            for seed, factor in noise:
                way += factor * weight.direction(seed, piece, first)
            if to is not None:
                way.copy_(self._read(to, piece, first)).sub_(piece)
        flags = weight.flags_of(first, len(piece))
        return (ways if flags is None else ways * flags).flatten(1)


@dataclass(eq=False)
class _Weight:
    """One tensor of the model.

    Attributes:
        names: all that it has; the first is its own, under which its random numbers are drawn.
        tensor: the memory of the model; a scalar as [1].
        trained: whether it is a parameter, not a buffer.
        flags: bool, to be broadcast to the tensor: what moves; None: all of it.
        noise: per axis, along which random directions it goes, and how far at a step of 1.
        targets: per axis, the checkpoint's tensor that it leads to, or None.
        again: gives it the base's values.
        pristine: whether it is at the base now.
    """

    names: list[str]
    tensor: Tensor
    trained: bool
    flags: Tensor | None = None
    noise: list[list[_Term]] = field(default_factory=list)
    targets: tuple[AnyTensor | None, ...] = ()
    again: Callable[[], object] = lambda: None
    pristine: bool = True

    @property
    def name(self) -> str:
        """Its own name."""
        return self.names[0]

    @property
    def still(self) -> bool:
        """Whether nothing of it is to move."""
        return self.flags is not None and not bool(self.flags.any())

    @property
    def moves(self) -> bool:
        """Whether an axis moves it."""
        return any(self.noise) or any(to is not None for to in self.targets)

    def restore(self) -> None:
        """Bring it back to the base."""
        if not self.pristine:
            self.again()
            self.pristine = True

    @property
    def row(self) -> int:
        """Elements of a row."""
        return self.tensor[:1].numel()

    def pieces(self) -> Iterator[tuple[Tensor, int]]:
        """Some rows at a time, and the position of their first element."""
        count = max(1, PIECE // max(1, self.row))
        for start in range(0, len(self.tensor), count):
            yield self.tensor[start : start + count], start * self.row

    def flags_of(self, first: int, rows: int) -> Tensor | None:
        """What moves of so many rows, the first of which begins at an element."""
        if self.flags is None or len(self.flags) == 1:
            return self.flags
        start = first // self.row
        return self.flags[start : start + rows]

    def add_noise(self, out: Tensor, noise: Sequence[_Term], first: int = 0) -> None:
        """Add so much of random directions to a piece of the tensor, in place."""
        seeds, factors = [seed for seed, _ in noise], [factor for _, factor in noise]
        ones = _ones(len(seeds), out.device)
        ops.perturb_(out, out, seeds, factors, name=self.name, scales=ones, offset=first)

    def direction(self, seed: int, piece: Tensor, first: int) -> Tensor:
        """The standard normal numbers of a direction in a piece of the tensor, as float64."""
        found = torch.zeros(piece.shape, device=piece.device)
        self.add_noise(found, [(seed, 1.0)], first)
        return found.double()


def _second(weight: _Weight, first: int, scale: float, second: int) -> list[_Term]:
    """d_2 - (<d_1, d_2> / <d_1, d_1>) d_1, brought to the tensor's norm; `first` and `second` are seeds."""
    products = torch.zeros(2, 2, dtype=torch.float64)
    for piece, start in weight.pieces():
        pair = torch.stack([weight.direction(seed, piece, start).flatten() for seed in (first, second)])
        products += (pair @ pair.T).cpu()
    (square, product), (_, other) = products.tolist()
    left = other - product / square * product
    if left < 1e-12 * other:  # a tensor of one element has one direction
        return []
    factor = scale * math.sqrt(square / left)
    return [(first, -factor * product / square), (second, factor)]


@functools.cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, dtype=torch.float64, device=device)


def _weights(model: nn.Module) -> list[_Weight]:
    """The tensors that make a checkpoint of the model, as far as they are weights."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise SsahError(f"{name} is not in memory (offloaded, or on the meta device); load the model as a whole")
        if parameter.dtype not in _FLOATS.values():
            raise SsahError(f"{name} is {parameter.dtype}, and quantised weights cannot move; load it in 16 bits")
    lasting = model.state_dict().keys()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    found: dict[int, _Weight] = {}
    for name, tensor in {**parameters, **{name: buffers[name] for name in buffers if name in lasting}}.items():
        if tensor.dtype in _FLOATS.values():
            memory = tensor.detach() if tensor.ndim else tensor.detach().view(1)
            weight = _Weight([], memory, name in parameters)
            found.setdefault(id(tensor), weight).names.append(canonical_name(name))
    return list(found.values())


def _memory(tensor: Tensor, stored: AnyTensor) -> np.ndarray | None:
    """The bytes of a tensor, into which a file's can be read; None where they are elsewhere or others."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == _FLOATS[stored.dtype]
    return tensor.view(-1).view(torch.uint8).numpy() if plain else None


def _moving(weight: _Weight, region: Mask) -> Tensor | None:
    """The flags of a weight; a buffer, of which no region speaks, stays as it is."""
    shape = weight.tensor.shape
    if not weight.trained:
        return torch.zeros([1] * len(shape), dtype=torch.bool, device=weight.tensor.device)
    name = next((name for name in weight.names if name in region), None)
    if name is None:
        return None
    part = region[name]
    moving = ~part.as_bool(part.indices_of(shape))
    form = [1] * len(shape)
    form[part.axis] = shape[part.axis]
    if part.stacked:
        form[0] = shape[0]
    return None if bool(moving.all()) else moving.view(form).to(weight.tensor.device)


def _not_excluded(weights: Sequence[_Weight], exclude: Sequence[str]) -> list[_Weight]:
    """The weights none of whose names matches a pattern."""
    left = list(weights)
    for pattern in exclude:
        matched = [w for w in weights if any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for name in w.names)]
        if not matched and pattern not in NORMS:
            raise SsahError(f"exclude={pattern!r} matches no tensor, such as {weights[0].name}; write it as '*part*'")
        left = [weight for weight in left if weight not in matched]
    return left


def _stored(weight: _Weight, checkpoint: Checkpoint) -> list[AnyTensor]:
    """What a checkpoint has under the names of a weight."""
    return [stored for stored in map(checkpoint.get, weight.names) if stored is not None]


def _shape(stored: AnyTensor) -> list[int]:
    return list(stored.shape) or [1]


def _counterparts(weights: Sequence[_Weight], other: Checkpoint) -> list[AnyTensor]:
    """The tensors of a checkpoint for all weights of the model.

    Raises:
        SsahError: it is not a checkpoint of this model.
    """
    remedy = "give a checkpoint of the same architecture and size"
    found, known = [], {name for weight in weights for name in weight.names}
    for weight in weights:
        stored = _stored(weight, other)
        if not stored:
            raise SsahError(f"{other.name} has no {weight.name}, which is {list(weight.tensor.shape)} here; {remedy}")
        if _shape(stored[0]) != list(weight.tensor.shape):
            shapes = f"{_shape(stored[0])} in {other.name} and {list(weight.tensor.shape)} here"
            raise SsahError(f"{weight.name} is {shapes}; {remedy}")
        if stored[0].dtype not in _FLOATS:
            raise SsahError(
                f"{weight.name} is stored as {stored[0].dtype} in {other.name}; give weights of 16 bits or more"
            )
        if any(tensor is not stored[0] for tensor in stored) and weight.name not in other.tied:
            raise SsahError(f"{' and '.join(weight.names)} are one tensor here, but not in {other.name}; {remedy}")
        found.append(stored[0])
    # Files also hold what no model has a place for, such as rotary frequencies.
    more = next((name for name in other.model.state_dict() if name in other.tensors and name not in known), None)
    if more is not None:
        raise SsahError(f"{other.name} has {more}, which this model lacks; {remedy}")
    return found


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep a Ctrl-C back until the context is left."""
    before = signal.getsignal(signal.SIGINT)
    # None: a handler that was not set from Python, and which Python cannot set again.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)
