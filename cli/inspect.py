"""`ssah-fast inspect`: what is in a scores, units or mask file."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ssah_fast.cli.common import Command, console, echo_json, json_option
from ssah_fast.cli.identify import print_categories, summary

if TYPE_CHECKING:
    from torch import Tensor

    from ssah_fast.masks import Mask
    from ssah_fast.partition import Units
    from ssah_fast.scores import Scores
    from ssah_fast.units import UnitModule

# The part of a module's units whose share of its importance is shown as "concentration".
TOP = 0.01


@click.command(cls=Command)
@click.argument("file", type=click.Path())
@json_option
def inspect(file: str, as_json: bool) -> None:
    """Show what is in FILE: scores, units or a mask.

    The experts of one layer are one row; "unseen" says how many of them no token of one of the sets reached. With
    --json there is one entry per expert.
    """
    from ssah_fast import files
    from ssah_fast.masks import Mask
    from ssah_fast.partition import Units
    from ssah_fast.scores import Scores

    header = files.read_header(file)
    document = {"file": file, "kind": header["kind"], "schema": header["schema"]}
    if header["kind"] == "scores":
        scores = Scores.load(file)
        document |= {"estimator": scores.estimator, "provenance": scores.provenance, "modules": score_rows(scores)}
    elif header["kind"] == "units":
        units = Units.load(file)
        document |= {"provenance": units.provenance, **summary(units), "modules": unit_rows(units)}
    else:
        mask = Mask.load(file)
        document |= {"sha256": mask.sha256, "provenance": mask.provenance, **mask_rows(mask)}
    if as_json:
        echo_json(document)
        return
    _print_header(document)
    if header["kind"] == "scores":
        _print_score_rows(score_rows(scores, pooled=True))
    elif header["kind"] == "units":
        print_categories(units)
        _print_unit_rows(unit_rows(units, pooled=True))
    else:
        _print_mask_rows(document)


def score_rows(scores: "Scores", *, pooled: bool = False) -> list[dict[str, Any]]:
    """One row per module: what it is, and for each set its tokens and the mean, max and concentration of I.

    Args:
        scores: the scores.
        pooled: the experts of one layer as one row, whose tokens are those of the expert that saw most.
    """
    import torch

    rows = []
    for name, members in _pools(scores.modules, scores.modules, pooled).items():
        modules = [scores.modules[member] for member in members]
        tokens = torch.stack([module.total_count() for module in modules])
        importance = torch.cat([module.importance for module in modules], dim=1)
        first = modules[0].layout
        row = {"module": name, "layer": first.layer, "kind": first.kind, "units": importance.shape[1]}
        row |= _experts(first, len(members), int((tokens == 0).any(1).sum())) if pooled else {}
        row |= {key: _figures(tokens[:, i].max(), importance[i]) for i, key in enumerate(("safety", "utility"))}
        rows.append(row)
    return rows


def unit_rows(units: "Units", *, pooled: bool = False) -> list[dict[str, Any]]:
    """One row per module: layer, kind, units, and the number of units of each category.

    Args:
        units: the units.
        pooled: the experts of one layer as one row.
    """
    import torch

    from ssah_fast.partition import REPORTED, Category

    rows = []
    for name, members in _pools(units.category, units.layouts, pooled).items():
        first = units.layouts[members[0]]
        each = [units.category[member] for member in members]
        values = torch.cat(each)
        row = {"module": name, "layer": first.layer, "kind": first.kind, "units": values.numel()}
        unseen = sum(bool((part == Category.UNOBSERVED).all()) for part in each)
        row |= _experts(first, len(members), unseen) if pooled else {}
        row |= {category.name.lower(): int((values == category).sum()) for category in REPORTED}
        rows.append(row)
    return rows


def _pools(names: Iterable[str], modules: "Mapping[str, Any]", pooled: bool) -> dict[str, list[str]]:
    """The modules of each row."""
    pools: dict[str, list[str]] = {}
    for name in names:
        layout = getattr(modules[name], "layout", modules[name])
        pools.setdefault(layout.pool if pooled else name, []).append(name)
    return pools


def _experts(layout: "UnitModule", count: int, unseen: int) -> dict[str, int | None]:
    known = layout.expert is not None
    return {"experts": count if known else None, "unseen": unseen if known else None}


def mask_rows(mask: "Mask") -> dict[str, Any]:
    """One row per parameter and one per kind of tensor: how many of its rows or columns are frozen, of how many.

    A number is None where the mask does not know it: made by hand, without the size of an axis.
    """
    from ssah_fast.masks import KINDS, tensor_kind, tensor_layer

    parameters = [
        {
            "parameter": name,
            "layer": tensor_layer(name),
            "kind": tensor_kind(name),
            "axis": region.axis,
            "stacked": region.stacked,
            "whole": region.frozen is None,
            "frozen": region.size if region.frozen is None else region.frozen.numel(),
            "of": region.size,
        }
        for name, region in mask.items()
    ]
    by_kind = {kind: [row for row in parameters if row["kind"] == kind] for kind in KINDS}
    kinds = [
        {"kind": kind, "parameters": len(rows), "frozen": _total(rows, "frozen"), "of": _total(rows, "of")}
        for kind, rows in by_kind.items()
        if rows
    ]
    return {"parameters": parameters, "kinds": kinds}


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> int | None:
    numbers = [row[key] for row in rows]
    return None if None in numbers else sum(numbers)


def _figures(tokens: "Tensor", importance: "Tensor") -> dict[str, Any]:
    total = float(importance.sum())
    top = importance.topk(math.ceil(TOP * importance.numel())).values
    return {
        "tokens": int(tokens),
        "mean": _finite(total / importance.numel()),
        "max": _finite(float(importance.max())),
        "concentration": _finite(float(top.sum()) / total) if total > 0 else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print_score_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(caption=f"top {TOP:.0%}: the share of the module's importance that its top {TOP:.0%} of units carry")
    mixed = _mixed(rows)
    figures_of = "tokens S", "tokens U", "mean I_S", "max I_S", "top S", "mean I_U", "max I_U", "top U"
    _add_columns(table, *(("experts", "unseen") if mixed else ()), *figures_of)
    for row in rows:
        sets = row["safety"], row["utility"]
        cells = [f"{figures['tokens']:,}" for figures in sets]
        for figures in sets:
            shown = (figures["mean"], ".4g"), (figures["max"], ".4g"), (figures["concentration"], ".1%")
            cells += ["-" if value is None else format(value, form) for value, form in shown]
        table.add_row(*_first_cells(row), *_expert_cells(row, mixed), *cells)
    console().print(table)
    if mixed:
        console().print("Tokens of experts: those of the expert that saw most.")


def _print_unit_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from ssah_fast.partition import REPORTED

    names = [category.name.lower() for category in REPORTED if any(row[category.name.lower()] for row in rows)]
    mixed, table = _mixed(rows), Table()
    _add_columns(table, *(("experts", "unseen") if mixed else ()), *(name.upper() for name in names))
    for row in rows:
        table.add_row(*_first_cells(row), *_expert_cells(row, mixed), *(f"{row[name]:,}" for name in names))
    console().print(table)


def _print_mask_rows(document: Mapping[str, Any]) -> None:
    from rich.table import Table

    totals = Table()
    totals.add_column("kind")
    for title in ("parameters", "frozen", "of"):
        totals.add_column(title, justify="right")
    for row in document["kinds"]:
        totals.add_row(row["kind"], *(_number(row[key]) for key in ("parameters", "frozen", "of")))
    table = Table()
    for title in ("layer", "kind", "parameter", "axis", "frozen", "of"):
        table.add_column(title, justify="right" if title in ("layer", "frozen", "of") else "left")
    for row in document["parameters"]:
        axis = "whole" if row["whole"] else _axis_name(row["axis"], row["stacked"])
        layer = "-" if row["layer"] is None else str(row["layer"])
        table.add_row(layer, row["kind"], row["parameter"], axis, _number(row["frozen"]), _number(row["of"]))
    console().print(table)
    console().print(totals)
    console().print("Rows and columns, not elements. A parameter that is not listed trains as a whole.")


def _axis_name(axis: int, stacked: bool) -> str:
    if stacked:
        return f"{_axis_name(axis - 1, False)} per expert"
    return ("rows", "columns")[axis] if axis < 2 else str(axis)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _print_header(document: Mapping[str, Any]) -> None:
    later = ("modules", "categories", "agreement", "reason", "parameters", "kinds", "experts", "unobserved_experts")
    lines = list(_flatten({key: value for key, value in document.items() if key not in later}))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {' '.join(value.split())}")


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON as dotted names and values; the first names ("provenance", "provenance.scores") are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, key if name in ("", "provenance", "scores") else f"{name}.{key}")
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for index, inner in enumerate(value):
            yield from _flatten(inner, f"{name}.{index}")
    else:
        yield name, _listed(value) if isinstance(value, list) else str(value)


def _listed(values: list[Any]) -> str:
    """The values, or of a long list (the digests of the prompts) how many there are; --json has them."""
    return ", ".join(map(str, values)) if len(values) <= 8 else f"{len(values):,} entries"


def _add_columns(table: Any, *titles: str) -> None:
    for title in ("layer", "kind", "module", "units"):
        table.add_column(title, justify="right" if title in ("layer", "units") else "left")
    for title in titles:
        table.add_column(title, justify="right")


def _first_cells(row: Mapping[str, Any]) -> list[str]:
    return [str(row["layer"]), row["kind"], row["module"], f"{row['units']:,}"]


def _mixed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any row stands for experts."""
    return any(row["experts"] is not None for row in rows)


def _expert_cells(row: Mapping[str, Any], mixed: bool) -> list[str]:
    return [_number(row[key]) for key in ("experts", "unseen")] if mixed else []
