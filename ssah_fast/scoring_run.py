"""One process's part of a scoring run: batches that fit, progress saved and resumed, the merge with the others."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import nn

from ssah_fast.calibration import Calibration, Settings
from ssah_fast.collector import Collector, Report
from ssah_fast.errors import OutOfMemoryError
from ssah_fast.hidden_states import HiddenStates
from ssah_fast.layer_loader import LayerLoader
from ssah_fast.progress import Progress, State, Stop, stopping
from ssah_fast.ranks import Ranks
from ssah_fast.score_plan import Choice
from ssah_fast.scores import ModuleScores
from ssah_fast.streaming import LayerRunner
from ssah_fast.units import find_units

ALONE = Ranks()


@dataclass
class ScoringRun:
    """A model and the data that it is to run.

    Attributes:
        runner: What runs the batches: the collector itself where the model is in memory.
        collector: Holds the moments.
        calibration: The data.
        settings: What to measure.
        hidden: The hidden states of a streamed run.
    """

    runner: Collector | LayerRunner
    collector: Collector
    calibration: Calibration
    settings: Settings
    hidden: HiddenStates | None = None

    @classmethod
    def in_memory(cls, model: nn.Module, calibration: Calibration, settings: Settings) -> ScoringRun:
        """A run of a model that is loaded.

        Raises:
            SsahError: Its units are unknown, or a weight is not in memory.
            NonFiniteError: A weight is NaN or Inf.
        """
        collector = Collector(model, find_units(model, settings.attention_unit), settings.estimator)
        collector.check_weights()
        return cls(collector, collector, calibration, settings)

    @classmethod
    def streamed(
        cls,
        loader: LayerLoader,
        hidden: HiddenStates,
        device: torch.device,
        calibration: Calibration,
        settings: Settings,
    ) -> ScoringRun:
        """A run of a checkpoint whose layers are loaded one at a time, to a device.

        Raises:
            SsahError: Its units are unknown.
        """
        layouts = find_units(loader.model, settings.attention_unit)
        collector = Collector(loader.model, layouts, settings.estimator, device)
        return cls(LayerRunner(loader, collector, layouts, hidden), collector, calibration, settings, hidden)

    def execute(
        self,
        choice: Choice,
        report: Report | None,
        ranks: Ranks = ALONE,
        saves: Progress | None = None,
        state: State | None = None,
    ) -> dict[str, ModuleScores] | None:
        """Run all batches, or those that a saved state has not seen.

        Where the size of a batch is ours to choose, it is halved until the largest, which comes first, fits.

        Args:
            choice: Tokens per batch where the settings leave it open; the rest was followed already.
            report: Called as the runners call it.
            ranks: This process among those that share the batches.
            saves: Where the progress is kept.
            state: What was saved.

        Returns:
            The scores of all processes' batches by module; None on every rank but 0.

        Raises:
            NonFiniteError: A NaN or Inf in the weights or activations.
            OutOfMemoryError: The smallest batch does not fit.
            KeyboardInterrupt: Ctrl-C, after a save.
        """
        with contextlib.nullcontext(Stop()) if saves is None else stopping() as stop:
            while True:
                batches = ranks.share(self.calibration.batches(self.settings, choice.batch_tokens))
                keeper = _Keeper(self, choice, len(batches), saves, stop)
                try:
                    keeper.position = self._restore(state)
                    self.runner.run(batches, report, start=keeper.position, point=keeper.point)
                    break
                except torch.OutOfMemoryError as error:
                    self._check_divisible(choice, ranks, error)
                state, choice = None, replace(choice, batch_tokens=choice.batch_tokens // 2)
                torch.cuda.empty_cache()
            if ranks.world > 1:
                keeper.save()  # waiting for the others may take hours, and end with their death
                total = ranks.gather(self.collector.state(), keeper.leave)
                if total is None:
                    return None
                self.collector.restore(total)
        return self.collector.finish()

    def _check_divisible(self, choice: Choice, ranks: Ranks, error: torch.OutOfMemoryError) -> None:
        """Give up where smaller batches are not ours to choose, or there are none."""
        sequences, single = self.settings.batch_size, choice.batch_tokens < 2 * self.calibration.longest
        if sequences is None and ranks.world == 1 and not single:
            return
        single = single if sequences is None else sequences == 1
        what = "one sequence" if single else "a batch" if sequences is None else f"a batch of {sequences} sequences"
        remedy = "--seqlen" if single else "--batch-size or --seqlen"
        raise OutOfMemoryError(f"{what} does not fit on {self.collector.device}; use a smaller {remedy}") from error

    def _restore(self, state: State | None) -> tuple[int, int]:
        """Take over what was saved; where the run goes on."""
        if self.hidden is not None:
            self.hidden.clear()
        if state is None:
            return 0, 0
        self.collector.restore(state.moments)
        if self.hidden is not None:
            for number, states in enumerate(state.hidden):
                if states.numel():
                    self.hidden.put(number, states.to(self.collector.device))
        return state.layer, state.batch


@dataclass
class _Keeper:
    """Saves a run between its steps, when it is time or a signal asks the run to end."""

    run: ScoringRun
    choice: Choice
    batches: int
    saves: Progress | None
    stop: Stop
    position: tuple[int, int] = (0, 0)

    def point(self, layer: int, batch: int) -> None:
        """The run would go on here."""
        self.position = layer, batch
        if self.saves is not None and (self.stop.requested or self.saves.due()):
            self.save()
            self.leave()

    def save(self) -> None:
        if self.saves is not None:
            hidden = () if self.run.hidden is None else self.run.hidden.on_host(self.batches)
            extra = {key: getattr(self.choice, key) for key in ("stream", "batch_tokens", "hidden")}
            self.saves.save(*self.position, self.run.collector.state(), hidden, extra)

    def leave(self) -> None:
        """End the run if a signal asked for it."""
        if self.saves is not None:
            self.stop.leave(self.saves.folder)
