"""Watches a model's readers while it runs, and keeps the moments of what they read.

The model's own code runs. A forward pre-hook on each reader sees its input; in a gated MLP whose forward is known, the
product act(gate) * up and its moments are one kernel instead. Routed experts are run one by one (experts.py), each on
the tokens that reached it. All this is undone when the run ends, whatever ended it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssah_fast import experts, matmul, ops
from ssah_fast.data import Batch
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.scores import SETS, ModuleScores, chan_merge
from ssah_fast.units import GatedMLP, UnitModule, canonical_name, decoder_layers, text_decoder

Report = Callable[[int, int], None]
Point = Callable[[int, int], None]

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
        own = self.blank()
        ops.channel_moments_(x, group, own.count, own.mean, own.m2)
        self.merge(own)

    def blank(self) -> "_Moments":
        """Moments of the same shape that have seen nothing.

        A batch goes there first and is then merged in float64: the kernels subtract what a state holds already, in
        fp32, so its bits would depend on what came before, and two processes would differ from one by 4e-7.
        """
        return _Moments(*(torch.zeros_like(t) for t in (self.count, self.mean, self.m2)))

    def merge(self, other: "_Moments") -> None:
        """Add the moments of other tokens."""
        sums = chan_merge(self.count, self.mean, self.m2, other.count, other.mean, other.m2)
        self.count, self.mean, self.m2 = sums

    def state(self) -> dict[str, Tensor]:
        """Everything that there is to save."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> "_Moments":
        """The inverse of ``state``."""
        return cls(*(state[key].clone() for key in ("count", "mean", "m2")))

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.count, self.mean, self.m2 = (t.to(device) for t in (self.count, self.mean, self.m2))


class _FlapMoments(_Moments):
    """FLAP's recurrence as released (arXiv 2312.11983, lib/layerwrapper.py), for one sequence at a time; m2 holds F.

    With n sequences seen: mu' = (n mu + mean_t x) / (n + 1), and for n >= 1:
    F' = F (n - 1) / n + sum_t (x_t - mu')^2 / (n + 1). The first sequence's own spread is dropped.
    Slots per set: each half, and everything. A sequence of which no counted token reached an expert is none to it.
    """

    def __init__(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        super().__init__(count, mean, m2)
        self.sequences = [0] * len(count)

    @classmethod
    def empty(cls, groups: int, channels: int, device: torch.device) -> "_Moments":
        return super().empty(groups // HALVES * (HALVES + 1), channels, device)

    def add(self, x: Tensor, group: Tensor) -> None:
        if int(group.max()) < 0:
            return
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

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "sequences": torch.tensor(self.sequences)}

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> "_FlapMoments":
        moments = cls(*(state[key].clone() for key in ("count", "mean", "m2")))
        moments.sequences = state["sequences"].tolist()
        return moments


class Collector:
    """Runs batches through a model and collects the moments of every reader's input.

    Attributes:
        device: Where the model takes its input.
        in_order: Whether the estimator wants batches of one sequence each, in the order of the data (FLAP's does).
    """

    def __init__(
        self, model: nn.Module, layouts: Sequence[UnitModule], estimator: str, device: torch.device | None = None
    ) -> None:
        """Find the modules to watch.

        Args:
            model: The model; changed only while it is watched.
            layouts: Its units, in forward order (units.find_units).
            estimator: "variance", "norm" or "flap".
            device: Where the model takes its input; None: where its embeddings are.

        Raises:
            SsahError: The model has no decoder layers.
        """
        self._model, self._layouts, self._estimator = model, layouts, estimator
        self._decoder = text_decoder(model)
        self._modules = {canonical_name(name): module for name, module in model.named_modules()}
        self._kind = _FlapMoments if estimator == "flap" else _Moments
        self._moments: dict[str, _Moments] = {}
        self._norms: dict[str, Tensor] = {}
        self._waiting: set[str] = set()
        self._group = torch.empty(0, dtype=torch.int8)
        # accelerate's hooks behind the layers of a model spread over devices free their weights: let it run to its end.
        self._stop_early = getattr(model, "hf_device_map", None) is None
        self.in_order = estimator == "flap"
        self.device = device or self._decoder.get_input_embeddings().weight.device
        self._prefix = decoder_layers(model)[0]

    def run(
        self,
        batches: Sequence[Batch],
        progress: Report | None = None,
        *,
        start: tuple[int, int] = (0, 0),
        point: Point | None = None,
    ) -> None:
        """Run the batches that remain, with the whole model in memory.

        Args:
            batches: From data.make_batches.
            progress: Called with (tokens done, tokens in all, padding included) after every batch.
            start: (0, batch), the batch to begin with; `restore` was called with what came before.
            point: Called with (0, batch), where the run would go on, after every batch; it may save `state`, and raise.

        Raises:
            NonFiniteError: A NaN or Inf came up; the message names the module and the channel.
        """
        if start == (0, 0):
            self.restore({})
        sizes = [batch.input_ids.numel() for batch in batches]
        last = [layout for layout in self._layouts if layout.pool == self._layouts[-1].pool]
        with self.watching():
            for number, batch in enumerate(batches[start[1] :], start[1] + 1):
                self.forward(batch, self._layouts)
                # Most NaNs reach the last reader: look there every time, and everywhere at the end.
                if not torch.isfinite(torch.cat([self._moments[layout.name].m2 for layout in last])).all():
                    break
                if progress is not None:
                    progress(sum(sizes[:number]), sum(sizes))
                if point is not None:
                    point(0, number)
        self.check_moments(self._layouts)

    def finish(self) -> dict[str, ModuleScores]:
        """Return the scores of every module, on the CPU."""
        self.take_norms([layout for layout in self._layouts if layout.name not in self._norms])
        scores = {}
        for layout in self._layouts:
            moments = self._moments[layout.name]
            count, mean, m2 = (t.cpu().unflatten(0, (len(SETS), -1)) for t in (moments.count, moments.mean, moments.m2))
            norm = self._norms[layout.name]
            scores[layout.name] = ModuleScores.from_moments(layout, count, mean, m2, norm, self._estimator)
        return scores

    def take_norms(self, layouts: Sequence[UnitModule]) -> None:
        """Measure the readers' column norms of some modules, whose weights must be in memory."""
        for layout in layouts:
            weight = getattr(self._modules[layout.reader], layout.channels.parameter.rpartition(".")[2]).detach()
            axis = layout.channels.axis
            if layout.expert is not None:
                weight, axis = weight[layout.expert], axis - 1
            self._norms[layout.name] = ops.column_norms(weight, axis).cpu()

    def settle(self, layouts: Sequence[UnitModule]) -> None:
        """Move the moments of modules that will not run again to the CPU."""
        for layout in layouts:
            if layout.name in self._moments:
                self._moments[layout.name].to(torch.device("cpu"))

    def state(self) -> dict[str, Tensor]:
        """What was measured so far, by "module.figure"; not a copy."""
        moments = {f"{name}.{key}": t for name, m in self._moments.items() for key, t in m.state().items()}
        return moments | {f"{name}.norm": norm for name, norm in self._norms.items()}

    def state_bytes(self) -> int:
        """Bytes of all moments together."""
        return sum(t.numel() * t.element_size() for m in self._moments.values() for t in (m.count, m.mean, m.m2))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; from nothing if it is empty."""
        self._moments, self._norms = {}, {}
        for layout in self._layouts:
            if f"{layout.name}.count" in state:
                keys = ("count", "mean", "m2", "sequences")
                own = {key: state[f"{layout.name}.{key}"] for key in keys if f"{layout.name}.{key}" in state}
                self._moments[layout.name] = self._kind.restored(own)
            if f"{layout.name}.norm" in state:
                self._norms[layout.name] = state[f"{layout.name}.norm"]

    def forward(self, batch: Batch, awaited: Sequence[UnitModule]) -> None:
        """Run the model's decoder on a batch, to its end or until all awaited modules were seen; must be `watching`.

        Raises:
            SsahError: The model left an awaited module out.
        """
        self._group = batch.group.reshape(-1).to(self.device)
        self._waiting = {layout.pool for layout in awaited}
        mask = None if batch.attention_mask is None else batch.attention_mask.to(self.device)
        with contextlib.suppress(_Finished), torch.no_grad():
            self._decoder(input_ids=batch.input_ids.to(self.device), attention_mask=mask, use_cache=False)
        if self._waiting:
            raise SsahError(
                f"model: {min(self._waiting)} did not run; load the model with transformers' own code, without kernels "
                "that replace its modules"
            )

    def _moments_of(self, layout: UnitModule, channels: int, device: torch.device) -> _Moments:
        if layout.name not in self._moments:
            self._moments[layout.name] = self._kind.empty(len(SETS) * HALVES, channels, device)
        moments = self._moments[layout.name]
        if moments.mean.device != device:  # restored
            moments.to(device)
        return moments

    def _observed(self, pool: str) -> None:
        if pool in self._waiting:
            self._waiting.remove(pool)
            if not self._waiting and self._stop_early:
                raise _Finished

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Have every reader watched; the model is as it was afterwards. Weights are looked up when a module runs."""
        with _evaluating(self._model), contextlib.ExitStack() as undo:
            if self.device.type == "cpu" and matmul.emulates_bf16():
                for module in self._decoder.modules():
                    plain = type(module) is nn.Linear and "forward" not in vars(module)
                    if plain and module.weight.dtype == torch.bfloat16:
                        setattr(module, "forward", _through_fp32(module))  # noqa: B010 - on the instance
                        undo.callback(delattr, module, "forward")
            pools: dict[str, list[UnitModule]] = {}
            for layout in self._layouts:
                if layout.expert is not None:
                    pools.setdefault(layout.reader, []).append(layout)
                elif layout.gated is not None and self._estimator != "flap":
                    mlp = self._modules[layout.gated.module]
                    # On the instance, so that deleting it restores the class's.
                    mlp.forward = self._fused_forward(layout, layout.gated)
                    undo.callback(delattr, mlp, "forward")
                else:
                    undo.callback(self._modules[layout.reader].register_forward_pre_hook(self._hook(layout)).remove)
            forwards = {self._modules[name]: self._experts_forward(name, pool) for name, pool in pools.items()}
            undo.enter_context(experts.replaced(forwards))
            yield

    def _hook(self, layout: UnitModule) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            self._moments_of(layout, x.shape[1], x.device).add(x, self._group.to(x.device))
            self._observed(layout.pool)

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
            moments = self._moments_of(layout, gate.shape[1], gate.device)
            m, group = moments.blank(), self._group.to(gate.device)
            h = ops.gated_moments_(gate, up, group, m.count, m.mean, m.m2, gated.activation, out)
            moments.merge(m)
            self._observed(layout.pool)
            return down_proj(h.view(shape))

        return forward

    def _experts_forward(self, name: str, layouts: Sequence[UnitModule]) -> experts.Forward:
        module = self._modules[name]
        activation = None if self._estimator == "flap" else experts.gate_activation(module)

        def gate(expert: int, gate_up: Tensor, rows: Tensor) -> Tensor:
            moments, group = self._moments[layouts[expert].name], self._group.to(rows.device)[rows]
            if activation is None:
                hidden: Tensor = module._apply_gate(gate_up)
                moments.add(hidden, group)
                return hidden
            m = moments.blank()
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = ops.gated_moments_(gate, up, group, m.count, m.mean, m.m2, activation)
            moments.merge(m)
            return hidden

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            for layout in layouts:  # those that no token reaches have moments too
                self._moments_of(layout, layout.units, hidden_states.device)
            out = experts.run(module, hidden_states, top_k_index, top_k_weights, gate)
            self._observed(name)
            return out

        return forward

    def check_weights(self, prefix: str | None = None) -> None:
        """Refuse weights that are not finite.

        The activations would not always show them: torch's CPU attention gives 0, not NaN, for a NaN in q or k of a
        short sequence (under 16 tokens in torch 2.13).

        Args:
            prefix: Of the parameters to look at; None: of all decoder layers.

        Raises:
            NonFiniteError: A weight is NaN or Inf.
            SsahError: A weight is not in memory.
        """
        for name, parameter in self._parameters(prefix or f"{self._prefix}."):
            if parameter.is_meta:
                raise SsahError(f"model: {name} is not in memory; load the model without offloading")
            if bad := _bad_entry(name, parameter):
                raise NonFiniteError(f"{bad}; the checkpoint is damaged")

    def check_moments(self, layouts: Sequence[UnitModule]) -> None:
        """Refuse moments that are not finite.

        Raises:
            NonFiniteError: A NaN or Inf came up; the message names the module and the channel.
        """
        for layout in layouts:
            if layout.name not in self._moments:  # nothing ran
                continue
            moments = self._moments[layout.name]
            bad = (~(torch.isfinite(moments.mean) & torch.isfinite(moments.m2))).nonzero()
            if len(bad) == 0:
                continue
            group, channel = (int(i) for i in bad[0])
            which = SETS[group * len(SETS) // len(moments.count)]
            reader = layout.reader if layout.expert is None else f"expert {layout.expert} of {layout.reader}"
            raise NonFiniteError(
                f"NaN or Inf in the activations of {reader}, input channel {channel}, on the {which} set; "
                f"{self._cause()}"
            )

    def _cause(self) -> str:
        """Why an activation is not finite: the embeddings, or the arithmetic; the layers' weights are known to be."""
        for name, parameter in self._parameters(self._prefix.removesuffix(self._prefix.rpartition(".")[2])):
            if not parameter.is_meta and (bad := _bad_entry(name, parameter)):
                return bad
        narrow = {p.dtype for p in self._model.parameters()} & {torch.float16, torch.bfloat16}
        return "all weights are finite, so it arises in the arithmetic" + (": try --dtype fp32" if narrow else "")

    def _parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for wrapped, parameter in self._model.named_parameters():
            name = canonical_name(wrapped)
            if name.startswith(prefix) and parameter.element_size() >= 2 and parameter.numel():
                yield name, parameter.detach()


def _bad_entry(name: str, values: Tensor) -> str | None:
    """Say where a weight is not finite, if it is not."""
    # One pass, 20 times faster than isfinite, which makes several temporaries of the weight's size.
    if torch.isfinite(torch.stack(torch.aminmax(values))).all():
        return None
    return f"the weight {name} has a NaN or Inf at {(~torch.isfinite(values)).nonzero()[0].tolist()}"


def _through_fp32(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: matmul.linear(x, module.weight, module.bias)


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
