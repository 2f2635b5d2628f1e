"""Runs a checkpoint one decoder layer at a time: in the memory of two layers, each of which is read once.

For layer i and batch j the model's own decoder is started on the batch; the layers before i hand their input on, layer
i takes what it is to read from the hidden states that are kept, leaves what it writes there, and ends the pass. So
masks, positions and windows are the model's own, only one batch's masks exist at a time, and between two such steps the
state of a run is (layer, batch), the hidden states and the moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ssah_fast.collector import Collector, Point, Report
from ssah_fast.data import Batch
from ssah_fast.hidden_states import HiddenStates
from ssah_fast.layer_loader import LayerLoader
from ssah_fast.units import UnitModule, decoder_layers, text_decoder


class _Passed(Exception):
    """Ends a forward pass behind the layer that was to run."""


class LayerRunner:
    """Runs batches layer by layer and has a collector watch.

    Args:
        loader: puts the layers into its model.
        collector: of that model.
        layouts: its units, in forward order.
        hidden: where the hidden states are kept.
    """

    def __init__(
        self, loader: LayerLoader, collector: Collector, layouts: Sequence[UnitModule], hidden: HiddenStates
    ) -> None:
        self._loader, self._collector, self._hidden = loader, collector, hidden
        decoder = text_decoder(loader.model)
        self._embedding: Any = decoder.get_input_embeddings()
        self._prefix, self._layers = decoder_layers(loader.model)
        self._layouts = [[layout for layout in layouts if layout.layer == i] for i in range(loader.layers)]
        self._layer = self._batch = 0

    def run(
        self,
        batches: Sequence[Batch],
        progress: Report | None = None,
        *,
        start: tuple[int, int] = (0, 0),
        point: Point | None = None,
    ) -> None:
        """Run the batches that remain through the layers that remain.

        Args:
            batches: from data.make_batches.
            progress: called with (tokens done, tokens in all), counted once per layer, padding included, after every
                batch of every layer.
            start: the layer and, in it, the batch to begin with; the collector and the hidden states hold what came
                before.
            point: called with (layer, batch), where the run would go on, after every batch; it may save, and may raise.

        Raises:
            NonFiniteError: a NaN or Inf in a layer's weights, or in what its readers read.
            RunError: a file cannot be read.
        """
        first, skipped = start
        if start == (0, 0):
            self._collector.restore({})
        if first == self._loader.layers or not batches:
            return
        count = _Count(batches, self._loader.layers, progress)
        self._loader.start(first)
        self._loader.load_rest(embeddings=first == 0)
        with self._collector.watching(), self._replaced():
            for layer in range(first, self._loader.layers):
                with self._loader.layer(layer):
                    self._run_layer(layer, batches, skipped, count, point)
                skipped = 0
                if layer == 0:
                    self._loader.free_embeddings()

    def _run_layer(
        self, layer: int, batches: Sequence[Batch], skipped: int, count: _Count, point: Point | None
    ) -> None:
        layouts = self._layouts[layer]
        awaited = layouts if layer == self._loader.layers - 1 else ()
        self._collector.check_weights(f"{self._prefix}.{layer}.")
        self._collector.take_norms(layouts)
        self._layer = layer
        for number, batch in enumerate(batches[skipped:], skipped):
            self._batch = number
            with contextlib.suppress(_Passed):
                self._collector.forward(batch, awaited)
            count.done(layer, number)
            if point is not None and number + 1 < len(batches):
                point(layer, number + 1)
        self._collector.check_moments(layouts)
        self._collector.settle(layouts)
        if point is not None:
            point(layer + 1, 0)

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Have the layers run one at a time, and the embedding only for the first; all is as it was afterwards."""
        with contextlib.ExitStack() as undo:
            replacements = [(layer, self._stepped(i, layer.forward)) for i, layer in enumerate(self._layers)]
            for module, forward in [*replacements, (self._embedding, self._embedded(self._embedding.forward))]:
                module.forward = forward
                undo.callback(delattr, module, "forward")
            yield

    def _stepped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def step(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index < self._layer:
                return hidden_states
            if index > 0:
                hidden_states = self._hidden.take(self._batch)
            self._hidden.put(self._batch, forward(hidden_states, *args, **kwargs))
            raise _Passed

        return step

    def _embedded(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        weight = self._embedding.weight

        def embed(input_ids: Tensor) -> Tensor:
            if self._layer == 0:
                return forward(input_ids)
            # Nobody reads it: what matters is its shape, dtype and device.
            blank = torch.zeros((), dtype=weight.dtype, device=input_ids.device)
            return blank.expand(*input_ids.shape, weight.shape[1])

        return embed


class _Count:
    """Tells how far a run is."""

    def __init__(self, batches: Sequence[Batch], layers: int, progress: Report | None) -> None:
        self._sizes = [batch.input_ids.numel() for batch in batches]
        self._layers, self._progress = layers, progress

    def done(self, layer: int, batch: int) -> None:
        """A batch has passed a layer."""
        if self._progress is not None:
            total = sum(self._sizes)
            self._progress(layer * total + sum(self._sizes[: batch + 1]), self._layers * total)
