"""Evidence -> the sections of the page: what was found in words, tables and figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ssah_fast.report import figures, landscapes
from ssah_fast.report.collect import Evidence, Source, reading
from ssah_fast.report.figures import Figure, Mark, Row, Section, Series, Table
from ssah_fast.report.wording import (
    DASHES,
    INK,
    LINES,
    MEANINGS,
    NAMES,
    Estimate,
    cell,
    colour_of,
    counted,
    distinct_names,
    joined,
    name_of,
    percent,
    ratio_name,
    significant,
)

Document = Mapping[str, Any]
_CONTROL_KEY = (("chosen by importance", INK, "circle"), ("control", INK, "circle-open"))


def sections(evidence: Evidence) -> list[Section]:
    """The sections for which there is something, in the order of an argument: found, ablated, trained, looked into.

    Raises:
        SsahError: a document has not the shape that its kind promises; the message names the file.
    """
    published = _published(evidence)
    found = [
        *_each(_real_units(evidence), lambda source, name: _units_section(source, name, evidence)),
        *_each([s for s in evidence.scores if not _scored_units(s, evidence)], _scores_section),
        *_each(evidence.ablations, lambda source, name: _ablation_section(source, name, published)),
        *_tuning_section(evidence, published),
        *_evaluation_section(evidence),
        *_each(evidence.transfers, _transfer_section),
        *_each(evidence.probes, _probe_section),
        *_landscape_sections(evidence.landscapes),
        *_published_section(published),
        _provenance_section(evidence),
    ]
    return found


def _each(sources: Sequence[Source[Any]], section: Callable[[Source[Any], str], Section]) -> Iterator[Section]:
    """A section per source; where there are several, their titles and anchors tell them apart."""
    for number, source in enumerate(sources):
        with reading(source):
            made = section(source, "" if number == 0 else f"-{number + 1}")
        if len(sources) > 1:
            made.title += f": {source.path}"
            made.short += f" {number + 1}"
            made.headlines = made.headlines if number == 0 else []
        yield made


# --- units and scores


def _real_units(evidence: Evidence) -> list[Source[Any]]:
    """Units files except controls, whose categories were drawn by lot."""
    real = [source for source in evidence.units if source.content.settings.get("shuffle") is None]
    return sorted(real, key=lambda source: (len(source.path), source.path))  # units before units_after


def _scored_units(scores: Source[Any], evidence: Evidence) -> Any | None:
    """The units that were identified from some scores; None where there are none."""
    for source in _real_units(evidence):
        if source.content.provenance.get("scores") == scores.content.provenance:
            return source.content
    return None


def _units_section(source: Source[Any], suffix: str, evidence: Evidence) -> Section:
    units = source.content
    summary = {name: row for name, row in units.summary().items() if row["units"]}
    total = sum(values.numel() for values in units.category.values())
    section = Section(f"units{suffix}", "Which units carry what", "Units")
    section.headlines = _unit_headlines(summary, total)
    section.words.append(
        f"A unit is a neuron of an MLP or a value channel of attention, with all weights that belong to it. "
        f"{total:,} units were ranked together."
    )
    section.tables.append(_category_table(summary))
    if total <= figures.LARGEST_MAP:
        section.figures.append(figures.unit_map(units, f"unit-map{suffix}"))
    else:
        section.figures.append(figures.composition(units, f"unit-map{suffix}"))
    measured = next(
        (s.content for s in evidence.scores if s.content.provenance == units.provenance.get("scores")), None
    )
    if len({layout.layer for layout in units.layouts.values()}) > 1:
        section.figures.append(figures.shares_by_layer(units, f"unit-shares{suffix}", half=measured is not None))
    if measured is not None:
        section.figures.append(figures.scatter(measured, units, f"importance{suffix}"))
    return section


def _scores_section(source: Source[Any], suffix: str) -> Section:
    return Section(
        f"scores{suffix}",
        "Importance of every unit",
        "Scores",
        words=["No units file made from these scores is in the folder, so their categories are not shown."],
        figures=[figures.scatter(source.content, None, f"importance-of-scores{suffix}")],
    )


def _unit_headlines(summary: Mapping[str, Document], total: int) -> list[str]:
    parts = [f"{row['units']:,} {NAMES[name]} ({percent(row['units_fraction'])})" for name, row in summary.items()]
    lines = [f"{total:,} units: {joined(parts)}."]
    stable = {name: row for name, row in summary.items() if row["jaccard"] is not None and name != "cu"}
    if stable:
        agreed = [f"{percent(row['jaccard'])} of the {NAMES[name]}" for name, row in stable.items()]
        chance = [percent(row["chance"]) for row in stable.values()]
        lines.append(f"The two halves of the calibration data agree on {joined(agreed)} (by chance: {joined(chance)}).")
    return lines


def _category_table(summary: Mapping[str, Document]) -> Table:
    rows = []
    for name, row in summary.items():
        stability = ["", ""]
        if row["jaccard"] is not None:
            stability = [f"{row['jaccard']:.2f}", f"{row['chance']:.2f}"]
        shares = [f"{100 * row[part]:.2f}" for part in ("units_fraction", "parameters_fraction")]
        rows.append([NAMES[name], MEANINGS[name], f"{row['units']:,}", shares[0], f"{row['parameters']:,}", shares[1]])
        rows[-1] += stability
    return Table(
        "Categories. Stability: intersection over union of the category as found from either half of the data.",
        ["category", "meaning", "units", "% of units", "weights", "% of weights", "stability", "by chance"],
        rows,
        words=2,
    )


# --- ablation


def _ablation_section(source: Source[Document], suffix: str, published: Sequence[Document]) -> Section:
    document = source.content
    rows = document["rows"]
    dense = next((row for row in rows if row["category"] == "dense"), None)
    groups = _ablation_groups(rows)
    section = Section(f"ablation{suffix}", "What happens without them", "Ablation")
    section.headlines = _ablation_headlines(dense, groups)
    section.words.append(
        "Units are zeroed in memory, one category at a time, and the model is measured again. Controls zero as many "
        "units of every module; if they do as much harm, the category is nothing special. An interval is 95\u00a0%, "
        "over prompts (rates) or sequences (perplexity)."
    )
    beside = _published_ablation(rows, published)
    measures = (
        ("asr", "Attack success rate", "harmful requests answered, %", True),
        ("over_refusal", "Over-refusal", "harmless requests refused, %", True),
        ("perplexity", "Perplexity", "perplexity on the utility set", False),
    )
    for name, title, axis, rate in measures:
        if any(Estimate.read(row, name) for row in rows):
            figure = _ablation_figure(f"ablation-{name}{suffix}", name, title, axis, rate, dense, groups, beside)
            section.figures.append(figure)
    section.tables.append(_ablation_table(rows, beside))
    section.words += _scan_words(document.get("scan"))
    return section


def _ablation_groups(
    rows: Sequence[Document],
) -> list[tuple[str, float | None, Document | None, dict[str, list[Document]]]]:
    """Per category and ratio: its row and the rows of its controls by kind."""
    groups: dict[tuple[str, float | None], tuple[list[Document], dict[str, list[Document]]]] = {}
    for row in rows:
        if row["category"] == "dense":
            continue
        control = row.get("of")
        own, controls = groups.setdefault((control or row["category"], row.get("ratio")), ([], {}))
        (controls.setdefault(row["category"], []) if control else own).append(row)
    order = {name: i for i, name in enumerate(NAMES)}
    keys = sorted(groups, key=lambda key: (order.get(key[0], len(order)), key[1] or 0.0))
    return [(*key, next(iter(groups[key][0]), None), groups[key][1]) for key in keys]


def _ablation_headlines(dense: Document | None, groups: Sequence[tuple[Any, ...]]) -> list[str]:
    lines = []
    for category, ratio, row, controls in groups:
        if row is None or dense is None:
            continue
        before, after = Estimate.read(dense, "asr"), Estimate.read(row, "asr")
        what = f"Without the {name_of(category)} ({ratio_name(ratio)} of the units)"
        if before is None or after is None:
            continue
        line = f"{what}, {after.full('%')} of the harmful requests are answered instead of {before.full('%')}"
        drawn = [e for control in controls.get("random", []) if (e := Estimate.read(control, "asr")) is not None]
        if drawn:
            draws = drawn[0].full("%") if len(drawn) == 1 else f"{Estimate.span(drawn, '%')} ({len(drawn)} draws)"
            line += f"; without as many random units, {draws}"
        lines.append(line + _perplexity_words(dense, row) + ".")
    return lines


def _perplexity_words(dense: Document, row: Document) -> str:
    before, after = Estimate.read(dense, "perplexity"), Estimate.read(row, "perplexity")
    if before is None or after is None:
        return ""
    change = 100 * (after.value / before.value - 1)
    sign = "+" if change >= 0 else "\u2212"
    size = f"{abs(change):.1f}" if abs(change) < 10 else f"{abs(change):,.0f}"
    return f"; perplexity {before.text()} \u2192 {after.text()} ({sign}{size}\u00a0%)"


def _ablation_figure(
    name: str,
    measure: str,
    title: str,
    axis: str,
    rate: bool,
    dense: Document | None,
    groups: Sequence[tuple[Any, ...]],
    beside: Mapping[int, Document],
) -> Figure:
    summary = f"{title} of the model as it is and without the units of each category, beside the controls."
    ratios: dict[str, set[float]] = {}
    for category, ratio, row, _ in groups:
        if row is not None and ratio is not None:
            ratios.setdefault(category, set()).add(ratio)
    if any(len(values) > 2 for values in ratios.values()):
        return _ablation_curves(name, measure, title, summary, axis, rate, groups)
    rows = [] if dense is None else [_measured(name_of("dense"), [dense], measure, INK, "circle", rate, beside)]
    for category, ratio, row, controls in groups:
        colour = colour_of(category)
        label = f"{name_of(category)} {ratio_name(ratio)}"
        if row is not None:
            rows.append(_measured(label, [row], measure, colour, "circle", rate, beside))
        for control, drawn in controls.items():
            words = f"{name_of(control)}, like {name_of(category)}"
            rows.append(_measured(words, drawn, measure, colour, "circle-open", rate, beside))
    key = list(_CONTROL_KEY)
    if any(mark.symbol == figures.PUBLISHED for row in rows if row for mark in row.marks):
        key.append(("published", INK, figures.PUBLISHED))
    return figures.dots(name, title, summary, [row for row in rows if row], axis, percent=rate, key=key)


def _measured(
    label: str,
    rows: Sequence[Document],
    measure: str,
    colour: str,
    symbol: str,
    rate: bool,
    beside: Mapping[int, Document],
) -> Row | None:
    estimates = [estimate for row in rows if (estimate := Estimate.read(row, measure)) is not None]
    if not estimates:
        return None
    unit = "%" if rate else ""
    marks = [Mark(estimate, colour, symbol) for estimate in estimates]
    shown = Estimate.span(estimates, unit)
    for row in rows:
        theirs = beside.get(id(row), {}).get(measure)
        if theirs is not None:
            marks.append(Mark(Estimate(float(theirs)), INK, figures.PUBLISHED))
            shown += f"; published {float(theirs):g}"
    return Row(label, marks, shown)


def _ablation_curves(
    name: str, measure: str, title: str, summary: str, axis: str, rate: bool, groups: Sequence[tuple[Any, ...]]
) -> Figure:
    series: dict[tuple[str, str], list[tuple[float, Estimate]]] = {}
    for category, ratio, row, controls in groups:
        for control, drawn in [("", [row]), *controls.items()]:
            estimates = [e for one in drawn if one is not None and (e := Estimate.read(one, measure)) is not None]
            if estimates and ratio is not None:
                series.setdefault((category, control), []).append((100 * ratio, _pooled(estimates)))
    made = []
    for (category, control), points in series.items():
        label = f"{name_of(control)}, like {name_of(category)}" if control else name_of(category)
        style = ("dot", "circle-open") if control else ("solid", "circle")
        values = [estimate for _, estimate in points]
        made.append(Series(label, colour_of(category), [ratio for ratio, _ in points], values, *style))
    return figures.lines(
        name, title, summary, made, ("units zeroed, % of all units", axis), percent=rate, half=True, log_x=True
    )


def _pooled(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate as it is; of several draws the middle, with the smallest and the largest as its ends."""
    if len(estimates) == 1:
        return estimates[0]
    values = sorted(estimate.value for estimate in estimates)
    return Estimate(values[len(values) // 2], values[0], values[-1])


def _ablation_table(rows: Sequence[Document], beside: Mapping[int, Document]) -> Table:
    measures = {
        "asr": "ASR, %",
        "over_refusal": "over-refusal, %",
        "perplexity": "perplexity",
        "accuracy": "token accuracy, %",
        "tasks": "tasks, %",
        "asr_raw": "ASR by the judge alone, %",
        "degenerate": "degenerate, %",
    }
    theirs = [name for name in measures if any(row.get(name) is not None for row in beside.values())]
    systems = list(dict.fromkeys(name for row in rows for name in row.get("asr_by_system") or {}))
    systems = systems if len(systems) > 1 else []
    header = ["zeroed", "units", "weights", *measures.values(), *(f"published {measures[name]}" for name in theirs)]
    header += [f"ASR, system prompt {name}, %" for name in systems]
    body = [
        [
            _row_label(row),
            _integer(row.get("units")),
            _integer(row.get("parameters")),
            *(cell(row, name) for name in measures),
            *(_plain(beside.get(id(row), {}).get(name)) for name in theirs),
            *(cell((row.get("asr_by_system") or {}).get(name) or {}, "asr") for name in systems),
        ]
        for row in rows
    ]
    return Table("Every row of the ablation, with 95\u00a0% intervals", header, body).without_empty()


def _row_label(row: Document) -> str:
    if row["category"] == "dense":
        return name_of("dense")
    ratio = ratio_name(row.get("ratio"))
    if row.get("of"):
        draw = f", draw {row['draw'] + 1}" if row.get("draw") is not None else ""
        return f"{name_of(row['category'])}, like {name_of(row['of'])} {ratio}{draw}"
    return f"{name_of(row['category'])} {ratio}"


def _scan_words(scan: Document | None) -> list[str]:
    if not scan:
        return []
    sizes = scan.get("found") or {}
    parts = [f"{name_of(name)} {ratio_name(ratio) if ratio is not None else 'none'}" for name, ratio in sizes.items()]
    return [f"The scan of category sizes found: {joined(parts)}."] if parts else []


# --- fine-tuning


@dataclass
class _Run:
    """A fine-tuned model, or the one before (no manifest), with what is known of it."""

    name: str
    change: str
    manifest: Document | None
    evaluation: Document | None
    certificate: Document | None


def _tuning_section(evidence: Evidence, published: Sequence[Document]) -> Iterator[Section]:
    runs = _runs(evidence)
    if not runs:
        return
    section = Section("tuning", "What fine-tuning did", "Fine-tuning")
    section.headlines = _tuning_headlines(runs)
    section.words.append(
        "Every row is one run; its settings and data are listed under Provenance. What is frozen keeps its bits, which "
        "the certificate proves from the files alone."
    )
    key = [("units frozen", LINES[0], "circle"), ("no units frozen", LINES[1], "circle")]
    for measure, title, axis, rate in (
        ("asr", "Attack success rate after fine-tuning", "harmful requests answered, %", True),
        ("perplexity", "Perplexity after fine-tuning", "perplexity on the utility set", False),
    ):
        rows = [_tuning_row(run, measure, rate) for run in runs]
        if any(rows):
            shown = [row for row in rows if row]
            summary = "; ".join(f"{row.label}: {row.shown}" for row in shown)
            section.figures.append(
                figures.dots(f"tuning-{measure}", title, summary, shown, axis, percent=rate, key=key)
            )
    section.tables.append(_tuning_table(runs))
    rows_published = [row for table in published for row in table["rows"] if "run" in row]
    if rows_published:
        section.tables.append(_free_table("Published, for comparison", rows_published))
    yield section


def _runs(evidence: Evidence) -> list[_Run]:
    titles = {
        os.path.normpath(step["output"]): step["title"]
        for source in evidence.runs
        for step in source.content.get("steps", [])
        if step.get("output") and step.get("title")
    }
    folders = [s.folder if s.folder != "." else os.path.abspath(evidence.directory) for s in evidence.tunings]
    found = []
    for source, folder, name in zip(evidence.tunings, folders, distinct_names(folders), strict=True):
        with reading(source):
            certificate = _certificate_of(source.content, evidence)
            evaluation = _evaluation_of(folder, evidence)
            words = _frozen_words(source.content)
            found.append(_Run(titles.get(folder, name), words, source.content, evaluation, certificate))
    return _beside_their_bases(found, evidence)


def _beside_their_bases(found: Sequence[_Run], evidence: Evidence) -> list[_Run]:
    """The runs by the model that they started from, each of which comes before them where it was evaluated."""
    bases: dict[str, list[_Run]] = {}
    for run in found:
        bases.setdefault((run.manifest or {})["base"]["id"], []).append(run)
    rows = []
    for base, name in zip(bases, distinct_names(list(bases)), strict=True):
        title = "before fine-tuning" if len(bases) == 1 else f"{name}, before fine-tuning"
        before = _evaluation_of(base, evidence)
        rows += [_Run(title, "", None, before, None)] if before else []
        rows += bases[base]
    return rows


def _evaluation_of(model: str, evidence: Evidence) -> Document | None:
    """The evaluation of a model; paths are compared from their ends, as they may be relative to different folders."""
    for source in evidence.evaluations:
        with reading(source):
            if _same_place(source.content["model"]["name"], model):
                return source.content
    return None


def _same_place(a: str, b: str) -> bool:
    first, second = PurePath(os.path.normpath(a)).parts, PurePath(os.path.normpath(b)).parts
    shared = min(len(first), len(second))
    return first[-shared:] == second[-shared:]


def _certificate_of(manifest: Document, evidence: Evidence) -> Document | None:
    """The certificate whose tuned weights are those of the manifest."""
    for source in evidence.certificates:
        with reading(source):
            tuned = source.content["tuned"]["files"]
            weights = {name: entry["sha256"] for name, entry in tuned.items() if name.endswith(".safetensors")}
            if weights and all(manifest["files"].get(name) == digest for name, digest in weights.items()):
                return source.content
    return None


def _frozen_words(manifest: Document) -> str:
    """What a run held fixed: "SCU, CU:6% frozen", "only RU trained", "LoRA, rank 8"."""
    method, options = manifest["method"], manifest.get("options", {})
    words = [f"LoRA, rank {options['lora_rank']}"] if method == "lora" and "lora_rank" in options else []
    words += [method] if method not in ("full", "lora") else []
    mask = manifest.get("mask")
    if mask is None:
        return ", ".join(words) or "nothing frozen"
    provenance = mask["provenance"]
    if provenance.get("train"):
        return ", ".join([*words, f"only {joined(_selection(provenance['train']))} trained"])
    kept = [kind for kind, state in (provenance.get("policy") or {}).items() if state == "freeze"]
    frozen = _selection(provenance["freeze"]) if provenance.get("freeze") else ["what the mask names"]
    return ", ".join([*words, f"{joined([*frozen, *kept])} frozen"])


def _selection(text: str) -> list[str]:
    """The parts of "scu,cu:6%" as the page writes them: SCU, CU 6 %."""
    return [part.replace("%", "\u00a0%").replace(":", "\u00a0").upper() for part in text.split(",")]


def _attack(evaluation: Document | None) -> Document | None:
    """The figure that stands for an evaluation: its first judge without a system prompt, else the first."""
    entries = (evaluation or {}).get("attack") or []
    return next((entry for entry in entries if entry["system"] == "none"), entries[0] if entries else None)


def _over_refusal(evaluation: Document | None) -> Document | None:
    entries = (evaluation or {}).get("over_refusal") or []
    return next((entry for entry in entries if entry["system"] == "none"), entries[0] if entries else None)


def _tuning_row(run: _Run, measure: str, rate: bool) -> Row | None:
    document = _attack(run.evaluation) if measure == "asr" else (run.evaluation or {}).get("utility")
    estimate = Estimate.read(document or {}, measure)
    if estimate is None:
        return None
    colour = INK if run.manifest is None else LINES[0] if run.manifest.get("mask") else LINES[1]
    return Row(run.name, [Mark(estimate, colour)], estimate.text("%" if rate else ""))


def _tuning_headlines(runs: Sequence[_Run]) -> list[str]:
    lines = []
    for run in runs:
        attack = Estimate.read(_attack(run.evaluation) or {}, "asr")
        utility = Estimate.read((run.evaluation or {}).get("utility") or {}, "perplexity")
        if attack is not None:
            beside = f", perplexity {utility.text()}" if utility else ""
            lines.append(f"{run.name}: {attack.full('%')} of the harmful requests are answered{beside}.")
    certificates = [run.certificate for run in runs if run.certificate]
    if certificates:
        passed = sum(certificate["verdict"] == "pass" for certificate in certificates)
        changed = sum(certificate["totals"]["frozen_changed"] for certificate in certificates)
        of = sum(certificate["totals"]["frozen"] for certificate in certificates)
        lines.append(
            f"{passed} of {counted(len(certificates), 'freeze certificate')} pass: {changed:,} of {of:,} frozen "
            f"weights changed."
        )
    return lines


def _tuning_table(runs: Sequence[_Run]) -> Table:
    header = ["run", "held fixed", "steps", "training loss", "ASR, %", "over-refusal, %", "perplexity"]
    header += ["token accuracy, %", "weights moved, %", "frozen weights changed", "certificate"]
    rows = []
    for run in runs:
        manifest, certificate = run.manifest or {}, run.certificate
        utility = (run.evaluation or {}).get("utility") or {}
        loss = manifest.get("train_loss")
        cells = [run.name, run.change, _integer(manifest.get("steps")), "" if loss is None else significant(loss, 3)]
        cells += [
            cell(_attack(run.evaluation) or {}, "asr"),
            cell(_over_refusal(run.evaluation) or {}, "over_refusal"),
        ]
        cells += [cell(utility, "perplexity"), cell(utility, "accuracy")]
        if certificate:
            totals = certificate["totals"]
            cells += [f"{100 * totals['trainable_changed'] / totals['elements']:.1f}"]
            cells += [f"{totals['frozen_changed']:,} of {totals['frozen']:,}", certificate["verdict"]]
        else:
            cells += ["", "", ""]
        rows.append(cells)
    return Table("Fine-tuned models, with 95\u00a0% intervals", header, rows, words=2).without_empty()


# --- evaluation


def _evaluation_section(evidence: Evidence) -> Iterator[Section]:
    if not evidence.evaluations:
        return
    names = distinct_names(
        [source.content.get("model", {}).get("name", source.path) for source in evidence.evaluations]
    )
    section = Section("evaluation", "How every model answers", "Evaluation")
    attack, harmless, utility, tasks = [], [], [], []
    for source, name in zip(evidence.evaluations, names, strict=True):
        with reading(source):
            document = source.content
            for entry in document.get("attack") or []:
                rates = [cell(entry, key) for key in ("asr", "asr_raw", "refusal", "degenerate")]
                attack.append([name, entry["system"], entry["judge"], _integer(entry.get("asr_n")), *rates])
            for entry in document.get("over_refusal") or []:
                rates = [cell(entry, key) for key in ("over_refusal", "over_refusal_raw", "degenerate")]
                harmless.append([name, entry["system"], entry["judge"], _integer(entry.get("over_refusal_n")), *rates])
            if measured := document.get("utility"):
                cells = [cell(measured, key) for key in ("perplexity", "accuracy")]
                utility.append([name, *cells, _integer(measured.get("tokens"))])
            tasks += [[name, *cells] for cells in _task_rows(document.get("tasks"))]
    section.words.append(
        "A completion that is empty, repeats itself or is improbable is degenerate: neither a refusal nor a success. "
        "The rate by the judge alone counts as the papers do."
    )
    shared = ["model", "system prompt", "judge", "requests"]
    rates = ["ASR, %", "ASR by the judge alone, %", "refused, %", "degenerate, %"]
    other = ["over-refusal, %", "over-refusal by the judge alone, %", "degenerate, %"]
    for table in (
        Table("Harmful requests, with 95\u00a0% intervals", [*shared, *rates], attack, words=3),
        Table("Harmless look-alikes, with 95\u00a0% intervals", [*shared, *other], harmless, words=3),
        Table("Utility, with 95\u00a0% intervals", ["model", "perplexity", "token accuracy, %", "tokens"], utility),
        Table("Tasks of lm-evaluation-harness", ["model", "task", "metric", "value", "standard error"], tasks, words=3),
    ):
        if table.rows:
            section.tables.append(table.without_empty())
    if not evidence.tunings:
        section.figures += _evaluation_figures(evidence, names)
        section.headlines = [
            f"{name}: {attacked.full('%')} of the harmful requests are answered."
            for source, name in zip(evidence.evaluations, names, strict=True)
            if (attacked := Estimate.read(_attack(source.content) or {}, "asr"))
        ]
    yield section


def _evaluation_figures(evidence: Evidence, names: Sequence[str]) -> list[Figure]:
    measured = [
        ((name, entry["judge"], f"prompt {entry['system']}"), estimate)
        for source, name in zip(evidence.evaluations, names, strict=True)
        for entry in source.content.get("attack") or []
        if (estimate := Estimate.read(entry, "asr")) is not None
    ]
    # Only what differs tells rows apart.
    telling = [i for i in range(3) if len({labels[i] for labels, _ in measured}) > 1] or [0]
    rows = [
        Row(", ".join(labels[i] for i in telling), [Mark(estimate, INK)], estimate.text("%"))
        for labels, estimate in measured
    ]
    if not rows:
        return []
    summary = "; ".join(f"{row.label}: {row.shown}" for row in rows)
    title = "Attack success rate"
    return [figures.dots("evaluation-asr", title, summary, rows, "harmful requests answered, %", percent=True)]


def _task_rows(tasks: Any) -> list[list[str]]:
    rows = []
    for task, result in (tasks or {}).items():
        if not isinstance(result, Mapping):
            rows.append([str(task), "", _plain(result), ""])
            continue
        metrics = result.get("metrics", result)
        errors = result.get("stderr", {})
        for metric, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                error = errors.get(metric) if isinstance(errors, Mapping) else None
                rows.append([str(task), str(metric), _plain(value), _plain(error)])
    return rows


# --- transfer, probe


def _transfer_section(source: Source[Document], suffix: str) -> Section:
    document = source.content
    categories = [str(name).lower() for name in document["categories"]]
    section = Section(f"transfer{suffix}", "Which units changed their role", "Transfer")
    section.figures.append(figures.flow(categories, document["units"], document["units_percent"], f"transfer{suffix}"))
    unchanged = document.get("unchanged_units_percent")
    if unchanged is not None:
        line = f"{significant(unchanged, 3)}\u00a0% of the units have the same category before and after"
        if "scu" in categories:
            row = document["units"][categories.index("scu")]
            if sum(row):
                line += f"; of the SCU, {percent(row[categories.index('scu')] / sum(row))} stayed SCU"
        section.headlines.append(line + ".")
    section.words.append(
        "Rows are the categories before, columns those after; all figures are percent of the whole model."
    )
    section.words += [f"{note}." for note in document.get("notes") or []]
    for key, what in (("units_percent", "units"), ("parameters_percent", "weights")):
        if document.get(key):
            section.tables.append(_flow_table(f"Flow in % of all {what}", categories, document[key]))
    for layer in document.get("layers") or []:
        section.folded.append(
            _flow_table(f"Layer {layer['layer']}: flow in % of its units", categories, layer["units_percent"])
        )
    return section


def _flow_table(caption: str, categories: Sequence[str], matrix: Sequence[Sequence[float]]) -> Table:
    used = [i for i in range(len(categories)) if any(matrix[i]) or any(row[i] for row in matrix)]
    rows = [
        [f"was {name_of(categories[i])}", *(_flow_cell(matrix[i][j]) for j in used), _flow_cell(sum(matrix[i]))]
        for i in used
    ]
    sums = [sum(row[j] for row in matrix) for j in used]
    rows.append(["after", *map(_flow_cell, sums), _flow_cell(sum(sums))])
    return Table(caption, ["", *(f"is {name_of(categories[j])}" for j in used), "before"], rows)


def _flow_cell(value: float) -> str:
    return f"{value:.2f}" if value else "0"


def _probe_section(source: Source[Document], suffix: str) -> Section:
    models = source.content["models"]
    section = Section(f"probe{suffix}", "Where a query turns into a refusal", "Probe")
    names = distinct_names([str(model["name"]) for model in models])
    sets = list(dict.fromkeys(entry["set"] for model in models for entry in model["sets"]))
    section.words.append(
        "At every layer, how far the state behind the query is from the state behind the query and a refusal, and from "
        "that behind the query and an answer (cosine distance, last token). The margin is the second minus the first: "
        "above zero, the model is nearer to refusing."
    )
    for place, wanted in enumerate(sets):
        rows = [
            (name, entry["layers"])
            for model, name in zip(models, names, strict=True)
            for entry in model["sets"]
            if entry["set"] == wanted
        ]
        section.figures.append(_margins(f"probe-margin-{place + 1}{suffix}", wanted, rows))
    distances = [
        value
        for model in models
        for entry in model["sets"]
        for layer in entry["layers"]
        for measure in ("refusal", "compliance")
        if (estimate := Estimate.read(layer, measure)) is not None
        for value in (estimate.value, estimate.high or 0.0)
    ]
    largest = max(distances, default=1.0)  # one scale for all, or panels could not be compared
    for place, wanted in enumerate(sets):
        for number, (model, name) in enumerate(zip(models, names, strict=True)):
            for entry in model["sets"]:
                if entry["set"] == wanted:
                    label = f"probe-distance-{place + 1}-{number + 1}{suffix}"
                    section.figures.append(_distances(label, f"{name}, {wanted} requests", entry["layers"], largest))
    section.headlines = [
        line for model, name in zip(models, names, strict=True) if (line := _probe_headline(model, name))
    ]
    return section


def _margins(name: str, wanted: str, rows: Sequence[tuple[str, Sequence[Document]]]) -> Figure:
    series = [
        line
        for i, (model, layers) in enumerate(rows)
        if (line := _probe_line(model, LINES[i % 3], layers, "margin", i))
    ]
    title = f"Margin towards refusing, {wanted} requests"
    summary = "; ".join(f"{line.label} ends at {line.estimates[-1].full()}" for line in series)
    return figures.lines(
        name,
        title,
        summary,
        series,
        ("layer", "distance to answer \u2212 to refusal"),
        percent=False,
        half=True,
        zero="equally near",
    )


def _distances(name: str, title: str, layers: Sequence[Document], largest: float) -> Figure:
    series = [
        line
        for i, (measure, label) in enumerate((("refusal", "to the refusal"), ("compliance", "to the answer")))
        if (line := _probe_line(label, LINES[i], layers, measure, i))
    ]
    summary = "; ".join(f"{line.label} {line.estimates[-1].full()} at the last layer" for line in series)
    return figures.lines(
        name,
        f"Distances: {title}",
        summary,
        series,
        ("layer", "cosine distance"),
        percent=False,
        scale=(0.0, 1.05 * largest),
        half=True,
    )


def _probe_line(label: str, colour: str, layers: Sequence[Document], measure: str, number: int) -> Series | None:
    points = [(layer["layer"], estimate) for layer in layers if (estimate := Estimate.read(layer, measure)) is not None]
    dash = DASHES[number % 3]
    return Series(label, colour, [x for x, _ in points], [e for _, e in points], dash) if points else None


def _probe_headline(model: Document, name: str) -> str:
    entry = model["sets"][0]
    best = max(entry["layers"], key=lambda layer: abs(layer.get("margin") or 0.0), default=None)
    nearer = Estimate.read(best or {}, "nearer_refusal")
    if best is None or nearer is None:
        return ""
    return (
        f"{name}: behind layer {best['layer']}, where the margin is largest, {nearer.full('%')} of the {entry['set']} "
        f"requests are nearer to a refusal than to an answer."
    )


def _landscape_sections(sources: Sequence[Source[Any]]) -> list[Section]:
    alone = len(sources) == 1
    found = list(_each(sources, lambda source, suffix: landscapes.landscape(source, suffix, alone=alone)))
    return [landscapes.comparison(sources), *found] if len(sources) > 1 else found


# --- published figures and provenance


def _published(evidence: Evidence) -> list[dict[str, Any]]:
    """The tables of published figures of all recipes that ran here: name, source, note, rows."""
    found = []
    for source in evidence.runs:
        with reading(source):
            for name, table in (source.content.get("published") or {}).items():
                found.append(
                    {"name": name, "source": table.get("source"), "note": table.get("note"), "rows": table["rows"]}
                )
    return found


def _published_ablation(rows: Sequence[Document], published: Sequence[Document]) -> dict[int, Document]:
    """The published row of the same category for every measured row that has one, by the latter's id()."""
    theirs = [row for table in published for row in table["rows"] if "category" in row]
    beside: dict[int, Document] = {}
    for row in rows:
        if row.get("of"):
            continue
        same = [t for t in theirs if str(t["category"]).lower() == row["category"]]
        near = [t for t in same if t.get("ratio") is None or t["ratio"] == row.get("ratio")] or same[:1]
        if near:
            beside[id(row)] = near[0]
    return beside


def _published_section(published: Sequence[Document]) -> Iterator[Section]:
    tables = [
        _free_table("; ".join(str(part) for part in (table["source"], table["note"]) if part), table["rows"])
        for table in published
        if any("run" not in row for row in table["rows"])
    ]
    if tables:
        words = ["What the paper printed, for the models that it measured; rates in percent."]
        yield Section("published", "Published figures", "Published", words=words, tables=tables)


def _free_table(caption: str, rows: Sequence[Document]) -> Table:
    """A table of rows with any keys; those of nested mappings become columns of their own."""
    flat = [
        {
            (f"{key}, {inner}" if inner else key): value
            for key, entry in row.items()
            for inner, value in (entry.items() if isinstance(entry, Mapping) else [("", entry)])
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    words = sum(all(isinstance(row.get(key, ""), str) for row in flat) for key in columns)
    columns.sort(key=lambda key: not all(isinstance(row.get(key, ""), str) for row in flat))
    body = [[_free_cell(key, row.get(key)) for key in columns] for row in flat]
    return Table(caption, [key.replace("_", " ") for key in columns], body, words=max(words, 1))


def _free_cell(key: str, value: Any) -> str:
    if key == "ratio" and isinstance(value, int | float):
        return ratio_name(value)
    return name_of(value) if key == "category" and isinstance(value, str) else _plain(value)


def _provenance_section(evidence: Evidence) -> Section:
    section = Section("provenance", "Where this comes from", "Provenance")
    section.tables.append(
        Table(
            "Files",
            ["file", "kind", "SHA-256"],
            [[source.path, _kind_of(source, evidence), source.sha256] for source in evidence.documents()],
            words=3,
        )
    )
    if versions := _versions(evidence):
        section.tables.append(Table("Versions", ["package", "version"], versions, words=2))
    for source in evidence.runs:
        steps = source.content.get("steps") or []
        rows = [
            [str(step.get("name", "")), str(step.get("line", "")), _plain(step.get("exit")), _seconds(step)]
            for step in steps
        ]
        caption = f"Commands of {source.content.get('title') or source.path}"
        section.tables.append(Table(caption, ["step", "command", "exit code", "seconds"], rows, words=2))
    if evidence.unreadable:
        rows = [list(entry) for entry in evidence.unreadable]
        section.tables.append(Table("Not shown", ["file", "reason"], rows, words=2))
    section.listings = [
        (source.path, listed) for source in evidence.documents() if (listed := _settings(source.content))
    ]
    return section


def _kind_of(source: Source[Any], evidence: Evidence) -> str:
    if isinstance(source.content, Mapping):
        return str(source.content["kind"]).removeprefix("ssah_fast ")
    return "units" if source in evidence.units else "scores"


def _provenance(content: Any) -> Document:
    return content if isinstance(content, Mapping) else content.provenance


def _versions(evidence: Evidence) -> list[list[str]]:
    found: dict[str, dict[str, None]] = {}
    for source in evidence.documents():
        document = _provenance(source.content)
        for package, version in (document.get("versions") or document.get("scores", {}).get("versions") or {}).items():
            found.setdefault(package, {})[str(version)] = None
    return [[package, ", ".join(versions)] for package, versions in found.items()]


def _settings(content: Any) -> str:
    import json

    document = _provenance(content)
    names = ("model", "model_id", "base", "mask", "settings", "options", "data", "before", "after")
    kept = {name: document[name] for name in names if name in document}
    if not isinstance(content, Mapping) and hasattr(content, "settings"):
        kept["settings"] = content.settings
    return json.dumps(kept, indent=1, default=str, ensure_ascii=False) if kept else ""


def _seconds(step: Document) -> str:
    if step.get("skipped"):
        return "as before"
    seconds = step.get("seconds")
    return "" if seconds is None else f"{seconds:.0f}"


# --- cells


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _integer(value: Any) -> str:
    return "" if value is None else f"{value:,}"
