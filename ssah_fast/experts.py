"""Runs routed experts one after the other, so that what each one's down projection reads can be seen.

transformers keeps all experts of a layer in one module with 3-D parameters, and no module of an expert's own sees its
hidden channels. But such a module looks up, by a name in its config, the function that runs it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ssah_fast import matmul
from ssah_fast.units import activation_name

IMPLEMENTATION = "ssah_fast"

# (rows, experts of each row, weights of each row) -> rows, as an experts module is called
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
# (expert, what its gate and up projection wrote [n, 2I], which of the module's rows these are [n]) -> [n, I]
Gate = Callable[[int, Tensor, Tensor], Tensor]

_FORWARDS: dict[nn.Module, Forward] = {}


def _dispatch(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return _FORWARDS[module](hidden_states, top_k_index, top_k_weights)


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Have each of these experts modules run by its function; the model is as it was afterwards.

    Args:
        forwards: By experts module (transformers' use_experts_implementation); all those that share a config.
    """
    configs: list[Any] = list({id(module.config): module.config for module in forwards}.values())
    before = [config._experts_implementation_internal for config in configs]
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dispatch)
    _FORWARDS.update(forwards)
    try:
        # The attribute behind the property, whose setter would reach into nested configs too.
        for config in configs:
            config._experts_implementation_internal = IMPLEMENTATION
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation_internal = implementation
        for module in forwards:
            del _FORWARDS[module]


def gate_activation(module: nn.Module) -> str | None:
    """The activation (ops.ACTIVATIONS) of experts known to compute act(gate) * up, gates before ups; None of others."""
    plain = getattr(getattr(module, "_apply_gate", None), "__name__", None) == "_default_apply_gate"
    return activation_name(getattr(module, "act_fn", None)) if plain else None


def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate: Gate) -> Tensor:
    """Compute what transformers' grouped_mm does, the experts one after the other.

    Rounds where grouped_mm rounds, and takes float64 as well; where torch emulates bf16, matmul.linear multiplies.
    Weights are looked up here, so that they may come and go between calls. Memory beside the result: what one expert's
    rows need, and [rows * k, H].

    Args:
        module: An experts module with gate_up_proj and down_proj; its biases and is_transposed are respected.
        hidden_states: [rows, H].
        top_k_index: int64 [rows, k], the experts of each row.
        top_k_weights: [rows, k], their weights.
        gate: Called for every expert that has rows, in the order of the experts.

    Returns:
        [rows, H], as hidden_states.
    """
    count, k = top_k_index.shape
    experts, places = top_k_index.reshape(-1).sort(stable=True)
    ends = torch.bincount(experts, minlength=len(module.down_proj)).cumsum(0).tolist()
    weights = top_k_weights.reshape(-1, 1)
    dtype = torch.promote_types(hidden_states.dtype, weights.dtype)
    weighted = hidden_states.new_empty(count * k, hidden_states.shape[1], dtype=dtype)
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            here = places[start:end]
            rows = here // k
            hidden = gate(expert, _linear(module, "gate_up_proj", expert, hidden_states[rows]), rows)
            weighted[here] = _linear(module, "down_proj", expert, hidden) * weights[here]
        start = end
    return weighted.view(count, k, -1).sum(1).to(hidden_states.dtype)


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    out = matmul.linear(x, getattr(module, name)[expert], transposed=not module.is_transposed)
    # As grouped_mm does: the product is rounded before the bias is added.
    return out.add_(getattr(module, f"{name}_bias")[expert]) if module.has_bias else out
