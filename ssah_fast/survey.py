"""What is asked at every point around a model's weights, and the points, each measured once over runs and processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ssah_fast import data
from ssah_fast.calibration import Source
from ssah_fast.data import Encoded
from ssah_fast.errors import NonFiniteError, SsahError
from ssah_fast.evaluation import generation, inputs, intervals, margin, perplexity
from ssah_fast.evaluation import tasks as harness
from ssah_fast.evaluation.completions import Completion
from ssah_fast.evaluation.generation import Decoding, Request
from ssah_fast.evaluation.inputs import ATTACK, LOOK_ALIKES, UTILITY
from ssah_fast.evaluation.judges import Judge, Judgement, Verdict, make_judge
from ssah_fast.evaluation.judges import judge as judged_by
from ssah_fast.evaluation.margin import Target
from ssah_fast.evaluation.rates import attack_rates, over_refusal_rates
from ssah_fast.fingerprints import identity, tokenizer_fingerprint, versions
from ssah_fast.neighbourhood import Neighbourhood
from ssah_fast.points import PointStore, key_of
from ssah_fast.ranks import Ranks
from ssah_fast.terrain import Steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
_UNSAVED = ("prompt", "variant")  # fields of a completion that every point would repeat


@dataclass(frozen=True)
class Questions:
    """What is asked at every point.

    Attributes:
        model: The model whose weights move; to plan a run, it may be on the meta device.
        tokenizer: Its tokenizer.
        requests: Harmful requests and look-alikes under every system prompt; may be empty.
        decoding: How they are answered.
        batch_size: Answers generated together.
        judge: Who tells answers from refusals.
        texts: What perplexity and token accuracy are measured on; may be empty.
        tasks: Tasks of lm-evaluation-harness; may be empty.
        task_options: Further arguments of `evaluation.tasks.run`.
        preview: Answer at the centre alone, and measure the refusal margin elsewhere.
        settings: All of it, as JSON.
        data: The provenance of the data, as JSON.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    requests: Sequence[Request]
    decoding: Decoding
    batch_size: int | None
    judge: Judge
    texts: Sequence[Encoded]
    tasks: Sequence[str]
    task_options: Mapping[str, Any]
    preview: bool
    settings: Mapping[str, Any]
    data: Mapping[str, Any]

    @property
    def systems(self) -> list[str]:
        """Names of the system prompts, in their order."""
        return list(dict.fromkeys(request.system for request in self.requests)) or ["none"]

    def prompts(self, system: str) -> list[int]:
        """The number of the prompt of each answer to a harmful request under a system prompt."""
        return [r.index for r in self.requests if r.set == ATTACK and r.system == system]


def make_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    asr: Source | None,
    look_alikes: Source | None,
    utility: Source | None,
    preview: bool,
    systems: Mapping[str, str | None] | None,
    suffix: str,
    judge: Judge | None,
    decoding: Decoding | None,
    batch_size: int | None,
    chat_template: bool,
    limit: int | float | None,
    seqlen: int,
    tasks: Sequence[str],
    task_options: Mapping[str, Any] | None,
) -> Questions:
    """Read and check what is to be asked; arguments and errors are those of `landscapes.landscape`."""
    decoding, systems, judge = decoding or Decoding(), systems or {"none": None}, judge or make_judge("keyword")
    sets = inputs.load_sets({ATTACK: asr, LOOK_ALIKES: look_alikes, UTILITY: utility})
    if not sets and not tasks:
        raise SsahError("nothing to measure; give asr, look_alikes, utility or tasks")
    asked: dict[str, Any] = {"suffix": suffix, "chat_template": chat_template, "limit": limit}
    requests = inputs.all_requests(sets, tokenizer, systems, samples=decoding.samples, **asked)
    size = batch_size
    if requests:
        generation.check_requests(model, requests, decoding)
        size = batch_size or generation.default_batch_size(model, requests, decoding)
    read: dict[str, Any] = {"chat_template": chat_template, "seqlen": seqlen, "limit": limit}
    texts = inputs.sequences(sets[UTILITY], model, tokenizer, **read) if UTILITY in sets else []
    benchmark = {"limit": limit, "batch_size": batch_size, "seed": decoding.seed, **(task_options or {})}
    if tasks:
        harness.check(tasks, benchmark.get("include_path", ()))
    settings = {
        "preview": preview,
        "judge": judge.name,
        "systems": dict(systems),
        **asked,
        "seqlen": seqlen,
        "decoding": asdict(decoding),
        "batch_size": size,
        "tasks": {"names": [*tasks], **benchmark} if tasks else None,
    }
    answered = (requests, decoding, size, judge)
    measured = (texts, tasks, benchmark, preview)
    return Questions(model, tokenizer, *answered, *measured, settings, inputs.describe(sets))


class Survey:
    """Measures points, each once: what the store has, or another process has done, is taken from there.

    Args:
        questions: What is asked.
        around: The model's neighbourhood, entered.
        store: Where points are kept.
        ranks: This process among those that share the points and the store's folder.
        progress: Called with what is being done, how much of it is done, and how much there is.
    """

    def __init__(
        self, questions: Questions, around: Neighbourhood, store: PointStore, ranks: Ranks, progress: Progress
    ) -> None:
        self._ask, self._around, self._store, self._ranks, self._progress = questions, around, store, ranks, progress
        self._axes = around.describe()
        self._centre: Steps = (0.0,) * len(self._axes)
        self._targets: list[Target] = []
        self._writing = 0.0
        model = {key: value for key, value in identity(questions.model).items() if key not in ("name", "commit")}
        asked = [[r.set, r.index, r.sample, r.system, r.ids] for r in questions.requests]
        self._answering = key_of(
            {
                "model": model,
                "tokenizer": tokenizer_fingerprint(questions.tokenizer),
                "requests": key_of(asked),
                "decoding": asdict(questions.decoding),
                "batch_size": questions.batch_size,
                "versions": versions(),
            }
        )
        self._measuring = key_of(
            {
                "judge": questions.judge.name,
                "texts": key_of([[text.ids, text.counted] for text in questions.texts]),
                "tasks": [[*questions.tasks], dict(questions.task_options)] if questions.tasks else None,
            }
        )

    def prepare(self, fresh: bool) -> None:
        """Read what is done, and measure the centre, whose refusals the margin goes by; one process does it for all.

        Args:
            fresh: Forget all points first.
        """
        if fresh and self._ranks.rank == 0:
            self._store.forget()
        self._ranks.barrier()
        self._store.read()
        if self._ranks.rank == 0 and self._find(self._centre) is None:
            self._add(self._centre)
        self._together()
        self._aim(self._completions(self.point(self._centre)["answers"]))

    def measure(self, points: Sequence[Steps]) -> None:
        """Measure those points that are not measured yet; the processes share them."""
        missing = [steps for steps in dict.fromkeys(points) if self._find(steps) is None]
        mine, done = self._ranks.share(missing), len(points) - len(missing)
        for number, steps in enumerate(mine):
            self._progress("points", done + number * self._ranks.world, len(points))
            self._add(steps)
        if missing:
            self._progress("points", len(points), len(points))
            self._together()

    def knows(self, steps: Steps) -> bool:
        """Whether a point was measured."""
        return self._find(steps) is not None

    def point(self, steps: Steps) -> dict[str, Any]:
        """A point that was measured: a line of points-<rank>.jsonl."""
        found = self._find(steps)
        if found is None:
            raise LookupError(f"the point {steps} was not measured")
        return found

    def rows(self, steps: Steps) -> list[dict[str, Any]]:
        """A point's figures, a row per system prompt, as in landscape.json."""
        measured = self.point(steps)["measured"]
        return [
            {"system": name, **{key: value for key, value in row.items() if key != "flags"}, **measured["utility"]}
            for name, row in measured["systems"].items()
        ]

    def flags(self, steps: Steps, system: str, rate: str) -> list[bool]:
        """Which answers to harmful requests a rate ("asr_raw" or "asr") counts, in the order of `Questions.prompts`."""
        return [flag == "1" for flag in self.point(steps)["measured"]["systems"][system]["flags"][rate]]

    def _aim(self, centre: Sequence[Completion]) -> None:
        """Find where the unmoved model's refusals begin."""
        pairs = [pair for pair in zip(self._ask.requests, centre, strict=bool(centre)) if pair[0].set == ATTACK]
        self._targets = margin.targets([r for r, _ in pairs], [c for _, c in pairs], self._ask.tokenizer)

    def _together(self) -> None:
        """Wait for the other processes, and take in what they have done."""
        if self._ranks.world > 1:
            self._ranks.barrier()
            self._store.read()

    def _weights(self, steps: Steps) -> list[dict[str, Any]]:
        return [{**axis, "step": step} for axis, step in zip(self._axes, steps, strict=True) if step != 0]

    def _keys(self, steps: Steps, answered: bool) -> tuple[str, str]:
        """The keys of the answers at a point, and of the point."""
        weights = [{key: value for key, value in axis.items() if key != "name"} for axis in self._weights(steps)]
        answers = key_of([self._answering, weights])
        return answers, key_of([answers, self._measuring, answered])

    def _find(self, steps: Steps) -> dict[str, Any] | None:
        """A point as it is asked for, or with answers where none are."""
        answered = {True, self._answered(steps)}
        found = (self._store.get(self._keys(steps, answer)[1]) for answer in sorted(answered, reverse=True))
        return next(filter(None, found), None)

    def _answered(self, steps: Steps) -> bool:
        return bool(self._ask.requests) and (steps == self._centre or not self._ask.preview)

    def _add(self, steps: Steps) -> None:
        """Measure a point and keep it, with the seconds that writing the one before it took."""
        measured = self._measured(steps)
        measured["seconds"]["write"] = self._writing
        start = time.perf_counter()
        self._store.add(measured)
        self._writing = round(time.perf_counter() - start, 6)

    def _measured(self, steps: Steps) -> dict[str, Any]:
        """Measure a point, whatever the store has of it but its answers."""
        ask, clock = self._ask, _Clock()
        answered = self._answered(steps)
        answers_key, key = self._keys(steps, answered)
        saved = self._store.answers(answers_key) if answered else None
        tokens: list[list[int]] | None = []
        clock.start("move")
        with self._around.at(steps):
            clock.start("answers")
            if answered and saved is None:
                tokens = self._unless_broken(steps, lambda: generation.new_tokens(**self._generating()))
            clock.start("margin")
            margins = self._unless_broken(steps, lambda: margin.measure(ask.model, self._targets))
            clock.start("utility")
            utility = self._unless_broken(steps, lambda: self._utility(key))
            clock.start("restore")
        clock.start("likelihood")
        found = self._completions(saved or [])
        if answered and saved is None:
            found = self._silent() if tokens is None else generation.completions(tokens=tokens, **self._generating())
        if steps == self._centre:
            clock.start("margin")
            self._aim(found)
            margins = margin.measure(ask.model, self._targets)
        clock.start("judge")
        systems = self._judged(found, margins or [])
        clock.stop()
        return {
            "key": key,
            "answers_key": answers_key,
            "weights": self._weights(steps),
            "measured": {
                "systems": systems,
                "utility": self._utility_row(utility),
                "non_finite": any(part is None for part in (tokens, margins, utility)),
            },
            "answers": [_saved(completion) for completion in found],
            "seconds": clock.seconds,
        }

    def _unless_broken(self, steps: Steps, measure: Callable[[], T]) -> T | None:
        """What a measurement gives; None where the weights were moved so far that the model gives NaN or Inf."""
        try:
            return measure()
        except NonFiniteError:
            if steps == self._centre:
                raise
            return None

    def _generating(self) -> dict[str, Any]:
        ask = self._ask
        shared = {"model": ask.model, "tokenizer": ask.tokenizer, "requests": ask.requests, "decoding": ask.decoding}
        return {**shared, "batch_size": ask.batch_size}

    def _completions(self, answers: Sequence[Mapping[str, Any]]) -> list[Completion]:
        """Answers as they are kept in a point, with their prompts."""
        return [
            Completion(**answer, prompt=request.prompt, variant="")
            for answer, request in zip(answers, self._ask.requests if answers else (), strict=True)
        ]

    def _silent(self) -> list[Completion]:
        """The answers of a model that gives no numbers: none."""
        nothing = {"text": "", "tokens": 0, "finished": False, "nll": None}
        named = [{name: getattr(r, name) for name in ("set", "index", "sample", "system")} for r in self._ask.requests]
        return self._completions([{**names, **nothing} for names in named])

    def _utility(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._ask.texts:
            measured = perplexity.measure(self._ask.model, self._ask.texts)
            found |= {**measured.perplexity.flat("perplexity"), **measured.accuracy.flat("accuracy")}
        if self._ask.tasks:
            options = dict(self._ask.task_options)
            if options.get("use_cache"):  # it knows an answer by its question alone, whatever the weights
                options["use_cache"] += f"-{key[:16]}"
            found["tasks"] = harness.run(self._ask.model, self._ask.tokenizer, self._ask.tasks, **options)["mean"]
        return found

    def _utility_row(self, measured: Mapping[str, Any] | None) -> dict[str, Any]:
        """The utility entries of a row; None for what was not asked for, or could not be measured."""
        flat = [f"{name}{suffix}" for name in ("perplexity", "accuracy") for suffix in ("", "_interval", "_n")]
        return {**dict.fromkeys([*flat, "tasks"]), **(measured or {})}

    def _judged(self, completions: Sequence[Completion], margins: Sequence[float]) -> dict[str, dict[str, Any]]:
        """Per system prompt the rates of a point, the flags that they are made of, and the refusal margin."""
        vocabulary = data.vocabulary(self._ask.model)
        judged = judged_by(completions, self._ask.judge, vocabulary)
        found = {}
        for system in self._ask.systems:
            row: dict[str, Any] = {"over_refusal": None, "margin": None}
            attack, flags = _chosen(completions, judged, ATTACK, system), {}
            if attack[0]:
                row |= {name: value for name, value in attack_rates(*attack).items() if name != "reasons"}
                flags = {
                    "asr_raw": _spelled(one.complied for one in attack[1]),
                    "asr": _spelled(one.verdict is Verdict.SUCCESS for one in attack[1]),
                }
            harmless = _chosen(completions, judged, LOOK_ALIKES, system)
            if harmless[0] and self._ask.judge.judges_refusals:
                rates = over_refusal_rates(*harmless)
                row |= {name: value for name, value in rates.items() if name.startswith("over_refusal")}
            own = [value for target, value in zip(self._targets, margins, strict=False) if target.system == system]
            if own:
                row |= intervals.mean(own).flat("margin")
            found[system] = {**row, "flags": flags}
        return found


class _Clock:
    """Seconds by what they are spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", 0.0

    def start(self, name: str) -> None:
        self.stop()
        self._name, self._since = name, time.perf_counter()

    def stop(self) -> None:
        if self._name:
            spent = time.perf_counter() - self._since
            self.seconds[self._name] = round(self.seconds.get(self._name, 0.0) + spent, 6)
        self._name = ""


def _chosen(
    completions: Sequence[Completion], judged: Sequence[Judgement], name: str, system: str
) -> tuple[list[Completion], list[Judgement]]:
    """The completions of one set under one system prompt, and what is made of them."""
    pairs = [
        (completion, one)
        for completion, one in zip(completions, judged, strict=True)
        if completion.set == name and completion.system == system
    ]
    return [completion for completion, _ in pairs], [one for _, one in pairs]


def _spelled(flags: Iterable[bool]) -> str:
    return "".join("1" if flag else "0" for flag in flags)


def _saved(completion: Completion) -> dict[str, Any]:
    return {name: value for name, value in asdict(completion).items() if name not in _UNSAVED}
