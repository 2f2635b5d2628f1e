"""How much memory a fine-tuning run takes, from the config alone: no weight is read and none is allocated.

Weights, gradients and moments are counted exactly. Activations are what autograd would save for backward: the model's
own forward runs on fake tensors (`torch._subclasses.FakeTensorMode`), and the bytes it saves are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ssah_fast import experts
from ssah_fast.masks import Mask
from ssah_fast.units import canonical_name, decoder_layers

# trl 1.16 computes the loss from tiles of [tokens, words] logits of at most this size (trl/kernels/chunked_logprob.py).
_TILE_TOKENS, _TILE_WORDS = 4096, 32768


@dataclass(frozen=True)
class Bytes:
    """Bytes per process.

    Attributes:
        weights: Parameters and buffers.
        copies: Compact leaves: the trainable slices beside the full weights.
        gradients: One gradient per trainable tensor or slice.
        moments: Both moments of AdamW, for trainable elements.
        rounding: Kahan compensation or fp32 master.
        buckets: What DistributedDataParallel adds: gradients once more.
        activations: What autograd saves for backward, at the largest batch.
        head: Working memory of the loss.
    """

    weights: int = 0
    copies: int = 0
    gradients: int = 0
    moments: int = 0
    rounding: int = 0
    buckets: int = 0
    activations: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))

    def to_json(self) -> dict[str, int]:
        """The parts and "total"."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, and what the same run would need if it trained everything densely.

    Attributes:
        run: With the mask.
        dense: Without.
        processes: How many processes share the work; each needs this much.
    """

    run: Bytes
    dense: Bytes
    processes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"processes": self.processes, "run": self.run.to_json(), "dense": self.dense.to_json()}


def plan(
    model: PreTrainedModel,
    mask: Mask | None = None,
    *,
    compact: bool = True,
    max_fraction: float = 0.5,
    rounding: str = "stochastic",
    batch_size: int = 8,
    seq_length: int = 1024,
    gradient_checkpointing: bool = False,
    processes: int = 1,
) -> MemoryPlan:
    """Add up the memory of one process.

    Args:
        model: From `loading.empty_model`, or any transformers model; only shapes and dtypes are read.
        mask: What is frozen; None trains everything.
        compact: Whether layers are made compact.
        max_fraction: Up to which trainable part a linear layer becomes compact.
        rounding: "stochastic", "nearest", "kahan" or "master".
        batch_size: Sequences per forward pass.
        seq_length: Tokens per sequence.
        gradient_checkpointing: Whether layers are computed again in backward.
        processes: Number of processes (data parallel).

    Returns:
        The plan.

    Raises:
        SsahError: The mask was made for another model.
    """
    if mask is not None:
        mask.check(model.named_parameters())
    batch = _Batch(batch_size, seq_length, gradient_checkpointing)
    run = _bytes(model, _parts(model, mask, max_fraction if compact else 0.0), rounding, processes, batch)
    dense = run if mask is None else _bytes(model, _parts(model, None, 0.0), rounding, processes, batch)
    return MemoryPlan(run, dense, processes)


@dataclass(frozen=True)
class _Batch:
    size: int
    length: int
    checkpointing: bool


@dataclass(frozen=True)
class _Part:
    """What trains of one parameter; `selected` is the number of input columns that a compact column layer keeps."""

    tensor: torch.Tensor
    trainable: int
    compact: bool = False
    selected: int | None = None


def _parts(model: nn.Module, mask: Mask | None, max_fraction: float) -> dict[str, _Part]:
    linear = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    parts = {}
    for name, parameter in model.named_parameters():
        found = None if mask is None else mask.trainable(name, parameter.shape)
        axis, count = (0, parameter.shape[0]) if found is None else (found[0], len(found[1]))
        lines = parameter.shape[0] if mask is None or found is None else mask[name].indices_of(parameter.shape)
        trainable = parameter.numel() // max(lines, 1) * count
        small = 0 < count <= max_fraction * lines
        compact = found is not None and name in linear and small
        reads_columns = compact and axis == (0 if isinstance(linear[name], Conv1D) else 1)
        parts[name] = _Part(parameter, trainable, compact, count if reads_columns else None)
    return parts


def _bytes(
    model: PreTrainedModel,
    parts: dict[str, _Part],
    rounding: str,
    processes: int,
    batch: _Batch,
) -> Bytes:
    copies = gradients = moments = extra = 0
    for part in parts.values():
        width = part.tensor.element_size()
        copies += part.compact * part.trainable * width
        gradients += width * (part.trainable if part.compact else (part.trainable > 0) * part.tensor.numel())
        moments += 2 * part.trainable * max(width, 4)
        if width < 4:
            extra += part.trainable * {"kahan": width, "master": 4}.get(rounding, 0)
    stored = [*(part.tensor for part in parts.values()), *model.buffers()]
    return Bytes(
        weights=sum(tensor.numel() * tensor.element_size() for tensor in stored),
        copies=copies,
        gradients=gradients,
        moments=moments,
        rounding=extra,
        buckets=gradients if processes > 1 else 0,
        activations=_activations(model, parts, batch),
        head=_head(model, parts, batch.size * batch.length),
    )


def _head(model: PreTrainedModel, parts: dict[str, _Part], tokens: int) -> int:
    """One tile of logits, and the fp32 sums of the gradients of the hidden states and of the head's weight."""
    weight = model.get_output_embeddings().weight
    words, hidden = weight.shape
    trains = any(part.tensor is weight and part.trainable for part in parts.values())
    tile = min(tokens, _TILE_TOKENS) * min(words, _TILE_WORDS) * weight.element_size()
    return tile + 4 * tokens * hidden + (4 * weight.numel() if trains else 0)


class _Saved:
    """Counts the bytes that autograd saves, each storage once, per decoder layer and outside of the layers."""

    def __init__(self, model: nn.Module) -> None:
        self.layer: int | None = None
        self.bytes: dict[int | None, int] = {}
        self.hidden = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._counted: dict[int, torch.Tensor] = {}  # keeps them alive, so that no address is used twice

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights and storage._cdata not in self._counted:
            self._counted[storage._cdata] = tensor
            self.bytes[self.layer] = self.bytes.get(self.layer, 0) + storage.nbytes()
        return tensor

    @contextmanager
    def watching(self, layers: nn.ModuleList) -> Iterator[None]:
        def enter(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                self.layer, self.hidden = index, hidden.numel() * hidden.element_size()

            return hook

        def leave(*_: Any) -> None:
            self.layer = None

        handles = [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _activations(model: PreTrainedModel, parts: dict[str, _Part], batch: _Batch) -> int:
    with FakeTensorMode():
        fake = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).train()
        for name, parameter in fake.named_parameters():
            part = parts[canonical_name(name)]
            # A compact column layer saves its selected inputs only; they are added below.
            parameter.requires_grad_(part.trainable > 0 and part.selected is None)
        fake.get_input_embeddings().weight.requires_grad_(True)  # the graph must reach all layers
        saved = _Saved(fake)
        tokens = torch.zeros(batch.size, batch.length, dtype=torch.int64)
        routed = {
            module: functools.partial(_routed, module) for module in fake.modules() if hasattr(module, "is_transposed")
        }
        with experts.replaced(routed), saved.watching(decoder_layers(fake)[1]):
            fake.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    item = torch.empty(0, dtype=model.dtype).element_size()
    outside = saved.bytes.pop(None, 0)
    layers = list(saved.bytes.values())
    selected = [
        part.selected * batch.size * batch.length * item for part in parts.values() if part.selected is not None
    ]
    inside = sum(layers) + sum(selected)
    if batch.checkpointing and layers:
        depth = model.config.get_text_config().num_hidden_layers
        inside = depth * saved.hidden + max(layers) + sum(selected) // depth
    return outside + inside


def _routed(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What transformers' grouped experts save for backward: the same tensors, from products with one expert.

    Their own product knows fake tensors in bf16 only.
    """
    count, k = chosen.shape
    ids, order = torch.sort(chosen.reshape(-1))
    out = _product(module, "gate_up_proj", hidden[order // k], ids)
    out = _product(module, "down_proj", module._apply_gate(out), ids) * weights.reshape(-1)[order].unsqueeze(-1)
    return out[torch.argsort(order)].view(count, k, -1).sum(1).to(hidden.dtype)


def _product(module: Any, name: str, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[0]
    out = rows @ (weight if module.is_transposed else weight.T)
    return out + getattr(module, f"{name}_bias")[ids] if module.has_bias else out
