"""AdamW that trains only what a mask leaves free, and keeps optimizer state only for that.

`MaskedAdamW` takes the place of torch.optim.AdamW (Loshchilov & Hutter 2019, algorithm 2); `clip_grad_norm_` takes the
place of torch.nn.utils.clip_grad_norm_; `trainer_kwargs` hands both ideas to transformers' Trainer and to TRL.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT
from transformers.trainer_pt_utils import get_parameter_names

from ssah_fast import ops
from ssah_fast.compaction import LEAF, CompactConv1D, CompactLinear, compact, owner
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.masks import Mask, Region
from ssah_fast.units import canonical_name

__all__ = ["MaskedAdamW", "clip_grad_norm_", "trainer_kwargs"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)
_EXTRAS = {"kahan": "compensation", "master": "master"}  # rounding -> what it keeps per 16-bit parameter
_COMPACT = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", *_EXTRAS.values()})
# Elements up to which clipping copies the trainable part of a gradient, so that one call handles many small ones.
_COPIED = 1 << 17
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")  # as transformers' Trainer


class _Vetted(NamedTuple):
    """The tensors of a step, which need no second look at the next; held, so that no other takes their place."""

    tensors: tuple[list[Tensor | None], ...]
    forms: list[tuple[torch.Size, torch.dtype]]  # of the weights: .data may be replaced
    addresses: list[int]  # of all: any .data may be replaced

    def same(self, other: _Vetted) -> bool:
        """Whether these are the tensors of another step, too."""
        if self.addresses != other.addresses or self.forms != other.forms:
            return False
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(len(a) == len(b) and all(map(operator.is_, a, b)) for a, b in pairs)


@dataclass(eq=False)
class _Target:
    """Where one parameter's trainable elements are; worked out once and used at every step.

    Attributes:
        parameter: As the user gave it; may be a DTensor.
        device: Of the parameter when this was worked out.
        name: Canonical name, or "parameter 3".
        id: Tells parameters apart in the stochastic rounding; the same for a compact leaf and the weight it belongs to.
        axis: Of the region.
        index: int64, trainable indices along the axis of the LOCAL shard, on the parameter's device; None: all of it.
            Of a stack of experts, those of all experts, as in `Region`.
        shape: Of the local region; of a stack, flat: one expert's region after the other.
        offset: Where the local region's first element lies in the region of the whole parameter.
        whole: Shape of the region of the whole parameter.
        first: Number of the whole region's indices along the axis that lie before this shard.
        module: The CompactLinear or CompactConv1D whose leaf this is, where the op can write its weight.
        stack: How the op takes a stack of experts of which each has a region of its own.
        plain: The op takes the parameter as it is.
        frozen: Nothing of the whole parameter trains.
        narrow: It has 16 bits, so that rounding may need a tensor of its own.
    """

    parameter: Tensor
    device: torch.device
    name: str
    id: int
    axis: int
    index: Tensor | None
    shape: torch.Size
    offset: int
    whole: torch.Size
    first: int
    module: Any
    stack: _Stack | None
    plain: bool
    frozen: bool
    narrow: bool

    @property
    def cut(self) -> bool:
        """Whether the region is spread over the shards otherwise than the parameter."""
        if self.index is None or not isinstance(self.parameter, DTensor):
            return False
        return any(
            placement.is_shard() if self.stack else placement.is_shard(self.axis)
            for placement in self.parameter.placements
        )

    def select(self, x: Tensor) -> Tensor:
        """The region of a tensor that has the local shard's shape."""
        if self.stack is not None:
            return self.stack.select(x)
        return x if self.index is None else x.index_select(self.axis, self.index)

    def scatter(self, x: Tensor, region: Tensor) -> Tensor:
        """The tensor x of the local shard's shape with these values in the region."""
        if self.stack is not None:
            return self.stack.scatter(x, region)
        return region if self.index is None else x.index_copy_(self.axis, self.index, region)


@dataclass(eq=False)
class _Stack:
    """How the op takes a stack of experts of which each has a region of its own.

    Where the region is rows, the stack is one matrix with the rows of all experts; otherwise there is one entry per
    expert that trains. State is one flat tensor in either case, and the random numbers follow the place in it.

    Attributes:
        experts: The experts that train; None: the rows of all are one matrix.
        axis: Of the regions in their entries.
        indices: int64 per entry.
        shapes: Of the regions.
        sizes: Elements of the regions.
        held: What the views of the last step were made of.
        addresses: Where that was: any .data may be replaced.
        views: Of weight, moments, step counts and the other state, by entry.
        later: The step counts of all entries but the first, which is the parameter's own.
    """

    experts: list[int] | None
    axis: int
    indices: list[Tensor]
    shapes: list[torch.Size]
    sizes: list[int]
    held: tuple[Tensor | None, ...] = ()
    addresses: list[int] = field(default_factory=list)
    views: list[list[Any]] = field(default_factory=list)
    later: Tensor | None = None

    @classmethod
    def of(cls, local: Tensor, axis: int, trains: Tensor) -> _Stack:
        """The entries of a local shard, [experts, ...].

        Args:
            local: The shard.
            axis: Of the region in the stack.
            trains: bool [experts, size of the axis].
        """
        if not trains.any() or (axis == 1 and local.is_contiguous()):  # an op needs an entry, even an empty one
            experts, axis, lists = None, 0, [trains.flatten().nonzero().squeeze(1)]
        else:
            experts, axis = trains.any(1).nonzero().squeeze(1).tolist(), axis - 1
            lists = [trains[expert].nonzero().squeeze(1) for expert in experts]
        entry = local.shape[1:]
        shapes = [torch.Size((*entry[:axis], len(index), *entry[axis + 1 :])) for index in lists]
        indices = [index.to(local.device) for index in lists]
        return cls(experts, axis, indices, shapes, [shape.numel() for shape in shapes])

    def entries(self, x: Tensor) -> Sequence[Tensor]:
        """Views of a tensor of the local shard's shape."""
        if self.experts is None:
            return [x.view(x.shape[0] * x.shape[1], *x.shape[2:])]
        each = x.unbind(0)
        return [each[expert] for expert in self.experts]

    def regions(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor of the region."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def select(self, x: Tensor) -> Tensor:
        """The region of a tensor of the local shard's shape, flat."""
        parts = zip(self.entries(x.contiguous()), self.indices, strict=True)
        return torch.cat([part.index_select(self.axis, index).flatten() for part, index in parts])

    def scatter(self, x: Tensor, region: Tensor) -> Tensor:
        """The tensor x of the local shard's shape with these values in the region."""
        x = x.contiguous()
        for part, index, values in zip(self.entries(x), self.indices, self.regions(region), strict=True):
            part.index_copy_(self.axis, index, values)
        return x

    def rows(
        self, weight: Tensor, grad: Tensor, state: dict[str, Any], keys: Sequence[str | None], target: _Target
    ) -> list[tuple]:
        """What the op needs, by entry; `keys` name what the state holds beside moments and step, None for nothing."""
        flat = [None if key is None else state[key] for key in ("exp_avg", "exp_avg_sq", *keys)]
        held = weight, state["step"], *flat
        addresses = [x.data_ptr() for x in held if x is not None]
        if self.addresses != addresses or not all(map(operator.is_, self.held, held)):
            # The op counts on in every entry, and vets tensors that it did not see in the last step.
            steps = state["step"].repeat(len(self.indices))
            each = list(steps.unbind(0))
            state["step"], self.later = each[0], steps[1:]
            nothing = [None] * len(each)
            views = [nothing if x is None else self.regions(x) for x in flat]
            self.views = [list(self.entries(weight.detach())), views[0], views[1], each, *views[2:]]
            self.held = weight, each[0], *flat
            self.addresses = [x.data_ptr() for x in self.held if x is not None]
        cast(Tensor, self.later).copy_(state["step"])
        offsets = itertools.accumulate(self.sizes[:-1], initial=target.offset)
        weights, m, v, steps_of, largest, own = self.views
        return [
            (w, g, m_, v_, t, self.axis, index, most, extra, None, target.id, offset)
            for w, g, m_, v_, t, index, most, extra, offset in zip(
                weights,
                self.entries(grad.contiguous()),
                m,
                v,
                steps_of,
                self.indices,
                largest,
                own,
                offsets,
                strict=True,
            )
        ]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _shard(x: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Offsets and sizes of the local shard in the whole tensor."""
    if not isinstance(x, DTensor):
        return (0,) * x.dim(), x.shape
    sizes = x.to_local().shape
    chunk = x.__create_chunk_list__()[0]  # torch.distributed.checkpoint's own protocol
    return (tuple(chunk.offsets) if math.prod(sizes) else (0,) * len(sizes)), sizes


def _lines_of_stack(region: Region, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """What is frozen of every expert, bool [experts, size of the axis]: of the whole stack, and of the local shard."""
    axis, (offsets, sizes) = region.axis, _shard(parameter)
    lines = region.as_bool(region.indices_of(parameter.shape)).view(parameter.shape[0], parameter.shape[axis])
    return lines, lines.narrow(0, offsets[0], sizes[0]).narrow(1, offsets[axis], sizes[axis])


def _weight_name(name: str) -> str:
    """The canonical name of a parameter; that of the weight for a compact leaf, so that both draw the same numbers."""
    name = canonical_name(name)
    return f"{name[: -len(LEAF)]}weight" if name.endswith(f".{LEAF}") else name


def _module(name: str | None, parameter: Tensor) -> CompactLinear | CompactConv1D | None:
    """The compact layer whose leaf a parameter is; looking for it takes long where there are many."""
    return owner(parameter) if name is None or name.endswith(f".{LEAF}") else None


class _Place(NamedTuple):
    """What `_Target` says of a region, and where its local part starts in each dimension."""

    indices: Tensor | None
    stack: _Stack | None
    whole: list[int]
    shape: list[int]
    start: list[int]
    first: int


def _place(parameter: Tensor, region: Region, trainable: Tensor) -> _Place:
    """Of a region along one axis."""
    axis, (offsets, sizes) = region.axis, _shard(parameter)
    whole, shape, start, begin = list(parameter.shape), list(sizes), list(offsets), offsets[axis]
    first, last = (int(torch.searchsorted(trainable, bound)) for bound in (begin, begin + sizes[axis]))
    whole[axis], shape[axis], start[axis] = len(trainable), last - first, first
    return _Place((trainable[first:last] - begin).to(parameter.device), None, whole, shape, start, first)


def _place_in_stack(parameter: Tensor, region: Region, trainable: Tensor) -> _Place:
    """Of a region of its own in every expert; flat."""
    lines, local = _lines_of_stack(region, parameter)
    width = parameter.numel() // lines.numel()
    first = int((~lines[: _shard(parameter)[0][0]]).sum()) * width
    stack = _Stack.of(_local(parameter.detach()), region.axis, ~local)
    index = (~local).flatten().nonzero().squeeze(1).to(parameter.device)
    return _Place(index, stack, [len(trainable) * width], [sum(stack.sizes)], [first], first)


def _target(parameter: Tensor, name: str | None, position: int, mask: Mask | None) -> _Target:
    """Work out the region of one parameter.

    Raises:
        SsahError: The mask does not fit the parameter.
    """
    region = None if mask is None or name is None else mask.get(name)
    found = None if mask is None or name is None else mask.trainable(name, parameter.shape)
    axis, trainable = found or (0, None)
    frozen = trainable is not None and not trainable.numel()
    if region is None or trainable is None or frozen or len(trainable) == region.indices_of(parameter.shape):
        offsets, sizes = _shard(parameter)
        place = _Place(None, None, list(parameter.shape), list(sizes), list(offsets), 0)
    else:
        place = (_place_in_stack if region.stacked else _place)(parameter, region, trainable)
    index, stack, whole, shape, start, first = place
    strides = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
    module = _module(name, parameter)
    if module is not None and (isinstance(parameter, DTensor) or isinstance(module.weight, DTensor)):
        module = None  # leaf and weight are sharded differently; the module copies the leaf itself
    return _Target(
        parameter=parameter,
        device=parameter.device,
        name=f"parameter {position}" if name is None else canonical_name(name),
        id=position if name is None else ops.tensor_id(_weight_name(name)),
        axis=axis,
        index=index,
        shape=torch.Size(shape),
        offset=sum(i * stride for i, stride in zip(start, strides, strict=True)) if math.prod(shape) else 0,
        whole=torch.Size(whole),
        first=first,
        module=module,
        stack=stack,
        plain=module is None and stack is None and not isinstance(parameter, DTensor),
        frozen=frozen,
        narrow=parameter.dtype in _NARROW,
    )


def _scalar(x: float | Tensor) -> float:
    return x.item() if isinstance(x, Tensor) else x


def _rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """The learning rate for parameters on a device; a tensor on a GPU is left there unread for parameters on a GPU."""
    if not isinstance(lr, Tensor) or ops.read_by_host(lr.device) or ops.read_by_host(device):
        return float(lr)
    return lr.to(device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_hyperparameters(
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    foreach: bool | None,
    capturable: bool,
    fused: bool | None,
) -> None:
    """Refuse what torch.optim.AdamW refuses, in its words."""
    advice = "; leave foreach out, MaskedAdamW updates all tensors in one call anyway"
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise SsahError(f"lr as a Tensor is not supported for capturable=False and foreach=True{advice}")
        if lr.numel() != 1:
            raise SsahError(f"Tensor lr must be 1-element; it has {lr.numel()}")
    for name, value in (("learning rate", lr), ("epsilon value", eps), ("weight_decay value", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise SsahError(f"Invalid {name}: {value}; give a finite number of 0 or more")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise SsahError(f"Tensor betas[{i}] must be 1-element; it has {beta.numel()}")
        if not 0.0 <= beta < 1.0:
            raise SsahError(f"Invalid beta parameter at index {i}: {beta}; give a number of 0 or more and below 1")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise SsahError(f"betas must be either both floats or both Tensors; they are {betas}")
    if isinstance(betas[0], Tensor) and foreach and not capturable:
        raise SsahError(f"betas[0] as a Tensor is not supported for capturable=False and foreach=True{advice}")
    if foreach and fused:
        raise SsahError("`fused` and `foreach` cannot be `True` together; leave both out")


class MaskedAdamW(Optimizer):
    """AdamW that leaves what a mask freezes bit-identical, and holds moments only for the rest.

    Without a mask it does what torch.optim.AdamW does, with moments in float32 (float64 for float64 parameters)
    whatever the dtype of the parameters. Signature, errors, parameter groups, hooks, closures and schedulers are those
    of torch.optim.AdamW. Differences:

    - lr = 0 is a step that does nothing at all, moments and step count included.
    - With a GradScaler, unscaling and skipping happen inside the step (`grad_scale`, `found_inf`), as in fused AdamW.
    - bfloat16 and float16 parameters are updated in float32 and rounded as `rounding` says.
    - State is saved and loaded in its own dtype; torch would cast it to that of the parameter.
    - The step count is on the parameter's device, and a step never waits for a GPU (but for `check_grads`).
    - The leaf of a compact layer (`ssah_fast.compact`) is updated together with the layer's weight.

    Parameters sharded by FSDP2 (DTensors) are updated shard by shard; `state_dict` then holds DTensors, so that
    torch.distributed.checkpoint can save and load it.

    Args:
        params: Parameters, (name, parameter) pairs or groups of either. A mask needs names.
        lr: Learning rate, a float or a tensor with one element.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay; frozen elements do not decay.
        amsgrad: Divide by the largest second moment so far.
        mask: What is frozen; a parameter that it does not name trains as a whole. None: nothing is frozen.
        maximize: Ascend instead.
        foreach: Accepted and ignored: all tensors of a group are updated in one call anyway.
        capturable: Allow a CUDA graph to capture a step; the parameters must be on a GPU. Take one step before the
            capture. lr can then be a tensor on the GPU, which replays read anew.
        differentiable: Must be False.
        fused: Accepted and ignored, as foreach.
        rounding: How 16-bit parameters are rounded: "stochastic" (without bias, the same draws on every replica and
            after a resume), "kahan", "master" (a float32 copy of the trainable elements) or "nearest".
        seed: Of the stochastic rounding.
        check_grads: Look for NaN and Inf in the trainable gradients before each step.

    Raises:
        SsahError: A value is out of range, the mask does not fit the parameters, they have no names, or nothing is
            left to train. At the first step: a parameter or gradient is sparse, complex or on meta.
        TypeError, ValueError: Whatever torch.optim.Optimizer refuses about `params`.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        mask: Mask | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
        check_grads: bool = False,
    ) -> None:
        _check_hyperparameters(lr, betas, eps, weight_decay, foreach, capturable, fused)
        if differentiable:
            raise SsahError("differentiable=True is not supported: the step is no part of a graph; leave it False")
        if rounding not in ops.ROUNDINGS:
            raise SsahError(f"rounding={rounding!r} is unknown; choose one of {', '.join(ops.ROUNDINGS)}")
        if mask is not None and not isinstance(mask, Mask):
            raise SsahError(f"mask is a {type(mask).__name__}; give an ssah_fast.Mask, for example Mask.load(path)")
        self._mask = mask
        self._targets: dict[int, _Target] = {}
        self._vetted: dict[tuple[int, torch.device], tuple[_Vetted, dict[str, Any]]] = {}
        self._captured: list[Any] = []
        defaults = {
            "lr": lr,
            "betas": tuple(_scalar(beta) for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": False,
            "fused": fused,
            "rounding": rounding,
            "seed": seed,
            "check_grads": check_grads,
            "mask": "" if mask is None else mask.sha256,
        }
        super().__init__(params, defaults)
        self._check_mask(mask)

    @property
    def mask(self) -> Mask | None:
        """What is frozen; `migrate_mask` changes it."""
        return self._mask

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch.optim.Optimizer does.

        Raises:
            SsahError: There is a mask and the parameters have no names, or the mask does not fit their shapes.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if self._mask is not None:
                for name, parameter in _named(group):
                    if name is None:
                        raise SsahError(
                            "mask= needs the names of the parameters; pass model.named_parameters() "
                            "instead of model.parameters()"
                        )
                    _target(parameter, name, 0, self._mask)
        except SsahError:
            self.param_groups.pop()
            raise

    def _check_mask(self, mask: Mask | None) -> None:
        """Refuse a mask of other parameters; of a compact layer, the weight counts."""
        if mask is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in (pair for group in self.param_groups for pair in _named(group)):
            name, module = cast(str, name), _module(name, parameter)
            if module is not None:
                name, parameter = _weight_name(name), module.weight
                axis, index = mask.trainable(name, parameter.shape) or (module.region_axis, None)
                if axis != module.region_axis or index is None or not torch.equal(index, module.region_index.cpu()):
                    raise SsahError(f"mask: {name} was made compact for another mask; give compact the same one")
            tensors[name] = parameter
        mask.check(tensors.items(), complete=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mask": self._mask}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._targets, self._vetted, self._captured = {}, {}, []
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.update(mask=self.defaults["mask"], differentiable=False)
            for parameter in group["params"]:  # older versions kept the step count on the CPU
                own = self.state.get(parameter, {})
                if "step" in own:
                    own["step"] = torch.as_tensor(own["step"], dtype=torch.float32, device=parameter.device)

    def _target(self, parameter: Tensor) -> _Target:
        """The target of a parameter; worked out again if accelerate swapped it or `to` moved or cast it."""
        target = self._targets.get(id(parameter))
        if (
            target is None
            or target.parameter is not parameter
            or target.device != parameter.device
            or target.narrow != (parameter.dtype in _NARROW)
        ):
            pairs = (pair for group in self.param_groups for pair in _named(group))
            self._targets = {id(p): _target(p, name, i, self._mask) for i, (name, p) in enumerate(pairs)}
            target = self._targets[id(parameter)]
        return target

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            SsahError: A parameter or gradient is sparse, complex or on meta; nothing has changed then.
            NonFiniteError: check_grads is set and a trainable gradient has NaN or Inf; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch.compiler.disable
    def _update(self) -> None:
        work = [(group, *chunk) for group in self.param_groups for chunk in self._pending(group).items()]
        for group, device, pending in work:
            _check_capturable(group, device, pending[0][0])
        if not work or self._found_inf_on_host():
            return
        for group, _, pending in work:
            if group["check_grads"]:
                for target in dict.fromkeys(target for target, _ in pending):
                    _check_finite(target)
        for chunk in work:
            self._apply(*chunk)

    def _found_inf_on_host(self) -> bool:
        """Whether a GradScaler found Inf, if that is seen without waiting for a GPU or `check_grads` waits anyway."""
        found_inf = _plain(getattr(self, "found_inf", None))
        if found_inf is None:
            return False
        seen = ops.read_by_host(found_inf.device) or any(group["check_grads"] for group in self.param_groups)
        return seen and bool(found_inf.item())

    def _pending(self, group: dict[str, Any]) -> dict[torch.device, list[tuple[_Target, tuple]]]:
        """By device, what the op needs per parameter that has a gradient and something to train."""
        kept = _EXTRAS.get(group["rounding"])
        amsgrad, target_of, states = group["amsgrad"], self._target, self.state
        pending: dict[torch.device, list[tuple[_Target, tuple]]] = defaultdict(list)
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            target = target_of(parameter)
            if target.frozen:  # torch.distributed.checkpoint wants some state of all that have a gradient
                if "step" not in self.state[parameter]:
                    self.state[parameter]["step"] = _no_steps(target)
                continue
            if grad.layout is not torch.strided:
                raise SsahError(f"{target.name} has a sparse gradient; make it dense (nn.Embedding(sparse=False))")
            state, extra = states[parameter], kept if target.narrow else None
            if "exp_avg" not in state or (amsgrad and "max_exp_avg_sq" not in state) or (extra and extra not in state):
                _init_state(state, target, amsgrad, extra)
            weight, leaf, axis, index = parameter, None, target.axis, target.index
            if not target.plain:
                module = target.module
                if module is not None:
                    weight, leaf, axis, index = module.weight, parameter, module.region_axis, module.region_index
                elif isinstance(parameter, DTensor):
                    # to_local() would be another tensor at every step, and what is known of the last one of no use.
                    weight, grad = parameter._local_tensor, _local_grad(grad, parameter)
                if target.stack is not None:
                    keys = "max_exp_avg_sq" if amsgrad else None, extra
                    rows = target.stack.rows(weight, grad, state, keys, target)
                    pending[target.device] += ((target, row) for row in rows)
                    continue
            largest, own = state["max_exp_avg_sq"] if amsgrad else None, state[extra] if extra else None
            m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
            row = weight, grad, m, v, t, axis, index, largest, own, leaf, target.id, target.offset
            pending[target.device].append((target, row))
        return pending

    def _apply(self, group: dict[str, Any], device: torch.device, pending: list[tuple[_Target, tuple]]) -> None:
        lr, (beta1, beta2) = _rate(group["lr"], device), group["betas"]
        if isinstance(lr, float) and lr == 0:  # a leaf that was edited by hand must not be taken for written back
            return
        modules = [target.module for target, _ in pending if target.module is not None]
        if not ops.read_by_host(device):  # whether the step is skipped is not known here
            for module in modules:
                module._catch_up()
        rows = zip(*(row for _, row in pending), strict=True)
        *required, largest, extras, copies, ids, offsets = (list(column) for column in rows)
        weights, _, *state = required
        grad_scale, found_inf = (_plain(getattr(self, name, None)) for name in ("grad_scale", "found_inf"))
        ops.masked_adamw_(
            *required,
            lr=lr,
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            max_exp_avg_sqs=largest,
            extras=extras,
            copies=copies,
            rounding=group["rounding"],
            seed=group["seed"],
            ids=ids,
            offsets=offsets,
            grad_scale=None if grad_scale is None else grad_scale.to(device),
            found_inf=None if found_inf is None else found_inf.to(device),
            cache=self._cache(group, device, (weights, *state[:3], state[4], largest, extras, copies)),
        )
        for module in modules:
            module.mark_synced()

    def _cache(self, group: dict[str, Any], device: torch.device, tensors: tuple[list[Any], ...]) -> dict[str, Any]:
        """The op's cache for these tensors: that of the last step if they are the same."""
        vetted = _Vetted(
            tensors,
            [(weight.shape, weight.dtype) for weight in tensors[0]],
            [x.data_ptr() for column in tensors for x in column if x is not None],
        )
        before, cache = self._vetted.get((id(group), device), (None, {}))
        if before is None or not vetted.same(before):
            cache = {}
        if _capturing(device):
            if not cache:
                raise SsahError("the parameters or their state changed since the last step; run one before capturing")
            self._captured.append((vetted, dict(cache)))  # replays use them, whatever the optimizer does by then
        self._vetted[id(group), device] = vetted, cache
        return cache

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch.optim.AdamW's, with compact moments.

        The state of a sharded parameter comes as DTensors: of the region's shape where the region can be sharded like
        the parameter (columns of a row-sharded one), of the whole parameter's shape, with zeros for what is frozen,
        where it cannot (rows). A plain tensor per rank would be taken for a replica by torch.distributed.checkpoint.
        """
        saved = super().state_dict()
        for key, parameter in _saved_keys(saved["param_groups"], self.param_groups):
            if isinstance(parameter, DTensor) and key in saved["state"]:
                state, target = saved["state"][key], self._target(parameter)
                saved["state"][key] = {k: _as_dtensor(k, v, target) for k, v in state.items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, exactly.

        State of torch.optim.AdamW is loaded, too; with a mask, the trainable part of it. Hooks run as in
        torch.optim.Optimizer.

        Args:
            state_dict: Is not changed and shares no memory with the optimizer afterwards.

        Raises:
            SsahError: It was saved with another mask, or for other parameters.
            ValueError: The groups have other sizes.
        """
        restored: dict[Any, Any] = {}

        def take(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            restored.update(self._restore(saved))
            return {**saved, "state": {}}

        def give(_: Optimizer) -> None:
            self.state.update(restored)

        # Between the user's own hooks: the last before torch would cast the state, the first after it.
        handles = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(give, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, saved: dict[str, Any]) -> dict[Any, Any]:
        """State by parameter (and whatever else was saved, by its own key), checked and copied."""
        groups = saved["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return {}  # torch refuses it next, in its own words
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            _check_same_mask(mine, theirs)
        state = dict(saved["state"])
        restored: dict[Any, Any] = {}
        for key, parameter in _saved_keys(groups, self.param_groups):
            own = state.pop(key, None)
            if own:
                restored[parameter] = _restore_state(own, self._target(parameter))
        return {**state, **restored}

    def migrate_mask(self, mask: Mask | None) -> None:
        """Change what is frozen in the middle of a run.

        Moments of elements that were and stay trainable are kept, those of newly trainable ones start at zero (and
        their master copy at the weight), the rest is dropped. The step count goes on.

        Args:
            mask: The new mask; None trains everything.

        Raises:
            SsahError: It does not fit the parameters, they have no names, or a layer is compact. Nothing has changed
                then.
        """
        pairs = [pair for group in self.param_groups for pair in _named(group)]
        if mask is not None and any(name is None for name, _ in pairs):
            raise SsahError("mask needs the names of the parameters; build the optimizer from model.named_parameters()")
        if any(_module(name, parameter) for name, parameter in pairs):
            raise SsahError("migrate_mask: a compact layer trains one mask only; call ssah_fast.uncompact(model) first")
        self._check_mask(mask)
        after = {id(p): _target(p, name, i, mask) for i, (name, p) in enumerate(pairs)}
        for _, parameter in pairs:
            if parameter in self.state:
                old, new = self._target(parameter), after[id(parameter)]
                state = self.state[parameter].items()
                kept = [(k, v) for k, v in state if k not in _COMPACT or not (old.frozen or new.frozen)]
                self.state[parameter] = {k: _moved(k, v, old, new) for k, v in kept}
        self._mask, self._targets, self._vetted = mask, after, {}
        self.defaults["mask"] = "" if mask is None else mask.sha256
        for group in self.param_groups:
            group["mask"] = self.defaults["mask"]


def _named(group: Mapping[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
    """(name, parameter) of a group, by position: accelerate replaces the parameters and leaves the names."""
    parameters = group["params"]
    return zip(group.get("param_names") or [None] * len(parameters), parameters, strict=True)


def _saved_keys(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Any, Tensor]]:
    """(key in a state dict, parameter), by position."""
    for theirs, mine in zip(saved, groups, strict=True):
        yield from zip(theirs["params"], mine["params"], strict=True)


def _plain(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _local_grad(grad: Tensor, parameter: DTensor) -> Tensor:
    if isinstance(grad, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    return _local(grad)


def _check_capturable(group: Mapping[str, Any], device: torch.device, target: _Target) -> None:
    """Refuse what torch.optim.AdamW refuses when it steps, in its words."""
    if ops.read_by_host(device) and group["capturable"] and not group["fused"]:
        raise SsahError(f"If capturable=True, params must be on a GPU; {target.name} is on cpu: leave capturable False")
    if _capturing(device) and not group["capturable"]:
        raise SsahError(
            "Attempting graph capture of step() for an instance of MaskedAdamW but param_groups' capturable is False; "
            "make it with capturable=True"
        )


def _no_steps(target: _Target) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=target.device)


def _state_dtype(key: str, parameter: Tensor) -> torch.dtype:
    if key == "compensation":
        return parameter.dtype
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _init_state(state: dict[str, Any], target: _Target, amsgrad: bool, extra: str | None) -> None:
    """Add what is missing.

    Raises:
        SsahError: The parameter cannot be trained.
    """
    parameter = target.parameter
    if parameter.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise SsahError(f"{target.name} has dtype {parameter.dtype}; MaskedAdamW trains {allowed}")
    if parameter.device.type == "meta":
        raise SsahError(f"{target.name} is on meta and has no data; move the model to a real device first")
    if _capturing(target.device):  # replays would start from the first moments again and again
        raise SsahError(f"{target.name} has no moments yet; run one step before capturing")
    if "step" not in state:
        state["step"] = _no_steps(target)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if amsgrad else None, extra):
        if key is not None and key not in state:
            state[key] = _first_value(key, target)


def _first_value(key: str, target: _Target) -> Tensor:
    dtype = _state_dtype(key, target.parameter)
    if key != "master":
        return torch.zeros(target.shape, dtype=dtype, device=target.device)
    region = target.select(_local(target.parameter.detach()))
    return region.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _moved(key: str, value: Any, old: _Target, new: _Target) -> Any:
    """A state tensor of another region of the same parameter."""
    if key not in _COMPACT:
        return value
    local = _local(old.parameter.detach())
    dense = local.to(value.dtype, copy=True) if key == "master" else torch.zeros_like(local, dtype=value.dtype)
    return new.select(old.scatter(dense, value)).contiguous()


def _as_dtensor(key: str, value: Any, target: _Target) -> Any:
    """A sharded parameter's state tensor as torch.distributed.checkpoint needs it."""
    if key not in _COMPACT:
        return value
    parameter, shape = cast(DTensor, target.parameter), target.whole
    if target.cut:
        dense = torch.zeros(_local(parameter).shape, dtype=value.dtype, device=value.device)
        value, shape = target.scatter(dense, value), parameter.shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _check_same_mask(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse the state of another mask or, where a mask goes by names, of other parameters."""
    found = theirs.get("mask", mine["mask"])  # torch.optim.AdamW knows no mask
    if found != mine["mask"]:
        ours, other = (f"mask {sha[:12]}" if sha else "no mask" for sha in (mine["mask"], found))
        raise SsahError(
            f"state_dict: it was saved with {other}, this optimizer has {ours}; load it into an optimizer with the "
            "mask it was saved with and call migrate_mask"
        )
    names = [[canonical_name(name) for name in group.get("param_names", ())] for group in (mine, theirs)]
    if mine["mask"] and all(names) and names[0] != names[1]:
        here, there = next(pair for pair in zip(*names, strict=True) if pair[0] != pair[1])
        raise SsahError(
            f"state_dict: it has {there} where this optimizer has {here}; build it from the same parameters in the "
            "same order"
        )


def _restore_state(saved: Mapping[str, Any], target: _Target) -> dict[str, Any]:
    """A copy of one parameter's state, cut to its region and on its device."""
    restored: dict[str, Any] = {}
    for key, value in saved.items():
        if key in _COMPACT and target.frozen:
            continue
        if key == "step":
            restored[key] = torch.as_tensor(value).detach().to(target.device, torch.float32, copy=True).reshape(())
        elif key in _COMPACT:
            fitted = _fit(key, value.detach(), target)
            dtype = _state_dtype(key, target.parameter)
            restored[key] = fitted.to(target.device, dtype, copy=True).contiguous()
        else:
            restored[key] = copy.deepcopy(value)
    return restored


def _fit(key: str, value: Tensor, target: _Target) -> Tensor:
    """The local region of a saved state tensor, which is dense or compact, whole or sharded.

    Raises:
        SsahError: It has another shape.
    """
    dense = _local(target.parameter).shape
    if isinstance(value, DTensor):
        if not isinstance(target.parameter, DTensor):
            value = value.full_tensor()
        elif target.cut and value.shape == target.whole != target.parameter.shape:  # sharded where no row is split
            axis = 0 if target.stack else target.axis
            value = value.full_tensor().narrow(axis, target.first, target.shape[axis])
        else:
            value = value.to_local()
    if value.shape == target.shape:
        return value
    if value.shape == dense:
        return target.select(value)
    raise SsahError(
        f"state_dict: {key} of {target.name} has shape {list(value.shape)}; expected {list(target.shape)} or, "
        f"of all its elements, {list(dense)}"
    )


def _check_finite(target: _Target) -> None:
    """Refuse a gradient that has NaN or Inf where the parameter trains.

    Raises:
        NonFiniteError: Names the weight and the position in it.
    """
    parameter = target.parameter
    grad = cast(Tensor, parameter.grad)
    grad = _local_grad(grad, parameter) if isinstance(parameter, DTensor) else grad
    leaf = target.module is not None
    part = grad if leaf else target.select(grad)
    bad = ~part.isfinite()
    if not bad.any():
        return
    value = part[bad][0].item()
    if leaf:
        place = bad.nonzero()[0].tolist()
        axis = target.module.region_axis
        place[axis] = int(target.module.region_index[place[axis]])
    else:
        place = target.scatter(torch.zeros_like(grad, dtype=torch.bool), bad).nonzero()[0].tolist()
    place = [i + offset for i, offset in zip(place, _shard(parameter)[0], strict=True)]
    name = _weight_name(target.name) if leaf else target.name
    raise NonFiniteError(
        f"the gradient of {name} is {value} at {place}; nothing was changed: lower the learning rate or clip, or use a "
        "GradScaler, which skips such steps"
    )


_Clipped = nn.Module | MaskedAdamW | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


@torch.no_grad()
def clip_grad_norm_(
    parameters: _Clipped,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    mask: Mask | None = None,
) -> Tensor:
    """Scale gradients so that the norm over all trainable elements together is at most max_norm.

    torch.nn.utils.clip_grad_norm_ counts the gradients of frozen elements, too, and so makes the real step smaller.
    Here they neither count nor change. DTensors are reduced over their mesh: every rank must call this.

    Args:
        parameters: A model, a MaskedAdamW (whose mask is used), parameters or (name, parameter) pairs.
        max_norm: The bound.
        norm_type: Order of the norm, more than 0; math.inf for the largest absolute value.
        error_if_nonfinite: Refuse a norm that is NaN or Inf.
        mask: What is frozen; needs names, so a model or pairs.

    Returns:
        The norm before clipping, [] float32 (float64 for float64 gradients).

    Raises:
        SsahError: There is a mask and no names, the mask does not fit, a gradient is sparse, or norm_type is not
            positive.
        NonFiniteError: error_if_nonfinite is set and the norm is NaN or Inf; nothing has changed then.
    """
    if not norm_type > 0:
        raise SsahError(f"norm_type={norm_type} is no order of a norm; give a number above 0")
    gradients = [_Gradient(*item) for item in _gradients(parameters, mask)]
    if not gradients:
        return torch.tensor(0.0)
    total = _total_norm(gradients, float(norm_type))
    if error_if_nonfinite and not total.isfinite():
        raise NonFiniteError(
            f"the norm of the gradients is {total.item()}; nothing was changed: look for NaN and Inf in them, or leave "
            "error_if_nonfinite False"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if factor.device.type != "cpu" or factor != 1:  # elsewhere the look would wait for the device
        _scale(gradients, factor)
    return total


@dataclass(eq=False)
class _Gradient:
    """One gradient: what is summed over and scaled (the local shard), and where its trainable part is.

    Attributes:
        parameter: Whose gradient.
        axis: Of the region.
        index: Trainable indices along the axis of the local shard; None: all.
        stacked: The indices are those of a stack of experts, as in `Region`.
        local: The local shard.
        part: Its region, where this is a tensor or may be copied; None: to be worked on line by line.
    """

    parameter: Tensor
    axis: int
    index: Tensor | None
    stacked: bool = False
    local: Tensor = field(init=False)
    part: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        grad = cast(Tensor, self.parameter.grad)
        if grad.layout is not torch.strided:
            raise SsahError(f"a gradient of shape {list(grad.shape)} is sparse; make it dense before clipping")
        self.local = _local_grad(grad, self.parameter) if isinstance(self.parameter, DTensor) else grad
        if self.index is None:
            self.part = self.local
        elif self.local.numel() <= _COPIED and not self.stacked:
            self.part = self.local.index_select(self.axis, self.index)

    @property
    def mesh(self) -> tuple[Any, ...]:
        """The process groups over which the local shards make up the whole; empty for a plain tensor."""
        if not isinstance(self.parameter, DTensor):
            return ()
        mesh = self.parameter.device_mesh
        return tuple(mesh.get_group(i) for i, placement in enumerate(self.parameter.placements) if placement.is_shard())

    def norm(self, order: float) -> Tensor:
        """Of the part at the indices, without a copy of it and without a look at what is frozen."""
        dtype = torch.promote_types(self.local.dtype, torch.float32)
        others = [i for i, size in enumerate(self._lines) if size == 1]
        lines = torch.linalg.vector_norm(self.local, order, others, dtype=dtype) if others else self.local.to(dtype)
        return torch.linalg.vector_norm(lines.flatten().index_select(0, cast(Tensor, self.index)), order)

    def scale(self, factor: Tensor) -> None:
        """Multiply the part at the indices; the rest is multiplied by one."""
        factors = torch.ones(math.prod(self._lines), dtype=factor.dtype, device=factor.device)
        factors[self.index] = factor
        self.local.mul_(factors.view(self._lines))

    @property
    def _lines(self) -> list[int]:
        """The shape of one number per index: that of the local shard, with 1 for what an index goes through."""
        kept = (0, self.axis) if self.stacked else (self.axis,)
        return [size if i in kept else 1 for i, size in enumerate(self.local.shape)]


def _gradients(parameters: _Clipped, mask: Mask | None) -> Iterator[tuple[Tensor, int, Tensor | None, bool]]:
    """(parameter, axis, trainable indices or None, whether they are of a stack) of all that have a gradient."""
    if isinstance(parameters, MaskedAdamW):
        if mask is not None:
            raise SsahError("mask is the optimizer's own; leave it out")
        for parameter in (parameter for group in parameters.param_groups for parameter in group["params"]):
            target = parameters._target(parameter)
            if parameter.grad is not None and not target.frozen:
                yield parameter, target.axis, target.index, target.stack is not None
        return
    if isinstance(parameters, nn.Module):
        parameters = parameters.named_parameters()
    items: Iterable[Any] = [parameters] if isinstance(parameters, Tensor) else parameters
    for item in items:
        name, parameter = item if isinstance(item, tuple) else (None, item)
        if parameter.grad is None:
            continue
        if mask is None:
            yield parameter, 0, None, False
        elif name is None:
            raise SsahError("mask= needs the names of the parameters; pass the model or model.named_parameters()")
        elif name not in mask:
            yield parameter, 0, None, False
        else:
            target = _target(parameter, name, 0, mask)
            if not target.frozen:
                yield parameter, target.axis, target.index, target.stack is not None


def _total_norm(gradients: Sequence[_Gradient], order: float) -> Tensor:
    device = gradients[0].local.device
    by_mesh: dict[tuple[Any, ...], list[_Gradient]] = defaultdict(list)
    for gradient in gradients:
        by_mesh[gradient.mesh].append(gradient)
    norms = [_mesh_norm(groups, part, order).to(device) for groups, part in by_mesh.items()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _mesh_norm(groups: tuple[Any, ...], gradients: Sequence[_Gradient], order: float) -> Tensor:
    """Norm over gradients whose shards lie on the same processes; every process calls it, with or without elements."""
    device = gradients[0].local.device
    norms = [torch.zeros((), device=device)]
    norms += [x.norm(order).to(device) for x in gradients if x.part is None and cast(Tensor, x.index).numel()]
    for parts in _by_device_and_dtype(gradients):
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, order, dtype)), order).to(device))
    wide = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    norm = torch.linalg.vector_norm(torch.stack([norm.to(wide) for norm in norms]), order)
    for group in groups:
        power = norm if math.isinf(order) else norm**order
        torch.distributed.all_reduce(power, ReduceOp.MAX if math.isinf(order) else ReduceOp.SUM, group)
        norm = power if math.isinf(order) else power ** (1 / order)
    return norm


def _by_device_and_dtype(gradients: Iterable[_Gradient]) -> Iterable[list[Tensor]]:
    """The parts that are tensors and not empty."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for x in gradients:
        if x.part is not None and x.part.numel():
            found[x.part.device, x.part.dtype].append(x.part)
    return found.values()


def _scale(gradients: Sequence[_Gradient], factor: Tensor) -> None:
    for parts in _by_device_and_dtype(gradients):
        torch._foreach_mul_(parts, factor.to(parts[0].device))
    for x in gradients:
        if x.part is None:
            x.scale(factor.to(x.local.device))
        elif x.index is not None:
            x.local.index_copy_(x.axis, x.index, x.part)


def trainer_kwargs(mask: Mask | None, *, compact: bool = True, **optimizer_arguments: Any) -> dict[str, Any]:
    """Arguments for transformers' Trainer and TRL's SFTTrainer that make them train under a mask.

    ``Trainer(model, args, train_dataset=data, **trainer_kwargs(mask, lr=args.learning_rate))``

    As in the Trainer's own optimizers, biases and norms get no weight decay. Gradients of frozen elements are not
    computed (compact) or set to zero as they come, so that the Trainer's clipping counts trainable elements only.

    Args:
        mask: What is frozen; None: nothing.
        compact: Whether to make the model compact (`ssah_fast.compact`), unless it is already.
        **optimizer_arguments: Of MaskedAdamW. `lr` must be given: a Trainer passes its arguments' learning_rate and
            weight_decay to its own optimizers only.

    Returns:
        {"optimizer_cls_and_kwargs": ...}

    Raises:
        SsahError: lr is missing.
    """
    if "lr" not in optimizer_arguments:
        raise SsahError("trainer_kwargs needs lr=args.learning_rate; a Trainer hands it to its own optimizers only")
    return {
        "optimizer_cls_and_kwargs": (_factory, {"mask": mask, "make_compact": compact, **optimizer_arguments}),
    }


def _factory() -> Callable[..., MaskedAdamW]:
    """What a Trainer calls to get the function that makes its optimizer from the model."""
    return _build


def _build(model: nn.Module, *, mask: Mask | None, make_compact: bool, **optimizer_arguments: Any) -> MaskedAdamW:
    if mask is not None:
        if make_compact and not any(isinstance(x, CompactLinear | CompactConv1D) for x in model.modules()):
            compact(model, mask)
        _silence_frozen(model, mask)
    return MaskedAdamW(decay_groups(model), mask=mask, **optimizer_arguments)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that train, by name, in groups as transformers' Trainer makes them: biases and norms do not decay.

    Args:
        model: The model.

    Returns:
        Parameter groups for `MaskedAdamW`; none is empty.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(_NO_DECAY)))
    pairs = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in pairs if pair[0] in decayed]},
        {"params": [pair for pair in pairs if pair[0] not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _silence_frozen(model: nn.Module, mask: Mask) -> None:
    """Zero the gradients of frozen elements as soon as they are computed."""
    for name, parameter in model.named_parameters():
        region = mask.get(name)
        if region is None or not parameter.requires_grad or region.empty:
            continue
        if region.frozen is None:
            parameter.requires_grad_(False)
        elif region.stacked:
            lines = _lines_of_stack(region, parameter)[1]
            shape = [size if i in (0, region.axis) else 1 for i, size in enumerate(_local(parameter.detach()).shape)]
            parameter.register_post_accumulate_grad_hook(
                _Silencer(region.axis, lines.reshape(shape).to(parameter.device))
            )
        else:
            (begin, size), axis = (numbers[region.axis] for numbers in _shard(parameter)), region.axis
            local = region.frozen[(region.frozen >= begin) & (region.frozen < begin + size)] - begin
            parameter.register_post_accumulate_grad_hook(_Silencer(axis, local.to(parameter.device)))


@dataclass
class _Silencer:
    """Zeroes lines of a gradient's local shard; a hook that can be copied with the model.

    Attributes:
        axis: Of the lines.
        lines: int64, which; for a stack of experts bool, one per line, in a shape that is broadcast to the shard's.
    """

    axis: int
    lines: Tensor

    def __call__(self, parameter: Tensor) -> None:
        grad = _local(cast(Tensor, parameter.grad))
        self.lines = self.lines.to(grad.device)
        if self.lines.dtype == torch.bool:
            grad.masked_fill_(self.lines, 0)
        else:
            grad.index_fill_(self.axis, self.lines, 0)
