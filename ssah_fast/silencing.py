"""Silences units of a model in memory: the layer that reads them gets zeros, or their mean, in their place.

A unit's channels are the reader's input channels, so silencing it gives what a reader with zeros in these columns of
its weight gives (method.md's oracle 9, and SSAH's ablation, arXiv 2410.10862). No weight is edited: hooks in front of
the readers do it, and the rows of one batch may each have other units silenced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssah_fast import experts
from ssah_fast.errors import SsahError
from ssah_fast.units import UnitModule, canonical_name, find_units

# By module, which of its units are silent, bool [units]; a module that is not named has none.
Silent = Mapping[str, Tensor]


def check_layouts(model: nn.Module, layouts: Mapping[str, UnitModule]) -> None:
    """Refuse units of another model.

    Args:
        model: Only names and shapes are read, so it may be on the meta device.
        layouts: The units of every module, from a scores or units file.

    Raises:
        SsahError: A module is not in both, or has other units, or keeps them elsewhere.
    """
    expected = [{layout.name: layout.to_json() for layout in find_units(model)}]
    with contextlib.suppress(SsahError):  # OLMo 2 has no heads as units; anything else was refused above
        expected.append({layout.name: layout.to_json() for layout in find_units(model, "head")})
    stored = {name: layout.to_json() for name, layout in layouts.items()}
    if stored not in expected:
        names = {**expected[0], **stored}
        odd = next(name for name in names if all(stored.get(name) != found.get(name) for found in expected))
        raise SsahError(f"units of another model: {odd} is not the same in the units file and in the model; score it")


@contextlib.contextmanager
def silenced(
    model: nn.Module,
    layouts: Mapping[str, UnitModule],
    variants: Sequence[Silent],
    rows: Sequence[int] | None = None,
    means: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Silence units while the context lasts; the model is as it was afterwards, also after an error.

    Args:
        model: A model of a supported architecture, wrapped (DataParallel, torch.compile) or not, on any device.
        layouts: Its units.
        variants: Which units are silent; one variant per way of having the model.
        rows: The variant of every row of the batches that will run; None: variant 0 of all rows, whatever their number.
        means: By module, what the reader's channels get instead of zeros: [channels], any float dtype.

    Raises:
        SsahError: A variant names a module or a number of units that the layouts do not have, or a row a variant that
            is not there; while the context lasts, a batch that does not have as many rows.
    """
    _check(layouts, variants, rows)
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    pools: dict[str, dict[int, _Channels]] = {}
    with contextlib.ExitStack() as undo:
        for name, layout in layouts.items():
            if not any(name in variant and variant[name].any() for variant in variants):
                continue
            channels = _Channels(layout, variants, rows, None if means is None else means[name])
            if layout.expert is None:
                undo.callback(modules[layout.reader].register_forward_pre_hook(_hook(channels)).remove)
            else:
                pools.setdefault(layout.reader, {})[layout.expert] = channels
        forwards = {modules[name]: _experts_forward(modules[name], pool) for name, pool in pools.items()}
        undo.enter_context(experts.replaced(forwards))
        yield


class _Channels:
    """The silent input channels of one reader, per row of the batch, and what they read instead."""

    def __init__(
        self, layout: UnitModule, variants: Sequence[Silent], rows: Sequence[int] | None, mean: Tensor | None
    ) -> None:
        inputs = layout.inputs()
        silent = torch.zeros(len(variants), inputs.numel(), dtype=torch.bool)
        for flags, variant in zip(silent, variants, strict=True):
            if layout.name in variant:
                flags[inputs[variant[layout.name].cpu()].flatten()] = True
        self._silent = silent[:1] if rows is None else silent[list(rows)]  # [rows, channels]
        self._value = torch.zeros(1) if mean is None else mean

    def apply(self, x: Tensor, tokens: Tensor | None = None, total: int | None = None) -> Tensor:
        """What the reader gets instead of x.

        Args:
            x: [..., channels]; its leading axes, flattened, are the batch's rows one after the other, unless:
            tokens: int64 [n]; x is [n, channels] and holds these of the batch's `total` tokens.
            total: How many tokens there are.
        """
        # As large as [rows, channels], so these stay where the reader is once they are there.
        self._silent, self._value = self._silent.to(x.device), self._value.to(x)
        count = x.shape[:-1].numel() if total is None else total
        if count % len(self._silent):
            raise SsahError(
                f"rows has {len(self._silent)} entries, but the batch's {count} tokens are not as many rows"
            )
        if tokens is not None:
            return torch.where(self._silent[tokens // (count // len(self._silent))], self._value, x)
        by_row = x.reshape(len(self._silent), -1, x.shape[-1])
        return torch.where(self._silent.unsqueeze(1), self._value, by_row).view(x.shape)


def _hook(channels: _Channels) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (channels.apply(args[0]), *args[1:])


def _experts_forward(module: Any, pool: Mapping[int, _Channels]) -> experts.Forward:
    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def gate(expert: int, gate_up: Tensor, tokens: Tensor) -> Tensor:
            hidden: Tensor = module._apply_gate(gate_up)
            return pool[expert].apply(hidden, tokens, len(hidden_states)) if expert in pool else hidden

        return experts.run(module, hidden_states, top_k_index, top_k_weights, gate)

    return forward


def _check(layouts: Mapping[str, UnitModule], variants: Sequence[Silent], rows: Sequence[int] | None) -> None:
    for number, variant in enumerate(variants):
        for name, chosen in variant.items():
            units = layouts[name].units if name in layouts else 0
            if chosen.dtype != torch.bool or tuple(chosen.shape) != (units,):
                raise SsahError(
                    f"variants[{number}]: {name} is {chosen.dtype} {list(chosen.shape)}, but has {units} units; "
                    "give bool [units] of the modules in layouts"
                )
    if rows is not None and not all(0 <= row < len(variants) for row in rows):
        raise SsahError(f"rows={list(rows)} names a variant that is not one of the {len(variants)} given")
