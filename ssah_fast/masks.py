"""Masks: which rows or columns of which parameter are frozen.

A mask holds, per parameter (by canonical name), one axis and the frozen indices along it. Of a stack of experts, whose
first axis tells them apart, every expert has frozen indices of its own. A parameter that a mask does not name trains as
a whole. Masks are made from units (`ssah_fast.Units.mask`, which calls `build`) or by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ssah_fast import files
from ssah_fast.categories import REPORTED, Category
from ssah_fast.errors import SsahError
from ssah_fast.units import Slice, UnitModule, canonical_name, find_units

AXES = {"rows": 0, "columns": 1}
# In Region.category: an index that belongs to no unit, such as a query row where units are value channels.
OTHER = -2
FREEZE_POLICY = {
    "embeddings": "train",
    "lm_head": "train",
    "norms": "train",
    "biases": "follow",
    "qk": "follow",
    "other": "train",
}
TRAIN_POLICY = {**dict.fromkeys(FREEZE_POLICY, "freeze"), "biases": "follow"}
KINDS = ("embeddings", "lm_head", "norms", "biases", "qk", "mlp", "attention", "other")
# Modules that choose experts, or weigh the shared one (Qwen2-MoE).
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})

Entry = tuple[str | int, Sequence[int] | torch.Tensor | None]


def _indices(frozen: Any, size: int | None, stacked: bool) -> tuple[torch.Tensor | None, int | None]:
    """Frozen indices as int64, sorted and unique, and the size of the axis as far as known."""
    if frozen is None:
        return None, size
    try:
        indices = torch.as_tensor(frozen).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SsahError(f"frozen={frozen!r} is no list of indices") from error
    if stacked and indices.dtype == torch.bool:
        indices = indices.flatten()
    if indices.ndim != 1 or (indices.numel() and (indices.is_floating_point() or indices.is_complex())):
        raise SsahError(f"frozen is {indices.dtype} {list(indices.shape)}, not one list of integers")
    if indices.dtype == torch.bool:
        if size not in (None, indices.numel()):
            raise SsahError(f"frozen has {indices.numel()} entries, but the axis has the size {size}")
        return indices.nonzero().squeeze(1), indices.numel()
    indices = indices.to(torch.int64)
    if not bool((indices[1:] > indices[:-1]).all()):
        indices = indices.unique()
    for index in indices[[0, -1]].tolist() if indices.numel() else []:
        if index < 0 or (size is not None and index >= size):
            limit = "0 or more" if size is None else f"from 0 to {size - 1}"
            raise SsahError(f"index {index} is out of range; give {limit}")
    return indices, size


def _check_category(category: torch.Tensor | None, size: int | None) -> None:
    if category is None:
        return
    if category.dtype != torch.int8 or tuple(category.shape) != (size,):
        raise SsahError(f"category is {category.dtype} {list(category.shape)}, expected torch.int8 [{size}]")
    if category.numel() and not OTHER <= int(category.min()) <= int(category.max()) <= max(Category):
        raise SsahError("category holds values that are no category")


@dataclass(frozen=True, eq=False)
class Region:
    """The frozen part of one parameter.

    Attributes:
        axis: 0 for rows, 1 for columns of the parameter as it is stored; any axis of an N-D parameter.
        frozen: indices along `axis`, int64, sorted and unique, on the CPU (the constructor makes them so, also from
            bool [size] with True where frozen); None: the whole parameter is frozen.
        size: how many indices there are, where known: the length of the axis.
        category: int8 [size], the `Category` of the unit that each index belongs to, `OTHER` for none; None: unknown.
        stacked: the parameter is a stack of one tensor per expert along its first axis, and every expert has frozen
            indices of its own: ``e * n + i`` is index i of `axis` (1 or more, of length n) in expert e, and `size` is
            experts * n. The constructor also takes bool [experts, n].

    Two regions are equal if they freeze the same.

    Raises:
        SsahError: no such axis, indices that are not integers, negative or not below `size`, or another category.
    """

    axis: int
    frozen: torch.Tensor | None
    size: int | None = None
    category: torch.Tensor | None = None
    stacked: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or self.axis < 0:
            raise SsahError(f"axis {self.axis!r} is none; use 'rows', 'columns' or the number of an axis")
        if self.stacked and self.axis == 0:
            raise SsahError("axis 0 of a stack of experts tells them apart; use axis 1 or more, or stacked=False")
        frozen, size = _indices(self.frozen, self.size, self.stacked)
        if size is not None and frozen is not None and frozen.numel() == size:
            frozen = None
        _check_category(self.category, size)
        object.__setattr__(self, "frozen", frozen)
        object.__setattr__(self, "size", size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def empty(self) -> bool:
        """Whether nothing is frozen."""
        return self.frozen is not None and not self.frozen.numel()

    @property
    def digest(self) -> str:
        """SHA-256 of what is frozen: the axis and the indices; the axis does not count where it makes no difference."""
        if self.frozen is None or self.empty:
            return "nothing" if self.empty else "all"
        indices = self.frozen.numpy().astype("<i8", copy=False)
        axis = f"{self.axis} stacked " if self.stacked else f"{self.axis} "
        return hashlib.sha256(axis.encode() + indices.tobytes()).hexdigest()

    @property
    def cut(self) -> str:
        """Along what the parameter is cut, in words."""
        return f"axis {self.axis}" + (" of every expert" if self.stacked else "")

    def indices_of(self, shape: Sequence[int]) -> int:
        """How many indices a parameter of this shape, which has the axis, has; a scalar counts as one row."""
        shape = tuple(shape) or (1,)
        return shape[self.axis] * (shape[0] if self.stacked else 1)

    def trainable(self, size: int) -> torch.Tensor:
        """What is not frozen.

        Args:
            size: how many indices there are.

        Returns:
            Indices, int64, sorted; may be empty.

        Raises:
            SsahError: the region was made for another size.
        """
        return (~self.as_bool(size)).nonzero().squeeze(1)

    def as_bool(self, size: int | None = None) -> torch.Tensor:
        """What is frozen, bool [size].

        Args:
            size: how many indices there are; None takes the region's own.

        Raises:
            SsahError: the size is unknown, or the region was made for another one.
        """
        length = self.size if size is None else size
        if length is None:
            raise SsahError("the size of the axis is unknown; give it: Region(axis, frozen, size)")
        if self.size not in (None, length):
            raise SsahError(f"{self.cut} has the size {length}, the mask was made for {self.size}")
        if self.frozen is None:
            return torch.ones(length, dtype=torch.bool)
        if not self.empty and int(self.frozen[-1]) >= length:
            raise SsahError(f"index {int(self.frozen[-1])} is out of range, {self.cut} has the size {length}")
        return torch.zeros(length, dtype=torch.bool).index_fill_(0, self.frozen, True)


NOTHING = Region(0, torch.zeros(0, dtype=torch.int64))


class Mask(Mapping[str, Region]):
    """Which part of which parameter is frozen; a parameter that is not named trains as a whole.

    Names are canonical: `mask["module.lm_head.weight"]` finds `lm_head.weight`. Two masks are equal, and have the same
    hash, if they freeze the same; provenance, categories and order do not count. Masks can be combined: ``a | b``
    freezes what either freezes, ``a & b`` what both freeze, ``a - b`` what a freezes and b does not.

    Args:
        entries: per parameter (axis, frozen): "rows", "columns" or the number of an axis, and indices (or bool [size],
            or None for the whole parameter); or a `Region`. With bool [experts, size], rows and columns are those of
            every expert in a stack of them: axes 1 and 2.
        provenance: JSON-able, how the mask was made.

    Raises:
        SsahError: an entry is malformed, or two names mean the same parameter.
    """

    def __init__(self, entries: Mapping[str, Entry | Region], provenance: dict[str, Any] | None = None) -> None:
        self._regions: dict[str, Region] = {}
        self.provenance = dict(provenance or {})
        for name, entry in entries.items():
            canonical = canonical_name(name)
            if canonical in self._regions:
                raise SsahError(f"mask: {name} overlaps with another entry for {canonical}; give one entry")
            self._regions[canonical] = _as_region(name, entry)

    def __getitem__(self, name: str) -> Region:
        return self._regions[canonical_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Mask({len(self)} parameters, sha256 {self.sha256[:12]})"

    @cached_property
    def sha256(self) -> str:
        """Hash of what is frozen: names, axes and indices."""
        frozen = {name: region.digest for name, region in self._regions.items() if not region.empty}
        return hashlib.sha256(json.dumps(frozen, sort_keys=True).encode()).hexdigest()

    def check(self, parameters: Iterable[tuple[str, torch.Tensor]], *, complete: bool = True) -> None:
        """Refuse parameters that this mask was not made for.

        Args:
            parameters: names and tensors, as from `model.named_parameters()`; only shapes are read. With
                ``remove_duplicate=False``, tied parameters are compared as well: the first name counts, the others must
                have the same region or none.
            complete: whether these are all parameters of the model, so that a name which is absent is an error.

        Raises:
            SsahError: the mask names a parameter that is absent, an axis or size differs, an index is out of range, two
                names of one tensor have different regions, or nothing would be left to train.
        """
        tensors = [(canonical_name(name), tensor) for name, tensor in parameters]
        absent = set(self) - {name for name, _ in tensors}
        if absent and (complete or len(absent) == len(self)):
            raise SsahError(
                f"mask of another model: it names {min(absent)}, which this model lacks ({len(absent)} of {len(self)} "
                "names); use the mask with the model it was made for"
            )
        whole = [self._freezes_all(name, tensor.shape) for name, tensor in self._first_names(tensors)]
        if whole and all(whole):
            raise SsahError("the mask freezes every parameter; nothing is left to train")

    def trainable(self, name: str, shape: Sequence[int]) -> tuple[int, torch.Tensor] | None:
        """The trainable part of one parameter.

        Args:
            name: of the parameter.
            shape: of the whole parameter.

        Returns:
            The axis and the trainable indices along it (int64, sorted, may be empty; those of all experts where the
            region is stacked); None: the parameter is not in the mask and trains as a whole.

        Raises:
            SsahError: the mask was made for another shape.
        """
        region = self.get(name)
        return None if region is None else (region.axis, region.trainable(_axis_size(name, region, shape)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: the file.

        Raises:
            SsahError: the path cannot be written.
            RunError: the write failed, for example on a full disk.
        """
        regions = [
            {"parameter": name, "axis": region.axis, "size": region.size, "whole": region.frozen is None}
            | ({"stacked": True} if region.stacked else {})
            for name, region in self.items()
        ]
        tensors = {}
        for name, region in self.items():
            if region.frozen is not None:
                fits = region.empty or int(region.frozen[-1]) <= torch.iinfo(torch.int32).max
                tensors[f"{name}.frozen"] = region.frozen.to(torch.int32 if fits else torch.int64)
            if region.category is not None:
                tensors[f"{name}.category"] = region.category
        header = {"regions": regions, "provenance": self.provenance, "sha256": self.sha256}
        files.save_tensors(path, "mask", header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Mask:
        """Read a mask file.

        Args:
            path: the file.

        Returns:
            The mask, on the CPU.

        Raises:
            SsahError: the file is missing, truncated, not a mask file, of a newer schema, or not what was saved.
        """
        header, tensors = files.load_tensors(path, "mask")
        try:
            regions = {stored["parameter"]: _load_region(stored, tensors) for stored in header["regions"]}
            mask = cls(regions, header["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise SsahError(f"cannot read {path}: its regions are damaged ({type(error).__name__}: {error})") from error
        if mask.sha256 != header.get("sha256"):
            raise SsahError(f"cannot read {path}: its content does not match its own sha256; make the mask again")
        return mask

    def __or__(self, other: Mask) -> Mask:
        return self._combined(other, "|", _union)

    def __and__(self, other: Mask) -> Mask:
        return self._combined(other, "&", _intersection)

    def __sub__(self, other: Mask) -> Mask:
        return self._combined(other, "-", _difference)

    def summary(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
        """How much trains and how much is frozen.

        Args:
            parameters: names and tensors of the whole model, as from `model.named_parameters()`; only shapes are read.

        Returns:
            One row per kind of tensor (`KINDS`) and category that occur, {"kind", "category", "trainable", "frozen"}.
            The last two count elements and sum to the model's. "category" is None where the elements belong to no unit.
            In a projection that holds queries, keys and values together, what belongs to no unit counts as "qk".

        Raises:
            SsahError: the mask was made for another shape.
        """
        counts: dict[tuple[str, int], list[int]] = {}
        for name, tensor in parameters:
            for key, trainable, frozen in self._count(canonical_name(name), tensor):
                row = counts.setdefault(key, [0, 0])
                row[0] += trainable
                row[1] += frozen
        order = [*REPORTED, OTHER]
        return [
            {"kind": kind, "category": _category_name(value), "trainable": trainable, "frozen": frozen}
            for (kind, value), (trainable, frozen) in sorted(
                counts.items(), key=lambda item: (KINDS.index(item[0][0]), order.index(item[0][1]))
            )
        ]

    def _count(self, name: str, tensor: torch.Tensor) -> list[tuple[tuple[str, int], int, int]]:
        kind, region = tensor_kind(name), self.get(name)
        if region is None:
            return [((kind, OTHER), tensor.numel(), 0)]
        size = _axis_size(name, region, tensor.shape)
        width, frozen = tensor.numel() // max(size, 1), region.as_bool(size)
        category = torch.full((size,), OTHER, dtype=torch.int8) if region.category is None else region.category
        counted = []
        for value in map(int, category.unique()):
            here = category == value
            fused = kind == "attention" and value == OTHER and region.category is not None
            held = int((here & frozen).sum())
            counted.append((("qk" if fused else kind, value), (int(here.sum()) - held) * width, held * width))
        return counted

    def _first_names(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Every tensor once, by the name under which an optimizer gets it."""
        first: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            other, _ = first.setdefault(id(tensor), (name, tensor))
            if name in self and self[name] != self.get(other, NOTHING):
                raise SsahError(
                    f"mask: overlapping regions, {other} and {name} are one tensor; name only {other}, or the same part"
                )
        return list(first.values())

    def _freezes_all(self, name: str, shape: Sequence[int]) -> bool:
        region = self.get(name, NOTHING)
        size = _axis_size(name, region, shape) if name in self else None
        return region.frozen is None or region.frozen.numel() == size

    def _combined(self, other: Mask, symbol: str, rule: Callable[[Region, Region], Region]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        regions = {}
        for name in dict.fromkeys([*self, *other]):
            try:
                regions[name] = rule(*_pair(self.get(name, NOTHING), other.get(name, NOTHING)))
            except SsahError as error:
                raise SsahError(f"masks: {name}: {error}") from error
        return Mask(regions, {"operation": symbol, "operands": [self.provenance, other.provenance]})


def full_policy(policy: Mapping[str, str] | None, *, training: bool) -> dict[str, str]:
    """What happens to the parameters that belong to no unit.

    Args:
        policy: overrides of the defaults, "train", "freeze" or "follow" by name. biases: "follow" lets the bias rows of
            a unit share its fate, those of queries and keys that of their weights; the rest takes the default. qk: with
            "follow", the query and key rows of a KV group are frozen iff all its value channels are.
        training: whether the defaults are those of ``train=`` (`TRAIN_POLICY`) or of ``freeze=`` (`FREEZE_POLICY`).

    Returns:
        The policy for every name.

    Raises:
        SsahError: an unknown name, or a value that it cannot have.
    """
    defaults = TRAIN_POLICY if training else FREEZE_POLICY
    for name, value in (policy or {}).items():
        if name not in defaults:
            raise SsahError(f"policy: {name!r} is unknown; use {', '.join(defaults)}")
        choices = ("train", "freeze", "follow") if name in ("biases", "qk") else ("train", "freeze")
        if value not in choices:
            raise SsahError(f"policy: {name}={value!r} is unknown; use {' or '.join(choices)}")
    return {**defaults, **(policy or {})}


def build(
    model: nn.Module,
    layouts: Mapping[str, UnitModule],
    category: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
    policy: Mapping[str, str] | None,
    *,
    training: bool,
    provenance: dict[str, Any],
) -> Mask:
    """The mask that freezes some units of a model.

    Args:
        model: whose parameters are masked, before `ssah_fast.compact`; only names and shapes are read, so it may be on
            the meta device.
        layouts: the units of every module, from a units file.
        category: int8 [units] per module.
        frozen: bool [units] per module.
        policy: as in `full_policy`.
        training: as in `full_policy`; also says what "follow" means where there is nothing to follow.
        provenance: of the mask; the full policy is added.

    Raises:
        SsahError: the policy is unknown or contradicts itself, the layouts are of another model, or nothing would be
            left to train.
    """
    settings = full_policy(policy, training=training)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    builder = _Builder(parameters, settings, "freeze" if training else "train")
    for name, heads in _kv_groups(model, layouts, (policy or {}).get("qk")).items():
        whole = frozen[name].view(heads.units, -1).all(1)
        flags = whole if settings["qk"] == "follow" else torch.full_like(whole, settings["qk"] == "freeze")
        builder.put(heads.slices, flags, torch.full((heads.units,), OTHER, dtype=torch.int8))
    for name, layout in layouts.items():  # overwrites the value rows and output columns of the heads
        builder.put(layout.slices, frozen[name], category[name])
    builder.check_ties(model)
    mask = Mask(builder.regions(), {**provenance, "policy": settings})
    mask.check(parameters.items())
    return mask


@dataclass(frozen=True)
class _Builder:
    """Collects what is frozen of each parameter, as flags along one axis."""

    parameters: Mapping[str, torch.Tensor]
    policy: Mapping[str, str]
    default: str
    drafts: dict[str, tuple[Slice, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def put(self, slices: Iterable[Slice], frozen: torch.Tensor, category: torch.Tensor) -> None:
        """Set flags and categories (both [units]) of units made of these slices."""
        for part in slices:
            if _is_bias(part.parameter) and self.policy["biases"] != "follow":
                continue
            if part.parameter not in self.drafts:
                shape = self.parameters[part.parameter].shape
                size = shape[part.axis] * (shape[0] if part.stacked else 1)
                blank = torch.full((size,), self.default == "freeze"), torch.full((size,), OTHER, dtype=torch.int8)
                self.drafts[part.parameter] = (part, *blank)
            first, flags, categories = self.drafts[part.parameter]
            if (first.axis, first.stacked) != (part.axis, part.stacked):
                raise SsahError(
                    f"units: {part.parameter} is cut along axis {first.axis} and along axis {part.axis}; use one"
                )
            indices = part.indices(frozen.numel())
            flags[indices], categories[indices] = frozen.unsqueeze(1), category.unsqueeze(1)

    def whole(self, name: str) -> str:
        """What happens to a parameter of no unit: "train" or "freeze"."""
        kind = tensor_kind(name)
        if kind == "biases" and self.policy["biases"] == "follow" and tensor_kind(f"{name[:-5]}.weight") == "qk":
            kind = "qk"
        value = self.policy.get(kind, self.policy["other"])
        return self.default if value == "follow" else value

    def check_ties(self, model: nn.Module) -> None:
        """Refuse policies that contradict each other on tied parameters."""
        first: dict[int, str] = {}
        for wrapped, parameter in model.named_parameters(remove_duplicate=False):
            name = canonical_name(wrapped)
            other = first.setdefault(id(parameter), name)
            if self.whole(other) != self.whole(name):
                ours, theirs = (f"{tensor_kind(n)}={self.whole(n)}" for n in (other, name))
                raise SsahError(
                    f"overlapping policies: {ours} and {theirs}, but {other} and {name} are one tensor; agree on one"
                )

    def regions(self) -> dict[str, Region]:
        """Per parameter that is not trained as a whole, its region; in the model's order."""
        regions = {}
        for name, parameter in self.parameters.items():
            if name in self.drafts:
                part, flags, category = self.drafts[name]
                regions[name] = Region(part.axis, flags, None, category, part.stacked)
            elif self.whole(name) == "freeze":
                regions[name] = Region(0, None, parameter.shape[0] if parameter.ndim else 1)
        return regions


def _kv_groups(model: nn.Module, layouts: Mapping[str, UnitModule], qk: str | None) -> dict[str, UnitModule]:
    """The KV groups of every attention module whose units are value channels; none where they cannot be separated.

    Raises:
        SsahError: the layouts are of another model, or a policy for `qk` is given where they belong to the units.
    """
    channels = {unit.name: unit for unit in find_units(model)}
    try:
        heads = {unit.name: unit for unit in find_units(model, "head") if unit.kind == "attention"}
    except SsahError:  # OLMo 2; anything else would have been refused above
        heads = {}
    groups: dict[str, UnitModule] = {}
    for name in {**channels, **layouts}:
        if name not in channels or name not in layouts:
            raise SsahError(f"mask of another model: {name} is only in the {'units' if name in layouts else 'model'}")
        stored = replace(layouts[name], gated=None)  # as in a file
        if stored == replace(channels[name], gated=None):
            groups |= {name: heads[name]} if name in heads else {}
        elif name not in heads or stored != replace(heads[name], gated=None):
            sizes = f"{layouts[name].units} units in the units file and {channels[name].units} in the model"
            raise SsahError(f"mask of another model: {name} has {sizes}, or keeps them elsewhere; score this model")
        elif qk in ("train", "freeze"):
            raise SsahError(f"policy: qk={qk!r} is not possible, queries and keys belong to the units; use 'follow'")
    return groups


def tensor_kind(name: str) -> str:
    """One of `KINDS`, from a parameter's name alone, so that files can be shown without the model."""
    *path, leaf = canonical_name(name).split(".")
    owner = path[-1] if path else ""
    if any("norm" in part or part.startswith("ln_") for part in path):
        return "norms"
    if owner in ("lm_head", "embed_out"):
        return "lm_head"
    if "embed" in owner or owner in ("wte", "wpe"):
        return "embeddings"
    if _is_bias(leaf):
        return "biases"
    if owner in _ROUTERS or owner.startswith(("q_a_", "kv_a_")):
        return "other"
    if owner in ("q_proj", "k_proj", "q_b_proj") or leaf == "sinks":
        return "qk"
    if any("attn" in part or "attention" in part for part in path):
        return "attention"
    return "mlp" if "mlp" in path or owner in ("fc1", "fc2") else "other"


def _is_bias(name: str) -> bool:
    """Also of the biases beside 3-D expert weights, "gate_up_proj_bias"."""
    return name.rpartition(".")[2] == "bias" or name.endswith("_bias")


def tensor_layer(name: str) -> int | None:
    """The decoder layer in a parameter's name: its first number; None for an embedding, a head, a final norm."""
    return next((int(part) for part in canonical_name(name).split(".") if part.isdigit()), None)


def _as_region(name: str, entry: Entry | Region) -> Region:
    if isinstance(entry, Region):
        return entry
    try:
        axis: Any
        axis, frozen = entry
        stacked = isinstance(frozen, torch.Tensor) and frozen.dtype == torch.bool and frozen.ndim == 2
        indices, size = _indices(frozen, None, stacked)
        return Region(AXES[axis] + stacked if axis in AXES else axis, indices, size, stacked=stacked)
    except SsahError as error:
        raise SsahError(f"mask: {name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise SsahError(f"mask: {name}: {entry!r} is not ('rows' or 'columns', frozen indices)") from error


def _load_region(stored: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Region:
    name = stored["parameter"]
    frozen = None if stored["whole"] else tensors[f"{name}.frozen"]
    category, stacked = tensors.get(f"{name}.category"), stored.get("stacked", False)
    return Region(stored["axis"], frozen, stored["size"], category, stacked)


def _axis_size(name: str, region: Region, shape: Sequence[int]) -> int:
    """How many indices a region's axis has in a parameter."""
    size = region.indices_of(shape) if region.axis < max(len(shape), 1) else None
    last = -1 if region.frozen is None or region.empty else int(region.frozen[-1])
    if size is None or region.size not in (None, size) or last >= size:
        made_for = region.cut + (f" of size {region.size}" if region.size else f" and index {last}")
        raise SsahError(f"mask of another model: {name} has the shape {list(shape) or [1]}, the mask is for {made_for}")
    return size


def _category_name(category: int) -> str | None:
    return None if category == OTHER else Category(category).name.lower()


def _pair(a: Region, b: Region) -> tuple[Region, Region]:
    """The regions of one parameter in two masks, along one axis and with what either knows about it."""
    cut = [region for region in (a, b) if region.frozen is not None and not region.empty]
    if len(cut) == 2 and a.cut != b.cut:
        raise SsahError(f"frozen along {a.cut} in one and along {b.cut} in the other; no mask holds both")
    form = (cut or [region for region in (a, b) if region.size is not None] or [a])[0]
    known = [region for region in (a, b) if region.cut == form.cut]
    sizes = {region.size for region in known} - {None}
    if len(sizes) > 1:
        raise SsahError(f"the axis has the size {a.size} in one and {b.size} in the other; these are of other models")
    size = sizes.pop() if sizes else None
    category = next((region.category for region in known if region.category is not None), None)
    axis, stacked = form.axis, form.stacked
    return Region(axis, a.frozen, size, category, stacked), Region(axis, b.frozen, size, category, stacked)


def _union(a: Region, b: Region) -> Region:
    if a.frozen is None or b.frozen is None:
        return replace(a, frozen=None)
    return replace(a, frozen=torch.cat([a.frozen, b.frozen]))


def _intersection(a: Region, b: Region) -> Region:
    if a.frozen is None or b.frozen is None:
        return b if a.frozen is None else a
    return replace(a, frozen=a.frozen[torch.isin(a.frozen, b.frozen)])


def _difference(a: Region, b: Region) -> Region:
    if b.frozen is None:
        return replace(a, frozen=NOTHING.frozen)
    if a.frozen is not None:
        return replace(a, frozen=a.frozen[~torch.isin(a.frozen, b.frozen)])
    if b.empty:
        return a
    if a.size is None:
        raise SsahError(
            "frozen as a whole in one and in part in the other, of unknown size; give it: Region(axis, frozen, size)"
        )
    return replace(a, frozen=b.trainable(a.size))
