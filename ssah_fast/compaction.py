"""Compact training: gradients and optimizer state for the trainable rows or columns of a weight alone.

Autograd gives a parameter a gradient of its own shape or none. So the weight of a compact layer stays whole, under its
own name and frozen, and a small parameter beside it, the leaf, holds the trainable rows or columns. The forward pass
uses the weight; the backward pass computes the gradient of the leaf alone. A layer whose trainable part is columns
keeps only those activations for the backward pass. Whatever changes the leaf is copied into the weight:

- `ssah_fast.MaskedAdamW` writes both in one pass;
- after a step of any other torch optimizer, the leaf is copied at once, by a hook on every optimizer's step;
- a leaf that was changed by hand is copied at the next forward pass or state_dict, or by `sync`.

Checkpoints do not know the leaf: it is left out of state_dict and read from the weight on loading.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.pytorch_utils import Conv1D

from ssah_fast import matmul
from ssah_fast.errors import SsahError
from ssah_fast.masks import Mask
from ssah_fast.units import canonical_name

LEAF = "trainable"
_UNDO = "_frozen_by_compact"  # attribute of a compact model: the parameters that compact froze as a whole

_Model = TypeVar("_Model", bound=nn.Module)


class _Linear(torch.autograd.Function):
    """x @ W + bias, where the gradient of W is computed for the leaf's rows or columns alone."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, index: Tensor, outputs: bool, transposed: bool
    ) -> Tensor:
        return matmul.linear(x, weight, bias, transposed=transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, leaf, index, ctx.outputs, ctx.transposed = inputs
        ctx.leaf_dtype = leaf.dtype
        needs_x, _, _, needs_leaf, *_ = ctx.needs_input_grad
        kept = x if ctx.outputs else x.index_select(-1, index)
        ctx.save_for_backward(kept if needs_leaf else None, weight if needs_x else None, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, index = ctx.saved_tensors
        needs_x, _, needs_bias, needs_leaf, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_leaf = None
        if needs_x:
            grad_x = matmul.linear(rows, weight, transposed=not ctx.transposed)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        grad_bias = rows.sum(0) if needs_bias else None
        if needs_leaf:
            read = kept.reshape(-1, kept.shape[-1])
            written = rows.index_select(1, index) if ctx.outputs else rows
            left, right = (written, read) if ctx.transposed else (read, written)
            grad_leaf = matmul.weight_gradient(left, right, ctx.leaf_dtype)
        return grad_x, None, grad_bias, grad_leaf, None, None, None


class _Compact(nn.Module):
    """What CompactLinear and CompactConv1D share.

    Attributes:
        weight: The whole weight, frozen; always what the layer computes with.
        trainable: The leaf: rows or columns of the weight in the order of ``region_index``.
        region_axis: 0 where the leaf holds rows of the weight as it is stored, 1 where it holds columns.
        region_index: int64, sorted: which.
    """

    weight: Tensor
    bias: Any  # Tensor [out] or None
    trainable: Tensor
    region_axis: int
    region_index: Tensor
    _transposed: bool
    _plain: type[nn.Module]
    # The leaf that the weight agrees with, and its version then; None: they may differ.
    _synced: tuple[weakref.ref[Tensor], int] | None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in].

        Returns:
            [..., out].

        Raises:
            SsahError: x has another dtype than the weight, without autocast.
        """
        if not torch.compiler.is_compiling():
            self._catch_up()
        bias, kind = self.bias, x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if autocast and x.dtype != torch.float64:  # which autocast leaves alone
            x = x.to(torch.get_autocast_dtype(kind))
            with torch.autocast(kind, enabled=False):
                return self._product(x, None if bias is None else bias.to(x.dtype))
        if x.dtype != self.weight.dtype:
            raise SsahError(f"x is {x.dtype}, but the layer's weight is {self.weight.dtype}; cast one or use autocast")
        return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return matmul.linear(x, self.weight, bias, transposed=self._transposed)
        outputs = (self.region_axis == 0) == self._transposed
        return _Linear.apply(x, self.weight, bias, self.trainable, self.region_index, outputs, self._transposed)

    def sync(self) -> None:
        """Copy the leaf into the weight. Under FSDP2 a leaf of rows is gathered: every rank must call this.

        Raises:
            SsahError: The weight is sharded along another axis than its first.
        """
        with torch.no_grad():
            if not isinstance(self.trainable, DTensor):
                _write(self.weight, self.trainable, self.region_axis, self.region_index)
            elif self.region_axis == 1:  # both are cut along the first axis
                _write(_local(self.weight), _local(self.trainable), 1, self.region_index)
            else:
                rows, leaf = _local_rows(self.weight), self.trainable.full_tensor()
                here = torch.isin(self.region_index, rows)
                positions = torch.searchsorted(rows, self.region_index[here])
                _write(_local(self.weight), leaf[here], 0, positions)
        self.mark_synced()

    def mark_synced(self) -> None:
        """Take note that the weight agrees with the leaf as it is now: whoever wrote the leaf wrote the weight, too."""
        self._synced = weakref.ref(self.trainable), self.trainable._version

    def extra_repr(self) -> str:
        """The layer's own, and its region."""
        kind = "columns" if self.region_axis else "rows"
        return f"{super().extra_repr()}, trainable {kind}: {len(self.region_index)}".removeprefix(", ")

    def _agrees(self) -> bool:
        region = self.weight.index_select(self.region_axis, self.region_index)
        return torch.equal(region, self.trainable.to(region.dtype))

    def _catch_up(self) -> None:
        """Sync if the leaf was changed. Temporary leaves, which FSDP2 puts in its place as it runs, do not count."""
        leaf = self.trainable
        if self._synced is None or (self._synced[0]() is leaf and self._synced[1] != leaf._version):
            self.sync()

    def _read_weight(self) -> None:
        """Copy the weight into the leaf."""
        with torch.no_grad():
            if not isinstance(self.trainable, DTensor):
                self.trainable.copy_(self.weight.index_select(self.region_axis, self.region_index))
            elif self.region_axis == 1:
                _local(self.trainable).copy_(_local(self.weight).index_select(1, self.region_index))
            else:
                leaf = cast(DTensor, self.weight).full_tensor().index_select(0, self.region_index)
                _local(self.trainable).copy_(leaf[_local_rows(self.trainable)])
        self.mark_synced()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A sharded leaf was synced by the step, and this may be one rank alone. A plain one is compared first: writing
        # without need would break the backward pass of a graph that still holds the weight.
        if not isinstance(self.trainable, DTensor) and not self._agrees():
            self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + LEAF]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[prefix + LEAF] = self.trainable  # or it would be reported as missing
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}weight" in state_dict:
            self._read_weight()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_synced": None}  # a weak reference cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _track(self)
        if isinstance(self.trainable, DTensor):
            self.mark_synced()
        else:
            self.sync()


class CompactLinear(_Compact, nn.Linear):
    """nn.Linear whose trainable rows or columns are a parameter of their own; made by `compact`."""

    _transposed = True
    _plain = nn.Linear


class CompactConv1D(_Compact, Conv1D):
    """transformers' Conv1D, weight [in, out], whose trainable rows or columns are a parameter of their own."""

    _transposed = False
    _plain = Conv1D

    def __repr__(self) -> str:
        return f"CompactConv1D(nf={self.nf}, nx={self.nx}, {self.extra_repr()})"


_KINDS: dict[type[nn.Module], type[_Compact]] = {kind._plain: kind for kind in (CompactLinear, CompactConv1D)}


def compact(model: _Model, mask: Mask, *, max_fraction: float = 0.5, dtype: torch.dtype | None = None) -> _Model:
    """Make a model keep gradients and optimizer state for its trainable slices alone, in place.

    Every linear layer (nn.Linear or transformers' Conv1D itself, no subclass) of which the mask trains something, but
    at most ``max_fraction``, becomes a compact layer. What the mask freezes as a whole gets requires_grad False. The
    rest (biases, norms, layers that train for the most part, shared weights, quantised layers, adapters, layers whose
    forward accelerate replaced, and experts, whose 3-D parameters belong to no linear layer) stays as it is:
    `ssah_fast.MaskedAdamW` masks it. Do this before the optimizer is made and before fully_shard.

    Let r be the trainable part of a weight. Beside the weight, masked AdamW on a plain layer holds a gradient of the
    whole weight; a compact layer holds r of it, and r of the weight as the leaf. So compact saves memory for r < 1/2.

    Args:
        model: The model; not on the meta device.
        mask: What is frozen.
        max_fraction: The largest trainable part of a weight that is worth a leaf, from 0 (none) to 1.
        dtype: torch.float32 makes the leaves fp32 masters beside 16-bit weights. A state_dict holds the rounded weight
            alone, so that a resumed run starts from that. Default: the weight's dtype.

    Returns:
        The same model.

    Raises:
        SsahError: The model is compact already, on the meta device or sharded, the mask is of another model or freezes
            everything, or an argument is out of range. The model is then unchanged.
    """
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    _check(model, parameters, mask, max_fraction, dtype)
    layers = {f"{canonical_name(name)}.weight": module for name, module in _plain_layers(model)}
    frozen = []
    for name, parameter in parameters.items():
        region = mask.trainable(name, parameter.shape)
        if region is None or not parameter.requires_grad:
            continue
        axis, index = region
        if not len(index):
            parameter.requires_grad_(False)
            frozen.append(name)
        elif name in layers and not mask[name].stacked and len(index) <= max_fraction * parameter.shape[axis]:
            _make_compact(layers[name], axis, index, dtype)
    setattr(model, _UNDO, frozen)
    return model


def uncompact(model: _Model) -> _Model:
    """Undo `compact`: plain layers that hold what was learned, and requires_grad as before; in place.

    A model that is not compact stays as it is. Make a new optimizer: the leaves that the old one knew are gone.

    Raises:
        SsahError: The model is sharded by FSDP2.
    """
    layers = list(_layers(model))
    if any(isinstance(layer.trainable, DTensor) for layer in layers):
        raise SsahError("model: it is sharded by fully_shard; save its state_dict, which is that of the plain model")
    for layer in layers:
        _make_plain(layer)
    for module in model.modules():  # the compact model may have been wrapped since
        frozen = vars(module).pop(_UNDO, ())
        for name, parameter in module.named_parameters() if frozen else ():
            if canonical_name(name) in frozen:
                parameter.requires_grad_(True)
    return model


def sync(model: nn.Module) -> None:
    """Copy every leaf of a compact model into its weight.

    This is needed only after leaves were changed in a way that torch cannot see (``leaf.data``), by hand under FSDP2,
    or by hand where the forward pass is compiled. Under FSDP2 every rank must call it.
    """
    for layer in _layers(model):
        layer.sync()


def owner(parameter: Tensor) -> CompactLinear | CompactConv1D | None:
    """The compact layer, of any live model, whose leaf a parameter is; None if it is none."""
    return next((layer for layer in _LIVE if layer._parameters[LEAF] is parameter), None)


def _check(
    model: nn.Module, parameters: Mapping[str, Tensor], mask: Mask, max_fraction: float, dtype: torch.dtype | None
) -> None:
    if any(_UNDO in vars(module) or isinstance(module, _Compact) for module in model.modules()):
        raise SsahError("model: it is compact already; call uncompact(model) first")
    if not 0 <= max_fraction <= 1:
        raise SsahError(f"max_fraction={max_fraction} is no fraction; give 0 to 1")
    if dtype not in (None, torch.float32):
        raise SsahError(f"dtype={dtype} is no dtype for leaves; use torch.float32, or None for the weight's own")
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise SsahError(f"model: {name} is on the meta device; load its weights first")
        if isinstance(parameter, DTensor):
            raise SsahError(f"model: {name} is sharded; call compact before fully_shard")
    mask.check(parameters.items())


def _plain_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that can become compact."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if type(module) not in _KINDS or "forward" in vars(module):
            continue
        weight = module._parameters.get("weight")
        if weight is not None and weight.is_floating_point() and uses[id(weight)] == 1:
            yield name, module


def _make_compact(module: nn.Module, axis: int, index: Tensor, dtype: torch.dtype | None) -> None:
    kind = _KINDS[type(module)]
    module.__class__ = kind  # type: ignore[assignment]
    layer = cast(_Compact, module)
    layer.weight.requires_grad_(False)
    layer.region_axis = axis
    layer.register_buffer("region_index", index.to(layer.weight.device), persistent=False)
    leaf = layer.weight.detach().index_select(axis, layer.region_index)
    layer.register_parameter(LEAF, nn.Parameter(leaf.to(dtype if leaf.element_size() == 2 else None)))
    layer.mark_synced()
    _track(layer)


def _make_plain(layer: _Compact) -> None:
    layer.sync()
    _LIVE.discard(layer)
    del layer.trainable, layer.region_index, layer.region_axis, layer._synced
    layer.__class__ = layer._plain  # type: ignore[assignment]
    layer.weight.requires_grad_(True)


def _layers(model: nn.Module) -> Iterator[_Compact]:
    return (module for module in model.modules() if isinstance(module, _Compact))


def _write(weight: Tensor, values: Tensor, axis: int, index: Tensor) -> None:
    weight.index_copy_(axis, index, values.to(weight.dtype))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_rows(tensor: Tensor) -> Tensor:
    """The numbers of the rows of a DTensor that this rank holds."""
    tensor = cast(DTensor, tensor)
    if any(placement.is_shard() and not placement.is_shard(0) for placement in tensor.placements):
        raise SsahError(f"model: a weight is sharded as {tensor.placements}; a compact layer needs Shard(0)")
    rows = torch.arange(tensor.shape[0], device=tensor.to_local().device)
    return _local(distribute_tensor(rows, tensor.device_mesh, tensor.placements, src_data_rank=None))


_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def _track(layer: _Compact) -> None:
    _watch_optimizers()
    _LIVE.add(layer)


@functools.cache
def _watch_optimizers() -> None:
    """Once per process, with the first compact layer: no other process pays for the hooks."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


_eagerly = torch.compiler.disable(reason="it follows what an optimizer does to compact leaves; leave fullgraph out")


@_eagerly
def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    # An optimizer may write through .data or a raw pointer, which no version counter shows.
    for layer in _layers_of(optimizer):
        layer._synced = None


@_eagerly
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for layer in _layers_of(optimizer):
        layer._catch_up()


def _layers_of(optimizer: torch.optim.Optimizer) -> list[_Compact]:
    """The layers whose leaves an optimizer holds, in its order, which is the same on every rank."""
    layers = {id(layer._parameters[LEAF]): layer for layer in _LIVE}
    held = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    return [layers[key] for key in held if key in layers]
