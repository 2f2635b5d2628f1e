"""Watches a model's readers while it runs, and keeps the moments of what they read.

The model's own code runs. A forward pre-hook on each reader sees its input; in a gated MLP whose forward is known, the
product act(gate) * up and its moments are one kernel instead. Both are undone when the run ends, whatever ended it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssah_fast import matmul, ops
from ssah_fast.data import Batch
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.scores import SETS, ModuleScores
from ssah_fast.units import GatedMLP, UnitModule, canonical_name, decoder_layers, text_decoder

Progress = Callable[[int, int], None]

HALVES = 2  # group ids of a batch are 2 * set + half (data.make_batches)


class _Finished(Exception):
    """Ends a forward pass when every reader has seen its input: the rest of the model serves nobody."""


@dataclass
class _Moments:
    """State of one reader: count [G], mean and m2 [G, H]."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, groups: int, channels: int, device: torch.device) -> "_Moments":
        return cls(
            torch.zeros(groups, dtype=torch.int64, device=device),
            torch.zeros(groups, channels, dtype=torch.float64, device=device),
            torch.zeros(groups, channels, dtype=torch.float64, device=device),
        )

    def add(self, x: Tensor, group: Tensor) -> None:
        ops.channel_moments_(x, group, self.count, self.mean, self.m2)


class _FlapMoments(_Moments):
    """FLAP's recurrence as released (arXiv 2312.11983, lib/layerwrapper.py), for one sequence at a time; m2 holds F.

    With n sequences seen: mu' = (n mu + mean_t x) / (n + 1), and for n >= 1:
    F' = F (n - 1) / n + sum_t (x_t - mu')^2 / (n + 1). The first sequence's own spread is dropped.
    Slots per set: each half, and everything.
    """

    def __init__(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        super().__init__(count, mean, m2)
        self.sequences = [0] * len(count)

    @classmethod
    def empty(cls, groups: int, channels: int, device: torch.device) -> "_Moments":
        return super().empty(groups // HALVES * (HALVES + 1), channels, device)

    def add(self, x: Tensor, group: Tensor) -> None:
        one = _Moments.empty(1, x.shape[1], x.device)
        one.add(x, torch.where(group < 0, group, torch.zeros_like(group)))
        which, half = divmod(int(group.max()), HALVES)
        for slot in (which * (HALVES + 1) + half, which * (HALVES + 1) + HALVES):
            n = self.sequences[slot]
            self.mean[slot] = (self.mean[slot] * n + one.mean[0]) / (n + 1)
            if n > 0:
                spread = one.m2[0] + one.count * (one.mean[0] - self.mean[slot]).square()
                self.m2[slot] = self.m2[slot] * ((n - 1) / n) + spread / (n + 1)
            self.sequences[slot] += 1
            self.count[slot] += one.count[0]


class Collector:
    """Runs batches through a model and collects the moments of every reader's input.

    Attributes:
        device: Where the model takes its input.
        in_order: Whether the estimator wants batches of one sequence each, in the order of the data (FLAP's does).
    """

    def __init__(self, model: nn.Module, layouts: Sequence[UnitModule], estimator: str) -> None:
        """Find the modules to watch.

        Args:
            model: The model; changed only while ``run`` runs.
            layouts: Its units, in forward order (units.find_units).
            estimator: "variance", "norm" or "flap".

        Raises:
            NonFiniteError: A weight of a decoder layer is NaN or Inf. The activations would not always show it: torch's
                CPU attention gives 0, not NaN, for a NaN in q or k of a short sequence (under 16 tokens in torch 2.13).
            SsahError: A weight is not in memory.
        """
        self._model, self._layouts, self._estimator = model, layouts, estimator
        self._decoder = text_decoder(model)
        self._modules = {canonical_name(name): module for name, module in model.named_modules()}
        self._moments: dict[str, _Moments] = {}
        self._waiting: set[str] = set()
        self._group = torch.empty(0, dtype=torch.int8)
        # accelerate's hooks behind the layers of a model spread over devices free their weights: let it run to its end.
        self._stop_early = getattr(model, "hf_device_map", None) is None
        self.in_order = estimator == "flap"
        self.device: torch.device = self._decoder.get_input_embeddings().weight.device
        self._prefix = decoder_layers(model)[0]
        if bad := self._bad_weight(f"{self._prefix}."):
            raise NonFiniteError(f"{bad}; the checkpoint is damaged")

    def run(self, batches: Sequence[Batch], progress: Progress | None = None) -> None:
        """Run all batches, starting from empty moments.

        Args:
            batches: From data.make_batches.
            progress: Called with (tokens done, tokens in all, padding included) after every batch.

        Raises:
            NonFiniteError: A NaN or Inf came up; the message names the module and the channel.
        """
        self._moments = {}
        done, total = 0, sum(batch.input_ids.numel() for batch in batches)
        with torch.no_grad(), _evaluating(self._model), self._watching():
            for batch in batches:
                self._forward(batch)
                # Most NaNs reach the last reader: look there every time, and everywhere at the end.
                if not torch.isfinite(self._moments[self._layouts[-1].name].m2).all():
                    break
                done += batch.input_ids.numel()
                if progress is not None:
                    progress(done, total)
        self._check_finite()

    def finish(self) -> dict[str, ModuleScores]:
        """Return the scores of every module, on the CPU."""
        scores = {}
        for layout in self._layouts:
            reader = self._modules[layout.reader]
            norm = ops.column_norms(reader.weight.detach(), layout.channels.axis).cpu()
            moments = self._moments[layout.name]
            count, mean, m2 = (t.cpu().unflatten(0, (len(SETS), -1)) for t in (moments.count, moments.mean, moments.m2))
            scores[layout.name] = ModuleScores.from_moments(layout, count, mean, m2, norm, self._estimator)
        return scores

    def state_bytes(self) -> int:
        """Bytes of all moments together."""
        return sum(t.numel() * t.element_size() for m in self._moments.values() for t in (m.count, m.mean, m.m2))

    def _forward(self, batch: Batch) -> None:
        self._group = batch.group.reshape(-1).to(self.device)
        self._waiting = {layout.name for layout in self._layouts}
        mask = None if batch.attention_mask is None else batch.attention_mask.to(self.device)
        with contextlib.suppress(_Finished):
            self._decoder(input_ids=batch.input_ids.to(self.device), attention_mask=mask, use_cache=False)

    def _moments_of(self, layout: UnitModule, x: Tensor) -> _Moments:
        if layout.name not in self._moments:
            kind = _FlapMoments if self._estimator == "flap" else _Moments
            self._moments[layout.name] = kind.empty(len(SETS) * HALVES, x.shape[-1], x.device)
        return self._moments[layout.name]

    def _observed(self, layout: UnitModule) -> None:
        self._waiting.discard(layout.name)
        if not self._waiting and self._stop_early:
            raise _Finished

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            if self.device.type == "cpu" and matmul.emulates_bf16():
                for module in self._decoder.modules():
                    plain = type(module) is nn.Linear and "forward" not in vars(module)
                    if plain and module.weight.dtype == torch.bfloat16:
                        through_fp32 = functools.partial(matmul.linear, weight=module.weight, bias=module.bias)
                        setattr(module, "forward", through_fp32)  # noqa: B010 - on the instance
                        undo.callback(delattr, module, "forward")
            for layout in self._layouts:
                if layout.gated is not None and self._estimator != "flap":
                    mlp = self._modules[layout.gated.module]
                    # On the instance, so that deleting it restores the class's.
                    mlp.forward = self._fused_forward(layout, layout.gated)
                    undo.callback(delattr, mlp, "forward")
                else:
                    undo.callback(self._modules[layout.reader].register_forward_pre_hook(self._hook(layout)).remove)
            yield

    def _hook(self, layout: UnitModule) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            self._moments_of(layout, x).add(x, self._group.to(x.device))
            self._observed(layout)

        return observe

    def _fused_forward(self, layout: UnitModule, gated: GatedMLP) -> Callable[[Tensor], Tensor]:
        gate_proj, down_proj = self._modules[gated.gate], self._modules[gated.down]
        up_proj = None if gated.up is None else self._modules[gated.up]

        def forward(x: Tensor) -> Tensor:
            if up_proj is None:
                gate, up = gate_proj(x).chunk(2, dim=-1)
                out = None
            else:
                gate, up = gate_proj(x), up_proj(x)
                out = gate.view(
                    -1, gate.shape[-1]
                )  # nobody else holds it: h may overwrite it, which saves a fresh tensor
            shape, gate, up = gate.shape, gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
            m = self._moments_of(layout, gate)
            h = ops.gated_moments_(gate, up, self._group.to(gate.device), m.count, m.mean, m.m2, gated.activation, out)
            self._observed(layout)
            return down_proj(h.view(shape))

        return forward

    def _check_finite(self) -> None:
        for layout in self._layouts:
            moments = self._moments[layout.name]
            bad = (~(torch.isfinite(moments.mean) & torch.isfinite(moments.m2))).nonzero()
            if len(bad) == 0:
                continue
            group, channel = (int(i) for i in bad[0])
            which = SETS[group * len(SETS) // len(moments.count)]
            raise NonFiniteError(
                f"NaN or Inf in the activations of {layout.reader}, input channel {channel}, on the {which} set; "
                f"{self._cause()}"
            )

    def _cause(self) -> str:
        """Why an activation is not finite: the embeddings, or the arithmetic; the layers' weights are known to be."""
        if bad := self._bad_weight(self._prefix.rpartition(".")[0]):
            return bad
        narrow = {p.dtype for p in self._model.parameters()} & {torch.float16, torch.bfloat16}
        return "all weights are finite, so it arises in the arithmetic" + (": try --dtype fp32" if narrow else "")

    def _bad_weight(self, prefix: str) -> str | None:
        """Name the first weight with this prefix that is not finite."""
        for name, parameter in self._model.named_parameters():
            name, values = canonical_name(name), parameter.detach()
            if not name.startswith(prefix) or values.element_size() < 2 or values.numel() == 0:
                continue
            if values.is_meta:
                raise SsahError(f"model: {name} is not in memory; load the model without offloading")
            # One pass, 20 times faster than isfinite, which makes several temporaries of the weight's size.
            if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
                return f"the weight {name} has a NaN or Inf at {(~torch.isfinite(values)).nonzero()[0].tolist()}"
        return None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
