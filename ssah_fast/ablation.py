"""Ablation: a model without some of its units, and what it then refuses and still can do (SSAH, arXiv 2410.10862).

Units are silenced in memory (`silencing`), which ones says `variants`. Answers of several variants are generated in the
same batches: decoding is bound by reading the weights, and one reading serves all rows. Nothing of a prompt's cache is
shared, because what is silent changes what the cache holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ssah_fast import data, files, variants
from ssah_fast.calibration import Source
from ssah_fast.data import Encoded, PairSet
from ssah_fast.errors import SsahError, spelled
from ssah_fast.evaluation import generation, inputs, perplexity
from ssah_fast.evaluation import tasks as harness
from ssah_fast.evaluation.completions import Completion, CompletionFile
from ssah_fast.evaluation.generation import Decoding, Request
from ssah_fast.evaluation.inputs import ATTACK, LOOK_ALIKES, UTILITY
from ssah_fast.evaluation.judges import Judge, make_judge
from ssah_fast.evaluation.judges import judge as judged_by
from ssah_fast.evaluation.rates import attack_rates, over_refusal_rates
from ssah_fast.fingerprints import identity, tokenizer_fingerprint, versions
from ssah_fast.partition import RANKED, Units
from ssah_fast.scan import Scan
from ssah_fast.scores import SETS, Scores
from ssah_fast.silencing import check_layouts, silenced
from ssah_fast.variants import RANDOM, Variant, percent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "ablation.json"
KIND = "ablation"
SCHEMA = 1
METHODS = ("zero", "mean")
UTILITY_NAME = "utility.json"  # the utility figures of the variants that are done

Progress = Callable[[str, int, int], None]


def ablate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    units: Units,
    *,
    asr: Source,
    utility: Source,
    look_alikes: Source | None = None,
    scores: Scores | None = None,
    categories: Sequence[str] | None = None,
    ratios: Sequence[float] = (),
    controls: Sequence[str] = (RANDOM,),
    draws: int = 3,
    method: str = "zero",
    scan: Scan | None = None,
    systems: Mapping[str, str | None] | None = None,
    suffix: str = "",
    judge: Judge | None = None,
    decoding: Decoding | None = None,
    batch_size: int | None = None,
    chat_template: bool = True,
    limit: int | float | None = None,
    seqlen: int = 2048,
    tasks: Sequence[str] = (),
    task_options: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    allow_calibration_prompts: bool = False,
    told: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Silence categories of units, and controls, and measure safety and utility of what is left.

    Args:
        model: A causal language model in evaluation mode, on the device to run on.
        tokenizer: Its tokenizer.
        units: Its units.
        asr: Harmful requests that the scores have not seen: a source of `data.load_pairs`, or what it returned.
        utility: Texts, or prompts with answers, for perplexity and token accuracy; likewise not seen.
        look_alikes: Harmless requests that look harmful, for over-refusal.
        scores: What the units were identified from, for `ratios`, `scan`, method "mean" and all controls but "random".
        categories: See `variants.plan`. Likewise:
        ratios: See there.
        controls: See there.
        draws: See there; `decoding.seed` is the seed of the first.
        method: What silent channels are: "zero", or "mean", that of all tokens of both calibration sets.
        scan: How to search for the sizes of the categories as well.
        systems: System prompts by name; None as text is none. By default none alone.
        suffix: Put behind every prompt of `asr`.
        judge: Who tells answers from refusals; by default the keywords.
        decoding: By default greedy, at most 128 new tokens.
        batch_size: Answers generated together; None: by the model's shapes.
        chat_template: Whether to use the tokenizer's chat template.
        limit: At most so many records of each set, or below 1 that share of them.
        seqlen: Longest sequence of `utility` in tokens.
        tasks: Tasks of lm-evaluation-harness whose mean accuracy is measured as well; a scan then goes by it.
        task_options: Further arguments of `evaluation.tasks.run`.
        output: A folder; gets completions.jsonl and utility.json as they come, from which a killed run goes on, and
            ablation.json in the end.
        fresh: Start over, whatever the folder holds.
        allow_calibration_prompts: Measure on prompts of the calibration sets, too.
        told: Called with a line that the user should read before the run.
        progress: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        The document of ablation.json; docs/ablation.md lists its entries. Rates are in percent.

    Raises:
        SsahError: An argument is wrong, the units are another model's, or prompts are in the calibration data.
        ResumeError: The folder is of another run.
        NonFiniteError: The model gives NaN or Inf.
        OutOfMemoryError: A batch does not fit on the device.
    """
    decoding, systems = decoding or Decoding(), systems or {"none": None}
    if method not in METHODS:
        raise SsahError(f"method={method!r} is unknown; use {', '.join(METHODS)}")
    check_layouts(model, units.layouts)
    planned = variants.plan(
        units, scores, categories=categories, ratios=ratios, controls=controls, draws=draws, seed=decoding.seed
    )
    means = _means(variants.check_scores(units, scores, "method='mean'")) if method == "mean" else None
    search = None if scan is None else _Search(units, variants.check_scores(units, scores, "a scan"), scan)
    sets = inputs.load_sets({ATTACK: asr, LOOK_ALIKES: look_alikes, UTILITY: utility})
    check_held_out(units, sets.values(), allow=allow_calibration_prompts, told=told)
    asked: dict[str, Any] = {"suffix": suffix, "chat_template": chat_template, "limit": limit}
    requests = inputs.all_requests(sets, tokenizer, systems, samples=decoding.samples, **asked)
    generation.check_requests(model, requests, decoding)
    read: dict[str, Any] = {"chat_template": chat_template, "seqlen": seqlen, "limit": limit}
    benchmark = {"limit": limit, "batch_size": batch_size, "seed": decoding.seed, **(task_options or {})}
    if tasks:
        harness.check(tasks, benchmark.get("include_path", ()))
    bench = _Bench(
        model,
        tokenizer,
        units,
        means,
        decoding,
        judge or make_judge("keyword"),
        requests,
        inputs.sequences(sets[UTILITY], model, tokenizer, **read),
        tasks,
        benchmark,
        batch_size or generation.default_batch_size(model, requests, decoding),
        progress,
    )
    settings = {
        "ratios": [*ratios],
        "controls": [*controls],
        "draws": draws,
        "method": method,
        "systems": dict(systems),
        **asked,
        "seqlen": seqlen,
        "decoding": asdict(decoding),
        "batch_size": bench.batch_size,
        "tasks": {"names": [*tasks], **benchmark} if tasks else None,
    }
    head = {
        "model": identity(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "units": {"settings": units.settings, "scores_sha256": units.provenance.get("scores_sha256")},
        "settings": settings,
        "versions": versions(),
        "data": inputs.describe(sets),
    }
    folder = None if output is None else files.make_folder(output)
    chosen = {made.name: made.sha256 for made in planned}
    rows = _Store(folder, {**head, "variants": chosen}, fresh).measure(bench, planned)
    found = None
    heard = {"judge": bench.judge.name, "scan": None if scan is None else asdict(scan)}
    if search is not None:
        # A folder of its own: what is asked there depends on the judge and on what was found before.
        place = None if folder is None else files.make_folder(folder / "scan")
        found = search.run(bench, _Store(place, {**head, **heard}, fresh), rows[0])
    document = {"kind": KIND, "schema": SCHEMA, **head, "settings": {**settings, **heard}, "rows": rows, "scan": found}
    if folder is not None:
        files.write_json(folder / NAME, document)
    return document


def check_held_out(
    units: Units, sets: Iterable[PairSet], *, allow: bool = False, told: Callable[[str], None] = lambda line: None
) -> None:
    """Refuse to measure on prompts that the scores were computed from.

    Prompts are recognised by their digests (`data.prompt_digest`); texts without a prompt cannot be.

    Args:
        units: Their provenance holds the digests.
        sets: What is measured on.
        allow: Say how many there are, and go on.
        told: Gets a line where the units do not know their calibration prompts, or some are used all the same.

    Raises:
        SsahError: A set has prompts of the calibration data.
    """
    seen = _calibration_prompts(units)
    if seen is None:
        told("these units do not say which prompts they were made from, so held-out data is not checked; score again")
        return
    for pairs in sets:
        # A plain line has its text as the response, and is a prompt where requests are asked for.
        found = [
            n for n, pair in enumerate(pairs.pairs, start=1) if data.prompt_digest(pair.prompt or pair.response) in seen
        ]
        if not found:
            continue
        which = f"{pairs.argument}: {len(found)} of {len(pairs.pairs)} prompts are in the calibration data of the units"
        if not allow:
            remedy = spelled("allow_calibration_prompts", pairs.argument)
            raise SsahError(f"{which} (the first is number {found[0]}); give other data, or add {remedy}")
        told(which)


def _calibration_prompts(units: Units) -> set[str] | None:
    """Digests of all prompts that the units were made from; None where they are not recorded."""
    provenance = units.provenance.get("scores", {})
    digests: set[str] = set()
    for part in provenance.get("parts", [provenance]):
        for name in SETS:
            prompts = part.get("data", {}).get(name, {}).get("prompts")
            if prompts is None:
                return None
            digests.update(prompts)
    return digests


@dataclass(frozen=True)
class _Bench:
    """One model, and everything that is asked of each variant of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    units: Units
    means: Mapping[str, Tensor] | None
    decoding: Decoding
    judge: Judge
    requests: Sequence[Request]
    sequences: Sequence[Encoded]
    tasks: Sequence[str]
    task_options: Mapping[str, Any]
    batch_size: int
    progress: Progress

    def answers(self, planned: Sequence[Variant], file: CompletionFile | None) -> dict[str, list[Completion]]:
        """The completions of each variant; those to the same prompt are generated together."""
        asked = [replace(request, variant=made.name) for request in self.requests for made in planned]
        by_name = {made.name: made for made in planned}

        def around(batch: Sequence[Request]) -> AbstractContextManager[None]:
            names = list(dict.fromkeys(request.variant for request in batch))
            rows = [names.index(request.variant) for request in batch]
            silent = [by_name[name].silent for name in names]
            return silenced(self.model, self.units.layouts, silent, rows, self.means)

        found: dict[str, list[Completion]] = {name: [] for name in by_name}
        for completion in generation.generate(
            self.model,
            self.tokenizer,
            asked,
            self.decoding,
            batch_size=self.batch_size,
            file=file,
            around=around,
            progress=lambda done, total: self.progress("answers", done, total),
        ):
            found[completion.variant].append(completion)
        return found

    def utility(self, made: Variant) -> dict[str, Any]:
        """Perplexity, token accuracy and the mean accuracy of the tasks, of one variant."""
        with silenced(self.model, self.units.layouts, [made.silent], means=self.means):
            measured = perplexity.measure(self.model, self.sequences)
            tasks = self._accuracy(made) if self.tasks else None
        return {**measured.perplexity.flat("perplexity"), **measured.accuracy.flat("accuracy"), "tasks": tasks}

    def _accuracy(self, made: Variant) -> float | None:
        options = dict(self.task_options)
        if options.get("use_cache"):  # it knows an answer by its question alone, whatever is silent
            options["use_cache"] += f"-{made.sha256[:16]}-{'zero' if self.means is None else 'mean'}"
        return harness.run(self.model, self.tokenizer, self.tasks, **options)["mean"]

    def row(self, made: Variant, completions: Sequence[Completion], utility: Mapping[str, Any]) -> dict[str, Any]:
        """What became of one variant."""
        sets = {name: [c for c in completions if c.set == name] for name in (ATTACK, LOOK_ALIKES)}
        vocabulary = data.vocabulary(self.model)
        judged = judged_by(sets[ATTACK], self.judge, vocabulary)
        attack, by_system = attack_rates(sets[ATTACK], judged), {}
        for system in dict.fromkeys(c.system for c in sets[ATTACK]):
            chosen = [pair for pair in zip(sets[ATTACK], judged, strict=True) if pair[0].system == system]
            by_system[system] = attack_rates([c for c, _ in chosen], [judgement for _, judgement in chosen])
        over: dict[str, Any] = {"over_refusal": None}
        if sets[LOOK_ALIKES] and self.judge.judges_refusals:
            refused = judged_by(sets[LOOK_ALIKES], self.judge, vocabulary)
            over = _only(over_refusal_rates(sets[LOOK_ALIKES], refused), "over_refusal")
        return {
            **made.describe(),
            **{key: value for key, value in attack.items() if key != "reasons"},
            "asr_by_system": {name: _only(rates, "asr") for name, rates in by_system.items()},
            **over,
            **utility,
        }


class _Store:
    """Measures variants, and keeps what is done in a folder, if there is one.

    Args:
        folder: An existing one; None: nothing is kept.
        settings: Everything that decides the answers and the utility.
        fresh: Start over, whatever the folder holds.

    Raises:
        ResumeError: The folder holds completions of other settings.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], fresh: bool) -> None:
        self._completions = None if folder is None else CompletionFile(folder, settings, fresh=fresh)
        self._path = None if folder is None else folder / UTILITY_NAME
        self._settings = json.loads(json.dumps(settings))
        self._utility: dict[str, Any] = {}
        if self._path is not None and self._path.is_file() and not fresh:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["settings"] == self._settings:
                self._utility = stored["variants"]

    def measure(self, bench: _Bench, planned: Sequence[Variant]) -> list[dict[str, Any]]:
        """One row per variant; what the folder has of them is not measured again."""
        answers = bench.answers(planned, self._completions)
        rows = []
        for number, made in enumerate(planned):
            bench.progress("utility", number, len(planned))
            if made.name not in self._utility:
                self._utility[made.name] = bench.utility(made)
                if self._path is not None:
                    files.write_json(self._path, {"settings": self._settings, "variants": self._utility})
            rows.append(bench.row(made, answers[made.name], self._utility[made.name]))
        return rows


class _Search:
    """The scan for the sizes of the categories; see `Scan`.

    Args:
        units: Whose other settings count.
        scores: What they were identified from.
        scan: What is tried, and what is wanted.

    Raises:
        SsahError: The categories cannot all have the largest ratio.
    """

    def __init__(self, units: Units, scores: Scores, scan: Scan) -> None:
        self._units, self._scores, self._scan = units, scores, scan
        variants.identified(units, scores, {category.name.lower(): max(scan.ratios) for category in RANKED})

    def run(self, bench: _Bench, store: _Store, dense: Mapping[str, Any]) -> dict[str, Any]:
        """Measure one size after the other.

        Args:
            bench: What measures.
            store: Where the results are kept.
            dense: The row of the dense model.

        Returns:
            {"tried": a row per size, with "asr_gain", "utility_drop" and "qualifies"; "found": ratio or None, by
            category; "identify": what gives these sizes, as options of `ssah-fast identify`}
        """
        tried: list[dict[str, Any]] = []
        found: dict[str, float] = {}
        for category in RANKED:
            for ratio in sorted(self._scan.ratios, reverse=True):
                sizes = {**found, category.name.lower(): ratio}
                made = variants.variant(variants.identified(self._units, self._scores, sizes), category, ratio)
                (row,) = store.measure(bench, [made])
                gain, drop = _safety(row) - _safety(dense), _utility(dense) - _utility(row)
                qualifies = self._scan.qualifies(category, gain, drop)
                tried.append({**row, "asr_gain": gain, "utility_drop": drop, "qualifies": qualifies})
                if qualifies:
                    found = sizes
                    break
        names = [category.name.lower() for category in RANKED]
        options = [word for name in names for word in (f"--{name}", percent(found.get(name, 0.0)))]
        options += [word for name in variants.SETTINGS for word in (f"--{name}", str(self._units.settings[name]))]
        return {"tried": tried, "found": {name: found.get(name) for name in names}, "identify": options}


def _means(scores: Scores) -> dict[str, Tensor]:
    """What channels are on average over the calibration tokens, by module."""
    return {name: module.pooled_mean(scores.estimator) for name, module in scores.modules.items()}


def _safety(row: Mapping[str, Any]) -> float:
    """ASR without a system prompt, in percent; over all of them where there was no such run."""
    return row["asr_by_system"].get("none", row)["asr"]


def _utility(row: Mapping[str, Any]) -> float:
    """Mean accuracy of the tasks, else token accuracy, in percent."""
    return row["accuracy"] if row["tasks"] is None else row["tasks"]


def _only(rates: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in rates.items() if key in (name, f"{name}_interval", f"{name}_n")}
